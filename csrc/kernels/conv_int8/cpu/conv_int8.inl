// int8 convolutions. The contract is csrc/kernels/conv_int8/conv_int8.h.
//
// All threads first copy x, where it is not read in place, and pack weights that are not packed; then they compute
// blocks of y, each of which finds the places of its taps once for all columns. Products: depthwise.inl; matrix.inl
// with AMX; tiles.inl, where VPDPBUSD reads x; else panels of linear_int8/cpu/int8_products.inl, into which the taps of
// each row are gathered.
#pragma once

#include "../../linear_int8/cpu/int8_products.inl"
#include "depthwise.inl"
#include "epilogue.inl"
#include "input.inl"
#include "matrix.inl"
#include "tiles.inl"

// Channels of a group are filled up to a multiple of this for panels, and x is copied where a tap may be outside.
#if defined(FASTOPS_HAS_AMX)
constexpr int kPanelChannels = 4;
constexpr bool kBordersCopied = true;
#else
constexpr int kPanelChannels = 1;
constexpr bool kBordersCopied = false;
#endif

enum class Int8Way : int { depthwise, tiles, panels };

struct ConvInt8Plan {
  Int8Way way;
  int threads;
  int64_t positions;   // of all outputs; with a matrix unit kHalf for each half
  int64_t rows;        // positions of a block; of a depthwise convolution it is a row
  int64_t columns;     // tiles or panels of columns of a block
  bool columns_first;  // the blocks of a column follow each other
#if defined(FASTOPS_HAS_AMX)
  Int8Lines lines;
#endif
  Int8Input input;
  size_t zeros_at, w_at, private_at, private_bytes;
#if defined(FASTOPS_HAS_AMX)
  int64_t offsets_bytes, spare_bytes;  // of a thread's own
#endif
};

// ---- panels

// A sum is over pieces of taps, each filled up to `padded` products.
struct Int8PanelWeights {
  int64_t columns, taps, channels, depth, count, groups;
#if defined(FASTOPS_HAS_AMX)
  Int8Pieces pieces;
#endif
  explicit Int8PanelWeights(const ConvGeometry& g)
      : columns(g.out_channels / g.groups),
        taps(g.kernel[0] * g.kernel[1] * g.kernel[2]),
        channels(g.in_channels / g.groups),
#if defined(FASTOPS_HAS_AMX)
        depth(0),
        count(ceil_div(columns, kInt8Nr)),
        groups(g.groups),
        pieces(g, round_up(channels, kPanelChannels)) {
    depth = pieces.count * pieces.padded;
  }
#else
        depth(taps * channels),
        count(ceil_div(columns, kInt8Nr)),
        groups(g.groups) {
  }
#endif
  int64_t panel_bytes() const {
    return kInt8Nr *
           (round_up(depth, kInt8Chunk) * static_cast<int64_t>(sizeof(Int8B)) + static_cast<int64_t>(sizeof(int32_t)));
  }
  size_t bytes() const { return static_cast<size_t>(groups * count * panel_bytes()); }
  int columns_of(int64_t panel) const { return static_cast<int>(smaller<int64_t>(kInt8Nr, columns - panel * kInt8Nr)); }
  const Int8B* panel(const int8_t* packed, int64_t unit) const {
    return reinterpret_cast<const Int8B*>(packed + unit * panel_bytes());
  }
  // Of each column the sum; with a matrix unit what its sums start with.
  const int32_t* sums(const int8_t* packed, int64_t unit) const {
    return reinterpret_cast<const int32_t*>(panel(packed, unit) + kInt8Nr * round_up(depth, kInt8Chunk));
  }
  void pack(const ConvInt8Forward& call, const int8_t* w, int64_t unit, int8_t* packed) const {
    const int64_t q = unit % count;
    const int8_t* const from = w + (unit / count * columns + q * kInt8Nr) * taps * channels;
    Int8B* const to = const_cast<Int8B*>(panel(packed, unit));
    int32_t* const sums = const_cast<int32_t*>(this->sums(packed, unit));
#if defined(FASTOPS_HAS_AMX)
    if (depth == taps * channels)
      pack_int8_panel(from, depth, columns_of(q), depth, to, sums);
    else
      pack_pieces(from, columns_of(q), to, sums);
    for (int j = 0; j < kInt8Nr; ++j) sums[j] *= -call.x_zero;
#else
    (void)call;
    pack_int8_panel(from, depth, columns_of(q), depth, to, sums);
#endif
  }

#if defined(FASTOPS_HAS_AMX)
 private:
  void pack_pieces(const int8_t* w, int cols, Int8B* to, int32_t* sums) const {
    const int64_t of_tap = round_up(channels, kPanelChannels);
    for (int j = 0; j < kInt8Nr; ++j) sums[j] = 0;
    for (int64_t p = 0; p < pieces.count; ++p)
      for (int64_t e = 0; e < pieces.padded; e += kInt8Group)
        for (int j = 0; j < kInt8Nr; ++j)
          for (int64_t k = e; k < e + kInt8Group; ++k, ++to) {
            const int64_t tap = p * pieces.across + k / of_tap, c = k % of_tap;
            *to = j < cols && k < pieces.length && c < channels ? w[(j * taps + tap) * channels + c] : Int8B{0};
            sums[j] += *to;
          }
  }
#endif
};

