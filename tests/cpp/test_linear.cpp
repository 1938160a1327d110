// Linear, forward and backward, on every tier this machine has, against a plain loop in float64.
//
// Integer-valued data must match exactly; other data within a bound of the form c k eps sum |a b|. Every buffer is
// exactly as large as the contract says and lies against a page that must not be touched. Each case runs with teams of
// 1, 2 and 3 threads, and of 3 that get 2, and must give the same bits.
#include <array>
#include <cfloat>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <random>

#include "products.h"

namespace {

// ---------------------------------------------------------------------------------------------------------------
// operands

enum Layout {
  dense,
  transposed,
  padded_rows,
  every_other,
  zero_rows,
  zero_cols,
  zero_both,
  negative_rows,
  negative_cols,
  overlapping,
  layouts
};

// A rows x cols matrix in a buffer that starts and ends with its first and last element; what lies between is NaN.
template <class T>
struct Operand {
  int64_t rows = 0, cols = 0;
  std::unique_ptr<Exact<T>> buffer;
  void* data = nullptr;  // of element (0, 0)
  Strides strides;

  Operand(int64_t r, int64_t c, Layout layout) : rows(r), cols(c) {
    int64_t rs = cols, cs = 1;
    switch (layout) {
      case transposed:
        rs = 1, cs = rows;
        break;
      case padded_rows:
        rs = cols + 3;
        break;
      case every_other:
        rs = 2 * cols + 1, cs = 2;
        break;
      case zero_rows:
        rs = 0;
        break;
      case zero_cols:
        rs = 1, cs = 0;
        break;
      case zero_both:
        rs = 0, cs = 0;
        break;
      case negative_rows:
        rs = -cols;
        break;
      case negative_cols:
        rs = cols, cs = -1;
        break;
      case overlapping:
        rs = 1, cs = 2;
        break;
      default:
        break;
    }
    int64_t low = 0, high = 0;
    if (rows > 0 && cols > 0) {
      for (const int64_t reach : {(rows - 1) * rs, (cols - 1) * cs}) (reach < 0 ? low : high) += reach;
      high += 1;
    }
    buffer = std::make_unique<Exact<T>>(high - low);
    for (int64_t i = 0; i < high - low; ++i) (*buffer)[static_cast<size_t>(i)] = narrow<T>(NAN);
    data = buffer->get() - low;
    strides = {rs, cs};
  }

  T& at(int64_t i, int64_t j) const { return static_cast<T*>(data)[i * strides.row + j * strides.col]; }
  double operator()(int64_t i, int64_t j) const { return widen(at(i, j)); }

  template <class Draw>
  void fill(Draw&& draw) {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < cols; ++j) at(i, j) = narrow<T>(draw());
  }

  // All elements, row after row, for what reads them again and again.
  std::vector<double> values() const {
    std::vector<double> all;
    all.reserve(static_cast<size_t>(rows * cols));
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < cols; ++j) all.push_back((*this)(i, j));
    return all;
  }
};

// ------------------------------------------------------------------------------------------------------------------
// cases

struct Case {
  int64_t m, n, k;
  ActivationKind kind = ActivationKind::identity;
  Layout x = dense, w = dense, grad_y = dense, saved = dense;
  bool bias = true, z = false, integers = true;
  int64_t bias_stride = 1, y_gap = 0;
  unsigned outputs = 7;  // of backward: 1 grad_x, 2 grad_w, 4 grad_b
  Bf16Multiply multiply = Bf16Multiply::automatic;
};

void fail(const Case& c, DType dtype, const char* what, int64_t i, int64_t j, double got, double expected) {
  if (++failures > 20) return;
  std::printf(
      "%s dtype %d: %s[%lld, %lld] = %.9g, expected %.9g (m %lld n %lld k %lld, activation %d, layouts %d %d %d %d, "
      "bias %d stride %lld, z %d, integers %d, outputs %u, multiply %d)\n",
      isa_name(isa_used()), static_cast<int>(dtype), what, static_cast<long long>(i), static_cast<long long>(j), got,
      expected, static_cast<long long>(c.m), static_cast<long long>(c.n), static_cast<long long>(c.k),
      static_cast<int>(c.kind), c.x, c.w, c.grad_y, c.saved, c.bias, static_cast<long long>(c.bias_stride), c.z,
      c.integers, c.outputs, static_cast<int>(c.multiply));
}

