// Everything that Python sees, in one page: the schemas of torch.ops.fastops and the module fastops._C.
#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/MemoryOverlap.h>
#include <ATen/autocast_mode.h>
#include <torch/library.h>
#include <torch/python.h>

#include "../kernels/common/cpu/isa.h"
#include "check.h"
#include "fast_door.h"
#include "gpu.h"
#include "memory.h"
#include "ops.h"
#include "record.h"

namespace fastops {
namespace {

namespace py = pybind11;

// ---- the general door: torch.ops.fastops.*, without autograd. Outputs that do not exist are tensors of 0 elements.

Activation make_activation(c10::string_view name, double a, double b) {
  return {activation_kind({name.data(), name.size()}), a, b};
}

Tensor or_empty(Tensor tensor, at::ScalarType type, at::Device device = at::kCPU) {
  return tensor.defined() ? tensor : empty_output({0}, type, device);
}

std::tuple<Tensor, Tensor> linear_forward_op(const Tensor& input, const Tensor& weight, const optional<Tensor>& bias,
                                             c10::string_view activation, double a, double b, bool need_saved) {
  auto [y, z] = linear_forward(input, weight, bias, make_activation(activation, a, b), need_saved);
  return {y, or_empty(z, y.scalar_type(), y.device())};
}

std::tuple<Tensor, Tensor, Tensor> linear_backward_op(const Tensor& grad_output, const optional<Tensor>& saved,
                                                      const Tensor& input, const Tensor& weight,
                                                      c10::string_view activation, double a, double b,
                                                      std::array<bool, 3> output_mask) {
  auto [x, w, bias] = linear_backward(grad_output, saved.value_or(Tensor()), input, weight,
                                      make_activation(activation, a, b), output_mask, input.sizes(), weight.size(1));
  const auto type = grad_output.scalar_type();
  const auto device = grad_output.device();
  return {or_empty(x, type, device), or_empty(w, type, device), or_empty(bias, type, device)};
}

// padding: what lies before each dimension, then what lies after each.
ConvPlan make_plan(const Tensor& input, const Tensor& weight, const optional<Tensor>& bias, at::IntArrayRef stride,
                   at::IntArrayRef padding, at::IntArrayRef dilation, bool transposed, int64_t groups) {
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
  ConvPlan plan;
  const std::string problem = plan_conv(input, weight, bias.value_or(Tensor()), params, plan);
  TORCH_CHECK(problem.empty(), "conv: ", problem);
  return plan;
}

std::tuple<Tensor, Tensor> conv_forward_op(const Tensor& input, const Tensor& weight, const optional<Tensor>& bias,
                                           at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                                           bool transposed, int64_t groups, c10::string_view activation, double a,
                                           double b, bool need_saved) {
  const ConvPlan plan = make_plan(input, weight, bias, stride, padding, dilation, transposed, groups);
  auto [y, z] = conv_forward(input, weight, bias, plan, make_activation(activation, a, b), need_saved);
  return {y, or_empty(z, y.scalar_type(), y.device())};
}

std::tuple<Tensor, Tensor, Tensor> conv_backward_op(const Tensor& grad_output, const optional<Tensor>& saved,
                                                    const Tensor& input, const Tensor& weight, at::IntArrayRef stride,
                                                    at::IntArrayRef padding, at::IntArrayRef dilation, bool transposed,
                                                    int64_t groups, c10::string_view activation, double a, double b,
                                                    std::array<bool, 3> output_mask) {
  const ConvPlan plan = make_plan(input, weight, {}, stride, padding, dilation, transposed, groups);
  auto [x, w, bias] = conv_backward(grad_output, saved.value_or(Tensor()), input, weight, plan,
                                    make_activation(activation, a, b), output_mask);
  const auto type = grad_output.scalar_type();
  const auto device = grad_output.device();
  return {or_empty(x, type, device), or_empty(w, type, device), or_empty(bias, type, device)};
}

// The result in the strides that at::empty_like gives this tensor, as the fake kernels promise.
Tensor like(const Tensor& tensor, const Tensor& result) {
  if (tensor.strides() == result.strides()) return result;
  const Tensor ordered = at::empty_like(tensor);
  return ordered.strides() == result.strides() ? result : ordered.copy_(result);
}

// A mask that crosses this door is in the logical order of its elements, whatever the strides: a compiler may change
// those.
std::tuple<Tensor, Tensor> activation_forward_op(const Tensor& input, c10::string_view activation, double a, double b,
                                                 bool need_mask) {
  const Activation f = make_activation(activation, a, b);
  if (!need_mask || saved_by_default(f) != Saved::mask)
    return {like(input, activation_forward(input, f, false).y), or_empty({}, at::kByte, input.device())};
  const auto [y, mask] = activation_forward(input.contiguous(), f, true);
  return {like(input, y), mask};
}

Tensor activation_backward_op(const Tensor& grad_output, const Tensor& saved, c10::string_view activation, double a,
                              double b, c10::string_view kind) {
  return like(grad_output, activation_backward(grad_output, saved, make_activation(activation, a, b),
                                               saved_kind({kind.data(), kind.size()})));
}

Tensor activation_second_derivative_op(const Tensor& saved, c10::string_view activation, double a, double b,
                                       c10::string_view kind) {
  return activation_second_derivative(saved, make_activation(activation, a, b), saved_kind({kind.data(), kind.size()}));
}

Tensor prelu_forward_op(const Tensor& input, const Tensor& weight) { return like(input, prelu_forward(input, weight)); }

std::tuple<Tensor, Tensor> prelu_backward_op(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                                             std::array<bool, 2> output_mask) {
  auto [x, w] = prelu_backward(grad_output, input, weight, output_mask);
  return {x.defined() ? like(input, x) : or_empty(x, input.scalar_type(), input.device()),
          or_empty(w, input.scalar_type(), input.device())};
}

// output: the output's spatial sizes; kernel, stride, padding and dilation are empty for an adaptive pool. sizes: the
// input's.
PoolPlan make_pool_plan(at::IntArrayRef sizes, at::IntArrayRef output, at::IntArrayRef kernel, at::IntArrayRef stride,
                        at::IntArrayRef padding, at::IntArrayRef dilation, Layout layout) {
  const size_t dims = output.size();
  const bool adaptive = kernel.empty();
  TORCH_CHECK(dims >= 1 && dims <= 3 &&
                  (adaptive || (kernel.size() == dims && stride.size() == dims && padding.size() == dims &&
                                dilation.size() == dims)),
              "pool: output_size, kernel_size, stride, padding and dilation must have as many elements, 1 to 3, got ",
              output, ", ", kernel, ", ", stride, ", ", padding, " and ", dilation);
  PoolParams params{static_cast<int>(dims), adaptive, false, {1, 1, 1}, {1, 1, 1}, {}, {1, 1, 1}, {1, 1, 1}};
  const size_t first = 3 - dims;
  if (!adaptive) {
    std::copy(kernel.begin(), kernel.end(), params.kernel + first);
    std::copy(stride.begin(), stride.end(), params.stride + first);
    std::copy(padding.begin(), padding.end(), params.padding + first);
    std::copy(dilation.begin(), dilation.end(), params.dilation + first);
  }
  std::copy(output.begin(), output.end(), params.output + first);
  PoolPlan plan;
  std::string problem = plan_pool(sizes, params, plan);
  const auto fits = [&] { return std::equal(output.begin(), output.end(), plan.geometry.out + first); };
  if (!problem.empty() || !fits()) {
    params.ceil_mode = true;
    problem = plan_pool(sizes, params, plan);
  }
  TORCH_CHECK(problem.empty(), "pool: ", problem);
  TORCH_CHECK(fits(), "pool: output_size ", output, " does not follow from input sizes ", sizes);
  plan.layout = plan.batched ? layout : Layout::channels_first;
  return plan;
}

at::IntArrayRef spatial_sizes(const Tensor& tensor, int64_t dims) {
  TORCH_CHECK(tensor.dim() == dims + 1 || tensor.dim() == dims + 2, "pool: expected ", dims + 1, " or ", dims + 2,
              " dimensions, got shape ", tensor.sizes());
  return tensor.sizes().slice(static_cast<size_t>(tensor.dim() - dims));
}

std::tuple<Tensor, Tensor> max_pool_forward_op(const Tensor& input, at::IntArrayRef output_size, at::IntArrayRef kernel,
                                               at::IntArrayRef stride, at::IntArrayRef padding,
                                               at::IntArrayRef dilation, c10::string_view indices) {
  const PoolPlan plan = make_pool_plan(input.sizes(), output_size, kernel, stride, padding, dilation,
                                       pool_layout(input, static_cast<int>(output_size.size())));
  TORCH_CHECK(indices == "none" || indices == "compact" || indices == "plane",
              "max_pool: indices must be 'none', 'compact' or 'plane', got '", indices, "'");
  auto [y, positions] = max_pool_forward(input, plan,
                                         indices == "none"    ? PoolIndices::none
                                         : indices == "plane" ? PoolIndices::plane
                                                              : compact_indices(plan.geometry));
  return {y, or_empty(positions, at::kLong, y.device())};
}

Tensor max_pool_backward_op(const Tensor& grad_output, const Tensor& indices, at::IntArrayRef input_size,
                            at::IntArrayRef kernel, at::IntArrayRef stride, at::IntArrayRef padding,
                            at::IntArrayRef dilation, int64_t dims, bool channels_last) {
  return max_pool_backward(grad_output, indices,
                           make_pool_plan(input_size, spatial_sizes(grad_output, dims), kernel, stride, padding,
                                          dilation, channels_last ? Layout::channels_last : Layout::channels_first));
}

Tensor max_pool_positions_op(const Tensor& indices, at::IntArrayRef input_size, at::IntArrayRef kernel,
                             at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t dims) {
  TORCH_CHECK(indices.scalar_type() == at::kByte, "max_pool_positions: indices must be uint8, got ",
              indices.scalar_type());
  return max_pool_positions(indices, make_pool_plan(input_size, spatial_sizes(indices, dims), kernel, stride, padding,
                                                    dilation, Layout::channels_first));
}

Tensor avg_pool_forward_op(const Tensor& input, at::IntArrayRef output_size, at::IntArrayRef kernel,
                           at::IntArrayRef stride, at::IntArrayRef padding, bool count_include_pad,
                           int64_t divisor_override) {
  const std::vector<int64_t> dilation(kernel.size(), 1);
  const PoolPlan plan = make_pool_plan(input.sizes(), output_size, kernel, stride, padding, dilation,
                                       pool_layout(input, static_cast<int>(output_size.size())));
  return avg_pool_forward(input, plan, {count_include_pad, divisor_override});
}

Tensor avg_pool_backward_op(const Tensor& grad_output, at::IntArrayRef input_size, at::IntArrayRef kernel,
                            at::IntArrayRef stride, at::IntArrayRef padding, bool count_include_pad,
                            int64_t divisor_override, int64_t dims, bool channels_last) {
  const std::vector<int64_t> dilation(kernel.size(), 1);
  return avg_pool_backward(grad_output,
                           make_pool_plan(input_size, spatial_sizes(grad_output, dims), kernel, stride, padding,
                                          dilation, channels_last ? Layout::channels_last : Layout::channels_first),
                           {count_include_pad, divisor_override});
}

TORCH_LIBRARY(fastops, m) {
  m.def(
      "linear_forward(Tensor input, Tensor weight, Tensor? bias, str activation, float a, float b, bool need_saved) -> "
      "(Tensor output, Tensor pre_activation)");
  m.def(
      "linear_backward(Tensor grad_output, Tensor? saved, Tensor input, Tensor weight, str activation, float a, float "
      "b, "
      "bool[3] output_mask) -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)");
  m.def(
      "conv_forward(Tensor input, Tensor weight, Tensor? bias, int[] stride, int[] padding, int[] dilation, "
      "bool transposed, int groups, str activation, float a, float b, bool need_saved) -> "
      "(Tensor output, Tensor pre_activation)");
  m.def(
      "conv_backward(Tensor grad_output, Tensor? saved, Tensor input, Tensor weight, int[] stride, int[] padding, "
      "int[] dilation, bool transposed, int groups, str activation, float a, float b, bool[3] output_mask) -> "
      "(Tensor grad_input, Tensor grad_weight, Tensor grad_bias)");
  m.def(
      "activation_forward(Tensor input, str activation, float a, float b, bool need_mask) -> (Tensor output, Tensor "
      "mask)");
  m.def(
      "activation_backward(Tensor grad_output, Tensor saved, str activation, float a, float b, str saved_kind) -> "
      "Tensor");
  m.def("activation_second_derivative(Tensor saved, str activation, float a, float b, str saved_kind) -> Tensor",
        activation_second_derivative_op);
  m.def("prelu_forward(Tensor input, Tensor weight) -> Tensor");
  m.def(
      "prelu_backward(Tensor grad_output, Tensor input, Tensor weight, bool[2] output_mask) -> "
      "(Tensor grad_input, Tensor grad_weight)");
  m.def("glu_forward(Tensor input, int dim) -> Tensor");
  m.def("glu_backward(Tensor grad_output, Tensor input, int dim) -> Tensor");
  m.def(
      "max_pool_forward(Tensor input, SymInt[] output_size, int[] kernel_size, int[] stride, int[] padding, "
      "int[] dilation, str indices) -> (Tensor output, Tensor indices)");
  m.def(
      "max_pool_backward(Tensor grad_output, Tensor indices, SymInt[] input_size, int[] kernel_size, int[] stride, "
      "int[] padding, int[] dilation, int dims, bool channels_last) -> Tensor");
  m.def(
      "max_pool_positions(Tensor indices, int[] input_size, int[] kernel_size, int[] stride, int[] padding, "
      "int[] dilation, int dims) -> Tensor",
      max_pool_positions_op);
  m.def(
      "avg_pool_forward(Tensor input, SymInt[] output_size, int[] kernel_size, int[] stride, int[] padding, "
      "bool count_include_pad, int divisor_override) -> Tensor");
  m.def(
      "avg_pool_backward(Tensor grad_output, SymInt[] input_size, int[] kernel_size, int[] stride, int[] padding, "
      "bool count_include_pad, int divisor_override, int dims, bool channels_last) -> Tensor");
}

// All but composites of torch's own ops have CUDA kernels as well.
void implement_on_every_device(torch::Library& m) {
  m.impl("linear_forward", linear_forward_op);
  m.impl("linear_backward", linear_backward_op);
  m.impl("conv_forward", conv_forward_op);
  m.impl("conv_backward", conv_backward_op);
  m.impl("activation_forward", activation_forward_op);
  m.impl("activation_backward", activation_backward_op);
  m.impl("prelu_forward", prelu_forward_op);
  m.impl("prelu_backward", prelu_backward_op);
  m.impl("glu_forward", glu_forward);
  m.impl("glu_backward", glu_backward);
  m.impl("max_pool_forward", max_pool_forward_op);
  m.impl("max_pool_backward", max_pool_backward_op);
  m.impl("avg_pool_forward", avg_pool_forward_op);
  m.impl("avg_pool_backward", avg_pool_backward_op);
}

TORCH_LIBRARY_IMPL(fastops, CUDA, m) { implement_on_every_device(m); }

TORCH_LIBRARY_IMPL(fastops, CPU, m) { implement_on_every_device(m); }

// ---- the fast door: _C.<op> returns NotImplemented for every call that is not plain; Python then takes the general
// door or explains what is wrong. Kernels run without the interpreter's lock, as PyTorch's own do.

py::object not_implemented() { return py::reinterpret_borrow<py::object>(Py_NotImplemented); }

py::object wrap(Tensor tensor) { return py::reinterpret_steal<py::object>(THPVariable_Wrap(std::move(tensor))); }

// What the call returns; op() and the inputs are what an observer sees of it.
template <class Op, class Call, class... Inputs>
auto without_gil(Op&& op, Call&& call, const Inputs&... inputs) {
  const py::gil_scoped_release release;
  return record::observed(op, call, inputs...);
}

Activation make_activation(int kind, double a, double b) { return {static_cast<ActivationKind>(kind), a, b}; }

// call(input, weight, bias) for the operands of a layer, as autocast's lower-precision list casts them, if they are
// plain and of one dtype that has kernels.
template <class Call>
py::object layer_fast(py::handle input, py::handle weight, py::handle bias, Call&& call) {
  const bool has_bias = !bias.is_none();
  if (!fast_door::ambient_is_plain() || !fast_door::is_plain(input.ptr()) || !fast_door::is_plain(weight.ptr()) ||
      (has_bias && !fast_door::is_plain(bias.ptr())))
    return not_implemented();
  const auto checked = [&](const Tensor& x, const Tensor& w, const optional<Tensor>& b) {
    const auto type = x.scalar_type();
    if (!is_supported(type) || w.scalar_type() != type || (b && b->scalar_type() != type)) return not_implemented();
    if (!is_on(w, x.device()) || (b && !is_on(*b, x.device()))) return not_implemented();
    return call(x, w, b);
  };
  const Tensor &x = THPVariable_Unpack(input.ptr()), &w = THPVariable_Unpack(weight.ptr());
  const optional<Tensor> b = has_bias ? optional<Tensor>(THPVariable_Unpack(bias.ptr())) : std::nullopt;
  const c10::DeviceType device = x.device().type();
  if (!at::autocast::is_autocast_enabled(device)) return checked(x, w, b);
  const auto type = at::autocast::get_autocast_dtype(device);
  return checked(at::autocast::cached_cast(type, x, device), at::autocast::cached_cast(type, w, device),
                 at::autocast::cached_cast(type, b, device));
}

py::object linear_fast(py::handle input, py::handle weight, py::handle bias, int kind, double a, double b) {
  const Activation activation = make_activation(kind, a, b);
  return layer_fast(input, weight, bias, [&](const Tensor& x, const Tensor& w, const optional<Tensor>& bias_tensor) {
    if (!linear_accepts(x, w, bias_tensor)) return not_implemented();
    return wrap(without_gil([] { return "linear"; }, [&] { return fastops::linear(x, w, bias_tensor, activation); }, x,
                            w, bias_tensor));
  });
}

// The tensors of a tuple or list into `tensors`, None as an undefined one; false where one is not plain.
bool read_tensors(PyObject* object, std::vector<Tensor>& tensors) {
  if (!PyTuple_CheckExact(object) && !PyList_CheckExact(object)) return false;
  for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(object); ++i) {
    PyObject* const item = PySequence_Fast_GET_ITEM(object, i);
    if (item != Py_None && !fast_door::is_plain(item)) return false;
    tensors.push_back(item == Py_None ? Tensor() : THPVariable_Unpack(item));
  }
  return true;
}

// Fused on a GPU alone: elsewhere Python calls linear for every layer.
py::object mlp_fast(py::handle input, py::handle weights, py::handle biases, int kind, double a, double b,
                    int output_kind, double output_a, double output_b) {
  if (!fast_door::ambient_is_plain() || !fast_door::is_plain(input.ptr())) return not_implemented();
  Tensor x = THPVariable_Unpack(input.ptr());
  std::vector<Tensor> w, bs;
  if (x.is_cpu() || !read_tensors(weights.ptr(), w) || !read_tensors(biases.ptr(), bs)) return not_implemented();
  const c10::DeviceType device = x.device().type();
  if (at::autocast::is_autocast_enabled(device)) {
    const auto type = at::autocast::get_autocast_dtype(device);
    x = at::autocast::cached_cast(type, x, device);
    for (std::vector<Tensor>* const list : {&w, &bs})
      for (Tensor& tensor : *list)
        if (tensor.defined()) tensor = at::autocast::cached_cast(type, tensor, device);
  }
  const auto fits = [&](const Tensor& tensor) {
    return tensor.scalar_type() == x.scalar_type() && is_on(tensor, x.device());
  };
  if (!is_supported(x.scalar_type()) ||
      !std::all_of(w.begin(), w.end(), [&](const Tensor& tensor) { return tensor.defined() && fits(tensor); }))
    return not_implemented();
  if (!std::all_of(bs.begin(), bs.end(), [&](const Tensor& tensor) { return !tensor.defined() || fits(tensor); }) ||
      !mlp_accepts(x, w, bs))
    return not_implemented();
  const Activation hidden = make_activation(kind, a, b);
  const Activation output = make_activation(output_kind, output_a, output_b);
  return wrap(without_gil([] { return "mlp"; }, [&] { return mlp(x, w, bs, hidden, output); }, x, at::TensorList(w),
                          at::TensorList(bs)));
}

// An int, as a Python object that is exactly one.
bool read_int(PyObject* object, int64_t& value) {
  if (!PyLong_CheckExact(object)) return false;
  int overflow = 0;
  value = PyLong_AsLongLongAndOverflow(object, &overflow);
  return overflow == 0;
}

// An int for all dimensions, or a tuple or list of one or `dims` of them, into the last `dims` of three.
bool read_sizes(PyObject* object, int dims, int64_t (&values)[3]) {
  int64_t* const first = values + 3 - dims;
  const bool several = PyTuple_CheckExact(object) || PyList_CheckExact(object);
  if (several && PySequence_Fast_GET_SIZE(object) == dims) {
    for (int i = 0; i < dims; ++i)
      if (!read_int(PySequence_Fast_GET_ITEM(object, i), first[i])) return false;
    return true;
  }
  if (several && PySequence_Fast_GET_SIZE(object) == 1) object = PySequence_Fast_GET_ITEM(object, 0);
  if (!read_int(object, *first)) return false;
  std::fill(first, values + 3, *first);
  return true;
}

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

struct ConvArguments {
  int dims;
  bool transposed;
  py::handle stride, padding, dilation, output_padding, groups;
};

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

// call(input with a batch, weight, bias, plan) if the call is plain and its geometry good. It may refuse, too.
template <class Call>
py::object conv_call(const ConvArguments& arguments, py::handle input, py::handle weight, py::handle bias,
                     Call&& call) {
  return layer_fast(input, weight, bias, [&](const Tensor& x, const Tensor& w, const optional<Tensor>& bias_tensor) {
    ConvParams params{arguments.dims, arguments.transposed, 1, {1, 1, 1}, {}, {}, {1, 1, 1}};
    if (!read_params(arguments, w, params)) return not_implemented();
    const bool batched = x.dim() != params.dims + 1;
    const Tensor batch = batched ? x : x.unsqueeze(0);
    ConvPlan plan;
    if (!plan_conv(batch, w, bias_tensor.value_or(Tensor()), params, plan).empty()) return not_implemented();
    if (!x.is_cpu() && !fits_int(plan.geometry)) return not_implemented();
    return call(batch, w, bias_tensor, plan, [&](const Tensor& y) { return batched ? y : y.squeeze(0); });
  });
}

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

template <int dims>
py::object conv_transpose_fast(py::handle input, py::handle weight, py::handle bias, py::handle stride,
                               py::handle padding, py::handle output_padding, py::handle groups, py::handle dilation,
                               int kind, double a, double b) {
  return conv_fast({dims, true, stride, padding, dilation, output_padding, groups}, input, weight, bias, kind, a, b);
}

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

// What of these arguments does not fit, for the message of an error; "" where everything does.
std::string conv_problem(const Tensor& input, const Tensor& weight, const optional<Tensor>& bias, py::handle stride,
                         py::handle padding, py::handle dilation, py::handle groups, py::handle output_padding,
                         int dims, bool transposed) {
  ConvParams params{dims, transposed, 1, {1, 1, 1}, {}, {}, {1, 1, 1}};
  if (!read_params({dims, transposed, stride, padding, dilation, output_padding, groups}, weight, params)) return {};
  ConvPlan plan;
  return plan_conv(input.dim() == dims + 1 ? input.unsqueeze(0) : input, weight, bias.value_or(Tensor()), params, plan);
}

py::object activation_fast(py::handle input, int kind, double a, double b, py::handle is_inplace) {
  if (!fast_door::ambient_is_plain() || !fast_door::is_plain(input.ptr())) return not_implemented();
  const Tensor& x = THPVariable_Unpack(input.ptr());
  if (!is_supported(x.scalar_type())) return not_implemented();
  const Activation f = make_activation(kind, a, b);
  const int inplace = PyObject_IsTrue(is_inplace.ptr());  // as PyTorch, whatever it is
  if (inplace < 0) throw py::error_already_set();
  // PyTorch's threshold_ is the one in-place activation that takes expanded tensors.
  if (inplace && f.kind == ActivationKind::threshold && at::has_internal_overlap(x) == at::MemOverlap::Yes)
    return not_implemented();
  return wrap(without_gil([&] { return activation_name(f.kind); },
                          [&] { return inplace ? activation_(x, f) : fastops::activation(x, f); }, x));
}

py::object prelu_fast(py::handle input, py::handle weight) {
  if (!fast_door::ambient_is_plain() || !fast_door::is_plain(input.ptr()) || !fast_door::is_plain(weight.ptr()))
    return not_implemented();
  const Tensor &x = THPVariable_Unpack(input.ptr()), &w = THPVariable_Unpack(weight.ptr());
  if (at::autocast::is_autocast_enabled(x.device().type()))
    return not_implemented();  // on its lower-precision list: cast in Python
  if (!prelu_accepts(x, w)) return not_implemented();
  return wrap(without_gil([] { return "prelu"; }, [&] { return fastops::prelu(x, w); }, x, w));
}

py::object glu_fast(py::handle input, py::handle dimension) {
  int64_t dim = 0;
  if (!read_int(dimension.ptr(), dim)) return not_implemented();
  if (!fast_door::ambient_is_plain() || !fast_door::is_plain(input.ptr())) return not_implemented();
  const Tensor& x = THPVariable_Unpack(input.ptr());
  if (!glu_accepts(x, dim)) return not_implemented();
  return wrap(without_gil([] { return "glu"; }, [&] { return fastops::glu(x, dim); }, x));
}

// A bool, as a Python object that is exactly one.
bool read_bool(PyObject* object, bool& value) {
  value = object == Py_True;
  return value || object == Py_False;
}

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

PoolParams pool_params(int dims, bool adaptive) {
  return {dims, adaptive, false, {1, 1, 1}, {1, 1, 1}, {}, {1, 1, 1}, {1, 1, 1}};
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
  return pool_fast(input, params, [&](const Tensor& x, const PoolPlan& plan) {
    // PyTorch refuses windows larger than the input in three dimensions, padding or not.
    for (int i = 0; i < 3 && dims == 3; ++i)
      if (plan.geometry.kernel[i] > plan.geometry.in[i]) return not_implemented();
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

// What of these arguments does not fit, for the message of an error; "" where everything does. kernel None: adaptive.
std::string pool_problem(const Tensor& input, int dims, py::handle kernel, py::handle stride, py::handle padding,
                         py::handle dilation, py::handle output_size) {
  PoolParams params = pool_params(dims, kernel.is_none());
  const bool read = params.adaptive ? read_output_size(output_size.ptr(), params)
                                    : read_windows(kernel, stride, padding, dilation, py::bool_(false), params);
  PoolPlan plan;
  return read ? plan_pool(input.sizes(), params, plan) : std::string();
}

// ---- what fastops.info(), fastops.record() and fastops.memory read

py::dict build_info() {
  py::dict info;
  info["version"] = FASTOPS_VERSION;
  info["torch"] = FASTOPS_TORCH_VERSION;
  info["compiler"] = FASTOPS_COMPILER;
  info["flags"] = FASTOPS_FLAGS;
  info["cuda"] = FASTOPS_CUDA_BUILD;
  return info;
}

// Whether tensors take the CUDA kernels, and the driver and devices found or what is missing.
py::tuple cuda_found() {
  const gpu::Description found = gpu::describe();
  return py::make_tuple(found.available, found.text);
}

// For tests: tensors on the device of type PrivateUse1 take the kernels of the cuda::KernelTable at this address.
void use_cuda_emulator(uintptr_t table) {
  gpu::use_emulator(reinterpret_cast<const cuda::KernelTable*>(table));
  static torch::Library ops(torch::Library::IMPL, "fastops", c10::DispatchKey::PrivateUse1, __FILE__, __LINE__);
  static const bool implemented = (implement_on_every_device(ops), true);
  (void)implemented;
}

py::list record_stop() {
  py::list rows;
  for (const record::Row& row : record::stop())
    rows.append(py::make_tuple(row.op, row.kernel, row.shapes, row.dtype, row.microseconds));
  return rows;
}

py::dict memory_stats() {
  const memory::Stats stats = memory::stats();
  py::dict result;
  result["allocated_bytes"] = stats.allocated_bytes;
  result["cached_bytes"] = stats.cached_bytes;
  result["peak_allocated_bytes"] = stats.peak_allocated_bytes;
  result["limit_bytes"] = stats.limit_bytes;
  result["threshold_bytes"] = stats.threshold_bytes;
  result["hits"] = stats.hits;
  result["misses"] = stats.misses;
  return result;
}

bool set_isa_by_name(const std::string& name) {
  for (int i = 0; i < static_cast<int>(Isa::count); ++i)
    if (name == isa_name(static_cast<Isa>(i))) return set_isa(static_cast<Isa>(i));
  return false;
}

PYBIND11_MODULE(_C, m) {
  m.def("linear", &linear_fast);
  m.def("mlp", &mlp_fast);
  m.def("conv1d", &conv_fast<1>);
  m.def("conv2d", &conv_fast<2>);
  m.def("conv3d", &conv_fast<3>);
  m.def("conv_transpose1d", &conv_transpose_fast<1>);
  m.def("conv_transpose2d", &conv_transpose_fast<2>);
  m.def("conv_transpose3d", &conv_transpose_fast<3>);
  m.def("conv_max_pool1d", &conv_max_pool_fast<1>);
  m.def("conv_max_pool2d", &conv_max_pool_fast<2>);
  m.def("conv_max_pool3d", &conv_max_pool_fast<3>);
  m.def("conv_problem", &conv_problem);
  m.def("set_conv_precision", [](int precision) { set_conv_precision(static_cast<Precision>(precision)); });
  m.def("conv_precision", [] { return static_cast<int>(conv_precision()); });
  m.def("activation", &activation_fast);
  m.def("prelu", &prelu_fast);
  m.def("glu", &glu_fast);
  m.def("max_pool1d", &max_pool_fast<1>);
  m.def("max_pool2d", &max_pool_fast<2>);
  m.def("max_pool3d", &max_pool_fast<3>);
  m.def("adaptive_max_pool1d", &adaptive_max_pool_fast<1>);
  m.def("adaptive_max_pool2d", &adaptive_max_pool_fast<2>);
  m.def("adaptive_max_pool3d", &adaptive_max_pool_fast<3>);
  m.def("avg_pool1d", &avg_pool1d_fast);
  m.def("avg_pool2d", &avg_pool_fast<2>);
  m.def("avg_pool3d", &avg_pool_fast<3>);
  m.def("adaptive_avg_pool1d", &adaptive_avg_pool_fast<1>);
  m.def("adaptive_avg_pool2d", &adaptive_avg_pool_fast<2>);
  m.def("adaptive_avg_pool3d", &adaptive_avg_pool_fast<3>);
  m.def("pool_problem", &pool_problem);

  py::list kinds;
  for (int i = 0; i < static_cast<int>(ActivationKind::count); ++i)
    kinds.append(activation_name(static_cast<ActivationKind>(i)));
  m.attr("ACTIVATION_KINDS") = kinds;
  m.def("saved_by_default",
        [](int kind, double a, double b) { return saved_name(saved_by_default(make_activation(kind, a, b))); });
  m.def("saved_by_linear",
        [](int kind, double a, double b) { return saved_name(saved_by_linear(make_activation(kind, a, b))); });
  m.def("can_save_output", [](int kind, double a, double b) { return can_save_output(make_activation(kind, a, b)); });

  m.def("record_enabled", &record::enabled);
  m.def("record_start", &record::start);
  m.def("record_stop", &record_stop);
  m.def("record_add",
        [](std::string op, std::string kernel, std::string shapes, std::string dtype, double microseconds) {
          record::add({std::move(op), std::move(kernel), std::move(shapes), std::move(dtype), microseconds});
        });

  m.def("memory_stats", &memory_stats);
  m.def("memory_set_limit", &memory::set_limit);
  m.def("memory_empty_cache", &memory::empty_cache);

  m.def("build_info", &build_info);
  m.def("cuda_found", &cuda_found);
  m.def("gpu_takes", [](const at::Device& device) { return gpu::takes(device); });
  m.def("use_cuda_emulator", &use_cuda_emulator);
  m.def("isa_found", [] { return isa_name(isa_found()); });
  m.def("isa_used", [] { return isa_name(isa_used()); });
  m.def("isa_problem", &isa_problem);
  m.def("set_isa", &set_isa_by_name);
  m.def("cpu_name", &cpu_name);
  // One thread each, so that a benchmark can start one on every core at once.
  using NoGil = py::call_guard<py::gil_scoped_release>;
  m.def("peak_f32", [](double milliseconds) { return kernels(DType::f32).peak_f32(milliseconds); }, NoGil());
  m.def("peak_bf16", [](double milliseconds) { return kernels(DType::bf16).peak_bf16(milliseconds); }, NoGil());
}

}  // namespace
}  // namespace fastops
