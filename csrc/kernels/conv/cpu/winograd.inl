// Winograd convolution: 3 x 3 kernels with unit stride and dilation, of any depth, in float32.
//
// The transformed tiles of the input are V[point][tile][c], the transformed weights U[k / nr][point][c][nr]. For each
// point, the microkernel of microkernels.inl computes their matrix product M[tile][point][k]. The epilogue adds bias
// and applies the activation to the inverse transform of M while it is in registers. Tiles are divided into blocks
// whose V and M stay in L2. A thread draws the next block or job. There are two orders:
//
// - Shared weights: the team transforms the weights once, at most kWinogradWeightBytes at a time. A job multiplies a
//   block of tiles by all of them.
// - Shared tiles, for few tiles and many weights: the team transforms all tiles once. A job transforms some panels of
//   weights and multiplies all tiles by them. The transformed weights, which are 1.8 or 4 times as large as the
//   weights, never leave the L2 of the thread. Where transforming takes little of the time, every thread transforms
//   all tiles for itself: nobody waits, and no tile goes from the L2 of one core to that of another.
//
// Every element of M is one chain of multiply-adds for each Scheme::depth channels, in any block and on any thread. So
// the result does not depend on the number of threads.
#pragma once

#include "../../activation/cpu/rows.inl"
#include "../../common/cpu/common.inl"
#include "../../gemm/cpu/gemm.inl"
#include "implicit_gemm.inl"
#include "pointwise.inl"
#include "winograd_stage.inl"
#include "winograd_transform.inl"

inline int64_t winograd_tiles(const Winograd& p, int m) {
  return p.batch * ceil_div(p.out_h, m) * ceil_div(p.out_w, m);
}

// The division of the tiles into blocks of at most `most` tiles: whole images, or parts of one image. A wide image is
// also divided along its width, as flat blocks would have more pixels in shared borders.
struct WinogradGrid {
  int64_t batch, tiles_h, tiles_w;
  int64_t images, rows, cols;  // per block
  int64_t blocks_n, blocks_h, blocks_w;

  WinogradGrid() = default;
  WinogradGrid(const Winograd& p, int m, int64_t most)
      : batch(p.batch), tiles_h(ceil_div(p.out_h, m)), tiles_w(ceil_div(p.out_w, m)) {
    const int64_t plane = tiles_h * tiles_w;
    if (plane <= most) {
      images = ceil_div(batch, ceil_div(batch, most / plane));
      rows = tiles_h;
      cols = tiles_w;
    } else {
      images = 1;
      cols = ceil_div(tiles_w, ceil_div(tiles_w, larger<int64_t>(most / 2, 1)));
      rows = ceil_div(tiles_h, ceil_div(tiles_h, larger<int64_t>(most / cols, 1)));
    }
    blocks_n = ceil_div(batch, images);
    blocks_h = ceil_div(tiles_h, rows);
    blocks_w = ceil_div(tiles_w, cols);
  }

  int64_t blocks() const { return blocks_n * blocks_h * blocks_w; }
  int64_t block_tiles() const { return images * rows * cols; }
  int64_t band(int m, int border) const { return (rows * m + border) * (cols * m + border); }  // pixels per image

  WinogradBlock block(int64_t index) const {
    WinogradBlock b;
    b.image = index / (blocks_h * blocks_w) * images;
    b.row = index / blocks_w % blocks_h * rows;
    b.col = index % blocks_w * cols;
    b.images = smaller(images, batch - b.image);
    b.rows = smaller(rows, tiles_h - b.row);
    b.cols = smaller(cols, tiles_w - b.col);
    return b;
  }

  // The number of tiles in the blocks before this one.
  int64_t first_tile(const WinogradBlock& b) const {
    return b.image * tiles_h * tiles_w + b.row * tiles_w + b.rows * b.col;
  }
};

struct WinogradPlan {
  bool share_tiles, own_tiles;  // own: every thread has a copy of the shared tiles
  int threads;
  WinogradGrid grid;
  int64_t panels;                 // of weights, per pass (shared weights) or per job (shared tiles)
  int64_t row, v_chunk, v_plane;  // strides of V in floats: tiles, chains of multiply-adds, points
  int64_t u_plane, u_panel;       // strides of U: points, panels
  size_t packed_bytes, shared_at, private_at, private_bytes, total;
  size_t stage_at, offsets_at, v_at, u_at, m_at;  // in the private memory of a thread
};

