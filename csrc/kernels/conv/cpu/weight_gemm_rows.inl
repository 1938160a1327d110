// The gradient of w without packing the image, for few channels and large images. With so few outputs per element of
// the image, packing it for every tap would take a third of the time.
//
// C is transposed: grad_w^T[f, o] = sum_n patches[n, f] g[n, o]. g is packed as B. A is a copy of the image rows that a
// block of output rows reads, padded with zeros. A tile of A is 12 channels (with few channels: the taps along a row);
// its elements are one `col` apart along k. A job adds its output rows to a copy of C.
#pragma once

#include "../../common/cpu/common.inl"
#include "../../gemm/cpu/gemm.inl"
#include "../../gemm/cpu/panels.inl"
#include "implicit_gemm.inl"
#include "implicit_gemm_rows.inl"
#include "patches.inl"
#include "patches_pack.inl"
#include "weight_gemm.inl"
#include "weight_gemm_amx.inl"

// The largest C in bytes. It stays in L2 beside the operands.
constexpr int64_t kWeightRowsBytes = 384 << 10;
// With fewer channels than this, the rows of a tile are taps.
constexpr int64_t kFewChannels = 6;

struct WeightRowsPlan {
  bool taken;
  RowsPlan rows;
  int64_t blocks;  // of output rows
  int64_t chunks;
  bool tiles_of_taps;
  int64_t panel;
  int threads;
  size_t private_at, copy_bytes, private_bytes, bias_at, slots_at, total;
};

template <class T>
WeightRowsPlan plan_weight_rows(const ConvWeightProduct<T>& g, int threads) {
  using C = Compute<T>;
  constexpr int64_t kSize = sizeof(C), nr = kNr<C>;
  const Patches<T>& s = g.image;
  WeightRowsPlan plan{};
  const int64_t sums = g.features * g.outputs;
  if (g.grad_w == nullptr || s.plain || sums == 0 || g.positions == 0 || sums * kSize > kWeightRowsBytes) return plan;
  RowsPlan& rows = plan.rows;
  if (!plan_copy(s, kSize, s.channels_inner ? s.channels : 0, kMaxTaps, 2 * kJobPositions, &rows)) return plan;
  plan.tiles_of_taps = s.channels < kFewChannels && s.taps[2].count > s.channels;
  plan.blocks = g.positions / (s.grid[1] * s.grid[2]) * rows.row_blocks * rows.col_blocks;
  plan.chunks = smaller(plan.blocks, ceil_div(kWeightJobs, g.groups));
  plan.threads = conv_threads(2.0 * static_cast<double>(g.groups * sums) * static_cast<double>(g.positions), threads);
  plan.panel = nr * rows.rows * rows.cols;
  plan.private_at = 0;
  plan.copy_bytes = aligned(rows.bytes);
  plan.private_bytes = plan.copy_bytes + aligned(ceil_div(g.outputs, nr) * plan.panel * kSize);
  plan.bias_at = plan.private_at + plan.private_bytes * static_cast<size_t>(plan.threads);
  plan.slots_at = plan.bias_at + (g.grad_bias != nullptr ? aligned(plan.chunks * g.groups * g.outputs * kSize) : 0);
  plan.total = plan.slots_at + aligned(plan.chunks * g.groups * sums * kSize);
  plan.taken = true;
  return plan;
}

