// A small vector type for each instruction set. The bodies include this file inside
// `namespace fastops::<isa>::{anonymous}`, after isa_<isa>.cpp has defined FASTOPS_VEC_SCALAR, FASTOPS_VEC_NEON,
// FASTOPS_VEC_AVX2 or FASTOPS_VEC_AVX512 (and perhaps FASTOPS_HAS_AVX512_BF16). FASTOPS_32_REGISTERS says that there
// are 32 vector registers, not 16. Everything here has internal linkage, calls no inline std template and holds no
// static data.
//
// Vec<float> and Vec<double> hold `size` lanes:
// - load(p), load(p, count): the second one, 0 <= count <= size, reads only `count` elements; other lanes are zero;
// - store(p), store(p, count): the second one writes only `count` elements;
// - set1(x), zero(), + - * / and unary -.
//
// Vec<float> also loads and stores bf16_t and f16_t. Stores round to nearest even; overflow gives infinity, NaN stays
// NaN, denormals are kept. This holds on every tier, also where its instructions do otherwise.
//
// Elementwise:
// - fma(a, b, c) = a b + c, fnma(a, b, c) = c - a b: rounded once if the tier has such an instruction, else twice;
// - min(a, b), max(a, b): b if either is NaN, as on x86, so the variable goes last;
// - abs, sqrt, copysign(magnitude, sign);
// - round: to an integer, halves to even, for |x| < 2^22 (2^51);
// - power_of_two(n): 2^n, n integral, 2^n a normal number;
// - scale(x, n) = x 2^n, n integral, |n| <= 250 (2000): rounds once, also to denormal results;
// - scale_from(least, x, n): x 2^n for n >= least, zero below; n integral, 2^n a normal number from `least` on;
// - exponent(x), mantissa(x): x = mantissa 2^exponent, 1 <= mantissa < 2, for x positive, finite and normal;
// - quotient(a, b): a / b within 0.6 ulp, for 2^-100 < |b| < 2^100 (2^+-900);
// - quotient_14_bits(a, b): a / b to at least 14 bits, only Vec<float>;
// - product_error(a, b, p) = p - a b, exactly, for p = a b rounded;
// - lt le gt ge eq (a, b): false for NaN; unordered(a, b): whether either is NaN; masks combine with & | !;
// - select(mask, a, b) = mask ? a : b;
// - columns_of(x, shift): the bits of x shifted right; look_up(row, columns): row[columns mod kTableColumns], a table
//   look-up in registers;
// - add_shifted(x, n, shift): the bits of x plus the bits of n shifted left (not on the scalar tier).
// reduce_add(x) is the sum of the lanes, always in the same order.
// Mask<T>: bits() has lane i in bit i; from_bits(bits) is the inverse and ignores bits >= size.
// Limits in parentheses are those of Vec<double>.
#pragma once

template <class T>
struct Vec;
template <class T>
struct Mask;
using VecF = Vec<float>;
using VecD = Vec<double>;
using MaskF = Mask<float>;
using MaskD = Mask<double>;

#if defined(FASTOPS_VEC_AVX512) || defined(FASTOPS_VEC_NEON)
#define FASTOPS_32_REGISTERS
#endif

#if defined(FASTOPS_VEC_AVX512)

template <>
struct Mask<float> {
  __mmask16 m;
  unsigned bits() const { return m; }
  static Mask from_bits(unsigned bits) { return {static_cast<__mmask16>(bits)}; }
};

template <>
struct Mask<double> {
  __mmask8 m;
  unsigned bits() const { return m; }
  static Mask from_bits(unsigned bits) { return {static_cast<__mmask8>(bits)}; }
};

template <class T>
inline Mask<T> operator&(Mask<T> a, Mask<T> b) {
  return Mask<T>::from_bits(static_cast<unsigned>(a.m & b.m));
}
template <class T>
inline Mask<T> operator|(Mask<T> a, Mask<T> b) {
  return Mask<T>::from_bits(static_cast<unsigned>(a.m | b.m));
}
template <class T>
inline Mask<T> operator!(Mask<T> a) {
  return Mask<T>::from_bits(~static_cast<unsigned>(a.m));
}

inline __m512 widen_bf16(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }

// Rounds to nearest even by integer arithmetic, as VCVTNEPS2BF16 flushes denormals to zero.
inline __m256i narrow_bf16_any(__m512 x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  rounded = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
}

inline __m256i narrow_bf16(__m512 x) {
#if defined(FASTOPS_HAS_AVX512_BF16)
  constexpr int kDenormal = 0x20;
  if (__builtin_expect(_mm512_fpclass_ps_mask(x, kDenormal) != 0, 0)) return narrow_bf16_any(x);
  return (__m256i)_mm512_cvtneps_pbh(x);
#else
  return narrow_bf16_any(x);
#endif
}

inline __mmask16 first16(int count) { return static_cast<__mmask16>((1u << count) - 1); }
inline __mmask8 first8(int count) { return static_cast<__mmask8>((1u << count) - 1); }

template <>
struct Vec<float> {
  static constexpr int size = 16;
  __m512 v;

  static Vec set1(float x) { return {_mm512_set1_ps(x)}; }
  static Vec zero() { return {_mm512_setzero_ps()}; }

  static Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static Vec load(const float* p, int count) { return {_mm512_maskz_loadu_ps(first16(count), p)}; }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  void store(float* p, int count) const { _mm512_mask_storeu_ps(p, first16(count), v); }

