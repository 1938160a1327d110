// The avx512 tier. Compiled with -mavx512{f,bw,dq,vl} -mfma -mf16c.
#define FASTOPS_VEC_AVX512
#include "bodies_prelude.h"

namespace fastops {
namespace avx512 {
namespace {
constexpr const char* kTier = "avx512";
#include "../calls.h"
#include "table.inl"
}  // namespace
}  // namespace avx512

const KernelTable kernels_avx512 = avx512::kTable;

}  // namespace fastops
