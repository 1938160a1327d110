// Pooling of channels_last tensors, forward and backward. A vector holds neighbouring channels of one position, and
// every tap is one load.
#pragma once

#include "../../common/cpu/common.inl"
#include "../../conv/cpu/depthwise_last_correlate.inl"
#include "../../conv/cpu/patches.inl"
#include "channels_first_backward.inl"
#include "channels_first_forward.inl"
#include "routes.inl"
#include "spread.inl"
#include "taps.inl"
#include "window_ops.inl"
#include "windows.inl"

constexpr int kPoolVectors = 4;  // vectors of channels at a time

// Of windows of more elements than that a maximum's gradient goes to its place; of fewer, each element compares its
// name with the index. Where windows overlap, and the dtype is that of sums, it goes to its place as well, kPlaces. One
// thread, Zen 1, us, compared and placed: 8x64x28x28 with 3x3 windows 195 and 242, bfloat16 334 and 206; 8x64x32x32
// with 8x8 230 and 174, bfloat16 432 and 161; 8x64x56x56 with 3x3, stride 2, 2046 and 1708. Not measured with AVX-512.
#if defined(FASTOPS_VEC_AVX2)
template <class S>
constexpr int64_t kTapsCompared = is_half<S> ? 4 : 9;
template <class S>
constexpr int64_t kLeastCompared = Vec<Compute<S>>::size;  // of fewer channels each element has a part of a vector
constexpr bool kPlaces = true;
#else
template <class S>
constexpr int64_t kTapsCompared = 256;
template <class S>
constexpr int64_t kLeastCompared = 0;
constexpr bool kPlaces = false;
#endif

template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};

// n accumulators with the same initial value.
template <class Accumulator, int n>
struct Repeated;
template <class Accumulator>
struct Repeated<Accumulator, 1> {
  Accumulator of[1];
  template <class First>
  explicit Repeated(First first) : of{Accumulator(first)} {}
};
template <class Accumulator>
struct Repeated<Accumulator, 2> {
  Accumulator of[2];
  template <class First>
  explicit Repeated(First first) : of{Accumulator(first), Accumulator(first)} {}
};
template <class Accumulator>
struct Repeated<Accumulator, 4> {
  Accumulator of[4];
  template <class First>
  explicit Repeated(First first) : of{Accumulator(first), Accumulator(first), Accumulator(first), Accumulator(first)} {}
};

// body(c, vectors, count) for all channels: kPoolVectors or half as many whole vectors from channel c on, or one vector
// of `count` channels.
template <int kSize, class Body>
inline void for_channels(int64_t channels, Body body) {
  int64_t c = 0;
  for (; c + kPoolVectors * kSize <= channels; c += kPoolVectors * kSize) body(c, Constant<kPoolVectors>{}, kSize);
  if (c + kPoolVectors / 2 * kSize <= channels) {
    body(c, Constant<kPoolVectors / 2>{}, kSize);
    c += kPoolVectors / 2 * kSize;
  }
  for (; c < channels; c += kSize) body(c, Constant<1>{}, static_cast<int>(smaller(channels - c, kSize)));
}

template <class V, int kVectors, class S>
inline void store_vectors(const V (&values)[kVectors], S* to, int count) {
  for (int v = 0; v < kVectors; ++v) {
    if (kVectors > 1)
      values[v].store(to + v * V::size);
    else
      values[v].store(to, count);
  }
}

// body(position, tap) for every tap of a window inside the input.
template <class Body>
inline void for_taps(const Pool& pool, const PoolWindow& d, const PoolWindow& h, const PoolWindow& w, Body body) {
  for (int64_t i = d.begin; i < d.end; ++i)
    for (int64_t j = h.begin; j < h.end; ++j) {
      const int64_t row = position_of(pool, d.first + i * pool.d.dilation, h.first + j * pool.h.dilation, w.first);
      const int64_t tap = (i * pool.h.kernel + j) * pool.w.kernel;
      for (int64_t k = w.begin; k < w.end; ++k) body(row + k * pool.w.dilation, tap + k);
    }
}

