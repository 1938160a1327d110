// The ops of a graph: what each does with a node's arguments. docs/light-runtime.md has the table of all.
#pragma once

#include <string_view>

#include "program.h"

namespace fastops::runtime {

// Adds a node's steps to a program; returns its value. It checks all that the kernels take for granted.
using OpBuilder = View (*)(Builder&);

// Null if there is none of this name.
OpBuilder find_op(std::string_view name);

// One table for each file.
struct OpEntry {
  const char* name;
  OpBuilder builder;
};
struct OpTable {
  const OpEntry* first;
  size_t count;
};
extern const OpTable layer_ops, pool_ops, norm_ops, shape_ops, element_ops, quantized_ops;

// ---- steps that several ops need

void copy(Builder& b, const View& from, const View& to);  // of the same shape
// f(y + residual) into memory of its own. The residual may be broadcast.
View add_and_activate(Builder& b, const View& y, const View& residual, Activation f);
View activate(Builder& b, const View& x, Activation f);
// Of a convolution of images of `dims` dimensions. ints: dims, groups, w_layout, then for each dimension stride,
// padding before, padding after, dilation
ConvGeometry geometry_of(Builder& b, const View& x, const View& w, int dims);
// As a matrix: all dimensions but the last one are rows, whose elements are contiguous.
struct Rows {
  View view;
  int64_t rows, size, stride;
};
Rows rows_of(Builder& b, const View& view);
// (batch, channels, *the last `dims` of spatial).
Shape image_shape(int64_t batch, int64_t channels, const int64_t (&spatial)[3], int dims);

}  // namespace fastops::runtime
