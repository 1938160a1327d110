// Every activation and its derivative, for any Vec. Included after math.inl.
//
// A kind is a struct of static functions:
//   forward(x, p)                  f(x)
//   backward(g, x, p)              g f'(x)
//   backward_from_output(g, y, p)  g f'(x), computed from y = f(x), for the kinds where that is possible
//   inside(x, p)                   for the kinds with a mask: which of its two values the derivative takes at x
//   apply(inside, g, p)            for the same kinds: g times that value
// PyTorch's vectorised loops and its scalar loops disagree about the gradient at NaN. The functions here agree with the
// scalar loops, which are the documented formulas. At infinities they give the limit, also where PyTorch's formulas
// give NaN.
#pragma once

// The parameters of an activation in the form that the formulas use, broadcast to vectors.
template <class S>
struct Parameters {
  Vec<Compute<S>> a, b, c;
};

// x rounded to the storage type.
template <class S>
inline double round_to(double x) {
  Compute<S> value = static_cast<Compute<S>>(x);
  S stored;
  Vec<Compute<S>>::set1(value).store(&stored, 1);
  Vec<Compute<S>>::load(&stored, 1).store(&value, 1);
  return value;
}

template <class S>
inline Parameters<S> parameters(const Activation& activation) {
  using C = Compute<S>;
  constexpr double kSeluAlpha = 1.6732632423543772848170429916717, kSeluScale = 1.0507009873554804934193349852946;
  double a = activation.a, b = activation.b, c = 0;
  switch (activation.kind) {
    case ActivationKind::relu6:  // as hardtanh
      a = 0;
      b = 6;
      break;
    case ActivationKind::elu:  // elu, selu and celu: x > 0 ? b x : a (exp(c x) - 1)
      b = 1;
      c = 1;
      break;
    case ActivationKind::selu:
      a = kSeluAlpha * kSeluScale;
      b = kSeluScale;
      c = 1;
      break;
    case ActivationKind::celu:
      b = 1;
      c = 1 / a;
      break;
    case ActivationKind::softplus:
      c = 1 / a;
      break;
    case ActivationKind::hardshrink:
      a = round_to<S>(a);
      break;
    case ActivationKind::softshrink:
      b = round_to<S>(a);
      c = saved_by_linear(activation) == Saved::output ? 0 : b;
      break;
    default:
      break;
  }
  return {set<C>(a), set<C>(b), set<C>(c)};
}

// The base of the piecewise linear kinds whose derivative is one inside and zero outside.
struct ZeroOutside {
  template <class S, class C = Compute<S>>
  static FASTOPS_FN Vec<C> apply(Mask<C> inside, Vec<C> g, const Parameters<S>&) {
    return select(inside, g, Vec<C>::zero());
  }
};

struct Identity {
  template <class S, class C = Compute<S>>
  static FASTOPS_FN Vec<C> forward(Vec<C> x, const Parameters<S>&) {
    return x;
  }
  template <class S, class C = Compute<S>>
  static FASTOPS_FN Vec<C> backward(Vec<C> g, Vec<C>, const Parameters<S>&) {
    return g;
  }
};

struct Relu : ZeroOutside {
  template <class S, class C = Compute<S>>
  static FASTOPS_FN Vec<C> forward(Vec<C> x, const Parameters<S>&) {
    return max(Vec<C>::zero(), x);
  }
  template <class S, class C = Compute<S>>
  static FASTOPS_FN Mask<C> inside(Vec<C> x, const Parameters<S>&) {
    return !le(x, Vec<C>::zero());
  }
  template <class S, class C = Compute<S>>
  static FASTOPS_FN Mask<C> inside_from_output(Vec<C> y, const Parameters<S>& p) {
    return inside(y, p);
  }
};

