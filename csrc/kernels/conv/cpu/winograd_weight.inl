// The gradient of the weights of a 3 x 3 convolution by the transpose of F(2x2, 3x3), in float32
// (winograd_transform.inl).
//
// For each point, M[point][k][c] = sum over tiles of E[point][tile][k] V[point][tile][c], where E are the transformed
// tiles of grad_y and V those of x. The microkernel reads both operands in this layout. M is divided into blocks of
// k x c, which stay in L2 while all blocks of tiles are added. If there are few blocks, tiles are also divided into
// chunks, each with its own M. Both numbers depend only on the shape. A thread draws a block of a chunk. After a
// barrier, the chunks are added in order and transformed. With a single chunk, a block is transformed as soon as it is
// complete.
#pragma once

#include "../../activation/cpu/rows.inl"
#include "../../common/cpu/common.inl"
#include "../../gemm/cpu/gemm.inl"
#include "winograd.inl"
#include "winograd_stage.inl"
#include "winograd_transform.inl"

struct WinogradWeight {
  Winograd image;     // x, with the tiles of the convolution
  Winograd gradient;  // grad_y, in tiles without a border
  float* grad_w;
  float* grad_bias;
  bool taps_inner;
};

struct WinogradWeightPlan {
  int threads;
  WinogradGrid grid;
  int64_t kb, cb, k_blocks, c_blocks;  // blocks of M
  int64_t chunks, chunk;               // chunks of tiles; blocks of tiles per chunk
  int64_t v_row, v_plane, e_row, e_plane, m_row, m_plane;
  size_t sums_at, bias_at, private_at, private_bytes, total;
  size_t stage_at, offsets_at, v_at, e_at, own_sums_at;  // in the private memory of a thread
};

// Measured on Granite Rapids (48 KB L1d, 2 MB L2).
constexpr int64_t kWinogradGradientRows = 128;         // rows and columns of a block of M
constexpr int64_t kWinogradGradientBytes = 900 << 10;  // the largest E and V of a block of tiles
constexpr int64_t kWinogradGradientJobs = 8;           // the least number of jobs for a team
constexpr int64_t kWinogradGradientChunk = 256;        // the least number of tiles per chunk

inline WinogradWeightPlan plan_winograd_weight(const WinogradWeight& p, int threads) {
  constexpr int points = 16, S = VecF::size;
  constexpr int64_t kFloat = sizeof(float);
  WinogradWeightPlan plan{};
  const int64_t k = p.gradient.c, c = p.image.c, tiles = winograd_tiles(p.image, 2);
  const double flop = 2.0 * points * static_cast<double>(tiles) * static_cast<double>(k) * static_cast<double>(c);
  plan.threads = static_cast<int>(smaller(static_cast<double>(threads), larger(1.0, flop / kFlopPerThread)));

  plan.kb = round_up(ceil_div(k, ceil_div(k, kWinogradGradientRows)), S);
  plan.cb = round_up(ceil_div(c, ceil_div(c, kWinogradGradientRows)), kNr<float>);
  plan.k_blocks = ceil_div(k, plan.kb);
  plan.c_blocks = ceil_div(c, plan.cb);
  plan.v_row = odd_lines(plan.cb);
  plan.e_row = odd_lines(plan.kb);
  plan.m_row = odd_lines(plan.cb);
  plan.m_plane = plan.kb * plan.m_row + 16;

  const int64_t jobs = plan.k_blocks * plan.c_blocks;
  plan.chunks = smaller(ceil_div(kWinogradGradientJobs, jobs), ceil_div(tiles, kWinogradGradientChunk));
  const int64_t most = kWinogradGradientBytes / (points * (plan.v_row + plan.e_row) * kFloat);
  plan.grid = WinogradGrid(p.image, 2, smaller(most, kWinogradTiles));
  plan.chunk = ceil_div(plan.grid.blocks(), plan.chunks);
  plan.chunks = ceil_div(plan.grid.blocks(), plan.chunk);
  plan.v_plane = plan.grid.block_tiles() * plan.v_row + 16;
  plan.e_plane = plan.grid.block_tiles() * plan.e_row + 16;

  plan.sums_at = 0;
  const int64_t m_block = points * plan.m_plane;
  plan.bias_at = plan.sums_at + aligned(plan.chunks > 1 ? plan.chunks * jobs * m_block * kFloat : 0);
  plan.private_at = plan.bias_at + aligned(p.grad_bias != nullptr ? plan.chunks * k * kFloat : 0);
  const int64_t band = plan.grid.band(2, 2);
  size_t mine = 0;
  const auto take = [&](size_t* place, int64_t floats) {
    *place = mine;
    mine += aligned(floats * kFloat);
  };
  take(&plan.stage_at, band * S);
  take(&plan.offsets_at, band + S);
  take(&plan.v_at, points * plan.v_plane);
  take(&plan.e_at, points * plan.e_plane);
  take(&plan.own_sums_at, plan.chunks > 1 ? 0 : m_block);
  plan.private_bytes = mine + 64;
  plan.total = plan.private_at + plan.private_bytes * static_cast<size_t>(plan.threads);
  return plan;
}