// Measured on Granite Rapids (48 KB L1d, 2 MB L2, 27 GB/s from L3).
#if defined(FASTOPS_VEC_AVX2)
constexpr int64_t kWinogradTileBytes = 600 << 10;  // 1 to 3% faster with 64 and 256 channels (Zen 3)
#else
constexpr int64_t kWinogradTileBytes = 1200 << 10;  // the largest V of a block
#endif
constexpr int64_t kWinogradTiles = 96,
                  kWinogradFew = 24;  // the most tiles in a block; a smaller bound by bytes is raised to the second
constexpr int64_t kWinogradWeightBytes = 32 << 20;      // the largest shared U
constexpr int64_t kWinogradSharedTileBytes = 16 << 20;  // the largest shared V
// Output channels for each thread from which every thread transforms all tiles: that takes 6 / k of the time of the
// products.
#if defined(FASTOPS_VEC_AVX512)
constexpr int64_t kWinogradOwnOutputs = 32;
#else
constexpr int64_t kWinogradOwnOutputs = INT64_MAX;  // not measured
#endif
constexpr int64_t kWinogradSharedTiles = 384;  // the most shared tiles: every thread has an M of its own

// At least `floats`, in an odd number of cache lines, so that rows this far apart fall into different cache sets.
inline int64_t odd_lines(int64_t floats) { return (ceil_div(floats, 16) | 1) * 16; }

template <class Scheme>
WinogradPlan plan_winograd(const Winograd& p, int threads) {
  constexpr int m = Scheme::m, points = Scheme::points, S = VecF::size, nr = kNr<float>;
  constexpr int64_t kFloat = sizeof(float);
  WinogradPlan plan{};
  const int64_t tiles = winograd_tiles(p, m);
  const int64_t panels = ceil_div(p.k, nr), depth = smaller<int64_t>(p.c, Scheme::depth);
  const double flop = 2.0 * points * static_cast<double>(tiles) * static_cast<double>(p.c) * static_cast<double>(p.k);
  plan.threads = static_cast<int>(smaller(static_cast<double>(threads), larger(1.0, flop / kFlopPerThread)));

  const int64_t chunks = ceil_div(p.c, Scheme::depth);
  plan.row = odd_lines(round_up(depth, S));
  int64_t most = kWinogradTileBytes / (points * chunks * plan.row * kFloat);
  most = larger(smaller(most, kWinogradTiles), kWinogradFew);
  if (plan.threads > 1) most = larger(smaller(most, ceil_div(tiles, 2 * plan.threads)), smaller(most, kWinogradFew));
  plan.grid = WinogradGrid(p, m, most);

  // The choice compares the bytes that move between L2 and L3. The shared operand is written once. A byte of tiles
  // counts 3/2 of a byte of weights, which are read sequentially.
  const int64_t v_bytes = points * tiles * chunks * plan.row * kFloat;
  const int64_t u_bytes = panels * points * p.c * nr * kFloat;
  plan.share_tiles = tiles <= kWinogradSharedTiles && v_bytes <= kWinogradSharedTileBytes &&
                     3 * v_bytes * (1 + ceil_div(panels, Scheme::job_panels)) < 2 * u_bytes * (1 + plan.grid.blocks());
  plan.own_tiles = plan.share_tiles && plan.threads > 1 && p.k / plan.threads >= kWinogradOwnOutputs;
  plan.v_chunk = (plan.share_tiles ? tiles : plan.grid.block_tiles()) * plan.row;
  plan.v_plane = chunks * plan.v_chunk + 16;
  const int64_t u_depth = plan.share_tiles && p.packed == nullptr ? depth : p.c;
  plan.u_plane = odd_lines(u_depth * nr);
  plan.u_panel = points * plan.u_plane;
  plan.packed_bytes = aligned(panels * plan.u_panel * kFloat);
  if (plan.share_tiles)
    plan.panels = panels >= 2 * Scheme::job_panels * plan.threads ? Scheme::job_panels : 1;
  else
    plan.panels = smaller(panels, larger<int64_t>(kWinogradWeightBytes / (plan.u_panel * kFloat), 1));
  if (!plan.share_tiles && p.packed != nullptr) plan.panels = panels;

  size_t at = 0;
  plan.shared_at = at;
  if (plan.share_tiles)
    at += plan.own_tiles ? 0 : aligned(points * plan.v_plane * kFloat);
  else if (p.packed == nullptr)
    at += aligned(plan.panels * plan.u_panel * kFloat);
  plan.private_at = at;
  const int64_t band = plan.grid.band(m, 2);
  size_t mine = 0;
  const auto take = [&](size_t* place, int64_t floats) {
    *place = mine;
    mine += aligned(floats * kFloat);
  };
  take(&plan.stage_at, larger<int64_t>(band, 9 * S) * S);
  take(&plan.offsets_at, band + S);
  if (plan.share_tiles) take(&plan.u_at, p.packed != nullptr ? 0 : plan.panels * plan.u_panel);
  if (!plan.share_tiles || plan.own_tiles) take(&plan.v_at, points * plan.v_plane);
  const int64_t m_tiles = plan.share_tiles ? tiles * plan.panels : plan.grid.block_tiles();
  take(&plan.m_at, m_tiles * (points * nr + 16));
  plan.private_bytes = mine + 64;
  plan.total = at + plan.private_bytes * static_cast<size_t>(plan.threads);
  return plan;
}

