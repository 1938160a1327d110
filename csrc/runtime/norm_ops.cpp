// Normalisations, softmax and attention.
#include <cmath>

#include "ops.h"

namespace fastops::runtime {
namespace {

// x (batch, channels, ...), mean, variance (channels), gamma?, beta?; texts: activation; floats: a, b, eps
View batch_norm(Builder& b) {
  const View input = b.input(0);
  b.require(input.shape.rank >= 2, "its input has to have channels, got shape ", input.shape);
  const int64_t channels = input.shape[1];
  const Layout layout = layout_of(input);
  const View x = b.dense(input, layout);
  // Statistics and parameters of 16-bit layers are float32.
  const auto parameter = [&](size_t i) -> const void* {
    if (!b.has(i)) return nullptr;
    const View view = b.weight(i, Element::f32, 1);
    b.require(view.shape[0] == channels, "argument ", i, " has to have ", channels, " elements, got shape ",
              view.shape);
    return b.data(view);
  };
  const void* const mean = parameter(1);
  const void* const variance = parameter(2);
  const void* const gamma = parameter(3);
  const void* const beta = parameter(4);
  b.require(mean != nullptr && variance != nullptr, "it has no statistics");
  const View y = b.make(x.type, x.shape, layout);
  const int64_t elements = x.shape.elements();
  if (elements == 0) return y;
  const bool last = layout == Layout::channels_last;
  const BatchNormForward call{.dtype = dtype_of(x),
                              .param_dtype = DType::f32,
                              .activation = b.activation(),
                              .training = false,
                              .with_gamma = gamma != nullptr,
                              .with_beta = beta != nullptr,
                              .with_running = true,
                              .eps = b.number(2),
                              .outer = last ? elements / channels : x.shape[0],
                              .channels = channels,
                              .inner = last ? 1 : elements / channels / x.shape[0]};
  b.kernel(call, {x, y}, [=](const Run& run) {
    return BatchNormForward::Pointers{.x = run.at(x),
                                      .gamma = gamma,
                                      .beta = beta,
                                      .residual = nullptr,
                                      .y = run.at(y),
                                      .running_mean = const_cast<void*>(mean),  // only read
                                      .running_var = const_cast<void*>(variance)};
  });
  return y;
}

// x (*, size), weight (size)?, bias (size)?; ints: size; floats: eps
View norm_of_rows(Builder& b, bool rms) {
  const View input = b.input(0);
  const int64_t size = b.integer(0, 1), elements = input.shape.elements();
  int64_t row = 1;
  for (int i = input.shape.rank; i > 0 && row < size; --i) row *= input.shape[i - 1];
  b.require(row == size, "it normalizes ", size, " elements, got shape ", input.shape);
  const auto parameter = [&](size_t i) -> const void* {
    if (!b.has(i)) return nullptr;
    const View view = b.weight(i, Element::f32);
    b.require(view.shape.elements() == size, "argument ", i, " has to have ", size, " elements, got shape ",
              view.shape);
    return b.data(view);
  };
  const void* const weight = parameter(1);
  const void* const bias = parameter(2);
  const View x = b.dense(input), y = b.make(x.type, x.shape);
  if (elements == 0) return y;
  const LayerNormForward call{.dtype = dtype_of(x),
                              .parameter_dtype = DType::f32,
                              .rms = rms,
                              .eps = b.number(0),
                              .outer = elements / size,
                              .size = size,
                              .inner = 1,
                              .x_outer_stride = size};
  b.kernel(call, {x, y}, [=](const Run& run) {
    return LayerNormForward::Pointers{.x = run.at(x), .weight = weight, .bias = bias, .y = run.at(y)};
  });
  return y;
}
View layer_norm(Builder& b) { return norm_of_rows(b, false); }
View rms_norm(Builder& b) { return norm_of_rows(b, true); }

// x; ints: the dimension
View softmax_over(Builder& b, bool log) {
  const View x = b.dense(b.input(0)), y = b.make(x.type, x.shape);
  b.require(x.shape.rank >= 1, "its input has no dimensions");
  const auto dim = static_cast<int>(b.integer(0, 0, x.shape.rank - 1));
  if (x.shape.elements() == 0) return y;
  int64_t outer = 1, inner = 1;
  for (int i = 0; i < dim; ++i) outer *= x.shape[i];
  for (int i = dim + 1; i < x.shape.rank; ++i) inner *= x.shape[i];
  const SoftmaxForward call{dtype_of(x), log, outer, x.shape[dim], inner};
  b.kernel(call, {x, y}, [=](const Run& run) { return SoftmaxForward::Pointers{run.at(x), run.at(y)}; });
  return y;
}
View softmax(Builder& b) { return softmax_over(b, false); }
View log_softmax(Builder& b) { return softmax_over(b, true); }

HeadStrides head_strides(const View& view) { return {view.strides[0], view.strides[1], view.strides[2]}; }

// query (batch, heads, queries, size), key (batch, heads, keys, size), value (batch, heads, keys, value_size), mask
// broadcastable to (batch, heads, queries, keys)?; ints: causal; floats: scale
View attention(Builder& b) {
  const View q = b.input(0), k = b.input(1), v = b.input(2);
  const auto heads_of = [&](const View& view, const char* name) {
    b.require(view.shape.rank == 4 && view.type == q.type && view.shape[0] == q.shape[0] && view.shape[1] == q.shape[1],
              name, " has to be of ", name_of(q.type), " with 4 dimensions, the first two as those of ", q.shape,
              ", got shape ", view.shape);
    return view.strides[3] == 1 || view.shape[3] == 1 ? view : b.dense(view);  // the kernels want contiguous rows
  };
  const View query = heads_of(q, "query"), key = heads_of(k, "key"), value = heads_of(v, "value");
  b.require(key.shape[3] == q.shape[3] && value.shape[2] == key.shape[2], "query ", q.shape, ", key ", key.shape,
            " and value ", value.shape, " do not fit");
  const int64_t batch = q.shape[0], heads = q.shape[1], queries = q.shape[2], keys = key.shape[2];
  View mask{};
  if (b.has(3)) {
    mask = b.input(3);
    b.require(mask.type == q.type && mask.shape.rank <= 4, "its mask has to be of ", name_of(q.type),
              " with at most 4 dimensions, got shape ", mask.shape);
    while (mask.shape.rank < 4) insert_dim(mask, 0, 1, 0);
    if (mask.strides[3] != 1 && keys > 1) mask = b.dense(mask);
    for (int i = 0; i < 4; ++i) {
      const int64_t wanted = i == 0 ? batch : i == 1 ? heads : i == 2 ? queries : keys;
      b.require(mask.shape[i] == wanted || (mask.shape[i] == 1 && i < 3), "its mask does not fit: got shape ",
                mask.shape);
      if (mask.shape[i] == 1) mask.strides[i] = 0;
    }
  }
  // Heads lie beside each other in memory, so that a model merges them without a copy.
  View y = b.make(q.type, {4, {batch, queries, heads, value.shape[3]}});
  std::swap(y.shape.dims[1], y.shape.dims[2]);
  std::swap(y.strides[1], y.strides[2]);
  if (y.shape.elements() == 0) return y;
  b.require(keys > 0 && q.shape[3] > 0, "its keys are empty: got shape ", key.shape);
  const AttentionForward call{.attention = {.dtype = dtype_of(q),
                                            .causal = b.integer(0, 0, 1) != 0,
                                            .with_mask = b.has(3),
                                            .scale = b.number(0),
                                            .batch = batch,
                                            .heads = heads,
                                            .queries = queries,
                                            .keys = keys,
                                            .size = q.shape[3],
                                            .value_size = value.shape[3],
                                            .q = head_strides(query),
                                            .k = head_strides(key),
                                            .v = head_strides(value),
                                            .y = head_strides(y),
                                            .mask = b.has(3) ? head_strides(mask) : HeadStrides{}},
                              .dtype = dtype_of(q)};
  const bool with_mask = b.has(3);
  b.kernel(call, {query, key, value, y, with_mask ? mask : y}, [=](const Run& run) {
    return AttentionForward::Pointers{.q = run.at(query),
                                      .k = run.at(key),
                                      .v = run.at(value),
                                      .mask = with_mask ? run.at(mask) : nullptr,
                                      .y = run.at(y)};
  });
  return y;
}

constexpr OpEntry kNormOps[] = {{"batch_norm", batch_norm}, {"layer_norm", layer_norm},   {"rms_norm", rms_norm},
                                {"softmax", softmax},       {"log_softmax", log_softmax}, {"attention", attention}};

}  // namespace

const OpTable norm_ops{kNormOps, std::size(kNormOps)};

}  // namespace fastops::runtime
