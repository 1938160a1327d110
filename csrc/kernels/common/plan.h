// Plans: how a call will be done, decided once.
//
// A call (LinearForward, ConvBackwardWeight ...) is everything but the pointers: shapes, strides, dtypes, options. A
// planner of a device chooses the kernel for it and its block sizes. The Plan that it fills can be kept, copied, and
// run any number of times, by several threads at once, on any pointers that fit the call.
#pragma once

#include "kernel_name.h"
#include "parallel.h"
#include "tensor.h"

struct CUstream_st;

namespace fastops {

namespace cuda {
using Stream = CUstream_st*;  // cudaStream_t
}

// The result of a run. Kernels of the CPU do not fail. A launch on a GPU does not throw and does not wait for the
// device; if one of several launches fails, no further one is made and that one is reported.
struct Status {
  int error = 0;  // cudaError_t
  const char* message = nullptr;
  KernelName kernel;
  unsigned blocks = 0, threads = 0;
  size_t shared = 0;  // bytes of shared memory per block

  bool ok() const { return error == 0; }
};

// Where a plan runs: on the threads of a team, or on a stream of the current CUDA device.
struct Queue {
  Team team;
  cuda::Stream stream = nullptr;

  Queue() = default;
  Queue(const Team& threads) : team(threads) {}
  Queue(cuda::Stream device) : stream(device) {}
};

// How bfloat16 products are computed on a tier with a bfloat16 instruction: by that instruction (`native`), or by
// float32 multiply-adds on panels converted to float32. And how float32 layers are on one with a matrix unit: by bf16
// parts (`native`) or by multiply-adds. `automatic` is the faster one on this processor; the other two are for tests
// and measurements.
enum class Bf16Multiply : int { automatic, float32, native };

// What a plan is made for, besides the device.
struct Target {
  int threads = 1;  // of the CPU: the most that a run uses
  Bf16Multiply bf16_multiply = Bf16Multiply::automatic;
};

template <class Call>
struct Plan {
  using Pointers = typename Call::Pointers;
  static constexpr size_t kDecisionBytes = 672;  // the products of a linear gradient on a GPU take most

  Call call{};
  Target target;
  // The kernel that computes this call, for record(). If a backward call needs several, it is the one that computes
  // grad_x, or without grad_x the one for grad_w.
  KernelName name;
  const char* tier = nullptr;
  size_t workspace = 0;  // bytes of scratch memory for a run: 64-byte aligned, on a GPU 256
  size_t packed = 0;     // bytes of the packed weight; 0 if it is read as it is

  // Null if the device has no kernel for this call.
  Status (*runner)(const Plan&, const Pointers&, void* workspace, const Queue&) = nullptr;
  void (*packer)(const Plan&, const void* w, void* packed) = nullptr;
  alignas(8) unsigned char decisions[kDecisionBytes];  // the planner's own: block sizes and the like

  // `workspace` bytes of scratch memory may be null if there are none. Their contents before and after are undefined.
  Status run(const Pointers& pointers, void* scratch, const Queue& queue = {}) const {
    return runner(*this, pointers, scratch, queue);
  }
  // Of a call with packed_w, if `packed` > 0: writes `packed` bytes, 64-byte aligned, which take the place of w in the
  // runs of this plan and its copies. Another plan, if only for another batch, may pack in another way.
  void pack(const void* w, void* to) const { packer(*this, w, to); }
};

template <class Call>
DType dtype_of(const Call& call) {
  if constexpr (requires { call.shape; })
    return call.shape.dtype;
  else
    return call.dtype;
}

// Fills everything of a plan but its call and target.
template <class Call>
struct Planner {
  void (*fill)(Plan<Call>&) = nullptr;
};

// One planner a call. calls.h has the list.
template <class... Calls>
struct PlannersOf : Planner<Calls>... {
  template <class Call>
  Plan<Call> plan(const Call& call, const Target& target = {}) const {
    Plan<Call> result;
    result.call = call;
    result.target = target;
    if (Planner<Call>::fill != nullptr) Planner<Call>::fill(result);
    return result;
  }
};

}  // namespace fastops
