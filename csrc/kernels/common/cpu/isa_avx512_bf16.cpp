// The avx512_bf16 tier. Compiled with the avx512 tier's flags and -mavx512bf16 -mavx512vnni.
#define FASTOPS_TIER avx512_bf16
#define FASTOPS_NEXT_TIER avx512
#define FASTOPS_VEC_AVX512
#define FASTOPS_HAS_AVX512_BF16
#include "tier.inl"
