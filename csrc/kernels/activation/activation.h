// Contract of the activation kernels: y = f(x), elementwise, and the gradient of x.
//
// Strides are in elements and may be any number: zero (an expanded tensor), negative, or less than a row. No output
// overlaps an operand unless a struct below allows it. Sizes are >= 0; PReLU has at least one channel.
#pragma once

#include "../common/tensor.h"

namespace fastops {

// The elementwise activations, with the formulas of torch.nn. The right-hand column says what the parameters a and b
// are.
enum class ActivationKind : int {
  identity,
  relu,         // max(x, 0)
  relu6,        // min(max(x, 0), 6)
  leaky_relu,   // x > 0 ? x : a x                            a = negative_slope
  elu,          // x > 0 ? x : a (exp(x) - 1)                 a = alpha
  selu,         // scale * (x > 0 ? x : alpha (exp(x) - 1))   fixed constants
  celu,         // x > 0 ? x : a (exp(x / a) - 1)             a = alpha (not 0)
  gelu,         // x Phi(x), by erf
  gelu_tanh,    // 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))
  silu,         // x sigmoid(x)
  mish,         // x tanh(softplus(x))
  sigmoid,      // 1 / (1 + exp(-x))
  logsigmoid,   // log(sigmoid(x))
  tanh,         //
  softplus,     // a x > b ? x : log(1 + exp(a x)) / a        a = beta, b = threshold
  softsign,     // x / (1 + |x|)
  hardtanh,     // min(max(x, a), b)                          a = min_val, b = max_val
  hardsigmoid,  // min(max(x + 3, 0), 6) / 6
  hardswish,    // x min(max(x + 3, 0), 6) / 6
  hardshrink,   // |x| <= a ? 0 : x                           a = lambda
  softshrink,   // x > a ? x - a : x < -a ? x + a : 0         a = lambda
  tanhshrink,   // x - tanh(x)
  threshold,    // x > a ? x : b                              a = threshold, b = value
  count
};

struct Activation {
  ActivationKind kind = ActivationKind::identity;
  double a = 0;
  double b = 0;
  bool operator==(const Activation&) const = default;
};

// What backward reads besides the incoming gradient.
enum class Saved : int {
  nothing,  // identity
  mask,     // one bit per element, which selects one of the derivative's two values
  output,   // y
  input,    // x
};

// What an activation that is not fused saves: a mask for the piecewise linear kinds (relu, relu6, leaky_relu, hardtanh,
// hardsigmoid, hardshrink, softshrink, threshold), y for sigmoid and tanh, x for the others.
Saved saved_by_default(Activation activation);

// What a fused linear layer saves. It is y where f'(x) can be computed exactly from y: relu, relu6, leaky_relu with
// a > 0, hardshrink with a >= 0, hardtanh and softshrink (a >= 0) if 16-bit types hold their bounds exactly, sigmoid,
// tanh. Otherwise it is x, the pre-activation. It is never a mask.
Saved saved_by_linear(Activation activation);

// Whether backward can be computed from y, as an in-place call requires: the kinds for which saved_by_linear returns
// output, and elu (a >= 0), selu and celu (a > 0), as in torch.
bool can_save_output(Activation activation);

// y[r, c] = f(x[r, c]) for r < rows, c < cols.
//
// x has unit column stride and x_row_stride between rows. y is contiguous. x == y (in place) is allowed if x is
// contiguous. A contiguous tensor of any shape is one row.
//
// With a mask, element (r, c) sets bit c % 8 of mask[r * mask_row_bytes(cols) + c / 8] if the derivative
// takes the value of the piece "inside", with torch's decision on NaN. Bits past cols are zero.
struct ActivationForward {
  DType dtype;
  Activation activation;
  int64_t rows, cols;
  int64_t x_row_stride;
  bool with_mask = false;

  struct Pointers {
    const void* x;
    void* y;
    uint8_t* mask = nullptr;
  };
  bool operator==(const ActivationForward&) const = default;
};

inline int64_t mask_row_bytes(int64_t cols) { return (cols + 7) / 8; }

// grad_x[r, c] = grad_y[r, c] * f'(x[r, c]), where the derivative is read from `saved`.
//
// saved_kind says what `saved` is: x (every kind except sigmoid and tanh), y (where can_save_output is true), or
// forward's mask (where saved_by_default is mask). grad_y, x and y have unit column stride and their own row strides;
// the rows of a mask are mask_row_bytes(cols) apart. grad_x is contiguous. It may be the same memory as grad_y or saved
// if that operand is contiguous.
struct ActivationBackward {
  DType dtype;
  Activation activation;
  Saved saved_kind;
  int64_t rows, cols;
  int64_t grad_y_row_stride, saved_row_stride;

  struct Pointers {
    const void* grad_y;
    const void* saved;
    void* grad_x;
  };
  bool operator==(const ActivationBackward&) const = default;
};

// PReLU: y[o, c, i] = x[o, c, i] > 0 ? x[o, c, i] : w[c] x[o, c, i]. x and y are contiguous [outer, channels, inner].
// channels == 1 is one weight for all elements. Weights are w_stride apart.
struct PreluForward {
  DType dtype;
  int64_t outer, channels, inner;
  int64_t w_stride;

  struct Pointers {
    const void* x;
    const void* w;
    void* y;
  };
  bool operator==(const PreluForward&) const = default;
};

// grad_x[o, c, i] = grad_y[o, c, i] * (x[o, c, i] > 0 ? 1 : w[c]), and grad_w[c] = sum of grad_y * x over x <= 0.
//
// grad_y, x and grad_x are contiguous [outer, channels, inner]; grad_w is contiguous [channels]. Sums are float32
// (float64 for float64); their order does not depend on the number of threads.
struct PreluBackward {
  DType dtype;
  int64_t outer, channels, inner;
  int64_t w_stride;
  bool with_grad_x = false, with_grad_w = false;

  struct Pointers {
    const void* grad_y;
    const void* x;
    const void* w;
    void* grad_x = nullptr;
    void* grad_w = nullptr;
  };
  bool operator==(const PreluBackward&) const = default;
};

// GLU: y[o, i] = x[o, 0, i] * sigmoid(x[o, 1, i]). x [outer, 2, inner] and y [outer, inner] are contiguous.
struct GluForward {
  DType dtype;
  int64_t outer, inner;

  struct Pointers {
    const void* x;
    void* y;
  };
  bool operator==(const GluForward&) const = default;
};

// With s = sigmoid(x[o, 1, i]): grad_x[o, 0, i] = grad_y[o, i] s, and grad_x[o, 1, i] = grad_y[o, i] x[o, 0, i] s (1 -
// s). grad_y, x and grad_x are contiguous.
struct GluBackward {
  DType dtype;
  int64_t outer, inner;

  struct Pointers {
    const void* grad_y;
    const void* x;
    void* grad_x;
  };
  bool operator==(const GluBackward&) const = default;
};

}  // namespace fastops
