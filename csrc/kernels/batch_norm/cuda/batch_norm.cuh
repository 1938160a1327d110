// batch_norm, forward and backward: a sum over every channel, and a pass that uses it.
//
// A block has a part of a channel (planes), or a tile of channels and a part of the rows (rows, inner == 1). Where
// there are enough blocks without, a channel has one part: then one launch does both, the second time from L2. Else
// there are three: the sums of the parts, which one warp for each channel joins in order, and the pass.
//
// A Pass (Forward, Backward) is what both kernels do to an element. Sums of a chunk of elements that are in registers
// are of the compute type; those over chunks, threads and parts are float64.
#pragma once

#include "../../common/cuda/units.cuh"
#include "../batch_norm.h"

namespace fastops::cuda {
namespace {

// Units that a thread loads before it computes, and rows. Not measured.
template <class S>
constexpr int kPlaneUnits = kBatch<kVector<S>, sizeof(S)>;

// What a pass knows of a channel. With d = x - mean: z = d scale + beta, grad_x = g scale - d slope - offset.
template <class C>
struct Channel {
  C mean, scale, beta, slope, offset;
};

// Of a channel or a part of it. Forward: of values, their number, mean and squared deviations from it. Backward: the
// sums of g and of g d.
struct ChannelSums {
  double count, first, second;
};

__device__ inline ChannelSums joined(const ChannelSums& a, const ChannelSums& b, bool moments) {
  if (!moments) return {0, a.first + b.first, a.second + b.second};
  const double count = a.count + b.count;
  if (count == 0) return a;
  const double share = b.count / count, difference = b.first - a.first;
  // The mean is infinite where one is.
  return {count, a.first * (1 - share) + b.first * share,
          a.second + b.second + (b.count == 0 || a.count == 0 ? 0 : difference * difference * (a.count * share))};
}
__device__ inline ChannelSums of_lane(const ChannelSums& sums, int distance) {
  return {__shfl_xor_sync(0xffffffffu, sums.count, distance), __shfl_xor_sync(0xffffffffu, sums.first, distance),
          __shfl_xor_sync(0xffffffffu, sums.second, distance)};
}

template <class S>
struct BatchNormTask {
  int64_t outer, channels, inner;
  Units units;    // of the planes of one channel
  int64_t parts;  // of a channel, or of all rows
  bool vectors;
  int lanes;       // threads along a row, a power of two up to 32
  bool with_sums;  // this launch forms the sums; else it reads what was made of them
  bool training;
  bool single;  // gamma, beta and running statistics are float32
  ActivationKind kind;
  Parameters<S> parameters;
  const S *x, *more;  // more: residual, or y
  const void *gamma, *beta;
  ChannelSums* partial;  // [parts][channels]

  __device__ Compute<S> parameter(const void* from, int64_t c, Compute<S> otherwise) const {
    if (from == nullptr) return otherwise;
    if (single) return static_cast<Compute<S>>(static_cast<const float*>(from)[c]);
    return to_compute(static_cast<const S*>(from)[c]);
  }
  __device__ void set_parameter(void* to, int64_t c, double value) const {
    if (single)
      static_cast<float*>(to)[c] = static_cast<float>(value);
    else
      to_storage(static_cast<Compute<S>>(value), static_cast<S*>(to) + c);
  }
};

// ---- the activation: ReLU in registers, the others by a function that is not inlined

template <class S>
__device__ __noinline__ Compute<S> activated(ActivationKind kind, Parameters<S> p, Compute<S> z) {
  return with_kind(kind, [&](auto k) { return decltype(k)::forward(Vec<Compute<S>>{z}, p).v; });
}
template <class S>
__device__ __noinline__ Compute<S> sloped(ActivationKind kind, bool from_output, Parameters<S> p, Compute<S> g,
                                          Compute<S> at) {
  using V = Vec<Compute<S>>;
  if (!from_output && kind == ActivationKind::sigmoid) at = Sigmoid::forward(V{at}, p).v;
  if (!from_output && kind == ActivationKind::tanh) at = Tanh::forward(V{at}, p).v;
  return with_derivative(kind, from_output && kind == ActivationKind::softshrink,
                         [&](auto derivative) { return decltype(derivative)::backward(V{g}, V{at}, p).v; });
}

// ---- the passes

template <class S>
struct Forward : BatchNormTask<S> {
  using Storage = S;
  using C = Compute<S>;
  static constexpr bool kMoments = true;
  static constexpr int kSummed = 1, kRead = 2, kWritten = 1;  // operands of the sums; operands and results of the pass
  static constexpr int kRows = 8;
  double eps, momentum;
  S* y;
  C *mean, *rstd;  // in training not null
  void *running_mean, *running_var;

