// Conversions between tensors and the vectors over channels on which the Winograd transforms work. Parts of the input
// become padded images of VecF::size channels in L1, weights become blocks of vectors, and finished tiles become rows
// of the output.
#pragma once

#include "../../activation/cpu/rows.inl"
#include "../../common/cpu/common.inl"
#include "../../gemm/cpu/microkernels.inl"
#include "../../gemm/cpu/pack.inl"
#include "patches.inl"
#include "winograd_transform.inl"

// A convolution of x with w, whose padding may be negative. Both the forward pass and the gradient of the input have
// this form. In three dimensions, the slices of the output are the images of a batch, and the taps along depth are
// additional channels, those of the slice that the tap reads. With more than one such tap, channels must fill whole
// vectors.
struct Winograd {
  bool channels_last;
  int64_t batch, c, k;  // c input channels (the sum is over these), k output channels
  int64_t in_h, in_w, out_h, out_w, pad_h, pad_w;
  int64_t depth_taps = 1, in_d = 1, out_d = 1, pad_d = 0;
  const float* x;
  const float* saved;  // if derivative is not null, the input is x * f'(saved)
  RowDerivative<float> derivative;
  Activation activation;
  const float* w;
  const float* packed = nullptr;     // the transformed weights, instead of w
  int64_t w_k, w_c, w_tap, w_depth;  // strides of output channels, input channels, taps and taps along depth
  bool rotated;                      // tap t is tap 8 - t of the kernel, and taps along depth are in reverse order
  Output<float> out;                 // rows: pixels if channels_last, else channels of images

  int64_t channels() const { return c / depth_taps; }  // per slice
};

// Tiles [row, row + rows) x [col, col + cols) of `images` images.
struct WinogradBlock {
  int64_t image, images, row, rows, col, cols;
  int64_t tiles() const { return images * rows * cols; }
};

// The part of an image that a block reads, with its border. Element (i, j) of rows x cols is pixel (row + i, col + j).
// Elements in [row0, row1) x [col0, col1) are inside the image.
struct WinogradBand {
  int64_t row, col, rows, cols, row0, row1, col0, col1;
};

inline WinogradBand winograd_band(const Winograd& p, const WinogradBlock& block, int m, int border) {
  WinogradBand b;
  b.row = block.row * m - p.pad_h;
  b.col = block.col * m - p.pad_w;
  b.rows = block.rows * m + border;
  b.cols = block.cols * m + border;
  b.row0 = smaller(larger<int64_t>(b.row, 0), p.in_h);
  b.col0 = smaller(larger<int64_t>(b.col, 0), p.in_w);
  b.row1 = larger(smaller(b.row + b.rows, p.in_h), b.row0);
  b.col1 = larger(smaller(b.col + b.cols, p.in_w), b.col0);
  return b;
}

// Clears the band and writes the offsets of its pixels, in floats, row by row.
inline void winograd_clear(const WinogradBand& b, float* to, int32_t* offsets) {
  for (int64_t i = 0; i < b.rows * b.cols; ++i) VecF::zero().store(to + i * VecF::size);
  for (int64_t i = b.row0; i < b.row1; ++i)
    for (int64_t j = b.col0; j < b.col1; ++j)
      *offsets++ = static_cast<int32_t>(((i - b.row) * b.cols + (j - b.col)) * VecF::size);
}

// Transposes pixels [0, count) of up to VecF::size channels, which are `plane` apart, to to[offsets[pixel]].
inline void winograd_transpose_in(const float* from, int64_t plane, int channels, int64_t count, const int32_t* offsets,
                                  float* to) {
  constexpr int S = VecF::size;
  for (int64_t p = 0; p < count; p += S, from += S, offsets += S) {
    VecF r[S];
    const int width = static_cast<int>(smaller<int64_t>(count - p, S));
    if (channels == S && width == S) {
#pragma GCC unroll 16
      for (int i = 0; i < S; ++i) r[i] = VecF::load(from + i * plane);
    } else {
#pragma GCC unroll 16
      for (int i = 0; i < S; ++i) r[i] = i < channels ? VecF::load(from + i * plane, width) : VecF::zero();
    }
    transpose(r);
#pragma GCC unroll 16
    for (int i = 0; i < S; ++i)
      if (i < width) r[i].store(to + offsets[i]);
  }
}