template <class T>
void test_forward(const Case& c, const Operand<T>& x, const Operand<T>& w, const Operand<T>& bias) {
  const int64_t rs = c.n + c.y_gap;
  const size_t size = c.m > 0 && c.n > 0 ? static_cast<size_t>((c.m - 1) * rs + c.n) : 0;
  const T poison = narrow<T>(12345);
  const std::vector<double> x_values = x.values(), w_values = w.values();
  std::vector<T> first_y, first_z;
  const LinearForward call{.dtype = kDType<T>,
                           .m = c.m,
                           .n = c.n,
                           .k = c.k,
                           .x_strides = x.strides,
                           .w_strides = w.strides,
                           .y_row_stride = rs,
                           .with_bias = c.bias,
                           .bias_stride = bias.strides.col,
                           .activation = {c.kind},
                           .with_z = c.z};
  for (const Team& team : kTeams) {
    const Exact<T> y(static_cast<int64_t>(size)), z(c.z ? static_cast<int64_t>(size) : 0);
    const auto poisoned = [&] {
      for (size_t i = 0; i < size; ++i) {
        y[i] = poison;
        if (c.z) z[i] = poison;
      }
    };
    const LinearForward::Pointers pointers{x.data, w.data, c.bias ? bias.data : nullptr, y.get(),
                                           c.z ? z.get() : nullptr};
    poisoned();
    run_call(call, pointers, team, c.multiply);
    const std::vector<T> got_y(y.get(), y.get() + size), got_z(z.get(), z.get() + (c.z ? size : 0));
    if (&team != kTeams) {
      if (!same_bits(got_y, first_y) || !same_bits(got_z, first_z))
        fail(c, kDType<T>, "forward with another team", team.threads, 0, 0, 0);
      continue;
    }
    first_y = got_y;
    first_z = got_z;
    poisoned();
    run_packed(call, pointers, kTeams[c.n % 4], c.k % 2 == 0, c.multiply);  // one team a case is enough
    const std::vector<T> packed_y(y.get(), y.get() + size), packed_z(z.get(), z.get() + (c.z ? size : 0));
    // A dot product adds in another order than the tiles that take packed weights.
    const Target target{kTeams[c.n % 4].threads, c.multiply};
    LinearForward packed = call;
    packed.packed_w = true;
    const bool alike = std::strcmp(plan_of(packed, target).name.algorithm, plan_of(call, target).name.algorithm) == 0;
    if (alike && (!same_bits(packed_y, first_y) || !same_bits(packed_z, first_z)))
      fail(c, kDType<T>, "forward with packed weights", kTeams[c.n % 4].threads, 0, 0, 0);
    const auto check = [&](const std::vector<T>& ys, const std::vector<T>& zs, int64_t i, int64_t j, double sum,
                           double magnitude) {
      const size_t at = static_cast<size_t>(i * rs + j);
      const bool linear = c.kind == ActivationKind::identity || c.kind == ActivationKind::relu;
      const double y_slack = linear ? 0 : 8 * (kDType<T> == DType::f64 ? 0x1p-53 : 0x1p-24);
      if (c.z && !close(zs[at], sum, magnitude, c.k, c.integers, 0)) fail(c, kDType<T>, "z", i, j, widen(zs[at]), sum);
      const double y_expected = activate(c.kind, sum);
      if (!close(ys[at], y_expected, 1.2 * magnitude, c.k, c.integers && linear, y_slack))
        fail(c, kDType<T>, "y", i, j, widen(ys[at]), y_expected);
    };
    for (int64_t i = 0; i < c.m; ++i)
      for (int64_t j = 0; j < (i + 1 < c.m ? rs : c.n); ++j) {
        const size_t at = static_cast<size_t>(i * rs + j);
        if (j >= c.n) {
          for (const T value : {got_y[at], packed_y[at], c.z ? got_z[at] : poison, c.z ? packed_z[at] : poison})
            if (widen(value) != widen(poison)) fail(c, kDType<T>, "gap of y", i, j, widen(value), widen(poison));
          continue;
        }
        double sum = c.bias ? bias(0, j) : 0, magnitude = std::fabs(sum);
        const double *const row = x_values.data() + i * c.k, *const by = w_values.data() + j * c.k;
        for (int64_t p = 0; p < c.k; ++p) {
          const double product = row[p] * by[p];
          sum += product;
          magnitude += std::fabs(product);
        }
        check(got_y, got_z, i, j, sum, magnitude);
        if (!alike) check(packed_y, packed_z, i, j, sum, magnitude);
      }
  }
}

