// Gradients of pools over channels_first planes, and the classes that route a gradient back through a window. 2x2
// windows have an algorithm of their own (halves.inl). There are two for all other windows:
// - scatter: a piece of grad_x that stays in L1 is cleared, every window adds its gradient, and the piece is written;
// - across, for averages: a vector holds neighbouring elements of grad_x of the same phase (with a stride of two, the
//   even or the odd ones) and adds the gradients of the windows that contain them. Rows of grad_y are first divided and
//   copied into a band with zeros around them.
//
// A maximum has its gradient from one element. One scalar addition per window is cheaper than a comparison per element:
// 2 to 2.5 times for 3x3 windows of stride 2 and planes of 28x28 to 112x112 (Granite Rapids).
#pragma once

#include "../../activation/cpu/rows.inl"
#include "../../common/cpu/common.inl"
#include "../../gemm/cpu/microkernels.inl"
#include "channels_first_forward.inl"
#include "halves.inl"
#include "window_ops.inl"
#include "windows.inl"

// The tap of window p that is element i, or -1.
inline int64_t tap_of(const PoolAxis& axis, int64_t p, int64_t i) {
  if (axis.ragged) {
    const PoolWindow window = window_of(axis, p);
    return i - window.first < window.end ? i - window.first : -1;
  }
  const int64_t offset = i + axis.padding - p * axis.stride;
  if (axis.dilation == 1) return offset;
  return offset % axis.dilation == 0 ? offset / axis.dilation : -1;
}

// The gradient of a maximum: grad_y goes to the element that the index names.
template <class S, class I>
struct MaxRoute {
  using C = Compute<S>;
  static constexpr bool kAverages = false;
  static constexpr bool kWindow = same_type<I, uint8_t>;
  const I* indices;
  const TapOffsets* offsets;  // for positions in the window

  // The value of the index that names an element: its tap, or its position in the plane.
  int64_t name(int64_t tap, int64_t position) const { return kWindow ? tap : position; }
  // The gradient that windows [at, at + count) send to the element with this name.
  Vec<C> sent(int64_t name, Vec<C> g, int64_t at, int count) const {
    return select(equal<C>(indices + at, count, name), g, Vec<C>::zero());
  }
  bool pads() const { return true; }
  // The position of the maximum of a window that starts at `first`.
  int64_t position(int64_t at, int64_t first) const {
    if constexpr (kWindow)
      return first + offsets->at[indices[at]];
    else
      return indices[at];
  }
};

// The gradient of an average: every element gets an equal share of grad_y.
template <class S>
struct AvgRoute {
  using C = Compute<S>;
  static constexpr bool kAverages = true, kWindow = false;
  bool include_pad;
  int64_t override;  // divisor_override, or 0

  // The factor of an axis in the divisor. first_divisor() is divisor_override, or 1.
  C divisor(const PoolAxis& axis, int64_t p) const {
    return override != 0 ? C(1) : static_cast<C>(divisor_of(axis, p, include_pad));
  }
  C first_divisor() const { return override != 0 ? static_cast<C>(override) : C(1); }

  bool pads() const { return include_pad; }

  // The share of an element in the gradient of its window.
  Vec<C> share(const Pool& pool, int64_t d, int64_t h, int64_t w) const {
    return Vec<C>::set1(1 / (first_divisor() * divisor(pool.d, d) * divisor(pool.h, h) * divisor(pool.w, w)));
  }
  int64_t name(int64_t, int64_t) const { return 0; }
  Vec<C> sent(int64_t, Vec<C> g, int64_t, int) const { return g; }
};

// ---- across

// The taps that reach elements w * stride + phase of a row, from the last to the first, so that windows are in order.
// Tap t belongs to window w + (phase + padding - t) / stride.
struct PhaseTaps {
  int64_t last, step;

  PhaseTaps(const PoolAxis& axis, int64_t phase) : last(axis.kernel - 1), step(axis.stride) {
    if (step == 2 && (phase + axis.padding - last) % 2 != 0) --last;
  }
};

// A band of grad_y, for `rows` rows and `columns` elements per phase of grad_x. Its rows have `pitch` windows; the
// first of them is `before` windows left of the first column.
struct BackwardBand {
  int64_t columns, rows, pitch, before;
};

// The most windows of an axis that contain any of `rows` neighbouring elements.
inline int64_t windows_over(const PoolAxis& axis, int64_t rows) {
  return smaller(axis.out, (rows - 1 + axis.kernel - 1) / axis.stride + 1);
}

