// What changes shapes: most of it moves no element.
#include <algorithm>

#include "ops.h"

namespace fastops::runtime {
namespace {

// A size of a node: two integers, `size` and whether it is multiplied by the first size of the graph's first input.
// -1 is what is left, if `infer`.
int64_t size_at(Builder& b, size_t i, bool infer) {
  const int64_t size = b.integer(2 * i, infer ? -1 : 0);
  if (b.integer(2 * i + 1, 0, 1) == 0) return size;
  b.require(size >= 0, "no size can be -1 times the batch");
  const int64_t batch = b.batch();
  b.require(size == 0 || batch <= kMostElements / size, "size ", size, " times the batch is too large");
  return size * batch;
}

Shape shape_at(Builder& b, bool infer) {
  const size_t rank = b.node().ints.size() / 2;
  b.require(b.node().ints.size() % 2 == 0 && rank <= kMostDims, "it has ", b.node().ints.size(), " integers");
  Shape shape{.rank = static_cast<int>(rank)};
  for (size_t i = 0; i < rank; ++i) shape.dims[i] = size_at(b, i, infer);
  return shape;
}

// Whether a view of `shape` has the elements of `from` in their order without a copy; then `to` has its strides.
// Source: at::detail::computeStride.
bool strides_for(const View& from, View& to) {
  int dim = to.shape.rank - 1;
  int64_t elements = 1, wanted = 1;
  int64_t step = from.shape.rank > 0 ? from.strides[from.shape.rank - 1] : 1;
  for (int i = from.shape.rank - 1; i >= 0; --i) {
    elements *= from.shape[i];
    if (i > 0 && (from.shape[i - 1] == 1 || from.strides[i - 1] == elements * step)) continue;
    for (; dim >= 0 && (wanted < elements || to.shape[dim] == 1); --dim) {
      to.strides[dim] = wanted * step;
      wanted *= to.shape[dim];
    }
    if (wanted != elements) return false;
    if (i > 0) {
      step = from.strides[i - 1];
      elements = wanted = 1;
    }
  }
  for (; dim >= 0; --dim) to.strides[dim] = 1;
  return true;
}

View with_shape(Builder& b, const View& x, const Shape& shape) {
  View y = x;
  y.shape = shape;
  if (x.shape.elements() == 0) return b.make(x.type, shape);
  if (strides_for(x, y)) return y;
  y = b.dense(x);
  const View from = y;
  y.shape = shape;
  strides_for(from, y);
  return y;
}

// x; ints: two for each size
View reshape(Builder& b) {
  const View x = b.input(0);
  Shape shape = shape_at(b, true);
  const int64_t elements = x.shape.elements();
  int free = -1;
  int64_t others = 1;
  for (int i = 0; i < shape.rank; ++i) {
    if (shape[i] >= 0) {
      b.require(!__builtin_mul_overflow(others, shape[i], &others), "a tensor cannot have shape ", shape);
      continue;
    }
    b.require(free < 0, "only one size may be -1");
    free = i;
  }
  if (free >= 0) {
    b.require(others > 0 && elements % others == 0, "shape ", x.shape, " does not fit ", shape);
    shape.dims[free] = elements / others;
  }
  b.require(shape.elements() == elements, "shape ", x.shape, " does not fit ", shape);
  return with_shape(b, x, shape);
}

// x; ints: the first and the last dimension that become one
View flatten(Builder& b) {
  const View x = b.input(0);
  const int rank = x.shape.rank;
  b.require(rank >= 1, "its input has no dimensions");
  const auto first = static_cast<int>(b.integer(0, -rank, rank - 1)),
             last = static_cast<int>(b.integer(1, -rank, rank - 1));
  const int from = first < 0 ? first + rank : first, to = last < 0 ? last + rank : last;
  b.require(from <= to, "it cannot flatten dimensions ", from, " to ", to);
  Shape shape{.rank = rank - (to - from)};
  for (int i = 0; i < from; ++i) shape.dims[i] = x.shape[i];
  shape.dims[from] = 1;
  for (int i = from; i <= to; ++i) shape.dims[from] *= x.shape[i];
  for (int i = to + 1; i < rank; ++i) shape.dims[i - (to - from)] = x.shape[i];
  return with_shape(b, x, shape);
}

// x; ints: which dimension of x each one is
View permute(Builder& b) {
  const View x = b.input(0);
  View y = x;
  b.require(b.node().ints.size() == static_cast<size_t>(x.shape.rank), "it permutes ", b.node().ints.size(),
            " dimensions, got shape ", x.shape);
  unsigned seen = 0;
  for (int i = 0; i < x.shape.rank; ++i) {
    const auto from = static_cast<int>(b.integer(static_cast<size_t>(i), 0, x.shape.rank - 1));
    y.shape.dims[i] = x.shape[from];
    y.strides[i] = x.strides[from];
    seen |= 1u << from;
  }
  b.require(seen == (1u << x.shape.rank) - 1, "it does not name every dimension once");
  return y;
}

int dim_of(Builder& b, size_t i, const View& x) {
  b.require(x.shape.rank >= 1, "its input has no dimensions");
  return static_cast<int>(b.integer(i, 0, x.shape.rank - 1));
}

// x; ints: the dimension, the first element, how many, the step
View slice(Builder& b) {
  View x = b.input(0);
  const int dim = dim_of(b, 0, x);
  const int64_t first = b.integer(1), count = b.integer(2), step = b.integer(3, 1);
  b.require(
      count == 0 ? first <= x.shape[dim] : first < x.shape[dim] && (count - 1) <= (x.shape[dim] - 1 - first) / step,
      "it takes ", count, " elements of a dimension of shape ", x.shape);
  x.offset += count == 0 ? 0 : first * x.strides[dim];
  x.shape.dims[dim] = count;
  if (count > 1) x.strides[dim] *= step;
  return x;
}

// x; ints: the dimension, the element
View select(Builder& b) {
  View x = b.input(0);
  const int dim = dim_of(b, 0, x);
  const int64_t at = b.integer(1);
  b.require(at < x.shape[dim], "there is no element ", at, " in shape ", x.shape);
  x.offset += at * x.strides[dim];
  remove_dim(x, dim);
  return x;
}

// x; ints: two for each size. Sizes of 1 become others, and dimensions may come in front.
View expand(Builder& b) {
  View x = b.input(0);
  const Shape shape = shape_at(b, false);
  b.require(shape.rank >= x.shape.rank, "shape ", x.shape, " has more dimensions than ", shape);
  while (x.shape.rank < shape.rank) insert_dim(x, 0, 1, 0);
  for (int i = 0; i < shape.rank; ++i) {
    b.require(x.shape[i] == shape[i] || x.shape[i] == 1, "shape ", x.shape, " cannot become ", shape);
    if (x.shape[i] != shape[i]) x.strides[i] = 0;
  }
  x.shape = shape;
  x.shape.elements();
  return x;
}

// Tensors that differ in one dimension; ints: that one
View cat(Builder& b) {
  const View first = b.input(0);
  const int dim = dim_of(b, 0, first);
  Shape shape = first.shape;
  for (size_t i = 1; i < b.node().inputs.size(); ++i) {
    Shape like = b.input(i).shape;
    b.require(like.rank == shape.rank && b.input(i).type == first.type, "shapes ", shape, " and ", like, " do not fit");
    shape.dims[dim] += like[dim];
    like.dims[dim] = shape[dim];
    b.require(like == shape, "shapes ", shape, " and ", b.input(i).shape, " do not fit");
  }
  const View y = b.make(first.type, shape, layout_of(first));
  View part = y;
  for (size_t i = 0; i < b.node().inputs.size(); ++i) {
    const View x = b.input(i);
    part.shape = x.shape;
    copy(b, x, part);
    part.offset += x.shape[dim] * y.strides[dim];
  }
  return y;
}

// x; ints: the element type
View cast(Builder& b) {
  const View x = b.input(0);
  const auto type = static_cast<Element>(b.integer(0, 0, kElements - 1));
  if (type == x.type) return x;
  const Layout layout = layout_of(x);
  const View y = b.make(type, x.shape, layout);
  copy(b, x, y);
  return y;
}

constexpr OpEntry kShapeOps[] = {{"reshape", reshape}, {"flatten", flatten}, {"permute", permute}, {"slice", slice},
                                 {"select", select},   {"expand", expand},   {"cat", cat},         {"cast", cast}};

}  // namespace

const OpTable shape_ops{kShapeOps, std::size(kShapeOps)};

}  // namespace fastops::runtime
