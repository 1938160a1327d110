// Products of 8-bit integers by VPDPBUSD, u8 x s8 -> s32, exact, of rows of x where they lie. A tile of sums has up to
// 8 rows and 4 vectors of 16 columns, of which the register file holds 24 and the vectors of a group beside them.
//
// Weights: tile after tile of columns; in each, group after group of 4 neighbours along k; in each, the groups of all
// columns. Zero where channels or columns end. Behind them, for each column, what the sums start with: -x_zero times
// the sum of its weights.
#pragma once

#include "epilogue.inl"
#include "input.inl"

#if defined(FASTOPS_HAS_AVX512_BF16)  // these processors have VNNI

constexpr int kTileColumns = 64;  // at most

// The columns of a group of the convolution in tiles of 1 to 4 vectors, as equal as can be.
struct Int8Tiles {
  int64_t columns, vectors, count;
  explicit Int8Tiles(int64_t columns)
      : columns(columns), vectors(ceil_div(columns, 16)), count(larger<int64_t>(ceil_div(vectors, 4), 1)) {}
  int64_t first(int64_t tile) const { return vectors * tile / count; }  // its first vector
};

// Packed weights: of each group of the convolution `tiles`, then `starts`.
struct Int8TileWeights {
  Int8Tiles tiles;
  int64_t groups, depth;  // depth: products of a sum, in bytes of padded channels
  explicit Int8TileWeights(const ConvGeometry& g)
      : tiles(g.out_channels / g.groups),
        groups(g.groups),
        depth(g.kernel[0] * g.kernel[1] * g.kernel[2] * round_up(g.in_channels / g.groups, 4)) {}
  int64_t group_bytes() const { return tiles.vectors * 16 * (depth + static_cast<int64_t>(sizeof(int32_t))); }
  size_t bytes() const { return static_cast<size_t>(groups * group_bytes()); }
  int64_t tile_at(int64_t tile) const { return tiles.first(tile) * 16 * depth; }
  int64_t starts_at(int64_t tile) const {
    return tiles.vectors * 16 * depth + tiles.first(tile) * 16 * static_cast<int64_t>(sizeof(int32_t));
  }
};

inline void pack_tile(const ConvInt8Forward& call, const int8_t* w, const Int8TileWeights& to, int64_t unit,
                      int8_t* packed) {
  const ConvGeometry& g = call.geometry;
  const int64_t group = unit / to.tiles.count, tile = unit % to.tiles.count;
  const int64_t taps = g.kernel[0] * g.kernel[1] * g.kernel[2], channels = g.in_channels / g.groups;
  const int64_t vectors = to.tiles.first(tile + 1) - to.tiles.first(tile);
  packed += group * to.group_bytes();
  int32_t* const starts = reinterpret_cast<int32_t*>(packed + to.starts_at(tile));
  int8_t* at = packed + to.tile_at(tile);
  const int64_t first = to.tiles.first(tile) * 16, width = vectors * 16;
  for (int64_t j = 0; j < width; ++j) starts[j] = 0;
  for (int64_t r = 0; r < taps; ++r)
    for (int64_t c = 0; c < channels; c += 4)
      for (int64_t j = 0; j < width; ++j)
        for (int64_t e = 0; e < 4; ++e, ++at) {
          const bool there = first + j < to.tiles.columns && c + e < channels;
          *at = there ? w[((group * to.tiles.columns + first + j) * taps + r) * channels + c + e] : int8_t{0};
          starts[j] += *at;
        }
  for (int64_t j = 0; j < width; ++j) starts[j] *= -call.x_zero;
}

// What a tile of rows is multiplied with, and where it goes.
struct Int8Tile {
  const Bound<ConvInt8Forward>* args;
  const Int8Epilogue* epilogue;
  const uint8_t* const* places;  // of the rows of the first piece
  int64_t places_stride, pieces, groups_of_piece, group_offset;
  const int8_t* w;
  const int32_t* starts;
  int64_t position, k;  // of the first element of y
  int rows, columns;
};

