// What the checks of convolutions share: a geometry in two dimensions, dense images of integers, and all that is
// multiplied.
#pragma once

#include "check.h"
#include "conv/cuda/conv.cuh"

namespace fastops::cuda {
namespace {

// Two dimensions. What a group has of channels is given; the result of a product is y, the gradient of x or of w.
struct Case {
  int batch, groups, inputs, outputs;
  ConvShape shape;
};

int area(const int (&size)[3]) { return size[0] * size[1] * size[2]; }

// A dense image of `channels` channels and its element.
struct Image {
  bool last;
  int channels, height, width;
  size_t at(int b, int c, int h, int w) const {
    const int index =
        last ? ((b * height + h) * width + w) * channels + c : ((b * channels + c) * height + h) * width + w;
    return static_cast<size_t>(index);
  }
  template <class S>
  ConvOperand<S> operand(const S* data, int groups, Path path) const {
    const int64_t pixel = last ? channels : 1, plane = height * width, channel = last ? 1 : plane;
    return {data,
            nullptr,
            channels / groups * channel,
            channels * plane,
            {plane * pixel, width * pixel, pixel},
            channel,
            divisor_of(channels / groups),
            path};
  }
};

template <class S>
void put(int value, S* to) {
  to_storage(static_cast<Compute<S>>(value), to);
}
template <class S>
int got(const S& value) {
  return static_cast<int>(to_compute(value));
}
template <class S>
Guarded<S> random(size_t count, int seed) {
  const Guarded<S> data(count);
  for (size_t i = 0; i < count; ++i)
    put(static_cast<int>((i * 7 + i / 5 * 3 + i / 11 * static_cast<size_t>(seed)) % 5) - 2, &data[i]);
  return data;
}

// body(b, group, output channel, input channel, output h and w, input h and w, tap) for all that are multiplied.
template <class Body>
void for_all(const Case& c, Body body) {
  const ConvShape& s = c.shape;
  for (int b = 0; b < c.batch; ++b)
    for (int k = 0; k < c.groups * c.outputs; ++k)
      for (int i = 0; i < c.inputs; ++i)
        for (int ph = 0; ph < s.out[1]; ++ph)
          for (int pw = 0; pw < s.out[2]; ++pw)
            for (int rh = 0; rh < s.kernel[1]; ++rh)
              for (int rw = 0; rw < s.kernel[2]; ++rw) {
                const int h = ph * s.stride[1] - s.padding[1] + rh * s.dilation[1];
                const int w = pw * s.stride[2] - s.padding[2] + rw * s.dilation[2];
                if (h < 0 || h >= s.in[1] || w < 0 || w >= s.in[2]) continue;
                body(b, k, k / c.outputs * c.inputs + i, ph, pw, h, w, rh * s.kernel[2] + rw);
              }
}

// A window of 3 x 2, dilated and strided, over all edges; one whose taps fall into phases of two and one.
constexpr ConvShape kDilated{{1, 9, 8}, {1, 9, 5}, {1, 3, 2}, {1, 1, 2}, {0, 2, 2}, {1, 2, 1}, false};
constexpr ConvShape kStrided{{1, 9, 8}, {1, 5, 5}, {1, 3, 4}, {1, 2, 2}, {0, 1, 2}, {1, 1, 1}, false};

}  // namespace
}  // namespace fastops::cuda
