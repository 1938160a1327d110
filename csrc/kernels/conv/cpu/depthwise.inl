// Depthwise convolution of channels_first planes: every input channel has its own out_channels / in_channels filters.
// One or two dimensions, any kernel, stride, padding and dilation.
//
// A band of rows of one plane is copied with its padding (planes.inl). The copy fits in L1 and is correlated with
// the filters. Vectors run along a row, and a loaded row is used for all output rows of a block that read it. The
// gradient of the input is the same correlation of planes of grad_y, where every residue of the position modulo the
// stride has its own taps. The gradient of the weights keeps one vector of sums per tap.
#pragma once

#include "../../common/cpu/common.inl"
#include "depthwise_correlate.inl"
#include "planes.inl"

constexpr KernelName kDepthwiseName = {"depthwise"};

inline bool is_depthwise(const ConvGeometry& g) { return g.groups > 1 && g.groups == g.in_channels && is_flat(g); }

// The name for the weight gradient with a single input channel, whose filters are applied to one plane as well.
constexpr KernelName kPlanesName = {"conv_planes"};

// The largest copy of a band. Measured on Granite Rapids (48 KB L1d).
constexpr int64_t kBandBytes = 32 * 1024;
// If an output is a sum over several planes, their bands together may be this many times as large. They are read once,
// from L2.
constexpr int64_t kPlanesInL2 = 16;

// The filters of an input channel whose gradients are computed at the same time.
constexpr int64_t kFilterBlock = 8;

struct DepthwisePlan {
  PaddedRow row;        // of the copy
  int64_t band;         // output rows per band
  int64_t copy_rows;    // rows of the copy that a band reads
  int64_t plane;        // elements between the copies of several planes
  int64_t phase_pitch;  // for the input gradient: elements of a row of one residue
  int threads;
  int64_t copy_at, tap_at, extra_at, per_thread;  // bytes

  int64_t total() const { return per_thread * threads; }
};

inline int depthwise_threads(const ConvGeometry& g, int64_t units, int threads) {
  const double work = static_cast<double>(g.batch * g.out_channels) * static_cast<double>(g.out[1] * g.out[2]) *
                      static_cast<double>(g.kernel[1] * g.kernel[2]) * 2;
  const double most = smaller(static_cast<double>(threads), static_cast<double>(units));
  return static_cast<int>(larger(1.0, smaller(most, work / static_cast<double>(kFlopPerThread) * 4)));
}

// Lays out a thread's memory: the copies of `planes` bands, the taps, their weights or sums, and `extra_elements`.
template <class C>
inline void place_depthwise(DepthwisePlan& plan, int64_t planes, int64_t taps, int64_t weight_elements,
                            int64_t extra_elements) {
  constexpr int64_t kC = sizeof(C);
  plan.plane = plan.copy_rows * plan.row.elements();
  plan.copy_at = 0;
  plan.tap_at = round_up(planes * plan.plane * kC, 64);
  plan.extra_at = plan.tap_at + round_up(taps * 8, 64) + round_up(weight_elements * kC, 64);
  plan.per_thread = plan.extra_at + round_up(extra_elements * kC, 64);
}

template <class C>
DepthwisePlan plan_depthwise_forward(const ConvGeometry& g, int threads, bool weights) {
  constexpr int64_t S = Vec<C>::size;
  DepthwisePlan plan{};
  const int64_t reach_h = g.dilation[1] * (g.kernel[1] - 1) + 1, reach_w = g.dilation[2] * (g.kernel[2] - 1) + 1;
  plan.row = padded_row<C>(g.in[2], g.padding[2], (g.out[2] - 1) * g.stride[2] + reach_w, g.stride[2]);
  const int64_t rows = kBandBytes / (plan.row.elements() * static_cast<int64_t>(sizeof(C)));
  plan.band = larger<int64_t>((rows - reach_h) / g.stride[1] + 1, kPlaneRows);
  plan.band = smaller(round_up(plan.band - kPlaneRows + 1, kPlaneRows), g.out[1]);
  plan.copy_rows = (plan.band - 1) * g.stride[1] + reach_h;
  const int64_t grad_row = round_up(g.out[2], S);
  plan.phase_pitch = grad_row;
  const int64_t window = g.kernel[1] * g.kernel[2], multiplier = g.out_channels / g.groups;
  const int64_t filters = smaller(multiplier, kFilterBlock);
  place_depthwise<C>(plan, 1, window, weights ? filters * (window + 1) * S : window,
                     weights ? plan.band * grad_row : 0);
  plan.threads =
      depthwise_threads(g, weights ? g.groups * ceil_div(multiplier, kFilterBlock) : g.batch * g.in_channels, threads);
  return plan;
}

