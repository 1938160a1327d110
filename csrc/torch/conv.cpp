#include "../kernels/conv/conv.h"

#include <ATen/ATen.h>

#include <atomic>

#include "call.h"
#include "conv_binding.h"
#include "conv_plan.h"
#include "node.h"

namespace fastops {
namespace {

std::atomic<Precision> precision_setting{Precision::highest};

// ---- single kernel calls, in terms of the underlying convolution; operands have the layouts of the plan

// A CPU has fastops' own setting, a GPU PyTorch's.
Precision precision_for(const Tensor& operand) {
  return operand.is_cpu() ? conv_precision() : gpu::conv_precision(operand);
}

record::Row row_of(const ConvPlan& plan, const char* suffix, std::initializer_list<Tensor> operands) {
  return {op_name(plan, suffix), "", record::shapes_of(operands), dtype_name(operands.begin()->scalar_type())};
}

// False, and nothing is done, where no kernel adds the residual.
bool run_forward(const ConvPlan& plan, const Tensor& x, const Tensor& w, const Tensor& bias, Activation activation,
                 const Tensor& y, const Tensor& z, const char* suffix, const Tensor& residual = {}) {
  const void *const x_data = x.const_data_ptr(), *const w_data = w.const_data_ptr();
  const ConvForward call{.dtype = to_dtype(x.scalar_type()),
                         .layout = plan.layout,
                         .w_layout = plan.w_layout,
                         .geometry = plan.geometry,
                         .with_bias = bias.defined(),
                         .activation = activation,
                         .with_z = z.defined(),
                         .with_residual = residual.defined(),
                         .precision = precision_for(x),
                         .alignment = alignment_of({x_data, w_data})};
  if (residual.defined() && (!x.is_cpu() || planned(call, x.device(), torch_team()).runner == nullptr)) return false;
  run(call, {x_data, w_data, data_or_null(bias), y.mutable_data_ptr(), mutable_or_null(z), data_or_null(residual)},
      x.device(), [&] { return row_of(plan, suffix, {x, w, bias}); });
  return true;
}

void run_backward_input(const ConvPlan& plan, const Tensor& g, Activation activation, const Tensor& saved,
                        const Tensor& w, const Tensor& bias, Activation epilogue, const Tensor& x, const Tensor& z,
                        const char* suffix) {
  const ConvBackwardInput::Pointers pointers{g.const_data_ptr(), data_or_null(saved),  w.const_data_ptr(),
                                             data_or_null(bias), x.mutable_data_ptr(), mutable_or_null(z)};
  const ConvBackwardInput call{.dtype = to_dtype(g.scalar_type()),
                               .layout = plan.layout,
                               .w_layout = plan.w_layout,
                               .geometry = plan.geometry,
                               .activation = activation,
                               .with_bias = bias.defined(),
                               .epilogue = epilogue,
                               .with_z = z.defined(),
                               .precision = precision_for(g),
                               .alignment = alignment_of({pointers.grad_y, pointers.saved, pointers.w})};
  run(call, pointers, g.device(), [&] { return row_of(plan, suffix, {g, w, bias}); });
}

void run_backward_weight(const ConvPlan& plan, const ConvGeometry& geometry, const Tensor& g, Activation activation,
                         const Tensor& saved, const Tensor& x, const Tensor& grad_w, const Tensor& grad_bias) {
  const ConvBackwardWeight::Pointers pointers{g.const_data_ptr(), data_or_null(saved), data_or_null(x),
                                              mutable_or_null(grad_w), mutable_or_null(grad_bias)};
  const ConvBackwardWeight call{.dtype = to_dtype(g.scalar_type()),
                                .layout = plan.layout,
                                .w_layout = plan.w_layout,
                                .geometry = geometry,
                                .activation = activation,
                                .with_grad_w = grad_w.defined(),
                                .with_grad_bias = grad_bias.defined(),
                                .precision = precision_for(g),
                                .alignment = alignment_of({pointers.grad_y, pointers.saved, pointers.x})};
  run(call, pointers, g.device(), [&] { return row_of(plan, "_backward_weight", {g, x}); });
}

// The gradients of w and of the bias from g [batch, out_channels, out].
void weight_gradients(const ConvPlan& plan, const Tensor& g, Activation activation, const Tensor& saved,
                      const Tensor& x, const Tensor& grad_w, const Tensor& grad_bias) {
  if (!grad_w.defined() && !grad_bias.defined()) return;
  run_backward_weight(plan, plan.geometry, g, activation, saved, x, grad_w, grad_bias);
}

// The bias gradient of a transposed convolution: the sum of g over all dimensions but channels. It is computed as the
// bias gradient of a 1x1 convolution with the output gradient g.
void sum_over_channels(const ConvPlan& plan, const Tensor& g, const Tensor& grad_bias) {
  ConvGeometry geometry = plan.geometry;
  geometry.out_channels = geometry.in_channels;
  geometry.groups = 1;
  for (int i = 0; i < 3; ++i) {
    geometry.out[i] = geometry.in[i];
    geometry.kernel[i] = geometry.stride[i] = geometry.dilation[i] = 1;
    geometry.padding[i] = 0;
  }
  run_backward_weight(plan, geometry, g, {}, {}, {}, {}, grad_bias);
}

// Whether to compute g = grad_y f'(saved) once, into a tensor of its own. Otherwise the input's gradient computes it
// again at every tap. Measured on Granite Rapids, one thread, 28x28, 4 to 128 channels to 32, silu: with g in a tensor,
// the input's gradient of a 5x5 takes 0.25 to 0.63 of the time; of a 3x3, 0.3 with 4 channels and the same from 8 on.
// Depthwise kernels copy each plane once anyway. CUDA kernels can only fold derivatives that are computed from y.
bool formed_once(const ConvPlan& plan, Activation activation, at::Device device,
                 const std::array<bool, 3>& output_mask) {
  if (!device.is_cpu()) return saved_by_linear(activation) == Saved::input;
  const auto& kernel = plan.geometry.kernel;
  const int64_t taps = kernel[0] * kernel[1] * kernel[2], channels = plan.geometry.in_channels / plan.geometry.groups;
  return output_mask[0] && taps > 1 && channels > 1 && (taps > 9 || channels < 8);
}

// ---- differentiable gradients: each of y, grad_x and grad_w is linear in two of the others

ConvPlan flipped(ConvPlan plan) {
  plan.transposed = !plan.transposed;
  return plan;
}

// The padding of the underlying convolution after its last element; negative if the last elements are not read.
int64_t padding_after(const ConvGeometry& g, int i) {
  return (g.out[i] - 1) * g.stride[i] + g.dilation[i] * (g.kernel[i] - 1) + 1 - g.padding[i] - g.in[i];
}

// The argument of at::constant_pad_nd: the padding on either side, last dimension first. sign -1 crops instead.
std::vector<int64_t> padding_pairs(const ConvPlan& plan, int64_t sign) {
  std::vector<int64_t> pairs;
  for (int i = 2; i >= 3 - plan.dims; --i) {
    pairs.push_back(sign * plan.geometry.padding[i]);
    pairs.push_back(sign * padding_after(plan.geometry, i));
  }
  return pairs;
}

at::IntArrayRef last(const int64_t (&values)[3], int dims) { return {values + 3 - dims, static_cast<size_t>(dims)}; }

// The convolution without bias and activation in torch's ops, for batched and dual tensors.
Tensor torch_conv(const Tensor& input, const Tensor& weight, const ConvPlan& plan) {
  const ConvGeometry& g = plan.geometry;
  const std::vector<int64_t> none(static_cast<size_t>(plan.dims), 0);
  const auto run = [&](const Tensor& x) {
    return at::convolution(x, weight, {}, last(g.stride, plan.dims), none, last(g.dilation, plan.dims), plan.transposed,
                           none, g.groups);
  };
  if (plan.transposed) return at::constant_pad_nd(run(input), padding_pairs(plan, -1));
  return run(at::constant_pad_nd(input, padding_pairs(plan, 1)));
}

// The gradient of the weight for such tensors: the convolution of x with g, with batch and channels exchanged.
Tensor torch_conv_weight(const Tensor& g, const Tensor& x, const ConvPlan& plan) {
  const ConvGeometry& geometry = plan.geometry;
  const std::vector<int64_t> none(static_cast<size_t>(plan.dims), 0);
  const Tensor padded = at::constant_pad_nd(x, padding_pairs(plan, 1));
  const auto spatial = padded.sizes().slice(2);
  const auto reshaped = [&](const Tensor& tensor, std::vector<int64_t> sizes) {
    sizes.insert(sizes.end(), spatial.begin(), spatial.end());
    return tensor.reshape(sizes);
  };
  const int64_t groups = geometry.groups, channels = geometry.in_channels / groups;
  const Tensor by_group = reshaped(padded, {geometry.batch, groups, channels}).transpose(0, 2);
  const Tensor by_channel = reshaped(by_group, {channels, groups * geometry.batch});
  return at::convolution(by_channel, g.transpose(0, 1), {}, last(geometry.dilation, plan.dims), none,
                         last(geometry.stride, plan.dims), false, none, groups)
      .transpose(0, 1);
}

Tensor product(const Tensor& input, const Tensor& weight, const ConvPlan& plan) {
  if (!fast_door::is_plain(input) || !fast_door::is_plain(weight) || is_pytorchs(plan, input))
    return torch_conv(input, weight, plan);
  return conv(input, weight, {}, plan, {});
}

Tensor conv_weight(const Tensor& g, const Tensor& x, const ConvPlan& plan);

// grad_w from g and x, all of the underlying convolution. saved: g (if x needs a gradient), x (if g needs one).
struct ConvWeightOp {
  using Args = ConvPlan;
  static std::string name(const Args& plan) { return op_name(plan, "_backward_weight"); }
  static c10::IValue pack(const Args& plan) { return pack_plan(plan); }
  static Args unpack(const c10::IValue& packed) { return unpack_plan(packed.toIntVector()); }

