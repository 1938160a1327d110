// The avx2 tier. Compiled with -mavx2 -mfma -mf16c.
#define FASTOPS_VEC_AVX2
#include "bodies_prelude.h"

namespace fastops {
namespace avx2 {
namespace {
#include "bodies.inl"
}  // namespace
}  // namespace avx2

const KernelTable kernels_avx2 = avx2::kernel_table("avx2");

}  // namespace fastops
