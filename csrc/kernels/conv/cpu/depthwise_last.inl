// Depthwise convolution of channels_last images with one filter per channel, in bands of output rows
// (depthwise_last_correlate.inl). The gradient of the input is the same sum over rows of grad_y, where every residue of
// the position modulo the stride has its own taps. Gradients of a fused activation are computed one band at a time.
#pragma once

#include "../../common/cpu/common.inl"
#include "depthwise.inl"
#include "depthwise_correlate.inl"
#include "depthwise_last_correlate.inl"
#include "planes.inl"

// The output rows of a band, and the number of chunks of bands whose weight gradients are summed separately and then
// added in order.
constexpr int64_t kLastBand = 8;
constexpr int64_t kLastChunks = 16;

struct LastPlan {
  int64_t vectors, pitch;
  int64_t bands, units;  // bands per image; bands of all images
  int threads;
  int64_t bias_at, job_at, tap_at, grads_at, per_thread;  // bytes
  int64_t chunks, chunk_bytes;

  int64_t total() const { return per_thread * threads + chunks * chunk_bytes; }
};

// Plans bands for `rows` output rows. grad_rows: elements of the gradient in the compute type that a band needs.
template <class C>
LastPlan plan_depthwise_last(const ConvGeometry& g, int64_t rows, int64_t grad_rows, bool weights, int threads) {
  constexpr int64_t S = Vec<C>::size, kC = sizeof(C);
  LastPlan plan{};
  const int64_t window = g.kernel[1] * g.kernel[2];
  plan.vectors = round_up(ceil_div(g.in_channels, S), kLastVectors);
  plan.pitch = (window + (weights ? 1 : 0)) * S;  // the last vector is that of the bias
  plan.bands = ceil_div(rows, kLastBand);
  plan.units = g.batch * plan.bands;
  plan.chunks = weights ? smaller(plan.units, kLastChunks) : 0;
  plan.chunk_bytes = plan.vectors * plan.pitch * kC;
  plan.threads = depthwise_threads(g, weights ? plan.chunks : plan.units, threads);
  plan.bias_at = weights ? 0 : plan.vectors * plan.pitch * kC;
  plan.job_at = plan.bias_at + (weights ? 0 : plan.vectors * S * kC);
  plan.tap_at = plan.job_at + round_up(kLastBand * static_cast<int64_t>(sizeof(LastJob<C>)), 64);
  plan.grads_at = plan.tap_at + round_up(kLastBand * window * static_cast<int64_t>(sizeof(LastTap<C>)), 64);
  plan.per_thread = plan.grads_at + round_up(grad_rows * kC, 64);
  return plan;
}

// E: the element type of the rows that are read.
template <class E>
struct LastScratch {
  Compute<E>*weights, *bias;
  LastJob<E>* jobs;
  LastTap<E>* taps;
  Compute<E>* grads;
};
template <class E>
inline LastScratch<E> last_scratch(const LastPlan& plan, void* workspace, int thread) {
  using C = Compute<E>;
  unsigned char* const mine = static_cast<unsigned char*>(workspace) + thread * plan.per_thread;
  return {reinterpret_cast<C*>(mine), reinterpret_cast<C*>(mine + plan.bias_at),
          reinterpret_cast<LastJob<E>*>(mine + plan.job_at), reinterpret_cast<LastTap<E>*>(mine + plan.tap_at),
          reinterpret_cast<C*>(mine + plan.grads_at)};
}

constexpr KernelName kDepthwiseLastName = {"depthwise_last"};

inline bool is_depthwise_last(Layout layout, const ConvGeometry& g) {
  return layout == Layout::channels_last && is_depthwise(g) && g.in_channels == g.out_channels;
}

// Rows [first, end) of a gradient in the compute type, either in place or converted into `to`. Returns a pointer to row
// `first`.
template <class T>
const Compute<T>* last_rows(const Plane<T>& image, int64_t first, int64_t end, Compute<T>* to) {
  if constexpr (same_type<T, Compute<T>>)
    if (image.derivative == nullptr) return image.p + first * image.rs;
  const int64_t n = (end - first) * image.rs;
  const Plane<T> from = offset(image, first * image.rs);
  if (image.derivative != nullptr)
    image.derivative(from.p, from.saved, to, n, image.activation);
  else
    widen_all(from.p, n, to);
  return to;
}
template <class T>
inline bool converts(const Activation& activation) {
  return !same_type<T, Compute<T>> || activation.kind != ActivationKind::identity;
}