  static variable_list gradients(const Args& plan, at::TensorList saved, const variable_list& grads, Needs needs) {
    variable_list result(2);
    if (!grads[0].defined()) return result;
    if (needs(0)) result[0] = product(saved[1], grads[0], plan);
    if (needs(1)) result[1] = product(saved[0], grads[0], flipped(plan));
    return result;
  }
};

Tensor conv_weight(const Tensor& g, const Tensor& x, const ConvPlan& plan) {
  if (!fast_door::is_plain(g) || !fast_door::is_plain(x) || is_pytorchs(plan, g)) return torch_conv_weight(g, x, plan);
  check_operand(g, x.scalar_type(), out_sizes(plan), "grad_output", g.device());
  check_operand(x, x.scalar_type(), in_sizes(plan), "input", g.device());
  const Tensor grad_w = empty_in(weight_sizes(plan), plan.w_strides, g.scalar_type(), g.device());
  if (plan.geometry.batch == 0)
    grad_w.zero_();
  else
    weight_gradients(plan, in_layout(g, plan), {}, {}, in_layout(x, plan), grad_w, {});
  const bool grad_g = needs_grad(g), grad_x = needs_grad(x);
  if (!is_recorded(grad_g || grad_x, g, x)) return grad_w;
  const auto node = make_node<ConvWeightOp>(plan, g, x);
  torch::autograd::set_history(grad_w, node);
  save(node, grad_x ? g : none, grad_g ? x : none);
  return grad_w;
}

struct ConvOp {
  struct Args {
    ConvPlan plan;
    Activation activation;
    bool with_residual;
  };
  static std::string name(const Args& args) { return op_name(args.plan); }
  static c10::IValue pack(const Args& args) {
    std::vector<double> values{static_cast<double>(args.activation.kind), args.activation.a, args.activation.b,
                               static_cast<double>(args.with_residual)};
    const std::vector<int64_t> plan = pack_plan(args.plan);
    values.insert(values.end(), plan.begin(), plan.end());
    return values;
  }
  static Args unpack(const c10::IValue& packed) {
    const auto values = packed.toDoubleVector();
    return {unpack_plan({values.begin() + 4, values.end()}),
            {static_cast<ActivationKind>(static_cast<int>(values[0])), values[1], values[2]},
            values[3] != 0};
  }

