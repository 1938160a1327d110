// Cross entropy and the mean squared error.
#pragma once

#include "../../common/cpu/common.inl"
#include "../../common/cpu/some.inl"
#include "../../softmax/cpu/rows.inl"
#include "../loss.h"

// body(block) for every block, each on one thread.
template <class Body>
void for_each_block(const Team& team, int64_t blocks, int64_t elements, int64_t grain, Body body) {
  parallel(team, threads_for(team, elements, blocks, grain), [&](Crew& crew) { crew.each(blocks, body); });
}

// ---- cross entropy

// Elements that a thread is worth waking for: an exponential each.
constexpr int64_t kCrossEntropyGrain = 8192;
// The most positions of a block. With rows (inner == 1) the classes of one lie next to each other, with planes the
// positions do.
constexpr int64_t kPositions = 64;

// What a block of positions has: the largest x, the sum of exp(x - top), and with smoothing the sum of w (x - top).
template <class C>
struct Rows {
  C top[kPositions], sum[kPositions], weighted[kPositions];
};

// Of how many classes the sums are formed in a vector's lanes, before they are added in float64.
constexpr int64_t kClassesInLanes = 512;

struct BlockSum {
  double loss, weight;
  int64_t bad;
};

// Where the elements of position `at` begin, and how far its classes are apart.
template <class Call>
inline int64_t offset_of(const Call& args, int64_t at) {
  return at / args.inner * args.classes * args.inner + at % args.inner;
}

// Positions of a block: of long rows fewer, so that there is a block for every thread.
template <class Call>
inline int64_t step_of(const Call& args) {
  return args.inner == 1 ? larger(int64_t{1}, smaller(kPositions, 4096 / args.classes)) : kPositions;
}
// Blocks do not cross the end of a plane.
template <class Call>
inline int64_t blocks_per_plane(const Call& args) {
  return ceil_div(args.inner == 1 ? args.outer : args.inner, step_of(args));
}
template <class Call>
inline int64_t blocks_of(const Call& args) {
  return blocks_per_plane(args) * (args.inner == 1 ? 1 : args.outer);
}
struct Range {
  int64_t first;
  int count;
};
template <class Call>
inline Range positions_of(const Call& args, int64_t block) {
  const int64_t per_plane = blocks_per_plane(args), within = block % per_plane * step_of(args);
  const int64_t size = args.inner == 1 ? args.outer : args.inner;
  return {block / per_plane * args.inner + within, static_cast<int>(smaller(step_of(args), size - within))};
}

template <class C>
inline void take_logs(const C* sums, C* logs, int count) {
  for (int i = 0; i < count; i += Vec<C>::size) log_of(Vec<C>::load(sums + i)).store(logs + i);
}

// One position: its classes lie next to each other. Lanes past the end are -infinity, whose exponential is 0.
template <class S, class C>
inline void row_statistics(const S* x, const S* w, int64_t classes, bool smooth, C& top, C& sum, C& weighted) {
  using V = Vec<C>;
  const V lowest = set<C>(-__builtin_inf());
  const int64_t whole = classes / V::size * V::size;
  const int tail = static_cast<int>(classes - whole);
  const Mask<C> inside = Mask<C>::from_bits((1u << tail) - 1);
  const auto rest = [&] { return select(inside, V::load(x + whole, tail), lowest); };
  V most = tail > 0 ? rest() : lowest;
  for (int64_t c = 0; c < whole; c += V::size) most = max(most, V::load(x + c));
  top = reduce_max(most);
  const V t = V::set1(top);
  double total = 0, mean = 0;
  const auto part = [&](int64_t first, int64_t end) {
    V sums[2] = {V::zero(), V::zero()}, means = V::zero();
    const auto add = [&](V& to, V difference, int64_t c, int count) __attribute__((always_inline)) {
      to = to + exp_of<S>(difference);
      if (smooth) {
        const V d = count == 0 ? difference : select(inside, difference, V::zero());
        means = w == nullptr ? means + d : fma(count == 0 ? V::load(w + c) : V::load(w + c, count), d, means);
      }
    };
    int64_t c = first;
    for (; c + 2 * V::size <= end; c += 2 * V::size) {
      add(sums[0], V::load(x + c) - t, c, 0);
      add(sums[1], V::load(x + c + V::size) - t, c + V::size, 0);
    }
    for (; c + V::size <= end; c += V::size) add(sums[0], V::load(x + c) - t, c, 0);
    // A row of nothing but -infinity is NaN by its own elements, not by the lanes past its end.
    if (c < end) add(sums[1], select(inside, rest() - t, lowest), c, tail);
    total += static_cast<double>(reduce_add(sums[0] + sums[1]));
    if (smooth) mean += static_cast<double>(reduce_add(means));
  };
  for (int64_t c = 0; c < classes; c += kClassesInLanes) part(c, smaller(c + kClassesInLanes, classes));
  sum = static_cast<C>(total);
  weighted = static_cast<C>(mean);
}

