// Pools with 2x2 windows and stride 2 over channels_first planes, the most common pools of models. No window crosses a
// border or shares an element, so a row of windows is exactly two rows of elements, forward and backward. Microseconds
// of the algorithms for any windows -> of this one (Granite Rapids, one thread, float32):
//   planes            maximum     with indices   backward
//   64x32 of 28x28    458 -> 349  553 -> 366     708 -> 451
//   64x64 of 14x14    414 -> 203  473 -> 245     432 -> 329
//   8x64 of 112x112  1234 -> 1200 1374 -> 1305   2701 -> 1357
#pragma once

#include "../../common/cpu/common.inl"
#include "taps.inl"
#include "window_ops.inl"
#include "windows.inl"

inline bool halved(const PoolAxis& axis) {
  return axis.out > 0 && !axis.ragged && axis.kernel == 2 && axis.stride == 2 && axis.padding == 0 &&
         axis.dilation == 1 && axis.in >= 2 * axis.out;
}
inline bool tiles_by_two(const Pool& pool) {
  return pool.d.in == 1 && pool.d.out == 1 && pool.d.kernel == 1 && halved(pool.h) && halved(pool.w);
}

// The last vector of a row of windows: the number of windows, and of their elements in a first and a second vector.
struct HalvesEnd {
  int windows, low, high;
};
template <class C>
inline HalvesEnd end_of_halves(const Pool& pool) {
  constexpr int S = Vec<C>::size;
  const int windows = static_cast<int>((pool.w.out - 1) % S) + 1;
  return {windows, windows * 2 < S ? windows * 2 : S, windows * 2 < S ? 0 : windows * 2 - S};
}

// Takes two neighbouring elements of each window, which are taps t and t + 1.
template <class Accumulator, class C>
inline void take_two(Accumulator& result, Vec<C> a, Vec<C> b, int64_t t) {
  Vec<C> even, odd;
  deinterleave(a, b, even, odd);
  result.take(even, t);
  result.take(odd, t + 1);
}

// Computes rows [begin, end) of y.
template <class S, class Op>
void pool_halves(const Pool& pool, const S* x, const Op& op, int64_t begin, int64_t end) {
  using C = Compute<S>;
  using V = Vec<C>;
  const int64_t in = pool.w.in, out = pool.w.out;
  const HalvesEnd last = end_of_halves<C>(pool);
  const C divisor = op.whole_divisor(static_cast<C>(op.divisor(pool.h, 0) * op.divisor(pool.w, 0)));
  PoolRow row(begin, 1, pool.h.out);
  for (int64_t i = begin; i < end; ++i, row.next(1, pool.h.out)) {
    const S* p = x + row.plane * pool.in_plane() + 2 * row.h * in;
    PoolPlace<C> place = {2 * row.h * in, 2, divisor, nullptr};
    int64_t j = 0;
    for (; j + V::size < out; j += V::size, p += 2 * V::size, place.position += 2 * V::size) {
      typename Op::Accumulator result(Taps<C>::set1(0));
      take_two(result, V::load(p), V::load(p + V::size), 0);
      take_two(result, V::load(p + in), V::load(p + in + V::size), 2);
      op.finish(i * out + j, V::size, result, place);
    }
    typename Op::Accumulator result(Taps<C>::set1(0));
    const auto take_last = [&](const S* elements, int64_t t) {
      const V a = V::load(elements, last.low);
      take_two(result, a, last.high > 0 ? V::load(elements + V::size, last.high) : a, t);
    };
    take_last(p, 0);
    take_last(p + in, 2);
    op.finish(i * out + j, last.windows, result, place);
  }
}

// Rows [begin, end) of grad_y, each of which is two rows of grad_x. The last row of a plane also writes the rows after
// the windows.
template <class S, class Route>
void backward_halves(const Pool& pool, const S* grad_y, S* grad_x, const Route& op, int64_t begin, int64_t end) {
  using C = Compute<S>;
  using V = Vec<C>;
  const int64_t in = pool.w.in, out = pool.w.out;
  const HalvesEnd last = end_of_halves<C>(pool);
  PoolRow row(begin, 1, pool.h.out);
  const auto two = [&](V left, V right, const HalvesEnd& n, S* to) {
    V a, b;
    interleave(left, right, a, b);
    a.store(to, n.low);
    if (n.high > 0) b.store(to + V::size, n.high);
  };
  for (int64_t i = begin; i < end; ++i, row.next(1, pool.h.out)) {
    S* const to = grad_x + row.plane * pool.in_plane() + 2 * row.h * in;
    for (int64_t j = 0; j < out; j += V::size) {
      const HalvesEnd n = j + V::size < out ? HalvesEnd{V::size, V::size, V::size} : last;
      const int64_t at = i * out + j;
      V g = V::load(grad_y + at, n.windows);
      if constexpr (Route::kAverages)
        g = g / V::set1(op.first_divisor() * op.divisor(pool.h, 0) * op.divisor(pool.w, 0));
      two(op.sent(0, g, at, n.windows), op.sent(1, g, at, n.windows), n, to + 2 * j);
      two(op.sent(2, g, at, n.windows), op.sent(3, g, at, n.windows), n, to + in + 2 * j);
    }
    for (int64_t j = 2 * out; j < in; ++j) to[j] = to[in + j] = S{};
    if (row.h == pool.h.out - 1)
      for (int64_t j = 2 * in; j < (pool.h.in - 2 * row.h) * in; ++j) to[j] = S{};
  }
}
