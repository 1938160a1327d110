// The amx tier. Compiled with the avx512_bf16 tier's flags and -mamx-tile -mamx-bf16 -mamx-int8.
#define FASTOPS_TIER amx
#define FASTOPS_NEXT_TIER avx512_bf16
#define FASTOPS_VEC_AVX512
#define FASTOPS_HAS_AVX512_BF16
#define FASTOPS_HAS_AMX
#include "tier.inl"