  // saved: input (if weight needs a gradient), weight (if input needs one), y or z. grads: of y, and of z if it exists.
  static variable_list gradients(const Args& args, at::TensorList saved, const variable_list& grads, Needs needs) {
    variable_list result(args.with_residual ? 4 : 3);
    const Tensor &grad_y = grads[0], grad_z = grads.size() > 1 ? grads[1] : Tensor();
    if (!grad_y.defined() && !grad_z.defined()) return result;
    const Tensor &input = saved[0], &weight = saved[1], &output = saved[2];
    auto [plan, activation, with_residual] = args;

    // The gradient will be differentiated again, or is batched or dual (is_grads_batched, forward over reverse): every
    // step is a differentiable op.
    if (at::GradMode::is_enabled() || grad_z.defined() || !fast_door::is_plain(grad_y)) {
      Tensor g = grad_y;
      if (g.defined() && activation.kind != ActivationKind::identity)
        g = differentiable_activation_backward(g, output, activation, saved_by_linear(activation));
      if (grad_z.defined()) g = g.defined() ? g + grad_z : grad_z;
      auto gradients = differentiable_conv_backward(g, input, weight, plan, {needs(0), needs(1), needs(2)});
      std::move(gradients.begin(), gradients.end(), result.begin());
      if (with_residual && needs(3)) result[3] = g;
      return result;
    }

    Tensor g = grad_y;
    if (with_residual && needs(3)) {  // its gradient is that of the sum, which is formed for it
      if (activation.kind != ActivationKind::identity)
        g = activation_backward(in_layout(grad_y, plan), in_layout(output, plan), activation,
                                saved_by_linear(activation));
      activation = {};
      result[3] = g;
    }
    auto gradients = conv_backward(g, output, input, weight, plan, activation, {needs(0), needs(1), needs(2)});
    std::move(gradients.begin(), gradients.end(), result.begin());
    return result;
  }
};

}  // namespace

std::array<Tensor, 3> differentiable_conv_backward(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                                                   const ConvPlan& plan, std::array<bool, 3> output_mask) {
  std::array<Tensor, 3> out;
  if (output_mask[0]) out[0] = product(grad_output, weight, flipped(plan));
  if (output_mask[1]) {
    ConvPlan underlying = plan;
    underlying.transposed = false;
    out[1] =
        plan.transposed ? conv_weight(input, grad_output, underlying) : conv_weight(grad_output, input, underlying);
  }
  if (output_mask[2]) {
    std::vector<int64_t> summed{0};
    for (int i = 0; i < plan.dims; ++i) summed.push_back(2 + i);
    out[2] = grad_output.sum(summed);
  }
  return out;
}

void set_conv_precision(Precision precision) { precision_setting.store(precision, std::memory_order_relaxed); }

Precision conv_precision() { return precision_setting.load(std::memory_order_relaxed); }

template <class Int>
std::string infer_conv(Sizes<Int> input, Sizes<Int> weight, const optional<Sizes<Int>>& bias, const ConvParams& params,
                       SizeVector<Int>& output) {
  constexpr const char* kSpatial[] = {"", "length", "height, width", "depth, height, width"};
  const auto dims = static_cast<size_t>(params.dims);
  const int64_t groups = params.groups;
  if (input.size() != dims + 2)
    return c10::str("input must have shape (batch, channels, ", kSpatial[dims], ") or that without batch, got ", input);
  if (weight.size() != dims + 2)
    return c10::str("weight must have ", dims + 2, " dimensions, (",
                    params.transposed ? "in_channels, out_channels / groups, " : "out_channels, in_channels / groups, ",
                    kSpatial[dims], "), got ", weight);
  if (groups < 1) return c10::str("groups must be at least 1, got ", groups);
  if (less(weight[0], 1) || differ(weight[0] % groups, 0))
    return c10::str("weight's first dimension must be a positive multiple of groups = ", groups, ", got ", weight);
  const Int channels = params.transposed ? weight[0] : weight[1] * groups;
  if (differ(input[1], channels))
    return c10::str("input must have ", channels, " channels (weight ", weight, ", groups ", groups, "), got ",
                    input[1], " in ", input);
  if (less(weight[1], 1)) return c10::str("weight must have at least one channel a group, got ", weight);
  const Int outputs = params.transposed ? weight[1] * groups : weight[0];
  if (bias && sizes_differ<Int>(*bias, {outputs}))
    return c10::str("bias must have shape (", outputs, ",), got ", *bias);
  output = {input[0], outputs};
  for (size_t axis = 2; axis < dims + 2; ++axis) {
    const size_t i = axis - 2 + 3 - dims;
    const Int &size = input[axis], &kernel = weight[axis];
    const int64_t stride = params.stride[i], dilation = params.dilation[i];
    const int64_t before = params.before[i], after = params.after[i];
    if (less(kernel, 1)) return c10::str("weight's kernel must have at least one element a dimension, got ", weight);
    if (stride < 1) return c10::str("stride must be at least 1, got ", stride);
    if (dilation < 1) return c10::str("dilation must be at least 1, got ", dilation);
    if (before < 0) return c10::str("padding must not be negative, got ", before);
    // Sums and products of these must not overflow. PyTorch's would, too.
    for (const auto& [value, name] : {std::pair(dilation, "dilation"), {before, "padding"}, {after, "padding"}})
      TORCH_CHECK(value <= INT32_MAX, "conv: ", name, " must be below 2^31, got ", value);
    if constexpr (std::is_same_v<Int, int64_t>)
      if (params.transposed && size > 1 && stride > INT64_MAX / 4 / (size - 1))
        return c10::str("stride takes the output beyond 2^61 elements, got ", stride);
    if (less(size, 1) && less(0, input[0]))
      return c10::str("input's spatial dimensions must not be empty, got ", input);
    const Int window = (kernel - 1) * dilation + 1;
    if (params.transposed) {
      const int64_t output_padding = before - after;
      if (output_padding < 0 || output_padding >= std::max(stride, dilation))
        return c10::str("output_padding must not be negative and smaller than stride or dilation (", stride, ", ",
                        dilation, "), got ", output_padding);
      output.push_back((size - 1) * stride + window - before - after);
      if (less(output.back(), 1))
        return c10::str("padding takes more than there is: the output would have ", output.back(),
                        " elements in dimension ", axis, " (input ", input, ", kernel ", kernel, ", stride ", stride,
                        ", padding ", before, ")");
    } else {
      if (after < 0) return c10::str("padding must not be negative, got ", after);
      const Int padded = size + before + after;
      if (less(padded, window))
        return c10::str("the kernel must fit into the padded input: in dimension ", axis, " it spans ", window, " (",
                        kernel, " with dilation ", dilation, "), and there are ", padded, " (", size, " with padding ",
                        before, " and ", after, ")");
      output.push_back((padded - window) / stride + 1);
    }
  }
  return {};
}
template std::string infer_conv<int64_t>(Sizes<int64_t>, Sizes<int64_t>, const optional<Sizes<int64_t>>&,
                                         const ConvParams&, SizeVector<int64_t>&);
template std::string infer_conv<c10::SymInt>(Sizes<c10::SymInt>, Sizes<c10::SymInt>,
                                             const optional<Sizes<c10::SymInt>>&, const ConvParams&,
                                             SizeVector<c10::SymInt>&);

namespace {

template <class Int>
optional<Sizes<Int>> sizes_of(const optional<Tensor>& tensor) {
  return tensor ? optional<Sizes<Int>>(sizes_as<Int>(*tensor)) : std::nullopt;
}

}  // namespace

std::string plan_conv(const Tensor& input, const Tensor& weight, const optional<Tensor>& bias, const ConvParams& params,
                      ConvPlan& plan) {
  ConvSizes output;
  std::string problem = infer_conv<int64_t>(input.sizes(), weight.sizes(), sizes_of<int64_t>(bias), params, output);
  if (!problem.empty()) return problem;
  ConvGeometry& g = plan.geometry;
  const at::IntArrayRef x = params.transposed ? at::IntArrayRef(output) : input.sizes();
  const at::IntArrayRef y = params.transposed ? input.sizes() : at::IntArrayRef(output);
  g = {input.size(0), x[1], y[1], params.groups, {1, 1, 1}, {1, 1, 1}, {1, 1, 1}, {}, {}, {}};
  const auto dims = static_cast<size_t>(params.dims);
  std::copy(x.begin() + 2, x.end(), g.in + 3 - dims);
  std::copy(y.begin() + 2, y.end(), g.out + 3 - dims);
  std::copy(weight.sizes().begin() + 2, weight.sizes().end(), g.kernel + 3 - dims);
  std::copy_n(params.stride, 3, g.stride);
  std::copy_n(params.before, 3, g.padding);
  std::copy_n(params.dilation, 3, g.dilation);
  plan.dims = params.dims;
  plan.transposed = params.transposed;
  const ConvLayouts layouts = conv_layouts(input, weight);
  plan.layout = layouts.image;
  plan.w_layout = layouts.weight;
  plan.w_strides = layouts.weight_strides;
  return {};
}

namespace {

// conv_forward of f(conv(input, weight) + bias + residual); residual has the output's shape and dtype, or is undefined.
ConvOutput forward_adding(const Tensor& residual, const Tensor& input, const Tensor& weight,
                          const optional<Tensor>& bias, const ConvPlan& plan, Activation activation, bool need_saved) {
  const auto type = input.scalar_type();
  const auto device = input.device();
  check_input(input, "conv", "input");
  check_operand(input, type, plan.transposed ? out_sizes(plan) : in_sizes(plan), "input", device);
  check_operand(weight, type, weight_sizes(plan), "weight", device);
  const Tensor b = checked_bias(bias, type, device);
  const ConvSizes sizes = plan.transposed ? in_sizes(plan) : out_sizes(plan);
  if (residual.defined()) check_operand(residual, type, sizes, "residual", device);
  ConvOutput out;
  out.y = empty_in(sizes, plan.layout, type, device);
  if (need_saved && saved_by_linear(activation) == Saved::input) out.z = empty_in(sizes, plan.layout, type, device);
  if (out.y.numel() == 0) return out;
  const Tensor x = in_layout(input, plan), w = weight_in_layout(weight, plan);
  const Tensor added = residual.defined() ? in_layout(residual, plan) : Tensor();
  if (plan.transposed) {
    TORCH_CHECK(!added.defined(), "conv: residual must be undefined for a transposed convolution");
    run_backward_input(plan, x, {}, {}, w, b, activation, out.y, out.z, "");
  } else if (!run_forward(plan, x, w, b, activation, out.y, out.z, "", added)) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    run_forward(plan, x, w, b, {}, out.y, {}, "");
    out.y.add_(added);
    if (out.z.defined()) out.z = out.y;
    if (activation.kind != ActivationKind::identity) out.y = activation_forward(out.y, activation, false).y;
  }
  return out;
}

}  // namespace

