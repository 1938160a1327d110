// Linear layers with weights of 8 and 4 bits and float8, on every tier, against a plain loop in float64. Sizes straddle
// blocks of words, groups and what is computed together; every buffer is exactly as large as the contract says and lies
// against a page that must not be touched. Teams of 1 to 3 threads must give the same bits.
#include <algorithm>
#include <cmath>
#include <vector>

#include "products.h"
#include "random.h"

namespace {

struct Case {
  WeightFormat format;
  int64_t m, n, k, group;
  bool offset = true, bias = true, integers = false;
  ActivationKind kind = ActivationKind::identity;
  int64_t x_gap = 0, w_gap = 0, y_gap = 0;  // between rows; -1: all rows are the first
};

void fail(const Case& c, DType dtype, const char* what, int64_t i, int64_t j, double got, double wanted) {
  if (++failures > 20) return;
  std::printf(
      "FAIL %s dtype %d %s[%lld, %lld] = %.9g, wanted %.9g (format %d m %lld n %lld k %lld group %lld, activation "
      "%d)\n",
      isa_name(isa_used()), static_cast<int>(dtype), what, static_cast<long long>(i), static_cast<long long>(j), got,
      wanted, static_cast<int>(c.format), static_cast<long long>(c.m), static_cast<long long>(c.n),
      static_cast<long long>(c.k), static_cast<long long>(c.group), static_cast<int>(c.kind));
}

// The e4m3 number of a byte.
double float8(int byte) {
  const int exponent = byte >> 3 & 15, mantissa = byte & 7;
  const double magnitude = (byte & 127) == 127 ? NAN
                           : exponent == 0     ? mantissa * 0x1p-9
                                               : (8 + mantissa) * std::ldexp(1.0, exponent - 10);
  return (byte & 128) != 0 ? -magnitude : magnitude;
}

int64_t row_stride(int64_t length, int64_t gap) { return gap < 0 ? 0 : length + gap; }
int64_t elements(int64_t rows, int64_t length, int64_t stride) {
  return rows > 0 && length > 0 ? (rows - 1) * stride + length : 0;
}

template <class T>
void test(Case c) {
  if (c.format == WeightFormat::float8) {
    c.group = std::max(c.group, c.k);
    c.offset = false;
  }
  const bool halves = c.format == WeightFormat::uint4;
  std::normal_distribution<double> normal;
  const auto draw = [&] { return c.integers ? static_cast<double>(between(-3, 3)) : normal(generator); };
  const int64_t bytes = halves ? (c.k + 1) / 2 : c.k, groups = c.k > 0 ? (c.k + c.group - 1) / c.group : 0;
  const int64_t xs = row_stride(c.k, c.x_gap), ws = row_stride(bytes, c.w_gap), ys = c.n + c.y_gap;
  Guarded<T> x(elements(c.m, c.k, xs), coin()), bias(c.bias ? c.n : 0, coin());
  const Guarded<int8_t> w(elements(c.n, bytes, ws), coin());
  const Guarded<float> scale(c.n * groups, coin()), offset(c.offset ? c.n * groups : 0, coin());
  x.fill(draw);
  bias.fill(draw);
  for (int64_t i = 0; i < elements(c.n, bytes, ws); ++i) {
    do w[i] = static_cast<int8_t>(between(-128, 127));
    while (c.format == WeightFormat::float8 && (w[i] & 127) == 127);
    // Of float8 numbers, integers are few.
    if (c.format == WeightFormat::float8 && c.integers)
      w[i] = static_cast<int8_t>((w[i] & 128) | (w[i] % 4 == 0 ? 0 : 0x38 + 8 * (w[i] & 1)));
  }
  for (int64_t i = 0; i < c.n * groups; ++i) {
    scale[i] = c.integers ? 1.0f : 0.01f * static_cast<float>(between(1, 9));
    if (c.offset)
      offset[i] = c.integers ? static_cast<float>(between(-8, 0)) : static_cast<float>(0.1 * normal(generator));
  }
  const auto weight = [&](int64_t j, int64_t p) {
    const int byte = w[j * ws + (halves ? p / 2 : p)];
    const double level = c.format == WeightFormat::int8     ? byte
                         : c.format == WeightFormat::float8 ? float8(byte)
                         : p % 2 == 0                       ? byte & 15
                                                            : byte >> 4 & 15;
    const int64_t g = j * groups + p / c.group;
    return static_cast<double>(scale[g]) * level + (c.offset ? static_cast<double>(offset[g]) : 0);
  };

  const int64_t size = elements(c.m, c.n, ys);
  const WeightOnlyForward call{.dtype = kDType<T>,
                               .format = c.format,
                               .m = c.m,
                               .n = c.n,
                               .k = c.k,
                               .group = c.group,
                               .x_row_stride = xs,
                               .w_row_stride = ws,
                               .y_row_stride = ys,
                               .with_offset = c.offset,
                               .with_bias = c.bias,
                               .activation = {c.kind}};
  const T poison = narrow<T>(777);
  std::vector<T> first;
  for (const Team& team : kTeams) {
    const Guarded<T> y(size, coin());
    for (int64_t i = 0; i < size; ++i) y[i] = poison;
    run_call(call,
             {x.data(), w.data(), scale.data(), c.offset ? offset.data() : nullptr, c.bias ? bias.data() : nullptr,
              y.data()},
             team);
    if (first.empty()) first = y.values();
    if (!same_bits(first, y.values())) fail(c, kDType<T>, "team", team.threads, 0, 0, 0);
  }
  for (int64_t i = 0; i < c.m; ++i)
    for (int64_t j = 0; j < (i + 1 < c.m ? ys : c.n); ++j) {
      const T got = first[static_cast<size_t>(i * ys + j)];
      if (j >= c.n) {
        if (widen(got) != widen(poison)) fail(c, kDType<T>, "gap of y", i, j, widen(got), widen(poison));
        continue;
      }
      double sum = c.bias ? bias(j) : 0, magnitude = std::fabs(sum);
      for (int64_t p = 0; p < c.k; ++p) {
        const double value = widen(x[i * xs + p]), q = weight(j, p);
        sum += value * q;
        // scale * level and offset cancel.
        const int64_t g = j * groups + p / c.group;
        magnitude += std::fabs(value) * (std::fabs(q) + 2 * (c.offset ? std::fabs(offset[g]) : 0));
      }
      const bool linear = c.kind == ActivationKind::identity || c.kind == ActivationKind::relu;
      const double wanted = activate(c.kind, sum);
      if (!close(got, wanted, 1.2 * magnitude, c.k, c.integers && linear, linear ? 0 : 8 * 0x1p-24))
        fail(c, kDType<T>, "y", i, j, widen(got), wanted);
    }
}

}  // namespace

