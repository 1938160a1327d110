#include "pool.cuh"

#include "../../common/cuda/launch.h"
#include "../../common/cuda/planners.h"

namespace fastops::cuda {
namespace {

int64_t elements(const PoolGeometry& g, const int64_t (&size)[3]) {
  return g.batch * g.channels * size[0] * size[1] * size[2];
}

// Whether every index, and every intermediate product and sum, fits into an int.
bool fits_int(const PoolGeometry& g) {
  constexpr int64_t limit = int64_t{1} << 30;
  bool fits = elements(g, g.in) < limit && elements(g, g.out) < limit;
  for (int i = 0; i < 3; ++i) {
    fits = fits && (g.in[i] + 1) * (g.out[i] + 1) < limit;
    if (!g.adaptive)
      fits = fits && g.out[i] * g.stride[i] < limit && g.kernel[i] * g.dilation[i] < limit && g.padding[i] < limit;
  }
  return fits;
}

template <class I>
PoolShape<I> shape_of(const PoolGeometry& g, Layout layout) {
  PoolShape<I> shape{};
  shape.channels = static_cast<I>(g.channels);
  for (int i = 0; i < 3; ++i) {
    shape.in[i] = static_cast<I>(g.in[i]);
    shape.out[i] = static_cast<I>(g.out[i]);
    shape.kernel[i] = static_cast<I>(g.kernel[i]);
    shape.stride[i] = static_cast<I>(g.stride[i]);
    shape.padding[i] = static_cast<I>(g.padding[i]);
    shape.dilation[i] = static_cast<I>(g.dilation[i]);
    shape.box[i] = static_cast<I>(pool_box(g, i));
  }
  shape.adaptive = g.adaptive;
  shape.channels_last = layout == Layout::channels_last;
  return shape;
}

// One thread per element of the result.
template <class I>
struct PoolDecision {
  PoolShape<I> shape;
  I count;

  Launch launch(const char* name, Stream stream) const {
    return {{name}, (int64_t{count} + kPoolThreads - 1) / kPoolThreads, kPoolThreads, 0, stream};
  }
};

// body(call, decision, pointers, stream, S{}) launches the kernel, with the storage type.
template <class Call, class Body>
void plan_pool(Plan<Call>& plan, const int64_t (&size)[3], Body) {
  const PoolGeometry& g = plan.call.geometry;
  const int64_t count = elements(g, size);
  const auto with_index = [&](auto type, auto index) {
    using I = decltype(index);
    decide(plan, {"pool_gather"}, 0, PoolDecision<I>{shape_of<I>(g, plan.call.layout), static_cast<I>(count)},
           [](const Call& call, const PoolDecision<I>& decision, const typename Call::Pointers& p, char*,
              Stream stream) { return Body{}(call, decision, p, stream, decltype(type){}); });
  };
  with_dtype(plan.call.dtype, [&](auto type) {
    if (fits_int(g))
      with_index(type, int{});
    else
      with_index(type, int64_t{});
  });
}

}  // namespace

void plan_call(Plan<MaxPoolForward>& plan) {
  plan_pool(plan, plan.call.geometry.out, [](auto& call, auto& how, auto& p, Stream stream, auto type) {
    using S = decltype(type);
    return launch(how.launch("max_pool_forward", stream), max_pool_forward_kernel<S, decltype(how.count)>, how.shape,
                  how.count, static_cast<const S*>(p.x), static_cast<S*>(p.y), call.kind, p.indices);
  });
}
void plan_call(Plan<MaxPoolBackward>& plan) {
  plan_pool(plan, plan.call.geometry.in, [](auto& call, auto& how, auto& p, Stream stream, auto type) {
    using S = decltype(type);
    return launch(how.launch("max_pool_backward", stream), max_pool_backward_kernel<S, decltype(how.count)>, how.shape,
                  how.count, static_cast<const S*>(p.grad_y), call.kind, p.indices, static_cast<S*>(p.grad_x));
  });
}
void plan_call(Plan<AvgPoolForward>& plan) {
  plan_pool(plan, plan.call.geometry.out, [](auto& call, auto& how, auto& p, Stream stream, auto type) {
    using S = decltype(type);
    return launch(how.launch("avg_pool_forward", stream), avg_pool_forward_kernel<S, decltype(how.count)>, how.shape,
                  how.count, static_cast<const S*>(p.x), static_cast<S*>(p.y),
                  PoolDivisor{call.count_include_pad, call.divisor_override});
  });
}
void plan_call(Plan<AvgPoolBackward>& plan) {
  plan_pool(plan, plan.call.geometry.in, [](auto& call, auto& how, auto& p, Stream stream, auto type) {
    using S = decltype(type);
    return launch(how.launch("avg_pool_backward", stream), avg_pool_backward_kernel<S, decltype(how.count)>, how.shape,
                  how.count, static_cast<const S*>(p.grad_y), static_cast<S*>(p.grad_x),
                  PoolDivisor{call.count_include_pad, call.divisor_override});
  });
}

}  // namespace fastops::cuda
