#include <ATen/ATen.h>
#include <ATen/MemoryOverlap.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/csrc/autograd/custom_function.h>

#include <cmath>

#include "../kernels/cpu/isa.h"
#include "check.h"
#include "memory.h"
#include "ops.h"
#include "record.h"
#include "team.h"

namespace fastops {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr const char* kActivationNames[] = {
    "identity", "relu",        "relu6",     "leaky_relu", "elu",      "selu",     "celu",       "gelu",
    "gelu_tanh", "silu",       "mish",      "sigmoid",    "logsigmoid", "tanh",   "softplus",   "softsign",
    "hardtanh", "hardsigmoid", "hardswish", "hardshrink", "softshrink", "tanhshrink", "threshold"};
static_assert(sizeof kActivationNames / sizeof *kActivationNames == static_cast<size_t>(ActivationKind::count));
constexpr const char* kSavedNames[] = {"nothing", "mask", "output", "input"};

bool is_dense(const Tensor& tensor) { return tensor.is_non_overlapping_and_dense(); }

// How a kernel walks a tensor: a dense one as a single row in memory order, a 2-D slice row by row.
struct Rows {
  int64_t rows, cols, stride;
};

// A tensor that is not dense but whose leading dimensions step evenly over contiguous rows (a slice of the last dimension), as
// rows. Returns rows == 0 where it is neither.
Rows rows_of(const Tensor& tensor) {
  if (is_dense(tensor)) return {1, tensor.numel(), tensor.numel()};
  const int64_t dims = tensor.dim();
  if (dims < 2 || tensor.stride(dims - 1) != 1) return {0, 0, 0};
  const int64_t cols = tensor.size(dims - 1);
  int64_t rows = 1, stride = 0;
  for (int64_t i = dims - 2; i >= 0; --i) {
    if (tensor.size(i) == 1) continue;
    if (stride == 0)
      stride = tensor.stride(i);
    else if (tensor.stride(i) != stride * rows)
      return {0, 0, 0};
    rows *= tensor.size(i);
  }
  return stride >= cols ? Rows{rows, cols, stride} : Rows{0, 0, 0};
}

// An uninitialised tensor for a result of this input: the same memory order where the input is dense, contiguous otherwise.
Tensor empty_result(const Tensor& input) {
  if (input.is_contiguous() || !is_dense(input)) return empty_output(input.sizes(), input.scalar_type());
  return empty_output_strided(input.sizes(), input.strides(), input.scalar_type());
}

// The tensor in the memory order of `strides`: itself where it lies so, a copy otherwise.
Tensor in_order(const Tensor& tensor, at::IntArrayRef sizes, at::IntArrayRef strides) {
  bool same = true;
  for (int64_t i = 0; i < tensor.dim(); ++i)
    same &= tensor.size(i) == 1 || tensor.stride(i) == strides[static_cast<size_t>(i)];
  if (same) return tensor;
  Tensor copy = empty_output_strided(sizes, strides, tensor.scalar_type());
  copy.copy_(tensor);
  return copy;
}

void run_forward(const Tensor& input, const Rows& rows, Tensor& y, Tensor& mask, Activation activation) {
  const ActivationForward args{to_dtype(input.scalar_type()),
                               activation,
                               rows.rows,
                               rows.cols,
                               input.const_data_ptr(),
                               rows.stride,
                               y.mutable_data_ptr(),
                               mask.defined() ? mask.mutable_data_ptr<uint8_t>() : nullptr};
  const KernelTable& table = kernels();
  record::timed(
      [&] {
        return record::Row{activation_name(activation.kind), table.isa, record::shapes_of({input}),
                           c10::toString(input.scalar_type())};
      },
      [&] { table.activation_forward(args, torch_team()); });
}

std::vector<double> pack(Activation activation, Saved kind) {
  return {static_cast<double>(activation.kind), activation.a, activation.b, static_cast<double>(kind)};
}

std::pair<Activation, Saved> unpack(const c10::IValue& packed) {
  const auto values = packed.toDoubleVector();
  return {{static_cast<ActivationKind>(static_cast<int>(values[0])), values[1], values[2]},
          static_cast<Saved>(static_cast<int>(values[3]))};
}

struct ActivationBackwardFunction : torch::autograd::Function<ActivationBackwardFunction> {
  static Tensor forward(AutogradContext* ctx, const Tensor& grad_output, const Tensor& saved,
                        const Activation& activation, Saved kind, const std::vector<int64_t>& mask_strides) {
    ctx->save_for_backward({grad_output, saved});
    ctx->saved_data["activation"] = pack(activation, kind);
    ctx->saved_data["mask_strides"] = mask_strides;
    return activation_backward(grad_output, saved, activation, kind, mask_strides);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list tensors = ctx->get_saved_variables();
    const Tensor &grad_output = tensors[0], &saved = tensors[1];
    const auto [activation, kind] = unpack(ctx->saved_data["activation"]);
    variable_list result(5);
    if (ctx->needs_input_grad(0))
      result[0] = differentiable_activation_backward(grads[0], saved, activation, kind,
                                                     ctx->saved_data["mask_strides"].toIntVector());
    if (kind != Saved::mask && ctx->needs_input_grad(1))
      result[1] = grads[0] * grad_output * activation_second_derivative(saved, activation, kind);
    return result;
  }
};

// Backward of both the out-of-place and the in-place activation.
variable_list backward_of_activation(AutogradContext* ctx, const Tensor& grad_output) {
  const Tensor saved = ctx->get_saved_variables()[0];
  const auto [activation, kind] = unpack(ctx->saved_data["activation"]);
  std::vector<int64_t> strides;
  if (const auto it = ctx->saved_data.find("mask_strides"); it != ctx->saved_data.end()) strides = it->second.toIntVector();
  const Tensor gradient = at::GradMode::is_enabled()
                              ? differentiable_activation_backward(grad_output, saved, activation, kind, strides)
                              : activation_backward(grad_output, saved, activation, kind, strides);
  return {gradient, Tensor()};
}

void save_mask(AutogradContext* ctx, const ActivationOutput& out) {
  ctx->save_for_backward({out.mask});
  if (!out.y.is_contiguous()) ctx->saved_data["mask_strides"] = out.y.strides();
}

struct ActivationFunction : torch::autograd::Function<ActivationFunction> {
  static Tensor forward(AutogradContext* ctx, const Tensor& input, const Activation& activation) {
    const Saved kind = saved_by_default(activation);
    const ActivationOutput out = activation_forward(input, activation, kind == Saved::mask);
    ctx->saved_data["activation"] = pack(activation, kind);
    if (kind == Saved::mask)
      save_mask(ctx, out);
    else
      ctx->save_for_backward({kind == Saved::output ? out.y : input});
    return out.y;
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    return backward_of_activation(ctx, grads[0]);
  }
};

struct InplaceActivationFunction : torch::autograd::Function<InplaceActivationFunction> {
  static Tensor forward(AutogradContext* ctx, const Tensor& input, const Activation& activation) {
    Saved kind = saved_by_default(activation);
    if (kind == Saved::input && can_save_output(activation)) kind = Saved::output;
    ctx->saved_data["activation"] = pack(activation, kind);
    if (kind == Saved::input) ctx->save_for_backward({input.clone()});
    Tensor x = input, mask;
    if (is_dense(x)) {
      if (kind == Saved::mask) mask = empty_output({mask_row_bytes(x.numel())}, at::kByte);
      if (x.numel() > 0) run_forward(x, rows_of(x), x, mask, activation);
    } else {
      const ActivationOutput out = activation_forward(x, activation, kind == Saved::mask);
      x.copy_(out.y);
      mask = out.mask;
    }
    if (kind == Saved::mask) {
      ctx->save_for_backward({mask});
      if (is_dense(x) && !x.is_contiguous()) ctx->saved_data["mask_strides"] = x.strides();
    }
    if (kind == Saved::output) ctx->save_for_backward({x});
    ctx->mark_dirty({x});
    return x;
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    return backward_of_activation(ctx, grads[0]);
  }
};

// ---- PReLU

// input as (outer, channels, inner) in memory order, with channels == 1 for a shared weight.
struct Channels {
  int64_t outer, channels, inner;
};

bool is_channels_last(const Tensor& tensor) {
  return !tensor.is_contiguous() &&
         (tensor.is_contiguous(at::MemoryFormat::ChannelsLast) || tensor.is_contiguous(at::MemoryFormat::ChannelsLast3d));
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
  const bool fits = weights == 1 ? is_dense(input) : input.is_contiguous() || is_channels_last(input);
  return fits ? input : input.contiguous();
}

void check_prelu(const Tensor& input, const Tensor& weight) {
  check_tensor(input, "prelu", "input");
  check_tensor(weight, "prelu", "weight");
  check_dtype(weight, input.scalar_type(), "prelu", "weight");
  const int64_t channels = input.dim() > 1 ? input.size(1) : 1;
  TORCH_CHECK(weight.dim() <= 1 && (weight.numel() == 1 || weight.numel() == channels),
              "prelu: weight must hold 1 number or one a channel (", channels, "), got shape ", weight.sizes());
}

struct PreluFunction : torch::autograd::Function<PreluFunction> {
  static Tensor forward(AutogradContext* ctx, const Tensor& input, const Tensor& weight) {
    ctx->save_for_backward({input, weight});
    return prelu_forward(input, weight);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &input = saved[0], &weight = saved[1], &g = grads[0];
    const std::array<bool, 2> wanted = {ctx->needs_input_grad(0), ctx->needs_input_grad(1)};
    if (!at::GradMode::is_enabled()) {
      auto [grad_input, grad_weight] = prelu_backward(g, input, weight, wanted);
      return {grad_input, grad_weight};
    }
    // Somebody will differentiate this gradient: write it in torch's own differentiable ops.
    std::vector<int64_t> shape(static_cast<size_t>(input.dim()), 1);
    if (weight.numel() != 1) shape[1] = weight.numel();
    const Tensor w = weight.numel() == 1 ? weight.reshape({}) : weight.reshape(shape);
    const Tensor positive = input > 0;
    variable_list result(2);
    if (wanted[0]) result[0] = at::where(positive, g, w * g);
    if (wanted[1]) {
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

Halves halves_of(const Tensor& input, int64_t dim) {
  Halves halves{1, input.size(dim) / 2};
  for (int64_t i = 0; i < dim; ++i) halves.outer *= input.size(i);
  for (int64_t i = dim + 1; i < input.dim(); ++i) halves.inner *= input.size(i);
  return halves;
}

int64_t check_glu(const Tensor& input, int64_t dim) {
  check_tensor(input, "glu", "input");
  TORCH_CHECK(input.dim() > 0, "glu: input must have at least one dimension, got a scalar");
  const int64_t wrapped = at::maybe_wrap_dim(dim, input.dim());
  TORCH_CHECK(input.size(wrapped) % 2 == 0, "glu: input's dimension ", dim, " must have an even size, got ",
              input.size(wrapped));
  return wrapped;
}

struct GluFunction : torch::autograd::Function<GluFunction> {
  static Tensor forward(AutogradContext* ctx, const Tensor& input, int64_t dim) {
    ctx->save_for_backward({input});
    ctx->saved_data["dim"] = dim;
    return glu_forward(input, dim);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const Tensor input = ctx->get_saved_variables()[0], &g = grads[0];
    const int64_t dim = ctx->saved_data["dim"].toInt();
    if (!at::GradMode::is_enabled()) return {fastops::glu_backward(g, input, dim), Tensor()};
    // Somebody will differentiate this gradient: write it in torch's own differentiable ops.
    const auto halves = input.chunk(2, dim);
    const Tensor s = halves[1].sigmoid();
    return {at::cat({g * s, g * halves[0] * s * (1 - s)}, dim), Tensor()};
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
  TORCH_CHECK_VALUE(false, "saved_kind: expected 'nothing', 'mask', 'output' or 'input', got '", std::string(name), "'");
}

const char* saved_name(Saved kind) { return kSavedNames[static_cast<int>(kind)]; }

ActivationOutput activation_forward(const Tensor& input, Activation activation, bool need_mask) {
  check_tensor(input, activation_name(activation.kind), "input");
  Tensor x = input;
  Rows rows = rows_of(x);
  // A mask is one flat row of bits, so a slice keeps its rows only when they end on whole bytes.
  if (rows.rows == 0 || (need_mask && rows.rows > 1 && rows.cols % 8 != 0)) {
    x = x.contiguous();
    rows = rows_of(x);
  }
  ActivationOutput out;
  out.y = empty_result(x);
  if (need_mask) out.mask = empty_output({mask_row_bytes(x.numel())}, at::kByte);
  if (x.numel() > 0) run_forward(x, rows, out.y, out.mask, activation);
  return out;
}

Tensor activation_backward(const Tensor& grad_output, const Tensor& saved, Activation activation, Saved kind,
                           at::IntArrayRef mask_strides) {
  check_tensor(grad_output, "activation_backward", "grad_output");
  if (kind == Saved::nothing) return grad_output.clone();
  Tensor g = grad_output, s = saved;
  Rows g_rows, s_rows;
  if (kind == Saved::mask) {
    TORCH_CHECK(saved.scalar_type() == at::kByte && saved.numel() == mask_row_bytes(g.numel()),
                "activation_backward: saved must be a mask of ", mask_row_bytes(g.numel()), " bytes, got ",
                saved.numel(), " elements of ", saved.scalar_type());
    g = mask_strides.empty() ? g.contiguous() : in_order(g, g.sizes(), mask_strides);
    g_rows = s_rows = {1, g.numel(), g.numel()};
  } else {
    check_tensor(saved, "activation_backward", "saved");
    check_dtype(saved, g.scalar_type(), "activation_backward", "saved");
    TORCH_CHECK(saved.sizes() == g.sizes(), "activation_backward: saved must have grad_output's shape ", g.sizes(),
                ", got ", saved.sizes());
    if (is_dense(s)) {
      g = in_order(g, s.sizes(), s.strides());
      g_rows = s_rows = {1, g.numel(), g.numel()};
    } else {
      s_rows = rows_of(s);
      if (s_rows.rows == 0) s = s.contiguous(), s_rows = {1, s.numel(), s.numel()};
      g = g.contiguous();
      g_rows = {s_rows.rows, s_rows.cols, s_rows.cols};
    }
  }
  Tensor grad_input = empty_result(g);
  if (g.numel() == 0) return grad_input;
  const ActivationBackward args{to_dtype(g.scalar_type()), activation,      kind,
                                s_rows.rows,               s_rows.cols,     g.const_data_ptr(),
                                g_rows.stride,             s.const_data_ptr(), s_rows.stride,
                                grad_input.mutable_data_ptr()};
  const KernelTable& table = kernels();
  record::timed(
      [&] {
        return record::Row{std::string(activation_name(activation.kind)) + "_backward", table.isa,
                           record::shapes_of({g}), c10::toString(g.scalar_type())};
      },
      [&] { table.activation_backward(args, torch_team()); });
  return grad_input;
}

Tensor differentiable_activation_backward(const Tensor& grad_output, const Tensor& saved, Activation activation,
                                          Saved kind, at::IntArrayRef mask_strides) {
  return ActivationBackwardFunction::apply(grad_output, saved, activation, kind, mask_strides.vec());
}

Tensor activation(const Tensor& input, Activation activation) {
  if (at::GradMode::is_enabled() && input.requires_grad()) return ActivationFunction::apply(input, activation);
  return activation_forward(input, activation, /*need_mask=*/false).y;
}

Tensor activation_(const Tensor& input, Activation activation) {
  check_tensor(input, activation_name(activation.kind), "input");
  at::assert_no_internal_overlap(input);
  const bool records = at::GradMode::is_enabled() && input.requires_grad();
  torch::autograd::check_inplace(input, records);
  if (records) return InplaceActivationFunction::apply(input, activation);
  if (input.numel() == 0) return input;
  Tensor x = input, none;
  if (is_dense(x)) {
    run_forward(x, rows_of(x), x, none, activation);
    if (!x.is_inference()) x.unsafeGetTensorImpl()->bump_version();
  } else {
    x.copy_(activation_forward(x, activation, /*need_mask=*/false).y);
  }
  return input;
}

Tensor activation_second_derivative(const Tensor& saved, Activation activation, Saved kind) {
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
        return at::zeros_like(s);
    }
  }
  switch (activation.kind) {
    case ActivationKind::elu:
      return where_negative(a * s.exp());
    case ActivationKind::selu:
      return where_negative(kSeluScale * kSeluAlpha * s.exp());
    case ActivationKind::celu:
      return where_negative((s / a).exp() / a);
    case ActivationKind::gelu:
      return (2 - s * s) * (-0.5 * s * s).exp() * (1 / std::sqrt(2 * M_PI));
    case ActivationKind::gelu_tanh: {
      const double c = std::sqrt(2 / M_PI), d = 0.044715;
      const Tensor t = (c * (s + d * s * s * s)).tanh(), sech2 = 1 - t * t;
      const Tensor u1 = c * (1 + 3 * d * s * s), u2 = c * 6 * d * s;
      return sech2 * u1 + 0.5 * s * sech2 * (u2 - 2 * t * u1 * u1);
    }
    case ActivationKind::silu: {
      const Tensor g = s.sigmoid();
      return g * (1 - g) * (2 + s * (1 - 2 * g));
    }
    case ActivationKind::mish: {
      const Tensor g = s.sigmoid(), t = at::softplus(s).tanh(), sech2 = 1 - t * t;
      return sech2 * (2 * g + s * (g * (1 - g) - 2 * t * g * g));
    }
    case ActivationKind::sigmoid: {
      const Tensor g = s.sigmoid();
      return g * (1 - g) * (1 - 2 * g);
    }
    case ActivationKind::logsigmoid: {
      const Tensor g = s.sigmoid();
      return g * (g - 1);
    }
    case ActivationKind::tanh: {
      const Tensor t = s.tanh();
      return -2 * t * (1 - t * t);
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
    default:  // piecewise linear
      return at::zeros_like(s);
  }
}

Tensor prelu_forward(const Tensor& input, const Tensor& weight) {
  check_prelu(input, weight);
  const Tensor x = prelu_layout(input, weight.numel());
  Tensor y = empty_result(x);
  if (x.numel() == 0) return y;
  const auto [outer, channels, inner] = channels_of(x, weight.numel());
  const PreluForward args{to_dtype(x.scalar_type()), outer,           channels, inner, x.const_data_ptr(), weight.const_data_ptr(),
                          weight.dim() ? weight.stride(0) : 0, y.mutable_data_ptr()};
  const KernelTable& table = kernels();
  record::timed(
      [&] {
        return record::Row{"prelu", table.isa, record::shapes_of({x, weight}), c10::toString(x.scalar_type())};
      },
      [&] { table.prelu_forward(args, torch_team()); });
  return y;
}

std::array<Tensor, 2> prelu_backward(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                                     std::array<bool, 2> output_mask) {
  check_prelu(input, weight);
  check_dtype(grad_output, input.scalar_type(), "prelu_backward", "grad_output");
  TORCH_CHECK(grad_output.sizes() == input.sizes(), "prelu_backward: grad_output must have input's shape ",
              input.sizes(), ", got ", grad_output.sizes());
  const Tensor x = prelu_layout(input, weight.numel());
  const Tensor g = in_order(grad_output, x.sizes(), x.strides());
  std::array<Tensor, 2> out;
  if (output_mask[0]) out[0] = empty_result(x);
  if (output_mask[1]) out[1] = empty_output(weight.sizes(), weight.scalar_type());
  if (x.numel() == 0) {
    if (out[1].defined()) out[1].zero_();
    return out;
  }
  const auto [outer, channels, inner] = channels_of(x, weight.numel());
  const PreluBackward args{to_dtype(x.scalar_type()),
                           outer,
                           channels,
                           inner,
                           g.const_data_ptr(),
                           x.const_data_ptr(),
                           weight.const_data_ptr(),
                           weight.dim() ? weight.stride(0) : 0,
                           out[0].defined() ? out[0].mutable_data_ptr() : nullptr,
                           out[1].defined() ? out[1].mutable_data_ptr() : nullptr};
  const KernelTable& table = kernels();
  const Workspace workspace(table.prelu_backward_workspace(args));
  record::timed(
      [&] {
        return record::Row{"prelu_backward", table.isa, record::shapes_of({g, x, weight}),
                           c10::toString(x.scalar_type())};
      },
      [&] { table.prelu_backward(args, workspace.get(), torch_team()); });
  return out;
}

Tensor prelu(const Tensor& input, const Tensor& weight) {
  if (at::GradMode::is_enabled() && (input.requires_grad() || weight.requires_grad()))
    return PreluFunction::apply(input, weight);
  return prelu_forward(input, weight);
}

bool prelu_accepts(const Tensor& input, const Tensor& weight) {
  return is_supported(input.scalar_type()) && weight.scalar_type() == input.scalar_type() && weight.dim() <= 1 &&
         (weight.numel() == 1 || (input.dim() > 1 && weight.numel() == input.size(1)));
}

Tensor glu_forward(const Tensor& input, int64_t dim) {
  const int64_t axis = check_glu(input, dim);
  const Tensor x = input.contiguous();
  c10::DimVector sizes(x.sizes());
  sizes[static_cast<size_t>(axis)] /= 2;
  Tensor y = empty_output(sizes, x.scalar_type());
  if (y.numel() == 0) return y;
  const auto [outer, inner] = halves_of(x, axis);
  const GluForward args{to_dtype(x.scalar_type()), outer, inner, x.const_data_ptr(), y.mutable_data_ptr()};
  const KernelTable& table = kernels();
  record::timed(
      [&] { return record::Row{"glu", table.isa, record::shapes_of({x}), c10::toString(x.scalar_type())}; },
      [&] { table.glu_forward(args, torch_team()); });
  return y;
}

Tensor glu_backward(const Tensor& grad_output, const Tensor& input, int64_t dim) {
  const int64_t axis = check_glu(input, dim);
  check_dtype(grad_output, input.scalar_type(), "glu_backward", "grad_output");
  c10::DimVector sizes(input.sizes());
  sizes[static_cast<size_t>(axis)] /= 2;
  TORCH_CHECK(grad_output.sizes() == sizes, "glu_backward: grad_output must have shape ", at::IntArrayRef(sizes),
              ", got ", grad_output.sizes());
  const Tensor x = input.contiguous(), g = grad_output.contiguous();
  Tensor grad_input = empty_output(x.sizes(), x.scalar_type());
  if (x.numel() == 0) return grad_input;
  const auto [outer, inner] = halves_of(x, axis);
  const GluBackward args{to_dtype(x.scalar_type()), outer,           inner, g.const_data_ptr(), x.const_data_ptr(),
                         grad_input.mutable_data_ptr()};
  const KernelTable& table = kernels();
  record::timed(
      [&] {
        return record::Row{"glu_backward", table.isa, record::shapes_of({g, x}), c10::toString(x.scalar_type())};
      },
      [&] { table.glu_backward(args, torch_team()); });
  return grad_input;
}

Tensor glu(const Tensor& input, int64_t dim) {
  if (at::GradMode::is_enabled() && input.requires_grad()) return GluFunction::apply(input, dim);
  return glu_forward(input, dim);
}

bool glu_accepts(const Tensor& input, int64_t dim) {
  if (!is_supported(input.scalar_type()) || input.dim() == 0) return false;
  if (dim < -input.dim() || dim >= input.dim()) return false;
  return input.size(dim) % 2 == 0;
}

}  // namespace fastops
