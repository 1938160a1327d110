// Winograd's minimal filtering F(m x m, 3 x 3) (Winograd, "Arithmetic complexity of computations", 1980; Lavin & Gray,
// "Fast algorithms for convolutional neural networks", 2016). An m x m tile of the output is
//
//   Y = A^T [ (G g G^T) * (B^T d B) ] A
//
// for the 3 x 3 kernel g and the (m + 2) x (m + 2) tile d of the input. * is the elementwise product. With a sum over
// channels it becomes one matrix product for each of the (m + 2)^2 points. All transforms work on vectors whose lanes
// are channels.
#pragma once

#include "../../common/cpu/common.inl"

// The three transforms along one dimension: input d[m + 2] -> r = B^T d, weight g[3] -> r = G g, output s[m + 2] -> r =
// A^T s.
template <int M>
struct WinogradScheme;

// Interpolation at the points 0, 1, -1 and infinity.
template <>
struct WinogradScheme<2> {
  static constexpr int m = 2, n = 4, points = 16;
  static constexpr int64_t depth = 256;     // channels in a chain of multiply-adds; a panel of weights is then 512 KB
  static constexpr int64_t job_panels = 2;  // panels of weights that a thread transforms at a time
  static void input(const VecF* d, VecF* r) {
    r[0] = d[0] - d[2];
    r[1] = d[1] + d[2];
    r[2] = d[2] - d[1];
    r[3] = d[1] - d[3];
  }
  static void weight(const VecF* g, VecF* r) {
    const VecF half = VecF::set1(0.5f);
    const VecF outer = half * (g[0] + g[2]), inner = half * g[1];
    r[0] = g[0];
    r[1] = outer + inner;
    r[2] = outer - inner;
    r[3] = g[2];
  }
  static void output(const VecF* s, VecF* r) {
    r[0] = s[0] + (s[1] + s[2]);
    r[1] = (s[1] - s[2]) - s[3];
  }
};

// Interpolation at the points 0, +-1/sqrt(2), +-sqrt(2) and infinity. The magnitudes of the products are a third as far
// apart as with 0, +-1, +-2 and infinity, and the result is that much more accurate.
template <>
struct WinogradScheme<4> {
  static constexpr int m = 4, n = 6, points = 36;
  static constexpr int64_t depth = 128;
  static constexpr int64_t job_panels = 1;
  static constexpr float kRoot = 1.41421356237309505f, kHalfRoot = 0.707106781186547524f;
  static void input(const VecF* d, VecF* r) {
    const VecF two_and_half = VecF::set1(2.5f), two = VecF::set1(2), half = VecF::set1(0.5f);
    const VecF root = VecF::set1(kRoot), half_root = VecF::set1(kHalfRoot);
    const VecF even1 = fnma(two, d[2], d[4]), odd1 = fnma(two, d[1], d[3]);
    const VecF even2 = fnma(half, d[2], d[4]), odd2 = fnma(half, d[1], d[3]);
    r[0] = fnma(two_and_half, d[2], d[0] + d[4]);
    r[1] = fma(half_root, odd1, even1);
    r[2] = fnma(half_root, odd1, even1);
    r[3] = fma(root, odd2, even2);
    r[4] = fnma(root, odd2, even2);
    r[5] = fnma(two_and_half, d[3], d[1] + d[5]);
  }
  static void weight(const VecF* g, VecF* r) {
    const VecF third = VecF::set1(1.0f / 3), sixth = VecF::set1(1.0f / 6), two = VecF::set1(2);
    const VecF root = VecF::set1(kRoot);
    const VecF even1 = -third * fma(two, g[0], g[2]), odd1 = -third * (root * g[1]);
    const VecF even2 = sixth * fma(two, g[2], g[0]), odd2 = sixth * (root * g[1]);
    r[0] = g[0];
    r[1] = even1 + odd1;
    r[2] = even1 - odd1;
    r[3] = even2 + odd2;
    r[4] = even2 - odd2;
    r[5] = g[2];
  }
  static void output(const VecF* s, VecF* r) {
    const VecF two = VecF::set1(2), half = VecF::set1(0.5f), four = VecF::set1(4), half_root = VecF::set1(kHalfRoot);
    const VecF sum1 = s[1] + s[2], difference1 = s[1] - s[2], sum2 = s[3] + s[4], difference2 = s[3] - s[4];
    r[0] = s[0] + (sum1 + sum2);
    r[1] = half_root * fma(two, difference2, difference1);
    r[2] = fma(half, sum1, two * sum2);
    r[3] = fma(half_root, fma(half, difference1, four * difference2), s[5]);
  }
};

template <class Scheme>
constexpr KernelName winograd_tile_name() {
  return {"winograd", {Scheme::m, Scheme::m}};
}

