// Elementary functions of a Vec, on the ranges that the activations need. Included in a tier's namespace after vec.h,
// and in the namespace of the CUDA kernels after cuda/lane.cuh, where a Vec has one lane.
//
// FASTOPS_FN declares a function of the kernels, FASTOPS_HOST_FN one that the host calls as well, FASTOPS_TABLE a table
// that the kernels read. cpu/bodies_prelude.h and cuda/formulas.cuh define them.
//
// Polynomials and rational functions are minimax fits of the relative error, computed by the Remez exchange in 60-digit
// arithmetic. The error stated beside each is that of the fit, before rounding. They are written as x + x^3 P/Q or
// t + t^2 P, so that rounding errors of the small term count little. NaN gives NaN, which requires that the variable is
// the last argument of min and max (vec.h).
//
// Large arguments underflow nowhere: an exponential that would be below the normal numbers is zero. Intel's processors
// take 100 to 150 cycles for an instruction whose result underflows or whose operand is denormal: a masked softmax was
// 8 times slower for it, and so was GELU of all numbers above 14.5.
//
// S is the storage type of the result. For 8 or 11 bits of precision shorter polynomials suffice: their error (2^-14 to
// 2^-16 for bf16_t, 2^-19 for f16_t) adds at most 0.03 ulp to the 0.5 ulp of the final rounding.
#pragma once

template <class S>
struct ComputeType {
  using type = float;
};
template <>
struct ComputeType<double> {
  using type = double;
};
// The type in which values of a storage type are computed: float32 for the 16-bit types.
template <class S>
using Compute = typename ComputeType<S>::type;

template <class T>
constexpr bool is_single = sizeof(T) == 4;
template <class S>
constexpr bool is_half = sizeof(S) == 2;
template <class S>
constexpr bool is_bf16 = false;
template <>
inline constexpr bool is_bf16<bf16_t> = true;

template <class T>
FASTOPS_HOST_FN Vec<T> set(double x) {
  return Vec<T>::set1(static_cast<T>(x));
}

// c0 + c1 x + c2 x^2 + ...
template <class T>
FASTOPS_FN Vec<T> horner(Vec<T>, double c0) {
  return set<T>(c0);
}
template <class T, class... Rest>
FASTOPS_FN Vec<T> horner(Vec<T> x, double c0, Rest... rest) {
  return fma(horner(x, rest...), x, set<T>(c0));
}

// x clamped to [low, high]; NaN stays NaN.
template <class T>
FASTOPS_FN Vec<T> clamp(Vec<T> x, double low, double high) {
  return max(set<T>(low), min(set<T>(high), x));
}

// x = n ln 2 + r with integral n and |r| <= ln(2) / 2, for |x| < 2^20. ln 2 is a sum of two constants (Cody and Waite).
// The first has so few bits that its product with n is exact, with or without a fused multiply-add.
template <class T>
struct Reduced {
  Vec<T> n, r;
};
template <class S, class T>
FASTOPS_FN Reduced<T> reduce_by_ln2(Vec<T> x) {
  const Vec<T> magic = set<T>(is_single<T> ? 0x1.8p23 : 0x1.8p52);  // adding it rounds to an integer
  const Vec<T> n = fma(x, set<T>(1.4426950408889634), magic) - magic;
  if constexpr (is_half<S>) return {n, fnma(n, set<T>(0.6931471805599453), x)};
  const double high = is_single<T> ? 0.693359375 : 0.693145751953125;
  const double low = is_single<T> ? -2.12194440054690583e-4 : 1.42860682030941723e-6;
  return {n, fnma(n, set<T>(low), fnma(n, set<T>(high), x))};
}

// (exp(r) - 1 - r) / r^2 for |r| <= ln(2) / 2. Error of expm1(r): 2^-26.2 for float32, 2^-55.6 for float64, 2^-21 for
// f16_t. For bf16_t the error of exp(r) is 2^-17.5.
template <class S, class T>
FASTOPS_FN Vec<T> exp_series(Vec<T> r) {
  if constexpr (is_bf16<S>) {
    return horner(r, 0.5000512, 0.167535558, 0.0412775576);
  } else if constexpr (is_half<S>) {
    return horner(r, 0.49999401, 0.166668311, 0.0418726653, 0.0083380742);
  } else if constexpr (is_single<T>) {
    return horner(r, 0.49999997, 0.166665435, 0.0416672006, 0.00836652983, 0.00138825213);
  } else {
    return horner(r, 0.500000000000000517, 0.166666666666665893, 0.0416666666665768261, 0.00833333333338951729,
                  0.00138888889315395345, 0.000198412697190576862, 0.0000248015053062228755, 2.75574075273604554e-6,
                  2.76260243097238359e-7, 2.50537684625193625e-8);
  }
}

