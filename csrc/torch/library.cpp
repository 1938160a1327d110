// Everything that Python sees, in one page: the schemas of torch.ops.fastops and the module fastops._C.
#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/autocast_mode.h>
#include <torch/library.h>
#include <torch/python.h>

#include "../kernels/cpu/isa.h"
#include "check.h"
#include "fast_door.h"
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

Tensor or_empty(Tensor tensor, at::ScalarType type) {
  return tensor.defined() ? tensor : at::detail::empty_cpu({0}, type);
}

std::tuple<Tensor, Tensor> linear_forward_op(const Tensor& input, const Tensor& weight, const optional<Tensor>& bias,
                                             c10::string_view activation, double a, double b, bool need_saved) {
  auto [y, z] = linear_forward(input, weight, bias, make_activation(activation, a, b), need_saved);
  return {y, or_empty(z, y.scalar_type())};
}

std::tuple<Tensor, Tensor, Tensor> linear_backward_op(const Tensor& grad_output, const optional<Tensor>& saved,
                                                      const Tensor& input, const Tensor& weight,
                                                      c10::string_view activation, double a, double b,
                                                      std::array<bool, 3> output_mask) {
  auto [x, w, bias] = linear_backward(grad_output, saved.value_or(Tensor()), input, weight,
                                      make_activation(activation, a, b), output_mask, input.sizes(), weight.size(1));
  const auto type = grad_output.scalar_type();
  return {or_empty(x, type), or_empty(w, type), or_empty(bias, type)};
}

// A mask that crosses this door is in the logical order of its elements, whatever the strides: a compiler may change
// those.
std::tuple<Tensor, Tensor> activation_forward_op(const Tensor& input, c10::string_view activation, double a, double b,
                                                 bool need_mask) {
  const Activation f = make_activation(activation, a, b);
  if (!need_mask || saved_by_default(f) != Saved::mask)
    return {activation_forward(input, f, false).y, at::detail::empty_cpu({0}, at::kByte)};
  auto [y, mask] = activation_forward(input.contiguous(), f, true);
  if (!input.is_contiguous()) y = at::empty_like(input).copy_(y);
  return {y, mask};
}

Tensor activation_backward_op(const Tensor& grad_output, const Tensor& saved, c10::string_view activation, double a,
                              double b, c10::string_view kind) {
  return activation_backward(grad_output, saved, make_activation(activation, a, b),
                             saved_kind({kind.data(), kind.size()}));
}

Tensor activation_second_derivative_op(const Tensor& saved, c10::string_view activation, double a, double b,
                                       c10::string_view kind) {
  return activation_second_derivative(saved, make_activation(activation, a, b), saved_kind({kind.data(), kind.size()}));
}

std::tuple<Tensor, Tensor> prelu_backward_op(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                                             std::array<bool, 2> output_mask) {
  auto [x, w] = prelu_backward(grad_output, input, weight, output_mask);
  return {or_empty(x, input.scalar_type()), or_empty(w, input.scalar_type())};
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
}

TORCH_LIBRARY_IMPL(fastops, CPU, m) {
  m.impl("linear_forward", linear_forward_op);
  m.impl("linear_backward", linear_backward_op);
  m.impl("activation_forward", activation_forward_op);
  m.impl("activation_backward", activation_backward_op);
  m.impl("prelu_forward", prelu_forward);
  m.impl("prelu_backward", prelu_backward_op);
  m.impl("glu_forward", glu_forward);
  m.impl("glu_backward", glu_backward);
}

// ---- the fast door: _C.<op> returns NotImplemented for every call that is not plain; Python then takes the general
// door or explains what is wrong. Kernels run without the interpreter's lock, as PyTorch's own do.

py::object not_implemented() { return py::reinterpret_borrow<py::object>(Py_NotImplemented); }

template <class Call>
py::object without_gil(Call&& call) {
  Tensor result;
  {
    const py::gil_scoped_release release;
    result = call();
  }
  return py::reinterpret_steal<py::object>(THPVariable_Wrap(std::move(result)));
}

Activation make_activation(int kind, double a, double b) { return {static_cast<ActivationKind>(kind), a, b}; }

