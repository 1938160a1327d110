// Products that do not pack the image. The rows of the image that a block of output rows reads are copied once, padded
// with zeros, and every tap reads the same copy at an offset. For channels last the copy is A, whose rows may be any
// distance apart; for channels first it is B, whose columns are contiguous if the stride is 1.
//
// A job is a block of output rows of one slice (image, p0). For channels last, tiles run along one row of the output.
// Tiles of 32 positions continue through the padding into the next row; results for the padding are not stored.
#pragma once

#include "../../common/cpu/common.inl"
#include "../../gemm/cpu/amx.inl"
#include "../../gemm/cpu/microkernels.inl"
#include "implicit_gemm_tile.inl"
#include "patches.inl"

// Output positions per job, for channels last and channels first, and the largest copy in bytes. The copy shares L2
// with the weights.
constexpr int64_t kJobPositions = 256, kJobColumns = 1024;
#if defined(FASTOPS_VEC_AVX2)
// Dilated 3x3, 64 channels of 56x56: 1.10 times as fast as with 512 KB (Zen 3). Conv1d of 128 channels of 1000, whose
// copy would be larger, is packed, and then 1.10 to 1.17 times as fast.
constexpr int64_t kCopyBytes = 128 << 10;
#else
constexpr int64_t kCopyBytes = 512 << 10;
#endif
// Channels first: whether tiles end with the rows of the output where that takes no more of them. They are then stored
// by the microkernel, or in one run. 8 images, 5x5, 64 channels of 32x32: 54.6 and 45.9 ms (Zen 1, one thread).
#if defined(FASTOPS_VEC_AVX2)
constexpr bool kTilesByRows = true;
#else
constexpr bool kTilesByRows = false;  // not measured
#endif
constexpr int64_t kMaxTaps = 128;
// Limits for float32. Tiles of fewer rows would be bound by reading the weights from L2, and with many outputs packing
// costs little. Granite Rapids, 3x3, GF/s per core, this and packing: 64 channels of 56x56 198 and 134, 128 to 256
// channels at stride 2 to 14x14 164 and 151, 256 channels of 14x14 169 and 188.
constexpr int64_t kTileRows = 10, kRowsOutputs = 128;
// Channels first, columns of C that fall into the padding are computed in vain. Packing costs about as much as
// computing this many outputs.
constexpr int64_t kPackCycles = 8;
// From this many channels on, AMX transposes a channels_first image while copying it, which is faster than packing. Its
// tiles take 32 channels.
constexpr int64_t kTransposedChannels = 16;
// The most features for which the gathered lines of a tile fit in L1, and the most in one row of the kernel, whose copy
// is unrolled.
constexpr int64_t kLineFeatures = 512, kLineWidth = 128;
// Positions in the highest tile of such a product.
constexpr int64_t kPixels = 64;

// The element type of the copy.
template <class P, class T>
struct CopyOf {
  using type = Compute<T>;
};
#if defined(FASTOPS_HAS_AMX)
template <>
struct CopyOf<bf16_amx, bf16_t> {
  using type = bf16_t;
};
#endif

struct RowsPlan {
  bool taken;
  int64_t rows, cols;  // output rows and columns per job
  int64_t row_blocks, col_blocks;
  int64_t low[3];                   // the lowest offset of a tap from position * step
  int64_t copy_rows, copy_cols;     // of a slab of the copy; there is one slab for every tap along depth
  int64_t channel, col, row, slab;  // strides of the copy, in elements
  int64_t bytes;
  int64_t pixel;  // with AMX: channels of a pixel, padded to whole tiles; else 0
  int64_t line;   // with gathered lines: features of a position, padded to whole tiles; else 0
};