// Copies channels [c, c + VecF::size) of the pixels inside the image to the band.
inline void winograd_stage_in(const Winograd& p, int64_t image, const WinogradBand& b, int64_t c,
                              const int32_t* offsets, float* to) {
  constexpr int S = VecF::size;
  const int64_t all = p.channels(), first = c % all;
  const int64_t n = image / p.out_d, d = image % p.out_d + c / all - p.pad_d;
  const int channels = static_cast<int>(smaller<int64_t>(all - first, S));
  if (d < 0 || d >= p.in_d) {
    for (int64_t i = b.row0; i < b.row1; ++i)
      zero_run((b.col1 - b.col0) * S, to + ((i - b.row) * b.cols + (b.col0 - b.col)) * S);
    return;
  }
  if (p.channels_last) {
    for (int64_t i = b.row0; i < b.row1; ++i) {
      const int64_t at = (((n * p.in_d + d) * p.in_h + i) * p.in_w + b.col0) * all + first;
      float* row = to + ((i - b.row) * b.cols + (b.col0 - b.col)) * S;
      for (int64_t j = 0; j < b.col1 - b.col0; ++j, row += S) {
        const int64_t from = at + j * all;
        __builtin_prefetch(p.x + from + S);  // the next channels: saves 2% of the total time with 64 channels
        if (p.derivative != nullptr)
          p.derivative(p.x + from, p.saved + from, row, channels, p.activation);
        else if (channels == S)
          VecF::load(p.x + from).store(row);
        else
          VecF::load(p.x + from, channels).store(row);
      }
    }
    return;
  }
  // Whole rows are contiguous in memory and form one run.
  const int64_t slice = p.in_h * p.in_w, plane = p.in_d * slice, width = b.col1 - b.col0, height = b.row1 - b.row0;
  const bool whole = width == p.in_w;
  const int64_t length = whole ? width * height : width, runs = whole ? 1 : height;
  constexpr int kChunk = 8 * S;
  for (int64_t run = 0; run < runs; ++run) {
    const int64_t at = (n * all + first) * plane + d * slice + (b.row0 + run) * p.in_w + b.col0;
    const int32_t* const targets = offsets + run * length;
    if (p.derivative == nullptr) {
      winograd_transpose_in(p.x + at, plane, channels, length, targets, to);
      continue;
    }
    float values[S * kChunk];
    for (int64_t j = 0; j < length; j += kChunk) {
      const int64_t count = smaller<int64_t>(length - j, kChunk);
      for (int i = 0; i < channels; ++i) {
        const int64_t from = at + i * plane + j;
        p.derivative(p.x + from, p.saved + from, values + i * kChunk, count, p.activation);
      }
      winograd_transpose_in(values, kChunk, channels, count, targets + j, to);
    }
  }
}

// Calls transform(from, row, to) for channels [c0, c1) of every tile of a block. A tile has m + border pixels per
// dimension; its rows are `row` floats apart. to is place(c) for the first tile, and `tile` more for each further one.
template <class Place, class Transform>
inline void winograd_transform_tiles(const Winograd& p, const WinogradBlock& b, int m, int border, int64_t c0,
                                     int64_t c1, float* stage, int32_t* offsets, int64_t tile, Place&& place,
                                     Transform&& transform) {
  constexpr int S = VecF::size;
  const WinogradBand band = winograd_band(p, b, m, border);
  winograd_clear(band, stage, offsets);
  for (int64_t image = 0; image < b.images; ++image)
    for (int64_t c = c0; c < c1; c += S) {
      winograd_stage_in(p, b.image + image, band, c, offsets, stage);
      float* to = place(c) + image * b.rows * b.cols * tile;
      for (int64_t i = 0; i < b.rows; ++i)
        for (int64_t j = 0; j < b.cols; ++j, to += tile)
          transform(stage + (i * band.cols + j) * m * S, band.cols * S, to);
    }
}

