// Products without packed panels.
//
// Dot kernels, for few rows: y[i, j] = sum_p x[i, p] w[j, p], vectorised along k, where both operands are contiguous. A
// tile of kDot x kDot outputs loads 2 kDot vectors for kDot^2 multiply-adds. Every output is one chain of multiply-adds
// per lane, and the lanes are added at the end. This is the same in every tile, so the result does not depend on how
// columns are grouped.
#pragma once

#include "../../common/cpu/common.inl"
#include "gemm.inl"
#include "microkernels.inl"
#include "pack.inl"

#if defined(FASTOPS_32_REGISTERS)
constexpr int kDot = 5;  // 25 accumulators in 32 registers
#else
constexpr int kDot = 3;  // 9 accumulators in 16 registers
#endif

// Up to this many rows, for any k, W is read from memory once and x stays in L1.
constexpr int64_t kDotRowsAnyK = 4;
// Up to this many rows and this k, the ten rows that a tile reads stay in L1. For float32 only: 16-bit types would be
// converted again for every tile, which costs more.
constexpr int64_t kDotRows = 64, kDotLeastK = 256, kDotK = 1024;
constexpr int kDotBlock = 8 * kDot;  // columns that go through the epilogue together

template <class T>
inline bool takes_dot(const Gemm<T>& g) {
  if (g.a.ks != 1 || g.b.ks != 1 || g.k < 4 * Vec<Compute<T>>::size || g.a.derivative != nullptr) return false;
  return g.m <= kDotRowsAnyK ||
         (same_type<T, float> && Vec<float>::size == 16 && g.m <= kDotRows && g.k >= kDotLeastK && g.k <= kDotK);
}

template <class T, int R, int N>
__attribute__((noinline)) void dot_tile(int64_t k, const T* x, int64_t x_rs, const T* w, int64_t w_rs, Compute<T>* to,
                                        int64_t to_rs) {
  using Lanes = Vec<Compute<T>>;
  constexpr int S = Lanes::size;
  Lanes acc[R][N];
#pragma GCC unroll 5
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 5
    for (int c = 0; c < N; ++c) acc[r][c] = Lanes::zero();
  int64_t p = 0;
  for (; p + S <= k; p += S) {
    Lanes b[N];
#pragma GCC unroll 5
    for (int c = 0; c < N; ++c) b[c] = Lanes::load(w + c * w_rs + p);
#pragma GCC unroll 5
    for (int r = 0; r < R; ++r) {
      const Lanes a = Lanes::load(x + r * x_rs + p);
#pragma GCC unroll 5
      for (int c = 0; c < N; ++c) acc[r][c] = fma(a, b[c], acc[r][c]);
    }
  }
  if (p < k) {
    const int tail = static_cast<int>(k - p);
#pragma GCC unroll 5
    for (int c = 0; c < N; ++c) {
      const Lanes b = Lanes::load(w + c * w_rs + p, tail);
#pragma GCC unroll 5
      for (int r = 0; r < R; ++r) acc[r][c] = fma(Lanes::load(x + r * x_rs + p, tail), b, acc[r][c]);
    }
  }
#pragma GCC unroll 5
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 5
    for (int c = 0; c < N; ++c) to[r * to_rs + c] = reduce_add(acc[r][c]);
}

template <class T, int N>
inline void dot_rows(int64_t rows, int64_t k, const T* x, int64_t x_rs, const T* w, int64_t w_rs, Compute<T>* to) {
  int64_t i = 0;
  for (; i + kDot <= rows; i += kDot)
    dot_tile<T, kDot, N>(k, x + i * x_rs, x_rs, w, w_rs, to + i * kDotBlock, kDotBlock);
  const T* const at = x + i * x_rs;
  Compute<T>* const out = to + i * kDotBlock;
  switch (rows - i) {
    case 4:
      if constexpr (kDot > 4) dot_tile<T, 4, N>(k, at, x_rs, w, w_rs, out, kDotBlock);
      break;
    case 3:
      if constexpr (kDot > 3) dot_tile<T, 3, N>(k, at, x_rs, w, w_rs, out, kDotBlock);
      break;
    case 2:
      dot_tile<T, 2, N>(k, at, x_rs, w, w_rs, out, kDotBlock);
      break;
    case 1:
      dot_tile<T, 1, N>(k, at, x_rs, w, w_rs, out, kDotBlock);
      break;
    default:
      break;
  }
}

