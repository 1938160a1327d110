// layer_norm_forward and layer_norm_backward.
//
// A unit of work is a few rows: kRows contiguous ones, or, of a channels-first image, as many positions as a vector has
// lanes, which are transposed into a tile of the compute type first. Rows are computed kRows at a time, so that their
// sums do not wait for each other; a row's own result does not depend on its neighbours.
#pragma once

#include "../../common/cpu/common.inl"
#include "../../common/cpu/some.inl"

constexpr int kRows = 4;

// Whether rows are read from memory and written one after the other, so that only what follows from their sums is
// computed for kRows at a time. Zen 1 does not fetch ahead on four ways through one page: layer norm of 8x56x56x96, 2
// threads, kRows side by side and one after the other, forward 2250 and 1670 us, with backward 6970 and 4150; 1576x768
// with backward 2620 and 2190; 64x128, which stays in L1, 9.9 and 11.1. Rows of 16 bits are bound by what is computed,
// and share what is loaded for a column: 8x56x56x96 with backward 4500 and 4810.
template <class S>
#if defined(FASTOPS_VEC_AVX2)
constexpr bool kRowAfterRow = !is_half<S>;
#else
constexpr bool kRowAfterRow = false;
#endif

// So many of R rows are walked through side by side.
template <int R, class S>
constexpr int kAbreast = kRowAfterRow<S> ? 1 : R;

// Sums run over this many columns in the compute type, then in double.
constexpr int64_t kSumColumns = 4096;

// The least number of elements per thread. 1024 x 768 and 64 x 768 (Zen 5, 2 threads): within 3% from 8192 to 32768.
constexpr int64_t kNormGrain = 16384;

// The gradients of weight and bias are summed in at most this many parts, each of at least kPartUnits units.
constexpr int64_t kParts = 64, kPartUnits = 8;

// What a call is made of.
struct NormUnits {
  int64_t rows;  // of a unit
  int64_t per_outer;
  int64_t count;
  int64_t tile_stride;  // elements between the rows of a tile; 0: rows are read where they lie
};

template <class C, class Call>
inline NormUnits norm_units(const Call& call) {
  if (call.inner == 1) return {kRows, 0, ceil_div(call.outer, kRows), 0};
  constexpr int S = Vec<C>::size;
  const int64_t per_outer = ceil_div(call.inner, S);
  return {S, per_outer, call.outer * per_outer, round_up(call.size, S)};
}

template <class C>
inline size_t tile_bytes(const NormUnits& units) {
  return aligned(units.rows * units.tile_stride * static_cast<int64_t>(sizeof(C)));
}

// Transposes the square block in these vectors. Each round moves one bit of the row's number into the lane's.
template <class C>
inline void transpose_block(Vec<C>* r) {
  constexpr int W = Vec<C>::size;
#pragma GCC unroll 4
  for (int round = 1; round < W; round *= 2) {
    Vec<C> t[W];
#pragma GCC unroll 8
    for (int i = 0; i < W / 2; ++i) {
      Vec<C> even = Vec<C>::zero(), odd = even;  // or GCC warns of the scalar tier's lanes
      interleave(r[i], r[i + W / 2], even, odd);
      t[2 * i] = even;
      t[2 * i + 1] = odd;
    }
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) r[i] = t[i];
  }
}

// Rows of S from a channels-first image: tile[i, j] = x[j * inner + i] for i < count, j < size.
template <class S>
inline void transpose_rows(const S* x, int64_t inner, int count, int64_t size, Compute<S>* tile, int64_t stride) {
  using V = Vec<Compute<S>>;
  constexpr int W = V::size;
  for (int64_t j = 0; j < size; j += W) {
    const int columns = static_cast<int>(smaller(W, size - j));
    V r[W];
    for (int k = 0; k < W; ++k) {
      const S* const from = x + (j + k) * inner;
      r[k] = k >= columns ? V::zero() : count == W ? V::load(from) : V::load(from, count);
    }
    transpose_block(r);
    for (int i = 0; i < count; ++i) r[i].store(tile + i * stride + j);
  }
}

