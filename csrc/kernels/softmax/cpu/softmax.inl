// softmax_forward and softmax_backward.
//
// Where inner is 1, a row is read three times: for its maximum, its sum, its result; short rows are transposed first,
// and then are as if inner were their number. Else the lanes of a vector are neighbours along inner, each with a
// maximum and a sum of its own, and kStrip vectors go through the rows together.
//
// float32 and float64 keep exp(x - m) in y between the sum and the result. 16-bit types compute it again, as y would
// round it.
#pragma once

#include "../../common/cpu/common.inl"
#include "rows.inl"

constexpr int kStrip = 4;

// Rows at most this long are transposed; 0: none. 256 rows, one thread, softmax and log_softmax, us, a row at a time
// and transposed (Zen 1): of 2 elements 20 and 5, 26 and 5; 10: 28 and 11, 32 and 10; 24: 25 and 22, 29 and 20; 32: 28
// and 28, 32 and 27; 48: 34 and 41, 38 and 39. Not measured with AVX-512, where 16 elements are one vector.
#if defined(FASTOPS_VEC_AVX2)
constexpr int64_t kShortRow = 24;
#else
constexpr int64_t kShortRow = 0;
#endif

// Sums run over this many elements in the compute type, then in double.
constexpr int64_t kSumElements = 4096;

// The least number of elements per thread: an element costs about as much as one of a transcendental activation.
constexpr int64_t kSoftmaxGrain = 12288;

// For every vector of the row: body(position, load, store), the last one with what it has.
template <class C, class Body>
inline void by_vectors(int64_t first, int64_t last, Body body) {
  using V = Vec<C>;
  int64_t j = first;
  for (; j + V::size <= last; j += V::size)
    body(j, [](auto* p) { return V::load(p); }, [](V v, auto* p) { v.store(p); });
  if (j < last) {
    const int tail = static_cast<int>(last - j);
    body(j, [=](auto* p) { return V::load(p, tail); }, [=](V v, auto* p) { v.store(p, tail); });
  }
}