struct WinogradWeightMember {
  static constexpr int points = 16, S = VecF::size, nr = kNr<float>;

  const WinogradWeight& p;
  const WinogradWeightPlan& plan;
  float* sums;
  float* bias;
  float* stage;
  int32_t* offsets;
  float* v;
  float* e;

  WinogradWeightMember(const WinogradWeight& problem, const WinogradWeightPlan& its_plan, unsigned char* workspace,
                       int thread)
      : p(problem), plan(its_plan) {
    unsigned char* const mine = workspace + plan.private_at + static_cast<size_t>(thread) * plan.private_bytes;
    const auto floats = [](unsigned char* at) { return reinterpret_cast<float*>(at); };
    sums = plan.chunks > 1 ? floats(workspace + plan.sums_at) : floats(mine + plan.own_sums_at);
    bias = floats(workspace + plan.bias_at);
    stage = floats(mine + plan.stage_at);
    offsets = reinterpret_cast<int32_t*>(mine + plan.offsets_at);
    v = floats(mine + plan.v_at);
    e = floats(mine + plan.e_at);
  }

  int64_t jobs() const { return plan.k_blocks * plan.c_blocks; }
  float* sums_of(int64_t chunk, int64_t job) const {
    return plan.chunks > 1 ? sums + (chunk * jobs() + job) * points * plan.m_plane : sums;
  }

  // M = E V if `first`, else M += E V, over the tiles of a block, for rows x cols of M.
  void multiply(int64_t tiles, int64_t rows, int64_t cols, bool first, float* to) const {
    const int64_t groups = ceil_div(rows, kMr);
    for (int point = 0; point < points; ++point)
      for (int64_t j = 0; j < cols; j += nr)
        for (int64_t g = 0; g < groups; ++g) {
          const int64_t i = rows * g / groups;
          TileOut<float> out{};
          out.c = to + point * plan.m_plane + i * plan.m_row + j;
          out.c_rs = plan.m_row;
          out.prev = first ? nullptr : out.c;
          out.prev_rs = plan.m_row;
          micro_tile(tiles, e + point * plan.e_plane + i, 1, plan.e_row, v + point * plan.v_plane + j, plan.v_row,
                     static_cast<int>(rows * (g + 1) / groups - i), static_cast<int>(smaller<int64_t>(nr, cols - j)),
                     out);
        }
  }

  // Computes a block of M over a chunk of tiles.
  void accumulate(int64_t chunk, int64_t job) const {
    const int64_t k0 = job / plan.c_blocks * plan.kb, k1 = smaller(k0 + plan.kb, p.gradient.c);
    const int64_t c0 = job % plan.c_blocks * plan.cb, c1 = smaller(c0 + plan.cb, p.image.c);
    const int64_t b0 = chunk * plan.chunk, b1 = smaller(b0 + plan.chunk, plan.grid.blocks());
    float* const bias_sums = p.grad_bias != nullptr && c0 == 0 ? bias + chunk * p.gradient.c + k0 : nullptr;
    if (bias_sums != nullptr)
      for (int64_t k = 0; k < k1 - k0; ++k) bias_sums[k] = 0;
    for (int64_t i = b0; i < b1; ++i) {
      const WinogradBlock b = plan.grid.block(i);
      winograd_transform_tiles(
          p.image, b, 2, 2, c0, c1, stage, offsets, plan.v_row, [&](int64_t c) { return v + (c - c0); },
          [&](const float* from, int64_t row, float* to) {
            winograd_input<WinogradScheme<2>>(from, row, to, plan.v_plane);
          });
      winograd_transform_tiles(
          p.gradient, b, 2, 0, k0, k1, stage, offsets, plan.e_row, [&](int64_t k) { return e + (k - k0); },
          [&](const float* from, int64_t row, float* to) { winograd_gradient(from, row, to, plan.e_plane); });
      multiply(b.tiles(), k1 - k0, c1 - c0, i == b0, sums_of(chunk, job));
      // Point (1, 1) of E is the sum of the elements of the tile.
      if (bias_sums != nullptr)
        add_columns(e + 5 * plan.e_plane, plan.e_row, static_cast<int>(k1 - k0), b.tiles(), bias_sums);
    }
    if (plan.chunks == 1) finish(k0, k1, c0, c1);
  }