#if defined(FASTOPS_HAS_AMX)

// Halves [first, end) of all lines by the matrix unit.
inline void matrix_block(const Bound<ConvInt8Forward>& args, const ConvInt8Plan& plan, const Int8Epilogue& epilogue,
                         const uint8_t* x, int64_t group, int64_t first, int64_t end, int64_t q0, int64_t q1,
                         const int8_t* packed, const int64_t* offsets, unsigned char* memory) {
  const ConvGeometry& g = args.geometry;
  const Int8Lines& lines = plan.lines;
  const Int8PanelWeights w(g);
  const int64_t chunks = w.pieces.chunks(), stride = plan.input.pitch * (lines.all ? 1 : g.stride[2]);
  const uint8_t* const x_end = x + g.batch * plan.input.image_bytes();
  int32_t* const sums = reinterpret_cast<int32_t*>(memory);
  int64_t* const positions = reinterpret_cast<int64_t*>(sums + 2 * kInt8Mr * kInt8Nr);
  unsigned char* const spare = memory + kWaitingBytes;
  WaitingSums waiting(args, epilogue);
  int64_t turn = 0, of_rows = 0;
  for (int64_t half = first; half < end; half += 2, ++of_rows) {
    const int halves = static_cast<int>(smaller<int64_t>(2, end - half));
    // Those of the rows before may still wait.
    int64_t* const of = positions + of_rows % 2 * kInt8Mr;
    const uint8_t* a[2];
    for (int h = 0; h < 2; ++h) {
      if (h == halves) {
        for (int r = 0; r < kHalf; ++r) of[kHalf + r] = -1;
        break;
      }
      a[h] = lines.place(g, plan.input, x, half + h, of + h * kHalf) + group * plan.input.channels;
      if (plan.input.copied || a[h] + (lines.rows - 1) * stride + w.pieces.padded <= x_end) continue;
      // Its last row has no whole chunks.
      unsigned char* const copy = spare + h * plan.spare_bytes;
      __builtin_memcpy(copy, a[h], static_cast<size_t>((lines.rows - 1) * stride + w.pieces.length));
      a[h] = copy;
    }
    Int8Ahead ahead;
    const int64_t steps = (q1 - q0) * chunks;
    if (lines.all && half + 4 <= end) {
      const auto fetch = [&](int i, const void* from, int64_t bytes) {
        ahead.at[i] = static_cast<const uint8_t*>(from) + bytes;  // behind as many of these rows
        ahead.lines[i] = static_cast<int>(ceil_div(ceil_div(bytes, 64), steps));
      };
      fetch(0, a[0], kInt8Mr * stride);
      const int64_t outputs = g.out_channels * kInt8Mr, at = of[0] * g.out_channels;
      if (q1 - q0 == w.count && of[0] >= 0 && epilogue.simple()) {
        if (args.with_residual) fetch(1, args.residual + at, outputs);
        fetch(2, static_cast<const uint8_t*>(args.y) + at, outputs);
      }
    }
    for (int64_t q = q0; q < q1; ++q) {
      const int64_t unit = group * w.count + q;
      const int columns = w.columns_of(q);
      int32_t* const to = sums + turn++ % 2 * (kInt8Mr * kInt8Nr);
      const auto multiply = halves > 1     ? columns > 16 ? multiply_matrix<true, true> : multiply_matrix<true, false>
                            : columns > 16 ? multiply_matrix<false, true>
                                           : multiply_matrix<false, false>;
      multiply(chunks, a, stride, offsets, w.panel(packed, unit), w.sums(packed, unit), to, waiting, ahead);
      for (int i = 0; i < 3; ++i) ahead.at[i] += chunks * ahead.lines[i] * 64;
      waiting.finish();
      waiting.set(to, of, group * w.columns + q * kInt8Nr, halves * kHalf, columns);
    }
  }
  waiting.finish();
}

