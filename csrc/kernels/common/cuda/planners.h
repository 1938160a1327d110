// The planners. Each is defined beside its kernels, in <stem>.cu.
#pragma once

#include <cstring>
#include <type_traits>

#include "kernels.h"

namespace fastops::cuda {

void plan_call(Plan<ActivationForward>&);
void plan_call(Plan<ActivationBackward>&);
void plan_call(Plan<PreluForward>&);
void plan_call(Plan<PreluBackward>&);
void plan_call(Plan<GluForward>&);
void plan_call(Plan<GluBackward>&);
void plan_call(Plan<LinearForward>&);
void plan_call(Plan<LinearBackward>&);
void plan_call(Plan<MlpForward>&);
void plan_call(Plan<MlpBackward>&);
void plan_call(Plan<ConvForward>&);
void plan_call(Plan<ConvBackwardInput>&);
void plan_call(Plan<ConvBackwardWeight>&);
void plan_call(Plan<MaxPoolForward>&);
void plan_call(Plan<MaxPoolBackward>&);
void plan_call(Plan<AvgPoolForward>&);
void plan_call(Plan<AvgPoolBackward>&);
void plan_call(Plan<BatchNormForward>&);
void plan_call(Plan<BatchNormBackward>&);
void plan_call(Plan<LayerNormForward>&);
void plan_call(Plan<LayerNormBackward>&);
void plan_call(Plan<SoftmaxForward>&);
void plan_call(Plan<SoftmaxBackward>&);
void plan_call(Plan<CrossEntropyForward>&);
void plan_call(Plan<CrossEntropyBackward>&);
void plan_call(Plan<MseForward>&);
void plan_call(Plan<MseBackward>&);
void plan_call(Plan<SgdStep>&);
void plan_call(Plan<AdamStep>&);
void plan_call(Plan<AttentionForward>&);
void plan_call(Plan<AttentionBackward>&);

// The gradient of a pre-activation, for ops that form it before their own kernels. chip: multiprocessors().
Status activation_backward(const ActivationBackward&, const ActivationBackward::Pointers&, int64_t chip, Stream);

// Fills a plan. `decision` is what its runs need to know of the choice: body(call, decision, pointers, workspace,
// stream) returns the Status of one. body captures nothing.
template <class Call, class Decision, class Body>
void decide(Plan<Call>& plan, const KernelName& name, size_t workspace, const Decision& decision, Body) {
  static_assert(std::is_trivially_copyable_v<Decision> && std::is_empty_v<Body>);
  static_assert(sizeof(Decision) <= Plan<Call>::kDecisionBytes && alignof(Decision) <= 8);
  plan.name = name;
  plan.tier = kTier;
  plan.workspace = (workspace + 255) / 256 * 256;  // so that memory that ends where it should begins aligned
  std::memcpy(plan.decisions, &decision, sizeof decision);
  plan.runner = [](const Plan<Call>& made, const typename Call::Pointers& pointers, void* memory, const Queue& queue) {
    return Body{}(made.call, *reinterpret_cast<const Decision*>(made.decisions), pointers, static_cast<char*>(memory),
                  queue.stream);
  };
}

}  // namespace fastops::cuda