// The smallest n for which every (1 + p) 2^n is a normal number, and half of it, too.
template <class T>
constexpr double least_exponent = is_single<T> ? -124 : -1020;

// exp(x) = (1 + p) 2^n, as the parts p and n. t exp(x) is t + t p times 2^n, which rounds once.
template <class T>
struct ExpParts {
  Vec<T> p, n;
};
template <class S, class T>
FASTOPS_FN ExpParts<T> exp_parts(Reduced<T> x) {
  return {fma(x.r * x.r, exp_series<S>(x.r), x.r), x.n};
}
template <class S, class T>
FASTOPS_FN ExpParts<T> exp_parts(Vec<T> x) {
  return exp_parts<S>(reduce_by_ln2<S>(x));
}
// The parts of exp(x + low), for |low| much smaller than |x|.
template <class S, class T>
FASTOPS_FN ExpParts<T> exp_parts(Vec<T> x, Vec<T> low) {
  const Reduced<T> reduced = reduce_by_ln2<S>(x);
  return exp_parts<S>(Reduced<T>{reduced.n, reduced.r + low});
}
// These two are for x <= 88 (709).
template <class T>
FASTOPS_FN Vec<T> times_exp(Vec<T> t, ExpParts<T> e) {
  return scale_from(set<T>(least_exponent<T>), fma(t, e.p, t), e.n);
}
template <class T>
FASTOPS_FN Vec<T> whole_exp(ExpParts<T> e) {
  return scale_from(set<T>(least_exponent<T>), set<T>(1) + e.p, e.n);
}

// exp(x) for -170 <= x <= 88 (-1400, 709).
template <class S, class T>
FASTOPS_FN Vec<T> exp(Vec<T> x) {
  return whole_exp(exp_parts<S>(x));
}

// exp(x) for all x; it may be infinite.
template <class S, class T>
FASTOPS_FN Vec<T> exp_of_any(Vec<T> x) {
  const ExpParts<T> e = exp_parts<S>(clamp(x, is_single<T> ? -90 : -720, is_single<T> ? 90 : 720));
  const Vec<T> least = set<T>(least_exponent<T>);
  return select(lt(e.n, least), Vec<T>::zero(), scale(set<T>(1) + e.p, max(least, e.n)));
}

// exp(x) - 1 for x <= 88 (709), accurate near 0.
template <class S, class T>
FASTOPS_FN Vec<T> expm1(Vec<T> x) {
  x = clamp(x, is_single<T> ? -20 : -40, is_single<T> ? 88.7 : 709.7);
  const ExpParts<T> e = exp_parts<S>(x);
  const Vec<T> s = power_of_two(e.n);
  return fma(s, e.p, s - set<T>(1));
}

// a / b; for bf16_t to 14 bits.
template <class S, class T>
FASTOPS_FN Vec<T> quotient_for(Vec<T> a, Vec<T> b) {
  if constexpr (is_bf16<S>)
    return quotient_14_bits(a, b);
  else
    return quotient(a, b);
}

// log(1 + t) for 0 <= t <= 1. Error 2^-27.5 (2^-60.4; f16_t 2^-19.4, bf16_t 2^-14.1). t (t P), as t^2 can underflow.
template <class S, class T>
FASTOPS_FN Vec<T> log1p(Vec<T> t) {
  if constexpr (is_bf16<S>) {
    return t * horner(t, 0.999943465, -0.496980459, 0.306306548, -0.157428958, 0.0413457721);
  } else if constexpr (is_half<S>) {
    return fma(t, t * horner(t, -0.499907464, 0.331404269, -0.236113474, 0.151027769, -0.0678512603, 0.0145883346), t);
  } else if constexpr (is_single<T>) {
    return fma(t,
               t * horner(t, -0.499999315, 0.33330512, -0.249585882, 0.196954012, -0.153553963, 0.106805563,
                          -0.0576644503, 0.0202045888, -0.00331847323),
               t);
  } else {
    const Vec<T> p = horner(t, -0.499999999999999921, -1.23369486464782461, -1.10263199677608663, -0.43302093546410315,
                            -0.0714264966495558781, -0.00368640222254472835, -1.2155738784033319e-6);
    const Vec<T> q = horner(t, 1, 3.13405639596229157, 3.79463492419474394, 2.22877028905574605, 0.651671615873732687,
                            0.0863181919742383249, 0.00378658712956419735);
    return fma(t, quotient(t * p, q), t);
  }
}

// From here on exp(-|x|) is zero.
template <class T>
constexpr double exp_limit = is_single<T> ? 90 : 720;

#if defined(FASTOPS_VEC_AVX512)

