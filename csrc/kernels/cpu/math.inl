// Elementary functions over any Vec, on the ranges that the activations need. Included in the tier's namespace after
// vec.h.
//
// Polynomials and rationals are minimax fits of relative error, found by the Remez exchange in 60-digit arithmetic; the
// error named beside each is the fit's own, before rounding. Rationals are written so that the rounding of the small
// part counts little: x + x^3 P/Q, t + t^2 P. NaN goes in and comes out, provided that clamps keep the variable last
// (see vec.h).
//
// S is the storage type of the result: where it has 8 or 11 bits, shorter polynomials do, whose error (about 2^-16 for
// bf16_t, 2^-19 for f16_t) adds 0.02 ulp to the 0.5 of the rounding that follows.

template <class S>
struct ComputeType {
  using type = float;
};
template <>
struct ComputeType<double> {
  using type = double;
};
// What a storage type is computed in: float32 for the 16-bit ones.
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

// x = n ln 2 + r with integral n and |r| <= ln(2) / 2, for |x| < 2^20. Cody and Waite: the first constant has so few
// bits that n times it is exact, with or without a fused multiply-add.
template <class T>
struct Reduced {
  Vec<T> n, r;
};
template <class S, class T>
inline Reduced<T> reduce_by_ln2(Vec<T> x) {
  const Vec<T> magic = set<T>(is_single<T> ? 0x1.8p23 : 0x1.8p52);  // adding it rounds to an integer
  const Vec<T> n = fma(x, set<T>(1.4426950408889634), magic) - magic;
  if constexpr (is_half<S>) return {n, fnma(n, set<T>(0.6931471805599453), x)};
  const double high = is_single<T> ? 0.693359375 : 0.693145751953125;
  const double low = is_single<T> ? -2.12194440054690583e-4 : 1.42860682030941723e-6;
  return {n, fnma(n, set<T>(low), fnma(n, set<T>(high), x))};
}