// The rows (or columns) of grad_y that positions [q0, q1) of grad_x read.
struct GradientSpan {
  int64_t first, count;
};
inline GradientSpan gradient_span(const ConvGeometry& g, int d, int64_t q0, int64_t q1) {
  const int64_t first = floor_div(q0 + g.padding[d] - g.dilation[d] * (g.kernel[d] - 1), g.stride[d]);
  return {first, floor_div(q1 - 1 + g.padding[d], g.stride[d]) - first + 1};
}

template <class C>
DepthwisePlan plan_depthwise_input(const ConvGeometry& g, int threads) {
  constexpr int64_t S = Vec<C>::size;
  DepthwisePlan plan{};
  const int64_t multiplier = g.out_channels / g.groups, sh = g.stride[1], sw = g.stride[2];
  const GradientSpan cols = gradient_span(g, 2, 0, g.in[2]);
  plan.row = padded_row<C>(g.out[2], -cols.first, cols.count, 1);
  const int64_t band_bytes = kBandBytes * smaller<int64_t>(multiplier, kPlanesInL2);
  const int64_t rows = band_bytes / (multiplier * plan.row.elements() * static_cast<int64_t>(sizeof(C)));
  const int64_t reach = ceil_div(g.dilation[1] * (g.kernel[1] - 1), sh) + 1, least = kPlaneRows * sh;
  plan.band = smaller(larger(rows - reach, int64_t{1}) * sh / least * least, round_up(g.in[1], sh));
  plan.band = larger(plan.band, smaller(least, round_up(g.in[1], sh)));
  plan.copy_rows = plan.band / sh + reach + 1;
  plan.phase_pitch = round_up(ceil_div(g.in[2], sw), S);
  const int64_t residues = sw > 1 ? sw * ceil_div(plan.band, sh) * plan.phase_pitch + round_up(g.in[2], S) : 0;
  const int64_t taps = multiplier * g.kernel[1] * g.kernel[2];
  place_depthwise<C>(plan, multiplier, taps, taps, residues);
  plan.threads = depthwise_threads(g, g.batch * g.groups * ceil_div(g.in[1], plan.band), threads);
  return plan;
}

template <class C>
struct DepthwiseScratch {
  C* copy;
  TapColumns<C> taps;
  C* extra;
};
template <class C>
inline DepthwiseScratch<C> depthwise_scratch(const DepthwisePlan& plan, int64_t planes, int64_t taps, void* workspace,
                                             int thread) {
  unsigned char* const mine = static_cast<unsigned char*>(workspace) + thread * plan.per_thread;
  DepthwiseScratch<C> scratch{};
  scratch.copy = reinterpret_cast<C*>(mine + plan.copy_at);
  scratch.taps.offsets = reinterpret_cast<int64_t*>(mine + plan.tap_at);
  scratch.taps.weights = reinterpret_cast<C*>(mine + plan.tap_at + round_up(taps * 8, 64));
  scratch.extra = reinterpret_cast<C*>(mine + plan.extra_at);
  // From here on the padding stays zero: only elements with a source are written again.
  __builtin_memset(scratch.copy, 0, static_cast<size_t>(planes * plan.plane) * sizeof(C));
  return scratch;
}

// The taps of the forward pass and of the weight gradient, which read the same kind of copy.
template <class C>
void forward_taps(const ConvGeometry& g, const PaddedRow& row, bool columns, TapColumns<C>& taps) {
  taps.step = row.elements();
  taps.row_step = g.stride[1] * row.elements();
  taps.columns = 0;
  for (int64_t rh = 0; rh < (columns ? 1 : g.kernel[1]); ++rh)
    for (int64_t rw = 0; rw < g.kernel[2]; ++rw)
      taps.offsets[taps.columns++] = rh * g.dilation[1] * row.elements() + row.at(rw * g.dilation[2]);
}

