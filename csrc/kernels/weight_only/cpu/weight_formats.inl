// Weights on their way to float32: vectors of 32-bit words, each with several weights that are neighbours along k.
#pragma once

#include "../../common/cpu/common.inl"

// float8 as float16, whose exponent has one more bit: what it is there is 2^8 times too small.
constexpr float kFloat8Unit = 256;

#if defined(FASTOPS_VEC_AVX512)
// 16-bit lanes with a float8 in the high byte.
inline __m512i float16_of(__m512i high) {
  const __m512i value = _mm512_and_si512(_mm512_srai_epi16(high, 1), _mm512_set1_epi16(static_cast<short>(0xbfff)));
  const __m512i magnitude = _mm512_and_si512(value, _mm512_set1_epi16(0x7fff));
  const __mmask32 nan = _mm512_cmpeq_epi16_mask(magnitude, _mm512_set1_epi16(0x3f80));
  return _mm512_mask_mov_epi16(value, nan, _mm512_set1_epi16(0x7e00));
}
#elif defined(FASTOPS_VEC_AVX2)
inline __m256i float16_of(__m256i high) {
  const __m256i value = _mm256_and_si256(_mm256_srai_epi16(high, 1), _mm256_set1_epi16(static_cast<short>(0xbfff)));
  const __m256i magnitude = _mm256_and_si256(value, _mm256_set1_epi16(0x7fff));
  const __m256i nan = _mm256_cmpeq_epi16(magnitude, _mm256_set1_epi16(0x3f80));
  return _mm256_or_si256(value, _mm256_and_si256(nan, _mm256_set1_epi16(0x7e00)));
}
#elif defined(FASTOPS_VEC_NEON)
inline uint16x8_t float16_of(int16x8_t high) {
  const int16x8_t value = vandq_s16(vshrq_n_s16(high, 1), vdupq_n_s16(static_cast<int16_t>(0xbfff)));
  const uint16x8_t nan = vceqq_s16(vandq_s16(value, vdupq_n_s16(0x7fff)), vdupq_n_s16(0x3f80));
  return vorrq_u16(vreinterpretq_u16_s16(value), vandq_u16(nan, vdupq_n_u16(0x7e00)));
}
#else
// Of a float8, divided by kFloat8Unit.
inline float float8_part(uint32_t byte) {
  const uint32_t magnitude = byte & 0x7f;
  // A denormal one is a multiple of 2^-9.
  const uint32_t bits = magnitude == 0x7f ? 0x7fc00000 : (magnitude << 20) + (112u << 23);
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  if (magnitude < 8) value = static_cast<float>(magnitude) * 0x1p-17f;
  return (byte & 0x80) != 0 ? -value : value;
}
#endif

template <WeightFormat format>
struct Words {
  static constexpr int kBits = bits_of(format);
  static constexpr int kPerWord = 32 / kBits;
  static constexpr int kLanes = Vec<float>::size;
  static constexpr int kBlock = kPerWord * kLanes;  // weights of a vector of words
  static constexpr int kBytes = 4 * kLanes;
  static constexpr float kUnit = format == WeightFormat::float8 ? kFloat8Unit : 1;  // of what get() gives

  // Which weight of the block lane i of get<j>() is.
  static constexpr int index(int i, int j) {
    return format == WeightFormat::float8 ? j % 2 * 2 * kLanes + 2 * i + j / 2 : i * kPerWord + j;
  }

#if defined(FASTOPS_VEC_AVX512)
  __m512i v;
  static Words load(const void* p) { return {_mm512_loadu_si512(p)}; }
  template <int j>
  Vec<float> get() const {
    if constexpr (format == WeightFormat::float8) {
      const __m512i high =
          j / 2 == 0 ? _mm512_slli_epi16(v, 8) : _mm512_and_si512(v, _mm512_set1_epi16(static_cast<short>(0xff00)));
      return {_mm512_cvtph_ps(_mm512_extracti64x4_epi64(float16_of(high), j % 2))};
    } else if constexpr (format == WeightFormat::uint4) {
      const __m512 values = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
      return {_mm512_permutexvar_ps(_mm512_srli_epi32(v, 4 * j), values)};  // which looks at four bits
    } else {
      return {_mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(v, 24 - 8 * j), 24))};
    }
  }
  // The weights of the next 16 columns.
  static Vec<float> in_order(const unsigned char* p) {
    if constexpr (format == WeightFormat::uint4) {
      const __m128i pairs = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)), half = _mm_set1_epi8(15);
      const __m128i low = _mm_and_si128(pairs, half), high = _mm_and_si128(_mm_srli_epi16(pairs, 4), half);
      return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_unpacklo_epi8(low, high)))};
    } else {
      const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
      if constexpr (format == WeightFormat::int8) return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes))};
      const __m512i high = _mm512_castsi256_si512(_mm256_slli_epi16(_mm256_cvtepu8_epi16(bytes), 8));
      return {_mm512_cvtph_ps(_mm512_castsi512_si256(float16_of(high)))};
    }
  }
