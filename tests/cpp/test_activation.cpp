// The activation kernels against libm in long double, on every tier of this machine, without torch: values, gradients,
// masks, rows with strides, in place, tails, special values, PReLU, GLU, and the same bits for any number of threads.
// Every operand lies against a page that must not be touched. Returns 1 if anything fails.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include "tiers.h"

namespace {

using namespace fastops;
using Real = long double;

void fail(const std::string& what, int64_t n, int64_t at, double x, double got, double wanted) {
  if (++failures > 40) return;
  std::printf("FAIL %s %s n=%lld [%lld] x=%.17g got %.17g, wanted %.17g\n", isa_name(isa_used()), what.c_str(),
              static_cast<long long>(n), static_cast<long long>(at), x, got, wanted);
}

// ---- storage types, converted by arithmetic that shares nothing with vec.h

struct Format {
  int precision, min_exponent;
  double largest;
};
template <class S>
constexpr Format kFormat = {};
template <>
constexpr Format kFormat<float> = {24, -126, 0x1.fffffep127};
template <>
constexpr Format kFormat<double> = {53, -1022, 0x1.fffffffffffffp1023};
template <>
constexpr Format kFormat<bf16_t> = {8, -126, 0x1.fep127};
template <>
constexpr Format kFormat<f16_t> = {11, -14, 65504};

// The spacing of S at x.
template <class S>
Real spacing(Real x) {
  int exponent = 0;
  if (x != 0) std::frexp(x, &exponent);
  const int floor = kFormat<S>.min_exponent + 1;
  return std::ldexp(Real{1}, (x != 0 && exponent > floor ? exponent : floor) - kFormat<S>.precision);
}

template <class S>
double value_of(S x) {
  if constexpr (std::is_floating_point_v<S>) {
    return x;
  } else {
    const int fraction_bits = kFormat<S>.precision - 1, exponent_bits = 15 - fraction_bits;
    const int all_ones = (1 << exponent_bits) - 1, bias = all_ones / 2;
    const int exponent = x.bits >> fraction_bits & all_ones, fraction = x.bits & ((1 << fraction_bits) - 1);
    double magnitude;
    if (exponent == all_ones)
      magnitude = fraction ? NAN : INFINITY;
    else if (exponent == 0)
      magnitude = std::ldexp(fraction, 1 - bias - fraction_bits);
    else
      magnitude = std::ldexp(fraction + (1 << fraction_bits), exponent - bias - fraction_bits);
    return x.bits & 0x8000 ? -magnitude : magnitude;
  }
}

// Truncates: any representable value does as an input.
template <class S>
S input_of(double x) {
  if constexpr (std::is_floating_point_v<S>) {
    return static_cast<S>(x);
  } else {
    const int fraction_bits = kFormat<S>.precision - 1, exponent_bits = 15 - fraction_bits;
    const int all_ones = (1 << exponent_bits) - 1, bias = all_ones / 2;
    const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
    const double magnitude = std::fabs(x);
    int exponent = 0, bits;
    const double fraction = std::frexp(magnitude, &exponent);
    if (std::isnan(x))
      bits = (all_ones << fraction_bits) | (1 << (fraction_bits - 1));
    else if (magnitude > kFormat<S>.largest)
      bits = all_ones << fraction_bits;
    else if (exponent <= 1 - bias)
      bits = static_cast<int>(std::ldexp(magnitude, bias - 1 + fraction_bits));
    else
      bits = ((exponent - 1 + bias) << fraction_bits) + static_cast<int>(std::ldexp(fraction, fraction_bits + 1)) -
             (1 << fraction_bits);
    return {static_cast<uint16_t>(bits | sign)};
  }
}

// ---- references

Real sigmoid(Real x) { return x >= 0 ? 1 / (1 + std::exp(-x)) : std::exp(x) / (1 + std::exp(x)); }
Real softplus(Real x) { return (x > 0 ? x : 0) + std::log1p(std::exp(-std::fabs(x))); }
Real normal_cdf(Real x) { return std::erfc(-x * std::sqrt(Real{0.5})) / 2; }
Real times(Real x, Real gate) { return gate == 0 ? 0 : x * gate; }
const Real kGelu = 2 * std::sqrt(Real{0.5}) * 1.1283791670955125738961589031215451716881L;
Real gelu_gate(Real x) { return sigmoid(kGelu * (x + 0.044715L * x * x * x)); }
constexpr Real kSeluAlpha = 1.6732632423543772848170429916717L, kSeluScale = 1.0507009873554804934193349852946L;

Real tanhshrink(Real x) {
  if (std::isinf(x)) return x;
  if (std::fabs(x) > 0.1L) return x - std::tanh(x);
  const Real w = x * x;
  return x * w *
         (1 / 3.0L -
          w * (2 / 15.0L -
               w * (17 / 315.0L - w * (62 / 2835.0L - w * (1382 / 155925.0L -
                                                           w * (21844 / 6081075.0L - w * (929569 / 638512875.0L)))))));
}

Real reference_value(const Activation& f, Real x) {
  const Real a = f.a, b = f.b;
  switch (f.kind) {
    case ActivationKind::relu:
      return x > 0 ? x : 0;
    case ActivationKind::relu6:
      return std::fmin(std::fmax(x, Real{0}), Real{6});
    case ActivationKind::leaky_relu:
      return x > 0 ? x : a * x;
    case ActivationKind::elu:
      return x > 0 ? x : a * std::expm1(x);
    case ActivationKind::selu:
      return kSeluScale * (x > 0 ? x : kSeluAlpha * std::expm1(x));
    case ActivationKind::celu:
      return x > 0 ? x : a * std::expm1(x / a);
    case ActivationKind::gelu:
      return times(x, normal_cdf(x));
    case ActivationKind::gelu_tanh:
      return times(x, gelu_gate(x));
    case ActivationKind::silu:
      return times(x, sigmoid(x));
    case ActivationKind::mish: {
      const Real e = std::exp(std::fmin(x, Real{100})), n = e * (e + 2);
      return times(x, n / (n + 2));
    }
    case ActivationKind::sigmoid:
      return sigmoid(x);
    case ActivationKind::logsigmoid:
      return -softplus(-x);
    case ActivationKind::tanh:
      return std::tanh(x);
    case ActivationKind::softplus:
      return a * x > b ? x : softplus(a * x) / a;
    case ActivationKind::softsign:
      return std::isinf(x) ? std::copysign(Real{1}, x) : x / (1 + std::fabs(x));
    case ActivationKind::hardtanh:
      return std::fmin(std::fmax(x, a), b);
    case ActivationKind::hardsigmoid:
      return std::fmin(std::fmax(x + 3, Real{0}), Real{6}) / 6;
    case ActivationKind::hardswish:
      return x <= -3 ? 0 : x * (std::fmin(x + 3, Real{6}) / 6);
    case ActivationKind::hardshrink:
      return std::fabs(x) <= a ? 0 : x;
    case ActivationKind::softshrink:
      return std::fabs(x) <= a ? 0 : x - std::copysign(a, x);
    case ActivationKind::tanhshrink:
      return tanhshrink(x);
    case ActivationKind::threshold:
      return x > a ? x : b;
    default:
      return x;
  }
}

Real reference_slope(const Activation& f, Real x) {
  const Real a = f.a, b = f.b;
  switch (f.kind) {
    case ActivationKind::relu:
      return x > 0;
    case ActivationKind::relu6:
      return x > 0 && x < 6;
    case ActivationKind::leaky_relu:
      return x > 0 ? 1 : a;
    case ActivationKind::elu:
      return x > 0 ? 1 : a * std::exp(x);
    case ActivationKind::selu:
      return kSeluScale * (x > 0 ? 1 : kSeluAlpha * std::exp(x));
    case ActivationKind::celu:
      return x > 0 ? 1 : std::exp(x / a);
    case ActivationKind::gelu:
      return normal_cdf(x) + times(x, std::exp(-x * x / 2) * 0.398942280401432677939946059934381868L);
    case ActivationKind::gelu_tanh:
      return gelu_gate(x) +
             times(x, gelu_gate(x) * gelu_gate(-x)) * (std::fabs(x) > 1e9L ? 0 : kGelu * (1 + 3 * 0.044715L * x * x));
    case ActivationKind::silu:
      return sigmoid(x) + times(x, sigmoid(x) * sigmoid(-x));
    case ActivationKind::mish: {
      const Real e = std::exp(std::fmin(x, Real{100})), d = e * (e + 2) + 2;
      return x > 100 ? 1 : e == 0 ? 0 : e * ((e + 2) * d + 4 * x * (1 + e)) / (d * d);
    }
    case ActivationKind::sigmoid:
      return sigmoid(x) * sigmoid(-x);
    case ActivationKind::logsigmoid:
      return sigmoid(-x);
    case ActivationKind::tanh:
      return 1 - std::tanh(x) * std::tanh(x);
    case ActivationKind::softplus:
      return a * x > b ? 1 : sigmoid(a * x);
    case ActivationKind::softsign:
      return 1 / ((1 + std::fabs(x)) * (1 + std::fabs(x)));
    case ActivationKind::hardtanh:
      return x > a && x < b;
    case ActivationKind::hardsigmoid:
      return x > -3 && x < 3 ? 1 / 6.0L : 0;
    case ActivationKind::hardswish:
      return x <= -3 ? 0 : x < 3 ? x / 3 + 0.5L : 1;
    case ActivationKind::hardshrink:
    case ActivationKind::softshrink:
      return std::fabs(x) > a;
    case ActivationKind::tanhshrink:
      return std::tanh(x) * std::tanh(x);
    case ActivationKind::threshold:
      return x > a;
    default:
      return 1;
  }
}

struct Case {
  const char* name;
  Activation activation;
};
// Parameters are exact in every dtype, so that no reference depends on how they are rounded.
const Case kCases[] = {
    {"identity", {ActivationKind::identity}},
    {"relu", {ActivationKind::relu}},
    {"relu6", {ActivationKind::relu6}},
    {"leaky_relu", {ActivationKind::leaky_relu, 0.125}},
    {"elu", {ActivationKind::elu, 0.75}},
    {"selu", {ActivationKind::selu}},
    {"celu", {ActivationKind::celu, 2}},
    {"gelu", {ActivationKind::gelu}},
    {"gelu_tanh", {ActivationKind::gelu_tanh}},
    {"silu", {ActivationKind::silu}},
    {"mish", {ActivationKind::mish}},
    {"sigmoid", {ActivationKind::sigmoid}},
    {"logsigmoid", {ActivationKind::logsigmoid}},
    {"tanh", {ActivationKind::tanh}},
    {"softplus", {ActivationKind::softplus, 1, 20}},
    {"softplus", {ActivationKind::softplus, 2, 4}},
    {"softsign", {ActivationKind::softsign}},
    {"hardtanh", {ActivationKind::hardtanh, -1, 1}},
    {"hardtanh", {ActivationKind::hardtanh, -0.5, 2}},
    {"hardsigmoid", {ActivationKind::hardsigmoid}},
    {"hardswish", {ActivationKind::hardswish}},
    {"hardshrink", {ActivationKind::hardshrink, 0.5}},
    {"softshrink", {ActivationKind::softshrink, 0.5}},
    {"tanhshrink", {ActivationKind::tanhshrink}},
    {"threshold", {ActivationKind::threshold, 0.25, 20}},
};

// ---- running

Team team_of(int threads) { return {threads, run_threads}; }

const char* dtype_name(DType dtype) {
  const char* const names[] = {"f32", "f64", "bf16", "f16"};
  return names[static_cast<int>(dtype)];
}

// Exactly n elements between two pages.
template <class S>
struct Buffer {
  explicit Buffer(int64_t n) : n(n), data(n) {}
  S& operator[](int64_t i) { return data[static_cast<size_t>(i)]; }
  S* get() { return data.get(); }
  bool same(const Buffer& other) const {
    return n == other.n && std::memcmp(data.get(), other.data.get(), static_cast<size_t>(n) * sizeof(S)) == 0;
  }
  int64_t n;
  Exact<S> data;
};

const double kSpecial[] = {0.0,   -0.0,   INFINITY, -INFINITY, NAN,  1e-45, -1e-45, 6e-8, -6e-8, 1e-310, 1e38,  -1e38,
                           60000, -60000, 3,        -3,        0.5,  -0.5,  6,      1,    -1,    20,     -100,  -88,
                           -104,  9,      -9,       0.25,      -745, -14.5, 11,     -11,  -709,  89,     1e300, -1e300};
constexpr int kSpecials = sizeof kSpecial / sizeof kSpecial[0];

template <class S>
void fill(Buffer<S>& buffer, unsigned seed, bool special) {
  std::mt19937 random(seed);
  std::normal_distribution<double> normal(0, 3);
  for (int64_t i = 0; i < buffer.n; ++i) buffer[i] = input_of<S>(normal(random));
  if (!special) return;
  for (int64_t i = 0; i < buffer.n && i < kSpecials; ++i) buffer[i * 7919 % buffer.n] = input_of<S>(kSpecial[i]);
}

// In ulp. The exact bounds of float32 are ulp.cpp's; the scalar tier rounds every product. PyTorch's own error of gelu
// and tanhshrink is unbounded, at the left and near 0.
template <class S>
double forward_bound(ActivationKind kind) {
  if (sizeof(S) == 2) return 0.55;
  const bool scalar = isa_used() == Isa::scalar;
  if (kind == ActivationKind::gelu) return sizeof(S) == 4 ? 3.7 : scalar ? 9 : 6.5;
  if (kind == ActivationKind::tanhshrink) return sizeof(S) == 4 ? 4.8 : scalar ? 9 : 6.5;
  return sizeof(S) == 8 ? 4.5 : scalar ? 2.8 : 2.5;
}

// Whether an exponential in f(x) may be below the normal numbers, or in float32's GELU below 2^-98. It is zero then,
// and so is the result.
template <class S>
bool may_underflow(ActivationKind kind, double x, Real value) {
  const bool gelu = kind == ActivationKind::gelu || kind == ActivationKind::gelu_tanh;
  const int least = sizeof(S) == 8 ? -1012 : gelu ? -95 : -116;
  return std::fabs(x) > 8 && std::fabs(value) < std::ldexp(Real{1}, least);
}

// No argument is slow: nothing underflows, whatever x is, nor does the derivative. Without fused multiply-adds the
// small products inside of them do.
template <class S>
void check_underflow(const Case& c) {
  if (isa_used() == Isa::scalar) return;
  std::vector<double> points = {0, INFINITY, -INFINITY};
  for (double x = 0.5; x < 1000; x *= 1.003) points.push_back(x), points.push_back(-x);
  const int64_t n = static_cast<int64_t>(points.size());
  Buffer<S> x(n), y(n), g(n), grad(n);
  for (int64_t i = 0; i < n; ++i) x[i] = input_of<S>(points[static_cast<size_t>(i)]), g[i] = input_of<S>(1);
  const auto expect = [&](bool underflow, const char* what) {
    if (underflow) fail(std::string(c.name) + " " + dtype_name(kDType<S>) + what, n, 0, 0, 1, 0);
  };
  const ActivationForward forward{kDType<S>, c.activation, 1, n, n};
  expect(underflows([&] { run_call(forward, {x.get(), y.get()}); }), " underflows");
  const bool from_output = saved_by_default(c.activation) == Saved::output;
  if (saved_by_default(c.activation) == Saved::nothing || c.activation.kind == ActivationKind::softsign) return;
  const ActivationBackward backward{kDType<S>, c.activation, from_output ? Saved::output : Saved::input, 1, n, n, n};
  expect(underflows([&] { run_call(backward, {g.get(), from_output ? y.get() : x.get(), grad.get()}); }),
         "'s derivative underflows");
}

template <class S>
void check_values(const Case& c, Buffer<S>& x, int64_t stride, int64_t cols, Buffer<S>& y, const char* what) {
  for (int64_t i = 0; i < y.n; ++i) {
    const double v = value_of(x[i / cols * stride + i % cols]), got = value_of(y[i]);
    const Real wanted = std::isnan(v) ? NAN : reference_value(c.activation, v);
    bool good;
    if (std::isnan(wanted))
      good = std::isnan(got);
    else if (std::fabs(wanted) >= kFormat<S>.largest)
      good = got == static_cast<double>(wanted) || std::fabs(got) >= kFormat<S>.largest;
    else
      good = std::fabs(got - wanted) <= forward_bound<S>(c.activation.kind) * spacing<S>(wanted) ||
             (got == 0 && may_underflow<S>(c.activation.kind, v, wanted));
    if (!good)
      fail(std::string(c.name) + " " + dtype_name(kDType<S>) + " " + what, y.n, i, v, got, static_cast<double>(wanted));
  }
}

// Whether the mask bit is set, with PyTorch's decision on NaN.
bool reference_inside(const Activation& f, double x) {
  switch (f.kind) {
    case ActivationKind::leaky_relu:
      return x > 0;
    case ActivationKind::hardsigmoid:
      return x > -3 && x < 3;
    default:
      return std::isnan(x) || reference_slope(f, x) != 0;
  }
}

template <class S>
void check_case(const Case& c, int64_t rows, int64_t cols, int64_t gap) {
  const DType dtype = kDType<S>;
  const int64_t n = rows * cols, stride = cols + gap;
  const int64_t x_size = rows == 0 || cols == 0 ? 0 : (rows - 1) * stride + cols;
  const std::string name = std::string(c.name) + " " + dtype_name(dtype);
  Buffer<S> x(x_size), y(n), again(n);
  fill(x, static_cast<unsigned>(n + 1), true);
  const ActivationForward forward{dtype, c.activation, rows, cols, stride};
  run_call(forward, {x.get(), y.get()});
  check_values(c, x, stride, cols, y, "forward");
  for (int threads = 2; threads <= 3; ++threads) {
    run_call(forward, {x.get(), again.get()}, team_of(threads));
    if (!again.same(y)) fail(name + " threads", n, threads, 0, 0, 0);
  }
  if (gap == 0) {
    std::memcpy(again.get(), x.get(), static_cast<size_t>(n) * sizeof(S));
    run_call(forward, {again.get(), again.get()});
    if (!again.same(y)) fail(name + " in place", n, 0, 0, 0, 0);
  }

  const Saved by_default = saved_by_default(c.activation);
  const int64_t mask_bytes = rows * mask_row_bytes(cols);
  Buffer<uint8_t> mask(mask_bytes);
  if (by_default == Saved::mask) {
    for (int threads = 1; threads <= 2; ++threads) {
      std::memset(mask.get(), 0xaa, static_cast<size_t>(mask_bytes));
      run_call(ActivationForward{dtype, c.activation, rows, cols, stride, true}, {x.get(), again.get(), mask.get()},
               team_of(threads));
      if (!again.same(y)) fail(name + " with mask", n, threads, 0, 0, 0);
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t j = 0; j < mask_row_bytes(cols) * 8; ++j) {
          const bool bit = mask[r * mask_row_bytes(cols) + j / 8] >> (j % 8) & 1;
          const double v = j < cols ? value_of(x[r * stride + j]) : 0;
          if (bit != (j < cols && reference_inside(c.activation, v)))
            fail(name + " mask", n, r * cols + j, v, bit, !bit);
        }
    }
  }

