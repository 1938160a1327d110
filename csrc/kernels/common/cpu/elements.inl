// Rows of elements between their storage type and the type in which they are computed, and what vectors need beyond
// vec.h.
#pragma once

#include "math.inl"
#include "vec.h"

template <class S>
inline Compute<S> load_one(const S* p) {
  Compute<S> value;
  Vec<Compute<S>>::load(p, 1).store(&value, 1);
  return value;
}

template <class T>
inline void store_row(const Compute<T>* from, T* to, int count) {
  constexpr int S = Vec<Compute<T>>::size;
  int j = 0;
  for (; j + S <= count; j += S) Vec<Compute<T>>::load(from + j).store(to + j);
  if (j < count) Vec<Compute<T>>::load(from + j, count - j).store(to + j, count - j);
}

template <class T>
inline void widen_row(const T* from, Compute<T>* to, int count) {
  constexpr int S = Vec<Compute<T>>::size;
  int j = 0;
  for (; j + S <= count; j += S) Vec<Compute<T>>::load(from + j).store(to + j);
  if (j < count) Vec<Compute<T>>::load(from + j, count - j).store(to + j, count - j);
}

// Non-temporal stores; p is aligned to a vector. finish_streams() orders them before later stores.
#if defined(FASTOPS_VEC_AVX512)
inline void stream(Vec<float> v, float* p) { _mm512_stream_ps(p, v.v); }
inline void stream(Vec<double> v, double* p) { _mm512_stream_pd(p, v.v); }
inline void finish_streams() { _mm_sfence(); }
#elif defined(FASTOPS_VEC_AVX2)
inline void stream(Vec<float> v, float* p) { _mm256_stream_ps(p, v.v); }
inline void stream(Vec<double> v, double* p) { _mm256_stream_pd(p, v.v); }
inline void finish_streams() { _mm_sfence(); }
#else
template <class C>
inline void stream(Vec<C> v, C* p) {
  v.store(p);
}
inline void finish_streams() {}
#endif

// A loaded vector that stays in a register for several multiply-adds. GCC would make the load an operand of each of
// them. By value: of an element of an array, GCC would keep another copy in memory, and store it every time.
template <class C>
inline Vec<C> in_register(Vec<C> x) {
#if defined(FASTOPS_VEC_AVX512)
  __asm__("" : "+v"(x.v));
#elif defined(FASTOPS_VEC_AVX2)
  __asm__("" : "+x"(x.v));
#elif defined(FASTOPS_VEC_NEON)
  __asm__("" : "+w"(x.v));
#endif
  return x;
}

#if defined(FASTOPS_VEC_AVX512)
inline void deinterleave(VecF a, VecF b, VecF& even, VecF& odd) {
  const __m512i i = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  even = {_mm512_permutex2var_ps(a.v, i, b.v)};
  odd = {_mm512_permutex2var_ps(a.v, _mm512_add_epi32(i, _mm512_set1_epi32(1)), b.v)};
}
inline void deinterleave(VecD a, VecD b, VecD& even, VecD& odd) {
  const __m512i i = _mm512_setr_epi64(0, 2, 4, 6, 8, 10, 12, 14);
  even = {_mm512_permutex2var_pd(a.v, i, b.v)};
  odd = {_mm512_permutex2var_pd(a.v, _mm512_add_epi64(i, _mm512_set1_epi64(1)), b.v)};
}
inline void interleave(VecF even, VecF odd, VecF& a, VecF& b) {
  const __m512i i = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  a = {_mm512_permutex2var_ps(even.v, i, odd.v)};
  b = {_mm512_permutex2var_ps(even.v, _mm512_add_epi32(i, _mm512_set1_epi32(8)), odd.v)};
}
inline void interleave(VecD even, VecD odd, VecD& a, VecD& b) {
  const __m512i i = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11);
  a = {_mm512_permutex2var_pd(even.v, i, odd.v)};
  b = {_mm512_permutex2var_pd(even.v, _mm512_add_epi64(i, _mm512_set1_epi64(4)), odd.v)};
}
#elif defined(FASTOPS_VEC_AVX2)
inline void deinterleave(VecF a, VecF b, VecF& even, VecF& odd) {
  const auto in_order = [](__m256 x) { return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(x), 0xd8)); };
  even = {in_order(_mm256_shuffle_ps(a.v, b.v, 0x88))};
  odd = {in_order(_mm256_shuffle_ps(a.v, b.v, 0xdd))};
}
inline void deinterleave(VecD a, VecD b, VecD& even, VecD& odd) {
  even = {_mm256_permute4x64_pd(_mm256_unpacklo_pd(a.v, b.v), 0xd8)};
  odd = {_mm256_permute4x64_pd(_mm256_unpackhi_pd(a.v, b.v), 0xd8)};
}
inline void interleave(VecF even, VecF odd, VecF& a, VecF& b) {
  const __m256 low = _mm256_unpacklo_ps(even.v, odd.v), high = _mm256_unpackhi_ps(even.v, odd.v);
  a = {_mm256_permute2f128_ps(low, high, 0x20)};
  b = {_mm256_permute2f128_ps(low, high, 0x31)};
}
inline void interleave(VecD even, VecD odd, VecD& a, VecD& b) {
  const __m256d low = _mm256_unpacklo_pd(even.v, odd.v), high = _mm256_unpackhi_pd(even.v, odd.v);
  a = {_mm256_permute2f128_pd(low, high, 0x20)};
  b = {_mm256_permute2f128_pd(low, high, 0x31)};
}
#elif defined(FASTOPS_VEC_NEON)
inline void deinterleave(VecF a, VecF b, VecF& even, VecF& odd) {
  even = {vuzp1q_f32(a.v, b.v)};
  odd = {vuzp2q_f32(a.v, b.v)};
}
inline void deinterleave(VecD a, VecD b, VecD& even, VecD& odd) {
  even = {vuzp1q_f64(a.v, b.v)};
  odd = {vuzp2q_f64(a.v, b.v)};
}
inline void interleave(VecF even, VecF odd, VecF& a, VecF& b) {
  a = {vzip1q_f32(even.v, odd.v)};
  b = {vzip2q_f32(even.v, odd.v)};
}
inline void interleave(VecD even, VecD odd, VecD& a, VecD& b) {
  a = {vzip1q_f64(even.v, odd.v)};
  b = {vzip2q_f64(even.v, odd.v)};
}
#else
template <class C>
inline void deinterleave(Vec<C> a, Vec<C> b, Vec<C>& even, Vec<C>& odd) {
  constexpr int H = Vec<C>::size / 2;
  for (int i = 0; i < H; ++i) {
    even.v[i] = a.v[2 * i];
    even.v[H + i] = b.v[2 * i];
    odd.v[i] = a.v[2 * i + 1];
    odd.v[H + i] = b.v[2 * i + 1];
  }
}
template <class C>
inline void interleave(Vec<C> even, Vec<C> odd, Vec<C>& a, Vec<C>& b) {
  constexpr int H = Vec<C>::size / 2;
  for (int i = 0; i < H; ++i) {
    a.v[2 * i] = even.v[i];
    a.v[2 * i + 1] = odd.v[i];
    b.v[2 * i] = even.v[H + i];
    b.v[2 * i + 1] = odd.v[H + i];
  }
}
#endif
