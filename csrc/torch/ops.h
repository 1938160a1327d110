// The ops of the torch layer, below and above autograd. Both doors call these.
//
//   *_forward, *_backward   check -> empty case -> allocate -> call the kernel; no autograd
//   linear, activation ...  the same with autograd recorded (node.h): the fast door
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <string_view>

#include "../kernels/activation.h"

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
// Whether linear() takes these arguments: same supported dtype, fitting shapes.
bool linear_accepts(const Tensor& input, const Tensor& weight, const optional<Tensor>& bias);

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

}  // namespace fastops
