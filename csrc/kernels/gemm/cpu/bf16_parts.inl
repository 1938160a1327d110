// Operands of AMX products in bf16 parts. A float32 is the sum of three bf16 numbers, exactly: its value rounded, the
// rest rounded, and the rest of that. Of the nine products of two such sums the six largest give float32's accuracy
// (Henry, Tang and Heinecke, "Leveraging the bfloat16 artificial intelligence datatype for higher-precision
// computations", 2019; "BF16x3"); of two parts three products are as exact as float32 with 16 bits (TF32 has 11).
//
// The unit takes denormals for zero, and parts of numbers near float32's limits are not numbers. A packed block says
// what it holds; one of three or two parts that is out of range holds its float32 values instead, and is multiplied by
// multiply-adds. So are two blocks whose products are so small that lost parts would count.
#pragma once

#include "amx.inl"
#include "microkernels.inl"
#include "pack.inl"

#if defined(FASTOPS_HAS_AMX)

// A float32 product by this many parts of each operand.
template <int parts>
struct bf16_parts {};

constexpr int kLanes = 32;                           // of a panel
constexpr int64_t kPartBytes = kLanes * kTileK * 2;  // of one part of 32 lanes and 32 k
constexpr int64_t kLongestBlock = 256;               // k of a block

// The biased exponents of a block's smallest and largest element. Zeros do not count; without others least is 255.
struct Range {
  uint8_t least = 255, most = 0;
};

// Whether the parts of a block are exact: the last bit of an element is at least 2^-126, and rounding, which multiplies
// by 2^16, overflows nowhere.
inline bool has_parts(Range r) { return r.least >= 24 && r.most <= 254 - 18; }
// Whether these blocks are, and no product of theirs overflows.
inline bool have_parts(Range a, Range b) { return has_parts(a) && has_parts(b) && a.most + b.most <= 254 + 86; }
// Whether products are exact, too: below 2^-96, parts of products would be denormal.
inline bool in_range(Range a, Range b) { return have_parts(a, b) && a.least + b.least >= 254 - 96; }

struct RangeOf {
  __m512i least = _mm512_set1_epi32(-1), most = _mm512_setzero_si512();

  void add(__m512 x) {
    const __m512i magnitude = _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fffffff));
    most = _mm512_max_epu32(most, magnitude);
    least = _mm512_min_epu32(least, _mm512_sub_epi32(magnitude, _mm512_set1_epi32(1)));
  }
  Range get() const {
    const unsigned low = _mm512_reduce_min_epu32(least), high = _mm512_reduce_max_epu32(most);
    return {static_cast<uint8_t>(low == ~0u ? 255 : (low + 1) >> 23), static_cast<uint8_t>(high >> 23)};
  }
};

// x rounded to 8 bits (Dekker, "A floating-point technique for extending the available precision", 1971).
inline __m512 round_to_bf16(__m512 x) {
  const __m512 c = _mm512_mul_ps(x, _mm512_set1_ps(65537));
  return _mm512_sub_ps(c, _mm512_sub_ps(c, x));
}

// The parts of two vectors, a number of the first one in the lower half of an element, one of the second in the upper.
template <int parts>
inline void split(__m512 first, __m512 second, __m512i* to) {
  if constexpr (parts == 1) {
    // By the processor's conversion, which takes infinities and what is near them. Denormals are zero, as to the unit.
    const auto rounded = [](__m512 x) { return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(x)); };
    to[0] = _mm512_or_si512(rounded(first), _mm512_slli_epi32(rounded(second), 16));
    return;
  }
#pragma GCC unroll 3
  for (int i = 0; i < parts; ++i) {
    const bool rest = i == 2;  // has 8 bits
    const __m512 a = rest ? first : round_to_bf16(first), b = rest ? second : round_to_bf16(second);
    to[i] = _mm512_or_si512(_mm512_srli_epi32(_mm512_castps_si512(a), 16), _mm512_castps_si512(b));
    first = _mm512_sub_ps(first, a);
    second = _mm512_sub_ps(second, b);
  }
}

