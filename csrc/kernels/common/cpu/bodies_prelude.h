// What bodies need outside the tier's namespace: intrinsics and plain declarations, nothing else.
#pragma once

#include <sched.h>
#include <stddef.h>
#include <stdint.h>
#include <time.h>

#if defined(__x86_64__)
// GCC's AVX-512 intrinsics initialise a register by "__Y = __Y". -Wall reports that in every caller.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "../plan.h"

// How math.inl and activation_math.inl declare functions and tables. cuda/formulas.cuh has the CUDA definitions.
#define FASTOPS_FN inline
#define FASTOPS_HOST_FN inline
#define FASTOPS_TABLE constexpr
