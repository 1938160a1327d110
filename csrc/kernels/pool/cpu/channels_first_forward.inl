// Pooling of channels_first planes. 2x2 windows have an algorithm of their own (halves.inl). There are two for all
// other windows:
// - across: a vector holds neighbouring outputs of a row. A tap is a load, or with a stride of two, two loads and a
//   permutation. If windows cross the left or right border, rows are first copied with padding into a band that stays
//   in L1;
// - within: one window at a time; a vector holds neighbouring elements of the window.
#pragma once

#include "../../common/cpu/common.inl"
#include "halves.inl"
#include "taps.inl"
#include "window_ops.inl"
#include "windows.inl"

constexpr int64_t kPoolBandBytes = 24576;  // half of L1
constexpr int64_t kPoolBandColumns = 512;  // the most outputs of a band along a row

// The least width of windows that are read as vectors.
constexpr int64_t kPoolVectorWidth = 4;

// A band: the inputs of `columns` outputs in each of `rows` rows. A copied row is `pitch` elements long.
struct PoolBand {
  int64_t columns, rows, pitch;
};

template <class C>
inline PoolBand pool_band(const Pool& pool) {
  const int64_t capacity = kPoolBandBytes / static_cast<int64_t>(sizeof(C));
  const int64_t reach = (pool.w.kernel - 1) * pool.w.dilation + 1;
  const int64_t height = smaller((pool.h.kernel - 1) * pool.h.dilation + 1, pool.h.in);
  const int64_t row_capacity = capacity / (pool.d.kernel * height);
  if (row_capacity < reach) return {0, 0, 0};
  PoolBand band;
  band.columns = smaller(smaller(pool.w.out, kPoolBandColumns), (row_capacity - reach) / pool.w.stride + 1);
  band.pitch = (band.columns - 1) * pool.w.stride + reach;
  band.rows = (capacity / (pool.d.kernel * band.pitch) - height) / pool.h.stride + 1;
  return band;
}

// Whether all windows of a row are inside the row.
inline bool inside(const PoolAxis& axis) {
  return !axis.ragged && axis.padding == 0 &&
         (axis.out - 1) * axis.stride + (axis.kernel - 1) * axis.dilation < axis.in;
}

// Whether rows can be read in place.
template <class S>
inline bool in_place(const PoolAxis& axis) {
  return inside(axis) && (axis.stride <= 2 || same_type<S, Compute<S>>);
}

// Whether `across` is faster than `within`. It compares estimated cycles per row of outputs (Granite Rapids): for
// across the cycles of a tap of a vector of outputs, which are gathered one by one for strides above two; for within
// the cycles of a vector of a window, and of combining its lanes.
template <class S>
inline bool goes_across(const Pool& pool, bool indexed) {
  using C = Compute<S>;
  constexpr int64_t V = Vec<C>::size;
  if (pool.w.ragged || pool.w.stride >= kGatherStride || (indexed && pool.taps() > 256)) return false;
  const int64_t window_rows = pool.d.kernel * pool.h.kernel;
  const bool vectors = pool.w.dilation == 1 && pool.w.kernel >= kPoolVectorWidth;
  const int64_t tap = pool.w.stride <= 2 ? 3 : 4 + smaller(V, pool.w.out);
  const int64_t across = ceil_div(pool.w.out, V) * window_rows * pool.w.kernel * tap;
  const int64_t in_window = window_rows * (vectors ? ceil_div(pool.w.kernel, V) * 4 : pool.w.kernel * 3) + 30;
  return across <= pool.w.out * (indexed ? 2 * in_window : in_window) &&
         (in_place<S>(pool.w) || pool_band<C>(pool).columns >= smaller(pool.w.out, V));
}

inline int64_t position_of(const Pool& pool, int64_t d, int64_t h, int64_t w) {
  return (d * pool.h.in + h) * pool.w.in + w;
}

