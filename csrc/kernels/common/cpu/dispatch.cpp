// The choice of the kernel table. It is made here and nowhere else.
#include "isa.h"

namespace fastops {

const KernelTable& kernels(DType dtype) {
  const Isa isa = isa_used();
#if defined(__x86_64__)
  static const KernelTable* const tables[] = {&kernels_scalar, &kernels_avx2, &kernels_avx512, &kernels_avx512_bf16,
                                              &kernels_amx};
  const bool only_bf16 = isa > Isa::avx512;
  return *tables[static_cast<int>(only_bf16 && dtype != DType::bf16 ? Isa::avx512 : isa)];
#else
  (void)dtype;
  (void)isa;
  return kernels_scalar;
#endif
}

}  // namespace fastops
