// Linear layers with sparse weights, on every tier, against plain loops in float64: y, the gradient of x and that of
// the kept weights. Sizes straddle vectors, panels, blocks and tiles; every buffer lies against a page that must not be
// touched. Indices out of range must not lead out of x. Teams of 1 to 3 threads must give the same bits.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "products.h"
#include "random.h"

namespace {

struct Case {
  int rows, cols;  // of a block
  int64_t images, m, n, k;
  double density;
  bool bias = true, integers = false, pixels = false;  // pixels: rows of x and y are contiguous along m
  ActivationKind kind = ActivationKind::identity;
  int64_t gap = 0;  // between rows, or planes; -1: all rows of x are the first
  int index_bytes = 2;
};

void fail(const Case& c, DType dtype, const char* what, int64_t i, double got, double wanted) {
  if (++failures > 20) return;
  std::printf("FAIL %s dtype %d %s[%lld] = %.9g, wanted %.9g (%dx%d, %lld x %lld x %lld x %lld, density %.2f%s)\n",
              isa_name(isa_used()), static_cast<int>(dtype), what, static_cast<long long>(i), got, wanted, c.rows,
              c.cols, static_cast<long long>(c.images), static_cast<long long>(c.m), static_cast<long long>(c.n),
              static_cast<long long>(c.k), c.density, c.pixels ? ", pixels" : "");
}

// A random weight: its buffers, and what they stand for.
struct Sparse {
  SparseWeight shape;
  Guarded<int32_t> crow;
  std::vector<int32_t> columns;
  Guarded<char> col;
  Guarded<float> values;

  explicit Sparse(const Case& c, std::vector<int32_t> starts, std::vector<int32_t> at)
      : shape{c.n, c.k, static_cast<int64_t>(at.size()), c.rows, c.cols, c.index_bytes},
        crow(static_cast<int64_t>(starts.size()), coin()),
        columns(std::move(at)),
        col(static_cast<int64_t>(columns.size()) * c.index_bytes, true),
        values(static_cast<int64_t>(columns.size()) * c.rows * c.cols, coin()) {
    for (size_t i = 0; i < starts.size(); ++i) crow[static_cast<int64_t>(i)] = starts[i];
    for (size_t b = 0; b < columns.size(); ++b) set_column(b, columns[b]);
    std::normal_distribution<double> normal;
    values.fill([&] { return c.integers ? static_cast<double>(between(-3, 3)) : normal(generator); });
  }
  static Sparse random(const Case& c) {
    std::vector<int32_t> starts{0}, at;
    for (int64_t i = 0; i * c.rows < c.n; ++i) {
      for (int64_t j = 0; j * c.cols < c.k; ++j)
        if (static_cast<double>(between(0, 999)) < 1000 * c.density) at.push_back(static_cast<int32_t>(j));
      starts.push_back(static_cast<int32_t>(at.size()));
    }
    return Sparse(c, starts, at);
  }
  void set_column(size_t b, int32_t column) {
    const int16_t narrow = static_cast<int16_t>(column);
    if (shape.index_bytes == 2)
      std::memcpy(col.data() + 2 * b, &narrow, 2);
    else
      std::memcpy(col.data() + 4 * b, &column, 4);
  }
  SparsePointers pointers() const { return {crow.data(), col.data(), values.data()}; }

  // body(element of values, n, k) for those that lie in the weight.
  template <class Body>
  void each(Body&& body) const {
    for (int64_t i = 0; (i * shape.block_rows) < shape.n; ++i)
      for (int64_t b = crow[i]; b < crow[i + 1]; ++b)
        for (int64_t r = 0; r < shape.block_rows; ++r)
          for (int64_t c = 0; c < shape.block_cols; ++c) {
            const int64_t row = i * shape.block_rows + r;
            const int64_t column = int64_t{columns[static_cast<size_t>(b)]} * shape.block_cols + c;
            if (row < shape.n && column < shape.k) body((b * shape.block_rows + r) * shape.block_cols + c, row, column);
          }
  }
};

// A matrix of each image, between guard pages.
template <class T>
struct Matrices {
  Strides strides;
  int64_t image_stride, size;
  Guarded<T> data;

