// 1x1 convolutions of channels_last images, forward and the gradient of the input. The batch is a matrix of positions
// by channels, so they are the products of a linear layer, which reads or packs that matrix without searching for taps.
#pragma once

#include "../../common/cpu/common.inl"
#include "../../gemm/cpu/gemm.inl"
#include "../../linear/cpu/linear.inl"
#include "implicit_gemm.inl"

inline bool is_pointwise(Layout layout, const ConvGeometry& g) {
  bool same = layout == Layout::channels_last && g.groups == 1;
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
inline bool pointwise_takes(const Bound<ConvForward>& args) { return is_pointwise(args.layout, args.geometry); }
inline bool pointwise_takes(const Bound<ConvBackwardInput>& args) {
  return is_pointwise(args.layout, args.geometry) && args.bias == nullptr && args.z == nullptr &&
         args.epilogue.kind == ActivationKind::identity;
}

inline bool pointwise_takes(const Bound<ConvBackwardWeight>& args) {
  return is_pointwise(args.layout, args.geometry) && args.grad_w != nullptr;
}

template <class T>
void plan_pointwise(Plan<ConvForward>& plan, const Bound<ConvForward>& args) {
  plan_linear_forward<T>(plan, args, AsLinear{});
}
template <class T>
void plan_pointwise(Plan<ConvBackwardInput>& plan, const Bound<ConvBackwardInput>& args) {
  plan_linear_backward<T>(plan, args, AsLinear{});
}
