// Pools.
#include <iterator>

#include "ops.h"

namespace fastops::runtime {
namespace {

// Windows of one element of an image of one: what a dimension that x does not have is.
PoolGeometry one_window(const View& x, bool adaptive) {
  return {.batch = x.shape[0],
          .channels = x.shape[1],
          .in = {1, 1, 1},
          .out = {1, 1, 1},
          .kernel = {1, 1, 1},
          .stride = {1, 1, 1},
          .padding = {0, 0, 0},
          .dilation = {1, 1, 1},
          .adaptive = adaptive};
}

// ints: dims, then for each dimension kernel, stride, padding, dilation (max pools), ceil_mode
PoolGeometry windows_of(Builder& b, const View& x, int dims, bool with_dilation) {
  PoolGeometry g = one_window(x, /*adaptive=*/false);
  const auto n = static_cast<size_t>(dims);
  const bool ceil = b.integer(1 + (with_dilation ? 4 : 3) * n, 0, 1) != 0;
  Shape padded = x.shape;
  for (size_t i = 0; i < n; ++i) {
    const size_t at = 3 - n + i;
    g.in[at] = x.shape[2 + static_cast<int>(i)];
    g.kernel[at] = b.integer(1 + i, 1);
    g.stride[at] = b.integer(1 + n + i, 1);
    g.padding[at] = b.integer(1 + 2 * n + i, 0, g.kernel[at] / 2);
    if (with_dilation) g.dilation[at] = b.integer(1 + 3 * n + i, 1);
    const int64_t room = g.in[at] + 2 * g.padding[at] - g.dilation[at] * (g.kernel[at] - 1) - 1;
    b.require(g.in[at] >= 1 && g.in[at] < kMostAttribute && room >= 0, "its windows do not fit an input of shape ",
              x.shape);
    g.out[at] = (room + (ceil ? g.stride[at] - 1 : 0)) / g.stride[at] + 1;
    // The last window has to start inside.
    if (ceil && (g.out[at] - 1) * g.stride[at] >= g.in[at] + g.padding[at]) --g.out[at];
    padded.dims[2 + i] = g.in[at] + 2 * g.padding[at];
  }
  padded.elements();
  return g;
}

// ints: dims, then the size for each dimension, -1: as the input's
PoolGeometry adaptive_windows_of(Builder& b, const View& x, int dims) {
  PoolGeometry g = one_window(x, /*adaptive=*/true);
  for (int i = 0; i < dims; ++i) {
    const int at = 3 - dims + i;
    g.in[at] = x.shape[2 + i];
    const int64_t size = b.integer(static_cast<size_t>(1 + i), -1);
    g.out[at] = size < 0 ? g.in[at] : size;
    b.require(g.in[at] >= 1 && g.in[at] < kMostAttribute, "an input of shape ", x.shape, " has no elements to pool");
  }
  return g;
}

template <class Call, class Make>
View pool(Builder& b, bool adaptive, bool with_dilation, Make make) {
  const int dims = static_cast<int>(b.integer(0, 1, 3));
  const View input = b.input(0);
  b.require(input.shape.rank == dims + 2, "its input has to have ", dims + 2, " dimensions, got shape ", input.shape);
  const Layout layout = layout_of(input);
  const View x = b.dense(input, layout);
  const PoolGeometry g = adaptive ? adaptive_windows_of(b, x, dims) : windows_of(b, x, dims, with_dilation);
  const View y = b.make(x.type, image_shape(g.batch, g.channels, g.out, dims), layout);
  if (y.shape.elements() == 0) return y;
  b.kernel(make(dtype_of(x), layout, g, dims), {x, y},
           [=](const Run& run) { return typename Call::Pointers{.x = run.at(x), .y = run.at(y)}; });
  return y;
}

// The same of levels: the image is channels last, and so is what becomes of it.
View pool_int8(Builder& b, const PoolGeometry& g, const View& x, Element type, PoolInt8Forward call) {
  const View y = b.make(type, image_shape(g.batch, g.channels, g.out, 2), Layout::channels_last);
  if (y.shape.elements() == 0) return y;
  call.geometry = g;
  call.float_y = type != Element::u8;
  call.dtype = call.float_y ? dtype_of(y) : DType::f32;
  b.kernel(call, {x, y}, [=](const Run& run) {
    return PoolInt8Forward::Pointers{static_cast<const uint8_t*>(run.at(x)), run.at(y)};
  });
  return y;
}

View levels_of(Builder& b) {
  const View& input = b.input(0);
  b.require(input.type == Element::u8 && input.shape.rank == 4 && b.integer(0) == 2,
            "its input has to be images of uint8, got ", name_of(input.type), " of shape ", input.shape);
  return b.dense(input, Layout::channels_last);
}

// ints after those of the windows: the element type of the average, the zero point of x; floats: factor, offset (see
// pool_int8.h)
View average_levels(Builder& b, const PoolGeometry& g, const View& x, size_t after, PoolInt8Forward call) {
  b.require(sums_fit(g), "its windows have more than 2^23 elements");
  call.average = true;
  call.zero = static_cast<int>(b.integer(after + 1, 0, 255));
  call.factor = static_cast<float>(b.number(0));
  call.offset = static_cast<float>(b.number(1));
  return pool_int8(b, g, x, static_cast<Element>(b.integer(after, 0, kElements - 1)), call);
}

View avg_pool_int8(Builder& b) {
  const View x = levels_of(b);
  const PoolGeometry g = windows_of(b, x, 2, false);
  return average_levels(b, g, x, 10,
                        {.geometry = {},
                         .count_include_pad = b.integer(8, 0, 1) != 0,
                         .divisor_override = b.integer(9, -kMostAttribute)});
}
View adaptive_avg_pool_int8(Builder& b) {
  const View x = levels_of(b);
  return average_levels(b, adaptive_windows_of(b, x, 2), x, 3, {.geometry = {}});
}

// Of floats or of levels.
View max_pool(Builder& b) {
  if (b.input(0).type == Element::u8) {
    const View x = levels_of(b);
    return pool_int8(b, windows_of(b, x, 2, true), x, Element::u8, {.geometry = {}});
  }
  return pool<MaxPoolForward>(b, false, true, [](DType dtype, Layout layout, const PoolGeometry& g, int) {
    return MaxPoolForward{dtype, layout, g, PoolIndices::none};
  });
}
View adaptive_max_pool(Builder& b) {
  return pool<MaxPoolForward>(b, true, true, [](DType dtype, Layout layout, const PoolGeometry& g, int) {
    return MaxPoolForward{dtype, layout, g, PoolIndices::none};
  });
}
// ... and ints: count_include_pad, divisor_override (0: none)
View avg_pool(Builder& b) {
  return pool<AvgPoolForward>(b, false, false, [&](DType dtype, Layout layout, const PoolGeometry& g, int dims) {
    const auto after = static_cast<size_t>(2 + 3 * dims);
    return AvgPoolForward{dtype, layout, g, b.integer(after, 0, 1) != 0, b.integer(after + 1, -kMostAttribute)};
  });
}
View adaptive_avg_pool(Builder& b) {
  return pool<AvgPoolForward>(b, true, false, [](DType dtype, Layout layout, const PoolGeometry& g, int) {
    return AvgPoolForward{dtype, layout, g, true, 0};
  });
}

constexpr OpEntry kPoolOps[] = {{"max_pool", max_pool},
                                {"avg_pool", avg_pool},
                                {"avg_pool_int8", avg_pool_int8},
                                {"adaptive_avg_pool_int8", adaptive_avg_pool_int8},
                                {"adaptive_max_pool", adaptive_max_pool},
                                {"adaptive_avg_pool", adaptive_avg_pool}};

}  // namespace

const OpTable pool_ops{kPoolOps, std::size(kPoolOps)};

}  // namespace fastops::runtime