// Sums of long windows are computed from sums of pieces of their rows, which keeps errors small. A window over a whole
// plane has a single row.
constexpr int64_t kPoolLongSum = 64, kPoolPiece = 32;

template <class S, class Op>
void pool_window_last(const Pool& pool, const S* x, const Op& op, int64_t at, const PoolWindow& d, const PoolWindow& h,
                      const PoolWindow& w, const PoolPlace<Compute<S>>& place) {
  using C = Compute<S>;
  using V = Vec<C>;
  const Taps<C> first = Taps<C>::set1(static_cast<int>((d.begin * pool.h.kernel + h.begin) * pool.w.kernel + w.begin));
  for_channels<V::size>(pool.channels, [&](int64_t c, auto vectors, int count) {
    constexpr int kVectors = decltype(vectors)::value;
    const auto take = [&](auto& results, const PoolWindow& depths, const PoolWindow& heights,
                          const PoolWindow& widths) {
      for_taps(pool, depths, heights, widths, [&](int64_t position, int64_t tap) {
        const S* p = x + position * pool.channels + c;
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v)
          results[v].take(kVectors > 1 ? V::load(p + v * V::size) : V::load(p, count), tap);
      });
    };
    Repeated<typename Op::Accumulator, kVectors> results(first);
    if constexpr (Op::kSums) {
      if (pool.taps() >= kPoolLongSum) {
        for (int64_t i = d.begin; i < d.end; ++i)
          for (int64_t j = h.begin; j < h.end; ++j)
            for (int64_t k = w.begin; k < w.end; k += kPoolPiece) {
              Repeated<typename Op::Accumulator, kVectors> piece(first);
              take(piece.of, {d.first, i, i + 1}, {h.first, j, j + 1}, {w.first, k, smaller(k + kPoolPiece, w.end)});
              for (int v = 0; v < kVectors; ++v) results.of[v].take(piece.of[v].value, 0);
            }
      } else {
        take(results.of, d, h, w);
      }
    } else {
      take(results.of, d, h, w);
    }
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) op.finish(at + c + v * V::size, count, results.of[v], place);
  });
}

// The maximum with positions in the plane, for windows with more taps than a byte can count: of pieces of rows that
// have no more, each better than those before it or not, which few are.
template <class S>
void max_far_last(const Pool& pool, const S* x, const MaxPool<S, int64_t>& op, int64_t at, const PoolWindow& d,
                  const PoolWindow& h, const PoolWindow& w) {
  using C = Compute<S>;
  using V = Vec<C>;
  constexpr int64_t kTaps = 256;
  for_channels<V::size>(pool.channels, [&](int64_t c, auto vectors, int count) {
    constexpr int kVectors = decltype(vectors)::value;
    V best[kVectors];
    for (V& value : best) value = V::set1(kMinusInfinity<C>);
    int64_t positions[kVectors * V::size];
    for (int64_t& position : positions)
      position = position_of(pool, d.first + d.begin * pool.d.dilation, h.first + h.begin * pool.h.dilation,
                             w.first + w.begin * pool.w.dilation);
    for (int64_t i = d.begin; i < d.end; ++i)
      for (int64_t j = h.begin; j < h.end; ++j)
        for (int64_t k = w.begin; k < w.end; k += kTaps) {
          const int64_t first = position_of(pool, d.first + i * pool.d.dilation, h.first + j * pool.h.dilation,
                                            w.first + k * pool.w.dilation);
          Repeated<Maximum<C, true>, kVectors> piece(Taps<C>::set1(0));
          for (int64_t t = 0; t < smaller(kTaps, w.end - k); ++t) {
            const S* p = x + (first + t * pool.w.dilation) * pool.channels + c;
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; ++v)
              piece.of[v].take(kVectors > 1 ? V::load(p + v * V::size) : V::load(p, count), t);
          }
          for (int v = 0; v < kVectors; ++v) {
            const V value = piece.of[v].value;
            const auto better = gt(value, best[v]) | unordered(value, value);
            best[v] = select(better, value, best[v]);
            uint8_t taps[V::size];
            piece.of[v].tap.store(taps, V::size);
            for (unsigned bits = better.bits(); bits != 0; bits &= bits - 1) {
              const int lane = __builtin_ctz(bits);
              positions[v * V::size + lane] = first + taps[lane] * pool.w.dilation;
            }
          }
        }
    store_vectors(best, op.y + at + c, count);
    for (int i = 0; i < (kVectors > 1 ? kVectors * V::size : count); ++i) op.indices[at + c + i] = positions[i];
  });
}