// The slot of tap rw of a row of a filter for the input gradient. Taps that reach the same positions are contiguous,
// the last one first, which is the order in which they read the gradient from left to right.
inline int64_t input_slot(const ConvGeometry& g, int64_t rw) {
  const int64_t step = g.stride[2], residue = rw % step;
  int64_t slot = 0;
  for (int64_t r = 0; r < residue; ++r) slot += ceil_div(g.kernel[2] - r, step);
  return slot + (g.kernel[2] - 1 - rw) / step;
}

// Transposes the filters to vectors of channels, [vector][tap][lane], and pads the bias.
template <class T, class E>
void load_filters_last(const T* w, const T* bias, const ConvGeometry& g, const LastPlan& plan, bool input,
                       const LastScratch<E>& scratch) {
  constexpr int64_t S = Vec<Compute<T>>::size;
  const int64_t window = g.kernel[1] * g.kernel[2];
  for (int64_t t = 0; t < window; ++t) {
    const int64_t slot = input ? t / g.kernel[2] * g.kernel[2] + input_slot(g, t % g.kernel[2]) : t;
    for (int64_t c = 0; c < plan.vectors * S; ++c)
      scratch.weights[c / S * plan.pitch + slot * S + c % S] = c < g.in_channels ? widen_one(w + c * window + t) : 0;
  }
  for (int64_t c = 0; c < plan.vectors * S; ++c)
    scratch.bias[c] = bias != nullptr && c < g.in_channels ? widen_one(bias + c) : 0;
}

// body(KW, SW) if there is an instance for so many contiguous taps, else body(1, 1).
template <class Body>
inline void with_row(int64_t kw, int64_t sw, int64_t dw, Body&& body) {
  const Number<1> one;
  const Number<2> two;
  if (dw == 1 && sw == 1) {
    if (kw == 2) return body(two, one);
    if (kw == 3) return body(Number<3>{}, one);
    if (kw == 5) return body(Number<5>{}, one);
    if (kw == 7) return body(Number<7>{}, one);
  } else if (dw == 1 && sw == 2) {
    if (kw == 3) return body(Number<3>{}, two);
    if (kw == 5) return body(Number<5>{}, two);
  }
  body(one, one);
}
inline bool has_row(int64_t kw, int64_t sw, int64_t dw) {
  bool found = false;
  with_row(kw, sw, dw, [&](auto width, auto) { found = decltype(width)::value > 1; });
  return found;
}

// The jobs of output rows [p0, p1) of the image x.
template <class E>
void forward_jobs_last(const ConvGeometry& g, const E* x, int64_t p0, int64_t p1, Compute<E>* weights,
                       const LastScratch<E>& scratch) {
  constexpr int64_t S = Vec<Compute<E>>::size;
  const bool together = has_row(g.kernel[2], g.stride[2], g.dilation[2]);
  LastTap<E>* next = scratch.taps;
  for (int64_t p = p0; p < p1; ++p) {
    LastTap<E>* const begin = next;
    for (int64_t rh = 0; rh < g.kernel[1]; ++rh) {
      const int64_t row = p * g.stride[1] - g.padding[1] + rh * g.dilation[1];
      if (row < 0 || row >= g.in[1]) continue;
      for (int64_t rw = 0; rw < (together ? 1 : g.kernel[2]); ++rw)
        *next++ = {x + row * g.in[2] * g.in_channels, rw * g.dilation[2], weights + (rh * g.kernel[2] + rw) * S};
    }
    scratch.jobs[p - p0] = {begin, static_cast<int>(next - begin), (p - p0) * g.out[2] * g.out_channels};
  }
}