  // Gradients: from every saved kind that is allowed.
  Buffer<S> g(n), dense_x(n), grad(n);
  fill(g, static_cast<unsigned>(n + 2), false);
  for (int64_t i = 0; i < n; ++i) dense_x[i] = x[i / cols * stride + i % cols];
  for (Saved saved : {Saved::nothing, Saved::mask, Saved::output, Saved::input}) {
    const bool only_y = by_default == Saved::output;
    const bool possible = saved == by_default || (saved == Saved::output && can_save_output(c.activation)) ||
                          (saved == Saved::input && !only_y && by_default != Saved::nothing);
    if (!possible) continue;
    const void* kept = saved == Saved::mask     ? static_cast<void*>(mask.get())
                       : saved == Saved::output ? static_cast<void*>(y.get())
                       : saved == Saved::input  ? static_cast<void*>(dense_x.get())
                                                : nullptr;
    const ActivationBackward backward{dtype, c.activation, saved, rows, cols, cols, cols};
    run_call(backward, {g.get(), kept, grad.get()});
    run_call(backward, {g.get(), kept, again.get()}, team_of(2));
    if (!again.same(grad)) fail(name + " backward threads", n, static_cast<int>(saved), 0, 0, 0);
    std::memcpy(again.get(), g.get(), static_cast<size_t>(n) * sizeof(S));
    run_call(backward, {again.get(), kept, again.get()});
    if (!again.same(grad)) fail(name + " backward in place", n, static_cast<int>(saved), 0, 0, 0);
    for (int64_t i = 0; i < n; ++i) {
      const double v = value_of(dense_x[i]), got = value_of(grad[i]), up = value_of(g[i]);
      if (std::isnan(v)) {  // a piecewise linear kind passes the gradient or not; the others give NaN
        const bool inside = reference_inside(c.activation, v);
        if (by_default == Saved::mask && c.activation.kind != ActivationKind::leaky_relu && got != (inside ? up : 0))
          fail(name + " gradient at NaN", n, i, v, got, inside ? up : 0);
        continue;
      }
      const Real slope = reference_slope(c.activation, v), wanted = up * slope;
      // Slopes are sums of terms below about 1 that cancel somewhere; y saved in S brings its own rounding.
      const Real eps = std::ldexp(Real{1}, -(sizeof(S) == 2 ? 24 : kFormat<S>.precision));
      Real bound =
          8 * eps * std::fabs(up) * (std::fabs(slope) + 0.5L) + (sizeof(S) == 2 ? 0.55L : 0.51L) * spacing<S>(wanted);
      if (saved == Saved::output) bound += 4 * std::ldexp(std::fabs(Real{up}), -kFormat<S>.precision);
      if (!(std::fabs(got - wanted) <= bound))
        fail(name + " gradient from " + std::to_string(static_cast<int>(saved)), n, i, v, got,
             static_cast<double>(wanted));
    }
  }
}

