// Networks in one kernel, forward and backward, against plain loops in float64, with every operand between guard pages.
#include <cmath>
#include <cstdio>
#include <memory>
#include <random>

#include "../../csrc/kernels/mlp/mlp.h"
#include "tiers.h"

namespace {

std::mt19937 generator(7);

struct Function {
  ActivationKind kind;
  double (*f)(double);
  double (*slope)(double);  // at z
};
const Function kFunctions[] = {
    {ActivationKind::identity, [](double z) { return z; }, [](double) { return 1.0; }},
    {ActivationKind::relu, [](double z) { return z > 0 ? z : 0; }, [](double z) { return z > 0 ? 1.0 : 0.0; }},
    {ActivationKind::tanh, [](double z) { return std::tanh(z); },
     [](double z) { return 1 - std::tanh(z) * std::tanh(z); }},
    {ActivationKind::silu, [](double z) { return z / (1 + std::exp(-z)); },
     [](double z) {
       const double s = 1 / (1 + std::exp(-z));
       return s + z * s * (1 - s);
     }},
};

// Numbers of T between guard pages, and the same in float64.
template <class T>
struct Numbers {
  Pages pages;
  std::vector<double> values;

  Numbers(int64_t count, bool at_end, bool random)
      : pages(static_cast<size_t>(count) * sizeof(T), at_end, sizeof(T)), values(static_cast<size_t>(count)) {
    if (!random) return;
    std::normal_distribution<double> normal;
    for (size_t i = 0; i < values.size(); ++i) {
      data()[i] = static_cast<T>(0.5 * normal(generator));
      values[i] = static_cast<double>(data()[i]);
    }
  }
  T* data() { return static_cast<T*>(pages.data()); }
};

template <class T>
using Matrices = std::vector<std::unique_ptr<Numbers<T>>>;

template <class T>
void compare(Numbers<T>& found, const std::vector<double>& expected, const char* what, const MlpShape& shape) {
  double most = 1;
  for (const double value : expected) most = std::max(most, std::fabs(value));
  const double bound = most * (sizeof(T) == 4 ? 0x1p-24 : 0x1p-53) * 64 * std::sqrt(static_cast<double>(shape.m + 64));
  for (size_t i = 0; i < expected.size(); ++i)
    if (!(std::fabs(static_cast<double>(found.data()[i]) - expected[i]) <= bound)) {
      if (++failures <= 20)
        std::printf("%s: m %lld, %d layers, %s at %zu: %g, expected %g\n", isa_name(isa_used()),
                    static_cast<long long>(shape.m), shape.layers, what, i, static_cast<double>(found.data()[i]),
                    expected[i]);
      return;
    }
}

template <class T>
void test_network(int64_t m, const std::vector<int64_t>& widths, const Function& hidden, const Function& output,
                  const Team& team, bool at_end, unsigned wanted) {
  MlpShape shape{kDType<T>, Precision::highest, m, static_cast<int>(widths.size()) - 1, {}};
  for (size_t l = 0; l < widths.size(); ++l) shape.widths[l] = widths[l];
  const int layers = shape.layers;
  const int64_t x_stride = widths[0] + 3, g_stride = widths.back() + 2;
  Numbers<T> x((m - 1) * x_stride + widths[0], at_end, true), y(m * widths.back(), at_end, false);
  Numbers<T> g((m - 1) * g_stride + widths.back(), at_end, true);
  Matrices<T> w, bias, grad_w, grad_bias;
  const Activation f{hidden.kind}, h{output.kind};
  Numbers<T> saved(mlp_saved_elements(shape, f, h), at_end, false);
  MlpForward forward{shape, x_stride, f, h};
  MlpForward::Pointers to{};
  for (int l = 0; l < layers; ++l) {
    const int64_t n = widths[l + 1], k = widths[l];
    w.push_back(std::make_unique<Numbers<T>>(n * k, at_end, true));
    bias.push_back(std::make_unique<Numbers<T>>(n, at_end, true));
    grad_w.push_back(std::make_unique<Numbers<T>>(n * k, at_end, false));
    grad_bias.push_back(std::make_unique<Numbers<T>>(n, at_end, false));
    to.w[l] = w[l]->data();
    to.bias[l] = l == 1 ? nullptr : bias[l]->data();
  }
  to.x = x.data();
  to.y = y.data();
  to.hidden_outputs = (wanted & 8) != 0 ? nullptr : saved.data();
  const auto run = [&](const auto& call, const auto& pointers) {
    const auto plan = kernels(kDType<T>).planners.plan(call, {team.threads});
    if (plan.runner == nullptr) std::abort();
    const Workspace workspace(plan.workspace);
    plan.run(pointers, workspace.get(), team);
  };
  run(forward, to);

  // Plain loops: z and y of each layer, then the gradients.
  std::vector<std::vector<double>> zs, ys{std::vector<double>(static_cast<size_t>(m * widths[0]))};
  for (int64_t i = 0; i < m; ++i)
    for (int64_t p = 0; p < widths[0]; ++p) ys[0][i * widths[0] + p] = x.values[i * x_stride + p];
  for (int l = 0; l < layers; ++l) {
    const int64_t n = widths[l + 1], k = widths[l];
    const Function& function = l + 1 == layers ? output : hidden;
    std::vector<double> z(static_cast<size_t>(m * n)), next(static_cast<size_t>(m * n));
    for (int64_t i = 0; i < m; ++i)
      for (int64_t j = 0; j < n; ++j) {
        double sum = l == 1 ? 0 : bias[l]->values[j];
        for (int64_t p = 0; p < k; ++p) sum += w[l]->values[j * k + p] * ys[l][i * k + p];
        z[i * n + j] = sum;
        next[i * n + j] = function.f(sum);
      }
    zs.push_back(z);
    ys.push_back(next);
  }
  compare(y, ys.back(), "y", shape);
  if ((wanted & 8) != 0) return;

  MlpBackward backward{shape, g_stride, x_stride, f, h};
  MlpBackward::Pointers back{};
  Numbers<T> grad_x(m * widths[0], at_end, false);
  back.grad_y = g.data();
  back.x = x.data();
  back.hidden_outputs = saved.data();
  back.grad_x = (wanted & 1) != 0 ? grad_x.data() : nullptr;
  for (int l = 0; l < layers; ++l) {
    back.w[l] = w[l]->data();
    back.grad_w[l] = (wanted & 2) != 0 ? grad_w[l]->data() : nullptr;
    back.grad_bias[l] = (wanted & 4) != 0 && l % 2 == 0 ? grad_bias[l]->data() : nullptr;
  }
  run(backward, back);
  std::vector<double> gradient(static_cast<size_t>(m * widths.back()));
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < widths.back(); ++j) gradient[i * widths.back() + j] = g.values[i * g_stride + j];
  for (int l = layers - 1; l >= 0; --l) {
    const int64_t n = widths[l + 1], k = widths[l];
    const Function& function = l + 1 == layers ? output : hidden;
    for (size_t i = 0; i < gradient.size(); ++i) gradient[i] *= function.slope(zs[l][i]);
    std::vector<double> of_w(static_cast<size_t>(n * k)), of_bias(static_cast<size_t>(n)),
        before(static_cast<size_t>(m * k));
    for (int64_t i = 0; i < m; ++i)
      for (int64_t j = 0; j < n; ++j) {
        const double value = gradient[i * n + j];
        of_bias[j] += value;
        for (int64_t p = 0; p < k; ++p) {
          of_w[j * k + p] += value * ys[l][i * k + p];
          before[i * k + p] += value * w[l]->values[j * k + p];
        }
      }
    if (back.grad_w[l] != nullptr) compare(*grad_w[l], of_w, "grad_w", shape);
    if (back.grad_bias[l] != nullptr) compare(*grad_bias[l], of_bias, "grad_bias", shape);
    gradient = before;
  }
  if (back.grad_x != nullptr) compare(grad_x, gradient, "grad_x", shape);
}

template <class T>
void test_dtype(bool quick) {
  if (sizeof(T) < 4) return;  // a chain of linear layers
  const std::vector<int64_t> networks[] = {{10, 5, 5, 1}, {1, 1}, {3, 17, 2}, {33, 8, 12, 7, 4}, {128, 3, 40}};
  int step = 0;
  for (const auto& widths : networks)
    for (const int64_t m : {1, 31, 32, 33, 100, 1500}) {
      if (quick && m > 100 && widths[0] > 10) continue;
      for (int repeat = 0; repeat < 4; ++repeat, ++step)
        test_network<T>(m, widths, kFunctions[step % 4], kFunctions[step / 2 % 4], kTeams[step % 4], step % 2 == 0,
                        step % 5 == 4 ? 8 : 1 + static_cast<unsigned>(step) % 7);
    }
}

}  // namespace

int main(int argc, char** argv) {
  return run_tiers(argc, argv, []<class T>(bool quick) {
    if constexpr (sizeof(T) >= 4) test_dtype<T>(quick);
  });
}
