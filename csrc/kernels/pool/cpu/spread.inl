// Gradients of averages over windows that do not overlap, in both layouts: every element has the share of its window.
#pragma once

#include "../../common/cpu/common.inl"
#include "../../common/cpu/some.inl"
#include "routes.inl"
#include "window_ops.inl"
#include "windows.inl"

template <class S>
inline void clear_row(S* to, int64_t size) {
  if (size > 0) __builtin_memset(to, 0, static_cast<size_t>(size) * sizeof(S));
}

// Rows of elements [d, d_end) x [h, h_end) of a plane, of the windows of one row of these; the others of their tiles go
// on to d_next and h_next.
struct SpreadRows {
  int64_t d, d_end, d_next, h, h_end, h_next;

  SpreadRows(const Pool& pool, int64_t window_d, int64_t window_h)
      : d(window_d * pool.d.tile()), h(window_h * pool.h.tile()) {
    const bool any = window_d < pool.d.out && window_h < pool.h.out;
    d_next = smaller(pool.d.in, d + pool.d.tile());
    h_next = smaller(pool.h.in, h + pool.h.tile());
    d_end = any ? smaller(pool.d.in, d + pool.d.kernel) : d;
    h_end = any ? smaller(pool.h.in, h + pool.h.kernel) : h;
  }
};

// Zeros where no window is.
template <class S>
inline void clear_between(const Pool& pool, const SpreadRows& rows, S* plane) {
  const int64_t size = pool.w.in * pool.channels;
  const int64_t done = pool.w.kernel < pool.w.tile() ? 0 : smaller(size, pool.w.out * pool.w.tile() * pool.channels);
  if (done == size && rows.d_end == rows.d_next && rows.h_end == rows.h_next) return;
  for (int64_t j = rows.d; j < rows.d_next; ++j)
    for (int64_t k = rows.h; k < rows.h_next; ++k) {
      const int64_t from = j < rows.d_end && k < rows.h_end ? done : 0;
      clear_row(plane + (j * pool.h.in + k) * size + from, size - from);
    }
}

// `count` elements, all v. AVX2 stores a part of a vector in more instructions than its elements.
template <class S>
inline void fill_row(Vec<Compute<S>> v, S* to, int64_t count) {
  using V = Vec<Compute<S>>;
  int64_t i = 0;
  for (; i + V::size <= count; i += V::size) v.store(to + i);
#if defined(FASTOPS_VEC_AVX512)
  if (i < count) v.store(to + i, static_cast<int>(count - i));
#else
  S one[V::size];
  v.store(one);
  for (; i < count; ++i) to[i] = one[0];
#endif
}

// A row of windows over planes of one number a position: all but the last have `kernel` elements of a row and the same
// divisor.
template <class C>
struct SpreadWindows {
  int64_t count, tile, kernel, last;
  C divisor, last_divisor;
};

// Each window's share goes to its rows, `heights` with the same d. A last vector may go on into the next window, which
// is written after it. Not inlined, as g++ then keeps the arguments in memory.
template <class S, class C>
__attribute__((noinline)) void spread_numbers(const S* grad_y, SpreadWindows<C> windows, int64_t depths,
                                              int64_t depth_step, int64_t heights, int64_t step, S* to) {
  const bool gaps = windows.kernel < windows.tile;
  for (int64_t p = 0; p < windows.count; ++p, to += windows.tile) {
    const bool last = p + 1 == windows.count;
    const Vec<C> share = Vec<C>::set1(value_at(grad_y + p) / (last ? windows.last_divisor : windows.divisor));
    const int64_t left = (windows.count - 1 - p) * windows.tile + windows.last;
    const int64_t n = last   ? windows.last
                      : gaps ? windows.kernel
                             : smaller(round_up(windows.kernel, Vec<C>::size), left);
    for (int64_t d = 0; d < depths; ++d)
      for (int64_t h = 0; h < heights; ++h) fill_row(share, to + d * depth_step + h * step, n);
  }
}

