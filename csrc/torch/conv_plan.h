// Helpers of the ops on convolutions: the layouts and sizes of a plan, and checks of its operands.
#pragma once

#include <ATen/ATen.h>

#include <cstring>

#include "check.h"
#include "memory.h"
#include "ops.h"
#include "sizes.h"

namespace fastops {

inline at::MemoryFormat format_of(Layout layout, int dims) {
  if (layout == Layout::channels_first) return at::MemoryFormat::Contiguous;
  return dims == 2 ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::ChannelsLast3d;
}

inline bool suggests_channels_last(const Tensor& tensor) {
  return tensor.suggest_memory_format() != at::MemoryFormat::Contiguous;
}

// The tensor itself if it has the layout of the plan, else a copy that has.
inline Tensor in_layout(const Tensor& tensor, const ConvPlan& plan) {
  return tensor.contiguous(format_of(plan.layout, plan.dims));
}

inline Tensor weight_in_layout(const Tensor& weight, const ConvPlan& plan) {
  return weight.contiguous(format_of(plan.w_layout, plan.dims));
}

using ConvSizes = SizeVector<int64_t>;

inline ConvSizes conv_sizes(int64_t first, int64_t second, const int64_t (&spatial)[3], int dims) {
  ConvSizes sizes{first, second};
  sizes.append(spatial + 3 - dims, spatial + 3);
  return sizes;
}

// The sizes of the operands of the underlying convolution: x (in), y (out) and w.
inline ConvSizes in_sizes(const ConvPlan& plan) {
  return conv_sizes(plan.geometry.batch, plan.geometry.in_channels, plan.geometry.in, plan.dims);
}
inline ConvSizes out_sizes(const ConvPlan& plan) {
  return conv_sizes(plan.geometry.batch, plan.geometry.out_channels, plan.geometry.out, plan.dims);
}
inline ConvSizes weight_sizes(const ConvPlan& plan) {
  const ConvGeometry& g = plan.geometry;
  return conv_sizes(g.out_channels, g.in_channels / g.groups, g.kernel, plan.dims);
}

template <class Int = int64_t>
Tensor empty_in(std::type_identity_t<Sizes<Int>> sizes, Layout layout, at::ScalarType type,
                at::Device device = at::kCPU) {
  if (layout == Layout::channels_first) return new_tensor<Int>(sizes, type, device);
  const auto strides =
      sizes.size() == 4 ? c10::get_channels_last_strides_2d(sizes) : c10::get_channels_last_strides_3d(sizes);
  return new_tensor_strided<Int>(sizes, strides, type, device);
}

template <class Int = int64_t>
void check_operand(const Tensor& tensor, at::ScalarType type, std::type_identity_t<Sizes<Int>> sizes, const char* name,
                   at::Device device = at::kCPU) {
  check_tensor(tensor, "conv", name, device);
  check_dtype(tensor, type, "conv", name);
  TORCH_CHECK(!sizes_differ(sizes_as<Int>(tensor), sizes), "conv: ", name, " must have shape ", sizes, ", got ",
              sizes_as<Int>(tensor));
}

inline Tensor checked_bias(const optional<Tensor>& bias, at::ScalarType type, at::Device device = at::kCPU) {
  const Tensor b = bias.value_or(Tensor());
  if (!b.defined()) return b;
  check_tensor(b, "conv", "bias", device);
  check_dtype(b, type, "conv", "bias");
  return b.contiguous();
}

// PyTorch saves both for backward, whichever gradient is wanted, and refuses a tensor that was made in inference mode.
inline void check_can_be_saved(const Tensor& input, const Tensor& weight) {
  for (const auto& [tensor, name] : {std::pair(&input, "input"), {&weight, "weight"}})
    TORCH_CHECK(!tensor->is_inference(), "conv: ", name,
                " was made in inference mode and cannot be saved for backward. ",
                "Clone it outside of inference mode, or use torch.no_grad() instead of torch.inference_mode()");
}

// The output's sizes from those of the operands. Returns "", or what does not fit. (conv.cpp)
template <class Int>
std::string infer_conv(Sizes<Int> input, Sizes<Int> weight, const optional<Sizes<Int>>& bias, const ConvParams& params,
                       SizeVector<Int>& output);

// The general door's arguments. padding: what lies before each dimension, then what lies after each. (conv.cpp)
ConvParams make_params(at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, bool transposed,
                       int64_t groups);

struct ConvLayouts {
  Layout image, weight, weight_strides;  // as in ConvPlan
};
// As in PyTorch, the output is channels_last if either operand is. With one dimension it is always channels first.
inline ConvLayouts conv_layouts(const Tensor& input, const Tensor& weight) {
  if (weight.dim() == 3) return {Layout::channels_first, Layout::channels_first, Layout::channels_first};
  const bool image = suggests_channels_last(input) || suggests_channels_last(weight);
  const bool last = weight.is_contiguous_or_false(format_of(Layout::channels_last, static_cast<int>(weight.dim() - 2)));
  const bool first = weight.is_contiguous_or_false();
  const auto layout = [](bool last) { return last ? Layout::channels_last : Layout::channels_first; };
  return {layout(image), layout(last && !first), layout(last && (!first || suggests_channels_last(weight)))};
}

// Uninitialised tensors for the gradients of input, weight and bias that are wanted.
template <class Int>
std::array<Tensor, 3> new_gradients(Sizes<Int> input, Sizes<Int> weight, const Int& outputs, ConvLayouts layouts,
                                    at::ScalarType type, at::Device device, std::array<bool, 3> output_mask) {
  std::array<Tensor, 3> out;
  if (output_mask[0]) out[0] = empty_in<Int>(input, layouts.image, type, device);
  if (output_mask[1]) out[1] = empty_in<Int>(weight, layouts.weight_strides, type, device);
  if (output_mask[2]) out[2] = new_tensor<Int>({outputs}, type, device);
  return out;
}
// The same for a plan. They are zeros if there is nothing to sum.
inline std::array<Tensor, 3> new_gradients(const ConvPlan& plan, at::ScalarType type, std::array<bool, 3> output_mask,
                                           bool of_nothing, at::Device device = at::kCPU) {
  const int64_t outputs = plan.transposed ? plan.geometry.in_channels : plan.geometry.out_channels;
  auto out = new_gradients<int64_t>(plan.transposed ? out_sizes(plan) : in_sizes(plan), weight_sizes(plan), outputs,
                                    {plan.layout, plan.w_layout, plan.w_strides}, type, device, output_mask);
  if (of_nothing)
    for (Tensor& gradient : out)
      if (gradient.defined()) gradient.zero_();
  return out;
}

// A plan as numbers, which compiled autograd can pack.
inline std::vector<int64_t> pack_plan(const ConvPlan& plan) {
  static_assert(sizeof(ConvGeometry) % sizeof(int64_t) == 0);
  std::vector<int64_t> values{plan.dims, plan.transposed, static_cast<int64_t>(plan.layout),
                              static_cast<int64_t>(plan.w_layout), static_cast<int64_t>(plan.w_strides)};
  values.resize(values.size() + sizeof(ConvGeometry) / sizeof(int64_t));
  std::memcpy(values.data() + 5, &plan.geometry, sizeof(ConvGeometry));
  return values;
}
inline ConvPlan unpack_plan(const std::vector<int64_t>& values) {
  ConvPlan plan{static_cast<int>(values[0]),    values[1] != 0,
                static_cast<Layout>(values[2]), static_cast<Layout>(values[3]),
                static_cast<Layout>(values[4]), {}};
  std::memcpy(&plan.geometry, values.data() + 5, sizeof(ConvGeometry));
  return plan;
}

}  // namespace fastops