#else

// The taps of one row, `length` levels at each place, into a row of a panel.
inline void gather_row(const uint8_t* const* places, int64_t stride, int64_t taps, int64_t offset, int64_t length,
                       Int8A* to) {
  int64_t p = 0;
  for (int64_t r = 0; r < taps; ++r) {
    const uint8_t* from = places[r * stride] + offset;
    for (int64_t left = length; left > 0;) {
      const int64_t in_chunk = p % kInt8Chunk, count = smaller(left, kInt8Chunk - in_chunk);
      Int8A* const at = to + p / kInt8Chunk * (kInt8Mr * kInt8Chunk) + in_chunk;
      for (int64_t i = 0; i < count; ++i) at[i] = from[i];
      from += count;
      p += count;
      left -= count;
    }
  }
}

struct NothingWaits {
  void finish(int) {}
};

inline void panel_block(const Bound<ConvInt8Forward>& args, const ConvInt8Plan& plan, const Int8Epilogue& epilogue,
                        const uint8_t* const* places, int64_t pieces, int64_t group, int64_t first, int64_t count,
                        int64_t q0, int64_t q1, const int8_t* packed, void* memory) {
  const Int8PanelWeights w(args.geometry);
  const int64_t length = w.channels * (plan.input.joined ? args.geometry.kernel[2] : 1);
  Int8A* const panel = static_cast<Int8A*>(memory);
  alignas(64) int32_t sums[kInt8Mr * kInt8Nr];
  for (int64_t i = 0; i < count; i += kInt8Mr) {
    const int rows = static_cast<int>(smaller<int64_t>(kInt8Mr, count - i));
    for (int r = 0; r < rows; ++r)
      gather_row(places + i + r, plan.rows, pieces, group * w.channels, length, panel + r * kInt8Chunk);
    const Int8Rows shape(rows);
    NothingWaits nothing;
    for (int64_t q = q0; q < q1; ++q) {
      const int64_t unit = group * w.count + q;
      multiply_int8(shape, w.depth, panel, w.panel(packed, unit), w.columns_of(q), true, sums, nothing, panel);
      const int32_t* const w_sums = w.sums(packed, unit);
      for (int r = 0; r < rows; ++r)
        epilogue.finish(
            [&](int v) {
              return without_zero(sums + r * kInt8Nr + v * VecF::size, w_sums + v * VecF::size, args.x_zero);
            },
            first + i + r, group * w.columns + q * kInt8Nr, w.columns_of(q));
    }
  }
}

#endif

// ---- blocks

