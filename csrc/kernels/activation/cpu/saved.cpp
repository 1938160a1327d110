// What the table of the activations says about one. Compiled without flags of an instruction set.
#include "../activation.h"

namespace fastops {
namespace {

// Whether float32, bf16_t and f16_t all hold x exactly: 8 significant bits, in the normal range of float16. Forward
// rounds a bound to the storage type. Only an exact bound is still the one that backward compares y with.
bool exact(double x) {
  if (x == 0) return true;
  int exponent = 0;
  const double scaled = __builtin_ldexp(__builtin_frexp(x, &exponent), 8);
  return scaled == __builtin_trunc(scaled) && exponent > -13 && exponent <= 15;
}

struct Rules {
  bool valid;
  Saved saves;
  bool from_y, in_place_from_y;
};

Rules rules_of(Activation activation) {
  const double a = activation.a, b = activation.b;
  switch (activation.kind) {
#define FASTOPS_RULES(kind, formula, function, module, parameters, approximate, in_place, valid, saves, from_y, also) \
  case ActivationKind::kind:                                                                                          \
    return {valid, Saved::saves, from_y, also};
    FASTOPS_ACTIVATIONS(FASTOPS_RULES)
#undef FASTOPS_RULES
    case ActivationKind::count:
      break;
  }
  return {};
}

}  // namespace

Saved saved_by_default(Activation activation) { return rules_of(activation).saves; }

Saved saved_by_linear(Activation activation) {
  const Rules rules = rules_of(activation);
  return rules.saves == Saved::nothing ? Saved::nothing : rules.from_y ? Saved::output : Saved::input;
}

bool can_save_output(Activation activation) {
  const Rules rules = rules_of(activation);
  return rules.from_y || rules.in_place_from_y;
}

bool is_valid(Activation activation) { return rules_of(activation).valid; }

}  // namespace fastops