// (1 + 2^-15.1) 2^(j / 32). Multiplied by 1 + r it is exp(r) 2^(j / 32) with error 2^-15.1, for |r| <= ln(2) / 64.
constexpr float kCoarsePowers[kTableColumns] = {
    1.00002932f, 1.02192712f, 1.04430441f, 1.06717169f, 1.09053971f, 1.11441942f, 1.13882203f, 1.16375898f,
    1.18924199f, 1.215283f,   1.24189423f, 1.26908817f, 1.29687758f, 1.32527551f, 1.35429526f, 1.38395046f,
    1.41425503f, 1.44522319f, 1.47686945f, 1.50920868f, 1.54225605f, 1.57602706f, 1.61053756f, 1.64580374f,
    1.68184215f, 1.7186697f,  1.75630366f, 1.7947617f,  1.83406187f, 1.87422259f, 1.91526272f, 1.95720152f,
};

// exp(-t) for 0 <= t <= exp_limit, error 2^-15.
FASTOPS_FN VecF coarse_exp_minus(VecF t) {
  const VecF shifted = fma(t, set<float>(-1.4426950408889634), set<float>(0x1.8p18));  // rounded to multiples of 1/32
  const VecF n = shifted - set<float>(0x1.8p18), minus_r = fma(n, set<float>(0.6931471805599453), t);
  const VecF power = look_up(kCoarsePowers, columns_of(shifted, 0));
  // It scales by floor(n); `power` is the rest of 2^n.
  return scale_from(set<float>(least_exponent<float>), fnma(power, minus_r, power), n);
}

#endif

template <class S, class T>
FASTOPS_FN Vec<T> exp_minus_abs(Vec<T> x) {
  const Vec<T> t = min(set<T>(exp_limit<T>), abs(x));
#if defined(FASTOPS_VEC_AVX512)
  if constexpr (is_bf16<S>) return coarse_exp_minus(t);
#endif
  return exp<S>(-t);
}

// 1 / (1 + exp(-x)). With e = exp(-|x|) it is 1 / (1 + e) or e / (1 + e), both without cancellation.
template <class S, class T>
FASTOPS_FN Vec<T> sigmoid(Vec<T> x) {
  const Vec<T> e = exp_minus_abs<S>(x), one = set<T>(1);
  return quotient_for<S>(select(lt(x, Vec<T>::zero()), e, one), one + e);
}

// float64 tanh(t) = base + numerator / denominator for t = |x|: t + t^3 P/Q near 0, and 1 - 2 e / (1 + e) with
// e = exp(-2 t) elsewhere. The relative error of t^3 P/Q is 2^-57.
struct TanhParts {
  MaskD near_zero;
  VecD numerator, denominator;
};
FASTOPS_FN TanhParts tanh_parts(VecD t) {  // t = |x|
  const VecD e = exp<double>(set<double>(-2) * min(set<double>(30), t)), w = t * t;
  const VecD p =
      horner(w, -0.333333333333333331, -0.0214086286056230706, -0.0002432347549690221, -1.72420238454265324e-8);
  const VecD q = horner(w, 1, 0.464225885816868536, 0.0245152966869041917, 0.00025425449601569716);
  const MaskD near_zero = lt(t, set<double>(1));
  return {near_zero, select(near_zero, t * w * p, set<double>(-2) * e), select(near_zero, q, set<double>(1) + e)};
}

template <class S>
FASTOPS_FN VecD tanh(VecD x) {
  const VecD t = abs(x);
  const TanhParts parts = tanh_parts(t);
  const VecD base = select(parts.near_zero, t, set<double>(1));
  return copysign(base + quotient(parts.numerator, parts.denominator), x);
}

// A function on [0, 15) by a piecewise polynomial with kTableColumns (32 or 8) pieces. The exponent of 1 + t and the
// first bits of its fraction select the piece. Row 0 of the table has a point of each piece, the other rows the
// coefficients of the polynomial in the distance from that point. A piece's column is the value of those bits modulo
// kTableColumns, so the piece that begins at 0 is in column 3/4 kTableColumns.
template <int kRows>
FASTOPS_FN VecF by_pieces(VecF t, const float (&table)[kRows][kTableColumns]) {
  const Columns column = columns_of(t + set<float>(1), kTableColumns == 32 ? 20 : 22);
  const VecF d = t - look_up(table[0], column);
  VecF y = look_up(table[kRows - 1], column);
  for (int row = kRows - 2; row > 0; --row) y = fma(y, d, look_up(table[row], column));
  return y;
}

#if defined(FASTOPS_VEC_AVX512)

