// Elementary functions over any Vec, on the ranges that the activations need. Included in the tier's namespace after vec.h.
//
// Polynomials and rationals are minimax fits of relative error, found by the Remez exchange in 60-digit arithmetic; the error
// named beside each is the fit's own, before rounding. Rationals are written so that the rounding of the small part counts
// little: x + x^3 P/Q, t + t^2 P. NaN goes in and comes out, provided that clamps keep the variable last (see vec.h).

template <class T>
constexpr bool is_single = sizeof(T) == 4;

template <class T>
inline Vec<T> set(double x) {
  return Vec<T>::set1(static_cast<T>(x));
}

// c0 + c1 x + c2 x^2 + ...
template <class T>
inline Vec<T> horner(Vec<T>, double c0) {
  return set<T>(c0);
}
template <class T, class... Rest>
inline Vec<T> horner(Vec<T> x, double c0, Rest... rest) {
  return fma(horner(x, rest...), x, set<T>(c0));
}

// x clamped to [low, high]; NaN stays.
template <class T>
inline Vec<T> clamp(Vec<T> x, double low, double high) {
  return max(set<T>(low), min(set<T>(high), x));
}

// x = n ln 2 + r with integral n and |r| <= ln(2) / 2, for |x| < 2^20. Cody and Waite: the first constant has so few bits that
// n times it is exact, with or without a fused multiply-add.
template <class T>
struct Reduced {
  Vec<T> n, r;
};
template <class T>
inline Reduced<T> reduce_by_ln2(Vec<T> x) {
  const Vec<T> magic = set<T>(is_single<T> ? 0x1.8p23 : 0x1.8p52);  // adding it rounds to an integer
  const Vec<T> n = fma(x, set<T>(1.4426950408889634), magic) - magic;
  const double high = is_single<T> ? 0.693359375 : 0.693145751953125;
  const double low = is_single<T> ? -2.12194440054690583e-4 : 1.42860682030941723e-6;
  return {n, fnma(n, set<T>(low), fnma(n, set<T>(high), x))};
}

// (exp(r) - 1 - r) / r^2 for |r| <= ln(2) / 2. Error 2^-26.2 (2^-55.6) of expm1(r).
template <class T>
inline Vec<T> exp_series(Vec<T> r) {
  if constexpr (is_single<T>) {
    return horner(r, 0.49999997, 0.166665435, 0.0416672006, 0.00836652983, 0.00138825213);
  } else {
    return horner(r, 0.500000000000000517, 0.166666666666665893, 0.0416666666665768261, 0.00833333333338951729,
                  0.00138888889315395345, 0.000198412697190576862, 0.0000248015053062228755, 2.75574075273604554e-6,
                  2.76260243097238359e-7, 2.50537684625193625e-8);
  }
}

// exp(x) = (1 + p) 2^n in two parts. t exp(x) is then scale(fma(t, p, t), n): one rounding, and all its bits where exp(x) alone
// is denormal.
template <class T>
struct ExpParts {
  Vec<T> p, n;
};
template <class T>
inline ExpParts<T> exp_parts(Reduced<T> x) {
  return {fma(x.r * x.r, exp_series(x.r), x.r), x.n};
}
template <class T>
inline ExpParts<T> exp_parts(Vec<T> x) {
  return exp_parts(reduce_by_ln2(x));
}
// Of x + low, |low| much smaller than |x|.
template <class T>
inline ExpParts<T> exp_parts(Vec<T> x, Vec<T> low) {
  const Reduced<T> reduced = reduce_by_ln2(x);
  return exp_parts(Reduced<T>{reduced.n, reduced.r + low});
}
template <class T>
inline Vec<T> times_exp(Vec<T> t, ExpParts<T> e) {
  return scale(fma(t, e.p, t), e.n);
}
template <class T>
inline Vec<T> exp(ExpParts<T> e) {
  return scale(set<T>(1) + e.p, e.n);
}

// exp(x) for |x| <= 170 (1400).
template <class T>
inline Vec<T> exp(Vec<T> x) {
  return exp(exp_parts(x));
}