// Copies a filter in the order of its taps: by columns, or by rows.
template <class T>
void load_filter(const T* w, int64_t kh, int64_t kw, bool columns, Compute<T>* to) {
  const int64_t rs = columns ? 1 : kw, cs = columns ? kh : 1;
  for (int64_t rh = 0; rh < kh; ++rh)
    for (int64_t rw = 0; rw < kw; ++rw) to[rh * rs + rw * cs] = widen_one(w + rh * kw + rw);
}

// depthwise_takes: whether these kernels can compute the call. They are then the fastest.
template <class T>
bool depthwise_takes(const Bound<ConvForward>& args) {
  return args.layout == Layout::channels_first && is_depthwise(args.geometry);
}
template <class T>
DepthwisePlan plan_depthwise(const Bound<ConvForward>& args, int threads) {
  return plan_depthwise_forward<Compute<T>>(args.geometry, threads, false);
}

template <class T>
void depthwise(const Bound<ConvForward>& args, const DepthwisePlan& plan, void* workspace, const Team& team) {
  using C = Compute<T>;
  const ConvGeometry& g = args.geometry;
  const int64_t planes = g.batch * g.in_channels, multiplier = g.out_channels / g.groups;
  const int64_t kh = g.kernel[1], kw = g.kernel[2], in = g.in[1] * g.in[2], out = g.out[1] * g.out[2];
  const bool columns = has_column(kh, g.stride[1], g.dilation[1]);
  const PlaneOutput<C> output = plane_output<T>(args.y, args.z, g.out[2], args.activation);
  parallel(team, plan.threads, [&](Crew& crew) {
    DepthwiseScratch<C> scratch = depthwise_scratch<C>(plan, 1, kh * kw, workspace, crew.thread);
    TapColumns<C>& taps = scratch.taps;
    forward_taps(g, plan.row, columns, taps);
    crew.each(planes, [&](int64_t plane) {
      const Plane<T> x = {static_cast<const T*>(args.x) + plane * in, g.in[2], nullptr, nullptr, {}};
      for (int64_t p = 0; p < g.out[1]; p += plan.band) {
        const int64_t rows = smaller(plan.band, g.out[1] - p), first = p * g.stride[1] - g.padding[1];
        copy_rows(x, g.in[1], first, (rows - 1) * g.stride[1] + (kh - 1) * g.dilation[1] + 1, plan.band == g.out[1],
                  plan.row, scratch.copy);
        for (int64_t m = 0; m < multiplier; ++m) {
          const int64_t k = plane % g.in_channels * multiplier + m;
          const T* const w = static_cast<const T*>(args.w) + k * kh * kw;
          load_filter(w, kh, kw, columns, taps.weights);
          PlaneOutput<C> to = offset<T>(output, (plane * multiplier + m) * out + p * g.out[2]);
          to.bias = args.bias == nullptr ? 0 : widen_one(static_cast<const T*>(args.bias) + k);
          with_column(kh, g.stride[1], g.dilation[1], [&](auto height, auto stride) {
            correlate<decltype(height)::value, decltype(stride)::value>(taps, scratch.copy, rows, g.out[2], to);
          });
        }
      }
    });
  });
}

template <class T>
bool depthwise_takes(const Bound<ConvBackwardInput>& args) {
  return args.layout == Layout::channels_first && is_depthwise(args.geometry);
}
template <class T>
DepthwisePlan plan_depthwise(const Bound<ConvBackwardInput>& args, int threads) {
  return plan_depthwise_input<Compute<T>>(args.geometry, threads);
}

