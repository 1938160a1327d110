#include "softmax.cuh"

#include "../../common/cuda/planners.h"

namespace fastops::cuda {
namespace {

// Launches the kernel for rows or for strips: rows(threads) is the former.
template <class S, class Call, class Rows>
Status launch_softmax(const Call& call, SoftmaxTask<S> task, Stream stream, Rows rows, void (*strips)(SoftmaxTask<S>)) {
  task.log = call.log;
  task.rows = call.outer * call.inner;
  task.size = call.size;
  task.inner = call.inner;
  task.vectors = vector_aligned(task.x, call.size) && vector_aligned(task.grad_y, 0) && vector_aligned(task.result, 0);
  if (call.inner == 1) return launch_rows<S>("softmax_rows", call.outer, call.size, kRowShared<S>, task, stream, rows);
  return launch(
      {{"softmax_strips"}, call.outer * quotient_up(call.inner, 32), kThreads, kThreads * sizeof(Compute<S>), stream},
      strips, task);
}

template <class S>
Status run(const SoftmaxForward& call, const SoftmaxForward::Pointers& p, Stream stream) {
  SoftmaxTask<S> task{};
  task.x = static_cast<const S*>(p.x);
  task.result = static_cast<S*>(p.y);
  return launch_softmax(
      call, task, stream, [](auto threads) { return softmax_forward_kernel<S, threads.value>; },
      softmax_forward_strips_kernel<S>);
}

template <class S>
Status run(const SoftmaxBackward& call, const SoftmaxBackward::Pointers& p, Stream stream) {
  SoftmaxTask<S> task{};
  task.x = static_cast<const S*>(p.y);
  task.grad_y = static_cast<const S*>(p.grad_y);
  task.result = static_cast<S*>(p.grad_x);
  return launch_softmax(
      call, task, stream, [](auto threads) { return softmax_backward_kernel<S, threads.value>; },
      softmax_backward_strips_kernel<S>);
}

// A run looks at the alignment of its pointers, as only the width of its accesses depends on it.
template <class Call>
void plan_softmax(Plan<Call>& plan) {
  with_dtype(plan.call.dtype, [&](auto type) {
    decide(plan, {plan.call.inner == 1 ? "rows" : "strips"}, 0, 0,
           [](const Call& call, int, const typename Call::Pointers& p, char*, Stream stream) {
             return run<decltype(type)>(call, p, stream);
           });
  });
}

}  // namespace

void plan_call(Plan<SoftmaxForward>& plan) { plan_softmax(plan); }
void plan_call(Plan<SoftmaxBackward>& plan) { plan_softmax(plan); }

}  // namespace fastops::cuda
