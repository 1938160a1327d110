#include "../kernels/batch_norm/batch_norm.h"

#include <ATen/ATen.h>

#include "aten.h"
#include "binding.h"
#include "call.h"
#include "node.h"
#include "sizes.h"

namespace fastops {
namespace {

struct Operands {
  const Tensor& input;
  const optional<Tensor>&weight, &bias, &residual, &running_mean, &running_var;
};

struct Options {
  bool training;
  double momentum, eps;
  Activation activation;
};

// y = f(batch_norm(x) + residual), and the mean and 1 / sqrt(variance + eps) of every channel, float32 (float64 for
// float64): (2, channels), undefined if not wanted.
struct Output {
  Tensor y, stats;
};

at::ScalarType stats_type(at::ScalarType type) { return type == at::kDouble ? at::kDouble : at::kFloat; }

// The dtype of weight, bias and running statistics: the input's, or float32 for all of them, as autocast mixes them.
at::ScalarType parameter_type(const Operands& o) {
  for (const auto* parameter : {&o.weight, &o.bias, &o.running_mean, &o.running_var})
    if (*parameter) return (*parameter)->scalar_type();
  return o.input.scalar_type();
}

// What of these operands does not fit; "" where everything does.
template <class Int>
std::string batch_norm_problem(const Tensor& input, const optional<Tensor>& running_mean,
                               const optional<Tensor>& running_var, const optional<Tensor>& weight,
                               const optional<Tensor>& bias, const optional<Tensor>& residual, bool training) {
  const auto x = sizes_as<Int>(input);
  if (x.size() < 2) return c10::str("input must have shape (N, C, ...), got ", x);
  if (bool(running_mean) != bool(running_var))
    return "running_mean and running_var must both be given, or both be None";
  if (!training && !running_mean) return "running_mean and running_var must be given unless training, got None";
  for (const auto& [tensor, name] :
       {std::pair(&running_mean, "running_mean"), {&running_var, "running_var"}, {&weight, "weight"}, {&bias, "bias"}})
    if (*tensor && sizes_differ(sizes_as<Int>(**tensor), x.slice(1, 1)))
      return c10::str(name, " must have shape (", x[1], ",) (input's channels), got ", sizes_as<Int>(**tensor));
  if (residual && sizes_differ(sizes_as<Int>(*residual), x))
    return c10::str("residual must have input's shape ", x, ", got ", sizes_as<Int>(*residual));
  if constexpr (!is_symbolic<Int>)
    if (training && input.numel() == x[1])
      return c10::str("training needs more than one value of each channel, got input of shape ", x);
  return {};
}

template <class Int>
void check_operands(const Operands& o, bool training) {
  check_input(o.input, "batch_norm", "input");
  const auto type = o.input.scalar_type(), parameters = parameter_type(o);
  TORCH_CHECK(parameters == type || (parameters == at::kFloat && type != at::kDouble),
              "batch_norm: weight, bias and running statistics must have the input's dtype ", type,
              ", or float32 for a 16-bit input, got ", parameters);
  for (const auto& [tensor, name] : {std::pair(&o.weight, "weight"),
                                     {&o.bias, "bias"},
                                     {&o.running_mean, "running_mean"},
                                     {&o.running_var, "running_var"}}) {
    if (!*tensor) continue;
    check_tensor(**tensor, "batch_norm", name, o.input.device());
    TORCH_CHECK((*tensor)->scalar_type() == parameters, "batch_norm: ", name, " must have dtype ", parameters,
                ", as the other parameters, got ", (*tensor)->scalar_type());
  }
  if (o.residual) {
    check_tensor(*o.residual, "batch_norm", "residual", o.input.device());
    check_dtype(*o.residual, type, "batch_norm", "residual");
  }
  const std::string problem =
      batch_norm_problem<Int>(o.input, o.running_mean, o.running_var, o.weight, o.bias, o.residual, training);
  TORCH_CHECK(problem.empty(), "batch_norm: ", problem);
}

// A tensor of the input's sizes, contiguous in the memory format that PyTorch takes the input for.
template <class Int>
Tensor empty_like_input(const Tensor& input) {
  const auto format = input.suggest_memory_format();
  const auto type = input.scalar_type();
  if constexpr (is_symbolic<Int>) {
    return at::empty_symint(input.sym_sizes(), input.options(), format);
  } else {
    if (format == at::MemoryFormat::Contiguous) return empty_output(input.sizes(), type, input.device());
    const auto strides = input.dim() == 5 ? c10::get_channels_last_strides_3d(input.sizes())
                                          : c10::get_channels_last_strides_2d(input.sizes());
    return empty_output_strided(input.sizes(), strides, type, input.device());
  }
}

struct Extents {
  int64_t outer, channels, inner;
};
// Of a tensor that is contiguous in this format.
Extents extents_of(const Tensor& x, at::MemoryFormat format) {
  const int64_t channels = x.size(1);
  if (format != at::MemoryFormat::Contiguous) return {x.numel() / channels, channels, 1};
  return {x.size(0), channels, x.numel() / (x.size(0) * channels)};
}

record::Row row_of(const char* op, const Tensor& input) {
  return {op, "", record::shapes_of({input}), dtype_name(input.scalar_type())};
}

const void* data_of(const optional<Tensor>& tensor) { return tensor ? tensor->const_data_ptr() : nullptr; }

optional<Tensor> contiguous(const optional<Tensor>& tensor) {
  return tensor ? optional<Tensor>(tensor->contiguous()) : std::nullopt;
}

// Running statistics are updated where they lie; they are contiguous. The operands have been checked.
Output forward(const Operands& o, const Options& options, bool need_stats) {
  const auto format = o.input.suggest_memory_format();
  const Tensor x = o.input.contiguous(format);
  const auto type = x.scalar_type();
  Output out{empty_like_input<int64_t>(o.input), {}};
  const int64_t channels = x.size(1);
  if (need_stats) out.stats = empty_output({2, channels}, stats_type(type), x.device());
  if (x.numel() == 0) {
    if (need_stats) out.stats.zero_();
    return out;
  }
  const optional<Tensor> weight = contiguous(o.weight), bias = contiguous(o.bias);
  const Tensor residual = o.residual ? o.residual->contiguous(format) : Tensor();
  const Extents extents = extents_of(x, format);
  const BatchNormForward call{.dtype = to_dtype(type),
                              .param_dtype = to_dtype(parameter_type(o)),
                              .activation = options.activation,
                              .training = options.training,
                              .with_gamma = bool(weight),
                              .with_beta = bool(bias),
                              .with_residual = residual.defined(),
                              .with_running = bool(o.running_mean),
                              .with_stats = need_stats,
                              .eps = options.eps,
                              .outer = extents.outer,
                              .channels = extents.channels,
                              .inner = extents.inner};
  char* const stats = need_stats ? static_cast<char*>(out.stats.mutable_data_ptr()) : nullptr;
  run(call,
      {.x = x.const_data_ptr(),
       .gamma = data_of(weight),
       .beta = data_of(bias),
       .residual = data_or_null(residual),
       .y = out.y.mutable_data_ptr(),
       .mean = stats,
       .rstd = need_stats ? stats + channels * static_cast<int64_t>(out.stats.element_size()) : nullptr,
       .running_mean = const_cast<void*>(data_of(o.running_mean)),
       .running_var = const_cast<void*>(data_of(o.running_var)),
       .momentum = options.momentum},
      x.device(), [&] { return row_of("batch_norm", o.input); });
  return out;
}

// What the derivative of a fused activation is computed from. y is saved only where forming z again would need the
// residual: it is one tensor less to read than x and y.
Saved saved_with(Activation activation, bool with_residual) {
  const Saved kind = saved_by_linear(activation);
  return kind == Saved::output && !with_residual ? Saved::input : kind;
}

// saved: residual or y, as saved_with says, or undefined. The gradients of input, weight, bias and residual.
template <class Int>
std::array<Tensor, 4> new_norm_gradients(const Tensor& grad_output, const Tensor& input, const Tensor& stats,
                                         at::ScalarType parameters, std::array<bool, 4> output_mask) {
  check_input(grad_output, "batch_norm_backward", "grad_output");
  const auto device = grad_output.device();
  check_tensor(input, "batch_norm_backward", "input", device);
  check_dtype(grad_output, input.scalar_type(), "batch_norm_backward", "grad_output");
  TORCH_CHECK(!sizes_differ(sizes_as<Int>(grad_output), sizes_as<Int>(input)),
              "batch_norm_backward: grad_output must have input's shape ", sizes_as<Int>(input), ", got ",
              sizes_as<Int>(grad_output));
  const Int channels = sizes_as<Int>(input)[1];
  TORCH_CHECK(!sizes_differ<Int>(sizes_as<Int>(stats), {Int(2), channels}) &&
                  stats.scalar_type() == stats_type(input.scalar_type()),
              "batch_norm_backward: stats must be of shape (2, ", channels, ") and ", stats_type(input.scalar_type()));
  std::array<Tensor, 4> out;
  if (output_mask[0]) out[0] = empty_like_input<Int>(input);
  for (const size_t i : {1, 2})
    if (output_mask[i]) out[i] = new_tensor<Int>({channels}, parameters, device);
  if (output_mask[3]) out[3] = empty_like_input<Int>(input);
  return out;
}

std::array<Tensor, 4> backward(const Tensor& grad_output, const Tensor& input, const Tensor& weight, const Tensor& bias,
                               const Tensor& saved, const Tensor& stats, bool training, Activation activation,
                               Saved kind, at::ScalarType parameters, std::array<bool, 4> output_mask) {
  std::array<Tensor, 4> out = new_norm_gradients<int64_t>(grad_output, input, stats, parameters, output_mask);
  if (input.numel() == 0) {  // empty sums
    for (Tensor& gradient : out)
      if (gradient.defined()) gradient.zero_();
    return out;
  }
  if (!output_mask[0] && !output_mask[1] && !output_mask[2] && !output_mask[3]) return out;
  const auto format = input.suggest_memory_format();
  const Tensor x = input.contiguous(format), g = grad_output.contiguous(format);
  const bool reads = kind != Saved::nothing && saved.defined();
  const Tensor s = reads ? saved.contiguous(format) : Tensor();
  const Tensor gamma = weight.defined() ? weight.contiguous() : weight,
               beta = bias.defined() ? bias.contiguous() : bias;
  const Extents extents = extents_of(x, format);
  const BatchNormBackward call{.dtype = to_dtype(x.scalar_type()),
                               .param_dtype = to_dtype(parameters),
                               .activation = activation,
                               .training = training,
                               .saved_kind = kind,
                               .with_gamma = gamma.defined(),
                               .with_beta = beta.defined(),
                               .with_residual = reads && kind == Saved::input,
                               .with_grad_x = output_mask[0],
                               .with_grad_gamma = output_mask[1],
                               .with_grad_beta = output_mask[2],
                               .with_grad_residual = output_mask[3],
                               .outer = extents.outer,
                               .channels = extents.channels,
                               .inner = extents.inner};
  const char* const numbers = static_cast<const char*>(stats.const_data_ptr());
  run(call,
      {.grad_y = g.const_data_ptr(),
       .x = x.const_data_ptr(),
       .gamma = data_or_null(gamma),
       .beta = data_or_null(beta),
       .saved = data_or_null(s),
       .mean = numbers,
       .rstd = numbers + extents.channels * static_cast<int64_t>(stats.element_size()),
       .grad_x = mutable_or_null(out[0]),
       .grad_gamma = mutable_or_null(out[1]),
       .grad_beta = mutable_or_null(out[2]),
       .grad_residual = mutable_or_null(out[3])},
      x.device(), [&] { return row_of("batch_norm_backward", grad_output); });
  return out;
}

struct BatchNormOp {
  struct Args {
    bool training;
    double eps;
    Activation activation;
    Saved kind;
    at::ScalarType parameters;
    bool with_residual;
  };
  static std::string name(const Args&) { return "batch_norm"; }
  static c10::IValue pack(const Args& args) {
    return std::vector<double>{static_cast<double>(args.training),
                               args.eps,
                               static_cast<double>(args.activation.kind),
                               args.activation.a,
                               args.activation.b,
                               static_cast<double>(args.kind),
                               static_cast<double>(args.parameters),
                               static_cast<double>(args.with_residual)};
  }
  static Args unpack(const c10::IValue& packed) {
    const auto v = packed.toDoubleVector();
    return {v[0] != 0,
            v[1],
            {static_cast<ActivationKind>(static_cast<int>(v[2])), v[3], v[4]},
            static_cast<Saved>(static_cast<int>(v[5])),
            static_cast<at::ScalarType>(static_cast<int>(v[6])),
            v[7] != 0};
  }