// The positions of [q0, q1) that equal q0 + residue modulo the stride. For position q, tap r reads the gradient at
// (u - r * dilation) / stride, u = q + padding, if that is an integer. So all these positions have the same taps.
struct Residue {
  int64_t u;  // of the first position
  int64_t count;
};
inline Residue residue_of(const ConvGeometry& g, int d, int64_t q0, int64_t q1, int64_t residue) {
  const int64_t count = q1 - q0 > residue ? ceil_div(q1 - q0 - residue, g.stride[d]) : 0;
  return {q0 + residue + g.padding[d], count};
}
// The taps of a dimension that read the gradient for position u, from the last one down. Tap `last` reads at `at`; each
// tap `period` before the previous one reads `step` further on.
struct ReachingTaps {
  int64_t count, last, period, at, step;
};
inline ReachingTaps reaching_taps(const ConvGeometry& g, int d, int64_t u) {
  const int64_t stride = g.stride[d], dilation = g.dilation[d];
  const int64_t period = stride / greatest_common_divisor(stride, dilation);
  int64_t last = g.kernel[d] - 1;
  while (last >= 0 && (u - last * dilation) % stride != 0) --last;
  if (last < 0) return {};
  return {last / period + 1, last, period, (u - last * dilation) / stride, period * dilation / stride};
}

// Fills `taps` for a pair of residues. w is the first filter of the channel. Returns the height of the columns.
template <class T>
int64_t input_taps(const ConvGeometry& g, const DepthwisePlan& plan, const T* w, int64_t u_h, int64_t u_w,
                   int64_t first_row, int64_t first_col, TapColumns<Compute<T>>& taps) {
  const int64_t multiplier = g.out_channels / g.groups, kw = g.kernel[2];
  const ReachingTaps high = reaching_taps(g, 1, u_h), wide = reaching_taps(g, 2, u_w);
  taps.step = taps.row_step = plan.row.elements();
  const bool columns = high.count > 0 && has_column(high.count, 1, g.dilation[1]);
  taps.columns = 0;
  int64_t n = 0;
  for (int64_t m = 0; m < multiplier; ++m)
    for (int64_t j = 0; j < wide.count; ++j) {
      const T* from = w + m * g.kernel[1] * kw + high.last * kw + wide.last - j * wide.period;
      int64_t at = m * plan.plane + (high.at - first_row) * plan.row.elements() +
                   plan.row.at(wide.at + j * wide.step - first_col);
      for (int64_t i = 0; i < high.count; ++i, from -= high.period * kw) {
        if (!columns || i == 0) taps.offsets[taps.columns++] = at;
        at += high.step * plan.row.elements();
        taps.weights[n++] = widen_one(from);
      }
    }
  return columns ? high.count : 1;
}

// Computes rows [q0, q1) of a plane of grad_x.
template <class T>
void depthwise_input_band(const ConvGeometry& g, const DepthwisePlan& plan, const T* w,
                          const PlaneOutput<Compute<T>>& out, int64_t q0, int64_t q1, int64_t first_row,
                          DepthwiseScratch<Compute<T>>& scratch) {
  using C = Compute<T>;
  const int64_t sh = g.stride[1], sw = g.stride[2], width = g.in[2];
  const int64_t first_col = -plan.row.pad;
  const int64_t residue_size = ceil_div(plan.band, sh) * plan.phase_pitch;
  C* const row = scratch.extra + sw * residue_size;
  constexpr int64_t kFinish = 1024;  // elements per call of the epilogue, which are still in L1
  for (int64_t a = 0; a < sh && a < q1 - q0; ++a) {
    const Residue high = residue_of(g, 1, q0, q1, a);
    PlaneOutput<C> to = offset<T>(out, (q0 + a) * width);
    to.rs = sh * width;
    for (int64_t b = 0; b < sw && b < width; ++b) {
      const Residue wide = residue_of(g, 2, 0, width, b);
      const int64_t height = input_taps(g, plan, w, high.u, wide.u, first_row, first_col, scratch.taps);
      with_column(height, 1, 1, [&](auto kh, auto sh1) {
        constexpr int KH = decltype(kh)::value;
        if constexpr (decltype(sh1)::value == 1) {
          if (sw == 1) {
            correlate<KH, 1>(scratch.taps, scratch.copy, high.count, wide.count, to);
          } else {
            PlaneOutput<C> part = plane_output<C>(scratch.extra + b * residue_size, nullptr, plan.phase_pitch, {});
            part.bias = out.bias;
            correlate<KH, 1>(scratch.taps, scratch.copy, high.count, wide.count, part);
          }
        }
      });
    }
    if (sw == 1) continue;
    for (int64_t r = 0; r < high.count; ++r) {
      const C* const from = scratch.extra + r * plan.phase_pitch;
      if (sw == 2) {
        interleave_row(from, from + residue_size, width, row);
      } else {
        for (int64_t i = 0; i < width; ++i) row[i] = from[i % sw * residue_size + i / sw];
      }
      for (int64_t i = 0; to.relu && i < width; i += Vec<C>::size)
        rectified(Vec<C>::load(row + i), to.relu).store(row + i);
      for (int64_t i = 0; i < width; i += kFinish)
        finish_row<T>(to, row + i, r * to.rs + i, static_cast<int>(smaller(kFinish, width - i)));
    }
  }
}

