// Convolution of few input channels, channels_first: the first layer of a network. Sums over a hundred taps or fewer
// are too short to pay for gathering patches. Inputs are read from padded copies of the planes (planes.inl), and a
// vector of neighbouring positions is multiplied by the weights of several output channels.
//
// kFirstChannels output channels x kFirstVectors vectors of positions stay in registers over all taps. Forward only:
// the gradient of the weights is a long sum, for which gathering patches pays (7x7, stride 2, 3 -> 64 channels: 11 ms,
// and 17 ms from padded copies; Granite Rapids, one thread).
#pragma once

#include "../../common/cpu/common.inl"
#include "depthwise_correlate.inl"
#include "planes.inl"

constexpr int64_t kFirstInputs = 4;  // the most input channels
#if defined(FASTOPS_32_REGISTERS)
constexpr int kFirstChannels = 8;
#else
constexpr int kFirstChannels = 4;
#endif
constexpr int kFirstVectors = 3;

// The largest copy of a band in bytes. It stays in L2, and the rows that one output row reads stay in L1.
constexpr int64_t kFirstBandBytes = 128 * 1024;

struct FirstPlan {
  PaddedRow row;
  int64_t taps, blocks;  // blocks of output channels
  int64_t band, bands, plane, units;
  int threads;
  int64_t panel_at, bias_at, offset_at, per_thread, total;  // bytes
};

template <class C>
FirstPlan plan_first(const ConvGeometry& g, int threads) {
  constexpr int64_t kC = sizeof(C);
  FirstPlan plan{};
  const int64_t reach_h = g.dilation[1] * (g.kernel[1] - 1) + 1, reach_w = g.dilation[2] * (g.kernel[2] - 1) + 1;
  plan.row = padded_row<C>(g.in[2], g.padding[2], (g.out[2] - 1) * g.stride[2] + reach_w, g.stride[2]);
  plan.taps = g.in_channels * g.kernel[1] * g.kernel[2];
  plan.blocks = ceil_div(g.out_channels, kFirstChannels);
  const int64_t fit = kFirstBandBytes / (g.in_channels * plan.row.elements() * kC);
  plan.band = smaller(larger<int64_t>((fit - reach_h) / g.stride[1] + 1, 4), g.out[1]);
  plan.bands = ceil_div(g.out[1], plan.band);
  plan.band = ceil_div(g.out[1], plan.bands);
  plan.bands = ceil_div(g.out[1], plan.band);
  plan.plane = ((plan.band - 1) * g.stride[1] + reach_h) * plan.row.elements();
  plan.units = g.batch * plan.bands;
  const double work =
      2.0 * static_cast<double>(g.batch * g.out[1] * g.out[2]) * static_cast<double>(g.out_channels * plan.taps);
  const int64_t most = smaller<int64_t>(threads, plan.units);
  plan.threads =
      static_cast<int>(larger(1.0, smaller(static_cast<double>(most), work / static_cast<double>(kFlopPerThread))));
  plan.panel_at = round_up(g.in_channels * plan.plane * kC, 64);
  plan.bias_at = plan.panel_at + round_up(plan.blocks * plan.taps * kFirstChannels * kC, 64);
  plan.offset_at = plan.bias_at + round_up(plan.blocks * kFirstChannels * kC, 64);
  plan.per_thread = plan.offset_at + round_up(plan.taps * 8, 64);
  plan.total = plan.per_thread * plan.threads;
  return plan;
}

// Whether there are few input channels, and enough positions to fill a vector.
inline bool is_first_layer(Layout layout, const ConvGeometry& g, int64_t lanes) {
  return layout == Layout::channels_first && is_flat(g) && g.groups == 1 && g.out_channels > 0 && g.in_channels >= 1 &&
         g.in_channels <= kFirstInputs && 2 * g.out[2] >= lanes;
}

// The offsets of the taps (channel, row, column) in the copy.
inline void first_offsets(const ConvGeometry& g, const FirstPlan& plan, int64_t* offsets) {
  for (int64_t c = 0; c < g.in_channels; ++c)
    for (int64_t rh = 0; rh < g.kernel[1]; ++rh)
      for (int64_t rw = 0; rw < g.kernel[2]; ++rw)
        *offsets++ = c * plan.plane + rh * g.dilation[1] * plan.row.elements() + plan.row.at(rw * g.dilation[2]);
}

// The index in w of tap t = (channel, row, column) of a filter.
inline int64_t first_tap(const ConvGeometry& g, Layout w_layout, int64_t t) {
  const int64_t window = g.kernel[1] * g.kernel[2];
  return w_layout == Layout::channels_last ? t % window * g.in_channels + t / window : t;
}

template <class T>
void copy_first_rows(const ConvGeometry& g, const FirstPlan& plan, const void* x, int64_t b, int64_t p0, int64_t p1,
                     Compute<T>* to) {
  const int64_t plane = g.in[1] * g.in[2];
  const int64_t rows = (p1 - p0 - 1) * g.stride[1] + g.dilation[1] * (g.kernel[1] - 1) + 1;
  for (int64_t c = 0; c < g.in_channels; ++c) {
    const Plane<T> from = {static_cast<const T*>(x) + (b * g.in_channels + c) * plane, g.in[2], nullptr, nullptr, {}};
    copy_rows(from, g.in[1], p0 * g.stride[1] - g.padding[1], rows, plan.bands == 1, plan.row, to + c * plan.plane);
  }
}

