// Products of 8-bit integers, u8 x s8 -> s32, exact. A is a panel of kInt8Mr rows of x as quantize_row rounds them, B a
// panel of kInt8Nr rows of the weights; k comes in chunks of kInt8Chunk.
//
//   A: chunk after chunk; in each, row after row of kInt8Chunk elements
//   B: group after group of kInt8Group neighbours along k; in each, the groups of all columns. Zero where k or columns
//   end
//
// AMX: TDPBUSD on 2 x 2 tiles of 16 x 16 sums. AVX-512 VNNI: VPDPBUSD. Else 16-bit elements and VPMADDWD, whose sums of
// two products are exact, or NEON's multiply-adds of 16 bits into sums of 32; sums of two products of 8-bit elements
// (VPMADDUBSW) would saturate.
#pragma once

#include "../../common/cpu/common.inl"
#include "../../gemm/cpu/amx.inl"
#include "../../gemm/cpu/pack.inl"

constexpr int kInt8Chunk = 64;

#if defined(FASTOPS_HAS_AVX512_BF16)  // these processors have VNNI
using Int8A = uint8_t;
using Int8B = int8_t;
#else
using Int8A = int16_t;
using Int8B = int16_t;
#endif
constexpr int kInt8Group = 4 / static_cast<int>(sizeof(Int8A));  // a group has 32 bits
#if defined(FASTOPS_HAS_AMX)
constexpr int kInt8Mr = 32;
#elif defined(FASTOPS_VEC_AVX512)
constexpr int kInt8Mr = 12;
#elif defined(FASTOPS_VEC_AVX2) || defined(FASTOPS_VEC_NEON)
constexpr int kInt8Mr = 6;
#else
constexpr int kInt8Mr = 4;
#endif
constexpr int kInt8Nr = 2 * Vec<float>::size;

// ---- vectors of 32-bit sums

