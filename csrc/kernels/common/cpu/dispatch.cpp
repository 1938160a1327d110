// The choice of the kernel table. It is made here and nowhere else.
#include "isa.h"

namespace fastops {
namespace {

// The tiers that the library was built with, a bit for each Isa: build_native.py may leave some out of the run time.
#if !defined(FASTOPS_TIERS)
#define FASTOPS_TIERS -1
#endif
#define FASTOPS_TABLE_OF(tier) ((FASTOPS_TIERS) >> static_cast<int>(Isa::tier) & 1 ? &kernels_##tier : nullptr)

#if defined(__x86_64__)
constexpr const KernelTable* kTables[] = {&kernels_scalar, FASTOPS_TABLE_OF(avx2), FASTOPS_TABLE_OF(avx512),
                                          FASTOPS_TABLE_OF(avx512_bf16), FASTOPS_TABLE_OF(amx)};
#elif defined(__aarch64__)
constexpr const KernelTable* kTables[] = {&kernels_scalar, nullptr, nullptr, nullptr, nullptr, FASTOPS_TABLE_OF(neon)};
#else
constexpr const KernelTable* kTables[] = {&kernels_scalar};
#endif

}  // namespace

bool has_kernels(Isa isa) {
  const size_t at = static_cast<size_t>(isa);
  return at < sizeof kTables / sizeof kTables[0] && kTables[at] != nullptr;
}

const KernelTable& kernels(DType dtype) {
  const Isa isa = isa_used();
  // What the tier of AMX does not do of float32 it hands to avx512 (tier.inl).
  const bool takes =
      isa <= Isa::avx512 || dtype == DType::bf16 || (isa == Isa::amx && dtype == DType::f32) || isa == Isa::neon;
  return *kTables[static_cast<int>(takes ? isa : Isa::avx512)];
}

const KernelTable& integer_kernels() { return *kTables[static_cast<int>(isa_used())]; }

}  // namespace fastops
