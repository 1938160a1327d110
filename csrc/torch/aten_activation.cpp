#include <ATen/ATen.h>
#include <ATen/CPUFunctions.h>

#include "aten.h"

namespace fastops::aten {
namespace {

using at::Scalar;
using c10::string_view;
using Kind = ActivationKind;

// What backward reads, and of which activation.
struct Gradient {
  Activation activation;
  Saved kind;
};

// ATen's arguments after the tensors -> the activation, which is not valid where there is none of ours.
constexpr Activation kNone{Kind::count, 0, 0};
template <Kind kind>
Activation plain() {
  return {kind};
}
template <Kind kind>
Activation with_one(const Scalar& a) {
  return {kind, a.toDouble()};
}
template <Kind kind>
Activation with_two(const Scalar& a, const Scalar& b) {
  return {kind, a.toDouble(), b.toDouble()};
}
Activation gelu(string_view approximate) {
  return approximate == "none" ? Activation{Kind::gelu} : approximate == "tanh" ? Activation{Kind::gelu_tanh} : kNone;
}
// ELU, CELU and SELU are one op: scale * (x > 0 ? x : alpha * (exp(input_scale * x) - 1)).
Activation elu(const Scalar& alpha, const Scalar& scale, const Scalar& input_scale) {
  constexpr double kSeluAlpha = 1.6732632423543772848170429916717, kSeluScale = 1.0507009873554804934193349852946;
  const double a = alpha.toDouble(), s = scale.toDouble(), c = input_scale.toDouble();
  if (s == 1 && c == 1) return {Kind::elu, a};
  if (s == 1 && a != 0 && c == 1 / a) return {Kind::celu, a};
  if (s == kSeluScale && a == kSeluAlpha && c == 1) return {Kind::selu};
  return kNone;
}
Activation leaky_relu(const Scalar& slope) { return with_one<Kind::leaky_relu>(slope); }

// The same of gradients.
template <auto activation, Saved kind>
struct Reads;
template <class... Parameters, Activation (*activation)(Parameters...), Saved kind>
struct Reads<activation, kind> {
  static Gradient of(Parameters... parameters) { return {activation(parameters...), kind}; }
};
// ReLU's gradient is that of threshold(x, 0, 0), read from y.
Gradient threshold_gradient(const Scalar& threshold) {
  if (threshold.toDouble() == 0) return {{Kind::relu}, Saved::output};
  return {with_one<Kind::threshold>(threshold), Saved::input};
}
Gradient leaky_relu_gradient(const Scalar& slope, bool from_result) {
  if (from_result && slope.toDouble() <= 0) return {kNone, Saved::output};
  return {leaky_relu(slope), from_result ? Saved::output : Saved::input};
}

bool is_known(Activation activation) { return activation.kind != Kind::count && is_valid(activation); }

template <auto original, auto activation>
struct Forward;
template <class... Parameters, Tensor (*original)(const Tensor&, Parameters...),
          Activation (*activation)(Parameters...)>
struct Forward<original, activation> {
  static inline const char* name;
  static Tensor call(const Tensor& input, Parameters... parameters) {
    if (takes(input) && input.numel() > 0 && reads_in_place(input)) {
      const Activation f = activation(parameters...);
      if (is_known(f)) return activation_forward(input, f, /*need_mask=*/false).y;
    }
    return pytorch(name, input, [&] { return original(input, parameters...); });
  }
};

template <auto original, auto activation>
struct InPlace;
template <class... Parameters, Tensor& (*original)(Tensor&, Parameters...), Activation (*activation)(Parameters...)>
struct InPlace<original, activation> {
  static inline const char* name;
  static Tensor& call(Tensor& input, Parameters... parameters) {
    if (takes(input) && input.numel() > 0 && input.is_non_overlapping_and_dense()) {
      const Activation f = activation(parameters...);
      if (is_known(f)) {
        activate_dense(input, f);
        return input;
      }
    }
    return *pytorch(name, input, [&] { return &original(input, parameters...); });
  }
};

// gradient() is only asked for tensors that are ours to take.
template <class MakeGradient, class Original>
Tensor gradient_or(const char* name, const Tensor& grad_output, const Tensor& saved, MakeGradient&& gradient,
                   Original&& original) {
  if (takes(grad_output, saved) && saved.numel() > 0 && grad_output.sizes() == saved.sizes() &&
      grad_output.strides() == saved.strides() && saved.is_non_overlapping_and_dense()) {
    const Gradient known = gradient();
    if (is_known(known.activation)) return activation_backward(grad_output, saved, known.activation, known.kind);
  }
  return pytorch(name, grad_output, original);
}

template <auto original, auto gradient>
struct Backward;
template <class... Parameters, Tensor (*original)(const Tensor&, const Tensor&, Parameters...),
          Gradient (*gradient)(Parameters...)>
struct Backward<original, gradient> {
  static inline const char* name;
  static Tensor call(const Tensor& grad_output, const Tensor& saved, Parameters... parameters) {
    return gradient_or(
        name, grad_output, saved, [&] { return gradient(parameters...); },
        [&] { return original(grad_output, saved, parameters...); });
  }
};

Tensor elu_backward(const Tensor& grad_output, const Scalar& alpha, const Scalar& scale, const Scalar& input_scale,
                    bool is_result, const Tensor& saved) {
  const auto gradient = [&]() -> Gradient {
    const Activation f = is_result && alpha.toDouble() < 0 ? kNone : elu(alpha, scale, input_scale);
    return {f, is_result ? Saved::output : Saved::input};
  };
  return gradient_or("elu_backward", grad_output, saved, gradient,
                     [&] { return at::cpu::elu_backward(grad_output, alpha, scale, input_scale, is_result, saved); });
}

template <template <auto, auto> class Override, auto original, auto parameters>
void put(Overrides& overrides, const char* name) {
  Override<original, parameters>::name = name;
  aten::put<Override<original, parameters>::call, original>(overrides.below_autograd, name);
}

bool takes_halves(const Tensor& input, int64_t dim) {
  return takes(input) && input.is_contiguous() && input.numel() > 0 && glu_accepts(input, dim);
}
Tensor glu(const Tensor& input, int64_t dim) {
  if (takes_halves(input, dim)) return glu_forward(input, dim);
  return pytorch("glu", input, [&] { return at::cpu::glu(input, dim); });
}
Tensor glu_backward(const Tensor& grad_output, const Tensor& input, int64_t dim) {
  if (takes_halves(input, dim) && takes(grad_output, input) && grad_output.is_contiguous())
    return fastops::glu_backward(grad_output, input, dim);
  return pytorch("glu_backward", grad_output, [&] { return at::cpu::glu_backward(grad_output, input, dim); });
}

}  // namespace

void override_activations(Overrides& overrides) {
#define FASTOPS_OVERRIDE(op, activation)                 \
  put<Forward, at::cpu::op, activation>(overrides, #op); \
  put<InPlace, at::cpu::op##_, activation>(overrides, #op "_");
#define FASTOPS_OVERRIDE_BACKWARD(op, gradient) put<Backward, at::cpu::op, gradient>(overrides, #op);
  FASTOPS_OVERRIDE(relu, plain<Kind::relu>)
  FASTOPS_OVERRIDE(gelu, gelu)
  FASTOPS_OVERRIDE(silu, plain<Kind::silu>)
  FASTOPS_OVERRIDE(mish, plain<Kind::mish>)
  FASTOPS_OVERRIDE(sigmoid, plain<Kind::sigmoid>)
  FASTOPS_OVERRIDE(tanh, plain<Kind::tanh>)
  FASTOPS_OVERRIDE(elu, elu)
  FASTOPS_OVERRIDE(leaky_relu, leaky_relu)
  FASTOPS_OVERRIDE(hardtanh, with_two<Kind::hardtanh>)
  FASTOPS_OVERRIDE(hardsigmoid, plain<Kind::hardsigmoid>)
  FASTOPS_OVERRIDE(hardswish, plain<Kind::hardswish>)
  FASTOPS_OVERRIDE(threshold, with_two<Kind::threshold>)
  put<Forward, at::cpu::softplus, with_two<Kind::softplus>>(overrides, "softplus");
  put<Forward, at::cpu::hardshrink, with_one<Kind::hardshrink>>(overrides, "hardshrink");
  put<Forward, at::cpu::softshrink, with_one<Kind::softshrink>>(overrides, "softshrink");
  FASTOPS_OVERRIDE_BACKWARD(threshold_backward, threshold_gradient)
  FASTOPS_OVERRIDE_BACKWARD(gelu_backward, (Reads<gelu, Saved::input>::of))
  FASTOPS_OVERRIDE_BACKWARD(silu_backward, (Reads<plain<Kind::silu>, Saved::input>::of))
  FASTOPS_OVERRIDE_BACKWARD(mish_backward, (Reads<plain<Kind::mish>, Saved::input>::of))
  FASTOPS_OVERRIDE_BACKWARD(sigmoid_backward, (Reads<plain<Kind::sigmoid>, Saved::output>::of))
  FASTOPS_OVERRIDE_BACKWARD(tanh_backward, (Reads<plain<Kind::tanh>, Saved::output>::of))
  FASTOPS_OVERRIDE_BACKWARD(leaky_relu_backward, leaky_relu_gradient)
  FASTOPS_OVERRIDE_BACKWARD(hardtanh_backward, (Reads<with_two<Kind::hardtanh>, Saved::input>::of))
  FASTOPS_OVERRIDE_BACKWARD(hardsigmoid_backward, (Reads<plain<Kind::hardsigmoid>, Saved::input>::of))
  FASTOPS_OVERRIDE_BACKWARD(hardswish_backward, (Reads<plain<Kind::hardswish>, Saved::input>::of))
  FASTOPS_OVERRIDE_BACKWARD(softplus_backward, (Reads<with_two<Kind::softplus>, Saved::input>::of))
  FASTOPS_OVERRIDE_BACKWARD(hardshrink_backward, (Reads<with_one<Kind::hardshrink>, Saved::input>::of))
  FASTOPS_OVERRIDE_BACKWARD(softshrink_backward, (Reads<with_one<Kind::softshrink>, Saved::input>::of))
#undef FASTOPS_OVERRIDE_BACKWARD
#undef FASTOPS_OVERRIDE
  aten::put<elu_backward, at::cpu::elu_backward>(overrides.below_autograd, "elu_backward");
  aten::put<aten::glu, at::cpu::glu>(overrides.below_autograd, "glu");
  aten::put<aten::glu_backward, at::cpu::glu_backward>(overrides.below_autograd, "glu_backward");
}

}  // namespace fastops::aten
