// batch_norm_backward: a pass for the sums, which reads grad_y and x, and one for grad_x.
//
// relu and the like form z and their derivative again in both passes, from x. The others' first pass writes g = grad_y
// f', to grad_residual if that is wanted, else to grad_x, and the second one reads it. So does that of relu and the
// like with a residual, for which y is saved.
#pragma once

#include "forward.inl"

// g of a vector: grad_y, times the derivative where there is a direct one.
template <class D, class S, class C = Compute<S>>
inline Vec<C> gradient_of_z(Vec<C> grad, Vec<C> deviation, const Channel<C>& channel, const Parameters<S>& p) {
  if constexpr (same_type<D, Identity>) return grad;
  // Otherwise GCC selects by a masked load, which waits for the mask.
  return D::backward(in_register(grad), fma(deviation, channel.scale, channel.beta), p);
}

// Adds a row of one channel to the sums of g and of g (x - mean).
template <class D, class S, class G>
inline void add_plane(const G* grad, const S* x, int64_t n, Channel<Compute<S>> channel, Parameters<S> p,
                      PlaneSums<Compute<S>>& sums) {
  using C = Compute<S>;
  for_vectors<C>(n, [&](int64_t i, auto lanes, int k) {
    const Vec<C> d = load_vector<C>(x + i, lanes) - channel.mean;
    const Vec<C> g = gradient_of_z<D>(load_vector<C>(grad + i, lanes), d, channel, p);
    sums.a[k] = sums.a[k] + g;
    sums.b[k] = fma(g, first_lanes(d, lanes), sums.b[k]);
  });
}
// Adds `size` rows of n channels to sums.
template <class D, int size, class S, class G>
inline void add_rows(const G* grad, int64_t grad_stride, const S* x, int64_t stride, int64_t n,
                     Numbers<Compute<S>> numbers, Parameters<S> p, Compute<S>* first, Compute<S>* second) {
  using C = Compute<S>;
  using V = Vec<C>;
  for_vectors<C>(n, [&](int64_t i, auto lanes, int) {
    const Channel<C> channel = channels_of(numbers, i);
    fetch_next<size, C>(x, n, i);
    fetch_next<size, C>(grad, n, i);
    V a = V::zero(), b = V::zero();
    for (int r = 0; r < size; ++r) {
      const V d = load_vector<C>(x + r * stride + i, lanes) - channel.mean;
      const V g = gradient_of_z<D>(load_vector<C>(grad + r * grad_stride + i, lanes), d, channel, p);
      a = a + g;
      b = fma(g, d, b);
    }
    (V::load(first + i) + a).store(first + i);
    (V::load(second + i) + b).store(second + i);
  });
}

template <class D, bool training, class S>
inline Vec<Compute<S>> gradient_of_x(Vec<Compute<S>> grad, const S* x, auto lanes, const Channel<Compute<S>>& channel,
                                     const Parameters<S>& p) {
  using C = Compute<S>;
  if constexpr (!training && same_type<D, Identity>) {
    return grad * channel.scale;
  } else {
    const Vec<C> d = load_vector<C>(x, lanes) - channel.mean;
    const Vec<C> g = gradient_of_z<D>(grad, d, channel, p);
    if constexpr (!training) return g * channel.scale;
    return fma(g, channel.scale, fnma(d, channel.slope, -channel.offset));
  }
}
template <class D, bool training, class S>
void gradient_plane(const S* grad, const S* x, S* grad_x, int64_t n, int64_t planes, int64_t stride,
                    const Channel<Compute<S>>& numbers, const Activation& activation) {
  using C = Compute<S>;
  const auto p = parameters<S>(activation);
  const Channel<C> channel = numbers;  // a copy, which no store can change
  for (; planes > 0; --planes, grad += stride, x += stride, grad_x += stride)
    for_vectors<C>(n, [&](int64_t i, auto lanes, int) {
      const Vec<C> g = load_vector<C>(grad + i, lanes);
      store_vector(gradient_of_x<D, training>(g, x + i, lanes, channel, p), grad_x + i, lanes);
    });
}
template <class D, bool training, class S>
void gradient_rows(const S* grad, const S* x, S* grad_x, int64_t n, int64_t begin, int64_t end,
                   const Numbers<Compute<S>>& given, const Activation& activation) {
  using C = Compute<S>;
  const auto p = parameters<S>(activation);
  const Numbers<C> numbers = given;  // a copy, which no store can change
  for_rows<kWritten>(begin, end, [&](int64_t row, auto size) {
    for_vectors<C>(n, [&](int64_t i, auto lanes, int) {
      const Channel<C> channel = channels_of(numbers, i);
      for (int r = 0; r < size.value; ++r) {
        const int64_t at = (row + r) * n + i;
        const Vec<C> g = load_vector<C>(grad + at, lanes);
        store_vector(gradient_of_x<D, training>(g, x + at, lanes, channel, p), grad_x + at, lanes);
      }
    });
  });
}

