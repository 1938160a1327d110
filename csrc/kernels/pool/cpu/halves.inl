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

// body(j, end) for all `out` windows of a row, a vector of them from j on at a time. For a part of a vector, AVX2 needs
// several loads or stores and calls of memcpy. So there the last vector of a row begins where it ends with the row, and
// a row shorter than a vector goes on into the rows that follow it in this thread's part, `left` windows with its own;
// these write their results again. Maximum, one thread, us, by parts and so (Zen 1), forward and backward: 64x64x14x14
// 910-1090 and 250-270, 2070-2290 and 460-520; bfloat16 720 and 435, 2270-2370 and 700-770.
template <class C, class Body>
inline void for_halves(int64_t out, int64_t left, const HalvesEnd& last, Body body) {
  constexpr int S = Vec<C>::size;
  const HalvesEnd whole = {S, S, S};
  int64_t j = 0;
  for (; j + S < out; j += S) body(j, whole);
#if defined(FASTOPS_VEC_AVX2)
  if (out >= S) return body(out - S, whole);
  if (left >= S) return body(0, whole);
#else
  (void)left;
#endif
  body(j, last);
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
    const auto take = [&](int64_t j, const HalvesEnd& n) __attribute__((always_inline)) {
      typename Op::Accumulator result(Taps<C>::set1(0));
      const auto row_of = [&](const S* elements, int64_t t) __attribute__((always_inline)) {
        const V a = load_some<V>(elements, n.low);
        take_two(result, a, n.high > 0 ? load_some<V>(elements + V::size, n.high) : a, t);
      };
      row_of(p + 2 * j, 0);
      row_of(p + in + 2 * j, 2);
      place.position = 2 * (row.h * in + j);
      op.finish(i * out + j, n.windows, result, place);
    };
    for_halves<C>(out, (end - i) * out, last, take);
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
  const auto two = [&](V left, V right, const HalvesEnd& n, S* to) __attribute__((always_inline)) {
    V a, b;
    interleave(left, right, a, b);
    store_some(a, to, n.low);
    if (n.high > 0) store_some(b, to + V::size, n.high);
  };
  for (int64_t i = begin; i < end; ++i, row.next(1, pool.h.out)) {
    S* const to = grad_x + row.plane * pool.in_plane() + 2 * row.h * in;
    const auto send = [&](int64_t j, const HalvesEnd& n) __attribute__((always_inline)) {
      const int64_t at = i * out + j;
      V g = load_some<V>(grad_y + at, n.windows);
      if constexpr (Route::kAverages)
        g = g / V::set1(op.first_divisor() * op.divisor(pool.h, 0) * op.divisor(pool.w, 0));
      two(op.sent(0, g, at, n.windows), op.sent(1, g, at, n.windows), n, to + 2 * j);
      two(op.sent(2, g, at, n.windows), op.sent(3, g, at, n.windows), n, to + in + 2 * j);
    };
    for_halves<C>(out, (end - i) * out, last, send);
    for (int64_t j = 2 * out; j < in; ++j) to[j] = to[in + j] = S{};
    if (row.h == pool.h.out - 1)
      for (int64_t j = 2 * in; j < (pool.h.in - 2 * row.h) * in; ++j) to[j] = S{};
  }
}