// The output for results of type T from rows of type E.
template <class T, class E>
inline LastOutput<E> last_output(const PlaneOutput<Compute<T>>& out, int64_t position, const Compute<T>* bias) {
  const bool plain = out.z == nullptr && (out.relu || out.activation.kind == ActivationKind::identity);
  E* y = nullptr;
  if constexpr (same_type<T, E>) y = plain ? static_cast<E*>(out.stored) : nullptr;
  return {out, y, position, bias};
}

template <class T>
bool depthwise_last_takes(const Bound<ConvForward>& args) {
  return is_depthwise_last(args.layout, args.geometry);
}
template <class T>
LastPlan plan_depthwise_last(const Bound<ConvForward>& args, int threads) {
  return plan_depthwise_last<Compute<T>>(args.geometry, args.geometry.out[1], 0, false, threads);
}

template <class T>
void depthwise_last(const Bound<ConvForward>& args, const LastPlan& plan, void* workspace, const Team& team) {
  const ConvGeometry& g = args.geometry;
  const LastRow at = {-g.padding[2], g.stride[2], g.in[2], g.in_channels, plan.pitch};
  const PlaneOutput<Compute<T>> output = plane_output<T>(args.y, args.z, 0, args.activation);
  parallel(team, plan.threads, [&](Crew& crew) {
    const LastScratch<T> scratch = last_scratch<T>(plan, workspace, crew.thread);
    load_filters_last(static_cast<const T*>(args.w), static_cast<const T*>(args.bias), g, plan, false, scratch);
    crew.each(plan.units, [&](int64_t unit) {
      const int64_t b = unit / plan.bands, p0 = unit % plan.bands * kLastBand, p1 = smaller(p0 + kLastBand, g.out[1]);
      const T* const x = static_cast<const T*>(args.x) + b * g.in[1] * g.in[2] * g.in_channels;
      forward_jobs_last(g, x, p0, p1, scratch.weights, scratch);
      const int64_t first = (b * g.out[1] + p0) * g.out[2] * g.out_channels;
      const LastOutput<T> to = last_output<T, T>(offset<T>(output, first), g.out_channels, scratch.bias);
      with_row(g.kernel[2], g.stride[2], g.dilation[2], [&](auto width, auto step) {
        correlate_last<decltype(width)::value, decltype(step)::value>(scratch.jobs, p1 - p0, at, g.out[2], to);
      });
    });
  });
}

template <class T>
bool depthwise_last_takes(const Bound<ConvBackwardInput>& args) {
  return is_depthwise_last(args.layout, args.geometry);
}
template <class T>
LastPlan plan_depthwise_last(const Bound<ConvBackwardInput>& args, int threads) {
  const ConvGeometry& g = args.geometry;
  const bool forms = args.activation.kind != ActivationKind::identity;
  const int64_t rows = forms ? gradient_span(g, 1, 0, kLastBand).count + 1 : 0;
  return plan_depthwise_last<Compute<T>>(g, g.in[1], rows * g.out[2] * g.out_channels, false, threads);
}

// Whether `tap` reads the gradient for position u.
inline bool reaches(const ConvGeometry& g, int d, int64_t u, int64_t tap) {
  return (u - tap * g.dilation[d]) % g.stride[d] == 0;
}

// The jobs of rows [q0, q1) of grad_x, for the positions with `residue` modulo the stride. They read rows of the
// gradient from `first` on. Returns the number of contiguous taps of each entry.
template <class E>
int64_t input_jobs_last(const ConvGeometry& g, const E* grad, int64_t first, int64_t q0, int64_t q1, int64_t residue,
                        const LastScratch<E>& scratch) {
  constexpr int64_t S = Vec<Compute<E>>::size;
  const int64_t u_w = residue + g.padding[2], sw = g.stride[2];
  int64_t width = 0;
  for (int64_t rw = 0; rw < g.kernel[2]; ++rw) width += reaches(g, 2, u_w, rw) ? 1 : 0;
  const bool together = has_row(width, 1, g.dilation[2]);
  LastTap<E>* next = scratch.taps;
  for (int64_t q = q0; q < q1; ++q) {
    LastTap<E>* const begin = next;
    const int64_t u_h = q + g.padding[1];
    for (int64_t rh = g.kernel[1] - 1; rh >= 0; --rh) {
      const int64_t row = (u_h - rh * g.dilation[1]) / g.stride[1];
      if (!reaches(g, 1, u_h, rh) || u_h < rh * g.dilation[1] || row >= g.out[1]) continue;
      bool started = false;
      for (int64_t rw = g.kernel[2] - 1; rw >= 0; --rw) {
        if (!reaches(g, 2, u_w, rw) || (together && started)) continue;
        started = true;
        *next++ = {grad + (row - first) * g.out[2] * g.out_channels, (u_w - rw * g.dilation[2]) / sw,
                   scratch.weights + (rh * g.kernel[2] + input_slot(g, rw)) * S};
      }
    }
    scratch.jobs[q - q0] = {begin, static_cast<int>(next - begin), (q - q0) * g.in[2] * g.in_channels};
  }
  return together ? width : 1;
}

