// The avx512 tier. Compiled with -mavx512{f,bw,dq,vl} -mfma -mf16c.
#define FASTOPS_VEC_AVX512
#include "bodies_prelude.h"

namespace fastops {
namespace avx512 {
namespace {
#include "bodies.inl"
}  // namespace
}  // namespace avx512

const KernelTable kernels_avx512 = avx512::kernel_table("avx512");

}  // namespace fastops
