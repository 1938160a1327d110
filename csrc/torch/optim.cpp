// The steps of fastops.optim: what a group of parameters says, the list of pieces, and the kernel's call.
//
// A parameter is PyTorch's where the kernel does not fit: it has no state yet (PyTorch makes that), or it, its gradient
// or its state is not a plain tensor on one device that has kernels, with one dtype and one order of elements.
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>

#include "binding.h"
#include "call.h"

namespace fastops {
namespace {

PyObject* key(const char* name) { return PyUnicode_InternFromString(name); }

// A dict's value, or null. Borrowed.
PyObject* value_of(PyObject* dict, PyObject* name) {
  PyObject* const value = PyDict_GetItemWithError(dict, name);
  if (value == nullptr && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

bool is_true(PyObject* object) {
  const int value = PyObject_IsTrue(object);
  if (value < 0) throw py::error_already_set();
  return value != 0;
}

// A float or an int, also of a subclass.
bool read_number(PyObject* object, double& value) {
  if (object == nullptr || !(PyFloat_Check(object) || PyLong_Check(object))) return false;
  value = PyFloat_AsDouble(object);
  if (value == -1 && PyErr_Occurred()) PyErr_Clear();  // an int without a float's range: PyTorch will say so
  return true;
}

// A tensor of one number on the CPU, float32 or float64.
bool read_scalar(PyObject* object, double& value, bool& is_single) {
  if (object == nullptr || !fast_door::is_plain(object)) return false;
  const Tensor& tensor = THPVariable_Unpack(object);
  if (!tensor.is_cpu() || tensor.numel() != 1 || tensor.requires_grad()) return false;
  is_single = tensor.scalar_type() == at::kFloat;
  if (!is_single && tensor.scalar_type() != at::kDouble) return false;
  value = is_single ? static_cast<double>(*tensor.const_data_ptr<float>()) : *tensor.const_data_ptr<double>();
  return true;
}

// The learning rate. From a float32 tensor, PyTorch computes with it in float32.
struct Rate {
  double value = 0;
  bool is_single = false, is_tensor = false;

  bool read(PyObject* object) {
    if (read_number(object, value)) return true;
    is_tensor = true;
    return read_scalar(object, value, is_single);
  }
  // 1 - lr x
  double complement(double x) const {
    return is_single ? static_cast<double>(1 - static_cast<float>(value) * static_cast<float>(x)) : 1 - value * x;
  }
  // lr / x
  double over(double x) const {
    return is_single ? static_cast<double>(static_cast<float>(value) / static_cast<float>(x)) : value / x;
  }
};

// What both optimizers' groups have.
struct Names {
  PyObject *params = key("params"), *lr = key("lr"), *weight_decay = key("weight_decay"), *maximize = key("maximize"),
           *foreach_ = key("foreach"), *fused = key("fused"), *differentiable = key("differentiable"),
           *capturable = key("capturable"), *momentum = key("momentum"), *dampening = key("dampening"),
           *nesterov = key("nesterov"), *momentum_buffer = key("momentum_buffer"), *betas = key("betas"),
           *eps = key("eps"), *amsgrad = key("amsgrad"), *decoupled = key("decoupled_weight_decay"),
           *step = key("step"), *exp_avg = key("exp_avg"), *exp_avg_sq = key("exp_avg_sq"),
           *max_exp_avg_sq = key("max_exp_avg_sq");
};
const Names& names() {
  static const Names all;
  return all;
}

// The value of a switch; PyTorch's if the group lacks it.
bool read_switch(PyObject* group, PyObject* name, bool& value) {
  PyObject* const object = value_of(group, name);
  if (object == nullptr) return false;
  value = is_true(object);
  return true;
}

bool is_off(PyObject* group, PyObject* name) {
  PyObject* const object = value_of(group, name);
  return object == nullptr || !is_true(object);
}

// Whether t's elements lie as p's do, which are dense.
bool lies_like(const Tensor& t, const Tensor& p) {
  if (t.scalar_type() != p.scalar_type() || !is_on(t, p.device()) || t.sizes() != p.sizes()) return false;
  if (t.is_contiguous() && p.is_contiguous()) return true;
  if (!p.is_non_overlapping_and_dense()) return false;
  for (int64_t i = 0; i < p.dim(); ++i)
    if (t.size(i) != 1 && t.stride(i) != p.stride(i)) return false;
  return true;
}

bool is_ours(const Tensor& t, const Tensor& p) { return fast_door::is_plain(t) && lies_like(t, p); }

// A tensor that is updated in place: its state, and itself. Inference mode forbids it for its tensors.
bool may_change(const Tensor& t) { return !t.is_inference(); }

// A tensor of a parameter's state, or null where PyTorch has to look at it.
const Tensor* state_tensor(PyObject* state, PyObject* name, const Tensor& p) {
  PyObject* const object = value_of(state, name);
  if (object == nullptr || !fast_door::is_plain(object)) return nullptr;
  const Tensor& t = THPVariable_Unpack(object);
  return lies_like(t, p) && may_change(t) ? &t : nullptr;
}

// The memory of a tensor that is about to be changed, which autograd has to notice.
void* changed(const Tensor& t) {
  t.unsafeGetTensorImpl()->bump_version();
  return t.mutable_data_ptr();
}

// The pieces of one call: parameters of one group, one dtype and one device.
template <class Call>
struct Batch {
  c10::SmallVector<typename Call::Piece, 16> pieces;
  // While the interpreter's lock is given back, nobody else keeps the gradients and the state.
  c10::SmallVector<const Tensor*, 64> used;
  at::ScalarType type = at::kFloat;
  at::Device device = at::kCPU;
  int64_t elements = 0;
};

// Whether parameters share memory.
template <class Piece>
bool overlap(c10::ArrayRef<Piece> pieces, int64_t size) {
  c10::SmallVector<std::pair<const char*, int64_t>, 64> ranges;
  for (const Piece& piece : pieces)
    if (piece.n > 0) ranges.emplace_back(static_cast<const char*>(piece.p), piece.n * size);
  std::sort(ranges.begin(), ranges.end());
  for (size_t i = 1; i < ranges.size(); ++i)
    if (ranges[i - 1].first + ranges[i - 1].second > ranges[i].first) return true;
  return false;
}

// Fewer elements are never shared among threads, in whatever order.
constexpr int64_t kElementsInOrder = 32768;

// Runs the kernel on what has been collected.
template <class Call>
void flush(const char* op, Call call, const typename Call::Options& options, Batch<Call>& batch) {
  if (batch.pieces.empty()) return;
  call.dtype = to_dtype(batch.type);
  using Piece = typename Call::Piece;
  const c10::ArrayRef<Piece> pieces = batch.pieces;
  call.in_order =
      batch.elements >= kElementsInOrder && overlap(pieces, static_cast<int64_t>(c10::elementSize(batch.type)));
  const auto step = [&] {
    run(call, {pieces.data(), static_cast<int64_t>(pieces.size()), &options}, batch.device, [&] {
      const std::string shapes = c10::str(pieces.size(), " tensors, ", batch.elements, " elements");
      return record::Row{op, "", shapes, dtype_name(batch.type)};
    });
    return std::vector<Tensor>();
  };
  if (batch.elements < kElementsWithGil) {
    record::observed([&] { return op; }, step);
  } else {
    c10::SmallVector<Tensor, 64> held;
    for (const Tensor* tensor : batch.used) held.push_back(*tensor);
    const py::gil_scoped_release release;
    record::observed([&] { return op; }, step);
  }
  batch.pieces.clear();
  batch.used.clear();
  batch.elements = 0;
}

// Whether a CUDA graph is being made of what runs on this tensor's device. It would not count steps.
bool is_capturing(const Tensor& tensor) {
  if (tensor.device().type() != c10::DeviceType::CUDA) return false;
  return py::module_::import("torch.cuda").attr("is_current_stream_capturing")().cast<bool>();
}

// The parameters that are PyTorch's, as a list of (group, parameters).
class Rest {
 public:
  void add(PyObject* group, PyObject* params) {
    if (!list_) list_ = py::reinterpret_steal<py::object>(PyList_New(0));
    const auto pair = py::make_tuple(py::handle(group), py::handle(params));
    if (PyList_Append(list_.ptr(), pair.ptr()) != 0) throw py::error_already_set();
  }
  py::object get() { return list_ ? std::move(list_) : py::none(); }

 private:
  py::object list_;
};

// Sgd and Adam read a group and add one parameter at a time:
//   Call read(group, batch's options)     nullopt: the group is PyTorch's
//   bool add(p, grad, state, batch)       false: the parameter is PyTorch's
template <class Method>
py::object step(py::handle groups, py::handle states) {
  using Call = typename Method::Call;
  if (!fast_door::ambient_is_plain() || !PyList_CheckExact(groups.ptr()) || !PyDict_Check(states.ptr()))
    return not_implemented();
  const Names& name = names();
  // With fused=True, GradScaler hands over its scale, which is PyTorch's to read.
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(groups.ptr()); ++i) {
    PyObject* const group = PyList_GET_ITEM(groups.ptr(), i);
    if (!PyDict_CheckExact(group) || !is_off(group, name.fused)) return not_implemented();
    PyObject* const params = value_of(group, name.params);
    if (params == nullptr || !PyList_CheckExact(params)) return not_implemented();
  }
  Rest rest;
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(groups.ptr()); ++i) {
    const auto group = py::reinterpret_borrow<py::object>(PyList_GET_ITEM(groups.ptr(), i));
    const auto params = py::reinterpret_borrow<py::object>(value_of(group.ptr(), name.params));
    Method method;
    if (!method.read(group.ptr())) {
      rest.add(group.ptr(), params.ptr());
      continue;
    }
    Batch<Call> batch;
    py::object left;  // a list of parameters
    for (Py_ssize_t j = 0; j < PyList_GET_SIZE(params.ptr()); ++j) {
      PyObject* const param = PyList_GET_ITEM(params.ptr(), j);
      if (fast_door::is_plain(param)) {
        const Tensor& p = THPVariable_Unpack(param);
        const Tensor& grad = p.unsafeGetTensorImpl()->grad();
        if (!grad.defined()) continue;
        const auto type = p.scalar_type();
        if (is_supported(type) && p.is_leaf() && may_change(p) && is_ours(grad, p) && lies_like(p, p)) {
          if ((type != batch.type || !is_on(p, batch.device)) && !batch.pieces.empty())
            flush(Method::name, method.call, method.options, batch);
          batch.type = type;
          batch.device = p.device();
          PyObject* const state = method.has_state ? value_of(states.ptr(), param) : nullptr;
          if ((!method.has_state || (state != nullptr && PyDict_Check(state))) && method.add(p, grad, state, batch)) {
            batch.used.append({&p, &grad});
            batch.elements += p.numel();
            continue;
          }
        }
      }
      if (!left) left = py::reinterpret_steal<py::object>(PyList_New(0));
      if (PyList_Append(left.ptr(), param) != 0) throw py::error_already_set();
    }
    flush(Method::name, method.call, method.options, batch);
    if (left) rest.add(group.ptr(), left.ptr());
  }
  return rest.get();
}

struct Sgd {
  using Call = SgdStep;
  static constexpr const char* name = "sgd_step";
  SgdStep call{};
  SgdStep::Options options{};
  bool has_state = false;