// Rows that are the same, that overlap, that have gaps, and that go backwards: the bits of dense rows.
template <class S>
void check_strides(const Case& c) {
  constexpr int64_t rows = 3, cols = 37;
  const DType dtype = kDType<S>;
  const bool from_input =
      saved_by_default(c.activation) != Saved::output && c.activation.kind != ActivationKind::identity;
  for (const int64_t stride : {int64_t{0}, int64_t{1}, cols + 5, -cols}) {
    const std::string name = std::string(c.name) + " " + dtype_name(dtype) + " stride " + std::to_string(stride);
    const int64_t reach = (rows - 1) * std::abs(stride), first = stride < 0 ? reach : 0;
    Buffer<S> x(reach + cols), g(reach + cols), dense_x(rows * cols), dense_g(rows * cols);
    fill(x, 1, true);
    fill(g, 2, false);
    for (int64_t i = 0; i < rows * cols; ++i) {
      dense_x[i] = x[first + i / cols * stride + i % cols];
      dense_g[i] = g[first + i / cols * stride + i % cols];
    }
    Buffer<S> y(rows * cols), dense_y(rows * cols), grad(rows * cols), dense_grad(rows * cols);
    run_call(ActivationForward{dtype, c.activation, rows, cols, stride}, {x.get() + first, y.get()});
    run_call(ActivationForward{dtype, c.activation, rows, cols, cols}, {dense_x.get(), dense_y.get()});
    if (!y.same(dense_y)) fail(name, rows * cols, 0, 0, 0, 0);
    const Saved saved = from_input ? Saved::input : saved_by_default(c.activation);
    const void* const kept = from_input ? x.get() + first : dense_y.get();
    const void* const dense_kept = from_input ? dense_x.get() : dense_y.get();
    run_call(ActivationBackward{dtype, c.activation, saved, rows, cols, stride, from_input ? stride : cols},
             {g.get() + first, kept, grad.get()});
    run_call(ActivationBackward{dtype, c.activation, saved, rows, cols, cols, cols},
             {dense_g.get(), dense_kept, dense_grad.get()});
    if (!grad.same(dense_grad)) fail(name + " backward", rows * cols, 0, 0, 0, 0);
  }
}