// tanh(t), error 2^-28.4; from t = 9 on it is 1.
// clang-format off
constexpr float kTanhPieces[7][32] = {
    {1, 1.25f, 1.5f, 1.75f, 2, 2.25f, 2.5f, 2.75f, 3, 3.5f, 4, 4.5f, 5, 5.5f, 6, 6.5f, 7, 8, 9, 10, 11, 12, 13, 14, 0,
     0.125f, 0.25f, 0.375f, 0.5f, 0.625f, 0.75f, 0.875f},
    {0.761594176f, 0.848283648f, 0.905148268f, 0.941375554f, 0.964027584f, 0.978026092f, 0.986614287f, 0.991859734f,
     0.995054781f, 0.998177886f, 0.999329329f, 0.999753237f, 0.999909222f, 0.999966621f, 0.999987721f, 0.99999547f,
     0.999998331f, 0.999999762f, 1, 1, 1, 1, 1, 1, 0, 0.124352999f, 0.244918659f, 0.3583574f, 0.462117165f,
     0.554599702f, 0.635148942f, 0.703905582f},
    {0.419974953f, 0.280415237f, 0.180706784f, 0.113812119f, 0.0706508085f, 0.0434648916f, 0.0265922043f, 0.0162142701f,
     0.0098657636f, 0.0036407772f, 0.00134091009f, 0.000493502361f, 0.000181577678f, 6.68025241e-05f, 2.45757947e-05f,
     9.04099943e-06f, 3.32401737e-06f, 4.49857453e-07f, 0, 0, 0, 0, 0, 0, 1, 0.98453629f, 0.94001478f, 0.871579885f,
     0.786447704f, 0.692419112f, 0.59658581f, 0.5045169f},
    {-0.319879115f, -0.23788932f, -0.163573265f, -0.107141137f, -0.0681084991f, -0.0425086021f, -0.0262352377f,
     -0.0160815548f, -0.00981071685f, -0.00363167468f, -0.00133907981f, -0.000493034953f, -0.000181433628f,
     -6.67533095e-05f, -2.45581996e-05f, -9.03459659e-06f, -3.30034572e-06f, -4.4665444e-07f, 0, 0, 0, 0, 0, 0,
     3.11897367e-07f, -0.122425161f, -0.230220586f, -0.312331229f, -0.363427281f, -0.384014219f, -0.378921479f,
     -0.355133921f},
    {0.104108639f, 0.108626708f, 0.087940298f, 0.0629444048f, 0.0420951508f, 0.0270665437f, 0.0170031954f,
     0.0105337892f, 0.00642259652f, 0.00239129388f, 0.000883597939f, 0.00032558525f, 0.000119847609f, 4.40991498e-05f,
     1.62244796e-05f, 5.96883001e-06f, 2.09961127e-06f, 2.84152833e-07f, 0, 0, 0, 0, 0, 0, -0.333355635f, -0.313128531f,
     -0.257183582f, -0.178805888f, -0.094332844f, -0.017877074f, 0.0418292955f, 0.0818628371f},
    {0.0237696953f, -0.0151234036f, -0.0259828269f, -0.0237213485f, -0.0177913774f, -0.0121613247f, -0.00790851098f,
     -0.00499912398f, -0.00294388901f, -0.00110620388f, -0.000410117878f, -0.000151304077f, -5.57199419e-05f,
     -2.05061115e-05f, -7.54484472e-06f, -2.77573781e-06f, -8.56369411e-07f, -1.15897841e-07f, 0, 0, 0, 0, 0, 0,
     0.000472512766f, 0.082469143f, 0.143339068f, 0.171414763f, 0.166793644f, 0.138665482f, 0.0994808301f,
     0.0599487647f},
    {-0.0321105346f, -0.00955479499f, 0.00137855101f, 0.00459586969f, 0.00448009279f, 0.00341852149f, 0.0023503527f,
     0.00153186661f, 0.000771512045f, 0.000293064717f, 0.000109076202f, 4.02985752e-05f, 1.48482841e-05f,
     5.46552883e-06f, 2.01108219e-06f, 7.39893494e-07f, 1.71072273e-07f, 2.31523387e-08f, 0, 0, 0, 0, 0, 0,
     0.129987463f, 0.0971129015f, 0.045934964f, -0.00569510134f, -0.0433411673f, -0.0615180321f, -0.0626644045f,
     -0.0530745164f},
};
// clang-format on

FASTOPS_FN VecF tanh_in_full(VecF x) { return copysign(by_pieces(min(set<float>(9.5), abs(x)), kTanhPieces), x); }

#else

// -n / (n + 2) with n = exp(-2|x|) - 1.
FASTOPS_FN VecF tanh_in_full(VecF x) {
  const VecF n = expm1<float>(set<float>(-2) * abs(x));
  return copysign(quotient(n, n + set<float>(2)), x);
}

#endif