template <class C>
inline BackwardBand backward_band(const Pool& pool) {
  const int64_t capacity = kPoolBandBytes / static_cast<int64_t>(sizeof(C));
  const PoolAxis& w = pool.w;
  BackwardBand band;
  band.before = -floor_div(w.padding - (w.kernel - 1), w.stride);
  const int64_t extra = band.before + (w.stride - 1 + w.padding) / w.stride;
  const int64_t row_capacity =
      smaller(capacity / (windows_over(pool.d, 1) * windows_over(pool.h, 1)), kPoolBandColumns);
  if (row_capacity <= extra) return {0, 0, 0, 0};
  band.columns = smaller(ceil_div(w.in, w.stride), row_capacity - extra);
  band.pitch = band.columns + extra;
  const int64_t available = capacity / (windows_over(pool.d, 1) * band.pitch);
  band.rows = 1;
  while (band.rows < pool.h.in && windows_over(pool.h, band.rows + 1) <= available) ++band.rows;
  return band;
}

template <class C>
inline bool goes_back_across(const Pool& pool) {
  if (pool.w.ragged || pool.w.stride > 2) return false;
  // Long rows with few windows are faster one window at a time.
  if (pool.w.out * Vec<C>::size < pool.w.kernel) return false;
  return backward_band<C>(pool).columns >= smaller(ceil_div(pool.w.in, pool.w.stride), Vec<C>::size);
}

// Moves on to the next row and the windows that contain its elements.
inline void move_on(const Pool& pool, PoolRow& row, PoolReach& ds, PoolReach& hs) {
  row.next(pool.d.in, pool.h.in);
  hs.move_to(pool.h, row.h);
  if (row.h == 0) ds.move_to(pool.d, row.d);
}

// `elements` elements of a row of grad_x. Rows of windows are `step` apart; row (ds.begin, hs.begin) is at g.
template <class S, int kStride>
void backward_row(const Pool& pool, const Compute<S>* g, int64_t depth_step, int64_t step, const PoolReach& ds,
                  const PoolReach& hs, int64_t elements, S* to) {
  using V = Vec<Compute<S>>;
  const PhaseTaps taps[2] = {{pool.w, 0}, {pool.w, kStride - 1}};
  for (int64_t j = 0; j * kStride < elements; j += V::size) {
    V sums[kStride];
    for (V& sum : sums) sum = V::zero();
    for (int64_t d = 0; d < ds.end - ds.begin; ++d)
      for (int64_t h = 0; h < hs.end - hs.begin; ++h) {
        const Compute<S>* row = g + d * depth_step + h * step + j;
        for (int phase = 0; phase < kStride; ++phase)
          for (int64_t t = taps[phase].last; t >= 0; t -= taps[phase].step)
            sums[phase] = sums[phase] + V::load(row + (phase + pool.w.padding - t) / kStride);
      }
    const int64_t left = elements - j * kStride;
    if constexpr (kStride == 1) {
      sums[0].store(to + j, static_cast<int>(smaller(left, V::size)));
    } else {
      V a, b;
      interleave(sums[0], sums[1], a, b);
      a.store(to + 2 * j, static_cast<int>(smaller(left, V::size)));
      if (left > V::size) b.store(to + 2 * j + V::size, static_cast<int>(smaller(left - V::size, V::size)));
    }
  }
}

// Computes rows [begin, end) of grad_x.
template <class S, int kStride>
void backward_across(const Pool& pool, const S* grad_y, S* grad_x, const AvgRoute<S>& op, int64_t begin, int64_t end) {
  using C = Compute<S>;
  using V = Vec<C>;
  alignas(64) C g[kPoolBandBytes / sizeof(C) + V::size];  // the last row is read as whole vectors
  alignas(64) C divisors[kPoolBandColumns + V::size];
  const BackwardBand band = backward_band<C>(pool);
  for (int64_t column = 0; column * kStride < pool.w.in; column += band.columns) {
    const int64_t elements = smaller(pool.w.in - column * kStride, band.columns * kStride);
    const int64_t first = column - band.before;  // the first window of the band
    for (int64_t j = 0; j < round_up(band.pitch, V::size); ++j)
      divisors[j] = first + j >= 0 && first + j < pool.w.out ? op.divisor(pool.w, first + j) : C(1);
    PoolRow row(begin, pool.d.in, pool.h.in);
    for (int64_t i = begin; i < end;) {
      const int64_t count = smaller(smaller(band.rows, pool.h.in - row.h), end - i);
      PoolReach ds(pool.d, row.d), hs(pool.h, row.h);
      const PoolRange all = outputs_of(pool.h, row.h, row.h + count);
      const int64_t heights = larger<int64_t>(all.end - all.begin, 0);
      for (int64_t d = ds.begin; d < ds.end; ++d)
        for (int64_t h = all.begin; h < all.end; ++h) {
          C* to = g + ((d - ds.begin) * heights + h - all.begin) * band.pitch;
          copy_padded(grad_y + (row.plane * pool.d.out + d) * pool.h.out * pool.w.out + h * pool.w.out, pool.w.out,
                      first, band.pitch, C(0), to);
          const V divisor = V::set1(op.first_divisor() * op.divisor(pool.d, d) * op.divisor(pool.h, h));
          for (int64_t j = 0; j < band.pitch; j += V::size) {
            const int n = static_cast<int>(smaller(band.pitch - j, V::size));
            (V::load(to + j, n) / (divisor * V::load(divisors + j))).store(to + j, n);
          }
        }
      // These elements are read but not used. They are cleared, as denormals in uninitialised memory would be slow.
      V::zero().store(g + (ds.end - ds.begin) * heights * band.pitch);
      for (int64_t j = 0; j < count; ++j, ++i, move_on(pool, row, ds, hs))
        backward_row<S, kStride>(pool, g + (hs.begin - all.begin) * band.pitch + band.before, heights * band.pitch,
                                 band.pitch, ds, hs, elements, grad_x + i * pool.w.in + column * kStride);
    }
  }
}