#if defined(FASTOPS_HAS_AVX512_BF16)
inline void tile_block(const Bound<ConvInt8Forward>& args, const ConvInt8Plan& plan, const Int8Epilogue& epilogue,
                       const uint8_t** places, int64_t pieces, int64_t group, int64_t first, int64_t count, int64_t q0,
                       int64_t q1, const int8_t* packed) {
  const Int8TileWeights w(args.geometry);
  const ConvGeometry& g = args.geometry;
  packed += group * w.group_bytes();
  Int8Tile tile{.args = &args,
                .epilogue = &epilogue,
                .places = places,
                .places_stride = plan.rows,
                .pieces = pieces,
                .groups_of_piece = plan.input.channels / 4 * (plan.input.joined ? g.kernel[2] : 1),
                .group_offset = group * plan.input.channels,
                .w = nullptr,
                .starts = nullptr,
                .position = 0,
                .k = 0,
                .rows = 0,
                .columns = 0};
  for (int64_t q = q0; q < q1; ++q) {
    const int64_t vectors = w.tiles.first(q + 1) - w.tiles.first(q), from = w.tiles.first(q) * 16;
    tile.w = packed + w.tile_at(q);
    tile.starts = reinterpret_cast<const int32_t*>(packed + w.starts_at(q));
    tile.k = group * w.tiles.columns + from;
    tile.columns = static_cast<int>(smaller(vectors * 16, w.tiles.columns - from));
    const int most = rows_of_tile(vectors);
    for (int64_t i = 0; i < count; i += most) {
      tile.places = places + i;
      tile.position = first + i;
      tile.rows = static_cast<int>(smaller<int64_t>(most, count - i));
      multiply_rows(tile, vectors);
    }
  }
}
#endif

// A row of outputs of a depthwise convolution: of image b, row h.
inline void depthwise_line(const Bound<ConvInt8Forward>& args, const ConvInt8Plan& plan, const Int8Epilogue& epilogue,
                           const uint8_t* x, const uint8_t* zeros, int64_t unit, const int8_t* packed,
                           const uint8_t** places) {
  const ConvGeometry& g = args.geometry;
  const int64_t position = unit * g.out[2];
#if defined(FASTOPS_HAS_AVX512_BF16)
  const Int8Input& in = plan.input;
  DepthwiseLine* const lines = reinterpret_cast<DepthwiseLine*>(places);
  const int64_t b = unit / g.out[1], h = unit % g.out[1] * g.stride[1] + in.origin[1];
  for (int64_t k = 0; k < g.out_channels; k += kDepthwiseBlock) {
    for (int64_t s = 0; s < depthwise_column(g); ++s) {
      const int64_t at = h + s * g.dilation[1];
      const bool inside = s < g.kernel[1] && at >= 0 && at < in.extent[1];
      lines[s] = inside ? DepthwiseLine{x + b * in.image_bytes() + at * in.extent[2] * in.pitch + k, in.pitch}
                        : DepthwiseLine{zeros, 0};
    }
    const int8_t* const w = packed + k / kDepthwiseBlock * depthwise_block_bytes(g);
    depthwise_row({.args = &args,
                   .epilogue = &epilogue,
                   .lines = lines,
                   .zeros = zeros,
                   .width = in.extent[2],
                   .origin = in.origin[2],
                   .w = w,
                   .starts = reinterpret_cast<const int32_t*>(w + kDepthwiseBlock * depthwise_column(g) * g.kernel[2]),
                   .position = position,
                   .k = k,
                   .channels = static_cast<int>(smaller<int64_t>(kDepthwiseBlock, g.out_channels - k))});
  }
#else
  const int64_t taps = place_taps(g, plan.input, x, zeros, position, g.out[2], places, g.out[2]);
  for (int64_t i = 0; i < g.out[2]; ++i)
    for (int64_t k = 0; k < g.out_channels; k += kDepthwiseBlock)
      depthwise_output(args, epilogue, places + i, g.out[2], taps, reinterpret_cast<const float*>(packed), position + i,
                       k, static_cast<int>(smaller<int64_t>(kDepthwiseBlock, g.out_channels - k)));
#endif
}

// ---- weights

// Of sums that the matrix unit takes: shallow ones would be mostly zeros.
constexpr int64_t kLeastMatrixDepth = 16;

