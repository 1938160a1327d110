// softmax_forward and softmax_backward.
//
// Where inner is 1, a row is read three times: for its maximum, its sum, its result. Else a strip of neighbours along
// inner goes through its rows together, each with a maximum and a sum of its own. Short rows, and those of few
// neighbours, are transposed first, and then are as if inner were their number.
//
// float32 and float64 keep exp(x - m) in y between the sum and the result. 16-bit types compute it again, as y would
// round it.
#pragma once

#include "../../common/cpu/common.inl"
#include "../../common/cpu/some.inl"
#include "rows.inl"

// A strip has as many positions as lie in kStripElements, at most kWidest: a row's part of it is read as a stream, and
// is still in L2 when it is read again. One thread, Zen 1, us, log_softmax's gradient with strips of 32, 512 and 1024
// positions and PyTorch's: 8x21x64x64 3646, 1849, 1546, 2170; 8x21x60x60 3177, 1519, not measured, 2021; 4x150x64x64
// 11500, 5298, 5108, 7710.
constexpr int64_t kStripElements = 65536, kWidest = 1024;

// Rows whose elements are taken together for a maximum or a sum, between reading and writing it.
constexpr int64_t kStripRows = 4;

// Rows at most this long are transposed; 0: none. 256 rows, one thread, softmax and log_softmax, us, a row at a time
// and transposed (Zen 1): of 2 elements 20 and 5, 26 and 5; 10: 28 and 11, 32 and 10; 24: 25 and 22, 29 and 20; 32: 28
// and 28, 32 and 27; 48: 34 and 41, 38 and 39. Not measured with AVX-512, where 16 elements are one vector.
#if defined(FASTOPS_VEC_AVX2)
constexpr int64_t kShortRow = 24;
#else
constexpr int64_t kShortRow = 0;
#endif
template <class S>
constexpr int64_t kShortRows = 4 * Vec<Compute<S>>::size;  // so many at a time

// Sums run over this many elements in the compute type, then in double.
constexpr int64_t kSumElements = 4096;

// The least number of elements per thread: an element costs about as much as one of a transcendental activation.
constexpr int64_t kSoftmaxGrain = 12288;

// The sum of term(position, count) over a row; what the term has in lanes past its end is not added.
template <class C, class Term>
inline double sum_of(int64_t size, Term term) {
  using V = Vec<C>;
  double total = 0;
  for (int64_t begin = 0; begin < size; begin += kSumElements) {
    const int64_t end = smaller(begin + kSumElements, size);
    V even = V::zero(), odd = V::zero();
    int64_t j = begin;
    for (; j + 2 * V::size <= end; j += 2 * V::size) {
      even = even + term(j, V::size);
      odd = odd + term(j + V::size, V::size);
    }
    if (j + V::size <= end) {
      even = even + term(j, V::size);
      j += V::size;
    }
    if (j < end) {
      const int tail = static_cast<int>(end - j);
      const V last = term(j, tail);
      odd = odd + select(Mask<C>::from_bits((1u << tail) - 1), last, V::zero());
    }
    total += static_cast<double>(reduce_add(even + odd));
  }
  return total;
}

