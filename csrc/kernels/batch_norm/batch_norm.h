// Contract of batch normalisation, with a residual addition and an activation behind it:
//
//   z = gamma[c] (x - mean[c]) rstd[c] + beta[c] + residual,   y = f(z)
//
// x[outer, channels, inner], residual, y and their gradients are contiguous: (N, C, spatial...) has outer = N and inner
// the size of a plane; channels_last, and (N, C), have outer = all positions and inner = 1. All sizes are positive.
// gamma, beta and the running statistics are contiguous [channels] in param_dtype, which is dtype or, for the 16-bit
// types, float32. mean and rstd are contiguous [channels] in float32 (float64 for float64).
//
// No output overlaps an operand or another output, unless a struct below allows it.
#pragma once

#include "../activation/activation.h"
#include "../common/tensor.h"

namespace fastops {

// Training: mean and the biased variance v are those of the batch, each within some roundings of float32 (float64) of
// the exact value, whatever the mean; rstd = 1 / sqrt(v + eps). With running statistics, these become (1 - momentum)
// running + momentum new, where the new variance is the unbiased one; of a single value a channel it is infinite or
// NaN. Else mean and v are the running statistics, which are only read. with_stats, mean and rstd are written in both
// cases.
//
// Source: torch.nn.functional.batch_norm. The variance is that of Chan, Golub and LeVeque ("Algorithms for computing
// the sample variance", 1983), over blocks that are shifted by the mean of those before.
struct BatchNormForward {
  DType dtype, param_dtype;
  Activation activation;
  bool training;
  bool with_gamma = false, with_beta = false, with_residual = false, with_running = false, with_stats = false;
  double eps;
  int64_t outer, channels, inner;

  struct Pointers {
    const void* x;
    const void* gamma;
    const void* beta;
    const void* residual;
    void* y;
    void* mean = nullptr;
    void* rstd = nullptr;
    void* running_mean = nullptr;  // written in training only
    void* running_var = nullptr;
    double momentum = 0;
  };
  bool operator==(const BatchNormForward&) const = default;
};

// With g = grad_y f', and sums over all positions of a channel:
//
//   grad_beta = sum g,  grad_gamma = rstd sum g (x - mean),  grad_residual = g
//   grad_x = gamma rstd (g - (sum g) / n - (x - mean) rstd^2 (sum g (x - mean)) / n), in training;  gamma rstd g, else
//
// saved_kind says what f' is computed from: nothing (identity), z, which is formed again from x and, with_residual,
// from residual (input), or y (output; only kinds whose derivative follows from y, see saved_by_linear). mean and rstd
// are forward's. Sums are formed in float32 over short runs and in float64 over these; their order does not depend on
// the number of threads. with_grad_residual is false for the identity, where it is grad_y.
struct BatchNormBackward {
  DType dtype, param_dtype;
  Activation activation;
  bool training;
  Saved saved_kind;
  bool with_gamma = false, with_beta = false, with_residual = false;
  bool with_grad_x = false, with_grad_gamma = false, with_grad_beta = false, with_grad_residual = false;
  int64_t outer, channels, inner;

  struct Pointers {
    const void* grad_y;
    const void* x;
    const void* gamma;
    const void* beta;
    const void* saved;  // residual or y
    const void* mean;
    const void* rstd;
    void* grad_x = nullptr;
    void* grad_gamma = nullptr;
    void* grad_beta = nullptr;
    void* grad_residual = nullptr;
  };
  bool operator==(const BatchNormBackward&) const = default;
};

#define FASTOPS_CALLS_batch_norm(X) X(BatchNormForward) X(BatchNormBackward)

}  // namespace fastops
