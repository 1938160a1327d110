// Convolution + activation + max pool. The contract is csrc/kernels/conv_pool/conv_pool.h. The convolution of a block
// of images is written to a workspace that stays in the cache, and pooled from there. Backward computes the unpooled
// gradient of a block and calls the gradients of the convolution with it.
#pragma once

#include "../../common/cpu/common.inl"
#include "../../pool/cpu/taps.inl"
#include "first_layer_forward.inl"

// The size of a block between the two steps. Forward, it is half of a thread's L2 (Granite Rapids). Backward, it is
// shared by the whole team, as every block costs a pass over the weight gradient.
constexpr int64_t kPoolBlockBytes = 1 << 20;
constexpr int64_t kUnpoolBlockBytes = 8 << 20;
constexpr int64_t kManyBlocks = 4;  // a thread's, of which one more is little

inline void pooled_size(const ConvGeometry& g, const int64_t* pool, int64_t* pooled) {
  for (int d = 0; d < 3; ++d) pooled[d] = g.out[d] / pool[d];
}

template <class Args>
inline int64_t pooled_elements(const Args& args) {  // per channel and image
  int64_t pooled[3];
  pooled_size(args.geometry, args.pool, pooled);
  return pooled[0] * pooled[1] * pooled[2];
}
inline int64_t spatial_elements(const int64_t* sizes) { return sizes[0] * sizes[1] * sizes[2]; }

// The images of a block; the number does not depend on the number of threads.
template <class T, class Args>
inline int64_t images_in_block(const Args& args, int64_t bytes) {
  const ConvGeometry& g = args.geometry;
  const int64_t image = g.out_channels * spatial_elements(g.out) * static_cast<int64_t>(sizeof(T));
  return larger<int64_t>(1, smaller(g.batch, bytes / larger<int64_t>(image, 1)));
}

// The plan of a step, for some images at a time.
template <class Call>
inline Plan<Call> plan_of(const Call& call, int threads, Bf16Multiply bf16_multiply) {
  Plan<Call> plan;
  plan.call = call;
  plan.target = {threads, bf16_multiply};
  fill_plan(plan);
  return plan;
}

// The two steps of a block: convolution and pool.
struct ConvPoolSteps {
  Plan<ConvForward> conv;
  Plan<MaxPoolForward> pool;

  ConvPoolSteps(const Bound<ConvPoolForward>& args, int64_t images, int threads) {
    const ConvGeometry& g = args.geometry;
    ConvForward call{.dtype = args.dtype,
                     .layout = args.layout,
                     .w_layout = args.w_layout,
                     .geometry = g,
                     .with_bias = args.with_bias,
                     .activation = args.activation,
                     .precision = args.precision,
                     .packed_w = args.packed_w};
    call.geometry.batch = images;
    conv = plan_of(call, threads, args.bf16_multiply);
    MaxPoolForward windows{};
    windows.dtype = args.dtype;
    windows.layout = args.layout;
    windows.geometry.batch = images;
    windows.geometry.channels = g.out_channels;
    pooled_size(g, args.pool, windows.geometry.out);
    for (int d = 0; d < 3; ++d) {
      windows.geometry.in[d] = g.out[d];
      windows.geometry.kernel[d] = windows.geometry.stride[d] = args.pool[d];
      windows.geometry.dilation[d] = 1;
    }
    windows.kind = args.with_indices ? PoolIndices::window : PoolIndices::none;
    pool = plan_of(windows, threads, args.bf16_multiply);
  }
};

template <class T>
inline int64_t weight_bytes(const ConvGeometry& g) {
  const int64_t elements = g.out_channels * (g.in_channels / g.groups) * spatial_elements(g.kernel);
  return elements * static_cast<int64_t>(sizeof(T));
}

// Packed weights are those of whole blocks, then those of the last one, each as its plan of the convolution reads them.
template <class T>
inline size_t packed_bytes(const Bound<ConvPoolForward>& args, const Plan<ConvForward>& conv) {
  return aligned(conv.packed > 0 ? static_cast<int64_t>(conv.packed) : weight_bytes<T>(args.geometry));
}
template <class T>
void pack_convolution(const Bound<ConvPoolForward>& args, const Plan<ConvForward>& conv, const void* w, void* to) {
  if (conv.packed > 0)
    conv.pack(w, to);
  else
    __builtin_memcpy(to, w, static_cast<size_t>(weight_bytes<T>(args.geometry)));
}

