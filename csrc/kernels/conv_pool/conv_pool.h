// Contract of the fused convolution + activation + max pool: y = max_pool(f(conv(x, w) + b)), and the gradients of x, w
// and b. The convolution's result is not an output: it goes through the workspace, a few images at a time.
#pragma once

#include "../common/tensor.h"
#include "../conv/conv.h"
#include "../pool/pool.h"

namespace fastops {

// y[b, k, p] = the maximum of f(conv(x, w) + bias)[b, k, :] over the window p * pool ... p * pool + pool - 1
//
// Windows do not overlap and are not padded. Along axis i there are pooled[i] = out[i] / pool[i] windows, rounded down;
// the elements after the last window are ignored. A window has at most 255 elements. The convolution is that of
// ConvForward. f is identity or relu.
//
// The result is that of the three operations in sequence: 16-bit values are rounded before they are compared. The first
// of equal maxima counts. A NaN is greater than any number; of several, the last one in the window counts.
//
// y is [batch, out_channels, pooled], dense in `layout`. indices receives one byte per element of y, for
// backward: the position of the maximum in its window, ((d * pool_h) + h) * pool_w + w, or kNoGradient if f' is zero
// there. The result is bitwise the same for any number of threads.
struct ConvPoolForward {
  DType dtype;
  Layout layout, w_layout;
  ConvGeometry geometry;
  int64_t pool[3];
  bool with_bias = false;
  Activation activation = {};
  bool with_indices = false;
  Precision precision = Precision::highest;
  bool packed_w = false;  // as in ConvForward

  struct Pointers {
    const void* x;
    const void* w;
    const void* bias = nullptr;
    void* y;
    uint8_t* indices = nullptr;
  };
  bool operator==(const ConvPoolForward&) const = default;
};

constexpr uint8_t kNoGradient = 255;

// The gradients of x, w and bias from grad_y, the gradient of y, and forward's indices.
//
// They are those of ConvBackwardInput and ConvBackwardWeight for a gradient g that holds grad_y at the positions of the
// maxima and zeros everywhere else. The activation is not an argument: the indices say where f' is zero, and elsewhere
// it is one. A null gradient is not computed. w is read only for grad_x, x only for grad_w.
struct ConvPoolBackward {
  DType dtype;
  Layout layout, w_layout;
  ConvGeometry geometry;
  int64_t pool[3];
  bool with_grad_x = false, with_grad_w = false, with_grad_bias = false;
  Precision precision = Precision::highest;

  struct Pointers {
    const void* grad_y;
    const uint8_t* indices;
    const void* x = nullptr;
    const void* w = nullptr;
    void* grad_x = nullptr;
    void* grad_w = nullptr;
    void* grad_bias = nullptr;
  };
  bool operator==(const ConvPoolBackward&) const = default;
};

#define FASTOPS_CALLS_conv_pool(X) X(ConvPoolForward) X(ConvPoolBackward)

}  // namespace fastops
