// The only headers that an isa_<tier>.cpp sees, outside the tier's namespace: intrinsics and plain declarations.
#pragma once

#include <sched.h>
#include <stddef.h>
#include <stdint.h>
#include <time.h>

#if defined(__x86_64__)
// GCC's own AVX-512 intrinsics start from a register declared "__Y = __Y", and -Wall reports it in every caller.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#include "kernel_table.h"

// How math.inl and activation_math.inl declare their functions and tables.
#define FASTOPS_FN inline
#define FASTOPS_HOST_FN inline
#define FASTOPS_TABLE constexpr