// body(first, count, x, stride) for the units [begin, end): rows [first, first + count), whose elements are `stride`
// apart from row to row, in S or, of a tile, in its compute type.
template <class S, class Call, class Body>
inline void for_units(const Call& call, const NormUnits& units, const S* x, Compute<S>* tile, int64_t begin,
                      int64_t end, Body body) {
  for (int64_t unit = begin; unit < end; ++unit) {
    if (units.tile_stride == 0) {
      const int64_t first = unit * kRows;
      body(first, smaller(kRows, call.outer - first), x + first * call.x_outer_stride, call.x_outer_stride);
      continue;
    }
    const int64_t o = unit / units.per_outer, i = unit % units.per_outer * units.rows;
    const int count = static_cast<int>(smaller(units.rows, call.inner - i));
    transpose_rows(x + o * call.x_outer_stride + i, call.inner, count, call.size, tile, units.tile_stride);
    body(o * call.inner + i, int64_t{count}, static_cast<const Compute<S>*>(tile), units.tile_stride);
  }
}

// body(Count<rows>{}, first row) for `count` rows.
template <int n>
struct Count {
  static constexpr int value = n;
};
template <class Body>
inline void by_rows(int64_t count, Body body) {
  int64_t row = 0;
  for (; row + kRows <= count; row += kRows) body(Count<kRows>{}, row);
  for (; row < count; ++row) body(Count<1>{}, row);
}

// For each of R rows the sums of v - shift and, if squares, of their squares.
struct RowSums {
  double first, second;
};
template <int R, bool squares, class C, class T>
inline void sum_rows(const T* x, int64_t stride, int64_t size, const Vec<C>* shift, RowSums* sums) {
  using V = Vec<C>;
  for (int r = 0; r < R; ++r) sums[r] = {0, 0};
  for (int64_t begin = 0; begin < size; begin += kSumColumns) {
    const int64_t end = smaller(begin + kSumColumns, size);
    V even[R], odd[R], even_squares[R], odd_squares[R];
    for (int r = 0; r < R; ++r) even[r] = odd[r] = even_squares[r] = odd_squares[r] = V::zero();
    const auto add = [&](V v, int r, V* sum, V* sum_of_squares) {
      if constexpr (squares) {
        v = v - shift[r];
        sum_of_squares[r] = fma(v, v, sum_of_squares[r]);
      }
      sum[r] = sum[r] + v;
    };
    int64_t j = begin;
    for (; j + 2 * V::size <= end; j += 2 * V::size) {
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        add(V::load(x + r * stride + j), r, even, even_squares);
        add(V::load(x + r * stride + j + V::size), r, odd, odd_squares);
      }
    }
    if (j + V::size <= end) {
      for (int r = 0; r < R; ++r) add(V::load(x + r * stride + j), r, even, even_squares);
      j += V::size;
    }
    if (j < end) {
      const int tail = static_cast<int>(end - j);
      const Mask<C> inside = Mask<C>::from_bits((1u << tail) - 1);
      for (int r = 0; r < R; ++r) {  // lanes past the end add nothing
        const V none = squares ? shift[r] : V::zero();
        add(select(inside, V::load(x + r * stride + j, tail), none), r, odd, odd_squares);
      }
    }
    for (int r = 0; r < R; ++r) {
      sums[r].first += static_cast<double>(reduce_add(even[r] + odd[r]));
      if constexpr (squares) sums[r].second += static_cast<double>(reduce_add(even_squares[r] + odd_squares[r]));
    }
  }
}

inline float root(float x) { return __builtin_sqrtf(x); }
inline double root(double x) { return __builtin_sqrt(x); }

