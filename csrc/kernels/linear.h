// Contract of the linear kernels: y = f(x W^T + b) and the gradients of x, W and b.
#pragma once

#include "activation.h"
#include "parallel.h"
#include "tensor.h"

namespace fastops {

// How bf16 products are formed where the tier has a bf16 instruction: by it, or by float32 multiply-adds on converted
// panels. `automatic` takes the one that is faster on this processor; the others are for tests and measurements.
enum class Bf16Multiply : int { automatic, float32, native };

// y[m, n] = f(sum_k x[m, k] w[n, k] + b[n]), 0 <= m, n, k. k == 0 gives f(b). Products accumulate in float32 (float64
// for float64); 16-bit results are rounded once, after bias and activation. x and w have any strides; they are read
// where they lie, never copied whole. b is null or has b_stride between elements. y is row-major with y_row_stride >= n
// between rows. z is null, or takes the pre-activation x W^T + b in the same dtype and layout as y. y and z overlap no
// operand. The result is bitwise the same for any number of threads.
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

// With g[m, n] = grad_y[m, n] * f'(saved[m, n]), formed while grad_y is read:
//   grad_x[m, k] = sum_n g[m, n] w[n, k]      grad_w[n, k] = sum_m g[m, n] x[m, k]      grad_b[n] = sum_m g[m, n]
// Each output is contiguous row-major and nullable: a null one is not computed and what only it needs is not read.
// saved is y or z as saved_by_linear(activation) says, and is not read for identity. For 16-bit dtypes g may be rounded
// to the storage type where it is packed for a 16-bit multiply; the CPU's kernels do not round it before it is summed
// into grad_b. Where saved is z, the CUDA kernels want unit column strides of grad_y and saved.
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