// ---- scatter

// A piece of a plane of grad_x, positions [low, high), to which windows add.
template <class C>
struct Piece {
  C* sums;
  int64_t low, high;
};

// Adds the gradients of the windows `ws` of one row to the piece. `row` is the number of the row's first window; the
// windows start at position row_first of the plane.
template <class S, class I>
inline void scatter_row(const Pool& pool, const S* grad_y, const MaxRoute<S, I>& op, const Piece<Compute<S>>& piece,
                        int64_t row, int64_t d, int64_t h, const PoolRange& ws, const PoolWindows& windows) {
  const int64_t first = position_of(pool, window_of(pool.d, d).first, window_of(pool.h, h).first, 0) - piece.low;
  const uint64_t size = static_cast<uint64_t>(piece.high - piece.low);
  const auto add = [&](int64_t w, int64_t w_first) {
    // If a piece ends inside a window, the maximum may be in another piece.
    const int64_t at = op.position(row + w, first + w_first);
    const int64_t to = MaxRoute<S, I>::kWindow ? at : at - piece.low;
    if (static_cast<uint64_t>(to) < size) piece.sums[to] += value_at(grad_y + row + w);
  };
  if (pool.w.ragged)
    for (int64_t w = ws.begin; w < ws.end; ++w) add(w, windows.window(w).first);
  else
    for (int64_t w = ws.begin; w < ws.end; ++w) add(w, w * pool.w.stride - pool.w.padding);
}

template <class S>
inline void scatter_row(const Pool& pool, const S* grad_y, const AvgRoute<S>& op, const Piece<Compute<S>>& piece,
                        int64_t row, int64_t d, int64_t h, const PoolRange& ws, const PoolWindows& windows) {
  using C = Compute<S>;
  using V = Vec<C>;
  const PoolWindow d_window = window_of(pool.d, d), h_window = window_of(pool.h, h);
  const C row_divisor = op.first_divisor() * op.divisor(pool.d, d) * op.divisor(pool.h, h);
  for (int64_t w = ws.begin; w < ws.end; ++w) {
    const PoolWindow w_window = windows.window(w);
    const C w_divisor = op.override != 0 ? C(1) : static_cast<C>(windows.divisor(w));
    const C share = value_at(grad_y + row + w) / (row_divisor * w_divisor);
    const int64_t left = w_window.first + w_window.begin, n = w_window.end - w_window.begin;
    for (int64_t i = d_window.begin; i < d_window.end; ++i) {
      int64_t first = position_of(pool, d_window.first + i, h_window.first + h_window.begin, left) - piece.low;
      for (int64_t j = h_window.begin; j < h_window.end; ++j, first += pool.w.in) {
        const int64_t end = smaller(first + n, piece.high - piece.low);
        int64_t k = larger<int64_t>(first, 0);
        if (n >= V::size)
          for (; k + V::size <= end; k += V::size) (V::load(piece.sums + k) + V::set1(share)).store(piece.sums + k);
        for (; k < end; ++k) piece.sums[k] += share;
      }
    }
  }
}

// Pieces are whole rows if a row fits, else parts of one row.
template <class C>
inline int64_t piece_size(const Pool& pool) {
  const int64_t capacity = kPoolBandBytes / static_cast<int64_t>(sizeof(C));
  return pool.w.in <= capacity ? smaller(capacity / pool.w.in * pool.w.in, pool.in_plane()) : capacity;
}