// The sum of term(position, load, store) over a row; what the term has in lanes past its end is not added.
template <class C, class Term>
inline double sum_of(int64_t size, Term term) {
  using V = Vec<C>;
  double total = 0;
  for (int64_t begin = 0; begin < size; begin += kSumElements) {
    const int64_t end = smaller(begin + kSumElements, size);
    V even = V::zero(), odd = V::zero();
    const auto whole = [](auto* p) { return V::load(p); };
    const auto store = [](V v, auto* p) { v.store(p); };
    int64_t j = begin;
    for (; j + 2 * V::size <= end; j += 2 * V::size) {
      even = even + term(j, whole, store);
      odd = odd + term(j + V::size, whole, store);
    }
    if (j + V::size <= end) {
      even = even + term(j, whole, store);
      j += V::size;
    }
    if (j < end) {
      const int tail = static_cast<int>(end - j);
      const V last = term(j, [=](auto* p) { return V::load(p, tail); }, [=](V v, auto* p) { v.store(p, tail); });
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
  const double sum = sum_of<C>(size, [&](int64_t i, auto load, auto store) {
    const V e = exp_of<S>(load(x + i) - most);
    if constexpr (!log && !is_half<S>) store(e, y + i);
    return e;
  });
  if constexpr (log) {
    const V less = log_of(V::set1(static_cast<C>(sum)));
    by_vectors<C>(0, size, [&](int64_t i, auto load, auto store) { store(load(x + i) - most - less, y + i); });
  } else {
    const Shares<C> shares(V::set1(static_cast<C>(sum)), V::set1(static_cast<C>(1 / sum)));
    by_vectors<C>(0, size, [&](int64_t i, auto load, auto store) {
      if constexpr (is_half<S>)
        store(exp_of<S>(load(x + i) - most) * shares.scale, y + i);
      else
        store(shares.of(load(y + i)), y + i);
    });
  }
}

template <bool log, class S>
inline void softmax_gradient_row(const S* grad_y, const S* y, S* grad_x, int64_t size) {
  using C = Compute<S>;
  using V = Vec<C>;
  const V sum = V::set1(static_cast<C>(sum_of<C>(size, [&](int64_t i, auto load, auto) {
    const V g = load(grad_y + i);
    return log ? g : g * load(y + i);
  })));
  by_vectors<C>(0, size, [&](int64_t i, auto load, auto store) {
    const V g = load(grad_y + i), v = load(y + i);
    store(log ? fnma(exp_of<S>(v), sum, g) : v * (g - sum), grad_x + i);
  });
}

// Vectors that go through the rows together.
template <class C>
struct Strip {
  Vec<C> v[kStrip];
};

// body(k, load, store) for the vectors of a strip of `count` positions; k * V::size is the first position of each.
template <class C, class Body>
inline void by_strip(int count, Body body) {
  using V = Vec<C>;
  if (count == kStrip * V::size) {
#pragma GCC unroll 4
    for (int k = 0; k < kStrip; ++k) body(k, [](auto* p) { return V::load(p); }, [](V v, auto* p) { v.store(p); });
    return;
  }
  for (int k = 0; k * V::size < count; ++k) {
    const int here = static_cast<int>(smaller(V::size, count - k * V::size));
    body(k, [=](auto* p) { return V::load(p, here); }, [=](V v, auto* p) { v.store(p, here); });
  }
}

// x and y are at the first of `count` positions; rows are `inner` apart.
template <bool log, class S>
inline void softmax_strip(const S* x, S* y, int64_t size, int64_t inner, int count) {
  using C = Compute<S>;
  using V = Vec<C>;
  Strip<C> most, sum;
  for (int k = 0; k < kStrip; ++k) most.v[k] = lowest<C>(), sum.v[k] = V::zero();
  for (int64_t j = 0; j < size; ++j)
    by_strip<C>(count, [&](int k, auto load, auto) { most.v[k] = max(load(x + j * inner + k * V::size), most.v[k]); });
  for (int64_t j = 0; j < size; ++j)
    by_strip<C>(count, [&](int k, auto load, auto store) {
      const int64_t at = j * inner + k * V::size;
      const V e = exp_of<S>(load(x + at) - most.v[k]);
      if constexpr (!log && !is_half<S>) store(e, y + at);
      sum.v[k] = sum.v[k] + e;
    });
  Shares<C> shares[kStrip];
  for (int k = 0; k < kStrip; ++k)
    if constexpr (log)
      sum.v[k] = log_of(sum.v[k]);
    else
      shares[k] = Shares<C>(sum.v[k], set<C>(1) / sum.v[k]);
  for (int64_t j = 0; j < size; ++j)
    by_strip<C>(count, [&](int k, auto load, auto store) {
      const int64_t at = j * inner + k * V::size;
      if constexpr (log)
        store(load(x + at) - most.v[k] - sum.v[k], y + at);
      else if constexpr (is_half<S>)
        store(exp_of<S>(load(x + at) - most.v[k]) * shares[k].scale, y + at);
      else
        store(shares[k].of(load(y + at)), y + at);
    });
}

template <bool log, class S>
inline void softmax_gradient_strip(const S* grad_y, const S* y, S* grad_x, int64_t size, int64_t inner, int count) {
  using C = Compute<S>;
  using V = Vec<C>;
  Strip<C> sum;
  for (int k = 0; k < kStrip; ++k) sum.v[k] = V::zero();
  for (int64_t j = 0; j < size; ++j)
    by_strip<C>(count, [&](int k, auto load, auto) {
      const int64_t at = j * inner + k * V::size;
      const V g = load(grad_y + at);
      sum.v[k] = log ? sum.v[k] + g : fma(g, load(y + at), sum.v[k]);
    });
  for (int64_t j = 0; j < size; ++j)
    by_strip<C>(count, [&](int k, auto load, auto store) {
      const int64_t at = j * inner + k * V::size;
      const V g = load(grad_y + at), v = load(y + at);
      store(log ? fnma(exp_of<S>(v), sum.v[k], g) : v * (g - sum.v[k]), grad_x + at);
    });
}

// row(offset) for every row, or strip(offset, count) for every strip, where inner > 1.
template <class C, class Call, class Row, class StripBody>
inline void for_rows(const Call& call, const Team& team, Row row, StripBody strip) {
  constexpr int64_t width = kStrip * Vec<C>::size;
  const int64_t per_outer = call.inner == 1 ? 1 : ceil_div(call.inner, width), count = call.outer * per_outer;
  const int threads = threads_for(team, call.outer * call.size * call.inner, count, kSoftmaxGrain);
  parallel(team, threads, [&](Crew& crew) {
    crew.each(count, [&](int64_t i) {
      if (call.inner == 1) return row(i * call.size);
      const int64_t o = i / per_outer, first = i % per_outer * width;
      strip(o * call.size * call.inner + first, static_cast<int>(smaller(width, call.inner - first)));
    });
  });
}

// Rows of at most kShortRow elements, as many as a strip has lanes: they are transposed, a row a lane, as a row of its
// own takes longer to reduce its maximum and its sum to one number than to all else.
template <bool log, class S>
inline void softmax_short_rows(const S* x, S* y, int64_t size, int count) {
  constexpr int64_t width = kStrip * Vec<Compute<S>>::size;
  if (size < 1 || count < 1) __builtin_unreachable();  // softmax.h; g++ warns of `lanes` without it
  S lanes[kShortRow * width];
  for (int64_t i = 0; i < count; ++i)
    for (int64_t j = 0; j < size; ++j) lanes[j * width + i] = x[i * size + j];
  softmax_strip<log>(lanes, lanes, size, width, count);
  for (int64_t i = 0; i < count; ++i)
    for (int64_t j = 0; j < size; ++j) y[i * size + j] = lanes[j * width + i];
}

template <bool log, class S>
void softmax_forward(const Bound<SoftmaxForward>& args, const Team& team) {
  const S* const x = static_cast<const S*>(args.x);
  S* const y = static_cast<S*>(args.y);
  if constexpr (kShortRow > 0)
    if (args.inner == 1 && args.size <= kShortRow && args.outer >= Vec<Compute<S>>::size) {
      constexpr int64_t width = kStrip * Vec<Compute<S>>::size;
      const int64_t blocks = ceil_div(args.outer, width);
      parallel(team, threads_for(team, args.outer * args.size, blocks, kSoftmaxGrain), [&](Crew& crew) {
        crew.each(blocks, [&](int64_t block) {
          const int64_t first = block * width, at = first * args.size;
          softmax_short_rows<log>(x + at, y + at, args.size, static_cast<int>(smaller(width, args.outer - first)));
        });
      });
      return;
    }
  for_rows<Compute<S>>(
      args, team, [&](int64_t at) { softmax_row<log>(x + at, y + at, args.size); },
      [&](int64_t at, int count) { softmax_strip<log>(x + at, y + at, args.size, args.inner, count); });
}

template <bool log, class S>
void softmax_backward(const Bound<SoftmaxBackward>& args, const Team& team) {
  const S *const grad_y = static_cast<const S*>(args.grad_y), *const y = static_cast<const S*>(args.y);
  S* const grad_x = static_cast<S*>(args.grad_x);
  for_rows<Compute<S>>(
      args, team, [&](int64_t at) { softmax_gradient_row<log>(grad_y + at, y + at, grad_x + at, args.size); },
      [&](int64_t at, int count) {
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
