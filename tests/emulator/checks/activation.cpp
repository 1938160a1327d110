// Elementwise kernels over rows that are not whole units, with a mask, and PReLU's sum of a channel.
#include "activation/cuda/activation.cuh"

#include "check.h"

namespace fastops::cuda {
namespace {

// hardtanh over rows x cols, rows `stride` apart, with its mask. Of what is not there zeros are read, and zero lies
// inside.
template <class S>
bool hardtanh_is_right(int64_t rows, int64_t cols, int64_t stride, bool vectors) {
  const Guarded<S> x(static_cast<size_t>((rows - 1) * stride + cols)), y(static_cast<size_t>(rows * cols));
  const int64_t mask_row = (cols + 7) / 8;
  const Guarded<uint8_t> mask(static_cast<size_t>(rows * mask_row));
  const auto value = [](int64_t row, int64_t col) { return static_cast<float>((row * 3 + col) % 5 - 2); };
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t col = 0; col < cols; ++col) to_storage(value(row, col), &x[static_cast<size_t>(row * stride + col)]);
  constexpr int n = kMaskUnit<S>;
  const int64_t per_row = (cols + n - 1) / n;
  const ForwardTask<S> task{
      {rows * per_row, per_row, cols, rows},           vectors, x.get(), stride, y.get(), mask.get(),
      parameters<S>({ActivationKind::hardtanh, -1, 1})};
  if (!succeeded(launch({{"hardtanh"}, 2, kThreads, 0, nullptr}, activation_forward_kernel<Hardtanh, S, true>, task)))
    return false;
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t col = 0; col < mask_row * 8; ++col) {
      const float x_value = value(row, col), expected = x_value < -1 ? -1 : x_value > 1 ? 1 : x_value;
      const bool inside = col < cols && x_value == 0;
      if ((mask[static_cast<size_t>(row * mask_row + col / 8)] >> col % 8 & 1) != inside) return false;
      if (col >= cols) continue;
      if (to_compute(y[static_cast<size_t>(row * cols + col)]) != expected) return false;
    }
  return true;
}

bool prelu_sums_are_right() {
  constexpr int64_t count = 5003;
  const Guarded<float> x(count), g(count), grad_x(count), w(1), partial(1);
  float expected = 0;
  for (int64_t i = 0; i < count; ++i) {
    const size_t at = static_cast<size_t>(i);
    x[at] = static_cast<float>(i % 5 - 2);
    g[at] = static_cast<float>(i % 3 - 1);
    expected += x[at] > 0 ? 0 : x[at] * g[at];
  }
  w[0] = 2;
  constexpr int n = kVector<float>;
  constexpr int64_t units = (count + n - 1) / n;
  const PreluTask<float> forward{{units, units, count, 1}, false, false, 1, 1, x.get(), w.get(), 1, nullptr};
  const PreluBackwardTask<float> task{forward, g.get(), grad_x.get(), partial.get(), 1, units};
  if (!succeeded(launch({{"prelu_backward"}, 1, kThreads, kThreads / 32 * sizeof(float), nullptr},
                        prelu_backward_kernel<float>, task)))
    return false;
  for (size_t i = 0; i < count; ++i)
    if (grad_x[i] != (x[i] > 0 ? g[i] : 2 * g[i])) return false;
  return partial[0] == expected;
}

bool all_are_right() {
  return hardtanh_is_right<bf16_t>(3, 4096, 4096, true) && hardtanh_is_right<bf16_t>(7, 43, 50, false) &&
         hardtanh_is_right<float>(1, 9001, 9001, false) && prelu_sums_are_right();
}

}  // namespace
}  // namespace fastops::cuda

int main() { return in_every_schedule(fastops::cuda::all_are_right); }