  static Vec load(const bf16_t* p) { return {widen_bf16(_mm256_loadu_si256((const __m256i*)p))}; }
  static Vec load(const bf16_t* p, int count) { return {widen_bf16(_mm256_maskz_loadu_epi16(first16(count), p))}; }
  void store(bf16_t* p) const { _mm256_storeu_si256((__m256i*)p, narrow_bf16(v)); }
  void store(bf16_t* p, int count) const { _mm256_mask_storeu_epi16(p, first16(count), narrow_bf16(v)); }

  static Vec load(const f16_t* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))}; }
  static Vec load(const f16_t* p, int count) { return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first16(count), p))}; }
  void store(f16_t* p) const {
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  void store(f16_t* p, int count) const {
    _mm256_mask_storeu_epi16(p, first16(count), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
};

template <>
struct Vec<double> {
  static constexpr int size = 8;
  __m512d v;

  static Vec set1(double x) { return {_mm512_set1_pd(x)}; }
  static Vec zero() { return {_mm512_setzero_pd()}; }

  static Vec load(const double* p) { return {_mm512_loadu_pd(p)}; }
  static Vec load(const double* p, int count) { return {_mm512_maskz_loadu_pd(first8(count), p)}; }
  void store(double* p) const { _mm512_storeu_pd(p, v); }
  void store(double* p, int count) const { _mm512_mask_storeu_pd(p, first8(count), v); }
};

inline VecF operator+(VecF a, VecF b) { return {_mm512_add_ps(a.v, b.v)}; }
inline VecD operator+(VecD a, VecD b) { return {_mm512_add_pd(a.v, b.v)}; }
inline VecF operator-(VecF a, VecF b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline VecD operator-(VecD a, VecD b) { return {_mm512_sub_pd(a.v, b.v)}; }
inline VecF operator*(VecF a, VecF b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline VecD operator*(VecD a, VecD b) { return {_mm512_mul_pd(a.v, b.v)}; }
inline VecF operator/(VecF a, VecF b) { return {_mm512_div_ps(a.v, b.v)}; }
inline VecD operator/(VecD a, VecD b) { return {_mm512_div_pd(a.v, b.v)}; }
inline VecF operator-(VecF a) { return {_mm512_xor_ps(a.v, _mm512_set1_ps(-0.0f))}; }
inline VecD operator-(VecD a) { return {_mm512_xor_pd(a.v, _mm512_set1_pd(-0.0))}; }

inline VecF fma(VecF a, VecF b, VecF c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline VecD fma(VecD a, VecD b, VecD c) { return {_mm512_fmadd_pd(a.v, b.v, c.v)}; }
inline VecF fnma(VecF a, VecF b, VecF c) { return {_mm512_fnmadd_ps(a.v, b.v, c.v)}; }
inline VecD fnma(VecD a, VecD b, VecD c) { return {_mm512_fnmadd_pd(a.v, b.v, c.v)}; }

inline VecF min(VecF a, VecF b) { return {_mm512_min_ps(a.v, b.v)}; }
inline VecD min(VecD a, VecD b) { return {_mm512_min_pd(a.v, b.v)}; }
inline VecF max(VecF a, VecF b) { return {_mm512_max_ps(a.v, b.v)}; }
inline VecD max(VecD a, VecD b) { return {_mm512_max_pd(a.v, b.v)}; }
inline VecF abs(VecF a) { return {_mm512_andnot_ps(_mm512_set1_ps(-0.0f), a.v)}; }
inline VecD abs(VecD a) { return {_mm512_andnot_pd(_mm512_set1_pd(-0.0), a.v)}; }
inline VecF sqrt(VecF a) { return {_mm512_sqrt_ps(a.v)}; }
inline VecD sqrt(VecD a) { return {_mm512_sqrt_pd(a.v)}; }
inline VecF copysign(VecF magnitude, VecF sign) {
  const __m512i bit = _mm512_set1_epi32(static_cast<int>(0x80000000u));
  return {_mm512_castsi512_ps(
      _mm512_ternarylogic_epi32(_mm512_castps_si512(magnitude.v), bit, _mm512_castps_si512(sign.v), 0xb8))};
}
inline VecD copysign(VecD magnitude, VecD sign) {
  const __m512i bit = _mm512_set1_epi64(static_cast<long long>(0x8000000000000000ull));
  return {_mm512_castsi512_pd(
      _mm512_ternarylogic_epi64(_mm512_castpd_si512(magnitude.v), bit, _mm512_castpd_si512(sign.v), 0xb8))};
}
inline VecF round(VecF a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline VecD round(VecD a) { return {_mm512_roundscale_pd(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline VecF scale(VecF x, VecF n) { return {_mm512_scalef_ps(x.v, n.v)}; }
inline VecD scale(VecD x, VecD n) { return {_mm512_scalef_pd(x.v, n.v)}; }
inline VecF power_of_two(VecF n) { return scale(VecF::set1(1), n); }
inline VecD power_of_two(VecD n) { return scale(VecD::set1(1), n); }
inline VecF scale_from(VecF least, VecF x, VecF n) {
  return {_mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(n.v, least.v, _CMP_NLT_UQ), x.v, n.v)};
}
inline VecD scale_from(VecD least, VecD x, VecD n) {
  return {_mm512_maskz_scalef_pd(_mm512_cmp_pd_mask(n.v, least.v, _CMP_NLT_UQ), x.v, n.v)};
}
inline VecF exponent(VecF x) { return {_mm512_getexp_ps(x.v)}; }
inline VecD exponent(VecD x) { return {_mm512_getexp_pd(x.v)}; }
inline VecF mantissa(VecF x) { return {_mm512_getmant_ps(x.v, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_src)}; }
inline VecD mantissa(VecD x) { return {_mm512_getmant_pd(x.v, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_src)}; }
// The estimate of 1 / b has 14 bits. The residual a - b q corrects the quotient q, with one rounding at the end.
inline VecF quotient(VecF a, VecF b) {
  const __m512 r = _mm512_rcp14_ps(b.v);
  const __m512 q = _mm512_mul_ps(a.v, r);
  return {_mm512_fmadd_ps(_mm512_fnmadd_ps(b.v, q, a.v), r, q)};
}
inline VecF quotient_14_bits(VecF a, VecF b) { return {_mm512_mul_ps(a.v, _mm512_rcp14_ps(b.v))}; }
inline VecD quotient(VecD a, VecD b) {  // first a Newton step, to 28 bits
  __m512d r = _mm512_rcp14_pd(b.v);
  r = _mm512_fmadd_pd(r, _mm512_fnmadd_pd(b.v, r, _mm512_set1_pd(1)), r);
  const __m512d q = _mm512_mul_pd(a.v, r);
  return {_mm512_fmadd_pd(_mm512_fnmadd_pd(b.v, q, a.v), r, q)};
}

inline MaskF lt(VecF a, VecF b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)}; }
inline MaskD lt(VecD a, VecD b) { return {_mm512_cmp_pd_mask(a.v, b.v, _CMP_LT_OQ)}; }
inline MaskF le(VecF a, VecF b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LE_OQ)}; }
inline MaskD le(VecD a, VecD b) { return {_mm512_cmp_pd_mask(a.v, b.v, _CMP_LE_OQ)}; }
inline MaskF gt(VecF a, VecF b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ)}; }
inline MaskD gt(VecD a, VecD b) { return {_mm512_cmp_pd_mask(a.v, b.v, _CMP_GT_OQ)}; }
inline MaskF ge(VecF a, VecF b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_GE_OQ)}; }
inline MaskD ge(VecD a, VecD b) { return {_mm512_cmp_pd_mask(a.v, b.v, _CMP_GE_OQ)}; }
inline MaskF eq(VecF a, VecF b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ)}; }
inline MaskD eq(VecD a, VecD b) { return {_mm512_cmp_pd_mask(a.v, b.v, _CMP_EQ_OQ)}; }
inline MaskF unordered(VecF a, VecF b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_UNORD_Q)}; }
inline MaskD unordered(VecD a, VecD b) { return {_mm512_cmp_pd_mask(a.v, b.v, _CMP_UNORD_Q)}; }
inline VecF select(MaskF m, VecF a, VecF b) { return {_mm512_mask_blend_ps(m.m, b.v, a.v)}; }
inline VecD select(MaskD m, VecD a, VecD b) { return {_mm512_mask_blend_pd(m.m, b.v, a.v)}; }

