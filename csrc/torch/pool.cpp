#include "../kernels/pool/pool.h"

#include <ATen/ATen.h>

#include "binding.h"
#include "call.h"
#include "node.h"
#include "sizes.h"

namespace fastops {
namespace {

// ---- layouts

// The strides of a dense tensor of these sizes, (batch, channels, spatial) or without batch.
template <class Int>
SizeVector<Int> strides_in(Sizes<Int> sizes, Layout layout) {
  const size_t dims = sizes.size();
  SizeVector<Int> strides(dims, 1);
  Int step = 1;
  const auto take = [&](size_t i) {
    strides[i] = step;
    step *= sizes[i];
  };
  if (layout == Layout::channels_last) take(1);
  for (size_t i = dims; i-- > 0;)
    if (layout == Layout::channels_first || i != 1) take(i);
  return strides;
}

template <class Int = int64_t>
bool lies_in(const Tensor& tensor, Layout layout) {
  if (layout == Layout::channels_first) return tensor.is_contiguous();
  const auto sizes = sizes_as<Int>(tensor), actual = strides_as<Int>(tensor);
  const SizeVector<Int> strides = strides_in<Int>(sizes, layout);
  for (size_t i = 0; i < sizes.size(); ++i)
    if (differ(sizes[i], 1) && differ(actual[i], strides[i])) return false;
  return true;
}

template <class Int = int64_t>
Tensor empty_pool(std::type_identity_t<Sizes<Int>> sizes, Layout layout, at::ScalarType type, at::Device device) {
  if (layout == Layout::channels_first) return new_tensor<Int>(sizes, type, device);
  return new_tensor_strided<Int>(sizes, strides_in<Int>(sizes, layout), type, device);
}

Tensor in_layout(const Tensor& tensor, Layout layout) {
  if (lies_in(tensor, layout)) return tensor;
  const Tensor copy = empty_pool(tensor.sizes(), layout, tensor.scalar_type(), tensor.device());
  copy.copy_(tensor);
  return copy;
}

SizeVector<int64_t> sizes_of(const PoolPlan& plan, const int64_t (&spatial)[3]) {
  SizeVector<int64_t> sizes;
  if (plan.batched) sizes.push_back(plan.geometry.batch);
  sizes.push_back(plan.geometry.channels);
  sizes.append(spatial + 3 - plan.dims, spatial + 3);
  return sizes;
}

bool is_empty(const PoolPlan& plan, const int64_t (&spatial)[3]) {
  return plan.geometry.batch * plan.geometry.channels * spatial[0] * spatial[1] * spatial[2] == 0;
}

// ---- geometry

// PyTorch's pooling_output_shape, or 0 where no window fits.
template <class Int>
Int output_size(const Int& in, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation, bool ceil_mode) {
  const Int room = in + 2 * padding - dilation * (kernel - 1) - 1 + (ceil_mode ? stride - 1 : 0);
  if (less(room, 0)) return 0;
  const Int out = room / stride + 1;
  // The last window has to start inside.
  return ceil_mode && less(in + padding - 1, (out - 1) * stride) ? out - 1 : out;
}

// The output's sizes for an input (batch, channels, *spatial), or without batch; `sizes` of an adaptive pool: those
// wanted, else empty. Returns "", or what does not fit.
template <class Int>
std::string infer_pool(Sizes<Int> input, const PoolParams& params, Sizes<Int> sizes, SizeVector<Int>& output) {
  const auto dims = static_cast<size_t>(params.dims);
  if (input.size() != dims + 2 && input.size() != dims + 1)
    return c10::str("input must have ", dims + 1, " or ", dims + 2, " dimensions, got shape ", input);
  const size_t leading = input.size() - dims;
  if (!params.adaptive && same(input[leading - 1], 0)) return c10::str("input must have channels, got shape ", input);
  for (size_t axis = leading; axis < input.size(); ++axis)
    if (same(input[axis], 0)) return c10::str("input's spatial sizes must not be 0, got shape ", input);
  for (const Int& size : input.slice(0, leading)) output.push_back(size);
  for (size_t axis = leading; axis < input.size(); ++axis) {
    const Int& in = input[axis];
    if (params.adaptive) {
      const Int& size = sizes[axis - leading];
      const bool as_input = same(size, PoolParams::kSameSize);
      if (!as_input && less(size, 0)) return c10::str("output_size must not be negative, got ", size);
      output.push_back(as_input ? in : size);
      continue;
    }
    const size_t i = axis - leading + 3 - dims;
    const int64_t kernel = params.kernel[i], stride = params.stride[i], padding = params.padding[i],
                  dilation = params.dilation[i];
    if (kernel <= 0) return c10::str("kernel_size must be positive, got ", kernel);
    if (stride <= 0) return c10::str("stride must be positive, got ", stride);
    if (dilation <= 0) return c10::str("dilation must be positive, got ", dilation);
    if (padding < 0) return c10::str("padding must not be negative, got ", padding);
    for (const auto& [value, name] :
         {std::pair(kernel, "kernel_size"), {stride, "stride"}, {padding, "padding"}, {dilation, "dilation"}})
      if (value > INT32_MAX) return c10::str(name, " must be below 2^31, got ", value);
    if (padding > kernel / 2)
      return c10::str("padding must be at most half of kernel_size, got ", padding, " with kernel_size ", kernel);
    output.push_back(output_size(in, kernel, stride, padding, dilation, params.ceil_mode));
    if (less(output.back(), 1) || (params.within_input && less(in, kernel)))
      return c10::str("kernel_size ", kernel, " with dilation ", dilation, " is larger than the input of ", in,
                      " with its padding of ", padding);
  }
  return {};
}

// The kind of indices that backward uses, by the elements of a window. The arrays are given by their ends.
template <class Int>
PoolIndices compact_indices(bool adaptive, int dims, const int64_t* kernel, const Int* in, const Int* out) {
  Int box = 1;
  for (int i = -dims; i < 0 && !less(256, box); ++i)
    box = box * (adaptive ? adaptive_box(in[i], out[i]) : Int(kernel[i]));
  return less(256, box) ? PoolIndices::plane : PoolIndices::window;
}

// Whether the windows over one element are so many that channels_last, where each compares its index with the element,
// loses against copies to channels_first and back, where a window adds to one element (a comparison for 16 channels
// takes about 4 cycles, the copies 15 an element; Granite Rapids).
bool overlaps_widely(const PoolGeometry& g) {
  int64_t windows = 1;  // each factor is cut off: their product may not overflow
  for (int i = 0; i < 3 && !g.adaptive; ++i)
    windows *= std::min<int64_t>((g.kernel[i] + g.stride[i] - 1) / g.stride[i], 65);
  return windows > 64;
}

template <class Call>
void run_pool(const Call& call, const typename Call::Pointers& pointers, const PoolPlan& plan, const char* kind,
              const char* suffix, const Tensor& tensor) {
  run(call, pointers, tensor.device(), [&] {
    return record::Row{op_name(plan, kind, suffix), "", record::shapes_of({tensor}), dtype_name(tensor.scalar_type())};
  });
}

void check_operand(const Tensor& tensor, const PoolPlan& plan, const int64_t (&spatial)[3], const char* op,
                   const char* name) {
  TORCH_CHECK(tensor.sizes() == at::IntArrayRef(sizes_of(plan, spatial)), op, ": ", name, " must have shape ",
              at::IntArrayRef(sizes_of(plan, spatial)), ", got ", tensor.sizes());
}

// PyTorch's adaptive pools may have no outputs, and then no gradient either.
void check_has_outputs(const PoolPlan& plan, const char* kind) {
  for (int i = 3 - plan.dims; i < 3; ++i)
    TORCH_CHECK(plan.geometry.out[i] > 0, op_name(plan, kind, "_backward"),
                ": grad_output must not be empty in a spatial dimension, got shape ",
                at::IntArrayRef(sizes_of(plan, plan.geometry.out)));
}

// ---- autograd

// What a pool's nodes remember besides tensors.
struct PoolArgs {
  PoolPlan plan;
  AvgDivisor divisor;
};

c10::IValue pack_pool(const PoolArgs& args) {
  const PoolGeometry& g = args.plan.geometry;
  std::vector<int64_t> values{args.plan.dims,
                              args.plan.batched,
                              static_cast<int64_t>(args.plan.layout),
                              args.divisor.include_pad,
                              args.divisor.override,
                              g.batch,
                              g.channels,
                              g.adaptive};
  for (const int64_t (*array)[3] : {&g.in, &g.out, &g.kernel, &g.stride, &g.padding, &g.dilation})
    values.insert(values.end(), *array, *array + 3);
  return values;
}

PoolArgs unpack_pool(const c10::IValue& packed) {
  const auto values = packed.toIntVector();
  PoolArgs args{};
  args.plan.dims = static_cast<int>(values[0]);
  args.plan.batched = values[1] != 0;
  args.plan.layout = static_cast<Layout>(values[2]);
  args.divisor = {values[3] != 0, values[4]};
  PoolGeometry& g = args.plan.geometry;
  g.batch = values[5];
  g.channels = values[6];
  g.adaptive = values[7] != 0;
  auto from = values.begin() + 8;
  for (int64_t (*array)[3] : {&g.in, &g.out, &g.kernel, &g.stride, &g.padding, &g.dilation}) {
    std::copy_n(from, 3, *array);
    from += 3;
  }
  return args;
}

bool direct(const Tensor& grad) { return !at::GradMode::is_enabled() && fast_door::is_plain(grad); }

// grad_x = scatter(grad_y, indices); saved: the indices.
struct MaxPoolOp {
  using Args = PoolArgs;
  static std::string name(const Args& args) { return op_name(args.plan, "max"); }
  static c10::IValue pack(const Args& args) { return pack_pool(args); }
  static Args unpack(const c10::IValue& packed) { return unpack_pool(packed); }
  static variable_list gradients(const Args& args, at::TensorList saved, const variable_list& grads, Needs needs) {
    const Tensor& g = grads[0];
    if (!g.defined() || !needs(0)) return {Tensor()};
    if (direct(g)) return {max_pool_backward(g, saved[0], args.plan)};
    return {differentiable_max_pool_backward(g, saved[0], args.plan)};
  }
};

Tensor differentiable_avg_pool_backward(const Tensor& grad_output, const PoolArgs& args);

// Averaging is linear, and its gradient's gradient averages again.
struct AvgPoolBackwardOp {
  using Args = PoolArgs;
  static std::string name(const Args& args) { return op_name(args.plan, "avg", "_backward"); }
  static c10::IValue pack(const Args& args) { return pack_pool(args); }
  static Args unpack(const c10::IValue& packed) { return unpack_pool(packed); }
  static variable_list gradients(const Args& args, at::TensorList, const variable_list& grads, Needs needs);
};

struct AvgPoolOp {
  using Args = PoolArgs;
  static std::string name(const Args& args) { return op_name(args.plan, "avg"); }
  static c10::IValue pack(const Args& args) { return pack_pool(args); }
  static Args unpack(const c10::IValue& packed) { return unpack_pool(packed); }
  static variable_list gradients(const Args& args, at::TensorList, const variable_list& grads, Needs needs) {
    if (!grads[0].defined() || !needs(0)) return {Tensor()};
    if (direct(grads[0])) return {avg_pool_backward(grads[0], args.plan, args.divisor)};
    return {differentiable_avg_pool_backward(grads[0], args)};
  }
};

// Batched or dual tensors go to torch's own averages; one dimension is two with a height of one.
struct TorchAvgPool {
  const PoolGeometry& g;
  int dims, spatial;  // 2 or 3
  bool ceil_mode = false, include_pad;
  optional<int64_t> divisor;

