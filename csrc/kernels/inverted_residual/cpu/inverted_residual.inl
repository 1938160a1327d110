// Inverted residual blocks, a band of output rows at a time. The contract is
// csrc/kernels/inverted_residual/inverted_residual.h.
//
// A band is so many output rows that the products have some tiles of rows. For each band, the rows of e that it reads
// are computed unless the band before has left them, then the rows of d, then those of y. Rows of e are in a ring.
#pragma once

#include "../../common/cpu/common.inl"
#include "../../conv/cpu/depthwise_last.inl"
#include "../../gemm/cpu/gemm.inl"

// The least number of positions of a band: three and a half tiles of rows with AVX-512. Other numbers were not
// measured.
constexpr int64_t kBandPositions = 42;
// The most bytes of e and d that a thread holds: half of an L2 of 1 MB.
constexpr int64_t kRingBytes = 512 * 1024;

struct InvertedPlan {
  int64_t band;          // output rows
  int64_t step, slots;   // rows of e that are computed together; of the ring, a multiple of step
  int64_t parts, units;  // of an image, each some bands; of the batch
  int64_t vectors, pitch;
  int threads;
  int64_t expand_at, expand_bias_at, depthwise_at, depthwise_bias_at, project_at, project_bias_at, packed;  // elements
  int64_t d_at, jobs_at, taps_at, per_thread;                                                               // bytes
};

inline int64_t bands_of(const Bound<InvertedResidualForward>& args, const InvertedPlan& plan) {
  return ceil_div(args.out[0], plan.band);
}

template <class T>
InvertedPlan plan_inverted(const Bound<InvertedResidualForward>& args, int threads) {
  constexpr int64_t S = Vec<T>::size, nr = Tile<T>::nr, kT = sizeof(T);
  InvertedPlan plan{};
  const double taps = static_cast<double>((args.with_expand ? args.in_channels * args.in[0] * args.in[1] : 0) +
                                          (args.with_project ? args.out_channels * args.out[0] * args.out[1] : 0) +
                                          args.kernel[0] * args.kernel[1] * args.out[0] * args.out[1]);
  const double flop = 2.0 * taps * static_cast<double>(args.batch * args.wide_channels);
  const double useful = smaller(static_cast<double>(threads), larger(1.0, flop / kFlopPerThread));

  plan.band = smaller(ceil_div(kBandPositions, args.out[1]), args.out[0]);
  if (2 * plan.band > args.out[0]) plan.band = args.out[0];
  // Where there are fewer images than threads, all of these get a band, whose first rows of e its neighbour computes,
  // too. 160 -> 960 -> 160 of one image of 7x7, two threads, AMD Zen 1: 950 us without it, 710 with it.
  plan.band =
      smaller(plan.band, ceil_div(args.out[0], ceil_div(static_cast<int64_t>(useful), larger<int64_t>(args.batch, 1))));
  const int64_t reach = args.dilation[0] * (args.kernel[0] - 1) + 1;
  plan.step = plan.band * args.stride[0];
  plan.slots =
      smaller(round_up(2 * plan.step - args.stride[0] + reach - 1, plan.step), round_up(args.in[0], plan.step));

  const int64_t bands = bands_of(args, plan);
  plan.parts = args.batch % threads == 0 ? 1 : ceil_div(args.batch == 1 ? threads : 2 * threads, args.batch);
  plan.parts = smaller(plan.parts, bands);
  plan.units = args.batch * plan.parts;
  plan.threads = static_cast<int>(smaller(useful, static_cast<double>(plan.units)));

  int64_t at = 0;
  const auto take = [&at](int64_t& place, int64_t elements) {
    place = at;
    at += round_up(elements, 64 / kT);
  };
  const int64_t window = args.kernel[0] * args.kernel[1];
  plan.vectors = round_up(ceil_div(args.wide_channels, S), kLastVectors);
  plan.pitch = window * S;
  take(plan.expand_at, args.with_expand ? round_up(args.wide_channels, nr) * args.in_channels : 0);
  take(plan.expand_bias_at, args.with_expand ? args.wide_channels : 0);
  take(plan.depthwise_at, plan.vectors * plan.pitch);
  take(plan.depthwise_bias_at, plan.vectors * S);
  take(plan.project_at, args.with_project ? round_up(args.out_channels, nr) * args.wide_channels : 0);
  take(plan.project_bias_at, args.with_project ? args.out_channels : 0);
  plan.packed = at;

  const int64_t e_row = args.with_expand ? args.in[1] * args.wide_channels * kT : 0;
  const int64_t d_row = args.with_project ? args.out[1] * args.wide_channels * kT : 0;
  plan.d_at = round_up(plan.slots * e_row, 64);
  plan.jobs_at = plan.d_at + round_up(plan.band * d_row, 64);
  plan.taps_at = plan.jobs_at + round_up(plan.band * static_cast<int64_t>(sizeof(LastJob<T>)), 64);
  plan.per_thread = plan.taps_at + round_up(plan.band * window * static_cast<int64_t>(sizeof(LastTap<T>)), 64);
  return plan;
}

