// body(T{}), with the storage type T of a dtype that is known at run time.
//
// avx512_bf16 and amx differ from avx512 only in bfloat16 products. They are compiled for bfloat16 alone; dispatch.cpp
// sends every other dtype to avx512, where the code would be the same.
#pragma once

#include "planning.inl"

template <class Body>
inline auto with_dtype(DType dtype, Body&& body) {
#if defined(FASTOPS_HAS_AVX512_BF16)
  (void)dtype;
  return body(bf16_t{});
#elif defined(FASTOPS_TWO_DTYPES)  // under the sanitizers, see build_native.py
  return dtype == DType::f32 ? body(float{}) : body(bf16_t{});
#else
  switch (dtype) {
    case DType::f64:
      return body(double{});
    case DType::bf16:
      return body(bf16_t{});
    case DType::f16:
      return body(f16_t{});
    default:
      return body(float{});
  }
#endif
}

// The same for products of integers, which every tier has for all dtypes but float64.
template <class Body>
inline void with_float_dtype(DType dtype, Body&& body) {
  if (dtype == DType::f32) return body(float{});
  if (dtype == DType::bf16) return body(bf16_t{});
  if constexpr (!kInference)
    if (dtype == DType::f16) return body(f16_t{});
}
