#include "pool.cuh"

#include "../../common/cuda/launch.h"
#include "../../common/cuda/launchers.h"

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

// body(S{}, shape, count), with the storage type, and the shape in int or int64_t.
template <class Args, class Body>
Status with_types(const Args& args, int64_t count, Body&& body) {
  return with_dtype(args.dtype, [&](auto type) {
    if (fits_int(args.geometry)) return body(type, shape_of<int>(args.geometry, args.layout), static_cast<int>(count));
    return body(type, shape_of<int64_t>(args.geometry, args.layout), count);
  });
}

// One thread per element.
Launch for_elements(const char* name, int64_t count, Stream stream) {
  return {{name}, (count + kPoolThreads - 1) / kPoolThreads, kPoolThreads, 0, stream};
}

}  // namespace

Status max_pool_forward(const MaxPoolForward& args, Stream stream) {
  return with_types(args, elements(args.geometry, args.geometry.out), [&](auto type, auto shape, auto count) {
    using S = decltype(type);
    return launch(for_elements("max_pool_forward", count, stream), max_pool_forward_kernel<S, decltype(count)>, shape,
                  count, static_cast<const S*>(args.x), static_cast<S*>(args.y), args.kind, args.indices);
  });
}
Status max_pool_backward(const MaxPoolBackward& args, Stream stream) {
  return with_types(args, elements(args.geometry, args.geometry.in), [&](auto type, auto shape, auto count) {
    using S = decltype(type);
    return launch(for_elements("max_pool_backward", count, stream), max_pool_backward_kernel<S, decltype(count)>, shape,
                  count, static_cast<const S*>(args.grad_y), args.kind, args.indices, static_cast<S*>(args.grad_x));
  });
}
Status avg_pool_forward(const AvgPoolForward& args, Stream stream) {
  return with_types(args, elements(args.geometry, args.geometry.out), [&](auto type, auto shape, auto count) {
    using S = decltype(type);
    return launch(for_elements("avg_pool_forward", count, stream), avg_pool_forward_kernel<S, decltype(count)>, shape,
                  count, static_cast<const S*>(args.x), static_cast<S*>(args.y),
                  PoolDivisor{args.count_include_pad, args.divisor_override});
  });
}
Status avg_pool_backward(const AvgPoolBackward& args, Stream stream) {
  return with_types(args, elements(args.geometry, args.geometry.in), [&](auto type, auto shape, auto count) {
    using S = decltype(type);
    return launch(for_elements("avg_pool_backward", count, stream), avg_pool_backward_kernel<S, decltype(count)>, shape,
                  count, static_cast<const S*>(args.grad_y), static_cast<S*>(args.grad_x),
                  PoolDivisor{args.count_include_pad, args.divisor_override});
  });
}

}  // namespace fastops::cuda
