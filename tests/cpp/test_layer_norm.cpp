// Layer normalisation against a plain loop in double, on every tier of this machine: rows with strides and channels
// first, every operand between pages that fault, and the same bits for any number of threads.
#include "random.h"

namespace {

template <class T>
void expect(const char* what, const LayerNormForward& c, double got, double wanted) {
  const double bound =
      (sizeof(T) == 8 ? 1e-12 : 1e-4) * (1 + std::fabs(wanted)) * std::sqrt(static_cast<double>(c.outer));
  if (std::fabs(got - wanted) <= bound || ++failures > 20) return;
  std::printf("FAIL %s %s %lldx%lldx%lld rms %d: got %.9g, wanted %.9g\n", isa_name(isa_used()), what,
              static_cast<long long>(c.outer), static_cast<long long>(c.size), static_cast<long long>(c.inner), c.rms,
              got, wanted);
}

template <class T>
void check(int64_t outer, int64_t size, int64_t inner) {
  const bool at_end = between(0, 1) != 0, rms = between(0, 1) != 0;
  const int64_t stride = size * inner + between(0, 3), rows = outer * inner, g_stride = size + between(0, 3);
  const Numbers<T> x((outer - 1) * stride + size * inner, at_end), g((rows - 1) * g_stride + size, at_end),
      w(size, at_end), b(size, at_end), y(rows * size, at_end), mean(rows, at_end), rstd(rows, at_end),
      dx(rows * size, at_end), dw(size, at_end), db(size, at_end);
  const LayerNormForward c{kDType<T>, kDType<T>, rms, 1e-2, outer, size, inner, stride};
  const LayerNormBackward d{kDType<T>, kDType<T>, rms, true, true, true, outer, size, inner, stride, g_stride};
  Bits bits;
  for (const Team& team : kTeams) {
    run_call(c, {x.data(), w.data(), b.data(), y.data(), mean.data(), rstd.data()}, team);
    run_call(d, {g.data(), x.data(), w.data(), mean.data(), rstd.data(), dx.data(), dw.data(), db.data()}, team);
    bits.same("layer_norm", team,
              {{y.data(), y.bytes()}, {dx.data(), dx.bytes()}, {dw.data(), dw.bytes()}, {db.data(), db.bytes()}});
  }
  std::vector<double> grad_w(static_cast<size_t>(size)), grad_b(static_cast<size_t>(size));
  for (int64_t row = 0; row < rows; ++row) {
    const auto in = [&](int64_t j) -> double { return x.data()[row / inner * stride + j * inner + row % inner]; };
    double average = 0, variance = 0, of_g = 0, of_gn = 0;
    const double n = static_cast<double>(size);
    for (int64_t j = 0; j < size; ++j) average += rms ? 0 : in(j) / n;
    for (int64_t j = 0; j < size; ++j) variance += (in(j) - average) * (in(j) - average) / n;
    const double scale = 1 / std::sqrt(variance + c.eps);
    for (int64_t j = 0; j < size; ++j) {
      const double normal = (in(j) - average) * scale, grad = g.data()[row * g_stride + j];
      expect<T>("y", c, y.data()[row * size + j], normal * w.data()[j] + b.data()[j]);
      grad_w[static_cast<size_t>(j)] += grad * normal;
      grad_b[static_cast<size_t>(j)] += grad;
      of_g += rms ? 0 : grad * w.data()[j] / n;
      of_gn += grad * w.data()[j] * normal / n;
    }
    for (int64_t j = 0; j < size; ++j) {
      const double normal = (in(j) - average) * scale, grad = g.data()[row * g_stride + j] * w.data()[j];
      expect<T>("grad_x", c, dx.data()[row * size + j], scale * (grad - of_g - normal * of_gn));
    }
  }
  for (int64_t j = 0; j < size; ++j) {
    expect<T>("grad_weight", c, dw.data()[j], grad_w[static_cast<size_t>(j)]);
    expect<T>("grad_bias", c, db.data()[j], grad_b[static_cast<size_t>(j)]);
  }
}

}  // namespace

int main(int argc, char** argv) {
  return run_tiers(argc, argv, []<class T>(bool quick) {
    if constexpr (sizeof(T) >= 4) {
      for (int i = 0; i < (quick ? 40 : 200); ++i) {
        check<T>(between(1, 40), between(1, 70), 1);
        check<T>(between(1, 4), between(1, 70), between(2, 40));
      }
      check<T>(3, 5000, 1);
      check<T>(2100, 3, 1);
    }
  });
}
