// Contract of the pooling kernels: maximum and average over windows in one, two or three spatial dimensions.
#pragma once

#include "conv.h"
#include "parallel.h"
#include "tensor.h"

namespace fastops {

// Windows over x[batch, channels, in] -> y[batch, channels, out], spatial arrays as in ConvGeometry. Fixed windows
// start at p * stride - padding and step by dilation; elements outside the input do not take part. Adaptive windows of
// output p are [floor(p * in / out), ceil((p + 1) * in / out)), and kernel, stride, padding and dilation are not read.
struct PoolGeometry {
  int64_t batch, channels;
  int64_t in[3], out[3], kernel[3], stride[3], padding[3], dilation[3];
  bool adaptive;
};

// The length of a window along axis i; of adaptive windows, the largest that may occur.
inline int64_t pool_box(const PoolGeometry& g, int i) {
  if (!g.adaptive) return g.kernel[i];
  return g.out[i] == 0 ? 0 : g.in[i] / g.out[i] + (g.in[i] % g.out[i] == 0 ? 0 : 2);
}

// What a max pool keeps of where its maxima were.
enum class PoolIndices : int {
  none,
  window,  // uint8: the position within the window, ((d * box_h) + h) * box_w + w; boxes of up to 256 elements
  plane,   // int64: the position within the input plane, ((d * in_h) + h) * in_w + w, as PyTorch returns it
};

// y = max over the window; the first of equal maxima counts, and a NaN counts as greater than anything, the last NaN of
// a window being taken, as in PyTorch. x and y are dense in `layout`; indices has y's shape and layout.
struct MaxPoolForward {
  DType dtype;
  Layout layout;
  PoolGeometry geometry;
  const void* x;
  void* y;
  PoolIndices kind;
  void* indices;
};

// grad_x[i] = sum of grad_y[p] over the windows p whose maximum was at i, summed in float32 (float64 for float64) in
// the order of p. Every element of grad_x is written.
struct MaxPoolBackward {
  DType dtype;
  Layout layout;
  PoolGeometry geometry;
  const void* grad_y;
  PoolIndices kind;  // window or plane
  const void* indices;
  void* grad_x;
};

// y[p] = sum over the window / divisor. divisor_override where it is not 0; else with count_include_pad the window's
// size clipped to the padded input [-padding, in + padding), else the number of elements inside the input. Sums in
// float32 (float64 for float64). Adaptive pools divide by the elements of the window.
struct AvgPoolForward {
  DType dtype;
  Layout layout;
  PoolGeometry geometry;
  bool count_include_pad;
  int64_t divisor_override;
  const void* x;
  void* y;
};

struct AvgPoolBackward {
  DType dtype;
  Layout layout;
  PoolGeometry geometry;
  bool count_include_pad;
  int64_t divisor_override;
  const void* grad_y;
  void* grad_x;
};

}  // namespace fastops
