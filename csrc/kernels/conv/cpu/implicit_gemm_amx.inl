// The product of a copy of image rows (implicit_gemm_rows.inl) by AMX. A tile of A is 16 pixels of 32 channels, read in
// place from the copy; a tile of B is the weights of 16 outputs.
//
// A channels_first image is transposed while it is copied, its channels padded with zeros to whole tiles. The sums are
// transposed back. Tiles of planes of channel pairs would need no transposition, but their rows cross cache lines, and
// loading those takes three times as long (8x64x56x56 to 64 channels, 3x3: 1.73 ms, with aligned rows 1.26 ms; Granite
// Rapids).
#pragma once

#include "../../common/cpu/common.inl"
#include "../../gemm/cpu/amx.inl"
#include "../../gemm/cpu/microkernels.inl"
#include "../../gemm/cpu/pack.inl"
#include "implicit_gemm_rows.inl"
#include "implicit_gemm_tile.inl"
#include "patches.inl"

#if defined(FASTOPS_HAS_AMX)

// Transposes 16 pixels of 32 channels, which are `plane` apart. Pixel i is written to to + i * col.
inline void transpose_pixels(const bf16_t* from, int64_t plane, int channels, int pixels, bf16_t* to, int64_t col) {
  using As = PackAs<bf16_pair, bf16_t>;
  Vec<float> r[16];
  if (channels == 32 && pixels == 16) {
#pragma GCC unroll 16
    for (int q = 0; q < 16; ++q) r[q] = As::load_along_lanes(from + 2 * q * plane, plane, 2, 16);
  } else {
    for (int q = 0; q < 16; ++q) {
      const int rows = smaller(2, channels - 2 * q);
      r[q] = rows > 0 ? As::load_along_lanes(from + 2 * q * plane, plane, rows, pixels) : Vec<float>::zero();
    }
  }
  transpose(r);
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    if (i >= pixels) break;
    _mm512_storeu_ps(to + i * col, r[i].v);
  }
}

// copy_image_rows for a channels_first image.
inline void copy_transposed(const Patches<bf16_t>& s, const RowsPlan& plan, int64_t image, const int64_t* p,
                            bf16_t* to) {
  const int64_t first = p[2] * s.step[2] + plan.low[2];
  const int64_t begin = smaller(larger<int64_t>(-first, 0), plan.copy_cols);
  const int64_t end = larger(begin, smaller(s.size[2] - first, plan.copy_cols));
  for (int64_t slab = 0; slab < s.taps[0].count; ++slab)
    for (int64_t row = 0; row < plan.copy_rows; ++row, to += plan.row) {
      const int64_t q0 = p[0] * s.step[0] + s.taps[0].offset + slab * s.taps[0].offset_step;
      const int64_t q1 = p[1] * s.step[1] + plan.low[1] + row;
      if (q0 < 0 || q0 >= s.size[0] || q1 < 0 || q1 >= s.size[1]) {
        zero_run(plan.row, to);
        continue;
      }
      const int64_t at = image * s.batch_stride + q0 * s.stride[0] + q1 * s.stride[1] + first;
      zero_run(begin * plan.col, to);
      for (int64_t c = 0; c < plan.pixel; c += 32) {
        const int channels = static_cast<int>(smaller<int64_t>(32, s.channels - c));
        for (int64_t i = begin; i < end; i += 16) {
          const int pixels = static_cast<int>(smaller<int64_t>(16, end - i));
          const int64_t from = at + c * s.channel_stride + i;
          bf16_t* const out = to + i * plan.col + c;
          if (s.derivative == nullptr) {
            transpose_pixels(s.x + from, s.channel_stride, channels, pixels, out, plan.col);
            continue;
          }
          alignas(64) bf16_t block[32 * 16];
          for (int k = 0; k < channels; ++k) copy_pixels(s, from + k * s.channel_stride, pixels, block + 16 * k);
          transpose_pixels(block, 16, channels, pixels, out, plan.col);
        }
      }
      zero_run((plan.copy_cols - end) * plan.col, to + end * plan.col);
    }
}

