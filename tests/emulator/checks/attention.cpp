// Attention of queries, keys and sizes that are not whole tiles, forward and backward, causal and not.
#include "attention/cuda/attention.cuh"

#include <cmath>

#include "check.h"

namespace fastops::cuda {
namespace {

constexpr int64_t kHeads = 2, kQueries = 70, kKeys = 75, kSize = 37, kValueSize = 133;

bool near(float actual, double expected) { return std::abs(actual - expected) <= 2e-4 * (1 + std::abs(expected)); }

// Rows of all heads, one after the other.
struct Matrix {
  int64_t rows, cols;
  Guarded<float> data;

  Matrix(int64_t row_count, int64_t col_count, int64_t seed)
      : rows(row_count), cols(col_count), data(static_cast<size_t>(kHeads * rows * cols)) {
    for (size_t i = 0; i < data.size(); ++i)
      data[i] = static_cast<float>((static_cast<int64_t>(i) * seed + static_cast<int64_t>(i) / cols) % 7 - 3) / 4;
  }
  HeadStrides strides() const { return {0, rows * cols, cols}; }
  float& at(int64_t head, int64_t row, int64_t col) const {
    return data[static_cast<size_t>((head * rows + row) * cols + col)];
  }
};

double product(const Matrix& a, int64_t row, const Matrix& b, int64_t other, int64_t head) {
  double sum = 0;
  for (int64_t i = 0; i < a.cols; ++i) sum += a.at(head, row, i) * b.at(head, other, i);
  return sum;
}

bool attention_is_right(bool causal) {
  const Matrix q(kQueries, kSize, 5), k(kKeys, kSize, 3), v(kKeys, kValueSize, 11), g(kQueries, kValueSize, 13);
  const Matrix y(kQueries, kValueSize, 1), of_q(kQueries, kSize, 1), of_k(kKeys, kSize, 1), of_v(kKeys, kValueSize, 1);
  for (int64_t head = 0; head < kHeads; ++head)  // the second tile has larger scores
    for (int64_t col = 0; col < kSize; ++col)
      for (int64_t row = kScores; row < kKeys; ++row) k.at(head, row, col) *= 1.5f;
  const Guarded<float> lse(kHeads * kQueries), delta(kHeads * kQueries);
  AttentionTask<float> task{};
  task.of = {DType::f32, causal,     false,       0.5,         1,           kHeads,      kQueries, kKeys,
             kSize,      kValueSize, q.strides(), k.strides(), v.strides(), y.strides(), {}};
  task.slices = 2;
  task.scale = 0.5f;
  task.q = q.data.get();
  task.k = k.data.get();
  task.v = v.data.get();
  task.lse = lse.get();
  task.delta = delta.get();
  const auto sweep = [&](auto kernel, const Matrix& result, int64_t slices) {
    task.tiles = (result.rows + kScores - 1) / kScores;
    task.slices = slices;
    task.result = result.data.get();
    task.result_strides = result.strides();
    return succeeded(launch({{"attention"}, kHeads * task.tiles * slices, kThreads, kAttentionShared<float>, nullptr},
                            kernel, task));
  };
  if (!sweep(attention_forward_kernel<float>, y, 2)) return false;
  task.y = y.data.get();
  task.grad_y = g.data.get();
  task.grad_y_strides = g.strides();
  task.grad_k = of_k.data.get();
  task.grad_k_strides = of_k.strides();
  task.grad_v = of_v.data.get();
  task.grad_v_strides = of_v.strides();
  if (!succeeded(launch({{"delta"}, (kHeads * kQueries + 7) / 8, kThreads, 0, nullptr}, attention_delta_kernel<float>,
                        task)) ||
      !sweep(attention_backward_query_kernel<float>, of_q, 1) || !sweep(attention_backward_key_kernel<float>, of_k, 2))
    return false;
  std::vector<double> grad_k(of_k.data.size()), grad_v(of_v.data.size());
  for (int64_t head = 0; head < kHeads; ++head) {
    for (int64_t i = 0; i < kQueries; ++i) {
      std::vector<double> p(kKeys), d(kKeys);
      double sum = 0, all = 0;
      for (int64_t j = 0; j < kKeys; ++j) {
        const size_t at = static_cast<size_t>(j);
        p[at] = causal && j > i ? 0 : std::exp(0.5 * product(q, i, k, j, head));
        d[at] = product(g, i, v, j, head);
        sum += p[at];
      }
      for (int64_t j = 0; j < kKeys; ++j) all += (p[static_cast<size_t>(j)] /= sum) * d[static_cast<size_t>(j)];
      for (int64_t c = 0; c < kValueSize; ++c) {
        double expected = 0;
        for (int64_t j = 0; j < kKeys; ++j) {
          expected += p[static_cast<size_t>(j)] * v.at(head, j, c);
          grad_v[static_cast<size_t>((head * kKeys + j) * kValueSize + c)] +=
              p[static_cast<size_t>(j)] * g.at(head, i, c);
        }
        if (!near(y.at(head, i, c), expected)) return false;
      }
      for (int64_t c = 0; c < kSize; ++c) {
        double expected = 0;
        for (int64_t j = 0; j < kKeys; ++j) {
          const double score = 0.5 * p[static_cast<size_t>(j)] * (d[static_cast<size_t>(j)] - all);
          expected += score * k.at(head, j, c);
          grad_k[static_cast<size_t>((head * kKeys + j) * kSize + c)] += score * q.at(head, i, c);
        }
        if (!near(of_q.at(head, i, c), expected)) return false;
      }
    }
  }
  for (size_t i = 0; i < grad_k.size(); ++i)
    if (!near(of_k.data[i], grad_k[i])) return false;
  for (size_t i = 0; i < grad_v.size(); ++i)
    if (!near(of_v.data[i], grad_v[i])) return false;
  return true;
}

bool all_are_right() { return attention_is_right(false) && attention_is_right(true); }

}  // namespace
}  // namespace fastops::cuda

int main() { return in_every_schedule(fastops::cuda::all_are_right); }
