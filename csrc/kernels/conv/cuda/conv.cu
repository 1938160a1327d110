#include "conv.cuh"

#include "../../common/cuda/launchers.h"
#include "../../gemm/cuda/gemm_plan.cuh"
#include "depthwise.cuh"

namespace fastops::cuda {
namespace {

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

int64_t product_of(const int64_t (&sizes)[3]) { return sizes[0] * sizes[1] * sizes[2]; }

// ---- the choice of the kernel

enum class Algorithm { pointwise, depthwise, implicit };

// pointwise: pixels are rows of channels, so the convolution is the product of a linear layer and uses its kernels.
Algorithm algorithm_of(const ConvGeometry& g, fastops::Layout layout) {
  if (g.groups > 1 && g.in_channels == g.groups) return Algorithm::depthwise;
  bool pointwise = g.groups == 1 && (layout == fastops::Layout::channels_last || product_of(g.in) == 1);
  for (int i = 0; i < 3; ++i)
    pointwise = pointwise && g.kernel[i] == 1 && g.stride[i] == 1 && g.padding[i] == 0 && g.in[i] == g.out[i];
  return pointwise ? Algorithm::pointwise : Algorithm::implicit;
}

// C is [m, n] for each of `slabs` phases and groups. registers: an operand is loaded through registers.
struct Extents {
  int64_t m, n, k, slabs;
  bool registers, row_sums;
};
// Kernels with large tiles exist for the calls on which models spend their time: those with asynchronous copies, and
// 16-bit numbers with channels first, which are never contiguous.
constexpr bool has_large(DType dtype, fastops::Layout layout, bool registers) {
  if (dtype == DType::f64) return false;
  return !registers || (size_of(dtype) == 2 && layout == fastops::Layout::channels_first);
}

Plan plan_for(DType dtype, fastops::Layout layout, const Extents& e) {
  return plan_product(dtype, has_large(dtype, layout, e.registers), e.m, e.n, e.k, e.slabs);
}

size_t partial_bytes(DType dtype, fastops::Layout layout, const Extents& e) {
  return partial_bytes(plan_for(dtype, layout, e), dtype, e.m, e.n, e.row_sums, e.slabs);
}

constexpr ProductNames kNames{"conv_gemm_mma", "conv_gemm_tf32", "conv_gemm_simt"};

// ---- a call in the kernels' terms

ConvShape shape_of(const ConvGeometry& g, bool gradient) {
  ConvShape shape{};
  for (int i = 0; i < 3; ++i) {
    shape.in[i] = static_cast<int>(g.in[i]);
    shape.out[i] = static_cast<int>(g.out[i]);
    shape.kernel[i] = static_cast<int>(g.kernel[i]);
    shape.stride[i] = static_cast<int>(g.stride[i]);
    shape.padding[i] = static_cast<int>(g.padding[i]);
    shape.dilation[i] = static_cast<int>(g.dilation[i]);
  }
  shape.gradient = gradient;
  return shape;
}

// The strides of a dense image, or of filters, whose pixels are their taps.
struct Dense {
  int64_t image_stride, stride[3], channel_stride;
};
Dense dense(fastops::Layout layout, int64_t channels, const int64_t (&size)[3]) {
  const bool last = layout == fastops::Layout::channels_last;
  const int64_t pixel = last ? channels : 1, pixels = product_of(size);
  return {channels * pixels, {size[1] * size[2] * pixel, size[2] * pixel, pixel}, last ? 1 : pixels};
}

// An image with `channels` channels in groups, as an operand.
template <class S>
ConvOperand<S> image_of(const void* data, const void* saved, fastops::Layout layout, int64_t channels, int64_t groups,
                        const int64_t (&size)[3]) {
  const Dense d = dense(layout, channels, size);
  return {static_cast<const S*>(data),
          static_cast<const S*>(saved),
          channels / groups * d.channel_stride,
          d.image_stride,
          {d.stride[0], d.stride[1], d.stride[2]},
          d.channel_stride,
          divisor_of(static_cast<int>(channels / groups)),
          Path::elements};
}

// Whether channels of this operand can be loaded as vectors: they must be contiguous, aligned, and in the rows of a
// tile. For 32-bit and 64-bit numbers, only the weight gradient has channels in rows.
template <class S>
bool in_vectors(const ConvOperand<S>& operand, bool weight) {
  bool aligned = (weight || sizeof(S) == 2) && operand.channel_stride == 1 &&
                 operand.channels.count() % kVector<S> == 0 && vector_aligned(operand.data, operand.image_stride) &&
                 operand.group_stride % kVector<S> == 0;
  for (const int64_t stride : operand.stride) aligned = aligned && stride % kVector<S> == 0;
  return aligned;
}

template <class S>
ConvTarget<S> target_of(const Dense& d, int64_t group_stride, void* y) {
  ConvTarget<S> target{};
  target.group_stride = group_stride;
  target.image_stride = d.image_stride;
  for (int i = 0; i < 3; ++i) target.stride[i] = d.stride[i];
  target.channel_stride = d.channel_stride;
  target.y = static_cast<S*>(y);
  return target;
}

template <class S>
Slope<S> slope_of(const Activation& activation) {
  return {activation.kind, parameters<S>(activation)};
}

// ---- launching the products

template <class Multiplier, ConvProduct product, bool last, Loads loads>
Status launch_product(const KernelName& name, const ConvTask<typename Multiplier::S>& task, Stream stream) {
  const int64_t blocks = int64_t{task.tiles_m} * task.tiles_n * task.phases * task.groups * task.splits;
  return launch({name, blocks, Multiplier::kThreads, ConvShared<Multiplier>::kBytes, stream},
                conv_kernel<Multiplier, product, last, loads>, task);
}

template <class Multiplier, ConvProduct product, bool last, bool large>
Status run_product(const KernelName& name, const ConvTask<typename Multiplier::S>& task, bool registers,
                   Stream stream) {
  using S = typename Multiplier::S;
  constexpr bool is_double = sizeof(S) == 8, first16 = sizeof(S) == 2 && !last;
  if constexpr (!is_double && !first16)
    if (!registers) return launch_product<Multiplier, product, last, Loads::async>(name, task, stream);
  if constexpr (is_double || first16 || !large)
    return launch_product<Multiplier, product, last, Loads::folded>(name, task, stream);
  return {};  // has_large excludes this
}

template <ConvProduct product, bool last, bool large>
Status run_tiles(const KernelName& name, bool, bool registers, const ConvTask<double>& task, Stream stream) {
  return run_product<Scalar64, product, last, false>(name, task, registers, stream);
}
template <ConvProduct product, bool last, bool large>
Status run_tiles(const KernelName& name, bool tf32, bool registers, const ConvTask<float>& task, Stream stream) {
  return tf32 ? run_product<Tensor32<large>, product, last, large>(name, task, registers, stream)
              : run_product<Scalar32<large>, product, last, large>(name, task, registers, stream);
}
template <ConvProduct product, bool last, bool large, class S>
Status run_tiles(const KernelName& name, bool, bool registers, const ConvTask<S>& task, Stream stream) {
  using Multiplier = Tensor16<S, large, product != ConvProduct::weight, product != ConvProduct::weight>;
  return run_product<Multiplier, product, last, large>(name, task, registers, stream);
}

template <ConvProduct product, bool last, class S>
Status run(DType dtype, bool tf32, ConvTask<S> task, const Extents& extents, void* workspace, Stream stream) {
  constexpr fastops::Layout layout = last ? fastops::Layout::channels_last : fastops::Layout::channels_first;
  const Plan plan = plan_for(dtype, layout, extents);
  task.m = extents.m;
  task.n = extents.n;
  task.tiles_m = static_cast<int>(plan.tiles_m);
  task.tiles_n = static_cast<int>(plan.tiles_n);
  task.splits = static_cast<int>(plan.splits);
  task.k_per_split = plan.k_per_split;
  task.partial = static_cast<Compute<S>*>(workspace);
  const auto even = [](const S* p) { return reinterpret_cast<uintptr_t>(p) % (2 * sizeof(S)) == 0; };
  task.target.pairs = even(task.target.y) && even(task.target.z);
  for (ConvOperand<S>* const operand : {&task.a, &task.b}) {
    const bool vectors = in_vectors(*operand, product == ConvProduct::weight);
    operand->path = vectors ? Path::vectors : sizeof(S) >= 4 ? Path::elements : Path::registers;
  }
  if (task.slope.kind != ActivationKind::identity)
    (product == ConvProduct::weight || last ? task.a : task.b).path = Path::registers;
  const KernelName name = product_name(kNames, dtype, tf32, plan.large);
  const Status status = plan.large ? run_tiles<product, last, true>(name, tf32, extents.registers, task, stream)
                                   : run_tiles<product, last, false>(name, tf32, extents.registers, task, stream);
  if (!status.ok() || plan.splits == 1) return status;
  const int64_t threads = extents.m * quotient_up(extents.n, 2) + (task.row_sums != nullptr ? extents.m : 0);
  return launch({{"conv_reduce"},
                 quotient_up(threads, kReduceThreads) * extents.slabs,
                 kReduceThreads,
                 sizeof(ConvWindow),
                 stream},
                conv_reduce_kernel<S, product, last>, task);
}

template <ConvProduct product, class S>
Status run(DType dtype, fastops::Layout layout, bool tf32, const ConvTask<S>& task, const Extents& extents,
           void* workspace, Stream stream) {
  return layout == fastops::Layout::channels_last ? run<product, true>(dtype, tf32, task, extents, workspace, stream)
                                                  : run<product, false>(dtype, tf32, task, extents, workspace, stream);
}

// ---- output, and gradient of the input: one product over different geometries

// The common form of ConvForward and ConvBackwardInput: result = h(sum over taps and channels of (from * f') * w +
// bias).
struct Gathered {
  DType dtype;
  fastops::Layout layout, w_layout;
  const ConvGeometry& g;
  bool gradient;
  const void* from;
  Activation activation;
  const void* saved;
  const void* w;
  const void* bias;
  Activation epilogue;
  void* result;
  void* z;
  bool allow_tf32;

