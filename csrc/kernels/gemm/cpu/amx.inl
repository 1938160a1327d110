// bf16 products by AMX: TDPBF16PS adds the product of 16 x 32 and 32 x 16 bf16 to a tile of 16 x 16 float32 (Intel SDM,
// "Intel AMX instructions"). The register tile is 32 x 32: four accumulator tiles, two tiles of A, two tiles of B.
//
// A panel of B is a bf16_pair panel with 32 lanes; 16 of its rows are a tile of 32 k. A panel of A has 32 rows of 32 k
// for every 32 k. Both are padded with zeros to whole tiles. An A with contiguous rows is read in place.
#pragma once

#include "../../common/cpu/common.inl"
#include "microkernels.inl"
#include "pack.inl"

#if defined(FASTOPS_HAS_AMX)

// A panel element holds two neighbours along k. A panel has 32 rows of 16 elements for every 32 k.
struct amx_a {
  uint32_t bits;
};
struct amx_b {
  uint32_t bits;
};
struct bf16_amx {};

constexpr int kTileK = 32;
constexpr int kTilePairs = kTileK / 2;

// Configures the eight tile registers to 16 rows of 64 bytes. If A has fewer than 32 rows, its tiles and the tiles of C
// get fewer rows (multiply_tiles says which registers these are).
inline void configure_tiles(int rows) {
  const uint8_t upper = static_cast<uint8_t>(smaller(rows, 16)), lower = static_cast<uint8_t>(larger(rows - 16, 1));
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16];
  } config = {.rows = {upper, upper, lower, lower, upper, lower, 16, 16}};
  // GCC believes that the instruction reads 8 bytes, and may drop the stores to the rest of the struct.
  __asm__ volatile("" : : "r"(&config) : "memory");
  _tile_loadconfig(&config);
}

// The tile state of this thread.
struct AmxSession {
  AmxSession() { configure_tiles(32); }
  ~AmxSession() { _tile_release(); }
  AmxSession(const AmxSession&) = delete;
  AmxSession& operator=(const AmxSession&) = delete;
};

template <>
struct Tile<bf16_amx> {
  using Session = AmxSession;
  using A = amx_a;
  using B = amx_b;
  using C = float;
  static constexpr int mr = 32, nr = 32;
  static constexpr int step = 2;
  static constexpr int k_align = kTileK;
  static constexpr bool readable = false, tiles_in_place = true;
  static constexpr GemmBlocking blocking = {2048, 8192, 8 << 20, 4 << 20, 128, 128, 64};
};

template <>
constexpr int kPanelAlign<amx_b> = kTileK;  // the packers of amx_a pad on their own

template <>
struct PackAs<amx_b, bf16_t> : PackAs<bf16_pair, bf16_t> {
  using Base = PackAs<bf16_pair, bf16_t>;
  static void store(Value v, amx_b* to) { Base::store(v, reinterpret_cast<bf16_pair*>(to)); }
  static void store(Value v, amx_b* to, int count) { Base::store(v, reinterpret_cast<bf16_pair*>(to), count); }
};
template <>
struct PackAs<amx_a, bf16_t> : PackAs<bf16_pair, bf16_t> {};
template <>
struct StageOf<amx_a, bf16_t> {
  using type = bf16_t;
};
template <>
struct StageOf<amx_b, bf16_t> {
  using type = bf16_t;
};

// For an A that is contiguous along k: copies 64 bytes at a time.
template <>
inline void pack_along_k<amx_a, bf16_t, 32>(const bf16_t* from, int64_t ls, int lanes, int64_t k, amx_a* to) {
  using As = PackAs<amx_a, bf16_t>;
  for (int64_t p = 0; p < k; p += kTileK, to += 32 * kTilePairs) {
    const int count = static_cast<int>(smaller<int64_t>(k - p, kTileK));
    for (int l = 0; l < lanes; ++l) {
      const bf16_t* const at = from + l * ls + p;
      _mm512_storeu_ps(to + l * kTilePairs, (count == kTileK ? As::load_along_k(at) : As::load_along_k(at, count)).v);
    }
    for (int l = lanes; l < 32; ++l) _mm512_storeu_ps(to + l * kTilePairs, _mm512_setzero_ps());
  }
}

