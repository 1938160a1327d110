// Levels of 8 bits and vectors of floats: what each tier does in its own way.
#pragma once

#include "../../common/cpu/common.inl"

// The levels that lie at `from`, or `count` of them, as floats.
// Those that the floats of v, numbers of 0 to 255, round to.
#if defined(FASTOPS_VEC_AVX512)
inline VecF load_levels(const uint8_t* from) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)from)))};
}
inline VecF load_levels(const uint8_t* from, int count) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(first16(count), from)))};
}
inline void store_levels_of(VecF v, uint8_t* to) {
  _mm_storeu_si128((__m128i*)to, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v.v)));
}
inline void store_levels_of(VecF v, uint8_t* to, int count) {
  _mm_mask_storeu_epi8(to, first16(count), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v.v)));
}
inline VecF float_of_sums(const int32_t* sums) { return {_mm512_cvtepi32_ps(_mm512_loadu_si512(sums))}; }
// Four levels of each lane as one group of 32 bits; `stride` bytes from group to group.
inline void store_groups(const VecF* v, uint8_t* to, int64_t stride, int count) {
  __m512i group = _mm512_cvtps_epi32(v[0].v);
  for (int c = 1; c < 4; ++c)
    group = _mm512_or_si512(group, _mm512_sll_epi32(_mm512_cvtps_epi32(v[c].v), _mm_cvtsi32_si128(8 * c)));
  if (stride == 4) {
    _mm512_mask_storeu_epi32(to, first16(count), group);
    return;
  }
  alignas(64) uint32_t groups[16];
  _mm512_store_si512(groups, group);
  for (int i = 0; i < count; ++i) __builtin_memcpy(to + i * stride, groups + i, 4);
}
#else
#if defined(FASTOPS_VEC_AVX2)
inline VecF load_levels(const uint8_t* from) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)from)))};
}
inline void store_levels_of(VecF v, uint8_t* to) {
  const __m256i level = _mm256_cvtps_epi32(v.v);
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(level), _mm256_extracti128_si256(level, 1));
  _mm_storel_epi64((__m128i*)to, _mm_packus_epi16(words, words));
}
inline VecF float_of_sums(const int32_t* sums) {
  return {_mm256_cvtepi32_ps(_mm256_loadu_si256((const __m256i*)sums))};
}
#elif defined(FASTOPS_VEC_NEON)
inline VecF load_levels(const uint8_t* from) {
  uint32_t levels;
  __builtin_memcpy(&levels, from, sizeof levels);
  const uint16x8_t words = vmovl_u8(vreinterpret_u8_u32(vdup_n_u32(levels)));
  return {vcvtq_f32_u32(vmovl_u16(vget_low_u16(words)))};
}
inline void store_levels_of(VecF v, uint8_t* to) {
  const uint16x4_t words = vmovn_u32(vcvtnq_u32_f32(v.v));
  const uint32_t levels = vget_lane_u32(vreinterpret_u32_u8(vmovn_u16(vcombine_u16(words, words))), 0);
  __builtin_memcpy(to, &levels, sizeof levels);
}
inline VecF float_of_sums(const int32_t* sums) { return {vcvtq_f32_s32(vld1q_s32(sums))}; }
#else
inline VecF load_levels(const uint8_t* from) {
  VecF v;
  for (int l = 0; l < VecF::size; ++l) v.v[l] = static_cast<float>(from[l]);
  return v;
}
inline void store_levels_of(VecF v, uint8_t* to) {
  const VecF level = round(v);
  for (int l = 0; l < VecF::size; ++l) to[l] = static_cast<uint8_t>(level.v[l]);
}
inline VecF float_of_sums(const int32_t* sums) {
  VecF v;
  for (int l = 0; l < VecF::size; ++l) v.v[l] = static_cast<float>(sums[l]);
  return v;
}
#endif
inline VecF load_levels(const uint8_t* from, int count) {
  uint8_t part[VecF::size] = {};
  for (int l = 0; l < count; ++l) part[l] = from[l];
  return load_levels(part);
}
inline void store_levels_of(VecF v, uint8_t* to, int count) {
  uint8_t part[VecF::size];
  store_levels_of(v, part);
  for (int l = 0; l < count; ++l) to[l] = part[l];
}
inline void store_groups(const VecF* v, uint8_t* to, int64_t stride, int count) {
  uint8_t levels[4][VecF::size];
  for (int c = 0; c < 4; ++c) store_levels_of(v[c], levels[c]);
  for (int i = 0; i < count; ++i)
    for (int c = 0; c < 4; ++c) to[i * stride + c] = levels[c][i];
}
#endif

// NaN becomes low.
inline VecF clamped(VecF v, VecF low, VecF high) { return min(max(v, low), high); }