// z becomes g = grad f'(z). Reads: the kind for which f' is computed from y, or Identity.
template <class D, class Reads, class S>
void slope_row(const S* grad, Compute<S>* z, int64_t n, const Activation& activation) {
  using C = Compute<S>;
  const auto p = parameters<S>(activation);
  for_vectors<C>(n, [&](int64_t i, auto lanes, int) {
    const Vec<C> read = Reads::forward(load_vector<C>(z + i, lanes), p);
    store_vector(D::backward(load_vector<C>(grad + i, lanes), read, p), z + i, lanes);
  });
}
template <class S>
using SlopeRow = void (*)(const S* grad, Compute<S>* z, int64_t n, const Activation&);
template <class S>
SlopeRow<S> find_slope_row(ActivationKind kind) {
  return with_derivative(kind, false, [](auto derivative) -> SlopeRow<S> {
    using D = decltype(derivative);
    if constexpr (same_type<D, FromOutput<Sigmoid>>)
      return slope_row<D, Sigmoid, S>;
    else if constexpr (same_type<D, FromOutput<Tanh>>)
      return slope_row<D, Tanh, S>;
    else
      return slope_row<D, Identity, S>;
  });
}

template <class S>
struct NormBackwardKernels {
  using C = Compute<S>;
  Walk walk;
  bool direct;  // both passes form the derivative, or there is none
  // Adds to the sums n elements of each of some planes, `stride` apart; rows [begin, end).
  void (*sum_plane)(const S* grad, const S* x, int64_t n, int64_t planes, int64_t stride, const Channel<C>&,
                    const Activation&, PlaneSums<C>&);
  void (*sum_rows)(const S* grad, const S* x, int64_t n, int64_t begin, int64_t end, const Numbers<C>&,
                   const Activation&, C* first, C* second);
  void (*plane)(const S* grad, const S* x, S* grad_x, int64_t n, int64_t planes, int64_t stride, const Channel<C>&,
                const Activation&);
  void (*rows)(const S* grad, const S* x, S* grad_x, int64_t n, int64_t begin, int64_t end, const Numbers<C>&,
               const Activation&);
  // The sums again, where the derivative is one of y: also writes g. Null for other kinds.
  void (*form_plane)(const S* grad, const S* y, const S* x, S* g, int64_t n, int64_t planes, int64_t stride,
                     const Channel<C>&, const Activation&, PlaneSums<C>&);
  void (*form_rows)(const S* grad, const S* y, const S* x, S* g, int64_t n, int64_t begin, int64_t end,
                    const Numbers<C>&, const Activation&, C* first, C* second);
  // g where it is neither: from y, or from z in its place.
  RowDerivative<S> from_output;
  SlopeRow<S> from_z;
};

template <class D, class S>
void backward_sum_plane(const S* grad, const S* x, int64_t n, int64_t planes, int64_t stride,
                        const Channel<Compute<S>>& channel, const Activation& activation,
                        PlaneSums<Compute<S>>& result) {
  const auto p = parameters<S>(activation);
  PlaneSums<Compute<S>> sums = result;  // a copy, which stays in registers
  for (; planes > 0; --planes, grad += stride, x += stride) add_plane<D>(grad, x, n, channel, p, sums);
  result = sums;
}
template <class D, class S>
void backward_sum_rows(const S* grad, const S* x, int64_t n, int64_t begin, int64_t end,
                       const Numbers<Compute<S>>& numbers, const Activation& activation, Compute<S>* first,
                       Compute<S>* second) {
  const auto p = parameters<S>(activation);
  for_rows<kRowGroup>(begin, end, [&](int64_t row, auto size) {
    add_rows<D, size.value>(grad + row * n, n, x + row * n, n, n, numbers, p, first, second);
  });
}

