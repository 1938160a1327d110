#include "../kernels/conv_pool/conv_pool.h"

#include <ATen/ATen.h>

#include "call.h"
#include "conv_binding.h"
#include "conv_plan.h"
#include "node.h"

namespace fastops {
namespace {

using PoolSize = std::array<int64_t, 3>;

// The pool after the convolution.
PoolPlan pool_plan(const ConvPlan& plan, const PoolSize& pool) {
  PoolPlan result{plan.dims, true, plan.layout, {}};
  PoolGeometry& g = result.geometry;
  g.batch = plan.geometry.batch;
  g.channels = plan.geometry.out_channels;
  for (size_t i = 0; i < 3; ++i) {
    g.in[i] = plan.geometry.out[i];
    g.out[i] = g.in[i] / pool[i];
    g.kernel[i] = g.stride[i] = pool[i];
    g.dilation[i] = 1;
  }
  return result;
}

ConvSizes pooled_sizes(const PoolPlan& pool) {
  return conv_sizes(pool.geometry.batch, pool.geometry.channels, pool.geometry.out, pool.dims);
}

// Whether a single kernel computes convolution, activation and pool.
bool is_fused(const Tensor& input, const ConvPlan& plan, Activation activation, const PoolSize& pool) {
  const bool known = activation.kind == ActivationKind::identity || activation.kind == ActivationKind::relu;
  return input.is_cpu() && known && !plan.transposed && pool[0] * pool[1] * pool[2] <= kNoGradient;
}

MaxPoolOutput conv_pool_forward(const Tensor& input, const Tensor& weight, const optional<Tensor>& bias,
                                const ConvPlan& plan, Activation activation, const PoolSize& pool, bool need_indices) {
  const auto type = input.scalar_type();
  check_operand(input, type, in_sizes(plan), "input");
  check_operand(weight, type, weight_sizes(plan), "weight");
  const Tensor b = checked_bias(bias, type);
  const ConvSizes sizes = pooled_sizes(pool_plan(plan, pool));
  MaxPoolOutput out{empty_in(sizes, plan.layout, type), {}};
  if (need_indices) out.indices = empty_in(sizes, plan.layout, at::kByte);
  if (out.y.numel() == 0) return out;
  const Tensor x = in_layout(input, plan), w = weight_in_layout(weight, plan);
  const ConvPoolForward call{.dtype = to_dtype(type),
                             .layout = plan.layout,
                             .w_layout = plan.w_layout,
                             .geometry = plan.geometry,
                             .pool = {pool[0], pool[1], pool[2]},
                             .with_bias = b.defined(),
                             .activation = activation,
                             .with_indices = need_indices,
                             .precision = conv_precision()};
  run(call,
      {x.const_data_ptr(), w.const_data_ptr(), data_or_null(b), out.y.mutable_data_ptr(),
       need_indices ? out.indices.mutable_data_ptr<uint8_t>() : nullptr},
      at::kCPU, [&] { return record::Row{conv_pool_name(plan), "", record::shapes_of({x, w, b}), dtype_name(type)}; });
  return out;
}

std::array<Tensor, 3> conv_pool_backward(const Tensor& grad_output, const Tensor& indices, const Tensor& input,
                                         const Tensor& weight, const ConvPlan& plan, const PoolSize& pool,
                                         std::array<bool, 3> output_mask) {
  const auto type = grad_output.scalar_type();
  check_operand(grad_output, type, pooled_sizes(pool_plan(plan, pool)), "grad_output");
  if (output_mask[0]) check_operand(weight, type, weight_sizes(plan), "weight");
  if (output_mask[1]) check_operand(input, type, in_sizes(plan), "input");
  const bool of_nothing = grad_output.numel() == 0;
  std::array<Tensor, 3> out = new_gradients(plan, type, output_mask, of_nothing);
  if (of_nothing) return out;
  const Tensor g = in_layout(grad_output, plan);
  const Tensor x = output_mask[1] ? in_layout(input, plan) : Tensor();
  const Tensor w = output_mask[0] ? weight_in_layout(weight, plan) : Tensor();
  const ConvPoolBackward call{.dtype = to_dtype(type),
                              .layout = plan.layout,
                              .w_layout = plan.w_layout,
                              .geometry = plan.geometry,
                              .pool = {pool[0], pool[1], pool[2]},
                              .with_grad_x = output_mask[0],
                              .with_grad_w = output_mask[1],
                              .with_grad_bias = output_mask[2],
                              .precision = conv_precision()};
  run(call,
      {g.const_data_ptr(), indices.const_data_ptr<uint8_t>(), data_or_null(x), data_or_null(w), mutable_or_null(out[0]),
       mutable_or_null(out[1]), mutable_or_null(out[2])},
      at::kCPU, [&] {
        return record::Row{conv_pool_name(plan, "_backward"), "", record::shapes_of({g, x, w}), dtype_name(type)};
      });
  return out;
}

struct ConvPoolOp {
  struct Args {
    ConvPlan plan;
    PoolSize pool;
  };
  static std::string name(const Args& args) { return conv_pool_name(args.plan); }
  static c10::IValue pack(const Args& args) {
    std::vector<int64_t> values(args.pool.begin(), args.pool.end());
    const std::vector<int64_t> plan = pack_plan(args.plan);
    values.insert(values.end(), plan.begin(), plan.end());
    return values;
  }
  static Args unpack(const c10::IValue& packed) {
    const auto values = packed.toIntVector();
    return {unpack_plan({values.begin() + 3, values.end()}), {values[0], values[1], values[2]}};
  }