  Matrices(const Case& c, int64_t columns, int64_t gap)
      : strides(c.pixels ? Strides{1, c.m + std::max<int64_t>(gap, 0)} : Strides{gap < 0 ? 0 : columns + gap, 1}),
        image_stride(c.pixels ? columns * strides.col : c.m * strides.row),
        size(c.images * c.m * columns == 0
                 ? 0
                 : (c.images - 1) * image_stride + (c.m - 1) * strides.row + (columns - 1) * strides.col + 1),
        data(size, coin()) {}
  int64_t at(int64_t image, int64_t row, int64_t column) const {
    return image * image_stride + row * strides.row + column * strides.col;
  }
};

// Runs a call with every team; what it wrote must have the same bits.
template <class Call, class T>
void run_teams(const Case& c, const Call& call, const typename Call::Pointers& pointers, const Guarded<T>& result,
               T poison, const char* what) {
  std::vector<T> first;
  for (const Team& team : kTeams) {
    const int64_t size = static_cast<int64_t>(result.values().size());
    for (int64_t i = 0; i < size; ++i) result[i] = poison;
    run_call(call, pointers, team);
    if (first.empty()) first = result.values();
    if (!same_bits(first, result.values())) fail(c, call.dtype, what, team.threads, 0, 0);
  }
}

// Elements that no product is written to must be what they were.
template <class T>
void check(const Case& c, const char* what, const Matrices<T>& got, int64_t columns, const std::vector<double>& wanted,
           const std::vector<double>& magnitude, int64_t terms, bool exact, T poison) {
  std::vector<bool> seen(static_cast<size_t>(got.size));
  for (int64_t i = 0; i < c.images; ++i)
    for (int64_t r = 0; r < c.m; ++r)
      for (int64_t j = 0; j < columns; ++j) {
        const size_t flat = static_cast<size_t>((i * c.m + r) * columns + j);
        const int64_t at = got.at(i, r, j);
        seen[static_cast<size_t>(at)] = true;
        if (!close(got.data[at], wanted[flat], magnitude[flat], terms, exact, exact ? 0 : 8 * 0x1p-24))
          fail(c, kDType<T>, what, static_cast<int64_t>(flat), got.data(at), wanted[flat]);
      }
  for (int64_t at = 0; at < got.size; ++at)
    if (!seen[static_cast<size_t>(at)] && widen(got.data[at]) != widen(poison)) fail(c, kDType<T>, what, at, 0, 0);
}

template <class T>
void test(const Case& c) {
  std::normal_distribution<double> normal;
  const auto draw = [&] { return c.integers ? static_cast<double>(between(-3, 3)) : normal(generator); };
  const Sparse w = Sparse::random(c);
  Matrices<T> x(c, c.k, c.gap), y(c, c.n, std::max<int64_t>(c.gap, 0)), g(c, c.n, c.gap),
      grad_x(c, c.k, std::max<int64_t>(c.gap, 0));
  Guarded<T> bias(c.bias ? c.n : 0, coin());
  for (Guarded<T>* const operand : {&x.data, &g.data, &bias}) operand->fill(draw);
  const T poison = narrow<T>(777);

  const SparseLinearForward forward{.dtype = kDType<T>,
                                    .images = c.images,
                                    .m = c.m,
                                    .weight = w.shape,
                                    .x_strides = x.strides,
                                    .y_strides = y.strides,
                                    .x_image_stride = x.image_stride,
                                    .y_image_stride = y.image_stride,
                                    .with_bias = c.bias,
                                    .activation = {c.kind}};
  run_teams(c, forward, {x.data.data(), w.pointers(), c.bias ? bias.data() : nullptr, y.data.data()}, y.data, poison,
            "y by teams");
  const size_t outputs = static_cast<size_t>(c.images * c.m * c.n), inputs = static_cast<size_t>(c.images * c.m * c.k);
  std::vector<double> wanted(outputs), size(outputs), wanted_x(inputs), size_x(inputs), wanted_w, size_w;
  wanted_w.resize(w.values.values().size());
  size_w = wanted_w;
  for (int64_t i = 0; i < c.images; ++i)
    for (int64_t r = 0; r < c.m; ++r) {
      const size_t to_y = static_cast<size_t>((i * c.m + r) * c.n), to_x = static_cast<size_t>((i * c.m + r) * c.k);
      for (int64_t j = 0; j < c.n; ++j) {
        wanted[to_y + static_cast<size_t>(j)] = c.bias ? bias(j) : 0;
        size[to_y + static_cast<size_t>(j)] = c.bias ? std::fabs(bias(j)) : 0;
      }
      w.each([&](int64_t element, int64_t n, int64_t k) {
        const double value = w.values(element), in = x.data(x.at(i, r, k)), grad = g.data(g.at(i, r, n));
        wanted[to_y + static_cast<size_t>(n)] += value * in;
        size[to_y + static_cast<size_t>(n)] += std::fabs(value * in);
        wanted_x[to_x + static_cast<size_t>(k)] += value * grad;
        size_x[to_x + static_cast<size_t>(k)] += std::fabs(value * grad);
        wanted_w[static_cast<size_t>(element)] += in * grad;
        size_w[static_cast<size_t>(element)] += std::fabs(in * grad);
      });
    }
  for (double& value : wanted) value = activate(c.kind, value);
  const bool linear = c.kind == ActivationKind::identity || c.kind == ActivationKind::relu;
  check(c, "y", y, c.n, wanted, size, c.k, c.integers && linear, poison);

  SparseLinearBackward backward{.dtype = kDType<T>,
                                .images = c.images,
                                .m = c.m,
                                .weight = w.shape,
                                .grad_y_strides = g.strides,
                                .x_strides = x.strides,
                                .grad_x_strides = grad_x.strides,
                                .grad_y_image_stride = g.image_stride,
                                .x_image_stride = x.image_stride,
                                .grad_x_image_stride = grad_x.image_stride,
                                .with_grad_x = true};
  run_teams(c, backward, {g.data.data(), nullptr, w.pointers(), grad_x.data.data(), nullptr}, grad_x.data, poison,
            "grad_x by teams");
  check(c, "grad_x", grad_x, c.k, wanted_x, size_x, c.n, c.integers, poison);

  if (c.images * c.m == 0) return;
  backward.with_grad_x = false;
  backward.with_grad_values = true;
  const Guarded<float> grad_values(static_cast<int64_t>(wanted_w.size()), coin());
  run_teams(c, backward, {g.data.data(), x.data.data(), w.pointers(), nullptr, grad_values.data()}, grad_values, 777.0f,
            "grad_values by teams");
  for (size_t i = 0; i < wanted_w.size(); ++i) {
    const int64_t at = static_cast<int64_t>(i);
    if (!close(grad_values[at], wanted_w[i], size_w[i], c.images * c.m, c.integers, 0))
      fail(c, kDType<T>, "grad_values", at, grad_values[at], wanted_w[i]);
  }
}

// What is in col and crow may be anything.
template <class T>
void test_corrupted(int index_bytes, int rows, int cols) {
  const Case c{rows, cols, 1, 5, 35, 70, 0.3, true, false, false, ActivationKind::identity, 0, index_bytes};
  Sparse w = Sparse::random(c);
  Matrices<T> x(c, c.k, 0), y(c, c.n, 0), grad_x(c, c.k, 0);
  Guarded<T> bias(c.n, true);
  const Guarded<float> grad_values(static_cast<int64_t>(w.values.values().size()), true);
  for (size_t b = 0; b < w.columns.size(); ++b)
    if (coin()) w.set_column(b, static_cast<int32_t>(between(-40000, 40000)));
  for (int64_t i = 0; i < static_cast<int64_t>(w.crow.values().size()); ++i)
    if (coin()) w.crow[i] = static_cast<int32_t>(between(-2000000000, 2000000000));
  for (const Team& team : {Team{1, nullptr}, Team{2, run_threads}}) {
    run_call(
        SparseLinearForward{kDType<T>, 1, c.m, w.shape, x.strides, y.strides, x.image_stride, y.image_stride, true, {}},
        {x.data.data(), w.pointers(), bias.data(), y.data.data()}, team);
    if (team.threads == 1)  // rows that overlap would be written by two threads
      run_call(SparseLinearBackward{kDType<T>, 1, c.m, w.shape, y.strides, x.strides, grad_x.strides, y.image_stride,
                                    x.image_stride, grad_x.image_stride, true, true},
               {y.data.data(), x.data.data(), w.pointers(), grad_x.data.data(), grad_values.data()}, team);
  }
}

}  // namespace

