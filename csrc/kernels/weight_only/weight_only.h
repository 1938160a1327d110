// Contract of the linear kernels with weights of 8 or 4 bits that become float32 on the way: y = f(x W^T + b).
#pragma once

#include "../activation/activation.h"
#include "../common/tensor.h"

namespace fastops {

// What an element q of a row of w is.
enum class WeightFormat : int {
  int8,    // the byte k
  uint4,   // 0 to 15: of byte k / 2 the low half for even k, the high half for odd k
  float8,  // of byte k, e4m3fn: sign, 4 bits of exponent (bias 7), 3 of mantissa; no infinity, NaN is 0x7f and 0xff
};
inline constexpr int bits_of(WeightFormat format) { return format == WeightFormat::uint4 ? 4 : 8; }

// W[n, k] = scale[n, g] q[n, k] + offset[n, g], where g = k / group. Rows of w are w_row_stride bytes apart.
//
// scale and offset are contiguous matrices with ceil(k / group) columns. Without offset it is 0. group is a power of
// two that is 16 or more, or k or more, for one group in a row, which float8 always has.
//
// Products accumulate in float32; y is rounded once to its type, after bias and f. The result is bitwise the same for
// any number of threads. Rows of x and y are contiguous, their strides are any (that of y >= n); bias is contiguous. y
// overlaps no operand. k == 0 gives f(bias).
struct WeightOnlyForward {
  DType dtype;  // of x, bias and y: f32, bf16 or f16
  WeightFormat format;
  int64_t m, n, k, group;
  int64_t x_row_stride, w_row_stride, y_row_stride;
  bool with_offset = false, with_bias = false;
  Activation activation = {};

  struct Pointers {
    const void* x;
    const void* w;
    const float* scale;
    const float* offset = nullptr;
    const void* bias = nullptr;
    void* y;
  };
  bool operator==(const WeightOnlyForward&) const = default;
};

#define FASTOPS_CALLS_weight_only(X) X(WeightOnlyForward)

}  // namespace fastops