  // saved: input (if weight needs a gradient), weight (if input needs one), indices.
  static variable_list gradients(const Args& args, at::TensorList saved, const variable_list& grads, Needs needs) {
    variable_list result(3);
    const Tensor& grad_y = grads[0];
    if (!grad_y.defined()) return result;
    const Tensor &input = saved[0], &weight = saved[1], &indices = saved[2];
    const std::array<bool, 3> output_mask = {needs(0), needs(1), needs(2)};
    std::array<Tensor, 3> gradients;
    if (at::GradMode::is_enabled() || !fast_door::is_plain(grad_y)) {
      const Tensor none = indices.eq(kNoGradient);
      const Tensor g = differentiable_max_pool_backward(grad_y.masked_fill(none, 0), indices.masked_fill(none, 0),
                                                        pool_plan(args.plan, args.pool));
      gradients = differentiable_conv_backward(g, input, weight, args.plan, output_mask);
    } else {
      gradients = conv_pool_backward(grad_y, indices, input, weight, args.plan, args.pool, output_mask);
    }
    std::move(gradients.begin(), gradients.end(), result.begin());
    return result;
  }
};

}  // namespace

Tensor conv_max_pool(const Tensor& input, const Tensor& weight, const optional<Tensor>& bias, const ConvPlan& plan,
                     Activation activation, const PoolSize& pool) {
  if (!is_fused(input, plan, activation, pool))
    return max_pool(conv(input, weight, bias, plan, activation), pool_plan(plan, pool), false).y;
  const bool grad_x = needs_grad(input), grad_w = needs_grad(weight);
  const bool records = is_recorded(grad_x || grad_w || needs_grad(bias), input, weight, bias);
  if (records) check_can_be_saved(input, weight);
  const MaxPoolOutput out = conv_pool_forward(input, weight, bias, plan, activation, pool, records);
  if (!records) return out.y;
  const auto node = make_node<ConvPoolOp>({plan, pool}, input, weight, bias);
  torch::autograd::set_history(out.y, node);
  save(node, grad_w ? input : none, grad_x ? weight : none, out.indices);
  return out.y;
}

namespace {

// ---- the fast door

template <int dims>
py::object conv_max_pool_fast(py::handle input, py::handle weight, py::handle bias, py::handle stride,
                              py::handle padding, py::handle dilation, py::handle groups, py::handle pool_size,
                              int kind, double a, double b) {
  const Activation activation = make_activation(kind, a, b);
  return conv_call({dims, false, stride, padding, dilation, {}, groups}, input, weight, bias,
                   [&](const Tensor& x, const Tensor& w, const optional<Tensor>& bias_tensor, const ConvPlan& plan,
                       auto&& finished) {
                     int64_t pool[3]{1, 1, 1};
                     if (!read_sizes(pool_size.ptr(), dims, pool)) return not_implemented();
                     for (int i = 0; i < 3; ++i)
                       if (pool[i] < 1 || pool[i] > plan.geometry.out[i]) return not_implemented();
                     return wrap(without_gil([&] { return conv_pool_name(plan); },
                                             [&] {
                                               return finished(fastops::conv_max_pool(
                                                   x, w, bias_tensor, plan, activation, {pool[0], pool[1], pool[2]}));
                                             },
                                             x, w, bias_tensor));
                   });
}

}  // namespace

void bind_conv_pool(py::module_& m) {
  fast_def<&conv_max_pool_fast<1>>(m, "conv_max_pool1d");
  fast_def<&conv_max_pool_fast<2>>(m, "conv_max_pool2d");
  fast_def<&conv_max_pool_fast<3>>(m, "conv_max_pool3d");
}

}  // namespace fastops