constexpr int kTableColumns = 32;
struct Columns {
  __m512i v;
};
inline Columns columns_of(VecF x, int shift) { return {_mm512_srli_epi32(_mm512_castps_si512(x.v), shift)}; }
template <class T>
inline VecF look_up(const T (&row)[kTableColumns], Columns i) {
  const __m512i low = _mm512_loadu_si512(row), high = _mm512_loadu_si512(row + 16);
  return {_mm512_castsi512_ps(_mm512_permutex2var_epi32(low, i.v, high))};
}
inline VecF add_shifted(VecF x, VecF n, int shift) {
  return {_mm512_castsi512_ps(
      _mm512_add_epi32(_mm512_castps_si512(x.v), _mm512_slli_epi32(_mm512_castps_si512(n.v), shift)))};
}

inline float reduce_add(VecF a) {
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
  const __m128 quarter = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  const __m128 pair = _mm_add_ps(quarter, _mm_movehl_ps(quarter, quarter));
  return _mm_cvtss_f32(_mm_add_ss(pair, _mm_shuffle_ps(pair, pair, 1)));
}
inline double reduce_add(VecD a) {
  const __m256d half = _mm256_add_pd(_mm512_castpd512_pd256(a.v), _mm512_extractf64x4_pd(a.v, 1));
  const __m128d pair = _mm_add_pd(_mm256_castpd256_pd128(half), _mm256_extractf128_pd(half, 1));
  return _mm_cvtsd_f64(_mm_add_sd(pair, _mm_unpackhi_pd(pair, pair)));
}

#elif defined(FASTOPS_VEC_AVX2)

template <>
struct Mask<float> {
  __m256 m;
  unsigned bits() const { return static_cast<unsigned>(_mm256_movemask_ps(m)); }
  static Mask from_bits(unsigned bits) {
    const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i all = _mm256_set1_epi32(static_cast<int>(bits));
    return {_mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(all, lane), lane))};
  }
};

template <>
struct Mask<double> {
  __m256d m;
  unsigned bits() const { return static_cast<unsigned>(_mm256_movemask_pd(m)); }
  static Mask from_bits(unsigned bits) {
    const __m256i lane = _mm256_setr_epi64x(1, 2, 4, 8);
    const __m256i all = _mm256_set1_epi64x(static_cast<long long>(bits));
    return {_mm256_castsi256_pd(_mm256_cmpeq_epi64(_mm256_and_si256(all, lane), lane))};
  }
};

inline Mask<float> operator&(Mask<float> a, Mask<float> b) { return {_mm256_and_ps(a.m, b.m)}; }
inline Mask<double> operator&(Mask<double> a, Mask<double> b) { return {_mm256_and_pd(a.m, b.m)}; }
inline Mask<float> operator|(Mask<float> a, Mask<float> b) { return {_mm256_or_ps(a.m, b.m)}; }
inline Mask<double> operator|(Mask<double> a, Mask<double> b) { return {_mm256_or_pd(a.m, b.m)}; }
inline Mask<float> operator!(Mask<float> a) { return {_mm256_xor_ps(a.m, _mm256_castsi256_ps(_mm256_set1_epi32(-1)))}; }
inline Mask<double> operator!(Mask<double> a) {
  return {_mm256_xor_pd(a.m, _mm256_castsi256_pd(_mm256_set1_epi32(-1)))};
}

