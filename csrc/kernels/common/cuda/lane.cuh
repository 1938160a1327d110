// The contract of cpu/vec.h for one lane, the value of a CUDA thread. So math.inl and activation_math.inl are the
// formulas of the GPU as well. Included inside `namespace fastops::cuda::{anonymous}`, after ptx.cuh and the macros of
// formulas.cuh.

template <class T>
struct Vec;
template <class T>
struct Mask {
  bool m;
};
using VecF = Vec<float>;
using VecD = Vec<double>;
using MaskF = Mask<float>;
using MaskD = Mask<double>;

template <class T>
FASTOPS_HOST_FN Mask<T> operator&(Mask<T> a, Mask<T> b) {
  return {a.m && b.m};
}
template <class T>
FASTOPS_HOST_FN Mask<T> operator|(Mask<T> a, Mask<T> b) {
  return {a.m || b.m};
}
template <class T>
FASTOPS_HOST_FN Mask<T> operator!(Mask<T> a) {
  return {!a.m};
}

#include "../half.inl"

// Conversions of a storage type to its compute type, and back.
FASTOPS_HOST_FN float to_compute(float x) { return x; }
FASTOPS_HOST_FN double to_compute(double x) { return x; }
FASTOPS_HOST_FN float to_compute(bf16_t x) { return widen(x); }
FASTOPS_HOST_FN float to_compute(f16_t x) {
#if defined(__CUDA_ARCH__)
  return cvt_f32(x);
#else
  return widen(x);
#endif
}
FASTOPS_HOST_FN void to_storage(float x, float* p) { *p = x; }
FASTOPS_HOST_FN void to_storage(double x, double* p) { *p = x; }
FASTOPS_HOST_FN void to_storage(float x, bf16_t* p) {
#if defined(__CUDA_ARCH__)
  *p = cvt_rn_bf16(x);
#else
  narrow(x, p);
#endif
}
FASTOPS_HOST_FN void to_storage(float x, f16_t* p) {
#if defined(__CUDA_ARCH__)
  *p = cvt_rn_f16(x);
#else
  narrow(x, p);
#endif
}

template <class T>
struct Vec {
  static constexpr int size = 1;
  T v;

  static FASTOPS_HOST_FN Vec set1(T x) { return {x}; }
  static FASTOPS_HOST_FN Vec zero() { return {T(0)}; }
  template <class S>
  static FASTOPS_HOST_FN Vec load(const S* p, int count = 1) {
    return {count == 1 ? to_compute(*p) : T(0)};
  }
  template <class S>
  FASTOPS_HOST_FN void store(S* p, int count = 1) const {
    if (count == 1) to_storage(v, p);
  }
};

template <class T>
FASTOPS_FN Vec<T> operator+(Vec<T> a, Vec<T> b) {
  return {a.v + b.v};
}
template <class T>
FASTOPS_FN Vec<T> operator-(Vec<T> a, Vec<T> b) {
  return {a.v - b.v};
}
template <class T>
FASTOPS_FN Vec<T> operator*(Vec<T> a, Vec<T> b) {
  return {a.v * b.v};
}
template <class T>
FASTOPS_FN Vec<T> operator/(Vec<T> a, Vec<T> b) {
  return {a.v / b.v};
}
template <class T>
FASTOPS_FN Vec<T> operator-(Vec<T> a) {
  return {-a.v};
}
FASTOPS_FN VecF fma(VecF a, VecF b, VecF c) { return {::fmaf(a.v, b.v, c.v)}; }
FASTOPS_FN VecD fma(VecD a, VecD b, VecD c) { return {::fma(a.v, b.v, c.v)}; }
template <class T>
FASTOPS_FN Vec<T> fnma(Vec<T> a, Vec<T> b, Vec<T> c) {
  return fma(-a, b, c);
}

