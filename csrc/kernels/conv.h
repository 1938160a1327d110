// Contract of the convolution kernels: y = f(conv(x, w) + b) and the gradients of x, w and b, in one, two or three
// spatial dimensions.
#pragma once

#include "activation.h"
#include "linear.h"
#include "parallel.h"
#include "tensor.h"

namespace fastops {

// How x and y lie in memory, both dense: (batch, channels, depth, height, width), or channels innermost.
enum class Layout : int { channels_first, channels_last };

// Spatial arrays are (depth, height, width); what a 1-D or 2-D convolution lacks has size, kernel, stride and dilation
// 1 and padding 0. in_channels and out_channels count all groups; both are divisible by groups. `padding` is what lies
// before the first element; what is needed after the last one follows from `out`, so padding may be uneven ('same' with
// an even kernel). The tap r of output p reads input p * stride - padding + r * dilation, zero where that lies outside.
struct ConvGeometry {
  int64_t batch, in_channels, out_channels, groups;
  int64_t in[3], out[3], kernel[3], stride[3], padding[3], dilation[3];
};

// Whether every coordinate that a convolution forms, and every index into a filter, is far from the limits of an int,
// which is what the CUDA kernels count those in.
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

// What the algorithms may trade for speed. Of `highest` the rms error stays within three times that of direct
// summation; `medium` allows Winograd's F(4x4, 3x3).
enum class ConvPrecision : int { highest, medium };

// y[b, k, p] = f(sum_{c, r} w[k, c, r] x[b, group(k) C + c, p * stride - padding + r * dilation] + bias[k])
//
// x is [batch, in_channels, in], y [batch, out_channels, out], each dense in `layout`; w is
// [out_channels, in_channels / groups, kernel], dense in its own layout (w_layout: channels_last is
// [out_channels, kernel, in_channels / groups]). bias is null or contiguous. Sizes may be zero; a sum over nothing
// gives f(bias). Products accumulate in float32 (float64 for float64); 16-bit results are rounded once, after bias and
// activation. z is null, or takes the pre-activation with y's dtype and layout. The result is bitwise the same for any
// number of threads.
struct ConvForward {
  DType dtype;
  Layout layout, w_layout;
  ConvGeometry geometry;
  const void* x;
  const void* w;
  const void* bias;
  Activation activation;
  void* y;
  void* z;
  ConvPrecision precision = ConvPrecision::highest;
  Bf16Multiply bf16_multiply = Bf16Multiply::automatic;  // CPU
  bool allow_tf32 = false;                               // CUDA: float32 products of operands rounded to tf32
};

// The gradient of x, and at once the forward pass of a transposed convolution (whose input is then grad_y, whose output
// grad_x, with `geometry` that of the convolution it transposes):
//   g = grad_y * f'(saved), formed while grad_y is read; saved is y or z as saved_by_linear(activation) says, dense in
//   `layout`, not read for identity
//   grad_x[b, c, q] = h(sum_{k, r, p: p * stride - padding + r * dilation = q} w[k, c, r] g[b, k, p] + bias[c])
// bias [in_channels] and the epilogue's activation h are a transposed convolution's: null and identity for a gradient.
// z as in ConvForward, with grad_x's layout, for h.
struct ConvBackwardInput {
  DType dtype;
  Layout layout, w_layout;
  ConvGeometry geometry;
  const void* grad_y;
  Activation activation;
  const void* saved;
  const void* w;
  const void* bias;
  Activation epilogue;
  void* grad_x;
  void* z;
  ConvPrecision precision = ConvPrecision::highest;
  Bf16Multiply bf16_multiply = Bf16Multiply::automatic;  // CPU
  bool allow_tf32 = false;                               // CUDA: float32 products of operands rounded to tf32
};

// The gradients of w and bias, each nullable when not needed:
//   grad_w[k, c, r] = sum_{b, p} g[b, k, p] x[b, group(k) C + c, p * stride - padding + r * dilation]
//   grad_bias[k] = sum_{b, p} g[b, k, p]
// with g as in ConvBackwardInput. grad_w is dense in w_layout, grad_bias contiguous.
struct ConvBackwardWeight {
  DType dtype;
  Layout layout, w_layout;
  ConvGeometry geometry;
  const void* grad_y;
  Activation activation;
  const void* saved;
  const void* x;
  void* grad_w;
  void* grad_bias;
  Bf16Multiply bf16_multiply = Bf16Multiply::automatic;  // CPU
  bool allow_tf32 = false;                               // CUDA: float32 products of operands rounded to tf32
};

}  // namespace fastops
