// Convolution as an implicit matrix product: the forward pass and the gradient of the input.
//
// Both are sums over features, that is channels and taps: outputs[o, n] = sum_f weights[o, f] patches[n, f]. The
// gradient of the input is one such product for every phase of the stride. A phase is the elements q with the same q
// mod stride. They read the same subset of taps, which are 1 apart in grad_y, and are `stride` apart in grad_x. For
// channels first, rows of C are outputs and columns are positions; for channels last the reverse. So C has the layout
// of y.
//
// The team packs the weights together, then waits at a barrier. Positions are divided into strips. A thread draws a
// strip, packs it and multiplies it by all weights of the group, one block of features at a time. Within a block, every
// element of C is one chain of multiply-adds; blocks are added in order. Where there are few positions and many
// weights, the team packs the positions together, too, and divides the outputs.
#pragma once

#include "../../activation/cpu/rows.inl"
#include "../../common/cpu/common.inl"
#include "../../gemm/cpu/gemm.inl"
#include "../../gemm/cpu/panels.inl"
#include "filters.inl"
#include "implicit_gemm_rows.inl"
#include "implicit_gemm_tile.inl"
#include "patches.inl"
#include "patches_pack.inl"

// The largest packed weights, in bytes. If there are more, some groups, or some outputs of a group, are packed at a
// time.
constexpr int64_t kConvWeightBytes = 16 << 20;

// The largest packed strip of positions, in bytes. It shares L2 with the weights.
#if defined(FASTOPS_VEC_AVX2)
constexpr int64_t kStripBytes = 128 << 10;  // of 512 KB. 5x5, 64 channels of 32x32: 1.06 times as fast (Zen 3)
#else
constexpr int64_t kStripBytes = 512 << 10;
#endif

// Each strip reads all weights. If these are more bytes than this, L2 does not keep them for the next strip.
#if defined(FASTOPS_VEC_AVX512)
constexpr int64_t kKeptWeightBytes = 1 << 20;
#else
constexpr int64_t kKeptWeightBytes = INT64_MAX;  // not measured
#endif

// The outputs whose weights are packed in one unit of work.
constexpr int64_t kWeightLanes = 96;

struct ImplicitPlan {
  int threads;
  bool packed;    // weights come packed
  bool together;  // positions are packed by the team, all of them, before the product
  int64_t kc, k_padded;
  int64_t groups_at_once, outputs_at_once, strip, strips, parts;
  RowsPlan rows;             // if the image is not packed (implicit_gemm_rows.inl)
  int64_t w_panel, x_panel;  // elements between panels
  int64_t sums_rs;
  size_t weight_bytes, positions_at, private_at, panel_bytes, private_bytes, total;
};

inline int conv_threads(double flop, int threads) {
  return static_cast<int>(smaller(static_cast<double>(threads), larger(1.0, flop / kFlopPerThread)));
}

