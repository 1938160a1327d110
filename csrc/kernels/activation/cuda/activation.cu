#include "activation.cuh"

#include "../../common/cuda/planners.h"

namespace fastops::cuda {
namespace {

template <class S>
Status run(const ActivationForward& args, const ActivationForward::Pointers& p, char*, const Device& on) {
  int64_t rows = args.rows, cols = args.cols;
  if (args.x_row_stride == cols && (!args.with_mask || cols % 8 == 0)) {
    cols *= rows;
    rows = 1;
  }
  const S* const x = static_cast<const S*>(p.x);
  S* const y = static_cast<S*>(p.y);
  const bool vectors = vector_aligned(x, rows > 1 ? args.x_row_stride : 0) && vector_aligned(y, rows > 1 ? cols : 0);
  ForwardTask<S> task{{}, vectors, x, args.x_row_stride, y, p.mask, parameters<S>(args.activation)};
  if (args.with_mask) {
    task.units = units_of<kMaskUnit<S>>(rows, cols);
    return with_mask_kind(args.activation.kind, [&](auto kind) {
      return launch_units<kMaskUnit<S>, S>("activation_forward_mask",
                                           activation_forward_kernel<decltype(kind), S, true>, task, task.units, on);
    });
  }
  task.units = units_of<kVector<S>>(rows, cols);
  return with_kind(args.activation.kind, [&](auto kind) {
    return launch_units<kVector<S>, S>("activation_forward", activation_forward_kernel<decltype(kind), S, false>, task,
                                       task.units, on);
  });
}

template <class S>
Status run(const ActivationBackward& args, const ActivationBackward::Pointers& p, char*, const Device& on) {
  const bool masked = args.saved_kind == Saved::mask, nothing = args.saved_kind == Saved::nothing;
  int64_t rows = args.rows, cols = args.cols;
  // Nothing was saved for the identity. Its kernel gets grad_y as `saved` and ignores the value.
  const int64_t saved_stride = nothing ? args.grad_y_row_stride : args.saved_row_stride;
  if (args.grad_y_row_stride == cols && (masked ? cols % 8 == 0 : saved_stride == cols)) {
    cols *= rows;
    rows = 1;
  }
  const S* const grad_y = static_cast<const S*>(p.grad_y);
  S* const grad_x = static_cast<S*>(p.grad_x);
  const bool vectors =
      vector_aligned(grad_y, rows > 1 ? args.grad_y_row_stride : 0) && vector_aligned(grad_x, rows > 1 ? cols : 0);
  const auto f = parameters<S>(args.activation);
  if (masked) {
    const Units units = units_of<kMaskUnit<S>>(rows, cols);
    const BackwardTask<S, uint8_t> task{
        units, vectors, grad_y, args.grad_y_row_stride, static_cast<const uint8_t*>(p.saved), 0, grad_x, f};
    return with_mask_derivative(args.activation.kind, [&](auto kind) {
      return launch_units<kMaskUnit<S>, S>("activation_backward_mask",
                                           activation_backward_mask_kernel<decltype(kind), S>, task, units, on);
    });
  }
  const Units units = units_of<kVector<S>>(rows, cols);
  const S* const saved = nothing ? grad_y : static_cast<const S*>(p.saved);
  const BackwardTask<S, S> task{units,  vectors && vector_aligned(saved, rows > 1 ? saved_stride : 0),
                                grad_y, args.grad_y_row_stride,
                                saved,  saved_stride,
                                grad_x, f};
  return with_derivative(args.activation.kind, args.saved_kind == Saved::output, [&](auto derivative) {
    return launch_units<kVector<S>, S>("activation_backward", activation_backward_kernel<decltype(derivative), S>, task,
                                       units, on);
  });
}

// ---- PReLU

template <class S, class Call>
PreluTask<S> prelu_task(const Call& call) {
  const bool one = call.channels == 1;
  const int64_t outer = one ? 1 : call.outer, inner = one ? call.inner * call.outer : call.inner;
  const bool per_column = inner == 1 && call.channels > 1;
  const int64_t rows = per_column ? outer : outer * call.channels, cols = per_column ? call.channels : inner;
  PreluTask<S> task{};
  task.units = units_of<kVector<S>>(rows, cols);
  task.weight_per_column = per_column;
  task.outer = outer;
  task.channels = call.channels;
  task.w_stride = call.w_stride;
  return task;
}
// Whether rows of a tensor like x can be read in vectors.
template <class S>
bool prelu_vectors(const PreluTask<S>& task, const void* tensor) {
  return vector_aligned(static_cast<const S*>(tensor), task.units.rows > 1 ? task.units.cols : 0);
}

template <class S>
Status run(const PreluForward& args, const PreluForward::Pointers& p, char*, const Device& on) {
  auto task = prelu_task<S>(args);
  task.x = static_cast<const S*>(p.x);
  task.w = static_cast<const S*>(p.w);
  task.y = static_cast<S*>(p.y);
  task.vectors = prelu_vectors(task, p.x) && prelu_vectors(task, p.y);
  return launch_units<kVector<S>, S>("prelu_forward", prelu_forward_kernel<S>, task, task.units, on);
}

// The elements, or rows, of one partial sum: enough that adding the partial sums is little work. Not measured.
constexpr int64_t kPreluPiece = 16384;
constexpr int64_t kPreluRows = 256;

struct PreluPieces {
  int64_t pieces, piece;
};
template <class S>
PreluPieces prelu_pieces(const PreluTask<S>& task) {
  const int64_t units = task.outer * task.units.per_row;  // per channel
  if (task.weight_per_column) return {quotient_up(task.outer, kPreluRows), kPreluRows};
  return {quotient_up(units, kPreluPiece / kVector<S>), kPreluPiece / kVector<S>};
}

template <class S>
Status run(const PreluBackward& args, const PreluBackward::Pointers& p, char* workspace, const Device& on) {
  PreluBackwardTask<S> task{prelu_task<S>(args),
                            static_cast<const S*>(p.grad_y),
                            args.with_grad_x ? static_cast<S*>(p.grad_x) : nullptr,
                            args.with_grad_w ? reinterpret_cast<Compute<S>*>(workspace) : nullptr,
                            0,
                            0};
  PreluTask<S>& forward = task.forward;
  const auto [pieces, piece] = prelu_pieces(forward);
  task.pieces = pieces;
  task.piece = piece;
  forward.x = static_cast<const S*>(p.x);
  forward.w = static_cast<const S*>(p.w);
  forward.vectors = prelu_vectors(forward, p.x) && prelu_vectors(forward, p.grad_y) &&
                    (!args.with_grad_x || prelu_vectors(forward, p.grad_x));
  const bool per_column = forward.weight_per_column;
  constexpr size_t sums = kThreads / 32 * sizeof(Compute<S>);
  const int64_t blocks = pieces * (per_column ? quotient_up(args.channels, kThreads) : args.channels);
  const Status status =
      per_column
          ? launch({{"prelu_backward_columns"}, blocks, kThreads, 0, on.stream}, prelu_backward_columns_kernel<S>, task)
          : launch({{"prelu_backward"}, blocks, kThreads, sums, on.stream}, prelu_backward_kernel<S>, task);
  if (!status.ok() || !args.with_grad_w) return status;
  return launch({{"prelu_grad_weight"}, quotient_up(args.channels, kThreads / 32), kThreads, 0, on.stream},
                prelu_grad_weight_kernel<S>, task.partial, args.channels, pieces, per_column ? 1 : pieces,
                per_column ? args.channels : 1, static_cast<S*>(p.grad_w));
}

// ---- GLU

template <class S, class Call>
GluTask<S> glu_task(const Call& call, const void* grad_y, const void* x, void* result) {
  const S *const g = static_cast<const S*>(grad_y), *const from = static_cast<const S*>(x);
  S* const to = static_cast<S*>(result);
  const bool vectors = vector_aligned(from, call.inner) && vector_aligned(to, 0) && vector_aligned(g, 0);
  return {units_of<kVector<S>>(call.outer, call.inner), vectors, g, from, to};
}

template <class S>
Status run(const GluForward& args, const GluForward::Pointers& p, char*, const Device& on) {
  const auto task = glu_task<S>(args, nullptr, p.x, p.y);
  return launch_units<kVector<S>, S>("glu_forward", glu_forward_kernel<S>, task, task.units, on);
}

template <class S>
Status run(const GluBackward& args, const GluBackward::Pointers& p, char*, const Device& on) {
  const auto task = glu_task<S>(args, p.grad_y, p.x, p.grad_x);
  return launch_units<kVector<S>, S>("glu_backward", glu_backward_kernel<S>, task, task.units, on);
}

// A run looks at the alignment of its pointers, as only the width of its accesses depends on it.
template <class Call>
void plan_elementwise(Plan<Call>& plan, size_t workspace = 0) {
  with_dtype(plan.call.dtype, [&](auto type) {
    decide(plan, {"elementwise"}, workspace, multiprocessors(),
           [](const Call& call, int64_t chip, const typename Call::Pointers& p, char* memory, Stream stream) {
             return run<decltype(type)>(call, p, memory, {chip, stream});
           });
  });
}

}  // namespace

Status activation_backward(const ActivationBackward& call, const ActivationBackward::Pointers& pointers, int64_t chip,
                           Stream stream) {
  return with_dtype(call.dtype,
                    [&](auto type) { return run<decltype(type)>(call, pointers, nullptr, {chip, stream}); });
}

void plan_call(Plan<ActivationForward>& plan) { plan_elementwise(plan); }
void plan_call(Plan<ActivationBackward>& plan) { plan_elementwise(plan); }
void plan_call(Plan<PreluForward>& plan) { plan_elementwise(plan); }
void plan_call(Plan<PreluBackward>& plan) {
  const PreluBackward& call = plan.call;
  plan_elementwise(plan, with_dtype(call.dtype, [&](auto type) -> size_t {
                     using S = decltype(type);
                     if (!call.with_grad_w) return 0;
                     return static_cast<size_t>(prelu_pieces(prelu_task<S>(call)).pieces * call.channels) *
                            sizeof(Compute<S>);
                   }));
}
void plan_call(Plan<GluForward>& plan) { plan_elementwise(plan); }
void plan_call(Plan<GluBackward>& plan) { plan_elementwise(plan); }

}  // namespace fastops::cuda
