// Contract of the linear kernels: y = f(x W^T + b) and the gradients of x, W and b. Strides are in elements. Sizes are
// >= 0.
#pragma once

#include "../activation/activation.h"
#include "../common/tensor.h"

namespace fastops {

// y[m, n] = f(sum_k x[m, k] w[n, k] + bias[n] + residual[m, n]). k == 0 gives f(bias + residual).
//
// x and w have any strides and are never copied as a whole. bias is a vector with any stride. y is row-major with
// y_row_stride >= n. z receives the argument of f in the dtype and layout of y; residual has that layout too. y and z
// overlap no operand. On a GPU and for 16-bit dtypes there is no plan with a residual.
//
// Products accumulate in float32 (float64 for float64). 16-bit results are rounded once, after bias and activation. The
// result is bitwise the same for any number of threads.
//
// Precision::highest: as exact as float32 multiply-adds. Of float32 operands, a CPU with AMX may then multiply three
// bf16 parts, which add up to them, with Precision::high two (16 bits) and with Precision::medium one.
// Precision::medium: a GPU may round them to TF32.
struct LinearForward {
  DType dtype;
  int64_t m, n, k;
  Strides x_strides, w_strides;
  int64_t y_row_stride;
  bool with_bias = false;
  int64_t bias_stride = 1;
  Activation activation = {};
  bool with_z = false;
  bool with_residual = false;
  Precision precision = Precision::highest;
  bool packed_w = false;  // w is what Plan::pack made of it, if the plan has something to pack
  int alignment = 1;      // of x and w, in bytes; a multiple of 64 is as good as 64

  struct Pointers {
    const void* x;
    const void* w;
    const void* bias = nullptr;
    void* y;
    void* z = nullptr;
    const void* residual = nullptr;
  };
  bool operator==(const LinearForward&) const = default;
};

// With g[m, n] = grad_y[m, n] * f'(saved[m, n]), computed while grad_y is read:
//
//   grad_x[m, k] = sum_n g[m, n] w[n, k]      grad_w[n, k] = sum_m g[m, n] x[m, k]      grad_bias[n] = sum_m g[m, n]
//
// grad_y, saved, x and w have any strides. If saved is z, the CUDA kernels require unit column strides of grad_y and
// saved. saved is y or z, as saved_by_linear(activation) says; for identity it is not read. Each output is contiguous
// and overlaps no operand. Operands that only an unwanted output needs are not read.
//
// For 16-bit dtypes, g may be rounded to the storage type when it is packed for a 16-bit multiply. The CPU kernels do
// not round it before they sum it into grad_bias.
struct LinearBackward {
  DType dtype;
  int64_t m, n, k;
  Strides grad_y_strides = {}, saved_strides = {}, x_strides = {}, w_strides = {};
  Activation activation = {};
  bool with_grad_x = false, with_grad_w = false, with_grad_bias = false;
  Precision precision = Precision::highest;
  int alignment = 1;  // of grad_y, x and w, in bytes

  struct Pointers {
    const void* grad_y;
    const void* saved = nullptr;
    const void* x = nullptr;
    const void* w = nullptr;
    void* grad_x = nullptr;
    void* grad_w = nullptr;
    void* grad_bias = nullptr;
  };
  bool operator==(const LinearBackward&) const = default;
};

#define FASTOPS_CALLS_linear(X) X(LinearForward) X(LinearBackward)

}  // namespace fastops