inline __m256 widen_bf16(__m128i x) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16)); }

inline __m128i narrow_bf16(__m256 x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256 nan = _mm256_cmp_ps(x, x, _CMP_UNORD_Q);
  const __m256 chosen = _mm256_blendv_ps(_mm256_castsi256_ps(rounded), _mm256_castsi256_ps(quiet), nan);
  const __m256i high = _mm256_srli_epi32(_mm256_castps_si256(chosen), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
}

inline __m256i first8(int count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline __m256i first4(int count) {
  return _mm256_cmpgt_epi64(_mm256_set1_epi64x(count), _mm256_setr_epi64x(0, 1, 2, 3));
}

template <class T>
inline T load_bits_of(const void* p) {
  T bits;
  __builtin_memcpy(&bits, p, sizeof bits);
  return bits;
}
// AVX2 has no masked 16-bit loads and stores: the first elements are 4, 2 and 1 of them. memcpy of an unknown length is
// a call: batch_norm of bfloat16 with rows of 49, 319 and 169 us (8x512x7x7, two threads, Zen 1).
inline __m128i load_first16(const void* from, int count) {
  const uint16_t* const p = static_cast<const uint16_t*>(from);
  if (count >= 8) return _mm_loadu_si128((const __m128i*)p);
  const uint16_t* const rest = p + (count & 4);
  uint64_t bits = count & 1 ? rest[count & 2] : 0;
  if (count & 2) bits = bits << 32 | load_bits_of<uint32_t>(rest);
  const __m128i low = _mm_cvtsi64_si128(static_cast<long long>(bits));
  return count & 4 ? _mm_unpacklo_epi64(_mm_loadl_epi64((const __m128i*)p), low) : low;
}
inline void store_first16(void* to, int count, __m128i x) {
  uint16_t* p = static_cast<uint16_t*>(to);
  if (count >= 8) return _mm_storeu_si128((__m128i*)p, x);
  if (count & 4) {
    _mm_storel_epi64((__m128i*)p, x);
    p += 4;
    x = _mm_unpackhi_epi64(x, x);
  }
  const uint64_t bits = static_cast<uint64_t>(_mm_cvtsi128_si64(x));
  if (count & 2) {
    const uint32_t two = static_cast<uint32_t>(bits);
    __builtin_memcpy(p, &two, sizeof two);
  }
  if (count & 1) p[count & 2] = static_cast<uint16_t>(count & 2 ? bits >> 32 : bits);
}

template <>
struct Vec<float> {
  static constexpr int size = 8;
  __m256 v;

  static Vec set1(float x) { return {_mm256_set1_ps(x)}; }
  static Vec zero() { return {_mm256_setzero_ps()}; }

  static Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static Vec load(const float* p, int count) { return {_mm256_maskload_ps(p, first8(count))}; }
  void store(float* p) const { _mm256_storeu_ps(p, v); }
  // Not by a masked store, which AMD's processors without AVX-512 have in microcode: the weight's gradient of
  // 1024 x 3072 -> 768, which packs 6 floats at a time, takes 1.3 times as long with it (Zen 3, one thread).
  void store(float* p, int count) const {
    if (static_cast<unsigned>(count) >= size) {
      if (count > 0) store(p);
      return;
    }
    __m128 part = _mm256_castps256_ps128(v);
    if (count & 4) {
      _mm_storeu_ps(p, part);
      p += 4;
      part = _mm256_extractf128_ps(v, 1);
    }
    if (count & 2) {
      _mm_storel_pi(reinterpret_cast<__m64*>(p), part);
      p += 2;
      part = _mm_movehl_ps(part, part);
    }
    if (count & 1) _mm_store_ss(p, part);
  }

  static Vec load(const bf16_t* p) { return {widen_bf16(_mm_loadu_si128((const __m128i*)p))}; }
  static Vec load(const bf16_t* p, int count) { return {widen_bf16(load_first16(p, count))}; }
  void store(bf16_t* p) const { _mm_storeu_si128((__m128i*)p, narrow_bf16(v)); }
  void store(bf16_t* p, int count) const { store_first16(p, count, narrow_bf16(v)); }

  static Vec load(const f16_t* p) { return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p))}; }
  static Vec load(const f16_t* p, int count) { return {_mm256_cvtph_ps(load_first16(p, count))}; }
  void store(f16_t* p) const { _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT)); }
  void store(f16_t* p, int count) const { store_first16(p, count, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT)); }
};

template <>
struct Vec<double> {
  static constexpr int size = 4;
  __m256d v;

  static Vec set1(double x) { return {_mm256_set1_pd(x)}; }
  static Vec zero() { return {_mm256_setzero_pd()}; }

  static Vec load(const double* p) { return {_mm256_loadu_pd(p)}; }
  static Vec load(const double* p, int count) { return {_mm256_maskload_pd(p, first4(count))}; }
  void store(double* p) const { _mm256_storeu_pd(p, v); }
  void store(double* p, int count) const {
    if (static_cast<unsigned>(count) >= size) {
      if (count > 0) store(p);
      return;
    }
    __m128d part = _mm256_castpd256_pd128(v);
    if (count & 2) {
      _mm_storeu_pd(p, part);
      p += 2;
      part = _mm256_extractf128_pd(v, 1);
    }
    if (count & 1) _mm_store_sd(p, part);
  }
};

