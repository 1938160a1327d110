// Vectors of window positions (taps), one byte per lane. A max pool keeps the positions of its maxima in this form.
//
// Taps<C> belongs to Vec<C>. It has set1(tap), load(p, count) and store(p, count) of `count` bytes, a sum, and
// select(mask, a, b) with the Mask<C> of a comparison of values. equal(p, count, tap) compares stored indices: bytes,
// or PyTorch's int64 positions in the plane.
#pragma once

#include "../../common/cpu/common.inl"
#include "../../conv/cpu/winograd_transform.inl"

// gather(p, stride, count): the elements p[0], p[stride] ... in the first `count` lanes, zero in the others. stride is
// less than kGatherStride.

constexpr int64_t kGatherStride = int64_t{1} << 26;

template <class C>
struct Taps;

#if defined(FASTOPS_VEC_AVX512)

inline __mmask16 lanes_mask(MaskF m) { return m.m; }
inline __mmask16 lanes_mask(MaskD m) { return m.m; }

template <class C>
struct Taps {
  __m128i v;  // the lowest Vec<C>::size bytes

  static Taps set1(int tap) { return {_mm_set1_epi8(static_cast<char>(tap))}; }
  static Taps load(const uint8_t* p, int count) { return {_mm_maskz_loadu_epi8(first16(count), p)}; }
  void store(uint8_t* p, int count) const { _mm_mask_storeu_epi8(p, first16(count), v); }
};
template <class C>
inline Taps<C> operator+(Taps<C> a, Taps<C> b) {
  return {_mm_add_epi8(a.v, b.v)};
}
template <class C>
inline Taps<C> select(Mask<C> m, Taps<C> a, Taps<C> b) {
  return {_mm_mask_blend_epi8(lanes_mask(m), b.v, a.v)};
}

inline VecF gather(const float* p, int64_t stride, int count) {
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i at = _mm512_mullo_epi32(lanes, _mm512_set1_epi32(static_cast<int>(stride)));
  return {_mm512_mask_i32gather_ps(_mm512_setzero_ps(), first16(count), at, p, 4)};
}
inline VecD gather(const double* p, int64_t stride, int count) {
  const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i at = _mm256_mullo_epi32(lanes, _mm256_set1_epi32(static_cast<int>(stride)));
  return {_mm512_mask_i32gather_pd(_mm512_setzero_pd(), first8(count), at, p, 8)};
}

template <class C>
inline Mask<C> equal(const uint8_t* p, int count, int64_t tap) {
  const __mmask16 m = first16(count);
  const __m128i bytes = _mm_maskz_loadu_epi8(m, p);
  return Mask<C>::from_bits(_mm_mask_cmpeq_epi8_mask(m, bytes, _mm_set1_epi8(static_cast<char>(tap))));
}
template <class C>
inline Mask<C> equal(const int64_t* p, int count, int64_t position) {
  const __m512i wanted = _mm512_set1_epi64(position);
  unsigned bits = 0;
  for (int i = 0; i < count; i += 8) {
    const __mmask8 m = first8(count - i < 8 ? count - i : 8);
    bits |= static_cast<unsigned>(_mm512_mask_cmpeq_epi64_mask(m, _mm512_maskz_loadu_epi64(m, p + i), wanted)) << i;
  }
  return Mask<C>::from_bits(bits);
}

#else

#if defined(FASTOPS_VEC_AVX2)

template <>
struct Taps<float> {
  __m256i v;  // a byte at the low end of each lane

  static Taps set1(int tap) { return {_mm256_set1_epi32(tap)}; }
  static Taps load(const uint8_t* p, int count) {
    uint64_t bytes = 0;
    __builtin_memcpy(&bytes, p, static_cast<size_t>(count));
    return {_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<long long>(bytes)))};
  }
  void store(uint8_t* p, int count) const {
    const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    const uint64_t bytes = static_cast<uint64_t>(_mm_cvtsi128_si64(_mm_packus_epi16(words, words)));
    __builtin_memcpy(p, &bytes, static_cast<size_t>(count));
  }
};
template <>
struct Taps<double> {
  __m256i v;

