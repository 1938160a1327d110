#include <ATen/ATen.h>

#include "aten.h"
#include "binding.h"
#include "call.h"
#include "node.h"
#include "sizes.h"

namespace fastops {
namespace {

// A layer normalisation besides its tensors.
struct NormArgs {
  int64_t dims;  // the last ones, which are normalised
  double eps;
  bool rms;
};

const char* norm_name(const NormArgs& args) { return args.rms ? "rms_norm" : "layer_norm"; }

// The memory format of a result: PyTorch's rms_norm keeps that of an image, its layer_norm gives contiguous ones.
at::MemoryFormat format_of(const Tensor& input, const NormArgs& args) {
  return args.rms ? input.suggest_memory_format() : at::MemoryFormat::Contiguous;
}

struct NormOutput {
  Tensor y;
  Tensor mean, rstd;  // float32 (float64 for float64), one a row; undefined if not wanted, mean also if rms
};

// input's sizes with 1 for every dimension that is normalised, as torch.native_layer_norm has them.
template <class Int>
SizeVector<Int> statistics_sizes(const Tensor& input, int64_t dims) {
  SizeVector<Int> sizes(sizes_as<Int>(input));
  for (size_t i = sizes.size() - static_cast<size_t>(dims); i < sizes.size(); ++i) sizes[i] = 1;
  return sizes;
}

// Whether a parameter may have this dtype: input's, or float32 where input has 16 bits.
bool fits_input(at::ScalarType type, at::ScalarType input) {
  return type == input || (type == at::kFloat && (input == at::kBFloat16 || input == at::kHalf));
}

at::ScalarType parameter_type(const Tensor& input, const optional<Tensor>& weight) {
  return weight ? weight->scalar_type() : input.scalar_type();
}

// The checks of input and weight; bias may be missing.
template <class Int>
void check_norm(const Tensor& input, const optional<Tensor>& weight, const optional<Tensor>& bias,
                const NormArgs& args) {
  const char* const op = norm_name(args);
  check_input(input, op, "input");
  TORCH_CHECK(1 <= args.dims && args.dims <= input.dim(), op, ": dims must be between 1 and input's ", input.dim(),
              " dimensions, got ", args.dims);
  const auto normalized = sizes_as<Int>(input).slice(static_cast<size_t>(input.dim() - args.dims));
  const auto check = [&](const Tensor& parameter, const char* name) {
    check_tensor(parameter, op, name, input.device());
    TORCH_CHECK(!sizes_differ<Int>(sizes_as<Int>(parameter), normalized), op, ": ", name, " must have shape ",
                normalized, ", got ", sizes_as<Int>(parameter));
  };
  if (weight) check(*weight, "weight");
  if (bias) check(*bias, "bias");
  const auto type = parameter_type(input, weight);
  TORCH_CHECK(fits_input(type, input.scalar_type()), op, ": weight must have input's dtype ", input.scalar_type(),
              " or, where that has 16 bits, float32, got ", type);
  if (bias)
    TORCH_CHECK(bias->scalar_type() == type, op, ": bias must have dtype ", type,
                " as weight, or input without one, got ", bias->scalar_type());
}

// The normalised rows of a tensor, as the kernels read them.
struct NormRows {
  int64_t outer, size, inner, outer_stride;
};

// The one stride with which the dimensions [first, last) can be walked, the last of them the fastest; none where they
// cannot. `only` is for less than two elements.
optional<int64_t> common_stride(const Tensor& tensor, int64_t first, int64_t last, int64_t only) {
  optional<int64_t> innermost;
  int64_t next = 0;
  for (int64_t i = last - 1; i >= first; --i) {
    if (tensor.size(i) == 1) continue;
    if (!innermost)
      innermost = tensor.stride(i);
    else if (tensor.stride(i) != next)
      return {};
    next = tensor.stride(i) * tensor.size(i);
  }
  return innermost.value_or(only);
}

int64_t numel(const Tensor& tensor, int64_t first, int64_t last) {
  int64_t count = 1;
  for (int64_t i = first; i < last; ++i) count *= tensor.size(i);
  return count;
}

// The rows of a tensor over its last `dims` dimensions, if they are contiguous with any stride between them.
optional<NormRows> contiguous_rows(const Tensor& tensor, int64_t dims) {
  const int64_t split = tensor.dim() - dims, size = numel(tensor, split, tensor.dim());
  if (common_stride(tensor, split, tensor.dim(), 1) != 1) return {};
  const auto stride = common_stride(tensor, 0, split, size);
  if (!stride) return {};
  return NormRows{numel(tensor, 0, split), size, 1, *stride};
}

// The same, also for a channels-first image whose channels have been moved to the end: [outer, inner, size] with
// strides (any, 1, inner).
optional<NormRows> rows_of(const Tensor& tensor, int64_t dims) {
  if (const auto rows = contiguous_rows(tensor, dims)) return rows;
  const int64_t last = tensor.dim() - 1, inner = tensor.stride(last);
  if (dims != 1 || inner < 2) return {};
  int64_t split = last, count = 1;  // of the dimensions that are inner
  while (split > 0 && count < inner) count *= tensor.size(--split);
  if (count != inner || common_stride(tensor, split, last, 1) != 1) return {};
  const auto stride = common_stride(tensor, 0, split, 0);
  if (!stride) return {};
  return NormRows{numel(tensor, 0, split), tensor.size(last), inner, *stride};
}

// The tensor, or a copy whose rows the kernels can read.
std::pair<Tensor, NormRows> readable(const Tensor& tensor, int64_t dims) {
  if (const auto rows = rows_of(tensor, dims)) return {tensor, *rows};
  const Tensor copy = tensor.contiguous();
  return {copy, *contiguous_rows(copy, dims)};
}

Tensor contiguous_or_none(const optional<Tensor>& tensor) { return tensor ? tensor->contiguous() : Tensor(); }

NormOutput layer_norm_forward(const Tensor& input, const optional<Tensor>& weight, const optional<Tensor>& bias,
                              const NormArgs& args, bool need_statistics) {
  check_norm<int64_t>(input, weight, bias, args);
  NormOutput out;
  out.y = empty_output(input.sizes(), input.scalar_type(), input.device());
  if (need_statistics) {
    const auto sizes = statistics_sizes<int64_t>(input, args.dims);
    if (!args.rms) out.mean = empty_output(sizes, statistics_type(input), input.device());
    out.rstd = empty_output(sizes, statistics_type(input), input.device());
  }
  if (out.y.numel() == 0) {
    if (out.mean.defined()) out.mean.zero_();
    if (out.rstd.defined()) out.rstd.zero_();
    return out;
  }
  const auto [x, rows] = readable(input, args.dims);
  const Tensor w = contiguous_or_none(weight), b = contiguous_or_none(bias);
  const LayerNormForward call{to_dtype(x.scalar_type()),
                              to_dtype(parameter_type(x, weight)),
                              args.rms,
                              args.eps,
                              rows.outer,
                              rows.size,
                              rows.inner,
                              rows.outer_stride};
  run(call,
      {x.const_data_ptr(), data_or_null(w), data_or_null(b), out.y.mutable_data_ptr(), mutable_or_null(out.mean),
       mutable_or_null(out.rstd)},
      x.device(),
      [&] { return record::Row{norm_name(args), {}, record::shapes_of({input, w, b}), dtype_name(x.scalar_type())}; });
  if (const auto format = format_of(input, args); format != at::MemoryFormat::Contiguous)
    out.y = out.y.contiguous(format);
  return out;
}

// The gradients of input, weight and bias; those that are not wanted are undefined. mean may be undefined if rms.
std::array<Tensor, 3> layer_norm_backward(const Tensor& grad_output, const Tensor& input, const Tensor& mean,
                                          const Tensor& rstd, const optional<Tensor>& weight, const NormArgs& args,
                                          std::array<bool, 3> output_mask) {
  check_norm<int64_t>(input, weight, {}, args);
  const std::string op = c10::str(norm_name(args), "_backward");
  check_tensor(grad_output, op.c_str(), "grad_output", input.device());
  check_dtype(grad_output, input.scalar_type(), op.c_str(), "grad_output");
  TORCH_CHECK(grad_output.sizes() == input.sizes(), op, ": grad_output must have input's shape ", input.sizes(),
              ", got ", grad_output.sizes());
  const auto check_statistics = [&](const Tensor& tensor, const char* name) {
    const auto sizes = statistics_sizes<int64_t>(input, args.dims);
    TORCH_CHECK(tensor.defined() && tensor.sizes() == at::IntArrayRef(sizes) &&
                    tensor.scalar_type() == statistics_type(input) && is_on(tensor, input.device()),
                op, ": ", name, " must have shape ", at::IntArrayRef(sizes), " and dtype ", statistics_type(input),
                ", got ", tensor.sizes(), " and ", tensor.scalar_type());
  };
  if (!args.rms) check_statistics(mean, "mean");
  check_statistics(rstd, "rstd");

  const auto normalized = input.sizes().slice(static_cast<size_t>(input.dim() - args.dims));
  std::array<Tensor, 3> out;
  if (output_mask[0]) out[0] = empty_output(input.sizes(), input.scalar_type(), input.device());
  for (const size_t i : {1, 2})
    if (output_mask[i]) out[i] = empty_output(normalized, parameter_type(input, weight), input.device());
  if (input.numel() == 0) {
    for (const size_t i : {1, 2})
      if (out[i].defined()) out[i].zero_();
    return out;
  }
  const auto [x, rows] = readable(input, args.dims);
  Tensor g = grad_output;
  auto g_rows = contiguous_rows(g, args.dims);
  if (!g_rows) g = g.contiguous(), g_rows = contiguous_rows(g, args.dims);
  const Tensor w = contiguous_or_none(weight), m = args.rms ? Tensor() : mean.contiguous(), r = rstd.contiguous();
  const LayerNormBackward call{to_dtype(x.scalar_type()),
                               to_dtype(parameter_type(x, weight)),
                               args.rms,
                               output_mask[0],
                               output_mask[1],
                               output_mask[2],
                               rows.outer,
                               rows.size,
                               rows.inner,
                               rows.outer_stride,
                               g_rows->outer_stride};
  run(call,
      {g.const_data_ptr(), x.const_data_ptr(), data_or_null(w), data_or_null(m), r.const_data_ptr(),
       mutable_or_null(out[0]), mutable_or_null(out[1]), mutable_or_null(out[2])},
      x.device(), [&] { return record::Row{op, {}, record::shapes_of({g, x, w}), dtype_name(x.scalar_type())}; });
  return out;
}

// The same in torch's own differentiable ops, for a gradient that will be differentiated, or that is batched or dual.
// Nothing is read of the forward pass but its operands.
std::array<Tensor, 3> differentiable_layer_norm_backward(const Tensor& grad_output, const Tensor& input,
                                                         const optional<Tensor>& weight, const NormArgs& args,
                                                         std::array<bool, 3> output_mask) {
  const auto type = statistics_type(input);
  std::vector<int64_t> normalized, others;
  for (int64_t i = 0; i < input.dim(); ++i) (i < input.dim() - args.dims ? others : normalized).push_back(i);
  const auto mean = [&](const Tensor& tensor) { return tensor.mean(normalized, /*keepdim=*/true); };
  const auto over_rows = [&](const Tensor& tensor) {
    return (others.empty() ? tensor : tensor.sum(others)).to(parameter_type(input, weight));
  };
  const Tensor x = input.to(type), g = grad_output.to(type);
  const Tensor centred = args.rms ? x : x - mean(x);
  const Tensor rstd = (mean(centred * centred) + args.eps).rsqrt(), n = centred * rstd;
  std::array<Tensor, 3> out;
  if (output_mask[0]) {
    const Tensor g_n = weight ? g * weight->to(type) : g;
    const Tensor less = args.rms ? g_n : g_n - mean(g_n);
    out[0] = (rstd * (less - n * mean(g_n * n))).to(input.scalar_type());
  }
  if (output_mask[1]) out[1] = over_rows(g * n);
  if (output_mask[2]) out[2] = over_rows(g);
  return out;
}

struct NormOp {
  struct Args : NormArgs {
    bool with_weight;
  };
  static std::string name(const Args& args) { return norm_name(args); }
  static c10::IValue pack(const Args& args) {
    return std::vector<double>{static_cast<double>(args.dims), args.eps, static_cast<double>(args.rms),
                               static_cast<double>(args.with_weight)};
  }
  static Args unpack(const c10::IValue& packed) {
    const auto values = packed.toDoubleVector();
    return {{static_cast<int64_t>(values[0]), values[1], values[2] != 0}, values[3] != 0};
  }
  // saved: input, weight, mean, rstd and, unread, bias.
  static variable_list gradients(const Args& args, at::TensorList saved, const variable_list& grads, Needs needs) {
    if (!grads[0].defined()) return variable_list(3);
    const optional<Tensor> weight = args.with_weight ? optional<Tensor>(saved[1]) : std::nullopt;
    const std::array<bool, 3> mask{needs(0), needs(1), needs(2)};
    const auto out = at::GradMode::is_enabled() || !fast_door::is_plain(grads[0])
                         ? differentiable_layer_norm_backward(grads[0], saved[0], weight, args, mask)
                         : layer_norm_backward(grads[0], saved[0], saved[2], saved[3], weight, args, mask);
    return {out.begin(), out.end()};
  }
};

Tensor layer_norm(const Tensor& input, const optional<Tensor>& weight, const optional<Tensor>& bias,
                  const NormArgs& args) {
  const bool grad_w = weight && needs_grad(*weight), grad_b = bias && needs_grad(*bias);
  const bool records = is_recorded(input.requires_grad() || grad_w || grad_b, input, weight, bias);
  NormOutput out = layer_norm_forward(input, weight, bias, args, records);
  if (!records) return out.y;
  const Tensor &w = weight ? *weight : none, &b = bias ? *bias : none;
  // As in PyTorch, what was made in inference mode cannot be saved: a bias, either, but an rms_norm's weight where only
  // its own gradient is wanted.
  const bool keeps_weight = weight && (!args.rms || input.requires_grad());
  const auto node = make_node<NormOp>({args, keeps_weight}, input, w, b);
  torch::autograd::set_history(out.y, node);
  // What PyTorch's rms_norm keeps of its input is the product of a cast.
  const Tensor kept = args.rms && input.is_inference() ? input.clone() : input;
  save(node, kept, keeps_weight ? w : none, out.mean, out.rstd, b);
  return out.y;
}

// ---- the general door

template <class Int>
std::tuple<Tensor, Tensor, Tensor> layer_norm_forward_op(const Tensor& input, const optional<Tensor>& weight,
                                                         const optional<Tensor>& bias, int64_t dims, double eps,
                                                         bool rms) {
  const NormArgs args{dims, eps, rms};
  NormOutput out;
  if constexpr (is_symbolic<Int>) {
    check_norm<Int>(input, weight, bias, args);
    out.y = at::empty_symint(input.sym_sizes(), input.options(), format_of(input, args));
    const auto sizes = statistics_sizes<Int>(input, dims);
    if (!rms) out.mean = new_tensor<Int>(sizes, statistics_type(input), input.device());
    out.rstd = new_tensor<Int>(sizes, statistics_type(input), input.device());
  } else {
    out = layer_norm_forward(input, weight, bias, args, /*need_statistics=*/true);
  }
  return {out.y, or_empty(out.mean, out.rstd), out.rstd};
}

template <class Int>
std::tuple<Tensor, Tensor, Tensor> layer_norm_backward_op(const Tensor& grad_output, const Tensor& input,
                                                          const Tensor& mean, const Tensor& rstd,
                                                          const optional<Tensor>& weight, int64_t dims, double eps,
                                                          bool rms, std::array<bool, 3> output_mask) {
  const NormArgs args{dims, eps, rms};
  std::array<Tensor, 3> out;
  if constexpr (is_symbolic<Int>) {
    check_norm<Int>(input, weight, {}, args);
    const auto normalized = sizes_as<Int>(input).slice(static_cast<size_t>(input.dim() - dims));
    if (output_mask[0]) out[0] = new_tensor<Int>(sizes_as<Int>(input), input.scalar_type(), input.device());
    for (const size_t i : {1, 2})
      if (output_mask[i]) out[i] = new_tensor<Int>(normalized, parameter_type(input, weight), input.device());
  } else {
    out = layer_norm_backward(grad_output, input, mean, rstd, weight, args, output_mask);
  }
  return or_empty(out, input);
}

template <class Int>
void implement_layer_norm(torch::Library& m) {
  m.impl("layer_norm_forward", layer_norm_forward_op<Int>);
  m.impl("layer_norm_backward", layer_norm_backward_op<Int>);
}

// ---- the fast door

// Whether `shape`, an int or a tuple or list of them, is that of the input's last dimensions; `dims`: how many.
bool read_normalized_shape(PyObject* shape, const Tensor& input, int64_t& dims) {
  if (!PyTuple_Check(shape) && !PyList_CheckExact(shape)) return false;
  dims = PySequence_Fast_GET_SIZE(shape);
  if (dims < 1 || dims > input.dim()) return false;
  for (int64_t i = 0; i < dims; ++i) {
    int64_t size = 0;
    if (!read_int(PySequence_Fast_GET_ITEM(shape, i), size) || size != input.size(input.dim() - dims + i)) return false;
  }
  return true;
}

// layer_norm and rms_norm are on autocast's float32 list on a GPU, and on no list on the CPU.
py::object norm_fast(py::handle input, py::handle shape, py::handle weight, py::handle bias, double eps, bool rms) {
  const bool has_weight = !weight.is_none(), has_bias = !bias.is_none();
  if (!fast_door::ambient_is_plain() || !fast_door::is_plain(input.ptr()) ||
      (has_weight && !fast_door::is_plain(weight.ptr())) || (has_bias && !fast_door::is_plain(bias.ptr())))
    return not_implemented();
  Tensor x = THPVariable_Unpack(input.ptr());
  NormArgs args{0, eps, rms};
  if (!is_supported(x.scalar_type()) || !read_normalized_shape(shape.ptr(), x, args.dims)) return not_implemented();
  optional<Tensor> w = has_weight ? optional<Tensor>(THPVariable_Unpack(weight.ptr())) : std::nullopt;
  optional<Tensor> b = has_bias ? optional<Tensor>(THPVariable_Unpack(bias.ptr())) : std::nullopt;
  const c10::DeviceType device = x.device().type();
  if (!x.is_cpu() && at::autocast::is_autocast_enabled(device)) {
    x = at::autocast::cached_cast(at::kFloat, x, device);
    w = at::autocast::cached_cast(at::kFloat, w, device);
    b = at::autocast::cached_cast(at::kFloat, b, device);
  }
  const auto type = parameter_type(x, w);
  // PyTorch's rms_norm gives a result of the weight's dtype.
  if (rms ? type != x.scalar_type() : !fits_input(type, x.scalar_type())) return not_implemented();
  const auto normalized = x.sizes().slice(static_cast<size_t>(x.dim() - args.dims));
  for (const auto& parameter : {w, b})
    if (parameter &&
        (!is_on(*parameter, x.device()) || parameter->scalar_type() != type || parameter->sizes() != normalized))
      return not_implemented();
  return wrap(
      without_gil([&] { return norm_name(args); }, [&] { return fastops::layer_norm(x, w, b, args); }, x, w, b));
}

py::object layer_norm_fast(py::handle input, py::handle shape, py::handle weight, py::handle bias, double eps) {
  return norm_fast(input, shape, weight, bias, eps, /*rms=*/false);
}

py::object rms_norm_fast(py::handle input, py::handle shape, py::handle weight, double eps) {
  return norm_fast(input, shape, weight, py::none(), eps, /*rms=*/true);
}

}  // namespace

std::array<Tensor, 3> layer_norm_with_statistics(const Tensor& input, const optional<Tensor>& weight,
                                                 const optional<Tensor>& bias, int64_t dims, double eps) {
  NormOutput out = layer_norm_forward(input, weight, bias, {dims, eps, /*rms=*/false}, /*need_statistics=*/true);
  return {std::move(out.y), std::move(out.mean), std::move(out.rstd)};
}

Tensor rms_norm_recorded(const Tensor& input, const optional<Tensor>& weight, int64_t dims, double eps) {
  return layer_norm(input, weight, std::nullopt, {dims, eps, /*rms=*/true});
}

std::array<Tensor, 3> layer_norm_gradients(const Tensor& grad_output, const Tensor& input, const Tensor& mean,
                                           const Tensor& rstd, const optional<Tensor>& weight, int64_t dims,
                                           std::array<bool, 3> output_mask) {
  return layer_norm_backward(grad_output, input, mean, rstd, weight, {dims, /*eps=*/0, /*rms=*/false}, output_mask);
}

void implement_layer_norm(torch::Library& m, bool meta) {
  meta ? implement_layer_norm<c10::SymInt>(m) : implement_layer_norm<int64_t>(m);
}

void bind_layer_norm(py::module_& m) {
  fast_def<&layer_norm_fast>(m, "layer_norm");
  fast_def<&rms_norm_fast>(m, "rms_norm");
}

}  // namespace fastops
