// Contract of the inverted residual block in one pass, for inference: a 1x1 convolution to many channels, a depthwise
// convolution of those, a 1x1 convolution to few.
//
//   e = f(x W_e^T + b_e)                 [batch, in, wide]    e = x without with_expand
//   d = g(depthwise(e, w_d) + b_d)       [batch, out, wide]
//   y = h(d W_p^T + b_p + residual)      [batch, out, out_channels]    y = d without with_project
//
// The wide images e and d are never in memory: a few of their rows at a time go through a workspace that stays in the
// cache. Source: Sandler, Howard, Zhu, Zhmoginov and Chen, "MobileNetV2: Inverted Residuals and Linear Bottlenecks"
// (2018), section 5.
#pragma once

#include "../activation/activation.h"
#include "../common/tensor.h"
#include "../conv/conv.h"  // the meaning of sizes

namespace fastops {

// Images are dense in channels_last. Sizes, kernel, stride and dilation are >= 1, and the convolutions have the meaning
// that they have in conv.h; arrays are (height, width). in_channels is wide_channels without with_expand, and
// out_channels is without with_project; at least one of the two is there.
//
// There is a plan for float32, if a few rows of e are less than the cache. Results are bitwise the same for any number
// of threads.
struct InvertedResidualForward {
  DType dtype;
  int64_t batch, in_channels, wide_channels, out_channels;
  int64_t in[2], out[2], kernel[2], stride[2], padding[2], dilation[2];
  bool with_expand = false, with_project = false, with_residual = false;
  Activation expand = {}, depthwise = {}, project = {};

  // What Plan::pack reads. Each is dense, biases are nullable.
  struct Weights {
    const void *expand, *expand_bias;        // [wide_channels, in_channels]
    const void *depthwise, *depthwise_bias;  // [wide_channels, kernel]
    const void *project, *project_bias;      // [out_channels, wide_channels]
  };
  struct Pointers {
    const void* x;
    const void* packed;  // what Plan::pack made of the Weights
    void* y;
    const void* residual = nullptr;  // in the layout of y
  };
  bool operator==(const InvertedResidualForward&) const = default;
};

#define FASTOPS_CALLS_inverted_residual(X) X(InvertedResidualForward)

}  // namespace fastops
