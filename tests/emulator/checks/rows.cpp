// What goes through rows several times: layer_norm, softmax and cross_entropy, on rows that a warp holds, that a block
// holds, and that nobody holds.
#include <cmath>

#include "check.h"
#include "layer_norm/cuda/layer_norm.cuh"
#include "loss/cuda/loss.cuh"
#include "softmax/cuda/softmax.cuh"

namespace fastops::cuda {
namespace {

bool near(float actual, double expected) { return std::abs(actual - expected) <= 2e-4 * (1 + std::abs(expected)); }

// At most zero, which is also read where there is nothing.
double x_of(int64_t row, int64_t col) { return static_cast<double>((row * 5 + col * 7) % 11 - 10); }
double g_of(int64_t row, int64_t col) { return static_cast<double>((row + col * 3) % 7 - 2); }
double weight_of(int64_t col) { return static_cast<double>(col % 3 + 1); }

struct Operands {
  size_t rows, cols;
  Guarded<float> x, g, y, grad, weight;

  Operands(int64_t row_count, int64_t col_count)
      : rows(static_cast<size_t>(row_count)),
        cols(static_cast<size_t>(col_count)),
        x(rows * cols),
        g(rows * cols),
        y(rows * cols),
        grad(rows * cols),
        weight(cols) {
    for (size_t i = 0; i < rows * cols; ++i) {
      x[i] = static_cast<float>(x_of(static_cast<int64_t>(i / cols), static_cast<int64_t>(i % cols)));
      g[i] = static_cast<float>(g_of(static_cast<int64_t>(i / cols), static_cast<int64_t>(i % cols)));
    }
    for (size_t col = 0; col < cols; ++col) weight[col] = static_cast<float>(weight_of(static_cast<int64_t>(col)));
  }
};

bool layer_norm_is_right(int64_t rows, int64_t cols, int lanes, int64_t parts) {
  const Operands o(rows, cols);
  const Guarded<float> mean(o.rows), rstd(o.rows), partial(2 * static_cast<size_t>(parts) * o.cols),
      grad_weight(o.cols), grad_bias(o.cols);
  NormForward<float> forward{};
  forward.rows = rows;
  forward.size = forward.x_stride = cols;
  forward.single = true;
  forward.x = o.x.get();
  forward.weight = forward.bias = o.weight.get();
  forward.eps = 0.5;
  forward.y = o.y.get();
  forward.mean = mean.get();
  forward.rstd = rstd.get();
  NormBackward<float> backward{};
  static_cast<NormTask<float>&>(backward) = forward;
  backward.grad_stride = cols;
  backward.grad_y = o.g.get();
  backward.mean = mean.get();
  backward.rstd = rstd.get();
  backward.grad_x = o.grad.get();
  backward.lanes = lanes;
  backward.parts = parts;
  backward.partial = partial.get();
  backward.grad_weight = grad_weight.get();
  backward.grad_bias = grad_bias.get();
  const int64_t tile = lanes * kVector<float>, tiles = (cols + tile - 1) / tile;
  constexpr size_t shared = kThreads * sizeof(float);
  if (!succeeded(launch_rows<float>("forward", rows, cols, kRowShared<float>, forward, nullptr,
                                    [](auto threads) { return norm_forward_kernel<float, threads.value>; })) ||
      !succeeded(launch_rows<float>("backward", rows, cols, kRowShared<float>, backward, nullptr,
                                    [](auto threads) { return norm_backward_kernel<float, threads.value>; })) ||
      !succeeded(launch({{"columns"}, tiles * parts, kThreads, shared, nullptr}, norm_columns_kernel<float>, backward)))
    return false;
  if (parts > 1 && !succeeded(launch({{"finish"}, 2 * ((cols + 31) / 32), kThreads, shared, nullptr},
                                     norm_finish_kernel<float>, backward)))
    return false;
  const double n = static_cast<double>(cols);
  std::vector<double> of_weight(o.cols), of_bias(o.cols);
  for (int64_t row = 0; row < rows; ++row) {
    double m = 0, squares = 0, sum = 0, product = 0;
    for (int64_t col = 0; col < cols; ++col) m += x_of(row, col) / n;
    for (int64_t col = 0; col < cols; ++col) squares += (x_of(row, col) - m) * (x_of(row, col) - m);
    const double r = 1 / std::sqrt(squares / n + 0.5);
    const auto normal = [&](int64_t col) { return (x_of(row, col) - m) * r; };
    for (int64_t col = 0; col < cols; ++col) {
      sum += g_of(row, col) * weight_of(col);
      product += g_of(row, col) * weight_of(col) * normal(col);
      of_weight[static_cast<size_t>(col)] += g_of(row, col) * normal(col);
      of_bias[static_cast<size_t>(col)] += g_of(row, col);
    }
    for (int64_t col = 0; col < cols; ++col) {
      const size_t at = static_cast<size_t>(row * cols + col);
      if (!near(o.y[at], normal(col) * weight_of(col) + weight_of(col))) return false;
      if (!near(o.grad[at], r * (g_of(row, col) * weight_of(col) - sum / n - normal(col) * product / n))) return false;
    }
  }
  for (size_t col = 0; col < o.cols; ++col)
    if (!near(grad_weight[col], of_weight[col]) || !near(grad_bias[col], of_bias[col])) return false;
  return true;
}

bool transposition_is_right() {
  constexpr int64_t size = 45, inner = 37;
  const Guarded<float> from(2 * size * inner), to(2 * size * inner);
  for (size_t i = 0; i < from.size(); ++i) from[i] = static_cast<float>(i);
  if (!succeeded(launch({{"transpose"}, 2 * 4, kThreads, kTransposed * (kTransposed + 1) * sizeof(float), nullptr},
                        transpose_rows_kernel<float>, from.get(), to.get(), size * inner, size, inner)))
    return false;
  for (int64_t o = 0; o < 2; ++o)
    for (int64_t c = 0; c < size; ++c)
      for (int64_t i = 0; i < inner; ++i)
        if (to[static_cast<size_t>((o * inner + i) * size + c)] !=
            from[static_cast<size_t>((o * size + c) * inner + i)])
          return false;
  return true;
}

// Rows of cols, or with inner > 1 cols planes of inner elements: x and g of `row` lie inner apart.
bool softmax_is_right(bool log, int64_t rows, int64_t cols, int64_t inner) {
  const Operands o(rows, cols);
  const auto at = [&](int64_t row, int64_t col) {
    return static_cast<size_t>((row / inner * cols + col) * inner + row % inner);
  };
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t col = 0; col < cols; ++col) {
      o.x[at(row, col)] = static_cast<float>(x_of(row, col));
      o.g[at(row, col)] = static_cast<float>(g_of(row, col));
    }
  SoftmaxTask<float> forward{log, rows, cols, inner, false, o.x.get(), nullptr, o.y.get()};
  SoftmaxTask<float> backward{log, rows, cols, inner, false, o.y.get(), o.g.get(), o.grad.get()};
  const Launch strips{{"strips"}, rows / inner * ((inner + 31) / 32), kThreads, kThreads * sizeof(float), nullptr};
  if (inner > 1) {
    if (!succeeded(launch(strips, softmax_forward_strips_kernel<float>, forward)) ||
        !succeeded(launch(strips, softmax_backward_strips_kernel<float>, backward)))
      return false;
  } else if (!succeeded(
                 launch_rows<float>("forward", rows, cols, kRowShared<float>, forward, nullptr,
                                    [](auto threads) { return softmax_forward_kernel<float, threads.value>; })) ||
             !succeeded(
                 launch_rows<float>("backward", rows, cols, kRowShared<float>, backward, nullptr,
                                    [](auto threads) { return softmax_backward_kernel<float, threads.value>; }))) {
    return false;
  }
  for (int64_t row = 0; row < rows; ++row) {
    double sum = 0, of_g = 0;
    for (int64_t col = 0; col < cols; ++col) sum += std::exp(x_of(row, col));
    const auto p = [&](int64_t col) { return std::exp(x_of(row, col)) / sum; };
    for (int64_t col = 0; col < cols; ++col) of_g += g_of(row, col) * (log ? 1 : p(col));
    for (int64_t col = 0; col < cols; ++col) {
      const double y = log ? x_of(row, col) - std::log(sum) : p(col);
      const double grad = log ? g_of(row, col) - p(col) * of_g : p(col) * (g_of(row, col) - of_g);
      if (!near(o.y[at(row, col)], y) || !near(o.grad[at(row, col)], grad)) return false;
    }
  }
  return true;
}

bool cross_entropy_is_right(int64_t rows, int64_t cols, int64_t inner) {
  const Operands o(rows, cols);
  const Guarded<int64_t> target(o.rows);
  const Guarded<float> statistics(2 * o.rows + 1), mean(1), one(1);
  const auto at = [&](int64_t row, int64_t col) {
    return static_cast<size_t>((row / inner * cols + col) * inner + row % inner);
  };
  for (int64_t row = 0; row < rows; ++row) {
    target[static_cast<size_t>(row)] = row % 4 == 3 ? -100 : row * 5 % cols;
    for (int64_t col = 0; col < cols; ++col) o.x[at(row, col)] = static_cast<float>(x_of(row, col));
  }
  one[0] = 1;
  const int64_t per_block = inner > 1 ? 32 : cols <= kChunk<32, float> ? 8 : 1;
  const int64_t blocks = inner > 1 ? rows / inner * ((inner + 31) / 32) : (rows + per_block - 1) / per_block;
  const Guarded<LossSums> sums(static_cast<size_t>(blocks));
  EntropyTask<float> task{rows,
                          cols,
                          inner,
                          -100,
                          false,
                          true,
                          Reduction::mean,
                          0.75f,
                          0.25f / static_cast<float>(cols),
                          o.x.get(),
                          o.weight.get(),
                          target.get(),
                          statistics.get(),
                          mean.get(),
                          sums.get(),
                          one.get(),
                          o.grad.get()};
  constexpr size_t shared = kThreads / 32 * sizeof(LossSums);
  const Launch planes{{"planes"}, blocks, kThreads, kThreads * sizeof(float), nullptr};
  if (!succeeded(inner > 1
                     ? launch(planes, entropy_planes_kernel<float>, task)
                     : launch_rows<float>("forward", rows, cols, shared, task, nullptr,
                                          [](auto threads) { return entropy_rows_kernel<float, threads.value>; })) ||
      !succeeded(
          launch({{"finish"}, 1, kThreads, kRowShared<double>, nullptr}, entropy_finish_kernel<float>, task, blocks)) ||
      !succeeded(inner > 1 ? launch(planes, entropy_backward_planes_kernel<float>, task)
                           : launch_rows<float>("backward", rows, cols, shared, task, nullptr, [](auto threads) {
                               return entropy_backward_rows_kernel<float, threads.value>;
                             })))
    return false;
  double loss = 0, total = 0, weights = 0;
  for (int64_t col = 0; col < cols; ++col) weights += weight_of(col);
  const double share = 0.25 / static_cast<double>(cols);
  for (int64_t row = 0; row < rows; ++row)
    if (const int64_t t = target[static_cast<size_t>(row)]; t >= 0) total += weight_of(t);
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t t = target[static_cast<size_t>(row)];
    double sum = 0;
    for (int64_t col = 0; col < cols; ++col) sum += std::exp(x_of(row, col));
    for (int64_t col = 0; col < cols; ++col) {
      const double of_class = share * weight_of(col) + (col == t ? 0.75 * weight_of(t) : 0);
      const double slope = t < 0 ? 0 : 0.75 * weight_of(t) + share * weights;
      const double grad = t < 0 ? 0 : (slope * std::exp(x_of(row, col)) / sum - of_class) / total;
      if (t >= 0) loss -= of_class * (x_of(row, col) - std::log(sum));
      if (!near(o.grad[at(row, col)], grad)) return false;
    }
  }
  return near(mean[0], loss / total) && near(statistics[2 * o.rows], total);
}