// For an A that is contiguous along the lanes: interleaves rows k and k + 1 to pairs, then transposes blocks of 16 x 16
// pairs.
template <>
inline void pack_along_lanes<amx_a, bf16_t, 32>(const bf16_t* from, int64_t ks, int64_t lanes, int64_t k, amx_a* to,
                                                int64_t panel_stride) {
  using As = PackAs<amx_a, bf16_t>;
  for (int64_t p = 0; p < k; p += kTileK, to += 32 * kTilePairs)
#pragma GCC unroll 1
    for (int64_t l = 0; l < round_up(lanes, 32); l += 16) {
      const int valid = static_cast<int>(smaller<int64_t>(larger<int64_t>(lanes - l, 0), 16));
      Vec<float> r[16];
      if (valid == 16 && k - p >= kTileK) {
#pragma GCC unroll 16
        for (int q = 0; q < 16; ++q) r[q] = As::load_along_lanes(from + (p + 2 * q) * ks + l, ks, 2, 16);
      } else {
        for (int q = 0; q < 16; ++q) {
          const int64_t row = p + 2 * q;
          const int rows = static_cast<int>(larger<int64_t>(0, smaller<int64_t>(k - row, 2)));
          r[q] =
              rows > 0 && valid > 0 ? As::load_along_lanes(from + row * ks + l, ks, rows, valid) : Vec<float>::zero();
        }
      }
      transpose(r);
      amx_a* const at = to + l / 32 * panel_stride + l % 32 * kTilePairs;
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) _mm512_storeu_ps(at + i * kTilePairs, r[i].v);
    }
}

// The compiler does not know that tile instructions read and write memory.
inline void memory_fence_for_compiler() { __asm__ volatile("" : : : "memory"); }

// sums[32][32] = A B over `chunks` tiles of 32 k. Without two_rows only the upper half is computed, without two_cols
// only the left half. Rows of A are a_row elements apart, its tiles a_chunk elements.
template <bool past_l1>
__attribute__((noinline)) void multiply_tiles(int64_t chunks, const amx_a* a, int64_t a_row, int64_t a_chunk,
                                              const amx_b* b, bool two_rows, bool two_cols, float* sums) {
  constexpr int64_t kBStride = 128, kCStride = 128;
  const int64_t a_stride = a_row * static_cast<int64_t>(sizeof(amx_a)), a_lower = 16 * a_row;
  const auto load_upper = [&]() __attribute__((always_inline)) {
    if constexpr (past_l1)
      _tile_stream_loadd(4, a, a_stride);
    else
      _tile_loadd(4, a, a_stride);
  };
  const auto load_lower = [&]() __attribute__((always_inline)) {
    if constexpr (past_l1)
      _tile_stream_loadd(5, a + a_lower, a_stride);
    else
      _tile_loadd(5, a + a_lower, a_stride);
  };
  memory_fence_for_compiler();
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  if (two_rows && two_cols) {
    for (int64_t p = 0; p < chunks; ++p, a += a_chunk, b += 32 * kTilePairs) {
      _tile_loadd(6, b, kBStride);
      load_upper();
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, b + 16, kBStride);
      _tile_dpbf16ps(1, 4, 7);
      load_lower();
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  } else if (two_rows) {
    for (int64_t p = 0; p < chunks; ++p, a += a_chunk, b += 32 * kTilePairs) {
      _tile_loadd(6, b, kBStride);
      load_upper();
      _tile_dpbf16ps(0, 4, 6);
      load_lower();
      _tile_dpbf16ps(2, 5, 6);
    }
  } else {
    for (int64_t p = 0; p < chunks; ++p, a += a_chunk, b += 32 * kTilePairs) {
      _tile_loadd(6, b, kBStride);
      load_upper();
      _tile_dpbf16ps(0, 4, 6);
      if (!two_cols) continue;
      _tile_loadd(7, b + 16, kBStride);
      _tile_dpbf16ps(1, 4, 7);
    }
  }
  _tile_stored(0, sums, kCStride);
  if (two_cols) _tile_stored(1, sums + 16, kCStride);
  if (two_rows) _tile_stored(2, sums + 16 * 32, kCStride);
  if (two_rows && two_cols) _tile_stored(3, sums + 16 * 32 + 16, kCStride);
  memory_fence_for_compiler();
}

// A panel of B meets one panel of A after the other. From this many tiles on these are loaded past L1, where it stays:
// k of 256 to 512 is 1.1 to 1.2 times as fast (2048x512x2048, 1000x300x700; Emerald Rapids). Of 64 and 128 k all panels
// of A stay in L1 as well: 0.93.
constexpr int64_t kPastL1 = 8;
inline void multiply_tiles(int64_t chunks, const amx_a* a, int64_t a_row, int64_t a_chunk, const amx_b* b,
                           bool two_rows, bool two_cols, float* sums) {
  if (chunks >= kPastL1)
    multiply_tiles<true>(chunks, a, a_row, a_chunk, b, two_rows, two_cols, sums);
  else
    multiply_tiles<false>(chunks, a, a_row, a_chunk, b, two_rows, two_cols, sums);
}

// The same, for a packed A.
inline void multiply_tiles(int64_t chunks, const amx_a* a, const amx_b* b, bool two_rows, bool two_cols, float* sums) {
  multiply_tiles(chunks, a, kTilePairs, 32 * kTilePairs, b, two_rows, two_cols, sums);
}

