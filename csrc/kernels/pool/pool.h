// Contract of the pooling kernels: maximum and average over windows in one, two or three spatial dimensions.
//
// There are no strides here: every tensor is dense in `layout`. Outputs overlap no operand.
#pragma once

#include "../common/tensor.h"
#include "../conv/conv.h"

namespace fastops {

// Windows over x [batch, channels, in] for y [batch, channels, out]. Spatial arrays are as in ConvGeometry.
//
// Fixed windows: output p reads elements p * stride - padding + r * dilation for r < kernel and ignores those outside
// the input. With dilation a window may have no element inside the input; its maximum is -infinity. Sizes are >= 0;
// kernel, stride and dilation are >= 1.
//
// Adaptive windows: output p reads elements floor(p * in / out) up to, not including, ceil((p + 1) * in / out). kernel,
// stride, padding and dilation are not read.
struct PoolGeometry {
  int64_t batch, channels;
  int64_t in[3], out[3], kernel[3], stride[3], padding[3], dilation[3];
  bool adaptive;
  bool operator==(const PoolGeometry&) const = default;
};

// The length of a window along axis i; for adaptive windows, an upper bound of their lengths.
template <class Int>
Int adaptive_box(const Int& in, const Int& out) {
  return out == 0 ? Int(0) : in / out + (in % out == 0 ? 0 : 2);
}
inline int64_t pool_box(const PoolGeometry& g, int i) {
  return g.adaptive ? adaptive_box(g.in[i], g.out[i]) : g.kernel[i];
}

// The form in which a max pool returns the positions of its maxima.
enum class PoolIndices : int {
  none,
  window,  // uint8: the position in the window, ((d * box_h) + h) * box_w + w, box = pool_box <= 256 elements
  plane,   // int64: the position in the input plane, ((d * in_h) + h) * in_w + w, as PyTorch returns it
};

// y = the maximum of the window. The first of equal maxima counts. A NaN is greater than any number; of several, the
// last one in the window counts, as in PyTorch. indices has the shape and layout of y.
struct MaxPoolForward {
  DType dtype;
  Layout layout;
  PoolGeometry geometry;
  PoolIndices kind;  // of the indices

  struct Pointers {
    const void* x;
    void* y;
    void* indices = nullptr;
  };
  bool operator==(const MaxPoolForward&) const = default;
};

// grad_x[i] = the sum of grad_y[p] over the windows p whose maximum was at i, in float32 (float64 for float64) and in
// the order of p. Every element of grad_x is written. Indices must be those of a forward call with this geometry.
struct MaxPoolBackward {
  DType dtype;
  Layout layout;
  PoolGeometry geometry;
  PoolIndices kind;  // of the indices: window or plane

  struct Pointers {
    const void* grad_y;
    const void* indices;
    void* grad_x;
  };
  bool operator==(const MaxPoolBackward&) const = default;
};

// y[p] = (sum of the window) / divisor. Sums are float32 (float64 for float64). Dilation is 1.
//
// The divisor is divisor_override, unless that is 0. Otherwise, with count_include_pad, it is the size of the window
// clipped to the padded input [-padding, in + padding); without, the number of its elements inside the input. An
// adaptive pool divides by the number of elements of the window.
struct AvgPoolForward {
  DType dtype;
  Layout layout;
  PoolGeometry geometry;
  bool count_include_pad;
  int64_t divisor_override;

  struct Pointers {
    const void* x;
    void* y;
  };
  bool operator==(const AvgPoolForward&) const = default;
};

// grad_x[i] = the sum of grad_y[p] / divisor over the windows p that contain i. Every element of grad_x is written.
struct AvgPoolBackward {
  DType dtype;
  Layout layout;
  PoolGeometry geometry;
  bool count_include_pad;
  int64_t divisor_override;

  struct Pointers {
    const void* grad_y;
    void* grad_x;
  };
  bool operator==(const AvgPoolBackward&) const = default;
};

#define FASTOPS_CALLS_pool(X) X(MaxPoolForward) X(MaxPoolBackward) X(AvgPoolForward) X(AvgPoolBackward)

}  // namespace fastops