template <class P, class T>
ImplicitPlan plan_implicit(const ConvProduct<T>& g, int threads) {
  using Kind = Tile<P>;
  constexpr int64_t kElement = sizeof(typename Kind::B), step = Kind::step;
  constexpr GemmBlocking kBlocking = Kind::blocking;
  ImplicitPlan plan{};
  plan.threads = conv_threads(2.0 * static_cast<double>(g.groups * g.outputs) * static_cast<double>(g.positions) *
                                  static_cast<double>(larger<int64_t>(g.features, 1)),
                              threads);
  plan.rows = plan_rows<P>(g, plan.threads);
  const bool rows = g.positions_are_rows() || plan.rows.pixel > 0;
  const int64_t sw = rows ? Kind::nr : Kind::mr, pw = rows ? Kind::mr : Kind::nr;
  const int64_t k = plan.rows.pixel > 0 ? plan.rows.pixel * g.patches.tap_count : larger<int64_t>(g.features, 1);
  plan.kc = round_up(ceil_div(k, ceil_div(k, kBlocking.kc)), larger(16, Kind::k_align));
  plan.k_padded = round_up(k, plan.kc);
  const int64_t group_bytes = round_up(g.outputs, sw) * plan.k_padded / step * kElement;
  plan.packed = g.w_packed != nullptr;
  const int64_t at_once = plan.packed ? INT64_MAX : kConvWeightBytes;
  plan.groups_at_once = smaller(g.groups, larger<int64_t>(1, at_once / group_bytes));
  const int64_t most = larger<int64_t>(sw, at_once / (sw * plan.k_padded / step * kElement) * (plan.packed ? 1 : sw));
  plan.outputs_at_once = round_up(ceil_div(g.outputs, ceil_div(g.outputs, most)), sw);

  const int64_t wanted = plan.threads == 1 ? 1 : ceil_div(4 * plan.threads, plan.groups_at_once);
  const bool sums = plan.kc < k;
  const int64_t kc = sums ? kBlocking.kc : plan.kc;  // fewer features, so more positions, unless sums are kept
  const int64_t most_positions = larger(kStripBytes / (kc / step * kElement) / pw * pw, pw);
  plan.strip = smaller(most_positions, round_up(ceil_div(g.positions, wanted), pw));
  if (plan.groups_at_once == 1 && wanted > 1 && ceil_div(g.positions, plan.strip) >= plan.threads)
    plan.strip = pw * even_strip(ceil_div(g.positions, pw), plan.strip / pw, most_positions / pw, plan.threads);
  plan.strips = ceil_div(g.positions, plan.strip);
  if (plan.rows.taken)
    plan.strips = g.positions / (g.patches.grid[1] * g.patches.grid[2]) * plan.rows.row_blocks * plan.rows.col_blocks;

  // What is read from beyond L2: the weights for every strip, or packed positions, written and then read for each part.
  const int64_t all_positions = round_up(g.positions, pw) * plan.k_padded / step * kElement;
  const int64_t fewest = ceil_div(g.positions, most_positions), parts = ceil_div(2 * plan.threads, fewest);
  plan.together = g.groups == 1 && !plan.rows.taken && group_bytes > kKeptWeightBytes &&
                  fewest * group_bytes + (1 + parts) * all_positions < plan.strips * group_bytes;
  if (plan.together) {
    plan.strip = round_up(ceil_div(g.positions, fewest), pw);
    plan.strips = ceil_div(g.positions, plan.strip);
  }
  const int64_t jobs = plan.strips * plan.groups_at_once;
  plan.parts = 1;
  if (jobs < plan.threads || plan.together)
    plan.parts = larger<int64_t>(1, smaller(ceil_div(2 * plan.threads, jobs), ceil_div(plan.outputs_at_once, sw)));

  plan.w_panel = sw * plan.k_padded / step;
  plan.x_panel = pw * (plan.together ? plan.k_padded : plan.kc) / step;
  plan.sums_rs = (rows ? plan.outputs_at_once : plan.strip) + 16;
  const int64_t sum_rows = rows ? plan.strip : plan.outputs_at_once;
  plan.weight_bytes =
      aligned(plan.groups_at_once * round_up(plan.outputs_at_once, sw) * plan.k_padded / step * kElement);
  plan.positions_at = plan.packed ? 0 : plan.weight_bytes;
  plan.private_at = plan.positions_at + (plan.together ? aligned(all_positions) : 0);
  plan.panel_bytes = plan.together ? 0 : aligned(plan.strip * plan.kc / step * kElement);
  const int64_t sum_bytes = sums ? sum_rows * plan.sums_rs * static_cast<int64_t>(sizeof(Compute<T>)) : 0;
  plan.private_bytes = plan.rows.taken ? aligned(plan.rows.bytes) : plan.panel_bytes + aligned(sum_bytes);
  plan.total = plan.private_at + plan.private_bytes * static_cast<size_t>(plan.threads);
  return plan;
}

template <class T>
inline ConvProduct<T> of_group(const ConvProduct<T>& g, int64_t group) {
  ConvProduct<T> one = g;
  one.patches.x += group * g.x_group;
  if (one.patches.saved != nullptr) one.patches.saved += group * g.x_group;
  one.weights.w += group * g.w_group;
  const int64_t y_group = g.outputs * g.out.channel_stride;
  one.out.y += group * y_group;
  if (one.out.z != nullptr) one.out.z += group * y_group;
  if (one.out.residual != nullptr) one.out.residual += group * y_group;
  if (one.out.bias != nullptr) one.out.bias += group * g.outputs;
  return one;
}