// exp(x) - 1 for x <= 88 (709), with all its digits near 0.
template <class T>
inline Vec<T> expm1(Vec<T> x) {
  x = clamp(x, is_single<T> ? -20 : -40, is_single<T> ? 88.7 : 709.7);
  const ExpParts<T> e = exp_parts(x);
  const Vec<T> s = power_of_two(e.n);
  return fma(s, e.p, s - set<T>(1));
}

// log(1 + t) for 0 <= t <= 1. Error 2^-27.5 (2^-60.4).
template <class T>
inline Vec<T> log1p(Vec<T> t) {
  if constexpr (is_single<T>) {
    return fma(t * t,
               horner(t, -0.499999315, 0.33330512, -0.249585882, 0.196954012, -0.153553963, 0.106805563, -0.0576644503,
                      0.0202045888, -0.00331847323),
               t);
  } else {
    const Vec<T> p = horner(t, -0.499999999999999921, -1.23369486464782461, -1.10263199677608663, -0.43302093546410315,
                            -0.0714264966495558781, -0.00368640222254472835, -1.2155738784033319e-6);
    const Vec<T> q = horner(t, 1, 3.13405639596229157, 3.79463492419474394, 2.22877028905574605, 0.651671615873732687,
                            0.0863181919742383249, 0.00378658712956419735);
    return t + quotient(t * t * p, q);
  }
}

// exp(-|x|) reaches zero before |x| gets here, even multiplied by |x|.
template <class T>
constexpr double exp_limit = is_single<T> ? 110 : 755;

template <class T>
inline Vec<T> exp_minus_abs(Vec<T> x) {
  return exp(-min(set<T>(exp_limit<T>), abs(x)));
}

// 1 / (1 + exp(-x)); with e = exp(-|x|) it is 1 / (1 + e) or e / (1 + e), and neither cancels.
template <class T>
inline Vec<T> sigmoid(Vec<T> x) {
  const Vec<T> e = exp_minus_abs(x), one = set<T>(1);
  return quotient(select(lt(x, Vec<T>::zero()), e, one), one + e);
}

// The float64 tanh(x) is base + numerator / denominator: x + x^3 P/Q near 0, 1 - 2 e / (1 + e) with e = exp(-2|x|) beyond.
// P/Q: error 2^-65 of tanh.
struct TanhParts {
  MaskD near_zero;
  VecD numerator, denominator;
};
inline TanhParts tanh_parts(VecD t) {  // t = |x|
  const VecD e = exp(set<double>(-2) * min(set<double>(30), t)), w = t * t;
  const VecD p = horner(w, -0.333333333333333333, -0.0214200868350252633, -0.000243789129000152105,
                        -1.74570411561151971e-8);
  const VecD q = horner(w, 1, 0.464260260505075786, 0.0245307096842690337, 0.000254854914377183527);
  const MaskD near_zero = lt(t, set<double>(0.625));
  return {near_zero, select(near_zero, t * w * p, set<double>(-2) * e), select(near_zero, q, set<double>(1) + e)};
}

inline VecD tanh(VecD x) {
  const VecD t = abs(x);
  const TanhParts parts = tanh_parts(t);
  const VecD base = select(parts.near_zero, t, set<double>(1));
  return copysign(base + quotient(parts.numerator, parts.denominator), x);
}

// x P(x^2) / Q(x^2), error 2^-23.4 on |x| <= 9.02.
inline VecF tanh(VecF x) {
  x = clamp(x, -9.02, 9.02);
  const VecF w = x * x;
  const VecF p = horner(w, 1, 0.13361536, 0.00347194285, 2.02052779e-05, 1.27822126e-08);
  const VecF q = horner(w, 1, 0.466948628, 0.0257882867, 0.000324624183, 7.54419091e-07);
  return quotient(x * p, q);
}

// x - tanh(x), from the parts of tanh where the difference cancels nothing.
inline VecD tanhshrink(VecD x) {
  const VecD t = abs(x);
  const TanhParts parts = tanh_parts(t);
  const VecD base = select(parts.near_zero, VecD::zero(), t - set<double>(1));
  return copysign(base - quotient(parts.numerator, parts.denominator), x);
}