// A vector of positions, whose classes are `inner` apart.
template <class S, class C>
inline void plane_statistics(const S* x, const S* w, int64_t classes, int64_t inner, bool smooth, int count, C* top,
                             C* sum, C* weighted) {
  using V = Vec<C>;
  const auto load = [&](int64_t c) __attribute__((always_inline)) {
    return count == V::size ? V::load(x + c * inner) : V::load(x + c * inner, count);
  };
  V most = load(0);
  for (int64_t c = 1; c < classes; ++c) most = max(most, load(c));
  V total = V::zero(), mean = V::zero();
  for (int64_t c = 0; c < classes; ++c) {
    const V difference = load(c) - most;
    total = total + exp_of<S>(difference);
    if (smooth) mean = w == nullptr ? mean + difference : fma(V::set1(load_one(w + c)), difference, mean);
  }
  most.store(top);
  total.store(sum);
  mean.store(weighted);
}

template <class S>
inline double sum_of_weights(const S* w, int64_t classes) {
  if (w == nullptr) return static_cast<double>(classes);
  double sum = 0;
  for (int64_t c = 0; c < classes; ++c) sum += static_cast<double>(load_one(w + c));
  return sum;
}

// A mean without any weight is NaN, and so is its gradient, also where a smoothing's part of the sum is not 0.
template <class C>
inline C without_weight(bool smooth, C total) {
  return smooth ? 0 / total : C(0);
}

template <class C>
inline void store_one(C value, bf16_t* p) {
  Vec<float>::set1(value).store(p, 1);
}
template <class C>
inline void store_one(C value, f16_t* p) {
  Vec<float>::set1(value).store(p, 1);
}
inline void store_one(float value, float* p) { *p = value; }
inline void store_one(double value, double* p) { *p = value; }