// y of a tile where that is a uint8 tensor and f the identity.
template <int vectors, int most>
inline __attribute__((always_inline)) void store_tile(const Int8Tile& tile, const __m512i (&sums)[most][vectors]) {
  const Bound<ConvInt8Forward>& args = *tile.args;
  const int64_t channels = args.geometry.out_channels, at = tile.position * channels + tile.k;
  uint8_t* y = static_cast<uint8_t*>(args.y) + at;
  const uint8_t* residual = args.residual + (args.with_residual ? at : 0);
  const __m512 low = _mm512_set1_ps(static_cast<float>(args.y_low)),
               high = _mm512_set1_ps(static_cast<float>(args.y_high)), scale = _mm512_set1_ps(args.residual_scale);
  __mmask16 mask[vectors];
  __m512 multiplier[vectors], offset[vectors];
#pragma GCC unroll 4
  for (int v = 0; v < vectors; ++v) {
    mask[v] = first16(smaller(larger(tile.columns - 16 * v, 0), 16));
    multiplier[v] = _mm512_maskz_loadu_ps(mask[v], args.multiplier + tile.k + 16 * v);
    offset[v] = _mm512_maskz_loadu_ps(mask[v], args.offset + tile.k + 16 * v);
  }
  const bool whole = tile.columns == 16 * vectors;
#pragma GCC unroll 8
  for (int r = 0; r < most; ++r, y += channels, residual += channels) {
    if (r >= tile.rows) return;
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      __m512 value = _mm512_add_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(sums[r][v]), multiplier[v]), offset[v]);
      if (args.with_residual) {
        const __m128i levels = whole ? _mm_loadu_si128((const __m128i*)(residual + 16 * v))
                                     : _mm_maskz_loadu_epi8(mask[v], residual + 16 * v);
        value = _mm512_add_ps(value, _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(levels)), scale));
      }
      value = _mm512_min_ps(_mm512_max_ps(value, low), high);
      const __m128i levels = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(value));
      if (whole)
        _mm_storeu_si128((__m128i*)(y + 16 * v), levels);
      else
        _mm_mask_storeu_epi8(y + 16 * v, mask[v], levels);
    }
  }
}

template <int vectors, int rows>
__attribute__((noinline)) void multiply_tile(const Int8Tile& tile) {
  __m512i sums[rows][vectors];
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) sums[r][v] = _mm512_loadu_si512(tile.starts + 16 * v);
  const int8_t* w = tile.w;
  const uint8_t* const* places = tile.places;
  for (int64_t p = 0; p < tile.pieces; ++p, places += tile.places_stride) {
    const uint8_t* x[rows];
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) x[r] = places[r] + tile.group_offset;
    for (int64_t g = 0; g < tile.groups_of_piece; ++g, w += 64 * vectors) {
      __m512i b[vectors];
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) b[v] = _mm512_loadu_si512(w + 64 * v);
#pragma GCC unroll 8
      for (int r = 0; r < rows; ++r) {
        int32_t group;
        __builtin_memcpy(&group, x[r] + 4 * g, sizeof group);
        const __m512i a = _mm512_set1_epi32(group);
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) sums[r][v] = _mm512_dpbusd_epi32(sums[r][v], a, b[v]);
      }
    }
  }
  if (tile.epilogue->simple()) return store_tile<vectors, rows>(tile, sums);
  alignas(64) int32_t row[rows][16 * vectors];
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) _mm512_store_si512(row[r] + 16 * v, sums[r][v]);
  for (int r = 0; r < tile.rows; ++r)
    tile.epilogue->finish([&](int v) { return float_of_sums(row[r] + 16 * v); }, tile.position + r, tile.k,
                          tile.columns);
}

// Rows of a tile with this many vectors.
inline int rows_of_tile(int64_t vectors) { return vectors == 4 ? 6 : 8; }

template <int vectors>
inline void multiply_rows(const Int8Tile& tile) {
  constexpr int kMost = vectors == 4 ? 6 : 8;
  if (tile.rows == 1) return multiply_tile<vectors, 1>(tile);
  if (tile.rows == 2) return multiply_tile<vectors, 2>(tile);
  if (tile.rows <= 4) return multiply_tile<vectors, 4>(tile);
  return multiply_tile<vectors, kMost>(tile);
}

// The places of rows past tile.rows are those of any row.
inline void multiply_rows(const Int8Tile& tile, int64_t vectors) {
  switch (vectors) {
    case 1:
      return multiply_rows<1>(tile);
    case 2:
      return multiply_rows<2>(tile);
    case 3:
      return multiply_rows<3>(tile);
    default:
      return multiply_rows<4>(tile);
  }
}

#endif
