#include "../../common/cuda/launchers.h"
#include "../../gemm/cuda/gemm_plan.cuh"

namespace fastops::cuda {
namespace {

// The three products of a linear layer are one kernel over different views:
//   output        C = y [m, n]       A = x [m, k]            B = w [n, k]
//   grad_input    C = grad_x [m, k]  A = g [m, n]            B = w transposed
//   grad_weight   C = grad_w [n, k]  A = g transposed        B = x transposed
// With row-major operands, k is contiguous in A and B of the first product, only in A of the second, in none of the
// third. 16-bit tiles in shared memory have the same order; 32-bit and 64-bit tiles always have the order of the third.
enum class View : int { output, grad_input, grad_weight };

// Every product of a linear layer has kernels with large tiles.
Plan plan_for(DType dtype, int64_t m, int64_t n, int64_t k) { return plan_product(dtype, true, m, n, k); }

size_t partial_bytes(DType dtype, int64_t m, int64_t n, int64_t k, bool row_sums) {
  return partial_bytes(plan_for(dtype, m, n, k), dtype, m, n, row_sums);
}

constexpr ProductNames kNames{"gemm_mma", "gemm_tf32", "gemm_simt"};

// ---- launching

// How to load an operand for tiles with this layout.
template <class TileLayout, class S>
Load<S> load_of(const Operand<S>& operand, bool folded) {
  const int64_t along = TileLayout::kKMajor ? operand.k_stride : operand.mn_stride;
  const int64_t across = TileLayout::kKMajor ? operand.mn_stride : operand.k_stride;
  const bool vectors = along == 1 && vector_aligned(operand.data, across);
  const auto length = [](int64_t stride) { return stride < 0 ? -stride : stride; };
  const bool rows_fastest = length(across) < length(along);
  if (folded) return {operand, Path::registers, rows_fastest};
  if (vectors) return {operand, Path::vectors, false};
  return {operand, sizeof(S) >= 4 ? Path::elements : Path::registers, rows_fastest};
}

template <class Multiplier, Loads loads>
Status launch_gemm(const KernelName& name, const GemmTask<typename Multiplier::S>& task, Stream stream) {
  return launch(
      {name, task.tiles_m * task.tiles_n * task.splits, Multiplier::kThreads, Stages<Multiplier>::kBytes, stream},
      gemm_kernel<Multiplier, loads>, task);
}

template <class Multiplier>
Status run_gemm(const KernelName& name, GemmTask<typename Multiplier::S> task, const Operand<typename Multiplier::S>& a,
                const Operand<typename Multiplier::S>& b, Stream stream) {
  const bool folded = task.derivative.kind != ActivationKind::identity;
  task.a = load_of<typename Multiplier::A>(a, folded);
  task.b = load_of<typename Multiplier::B>(b, false);
  const bool async = task.a.path != Path::registers && task.b.path != Path::registers;
  if (async) return launch_gemm<Multiplier, Loads::async>(name, task, stream);
  // 32-bit and 64-bit elements are copied asynchronously with any stride, so only folded ones go through registers.
  return launch_gemm<Multiplier, Loads::folded>(name, task, stream);
}

template <View view, bool large>
Status run_view(const KernelName& name, bool, const GemmTask<double>& task, const Operand<double>& a,
                const Operand<double>& b, Stream stream) {
  return run_gemm<Scalar64>(name, task, a, b, stream);
}
template <View view, bool large>
Status run_view(const KernelName& name, bool tf32, const GemmTask<float>& task, const Operand<float>& a,
                const Operand<float>& b, Stream stream) {
  return tf32 ? run_gemm<Tensor32<large>>(name, task, a, b, stream)
              : run_gemm<Scalar32<large>>(name, task, a, b, stream);
}
template <View view, bool large, class S>
Status run_view(const KernelName& name, bool, const GemmTask<S>& task, const Operand<S>& a, const Operand<S>& b,
                Stream stream) {
  return run_gemm<Tensor16<S, large, view != View::grad_weight, view == View::output>>(name, task, a, b, stream);
}

// C = A B^T for A [m, k] and B [n, k], with the epilogue of the task, and row_sums if wanted.
template <View view, class S>
Status product(DType dtype, bool tf32, GemmTask<S> task, const Operand<S>& a, const Operand<S>& b, void* workspace,
               Stream stream) {
  const Plan plan = plan_for(dtype, task.m, task.n, task.k);
  task.tiles_m = plan.tiles_m;
  task.tiles_n = plan.tiles_n;
  task.splits = plan.splits;
  task.k_per_split = plan.k_per_split;
  task.partial = static_cast<Compute<S>*>(workspace);
  Epilogue<S>& e = task.epilogue;
  e.m = task.m;
  e.n = task.n;
  const auto even = [&](const S* p) {
    return reinterpret_cast<uintptr_t>(p) % (2 * sizeof(S)) == 0 && e.row_stride % 2 == 0;
  };
  e.pairs = even(e.y) && even(e.z);
  const KernelName name = product_name(kNames, dtype, tf32, plan.large);
  const Status status = plan.large ? run_view<view, true>(name, tf32, task, a, b, stream)
                                   : run_view<view, false>(name, tf32, task, a, b, stream);
  if (!status.ok() || plan.splits == 1) return status;
  const int64_t threads = task.m * quotient_up(task.n, 2) + (task.row_sums != nullptr ? task.m : 0);
  return launch({{"gemm_reduce"}, quotient_up(threads, kReduceThreads), kReduceThreads, 0, stream}, reduce_kernel<S>,
                task);
}

template <class S>
Status linear_forward_of(const LinearForward& args, void* workspace, Stream stream) {
  GemmTask<S> task{};
  task.m = args.m;
  task.n = args.n;
  task.k = args.k;
  task.epilogue.bias = static_cast<const S*>(args.b);
  task.epilogue.bias_stride = args.b_stride;
  task.epilogue.kind = args.activation.kind;
  task.epilogue.parameters = parameters<S>(args.activation);
  task.epilogue.y = static_cast<S*>(args.y);
  task.epilogue.z = static_cast<S*>(args.z);
  task.epilogue.row_stride = args.y_row_stride;
  const Operand<S> x{static_cast<const S*>(args.x.data), args.x.row_stride, args.x.col_stride};
  const Operand<S> w{static_cast<const S*>(args.w.data), args.w.row_stride, args.w.col_stride};
  return product<View::output>(args.dtype, args.allow_tf32, task, x, w, workspace, stream);
}

// ---- backward

bool forms_gradient_first(const Activation& activation) {
  return activation.kind != ActivationKind::identity && !can_fold(activation);
}

// The workspace: the gradient of the pre-activation, if it is computed first, then the partial sums.
size_t gradient_bytes(const LinearBackward& args) {
  if (!forms_gradient_first(args.activation)) return 0;
  return round_up(static_cast<size_t>(args.m * args.n) * size_of(args.dtype));
}

template <class S>
Status linear_backward_of(const LinearBackward& args, void* workspace, Stream stream) {
  Matrix grad_y = args.grad_y;
  Derivative<S> derivative;
  if (forms_gradient_first(args.activation)) {
    const ActivationBackward first{args.dtype,
                                   args.activation,
                                   saved_by_linear(args.activation),
                                   args.m,
                                   args.n,
                                   grad_y.data,
                                   grad_y.row_stride,
                                   args.saved.data,
                                   args.saved.row_stride,
                                   workspace};
    const Status status = activation_backward(first, stream);
    if (!status.ok()) return status;
    grad_y = {workspace, args.n, 1};
  } else if (args.activation.kind != ActivationKind::identity) {
    derivative.kind = args.activation.kind;
    derivative.parameters = parameters<S>(args.activation);
  }
  void* const partial = static_cast<char*>(workspace) + gradient_bytes(args);
  const S* const g = static_cast<const S*>(grad_y.data);
  const Matrix& saved = args.saved;  // y, if the derivative is folded

  if (args.grad_x != nullptr) {
    GemmTask<S> task{};
    task.m = args.m;
    task.n = args.k;
    task.k = args.n;
    task.derivative = derivative;
    task.derivative.y = {static_cast<const S*>(saved.data), saved.row_stride, saved.col_stride};
    task.epilogue.y = static_cast<S*>(args.grad_x);
    task.epilogue.row_stride = args.k;
    const Operand<S> w{static_cast<const S*>(args.w.data), args.w.col_stride, args.w.row_stride};
    const Status status = product<View::grad_input>(args.dtype, args.allow_tf32, task,
                                                    {g, grad_y.row_stride, grad_y.col_stride}, w, partial, stream);
    if (!status.ok()) return status;
  }
  if (args.grad_w == nullptr && args.grad_b == nullptr) return {};
  GemmTask<S> task{};
  task.m = args.n;
  task.n = args.grad_w != nullptr ? args.k : 0;
  task.k = args.m;
  task.derivative = derivative;
  task.derivative.y = {static_cast<const S*>(saved.data), saved.col_stride, saved.row_stride};
  task.epilogue.y = static_cast<S*>(args.grad_w);
  task.epilogue.row_stride = args.k;
  task.row_sums = static_cast<S*>(args.grad_b);
  const Operand<S> x{args.grad_w != nullptr ? static_cast<const S*>(args.x.data) : g, args.x.col_stride,
                     args.x.row_stride};
  return product<View::grad_weight>(args.dtype, args.allow_tf32, task, {g, grad_y.col_stride, grad_y.row_stride}, x,
                                    partial, stream);
}

}  // namespace

KernelName linear_forward_name(const LinearForward& args) {
  return product_name(kNames, args.dtype, args.allow_tf32, plan_for(args.dtype, args.m, args.n, args.k).large);
}
size_t linear_forward_workspace(const LinearForward& args) {
  return partial_bytes(args.dtype, args.m, args.n, args.k, false);
}
Status linear_forward(const LinearForward& args, void* workspace, Stream stream) {
  return with_dtype(args.dtype, [&](auto type) { return linear_forward_of<decltype(type)>(args, workspace, stream); });
}

// The kernel for the weight's gradient, or for the input's gradient if that is the only one.
KernelName linear_backward_name(const LinearBackward& args) {
  const bool weight = args.grad_w != nullptr || args.grad_b != nullptr;
  const int64_t n = args.grad_w != nullptr ? args.k : 0;
  const Plan plan = weight ? plan_for(args.dtype, args.n, n, args.m) : plan_for(args.dtype, args.m, args.k, args.n);
  return product_name(kNames, args.dtype, args.allow_tf32, plan.large);
}
size_t linear_backward_workspace(const LinearBackward& args) {
  size_t partial = 0;
  if (args.grad_x != nullptr) partial = partial_bytes(args.dtype, args.m, args.k, args.n, false);
  if (args.grad_w != nullptr || args.grad_b != nullptr) {
    const size_t more =
        partial_bytes(args.dtype, args.n, args.grad_w != nullptr ? args.k : 0, args.m, args.grad_b != nullptr);
    if (more > partial) partial = more;
  }
  return gradient_bytes(args) + partial;
}
Status linear_backward(const LinearBackward& args, void* workspace, Stream stream) {
  return with_dtype(args.dtype, [&](auto type) { return linear_backward_of<decltype(type)>(args, workspace, stream); });
}

}  // namespace fastops::cuda