// In 16 bits tanh(x) is x P(x^2) / Q(x^2), for |x| <= 9.02: error 2^-19 for f16_t, 2^-15.7 for bf16_t.
template <class S>
FASTOPS_FN VecF tanh(VecF x) {
  if constexpr (!is_half<S>) return tanh_in_full(x);
  x = clamp(x, -9.02, 9.02);
  const VecF w = x * x;
  if constexpr (is_bf16<S>) {
    const VecF p = horner(w, 1, 0.120084047, 0.00202131039, 2.84827206e-06);
    const VecF q = horner(w, 1, 0.453398764, 0.0198525842, 0.000115802752);
    return quotient_for<S>(x * p, q);
  } else {
    const VecF p = horner(w, 1, 0.128257722, 0.00284087937, 1.02093572e-05);
    const VecF q = horner(w, 1, 0.461590707, 0.0233721454, 0.000222856586, 2.07063152e-07);
    return quotient_for<S>(x * p, q);
  }
}

// x - tanh(x). Near 0 it is computed from the parts of tanh, so that nothing cancels.
template <class S>
FASTOPS_FN VecD tanhshrink(VecD x) {
  const VecD t = abs(x);
  const TanhParts parts = tanh_parts(t);
  const VecD base = select(parts.near_zero, VecD::zero(), t - set<double>(1));
  return copysign(base - quotient(parts.numerator, parts.denominator), x);
}

// x - tanh(x) = x w P(w) / Q(w) with w = x^2, error 2^-24.8 (16 bits: 2^-17) for |x| <= 9.02; beyond, tanh is +-1. In
// float32, from |x| = 2 on, it is x - x (Q - w P) / Q, where the subtrahend is the smaller term. Below 2, rounding
// costs 4 ulp, a fraction of what the subtraction x - tanh(x) would lose for |x| < 1.
template <class S>
FASTOPS_FN VecF tanhshrink(VecF x) {
  const VecF c = clamp(x, -9.02, 9.02), w = c * c;
  if constexpr (is_half<S>) {
    const VecF p = horner(w, 0.333333164, 0.0185016636, 0.00012738246);
    const VecF q = horner(w, 1, 0.455499113, 0.0206842888, 0.000130760367);
    return (x - c) + quotient_for<S>(c * w * p, q);
  } else {
    const VecF p = horner(w, 0.333333343, 0.0225192942, 0.000314821053, 8.01877832e-07);
    const VecF q = horner(w, 1, 0.467557877, 0.026062876, 0.000336156227, 8.16094996e-07);
    const MaskF large = gt(w, set<float>(4));
    const VecF part = quotient(select(large, fma(w, p, -q), w * p), q);
    return fma(c, part, select(large, x, VecF::zero()));
  }
}

// Phi(-t) = exp(-t^2 / 2) g(t) for 0 <= t <= normal_limit. From there on t Phi(-t) is less than 2^-98 in float32,
// 2^-1020 in float64, and taken for zero. Products by bf16 parts, whose operand it may be, lose parts of numbers below
// 2^-103. normal_ratio is g: error 2^-62 in float64, 2^-20.4 in 16 bits.
template <class T>
constexpr double normal_limit = is_single<T> ? 11.625 : 37.59375;

