// Contract of the activation kernels: y = f(x), elementwise, and the gradient of x.
#pragma once

#include "parallel.h"
#include "tensor.h"

namespace fastops {

// The elementwise activations, with torch.nn's formulas. a and b are the parameters named in the comment.
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
};

// What backward reads besides the incoming gradient.
enum class Saved : int {
  nothing,  // identity
  mask,     // one bit an element: the derivative takes two values and the bit says which
  output,   // y
  input,    // x
};

// The default choice for an activation of its own: a mask for the piecewise linear kinds (relu, relu6, leaky_relu,
// hardtanh, hardsigmoid, hardshrink, softshrink, threshold), y for sigmoid and tanh, x for the others.
Saved saved_by_default(Activation activation);

// What a fused linear saves: y where f'(x) follows exactly from y (relu, relu6, leaky_relu with a > 0, hardtanh,
// hardshrink and softshrink with a >= 0, sigmoid, tanh), else x, the pre-activation. Never a mask.
Saved saved_by_linear(Activation activation);

// True where backward can also work from y, which an in-place call needs: the kinds of saved_by_linear's output, and
// elu (a >= 0), selu, celu (a > 0) as torch does it.
bool can_save_output(Activation activation);

// y[r, c] = f(x[r, c]) for r < rows, c < cols. x has unit column stride and x_row_stride between rows; y is contiguous.
// x == y (in place) is allowed when x is contiguous. A flat tensor is one row. mask, when not null, gets bit c of row r
// at mask[r * mask_row_bytes(cols) + c / 8], bit c % 8; bits past cols are zero. It is set where the derivative takes
// the value of the "inside" piece, with torch's own decision on NaN.
struct ActivationForward {
  DType dtype;
  Activation activation;
  int64_t rows, cols;
  const void* x;
  int64_t x_row_stride;
  void* y;
  uint8_t* mask;
};

inline int64_t mask_row_bytes(int64_t cols) { return (cols + 7) / 8; }

// grad_x[r, c] = grad_y[r, c] * f'(x[r, c]), read from `saved` (a mask, y or x, as saved_kind says: x will do for every
// kind but sigmoid and tanh, y where can_save_output allows, a mask where it is the default; dense rows for mask, row
// strides for the others). grad_x is contiguous and may be the same memory as grad_y or saved only when those are
// contiguous.
struct ActivationBackward {
  DType dtype;
  Activation activation;
  Saved saved_kind;
  int64_t rows, cols;
  const void* grad_y;
  int64_t grad_y_row_stride;
  const void* saved;
  int64_t saved_row_stride;
  void* grad_x;
};

// PReLU over x[outer, channels, inner], contiguous: y = x > 0 ? x : w[c] x. channels == 1 shares one weight. w_stride
// in elements between weights.
struct PreluForward {
  DType dtype;
  int64_t outer, channels, inner;
  const void* x;
  const void* w;
  int64_t w_stride;
  void* y;
};

// grad_x and grad_w[channels] (contiguous), each nullable when not needed. grad_w[c] = sum of grad_y * x over x <= 0,
// summed in float32 (float64 for float64) in an order that does not depend on the number of threads. workspace: see
// KernelTable::prelu_backward_workspace.
struct PreluBackward {
  DType dtype;
  int64_t outer, channels, inner;
  const void* grad_y;
  const void* x;
  const void* w;
  int64_t w_stride;
  void* grad_x;
  void* grad_w;
};

// GLU over x[outer, 2, inner], contiguous: y[o, i] = x[o, 0, i] * sigmoid(x[o, 1, i]).
struct GluForward {
  DType dtype;
  int64_t outer, inner;
  const void* x;
  void* y;
};

// grad_x[outer, 2, inner] from grad_y[outer, inner] and x.
struct GluBackward {
  DType dtype;
  int64_t outer, inner;
  const void* grad_y;
  const void* x;
  void* grad_x;
};

}  // namespace fastops