template <class T>
void test_backward(const Case& c, const Operand<T>& x, const Operand<T>& w, const Operand<T>& grad_y,
                   const Operand<T>& saved) {
  const size_t sizes[3] = {static_cast<size_t>(c.m * c.k), static_cast<size_t>(c.n * c.k), static_cast<size_t>(c.n)};
  const char* const names[3] = {"grad_x", "grad_w", "grad_b"};
  std::vector<T> first[3];
  // g, and what its rounding error is relative to: 1 - y^2 cancels, so that is grad_y itself.
  std::vector<double> g(static_cast<size_t>(c.m * c.n)), scale(g.size());
  for (int64_t i = 0; i < c.m; ++i)
    for (int64_t j = 0; j < c.n; ++j) {
      const size_t at = static_cast<size_t>(i * c.n + j);
      const double factor = c.kind == ActivationKind::identity ? 1 : derivative(c.kind, saved(i, j));
      g[at] = grad_y(i, j) * factor;
      scale[at] = std::fabs(grad_y(i, j)) * std::max(1.0, std::fabs(factor));
    }

  const std::vector<double> x_values = x.values(), w_values = w.values();
  const LinearBackward call{.dtype = kDType<T>,
                            .m = c.m,
                            .n = c.n,
                            .k = c.k,
                            .grad_y_strides = grad_y.strides,
                            .saved_strides = saved.strides,
                            .x_strides = x.strides,
                            .w_strides = w.strides,
                            .activation = {c.kind},
                            .with_grad_x = (c.outputs & 1) != 0,
                            .with_grad_w = (c.outputs & 2) != 0,
                            .with_grad_bias = (c.outputs & 4) != 0};
  for (const Team& team : kTeams) {
    // Stores that bypass the caches ask for the alignment of a tensor's memory; others end exactly at a page.
    const size_t alignment = (c.m + c.n + c.k) % 2 != 0 ? 64 : sizeof(T);
    std::unique_ptr<Exact<T>> out[3];
    T* to[3] = {};
    for (int o = 0; o < 3; ++o) {
      if ((c.outputs >> o & 1) == 0) continue;
      out[o] = std::make_unique<Exact<T>>(static_cast<int64_t>(sizes[o]), alignment);
      to[o] = out[o]->get();
      std::fill_n(to[o], sizes[o], narrow<T>(NAN));
    }
    run_call(call, {grad_y.data, saved.data, x.data, w.data, to[0], to[1], to[2]}, team, c.multiply);

    for (int o = 0; o < 3; ++o) {
      if (to[o] == nullptr) continue;
      const std::vector<T> got(to[o], to[o] + sizes[o]);
      if (&team != kTeams) {
        if (!same_bits(got, first[o])) fail(c, kDType<T>, names[o], team.threads, -1, 0, 0);
        continue;
      }
      first[o] = got;
      // 16-bit products may round g once more.
      const bool exact = c.integers && (c.kind == ActivationKind::identity || c.kind == ActivationKind::relu);
      const double slack =
          (c.kind == ActivationKind::identity ? 0 : 16 * (kDType<T> == DType::f64 ? 0x1p-53 : 0x1p-24)) +
          (kDType<T> == DType::bf16 && o < 2 ? 0x1p-8 : 0);
      const int64_t rows = o == 0 ? c.m : c.n, cols = o == 2 ? 1 : c.k, length = o == 0 ? c.n : c.m;
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < cols; ++j) {
          double sum = 0, magnitude = 0;
          const double* const by = o == 0 ? w_values.data() + j : x_values.data() + j;
          for (int64_t p = 0; p < length; ++p) {
            const size_t at = static_cast<size_t>(o == 0 ? i * c.n + p : p * c.n + i);
            const double b = o == 2 ? 1 : by[p * c.k];
            sum += g[at] * b;
            magnitude += scale[at] * std::fabs(b);
          }
          const T value = got[static_cast<size_t>(i * cols + j)];
          if (!close(value, sum, magnitude, length, exact, slack))
            fail(c, kDType<T>, names[o], i, j, widen(value), sum);
        }
    }
  }
}