template <class S, class Op>
void pool_last(const Pool& pool, const S* x, const Op& op, const Team& team) {
  using C = Compute<S>;
  const int64_t positions = pool.planes * pool.out_plane();
  const int64_t cost = pool.channels * (1 + smaller(pool.taps(), pool.in_plane()));
  for_units(team, positions, cost, [&](int64_t begin, int64_t end) {
    // All that is the same along a row is found once for it: a window is often a handful of loads.
    const PoolWindows ws(pool.w, op.include_pad);
    PoolPosition o = PoolPosition::of(begin, pool.d.out, pool.h.out, pool.w.out);
    for (int64_t i = begin; i < end; o.w = pool.w.out, o.next(pool.d.out, pool.h.out, pool.w.out)) {
      const PoolWindow d = window_of(pool.d, o.d), h = window_of(pool.h, o.h);
      const S* const plane = x + o.plane * pool.in_plane() * pool.channels;
      const PoolPlace<C> row = place_of(op, pool, o.d, o.h);
      for (; o.w < pool.w.out && i < end; ++o.w, ++i) {
        const PoolWindow w = ws.window(o.w);
        if constexpr (same_type<Op, MaxPool<S, int64_t>>) {
          if (pool.taps() > 256) {
            max_far_last(pool, plane, op, i * pool.channels, d, h, w);
            continue;
          }
        }
        PoolPlace<C> place = row;
        place.position += w.first;
        place.step = 0;
        place.divisor = op.whole_divisor(row.divisor * static_cast<C>(Op::kSums ? ws.divisor(o.w) : 1));
        pool_window_last(pool, plane, op, i * pool.channels, d, h, w, place);
      }
    }
  });
}

// ---- backward

// The window whose tile contains element i, and the tap; window is -1 if there is none.
struct PoolTile {
  int64_t window, tap;

  PoolTile(const PoolAxis& axis, int64_t i) : window(i / axis.tile()), tap(i % axis.tile()) {
    if (window >= axis.out || tap >= axis.kernel) window = -1;
  }
};

// Of maxima. Each element compares its name with the index of its window.
template <class S, class I>
void backward_last_tiled(const Pool& shape, const S* grad_y, S* grad_x, const MaxRoute<S, I>& op, const Team& team) {
  using V = Vec<Compute<S>>;
  for_units(team, shape.planes * shape.d.in * shape.h.in, 2 * shape.channels * shape.w.in,
            [&](int64_t begin, int64_t end) {
              const Pool pool = shape;  // a local copy, which stores to grad_x cannot alias
              PoolRow row(begin, pool.d.in, pool.h.in);
              for (int64_t i = begin; i < end; ++i, row.next(pool.d.in, pool.h.in)) {
                S* to = grad_x + i * pool.w.in * pool.channels;
                const PoolTile d(pool.d, row.d), h(pool.h, row.h);
                const bool any = d.window >= 0 && h.window >= 0;
                const int64_t windows = ((row.plane * pool.d.out + d.window) * pool.h.out + h.window) * pool.w.out;
                const int64_t row_tap = (d.tap * pool.h.kernel + h.tap) * pool.w.kernel;
                int64_t w = 0, tap = 0;
                for (int64_t j = 0; j < pool.w.in; ++j, to += pool.channels) {
                  const bool send = any && w < pool.w.out && tap < pool.w.kernel;
                  const int64_t name = op.name(row_tap + tap, position_of(pool, row.d, row.h, j));
                  const int64_t from = (windows + w) * pool.channels;
                  for_channels<V::size>(pool.channels, [&](int64_t c, auto vectors, int count) {
                    constexpr int kVectors = decltype(vectors)::value;
                    V values[kVectors];
                    for (int v = 0; v < kVectors; ++v) {
                      const int64_t at = from + c + v * V::size;
                      V value = V::zero();  // stored once for both cases: g++ 12 crashes on two stores here at -O1
                      if (send) {
                        const V g = kVectors > 1 ? V::load(grad_y + at) : V::load(grad_y + at, count);
                        value = op.sent(name, g, at, kVectors > 1 ? V::size : count);
                      }
                      values[v] = value;
                    }
                    store_vectors(values, to + c, count);
                  });
                  if (++tap == pool.w.tile()) {
                    tap = 0;
                    ++w;
                  }
                }
              }
            });
}