// Positions [n0, n1) and outputs [o0, o1). w_panels are the packed weights of these outputs, x_panels what positions
// are packed into or, if they are packed together, all of them.
template <class P, class T>
void conv_strip(const ConvProduct<T>& g, const ImplicitPlan& plan, const void* w_panels, int64_t o0, int64_t o1,
                int64_t n0, int64_t n1, void* x_panels, Compute<T>* sums) {
  using Kind = Tile<P>;
  using A = typename Kind::A;
  using B = typename Kind::B;
  constexpr int mr = Kind::mr, nr = Kind::nr, step = Kind::step;
  const bool rows = g.positions_are_rows();
  for (int64_t kk = 0; kk == 0 || kk < g.features; kk += plan.kc) {
    const int64_t length = smaller(plan.kc, g.features - kk), k = ceil_div(length, step);
    const bool first = kk == 0, last = kk + length >= g.features;
    if (rows) {
      A* const x = static_cast<A*>(x_panels) + (plan.together ? n0 / mr * plan.x_panel + kk / step * mr : 0);
      const B* const w = static_cast<const B*>(w_panels) + kk / step * nr;
      if (!plan.together) pack_patches<A, T, mr>(g.patches, true, n0, n1 - n0, kk, length, x, plan.x_panel, nullptr);
      for_each_tile<P>(n1 - n0, o1 - o0, [&](int64_t n, int64_t o, int positions, int outputs) {
        // The first tiles of a panel of weights fetch the next panel, a cache line for each of their k.
        const B* const panel = w + o / nr * plan.w_panel;
        const int64_t lines = n / mr * k, line = 64 / static_cast<int64_t>(sizeof(B));
        const bool fetches = o + nr < o1 - o0 && lines * line < nr * k;
        const B* const ahead = fetches ? panel + plan.w_panel + lines * line : nullptr;
        conv_tile<P>(g, k, x + n / mr * plan.x_panel, panel, o0 + o, outputs, n0 + n, positions, first, last,
                     sums + n * plan.sums_rs + o, plan.sums_rs, ahead);
      });
    } else {
      B* const x = static_cast<B*>(x_panels) + (plan.together ? n0 / nr * plan.x_panel + kk / step * nr : 0);
      const A* const w = static_cast<const A*>(w_panels) + kk / step * mr;
      if (!plan.together) pack_patches<B, T, nr>(g.patches, true, n0, n1 - n0, kk, length, x, plan.x_panel, nullptr);
      for_each_tile<P>(o1 - o0, n1 - n0, [&](int64_t o, int64_t n, int outputs, int positions) {
        conv_tile<P>(g, k, w + o / mr * plan.w_panel, x + n / nr * plan.x_panel, o0 + o, outputs, n0 + n, positions,
                     first, last, sums + o * plan.sums_rs + n, plan.sums_rs);
      });
    }
  }
}

// All positions, a panel and a block of features at a time. Returns whether the member goes on.
template <class P, class T>
bool pack_positions_together(const ConvProduct<T>& g, const ImplicitPlan& plan, void* to, Crew& crew) {
  using Kind = Tile<P>;
  using A = typename Kind::A;
  using B = typename Kind::B;
  constexpr int mr = Kind::mr, nr = Kind::nr, step = Kind::step;
  const int64_t blocks = ceil_div(g.features, plan.kc), pw = g.positions_are_rows() ? mr : nr;
  return crew.share(ceil_div(g.positions, pw) * blocks, [&](int64_t unit) {
    const int64_t panel = unit / blocks, kk = unit % blocks * plan.kc, n = panel * pw;
    const int64_t lanes = smaller(pw, g.positions - n), length = smaller(plan.kc, g.features - kk);
    const int64_t at = panel * plan.x_panel + kk / step * pw;
    if (g.positions_are_rows())
      pack_patches<A, T, mr>(g.patches, true, n, lanes, kk, length, static_cast<A*>(to) + at, plan.x_panel, nullptr);
    else
      pack_patches<B, T, nr>(g.patches, true, n, lanes, kk, length, static_cast<B*>(to) + at, plan.x_panel, nullptr);
  });
}