struct LeakyRelu {
  template <class S, class C = Compute<S>>
  static FASTOPS_FN Vec<C> forward(Vec<C> x, const Parameters<S>& p) {
    return select(gt(x, Vec<C>::zero()), x, x * p.a);
  }
  template <class S, class C = Compute<S>>
  static FASTOPS_FN Mask<C> inside(Vec<C> x, const Parameters<S>&) {
    return gt(x, Vec<C>::zero());
  }
  template <class S, class C = Compute<S>>
  static FASTOPS_FN Mask<C> inside_from_output(Vec<C> y, const Parameters<S>& p) {
    return inside(y, p);
  }
  template <class S, class C = Compute<S>>
  static FASTOPS_FN Vec<C> apply(Mask<C> inside, Vec<C> g, const Parameters<S>& p) {
    return select(inside, g, g * p.a);
  }
};

struct Hardtanh : ZeroOutside {  // and relu6
  template <class S, class C = Compute<S>>
  static FASTOPS_FN Vec<C> forward(Vec<C> x, const Parameters<S>& p) {
    return min(p.b, max(p.a, x));
  }
  template <class S, class C = Compute<S>>
  static FASTOPS_FN Mask<C> inside(Vec<C> x, const Parameters<S>& p) {
    return !(le(x, p.a) | ge(x, p.b));
  }
  template <class S, class C = Compute<S>>
  static FASTOPS_FN Mask<C> inside_from_output(Vec<C> y, const Parameters<S>& p) {
    return inside(y, p);
  }
};

struct Hardsigmoid {
  template <class S, class C = Compute<S>>
  static FASTOPS_FN Vec<C> forward(Vec<C> x, const Parameters<S>&) {
    return clamp(x + set<C>(3), 0, 6) * set<C>(1.0 / 6);
  }
  template <class S, class C = Compute<S>>
  static FASTOPS_FN Mask<C> inside(Vec<C> x, const Parameters<S>&) {
    return gt(x, set<C>(-3)) & lt(x, set<C>(3));
  }
  template <class S, class C = Compute<S>>
  static FASTOPS_FN Vec<C> apply(Mask<C> inside, Vec<C> g, const Parameters<S>&) {
    return select(inside, g * set<C>(1.0 / 6), Vec<C>::zero());
  }
};

struct Hardshrink : ZeroOutside {
  template <class S, class C = Compute<S>>
  static FASTOPS_FN Vec<C> forward(Vec<C> x, const Parameters<S>& p) {
    return select(inside(x, p), x, Vec<C>::zero());
  }
  template <class S, class C = Compute<S>>
  static FASTOPS_FN Mask<C> inside(Vec<C> x, const Parameters<S>& p) {
    return !(ge(x, -p.a) & le(x, p.a));
  }
  template <class S, class C = Compute<S>>
  static FASTOPS_FN Mask<C> inside_from_output(Vec<C> y, const Parameters<S>& p) {
    return inside(y, p);
  }
};

struct Softshrink : ZeroOutside {  // a = lambda; b = lambda rounded to the storage type, as in PyTorch's backward
  template <class S, class C = Compute<S>>
  static FASTOPS_FN Vec<C> forward(Vec<C> x, const Parameters<S>& p) {
    return select(ge(x, -p.a) & le(x, p.a), Vec<C>::zero(), x - copysign(p.a, x));
  }
  template <class S, class C = Compute<S>>
  static FASTOPS_FN Mask<C> inside(Vec<C> x, const Parameters<S>& p) {
    return !(ge(x, -p.b) & le(x, p.b));
  }
  // From y (c = 0, as y is zero exactly outside) or from x (c = b), whichever saved_by_linear says.
  template <class S, class C = Compute<S>>
  static FASTOPS_FN Mask<C> inside_from_output(Vec<C> y, const Parameters<S>& p) {
    return !(ge(y, -p.c) & le(y, p.c));
  }
};

struct Threshold : ZeroOutside {
  template <class S, class C = Compute<S>>
  static FASTOPS_FN Vec<C> forward(Vec<C> x, const Parameters<S>& p) {
    return select(le(x, p.a), p.b, x);
  }
  template <class S, class C = Compute<S>>
  static FASTOPS_FN Mask<C> inside(Vec<C> x, const Parameters<S>& p) {
    return !le(x, p.a);
  }
};

