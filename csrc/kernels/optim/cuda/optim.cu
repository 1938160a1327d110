#include "optim.cuh"

#include "../../common/cuda/planners.h"

namespace fastops::cuda {
namespace {

template <class S>
SgdNumbers<S> numbers_of(const SgdStep& call, const SgdStep::Options& o) {
  using C = Compute<S>;
  return {static_cast<C>(-o.lr),
          static_cast<C>(o.momentum),
          static_cast<C>(1 - o.dampening),
          static_cast<C>(o.weight_decay),
          o.weight_decay != 0,
          call.with_momentum,
          call.nesterov,
          call.maximize};
}

template <class S>
AdamNumbers<S> numbers_of(const AdamStep& call, const AdamStep::Options& o) {
  using C = Compute<S>;
  // m + rest (g - m), from the end that is nearer.
  const C rest = static_cast<C>(1 - o.beta1);
  const bool near_m = rest < C(0.5);
  return {static_cast<C>(o.weight_decay),
          static_cast<C>(o.decay),
          static_cast<C>(o.eps),
          static_cast<C>(o.beta2),
          static_cast<C>(1 - o.beta2),
          near_m ? rest : rest - C(1),
          o.weight_decay != 0,
          o.decay != 1,
          near_m,
          call.amsgrad,
          call.maximize};
}

template <class S>
bool aligned(std::initializer_list<const void*> tensors) {
  for (const void* tensor : tensors)
    if (!vector_aligned(static_cast<const S*>(tensor), 0)) return false;
  return true;
}
template <class S>
bool aligned(const SgdStep::Piece& piece) {
  return aligned<S>({piece.p, piece.grad, piece.m});
}
template <class S>
bool aligned(const AdamStep::Piece& piece) {
  return aligned<S>({piece.p, piece.grad, piece.m, piece.v, piece.top});
}

template <class S, class Call, class Numbers>
Status run(const Call& call, const typename Call::Pointers& p, Stream stream, const char* name,
           void (*kernel)(StepTask<Call, Numbers>)) {
  static_assert(sizeof(StepTask<Call, Numbers>) <= 4096);
  StepTask<Call, Numbers> task{};
  task.numbers = numbers_of<S>(call, *p.options);
  const int most = call.in_order ? 1 : kMostPieces;
  int64_t blocks = 0;
  for (int64_t i = 0; i < p.count; ++i) {
    const typename Call::Piece& piece = p.pieces[i];
    if (piece.n > 0) {
      task.pieces[task.count] = piece;
      task.first_block[task.count] = static_cast<int>(blocks);
      task.vectors[task.count] = aligned<S>(piece);
      ++task.count;
      blocks += quotient_up(piece.n, kStepRun<S>);
    }
    // Blocks are counted in int.
    const bool full = task.count == most || blocks >= INT32_MAX / 2;
    if (task.count == 0 || (i + 1 < p.count && !full)) continue;
    if (const Status status = launch({{name}, blocks, kThreads, 0, stream}, kernel, task); !status.ok()) return status;
    task.count = 0;
    blocks = 0;
  }
  return {};
}

}  // namespace

void plan_call(Plan<SgdStep>& plan) {
  with_dtype(plan.call.dtype, [&](auto type) {
    decide(plan, {"elementwise"}, 0, 0, [](const SgdStep& call, int, const SgdStep::Pointers& p, char*, Stream stream) {
      using S = decltype(type);
      return run<S>(call, p, stream, "sgd_step", sgd_kernel<S>);
    });
  });
}

void plan_call(Plan<AdamStep>& plan) {
  with_dtype(plan.call.dtype, [&](auto type) {
    decide(plan, {"elementwise"}, 0, 0,
           [](const AdamStep& call, int, const AdamStep::Pointers& p, char*, Stream stream) {
             using S = decltype(type);
             return run<S>(call, p, stream, "adam_step", adam_kernel<S>);
           });
  });
}

}  // namespace fastops::cuda
