// fastops for C++: the kernels without torch. Link libfastops and include this file; it needs C++20.
//
//   fastops::LinearForward call{.dtype = fastops::DType::f32, .m = rows, .n = out, .k = in, ...};   // <op>/<op>.h
//   auto plan = fastops::plan_linear(call);              // decides how it will be done
//   fastops::Scratch scratch(plan.workspace);
//   plan.run({.x = x, .w = w, .y = y}, scratch.get());   // as often as wanted, on any pointers
//
// plan_conv and plan_pool take several kinds of calls, so name the one: plan_conv(ConvForward{...}). PReLU, GLU and
// conv + pool go through Cpu{threads}.plan(call). A plan for several threads is run by a Team (common/parallel.h),
// which the caller brings. A call that the contracts forbid is not checked.
#pragma once

#include <new>

#include "common/calls.h"
#include "common/cpu/isa.h"

namespace fastops {

// The CPU, with at most this many threads.
struct Cpu {
  int threads = 1;

  template <class Call>
  Plan<Call> plan(const Call& call) const {
    return kernels_of(call).planners.plan(call, {.threads = threads});
  }
};

inline auto plan_linear(const LinearForward& call, Cpu cpu = {}) { return cpu.plan(call); }
inline auto plan_linear(const LinearBackward& call, Cpu cpu = {}) { return cpu.plan(call); }
inline auto plan_conv(const ConvForward& call, Cpu cpu = {}) { return cpu.plan(call); }
inline auto plan_conv(const ConvBackwardInput& call, Cpu cpu = {}) { return cpu.plan(call); }
inline auto plan_conv(const ConvBackwardWeight& call, Cpu cpu = {}) { return cpu.plan(call); }
inline auto plan_pool(const MaxPoolForward& call, Cpu cpu = {}) { return cpu.plan(call); }
inline auto plan_pool(const MaxPoolBackward& call, Cpu cpu = {}) { return cpu.plan(call); }
inline auto plan_pool(const AvgPoolForward& call, Cpu cpu = {}) { return cpu.plan(call); }
inline auto plan_pool(const AvgPoolBackward& call, Cpu cpu = {}) { return cpu.plan(call); }
inline auto plan_activation(const ActivationForward& call, Cpu cpu = {}) { return cpu.plan(call); }
inline auto plan_activation(const ActivationBackward& call, Cpu cpu = {}) { return cpu.plan(call); }

// 64-byte aligned memory for a plan's workspace or packed weight.
class Scratch {
 public:
  explicit Scratch(size_t bytes) : data_(::operator new(bytes, std::align_val_t{64})) {}
  ~Scratch() { ::operator delete(data_, std::align_val_t{64}); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  void* get() const { return data_; }

 private:
  void* data_;
};

}  // namespace fastops
