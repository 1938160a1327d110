// The avx512 tier. Compiled with -mavx512{f,bw,dq,vl} -mfma -mf16c.
#define FASTOPS_TIER avx512
#define FASTOPS_VEC_AVX512
#include "tier.inl"
