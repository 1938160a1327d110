// The gradients of w and bias as matrix products: grad_w[o, f] = sum_n g[n, o] patches[n, f], for every group.
//
// C is divided into blocks. If there are few blocks, positions are also divided into chunks. Both numbers depend only
// on the shape. A thread draws a block of a chunk, packs both operands one piece of k at a time, and adds to the
// chunk's copy of C. After a barrier, the copies are added in order.
#pragma once

#include "../../common/cpu/common.inl"
#include "../../gemm/cpu/gemm.inl"
#include "implicit_gemm.inl"
#include "implicit_gemm_tile.inl"
#include "patches.inl"
#include "patches_pack.inl"

// The size of a block of C and of a piece of k: the panels of both operands and the sums stay in L2. Measured on
// Granite Rapids (2 MB).
constexpr int64_t kWeightRows = 240, kWeightCols = 512, kWeightK = 384;
// The least number of jobs for a team, and the least number of positions in a chunk.
constexpr int64_t kWeightJobs = 8, kLeastChunk = 1024;

template <class T>
struct ConvWeightProduct {
  int64_t groups, outputs, features, positions;
  Patches<T> gradient, image;
  T* grad_w;
  T* grad_bias;
  bool in_order;  // the features of grad_w are in the order of the patches
};

struct ConvWeightPlan {
  int threads;
  int64_t kc, mb, nb, m_blocks, n_blocks, chunk, chunks;
  int64_t a_panel, b_panel;
  bool direct;  // sums are kept in grad_w itself
  size_t private_at, a_bytes, private_bytes, bias_at, slots_at, total;
};

template <class P, class T>
ConvWeightPlan plan_conv_weight(const ConvWeightProduct<T>& g, int threads) {
  using Kind = Tile<P>;
  constexpr int64_t kElement = sizeof(typename Kind::B), mr = Kind::mr, nr = Kind::nr, step = Kind::step;
  constexpr int64_t kSum = sizeof(Compute<T>);
  ConvWeightPlan plan{};
  const int64_t cols = g.grad_w != nullptr ? g.features : 0;
  plan.m_blocks = ceil_div(g.outputs, kWeightRows);
  plan.mb = round_up(ceil_div(g.outputs, plan.m_blocks), mr);
  plan.n_blocks = larger<int64_t>(1, ceil_div(cols, kWeightCols));
  plan.nb = larger(round_up(ceil_div(cols, plan.n_blocks), nr), nr);
  const int64_t jobs = g.groups * plan.m_blocks * plan.n_blocks;
  const int64_t wanted = smaller(ceil_div(kWeightJobs, jobs), ceil_div(g.positions, kLeastChunk));
  const int64_t length = larger<int64_t>(1, ceil_div(g.positions, larger<int64_t>(1, wanted)));
  plan.kc = round_up(ceil_div(length, larger<int64_t>(1, ceil_div(length, kWeightK))), larger(16, Kind::k_align));
  plan.chunk = round_up(length, plan.kc);
  plan.chunks = larger<int64_t>(1, ceil_div(g.positions, plan.chunk));
  plan.threads = conv_threads(2.0 * static_cast<double>(g.groups * g.outputs) * static_cast<double>(g.positions) *
                                  static_cast<double>(larger<int64_t>(cols, 1)),
                              threads);
  plan.direct = plan.chunks == 1 && same_type<T, Compute<T>> && g.in_order;
  plan.a_panel = mr * plan.kc / step;
  plan.b_panel = nr * plan.kc / step;
  plan.private_at = 0;
  plan.a_bytes = aligned(plan.mb * plan.kc / step * kElement);
  plan.private_bytes = plan.a_bytes + aligned(plan.nb * plan.kc / step * kElement);
  plan.bias_at = plan.private_at + plan.private_bytes * static_cast<size_t>(plan.threads);
  plan.slots_at = plan.bias_at + (g.grad_bias != nullptr ? aligned(plan.chunks * g.groups * g.outputs * kSum) : 0);
  plan.total = plan.slots_at + (plan.direct ? 0 : aligned(plan.chunks * g.groups * g.outputs * cols * kSum));
  return plan;
}

// Adds the copies of C for row `row`, counted over the outputs of all groups, and stores the result.
template <class T>
void reduce_row(const ConvWeightProduct<T>& g, const Compute<T>* slots, int64_t chunks, int64_t row) {
  using C = Compute<T>;
  constexpr int S = Vec<C>::size, kPiece = 256;
  alignas(64) C sums[kPiece];
  T values[kPiece];
  const int64_t slot = g.groups * g.outputs * g.features;
  const int64_t outer = g.image.channels_inner ? g.image.tap_count : g.image.channels, inner = g.features / outer;
  for (int64_t f = 0; f < g.features; f += kPiece) {
    const int count = static_cast<int>(smaller<int64_t>(kPiece, g.features - f));
    const C* const from = slots + row * g.features + f;
    for (int i = 0; i < count; i += S) {
      const int width = smaller(count - i, S);
      Vec<C> sum = Vec<C>::load(from + i, width);
      for (int64_t chunk = 1; chunk < chunks; ++chunk) sum = sum + Vec<C>::load(from + chunk * slot + i, width);
      sum.store(sums + i, width);
    }
    T* const to = g.grad_w + row * g.features;
    if (g.in_order) {
      store_row<T>(sums, to + f, count);
      continue;
    }
    store_row<T>(sums, values, count);
    for (int i = 0; i < count; ++i) to[(f + i) % inner * outer + (f + i) / inner] = values[i];
  }
}

