// Contract of the losses: cross entropy with class indices, and the mean squared error.
//
// Sums are formed in blocks whose sizes depend on the call alone, and added in order in float64: a result does not
// depend on the number of threads. No output overlaps an operand. Sizes are >= 0, and there is at least one class.
//
// Sources: torch.nn.functional.cross_entropy, torch.nn.functional.mse_loss.
#pragma once

#include "../common/tensor.h"

namespace fastops {

enum class Reduction : int { none, mean, sum };

// x is [outer, classes, inner], contiguous; a position is an (outer, inner), in that order, and has a target class.
// With w = 1 where there are no weights, S = smoothing and logp = x - top - log(sum of exp(x - top)), top = max of x:
//
// loss = (1 - S) w[t] -logp[t] + S / classes sum over c of w[c] -logp[c], and 0 where t == ignore_index
// none: y[position] = loss, sum: y = the sum of them, mean: that sum / total, total = the sum of w[t] where t counts
//
// statistics, of Compute type and not null where they are wanted, are what backward reads: top for every position, then
// the sum of exp(x - top) for every position, then total.
//
// A target that is neither ignore_index nor a class is never used as an index. *bad is the first position that has one,
// else -1; the outputs then are undefined. A GPU's kernels do not write it: there such a target is a failure of the
// kernel, as in PyTorch.
struct CrossEntropyForward {
  DType dtype;
  int64_t outer, classes, inner;
  int64_t ignore_index;
  double smoothing;
  Reduction reduction;

  struct Pointers {
    const void* x;
    const int64_t* target;
    const void* w;  // [classes], or null
    void* y;
    void* statistics;
    int64_t* bad;
  };
  bool operator==(const CrossEntropyForward&) const = default;
};

// grad_x from the same operands, the statistics and grad_y, which has the shape of y. Where a target does not count the
// gradient is 0. grad_x may be the same memory as x.
struct CrossEntropyBackward {
  DType dtype;
  int64_t outer, classes, inner;
  int64_t ignore_index;
  double smoothing;
  Reduction reduction;

  struct Pointers {
    const void* grad_y;
    const void* x;
    const int64_t* target;
    const void* w;
    const void* statistics;
    void* grad_x;
  };
  bool operator==(const CrossEntropyBackward&) const = default;
};

// y = (x - t)^2 for n elements, their sum, or their sum / n.
struct MseForward {
  DType dtype;
  int64_t n;
  Reduction reduction;

  struct Pointers {
    const void *x, *t;
    void* y;
  };
  bool operator==(const MseForward&) const = default;
};

// grad_x = 2 (x - t) grad_y, for the mean / n; grad_t = -grad_x. Either may be null.
struct MseBackward {
  DType dtype;
  int64_t n;
  Reduction reduction;

  struct Pointers {
    const void *grad_y, *x, *t;
    void *grad_x, *grad_t;
  };
  bool operator==(const MseBackward&) const = default;
};

#define FASTOPS_CALLS_loss(X) X(CrossEntropyForward) X(CrossEntropyBackward) X(MseForward) X(MseBackward)

}  // namespace fastops