#elif defined(FASTOPS_VEC_AVX2)
  __m256i v;
  static Words load(const void* p) { return {_mm256_loadu_si256(static_cast<const __m256i*>(p))}; }
  template <int j>
  Vec<float> get() const {
    if constexpr (format == WeightFormat::float8) {
      const __m256i high =
          j / 2 == 0 ? _mm256_slli_epi16(v, 8) : _mm256_and_si256(v, _mm256_set1_epi16(static_cast<short>(0xff00)));
      return {_mm256_cvtph_ps(_mm256_extracti128_si256(float16_of(high), j % 2))};
    } else if constexpr (format == WeightFormat::uint4) {
      return {_mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32(v, 4 * j), _mm256_set1_epi32(15)))};
    } else {
      return {_mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(v, 24 - 8 * j), 24))};
    }
  }
  // The weights of the next 8 columns.
  static Vec<float> in_order(const unsigned char* p) {
    if constexpr (format == WeightFormat::uint4) {
      int pairs;
      __builtin_memcpy(&pairs, p, sizeof pairs);
      const __m128i both = _mm_cvtsi32_si128(pairs), half = _mm_set1_epi8(15);
      const __m128i low = _mm_and_si128(both, half), high = _mm_and_si128(_mm_srli_epi16(both, 4), half);
      return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_unpacklo_epi8(low, high)))};
    } else {
      const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
      if constexpr (format == WeightFormat::int8) return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes))};
      const __m256i high = _mm256_slli_epi16(_mm256_cvtepu8_epi16(bytes), 8);
      return {_mm256_cvtph_ps(_mm256_castsi256_si128(float16_of(high)))};
    }
  }
#elif defined(FASTOPS_VEC_NEON)
  int32x4_t v;
  static Words load(const void* p) { return {vld1q_s32(static_cast<const int32_t*>(p))}; }
  template <int j>
  Vec<float> get() const {
    if constexpr (format == WeightFormat::float8) {
      const int16x8_t pairs = vreinterpretq_s16_s32(v);
      const int16x8_t high =
          j / 2 == 0 ? vshlq_n_s16(pairs, 8) : vandq_s16(pairs, vdupq_n_s16(static_cast<int16_t>(0xff00)));
      const float16x8_t values = vreinterpretq_f16_u16(float16_of(high));
      return {j % 2 == 0 ? vcvt_f32_f16(vget_low_f16(values)) : vcvt_high_f32_f16(values)};
    } else if constexpr (format == WeightFormat::uint4) {
      return {__builtin_convertvector((v >> 4 * j) & 15, float4)};
    } else {
      return {__builtin_convertvector(v << (24 - 8 * j) >> 24, float4)};
    }
  }
  // The weights of the next 4 columns.
  static Vec<float> in_order(const unsigned char* p) {
    uint32_t bits = 0;
    __builtin_memcpy(&bits, p, 4 * kBits / 8);
    if constexpr (format == WeightFormat::uint4) {
      return {__builtin_convertvector((vdupq_n_s32(static_cast<int32_t>(bits)) >> int4{0, 4, 8, 12}) & 15, float4)};
    } else {
      const int8x8_t bytes = vreinterpret_s8_u32(vdup_n_u32(bits));
      if constexpr (format == WeightFormat::int8) return {vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(bytes))))};
      return {vcvt_f32_f16(vreinterpret_f16_u16(vget_low_u16(float16_of(vshll_n_s8(bytes, 8)))))};
    }
  }
#else
  uint32_t v[kLanes];
  static Words load(const void* p) {
    Words words;
    __builtin_memcpy(words.v, p, sizeof words.v);
    return words;
  }
  template <int j>
  Vec<float> get() const {
    Vec<float> result;
    for (int i = 0; i < kLanes; ++i) {
      const int at = index(i, j);
      result.v[i] = value(v[at / kPerWord] >> at % kPerWord * kBits);
    }
    return result;
  }
  // The weights of the next 4 columns.
  static Vec<float> in_order(const unsigned char* p) {
    Vec<float> result;
    for (int i = 0; i < kLanes; ++i) result.v[i] = value(static_cast<uint32_t>(p[i * kBits / 8]) >> i * kBits % 8);
    return result;
  }
  static float value(uint32_t bits) {
    if constexpr (format == WeightFormat::float8) return float8_part(bits & 255);
    return kBits == 4 ? static_cast<float>(bits & 15) : static_cast<float>(static_cast<int8_t>(bits & 255));
  }
#endif
};
