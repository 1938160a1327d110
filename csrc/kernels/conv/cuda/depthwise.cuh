// Convolutions whose groups have one input channel. There is no matrix product; one thread computes one element of the
// output, or of the gradient of the input. The weight gradient is summed in two steps, in a fixed order.
#pragma once

#include "conv.cuh"

namespace fastops::cuda {
namespace {

// The strides of a dense image in either layout, for element (b, c, at).
template <class S>
struct DepthwiseImage {
  const S* data;
  int64_t image_stride, stride[3], channel_stride;
};

constexpr int kDepthwiseThreads = 256;

template <class S>
__device__ inline Compute<S> sloped(const Slope<S>& slope, S value, const S* saved) {
  using V = Vec<Compute<S>>;
  Compute<S> result = to_compute(value);
  if (slope.kind != ActivationKind::identity)
    with_folded(slope.kind, [&](auto kind) {
      result = decltype(kind)::backward(V{result}, V{to_compute(*saved)}, slope.parameters).v;
    });
  return result;
}

// ---- output, and gradient of the input

// The result has `channels` channels. A channel of the output reads one input channel, which `multiplier` output
// channels share; a channel of the input's gradient reads these `multiplier` output channels. There is one filter per
// output channel.
template <class S>
struct DepthwiseTask {
  ConvShape shape;
  int64_t count, channels, multiplier;
  bool channels_last;
  DepthwiseImage<S> from;
  const S* saved;  // y of the activation, if an incoming gradient is read
  Slope<S> slope;
  const S* w;  // [output channels][taps]
  const S* bias;
  ActivationKind kind;
  Parameters<S> parameters;
  S* y;
  S* z;
};

template <class S>
__global__ void __launch_bounds__(kDepthwiseThreads, 4)
    depthwise_kernel(const __grid_constant__ DepthwiseTask<S> task) {
  using C = Compute<S>;
  const ConvShape& s = task.shape;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kDepthwiseThreads + threadIdx.x;
  if (index >= task.count) return;
  int64_t rest = index;
  const auto take = [&](int64_t extent) {
    const int64_t quotient = short_quotient(rest, extent), value = rest - quotient * extent;
    rest = quotient;
    return value;
  };
  int64_t channel = 0;
  if (task.channels_last) channel = take(task.channels);
  ConvAxis axis[3];
  int begin[3];  // the element that the first tap reads
#pragma unroll
  for (int i = 2; i >= 0; --i) {
    const int at = static_cast<int>(take(s.gradient ? s.in[i] : s.out[i])), phases = phases_of(s, i);
    const int position = at / phases;
    axis[i] = axis_of(s, i, at - position * phases);
    begin[i] = position * axis[i].step + axis[i].origin;
  }
  if (!task.channels_last) channel = take(task.channels);

  const int taps = s.kernel[0] * s.kernel[1] * s.kernel[2];
  const int64_t filters = s.gradient ? task.multiplier : 1, first = channel * filters;
  C sum = 0;
  for (int64_t filter = first; filter < first + filters; ++filter) {
    const int64_t read = s.gradient ? filter : short_quotient(filter, task.multiplier);
    const int64_t image = rest * task.from.image_stride + read * task.from.channel_stride;
    for (int d = 0; d < axis[0].taps; ++d)
      for (int h = 0; h < axis[1].taps; ++h)
        for (int w = 0; w < axis[2].taps; ++w) {
          const int at[3] = {begin[0] + d * axis[0].tap_step, begin[1] + h * axis[1].tap_step,
                             begin[2] + w * axis[2].tap_step};
          bool inside = true;
          int64_t offset = image;
#pragma unroll
          for (int i = 0; i < 3; ++i) {
            inside = inside && static_cast<unsigned>(at[i]) < static_cast<unsigned>(axis[i].size);
            offset += at[i] * task.from.stride[i];
          }
          if (!inside) continue;
          const int tap =
              ((axis[0].tap_first + d * axis[0].tap_jump) * s.kernel[1] + axis[1].tap_first + h * axis[1].tap_jump) *
                  s.kernel[2] +
              axis[2].tap_first + w * axis[2].tap_jump;
          const C value = sloped(task.slope, task.from.data[offset], task.saved + offset);
          sum = fma(Vec<C>{value}, Vec<C>{to_compute(task.w[filter * taps + tap])}, Vec<C>{sum}).v;
        }
  }
  if (task.bias != nullptr) sum += to_compute(task.bias[channel]);
  if (task.z != nullptr) to_storage(sum, task.z + index);
  if (task.kind != ActivationKind::identity) sum = activate<S>(task.kind, task.parameters, {sum, sum}).first;
  to_storage(sum, task.y + index);
}

// ---- gradients of weight and bias

// Taps per thread. There are blocks for every so many taps, each of which reads the images.
constexpr int kDepthwiseTaps = 9;

// partial: [splits][output channels][taps, then the bias].
template <class S>
struct DepthwiseWeightTask {
  ConvShape shape;
  int64_t positions, positions_per_split;  // of the batch
  int channels, multiplier;                // output channels, and output channels per input channel
  int lanes;                               // contiguous channels per block, 1 or 32
  int channel_blocks, tap_blocks, splits;
  DepthwiseImage<S> g, x;
  const S* saved;
  Slope<S> slope;
  S* grad_w;     // nullable: [channels][taps]
  S* grad_bias;  // nullable
  Compute<S>* partial;
};

struct DepthwiseShared {
  static constexpr size_t kWindow = kDepthwiseThreads * sizeof(double);
  static constexpr size_t kBytes = kWindow + sizeof(ConvWindow);
};

template <class S>
__global__ void __launch_bounds__(kDepthwiseThreads)
    depthwise_weight_kernel(const __grid_constant__ DepthwiseWeightTask<S> task) {
  using C = Compute<S>;
  const ConvShape& s = task.shape;
  char* const shared = static_cast<char*>(shared_memory());
  C* const sums = reinterpret_cast<C*>(shared);
  ConvWindow* const window = reinterpret_cast<ConvWindow*>(shared + DepthwiseShared::kWindow);
  open_window(window, s, 0);

  const int thread = static_cast<int>(threadIdx.x);
  int block = static_cast<int>(blockIdx.x);
  const int channel = block % task.channel_blocks * task.lanes + thread % task.lanes;
  block /= task.channel_blocks;
  const int first_tap = block % task.tap_blocks * kDepthwiseTaps, split = block / task.tap_blocks;
  const int workers = kDepthwiseThreads / task.lanes, worker = thread / task.lanes;
  const int64_t begin = split * task.positions_per_split, rest = task.positions - begin;
  const int64_t end = begin + (rest < task.positions_per_split ? rest : task.positions_per_split);
  const int taps = s.kernel[0] * s.kernel[1] * s.kernel[2];
  const int left = task.grad_w == nullptr ? 0 : taps - first_tap;

  C sum[kDepthwiseTaps] = {}, sum_of_g = 0;
  ConvTap first{0, {0, 0, first_tap}};
  advance(first, *window, divisor_of(1), 0);
  ConvPosition p = position_at(*window, begin + worker);
  for (int64_t position = begin + worker; channel < task.channels && position < end; position += workers) {
    int64_t at = p.image * task.g.image_stride + channel * task.g.channel_stride;
#pragma unroll
    for (int i = 0; i < 3; ++i) at += p.at[i] * task.g.stride[i];
    const C g = sloped(task.slope, task.g.data[at], task.saved + at);
    sum_of_g += g;
    const int64_t image = p.image * task.x.image_stride + channel / task.multiplier * task.x.channel_stride;
    int tap[3] = {first.at[0], first.at[1], first.at[2]};
#pragma unroll
    for (int t = 0; t < kDepthwiseTaps; ++t) {
      if (t >= left) break;
      bool inside = true;
      int64_t offset = image;
#pragma unroll
      for (int i = 0; i < 3; ++i) {
        const int read = p.at[i] * s.stride[i] - s.padding[i] + tap[i] * s.dilation[i];
        inside = inside && static_cast<unsigned>(read) < static_cast<unsigned>(s.in[i]);
        offset += read * task.x.stride[i];
      }
      if (inside) sum[t] = fma(Vec<C>{g}, Vec<C>{to_compute(task.x.data[offset])}, Vec<C>{sum[t]}).v;
      if (++tap[2] == s.kernel[2]) {
        tap[2] = 0;
        if (++tap[1] == s.kernel[1]) {
          tap[1] = 0;
          ++tap[0];
        }
      }
    }
    advance(p, *window, workers);
  }

  C* const partial = task.partial + (int64_t{split} * task.channels + channel) * (taps + 1);
  const auto reduce = [&](C value, int to) {
    sums[thread] = value;
    for (int half = workers / 2; half > 0; half /= 2) {
      __syncthreads();
      if (worker < half) sums[thread] += sums[thread + half * task.lanes];
    }
    if (worker == 0 && channel < task.channels) partial[to] = sums[thread];
    __syncthreads();  // the sums are read
  };
#pragma unroll
  for (int t = 0; t < kDepthwiseTaps; ++t)
    if (t < left) reduce(sum[t], first_tap + t);
  if (first_tap == 0) reduce(sum_of_g, taps);
}

template <class S>
__global__ void __launch_bounds__(kDepthwiseThreads)
    depthwise_reduce_kernel(const __grid_constant__ DepthwiseWeightTask<S> task) {
  const int taps = task.shape.kernel[0] * task.shape.kernel[1] * task.shape.kernel[2];
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kDepthwiseThreads + threadIdx.x;
  const int64_t count = int64_t{task.channels} * (taps + 1);
  if (index >= count) return;
  const int64_t channel = short_quotient(index, taps + 1), tap = index - channel * (taps + 1);
  S* const to = tap == taps ? task.grad_bias + channel : task.grad_w + channel * taps + tap;
  if ((tap == taps ? task.grad_bias : task.grad_w) == nullptr) return;
  Compute<S> sum = 0;
  for (int64_t split = 0; split < task.splits; ++split) sum += task.partial[split * count + index];
  to_storage(sum, to);
}

}  // namespace
}  // namespace fastops::cuda