template <class T>
void reduce_bias(const ConvWeightProduct<T>& g, const Compute<T>* slots, int64_t chunks) {
  const int64_t outputs = g.groups * g.outputs;
  for (int64_t o = 0; o < outputs; ++o) {
    Compute<T> sum = slots[o];
    for (int64_t chunk = 1; chunk < chunks; ++chunk) sum += slots[chunk * outputs + o];
    store_row<T>(&sum, g.grad_bias + o, 1);
  }
}

template <class T>
inline Patches<T> of_group(const Patches<T>& s, int64_t group) {
  Patches<T> one = s;
  const int64_t from = group * s.channels * s.channel_stride;
  one.x += from;
  if (one.saved != nullptr) one.saved += from;
  return one;
}

template <class P, class T>
void conv_weight_member(const ConvWeightProduct<T>& g, const ConvWeightPlan& plan, unsigned char* workspace,
                        Crew& crew) {
  using Kind = Tile<P>;
  using A = typename Kind::A;
  using B = typename Kind::B;
  using C = Compute<T>;
  constexpr int mr = Kind::mr, nr = Kind::nr, step = Kind::step;
  const typename Kind::Session session;
  unsigned char* const mine = workspace + plan.private_at + static_cast<size_t>(crew.thread) * plan.private_bytes;
  A* const a = reinterpret_cast<A*>(mine);
  B* const b = reinterpret_cast<B*>(mine + plan.a_bytes);
  C* const bias_slots = reinterpret_cast<C*>(workspace + plan.bias_at);
  C* slots = reinterpret_cast<C*>(workspace + plan.slots_at);
  if constexpr (same_type<T, C>) {
    if (plan.direct) slots = g.grad_w;
  }
  const int64_t rows = g.groups * g.outputs;
  const bool multiply = g.grad_w != nullptr && g.features > 0;

  const bool stays = crew.share(plan.chunks * g.groups * plan.m_blocks * plan.n_blocks, [&](int64_t job) {
    const int64_t n0 = job % plan.n_blocks * plan.nb, n1 = smaller(n0 + plan.nb, g.features);
    const int64_t m0 = job / plan.n_blocks % plan.m_blocks * plan.mb, m1 = smaller(m0 + plan.mb, g.outputs);
    const int64_t group = job / plan.n_blocks / plan.m_blocks % g.groups;
    const int64_t chunk = job / plan.n_blocks / plan.m_blocks / g.groups;
    const int64_t k0 = chunk * plan.chunk, k1 = smaller(k0 + plan.chunk, g.positions);
    const Patches<T> gradient = of_group(g.gradient, group), image = of_group(g.image, group);
    C* sums = nullptr;
    if (g.grad_bias != nullptr && n0 == 0) {
      sums = bias_slots + chunk * rows + group * g.outputs + m0;
      for (int64_t i = 0; i < m1 - m0; ++i) sums[i] = 0;
    }
    C* const c = slots + (chunk * rows + group * g.outputs) * g.features;
    for (int64_t kk = k0; kk == k0 || kk < k1; kk += plan.kc) {
      const int64_t length = smaller(plan.kc, k1 - kk), k = ceil_div(length, step);
      pack_patches<A, T, mr>(gradient, false, m0, m1 - m0, kk, length, a, plan.a_panel, sums);
      if (!multiply) continue;
      pack_patches<B, T, nr>(image, false, n0, n1 - n0, kk, length, b, plan.b_panel, nullptr);
      for_each_tile<P>(m1 - m0, n1 - n0, [&](int64_t m, int64_t n, int height, int width) {
        C* const to = c + (m0 + m) * g.features + n0 + n;
        product_tile(P{}, k, a + m / mr * plan.a_panel, b + n / nr * plan.b_panel, height, width,
                     kk == k0 ? nullptr : static_cast<const C*>(to), g.features, to, g.features);
      });
    }
  });
  if (!stays) return;
  const int64_t reduced = multiply && !plan.direct ? rows : 0;
  crew.share(reduced + 1, [&](int64_t row) {
    if (row < reduced)
      reduce_row(g, slots, plan.chunks, row);
    else if (g.grad_bias != nullptr)
      reduce_bias(g, bias_slots, plan.chunks);
  });
}

template <class T>
inline ConvWeightProduct<T> weight_product(const Bound<ConvBackwardWeight>& args) {
  const ConvGeometry& geometry = args.geometry;
  ConvWeightProduct<T> g{};
  g.groups = geometry.groups;
  g.outputs = geometry.out_channels / geometry.groups;
  g.gradient = gradient_patches<T>(geometry, args.layout, args.grad_y, args.activation, args.saved);
  g.image = image_patches<T>(geometry, args.layout, args.x);
  set_plain(g.gradient);
  set_plain(g.image);
  g.features = g.image.channels * g.image.tap_count;
  g.positions = geometry.batch * volume(geometry.out);
  g.grad_w = static_cast<T*>(args.grad_w);
  g.grad_bias = static_cast<T*>(args.grad_bias);
  g.in_order = args.layout == args.w_layout || g.image.tap_count == 1 || g.image.channels == 1;
  return g;
}