  static Taps set1(int tap) { return {_mm256_set1_epi64x(tap)}; }
  static Taps load(const uint8_t* p, int count) {
    uint32_t bytes = 0;
    __builtin_memcpy(&bytes, p, static_cast<size_t>(count));
    return {_mm256_cvtepu8_epi64(_mm_cvtsi32_si128(static_cast<int>(bytes)))};
  }
  void store(uint8_t* p, int count) const {
    alignas(32) int64_t lanes[4];
    _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), v);
    for (int i = 0; i < count; ++i) p[i] = static_cast<uint8_t>(lanes[i]);
  }
};
inline Taps<float> operator+(Taps<float> a, Taps<float> b) { return {_mm256_add_epi32(a.v, b.v)}; }
inline Taps<double> operator+(Taps<double> a, Taps<double> b) { return {_mm256_add_epi64(a.v, b.v)}; }
inline Taps<float> select(MaskF m, Taps<float> a, Taps<float> b) {
  return {_mm256_blendv_epi8(b.v, a.v, _mm256_castps_si256(m.m))};
}
inline Taps<double> select(MaskD m, Taps<double> a, Taps<double> b) {
  return {_mm256_blendv_epi8(b.v, a.v, _mm256_castpd_si256(m.m))};
}

inline VecF gather(const float* p, int64_t stride, int count) {
  const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i at = _mm256_mullo_epi32(lanes, _mm256_set1_epi32(static_cast<int>(stride)));
  const __m256 mask = _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(count), lanes));
  return {_mm256_mask_i32gather_ps(_mm256_setzero_ps(), p, at, mask, 4)};
}
inline VecD gather(const double* p, int64_t stride, int count) {
  const __m128i lanes = _mm_setr_epi32(0, 1, 2, 3);
  const __m128i at = _mm_mullo_epi32(lanes, _mm_set1_epi32(static_cast<int>(stride)));
  const __m256d mask = _mm256_castsi256_pd(_mm256_cvtepi32_epi64(_mm_cmpgt_epi32(_mm_set1_epi32(count), lanes)));
  return {_mm256_mask_i32gather_pd(_mm256_setzero_pd(), p, at, mask, 8)};
}

inline MaskF equal_bytes(const uint8_t* p, int count, int64_t tap, MaskF) {
  const __m256i wanted = _mm256_set1_epi32(static_cast<int>(tap));
  return {_mm256_castsi256_ps(_mm256_cmpeq_epi32(Taps<float>::load(p, count).v, wanted))};
}
inline MaskD equal_bytes(const uint8_t* p, int count, int64_t tap, MaskD) {
  const __m256i wanted = _mm256_set1_epi64x(tap);
  return {_mm256_castsi256_pd(_mm256_cmpeq_epi64(Taps<double>::load(p, count).v, wanted))};
}

#else

template <class C>
struct Taps {
  decltype(Mask<C>::m) v;

  static Taps set1(int tap) {
    Taps x{};
    for (int i = 0; i < Vec<C>::size; ++i) x.v[i] = tap;
    return x;
  }
  static Taps load(const uint8_t* p, int count) {
    Taps x = set1(0);
    for (int i = 0; i < count; ++i) x.v[i] = p[i];
    return x;
  }
  void store(uint8_t* p, int count) const {
    for (int i = 0; i < Vec<C>::size && i < count; ++i) p[i] = static_cast<uint8_t>(v[i]);
  }
};
template <class C>
inline Taps<C> operator+(Taps<C> a, Taps<C> b) {
  return {a.v + b.v};
}
template <class C>
inline Taps<C> select(Mask<C> m, Taps<C> a, Taps<C> b) {
  return {m.m ? a.v : b.v};
}
template <class C>
inline Vec<C> gather(const C* p, int64_t stride, int count) {
  Vec<C> x = Vec<C>::zero();
  for (int i = 0; i < count; ++i) x.v[i] = p[i * stride];
  return x;
}

template <class C>
inline Mask<C> equal_bytes(const uint8_t* p, int count, int64_t tap, Mask<C>) {
  return {Taps<C>::load(p, count).v == Taps<C>::set1(static_cast<int>(tap)).v};
}

#endif

// Lanes from `count` on may compare equal. Callers add zero there, or do not store them.
template <class C>
inline Mask<C> equal(const uint8_t* p, int count, int64_t tap) {
  return equal_bytes(p, count, tap, Mask<C>{});
}
template <class C>
inline Mask<C> equal(const int64_t* p, int count, int64_t position) {
  unsigned bits = 0;
  for (int i = 0; i < count; ++i) bits |= static_cast<unsigned>(p[i] == position) << i;
  return Mask<C>::from_bits(bits);
}

#endif