// Transforms channels [c0, c1) of a panel of weights to U. stage has 9 VecF::size^2 floats.
template <class Scheme>
void transform_weights(const Winograd& p, const WinogradPlan& plan, int64_t panel, int64_t c0, int64_t c1, float* stage,
                       float* to) {
  constexpr int S = VecF::size, nr = kNr<float>;
  const int64_t k0 = panel * nr;
  for (int64_t c = c0; c < c1; c += S)
    for (int64_t k = 0; k < smaller<int64_t>(nr, p.k - k0); k += S) {
      const int channels = static_cast<int>(smaller<int64_t>(c1 - c, S));
      winograd_stage_weights(p, k0 + k, static_cast<int>(smaller<int64_t>(p.k - k0 - k, S)), c, channels, stage);
      for (int i = 0; i < channels; ++i)
        winograd_weight<Scheme>(stage + 9 * i * S, to + (c - c0 + i) * nr + k, plan.u_plane);
    }
}

template <class Scheme>
struct WinogradMember {
  static constexpr int m = Scheme::m, points = Scheme::points, S = VecF::size, nr = kNr<float>;
  static constexpr int64_t m_tile = points * nr + 16;

  const Winograd& p;
  const WinogradPlan& plan;
  float* shared;
  float* stage;
  int32_t* offsets;
  float* v;
  float* u;  // of this thread's own, or shared; not used if the weights come packed
  float* sums;

  WinogradMember(const Winograd& problem, const WinogradPlan& its_plan, unsigned char* workspace, int thread)
      : p(problem), plan(its_plan) {
    unsigned char* const mine = workspace + plan.private_at + static_cast<size_t>(thread) * plan.private_bytes;
    const auto floats = [&](unsigned char* at) { return reinterpret_cast<float*>(at); };
    shared = floats(workspace + plan.shared_at);
    stage = floats(mine + plan.stage_at);
    offsets = reinterpret_cast<int32_t*>(mine + plan.offsets_at);
    v = plan.share_tiles && !plan.own_tiles ? shared : floats(mine + plan.v_at);
    u = plan.share_tiles ? floats(mine + plan.u_at) : shared;
    sums = floats(mine + plan.m_at);
  }

  // Transforms channels [c0, c1) of the tiles of a block to V.
  void transform_tiles(const WinogradBlock& b, int64_t c0, int64_t c1, float* to) const {
    winograd_transform_tiles(
        p, b, m, 2, c0, c1, stage, offsets, plan.row,
        [&](int64_t c) { return to + c / Scheme::depth * plan.v_chunk + c % Scheme::depth; },
        [&](const float* from, int64_t row, float* tile) { winograd_input<Scheme>(from, row, tile, plan.v_plane); });
  }

  // M = V U if `first`, else M += V U, over `depth` channels, for a block of tiles and panels with k output channels.
  void multiply(const float* tiles_at, int64_t tiles, const float* weights, int64_t k, int64_t depth, bool first,
                float* to, int64_t to_panel) const {
    const int64_t groups = ceil_div(tiles, kMr);
    for (int point = 0; point < points; ++point)
      for (int64_t j = 0; j < k; j += nr) {
        const int cols = static_cast<int>(smaller<int64_t>(k - j, nr));
        const float* const b = weights + j / nr * plan.u_panel + point * plan.u_plane;
        float* const c = to + j / nr * to_panel + point * nr;
        for (int64_t g = 0; g < groups; ++g) {
          const int64_t i = tiles * g / groups;
          const int rows = static_cast<int>(tiles * (g + 1) / groups - i);
          TileOut<float> out{};
          out.c = c + i * m_tile;
          out.c_rs = m_tile;
          out.prev = first ? nullptr : out.c;
          out.prev_rs = m_tile;
          // The weights of the next panel or point, a line for each k of the first tiles.
          const float* const next = j + nr < k ? b + plan.u_panel : weights + (point + 1) * plan.u_plane;
          if ((j + nr < k || point + 1 < points) && g * 16 < nr) out.ahead = next + g * depth * 16;
          micro_tile(depth, tiles_at + point * plan.v_plane + i * plan.row, plan.row, 1, b, nr, rows, cols, out);
        }
      }
  }

