// How the bodies of a tier fill plans.
#pragma once

#include "numbers.inl"

// Whether this library only runs models (common/inference.h): what training alone asks of a call, and float16 and
// float64, have no kernels then.
#if defined(FASTOPS_INFERENCE)
constexpr bool kInference = true;
#else
constexpr bool kInference = false;
#endif
// Whether this tier leaves convolutions without products to the next one, whose kernels are the same.
#if defined(FASTOPS_HAS_AMX)
constexpr bool kHandsDown = kInference;
#else
constexpr bool kHandsDown = false;
#endif

// A call and its pointers in one, as kernels read them.
template <class Call>
struct Bound : Call, Call::Pointers {
  Bf16Multiply bf16_multiply;
  int threads;  // that the workspace was counted for; a run may get fewer
};

template <class Call>
inline Bound<Call> bind(const Plan<Call>& plan, const typename Call::Pointers& pointers) {
  return {plan.call, pointers, plan.target.bf16_multiply, plan.target.threads};
}

// The address of an operand before there is one: aligned as the call says, and far enough from both ends of memory that
// offsets of it are addresses.
inline void* planned_address(int alignment) {
  return reinterpret_cast<void*>((uintptr_t{1} << 40) | static_cast<uintptr_t>(alignment));
}

// run(args, decision, workspace, team) is what the plan does. It has no state: all that it needs is in the decision.
template <class Call, class Decision, class Run>
inline void decide(Plan<Call>& plan, const KernelName& name, size_t workspace, const Decision& decision, Run) {
  static_assert(sizeof(Decision) <= Plan<Call>::kDecisionBytes && alignof(Decision) <= 8 &&
                __is_trivially_copyable(Decision) && __is_empty(Run));
  plan.name = name;
  plan.workspace = workspace;
  __builtin_memcpy(plan.decisions, &decision, sizeof decision);
  plan.runner = [](const Plan<Call>& plan, const typename Call::Pointers& pointers, void* workspace,
                   const Queue& queue) -> Status {
    const Bound<Call> args = bind(plan, pointers);
    const Team team{smaller<int>(queue.team.threads, plan.target.threads), queue.team.run};
    Run{}(args, *reinterpret_cast<const Decision*>(plan.decisions), workspace, team);
    return {};
  };
}

// The same for run(args, workspace, team), where the choice of the kernel is all there is to decide.
struct Nothing {};
template <class Call, class Run>
inline void decide(Plan<Call>& plan, const KernelName& name, size_t workspace, Run) {
  decide(plan, name, workspace, Nothing{},
         [](auto& args, auto&, auto* workspace, auto& team) { Run{}(args, workspace, team); });
}

// A call without outputs.
template <class Call>
inline void decide_nothing(Plan<Call>& plan) {
  decide(plan, {"none"}, 0, [](auto&, auto*, auto&) {});
}

// For calls that no body of this tier plans.
template <class Call>
void plan_call(Plan<Call>&) {}

// For float32 calls that the amx tier has no kernel for; the others are planned in their rooms.
template <class Call>
void plan_float32(Plan<Call>&) {}