  __device__ const S* operand(int i) const { return i == 0 ? this->x : this->more; }
  __device__ S* result(int) const { return y; }
  __device__ bool has_results() const { return true; }

  __device__ Channel<C> channel(int64_t c) const {
    if (this->training && this->with_sums) return {};
    C m, r;
    if (this->training) {
      m = mean[c];
      r = rstd[c];
    } else {
      m = this->parameter(running_mean, c, C(0));
      r = of_variance(static_cast<double>(this->parameter(running_var, c, C(1))));
    }
    return {m, r * this->parameter(this->gamma, c, C(1)), this->parameter(this->beta, c, C(0)), C(0), C(0)};
  }
  __device__ C of_variance(double variance) const { return static_cast<C>(1 / ::sqrt(variance + eps)); }
  // In eval mode, by one thread for each channel.
  __device__ void publish(int64_t c) const {
    if (this->training || mean == nullptr) return;
    mean[c] = this->parameter(running_mean, c, C(0));
    rstd[c] = of_variance(static_cast<double>(this->parameter(running_var, c, C(1))));
  }

  // The chunks of a thread: their means are shifted by the first one's.
  struct Running {
    C shift = 0;
    double count = 0, first = 0, second = 0, inside = 0;
  };
  template <int n, class Get>
  __device__ void add(Running& running, const Channel<C>&, unsigned valid, Get get) const {
    const auto there = [&](int i) { return (valid >> i & 1) != 0; };
    C sum = 0;
    int count = 0;
#pragma unroll
    for (int i = 0; i < n; ++i)
      if (there(i)) {
        sum += get(0, i);
        ++count;
      }
    if (count == 0) return;
    const C center = sum / static_cast<C>(count);
    C rest = 0, squares = 0;
#pragma unroll
    for (int i = 0; i < n; ++i)
      if (there(i)) {
        const Vec<C> d{get(0, i) - center};
        rest += d.v;
        squares = fma(d, d, Vec<C>{squares}).v;
      }
    const double weight = count, inverse = 1 / weight;
    double middle = static_cast<double>(rest) * inverse;
    double inside = static_cast<double>(squares) - static_cast<double>(rest) * middle;
    middle += static_cast<double>(center);
    if (!(squares - squares == 0)) {  // squares that overflow, infinities and NaN
      double total = 0;
#pragma unroll
      for (int i = 0; i < n; ++i)
        if (there(i)) total += static_cast<double>(get(0, i));
      middle = total * inverse;
      inside = 0;
#pragma unroll
      for (int i = 0; i < n; ++i)
        if (there(i)) {
          const double d = static_cast<double>(get(0, i)) - middle;
          inside += d * d;
        }
    }
    if (running.count == 0 && center - center == 0) running.shift = center;
    const double distance = middle - static_cast<double>(running.shift);
    running.count += weight;
    running.first += weight * distance;
    running.second += weight * distance * distance;
    running.inside += inside;
  }
  __device__ static ChannelSums sums_of(const Running& r) {
    if (r.count == 0) return {0, 0, 0};
    return {r.count, static_cast<double>(r.shift) + r.first / r.count,
            r.inside + (r.second - r.first * r.first / r.count)};
  }

  __device__ Channel<C> finish(int64_t c, const ChannelSums& sums) const {
    const double squares = sums.second < 0 ? 0 : sums.second;
    const C m = static_cast<C>(sums.first), r = of_variance(squares / sums.count);
    mean[c] = m;
    rstd[c] = r;
    if (running_mean != nullptr) {
      const auto update = [&](void* running, double value) {
        const double old = static_cast<double>(this->parameter(running, c, C(0)));
        this->set_parameter(running, c, momentum * value + (1 - momentum) * old);
      };
      update(running_mean, sums.first);
      update(running_var, squares / (sums.count - 1));
    }
    return {m, r * this->parameter(this->gamma, c, C(1)), this->parameter(this->beta, c, C(0)), C(0), C(0)};
  }