// Adds one block of output rows to c, a copy of the transposed C.
template <class T>
void add_weight_rows(const ConvWeightProduct<T>& g, const Patches<T>& s, const Patches<T>& gradient,
                     const WeightRowsPlan& plan, int64_t block, bool first, Compute<T>* copy, Compute<T>* panels,
                     Compute<T>* c, Compute<T>* sums) {
  using C = Compute<T>;
  constexpr int nr = kNr<C>;
  const RowsPlan& rows = plan.rows;
  const int64_t slice = block / rows.col_blocks / rows.row_blocks, image = slice / s.grid[0];
  const int64_t p[3] = {slice % s.grid[0], block / rows.col_blocks % rows.row_blocks * rows.rows,
                        block % rows.col_blocks * rows.cols};
  const int64_t height = smaller(rows.rows, s.grid[1] - p[1]), width = smaller(rows.cols, s.grid[2] - p[2]);
  if (s.channels_inner)
    copy_image_rows(s, rows, image, p, copy);
  else
    copy_image_planes(s, rows, image, p, copy);
  const int64_t n = (slice * s.grid[1] + p[1]) * s.grid[2] + p[2];
  if (width == s.grid[2])
    pack_patches<C, T, nr>(gradient, false, 0, g.outputs, n, height * width, panels, plan.panel, sums);
  else
    for (int64_t row = 0; row < height; ++row)
      pack_patches<C, T, nr>(gradient, false, 0, g.outputs, n + row * s.grid[2], width, panels + row * width * nr,
                             plan.panel, sums);

  int64_t jumps[kMaxTaps];
  for (int64_t row = 0; row < height; ++row) jumps[row] = row * s.step[1] * rows.row;
  const Pieces pieces = {height, jumps};
  // A line of tiles for every tap, whose lanes are channels; or for every channel and row of taps, whose lanes are
  // taps.
  const int64_t lanes = plan.tiles_of_taps ? s.taps[2].count : s.channels, lines = g.features / lanes;
  const int64_t lane_stride = plan.tiles_of_taps ? s.taps[2].offset_step * rows.col : rows.channel;
  const int64_t tiles = ceil_div(lanes, kMr);
  for (int64_t o = 0; o < g.outputs; o += nr) {
    const int outputs = static_cast<int>(smaller<int64_t>(nr, g.outputs - o));
    for (int64_t line = 0; line < lines; ++line) {
      const int64_t outer = s.taps[0].count * s.taps[1].count;
      const TapCursor tap(s.taps, plan.tiles_of_taps ? line % outer * s.taps[2].count : line);
      const int64_t channel = plan.tiles_of_taps ? line / outer : 0;
      const C* const a = copy + channel * rows.channel + tap.i[0] * rows.slab +
                         tap.i[1] * s.taps[1].offset_step * rows.row + tap.i[2] * s.taps[2].offset_step * rows.col;
      for (int64_t t = 0; t < tiles; ++t) {
        const int64_t lane = lanes * t / tiles;
        TileOut<C> tile{};
        tile.c = c + (line * lanes + lane) * g.outputs + o;
        tile.c_rs = g.outputs;
        tile.prev = first ? nullptr : tile.c;
        tile.prev_rs = g.outputs;
        micro_tile(width, a + lane * lane_stride, lane_stride, s.step[2] * rows.col, panels + o / nr * plan.panel, nr,
                   static_cast<int>(lanes * (t + 1) / tiles - lane), outputs, tile, pieces);
      }
    }
  }
}

// Adds the copies of row f of the transposed C and stores the result in the order of w.
template <class T>
void reduce_feature(const ConvWeightProduct<T>& g, const WeightRowsPlan& plan, Layout w_layout, const Compute<T>* slots,
                    int64_t group, int64_t f) {
  using C = Compute<T>;
  constexpr int S = Vec<C>::size, kPiece = 64;
  const int64_t taps = g.image.tap_count, channels = g.image.channels;
  const int64_t channel = plan.tiles_of_taps ? f / taps : f % channels,
                t = plan.tiles_of_taps ? f % taps : f / channels;
  const int64_t place = w_layout == Layout::channels_last ? t * channels + channel : channel * taps + t;
  const int64_t slot = g.groups * g.features * g.outputs;
  T values[kPiece];
  for (int64_t o = 0; o < g.outputs; o += kPiece) {
    const int count = static_cast<int>(smaller<int64_t>(kPiece, g.outputs - o));
    const C* const from = slots + (group * g.features + f) * g.outputs + o;
    for (int i = 0; i < count; i += S) {
      const int width = smaller(count - i, S);
      Vec<C> sum = Vec<C>::load(from + i, width);
      for (int64_t chunk = 1; chunk < plan.chunks; ++chunk) sum = sum + Vec<C>::load(from + chunk * slot + i, width);
      sum.store(values + i, width);
    }
    T* const to = g.grad_w + (group * g.outputs + o) * g.features + place;
    for (int i = 0; i < count; ++i) to[i * g.features] = values[i];
  }
}

