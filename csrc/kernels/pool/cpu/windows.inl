// The geometry of pooling, one axis at a time.
#pragma once

#include "../../common/cpu/common.inl"

struct PoolAxis {
  int64_t in, out, kernel, stride, padding, dilation;
  bool ragged;  // adaptive windows of several sizes; `kernel` is then an upper bound

  // The elements from the first of a window to that of the next one, or all of them.
  int64_t tile() const { return out == 1 ? in : stride; }
};

// A window. Taps [begin, end) are inside the input; tap t is element first + t * dilation.
struct PoolWindow {
  int64_t first, begin, end;
};

inline PoolWindow window_of(const PoolAxis& axis, int64_t p) {
  if (axis.ragged) {
    const int64_t first = p * axis.in / axis.out;
    return {first, 0, ceil_div((p + 1) * axis.in, axis.out) - first};
  }
  PoolWindow window = {p * axis.stride - axis.padding, 0, axis.kernel};
  if (window.first < 0) window.begin = ceil_div(-window.first, axis.dilation);
  if (window.first + (axis.kernel - 1) * axis.dilation >= axis.in)
    window.end = larger(window.begin, ceil_div(axis.in - window.first, axis.dilation));
  return window;
}

// The number of elements along one axis by which an average divides.
inline int64_t divisor_of(const PoolAxis& axis, int64_t p, bool include_pad) {
  if (axis.ragged) return ceil_div((p + 1) * axis.in, axis.out) - p * axis.in / axis.out;
  const int64_t first = p * axis.stride - axis.padding;
  if (include_pad) return smaller(first + axis.kernel, axis.in + axis.padding) - first;
  return smaller(first + axis.kernel, axis.in) - larger<int64_t>(first, 0);
}

// The outputs whose windows may contain an element of [low, high).
struct PoolRange {
  int64_t begin, end;
};

inline PoolRange outputs_of(const PoolAxis& axis, int64_t low, int64_t high) {
  if (axis.ragged) return {low * axis.out / axis.in, smaller(axis.out, ceil_div(high * axis.out, axis.in))};
  const int64_t reach = (axis.kernel - 1) * axis.dilation;
  const int64_t begin = low + axis.padding - reach;
  const int64_t end = floor_div(high - 1 + axis.padding, axis.stride) + 1;
  return {begin <= 0 ? 0 : ceil_div(begin, axis.stride), larger<int64_t>(0, smaller(axis.out, end))};
}

// The outputs along d and h whose windows may contain an element of rows [low, high) of a plane.
struct PoolRowsReach {
  PoolRange ds, hs;

  PoolRowsReach(const PoolAxis& d, const PoolAxis& h, int64_t low, int64_t high)
      : ds(outputs_of(d, low / h.in, (high - 1) / h.in + 1)), hs{0, h.out} {
    if (low / h.in == (high - 1) / h.in) hs = outputs_of(h, low % h.in, (high - 1) % h.in + 1);
  }
};

// outputs_of for successive elements, without divisions.
struct PoolReach {
  int64_t begin, end;

  PoolReach(const PoolAxis& axis, int64_t i) {
    const PoolRange range = outputs_of(axis, i, i + 1);
    begin = range.begin;
    end = range.end;
  }
  void move_to(const PoolAxis& axis, int64_t i) {
    if (axis.ragged || i == 0) {
      *this = PoolReach(axis, i);
      return;
    }
    const int64_t at = i + axis.padding, reach = (axis.kernel - 1) * axis.dilation;
    while (end < axis.out && end * axis.stride <= at) ++end;
    while (begin < end && begin * axis.stride + reach < at) ++begin;
  }
};

// window_of and divisor_of for a whole axis. They divide for every window, so the first kRoom results are in a table.
struct PoolWindows {
  static constexpr int64_t kRoom = 128;
  const PoolAxis& axis;
  bool include_pad;
  PoolWindow windows[kRoom];
  int64_t divisors[kRoom];

  PoolWindows(const PoolAxis& axis, bool include_pad) : axis(axis), include_pad(include_pad) {
    for (int64_t p = 0; p < axis.out && p < kRoom; ++p) {
      windows[p] = window_of(axis, p);
      divisors[p] = divisor_of(axis, p, include_pad);
    }
  }
  PoolWindow window(int64_t p) const { return p < kRoom ? windows[p] : window_of(axis, p); }
  int64_t divisor(int64_t p) const { return p < kRoom ? divisors[p] : divisor_of(axis, p, include_pad); }
};

// A pool: three axes, over batch * channels planes (channels_first), or over `batch` planes with `channels` numbers per
// position (channels_last).
struct Pool {
  PoolAxis d, h, w;
  int64_t planes, channels;

  int64_t in_plane() const { return d.in * h.in * w.in; }
  int64_t out_plane() const { return d.out * h.out * w.out; }
  int64_t taps() const { return d.kernel * h.kernel * w.kernel; }
};

