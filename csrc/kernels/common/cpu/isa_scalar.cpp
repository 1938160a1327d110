// The scalar tier. Compiled without flags of an instruction set, so it runs on any machine. Its vectors are the
// compiler's portable 16-byte vectors.
#define FASTOPS_TIER scalar
#define FASTOPS_VEC_SCALAR
#include "tier.inl"
