// Helpers of the two doors through which Python reaches the ops.
#pragma once

#include <ATen/autocast_mode.h>
#include <torch/csrc/Exceptions.h>
#include <torch/library.h>
#include <torch/python.h>

#include "check.h"
#include "fast_door.h"
#include "memory.h"
#include "ops.h"
#include "record.h"

namespace fastops {

namespace py = pybind11;

void implement(torch::Library& m, bool meta = false);  // library.cpp

// ---- the general door: torch.ops.fastops.*, without autograd

inline Activation make_activation(c10::string_view name, double a, double b) {
  return {activation_kind({name.data(), name.size()}), a, b};
}

// Outputs that do not exist are tensors of 0 elements, otherwise like `like`.
inline Tensor or_empty(Tensor tensor, const Tensor& like) {
  return tensor.defined() ? tensor : at::empty({0}, like.options());
}
inline std::tuple<Tensor, Tensor, Tensor> or_empty(const std::array<Tensor, 3>& tensors, const Tensor& like) {
  return {or_empty(tensors[0], like), or_empty(tensors[1], like), or_empty(tensors[2], like)};
}

// ---- the fast door: _C.<op> returns NotImplemented for every call that is not plain; Python then takes the general
// door or explains what is wrong. Kernels run without the interpreter's lock, as PyTorch's own do.

inline py::object not_implemented() { return py::reinterpret_borrow<py::object>(Py_NotImplemented); }

inline py::object wrap(Tensor tensor) { return py::reinterpret_steal<py::object>(THPVariable_Wrap(std::move(tensor))); }

inline int64_t elements(const Tensor& tensor) { return tensor.defined() ? tensor.numel() : 0; }
inline int64_t elements(const optional<Tensor>& tensor) { return tensor ? elements(*tensor) : 0; }
inline int64_t elements(at::TensorList tensors) {
  int64_t sum = 0;
  for (const Tensor& tensor : tensors) sum += elements(tensor);
  return sum;
}

// With fewer elements in all inputs a call takes some microseconds, and it keeps the interpreter's lock: giving that
// back and taking it again costs 0.1 us (Zen 5).
constexpr int64_t kElementsWithGil = 8192;

// What the call returns; op() and the inputs are what an observer sees of it.
template <class Op, class Call, class... Inputs>
auto without_gil(Op&& op, Call&& call, const Inputs&... inputs) {
  optional<py::gil_scoped_release> release;
  if ((elements(inputs) + ...) >= kElementsWithGil) release.emplace();
  return record::observed(op, call, inputs...);
}

// ---- fast_def<&function>(m, "name"): module.name is the function, for arguments that are py::handle, int or double.
// pybind11's own m.def costs 0.1 us more for each call: it collects the arguments in vectors and looks at overloads.

inline void read_argument(PyObject* object, py::handle& value) { value = object; }
inline void read_argument(PyObject* object, int& value) {
  value = static_cast<int>(PyLong_AsLong(object));
  if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
}
inline void read_argument(PyObject* object, double& value) {
  value = PyFloat_AsDouble(object);
  if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
}

template <auto function>
struct FastDef;
template <class... Arguments, py::object (*function)(Arguments...)>
struct FastDef<function> {
  static PyObject* call(PyObject*, PyObject* const* objects, Py_ssize_t count) {
    HANDLE_TH_ERRORS
    TORCH_CHECK_TYPE(count == sizeof...(Arguments), "expected ", sizeof...(Arguments), " arguments, got ", count);
    std::tuple<Arguments...> arguments;
    std::apply([&](auto&... argument) { (read_argument(*objects++, argument), ...); }, arguments);
    return std::apply(function, arguments).release().ptr();
    END_HANDLE_TH_ERRORS
  }
};

template <auto function>
void fast_def(py::module_& m, const char* name) {
  static PyMethodDef definition{name,
                                reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&FastDef<function>::call)),
                                METH_FASTCALL, nullptr};
  m.attr(name) =
      py::reinterpret_steal<py::object>(PyCFunction_NewEx(&definition, nullptr, py::str("fastops._C").ptr()));
}

inline Activation make_activation(int kind, double a, double b) { return {static_cast<ActivationKind>(kind), a, b}; }

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

// An int, as a Python object that is exactly one.
inline bool read_int(PyObject* object, int64_t& value) {
  if (!PyLong_CheckExact(object)) return false;
  int overflow = 0;
  value = PyLong_AsLongLongAndOverflow(object, &overflow);
  return overflow == 0;
}

// An int for all dimensions, or a tuple or list of one or `dims` of them, into the last `dims` of three.
inline bool read_sizes(PyObject* object, int dims, int64_t (&values)[3]) {
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

// A bool, as a Python object that is exactly one.
inline bool read_bool(PyObject* object, bool& value) {
  value = object == Py_True;
  return value || object == Py_False;
}

}  // namespace fastops