// The weights of `groups` groups from g0 on, of `outputs` outputs from o0 on, as units of work: share(units, body).
template <class P, class T, class Share>
bool pack_conv_weights(const ConvProduct<T>& g, const ImplicitPlan& plan, int64_t g0, int64_t groups, int64_t o0,
                       int64_t outputs, void* to, Share&& share) {
  using Kind = Tile<P>;
  using A = typename Kind::A;
  using B = typename Kind::B;
  constexpr int mr = Kind::mr, nr = Kind::nr, step = Kind::step;
  const bool rows = g.positions_are_rows() || plan.rows.pixel > 0;
  const int sw = rows ? nr : mr;
  const int64_t panels = ceil_div(plan.outputs_at_once, sw);
  const int64_t unit_lanes = plan.rows.pixel > 0 ? sw : kWeightLanes / sw * sw, used = ceil_div(outputs, unit_lanes);
  const int64_t k_units = plan.rows.pixel > 0 ? 1 : ceil_div(g.features, plan.kc);
  return share(groups * used * k_units, [&](int64_t unit) {
    const int64_t group = unit / k_units / used, lane = unit / k_units % used * unit_lanes;
    const int64_t kk = unit % k_units * plan.kc;
    ConvWeights<T> weights = g.weights;
    weights.w += (g0 + group) * g.w_group;
    if (plan.rows.taken && !g.positions_are_rows()) weights.set_channels_inner();
    const int64_t lanes = smaller(unit_lanes, outputs - lane), length = smaller(plan.kc, g.features - kk);
    const int64_t at = (group * panels + lane / sw) * plan.w_panel + kk / step * sw;
#if defined(FASTOPS_HAS_AMX)
    if constexpr (same_type<P, bf16_amx>) {
      if (plan.rows.pixel > 0)
        return pack_tap_panel(weights, o0 + lane, static_cast<int>(lanes), plan.rows.pixel, static_cast<B*>(to) + at);
    }
#endif
    if (rows)
      pack_weights<B, T, nr>(weights, o0 + lane, lanes, kk, length, static_cast<B*>(to) + at, plan.w_panel);
    else
      pack_weights<A, T, mr>(weights, o0 + lane, lanes, kk, length, static_cast<A*>(to) + at, plan.w_panel);
  });
}

template <class P, class T>
void conv_member(const ConvProduct<T>& g, const ImplicitPlan& plan, unsigned char* workspace, Crew& crew) {
  using Kind = Tile<P>;
  using A = typename Kind::A;
  using B = typename Kind::B;
  using C = Compute<T>;
  const typename Kind::Session session;
  const void* const packed = plan.packed ? g.w_packed : workspace;
  unsigned char* const mine = workspace + plan.private_at + static_cast<size_t>(crew.thread) * plan.private_bytes;
  unsigned char* const x_panels = plan.together ? workspace + plan.positions_at : mine;
  C* const sums = reinterpret_cast<C*>(mine + plan.panel_bytes);
  const bool rows = g.positions_are_rows() || plan.rows.pixel > 0;
  const int sw = rows ? Kind::nr : Kind::mr;
  const int64_t panels = ceil_div(plan.outputs_at_once, sw);
  if (plan.together && !pack_positions_together<P>(g, plan, x_panels, crew)) return;

  for (int64_t g0 = 0; g0 < g.groups; g0 += plan.groups_at_once) {
    const int64_t groups = smaller(plan.groups_at_once, g.groups - g0);
    for (int64_t o0 = 0; o0 < g.outputs; o0 += plan.outputs_at_once) {
      const int64_t outputs = smaller(plan.outputs_at_once, g.outputs - o0);
      const auto share = [&](int64_t units, auto&& unit) { return crew.share(units, unit); };
      if (!plan.packed && !pack_conv_weights<P>(g, plan, g0, groups, o0, outputs, workspace, share)) return;

      const int64_t part = round_up(ceil_div(outputs, plan.parts), sw);
      const bool stays = crew.share(groups * plan.strips * plan.parts, [&](int64_t job) {
        const int64_t group = job / plan.parts / plan.strips, strip = job / plan.parts % plan.strips;
        const int64_t t0 = smaller(job % plan.parts * part, outputs), t1 = smaller(t0 + part, outputs);
        if (t0 == t1) return;
        const int64_t at = (group * panels + t0 / sw) * plan.w_panel, n0 = strip * plan.strip;
        const ConvProduct<T> one = of_group(g, g0 + group);
        const void* const w =
            rows ? static_cast<const void*>(static_cast<const B*>(packed) + at) : static_cast<const A*>(packed) + at;
        if (plan.rows.taken)
          conv_rows<P>(one, plan.rows, w, plan.w_panel, o0 + t0, o0 + t1, strip, mine);
        else
          conv_strip<P>(one, plan, w, o0 + t0, o0 + t1, n0, smaller(n0 + plan.strip, g.positions), x_panels, sums);
        if (g.out.stream) finish_streams();
      });
      if (!stays) return;
    }
  }
}

