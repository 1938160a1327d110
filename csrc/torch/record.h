// What those who look see of an op: one row per kernel call for fastops.record() and FASTOPS_VERBOSE=1, and one event
// per call for PyTorch's profiler and its other observers.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/record_function.h>

#include <atomic>
#include <chrono>
#include <initializer_list>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "../kernels/common/kernel_name.h"

namespace fastops::record {

struct Row {
  std::string op, kernel, shapes, dtype;
  double microseconds = 0;
  double flops = 0;  // that the formula asks for; 0 where that is no product
  double begin = 0;  // microseconds of the steady clock, which Python calls time.perf_counter
  int64_t thread = 0;
};

extern std::atomic<int> listeners;
inline bool enabled() { return listeners.load(std::memory_order_relaxed) != 0; }  // whether somebody listens
void start();                                                                     // begins a recording; recordings nest
std::vector<Row> stop();  // ends the innermost one: its rows, in order of call
void add(Row row);        // of this thread

// The name of a kernel by the rule of csrc/kernels/common/kernel_name.h: "gemm_12x32_avx512".
std::string kernel_text(const KernelName& name, const char* tier);

std::string shapes_of(std::initializer_list<at::Tensor> tensors);  // "16x10, 5x10, 5"; undefined ones are left out

// Runs the call; when somebody listens, also times it and adds the row that describe() returns without its time.
template <class Describe, class Call>
void timed(Describe&& describe, Call&& call) {
  if (!enabled()) {
    call();
    return;
  }
  const auto begin = std::chrono::steady_clock::now();
  call();
  const std::chrono::duration<double, std::micro> elapsed = std::chrono::steady_clock::now() - begin;
  Row row = describe();
  row.microseconds = elapsed.count();
  row.begin = std::chrono::duration<double, std::micro>(begin.time_since_epoch()).count();
  add(std::move(row));
}

// An event of PyTorch's observers, such as the profiler. Tensors are given one by one, lists of them one after the
// other.
class Event {
 public:
  explicit Event(at::StepCallbacks&& callbacks) : event_(std::move(callbacks)) {}

  void take(const at::Tensor& tensor);
  void take(const std::optional<at::Tensor>& tensor);
  void take(at::TensorList tensors);
  void begin(std::string_view op);  // fastops::<op> on what has been taken
  void end(at::TensorList outputs);

 private:
  at::RecordFunction event_;
  std::vector<c10::IValue> values_;
};

// Runs the call as such an event, fastops::<op()> on these inputs. PyTorch's dispatcher does that for what comes
// through the general door. Costs a look at a thread-local list where nobody listens.
template <class Op, class Call, class... Inputs>
auto observed(Op&& op, Call&& call, const Inputs&... inputs) {
  auto callbacks = at::getStepCallbacksUnlessEmpty(at::RecordScope::FUNCTION);
  if (!callbacks.has_value()) return call();
  Event event(std::move(*callbacks));
  (event.take(inputs), ...);
  event.begin(op());
  auto result = call();
  event.end(result);
  return result;
}

// The name of an op's node: FastopsMaxPool2dBackward for "max_pool2d".
std::string node_name(std::string_view op);

}  // namespace fastops::record