  template <class Get>
  __device__ void apply(const Channel<C>& channel, Get get, C (&results)[kWritten]) const {
    using V = Vec<C>;
    V z = fma(V{get(0) - channel.mean}, V{channel.scale}, V{channel.beta}) + V{get(1)};
    if (this->kind == ActivationKind::relu)
      z = Relu::forward(z, this->parameters);
    else if (this->kind != ActivationKind::identity)
      z.v = activated<S>(this->kind, this->parameters, z.v);
    results[0] = z.v;
  }
};

template <class S>
struct Backward : BatchNormTask<S> {
  using Storage = S;
  using C = Compute<S>;
  static constexpr bool kMoments = false;
  static constexpr int kSummed = 3, kRead = 3, kWritten = 2;
  static constexpr int kRows = 4;
  bool from_output;
  const S* grad_y;
  const C *mean, *rstd;
  S *grad_x, *grad_residual;
  void *grad_gamma, *grad_beta;
  C *slope, *offset;  // in training

  __device__ const S* operand(int i) const { return i == 0 ? grad_y : i == 1 ? this->x : this->more; }
  __device__ S* result(int i) const { return i == 0 ? grad_x : grad_residual; }
  __device__ bool has_results() const { return grad_x != nullptr || grad_residual != nullptr; }

  __device__ Channel<C> channel(int64_t c) const {
    const bool reads = this->training && !this->with_sums;
    return {mean[c], rstd[c] * this->parameter(this->gamma, c, C(1)), this->parameter(this->beta, c, C(0)),
            reads ? slope[c] : C(0), reads ? offset[c] : C(0)};
  }
  __device__ void publish(int64_t) const {}

  // grad_y f'
  template <class Get>
  __device__ C gradient_of_z(const Channel<C>& channel, C d, Get get) const {
    using V = Vec<C>;
    const C g = get(0);
    if (this->kind == ActivationKind::identity) return g;
    const C at = from_output ? get(2) : (fma(V{d}, V{channel.scale}, V{channel.beta}) + V{get(2)}).v;
    if (this->kind == ActivationKind::relu) return Piecewise<Relu>::backward(V{g}, V{at}, this->parameters).v;
    return sloped<S>(this->kind, from_output, this->parameters, g, at);
  }

  struct Running {
    double first = 0, second = 0;
  };
  template <int n, class Get>
  __device__ void add(Running& running, const Channel<C>& channel, unsigned valid, Get get) const {
    C first = 0, second = 0;
#pragma unroll
    for (int i = 0; i < n; ++i)
      if ((valid >> i & 1) != 0) {
        const C d = get(1, i) - channel.mean;
        const C g = gradient_of_z(channel, d, [&](int operand) { return get(operand, i); });
        first += g;
        second = fma(Vec<C>{g}, Vec<C>{d}, Vec<C>{second}).v;
      }
    running.first += static_cast<double>(first);
    running.second += static_cast<double>(second);
  }
  __device__ static ChannelSums sums_of(const Running& r) { return {0, r.first, r.second}; }

  __device__ Channel<C> finish(int64_t c, const ChannelSums& sums) const {
    Channel<C> result = channel(c);
    const double r = static_cast<double>(rstd[c]), scale = static_cast<double>(result.scale);
    if (grad_gamma != nullptr) this->set_parameter(grad_gamma, c, sums.second * r);
    if (grad_beta != nullptr) this->set_parameter(grad_beta, c, sums.first);
    if (!this->training) return result;
    const double n = static_cast<double>(this->outer * this->inner);
    result.slope = static_cast<C>(scale * r * r * sums.second / n);
    result.offset = static_cast<C>(scale * sums.first / n);
    slope[c] = result.slope;
    offset[c] = result.offset;
    return result;
  }

