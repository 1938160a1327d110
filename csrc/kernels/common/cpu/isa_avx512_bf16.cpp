// The avx512_bf16 tier. Compiled with the avx512 tier's flags and -mavx512bf16 -mavx512vnni.
#define FASTOPS_VEC_AVX512
#define FASTOPS_HAS_AVX512_BF16
#include "bodies_prelude.h"

namespace fastops {
namespace avx512_bf16 {
namespace {
constexpr const char* kTier = "avx512_bf16";
#include "../calls.h"
#include "table.inl"
}  // namespace
}  // namespace avx512_bf16

const KernelTable kernels_avx512_bf16 = avx512_bf16::kTable;

}  // namespace fastops