inline VecF operator+(VecF a, VecF b) { return {_mm256_add_ps(a.v, b.v)}; }
inline VecD operator+(VecD a, VecD b) { return {_mm256_add_pd(a.v, b.v)}; }
inline VecF operator-(VecF a, VecF b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline VecD operator-(VecD a, VecD b) { return {_mm256_sub_pd(a.v, b.v)}; }
inline VecF operator*(VecF a, VecF b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline VecD operator*(VecD a, VecD b) { return {_mm256_mul_pd(a.v, b.v)}; }
inline VecF operator/(VecF a, VecF b) { return {_mm256_div_ps(a.v, b.v)}; }
inline VecD operator/(VecD a, VecD b) { return {_mm256_div_pd(a.v, b.v)}; }
inline VecF operator-(VecF a) { return {_mm256_xor_ps(a.v, _mm256_set1_ps(-0.0f))}; }
inline VecD operator-(VecD a) { return {_mm256_xor_pd(a.v, _mm256_set1_pd(-0.0))}; }

inline VecF fma(VecF a, VecF b, VecF c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline VecD fma(VecD a, VecD b, VecD c) { return {_mm256_fmadd_pd(a.v, b.v, c.v)}; }
inline VecF fnma(VecF a, VecF b, VecF c) { return {_mm256_fnmadd_ps(a.v, b.v, c.v)}; }
inline VecD fnma(VecD a, VecD b, VecD c) { return {_mm256_fnmadd_pd(a.v, b.v, c.v)}; }

inline VecF min(VecF a, VecF b) { return {_mm256_min_ps(a.v, b.v)}; }
inline VecD min(VecD a, VecD b) { return {_mm256_min_pd(a.v, b.v)}; }
inline VecF max(VecF a, VecF b) { return {_mm256_max_ps(a.v, b.v)}; }
inline VecD max(VecD a, VecD b) { return {_mm256_max_pd(a.v, b.v)}; }
inline VecF abs(VecF a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
inline VecD abs(VecD a) { return {_mm256_andnot_pd(_mm256_set1_pd(-0.0), a.v)}; }
inline VecF sqrt(VecF a) { return {_mm256_sqrt_ps(a.v)}; }
inline VecD sqrt(VecD a) { return {_mm256_sqrt_pd(a.v)}; }
inline VecF copysign(VecF magnitude, VecF sign) {
  const __m256 bit = _mm256_set1_ps(-0.0f);
  return {_mm256_or_ps(_mm256_andnot_ps(bit, magnitude.v), _mm256_and_ps(bit, sign.v))};
}
inline VecD copysign(VecD magnitude, VecD sign) {
  const __m256d bit = _mm256_set1_pd(-0.0);
  return {_mm256_or_pd(_mm256_andnot_pd(bit, magnitude.v), _mm256_and_pd(bit, sign.v))};
}
inline VecF round(VecF a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline VecD round(VecD a) { return {_mm256_round_pd(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }

// The sum has the biased exponent in its low bits.
inline VecF power_of_two(VecF n) {
  const __m256 biased = _mm256_add_ps(n.v, _mm256_set1_ps(0x1.8p23f + 127));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(biased), 23))};
}
inline VecD power_of_two(VecD n) {
  const __m256d biased = _mm256_add_pd(n.v, _mm256_set1_pd(0x1.8p52 + 1023));
  return {_mm256_castsi256_pd(_mm256_slli_epi64(_mm256_castpd_si256(biased), 52))};
}
inline VecF scale_from(VecF least, VecF x, VecF n) {
  return x * VecF{_mm256_and_ps(_mm256_cmp_ps(n.v, least.v, _CMP_GE_OQ), power_of_two(n).v)};
}
inline VecD scale_from(VecD least, VecD x, VecD n) {
  return x * VecD{_mm256_and_pd(_mm256_cmp_pd(n.v, least.v, _CMP_GE_OQ), power_of_two(n).v)};
}
inline VecF exponent(VecF x) {
  const __m256i field = _mm256_srli_epi32(_mm256_castps_si256(x.v), 23);
  return {_mm256_cvtepi32_ps(_mm256_sub_epi32(field, _mm256_set1_epi32(127)))};
}
inline VecD exponent(VecD x) {
  const __m256i field = _mm256_srli_epi64(_mm256_castpd_si256(x.v), 52);
  const __m256i magic = _mm256_castpd_si256(_mm256_set1_pd(0x1p52));
  return {_mm256_sub_pd(_mm256_castsi256_pd(_mm256_or_si256(field, magic)), _mm256_set1_pd(0x1p52 + 1023))};
}
inline VecF mantissa(VecF x) {
  const __m256i low = _mm256_and_si256(_mm256_castps_si256(x.v), _mm256_set1_epi32(0x7fffff));
  return {_mm256_castsi256_ps(_mm256_or_si256(low, _mm256_set1_epi32(0x3f800000)))};
}
inline VecD mantissa(VecD x) {
  const __m256i low = _mm256_and_si256(_mm256_castpd_si256(x.v), _mm256_set1_epi64x(0xfffffffffffff));
  return {_mm256_castsi256_pd(_mm256_or_si256(low, _mm256_set1_epi64x(0x3ff0000000000000)))};
}
inline VecF quotient(VecF a, VecF b) { return a / b; }
inline VecF quotient_14_bits(VecF a, VecF b) { return a / b; }
inline VecD quotient(VecD a, VecD b) { return a / b; }

inline MaskF lt(VecF a, VecF b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ)}; }
inline MaskD lt(VecD a, VecD b) { return {_mm256_cmp_pd(a.v, b.v, _CMP_LT_OQ)}; }
inline MaskF le(VecF a, VecF b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LE_OQ)}; }
inline MaskD le(VecD a, VecD b) { return {_mm256_cmp_pd(a.v, b.v, _CMP_LE_OQ)}; }
inline MaskF gt(VecF a, VecF b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ)}; }
inline MaskD gt(VecD a, VecD b) { return {_mm256_cmp_pd(a.v, b.v, _CMP_GT_OQ)}; }
inline MaskF ge(VecF a, VecF b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_GE_OQ)}; }
inline MaskD ge(VecD a, VecD b) { return {_mm256_cmp_pd(a.v, b.v, _CMP_GE_OQ)}; }
inline MaskF eq(VecF a, VecF b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ)}; }
inline MaskD eq(VecD a, VecD b) { return {_mm256_cmp_pd(a.v, b.v, _CMP_EQ_OQ)}; }
inline MaskF unordered(VecF a, VecF b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_UNORD_Q)}; }
inline MaskD unordered(VecD a, VecD b) { return {_mm256_cmp_pd(a.v, b.v, _CMP_UNORD_Q)}; }
inline VecF select(MaskF m, VecF a, VecF b) { return {_mm256_blendv_ps(b.v, a.v, m.m)}; }
inline VecD select(MaskD m, VecD a, VecD b) { return {_mm256_blendv_pd(b.v, a.v, m.m)}; }