struct ConvPoolPlan {
  bool packed;                   // weights come packed
  int64_t images, blocks, rest;  // of a block, their number, and of the last block
  int workers;                   // 1: every thread computes its own blocks; else the team one block after the other
  size_t conv_bytes, block_bytes;
};

template <class T>
ConvPoolPlan plan_conv_pool(const Bound<ConvPoolForward>& args, int threads) {
  const ConvGeometry& g = args.geometry;
  ConvPoolPlan plan{};
  plan.images = images_in_block<T>(args, kPoolBlockBytes);
  plan.blocks = ceil_div(g.batch, plan.images);
  plan.images = ceil_div(g.batch, plan.blocks);
  plan.blocks = ceil_div(g.batch, plan.images);
  plan.rest = g.batch - (plan.blocks - 1) * plan.images;
  // Each its own, unless some threads would have nothing to do for a part of the time. 64 x 32 x 14 x 14 -> 64 on two
  // threads, AMD Zen 1: blocks of 20, 20, 20 and 4 images 6.3 ms, of 16 5.1; on one thread 9.8.
  plan.workers = plan.blocks % threads == 0 || plan.blocks >= kManyBlocks * threads ? 1 : threads;
  const ConvPoolSteps whole(args, plan.images, plan.workers), last(args, plan.rest, plan.workers);
  plan.packed = whole.conv.packed + last.conv.packed > 0;
  plan.conv_bytes = larger(whole.conv.workspace, last.conv.workspace);
  plan.conv_bytes = aligned(static_cast<int64_t>(plan.conv_bytes));
  plan.block_bytes = aligned(plan.images * g.out_channels * spatial_elements(g.out) * static_cast<int64_t>(sizeof(T)));
  return plan;
}

// Sets the index to kNoGradient where the pooled y is not positive: there the derivative of ReLU is zero.
template <class T>
void mark_no_gradient(const T* y, int64_t n, uint8_t* indices) {
  using C = Compute<T>;
  using Lanes = Vec<C>;
  for (int64_t i = 0; i < n; i += Lanes::size) {
    const int count = static_cast<int>(smaller<int64_t>(Lanes::size, n - i));
    const Mask<C> none = le(Lanes::load(y + i, count), Lanes::zero());
    select(none, Taps<C>::set1(kNoGradient), Taps<C>::load(indices + i, count)).store(indices + i, count);
  }
}

template <class T>
void conv_pool_block(const Bound<ConvPoolForward>& args, const ConvPoolSteps& steps, int64_t first, void* block,
                     const void* w, void* workspace, const Team& team) {
  const ConvGeometry& g = args.geometry;
  const T* const x = static_cast<const T*>(args.x) + first * g.in_channels * spatial_elements(g.in);
  steps.conv.run({x, w, args.bias, block}, workspace, team);
  const int64_t image = g.out_channels * pooled_elements(args), at = first * image;
  T* const y = static_cast<T*>(args.y) + at;
  uint8_t* const indices = args.indices != nullptr ? args.indices + at : nullptr;
  steps.pool.run({block, y, indices}, nullptr, team);
  if (indices != nullptr && args.activation.kind == ActivationKind::relu)
    mark_no_gradient(y, steps.pool.call.geometry.batch * image, indices);
}

// The steps are planned once a run, for whole blocks and for the last one.
template <class T>
void conv_pool(const Bound<ConvPoolForward>& args, const ConvPoolPlan& plan, void* workspace, const Team& team) {
  unsigned char* const bytes = static_cast<unsigned char*>(workspace);
  const ConvPoolSteps whole(args, plan.images, plan.workers), last(args, plan.rest, plan.workers);
  const void* const w = args.w;
  const void* const last_w =
      static_cast<const unsigned char*>(w) + (plan.packed ? packed_bytes<T>(args, whole.conv) : 0);
  const auto block = [&](int64_t i, unsigned char* mine, const Team& workers) {
    const bool is_last = i == plan.blocks - 1;
    conv_pool_block<T>(args, is_last ? last : whole, i * plan.images, mine + plan.conv_bytes, is_last ? last_w : w,
                       mine, workers);
  };
  if (plan.workers > 1) {
    for (int64_t i = 0; i < plan.blocks; ++i) block(i, bytes, team);
    return;
  }
  parallel(team, team.threads, [&](Crew& crew) {
    unsigned char* const mine = bytes + static_cast<size_t>(crew.thread) * (plan.conv_bytes + plan.block_bytes);
    crew.each(plan.blocks, [&](int64_t i) { block(i, mine, Team{}); });
  });
}

