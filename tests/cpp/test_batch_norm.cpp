// Batch normalisation against plain loops in double, on every tier of this machine: channels first and last, training
// and not, with a residual and an activation.
#include "random.h"

namespace {

double value(ActivationKind kind, double z) {
  if (kind == ActivationKind::tanh) return std::tanh(z);
  return kind == ActivationKind::silu ? z / (1 + std::exp(-z)) : z;
}
double slope(ActivationKind kind, double z) {
  if (kind == ActivationKind::tanh) return 1 - std::tanh(z) * std::tanh(z);
  const double s = 1 / (1 + std::exp(-z));
  return kind == ActivationKind::silu ? s + z * s * (1 - s) : 1;
}

template <class T>
void check(int64_t outer, int64_t channels, int64_t inner) {
  constexpr ActivationKind kKinds[] = {ActivationKind::identity, ActivationKind::tanh, ActivationKind::silu};
  const Activation activation{kKinds[between(0, 2)]};
  const bool identity = activation.kind == ActivationKind::identity;
  const bool training = outer * inner > 1 && coin(), affine = coin(), adds = coin(), running = !training || coin();
  const int64_t count = outer * channels * inner, each = outer * inner;
  const Numbers<T> x(count), residual(count), y(count), g(count), dx(count), dr(count), gamma(channels), beta(channels),
      dgamma(channels), dbeta(channels), mean(channels), rstd(channels), running_mean(channels), running_var(channels);
  for (int64_t c = 0; c < channels; ++c) running_var[c] = std::fabs(running_var[c]) + T(0.1);
  const std::vector<T> old_mean(running_mean.data(), running_mean.data() + channels);
  const std::vector<T> old_var(running_var.data(), running_var.data() + channels);
  const BatchNormForward f{.dtype = kDType<T>,
                           .param_dtype = kDType<T>,
                           .activation = activation,
                           .training = training,
                           .with_gamma = affine,
                           .with_beta = affine,
                           .with_residual = adds,
                           .with_running = running,
                           .with_stats = true,
                           .eps = 1e-2,
                           .outer = outer,
                           .channels = channels,
                           .inner = inner};
  Saved saved = saved_by_linear(activation);
  if (saved == Saved::output && !adds) saved = Saved::input;
  const bool reads_residual = saved == Saved::input && adds;
  const BatchNormBackward b{.dtype = kDType<T>,
                            .param_dtype = kDType<T>,
                            .activation = activation,
                            .training = training,
                            .saved_kind = saved,
                            .with_gamma = affine,
                            .with_beta = affine,
                            .with_residual = reads_residual,
                            .with_grad_x = true,
                            .with_grad_gamma = affine,
                            .with_grad_beta = affine,
                            .with_grad_residual = adds && !identity,
                            .outer = outer,
                            .channels = channels,
                            .inner = inner};
  Bits bits;
  for (const Team& team : kTeams) {
    std::copy(old_mean.begin(), old_mean.end(), running_mean.data());
    std::copy(old_var.begin(), old_var.end(), running_var.data());
    run_call(f,
             {.x = x.data(),
              .gamma = affine ? gamma.data() : nullptr,
              .beta = affine ? beta.data() : nullptr,
              .residual = adds ? residual.data() : nullptr,
              .y = y.data(),
              .mean = mean.data(),
              .rstd = rstd.data(),
              .running_mean = running ? running_mean.data() : nullptr,
              .running_var = running ? running_var.data() : nullptr,
              .momentum = 0.3},
             team);
    run_call(b,
             {.grad_y = g.data(),
              .x = x.data(),
              .gamma = affine ? gamma.data() : nullptr,
              .beta = affine ? beta.data() : nullptr,
              .saved = saved == Saved::output ? y.data()
                       : reads_residual       ? residual.data()
                                              : nullptr,
              .mean = mean.data(),
              .rstd = rstd.data(),
              .grad_x = dx.data(),
              .grad_gamma = dgamma.data(),
              .grad_beta = dbeta.data(),
              .grad_residual = dr.data()},
             team);
    bits.same("batch_norm", team,
              {{y.data(), y.bytes()},
               {dx.data(), dx.bytes()},
               {dr.data(), dr.bytes()},
               {dgamma.data(), dgamma.bytes()},
               {dbeta.data(), dbeta.bytes()},
               {running_mean.data(), running_mean.bytes()},
               {running_var.data(), running_var.bytes()}});
  }

  const double n = double(each);
  for (int64_t c = 0; c < channels; ++c) {
    const auto at = [&](int64_t i) { return (i / inner * channels + c) * inner + i % inner; };
    double average = 0, variance = 0, of_g = 0, of_gx = 0;
    for (int64_t i = 0; i < each; ++i) average += x[at(i)] / n;
    for (int64_t i = 0; i < each; ++i) variance += (x[at(i)] - average) * (x[at(i)] - average) / n;
    const auto c_ = static_cast<size_t>(c);
    if (running) {
      expect<T>("running_mean", running_mean[c], training ? 0.7 * old_mean[c_] + 0.3 * average : old_mean[c_], each);
      expect<T>("running_var", running_var[c],
                training ? 0.7 * old_var[c_] + 0.3 * variance * n / (n - 1) : old_var[c_], each);
    }
    if (!training) average = old_mean[c_], variance = old_var[c_];
    const double scale = 1 / std::sqrt(variance + 1e-2), factor = affine ? double(gamma[c]) : 1;
    const auto grad_z = [&](int64_t i) {
      const double z = factor * (x[at(i)] - average) * scale + (affine ? double(beta[c]) : 0);
      const double sum = z + (adds ? double(residual[at(i)]) : 0);
      expect<T>("y", y[at(i)], value(activation.kind, sum), each);
      return g[at(i)] * slope(activation.kind, sum);
    };
    std::vector<double> grads;
    for (int64_t i = 0; i < each; ++i) {
      grads.push_back(grad_z(i));
      of_g += grads.back();
      of_gx += grads.back() * (x[at(i)] - average) * scale;
    }
    for (int64_t i = 0; i < each; ++i) {
      const double grad = grads[static_cast<size_t>(i)];
      const double less = training ? of_g / n + (x[at(i)] - average) * scale * of_gx / n : 0;
      expect<T>("grad_x", dx[at(i)], factor * scale * (grad - less), each);
      if (adds && !identity) expect<T>("grad_residual", dr[at(i)], grad, each);
    }
    if (!affine) continue;
    expect<T>("grad_gamma", dgamma[c], of_gx, each);
    expect<T>("grad_beta", dbeta[c], of_g, each);
  }
}

}  // namespace

int main(int argc, char** argv) {
  return run_tiers(argc, argv, []<class T>(bool quick) {
    if constexpr (sizeof(T) >= 4) {
      for (int i = 0; i < (quick ? 40 : 200); ++i) {
        check<T>(between(1, 40), between(1, 70), 1);
        check<T>(between(1, 4), between(1, 20), between(2, 70));
      }
      check<T>(3, 4, 5000);
      check<T>(2100, 3, 1);
    }
  });
}