constexpr int kTableColumns = 8;
struct Columns {
  __m256i v;
};
inline Columns columns_of(VecF x, int shift) { return {_mm256_srli_epi32(_mm256_castps_si256(x.v), shift)}; }
template <class T>
inline VecF look_up(const T (&row)[kTableColumns], Columns i) {
  return {_mm256_permutevar8x32_ps(_mm256_castsi256_ps(_mm256_loadu_si256((const __m256i*)row)), i.v)};
}
inline VecF add_shifted(VecF x, VecF n, int shift) {
  return {_mm256_castsi256_ps(
      _mm256_add_epi32(_mm256_castps_si256(x.v), _mm256_slli_epi32(_mm256_castps_si256(n.v), shift)))};
}

inline float reduce_add(VecF a) {
  const __m128 quarter = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  const __m128 pair = _mm_add_ps(quarter, _mm_movehl_ps(quarter, quarter));
  return _mm_cvtss_f32(_mm_add_ss(pair, _mm_shuffle_ps(pair, pair, 1)));
}
inline double reduce_add(VecD a) {
  const __m128d pair = _mm_add_pd(_mm256_castpd256_pd128(a.v), _mm256_extractf128_pd(a.v, 1));
  return _mm_cvtsd_f64(_mm_add_sd(pair, _mm_unpackhi_pd(pair, pair)));
}

#else  // FASTOPS_VEC_SCALAR and FASTOPS_VEC_NEON: 16-byte vectors of the compiler's vector extensions

// The compiler makes NEON instructions of them. What it would make several of is written by intrinsics, whose types
// are the same to it.

typedef float float4 __attribute__((vector_size(16)));
typedef double double2 __attribute__((vector_size(16)));
typedef int32_t int4 __attribute__((vector_size(16)));
typedef int64_t long2 __attribute__((vector_size(16)));

template <>
struct Mask<float> {
  int4 m;  // 0 or -1
#if defined(FASTOPS_VEC_NEON)
  unsigned bits() const { return static_cast<unsigned>(vaddvq_s32(m & int4{1, 2, 4, 8})); }
#else
  unsigned bits() const { return static_cast<unsigned>((m[0] & 1) | (m[1] & 2) | (m[2] & 4) | (m[3] & 8)); }
#endif
  static Mask from_bits(unsigned bits) {
    const int all = static_cast<int>(bits);
    const int4 lane = {1, 2, 4, 8};
    return {(int4{all, all, all, all} & lane) == lane};
  }
};

template <>
struct Mask<double> {
  long2 m;
  unsigned bits() const { return static_cast<unsigned>((m[0] & 1) | (m[1] & 2)); }
  static Mask from_bits(unsigned bits) {
    return {long2{-static_cast<int64_t>(bits & 1), -static_cast<int64_t>(bits >> 1 & 1)}};
  }
};

template <class T>
inline Mask<T> operator&(Mask<T> a, Mask<T> b) {
  return {a.m & b.m};
}
template <class T>
inline Mask<T> operator|(Mask<T> a, Mask<T> b) {
  return {a.m | b.m};
}
template <class T>
inline Mask<T> operator!(Mask<T> a) {
  return {~a.m};
}

#include "../half.inl"

template <>
struct Vec<float> {
  static constexpr int size = 4;
  float4 v;

  static Vec set1(float x) { return {float4{x, x, x, x}}; }
  static Vec zero() { return {float4{}}; }

  static Vec load(const float* p) {
    Vec x;
    __builtin_memcpy(&x.v, p, sizeof x.v);
    return x;
  }
#if defined(FASTOPS_VEC_NEON)
  void store(float* p) const { __builtin_memcpy(p, &v, sizeof v); }
  static Vec load(const float* p, int count) {  // no element goes through memory
    if (count >= size) return load(p);
    Vec x = zero();
    if (count >= 2) {
      x.v = vcombine_f32(vld1_f32(p), vdup_n_f32(0));
      if (count == 3) x.v[2] = p[2];
    } else if (count == 1) {
      x.v[0] = p[0];
    }
    return x;
  }
  void store(float* p, int count) const {
    if (count >= size) return store(p);
    if (count >= 2) vst1_f32(p, vget_low_f32(v));
    if (count == 3) p[2] = v[2];
    if (count == 1) p[0] = v[0];
  }