// E is T if the gradient is read in place, and the compute type if the derivative of an activation is applied first.
template <class T, class E>
void depthwise_last_input(const Bound<ConvBackwardInput>& args, const LastPlan& plan, void* workspace,
                          const Team& team) {
  const ConvGeometry& g = args.geometry;
  const int64_t row = g.out[2] * g.out_channels;
  const LastRow at = {0, 1, g.out[2], g.out_channels, plan.pitch};
  const Plane<T> grad_y = gradient_plane<T>(args.grad_y, args.saved, args.activation, row);
  const PlaneOutput<Compute<T>> output = plane_output<T>(args.grad_x, args.z, 0, args.epilogue);
  parallel(team, plan.threads, [&](Crew& crew) {
    const LastScratch<E> scratch = last_scratch<E>(plan, workspace, crew.thread);
    load_filters_last(static_cast<const T*>(args.w), static_cast<const T*>(args.bias), g, plan, true, scratch);
    crew.each(plan.units, [&](int64_t unit) {
      const int64_t b = unit / plan.bands, q0 = unit % plan.bands * kLastBand, q1 = smaller(q0 + kLastBand, g.in[1]);
      const Plane<T> image = offset(grad_y, b * g.out[1] * row);
      int64_t first = 0;  // the row of the gradient that `grad` points to
      const E* grad = nullptr;
      if constexpr (same_type<T, E>) grad = image.p;
      if constexpr (same_type<E, Compute<T>>)
        if (image.derivative != nullptr) {
          const GradientSpan span = gradient_span(g, 1, q0, q1);
          first = smaller(larger<int64_t>(span.first, 0), g.out[1]);
          grad = last_rows(image, first, larger(first, smaller(span.first + span.count, g.out[1])), scratch.grads);
        }
      for (int64_t residue = 0; residue < smaller(g.stride[2], g.in[2]); ++residue) {
        const int64_t width = input_jobs_last(g, grad, first, q0, q1, residue, scratch);
        const int64_t from = (b * g.in[1] + q0) * g.in[2] + residue;
        const LastOutput<E> to =
            last_output<T, E>(offset<T>(output, from * g.in_channels), g.stride[2] * g.in_channels, scratch.bias);
        with_row(width, 1, 1, [&](auto columns, auto) {
          correlate_last<decltype(columns)::value, 1>(scratch.jobs, q1 - q0, at,
                                                      ceil_div(g.in[2] - residue, g.stride[2]), to);
        });
      }
    });
  });
}

template <class T>
void depthwise_last(const Bound<ConvBackwardInput>& args, const LastPlan& plan, void* workspace, const Team& team) {
  if (args.activation.kind == ActivationKind::identity)
    depthwise_last_input<T, T>(args, plan, workspace, team);
  else
    depthwise_last_input<T, Compute<T>>(args, plan, workspace, team);
}

template <class T>
bool depthwise_last_takes(const Bound<ConvBackwardWeight>& args) {
  return is_depthwise_last(args.layout, args.geometry);
}
template <class T>
LastPlan plan_depthwise_last(const Bound<ConvBackwardWeight>& args, int threads) {
  const ConvGeometry& g = args.geometry;
  const int64_t grads = converts<T>(args.activation) ? kLastBand * g.out[2] * g.out_channels : 0;
  return plan_depthwise_last<Compute<T>>(g, g.out[1], grads, true, threads);
}