// Adds the bias, applies relu and rounds rows of 32 complete sums, each of which is one vector of bf16. bias is null,
// or has one value per row or per column.
inline void store_wide(bool relu, const float* sums, int64_t rs, const float* bias, bool bias_of_rows, bool streaming,
                       bf16_t* y, int64_t y_rs, int rows) {
  constexpr int kDenormal = 0x20;  // the conversion instruction flushes denormals to zero
  const Vec<float> least = Vec<float>::set1(relu ? 0.0f : -__builtin_inff());
  const bool of_columns = bias != nullptr && !bias_of_rows;
  const Vec<float> left = of_columns ? Vec<float>::load(bias) : Vec<float>::zero();
  const Vec<float> right = of_columns ? Vec<float>::load(bias + 16) : Vec<float>::zero();
  const auto finish = [&](int r, Vec<float>* v) {
    const Vec<float> same = bias != nullptr && bias_of_rows ? Vec<float>::set1(bias[r]) : Vec<float>::zero();
    v[0] = max(least, Vec<float>::load(sums + r * rs) + (bias_of_rows ? same : left));
    v[1] = max(least, Vec<float>::load(sums + r * rs + 16) + (bias_of_rows ? same : right));
  };
  unsigned denormal = 0;
  for (int r = 0; r < rows; ++r) {
    Vec<float> v[2];
    finish(r, v);
    denormal |= static_cast<unsigned>(_mm512_fpclass_ps_mask(v[0].v, kDenormal)) |
                static_cast<unsigned>(_mm512_fpclass_ps_mask(v[1].v, kDenormal));
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(v[1].v, v[0].v);
    if (streaming)
      _mm512_stream_si512(reinterpret_cast<__m512i*>(y + r * y_rs), both);
    else
      _mm512_storeu_si512(y + r * y_rs, both);
  }
  for (int r = 0; denormal != 0 && r < rows; ++r) {
    Vec<float> v[2];
    finish(r, v);
    v[0].store(y + r * y_rs);
    v[1].store(y + r * y_rs + 16);
  }
}

// finish_rows for a tile with rows of 32: one call of the activation for all of them.
inline void finish_wide(const Output<bf16_t>& out, const float* tile, int64_t i, int64_t j, int rows, int cols) {
  if (out.f == nullptr || cols < 32) return finish_rows(out, tile, 32, i, j, rows, cols);
  alignas(64) bf16_t y[32 * 32];
  out.f(tile, y, rows * 32, out.activation);
  for (int r = 0; r < rows; ++r) {
    const int64_t at = (i + r) * out.rs + j;
    if (out.z != nullptr) store_row<bf16_t>(tile + r * 32, out.z + at, 32);
    _mm512_storeu_si512(out.y + at, _mm512_load_si512(y + r * 32));
  }
}

inline void output_tile(bf16_amx, int64_t pairs, const PanelView<amx_a>& a, const amx_a* a_panel,
                        const PanelView<amx_b>&, const amx_b* b_panel, int64_t i, int64_t j, int rows, int cols,
                        bool first, bool last, const Output<bf16_t>& out, float* partial, int64_t partial_rs,
                        const void*) {
  alignas(64) float sums[32 * 32];  // elements that multiply_tiles does not write are loaded, but never stored
  const int64_t chunks = ceil_div(pairs, kTilePairs);
  const bool in_place = a.rs != 1, few = in_place && rows < 32;
  if (few) configure_tiles(rows);  // memory after the last row of A may not be readable
  multiply_tiles(chunks, a_panel, in_place ? a.rs : kTilePairs, in_place ? kTilePairs : 32 * kTilePairs, b_panel,
                 rows > 16, cols > 16, sums);
  if (few) configure_tiles(32);
  const bool simple = last && out.f == nullptr && out.z == nullptr;
  if (first && simple && cols == 32) {
    const float* const bias = out.bias != nullptr ? out.bias + j : nullptr;
    return store_wide(out.relu, sums, 32, bias, false, out.stream, out.y + i * out.rs + j, out.rs, rows);
  }
  for (int r = 0; r < rows; ++r) {
    float* const row = sums + r * 32;
    const int left = smaller(cols, 16), right = cols - left;
    Vec<float> v[2] = {Vec<float>::load(row), Vec<float>::load(row + 16)};
    if (!first) {
      v[0] = v[0] + Vec<float>::load(partial + r * partial_rs, left);
      v[1] = v[1] + Vec<float>::load(partial + r * partial_rs + 16, right);
    }
    if (!last) {
      v[0].store(partial + r * partial_rs, left);
      v[1].store(partial + r * partial_rs + 16, right);
      continue;
    }
    if (out.bias != nullptr) {
      v[0] = v[0] + Vec<float>::load(out.bias + j, left);
      v[1] = v[1] + Vec<float>::load(out.bias + j + 16, right);
    }
    if (out.relu) {
      v[0] = max(Vec<float>::zero(), v[0]);
      v[1] = max(Vec<float>::zero(), v[1]);
    }
    if (simple) {
      bf16_t* const y = out.y + (i + r) * out.rs + j;
      v[0].store(y, left);
      v[1].store(y + 16, right);
    } else {
      v[0].store(row);
      v[1].store(row + 16);
    }
  }
  if (last && !simple) finish_wide(out, sums, i, j, rows, cols);
}

#endif