template <class P, class T>
void conv_product(const ConvProduct<T>& product, const ImplicitPlan& plan, void* workspace, const Team& team) {
  ConvProduct<T> g = product;
  const int64_t bytes_out = g.groups * g.outputs * g.positions * static_cast<int64_t>(sizeof(T));
  g.out.stream = g.out.dense && g.features <= smaller(kStreamK, plan.kc) && bytes_out >= kStreamBytes;
  unsigned char* const bytes = static_cast<unsigned char*>(workspace);
  parallel(team, plan.threads, [&](Crew& crew) { conv_member<P>(g, plan, bytes, crew); });
}

// ---------------------------------------------------------------------------------------------------------------------
// The products of the contract.

inline int64_t volume(const int64_t* size) { return size[0] * size[1] * size[2]; }

// The strides of a dense image of `channels` channels.
struct ImageStrides {
  int64_t batch, channel, position[3];
  ImageStrides(Layout layout, int64_t channels, const int64_t* size) {
    const int64_t inner = layout == Layout::channels_last ? channels : 1;
    batch = channels * volume(size);
    channel = layout == Layout::channels_last ? 1 : volume(size);
    position[2] = inner;
    position[1] = inner * size[2];
    position[0] = inner * size[2] * size[1];
  }
};

template <class T>
inline void set_plain(Patches<T>& s) {
  s.plain = s.tap_count == 1;
  for (int d = 0; d < 3; ++d)
    s.plain = s.plain && s.taps[d].offset == 0 && s.grid[d] == s.size[d] && (s.step[d] == 1 || s.size[d] == 1);
  if (!s.plain || s.channels_inner) return;
  s.size[2] = s.grid[2] = volume(s.grid);
  s.size[0] = s.size[1] = s.grid[0] = s.grid[1] = 1;
  s.step[2] = 1;
}

// The image x as Patches, for the forward pass and the weight gradient.
template <class T>
inline Patches<T> image_patches(const ConvGeometry& geometry, Layout layout, const void* x) {
  const ImageStrides strides(layout, geometry.in_channels, geometry.in);
  Patches<T> s{};
  s.x = static_cast<const T*>(x);
  s.channels_inner = layout == Layout::channels_last;
  s.channels = geometry.in_channels / geometry.groups;
  s.batch_stride = strides.batch;
  s.channel_stride = strides.channel;
  for (int d = 0; d < 3; ++d) {
    s.size[d] = geometry.in[d];
    s.stride[d] = strides.position[d];
    s.grid[d] = geometry.out[d];
    s.step[d] = geometry.stride[d];
    s.taps[d] = {geometry.kernel[d], -geometry.padding[d], geometry.dilation[d], 0, 1};
  }
  s.tap_count = volume(geometry.kernel);
  return s;
}

// grad_y with the derivative of the activation, as Patches with one tap at offset 0.
template <class T>
inline Patches<T> gradient_patches(const ConvGeometry& geometry, Layout layout, const void* grad_y,
                                   const Activation& activation, const void* saved) {
  const ImageStrides strides(layout, geometry.out_channels, geometry.out);
  Patches<T> s{};
  s.x = static_cast<const T*>(grad_y);
  if (activation.kind != ActivationKind::identity) {
    s.saved = static_cast<const T*>(saved);
    s.derivative = row_derivative<T>(activation.kind);
    s.activation = activation;
  }
  s.channels_inner = layout == Layout::channels_last;
  s.channels = geometry.out_channels / geometry.groups;
  s.batch_stride = strides.batch;
  s.channel_stride = strides.channel;
  for (int d = 0; d < 3; ++d) {
    s.size[d] = s.grid[d] = geometry.out[d];
    s.stride[d] = strides.position[d];
    s.step[d] = 1;
    s.taps[d] = {1, 0, 0, 0, 0};
  }
  s.tap_count = 1;
  return s;
}

template <class T>
inline ConvOutput<T> image_output(void* y, void* z, const void* bias, const Activation& activation,
                                  const ImageStrides& strides) {
  ConvOutput<T> out{};
  out.y = static_cast<T*>(y);
  out.z = static_cast<T*>(z);
  out.bias = static_cast<const T*>(bias);
  out.relu = product_rectifier<T>(activation, z);
  if (!out.relu && activation.kind != ActivationKind::identity) out.f = row_forward<T>(activation.kind);
  out.activation = activation;
  out.batch_stride = strides.batch;
  out.channel_stride = strides.channel;
  for (int d = 0; d < 3; ++d) out.stride[d] = strides.position[d];
  out.dense = true;
  return out;
}

