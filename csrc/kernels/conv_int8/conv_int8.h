// Contract of the int8 convolution kernel: y = f(conv(x, w) + b + residual), where w is int8 with a scale for each
// output channel, and x is uint8 with one scale and zero point for all of it ("static quantization"). A linear layer is
// the same with one position.
#pragma once

#include "../activation/activation.h"
#include "../common/tensor.h"
#include "../conv/conv.h"

namespace fastops {

// Sums of this many products of 8 bits fit 32 bits.
inline constexpr int64_t kMostInt8Products = 65536;

// With q the levels of x, C = in_channels / groups, and everything but the sum in float32, one rounding for each
// operation, in this order:
//
//   q[b, c, p] = x where x is uint8; else round(min(max(x x_inverse + x_zero, 0), 255)), halves to even, NaN to 0
//   v[b, k, p] = sum_{c, r} (q[b, group(k) C + c, p stride - padding + r dilation] - x_zero) w[k, c, r]
//   v          = v multiplier[k] + offset[k]                        the sum is exact
//   v          = v + residual[b, k, p] residual_scale               with_residual; residual is uint8
//   y          = f(v)                                               where y is a float tensor
//   y          = round(min(max(f(v) y_factor + y_offset, y_low), y_high))   NaN to y_low; where y is uint8. For
//                                                                   f = identity y_factor is 1 and y_offset is 0
//
// Around the image q is x_zero, a number of 0 to 255, as y_low and y_high are. Whoever calls puts scales, bias and zero
// points into multiplier and offset, and ReLU into y_low. With f identity or a rectifier y has the same bits on every
// tier, and always for any number of threads.
//
// Tensors of uint8 and w [out_channels, kernel, C] are dense, channels last; a float x has x_layout, a float y
// y_layout. Sizes are as in ConvGeometry, C times the taps at most kMostInt8Products. y overlaps no operand.
struct ConvInt8Forward {
  static constexpr bool integer_products = true;

  DType dtype = DType::f32;  // of x and y, where they are float tensors: f32, bf16 or f16
  ConvGeometry geometry;
  bool float_x = false, float_y = true;
  Layout x_layout = Layout::channels_last, y_layout = Layout::channels_last;
  int x_zero = 0;
  float x_inverse = 1;
  bool with_residual = false;
  float residual_scale = 1;
  Activation activation = {};
  float y_factor = 1, y_offset = 0;
  int y_low = 0, y_high = 255;
  bool packed_w = false;  // w is what Plan::pack made of it: the same for any batch, image and number of threads

  struct Pointers {
    const void* x;
    const void* w;  // int8
    const float* multiplier;
    const float* offset;
    const uint8_t* residual = nullptr;
    void* y;
  };
  bool operator==(const ConvInt8Forward&) const = default;
};

#define FASTOPS_CALLS_conv_int8(X) X(ConvInt8Forward)

}  // namespace fastops