struct Hardswish {
  template <class S, class C = Compute<S>>
  static FASTOPS_FN Vec<C> forward(Vec<C> x, const Parameters<S>&) {
    return max(set<C>(-3), x) * (clamp(x + set<C>(3), 0, 6) * set<C>(1.0 / 6));
  }
  template <class S, class C = Compute<S>>
  static FASTOPS_FN Vec<C> backward(Vec<C> g, Vec<C> x, const Parameters<S>&) {
    const Vec<C> slope = fma(x, set<C>(1.0 / 3), set<C>(0.5));
    return select(le(x, set<C>(-3)), Vec<C>::zero(), select(lt(x, set<C>(3)), g * slope, g));
  }
};

struct Elu {  // and selu, celu
  template <class S, class C = Compute<S>>
  static FASTOPS_FN Vec<C> forward(Vec<C> x, const Parameters<S>& p) {
    return select(gt(x, Vec<C>::zero()), x * p.b, expm1<S>(x * p.c) * p.a);
  }
  template <class S, class C = Compute<S>>
  static FASTOPS_FN Vec<C> backward(Vec<C> g, Vec<C> x, const Parameters<S>& p) {
    const Vec<C> e = exp_of_any<S>(x * p.c);
    return select(gt(x, Vec<C>::zero()), g * p.b, g * (p.a * p.c * e));
  }
  template <class S, class C = Compute<S>>
  static FASTOPS_FN Vec<C> backward_from_output(Vec<C> g, Vec<C> y, const Parameters<S>& p) {
    return select(gt(y, Vec<C>::zero()), g * p.b, g * (p.c * (y + p.a)));
  }
};

// gelu, gelu_tanh and silu are x h(x) with h(-x) = 1 - h(x). With t = |x|, only q = h(-t) <= 1/2 must be accurate:
//   y = max(x, 0) - t q         f'(x) = x > 0 ? 1 - d : d,  d = q - t h'(-t)
// d has a zero. For a small relative error near it, 16-bit derivatives (also mish's) use the float32 polynomials.
template <class C>
FASTOPS_FN Vec<C> gated_derivative(Vec<C> x, Vec<C> d) {
  return select(gt(x, Vec<C>::zero()), set<C>(1) - d, d);
}

// t e / (1 + e), computed as t e (1 - e / (1 + e)): if e is small, the error of the second factor counts little.
template <class S, class C>
FASTOPS_FN Vec<C> gated_tail(Vec<C> t, ExpParts<C> parts) {
  const Vec<C> whole = times_exp(t, parts), e = whole_exp(parts);
  return fnma(whole, quotient_for<S>(e, set<C>(1) + e), whole);
}

struct Gelu {
  template <class S, class C = Compute<S>>
  static FASTOPS_FN Vec<C> forward(Vec<C> x, const Parameters<S>&) {
    const Vec<C> t = min(set<C>(normal_limit<C>), abs(x));
    return fnma(times_normal_exp<S>(t * normal_ratio<S>(t), t), unbias(t), max(Vec<C>::zero(), x));
  }
  template <class S, class C = Compute<S>>
  static FASTOPS_FN Vec<C> backward(Vec<C> g, Vec<C> x, const Parameters<S>&) {  // Phi(x) + x phi(x)
    const Vec<C> t = min(set<C>(normal_limit<C>), abs(x));
    const Vec<C> d = times_normal_exp<C>(fnma(t, set<C>(0.398942280401432678), normal_ratio<C>(t)), t);
    return g * gated_derivative(x, d * unbias(t));
  }
};