// w as a matrix of lanes by features. Lanes are the output channels of a group, or the input channels if `transposed`.
template <class T>
inline ConvWeights<T> conv_weights(const ConvGeometry& geometry, Layout layout, Layout w_layout, const void* w,
                                   bool transposed) {
  const int64_t channels = geometry.in_channels / geometry.groups, taps = volume(geometry.kernel);
  const int64_t in_stride = w_layout == Layout::channels_last ? 1 : taps, out_stride = channels * taps;
  ConvWeights<T> s{};
  s.w = static_cast<const T*>(w);
  s.channels_inner = layout == Layout::channels_last;
  s.channels = transposed ? geometry.out_channels / geometry.groups : channels;
  s.lane_stride = transposed ? in_stride : out_stride;
  s.channel_stride = transposed ? out_stride : in_stride;
  s.tap_stride = w_layout == Layout::channels_last ? channels : 1;
  for (int d = 0; d < 3; ++d) {
    s.kernel[d] = geometry.kernel[d];
    s.taps[d] = {geometry.kernel[d], 0, 0, 0, 1};
  }
  s.tap_count = taps;
  if (taps == 1)
    s.feature_stride = s.channel_stride;
  else if (!transposed && (layout == w_layout || channels == 1))
    s.feature_stride = 1;
  return s;
}

template <class T>
inline ConvProduct<T> forward_product(const Bound<ConvForward>& args) {
  const ConvGeometry& geometry = args.geometry;
  ConvProduct<T> g{};
  g.groups = geometry.groups;
  g.outputs = geometry.out_channels / geometry.groups;
  g.patches = image_patches<T>(geometry, args.layout, args.x);
  set_plain(g.patches);
  g.features = g.patches.channels * g.patches.tap_count;
  g.image_positions = volume(geometry.out);
  g.positions = geometry.batch * g.image_positions;
  g.weights = conv_weights<T>(geometry, args.layout, args.w_layout, args.w, false);
  g.out = image_output<T>(args.y, args.z, args.bias, args.activation,
                          ImageStrides(args.layout, geometry.out_channels, geometry.out));
  g.x_group = g.patches.channels * g.patches.channel_stride;
  g.w_group = g.outputs * g.patches.channels * g.patches.tap_count;
  g.out.residual = static_cast<const T*>(args.residual);
  if (args.packed_w) g.w_packed = args.w;
  return g;
}

// The product for the phase of grad_x that starts at `phase`, phase[d] < stride[d]. Position j of the phase is the
// element q = phase + j stride. Tap r reads grad_y at (q + padding - r dilation) / stride, if that is an integer.
template <class T>
inline ConvProduct<T> input_product(const Bound<ConvBackwardInput>& args, const int64_t* phase) {
  const ConvGeometry& geometry = args.geometry;
  ConvProduct<T> g{};
  g.groups = geometry.groups;
  g.outputs = geometry.in_channels / geometry.groups;
  g.patches = gradient_patches<T>(geometry, args.layout, args.grad_y, args.activation, args.saved);
  g.weights = conv_weights<T>(geometry, args.layout, args.w_layout, args.w, true);
  g.out = image_output<T>(args.grad_x, args.z, args.bias, args.epilogue,
                          ImageStrides(args.layout, geometry.in_channels, geometry.in));
  int64_t start = 0;
  for (int d = 0; d < 3; ++d) {
    const int64_t stride = geometry.stride[d], dilation = geometry.dilation[d], kernel = geometry.kernel[d];
    const int64_t period = stride / greatest_common_divisor(stride, dilation);
    const int64_t at = phase[d] + geometry.padding[d];
    int64_t first = 0;
    while (first < smaller(period, kernel) && (at - first * dilation) % stride != 0) ++first;
    const bool any = first < kernel && first < period;
    const TapRange taps = {any ? (kernel - first + period - 1) / period : 0, any ? (at - first * dilation) / stride : 0,
                           -(period * dilation / stride), first, period};
    g.patches.taps[d] = g.weights.taps[d] = taps;
    g.patches.grid[d] = ceil_div(geometry.in[d] - phase[d], stride);
    start += phase[d] * g.out.stride[d];
    if (stride > 1 && geometry.in[d] > 1) {
      g.out.stride[d] *= stride;
      g.out.dense = false;
    }
  }
  const auto& taps = g.patches.taps;
  g.patches.tap_count = g.weights.tap_count = taps[0].count * taps[1].count * taps[2].count;
  g.out.y += start;
  if (g.out.z != nullptr) g.out.z += start;
  if (g.out.dense) set_plain(g.patches);
  g.features = g.patches.channels * g.patches.tap_count;
  g.image_positions = volume(g.patches.grid);
  g.positions = geometry.batch * g.image_positions;
  g.x_group = g.patches.channels * g.patches.channel_stride;
  g.w_group = g.patches.channels * g.outputs * volume(geometry.kernel);
  return g;
}