template <class T>
void depthwise(const Bound<ConvBackwardInput>& args, const DepthwisePlan& plan, void* workspace, const Team& team) {
  using C = Compute<T>;
  const ConvGeometry& g = args.geometry;
  const int64_t multiplier = g.out_channels / g.groups;
  const int64_t in = g.in[1] * g.in[2], out = g.out[1] * g.out[2], window = g.kernel[1] * g.kernel[2];
  const int64_t bands = ceil_div(g.in[1], plan.band), units = g.batch * g.in_channels * bands;
  const Plane<T> grad_y = gradient_plane<T>(args.grad_y, args.saved, args.activation, g.out[2]);
  const PlaneOutput<C> output = plane_output<T>(args.grad_x, args.z, g.in[2], args.epilogue);
  parallel(team, plan.threads, [&](Crew& crew) {
    DepthwiseScratch<C> scratch = depthwise_scratch<C>(plan, multiplier, multiplier * window, workspace, crew.thread);
    crew.each(units, [&](int64_t unit) {
      const int64_t plane = unit / bands, c = plane % g.in_channels;
      const int64_t q0 = unit % bands * plan.band, q1 = smaller(q0 + plan.band, g.in[1]);
      const GradientSpan rows = gradient_span(g, 1, q0, q1);
      for (int64_t m = 0; m < multiplier; ++m)
        copy_rows(offset(grad_y, (plane * multiplier + m) * out), g.out[1], rows.first, rows.count, bands == 1,
                  plan.row, scratch.copy + m * plan.plane);
      PlaneOutput<C> to = offset<T>(output, plane * in);
      to.bias = args.bias == nullptr ? 0 : widen_one(static_cast<const T*>(args.bias) + c);
      depthwise_input_band(g, plan, static_cast<const T*>(args.w) + c * multiplier * window, to, q0, q1, rows.first,
                           scratch);
    });
  });
}

template <class T>
bool depthwise_takes(const Bound<ConvBackwardWeight>& args) {
  const ConvGeometry& g = args.geometry;
  const bool single = g.in_channels == 1 && is_flat(g) && has_column(g.kernel[1], g.stride[1], g.dilation[1]);
  return args.layout == Layout::channels_first && (is_depthwise(g) || single);
}
template <class T>
DepthwisePlan plan_depthwise(const Bound<ConvBackwardWeight>& args, int threads) {
  return plan_depthwise_forward<Compute<T>>(args.geometry, threads, true);
}

template <class C>
inline Vec<C> sum_rows(const C* g, int64_t rs, int64_t rows, int64_t cols, Vec<C> sum) {
  constexpr int S = Vec<C>::size;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t j = 0; j < cols; j += S)
      sum = sum + Vec<C>::load(g + r * rs + j, static_cast<int>(smaller<int64_t>(S, cols - j)));
  return sum;
}

