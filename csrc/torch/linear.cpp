#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include "../kernels/cpu/isa.h"
#include "../kernels/linear.h"
#include "check.h"
#include "memory.h"
#include "ops.h"
#include "record.h"
#include "team.h"

namespace fastops {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// A tensor as a matrix of its last dimension, all others collapsed into rows. `tensor` is replaced by a contiguous copy only
// when the leading dimensions do not collapse into one stride.
Matrix as_matrix(Tensor& tensor) {
  const int64_t dims = tensor.dim();
  if (dims == 1) return {tensor.const_data_ptr(), 0, tensor.stride(0)};
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
  // The innermost leading dimension that has more than one element carries the row stride.
  int64_t row_stride = 0;
  for (int64_t i = dims - 2; i >= 0; --i) {
    if (tensor.size(i) != 1) {
      row_stride = tensor.stride(i);
      break;
    }
  }
  return {tensor.const_data_ptr(), row_stride, tensor.stride(dims - 1)};
}

int64_t rows_of(at::IntArrayRef sizes) {
  int64_t rows = 1;
  for (size_t i = 0; i + 1 < sizes.size(); ++i) rows *= sizes[i];
  return rows;
}

void check_linear(const Tensor& input, const Tensor& weight, const Tensor& bias) {
  check_tensor(input, "linear", "input");
  check_tensor(weight, "linear", "weight");
  check_dtype(weight, input.scalar_type(), "linear", "weight");
  TORCH_CHECK(input.dim() >= 1, "linear: input must have at least one dimension, got a scalar");
  TORCH_CHECK(weight.dim() == 2 && weight.size(1) == input.size(-1),
              "linear: weight must have shape (out_features, in_features) with in_features = ", input.size(-1),
              " (input's last dimension), got ", weight.sizes());
  if (!bias.defined()) return;
  check_tensor(bias, "linear", "bias");
  check_dtype(bias, input.scalar_type(), "linear", "bias");
  TORCH_CHECK(bias.dim() == 1 && bias.size(0) == weight.size(0), "linear: bias must have shape (", weight.size(0),
              ",) (weight's out_features), got ", bias.sizes());
}

struct LinearFunction : torch::autograd::Function<LinearFunction> {
  // Returns {y}, or {y, z} when backward reads the pre-activation: z is an output of this node that nobody else sees, so that
  // gradients of gradients reach x, W and b through it.
  static variable_list forward(AutogradContext* ctx, const Tensor& input, const Tensor& weight,
                               const optional<Tensor>& bias, const Activation& activation) {
    auto [y, z] = linear_forward(input, weight, bias, activation, /*need_saved=*/true);
    const bool identity = activation.kind == ActivationKind::identity;
    const Tensor saved = identity ? Tensor() : z.defined() ? z : y;
    ctx->set_materialize_grads(false);
    // The shape of the gradients survives where the tensors themselves are not needed.
    ctx->save_for_backward({weight.requires_grad() ? input : Tensor(), input.requires_grad() ? weight : Tensor(), saved});
    if (!weight.requires_grad()) ctx->saved_data["input_sizes"] = input.sizes();
    if (!bias) ctx->saved_data["no_bias"] = true;
    if (!identity)
      ctx->saved_data["activation"] =
          std::vector<double>{static_cast<double>(activation.kind), activation.a, activation.b};
    if (z.defined()) return {y, z};
    return {y};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list result(4);
    const Tensor grad_z = grads.size() > 1 ? grads[1] : Tensor();
    if (!grads[0].defined() && !grad_z.defined()) return result;
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &input = saved[0], &weight = saved[1];
    const std::array<bool, 3> wanted = {ctx->needs_input_grad(0), ctx->needs_input_grad(1),
                                         ctx->saved_data.count("no_bias") == 0 && ctx->needs_input_grad(2)};
    Activation activation;
    if (const auto it = ctx->saved_data.find("activation"); it != ctx->saved_data.end()) {
      const auto values = it->second.toDoubleVector();
      activation = {static_cast<ActivationKind>(static_cast<int>(values[0])), values[1], values[2]};
    }

    if (at::GradMode::is_enabled() || grad_z.defined()) {
      Tensor g = grads[0];
      if (g.defined() && activation.kind != ActivationKind::identity)
        g = differentiable_activation_backward(g, saved[2], activation, saved_by_linear(activation));
      if (grad_z.defined()) g = g.defined() ? g + grad_z : grad_z;
      const Tensor g2 = g.reshape({-1, g.size(-1)});
      if (wanted[0]) result[0] = linear(g, weight.t(), std::nullopt, {});
      if (wanted[1]) result[1] = linear(g2.t(), input.reshape({-1, input.size(-1)}).t(), std::nullopt, {});
      if (wanted[2]) result[2] = g2.sum(0);
      return result;
    }

    const auto sizes = input.defined() ? input.sizes().vec() : ctx->saved_data["input_sizes"].toIntVector();
    auto gradients = linear_backward(grads[0], saved[2], input, weight, activation, wanted, sizes, sizes.back());
    std::move(gradients.begin(), gradients.end(), result.begin());
    return result;
  }
};

}  // namespace