template <class T>
void test(Case c, unsigned seed) {
  // What the tier of AMX would leave to avx512 is tested there.
  if (kDType<T> == DType::f32 && isa_used() == Isa::amx) c.multiply = Bf16Multiply::native;
  std::mt19937 random(seed);
  std::uniform_int_distribution<int> integer(-3, 3);
  std::normal_distribution<double> normal(0, 1);
  const auto draw = [&] { return c.integers ? integer(random) : normal(random); };
  Operand<T> x(c.m, c.k, c.x), w(c.n, c.k, c.w), grad_y(c.m, c.n, c.grad_y), saved(c.m, c.n, c.saved);
  Operand<T> bias(1, c.n,
                  c.bias_stride == 0   ? zero_both
                  : c.bias_stride == 2 ? every_other
                  : c.bias_stride < 0  ? negative_cols
                                       : dense);
  x.fill(draw);
  w.fill(draw);
  grad_y.fill(draw);
  saved.fill([&] { return c.kind == ActivationKind::tanh ? std::tanh(draw()) : draw(); });
  bias.fill(draw);
  test_forward(c, x, w, bias);
  if (c.outputs != 0) test_backward(c, x, w, grad_y, saved);
}

template <class T>
void test_dtype(bool quick) {
  unsigned seed = 1;
  // Every size from nothing to twice the largest tile (32 x 64) plus one, one dimension at a time.
  for (int64_t s = 0; s <= 65; ++s) {
    test<T>({s, 5, 7}, ++seed);
    test<T>({s, 33, 18}, ++seed);
    test<T>({3, s, 5}, ++seed);
    test<T>({13, s, 18}, ++seed);
    test<T>({5, 3, s}, ++seed);
    test<T>({14, 34, s}, ++seed);
  }
  // Several blocks in every dimension, few rows, few columns.
  const int64_t shapes[][3] = {{130, 70, 600}, {70, 300, 1100}, {300, 40, 90}, {1, 513, 1030}, {2, 70, 1300},
                               {4, 129, 260},  {33, 129, 700},  {500, 17, 33}, {17, 500, 33},  {600, 64, 64},
                               {260, 3, 300},  {1, 1, 5000},    {40, 3, 4300}, {9, 1100, 20},  {1100, 9, 20},
                               {2500, 7, 11},  {6, 31, 2100},   {64, 130, 65}};
  const ActivationKind kinds[] = {ActivationKind::identity, ActivationKind::relu, ActivationKind::tanh,
                                  ActivationKind::silu};
  for (const auto& [m, n, k] : shapes) {
    ++seed;
    Case c{m, n, k};
    c.kind = kinds[seed % 4];
    c.integers = seed % 3 != 0;
    c.z = seed % 5 == 0;
    test<T>(c, seed);
    c.kind = kinds[(seed + 1) % 4];
    c.x = seed % 2 == 0 ? transposed : padded_rows;
    c.w = seed % 3 == 0 ? transposed : padded_rows;
    c.grad_y = seed % 3 == 1 ? transposed : dense;
    test<T>(c, seed);
  }
  // A gradient large enough to be stored past the caches (16 MB), with and without whole tiles.
  if constexpr (sizeof(T) < 8) {
    Case c{2, sizeof(T) == 4 ? 2053 : 4101, 2064};
    c.outputs = 2;
    if (!quick && kDType<T> != DType::f16) test<T>(c, ++seed);
  }
  // Everything at random.
  std::mt19937 random(7);
  const auto below = [&](int n) { return static_cast<int>(random() % static_cast<unsigned>(n)); };
  const int rounds = quick ? 60 : 250;
  for (int i = 0; i < rounds; ++i) {
    Case c{1 + below(70), 1 + below(70), 1 + below(i % 10 == 0 ? 700 : 70)};
    c.kind = kinds[below(4)];
    c.x = static_cast<Layout>(below(layouts));
    c.w = static_cast<Layout>(below(layouts));
    c.grad_y = static_cast<Layout>(below(layouts));
    c.saved = static_cast<Layout>(below(layouts));
    c.bias = below(4) != 0;
    c.bias_stride = below(4) - 1;
    c.y_gap = below(3);
    c.z = below(3) == 0;
    c.integers = below(2) == 0;
    c.outputs = static_cast<unsigned>(below(8));
    c.multiply = static_cast<Bf16Multiply>(below(3));
    test<T>(c, ++seed);
  }
  // Blocks of C whose operands are packed by all threads, blocks of k that are added, more of them than a thread keeps
  // of B, rows that are packed in two runs.
  if (isa_used() == Isa::amx) {
    for (const auto& [m, n, k] : {std::array<int64_t, 3>{261, 290, 801},
                                  {257, 300, 4200},
                                  {257, 800, 770},
                                  {1100, 300, 300},
                                  {300, 33, 1100}}) {
      Case c{m, n, k};
      c.kind = kinds[++seed % 4];
      c.integers = seed % 2 == 0;
      c.z = seed % 3 == 0;
      c.x = seed % 2 == 0 ? transposed : padded_rows;
      if (!quick || m < 262) test<T>(c, seed);
    }
  }
  // NaN and infinities pass through, also where a tile has lanes to spare.
  for (const int64_t n : {1, 5, 31, 33}) {
    Operand<T> x(3, 40, dense), w(n, 40, dense), y(3, n, dense);
    x.fill([] { return 1; });
    w.fill([] { return 1; });
    x.at(1, 39) = narrow<T>(NAN);
    x.at(2, 0) = narrow<T>(INFINITY);
    const LinearForward call{.dtype = kDType<T>,
                             .m = 3,
                             .n = n,
                             .k = 40,
                             .x_strides = x.strides,
                             .w_strides = w.strides,
                             .y_row_stride = n,
                             .activation = {ActivationKind::relu}};
    run_call(call, {.x = x.data, .w = w.data, .y = y.data});
    for (int64_t j = 0; j < n; ++j)
      if (y(0, j) != 40 || y(1, j) == y(1, j) || y(2, j) != INFINITY)
        fail({3, n, 40}, kDType<T>, "special y", 0, j, y(1, j), 0);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// float32 by bf16 parts: as exact as multiply-adds, whatever the numbers are

// The error of y[m, n] of k products, relative to the sum of their magnitudes: root of the mean square, and largest.
struct Errors {
  double rms = 0, worst = 0;
};

Errors errors_of(const Operand<float>& x, const Operand<float>& w, const Operand<float>& y) {
  Errors result;
  for (int64_t i = 0; i < x.rows; ++i)
    for (int64_t j = 0; j < w.rows; ++j) {
      double sum = 0, magnitude = 0;
      for (int64_t p = 0; p < x.cols; ++p) {
        sum += x(i, p) * w(j, p);
        magnitude += std::fabs(x(i, p) * w(j, p));
      }
      const double got = y(i, j);
      if (got == sum || (std::isnan(got) && std::isnan(sum))) continue;
      // Products that overflow together may do so on the way, in an order of their own.
      if (std::isfinite(sum) && magnitude > FLT_MAX) continue;
      // A result that is denormal is rounded to a multiple of 2^-149.
      const double error = std::max(0.0, std::fabs(got - sum) - 0x1p-150) / magnitude;
      if (!(error <= 1)) {
        if (++failures <= 20) std::printf("parts: y[%d, %d] = %g, expected %g\n", int(i), int(j), got, sum);
        return result;
      }
      result.rms += error * error;
      result.worst = std::max(result.worst, error);
    }
  result.rms = std::sqrt(result.rms / static_cast<double>(x.rows * w.rows));
  return result;
}

void test_parts() {
  std::mt19937 random(5);
  std::normal_distribution<double> normal;
  std::uniform_int_distribution<int> exponent(-20, 19);
  std::uniform_real_distribution<double> uniform;
  const auto any = [&](double) { return normal(random); };
  struct Data {
    const char* name;
    std::function<double(double)> x, w;
  };
  const auto wide = [&](double) { return std::ldexp(normal(random), exponent(random)); };
  const auto now_and_then = [&](double rare) { return random() % 1000 == 0 ? rare : normal(random); };
  const Data data[] = {
      {"normal", any, any},
      {"uniform 0..1", [&](double) { return uniform(random); }, [&](double) { return uniform(random); }},
      {"normal 2^-20..2^19", wide, wide},
      {"relu of normal", [&](double) { return std::max(0.0, normal(random)); }, any},
      {"cancelling", [&](double column) { return normal(random) + (int(column) % 2 == 0 ? 1e4 : -1e4); },
       [&](double) { return 1 + 1e-3 * normal(random); }},
      {"tiny", [&](double) { return 1e-30 * normal(random); }, [&](double) { return 1e-3 * normal(random); }},
      {"denormal", [&](double) { return 1e-39 * normal(random); }, any},
      {"denormal results", [&](double) { return 1e-20 * normal(random); },
       [&](double) { return 1e-20 * normal(random); }},
      {"huge", [&](double) { return 1e30 * normal(random); }, [&](double) { return 1e6 * normal(random); }},
      {"overflowing", [&](double) { return 1e30 * normal(random); }, [&](double) { return 1e9 * normal(random); }},
      {"near float32's end", [&](double) { return now_and_then(3.4e38); },
       [&](double) { return 0.01 * normal(random); }},
      {"infinities", [&](double) { return now_and_then(INFINITY); }, any},
      {"infinities in w", any, [&](double) { return now_and_then(-INFINITY); }},
      {"NaN", [&](double) { return now_and_then(NAN); }, any},
      {"a few denormals", [&](double) { return now_and_then(1e-41); }, any},
      {"a few tiny", [&](double) { return now_and_then(1e-28); }, any},
      {"tiny results", [&](double) { return 1e-16 * normal(random); }, [&](double) { return 1e-16 * normal(random); }},
  };
  for (const Data& d : data)
    for (const int64_t k : {64, 500}) {
      Operand<float> x(70, k, k == 64 ? dense : transposed), w(90, k, k == 64 ? transposed : dense), y(70, 90, dense);
      for (int64_t i = 0; i < x.rows; ++i)
        for (int64_t p = 0; p < k; ++p) x.at(i, p) = static_cast<float>(d.x(static_cast<double>(p)));
      for (int64_t j = 0; j < w.rows; ++j)
        for (int64_t p = 0; p < k; ++p) w.at(j, p) = static_cast<float>(d.w(static_cast<double>(p)));
      LinearForward call{.dtype = DType::f32,
                         .m = x.rows,
                         .n = w.rows,
                         .k = k,
                         .x_strides = x.strides,
                         .w_strides = w.strides,
                         .y_row_stride = w.rows};
      const auto errors = [&](Bf16Multiply multiply, Precision precision) {
        call.precision = precision;
        run_call(call, {.x = x.data, .w = w.data, .y = y.data}, kTeams[k % 3], multiply);
        return errors_of(x, w, y);
      };
      const Errors fma = errors(Bf16Multiply::float32, Precision::highest);
      const Errors three = errors(Bf16Multiply::native, Precision::highest);
      const Errors two = errors(Bf16Multiply::native, Precision::high);
      std::printf("%-20s k %3d: multiply-adds %.1e (worst %.1e), three parts %.1e (%.1e), two parts %.1e (%.1e)\n",
                  d.name, int(k), fma.rms, fma.worst, three.rms, three.worst, two.rms, two.worst);
      if (three.rms > fma.rms + 1e-9 || three.worst > fma.worst + 0x1p-24 || two.rms > 0x1p-16) {
        ++failures;
        std::printf("parts are less exact\n");
      }
    }
}

}  // namespace

// Arguments: "quick" for fewer random cases, and the name of a tier to run that one alone.
int main(int argc, char** argv) {
  return run_tiers(
      argc, argv,
      []<class T>(bool quick) {
        test_dtype<T>(quick);
        if (kDType<T> == DType::f32 && isa_used() == Isa::amx) test_parts();
      },
      true);
}
