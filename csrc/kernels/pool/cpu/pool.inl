// The entry points of pooling: max_pool_* and avg_pool_*. Every output is computed by one thread, in an order that
// depends only on the shape.
#pragma once

#include "../../common/cpu/common.inl"
#include "channels_first_backward.inl"
#include "channels_first_forward.inl"
#include "channels_last.inl"
#include "halves.inl"
#include "window_ops.inl"
#include "windows.inl"

template <class S, class Op>
void pool_forward(const Pool& pool, Layout layout, const void* x, const Op& op, const Team& team) {
  if (layout == Layout::channels_first)
    pool_first(pool, static_cast<const S*>(x), op, team);
  else
    pool_last(pool, static_cast<const S*>(x), op, team);
}

template <class S, class Route>
void pool_backward(const Pool& pool, Layout layout, const void* grad_y, void* grad_x, const Route& op,
                   const Team& team) {
  if (layout == Layout::channels_first)
    pool_backward_first(pool, static_cast<const S*>(grad_y), static_cast<S*>(grad_x), op, team);
  else
    pool_backward_last(pool, static_cast<const S*>(grad_y), static_cast<S*>(grad_x), op, team);
}

// Names of the kernels (kernel_name.h).
inline KernelName pool_name(DType dtype, Layout layout, const PoolGeometry& g, bool indexed) {
  if (layout == Layout::channels_last) return {"pool_last"};
  const PoolWay way = with_dtype(
      dtype, [&](auto type) { return pool_way<decltype(type)>(make_pool(g, Layout::channels_first), indexed); });
  return {way == PoolWay::halves ? "pool_halves" : way == PoolWay::across ? "pool_across" : "pool_within"};
}
inline KernelName pool_backward_name(DType dtype, Layout layout, const PoolGeometry& g, bool averages, bool window) {
  if (layout == Layout::channels_last) return {"pool_last"};
  const PoolBackwardWay way = with_dtype(dtype, [&](auto type) {
    return pool_backward_way<Compute<decltype(type)>>(make_pool(g, Layout::channels_first), averages, window);
  });
  switch (way) {
    case PoolBackwardWay::halves:
      return {"pool_halves"};
    case PoolBackwardWay::spread:
      return {"pool_spread"};
    case PoolBackwardWay::across:
      return {"pool_across"};
    case PoolBackwardWay::scatter:
      break;
  }
  return {"pool_scatter"};
}

inline int64_t elements(const PoolGeometry& g, const int64_t (&spatial)[3]) {
  return g.batch * g.channels * spatial[0] * spatial[1] * spatial[2];
}

// The gradient of no outputs.
template <class Call>
void decide_zeros(Plan<Call>& plan) {
  decide(plan, {"zeros"}, 0, [](auto& args, auto*, auto&) {
    const int64_t count = elements(args.geometry, args.geometry.in);
    __builtin_memset(args.grad_x, 0, static_cast<size_t>(count) * size_of(args.dtype));
  });
}

void plan_call(Plan<MaxPoolForward>& plan) {
  const MaxPoolForward& call = plan.call;
  if (kInference && call.kind != PoolIndices::none) return;
  if (elements(call.geometry, call.geometry.out) == 0) return decide_nothing(plan);
  const KernelName name = pool_name(call.dtype, call.layout, call.geometry, call.kind != PoolIndices::none);
  with_dtype(call.dtype, [&](auto type) {
    using S = decltype(type);
    decide(plan, name, 0, make_pool(call.geometry, call.layout), [](auto& args, auto& pool, auto*, auto& team) {
      S* const y = static_cast<S*>(args.y);
      const auto run = [&]<class I>(I* indices, const TapOffsets* offsets) {
        pool_forward<S>(pool, args.layout, args.x, MaxPool<S, I>{y, indices, offsets}, team);
      };
      if (args.kind == PoolIndices::none) return run(static_cast<NoIndices*>(nullptr), nullptr);
      if constexpr (!kInference) {
        if (args.kind == PoolIndices::window) return run(static_cast<uint8_t*>(args.indices), nullptr);
        const TapOffsets offsets(pool);
        run(static_cast<int64_t*>(args.indices), &offsets);
      }
    });
  });
}

void plan_call(Plan<MaxPoolBackward>& plan) {
  const MaxPoolBackward& call = plan.call;
  if (elements(call.geometry, call.geometry.in) == 0) return decide_nothing(plan);
  if (elements(call.geometry, call.geometry.out) == 0) return decide_zeros(plan);
  const bool window = call.kind == PoolIndices::window;
  const KernelName name = pool_backward_name(call.dtype, call.layout, call.geometry, false, window);
  with_dtype(call.dtype, [&](auto type) {
    using S = decltype(type);
    decide(plan, name, 0, make_pool(call.geometry, call.layout), [](auto& args, auto& pool, auto*, auto& team) {
      const auto run = [&]<class I>(const I* indices, const TapOffsets* offsets) {
        pool_backward<S>(pool, args.layout, args.grad_y, args.grad_x, MaxRoute<S, I>{indices, offsets}, team);
      };
      if (args.kind == PoolIndices::window) {
        const TapOffsets offsets(pool);
        run(static_cast<const uint8_t*>(args.indices), &offsets);
      } else {
        run(static_cast<const int64_t*>(args.indices), nullptr);
      }
    });
  });
}

void plan_call(Plan<AvgPoolForward>& plan) {
  const AvgPoolForward& call = plan.call;
  if (elements(call.geometry, call.geometry.out) == 0) return decide_nothing(plan);
  const KernelName name = pool_name(call.dtype, call.layout, call.geometry, false);
  with_dtype(call.dtype, [&](auto type) {
    using S = decltype(type);
    decide(plan, name, 0, make_pool(call.geometry, call.layout), [](auto& args, auto& pool, auto*, auto& team) {
      const AvgPool<S> op = {static_cast<S*>(args.y), args.count_include_pad, args.divisor_override};
      pool_forward<S>(pool, args.layout, args.x, op, team);
    });
  });
}

void plan_call(Plan<AvgPoolBackward>& plan) {
  const AvgPoolBackward& call = plan.call;
  if (elements(call.geometry, call.geometry.in) == 0) return decide_nothing(plan);
  if (elements(call.geometry, call.geometry.out) == 0) return decide_zeros(plan);
  const KernelName name = pool_backward_name(call.dtype, call.layout, call.geometry, true, false);
  with_dtype(call.dtype, [&](auto type) {
    using S = decltype(type);
    decide(plan, name, 0, make_pool(call.geometry, call.layout), [](auto& args, auto& pool, auto*, auto& team) {
      pool_backward<S>(pool, args.layout, args.grad_y, args.grad_x,
                       AvgRoute<S>{args.count_include_pad, args.divisor_override}, team);
    });
  });
}
