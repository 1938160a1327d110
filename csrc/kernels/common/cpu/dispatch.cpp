// The choice of the kernel table. It is made here and nowhere else.
#include "isa.h"

namespace fastops {

const KernelTable& kernels(DType dtype) {
  const Isa isa = isa_used();
#if defined(__x86_64__)
  static const KernelTable* const tables[] = {&kernels_scalar, &kernels_avx2, &kernels_avx512, &kernels_avx512_bf16,
                                              &kernels_amx};
  // What the tier of AMX does not do of float32 it hands to avx512 (tier.inl).
  const bool takes = isa <= Isa::avx512 || dtype == DType::bf16 || (isa == Isa::amx && dtype == DType::f32);
  return *tables[static_cast<int>(takes ? isa : Isa::avx512)];
#else
  (void)dtype;
  (void)isa;
  return kernels_scalar;
#endif
}

}  // namespace fastops