template <class T>
void pack_inverted(const InvertedResidualForward& call, const InvertedPlan& plan, const void* from, void* packed) {
  constexpr int64_t S = Vec<T>::size;
  constexpr int nr = Tile<T>::nr;
  const auto& weights = *static_cast<const InvertedResidualForward::Weights*>(from);
  T* const to = static_cast<T*>(packed);
  for (int64_t i = 0; i < plan.packed; ++i) to[i] = 0;
  const auto matrix = [&](const void* w, int64_t n, int64_t k, T* place) {
    pack<T, T, nr>(plain_source(static_cast<const T*>(w), k, 1), 0, n, 0, k, place, nr * k, nullptr);
  };
  const auto bias = [](const void* values, int64_t n, T* place) {
    for (int64_t i = 0; values != nullptr && i < n; ++i) place[i] = static_cast<const T*>(values)[i];
  };
  if (call.with_expand) {
    matrix(weights.expand, call.wide_channels, call.in_channels, to + plan.expand_at);
    bias(weights.expand_bias, call.wide_channels, to + plan.expand_bias_at);
  }
  const int64_t window = call.kernel[0] * call.kernel[1];
  for (int64_t c = 0; c < call.wide_channels; ++c)
    for (int64_t t = 0; t < window; ++t)
      to[plan.depthwise_at + c / S * plan.pitch + t * S + c % S] =
          static_cast<const T*>(weights.depthwise)[c * window + t];
  bias(weights.depthwise_bias, call.wide_channels, to + plan.depthwise_bias_at);
  if (call.with_project) {
    matrix(weights.project, call.out_channels, call.wide_channels, to + plan.project_at);
    bias(weights.project_bias, call.out_channels, to + plan.project_bias_at);
  }
}

template <class T>
inline Output<T> block_output(const Activation& activation, int64_t channels, const T* bias) {
  const Rectifier relu = product_rectifier<T>(activation, nullptr);
  Output<T> out{nullptr, channels, nullptr, bias, relu, nullptr, activation};
  if (!relu && activation.kind != ActivationKind::identity) out.f = row_forward<T>(activation.kind);
  return out;
}

// out = f(x w + bias + residual) for m rows of x, k apart, on one thread. w is packed.
template <class T>
void multiply_rows(const T* x, int64_t m, int64_t n, int64_t k, const T* w, const Output<T>& out) {
  constexpr int mr = Tile<T>::mr, nr = Tile<T>::nr;
  const int64_t block = round_up(ceil_div(k, ceil_div(k, Tile<T>::blocking.kc)), 16);
  for (int64_t p = 0; p < k; p += block) {
    const PanelView<T> a = direct_view<T>(plain_source(x, k, 1), 0, p, mr);
    const PanelView<T> b = packed_view<T>(w + p * nr, nr * k, nr);
    multiply_block<T, T>(out, a, b, 0, m, 0, n, smaller(block, k - p), p == 0, p + block >= k, {nullptr, 0, 0, 0});
  }
}

// What a thread keeps from band to band.
template <class T>
struct BlockState {
  const Bound<InvertedResidualForward>& args;
  const InvertedPlan& plan;
  T *ring, *d;
  LastJob<T>* jobs;
  LastTap<T>* taps;
  const T* x;            // the image
  int64_t first, ready;  // rows [first, ready) of e were computed, and the last `slots` of them are in the ring

  const T* packed(int64_t at) const { return static_cast<const T*>(args.packed) + at; }
  T* slot(int64_t row) const { return ring + (row - first) % plan.slots * args.in[1] * args.wide_channels; }
};

template <class T>
void expand_until(BlockState<T>& state, int64_t end) {
  const auto& args = state.args;
  for (; state.ready < end; state.ready += state.plan.step) {
    const int64_t rows = smaller(state.plan.step, args.in[0] - state.ready);
    Output<T> out = block_output<T>(args.expand, args.wide_channels, state.packed(state.plan.expand_bias_at));
    out.y = state.slot(state.ready);
    multiply_rows(state.x + state.ready * args.in[1] * args.in_channels, rows * args.in[1], args.wide_channels,
                  args.in_channels, state.packed(state.plan.expand_at), out);
  }
}

