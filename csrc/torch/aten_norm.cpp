#include <ATen/ATen.h>
#include <ATen/CPUFunctions.h>
#include <ATen/ops/rms_norm_compositeimplicitautograd_dispatch.h>

#include <limits>

#include "aten.h"

namespace fastops::aten {
namespace {

using at::IntArrayRef;

// The dtype of the parameters that are given, which is also that of PyTorch's statistics: the input's, or float32 for
// all of them where the input has 16 bits. None for a mixture.
optional<at::ScalarType> parameter_type(const Tensor& input,
                                        std::initializer_list<const optional<Tensor>*> parameters) {
  optional<at::ScalarType> found;
  for (const auto* parameter : parameters) {
    if (!*parameter) continue;
    const auto type = (*parameter)->scalar_type();
    if (!takes(**parameter) || type != found.value_or(type)) return {};
    found = type;
  }
  const auto own = input.scalar_type(), type = found.value_or(own);
  return type == own || (type == at::kFloat && input.element_size() == 2) ? optional(type) : std::nullopt;
}

// Statistics as the kernels have them, and as PyTorch hands them on.
Tensor widened(const Tensor& tensor) { return tensor.element_size() == 2 ? tensor.to(at::kFloat) : tensor; }

// Where statistics and parameters have 16 bits, each is converted on its way to the kernel, which small calls notice
// (Zen 4, one thread, times PyTorch's speed, forward and backward: layer_norm of 8x64 0.82, 32x256 0.99, 197x768 1.7;
// batch_norm of 64x256 0.88, 8x512x7x7 1.7).
constexpr int64_t kLayerNormFrom = 16384, kBatchNormFrom = 65536;

bool layer_norm_pays(const Tensor& input, at::ScalarType parameters) {
  return input.element_size() != 2 || parameters == at::kFloat || input.numel() >= kLayerNormFrom;
}

// Without statistics of its own a batch_norm of 16 bits needs long planes, or enough rows in channels_last (forward, as
// above: planes of 49 0.5, of 196 1.0 to 1.3, of 3136 1.1 to 1.5; 392 rows of 512 channels 0.8, 6272 rows of 128 1.4).
constexpr int64_t kLongPlane = 128, kManyValues = 1024;

bool batch_norm_pays(const Tensor& input, at::ScalarType parameters, bool training) {
  if (input.element_size() != 2) return true;
  if (training) return parameters == at::kFloat || input.numel() >= kBatchNormFrom;
  const int64_t each = input.numel() / input.size(1);
  return each >= kManyValues && (!input.is_contiguous() || each / input.size(0) >= kLongPlane);
}

// ---- layer_norm

bool fits(const Tensor& input, IntArrayRef normalized, const optional<Tensor>& weight, const optional<Tensor>& bias) {
  if (!takes(input) || input.numel() == 0 || normalized.empty()) return false;
  if (static_cast<size_t>(input.dim()) < normalized.size() ||
      input.sizes().slice(static_cast<size_t>(input.dim()) - normalized.size()) != normalized)
    return false;
  for (const auto* parameter : {&weight, &bias})
    if (*parameter && (*parameter)->sizes() != normalized) return false;
  // Without a weight the kernels take a bias of the input's dtype only.
  const auto type = parameter_type(input, {&weight, &bias});
  return type && (weight || *type == input.scalar_type());
}

std::tuple<Tensor, Tensor, Tensor> native_layer_norm(const Tensor& input, IntArrayRef normalized,
                                                     const optional<Tensor>& given_weight,
                                                     const optional<Tensor>& given_bias, double eps) {
  const optional<Tensor> weight = defined(given_weight), bias = defined(given_bias);
  const auto type = parameter_type(input, {&weight, &bias});
  if (type && layer_norm_pays(input, *type) && fits(input, normalized, weight, bias)) {
    const auto dims = static_cast<int64_t>(normalized.size());
    auto [y, mean, rstd] = layer_norm_with_statistics(input, weight, bias, dims, eps);
    return {std::move(y), mean.to(*type), rstd.to(*type)};
  }
  return pytorch("layer_norm", input,
                 [&] { return at::cpu::native_layer_norm(input, normalized, given_weight, given_bias, eps); });
}

std::tuple<Tensor, Tensor, Tensor> native_layer_norm_backward(const Tensor& grad_output, const Tensor& input,
                                                              IntArrayRef normalized, const Tensor& mean,
                                                              const Tensor& rstd, const optional<Tensor>& given_weight,
                                                              const optional<Tensor>& given_bias,
                                                              std::array<bool, 3> output_mask) {
  const optional<Tensor> weight = defined(given_weight), bias = defined(given_bias);
  const auto type = parameter_type(input, {&weight, &bias});
  if (type && layer_norm_pays(input, *type) && fits(input, normalized, weight, bias) && takes(grad_output, input) &&
      takes(mean, rstd) && mean.scalar_type() == *type && grad_output.sizes() == input.sizes()) {
    const auto dims = static_cast<int64_t>(normalized.size());
    auto [x, w, b] = layer_norm_gradients(grad_output, input, widened(mean), widened(rstd), weight, dims,
                                          {output_mask[0], output_mask[1] && weight, output_mask[2] && bias});
    return {std::move(x), std::move(w), std::move(b)};
  }
  return pytorch("layer_norm_backward", grad_output, [&] {
    return at::cpu::native_layer_norm_backward(grad_output, input, normalized, mean, rstd, given_weight, given_bias,
                                               output_mask);
  });
}

// ---- rms_norm, which PyTorch composes of five ops

Tensor rms_norm(const Tensor& input, c10::SymIntArrayRef shape, const optional<Tensor>& given_weight,
                optional<double> given_eps) {
  const optional<Tensor> weight = defined(given_weight);
  if (takes_recorded(input) && (!weight || (takes(*weight, input) && takes_recorded(*weight))) &&
      input.is_contiguous() && !is_autocast(input)) {
    const auto normalized = c10::asIntArrayRefSlowOpt(shape);
    if (normalized && fits(input, *normalized, weight, {})) {
      const double epsilon = input.scalar_type() == at::kDouble ? std::numeric_limits<double>::epsilon()
                                                                : std::numeric_limits<float>::epsilon();
      return rms_norm_recorded(input, weight, static_cast<int64_t>(normalized->size()), given_eps.value_or(epsilon));
    }
  }
  return at::compositeimplicitautograd::rms_norm_symint(input, shape, given_weight, given_eps);
}

// ---- softmax

bool has_dimension(const Tensor& tensor, int64_t dim) {
  const int64_t dims = std::max<int64_t>(tensor.dim(), 1);
  return -dims <= dim && dim < dims;
}

template <bool log, auto original>
Tensor softmax(const Tensor& input, int64_t dim, bool half_to_float) {
  if (!half_to_float && takes(input) && input.numel() > 0 && input.is_contiguous() && has_dimension(input, dim))
    return softmax_along(input, dim, log);
  return pytorch(log ? "log_softmax" : "softmax", input, [&] { return original(input, dim, half_to_float); });
}

template <bool log, auto original>
Tensor softmax_backward(const Tensor& grad_output, const Tensor& output, int64_t dim, at::ScalarType input_dtype) {
  if (takes(grad_output, output) && input_dtype == output.scalar_type() && output.numel() > 0 &&
      grad_output.sizes() == output.sizes() && output.is_contiguous() && has_dimension(output, dim))
    return softmax_gradient(grad_output, output, dim, log);
  return pytorch(log ? "log_softmax_backward" : "softmax_backward", grad_output,
                 [&] { return original(grad_output, output, dim, input_dtype); });
}

// ---- batch_norm

// Whether these are operands of ours: (batch, channels, ...) of several values for each channel.
bool fits(const Tensor& input, const optional<Tensor>& weight, const optional<Tensor>& bias,
          const optional<Tensor>& running_mean, const optional<Tensor>& running_var, bool training) {
  if (!takes(input) || input.dim() < 2 || input.numel() == 0) return false;
  if (bool(running_mean) != bool(running_var) || (!training && !running_mean)) return false;
  if (training && input.numel() == input.size(1)) return false;
  for (const auto* parameter : {&weight, &bias, &running_mean, &running_var}) {
    if (!*parameter) continue;
    if ((*parameter)->dim() != 1 || (*parameter)->size(0) != input.size(1)) return false;
  }
  const auto type = parameter_type(input, {&weight, &bias, &running_mean, &running_var});
  if (!type || !batch_norm_pays(input, *type, training)) return false;
  for (const auto* running : {&running_mean, &running_var})
    if (*running && !(*running)->is_contiguous()) return false;
  return input.is_contiguous(input.suggest_memory_format());
}

std::tuple<Tensor, Tensor, Tensor> native_batch_norm(const Tensor& input, const optional<Tensor>& given_weight,
                                                     const optional<Tensor>& given_bias,
                                                     const optional<Tensor>& given_mean,
                                                     const optional<Tensor>& given_var, bool training, double momentum,
                                                     double eps) {
  const optional<Tensor> weight = defined(given_weight), bias = defined(given_bias), mean = defined(given_mean),
                         var = defined(given_var);
  if (eps > 0 && fits(input, weight, bias, mean, var, training)) {
    auto [y, save_mean, save_rstd] =
        batch_norm_with_statistics(input, weight, bias, mean, var, training, momentum, eps);
    const auto type = *parameter_type(input, {&weight, &bias, &mean, &var});
    const auto handed_on = [&](const Tensor& tensor) {  // without statistics PyTorch returns tensors of no elements
      return tensor.defined() ? tensor.to(type) : at::empty({0}, input.options().dtype(type));
    };
    return {std::move(y), handed_on(save_mean), handed_on(save_rstd)};
  }
  return pytorch("batch_norm", input, [&] {
    return at::cpu::native_batch_norm(input, given_weight, given_bias, given_mean, given_var, training, momentum, eps);
  });
}

std::tuple<Tensor, Tensor, Tensor> native_batch_norm_backward(
    const Tensor& grad_output, const Tensor& input, const optional<Tensor>& given_weight,
    const optional<Tensor>& given_mean, const optional<Tensor>& given_var, const optional<Tensor>& given_save_mean,
    const optional<Tensor>& given_save_rstd, bool training, double eps, std::array<bool, 3> output_mask) {
  const optional<Tensor> weight = defined(given_weight), mean = defined(given_mean), var = defined(given_var),
                         save_mean = defined(given_save_mean), save_rstd = defined(given_save_rstd);
  const bool saved = !training || (save_mean && save_rstd && takes(*save_mean, *save_rstd));
  if (saved && takes(grad_output, input) && grad_output.sizes() == input.sizes() &&
      fits(input, weight, {}, mean, var, training)) {
    const std::array<bool, 3> wanted{output_mask[0], output_mask[1] && weight, output_mask[2]};
    const Tensor used_mean = widened(training ? *save_mean : *mean);
    const Tensor used_rstd = training ? widened(*save_rstd) : (widened(*var) + eps).rsqrt();
    auto [x, w, b] = batch_norm_gradients(grad_output, input, weight, used_mean, used_rstd, training, wanted);
    return {std::move(x), std::move(w), std::move(b)};
  }
  return pytorch("batch_norm_backward", grad_output, [&] {
    return at::cpu::native_batch_norm_backward(grad_output, input, given_weight, given_mean, given_var, given_save_mean,
                                               given_save_rstd, training, eps, output_mask);
  });
}

}  // namespace

void override_norms(Overrides& overrides) {
  torch::Library& m = overrides.below_autograd;
  put<aten::rms_norm, at::compositeimplicitautograd::rms_norm_symint>(overrides.with_autograd, "rms_norm");
  put<aten::native_layer_norm, at::cpu::native_layer_norm>(m, "native_layer_norm");
  put<aten::native_layer_norm_backward, at::cpu::native_layer_norm_backward>(m, "native_layer_norm_backward");
  put<softmax<false, at::cpu::_softmax>, at::cpu::_softmax>(m, "_softmax");
  put<softmax<true, at::cpu::_log_softmax>, at::cpu::_log_softmax>(m, "_log_softmax");
#define FASTOPS_OVERRIDE_BACKWARD(op, log) put<softmax_backward<log, at::cpu::op>, at::cpu::op>(m, #op);
  FASTOPS_OVERRIDE_BACKWARD(_softmax_backward_data, false)
  FASTOPS_OVERRIDE_BACKWARD(_log_softmax_backward_data, true)
#undef FASTOPS_OVERRIDE_BACKWARD
  put<aten::native_batch_norm, at::cpu::native_batch_norm>(m, "native_batch_norm");
  put<aten::native_batch_norm_backward, at::cpu::native_batch_norm_backward>(m, "native_batch_norm_backward");
}

}  // namespace fastops::aten
