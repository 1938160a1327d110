// The kernels of the CPU: one KernelTable an instruction set. Besides, isa.h and what activation.h
// says about saved tensors are all that is called from outside. The table of avx512_bf16 plans bfloat16 only,
// that of amx bfloat16 and float32.
#pragma once

#include "../calls.h"

namespace fastops {

struct KernelTable {
  const char* isa;  // "scalar", "avx2", "avx512", "avx512_bf16", "amx", "neon"
  Planners planners;
  // Peak rates for benchmarks, in GFLOP/s: independent float32 fused multiply-adds, and the 16-bit multiply of this
  // tier. Measured on the calling thread for about `milliseconds`.
  double (*peak_f32)(double milliseconds);
  double (*peak_bf16)(double milliseconds);
};

extern const KernelTable kernels_scalar;
#if defined(__x86_64__)
extern const KernelTable kernels_avx2;
extern const KernelTable kernels_avx512;
extern const KernelTable kernels_avx512_bf16;
extern const KernelTable kernels_amx;
#elif defined(__aarch64__)
extern const KernelTable kernels_neon;
#endif

}  // namespace fastops
