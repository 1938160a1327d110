#include "../kernels/mlp/mlp.h"

#include <ATen/ATen.h>

#include <algorithm>

#include "binding.h"
#include "call.h"
#include "node.h"

namespace fastops {
namespace {

struct MlpActivations {
  Activation hidden, output;
};

// The input as a matrix with unit column stride, as the kernels require (mlp.h).
Tensor as_rows(const Tensor& tensor) {
  const int64_t cols = tensor.size(-1);
  const Tensor rows = tensor.reshape({cols == 0 ? 0 : tensor.numel() / cols, cols});
  return rows.stride(1) == 1 || cols == 1 ? rows : rows.contiguous();
}

MlpShape shape_of(const Tensor& input, at::TensorList weights, Precision precision) {
  MlpShape shape{to_dtype(input.scalar_type()), precision, 1, static_cast<int>(weights.size()), {}};
  for (int64_t i = 0; i + 1 < input.dim(); ++i) shape.m *= input.size(i);
  shape.widths[0] = input.size(-1);
  for (size_t l = 0; l < weights.size(); ++l) shape.widths[l + 1] = weights[l].size(0);
  return shape;
}

record::Row row_of(const char* op, const Tensor& input, at::TensorList weights) {
  std::string shapes = record::shapes_of({input});
  for (const Tensor& weight : weights) shapes += ", " + record::shapes_of({weight});
  return {op, "", shapes, dtype_name(input.scalar_type())};
}

struct MlpOutput {
  Tensor y;
  Tensor z;       // on a GPU the pre-activation of y, if its activation saves that
  Tensor hidden;  // what backward reads from the hidden layers, on the CPU from all
};

MlpOutput mlp_forward(const Tensor& input, at::TensorList weights, at::TensorList biases,
                      const MlpActivations& activations, Precision precision, bool need_saved) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  const auto type = input.scalar_type();
  const at::Device device = input.device();
  MlpForward call{shape_of(input, weights, precision), 0, activations.hidden, activations.output};
  MlpForward::Pointers args{};
  c10::DimVector sizes(input.sizes());
  sizes.back() = call.shape.widths[weights.size()];
  MlpOutput out{empty_output(sizes, type, device), {}, {}};
  if (need_saved && device.is_cpu())
    out.hidden = empty_output({mlp_saved_elements(call.shape, activations.hidden, activations.output)}, type, device);
  if (need_saved && !device.is_cpu() && saved_by_linear(activations.output) == Saved::input)
    out.z = empty_output(sizes, type, device);
  if (need_saved && !device.is_cpu())
    out.hidden =
        empty_output({mlp_hidden_matrices(call.shape, activations.hidden), call.shape.m, mlp_hidden_stride(call.shape)},
                     type, device);
  if (call.shape.m == 0) return out;