// For any windows: a part of a row of grad_x that stays in L1 is cleared, every window over it adds its gradient, and
// the part is written.
template <class S, class Route>
void backward_last_rows(const Pool& shape, const S* grad_y, S* grad_x, const Route& op, const Team& team) {
  using C = Compute<S>;
  using V = Vec<C>;
  constexpr int64_t kPoolLastColumns = kPoolBandBytes / static_cast<int64_t>(sizeof(C) * kPoolVectors * V::size);
  for_units(team, shape.planes * shape.d.in * shape.h.in, 2 * shape.channels * shape.w.in,
            [&](int64_t begin, int64_t end) {
              const Pool pool = shape;  // a local copy, which stores to grad_x cannot alias
              alignas(64) C buffer[kPoolBandBytes / sizeof(C)];
              const PlaneWindows windows(pool, op.pads());
              PoolRow row(begin, pool.d.in, pool.h.in);
              PoolReach ds(pool.d, row.d), hs(pool.h, row.h);
              for (int64_t i = begin; i < end; ++i, move_on(pool, row, ds, hs))
                for (int64_t column = 0; column < pool.w.in; column += kPoolLastColumns) {
                  const int64_t columns = smaller(kPoolLastColumns, pool.w.in - column);
                  const PoolRange ws = outputs_of(pool.w, column, column + columns);
                  for_channels<V::size>(pool.channels, [&](int64_t c, auto vectors, int count) {
                    constexpr int kVectors = decltype(vectors)::value, kPitch = kVectors * V::size;
                    for (int64_t j = 0; j < columns * kPitch; j += V::size) V::zero().store(buffer + j);
                    for (int64_t d = ds.begin; d < ds.end; ++d)
                      for (int64_t h = hs.begin; h < hs.end; ++h) {
                        const int64_t d_tap = tap_of(pool.d, d, row.d), h_tap = tap_of(pool.h, h, row.h);
                        if (d_tap < 0 || h_tap < 0) continue;
                        const int64_t number = ((row.plane * pool.d.out + d) * pool.h.out + h) * pool.w.out;
                        const int64_t row_tap = (d_tap * pool.h.kernel + h_tap) * pool.w.kernel;
                        for (int64_t w = ws.begin; w < ws.end; ++w) {
                          const PoolWindow window = windows.w.window(w);
                          const int64_t from = (number + w) * pool.channels + c;
                          V g[kVectors];
                          for (int v = 0; v < kVectors; ++v)
                            g[v] = kVectors > 1 ? V::load(grad_y + from + v * V::size) : V::load(grad_y + from, count);
                          if constexpr (Route::kAverages) {
                            const V share = op.share(windows, d, h, w);
                            for (V& value : g) value = value * share;
                          }
                          for (int64_t t = window.begin; t < window.end; ++t) {
                            const int64_t at = window.first + t * pool.w.dilation;
                            if (at < column || at >= column + columns) continue;
                            C* const sums = buffer + (at - column) * kPitch;
                            const int64_t name = op.name(row_tap + t, position_of(pool, row.d, row.h, at));
                            for (int v = 0; v < kVectors; ++v) {
                              const V sent = op.sent(name, g[v], from + v * V::size, kVectors > 1 ? V::size : count);
                              (V::load(sums + v * V::size) + sent).store(sums + v * V::size);
                            }
                          }
                        }
                      }
                    S* const to = grad_x + (i * pool.w.in + column) * pool.channels + c;
                    for (int64_t j = 0; j < columns; ++j) {
                      V values[kVectors];
                      for (int v = 0; v < kVectors; ++v) values[v] = V::load(buffer + j * kPitch + v * V::size);
                      store_vectors(values, to + j * pool.channels, count);
                    }
                  });
                }
            });
}