  static Vec load(const bf16_t* p) {
    return {vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p)), 16))};
  }
  void store(bf16_t* p) const {
    const uint32x4_t bits = vreinterpretq_u32_f32(v), odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t rounded = vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7fff)), odd);
    const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
    vst1_u16(reinterpret_cast<uint16_t*>(p), vshrn_n_u32(vbslq_u32(vceqq_f32(v, v), rounded, quiet), 16));
  }
  static Vec load(const f16_t* p) { return {vcvt_f32_f16(vld1_f16(reinterpret_cast<const float16_t*>(p)))}; }
  void store(f16_t* p) const { vst1_f16(reinterpret_cast<float16_t*>(p), vcvt_f16_f32(v)); }
  template <class Half>
  static Vec load(const Half* p, int count) {
    Half all[size] = {};
    for (int i = 0; i < count; ++i) all[i] = p[i];
    return load(all);
  }
  template <class Half>
  void store(Half* p, int count) const {
    Half all[size];
    store(all);
    for (int i = 0; i < count; ++i) p[i] = all[i];
  }
#else
  static Vec load(const float* p, int count) {
    Vec x = zero();
    for (int i = 0; i < count; ++i) x.v[i] = p[i];
    return x;
  }
  void store(float* p) const { __builtin_memcpy(p, &v, sizeof v); }
  void store(float* p, int count) const {
    for (int i = 0; i < count; ++i) p[i] = v[i];
  }

  // bf16_t and f16_t.
  template <class Half>
  static Vec load(const Half* p) {
    return {float4{widen(p[0]), widen(p[1]), widen(p[2]), widen(p[3])}};
  }
  template <class Half>
  static Vec load(const Half* p, int count) {
    Vec x = zero();
    for (int i = 0; i < count; ++i) x.v[i] = widen(p[i]);
    return x;
  }
  template <class Half>
  void store(Half* p) const {
    for (int i = 0; i < size; ++i) narrow(v[i], p + i);
  }
  template <class Half>
  void store(Half* p, int count) const {
    for (int i = 0; i < count; ++i) narrow(v[i], p + i);
  }
#endif
};

template <>
struct Vec<double> {
  static constexpr int size = 2;
  double2 v;

  static Vec set1(double x) { return {double2{x, x}}; }
  static Vec zero() { return {double2{}}; }

  static Vec load(const double* p) {
    Vec x;
    __builtin_memcpy(&x.v, p, sizeof x.v);
    return x;
  }
  static Vec load(const double* p, int count) {
    Vec x = zero();
    for (int i = 0; i < count; ++i) x.v[i] = p[i];
    return x;
  }
  void store(double* p) const { __builtin_memcpy(p, &v, sizeof v); }
  void store(double* p, int count) const {
    for (int i = 0; i < count; ++i) p[i] = v[i];
  }
};

template <class T>
inline Vec<T> operator+(Vec<T> a, Vec<T> b) {
  return {a.v + b.v};
}
template <class T>
inline Vec<T> operator-(Vec<T> a, Vec<T> b) {
  return {a.v - b.v};
}
template <class T>
inline Vec<T> operator*(Vec<T> a, Vec<T> b) {
  return {a.v * b.v};
}
template <class T>
inline Vec<T> operator/(Vec<T> a, Vec<T> b) {
  return {a.v / b.v};
}
template <class T>
inline Vec<T> operator-(Vec<T> a) {
  return {-a.v};
}
#if defined(FASTOPS_VEC_NEON)
inline VecF fma(VecF a, VecF b, VecF c) { return {vfmaq_f32(c.v, a.v, b.v)}; }
inline VecD fma(VecD a, VecD b, VecD c) { return {vfmaq_f64(c.v, a.v, b.v)}; }
inline VecF fnma(VecF a, VecF b, VecF c) { return {vfmsq_f32(c.v, a.v, b.v)}; }
inline VecD fnma(VecD a, VecD b, VecD c) { return {vfmsq_f64(c.v, a.v, b.v)}; }
#else
template <class T>
inline Vec<T> fma(Vec<T> a, Vec<T> b, Vec<T> c) {
  return {a.v * b.v + c.v};
}
template <class T>
inline Vec<T> fnma(Vec<T> a, Vec<T> b, Vec<T> c) {
  return {c.v - a.v * b.v};
}
#endif

template <class T>
inline Mask<T> lt(Vec<T> a, Vec<T> b) {
  return {a.v < b.v};
}
template <class T>
inline Mask<T> le(Vec<T> a, Vec<T> b) {
  return {a.v <= b.v};
}
template <class T>
inline Mask<T> gt(Vec<T> a, Vec<T> b) {
  return {a.v > b.v};
}
template <class T>
inline Mask<T> ge(Vec<T> a, Vec<T> b) {
  return {a.v >= b.v};
}
template <class T>
inline Mask<T> eq(Vec<T> a, Vec<T> b) {
  return {a.v == b.v};
}
template <class T>
inline Mask<T> unordered(Vec<T> a, Vec<T> b) {
  return {(a.v != a.v) | (b.v != b.v)};
}
template <class T>
inline Vec<T> select(Mask<T> m, Vec<T> a, Vec<T> b) {
  return {m.m ? a.v : b.v};
}
template <class T>
inline Vec<T> min(Vec<T> a, Vec<T> b) {
  return select(lt(a, b), a, b);
}
template <class T>
inline Vec<T> max(Vec<T> a, Vec<T> b) {
  return select(gt(a, b), a, b);
}