  bool read(PyObject* group) {
    const Names& name = names();
    Rate lr;
    if (!lr.read(value_of(group, name.lr)) || !read_number(value_of(group, name.momentum), options.momentum) ||
        !read_number(value_of(group, name.dampening), options.dampening) ||
        !read_number(value_of(group, name.weight_decay), options.weight_decay) ||
        !read_switch(group, name.nesterov, call.nesterov) || !read_switch(group, name.maximize, call.maximize) ||
        !is_off(group, name.differentiable))
      return false;
    options.lr = lr.value;
    call.with_momentum = has_state = options.momentum != 0;
    return true;
  }

  bool add(const Tensor& p, const Tensor& grad, PyObject* state, Batch<SgdStep>& batch) {
    const Tensor* m = nullptr;
    if (has_state) {
      m = state_tensor(state, names().momentum_buffer, p);
      if (m == nullptr) return false;
      batch.used.push_back(m);
    }
    batch.pieces.push_back({changed(p), grad.const_data_ptr(), m != nullptr ? changed(*m) : nullptr, p.numel()});
    return true;
  }
};

struct Adam {
  using Call = AdamStep;
  static constexpr const char* name = "adam_step";
  static constexpr bool has_state = true;
  AdamStep call{};
  AdamStep::Options options{};
  Rate lr;
  double taken = -1, step_size = 0, correction = 0;  // of a parameter that has taken so many steps
  optional<bool> captured;                           // PyTorch refuses that