// Plans the copy for jobs of about `positions` positions and at most most_rows rows. inner is the number of channels of
// a channels_last copy, or 0 for a channels_first copy. Returns false if the copy would be too large.
template <class T>
bool plan_copy(const Patches<T>& s, int64_t size, int64_t inner, int64_t most_rows, int64_t positions, RowsPlan* plan) {
  int64_t span[3];
  for (int d = 0; d < 3; ++d) {
    const int64_t reach = (s.taps[d].count - 1) * s.taps[d].offset_step;
    plan->low[d] = s.taps[d].offset + smaller<int64_t>(reach, 0);
    span[d] = reach < 0 ? -reach : reach;
  }
  plan->col_blocks = ceil_div(s.grid[2], positions);
  plan->cols = ceil_div(s.grid[2], plan->col_blocks);
  plan->copy_cols = (plan->cols - 1) * s.step[2] + span[2] + 1;
  plan->rows = smaller(smaller(s.grid[1], most_rows), ceil_div(positions, plan->cols));
  for (;; plan->rows = ceil_div(plan->rows, 2)) {
    plan->copy_rows = (plan->rows - 1) * s.step[1] + span[1] + 1;
    // Lanes of a tile a page apart, or a power of two of cache lines apart, would compete for the same sets of L1.
    plan->channel = plan->col = 1;
    if (inner > 0) plan->col = inner + (inner * s.step[2] * size % 4096 == 0 ? 64 / size : 0);
    plan->row = plan->copy_cols * plan->col;
    plan->slab = plan->copy_rows * plan->row;
    plan->bytes = s.taps[0].count * plan->slab * size;
    if (inner == 0) {
      const int64_t lines = ceil_div(plan->bytes + 64, 64) | 1;  // an odd number; rows are written in whole vectors
      plan->channel = lines * 64 / size;
      plan->bytes = s.channels * lines * 64;
    }
    if (plan->bytes <= kCopyBytes || plan->rows == 1) break;
  }
  plan->row_blocks = ceil_div(s.grid[1], plan->rows);
  return plan->bytes <= 2 * kCopyBytes;
}

// Channels first: the columns of C that are computed for a row of the output.
template <class P>
inline int64_t columns_of_row(const RowsPlan& plan) {
  const int64_t whole = round_up(plan.cols, Tile<P>::nr);
  return kTilesByRows && whole <= plan.copy_cols ? whole : plan.copy_cols;
}

template <class P, class T>
RowsPlan plan_rows(const ConvProduct<T>& g, int threads) {
  constexpr int64_t kSize = sizeof(typename CopyOf<P, T>::type);
  constexpr bool kAmx = !same_type<P, Compute<T>>;
  const Patches<T>& s = g.patches;
  RowsPlan plan{};
  if (s.plain || g.features == 0 || s.tap_count > kMaxTaps) return plan;
  if (kAmx && kSize != 2) return plan;
  if (!kAmx && !s.channels_inner && (s.step[1] != 1 || s.step[2] != 1)) return plan;
  if (kAmx && s.channels_inner && s.channels % 32 != 0) {
    if (s.taps[2].offset_step != 1 || g.features > kLineFeatures || s.taps[2].count * s.channels > kLineWidth)
      return plan;
    plan.line = round_up(g.features, 32);
  } else if (kAmx) {
    if (s.channels < kTransposedChannels) return plan;
    plan.pixel = round_up(s.channels, 32);
  }
  const int64_t inner = plan.pixel > 0 ? plan.pixel : s.channels_inner ? s.channels : 0;
  const int64_t wanted = inner > 0 && plan.line == 0 ? kJobPositions : kJobColumns;
  const int64_t slices = g.groups * g.positions / (s.grid[1] * s.grid[2]) * ceil_div(s.grid[2], wanted);
  const int64_t most_rows = threads > 1 ? ceil_div(s.grid[1] * slices, 4 * threads) : s.grid[1];
  if (!plan_copy(s, kSize, inner, most_rows, wanted, &plan)) return RowsPlan{};
  if (plan.line > 0 && plan.col != s.channels) return RowsPlan{};
  plan.bytes += 2 * kLineWidth + kPixels * plan.col * kSize * s.step[2];  // AMX always reads whole tiles and lines
  if (kAmx) {
    plan.taken = true;
  } else if (s.channels_inner) {
    const int64_t height = plan.cols / ceil_div(plan.cols, kMr);
    plan.taken = height >= smaller<int64_t>(kTileRows, kMr) || g.outputs <= kRowsOutputs;
  } else {
    plan.taken = (columns_of_row<P>(plan) - plan.cols) * g.outputs < kPackCycles * plan.cols;
  }
  return plan;
}

// `count` elements of the source, converted to the type of the copy.
template <class T, class Copy>
inline void copy_pixels(const Patches<T>& s, int64_t at, int64_t count, Copy* to) {
  if (s.derivative == nullptr) {
    if constexpr (same_type<T, Copy>)
      copy_runs(s.x + at, 0, 1, count, to, 0);
    else
      widen_row(s.x + at, to, static_cast<int>(count));
    return;
  }
  if constexpr (same_type<Copy, Compute<T>>) {
    s.derivative(s.x + at, s.saved + at, to, count, s.activation);
  } else {
    constexpr int64_t kChunk = 256;
    Compute<T> chunk[kChunk];
    for (int64_t i = 0; i < count; i += kChunk) {
      const int64_t length = smaller(kChunk, count - i);
      s.derivative(s.x + at + i, s.saved + at + i, chunk, length, s.activation);
      store_row<T>(chunk, to + i, static_cast<int>(length));
    }
  }
}

