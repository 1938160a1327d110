// Losses against plain loops in double, on every tier of this machine.
#include "random.h"

namespace {

template <class T>
void check_cross_entropy(int64_t outer, int64_t classes, int64_t inner) {
  const int64_t positions = outer * inner, ignored = coin() ? -100 : between(0, classes - 1);
  const auto reduction = static_cast<Reduction>(between(0, 2));
  const double smoothing = coin() ? 0 : 0.3;
  const bool weighted = coin();
  const int64_t losses = reduction == Reduction::none ? positions : 1;
  const Numbers<T> x(positions * classes), w(classes), y(losses), g(losses), statistics(2 * positions + 1),
      dx(positions * classes);
  for (int64_t c = 0; c < classes; ++c) w[c] = static_cast<T>(std::fabs(double(w[c])) + 0.1);
  const Pages memory(static_cast<size_t>(positions) * 8, coin(), 8);
  int64_t* const t = static_cast<int64_t*>(memory.data());
  for (int64_t p = 0; p < positions; ++p) t[p] = between(0, 4) == 0 ? ignored : between(0, classes - 1);
  const T* const weight = weighted ? w.data() : nullptr;
  const CrossEntropyForward f{kDType<T>, outer, classes, inner, ignored, smoothing, reduction};
  const CrossEntropyBackward b{kDType<T>, outer, classes, inner, ignored, smoothing, reduction};
  int64_t bad = 0;
  Bits bits;
  for (const Team& team : kTeams) {
    run_call(f, {x.data(), t, weight, y.data(), statistics.data(), &bad}, team);
    if (bad != -1 && ++failures < 20) std::printf("FAIL a class is taken for none\n");
    run_call(b, {g.data(), x.data(), t, weight, statistics.data(), dx.data()}, team);
    bits.same("cross_entropy", team, {{y.data(), y.bytes()}, {dx.data(), dx.bytes()}});
  }

  double sum = 0, total = 0, all = 0;
  const auto of = [&](int64_t c) { return weighted ? double(w[c]) : 1; };
  for (int64_t c = 0; c < classes; ++c) all += of(c);
  for (int64_t p = 0; p < positions; ++p) total += t[p] == ignored ? 0 : of(t[p]);
  for (int64_t p = 0; p < positions; ++p) {
    const auto at = [&](int64_t c) { return (p / inner * classes + c) * inner + p % inner; };
    double top = x[at(0)], exponentials = 0, loss = 0;
    for (int64_t c = 1; c < classes; ++c) top = std::fmax(top, x[at(c)]);
    for (int64_t c = 0; c < classes; ++c) exponentials += std::exp(x[at(c)] - top);
    const bool counts = t[p] != ignored;
    const auto share = [&](int64_t c) {
      return (c == t[p] ? (1 - smoothing) * of(c) : 0) + smoothing / classes * of(c);
    };
    for (int64_t c = 0; c < classes && counts; ++c) loss -= share(c) * (x[at(c)] - top - std::log(exponentials));
    sum += loss;
    if (reduction == Reduction::none) expect<T>("cross_entropy", y[p], loss);
    double factor = reduction == Reduction::none ? g[p] : g[0];
    if (reduction == Reduction::mean) factor /= total;
    for (int64_t c = 0; c < classes; ++c) {
      const double probability = std::exp(x[at(c)] - top) / exponentials;
      const double slope = (1 - smoothing) * of(t[p] < 0 ? 0 : t[p]) + smoothing / classes * all;
      expect<T>("its gradient", dx[at(c)], counts ? factor * (slope * probability - share(c)) : 0);
    }
  }
  if (reduction != Reduction::none)
    expect<T>("reduced", y[0], reduction == Reduction::mean ? sum / total : sum, positions);

  const int64_t wrong = between(0, positions - 1);
  for (int64_t p = wrong; p < positions; ++p) t[p] = coin() ? classes : -1;
  for (const Team& team : kTeams) {
    run_call(f, {x.data(), t, weight, y.data(), statistics.data(), &bad}, team);
    if (bad != wrong && ++failures < 20) std::printf("FAIL what is no class is not seen\n");
  }
}

template <class T>
void check_mse(int64_t n) {
  const auto reduction = static_cast<Reduction>(between(0, 2));
  const int64_t losses = reduction == Reduction::none ? n : 1;
  const Numbers<T> x(n), t(n), y(losses), g(losses), dx(n), dt(n);
  const bool both = coin();
  Bits bits;
  for (const Team& team : kTeams) {
    run_call(MseForward{kDType<T>, n, reduction}, {x.data(), t.data(), y.data()}, team);
    run_call(MseBackward{kDType<T>, n, reduction},
             {g.data(), x.data(), t.data(), dx.data(), both ? dt.data() : nullptr}, team);
    bits.same("mse", team, {{y.data(), y.bytes()}, {dx.data(), dx.bytes()}, {dt.data(), both ? dt.bytes() : 0}});
  }
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) {
    const double difference = double(x[i]) - double(t[i]);
    sum += difference * difference;
    if (reduction == Reduction::none) expect<T>("mse", y[i], difference * difference);
    double grad = 2 * difference * g[reduction == Reduction::none ? i : 0];
    if (reduction == Reduction::mean) grad /= double(n);
    expect<T>("grad_x", dx[i], grad);
    if (both) expect<T>("grad_t", dt[i], -grad);
  }
  if (reduction != Reduction::none) expect<T>("mse", y[0], reduction == Reduction::mean ? sum / double(n) : sum, n);
}

}  // namespace

int main(int argc, char** argv) {
  return run_tiers(argc, argv, []<class T>(bool quick) {
    if constexpr (sizeof(T) >= 4) {
      for (int i = 0; i < (quick ? 40 : 200); ++i) {
        check_cross_entropy<T>(between(1, 70), between(2, 70), 1);
        check_cross_entropy<T>(between(1, 4), between(2, 20), between(2, 70));
        check_mse<T>(between(1, 300));
      }
      check_cross_entropy<T>(3, 5000, 1);
      check_cross_entropy<T>(2100, 3, 1);
      check_mse<T>(70001);
    }
  });
}
