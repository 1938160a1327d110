#include "mlp.cuh"

#include "../../common/cuda/launch.h"
#include "../../common/cuda/planners.h"

namespace fastops::cuda {
namespace {

constexpr int kNarrow = 64, kWide = static_cast<int>(kMostMlpWidth);

bool is_wide(const MlpShape& shape) {
  for (int l = 0; l <= shape.layers; ++l)
    if (shape.widths[l] > kNarrow) return true;
  return false;
}

// body(Kind{}) with the kind of products for this shape.
template <int width, class Body>
void with_kind_of_width(const MlpShape& shape, Body&& body) {
  if (shape.dtype == DType::bf16) return body(MlpMma16<bf16_t, width>{});
  if (shape.dtype == DType::f16) return body(MlpMma16<f16_t, width>{});
  return shape.precision == Precision::medium ? body(MlpTf32<width>{}) : body(MlpSimt<width>{});
}

// ---- what fits on the chip, and how

struct OnChip {
  bool fits, resident;
  int stages;
  size_t shared;
  int64_t blocks;
};

// The most blocks per multiprocessor for which there are registers. Blocks share a multiprocessor if their shared
// memory fits, so that one computes while another waits. Backward, every further block adds a set of partial sums of
// all gradients. Not measured.
constexpr int64_t kMostForward = 4, kMostBackwardNarrow = 2, kMostBackwardWide = 1;
constexpr size_t kReservedShared = size_t{1} << 10;  // per block, by the system

int64_t blocks_for(int64_t tiles, size_t shared, int64_t most) {
  const auto room = static_cast<int64_t>((most_shared() + kReservedShared) / (shared + kReservedShared));
  const int64_t blocks = multiprocessors() * (room < most ? room : most);
  return tiles < blocks ? tiles : blocks;
}

template <class Kind>
OnChip forward_on_chip(const MlpShape& shape) {
  using S = typename Kind::S;
  const size_t limit = most_shared(), biases = static_cast<size_t>(shape.layers) * Kind::kWidth * sizeof(float);
  for (const bool resident : {true, false})
    for (const int stages : {2, 1}) {
      const int weights = resident ? shape.layers : 1;
      const size_t shared = biases + (static_cast<size_t>(weights) * kMlpWeights<Kind> +
                                      static_cast<size_t>(stages) * kMlpForwardTile<Kind>)*sizeof(S);
      if (shared <= limit)
        return {true, resident, stages, shared,
                blocks_for(quotient_up(shape.m, Kind::Forward::kTileM), shared, kMostForward)};
    }
  return {};
}

template <class Kind>
OnChip backward_on_chip(const MlpShape& shape) {
  using S = typename Kind::S;
  for (const int stages : {2, 1}) {
    const size_t shared = (kMlpWeights<Kind> + static_cast<size_t>(stages) * 2 * kMlpBackwardTile<Kind>)*sizeof(S);
    if (shared <= most_shared())
      return {true, false, stages, shared,
              blocks_for(quotient_up(shape.m, Kind::InputGradient::kTileM), shared,
                         Kind::kWidth == kWide ? kMostBackwardWide : kMostBackwardNarrow)};
  }
  return {};
}

// body(Kind{}), if there are kernels for this shape. Forward has none without backward.
template <class Body>
void with_fitting_kind(const MlpShape& shape, Body&& body) {
  bool possible = shape.dtype != DType::f64 && shape.layers >= 1 && shape.layers <= kMostMlpLayers;
  for (int l = 0; possible && l <= shape.layers; ++l)
    possible = shape.widths[l] >= 1 && shape.widths[l] <= kMostMlpWidth;
  if (!possible) return;
  const auto if_it_fits = [&](auto kind) {
    using Kind = decltype(kind);
    if (forward_on_chip<Kind>(shape).fits && backward_on_chip<Kind>(shape).fits) body(kind);
  };
  if (is_wide(shape))
    with_kind_of_width<kWide>(shape, if_it_fits);
  else
    with_kind_of_width<kNarrow>(shape, if_it_fits);
}

KernelName name_of(const MlpShape& shape) {
  const int width = is_wide(shape) ? kWide : kNarrow;
  if (size_of(shape.dtype) == 2) return {"mlp_mma", {width}};
  return {shape.precision == Precision::medium ? "mlp_tf32" : "mlp_simt", {width}};
}

// ---- runs

template <class Kind>
Status run(const MlpForward& call, const OnChip& how, const MlpForward::Pointers& p, char*, Stream stream) {
  using S = typename Kind::S;
  const int64_t n = call.shape.widths[call.shape.layers];
  MlpForwardTask<S> task{};
  task.call = call;
  task.pointers = p;
  task.hidden = parameters<S>(call.hidden);
  task.output = parameters<S>(call.output);
  task.hidden_stride = mlp_hidden_stride(call.shape);
  task.save_pre_activations = p.hidden_outputs != nullptr && saved_by_linear(call.hidden) == Saved::input;
  task.x_vectors = vector_aligned(static_cast<const S*>(p.x), call.x_row_stride);
  task.y_vectors = vector_aligned(static_cast<const S*>(p.y), n);
  task.z_pairs = reinterpret_cast<uintptr_t>(p.z) % (2 * sizeof(S)) == 0 && n % 2 == 0;
  task.resident = how.resident;
  task.stages = how.stages;
  return launch({name_of(call.shape), how.blocks, Kind::Forward::kThreads, how.shared, stream},
                mlp_forward_kernel<Kind>, task);
}

// The workspace: the gradient of the last pre-activation if there is an output activation, the gradients that one layer
// passes to the layer before, and the partial sums of the blocks.
struct MlpGradients {
  OnChip on_chip;
  size_t gradients, partial;  // where in the workspace
  int64_t chip;               // its multiprocessors
};

template <class Kind>
Status run(const MlpBackward& call, const MlpGradients& how, const MlpBackward::Pointers& p, char* workspace,
           Stream stream) {
  using S = typename Kind::S;
  const MlpShape& shape = call.shape;
  MlpBackwardTask<S> task{};
  task.call = call;
  task.pointers = p;
  if (call.output.kind != ActivationKind::identity) {
    const int64_t n = shape.widths[shape.layers];
    const ActivationBackward first{
        shape.dtype, call.output, saved_by_linear(call.output), shape.m, n, call.grad_y_row_stride, n};
    const Status status = activation_backward(first, {p.grad_y, p.saved, workspace}, how.chip, stream);
    if (!status.ok()) return status;
    task.pointers.grad_y = workspace;
    task.call.grad_y_row_stride = n;
  }
  task.hidden = parameters<S>(call.hidden);
  task.hidden_stride = mlp_hidden_stride(shape);
  task.from_output = saved_by_linear(call.hidden) != Saved::input;
  task.gradients = reinterpret_cast<S*>(workspace + how.gradients);
  task.partial = reinterpret_cast<float*>(workspace + how.partial);
  task.partial_size = mlp_partial_offset(shape, shape.layers);
  const auto wanted = [&](int l) { return p.grad_w[l] != nullptr || p.grad_bias[l] != nullptr; };
  if (p.grad_x == nullptr)
    while (!wanted(task.lowest)) ++task.lowest;
  task.x_vectors = vector_aligned(static_cast<const S*>(p.x), call.x_row_stride);
  task.grad_y_vectors = vector_aligned(static_cast<const S*>(task.pointers.grad_y), task.call.grad_y_row_stride);
  task.grad_x_vectors = vector_aligned(static_cast<const S*>(p.grad_x), shape.widths[0]);
  task.stages = how.on_chip.stages;
  const Status status =
      launch({name_of(shape), how.on_chip.blocks, Kind::InputGradient::kThreads, how.on_chip.shared, stream},
             mlp_backward_kernel<Kind>, task);
  bool sums = false;
  for (int l = 0; l < shape.layers; ++l) sums = sums || wanted(l);
  if (!status.ok() || !sums) return status;
  return launch({{"mlp_reduce"}, quotient_up(task.partial_size, kReduceThreads), kReduceThreads, 0, stream},
                mlp_reduce_kernel<S>, task, how.on_chip.blocks);
}

template <class Kind, class Call, class Decision>
void decide_mlp(Plan<Call>& plan, size_t workspace, const Decision& decision) {
  decide(plan, name_of(plan.call.shape), workspace, decision,
         [](const Call& call, const Decision& how, const typename Call::Pointers& p, char* memory, Stream stream) {
           return run<Kind>(call, how, p, memory, stream);
         });
}

}  // namespace

void plan_call(Plan<MlpForward>& plan) {
  const MlpShape& shape = plan.call.shape;
  with_fitting_kind(shape, [&](auto kind) {
    using Kind = decltype(kind);
    const OnChip on_chip = forward_on_chip<Kind>(shape);
    permit_shared<mlp_forward_kernel<Kind>>(on_chip.shared);
    decide_mlp<Kind>(plan, 0, on_chip);
  });
}

void plan_call(Plan<MlpBackward>& plan) {
  const MlpShape& shape = plan.call.shape;
  with_fitting_kind(shape, [&](auto kind) {
    using Kind = decltype(kind);
    MlpGradients how{backward_on_chip<Kind>(shape), 0, 0, multiprocessors()};
    permit_shared<mlp_backward_kernel<Kind>>(how.on_chip.shared);
    const auto bytes = [&](int64_t cols) {
      return round_up(static_cast<size_t>(shape.m * cols) * size_of(shape.dtype));
    };
    if (plan.call.output.kind != ActivationKind::identity) how.gradients = bytes(shape.widths[shape.layers]);
    how.partial = how.gradients + bytes(mlp_hidden_stride(shape));
    const int64_t sums = how.on_chip.blocks * mlp_partial_offset(shape, shape.layers);
    decide_mlp<Kind>(plan, how.partial + static_cast<size_t>(sums) * sizeof(float), how);
  });
}

}  // namespace fastops::cuda