// Which products, and how the weights are packed for them: a matter of the convolution alone.
inline Int8Way int8_way(const ConvGeometry& g) {
  if (is_int8_depthwise(g)) return Int8Way::depthwise;
#if defined(FASTOPS_HAS_AMX)
  const int64_t depth = g.kernel[0] * g.kernel[1] * g.kernel[2] * (g.in_channels / g.groups);
  return depth >= kLeastMatrixDepth ? Int8Way::panels : Int8Way::tiles;
#elif defined(FASTOPS_HAS_AVX512_BF16)
  return Int8Way::tiles;
#else
  return Int8Way::panels;
#endif
}

struct Int8Weights {
  Int8Way way;
  int64_t units;    // that are packed on their own
  int64_t columns;  // tiles or panels of a group
  size_t bytes;

  explicit Int8Weights(const ConvGeometry& g) : way(int8_way(g)), columns(1) {
    if (way == Int8Way::depthwise) {
      units = ceil_div(g.out_channels, kDepthwiseBlock);
      bytes = depthwise_bytes(g);
      return;
    }
#if defined(FASTOPS_HAS_AVX512_BF16)
    if (way == Int8Way::tiles) {
      const Int8TileWeights w(g);
      columns = w.tiles.count;
      bytes = w.bytes();
    }
#endif
    if (way == Int8Way::panels) {
      const Int8PanelWeights w(g);
      columns = w.count;
      bytes = w.bytes();
    }
    units = columns * g.groups;
  }
  void pack(const ConvInt8Forward& call, const void* w, int64_t unit, void* to) const {
    const int8_t* const from = static_cast<const int8_t*>(w);
    int8_t* const packed = static_cast<int8_t*>(to);
    if (way == Int8Way::depthwise) return pack_depthwise(call, from, unit, packed);
#if defined(FASTOPS_HAS_AVX512_BF16)
    if (way == Int8Way::tiles) return pack_tile(call, from, Int8TileWeights(call.geometry), unit, packed);
#endif
    Int8PanelWeights(call.geometry).pack(call, from, unit, packed);
  }
};

// ---- the call