template <class S>
void check_prelu(int64_t outer, int64_t channels, int64_t inner, int64_t w_stride) {
  const DType dtype = kDType<S>;
  const int64_t n = outer * channels * inner;
  const std::string name = std::string("prelu ") + dtype_name(dtype) + " " + std::to_string(outer) + "x" +
                           std::to_string(channels) + "x" + std::to_string(inner);
  Buffer<S> x(n), g(n), y(n), grad_x(n), again(n), grad_w(channels), grad_w_again(channels);
  Buffer<S> w(channels == 0 ? 0 : (channels - 1) * w_stride + 1);
  fill(x, 5, false);
  fill(g, 6, false);
  fill(w, 7, false);
  const PreluForward forward{dtype, outer, channels, inner, w_stride};
  run_call(forward, {x.get(), w.get(), y.get()});
  run_call(forward, {x.get(), w.get(), again.get()}, team_of(2));
  if (!again.same(y)) fail(name + " threads", n, 0, 0, 0, 0);

  const auto backward = [&](S* to_x, S* to_w, int threads) {
    const PreluBackward call{dtype, outer, channels, inner, w_stride, to_x != nullptr, to_w != nullptr};
    run_call(call, {g.get(), x.get(), w.get(), to_x, to_w}, team_of(threads));
  };
  backward(grad_x.get(), grad_w.get(), 1);
  backward(again.get(), grad_w_again.get(), 3);
  if (!again.same(grad_x) || !grad_w_again.same(grad_w)) fail(name + " backward threads", n, 0, 0, 0, 0);
  backward(again.get(), nullptr, 1);
  if (!again.same(grad_x)) fail(name + " grad_x alone", n, 0, 0, 0, 0);
  backward(nullptr, grad_w_again.get(), 1);
  if (!grad_w_again.same(grad_w)) fail(name + " grad_w alone", n, 0, 0, 0, 0);

  std::vector<Real> sums(static_cast<size_t>(channels)), sizes(static_cast<size_t>(channels));
  for (int64_t i = 0; i < n; ++i) {
    const int64_t channel = i / inner % channels;
    const Real v = value_of(x[i]), weight = value_of(w[channel * w_stride]), up = value_of(g[i]);
    const Real wanted = v > 0 ? v : weight * v, wanted_grad = v > 0 ? up : weight * up;
    if (!(std::fabs(value_of(y[i]) - wanted) <= 0.51L * spacing<S>(wanted)))
      fail(name, n, i, static_cast<double>(v), value_of(y[i]), static_cast<double>(wanted));
    if (!(std::fabs(value_of(grad_x[i]) - wanted_grad) <= 0.51L * spacing<S>(wanted_grad)))
      fail(name + " grad_x", n, i, static_cast<double>(v), value_of(grad_x[i]), static_cast<double>(wanted_grad));
    if (v <= 0) {
      sums[static_cast<size_t>(channel)] += up * v;
      sizes[static_cast<size_t>(channel)] += std::fabs(up * v);
    }
  }
  for (int64_t i = 0; i < channels; ++i) {
    const Real wanted = sums[static_cast<size_t>(i)];
    const Real eps = std::ldexp(Real{1}, -(sizeof(S) == 2 ? 24 : kFormat<S>.precision));
    const Real bound = 0.51L * spacing<S>(wanted) + 64 * eps * sizes[static_cast<size_t>(i)];
    if (!(std::fabs(value_of(grad_w[i]) - wanted) <= bound))
      fail(name + " grad_w", n, i, 0, value_of(grad_w[i]), static_cast<double>(wanted));
  }
}

