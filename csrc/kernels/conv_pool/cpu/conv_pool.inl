// Convolution + activation + max pool. The contract is csrc/kernels/conv_pool/conv_pool.h. The convolution of a block
// of images is written to a workspace that stays in the cache, and pooled from there. Backward computes the unpooled
// gradient of a block and calls the gradients of the convolution with it.
#pragma once

#include "../../common/cpu/dtype.inl"
#include "../../common/cpu/elements.inl"
#include "../../common/cpu/math.inl"
#include "../../common/cpu/numbers.inl"
#include "../../common/cpu/vec.h"
#include "../../conv/cpu/conv.inl"
#include "../../pool/cpu/pool.inl"
#include "../../pool/cpu/taps.inl"
#include "first_layer_forward.inl"

// The size of a block between the two steps. Forward, it is half of a thread's L2 (Granite Rapids). Backward, it is
// shared by the whole team, as every block costs a pass over the weight gradient.
constexpr int64_t kPoolBlockBytes = 1 << 20;
constexpr int64_t kUnpoolBlockBytes = 8 << 20;

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

template <class T>
ConvForward convolution_of(const ConvPoolForward& args, int64_t first, int64_t images, void* y) {
  const ConvGeometry& g = args.geometry;
  ConvForward conv{};
  conv.dtype = args.dtype;
  conv.layout = args.layout;
  conv.w_layout = args.w_layout;
  conv.geometry = g;
  conv.geometry.batch = images;
  conv.x = static_cast<const T*>(args.x) + first * g.in_channels * spatial_elements(g.in);
  conv.w = args.w;
  conv.bias = args.bias;
  conv.activation = args.activation;
  conv.y = y;
  conv.precision = args.precision;
  conv.bf16_multiply = args.bf16_multiply;
  return conv;
}

struct ConvPoolPlan {
  int64_t images, blocks;
  bool apart;  // every thread computes its own blocks; else the team computes one block after the other
  size_t conv_bytes, block_bytes;
};

