// 1x1 convolutions of channels_last images, forward and the gradient of the input. The batch is a matrix of positions
// by channels, so they are the products of a linear layer, which reads or packs that matrix without searching for taps.
#pragma once

#include "../../gemm/cpu/gemm.inl"
#include "../../linear/cpu/linear.inl"
#include "implicit_gemm.inl"

inline bool is_pointwise(Layout layout, const ConvGeometry& g) {
  bool same = layout == Layout::channels_last && g.groups == 1;
  for (int d = 0; d < 3; ++d)  // padding shifts the image, also where a crop behind makes sizes equal
    same = same && g.kernel[d] == 1 && g.stride[d] == 1 && g.padding[d] == 0 && g.in[d] == g.out[d];
  return same;
}

inline Matrix pixels(const void* p, int64_t channels) { return {p, channels, 1}; }

inline LinearForward pointwise_linear(const ConvForward& args) {
  const ConvGeometry& g = args.geometry;
  return {args.dtype,
          g.batch * volume(g.out),
          g.out_channels,
          g.in_channels,
          pixels(args.x, g.in_channels),
          pixels(args.w, g.in_channels),
          args.bias,
          1,
          args.activation,
          args.y,
          g.out_channels,
          args.z,
          args.bf16_multiply};
}

inline LinearBackward pointwise_linear(const ConvBackwardInput& args) {
  const ConvGeometry& g = args.geometry;
  return {args.dtype,
          g.batch * volume(g.out),
          g.out_channels,
          g.in_channels,
          pixels(args.grad_y, g.out_channels),
          args.activation,
          pixels(args.saved, g.out_channels),
          {},
          pixels(args.w, g.in_channels),
          args.grad_x,
          nullptr,
          nullptr,
          args.bf16_multiply};
}

// Not the weight gradient: it is faster with chunks of positions (weight_gemm.inl).
inline bool pointwise_takes(const ConvForward& args) { return is_pointwise(args.layout, args.geometry); }
inline bool pointwise_takes(const ConvBackwardInput& args) {
  return is_pointwise(args.layout, args.geometry) && args.bias == nullptr && args.z == nullptr &&
         args.epilogue.kind == ActivationKind::identity;
}

template <class T>
size_t pointwise_workspace(const ConvForward& args, int threads) {
  return forward_workspace<T>(pointwise_linear(args), threads);
}
template <class T>
size_t pointwise_workspace(const ConvBackwardInput& args, int threads) {
  const BackwardPlan plan = plan_backward<T>(pointwise_linear(args), threads);
  return plan.gemm + plan.sums;
}

template <class T>
KernelName pointwise_name(const ConvForward& args) {
  return forward_name<T>(pointwise_linear(args));
}
template <class T>
KernelName pointwise_name(const ConvBackwardInput& args) {
  return backward_name<T>(pointwise_linear(args));
}

template <class T>
void pointwise(const ConvForward& args, void* workspace, const Team& team) {
  forward<T>(pointwise_linear(args), workspace, team);
}
template <class T>
void pointwise(const ConvBackwardInput& args, void* workspace, const Team& team) {
  backward<T>(pointwise_linear(args), workspace, team);
}