// With s = e / (1 + e), e = exp(-u(t)): h(-t) = s and h'(-t) = s (1 - s) u'(t).
struct GeluTanh {
  template <class S, class C = Compute<S>>
  static FASTOPS_FN Vec<C> forward(Vec<C> x, const Parameters<S>&) {
    const Vec<C> t = min(set<C>(tanh_gelu_limit<C>), abs(x));
    const ExpParts<C> e = tanh_gelu_exp<S>(t);
    return max(Vec<C>::zero(), x) - gated_tail<S>(t, e);
  }
  template <class S, class C = Compute<S>>
  static FASTOPS_FN Vec<C> backward(Vec<C> g, Vec<C> x, const Parameters<S>&) {
    const Vec<C> t = min(set<C>(tanh_gelu_limit<C>), abs(x)), one = set<C>(1);
    const Vec<C> e = whole_exp(tanh_gelu_exp<C>(t)), s = quotient_for<C>(e, one + e);
    const Vec<C> t_slope = t * fma(t * t, set<C>(3 * kTanhGelu3), set<C>(kTanhGelu1));
    return g * gated_derivative(x, s * fnma(t_slope, one - s, one));
  }
};

struct Silu {
  template <class S, class C = Compute<S>>
  static FASTOPS_FN Vec<C> forward(Vec<C> x, const Parameters<S>&) {
    const Vec<C> t = min(set<C>(exp_limit<C>), abs(x));
    const ExpParts<C> e = exp_parts<S>(-t);
    return max(Vec<C>::zero(), x) - gated_tail<S>(t, e);
  }
  template <class S, class C = Compute<S>>
  static FASTOPS_FN Vec<C> backward(Vec<C> g, Vec<C> x, const Parameters<S>&) {
    const Vec<C> t = min(set<C>(exp_limit<C>), abs(x)), one = set<C>(1);
    const Vec<C> e = exp<C>(-t), s = quotient_for<C>(e, one + e);
    return g * gated_derivative(x, s * fnma(t, one - s, one));
  }
};

template <class T>
constexpr double mish_limit = is_single<T> ? 20 : 40;  // tanh(softplus(x)) rounds to 1 from here on

// With e = exp(x) and d = e (e + 2) + 2, tanh(softplus(x)) = 1 - 2 / d = e (1 - e (e + 1) / d). The first form is used
// for x > -1/4, the second below. Both then subtract less than a half, so that its errors count less. They count most
// where d is just above 4, a power of two, where float32 is coarsest relative to d. 7/8 d, which is not, replaces d.
struct Mish {
  template <class S, class C = Compute<S>>
  static FASTOPS_FN Vec<C> forward(Vec<C> x, const Parameters<S>&) {
    const Vec<C> t = clamp(x, -exp_limit<C>, mish_limit<C>);
    const ExpParts<C> parts = exp_parts<S>(t);
    const Vec<C> e = whole_exp(parts), e78 = set<C>(0.875) * e, d78 = fma(e, e78 + set<C>(1.75), set<C>(1.75));
    const Mask<C> right = gt(x, set<C>(-0.25));
    const Vec<C> whole = select(right, x, times_exp(t, parts));
    // No less than 2^-60, which makes no difference to the result, as the rest of the quotient would underflow.
    const Vec<C> part = quotient_for<S>(max(set<C>(0x1p-60), select(right, set<C>(1.75), fma(e, e78, e78))), d78);
    return fnma(min(set<C>(mish_limit<C>), whole), part, whole);  // min, as infinity times part would be NaN
  }
  // sech^2(softplus(x)) sigmoid(x) = 4 e (1 + e) / d^2, so f'(x) = e ((e + 2) d + 4 x (1 + e)) / d^2.
  template <class S, class C = Compute<S>>
  static FASTOPS_FN Vec<C> backward(Vec<C> g, Vec<C> x, const Parameters<S>&) {
    const Vec<C> t = clamp(x, -exp_limit<C>, mish_limit<C>);
    const Vec<C> e = exp<C>(t), e2 = e + set<C>(2), d = fma(e, e2, set<C>(2));
    const Vec<C> numerator = fma(e2, d, set<C>(4) * fma(t, e, t));
    return g * quotient_for<C>(quotient_for<C>(e * numerator, d), d);
  }
};