// Several: the shares of a window are copied to its other elements of the row, and the row to the others.
template <class S>
inline void spread_positions(const Pool& pool, const SpreadRows& rows, const S* grad_y, Compute<S> row_divisor,
                             const AvgRoute<S>& op, const PoolWindows& ws, S* plane) {
  using V = Vec<Compute<S>>;
  const int64_t channels = pool.channels, tile = pool.w.tile() * channels, size = pool.w.in * channels;
  S* const first = plane + (rows.d * pool.h.in + rows.h) * size;
  for (int64_t p = 0; p < pool.w.out; ++p, grad_y += channels) {
    S* const to = first + p * tile;
    const V divisor = V::set1(row_divisor * op.divisor(ws, p));
    for_vectors<V>(0, channels,
                   [&](int64_t c, int some) { store_some(load_some<V>(grad_y + c, some) / divisor, to + c, some); });
    const int64_t n = smaller(pool.w.kernel * channels, size - p * tile);
    for (int64_t have = channels; have < n; have *= 2)
      __builtin_memcpy(to + have, to, static_cast<size_t>(smaller(have, n - have)) * sizeof(S));
  }
  for (int64_t j = rows.d; j < rows.d_end; ++j)
    for (int64_t k = rows.h; k < rows.h_end; ++k)
      if (S* const to = plane + (j * pool.h.in + k) * size; to != first)
        __builtin_memcpy(to, first, static_cast<size_t>(size) * sizeof(S));
}

// Whether an axis has nothing but whole windows, one after the other.
inline bool is_full(const PoolAxis& axis) { return axis.kernel == axis.tile() && axis.in == axis.out * axis.kernel; }

template <class S>
void backward_spread(const Pool& shape, const S* grad_y, S* grad_x, const AvgRoute<S>& op, const Team& team) {
  using C = Compute<S>;
  const int64_t depths = ceil_div(shape.d.in, shape.d.tile()), heights = ceil_div(shape.h.in, shape.h.tile());
  const int64_t cost = 2 * shape.d.tile() * shape.h.tile() * shape.w.in * shape.channels;
  for_units(team, shape.planes * depths * heights, cost, [&](int64_t begin, int64_t end) {
    const Pool pool = shape;  // a local copy, which stores to grad_x cannot alias
    const PlaneWindows windows(pool, op.pads());
    const int64_t last = pool.w.out - 1;
    SpreadWindows<C> row = {
        pool.w.out, pool.w.tile(), pool.w.kernel, smaller(pool.w.kernel, pool.w.in - last * pool.w.tile()), 0, 0};
    if (pool.channels == 1 && pool.d.in == 1 && is_full(pool.d) && is_full(pool.h) && is_full(pool.w)) {
      // Rows of windows follow each other in memory, and so do their windows if these have one row of elements.
      const int64_t together = pool.h.kernel == 1 ? end - begin : 1, size = pool.h.kernel * pool.w.in;
      row.count *= together;
      row.divisor = row.last_divisor =
          op.first_divisor() * op.divisor(windows.d, 0) * op.divisor(windows.h, 0) * op.divisor(windows.w, 0);
      for (int64_t i = begin; i < end; i += together)
        spread_numbers(grad_y + i * pool.w.out, row, 1, 0, pool.h.kernel, pool.w.in, grad_x + i * size);
      return;
    }
    PoolRow at(begin, depths, heights);
    for (int64_t i = begin; i < end; ++i, at.next(depths, heights)) {
      S* const plane = grad_x + at.plane * pool.in_plane() * pool.channels;
      const SpreadRows rows(pool, at.d, at.h);
      clear_between(pool, rows, plane);
      if (rows.d == rows.d_end) continue;
      const C divisor = op.first_divisor() * op.divisor(windows.d, at.d) * op.divisor(windows.h, at.h);
      const S* const g = grad_y + ((at.plane * pool.d.out + at.d) * pool.h.out + at.h) * pool.w.out * pool.channels;
      if (pool.channels > 1) {
        spread_positions(pool, rows, g, divisor, op, windows.w, plane);
        continue;
      }
      row.divisor = divisor * op.divisor(windows.w, 0);
      row.last_divisor = divisor * op.divisor(windows.w, last);
      spread_numbers(g, row, rows.d_end - rows.d, pool.h.in * pool.w.in, rows.h_end - rows.h, pool.w.in,
                     plane + (rows.d * pool.h.in + rows.h) * pool.w.in);
    }
  });
}