#if defined(FASTOPS_VEC_AVX512)
struct Int8Sums {
  __m512i v;
  static Int8Sums zero() { return {_mm512_setzero_si512()}; }
  static Int8Sums load(const void* p) { return {_mm512_loadu_si512(p)}; }
  void store(int32_t* p) const { _mm512_storeu_si512(p, v); }
};
inline Int8Sums every_lane(const Int8A* group) {
  int32_t bits;
  __builtin_memcpy(&bits, group, sizeof bits);
  return {_mm512_set1_epi32(bits)};
}
inline Int8Sums add_products(Int8Sums a, Int8Sums b, Int8Sums sums) {
#if defined(FASTOPS_HAS_AVX512_BF16)
  return {_mm512_dpbusd_epi32(sums.v, a.v, b.v)};
#else
  return {_mm512_add_epi32(sums.v, _mm512_madd_epi16(a.v, b.v))};
#endif
}
// to[i] = min(max(round(v[i]) + shift, 0), 255) for a chunk; 0 for NaN.
inline void store_levels(const Vec<float>* v, int32_t shift, Int8A* to) {
  const __m512i by = _mm512_set1_epi32(shift),
                order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  __m512i level[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) level[i] = _mm512_add_epi32(_mm512_cvtps_epi32(v[i].v), by);
  const __m512i low = _mm512_packs_epi32(level[0], level[1]), high = _mm512_packs_epi32(level[2], level[3]);
  const __m512i bytes = _mm512_permutexvar_epi32(order, _mm512_packus_epi16(low, high));
#if defined(FASTOPS_HAS_AVX512_BF16)
  _mm512_storeu_si512(to, bytes);
#else
  _mm512_storeu_si512(to, _mm512_cvtepu8_epi16(_mm512_castsi512_si256(bytes)));
  _mm512_storeu_si512(to + 32, _mm512_cvtepu8_epi16(_mm512_extracti64x4_epi64(bytes, 1)));
#endif
}
// sums - zero w_sums
inline Vec<float> without_zero(const int32_t* sums, const int32_t* w_sums, int32_t zero) {
  const __m512i correction = _mm512_mullo_epi32(_mm512_set1_epi32(zero), _mm512_loadu_si512(w_sums));
  return {_mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_loadu_si512(sums), correction))};
}
#elif defined(FASTOPS_VEC_AVX2)
struct Int8Sums {
  __m256i v;
  static Int8Sums zero() { return {_mm256_setzero_si256()}; }
  static Int8Sums load(const void* p) { return {_mm256_loadu_si256(static_cast<const __m256i*>(p))}; }
  void store(int32_t* p) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
};
inline Int8Sums every_lane(const Int8A* group) {
  int32_t bits;
  __builtin_memcpy(&bits, group, sizeof bits);
  return {_mm256_set1_epi32(bits)};
}
inline Int8Sums add_products(Int8Sums a, Int8Sums b, Int8Sums sums) {
  return {_mm256_add_epi32(sums.v, _mm256_madd_epi16(a.v, b.v))};
}
inline void store_levels(const Vec<float>* v, int32_t shift, Int8A* to) {
  const __m256i by = _mm256_set1_epi32(shift), most = _mm256_set1_epi32(255);
  for (int i = 0; i < 8; ++i) {
    const __m256i level = _mm256_add_epi32(_mm256_cvtps_epi32(v[i].v), by);
    const __m256i kept = _mm256_min_epi32(_mm256_max_epi32(level, _mm256_setzero_si256()), most);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 8 * i),
                     _mm_packs_epi32(_mm256_castsi256_si128(kept), _mm256_extracti128_si256(kept, 1)));
  }
}
inline Vec<float> without_zero(const int32_t* sums, const int32_t* w_sums, int32_t zero) {
  const __m256i correction = _mm256_mullo_epi32(_mm256_set1_epi32(zero), Int8Sums::load(w_sums).v);
  return {_mm256_cvtepi32_ps(_mm256_sub_epi32(Int8Sums::load(sums).v, correction))};
}
#elif defined(FASTOPS_VEC_NEON)
// Sums over the even and the odd k of a pair, for two columns each; store adds them up. An operand is in `low` alone.
struct Int8Sums {
  int32x4_t low, high;
  static Int8Sums zero() { return {vdupq_n_s32(0), vdupq_n_s32(0)}; }
  static Int8Sums load(const int32_t* p) {
    const int32x4_t sums = vld1q_s32(p), none = vdupq_n_s32(0);
    return {vzip1q_s32(sums, none), vzip2q_s32(sums, none)};
  }
  static Int8Sums load(const Int8B* p) { return {vreinterpretq_s32_s16(vld1q_s16(p)), vdupq_n_s32(0)}; }
  void store(int32_t* p) const { vst1q_s32(p, vpaddq_s32(low, high)); }
};
inline Int8Sums every_lane(const Int8A* group) {
  int32_t bits;
  __builtin_memcpy(&bits, group, sizeof bits);
  return {vdupq_n_s32(bits), vdupq_n_s32(0)};
}
inline Int8Sums add_products(Int8Sums a, Int8Sums b, Int8Sums sums) {
  const int16x8_t x = vreinterpretq_s16_s32(a.low), w = vreinterpretq_s16_s32(b.low);
  return {vmlal_s16(sums.low, vget_low_s16(x), vget_low_s16(w)), vmlal_high_s16(sums.high, x, w)};
}
inline void store_levels(const Vec<float>* v, int32_t shift, Int8A* to) {
  const VecF by = VecF::set1(static_cast<float>(shift)), most = VecF::set1(255);
  for (int i = 0; i < kInt8Chunk / 4; ++i) {
    const VecF level = min(max(round(v[i]) + by, VecF::zero()), most);  // NaN goes first, so that it becomes a number
    vst1_s16(to + 4 * i, vmovn_s32(vcvtq_s32_f32(level.v)));
  }
}
inline Vec<float> without_zero(const int32_t* sums, const int32_t* w_sums, int32_t zero) {
  return {vcvtq_f32_s32(vmlsq_n_s32(vld1q_s32(sums), vld1q_s32(w_sums), zero))};
}
#else
struct Int8Sums {
  union {
    int32_t v[4];
    int16_t pairs[8];
  };
  static Int8Sums zero() { return {{{0, 0, 0, 0}}}; }
  static Int8Sums load(const void* p) {
    Int8Sums sums;
    __builtin_memcpy(sums.v, p, sizeof sums.v);
    return sums;
  }
  void store(int32_t* p) const { __builtin_memcpy(p, v, sizeof v); }
};
inline Int8Sums every_lane(const Int8A* group) {
  Int8Sums all;
  for (int l = 0; l < 4; ++l) {
    all.pairs[2 * l] = group[0];
    all.pairs[2 * l + 1] = group[1];
  }
  return all;
}
inline Int8Sums add_products(Int8Sums a, Int8Sums b, Int8Sums sums) {
  for (int l = 0; l < 4; ++l) sums.v[l] += a.pairs[2 * l] * b.pairs[2 * l] + a.pairs[2 * l + 1] * b.pairs[2 * l + 1];
  return sums;
}
inline void store_levels(const Vec<float>* v, int32_t shift, Int8A* to) {
  for (int i = 0; i < kInt8Chunk / 4; ++i) {
    // NaN goes first, so that it becomes a number.
    const Vec<float> level =
        min(max(round(v[i]) + Vec<float>::set1(static_cast<float>(shift)), Vec<float>::zero()), Vec<float>::set1(255));
    for (int l = 0; l < 4; ++l) to[4 * i + l] = static_cast<Int8A>(level.v[l]);
  }
}
inline Vec<float> without_zero(const int32_t* sums, const int32_t* w_sums, int32_t zero) {
  Vec<float> result;
  for (int l = 0; l < 4; ++l) result.v[l] = static_cast<float>(sums[l] - zero * w_sums[l]);
  return result;
}
#endif