// A row of the unpooled gradient: element j * width + i is grad[j] if indices[j] == tap + i, else zero.
template <class T>
void unpool_row(const T* grad, const uint8_t* indices, int64_t n, int64_t width, int64_t tap, int64_t row, T* to) {
  using C = Compute<T>;
  using Lanes = Vec<C>;
  constexpr int64_t S = Lanes::size;
  if (width <= 2) {
    for (int64_t j = 0; j < n; j += S) {
      const int count = static_cast<int>(smaller(S, n - j));
      const Lanes g = Lanes::load(grad + j, count);
      const Lanes left = select(equal<C>(indices + j, count, tap), g, Lanes::zero());
      if (width == 1) {
        left.store(to + j, count);
        continue;
      }
      Lanes a, b;
      interleave(left, select(equal<C>(indices + j, count, tap + 1), g, Lanes::zero()), a, b);
      a.store(to + 2 * j, smaller<int>(2 * count, S));
      if (2 * count > S) b.store(to + 2 * j + S, 2 * count - static_cast<int>(S));
    }
  } else {
    for (int64_t j = 0; j < n; ++j)
      for (int64_t i = 0; i < width; ++i) to[j * width + i] = indices[j] == tap + i ? grad[j] : T{};
  }
  for (int64_t i = n * width; i < row; ++i) to[i] = T{};
}

// The unpooled gradient of images [first, first + images). A unit of work is one of its rows, of one channel or, for
// channels_last, of all channels.
template <class T>
void unpool(const Bound<ConvPoolBackward>& args, int64_t first, int64_t images, T* to, const Team& team) {
  using C = Compute<T>;
  using Lanes = Vec<C>;
  const ConvGeometry& g = args.geometry;
  int64_t pooled[3];
  pooled_size(g, args.pool, pooled);
  const bool last = args.layout == Layout::channels_last;
  const int64_t channels = last ? g.out_channels : 1, planes = last ? images : images * g.out_channels;
  const int64_t row = g.out[2] * channels, pooled_row = pooled[2] * channels;
  const int64_t start = first * g.out_channels * pooled_elements(args);
  const T* const grad_y = static_cast<const T*>(args.grad_y) + start;
  const uint8_t* const indices = args.indices + start;
  const int64_t units = planes * g.out[0] * g.out[1];
  const int wanted = static_cast<int>(smaller<int64_t>(team.threads, units * row / (16 * 1024) + 1));
  parallel(team, wanted, [&](Crew& crew) {
    crew.each(units, [&](int64_t unit) {
      const int64_t h = unit % g.out[1], d = unit / g.out[1] % g.out[0], plane = unit / g.out[1] / g.out[0];
      const int64_t ph = h / args.pool[1], pd = d / args.pool[0];
      T* const out = to + unit * row;
      if (ph >= pooled[1] || pd >= pooled[0] || pooled[2] == 0) {
        for (int64_t i = 0; i < row; ++i) out[i] = T{};
        return;
      }
      const int64_t from = ((plane * pooled[0] + pd) * pooled[1] + ph) * pooled_row;
      const int64_t tap = (d % args.pool[0] * args.pool[1] + h % args.pool[1]) * args.pool[2];
      if (!last) {
        unpool_row(grad_y + from, indices + from, pooled[2], args.pool[2], tap, row, out);
        return;
      }
      for (int64_t j = 0; j < g.out[2]; ++j) {
        const int64_t pw = j / args.pool[2], at = from + pw * channels;
        for (int64_t c = 0; c < channels; c += Lanes::size) {
          const int count = static_cast<int>(smaller<int64_t>(Lanes::size, channels - c));
          Lanes value = Lanes::zero();
          if (pw < pooled[2])
            value = select(equal<C>(indices + at + c, count, tap + j % args.pool[2]),
                           Lanes::load(grad_y + at + c, count), Lanes::zero());
          value.store(out + j * channels + c, count);
        }
      }
    });
  });
}