  const Tensor x = as_rows(input);
  args.x = x.const_data_ptr();
  call.x_row_stride = x.stride(0);
  variable_list kept;
  for (size_t l = 0; l < weights.size(); ++l) {
    kept.push_back(weights[l].contiguous());
    args.w[l] = kept.back().const_data_ptr();
    if (!biases[l].defined()) continue;
    kept.push_back(biases[l].contiguous());
    args.bias[l] = kept.back().const_data_ptr();
  }
  args.y = out.y.mutable_data_ptr();
  args.z = out.z.defined() ? out.z.mutable_data_ptr() : nullptr;
  args.hidden_outputs = out.hidden.defined() && out.hidden.numel() > 0 ? out.hidden.mutable_data_ptr() : nullptr;
  run(call, args, device, [&] { return row_of("mlp", input, weights); });
  return out;
}

// The gradients of the input, of the weights and of the biases, in this order, as far as `needs` asks for them.
variable_list mlp_backward(const Tensor& grad_output, const Tensor& saved, const Tensor& input, at::TensorList weights,
                           const Tensor& hidden, const MlpActivations& activations, Precision precision, Needs needs) {
  const auto type = input.scalar_type();
  const at::Device device = input.device();
  const size_t layers = weights.size();
  variable_list result(1 + 2 * layers);
  MlpBackward call{shape_of(input, weights, precision), 0, 0, activations.hidden, activations.output};
  MlpBackward::Pointers args{};
  if (needs(0)) result[0] = empty_output(input.sizes(), type, device);
  for (size_t l = 0; l < layers; ++l) {
    if (needs(1 + l)) result[1 + l] = empty_output(weights[l].sizes(), type, device);
    if (needs(1 + layers + l)) result[1 + layers + l] = empty_output({weights[l].size(0)}, type, device);
  }
  if (call.shape.m == 0) {  // empty sums
    for (const Tensor& gradient : result)
      if (gradient.defined()) gradient.zero_();
    return result;
  }

  const auto data = [](const Tensor& tensor) { return tensor.defined() ? tensor.mutable_data_ptr() : nullptr; };
  const Tensor g = as_rows(grad_output), x = as_rows(input);
  args.grad_y = g.const_data_ptr();
  call.grad_y_row_stride = g.stride(0);
  args.saved = saved.defined() ? saved.const_data_ptr() : nullptr;
  args.x = x.const_data_ptr();
  call.x_row_stride = x.stride(0);
  variable_list kept;
  for (size_t l = 0; l < layers; ++l) {
    kept.push_back(weights[l].contiguous());
    args.w[l] = kept.back().const_data_ptr();
    args.grad_w[l] = data(result[1 + l]);
    args.grad_bias[l] = data(result[1 + layers + l]);
  }
  args.hidden_outputs = hidden.const_data_ptr();
  args.grad_x = data(result[0]);
  run(call, args, device, [&] { return row_of("mlp_backward", input, weights); });
  return result;
}

// mlp_backward in differentiable ops, from the arguments of forward alone. For gradients that will be differentiated
// again, or that are batched or dual.
variable_list composite_backward(const Tensor& grad_output, const Tensor& input, at::TensorList weights,
                                 at::TensorList biases, const MlpActivations& activations, Needs needs) {
  const size_t layers = weights.size();
  const auto activation_of = [&](size_t l) { return l + 1 == layers ? activations.output : activations.hidden; };
  const auto rows = [](const Tensor& tensor) { return tensor.reshape({-1, tensor.size(-1)}); };
  variable_list y{rows(input)}, saved;
  for (size_t l = 0; l < layers; ++l) {
    const Activation f = activation_of(l);
    const Tensor z = linear(y[l], weights[l], biases[l].defined() ? optional<Tensor>(biases[l]) : std::nullopt, {});
    y.push_back(f.kind == ActivationKind::identity ? z : activation(z, f));
    saved.push_back(saved_by_linear(f) == Saved::input ? z : y.back());
  }
  variable_list result(1 + 2 * layers);
  Tensor g = rows(grad_output);
  for (size_t l = layers; l-- > 0;) {
    const Activation f = activation_of(l);
    if (f.kind != ActivationKind::identity) g = differentiable_activation_backward(g, saved[l], f, saved_by_linear(f));
    if (needs(1 + l)) result[1 + l] = product(g.t(), y[l]);
    if (needs(1 + layers + l)) result[1 + layers + l] = g.sum(0);
    g = product(g, weights[l]);
  }
  if (needs(0)) result[0] = g.reshape(input.sizes());
  return result;
}

std::vector<double> packed(const MlpActivations& activations) {
  std::vector<double> values;
  for (const Activation& f : {activations.hidden, activations.output})
    values.insert(values.end(), {static_cast<double>(f.kind), f.a, f.b});
  return values;
}
MlpActivations unpacked(const std::vector<double>& values) {
  const auto activation_at = [&](size_t i) {
    return Activation{static_cast<ActivationKind>(static_cast<int>(values[i])), values[i + 1], values[i + 2]};
  };
  return {activation_at(0), activation_at(3)};
}

struct MlpOp {
  struct Args {
    MlpActivations activations;
    Precision precision;
  };
  static std::string name(const Args&) { return "mlp"; }
  static c10::IValue pack(const Args& args) {
    std::vector<double> values = packed(args.activations);
    values.push_back(static_cast<double>(args.precision));
    return values;
  }
  static Args unpack(const c10::IValue& value) {
    const auto values = value.toDoubleVector();
    return {unpacked(values), static_cast<Precision>(static_cast<int>(values[6]))};
  }

  // saved: hidden, y or z, input, weights, biases.
  static variable_list gradients(const Args& args, at::TensorList saved, const variable_list& grads, Needs needs) {
    const size_t layers = (saved.size() - 3) / 2;
    if (!grads[0].defined()) return variable_list(1 + 2 * layers);
    const Tensor& input = saved[2];
    const at::TensorList weights(saved.data() + 3, layers), biases(saved.data() + 3 + layers, layers);
    if (at::GradMode::is_enabled() || !fast_door::is_plain(grads[0]))
      return composite_backward(grads[0], input, weights, biases, args.activations, needs);
    return mlp_backward(grads[0], saved[1], input, weights, saved[0], args.activations, args.precision, needs);
  }
};

// Networks of the CPU that are too wide for one kernel: linear's kernels, layer by layer, as one op.
struct LayersOp {
  using Args = MlpActivations;
  static std::string name(const Args&) { return "mlp"; }
  static c10::IValue pack(const Args& args) { return packed(args); }
  static Args unpack(const c10::IValue& value) { return unpacked(value.toDoubleVector()); }