template <class S>
void check_glu(int64_t outer, int64_t inner) {
  const DType dtype = kDType<S>;
  const int64_t n = outer * inner;
  const std::string name = std::string("glu ") + dtype_name(dtype);
  Buffer<S> x(2 * n), g(n), y(n), grad(2 * n), again(2 * n);
  fill(x, 8, false);
  fill(g, 9, false);
  run_call(GluForward{dtype, outer, inner}, {x.get(), y.get()}, team_of(2));
  run_call(GluBackward{dtype, outer, inner}, {g.get(), x.get(), grad.get()});
  run_call(GluBackward{dtype, outer, inner}, {g.get(), x.get(), again.get()}, team_of(2));
  if (!again.same(grad)) fail(name + " threads", n, 0, 0, 0, 0);
  for (int64_t i = 0; i < n; ++i) {
    const int64_t at = i / inner * 2 * inner + i % inner;
    const Real a = value_of(x[at]), b = value_of(x[at + inner]), up = value_of(g[i]);
    const Real wanted[] = {a * sigmoid(b), up * sigmoid(b), up * a * sigmoid(b) * sigmoid(-b)};
    const double got[] = {value_of(y[i]), value_of(grad[at]), value_of(grad[at + inner])};
    for (int k = 0; k < 3; ++k) {
      const Real bound = (sizeof(S) == 2 ? 0.55L : 4.5L) * spacing<S>(wanted[k]) +
                         (k == 2 ? std::ldexp(std::fabs(up * a), sizeof(S) == 8 ? -52 : -23) : 0);
      if (!(std::fabs(got[k] - wanted[k]) <= bound))
        fail(name + " " + std::to_string(k), n, i, static_cast<double>(b), got[k], static_cast<double>(wanted[k]));
    }
  }
}

