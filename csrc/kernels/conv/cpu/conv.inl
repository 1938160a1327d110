// The entry points of convolution, and the choice of the algorithm. The contract is csrc/kernels/conv/conv.h.
#pragma once

#include "../../common/cpu/common.inl"
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

inline bool is_empty(const Bound<ConvForward>& args) {
  return args.geometry.batch * args.geometry.out_channels * volume(args.geometry.out) == 0;
}
inline bool is_empty(const Bound<ConvBackwardInput>& args) {
  return args.geometry.batch * args.geometry.in_channels * volume(args.geometry.in) == 0;
}
inline bool is_empty(const Bound<ConvBackwardWeight>& args) {
  return args.geometry.out_channels == 0 || (args.grad_w == nullptr && args.grad_bias == nullptr);
}

// Decides for the first algorithm in this order whose *_takes is true. Each of them accepts the calls for which it was
// measured to be the fastest on Granite Rapids; the measurements are in its file. The matrix product computes all other
// calls.
template <class T, class Call>
void plan_algorithm(Plan<Call>& plan, const Bound<Call>& args) {
  const int threads = plan.target.threads;
  if constexpr (same_type<Call, ConvForward>) {
    if (args.residual != nullptr) {
      if (!same_type<T, Compute<T>> || depthwise_takes<T>(args) || depthwise_last_takes<T>(args)) return;
      if (pointwise_takes(args)) return plan_pointwise<T>(plan, args);
      if (winograd_takes<T>(args)) return plan_winograd(plan, args);
      return plan_implicit_gemm<T>(plan, args);
    }
  }
  if (depthwise_takes<T>(args)) {
    const DepthwisePlan bands = plan_depthwise<T>(args, threads);
    return decide(
        plan, is_depthwise(args.geometry) ? kDepthwiseName : kPlanesName, static_cast<size_t>(bands.total()), bands,
        [](auto& args, auto& bands, auto* workspace, auto& team) { depthwise<T>(args, bands, workspace, team); });
  }
  if (depthwise_last_takes<T>(args)) {
    const LastPlan bands = plan_depthwise_last<T>(args, threads);
    return decide(
        plan, kDepthwiseLastName, static_cast<size_t>(bands.total()), bands,
        [](auto& args, auto& bands, auto* workspace, auto& team) { depthwise_last<T>(args, bands, workspace, team); });
  }
  if constexpr (same_type<Call, ConvForward>) {
    if (conv_first_takes<T>(args)) {
      const FirstPlan bands = plan_first<Compute<T>>(args.geometry, threads);
      return decide(
          plan, conv_first_name<T>(), static_cast<size_t>(bands.total), bands,
          [](auto& args, auto& bands, auto* workspace, auto& team) { conv_first<T>(args, bands, workspace, team); });
    }
  }
  if constexpr (same_type<Call, ConvBackwardInput>)
    if (conv_scatter_takes<T>(args)) return plan_scatter<T>(plan, args);
  if constexpr (!same_type<Call, ConvBackwardWeight>)
    if (pointwise_takes(args)) return plan_pointwise<T>(plan, args);
  if (winograd_takes<T>(args)) return plan_winograd(plan, args);
  plan_implicit_gemm<T>(plan, args);
}

template <class Call>
void plan_conv(Plan<Call>& plan, const typename Call::Pointers& pointers) {
  plan.call.geometry = canonical(plan.call.geometry);
  const Bound<Call> args = bind(plan, pointers);
  if (is_empty(args)) return decide_nothing(plan);
  with_dtype(args.dtype, [&](auto type) { plan_algorithm<decltype(type)>(plan, args); });
}

inline ConvForward::Pointers planned_pointers(const ConvForward& call) {
  void* const p = planned_address(call.alignment);
  return {p, p, call.with_bias ? p : nullptr, p, call.with_z ? p : nullptr, call.with_residual ? p : nullptr};
}
inline ConvBackwardInput::Pointers planned_pointers(const ConvBackwardInput& call) {
  void* const p = planned_address(call.alignment);
  return {p, p, p, call.with_bias ? p : nullptr, p, call.with_z ? p : nullptr};
}
inline ConvBackwardWeight::Pointers planned_pointers(const ConvBackwardWeight& call) {
  void* const p = planned_address(call.alignment);
  return {p, p, p, call.with_grad_w ? p : nullptr, call.with_grad_bias ? p : nullptr};
}

void plan_call(Plan<ConvForward>& plan) { plan_conv(plan, planned_pointers(plan.call)); }
void plan_call(Plan<ConvBackwardInput>& plan) { plan_conv(plan, planned_pointers(plan.call)); }
void plan_call(Plan<ConvBackwardWeight>& plan) { plan_conv(plan, planned_pointers(plan.call)); }

#if defined(FASTOPS_HAS_AMX)
template <class Call>
void plan_pointwise_by_parts(Plan<Call>& plan) {
  plan.call.geometry = canonical(plan.call.geometry);
  const Bound<Call> args = bind(plan, planned_pointers(plan.call));
  if (is_empty(args)) return;
  if (pointwise_takes(args))
    plan_linear_by_parts(plan, args, AsLinear{});
  else if (planes_take(args))
    plan_planes_by_parts(plan, args);
}
void plan_float32(Plan<ConvForward>& plan) { plan_pointwise_by_parts(plan); }
void plan_float32(Plan<ConvBackwardInput>& plan) { plan_pointwise_by_parts(plan); }
void plan_float32(Plan<ConvBackwardWeight>& plan) { plan_pointwise_by_parts(plan); }
#endif