template <int V, class C>
inline void first_tile(const C* in, const int64_t* offsets, int64_t taps, const C* panel, const C* bias,
                       const PlaneOutput<C>& out, int64_t at, int channels, int count) {
  using Lanes = Vec<C>;
  constexpr int S = Lanes::size, K = kFirstChannels;
  Lanes acc[K][V];
#pragma GCC unroll 8
  for (int k = 0; k < K; ++k)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) acc[k][v] = Lanes::set1(bias[k]);
  for (int64_t t = 0; t < taps; ++t, panel += K) {
    const C* const x = in + offsets[t];
    Lanes row[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) row[v] = in_register(Lanes::load(x + v * S));
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k) {
      const Lanes w = Lanes::set1(panel[k]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[k][v] = fma(row[v], w, acc[k][v]);
    }
  }
  if (out.relu) {
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[k][v] = rectified(acc[k][v], out.relu);
  }
  if (out.finish == nullptr) {
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k) {
      if (k >= channels) break;
      C* const y = out.y + at + k * out.rs;
#pragma GCC unroll 4
      for (int v = 0; v + 1 < V; ++v) acc[k][v].store(y + v * S);
      if (count == V * S)
        acc[k][V - 1].store(y + (V - 1) * S);
      else
        acc[k][V - 1].store(y + (V - 1) * S, count - (V - 1) * S);
    }
    return;
  }
  alignas(64) C sums[K * V * S];
#pragma GCC unroll 8
  for (int k = 0; k < K; ++k)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) acc[k][v].store(sums + (k * V + v) * S);
  for (int k = 0; k < channels; ++k) out.finish(out, sums + k * V * S, at + k * out.rs, count);
}

// With several input channels, AMX tiles are faster for bfloat16 (3 -> 64 channels, 7x7: 11.6 ms, here 12.7; Granite
// Rapids, one thread).
template <class T>
bool conv_first_takes(const Bound<ConvForward>& args) {
#if defined(FASTOPS_HAS_AMX)
  const bool tiles = same_type<T, bf16_t> && args.bf16_multiply != Bf16Multiply::float32;
  if (tiles && (args.geometry.in_channels > 1 || args.bf16_multiply == Bf16Multiply::native)) return false;
#endif
  return is_first_layer(args.layout, args.geometry, Vec<Compute<T>>::size);
}
template <class T>
KernelName conv_first_name() {
  return {"conv_first", {kFirstChannels, kFirstVectors * Vec<Compute<T>>::size}};
}

template <class T>
void conv_first(const Bound<ConvForward>& args, const FirstPlan& plan, void* workspace, const Team& team) {
  using C = Compute<T>;
  constexpr int64_t S = Vec<C>::size, K = kFirstChannels;
  const ConvGeometry& g = args.geometry;
  const int64_t plane = g.out[1] * g.out[2];
  const PlaneOutput<C> out = plane_output<T>(args.y, args.z, plane, args.activation);
  parallel(team, plan.threads, [&](Crew& crew) {
    unsigned char* const mine = static_cast<unsigned char*>(workspace) + crew.thread * plan.per_thread;
    C* const copy = reinterpret_cast<C*>(mine);
    C* const panels = reinterpret_cast<C*>(mine + plan.panel_at);
    C* const bias = reinterpret_cast<C*>(mine + plan.bias_at);
    int64_t* const offsets = reinterpret_cast<int64_t*>(mine + plan.offset_at);
    __builtin_memset(copy, 0, static_cast<size_t>(plan.panel_at));
    first_offsets(g, plan, offsets);
    for (int64_t k = 0; k < plan.blocks * K; ++k) {
      const bool real = k < g.out_channels;
      const T* const w = static_cast<const T*>(args.w) + k * plan.taps;
      C* const to = panels + k / K * plan.taps * K + k % K;
      for (int64_t t = 0; t < plan.taps; ++t) to[t * K] = real ? widen_one(w + first_tap(g, args.w_layout, t)) : 0;
      bias[k] = real && args.bias != nullptr ? widen_one(static_cast<const T*>(args.bias) + k) : 0;
    }
    crew.each(plan.units, [&](int64_t unit) {
      const int64_t b = unit / plan.bands, p0 = unit % plan.bands * plan.band, p1 = smaller(p0 + plan.band, g.out[1]);
      copy_first_rows<T>(g, plan, args.x, b, p0, p1, copy);
      for (int64_t p = p0; p < p1; ++p)
        for (int64_t block = 0; block < plan.blocks; ++block) {
          const C* const in = copy + (p - p0) * g.stride[1] * plan.row.elements();
          const C* const panel = panels + block * plan.taps * K;
          const int64_t at = (b * g.out_channels + block * K) * plane + p * g.out[2];
          const int channels = static_cast<int>(smaller(K, g.out_channels - block * K));
          for (int64_t j = 0; j < g.out[2];) {
            const int64_t left = ceil_div(g.out[2] - j, S);
            const int64_t vectors = left == 1 ? 1 : left == 2 || left == 4 ? 2 : 3;
            const int count = static_cast<int>(smaller(vectors * S, g.out[2] - j));
            const auto tile = [&](auto v) {
              first_tile<decltype(v)::value>(in + j, offsets, plan.taps, panel, bias + block * K, out, at + j, channels,
                                             count);
            };
            if (vectors == 1)
              tile(Number<1>{});
            else if (vectors == 2)
              tile(Number<2>{});
            else
              tile(Number<kFirstVectors>{});
            j += vectors * S;
          }
        }
    });
  });
}