// Of all axes.
struct PlaneWindows {
  PoolWindows d, h, w;
  PlaneWindows(const Pool& pool, bool include_pad)
      : d(pool.d, include_pad), h(pool.h, include_pad), w(pool.w, include_pad) {}
};

inline PoolAxis pool_axis(const PoolGeometry& g, int i) {
  if (!g.adaptive) return {g.in[i], g.out[i], g.kernel[i], g.stride[i], g.padding[i], g.dilation[i], false};
  if (g.out[i] == 0) return {g.in[i], 0, 1, 1, 0, 1, false};
  const int64_t box = pool_box(g, i);
  return {g.in[i], g.out[i], box, box, 0, 1, g.in[i] % g.out[i] != 0};
}

// Whether windows cover whole rows. Then two axes become one: pooling a plane to one number is pooling one long row.
// Taps and positions keep their numbers.
inline bool merges(const PoolAxis& outer, const PoolAxis& inner) {
  return inner.out == 1 && inner.kernel == inner.in && inner.padding == 0 && inner.dilation == 1 && !outer.ragged &&
         outer.padding == 0 && outer.dilation == 1;
}

inline Pool make_pool(const PoolGeometry& g, Layout layout) {
  const bool first = layout == Layout::channels_first;
  Pool pool = {pool_axis(g, 0), pool_axis(g, 1), pool_axis(g, 2), first ? g.batch * g.channels : g.batch,
               first ? 1 : g.channels};
  for (int i = 0; i < 2 && merges(pool.h, pool.w); ++i) {
    const int64_t row = pool.w.in;
    pool.w = {pool.h.in * row, pool.h.out, pool.h.kernel * row, pool.h.stride * row, 0, 1, false};
    pool.h = pool.d;
    pool.d = {1, 1, 1, 1, 0, 1, false};
  }
  return pool;
}

// Whether windows do not overlap and the first begins with the first element. Each window then has a tile for itself.
inline bool is_tiled(const PoolAxis& axis) {
  return !axis.ragged && axis.padding == 0 && axis.dilation == 1 && (axis.out == 1 || axis.kernel <= axis.stride);
}
inline bool is_tiled(const Pool& pool) { return is_tiled(pool.d) && is_tiled(pool.h) && is_tiled(pool.w); }

// Whether a plane is a single window, and, after merging, a single row. A window that reaches beyond that row has
// another divisor.
inline bool is_whole(const Pool& pool) {
  return pool.d.in == 1 && pool.d.kernel == 1 && pool.h.in == 1 && pool.h.kernel == 1 && pool.w.out == 1 &&
         pool.w.kernel == pool.w.in && pool.w.padding == 0 && pool.w.dilation == 1 && pool.out_plane() == 1;
}

// Iterates over the positions of volumes.
struct PoolPosition {
  int64_t plane, d, h, w;

  static PoolPosition of(int64_t at, int64_t depths, int64_t heights, int64_t widths) {
    return {at / (depths * heights * widths), at / (heights * widths) % depths, at / widths % heights, at % widths};
  }
  void next(int64_t depths, int64_t heights, int64_t widths) {
    if (++w < widths) return;
    w = 0;
    if (++h < heights) return;
    h = 0;
    if (++d < depths) return;
    d = 0;
    ++plane;
  }
};

// Iterates over the rows of volumes.
struct PoolRow {
  int64_t plane, d, h;

  PoolRow(int64_t at, int64_t depths, int64_t heights)
      : plane(at / (depths * heights)), d(at / heights % depths), h(at % heights) {}
  void next(int64_t depths, int64_t heights) {
    if (++h < heights) return;
    h = 0;
    if (++d < depths) return;
    d = 0;
    ++plane;
  }
};

// The distance of tap t from the first element of its window, as a table for windows of at most 256 elements.
struct TapOffsets {
  int64_t at[256];

  explicit TapOffsets(const Pool& pool) {
    int t = 0;
    for (int64_t d = 0; d < pool.d.kernel; ++d)
      for (int64_t h = 0; h < pool.h.kernel; ++h)
        for (int64_t w = 0; w < pool.w.kernel && t < 256; ++w)
          at[t++] = (d * pool.d.dilation * pool.h.in + h * pool.h.dilation) * pool.w.in + w * pool.w.dilation;
  }
};

// The least work per thread, in elements read and written. It is smaller than for a loop bound by memory, as an element
// costs more here.
constexpr int64_t kPoolGrain = 16384;

// body(begin, end) for runs of units that cover [0, units). A unit has the work of `cost` elements.
template <class Body>
void for_units(const Team& team, int64_t units, int64_t cost, Body body) {
  if (units == 0) return;
  parallel(team, threads_for(team, units * cost, units, kPoolGrain), [&](Crew& crew) { crew.divide(units, body); });
}
