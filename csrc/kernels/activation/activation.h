// Contract of the activation kernels: y = f(x), elementwise, and the gradient of x.
//
// Strides are in elements and may be any number: zero (an expanded tensor), negative, or less than a row. No output
// overlaps an operand unless a struct below allows it. Sizes are >= 0; PReLU has at least one channel.
#pragma once

#include "../common/tensor.h"

namespace fastops {

// The elementwise activations, with the formulas of torch.nn: one table for C++ and, as _C.ACTIVATIONS, for
// Python.
//
//   kind              of ActivationKind, of activation="..." and in record()
//   formula           its struct in activation_math.inl
//   function, module  torch.nn.functional's and torch.nn's
//   parameters        what a and b are, by torch's names and with its defaults
//   approximate       the argument of function and module that makes them this kind
//   in_place          whether function has an argument inplace
//   valid             the a and b that the kernels take
//   saves             what backward reads where the activation is not fused (Saved)
//   from_y            when f'(x) follows exactly from y, for a or b that 16-bit types may round: exact(a)
//   in_place_from_y   when an in-place call takes it from y all the same, as torch does
//
// clang-format off
#define FASTOPS_ACTIVATIONS(X) \
  /* x */ \
  X(identity, Identity, identity, Identity, "", "", false, true, nothing, false, false) \
  /* max(x, 0) */ \
  X(relu, Relu, relu, ReLU, "", "", true, true, mask, true, false) \
  /* min(max(x, 0), 6) */ \
  X(relu6, Hardtanh, relu6, ReLU6, "", "", true, true, mask, true, false) \
  /* x > 0 ? x : a x */ \
  X(leaky_relu, LeakyRelu, leaky_relu, LeakyReLU, "negative_slope=0.01", "", true, true, mask, a > 0, false) \
  /* x > 0 ? x : a (exp(x) - 1) */ \
  X(elu, Elu, elu, ELU, "alpha=1", "", true, true, input, false, a >= 0) \
  /* scale (x > 0 ? x : alpha (exp(x) - 1)), fixed constants */ \
  X(selu, Elu, selu, SELU, "", "", true, true, input, false, true) \
  /* x > 0 ? x : a (exp(x / a) - 1) */ \
  X(celu, Elu, celu, CELU, "alpha=1", "", true, a != 0, input, false, a > 0) \
  /* x Phi(x), by erf */ \
  X(gelu, Gelu, gelu, GELU, "", "none", false, true, input, false, false) \
  /* 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) */ \
  X(gelu_tanh, GeluTanh, gelu, GELU, "", "tanh", false, true, input, false, false) \
  /* x sigmoid(x) */ \
  X(silu, Silu, silu, SiLU, "", "", true, true, input, false, false) \
  /* x tanh(softplus(x)) */ \
  X(mish, Mish, mish, Mish, "", "", true, true, input, false, false) \
  /* 1 / (1 + exp(-x)) */ \
  X(sigmoid, Sigmoid, sigmoid, Sigmoid, "", "", false, true, output, true, false) \
  /* log(sigmoid(x)) */ \
  X(logsigmoid, Logsigmoid, logsigmoid, LogSigmoid, "", "", false, true, input, false, false) \
  /* tanh(x) */ \
  X(tanh, Tanh, tanh, Tanh, "", "", false, true, output, true, false) \
  /* a x > b ? x : log(1 + exp(a x)) / a */ \
  X(softplus, Softplus, softplus, Softplus, "beta=1, threshold=20", "", false, true, input, false, false) \
  /* x / (1 + |x|) */ \
  X(softsign, Softsign, softsign, Softsign, "", "", false, true, input, false, false) \
  /* min(max(x, a), b) */ \
  X(hardtanh, Hardtanh, hardtanh, Hardtanh, "min_val=-1, max_val=1", "", true, a <= b, mask, exact(a) && exact(b), \
    false) \
  /* min(max(x + 3, 0), 6) / 6 */ \
  X(hardsigmoid, Hardsigmoid, hardsigmoid, Hardsigmoid, "", "", true, true, mask, false, false) \
  /* x min(max(x + 3, 0), 6) / 6 */ \
  X(hardswish, Hardswish, hardswish, Hardswish, "", "", true, true, input, false, false) \
  /* |x| <= a ? 0 : x */ \
  X(hardshrink, Hardshrink, hardshrink, Hardshrink, "lambd=0.5", "", false, true, mask, a >= 0, false) \
  /* x > a ? x - a : x < -a ? x + a : 0 */ \
  X(softshrink, Softshrink, softshrink, Softshrink, "lambd=0.5", "", false, a >= 0, mask, a >= 0 && exact(a), false) \
  /* x - tanh(x) */ \
  X(tanhshrink, Tanhshrink, tanhshrink, Tanhshrink, "", "", false, true, input, false, false) \
  /* x > a ? x : b */ \
  X(threshold, Threshold, threshold, Threshold, "threshold, value", "", true, true, mask, false, false)
// clang-format on

enum class ActivationKind : int {
#define FASTOPS_KIND(kind, ...) kind,
  FASTOPS_ACTIVATIONS(FASTOPS_KIND)
#undef FASTOPS_KIND
      count
};

struct Activation {
  ActivationKind kind = ActivationKind::identity;
  double a = 0;
  double b = 0;
  // By bits: 0.0 and -0.0 give different results, and a NaN is the same as itself.
  bool operator==(const Activation& other) const {
    return kind == other.kind && __builtin_bit_cast(uint64_t, a) == __builtin_bit_cast(uint64_t, other.a) &&
           __builtin_bit_cast(uint64_t, b) == __builtin_bit_cast(uint64_t, other.b);
  }
};

// What backward reads besides the incoming gradient.
enum class Saved : int {
  nothing,  // identity
  mask,     // one bit per element, which selects one of the derivative's two values
  output,   // y
  input,    // x
};

// What an activation that is not fused saves.
Saved saved_by_default(Activation activation);

// What a fused layer saves: y where f'(x) can be computed exactly from it, otherwise x, the pre-activation. It is never
// a mask.
Saved saved_by_linear(Activation activation);

// Whether backward can be computed from y, as an in-place call requires.
bool can_save_output(Activation activation);

// Whether the kernels take these parameters.
bool is_valid(Activation activation);

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

#define FASTOPS_CALLS_activation(X) \
  X(ActivationForward) X(ActivationBackward) X(PreluForward) X(PreluBackward) X(GluForward) X(GluBackward)

}  // namespace fastops
