// Sums, products and copies of tensors of any strides, means, and rows of a table.
#include <algorithm>
#include <cstring>

#include "ops.h"

#define FASTOPS_HOST_FN inline
namespace fastops::runtime {
namespace {
#include "../kernels/common/cpu/crew.inl"
#include "../kernels/common/cpu/threads.inl"
#include "../kernels/common/half.inl"
}  // namespace
}  // namespace fastops::runtime

namespace fastops::runtime {
namespace {

inline float widen(float x) { return x; }
inline void narrow(float x, float* p) { *p = x; }

// f(one of them) for the type of the elements.
template <class F>
void with_floats(Element type, F f) {
  switch (type) {
    case Element::f32:
      return f(float{});
    case Element::bf16:
      return f(bf16_t{});
    case Element::f16:
      return f(f16_t{});
    default:
      fail("tensors of ", name_of(type), " are not computed with");
  }
}

// Loops over tensors of one shape: as few dimensions as the strides of all allow, the innermost one handed on whole.
template <int kTensors>
struct Loops {
  int rank = 0;
  int64_t sizes[kMostDims] = {};
  int64_t strides[kTensors][kMostDims] = {};

  Loops(const Shape& shape, const View* const (&tensors)[kTensors]) {
    // From the outermost to the innermost dimension of the last tensor, which is the one that is written.
    int order[kMostDims], dims = 0;
    for (int i = 0; i < shape.rank; ++i)
      if (shape[i] > 1) order[dims++] = i;
    std::stable_sort(order, order + dims, [&](int i, int j) {
      return tensors[kTensors - 1]->strides[i] > tensors[kTensors - 1]->strides[j];
    });
    const auto join = [&](int outer, int inner) {  // whether they are one dimension
      for (const View* tensor : tensors)
        if (tensor->strides[outer] != tensor->strides[inner] * shape[inner]) return false;
      return true;
    };
    // Channels of an image: rows of three would be as many calls as there are positions.
    if (dims > 1) {
      int &outer = order[dims - 2], &inner = order[dims - 1];
      if (shape[inner] < kShort && shape[inner] < shape[outer] && !join(outer, inner)) std::swap(outer, inner);
    }
    for (int i = 0; i < dims; ++i) {
      const int dim = order[i];
      const bool joined = i > 0 && join(order[i - 1], dim);
      const int at = joined ? rank - 1 : rank++;
      sizes[at] = joined ? sizes[at] * shape[dim] : shape[dim];
      for (int t = 0; t < kTensors; ++t) strides[t][at] = tensors[t]->strides[dim];
    }
    if (rank == 0) sizes[rank++] = 1;
  }

  // row(offsets, count, strides), all in elements, by the members of a team.
  template <class Row>
  void run(const Team& team, Row row) const {
    const int64_t count = sizes[rank - 1], pieces = ceil_div(count, kPiece);
    int64_t units = pieces;
    for (int dim = 0; dim < rank - 1; ++dim) units *= sizes[dim];
    parallel(team, threads_for(team, units / pieces * count, units, kPerThread), [&](Crew& crew) {
      crew.each(units, [&](int64_t unit) {
        const int64_t first = unit % pieces * kPiece;
        int64_t offsets[kTensors], inner[kTensors];
        for (int t = 0; t < kTensors; ++t) {
          inner[t] = strides[t][rank - 1];
          offsets[t] = first * inner[t];
        }
        int64_t outer = unit / pieces;
        for (int dim = rank - 2; dim >= 0; outer /= sizes[dim--])
          for (int t = 0; t < kTensors; ++t) offsets[t] += outer % sizes[dim] * strides[t][dim];
        row(offsets, smaller(kPiece, count - first), inner);
      });
    });
  }

