// max_pool_* and avg_pool_*, with one thread per element of the result, in the order of memory. Backward gathers: the
// thread of an element of grad_x reads the windows that contain the element, so no two threads add to one element.
#pragma once

#include "../../common/cuda/formulas.cuh"
#include "../pool.h"

namespace fastops::cuda {
namespace {

constexpr int kPoolThreads = 256;

// PoolGeometry in the type I: int if every index and product of sizes fits, as 64-bit divisions are slow on a GPU.
template <class I>
struct PoolShape {
  I channels, in[3], out[3], kernel[3], stride[3], padding[3], dilation[3];
  I box[3];  // pool_box: the sizes for PoolIndices::window
  bool adaptive, channels_last;
};

// The coordinates of the element with this index in memory, for a tensor with these spatial sizes.
template <class I>
struct PoolPlace {
  I image, channel, at[3];
};
template <class I>
__device__ inline PoolPlace<I> pool_place(I index, const PoolShape<I>& g, const I (&size)[3]) {
  PoolPlace<I> place;
  const auto take = [&](I extent) {
    const I rest = index / extent, value = index - rest * extent;
    index = rest;
    return value;
  };
  if (g.channels_last) place.channel = take(g.channels);
#pragma unroll
  for (int i = 2; i >= 0; --i) place.at[i] = take(size[i]);
  if (!g.channels_last) place.channel = take(g.channels);
  place.image = index;
  return place;
}

// The start of the plane of an image and channel, and the stride of its positions.
template <class I>
struct PoolPlane {
  I begin, step;
};
template <class I>
__device__ inline PoolPlane<I> pool_plane(const PoolPlace<I>& place, const PoolShape<I>& g, const I (&size)[3]) {
  const I area = size[0] * size[1] * size[2];
  if (g.channels_last) return {place.image * area * g.channels + place.channel, g.channels};
  return {(place.image * g.channels + place.channel) * area, 1};
}

// The taps of output p along axis i inside the input: elements first + t step for begin <= t < end.
template <class I>
struct PoolTaps {
  I first, step, begin, end;
};
template <class I>
__device__ inline PoolTaps<I> pool_taps(I p, const PoolShape<I>& g, int i) {
  if (g.adaptive) {
    const I first = p * g.in[i] / g.out[i];
    return {first, 1, 0, ((p + 1) * g.in[i] + g.out[i] - 1) / g.out[i] - first};
  }
  const I first = p * g.stride[i] - g.padding[i], step = g.dilation[i];
  PoolTaps<I> taps{first, step, first < 0 ? (-first + step - 1) / step : 0, 0};
  const I room = g.in[i] - first;  // positions from the first tap to the end of the input
  taps.end = room <= 0 ? 0 : (room + step - 1) / step;
  if (taps.end > g.kernel[i]) taps.end = g.kernel[i];
  return taps;
}

// pool_range: the outputs [begin, end) whose windows may contain position x along axis i. pool_tap: the tap of x in the
// window of output p, or -1.
template <class I>
struct PoolRange {
  I begin, end;
};
template <class I>
__device__ inline PoolRange<I> pool_range(I x, const PoolShape<I>& g, int i) {
  if (g.adaptive) return {x * g.out[i] / g.in[i], ((x + 1) * g.out[i] + g.in[i] - 1) / g.in[i]};
  const I from = x + g.padding[i], reach = from - (g.kernel[i] - 1) * g.dilation[i], last = from / g.stride[i];
  return {reach <= 0 ? 0 : (reach + g.stride[i] - 1) / g.stride[i], (last < g.out[i] - 1 ? last : g.out[i] - 1) + 1};
}
template <class I>
__device__ inline I pool_tap(I x, I p, const PoolShape<I>& g, int i) {
  if (g.adaptive) return x - p * g.in[i] / g.out[i];
  const I distance = x + g.padding[i] - p * g.stride[i], tap = distance / g.dilation[i];
  return tap * g.dilation[i] == distance ? tap : -1;
}
template <class I>
__device__ inline I pool_box_index(I d, I h, I w, const PoolShape<I>& g) {
  return (d * g.box[1] + h) * g.box[2] + w;
}

// The index of this thread's element.
template <class I>
__device__ inline I pool_index() {
  return static_cast<I>(blockIdx.x) * kPoolThreads + static_cast<I>(threadIdx.x);
}

template <class S, class I>
__global__ void __launch_bounds__(kPoolThreads)
    max_pool_forward_kernel(const __grid_constant__ PoolShape<I> g, I count, const S* from, S* y, PoolIndices kind,
                            void* indices) {
  const I index = pool_index<I>();
  if (index >= count) return;
  const PoolPlace<I> place = pool_place(index, g, g.out);
  const PoolPlane<I> plane = pool_plane(place, g, g.in);
  const S* const x = from + plane.begin;
  const PoolTaps<I> d = pool_taps(place.at[0], g, 0), h = pool_taps(place.at[1], g, 1),
                    w = pool_taps(place.at[2], g, 2);
  const auto position = [&](I td, I th, I tw) {
    return ((d.first + td * d.step) * g.in[1] + h.first + th * h.step) * g.in[2] + w.first + tw * w.step;
  };
  I best_position = position(d.begin, h.begin, w.begin), best_tap = pool_box_index(d.begin, h.begin, w.begin, g);
  S best = x[best_position * plane.step];
  for (I td = d.begin; td < d.end; ++td)
    for (I th = h.begin; th < h.end; ++th)
      for (I tw = w.begin; tw < w.end; ++tw) {
        const S candidate = x[position(td, th, tw) * plane.step];
        const auto value = to_compute(candidate);
        if (!(value > to_compute(best)) && value == value) continue;  // a NaN is always taken
        best = candidate;
        best_position = position(td, th, tw);
        best_tap = pool_box_index(td, th, tw, g);
      }
  y[index] = best;
  if (kind == PoolIndices::plane) static_cast<int64_t*>(indices)[index] = best_position;
  if (kind == PoolIndices::window) static_cast<uint8_t*>(indices)[index] = static_cast<uint8_t>(best_tap);
}

// body(index of the output, its position along each axis), in order, for every window that may contain this element of
// the input.
template <class I, class Body>
__device__ inline void for_windows(const PoolPlace<I>& place, const PoolShape<I>& g, Body body) {
  const PoolPlane<I> plane = pool_plane(place, g, g.out);
  const PoolRange<I> d = pool_range(place.at[0], g, 0), h = pool_range(place.at[1], g, 1),
                     w = pool_range(place.at[2], g, 2);
  for (I pd = d.begin; pd < d.end; ++pd)
    for (I ph = h.begin; ph < h.end; ++ph)
      for (I pw = w.begin; pw < w.end; ++pw)
        body(plane.begin + ((pd * g.out[1] + ph) * g.out[2] + pw) * plane.step, pd, ph, pw);
}

template <class S, class I>
__global__ void __launch_bounds__(kPoolThreads)
    max_pool_backward_kernel(const __grid_constant__ PoolShape<I> g, I count, const S* grad_y, PoolIndices kind,
                             const void* indices, S* grad_x) {
  const I index = pool_index<I>();
  if (index >= count) return;
  const PoolPlace<I> place = pool_place(index, g, g.in);
  const I position = (place.at[0] * g.in[1] + place.at[1]) * g.in[2] + place.at[2];
  Compute<S> sum = 0;
  for_windows(place, g, [&](I output, I pd, I ph, I pw) {
    bool mine;
    if (kind == PoolIndices::plane) {
      mine = static_cast<const int64_t*>(indices)[output] == position;
    } else {
      const I td = pool_tap(place.at[0], pd, g, 0), th = pool_tap(place.at[1], ph, g, 1);
      const I tw = pool_tap(place.at[2], pw, g, 2);
      mine = td >= 0 && th >= 0 && tw >= 0 &&
             static_cast<const uint8_t*>(indices)[output] == pool_box_index(td, th, tw, g);
    }
    if (mine) sum += to_compute(grad_y[output]);
  });
  to_storage(sum, grad_x + index);
}

// The divisor of an average, as in AvgPoolForward.
struct PoolDivisor {
  bool include_pad;
  int64_t override;

