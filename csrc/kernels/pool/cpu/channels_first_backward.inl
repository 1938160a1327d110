// Gradients of pools over channels_first planes, and the classes that route a gradient back through a window. 2x2
// windows have an algorithm of their own (halves.inl). There are two for all other windows:
// - scatter: a piece of grad_x that stays in L1 is cleared, and every window adds its gradient; where sums have another
//   dtype and windows overlap, the piece is a buffer, which is then written;
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
#include "routes.inl"
#include "spread.inl"
#include "window_ops.inl"
#include "windows.inl"

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

// Positions [low, high) of a plane of grad_x, to which windows add. T is the dtype of the sums, or that of grad_x where
// no element gets more than one gradient.
template <class T>
struct Piece {
  T* at;
  int64_t low, high;
};

// to[i] gets the gradients of the windows with their maximum there, 0 <= i < size; window w starts at starts(w). So for
// `planes` planes of `size` elements and as many windows. Not inlined, as g++ then keeps all it needs in memory:
// bfloat16 8x64x28x28 with 3x3 windows 440 us, and not 220 (Zen 1). Unrolled, as a load that once had to wait for the
// store before it does so ever after: 8x256x10x10 to 7x7 480 and 340.
template <class S, class I, class T, class Starts>
__attribute__((noinline)) void scatter_maxima(const S* grad_y, MaxRoute<S, I> op, int64_t windows, Starts starts, T* to,
                                              int64_t size, int64_t planes) {
  for (int64_t i = 0; i < planes; ++i, grad_y += windows, op = op.from(windows), to += size)
#pragma GCC unroll 4
    for (int64_t w = 0; w < windows; ++w) {
      const int64_t at = op.position(w, starts(w));
      // If a piece ends inside a window, the maximum may be in another piece. Indices may be anybody's, too.
      if (static_cast<uint64_t>(at) < static_cast<uint64_t>(size)) give(to[at], grad_y + w);
    }
}

// Adds the gradients of the windows `ws` of one row to the piece. `row` is the number of the row's first window in the
// plane.
template <class S, class I, class T>
inline void scatter_row(const Pool& pool, const S* grad_y, const MaxRoute<S, I>& op, const Piece<T>& piece, int64_t row,
                        int64_t d, int64_t h, const PoolRange& ws, const PlaneWindows& windows) {
  const int64_t first = position_of(pool, windows.d.window(d).first, windows.h.window(h).first, 0) - piece.low;
  const auto scatter = [&](auto starts) {
    scatter_maxima(grad_y + row + ws.begin, op.from(row + ws.begin), ws.end - ws.begin, starts, piece.at,
                   piece.high - piece.low, 1);
  };
  if (!MaxRoute<S, I>::kWindow) return scatter([low = piece.low](int64_t) { return -low; });
  if (pool.w.ragged)
    return scatter([first, begin = ws.begin, &w = windows.w](int64_t p) { return first + w.window(begin + p).first; });
  scatter([first = first + ws.begin * pool.w.stride - pool.w.padding, stride = pool.w.stride](int64_t p) {
    return first + p * stride;
  });
}

template <class S>
inline void scatter_row(const Pool& pool, const S* grad_y, const AvgRoute<S>& op, const Piece<Compute<S>>& piece,
                        int64_t row, int64_t d, int64_t h, const PoolRange& ws, const PlaneWindows& windows) {
  using C = Compute<S>;
  using V = Vec<C>;
  const PoolWindow d_window = windows.d.window(d), h_window = windows.h.window(h);
  const C row_divisor = op.first_divisor() * op.divisor(windows.d, d) * op.divisor(windows.h, h);
  for (int64_t w = ws.begin; w < ws.end; ++w) {
    const PoolWindow w_window = windows.w.window(w);
    const C w_divisor = op.divisor(windows.w, w);
    const C share = value_at(grad_y + row + w) / (row_divisor * w_divisor);
    const int64_t left = w_window.first + w_window.begin, n = w_window.end - w_window.begin;
    for (int64_t i = d_window.begin; i < d_window.end; ++i) {
      int64_t first = position_of(pool, d_window.first + i, h_window.first + h_window.begin, left) - piece.low;
      for (int64_t j = h_window.begin; j < h_window.end; ++j, first += pool.w.in) {
        const int64_t end = smaller(first + n, piece.high - piece.low);
        int64_t k = larger<int64_t>(first, 0);
        if (n >= V::size)
          for (; k + V::size <= end; k += V::size) (V::load(piece.at + k) + V::set1(share)).store(piece.at + k);
        for (; k < end; ++k) piece.at[k] += share;
      }
    }
  }
}

// Adds those of a plane's windows [ds] x [hs] x [ws]; grad_y and op are at the plane's first window.
template <class S, class Route, class T>
inline void scatter_rows(const Pool& pool, const S* grad_y, const Route& op, const Piece<T>& piece, const PoolRange& ds,
                         const PoolRange& hs, const PoolRange& ws, const PlaneWindows& windows) {
  for (int64_t d = ds.begin; d < ds.end; ++d)
    for (int64_t h = hs.begin; h < hs.end; ++h)
      scatter_row(pool, grad_y, op, piece, (d * pool.h.out + h) * pool.w.out, d, h, ws, windows);
}

// Where the windows of a plane start, for indices that are counted from there.
struct WindowStarts {
  static constexpr int64_t kRoom = 1024;
  int32_t at[kRoom];

