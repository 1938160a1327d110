// Inverted residual blocks against plain loops in float64, with every operand between guard pages.
#include <cmath>
#include <cstdio>
#include <random>

#include "../../csrc/kernels/inverted_residual/inverted_residual.h"
#include "tiers.h"

namespace {

std::mt19937 generator(11);

// Numbers of T between guard pages, and the same in float64.
template <class T>
struct Numbers {
  Pages pages;
  std::vector<double> values;

  Numbers(int64_t count, bool at_end, double scale)
      : pages(static_cast<size_t>(count) * sizeof(T), at_end, sizeof(T)), values(static_cast<size_t>(count)) {
    if (scale == 0) return;
    std::normal_distribution<double> normal;
    for (size_t i = 0; i < values.size(); ++i) {
      data()[i] = static_cast<T>(scale * normal(generator));
      values[i] = static_cast<double>(data()[i]);
    }
  }
  T* data() { return static_cast<T*>(pages.data()); }
};

struct Function {
  ActivationKind kind;
  double (*f)(double);
};
const Function kFunctions[] = {
    {ActivationKind::identity, [](double z) { return z; }},
    {ActivationKind::relu, [](double z) { return z > 0 ? z : 0; }},
    {ActivationKind::relu6, [](double z) { return std::fmin(6, z > 0 ? z : 0); }},
    {ActivationKind::silu, [](double z) { return z / (1 + std::exp(-z)); }},
};

// y[m, n] = f(x[m, k] w[n, k]^T + bias + residual)
std::vector<double> product(const std::vector<double>& x, const std::vector<double>& w, const std::vector<double>& bias,
                            const double* residual, int64_t n, int64_t k, const Function& function) {
  const int64_t m = static_cast<int64_t>(x.size()) / k;
  std::vector<double> y(static_cast<size_t>(m * n));
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) {
      double sum = (bias.empty() ? 0 : bias[j]) + (residual != nullptr ? residual[i * n + j] : 0);
      for (int64_t p = 0; p < k; ++p) sum += x[i * k + p] * w[j * k + p];
      y[i * n + j] = function.f(sum);
    }
  return y;
}