template <bool log, class S>
inline void softmax_row(const S* x, S* y, int64_t size) {
  using C = Compute<S>;
  using V = Vec<C>;
  V even = lowest<C>(), odd = even;
  int64_t j = 0;
  for (; j + 2 * V::size <= size; j += 2 * V::size) {
    even = max(V::load(x + j), even);
    odd = max(V::load(x + j + V::size), odd);
  }
  for (; j < size; j += V::size) {
    const int tail = static_cast<int>(smaller(V::size, size - j));
    even = select(Mask<C>::from_bits((1u << tail) - 1), max(V::load(x + j, tail), even), even);
  }
  const V most = V::set1(reduce_max(max(even, odd)));
  const double sum = sum_of<C>(size, [&](int64_t i, int some) {
    const V e = exp_of<S>(load_some<V>(x + i, some) - most);
    if constexpr (!log && !is_half<S>) store_some(e, y + i, some);
    return e;
  });
  if constexpr (log) {
    const V less = log_of(V::set1(static_cast<C>(sum)));
    for_vectors<V>(0, size,
                   [&](int64_t i, int some) { store_some(load_some<V>(x + i, some) - most - less, y + i, some); });
  } else {
    const Shares<C> shares(V::set1(static_cast<C>(sum)), V::set1(static_cast<C>(1 / sum)));
    for_vectors<V>(0, size, [&](int64_t i, int some) {
      if constexpr (is_half<S>)
        store_some(exp_of<S>(load_some<V>(x + i, some) - most) * shares.scale, y + i, some);
      else
        store_some(shares.of(load_some<V>(y + i, some)), y + i, some);
    });
  }
}

template <bool log, class S>
inline void softmax_gradient_row(const S* grad_y, const S* y, S* grad_x, int64_t size) {
  using C = Compute<S>;
  using V = Vec<C>;
  const V sum = V::set1(static_cast<C>(sum_of<C>(size, [&](int64_t i, int some) {
    const V g = load_some<V>(grad_y + i, some);
    return log ? g : g * load_some<V>(y + i, some);
  })));
  for_vectors<V>(0, size, [&](int64_t i, int some) {
    const V g = load_some<V>(grad_y + i, some), v = load_some<V>(y + i, some);
    store_some(log ? fnma(exp_of<S>(v), sum, g) : v * (g - sum), grad_x + i, some);
  });
}

// One number for each of the positions that go through the rows together.
template <class C>
struct Strip {
  alignas(64) C at[kWidest];
};

// x and y are at the first of `count` positions; rows are `inner` apart.
template <bool log, class S>
inline void softmax_strip(const S* x, S* y, int64_t size, int64_t inner, int64_t count) {
  using C = Compute<S>;
  using V = Vec<C>;
  Strip<C> most, sum;
  for (int64_t k = 0; k < count; k += V::size) {
    lowest<C>().store(most.at + k);
    V::zero().store(sum.at + k);
  }
  for (int64_t first = 0; first < size; first += kStripRows) {
    const int64_t last = smaller(size, first + kStripRows);
    for_vectors<V>(0, count, [&](int64_t k, int some) {
      V m = V::load(most.at + k);
      for (int64_t j = first; j < last; ++j) m = max(load_some<V>(x + j * inner + k, some), m);
      m.store(most.at + k);
    });
  }
  for (int64_t j = 0; j < size; ++j)
    for_vectors<V>(0, count, [&](int64_t k, int some) {
      const V e = exp_of<S>(load_some<V>(x + j * inner + k, some) - V::load(most.at + k));
      if constexpr (!log && !is_half<S>) store_some(e, y + j * inner + k, some);
      (V::load(sum.at + k) + e).store(sum.at + k);
    });
  Strip<C> least;  // of Shares, whose scale is in `sum`
  for (int64_t k = 0; k < count; k += V::size) {
    const V total = V::load(sum.at + k);
    if constexpr (log) {
      log_of(total).store(sum.at + k);
    } else {
      const Shares<C> shares(total, set<C>(1) / total);
      shares.scale.store(sum.at + k);
      shares.least.store(least.at + k);
    }
  }
  for (int64_t j = 0; j < size; ++j)
    for_vectors<V>(0, count, [&](int64_t k, int some) {
      const int64_t at = j * inner + k;
      if constexpr (log) {
        store_some(load_some<V>(x + at, some) - V::load(most.at + k) - V::load(sum.at + k), y + at, some);
      } else if constexpr (is_half<S>) {
        store_some(exp_of<S>(load_some<V>(x + at, some) - V::load(most.at + k)) * V::load(sum.at + k), y + at, some);
      } else {
        Shares<C> shares;
        shares.scale = V::load(sum.at + k);
        shares.least = V::load(least.at + k);
        store_some(shares.of(load_some<V>(y + at, some)), y + at, some);
      }
    });
}