  explicit WindowStarts(const Pool& pool) {
    const PlaneWindows windows(pool, true);
    int32_t* next = at;
    for (int64_t d = 0; d < pool.d.out; ++d)
      for (int64_t h = 0; h < pool.h.out; ++h) {
        const int64_t row = position_of(pool, windows.d.window(d).first, windows.h.window(h).first, 0);
        for (int64_t w = 0; w < pool.w.out; ++w) *next++ = static_cast<int32_t>(row + windows.w.window(w).first);
      }
  }
};

// Pieces are several planes if these fit, else whole rows, else parts of one row.
template <class S, class Route>
void backward_scatter(const Pool& pool, const S* grad_y, S* grad_x, const Route& op, const Team& team) {
  using C = Compute<S>;
  constexpr int64_t capacity = kPoolBandBytes / static_cast<int64_t>(sizeof(C));
  const int64_t plane = pool.in_plane(), row = pool.w.in;
  // body(piece) for `count` cleared elements of grad_x from `at` on.
  const auto with_piece = [&](C* sums, int64_t at, int64_t count, auto body) {
    S* const to = grad_x + at;
    if constexpr (same_type<S, C> || !Route::kAverages)  // averages over tiles spread
      if (same_type<S, C> || is_tiled(pool)) {
        __builtin_memset(to, 0, static_cast<size_t>(count) * sizeof(S));
        return body(to);
      }
    if constexpr (!same_type<S, C>) {
      __builtin_memset(sums, 0, static_cast<size_t>(count) * sizeof(C));
      body(sums);
      store_row(sums, to, static_cast<int>(count));
    }
  };
  if constexpr (!Route::kAverages)
    if (plane <= capacity && pool.out_plane() <= WindowStarts::kRoom) {
      for_units(team, pool.planes, 2 * plane, [&](int64_t begin, int64_t end) {
        alignas(64) C sums[capacity];
        const int64_t windows = pool.out_plane();
        const auto scatter = [&](auto starts) {
          for (int64_t first = begin; first < end; first += capacity / plane) {
            const int64_t planes = smaller(end - first, capacity / plane);
            with_piece(sums, first * plane, planes * plane, [&](auto* piece) {
              scatter_maxima(grad_y + first * windows, op.from(first * windows), windows, starts, piece, plane, planes);
            });
          }
        };
        if constexpr (Route::kWindow) {
          const WindowStarts starts(pool);
          scatter([at = starts.at](int64_t w) { return at[w]; });
        } else {
          scatter([](int64_t) { return 0; });
        }
      });
      return;
    }
  if (plane <= capacity) {
    for_units(team, pool.planes, 2 * plane, [&](int64_t begin, int64_t end) {
      alignas(64) C sums[capacity];
      const PlaneWindows windows(pool, op.pads());
      for (int64_t first = begin; first < end; first += capacity / plane) {
        const int64_t last = smaller(end, first + capacity / plane);
        with_piece(sums, first * plane, (last - first) * plane, [&](auto* piece) {
          for (int64_t i = first; i < last; ++i, piece += plane)
            scatter_rows(pool, grad_y + i * pool.out_plane(), op.from(i * pool.out_plane()), Piece{piece, 0, plane},
                         {0, pool.d.out}, {0, pool.h.out}, {0, pool.w.out}, windows);
        });
      }
    });
    return;
  }
  const int64_t size = row <= capacity ? smaller(capacity / row * row, plane) : capacity;
  const int64_t a_row = ceil_div(row, size);  // pieces per row, if rows are divided
  const int64_t pieces = row <= capacity ? ceil_div(plane, size) : a_row * pool.d.in * pool.h.in;
  for_units(team, pool.planes * pieces, 2 * size, [&](int64_t begin, int64_t end) {
    alignas(64) C sums[capacity];
    const PlaneWindows windows(pool, op.pads());
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t i = unit / pieces, number = unit % pieces;
      const int64_t low = row <= capacity ? number * size : number / a_row * row + number % a_row * size;
      const int64_t high = smaller(low + size, row <= capacity ? plane : (number / a_row + 1) * row);
      const int64_t first_row = low / row, last_row = (high - 1) / row;
      const PoolRowsReach reach(pool.d, pool.h, first_row, last_row + 1);
      PoolRange ws = {0, pool.w.out};
      if (first_row == last_row) ws = outputs_of(pool.w, low % row, (high - 1) % row + 1);
      with_piece(sums, i * plane + low, high - low, [&](auto* piece) {
        scatter_rows(pool, grad_y + i * pool.out_plane(), op.from(i * pool.out_plane()), Piece{piece, low, high},
                     reach.ds, reach.hs, ws, windows);
      });
    }
  });
}

enum class PoolBackwardWay { halves, spread, across, scatter };

template <class C>
PoolBackwardWay pool_backward_way(const Pool& pool, bool averages, bool window) {
  if ((averages || window) && tiles_by_two(pool)) return PoolBackwardWay::halves;
  if (!averages) return PoolBackwardWay::scatter;
  // Where no row is copied to another one, a vector of neighbours is sooner there than one of each window: 16x64x1000
  // with windows of 2, 1380 and 3780 us (Zen 1, one thread).
  const bool one_row = pool.d.kernel * pool.h.kernel == 1;
  if (is_tiled(pool) && !(one_row && goes_back_across<C>(pool))) return PoolBackwardWay::spread;
  return goes_back_across<C>(pool) ? PoolBackwardWay::across : PoolBackwardWay::scatter;
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
    if (way == PoolBackwardWay::spread) return backward_spread(pool, grad_y, grad_x, op, team);
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
