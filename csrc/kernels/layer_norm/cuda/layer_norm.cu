#include "layer_norm.cuh"

#include "../../common/cuda/planners.h"

namespace fastops::cuda {
namespace {

// Blocks for each multiprocessor that sum columns. Not measured.
constexpr int64_t kColumnBlocks = 4;

struct Decision {
  int lanes;
  int64_t tiles, parts;
};

template <class S>
Decision decision_of(const LayerNormForward&) {
  return {};
}
template <class S>
Decision decision_of(const LayerNormBackward& call) {
  Decision result{1, 1, 1};
  while (result.lanes < 32 && result.lanes * kVector<S> < call.size) result.lanes *= 2;
  result.tiles = quotient_up(call.size, result.lanes * kVector<S>);
  const int64_t wanted = multiprocessors() * kColumnBlocks / result.tiles;
  const int64_t most = call.outer * call.inner * result.lanes / (kThreads * kNormRows);
  result.parts = at_least_one(smaller(wanted, most));
  return result;
}

template <class S, class Call>
size_t transposed_bytes(const Call& call) {
  return call.inner == 1 ? 0 : round_up(static_cast<size_t>(call.outer * call.size * call.inner) * sizeof(S));
}

template <class S>
size_t workspace_bytes(const LayerNormForward&, const Decision&) {
  return 0;  // y takes the transposed rows
}
template <class S>
size_t workspace_bytes(const LayerNormBackward& call, const Decision& how) {
  const size_t partial = how.parts > 1 ? 2 * static_cast<size_t>(how.parts * call.size) * sizeof(Compute<S>) : 0;
  return transposed_bytes<S>(call) + partial;
}

template <class S, class Call>
Status transpose(const Call& call, const void* x, S* to, Stream stream) {
  const int64_t tiles = call.outer * quotient_up(call.size, kTransposed) * quotient_up(call.inner, kTransposed);
  return launch({{"transpose_rows"}, tiles, kThreads, kTransposed * (kTransposed + 1) * sizeof(S), stream},
                transpose_rows_kernel<S>, static_cast<const S*>(x), to, call.x_outer_stride, call.size, call.inner);
}

template <class S, class Call>
void fill(NormTask<S>& task, const Call& call) {
  task.rows = call.outer * call.inner;
  task.size = call.size;
  task.rms = call.rms;
  task.single = call.parameter_dtype == DType::f32;
}

template <class S>
bool aligned_parameters(const NormTask<S>& task) {
  return vector_aligned<S>(reinterpret_cast<uintptr_t>(task.weight), 0) &&
         vector_aligned<S>(reinterpret_cast<uintptr_t>(task.bias), 0);
}

template <class S>
Status run(const LayerNormForward& call, const Decision&, const LayerNormForward::Pointers& p, char*, Stream stream) {
  NormForward<S> task{};
  fill(task, call);
  task.x = static_cast<const S*>(p.x);
  task.x_stride = call.x_outer_stride;
  task.weight = p.weight;
  task.bias = p.bias;
  task.eps = call.eps;
  task.y = static_cast<S*>(p.y);
  task.mean = static_cast<Compute<S>*>(p.mean);
  task.rstd = static_cast<Compute<S>*>(p.rstd);
  if (call.inner > 1) {
    if (const Status status = transpose(call, p.x, task.y, stream); !status.ok()) return status;
    task.x = task.y;
    task.x_stride = call.size;
  }
  task.vectors = vector_aligned(task.x, task.x_stride) && vector_aligned(task.y, call.size) && aligned_parameters(task);
  return launch_rows<S>("layer_norm_forward", task.rows, call.size, kRowShared<S>, task, stream,
                        [](auto threads) { return norm_forward_kernel<S, threads.value>; });
}

template <class S>
Status run(const LayerNormBackward& call, const Decision& how, const LayerNormBackward::Pointers& p, char* workspace,
           Stream stream) {
  NormBackward<S> task{};
  fill(task, call);
  task.x = static_cast<const S*>(p.x);
  task.x_stride = call.x_outer_stride;
  task.weight = p.weight;
  task.grad_stride = call.grad_y_row_stride;
  task.grad_y = static_cast<const S*>(p.grad_y);
  task.mean = static_cast<const Compute<S>*>(p.mean);
  task.rstd = static_cast<const Compute<S>*>(p.rstd);
  task.grad_x = static_cast<S*>(p.grad_x);
  task.lanes = how.lanes;
  task.parts = how.parts;
  task.partial = reinterpret_cast<Compute<S>*>(workspace + transposed_bytes<S>(call));
  task.grad_weight = call.with_grad_weight ? p.grad_weight : nullptr;
  task.grad_bias = call.with_grad_bias ? p.grad_bias : nullptr;
  if (call.inner > 1) {
    if (const Status status = transpose(call, p.x, reinterpret_cast<S*>(workspace), stream); !status.ok())
      return status;
    task.x = reinterpret_cast<const S*>(workspace);
    task.x_stride = call.size;
  }
  task.vectors = vector_aligned(task.x, task.x_stride) && vector_aligned(task.grad_y, task.grad_stride) &&
                 vector_aligned(task.grad_x, call.size) && aligned_parameters(task);
  Status status;
  if (call.with_grad_x)
    status = launch_rows<S>("layer_norm_backward", task.rows, call.size, kRowShared<S>, task, stream,
                            [](auto threads) { return norm_backward_kernel<S, threads.value>; });
  if (!status.ok() || !(call.with_grad_weight || call.with_grad_bias)) return status;
  constexpr size_t shared = kThreads * sizeof(Compute<S>);
  status =
      launch({{"layer_norm_columns"}, how.tiles * how.parts, kThreads, shared, stream}, norm_columns_kernel<S>, task);
  if (!status.ok() || how.parts == 1) return status;
  return launch({{"layer_norm_finish"}, 2 * quotient_up(call.size, 32), kThreads, shared, stream},
                norm_finish_kernel<S>, task);
}

// A run looks at the alignment of its pointers, as only the width of its accesses depends on it.
template <class Call>
void plan_norm(Plan<Call>& plan) {
  with_dtype(plan.call.dtype, [&](auto type) {
    using S = decltype(type);
    const Decision how = decision_of<S>(plan.call);
    decide(plan, {plan.call.inner == 1 ? "rows" : "transposed_rows"}, workspace_bytes<S>(plan.call, how), how,
           [](const Call& call, const Decision& decision, const typename Call::Pointers& p, char* workspace,
              Stream stream) { return run<decltype(type)>(call, decision, p, workspace, stream); });
  });
}

}  // namespace

void plan_call(Plan<LayerNormForward>& plan) { plan_norm(plan); }
void plan_call(Plan<LayerNormBackward>& plan) { plan_norm(plan); }

}  // namespace fastops::cuda
