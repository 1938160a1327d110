// Contract of the int8 linear kernel: y = f(x W^T + b), where W is int8 with a scale for each output feature, and x is
// rounded to 8 bits row by row while it is read ("dynamic quantization").
#pragma once

#include "../activation/activation.h"
#include "../common/tensor.h"

namespace fastops {

// Sums of this many products of 8 bits fit 32 bits.
inline constexpr int64_t kMostInt8Features = 65536;

// Of each row of x: low = min(0, its smallest element), high = max(0, its largest), and
//
//   s[m] = max(high / 255 - low / 255, the smallest normal float)     z[m] = round(-low (1 / s[m]))
//   q[m, k] = min(max(round(x[m, k] (1 / s[m])) + z[m], 0), 255)
//
// in float32, halves to even. A row that holds an infinity or NaN has s[m] = NaN. Then
//
//   y[m, n] = f(s[m] w_scale[n] sum_k (q[m, k] - z[m]) w[n, k] + bias[n])
//
// The sum is exact; what follows is float32, one rounding for each operation, and y is rounded once more to its type.
// So y has the same bits on every tier and for any number of threads. k <= kMostInt8Features; k == 0 gives f(bias).
// Rows of x, w and y are contiguous, their strides are any (that of y >= n); bias and w_scale are contiguous. y
// overlaps no operand.
struct LinearInt8Forward {
  static constexpr bool integer_products = true;

  DType dtype;  // of x, bias and y: f32, bf16 or f16
  int64_t m, n, k;
  int64_t x_row_stride, w_row_stride, y_row_stride;
  bool with_bias = false;
  Activation activation = {};
  bool packed_w = false;  // w is what Plan::pack made of it

  struct Pointers {
    const void* x;
    const void* w;  // int8
    const float* w_scale;
    const void* bias = nullptr;
    void* y;
  };
  bool operator==(const LinearInt8Forward&) const = default;
};

#define FASTOPS_CALLS_linear_int8(X) X(LinearInt8Forward)

}  // namespace fastops
