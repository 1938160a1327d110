// Contract of the layer normalisations: rows of `size` numbers, each with its own mean and variance.
//
// x is [outer, size, inner] with unit stride along inner: row (o, i) is x[o, :, i], and rows are counted in this order.
// inner == 1 is the usual case of contiguous rows; inner > 1 are the channels of a channels-first image. outer, size
// and inner are >= 1. What is computed is contiguous [outer * inner, size], whatever inner is, and overlaps no operand.
// Strides are in elements and may be any number.
//
// weight and bias have parameter_dtype: dtype, or float32 where dtype has 16 bits. Sums are float32 (float64 for
// float64); their order does not depend on the number of threads.
// Source: Ba, Kiros and Hinton, "Layer Normalization" (2016); Zhang and Sennrich, "Root Mean Square Layer
// Normalization" (2019).
#pragma once

#include "../common/tensor.h"

namespace fastops {

// y = (x - mean) rstd weight + bias, with rstd = 1 / sqrt(mean((x - mean)^2) + eps) and mean and variance of each row.
// rms: the same with mean = 0.
//
// weight and bias are contiguous [size]; null is 1 and 0. mean and rstd, [outer * inner] in float32
// (float64 for float64), may be null where nobody wants them; mean is not written if rms.
struct LayerNormForward {
  DType dtype, parameter_dtype;
  bool rms;
  double eps;
  int64_t outer, size, inner;
  int64_t x_outer_stride;  // its stride along size is inner

  struct Pointers {
    const void* x;
    const void* weight = nullptr;
    const void* bias = nullptr;
    void* y;
    void* mean = nullptr;
    void* rstd = nullptr;
  };
  bool operator==(const LayerNormForward&) const = default;
};

// With n = (x - mean) rstd and g = grad_y weight, for each row:
// grad_x = rstd (g - mean(g) - n mean(g n)), where rms leaves out mean(g), and over all rows
// grad_weight = sum grad_y n, grad_bias = sum grad_y.
//
// grad_y is [outer * inner, size] with unit stride along size and its own row stride.
struct LayerNormBackward {
  DType dtype, parameter_dtype;
  bool rms;
  bool with_grad_x, with_grad_weight, with_grad_bias;
  int64_t outer, size, inner;
  int64_t x_outer_stride, grad_y_row_stride;

  struct Pointers {
    const void* grad_y;
    const void* x;
    const void* weight = nullptr;
    const void* mean = nullptr;
    const void* rstd;
    void* grad_x = nullptr;
    void* grad_weight = nullptr;
    void* grad_bias = nullptr;
  };
  bool operator==(const LayerNormBackward&) const = default;
};

#define FASTOPS_CALLS_layer_norm(X) X(LayerNormForward) X(LayerNormBackward)

}  // namespace fastops
