// The one way from the torch layer to a kernel: run(call, pointers, ...), on the CPU or a GPU. What was decided for a
// call is kept for the next one that is the same.
#pragma once

#include <ATen/core/Tensor.h>

#include <atomic>
#include <memory>

#include "../kernels/common/cpu/isa.h"
#include "check.h"
#include "gpu.h"
#include "memory.h"
#include "record.h"
#include "team.h"

namespace fastops {

// The alignment of the least aligned of these addresses, at most 64; null counts as aligned.
inline int alignment_of(std::initializer_list<const void*> addresses) {
  uintptr_t bits = 64;
  for (const void* address : addresses) bits |= reinterpret_cast<uintptr_t>(address);
  return static_cast<int>(bits & -bits);
}

// How often a thread of this process had to decide; for tests.
inline std::atomic<int64_t> plans_made{0};

// The plans that a thread has made, for the calls of one kind. A slot holds the newest of the calls that fall into it,
// so a model with more different calls than slots plans some of them again. A plan is good for the same call on the
// same kernels (tier, device) with the same number of threads.
template <class Call>
class Plans {
 public:
  const Plan<Call>& find(const Call& call, const Planners& planners, int device, int threads) {
    if (slots_ == nullptr) slots_ = std::make_unique<Slot[]>(kSlots);
    Slot& slot = slots_[spread(call) % kSlots];
    if (slot.planners != &planners || slot.device != device || slot.plan.target.threads != threads ||
        !(slot.call == call)) {
      plans_made.fetch_add(1, std::memory_order_relaxed);
      slot.plan = planners.plan(call, {.threads = threads});
      slot.call = call;
      slot.device = device;
      slot.planners = &planners;
    }
    return slot.plan;
  }

 private:
  static constexpr size_t kSlots = 64;
  struct Slot {
    Call call;
    const Planners* planners = nullptr;
    int device = 0;
    Plan<Call> plan;
  };

  template <size_t n>
  static uint64_t mixed(const int64_t (&sizes)[n]) {
    uint64_t value = 0;
    for (const int64_t size : sizes) value = (value ^ static_cast<uint64_t>(size)) * 0x9e3779b97f4a7c15u;
    return value >> 32;
  }
  // From what differs between the layers of a model.
  static uint64_t spread(const Call& c) {
    if constexpr (requires { c.weight.blocks; })
      return mixed({c.images, c.m, c.weight.n, c.weight.k, c.weight.blocks});
    else if constexpr (requires { c.geometry.out_channels; })
      return mixed({c.geometry.batch, c.geometry.in_channels, c.geometry.out_channels, c.geometry.in[1],
                    c.geometry.in[2], c.geometry.kernel[2], c.geometry.stride[2]});
    else if constexpr (requires { c.geometry; })
      return mixed({c.geometry.batch, c.geometry.channels, c.geometry.in[1], c.geometry.in[2], c.geometry.kernel[2]});
    else if constexpr (requires { c.shape; })
      return mixed({c.shape.m, c.shape.layers, c.shape.widths[0], c.shape.widths[1]});
    else if constexpr (requires { c.m; })
      return mixed({c.m, c.n, c.k});
    else if constexpr (requires { c.rows; })
      return mixed({c.rows, c.cols, static_cast<int64_t>(c.activation.kind)});
    else if constexpr (requires { c.channels; })
      return mixed({c.outer, c.channels, c.inner});
    else if constexpr (requires { c.outer; })
      return mixed({c.outer, c.inner});
    else
      return 0;
  }