// body(product) for every phase that has elements.
template <class T, class Body>
inline void for_phases(const Bound<ConvBackwardInput>& args, Body&& body) {
  const ConvGeometry& geometry = args.geometry;
  int64_t phases[3], phase[3];
  for (int d = 0; d < 3; ++d) phases[d] = smaller(geometry.stride[d], geometry.in[d]);
  for (phase[0] = 0; phase[0] < phases[0]; ++phase[0])
    for (phase[1] = 0; phase[1] < phases[1]; ++phase[1])
      for (phase[2] = 0; phase[2] < phases[2]; ++phase[2]) body(input_product<T>(args, phase));
}

// The number of multiply-adds, for the choice of panels.
inline int64_t conv_work(const ConvGeometry& geometry) {
  return geometry.batch * volume(geometry.out) * geometry.out_channels * (geometry.in_channels / geometry.groups) *
         volume(geometry.kernel);
}

// The name of this product; conv_gemm and conv_gemm_bf16 where nothing else is said.
template <class P>
constexpr KernelName conv_product_name(const char* algorithm = "conv_gemm", const char* bf16 = "conv_gemm_bf16") {
  return tile_name<P>(algorithm, bf16);
}

template <class T>
void plan_implicit_gemm(Plan<ConvForward>& plan, const Bound<ConvForward>& args) {
  with_panel<T>(args.bf16_multiply, conv_work(args.geometry), [&](auto panel) {
    using P = decltype(panel);
    const ImplicitPlan product = plan_implicit<P>(forward_product<T>(args), plan.target.threads);
    decide(plan, conv_product_name<P>(), product.total, product,
           [](auto& args, auto& product, auto* workspace, auto& team) {
             conv_product<P>(forward_product<T>(args), product, workspace, team);
           });
    if (!product.packed) return;
    plan.packed = product.weight_bytes;
    plan.packer = [](const Plan<ConvForward>& plan, const void* w, void* to) {
      const ConvProduct<T> g = forward_product<T>(bind(plan, {.x = w, .w = w, .y = to}));
      const ImplicitPlan& product = *reinterpret_cast<const ImplicitPlan*>(plan.decisions);
      pack_conv_weights<P>(g, product, 0, g.groups, 0, g.outputs, to, [](int64_t units, auto&& unit) {
        for (int64_t i = 0; i < units; ++i) unit(i);
        return true;
      });
    };
  });
}

// With a stride of one there is one phase. The products of several are planned one after the other, when they run.
template <class T>
void plan_implicit_gemm(Plan<ConvBackwardInput>& plan, const Bound<ConvBackwardInput>& args) {
  with_panel<T>(args.bf16_multiply, conv_work(args.geometry), [&](auto panel) {
    using P = decltype(panel);
    size_t bytes = 0;
    ImplicitPlan last;
    int phases = 0;
    for_phases<T>(args, [&](const ConvProduct<T>& g) {
      last = plan_implicit<P>(g, plan.target.threads);
      bytes = larger(bytes, last.total);
      ++phases;
    });
    if (phases == 1)
      return decide(plan, conv_product_name<P>(), bytes, last,
                    [](auto& args, auto& product, auto* workspace, auto& team) {
                      constexpr int64_t first[3] = {};
                      conv_product<P>(input_product<T>(args, first), product, workspace, team);
                    });
    decide(plan, conv_product_name<P>(), bytes, [](auto& args, auto* workspace, auto& team) {
      for_phases<T>(args, [&](const ConvProduct<T>& g) {
        conv_product<P>(g, plan_implicit<P>(g, args.threads), workspace, team);
      });
    });
  });
}