int main(int argc, char** argv) {
  return run_tiers(argc, argv, []<class T>(bool quick) {
    if constexpr (kDType<T> != DType::f64) {
      for (const auto& [rows, cols] : {std::pair(1, 1), {1, 4}, {4, 4}, {16, 1}}) {
        for (const int64_t m : {0, 1, 3, 4, 5, 8, 9, 15, 16, 17, 32, 33, 65}) test<T>({rows, cols, 1, m, 18, 21, 0.4});
        for (const int64_t n : {1, 3, 4, 15, 16, 17, 31, 33, 65}) test<T>({rows, cols, 1, 19, n, 13, 0.5});
        for (const int64_t k : {1, 2, 3, 4, 5, 16, 31, 511, 513}) test<T>({rows, cols, 1, 18, 9, k, 0.3});
        for (const double density : {0.0, 0.05, 1.0}) test<T>({rows, cols, 1, 7, 40, 50, density});
        for (const bool bias : {false, true})
          for (const ActivationKind kind : {ActivationKind::relu, ActivationKind::silu})
            test<T>({rows, cols, 1, 20, 37, 30, 0.3, bias, false, bias, kind});
        for (const int64_t gap : {-1, 0, 3}) {
          test<T>({rows, cols, 1, 21, 19, 27, 0.4, true, true, false, ActivationKind::identity, gap, 4});
          test<T>({rows, cols, 3, 35, 19, 27, 0.4, true, true, true, ActivationKind::identity, gap});
        }
        test<T>({rows, cols, 2, 40, 0, 5, 0.5});
        test<T>({rows, cols, 2, 3, 5, 0, 0.5});
        for (int i = 0; i < (quick ? 5 : 20); ++i)
          test<T>({rows, cols, between(1, 3), between(1, 70), between(1, 80), between(1, 90),
                   0.1 * static_cast<double>(between(0, 6)), coin(), coin(), coin(),
                   coin() ? ActivationKind::relu : ActivationKind::identity, between(0, 2), coin() ? 2 : 4});
        for (int i = 0; i < (quick ? 3 : 10); ++i) test_corrupted<T>(coin() ? 2 : 4, rows, cols);
      }
      if (kDType<T> == DType::f32 && !quick) {
        test<T>({1, 1, 1, 40, 33, 7000, 0.02});    // too many columns for wide panels
        test<T>({4, 4, 1, 1500, 20, 2100, 0.02});  // more panels than are packed at a time
      }
    }
  });
}