template <class E>
inline PoolRows<E> rows_of(const Pool& pool, const PoolWindow& d, const PoolWindow& h) {
  PoolRows<E> rows;
  rows.depths = d.end - d.begin;
  rows.heights = h.end - h.begin;
  rows.tap_row = pool.w.kernel;
  rows.tap_depth = pool.h.kernel * rows.tap_row;
  rows.tap = d.begin * rows.tap_depth + h.begin * rows.tap_row;
  rows.width = pool.w.kernel;
  rows.dilation = pool.w.dilation;
  rows.stride = pool.w.stride;
  return rows;
}

template <class Op>
inline PoolPlace<typename Op::C> place_of(const Op& op, const Pool& pool, int64_t d, int64_t h) {
  const int64_t divisor = op.divisor(pool.d, d) * op.divisor(pool.h, h);
  const int64_t first = position_of(pool, window_of(pool.d, d).first, window_of(pool.h, h).first, 0);
  return {first, pool.w.stride, static_cast<typename Op::C>(divisor), nullptr};
}

// Computes rows [begin, end) of y from rows of x in place.
template <class S, int kStride, int kWidth, class Op>
void pool_across_inside(const Pool& pool, const S* x, const Op& op, int64_t begin, int64_t end) {
  using C = Compute<S>;
  const C w_divisor = static_cast<C>(op.divisor(pool.w, 0));
  PoolRow row(begin, pool.d.out, pool.h.out);
  for (int64_t i = begin; i < end; ++i, row.next(pool.d.out, pool.h.out)) {
    const PoolWindow d = window_of(pool.d, row.d), h = window_of(pool.h, row.h);
    PoolRows<S> rows = rows_of<S>(pool, d, h);
    rows.row_step = pool.h.dilation * pool.w.in;
    rows.depth_step = pool.d.dilation * pool.h.in * pool.w.in;
    rows.p = x + row.plane * pool.in_plane() +
             position_of(pool, d.first + d.begin * pool.d.dilation, h.first + h.begin * pool.h.dilation, 0);
    PoolPlace<C> place = place_of(op, pool, row.d, row.h);
    place.divisor = op.whole_divisor(place.divisor * w_divisor);
    pool_row<Op, kStride, kWidth>(op, rows, pool.w.out, nullptr, i * pool.w.out, place);
  }
}

// Copies elements [first, first + count) of a row with `in` elements; elements outside the row are `outside`.
template <class S>
inline void copy_padded(const S* row, int64_t in, int64_t first, int64_t count, Compute<S> outside, Compute<S>* to) {
  const int64_t left = smaller(larger<int64_t>(-first, 0), count);
  const int64_t right = larger(smaller(in - first, count), left);
  for (int64_t i = 0; i < left; ++i) to[i] = outside;
  if (right > left) widen_row(row + first + left, to + left, static_cast<int>(right - left));
  for (int64_t i = right; i < count; ++i) to[i] = outside;
}

