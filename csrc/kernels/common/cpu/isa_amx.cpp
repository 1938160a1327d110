// The amx tier. Compiled with the avx512_bf16 tier's flags and -mamx-tile -mamx-bf16.
#define FASTOPS_VEC_AVX512
#define FASTOPS_HAS_AVX512_BF16
#define FASTOPS_HAS_AMX
#include "bodies_prelude.h"

namespace fastops {
namespace amx {
namespace {
constexpr const char* kTier = "amx";
#include "../calls.h"
#include "table.inl"
}  // namespace
}  // namespace amx

const KernelTable kernels_amx = amx::kTable;

}  // namespace fastops