LinearOutput linear_forward(const Tensor& input, const Tensor& weight, const optional<Tensor>& bias, Activation activation,
                            bool need_saved) {
  const Tensor b = bias.value_or(Tensor());
  check_linear(input, weight, b);

  const auto type = input.scalar_type();
  const int64_t n = weight.size(0), k = weight.size(1);
  c10::DimVector sizes(input.sizes());
  sizes.back() = n;
  LinearOutput out;
  out.y = empty_output(sizes, type);
  if (need_saved && saved_by_linear(activation) == Saved::input) out.z = empty_output(sizes, type);
  if (out.y.numel() == 0) return out;

  Tensor x = input;
  const LinearForward args{to_dtype(type),
                           rows_of(input.sizes()),
                           n,
                           k,
                           as_matrix(x),
                           {weight.const_data_ptr(), weight.stride(0), weight.stride(1)},
                           b.defined() ? b.const_data_ptr() : nullptr,
                           b.defined() ? b.stride(0) : 0,
                           activation,
                           out.y.mutable_data_ptr(),
                           n,
                           out.z.defined() ? out.z.mutable_data_ptr() : nullptr};
  const KernelTable& table = kernels();
  const Team team = torch_team();
  const Workspace workspace(table.linear_forward_workspace(args, team.threads));
  record::timed(
      [&] {
        return record::Row{"linear", table.linear_forward_name(args), record::shapes_of({input, weight, b}),
                           c10::toString(type)};
      },
      [&] { table.linear_forward(args, workspace.get(), team); });
  return out;
}

std::array<Tensor, 3> linear_backward(const Tensor& grad_output, const Tensor& saved, const Tensor& input,
                                      const Tensor& weight, Activation activation, std::array<bool, 3> output_mask,
                                      at::IntArrayRef input_sizes, int64_t in_features) {
  check_tensor(grad_output, "linear_backward", "grad_output");
  const auto type = grad_output.scalar_type();
  const int64_t n = grad_output.size(-1), m = rows_of(grad_output.sizes()), k = in_features;
  const bool identity = activation.kind == ActivationKind::identity;
  TORCH_CHECK(identity || (saved.defined() && saved.sizes() == grad_output.sizes()),
              "linear_backward: saved must have grad_output's shape ", grad_output.sizes(), ", got ",
              saved.defined() ? saved.sizes() : at::IntArrayRef());
  TORCH_CHECK(!output_mask[0] || (weight.defined() && weight.dim() == 2 && weight.size(0) == n && weight.size(1) == k),
              "linear_backward: weight must have shape (", n, ", ", k, ")");
  TORCH_CHECK(!output_mask[1] || (input.defined() && input.size(-1) == k && rows_of(input.sizes()) == m),
              "linear_backward: input must have ", m, " rows of ", k, " features");

  std::array<Tensor, 3> out;
  if (output_mask[0]) out[0] = empty_output(input_sizes, type);
  if (output_mask[1]) out[1] = empty_output({n, k}, type);
  if (output_mask[2]) out[2] = empty_output({n}, type);
  if (m == 0 || n == 0) {  // sums of nothing
    for (Tensor& gradient : out)
      if (gradient.defined()) gradient.zero_();
    return out;
  }

  Tensor g = grad_output, s = identity ? Tensor() : saved, x = output_mask[1] ? input : Tensor();
  const auto data = [](Tensor& tensor) {
    return tensor.defined() && tensor.numel() > 0 ? tensor.mutable_data_ptr() : nullptr;
  };
  const LinearBackward args{
      to_dtype(type),
      m,
      n,
      k,
      as_matrix(g),
      activation,
      s.defined() ? as_matrix(s) : Matrix{},
      x.defined() ? as_matrix(x) : Matrix{},
      output_mask[0] ? Matrix{weight.const_data_ptr(), weight.stride(0), weight.stride(1)} : Matrix{},
      data(out[0]),
      data(out[1]),
      data(out[2])};
  if (args.grad_x == nullptr && args.grad_w == nullptr && args.grad_b == nullptr) return out;
  const KernelTable& table = kernels();
  const Team team = torch_team();
  const Workspace workspace(table.linear_backward_workspace(args, team.threads));
  record::timed(
      [&] {
        return record::Row{"linear_backward", table.linear_backward_name(args),
                           record::shapes_of({grad_output, input, weight}), c10::toString(type)};
      },
      [&] { table.linear_backward(args, workspace.get(), team); });
  return out;
}

Tensor linear(const Tensor& input, const Tensor& weight, const optional<Tensor>& bias, Activation activation) {
  const bool records = at::GradMode::is_enabled() && (needs_grad(input) || needs_grad(weight) || (bias && needs_grad(*bias)));
  if (!records) return linear_forward(input, weight, bias, activation, /*need_saved=*/false).y;
  return LinearFunction::apply(input, weight, bias, activation)[0];
}

bool linear_accepts(const Tensor& input, const Tensor& weight, const optional<Tensor>& bias) {
  const auto type = input.scalar_type();
  if (!is_supported(type) || weight.scalar_type() != type) return false;
  if (input.dim() < 1 || weight.dim() != 2 || weight.size(1) != input.size(-1)) return false;
  return !bias || (bias->scalar_type() == type && bias->dim() == 1 && bias->size(0) == weight.size(0));
}

}  // namespace fastops