// Computes rows [begin, end) of y from a band.
template <class S, int kStride, int kWidth, class Op>
void pool_across_band(const Pool& pool, const S* x, const Op& op, int64_t begin, int64_t end) {
  using C = Compute<S>;
  alignas(64) C buffer[kPoolBandBytes / sizeof(C)];
  uint8_t first_taps[kPoolBandColumns];
  C divisors[kPoolBandColumns];
  const PoolBand band = pool_band<C>(pool);
  for (int64_t column = 0; column < pool.w.out; column += band.columns) {
    const int64_t columns = smaller(band.columns, pool.w.out - column);
    const int64_t width = (columns - 1) * pool.w.stride + (pool.w.kernel - 1) * pool.w.dilation + 1;
    for (int64_t j = 0; j < columns; ++j) {
      const PoolWindow w = window_of(pool.w, column + j);
      first_taps[j] = static_cast<uint8_t>(w.begin);
      divisors[j] = static_cast<C>(op.divisor(pool.w, column + j));
    }
    PoolRow row(begin, pool.d.out, pool.h.out);
    for (int64_t i = begin; i < end;) {
      // As many rows of one plane and depth as the band holds.
      const int64_t count = smaller(smaller(band.rows, pool.h.out - row.h), end - i);
      const PoolWindow d = window_of(pool.d, row.d);
      const int64_t low = smaller(pool.h.in, larger<int64_t>(0, window_of(pool.h, row.h).first));
      const int64_t last = window_of(pool.h, row.h + count - 1).first + (pool.h.kernel - 1) * pool.h.dilation;
      const int64_t high = smaller(pool.h.in, last + 1);
      const int64_t depth_step = (high - low) * band.pitch;
      for (int64_t t = d.begin; t < d.end; ++t)
        for (int64_t r = low; r < high; ++r)
          copy_padded(x + row.plane * pool.in_plane() + position_of(pool, d.first + t * pool.d.dilation, r, 0),
                      pool.w.in, column * pool.w.stride - pool.w.padding, width, Op::kOutside,
                      buffer + (t - d.begin) * depth_step + (r - low) * band.pitch);
      for (int64_t j = 0; j < count; ++j, ++i, row.next(pool.d.out, pool.h.out)) {
        const PoolWindow h = window_of(pool.h, row.h);
        PoolRows<C> rows = rows_of<C>(pool, d, h);
        rows.row_step = pool.h.dilation * band.pitch;
        rows.depth_step = depth_step;
        rows.p = buffer + (rows.heights > 0 ? (h.first + h.begin * pool.h.dilation - low) * band.pitch : 0);
        PoolPlace<C> place = place_of(op, pool, row.d, row.h);
        place.position += column * pool.w.stride - pool.w.padding;
        place.divisor = op.whole_divisor(place.divisor);
        place.divisors = op.lane_divisors(divisors);
        pool_row<Op, kStride, kWidth>(op, rows, columns, first_taps, i * pool.w.out + column, place);
      }
    }
  }
}

template <class S, class Op>
void pool_across(const Pool& pool, const S* x, const Op& op, int64_t begin, int64_t end) {
  const auto run = [&]<int kStride, int kWidth>() {
    if (in_place<S>(pool.w))
      pool_across_inside<S, kStride, kWidth>(pool, x, op, begin, end);
    else
      pool_across_band<S, kStride, kWidth>(pool, x, op, begin, end);
  };
  if (pool.w.stride == 1)
    run.template operator()<1, 0>();
  else if (pool.w.stride > 2)
    run.template operator()<0, 0>();
  else if (pool.w.dilation == 1 && pool.w.kernel == 2)
    run.template operator()<2, 2>();
  else if (pool.w.dilation == 1 && pool.w.kernel == 3)
    run.template operator()<2, 3>();
  else
    run.template operator()<2, 0>();
}

// ---- within

// body(p, n, position, tap) for the part of every row of a window that is inside the input: n elements, pool.w.dilation
// apart, from p on. The first is element `position` of the plane and number `tap` in the window.
template <class S, class Body>
inline void for_window_rows(const Pool& pool, const S* plane, const PoolWindow& d, const PoolWindow& h,
                            const PoolWindow& w, Body body) {
  const int64_t step = pool.h.dilation * pool.w.in;
  for (int64_t i = d.begin; i < d.end; ++i) {
    int64_t position = position_of(pool, d.first + i * pool.d.dilation, h.first + h.begin * pool.h.dilation,
                                   w.first + w.begin * pool.w.dilation);
    int64_t tap = (i * pool.h.kernel + h.begin) * pool.w.kernel + w.begin;
    for (int64_t j = h.begin; j < h.end; ++j, position += step, tap += pool.w.kernel)
      body(plane + position, w.end - w.begin, position, tap);
  }
}

template <class C>
inline bool is_nan(C x) {
  return x != x;
}

template <class C>
inline C maximum_of(Vec<C> lanes) {
  constexpr int S = Vec<C>::size;
  C x[S];
  lanes.store(x);
  const unsigned nan = unordered(lanes, lanes).bits();
  if (nan != 0) return x[31 - __builtin_clz(nan)];
  for (int n = S / 2; n > 0; n /= 2)
    for (int i = 0; i < n; ++i) x[i] = x[i + n] > x[i] ? x[i + n] : x[i];
  return x[0];
}