ConvOutput conv_forward(const Tensor& input, const Tensor& weight, const optional<Tensor>& bias, const ConvPlan& plan,
                        Activation activation, bool need_saved) {
  return forward_adding({}, input, weight, bias, plan, activation, need_saved);
}

std::array<Tensor, 3> conv_backward(const Tensor& grad_output, const Tensor& saved, const Tensor& input,
                                    const Tensor& weight, const ConvPlan& plan, Activation activation,
                                    std::array<bool, 3> output_mask) {
  const auto type = grad_output.scalar_type();
  const bool identity = activation.kind == ActivationKind::identity;
  const ConvSizes input_sizes = plan.transposed ? out_sizes(plan) : in_sizes(plan);
  const ConvSizes output_sizes = plan.transposed ? in_sizes(plan) : out_sizes(plan);
  const auto device = grad_output.device();
  check_input(grad_output, "conv", "grad_output");
  check_operand(grad_output, type, output_sizes, "grad_output", device);
  if (!identity) {
    TORCH_CHECK(saved.defined(), "conv: saved must be what the forward pass saved for ",
                activation_name(activation.kind), ", got nothing");
    check_operand(saved, type, output_sizes, "saved", device);
  }
  if (output_mask[0]) check_operand(weight, type, weight_sizes(plan), "weight", device);
  if (output_mask[1]) check_operand(input, type, input_sizes, "input", device);

  const bool of_nothing = plan.geometry.batch == 0;
  std::array<Tensor, 3> out = new_gradients(plan, type, output_mask, of_nothing, device);
  if (of_nothing) return out;

  Tensor g = in_layout(grad_output, plan), s = identity ? Tensor() : in_layout(saved, plan);
  const Tensor x = output_mask[1] ? in_layout(input, plan) : Tensor();
  const Tensor w = output_mask[0] ? weight_in_layout(weight, plan) : Tensor();
  if (!identity && (plan.transposed || formed_once(plan, activation, device, output_mask))) {
    g = activation_backward(g, s, activation, saved_by_linear(activation));
    s = Tensor();
    activation = {};
  }
  if (plan.transposed) {
    if (out[0].defined()) run_forward(plan, g, w, {}, {}, out[0], {}, "_backward_input");
    weight_gradients(plan, x, {}, {}, g, out[1], {});
    if (out[2].defined()) sum_over_channels(plan, g, out[2]);
  } else {
    if (out[0].defined()) run_backward_input(plan, g, activation, s, w, {}, {}, out[0], {}, "_backward_input");
    weight_gradients(plan, g, activation, s, x, out[1], out[2]);
  }
  return out;
}

