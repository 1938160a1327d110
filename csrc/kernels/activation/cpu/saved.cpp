// Which tensor each activation saves for backward. Compiled without flags of an instruction set.
#include "../activation.h"

namespace fastops {
namespace {

// Whether float32, bf16_t and f16_t all hold x exactly: 8 significant bits, in the normal range of float16. Forward
// rounds a bound to the storage type. Only an exact bound is still the one that backward compares y with.
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