template <class S>
void cross_entropy_forward(const Bound<CrossEntropyForward>& args, void* workspace, const Team& team) {
  using C = Compute<S>;
  const S* const x = static_cast<const S*>(args.x);
  const S* const w = static_cast<const S*>(args.w);
  S* const y = static_cast<S*>(args.y);
  C* const statistics = static_cast<C*>(args.statistics);
  BlockSum* const sums = static_cast<BlockSum*>(workspace);
  const int64_t positions = args.outer * args.inner, blocks = blocks_of(args);
  const bool smooth = args.smoothing != 0;
  const C all = static_cast<C>(smooth ? sum_of_weights(w, args.classes) : 0);
  const C of_target = static_cast<C>(1 - args.smoothing);
  const C of_all = static_cast<C>(args.smoothing / static_cast<double>(args.classes));

  for_each_block(team, blocks, positions * args.classes, kCrossEntropyGrain, [&](int64_t block) {
    const Range range = positions_of(args, block);
    Rows<C> rows;
    for (C& sum : rows.sum) sum = 1;
    if (args.inner == 1) {
      for (int i = 0; i < range.count; ++i)
        row_statistics(x + (range.first + i) * args.classes, w, args.classes, smooth, rows.top[i], rows.sum[i],
                       rows.weighted[i]);
    } else {
      const S* const first = x + offset_of(args, range.first);
      for (int i = 0; i < range.count; i += Vec<C>::size)
        plane_statistics(first + i, w, args.classes, args.inner, smooth, smaller<int>(Vec<C>::size, range.count - i),
                         rows.top + i, rows.sum + i, rows.weighted + i);
    }
    C logs[kPositions];
    take_logs(rows.sum, logs, range.count);

    BlockSum sum{0, 0, -1};
    for (int i = 0; i < range.count; ++i) {
      const int64_t at = range.first + i, t = args.target[at];
      C loss = 0;
      if (t < 0 || t >= args.classes) {
        if (t != args.ignore_index && sum.bad < 0) sum.bad = at;
      } else if (t != args.ignore_index) {
        const C weight = w == nullptr ? C(1) : load_one(w + t);
        const C log_p = (load_one(x + offset_of(args, at) + t * args.inner) - rows.top[i]) - logs[i];
        loss = -log_p * weight;
        if (smooth) loss = of_target * loss + of_all * (logs[i] * all - rows.weighted[i]);
        sum.weight += static_cast<double>(weight);
        sum.loss += static_cast<double>(loss);
      }
      if (args.reduction == Reduction::none) store_one(loss, y + at);
      if (statistics != nullptr) {
        statistics[at] = rows.top[i];
        statistics[positions + at] = rows.sum[i];
      }
    }
    sums[block] = sum;
  });

  BlockSum sum{0, 0, -1};
  for (int64_t block = 0; block < blocks; ++block) {
    sum.loss += sums[block].loss;
    sum.weight += sums[block].weight;
    if (sum.bad < 0) sum.bad = sums[block].bad;
  }
  *args.bad = sum.bad;
  if (statistics != nullptr) statistics[2 * positions] = static_cast<C>(sum.weight);
  if (args.reduction == Reduction::sum) store_one(static_cast<C>(sum.loss), y);
  if (args.reduction == Reduction::mean)
    store_one(static_cast<C>(sum.loss / sum.weight + without_weight(smooth, sum.weight)), y);
}