  // saved: input (unless only the residual is recorded and y is all that f' needs), weight, bias (if z is formed
  // again), residual or y, and the statistics.
  static variable_list gradients(const Args& args, at::TensorList saved, const variable_list& grads, Needs needs) {
    variable_list result(4);
    const Tensor& grad = grads[0];
    if (!grad.defined()) return result;
    const bool plain = !at::GradMode::is_enabled() && fast_door::is_plain(grad);
    if (!saved[0].defined()) {  // only the residual is recorded
      result[3] = args.kind != Saved::output ? grad
                  : plain ? activation_backward(grad, saved[3], args.activation, Saved::output)
                          : differentiable_activation_backward(grad, saved[3], args.activation, Saved::output);
      return result;
    }
    if (!plain) return differentiable(args, saved, grad, needs);
    const bool identity = args.activation.kind == ActivationKind::identity;
    auto gradients = backward(grad, saved[0], saved[1], saved[2], saved[3], saved[4], args.training, args.activation,
                              args.kind, args.parameters, {needs(0), needs(1), needs(2), needs(3) && !identity});
    std::move(gradients.begin(), gradients.end(), result.begin());
    if (needs(3) && identity) result[3] = grad;
    return result;
  }

  // The gradient will be differentiated again, or is batched or dual: every step is a differentiable op.
  static variable_list differentiable(const Args& args, at::TensorList saved, const Tensor& grad, Needs needs) {
    const auto type = saved[0].scalar_type(), wide = stats_type(type);
    const Tensor x = saved[0].to(wide);
    std::vector<int64_t> shape(static_cast<size_t>(x.dim()), 1), others;
    shape[1] = x.size(1);
    for (int64_t i = 0; i < x.dim(); ++i)
      if (i != 1) others.push_back(i);
    const auto spread = [&](const Tensor& t) { return t.to(wide).reshape(shape); };
    Tensor mean, rstd;
    if (args.training) {
      mean = x.mean(others, /*keepdim=*/true);
      rstd = ((x - mean).square().mean(others, /*keepdim=*/true) + args.eps).rsqrt();
    } else {
      mean = spread(saved[4][0]);
      rstd = spread(saved[4][1]);
    }
    const Tensor normal = (x - mean) * rstd;
    Tensor g = grad;
    if (args.kind == Saved::output) {
      g = differentiable_activation_backward(grad, saved[3], args.activation, Saved::output);
    } else if (args.kind == Saved::input) {
      Tensor z = saved[1].defined() ? normal * spread(saved[1]) : normal;
      if (saved[2].defined()) z = z + spread(saved[2]);
      if (saved[3].defined()) z = z + saved[3];
      z = z.to(type);
      const bool from_y = saved_by_default(args.activation) == Saved::output;  // sigmoid and tanh
      if (from_y) z = args.activation.kind == ActivationKind::tanh ? z.tanh() : z.sigmoid();
      g = differentiable_activation_backward(grad, z, args.activation, from_y ? Saved::output : Saved::input);
    }
    variable_list result(4);
    if (needs(3)) result[3] = g;
    g = g.to(wide);
    if (needs(0)) {
      Tensor inner = g;
      if (args.training)
        inner = g - g.mean(others, /*keepdim=*/true) - normal * (g * normal).mean(others, /*keepdim=*/true);
      result[0] = (saved[1].defined() ? inner * rstd * spread(saved[1]) : inner * rstd).to(type);
    }
    if (needs(1)) result[1] = (g * normal).sum(others).to(args.parameters);
    if (needs(2)) result[2] = g.sum(others).to(args.parameters);
    return result;
  }
};

Tensor batch_norm(const Operands& o, const Options& options) {
  const bool records =
      is_recorded(needs_grad(o.input) || needs_grad(o.weight) || needs_grad(o.bias) || needs_grad(o.residual), o.input,
                  o.weight, o.bias, o.residual);
  auto [y, stats] = forward(o, options, /*need_stats=*/records);
  if (!records) return y;
  const Saved kind = saved_with(options.activation, bool(o.residual));
  const auto node = make_node<BatchNormOp>(
      {options.training, options.eps, options.activation, kind, parameter_type(o), bool(o.residual)}, o.input, o.weight,
      o.bias, o.residual);
  torch::autograd::set_history(y, node);
  const bool again = kind == Saved::input;
  const bool reads_input = again || needs_grad(o.input) || needs_grad(o.weight) || needs_grad(o.bias);
  save(node, reads_input ? o.input : none, o.weight.value_or(none), again ? o.bias.value_or(none) : none,
       again                   ? o.residual.value_or(none)
       : kind == Saved::output ? y
                               : none,
       stats);
  return y;
}

// ---- the general door

template <class Int>
std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_forward_op(
    const Tensor& input, const optional<Tensor>& weight, const optional<Tensor>& bias, const optional<Tensor>& residual,
    const optional<Tensor>& running_mean, const optional<Tensor>& running_var, bool training, double momentum,
    double eps, c10::string_view activation, double a, double b, bool need_stats) {
  const Operands given{input, weight, bias, residual, running_mean, running_var};
  check_operands<Int>(given, training);
  const auto updated = [&](const optional<Tensor>& running) -> optional<Tensor> {
    if (!running || !training) return running;
    if constexpr (is_symbolic<Int>)
      return at::empty_symint(running->sym_sizes(), running->options());
    else
      return running->clone(at::MemoryFormat::Contiguous);
  };
  const optional<Tensor> mean = updated(contiguous(running_mean)), var = updated(contiguous(running_var));
  Output out;
  if constexpr (is_symbolic<Int>) {
    out.y = empty_like_input<Int>(input);
    if (need_stats)
      out.stats = new_tensor<Int>({Int(2), input.sym_size(1)}, stats_type(input.scalar_type()), input.device());
  } else {
    out = forward({input, weight, bias, residual, mean, var},
                  {training, momentum, eps, make_activation(activation, a, b)}, need_stats);
  }
  const auto result = [&](const optional<Tensor>& tensor) { return training && tensor ? *tensor : Tensor(); };
  return {out.y,
          out.stats.defined() ? out.stats : at::empty({0}, input.options().dtype(stats_type(input.scalar_type()))),
          or_empty(result(mean), running_mean.value_or(input)), or_empty(result(var), running_var.value_or(input))};
}

template <class Int>
std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_backward_op(const Tensor& grad_output, const Tensor& input,
                                                                  const optional<Tensor>& weight,
                                                                  const optional<Tensor>& bias,
                                                                  const optional<Tensor>& saved, const Tensor& stats,
                                                                  bool training, double, c10::string_view activation,
                                                                  double a, double b, std::array<bool, 4> output_mask) {
  const optional<Tensor> absent;
  const auto parameters = parameter_type({input, weight, bias, absent, absent, absent});
  const Activation f = make_activation(activation, a, b);
  std::array<Tensor, 4> out;
  if constexpr (is_symbolic<Int>) {
    out = new_norm_gradients<Int>(grad_output, input, stats, parameters, output_mask);
  } else {
    const bool identity = f.kind == ActivationKind::identity;
    auto mask = output_mask;
    mask[3] = mask[3] && !identity;
    out = backward(grad_output, input, weight.value_or(none), bias.value_or(none), saved.value_or(none), stats,
                   training, f, saved_with(f, saved.has_value()), parameters, mask);
    if (output_mask[3] && identity) {
      out[3] = empty_like_input<int64_t>(input);
      out[3].copy_(grad_output);
    }
  }
  const auto one = [&](size_t i) { return or_empty(out[i], i == 1 || i == 2 ? weight.value_or(input) : input); };
  return {one(0), one(1), one(2), one(3)};
}

template <class Int>
void implement_batch_norm(torch::Library& m) {
  m.impl("batch_norm_forward", batch_norm_forward_op<Int>);
  m.impl("batch_norm_backward", batch_norm_backward_op<Int>);
}

// ---- the fast door

optional<Tensor> operand(py::handle object) {
  return object.is_none() ? std::nullopt : optional<Tensor>(THPVariable_Unpack(object.ptr()));
}

py::object batch_norm_fast(py::handle input, py::handle running_mean, py::handle running_var, py::handle weight,
                           py::handle bias, py::handle training, py::handle momentum, py::handle eps,
                           py::handle residual, int kind, double a, double b) {
  if (!fast_door::ambient_is_plain() || !fast_door::is_plain(input.ptr())) return not_implemented();
  for (const py::handle object : {running_mean, running_var, weight, bias, residual})
    if (!object.is_none() && !fast_door::is_plain(object.ptr())) return not_implemented();
  Options options{false, 0, 0, make_activation(kind, a, b)};
  if (!read_bool(training.ptr(), options.training) || !PyFloat_CheckExact(momentum.ptr()) ||
      !PyFloat_CheckExact(eps.ptr()))
    return not_implemented();
  options.momentum = PyFloat_AS_DOUBLE(momentum.ptr());
  options.eps = PyFloat_AS_DOUBLE(eps.ptr());

  if (options.eps < 0 || (options.training && options.eps == 0)) return not_implemented();

  const Tensor& x = THPVariable_Unpack(input.ptr());
  const optional<Tensor> w = operand(weight), bias_tensor = operand(bias), more = operand(residual),
                         mean = operand(running_mean), var = operand(running_var);
  const Operands operands{x, w, bias_tensor, more, mean, var};
  const auto type = x.scalar_type(), parameters = parameter_type(operands);
  if (!is_supported(type) || x.numel() == 0) return not_implemented();
  if (parameters != type && (parameters != at::kFloat || type == at::kDouble)) return not_implemented();
  for (const auto* tensor : {&w, &bias_tensor, &mean, &var})
    if (*tensor && ((*tensor)->scalar_type() != parameters || !is_on(**tensor, x.device()))) return not_implemented();
  for (const auto* tensor : {&mean, &var})
    if (*tensor && ((*tensor)->requires_grad() || !(*tensor)->is_contiguous())) return not_implemented();
  if (more && (more->scalar_type() != type || !is_on(*more, x.device()))) return not_implemented();
  if (!batch_norm_problem<int64_t>(x, mean, var, w, bias_tensor, more, options.training).empty())
    return not_implemented();
  return wrap(
      without_gil([] { return "batch_norm"; }, [&] { return batch_norm(operands, options); }, x, w, bias_tensor, more));
}

}  // namespace

std::array<Tensor, 3> batch_norm_with_statistics(const Tensor& input, const optional<Tensor>& weight,
                                                 const optional<Tensor>& bias, const optional<Tensor>& running_mean,
                                                 const optional<Tensor>& running_var, bool training, double momentum,
                                                 double eps) {
  Output out = forward({input, weight, bias, {}, running_mean, running_var}, {training, momentum, eps, {}},
                       /*need_stats=*/training);
  if (!training) return {std::move(out.y), Tensor(), Tensor()};
  return {std::move(out.y), out.stats.select(0, 0), out.stats.select(0, 1)};
}

std::array<Tensor, 3> batch_norm_gradients(const Tensor& grad_output, const Tensor& input,
                                           const optional<Tensor>& weight, const Tensor& mean, const Tensor& rstd,
                                           bool training, std::array<bool, 3> output_mask) {
  const auto parameters = weight ? weight->scalar_type() : input.scalar_type();
  auto out = backward(grad_output, input, weight.value_or(none), {}, {}, at::stack({mean, rstd}), training, {},
                      Saved::nothing, parameters, {output_mask[0], output_mask[1], output_mask[2], false});
  return {std::move(out[0]), std::move(out[1]), std::move(out[2])};
}

void implement_batch_norm(torch::Library& m, bool meta) {
  meta ? implement_batch_norm<c10::SymInt>(m) : implement_batch_norm<int64_t>(m);
}

void bind_batch_norm(py::module_& m) {
  fast_def<&batch_norm_fast>(m, "batch_norm");
  m.def("batch_norm_problem", &batch_norm_problem<int64_t>);
}

}  // namespace fastops