  // Inverse transform and epilogue of output channels [k, k + count) of a block.
  void finish(const WinogradBlock& b, int64_t k, int count, const float* from) const {
    for (int64_t image = 0; image < b.images; ++image, from += b.rows * b.cols * m_tile) {
      if (!p.channels_last) {
        winograd_finish_planes<Scheme>(p, b, b.image + image, k, count, from, m_tile, nr, stage);
        continue;
      }
      const float* tile = from;
      for (int64_t i = 0; i < b.rows; ++i)
        for (int64_t j = 0; j < b.cols; ++j, tile += m_tile)
          winograd_finish_pixels<Scheme>(p, b.image + image, (b.row + i) * m, (b.col + j) * m, k, count, tile, nr);
    }
  }

  void share_weights(Crew& crew) const {
    const int64_t panels = ceil_div(p.k, nr);
    constexpr int64_t kChannels = 4 * S;  // per unit
    const int64_t chunks = ceil_div(p.c, kChannels);
    for (int64_t panel0 = 0; panel0 < panels; panel0 += plan.panels) {
      const int64_t count = smaller(plan.panels, panels - panel0);
      const auto transform = [&](int64_t unit) {
        const int64_t panel = unit / chunks, c = unit % chunks * kChannels;
        transform_weights<Scheme>(p, plan, panel0 + panel, c, smaller(c + kChannels, p.c), stage,
                                  u + panel * plan.u_panel + c * nr);
      };
      if (p.packed == nullptr && !crew.share(count * chunks, transform)) return;
      const float* const weights = p.packed != nullptr ? p.packed : u;  // packed, there is one pass over all panels
      const bool stays = crew.share(plan.grid.blocks(), [&](int64_t unit) {
        const WinogradBlock b = plan.grid.block(unit);
        transform_tiles(b, 0, p.c, v);
        for (int64_t panel = 0; panel < count; ++panel) {
          const int64_t k = (panel0 + panel) * nr, cols = smaller<int64_t>(nr, p.k - k);
          for (int64_t c = 0; c < p.c; c += Scheme::depth)
            multiply(v + c / Scheme::depth * plan.v_chunk, b.tiles(), weights + panel * plan.u_panel + c * nr, cols,
                     smaller<int64_t>(Scheme::depth, p.c - c), c == 0, sums, 0);
          finish(b, k, static_cast<int>(cols), sums);
        }
      });
      if (!stays) return;
    }
  }

  void share_tiles(Crew& crew) const {
    const int64_t panels = ceil_div(p.k, nr), blocks = plan.grid.blocks();
    constexpr int64_t kChannels = 4 * S;
    const int64_t chunks = ceil_div(p.c, kChannels);
    const int64_t tiles = winograd_tiles(p, m);
    const auto transform = [&](int64_t unit) {
      const WinogradBlock b = plan.grid.block(unit / chunks);
      const int64_t c = unit % chunks * kChannels;
      transform_tiles(b, c, smaller(c + kChannels, p.c), v + plan.grid.first_tile(b) * plan.row);
    };
    if (!plan.own_tiles && !crew.share(blocks * chunks, transform)) return;
    bool transformed = !plan.own_tiles;
    crew.share(ceil_div(panels, plan.panels), [&](int64_t unit) {
      for (int64_t i = 0; !transformed && i < blocks * chunks; ++i) transform(i);
      transformed = true;
      const int64_t panel0 = unit * plan.panels, k0 = panel0 * nr, k = smaller(plan.panels * nr, p.k - k0);
      for (int64_t c = 0; c < p.c; c += Scheme::depth) {
        const int64_t depth = smaller<int64_t>(Scheme::depth, p.c - c);
        const float* weights = u;
        if (p.packed != nullptr) {
          weights = p.packed + panel0 * plan.u_panel + c * nr;
        } else {
          for (int64_t j = 0; j < k; j += nr)
            transform_weights<Scheme>(p, plan, panel0 + j / nr, c, c + depth, stage, u + j / nr * plan.u_panel);
        }
        multiply(v + c / Scheme::depth * plan.v_chunk, tiles, weights, k, depth, c == 0, sums, tiles * m_tile);
      }
      for (int64_t i = 0; i < blocks; ++i)
        for (int64_t j = 0; j < k; j += nr) {
          const WinogradBlock b = plan.grid.block(i);
          finish(b, k0 + j, static_cast<int>(smaller<int64_t>(nr, k - j)),
                 sums + (j / nr * tiles + plan.grid.first_tile(b)) * m_tile);
        }
    });
  }
};

