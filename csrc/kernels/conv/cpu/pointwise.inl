// 1x1 convolutions. In channels_last, the batch is a matrix of positions by channels, so forward and the gradient of
// the input are the products of a linear layer, which reads or packs that matrix without searching for taps. In
// channels first, an image is a matrix of channels by positions; by AMX, all of them are multiplied by one matrix of
// weights.
#pragma once

#include "../../common/cpu/common.inl"
#include "../../gemm/cpu/gemm.inl"
#include "../../linear/cpu/linear.inl"
#include "implicit_gemm.inl"

inline bool is_pointwise(const ConvGeometry& g) {
  bool same = g.groups == 1;
  for (int d = 0; d < 3; ++d)  // padding shifts the image, also where a crop behind makes sizes equal
    same = same && g.kernel[d] == 1 && g.stride[d] == 1 && g.padding[d] == 0 && g.in[d] == g.out[d];
  return same;
}

inline Strides pixels(int64_t channels) { return {channels, 1}; }

struct AsLinear {
  Bound<LinearForward> operator()(const Bound<ConvForward>& args) const {
    const ConvGeometry& g = args.geometry;
    return {{.dtype = args.dtype,
             .m = g.batch * volume(g.out),
             .n = g.out_channels,
             .k = g.in_channels,
             .x_strides = pixels(g.in_channels),
             .w_strides = pixels(g.in_channels),
             .y_row_stride = g.out_channels,
             .with_bias = args.with_bias,
             .activation = args.activation,
             .with_z = args.with_z,
             .with_residual = args.with_residual,
             .packed_w = args.packed_w},
            {args.x, args.w, args.bias, args.y, args.z, args.residual},
            args.bf16_multiply,
            args.threads};
  }
  Bound<LinearBackward> operator()(const Bound<ConvBackwardInput>& args) const {
    const ConvGeometry& g = args.geometry;
    return {{.dtype = args.dtype,
             .m = g.batch * volume(g.out),
             .n = g.out_channels,
             .k = g.in_channels,
             .grad_y_strides = pixels(g.out_channels),
             .saved_strides = pixels(g.out_channels),
             .w_strides = pixels(g.in_channels),
             .activation = args.activation,
             .with_grad_x = true},
            {.grad_y = args.grad_y, .saved = args.saved, .w = args.w, .grad_x = args.grad_x},
            args.bf16_multiply,
            args.threads};
  }
  Bound<LinearBackward> operator()(const Bound<ConvBackwardWeight>& args) const {
    const ConvGeometry& g = args.geometry;
    return {
        {.dtype = args.dtype,
         .m = g.batch * volume(g.out),
         .n = g.out_channels,
         .k = g.in_channels,
         .grad_y_strides = pixels(g.out_channels),
         .saved_strides = pixels(g.out_channels),
         .x_strides = pixels(g.in_channels),
         .activation = args.activation,
         .with_grad_w = args.with_grad_w,
         .with_grad_bias = args.with_grad_bias},
        {.grad_y = args.grad_y, .saved = args.saved, .x = args.x, .grad_w = args.grad_w, .grad_bias = args.grad_bias},
        args.bf16_multiply,
        args.threads};
  }
};

// Not the weight gradient: by multiply-adds it is faster with chunks of positions (weight_gemm.inl).
inline bool pointwise_takes(const Bound<ConvForward>& args) {
  return args.layout == Layout::channels_last && is_pointwise(args.geometry);
}
inline bool pointwise_takes(const Bound<ConvBackwardInput>& args) {
  return args.layout == Layout::channels_last && is_pointwise(args.geometry) && args.bias == nullptr &&
         args.z == nullptr && args.epilogue.kind == ActivationKind::identity;
}

inline bool pointwise_takes(const Bound<ConvBackwardWeight>& args) {
  return args.layout == Layout::channels_last && is_pointwise(args.geometry) && args.grad_w != nullptr;
}

template <class T>
void plan_pointwise(Plan<ConvForward>& plan, const Bound<ConvForward>& args) {
  plan_linear_forward<T>(plan, args, AsLinear{});
}
template <class T>
void plan_pointwise(Plan<ConvBackwardInput>& plan, const Bound<ConvBackwardInput>& args) {
  plan_linear_backward<T>(plan, args, AsLinear{});
}

#if defined(FASTOPS_HAS_AMX)
// Channels first: y[b] = W x[b], with a row for each channel and a column for each position.
inline Gemm<float> planes_gemm(const Bound<ConvForward>& args) {
  const ConvGeometry& g = args.geometry;
  const int64_t plane = volume(g.out);
  Gemm<float> product{g.out_channels,
                      plane,
                      g.in_channels,
                      plain_source(static_cast<const float*>(args.w), g.in_channels, 1),
                      plain_source(static_cast<const float*>(args.x), 1, plane),
                      plain_output<float>(args.y, plane),
                      nullptr};
  product.out.z = static_cast<float*>(args.z);
  product.out.bias = static_cast<const float*>(args.bias);
  product.out.bias_of_rows = true;
  product.out.activation = args.activation;
  product.out.residual = static_cast<const float*>(args.residual);
  product.out.relu = rectifier(args.activation, args.z);
  if (!product.out.relu && args.activation.kind != ActivationKind::identity)
    product.out.f = row_forward<float>(args.activation.kind);
  product.images = g.batch;
  product.b_image = g.in_channels * plane;
  product.y_image = g.out_channels * plane;
  return product;
}

