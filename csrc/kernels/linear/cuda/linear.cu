#include "../../common/cuda/planners.h"
#include "../../gemm/cuda/product.cuh"
#include "products.h"

namespace fastops::cuda {
namespace {

// The three products of a linear layer are one kernel over different views:
//   output        C = y [m, n]       A = x [m, k]            B = w [n, k]
//   grad_input    C = grad_x [m, k]  A = g [m, n]            B = w transposed
//   grad_weight   C = grad_w [n, k]  A = g transposed        B = x transposed
// With row-major operands, k is contiguous in A and B of the first product, only in A of the second, in none of the
// third. 16-bit tiles in shared memory have the same order; 32-bit and 64-bit tiles always have the order of the third.
enum class View : int { output, grad_input, grad_weight };

constexpr ProductNames kNames{"gemm_mma", "gemm_tf32", "gemm_simt"};

// How to load an operand for tiles with this layout.
template <class TileLayout, class S>
Load<S> load_of(const Operand<S>& operand, bool folded, int alignment) {
  const int64_t along = TileLayout::kKMajor ? operand.k_stride : operand.mn_stride;
  const int64_t across = TileLayout::kKMajor ? operand.mn_stride : operand.k_stride;
  const bool vectors = along == 1 && vector_aligned<S>(static_cast<uintptr_t>(alignment), across);
  const auto length = [](int64_t stride) { return stride < 0 ? -stride : stride; };
  const bool rows_fastest = length(across) < length(along);
  if (folded) return {operand, Path::registers, rows_fastest};
  if (vectors) return {operand, Path::vectors, false};
  return {operand, sizeof(S) >= 4 ? Path::elements : Path::registers, rows_fastest};
}

template <class Multiplier, Loads loads>
Status launch_gemm(const void* decided, const KernelName& name, const ProductPointers& p, Stream stream) {
  using S = typename Multiplier::S;
  GemmTask<S> task = *static_cast<const GemmTask<S>*>(decided);
  task.a.operand.data = static_cast<const S*>(p.first);
  task.b.operand.data = static_cast<const S*>(p.second);
  task.derivative.y.data = static_cast<const S*>(p.saved);
  task.row_sums = static_cast<S*>(p.row_sums);
  task.partial = static_cast<Compute<S>*>(p.partial);
  Epilogue<S>& e = task.epilogue;
  e.bias = static_cast<const S*>(p.bias);
  e.y = static_cast<S*>(p.y);
  e.z = static_cast<S*>(p.z);
  const auto even = [&](const S* to) {
    return reinterpret_cast<uintptr_t>(to) % (2 * sizeof(S)) == 0 && e.row_stride % 2 == 0;
  };
  e.pairs = even(e.y) && even(e.z);
  const int64_t blocks = task.tiles_m * task.tiles_n * task.splits;
  const Status status = launch({name, blocks, Multiplier::kThreads, Stages<Multiplier>::kBytes, stream},
                               gemm_kernel<Multiplier, loads>, task);
  if (!status.ok() || task.splits == 1) return status;
  const int64_t threads = task.m * quotient_up(task.n, 2) + (task.row_sums != nullptr ? task.m : 0);
  return launch({{"gemm_reduce"}, quotient_up(threads, kReduceThreads), kReduceThreads, 0, stream}, reduce_kernel<S>,
                task);
}

template <class Multiplier, Loads loads>
auto permitted() {
  permit_shared<gemm_kernel<Multiplier, loads>>(Stages<Multiplier>::kBytes);
  return launch_gemm<Multiplier, loads>;
}

// C = A B^T for A [m, k] and B [n, k], with the epilogue of the task, and row_sums if wanted.
template <View view, class Call, class S>
LinearProduct product(const Call& call, GemmTask<S> task, bool row_sums = false) {
  const Tiling tiling = tiling_of(call.dtype, true, task.m, task.n, task.k);
  task.tiles_m = tiling.tiles_m;
  task.tiles_n = tiling.tiles_n;
  task.splits = tiling.splits;
  task.k_per_split = tiling.k_per_split;
  task.epilogue.m = task.m;
  task.epilogue.n = task.n;
  LinearProduct result{product_name(kNames, call.dtype, call.precision, tiling.large),
                       partial_bytes(tiling, call.dtype, task.m, task.n, row_sums),
                       nullptr,
                       {}};
  with_multiplier<S, view != View::grad_weight, view == View::output>(
      tiling.large, call.precision, [&](auto type, auto) {
        using Multiplier = typename decltype(type)::type;
        const bool folded = task.derivative.kind != ActivationKind::identity;
        task.a = load_of<typename Multiplier::A>(task.a.operand, folded, call.alignment);
        task.b = load_of<typename Multiplier::B>(task.b.operand, false, call.alignment);
        // 32-bit and 64-bit elements are copied asynchronously with any stride, so only folded ones go through
        // registers.
        const bool async = task.a.path != Path::registers && task.b.path != Path::registers;
        result.launcher = async ? permitted<Multiplier, Loads::async>() : permitted<Multiplier, Loads::folded>();
      });
  static_assert(sizeof task <= sizeof result.task);
  std::memcpy(result.task, &task, sizeof task);
  return result;
}

Strides transposed(const Strides& strides) { return {strides.col, strides.row}; }

template <class S>
GemmTask<S> task_of(int64_t m, int64_t n, int64_t k, const Strides& a, const Strides& b, int64_t row_stride) {
  GemmTask<S> task{};
  task.m = m;
  task.n = n;
  task.k = k;
  task.a.operand = {nullptr, a.row, a.col};
  task.b.operand = {nullptr, b.row, b.col};
  task.epilogue.row_stride = row_stride;
  return task;
}

// saved: as the operand with the gradient.
template <class S>
Derivative<S> derivative_of(const LinearBackward& call, const Strides& saved) {
  return {call.activation.kind, parameters<S>(call.activation), {nullptr, saved.row, saved.col}};
}

}  // namespace

LinearProduct output_product(const LinearForward& call) {
  return with_dtype(call.dtype, [&](auto type) {
    using S = decltype(type);
    auto task = task_of<S>(call.m, call.n, call.k, call.x_strides, call.w_strides, call.y_row_stride);
    task.epilogue.bias_stride = call.bias_stride;
    task.epilogue.kind = call.activation.kind;
    task.epilogue.parameters = parameters<S>(call.activation);
    return product<View::output>(call, task);
  });
}

LinearProduct input_product(const LinearBackward& call) {
  return with_dtype(call.dtype, [&](auto type) {
    using S = decltype(type);
    auto task = task_of<S>(call.m, call.k, call.n, call.grad_y_strides, transposed(call.w_strides), call.k);
    task.derivative = derivative_of<S>(call, call.saved_strides);
    return product<View::grad_input>(call, task);
  });
}

LinearProduct weight_product(const LinearBackward& call) {
  return with_dtype(call.dtype, [&](auto type) {
    using S = decltype(type);
    auto task = task_of<S>(call.n, call.with_grad_w ? call.k : 0, call.m, transposed(call.grad_y_strides),
                           transposed(call.x_strides), call.k);
    task.derivative = derivative_of<S>(call, transposed(call.saved_strides));
    return product<View::grad_weight>(call, task, call.with_grad_bias);
  });
}

void plan_call(Plan<LinearForward>& plan) {
  if (plan.call.with_residual) return;
  const LinearProduct output = output_product(plan.call);
  decide(plan, output.name, output.partial, output,
         [](const LinearForward& call, const LinearProduct& product, const LinearForward::Pointers& p, char* workspace,
            Stream stream) {
           return product.launch({p.x, p.w, nullptr, call.with_bias ? p.bias : nullptr, p.y,
                                  call.with_z ? p.z : nullptr, nullptr, workspace},
                                 stream);
         });
}

void plan_call(Plan<LinearBackward>& plan) {
  struct Decision {
    LinearProduct input, weight;
    size_t gradient;  // bytes of the gradient of the pre-activation, if it is computed first
    int64_t chip;
  } decision{};
  LinearBackward call = plan.call;
  if (call.activation.kind != ActivationKind::identity && !can_fold(call.activation)) {
    decision.gradient = round_up(static_cast<size_t>(call.m * call.n) * size_of(call.dtype));
    decision.chip = multiprocessors();
    call.activation = {};
    call.grad_y_strides = {call.n, 1};
  }
  if (call.with_grad_x) decision.input = input_product(call);
  if (call.with_grad_w || call.with_grad_bias) decision.weight = weight_product(call);
  const auto &input = decision.input, &weight = decision.weight;
  const size_t partial = input.partial > weight.partial ? input.partial : weight.partial;
  decide(plan, call.with_grad_x ? input.name : weight.name, decision.gradient + partial, decision,
         [](const LinearBackward& a, const Decision& how, const LinearBackward::Pointers& p, char* workspace,
            Stream stream) {
           const void* gradient = p.grad_y;
           Status status;
           if (how.gradient > 0) {
             const ActivationBackward first{a.dtype,
                                            a.activation,
                                            saved_by_linear(a.activation),
                                            a.m,
                                            a.n,
                                            a.grad_y_strides.row,
                                            a.saved_strides.row};
             status = activation_backward(first, {p.grad_y, p.saved, workspace}, how.chip, stream);
             gradient = workspace;
           }
           char* const partial = workspace + how.gradient;
           if (status.ok() && a.with_grad_x)
             status = how.input.launch({gradient, p.w, p.saved, nullptr, p.grad_x, nullptr, nullptr, partial}, stream);
           if (!status.ok() || !(a.with_grad_w || a.with_grad_bias)) return status;
           return how.weight.launch({gradient, a.with_grad_w ? p.x : gradient, p.saved, nullptr, p.grad_w, nullptr,
                                     a.with_grad_bias ? p.grad_bias : nullptr, partial},
                                    stream);
         });
}

}  // namespace fastops::cuda