py::object linear_fast(py::handle input, py::handle weight, py::handle bias, int kind, double a, double b) {
  const bool has_bias = !bias.is_none();
  if (!fast_door::ambient_is_plain() || !fast_door::is_plain(input.ptr()) || !fast_door::is_plain(weight.ptr()) ||
      (has_bias && !fast_door::is_plain(bias.ptr())))
    return not_implemented();
  const Tensor &x = THPVariable_Unpack(input.ptr()), &w = THPVariable_Unpack(weight.ptr());
  const optional<Tensor> bias_tensor = has_bias ? optional<Tensor>(THPVariable_Unpack(bias.ptr())) : std::nullopt;
  const Activation activation = make_activation(kind, a, b);
  if (at::autocast::is_autocast_enabled(at::kCPU)) {
    const auto type = at::autocast::get_autocast_dtype(at::kCPU);
    const Tensor cast_x = at::autocast::cached_cast(type, x, at::kCPU),
                 cast_w = at::autocast::cached_cast(type, w, at::kCPU);
    const auto cast_bias = at::autocast::cached_cast(type, bias_tensor, at::kCPU);
    if (!linear_accepts(cast_x, cast_w, cast_bias)) return not_implemented();
    return without_gil([&] { return fastops::linear(cast_x, cast_w, cast_bias, activation); });
  }
  if (!linear_accepts(x, w, bias_tensor)) return not_implemented();
  return without_gil([&] { return fastops::linear(x, w, bias_tensor, activation); });
}

py::object activation_fast(py::handle input, int kind, double a, double b, bool inplace) {
  if (!fast_door::ambient_is_plain() || !fast_door::is_plain(input.ptr())) return not_implemented();
  const Tensor& x = THPVariable_Unpack(input.ptr());
  if (!is_supported(x.scalar_type())) return not_implemented();
  const Activation f = make_activation(kind, a, b);
  return without_gil([&] { return inplace ? activation_(x, f) : fastops::activation(x, f); });
}

py::object prelu_fast(py::handle input, py::handle weight) {
  if (at::autocast::is_autocast_enabled(at::kCPU))
    return not_implemented();  // on its lower-precision list: cast in Python
  if (!fast_door::ambient_is_plain() || !fast_door::is_plain(input.ptr()) || !fast_door::is_plain(weight.ptr()))
    return not_implemented();
  const Tensor &x = THPVariable_Unpack(input.ptr()), &w = THPVariable_Unpack(weight.ptr());
  return prelu_accepts(x, w) ? without_gil([&] { return fastops::prelu(x, w); }) : not_implemented();
}

py::object glu_fast(py::handle input, int64_t dim) {
  if (!fast_door::ambient_is_plain() || !fast_door::is_plain(input.ptr())) return not_implemented();
  const Tensor& x = THPVariable_Unpack(input.ptr());
  return glu_accepts(x, dim) ? without_gil([&] { return fastops::glu(x, dim); }) : not_implemented();
}

// ---- what fastops.info(), fastops.record() and fastops.memory read

py::dict build_info() {
  py::dict info;
  info["version"] = FASTOPS_VERSION;
  info["torch"] = FASTOPS_TORCH_VERSION;
  info["compiler"] = FASTOPS_COMPILER;
  info["flags"] = FASTOPS_FLAGS;
  return info;
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
  m.def("activation", &activation_fast);
  m.def("prelu", &prelu_fast);
  m.def("glu", &glu_fast);

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
  m.def("isa_found", [] { return isa_name(isa_found()); });
  m.def("isa_used", [] { return isa_name(isa_used()); });
  m.def("isa_problem", &isa_problem);
  m.def("set_isa", &set_isa_by_name);
  m.def("cpu_name", &cpu_name);
  // One thread each, so that a benchmark can start one on every core at once.
  using NoGil = py::call_guard<py::gil_scoped_release>;
  m.def("peak_f32", [](double milliseconds) { return kernels().peak_f32(milliseconds); }, NoGil());
  m.def("peak_bf16", [](double milliseconds) { return kernels().peak_bf16(milliseconds); }, NoGil());
}

}  // namespace
}  // namespace fastops
