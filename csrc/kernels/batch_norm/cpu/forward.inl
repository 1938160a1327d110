// batch_norm_forward.
#pragma once

#include "moments.inl"

// y[i] = f((x[i] - mean) scale + beta + residual[i]) for a row of one channel.
template <class Kind, bool residual, class S, class Out>
inline void normalize_plane(const S* x, const S* more, Out* y, int64_t n, Channel<Compute<S>> channel,
                            Parameters<S> p) {
  using C = Compute<S>;
  for_vectors<C>(n, [&](int64_t i, auto lanes, int) {
    Vec<C> z = fma(load_vector<C>(x + i, lanes) - channel.mean, channel.scale, channel.beta);
    if constexpr (residual) z = z + load_vector<C>(more + i, lanes);
    store_vector(Kind::forward(z, p), y + i, lanes);
  });
}

// The same for `size` rows of n channels, `stride` apart in x and residual.
template <class Kind, bool residual, int size, class S, class Out>
inline void normalize_rows(const S* x, const S* more, int64_t stride, Out* y, int64_t y_stride, int64_t n,
                           Numbers<Compute<S>> numbers, Parameters<S> p) {
  using C = Compute<S>;
  for_vectors<C>(n, [&](int64_t i, auto lanes, int) {
    const Channel<C> channel = channels_of(numbers, i);
    for (int r = 0; r < size; ++r) {
      Vec<C> z = fma(load_vector<C>(x + r * stride + i, lanes) - channel.mean, channel.scale, channel.beta);
      if constexpr (residual) z = z + load_vector<C>(more + r * stride + i, lanes);
      store_vector(Kind::forward(z, p), y + r * y_stride + i, lanes);
    }
  });
}

template <class S>
struct NormForwardKernels {
  using C = Compute<S>;
  Walk walk;
  // n elements of each of `planes` planes of channel c; rows [begin, end). `row` is the activation, where these have
  // none.
  void (*plane)(const NormForwardKernels&, const S* x, const S* more, S* y, int64_t n, int64_t planes,
                const Numbers<C>&, int64_t c, const Activation&);
  void (*rows)(const NormForwardKernels&, const S* x, const S* more, S* y, int64_t begin, int64_t end,
               const Numbers<C>&, const Activation&);
  ForwardRow<C, S> row;
};

template <class Kind, bool residual, class S>
void forward_plane(const NormForwardKernels<S>& kernels, const S* x, const S* more, S* y, int64_t n, int64_t planes,
                   const Numbers<Compute<S>>& numbers, int64_t c, const Activation& activation) {
  const int64_t stride = kernels.walk.channels * kernels.walk.inner;
  const auto channel = channel_of(numbers, c);
  const auto p = parameters<S>(activation);
  for (int64_t at = 0; planes > 0; --planes, at += stride)
    normalize_plane<Kind, residual>(x + at, more + at, y + at, n, channel, p);
}
template <bool residual, class S>
void forward_plane_through(const NormForwardKernels<S>& kernels, const S* x, const S* more, S* y, int64_t n,
                           int64_t planes, const Numbers<Compute<S>>& numbers, int64_t c,
                           const Activation& activation) {
  alignas(64) Compute<S> z[kPiece];
  const int64_t stride = kernels.walk.channels * kernels.walk.inner;
  const auto channel = channel_of(numbers, c);
  for (int64_t plane = 0; plane < planes; ++plane) {
    for (int64_t i = 0; i < n; i += kPiece) {
      const int64_t count = smaller(kPiece, n - i), at = plane * stride + i;
      normalize_plane<Identity, residual>(x + at, more + at, z, count, channel, Parameters<S>{});
      kernels.row(z, y + at, count, activation);
    }
  }
}

template <class Kind, bool residual, class S>
void forward_rows(const NormForwardKernels<S>& kernels, const S* x, const S* more, S* y, int64_t begin, int64_t end,
                  const Numbers<Compute<S>>& numbers, const Activation& activation) {
  const int64_t n = kernels.walk.channels;
  const auto p = parameters<S>(activation);
  for_rows<kWritten>(begin, end, [&](int64_t row, auto size) {
    normalize_rows<Kind, residual, size.value>(x + row * n, more + row * n, n, y + row * n, n, n, numbers, p);
  });
}
template <bool residual, class S>
void forward_rows_through(const NormForwardKernels<S>& kernels, const S* x, const S* more, S* y, int64_t begin,
                          int64_t end, const Numbers<Compute<S>>& numbers, const Activation& activation) {
  alignas(64) Compute<S> z[kPiece];
  const int64_t n = kernels.walk.channels;
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t c = 0; c < n; c += kPiece) {
      const int64_t count = smaller(kPiece, n - c), at = row * n + c;
      normalize_rows<Identity, residual, 1>(x + at, more + at, n, z, kPiece, count, from_channel(numbers, c),
                                            Parameters<S>{});
      kernels.row(z, y + at, count, activation);
    }
  }
}

template <class S>
struct Forward {
  using C = Compute<S>;
  const Bound<BatchNormForward>& args;
  const NormForwardKernels<S>& kernels;
  const Walk& walk;
  const S *x, *residual;
  S* y;
  const Numbers<C>& numbers;
  Parameter<S> gamma, beta;
  bool single;

