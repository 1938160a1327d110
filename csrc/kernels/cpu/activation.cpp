// Which tensor backward needs, for each activation. Compiled for the baseline.
#include "../activation.h"

namespace fastops {
namespace {

// A value that float32, bf16_t and f16_t all hold: 8 significant bits, in float16's normal range. Only then is a bound,
// as forward rounds it to the storage type, the bound that backward compares with.
bool exact_in_16_bits(double x) {
  if (x == 0) return true;
  int exponent = 0;
  const double scaled = __builtin_ldexp(__builtin_frexp(x, &exponent), 8);
  return scaled == __builtin_trunc(scaled) && exponent > -13 && exponent <= 15;
}

}  // namespace

Saved saved_by_default(Activation activation) {
  switch (activation.kind) {
    case ActivationKind::identity:
      return Saved::nothing;
    case ActivationKind::relu:
    case ActivationKind::relu6:
    case ActivationKind::leaky_relu:
    case ActivationKind::hardtanh:
    case ActivationKind::hardsigmoid:
    case ActivationKind::hardshrink:
    case ActivationKind::softshrink:
    case ActivationKind::threshold:
      return Saved::mask;
    case ActivationKind::sigmoid:
    case ActivationKind::tanh:
      return Saved::output;
    default:
      return Saved::input;
  }
}

Saved saved_by_linear(Activation activation) {
  switch (activation.kind) {
    case ActivationKind::identity:
      return Saved::nothing;
    case ActivationKind::relu:
    case ActivationKind::relu6:
    case ActivationKind::sigmoid:
    case ActivationKind::tanh:
      return Saved::output;
    case ActivationKind::leaky_relu:
      return activation.a > 0 ? Saved::output : Saved::input;
    case ActivationKind::hardtanh:
      return exact_in_16_bits(activation.a) && exact_in_16_bits(activation.b) ? Saved::output : Saved::input;
    case ActivationKind::hardshrink:
      return activation.a >= 0 ? Saved::output : Saved::input;
    case ActivationKind::softshrink:
      return activation.a >= 0 && exact_in_16_bits(activation.a) ? Saved::output : Saved::input;
    default:
      return Saved::input;
  }
}

bool can_save_output(Activation activation) {
  switch (activation.kind) {
    case ActivationKind::elu:
      return activation.a >= 0;
    case ActivationKind::selu:
      return true;
    case ActivationKind::celu:
      return activation.a > 0;
    default:
      return saved_by_linear(activation) == Saved::output;
  }
}

}  // namespace fastops