// Packs `lanes` <= 32 lanes of `count` <= 32 k of a block that is contiguous along k or along the lanes.
//
// Element q of a row of 16 pairs holds k = q and k = q + 16. A part of A has a row for each lane; a part of B has a row
// of 32 lanes for each q.
template <int parts, bool of_a, bool along_k>
inline void pack_parts(const float* from, int64_t ls, int64_t ks, int lanes, int count, unsigned char* to,
                       RangeOf& range) {
  constexpr bool kTransposed = of_a != along_k;
  constexpr int64_t kRow = of_a ? 64 : 128, kHalf = of_a ? 16 * 64 : 64;
  const __mmask16 low = first16(smaller(count, 16)), high = first16(larger(count - 16, 0));
  for (int half = 0; half < 2; ++half, to += kHalf) {
    const int valid = smaller(larger(lanes - 16 * half, 0), 16);
    const __mmask16 mask = first16(valid);
    Vec<float> pairs[kTransposed ? parts : 1][16];
    const auto pack = [&](int i, __m512 first, __m512 second) __attribute__((always_inline)) {
      range.add(first);
      range.add(second);
      __m512i p[parts];
      split<parts>(first, second, p);
#pragma GCC unroll 3
      for (int q = 0; q < parts; ++q) {
        if (kTransposed)
          pairs[q][i].v = _mm512_castsi512_ps(p[q]);
        else
          _mm512_storeu_si512(to + q * kPartBytes + i * kRow, p[q]);
      }
    };
    if (along_k) {
      const float* at = from + 16 * half * ls;
      for (int i = 0; i < valid; ++i, at += ls) {
        __builtin_prefetch(at + 2 * kTileK);
        __builtin_prefetch(at + 2 * kTileK + 16);
        pack(i, _mm512_maskz_loadu_ps(low, at), _mm512_maskz_loadu_ps(high, at + 16));
      }
      for (int i = valid; i < 16; ++i) pack(i, _mm512_setzero_ps(), _mm512_setzero_ps());
    } else {
      const float* const at = from + 16 * half;
      for (int i = 0; i < 16; ++i) {
        __builtin_prefetch(at + (i + kTileK) * ks);
        __builtin_prefetch(at + (i + 16 + kTileK) * ks);
        pack(i, i < count ? _mm512_maskz_loadu_ps(mask, at + i * ks) : _mm512_setzero_ps(),
             i + 16 < count ? _mm512_maskz_loadu_ps(mask, at + (i + 16) * ks) : _mm512_setzero_ps());
      }
    }
    if constexpr (kTransposed) {
      for (int q = 0; q < parts; ++q) {
        transpose(pairs[q]);
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) _mm512_storeu_ps(to + q * kPartBytes + i * kRow, pairs[q][i].v);
      }
    }
  }
}

// body(from, ls, ks, p, count) for each 32 k of [k0, k0 + k) of `lanes` <= 32 lanes: float32 values that are contiguous
// along k or along the lanes.
template <class Body>
inline void for_each_chunk(const Source<float>& s, int64_t lane, int lanes, int64_t k0, int64_t k, Body&& body) {
  alignas(64) float block[kLanes * kTileK];
  for (int64_t p = 0; p < k; p += kTileK) {
    const int count = static_cast<int>(smaller<int64_t>(k - p, kTileK));
    const float* const at = s.p + lane * s.ls + (k0 + p) * s.ks;
    if (s.derivative != nullptr) {
      const bool lane_rows = s.ls == 1 || s.ks != 1;
      derivative_block(s, lane, k0 + p, lanes, count, lane_rows, block, kLanes);
      body(block, lane_rows ? 1 : kLanes, lane_rows ? kLanes : 1, p, count);
    } else if (s.ks == 1 || s.ls == 1) {
      body(at, s.ls, s.ks, p, count);
    } else {
      gather(at, s.ls, s.ks, lanes, count, block, kTileK);
      body(block, kTileK, 1, p, count);
    }
  }
}

// Packs a block of `lanes` <= 32 lanes of A or B and `k` <= kLongestBlock steps of k. If sums is not null, the sum of
// lane i over k is added to sums[i].
template <int parts, bool of_a>
__attribute__((noinline)) Range pack_block(const Source<float>& s, int64_t lane, int lanes, int64_t k0, int64_t k,
                                           unsigned char* to, float* sums) {
  RangeOf range;
  for_each_chunk(s, lane, lanes, k0, k, [&](const float* from, int64_t ls, int64_t ks, int64_t p, int count) {
    unsigned char* const chunk = to + p / kTileK * parts * kPartBytes;
    if (ks == 1)
      pack_parts<parts, of_a, true>(from, ls, ks, lanes, count, chunk, range);
    else
      pack_parts<parts, of_a, false>(from, ls, ks, lanes, count, chunk, range);
    if (sums == nullptr) return;
    alignas(64) float columns[kTileK * kLanes];
    if (ls == 1 && ks != 1) return add_columns(from, ks, lanes, count, sums);
    pack_plain<float, float, kLanes>(from, ls, ks, lanes, count, columns);
    add_columns(columns, kLanes, lanes, count, sums);
  });
  const Range found = range.get();
  if (parts > 1 && !has_parts(found))
    for_each_chunk(s, lane, lanes, k0, k, [&](const float* from, int64_t ls, int64_t ks, int64_t p, int count) {
      pack_plain<float, float, kLanes>(from, ls, ks, lanes, count, reinterpret_cast<float*>(to) + p * kLanes);
    });
  return found;
}