  // What is known of a channel's batch becomes its numbers, results and running statistics.
  void finish(int64_t c, const Moments& m) const {
    const double variance = m.squares / m.count;
    write(c, static_cast<C>(m.mean), static_cast<C>(1 / __builtin_sqrt(variance + args.eps)));
    if (!args.with_running) return;
    const auto update = [&](void* running, double value) {
      const double old = static_cast<double>(Parameter<S>{running, single, 0}[c]);
      store_parameter<S>(running, single, c, args.momentum * value + (1 - args.momentum) * old);
    };
    update(args.running_mean, m.mean);
    update(args.running_var, m.squares / (m.count - 1));
  }
  void read_running(int64_t c) const {
    const C mean = Parameter<S>{args.running_mean, single, 0}[c],
            variance = Parameter<S>{args.running_var, single, 0}[c];
    write(c, mean, static_cast<C>(1 / __builtin_sqrt(static_cast<double>(variance) + args.eps)));
  }
  void write(int64_t c, C mean, C rstd) const {
    if (args.with_stats) {
      static_cast<C*>(args.mean)[c] = mean;
      static_cast<C*>(args.rstd)[c] = rstd;
    }
    numbers.mean[c] = mean;
    numbers.scale[c] = rstd * gamma[c];
    numbers.beta[c] = beta[c];
  }

  void normalize(int64_t c, int64_t plane, int64_t first, int64_t count, int64_t planes) const {
    const int64_t at = (plane * walk.channels + c) * walk.inner + first;
    kernels.plane(kernels, x + at, residual + at, y + at, count, planes, numbers, c, args.activation);
  }
};

template <class S>
void batch_norm_forward(const Bound<BatchNormForward>& args, const NormForwardKernels<S>& kernels, void* memory,
                        const Team& team) {
  using C = Compute<S>;
  const bool training = !kInference && args.training;
  const Walk& walk = kernels.walk;
  const Workspace<C> workspace(walk, memory);
  const bool single = args.param_dtype == DType::f32;
  const S *const x = static_cast<const S*>(args.x), *const more = static_cast<const S*>(args.residual);
  // Nothing is read where there is no residual; adding to its address must be defined all the same.
  const Forward<S> forward = {args,
                              kernels,
                              walk,
                              x,
                              more != nullptr ? more : x,
                              static_cast<S*>(args.y),
                              workspace.numbers,
                              {args.gamma, single, 1},
                              {args.beta, single, 0},
                              single};
  const int64_t channels = walk.channels, inner = walk.inner, elements = walk.elements();
  const auto finish_all = [&] {
    join_parts(walk, workspace.first, workspace.second);
    for (int64_t c = 0; c < channels; ++c)
      forward.finish(c, {static_cast<double>(walk.size()), workspace.first[c], workspace.second[c]});
  };
  if (!training)
    for (int64_t c = 0; c < channels; ++c) forward.read_running(c);

  if (walk.rows()) {
    if (training) {
      for_norm_units(team, elements, walk.parts, [&](int64_t part, int thread) {
        const int64_t sums = part * walk.padded;
        row_moments(x, channels, walk.padded, walk.begin(part), walk.begin(part + 1), workspace.first + sums,
                    workspace.second + sums, workspace.sums + thread * Workspace<C>::kThreadArrays * walk.padded);
      });
      finish_all();
    }
    for_norm_units<false>(team, elements, walk.parts, [&](int64_t part, int) {
      kernels.rows(kernels, x, forward.residual, forward.y, walk.begin(part), walk.begin(part + 1), workspace.numbers,
                   args.activation);
    });
    return;
  }

  const auto moments = [&](int64_t c, int64_t part) {
    return plane_moments(x + c * inner, channels * inner, inner, walk.begin(part), walk.begin(part + 1));
  };
  if (training && walk.parts == 1) {
    for_norm_units(team, elements, channels, [&](int64_t c, int) {
      forward.finish(c, moments(c, 0));
      forward.normalize(c, 0, 0, inner, walk.outer);
    });
    return;
  }
  if (training) {
    for_norm_units(team, elements, channels * walk.parts, [&](int64_t unit, int) {
      const int64_t c = unit / walk.parts, part = unit % walk.parts;
      const Moments m = moments(c, part);
      workspace.first[part * walk.padded + c] = m.mean;
      workspace.second[part * walk.padded + c] = m.squares;
    });
    finish_all();
  }
  // In the order of memory.
  const int64_t step = 8 * kPlaneBlock, steps = ceil_div(inner, step);
  for_norm_units(team, elements, walk.outer * channels * steps, [&](int64_t unit, int) {
    const int64_t plane = unit / steps, first = unit % steps * step;
    forward.normalize(plane % channels, plane / channels, first, smaller(step, inner - first), 1);
  });
}

template <class S>
NormForwardKernels<S> forward_kernels(const BatchNormForward& call) {
  const ActivationKind kind = call.activation.kind;
  const auto with_residual = [&](auto residual) -> NormForwardKernels<S> {
    constexpr bool with = residual.value != 0;
    NormForwardKernels<S> kernels = {walk_of(call.outer, call.channels, call.inner), forward_plane_through<with, S>,
                                     forward_rows_through<with, S>, nullptr};
    if (!is_direct(kind)) {
      kernels.row = find_forward_row<Compute<S>, S>(kind);
      return kernels;
    }
    with_direct_kind(kind, [&](auto direct, auto) {
      kernels.plane = forward_plane<decltype(direct), with, S>;
      kernels.rows = forward_rows<decltype(direct), with, S>;
    });
    return kernels;
  };
  return call.with_residual ? with_residual(Fixed<1>{}) : with_residual(Fixed<0>{});
}