template <class S>
void cross_entropy_backward(const Bound<CrossEntropyBackward>& args, const Team& team) {
  using C = Compute<S>;
  using V = Vec<C>;
  const S* const grad_y = static_cast<const S*>(args.grad_y);
  const S* const x = static_cast<const S*>(args.x);
  const S* const w = static_cast<const S*>(args.w);
  const C* const statistics = static_cast<const C*>(args.statistics);
  S* const grad_x = static_cast<S*>(args.grad_x);
  const int64_t positions = args.outer * args.inner, inner = args.inner;
  const bool smooth = args.smoothing != 0;
  const double share = args.smoothing / static_cast<double>(args.classes);
  const C of_target = static_cast<C>(1 - args.smoothing), of_all = static_cast<C>(share);
  const C all = static_cast<C>(smooth ? share * sum_of_weights(w, args.classes) : 0);
  C whole = args.reduction == Reduction::none ? C(0) : load_one(grad_y);
  if (args.reduction == Reduction::mean)
    whole = whole / statistics[2 * positions] + without_weight(smooth, statistics[2 * positions]);
  // grad_x[c] = factor (slope exp(x[c] - top) - of_all w[c] - (c == t ? at_target : 0)), and 0 where t does not count.
  struct Position {
    C top, slope, factor, at_target;
    bool counts;
  };
  const auto read = [&](int64_t at) {
    const int64_t t = args.target[at];
    Position p{statistics[at], 0, 0, 0, false};
    if (t == args.ignore_index || t < 0 || t >= args.classes) return p;
    const C weight = w == nullptr ? C(1) : load_one(w + t);
    p.counts = true;
    p.at_target = of_target * weight;
    p.slope = (p.at_target + all) / statistics[positions + at];
    p.factor = args.reduction == Reduction::none ? load_one(grad_y + at) : whole;
    return p;
  };
  const auto gradient = [&](V value, V top, V slope, V factor, V spread) __attribute__((always_inline)) {
    return factor * (slope * weight_of<S>(value - top) - spread);
  };
  const auto spread_at = [&](int64_t c) { return of_all * (w == nullptr ? C(1) : load_one(w + c)); };
  const auto fix_target = [&](int64_t at, const Position& p, C value, S* to) {
    const C spread = smooth ? spread_at(args.target[at]) : C(0);
    gradient(V::set1(value), V::set1(p.top), V::set1(p.slope), V::set1(p.factor), V::set1(spread + p.at_target))
        .store(to, 1);
  };

  for_each_block(team, blocks_of(args), positions * args.classes, kCrossEntropyGrain, [&](int64_t block) {
    const Range range = positions_of(args, block);
    if (inner == 1) {
      for (int i = 0; i < range.count; ++i) {
        const int64_t at = range.first + i, row = at * args.classes;
        const Position p = read(at);
        if (!p.counts) {
          for (int64_t c = 0; c < args.classes; c += V::size)
            V::zero().store(grad_x + row + c, static_cast<int>(smaller(V::size, args.classes - c)));
          continue;
        }
        const C value = load_one(x + row + args.target[at]);
        const V top = V::set1(p.top), slope = V::set1(p.slope), factor = V::set1(p.factor), each = V::set1(of_all);
        const auto one = [&](int64_t c, V v, int count) __attribute__((always_inline)) {
          V spread = V::zero();
          if (smooth) spread = w == nullptr ? each : each * (count ? V::load(w + c, count) : V::load(w + c));
          return gradient(v, top, slope, factor, spread);
        };
        int64_t c = 0;
        for (; c + V::size <= args.classes; c += V::size) one(c, V::load(x + row + c), 0).store(grad_x + row + c);
        const int tail = static_cast<int>(args.classes - c);
        if (tail > 0) one(c, V::load(x + row + c, tail), tail).store(grad_x + row + c, tail);
        fix_target(at, p, value, grad_x + row + args.target[at]);
      }
      return;
    }
    const int64_t begin = offset_of(args, range.first);
    for (int i = 0; i < range.count; i += V::size) {
      const int count = smaller<int>(V::size, range.count - i);
      Position each[V::size];
      C tops[V::size] = {}, slopes[V::size] = {}, factors[V::size] = {}, values[V::size] = {};
      C counted[V::size] = {};
      for (int j = 0; j < count; ++j) {
        const Position p = each[j] = read(range.first + i + j);
        tops[j] = p.top, slopes[j] = p.slope, factors[j] = p.factor;
        counted[j] = p.counts;
        if (p.counts) values[j] = load_one(x + begin + i + j + args.target[range.first + i + j] * inner);
      }
      const V top = V::load(tops), slope = V::load(slopes), factor = V::load(factors);
      // Where a target does not count, x may be anything, also NaN.
      const Mask<C> counts = !eq(V::load(counted), V::zero());
      for (int64_t c = 0; c < args.classes; ++c) {
        const int64_t from = begin + c * inner + i;
        const V v = count == V::size ? V::load(x + from) : V::load(x + from, count);
        const V spread = smooth ? V::set1(spread_at(c)) : V::zero();
        const V g = select(counts, gradient(v, top, slope, factor, spread), V::zero());
        if (count == V::size)
          g.store(grad_x + from);
        else
          g.store(grad_x + from, count);
      }
      for (int j = 0; j < count; ++j)
        if (each[j].counts) {
          const int64_t at = range.first + i + j;
          fix_target(at, each[j], values[j], grad_x + begin + i + j + args.target[at] * inner);
        }
    }
  });
}

// ---- mean squared error

constexpr int64_t kMseGrain = 32768;
constexpr int64_t kMseBlock = 4096;  // elements whose squares are added in the vectors' lanes