bool mse_is_right() {
  constexpr int64_t n = 5003, blocks = 2;
  const Guarded<float> x(n), t(n), grad_x(n), y(1), one(1);
  const Guarded<double> sums(blocks);
  double expected = 0;
  for (size_t i = 0; i < n; ++i) {
    x[i] = static_cast<float>(i % 5);
    t[i] = static_cast<float>(i % 3);
    expected += (x[i] - t[i]) * (x[i] - t[i]);
  }
  one[0] = 1;
  const MseTask<float> task{units_of<kVector<float>>(1, n),
                            false,
                            Reduction::sum,
                            2,
                            x.get(),
                            t.get(),
                            one.get(),
                            y.get(),
                            grad_x.get(),
                            nullptr,
                            sums.get()};
  const Launch how{{"mse"}, blocks, kThreads, kRowShared<double>, nullptr};
  if (!succeeded(launch(how, mse_forward_kernel<float>, task)) ||
      !succeeded(launch({{"finish"}, 1, kThreads, kRowShared<double>, nullptr}, mse_finish_kernel<float>, task, blocks,
                        1.0)) ||
      !succeeded(launch(how, mse_backward_kernel<float>, task)))
    return false;
  for (size_t i = 0; i < n; ++i)
    if (grad_x[i] != 2 * (x[i] - t[i])) return false;
  return y[0] == static_cast<float>(expected);
}

bool all_are_right() {
  return layer_norm_is_right(70, 43, 8, 3) && layer_norm_is_right(2, 1030, 32, 1) &&
         layer_norm_is_right(1, 8200, 32, 1) && transposition_is_right() && softmax_is_right(false, 9, 43, 1) &&
         softmax_is_right(true, 2, 1030, 1) && softmax_is_right(false, 1, 8200, 1) &&
         softmax_is_right(true, 74, 13, 37) && cross_entropy_is_right(9, 43, 1) && cross_entropy_is_right(2, 1030, 1) &&
         cross_entropy_is_right(74, 13, 37) && mse_is_right();
}

}  // namespace
}  // namespace fastops::cuda

int main() { return in_every_schedule(fastops::cuda::all_are_right); }