template <class D, class S>
void backward_form_plane(const S* grad, const S* y, const S* x, S* g, int64_t n, int64_t planes, int64_t stride,
                         const Channel<Compute<S>>& numbers, const Activation& activation,
                         PlaneSums<Compute<S>>& result) {
  using C = Compute<S>;
  const auto p = parameters<S>(activation);
  const Channel<C> channel = numbers;  // copies, which no store can change
  PlaneSums<C> sums = result;
  for (; planes > 0; --planes, grad += stride, y += stride, x += stride, g += stride)
    for_vectors<C>(n, [&](int64_t i, auto lanes, int k) {
      const Vec<C> d = load_vector<C>(x + i, lanes) - channel.mean;
      const Vec<C> one = D::backward(in_register(load_vector<C>(grad + i, lanes)), load_vector<C>(y + i, lanes), p);
      store_vector(one, g + i, lanes);
      sums.a[k] = sums.a[k] + one;
      sums.b[k] = fma(one, first_lanes(d, lanes), sums.b[k]);
    });
  result = sums;
}
template <class D, class S>
void backward_form_rows(const S* grad, const S* y, const S* x, S* g, int64_t n, int64_t begin, int64_t end,
                        const Numbers<Compute<S>>& given, const Activation& activation, Compute<S>* first,
                        Compute<S>* second) {
  using C = Compute<S>;
  using V = Vec<C>;
  const auto p = parameters<S>(activation);
  const Numbers<C> numbers = given;  // a copy, which no store can change
  for_rows<kWritten>(begin, end, [&](int64_t row, auto size) {
    for_vectors<C>(n, [&](int64_t i, auto lanes, int) {
      const Channel<C> channel = channels_of(numbers, i);
      V a = V::zero(), b = V::zero();
      for (int r = 0; r < size.value; ++r) {
        const int64_t at = (row + r) * n + i;
        const V d = load_vector<C>(x + at, lanes) - channel.mean;
        const V one = D::backward(in_register(load_vector<C>(grad + at, lanes)), load_vector<C>(y + at, lanes), p);
        store_vector(one, g + at, lanes);
        a = a + one;
        b = fma(one, d, b);
      }
      (V::load(first + i) + a).store(first + i);
      (V::load(second + i) + b).store(second + i);
    });
  });
}

template <class S>
struct Backward {
  using C = Compute<S>;
  const Bound<BatchNormBackward>& args;
  const NormBackwardKernels<S>& kernels;
  const Walk& walk;
  const S *grad, *x, *saved;
  S *g, *grad_x;  // g: where the first pass writes grad_y f', or null
  const Numbers<C>& numbers;
  Parameter<S> gamma, beta;
  bool single;

  void read(int64_t c) const {
    numbers.mean[c] = static_cast<const C*>(args.mean)[c];
    numbers.scale[c] = static_cast<const C*>(args.rstd)[c] * gamma[c];
    numbers.beta[c] = beta[c];
  }

  // `a` and `b` are the sums of g and g (x - mean).
  void finish(int64_t c, double a, double b) const {
    const double rstd = static_cast<double>(static_cast<const C*>(args.rstd)[c]);
    const double scale = static_cast<double>(numbers.scale[c]), n = static_cast<double>(walk.size());
    numbers.slope[c] = static_cast<C>(scale * rstd * rstd * b / n);
    numbers.offset[c] = static_cast<C>(scale * a / n);
    if (args.with_grad_gamma) store_parameter<S>(args.grad_gamma, single, c, b * rstd);
    if (args.with_grad_beta) store_parameter<S>(args.grad_beta, single, c, a);
  }

  bool forms() const { return kernels.form_plane != nullptr && g != nullptr; }

  // g of n elements from `at` on, into a buffer, and where the first pass writes it. form(buffer) makes z of them.
  template <class Form>
  void form_g(int64_t at, int64_t n, C* buffer, Form form) const {
    if (args.saved_kind == Saved::output) {
      kernels.from_output(grad + at, saved + at, buffer, n, args.activation);
    } else {
      form(buffer);
      kernels.from_z(grad + at, buffer, n, args.activation);
    }
    if (g != nullptr) store_row(buffer, g + at, static_cast<int>(n));
  }