template <bool log, class S>
inline void softmax_gradient_strip(const S* grad_y, const S* y, S* grad_x, int64_t size, int64_t inner, int64_t count) {
  using C = Compute<S>;
  using V = Vec<C>;
  Strip<C> sum;
  for (int64_t k = 0; k < count; k += V::size) V::zero().store(sum.at + k);
  for (int64_t first = 0; first < size; first += kStripRows) {
    const int64_t last = smaller(size, first + kStripRows);
    for_vectors<V>(0, count, [&](int64_t k, int some) {
      V s = V::load(sum.at + k);
      for (int64_t j = first; j < last; ++j) {
        const V g = load_some<V>(grad_y + j * inner + k, some);
        s = log ? s + g : fma(g, load_some<V>(y + j * inner + k, some), s);
      }
      s.store(sum.at + k);
    });
  }
  for (int64_t j = 0; j < size; ++j)
    for_vectors<V>(0, count, [&](int64_t k, int some) {
      const int64_t at = j * inner + k;
      const V g = load_some<V>(grad_y + at, some), v = load_some<V>(y + at, some), s = V::load(sum.at + k);
      store_some(log ? fnma(exp_of<S>(v), s, g) : v * (g - s), grad_x + at, some);
    });
}

// row(offset) for every row, or strip(offset, count) for every strip, where inner > 1.
template <class C, class Call, class Row, class StripBody>
inline void for_rows(const Call& call, const Team& team, Row row, StripBody strip) {
  constexpr int64_t least = 4 * Vec<C>::size;
  const int64_t rows = call.outer * call.inner;
  const int64_t most = call.inner == 1 ? rows : call.outer * ceil_div(call.inner, least);
  const int threads = threads_for(team, rows * call.size, most, kSoftmaxGrain);
  // Four strips for each thread, which may come late.
  const int64_t widest = smaller(kWidest, smaller(kStripElements / call.size, rows / (4 * threads)));
  const int64_t width = larger(least, widest / least * least);
  const int64_t per_outer = call.inner == 1 ? 1 : ceil_div(call.inner, width);
  parallel(team, threads, [&](Crew& crew) {
    crew.each(call.outer * per_outer, [&](int64_t i) {
      if (call.inner == 1) return row(i * call.size);
      const int64_t o = i / per_outer, first = i % per_outer * width;
      strip(o * call.size * call.inner + first, smaller(width, call.inner - first));
    });
  });
}

// Whether rows are transposed, as a row of its own takes longer to reduce its maximum and its sum to one number than to
// all else, and a strip of less than a vector wastes lanes.
template <class C, class Call>
inline bool has_short_rows(const Call& call) {
  constexpr int64_t vector = Vec<C>::size;
  return call.size <= kShortRow && call.inner < vector && call.outer * call.inner >= vector;
}

// The lanes of kShortRows rows: element j of a row is at j * kShortRows.
template <class S>
struct Lanes {
  S at[(kShortRow > 0 ? kShortRow : 1) * kShortRows<S>];
};

// `count` rows from the `first` on: into lanes, a row each, and back.
struct ShortRows {
  int64_t size, inner, first, count;

  template <class Move>
  void each(Move move) const {
    if (size < 1 || count < 1) __builtin_unreachable();  // softmax.h; g++ warns of lanes not written without it
    int64_t at = first / inner * size * inner + first % inner, here = first % inner;
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t j = 0; j < size; ++j) move(at + j * inner, j, i);
      ++at;
      if (++here == inner) here = 0, at += (size - 1) * inner;
    }
  }
  template <class S>
  void read(const S* x, Lanes<S>& lanes) const {
    each([&](int64_t at, int64_t j, int64_t i) { lanes.at[j * kShortRows<S> + i] = x[at]; });
  }
  template <class S>
  void write(const Lanes<S>& lanes, S* y) const {
    each([&](int64_t at, int64_t j, int64_t i) { y[at] = lanes.at[j * kShortRows<S> + i]; });
  }
};