// 2 x 2 tiles of C, 32 pixels by 32 outputs, or 4 x 1 tiles, 64 pixels by 16 outputs; rows of sums are 32 long in both.
// Pixels are `pixel` elements apart, and tap t reads `chunks` tiles of 32 k from taps[t] on.
template <int Height>
__attribute__((noinline)) void multiply_pixels(int64_t chunks, const bf16_t* a, int64_t pixel, const int64_t* taps,
                                               int64_t tap_count, const amx_b* b, int64_t tiles, float* sums) {
  constexpr int64_t kBStride = 128, kCStride = 128, kDown = 16 * 32;
  const int64_t stride = 2 * pixel;
  memory_fence_for_compiler();
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t t = 0; t < tap_count; ++t) {
    const bf16_t* at = a + taps[t];
    for (int64_t p = 0; p < chunks; ++p, at += kTileK, b += 32 * kTilePairs) {
      _tile_loadd(6, b, kBStride);
      _tile_loadd(4, at, stride);
      _tile_dpbf16ps(0, 4, 6);
      if constexpr (Height == 2) {
        _tile_loadd(7, b + 16, kBStride);
        _tile_dpbf16ps(1, 4, 7);
        if (tiles < 2) continue;
        _tile_loadd(5, at + 16 * pixel, stride);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      } else {
        if (tiles < 2) continue;
        _tile_loadd(5, at + 16 * pixel, stride);
        _tile_dpbf16ps(1, 5, 6);
        if (tiles < 3) continue;
        _tile_loadd(4, at + 32 * pixel, stride);
        _tile_dpbf16ps(2, 4, 6);
        _tile_loadd(5, at + 48 * pixel, stride);
        _tile_dpbf16ps(3, 5, 6);
      }
    }
  }
  _tile_stored(0, sums, kCStride);
  _tile_stored(1, sums + (Height == 2 ? 16 : kDown), kCStride);
  _tile_stored(2, sums + (Height == 2 ? kDown : 2 * kDown), kCStride);
  _tile_stored(3, sums + (Height == 2 ? kDown + 16 : 3 * kDown), kCStride);
  memory_fence_for_compiler();
}

// to[o][n] = from[n][o], both with rows of kMaxTile.
inline void transpose_sums(const float* from, int positions, int outputs, float* to) {
  for (int n = 0; n < positions; n += 16)
    for (int o = 0; o < outputs; o += 16) {
      Vec<float> r[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) r[i] = Vec<float>::load(from + (n + i) * kMaxTile + o);
      transpose(r);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) r[i].store(to + (o + i) * kMaxTile + n);
    }
}

// The product of a job after its copy was made. Tap t reads the copy from taps[t] on. With steps of 1, columns continue
// through the padding into the next row.
inline void conv_pixels(const ConvProduct<bf16_t>& g, const RowsPlan& plan, const amx_b* w, int64_t w_panel, int64_t o0,
                        int64_t o1, int64_t n0, int64_t rows, int64_t cols, const int64_t* taps, const bf16_t* copy) {
  const Patches<bf16_t>& s = g.patches;
  alignas(64) float sums[kPixels * kMaxTile];
  alignas(64) float turned[(kMaxTile + 1) * kMaxTile];  // kMaxTile elements may be read from any column on
  const int64_t step = s.step[2] * plan.col, chunks = plan.pixel / kTileK;
  const bool run_on = s.step[1] == 1 && s.step[2] == 1;
  const int64_t pitch = run_on ? plan.copy_cols : cols;
  const int64_t ranges = run_on ? 1 : rows, length = run_on ? (rows - 1) * pitch + cols : cols;
  for (int64_t o = o0; o < o1; o += kMaxTile, w += w_panel) {
    const int outputs = static_cast<int>(smaller<int64_t>(kMaxTile, o1 - o));
    const int64_t height = outputs > 16 ? kMaxTile : kPixels;
    for (int64_t range = 0; range < ranges; ++range)
      for (int64_t m = 0; m < length; m += height) {
        const int64_t end = smaller(m + height, length), tiles = ceil_div(end - m, 16);
        const bf16_t* const a = copy + range * s.step[1] * plan.row + m * step;
        if (outputs > 16)
          multiply_pixels<2>(chunks, a, step, taps, s.tap_count, w, tiles, sums);
        else
          multiply_pixels<4>(chunks, a, step, taps, s.tap_count, w, tiles, sums);
        for (int64_t part = m; part < end; part += kMaxTile) {
          const int64_t part_end = smaller(part + kMaxTile, end);
          float* const from = sums + (part - m) * kMaxTile;
          if (!s.channels_inner) transpose_sums(from, static_cast<int>(part_end - part), outputs, turned);
          for_stored(part, part_end, pitch, cols, n0 + range * s.grid[2], s.grid[2],
                     [&](int64_t first, int64_t position, int count) {
                       finish_tile(g, s.channels_inner ? from + first * kMaxTile : turned + first, kMaxTile, o, outputs,
                                   position, count);
                     });
        }
      }
  }
}