// grad_y * f'(saved) of one image; its lanes are the positions or the channels.
template <class Args>
inline Source<float> planes_gradient(const Args& args, bool positions_are_lanes) {
  const int64_t plane = volume(args.geometry.out);
  const auto strides = [&](const void* data) {
    const float* const p = static_cast<const float*>(data);
    return positions_are_lanes ? plain_source(p, 1, plane) : plain_source(p, plane, 1);
  };
  Source<float> s = strides(args.grad_y);
  if (args.activation.kind == ActivationKind::identity) return s;
  const Source<float> saved = strides(args.saved);
  s.derivative = row_derivative<float>(args.activation.kind);
  s.saved = saved.p;
  s.saved_ls = saved.ls;
  s.saved_ks = saved.ks;
  s.activation = args.activation;
  return s;
}

// grad_x[b] = W^T g[b]
inline Gemm<float> planes_gemm(const Bound<ConvBackwardInput>& args) {
  const ConvGeometry& g = args.geometry;
  const int64_t plane = volume(g.out);
  Gemm<float> product{g.in_channels,
                      plane,
                      g.out_channels,
                      plain_source(static_cast<const float*>(args.w), 1, g.in_channels),
                      planes_gradient(args, true),
                      plain_output<float>(args.grad_x, plane),
                      nullptr};
  product.images = g.batch;
  product.b_image = g.out_channels * plane;
  product.y_image = g.in_channels * plane;
  return product;
}

// grad_w = sum over b of g[b] x[b]^T
inline Gemm<float> planes_gemm(const Bound<ConvBackwardWeight>& args) {
  const ConvGeometry& g = args.geometry;
  const int64_t plane = volume(g.out);
  Gemm<float> product{g.out_channels,
                      g.in_channels,
                      plane,
                      planes_gradient(args, false),
                      plain_source(static_cast<const float*>(args.x), plane, 1),
                      plain_output<float>(args.grad_w, g.in_channels),
                      static_cast<float*>(args.grad_bias)};
  product.k_images = g.batch;
  product.a_k_image = g.out_channels * plane;
  product.b_k_image = g.in_channels * plane;
  return product;
}

template <class Call>
inline bool planes_take(const Bound<Call>& args) {
  if (args.layout != Layout::channels_first || !is_pointwise(args.geometry)) return false;
  if constexpr (same_type<Call, ConvBackwardInput>)
    return args.bias == nullptr && args.z == nullptr && args.epilogue.kind == ActivationKind::identity;
  if constexpr (same_type<Call, ConvBackwardWeight>) return args.grad_w != nullptr;
  return true;
}

// Where parts are faster than multiply-adds on Granite Rapids, two threads, 8 images. Forward: 512 -> 128 of 28x28 1.46
// times, 256 -> 64 of 56x56 1.19; 64 -> 256 of 56x56 0.80. With both gradients: 1.26 to 1.38 from 28x28 down, and 0.88
// for the weights of 56x56.
constexpr int64_t kPlanesRows = 64, kPlanesDepth = 128;

inline bool planes_faster(const Gemm<float>& g) {
  const int64_t columns = g.n * g.images, depth = g.k * g.k_images;
  return smaller(g.m, columns) >= kPlanesRows && depth >= kPlanesDepth && g.m * columns * depth >= kPartsWork &&
         (depth <= kPartsManyRows || smaller(g.m, columns) >= 256);
}

template <class Call>
void plan_planes_by_parts(Plan<Call>& plan, const Bound<Call>& args) {
  using P = bf16_parts<3>;
  const ConvGeometry& g = args.geometry;
  const bool faster = planes_faster(planes_gemm(args));
  const bool takes =
      args.bf16_multiply == Bf16Multiply::automatic ? faster : args.bf16_multiply == Bf16Multiply::native;
  if (!takes || g.in_channels == 0 || g.out_channels == 0 || g.batch == 0) return;
  const GemmPlan product = plan_gemm<P>(planes_gemm(args), plan.target.threads);
  decide(plan, Blocks<P>::kernel, product.total, product, [](auto& args, auto& product, auto* workspace, auto& team) {
    const Gemm<float> g = planes_gemm(args);
    for (int64_t i = 0; g.a_sums != nullptr && i < g.m; ++i) g.a_sums[i] = 0;
    gemm<P>(g, product, workspace, team);
  });
}
#endif
