// Linear layers, products, convolutions, networks that are one kernel, activations.
#include <algorithm>

#include "ops.h"

namespace fastops::runtime {
namespace {

// What a layer's plan takes besides its image: the fused residual, if it has the output's shape, and where no kernel
// takes it, the layer without it.
template <class Call, class Bind>
View with_residual(Builder& b, Call call, const View& y, const void* weight, const View* residual, const View& x,
                   Layout layout, Bind bind) {
  call.packed_w = true;
  call.alignment = 64;
  const Activation f = call.activation;
  if (residual != nullptr && residual->shape == y.shape && residual->type == y.type) {
    call.with_residual = true;
    if (const auto plan = b.plan(call)) {
      const View added = b.dense(*residual, layout);
      const void* const w = b.pack(*plan, weight);
      b.kernel(plan, {x, y, added}, [=](const Run& run) {
        typename Call::Pointers pointers = bind(run, w);
        pointers.residual = run.at(added);
        return pointers;
      });
      return y;
    }
    call.with_residual = false;
  }
  if (residual != nullptr) call.activation = {};
  const auto plan = b.plan(call);
  b.require(plan != nullptr, "this processor has no kernel for it");
  const void* const w = b.pack(*plan, weight);
  b.kernel(plan, {x, y}, [=](const Run& run) { return bind(run, w); });
  return residual == nullptr ? y : add_and_activate(b, y, *residual, f);
}

// x (*, k), w (n, k), bias (n)?, residual (*, n)?; texts: activation; floats: a, b
View linear(Builder& b) {
  const View x = b.input(0), w = b.weight(1, x.type, 2);
  const int64_t n = w.shape[0], k = w.shape[1];
  b.require(x.shape.rank >= 1 && x.shape[x.shape.rank - 1] == k, "its input has to have ", k, " features, got shape ",
            x.shape);
  const bool with_bias = b.has(2);
  const View bias = with_bias ? b.weight(2, x.type, 1) : View{};
  b.require(!with_bias || bias.shape[0] == n, "its bias has to have ", n, " elements, got shape ", bias.shape);
  Shape shape = x.shape;
  shape.dims[shape.rank - 1] = n;
  const View y = b.make(x.type, shape);
  if (shape.elements() == 0) return y;
  const Rows rows = rows_of(b, x);
  const LinearForward call{.dtype = dtype_of(x),
                           .m = rows.rows,
                           .n = n,
                           .k = k,
                           .x_strides = {rows.stride, 1},
                           .w_strides = {k, 1},
                           .y_row_stride = n,
                           .with_bias = with_bias,
                           .activation = b.activation()};
  const void* const bias_data = with_bias ? b.data(bias) : nullptr;
  const View residual = b.has(3) ? b.input(3) : View{};
  return with_residual(b, call, y, b.data(w), b.has(3) ? &residual : nullptr, rows.view, Layout::channels_first,
                       [=, x = rows.view](const Run& run, const void* packed) {
                         return LinearForward::Pointers{.x = run.at(x), .w = packed, .bias = bias_data, .y = run.at(y)};
                       });
}

// a (batch, m, k), b (batch, k, n), of any strides; or both without batch
View matmul(Builder& b) {
  View left = b.input(0), right = b.input(1);
  b.require(
      left.type == right.type && left.shape.rank == right.shape.rank && (left.shape.rank == 2 || left.shape.rank == 3),
      "shapes ", left.shape, " and ", right.shape, " are no two matrices");
  const bool many = left.shape.rank == 3;
  if (!many) {
    insert_dim(left, 0, 1, 0);
    insert_dim(right, 0, 1, 0);
  }
  const int64_t batch = left.shape[0], m = left.shape[1], k = left.shape[2], n = right.shape[2];
  b.require(right.shape[0] == batch && right.shape[1] == k, "shapes ", left.shape, " and ", right.shape, " do not fit");
  const View whole = b.make(left.type, {3, {batch, m, n}});
  View y = whole;
  if (!many) remove_dim(y, 0);
  if (y.shape.elements() == 0) return y;
  const LinearForward call{.dtype = dtype_of(left),
                           .m = m,
                           .n = n,
                           .k = k,
                           .x_strides = {left.strides[1], left.strides[2]},
                           .w_strides = {right.strides[2], right.strides[1]},
                           .y_row_stride = n};
  const auto plan = b.plan(call);
  b.require(plan != nullptr, "this processor has no kernel for it");
  b.reserve_scratch(plan->workspace);
  b.step({left, right, whole}, [=](const Run& run) {
    View x = left, w = right, to = whole;
    for (int64_t i = 0; i < batch; ++i) {
      plan->run({.x = run.at(x), .w = run.at(w), .y = run.at(to)}, run.scratch, run.team);
      x.offset += left.strides[0];
      w.offset += right.strides[0];
      to.offset += whole.strides[0];
    }
  });
  return y;
}

// ---- convolutions

// An image (batch, channels, spatial) with three spatial dimensions, and back.
struct Image {
  View view;
  int dims;
  Layout layout;
};

Image image_of(Builder& b, const View& x, int dims, Layout layout) {
  b.require(x.shape.rank == dims + 2, "its input has to have ", dims + 2, " dimensions, got shape ", x.shape);
  return {b.dense(x, layout), dims, layout};
}

Layout weight_layout(Builder& b) {
  const auto layout = static_cast<Layout>(b.integer(2, 0, 1));
  b.require(b.integer(0, 1, 3) > 1 || layout == Layout::channels_first, "weights of one dimension are channels first");
  return layout;
}

// Of a convolution: x (batch, channels, *spatial), w (out, channels / groups, *kernel) in the order of w_layout, bias?
struct Convolution {
  Image x;
  const void* w;
  const void* bias;
  ConvGeometry geometry;
};
Convolution convolution_of(Builder& b, Layout layout) {
  const int dims = static_cast<int>(b.integer(0, 1, 3));
  const View input = b.input(0), w = b.weight(1, input.type, dims + 2);
  const Image x = image_of(b, input, dims, layout);
  const ConvGeometry geometry = geometry_of(b, x.view, w, dims);
  const View bias = b.has(2) ? b.weight(2, input.type, 1) : View{};
  b.require(!b.has(2) || bias.shape[0] == geometry.out_channels, "its bias has to have ", geometry.out_channels,
            " elements, got shape ", bias.shape);
  return {x, b.data(w), b.has(2) ? b.data(bias) : nullptr, geometry};
}

// f(conv(x) + residual), the residual null for none.
View convolve(Builder& b, const Convolution& c, Activation f, const View* residual) {
  const View x = c.x.view;
  const View y =
      b.make(x.type, image_shape(c.geometry.batch, c.geometry.out_channels, c.geometry.out, c.x.dims), c.x.layout);
  if (y.shape.elements() == 0) return y;
  const ConvForward call{.dtype = dtype_of(x),
                         .layout = c.x.layout,
                         .w_layout = c.x.layout,
                         .geometry = c.geometry,
                         .with_bias = c.bias != nullptr,
                         .activation = f};
  return with_residual(b, call, y, c.w, residual, x, c.x.layout,
                       [=, bias = c.bias](const Run& run, const void* packed) {
                         return ConvForward::Pointers{.x = run.at(x), .w = packed, .bias = bias, .y = run.at(y)};
                       });
}

// ... residual?; texts: activation; floats: a, b
View conv(Builder& b) {
  const Convolution c = convolution_of(b, weight_layout(b));
  return convolve(b, c, b.activation(), b.has(3) ? &b.input(3) : nullptr);
}

// ... and ints: the pool's sizes; texts: identity or relu
View conv_max_pool(Builder& b) {
  // Planes stay planes: of few channels these have a kernel of their own, and others take as long in either layout.
  const Layout w_layout = weight_layout(b);
  const bool planes = b.input(0).type == Element::f32 && is_dense(b.input(0));
  const Convolution c = convolution_of(b, planes ? Layout::channels_first : w_layout);
  const View x = c.x.view;
  ConvPoolForward call{.dtype = dtype_of(x),
                       .layout = c.x.layout,
                       .w_layout = w_layout,
                       .geometry = c.geometry,
                       .pool = {1, 1, 1},
                       .with_bias = c.bias != nullptr,
                       .activation = b.activation(),
                       .packed_w = true};
  const auto kind = call.activation.kind;
  b.require(kind == ActivationKind::identity || kind == ActivationKind::relu, "its activation has to be relu or none");
  int64_t pooled[3], window = 1;
  for (int i = 0; i < 3; ++i) {
    const int dim = i - (3 - c.x.dims);
    if (dim >= 0) call.pool[i] = b.integer(static_cast<size_t>(3 + 4 * c.x.dims + dim), 1, 255);
    pooled[i] = c.geometry.out[i] / call.pool[i];
    window *= call.pool[i];
    b.require(pooled[i] > 0 && window <= 255, "its windows do not fit an image of shape ", x.shape);
  }
  const View y = b.make(x.type, image_shape(c.geometry.batch, c.geometry.out_channels, pooled, c.x.dims), c.x.layout);
  if (y.shape.elements() == 0) return y;
  const auto plan = b.plan(call);
  b.require(plan != nullptr, "this processor has no kernel for it");
  const void* const w = b.pack(*plan, c.w);
  b.kernel(plan, {x, y}, [=, bias = c.bias](const Run& run) {
    return ConvPoolForward::Pointers{.x = run.at(x), .w = w, .bias = bias, .y = run.at(y)};
  });
  return y;
}

// ---- networks and blocks that are one kernel

// x (*, widths[0]), then w and bias? of each layer; texts: of the hidden layers and of the last one; floats: a, b of
// both
View mlp(Builder& b) {
  const View input = b.input(0);
  const size_t arguments = b.node().inputs.size();
  const int layers = static_cast<int>((arguments - 1) / 2);
  b.require(arguments % 2 == 1 && layers >= 1 && layers <= kMostMlpLayers && input.shape.rank >= 1, "it has ",
            arguments, " arguments");
  const Rows x = rows_of(b, input);
  MlpForward call{.shape = {.dtype = dtype_of(input),
                            .precision = Precision::highest,
                            .m = x.rows,
                            .layers = layers,
                            .widths = {x.size}},
                  .x_row_stride = x.stride,
                  .hidden = b.activation(0),
                  .output = b.activation(1)};
  MlpForward::Pointers pointers{};
  for (int l = 0; l < layers; ++l) {
    const auto at = static_cast<size_t>(1 + 2 * l);
    const View w = b.weight(at, input.type, 2);
    b.require(w.shape[1] == call.shape.widths[l], "weights ", w.shape, " do not fit ", call.shape.widths[l],
              " features");
    call.shape.widths[l + 1] = w.shape[0];
    pointers.w[l] = b.data(w);
    if (!b.has(at + 1)) continue;
    const View bias = b.weight(at + 1, input.type, 1);
    b.require(bias.shape[0] == w.shape[0], "a bias has to have ", w.shape[0], " elements, got shape ", bias.shape);
    pointers.bias[l] = b.data(bias);
  }
  b.require(mlp_fits_cpu(call.shape), "its layers have to be of float32 and at most ", kMostMlpWidthCpu, " wide");
  Shape shape = input.shape;
  shape.dims[shape.rank - 1] = call.shape.widths[layers];
  const View y = b.make(input.type, shape);
  if (shape.elements() == 0) return y;
  b.kernel(call, {x.view, y}, [=, x = x.view](const Run& run) {
    MlpForward::Pointers all = pointers;
    all.x = run.at(x);
    all.y = run.at(y);
    return all;
  });
  return y;
}

// x (batch, channels, height, width); w and bias? of a 1x1 convolution or none, of a depthwise one, of a 1x1 one or
// none; residual?; ints: strides, paddings, dilations of the depthwise one, two each; texts, floats: the three
// activations
View inverted_residual(Builder& b) {
  const View input = b.input(0);
  b.require(input.shape.rank == 4, "its input has to have 4 dimensions, got shape ", input.shape);
  const View x = b.dense(input, Layout::channels_last);
  InvertedResidualForward call{};
  call.dtype = dtype_of(x);
  call.batch = x.shape[0];
  call.in_channels = x.shape[1];
  call.with_expand = b.has(1);
  call.with_project = b.has(5);
  call.with_residual = b.has(7);
  call.expand = b.activation(0);
  call.depthwise = b.activation(1);
  call.project = b.activation(2);
  // w (out, in, height, width), of which the depthwise one lies as [out, height, width]: in is 1.
  const auto weights = [&](size_t i, int64_t out, int64_t in) {
    const View w = b.weight(i, x.type, 4);
    b.require(w.shape[0] == out && w.shape[1] == in && (i == 3 || w.shape[2] * w.shape[3] == 1), "weights ", w.shape,
              " do not fit an input of shape ", x.shape);
    if (b.has(i + 1)) b.require(b.weight(i + 1, x.type, 1).shape[0] == out, "a bias has to have ", out, " elements");
    return w;
  };
  const View depthwise = b.weight(3, x.type, 4);
  call.wide_channels = depthwise.shape[0];
  b.require(call.with_expand || call.wide_channels == x.shape[1], "weights ", depthwise.shape,
            " do not fit an input of shape ", x.shape);
  weights(3, call.wide_channels, 1);
  if (call.with_expand) weights(1, call.wide_channels, call.in_channels);
  call.out_channels = call.with_project ? b.weight(5, x.type, 4).shape[0] : call.wide_channels;
  if (call.with_project) weights(5, call.out_channels, call.wide_channels);
  Shape padded = x.shape;
  for (int i = 0; i < 2; ++i) {
    const auto at = static_cast<size_t>(i);
    call.kernel[i] = depthwise.shape[2 + i];
    call.stride[i] = b.integer(at, 1);
    call.padding[i] = b.integer(2 + at);
    call.dilation[i] = b.integer(4 + at, 1);
    call.in[i] = x.shape[2 + i];
    b.require(call.in[i] >= 1 && call.in[i] < kMostAttribute && call.kernel[i] >= 1 && call.kernel[i] < kMostAttribute,
              "weights ", depthwise.shape, " and an input of shape ", x.shape, " are no convolution's");
    padded.dims[2 + i] = call.in[i] + 2 * call.padding[i];
    const int64_t reach = call.dilation[i] * (call.kernel[i] - 1) + 1;
    b.require(padded[2 + i] >= reach, "its kernel of ", reach, " is larger than the padded input of shape ", x.shape);
    call.out[i] = (padded[2 + i] - reach) / call.stride[i] + 1;
  }
  padded.dims[1] = std::max(call.wide_channels, std::max(call.in_channels, call.out_channels));
  padded.elements();

  const Shape shape{4, {call.batch, call.out_channels, call.out[0], call.out[1]}};
  const View residual = b.has(7) ? b.input(7) : View{};
  const bool fits = shape.elements() > 0 && (!b.has(7) || (residual.shape == shape && residual.type == x.type));
  if (const auto plan = fits ? b.plan(call) : nullptr) {
    const auto pointer = [&](size_t i) { return b.has(i) ? b.data(b.input(i)) : nullptr; };
    const InvertedResidualForward::Weights all{pointer(1), pointer(2), pointer(3), pointer(4), pointer(5), pointer(6)};
    const void* const packed = b.pack(*plan, &all);
    const View y = b.make(x.type, shape, Layout::channels_last);
    const View added = call.with_residual ? b.dense(residual, Layout::channels_last) : y;
    b.kernel(plan, {x, y, added}, [=, with_residual = call.with_residual](const Run& run) {
      return InvertedResidualForward::Pointers{run.at(x), packed, run.at(y), with_residual ? run.at(added) : nullptr};
    });
    return y;
  }
  // One by one.
  View last = x;
  for (size_t i = 1; i <= 5; i += 2) {
    if (!b.has(i)) continue;
    const bool spatial = i == 3;
    const View w = b.input(i);
    ConvGeometry g{.batch = call.batch,
                   .in_channels = last.shape[1],
                   .out_channels = w.shape[0],
                   .groups = spatial ? call.wide_channels : 1,
                   .in = {1, last.shape[2], last.shape[3]},
                   .out = {1, last.shape[2], last.shape[3]},
                   .kernel = {1, 1, 1},
                   .stride = {1, 1, 1},
                   .padding = {0, 0, 0},
                   .dilation = {1, 1, 1}};
    for (int k = 0; spatial && k < 2; ++k) {
      g.out[k + 1] = call.out[k];
      g.kernel[k + 1] = call.kernel[k];
      g.stride[k + 1] = call.stride[k];
      g.padding[k + 1] = call.padding[k];
      g.dilation[k + 1] = call.dilation[k];
    }
    const Convolution c{
        {last, 2, Layout::channels_last}, b.data(w), b.has(i + 1) ? b.data(b.input(i + 1)) : nullptr, g};
    const bool ends = i == 5 || (i == 3 && !call.with_project);
    last = convolve(b, c, b.activation(i / 2), ends && b.has(7) ? &residual : nullptr);
  }
  return last;
}

// ---- activations

View activation(Builder& b) { return activate(b, b.input(0), b.activation()); }

// x (batch, channels, ...), w (channels) or (1)
View prelu(Builder& b) {
  const View x = b.dense(b.input(0)), w = b.weight(1, x.type, 1);
  const int64_t channels = w.shape[0];
  b.require(channels == 1 || (x.shape.rank >= 2 && x.shape[1] == channels), channels,
            " weights do not fit an input of shape ", x.shape);
  b.require(channels >= 1, "it has no weights");
  const View y = b.make(x.type, x.shape);
  const int64_t elements = x.shape.elements();
  if (elements == 0) return y;
  const int64_t outer = channels == 1 ? 1 : x.shape[0];
  const PreluForward call{dtype_of(x), outer, channels, elements / outer / channels, 1};
  b.kernel(call, {x, y},
           [=, w = b.data(w)](const Run& run) { return PreluForward::Pointers{run.at(x), w, run.at(y)}; });
  return y;
}

constexpr OpEntry kLayerOps[] = {{"linear", linear},
                                 {"matmul", matmul},
                                 {"conv", conv},
                                 {"mlp", mlp},
                                 {"activation", activation},
                                 {"conv_max_pool", conv_max_pool},
                                 {"prelu", prelu},
                                 {"inverted_residual", inverted_residual}};

}  // namespace

Shape image_shape(int64_t batch, int64_t channels, const int64_t (&spatial)[3], int dims) {
  Shape shape{.rank = dims + 2, .dims = {batch, channels}};
  std::copy(spatial + 3 - dims, spatial + 3, shape.dims + 2);
  return shape;
}

ConvGeometry geometry_of(Builder& b, const View& x, const View& w, int dims) {
  ConvGeometry g{.batch = x.shape[0],
                 .in_channels = x.shape[1],
                 .out_channels = w.shape[0],
                 .groups = b.integer(1, 1),
                 .in = {1, 1, 1},
                 .out = {1, 1, 1},
                 .kernel = {1, 1, 1},
                 .stride = {1, 1, 1},
                 .padding = {0, 0, 0},
                 .dilation = {1, 1, 1}};
  b.require(g.in_channels % g.groups == 0 && g.out_channels % g.groups == 0 && w.shape[1] == g.in_channels / g.groups,
            "weights ", w.shape, " in ", g.groups, " groups do not fit an input of shape ", x.shape);
  Shape padded = x.shape;  // which kernels may copy
  for (int i = 0; i < dims; ++i) {
    const int at = 3 - dims + i;
    const auto option = [&](size_t kind, int64_t least) {
      return b.integer(3 + kind * static_cast<size_t>(dims) + static_cast<size_t>(i), least);
    };
    g.in[at] = x.shape[2 + i];
    g.kernel[at] = w.shape[2 + i];
    g.stride[at] = option(0, 1);
    g.padding[at] = option(1, 0);
    g.dilation[at] = option(3, 1);
    b.require(g.kernel[at] >= 1 && g.kernel[at] < kMostAttribute && g.in[at] < kMostAttribute, "weights ", w.shape,
              " and an input of shape ", x.shape, " are no convolution's");
    const int64_t reach = g.dilation[at] * (g.kernel[at] - 1) + 1, room = g.in[at] + g.padding[at] + option(2, 0);
    b.require(room >= reach, "its kernel of ", reach, " is larger than the padded input of shape ", x.shape);
    g.out[at] = (room - reach) / g.stride[at] + 1;
    padded.dims[2 + i] = room;
  }
  padded.elements();
  return g;
}

const OpTable layer_ops{kLayerOps, std::size(kLayerOps)};

View activate(Builder& b, const View& input, Activation f) {
  const Layout layout = layout_of(input);
  const View x = b.dense(input, layout);
  if (f.kind == ActivationKind::identity) return x;
  const View y = b.make(x.type, x.shape, layout);
  const int64_t elements = x.shape.elements();
  if (elements == 0) return y;
  const ActivationForward call{
      .dtype = dtype_of(x), .activation = f, .rows = 1, .cols = elements, .x_row_stride = elements};
  b.kernel(call, {x, y}, [=](const Run& run) { return ActivationForward::Pointers{run.at(x), run.at(y)}; });
  return y;
}

Rows rows_of(Builder& b, const View& view) {
  const int64_t size = view.shape[view.shape.rank - 1];
  int64_t rows = 1;
  for (int i = 0; i < view.shape.rank - 1; ++i) rows *= view.shape[i];
  // A matrix may have any row stride; of more dimensions all but the last have to be one.
  if (view.shape.rank == 2 && view.strides[1] == 1 && view.strides[0] >= size)
    return {view, rows, size, view.strides[0]};
  return {b.dense(view), rows, size, size};
}

}  // namespace fastops::runtime