// ---- products

#if defined(FASTOPS_HAS_AMX)

using Int8Session = AmxSession;

// The tiles of a panel with this many rows.
struct Int8Rows {
  const int rows;
  explicit Int8Rows(int rows) : rows(rows) {
    if (rows < kInt8Mr) configure_tiles(rows);
  }
  ~Int8Rows() {
    if (rows < kInt8Mr) configure_tiles(kInt8Mr);
  }
  Int8Rows(const Int8Rows&) = delete;
  Int8Rows& operator=(const Int8Rows&) = delete;
};

// Bytes of the next panel of A that each chunk prefetches from L3: 8 tiles fetch all of it.
constexpr int kAheadOfChunk = kInt8Mr * kInt8Chunk / 8;

template <bool two_rows, bool two_cols, class Waiting>
__attribute__((noinline)) void multiply_int8_tiles(int64_t chunks, const Int8A* a, const Int8B* b, bool first,
                                                   int32_t* sums, Waiting& waiting, const Int8A* ahead) {
  constexpr int kChunkOfA = kInt8Mr * kInt8Chunk, kChunkOfB = kInt8Nr * kInt8Chunk, kStride = 4 * kInt8Nr;
  memory_fence_for_compiler();
  if (first) {
    _tile_zero(0);
    if (two_cols) _tile_zero(1);
    if (two_rows) _tile_zero(2);
    if (two_rows && two_cols) _tile_zero(3);
  } else {
    _tile_loadd(0, sums, kStride);
    if (two_cols) _tile_loadd(1, sums + 16, kStride);
    if (two_rows) _tile_loadd(2, sums + 16 * kInt8Nr, kStride);
    if (two_rows && two_cols) _tile_loadd(3, sums + 16 * kInt8Nr + 16, kStride);
  }
  const int step = static_cast<int>(ceil_div(kInt8Mr, larger<int64_t>(chunks, 1)));
  for (int64_t c = 0; c < chunks; ++c, a += kChunkOfA, b += kChunkOfB) {
    _tile_loadd(6, b, kStride);
    _tile_loadd(4, a, kInt8Chunk);
    _tile_dpbusd(0, 4, 6);
    if (two_cols) {
      _tile_loadd(7, b + 64, kStride);
      _tile_dpbusd(1, 4, 7);
    }
    if (two_rows) {
      _tile_loadd(5, a + kChunkOfA / 2, kInt8Chunk);
      _tile_dpbusd(2, 5, 6);
      if (two_cols) _tile_dpbusd(3, 5, 7);
    }
    // The vector units have nothing else to do, and L2 little.
    waiting.finish(static_cast<int>(c + 1) * step);
    for (int line = 0; line < kAheadOfChunk; line += 64) _mm_prefetch(ahead + c * kAheadOfChunk + line, _MM_HINT_T1);
  }
  _tile_stored(0, sums, kStride);
  if (two_cols) _tile_stored(1, sums + 16, kStride);
  if (two_rows) _tile_stored(2, sums + 16 * kInt8Nr, kStride);
  if (two_rows && two_cols) _tile_stored(3, sums + 16 * kInt8Nr + 16, kStride);
  memory_fence_for_compiler();
}

// sums[kInt8Mr][kInt8Nr] = A B, or sums + A B if it is not the first block of k. k: a multiple of kInt8Chunk.
// Meanwhile some or all of the tile before this one may be finished, and an eighth of k x kInt8Mr elements from `ahead`
// on prefetched.
template <class Waiting>
inline void multiply_int8(const Int8Rows& shape, int64_t k, const Int8A* a, const Int8B* b, int cols, bool first,
                          int32_t* sums, Waiting& waiting, const Int8A* ahead) {
  const auto multiply =
      shape.rows > 16 ? cols > 16 ? multiply_int8_tiles<true, true, Waiting> : multiply_int8_tiles<true, false, Waiting>
      : cols > 16     ? multiply_int8_tiles<false, true, Waiting>
                      : multiply_int8_tiles<false, false, Waiting>;
  multiply(k / kInt8Chunk, a, b, first, sums, waiting, ahead);
}