// Makes the copy for output rows from p[1] on and columns from p[2] on of the slice (image, p[0]).
template <class T, class Copy>
void copy_image_rows(const Patches<T>& s, const RowsPlan& plan, int64_t image, const int64_t* p, Copy* to) {
  const int64_t first = p[2] * s.step[2] + plan.low[2];  // the first column of the copy, as a column of the image
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
      const int64_t at = image * s.batch_stride + q0 * s.stride[0] + q1 * s.stride[1] + (first + begin) * s.stride[2];
      zero_run(begin * plan.col, to);
      if (plan.col == s.stride[2] && plan.col == s.channels)
        copy_pixels(s, at, (end - begin) * plan.col, to + begin * plan.col);
      else
        for (int64_t i = begin; i < end; ++i)
          copy_pixels(s, at + (i - begin) * s.stride[2], s.channels, to + i * plan.col);
      zero_run((plan.copy_cols - end) * plan.col, to + end * plan.col);
    }
}

// The same for channels first: the copy has a plane for every channel and slab.
template <class T, class Copy>
void copy_image_planes(const Patches<T>& s, const RowsPlan& plan, int64_t image, const int64_t* p, Copy* copy) {
  const int64_t first = p[2] * s.step[2] + plan.low[2];
  const int64_t begin = smaller(larger<int64_t>(-first, 0), plan.copy_cols);
  const int64_t end = larger(begin, smaller(s.size[2] - first, plan.copy_cols));
  const PatchPiece piece = {0, static_cast<int>(begin), static_cast<int>(end - begin)};
  constexpr int64_t kVector = 64 / sizeof(Copy);
  for (int64_t slab = 0; slab < s.taps[0].count; ++slab)
    for (int64_t row = 0; row < plan.copy_rows; ++row) {
      Copy* to = copy + slab * plan.slab + row * plan.row;
      const int64_t q0 = p[0] * s.step[0] + s.taps[0].offset + slab * s.taps[0].offset_step;
      const int64_t q1 = p[1] * s.step[1] + plan.low[1] + row;
      const bool inside = q0 >= 0 && q0 < s.size[0] && q1 >= 0 && q1 < s.size[1] && begin < end;
      const int64_t at = image * s.batch_stride + q0 * s.stride[0] + q1 * s.stride[1] + first + begin;
      if constexpr (same_type<T, Copy>) {
        if (s.derivative == nullptr) {  // whole vectors: the next row overwrites the excess
          copy_rows(&piece, inside ? 1 : 0, true, inside ? s.x + at : s.x, s.channel_stride, 1, s.channels, to,
                    plan.channel, static_cast<int>(round_up(plan.copy_cols, kVector)));
          continue;
        }
      }
      for (int64_t c = 0; c < s.channels; ++c, to += plan.channel) {
        zero_run(inside ? begin : plan.copy_cols, to);
        if (!inside) continue;
        copy_pixels(s, at + c * s.channel_stride, end - begin, to + begin);
        zero_run(plan.copy_cols - end, to + end);
      }
    }
}

// Positions of a job are numbered through rows of `pitch`, of which `cols` are real and the rest padding. For the real
// ones in [m, end): body(index in the tile, position, count).
template <class Body>
inline void for_stored(int64_t m, int64_t end, int64_t pitch, int64_t cols, int64_t n0, int64_t n_row, Body&& body) {
  for (int64_t at = m; at < end;) {
    const int64_t row = at / pitch, col = at % pitch, next = smaller(end, (row + 1) * pitch);
    const int count = static_cast<int>(smaller(cols - col, next - at));
    if (count > 0) body(at - m, n0 + row * n_row + col, count);
    at = next;
  }
}