  // The sums of elements [begin, end) of a channel.
  void sum_channel(int64_t c, int64_t begin, int64_t end, double& a, double& b) const {
    const Channel<C> channel = channel_of(numbers, c);
    for (int64_t from = begin; from < end; from += kPlaneBlock) {
      PlaneSums<C> sums;
      for_planes(walk.inner, from, smaller(from + kPlaneBlock, end),
                 [&](int64_t plane, int64_t first, int64_t count, int64_t planes) {
                   const int64_t stride = walk.channels * walk.inner;
                   int64_t at = (plane * walk.channels + c) * walk.inner + first;
                   if (kernels.direct) {
                     kernels.sum_plane(grad + at, x + at, count, planes, stride, channel, args.activation, sums);
                     return;
                   }
                   if (forms()) {
                     kernels.form_plane(grad + at, saved + at, x + at, g + at, count, planes, stride, channel,
                                        args.activation, sums);
                     return;
                   }
                   alignas(64) C buffer[kPiece];
                   for (; planes > 0; --planes, at += stride)
                     for (int64_t i = 0; i < count; i += kPiece) {
                       const int64_t n = smaller(kPiece, count - i);
                       form_g(at + i, n, buffer, [&](C* z) {
                         const Parameters<S> none{};
                         if (args.with_residual)
                           normalize_plane<Identity, true>(x + at + i, saved + at + i, z, n, channel, none);
                         else
                           normalize_plane<Identity, false>(x + at + i, x, z, n, channel, none);
                       });
                       add_plane<Identity>(buffer, x + at + i, n, channel, Parameters<S>{}, sums);
                     }
                 });
      a += sums.first();
      b += sums.second();
    }
  }

  // The sums of rows [begin, end), for all channels. sums: a thread's arrays.
  void sum_part(int64_t begin, int64_t end, double* a, double* b, C* sums) const {
    const int64_t channels = walk.channels, padded = walk.padded;
    C *const first = sums, *const second = sums + padded;
    for (int64_t c = 0; c < channels; ++c) a[c] = b[c] = 0;
    for (int64_t from = begin; from < end; from += kBlockRows) {
      const int64_t to = smaller(from + kBlockRows, end);
      for (int64_t c = 0; c < padded; ++c) first[c] = second[c] = 0;
      if (kernels.direct) {
        kernels.sum_rows(grad, x, channels, from, to, numbers, args.activation, first, second);
      } else if (forms()) {
        kernels.form_rows(grad, saved, x, g, channels, from, to, numbers, args.activation, first, second);
      } else {
        for (int64_t row = from; row < to; ++row)
          for (int64_t c = 0; c < channels; c += kPiece)
            sum_piece(row * channels + c, c, smaller(kPiece, channels - c), first + c, second + c);
      }
      for (int64_t c = 0; c < channels; ++c) {
        a[c] += static_cast<double>(first[c]);
        b[c] += static_cast<double>(second[c]);
      }
    }
  }
  void sum_piece(int64_t at, int64_t c, int64_t n, C* first, C* second) const {
    alignas(64) C buffer[kPiece];
    const Numbers<C> here = from_channel(numbers, c);
    const Parameters<S> none{};
    form_g(at, n, buffer, [&](C* z) {
      if (args.with_residual)
        normalize_rows<Identity, true, 1>(x + at, saved + at, 0, z, 0, n, here, none);
      else
        normalize_rows<Identity, false, 1>(x + at, x, 0, z, 0, n, here, none);
    });
    add_rows<Identity, 1>(buffer, 0, x + at, 0, n, here, none, first, second);
  }

  void gradient(int64_t c, int64_t plane, int64_t first, int64_t count, int64_t planes) const {
    const int64_t at = (plane * walk.channels + c) * walk.inner + first;
    const S* const from = g != nullptr ? g : grad;
    kernels.plane(from + at, x + at, grad_x + at, count, planes, walk.channels * walk.inner, channel_of(numbers, c),
                  args.activation);
  }
};

