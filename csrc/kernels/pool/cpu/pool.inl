// The entry points of pooling: max_pool_* and avg_pool_*. Every output is computed by one thread, in an order that
// depends only on the shape.
#pragma once

#include "../../common/cpu/dtype.inl"
#include "../../common/cpu/math.inl"
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
    case PoolBackwardWay::whole:
      return {"pool_whole"};
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

void max_pool_forward(const MaxPoolForward& args, const Team& team) {
  if (elements(args.geometry, args.geometry.out) == 0) return;
  const Pool pool = make_pool(args.geometry, args.layout);
  with_dtype(args.dtype, [&](auto type) {
    using S = decltype(type);
    S* const y = static_cast<S*>(args.y);
    const auto run = [&]<class I>(I* indices, const TapOffsets* offsets) {
      pool_forward<S>(pool, args.layout, args.x, MaxPool<S, I>{y, indices, offsets}, team);
    };
    if (args.kind == PoolIndices::none) {
      run(static_cast<NoIndices*>(nullptr), nullptr);
    } else if (args.kind == PoolIndices::window) {
      run(static_cast<uint8_t*>(args.indices), nullptr);
    } else {
      const TapOffsets offsets(pool);
      run(static_cast<int64_t*>(args.indices), &offsets);
    }
  });
}

void max_pool_backward(const MaxPoolBackward& args, const Team& team) {
  if (elements(args.geometry, args.geometry.in) == 0) return;
  const Pool pool = make_pool(args.geometry, args.layout);
  with_dtype(args.dtype, [&](auto type) {
    using S = decltype(type);
    if (args.kind == PoolIndices::window) {
      const TapOffsets offsets(pool);
      pool_backward<S>(pool, args.layout, args.grad_y, args.grad_x,
                       MaxRoute<S, uint8_t>{static_cast<const uint8_t*>(args.indices), &offsets}, team);
    } else {
      pool_backward<S>(pool, args.layout, args.grad_y, args.grad_x,
                       MaxRoute<S, int64_t>{static_cast<const int64_t*>(args.indices), nullptr}, team);
    }
  });
}

void avg_pool_forward(const AvgPoolForward& args, const Team& team) {
  if (elements(args.geometry, args.geometry.out) == 0) return;
  const Pool pool = make_pool(args.geometry, args.layout);
  with_dtype(args.dtype, [&](auto type) {
    using S = decltype(type);
    const AvgPool<S> op = {static_cast<S*>(args.y), args.count_include_pad, args.divisor_override};
    pool_forward<S>(pool, args.layout, args.x, op, team);
  });
}

void avg_pool_backward(const AvgPoolBackward& args, const Team& team) {
  if (elements(args.geometry, args.geometry.in) == 0) return;
  const Pool pool = make_pool(args.geometry, args.layout);
  with_dtype(args.dtype, [&](auto type) {
    using S = decltype(type);
    pool_backward<S>(pool, args.layout, args.grad_y, args.grad_x,
                     AvgRoute<S>{args.count_include_pad, args.divisor_override}, team);
  });
}

KernelName max_pool_forward_name(const MaxPoolForward& args) {
  return pool_name(args.dtype, args.layout, args.geometry, args.kind != PoolIndices::none);
}
KernelName max_pool_backward_name(const MaxPoolBackward& args) {
  return pool_backward_name(args.dtype, args.layout, args.geometry, false, args.kind == PoolIndices::window);
}
KernelName avg_pool_forward_name(const AvgPoolForward& args) {
  return pool_name(args.dtype, args.layout, args.geometry, false);
}
KernelName avg_pool_backward_name(const AvgPoolBackward& args) {
  return pool_backward_name(args.dtype, args.layout, args.geometry, true, false);
}