// The maximum of a window. tap and position are those of the first element on entry, and of the maximum on return.
template <class S, bool kIndexed>
inline Compute<S> max_within(const Pool& pool, const S* plane, const PoolWindow& d, const PoolWindow& h,
                             const PoolWindow& w, int64_t& tap, int64_t& position) {
  using C = Compute<S>;
  using V = Vec<C>;
  C best = kMinusInfinity<C>;
  // Narrow windows take a scalar loop. If their sizes vary, the end of that loop is mispredicted and vectors are
  // faster, unless indices are wanted.
  const bool narrow = pool.w.kernel < kPoolVectorWidth && (kIndexed || !pool.w.ragged);
  if (pool.w.dilation != 1 || narrow) {
    for_window_rows(pool, plane, d, h, w, [&](const S* p, int64_t n, int64_t row_position, int64_t row_tap) {
      for (int64_t i = 0; i < n; ++i) {
        // Selections, as a branch could not be predicted.
        const C x = value_at(p + i * pool.w.dilation);
        const bool better = static_cast<int>(x > best) | static_cast<int>(is_nan(x));
        best = better ? x : best;
        position = better ? row_position + i * pool.w.dilation : position;
        tap = better ? row_tap + i : tap;
      }
    });
    return best;
  }
  Maximum<C, false> lanes{Taps<C>::set1(0)};
  for_window_rows(pool, plane, d, h, w, [&](const S* p, int64_t n, int64_t, int64_t) {
    int64_t i = 0;
    for (; i + V::size <= n; i += V::size) lanes.take(V::load(p + i), 0);
    const int rest = static_cast<int>(n - i);
    if (rest > 0) {
      const Mask<C> real = Mask<C>::from_bits((1u << rest) - 1);
      lanes.take(select(real, V::load(p + i, rest), V::set1(kMinusInfinity<C>)), 0);
    }
  });
  best = maximum_of(lanes.value);
  if constexpr (kIndexed) {
    // The position of the maximum: the first element equal to it, or the last NaN.
    bool found = false;
    for_window_rows(pool, plane, d, h, w, [&](const S* p, int64_t n, int64_t row_position, int64_t row_tap) {
      for (int64_t i = 0; i < n && !found; i += V::size) {
        const int count = static_cast<int>(smaller(n - i, V::size));
        const V x = V::load(p + i, count);
        const unsigned bits = (is_nan(best) ? unordered(x, x) : eq(x, V::set1(best))).bits() & ((1u << count) - 1);
        if (bits == 0) continue;
        const int64_t lane = is_nan(best) ? 31 - __builtin_clz(bits) : __builtin_ctz(bits);
        position = row_position + i + lane;
        tap = row_tap + i + lane;
        found = !is_nan(best);
      }
    });
  }
  return best;
}

