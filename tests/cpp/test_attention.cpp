// Attention against a plain loop in double, on every tier of this machine: random shapes and strides, masks, every
// operand between pages that fault, and the same bits for any number of threads.
#include <algorithm>
#include <cmath>
#include <random>

#include "tiers.h"

namespace {

std::mt19937 generator(1);
int64_t between(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(generator); }

// A tensor [batch, heads, rows, size] with gaps between its rows, heads and batches.
template <class T>
struct Heads {
  HeadStrides strides;
  int64_t batch, heads, rows, size;
  Pages pages;

  Heads(int64_t batch, int64_t heads, int64_t rows, int64_t size, int64_t gap)
      : strides{(rows * (size + gap) + gap) * heads, rows * (size + gap) + gap, size + gap},
        batch(batch),
        heads(heads),
        rows(rows),
        size(size),
        pages(bytes(), true, sizeof(T)) {}
  size_t bytes() const {
    const int64_t last = (batch - 1) * strides.batch + (heads - 1) * strides.head + (rows - 1) * strides.row + size;
    return static_cast<size_t>(last) * sizeof(T);
  }
  T* data() const { return static_cast<T*>(pages.data()); }
  T& at(int64_t b, int64_t h, int64_t i, int64_t j) const {
    return data()[b * strides.batch + h * strides.head + i * strides.row + j];
  }
  void fill() {
    std::normal_distribution<double> normal;
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t h = 0; h < heads; ++h)
        for (int64_t i = 0; i < rows; ++i)
          for (int64_t j = 0; j < size; ++j) at(b, h, i, j) = static_cast<T>(normal(generator));
  }
};

template <class T>
void expect(const char* what, const AttentionShape& s, double got, double wanted) {
  const double bound = (sizeof(T) == 8 ? 1e-12 : 2e-4) * (1 + std::fabs(wanted));
  if (std::fabs(got - wanted) <= bound || ++failures > 20) return;
  std::printf("FAIL %s %s %lldx%lldx%lldx%lldx%lldx%lld causal %d mask %d: got %.9g, wanted %.9g\n",
              isa_name(isa_used()), what, static_cast<long long>(s.batch), static_cast<long long>(s.heads),
              static_cast<long long>(s.queries), static_cast<long long>(s.keys), static_cast<long long>(s.size),
              static_cast<long long>(s.value_size), s.causal, s.with_mask, got, wanted);
}

