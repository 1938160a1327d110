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
  if (kHandsDown && (depthwise_takes<T>(args) || depthwise_last_takes<T>(args))) return;  // these have no products
  if (!kHandsDown && depthwise_takes<T>(args)) {
    const DepthwisePlan bands = plan_depthwise<T>(args, threads);
    return decide(
        plan, is_depthwise(args.geometry) ? kDepthwiseName : kPlanesName, static_cast<size_t>(bands.total()), bands,
        [](auto& args, auto& bands, auto* workspace, auto& team) { depthwise<T>(args, bands, workspace, team); });
  }
  if (!kHandsDown && depthwise_last_takes<T>(args)) {
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
// 1x1 with a stride, in channels_last. The pixels that are read are copied together; they are then the matrix of a
// layer without a stride, which is multiplied by parts where that is the faster way.
inline bool is_strided_pointwise(const ConvGeometry& g) {
  bool strided = false, inside = g.groups == 1;
  for (int d = 0; d < 3; ++d) {
    inside = inside && g.kernel[d] == 1 && g.padding[d] == 0 && g.out[d] == ceil_div(g.in[d], g.stride[d]);
    strided = strided || (g.stride[d] > 1 && g.in[d] > 1);
  }
  return inside && strided;
}

inline Plan<ConvForward> plan_without_stride(const ConvForward& call, const Target& target) {
  Plan<ConvForward> dense;
  dense.call = call;
  dense.target = target;
  for (int d = 0; d < 3; ++d) {
    dense.call.geometry.in[d] = call.geometry.out[d];
    dense.call.geometry.stride[d] = 1;
  }
  plan_linear_by_parts(dense, bind(dense, planned_pointers(call)), AsLinear{});
  return dense;
}

// The elements that a thread copies at least.
constexpr int64_t kCopyGrain = 64 << 10;

inline void copy_strided_pixels(const Bound<ConvForward>& args, float* to, const Team& team) {
  const ConvGeometry& g = args.geometry;
  const int64_t channels = g.in_channels, lines = g.batch * g.out[0] * g.out[1], line = g.out[2] * channels;
  parallel(team, threads_for(team, lines * line, lines, kCopyGrain), [&](Crew& crew) {
    crew.each(lines, [&](int64_t i) {
      const int64_t p1 = i % g.out[1], p0 = i / g.out[1] % g.out[0], image = i / g.out[1] / g.out[0];
      const int64_t row = (image * g.in[0] + p0 * g.stride[0]) * g.in[1] + p1 * g.stride[1];
      const float* const from = static_cast<const float*>(args.x) + row * g.in[2] * channels;
      for (int64_t p = 0; p < g.out[2]; ++p)
        copy_runs(from + p * g.stride[2] * channels, 0, 1, channels, to + i * line + p * channels, 0);
    });
  });
}

inline void plan_strided_by_parts(Plan<ConvForward>& plan, const Bound<ConvForward>& args) {
  const Plan<ConvForward> dense = plan_without_stride(args, plan.target);
  if (dense.runner == nullptr) return;  // multiply-adds search the pixels while they pack
  const ConvGeometry& g = args.geometry;
  const size_t copy = aligned(g.batch * volume(g.out) * g.in_channels * static_cast<int64_t>(sizeof(float)));
  decide(plan, dense.name, copy + dense.workspace, copy, [](auto& args, auto& copy, auto* workspace, auto& team) {
    unsigned char* const bytes = static_cast<unsigned char*>(workspace);
    copy_strided_pixels(args, reinterpret_cast<float*>(bytes), team);
    const Plan<ConvForward> dense = plan_without_stride(args, {args.threads, args.bf16_multiply});
    dense.run({bytes, args.w, args.bias, args.y, args.z, args.residual}, bytes + copy, team);
  });
  if (dense.packed == 0) return;
  plan.packed = dense.packed;
  plan.packer = [](const Plan<ConvForward>& plan, const void* w, void* to) {
    plan_without_stride(plan.call, plan.target).pack(w, to);
  };
}

template <class Call>
void plan_pointwise_by_parts(Plan<Call>& plan) {
  plan.call.geometry = canonical(plan.call.geometry);
  const Bound<Call> args = bind(plan, planned_pointers(plan.call));
  if (is_empty(args)) return;
  if (pointwise_takes(args)) return plan_linear_by_parts(plan, args, AsLinear{});
  if (planes_take(args)) return plan_planes_by_parts(plan, args);
  if constexpr (same_type<Call, ConvForward>)
    if (args.layout == Layout::channels_last && is_strided_pointwise(args.geometry)) plan_strided_by_parts(plan, args);
}
void plan_float32(Plan<ConvForward>& plan) { plan_pointwise_by_parts(plan); }
void plan_float32(Plan<ConvBackwardInput>& plan) { plan_pointwise_by_parts(plan); }
void plan_float32(Plan<ConvBackwardWeight>& plan) { plan_pointwise_by_parts(plan); }
#endif