  // saved: input, weights, biases, the outputs of hidden layers, what each layer's derivative is formed from.
  static variable_list gradients(const Args& args, at::TensorList saved, const variable_list& grads, Needs needs) {
    const size_t layers = saved.size() / 4;
    variable_list result(1 + 2 * layers);
    if (!grads[0].defined()) return result;
    const at::TensorList weights = saved.slice(1, layers), biases = saved.slice(1 + layers, layers);
    if (at::GradMode::is_enabled() || !fast_door::is_plain(grads[0]))
      return composite_backward(grads[0], saved[0], weights, biases, args, needs);
    const at::TensorList outputs = saved.slice(1 + 2 * layers, layers - 1), derived = saved.slice(3 * layers, layers);
    size_t first = 0;  // no layer before it needs a gradient
    if (!needs(0))
      while (first < layers && !needs(1 + first) && !needs(1 + layers + first)) ++first;
    Tensor g = grads[0];
    for (size_t l = layers; l-- > first;) {
      const Tensor& input = l == 0 ? saved[0] : outputs[l - 1];
      const Activation& f = l + 1 == layers ? args.output : args.hidden;
      const bool wants_input = l == 0 ? needs(0) : l > first;
      c10::DimVector sizes(g.sizes());
      sizes.back() = weights[l].size(1);
      auto found = linear_backward(g, derived[l], input, weights[l], f,
                                   {wants_input, needs(1 + l), needs(1 + layers + l)}, sizes, sizes.back());
      g = found[0];
      result[1 + l] = found[1];
      result[1 + layers + l] = found[2];
    }
    if (needs(0)) result[0] = g;
    return result;
  }
};

Tensor mlp_layers(const Tensor& input, at::TensorList weights, at::TensorList biases, const MlpActivations& activations,
                  const variable_list& operands, bool records) {
  const size_t layers = weights.size();
  variable_list outputs, derived;
  Tensor y = input;
  {
    const at::AutoDispatchBelowADInplaceOrView guard;
    for (size_t l = 0; l < layers; ++l) {
      const bool last = l + 1 == layers;
      const Activation& f = last ? activations.output : activations.hidden;
      LinearOutput out =
          linear_forward(y, weights[l], biases[l].defined() ? optional<Tensor>(biases[l]) : std::nullopt, f, records);
      y = out.y;
      if (!last) outputs.push_back(records && needs_grad(weights[l + 1]) ? y : Tensor());
      derived.push_back(f.kind == ActivationKind::identity ? Tensor() : out.z.defined() ? out.z : y);
    }
  }
  if (!records) return y;
  const auto node = make_node<LayersOp>(activations, operands);
  torch::autograd::set_history(y, node);
  for (const variable_list* const list : std::initializer_list<const variable_list*>{&operands, &outputs, &derived})
    for (const Tensor& tensor : *list) save(node, tensor);
  return y;
}

}  // namespace

Tensor mlp(const Tensor& input, at::TensorList weights, at::TensorList biases, Activation hidden, Activation output) {
  bool records = needs_grad(input);
  variable_list operands{input};
  for (const at::TensorList list : {weights, biases})
    for (const Tensor& tensor : list) {
      operands.push_back(tensor);
      records = records || needs_grad(tensor);
    }
  records = records && autograd_records();
  const Precision precision = gpu::precision(input);
  if (input.is_cpu() && !mlp_fits_cpu(shape_of(input, weights, precision)))
    return mlp_layers(input, weights, biases, {hidden, output}, operands, records);
  auto [y, z, hidden_outputs] = mlp_forward(input, weights, biases, {hidden, output}, precision, records);
  if (!records) return y;
  const auto node = make_node<MlpOp>({{hidden, output}, precision}, operands);
  torch::autograd::set_history(y, node);
  const bool reads_y = output.kind != ActivationKind::identity && !input.is_cpu();
  operands.insert(operands.begin(), !reads_y ? Tensor() : z.defined() ? z : y);
  operands.insert(operands.begin(), hidden_outputs);
  for (const Tensor& operand : operands) save(node, operand);
  return y;
}

bool mlp_accepts(const Tensor& input, at::TensorList weights, at::TensorList biases) {
  const bool on_cpu = input.is_cpu();
  if (!(on_cpu || gpu::takes(input.device())) || input.dim() < 1 || weights.size() != biases.size() ||
      weights.empty() || weights.size() > static_cast<size_t>(kMostMlpLayers))
    return false;
  int64_t features = input.size(-1);
  for (size_t l = 0; l < weights.size(); ++l) {
    const Tensor &w = weights[l], &b = biases[l];
    if (w.dim() != 2 || w.size(1) != features) return false;
    features = w.size(0);
    if (b.defined() && (b.dim() != 1 || b.size(0) != features)) return false;
  }
  if (on_cpu) return true;
  const gpu::Current current(input.device());
  return planned(MlpForward{shape_of(input, weights, gpu::precision(input)), features, {}, {}}, input.device(), {})
             .runner != nullptr;
}

namespace {

// ---- the fast door

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

py::object mlp_fast(py::handle input, py::handle weights, py::handle biases, int kind, double a, double b,
                    int output_kind, double output_a, double output_b) {
  if (!fast_door::ambient_is_plain() || !fast_door::is_plain(input.ptr())) return not_implemented();
  Tensor x = THPVariable_Unpack(input.ptr());
  std::vector<Tensor> w, bs;
  if (!read_tensors(weights.ptr(), w) || !read_tensors(biases.ptr(), bs)) return not_implemented();
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

}  // namespace

void bind_mlp(py::module_& m) { fast_def<&mlp_fast>(m, "mlp"); }

}  // namespace fastops