template <class S>
void batch_norm_backward(const Bound<BatchNormBackward>& args, const NormBackwardKernels<S>& kernels, void* memory,
                         const Team& team) {
  using C = Compute<S>;
  const Walk& walk = kernels.walk;
  const Workspace<C> workspace(walk, memory);
  const bool single = args.param_dtype == DType::f32;
  S *const grad_x = static_cast<S*>(args.grad_x), *const grad_residual = static_cast<S*>(args.grad_residual);
  const Backward<S> backward = {args,
                                kernels,
                                walk,
                                static_cast<const S*>(args.grad_y),
                                static_cast<const S*>(args.x),
                                static_cast<const S*>(args.saved),
                                kernels.direct             ? nullptr
                                : grad_residual != nullptr ? grad_residual
                                                           : grad_x,
                                grad_x,
                                workspace.numbers,
                                {args.gamma, single, 1},
                                {args.beta, single, 0},
                                single};
  const bool sums = (args.training && args.with_grad_x) || args.with_grad_gamma || args.with_grad_beta;
  const bool first_pass = sums || !kernels.direct;
  const int64_t channels = walk.channels, inner = walk.inner, elements = walk.elements();
  const auto finish_all = [&] {
    for (int64_t part = 1; part < walk.parts; ++part) {
      const int64_t at = part * walk.padded;
      for (int64_t c = 0; c < channels; ++c) {
        workspace.first[c] += workspace.first[at + c];
        workspace.second[c] += workspace.second[at + c];
      }
    }
    for (int64_t c = 0; c < channels; ++c) backward.finish(c, workspace.first[c], workspace.second[c]);
  };
  for (int64_t c = 0; c < channels; ++c) backward.read(c);

  if (walk.rows()) {
    if (first_pass) {
      for_norm_units(team, elements, walk.parts, [&](int64_t part, int thread) {
        const int64_t at = part * walk.padded;
        backward.sum_part(walk.begin(part), walk.begin(part + 1), workspace.first + at, workspace.second + at,
                          workspace.sums + thread * Workspace<C>::kThreadArrays * walk.padded);
      });
      finish_all();
    }
    if (!args.with_grad_x) return;
    for_norm_units<false>(team, elements, walk.parts, [&](int64_t part, int) {
      kernels.rows(backward.g != nullptr ? backward.g : backward.grad, backward.x, grad_x, channels, walk.begin(part),
                   walk.begin(part + 1), workspace.numbers, args.activation);
    });
    return;
  }

  if (first_pass && walk.parts == 1) {
    for_norm_units(team, elements, channels, [&](int64_t c, int) {
      double a = 0, b = 0;
      backward.sum_channel(c, 0, walk.size(), a, b);
      backward.finish(c, a, b);
      if (!args.with_grad_x) return;
      backward.gradient(c, 0, 0, inner, walk.outer);
    });
    return;
  }
  if (first_pass) {
    for_norm_units(team, elements, channels * walk.parts, [&](int64_t unit, int) {
      const int64_t c = unit / walk.parts, part = unit % walk.parts;
      double a = 0, b = 0;
      backward.sum_channel(c, walk.begin(part), walk.begin(part + 1), a, b);
      workspace.first[part * walk.padded + c] = a;
      workspace.second[part * walk.padded + c] = b;
    });
    finish_all();
  }
  if (!args.with_grad_x) return;
  const int64_t step = 8 * kPlaneBlock, steps = ceil_div(inner, step);
  for_norm_units(team, elements, walk.outer * channels * steps, [&](int64_t unit, int) {
    const int64_t plane = unit / steps, first = unit % steps * step;
    backward.gradient(plane % channels, plane / channels, first, smaller(step, inner - first), 1);
  });
}

template <class S>
NormBackwardKernels<S> backward_kernels(const BatchNormBackward& call) {
  const ActivationKind kind = call.activation.kind;
  NormBackwardKernels<S> kernels = {};
  kernels.walk = walk_of(call.outer, call.channels, call.inner);
  kernels.direct =
      kind == ActivationKind::identity || (is_direct(kind) && call.saved_kind == Saved::input && !call.with_residual);
  if (!kernels.direct) {
    kernels.from_output = row_derivative<S>(kind);
    kernels.from_z = find_slope_row<S>(kind);
  }
  if (!kernels.direct && is_direct(kind) && call.saved_kind == Saved::output)
    with_direct_kind(kind, [&](auto, auto derivative) {
      kernels.form_plane = backward_form_plane<decltype(derivative), S>;
      kernels.form_rows = backward_form_rows<decltype(derivative), S>;
    });
  with_direct_kind(kernels.direct ? kind : ActivationKind::identity, [&](auto, auto derivative) {
    using D = decltype(derivative);
    kernels.sum_plane = backward_sum_plane<D, S>;
    kernels.sum_rows = backward_sum_rows<D, S>;
    kernels.plane = call.training ? gradient_plane<D, true, S> : gradient_plane<D, false, S>;
    kernels.rows = call.training ? gradient_rows<D, true, S> : gradient_rows<D, false, S>;
  });
  return kernels;
}