  template <class I>
  __device__ int64_t of(I pd, I ph, I pw, const PoolShape<I>& g) const {
    if (override != 0) return override;
    return length(pd, g, 0) * length(ph, g, 1) * length(pw, g, 2);
  }
  template <class I>
  __device__ I length(I p, const PoolShape<I>& g, int i) const {
    const PoolTaps<I> taps = pool_taps(p, g, i);
    if (g.adaptive || !include_pad) return taps.end - taps.begin;
    const I room = g.in[i] + g.padding[i] - taps.first;
    return room < g.kernel[i] ? room : g.kernel[i];
  }
};

template <class S, class I>
__global__ void __launch_bounds__(kPoolThreads)
    avg_pool_forward_kernel(const __grid_constant__ PoolShape<I> g, I count, const S* from, S* y, PoolDivisor divisor) {
  const I index = pool_index<I>();
  if (index >= count) return;
  const PoolPlace<I> place = pool_place(index, g, g.out);
  const PoolPlane<I> plane = pool_plane(place, g, g.in);
  const S* const x = from + plane.begin;
  const PoolTaps<I> d = pool_taps(place.at[0], g, 0), h = pool_taps(place.at[1], g, 1),
                    w = pool_taps(place.at[2], g, 2);
  Compute<S> sum = 0;
  for (I td = d.begin; td < d.end; ++td)
    for (I th = h.begin; th < h.end; ++th) {
      const S* at = x + (((d.first + td) * g.in[1] + h.first + th) * g.in[2] + w.first + w.begin) * plane.step;
      Compute<S> row = 0;  // the sum of a row, as a single sum of many terms would be less accurate
#pragma unroll 1
      for (I tw = w.begin; tw < w.end; ++tw, at += plane.step) row += to_compute(*at);
      sum += row;
    }
  sum /= static_cast<Compute<S>>(divisor.of(place.at[0], place.at[1], place.at[2], g));
  to_storage(sum, y + index);
}

template <class S, class I>
__global__ void __launch_bounds__(kPoolThreads)
    avg_pool_backward_kernel(const __grid_constant__ PoolShape<I> g, I count, const S* grad_y, S* grad_x,
                             PoolDivisor divisor) {
  const I index = pool_index<I>();
  if (index >= count) return;
  Compute<S> sum = 0;
  for_windows(pool_place(index, g, g.in), g, [&](I output, I pd, I ph, I pw) {
    sum += to_compute(grad_y[output]) / static_cast<Compute<S>>(divisor.of(pd, ph, pw, g));
  });
  to_storage(sum, grad_x + index);
}

}  // namespace
}  // namespace fastops::cuda
