#include "attention.cuh"

#include "../../common/cuda/planners.h"

namespace fastops::cuda {
namespace {

template <class C>
bool aligned(const void* data, const HeadStrides& strides) {
  constexpr int64_t n = kVector<C>;
  return vector_aligned(static_cast<const C*>(data), strides.row) && strides.batch % n == 0 && strides.head % n == 0;
}

template <class C, class Pointers>
AttentionTask<C> task_of(const AttentionShape& of, const Pointers& p) {
  AttentionTask<C> task{};
  task.of = of;
  task.scale = static_cast<C>(of.scale);
  task.q = static_cast<const C*>(p.q);
  task.k = static_cast<const C*>(p.k);
  task.v = static_cast<const C*>(p.v);
  task.mask = of.with_mask ? static_cast<const C*>(p.mask) : nullptr;
  task.vectors = aligned<C>(p.q, of.q) && aligned<C>(p.k, of.k) && aligned<C>(p.v, of.v);
  return task;
}

// rows: of which a block has 64; columns: of its result.
template <class C>
Status launch_tiles(const char* name, AttentionTask<C>& task, int64_t rows, int64_t columns, Stream stream,
                    void (*kernel)(AttentionTask<C>)) {
  task.tiles = quotient_up(rows, kScores);
  task.slices = quotient_up(columns, kSlice);
  return launch(
      {{name}, task.of.batch * task.of.heads * task.tiles * task.slices, kThreads, kAttentionShared<C>, stream}, kernel,
      task);
}

template <class C>
Status run(const AttentionForward& call, const AttentionForward::Pointers& p, char*, Stream stream) {
  AttentionTask<C> task = task_of<C>(call.attention, p);
  task.result = static_cast<C*>(p.y);
  task.result_strides = call.attention.y;
  task.lse = static_cast<C*>(p.lse);
  task.vectors = task.vectors && aligned<C>(p.y, call.attention.y);
  return launch_tiles("attention_forward", task, task.of.queries, task.of.value_size, stream,
                      attention_forward_kernel<C>);
}

template <class C>
Status run(const AttentionBackward& call, const AttentionBackward::Pointers& p, char* workspace, Stream stream) {
  AttentionTask<C> task = task_of<C>(call.attention, p);
  const AttentionShape& of = call.attention;
  task.y = static_cast<const C*>(p.y);
  task.grad_y = static_cast<const C*>(p.grad_y);
  task.grad_y_strides = call.grad_y_strides;
  task.result = static_cast<C*>(p.grad_q);
  task.result_strides = call.grad_q_strides;
  task.grad_k = static_cast<C*>(p.grad_k);
  task.grad_k_strides = call.grad_k_strides;
  task.grad_v = static_cast<C*>(p.grad_v);
  task.grad_v_strides = call.grad_v_strides;
  task.lse = static_cast<C*>(const_cast<void*>(p.lse));
  task.delta = reinterpret_cast<C*>(workspace);
  task.vectors = task.vectors && aligned<C>(p.grad_y, call.grad_y_strides) &&
                 (p.grad_q == nullptr || aligned<C>(p.grad_q, call.grad_q_strides)) &&
                 (p.grad_k == nullptr || aligned<C>(p.grad_k, call.grad_k_strides)) &&
                 (p.grad_v == nullptr || aligned<C>(p.grad_v, call.grad_v_strides));
  Status status;
  if (p.grad_q != nullptr || p.grad_k != nullptr)
    status =
        launch({{"attention_delta"}, quotient_up(of.batch * of.heads * of.queries, kThreads / 32), kThreads, 0, stream},
               attention_delta_kernel<C>, task);
  if (status.ok() && p.grad_q != nullptr)
    status =
        launch_tiles("attention_backward_query", task, of.queries, of.size, stream, attention_backward_query_kernel<C>);
  if (status.ok() && (p.grad_k != nullptr || p.grad_v != nullptr))
    status = launch_tiles("attention_backward_key", task, of.keys, of.size > of.value_size ? of.size : of.value_size,
                          stream, attention_backward_key_kernel<C>);
  return status;
}

// body(C{}) for the dtypes that have kernels.
template <class Body>
void with_attention_dtype(DType dtype, Body&& body) {
  if (dtype == DType::f32) body(float{});
  if (dtype == DType::f64) body(double{});
}

template <class Call>
void plan_attention(Plan<Call>& plan, size_t numbers) {
  with_attention_dtype(plan.call.attention.dtype, [&](auto type) {
    using C = decltype(type);
    permit_shared<attention_forward_kernel<C>>(kAttentionShared<C>);
    permit_shared<attention_backward_query_kernel<C>>(kAttentionShared<C>);
    permit_shared<attention_backward_key_kernel<C>>(kAttentionShared<C>);
    // A run looks at the alignment of its pointers, as only the width of its accesses depends on it.
    decide(plan, {"attention", {kScores, kScores}}, numbers * sizeof(C), 0,
           [](const Call& call, int, const typename Call::Pointers& p, char* workspace, Stream stream) {
             return run<decltype(type)>(call, p, workspace, stream);
           });
  });
}

}  // namespace

void plan_call(Plan<AttentionForward>& plan) { plan_attention(plan, 0); }
void plan_call(Plan<AttentionBackward>& plan) {
  const AttentionShape& of = plan.call.attention;
  plan_attention(plan, static_cast<size_t>(of.batch * of.heads * of.queries));
}

}  // namespace fastops::cuda
