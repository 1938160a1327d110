#include <ATen/ATen.h>
#include <ATen/CPUFunctions.h>
#include <ATen/ops/max_pool1d_native.h>
#include <ATen/ops/max_pool2d_native.h>
#include <ATen/ops/max_pool3d_native.h>

#include "aten.h"

namespace fastops::aten {
namespace {

using at::IntArrayRef;

// A number for each dimension, or one for all, into the last `dims` of three.
bool read(IntArrayRef from, int dims, int64_t (&to)[3]) {
  const auto count = static_cast<size_t>(dims);
  if (from.size() != count && from.size() != 1) return false;
  for (size_t i = 0; i < count; ++i) to[3 - count + i] = from[from.size() == 1 ? 0 : i];
  return true;
}

PoolParams parameters(int dims, bool adaptive) {
  return {dims, adaptive, false, false, {1, 1, 1}, {1, 1, 1}, {}, {1, 1, 1}, {1, 1, 1}};
}

// Whether PyTorch gives the result another layout than ours. In three dimensions only its max pools keep channels_last.
bool differs(const PoolPlan& plan, bool windowed_max) {
  return plan.dims == 3 && plan.layout == Layout::channels_last && !windowed_max;
}

// The plan of a call on windows whose input is ours to take.
bool plan_windows(const Tensor& input, int dims, IntArrayRef kernel, IntArrayRef stride, IntArrayRef padding,
                  IntArrayRef dilation, bool ceil_mode, bool average, PoolPlan& plan) {
  PoolParams params = parameters(dims, /*adaptive=*/false);
  params.ceil_mode = ceil_mode;
  params.within_input = average && dims == 3;
  if (!read(kernel, dims, params.kernel) || !read(stride.empty() ? kernel : stride, dims, params.stride) ||
      !read(padding, dims, params.padding) || !read(dilation, dims, params.dilation))
    return false;
  if (!plan_pool(input.sizes(), params, plan).empty()) return false;
  plan.layout = pool_layout(input, dims);
  return input.numel() > 0 && !differs(plan, !average);
}

// The same of an adaptive pool.
bool plan_adaptive(const Tensor& input, int dims, IntArrayRef output_size, PoolPlan& plan) {
  PoolParams params = parameters(dims, /*adaptive=*/true);
  if (!read(output_size, dims, params.output)) return false;
  for (int i = 3 - dims; i < 3; ++i)
    if (params.output[i] < 1) return false;
  if (!plan_pool(input.sizes(), params, plan).empty()) return false;
  plan.layout = pool_layout(input, dims);
  return input.numel() > 0 && !differs(plan, /*windowed_max=*/false);
}

// Whether a gradient, or indices, has the sizes of the plan's output for this input.
bool has_sizes_of_output(const Tensor& tensor, const Tensor& input, const PoolPlan& plan) {
  if (tensor.dim() != input.dim()) return false;
  const int64_t leading = tensor.dim() - plan.dims;
  for (int64_t i = 0; i < tensor.dim(); ++i)
    if (tensor.size(i) != (i < leading ? input.size(i) : plan.geometry.out[3 - plan.dims + i - leading])) return false;
  return true;
}

bool takes_gradient(const Tensor& grad_output, const Tensor& input, const PoolPlan& plan) {
  return takes(grad_output, input) && has_sizes_of_output(grad_output, input, plan);
}
bool takes_indices(const Tensor& indices, const Tensor& input, const PoolPlan& plan) {
  return indices.is_cpu() && indices.layout() == at::kStrided && indices.scalar_type() == at::kLong &&
         has_sizes_of_output(indices, input, plan);
}

// ---- max pools, taken whole: what is saved for backward is a byte for each output

template <int dims, auto original>
Tensor max_pool(const Tensor& input, IntArrayRef kernel, IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
                bool ceil_mode) {
  PoolPlan plan;
  if (takes_recorded(input) && plan_windows(input, dims, kernel, stride, padding, dilation, ceil_mode, false, plan))
    return fastops::max_pool(input, plan, /*return_indices=*/false).y;
  return original(input, kernel, stride, padding, dilation, ceil_mode);
}

// ---- max pools with PyTorch's indices

std::tuple<Tensor, Tensor> with_indices(const Tensor& input, const PoolPlan& plan) {
  MaxPoolOutput out = max_pool_forward(input, plan, PoolIndices::plane);
  return {std::move(out.y), std::move(out.indices)};
}

template <int dims, auto original>
std::tuple<Tensor, Tensor> max_pool_with_indices(const Tensor& input, IntArrayRef kernel, IntArrayRef stride,
                                                 IntArrayRef padding, IntArrayRef dilation, bool ceil_mode) {
  PoolPlan plan;
  if (takes(input) && plan_windows(input, dims, kernel, stride, padding, dilation, ceil_mode, false, plan))
    return with_indices(input, plan);
  return pytorch("max_pool_with_indices", input,
                 [&] { return original(input, kernel, stride, padding, dilation, ceil_mode); });
}

template <int dims, auto original>
Tensor max_pool_with_indices_backward(const Tensor& grad_output, const Tensor& input, IntArrayRef kernel,
                                      IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, bool ceil_mode,
                                      const Tensor& indices) {
  PoolPlan plan;
  if (takes(input) && plan_windows(input, dims, kernel, stride, padding, dilation, ceil_mode, false, plan) &&
      takes_gradient(grad_output, input, plan) && takes_indices(indices, input, plan))
    return max_pool_backward(grad_output, indices, plan);
  return pytorch("max_pool_with_indices_backward", grad_output,
                 [&] { return original(grad_output, input, kernel, stride, padding, dilation, ceil_mode, indices); });
}

template <int dims, auto original>
std::tuple<Tensor, Tensor> adaptive_max_pool(const Tensor& input, IntArrayRef output_size) {
  PoolPlan plan;
  if (takes(input) && plan_adaptive(input, dims, output_size, plan)) return with_indices(input, plan);
  return pytorch("adaptive_max_pool", input, [&] { return original(input, output_size); });
}

template <int dims, auto original>
Tensor adaptive_max_pool_backward(const Tensor& grad_output, const Tensor& input, const Tensor& indices) {
  PoolPlan plan;
  const bool good = takes(grad_output, input) && grad_output.dim() >= dims &&
                    plan_adaptive(input, dims, grad_output.sizes().slice(grad_output.dim() - dims), plan);
  if (good && takes_gradient(grad_output, input, plan) && takes_indices(indices, input, plan))
    return max_pool_backward(grad_output, indices, plan);
  return pytorch("adaptive_max_pool_backward", grad_output, [&] { return original(grad_output, input, indices); });
}

// ---- averages

template <int dims, auto original>
Tensor avg_pool(const Tensor& input, IntArrayRef kernel, IntArrayRef stride, IntArrayRef padding, bool ceil_mode,
                bool include_pad, optional<int64_t> divisor) {
  PoolPlan plan;
  if (takes(input) && divisor.value_or(1) != 0 &&
      plan_windows(input, dims, kernel, stride, padding, {1}, ceil_mode, true, plan))
    return avg_pool_forward(input, plan, {include_pad, divisor.value_or(0)});
  return pytorch("avg_pool", input,
                 [&] { return original(input, kernel, stride, padding, ceil_mode, include_pad, divisor); });
}

template <int dims, auto original>
Tensor avg_pool_backward(const Tensor& grad_output, const Tensor& input, IntArrayRef kernel, IntArrayRef stride,
                         IntArrayRef padding, bool ceil_mode, bool include_pad, optional<int64_t> divisor) {
  PoolPlan plan;
  if (takes(input) && divisor.value_or(1) != 0 &&
      plan_windows(input, dims, kernel, stride, padding, {1}, ceil_mode, true, plan) &&
      takes_gradient(grad_output, input, plan))
    return fastops::avg_pool_backward(grad_output, plan, {include_pad, divisor.value_or(0)});
  return pytorch("avg_pool_backward", grad_output, [&] {
    return original(grad_output, input, kernel, stride, padding, ceil_mode, include_pad, divisor);
  });
}

template <int dims, auto original>
Tensor adaptive_avg_pool(const Tensor& input, IntArrayRef output_size) {
  PoolPlan plan;
  if (takes(input) && plan_adaptive(input, dims, output_size, plan)) return avg_pool_forward(input, plan, {false, 0});
  return pytorch("adaptive_avg_pool", input, [&] { return original(input, output_size); });
}

template <int dims, auto original>
Tensor adaptive_avg_pool_backward(const Tensor& grad_output, const Tensor& input) {
  PoolPlan plan;
  const bool good = takes(grad_output, input) && grad_output.dim() >= dims &&
                    plan_adaptive(input, dims, grad_output.sizes().slice(grad_output.dim() - dims), plan);
  if (good && takes_gradient(grad_output, input, plan))
    return fastops::avg_pool_backward(grad_output, plan, {false, 0});
  return pytorch("adaptive_avg_pool_backward", grad_output, [&] { return original(grad_output, input); });
}

}  // namespace

void override_pools(Overrides& overrides) {
  put<max_pool<1, at::native::max_pool1d>, at::native::max_pool1d>(overrides.with_autograd, "max_pool1d");
  put<max_pool<2, at::native::max_pool2d>, at::native::max_pool2d>(overrides.with_autograd, "max_pool2d");
  put<max_pool<3, at::native::max_pool3d>, at::native::max_pool3d>(overrides.with_autograd, "max_pool3d");
  torch::Library& m = overrides.below_autograd;
#define FASTOPS_OVERRIDE(op, function, dims) put<aten::function<dims, at::cpu::op>, at::cpu::op>(m, #op);
  FASTOPS_OVERRIDE(max_pool2d_with_indices, max_pool_with_indices, 2)
  FASTOPS_OVERRIDE(max_pool3d_with_indices, max_pool_with_indices, 3)
  FASTOPS_OVERRIDE(max_pool2d_with_indices_backward, max_pool_with_indices_backward, 2)
  FASTOPS_OVERRIDE(max_pool3d_with_indices_backward, max_pool_with_indices_backward, 3)
  FASTOPS_OVERRIDE(adaptive_max_pool2d, adaptive_max_pool, 2)
  FASTOPS_OVERRIDE(adaptive_max_pool3d, adaptive_max_pool, 3)
  FASTOPS_OVERRIDE(adaptive_max_pool2d_backward, adaptive_max_pool_backward, 2)
  FASTOPS_OVERRIDE(adaptive_max_pool3d_backward, adaptive_max_pool_backward, 3)
  FASTOPS_OVERRIDE(avg_pool2d, avg_pool, 2)
  FASTOPS_OVERRIDE(avg_pool3d, avg_pool, 3)
  FASTOPS_OVERRIDE(avg_pool2d_backward, avg_pool_backward, 2)
  FASTOPS_OVERRIDE(avg_pool3d_backward, avg_pool_backward, 3)
  FASTOPS_OVERRIDE(_adaptive_avg_pool2d, adaptive_avg_pool, 2)
  FASTOPS_OVERRIDE(_adaptive_avg_pool3d, adaptive_avg_pool, 3)
  FASTOPS_OVERRIDE(_adaptive_avg_pool2d_backward, adaptive_avg_pool_backward, 2)
  FASTOPS_OVERRIDE(_adaptive_avg_pool3d_backward, adaptive_avg_pool_backward, 3)
#undef FASTOPS_OVERRIDE
}

}  // namespace fastops::aten