template <class Scheme>
void run_winograd(const Winograd& p, const WinogradPlan& plan, void* workspace, const Team& team) {
  unsigned char* const bytes = static_cast<unsigned char*>(workspace);
  parallel(team, plan.threads, [&](Crew& crew) {
    const WinogradMember<Scheme> member(p, plan, bytes, crew.thread);
    if (plan.share_tiles)
      member.share_tiles(crew);
    else
      member.share_weights(crew);
  });
}

inline Output<float> winograd_output_of(void* y, void* z, const void* bias, Activation activation, bool channels_last,
                                        int64_t channels, int64_t pixels) {
  const Rectifier relu = rectifier(activation, z);
  Output<float> out = {static_cast<float*>(y),
                       channels_last ? channels : pixels,
                       static_cast<float*>(z),
                       static_cast<const float*>(bias),
                       relu,
                       nullptr,
                       activation};
  if (!relu && activation.kind != ActivationKind::identity) out.f = row_forward<float>(activation.kind);
  return out;
}

inline Winograd winograd_problem(const Bound<ConvForward>& args) {
  const ConvGeometry& g = args.geometry;
  Winograd p{};
  p.channels_last = args.layout == Layout::channels_last;
  p.depth_taps = g.kernel[0];
  p.in_d = g.in[0];
  p.out_d = g.out[0];
  p.pad_d = g.padding[0];
  p.batch = g.batch * p.out_d;
  p.c = p.depth_taps * g.in_channels;
  p.k = g.out_channels;
  p.in_h = g.in[1];
  p.in_w = g.in[2];
  p.out_h = g.out[1];
  p.out_w = g.out[2];
  p.pad_h = g.padding[1];
  p.pad_w = g.padding[2];
  p.x = static_cast<const float*>(args.x);
  p.w = static_cast<const float*>(args.w);
  if (args.packed_w) p.packed = p.w;
  const bool taps_inner = args.w_layout == Layout::channels_first;
  p.w_k = 9 * p.c;
  p.w_c = taps_inner ? 9 * p.depth_taps : 1;
  p.w_tap = taps_inner ? 1 : g.in_channels;
  p.w_depth = 9 * p.w_tap;
  p.out = winograd_output_of(args.y, args.z, args.bias, args.activation, p.channels_last, p.k, volume(g.out));
  p.out.residual = static_cast<const float*>(args.residual);
  return p;
}

inline Winograd winograd_problem(const Bound<ConvBackwardInput>& args) {
  const ConvGeometry& g = args.geometry;
  Winograd p{};
  p.channels_last = args.layout == Layout::channels_last;
  p.depth_taps = g.kernel[0];
  p.in_d = g.out[0];
  p.out_d = g.in[0];
  p.pad_d = p.depth_taps - 1 - g.padding[0];
  p.batch = g.batch * p.out_d;
  p.c = p.depth_taps * g.out_channels;
  p.k = g.in_channels;
  p.in_h = g.out[1];
  p.in_w = g.out[2];
  p.out_h = g.in[1];
  p.out_w = g.in[2];
  p.pad_h = 2 - g.padding[1];
  p.pad_w = 2 - g.padding[2];
  p.x = static_cast<const float*>(args.grad_y);
  if (args.activation.kind != ActivationKind::identity) {
    p.saved = static_cast<const float*>(args.saved);
    p.derivative = row_derivative<float>(args.activation.kind);
    p.activation = args.activation;
  }
  p.w = static_cast<const float*>(args.w);
  const bool taps_inner = args.w_layout == Layout::channels_first;
  p.w_c = 9 * p.depth_taps * p.k;
  p.w_k = taps_inner ? 9 * p.depth_taps : 1;
  p.w_tap = taps_inner ? 1 : p.k;
  p.w_depth = 9 * p.w_tap;
  p.rotated = true;
  p.out = winograd_output_of(args.grad_x, args.z, args.bias, args.epilogue, p.channels_last, p.k, volume(g.in));
  return p;
}