template <class T>
void conv_weight_rows(const ConvWeightProduct<T>& g, const WeightRowsPlan& plan, Layout w_layout, void* workspace,
                      const Team& team) {
  using C = Compute<T>;
  unsigned char* const bytes = static_cast<unsigned char*>(workspace);
  C* const bias_slots = reinterpret_cast<C*>(bytes + plan.bias_at);
  C* const slots = reinterpret_cast<C*>(bytes + plan.slots_at);
  parallel(team, plan.threads, [&](Crew& crew) {
    unsigned char* const mine = bytes + plan.private_at + static_cast<size_t>(crew.thread) * plan.private_bytes;
    const bool stays = crew.share(plan.chunks * g.groups, [&](int64_t job) {
      const int64_t group = job % g.groups, chunk = job / g.groups;
      const Patches<T> image = of_group(g.image, group), gradient = of_group(g.gradient, group);
      C* sums = nullptr;
      if (g.grad_bias != nullptr) {
        sums = bias_slots + (chunk * g.groups + group) * g.outputs;
        for (int64_t i = 0; i < g.outputs; ++i) sums[i] = 0;
      }
      C* const c = slots + (chunk * g.groups + group) * g.features * g.outputs;
      const int64_t begin = plan.blocks * chunk / plan.chunks, end = plan.blocks * (chunk + 1) / plan.chunks;
      for (int64_t block = begin; block < end; ++block)
        add_weight_rows(g, image, gradient, plan, block, block == begin, reinterpret_cast<C*>(mine),
                        reinterpret_cast<C*>(mine + plan.copy_bytes), c, sums);
    });
    if (!stays) return;
    crew.share(g.groups * g.features + 1, [&](int64_t row) {
      if (row < g.groups * g.features)
        reduce_feature(g, plan, w_layout, slots, row / g.features, row % g.features);
      else if (g.grad_bias != nullptr)
        reduce_bias(g, bias_slots, plan.chunks);
    });
  });
}

template <class T>
void plan_implicit_gemm(Plan<ConvBackwardWeight>& plan, const Bound<ConvBackwardWeight>& args) {
  const ConvWeightProduct<T> g = weight_product<T>(args);
  with_panel<T>(args.bf16_multiply, conv_work(args.geometry), [&](auto panel) {
    using P = decltype(panel);
    const KernelName name = conv_product_name<P>();
    if constexpr (same_type<P, Compute<T>>) {
      const WeightRowsPlan rows = plan_weight_rows(g, plan.target.threads);
      if (rows.taken)
        return decide(plan, name, rows.total, rows, [](auto& args, auto& rows, auto* workspace, auto& team) {
          conv_weight_rows(weight_product<T>(args), rows, args.w_layout, workspace, team);
        });
    }
#if defined(FASTOPS_HAS_AMX)
    if constexpr (same_type<P, bf16_amx>) {
      const WeightPixelsPlan pixels = plan_weight_pixels(g, plan.target.threads);
      if (pixels.taken)
        return decide(plan, name, pixels.total, pixels, [](auto& args, auto& pixels, auto* workspace, auto& team) {
          conv_weight_pixels(weight_product<T>(args), pixels, args.w_layout, workspace, team);
        });
    }
#endif
    const ConvWeightPlan product = plan_conv_weight<P>(g, plan.target.threads);
    decide(plan, name, product.total, product, [](auto& args, auto& product, auto* workspace, auto& team) {
      const ConvWeightProduct<T> g = weight_product<T>(args);
      parallel(team, product.threads,
               [&](Crew& crew) { conv_weight_member<P>(g, product, static_cast<unsigned char*>(workspace), crew); });
    });
  });
}