template <class T>
ConvPoolPlan plan_conv_pool(const ConvPoolForward& args, int threads) {
  const ConvGeometry& g = args.geometry;
  ConvPoolPlan plan{};
  plan.images = images_in_block<T>(args, kPoolBlockBytes);
  plan.blocks = ceil_div(g.batch, plan.images);
  plan.apart = plan.blocks >= threads;
  const int workers = plan.apart ? 1 : threads;
  const int64_t rest = g.batch - (plan.blocks - 1) * plan.images;
  plan.conv_bytes = larger(conv_forward_workspace(convolution_of<T>(args, 0, plan.images, nullptr), workers),
                           conv_forward_workspace(convolution_of<T>(args, 0, rest, nullptr), workers));
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
void conv_pool_block(const ConvPoolForward& args, int64_t first, int64_t images, void* block, void* workspace,
                     const Team& team) {
  const ConvGeometry& g = args.geometry;
  conv_forward(convolution_of<T>(args, first, images, block), workspace, team);
  MaxPoolForward pool{};
  pool.dtype = args.dtype;
  pool.layout = args.layout;
  pool.geometry.batch = images;
  pool.geometry.channels = g.out_channels;
  pooled_size(g, args.pool, pool.geometry.out);
  for (int d = 0; d < 3; ++d) {
    pool.geometry.in[d] = g.out[d];
    pool.geometry.kernel[d] = pool.geometry.stride[d] = args.pool[d];
    pool.geometry.dilation[d] = 1;
  }
  const int64_t image = g.out_channels * pooled_elements(args), at = first * image;
  pool.x = block;
  pool.y = static_cast<T*>(args.y) + at;
  pool.kind = args.indices != nullptr ? PoolIndices::window : PoolIndices::none;
  pool.indices = args.indices != nullptr ? args.indices + at : nullptr;
  max_pool_forward(pool, team);
  if (args.indices != nullptr && args.activation.kind == ActivationKind::relu)
    mark_no_gradient(static_cast<const T*>(pool.y), images * image, args.indices + at);
}

template <class T>
void conv_pool(const ConvPoolForward& args, void* workspace, const Team& team) {
  const ConvGeometry& g = args.geometry;
  const ConvPoolPlan plan = plan_conv_pool<T>(args, team.threads);
  unsigned char* const bytes = static_cast<unsigned char*>(workspace);
  const auto block = [&](int64_t i, unsigned char* mine, const Team& workers) {
    const int64_t first = i * plan.images;
    conv_pool_block<T>(args, first, smaller(plan.images, g.batch - first), mine + plan.conv_bytes, mine, workers);
  };
  if (!plan.apart) {
    for (int64_t i = 0; i < plan.blocks; ++i) block(i, bytes, team);
    return;
  }
  team.parallel(team.threads, [&](int thread, int actual) {
    const Team alone{};
    unsigned char* const mine = bytes + static_cast<size_t>(thread) * (plan.conv_bytes + plan.block_bytes);
    for (int64_t i = plan.blocks * thread / actual; i < plan.blocks * (thread + 1) / actual; ++i) block(i, mine, alone);
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
void unpool(const ConvPoolBackward& args, int64_t first, int64_t images, T* to, const Team& team) {
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
  team.parallel(wanted, [&](int thread, int actual) {
    for (int64_t unit = units * thread / actual; unit < units * (thread + 1) / actual; ++unit) {
      const int64_t h = unit % g.out[1], d = unit / g.out[1] % g.out[0], plane = unit / g.out[1] / g.out[0];
      const int64_t ph = h / args.pool[1], pd = d / args.pool[0];
      T* const out = to + unit * row;
      if (ph >= pooled[1] || pd >= pooled[0] || pooled[2] == 0) {
        for (int64_t i = 0; i < row; ++i) out[i] = T{};
        continue;
      }
      const int64_t from = ((plane * pooled[0] + pd) * pooled[1] + ph) * pooled_row;
      const int64_t tap = (d % args.pool[0] * args.pool[1] + h % args.pool[1]) * args.pool[2];
      if (!last) {
        unpool_row(grad_y + from, indices + from, pooled[2], args.pool[2], tap, row, out);
        continue;
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
    }
  });
}

template <class Conv>
Conv gradient_of(const ConvPoolBackward& args, int64_t images, const void* grad) {
  Conv conv{};
  conv.dtype = args.dtype;
  conv.layout = args.layout;
  conv.w_layout = args.w_layout;
  conv.geometry = args.geometry;
  conv.geometry.batch = images;
  conv.grad_y = grad;
  conv.bf16_multiply = args.bf16_multiply;
  return conv;
}

struct UnpoolPlan {
  bool first;  // conv_pool_first_weight computes the gradient of the weights
  int64_t images, blocks;
  int64_t weight_elements;
  size_t conv_bytes, block_bytes, sums_bytes;  // sums: of grad_w and grad_bias over several blocks
};

template <class T>
UnpoolPlan plan_unpool(const ConvPoolBackward& args, int threads) {
  const ConvGeometry& g = args.geometry;
  UnpoolPlan plan{};
  const bool weights = args.grad_w != nullptr || args.grad_bias != nullptr;
  plan.first = args.grad_w != nullptr && pools_first_layer(args.dtype, args.layout, g, args.pool);
  if constexpr (same_type<T, Compute<T>>)
    if (plan.first) plan.conv_bytes = static_cast<size_t>(plan_pooled<T>(g, true, threads).total);
  plan.weight_elements = g.out_channels * (g.in_channels / g.groups) * spatial_elements(g.kernel);
  if (plan.first && args.grad_x == nullptr) return plan;
  // The gradients of several blocks are added in the compute type. In a 16-bit type every addition would round.
  const bool whole = weights && !plan.first && !same_type<T, Compute<T>>;
  plan.images = whole ? larger<int64_t>(g.batch, 1) : images_in_block<T>(args, kUnpoolBlockBytes);
  plan.blocks = larger<int64_t>(1, ceil_div(g.batch, plan.images));
  const int64_t rest = g.batch - (plan.blocks - 1) * plan.images;
  for (int64_t images = plan.images;; images = rest) {
    if (args.grad_x != nullptr)
      plan.conv_bytes = larger(plan.conv_bytes, conv_backward_input_workspace(
                                                    gradient_of<ConvBackwardInput>(args, images, nullptr), threads));
    if (weights && !plan.first) {
      ConvBackwardWeight conv = gradient_of<ConvBackwardWeight>(args, images, nullptr);
      conv.grad_w = args.grad_w;
      conv.grad_bias = args.grad_bias;
      plan.conv_bytes = larger(plan.conv_bytes, conv_backward_weight_workspace(conv, threads));
    }
    if (images == rest) break;
  }
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
void conv_pool(const ConvPoolBackward& args, void* workspace, const Team& team) {
  const ConvGeometry& g = args.geometry;
  const UnpoolPlan plan = plan_unpool<T>(args, team.threads);
  const bool weights = (args.grad_w != nullptr || args.grad_bias != nullptr) && !plan.first;
  if constexpr (same_type<T, Compute<T>>)
    if (plan.first) conv_pool_first_weight<T>(args, workspace, team);
  unsigned char* const bytes = static_cast<unsigned char*>(workspace);
  T* const block = reinterpret_cast<T*>(bytes + plan.conv_bytes);
  T* const sums = reinterpret_cast<T*>(bytes + plan.conv_bytes + plan.block_bytes);
  const int64_t image = g.in_channels * spatial_elements(g.in);
  for (int64_t i = 0; i < plan.blocks; ++i) {
    const int64_t first = i * plan.images, images = smaller(plan.images, g.batch - first);
    unpool(args, first, images, block, team);
    if (args.grad_x != nullptr) {
      ConvBackwardInput conv = gradient_of<ConvBackwardInput>(args, images, block);
      conv.w = args.w;
      conv.grad_x = static_cast<T*>(args.grad_x) + first * image;
      conv.precision = args.precision;
      conv_backward_input(conv, workspace, team);
    }
    if (!weights) continue;
    ConvBackwardWeight conv = gradient_of<ConvBackwardWeight>(args, images, block);
    conv.x = static_cast<const T*>(args.x) + first * image;
    conv.grad_w = args.grad_w == nullptr ? nullptr : i == 0 ? args.grad_w : sums;
    conv.grad_bias = args.grad_bias == nullptr ? nullptr : i == 0 ? args.grad_bias : sums + plan.weight_elements;
    conv_backward_weight(conv, workspace, team);
    if (i == 0) continue;
    add_to(sums, plan.weight_elements, args.grad_w);
    add_to(sums + plan.weight_elements, g.out_channels, args.grad_bias);
  }
}

inline bool is_empty(const ConvPoolForward& args) {
  return args.geometry.batch * args.geometry.out_channels * pooled_elements(args) == 0;
}

size_t conv_pool_forward_workspace(const ConvPoolForward& args, int threads) {
  if (is_empty(args)) return 0;
  return with_dtype(args.dtype, [&](auto t) -> size_t {
    using T = decltype(t);
    if constexpr (same_type<T, Compute<T>>)
      if (pools_first_layer(args.dtype, args.layout, args.geometry, args.pool))
        return static_cast<size_t>(plan_pooled<T>(args.geometry, false, threads).total);
    const ConvPoolPlan plan = plan_conv_pool<T>(args, threads);
    return (plan.conv_bytes + plan.block_bytes) * static_cast<size_t>(plan.apart ? threads : 1);
  });
}
void conv_pool_forward(const ConvPoolForward& args, void* workspace, const Team& team) {
  if (is_empty(args)) return;
  with_dtype(args.dtype, [&](auto t) {
    using T = decltype(t);
    if constexpr (same_type<T, Compute<T>>)
      if (pools_first_layer(args.dtype, args.layout, args.geometry, args.pool))
        return conv_pool_first<T>(args, workspace, team);
    conv_pool<T>(args, workspace, team);
  });
}
KernelName conv_pool_forward_name(const ConvPoolForward& args) {
  if (pools_first_layer(args.dtype, args.layout, args.geometry, args.pool)) return {"conv_pool_first"};
  return {"conv_pool_blocks"};
}
size_t conv_pool_backward_workspace(const ConvPoolBackward& args, int threads) {
  return with_dtype(args.dtype, [&](auto t) {
    const UnpoolPlan plan = plan_unpool<decltype(t)>(args, threads);
    return plan.conv_bytes + plan.block_bytes + plan.sums_bytes;
  });
}
void conv_pool_backward(const ConvPoolBackward& args, void* workspace, const Team& team) {
  with_dtype(args.dtype, [&](auto t) { conv_pool<decltype(t)>(args, workspace, team); });
}
KernelName conv_pool_backward_name(const ConvPoolBackward& args) {
  if (args.grad_x == nullptr && args.grad_w != nullptr &&
      pools_first_layer(args.dtype, args.layout, args.geometry, args.pool))
    return {"conv_pool_first"};
  return {"conv_pool_blocks"};
}
