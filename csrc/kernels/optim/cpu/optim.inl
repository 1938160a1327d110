// Steps of SGD and Adam. All pieces together are one row of elements, of which each thread takes a part.
#pragma once

#include "../../common/cpu/common.inl"
#include "../../common/cpu/some.inl"
#include "../optim.h"

// Elements a thread: with fewer, starting a team takes longer than it saves (SGD with 2 x 16384 float32: 3.0 us on one
// thread, 4.1 us on two; Zen 5).
constexpr int64_t kStepGrain = 32768;
// Parts begin at whole lines of memory within a piece.
constexpr int64_t kStepUnit = 64;

// body(piece, first, count) for all elements of all pieces.
template <class Call, class Body>
void for_pieces(const Bound<Call>& args, const Team& team, Body body) {
  const auto* const pieces = args.pieces;
  int64_t total = 0;
  for (int64_t i = 0; i < args.count; ++i) total += round_up(pieces[i].n, kStepUnit);
  const int wanted = args.in_order ? 1 : threads_for(team, total, total / kStepUnit, kStepGrain);
  parallel(team, wanted, [&](Crew& crew) {
    crew.divide(total / kStepUnit, [&](int64_t first_unit, int64_t last_unit) {
      const int64_t begin = first_unit * kStepUnit, end = last_unit * kStepUnit;
      int64_t at = 0;
      for (int64_t i = 0; i < args.count && at < end; ++i) {
        const int64_t size = round_up(pieces[i].n, kStepUnit);
        const int64_t first = larger(begin - at, int64_t{0}), last = smaller(smaller(end - at, size), pieces[i].n);
        if (first < last) body(pieces[i], first, last - first);
        at += size;
      }
    });
  });
}

// x, or zero where x is less than `least`. An average of gradients that have become zero decays and then stays
// denormal, for good, which made every step 12 times slower on an Intel processor.
template <class C>
inline Vec<C> without_less(Vec<C> x, Vec<C> least) {
  return select(lt(abs(x), least), Vec<C>::zero(), x);
}
template <class C>
inline Vec<C> smallest_normal() {
  return set<C>(is_single<C> ? 0x1p-126 : 0x1p-1022);
}

template <class S, bool with_momentum>
void sgd_step(const Bound<SgdStep>& args, const Team& team) {
  using C = Compute<S>;
  using V = Vec<C>;
  const SgdStep::Options& o = *args.options;
  const bool decays = o.weight_decay != 0;
  const V minus_lr = set<C>(-o.lr), momentum = set<C>(o.momentum), rest = set<C>(1 - o.dampening),
          weight_decay = set<C>(o.weight_decay);
  for_pieces(args, team, [&](const SgdStep::Piece& piece, int64_t first, int64_t count) {
    S* const p = static_cast<S*>(piece.p);
    const S* const grad = static_cast<const S*>(piece.grad);
    S* const m = static_cast<S*>(piece.m);
    for_vectors<V>(first, first + count, [&](int64_t i, int n) __attribute__((always_inline)) {
      V g = load_some<V>(grad + i, n);
      if (args.maximize) g = -g;
      const V x = load_some<V>(p + i, n);
      if (decays) g = fma(weight_decay, x, g);
      if constexpr (with_momentum) {
        const V buffer = without_less(fma(rest, g, load_some<V>(m + i, n) * momentum), smallest_normal<C>());
        store_some(buffer, m + i, n);
        g = args.nesterov ? fma(momentum, buffer, g) : buffer;
      }
      store_some(fma(minus_lr, g, x), p + i, n);
    });
  });
}

// The larger one; NaN if either is.
template <class T>
inline Vec<T> maximum(Vec<T> a, Vec<T> b) {
  return select(unordered(a, b), a + b, max(a, b));
}

template <class S, bool amsgrad>
void adam_step(const Bound<AdamStep>& args, const Team& team) {
  using C = Compute<S>;
  using V = Vec<C>;
  const AdamStep::Options& o = *args.options;
  const bool decays = o.weight_decay != 0, decoupled = o.decay != 1;
  const V weight_decay = set<C>(o.weight_decay), decay = set<C>(o.decay), eps = set<C>(o.eps);
  const V beta2 = set<C>(o.beta2), rest2 = set<C>(1 - o.beta2);
  // Beside a smaller eps, what a denormal v contributes to the denominator would count.
  const V least = o.eps >= (is_single<C> ? 1e-10 : 1e-130) ? smallest_normal<C>() : V::zero();
  // m + rest (g - m), from the end that is nearer.
  const V rest1 = set<C>(1 - o.beta1);
  const bool near_m = static_cast<C>(1 - o.beta1) < C(0.5);
  const V slope = near_m ? rest1 : rest1 - set<C>(1);
  for_pieces(args, team, [&](const AdamStep::Piece& piece, int64_t first, int64_t count) {
    S* const p = static_cast<S*>(piece.p);
    const S* const grad = static_cast<const S*>(piece.grad);
    S* const m = static_cast<S*>(piece.m);
    S* const v = static_cast<S*>(piece.v);
    S* const top = static_cast<S*>(piece.top);
    const V step_size = set<C>(piece.step_size), correction = set<C>(piece.correction);
    for_vectors<V>(first, first + count, [&](int64_t i, int n) __attribute__((always_inline)) {
      V g = load_some<V>(grad + i, n), x = load_some<V>(p + i, n);
      if (args.maximize) g = -g;
      if (decoupled) x = x * decay;
      if (decays) g = fma(weight_decay, x, g);
      const V old = load_some<V>(m + i, n);
      const V mean = without_less(fma(slope, g - old, near_m ? old : g), least);
      const V square = without_less(fma(rest2 * g, g, load_some<V>(v + i, n) * beta2), least);
      store_some(mean, m + i, n);
      store_some(square, v + i, n);
      V largest = square;
      if constexpr (amsgrad) {
        largest = maximum(load_some<V>(top + i, n), square);
        store_some(largest, top + i, n);
      }
      const V denominator = sqrt(largest) / correction + eps;
      store_some(x + step_size * mean / denominator, p + i, n);
    });
  });
}

void plan_call(Plan<SgdStep>& plan) {
  with_dtype(plan.call.dtype, [&](auto type) {
    using S = decltype(type);
    decide(plan, {"elementwise"}, 0, [](auto& args, auto*, auto& team) {
      args.with_momentum ? sgd_step<S, true>(args, team) : sgd_step<S, false>(args, team);
    });
  });
}

void plan_call(Plan<AdamStep>& plan) {
  with_dtype(plan.call.dtype, [&](auto type) {
    using S = decltype(type);
    decide(plan, {"elementwise"}, 0, [](auto& args, auto*, auto& team) {
      args.amsgrad ? adam_step<S, true>(args, team) : adam_step<S, false>(args, team);
    });
  });
}
