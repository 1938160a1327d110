// The scalar tier. Compiled without flags of an instruction set, so it runs on any machine, also on Arm. Its vectors
// are the compiler's portable 16-byte vectors.
#define FASTOPS_VEC_SCALAR
#include "bodies_prelude.h"

namespace fastops {
namespace scalar {
namespace {
constexpr const char* kTier = "scalar";
#include "../calls.h"
#include "table.inl"
}  // namespace
}  // namespace scalar

const KernelTable kernels_scalar = scalar::kTable;

}  // namespace fastops