 private:
  static constexpr int64_t kShort = 16;    // an innermost dimension
  static constexpr int64_t kPiece = 8192;  // elements of a unit of work
  // The least number of elements for one more thread: some 10 us.
  static constexpr int64_t kPerThread = 16384;
};

template <class T, class U>
void copy_row(const T* from, U* to, int64_t count, int64_t from_stride, int64_t to_stride) {
  for (int64_t i = 0; i < count; ++i) {
    if constexpr (std::is_same_v<T, U>)
      to[i * to_stride] = from[i * from_stride];
    else
      narrow(widen(from[i * from_stride]), to + i * to_stride);
  }
}

template <class T, class U>
void copy_elements(Builder& b, const View& from, const View& to) {
  const Loops<2> loops(from.shape, {&from, &to});
  b.step({from, to}, [=](const Run& run) {
    const T* const source = static_cast<const T*>(run.at(from));
    U* const target = static_cast<U*>(run.at(to));
    loops.run(run.team, [&](const int64_t* offsets, int64_t count, const int64_t* strides) {
      if (strides[0] == 1 && strides[1] == 1)
        copy_row(source + offsets[0], target + offsets[1], count, 1, 1);
      else
        copy_row(source + offsets[0], target + offsets[1], count, strides[0], strides[1]);
    });
  });
}

struct Sum {
  static float of(float x, float y) { return x + y; }
};
struct Difference {
  static float of(float x, float y) { return x - y; }
};
struct Product {
  static float of(float x, float y) { return x * y; }
};
struct Quotient {
  static float of(float x, float y) { return x / y; }
};

template <class Op, class T>
void row_of(const T* x, const T* y, T* z, int64_t count, int64_t x_stride, int64_t y_stride, int64_t z_stride) {
  for (int64_t i = 0; i < count; ++i) narrow(Op::of(widen(x[i * x_stride]), widen(y[i * y_stride])), z + i * z_stride);
}

// Of two views of the same shape, whose strides may be 0.
template <class Op>
View elementwise(Builder& b, const View& x, const View& y) {
  // In the layout of the one that is not broadcast.
  const auto whole = [](const View& view) {
    for (int i = 0; i < view.shape.rank; ++i)
      if (view.shape[i] > 1 && view.strides[i] == 0) return false;
    return true;
  };
  const View z = b.make(x.type, x.shape, layout_of(whole(x) ? x : y));
  if (z.shape.elements() == 0) return z;
  with_floats(x.type, [&](auto type) {
    using T = decltype(type);
    const Loops<3> loops(x.shape, {&x, &y, &z});
    b.step({x, y, z}, [=](const Run& run) {
      const T* const p = static_cast<const T*>(run.at(x));
      const T* const q = static_cast<const T*>(run.at(y));
      T* const to = static_cast<T*>(run.at(z));
      loops.run(run.team, [&](const int64_t* at, int64_t count, const int64_t* s) {
        if (s[0] == 1 && s[1] == 1 && s[2] == 1)
          row_of<Op>(p + at[0], q + at[1], to + at[2], count, 1, 1, 1);
        else
          row_of<Op>(p + at[0], q + at[1], to + at[2], count, s[0], s[1], s[2]);
      });
    });
  });
  return z;
}

View broadcast_to(const View& view, const Shape& shape) {
  View result = view;
  while (result.shape.rank < shape.rank) insert_dim(result, 0, 1, 0);
  for (int i = 0; i < shape.rank; ++i)
    if (result.shape[i] != shape[i]) result.strides[i] = 0;
  result.shape = shape;
  return result;
}

template <class Op>
View binary(Builder& b, const View& x, const View& y) {
  b.require(x.type == y.type, "its operands are of ", name_of(x.type), " and ", name_of(y.type));
  Shape shape{.rank = std::max(x.shape.rank, y.shape.rank)};
  for (int i = 1; i <= shape.rank; ++i) {
    const int64_t m = i <= x.shape.rank ? x.shape[x.shape.rank - i] : 1;
    const int64_t n = i <= y.shape.rank ? y.shape[y.shape.rank - i] : 1;
    b.require(m == n || m == 1 || n == 1, "shapes ", x.shape, " and ", y.shape, " do not fit");
    shape.dims[shape.rank - i] = m == 1 ? n : m;
  }
  shape.elements();
  return elementwise<Op>(b, broadcast_to(x, shape), broadcast_to(y, shape));
}
template <class Op>
View binary_op(Builder& b) {
  return binary<Op>(b, b.input(0), b.input(1));
}

// x; ints: the dimension, whether it stays, with size 1
View mean(Builder& b) {
  const View x = b.dense(b.input(0));
  b.require(x.shape.rank >= 1, "its input has no dimensions");
  const auto dim = static_cast<int>(b.integer(0, 0, x.shape.rank - 1));
  const bool keep = b.integer(1, 0, 1) != 0;
  int64_t outer = 1, inner = 1;
  for (int i = 0; i < dim; ++i) outer *= x.shape[i];
  for (int i = dim + 1; i < x.shape.rank; ++i) inner *= x.shape[i];
  Shape shape = x.shape;
  shape.dims[dim] = 1;
  const View whole = b.make(x.type, shape);
  View y = whole;
  if (!keep) remove_dim(y, dim);
  if (shape.elements() == 0) return y;
  b.require(x.shape[dim] >= 1, "its input has no elements to average: got shape ", x.shape);
  // An average pool over `dim` of images whose channels are the last.
  const PoolGeometry geometry{.batch = outer,
                              .channels = inner,
                              .in = {1, 1, x.shape[dim]},
                              .out = {1, 1, 1},
                              .kernel = {1, 1, 1},
                              .stride = {1, 1, 1},
                              .padding = {0, 0, 0},
                              .dilation = {1, 1, 1},
                              .adaptive = true};
  const AvgPoolForward call{dtype_of(x), Layout::channels_last, geometry, true, 0};
  b.kernel(call, {x, whole}, [=](const Run& run) { return AvgPoolForward::Pointers{run.at(x), run.at(whole)}; });
  return y;
}

// indices of int64 or int32, weight (rows, size)
View embedding(Builder& b) {
  const View indices = b.dense(b.input(0)), w = b.input(1);
  b.require(indices.type == Element::i64 || indices.type == Element::i32, "its indices are of ", name_of(indices.type));
  b.require(w.shape.rank == 2 && is_dense(w), "its table has shape ", w.shape);
  b.require(indices.shape.rank < kMostDims, "its indices have shape ", indices.shape);
  View y{.type = w.type, .shape = indices.shape};
  y.shape.dims[y.shape.rank++] = w.shape[1];
  y = b.make(w.type, y.shape);
  const int64_t count = indices.shape.elements(), rows = w.shape[0];
  const size_t bytes = static_cast<size_t>(w.shape[1]) * size_of(w.type);
  if (count == 0 || bytes == 0) return y;
  const std::string name = b.node().name;
  b.step({indices, w, y}, [=](const Run& run) {
    const void* const from = run.at(indices);
    const char* const table = static_cast<const char*>(run.at(w));
    char* to = static_cast<char*>(run.at(y));
    for (int64_t i = 0; i < count; ++i, to += bytes) {
      const int64_t row =
          indices.type == Element::i64 ? static_cast<const int64_t*>(from)[i] : static_cast<const int32_t*>(from)[i];
      if (row < 0 || row >= rows) fail("embedding ", name, ": index ", row, " is not below ", rows);
      std::memcpy(to, table + static_cast<size_t>(row) * bytes, bytes);
    }
  });
  return y;
}

constexpr OpEntry kElementOps[] = {
    {"add", binary_op<Sum>}, {"sub", binary_op<Difference>}, {"mul", binary_op<Product>}, {"div", binary_op<Quotient>},
    {"mean", mean},          {"embedding", embedding}};

}  // namespace

const OpTable element_ops{kElementOps, std::size(kElementOps)};

void copy(Builder& b, const View& from, const View& to) {
  if (from.shape.elements() == 0) return;
  if (from.type == to.type) {
    switch (size_of(from.type)) {
      case 1:
        return copy_elements<uint8_t, uint8_t>(b, from, to);
      case 2:
        return copy_elements<uint16_t, uint16_t>(b, from, to);
      case 4:
        return copy_elements<uint32_t, uint32_t>(b, from, to);
      default:
        return copy_elements<uint64_t, uint64_t>(b, from, to);
    }
  }
  with_floats(from.type, [&](auto source) {
    with_floats(to.type, [&](auto target) { copy_elements<decltype(source), decltype(target)>(b, from, to); });
  });
}

View add_and_activate(Builder& b, const View& y, const View& residual, Activation f) {
  return activate(b, binary<Sum>(b, y, residual), f);
}

OpBuilder find_op(std::string_view name) {
  for (const OpTable* table : {&layer_ops, &pool_ops, &norm_ops, &shape_ops, &element_ops, &quantized_ops})
    for (size_t i = 0; i < table->count; ++i)
      if (name == table->first[i].name) return table->first[i].builder;
  return nullptr;
}

}  // namespace fastops::runtime
