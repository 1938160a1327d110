// The fused network on integers, whose results are exact: every way to form the products, weights that stay and that
// come layer by layer, one tile and two at a time, rows that fill no tile, widths that fill no step, operands that are
// read 16 bytes at a time and not.
#include "mlp/cuda/mlp.cuh"

#include "check.h"

namespace fastops::cuda {
namespace {

constexpr int kLayers = 3;
constexpr int64_t kWidths[kLayers + 1] = {24, 35, 40, 9};

int weight_value(int l, int64_t i, int64_t j) { return (i * 7 + j * 3 + l) % 11 == 0 ? (i + j) % 2 == 0 ? 1 : -1 : 0; }
int bias_value(int l, int64_t i) { return static_cast<int>((i + l) % 3) - 1; }
int x_value(int64_t i, int64_t j) { return static_cast<int>((i * 5 + j * 3 + i * j) % 3) - 1; }
int g_value(int64_t i, int64_t j) { return static_cast<int>((i * 2 + j * 5 + i * j) % 3) - 1; }

template <class S>
S stored(int value) {
  S result;
  to_storage(static_cast<float>(value), &result);
  return result;
}

using Matrix2 = std::vector<std::vector<int>>;
template <class Value>
Matrix2 matrix(int64_t rows, int64_t cols, Value value) {
  Matrix2 result(static_cast<size_t>(rows), std::vector<int>(static_cast<size_t>(cols)));
  for (size_t i = 0; i < result.size(); ++i)
    for (size_t j = 0; j < result[i].size(); ++j)
      result[i][j] = value(static_cast<int64_t>(i), static_cast<int64_t>(j));
  return result;
}

// Rows of `stride` elements, of which those behind the last column hold NaNs; the last row ends with its last column.
template <class S>
Guarded<S> put(const Matrix2& values, int64_t stride) {
  const size_t cols = values[0].size(), step = static_cast<size_t>(stride);
  Guarded<S> result((values.size() - 1) * step + (cols + 7) / 8 * 8);
  for (size_t i = 0; i < values.size(); ++i)
    for (size_t j = 0; j < cols; ++j) result[i * step + j] = stored<S>(values[i][j]);
  return result;
}
template <class S>
bool equal(const S* actual, int64_t stride, const Matrix2& expected) {
  for (size_t i = 0; i < expected.size(); ++i)
    for (size_t j = 0; j < expected[i].size(); ++j)
      if (to_compute(actual[i * static_cast<size_t>(stride) + j]) != to_compute(stored<S>(expected[i][j])))
        return false;
  return true;
}

// pad: elements between rows of x and of the output's gradient, 0 or 8 for whole vectors.
template <class Kind>
bool network_is_right(bool resident, int stages, int64_t pad, ActivationKind hidden) {
  using S = typename Kind::S;
  const int64_t m = 2 * Kind::Forward::kTileM + 5, blocks = 2;
  const bool vectors = pad % 8 == 0;

  std::vector<Matrix2> y{matrix(m, kWidths[0], x_value)};
  for (int l = 0; l < kLayers; ++l)
    y.push_back(matrix(m, kWidths[l + 1], [&](int64_t i, int64_t j) {
      int sum = bias_value(l, j);
      for (int64_t k = 0; k < kWidths[l]; ++k)
        sum += y[static_cast<size_t>(l)][static_cast<size_t>(i)][static_cast<size_t>(k)] * weight_value(l, j, k);
      return l < kLayers - 1 && sum < 0 ? 0 : sum;
    }));
  std::vector<Matrix2> g(kLayers + 1);
  g[kLayers] = matrix(m, kWidths[kLayers], g_value);
  for (int l = kLayers - 1; l >= 0; --l)
    g[static_cast<size_t>(l)] = matrix(m, kWidths[l], [&](int64_t i, int64_t j) {
      int sum = 0;
      for (int64_t n = 0; n < kWidths[l + 1]; ++n)
        sum += g[static_cast<size_t>(l) + 1][static_cast<size_t>(i)][static_cast<size_t>(n)] * weight_value(l, n, j);
      return l > 0 && y[static_cast<size_t>(l)][static_cast<size_t>(i)][static_cast<size_t>(j)] <= 0 ? 0 : sum;
    });

  MlpForwardTask<S> forward{};
  MlpBackwardTask<S> backward{};
  MlpForward& f = forward.call;
  MlpBackward& b = backward.call;
  MlpForward::Pointers& to = forward.pointers;
  MlpBackward::Pointers& back = backward.pointers;
  f.shape.m = m;
  f.shape.layers = kLayers;
  for (int l = 0; l <= kLayers; ++l) f.shape.widths[l] = kWidths[l];
  b.shape = f.shape;
  const int64_t stride = mlp_hidden_stride(f.shape);
  const Guarded<S> x = put<S>(y[0], kWidths[0] + pad), grad_y = put<S>(g[kLayers], kWidths[kLayers] + pad + 7);
  std::vector<Guarded<S>> weights, biases, grad_w, grad_b;
  for (int l = 0; l < kLayers; ++l) {
    weights.push_back(put<S>(
        matrix(kWidths[l + 1], kWidths[l], [&](int64_t i, int64_t j) { return weight_value(l, i, j); }), kWidths[l]));
    biases.push_back(put<S>(matrix(1, kWidths[l + 1], [&](int64_t, int64_t j) { return bias_value(l, j); }), 0));
    grad_w.emplace_back(static_cast<size_t>(kWidths[l + 1] * kWidths[l]));
    grad_b.emplace_back(static_cast<size_t>(kWidths[l + 1]));
    to.w[l] = back.w[l] = weights.back().get();
    to.bias[l] = biases.back().get();
    back.grad_w[l] = grad_w.back().get();
    back.grad_bias[l] = grad_b.back().get();
  }
  const Guarded<S> out(static_cast<size_t>(m * kWidths[kLayers])), grad_x(static_cast<size_t>(m * kWidths[0]));
  const bool saves_input = hidden != ActivationKind::relu;
  const auto matrices = static_cast<int64_t>(saves_input ? 2 : 1) * (kLayers - 1);
  const Guarded<S> saved(static_cast<size_t>(matrices * m * stride)), gradients(static_cast<size_t>(m * stride));
  to.x = back.x = x.get();
  f.x_row_stride = b.x_row_stride = kWidths[0] + pad;
  f.hidden = b.hidden = {hidden, 0, 0};
  f.output = b.output = {};
  to.y = out.get();
  to.hidden_outputs = saved.get();
  back.hidden_outputs = saved.get();
  back.grad_y = grad_y.get();
  b.grad_y_row_stride = kWidths[kLayers] + pad + 7;
  back.grad_x = grad_x.get();

  forward.hidden = backward.hidden = parameters<S>(f.hidden);
  forward.hidden_stride = backward.hidden_stride = stride;
  forward.save_pre_activations = saves_input;
  forward.x_vectors = backward.x_vectors = vectors;
  forward.resident = resident;
  forward.stages = backward.stages = stages;
  backward.from_output = !saves_input;
  backward.gradients = gradients.get();
  backward.partial_size = mlp_partial_offset(b.shape, kLayers);
  const Guarded<float> partial(static_cast<size_t>(blocks * backward.partial_size));
  backward.partial = partial.get();
  backward.grad_y_vectors = vectors;
  backward.grad_x_vectors = kWidths[0] % kVector<S> == 0;

  const size_t forward_shared =
      kLayers * Kind::kWidth * sizeof(float) +
      static_cast<size_t>((resident ? kLayers : 1) * kMlpWeights<Kind> + stages * kMlpForwardTile<Kind>) * sizeof(S);
  permit_shared<mlp_forward_kernel<Kind>>(forward_shared);
  if (!succeeded(launch({{"forward"}, blocks, Kind::Forward::kThreads, forward_shared, nullptr},
                        mlp_forward_kernel<Kind>, forward)))
    return false;
  if (!equal(out.get(), kWidths[kLayers], y[kLayers])) return false;
  for (size_t l = 1; l < kLayers; ++l)
    if (!equal(saved.get() + static_cast<int64_t>(l - 1) * m * stride, stride, y[l])) return false;

  const size_t backward_shared =
      static_cast<size_t>(kMlpWeights<Kind> + stages * 2 * kMlpBackwardTile<Kind>) * sizeof(S);
  permit_shared<mlp_backward_kernel<Kind>>(backward_shared);
  if (!succeeded(launch({{"backward"}, blocks, Kind::InputGradient::kThreads, backward_shared, nullptr},
                        mlp_backward_kernel<Kind>, backward)))
    return false;
  const int64_t reducers = (backward.partial_size + kReduceThreads - 1) / kReduceThreads;
  if (!succeeded(launch({{"reduce"}, reducers, kReduceThreads, 0, nullptr}, mlp_reduce_kernel<S>, backward, blocks)))
    return false;
  if (!equal(grad_x.get(), kWidths[0], g[0])) return false;
  for (size_t l = 0; l < kLayers; ++l) {
    const auto sum = [&](int64_t n, int64_t k) {
      int total = 0;
      for (size_t i = 0; i < static_cast<size_t>(m); ++i)
        total += g[l + 1][i][static_cast<size_t>(n)] * (k < 0 ? 1 : y[l][i][static_cast<size_t>(k)]);
      return total;
    };
    if (!equal(grad_w[l].get(), kWidths[l], matrix(kWidths[l + 1], kWidths[l], sum))) return false;
    if (!equal(grad_b[l].get(), 0, matrix(1, kWidths[l + 1], [&](int64_t, int64_t n) { return sum(n, -1); })))
      return false;
  }
  return true;
}

bool all_are_right() {
  using Half = MlpMma16<bf16_t, 64>;
  // threshold(x, 0, 0) is relu that saves its input.
  return network_is_right<Half>(true, 2, 0, ActivationKind::relu) &&
         network_is_right<Half>(false, 2, 3, ActivationKind::relu) &&
         network_is_right<Half>(true, 1, 0, ActivationKind::threshold) &&
         network_is_right<MlpSimt<64>>(true, 1, 0, ActivationKind::relu) &&
         network_is_right<MlpSimt<64>>(false, 1, 3, ActivationKind::relu) &&
         network_is_right<MlpTf32<64>>(true, 1, 0, ActivationKind::relu);
}

}  // namespace
}  // namespace fastops::cuda

int main() {
  simt::settings().shared = simt::kMostShared;
  return in_every_schedule(fastops::cuda::all_are_right);
}