namespace {

Tensor conv_adding(const Tensor& residual, const Tensor& input, const Tensor& weight, const optional<Tensor>& bias,
                   const ConvPlan& plan, Activation activation) {
  const bool grad_x = needs_grad(input), grad_w = needs_grad(weight);
  const bool wanted = grad_x || grad_w || needs_grad(bias) || needs_grad(residual);
  const bool records = residual.defined() ? is_recorded(wanted, input, weight, bias, residual)
                                          : is_recorded(wanted, input, weight, bias);
  if (records) check_can_be_saved(input, weight);
  auto [y, z] = forward_adding(residual, input, weight, bias, plan, activation, /*need_saved=*/records);
  if (!records) return y;
  // z, the pre-activation, is a hidden output of the node: second-order gradients reach the inputs through it.
  const ConvOp::Args args{plan, activation, residual.defined()};
  const auto node = residual.defined() ? make_node<ConvOp>(args, input, weight, bias, residual)
                                       : make_node<ConvOp>(args, input, weight, bias);
  torch::autograd::set_history(y, node);
  if (z.defined()) torch::autograd::set_history(z, node);
  const bool identity = activation.kind == ActivationKind::identity;
  save(node, grad_w ? input : none, grad_x ? weight : none, identity ? none : z.defined() ? z : y);
  return y;
}

}  // namespace