// The weights of output channels [k, k + lanes) and input channels [c, c + channels), at most VecF::size of each.
// Vector 9 i + t is tap t of input channel c + i; its lanes are output channels.
inline void winograd_stage_weights(const Winograd& p, int64_t k, int lanes, int64_t c, int channels, float* to) {
  constexpr int S = VecF::size;
  const int64_t tap = c / p.channels(), depth = p.rotated ? p.depth_taps - 1 - tap : tap;
  const float* const from = p.w + k * p.w_k + c % p.channels() * p.w_c + depth * p.w_depth;
  const auto target = [&](int channel, int tap) { return to + (9 * channel + (p.rotated ? 8 - tap : tap)) * S; };
  if (p.w_k == 1) {
    for (int i = 0; i < channels; ++i)
      for (int t = 0; t < 9; ++t) VecF::load(from + i * p.w_c + t * p.w_tap, lanes).store(target(i, t));
    return;
  }
  // Memory is contiguous along channels and taps, along taps, or along channels. Contiguous rows, one per lane, are
  // transposed. Along channels, the next vector of them is prefetched: its rows are far from each other in memory.
  const bool along_both = p.w_tap == 1 && p.w_c == 9 && !p.rotated, along_taps = p.w_tap == 1;
  const int outer = along_both ? 1 : along_taps ? channels : 9;
  const int inner = along_both ? 9 * channels : along_taps ? 9 : channels;
  const int64_t outer_stride = along_taps ? p.w_c : p.w_tap;
  for (int o = 0; o < outer; ++o)
    for (int t = 0; t < inner; t += S) {
      const int count = smaller(inner - t, S);
      const float* const at = from + o * outer_stride + t;
      VecF r[S];
      if (lanes == S) {
#pragma GCC unroll 16
        for (int i = 0; i < S; ++i) {
          r[i] = VecF::load(at + i * p.w_k, count);
          if (!along_taps) __builtin_prefetch(at + i * p.w_k + S);
        }
      } else {
#pragma GCC unroll 16
        for (int i = 0; i < S; ++i) r[i] = i < lanes ? VecF::load(at + i * p.w_k, count) : VecF::zero();
      }
      transpose(r);
#pragma GCC unroll 16
      for (int i = 0; i < S; ++i)
        if (i < count) r[i].store(along_both ? to + (t + i) * S : along_taps ? target(o, t + i) : target(t + i, o));
    }
}

// Writes the tile at output pixel (row, col) of a channels_last image. Channels [k, k + count) are Vectors vectors at
// from[point * plane].
template <class Scheme>
inline void winograd_finish_pixels(const Winograd& p, int64_t image, int64_t row, int64_t col, int64_t k, int count,
                                   const float* from, int64_t plane) {
  constexpr int S = VecF::size, m = Scheme::m;
  const Output<float>& out = p.out;
  const int rows = static_cast<int>(smaller<int64_t>(p.out_h - row, m));
  const int cols = static_cast<int>(smaller<int64_t>(p.out_w - col, m));
  const int64_t pixel = (image * p.out_h + row) * p.out_w + col;
  const bool in_registers = out.f == nullptr && out.z == nullptr;
  constexpr int width = kNr<float>;
  alignas(64) float buffer[m * m * width];
  for (int v = 0; v * S < count; ++v) {
    const int lanes = smaller(count - v * S, S);
    VecF y[m][m];
    winograd_output<Scheme>(from + v * S, plane, y);
    const VecF bias = out.bias != nullptr ? VecF::load(out.bias + k + v * S, lanes) : VecF::zero();
#pragma GCC unroll 4
    for (int i = 0; i < m; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < m; ++j) {
        VecF value = y[i][j] + bias;
        const int64_t at = (pixel + i * p.out_w + j) * out.rs + k + v * S;
        const bool inside = i < rows && j < cols;
        if (out.residual != nullptr && inside) value = value + VecF::load(out.residual + at, lanes);
        if (out.relu) value = rectified(value, out.relu);
        if (!in_registers)
          value.store(buffer + (i * m + j) * width + v * S);
        else if (inside)
          value.store(out.y + at, lanes);
      }
  }
  if (in_registers) return;
  for (int i = 0; i < rows; ++i) finish_rows(out, buffer + i * m * width, width, pixel + i * p.out_w, k, cols, count);
}

