#include "mlp.cuh"

#include "../../common/cuda/launch.h"
#include "../../common/cuda/launchers.h"

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
auto with_kind_of_width(const MlpShape& shape, Body&& body) {
  if (shape.dtype == DType::bf16) return body(MlpMma16<bf16_t, width>{});
  if (shape.dtype == DType::f16) return body(MlpMma16<f16_t, width>{});
  return shape.allow_tf32 ? body(MlpTf32<width>{}) : body(MlpSimt<width>{});
}
template <class Body>
auto with_mlp_kind(const MlpShape& shape, Body&& body) {
  return is_wide(shape) ? with_kind_of_width<kWide>(shape, body) : with_kind_of_width<kNarrow>(shape, body);
}

// ---- what fits on the chip

struct Plan {
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
Plan forward_plan(const MlpShape& shape) {
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
Plan backward_plan(const MlpShape& shape) {
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

// ---- launching

template <class Kind>
Status mlp_forward_of(const MlpForward& args, Stream stream) {
  using S = typename Kind::S;
  const Plan plan = forward_plan<Kind>(args.shape);
  const int64_t n = args.shape.widths[args.shape.layers];
  MlpForwardTask<S> task{};
  task.args = args;
  task.hidden = parameters<S>(args.hidden);
  task.output = parameters<S>(args.output);
  task.hidden_stride = mlp_hidden_stride(args.shape);
  task.save_pre_activations = args.hidden_outputs != nullptr && saved_by_linear(args.hidden) == Saved::input;
  task.x_vectors = vector_aligned(static_cast<const S*>(args.x), args.x_row_stride);
  task.y_vectors = vector_aligned(static_cast<const S*>(args.y), n);
  task.z_pairs = reinterpret_cast<uintptr_t>(args.z) % (2 * sizeof(S)) == 0 && n % 2 == 0;
  task.resident = plan.resident;
  task.stages = plan.stages;
  return launch({mlp_name(args.shape), plan.blocks, Kind::Forward::kThreads, plan.shared, stream},
                mlp_forward_kernel<Kind>, task);
}

// The workspace: the gradient of the last pre-activation if there is an output activation, the gradients that one layer
// passes to the layer before, and the partial sums of the blocks.
size_t output_gradient_bytes(const MlpBackward& args) {
  if (args.output.kind == ActivationKind::identity) return 0;
  return round_up(static_cast<size_t>(args.shape.m * args.shape.widths[args.shape.layers]) * size_of(args.shape.dtype));
}
size_t gradients_bytes(const MlpBackward& args) {
  return round_up(static_cast<size_t>(args.shape.m * mlp_hidden_stride(args.shape)) * size_of(args.shape.dtype));
}

template <class Kind>
Status mlp_backward_of(const MlpBackward& args, void* workspace, Stream stream) {
  using S = typename Kind::S;
  const MlpShape& shape = args.shape;
  const Plan plan = backward_plan<Kind>(shape);
  char* const memory = static_cast<char*>(workspace);
  MlpBackwardTask<S> task{};
  task.args = args;
  if (args.output.kind != ActivationKind::identity) {
    const int64_t n = shape.widths[shape.layers];
    const ActivationBackward first{shape.dtype, args.output, saved_by_linear(args.output), shape.m,
                                   n,           args.grad_y, args.grad_y_row_stride,       args.saved,
                                   n,           memory};
    const Status status = activation_backward(first, stream);
    if (!status.ok()) return status;
    task.args.grad_y = memory;
    task.args.grad_y_row_stride = n;
  }
  task.hidden = parameters<S>(args.hidden);
  task.hidden_stride = mlp_hidden_stride(shape);
  task.from_output = saved_by_linear(args.hidden) != Saved::input;
  task.gradients = reinterpret_cast<S*>(memory + output_gradient_bytes(args));
  task.partial = reinterpret_cast<float*>(memory + output_gradient_bytes(args) + gradients_bytes(args));
  task.partial_size = mlp_partial_offset(shape, shape.layers);
  const auto wanted = [&](int l) { return args.grad_w[l] != nullptr || args.grad_b[l] != nullptr; };
  if (args.grad_x == nullptr)
    while (!wanted(task.lowest)) ++task.lowest;
  task.x_vectors = vector_aligned(static_cast<const S*>(args.x), args.x_row_stride);
  task.grad_y_vectors = vector_aligned(static_cast<const S*>(task.args.grad_y), task.args.grad_y_row_stride);
  task.grad_x_vectors = vector_aligned(static_cast<const S*>(args.grad_x), shape.widths[0]);
  task.stages = plan.stages;
  const Status status = launch({mlp_name(shape), plan.blocks, Kind::InputGradient::kThreads, plan.shared, stream},
                               mlp_backward_kernel<Kind>, task);
  bool sums = false;
  for (int l = 0; l < shape.layers; ++l) sums = sums || wanted(l);
  if (!status.ok() || !sums) return status;
  return launch({{"mlp_reduce"}, quotient_up(task.partial_size, kReduceThreads), kReduceThreads, 0, stream},
                mlp_reduce_kernel<S>, task, plan.blocks);
}

}  // namespace

bool mlp_applies(const MlpShape& shape) {
  if (shape.dtype == DType::f64 || shape.layers < 1 || shape.layers > kMostMlpLayers) return false;
  for (int l = 0; l <= shape.layers; ++l)
    if (shape.widths[l] < 1 || shape.widths[l] > kMostMlpWidth) return false;
  return with_mlp_kind(shape, [&](auto kind) {
    return forward_plan<decltype(kind)>(shape).fits && backward_plan<decltype(kind)>(shape).fits;
  });
}

KernelName mlp_name(const MlpShape& shape) {
  const int width = is_wide(shape) ? kWide : kNarrow;
  if (size_of(shape.dtype) == 2) return {"mlp_mma", {width}};
  return {shape.allow_tf32 ? "mlp_tf32" : "mlp_simt", {width}};
}

Status mlp_forward(const MlpForward& args, Stream stream) {
  return with_mlp_kind(args.shape, [&](auto kind) { return mlp_forward_of<decltype(kind)>(args, stream); });
}

size_t mlp_backward_workspace(const MlpBackward& args) {
  const int64_t blocks =
      with_mlp_kind(args.shape, [&](auto kind) { return backward_plan<decltype(kind)>(args.shape).blocks; });
  const auto partial = static_cast<size_t>(blocks * mlp_partial_offset(args.shape, args.shape.layers)) * sizeof(float);
  return output_gradient_bytes(args) + gradients_bytes(args) + round_up(partial);
}

Status mlp_backward(const MlpBackward& args, void* workspace, Stream stream) {
  return with_mlp_kind(args.shape, [&](auto kind) { return mlp_backward_of<decltype(kind)>(args, workspace, stream); });
}

}  // namespace fastops::cuda
