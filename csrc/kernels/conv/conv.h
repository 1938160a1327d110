// Contract of the convolution kernels: y = f(conv(x, w) + b) and the gradients of x, w and b, in one, two or three
// spatial dimensions.
//
// There are no strides here: every tensor is dense in one of two layouts. Outputs overlap no operand.
#pragma once

#include "../activation/activation.h"
#include "../common/tensor.h"
#include "../linear/linear.h"  // a 1x1 convolution is a product

namespace fastops {

// The memory order of a dense image: (batch, channels, depth, height, width) or (batch, depth, height, width,
// channels).
enum class Layout : int { channels_first, channels_last };

// Spatial arrays are (depth, height, width). A dimension that a 1-D or 2-D convolution does not have has size, kernel,
// stride and dilation 1, and padding 0.
//
// in_channels and out_channels count all groups, and groups divides both. Sizes are >= 0; kernel, stride, dilation and
// groups are >= 1. Tap r of output p reads input element p * stride - padding + r * dilation, or zero if that lies
// outside the input. `padding` >= 0 is the padding before the first element. The padding after the last element follows
// from `out`. It may be another one ('same' with an even kernel), or negative, which crops the input.
struct ConvGeometry {
  int64_t batch, in_channels, out_channels, groups;
  int64_t in[3], out[3], kernel[3], stride[3], padding[3], dilation[3];
  bool operator==(const ConvGeometry&) const = default;
};

// Whether every coordinate of this convolution and every index into one filter is far from the limits of int, the type
// in which the CUDA kernels compute them.
inline bool fits_int(const ConvGeometry& g) {
  constexpr int64_t limit = int64_t{1} << 29;
  bool fits = g.in_channels < limit && g.out_channels < limit;
  int64_t taps = 1;
  for (int i = 0; i < 3; ++i) {
    fits = fits && g.in[i] < limit && g.kernel[i] < limit && g.padding[i] < limit && g.stride[i] < limit &&
           g.dilation[i] < limit && g.out[i] < limit;
    if (!fits) return false;
    fits = g.out[i] * g.stride[i] < limit && g.kernel[i] * g.dilation[i] < limit;
    taps *= g.kernel[i];
    fits = fits && taps < limit;
  }
  return fits && taps * (g.in_channels / g.groups) < limit && taps * (g.out_channels / g.groups) < limit;
}

// The same convolution with stride 1 along axes with one output and dilation 1 along axes with one tap, where they have
// no effect. Any stride and dilation is legal there; the algorithms reserve memory and loop over phases by these
// numbers.
inline ConvGeometry canonical(ConvGeometry geometry) {
  for (int i = 0; i < 3; ++i) {
    if (geometry.out[i] == 1) geometry.stride[i] = 1;
    if (geometry.kernel[i] == 1) geometry.dilation[i] = 1;
  }
  return geometry;
}

// Of all calls below. Precision::highest: the rms error is at most three times that of direct summation.
// Precision::medium: on a CPU, Winograd's F(4x4, 3x3) as well; a GPU may round float32 operands to TF32.

// y[b, k, p] = f(sum_{c, r} w[k, c, r] x[b, group(k) C + c, p * stride - padding + r * dilation] + bias[k]
//                + residual[b, k, p])
//
// where C = in_channels / groups and group(k) = k / (out_channels / groups).
//
// x [batch, in_channels, in] and y [batch, out_channels, out] are dense in `layout`. w [out_channels, C, kernel] is
// dense in w_layout; channels_last is [out_channels, kernel, C]. bias is contiguous. z receives the argument of f in
// the dtype and layout of y; residual has that layout too. An empty sum gives f(bias + residual). On a GPU, for 16-bit
// dtypes and for depthwise convolutions there is no plan with a residual.
//
// Products accumulate in float32 (float64 for float64). 16-bit results are rounded once, after bias and activation. The
// result is bitwise the same for any number of threads.
struct ConvForward {
  DType dtype;
  Layout layout, w_layout;
  ConvGeometry geometry;
  bool with_bias = false;
  Activation activation = {};
  bool with_z = false;
  bool with_residual = false;
  Precision precision = Precision::highest;
  bool packed_w = false;  // w is what Plan::pack made of it, if the plan has something to pack
  int alignment = 1;      // of x and w, in bytes

  struct Pointers {
    const void* x;
    const void* w;
    const void* bias = nullptr;
    void* y;
    void* z = nullptr;
    const void* residual = nullptr;
  };
  bool operator==(const ConvForward&) const = default;
};

// The gradient of x:
//
//   g = grad_y * f'(saved), computed while grad_y is read
//   grad_x[b, c, q] = h(sum_{k, r, p: p * stride - padding + r * dilation = q} w[k, c, r] g[b, k, p] + bias[c])
//
// saved is y or z, as saved_by_linear(activation) says, dense in `layout`; for identity it is not read.
//
// The same call is the forward pass of a transposed convolution: grad_y is its input, grad_x its output, `geometry` the
// geometry of the convolution that it transposes. Only then are there a bias [in_channels] and an activation h (the
// epilogue). z receives the argument of h in the dtype and layout of grad_x.
struct ConvBackwardInput {
  DType dtype;
  Layout layout, w_layout;
  ConvGeometry geometry;
  Activation activation = {};
  bool with_bias = false;
  Activation epilogue = {};
  bool with_z = false;
  Precision precision = Precision::highest;
  int alignment = 1;  // of grad_y, saved and w, in bytes

  struct Pointers {
    const void* grad_y;
    const void* saved = nullptr;
    const void* w;
    const void* bias = nullptr;
    void* grad_x;
    void* z = nullptr;
  };
  bool operator==(const ConvBackwardInput&) const = default;
};

// The gradients of w and bias, with g as in ConvBackwardInput:
//
//   grad_w[k, c, r] = sum_{b, p} g[b, k, p] x[b, group(k) C + c, p * stride - padding + r * dilation]
//   grad_bias[k] = sum_{b, p} g[b, k, p]
//
// grad_w is dense in w_layout, grad_bias contiguous. x is read only for grad_w.
struct ConvBackwardWeight {
  DType dtype;
  Layout layout, w_layout;
  ConvGeometry geometry;
  Activation activation = {};
  bool with_grad_w = false, with_grad_bias = false;
  Precision precision = Precision::highest;
  int alignment = 1;  // of grad_y, saved and x, in bytes

  struct Pointers {
    const void* grad_y;
    const void* saved = nullptr;
    const void* x = nullptr;
    void* grad_w = nullptr;
    void* grad_bias = nullptr;
  };
  bool operator==(const ConvBackwardWeight&) const = default;
};

#define FASTOPS_CALLS_conv(X) X(ConvForward) X(ConvBackwardInput) X(ConvBackwardWeight)

}  // namespace fastops
