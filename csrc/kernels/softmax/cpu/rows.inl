// The largest of a row, and the exponentials and logarithms of a softmax. Attention uses these, too.
#pragma once

#include "../../common/cpu/common.inl"

#if defined(FASTOPS_VEC_AVX512)
inline float reduce_max(VecF v) { return _mm512_reduce_max_ps(v.v); }
inline double reduce_max(VecD v) { return _mm512_reduce_max_pd(v.v); }
#elif defined(FASTOPS_VEC_NEON)
inline float reduce_max(VecF v) { return vmaxvq_f32(v.v); }
inline double reduce_max(VecD v) { return vmaxvq_f64(v.v); }
#else
template <class C>
inline C reduce_max(Vec<C> v) {
  C lanes[Vec<C>::size];
  v.store(lanes);
  C most = lanes[0];
  for (int i = 1; i < Vec<C>::size; ++i) most = lanes[i] > most ? lanes[i] : most;
  return most;
}
#endif

template <class C>
inline Vec<C> lowest() {
  return Vec<C>::set1(-static_cast<C>(__builtin_inf()));
}

// exp(d) for d <= 0, or NaN.
template <class S, class C>
inline Vec<C> exp_of(Vec<C> d) {
  return exp<S>(max(set<C>(-exp_limit<C>), d));
}

// exp(d) for d <= 0, or NaN; zero below 2^-100 (2^-900), for where it is multiplied by what may be small, too: products
// that underflow take Intel's processors 100 to 150 cycles each.
template <class S, class C>
inline Vec<C> weight_of(Vec<C> d) {
  return select(lt(d, set<C>(is_single<C> ? -69.3 : -623.8)), Vec<C>::zero(), exp_of<S>(d));
}

// Divides by `sum`, which is 1 / scale; what would be below the normal numbers is zero.
template <class C>
struct Shares {
  Vec<C> scale, least;
  Shares(Vec<C> sum, Vec<C> scale) : scale(scale), least(set<C>(is_single<C> ? 0x1p-126 : 0x1p-1022) * sum) {}
  Shares() = default;
  Vec<C> of(Vec<C> e) const { return select(lt(e, least), Vec<C>::zero(), e) * scale; }
};

// log(s) for s >= 1, or NaN.
template <class C>
inline Vec<C> log_of(Vec<C> s) {
  const Vec<C> e = exponent(s), r = log1p<C>(mantissa(s) - set<C>(1));
  const double high = is_single<C> ? 0.693359375 : 0.693145751953125;
  const double low = is_single<C> ? -2.12194440054690583e-4 : 1.42860682030941723e-6;
  return select(unordered(s, s), s, fma(e, set<C>(high), fma(e, set<C>(low), r)));
}
