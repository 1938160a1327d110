// A step of SGD and one of Adam over several tensors, some of which are not whole vectors.
#include "optim/cuda/optim.cuh"

#include <cmath>

#include "check.h"

namespace fastops::cuda {
namespace {

constexpr int64_t kSizes[] = {5, 4100, 2, 2048};

bool near(float actual, double expected) { return std::abs(actual - expected) <= 1e-5 * (1 + std::abs(expected)); }

struct Tensors {
  Guarded<float> p, grad, m, v;

  explicit Tensors(int64_t n) : p(static_cast<size_t>(n)), grad(p.size()), m(p.size()), v(p.size()) {
    for (size_t i = 0; i < p.size(); ++i) {
      p[i] = static_cast<float>(i % 7) - 3;
      grad[i] = static_cast<float>(i % 5) - 2;
      m[i] = static_cast<float>(i % 3);
      v[i] = static_cast<float>(i % 4 + 1);
    }
  }
};

// check(tensors, i) of every element after a step of the kernel.
template <class Call, class Numbers, class Kernel, class Piece, class Check>
bool step_is_right(const Numbers& numbers, Kernel kernel, Piece piece_of, Check check) {
  std::vector<Tensors> tensors, before;
  StepTask<Call, Numbers> task{};
  task.numbers = numbers;
  int64_t blocks = 0;
  for (const int64_t n : kSizes) {
    tensors.emplace_back(n);
    before.emplace_back(n);
    task.pieces[task.count] = piece_of(tensors.back(), n);
    task.vectors[task.count] = n % 4 == 0;
    task.first_block[task.count++] = static_cast<int>(blocks);
    blocks += quotient_up(n, kStepRun<float>);
  }
  if (!succeeded(launch({{"step"}, blocks, kThreads, 0, nullptr}, kernel, task))) return false;
  for (size_t t = 0; t < tensors.size(); ++t)
    for (size_t i = 0; i < tensors[t].p.size(); ++i)
      if (!check(before[t], tensors[t], i)) return false;
  return true;
}

bool all_are_right() {
  const SgdNumbers<float> sgd{-0.5f, 0.5f, 0.75f, 0.25f, true, true, true, false};
  const AdamNumbers<float> adam{0, 0.5f, 1, 0.75f, 0.25f, 0.25f, false, true, true, false, false};
  return step_is_right<SgdStep>(
             sgd, sgd_kernel<float>,
             [](Tensors& t, int64_t n) { return SgdStep::Piece{t.p.get(), t.grad.get(), t.m.get(), n}; },
             [](const Tensors& old, const Tensors& now, size_t i) {
               const double g = old.grad[i] + 0.25 * old.p[i], m = 0.5 * old.m[i] + 0.75 * g;
               return near(now.m[i], m) && near(now.p[i], old.p[i] - 0.5 * (g + 0.5 * m));
             }) &&
         step_is_right<AdamStep>(
             adam, adam_kernel<float>,
             [](Tensors& t, int64_t n) {
               return AdamStep::Piece{t.p.get(), t.grad.get(), t.m.get(), t.v.get(), nullptr, n, -0.5, 2};
             },
             [](const Tensors& old, const Tensors& now, size_t i) {
               const double m = old.m[i] + 0.25 * (old.grad[i] - old.m[i]);
               const double v = 0.75 * old.v[i] + 0.25 * old.grad[i] * old.grad[i];
               return near(now.m[i], m) && near(now.v[i], v) &&
                      near(now.p[i], 0.5 * old.p[i] - 0.5 * m / (std::sqrt(v) / 2 + 1));
             });
}

}  // namespace
}  // namespace fastops::cuda

int main() { return in_every_schedule(fastops::cuda::all_are_right); }