template <class S>
void check_dtype() {
  std::vector<int64_t> sizes;
  for (int64_t n = 0; n <= 35; ++n) sizes.push_back(n);
  for (int64_t n : {63, 64, 65, 127, 129, 1000, 8191, 8193, 70001}) sizes.push_back(n);
  for (const Case& c : kCases) {
    for (int64_t n : sizes) check_case<S>(c, 1, n, 0);
    for (int64_t cols : {1, 7, 8, 15, 33, 64, 130}) {
      check_case<S>(c, 5, cols, 0);
      check_case<S>(c, 5, cols, 3);
    }
    check_case<S>(c, 3, 20001, 5);
    check_case<S>(c, 0, 4, 0);
    check_strides<S>(c);
    if constexpr (!std::is_same_v<S, f16_t>) check_underflow<S>(c);  // its own denormals are as fast
  }
  for (int64_t inner : {1, 2, 9, 33, 300}) {
    check_prelu<S>(3, 7, inner, 1);
    check_prelu<S>(2, 1, inner, 1);
  }
  check_prelu<S>(200, 300, 1, 2);
  check_prelu<S>(4, 3, 20000, 1);
  check_prelu<S>(1, 1, 50001, 1);
  check_prelu<S>(0, 3, 4, 1);
  for (int64_t inner : {0, 1, 5, 16, 17, 33, 9001}) check_glu<S>(3, inner);
}

// Every 16-bit value through load and store: the identity must return it, and doubling NaN, infinities and denormals
// with it.
template <class S>
void check_conversion() {
  Buffer<S> x(65536), y(65536);
  for (int i = 0; i < 65536; ++i) x[i].bits = static_cast<uint16_t>(i);
  run_call(ActivationForward{kDType<S>, {ActivationKind::identity}, 1, 65536, 65536}, {x.get(), y.get()});
  for (int i = 0; i < 65536; ++i) {
    const double v = value_of(x[i]), got = value_of(y[i]);
    if (std::isnan(v) ? !std::isnan(got) : y[i].bits != x[i].bits)
      fail(std::string("conversion ") + dtype_name(kDType<S>), 65536, i, v, got, v);
  }
}

}  // namespace

int main(int argc, char** argv) {
  return run_tiers(argc, argv, []<class S>(bool) {
    if constexpr (sizeof(S) == 2) check_conversion<S>();
    check_dtype<S>();
  });
}
