// Contract of the linear kernels: y = f(x W^T + b) and the gradients of x, W and b. Strides are in elements. Sizes are
// >= 0.
#pragma once

#include "../activation/activation.h"
#include "../common/parallel.h"
#include "../common/tensor.h"

namespace fastops {

// How bf16 products are computed on a tier with a bf16 instruction: by that instruction (`native`), or by float32
// multiply-adds on panels converted to float32. `automatic` is the faster one on this processor. The other two exist
// for tests and measurements.
enum class Bf16Multiply : int { automatic, float32, native };

// y[m, n] = f(sum_k x[m, k] w[n, k] + b[n]). k == 0 gives f(b).
//
// x and w have any strides (tensor.h) and are never copied as a whole. b is null, or a vector with any stride b_stride.
// y is row-major with y_row_stride >= n. z is null, or receives the pre-activation x W^T + b in the dtype and layout of
// y. y and z overlap no operand.
//
// Products accumulate in float32 (float64 for float64). 16-bit results are rounded once, after bias and activation. The
// result is bitwise the same for any number of threads.
struct LinearForward {
  DType dtype;
  int64_t m, n, k;
  Matrix x;
  Matrix w;
  const void* b;
  int64_t b_stride;
  Activation activation;
  void* y;
  int64_t y_row_stride;
  void* z;
  Bf16Multiply bf16_multiply = Bf16Multiply::automatic;  // CPU
  bool allow_tf32 = false;                               // CUDA: float32 products of operands rounded to tf32
};

// With g[m, n] = grad_y[m, n] * f'(saved[m, n]), computed while grad_y is read:
//
//   grad_x[m, k] = sum_n g[m, n] w[n, k]      grad_w[n, k] = sum_m g[m, n] x[m, k]      grad_b[n] = sum_m g[m, n]
//
// grad_y, saved, x and w have any strides (tensor.h). If saved is z, the CUDA kernels require unit column strides of
// grad_y and saved. saved is y or z, as saved_by_linear(activation) says; for identity it is not read. Each output is
// contiguous and overlaps no operand. A null output is not computed, and operands that only it needs are not read.
//
// For 16-bit dtypes, g may be rounded to the storage type when it is packed for a 16-bit multiply. The CPU kernels do
// not round it before they sum it into grad_b.
struct LinearBackward {
  DType dtype;
  int64_t m, n, k;
  Matrix grad_y;
  Activation activation;
  Matrix saved;
  Matrix x;
  Matrix w;
  void* grad_x;
  void* grad_w;
  void* grad_b;
  Bf16Multiply bf16_multiply = Bf16Multiply::automatic;  // CPU
  bool allow_tf32 = false;                               // CUDA: float32 products of operands rounded to tf32
};

}  // namespace fastops
