// Layers whose weights are integers, numbers of 8 bits, or sparse.
#include <cmath>

#include "ops.h"

namespace fastops::runtime {
namespace {

struct Operands {
  Rows x;
  View y;
  const void* bias;
};

// x (*, k) -> y (*, n), with a bias (n) as argument `bias`.
Operands operands_of(Builder& b, int64_t k, int64_t n, size_t bias) {
  const View input = b.input(0);
  b.require(input.shape.rank >= 1 && input.shape[input.shape.rank - 1] == k, "its input has to have ", k,
            " features, got shape ", input.shape);
  const void* bias_data = nullptr;
  if (b.has(bias)) {
    const View view = b.weight(bias, input.type, 1);
    b.require(view.shape[0] == n, "its bias has to have ", n, " elements, got shape ", view.shape);
    bias_data = b.data(view);
  }
  Shape shape = input.shape;
  shape.dims[shape.rank - 1] = n;
  return {rows_of(b, input), b.make(input.type, shape), bias_data};
}

// x (*, k), w (n, k) of int8, scale (n), bias (n)?; texts: activation; floats: a, b
View linear_int8(Builder& b) {
  const View w = b.weight(1, Element::i8, 2), scale = b.weight(2, Element::f32, 1);
  const int64_t n = w.shape[0], k = w.shape[1];
  b.require(k <= kMostInt8Features && scale.shape[0] == n, "weights ", w.shape, " and ", scale.shape[0],
            " scales do not fit");
  const auto [x, y, bias] = operands_of(b, k, n, 3);
  if (y.shape.elements() == 0) return y;
  const LinearInt8Forward call{.dtype = dtype_of(y),
                               .m = x.rows,
                               .n = n,
                               .k = k,
                               .x_row_stride = x.stride,
                               .w_row_stride = k,
                               .y_row_stride = n,
                               .with_bias = bias != nullptr,
                               .activation = b.activation(),
                               .packed_w = true};
  const auto plan = b.plan(call);
  b.require(plan != nullptr, "this processor has no kernel for it");
  const void* const packed = b.pack(*plan, b.data(w));
  const auto* const scales = static_cast<const float*>(b.data(scale));
  b.kernel(plan, {x.view, y}, [=, x = x.view, y = y, bias = bias](const Run& run) {
    return LinearInt8Forward::Pointers{run.at(x), packed, scales, bias, run.at(y)};
  });
  return y;
}

// ---- levels

// ints from `at` on: the element type of y (uint8: levels), then x_zero, y_low, y_high; texts: activation; floats: a,
// b, the scale of x, y_factor, y_offset, residual_scale (see conv_int8.h). y is there and empties are dealt with.
struct Int8Layer {
  View x, w, y;
  int64_t products;  // of a sum
};

View run_int8_layer(Builder& b, const Int8Layer& layer, ConvInt8Forward call, size_t at) {
  const auto& [x, w, y, products] = layer;
  const int64_t n = call.geometry.out_channels;
  const View multiplier = b.weight(2, Element::f32, 1), offset = b.weight(3, Element::f32, 1);
  b.require(products <= kMostInt8Products && multiplier.shape[0] == n && offset.shape[0] == n, "weights ", w.shape,
            ", ", multiplier.shape[0], " multipliers and ", offset.shape[0], " offsets do not fit");
  const auto scale = static_cast<float>(b.number(2));
  b.require(scale > 0 && std::isfinite(scale), "the scale of its input has to be positive and finite, got ", scale);
  View residual{};
  if (b.has(4)) {
    residual = b.dense(b.input(4), y.shape.rank == 4 ? Layout::channels_last : Layout::channels_first);
    b.require(residual.type == Element::u8 && residual.shape == y.shape, "what it adds has to be uint8 of shape ",
              y.shape, ", got ", name_of(residual.type), " of shape ", residual.shape);
  }
  call.float_x = x.type != Element::u8;
  call.float_y = y.type != Element::u8;
  call.dtype = call.float_y ? dtype_of(y) : call.float_x ? dtype_of(x) : DType::f32;
  b.require(!call.float_x || dtype_of(x) == call.dtype, "it cannot make ", name_of(y.type), " of ", name_of(x.type));
  call.x_zero = static_cast<int>(b.integer(at + 1, 0, 255));
  call.x_inverse = 1 / scale;
  call.with_residual = b.has(4);
  call.residual_scale = static_cast<float>(b.number(5));
  call.activation = b.activation();
  call.y_factor = static_cast<float>(b.number(3));
  call.y_offset = static_cast<float>(b.number(4));
  call.y_low = static_cast<int>(b.integer(at + 2, 0, 255));
  call.y_high = static_cast<int>(b.integer(at + 3, 0, 255));
  call.packed_w = true;
  if (y.shape.elements() == 0) return y;
  const auto plan = b.plan(call);
  b.require(plan != nullptr, "this processor has no kernel for it");
  const void* const packed = b.pack(*plan, b.data(w));
  const auto* const multipliers = static_cast<const float*>(b.data(multiplier));
  const auto* const offsets = static_cast<const float*>(b.data(offset));
  const bool adds = call.with_residual;
  const auto pointers = [=, x = x, y = y](const Run& run) {
    const auto* const added = adds ? static_cast<const uint8_t*>(run.at(residual)) : nullptr;
    return ConvInt8Forward::Pointers{run.at(x), packed, multipliers, offsets, added, run.at(y)};
  };
  if (adds)
    b.kernel(plan, {x, y, residual}, pointers);
  else
    b.kernel(plan, {x, y}, pointers);
  return y;
}

Element result_type(Builder& b, size_t at) { return static_cast<Element>(b.integer(at, 0, kElements - 1)); }

// x (batch, channels, height, width) of floats or levels, w (out, channels / groups, *kernel) of int8, which lies as
// [out, kernel, channels], multiplier and offset (out), residual? of levels; ints: as conv, then as above
View conv_int8(Builder& b) {
  const View input = b.input(0), w = b.weight(1, Element::i8, 4);
  b.require(input.shape.rank == 4 && b.integer(0) == 2 && b.integer(2) == 1, "its input has to have 4 dimensions, got ",
            input.shape);
  const Layout layout = input.type == Element::u8 ? Layout::channels_last : layout_of(input);
  const View x = b.dense(input, layout);
  ConvInt8Forward call{.geometry = geometry_of(b, x, w, 2)};
  call.x_layout = layout;
  const ConvGeometry& g = call.geometry;
  const View y = b.make(result_type(b, 11), image_shape(g.batch, g.out_channels, g.out, 2), Layout::channels_last);
  return run_int8_layer(b, {x, w, y, w.shape[1] * w.shape[2] * w.shape[3]}, call, 11);
}

// x (*, k), w (n, k) of int8, and all else as conv_int8
View linear_int8_static(Builder& b) {
  const View x = b.dense(b.input(0)), w = b.weight(1, Element::i8, 2);
  const int64_t n = w.shape[0], k = w.shape[1];
  b.require(x.shape.rank >= 1 && x.shape[x.shape.rank - 1] == k, "its input has to have ", k, " features, got shape ",
            x.shape);
  Shape shape = x.shape;
  shape.dims[shape.rank - 1] = n;
  const View y = b.make(result_type(b, 0), shape);
  const int64_t rows = n == 0 ? 0 : shape.elements() / n;
  const ConvInt8Forward call{.geometry = {rows, k, n, 1, {1, 1, 1}, {1, 1, 1}, {1, 1, 1}, {1, 1, 1}, {}, {1, 1, 1}}};
  return run_int8_layer(b, {x, w, y, k}, call, 0);
}

// x (*, k), w (n, bytes of a row) of int8, uint8 (with two weights a byte) or float8, scale and offset? (n, groups),
// bias (n)?; ints: bits, group, k; texts: activation; floats: a, b
View linear_weight_only(Builder& b) {
  const int64_t bits = b.integer(0, 4, 8), group = b.integer(1, 1), k = b.integer(2, 0);
  b.require(bits == 4 || bits == 8, "weights of ", bits, " bits are not known");
  const bool is_float8 = b.input(1).type == Element::f8;
  const View w = b.weight(1, bits == 4 ? Element::u8 : is_float8 ? Element::f8 : Element::i8, 2);
  const View scale = b.weight(2, Element::f32, 2);
  const int64_t n = w.shape[0], groups = (k + group - 1) / group;
  b.require(w.shape[1] == (k * bits + 7) / 8, "weights ", w.shape, " have no rows of ", k, " weights");
  b.require(group >= k || (!is_float8 && group >= 16 && (group & (group - 1)) == 0), "groups of ", group,
            " are not known");
  const Shape parameters{2, {n, groups}};
  b.require(scale.shape == parameters, "its scales have to have shape ", parameters, ", got ", scale.shape);
  const auto* const scales = static_cast<const float*>(b.data(scale));
  const float* offsets = nullptr;
  if (b.has(3)) {
    const View offset = b.weight(3, Element::f32, 2);
    b.require(offset.shape == parameters, "its offsets have to have shape ", parameters, ", got ", offset.shape);
    offsets = static_cast<const float*>(b.data(offset));
  }
  const auto [x, y, bias] = operands_of(b, k, n, 4);
  if (y.shape.elements() == 0) return y;
  const WeightOnlyForward call{.dtype = dtype_of(y),
                               .format = bits == 4   ? WeightFormat::uint4
                                         : is_float8 ? WeightFormat::float8
                                                     : WeightFormat::int8,
                               .m = x.rows,
                               .n = n,
                               .k = k,
                               .group = group,
                               .x_row_stride = x.stride,
                               .w_row_stride = w.shape[1],
                               .y_row_stride = n,
                               .with_offset = offsets != nullptr,
                               .with_bias = bias != nullptr,
                               .activation = b.activation()};
  b.kernel(call, {x.view, y}, [=, x = x.view, y = y, bias = bias, w = b.data(w)](const Run& run) {
    return WeightOnlyForward::Pointers{run.at(x), w, scales, offsets, bias, run.at(y)};
  });
  return y;
}

// The indices of a sparse weight's blocks ascend in each row, from 0 on and below `columns`.
void check_indices(const Builder& b, const int32_t* crow, int64_t rows, const int32_t* col, int64_t blocks,
                   int64_t columns) {
  b.require(crow[0] == 0 && crow[rows] == blocks, "its rows do not have all of ", blocks, " blocks");
  for (int64_t i = 0; i < rows; ++i) {
    b.require(crow[i] <= crow[i + 1] && crow[i + 1] <= blocks, "its rows' blocks do not ascend");
    for (int64_t j = crow[i]; j < crow[i + 1]; ++j)
      b.require(col[j] >= 0 && col[j] < columns && (j == crow[i] || col[j - 1] < col[j]), "its columns do not ascend");
  }
}

// x (*, k), or images (batch, k, height, width) of a 1 x 1 convolution; crow and col of int32, values (blocks, rows,
// columns) or (blocks), bias (n)?; ints: n, k, rows and columns of a block, whether images; texts: activation; floats:
// a, b
View sparse_linear(Builder& b) {
  const int64_t n = b.integer(0), k = b.integer(1), rows = b.integer(2, 1, 16), cols = b.integer(3, 1, 4);
  const bool images = b.integer(4, 0, 1) != 0;
  b.require((rows == 1 && (cols == 1 || cols == 4)) || (rows == 4 && cols == 4) || (rows == 16 && cols == 1),
            "blocks of ", rows, " x ", cols, " are not known");
  const View crow = b.weight(1, Element::i32, 1), col = b.weight(2, Element::i32, 1), v = b.weight(3, Element::f32);
  const int64_t blocks = col.shape[0], rows_of_blocks = (n + rows - 1) / rows;
  b.require(blocks <= INT32_MAX && crow.shape[0] == rows_of_blocks + 1 && v.shape.elements() == blocks * rows * cols,
            "values ", v.shape, ", ", blocks, " columns and ", crow.shape[0], " rows do not fit");
  const auto* const starts = static_cast<const int32_t*>(b.data(crow));
  const auto* const columns = static_cast<const int32_t*>(b.data(col));
  check_indices(b, starts, rows_of_blocks, columns, blocks, (k + cols - 1) / cols);
  const SparsePointers sparse{starts, columns, static_cast<const float*>(b.data(v))};

  SparseLinearForward call{};
  call.images = 1;
  call.weight = {n, k, blocks, static_cast<int>(rows), static_cast<int>(cols), 4};
  call.activation = b.activation();
  View x, y;
  const void* bias = nullptr;
  if (!images) {
    const Operands operands = operands_of(b, k, n, 4);
    x = operands.x.view, y = operands.y, bias = operands.bias;
    call.m = operands.x.rows;
    call.x_strides = {operands.x.stride, 1};
    call.y_strides = {n, 1};
  } else {
    const Layout layout = layout_of(b.input(0));
    x = b.dense(b.input(0), layout);
    b.require(x.shape.rank == 4 && x.shape[1] == k, "its images have to have ", k, " channels, got shape ", x.shape);
    if (b.has(4)) {
      const View view = b.weight(4, x.type, 1);
      b.require(view.shape[0] == n, "its bias has to have ", n, " elements, got shape ", view.shape);
      bias = b.data(view);
    }
    Shape shape = x.shape;
    shape.dims[1] = n;
    y = b.make(x.type, shape, layout);
    const int64_t pixels = shape[2] * shape[3];
    const bool channels_first = layout == Layout::channels_first;
    call.images = channels_first ? shape[0] : 1;
    call.m = channels_first ? pixels : shape[0] * pixels;
    call.x_strides = channels_first ? Strides{1, pixels} : Strides{k, 1};
    call.y_strides = channels_first ? Strides{1, pixels} : Strides{n, 1};
    call.x_image_stride = k * pixels;
    call.y_image_stride = n * pixels;
  }
  if (y.shape.elements() == 0) return y;
  call.dtype = dtype_of(y);
  call.with_bias = bias != nullptr;
  b.kernel(call, {x, y},
           [=](const Run& run) { return SparseLinearForward::Pointers{run.at(x), sparse, bias, run.at(y)}; });
  return y;
}

constexpr OpEntry kQuantizedOps[] = {{"linear_int8", linear_int8},
                                     {"linear_weight_only", linear_weight_only},
                                     {"sparse_linear", sparse_linear},
                                     {"conv_int8", conv_int8},
                                     {"linear_int8_static", linear_int8_static}};

}  // namespace

const OpTable quantized_ops{kQuantizedOps, std::size(kQuantizedOps)};

}  // namespace fastops::runtime