template <class S, class Route>
void backward_scatter(const Pool& pool, const S* grad_y, S* grad_x, const Route& op, const Team& team) {
  using C = Compute<S>;
  const int64_t size = piece_size<C>(pool);
  const bool whole_rows = size % pool.w.in == 0;
  const int64_t a_row = ceil_div(pool.w.in, size);  // pieces per row, if rows are divided
  const int64_t pieces = whole_rows ? ceil_div(pool.in_plane(), size) : a_row * pool.d.in * pool.h.in;
  for_units(team, pool.planes * pieces, 2 * size, [&](int64_t begin, int64_t end) {
    alignas(64) C sums[kPoolBandBytes / sizeof(C)];
    const PoolWindows windows(pool.w, op.pads());
    for (int64_t unit = begin; unit < end; ++unit) {
      int64_t plane = unit, low = 0, high = pool.in_plane();
      PoolRange ds = {0, pool.d.out}, hs = {0, pool.h.out}, ws = {0, pool.w.out};
      if (pieces > 1) {
        const int64_t number = unit % pieces;
        plane = unit / pieces;
        low = whole_rows ? number * size : number / a_row * pool.w.in + number % a_row * size;
        high = smaller(low + size, whole_rows ? high : (number / a_row + 1) * pool.w.in);
        const int64_t first_row = low / pool.w.in, last_row = (high - 1) / pool.w.in;
        const int64_t first_d = first_row / pool.h.in, last_d = last_row / pool.h.in;
        ds = outputs_of(pool.d, first_d, last_d + 1);
        if (first_d == last_d) hs = outputs_of(pool.h, first_row % pool.h.in, last_row % pool.h.in + 1);
        if (first_row == last_row) ws = outputs_of(pool.w, low % pool.w.in, (high - 1) % pool.w.in + 1);
      }
      for (int64_t i = 0; i < high - low; ++i) sums[i] = 0;
      const Piece<C> piece = {sums, low, high};
      for (int64_t d = ds.begin; d < ds.end; ++d)
        for (int64_t h = hs.begin; h < hs.end; ++h)
          scatter_row(pool, grad_y, op, piece, ((plane * pool.d.out + d) * pool.h.out + h) * pool.w.out, d, h, ws,
                      windows);
      store_row(sums, grad_x + plane * pool.in_plane() + low, static_cast<int>(high - low));
    }
  });
}

// Averages of whole planes: every element of a plane of grad_x has the same value.
template <class S>
void backward_whole(const Pool& pool, const S* grad_y, S* grad_x, const AvgRoute<S>& op, const Team& team) {
  using C = Compute<S>;
  using V = Vec<C>;
  const int64_t size = pool.w.in;
  const C divisor = op.first_divisor() * op.divisor(pool.w, 0);
  for_units(team, pool.planes, size, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const V share = V::set1(value_at(grad_y + i) / divisor);
      S* const to = grad_x + i * size;
      int64_t j = 0;
      for (; j + V::size <= size; j += V::size) share.store(to + j);
      if (j < size) share.store(to + j, static_cast<int>(size - j));
    }
  });
}

enum class PoolBackwardWay { halves, whole, across, scatter };

template <class C>
PoolBackwardWay pool_backward_way(const Pool& pool, bool averages, bool window) {
  if ((averages || window) && tiles_by_two(pool)) return PoolBackwardWay::halves;
  if (averages && is_whole(pool)) return PoolBackwardWay::whole;
  return averages && goes_back_across<C>(pool) ? PoolBackwardWay::across : PoolBackwardWay::scatter;
}

template <class S, class Route>
void pool_backward_first(const Pool& pool, const S* grad_y, S* grad_x, const Route& op, const Team& team) {
  const PoolBackwardWay way = pool_backward_way<Compute<S>>(pool, Route::kAverages, Route::kWindow);
  if constexpr (Route::kAverages || Route::kWindow)
    if (way == PoolBackwardWay::halves) {
      for_units(team, pool.planes * pool.h.out, 2 * pool.w.in + pool.w.out,
                [&](int64_t begin, int64_t end) { backward_halves(pool, grad_y, grad_x, op, begin, end); });
      return;
    }
  if constexpr (Route::kAverages) {
    if (way == PoolBackwardWay::whole) {
      backward_whole(pool, grad_y, grad_x, op, team);
      return;
    }
    if (way == PoolBackwardWay::across) {
      for_units(team, pool.planes * pool.d.in * pool.h.in, 2 * pool.w.in, [&](int64_t begin, int64_t end) {
        if (pool.w.stride == 1)
          backward_across<S, 1>(pool, grad_y, grad_x, op, begin, end);
        else
          backward_across<S, 2>(pool, grad_y, grad_x, op, begin, end);
      });
      return;
    }
  }
  backward_scatter(pool, grad_y, grad_x, op, team);
}