// R rows of x, `stride` apart, from `row` on.
template <int R, class S, class P, class T>
inline void norm_rows(const Bound<LayerNormForward>& args, const T* x, int64_t stride, int64_t row) {
  using C = Compute<S>;
  using V = Vec<C>;
  const int64_t size = args.size;
  const P *weight = static_cast<const P*>(args.weight), *bias = static_cast<const P*>(args.bias);
  S* const y = static_cast<S*>(args.y) + row * size;
  const double count = static_cast<double>(size);
  RowSums sums[R];
  V mean[R], rstd[R];
  constexpr int A = kAbreast<R, S>;
  for (int r = 0; r < R; ++r) mean[r] = V::zero();
  if (!args.rms) {
    for (int r = 0; r < R; r += A) sum_rows<A, false, C>(x + r * stride, stride, size, mean + r, sums + r);
    for (int r = 0; r < R; ++r) mean[r] = V::set1(static_cast<C>(sums[r].first / count));
  }
  for (int r = 0; r < R; r += A) sum_rows<A, true, C>(x + r * stride, stride, size, mean + r, sums + r);
  for (int r = 0; r < R; ++r) {
    double variance = sums[r].second / count;
    if (!args.rms) {  // what rounding left of the deviations' mean
      const double rest = sums[r].first / count;
      variance = variance - rest * rest;
      mean[r] = mean[r] + V::set1(static_cast<C>(rest));
    }
    const C scale = C(1) / root(static_cast<C>(variance < 0 ? 0 : variance) + static_cast<C>(args.eps));
    rstd[r] = V::set1(scale);
    if (args.rstd != nullptr) static_cast<C*>(args.rstd)[row + r] = scale;
    if (args.mean != nullptr) mean[r].store(static_cast<C*>(args.mean) + row + r, 1);
  }
  for (int first = 0; first < R; first += A) {
    const auto column = [&](int64_t j, auto load, auto store) {
      const V w = weight != nullptr ? load(weight + j) : set<C>(1), b = bias != nullptr ? load(bias + j) : V::zero();
#pragma GCC unroll 4
      for (int r = first; r < first + A; ++r)
        store(fma((load(x + r * stride + j) - mean[r]) * rstd[r], w, b), y + r * size + j);
    };
    int64_t j = 0;
    for (; j + V::size <= size; j += V::size)
      column(j, [](auto* p) { return V::load(p); }, [](V v, S* p) { v.store(p); });
    if (j < size) {
      const int tail = static_cast<int>(size - j);
      column(j, [=](auto* p) { return V::load(p, tail); }, [=](V v, S* p) { v.store(p, tail); });
    }
  }
}

template <class S, class P>
void layer_norm_forward(const Bound<LayerNormForward>& args, void* workspace, const Team& team) {
  using C = Compute<S>;
  const NormUnits units = norm_units<C>(args);
  const int threads = threads_for(team, args.outer * args.inner * args.size, units.count, kNormGrain);
  parallel(team, threads, [&](Crew& crew) {
    C* const tile =
        reinterpret_cast<C*>(static_cast<char*>(workspace) + static_cast<size_t>(crew.thread) * tile_bytes<C>(units));
    crew.divide(units.count, [&](int64_t begin, int64_t end) {
      for_units(args, units, static_cast<const S*>(args.x), tile, begin, end,
                [&](int64_t first, int64_t count, auto* x, int64_t stride) {
                  by_rows(count, [&](auto rows, int64_t row) {
                    norm_rows<rows.value, S, P>(args, x + row * stride, stride, first + row);
                  });
                });
    });
  });
}

// How the sums over all rows are divided, and where they lie.
struct NormParts {
  int64_t units, count;  // of a part; of parts
  int64_t columns;       // numbers of a sum: sums of grad_weight, then of grad_bias
};
template <class C>
inline NormParts norm_parts(const LayerNormBackward& call, const NormUnits& units) {
  if (!call.with_grad_weight && !call.with_grad_bias) return {1, units.count, 0};
  const int64_t of_part = larger<int64_t>(kPartUnits, ceil_div(units.count, kParts));
  return {of_part, ceil_div(units.count, of_part), round_up(call.size, Vec<C>::size)};
}