template <class S, class Call, class Body>
inline void for_short_rows(const Call& call, const Team& team, Body body) {
  const int64_t rows = call.outer * call.inner, blocks = ceil_div(rows, kShortRows<S>);
  parallel(team, threads_for(team, rows * call.size, blocks, kSoftmaxGrain), [&](Crew& crew) {
    crew.each(blocks, [&](int64_t block) {
      const int64_t first = block * kShortRows<S>;
      body(ShortRows{call.size, call.inner, first, smaller(kShortRows<S>, rows - first)});
    });
  });
}

template <bool log, class S>
void softmax_forward(const Bound<SoftmaxForward>& args, const Team& team) {
  using C = Compute<S>;
  const S* const x = static_cast<const S*>(args.x);
  S* const y = static_cast<S*>(args.y);
  if (has_short_rows<C>(args))
    return for_short_rows<S>(args, team, [&](ShortRows rows) {
      Lanes<S> lanes;
      rows.read(x, lanes);
      softmax_strip<log>(lanes.at, lanes.at, args.size, kShortRows<S>, rows.count);
      rows.write(lanes, y);
    });
  for_rows<C>(
      args, team, [&](int64_t at) { softmax_row<log>(x + at, y + at, args.size); },
      [&](int64_t at, int64_t count) { softmax_strip<log>(x + at, y + at, args.size, args.inner, count); });
}

template <bool log, class S>
void softmax_backward(const Bound<SoftmaxBackward>& args, const Team& team) {
  using C = Compute<S>;
  const S *const grad_y = static_cast<const S*>(args.grad_y), *const y = static_cast<const S*>(args.y);
  S* const grad_x = static_cast<S*>(args.grad_x);
  if (args.inner > 1 && has_short_rows<C>(args))  // a row's sum alone is reduced sooner than three operands are moved
    return for_short_rows<S>(args, team, [&](ShortRows rows) {
      Lanes<S> grad, lanes;
      rows.read(grad_y, grad);
      rows.read(y, lanes);
      softmax_gradient_strip<log>(grad.at, lanes.at, grad.at, args.size, kShortRows<S>, rows.count);
      rows.write(grad, grad_x);
    });
  for_rows<C>(
      args, team, [&](int64_t at) { softmax_gradient_row<log>(grad_y + at, y + at, grad_x + at, args.size); },
      [&](int64_t at, int64_t count) {
        softmax_gradient_strip<log>(grad_y + at, y + at, grad_x + at, args.size, args.inner, count);
      });
}

constexpr KernelName kSoftmaxRows{"rows"}, kSoftmaxStrips{"strips"};

void plan_call(Plan<SoftmaxForward>& plan) {
  with_dtype(plan.call.dtype, [&](auto type) {
    using S = decltype(type);
    const KernelName& name = plan.call.inner == 1 ? kSoftmaxRows : kSoftmaxStrips;
    if (plan.call.log)
      decide(plan, name, 0, [](auto& args, auto*, auto& team) { softmax_forward<true, S>(args, team); });
    else
      decide(plan, name, 0, [](auto& args, auto*, auto& team) { softmax_forward<false, S>(args, team); });
  });
}

void plan_call(Plan<SoftmaxBackward>& plan) {
  with_dtype(plan.call.dtype, [&](auto type) {
    using S = decltype(type);
    const KernelName& name = plan.call.inner == 1 ? kSoftmaxRows : kSoftmaxStrips;
    if (plan.call.log)
      decide(plan, name, 0, [](auto& args, auto*, auto& team) { softmax_backward<true, S>(args, team); });
    else
      decide(plan, name, 0, [](auto& args, auto*, auto& team) { softmax_backward<false, S>(args, team); });
  });
}