  bool read(PyObject* group) {
    const Names& name = names();
    bool decoupled = false;
    PyObject* const betas = value_of(group, name.betas);
    if (betas == nullptr || !PyTuple_Check(betas) || PyTuple_GET_SIZE(betas) != 2) {
      if (betas == nullptr || !PyList_Check(betas) || PyList_GET_SIZE(betas) != 2) return false;
    }
    if (!lr.read(value_of(group, name.lr)) || !read_number(PySequence_Fast_GET_ITEM(betas, 0), options.beta1) ||
        !read_number(PySequence_Fast_GET_ITEM(betas, 1), options.beta2) ||
        !read_number(value_of(group, name.eps), options.eps) ||
        !read_number(value_of(group, name.weight_decay), options.weight_decay) ||
        !read_switch(group, name.amsgrad, call.amsgrad) || !read_switch(group, name.maximize, call.maximize) ||
        !read_switch(group, name.decoupled, decoupled) || !is_off(group, name.differentiable) ||
        !is_off(group, name.capturable) || (lr.is_tensor && !is_off(group, name.foreach_)))
      return false;
    options.decay = 1;
    if (decoupled && options.weight_decay != 0) {
      options.decay = lr.complement(options.weight_decay);
      options.weight_decay = 0;
    }
    return true;
  }

