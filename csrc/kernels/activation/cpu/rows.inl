// Activations and their derivatives over rows of elements. Linear also calls these, in its epilogue and while it packs
// operands.
#pragma once

#include "../../common/cpu/common.inl"
#include "../activation_math.inl"

// y[i] = f(x[i]). In is S or its compute type. If In is S, x == y is allowed.
template <class Kind, class In, class S>
void forward_row(const In* x, S* y, int64_t n, const Activation& activation) {
  using V = Vec<Compute<S>>;
  const auto p = parameters<S>(activation);
  int64_t i = 0;
  for (; i + V::size <= n; i += V::size) Kind::forward(V::load(x + i), p).store(y + i);
  if (i < n) {
    const int tail = static_cast<int>(n - i);
    Kind::forward(V::load(x + i, tail), p).store(y + i, tail);
  }
}

// g[i] = grad_y[i] f'(saved[i]). Out is S or its compute type. If Out is S, g may be grad_y or saved.
template <class Kind, class S, class Out>
void backward_row(const S* grad_y, const S* saved, Out* g, int64_t n, const Activation& activation) {
  using V = Vec<Compute<S>>;
  const auto p = parameters<S>(activation);
  int64_t i = 0;
  for (; i + V::size <= n; i += V::size) Kind::backward(V::load(grad_y + i), V::load(saved + i), p).store(g + i);
  if (i < n) {
    const int tail = static_cast<int>(n - i);
    Kind::backward(V::load(grad_y + i, tail), V::load(saved + i, tail), p).store(g + i, tail);
  }
}

template <class In, class S>
using ForwardRow = void (*)(const In* x, S* y, int64_t n, const Activation&);
template <class S, class Out>
using BackwardRow = void (*)(const S* grad_y, const S* saved, Out* g, int64_t n, const Activation&);

template <class In, class S>
ForwardRow<In, S> find_forward_row(ActivationKind kind) {
  return with_kind(kind, [](auto k) -> ForwardRow<In, S> { return forward_row<decltype(k), In, S>; });
}

// Reads y if from_output, else x. For sigmoid and tanh it always reads y.
template <class S, class Out>
BackwardRow<S, Out> find_backward_row(ActivationKind kind, bool from_output) {
  return with_derivative(kind, from_output,
                         [](auto k) -> BackwardRow<S, Out> { return backward_row<decltype(k), S, Out>; });
}

// For linear: y = f(z) in the epilogue, and g = grad_y f'(saved), where saved is y or z as saved_by_linear says.
template <class S>
using RowForward = ForwardRow<Compute<S>, S>;
template <class S>
using RowDerivative = BackwardRow<S, Compute<S>>;

template <class S>
RowForward<S> row_forward(ActivationKind kind) {
  return find_forward_row<Compute<S>, S>(kind);
}

// A derivative without tiny results: what is below 2^-100 (2^-1000), and below 2^-30 (2^-60) of the gradient, is zero.
// A product would use each of them many times. On Intel's processors a multiply-add with a denormal number takes 100
// cycles and more, and bf16 parts lose what is below 2^-103.
template <class Kind>
struct WithoutTiny {
  template <class S, class C = Compute<S>>
  static FASTOPS_FN Vec<C> backward(Vec<C> g, Vec<C> saved, const Parameters<S>& p) {
    const Vec<C> result = Kind::backward(g, saved, p);
    const Vec<C> of_gradient = abs(g) * set<C>(is_single<C> ? 0x1p-30 : 0x1p-60);
    const Vec<C> least = min(set<C>(is_single<C> ? 0x1p-100 : 0x1p-1000), of_gradient);
    return select(lt(abs(result), least), Vec<C>::zero(), result);
  }
};

template <class S>
RowDerivative<S> row_derivative(ActivationKind kind) {
  return with_derivative(kind, kind == ActivationKind::softshrink, [](auto k) -> RowDerivative<S> {
    return backward_row<WithoutTiny<decltype(k)>, S, Compute<S>>;
  });
}

// The activations that epilogues compute in registers. They convert to bool: whether there is anything to do.
enum Rectifier : unsigned char { kNoRectifier, kRelu, kRelu6 };

inline Rectifier rectifier(const Activation& activation, const void* z) {
  if (z != nullptr) return kNoRectifier;
  return activation.kind == ActivationKind::relu    ? kRelu
         : activation.kind == ActivationKind::relu6 ? kRelu6
                                                    : kNoRectifier;
}
// For 16-bit products, whose epilogue knows ReLU alone.
template <class T>
inline Rectifier product_rectifier(const Activation& activation, const void* z) {
  const Rectifier found = rectifier(activation, z);
  return same_type<T, Compute<T>> || found == kRelu ? found : kNoRectifier;
}

// NaN stays NaN.
template <class V>
inline V rectified(V v, Rectifier how) {
  v = max(V::zero(), v);
  return how == kRelu6 ? min(V::set1(6), v) : v;
}