  explicit TorchAvgPool(const PoolArgs& args)
      : g(args.plan.geometry),
        dims(args.plan.dims),
        spatial(dims == 3 ? 3 : 2),
        include_pad(args.divisor.include_pad),
        divisor(args.divisor.override != 0 ? optional<int64_t>(args.divisor.override) : std::nullopt) {
    for (int i = 0; i < 3 && !g.adaptive; ++i)
      ceil_mode |= output_size<int64_t>(g.in[i], g.kernel[i], g.stride[i], g.padding[i], 1, false) != g.out[i];
  }
  Tensor raise(const Tensor& tensor) const { return dims == 1 ? tensor.unsqueeze(-2) : tensor; }
  Tensor lower(const Tensor& tensor) const { return dims == 1 ? tensor.squeeze(-2) : tensor; }
  at::IntArrayRef last(const int64_t (&values)[3]) const {
    return {values + 3 - spatial, static_cast<size_t>(spatial)};
  }

  Tensor forward(const Tensor& input) const {
    const auto kernel = last(g.kernel), stride = last(g.stride), padding = last(g.padding);
    const Tensor x = raise(input);
    if (g.adaptive)
      return lower(spatial == 3 ? at::adaptive_avg_pool3d(x, g.out) : at::adaptive_avg_pool2d(x, last(g.out)));
    return lower(spatial == 3 ? at::avg_pool3d(x, kernel, stride, padding, ceil_mode, include_pad, divisor)
                              : at::avg_pool2d(x, kernel, stride, padding, ceil_mode, include_pad, divisor));
  }
  Tensor backward(const Tensor& grad_output, at::IntArrayRef input_sizes) const {
    const auto kernel = last(g.kernel), stride = last(g.stride), padding = last(g.padding);
    const Tensor grad = raise(grad_output), x = raise(at::zeros(input_sizes, grad_output.options()));
    if (g.adaptive)
      return lower(spatial == 3 ? at::_adaptive_avg_pool3d_backward(grad, x)
                                : at::_adaptive_avg_pool2d_backward(grad, x));
    return lower(spatial == 3
                     ? at::avg_pool3d_backward(grad, x, kernel, stride, padding, ceil_mode, include_pad, divisor)
                     : at::avg_pool2d_backward(grad, x, kernel, stride, padding, ceil_mode, include_pad, divisor));
  }
};

}  // namespace

Layout pool_layout(const Tensor& tensor, int dims) {
  if (tensor.dim() != dims + 2 || tensor.is_contiguous_or_false()) return Layout::channels_first;
  const bool last = dims == 1 ? lies_in<c10::SymInt>(tensor, Layout::channels_last)
                              : tensor.suggest_memory_format() != at::MemoryFormat::Contiguous;
  return last ? Layout::channels_last : Layout::channels_first;
}

std::string plan_pool(at::IntArrayRef sizes, const PoolParams& params, PoolPlan& plan) {
  const auto dims = static_cast<size_t>(params.dims);
  SizeVector<int64_t> output;
  std::string problem = infer_pool<int64_t>(sizes, params, {params.output + 3 - dims, dims}, output);
  if (!problem.empty()) return problem;
  plan.dims = params.dims;
  plan.batched = sizes.size() == dims + 2;
  PoolGeometry& g = plan.geometry;
  const size_t leading = sizes.size() - dims;
  g = {plan.batched ? sizes[0] : 1, sizes[leading - 1], {1, 1, 1}, {1, 1, 1}, {}, {}, {}, {}, params.adaptive};
  std::copy(sizes.begin() + leading, sizes.end(), g.in + 3 - dims);
  std::copy(output.begin() + leading, output.end(), g.out + 3 - dims);
  if (params.adaptive) return {};
  for (const auto& [from, to] : {std::pair(&params.kernel, &g.kernel),
                                 {&params.stride, &g.stride},
                                 {&params.padding, &g.padding},
                                 {&params.dilation, &g.dilation}})
    std::copy_n(*from, 3, *to);
  return {};
}

PoolIndices compact_indices(const PoolGeometry& g) {
  return compact_indices(g.adaptive, 3, g.kernel + 3, g.in + 3, g.out + 3);
}

MaxPoolOutput max_pool_forward(const Tensor& input, const PoolPlan& plan, PoolIndices kind) {
  check_input(input, "max_pool", "input");
  const Tensor x = in_layout(input, plan.layout);
  const auto sizes = sizes_of(plan, plan.geometry.out);
  MaxPoolOutput out{empty_pool(sizes, plan.layout, x.scalar_type(), x.device()), {}};
  if (kind != PoolIndices::none)
    out.indices = empty_pool(sizes, plan.layout, kind == PoolIndices::plane ? at::kLong : at::kByte, x.device());
  if (is_empty(plan, plan.geometry.out)) return out;
  run_pool(MaxPoolForward{to_dtype(x.scalar_type()), plan.layout, plan.geometry, kind},
           {x.const_data_ptr(), out.y.mutable_data_ptr(), mutable_or_null(out.indices)}, plan, "max", "", x);
  return out;
}

Tensor max_pool_backward(const Tensor& grad_output, const Tensor& indices, const PoolPlan& plan) {
  check_input(grad_output, "max_pool_backward", "grad_output");
  check_has_outputs(plan, "max");
  check_operand(grad_output, plan, plan.geometry.out, "max_pool_backward", "grad_output");
  check_operand(indices, plan, plan.geometry.out, "max_pool_backward", "indices");
  const bool window = indices.scalar_type() == at::kByte;
  TORCH_CHECK(window ? compact_indices(plan.geometry) == PoolIndices::window : indices.scalar_type() == at::kLong,
              "max_pool_backward: indices must be int64, or uint8 for windows of up to 256 elements, got ",
              indices.scalar_type());
  TORCH_CHECK(is_on(indices, grad_output.device()), "max_pool_backward: indices must be on grad_output's device ",
              grad_output.device(), ", got ", indices.device());
  if (grad_output.is_cpu() && plan.layout == Layout::channels_last && overlaps_widely(plan.geometry)) {
    PoolPlan detour = plan;
    detour.layout = Layout::channels_first;
    return in_layout(max_pool_backward(grad_output, indices, detour), plan.layout);
  }
  const Tensor g = in_layout(grad_output, plan.layout), i = in_layout(indices, plan.layout);
  Tensor grad_input = empty_pool(sizes_of(plan, plan.geometry.in), plan.layout, g.scalar_type(), g.device());
  if (is_empty(plan, plan.geometry.in)) return grad_input;
  const PoolIndices kind = window ? PoolIndices::window : PoolIndices::plane;
  run_pool(MaxPoolBackward{to_dtype(g.scalar_type()), plan.layout, plan.geometry, kind},
           {g.const_data_ptr(), i.const_data_ptr(), grad_input.mutable_data_ptr()}, plan, "max", "_backward", g);
  return grad_input;
}

Tensor max_pool_positions(const Tensor& indices, const PoolPlan& plan) {
  if (indices.scalar_type() == at::kLong) return indices;
  const PoolGeometry& g = plan.geometry;
  const Tensor tap = indices.to(at::kLong);
  const int64_t height = pool_box(g, 1), width = pool_box(g, 2);
  const Tensor taps[3] = {tap.floor_divide(height * width), tap.floor_divide(width).remainder(height),
                          tap.remainder(width)};
  Tensor position = at::zeros({}, tap.options());
  for (int i = 3 - plan.dims; i < 3; ++i) {
    const Tensor outputs = at::arange(g.out[i], tap.options());
    const Tensor first = g.adaptive ? (outputs * g.in[i]).floor_divide(g.out[i]) : outputs * g.stride[i] - g.padding[i];
    SizeVector<int64_t> shape(static_cast<size_t>(plan.dims), 1);
    shape[static_cast<size_t>(i - 3 + plan.dims)] = g.out[i];
    position = position * g.in[i] + first.reshape(shape) + taps[i] * (g.adaptive ? 1 : g.dilation[i]);
  }
  return position;
}

Tensor differentiable_max_pool_backward(const Tensor& grad_output, const Tensor& indices, const PoolPlan& plan) {
  check_has_outputs(plan, "max");
  const PoolGeometry& geometry = plan.geometry;
  const std::array<int64_t, 2> rows = {geometry.batch * geometry.channels, -1};
  const auto sizes = sizes_of(plan, geometry.in);
  const Tensor zeros = at::zeros(sizes, grad_output.options());
  if (grad_output.numel() == 0) return zeros + grad_output.sum();  // what is differentiated needs a graph
  const Tensor positions = max_pool_positions(indices, plan).reshape(rows);
  return zeros.reshape(rows).scatter_add(-1, positions, grad_output.reshape(rows)).reshape(sizes);
}

MaxPoolOutput max_pool(const Tensor& input, const PoolPlan& plan, bool return_indices) {
  const bool records = is_recorded(input);
  const PoolIndices kind = return_indices ? PoolIndices::plane
                           : records      ? compact_indices(plan.geometry)
                                          : PoolIndices::none;
  MaxPoolOutput out = max_pool_forward(input, plan, kind);
  if (!records) return out;
  const auto node = make_node<MaxPoolOp>({plan, {}}, input);
  torch::autograd::set_history(out.y, node);
  save(node, out.indices);
  return out;
}

Tensor avg_pool_forward(const Tensor& input, const PoolPlan& plan, const AvgDivisor& divisor) {
  check_input(input, "avg_pool", "input");
  const Tensor x = in_layout(input, plan.layout);
  Tensor y = empty_pool(sizes_of(plan, plan.geometry.out), plan.layout, x.scalar_type(), x.device());
  if (is_empty(plan, plan.geometry.out)) return y;
  run_pool(AvgPoolForward{to_dtype(x.scalar_type()), plan.layout, plan.geometry, divisor.include_pad, divisor.override},
           {x.const_data_ptr(), y.mutable_data_ptr()}, plan, "avg", "", x);
  return y;
}

Tensor avg_pool_backward(const Tensor& grad_output, const PoolPlan& plan, const AvgDivisor& divisor) {
  check_input(grad_output, "avg_pool_backward", "grad_output");
  check_has_outputs(plan, "avg");
  check_operand(grad_output, plan, plan.geometry.out, "avg_pool_backward", "grad_output");
  const Tensor g = in_layout(grad_output, plan.layout);
  Tensor grad_input = empty_pool(sizes_of(plan, plan.geometry.in), plan.layout, g.scalar_type(), g.device());
  if (is_empty(plan, plan.geometry.in)) return grad_input;
  run_pool(
      AvgPoolBackward{to_dtype(g.scalar_type()), plan.layout, plan.geometry, divisor.include_pad, divisor.override},
      {g.const_data_ptr(), grad_input.mutable_data_ptr()}, plan, "avg", "_backward", g);
  return grad_input;
}

Tensor avg_pool(const Tensor& input, const PoolPlan& plan, const AvgDivisor& divisor) {
  const Tensor y = avg_pool_forward(input, plan, divisor);
  if (!is_recorded(input)) return y;
  const auto node = make_node<AvgPoolOp>({plan, divisor}, input);
  torch::autograd::set_history(y, node);
  return y;
}

namespace {

Tensor differentiable_avg_pool_backward(const Tensor& grad_output, const PoolArgs& args) {
  if (!fast_door::is_plain(grad_output))
    return TorchAvgPool(args).backward(grad_output, sizes_of(args.plan, args.plan.geometry.in));
  const Tensor grad_input = avg_pool_backward(grad_output, args.plan, args.divisor);
  if (!is_recorded(grad_output)) return grad_input;
  const auto node = make_node<AvgPoolBackwardOp>(args, grad_output);
  torch::autograd::set_history(grad_input, node);
  return grad_input;
}

variable_list AvgPoolBackwardOp::gradients(const Args& args, at::TensorList, const variable_list& grads, Needs needs) {
  if (!grads[0].defined() || !needs(0)) return {Tensor()};
  if (!fast_door::is_plain(grads[0])) return {TorchAvgPool(args).forward(grads[0])};
  return {avg_pool(grads[0], args.plan, args.divisor)};
}

// ---- the general door

PoolParams pool_params(int dims, bool adaptive) {
  return {dims, adaptive, false, false, {1, 1, 1}, {1, 1, 1}, {}, {1, 1, 1}, {1, 1, 1}};
}

// Of windows, or, where they are zeros or there are none, of an adaptive pool in `dims` dimensions. (AOTInductor's
// packages cannot pass an empty list: it arrives as None.)
PoolParams make_params(size_t dims, at::IntArrayRef kernel, at::IntArrayRef stride, at::IntArrayRef padding,
                       at::IntArrayRef dilation, bool ceil_mode, bool average) {
  const bool adaptive = kernel.empty() || kernel[0] == 0;
  if (!adaptive) dims = kernel.size();
  TORCH_CHECK(dims >= 1 && dims <= 3 &&
                  (adaptive ||
                   (stride.size() == dims && padding.size() == dims && (dilation.empty() || dilation.size() == dims))),
              "pool: output_size or kernel_size, stride, padding and dilation must have as many elements, 1 to 3, got ",
              kernel, ", ", stride, ", ", padding, " and ", dilation);
  PoolParams params = pool_params(static_cast<int>(dims), adaptive);
  if (adaptive) return params;
  params.ceil_mode = ceil_mode;
  params.within_input = average && dims == 3;
  const size_t first = 3 - dims;
  std::copy(kernel.begin(), kernel.end(), params.kernel + first);
  std::copy(stride.begin(), stride.end(), params.stride + first);
  std::copy(padding.begin(), padding.end(), params.padding + first);
  std::copy(dilation.begin(), dilation.end(), params.dilation + first);
  return params;
}

// The plan for an input of these sizes. output: the output's spatial sizes, which only an adaptive pool needs.
PoolPlan make_plan(at::IntArrayRef sizes, PoolParams params, at::IntArrayRef output, Layout layout) {
  if (params.adaptive) {
    TORCH_CHECK(output.size() == static_cast<size_t>(params.dims), "pool: output_size must have ", params.dims,
                " elements, got ", output);
    std::copy(output.begin(), output.end(), params.output + 3 - params.dims);
  }
  PoolPlan plan;
  const std::string problem = plan_pool(sizes, params, plan);
  TORCH_CHECK(problem.empty(), "pool: ", problem);
  plan.layout = plan.batched ? layout : Layout::channels_first;
  return plan;
}

// The same for a gradient, or indices, whose sizes are the output's.
PoolPlan plan_of_gradient(const Tensor& grad_output, at::IntArrayRef sizes, const PoolParams& params, bool last) {
  const auto dims = static_cast<size_t>(params.dims);
  const at::IntArrayRef output = grad_output.sizes();
  TORCH_CHECK(output.size() > dims, "pool: expected ", dims + 1, " or ", dims + 2, " dimensions, got shape ", output);
  return make_plan(sizes, params, output.slice(output.size() - dims),
                   last ? Layout::channels_last : Layout::channels_first);
}

SizeVector<c10::SymInt> symbolic_sizes(const Tensor& input, const PoolParams& params, c10::SymIntArrayRef output_size) {
  check_input(input, "pool", "input");
  SizeVector<c10::SymInt> sizes;
  const std::string problem = infer_pool<c10::SymInt>(input.sym_sizes(), params, output_size, sizes);
  TORCH_CHECK(problem.empty(), "pool: ", problem);
  return sizes;
}

Tensor symbolic_gradient(const Tensor& grad_output, c10::SymIntArrayRef input_size, int dims, bool last) {
  check_input(grad_output, "pool", "grad_output");
  last = last && input_size.size() == static_cast<size_t>(dims) + 2;
  return empty_pool<c10::SymInt>(input_size, last ? Layout::channels_last : Layout::channels_first,
                                 grad_output.scalar_type(), grad_output.device());
}

PoolIndices indices_kind(c10::string_view name, PoolIndices compact) {
  TORCH_CHECK(name == "none" || name == "compact" || name == "plane",
              "max_pool: indices must be 'none', 'compact' or 'plane', got '", name, "'");
  return name == "none" ? PoolIndices::none : name == "compact" ? compact : PoolIndices::plane;
}

template <class Int>
std::tuple<Tensor, Tensor> max_pool_forward_op(const Tensor& input, Sizes<Int> output_size, at::IntArrayRef kernel,
                                               at::IntArrayRef stride, at::IntArrayRef padding,
                                               at::IntArrayRef dilation, bool ceil_mode, c10::string_view indices) {
  const PoolParams params = make_params(output_size.size(), kernel, stride, padding, dilation, ceil_mode, false);
  MaxPoolOutput out;
  if constexpr (is_symbolic<Int>) {
    const auto sizes = symbolic_sizes(input, params, output_size);
    const Layout layout = pool_layout(input, params.dims);
    const PoolIndices kind = indices_kind(indices, compact_indices(params.adaptive, params.dims, params.kernel + 3,
                                                                   input.sym_sizes().end(), sizes.end()));
    out.y = empty_pool<Int>(sizes, layout, input.scalar_type(), input.device());
    if (kind != PoolIndices::none)
      out.indices = empty_pool<Int>(sizes, layout, kind == PoolIndices::plane ? at::kLong : at::kByte, input.device());
  } else {
    const PoolPlan plan = make_plan(input.sizes(), params, output_size, pool_layout(input, params.dims));
    out = max_pool_forward(input, plan, indices_kind(indices, compact_indices(plan.geometry)));
  }
  return {out.y, out.indices.defined() ? out.indices : at::empty({0}, out.y.options().dtype(at::kLong))};
}

template <class Int>
Tensor max_pool_backward_op(const Tensor& grad_output, const Tensor& indices, Sizes<Int> input_size,
                            at::IntArrayRef kernel, at::IntArrayRef stride, at::IntArrayRef padding,
                            at::IntArrayRef dilation, bool ceil_mode, int64_t dims, bool channels_last) {
  const PoolParams params = make_params(static_cast<size_t>(dims), kernel, stride, padding, dilation, ceil_mode, false);
  if constexpr (is_symbolic<Int>)
    return symbolic_gradient(grad_output, input_size, params.dims, channels_last);
  else
    return max_pool_backward(grad_output, indices, plan_of_gradient(grad_output, input_size, params, channels_last));
}

Tensor max_pool_positions_op(const Tensor& indices, at::IntArrayRef input_size, at::IntArrayRef kernel,
                             at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, bool ceil_mode,
                             int64_t dims) {
  TORCH_CHECK(indices.scalar_type() == at::kByte, "max_pool_positions: indices must be uint8, got ",
              indices.scalar_type());
  const PoolParams params = make_params(static_cast<size_t>(dims), kernel, stride, padding, dilation, ceil_mode, false);
  return max_pool_positions(indices, plan_of_gradient(indices, input_size, params, false));
}

template <class Int>
Tensor avg_pool_forward_op(const Tensor& input, Sizes<Int> output_size, at::IntArrayRef kernel, at::IntArrayRef stride,
                           at::IntArrayRef padding, bool ceil_mode, bool count_include_pad, int64_t divisor_override) {
  const PoolParams params = make_params(output_size.size(), kernel, stride, padding, {}, ceil_mode, true);
  if constexpr (is_symbolic<Int>)
    return empty_pool<Int>(symbolic_sizes(input, params, output_size), pool_layout(input, params.dims),
                           input.scalar_type(), input.device());
  else
    return avg_pool_forward(input, make_plan(input.sizes(), params, output_size, pool_layout(input, params.dims)),
                            {count_include_pad, divisor_override});
}

template <class Int>
Tensor avg_pool_backward_op(const Tensor& grad_output, Sizes<Int> input_size, at::IntArrayRef kernel,
                            at::IntArrayRef stride, at::IntArrayRef padding, bool ceil_mode, bool count_include_pad,
                            int64_t divisor_override, int64_t dims, bool channels_last) {
  const PoolParams params = make_params(static_cast<size_t>(dims), kernel, stride, padding, {}, ceil_mode, true);
  if constexpr (is_symbolic<Int>)
    return symbolic_gradient(grad_output, input_size, params.dims, channels_last);
  else
    return avg_pool_backward(grad_output, plan_of_gradient(grad_output, input_size, params, channels_last),
                             {count_include_pad, divisor_override});
}

template <class Int>
void implement_pool(torch::Library& m) {
  m.impl("max_pool_forward", max_pool_forward_op<Int>);
  m.impl("max_pool_backward", max_pool_backward_op<Int>);
  m.impl("avg_pool_forward", avg_pool_forward_op<Int>);
  m.impl("avg_pool_backward", avg_pool_backward_op<Int>);
}

// ---- the fast door

bool read_windows(py::handle kernel, py::handle stride, py::handle padding, py::handle dilation, py::handle ceil_mode,
                  PoolParams& params) {
  const int dims = params.dims;
  if (!read_sizes(kernel.ptr(), dims, params.kernel) || !read_sizes(padding.ptr(), dims, params.padding) ||
      !read_sizes(dilation.ptr(), dims, params.dilation) || !read_bool(ceil_mode.ptr(), params.ceil_mode))
    return false;
  const bool own = stride.is_none() || (PySequence_Check(stride.ptr()) && PySequence_Size(stride.ptr()) == 0);
  return read_sizes(own ? kernel.ptr() : stride.ptr(), dims, params.stride);
}

// A number, or a tuple or list of numbers and None, which stands for the input's size.
bool read_output_size(PyObject* object, PoolParams& params) {
  if (!PyTuple_CheckExact(object) && !PyList_CheckExact(object)) {
    int64_t size = 0;
    if (!read_int(object, size) || size < 0) return false;
    std::fill(params.output + 3 - params.dims, params.output + 3, size);
    return true;
  }
  if (PySequence_Fast_GET_SIZE(object) != params.dims) return false;
  for (int i = 0; i < params.dims; ++i) {
    int64_t& size = params.output[3 - params.dims + i];
    PyObject* const item = PySequence_Fast_GET_ITEM(object, i);
    if (item == Py_None && params.dims > 1)
      size = PoolParams::kSameSize;
    else if (!read_int(item, size) || size < 0)
      return false;
  }
  return true;
}

// call(input, plan) if the call is plain and its geometry good. Autocast computes in float32 what is three-dimensional.
template <class Call>
py::object pool_fast(py::handle input, const PoolParams& params, Call&& call) {
  if (!fast_door::ambient_is_plain() || !fast_door::is_plain(input.ptr())) return not_implemented();
  const Tensor& x = THPVariable_Unpack(input.ptr());
  if (!is_supported(x.scalar_type())) return not_implemented();
  PoolPlan plan;
  if (!plan_pool(x.sizes(), params, plan).empty()) return not_implemented();
  plan.layout = pool_layout(x, params.dims);
  const c10::DeviceType device = x.device().type();
  if (params.dims == 3 && x.is_cpu() && at::autocast::is_autocast_enabled(device))
    return call(at::autocast::cached_cast(at::kFloat, x, device), plan);
  return call(x, plan);
}

py::object max_pool_fast(py::handle input, const PoolParams& params, py::handle return_indices) {
  bool with_indices;
  if (!read_bool(return_indices.ptr(), with_indices)) return not_implemented();
  return pool_fast(input, params, [&](const Tensor& x, const PoolPlan& plan) -> py::object {
    auto [y, indices] = without_gil([&] { return op_name(plan, "max"); },
                                    [&] {
                                      MaxPoolOutput out = max_pool(x, plan, with_indices);
                                      return std::array<Tensor, 2>{std::move(out.y), std::move(out.indices)};
                                    },
                                    x);
    if (!with_indices) return wrap(std::move(y));
    return py::make_tuple(wrap(std::move(y)), wrap(std::move(indices)));
  });
}

template <int dims>
py::object max_pool_fast(py::handle input, py::handle kernel, py::handle stride, py::handle padding,
                         py::handle dilation, py::handle ceil_mode, py::handle return_indices) {
  PoolParams params = pool_params(dims, false);
  if (!read_windows(kernel, stride, padding, dilation, ceil_mode, params)) return not_implemented();
  return max_pool_fast(input, params, return_indices);
}

template <int dims>
py::object adaptive_max_pool_fast(py::handle input, py::handle output_size, py::handle return_indices) {
  PoolParams params = pool_params(dims, true);
  return read_output_size(output_size.ptr(), params) ? max_pool_fast(input, params, return_indices) : not_implemented();
}

template <int dims>
py::object avg_pool_fast(py::handle input, py::handle kernel, py::handle stride, py::handle padding,
                         py::handle ceil_mode, py::handle include_pad, py::handle divisor_override) {
  PoolParams params = pool_params(dims, false);
  AvgDivisor divisor{};
  if (!read_windows(kernel, stride, padding, py::int_(1), ceil_mode, params) ||
      !read_bool(include_pad.ptr(), divisor.include_pad))
    return not_implemented();
  if (!divisor_override.is_none() && (!read_int(divisor_override.ptr(), divisor.override) || divisor.override == 0))
    return not_implemented();
  params.within_input = dims == 3;
  return pool_fast(input, params, [&](const Tensor& x, const PoolPlan& plan) {
    return wrap(without_gil([&] { return op_name(plan, "avg"); }, [&] { return avg_pool(x, plan, divisor); }, x));
  });
}

py::object avg_pool1d_fast(py::handle input, py::handle kernel, py::handle stride, py::handle padding,
                           py::handle ceil_mode, py::handle include_pad) {
  return avg_pool_fast<1>(input, kernel, stride, padding, ceil_mode, include_pad, py::none());
}

template <int dims>
py::object adaptive_avg_pool_fast(py::handle input, py::handle output_size) {
  PoolParams params = pool_params(dims, true);
  if (!read_output_size(output_size.ptr(), params)) return not_implemented();
  return pool_fast(input, params, [&](const Tensor& x, const PoolPlan& plan) {
    return wrap(without_gil([&] { return op_name(plan, "avg"); }, [&] { return avg_pool(x, plan, {false, 0}); }, x));
  });
}

// What of these arguments does not fit, for the choice of the door and for the message of an error; "" where everything
// does, None where they are for PyTorch to read.
optional<std::string> pool_problem(const Tensor& input, int dims, py::handle kernel, py::handle stride,
                                   py::handle padding, py::handle dilation, py::handle ceil_mode, bool average) {
  PoolParams params = pool_params(dims, false);
  if (!read_windows(kernel, stride, padding, dilation, ceil_mode, params)) return std::nullopt;
  params.within_input = average && dims == 3;
  SizeVector<c10::SymInt> output;
  return infer_pool<c10::SymInt>(input.sym_sizes(), params, {}, output);
}

// The same of an adaptive pool.
std::string adaptive_pool_problem(const Tensor& input, int dims, const std::vector<c10::SymInt>& output_size) {
  SizeVector<c10::SymInt> output;
  return infer_pool<c10::SymInt>(input.sym_sizes(), pool_params(dims, true), output_size, output);
}

}  // namespace

void implement_pool(torch::Library& m, bool meta) {
  meta ? implement_pool<c10::SymInt>(m) : implement_pool<int64_t>(m);
}

TORCH_LIBRARY_IMPL(fastops, CompositeImplicitAutograd, m) { m.impl("max_pool_positions", max_pool_positions_op); }

void bind_pool(py::module_& m) {
  fast_def<&max_pool_fast<1>>(m, "max_pool1d");
  fast_def<&max_pool_fast<2>>(m, "max_pool2d");
  fast_def<&max_pool_fast<3>>(m, "max_pool3d");
  fast_def<&adaptive_max_pool_fast<1>>(m, "adaptive_max_pool1d");
  fast_def<&adaptive_max_pool_fast<2>>(m, "adaptive_max_pool2d");
  fast_def<&adaptive_max_pool_fast<3>>(m, "adaptive_max_pool3d");
  fast_def<&avg_pool1d_fast>(m, "avg_pool1d");
  fast_def<&avg_pool_fast<2>>(m, "avg_pool2d");
  fast_def<&avg_pool_fast<3>>(m, "avg_pool3d");
  fast_def<&adaptive_avg_pool_fast<1>>(m, "adaptive_avg_pool1d");
  fast_def<&adaptive_avg_pool_fast<2>>(m, "adaptive_avg_pool2d");
  fast_def<&adaptive_avg_pool_fast<3>>(m, "adaptive_avg_pool3d");
  m.def("pool_problem", &pool_problem);
  m.def("adaptive_pool_problem", &adaptive_pool_problem);
  m.def("pool_is_channels_last",
        [](const Tensor& input, int dims) { return pool_layout(input, dims) == Layout::channels_last; });
}

}  // namespace fastops