template <class T>
void check(int64_t batch, int64_t heads, int64_t queries, int64_t keys, int64_t size, int64_t value_size) {
  const int64_t gap = between(0, 3);
  Heads<T> q(batch, heads, queries, size, gap), k(batch, heads, keys, size, gap),
      v(batch, heads, keys, value_size, gap), g(batch, heads, queries, value_size, gap),
      mask(1, heads, queries, keys, gap);
  for (Heads<T>* t : {&q, &k, &v, &g, &mask}) t->fill();
  mask.at(0, 0, 0, 0) = -INFINITY;
  Heads<T> y(batch, heads, queries, value_size, gap), dq(batch, heads, queries, size, gap),
      dk(batch, heads, keys, size, gap), dv(batch, heads, keys, value_size, gap);
  const Pages lse(static_cast<size_t>(batch * heads * queries) * sizeof(T), true, sizeof(T));
  const int kind = static_cast<int>(between(0, 2));
  AttentionShape s{kDType<T>, kind == 1,  kind == 2, 0.37,      batch,     heads,     queries,     keys,
                   size,      value_size, q.strides, k.strides, v.strides, y.strides, mask.strides};
  s.mask.batch = 0;
  const void* const added = s.with_mask ? mask.data() : nullptr;
  std::vector<char> before[4];
  for (const Team& team : kTeams) {
    run_call(AttentionForward{s, kDType<T>}, {q.data(), k.data(), v.data(), added, y.data(), lse.data()}, team);
    run_call(AttentionBackward{s, kDType<T>, g.strides, dq.strides, dk.strides, dv.strides},
             {g.data(), q.data(), k.data(), v.data(), added, y.data(), lse.data(), dq.data(), dk.data(), dv.data()},
             team);
    int n = 0;
    for (const Heads<T>* t : {&y, &dq, &dk, &dv}) {
      const char* const bytes = reinterpret_cast<const char*>(t->data());
      if (before[n].empty())
        before[n].assign(bytes, bytes + t->bytes());
      else if (std::memcmp(before[n].data(), bytes, t->bytes()) != 0 && ++failures < 20)
        std::printf("FAIL %s: other bits with %d threads\n", isa_name(isa_used()), team.threads);
      ++n;
    }
  }
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t h = 0; h < heads; ++h) {
      std::vector<double> grad_k(static_cast<size_t>(keys * size)), grad_v(static_cast<size_t>(keys * value_size));
      for (int64_t i = 0; i < queries; ++i) {
        std::vector<double> p(static_cast<size_t>(keys));
        double most = -INFINITY, sum = 0;
        for (int64_t j = 0; j < keys; ++j) {
          double score = 0;
          for (int64_t d = 0; d < size; ++d) score += static_cast<double>(q.at(b, h, i, d)) * k.at(b, h, j, d);
          score = score * s.scale + (s.with_mask ? mask.at(0, h, i, j) : 0);
          p[static_cast<size_t>(j)] = s.causal && j > i ? -INFINITY : score;
          most = std::max(most, p[static_cast<size_t>(j)]);
        }
        for (double& x : p) sum += x = most == -INFINITY ? 0 : std::exp(x - most);
        for (double& x : p) x = sum == 0 ? 0 : x / sum;
        double dot = 0;
        for (int64_t d = 0; d < value_size; ++d) {
          double wanted = 0;
          for (int64_t j = 0; j < keys; ++j) wanted += p[static_cast<size_t>(j)] * v.at(b, h, j, d);
          expect<T>("y", s, y.at(b, h, i, d), wanted);
          dot += wanted * g.at(b, h, i, d);
        }
        std::vector<double> grad_q(static_cast<size_t>(size));
        for (int64_t j = 0; j < keys; ++j) {
          double grad_p = 0;
          for (int64_t d = 0; d < value_size; ++d) {
            grad_p += static_cast<double>(g.at(b, h, i, d)) * v.at(b, h, j, d);
            grad_v[static_cast<size_t>(j * value_size + d)] += p[static_cast<size_t>(j)] * g.at(b, h, i, d);
          }
          const double grad_score = p[static_cast<size_t>(j)] * (grad_p - dot) * s.scale;
          for (int64_t d = 0; d < size; ++d) {
            grad_q[static_cast<size_t>(d)] += grad_score * k.at(b, h, j, d);
            grad_k[static_cast<size_t>(j * size + d)] += grad_score * q.at(b, h, i, d);
          }
        }
        for (int64_t d = 0; d < size; ++d) expect<T>("grad_q", s, dq.at(b, h, i, d), grad_q[static_cast<size_t>(d)]);
      }
      for (int64_t j = 0; j < keys; ++j) {
        for (int64_t d = 0; d < size; ++d)
          expect<T>("grad_k", s, dk.at(b, h, j, d), grad_k[static_cast<size_t>(j * size + d)]);
        for (int64_t d = 0; d < value_size; ++d)
          expect<T>("grad_v", s, dv.at(b, h, j, d), grad_v[static_cast<size_t>(j * value_size + d)]);
      }
    }
}

// Scores far apart, and a mask of large numbers: no weight is so small that a product with it underflows.
template <class T>
void check_underflow() {
  constexpr int64_t rows = 70, size = 20;
  Heads<T> q(1, 1, rows, size, 0), k(1, 1, rows, size, 0), v(1, 1, rows, size, 0), g(1, 1, rows, size, 0),
      mask(1, 1, rows, rows, 0), y(1, 1, rows, size, 0), dq(1, 1, rows, size, 0), dk(1, 1, rows, size, 0),
      dv(1, 1, rows, size, 0);
  for (Heads<T>* t : {&q, &k, &v, &g}) t->fill();
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < rows; ++j) mask.at(0, 0, i, j) = j <= i ? 0 : j % 2 ? -INFINITY : static_cast<T>(-1e9);
  const Pages lse(rows * sizeof(T), true, sizeof(T));
  for (const double scale : {1.0, 8.0, 80.0}) {
    const AttentionShape s{kDType<T>, false, true,      scale,     1,         1,         rows,        rows,
                           size,      size,  q.strides, k.strides, v.strides, y.strides, mask.strides};
    const bool slow = underflows([&] {
      run_call(AttentionForward{s, kDType<T>}, {q.data(), k.data(), v.data(), mask.data(), y.data(), lse.data()});
      run_call(
          AttentionBackward{s, kDType<T>, g.strides, dq.strides, dk.strides, dv.strides},
          {g.data(), q.data(), k.data(), v.data(), mask.data(), y.data(), lse.data(), dq.data(), dk.data(), dv.data()});
    });
    if (slow && ++failures < 20) std::printf("FAIL %s: scores of scale %g underflow\n", isa_name(isa_used()), scale);
  }
}

}  // namespace

int main(int argc, char** argv) {
  return run_tiers(argc, argv, []<class T>(bool quick) {
    if constexpr (sizeof(T) >= 4) {
      for (int i = 0; i < (quick ? 10 : 40); ++i)
        check<T>(between(1, 2), between(1, 3), between(1, 110), between(1, 70), between(1, 40), between(1, 40));
      check<T>(1, 1, 5, 1030, 3, 2);
      check_underflow<T>();
    }
  });
}
