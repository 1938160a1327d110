// The ops of the torch layer, without and with autograd. Both doors call these.
//
//   *_forward, *_backward   check -> empty case -> allocate -> call the kernel; no autograd
//   linear, activation ...  the same, recorded for autograd (node.h): the fast door
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <string>
#include <string_view>

#include "../kernels/activation/activation.h"
#include "../kernels/conv/conv.h"
#include "../kernels/pool/pool.h"

namespace fastops {

using at::Tensor;
using std::optional;

// ---- activations by name ("relu", "gelu_tanh", ...), as the enum spells them
ActivationKind activation_kind(std::string_view name);
const char* activation_name(ActivationKind kind);
Saved saved_kind(std::string_view name);
const char* saved_name(Saved kind);

// ---- linear.cpp
struct LinearOutput {
  Tensor y;
  Tensor z;  // the pre-activation; undefined unless it is wanted and saved_by_linear says input
};
// input (*, k), weight (n, k), bias (n) or undefined -> y (*, n).
LinearOutput linear_forward(const Tensor& input, const Tensor& weight, const optional<Tensor>& bias,
                            Activation activation, bool need_saved);
// The gradients of input, weight and bias. Those that are not wanted are undefined, and operands that only they need
// may be undefined.
std::array<Tensor, 3> linear_backward(const Tensor& grad_output, const Tensor& saved, const Tensor& input,
                                      const Tensor& weight, Activation activation, std::array<bool, 3> output_mask,
                                      at::IntArrayRef input_sizes, int64_t in_features);
Tensor linear(const Tensor& input, const Tensor& weight, const optional<Tensor>& bias, Activation activation);
// a b for a (*, m, n) and b (n, k). If both are plain tensors, it is a linear of this library.
Tensor product(const Tensor& a, const Tensor& b);

// ---- mlp.cpp
// A chain of linear layers in one kernel. The activation is `output` for the last layer, `hidden` for the others. Each
// bias may be undefined.
Tensor mlp(const Tensor& input, at::TensorList weights, at::TensorList biases, Activation hidden, Activation output);
// Whether the shapes of these arguments fit and there is a kernel for them. The tensors must have one supported dtype
// and one device. Without a kernel, the caller uses linear for each layer.
bool mlp_accepts(const Tensor& input, at::TensorList weights, at::TensorList biases);

// ---- conv.cpp
// The parameters of a convolution with `dims` spatial dimensions; arrays are as in ConvGeometry. before and after are
// the padding on either side. For a transposed convolution they are what is cropped, `after` minus output_padding.
struct ConvParams {
  int dims;
  bool transposed;
  int64_t groups;
  int64_t stride[3], before[3], after[3], dilation[3];
};
// The same for the kernels. For a transposed convolution, geometry is that of the convolution that it transposes, whose
// output is the input here.
struct ConvPlan {
  int dims;
  bool transposed;
  Layout layout, w_layout;
  // The weight's own strides, for its gradient: where a kernel of one element or a single channel makes both layouts
  // the same in memory, their strides differ still, and DDP's buckets have the weight's.
  Layout w_strides;
  ConvGeometry geometry;
};
// The op's name in record(): "conv2d", "conv_transpose1d_backward".
inline std::string op_name(const ConvPlan& plan, const char* suffix = "") {
  return c10::str(plan.transposed ? "conv_transpose" : "conv", plan.dims, "d", suffix);
}
// Fills the plan for input (batch, channels, spatial), weight as in torch.nn, and bias. Returns "", or what does not
// fit, with the argument names of torch.nn.functional. It does not check dtypes.
std::string plan_conv(const Tensor& input, const Tensor& weight, const optional<Tensor>& bias, const ConvParams& params,
                      ConvPlan& plan);
// Whether the CUDA kernels cannot count a convolution of this tensor: it is PyTorch's.
inline bool is_pytorchs(const ConvPlan& plan, const Tensor& tensor) {
  return !tensor.is_cpu() && !fits_int(plan.geometry);
}
struct ConvOutput {
  Tensor y;
  Tensor z;  // the pre-activation; undefined unless it is wanted and saved_by_linear says input
};
ConvOutput conv_forward(const Tensor& input, const Tensor& weight, const optional<Tensor>& bias, const ConvPlan& plan,
                        Activation activation, bool need_saved);
// The gradients of input, weight and bias. Those that are not wanted are undefined, and operands that only they need
// may be undefined.
std::array<Tensor, 3> conv_backward(const Tensor& grad_output, const Tensor& saved, const Tensor& input,
                                    const Tensor& weight, const ConvPlan& plan, Activation activation,
                                    std::array<bool, 3> output_mask);
Tensor conv(const Tensor& input, const Tensor& weight, const optional<Tensor>& bias, const ConvPlan& plan,
            Activation activation);
// The gradients of a convolution without activation, as differentiable ops. Those that are not wanted are undefined.
// The weight's gradient needs input, the input's gradient needs weight.
std::array<Tensor, 3> differentiable_conv_backward(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                                                   const ConvPlan& plan, std::array<bool, 3> output_mask);
// How much accuracy convolutions may give up for speed, for the whole process.
void set_conv_precision(Precision precision);
Precision conv_precision();

// ---- activation.cpp
struct ActivationOutput {
  Tensor y;
  Tensor mask;  // uint8, (numel + 7) / 8 bytes in the memory order of y; undefined if not wanted
};
ActivationOutput activation_forward(const Tensor& input, Activation activation, bool need_mask);

// mask_strides: for a mask, the strides of y; empty if y is contiguous. Ignored for other kinds.
Tensor activation_backward(const Tensor& grad_output, const Tensor& saved, Activation activation, Saved kind,
                           at::IntArrayRef mask_strides = {});
Tensor activation(const Tensor& input, Activation activation);
Tensor activation_(const Tensor& input, Activation activation);
// activation_backward, recorded for autograd, for second-order gradients.
Tensor differentiable_activation_backward(const Tensor& grad_output, const Tensor& saved, Activation activation,
                                          Saved kind, at::IntArrayRef mask_strides = {});
// f''(x) from x, or d f'/dy from y: the factor of grad_output in the gradient of activation_backward. It is computed by
// differentiable torch ops, as second derivatives are rare and must themselves be differentiable.
Tensor activation_second_derivative(const Tensor& saved, Activation activation, Saved kind);

Tensor prelu_forward(const Tensor& input, const Tensor& weight);
std::array<Tensor, 2> prelu_backward(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                                     std::array<bool, 2> output_mask);
Tensor prelu(const Tensor& input, const Tensor& weight);
bool prelu_accepts(const Tensor& input, const Tensor& weight);

Tensor glu_forward(const Tensor& input, int64_t dim);
Tensor glu_backward(const Tensor& grad_output, const Tensor& input, int64_t dim);
Tensor glu(const Tensor& input, int64_t dim);
bool glu_accepts(const Tensor& input, int64_t dim);

// ---- pool.cpp
// The parameters of a pool, in the last `dims` of three dimensions: its windows, or, for an adaptive pool, the sizes of
// its output, where kSameSize is the size of the input.
struct PoolParams {
  static constexpr int64_t kSameSize = -(int64_t{1} << 60);
  int dims;
  bool adaptive, ceil_mode;
  bool within_input;  // windows may not be larger than the input, padding or not: PyTorch's rule for avg_pool3d
  int64_t kernel[3], stride[3], padding[3], dilation[3], output[3];
};
// The same for the kernels.
struct PoolPlan {
  int dims;
  bool batched;
  Layout layout;
  PoolGeometry geometry;
};
// The op's name in record(): "max_pool2d", "adaptive_avg_pool1d_backward", for the kinds "max" and "avg".
inline std::string op_name(const PoolPlan& plan, const char* kind, const char* suffix = "") {
  return c10::str(plan.geometry.adaptive ? "adaptive_" : "", kind, "_pool", plan.dims, "d", suffix);
}
// The layout of a pool's output, which is that of the input. It is found as PyTorch does in two dimensions, also in one
// and three.
Layout pool_layout(const Tensor& tensor, int dims);
// Fills the plan, except its layout, for an input of these sizes: (batch, channels, *spatial), or without batch.
// Returns "", or what does not fit.
std::string plan_pool(at::IntArrayRef sizes, const PoolParams& params, PoolPlan& plan);

struct MaxPoolOutput {
  Tensor y;
  Tensor indices;  // with the shape of y; undefined if not wanted
};
// The kind of indices that backward uses: bytes if a window is small enough.
PoolIndices compact_indices(const PoolGeometry& geometry);
MaxPoolOutput max_pool_forward(const Tensor& input, const PoolPlan& plan, PoolIndices kind);
Tensor max_pool_backward(const Tensor& grad_output, const Tensor& indices, const PoolPlan& plan);
// Positions in the input's planes (int64) from either kind of indices, by torch ops. For second derivatives.
Tensor max_pool_positions(const Tensor& indices, const PoolPlan& plan);
// max_pool_backward in torch's ops, for a gradient that will be differentiated, or that is batched or dual.
Tensor differentiable_max_pool_backward(const Tensor& grad_output, const Tensor& indices, const PoolPlan& plan);
MaxPoolOutput max_pool(const Tensor& input, const PoolPlan& plan, bool return_indices);

// The divisor of an average, as in AvgPoolForward.
struct AvgDivisor {
  bool include_pad;
  int64_t override;  // divisor_override, or 0
};
Tensor avg_pool_forward(const Tensor& input, const PoolPlan& plan, const AvgDivisor& divisor);
Tensor avg_pool_backward(const Tensor& grad_output, const PoolPlan& plan, const AvgDivisor& divisor);
Tensor avg_pool(const Tensor& input, const PoolPlan& plan, const AvgDivisor& divisor);

// ---- conv_pool.cpp
// The op's name in record(): "conv_max_pool2d".
inline std::string conv_pool_name(const ConvPlan& plan, const char* suffix = "") {
  return c10::str("conv_max_pool", plan.dims, "d", suffix);
}
// max_pool(conv(input, weight, bias, activation)) with windows of `pool` elements that do not overlap, in the last
// `dims` of three dimensions. It is one kernel if there is one for these arguments, else two.
Tensor conv_max_pool(const Tensor& input, const Tensor& weight, const optional<Tensor>& bias, const ConvPlan& plan,
                     Activation activation, const std::array<int64_t, 3>& pool);

}  // namespace fastops