Tensor conv(const Tensor& input, const Tensor& weight, const optional<Tensor>& bias, const ConvPlan& plan,
            Activation activation) {
  return conv_adding({}, input, weight, bias, plan, activation);
}

// ---- the general door

ConvParams make_params(at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, bool transposed,
                       int64_t groups) {
  const size_t dims = stride.size();
  TORCH_CHECK(dims >= 1 && dims <= 3 && padding.size() == 2 * dims && dilation.size() == dims,
              "conv: stride, padding and dilation must have 1 to 3, twice as many and as many elements, got ", stride,
              ", ", padding, " and ", dilation);
  ConvParams params{static_cast<int>(dims), transposed, groups, {1, 1, 1}, {}, {}, {1, 1, 1}};
  const size_t first = 3 - dims;
  std::copy(stride.begin(), stride.end(), params.stride + first);
  std::copy_n(padding.begin(), dims, params.before + first);
  std::copy_n(padding.begin() + dims, dims, params.after + first);
  std::copy(dilation.begin(), dilation.end(), params.dilation + first);
  return params;
}

namespace {

template <class Int>
SizeVector<Int> output_sizes(const Tensor& input, const Tensor& weight, const optional<Tensor>& bias,
                             const ConvParams& params) {
  SizeVector<Int> output;
  const std::string problem =
      infer_conv<Int>(sizes_as<Int>(input), sizes_as<Int>(weight), sizes_of<Int>(bias), params, output);
  TORCH_CHECK(problem.empty(), "conv: ", problem);
  return output;
}

ConvPlan make_plan(const Tensor& input, const Tensor& weight, const optional<Tensor>& bias, const ConvParams& params) {
  ConvPlan plan;
  const std::string problem = plan_conv(input, weight, bias, params, plan);
  TORCH_CHECK(problem.empty(), "conv: ", problem);
  return plan;
}

template <class Int>
std::tuple<Tensor, Tensor> conv_forward_op(const Tensor& input, const Tensor& weight, const optional<Tensor>& bias,
                                           at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                                           bool transposed, int64_t groups, c10::string_view activation, double a,
                                           double b, bool need_saved) {
  const ConvParams params = make_params(stride, padding, dilation, transposed, groups);
  const Activation f = make_activation(activation, a, b);
  const bool saves = need_saved && saved_by_linear(f) == Saved::input;
  if constexpr (is_symbolic<Int>) {
    const auto type = input.scalar_type();
    const auto device = input.device();
    const auto sizes = output_sizes<Int>(input, weight, bias, params);
    check_input(input, "conv", "input");
    check_operand<Int>(weight, type, sizes_as<Int>(weight), "weight", device);
    checked_bias(bias, type, device);
    const Layout layout = conv_layouts(input, weight).image;
    const Tensor y = empty_in<Int>(sizes, layout, type, device);
    return {y, or_empty(saves ? empty_in<Int>(sizes, layout, type, device) : Tensor(), y)};
  } else {
    const ConvPlan plan = make_plan(input, weight, bias, params);
    if (is_pytorchs(plan, input)) {
      Tensor z = in_layout(torch_conv(input, weight, plan), plan);
      if (bias) z += bias->reshape(conv_sizes(1, bias->numel(), {1, 1, 1}, plan.dims));
      return {activation_forward(z, f, false).y, or_empty(saves ? z : Tensor(), z)};
    }
    auto [y, z] = conv_forward(input, weight, bias, plan, f, need_saved);
    return {y, or_empty(z, y)};
  }
}

template <class Int>
std::tuple<Tensor, Tensor, Tensor> conv_backward_op(const Tensor& grad_output, const optional<Tensor>& saved,
                                                    const Tensor& input, const Tensor& weight, at::IntArrayRef stride,
                                                    at::IntArrayRef padding, at::IntArrayRef dilation, bool transposed,
                                                    int64_t groups, c10::string_view activation, double a, double b,
                                                    std::array<bool, 3> output_mask) {
  const ConvParams params = make_params(stride, padding, dilation, transposed, groups);
  if constexpr (is_symbolic<Int>) {
    const auto sizes = output_sizes<Int>(input, weight, {}, params);
    check_input(grad_output, "conv", "grad_output");
    check_operand<Int>(grad_output, input.scalar_type(), sizes, "grad_output", input.device());
    return or_empty(new_gradients<Int>(sizes_as<Int>(input), sizes_as<Int>(weight), sizes[1],
                                       conv_layouts(input, weight), input.scalar_type(), input.device(), output_mask),
                    grad_output);
  } else {
    const ConvPlan plan = make_plan(input, weight, {}, params);
    const Activation f = make_activation(activation, a, b);
    const Tensor s = saved.value_or(Tensor());
    if (!is_pytorchs(plan, input))
      return or_empty(conv_backward(grad_output, s, input, weight, plan, f, output_mask), grad_output);
    const bool identity = f.kind == ActivationKind::identity;
    const Tensor g = identity ? grad_output : activation_backward(grad_output, s, f, saved_by_linear(f));
    std::array<Tensor, 3> gradients = differentiable_conv_backward(g, input, weight, plan, output_mask);
    if (output_mask[0]) gradients[0] = in_layout(gradients[0], plan);
    if (output_mask[1]) gradients[1] = weight_in_layout(gradients[1], plan);
    return or_empty(gradients, grad_output);
  }
}

template <class Int>
void implement_conv(torch::Library& m) {
  m.impl("conv_forward", conv_forward_op<Int>);
  m.impl("conv_backward", conv_backward_op<Int>);
}

// ---- the fast door

// padding="valid", or "same": the output has the input's size, and an odd element goes behind.
bool read_padding_mode(PyObject* object, const Tensor& weight, ConvParams& params) {
  if (!PyUnicode_CheckExact(object)) return false;
  if (PyUnicode_CompareWithASCIIString(object, "valid") == 0) return true;
  if (PyUnicode_CompareWithASCIIString(object, "same") != 0 || weight.dim() != params.dims + 2) return false;
  for (int i = 0; i < params.dims; ++i) {
    const int at = 3 - params.dims + i;
    if (params.stride[at] != 1) return false;
    const int64_t total = params.dilation[at] * (weight.size(2 + i) - 1);
    params.before[at] = total / 2;
    params.after[at] = total - total / 2;
  }
  return true;
}

}  // namespace

