// The avx2 tier. Compiled with -mavx2 -mfma -mf16c.
#define FASTOPS_VEC_AVX2
#include "bodies_prelude.h"

namespace fastops {
namespace avx2 {
namespace {
constexpr const char* kTier = "avx2";
#include "../calls.h"
#include "table.inl"
}  // namespace
}  // namespace avx2

const KernelTable kernels_avx2 = avx2::kTable;

}  // namespace fastops
