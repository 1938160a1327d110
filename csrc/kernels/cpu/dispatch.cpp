// The only place that chooses: the tier's table for this process.
#include "isa.h"

namespace fastops {

const KernelTable& kernels() {
#if defined(__x86_64__)
  static const KernelTable* const tables[] = {&kernels_scalar, &kernels_avx2, &kernels_avx512, &kernels_avx512_bf16,
                                              &kernels_amx};
#else
  static const KernelTable* const tables[] = {&kernels_scalar};
#endif
  return *tables[static_cast<int>(isa_used())];
}

}  // namespace fastops