// The gradients of R rows of x, `stride` apart, from `row` on. What the rows give to grad_weight and grad_bias is added
// to sums, unless that is null.
template <int R, class S, class P, class T>
inline void norm_gradient_rows(const Bound<LayerNormBackward>& args, const T* x, int64_t stride, int64_t row,
                               Compute<S>* sums, int64_t columns) {
  using C = Compute<S>;
  using V = Vec<C>;
  const int64_t size = args.size, g_stride = args.grad_y_row_stride;
  const P* const weight = static_cast<const P*>(args.weight);
  const S* const g = static_cast<const S*>(args.grad_y) + row * g_stride;
  V mean[R], rstd[R];
  for (int r = 0; r < R; ++r) {
    mean[r] = args.rms ? V::zero() : V::set1(static_cast<const C*>(args.mean)[row + r]);
    rstd[r] = V::set1(static_cast<const C*>(args.rstd)[row + r]);
  }
  constexpr int A = kAbreast<R, S>;
  double of_g[R], of_gn[R];  // sums of g and of g n
  for (int r = 0; r < R; ++r) of_g[r] = of_gn[r] = 0;
  for (int first = 0; first < R; first += A) {
    for (int64_t begin = 0; begin < size; begin += kSumColumns) {
      const int64_t end = smaller(begin + kSumColumns, size);
      V g_sum[A], gn_sum[A];
      for (int r = 0; r < A; ++r) g_sum[r] = gn_sum[r] = V::zero();
      const auto column = [&](int64_t j, auto load) {
        const V w = weight != nullptr ? load(weight + j) : set<C>(1);
        V w_sum = V::zero(), b_sum = V::zero();
        if (sums != nullptr) w_sum = V::load(sums + j), b_sum = V::load(sums + columns + j);
#pragma GCC unroll 4
        for (int r = 0; r < A; ++r) {
          const int64_t at = first + r;
          const V n = (load(x + at * stride + j) - mean[at]) * rstd[at], g_y = load(g + at * g_stride + j);
          w_sum = fma(g_y, n, w_sum);
          b_sum = b_sum + g_y;
          const V g_n = g_y * w;
          g_sum[r] = g_sum[r] + g_n;
          gn_sum[r] = fma(g_n, n, gn_sum[r]);
        }
        if (sums != nullptr) w_sum.store(sums + j), b_sum.store(sums + columns + j);
      };
      int64_t j = begin;
      for (; j + V::size <= end; j += V::size) column(j, [](auto* p) { return V::load(p); });
      if (j < end) column(j, [tail = static_cast<int>(end - j)](auto* p) { return V::load(p, tail); });
      for (int r = 0; r < A; ++r) {
        of_g[first + r] += static_cast<double>(reduce_add(g_sum[r]));
        of_gn[first + r] += static_cast<double>(reduce_add(gn_sum[r]));
      }
    }
  }
  if (!args.with_grad_x) return;
  S* const grad_x = static_cast<S*>(args.grad_x) + row * size;
  V g_mean[R], gn_mean[R];
  for (int r = 0; r < R; ++r) {
    g_mean[r] = args.rms ? V::zero() : V::set1(static_cast<C>(of_g[r] / static_cast<double>(size)));
    gn_mean[r] = V::set1(static_cast<C>(of_gn[r] / static_cast<double>(size)));
  }
  for (int first = 0; first < R; first += A) {
    const auto column = [&](int64_t j, auto load, auto store) {
      const V w = weight != nullptr ? load(weight + j) : set<C>(1);
#pragma GCC unroll 4
      for (int r = first; r < first + A; ++r) {
        const V n = (load(x + r * stride + j) - mean[r]) * rstd[r], g_n = load(g + r * g_stride + j) * w;
        store(rstd[r] * fnma(n, gn_mean[r], g_n - g_mean[r]), grad_x + r * size + j);
      }
    };
    int64_t j = 0;
    for (; j + V::size <= size; j += V::size)
      column(j, [](auto* p) { return V::load(p); }, [](V v, S* p) { v.store(p); });
    if (j < size) {
      const int tail = static_cast<int>(size - j);
      column(j, [=](auto* p) { return V::load(p, tail); }, [=](V v, S* p) { v.store(p, tail); });
    }
  }
}

