// Contract of the fully fused multilayer perceptron: every layer of a narrow network in one kernel, forward and
// backward. CUDA only; elsewhere, and where mlp_applies says no, it is a chain of linear layers (linear.h).
//
//   y_0 = x,   y_l+1 = f(y_l W_l^T + b_l) for l < layers - 1,   y = g(y_layers-1 W_layers-1^T + b_layers-1)
//
// Hidden outputs are rounded to the storage type, as a chain rounds them. The idea is from Mueller, Rousselle, Novak
// and Keller, "Real-time Neural Radiance Caching for Path Tracing" (2021): weights and activations stay on the chip.
#pragma once

#include "activation.h"
#include "tensor.h"

namespace fastops {

inline constexpr int kMostMlpLayers = 16;
inline constexpr int64_t kMostMlpWidth = 128;

// Float32, bfloat16 or float16; every width from 1 to kMostMlpWidth.
struct MlpShape {
  DType dtype;
  bool allow_tf32;  // float32 products of operands rounded to tf32
  int64_t m;        // rows of the batch
  int layers;
  int64_t widths[kMostMlpLayers + 1];  // of x, then of each layer's output
};

// What a forward leaves for its backward: layers - 1 matrices [m, mlp_hidden_stride], the hidden outputs, and behind
// them, where saved_by_linear(f) is the input, their pre-activations. What lies between width and stride means nothing.
inline int64_t mlp_hidden_stride(const MlpShape& shape) {
  int64_t widest = 0;
  for (int l = 1; l < shape.layers; ++l) widest = shape.widths[l] > widest ? shape.widths[l] : widest;
  return (widest + 7) / 8 * 8;  // rows start on 16 bytes
}
inline int64_t mlp_hidden_matrices(const MlpShape& shape, const Activation& hidden) {
  return (shape.layers - 1) * (saved_by_linear(hidden) == Saved::input ? 2 : 1);
}

// x has unit column stride; W_l [widths[l + 1], widths[l]], b_l and y are contiguous. No output overlaps an operand.
struct MlpForward {
  MlpShape shape;
  const void* x;
  int64_t x_row_stride;
  const void* w[kMostMlpLayers];
  const void* b[kMostMlpLayers];  // each nullable
  Activation hidden, output;
  void* y;
  void* z;               // nullable: the pre-activation of y, in its layout
  void* hidden_outputs;  // nullable: see above; 16-byte aligned
};

// The gradients from grad_y, of unit column stride, and what forward left: `saved` is y or z as saved_by_linear(output)
// says and contiguous, not read for identity. Every gradient is contiguous and nullable; a null one is not computed.
// Weights' and biases' gradients are summed in float32 in an order that depends on the shape and the chip alone.
struct MlpBackward {
  MlpShape shape;
  const void* grad_y;
  int64_t grad_y_row_stride;
  const void* saved;
  const void* x;
  int64_t x_row_stride;
  const void* w[kMostMlpLayers];
  const void* hidden_outputs;
  Activation hidden, output;
  void* grad_x;
  void* grad_w[kMostMlpLayers];
  void* grad_b[kMostMlpLayers];
};

}  // namespace fastops