template <class T>
FASTOPS_FN Mask<T> lt(Vec<T> a, Vec<T> b) {
  return {a.v < b.v};
}
template <class T>
FASTOPS_FN Mask<T> le(Vec<T> a, Vec<T> b) {
  return {a.v <= b.v};
}
template <class T>
FASTOPS_FN Mask<T> gt(Vec<T> a, Vec<T> b) {
  return {a.v > b.v};
}
template <class T>
FASTOPS_FN Mask<T> ge(Vec<T> a, Vec<T> b) {
  return {a.v >= b.v};
}
template <class T>
FASTOPS_FN Vec<T> select(Mask<T> m, Vec<T> a, Vec<T> b) {
  return m.m ? a : b;
}
template <class T>
FASTOPS_FN Vec<T> min(Vec<T> a, Vec<T> b) {
  return a.v < b.v ? a : b;
}
template <class T>
FASTOPS_FN Vec<T> max(Vec<T> a, Vec<T> b) {
  return a.v > b.v ? a : b;
}

FASTOPS_FN float of_bits(uint32_t bits) { return float_of_bits(bits); }
FASTOPS_FN double of_bits(uint64_t bits) { return __builtin_bit_cast(double, bits); }
FASTOPS_FN uint32_t bits_of(float x) { return bits_of_float(x); }
FASTOPS_FN uint64_t bits_of(double x) { return __builtin_bit_cast(uint64_t, x); }

FASTOPS_FN VecF abs(VecF a) { return {::fabsf(a.v)}; }
FASTOPS_FN VecD abs(VecD a) { return {::fabs(a.v)}; }
FASTOPS_FN VecF copysign(VecF magnitude, VecF sign) { return {::copysignf(magnitude.v, sign.v)}; }
FASTOPS_FN VecD copysign(VecD magnitude, VecD sign) { return {::copysign(magnitude.v, sign.v)}; }
// Adding and subtracting 1.5 2^23 (2^52) rounds to an integer, which is in the low bits of the sum.
FASTOPS_FN VecF round(VecF a) { return {(a.v + 0x1.8p23f) - 0x1.8p23f}; }
FASTOPS_FN VecD round(VecD a) { return {(a.v + 0x1.8p52) - 0x1.8p52}; }
FASTOPS_FN VecF power_of_two(VecF n) { return {of_bits(bits_of(n.v + (0x1.8p23f + 127)) << 23)}; }
FASTOPS_FN VecD power_of_two(VecD n) { return {of_bits(bits_of(n.v + (0x1.8p52 + 1023)) << 52)}; }
template <class T>
FASTOPS_FN Vec<T> scale_from(Vec<T> least, Vec<T> x, Vec<T> n) {
  return x * (n.v >= least.v ? power_of_two(n) : Vec<T>::zero());
}
// Multiplies by two powers of two, as 2^n alone may not be a normal number. At most one of the two products rounds.
template <class T>
FASTOPS_FN Vec<T> scale(Vec<T> x, Vec<T> n) {
  const Vec<T> half = round(n * Vec<T>::set1(T(0.5)));
  return x * power_of_two(half) * power_of_two(n - half);
}

// The residual corrects the quotient, with one rounding at the end.
FASTOPS_FN VecF quotient(VecF a, VecF b) {
  const VecF r{rcp_approx(b.v)}, q = a * r;
  return fma(fnma(b, q, a), r, q);
}
FASTOPS_FN VecD quotient(VecD a, VecD b) { return a / b; }
FASTOPS_FN VecF quotient_14_bits(VecF a, VecF b) { return {a.v * rcp_approx(b.v)}; }
template <class T>
FASTOPS_FN Vec<T> product_error(Vec<T> a, Vec<T> b, Vec<T> p) {
  return fnma(a, b, p);
}

// A row is 128 bytes, which a warp reads in one access for any columns.
constexpr int kTableColumns = 32;
struct Columns {
  uint32_t v;
};
FASTOPS_FN Columns columns_of(VecF x, int shift) { return {bits_of(x.v) >> shift & (kTableColumns - 1)}; }
FASTOPS_FN VecF look_up(const float (&row)[kTableColumns], Columns i) { return {row[i.v]}; }
