#include <ATen/ATen.h>

#include "../kernels/linear/linear.h"
#include "aten.h"
#include "binding.h"
#include "call.h"
#include "node.h"
#include "sizes.h"

namespace fastops {
namespace {

// A tensor as a matrix: columns are its last dimension, rows all others. `tensor` is replaced by a contiguous copy only
// if the leading dimensions do not have one common stride.
Strides as_matrix(Tensor& tensor) {
  const int64_t dims = tensor.dim();
  if (dims == 1) return {0, tensor.stride(0)};
  if (dims > 2) {
    int64_t expected = -1;
    for (int64_t i = dims - 2; i >= 0; --i) {
      if (tensor.size(i) == 1) continue;
      if (expected >= 0 && tensor.stride(i) != expected) {
        tensor = tensor.contiguous();
        break;
      }
      expected = tensor.stride(i) * tensor.size(i);
    }
  }
  // The row stride is that of the innermost leading dimension with more than one element. Without one, there is one
  // row.
  int64_t row_stride = 0;
  for (int64_t i = dims - 2; i >= 0; --i) {
    if (tensor.size(i) != 1) {
      row_stride = tensor.stride(i);
      break;
    }
  }
  return {row_stride, tensor.stride(dims - 1)};
}

template <class Int>
Int rows_of(Sizes<Int> sizes) {
  Int rows = 1;
  for (size_t i = 0; i + 1 < sizes.size(); ++i) rows *= sizes[i];
  return rows;
}

// What of these shapes does not fit; "" where everything does.
template <class Int>
std::string linear_problem(const Tensor& input, const Tensor& weight, const optional<Tensor>& bias) {
  const auto x = sizes_as<Int>(input), w = sizes_as<Int>(weight);
  if (x.empty()) return "input must have shape (*, in_features), got a scalar";
  if (w.size() != 2 || differ(w[1], x.back()))
    return c10::str("weight must have shape (out_features, in_features) with in_features = ", x.back(),
                    " (input's last dimension), got ", w);
  if (bias && sizes_differ(sizes_as<Int>(*bias), w.slice(0, 1)))
    return c10::str("bias must have shape (", w[0], ",) (weight's out_features), got ", sizes_as<Int>(*bias));
  return {};
}

void check_operand(const Tensor& tensor, const Tensor& input, const char* name) {
  check_tensor(tensor, "linear", name, input.device());
  check_dtype(tensor, input.scalar_type(), "linear", name);
}

// The outputs of the forward pass, uninitialised.
template <class Int>
LinearOutput forward_outputs(const Tensor& input, const Tensor& weight, const optional<Tensor>& bias,
                             Activation activation, bool need_saved) {
  check_input(input, "linear", "input");
  check_operand(weight, input, "weight");
  if (bias) check_operand(*bias, input, "bias");
  const std::string problem = linear_problem<Int>(input, weight, bias);
  TORCH_CHECK(problem.empty(), "linear: ", problem);
  SizeVector<Int> sizes(sizes_as<Int>(input));
  sizes.back() = sizes_as<Int>(weight)[0];
  LinearOutput out;
  out.y = new_tensor<Int>(sizes, input.scalar_type(), input.device());
  if (need_saved && saved_by_linear(activation) == Saved::input)
    out.z = new_tensor<Int>(sizes, input.scalar_type(), input.device());
  return out;
}

// Those of backward: the gradients that are wanted.
template <class Int>
std::array<Tensor, 3> new_linear_gradients(const Tensor& grad_output, const Tensor& saved, const Tensor& input,
                                           const Tensor& weight, Activation activation, std::array<bool, 3> output_mask,
                                           Sizes<Int> input_sizes, const Int& k) {
  check_input(grad_output, "linear_backward", "grad_output");
  const at::Device device = grad_output.device();
  for (const auto& [tensor, name] : {std::pair(&saved, "saved"), {&input, "input"}, {&weight, "weight"}})
    if (tensor->defined()) check_tensor(*tensor, "linear_backward", name, device);
  const auto type = grad_output.scalar_type();
  const auto sizes = sizes_as<Int>(grad_output);
  const Int n = sizes.back(), m = rows_of(sizes);
  TORCH_CHECK(
      activation.kind == ActivationKind::identity || (saved.defined() && !sizes_differ(sizes_as<Int>(saved), sizes)),
      "linear_backward: saved must have grad_output's shape ", sizes, ", got ",
      saved.defined() ? sizes_as<Int>(saved) : Sizes<Int>());
  TORCH_CHECK(!output_mask[0] || (weight.defined() && !sizes_differ<Int>(sizes_as<Int>(weight), {n, k})),
              "linear_backward: weight must have shape (", n, ", ", k, ")");
  TORCH_CHECK(!output_mask[1] || (input.defined() && !differ(sizes_as<Int>(input).back(), k) &&
                                  !differ(rows_of(sizes_as<Int>(input)), m)),
              "linear_backward: input must have ", m, " rows of ", k, " features");
  std::array<Tensor, 3> out;
  if (output_mask[0]) out[0] = new_tensor<Int>(input_sizes, type, device);
  if (output_mask[1]) out[1] = new_tensor<Int>({n, k}, type, device);
  if (output_mask[2]) out[2] = new_tensor<Int>({n}, type, device);
  return out;
}

// What PyTorch's settings (torch.set_float32_matmul_precision) allow of a product with this much work. On a CPU they
// change nothing below a certain size, and are not asked for there: looking them up takes 50 ns.
Precision precision_for(const Tensor& operand, int64_t work) {
  if (!operand.is_cpu()) return gpu::precision(operand);
  constexpr int64_t kLeastWork = 1 << 20;
  if (operand.scalar_type() != at::kFloat || work < kLeastWork) return Precision::highest;
  switch (at::globalContext().float32Precision(at::Float32Backend::MKLDNN, at::Float32Op::MATMUL)) {
    case at::Float32Precision::TF32:
      return Precision::high;
    case at::Float32Precision::BF16:
      return Precision::medium;
    default:
      return Precision::highest;
  }
}

// w_strides: from one output feature to the next, and from one input feature to the next.
void run_forward(const char* op, const Tensor& input, const Tensor& weight, Strides w_strides, const Tensor& b,
                 Activation activation, const LinearOutput& out) {
  const auto type = input.scalar_type();
  const int64_t n = out.y.size(-1);
  Tensor x = input;
  const Strides x_strides = as_matrix(x);
  const void *const x_data = x.const_data_ptr(), *const w_data = weight.const_data_ptr();
  const LinearForward call{.dtype = to_dtype(type),
                           .m = rows_of(input.sizes()),
                           .n = n,
                           .k = input.size(-1),
                           .x_strides = x_strides,
                           .w_strides = w_strides,
                           .y_row_stride = n,
                           .with_bias = b.defined(),
                           .bias_stride = b.defined() ? b.stride(0) : 1,
                           .activation = activation,
                           .with_z = out.z.defined(),
                           .precision = precision_for(input, rows_of(input.sizes()) * n * input.size(-1)),
                           .alignment = alignment_of({x_data, w_data})};
  run(call, {x_data, w_data, data_or_null(b), out.y.mutable_data_ptr(), mutable_or_null(out.z)}, input.device(),
      [&] { return record::Row{op, "", record::shapes_of({input, weight, b}), dtype_name(type)}; });
}

struct LinearOp {
  struct Args {
    Activation activation;
    std::vector<int64_t> input_sizes;  // empty if the input itself was saved
  };
  static std::string name(const Args&) { return "linear"; }
  static c10::IValue pack(const Args& args) {
    std::vector<double> values{static_cast<double>(args.activation.kind), args.activation.a, args.activation.b};
    values.insert(values.end(), args.input_sizes.begin(), args.input_sizes.end());
    return values;
  }
  static Args unpack(const c10::IValue& packed) {
    const auto values = packed.toDoubleVector();
    return {{static_cast<ActivationKind>(static_cast<int>(values[0])), values[1], values[2]},
            {values.begin() + 3, values.end()}};
  }