template <class S>
void mse_forward(const Bound<MseForward>& args, void* workspace, const Team& team) {
  using C = Compute<S>;
  using V = Vec<C>;
  const S* const x = static_cast<const S*>(args.x);
  const S* const t = static_cast<const S*>(args.t);
  S* const y = static_cast<S*>(args.y);
  double* const sums = static_cast<double*>(workspace);
  const int64_t blocks = ceil_div(args.n, kMseBlock);
  for_each_block(team, blocks, args.n, kMseGrain, [&](int64_t block) {
    const int64_t end = smaller((block + 1) * kMseBlock, args.n);
    V sum[4] = {V::zero(), V::zero(), V::zero(), V::zero()};
    const auto square = [&](int64_t i, int tail) __attribute__((always_inline)) {
      const V d = tail ? V::load(x + i, tail) - V::load(t + i, tail) : V::load(x + i) - V::load(t + i);
      return d * d;
    };
    int64_t i = block * kMseBlock;
    if (args.reduction == Reduction::none) {
      for (; i + V::size <= end; i += V::size) square(i, 0).store(y + i);
      if (i < end) square(i, static_cast<int>(end - i)).store(y + i, static_cast<int>(end - i));
      return;
    }
    for (; i + 4 * V::size <= end; i += 4 * V::size)
      for (int j = 0; j < 4; ++j) sum[j] = sum[j] + square(i + j * V::size, 0);
    for (; i < end; i += V::size) sum[0] = sum[0] + square(i, i + V::size <= end ? 0 : static_cast<int>(end - i));
    sums[block] = static_cast<double>(reduce_add((sum[0] + sum[1]) + (sum[2] + sum[3])));
  });
  if (args.reduction == Reduction::none) return;
  double sum = 0;
  for (int64_t block = 0; block < blocks; ++block) sum += sums[block];
  if (args.reduction == Reduction::mean) sum /= static_cast<double>(args.n);
  store_one(static_cast<C>(sum), y);
}

template <class S>
void mse_backward(const Bound<MseBackward>& args, const Team& team) {
  using C = Compute<S>;
  using V = Vec<C>;
  const S* const grad_y = static_cast<const S*>(args.grad_y);
  const S* const x = static_cast<const S*>(args.x);
  const S* const t = static_cast<const S*>(args.t);
  S* const grad_x = static_cast<S*>(args.grad_x);
  S* const grad_t = static_cast<S*>(args.grad_t);
  const bool none = args.reduction == Reduction::none;
  const double norm = args.reduction == Reduction::mean ? 2 / static_cast<double>(args.n) : 2;
  const V factor = V::set1(static_cast<C>(norm)), whole = none ? V::zero() : V::set1(load_one(grad_y));
  for_each_block(team, ceil_div(args.n, kMseBlock), args.n, kMseGrain, [&](int64_t block) {
    const int64_t end = smaller((block + 1) * kMseBlock, args.n);
    for_vectors<V>(block * kMseBlock, end, [&](int64_t i, int count) __attribute__((always_inline)) {
      const V d = load_some<V>(x + i, count) - load_some<V>(t + i, count);
      const V g = factor * d * (none ? load_some<V>(grad_y + i, count) : whole);
      if (grad_x != nullptr) store_some(g, grad_x + i, count);
      if (grad_t != nullptr) store_some(-g, grad_t + i, count);
    });
  });
}

// ---- plans

void plan_call(Plan<CrossEntropyForward>& plan) {
  with_dtype(plan.call.dtype, [&](auto type) {
    const size_t workspace = static_cast<size_t>(blocks_of(plan.call)) * sizeof(BlockSum);
    decide(plan, {plan.call.inner == 1 ? "rows" : "planes"}, workspace, [](auto& args, auto* workspace, auto& team) {
      cross_entropy_forward<decltype(type)>(args, workspace, team);
    });
  });
}

void plan_call(Plan<CrossEntropyBackward>& plan) {
  with_dtype(plan.call.dtype, [&](auto type) {
    decide(plan, {plan.call.inner == 1 ? "rows" : "planes"}, 0,
           [](auto& args, auto*, auto& team) { cross_entropy_backward<decltype(type)>(args, team); });
  });
}

void plan_call(Plan<MseForward>& plan) {
  with_dtype(plan.call.dtype, [&](auto type) {
    const size_t workspace = static_cast<size_t>(ceil_div(plan.call.n, kMseBlock)) * sizeof(double);
    decide(plan, {"elementwise"}, workspace,
           [](auto& args, auto* workspace, auto& team) { mse_forward<decltype(type)>(args, workspace, team); });
  });
}

void plan_call(Plan<MseBackward>& plan) {
  with_dtype(plan.call.dtype, [&](auto type) {
    decide(plan, {"elementwise"}, 0, [](auto& args, auto*, auto& team) { mse_backward<decltype(type)>(args, team); });
  });
}
