// The ops of the torch layer, below and above autograd. Both doors call these.
//
//   *_forward, *_backward   check -> empty case -> allocate -> call the kernel; no autograd
//   linear, activation ...  the same with autograd recorded (node.h): the fast door
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <string>
#include <string_view>

#include "../kernels/activation.h"
#include "../kernels/conv.h"
#include "../kernels/pool.h"

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
  Tensor z;  // the pre-activation, undefined unless asked for and saved_by_linear says input
};
// input (*, k), weight (n, k), bias (n) or undefined -> y (*, n).
LinearOutput linear_forward(const Tensor& input, const Tensor& weight, const optional<Tensor>& bias,
                            Activation activation, bool need_saved);
// Gradients of input, weight and bias; those not asked for stay undefined. What only they need may be undefined too.
std::array<Tensor, 3> linear_backward(const Tensor& grad_output, const Tensor& saved, const Tensor& input,
                                      const Tensor& weight, Activation activation, std::array<bool, 3> output_mask,
                                      at::IntArrayRef input_sizes, int64_t in_features);
Tensor linear(const Tensor& input, const Tensor& weight, const optional<Tensor>& bias, Activation activation);
// Whether the shapes of these arguments of linear() fit.
bool linear_accepts(const Tensor& input, const Tensor& weight, const optional<Tensor>& bias);

// ---- mlp.cpp
// A chain of linear layers, `hidden` after all but the last and `output` after that, in one kernel. A bias may be
// undefined.
Tensor mlp(const Tensor& input, at::TensorList weights, at::TensorList biases, Activation hidden, Activation output);
// Whether the shapes of these arguments fit and there is a kernel for them, given tensors of one supported dtype on one
// device. Where there is none, the layers are linear's.
bool mlp_accepts(const Tensor& input, at::TensorList weights, at::TensorList biases);

// ---- conv.cpp
// What a convolution is besides its tensors, in `dims` spatial dimensions; arrays as in ConvGeometry. before and after
// are the padding on either side; of a transposed convolution they are what is cut off, `after` less output_padding.
struct ConvParams {
  int dims;
  bool transposed;
  int64_t groups;
  int64_t stride[3], before[3], after[3], dilation[3];
};
// The same as the kernels see it. Of a transposed convolution, geometry is that of the convolution it transposes: its
// input is that one's output.
struct ConvPlan {
  int dims;
  bool transposed;
  Layout layout, w_layout;
  ConvGeometry geometry;
};
// As record() has it: "conv2d", "conv_transpose1d_backward".
inline std::string op_name(const ConvPlan& plan, const char* suffix = "") {
  return c10::str(plan.transposed ? "conv_transpose" : "conv", plan.dims, "d", suffix);
}
// Fills the plan for input (batch, channels, spatial), weight as in torch.nn and bias or undefined; returns what does
// not fit, by torch.nn.functional's names of the arguments, or "". dtypes are not looked at.
std::string plan_conv(const Tensor& input, const Tensor& weight, const Tensor& bias, const ConvParams& params,
                      ConvPlan& plan);
struct ConvOutput {
  Tensor y;
  Tensor z;  // the pre-activation, undefined unless asked for and saved_by_linear says input
};
ConvOutput conv_forward(const Tensor& input, const Tensor& weight, const optional<Tensor>& bias, const ConvPlan& plan,
                        Activation activation, bool need_saved);
// Gradients of input, weight and bias; those not asked for stay undefined. What only they need may be undefined too.
std::array<Tensor, 3> conv_backward(const Tensor& grad_output, const Tensor& saved, const Tensor& input,
                                    const Tensor& weight, const ConvPlan& plan, Activation activation,
                                    std::array<bool, 3> output_mask);
Tensor conv(const Tensor& input, const Tensor& weight, const optional<Tensor>& bias, const ConvPlan& plan,
            Activation activation);
// The gradients of conv without activation, differentiable themselves; those not asked for stay undefined. input is
// needed for the weight's, weight for the input's.
std::array<Tensor, 3> differentiable_conv_backward(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                                                   const ConvPlan& plan, std::array<bool, 3> output_mask);
// What convolutions may trade for speed, for the whole process.
void set_conv_precision(ConvPrecision precision);
ConvPrecision conv_precision();