  // saved: input (if weight needs a gradient), weight (if input needs one), y or z. grads: of y, and of z if it exists.
  static variable_list gradients(const Args& args, at::TensorList saved, const variable_list& grads, Needs needs) {
    variable_list result(3);
    const Tensor &grad_y = grads[0], grad_z = grads.size() > 1 ? grads[1] : Tensor();
    if (!grad_y.defined() && !grad_z.defined()) return result;
    const Tensor &input = saved[0], &weight = saved[1], &output = saved[2];
    const Activation& activation = args.activation;

    // The gradient will be differentiated again, or is batched or dual (is_grads_batched, forward over reverse): every
    // step is a differentiable op.
    if (at::GradMode::is_enabled() || grad_z.defined() || !fast_door::is_plain(grad_y)) {
      Tensor g = grad_y;
      if (g.defined() && activation.kind != ActivationKind::identity)
        g = differentiable_activation_backward(g, output, activation, saved_by_linear(activation));
      if (grad_z.defined()) g = g.defined() ? g + grad_z : grad_z;
      const Tensor g2 = g.reshape({rows_of(g.sizes()), g.size(-1)});
      if (needs(0)) result[0] = product(g, weight);
      if (needs(1)) result[1] = product(g2.t(), input.reshape({rows_of(input.sizes()), input.size(-1)}));
      if (needs(2)) result[2] = g2.sum(0);
      return result;
    }

    const at::IntArrayRef sizes = input.defined() ? input.sizes() : at::IntArrayRef(args.input_sizes);
    auto gradients =
        linear_backward(grad_y, output, input, weight, activation, {needs(0), needs(1), needs(2)}, sizes, sizes.back());
    std::move(gradients.begin(), gradients.end(), result.begin());
    return result;
  }
};

}  // namespace

LinearOutput linear_forward(const Tensor& input, const Tensor& weight, const optional<Tensor>& bias,
                            Activation activation, bool need_saved) {
  LinearOutput out = forward_outputs<int64_t>(input, weight, bias, activation, need_saved);
  if (out.y.numel() == 0) return out;
  run_forward("linear", input, weight, {weight.stride(0), weight.stride(1)}, bias.value_or(Tensor()), activation, out);
  return out;
}

bool linear_accepts(const Tensor& input, const Tensor& weight, const optional<Tensor>& bias) {
  return linear_problem<int64_t>(input, weight, bias).empty();
}

Tensor product(const Tensor& a, const Tensor& b) {
  if (fast_door::is_plain(a) && fast_door::is_plain(b)) return linear(a, b.t(), std::nullopt, {});
  return at::matmul(a, b);
}

Tensor matrix_product(const Tensor& a, const Tensor& b, const optional<Tensor>& bias) {
  const LinearOutput out{empty_output({a.size(0), b.size(1)}, a.scalar_type()), {}};
  if (out.y.numel() > 0)
    run_forward(bias ? "addmm" : "mm", a, b, {b.stride(1), b.stride(0)}, bias.value_or(Tensor()), {}, out);
  return out.y;
}

std::array<Tensor, 3> linear_backward(const Tensor& grad_output, const Tensor& saved, const Tensor& input,
                                      const Tensor& weight, Activation activation, std::array<bool, 3> output_mask,
                                      at::IntArrayRef input_sizes, int64_t in_features) {
  std::array<Tensor, 3> out = new_linear_gradients<int64_t>(grad_output, saved, input, weight, activation, output_mask,
                                                            input_sizes, in_features);
  const auto type = grad_output.scalar_type();
  const auto device = grad_output.device();
  const int64_t n = grad_output.size(-1), m = rows_of(grad_output.sizes()), k = in_features;
  const bool identity = activation.kind == ActivationKind::identity;
  if (m == 0 || n == 0) {  // empty sums
    for (Tensor& gradient : out)
      if (gradient.defined()) gradient.zero_();
    return out;
  }

  Tensor g = grad_output, s = identity ? Tensor() : saved, x = output_mask[1] ? input : Tensor();
  const Tensor w = output_mask[0] ? weight : Tensor();
  const auto data = [](Tensor& tensor) {
    return tensor.defined() && tensor.numel() > 0 ? tensor.mutable_data_ptr() : nullptr;
  };
  // The CUDA kernels require unit column strides here (linear.h).
  if (!device.is_cpu() && saved_by_linear(activation) == Saved::input) {
    if (g.stride(-1) != 1) g = g.contiguous();
    if (s.stride(-1) != 1) s = s.contiguous();
  }
  void *const grad_x = data(out[0]), *const grad_w = data(out[1]), *const grad_bias = data(out[2]);
  if (grad_x == nullptr && grad_w == nullptr && grad_bias == nullptr) return out;
  const LinearBackward call{.dtype = to_dtype(type),
                            .m = m,
                            .n = n,
                            .k = k,
                            .grad_y_strides = as_matrix(g),
                            .saved_strides = s.defined() ? as_matrix(s) : Strides{},
                            .x_strides = x.defined() ? as_matrix(x) : Strides{},
                            .w_strides = w.defined() ? Strides{w.stride(0), w.stride(1)} : Strides{},
                            .activation = activation,
                            .with_grad_x = grad_x != nullptr,
                            .with_grad_w = grad_w != nullptr,
                            .with_grad_bias = grad_bias != nullptr,
                            .precision = precision_for(g, m * n * k),
                            .alignment = alignment_of({g.const_data_ptr(), data_or_null(x), data_or_null(w)})};
  run(call, {g.const_data_ptr(), data_or_null(s), data_or_null(x), data_or_null(w), grad_x, grad_w, grad_bias}, device,
      [&] {
        return record::Row{"linear_backward", "", record::shapes_of({grad_output, input, weight}), dtype_name(type)};
      });
  return out;
}

Tensor linear(const Tensor& input, const Tensor& weight, const optional<Tensor>& bias, Activation activation) {
  const bool grad_x = needs_grad(input), grad_w = needs_grad_of_view(weight);
  const bool records = is_recorded(grad_x || grad_w || needs_grad(bias), input, weight, bias);
  auto [y, z] = linear_forward(input, weight, bias, activation, /*need_saved=*/records);
  if (!records) return y;
  // z, the pre-activation, is a hidden output of the node: second-order gradients reach the inputs through it.
  const auto node = make_node<LinearOp>({activation, grad_w ? std::vector<int64_t>() : input.sizes().vec()}, input,
                                        grad_w ? weight : none, bias);
  torch::autograd::set_history(y, node);
  if (z.defined()) torch::autograd::set_history(z, node);
  const bool identity = activation.kind == ActivationKind::identity;
  save(node, grad_w ? input : none, grad_x ? weight : none, identity ? none : z.defined() ? z : y);
  return y;
}

namespace {

// ---- the general door

template <class Int>
std::tuple<Tensor, Tensor> linear_forward_op(const Tensor& input, const Tensor& weight, const optional<Tensor>& bias,
                                             c10::string_view activation, double a, double b, bool need_saved) {
  constexpr auto forward = is_symbolic<Int> ? forward_outputs<Int> : linear_forward;
  auto [y, z] = forward(input, weight, bias, make_activation(activation, a, b), need_saved);
  return {y, or_empty(z, y)};
}

template <class Int>
std::tuple<Tensor, Tensor, Tensor> linear_backward_op(const Tensor& grad_output, const optional<Tensor>& saved,
                                                      const Tensor& input, const Tensor& weight,
                                                      c10::string_view activation, double a, double b,
                                                      std::array<bool, 3> output_mask) {
  constexpr auto backward = [] {
    if constexpr (is_symbolic<Int>)
      return new_linear_gradients<Int>;
    else
      return linear_backward;
  }();
  return or_empty(backward(grad_output, saved.value_or(Tensor()), input, weight, make_activation(activation, a, b),
                           output_mask, sizes_as<Int>(input), sizes_as<Int>(weight)[1]),
                  grad_output);
}

template <class Int>
void implement_linear(torch::Library& m) {
  m.impl("linear_forward", linear_forward_op<Int>);
  m.impl("linear_backward", linear_backward_op<Int>);
}

// ---- the fast door

py::object linear_fast(py::handle input, py::handle weight, py::handle bias, int kind, double a, double b) {
  const Activation activation = make_activation(kind, a, b);
  return layer_fast(input, weight, bias, [&](const Tensor& x, const Tensor& w, const optional<Tensor>& bias_tensor) {
    if (!linear_problem<int64_t>(x, w, bias_tensor).empty()) return not_implemented();
    return wrap(without_gil([] { return "linear"; }, [&] { return fastops::linear(x, w, bias_tensor, activation); }, x,
                            w, bias_tensor));
  });
}

}  // namespace

void implement_linear(torch::Library& m, bool meta) {
  meta ? implement_linear<c10::SymInt>(m) : implement_linear<int64_t>(m);
}

void bind_linear(py::module_& m) {
  fast_def<&linear_fast>(m, "linear");
  m.def("linear_problem", &linear_problem<c10::SymInt>);
}

}  // namespace fastops
