// batch_norm_forward and batch_norm_backward: which kernels a call gets.
#pragma once

#include "backward.inl"

void plan_call(Plan<BatchNormForward>& plan) {
  if (kInference && plan.call.training) return;
  with_dtype(plan.call.dtype, [&](auto type) {
    using S = decltype(type);
    const NormForwardKernels<S> kernels = forward_kernels<S>(plan.call);
    const KernelName name = {kernels.walk.rows() ? "channels_last" : "channels_first"};
    decide(plan, name, Workspace<Compute<S>>::bytes(kernels.walk, plan.target.threads), kernels,
           [](auto& args, auto& kernels, auto* memory, auto& team) {
             batch_norm_forward<S>(args, kernels, memory, team);
           });
  });
}

void plan_call(Plan<BatchNormBackward>& plan) {
  with_dtype(plan.call.dtype, [&](auto type) {
    using S = decltype(type);
    const NormBackwardKernels<S> kernels = backward_kernels<S>(plan.call);
    const KernelName name = {kernels.walk.rows() ? "channels_last" : "channels_first"};
    decide(plan, name, Workspace<Compute<S>>::bytes(kernels.walk, plan.target.threads), kernels,
           [](auto& args, auto& kernels, auto* memory, auto& team) {
             batch_norm_backward<S>(args, kernels, memory, team);
           });
  });
}
