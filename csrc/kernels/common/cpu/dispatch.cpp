// The choice of the kernel table. It is made here and nowhere else.
#include "isa.h"

namespace fastops {
namespace {

#if defined(__x86_64__)
constexpr const KernelTable* kTables[] = {&kernels_scalar, &kernels_avx2, &kernels_avx512, &kernels_avx512_bf16,
                                          &kernels_amx};
#elif defined(__aarch64__)
constexpr const KernelTable* kTables[] = {&kernels_scalar, nullptr, nullptr, nullptr, nullptr, &kernels_neon};
#else
constexpr const KernelTable* kTables[] = {&kernels_scalar};
#endif

}  // namespace

const KernelTable& kernels(DType dtype) {
  const Isa isa = isa_used();
  // What the tier of AMX does not do of float32 it hands to avx512 (tier.inl).
  const bool takes =
      isa <= Isa::avx512 || dtype == DType::bf16 || (isa == Isa::amx && dtype == DType::f32) || isa == Isa::neon;
  return *kTables[static_cast<int>(takes ? isa : Isa::avx512)];
}

const KernelTable& integer_kernels() { return *kTables[static_cast<int>(isa_used())]; }

}  // namespace fastops
