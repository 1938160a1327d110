// The scalar tier. Compiled with the baseline's flags: any machine, also Arm. Its vectors are the compiler's portable
// 16-byte ones.
#define FASTOPS_VEC_SCALAR
#include "bodies_prelude.h"

namespace fastops {
namespace scalar {
namespace {
#include "bodies.inl"
}  // namespace
}  // namespace scalar

const KernelTable kernels_scalar = scalar::kernel_table("scalar");

}  // namespace fastops
