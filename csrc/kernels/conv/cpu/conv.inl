// The entry points of convolution, and the choice of the algorithm. The contract is csrc/kernels/conv/conv.h.
#pragma once

#include "../../common/cpu/dtype.inl"
#include "../../common/cpu/numbers.inl"
#include "depthwise.inl"
#include "depthwise_last.inl"
#include "first_layer_forward.inl"
#include "first_layer_input.inl"
#include "implicit_gemm.inl"
#include "pointwise.inl"
#include "weight_gemm.inl"
#include "weight_gemm_rows.inl"
#include "winograd.inl"
#include "winograd_weight.inl"

inline bool is_empty(const ConvForward& args) {
  return args.geometry.batch * args.geometry.out_channels * volume(args.geometry.out) == 0;
}
inline bool is_empty(const ConvBackwardInput& args) {
  return args.geometry.batch * args.geometry.in_channels * volume(args.geometry.in) == 0;
}
inline bool is_empty(const ConvBackwardWeight& args) {
  return args.geometry.out_channels == 0 || (args.grad_w == nullptr && args.grad_bias == nullptr);
}

// visit(name, workspace, run) for the first algorithm in this order whose *_takes is true. Each of them accepts the
// calls for which it was measured to be the fastest on Granite Rapids; the measurements are in its file. The matrix
// product computes all other calls.
template <class T, class Args, class Visit>
inline auto with_algorithm(const Args& args, Visit&& visit) {
  if (depthwise_takes<T>(args))
    return visit(
        is_depthwise(args.geometry) ? kDepthwiseName : kPlanesName,
        [&](int threads) { return depthwise_workspace<T>(args, threads); },
        [&](void* workspace, const Team& team) { depthwise<T>(args, workspace, team); });
  if (depthwise_last_takes<T>(args))
    return visit(
        kDepthwiseLastName, [&](int threads) { return depthwise_last_workspace<T>(args, threads); },
        [&](void* workspace, const Team& team) { depthwise_last<T>(args, workspace, team); });
  if constexpr (same_type<Args, ConvForward>)
    if (conv_first_takes<T>(args))
      return visit(
          conv_first_name<T>(), [&](int threads) { return conv_first_workspace<T>(args, threads); },
          [&](void* workspace, const Team& team) { conv_first<T>(args, workspace, team); });
  if constexpr (same_type<Args, ConvBackwardInput>)
    if (conv_scatter_takes<T>(args))
      return visit(
          conv_scatter_name<T>(args), [&](int threads) { return conv_scatter_workspace<T>(args, threads); },
          [&](void* workspace, const Team& team) { conv_scatter<T>(args, workspace, team); });
  if constexpr (!same_type<Args, ConvBackwardWeight>)
    if (pointwise_takes(args))
      return visit(
          pointwise_name<T>(args), [&](int threads) { return pointwise_workspace<T>(args, threads); },
          [&](void* workspace, const Team& team) { pointwise<T>(args, workspace, team); });
  if (winograd_takes<T>(args))
    return visit(
        winograd_name<T>(args), [&](int threads) { return winograd_workspace<T>(args, threads); },
        [&](void* workspace, const Team& team) { winograd<T>(args, workspace, team); });
  return visit(
      conv_product_name<T>(args, "conv_gemm", "conv_gemm_bf16"),
      [&](int threads) { return conv_gemm_workspace<T>(args, threads); },
      [&](void* workspace, const Team& team) { conv_gemm<T>(args, workspace, team); });
}

template <class Args>
KernelName conv_name(const Args& call) {
  const Args args = canonical(call);
  return with_dtype(args.dtype, [&](auto t) {
    return with_algorithm<decltype(t)>(args, [](KernelName name, auto&&, auto&&) { return name; });
  });
}

template <class Args>
size_t conv_workspace(const Args& call, int threads) {
  if (is_empty(call)) return 0;
  const Args args = canonical(call);
  return with_dtype(args.dtype, [&](auto t) {
    return with_algorithm<decltype(t)>(
        args, [&](KernelName, auto&& workspace, auto&&) -> size_t { return workspace(threads); });
  });
}

template <class Args>
void conv(const Args& call, void* workspace, const Team& team) {
  if (is_empty(call)) return;
  const Args args = canonical(call);
  with_dtype(args.dtype, [&](auto t) {
    with_algorithm<decltype(t)>(args, [&](KernelName, auto&&, auto&& run) { run(workspace, team); });
  });
}

size_t conv_forward_workspace(const ConvForward& args, int threads) { return conv_workspace(args, threads); }
void conv_forward(const ConvForward& args, void* workspace, const Team& team) { conv(args, workspace, team); }
KernelName conv_forward_name(const ConvForward& args) { return conv_name(args); }
size_t conv_backward_input_workspace(const ConvBackwardInput& args, int threads) {
  return conv_workspace(args, threads);
}
void conv_backward_input(const ConvBackwardInput& args, void* workspace, const Team& team) {
  conv(args, workspace, team);
}
KernelName conv_backward_input_name(const ConvBackwardInput& args) { return conv_name(args); }
size_t conv_backward_weight_workspace(const ConvBackwardWeight& args, int threads) {
  return conv_workspace(args, threads);
}
void conv_backward_weight(const ConvBackwardWeight& args, void* workspace, const Team& team) {
  conv(args, workspace, team);
}
KernelName conv_backward_weight_name(const ConvBackwardWeight& args) { return conv_name(args); }