struct Sigmoid {
  template <class S, class C = Compute<S>>
  static FASTOPS_FN Vec<C> forward(Vec<C> x, const Parameters<S>&) {
    return sigmoid<S>(x);
  }
  template <class S, class C = Compute<S>>
  static FASTOPS_FN Vec<C> backward_from_output(Vec<C> g, Vec<C> y, const Parameters<S>&) {
    return g * ((set<C>(1) - y) * y);
  }
};

struct Logsigmoid {
  template <class S, class C = Compute<S>>
  static FASTOPS_FN Vec<C> forward(Vec<C> x, const Parameters<S>&) {
    return min(Vec<C>::zero(), x) - log1p<S>(exp_minus_abs<S>(x));
  }
  template <class S, class C = Compute<S>>
  static FASTOPS_FN Vec<C> backward(Vec<C> g, Vec<C> x, const Parameters<S>&) {
    return g * sigmoid<S>(-x);
  }
};

struct Tanh {
  template <class S, class C = Compute<S>>
  static FASTOPS_FN Vec<C> forward(Vec<C> x, const Parameters<S>&) {
    return tanh<S>(x);
  }
  template <class S, class C = Compute<S>>
  static FASTOPS_FN Vec<C> backward_from_output(Vec<C> g, Vec<C> y, const Parameters<S>&) {
    return g * fnma(y, y, set<C>(1));
  }
};

struct Softplus {
  template <class S, class C = Compute<S>>
  static FASTOPS_FN Vec<C> forward(Vec<C> x, const Parameters<S>& p) {
    const Vec<C> z = x * p.a;
    const Vec<C> y = (max(Vec<C>::zero(), z) + log1p<S>(exp_minus_abs<S>(z))) * p.c;
    return select(gt(z, p.b), x, y);
  }
  template <class S, class C = Compute<S>>
  static FASTOPS_FN Vec<C> backward(Vec<C> g, Vec<C> x, const Parameters<S>& p) {
    const Vec<C> z = x * p.a;
    return select(gt(z, p.b), g, g * sigmoid<S>(z));
  }
};

struct Softsign {
  template <class S, class C = Compute<S>>
  static FASTOPS_FN Vec<C> forward(Vec<C> x, const Parameters<S>&) {
    x = clamp(x, is_single<C> ? -0x1p100 : -0x1p900, is_single<C> ? 0x1p100 : 0x1p900);  // infinity gives 1
    return x / (set<C>(1) + abs(x));
  }
  template <class S, class C = Compute<S>>
  static FASTOPS_FN Vec<C> backward(Vec<C> g, Vec<C> x, const Parameters<S>&) {
    const Vec<C> r = set<C>(1) / (set<C>(1) + abs(x));
    return g * r * r;
  }
};

struct Tanhshrink {
  template <class S, class C = Compute<S>>
  static FASTOPS_FN Vec<C> forward(Vec<C> x, const Parameters<S>&) {
    return tanhshrink<S>(x);
  }
  template <class S, class C = Compute<S>>
  static FASTOPS_FN Vec<C> backward(Vec<C> g, Vec<C> x, const Parameters<S>&) {
    const Vec<C> y = tanh<C>(x);
    return g * (y * y);
  }
};

// The derivative of Kind, from y.
template <class Kind>
struct FromOutput {
  template <class S, class C = Compute<S>>
  static FASTOPS_FN Vec<C> backward(Vec<C> g, Vec<C> y, const Parameters<S>& p) {
    return Kind::backward_from_output(g, y, p);
  }
};
// The derivative of a piecewise linear Kind, from x.
template <class Kind>
struct Piecewise {
  template <class S, class C = Compute<S>>
  static FASTOPS_FN Vec<C> backward(Vec<C> g, Vec<C> x, const Parameters<S>& p) {
    return Kind::apply(Kind::inside(x, p), g, p);
  }
};
template <class Kind>
struct PiecewiseFromOutput {
  template <class S, class C = Compute<S>>
  static FASTOPS_FN Vec<C> backward(Vec<C> g, Vec<C> y, const Parameters<S>& p) {
    return Kind::apply(Kind::inside_from_output(y, p), g, p);
  }
};

