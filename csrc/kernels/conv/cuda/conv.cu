#include "conv.cuh"

#include "../../common/cuda/planners.h"
#include "../../gemm/cuda/product.cuh"
#include "../../linear/cuda/products.h"
#include "depthwise.cuh"

namespace fastops::cuda {
namespace {

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

// C is [m, n] for each of `slabs` phases and groups.
struct Extents {
  int64_t m, n, k, slabs;
};

// Kernels with large tiles exist for the calls on which models spend their time: those with asynchronous copies, and
// 16-bit numbers with channels first, which are never contiguous. registers: an operand is loaded through registers.
constexpr bool has_large(DType dtype, bool last, bool registers) {
  if (dtype == DType::f64) return false;
  return !registers || (size_of(dtype) == 2 && !last);
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

// An image with `channels` channels in groups, as an operand. Its channels are loaded as vectors if they are
// contiguous, aligned, and in the rows of a tile. For 32-bit and 64-bit numbers, only the weight gradient has channels
// in rows.
template <class S>
ConvOperand<S> image_of(int alignment, bool weight, fastops::Layout layout, int64_t channels, int64_t groups,
                        const int64_t (&size)[3]) {
  const Dense d = dense(layout, channels, size);
  const int64_t in_group = channels / groups;
  const bool vectors = (weight || sizeof(S) == 2) && layout == fastops::Layout::channels_last &&
                       vector_aligned<S>(static_cast<uintptr_t>(alignment), in_group);
  return {nullptr,
          nullptr,
          in_group * d.channel_stride,
          d.image_stride,
          {d.stride[0], d.stride[1], d.stride[2]},
          d.channel_stride,
          divisor_of(static_cast<int>(in_group)),
          vectors          ? Path::vectors
          : sizeof(S) >= 4 ? Path::elements
                           : Path::registers};
}

template <class S>
ConvTarget<S> target_of(const Dense& d, int64_t group_stride) {
  ConvTarget<S> target{};
  target.group_stride = group_stride;
  target.image_stride = d.image_stride;
  for (int i = 0; i < 3; ++i) target.stride[i] = d.stride[i];
  target.channel_stride = d.channel_stride;
  return target;
}

template <class S>
Slope<S> slope_of(const Activation& activation) {
  return {activation.kind, parameters<S>(activation)};
}

// ---- the products

using ImplicitProduct = Product<sizeof(ConvTask<double>)>;

template <class Multiplier, ConvProduct product, bool last, Loads loads>
Status launch_product(const void* decided, const KernelName& name, const ProductPointers& p, Stream stream) {
  using S = typename Multiplier::S;
  ConvTask<S> task = *static_cast<const ConvTask<S>*>(decided);
  constexpr bool in_order = product == ConvProduct::weight || last;
  ConvOperand<S>&first = in_order ? task.a : task.b, &second = in_order ? task.b : task.a;
  first.data = static_cast<const S*>(p.first);
  first.saved = static_cast<const S*>(p.saved);
  second.data = static_cast<const S*>(p.second);
  task.target.bias = static_cast<const S*>(p.bias);
  task.target.y = static_cast<S*>(p.y);
  task.target.z = static_cast<S*>(p.z);
  const auto even = [](const S* to) { return reinterpret_cast<uintptr_t>(to) % (2 * sizeof(S)) == 0; };
  task.target.pairs = even(task.target.y) && even(task.target.z);
  task.row_sums = static_cast<S*>(p.row_sums);
  task.partial = static_cast<Compute<S>*>(p.partial);
  const int64_t slabs = int64_t{task.phases} * task.groups;
  const int64_t blocks = int64_t{task.tiles_m} * task.tiles_n * slabs * task.splits;
  const Status status = launch({name, blocks, Multiplier::kThreads, ConvShared<Multiplier>::kBytes, stream},
                               conv_kernel<Multiplier, product, last, loads>, task);
  if (!status.ok() || task.splits == 1) return status;
  const int64_t threads = task.m * quotient_up(task.n, 2) + (task.row_sums != nullptr ? task.m : 0);
  return launch(
      {{"conv_reduce"}, quotient_up(threads, kReduceThreads) * slabs, kReduceThreads, sizeof(ConvWindow), stream},
      conv_reduce_kernel<S, product, last>, task);
}

template <class Multiplier, ConvProduct product, bool last, Loads loads>
auto permitted() {
  permit_shared<conv_kernel<Multiplier, product, last, loads>>(ConvShared<Multiplier>::kBytes);
  return launch_product<Multiplier, product, last, loads>;
}

// The product of a task that has all but its tiles and pointers.
template <ConvProduct product, bool last, class Call, class S>
ImplicitProduct product_of(const Call& call, ConvTask<S> task, const Extents& e, bool row_sums) {
  constexpr bool weight = product == ConvProduct::weight;
  if (task.slope.kind != ActivationKind::identity) (weight || last ? task.a : task.b).path = Path::registers;
  const bool registers = task.a.path == Path::registers || task.b.path == Path::registers;
  const Tiling tiling = tiling_of(call.dtype, has_large(call.dtype, last, registers), e.m, e.n, e.k, e.slabs);
  task.m = e.m;
  task.n = e.n;
  task.tiles_m = static_cast<int>(tiling.tiles_m);
  task.tiles_n = static_cast<int>(tiling.tiles_n);
  task.splits = static_cast<int>(tiling.splits);
  task.k_per_split = tiling.k_per_split;
  ImplicitProduct result{product_name(kNames, call.dtype, call.precision, tiling.large),
                         partial_bytes(tiling, call.dtype, e.m, e.n, row_sums, e.slabs),
                         nullptr,
                         {}};
  with_multiplier<S, !weight, !weight>(tiling.large, call.precision, [&](auto type, auto large) {
    using Multiplier = typename decltype(type)::type;
    constexpr bool is_double = sizeof(S) == 8, first16 = sizeof(S) == 2 && !last;
    if constexpr (!is_double && !first16)
      if (!registers) result.launcher = permitted<Multiplier, product, last, Loads::async>();
    if constexpr (is_double || first16 || !large)  // as has_large
      if (result.launcher == nullptr) result.launcher = permitted<Multiplier, product, last, Loads::folded>();
  });
  std::memcpy(result.task, &task, sizeof task);
  return result;
}

template <ConvProduct product, class Call, class S>
ImplicitProduct product_of(const Call& call, const ConvTask<S>& task, const Extents& e, bool row_sums = false) {
  return call.layout == fastops::Layout::channels_last ? product_of<product, true>(call, task, e, row_sums)
                                                       : product_of<product, false>(call, task, e, row_sums);
}

// ---- output, and gradient of the input: one product over different geometries

// The common form of ConvForward and ConvBackwardInput: result = h(sum over taps and channels of (from * f') * w +
// bias).
struct Gathered {
  DType dtype;
  fastops::Layout layout, w_layout;
  const ConvGeometry& g;
  bool gradient;
  Activation activation, epilogue;
  Precision precision;
  int alignment;

  int64_t from_channels() const { return gradient ? g.out_channels : g.in_channels; }
  int64_t result_channels() const { return gradient ? g.in_channels : g.out_channels; }
  const int64_t (&from_size() const)[3] { return gradient ? g.out : g.in; }
  const int64_t (&result_size() const)[3] { return gradient ? g.in : g.out; }
};

Gathered gathered(const ConvForward& a, const ConvGeometry& g) {
  return {a.dtype, a.layout, a.w_layout, g, false, {}, a.activation, a.precision, a.alignment};
}
Gathered gathered(const ConvBackwardInput& a, const ConvGeometry& g) {
  return {a.dtype, a.layout, a.w_layout, g, true, a.activation, a.epilogue, a.precision, a.alignment};
}
ProductPointers memory_of(const ConvForward& a, const ConvForward::Pointers& p, void* partial) {
  return {p.x, p.w, nullptr, a.with_bias ? p.bias : nullptr, p.y, a.with_z ? p.z : nullptr, nullptr, partial};
}
ProductPointers memory_of(const ConvBackwardInput& a, const ConvBackwardInput::Pointers& p, void* partial) {
  return {p.grad_y, p.w, p.saved, a.with_bias ? p.bias : nullptr, p.grad_x, a.with_z ? p.z : nullptr, nullptr, partial};
}

int phase_count(const ConvShape& shape) { return phases_of(shape, 0) * phases_of(shape, 1) * phases_of(shape, 2); }

// Whether the filters are first copied to the order of the product: [result channel][tap][channel].
bool reorders_filters(const Gathered& a) {
  return a.gradient || (a.w_layout == fastops::Layout::channels_first && product_of(a.g.kernel) > 1);
}

template <class S>
FiltersTask<S> filters_task(const Gathered& a) {
  const ConvGeometry& g = a.g;
  const int64_t outputs = g.out_channels / g.groups, inputs = g.in_channels / g.groups, taps = product_of(g.kernel);
  const Dense d = dense(a.w_layout, inputs, g.kernel);
  FiltersTask<S> task{};
  task.count = g.out_channels * inputs * taps;
  task.rows = a.gradient ? inputs : outputs;
  task.taps = taps;
  task.channels = a.gradient ? outputs : inputs;
  task.group_stride = outputs * d.image_stride;
  task.row_stride = a.gradient ? d.channel_stride : d.image_stride;
  task.tap_stride = d.stride[2];
  task.channel_stride = a.gradient ? d.image_stride : d.channel_stride;
  return task;
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
  if (a.layout == fastops::Layout::channels_last) return {positions, channels, k, slabs};
  return {channels, positions, k, slabs};
}

template <class S>
ImplicitProduct implicit_product(const Gathered& a) {
  const ConvGeometry& g = a.g;
  const bool last = a.layout == fastops::Layout::channels_last;
  const int64_t from = a.from_channels() / g.groups, result = a.result_channels() / g.groups;
  const auto image = image_of<S>(a.alignment, false, a.layout, a.from_channels(), g.groups, a.from_size());
  auto filters = image_of<S>(reorders_filters(a) ? kWorkspaceAlignment : a.alignment, false,
                             fastops::Layout::channels_last, from, 1, g.kernel);
  filters.group_stride = result * filters.image_stride;
  const Dense to = dense(a.layout, a.result_channels(), a.result_size());
  ConvTask<S> task{};
  task.shape = shape_of(g, a.gradient);
  task.batch = g.batch;
  task.phases = phase_count(task.shape);
  task.groups = static_cast<int>(g.groups);
  task.a = last ? image : filters;
  task.b = last ? filters : image;
  task.slope = slope_of<S>(a.activation);
  task.target = target_of<S>(to, result * to.channel_stride);
  task.target.kind = a.epilogue.kind;
  task.target.parameters = parameters<S>(a.epilogue);
  return product_of<ConvProduct::output>(a, task, extents_of(a));
}

template <class S>
DepthwiseImage<S> depthwise_image(fastops::Layout layout, int64_t channels, const int64_t (&size)[3]) {
  const Dense d = dense(layout, channels, size);
  return {nullptr, d.image_stride, {d.stride[0], d.stride[1], d.stride[2]}, d.channel_stride};
}

template <class S>
DepthwiseTask<S> depthwise_task(const Gathered& a) {
  const ConvGeometry& g = a.g;
  DepthwiseTask<S> task{};
  task.shape = shape_of(g, a.gradient);
  task.channels = a.result_channels();
  task.count = g.batch * task.channels * product_of(a.result_size());
  task.multiplier = g.out_channels / g.in_channels;
  task.channels_last = a.layout == fastops::Layout::channels_last;
  task.from = depthwise_image<S>(a.layout, a.from_channels(), a.from_size());
  task.slope = slope_of<S>(a.activation);
  task.kind = a.epilogue.kind;
  task.parameters = parameters<S>(a.epilogue);
  return task;
}

// ---- 1x1: pixels are rows of channels

int64_t pixels_of(const ConvGeometry& g) { return g.batch * product_of(g.out); }

// Without an activation to differentiate, a gradient of the input is a forward product with bias and epilogue, too.
LinearForward as_linear(const Gathered& a) {
  LinearForward linear{};
  linear.dtype = a.dtype;
  linear.m = pixels_of(a.g);
  linear.n = linear.y_row_stride = a.result_channels();
  linear.k = a.from_channels();
  linear.x_strides = {linear.k, 1};
  linear.w_strides = a.gradient ? Strides{1, linear.n} : Strides{linear.k, 1};
  linear.activation = a.epilogue;
  linear.precision = a.precision;
  linear.alignment = a.alignment;
  return linear;
}

template <class Call>
LinearBackward linear_gradients(const Call& a, const ConvGeometry& g) {
  LinearBackward linear{};
  linear.dtype = a.dtype;
  linear.m = pixels_of(g);
  linear.n = g.out_channels;
  linear.k = g.in_channels;
  linear.grad_y_strides = linear.saved_strides = {linear.n, 1};
  linear.x_strides = linear.w_strides = {linear.k, 1};
  linear.activation = a.activation;
  linear.precision = a.precision;
  linear.alignment = a.alignment;
  return linear;
}

// ---- gradient of the weight

// If grad_w is not wanted, x is not read.
ProductPointers memory_of(const ConvBackwardWeight& a, const ConvBackwardWeight::Pointers& p, void* partial) {
  return {p.grad_y, a.with_grad_w ? p.x : p.grad_y,           p.saved, nullptr, a.with_grad_w ? p.grad_w : nullptr,
          nullptr,  a.with_grad_bias ? p.grad_bias : nullptr, partial};
}

template <class S>
ImplicitProduct implicit_weight_product(const ConvBackwardWeight& a, const ConvGeometry& g) {
  const int64_t outputs = g.out_channels / g.groups, inputs = g.in_channels / g.groups;
  const Dense filters = dense(a.w_layout, inputs, g.kernel);
  ConvTask<S> task{};
  task.shape = shape_of(g, false);
  task.batch = g.batch;
  task.phases = 1;
  task.groups = static_cast<int>(g.groups);
  task.a = image_of<S>(a.alignment, true, a.layout, g.out_channels, g.groups, g.out);
  task.b = image_of<S>(a.alignment, true, a.layout, g.in_channels, g.groups, g.in);
  task.slope = slope_of<S>(a.activation);
  task.target = target_of<S>(filters, outputs * filters.image_stride);
  const Extents extents{outputs, a.with_grad_w ? inputs * product_of(g.kernel) : 0, pixels_of(g), g.groups};
  return product_of<ConvProduct::weight>(a, task, extents, a.with_grad_bias);
}

// The least number of positions that a thread of depthwise_weight_kernel adds, and the most parts of the positions. Not
// measured.
constexpr int64_t kPositionsPerThread = 16, kMostDepthwiseSplits = 64;

template <class S>
DepthwiseWeightTask<S> depthwise_weight_task(const ConvBackwardWeight& a, const ConvGeometry& g) {
  DepthwiseWeightTask<S> task{};
  task.shape = shape_of(g, false);
  task.positions = pixels_of(g);
  task.channels = static_cast<int>(g.out_channels);
  task.multiplier = static_cast<int>(g.out_channels / g.in_channels);
  task.lanes = a.layout == fastops::Layout::channels_last ? 32 : 1;
  task.channel_blocks = static_cast<int>(quotient_up(g.out_channels, task.lanes));
  task.tap_blocks = static_cast<int>(a.with_grad_w ? quotient_up(product_of(g.kernel), kDepthwiseTaps) : 1);
  const int64_t in_block = kDepthwiseThreads / task.lanes * kPositionsPerThread;
  const int64_t wanted = quotient_up(4 * multiprocessors(), int64_t{task.channel_blocks} * task.tap_blocks);
  const int64_t splits = smaller(smaller(wanted, quotient_up(task.positions, in_block)), kMostDepthwiseSplits);
  task.positions_per_split = at_least_one(quotient_up(task.positions, at_least_one(splits)));
  task.splits = static_cast<int>(at_least_one(quotient_up(task.positions, task.positions_per_split)));
  task.g = depthwise_image<S>(a.layout, g.out_channels, g.out);
  task.x = depthwise_image<S>(a.layout, g.in_channels, g.in);
  task.slope = slope_of<S>(a.activation);
  return task;
}

// ---- plans

bool has_kernel(const ConvGeometry& g, const Activation& folded) {
  return fits_int(g) && (folded.kind == ActivationKind::identity || can_fold(folded));
}

// A product that needs nothing done first.
template <class Call, class P>
void decide_product(Plan<Call>& plan, const P& product) {
  decide(plan, product.name, product.partial, product,
         [](const Call& call, const P& how, const typename Call::Pointers& p, char* workspace, Stream stream) {
           return how.launch(memory_of(call, p, workspace), stream);
         });
}

// The workspace has the filters in the order of the product, then its partial sums.
template <class S, class Call>
void decide_implicit(Plan<Call>& plan, const Gathered& a) {
  const ImplicitProduct product = implicit_product<S>(a);
  if (!reorders_filters(a)) return decide_product(plan, product);
  struct Decision {
    ImplicitProduct product;
    FiltersTask<S> filters;
    size_t filters_bytes;
  } decision{product, filters_task<S>(a), 0};
  decision.filters_bytes = round_up(static_cast<size_t>(decision.filters.count) * sizeof(S));
  decide(plan, product.name, decision.filters_bytes + product.partial, decision,
         [](const Call& call, const Decision& how, const typename Call::Pointers& p, char* workspace, Stream stream) {
           FiltersTask<S> filters = how.filters;
           filters.from = static_cast<const S*>(p.w);
           filters.to = reinterpret_cast<S*>(workspace);
           const Status status =
               launch({{"conv_filters"}, quotient_up(filters.count, kFiltersThreads), kFiltersThreads, 0, stream},
                      filters_kernel<S>, filters);
           if (!status.ok()) return status;
           ProductPointers memory = memory_of(call, p, workspace + how.filters_bytes);
           memory.second = workspace;
           return how.product.launch(memory, stream);
         });
}

template <class S, class Call>
void decide_depthwise(Plan<Call>& plan, const Gathered& a) {
  decide(plan, {"depthwise"}, 0, depthwise_task<S>(a),
         [](const Call& call, DepthwiseTask<S> task, const typename Call::Pointers& p, char*, Stream stream) {
           const ProductPointers memory = memory_of(call, p, nullptr);
           task.from.data = static_cast<const S*>(memory.first);
           task.saved = static_cast<const S*>(memory.saved);
           task.w = static_cast<const S*>(memory.second);
           task.bias = static_cast<const S*>(memory.bias);
           task.y = static_cast<S*>(memory.y);
           task.z = static_cast<S*>(memory.z);
           return launch({{"depthwise"}, quotient_up(task.count, kDepthwiseThreads), kDepthwiseThreads, 0, stream},
                         depthwise_kernel<S>, task);
         });
}

template <class Call>
void plan_gathered(Plan<Call>& plan) {
  const ConvGeometry g = canonical(plan.call.geometry);
  const Gathered a = gathered(plan.call, g);
  if (!has_kernel(g, a.activation)) return;
  switch (algorithm_of(g, a.layout)) {
    case Algorithm::pointwise:
      return decide_product(plan, a.activation.kind == ActivationKind::identity
                                      ? output_product(as_linear(a))
                                      : input_product(linear_gradients(a, g)));
    case Algorithm::depthwise:
      return with_dtype(a.dtype, [&](auto type) { decide_depthwise<decltype(type)>(plan, a); });
    case Algorithm::implicit:
      return with_dtype(a.dtype, [&](auto type) { decide_implicit<decltype(type)>(plan, a); });
  }
}

template <class S>
void decide_depthwise_weight(Plan<ConvBackwardWeight>& plan, const ConvGeometry& g) {
  const auto decided = depthwise_weight_task<S>(plan.call, g);
  const int64_t sums = decided.channels * (product_of(g.kernel) + 1);
  decide(plan, {"depthwise_weight"}, static_cast<size_t>(decided.splits * sums) * sizeof(Compute<S>), decided,
         [](const ConvBackwardWeight& call, DepthwiseWeightTask<S> task, const ConvBackwardWeight::Pointers& p,
            char* workspace, Stream stream) {
           const ProductPointers memory = memory_of(call, p, workspace);
           task.g.data = static_cast<const S*>(memory.first);
           task.x.data = static_cast<const S*>(memory.second);
           task.saved = static_cast<const S*>(memory.saved);
           task.grad_w = static_cast<S*>(memory.y);
           task.grad_bias = static_cast<S*>(memory.row_sums);
           task.partial = static_cast<Compute<S>*>(memory.partial);
           const int64_t blocks = int64_t{task.channel_blocks} * task.tap_blocks * task.splits;
           const Status status =
               launch({{"depthwise_weight"}, blocks, kDepthwiseThreads, DepthwiseShared::kBytes, stream},
                      depthwise_weight_kernel<S>, task);
           if (!status.ok()) return status;
           const int64_t threads = task.channels * (product_of(call.geometry.kernel) + 1);
           return launch({{"depthwise_reduce"}, quotient_up(threads, kDepthwiseThreads), kDepthwiseThreads, 0, stream},
                         depthwise_reduce_kernel<S>, task);
         });
}

}  // namespace

void plan_call(Plan<ConvForward>& plan) {
  if (!plan.call.with_residual) plan_gathered(plan);
}
void plan_call(Plan<ConvBackwardInput>& plan) { plan_gathered(plan); }

void plan_call(Plan<ConvBackwardWeight>& plan) {
  const ConvBackwardWeight& call = plan.call;
  const ConvGeometry g = canonical(call.geometry);
  if (!has_kernel(g, call.activation)) return;
  switch (algorithm_of(g, call.layout)) {
    case Algorithm::pointwise: {
      LinearBackward linear = linear_gradients(call, g);
      linear.with_grad_w = call.with_grad_w;
      linear.with_grad_bias = call.with_grad_bias;
      return decide_product(plan, weight_product(linear));
    }
    case Algorithm::depthwise:
      return with_dtype(call.dtype, [&](auto type) { decide_depthwise_weight<decltype(type)>(plan, g); });
    case Algorithm::implicit:
      return with_dtype(call.dtype,
                        [&](auto type) { decide_product(plan, implicit_weight_product<decltype(type)>(call, g)); });
  }
}

}  // namespace fastops::cuda