// Transposes vectors over channels to planes of an image: pixels [pixel, pixel + count) of channels [k, k + channels).
inline void winograd_transpose_out(const Winograd& p, int64_t image, int64_t pixel, int64_t count, int64_t k,
                                   int channels, const float* from) {
  constexpr int S = VecF::size, kChunk = 8 * S;
  const Output<float>& out = p.out;
  const bool in_registers = out.f == nullptr && out.z == nullptr;
  float buffer[S * kChunk];
  for (int64_t start = 0; start < count; start += kChunk) {
    const int length = static_cast<int>(smaller<int64_t>(count - start, kChunk));
    const int64_t row = image / p.out_d * p.k + k, at = image % p.out_d * p.out_h * p.out_w + pixel + start;
    float* const to = in_registers ? out.y + row * out.rs + at : buffer;
    const int64_t to_rs = in_registers ? out.rs : kChunk;
    for (int j = 0; j < length; j += S) {
      const int width = smaller(length - j, S);
      VecF r[S];
#pragma GCC unroll 16
      for (int i = 0; i < S; ++i) r[i] = i < width ? VecF::load(from + (start + j + i) * S) : VecF::zero();
      transpose(r);
      if (out.residual != nullptr) {
#pragma GCC unroll 16
        for (int i = 0; i < S; ++i) {
          if (i < channels) r[i] = r[i] + VecF::load(out.residual + (row + i) * out.rs + at + j, width);
          if (out.relu) r[i] = rectified(r[i], out.relu);
        }
      }
      if (channels == S && width == S) {
#pragma GCC unroll 16
        for (int i = 0; i < S; ++i) r[i].store(to + i * to_rs + j);
      } else {
#pragma GCC unroll 16
        for (int i = 0; i < S; ++i)
          if (i < channels) r[i].store(to + i * to_rs + j, width);
      }
    }
    if (!in_registers) finish_rows(out, buffer, kChunk, row, at, channels, length);
  }
}

// Writes the tiles of one image of a block to a channels_first output. `from` is the first tile, and tiles are `tile`
// apart. stage has room for the block's pixels of VecF::size channels.
template <class Scheme>
inline void winograd_finish_planes(const Winograd& p, const WinogradBlock& block, int64_t image, int64_t k, int count,
                                   const float* from, int64_t tile, int64_t plane, float* stage) {
  constexpr int S = VecF::size, m = Scheme::m;
  const int64_t row0 = block.row * m, col0 = block.col * m;
  const int64_t height = smaller(block.rows * m, p.out_h - row0), width = smaller(block.cols * m, p.out_w - col0);
  for (int v = 0; v * S < count; ++v) {
    const int lanes = smaller(count - v * S, S);
    const VecF bias = p.out.bias != nullptr ? VecF::load(p.out.bias + k + v * S, lanes) : VecF::zero();
    const float* at = from + v * S;
    for (int64_t i0 = 0; i0 < height; i0 += m)
      for (int64_t j0 = 0; j0 < width; j0 += m, at += tile) {
        VecF y[m][m];
        winograd_output<Scheme>(at, plane, y);
        float* const to = stage + (i0 * width + j0) * S;
        const int64_t rows = height - i0, cols = width - j0;
#pragma GCC unroll 4
        for (int i = 0; i < m; ++i)
#pragma GCC unroll 4
          for (int j = 0; j < m; ++j) {
            VecF value = y[i][j] + bias;
            if (p.out.relu && p.out.residual == nullptr) value = rectified(value, p.out.relu);
            if (i < rows && j < cols) value.store(to + (i * width + j) * S);
          }
      }
    const bool whole = width == p.out_w;
    const int64_t length = whole ? width * height : width, runs = whole ? 1 : height;
    for (int64_t run = 0; run < runs; ++run)
      winograd_transpose_out(p, image, (row0 + run) * p.out_w + col0, length, k + v * S, lanes,
                             stage + run * length * S);
  }
}