// ---- activation.cpp
struct ActivationOutput {
  Tensor y;
  Tensor mask;  // uint8, (numel + 7) / 8 bytes in y's memory order; undefined unless asked for
};
ActivationOutput activation_forward(const Tensor& input, Activation activation, bool need_mask);
// layout: the tensor whose memory order a mask follows (y's sizes and strides); not looked at for other kinds.
Tensor activation_backward(const Tensor& grad_output, const Tensor& saved, Activation activation, Saved kind,
                           at::IntArrayRef mask_strides = {});
Tensor activation(const Tensor& input, Activation activation);
Tensor activation_(const Tensor& input, Activation activation);
// activation_backward that records itself, so that gradients of gradients exist.
Tensor differentiable_activation_backward(const Tensor& grad_output, const Tensor& saved, Activation activation,
                                          Saved kind, at::IntArrayRef mask_strides = {});
// f''(x) from x, or d f'/dy from y: what multiplies grad_output in the gradient of activation_backward. A composite of
// differentiable torch ops, since second derivatives are rare and their own derivatives must exist.
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
// What a pool is besides its input, in the last `dims` of three dimensions: windows, or for an adaptive one the sizes
// of its output, kSameSize for the input's.
struct PoolParams {
  static constexpr int64_t kSameSize = INT64_MIN;
  int dims;
  bool adaptive, ceil_mode;
  int64_t kernel[3], stride[3], padding[3], dilation[3], output[3];
};
// The same as the kernels see it.
struct PoolPlan {
  int dims;
  bool batched;
  Layout layout;
  PoolGeometry geometry;
};
// As record() has it: "max_pool2d", "adaptive_avg_pool1d_backward" for the kinds "max" and "avg".
inline std::string op_name(const PoolPlan& plan, const char* kind, const char* suffix = "") {
  return c10::str(plan.geometry.adaptive ? "adaptive_" : "", kind, "_pool", plan.dims, "d", suffix);
}
// The layout of a pool's output: the input's, as PyTorch finds it in two dimensions; in one and three likewise.
Layout pool_layout(const Tensor& tensor, int dims);
// Fills in the plan of an input of these sizes, (batch, channels, *spatial) or without batch, all but its layout. Says
// what does not fit, "" if everything does.
std::string plan_pool(at::IntArrayRef sizes, const PoolParams& params, PoolPlan& plan);

struct MaxPoolOutput {
  Tensor y;
  Tensor indices;  // of y's shape; undefined unless asked for
};
// The indices that backward needs, in a byte where a window allows it.
PoolIndices compact_indices(const PoolGeometry& geometry);
MaxPoolOutput max_pool_forward(const Tensor& input, const PoolPlan& plan, PoolIndices kind);
Tensor max_pool_backward(const Tensor& grad_output, const Tensor& indices, const PoolPlan& plan);
// Positions in the input's planes (int64) from either kind of indices. A composite of torch ops, for second
// derivatives.
Tensor max_pool_positions(const Tensor& indices, const PoolPlan& plan);
// max_pool_backward for a gradient that somebody will differentiate, or that is batched or dual, in torch's own ops.
Tensor differentiable_max_pool_backward(const Tensor& grad_output, const Tensor& indices, const PoolPlan& plan);
MaxPoolOutput max_pool(const Tensor& input, const PoolPlan& plan, bool return_indices);

// What an average divides by; see AvgPoolForward.
struct AvgDivisor {
  bool include_pad;
  int64_t override;  // 0: none
};
Tensor avg_pool_forward(const Tensor& input, const PoolPlan& plan, const AvgDivisor& divisor);
Tensor avg_pool_backward(const Tensor& grad_output, const PoolPlan& plan, const AvgDivisor& divisor);
Tensor avg_pool(const Tensor& input, const PoolPlan& plan, const AvgDivisor& divisor);

// ---- conv_pool.cpp
// As record() has it: "conv_max_pool2d".
inline std::string conv_pool_name(const ConvPlan& plan, const char* suffix = "") {
  return c10::str("conv_max_pool", plan.dims, "d", suffix);
}
// max_pool(conv(input, weight, bias, activation)) with windows of `pool` elements that do not overlap, in the last
// `dims` of three dimensions: in one kernel where that has been written, otherwise one after the other.
Tensor conv_max_pool(const Tensor& input, const Tensor& weight, const optional<Tensor>& bias, const ConvPlan& plan,
                     Activation activation, const std::array<int64_t, 3>& pool);

}  // namespace fastops