  std::unique_ptr<Slot[]> slots_;
};

// This thread's plan for the call, on the CPU or the current GPU. It is good until the thread's next call.
template <class Call>
const Plan<Call>& planned(const Call& call, at::Device device, const Team& team) {
  static thread_local Plans<Call> plans;
  if (device.is_cpu()) return plans.find(call, kernels_of(call).planners, -1, team.threads);
  return plans.find(call, gpu::planners(), device.index(), 1);
}

// The floating point operations that the formula of a call asks for; 0 where that is no product.
template <class Call>
double flops_of(const Call& c) {
  double products = 1;  // with_grad_x and with_grad_w: each is one as large as forward's
  if constexpr (requires { c.with_grad_x, c.with_grad_w; })
    products = (c.with_grad_x ? 1 : 0) + (c.with_grad_w ? 1 : 0);
  else if constexpr (requires { c.with_grad_w; })
    products = c.with_grad_w ? 1 : 0;
  const auto times = [](auto... sizes) { return (2.0 * ... * static_cast<double>(sizes)); };
  if constexpr (requires { c.weight.blocks; }) {
    if constexpr (requires { c.with_grad_x; }) products = (c.with_grad_x ? 1 : 0) + (c.with_grad_values ? 1 : 0);
    return products * times(c.images, c.m, c.weight.blocks, c.weight.block_rows, c.weight.block_cols);
  } else if constexpr (requires { c.geometry.out_channels; }) {
    const ConvGeometry& g = c.geometry;
    return products * times(g.batch, g.out_channels, g.in_channels / g.groups, g.out[0], g.out[1], g.out[2],
                            g.kernel[0], g.kernel[1], g.kernel[2]);
  } else if constexpr (requires { c.attention.queries; }) {
    const AttentionShape& a = c.attention;
    const double scores = times(a.batch, a.heads, a.queries, a.keys, a.size);
    const double values = times(a.batch, a.heads, a.queries, a.keys, a.value_size);
    constexpr bool backward = requires { c.grad_y_strides; };  // computes the scores once more
    return backward ? 3 * scores + 2 * values : scores + values;
  } else if constexpr (requires { c.shape.layers; }) {
    double sum = 0;
    for (int l = 0; l < c.shape.layers; ++l) sum += times(c.shape.m, c.shape.widths[l], c.shape.widths[l + 1]);
    constexpr bool backward = requires { c.grad_y_row_stride; };
    return backward ? 2 * sum : sum;
  } else if constexpr (requires { c.wide_channels; }) {
    const double expand = c.with_expand ? times(c.batch, c.in[0], c.in[1], c.in_channels, c.wide_channels) : 0;
    const double taps = static_cast<double>(c.kernel[0] * c.kernel[1] + (c.with_project ? c.out_channels : 0));
    return expand + taps * times(c.batch, c.out[0], c.out[1], c.wide_channels);
  } else if constexpr (requires { c.m, c.n, c.k; }) {
    return products * times(c.m, c.n, c.k);
  } else {
    return 0;
  }
}

// Runs the kernel for this call on the device of its operands. row() is what record() and errors show, but for the
// kernel's name.
template <class Call, class Describe>
void run(const Call& call, const typename Call::Pointers& pointers, at::Device device, Describe&& row) {
  const auto named = [&](const Plan<Call>& plan) {
    record::Row result = row();
    result.kernel = record::kernel_text(plan.name, plan.tier);
    result.flops = flops_of(call);
    return result;
  };
  const auto check = [&](const Plan<Call>& plan) {
    TORCH_CHECK(plan.runner != nullptr, row().op, ": there is no kernel for tensors on ", device);
  };
  if (device.is_cpu()) {
    const Team team = torch_team();
    const Plan<Call>& plan = planned(call, device, team);
    check(plan);
    const Workspace workspace(plan.workspace);
    record::timed([&] { return named(plan); }, [&] { plan.run(pointers, workspace.get(), team); });
    return;
  }
  const gpu::Current current(device);
  const Plan<Call>& plan = planned(call, device, {});
  check(plan);
  const gpu::Workspace workspace(plan.workspace, device);
  Status status;
  // The recorded time ends when the work is queued; it does not wait for the device.
  record::timed([&] { return named(plan); },
                [&] { status = plan.run(pointers, workspace.get(), gpu::current_stream(device)); });
  if (!status.ok()) gpu::throw_failed(status, named(plan));
}

}  // namespace fastops
