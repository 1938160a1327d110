// Pools of uint8 images. The contract is csrc/kernels/pool_int8/pool_int8.h.
//
// An output at a time, kPoolChannels of its channels after another: images are channels last, so that the elements of a
// window are rows of bytes, which the compiler takes in vectors.
#pragma once

#include "../../common/cpu/common.inl"
#include "../../conv_int8/cpu/levels.inl"

constexpr int64_t kPoolChannels = 64;
constexpr int64_t kOutputGrain = 16384;  // outputs that are worth a thread

// The elements [first, end) of a window that are inside the input, along one axis, and how many count as its length.
struct PoolSpan {
  int64_t first, end, step, counted;
};

inline PoolSpan pool_span(const PoolInt8Forward& call, int axis, int64_t out) {
  const PoolGeometry& g = call.geometry;
  const int64_t in = g.in[axis];
  if (g.adaptive) {
    const int64_t first = out * in / g.out[axis], end = ceil_div((out + 1) * in, g.out[axis]);
    return {first, end, 1, end - first};
  }
  const int64_t step = g.dilation[axis], from = out * g.stride[axis] - g.padding[axis];
  const int64_t first = from >= 0 ? from : from + ceil_div(-from, step) * step;
  const int64_t last = from + g.kernel[axis] * step, end = smaller(last, in);
  const int64_t padded = smaller(last, in + g.padding[axis]) - from;
  return {first, end, step, call.count_include_pad ? padded : larger<int64_t>(end - first, 0)};
}

// body(x) for the channels of each element of a window.
template <class Body>
inline void for_window(const PoolSpan (&span)[3], const PoolGeometry& g, const uint8_t* image, Body&& body) {
  for (int64_t d = span[0].first; d < span[0].end; d += span[0].step)
    for (int64_t h = span[1].first; h < span[1].end; h += span[1].step)
      for (int64_t w = span[2].first; w < span[2].end; w += span[2].step)
        body(image + ((d * g.in[1] + h) * g.in[2] + w) * g.channels);
}

inline void greatest_levels(const PoolSpan (&span)[3], const PoolGeometry& g, const uint8_t* image, uint8_t* y) {
  for (int64_t c = 0; c < g.channels; c += kPoolChannels) {
    const int64_t count = smaller(kPoolChannels, g.channels - c);
    alignas(64) uint8_t most[kPoolChannels] = {};
    if (count == kPoolChannels)
      for_window(span, g, image + c, [&](const uint8_t* x) {
        for (int64_t i = 0; i < kPoolChannels; ++i) most[i] = larger(most[i], x[i]);
      });
    else
      for_window(span, g, image + c, [&](const uint8_t* x) {
        for (int64_t i = 0; i < count; ++i) most[i] = larger(most[i], x[i]);
      });
    __builtin_memcpy(y + c, most, static_cast<size_t>(count));
  }
}

template <class T>
inline void average_levels(const Bound<PoolInt8Forward>& args, const PoolSpan (&span)[3], const uint8_t* image,
                           int64_t at) {
  const PoolGeometry& g = args.geometry;
  const int64_t counted = span[0].counted * span[1].counted * span[2].counted;
  const int64_t divisor = args.divisor_override != 0 ? args.divisor_override : counted;
  const VecF factor = VecF::set1(args.factor / static_cast<float>(divisor)), offset = VecF::set1(args.offset);
  for (int64_t c = 0; c < g.channels; c += kPoolChannels) {
    const int64_t count = smaller(kPoolChannels, g.channels - c);
    alignas(64) int32_t sums[kPoolChannels] = {};
    int32_t elements = 0;
    for_window(span, g, image + c, [&](const uint8_t* x) {
      ++elements;
      for (int64_t i = 0; i < count; ++i) sums[i] += x[i];
    });
    for (int64_t i = 0; i < count; ++i) sums[i] -= elements * args.zero;
    for (int64_t i = 0; i < count; i += VecF::size) {
      const int part = static_cast<int>(smaller<int64_t>(VecF::size, count - i));
      const VecF v = float_of_sums(sums + i) * factor + offset;
      if (args.float_y)
        v.store(static_cast<T*>(args.y) + at + c + i, part);
      else
        store_levels_of(clamped(v, VecF::zero(), VecF::set1(255)), static_cast<uint8_t*>(args.y) + at + c + i, part);
    }
  }
}

template <class T>
void pool_int8_member(const Bound<PoolInt8Forward>& args, Crew& crew) {
  const PoolGeometry& g = args.geometry;
  const int64_t image = g.in[0] * g.in[1] * g.in[2] * g.channels;
  crew.each(g.batch * g.out[0] * g.out[1], [&](int64_t unit) {
    const int64_t h = unit % g.out[1], d = unit / g.out[1] % g.out[0], b = unit / g.out[1] / g.out[0];
    PoolSpan span[3] = {pool_span(args, 0, d), pool_span(args, 1, h), {}};
    for (int64_t w = 0; w < g.out[2]; ++w) {
      span[2] = pool_span(args, 2, w);
      const int64_t at = (unit * g.out[2] + w) * g.channels;
      if (args.average)
        average_levels<T>(args, span, args.x + b * image, at);
      else
        greatest_levels(span, g, args.x + b * image, static_cast<uint8_t*>(args.y) + at);
    }
  });
}

template <class T>
void plan_pool_int8(Plan<PoolInt8Forward>& plan) {
  decide(plan, {plan.call.average ? "average_int8" : "maximum_int8"}, 0, [](auto& args, auto*, auto& team) {
    const PoolGeometry& g = args.geometry;
    const int64_t rows = g.batch * g.out[0] * g.out[1], elements = rows * g.out[2] * g.channels;
    parallel(team, threads_for(team, elements, rows, kOutputGrain),
             [&](Crew& crew) { pool_int8_member<T>(args, crew); });
  });
}

void plan_call(Plan<PoolInt8Forward>& plan) {
  const PoolGeometry& g = plan.call.geometry;
  if (g.batch * g.channels * g.out[0] * g.out[1] * g.out[2] == 0) return decide_nothing(plan);
  with_float_dtype(plan.call.dtype, [&](auto type) { plan_pool_int8<decltype(type)>(plan); });
}