int main(int argc, char** argv) {
  return run_tiers(argc, argv, []<class T>(bool quick) {
    if constexpr (kDType<T> != DType::f64) {
      for (const WeightFormat format : {WeightFormat::int8, WeightFormat::uint4, WeightFormat::float8}) {
        for (const int64_t k : {1, 15, 16, 17, 33, 511, 513, 1030}) test<T>({format, 25, 37, k, 32});
        for (const int64_t k : {0, 1, 2, 15, 17, 31, 33, 63, 65, 127, 128, 129, 255, 1000})
          test<T>({format, 3, 5, k, 32});
        for (const int64_t group : {16, 32, 64, 128, 256, 1024, 3000}) test<T>({format, 2, 3, 700, group});
        for (const int64_t m : {0, 1, 2, 3, 4, 5, 7, 8, 9, 17, 23, 24, 37}) test<T>({format, m, 6, 200, 64});
        for (const int64_t n : {0, 1, 2, 31, 32, 33, 65}) test<T>({format, 2, n, 100, 128});
        for (const bool offset : {false, true})
          for (const bool bias : {false, true})
            for (const ActivationKind kind : {ActivationKind::relu, ActivationKind::silu})
              test<T>({format, 4, 33, 150, 16, offset, bias, false, kind});
        for (const int64_t m : {5, 25})
          for (const int64_t gap : {-1, 0, 3})
            test<T>({format, m, 9, 77, 32, true, true, true, ActivationKind::identity, gap, gap, 2});
        test<T>({format, 30, 150, 600, 64, true, true, false, ActivationKind::silu, 0, 0, 3});
        test<T>({format, 9, 70, 4100, 128});  // more of x than stays in L1
        for (int i = 0; i < (quick ? 5 : 30); ++i)
          test<T>({format, between(1, 40), between(1, 80), between(1, 900), int64_t{16} << between(0, 5), coin(),
                   coin(), coin(), coin() ? ActivationKind::relu : ActivationKind::identity, between(-1, 2),
                   between(-1, 2), between(0, 2)});
      }
      if constexpr (kDType<T> == DType::f32)
        if (!quick) test<T>({WeightFormat::uint4, 1200, 3, 1800, 128});  // more rows than are put in order at a time
    }
  });
}
