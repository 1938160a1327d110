#include "loss.cuh"

#include "../../common/cuda/planners.h"

namespace fastops::cuda {
namespace {

// Blocks of the forward pass, each of which leaves its sums.
template <class S>
int64_t blocks_of(const CrossEntropyForward& call) {
  if (call.inner > 1) return call.outer * quotient_up(call.inner, 32);
  return with_row_threads<S>(call.classes,
                             [&](auto threads) { return quotient_up(call.outer, kThreads / threads.value); });
}

template <class S, class Call>
EntropyTask<S> task_of(const Call& call, const typename Call::Pointers& p) {
  EntropyTask<S> task{};
  task.positions = call.outer * call.inner;
  task.classes = call.classes;
  task.inner = call.inner;
  task.ignore_index = call.ignore_index;
  task.smooth = call.smoothing != 0;
  task.reduction = call.reduction;
  task.of_target = static_cast<Compute<S>>(1 - call.smoothing);
  task.of_all = static_cast<Compute<S>>(call.smoothing / static_cast<double>(call.classes));
  task.x = static_cast<const S*>(p.x);
  task.w = static_cast<const S*>(p.w);
  task.target = p.target;
  task.vectors = vector_aligned(task.x, call.classes);
  return task;
}

template <class S>
Status run(const CrossEntropyForward& call, int64_t, const CrossEntropyForward::Pointers& p, char* workspace,
           Stream stream) {
  EntropyTask<S> task = task_of<S>(call, p);
  task.statistics = static_cast<Compute<S>*>(p.statistics);
  task.y = static_cast<S*>(p.y);
  const bool with_sums = call.reduction != Reduction::none || p.statistics != nullptr;
  if (with_sums) task.sums = reinterpret_cast<LossSums*>(workspace);
  const int64_t blocks = blocks_of<S>(call);
  Status status;
  if (call.inner == 1)
    status = launch_rows<S>("cross_entropy_rows", call.outer, call.classes, kThreads / 32 * sizeof(LossSums), task,
                            stream, [](auto threads) { return entropy_rows_kernel<S, threads.value>; });
  else
    status = launch({{"cross_entropy_planes"}, blocks, kThreads, kThreads * sizeof(Compute<S>), stream},
                    entropy_planes_kernel<S>, task);
  if (!status.ok() || !with_sums) return status;
  return launch({{"cross_entropy_finish"}, 1, kThreads, kRowShared<double>, stream}, entropy_finish_kernel<S>, task,
                blocks);
}

template <class S>
Status run(const CrossEntropyBackward& call, int64_t, const CrossEntropyBackward::Pointers& p, char*, Stream stream) {
  EntropyTask<S> task = task_of<S>(call, p);
  task.statistics = static_cast<Compute<S>*>(const_cast<void*>(p.statistics));
  task.grad_y = static_cast<const S*>(p.grad_y);
  task.grad_x = static_cast<S*>(p.grad_x);
  task.vectors = task.vectors && vector_aligned(task.grad_x, 0);
  if (call.inner == 1)
    return launch_rows<S>("cross_entropy_backward_rows", call.outer, call.classes, kRowShared<S>, task, stream,
                          [](auto threads) { return entropy_backward_rows_kernel<S, threads.value>; });
  return launch(
      {{"cross_entropy_backward_planes"}, call.outer * quotient_up(call.inner, 32), kThreads, kRowShared<S>, stream},
      entropy_backward_planes_kernel<S>, task);
}

template <class S>
MseTask<S> task_of(int64_t n, Reduction reduction, const void* x, const void* t) {
  MseTask<S> task{};
  task.units = units_of<kVector<S>>(1, n);
  task.reduction = reduction;
  task.x = static_cast<const S*>(x);
  task.t = static_cast<const S*>(t);
  task.vectors = vector_aligned(task.x, 0) && vector_aligned(task.t, 0);
  return task;
}

template <class S>
int64_t blocks_of(const MseForward& call) {
  const int64_t units = units_of<kVector<S>>(1, call.n).units;
  return smaller(quotient_up(units, int64_t{kThreads} * kBatch<kVector<S>, sizeof(S)>),
                 multiprocessors() * kBlocksPerMultiprocessor);
}

template <class S>
Status run(const MseForward& call, int64_t blocks, const MseForward::Pointers& p, char* workspace, Stream stream) {
  MseTask<S> task = task_of<S>(call.n, call.reduction, p.x, p.t);
  task.y = static_cast<S*>(p.y);
  task.vectors = task.vectors && (call.reduction != Reduction::none || vector_aligned(task.y, 0));
  task.sums = reinterpret_cast<double*>(workspace);
  const Status status =
      launch({{"mse_forward"}, blocks, kThreads, kRowShared<double>, stream}, mse_forward_kernel<S>, task);
  if (!status.ok() || call.reduction == Reduction::none) return status;
  return launch({{"mse_finish"}, 1, kThreads, kRowShared<double>, stream}, mse_finish_kernel<S>, task, blocks,
                call.reduction == Reduction::mean ? static_cast<double>(call.n) : 1.0);
}

template <class S>
Status run(const MseBackward& call, int64_t chip, const MseBackward::Pointers& p, char*, Stream stream) {
  MseTask<S> task = task_of<S>(call.n, call.reduction, p.x, p.t);
  task.factor = static_cast<Compute<S>>(call.reduction == Reduction::mean ? 2 / static_cast<double>(call.n) : 2);
  task.grad_y = static_cast<const S*>(p.grad_y);
  task.grad_x = static_cast<S*>(p.grad_x);
  task.grad_t = static_cast<S*>(p.grad_t);
  task.vectors = task.vectors && vector_aligned(task.grad_x, 0) && vector_aligned(task.grad_t, 0) &&
                 (call.reduction != Reduction::none || vector_aligned(task.grad_y, 0));
  return launch_units<kVector<S>, S>("mse_backward", mse_backward_kernel<S>, task, task.units, {chip, stream});
}

// number_of(S{}): what a run needs to know of the device; the bytes of the workspace are as many `sums`. A run looks at
// the alignment of its pointers, as only the width of its accesses depends on it.
template <class Call, class Number>
void plan_loss(Plan<Call>& plan, const char* name, size_t sums, Number number_of) {
  with_dtype(plan.call.dtype, [&](auto type) {
    const int64_t number = number_of(type);
    decide(plan, {name}, static_cast<size_t>(number) * sums, number,
           [](const Call& call, int64_t made, const typename Call::Pointers& p, char* workspace, Stream stream) {
             return run<decltype(type)>(call, made, p, workspace, stream);
           });
  });
}

}  // namespace

void plan_call(Plan<CrossEntropyForward>& plan) {
  plan_loss(plan, plan.call.inner == 1 ? "rows" : "planes", sizeof(LossSums),
            [&](auto type) { return blocks_of<decltype(type)>(plan.call); });
}
void plan_call(Plan<CrossEntropyBackward>& plan) {
  plan_loss(plan, plan.call.inner == 1 ? "rows" : "planes", 0, [](auto) { return int64_t{0}; });
}
void plan_call(Plan<MseForward>& plan) {
  plan_loss(plan, "elementwise", sizeof(double), [&](auto type) { return blocks_of<decltype(type)>(plan.call); });
}
void plan_call(Plan<MseBackward>& plan) {
  plan_loss(plan, "elementwise", 0, [](auto) { return multiprocessors(); });
}

}  // namespace fastops::cuda