  // Stores channels [c, c + count) of row k of grad_w from vectors over channels.
  void store(int64_t k, int64_t c, int count, const VecF* taps) const {
    const int64_t all = p.image.channels(), depth = c / all, first = c % all, depth_taps = p.image.depth_taps;
    if (!p.taps_inner) {
      for (int t = 0; t < 9; ++t) taps[t].store(p.grad_w + ((k * depth_taps + depth) * 9 + t) * all + first, count);
      return;
    }
    float* const to = p.grad_w + ((k * all + first) * depth_taps + depth) * 9;
#pragma GCC unroll 3
    for (int t = 0; t < 9; t += S) {
      VecF r[S];
#pragma GCC unroll 16
      for (int i = 0; i < S; ++i) r[i] = t + i < 9 ? taps[t + i] : VecF::zero();
      transpose(r);
#pragma GCC unroll 16
      for (int i = 0; i < S; ++i)
        if (i < count) r[i].store(to + i * 9 * depth_taps + t, smaller(9 - t, S));
    }
  }

  // Adds and transforms rows [k0, k1) and channels [c0, c1) of grad_w; with channel 0 also grad_bias.
  void finish(int64_t k0, int64_t k1, int64_t c0, int64_t c1) const {
    for (int64_t k = k0; k < k1; ++k) {
      for (int64_t c = c0; c < c1; c += S) {
        const int64_t at = k % plan.kb * plan.m_row + c % plan.cb;
        const int64_t job = k / plan.kb * plan.c_blocks + c / plan.cb;
        VecF s[points], taps[9];
        for (int point = 0; point < points; ++point) {
          s[point] = VecF::load(sums_of(0, job) + point * plan.m_plane + at);
          for (int64_t chunk = 1; chunk < plan.chunks; ++chunk)
            s[point] = s[point] + VecF::load(sums_of(chunk, job) + point * plan.m_plane + at);
        }
        winograd_weight_gradient(s, taps);
        store(k, c, static_cast<int>(smaller<int64_t>(c1 - c, S)), taps);
      }
      if (p.grad_bias == nullptr || c0 > 0) continue;
      float sum = bias[k];
      for (int64_t chunk = 1; chunk < plan.chunks; ++chunk) sum += bias[chunk * p.gradient.c + k];
      p.grad_bias[k] = sum;
    }
  }
};

inline WinogradWeight winograd_problem(const Bound<ConvBackwardWeight>& args) {
  const ConvGeometry& g = args.geometry;
  WinogradWeight p{};
  p.image.channels_last = p.gradient.channels_last = args.layout == Layout::channels_last;
  p.image.depth_taps = g.kernel[0];
  p.image.in_d = g.in[0];
  p.image.pad_d = g.padding[0];
  p.image.out_d = p.gradient.in_d = p.gradient.out_d = g.out[0];
  p.image.batch = p.gradient.batch = g.batch * g.out[0];
  p.image.c = g.kernel[0] * g.in_channels;
  p.gradient.c = g.out_channels;
  p.image.in_h = g.in[1];
  p.image.in_w = g.in[2];
  p.image.pad_h = g.padding[1];
  p.image.pad_w = g.padding[2];
  p.image.out_h = p.gradient.in_h = p.gradient.out_h = g.out[1];
  p.image.out_w = p.gradient.in_w = p.gradient.out_w = g.out[2];
  p.image.x = static_cast<const float*>(args.x);
  p.gradient.x = static_cast<const float*>(args.grad_y);
  if (args.activation.kind != ActivationKind::identity) {
    p.gradient.saved = static_cast<const float*>(args.saved);
    p.gradient.derivative = row_derivative<float>(args.activation.kind);
    p.gradient.activation = args.activation;
  }
  p.grad_w = static_cast<float*>(args.grad_w);
  p.grad_bias = static_cast<float*>(args.grad_bias);
  p.taps_inner = args.w_layout == Layout::channels_first;
  return p;
}

template <class T>
bool winograd_takes(const Bound<ConvBackwardWeight>& args) {
  return args.grad_w != nullptr &&
         winograd_pays(args.dtype, args.geometry, [&] { return winograd_problem(args).image; });
}

inline void plan_winograd(Plan<ConvBackwardWeight>& plan, const Bound<ConvBackwardWeight>& args) {
  const WinogradWeightPlan tiles = plan_winograd_weight(winograd_problem(args), plan.target.threads);
  decide(plan, winograd_tile_name<WinogradScheme<2>>(), tiles.total, tiles,
         [](auto& args, auto& tiles, auto* workspace, auto& team) {
           const WinogradWeight p = winograd_problem(args);
           unsigned char* const bytes = static_cast<unsigned char*>(workspace);
           parallel(team, tiles.threads, [&](Crew& crew) {
             const WinogradWeightMember member(p, tiles, bytes, crew.thread);
             const bool stays = crew.share(tiles.chunks * member.jobs(), [&](int64_t unit) {
               member.accumulate(unit / member.jobs(), unit % member.jobs());
             });
             if (!stays) return;
             if (tiles.chunks == 1) return;
             constexpr int64_t kRows = 8;  // per unit
             crew.share(ceil_div(p.gradient.c, kRows), [&](int64_t unit) {
               member.finish(unit * kRows, smaller((unit + 1) * kRows, p.gradient.c), 0, p.image.c);
             });
           });
         });
}