// g as a piecewise polynomial for float32. A rational function is as fast but has 3 ulp of rounding error. The points
// lie near the middles of the pieces, at arguments where g is within 2^-30 of a float32.
// clang-format off
#if defined(FASTOPS_VEC_AVX2) || defined(FASTOPS_VEC_NEON)
// Error 2^-28.2.
constexpr float kNormalPieces[10][8] = {
    {1.500001f, 2.5000432f, 4.0000443f, 6.0000467f, 9.000083f, 12.755041f, 0.25000232f, 0.7500087f},
    {0.20578058f, 0.14132936f, 0.0944097f, 0.064778835f, 0.043798395f, 0.031088416f, 0.41403142f, 0.30023095f},
    {-0.09027121f, -0.045612775f, -0.021299304f, -0.010266245f, -0.004753095f, -0.0024082619f, -0.29543346f,
     -0.17376645f},
    {0.03518684f, 0.0136477295f, 0.0046057627f, 0.0015904399f, 0.0005100684f, 0.00018546838f, 0.17008618f,
     0.084952295f},
    {-0.012497026f, -0.0038309589f, -0.0009587042f, -0.00024117816f, -5.4147982e-05f, -1.42017225e-05f, -0.08430386f,
     -0.036683835f},
    {0.00411034f, 0.0010175455f, 0.00019274816f, 3.5841495e-05f, 5.6878025e-06f, 1.0813245e-06f, 0.0372525f,
     0.014359776f},
    {-0.0012655527f, -0.00025733327f, -3.746503e-05f, -5.221964e-06f, -5.895371e-07f, -8.1833534e-08f, -0.014996809f,
     -0.0051824586f},
    {0.00036838994f, 6.2324114e-05f, 7.088621e-06f, 7.4768155e-07f, 6.070826e-08f, 6.162626e-09f, 0.0055837594f,
     0.001745412f},
    {-0.00010586083f, -1.4913921e-05f, -1.4024223e-06f, -1.09843356e-07f, -6.8061343e-09f, -4.799304e-10f,
     -0.0019712271f, -0.000560121f},
    {2.7730975e-05f, 3.332514e-06f, 2.4949586e-07f, 1.5156624e-08f, 6.849985e-10f, 3.572797e-11f, 0.00064295944f,
     0.00016769167f},
};
#else
// Error 2^-29.
FASTOPS_TABLE float kNormalPieces[7][32] = {
    {1.1250086f, 1.3750033f, 1.6250224f, 1.8750062f, 2.1250029f, 2.3750222f, 2.6250017f, 2.8750017f, 3.2500434f,
     3.7500246f, 4.2500057f, 4.7500534f, 5.2500377f, 5.7500386f, 6.2500615f, 6.7500763f, 7.5000405f, 8.500071f,
     9.500095f, 10.50005f, 11.500128f, 12.500044f, 13.500091f, 14.255129f, 0.062500015f, 0.18750182f, 0.3125013f,
     0.43750238f, 0.56250036f, 0.6875009f, 0.8125067f, 0.93751025f},
    {0.24533033f, 0.21763949f, 0.19502127f, 0.17629047f, 0.16057993f, 0.14725298f, 0.13583553f, 0.12596166f,
     0.11345075f, 0.100038625f, 0.08935921f, 0.08067456f, 0.07348774f, 0.0674488f, 0.0623079f, 0.057882003f,
     0.052292824f, 0.04630967f, 0.04154288f, 0.037658684f, 0.03443368f, 0.031714816f, 0.029391536f, 0.027850142f,
     0.47601113f, 0.43318173f, 0.39621148f, 0.3641043f, 0.33606136f, 0.31143382f, 0.28969398f, 0.27041093f},
    {-0.12294355f, -0.099687256f, -0.082028344f, -0.06839656f, -0.05770946f, -0.049213193f, -0.04237379f, -0.036802296f,
     -0.030222418f, -0.023794979f, -0.01916513f, -0.015733818f, -0.013128896f, -0.0111090625f, -0.009514063f,
     -0.008234341f, -0.0067439824f, -0.005306829f, -0.0042809565f, -0.0035242315f, -0.0029505424f, -0.0025056936f,
     -0.0021538748f, -0.0019349209f, -0.3691916f, -0.3177199f, -0.27512568f, -0.23964578f, -0.20990765f, -0.18483125f,
     -0.16356398f, -0.14542927f},
    {0.053508785f, 0.040284526f, 0.030861648f, 0.02402322f, 0.018973567f, 0.015185263f, 0.01230212f, 0.010077498f,
     0.0076132473f, 0.0054034134f, 0.0039536348f, 0.0029690373f, 0.0022802637f, 0.0017856307f, 0.0014222123f,
     0.0011497865f, 0.00085633365f, 0.00060061883f, 0.00043669186f, 0.00032703887f, 0.00025103273f, 0.00019676815f,
     0.0001570146f, 0.00013379706f, 0.22646825f, 0.18680428f, 0.15511712f, 0.12962931f, 0.1089941f, 0.09218107f,
     0.07839856f, 0.06703474f},
    {-0.020915188f, -0.014765263f, -0.010625798f, -0.0077842725f, -0.005796845f, -0.00438261f, -0.0033602284f,
     -0.0026098182f, -0.0018262911f, -0.0011773184f, -0.0007873691f, -0.00054356654f, -0.00038580215f, -0.00028053462f,
     -0.0002083796f, -0.00015772936f, -0.0001071307f, -6.716662e-05f, -4.41091e-05f, -3.0099538e-05f, -2.1209638e-05f,
     -1.5359958e-05f, -1.1387186e-05f, -9.208855e-06f, -0.118345775f, -0.094231255f, -0.07555045f, -0.060977545f,
     -0.049532805f, -0.040485557f, -0.033288207f, -0.027527833f},
    {0.007513108f, 0.0050066193f, 0.003405435f, 0.002361202f, 0.0016665646f, 0.0011959152f, 0.0008715752f,
     0.0006443758f, 0.00042129154f, 0.0002480387f, 0.00015231525f, 9.7034135e-05f, 6.384962e-05f, 4.322678e-05f,
     3.0011925e-05f, 2.1310005e-05f, 1.3285226e-05f, 7.457566e-06f, 4.428989e-06f, 2.7564863e-06f, 1.7844137e-06f,
     1.1946552e-06f, 8.2322526e-07f, 6.3119563e-07f, 0.05482003f, 0.0423221f, 0.032905024f, 0.025758777f, 0.020298598f,
     0.01609857f, 0.012846834f, 0.010313577f},
    {-0.00250091f, -0.0015817555f, -0.0010221301f, -0.0006739383f, -0.00045282766f, -0.00030968996f, -0.00021533566f,
     -0.0001520699f, -9.297258e-05f, -5.0292416e-05f, -2.8499622e-05f, -1.6825907e-05f, -1.0300681e-05f, -6.512286e-06f,
     -4.236995e-06f, -2.8282977e-06f, -1.6157045e-06f, -8.150185e-07f, -4.389399e-07f, -2.4967827e-07f, -1.4873778e-07f,
     -9.217469e-08f, -5.9102703e-08f, -4.3050182e-08f, -0.022996126f, -0.017269239f, -0.013061702f, -0.009948258f,
     -0.0076283156f, -0.005887886f, -0.0045735696f, -0.0035746526f},
};
#endif
// clang-format on