// The sum of a row as a vector of partial sums, for reduce_add.
template <class S>
inline Vec<Compute<S>> sum_lanes(const S* p, int64_t n) {
  using V = Vec<Compute<S>>;
  if (n <= V::size) return V::load(p, static_cast<int>(n));
  V sums[4] = {V::load(p), V::zero(), V::zero(), V::zero()};
  int64_t i = V::size;
  for (; i + 4 * V::size <= n; i += 4 * V::size)
    for (int j = 0; j < 4; ++j) sums[j] = sums[j] + V::load(p + i + j * V::size);
  for (int j = 1; i + V::size <= n; i += V::size, ++j) sums[j] = sums[j] + V::load(p + i);
  if (i < n) sums[0] = sums[0] + V::load(p + i, static_cast<int>(n - i));
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// The sum of a window, row by row, which keeps the errors of long sums small.
template <class S>
inline Compute<S> sum_within(const Pool& pool, const S* plane, const PoolWindow& d, const PoolWindow& h,
                             const PoolWindow& w) {
  using C = Compute<S>;
  using V = Vec<C>;
  if (pool.w.dilation != 1 || pool.w.kernel < kPoolVectorWidth) {
    C sum = 0;
    for_window_rows(pool, plane, d, h, w, [&](const S* p, int64_t n, int64_t, int64_t) {
      for (int64_t i = 0; i < n; ++i) sum += value_at(p + i * pool.w.dilation);
    });
    return sum;
  }
  V total = V::zero();
  for_window_rows(pool, plane, d, h, w,
                  [&](const S* p, int64_t n, int64_t, int64_t) { total = total + sum_lanes(p, n); });
  return reduce_add(total);
}

template <class C, class S>
inline void store_one(C value, S* p) {
  Vec<C>::set1(value).store(p, 1);
}

// body(at, plane, d, h, w, divisor) for every output of rows [begin, end): the number of the output, the start of its
// plane, its windows along the axes, and the number of elements by which an average divides.
template <class S, class Body>
inline void for_windows(const Pool& pool, const S* x, bool include_pad, int64_t begin, int64_t end, Body body) {
  const PoolWindows ws(pool.w, include_pad);
  PoolRow row(begin, pool.d.out, pool.h.out);
  for (int64_t i = begin; i < end; ++i, row.next(pool.d.out, pool.h.out)) {
    const PoolWindow d = window_of(pool.d, row.d), h = window_of(pool.h, row.h);
    const int64_t divisor = divisor_of(pool.d, row.d, include_pad) * divisor_of(pool.h, row.h, include_pad);
    const S* plane = x + row.plane * pool.in_plane();
    for (int64_t j = 0; j < pool.w.out; ++j)
      body(i * pool.w.out + j, plane, d, h, ws.window(j), divisor * ws.divisor(j));
  }
}

template <class S, class I>
void pool_within(const Pool& pool, const S* x, const MaxPool<S, I>& op, int64_t begin, int64_t end) {
  for_windows(pool, x, true, begin, end,
              [&](int64_t at, const S* plane, const PoolWindow& d, const PoolWindow& h, const PoolWindow& w, int64_t) {
                int64_t tap = (d.begin * pool.h.kernel + h.begin) * pool.w.kernel + w.begin;
                int64_t position =
                    position_of(pool, d.first + d.begin * pool.d.dilation, h.first + h.begin * pool.h.dilation,
                                w.first + w.begin * pool.w.dilation);
                store_one(max_within<S, MaxPool<S, I>::kIndexed>(pool, plane, d, h, w, tap, position), op.y + at);
                if constexpr (MaxPool<S, I>::kPlane)
                  op.indices[at] = position;
                else if constexpr (MaxPool<S, I>::kIndexed)
                  op.indices[at] = static_cast<uint8_t>(tap);
              });
}

template <class S>
void pool_within(const Pool& pool, const S* x, const AvgPool<S>& op, int64_t begin, int64_t end) {
  using C = Compute<S>;
  if (is_whole(pool)) {
    const int64_t size = pool.w.in;
    const C divisor = op.whole_divisor(static_cast<C>(size));
    for (int64_t i = begin; i < end; ++i) store_one(reduce_add(sum_lanes(x + i * size, size)) / divisor, op.y + i);
    return;
  }
  for_windows(
      pool, x, op.include_pad, begin, end,
      [&](int64_t at, const S* plane, const PoolWindow& d, const PoolWindow& h, const PoolWindow& w, int64_t divisor) {
        store_one(sum_within(pool, plane, d, h, w) / op.whole_divisor(static_cast<C>(divisor)), op.y + at);
      });
}

enum class PoolWay { halves, across, within };

template <class S>
PoolWay pool_way(const Pool& pool, bool indexed) {
  if (tiles_by_two(pool)) return PoolWay::halves;
  return goes_across<S>(pool, indexed) ? PoolWay::across : PoolWay::within;
}

template <class S, class Op>
void pool_first(const Pool& pool, const S* x, const Op& op, const Team& team) {
  const PoolWay way = pool_way<S>(pool, Op::kIndexed);
  const int64_t rows = pool.planes * pool.d.out * pool.h.out;
  for_units(team, rows, pool.planes * (pool.in_plane() + pool.out_plane()) / rows, [&](int64_t begin, int64_t end) {
    if (way == PoolWay::halves)
      pool_halves(pool, x, op, begin, end);
    else if (way == PoolWay::across)
      pool_across(pool, x, op, begin, end);
    else
      pool_within(pool, x, op, begin, end);
  });
}