// x^3 P(x^2) / Q(x^2), error 2^-24.8 on |x| <= 9.02; tanh is +-1 beyond.
inline VecF tanhshrink(VecF x) {
  const VecF c = clamp(x, -9.02, 9.02), w = c * c;
  const VecF p = horner(w, 0.333333343, 0.0225192942, 0.000314821053, 8.01877832e-07);
  const VecF q = horner(w, 1, 0.467557877, 0.026062876, 0.000336156227, 8.16094996e-07);
  return (x - c) + quotient(c * w * p, q);
}

// Phi(-t) = exp(-t^2 / 2) g(t) for 0 <= t <= normal_limit, where t Phi(-t) is zero. normal_ratio is g: error 2^-26.2 (2^-62).
template <class T>
constexpr double normal_limit = is_single<T> ? 14.5 : 38.7;

template <class T>
inline Vec<T> normal_ratio(Vec<T> t) {
  if constexpr (is_single<T>) {
    const Vec<T> p = horner(t, 0.5, 0.434898466, 0.180620313, 0.039723251, 0.00397304492);
    const Vec<T> q = horner(t, 1, 1.66768157, 1.19185591, 0.46254313, 0.0995786041, 0.0099588111);
    return quotient(p, q);
  } else {
    const Vec<T> p = horner(t, 0.5, 0.88497154606563757, 0.777229788524521798, 0.439926946602924319,
                            0.176789340626990794, 0.052722218961013301, 0.0118838273764301877, 0.00202501784588798167,
                            0.000256175172641196523, 0.0000230079413664355791, 1.32936070044201298e-6,
                            3.78533764761049304e-8);
    const Vec<T> q = horner(t, 1, 2.56782765293414049, 3.10328961612785291, 2.33796845941466339, 1.22530615696069477,
                            0.471682544683060264, 0.137116576002092672, 0.0304238092129122471, 0.0051334495769318676,
                            0.000645468144117651561, 0.0000577672407139532094, 3.33221311891099324e-6,
                            9.48843437652574508e-8);
    return quotient(p, q);
  }
}

// exp(-t^2 / 2); the part of t^2 that rounding loses would be hundreds of ulp of the result.
template <class T>
inline ExpParts<T> normal_exp(Vec<T> t) {
  const Vec<T> square = t * t, half = set<T>(0.5);
  return exp_parts(set<T>(-0.5) * square, half * product_error(t, t, square));
}

// exp(-2 sqrt(2/pi) (t + 0.044715 t^3)) for 0 <= t <= tanh_gelu_limit, the argument in two words throughout.
template <class T>
constexpr double tanh_gelu_limit = is_single<T> ? 11 : 21.8;

// c1 = 2 sqrt(2/pi) and c3 = 0.044715 c1 as the nearest T and what it misses.
template <class T>
constexpr double kC1 = is_single<T> ? 1.5957691669464111 : 1.5957691216057308;
template <class T>
constexpr double kC1Low = is_single<T> ? -4.53406804210527158e-8 : -9.96930880911092031e-17;
template <class T>
constexpr double kC3 = is_single<T> ? 0.07135481387376785 : 0.07135481627260025;
template <class T>
constexpr double kC3Low = is_single<T> ? 2.39883239599313563e-9 : -6.17514991815531545e-19;

template <class T>
inline ExpParts<T> tanh_gelu_exp(Vec<T> t) {
  const Vec<T> c1 = set<T>(kC1<T>), c3 = set<T>(kC3<T>);
  const Vec<T> square = t * t, square_low = product_error(t, t, square);
  const Vec<T> cubic = c3 * square;  // of the factor w = c1 + c3 t^2
  const Vec<T> cubic_low = fma(c3, square_low, product_error(c3, square, cubic)) - set<T>(kC3Low<T>) * square;
  const Vec<T> w = c1 + cubic, c1_seen = w - cubic;
  const Vec<T> w_low = ((c1 - c1_seen) + (cubic - (w - c1_seen))) + (set<T>(kC1Low<T>) - cubic_low);
  const Vec<T> u = t * w;
  return exp_parts(-u, fnma(t, w_low, product_error(t, w, u)));
}