inline VecF abs(VecF a) { return {(float4)((int4)a.v & 0x7fffffff)}; }
inline VecD abs(VecD a) { return {(double2)((long2)a.v & 0x7fffffffffffffff)}; }
#if defined(FASTOPS_VEC_NEON)
inline VecF sqrt(VecF a) { return {vsqrtq_f32(a.v)}; }
inline VecD sqrt(VecD a) { return {vsqrtq_f64(a.v)}; }
inline VecF round(VecF a) { return {vrndnq_f32(a.v)}; }
inline VecD round(VecD a) { return {vrndnq_f64(a.v)}; }
#else
inline VecF sqrt(VecF a) {
  for (int i = 0; i < VecF::size; ++i) a.v[i] = __builtin_sqrtf(a.v[i]);
  return a;
}
inline VecD sqrt(VecD a) {
  for (int i = 0; i < VecD::size; ++i) a.v[i] = __builtin_sqrt(a.v[i]);
  return a;
}
#endif
inline VecF copysign(VecF magnitude, VecF sign) {
  return {(float4)(((int4)magnitude.v & 0x7fffffff) | ((int4)sign.v & ~0x7fffffff))};
}
inline VecD copysign(VecD magnitude, VecD sign) {
  return {(double2)(((long2)magnitude.v & 0x7fffffffffffffff) | ((long2)sign.v & ~0x7fffffffffffffff))};
}
#if !defined(FASTOPS_VEC_NEON)
// Adding and subtracting 1.5 2^23 (2^52) rounds to an integer.
inline VecF round(VecF a) { return {(a.v + 0x1.8p23f) - 0x1.8p23f}; }
inline VecD round(VecD a) { return {(a.v + 0x1.8p52) - 0x1.8p52}; }
#endif
inline VecF power_of_two(VecF n) { return {(float4)((int4)(n.v + (0x1.8p23f + 127)) << 23)}; }
inline VecD power_of_two(VecD n) { return {(double2)((long2)(n.v + (0x1.8p52 + 1023)) << 52)}; }
inline VecF scale_from(VecF least, VecF x, VecF n) {
  return {x.v * (float4)((n.v >= least.v) & (int4)power_of_two(n).v)};
}
inline VecD scale_from(VecD least, VecD x, VecD n) {
  return {x.v * (double2)((n.v >= least.v) & (long2)power_of_two(n).v)};
}
inline VecF exponent(VecF x) { return {__builtin_convertvector(((int4)x.v >> 23) - 127, float4)}; }
inline VecD exponent(VecD x) { return {__builtin_convertvector(((long2)x.v >> 52) - 1023, double2)}; }
inline VecF mantissa(VecF x) { return {(float4)(((int4)x.v & 0x7fffff) | 0x3f800000)}; }
inline VecD mantissa(VecD x) { return {(double2)(((long2)x.v & 0xfffffffffffff) | 0x3ff0000000000000)}; }
template <class T>
inline Vec<T> quotient(Vec<T> a, Vec<T> b) {
  return a / b;
}
inline VecF quotient_14_bits(VecF a, VecF b) { return a / b; }

#if defined(FASTOPS_VEC_NEON)

constexpr int kTableColumns = 8;
struct Columns {
  uint8x16_t v;  // of bytes
};
inline Columns columns_of(VecF x, int shift) {
  const int4 column = ((int4)x.v >> shift) & (kTableColumns - 1);
  return {(uint8x16_t)(column * 0x04040404 + 0x03020100)};
}
template <class T>
inline VecF look_up(const T (&row)[kTableColumns], Columns i) {
  const uint8_t* const bytes = reinterpret_cast<const uint8_t*>(row);
  return {(float4)vqtbl2q_u8({vld1q_u8(bytes), vld1q_u8(bytes + 16)}, i.v)};
}
inline VecF add_shifted(VecF x, VecF n, int shift) { return {(float4)((int4)x.v + ((int4)n.v << shift))}; }

#else

// Dekker's product: each factor is split into two parts of at most 12 (27) bits, whose products are exact.
inline VecF product_error(VecF a, VecF b, VecF p) {
  const float4 ah = (float4)((int4)a.v & ~0xfff), al = a.v - ah, bh = (float4)((int4)b.v & ~0xfff), bl = b.v - bh;
  return {((p.v - ah * bh) - ah * bl - al * bh) - al * bl};
}
inline VecD product_error(VecD a, VecD b, VecD p) {
  const double2 ah = (double2)((long2)a.v & ~0x7ffffff), al = a.v - ah, bh = (double2)((long2)b.v & ~0x7ffffff),
                bl = b.v - bh;
  return {((p.v - ah * bh) - ah * bl - al * bh) - al * bl};
}

constexpr int kTableColumns = 32;
struct Columns {
  int4 v;
};
inline Columns columns_of(VecF x, int shift) { return {((int4)x.v >> shift) & (kTableColumns - 1)}; }
inline VecF look_up(const float (&row)[kTableColumns], Columns i) {
  return {float4{row[i.v[0]], row[i.v[1]], row[i.v[2]], row[i.v[3]]}};
}

#endif

#if defined(FASTOPS_VEC_NEON)
inline float reduce_add(VecF a) { return vaddv_f32(vadd_f32(vget_low_f32(a.v), vget_high_f32(a.v))); }
#else
inline float reduce_add(VecF a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }
#endif
inline double reduce_add(VecD a) { return a.v[0] + a.v[1]; }

#endif

#if !defined(FASTOPS_VEC_SCALAR)
template <class T>
inline Vec<T> product_error(Vec<T> a, Vec<T> b, Vec<T> p) {
  return fnma(a, b, p);
}
#endif

#if !defined(FASTOPS_VEC_AVX512)
// Multiplies by two powers of two, as 2^n alone may not be a normal number. At most one of the two products rounds.
template <class T>
inline Vec<T> scale(Vec<T> x, Vec<T> n) {
  const Vec<T> half = round(n * Vec<T>::set1(T(0.5)));
  return x * power_of_two(half) * power_of_two(n - half);
}
#endif