  template <class Get>
  __device__ void apply(const Channel<C>& channel, Get get, C (&results)[kWritten]) const {
    using V = Vec<C>;
    const C d = get(1) - channel.mean;
    const V g{gradient_of_z(channel, d, get)};
    // An x that is not finite has a gradient in eval mode.
    results[0] = this->training ? fma(g, V{channel.scale}, fma(-V{d}, V{channel.slope}, -V{channel.offset})).v
                                : g.v * channel.scale;
    results[1] = g.v;
  }
};

// ---- the kernels

// n elements at `at` of the first `operands` operands, of which the first `count` exist.
template <int operands, int n, class Pass>
__device__ inline void load_operands(const Pass& pass, typename Pass::Storage (&to)[operands][n], int64_t at,
                                     int count) {
#pragma unroll
  for (int i = 0; i < operands; ++i) {
    const typename Pass::Storage* const from = pass.operand(i);
    load_unit(to[i], from + at, from != nullptr ? count : 0, pass.vectors);
  }
}

template <int n, class Pass>
__device__ inline void apply_unit(const Pass& pass, const Channel<Compute<typename Pass::Storage>>* channels, int step,
                                  const typename Pass::Storage (&read)[Pass::kRead][n], int64_t at, int count) {
  using S = typename Pass::Storage;
  alignas(16) S written[Pass::kWritten][n];
#pragma unroll
  for (int i = 0; i < n; ++i) {
    Compute<S> results[Pass::kWritten];
    pass.apply(channels[i * step], [&](int operand) { return to_compute(read[operand][i]); }, results);
#pragma unroll
    for (int k = 0; k < Pass::kWritten; ++k) to_storage(results[k], &written[k][i]);
  }
#pragma unroll
  for (int k = 0; k < Pass::kWritten; ++k)
    if (pass.result(k) != nullptr) store_unit(pass.result(k) + at, written[k], count, pass.vectors);
}

// One block for each channel and part of its units.
template <class Pass>
__global__ void __launch_bounds__(kThreads) batch_norm_planes_kernel(const __grid_constant__ Pass pass) {
  using S = typename Pass::Storage;
  using C = Compute<S>;
  constexpr int n = kVector<S>, batch = kPlaneUnits<S>;
  const int64_t c = blockIdx.x / pass.parts, part = blockIdx.x % pass.parts;
  const int64_t begin = pass.units.units * part / pass.parts, end = pass.units.units * (part + 1) / pass.parts;
  Channel<C> channel = pass.channel(c);
  const auto address = [&](const Place& place) { return (place.row * pass.channels + c) * pass.inner + place.col; };
  if (pass.with_sums) {
    typename Pass::Running running;
    for (int64_t first = begin + threadIdx.x; first < end; first += kThreads * batch) {
      alignas(16) S read[batch][Pass::kSummed][n];
      unsigned valid = 0;
#pragma unroll
      for (int b = 0; b < batch; ++b) {
        const int64_t unit = first + b * kThreads;
        if (unit >= end) continue;
        const Place place = place_of<n>(unit, pass.units);
        load_operands<Pass::kSummed>(pass, read[b], address(place), place.count);
        valid |= ((1u << place.count) - 1) << b * n;
      }
      pass.template add<batch * n>(running, channel, valid,
                                   [&](int operand, int i) { return to_compute(read[i / n][operand][i % n]); });
    }
    ChannelSums sums = Pass::sums_of(running);
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) sums = joined(sums, of_lane(sums, distance), Pass::kMoments);
    ChannelSums* const warps = static_cast<ChannelSums*>(shared_memory());
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = sums;
    __syncthreads();
    Channel<C>* const finished = reinterpret_cast<Channel<C>*>(warps + kThreads / 32);
    if (threadIdx.x == 0) {
      for (int warp = 1; warp < kThreads / 32; ++warp) sums = joined(sums, warps[warp], Pass::kMoments);
      if (pass.parts > 1)
        pass.partial[part * pass.channels + c] = sums;
      else
        *finished = pass.finish(c, sums);
    }
    if (pass.parts > 1 || !pass.has_results()) return;
    __syncthreads();  // the channel is finished
    channel = *finished;
  } else if (part == 0 && threadIdx.x == 0) {
    pass.publish(c);
  }
  for (int64_t first = begin + threadIdx.x; first < end; first += kThreads * batch) {
    alignas(16) S read[batch][Pass::kRead][n];
    Place places[batch];
#pragma unroll
    for (int b = 0; b < batch; ++b)
      if (first + b * kThreads < end) {
        places[b] = place_of<n>(first + b * kThreads, pass.units);
        load_operands<Pass::kRead>(pass, read[b], address(places[b]), places[b].count);
      }
#pragma unroll
    for (int b = 0; b < batch; ++b)
      if (first + b * kThreads < end) apply_unit(pass, &channel, 0, read[b], address(places[b]), places[b].count);
  }
}

// One block for each part of the rows and tile of channels. A thread has a vector of channels, in every `workers`-th
// row.
template <class Pass>
__global__ void __launch_bounds__(kThreads, 1) batch_norm_rows_kernel(const __grid_constant__ Pass pass) {
  using S = typename Pass::Storage;
  using C = Compute<S>;
  constexpr int n = kVector<S>, rows = Pass::kRows;
  const int lanes = pass.lanes, lane = static_cast<int>(threadIdx.x) % lanes;
  const int64_t workers = kThreads / lanes, worker = threadIdx.x / lanes;
  const int64_t tiles = (pass.channels + lanes * n - 1) / (lanes * n);
  const int64_t part = blockIdx.x / tiles, c = (blockIdx.x % tiles * lanes + lane) * n, left = pass.channels - c;
  const int count = left < 0 ? 0 : left < n ? static_cast<int>(left) : n;
  const int64_t begin = pass.outer * part / pass.parts, end = pass.outer * (part + 1) / pass.parts;
  Channel<C> channels[n];
#pragma unroll
  for (int i = 0; i < n; ++i) channels[i] = i < count ? pass.channel(c + i) : Channel<C>{};
  if (pass.with_sums) {
    typename Pass::Running running[n];
    for (int64_t first = begin + worker; first < end && count > 0; first += workers * rows) {
      alignas(16) S read[rows][Pass::kSummed][n];
      unsigned valid = 0;
#pragma unroll
      for (int r = 0; r < rows; ++r) {
        const int64_t row = first + r * workers;
        if (row >= end) continue;
        load_operands<Pass::kSummed>(pass, read[r], row * pass.channels + c, count);
        valid |= 1u << r;
      }
#pragma unroll
      for (int i = 0; i < n; ++i)
        pass.template add<rows>(running[i], channels[i], valid,
                                [&](int operand, int r) { return to_compute(read[r][operand][i]); });
    }
    ChannelSums* const warps = static_cast<ChannelSums*>(shared_memory());
    Channel<C>* const finished = reinterpret_cast<Channel<C>*>(warps + kThreads);
#pragma unroll
    for (int i = 0; i < n; ++i) {
      ChannelSums sums = Pass::sums_of(running[i]);
      for (int distance = 16; distance >= lanes; distance /= 2)
        sums = joined(sums, of_lane(sums, distance), Pass::kMoments);
      if (static_cast<int>(threadIdx.x) % 32 < lanes) warps[threadIdx.x / 32 * lanes + lane] = sums;
      __syncthreads();  // the sums of all warps are there
      if (static_cast<int>(threadIdx.x) < lanes && i < count) {
        for (int warp = 1; warp < kThreads / 32; ++warp)
          sums = joined(sums, warps[warp * lanes + lane], Pass::kMoments);
        if (pass.parts > 1)
          pass.partial[part * pass.channels + c + i] = sums;
        else
          finished[lane * n + i] = pass.finish(c + i, sums);
      }
      __syncthreads();  // nobody reads them any more
    }
    if (pass.parts > 1 || !pass.has_results()) return;
#pragma unroll
    for (int i = 0; i < n; ++i)
      if (i < count) channels[i] = finished[lane * n + i];
  } else if (part == 0 && worker == 0) {
    for (int i = 0; i < count; ++i) pass.publish(c + i);
  }
  for (int64_t first = begin + worker; first < end && count > 0; first += workers * 4) {
    alignas(16) S read[4][Pass::kRead][n];
#pragma unroll
    for (int r = 0; r < 4; ++r)
      if (first + r * workers < end)
        load_operands<Pass::kRead>(pass, read[r], (first + r * workers) * pass.channels + c, count);
#pragma unroll
    for (int r = 0; r < 4; ++r)
      if (first + r * workers < end)
        apply_unit(pass, channels, 1, read[r], (first + r * workers) * pass.channels + c, count);
  }
}

// What the parts of a channel make together. One warp for each channel.
template <class Pass>
__global__ void __launch_bounds__(kThreads) batch_norm_finish_kernel(const __grid_constant__ Pass pass) {
  const int64_t c = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / 32;
  if (c >= pass.channels) return;
  ChannelSums sums{0, 0, 0};
  for (int64_t part = threadIdx.x % 32; part < pass.parts; part += 32)
    sums = joined(sums, pass.partial[part * pass.channels + c], Pass::kMoments);
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) sums = joined(sums, of_lane(sums, distance), Pass::kMoments);
  if (threadIdx.x % 32 == 0) pass.finish(c, sums);
}

}  // namespace
}  // namespace fastops::cuda
