#include "activation.cuh"

#include "../../common/cuda/launch.h"
#include "../../common/cuda/launchers.h"

namespace fastops::cuda {
namespace {

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

template <int n>
Units units_of(int64_t rows, int64_t cols) {
  const int64_t per_row = quotient_up(cols, n);
  return {rows * per_row, per_row, cols, rows};
}

// Launches a grid that fills the chip, or a smaller one for less work.
template <int n, class S, class Task>
Status launch_units(const char* name, void (*kernel)(Task), const Task& task, const Units& units, Stream stream) {
  if (units.units == 0) return {};
  const int64_t wanted = quotient_up(units.units, int64_t{kThreads} * kBatch<n, sizeof(S)>);
  const int64_t blocks = smaller(wanted, int64_t{multiprocessors()} * kBlocksPerMultiprocessor);
  return launch({{name}, blocks, kThreads, 0, stream}, kernel, task);
}

template <class S>
Status activation_forward_of(const ActivationForward& args, Stream stream) {
  int64_t rows = args.rows, cols = args.cols;
  if (args.x_row_stride == cols && (args.mask == nullptr || cols % 8 == 0)) {
    cols *= rows;
    rows = 1;
  }
  const S* const x = static_cast<const S*>(args.x);
  S* const y = static_cast<S*>(args.y);
  const bool vectors = vector_aligned(x, rows > 1 ? args.x_row_stride : 0) && vector_aligned(y, rows > 1 ? cols : 0);
  ForwardTask<S> task{{}, vectors, x, args.x_row_stride, y, args.mask, parameters<S>(args.activation)};
  if (args.mask != nullptr) {
    task.units = units_of<kMaskUnit<S>>(rows, cols);
    return with_mask_kind(args.activation.kind, [&](auto kind) {
      return launch_units<kMaskUnit<S>, S>(
          "activation_forward_mask", activation_forward_kernel<decltype(kind), S, true>, task, task.units, stream);
    });
  }
  task.units = units_of<kVector<S>>(rows, cols);
  return with_kind(args.activation.kind, [&](auto kind) {
    return launch_units<kVector<S>, S>("activation_forward", activation_forward_kernel<decltype(kind), S, false>, task,
                                       task.units, stream);
  });
}

template <class S>
Status activation_backward_of(const ActivationBackward& args, Stream stream) {
  const bool masked = args.saved_kind == Saved::mask, nothing = args.saved_kind == Saved::nothing;
  int64_t rows = args.rows, cols = args.cols;
  // Nothing was saved for the identity. Its kernel gets grad_y as `saved` and ignores the value.
  const int64_t saved_stride = nothing ? args.grad_y_row_stride : args.saved_row_stride;
  if (args.grad_y_row_stride == cols && (masked ? cols % 8 == 0 : saved_stride == cols)) {
    cols *= rows;
    rows = 1;
  }
  const S* const grad_y = static_cast<const S*>(args.grad_y);
  S* const grad_x = static_cast<S*>(args.grad_x);
  const bool vectors =
      vector_aligned(grad_y, rows > 1 ? args.grad_y_row_stride : 0) && vector_aligned(grad_x, rows > 1 ? cols : 0);
  const auto p = parameters<S>(args.activation);
  if (masked) {
    const Units units = units_of<kMaskUnit<S>>(rows, cols);
    const BackwardTask<S, uint8_t> task{
        units, vectors, grad_y, args.grad_y_row_stride, static_cast<const uint8_t*>(args.saved), 0, grad_x, p};
    return with_mask_derivative(args.activation.kind, [&](auto kind) {
      return launch_units<kMaskUnit<S>, S>("activation_backward_mask",
                                           activation_backward_mask_kernel<decltype(kind), S>, task, units, stream);
    });
  }
  const Units units = units_of<kVector<S>>(rows, cols);
  const S* const saved = nothing ? grad_y : static_cast<const S*>(args.saved);
  const BackwardTask<S, S> task{units,  vectors && vector_aligned(saved, rows > 1 ? saved_stride : 0),
                                grad_y, args.grad_y_row_stride,
                                saved,  saved_stride,
                                grad_x, p};
  return with_derivative(args.activation.kind, args.saved_kind == Saved::output, [&](auto derivative) {
    return launch_units<kVector<S>, S>("activation_backward", activation_backward_kernel<decltype(derivative), S>, task,
                                       units, stream);
  });
}

// ---- PReLU

bool weight_per_column(int64_t channels, int64_t inner) { return inner == 1 && channels > 1; }

template <class S>
PreluTask<S> prelu_task(int64_t outer, int64_t channels, int64_t inner, const void* x, const void* w,
                        int64_t w_stride) {
  if (channels == 1) {
    inner *= outer;
    outer = 1;
  }
  const bool per_column = weight_per_column(channels, inner);
  const int64_t rows = per_column ? outer : outer * channels, cols = per_column ? channels : inner;
  const S* const from = static_cast<const S*>(x);
  return {units_of<kVector<S>>(rows, cols),
          vector_aligned(from, rows > 1 ? cols : 0),
          per_column,
          outer,
          channels,
          from,
          static_cast<const S*>(w),
          w_stride,
          nullptr};
}

template <class S>
Status prelu_forward_of(const PreluForward& args, Stream stream) {
  auto task = prelu_task<S>(args.outer, args.channels, args.inner, args.x, args.w, args.w_stride);
  task.y = static_cast<S*>(args.y);
  task.vectors = task.vectors && vector_aligned(task.y, 0);
  return launch_units<kVector<S>, S>("prelu_forward", prelu_forward_kernel<S>, task, task.units, stream);
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
size_t prelu_backward_workspace_of(const PreluBackward& args) {
  if (args.grad_w == nullptr) return 0;
  const auto task = prelu_task<S>(args.outer, args.channels, args.inner, args.x, args.w, args.w_stride);
  return static_cast<size_t>(prelu_pieces(task).pieces * args.channels) * sizeof(Compute<S>);
}

template <class S>
Status prelu_backward_of(const PreluBackward& args, void* workspace, Stream stream) {
  const auto forward = prelu_task<S>(args.outer, args.channels, args.inner, args.x, args.w, args.w_stride);
  const auto [pieces, piece] = prelu_pieces(forward);
  PreluBackwardTask<S> task{forward,
                            static_cast<const S*>(args.grad_y),
                            static_cast<S*>(args.grad_x),
                            args.grad_w != nullptr ? static_cast<Compute<S>*>(workspace) : nullptr,
                            pieces,
                            piece};
  task.forward.vectors = task.forward.vectors && vector_aligned(task.grad_y, 0) &&
                         (task.grad_x == nullptr || vector_aligned(task.grad_x, 0));
  const bool per_column = forward.weight_per_column;
  constexpr size_t sums = kThreads / 32 * sizeof(Compute<S>);
  const int64_t blocks = pieces * (per_column ? quotient_up(args.channels, kThreads) : args.channels);
  const Status status =
      per_column
          ? launch({{"prelu_backward_columns"}, blocks, kThreads, 0, stream}, prelu_backward_columns_kernel<S>, task)
          : launch({{"prelu_backward"}, blocks, kThreads, sums, stream}, prelu_backward_kernel<S>, task);
  if (!status.ok() || args.grad_w == nullptr) return status;
  return launch({{"prelu_grad_weight"}, quotient_up(args.channels, kThreads / 32), kThreads, 0, stream},
                prelu_grad_weight_kernel<S>, task.partial, args.channels, pieces, per_column ? 1 : pieces,
                per_column ? args.channels : 1, static_cast<S*>(args.grad_w));
}

// ---- GLU

template <class S>
GluTask<S> glu_task(int64_t outer, int64_t inner, const void* grad_y, const void* x, void* result) {
  const S *const g = static_cast<const S*>(grad_y), *const from = static_cast<const S*>(x);
  S* const to = static_cast<S*>(result);
  const bool vectors = vector_aligned(from, inner) && vector_aligned(to, 0) && vector_aligned(g, 0);
  return {units_of<kVector<S>>(outer, inner), vectors, g, from, to};
}

template <class S>
Status glu_forward_of(const GluForward& args, Stream stream) {
  const auto task = glu_task<S>(args.outer, args.inner, nullptr, args.x, args.y);
  return launch_units<kVector<S>, S>("glu_forward", glu_forward_kernel<S>, task, task.units, stream);
}

template <class S>
Status glu_backward_of(const GluBackward& args, Stream stream) {
  const auto task = glu_task<S>(args.outer, args.inner, args.grad_y, args.x, args.grad_x);
  return launch_units<kVector<S>, S>("glu_backward", glu_backward_kernel<S>, task, task.units, stream);
}

}  // namespace

Status activation_forward(const ActivationForward& args, Stream stream) {
  return with_dtype(args.dtype, [&](auto type) { return activation_forward_of<decltype(type)>(args, stream); });
}
Status activation_backward(const ActivationBackward& args, Stream stream) {
  return with_dtype(args.dtype, [&](auto type) { return activation_backward_of<decltype(type)>(args, stream); });
}
Status prelu_forward(const PreluForward& args, Stream stream) {
  return with_dtype(args.dtype, [&](auto type) { return prelu_forward_of<decltype(type)>(args, stream); });
}
size_t prelu_backward_workspace(const PreluBackward& args) {
  return with_dtype(args.dtype, [&](auto type) { return prelu_backward_workspace_of<decltype(type)>(args); });
}
Status prelu_backward(const PreluBackward& args, void* workspace, Stream stream) {
  return with_dtype(args.dtype, [&](auto type) { return prelu_backward_of<decltype(type)>(args, workspace, stream); });
}
Status glu_forward(const GluForward& args, Stream stream) {
  return with_dtype(args.dtype, [&](auto type) { return glu_forward_of<decltype(type)>(args, stream); });
}
Status glu_backward(const GluBackward& args, Stream stream) {
  return with_dtype(args.dtype, [&](auto type) { return glu_backward_of<decltype(type)>(args, stream); });
}

}  // namespace fastops::cuda
