// The neon tier. Compiled without flags of an instruction set, as every 64-bit Arm processor has NEON.
#define FASTOPS_TIER neon
#define FASTOPS_VEC_NEON
#include "tier.inl"