bool read_params(const ConvArguments& arguments, const Tensor& weight, ConvParams& params) {
  const int dims = params.dims;
  if (!read_sizes(arguments.stride.ptr(), dims, params.stride) ||
      !read_sizes(arguments.dilation.ptr(), dims, params.dilation) || !read_int(arguments.groups.ptr(), params.groups))
    return false;
  if (!read_sizes(arguments.padding.ptr(), dims, params.before))
    return !params.transposed && read_padding_mode(arguments.padding.ptr(), weight, params);
  std::copy_n(params.before, 3, params.after);
  if (!params.transposed) return true;
  int64_t output_padding[3]{};
  if (!read_sizes(arguments.output_padding.ptr(), dims, output_padding)) return false;
  for (int i = 0; i < 3; ++i) params.after[i] -= output_padding[i];
  return true;
}

namespace {

py::object conv_fast(const ConvArguments& arguments, py::handle input, py::handle weight, py::handle bias, int kind,
                     double a, double b) {
  const Activation activation = make_activation(kind, a, b);
  return conv_call(
      arguments, input, weight, bias,
      [&](const Tensor& x, const Tensor& w, const optional<Tensor>& bias_tensor, const ConvPlan& plan,
          auto&& finished) {
        return wrap(without_gil([&] { return op_name(plan); },
                                [&] { return finished(fastops::conv(x, w, bias_tensor, plan, activation)); }, x, w,
                                bias_tensor));
      });
}

template <int dims>
py::object conv_fast(py::handle input, py::handle weight, py::handle bias, py::handle stride, py::handle padding,
                     py::handle dilation, py::handle groups, int kind, double a, double b) {
  return conv_fast({dims, false, stride, padding, dilation, {}, groups}, input, weight, bias, kind, a, b);
}

// The same and a residual of the output's shape, dtype and device; not under autocast.
template <int dims>
py::object conv_add_fast(py::handle input, py::handle weight, py::handle bias, py::handle stride, py::handle padding,
                         py::handle dilation, py::handle groups, py::handle residual, int kind, double a, double b) {
  if (!fast_door::is_plain(residual.ptr())) return not_implemented();
  const Tensor& added = THPVariable_Unpack(residual.ptr());
  if (at::autocast::is_autocast_enabled(added.device().type()) || added.dim() != dims + 2) return not_implemented();
  return conv_call(
      {dims, false, stride, padding, dilation, {}, groups}, input, weight, bias,
      [&](const Tensor& x, const Tensor& w, const optional<Tensor>& bias_tensor, const ConvPlan& plan, auto&&) {
        // The strides of a sum depend on both operands where their layouts differ.
        if (!is_on(added, x.device()) || added.scalar_type() != x.scalar_type() || added.sizes() != out_sizes(plan) ||
            !added.is_contiguous(format_of(plan.layout, plan.dims)))
          return not_implemented();
        return wrap(
            without_gil([&] { return op_name(plan); },
                        [&] { return conv_adding(added, x, w, bias_tensor, plan, make_activation(kind, a, b)); }, x, w,
                        bias_tensor, added));
      });
}

template <int dims>
py::object conv_transpose_fast(py::handle input, py::handle weight, py::handle bias, py::handle stride,
                               py::handle padding, py::handle output_padding, py::handle groups, py::handle dilation,
                               int kind, double a, double b) {
  return conv_fast({dims, true, stride, padding, dilation, output_padding, groups}, input, weight, bias, kind, a, b);
}

// What of these arguments does not fit, for the choice of the door and for the message of an error; "" where everything
// does, None where they are for PyTorch to read.
optional<std::string> conv_problem(const Tensor& input, const Tensor& weight, const optional<Tensor>& bias,
                                   py::handle stride, py::handle padding, py::handle dilation, py::handle groups,
                                   py::handle output_padding, int dims, bool transposed) {
  ConvParams params{dims, transposed, 1, {1, 1, 1}, {}, {}, {1, 1, 1}};
  if (!read_params({dims, transposed, stride, padding, dilation, output_padding, groups}, weight, params))
    return std::nullopt;
  SizeVector<c10::SymInt> sizes(input.sym_sizes()), output;
  if (input.dim() == dims + 1) sizes.insert(sizes.begin(), 1);
  return infer_conv<c10::SymInt>(sizes, weight.sym_sizes(), sizes_of<c10::SymInt>(bias), params, output);
}

}  // namespace

void implement_conv(torch::Library& m, bool meta) {
  meta ? implement_conv<c10::SymInt>(m) : implement_conv<int64_t>(m);
}

void bind_conv(py::module_& m) {
  fast_def<&conv_fast<1>>(m, "conv1d");
  fast_def<&conv_fast<2>>(m, "conv2d");
  fast_def<&conv_fast<3>>(m, "conv3d");
  fast_def<&conv_add_fast<1>>(m, "conv_add1d");
  fast_def<&conv_add_fast<2>>(m, "conv_add2d");
  fast_def<&conv_add_fast<3>>(m, "conv_add3d");
  fast_def<&conv_transpose_fast<1>>(m, "conv_transpose1d");
  fast_def<&conv_transpose_fast<2>>(m, "conv_transpose2d");
  fast_def<&conv_transpose_fast<3>>(m, "conv_transpose3d");
  m.def("conv_problem", &conv_problem);
  m.def("set_conv_precision", [](int precision) { set_conv_precision(static_cast<Precision>(precision)); });
  m.def("conv_precision", [] { return static_cast<int>(conv_precision()); });
}

}  // namespace fastops