template <class T>
void conv_int8_member(const Bound<ConvInt8Forward>& args, const ConvInt8Plan& plan, unsigned char* workspace,
                      Crew& crew) {
  const ConvGeometry& g = args.geometry;
  const Int8Weights weights(g);
  const Int8Input& in = plan.input;
  uint8_t* const copy = workspace;
  uint8_t* const zeros = workspace + plan.zeros_at;
  const int8_t* const packed = static_cast<const int8_t*>(args.packed_w ? args.w : workspace + plan.w_at);
  const uint8_t* const x = in.copied ? copy : static_cast<const uint8_t*>(args.x);
  {
    const int64_t to_pack = args.packed_w ? 0 : weights.units;
    const int64_t to_copy = in.copied ? g.batch * in.extent[0] * in.extent[1] : 0;
    if (!crew.share(1 + to_pack + to_copy, [&](int64_t unit) {
          if (unit == 0) {
            __builtin_memset(zeros, args.x_zero, static_cast<size_t>(in.pitch));
          } else if (unit <= to_pack) {
            weights.pack(args, args.w, unit - 1, const_cast<int8_t*>(packed));
          } else {
            copy_row<T>(args, in, unit - 1 - to_pack, copy);
          }
        }))
      return;
  }
  const Int8Epilogue epilogue(args);
  unsigned char* const own = workspace + plan.private_at + static_cast<size_t>(crew.thread) * plan.private_bytes;
  const uint8_t** const places = reinterpret_cast<const uint8_t**>(own);
  if (plan.way == Int8Way::depthwise) {
    crew.each(g.batch * g.out[1],
              [&](int64_t unit) { depthwise_line(args, plan, epilogue, x, zeros, unit, packed, places); });
    return;
  }
  const Int8Session session;
  const int64_t positions = plan.positions, blocks_down = ceil_div(positions, plan.rows);
  const int64_t across = ceil_div(weights.columns, plan.columns), blocks_across = across * g.groups;
  const bool gathers = plan.way == Int8Way::panels;
#if defined(FASTOPS_HAS_AMX)
  if (gathers) {
    Int8PanelWeights(g).pieces.offsets(g, in, reinterpret_cast<int64_t*>(own));
    configure_halves(plan.lines.rows);
  }
#else
  const int64_t taps = g.kernel[0] * g.kernel[1] * g.kernel[2];
#endif
  crew.each(blocks_down * blocks_across, [&](int64_t unit) {
    const int64_t down = plan.columns_first ? unit % blocks_down : unit / blocks_across;
    const int64_t column = plan.columns_first ? unit / blocks_down : unit % blocks_across;
    const int64_t first = down * plan.rows, count = smaller(plan.rows, positions - first);
    const int64_t q0 = column % across * plan.columns, q1 = smaller(q0 + plan.columns, weights.columns);
#if defined(FASTOPS_HAS_AMX)
    if (gathers)
      return matrix_block(args, plan, epilogue, x, column / across, first / kHalf, (first + count) / kHalf, q0, q1,
                          packed, reinterpret_cast<const int64_t*>(own), own + plan.offsets_bytes);
#endif
    const int64_t pieces = place_taps(g, in, x, zeros, first, count, places, plan.rows);
#if !defined(FASTOPS_HAS_AMX)
    if (gathers)
      return panel_block(args, plan, epilogue, places, pieces, column / across, first, count, q0, q1, packed,
                         own + aligned(plan.rows * taps * static_cast<int64_t>(sizeof(void*))));
#endif
#if defined(FASTOPS_HAS_AVX512_BF16)
    // A last tile of fewer rows reads what it does not store.
    for (int64_t p = 0; p < pieces; ++p)
      for (int64_t i = count; i < smaller(round_up(count, 8), plan.rows); ++i)
        places[p * plan.rows + i] = places[p * plan.rows];
    tile_block(args, plan, epilogue, places, pieces, column / across, first, count, q0, q1, packed);
#endif
  });
}

// Bytes of x that a block reads, of weights that it reads again for each of its tiles of rows, and the fewest blocks
// for each thread.
constexpr int64_t kInt8BlockBytes = 64 << 10, kInt8ColumnBytes = 256 << 10, kInt8BlocksPerThread = 4;