// A job: a block of output rows and columns of one slice, for outputs [o0, o1), whose packed weights are w_panels.
template <class P, class T>
void conv_rows(const ConvProduct<T>& g, const RowsPlan& plan, const void* w_panels, int64_t w_panel, int64_t o0,
               int64_t o1, int64_t job, void* buffer) {
  using C = Compute<T>;
  using Copy = typename CopyOf<P, T>::type;
  constexpr int mr = Tile<P>::mr, nr = Tile<P>::nr;
  const Patches<T>& s = g.patches;
  const int64_t slice = job / plan.col_blocks / plan.row_blocks;
  const int64_t image = slice / s.grid[0];
  const int64_t p[3] = {slice % s.grid[0], job / plan.col_blocks % plan.row_blocks * plan.rows,
                        job % plan.col_blocks * plan.cols};
  const int64_t rows = smaller(plan.rows, s.grid[1] - p[1]), cols = smaller(plan.cols, s.grid[2] - p[2]);
  Copy* const copy = static_cast<Copy*>(buffer);
  if (s.channels_inner)
    copy_image_rows(s, plan, image, p, copy);
  else if (plan.pixel == 0)
    copy_image_planes(s, plan, image, p, copy);

  int64_t x_at[kMaxTaps], w_at[kMaxTaps];
  TapCursor tap(s.taps, 0);
  for (int64_t t = 0; t < s.tap_count; ++t, tap.advance(s.taps)) {
    const int64_t row = s.taps[1].offset + tap.i[1] * s.taps[1].offset_step - plan.low[1];
    const int64_t col = s.taps[2].offset + tap.i[2] * s.taps[2].offset_step - plan.low[2];
    x_at[t] = tap.i[0] * plan.slab + row * plan.row + col * plan.col;
    w_at[t] = t * s.channels * mr;
  }
  const int64_t n0 = (slice * s.grid[1] + p[1]) * s.grid[2] + p[2];  // the first position
  const int64_t step = s.step[2] * plan.col;
  alignas(64) C sums[kMaxTile * kMaxTile];

  if constexpr (same_type<P, C>) {
    const C* w = static_cast<const C*>(w_panels);
    if (s.channels_inner) {
      // The taps of a row are contiguous, like their weights.
      const int64_t joined = s.taps[2].offset_step == 1 && plan.col == s.channels ? s.taps[2].count : 1;
      for (int64_t t = 0; t < s.tap_count; t += joined) x_at[t / joined] = x_at[t];
      const Pieces pieces = {s.tap_count / joined, x_at};
      const int64_t tiles = ceil_div(cols, mr);  // per row, of about equal height
      for (int64_t o = o0; o < o1; o += nr, w += w_panel)
        for (int64_t i = 0; i < rows * tiles; ++i) {
          const int64_t row = i / tiles, first = cols * (i % tiles) / tiles, n = n0 + row * s.grid[2] + first;
          const int outputs = static_cast<int>(smaller<int64_t>(nr, o1 - o));
          const int height = static_cast<int>(cols * (i % tiles + 1) / tiles - first);
          TileOut<C> tile{};
          const bool dense = dense_tile(g, o, n, height, &tile);
          if (!dense) {
            tile.c = sums;
            tile.c_rs = kMaxTile;
          }
          micro_tile(joined * s.channels, copy + row * s.step[1] * plan.row + first * step, step, 1, w, nr, height,
                     outputs, tile, pieces);
          if (!dense) finish_tile(g, sums, kMaxTile, o, outputs, n, height);
        }
      return;
    }
    const Pieces pieces = {s.tap_count, w_at, x_at};
    const int64_t pitch = plan.copy_cols, length = (rows - 1) * pitch + cols;
    const bool by_rows = kTilesByRows && round_up(cols, nr) <= pitch;  // the last columns of a job may be fewer
    for (int64_t m = 0, next; m < length; m = next) {
      next = m + nr;
      if (by_rows && m % pitch + nr >= cols) next = (m / pitch + 1) * pitch;
      const int width = static_cast<int>(smaller<int64_t>(nr, by_rows ? cols - m % pitch : length - m));
      const bool one_row = m / pitch == (m + width - 1) / pitch && m % pitch + width <= cols;
      const int64_t n = n0 + m / pitch * s.grid[2] + m % pitch;
      for (int64_t o = o0; o < o1; o += mr) {
        const int outputs = static_cast<int>(smaller<int64_t>(mr, o1 - o));
        TileOut<C> tile{};
        const bool dense = one_row && dense_tile(g, o, n, width, &tile);
        if (!dense) {
          tile.c = sums;
          tile.c_rs = kMaxTile;
        }
        micro_tile(s.channels, w + (o - o0) / mr * w_panel, 1, mr, copy + m, plan.channel, outputs, width, tile,
                   pieces);
        if (dense) continue;
        for_stored(m, m + width, pitch, cols, n0, s.grid[2], [&](int64_t first, int64_t position, int count) {
          finish_tile(g, sums + first, kMaxTile, o, outputs, position, count);
        });
      }
    }
  } else {
#if defined(FASTOPS_HAS_AMX)
    if (!s.channels_inner) copy_transposed(s, plan, image, p, copy);
    if (plan.line > 0)
      return conv_lines(g, plan, static_cast<const amx_b*>(w_panels), w_panel, o0, o1, n0, rows, cols, x_at, copy);
    conv_pixels(g, plan, static_cast<const amx_b*>(w_panels), w_panel, o0, o1, n0, rows, cols, x_at, copy);
#endif
  }
}