template <class S, class T>
FASTOPS_FN Vec<T> normal_ratio(Vec<T> t) {
  if constexpr (is_half<S>) {
    const Vec<T> p = horner(t, 0.499999911, 0.365561217, 0.121668346, 0.0175710488);
    const Vec<T> q = horner(t, 1, 1.528988, 0.963462651, 0.304797828, 0.0440483578);
    return quotient_for<S>(p, q);
  } else if constexpr (is_single<T>) {
    return by_pieces(t, kNormalPieces);
  } else {
    const Vec<T> p =
        horner(t, 0.5, 0.88497154606563757, 0.777229788524521798, 0.439926946602924319, 0.176789340626990794,
               0.052722218961013301, 0.0118838273764301877, 0.00202501784588798167, 0.000256175172641196523,
               0.0000230079413664355791, 1.32936070044201298e-6, 3.78533764761049304e-8);
    const Vec<T> q =
        horner(t, 1, 2.56782765293414049, 3.10328961612785291, 2.33796845941466339, 1.22530615696069477,
               0.471682544683060264, 0.137116576002092672, 0.0304238092129122471, 0.0051334495769318676,
               0.000645468144117651561, 0.0000577672407139532094, 3.33221311891099324e-6, 9.48843437652574508e-8);
    return quotient(p, q);
  }
}

// times_normal_exp(w, t) = w exp(-t^2 / 2) 2^normal_bias, for t <= normal_limit. The bias keeps it and its parts normal
// numbers. Callers multiply their result by unbias, which is zero from normal_limit on.
template <class T>
constexpr double normal_bias = is_single<T> ? 64 : 512;
template <class T>
FASTOPS_FN Vec<T> unbias(Vec<T> t) {
  return select(lt(t, set<T>(normal_limit<T>)), set<T>(is_single<T> ? 0x1p-64 : 0x1p-512), Vec<T>::zero());
}

template <class S>
FASTOPS_FN VecD times_normal_exp(VecD w, VecD t) {
  // The rounding error of t^2 alone would be hundreds of ulp of the result.
  const VecD square = t * t;
  const ExpParts<double> e = exp_parts<S>(set<double>(-0.5) * square, set<double>(0.5) * product_error(t, t, square));
  return fma(w, e.p, w) * power_of_two(e.n + set<double>(normal_bias<double>));
}

#if defined(FASTOPS_VEC_SCALAR)

template <class S>
FASTOPS_FN VecF times_normal_exp(VecF w, VecF t) {
  const VecF square = t * t;
  const ExpParts<float> e = exp_parts<S>(set<float>(-0.5) * square, set<float>(0.5) * product_error(t, t, square));
  return fma(w, e.p, w) * power_of_two(e.n + set<float>(normal_bias<float>));
}

#else

// The bits of 2^(64 + j / kTableColumns) for column j, minus j << 18 (20): add_shifted below adds the bits of n, whose
// low bits are j.
constexpr uint32_t kPowers[kTableColumns] = {
#if defined(FASTOPS_VEC_AVX512)
    0x5f800000, 0x5f7ecd87, 0x5f7daac3, 0x5f7c980f, 0x5f7b95c2, 0x5f7aa43a, 0x5f79c3d3, 0x5f78f4f0,
    0x5f7837f0, 0x5f778d3a, 0x5f76f532, 0x5f767043, 0x5f75fed7, 0x5f75a15b, 0x5f75583f, 0x5f7523f6,
    0x5f7504f3, 0x5f74fbaf, 0x5f7508a4, 0x5f752c4d, 0x5f75672a, 0x5f75b9be, 0x5f76248c, 0x5f76a81e,
    0x5f7744fd, 0x5f77fbb8, 0x5f78ccdf, 0x5f79b907, 0x5f7ac0c7, 0x5f7be4ba, 0x5f7d257d, 0x5f7e83b3,
#else
    0x5f800000, 0x5f7b95c2, 0x5f7837f0, 0x5f75fed7, 0x5f7504f3, 0x5f75672a, 0x5f7744fd, 0x5f7ac0c7,
#endif
};