// Gathers rows of A from the copy: `line` elements of k for each of `count` positions, which are `step` elements apart.
// Row r of the kernel contributes `width` contiguous elements from at[r] on, copied as Vectors whole vectors. The next
// row overwrites the excess; zeros follow the last row. (From a separate loop for every row, GCC would make a call of
// memcpy.)
template <int Vectors>
inline void gather_lines(const bf16_t* from, int64_t step, int64_t count, const int64_t* at, int64_t rows,
                         int64_t width, int64_t line, bf16_t* to) {
  const __mmask32 last = static_cast<__mmask32>((uint64_t{1} << (width - 32 * (Vectors - 1))) - 1);
  for (int64_t n = 0; n < count; ++n, from += step, to += line) {
    bf16_t* out = to;
    for (int64_t r = 0; r < rows; ++r, out += width) {
      const __mmask32 mask = r + 1 < rows ? ~__mmask32{0} : last;
#pragma GCC unroll 4
      for (int i = 0; i < Vectors; ++i)
        _mm512_storeu_si512(out + 32 * i, i + 1 < Vectors ? _mm512_loadu_si512(from + at[r] + 32 * i)
                                                          : _mm512_maskz_loadu_epi16(mask, from + at[r] + 32 * i));
    }
  }
}

// conv_pixels for few channels, channels last. The features of a position are gathered first, so that all tiles are
// full.
inline void conv_lines(const ConvProduct<bf16_t>& g, const RowsPlan& plan, const amx_b* w, int64_t w_panel, int64_t o0,
                       int64_t o1, int64_t n0, int64_t rows, int64_t cols, const int64_t* taps, const bf16_t* copy) {
  const Patches<bf16_t>& s = g.patches;
  alignas(64) float sums[kMaxTile * kMaxTile];
  alignas(64) bf16_t lines[kMaxTile * kLineFeatures + kLineWidth];
  __builtin_memset(lines, 0, sizeof lines);
  int64_t at[kMaxTaps];
  const int64_t kernel_rows = s.tap_count / s.taps[2].count, width = s.taps[2].count * s.channels, none = 0;
  for (int64_t r = 0; r < kernel_rows; ++r) at[r] = taps[r * s.taps[2].count];
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t col = 0; col < cols; col += kMaxTile) {
      const int64_t count = smaller<int64_t>(kMaxTile, cols - col), step = s.step[2] * plan.col;
      const bf16_t* const from = copy + row * s.step[1] * plan.row + col * step;
      if (width <= 32)
        gather_lines<1>(from, step, count, at, kernel_rows, width, plan.line, lines);
      else if (width <= 64)
        gather_lines<2>(from, step, count, at, kernel_rows, width, plan.line, lines);
      else if (width <= 96)
        gather_lines<3>(from, step, count, at, kernel_rows, width, plan.line, lines);
      else
        gather_lines<4>(from, step, count, at, kernel_rows, width, plan.line, lines);
      for (int64_t o = o0; o < o1; o += kMaxTile) {
        multiply_pixels<2>(plan.line / kTileK, lines, plan.line, &none, 1, w + (o - o0) / kMaxTile * w_panel,
                           ceil_div(count, 16), sums);
        finish_tile(g, sums, kMaxTile, o, static_cast<int>(smaller<int64_t>(kMaxTile, o1 - o)),
                    n0 + row * s.grid[2] + col, static_cast<int>(count));
      }
    }
}
#endif