  int64_t from_channels() const { return gradient ? g.out_channels : g.in_channels; }
  int64_t result_channels() const { return gradient ? g.in_channels : g.out_channels; }
  const int64_t (&from_size() const)[3] { return gradient ? g.out : g.in; }
  const int64_t (&result_size() const)[3] { return gradient ? g.in : g.out; }
};

Gathered gathered(const ConvForward& a) {
  return {a.dtype, a.layout, a.w_layout, a.geometry,   false, a.x, {},
          nullptr, a.w,      a.bias,     a.activation, a.y,   a.z, a.allow_tf32};
}
Gathered gathered(const ConvBackwardInput& a) {
  return {a.dtype, a.layout, a.w_layout, a.geometry, true,     a.grad_y, a.activation,
          a.saved, a.w,      a.bias,     a.epilogue, a.grad_x, a.z,      a.allow_tf32};
}

int phase_count(const ConvShape& shape) { return phases_of(shape, 0) * phases_of(shape, 1) * phases_of(shape, 2); }

// Whether the filters are first copied to the order of the product: [result channel][tap][channel].
bool reorders_filters(const Gathered& a) {
  return a.gradient || (a.w_layout == fastops::Layout::channels_first && product_of(a.g.kernel) > 1);
}

size_t filters_bytes(const Gathered& a) {
  if (!reorders_filters(a)) return 0;
  const int64_t count = a.g.out_channels * (a.g.in_channels / a.g.groups) * product_of(a.g.kernel);
  return round_up(static_cast<size_t>(count) * size_of(a.dtype));
}

template <class S>
Status reorder_filters(const Gathered& a, void* to, Stream stream) {
  const ConvGeometry& g = a.g;
  const int64_t outputs = g.out_channels / g.groups, inputs = g.in_channels / g.groups, taps = product_of(g.kernel);
  const Dense d = dense(a.w_layout, inputs, g.kernel);
  FiltersTask<S> task{};
  task.from = static_cast<const S*>(a.w);
  task.to = static_cast<S*>(to);
  task.count = g.out_channels * inputs * taps;
  task.rows = a.gradient ? inputs : outputs;
  task.taps = taps;
  task.channels = a.gradient ? outputs : inputs;
  task.group_stride = outputs * d.image_stride;
  task.row_stride = a.gradient ? d.channel_stride : d.image_stride;
  task.tap_stride = d.stride[2];
  task.channel_stride = a.gradient ? d.image_stride : d.channel_stride;
  return launch({{"conv_filters"}, quotient_up(task.count, kFiltersThreads), kFiltersThreads, 0, stream},
                filters_kernel<S>, task);
}

template <class S>
ConvOperand<S> image_operand(const Gathered& a) {
  return image_of<S>(a.from, a.saved, a.layout, a.from_channels(), a.g.groups, a.from_size());
}
// w: the filters in the order of the product.
template <class S>
ConvOperand<S> filters_operand(const Gathered& a, const void* w) {
  const int64_t channels = a.from_channels() / a.g.groups;
  ConvOperand<S> filters = image_of<S>(w, nullptr, fastops::Layout::channels_last, channels, 1, a.g.kernel);
  filters.group_stride = a.result_channels() / a.g.groups * filters.image_stride;
  return filters;
}

// The sizes of the largest phase.
Extents extents_of(const Gathered& a) {
  const ConvShape shape = shape_of(a.g, a.gradient);
  int64_t positions = a.g.batch, taps = 1;
  for (int i = 0; i < 3; ++i) {
    positions *= axis_of(shape, i, 0).positions;
    int most = 0;
    for (int phase = 0; phase < phases_of(shape, i); ++phase) {
      const int count = axis_of(shape, i, phase).taps;
      if (count > most) most = count;
    }
    taps *= most;
  }
  const int64_t channels = a.result_channels() / a.g.groups, k = taps * (a.from_channels() / a.g.groups);
  const int64_t slabs = int64_t{phase_count(shape)} * a.g.groups;
  const bool registers = a.activation.kind != ActivationKind::identity || with_dtype(a.dtype, [&](auto type) {
                           using S = decltype(type);
                           if (sizeof(S) > 2) return false;
                           return !in_vectors(image_operand<S>(a), false) ||
                                  !in_vectors(filters_operand<S>(a, reorders_filters(a) ? nullptr : a.w), false);
                         });
  if (a.layout == fastops::Layout::channels_last) return {positions, channels, k, slabs, registers, false};
  return {channels, positions, k, slabs, registers, false};
}

template <class S>
Status run_implicit(const Gathered& a, void* workspace, Stream stream) {
  const ConvGeometry& g = a.g;
  const void* w = a.w;
  if (reorders_filters(a)) {
    const Status status = reorder_filters<S>(a, workspace, stream);
    if (!status.ok()) return status;
    w = workspace;
  }
  const bool last = a.layout == fastops::Layout::channels_last;
  const Dense result = dense(a.layout, a.result_channels(), a.result_size());
  ConvTask<S> task{};
  task.shape = shape_of(g, a.gradient);
  task.batch = g.batch;
  task.phases = phase_count(task.shape);
  task.groups = static_cast<int>(g.groups);
  task.a = last ? image_operand<S>(a) : filters_operand<S>(a, w);
  task.b = last ? filters_operand<S>(a, w) : image_operand<S>(a);
  task.slope = slope_of<S>(a.activation);
  task.target = target_of<S>(result, a.result_channels() / g.groups * result.channel_stride, a.result);
  task.target.bias = static_cast<const S*>(a.bias);
  task.target.kind = a.epilogue.kind;
  task.target.parameters = parameters<S>(a.epilogue);
  task.target.z = static_cast<S*>(a.z);
  return run<ConvProduct::output>(a.dtype, a.layout, a.allow_tf32, task, extents_of(a),
                                  static_cast<char*>(workspace) + filters_bytes(a), stream);
}

template <class S>
DepthwiseImage<S> depthwise_image(const void* data, fastops::Layout layout, int64_t channels,
                                  const int64_t (&size)[3]) {
  const Dense d = dense(layout, channels, size);
  return {static_cast<const S*>(data), d.image_stride, {d.stride[0], d.stride[1], d.stride[2]}, d.channel_stride};
}

template <class S>
Status run_depthwise(const Gathered& a, Stream stream) {
  const ConvGeometry& g = a.g;
  DepthwiseTask<S> task{};
  task.shape = shape_of(g, a.gradient);
  task.channels = a.result_channels();
  task.count = g.batch * task.channels * product_of(a.result_size());
  task.multiplier = g.out_channels / g.in_channels;
  task.channels_last = a.layout == fastops::Layout::channels_last;
  task.from = depthwise_image<S>(a.from, a.layout, a.from_channels(), a.from_size());
  task.saved = static_cast<const S*>(a.saved);
  task.slope = slope_of<S>(a.activation);
  task.w = static_cast<const S*>(a.w);
  task.bias = static_cast<const S*>(a.bias);
  task.kind = a.epilogue.kind;
  task.parameters = parameters<S>(a.epilogue);
  task.y = static_cast<S*>(a.result);
  task.z = static_cast<S*>(a.z);
  return launch({{"depthwise"}, quotient_up(task.count, kDepthwiseThreads), kDepthwiseThreads, 0, stream},
                depthwise_kernel<S>, task);
}

KernelName implicit_name(const Gathered& a) {
  return product_name(kNames, a.dtype, a.allow_tf32, plan_for(a.dtype, a.layout, extents_of(a)).large);
}

size_t implicit_workspace(const Gathered& a) {
  return filters_bytes(a) + partial_bytes(a.dtype, a.layout, extents_of(a));
}

// ---- 1x1: pixels are rows of channels

int64_t pixels_of(const ConvGeometry& g) { return g.batch * product_of(g.out); }

LinearForward as_linear(const ConvForward& a) {
  const ConvGeometry& g = a.geometry;
  LinearForward linear{};
  linear.dtype = a.dtype;
  linear.m = pixels_of(g);
  linear.n = linear.y_row_stride = g.out_channels;
  linear.k = g.in_channels;
  linear.x = {a.x, linear.k, 1};
  linear.w = {a.w, linear.k, 1};
  linear.b = a.bias;
  linear.b_stride = 1;
  linear.activation = a.activation;
  linear.y = a.y;
  linear.z = a.z;
  linear.allow_tf32 = a.allow_tf32;
  return linear;
}

// Without an activation to differentiate, it is a forward product with bias and epilogue.
LinearForward as_linear(const ConvBackwardInput& a) {
  const ConvGeometry& g = a.geometry;
  LinearForward linear{};
  linear.dtype = a.dtype;
  linear.m = pixels_of(g);
  linear.n = linear.y_row_stride = g.in_channels;
  linear.k = g.out_channels;
  linear.x = {a.grad_y, linear.k, 1};
  linear.w = {a.w, 1, linear.n};
  linear.b = a.bias;
  linear.b_stride = 1;
  linear.activation = a.epilogue;
  linear.y = a.grad_x;
  linear.z = a.z;
  linear.allow_tf32 = a.allow_tf32;
  return linear;
}

template <class Args>
LinearBackward linear_gradients(const Args& a) {
  const ConvGeometry& g = a.geometry;
  LinearBackward linear{};
  linear.dtype = a.dtype;
  linear.m = pixels_of(g);
  linear.n = g.out_channels;
  linear.k = g.in_channels;
  linear.grad_y = {a.grad_y, linear.n, 1};
  linear.activation = a.activation;
  linear.saved = {a.saved, linear.n, 1};
  linear.allow_tf32 = a.allow_tf32;
  return linear;
}
LinearBackward linear_gradient(const ConvBackwardInput& a) {
  LinearBackward linear = linear_gradients(a);
  linear.w = {a.w, linear.k, 1};
  linear.grad_x = a.grad_x;
  return linear;
}
LinearBackward linear_gradient(const ConvBackwardWeight& a) {
  LinearBackward linear = linear_gradients(a);
  linear.x = {a.x, linear.k, 1};
  linear.grad_w = a.grad_w;
  linear.grad_b = a.grad_bias;
  return linear;
}

bool is_forward(const ConvBackwardInput& a) { return a.activation.kind == ActivationKind::identity; }

// ---- gradient of the weight

template <class S>
ConvOperand<S> gradient_operand(const ConvBackwardWeight& a) {
  return image_of<S>(a.grad_y, a.saved, a.layout, a.geometry.out_channels, a.geometry.groups, a.geometry.out);
}
// If grad_w is not wanted, x is not read.
template <class S>
ConvOperand<S> input_operand(const ConvBackwardWeight& a) {
  const void* const x = a.grad_w != nullptr ? a.x : a.grad_y;
  return image_of<S>(x, nullptr, a.layout, a.geometry.in_channels, a.geometry.groups, a.geometry.in);
}

Extents extents_of(const ConvBackwardWeight& a) {
  const ConvGeometry& g = a.geometry;
  const int64_t filter = g.in_channels / g.groups * product_of(g.kernel);
  const bool registers =
      a.activation.kind != ActivationKind::identity || with_dtype(a.dtype, [&](auto type) {
        using S = decltype(type);
        return sizeof(S) == 2 && !(in_vectors(gradient_operand<S>(a), true) && in_vectors(input_operand<S>(a), true));
      });
  return {g.out_channels / g.groups, a.grad_w != nullptr ? filter : 0, pixels_of(g), g.groups, registers,
          a.grad_bias != nullptr};
}

template <class S>
Status run_weight(const ConvBackwardWeight& a, void* workspace, Stream stream) {
  const ConvGeometry& g = a.geometry;
  const Dense filters = dense(a.w_layout, g.in_channels / g.groups, g.kernel);
  ConvTask<S> task{};
  task.shape = shape_of(g, false);
  task.batch = g.batch;
  task.phases = 1;
  task.groups = static_cast<int>(g.groups);
  task.a = gradient_operand<S>(a);
  task.b = input_operand<S>(a);
  task.slope = slope_of<S>(a.activation);
  task.target = target_of<S>(filters, g.out_channels / g.groups * filters.image_stride, a.grad_w);
  task.row_sums = static_cast<S*>(a.grad_bias);
  return run<ConvProduct::weight>(a.dtype, a.layout, a.allow_tf32, task, extents_of(a), workspace, stream);
}

// The least number of positions that a thread of depthwise_weight_kernel adds, and the most parts of the positions. Not
// measured.
constexpr int64_t kPositionsPerThread = 16, kMostDepthwiseSplits = 64;

template <class S>
DepthwiseWeightTask<S> depthwise_weight_task(const ConvBackwardWeight& a) {
  const ConvGeometry& g = a.geometry;
  DepthwiseWeightTask<S> task{};
  task.shape = shape_of(g, false);
  task.positions = pixels_of(g);
  task.channels = static_cast<int>(g.out_channels);
  task.multiplier = static_cast<int>(g.out_channels / g.in_channels);
  task.lanes = a.layout == fastops::Layout::channels_last ? 32 : 1;
  task.channel_blocks = static_cast<int>(quotient_up(g.out_channels, task.lanes));
  task.tap_blocks = static_cast<int>(a.grad_w != nullptr ? quotient_up(product_of(g.kernel), kDepthwiseTaps) : 1);
  const int64_t in_block = kDepthwiseThreads / task.lanes * kPositionsPerThread;
  const int64_t wanted = quotient_up(4 * int64_t{multiprocessors()}, int64_t{task.channel_blocks} * task.tap_blocks);
  const int64_t splits = smaller(smaller(wanted, quotient_up(task.positions, in_block)), kMostDepthwiseSplits);
  task.positions_per_split = quotient_up(task.positions, splits);
  task.splits = static_cast<int>(quotient_up(task.positions, task.positions_per_split));
  task.g = depthwise_image<S>(a.grad_y, a.layout, g.out_channels, g.out);
  task.x = depthwise_image<S>(a.x, a.layout, g.in_channels, g.in);
  task.saved = static_cast<const S*>(a.saved);
  task.slope = slope_of<S>(a.activation);
  task.grad_w = static_cast<S*>(a.grad_w);
  task.grad_bias = static_cast<S*>(a.grad_bias);
  return task;
}

size_t depthwise_workspace(const ConvBackwardWeight& a) {
  const auto task = depthwise_weight_task<float>(a);
  return static_cast<size_t>(task.splits * task.channels * (product_of(a.geometry.kernel) + 1)) *
         (a.dtype == DType::f64 ? 8 : 4);
}

template <class S>
Status run_depthwise_weight(const ConvBackwardWeight& a, void* workspace, Stream stream) {
  DepthwiseWeightTask<S> task = depthwise_weight_task<S>(a);
  task.partial = static_cast<Compute<S>*>(workspace);
  const int64_t blocks = int64_t{task.channel_blocks} * task.tap_blocks * task.splits;
  const Status status = launch({{"depthwise_weight"}, blocks, kDepthwiseThreads, DepthwiseShared::kBytes, stream},
                               depthwise_weight_kernel<S>, task);
  if (!status.ok()) return status;
  const int64_t threads = task.channels * (product_of(a.geometry.kernel) + 1);
  return launch({{"depthwise_reduce"}, quotient_up(threads, kDepthwiseThreads), kDepthwiseThreads, 0, stream},
                depthwise_reduce_kernel<S>, task);
}

}  // namespace

KernelName conv_forward_name(const ConvForward& call) {
  const ConvForward args = canonical(call);
  switch (algorithm_of(args.geometry, args.layout)) {
    case Algorithm::pointwise:
      return linear_forward_name(as_linear(args));
    case Algorithm::depthwise:
      return {"depthwise"};
    case Algorithm::implicit:
      break;
  }
  return implicit_name(gathered(args));
}
size_t conv_forward_workspace(const ConvForward& call) {
  const ConvForward args = canonical(call);
  switch (algorithm_of(args.geometry, args.layout)) {
    case Algorithm::pointwise:
      return linear_forward_workspace(as_linear(args));
    case Algorithm::depthwise:
      return 0;
    case Algorithm::implicit:
      break;
  }
  return implicit_workspace(gathered(args));
}
Status conv_forward(const ConvForward& call, void* workspace, Stream stream) {
  const ConvForward args = canonical(call);
  const Algorithm algorithm = algorithm_of(args.geometry, args.layout);
  if (algorithm == Algorithm::pointwise) return linear_forward(as_linear(args), workspace, stream);
  return with_dtype(args.dtype, [&](auto type) {
    using S = decltype(type);
    if (algorithm == Algorithm::depthwise) return run_depthwise<S>(gathered(args), stream);
    return run_implicit<S>(gathered(args), workspace, stream);
  });
}

KernelName conv_backward_input_name(const ConvBackwardInput& call) {
  const ConvBackwardInput args = canonical(call);
  switch (algorithm_of(args.geometry, args.layout)) {
    case Algorithm::pointwise:
      return is_forward(args) ? linear_forward_name(as_linear(args)) : linear_backward_name(linear_gradient(args));
    case Algorithm::depthwise:
      return {"depthwise"};
    case Algorithm::implicit:
      break;
  }
  return implicit_name(gathered(args));
}
size_t conv_backward_input_workspace(const ConvBackwardInput& call) {
  const ConvBackwardInput args = canonical(call);
  switch (algorithm_of(args.geometry, args.layout)) {
    case Algorithm::pointwise:
      return is_forward(args) ? linear_forward_workspace(as_linear(args))
                              : linear_backward_workspace(linear_gradient(args));
    case Algorithm::depthwise:
      return 0;
    case Algorithm::implicit:
      break;
  }
  return implicit_workspace(gathered(args));
}
Status conv_backward_input(const ConvBackwardInput& call, void* workspace, Stream stream) {
  const ConvBackwardInput args = canonical(call);
  const Algorithm algorithm = algorithm_of(args.geometry, args.layout);
  if (algorithm == Algorithm::pointwise)
    return is_forward(args) ? linear_forward(as_linear(args), workspace, stream)
                            : linear_backward(linear_gradient(args), workspace, stream);
  return with_dtype(args.dtype, [&](auto type) {
    using S = decltype(type);
    if (algorithm == Algorithm::depthwise) return run_depthwise<S>(gathered(args), stream);
    return run_implicit<S>(gathered(args), workspace, stream);
  });
}

KernelName conv_backward_weight_name(const ConvBackwardWeight& call) {
  const ConvBackwardWeight args = canonical(call);
  switch (algorithm_of(args.geometry, args.layout)) {
    case Algorithm::pointwise:
      return linear_backward_name(linear_gradient(args));
    case Algorithm::depthwise:
      return {"depthwise_weight"};
    case Algorithm::implicit:
      break;
  }
  return product_name(kNames, args.dtype, args.allow_tf32, plan_for(args.dtype, args.layout, extents_of(args)).large);
}
size_t conv_backward_weight_workspace(const ConvBackwardWeight& call) {
  const ConvBackwardWeight args = canonical(call);
  switch (algorithm_of(args.geometry, args.layout)) {
    case Algorithm::pointwise:
      return linear_backward_workspace(linear_gradient(args));
    case Algorithm::depthwise:
      return depthwise_workspace(args);
    case Algorithm::implicit:
      break;
  }
  return partial_bytes(args.dtype, args.layout, extents_of(args));
}
Status conv_backward_weight(const ConvBackwardWeight& call, void* workspace, Stream stream) {
  const ConvBackwardWeight args = canonical(call);
  const Algorithm algorithm = algorithm_of(args.geometry, args.layout);
  if (algorithm == Algorithm::pointwise) return linear_backward(linear_gradient(args), workspace, stream);
  return with_dtype(args.dtype, [&](auto type) {
    using S = decltype(type);
    if (algorithm == Algorithm::depthwise) return run_depthwise_weight<S>(args, workspace, stream);
    return run_weight<S>(args, workspace, stream);
  });
}

}  // namespace fastops::cuda
