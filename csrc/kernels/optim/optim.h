// Contract of the optimizers' kernels: one step of SGD or Adam over a list of parameters.
//
// A piece is one parameter: its tensors have n elements each, all contiguous in one order, and are updated where they
// lie. Pieces may be of any size, also 0, and no two of them share memory unless the call is `in_order`: then they are
// updated one after the other, on one thread.
//
// Rounding is that of PyTorch's single-tensor implementation, operation by operation, in float32 and float64, so that
// results are bitwise the same on tiers that have a fused multiply-add; but the square root is correctly rounded, which
// MKL's is not. Of 16-bit types everything between the loads and the stores is float32: PyTorch rounds after every
// operation. A result does not depend on the number of threads. On a CPU, averages are zero where PyTorch's are
// denormal; but Adam's are kept where eps is below 1e-10 (1e-130 in float64), as there the smallest v divides.
//
// Sources: torch/optim/sgd.py, torch/optim/adam.py.
#pragma once

#include "../common/tensor.h"

namespace fastops {

// g = grad or, to maximize, -grad
// g = g + weight_decay p                          unless weight_decay is 0
// m = momentum m + (1 - dampening) g              with_momentum
// g = nesterov ? g + momentum m : m               with_momentum
// p = p - lr g
struct SgdStep {
  DType dtype;
  bool with_momentum, nesterov, maximize, in_order;

  struct Piece {
    void* p;
    const void* grad;
    void* m;  // the momentum buffer; null without momentum
    int64_t n;
  };
  struct Options {
    double lr, momentum, dampening, weight_decay;
  };
  struct Pointers {
    const Piece* pieces;
    int64_t count;
    const Options* options;
  };
  bool operator==(const SgdStep&) const = default;
};

// g = grad or, to maximize, -grad
// p = p decay                                     decoupled; decay = 1 - lr weight_decay
// g = g + weight_decay p                          not decoupled, unless weight_decay is 0
// m = m + (1 - beta1) (g - m)
// v = beta2 v + (1 - beta2) g^2
// top = max(top, v), NaN if either is             amsgrad; else top = v
// p = p + step_size m / (sqrt(top) / correction + eps)
//
// What depends on how many steps a parameter has taken is in its piece: step_size = -lr / (1 - beta1^t),
// correction = sqrt(1 - beta2^t).
struct AdamStep {
  DType dtype;
  bool amsgrad, maximize, in_order;

  struct Piece {
    void* p;
    const void* grad;
    void *m, *v;
    void* top;  // null without amsgrad
    int64_t n;
    double step_size, correction;
  };
  struct Options {
    double beta1, beta2, eps;
    double weight_decay;  // 0 if it is decoupled
    double decay;         // 1 if it is not
  };
  struct Pointers {
    const Piece* pieces;
    int64_t count;
    const Options* options;
  };
  bool operator==(const AdamStep&) const = default;
};

#define FASTOPS_CALLS_optim(X) X(SgdStep) X(AdamStep)

}  // namespace fastops