// t^2 = r - n step with integral n <= 0, |r| <= step / 2 and step = 2 ln 2 / kTableColumns. exp(-t^2 / 2) is then
// 2^(n / kTableColumns), from the table, times exp(-r / 2), by a polynomial with error 2^-33 (of degree 3 with 32
// columns, of degree 4 with 8). step is a sum of two constants. The first has so few bits that its product with n is
// exact, and fma(t, t, part) rounds only after the subtraction, when the sum is less than 0.1.
template <class S>
FASTOPS_FN VecF times_normal_exp(VecF w, VecF t) {
  constexpr bool wide = kTableColumns == 32;
  constexpr double magic = 0x1.8p23, step = wide ? 0x1.63p-5 : 0x1.62ep-3;  // the first 9 (12) bits of step
  const VecF square = t * t;
  const VecF n = fma(square, set<float>(wide ? -23.083120654223414 : -5.7707801635558535), set<float>(magic));
  const VecF whole = w * add_shifted(look_up(kPowers, columns_of(n, 0)), n, wide ? 18 : 20);
  if constexpr (is_half<S>) {
    const VecF r = fma(n - set<float>(magic), set<float>(wide ? 0.0433216987849966 : 0.173286795139986), square);
    const VecF p = wide ? horner(r, -0.500007642, 0.125000312) : horner(r, -0.5, 0.125016521, -0.0208349854);
    return fma(whole, r * p, whole);
  }
  const VecF part = fma(n, set<float>(step), set<float>(-magic * step));
  const VecF r = fma(part, set<float>(wide ? -3.0603817833239883e-4 : 4.609072685311285e-5), fma(t, t, part));
  const VecF p =
      wide ? horner(r, -0.5, 0.125001033, -0.0208334366) : horner(r, -0.499999995, 0.125, -0.0208359188, 0.00260427868);
  return fma(whole, r * p, whole);
}

#endif

// exp(-(c1 t + c3 t^3)) for 0 <= t <= tanh_gelu_limit, c1 = 2 sqrt(2/pi) and c3 = 0.044715 c1; zero at the limit, as in
// GELU. The argument is a sum of two words, as the rounding error of one word would be hundreds of ulp of the result.
template <class T>
constexpr double tanh_gelu_limit = is_single<T> ? 9.125 : 21.8;
constexpr double kTanhGelu1 = 1.59576912160573071, kTanhGelu3 = 0.0713548162726002488;

template <class S, class T>
FASTOPS_FN ExpParts<T> tanh_gelu_exp_inside(Vec<T> t) {
  if constexpr (is_half<S>) return exp_parts<S>(-t * fma(t * t, set<T>(kTanhGelu3), set<T>(kTanhGelu1)));
  // The high word of c1 has 12 (26) bits. Then w - c1 is exact, and cubic - (w - c1) is the rounding error of the sum.
  const Vec<T> c1 = set<T>(is_single<T> ? 1.595703125 : 1.59576910734176636);
  const Vec<T> c1_low = set<T>(is_single<T> ? 0.0000659966057307117598 : 1.42639643543379092e-8);
  const Vec<T> c3 = set<T>(is_single<T> ? 0.0713548138737678528 : 0.0713548162726002494);
  const Vec<T> c3_low = set<T>(is_single<T> ? 2.39883239599313563e-9 : -6.17514991815531545e-19);
  const Vec<T> square = t * t, square_low = product_error(t, t, square), cubic = c3 * square;
  const Vec<T> w = c1 + cubic;  // w + w_low = c1 + c3 t^2
  const Vec<T> c_low = fnma(c3, square_low, fma(c3_low, square, c1_low)) - product_error(c3, square, cubic);
  const Vec<T> w_low = (cubic - (w - c1)) + c_low;
  const Vec<T> u = t * w;
  return exp_parts<S>(-u, fnma(t, w_low, product_error(t, w, u)));
}
template <class S, class T>
FASTOPS_FN ExpParts<T> tanh_gelu_exp(Vec<T> t) {
  const ExpParts<T> e = tanh_gelu_exp_inside<S>(t);
  return {select(ge(t, set<T>(tanh_gelu_limit<T>)), set<T>(-1), e.p), e.n};
}