template <class T>
void test_block(InvertedResidualForward call, int step, const Team& team, bool at_end) {
  call.dtype = kDType<T>;
  const Function &f = kFunctions[step % 4], &g = kFunctions[step / 3 % 4], &h = kFunctions[step / 7 % 4];
  call.expand.kind = f.kind;
  call.depthwise.kind = g.kind;
  call.project.kind = h.kind;
  if (!call.with_expand) call.in_channels = call.wide_channels;
  if (!call.with_project) call.out_channels = call.wide_channels;
  for (int i = 0; i < 2; ++i)
    call.out[i] = (call.in[i] + 2 * call.padding[i] - call.dilation[i] * (call.kernel[i] - 1) - 1) / call.stride[i] + 1;
  const int64_t wide = call.wide_channels, window = call.kernel[0] * call.kernel[1];
  const int64_t outputs = call.batch * call.out[0] * call.out[1] * call.out_channels;
  Numbers<T> x(call.batch * call.in[0] * call.in[1] * call.in_channels, at_end, 1), y(outputs, at_end, 0);
  Numbers<T> we(wide * call.in_channels, at_end, 0.3), be(wide, at_end, 0.3), wd(wide * window, at_end, 0.3),
      bd(wide, at_end, 0.3), wp(call.out_channels * wide, at_end, 0.3), bp(call.out_channels, at_end, 0.3),
      residual(outputs, at_end, 1);
  const bool biases = step % 3 != 0;
  const auto bias = [&](Numbers<T>& numbers) { return biases ? numbers.data() : nullptr; };
  const InvertedResidualForward::Weights weights{we.data(), bias(be), wd.data(), bias(bd), wp.data(), bias(bp)};

  const auto plan = kernels(call.dtype).planners.plan(call, {team.threads});
  if (plan.runner == nullptr && wide > 100) return;  // more than the cache
  if (plan.runner == nullptr) std::abort();
  const Pages packed(plan.packed, at_end, 64);
  plan.pack(&weights, packed.data());
  const Workspace workspace(plan.workspace);
  plan.run({x.data(), packed.data(), y.data(), call.with_residual ? residual.data() : nullptr}, workspace.get(), team);

  const std::vector<double> none;
  std::vector<double> e = x.values;
  if (call.with_expand) e = product(x.values, we.values, biases ? be.values : none, nullptr, wide, call.in_channels, f);
  std::vector<double> d(static_cast<size_t>(call.batch * call.out[0] * call.out[1] * wide));
  for (int64_t i = 0; i < static_cast<int64_t>(d.size()); ++i) {
    const int64_t c = i % wide, q = i / wide % call.out[1], p = i / wide / call.out[1] % call.out[0];
    const int64_t b = i / wide / call.out[1] / call.out[0];
    double sum = biases ? bd.values[c] : 0;
    for (int64_t t = 0; t < window; ++t) {
      const int64_t row = p * call.stride[0] - call.padding[0] + t / call.kernel[1] * call.dilation[0];
      const int64_t column = q * call.stride[1] - call.padding[1] + t % call.kernel[1] * call.dilation[1];
      if (row >= 0 && row < call.in[0] && column >= 0 && column < call.in[1])
        sum += wd.values[c * window + t] * e[((b * call.in[0] + row) * call.in[1] + column) * wide + c];
    }
    d[i] = g.f(sum);
  }
  if (call.with_project)
    d = product(d, wp.values, biases ? bp.values : none, call.with_residual ? residual.values.data() : nullptr,
                call.out_channels, wide, h);

  double most = 1;
  for (const double value : d) most = std::fmax(most, std::fabs(value));
  const double bound = most * 0x1p-24 * 64 * std::sqrt(static_cast<double>(wide + 64));
  for (size_t i = 0; i < d.size(); ++i)
    if (!(std::fabs(static_cast<double>(y.data()[i]) - d[i]) <= bound)) {
      if (++failures <= 20)
        std::printf("%s: step %d, %lld to %lld to %lld channels, %lld x %lld: y[%zu] is %g, expected %g\n",
                    isa_name(isa_used()), step, static_cast<long long>(call.in_channels), static_cast<long long>(wide),
                    static_cast<long long>(call.out_channels), static_cast<long long>(call.in[0]),
                    static_cast<long long>(call.in[1]), i, static_cast<double>(y.data()[i]), d[i]);
      return;
    }
}

template <class T>
void test_dtype(bool quick) {
  std::uniform_int_distribution<int64_t> any(1, 1 << 20);
  const auto in = [&](int64_t low, int64_t high) { return low + any(generator) % (high - low + 1); };
  for (int step = 0; step < (quick ? 80 : 240); ++step) {
    InvertedResidualForward call{};
    call.batch = in(1, 3);
    call.in_channels = in(1, 40);
    call.wide_channels = in(1, step % 8 == 0 ? 600 : 70);
    call.out_channels = in(1, 40);
    call.with_expand = step % 5 != 0;
    call.with_project = step % 5 == 0 || step % 4 != 0;
    call.with_residual = call.with_project && step % 2 == 0;
    for (int i = 0; i < 2; ++i) {
      call.kernel[i] = in(1, 5);
      call.stride[i] = in(1, 3);
      call.padding[i] = in(0, 3);
      call.dilation[i] = in(1, 2);
      const int64_t least = call.dilation[i] * (call.kernel[i] - 1) + 1 - 2 * call.padding[i];
      call.in[i] = in(least > 1 ? least : 1, 24);
    }
    test_block<T>(call, step, kTeams[step % 4], step % 2 == 0);
  }
  // Two threads share one small image, as the last blocks of a mobile network are given it.
  InvertedResidualForward call{};
  call.batch = 1;
  call.in_channels = call.out_channels = 40;
  call.wide_channels = 240;
  call.with_expand = call.with_project = call.with_residual = true;
  for (int i = 0; i < 2; ++i) {
    call.kernel[i] = 3;
    call.stride[i] = call.padding[i] = call.dilation[i] = 1;
    call.in[i] = 7;
  }
  asked = 0;
  test_block<T>(call, 1, {2, run_and_note}, true);
  if (asked != 2 && ++failures <= 20) std::printf("one image of 7x7 asked for %d threads, not 2\n", asked);
}

}  // namespace

int main(int argc, char** argv) {
  return run_tiers(argc, argv, []<class T>(bool quick) {
    if constexpr (sizeof(T) == 4) test_dtype<T>(quick);
  });
}