// Rows [p0, p1) of d.
template <class T>
void depthwise_rows(BlockState<T>& state, int64_t p0, int64_t p1, T* d) {
  constexpr int64_t S = Vec<T>::size;
  const auto& args = state.args;
  const InvertedPlan& plan = state.plan;
  const int64_t channels = args.wide_channels, kw = args.kernel[1];
  const bool together = has_row(kw, args.stride[1], args.dilation[1]);
  LastTap<T>* next = state.taps;
  for (int64_t p = p0; p < p1; ++p) {
    LastTap<T>* const begin = next;
    for (int64_t rh = 0; rh < args.kernel[0]; ++rh) {
      const int64_t row = p * args.stride[0] - args.padding[0] + rh * args.dilation[0];
      if (row < 0 || row >= args.in[0]) continue;
      const T* const from = args.with_expand ? state.slot(row) : state.x + row * args.in[1] * channels;
      for (int64_t rw = 0; rw < (together ? 1 : kw); ++rw)
        *next++ = {from, rw * args.dilation[1], state.packed(plan.depthwise_at + (rh * kw + rw) * S)};
    }
    state.jobs[p - p0] = {begin, static_cast<int>(next - begin), (p - p0) * args.out[1] * channels};
  }
  const LastRow at = {-args.padding[1], args.stride[1], args.in[1], channels, plan.pitch};
  const PlaneOutput<T> out = plane_output<T>(d, nullptr, 0, args.depthwise);
  const LastOutput<T> to = last_output<T, T>(out, channels, state.packed(plan.depthwise_bias_at));
  with_row(kw, args.stride[1], args.dilation[1], [&](auto width, auto step) {
    correlate_last<decltype(width)::value, decltype(step)::value>(state.jobs, p1 - p0, at, args.out[1], to);
  });
}

template <class T>
void inverted_residual(const Bound<InvertedResidualForward>& args, const InvertedPlan& plan, void* workspace,
                       const Team& team) {
  const int64_t bands = bands_of(args, plan), positions = args.out[0] * args.out[1];
  const int64_t reach = args.dilation[0] * (args.kernel[0] - 1) + 1;
  parallel(team, plan.threads, [&](Crew& crew) {
    unsigned char* const mine = static_cast<unsigned char*>(workspace) + crew.thread * plan.per_thread;
    BlockState<T> state{args,
                        plan,
                        reinterpret_cast<T*>(mine),
                        reinterpret_cast<T*>(mine + plan.d_at),
                        reinterpret_cast<LastJob<T>*>(mine + plan.jobs_at),
                        reinterpret_cast<LastTap<T>*>(mine + plan.taps_at),
                        nullptr,
                        0,
                        0};
    crew.share(plan.units, [&](int64_t unit) {
      const int64_t b = unit / plan.parts, part = unit % plan.parts;
      const int64_t begin = bands * part / plan.parts * plan.band;
      const int64_t end = smaller(bands * (part + 1) / plan.parts * plan.band, args.out[0]);
      state.x = static_cast<const T*>(args.x) + b * args.in[0] * args.in[1] * args.in_channels;
      state.first = state.ready = smaller(larger<int64_t>(begin * args.stride[0] - args.padding[0], 0), args.in[0]);
      for (int64_t p0 = begin; p0 < end; p0 += plan.band) {
        const int64_t p1 = smaller(p0 + plan.band, end);
        if (args.with_expand)
          expand_until(state, smaller((p1 - 1) * args.stride[0] - args.padding[0] + reach, args.in[0]));
        const int64_t at = (b * positions + p0 * args.out[1]) * args.out_channels;
        T* const y = static_cast<T*>(args.y) + at;
        depthwise_rows(state, p0, p1, args.with_project ? state.d : y);
        if (!args.with_project) continue;
        Output<T> out = block_output<T>(args.project, args.out_channels, state.packed(plan.project_bias_at));
        out.y = y;
        if (args.residual != nullptr) out.residual = static_cast<const T*>(args.residual) + at;
        multiply_rows(state.d, (p1 - p0) * args.out[1], args.out_channels, args.wide_channels,
                      state.packed(plan.project_at), out);
      }
    });
  });
}

template <class T>
void plan_block(Plan<InvertedResidualForward>& plan, const Bound<InvertedResidualForward>& args) {
  const InvertedPlan block = plan_inverted<T>(args, plan.target.threads);
  if (block.jobs_at > kRingBytes) return;
  decide(
      plan, {"inverted_residual"}, static_cast<size_t>(block.threads * block.per_thread), block,
      [](auto& args, auto& block, auto* workspace, auto& team) { inverted_residual<T>(args, block, workspace, team); });
  plan.packed = static_cast<size_t>(block.packed) * sizeof(T);
  plan.packer = [](const Plan<InvertedResidualForward>& plan, const void* w, void* to) {
    pack_inverted<T>(plan.call, *reinterpret_cast<const InvertedPlan*>(plan.decisions), w, to);
  };
}

void plan_call(Plan<InvertedResidualForward>& plan) {
  const InvertedResidualForward& call = plan.call;
  void* const p = planned_address(64);
  const auto args = bind(plan, {p, p, p, call.with_residual ? p : nullptr});
  with_dtype(call.dtype, [&](auto type) {
    if constexpr (same_type<decltype(type), float>) plan_block<float>(plan, args);
  });
}