// The transforms for the gradient of the weights, which are those of F(2x2) transposed. With the tile e of grad_y,
//
//   grad_g = G^T [ sum over tiles of (A e A^T) * (B^T d B) ] G
struct WinogradGradient {
  static void output(const VecF* e, VecF* r) {
    r[0] = e[0];
    r[1] = e[0] + e[1];
    r[2] = e[0] - e[1];
    r[3] = -e[1];
  }
  static void weight(const VecF* s, VecF* r) {
    const VecF half = VecF::set1(0.5f);
    const VecF sum = half * (s[1] + s[2]);
    r[0] = s[0] + sum;
    r[1] = half * (s[1] - s[2]);
    r[2] = sum + s[3];
  }
};

// B^T d B. Element (i, j) of d is the vector at from + i * row + j * Lanes; point (i, j) is stored to to + (i n + j) *
// plane.
template <class Scheme>
__attribute__((always_inline)) inline void winograd_input(const float* from, int64_t row, float* to, int64_t plane) {
  constexpr int n = Scheme::n;
  VecF t[n][n];
#pragma GCC unroll 6
  for (int j = 0; j < n; ++j) {
    VecF d[n], r[n];
#pragma GCC unroll 6
    for (int i = 0; i < n; ++i) d[i] = VecF::load(from + i * row + j * VecF::size);
    Scheme::input(d, r);
#pragma GCC unroll 6
    for (int i = 0; i < n; ++i) t[i][j] = r[i];
  }
#pragma GCC unroll 6
  for (int i = 0; i < n; ++i) {
    VecF r[n];
    Scheme::input(t[i], r);
#pragma GCC unroll 6
    for (int j = 0; j < n; ++j) r[j].store(to + (i * n + j) * plane);
  }
}

// G g G^T. Tap (i, j) is the vector at from + (3 i + j) * Lanes.
template <class Scheme>
__attribute__((always_inline)) inline void winograd_weight(const float* from, float* to, int64_t plane) {
  constexpr int n = Scheme::n;
  VecF t[n][3];
#pragma GCC unroll 3
  for (int j = 0; j < 3; ++j) {
    VecF g[3], r[n];
#pragma GCC unroll 3
    for (int i = 0; i < 3; ++i) g[i] = VecF::load(from + (3 * i + j) * VecF::size);
    Scheme::weight(g, r);
#pragma GCC unroll 6
    for (int i = 0; i < n; ++i) t[i][j] = r[i];
  }
#pragma GCC unroll 6
  for (int i = 0; i < n; ++i) {
    VecF r[n];
    Scheme::weight(t[i], r);
#pragma GCC unroll 6
    for (int j = 0; j < n; ++j) r[j].store(to + (i * n + j) * plane);
  }
}

// A^T s A. Point p is the vector at from + p * plane.
template <class Scheme>
__attribute__((always_inline)) inline void winograd_output(const float* from, int64_t plane,
                                                           VecF (&to)[Scheme::m][Scheme::m]) {
  constexpr int n = Scheme::n, m = Scheme::m;
  VecF t[m][n];
#pragma GCC unroll 6
  for (int j = 0; j < n; ++j) {
    VecF s[n], r[m];
#pragma GCC unroll 6
    for (int i = 0; i < n; ++i) s[i] = VecF::load(from + (i * n + j) * plane);
    Scheme::output(s, r);
#pragma GCC unroll 4
    for (int i = 0; i < m; ++i) t[i][j] = r[i];
  }
#pragma GCC unroll 4
  for (int i = 0; i < m; ++i) Scheme::output(t[i], to[i]);
}

// A e A^T, with the layout of winograd_input.
__attribute__((always_inline)) inline void winograd_gradient(const float* from, int64_t row, float* to, int64_t plane) {
  VecF t[4][2];
#pragma GCC unroll 2
  for (int j = 0; j < 2; ++j) {
    const VecF e[2] = {VecF::load(from + j * VecF::size), VecF::load(from + row + j * VecF::size)};
    VecF r[4];
    WinogradGradient::output(e, r);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) t[i][j] = r[i];
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    VecF r[4];
    WinogradGradient::output(t[i], r);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) r[j].store(to + (4 * i + j) * plane);
  }
}

// G^T s G. Point p is s[p]; tap (i, j) is stored to to[3 i + j].
__attribute__((always_inline)) inline void winograd_weight_gradient(const VecF* s, VecF* to) {
  VecF t[3][4];
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const VecF column[4] = {s[j], s[4 + j], s[8 + j], s[12 + j]};
    VecF r[3];
    WinogradGradient::weight(column, r);
#pragma GCC unroll 3
    for (int i = 0; i < 3; ++i) t[i][j] = r[i];
  }
#pragma GCC unroll 3
  for (int i = 0; i < 3; ++i) WinogradGradient::weight(t[i], to + 3 * i);
}