// A block as float32 values [k][32 lanes]: its own memory if it holds them, else `to`.
template <int parts>
inline const float* values_of(bool of_a, const unsigned char* block, Range range, int64_t k, float* to) {
  if (!has_parts(range)) return reinterpret_cast<const float*>(block);
  for (int64_t p = 0; p < k; p += kTileK, block += parts * kPartBytes)
    for (int half = 0; half < 2; ++half) {
      Vec<float> first[16], second[16];
      for (int i = 0; i < 16; ++i) {
        const unsigned char* const at = block + (of_a ? (16 * half + i) * 64 : i * 128 + 64 * half);
        first[i] = second[i] = Vec<float>::zero();
        for (int q = parts - 1; q >= 0; --q) {
          const __m512i pair = _mm512_loadu_si512(at + q * kPartBytes);
          first[i] = first[i] + Vec<float>{_mm512_castsi512_ps(_mm512_slli_epi32(pair, 16))};
          second[i] = second[i] + Vec<float>{_mm512_castsi512_ps(_mm512_and_si512(pair, _mm512_set1_epi32(-65536)))};
        }
      }
      if (of_a) {
        transpose(first);
        transpose(second);
      }
      for (int i = 0; i < 16; ++i) {
        first[i].store(to + (p + i) * kLanes + 16 * half);
        second[i].store(to + (p + 16 + i) * kLanes + 16 * half);
      }
    }
  return to;
}

// sums[32][32] (+)= A B of blocks that the unit cannot multiply.
template <int parts>
__attribute__((noinline)) void multiply_values(int64_t k, const unsigned char* a, Range a_range, const unsigned char* b,
                                               Range b_range, bool first, float* sums) {
  alignas(64) float a_values[kLanes * kLongestBlock], b_values[kLanes * kLongestBlock];
  const float* const x = values_of<parts>(true, a, a_range, k, a_values);
  const float* const w = values_of<parts>(false, b, b_range, k, b_values);
  for (int r = 0; r < kLanes; r += kMr) {
    TileOut<float> out{};
    out.c = sums + r * kLanes;
    out.c_rs = kLanes;
    if (!first) {
      out.prev = out.c;
      out.prev_rs = kLanes;
    }
    micro_tile(k, x + r, 1, kLanes, w, kLanes, smaller(kLanes - r, kMr), kLanes, out);
  }
}

// The products of `parts` parts, the smallest first: the part of A, the part of B.
template <int parts>
struct Products;
template <>
struct Products<1> {
  static constexpr int count = 1, of[1][2] = {{0, 0}};
};
template <>
struct Products<2> {
  static constexpr int count = 3, of[3][2] = {{1, 0}, {0, 1}, {0, 0}};
};
template <>
struct Products<3> {
  static constexpr int count = 6, of[6][2] = {{2, 0}, {1, 0}, {1, 1}, {0, 1}, {0, 2}, {0, 0}};
};

// sums[32][32] (+)= A B over `chunks` times 32 k of packed parts. Without two_rows only the upper half is computed,
// without two_cols only the left half. A line of `ahead` is prefetched to L2 for every product of tiles.
template <int parts, bool two_rows, bool two_cols>
__attribute__((noinline)) void multiply_parts(int64_t chunks, const unsigned char* a, const unsigned char* b,
                                              bool first, float* sums, const unsigned char* ahead) {
  using P = Products<parts>;
  constexpr int kRow = 128;
  memory_fence_for_compiler();
  if (first) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, sums, kRow);
    if (two_cols) _tile_loadd(1, sums + 16, kRow);
    if (two_rows) _tile_loadd(2, sums + 16 * 32, kRow);
    if (two_rows && two_cols) _tile_loadd(3, sums + 16 * 32 + 16, kRow);
  }
  const auto prefetch = [&] {
    _mm_prefetch(ahead, _MM_HINT_T1);
    ahead += 64;
  };
  for (int64_t p = 0; p < chunks; ++p, a += parts * kPartBytes, b += parts * kPartBytes) {
#pragma GCC unroll 6
    for (int i = 0; i < P::count; ++i) {
      const unsigned char *const x = a + P::of[i][0] * kPartBytes, *const w = b + P::of[i][1] * kPartBytes;
      const bool same_a = i > 0 && P::of[i][0] == P::of[i - 1][0], same_b = i > 0 && P::of[i][1] == P::of[i - 1][1];
      if (!same_b) _tile_stream_loadd(6, w, kRow);
      if (!same_a) _tile_loadd(4, x, 64);
      _tile_dpbf16ps(0, 4, 6);
      prefetch();
      if (two_cols) {
        if (!same_b) _tile_stream_loadd(7, w + 64, kRow);
        _tile_dpbf16ps(1, 4, 7);
        prefetch();
      }
      if (two_rows) {
        if (!same_a) _tile_loadd(5, x + 16 * 64, 64);
        _tile_dpbf16ps(2, 5, 6);
        prefetch();
      }
      if (two_rows && two_cols) {
        _tile_dpbf16ps(3, 5, 7);
        prefetch();
      }
    }
  }
  _tile_stored(0, sums, kRow);
  if (two_cols) _tile_stored(1, sums + 16, kRow);
  if (two_rows) _tile_stored(2, sums + 16 * 32, kRow);
  if (two_rows && two_cols) _tile_stored(3, sums + 16 * 32 + 16, kRow);
  memory_fence_for_compiler();
}

#endif
