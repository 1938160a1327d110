// Contract of the fused convolution + activation + max pool: y = max_pool(f(conv(x, w) + b)), and the gradients of x, w
// and b. What lies between is not an output: it passes through a workspace, some images at a time.
#pragma once

#include "conv.h"
#include "parallel.h"
#include "pool.h"
#include "tensor.h"

namespace fastops {

// y[b, k, p] = the maximum of f(conv(x, w) + bias)[b, k, :] over the window p * pool ... p * pool + pool - 1
//
// Windows do not overlap, are not padded and lie inside: there are pooled[i] = out[i] / pool[i] of them along axis i,
// rounded down, and what is left over at the end takes no part. At most 255 elements a window. The convolution is that
// of ConvForward; f is identity or relu. The result is that of the three operations one after the other: 16-bit values
// are rounded before they are compared, the first of equal maxima counts, and a NaN counts as greater than anything,
// the last of a window being taken.
//
// y is [batch, out_channels, pooled], dense in `layout`. indices is null, or takes what backward needs, one byte an
// element of y: the position of the maximum within the window, ((d * pool_h) + h) * pool_w + w, or kNoGradient where f'
// is zero there. The result is bitwise the same for any number of threads.
struct ConvPoolForward {
  DType dtype;
  Layout layout, w_layout;
  ConvGeometry geometry;
  int64_t pool[3];
  const void* x;
  const void* w;
  const void* bias;
  Activation activation;
  void* y;
  uint8_t* indices;
  ConvPrecision precision = ConvPrecision::highest;
  Bf16Multiply bf16_multiply = Bf16Multiply::automatic;
};

constexpr uint8_t kNoGradient = 255;

// The gradients of x, w and bias, each nullable when not needed, from grad_y, the gradient of y, and forward's indices:
// those of ConvBackwardInput and ConvBackwardWeight, whose gradient g has grad_y at the positions of the maxima, where
// they have one, and zeros elsewhere. f need not be known: indices say where f' is zero, and elsewhere it is one. w is
// read for grad_x alone, x for grad_w alone.
struct ConvPoolBackward {
  DType dtype;
  Layout layout, w_layout;
  ConvGeometry geometry;
  int64_t pool[3];
  const void* grad_y;
  const uint8_t* indices;
  const void* x;
  const void* w;
  void* grad_x;
  void* grad_w;
  void* grad_bias;
  ConvPrecision precision = ConvPrecision::highest;
  Bf16Multiply bf16_multiply = Bf16Multiply::automatic;
};

}  // namespace fastops