  // Adds a step to the count that the tensor holds, and sets what depends on it.
  bool count(PyObject* state) {
    PyObject* const object = value_of(state, names().step);
    double before = 0;
    bool is_single = false;
    if (!read_scalar(object, before, is_single)) return false;
    const Tensor& tensor = THPVariable_Unpack(object);
    if (!may_change(tensor)) return false;
    void* const data = changed(tensor);
    double now = before + 1;
    if (is_single) {
      const float rounded = static_cast<float>(before) + 1;
      *static_cast<float*>(data) = rounded;
      now = static_cast<double>(rounded);
    } else {
      *static_cast<double*>(data) = now;
    }
    if (now == taken) return true;
    taken = now;
    step_size = -lr.over(1 - std::pow(options.beta1, now));
    correction = std::sqrt(1 - std::pow(options.beta2, now));
    return true;
  }

  bool add(const Tensor& p, const Tensor& grad, PyObject* state, Batch<AdamStep>& batch) {
    const Names& name = names();
    if (!captured) captured = is_capturing(p);
    if (*captured) return false;
    const Tensor* const m = state_tensor(state, name.exp_avg, p);
    const Tensor* const v = state_tensor(state, name.exp_avg_sq, p);
    const Tensor* const top = call.amsgrad ? state_tensor(state, name.max_exp_avg_sq, p) : nullptr;
    if (m == nullptr || v == nullptr || (call.amsgrad && top == nullptr) || !count(state)) return false;
    batch.used.append({m, v});
    if (top != nullptr) batch.used.push_back(top);
    batch.pieces.push_back({changed(p), grad.const_data_ptr(), changed(*m), changed(*v),
                            top != nullptr ? changed(*top) : nullptr, p.numel(), step_size, correction});
    return true;
  }
};

// Drops the gradients of all parameters, if each is a plain tensor; else nothing happens and the result is False.
py::object drop_gradients(py::handle groups) {
  const auto done = [](bool value) { return py::reinterpret_borrow<py::object>(value ? Py_True : Py_False); };
  if (!fast_door::ambient_is_plain() || !PyList_CheckExact(groups.ptr())) return done(false);
  for (const bool drop : {false, true})
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(groups.ptr()); ++i) {
      PyObject* const group = PyList_GET_ITEM(groups.ptr(), i);
      PyObject* const params = PyDict_CheckExact(group) ? value_of(group, names().params) : nullptr;
      if (params == nullptr || !PyList_CheckExact(params)) return done(false);
      for (Py_ssize_t j = 0; j < PyList_GET_SIZE(params); ++j) {
        PyObject* const param = PyList_GET_ITEM(params, j);
        if (!THPVariable_CheckExact(param)) return done(false);
        const Tensor& p = THPVariable_Unpack(param);
        if (drop && p.unsafeGetTensorImpl()->grad().defined()) p.mutable_grad().reset();
      }
    }
  return done(true);
}

// Whether somebody listens to PyTorch's record_function: the profiler and its like.
py::object is_observed() {
  const bool observed = at::getStepCallbacksUnlessEmpty(at::RecordScope::USER_SCOPE).has_value();
  return py::reinterpret_borrow<py::object>(observed ? Py_True : Py_False);
}

}  // namespace

void bind_optim(py::module_& m) {
  fast_def<&step<Sgd>>(m, "sgd_step");
  fast_def<&step<Adam>>(m, "adam_step");
  fast_def<&drop_gradients>(m, "drop_gradients");
  fast_def<&is_observed>(m, "is_observed");
}

}  // namespace fastops