// Adds rows of the gradient to the bias sums, which follow the taps' sums of each vector of channels.
template <class C>
void bias_sums_last(const LastPlan& plan, const C* grad, int64_t rows, int64_t channels, C* sums) {
  constexpr int64_t S = Vec<C>::size;
  for (int64_t c = 0; c < channels; c += S) {
    const int lanes = static_cast<int>(smaller(S, channels - c));
    C* const to = sums + c / S * plan.pitch + plan.pitch - S;
    Vec<C> sum = Vec<C>::load(to);
    for (int64_t i = 0; i < rows; ++i) sum = sum + Vec<C>::load(grad + i * channels + c, lanes);
    sum.store(to);
  }
}

// Adds output rows [p0, p1) of image b to the sums of a chunk.
template <class T>
void weight_band_last(const Bound<ConvBackwardWeight>& args, const LastPlan& plan, int64_t b, int64_t p0, int64_t p1,
                      Compute<T>* sums, const LastScratch<T>& scratch) {
  using C = Compute<T>;
  const ConvGeometry& g = args.geometry;
  const int64_t grad_row = g.out[2] * g.out_channels;
  const Plane<T> grad_y = gradient_plane<T>(args.grad_y, args.saved, args.activation, grad_row);
  const C* const grad = last_rows(offset(grad_y, b * g.out[1] * grad_row), p0, p1, scratch.grads);
  if (args.grad_bias != nullptr) bias_sums_last(plan, grad, (p1 - p0) * g.out[2], g.out_channels, sums);
  if (args.grad_w == nullptr) return;
  const LastRow at = {-g.padding[2], g.stride[2], g.in[2], g.in_channels, plan.pitch};
  const T* const x = static_cast<const T*>(args.x) + b * g.in[1] * g.in[2] * g.in_channels;
  forward_jobs_last(g, x, p0, p1, sums, scratch);
  with_row(g.kernel[2], g.stride[2], g.dilation[2], [&](auto width, auto step) {
    weight_sums_last<decltype(width)::value, decltype(step)::value>(scratch.jobs, p1 - p0, grad, at, g.out[2]);
  });
}

template <class T>
void depthwise_last(const Bound<ConvBackwardWeight>& args, const LastPlan& plan, void* workspace, const Team& team) {
  using C = Compute<T>;
  const ConvGeometry& g = args.geometry;
  const int64_t window = g.kernel[1] * g.kernel[2], elements = plan.vectors * plan.pitch, S = Vec<C>::size;
  C* const chunks = reinterpret_cast<C*>(static_cast<unsigned char*>(workspace) + plan.per_thread * plan.threads);
  parallel(team, plan.threads, [&](Crew& crew) {
    const LastScratch<T> scratch = last_scratch<T>(plan, workspace, crew.thread);
    crew.each(plan.chunks, [&](int64_t chunk) {
      C* const sums = chunks + chunk * elements;
      __builtin_memset(sums, 0, static_cast<size_t>(plan.chunk_bytes));
      const int64_t end = plan.units * (chunk + 1) / plan.chunks;
      for (int64_t unit = plan.units * chunk / plan.chunks; unit < end; ++unit) {
        const int64_t p0 = unit % plan.bands * kLastBand;
        weight_band_last<T>(args, plan, unit / plan.bands, p0, smaller(p0 + kLastBand, g.out[1]), sums, scratch);
      }
    });
  });
  for (int64_t chunk = 1; chunk < plan.chunks; ++chunk)
    for (int64_t i = 0; i < elements; i += S)
      (Vec<C>::load(chunks + i) + Vec<C>::load(chunks + chunk * elements + i)).store(chunks + i);
  for (int64_t c = 0; c < g.in_channels; ++c) {
    const C* const from = chunks + c / S * plan.pitch + c % S;
    for (int64_t t = 0; t < window && args.grad_w != nullptr; ++t)
      store_row<T>(from + t * S, static_cast<T*>(args.grad_w) + c * window + t, 1);
    if (args.grad_bias != nullptr) store_row<T>(from + window * S, static_cast<T*>(args.grad_bias) + c, 1);
  }
}
