// The tier's planners as one constant table, and its peak rates. calls.h includes the bodies first.
#pragma once

#include "peak.inl"
#include "planning.inl"

template <class Call>
void fill_plan(Plan<Call>& plan) {
  plan.tier = kTier;
  plan_call(plan);
}

template <class... Calls>
constexpr KernelTable table_of(const PlannersOf<Calls...>*) {
  return {kTier, {Planner<Calls>{fill_plan<Calls>}...}, peak_f32, peak_bf16};
}

constexpr KernelTable kTable = table_of(static_cast<const Planners*>(nullptr));
