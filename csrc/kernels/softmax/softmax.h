// Contract of softmax and log_softmax over the middle dimension of [outer, size, inner].
//
// All tensors are contiguous and overlap nothing else. outer, size and inner are >= 1. Sums are float32 (float64 for
// float64); their order does not depend on the number of threads. A row with a NaN or +inf, or with nothing but -inf,
// is NaN; elsewhere -inf gives 0 (log: -inf).
#pragma once

#include "../common/tensor.h"

namespace fastops {

// y[o, j, i] = exp(x[o, j, i] - m) / s with m = max_j x[o, j, i] and s = sum_j exp(x[o, j, i] - m);
// log: y = x - m - log(s).
struct SoftmaxForward {
  DType dtype;
  bool log;
  int64_t outer, size, inner;

  struct Pointers {
    const void* x;
    void* y;
  };
  bool operator==(const SoftmaxForward&) const = default;
};

// grad_x = y (grad_y - sum_j grad_y y); log: grad_x = grad_y - exp(y) sum_j grad_y.
struct SoftmaxBackward {
  DType dtype;
  bool log;
  int64_t outer, size, inner;

  struct Pointers {
    const void* grad_y;
    const void* y;
    void* grad_x;
  };
  bool operator==(const SoftmaxBackward&) const = default;
};

#define FASTOPS_CALLS_softmax(X) X(SoftmaxForward) X(SoftmaxBackward)

}  // namespace fastops