template <class T>
void plan_conv_int8(Plan<ConvInt8Forward>& plan) {
  const ConvInt8Forward& call = plan.call;
  const ConvGeometry& g = call.geometry;
  const Int8Weights weights(g);
  ConvInt8Plan how{};
  how.way = weights.way;
  const int64_t taps = g.kernel[0] * g.kernel[1] * g.kernel[2], channels = g.in_channels / g.groups;
  const int64_t positions = g.batch * g.out[0] * g.out[1] * g.out[2];
  const double work = 2.0 * static_cast<double>(positions * g.out_channels) * static_cast<double>(channels * taps);
  how.threads = static_cast<int>(smaller(static_cast<double>(plan.target.threads), larger(1.0, work / kFlopPerThread)));
  how.input = int8_input(call,
                         how.way == Int8Way::tiles    ? 4
                         : how.way == Int8Way::panels ? kPanelChannels
                                                      : 1,
                         how.way == Int8Way::panels && kBordersCopied && a_tap_is_outside(g));
  if (how.way == Int8Way::depthwise) how.input.joined = false;
  how.positions = positions;
#if defined(FASTOPS_HAS_AMX)
  if (how.way == Int8Way::panels) {
    how.lines = Int8Lines(g, how.input);
    const Int8Pieces pieces(g, how.input.channels);
    // Behind the last piece of x there may be nothing to read.
    if (!how.input.copied && !how.lines.all && pieces.padded != pieces.length) {
      how.input = int8_input(call, kPanelChannels, true);
      how.lines = Int8Lines(g, how.input);
    }
    how.positions = how.lines.all_halves() * kHalf;
    how.offsets_bytes = static_cast<int64_t>(aligned(pieces.chunks() * static_cast<int64_t>(sizeof(int64_t))));
    how.spare_bytes = static_cast<int64_t>(aligned(kHalf * how.input.pitch + pieces.padded));
  }
#endif

  // Rows of a tile, or of a panel: a multiple of both 6 and 8.
  const int64_t unit = how.way == Int8Way::panels ? kInt8Mr : 24;
  const int64_t depth = larger<int64_t>(taps * how.input.channels, 1);
  how.rows = larger<int64_t>(kInt8BlockBytes / depth / unit, 1) * unit;
  how.rows = smaller(how.rows, 8 * unit);
  how.columns = weights.columns;
  const int64_t w_bytes = static_cast<int64_t>(weights.bytes) / g.groups;
  how.columns_first = w_bytes * g.groups > positions * how.input.pitch;
  if (how.columns_first) how.columns = larger<int64_t>(how.columns * kInt8ColumnBytes / larger<int64_t>(w_bytes, 1), 1);
  how.columns = smaller(how.columns, weights.columns);
  const auto blocks = [&] {
    return ceil_div(how.positions, how.rows) * ceil_div(weights.columns, how.columns) * g.groups;
  };
  while (how.threads > 1 && blocks() < kInt8BlocksPerThread * how.threads) {
    if (how.columns > 1 && (how.columns_first || how.rows <= unit))
      how.columns = ceil_div(how.columns, 2);
    else if (how.rows > unit)
      how.rows = round_up(how.rows / 2, unit);
    else if (how.columns > 1)
      how.columns = ceil_div(how.columns, 2);
    else
      break;
  }

  size_t at = how.input.copied ? aligned(g.batch * how.input.image_bytes()) : 0;
  how.zeros_at = at;
  at += aligned(how.input.pitch);
  how.w_at = at;
  if (!call.packed_w) at += aligned(static_cast<int64_t>(weights.bytes));
  how.private_at = at;
  // Of a depthwise convolution the places of a row, or two for each tap of a column, filled up to a multiple of four.
  const int64_t table =
      how.way == Int8Way::depthwise ? larger(taps * g.out[2], 2 * round_up(g.kernel[1], 4)) : how.rows * taps;
  how.private_bytes = aligned(table * static_cast<int64_t>(sizeof(void*)));
  if (how.way == Int8Way::panels) {
#if defined(FASTOPS_HAS_AMX)
    how.private_bytes = aligned(how.offsets_bytes + kWaitingBytes + 2 * how.spare_bytes);
#else
    how.private_bytes += aligned(kInt8Mr * round_up(taps * channels, kInt8Chunk) * static_cast<int64_t>(sizeof(Int8A)));
#endif
  }
  at += static_cast<size_t>(how.threads) * how.private_bytes;

  KernelName name{"depthwise_int8", {}};
  if (how.way == Int8Way::panels) name = {"implicit_gemm_int8", {kInt8Mr, kInt8Nr}};
  if (how.way == Int8Way::tiles) name = {"implicit_gemm_int8", {}};
  decide(plan, name, at, how, [](auto& args, auto& how, auto* workspace, auto& team) {
    parallel(team, how.threads,
             [&](Crew& crew) { conv_int8_member<T>(args, how, static_cast<unsigned char*>(workspace), crew); });
  });
  if (!call.packed_w) return;
  plan.packed = weights.bytes;
  plan.packer = [](const Plan<ConvInt8Forward>& plan, const void* w, void* to) {
    const Int8Weights weights(plan.call.geometry);
    for (int64_t unit = 0; unit < weights.units; ++unit) weights.pack(plan.call, w, unit, to);
  };
}

void plan_call(Plan<ConvInt8Forward>& plan) {
  const ConvGeometry& g = plan.call.geometry;
  if (g.batch * g.out_channels * g.out[0] * g.out[1] * g.out[2] == 0) return decide_nothing(plan);
  with_float_dtype(plan.call.dtype, [&](auto type) { plan_conv_int8<decltype(type)>(plan); });
}