// The weight and bias gradients of filters [m0, m1) of input channel c, over all images. All these filters use the same
// copy of a band. The sums of a filter are one vector per tap and one for the bias.
template <class T>
void depthwise_weight_filters(const Bound<ConvBackwardWeight>& args, const DepthwisePlan& plan, int64_t c, int64_t m0,
                              int64_t m1, bool columns, const DepthwiseScratch<Compute<T>>& scratch) {
  using C = Compute<T>;
  using Lanes = Vec<C>;
  constexpr int S = Lanes::size;
  const ConvGeometry& g = args.geometry;
  const int64_t kh = g.kernel[1], kw = g.kernel[2], in = g.in[1] * g.in[2], out = g.out[1] * g.out[2];
  const int64_t filter = (kh * kw + 1) * S, first = c * (g.out_channels / g.groups);
  const Plane<T> grad_y = gradient_plane<T>(args.grad_y, args.saved, args.activation, g.out[2]);
  const PaddedRow grad_row = {g.out[2], 0, g.out[2], 1, plan.phase_pitch, 0};
  C* const sums = scratch.taps.weights;
  for (int64_t i = 0; i < (m1 - m0) * filter; ++i) sums[i] = 0;
  for (int64_t b = 0; b < g.batch; ++b)
    for (int64_t p = 0; p < g.out[1]; p += plan.band) {
      const int64_t rows = smaller(plan.band, g.out[1] - p);
      const Plane<T> x = {static_cast<const T*>(args.x) + (b * g.in_channels + c) * in, g.in[2], nullptr, nullptr, {}};
      if (args.grad_w != nullptr)
        copy_rows(x, g.in[1], p * g.stride[1] - g.padding[1], (rows - 1) * g.stride[1] + (kh - 1) * g.dilation[1] + 1,
                  plan.band == g.out[1], plan.row, scratch.copy);
      for (int64_t m = m0; m < m1; ++m) {
        const int64_t plane = b * g.out_channels + first + m;
        const C* grad = nullptr;
        int64_t grad_rs = g.out[2];
        if constexpr (same_type<T, C>)
          if (grad_y.derivative == nullptr) grad = grad_y.p + plane * out + p * g.out[2];
        if (grad == nullptr) {
          copy_rows(offset(grad_y, plane * out), g.out[1], p, rows, true, grad_row, scratch.extra);
          grad = scratch.extra;
          grad_rs = plan.phase_pitch;
        }
        TapColumns<C> taps = scratch.taps;
        taps.weights = sums + (m - m0) * filter;
        C* const bias = taps.weights + kh * kw * S;
        if (args.grad_bias != nullptr) sum_rows(grad, grad_rs, rows, g.out[2], Lanes::load(bias)).store(bias);
        if (args.grad_w == nullptr) continue;
        with_column(kh, g.stride[1], g.dilation[1], [&](auto height, auto stride) {
          weight_sums<decltype(height)::value, decltype(stride)::value>(taps, scratch.copy, grad, grad_rs, rows,
                                                                        g.out[2]);
        });
      }
    }
  for (int64_t m = m0; m < m1; ++m) {
    const C* const from = sums + (m - m0) * filter;
    const auto store = [&](int64_t tap, void* to, int64_t at) {
      const C sum = reduce_add(Lanes::load(from + tap * S));
      store_row<T>(&sum, static_cast<T*>(to) + at, 1);
    };
    if (args.grad_bias != nullptr) store(kh * kw, args.grad_bias, first + m);
    for (int64_t t = 0; t < kh * kw && args.grad_w != nullptr; ++t)
      store(columns ? t % kw * kh + t / kw : t, args.grad_w, (first + m) * kh * kw + t);
  }
}

template <class T>
void depthwise(const Bound<ConvBackwardWeight>& args, const DepthwisePlan& plan, void* workspace, const Team& team) {
  using C = Compute<T>;
  const ConvGeometry& g = args.geometry;
  const bool columns = has_column(g.kernel[1], g.stride[1], g.dilation[1]);
  const int64_t multiplier = g.out_channels / g.groups, blocks = ceil_div(multiplier, kFilterBlock);
  const int64_t units = g.groups * blocks;
  parallel(team, plan.threads, [&](Crew& crew) {
    DepthwiseScratch<C> scratch = depthwise_scratch<C>(plan, 1, g.kernel[1] * g.kernel[2], workspace, crew.thread);
    forward_taps(g, plan.row, columns, scratch.taps);
    crew.each(units, [&](int64_t unit) {
      const int64_t m0 = unit % blocks * kFilterBlock;
      depthwise_weight_filters<T>(args, plan, unit / blocks, m0, smaller(m0 + kFilterBlock, multiplier), columns,
                                  scratch);
    });
  });
}