// The workspace has the tiles of all threads, then the sums of all parts.
template <class S, class P>
void layer_norm_backward(const Bound<LayerNormBackward>& args, void* workspace, const Team& team) {
  using C = Compute<S>;
  using V = Vec<C>;
  const NormUnits units = norm_units<C>(args);
  const NormParts parts = norm_parts<C>(args, units);
  char* const scratch = static_cast<char*>(workspace);
  C* const all_sums = reinterpret_cast<C*>(scratch + static_cast<size_t>(args.threads) * tile_bytes<C>(units));
  const int threads = threads_for(team, args.outer * args.inner * args.size, parts.count, kNormGrain);
  parallel(team, threads, [&](Crew& crew) {
    C* const tile = reinterpret_cast<C*>(scratch + static_cast<size_t>(crew.thread) * tile_bytes<C>(units));
    crew.each(parts.count, [&](int64_t part) {
      C* const sums = parts.columns == 0 ? nullptr : all_sums + part * 2 * parts.columns;
      if (sums != nullptr)
        for (int64_t j = 0; j < 2 * parts.columns; j += V::size) V::zero().store(sums + j);
      for_units(
          args, units, static_cast<const S*>(args.x), tile, part * parts.units,
          smaller((part + 1) * parts.units, units.count), [&](int64_t first, int64_t count, auto* x, int64_t stride) {
            by_rows(count, [&](auto rows, int64_t row) {
              norm_gradient_rows<rows.value, S, P>(args, x + row * stride, stride, first + row, sums, parts.columns);
            });
          });
    });
  });
  if (parts.columns == 0) return;
  const int64_t vectors = parts.columns / V::size;
  parallel(team, threads_for(team, parts.count * 2 * parts.columns, vectors, kNormGrain), [&](Crew& crew) {
    crew.each(vectors, [&](int64_t v) {
      const int64_t j = v * V::size;
      V w_sum = V::zero(), b_sum = V::zero();
      for (int64_t part = 0; part < parts.count; ++part) {
        const C* const sums = all_sums + part * 2 * parts.columns;
        w_sum = w_sum + V::load(sums + j);
        b_sum = b_sum + V::load(sums + parts.columns + j);
      }
      if (args.with_grad_weight) store_upto(w_sum, static_cast<P*>(args.grad_weight) + j, args.size - j);
      if (args.with_grad_bias) store_upto(b_sum, static_cast<P*>(args.grad_bias) + j, args.size - j);
    });
  });
}

constexpr KernelName kNormRows{"rows"}, kNormTransposed{"transposed_rows"};

template <class Call>
inline KernelName norm_name(const Call& call) {
  return call.inner == 1 ? kNormRows : kNormTransposed;
}

// body(S{}, P{}), with the types of x and of the parameters.
template <class Call, class Body>
inline void with_norm_types(const Call& call, Body body) {
  with_dtype(call.dtype, [&](auto type) {
    using S = decltype(type);
    if constexpr (is_half<S>)
      call.parameter_dtype == DType::f32 ? body(type, float{}) : body(type, type);
    else
      body(type, type);
  });
}

void plan_call(Plan<LayerNormForward>& plan) {
  with_norm_types(plan.call, [&](auto type, auto parameter) {
    using S = decltype(type);
    using P = decltype(parameter);
    const LayerNormForward& call = plan.call;
    const size_t workspace =
        static_cast<size_t>(plan.target.threads) * tile_bytes<Compute<S>>(norm_units<Compute<S>>(call));
    decide(plan, norm_name(call), workspace,
           [](auto& args, auto* workspace, auto& team) { layer_norm_forward<S, P>(args, workspace, team); });
  });
}

void plan_call(Plan<LayerNormBackward>& plan) {
  with_norm_types(plan.call, [&](auto type, auto parameter) {
    using S = decltype(type);
    using P = decltype(parameter);
    using C = Compute<S>;
    const LayerNormBackward& call = plan.call;
    const NormUnits units = norm_units<C>(call);
    const NormParts parts = norm_parts<C>(call, units);
    const size_t workspace = static_cast<size_t>(plan.target.threads) * tile_bytes<C>(units) +
                             aligned(parts.count * 2 * parts.columns * static_cast<int64_t>(sizeof(C)));
    decide(plan, norm_name(call), workspace,
           [](auto& args, auto* workspace, auto& team) { layer_norm_backward<S, P>(args, workspace, team); });
  });
}