// The gradients of a window go to their places among `size` positions from `to` on; the window starts at `first`.
template <class S, class I>
__attribute__((noinline)) void places_of_maxima(const S* grad_y, MaxRoute<S, I> op, int64_t first, int64_t size,
                                                int64_t channels, S* to) {
  for (int64_t c = 0; c < channels; ++c) {
    const int64_t at = op.position(c, first);
    // The maximum may be in another thread's rows. Indices may be anybody's, too.
    if (static_cast<uint64_t>(at) < static_cast<uint64_t>(size)) give(to[at * channels + c], grad_y + c);
  }
}

// For maxima: each gradient goes to its place. Rows of elements are cleared as windows come to them. Where an element
// can get several gradients, they are added in memory, so S is their dtype.
template <class S, class I>
void backward_last_places(const Pool& pool, const S* grad_y, S* grad_x, const MaxRoute<S, I>& op, const Team& team) {
  const int64_t channels = pool.channels, rows = pool.d.in * pool.h.in, row_size = pool.w.in * channels;
  for_units(team, pool.planes * rows, 2 * row_size, [&](int64_t begin, int64_t end) {
    const PlaneWindows windows(pool, op.pads());
    for (int64_t i = begin; i < end;) {
      const int64_t plane = i / rows, low = i % rows, high = smaller(rows, low + end - i);
      S* const to = grad_x + plane * rows * row_size;
      int64_t cleared = low;
      const auto clear = [&](int64_t up_to) {
        if (up_to <= cleared) return;
        __builtin_memset(to + cleared * row_size, 0, static_cast<size_t>((up_to - cleared) * row_size) * sizeof(S));
        cleared = up_to;
      };
      const PoolRowsReach reach(pool.d, pool.h, low, high);
      for (int64_t d = reach.ds.begin; d < reach.ds.end; ++d)
        for (int64_t h = reach.hs.begin; h < reach.hs.end; ++h) {
          const PoolWindow dw = windows.d.window(d), hw = windows.h.window(h);
          const int64_t last = dw.first + (dw.end - 1) * pool.d.dilation,
                        below = hw.first + (hw.end - 1) * pool.h.dilation;
          clear(smaller(high, last * pool.h.in + below + 1));
          const int64_t row = position_of(pool, dw.first, hw.first, 0);
          const int64_t at = ((plane * pool.d.out + d) * pool.h.out + h) * pool.w.out * channels;
          for (int64_t w = 0; w < pool.w.out; ++w) {
            const int64_t first = MaxRoute<S, I>::kWindow ? row + windows.w.window(w).first : 0;
            places_of_maxima(grad_y + at + w * channels, op.from(at + w * channels), first - low * pool.w.in,
                             (high - low) * pool.w.in, channels, to + low * row_size);
          }
        }
      clear(high);
      i += high - low;
    }
  });
}

template <class S, class Route>
void pool_backward_last(const Pool& pool, const S* grad_y, S* grad_x, const Route& op, const Team& team) {
  const bool tiled = is_tiled(pool);
  if constexpr (Route::kAverages) {
    if (tiled) return backward_spread(pool, grad_y, grad_x, op, team);
  } else {
    if (tiled ? pool.taps() > kTapsCompared<S> || pool.channels < kLeastCompared<S>
              : kPlaces && same_type<S, Compute<S>>)
      return backward_last_places(pool, grad_y, grad_x, op, team);
    if (tiled) return backward_last_tiled(pool, grad_y, grad_x, op, team);
  }
  backward_last_rows(pool, grad_y, grad_x, op, team);
}
