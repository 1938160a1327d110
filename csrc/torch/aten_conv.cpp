#include <ATen/ATen.h>
#include <ATen/CompositeExplicitAutogradFunctions.h>
#include <ATen/TracerMode.h>

#include "aten.h"
#include "conv_plan.h"

namespace fastops::aten {
namespace {

using at::IntArrayRef;

// A number for each dimension, or one for all, into the last `dims` of three. What infer_conv would not count is
// refused.
bool read_sizes(IntArrayRef from, int dims, int64_t (&to)[3]) {
  const auto count = static_cast<size_t>(dims);
  if (from.size() != count && from.size() != 1) return false;
  for (size_t i = 0; i < count; ++i) {
    const int64_t value = from[from.size() == 1 ? 0 : i];
    if (value < 0 || value > INT32_MAX) return false;
    to[3 - count + i] = value;
  }
  return true;
}

// Whether PyTorch computes convolutions of this dtype by oneDNN. Its own algorithm gives results in three dimensions
// in channels first, whatever the layout of the operands.
bool onednn_takes(at::ScalarType dtype) {
#if defined(__x86_64__)
  static const bool bf16 =
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#else
  constexpr bool bf16 = false;
#endif
  return dtype == at::kFloat || (dtype == at::kBFloat16 && bf16);
}

// The plan of a call whose operands are ours to take; input and weight are.
bool plan(const Tensor& input, const Tensor& weight, const optional<Tensor>& bias, IntArrayRef stride,
          IntArrayRef padding, IntArrayRef dilation, bool transposed, IntArrayRef output_padding, int64_t groups,
          ConvPlan& plan) {
  const int dims = static_cast<int>(weight.dim()) - 2;
  if (dims < 1 || dims > 3 || input.dim() != weight.dim()) return false;
  if (bias && !takes(input, *bias)) return false;
  ConvParams params{dims, transposed, groups, {1, 1, 1}, {}, {}, {1, 1, 1}};
  int64_t more[3]{};
  if (!read_sizes(stride, dims, params.stride) || !read_sizes(padding, dims, params.before) ||
      !read_sizes(dilation, dims, params.dilation) || !read_sizes(output_padding, dims, more))
    return false;
  for (int i = 0; i < 3; ++i) {
    if (more[i] != 0 && !transposed) return false;
    params.after[i] = params.before[i] - more[i];
  }
  if (!plan_conv(input, weight, bias, params, plan).empty()) return false;
  if (dims == 3 && plan.layout == Layout::channels_last && !onednn_takes(input.scalar_type())) return false;
  return input.numel() > 0 && weight.numel() > 0;
}

Tensor convolution(const Tensor& input, const Tensor& weight, const optional<Tensor>& given_bias, IntArrayRef stride,
                   IntArrayRef padding, IntArrayRef dilation, bool transposed, IntArrayRef output_padding,
                   int64_t groups) {
  // torch.jit.trace does not record this op but the one that PyTorch's own kernel calls.
  if (takes(input, weight) && !at::tracer::impl::is_dispatch_enabled()) {
    const optional<Tensor> bias = defined(given_bias);
    ConvPlan planned;
    if (plan(input, weight, bias, stride, padding, dilation, transposed, output_padding, groups, planned))
      return conv_forward(input, weight, bias, planned, {}, /*need_saved=*/false).y;
  }
  return pytorch("convolution", input, [&] {
    return at::compositeexplicitautograd::convolution(input, weight, given_bias, stride, padding, dilation, transposed,
                                                      output_padding, groups);
  });
}

std::tuple<Tensor, Tensor, Tensor> convolution_backward(const Tensor& grad_output, const Tensor& input,
                                                        const Tensor& weight, at::OptionalIntArrayRef bias_sizes,
                                                        IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
                                                        bool transposed, IntArrayRef output_padding, int64_t groups,
                                                        std::array<bool, 3> output_mask) {
  ConvPlan planned;
  if (takes(grad_output, input, weight) &&
      plan(input, weight, {}, stride, padding, dilation, transposed, output_padding, groups, planned) &&
      grad_output.sizes() == IntArrayRef(transposed ? in_sizes(planned) : out_sizes(planned))) {
    // PyTorch gives the weight's gradient the layout of the images.
    planned.w_layout = planned.w_strides = planned.layout;
    auto [grad_input, grad_weight, grad_bias] = conv_backward(grad_output, {}, input, weight, planned, {}, output_mask);
    return {grad_input, grad_weight, grad_bias};
  }
  return pytorch("convolution_backward", grad_output, [&] {
    return at::compositeexplicitautograd::convolution_backward(grad_output, input, weight, bias_sizes, stride, padding,
                                                               dilation, transposed, output_padding, groups,
                                                               output_mask);
  });
}

}  // namespace

void override_convolutions(Overrides& overrides) {
  namespace original = at::compositeexplicitautograd;
  put<aten::convolution, original::convolution>(overrides.below_autograd, "convolution");
  put<aten::convolution_backward, original::convolution_backward>(overrides.below_autograd, "convolution_backward");
}

}  // namespace fastops::aten