// (exp(r) - 1 - r) / r^2 for |r| <= ln(2) / 2. Error of expm1(r): 2^-26.2 (2^-55.6 for float64), 2^-21 for f16_t, and
// 2^-17.5 of exp(r) for bf16_t.
template <class S, class T>
inline Vec<T> exp_series(Vec<T> r) {
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

// exp(x) = (1 + p) 2^n in two parts. t exp(x) is then scale(fma(t, p, t), n): one rounding, and all its bits where
// exp(x) alone is denormal.
template <class T>
struct ExpParts {
  Vec<T> p, n;
};
template <class S, class T>
inline ExpParts<T> exp_parts(Reduced<T> x) {
  return {fma(x.r * x.r, exp_series<S>(x.r), x.r), x.n};
}
template <class S, class T>
inline ExpParts<T> exp_parts(Vec<T> x) {
  return exp_parts<S>(reduce_by_ln2<S>(x));
}
// Of x + low, |low| much smaller than |x|.
template <class S, class T>
inline ExpParts<T> exp_parts(Vec<T> x, Vec<T> low) {
  const Reduced<T> reduced = reduce_by_ln2<S>(x);
  return exp_parts<S>(Reduced<T>{reduced.n, reduced.r + low});
}
template <class T>
inline Vec<T> times_exp(Vec<T> t, ExpParts<T> e) {
  return scale(fma(t, e.p, t), e.n);
}
template <class T>
inline Vec<T> whole_exp(ExpParts<T> e) {
  return scale(set<T>(1) + e.p, e.n);
}

// exp(x) for |x| <= 170 (1400).
template <class S, class T>
inline Vec<T> exp(Vec<T> x) {
  return whole_exp(exp_parts<S>(x));
}

// exp(x) - 1 for x <= 88 (709), with all its digits near 0.
template <class S, class T>
inline Vec<T> expm1(Vec<T> x) {
  x = clamp(x, is_single<T> ? -20 : -40, is_single<T> ? 88.7 : 709.7);
  const ExpParts<T> e = exp_parts<S>(x);
  const Vec<T> s = power_of_two(e.n);
  return fma(s, e.p, s - set<T>(1));
}

// a / b: the estimate alone for bf16_t.
template <class S, class T>
inline Vec<T> quotient_for(Vec<T> a, Vec<T> b) {
  if constexpr (is_bf16<S>)
    return quotient_14_bits(a, b);
  else
    return quotient(a, b);
}

// log(1 + t) for 0 <= t <= 1. Error 2^-27.5 (2^-60.4; f16_t 2^-19.4, bf16_t 2^-16.7).
template <class S, class T>
inline Vec<T> log1p(Vec<T> t) {
  if constexpr (is_bf16<S>) {
    return fma(t * t, horner(t, -0.499539465, 0.326226085, -0.212404191, 0.103592612, -0.0247345269), t);
  } else if constexpr (is_half<S>) {
    return fma(t * t, horner(t, -0.499907464, 0.331404269, -0.236113474, 0.151027769, -0.0678512603, 0.0145883346), t);
  } else if constexpr (is_single<T>) {
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

template <class S, class T>
inline Vec<T> exp_minus_abs(Vec<T> x) {
  return exp<S>(-min(set<T>(exp_limit<T>), abs(x)));
}

// 1 / (1 + exp(-x)); with e = exp(-|x|) it is 1 / (1 + e) or e / (1 + e), and neither cancels.
template <class S, class T>
inline Vec<T> sigmoid(Vec<T> x) {
  const Vec<T> e = exp_minus_abs<S>(x), one = set<T>(1);
  return quotient_for<S>(select(lt(x, Vec<T>::zero()), e, one), one + e);
}

// The float64 tanh(x) is base + numerator / denominator: x + x^3 P/Q near 0, 1 - 2 e / (1 + e) with e = exp(-2|x|)
// beyond. x^3 P/Q: error 2^-57 of itself.
struct TanhParts {
  MaskD near_zero;
  VecD numerator, denominator;
};
inline TanhParts tanh_parts(VecD t) {  // t = |x|
  const VecD e = exp<double>(set<double>(-2) * min(set<double>(30), t)), w = t * t;
  const VecD p =
      horner(w, -0.333333333333333331, -0.0214086286056230706, -0.0002432347549690221, -1.72420238454265324e-8);
  const VecD q = horner(w, 1, 0.464225885816868536, 0.0245152966869041917, 0.00025425449601569716);
  const MaskD near_zero = lt(t, set<double>(1));
  return {near_zero, select(near_zero, t * w * p, set<double>(-2) * e), select(near_zero, q, set<double>(1) + e)};
}

template <class S>
inline VecD tanh(VecD x) {
  const VecD t = abs(x);
  const TanhParts parts = tanh_parts(t);
  const VecD base = select(parts.near_zero, t, set<double>(1));
  return copysign(base + quotient(parts.numerator, parts.denominator), x);
}

#if defined(FASTOPS_VEC_AVX512)

// A function on [0, 15) by 32 polynomials of degree 5, looked up in registers: 1 + t has a piece for each value of its
// exponent and of the first three bits of its fraction. The rows are where a piece starts, and the coefficients of t
// less that; the columns are in the order of the low five of those bits, so that the piece at 0 has column 24.
inline VecF by_pieces(VecF t, const float (&table)[7][32]) {
  const __m512i index = _mm512_srli_epi32(_mm512_castps_si512((t + set<float>(1)).v), 20);
  const auto look_up = [&](int row) {
    const __m512 low = _mm512_loadu_ps(table[row]), high = _mm512_loadu_ps(table[row] + 16);
    return VecF{_mm512_permutex2var_ps(low, index, high)};
  };
  const VecF d = t - look_up(0);
  VecF y = fma(look_up(6), d, look_up(5));
  y = fma(y, d, look_up(4));
  y = fma(y, d, look_up(3));
  y = fma(y, d, look_up(2));
  return fma(y, d, look_up(1));
}

// tanh, error 2^-28.4; 1 from 9 on.
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

inline VecF tanh_in_full(VecF x) { return copysign(by_pieces(min(set<float>(9.5), abs(x)), kTanhPieces), x); }

#else

// -n / (n + 2) with n = exp(-2|x|) - 1.
inline VecF tanh_in_full(VecF x) {
  const VecF n = expm1<float>(set<float>(-2) * abs(x));
  return copysign(quotient(n, n + set<float>(2)), x);
}

#endif

// In 16 bits x P(x^2) / Q(x^2) on |x| <= 9.02: error 2^-19 for f16_t, 2^-15.7 for bf16_t.
template <class S>
inline VecF tanh(VecF x) {
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

// x - tanh(x), from the parts of tanh where the difference cancels nothing.
template <class S>
inline VecD tanhshrink(VecD x) {
  const VecD t = abs(x);
  const TanhParts parts = tanh_parts(t);
  const VecD base = select(parts.near_zero, VecD::zero(), t - set<double>(1));
  return copysign(base - quotient(parts.numerator, parts.denominator), x);
}

// x w P(w) / Q(w) with w = x^2, error 2^-24.8 (16 bits: 2^-17) on |x| <= 9.02; tanh is +-1 beyond. In float32 it is
// x - x (Q - w P) / Q from |x| = 2 on, where what is subtracted is the smaller part. The 4 ulp of rounding below are a
// fraction of what x - tanh(x) loses for |x| < 1.
template <class S>
inline VecF tanhshrink(VecF x) {
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

// Phi(-t) = exp(-t^2 / 2) g(t) for 0 <= t <= normal_limit, where t Phi(-t) is zero. normal_ratio is g: error 2^-26.2
// (2^-62; 16 bits 2^-20.4).
template <class T>
constexpr double normal_limit = is_single<T> ? 14.5 : 38.7;

#if defined(FASTOPS_VEC_AVX512)

// g in pieces, error 2^-29: as fast as the rational, and without its 3 ulp of rounding.
// clang-format off
constexpr float kNormalPieces[7][32] = {
    {1, 1.25f, 1.5f, 1.75f, 2, 2.25f, 2.5f, 2.75f, 3, 3.5f, 4, 4.5f, 5, 5.5f, 6, 6.5f, 7, 8, 9, 10, 11, 12, 13, 14, 0,
     0.125f, 0.25f, 0.375f, 0.5f, 0.625f, 0.75f, 0.875f},
    {0.261578292f, 0.230760321f, 0.20578067f, 0.185231671f, 0.168101996f, 0.153651938f, 0.14133133f, 0.130724728f,
     0.121513948f, 0.106345154f, 0.094410643f, 0.084803395f, 0.0769193023f, 0.0703426972f, 0.0647793114f, 0.0600156747f,
     0.0558934808f, 0.0491225459f, 0.0437987894f, 0.0395066924f, 0.03597489f, 0.0330189727f, 0.0305094142f,
     0.0283526611f, 0.5f, 0.453793228f, 0.414032102f, 0.379604429f, 0.349618822f, 0.323356181f, 0.30023247f,
     0.279770583f},
    {-0.137363955f, -0.110491864f, -0.0902712718f, -0.0747868642f, -0.062738277f, -0.0532254167f, -0.045613952f,
     -0.0394492596f, -0.034400411f, -0.026734231f, -0.0212997086f, -0.0173270125f, -0.0143457539f, -0.0120574618f,
     -0.0102663934f, -0.00884039048f, -0.00768789602f, -0.00596190756f, -0.00475317892f, -0.00387533847f,
     -0.00321849412f, -0.00271462719f, -0.0023198917f, -0.00200503296f, -0.398942262f, -0.342218131f, -0.295434237f,
     -0.256590605f, -0.224132866f, -0.196844667f, -0.173767939f, -0.154143035f},
    {0.062105827f, 0.0463219397f, 0.0351863839f, 0.0271770172f, 0.0213125255f, 0.0169472415f, 0.0136481412f,
     0.0111195752f, 0.00915577728f, 0.00638738228f, 0.00460574916f, 0.00341583323f, 0.00259521999f, 0.00201329729f,
     0.00159045809f, 0.00127655815f, 0.00103899394f, 0.000713591697f, 0.000510063139f, 0.000376640382f, 0.000285719376f,
     0.000221717652f, 0.00017540768f, 0.000141098019f, 0.249999076f, 0.205507308f, 0.170086265f, 0.141691104f,
     0.118775927f, 0.100163914f, 0.0849530995f, 0.0724475905f},
    {-0.0250628199f, -0.0175158009f, -0.0124885859f, -0.00907024555f, -0.00670090411f, -0.0050290795f, -0.00382966874f,
     -0.00295577198f, -0.0023057838f, -0.00145682041f, -0.000957500888f, -0.000651142036f, -0.000456101261f,
     -0.000327839516f, -0.000241048343f, -0.000180814633f, -0.00013774322f, -8.41219808e-05f, -5.40665351e-05f,
     -3.62373758e-05f, -2.5151412e-05f, -1.79799554e-05f, -1.31817442e-05f, -9.87691783e-06f, -0.132949069f,
     -0.105486706f, -0.0842871219f, -0.0678061172f, -0.0549054705f, -0.0447402596f, -0.0366789512f, -0.0302463304f},
    {0.00907628052f, 0.00599524193f, 0.0040443805f, 0.00278243423f, 0.00194958842f, 0.00138950569f, 0.00100616179f,
     0.000739420706f, 0.000537527376f, 0.0003109104f, 0.000187940575f, 0.000118071002f, 7.67274105e-05f,
     5.13683917e-05f, 3.53094692e-05f, 2.48464548e-05f, 1.73248136e-05f, 9.49539935e-06f, 5.52654774e-06f,
     3.38074369e-06f, 2.15635305e-06f, 1.42511203e-06f, 9.71008717e-07f, 6.79332913e-07f, 0.0620063096f, 0.0477188863f,
     0.0369868875f, 0.0288677253f, 0.02268246f, 0.0179385599f, 0.014276227f, 0.0114308391f},
    {-0.00250090472f, -0.00158175372f, -0.00102212979f, -0.000673938135f, -0.000452827575f, -0.000309689902f,
     -0.000215335633f, -0.000152069872f, -9.29725502e-05f, -5.02924013e-05f, -2.84996149e-05f, -1.68259012e-05f,
     -1.03006796e-05f, -6.51228447e-06f, -4.2369943e-06f, -2.82829728e-06f, -1.61570392e-06f, -8.15018268e-07f,
     -4.38939793e-07f, -2.49678209e-07f, -1.48737755e-07f, -9.21746661e-08f, -5.9102689e-08f, -3.9039076e-08f,
     -0.0229960922f, -0.0172692221f, -0.0130616939f, -0.00994825456f, -0.00762831466f, -0.00588788511f, -0.00457356917f,
     -0.00357465213f},
};
// clang-format on

#endif

template <class S, class T>
inline Vec<T> normal_ratio(Vec<T> t) {
  if constexpr (is_half<S>) {
    const Vec<T> p = horner(t, 0.499999911, 0.365561217, 0.121668346, 0.0175710488);
    const Vec<T> q = horner(t, 1, 1.528988, 0.963462651, 0.304797828, 0.0440483578);
    return quotient_for<S>(p, q);
  } else if constexpr (is_single<T>) {
#if defined(FASTOPS_VEC_AVX512)
    return by_pieces(t, kNormalPieces);
#else
    const Vec<T> p = horner(t, 0.5, 0.434898257, 0.180620342, 0.0397232585, 0.00397304492);
    const Vec<T> q = horner(t, 1, 1.66768122, 1.19185483, 0.462543458, 0.0995786041, 0.0099588111);
    return quotient(p, q);
#endif
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

// exp(-t^2 / 2); the part of t^2 that rounding loses would be hundreds of ulp of the result.
template <class S, class T>
inline ExpParts<T> normal_exp(Vec<T> t) {
  const Vec<T> square = t * t;
  if constexpr (is_half<S>)
    return exp_parts<S>(set<T>(-0.5) * square);
  else
    return exp_parts<S>(set<T>(-0.5) * square, set<T>(0.5) * product_error(t, t, square));
}

// exp(-(c1 t + c3 t^3)) for 0 <= t <= tanh_gelu_limit, c1 = 2 sqrt(2/pi) and c3 = 0.044715 c1: the argument in two
// words, as its rounding would be hundreds of ulp of the result.
template <class T>
constexpr double tanh_gelu_limit = is_single<T> ? 11 : 21.8;
constexpr double kTanhGelu1 = 1.59576912160573071, kTanhGelu3 = 0.0713548162726002488;

template <class S, class T>
inline ExpParts<T> tanh_gelu_exp(Vec<T> t) {
  if constexpr (is_half<S>) return exp_parts<S>(-t * fma(t * t, set<T>(kTanhGelu3), set<T>(kTanhGelu1)));
  // The high word of c1 has 12 (26) bits, so that w - c1 is exact and the sum's error follows in two steps.
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
