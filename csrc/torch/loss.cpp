#include <ATen/ATen.h>

#include "../kernels/loss/loss.h"
#include "aten.h"
#include "binding.h"
#include "call.h"
#include "node.h"
#include "sizes.h"

namespace fastops {
namespace {

constexpr const char* kReductions[] = {"none", "mean", "sum"};

optional<Reduction> find_reduction(std::string_view name) {
  for (int i = 0; i < 3; ++i)
    if (name == kReductions[i]) return static_cast<Reduction>(i);
  return std::nullopt;
}

Reduction read_reduction(c10::string_view name) {
  const auto found = find_reduction({name.data(), name.size()});
  TORCH_CHECK_VALUE(found, "reduction: expected 'none', 'mean' or 'sum', got '", name, "'");
  return *found;
}

record::Row row_of(const char* op, std::initializer_list<Tensor> operands) {
  return {op, "", record::shapes_of(operands), dtype_name(operands.begin()->scalar_type())};
}

// ---- cross entropy

struct CrossEntropyArgs {
  Reduction reduction;
  int64_t ignore_index;
  double smoothing;
};

int64_t class_dim(const Tensor& input) { return input.dim() == 1 ? 0 : 1; }

// Whether the classes of a position lie next to each other although they are not the last dimension.
bool classes_lie_last(const Tensor& input) {
  return input.dim() > 2 && !input.is_contiguous_or_false() &&
         (input.is_contiguous_or_false(at::MemoryFormat::ChannelsLast) ||
          input.is_contiguous_or_false(at::MemoryFormat::ChannelsLast3d));
}

// A gradient for this input: in channels_last where the input is, else contiguous.
template <class Int>
Tensor empty_gradient(const Tensor& input) {
  if (!classes_lie_last(input)) return new_tensor<Int>(sizes_as<Int>(input), input.scalar_type(), input.device());
  return new_tensor_strided<Int>(sizes_as<Int>(input), strides_as<Int>(input), input.scalar_type(), input.device());
}

struct Classes {
  int64_t outer, classes, inner;
};
Classes classes_of(const Tensor& x) {
  const int64_t classes = x.size(class_dim(x)), positions = x.numel() / classes;
  if (x.dim() <= 2 || classes_lie_last(x)) return {positions, classes, 1};
  return {x.size(0), classes, positions / x.size(0)};
}

// What there are kernels for. PyTorch has the rest, and says what is wrong.
bool cross_entropy_accepts(const Tensor& input, const Tensor& target, const optional<Tensor>& weight,
                           double smoothing) {
  if (!is_supported(input.scalar_type()) || input.dim() == 0 || input.numel() == 0) return false;
  if (target.scalar_type() != at::kLong || !is_on(target, input.device()) || target.dim() != input.dim() - 1)
    return false;
  for (int64_t i = 0; i < target.dim(); ++i)
    if (target.size(i) != input.size(i == 0 ? 0 : i + 1)) return false;
  if (weight && (weight->scalar_type() != input.scalar_type() || !is_on(*weight, input.device()) ||
                 weight->dim() != 1 || weight->size(0) != input.size(class_dim(input)) || weight->requires_grad()))
    return false;
  return smoothing >= 0 && smoothing <= 1;
}

template <class Int>
void check_cross_entropy(const Tensor& input, const Tensor& target, const optional<Tensor>& weight, double smoothing) {
  check_input(input, "cross_entropy", "input");
  TORCH_CHECK(input.dim() > 0, "cross_entropy: input must have at least one dimension, got a scalar");
  TORCH_CHECK(target.scalar_type() == at::kLong && is_on(target, input.device()),
              "cross_entropy: target must be an int64 tensor on ", input.device(), ", got one of ",
              target.scalar_type(), " on ", target.device());
  const auto sizes = sizes_as<Int>(input);
  SizeVector<Int> expected(sizes);
  expected.erase(expected.begin() + class_dim(input));
  TORCH_CHECK(!sizes_differ<Int>(expected, sizes_as<Int>(target)), "cross_entropy: target must have shape ",
              Sizes<Int>(expected), ", got ", sizes_as<Int>(target));
  const Int classes = sizes[static_cast<size_t>(class_dim(input))];
  TORCH_CHECK(differ(classes, 0) || is_symbolic<Int>, "cross_entropy: input must have at least one class, got 0");
  if (weight) {
    check_tensor(*weight, "cross_entropy", "weight", input.device());
    check_dtype(*weight, input.scalar_type(), "cross_entropy", "weight");
    const auto shape = sizes_as<Int>(*weight);
    TORCH_CHECK(shape.size() == 1 && !differ(shape[0], classes), "cross_entropy: weight must have shape [", classes,
                "], got ", shape);
  }
  TORCH_CHECK(smoothing >= 0 && smoothing <= 1, "cross_entropy: label_smoothing must be between 0.0 and 1.0, got ",
              smoothing);
}

template <class Int>
Tensor empty_loss(const Tensor& input, const Tensor& target, Reduction reduction) {
  const auto sizes = reduction == Reduction::none ? sizes_as<Int>(target) : Sizes<Int>();
  return new_tensor<Int>(sizes, input.scalar_type(), input.device());
}

struct CrossEntropyOutput {
  Tensor y, statistics;
};

CrossEntropyOutput cross_entropy_forward(const Tensor& input, const Tensor& target, const optional<Tensor>& weight,
                                         const CrossEntropyArgs& args, bool need_statistics) {
  check_cross_entropy<int64_t>(input, target, weight, args.smoothing);
  const Tensor x = classes_lie_last(input) ? input : input.contiguous(), t = target.contiguous();
  const Tensor w = weight ? weight->contiguous() : Tensor();
  CrossEntropyOutput out{empty_loss<int64_t>(x, t, args.reduction), {}};
  if (need_statistics) out.statistics = empty_output({2 * t.numel() + 1}, statistics_type(x), x.device());
  const auto [outer, classes, inner] = x.numel() ? classes_of(x) : Classes{0, 1, 1};
  int64_t bad = -1;
  run(CrossEntropyForward{to_dtype(x.scalar_type()), outer, classes, inner, args.ignore_index, args.smoothing,
                          args.reduction},
      {x.const_data_ptr(), t.const_data_ptr<int64_t>(), data_or_null(w), out.y.mutable_data_ptr(),
       mutable_or_null(out.statistics), &bad},
      x.device(), [&] { return row_of("cross_entropy", {x, w}); });
  TORCH_CHECK_INDEX(bad < 0, "cross_entropy: target must hold classes from 0 to ", classes - 1, " or ignore_index ",
                    args.ignore_index, ": Target ", t.const_data_ptr<int64_t>()[bad < 0 ? 0 : bad],
                    " is out of bounds.");
  return out;
}

Tensor cross_entropy_backward(const Tensor& grad_output, const Tensor& input, const Tensor& target,
                              const optional<Tensor>& weight, const Tensor& statistics, const CrossEntropyArgs& args) {
  check_cross_entropy<int64_t>(input, target, weight, args.smoothing);
  check_tensor(grad_output, "cross_entropy_backward", "grad_output", input.device());
  check_dtype(grad_output, input.scalar_type(), "cross_entropy_backward", "grad_output");
  const int64_t positions = target.numel(), losses = args.reduction == Reduction::none ? positions : 1;
  TORCH_CHECK(grad_output.numel() == losses, "cross_entropy_backward: grad_output must have ", losses,
              " elements, got ", grad_output.numel());
  TORCH_CHECK(statistics.scalar_type() == statistics_type(input) && statistics.is_contiguous() &&
                  statistics.numel() == 2 * positions + 1,
              "cross_entropy_backward: statistics must have ", 2 * positions + 1, " elements of ",
              statistics_type(input), ", got ", statistics.numel(), " of ", statistics.scalar_type());
  const Tensor x = classes_lie_last(input) ? input : input.contiguous(), t = target.contiguous();
  const Tensor g = grad_output.contiguous(), w = weight ? weight->contiguous() : Tensor();
  Tensor grad_input = empty_gradient<int64_t>(x);
  if (x.numel() == 0) return grad_input;
  const auto [outer, classes, inner] = classes_of(x);
  run(CrossEntropyBackward{to_dtype(x.scalar_type()), outer, classes, inner, args.ignore_index, args.smoothing,
                           args.reduction},
      {g.const_data_ptr(), x.const_data_ptr(), t.const_data_ptr<int64_t>(), data_or_null(w),
       statistics.const_data_ptr(), grad_input.mutable_data_ptr()},
      x.device(), [&] { return row_of("cross_entropy_backward", {x, w}); });
  return grad_input;
}

// The same in torch's own differentiable ops, for a gradient that will be differentiated, or that is batched or dual.
Tensor differentiable_cross_entropy_backward(const Tensor& grad_output, const Tensor& input, const Tensor& target,
                                             const Tensor& weight, const CrossEntropyArgs& args) {
  const int64_t dim = class_dim(input), classes = input.size(dim);
  const double of_all = args.smoothing / static_cast<double>(classes), of_target = 1 - args.smoothing;
  std::vector<int64_t> shape(static_cast<size_t>(input.dim()), 1);
  shape[static_cast<size_t>(dim)] = classes;
  const Tensor w = weight.defined() ? weight : at::ones({classes}, input.options());
  const Tensor counts = target != args.ignore_index, index = target.masked_fill(counts.logical_not(), 0);
  const Tensor of_position = at::where(counts, w.index({index}), at::zeros({}, input.options()));
  Tensor factor = grad_output;
  if (args.reduction == Reduction::mean) factor = factor / of_position.sum();
  factor = at::where(counts, factor, at::zeros({}, input.options())).unsqueeze(dim);
  const Tensor at_target = (of_target * of_position).unsqueeze(dim);
  const Tensor slope = at_target + of_all * w.sum();
  const Tensor spread =
      of_all * w.view(shape) + at::zeros_like(input).scatter(dim, index.unsqueeze(dim), 1) * at_target;
  return factor * ((args.smoothing != 0 ? slope : at_target) * at::softmax(input, dim) - spread);
}

struct CrossEntropyOp {
  using Args = CrossEntropyArgs;
  static std::string name(const Args&) { return "cross_entropy"; }
  static c10::IValue pack(const Args& args) {
    return std::vector<double>{static_cast<double>(args.reduction), static_cast<double>(args.ignore_index),
                               args.smoothing};
  }
  static Args unpack(const c10::IValue& packed) {
    const auto values = packed.toDoubleVector();
    return {static_cast<Reduction>(static_cast<int>(values[0])), static_cast<int64_t>(values[1]), values[2]};
  }
  static variable_list gradients(const Args& args, at::TensorList saved, const variable_list& grads, Needs needs) {
    const Tensor &g = grads[0], &input = saved[0], &target = saved[1], &weight = saved[2];
    if (!g.defined() || !needs(0)) return {Tensor()};
    if (at::GradMode::is_enabled() || !fast_door::is_plain(g))
      return {differentiable_cross_entropy_backward(g, input, target, weight, args)};
    const auto optional_weight = weight.defined() ? optional<Tensor>(weight) : std::nullopt;
    return {cross_entropy_backward(g, input, target, optional_weight, saved[3], args)};
  }
};

Tensor cross_entropy(const Tensor& input, const Tensor& target, const optional<Tensor>& weight,
                     const CrossEntropyArgs& args) {
  const bool records = is_recorded(input);
  const auto [y, statistics] = cross_entropy_forward(input, target, weight, args, records);
  if (!records) return y;
  const auto node = make_node<CrossEntropyOp>(args, input);
  torch::autograd::set_history(y, node);
  save(node, input, target, weight ? *weight : none, statistics);
  return y;
}

// ---- mean squared error

bool mse_accepts(const Tensor& input, const Tensor& target) {
  return is_supported(input.scalar_type()) && target.scalar_type() == input.scalar_type() &&
         is_on(target, input.device()) && target.sizes() == input.sizes();
}

template <class Int>
void check_mse(const Tensor& input, const Tensor& target) {
  check_input(input, "mse_loss", "input");
  check_tensor(target, "mse_loss", "target", input.device());
  check_dtype(target, input.scalar_type(), "mse_loss", "target");
  TORCH_CHECK(!sizes_differ<Int>(sizes_as<Int>(input), sizes_as<Int>(target)),
              "mse_loss: target must have input's shape ", sizes_as<Int>(input), ", got ", sizes_as<Int>(target));
}

// An uninitialised result; without a reduction its strides are those of an elementwise op.
template <class Int>
Tensor empty_mse(const Tensor& input, const Tensor& target, Reduction reduction) {
  if (reduction != Reduction::none || (input.is_contiguous_or_false() && target.is_contiguous_or_false()))
    return empty_loss<Int>(input, target, reduction);
  const auto strides =
      elementwise_strides<Int>(sizes_as<Int>(input), {strides_as<Int>(input), strides_as<Int>(target)});
  return new_tensor_strided<Int>(sizes_as<Int>(input), strides, input.scalar_type(), input.device());
}

Tensor mse_forward(const Tensor& input, const Tensor& target, Reduction reduction) {
  check_mse<int64_t>(input, target);
  Tensor y = empty_mse<int64_t>(input, target, reduction), x = input, t = target;
  if (y.numel() == 0) return y;
  if (!x.is_contiguous() || !t.is_contiguous()) {
    const auto order = elementwise_strides<int64_t>(x.sizes(), {x.strides(), t.strides()});
    x = in_order(x, order);
    t = in_order(t, order);
  }
  run(MseForward{to_dtype(x.scalar_type()), x.numel(), reduction},
      {x.const_data_ptr(), t.const_data_ptr(), y.mutable_data_ptr()}, x.device(),
      [&] { return row_of("mse_loss", {x, t}); });
  return y;
}

std::array<Tensor, 2> mse_backward(const Tensor& grad_output, const Tensor& input, const Tensor& target,
                                   Reduction reduction, std::array<bool, 2> output_mask) {
  check_mse<int64_t>(input, target);
  check_tensor(grad_output, "mse_loss_backward", "grad_output", input.device());
  check_dtype(grad_output, input.scalar_type(), "mse_loss_backward", "grad_output");
  const int64_t losses = reduction == Reduction::none ? input.numel() : 1;
  TORCH_CHECK(grad_output.numel() == losses, "mse_loss_backward: grad_output must have ", losses, " elements, got ",
              grad_output.numel());
  const Tensor x = input.contiguous(), t = target.contiguous(), g = grad_output.contiguous();
  std::array<Tensor, 2> out;
  for (size_t i = 0; i < 2; ++i)
    if (output_mask[i]) out[i] = empty_output(x.sizes(), x.scalar_type(), x.device());
  if (x.numel() == 0) return out;
  run(MseBackward{to_dtype(x.scalar_type()), x.numel(), reduction},
      {g.const_data_ptr(), x.const_data_ptr(), t.const_data_ptr(), mutable_or_null(out[0]), mutable_or_null(out[1])},
      x.device(), [&] { return row_of("mse_loss_backward", {x, t}); });
  return out;
}

struct MseOp {
  struct Args {
    Reduction reduction;
  };
  static std::string name(const Args&) { return "mse_loss"; }
  static c10::IValue pack(const Args& args) { return std::vector<int64_t>{static_cast<int64_t>(args.reduction)}; }
  static Args unpack(const c10::IValue& packed) {
    return {static_cast<Reduction>(static_cast<int>(packed.toIntVector()[0]))};
  }
  static variable_list gradients(const Args& args, at::TensorList saved, const variable_list& grads, Needs needs) {
    const Tensor &g = grads[0], &input = saved[0], &target = saved[1];
    if (!g.defined()) return {Tensor(), Tensor()};
    if (!at::GradMode::is_enabled() && fast_door::is_plain(g)) {
      auto out = mse_backward(g, input, target, args.reduction, {needs(0), needs(1)});
      return {out[0], out[1]};
    }
    // Somebody will differentiate this gradient, or it is batched or dual: write it in torch's own differentiable ops.
    const double norm = args.reduction == Reduction::mean ? 2 / static_cast<double>(input.numel()) : 2;
    const Tensor result = norm * (input - target) * g;
    return {needs(0) ? result : Tensor(), needs(1) ? -result : Tensor()};
  }
};

Tensor mse_loss(const Tensor& input, const Tensor& target, Reduction reduction) {
  Tensor y = mse_forward(input, target, reduction);
  if (!is_recorded(needs_grad(input) || needs_grad(target), input, target)) return y;
  const auto node = make_node<MseOp>({reduction}, input, target);
  torch::autograd::set_history(y, node);
  save(node, input, target);
  return y;
}

// ---- the general door

template <class Int>
std::tuple<Tensor, Tensor> cross_entropy_forward_op(const Tensor& input, const Tensor& target,
                                                    const optional<Tensor>& weight, c10::string_view reduction,
                                                    int64_t ignore_index, double smoothing) {
  const CrossEntropyArgs args{read_reduction(reduction), ignore_index, smoothing};
  if constexpr (is_symbolic<Int>) {
    check_cross_entropy<Int>(input, target, weight, smoothing);
    return {empty_loss<Int>(input, target, args.reduction),
            new_tensor<Int>({2 * target.sym_numel() + 1}, statistics_type(input), input.device())};
  } else {
    const auto [y, statistics] = cross_entropy_forward(input, target, weight, args, true);
    return {y, statistics};
  }
}

template <class Int>
Tensor cross_entropy_backward_op(const Tensor& grad_output, const Tensor& input, const Tensor& target,
                                 const optional<Tensor>& weight, const Tensor& statistics, c10::string_view reduction,
                                 int64_t ignore_index, double smoothing) {
  const CrossEntropyArgs args{read_reduction(reduction), ignore_index, smoothing};
  if constexpr (is_symbolic<Int>) {
    check_cross_entropy<Int>(input, target, weight, smoothing);
    return empty_gradient<Int>(input);
  } else {
    return cross_entropy_backward(grad_output, input, target, weight, statistics, args);
  }
}

template <class Int>
Tensor mse_loss_forward_op(const Tensor& input, const Tensor& target, c10::string_view reduction) {
  if constexpr (is_symbolic<Int>) {
    check_mse<Int>(input, target);
    return empty_mse<Int>(input, target, read_reduction(reduction));
  } else {
    return mse_forward(input, target, read_reduction(reduction));
  }
}

template <class Int>
std::tuple<Tensor, Tensor> mse_loss_backward_op(const Tensor& grad_output, const Tensor& input, const Tensor& target,
                                                c10::string_view reduction, std::array<bool, 2> output_mask) {
  std::array<Tensor, 2> out;
  if constexpr (is_symbolic<Int>) {
    check_mse<Int>(input, target);
    for (size_t i = 0; i < 2; ++i)
      if (output_mask[i]) out[i] = new_tensor<Int>(sizes_as<Int>(input), input.scalar_type(), input.device());
  } else {
    out = mse_backward(grad_output, input, target, read_reduction(reduction), output_mask);
  }
  return {or_empty(out[0], input), or_empty(out[1], input)};
}

template <class Int>
void implement_loss(torch::Library& m) {
  m.impl("cross_entropy_forward", cross_entropy_forward_op<Int>);
  m.impl("cross_entropy_backward", cross_entropy_backward_op<Int>);
  m.impl("mse_loss_forward", mse_loss_forward_op<Int>);
  m.impl("mse_loss_backward", mse_loss_backward_op<Int>);
}

// ---- the fast door

bool read_reduction(py::handle object, Reduction& reduction) {
  if (!PyUnicode_CheckExact(object.ptr())) return false;
  Py_ssize_t size = 0;
  const char* const text = PyUnicode_AsUTF8AndSize(object.ptr(), &size);
  if (text == nullptr) throw py::error_already_set();
  const auto found = find_reduction({text, static_cast<size_t>(size)});
  if (found) reduction = *found;
  return found.has_value();
}

// As autocast's float32 list casts it.
Tensor cast_to_float(const Tensor& tensor) {
  const c10::DeviceType device = tensor.device().type();
  return at::autocast::is_autocast_enabled(device) ? at::autocast::cached_cast(at::kFloat, tensor, device) : tensor;
}

py::object cross_entropy_fast(py::handle input, py::handle target, py::handle weight, py::handle ignore_index,
                              py::handle reduction, double smoothing) {
  CrossEntropyArgs args{Reduction::none, 0, smoothing};
  if (!read_int(ignore_index.ptr(), args.ignore_index) || !read_reduction(reduction, args.reduction))
    return not_implemented();
  if (!fast_door::ambient_is_plain() || !fast_door::is_plain(input.ptr()) || !fast_door::is_plain(target.ptr()) ||
      (!weight.is_none() && !fast_door::is_plain(weight.ptr())))
    return not_implemented();
  const Tensor x = cast_to_float(THPVariable_Unpack(input.ptr()));
  const Tensor& t = THPVariable_Unpack(target.ptr());
  const optional<Tensor> w =
      weight.is_none() ? std::nullopt : optional<Tensor>(cast_to_float(THPVariable_Unpack(weight.ptr())));
  if (!cross_entropy_accepts(x, t, w, smoothing)) return not_implemented();
  return wrap(without_gil([] { return "cross_entropy"; }, [&] { return cross_entropy(x, t, w, args); }, x, t, w));
}

py::object mse_loss_fast(py::handle input, py::handle target, py::handle reduction) {
  Reduction kind{};
  if (!read_reduction(reduction, kind) || !fast_door::ambient_is_plain() || !fast_door::is_plain(input.ptr()) ||
      !fast_door::is_plain(target.ptr()))
    return not_implemented();
  const Tensor x = cast_to_float(THPVariable_Unpack(input.ptr())), t = cast_to_float(THPVariable_Unpack(target.ptr()));
  if (!mse_accepts(x, t)) return not_implemented();
  return wrap(without_gil([] { return "mse_loss"; }, [&] { return mse_loss(x, t, kind); }, x, t));
}

}  // namespace

optional<Tensor> cross_entropy_recorded(const Tensor& input, const Tensor& target, const optional<Tensor>& weight,
                                        int64_t reduction, int64_t ignore_index, double smoothing) {
  if (reduction < 0 || reduction > 2 || !cross_entropy_accepts(input, target, weight, smoothing)) return {};
  return cross_entropy(input, target, weight, {static_cast<Reduction>(reduction), ignore_index, smoothing});
}

Tensor mse_loss_plain(const Tensor& input, const Tensor& target, int64_t reduction) {
  return mse_forward(input, target, static_cast<Reduction>(reduction));
}

Tensor mse_loss_gradient(const Tensor& grad_output, const Tensor& input, const Tensor& target, int64_t reduction) {
  return mse_backward(grad_output, input, target, static_cast<Reduction>(reduction), {true, false})[0];
}

void implement_loss(torch::Library& m, bool meta) {
  meta ? implement_loss<c10::SymInt>(m) : implement_loss<int64_t>(m);
}

void bind_loss(py::module_& m) {
  fast_def<&cross_entropy_fast>(m, "cross_entropy");
  fast_def<&mse_loss_fast>(m, "mse_loss");
}

}  // namespace fastops
