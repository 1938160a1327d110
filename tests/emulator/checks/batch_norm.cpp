// batch_norm with a residual and ReLU in training, forward and backward: planes and rows, channels of one and of
// several parts, whose means differ.
#include "batch_norm/cuda/batch_norm.cuh"

#include <cmath>

#include "check.h"

namespace fastops::cuda {
namespace {

struct Case {
  int64_t outer, channels, inner, parts;
  int lanes;
  bool vectors;
};

template <class Pass>
void fill(Pass& pass, const Case& c) {
  pass.outer = c.outer;
  pass.channels = c.channels;
  pass.inner = c.inner;
  pass.units = units_of<kVector<float>>(c.outer, c.inner);
  pass.parts = c.parts;
  pass.lanes = c.lanes;
  pass.vectors = c.vectors;
  pass.training = pass.single = true;
  pass.kind = ActivationKind::relu;
}

template <class Pass>
bool run(Pass pass, const Case& c) {
  const bool rows = c.inner == 1;
  const int64_t tile = c.lanes * kVector<float>, tiles = rows ? (c.channels + tile - 1) / tile : c.channels;
  const auto sweep = [&](bool with_sums) {
    pass.with_sums = with_sums;
    const size_t shared = rows ? kThreads * sizeof(ChannelSums) + static_cast<size_t>(tile) * sizeof(Channel<float>)
                               : kThreads / 32 * sizeof(ChannelSums) + sizeof(Channel<float>);
    const Launch how{{"sweep"}, tiles * c.parts, kThreads, with_sums ? shared : 0, nullptr};
    return succeeded(rows ? launch(how, batch_norm_rows_kernel<Pass>, pass)
                          : launch(how, batch_norm_planes_kernel<Pass>, pass));
  };
  if (!sweep(true)) return false;
  if (c.parts == 1) return true;
  const Launch finish{{"finish"}, (c.channels + 7) / 8, kThreads, 0, nullptr};
  return succeeded(launch(finish, batch_norm_finish_kernel<Pass>, pass)) && sweep(false);
}

bool near(float actual, double expected) { return std::abs(actual - expected) <= 1e-4 * (1 + std::abs(expected)); }

bool batch_norm_is_right(const Case& c) {
  const size_t channels = static_cast<size_t>(c.channels), count = static_cast<size_t>(c.outer * c.inner);
  const size_t all = channels * count;
  const Guarded<float> x(all), more(all), y(all), grad_y(all), grad_x(all), grad_more(all);
  const Guarded<float> gamma(channels), beta(channels), mean(channels), rstd(channels), running_mean(channels),
      running_var(channels), grad_gamma(channels), grad_beta(channels), numbers(2 * channels);
  const Guarded<ChannelSums> partial(static_cast<size_t>(c.parts) * channels);
  const auto at = [&](size_t channel, size_t i) {
    const size_t inner = static_cast<size_t>(c.inner);
    return (i / inner * channels + channel) * inner + i % inner;
  };
  for (size_t channel = 0; channel < channels; ++channel) {
    gamma[channel] = 1 + static_cast<float>(channel % 3);
    beta[channel] = static_cast<float>(channel % 5) - 2;
    running_mean[channel] = 1;
    running_var[channel] = 2;
    for (size_t i = 0; i < count; ++i) {
      x[at(channel, i)] = static_cast<float>(i * 37 % 11 + channel) + static_cast<float>(8 * i / count);
      more[at(channel, i)] = static_cast<float>(i % 5) - 2;
      grad_y[at(channel, i)] = static_cast<float>(i * 7 % 13) - 5;
    }
  }
  Forward<float> forward{};
  fill(forward, c);
  forward.x = x.get();
  forward.more = more.get();
  forward.gamma = gamma.get();
  forward.beta = beta.get();
  forward.partial = partial.get();
  forward.eps = 0.5;
  forward.momentum = 0.25;
  forward.y = y.get();
  forward.mean = mean.get();
  forward.rstd = rstd.get();
  forward.running_mean = running_mean.get();
  forward.running_var = running_var.get();
  Backward<float> backward{};
  fill(backward, c);
  backward.x = x.get();
  backward.more = y.get();
  backward.from_output = true;
  backward.gamma = gamma.get();
  backward.beta = beta.get();
  backward.partial = partial.get();
  backward.grad_y = grad_y.get();
  backward.mean = mean.get();
  backward.rstd = rstd.get();
  backward.grad_x = grad_x.get();
  backward.grad_residual = grad_more.get();
  backward.grad_gamma = grad_gamma.get();
  backward.grad_beta = grad_beta.get();
  backward.slope = numbers.get();
  backward.offset = numbers.get() + channels;
  if (!run(forward, c) || !run(backward, c)) return false;

  const double n = static_cast<double>(count);
  for (size_t channel = 0; channel < channels; ++channel) {
    double m = 0, squares = 0, sum = 0, product = 0;
    for (size_t i = 0; i < count; ++i) m += x[at(channel, i)] / n;
    for (size_t i = 0; i < count; ++i) squares += (x[at(channel, i)] - m) * (x[at(channel, i)] - m);
    const double r = 1 / std::sqrt(squares / n + 0.5);
    if (!near(mean[channel], m) || !near(rstd[channel], r) || !near(running_mean[channel], 0.75 + 0.25 * m) ||
        !near(running_var[channel], 1.5 + 0.25 * squares / (n - 1)))
      return false;
    const auto g = [&](size_t i) { return y[at(channel, i)] > 0 ? static_cast<double>(grad_y[at(channel, i)]) : 0.0; };
    for (size_t i = 0; i < count; ++i) {
      const double d = x[at(channel, i)] - m, z = gamma[channel] * d * r + beta[channel] + more[at(channel, i)];
      if (!near(y[at(channel, i)], z > 0 ? z : 0)) return false;
      sum += g(i);
      product += g(i) * d;
    }
    if (!near(grad_beta[channel], sum) || !near(grad_gamma[channel], r * product)) return false;
    for (size_t i = 0; i < count; ++i) {
      const double d = x[at(channel, i)] - m;
      if (!near(grad_more[at(channel, i)], g(i))) return false;
      if (!near(grad_x[at(channel, i)], gamma[channel] * r * (g(i) - sum / n - d * r * r * product / n))) return false;
    }
  }
  return true;
}

bool all_are_right() {
  return batch_norm_is_right({3, 2, 43, 1, 1, false}) && batch_norm_is_right({2, 3, 3000, 3, 1, true}) &&
         batch_norm_is_right({40, 20, 1, 1, 4, true}) && batch_norm_is_right({300, 139, 1, 3, 32, false});
}

}  // namespace
}  // namespace fastops::cuda

int main() { return in_every_schedule(fastops::cuda::all_are_right); }
