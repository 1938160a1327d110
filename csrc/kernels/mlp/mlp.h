// Contract of the fully fused multilayer perceptron: all layers of a narrow network in one kernel, forward and
// backward. Where there is no plan, the op is a chain of linear layers (linear.h).
//
//   y_0 = x,   y_l+1 = f(y_l W_l^T + b_l) for l < layers - 1,   y = g(y_layers-1 W_layers-1^T + b_layers-1)
//
// Hidden outputs are rounded to the storage type, as in a chain of layers. Weights and activations stay on the chip, an
// idea of Mueller, Rousselle, Novak and Keller, "Real-time Neural Radiance Caching for Path Tracing" (2021).
//
// Strides are in elements. Outputs overlap no operand.
#pragma once

#include "../activation/activation.h"
#include "../common/tensor.h"

namespace fastops {

inline constexpr int kMostMlpLayers = 16;
inline constexpr int64_t kMostMlpWidth = 128;
inline constexpr int64_t kMostMlpWidthCpu = 128;
inline constexpr int kMlpPanel = 32;  // rows of the batch that the CPU takes at a time

// On a GPU float32, bfloat16 or float16 and every width from 1 to kMostMlpWidth; on the CPU float32 or float64 and
// every width from 1 to kMostMlpWidthCpu. Precision::medium: on a GPU float32 products of operands rounded to TF32.
struct MlpShape {
  DType dtype;
  Precision precision;
  int64_t m;  // rows of the batch
  int layers;
  int64_t widths[kMostMlpLayers + 1];  // of x, then of each layer's output
  bool operator==(const MlpShape&) const = default;
};

inline bool mlp_fits_cpu(const MlpShape& shape) {
  if ((shape.dtype != DType::f32 && shape.dtype != DType::f64) || shape.layers > kMostMlpLayers) return false;
  for (int l = 0; l <= shape.layers; ++l)
    if (shape.widths[l] < 1 || shape.widths[l] > kMostMlpWidthCpu) return false;
  return true;
}

// What forward saves for backward on a GPU: layers - 1 matrices [m, mlp_hidden_stride] with the hidden outputs. If
// saved_by_linear(f) is input, layers - 1 more with their pre-activations follow. Columns past a layer's width are
// undefined.
inline int64_t mlp_hidden_stride(const MlpShape& shape) {
  int64_t widest = 0;
  for (int l = 1; l < shape.layers; ++l) widest = shape.widths[l] > widest ? shape.widths[l] : widest;
  return (widest + 7) / 8 * 8;  // rows start on 16 bytes
}
inline int64_t mlp_hidden_matrices(const MlpShape& shape, const Activation& hidden) {
  return (shape.layers - 1) * (saved_by_linear(hidden) == Saved::input ? 2 : 1);
}

inline bool has_slope(const Activation& f) { return f.kind != ActivationKind::identity; }

// The same on the CPU: for each panel, kMlpPanel rows of the batch, `total` elements. In them are matrices
// [features, kMlpPanel]: the outputs of hidden layers, and what derivatives are formed from where that is not the
// output of a hidden layer. Rows past the batch are zero.
struct MlpSaved {
  int64_t output[kMostMlpLayers];   // where the output of hidden layer l begins
  int64_t derived[kMostMlpLayers];  // where what f'(layer l) is formed from begins
  int64_t total;
};
inline MlpSaved mlp_saved(const MlpShape& shape, const Activation& hidden, const Activation& output) {
  MlpSaved saved{};
  const auto take = [&](int64_t width) {
    const int64_t at = saved.total;
    saved.total += width * kMlpPanel;
    return at;
  };
  for (int l = 0; l < shape.layers - 1; ++l) {
    saved.output[l] = saved.derived[l] = take(shape.widths[l + 1]);
    if (has_slope(hidden) && saved_by_linear(hidden) == Saved::input) saved.derived[l] = take(shape.widths[l + 1]);
  }
  if (has_slope(output)) saved.derived[shape.layers - 1] = take(shape.widths[shape.layers]);
  return saved;
}
inline int64_t mlp_saved_elements(const MlpShape& shape, const Activation& hidden, const Activation& output) {
  return (shape.m + kMlpPanel - 1) / kMlpPanel * mlp_saved(shape, hidden, output).total;
}

// x has unit column stride and any x_row_stride. W_l [widths[l + 1], widths[l]], b_l and y are contiguous.
struct MlpForward {
  MlpShape shape;
  int64_t x_row_stride;
  Activation hidden, output;

  struct Pointers {
    const void* x;
    const void* w[kMostMlpLayers];
    const void* bias[kMostMlpLayers];  // each nullable
    void* y;
    void* z = nullptr;               // nullable, GPU: the pre-activation of y, in the layout of y
    void* hidden_outputs = nullptr;  // nullable: what backward needs (see above); 16-byte aligned
  };
  bool operator==(const MlpForward&) const = default;
};

// The gradients of x, every W_l and every b_l, from grad_y and what forward saved.
//
// grad_y and x have unit column stride and any row stride. saved is y or z, as saved_by_linear(output) says, and
// contiguous; for identity and on the CPU it is not read. Every gradient is contiguous. A null gradient is not
// computed. The gradients of weights and biases are summed in float32, in an order that depends only on the shape and
// the chip.
struct MlpBackward {
  MlpShape shape;
  int64_t grad_y_row_stride, x_row_stride;
  Activation hidden, output;

  struct Pointers {
    const void* grad_y;
    const void* saved;
    const void* x;
    const void* w[kMostMlpLayers];
    const void* hidden_outputs;
    void* grad_x;  // each gradient nullable
    void* grad_w[kMostMlpLayers];
    void* grad_bias[kMostMlpLayers];
  };
  bool operator==(const MlpBackward&) const = default;
};

#define FASTOPS_CALLS_mlp(X) X(MlpForward) X(MlpBackward)

}  // namespace fastops