// body(Kind{}) with the struct of this kind, on the host and in CUDA kernels.
#if defined(__CUDACC__)
#pragma nv_exec_check_disable
#endif
template <class Body>
FASTOPS_HOST_FN auto with_kind(ActivationKind kind, Body&& body) {
  switch (kind) {
#define FASTOPS_FORMULA(kind, formula, ...) \
  case ActivationKind::kind:                \
    return body(formula{});
    FASTOPS_ACTIVATIONS(FASTOPS_FORMULA)
#undef FASTOPS_FORMULA
    case ActivationKind::count:
      break;
  }
  return body(Identity{});
}

// body(Kind{}) for the kinds for which saved_by_default is mask.
template <class Body>
inline auto with_mask_kind(ActivationKind kind, Body&& body) {
  switch (kind) {
    case ActivationKind::leaky_relu:
      return body(LeakyRelu{});
    case ActivationKind::relu6:
    case ActivationKind::hardtanh:
      return body(Hardtanh{});
    case ActivationKind::hardsigmoid:
      return body(Hardsigmoid{});
    case ActivationKind::hardshrink:
      return body(Hardshrink{});
    case ActivationKind::softshrink:
      return body(Softshrink{});
    case ActivationKind::threshold:
      return body(Threshold{});
    default:
      return body(Relu{});
  }
}

// body(Derivative{}), whose backward reads y if from_output, else x. For sigmoid and tanh it always reads y. On the
// host and in CUDA kernels.
#if defined(__CUDACC__)
#pragma nv_exec_check_disable
#endif
template <class Body>
FASTOPS_HOST_FN auto with_derivative(ActivationKind kind, bool from_output, Body&& body) {
  switch (kind) {
    case ActivationKind::relu:
      return body(Piecewise<Relu>{});
    case ActivationKind::leaky_relu:
      return body(Piecewise<LeakyRelu>{});
    case ActivationKind::elu:
    case ActivationKind::selu:
    case ActivationKind::celu:
      return from_output ? body(FromOutput<Elu>{}) : body(Elu{});
    case ActivationKind::gelu:
      return body(Gelu{});
    case ActivationKind::gelu_tanh:
      return body(GeluTanh{});
    case ActivationKind::silu:
      return body(Silu{});
    case ActivationKind::mish:
      return body(Mish{});
    case ActivationKind::sigmoid:
      return body(FromOutput<Sigmoid>{});
    case ActivationKind::logsigmoid:
      return body(Logsigmoid{});
    case ActivationKind::tanh:
      return body(FromOutput<Tanh>{});
    case ActivationKind::softplus:
      return body(Softplus{});
    case ActivationKind::softsign:
      return body(Softsign{});
    case ActivationKind::relu6:
    case ActivationKind::hardtanh:
      return body(Piecewise<Hardtanh>{});
    case ActivationKind::hardsigmoid:
      return body(Piecewise<Hardsigmoid>{});
    case ActivationKind::hardswish:
      return body(Hardswish{});
    case ActivationKind::hardshrink:
      return body(Piecewise<Hardshrink>{});
    case ActivationKind::softshrink:
      return from_output ? body(PiecewiseFromOutput<Softshrink>{}) : body(Piecewise<Softshrink>{});
    case ActivationKind::tanhshrink:
      return body(Tanhshrink{});
    case ActivationKind::threshold:
      return body(Piecewise<Threshold>{});
    case ActivationKind::identity:
    case ActivationKind::count:
      break;
  }
  return body(Identity{});
}

// body(Kind{}), whose apply takes a mask.
template <class Body>
inline auto with_mask_derivative(ActivationKind kind, Body&& body) {
  switch (kind) {
    case ActivationKind::leaky_relu:
      return body(LeakyRelu{});
    case ActivationKind::hardsigmoid:
      return body(Hardsigmoid{});
    default:
      return body(ZeroOutside{});
  }
}
