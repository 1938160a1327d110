#include <ATen/ATen.h>
#include <ATen/MemoryOverlap.h>

#include <cmath>

#include "aten.h"
#include "binding.h"
#include "call.h"
#include "node.h"
#include "sizes.h"

namespace fastops {
namespace {

constexpr const char* kActivationNames[] = {
#define FASTOPS_NAME(kind, ...) #kind,
    FASTOPS_ACTIVATIONS(FASTOPS_NAME)
#undef FASTOPS_NAME
};
constexpr const char* kSavedNames[] = {"nothing", "mask", "output", "input"};

bool is_dense(const Tensor& tensor) { return tensor.is_non_overlapping_and_dense(); }

// How a kernel walks a tensor: a dense one as a single row in memory order, a 2-D slice row by row.
struct Rows {
  int64_t rows, cols, stride;
};

// A tensor that is not dense but whose leading dimensions step evenly over contiguous rows that do not overlap (a slice
// of the last dimension), as rows. Returns rows == 0 where it is neither.
Rows rows_of(const Tensor& tensor) {
  if (is_dense(tensor)) return {1, tensor.numel(), tensor.numel()};
  const int64_t dims = tensor.dim();
  if (dims < 2 || tensor.stride(dims - 1) != 1) return {0, 0, 0};
  const int64_t cols = tensor.size(dims - 1);
  int64_t rows = 1;
  optional<int64_t> stride;  // of the innermost leading dimension; 0 is a stride like any other (an expanded dimension)
  for (int64_t i = dims - 2; i >= 0; --i) {
    if (tensor.size(i) == 1) continue;
    if (!stride)
      stride = tensor.stride(i);
    else if (tensor.stride(i) != *stride * rows)
      return {0, 0, 0};
    rows *= tensor.size(i);
  }
  return stride && *stride >= cols ? Rows{rows, cols, *stride} : Rows{0, 0, 0};
}

// `tensor` in the memory order of a result of `input`: itself where it lies so, a copy otherwise.
Tensor in_result_order(const Tensor& tensor, const Tensor& input) {
  return in_order(tensor, elementwise_strides<int64_t>(input.sizes(), {input.strides()}));
}

// The tensor, or a dense copy in the memory order of its strides.
Tensor dense(const Tensor& tensor) { return is_dense(tensor) ? tensor : in_result_order(tensor, tensor); }

// sigmoid' and tanh' are formed from y alone: from x they would cost the forward pass again.
void check_saved_kind(Activation activation, Saved kind) {
  TORCH_CHECK(saved_by_default(activation) != Saved::output || kind == Saved::output,
              "activation_backward: saved_kind must be 'output' for ", activation_name(activation.kind), ", got '",
              saved_name(kind), "'");
}

record::Row row_of(std::string op, std::initializer_list<Tensor> operands) {
  return {std::move(op), "", record::shapes_of(operands), dtype_name(operands.begin()->scalar_type())};
}

void run_forward(const Tensor& input, const Rows& rows, Tensor& y, Tensor& mask, Activation activation) {
  const ActivationForward call{
      to_dtype(input.scalar_type()), activation, rows.rows, rows.cols, rows.stride, mask.defined()};
  run(call, {input.const_data_ptr(), y.mutable_data_ptr(), mask.defined() ? mask.mutable_data_ptr<uint8_t>() : nullptr},
      input.device(), [&] { return row_of(activation_name(activation.kind), {input}); });
}

// A tensor this small is saved as PyTorch would: allocating its mask takes longer than the bits save (1K elements
// forward and backward, leaky_relu: 0.94 of PyTorch's speed with a mask; Granite Rapids).
constexpr int64_t kMaskFrom = 4096;

Saved saved_for(const Tensor& input, Activation activation) {
  const Saved kind = saved_by_default(activation);
  if (kind != Saved::mask || input.numel() >= kMaskFrom) return kind;
  return activation.kind == ActivationKind::relu ? Saved::output : Saved::input;
}

// What the nodes of an activation and of its gradient remember besides tensors.
struct ActivationArgs {
  Activation activation;
  Saved kind;
  std::vector<int64_t> mask_strides;  // empty: contiguous
};
c10::IValue pack_activation(const ActivationArgs& args) {
  std::vector<double> values{static_cast<double>(args.activation.kind), args.activation.a, args.activation.b,
                             static_cast<double>(args.kind)};
  values.insert(values.end(), args.mask_strides.begin(), args.mask_strides.end());
  return values;
}
ActivationArgs unpack_activation(const c10::IValue& packed) {
  const auto values = packed.toDoubleVector();
  return {{static_cast<ActivationKind>(static_cast<int>(values[0])), values[1], values[2]},
          static_cast<Saved>(static_cast<int>(values[3])),
          {values.begin() + 4, values.end()}};
}

// y = f(x); saved: the mask, y or x.
struct ActivationOp {
  using Args = ActivationArgs;
  static std::string name(const Args& args) { return activation_name(args.activation.kind); }
  static c10::IValue pack(const Args& args) { return pack_activation(args); }
  static Args unpack(const c10::IValue& packed) { return unpack_activation(packed); }
  static variable_list gradients(const Args& args, at::TensorList saved, const variable_list& grads, Needs needs) {
    if (!grads[0].defined() || !needs(0)) return {Tensor()};
    const bool direct = !at::GradMode::is_enabled() && fast_door::is_plain(grads[0]);
    const auto backward = direct ? activation_backward : differentiable_activation_backward;
    return {backward(grads[0], saved[0], args.activation, args.kind, args.mask_strides)};
  }
};

// grad_x = grad_y f'(saved); saved: grad_y and what f' is read from.
struct ActivationBackwardOp {
  using Args = ActivationArgs;
  static std::string name(const Args& args) { return c10::str(activation_name(args.activation.kind), "_backward"); }
  static c10::IValue pack(const Args& args) { return pack_activation(args); }
  static Args unpack(const c10::IValue& packed) { return unpack_activation(packed); }
  static variable_list gradients(const Args& args, at::TensorList saved, const variable_list& grads, Needs needs) {
    variable_list result(2);
    if (!grads[0].defined()) return result;
    if (needs(0))
      result[0] = differentiable_activation_backward(grads[0], saved[1], args.activation, args.kind, args.mask_strides);
    if (needs(1) && args.kind != Saved::mask)
      result[1] = grads[0] * saved[0] * activation_second_derivative(saved[1], args.activation, args.kind);
    return result;
  }
};

// ---- PReLU

// input as (outer, channels, inner) in memory order, with channels == 1 for a shared weight.
struct Channels {
  int64_t outer, channels, inner;
};

bool is_channels_last(const Tensor& tensor) {
  return !tensor.is_contiguous() && (tensor.is_contiguous(at::MemoryFormat::ChannelsLast) ||
                                     tensor.is_contiguous(at::MemoryFormat::ChannelsLast3d));
}

Channels channels_of(const Tensor& input, int64_t weights) {
  if (weights == 1) return {1, 1, input.numel()};
  const int64_t channels = input.dim() > 1 ? input.size(1) : 1;
  if (is_channels_last(input)) return {input.numel() / channels, channels, 1};
  int64_t inner = 1;
  for (int64_t i = 2; i < input.dim(); ++i) inner *= input.size(i);
  return {input.dim() > 0 ? input.size(0) : 1, channels, inner};
}

// PReLU needs its channels in order: any dense layout will do for a shared weight, NCHW or channels_last otherwise.
Tensor prelu_layout(const Tensor& input, int64_t weights) {
  if (weights == 1) return dense(input);
  return input.is_contiguous() || is_channels_last(input) ? input : input.contiguous();
}

template <class Int>
void check_prelu(const Tensor& input, const Tensor& weight) {
  check_input(input, "prelu", "input");
  check_tensor(weight, "prelu", "weight", input.device());
  check_dtype(weight, input.scalar_type(), "prelu", "weight");
  const Int channels = input.dim() > 1 ? sizes_as<Int>(input)[1] : Int(1);
  const auto sizes = sizes_as<Int>(weight);
  TORCH_CHECK(sizes.empty() || (sizes.size() == 1 && (!differ(sizes[0], 1) || !differ(sizes[0], channels))),
              "prelu: weight must hold 1 number or one a channel (", channels, "), got shape ", sizes);
}

struct PreluOp {
  struct Args {};
  static std::string name(const Args&) { return "prelu"; }
  static c10::IValue pack(const Args&) { return std::vector<int64_t>(); }
  static Args unpack(const c10::IValue&) { return {}; }
  static variable_list gradients(const Args&, at::TensorList saved, const variable_list& grads, Needs needs) {
    const Tensor &input = saved[0], &weight = saved[1], &g = grads[0];
    variable_list result(2);
    if (!g.defined()) return result;
    if (!at::GradMode::is_enabled() && fast_door::is_plain(g)) {
      auto gradients = prelu_backward(g, input, weight, {needs(0), needs(1)});
      std::move(gradients.begin(), gradients.end(), result.begin());
      return result;
    }
    // Somebody will differentiate this gradient, or it is batched or dual: write it in torch's own differentiable ops.
    std::vector<int64_t> shape(static_cast<size_t>(input.dim()), 1);
    if (weight.numel() != 1) shape[1] = weight.numel();
    const Tensor w = weight.numel() == 1 ? weight.reshape({}) : weight.reshape(shape);
    const Tensor positive = input > 0;
    if (needs(0)) result[0] = at::where(positive, g, w * g);
    if (needs(1)) {
      const Tensor per_element = at::where(positive, at::zeros({}, g.options()), input * g);
      result[1] = per_element.sum_to_size(shape).reshape(weight.sizes());
    }
    return result;
  }
};

// ---- GLU

struct Halves {
  int64_t outer, inner;
};

// Of a dense tensor.
Halves halves_of(const Tensor& input, int64_t dim) {
  Halves halves{1, input.size(dim) / 2};
  for (int64_t i = 0; i < input.dim(); ++i) {
    if (i == dim || input.size(i) == 1) continue;
    (input.stride(i) > input.stride(dim) ? halves.outer : halves.inner) *= input.size(i);
  }
  return halves;
}

template <class Int>
int64_t check_glu(const Tensor& input, int64_t dim) {
  check_input(input, "glu", "input");
  TORCH_CHECK(input.dim() > 0, "glu: input must have at least one dimension, got a scalar");
  const int64_t wrapped = at::maybe_wrap_dim(dim, input.dim());
  const Int size = sizes_as<Int>(input)[static_cast<size_t>(wrapped)];
  TORCH_CHECK(!differ(size % 2, 0), "glu: input's dimension ", dim, " must have an even size, got ", size);
  return wrapped;
}

template <class Int>
SizeVector<Int> glu_sizes(const Tensor& input, int64_t axis) {
  SizeVector<Int> sizes(sizes_as<Int>(input));
  Int& size = sizes[static_cast<size_t>(axis)];
  size = size / 2;
  return sizes;
}

// An uninitialised tensor for a result, whose strides are those of an elementwise op of the halves.
template <class Int>
Tensor empty_half(const Tensor& input, int64_t axis) {
  const auto sizes = glu_sizes<Int>(input, axis);
  if (input.is_contiguous_or_false()) return new_tensor<Int>(sizes, input.scalar_type(), input.device());
  const auto strides = elementwise_strides<Int>(sizes, {strides_as<Int>(input)});
  return new_tensor_strided<Int>(sizes, strides, input.scalar_type(), input.device());
}

struct GluOp {
  struct Args {
    int64_t dim;
  };
  static std::string name(const Args&) { return "glu"; }
  static c10::IValue pack(const Args& args) { return std::vector<int64_t>{args.dim}; }
  static Args unpack(const c10::IValue& packed) { return {packed.toIntVector()[0]}; }
  static variable_list gradients(const Args& args, at::TensorList saved, const variable_list& grads, Needs needs) {
    const Tensor &input = saved[0], &g = grads[0];
    if (!g.defined() || !needs(0)) return {Tensor()};
    if (!at::GradMode::is_enabled() && fast_door::is_plain(g)) return {fastops::glu_backward(g, input, args.dim)};
    // Somebody will differentiate this gradient, or it is batched or dual: write it in torch's own differentiable ops.
    const auto halves = input.chunk(2, args.dim);
    const Tensor s = halves[1].sigmoid();
    return {at::cat({g * s, g * halves[0] * s * (1 - s)}, args.dim)};
  }
};

}  // namespace

ActivationKind activation_kind(std::string_view name) {
  for (int i = 0; i < static_cast<int>(ActivationKind::count); ++i)
    if (name == kActivationNames[i]) return static_cast<ActivationKind>(i);
  TORCH_CHECK_VALUE(false, "activation: unknown name '", std::string(name), "'");
}

const char* activation_name(ActivationKind kind) { return kActivationNames[static_cast<int>(kind)]; }

Saved saved_kind(std::string_view name) {
  for (int i = 0; i < 4; ++i)
    if (name == kSavedNames[i]) return static_cast<Saved>(i);
  TORCH_CHECK_VALUE(false, "saved_kind: expected 'nothing', 'mask', 'output' or 'input', got '", std::string(name),
                    "'");
}

const char* saved_name(Saved kind) { return kSavedNames[static_cast<int>(kind)]; }

bool reads_in_place(const Tensor& input) { return rows_of(input).rows != 0; }

ActivationOutput activation_forward(const Tensor& input, Activation activation, bool need_mask) {
  check_input(input, activation_name(activation.kind), "input");
  Tensor x = input;
  Rows rows = rows_of(x);
  // A mask is one flat row of bits, so a slice keeps its rows only when they end on whole bytes.
  if (rows.rows == 0 || (need_mask && rows.rows > 1 && rows.cols % 8 != 0)) {
    x = dense(x);
    rows = rows_of(x);
  }
  ActivationOutput out;
  out.y = empty_result<int64_t>(x);
  if (need_mask) out.mask = empty_output({mask_row_bytes(x.numel())}, at::kByte, x.device());
  if (x.numel() > 0) run_forward(x, rows, out.y, out.mask, activation);
  return out;
}

Tensor activation_backward(const Tensor& grad_output, const Tensor& saved, Activation activation, Saved kind,
                           at::IntArrayRef mask_strides) {
  check_input(grad_output, "activation_backward", "grad_output");
  if (kind == Saved::nothing) return grad_output.clone();
  Tensor g = grad_output, s = saved;
  Rows g_rows, s_rows;
  if (kind == Saved::mask) {
    TORCH_CHECK(
        saved.scalar_type() == at::kByte && saved.numel() == mask_row_bytes(g.numel()) && is_on(saved, g.device()),
        "activation_backward: saved must be a mask of ", mask_row_bytes(g.numel()), " bytes on ", g.device(), ", got ",
        saved.numel(), " elements of ", saved.scalar_type(), " on ", saved.device());
    g = mask_strides.empty() ? g.contiguous() : in_order(g, mask_strides);
    g_rows = s_rows = {1, g.numel(), g.numel()};
  } else {
    check_tensor(saved, "activation_backward", "saved", g.device());
    check_saved_kind(activation, kind);
    check_dtype(saved, g.scalar_type(), "activation_backward", "saved");
    TORCH_CHECK(saved.sizes() == g.sizes(), "activation_backward: saved must have grad_output's shape ", g.sizes(),
                ", got ", saved.sizes());
    if (is_dense(s)) {
      g = in_order(g, s.strides());
      g_rows = s_rows = {1, g.numel(), g.numel()};
    } else {
      s_rows = rows_of(s);
      if (s_rows.rows == 0) s = s.contiguous(), s_rows = {1, s.numel(), s.numel()};
      g = g.contiguous();
      g_rows = {s_rows.rows, s_rows.cols, s_rows.cols};
    }
  }
  Tensor grad_input = empty_result<int64_t>(g);
  if (g.numel() == 0) return grad_input;
  const ActivationBackward call{
      to_dtype(g.scalar_type()), activation, kind, s_rows.rows, s_rows.cols, g_rows.stride, s_rows.stride};
  run(call, {g.const_data_ptr(), s.const_data_ptr(), grad_input.mutable_data_ptr()}, g.device(),
      [&] { return row_of(std::string(activation_name(activation.kind)) + "_backward", {g}); });
  return grad_input;
}

Tensor differentiable_activation_backward(const Tensor& grad_output, const Tensor& saved, Activation activation,
                                          Saved kind, at::IntArrayRef mask_strides) {
  if (!fast_door::is_plain(grad_output)) {  // batched or dual: the derivative by our kernel, the product by torch
    const Tensor ones = at::ones(grad_output.sizes(), grad_output.options());
    return grad_output * differentiable_activation_backward(ones, saved, activation, kind, mask_strides);
  }
  const Tensor grad_input = activation_backward(grad_output, saved, activation, kind, mask_strides);
  if (!is_recorded(needs_grad(grad_output) || needs_grad(saved), grad_output, saved)) return grad_input;
  const auto node = make_node<ActivationBackwardOp>({activation, kind, mask_strides.vec()}, grad_output, saved);
  torch::autograd::set_history(grad_input, node);
  save(node, grad_output, saved);
  return grad_input;
}

Tensor activation(const Tensor& input, Activation activation) {
  if (!is_recorded(input)) return activation_forward(input, activation, /*need_mask=*/false).y;
  const Saved kind = saved_for(input, activation);
  const auto [y, mask] = activation_forward(input, activation, kind == Saved::mask);
  const bool ordered = kind == Saved::mask && !y.is_contiguous();
  const auto node =
      make_node<ActivationOp>({activation, kind, ordered ? y.strides().vec() : std::vector<int64_t>()}, input);
  torch::autograd::set_history(y, node);
  save(node, kind == Saved::mask ? mask : kind == Saved::output ? y : input);
  return y;
}

void activate_dense(const Tensor& tensor, Activation activation) {
  Tensor x = tensor, no_mask;
  if (x.numel() > 0) run_forward(x, rows_of(x), x, no_mask, activation);
}

Tensor activation_(const Tensor& input, Activation activation) {
  check_input(input, activation_name(activation.kind), "input");
  at::assert_no_internal_overlap(input);
  const bool records = is_recorded(input);
  torch::autograd::check_inplace(input, records);
  Saved kind = records ? saved_by_default(activation) : Saved::nothing;
  if (kind == Saved::input && can_save_output(activation)) kind = Saved::output;

  // f' is read from the input as it was: out of place from a copy, which autograd then puts in the input's place.
  if (kind == Saved::input) {
    Tensor x = input;
    return x.copy_(fastops::activation(input.clone(), activation));
  }

  Tensor x = input, mask;
  const bool dense = is_dense(x);
  const bool ordered = kind == Saved::mask && dense && !x.is_contiguous();
  // The edges are those of the input as it was.
  const auto node =
      records ? make_node<ActivationOp>({activation, kind, ordered ? x.strides().vec() : std::vector<int64_t>()}, input)
              : nullptr;
  if (x.numel() == 0) {
    if (kind == Saved::mask) mask = empty_output({0}, at::kByte, x.device());
  } else if (dense) {
    if (kind == Saved::mask) mask = empty_output({mask_row_bytes(x.numel())}, at::kByte, x.device());
    run_forward(x, rows_of(x), x, mask, activation);
    torch::autograd::increment_version(x);
  } else {
    const at::NoGradGuard no_grad;
    ActivationOutput out = activation_forward(x.contiguous(), activation, kind == Saved::mask);
    x.copy_(out.y);
    mask = out.mask;
  }
  if (!records) return input;
  torch::autograd::rebase_history(x, node);
  save(node, kind == Saved::mask ? mask : x);
  return input;
}

Tensor activation_second_derivative(const Tensor& saved, Activation activation, Saved kind) {
  check_saved_kind(activation, kind);
  const Tensor& s = saved;
  const double a = activation.a, b = activation.b;
  constexpr double kSeluAlpha = 1.6732632423543772848170429916717, kSeluScale = 1.0507009873554804934193349852946;
  const auto where_negative = [&](const Tensor& value) { return at::where(s < 0, value, at::zeros({}, s.options())); };
  if (kind == Saved::output) {
    switch (activation.kind) {
      case ActivationKind::sigmoid:
        return 1 - 2 * s;
      case ActivationKind::tanh:
        return -2 * s;
      case ActivationKind::elu:
      case ActivationKind::selu:
        return where_negative(at::ones({}, s.options()));
      case ActivationKind::celu:
        return where_negative(at::full({}, 1 / a, s.options()));
      default:
        break;
    }
  }
  switch (activation.kind) {
    case ActivationKind::elu:
      return where_negative(a * s.clamp_max(0).exp());
    case ActivationKind::selu:
      return where_negative(kSeluScale * kSeluAlpha * s.clamp_max(0).exp());
    case ActivationKind::celu:
      return where_negative((s.clamp_max(0) / a).exp() / a);
    case ActivationKind::gelu:
      return (2 - s * s) * (-0.5 * s * s).exp() * (1 / std::sqrt(2 * M_PI));
    case ActivationKind::gelu_tanh: {
      const double c = std::sqrt(2 / M_PI), d = 0.044715;
      const Tensor x = s.clamp(-50, 50);  // zero long before, and x^3 stays finite
      const Tensor t = (c * (x + d * x * x * x)).tanh(), sech2 = 1 - t * t;
      const Tensor u1 = c * (1 + 3 * d * x * x), u2 = c * 6 * d * x;
      return sech2 * u1 + 0.5 * x * sech2 * (u2 - 2 * t * u1 * u1);
    }
    case ActivationKind::silu: {
      const Tensor g = s.sigmoid();
      return g * (1 - g) * (2 + s * (1 - 2 * g));
    }
    case ActivationKind::mish: {
      const Tensor g = s.sigmoid(), t = at::softplus(s).tanh(), sech2 = 1 - t * t;
      return sech2 * (2 * g + s * (g * (1 - g) - 2 * t * g * g));
    }
    case ActivationKind::logsigmoid: {
      const Tensor g = s.sigmoid();
      return g * (g - 1);
    }
    case ActivationKind::softplus: {
      const Tensor g = (s * a).sigmoid();
      return at::where(s * a > b, at::zeros({}, s.options()), a * g * (1 - g));
    }
    case ActivationKind::softsign: {
      const Tensor d = 1 + s.abs();
      return -2 * s.sign() / (d * d * d);
    }
    case ActivationKind::hardswish:
      return at::where((s > -3).logical_and(s < 3), at::full({}, 1. / 3, s.options()), at::zeros({}, s.options()));
    case ActivationKind::tanhshrink: {
      const Tensor t = s.tanh();
      return 2 * t * (1 - t * t);
    }
    default:
      break;
  }
  TORCH_INTERNAL_ASSERT(saved_by_default(activation) == Saved::mask, "no second derivative of ",
                        activation_name(activation.kind));
  return at::zeros_like(s);  // piecewise linear
}

Tensor prelu_forward(const Tensor& input, const Tensor& weight) {
  check_prelu<int64_t>(input, weight);
  const Tensor x = prelu_layout(input, weight.numel());
  Tensor y = empty_result<int64_t>(x);
  if (x.numel() == 0) return y;
  const auto [outer, channels, inner] = channels_of(x, weight.numel());
  run(PreluForward{to_dtype(x.scalar_type()), outer, channels, inner, weight.dim() ? weight.stride(0) : 0},
      {x.const_data_ptr(), weight.const_data_ptr(), y.mutable_data_ptr()}, x.device(),
      [&] { return row_of("prelu", {x, weight}); });
  return x.is_same(input) ? y : in_result_order(y, input);
}

std::array<Tensor, 2> prelu_backward(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                                     std::array<bool, 2> output_mask) {
  check_prelu<int64_t>(input, weight);
  check_tensor(grad_output, "prelu_backward", "grad_output", input.device());
  check_dtype(grad_output, input.scalar_type(), "prelu_backward", "grad_output");
  TORCH_CHECK(grad_output.sizes() == input.sizes(), "prelu_backward: grad_output must have input's shape ",
              input.sizes(), ", got ", grad_output.sizes());
  const Tensor x = prelu_layout(input, weight.numel());
  const Tensor g = in_order(grad_output, x.strides());
  std::array<Tensor, 2> out;
  if (output_mask[0]) out[0] = empty_result<int64_t>(x);
  if (output_mask[1]) out[1] = empty_output(weight.sizes(), weight.scalar_type(), x.device());
  if (x.numel() == 0) {
    if (out[1].defined()) out[1].zero_();
    return out;
  }
  const auto [outer, channels, inner] = channels_of(x, weight.numel());
  const PreluBackward call{to_dtype(x.scalar_type()),           outer,          channels,      inner,
                           weight.dim() ? weight.stride(0) : 0, output_mask[0], output_mask[1]};
  run(call,
      {g.const_data_ptr(), x.const_data_ptr(), weight.const_data_ptr(), mutable_or_null(out[0]),
       mutable_or_null(out[1])},
      x.device(), [&] { return row_of("prelu_backward", {g, x, weight}); });
  return out;
}

Tensor prelu(const Tensor& input, const Tensor& weight) {
  Tensor y = prelu_forward(input, weight);
  const bool grad_w = needs_grad_of_view(weight);
  if (!is_recorded(input.requires_grad() || grad_w, input, weight)) return y;
  const auto node = make_node<PreluOp>({}, input, grad_w ? weight : none);
  torch::autograd::set_history(y, node);
  save(node, input, weight);
  return y;
}

bool prelu_accepts(const Tensor& input, const Tensor& weight) {
  return is_supported(input.scalar_type()) && weight.scalar_type() == input.scalar_type() &&
         is_on(weight, input.device()) && weight.dim() <= 1 &&
         (weight.numel() == 1 || (input.dim() > 1 && weight.numel() == input.size(1)));
}

Tensor glu_forward(const Tensor& input, int64_t dim) {
  const int64_t axis = check_glu<int64_t>(input, dim);
  const Tensor x = dense(input);
  Tensor y = empty_half<int64_t>(x, axis);
  if (y.numel() == 0) return y;
  const auto [outer, inner] = halves_of(x, axis);
  run(GluForward{to_dtype(x.scalar_type()), outer, inner}, {x.const_data_ptr(), y.mutable_data_ptr()}, x.device(),
      [&] { return row_of("glu", {x}); });
  return x.is_same(input) ? y : in_order(y, elementwise_strides<int64_t>(y.sizes(), {input.strides()}));
}

Tensor glu_backward(const Tensor& grad_output, const Tensor& input, int64_t dim) {
  const int64_t axis = check_glu<int64_t>(input, dim);
  check_tensor(grad_output, "glu_backward", "grad_output", input.device());
  check_dtype(grad_output, input.scalar_type(), "glu_backward", "grad_output");
  const auto sizes = glu_sizes<int64_t>(input, axis);
  TORCH_CHECK(grad_output.sizes() == sizes, "glu_backward: grad_output must have shape ", at::IntArrayRef(sizes),
              ", got ", grad_output.sizes());
  const Tensor x = input.contiguous(), g = grad_output.contiguous();
  Tensor grad_input = empty_output(x.sizes(), x.scalar_type(), x.device());
  if (x.numel() == 0) return grad_input;
  const auto [outer, inner] = halves_of(x, axis);
  run(GluBackward{to_dtype(x.scalar_type()), outer, inner},
      {g.const_data_ptr(), x.const_data_ptr(), grad_input.mutable_data_ptr()}, x.device(),
      [&] { return row_of("glu_backward", {g, x}); });
  return grad_input;
}

Tensor glu(const Tensor& input, int64_t dim) {
  Tensor y = glu_forward(input, dim);
  if (!is_recorded(input)) return y;
  const auto node = make_node<GluOp>({dim}, input);
  torch::autograd::set_history(y, node);
  save(node, input);
  return y;
}

bool glu_accepts(const Tensor& input, int64_t dim) {
  if (!is_supported(input.scalar_type()) || input.dim() == 0) return false;
  if (dim < -input.dim() || dim >= input.dim()) return false;
  return input.size(dim) % 2 == 0;
}

namespace {

// ---- the general door

// The result in the memory order that the Meta kernels promise of a result of this tensor.
Tensor like(const Tensor& tensor, const Tensor& result) {
  return tensor.strides() == result.strides() ? result : in_result_order(result, tensor);
}

// A mask that crosses this door is in the logical order of its elements, whatever the strides: a compiler may change
// those.
template <class Int>
std::tuple<Tensor, Tensor> activation_forward_op(const Tensor& input, c10::string_view activation, double a, double b,
                                                 bool need_mask) {
  const Activation f = make_activation(activation, a, b);
  const bool masked = need_mask && saved_by_default(f) == Saved::mask;
  if constexpr (is_symbolic<Int>) {
    check_input(input, activation_name(f.kind), "input");
    const Int bytes = masked ? (input.sym_numel() + 7) / 8 : Int(0);
    return {empty_result<Int>(input), new_tensor<Int>({bytes}, at::kByte, input.device())};
  } else {
    if (!masked) return {activation_forward(input, f, false).y, at::empty({0}, input.options().dtype(at::kByte))};
    const auto [y, mask] = activation_forward(input.contiguous(), f, true);
    return {like(input, y), mask};
  }
}

template <class Int>
Tensor activation_backward_op(const Tensor& grad_output, const Tensor& saved, c10::string_view activation, double a,
                              double b, c10::string_view kind) {
  const Activation f = make_activation(activation, a, b);
  const Saved saved_as = saved_kind({kind.data(), kind.size()});
  return is_symbolic<Int> ? empty_result<Int>(grad_output)
                          : like(grad_output, activation_backward(grad_output, saved, f, saved_as));
}

Tensor activation_second_derivative_op(const Tensor& saved, c10::string_view activation, double a, double b,
                                       c10::string_view kind) {
  return activation_second_derivative(saved, make_activation(activation, a, b), saved_kind({kind.data(), kind.size()}));
}

template <class Int>
Tensor prelu_forward_op(const Tensor& input, const Tensor& weight) {
  if constexpr (!is_symbolic<Int>) return prelu_forward(input, weight);
  check_prelu<Int>(input, weight);
  return empty_result<Int>(input);
}

template <class Int>
std::tuple<Tensor, Tensor> prelu_backward_op(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                                             std::array<bool, 2> output_mask) {
  std::array<Tensor, 2> out;
  if constexpr (is_symbolic<Int>) {
    check_prelu<Int>(input, weight);
    if (output_mask[0]) out[0] = empty_result<Int>(input);
    if (output_mask[1]) out[1] = new_tensor<Int>(sizes_as<Int>(weight), weight.scalar_type(), weight.device());
  } else {
    out = prelu_backward(grad_output, input, weight, output_mask);
    if (output_mask[0]) out[0] = like(input, out[0]);
  }
  return {or_empty(out[0], input), or_empty(out[1], input)};
}

template <class Int>
Tensor glu_forward_op(const Tensor& input, int64_t dim) {
  if constexpr (!is_symbolic<Int>) return glu_forward(input, dim);
  return empty_half<Int>(input, check_glu<Int>(input, dim));
}

template <class Int>
Tensor glu_backward_op(const Tensor& grad_output, const Tensor& input, int64_t dim) {
  if constexpr (!is_symbolic<Int>) return fastops::glu_backward(grad_output, input, dim);
  check_glu<Int>(input, dim);
  return new_tensor<Int>(sizes_as<Int>(input), input.scalar_type(), input.device());
}

template <class Int>
void implement_activation(torch::Library& m) {
  m.impl("activation_forward", activation_forward_op<Int>);
  m.impl("activation_backward", activation_backward_op<Int>);
  m.impl("prelu_forward", prelu_forward_op<Int>);
  m.impl("prelu_backward", prelu_backward_op<Int>);
  m.impl("glu_forward", glu_forward_op<Int>);
  m.impl("glu_backward", glu_backward_op<Int>);
}

// ---- the fast door

py::object activation_fast(Activation f, py::handle input, py::handle is_inplace) {
  if (!fast_door::ambient_is_plain() || !fast_door::is_plain(input.ptr())) return not_implemented();
  const Tensor& x = THPVariable_Unpack(input.ptr());
  if (!is_supported(x.scalar_type()) || !is_valid(f)) return not_implemented();
  const int inplace = PyObject_IsTrue(is_inplace.ptr());  // as PyTorch, whatever it is
  if (inplace < 0) throw py::error_already_set();
  // PyTorch's threshold_ is the one in-place activation that takes expanded tensors.
  if (inplace && f.kind == ActivationKind::threshold && at::has_internal_overlap(x) == at::MemOverlap::Yes)
    return not_implemented();
  return wrap(without_gil([&] { return activation_name(f.kind); },
                          [&] { return inplace ? activation_(x, f) : fastops::activation(x, f); }, x));
}

template <ActivationKind kind>
py::object activation_fast(py::handle input, double a, double b, py::handle is_inplace) {
  return activation_fast({kind, a, b}, input, is_inplace);
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

}  // namespace

void implement_activation(torch::Library& m, bool meta) {
  meta ? implement_activation<c10::SymInt>(m) : implement_activation<int64_t>(m);
}

TORCH_LIBRARY_IMPL(fastops, CompositeImplicitAutograd, m) {
  m.impl("activation_second_derivative", activation_second_derivative_op);
}

void bind_activation(py::module_& m) {
  fast_def<&prelu_fast>(m, "prelu");
  fast_def<&glu_fast>(m, "glu");

  py::list table;  // what Python reads of it
#define FASTOPS_ROW(kind, formula, function, module, parameters, approximate, in_place, valid, saves, ...) \
  fast_def<&activation_fast<ActivationKind::kind>>(m, #kind);                                              \
  table.append(                                                                                            \
      py::make_tuple(#kind, #function, #module, parameters, approximate, in_place, #valid, saved_name(Saved::saves)));
  FASTOPS_ACTIVATIONS(FASTOPS_ROW)
#undef FASTOPS_ROW
  m.attr("ACTIVATIONS") = table;
  m.def("saved_by_linear",
        [](int kind, double a, double b) { return saved_name(saved_by_linear(make_activation(kind, a, b))); });
  m.def("can_save_output", [](int kind, double a, double b) { return can_save_output(make_activation(kind, a, b)); });
}

}  // namespace fastops
