// The avx2 tier. Compiled with -mavx2 -mfma -mf16c.
#define FASTOPS_TIER avx2
#define FASTOPS_VEC_AVX2
#include "tier.inl"