// F(4x4) transforms weights to 20 more points than F(2x2). Per pair of channels, that costs as much as this many
// multiply-adds.
constexpr int64_t kWinogradWeightWork = 110;

template <class Body>
inline auto with_winograd_scheme(const Winograd& p, Precision precision, Body&& body) {
  using Small = WinogradScheme<2>;
  using Large = WinogradScheme<4>;
  const int64_t small_work = Small::points * winograd_tiles(p, Small::m);
  const int64_t large_work = Large::points * winograd_tiles(p, Large::m) + kWinogradWeightWork;
  if (precision == Precision::medium && large_work < small_work) return body(Large{});
  return body(Small{});
}

// Where Winograd is the fastest. F(2x2) and conv_gemm on one core of Granite Rapids, channels first / last, images of
// 14 x 14 and 56 x 56:
//
//   channels   8 -> 8          8 -> 16         16 -> 16        64 -> 64        64 -> 8         16 -> 4
//   speedup    0.8-1.0 / 1.7   1.1-1.3 / 1.7   1.4-1.5 / 1.8   1.9 / 1.9       1.2 / 2.0       0.8-1.0 / 1.8
//
// It gains nothing for images like 3 x 3 or a single row, where so much of the tiles is outside the output that no
// products are saved.
constexpr int64_t kWinogradFewer = 8, kWinogradMore = 16;  // of input and output channels

// Whether Winograd's algorithm can compute this convolution.
inline bool winograd_can(DType dtype, const ConvGeometry& g) {
  if (dtype != DType::f32 || g.groups != 1) return false;
  for (int d = 0; d < 3; ++d)
    if (g.stride[d] != 1 || g.dilation[d] != 1 || (d > 0 && g.kernel[d] != 3)) return false;
  return g.batch * g.in_channels * g.out_channels * g.kernel[0] * volume(g.in) * volume(g.out) > 0;
}

// Whether Winograd is the fastest. problem() is called only if Winograd can compute it.
template <class Problem>
inline bool winograd_pays(DType dtype, const ConvGeometry& g, Problem&& problem) {
  if (!winograd_can(dtype, g)) return false;
  const Winograd p = problem();
  if (p.depth_taps > 1 && p.channels() % VecF::size != 0) return false;
  return smaller(g.in_channels, g.out_channels) >= kWinogradFewer &&
         larger(g.in_channels, g.out_channels) >= kWinogradMore &&
         4 * 16 * winograd_tiles(p, 2) <= 3 * 9 * p.batch * p.out_h * p.out_w;
}

template <class T, class Args>
bool winograd_takes(const Args& args) {
  if constexpr (same_type<T, float>)
    return winograd_pays(args.dtype, args.geometry, [&] { return winograd_problem(args); });
  return false;
}

template <class Call>
void plan_winograd_data(Plan<Call>& plan, const Bound<Call>& args) {
  const Winograd p = winograd_problem(args);
  with_winograd_scheme(p, args.precision, [&](auto scheme) {
    using Scheme = decltype(scheme);
    const WinogradPlan tiles = plan_winograd<Scheme>(p, plan.target.threads);
    decide(plan, winograd_tile_name<Scheme>(), tiles.total, tiles,
           [](auto& args, auto& tiles, auto* workspace, auto& team) {
             run_winograd<Scheme>(winograd_problem(args), tiles, workspace, team);
           });
    if (p.packed == nullptr) return;
    plan.packed = tiles.packed_bytes;
    plan.packer = [](const Plan<Call>& plan, const void* w, void* to) {
      typename Call::Pointers pointers{};
      pointers.w = w;
      const Winograd p = winograd_problem(bind(plan, pointers));
      const WinogradPlan& tiles = *reinterpret_cast<const WinogradPlan*>(plan.decisions);
      alignas(64) float stage[9 * VecF::size * VecF::size];
      for (int64_t panel = 0; panel < ceil_div(p.k, kNr<float>); ++panel)
        transform_weights<Scheme>(p, tiles, panel, 0, p.c, stage, static_cast<float*>(to) + panel * tiles.u_panel);
    };
  });
}
inline void plan_winograd(Plan<ConvForward>& plan, const Bound<ConvForward>& args) { plan_winograd_data(plan, args); }
inline void plan_winograd(Plan<ConvBackwardInput>& plan, const Bound<ConvBackwardInput>& args) {
  plan_winograd_data(plan, args);
}
