// The scalar tier. Compiled without flags of an instruction set, so it runs on any machine, also on Arm. Its vectors
// are the compiler's portable 16-byte vectors.
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
