// Linear layers with int8 weights, on every tier: the bits that the contract describes, whose float32 arithmetic a
// plain loop repeats here. Sizes straddle the tiles, the chunks of k and the block of k; every buffer is exactly as
// large as the contract says and lies against a page that must not be touched.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "products.h"
#include "random.h"

namespace {

enum Rows { tight, padded, repeated, backward };
enum Values { normal, integers, extreme, with_nan, with_infinity, zeros, denormal, positive };

struct Case {
  int64_t m, n, k;
  ActivationKind kind = ActivationKind::identity;
  Rows x = tight, w = tight;
  int64_t y_gap = 0;
  bool bias = true;
  Values values = normal;
};

int64_t stride(Rows rows, int64_t k) {
  return rows == padded ? k + 5 : rows == repeated ? 0 : rows == backward ? -k : k;
}

// `rows` rows of k elements whose first is at `first`.
template <class T>
struct Matrix {
  int64_t row_stride;
  Guarded<T> buffer;
  const T* first;

  Matrix(int64_t rows, int64_t k, Rows how)
      : row_stride(stride(how, k)),
        buffer(rows > 0 && k > 0 ? (rows - 1) * std::abs(row_stride) + k : 0, coin()),
        first(buffer.data() + (row_stride < 0 && rows > 0 ? (1 - rows) * row_stride : 0)) {}
  T at(int64_t i, int64_t p) const { return first[i * row_stride + p]; }
};

template <class T>
void fill(const Guarded<T>& buffer, int64_t size, Values values) {
  std::normal_distribution<double> random;
  for (int64_t i = 0; i < size; ++i) {
    double x = random(generator);
    if (values == integers) x = static_cast<double>(between(-127, 128));
    if (values == extreme) x *= kDType<T> == DType::f16 ? 2e4 : 1e38;
    if (values == zeros) x = 0;
    if (values == denormal) x *= kDType<T> == DType::f16 ? 1e-6 : 1e-40;
    if (values == positive) x = std::fabs(x);
    if (values == with_nan && between(0, 30) == 0) x = NAN;
    if (values == with_infinity && between(0, 30) == 0) x = coin() ? INFINITY : -INFINITY;
    buffer[i] = narrow<T>(x);
  }
}

void fail(const Case& c, DType dtype, const char* what, int64_t i, int64_t j, double got, double wanted) {
  if (++failures > 20) return;
  std::printf(
      "FAIL %s dtype %d %s[%lld, %lld] = %.9g, wanted %.9g (m %lld n %lld k %lld, activation %d, rows %d %d, %d)\n",
      isa_name(isa_used()), static_cast<int>(dtype), what, static_cast<long long>(i), static_cast<long long>(j), got,
      wanted, static_cast<long long>(c.m), static_cast<long long>(c.n), static_cast<long long>(c.k),
      static_cast<int>(c.kind), c.x, c.w, c.values);
}

// The numbers of the contract.
struct Quantized {
  float scale;
  int zero;
  std::vector<int> levels;
};
template <class T>
Quantized quantize(const Matrix<T>& x, int64_t i, int64_t k) {
  float low = 0, high = 0;
  bool finite = true;
  for (int64_t p = 0; p < k; ++p) {
    const float value = static_cast<float>(widen(x.at(i, p)));
    finite = finite && std::isfinite(value);
    low = std::fmin(low, value);
    high = std::fmax(high, value);
  }
  Quantized result{NAN, 0, std::vector<int>(static_cast<size_t>(k))};
  if (!finite) return result;
  result.scale = std::fmax(high / 255 - low / 255, std::numeric_limits<float>::min());
  const float inverse = 1 / result.scale;
  result.zero = static_cast<int>(std::nearbyint(-low * inverse));
  for (int64_t p = 0; p < k; ++p) {
    const float level =
        std::nearbyint(static_cast<float>(widen(x.at(i, p))) * inverse) + static_cast<float>(result.zero);
    result.levels[static_cast<size_t>(p)] = static_cast<int>(std::fmin(std::fmax(level, 0.0f), 255.0f));
  }
  return result;
}

template <class T>
void test(const Case& c) {
  const Matrix<T> x(c.m, c.k, c.x);
  fill(x.buffer, static_cast<int64_t>(x.buffer.values().size()), c.values);
  const Matrix<int8_t> w(c.n, c.k, c.w);
  const size_t weights = w.buffer.values().size();
  for (size_t i = 0; i < weights; ++i) {
    const int64_t value = c.values == extreme ? (coin() ? -128 : 127) : between(-128, 127);
    w.buffer.data()[i] = static_cast<int8_t>(value);
  }
  const Guarded<float> w_scale(c.n, coin());
  for (int64_t j = 0; j < c.n; ++j)
    w_scale[j] = c.values == integers ? 1.0f : 0.001f * static_cast<float>(between(1, 99));
  const Guarded<T> bias(c.bias ? c.n : 0, coin());
  fill(bias, c.bias ? c.n : 0, c.values == integers ? integers : normal);

  const int64_t rs = c.n + c.y_gap, size = c.m > 0 && c.n > 0 ? (c.m - 1) * rs + c.n : 0;
  LinearInt8Forward call{.dtype = kDType<T>,
                         .m = c.m,
                         .n = c.n,
                         .k = c.k,
                         .x_row_stride = x.row_stride,
                         .w_row_stride = w.row_stride,
                         .y_row_stride = rs,
                         .with_bias = c.bias,
                         .activation = {c.kind}};
  const T poison = narrow<T>(777);
  std::vector<T> first;
  for (const Team& team : kTeams)
    for (const bool packed : {false, true}) {
      const Guarded<T> y(size, coin());
      for (int64_t i = 0; i < size; ++i) y[i] = poison;
      const LinearInt8Forward::Pointers pointers{x.first, w.first, w_scale.data(), c.bias ? bias.data() : nullptr,
                                                 y.data()};
      if (packed)
        run_packed(call, pointers, team, coin());
      else
        run_call(call, pointers, team);
      if (first.empty()) first = y.values();
      if (!same_bits(first, y.values())) fail(c, kDType<T>, packed ? "packed" : "team", team.threads, 0, 0, 0);
    }

  for (int64_t i = 0; i < c.m; ++i) {
    const Quantized row = quantize(x, i, c.k);
    for (int64_t j = 0; j < (i + 1 < c.m ? rs : c.n); ++j) {
      const T got = first[static_cast<size_t>(i * rs + j)];
      if (j >= c.n) {
        if (widen(got) != widen(poison)) fail(c, kDType<T>, "gap of y", i, j, widen(got), widen(poison));
        continue;
      }
      int64_t sum = 0;
      for (int64_t p = 0; p < c.k; ++p) sum += (row.levels[static_cast<size_t>(p)] - row.zero) * int64_t{w.at(j, p)};
      float value = static_cast<float>(sum) * (row.scale * w_scale[j]);
      if (c.bias) value = value + static_cast<float>(widen(bias[j]));
      // silu of -infinity is 0; by the formula it would be NaN.
      const double wanted =
          std::isinf(value) && value < 0 && c.kind == ActivationKind::silu ? 0 : activate(c.kind, value);
      const bool exact = c.kind == ActivationKind::identity || c.kind == ActivationKind::relu;
      const double rounded = widen(narrow<T>(c.kind == ActivationKind::relu && std::isnan(value) ? NAN : wanted));
      const double slack = exact ? 0 : 8 * unit_roundoff(kDType<T>) * std::fabs(wanted) + 1e-7;
      const double difference = std::fabs(widen(got) - rounded);
      if (widen(got) == rounded || (std::isnan(widen(got)) && std::isnan(value)) || difference <= slack) continue;
      fail(c, kDType<T>, "y", i, j, widen(got), rounded);
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  return run_tiers(
      argc, argv,
      []<class T>(bool quick) {
        for (const Values values : {normal, integers, extreme, with_nan, with_infinity, zeros, denormal, positive})
          test<T>({7, 35, 70, ActivationKind::identity, tight, tight, 0, true, values});
        for (const int64_t k : {0, 1, 3, 4, 63, 64, 65, 1023, 1024, 1025, 2300}) test<T>({5, 9, k});
        for (const int64_t m : {0, 1, 2, 3, 5, 11, 12, 13, 16, 17, 31, 32, 33, 65}) test<T>({m, 40, 100});
        for (const int64_t n : {0, 1, 7, 8, 15, 16, 17, 31, 32, 33, 63, 65}) test<T>({9, n, 100});
        for (const ActivationKind kind : {ActivationKind::relu, ActivationKind::tanh, ActivationKind::silu})
          for (const bool bias : {false, true}) test<T>({6, 33, 50, kind, tight, tight, 0, bias});
        for (const Rows x : {tight, padded, repeated, backward})
          for (const Rows w : {tight, padded, repeated, backward})
            test<T>({between(1, 70), between(1, 70), between(1, 200), ActivationKind::identity, x, w, between(0, 3)});
        // Sums that wait for the next block of k in several tiles, and blocks for several threads.
        test<T>({70, 300, 1100, ActivationKind::relu});
        test<T>({140, 520, 260});
        for (int i = 0; i < (quick ? 5 : 30); ++i)
          test<T>({between(1, 150), between(1, 150), between(1, 1500),
                   coin() ? ActivationKind::relu : ActivationKind::silu, static_cast<Rows>(between(0, 3)),
                   static_cast<Rows>(between(0, 3)), between(0, 2), coin(), static_cast<Values>(between(0, 7))});
        if constexpr (kDType<T> == DType::f32) {
          // The largest sums there are, and more rows than are packed at a time.
          test<T>({1, 3, kMostInt8Features, ActivationKind::identity, tight, tight, 0, true, extreme});
          if (!quick) test<T>({260, 2, kMostInt8Features});
        }
      },
      false, true);
}