template <class T>
void dot_product(const Gemm<T>& g, const Team& team) {
  using C = Compute<T>;
  const int64_t blocks = ceil_div(g.n, kDotBlock);
  const double flop = 2.0 * static_cast<double>(g.m) * static_cast<double>(g.n) * static_cast<double>(g.k);
  const int wanted =
      static_cast<int>(smaller<double>(smaller<double>(static_cast<double>(team.threads), static_cast<double>(blocks)),
                                       larger(1.0, flop / kFlopPerThread)));
  parallel(team, wanted, [&](Crew& crew) {
    alignas(64) C block[kDotRows * kDotBlock];
    crew.each(blocks, [&](int64_t u) {
      const int64_t j = u * kDotBlock;
      const int cols = static_cast<int>(smaller<int64_t>(kDotBlock, g.n - j));
      int c = 0;
      for (; c + kDot <= cols; c += kDot)
        dot_rows<T, kDot>(g.m, g.k, g.a.p, g.a.ls, g.b.p + (j + c) * g.b.ls, g.b.ls, block + c);
      for (; c < cols; ++c) dot_rows<T, 1>(g.m, g.k, g.a.p, g.a.ls, g.b.p + (j + c) * g.b.ls, g.b.ls, block + c);
      for (int64_t i = 0; i < g.m && (g.out.bias != nullptr || g.out.relu || g.out.residual != nullptr); ++i)
        for (c = 0; c < cols; c += Vec<C>::size) {
          const int count = smaller(cols - c, Vec<C>::size);
          C* const at = block + i * kDotBlock + c;
          Vec<C> v = Vec<C>::load(at, count);
          if (g.out.bias != nullptr) v = v + Vec<C>::load(g.out.bias + j + c, count);
          if constexpr (same_type<T, C>)
            if (g.out.residual != nullptr) v = v + Vec<C>::load(g.out.residual + i * g.out.rs + j + c, count);
          if (g.out.relu) v = rectified(v, g.out.relu);
          v.store(at, count);
        }
      finish_rows(g.out, block, kDotBlock, 0, j, static_cast<int>(g.m), cols);
    });
  });
}

// One row times a matrix with contiguous rows: out[j] = sum_p a[p] b[p, j]. Bound by memory: B is read a few rows at a
// time, in pieces that are long enough for the prefetchers.
constexpr int64_t kRowStrip = 1024;
constexpr int kRowsAtOnce = 4;
// The least number of elements of B. A smaller B is in the cache, where the microkernels are faster.
constexpr int64_t kRowTimesMatrix = 128 * 1024;

template <class T>
inline bool takes_row_times_matrix(const Gemm<T>& g) {
  return g.m == 1 && g.b.ls == 1 && g.n * g.k >= kRowTimesMatrix && g.a_sums == nullptr && g.out.bias == nullptr &&
         g.out.f == nullptr && !g.out.relu && g.out.z == nullptr && g.out.residual == nullptr;
}

template <class T>
void row_times_matrix(const Gemm<T>& g, const Team& team) {
  using C = Compute<T>;
  using Lanes = Vec<C>;
  constexpr int S = Lanes::size;
  const int64_t strips = ceil_div(g.n, kRowStrip);
  parallel(team, static_cast<int>(smaller<int64_t>(strips, team.threads)), [&](Crew& crew) {
    constexpr int kChunk = 64;
    alignas(64) C sums[kRowStrip];
    C a[kChunk];
    T values[kChunk];
    crew.each(strips, [&](int64_t u) {
      const int64_t j0 = u * kRowStrip;
      const int width = static_cast<int>(smaller(kRowStrip, g.n - j0));
      for (int j = 0; j < width; ++j) sums[j] = 0;
      for (int64_t p = 0; p < g.k; p += kChunk) {
        const int count = static_cast<int>(smaller<int64_t>(g.k - p, kChunk));
        if (g.a.derivative != nullptr) {
          derivative_block(g.a, 0, p, 1, count, false, a, kChunk);
        } else {
          gather(g.a.p + p * g.a.ks, 0, g.a.ks, 1, count, values, kChunk);
          widen_row(values, a, count);
        }
        int q = 0;
        for (; q + kRowsAtOnce <= count; q += kRowsAtOnce) {
          const T* const b = g.b.p + (p + q) * g.b.ks + j0;
          const int64_t ks = g.b.ks;
          const Lanes a0 = Lanes::set1(a[q]), a1 = Lanes::set1(a[q + 1]), a2 = Lanes::set1(a[q + 2]),
                      a3 = Lanes::set1(a[q + 3]);
          int j = 0;
          for (; j + S <= width; j += S) {
            Lanes s = Lanes::load(sums + j);
            s = fma(a0, Lanes::load(b + j), s);
            s = fma(a1, Lanes::load(b + ks + j), s);
            s = fma(a2, Lanes::load(b + 2 * ks + j), s);
            s = fma(a3, Lanes::load(b + 3 * ks + j), s);
            s.store(sums + j);
          }
          if (j < width) {
            const int tail = width - j;
            Lanes s = Lanes::load(sums + j, tail);
            s = fma(a0, Lanes::load(b + j, tail), s);
            s = fma(a1, Lanes::load(b + ks + j, tail), s);
            s = fma(a2, Lanes::load(b + 2 * ks + j, tail), s);
            s = fma(a3, Lanes::load(b + 3 * ks + j, tail), s);
            s.store(sums + j, tail);
          }
        }
        for (; q < count; ++q) {
          const T* const b = g.b.p + (p + q) * g.b.ks + j0;
          const Lanes a0 = Lanes::set1(a[q]);
          for (int j = 0; j < width; j += S) {
            const int tail = smaller(width - j, S);
            fma(a0, Lanes::load(b + j, tail), Lanes::load(sums + j, tail)).store(sums + j, tail);
          }
        }
      }
      store_row<T>(sums, g.out.y + j0, width);
    });
  });
}