#else

using Int8Session = NoSession;

template <int rows>
__attribute__((noinline)) void multiply_int8_rows(int64_t k, const Int8A* a, const Int8B* b, bool first,
                                                  int32_t* sums) {
  constexpr int kLanes = Vec<float>::size;
  Int8Sums acc[rows][2];
#pragma GCC unroll 12
  for (int r = 0; r < rows; ++r) {
    acc[r][0] = first ? Int8Sums::zero() : Int8Sums::load(sums + r * kInt8Nr);
    acc[r][1] = first ? Int8Sums::zero() : Int8Sums::load(sums + r * kInt8Nr + kLanes);
  }
  for (; k > 0; k -= kInt8Chunk, a += kInt8Mr * kInt8Chunk)
    for (int g = 0; g < smaller<int64_t>(k, kInt8Chunk); g += kInt8Group, b += kInt8Nr * kInt8Group) {
      const Int8Sums left = Int8Sums::load(b), right = Int8Sums::load(b + kLanes * kInt8Group);
#pragma GCC unroll 12
      for (int r = 0; r < rows; ++r) {
        const Int8Sums x = every_lane(a + r * kInt8Chunk + g);
        acc[r][0] = add_products(x, left, acc[r][0]);
        acc[r][1] = add_products(x, right, acc[r][1]);
      }
    }
#pragma GCC unroll 12
  for (int r = 0; r < rows; ++r) {
    acc[r][0].store(sums + r * kInt8Nr);
    acc[r][1].store(sums + r * kInt8Nr + kLanes);
  }
}

// The kernel of a panel with this many rows.
struct Int8Rows {
  void (*multiply)(int64_t k, const Int8A* a, const Int8B* b, bool first, int32_t* sums);
  explicit Int8Rows(int rows)
      : multiply(rows == 1             ? multiply_int8_rows<1>
                 : rows == 2           ? multiply_int8_rows<2>
                 : rows <= 4           ? multiply_int8_rows<4>
                 : rows <= kInt8Mr - 4 ? multiply_int8_rows < kInt8Mr <= 4 ? 4 : kInt8Mr - 4 >
                                       : multiply_int8_rows<kInt8Mr>) {}
};

// sums[kInt8Mr][kInt8Nr] = A B, or sums + A B if it is not the first block of k. k: any for the last block, else a
// multiple of kInt8Chunk.
template <class Waiting>
inline void multiply_int8(const Int8Rows& shape, int64_t k, const Int8A* a, const Int8B* b, int, bool first,
                          int32_t* sums, Waiting&, const Int8A*) {
  shape.multiply(k, a, b, first, sums);
}

#endif

// ---- packing

// A panel of B from `cols` rows of weights of k elements, and the sum of each row.
inline void pack_int8_panel(const int8_t* w, int64_t row_stride, int cols, int64_t k, Int8B* to, int32_t* sums) {
  const int64_t padded = round_up(k, kInt8Chunk);
  for (int j = 0; j < kInt8Nr; ++j) sums[j] = 0;
#if defined(FASTOPS_HAS_AVX512_BF16)
  // 16 rows of 16 groups are a square of 32-bit elements.
  Int8Sums total[2] = {Int8Sums::zero(), Int8Sums::zero()};
  const Int8Sums ones = {_mm512_set1_epi8(1)};
  for (int64_t p = 0; p < padded; p += kInt8Chunk, to += kInt8Nr * kInt8Chunk)
    for (int half = 0; half < 2; ++half) {
      const __mmask64 valid = k - p >= 64 ? ~__mmask64{0} : (__mmask64{1} << (k - p)) - 1;
      Vec<float> r[16];
      for (int j = 0; j < 16; ++j) {
        const int row = half * 16 + j;
        r[j].v = row < cols ? _mm512_castsi512_ps(_mm512_maskz_loadu_epi8(valid, w + row * row_stride + p))
                            : _mm512_setzero_ps();
      }
      transpose(r);
      for (int g = 0; g < 16; ++g) {
        const Int8Sums group = {_mm512_castps_si512(r[g].v)};
        total[half] = add_products(ones, group, total[half]);
        _mm512_storeu_si512(to + (g * kInt8Nr + half * 16) * kInt8Group, group.v);
      }
    }
  total[0].store(sums);
  total[1].store(sums + 16);
#else
  for (int64_t p = 0; p < padded; p += kInt8Group)
    for (int j = 0; j < kInt8Nr; ++j)
      for (int e = 0; e < kInt8Group; ++e, ++to) {
        *to = j < cols && p + e < k ? w[j * row_stride + p + e] : Int8B{0};
        sums[j] += *to;
      }
#endif
}