// The gradients of the convolution of a block.
struct UnpoolSteps {
  Plan<ConvBackwardInput> input;
  Plan<ConvBackwardWeight> weight;
  bool with_input, with_weight;

  UnpoolSteps(const Bound<ConvPoolBackward>& args, int64_t images, bool weights, int threads)
      : with_input(args.grad_x != nullptr), with_weight(weights) {
    ConvGeometry geometry = args.geometry;
    geometry.batch = images;
    if (with_input)
      input = plan_of(ConvBackwardInput{.dtype = args.dtype,
                                        .layout = args.layout,
                                        .w_layout = args.w_layout,
                                        .geometry = geometry,
                                        .precision = args.precision},
                      threads, args.bf16_multiply);
    if (with_weight)
      weight = plan_of(ConvBackwardWeight{.dtype = args.dtype,
                                          .layout = args.layout,
                                          .w_layout = args.w_layout,
                                          .geometry = geometry,
                                          .with_grad_w = args.grad_w != nullptr,
                                          .with_grad_bias = args.grad_bias != nullptr},
                       threads, args.bf16_multiply);
  }
  size_t workspace() const { return larger(with_input ? input.workspace : 0, with_weight ? weight.workspace : 0); }
};

struct UnpoolPlan {
  bool first;    // conv_pool_first_weight computes the gradient of the weights
  bool weights;  // the gradient of a block's convolution does
  int64_t images, blocks, rest;
  int64_t weight_elements;
  size_t conv_bytes, block_bytes, sums_bytes;  // sums: of grad_w and grad_bias over several blocks
};

template <class T>
UnpoolPlan plan_unpool(const Bound<ConvPoolBackward>& args, int threads) {
  const ConvGeometry& g = args.geometry;
  UnpoolPlan plan{};
  plan.first = args.grad_w != nullptr && pools_first_layer(args.dtype, args.layout, g, args.pool);
  plan.weights = (args.grad_w != nullptr || args.grad_bias != nullptr) && !plan.first;
  if constexpr (same_type<T, Compute<T>>)
    if (plan.first) plan.conv_bytes = static_cast<size_t>(plan_pooled<T>(g, true, threads).total);
  plan.weight_elements = g.out_channels * (g.in_channels / g.groups) * spatial_elements(g.kernel);
  if (plan.first && args.grad_x == nullptr) return plan;
  // The gradients of several blocks are added in the compute type. In a 16-bit type every addition would round.
  const bool whole = plan.weights && !same_type<T, Compute<T>>;
  plan.images = whole ? larger<int64_t>(g.batch, 1) : images_in_block<T>(args, kUnpoolBlockBytes);
  plan.blocks = larger<int64_t>(1, ceil_div(g.batch, plan.images));
  plan.rest = g.batch - (plan.blocks - 1) * plan.images;
  plan.conv_bytes = larger(plan.conv_bytes, larger(UnpoolSteps(args, plan.images, plan.weights, threads).workspace(),
                                                   UnpoolSteps(args, plan.rest, plan.weights, threads).workspace()));
  plan.conv_bytes = aligned(static_cast<int64_t>(plan.conv_bytes));
  plan.block_bytes = aligned(plan.images * g.out_channels * spatial_elements(g.out) * static_cast<int64_t>(sizeof(T)));
  if (plan.blocks > 1 && !plan.first)
    plan.sums_bytes = aligned((plan.weight_elements + g.out_channels) * static_cast<int64_t>(sizeof(T)));
  return plan;
}

template <class T>
inline void add_to(const T* from, int64_t n, void* to) {
  if constexpr (same_type<T, Compute<T>>)
    for (int64_t i = 0; to != nullptr && i < n; ++i) static_cast<T*>(to)[i] += from[i];
}

template <class T>
void conv_pool(const Bound<ConvPoolBackward>& args, const UnpoolPlan& plan, void* workspace, const Team& team) {
  const ConvGeometry& g = args.geometry;
  if constexpr (same_type<T, Compute<T>>)
    if (plan.first) conv_pool_first_weight<T>(args, workspace, team);
  if (plan.blocks == 0) return;
  unsigned char* const bytes = static_cast<unsigned char*>(workspace);
  T* const block = reinterpret_cast<T*>(bytes + plan.conv_bytes);
  T* const sums = reinterpret_cast<T*>(bytes + plan.conv_bytes + plan.block_bytes);
  const int64_t image = g.in_channels * spatial_elements(g.in);
  const UnpoolSteps whole(args, plan.images, plan.weights, args.threads);
  const UnpoolSteps last(args, plan.rest, plan.weights, args.threads);
  for (int64_t i = 0; i < plan.blocks; ++i) {
    const UnpoolSteps& steps = i < plan.blocks - 1 ? whole : last;
    const int64_t first = i * plan.images;
    unpool(args, first, smaller(plan.images, g.batch - first), block, team);
    if (steps.with_input)
      steps.input.run({.grad_y = block, .w = args.w, .grad_x = static_cast<T*>(args.grad_x) + first * image}, workspace,
                      team);
    if (!steps.with_weight) continue;
    void* const grad_w = args.grad_w == nullptr || i == 0 ? args.grad_w : sums;
    void* const grad_bias = args.grad_bias == nullptr || i == 0 ? args.grad_bias : sums + plan.weight_elements;
    const T* const x = args.grad_w == nullptr ? nullptr : static_cast<const T*>(args.x) + first * image;
    steps.weight.run({block, nullptr, x, grad_w, grad_bias}, workspace, team);
    if (i == 0) continue;
    add_to(sums, plan.weight_elements, args.grad_w);
    add_to(sums + plan.weight_elements, g.out_channels, args.grad_bias);
  }
}

void plan_call(Plan<ConvPoolForward>& plan) {
  const ConvPoolForward& call = plan.call;
  if (call.geometry.batch * call.geometry.out_channels * pooled_elements(call) == 0) return decide_nothing(plan);
  const bool first = pools_first_layer(call.dtype, call.layout, call.geometry, call.pool);
  const auto args = bind(plan, {});
  with_dtype(call.dtype, [&](auto type) {
    using T = decltype(type);
    if constexpr (same_type<T, Compute<T>>)
      if (first)
        return decide(plan, {"conv_pool_first"},
                      static_cast<size_t>(plan_pooled<T>(call.geometry, false, plan.target.threads).total),
                      [](auto& args, auto* workspace, auto& team) { conv_pool_first<T>(args, workspace, team); });
    const ConvPoolPlan blocks = plan_conv_pool<T>(args, plan.target.threads);
    const int apart = blocks.workers == 1 ? plan.target.threads : 1;
    decide(plan, {"conv_pool_blocks"}, (blocks.conv_bytes + blocks.block_bytes) * static_cast<size_t>(apart), blocks,
           [](auto& args, auto& blocks, auto* workspace, auto& team) { conv_pool<T>(args, blocks, workspace, team); });
    if (!blocks.packed) return;
    const ConvPoolSteps whole(args, blocks.images, blocks.workers), last(args, blocks.rest, blocks.workers);
    plan.packed = packed_bytes<T>(args, whole.conv) + packed_bytes<T>(args, last.conv);
    plan.packer = [](const Plan<ConvPoolForward>& plan, const void* w, void* to) {
      const auto& blocks = *reinterpret_cast<const ConvPoolPlan*>(plan.decisions);
      const auto args = bind(plan, {});
      const ConvPoolSteps whole(args, blocks.images, blocks.workers), last(args, blocks.rest, blocks.workers);
      pack_convolution<T>(args, whole.conv, w, to);
      pack_convolution<T>(args, last.conv, w, static_cast<unsigned char*>(to) + packed_bytes<T>(args, whole.conv));
    };
  });
}

void plan_call(Plan<ConvPoolBackward>& plan) {
  const ConvPoolBackward& call = plan.call;
  void* const p = planned_address(1);
  const auto args = bind(plan, {.grad_y = p,
                                .indices = nullptr,
                                .grad_x = call.with_grad_x ? p : nullptr,
                                .grad_w = call.with_grad_w ? p : nullptr,
                                .grad_bias = call.with_grad_bias ? p : nullptr});
  with_dtype(call.dtype, [&](auto type) {
    using T = decltype(type);
    const UnpoolPlan blocks = plan_unpool<T>(args, plan.target.threads);
    decide(plan, {blocks.first && !call.with_grad_x ? "conv_pool_first" : "conv_pool_blocks"},
           blocks.conv_bytes + blocks.block_bytes + blocks.sums_bytes, blocks,
           [](auto& args, auto& blocks, auto* workspace, auto& team) { conv_pool<T>(args, blocks, workspace, team); });
  });
}
