// activation_forward, activation_backward, prelu_* and glu_*, each in one pass, with 16-byte accesses.
#pragma once

#include "../../common/cuda/units.cuh"

namespace fastops::cuda {
namespace {

// ---- activations

template <class S>
struct ForwardTask {
  Units units;
  bool vectors;
  const S* x;
  int64_t x_row_stride;
  S* y;
  uint8_t* mask;
  Parameters<S> parameters;
};

// Elements per unit: a vector, or enough for whole bytes of a mask.
template <class S>
constexpr int kMaskUnit = 8 > kVector<S> ? 8 : kVector<S>;

template <class Kind, class S, bool with_mask>
__global__ void __launch_bounds__(kThreads) activation_forward_kernel(const ForwardTask<S> task) {
  constexpr int n = with_mask ? kMaskUnit<S> : kVector<S>;
  using V = Vec<Compute<S>>;
  alignas(16) S x[kBatch<n, sizeof(S)>][n];
  for_units<n, sizeof(S)>(
      task.units,
      [&](int b, const Place& at) {
        load_unit(x[b], task.x + at.row * task.x_row_stride + at.col, at.count, task.vectors);
      },
      [&](int b, const Place& at) {
        alignas(16) S y[n];
        unsigned bits = 0;
#pragma unroll
        for (int i = 0; i < n; ++i) {
          const V value = V::load(x[b] + i);
          Kind::forward(value, task.parameters).store(y + i);
          if constexpr (with_mask)
            if (i < at.count && Kind::inside(value, task.parameters).m) bits |= 1u << i;
        }
        store_unit(task.y + at.row * task.units.cols + at.col, y, at.count, task.vectors);
        if constexpr (with_mask)
          task.mask[at.row * ((task.units.cols + 7) / 8) + at.col / 8] = static_cast<uint8_t>(bits);
      });
}

template <class S, class Kept>
struct BackwardTask {
  Units units;
  bool vectors;
  const S* grad_y;
  int64_t grad_y_row_stride;
  const Kept* saved;
  int64_t saved_row_stride;
  S* grad_x;
  Parameters<S> parameters;
};

// The derivative is read from x or y.
template <class Derivative, class S>
__global__ void __launch_bounds__(kThreads) activation_backward_kernel(const BackwardTask<S, S> task) {
  constexpr int n = kVector<S>;
  using V = Vec<Compute<S>>;
  alignas(16) S g[kBatch<n, sizeof(S)>][n], saved[kBatch<n, sizeof(S)>][n];
  for_units<n, sizeof(S)>(
      task.units,
      [&](int b, const Place& at) {
        load_unit(g[b], task.grad_y + at.row * task.grad_y_row_stride + at.col, at.count, task.vectors);
        load_unit(saved[b], task.saved + at.row * task.saved_row_stride + at.col, at.count, task.vectors);
      },
      [&](int b, const Place& at) {
        alignas(16) S result[n];
#pragma unroll
        for (int i = 0; i < n; ++i)
          Derivative::backward(V::load(g[b] + i), V::load(saved[b] + i), task.parameters).store(result + i);
        store_unit(task.grad_x + at.row * task.units.cols + at.col, result, at.count, task.vectors);
      });
}

// The derivative is read from a mask.
template <class Kind, class S>
__global__ void __launch_bounds__(kThreads) activation_backward_mask_kernel(const BackwardTask<S, uint8_t> task) {
  constexpr int n = kMaskUnit<S>;
  using V = Vec<Compute<S>>;
  alignas(16) S g[kBatch<n, sizeof(S)>][n];
  unsigned bits[kBatch<n, sizeof(S)>];
  for_units<n, sizeof(S)>(
      task.units,
      [&](int b, const Place& at) {
        load_unit(g[b], task.grad_y + at.row * task.grad_y_row_stride + at.col, at.count, task.vectors);
        bits[b] = task.saved[at.row * ((task.units.cols + 7) / 8) + at.col / 8];
      },
      [&](int b, const Place& at) {
        alignas(16) S result[n];
#pragma unroll
        for (int i = 0; i < n; ++i)
          Kind::apply(Mask<Compute<S>>{(bits[b] >> i & 1) != 0}, V::load(g[b] + i), task.parameters).store(result + i);
        store_unit(task.grad_x + at.row * task.units.cols + at.col, result, at.count, task.vectors);
      });
}

// ---- PReLU: a row has the elements of one channel; if these are single elements, one element of every channel

template <class S>
struct PreluTask {
  Units units;
  bool vectors;
  bool weight_per_column;
  int64_t outer, channels;
  const S* x;
  const S* w;
  int64_t w_stride;
  S* y;
};

template <class S>
__global__ void __launch_bounds__(kThreads) prelu_forward_kernel(const PreluTask<S> task) {
  constexpr int n = kVector<S>;
  using V = Vec<Compute<S>>;
  alignas(16) S x[kBatch<n, sizeof(S)>][n];
  for_units<n, sizeof(S)>(
      task.units,
      [&](int b, const Place& at) {
        load_unit(x[b], task.x + at.row * task.units.cols + at.col, at.count, task.vectors);
      },
      [&](int b, const Place& at) {
        alignas(16) S y[n];
        V w = V::load(task.w + at.row % task.channels * task.w_stride * !task.weight_per_column);
#pragma unroll
        for (int i = 0; i < n; ++i) {
          if (task.weight_per_column && i < at.count) w = V::load(task.w + (at.col + i) * task.w_stride);
          const V value = V::load(x[b] + i);
          select(gt(value, V::zero()), value, w * value).store(y + i);
        }
        store_unit(task.y + at.row * task.units.cols + at.col, y, at.count, task.vectors);
      });
}

// The partial sums of grad_w are [channels][pieces] if a row has one weight, else [pieces][channels].
template <class S>
struct PreluBackwardTask {
  PreluTask<S> forward;  // y is not used
  const S* grad_y;
  S* grad_x;              // nullable
  Compute<S>* partial;    // nullable
  int64_t pieces, piece;  // piece: the units of a channel in one partial sum; with a weight per column, the rows
};

// Stores grad_x[at, at + count) and returns its contribution to grad_w.
template <int n, class S>
__device__ inline Compute<S> prelu_backward_unit(const PreluBackwardTask<S>& task, int64_t at, int count,
                                                 Vec<Compute<S>> w) {
  using V = Vec<Compute<S>>;
  alignas(16) S x[n], g[n], result[n];
  load_unit(x, task.forward.x + at, count, task.forward.vectors);
  load_unit(g, task.grad_y + at, count, task.forward.vectors);
  V sum = V::zero();
#pragma unroll
  for (int i = 0; i < n; ++i) {
    const V value = V::load(x + i), grad = V::load(g + i);
    const Mask<Compute<S>> positive = gt(value, V::zero());
    select(positive, grad, w * grad).store(result + i);
    sum = sum + select(positive, V::zero(), grad * value);
  }
  if (task.grad_x != nullptr) store_unit(task.grad_x + at, result, count, task.forward.vectors);
  return sum.v;
}

// One block per channel and piece.
template <class S>
__global__ void __launch_bounds__(kThreads) prelu_backward_kernel(const PreluBackwardTask<S> task) {
  constexpr int n = kVector<S>;
  const PreluTask<S>& forward = task.forward;
  const int64_t channel = blockIdx.x / task.pieces, piece = blockIdx.x % task.pieces;
  const auto w = Vec<Compute<S>>::load(forward.w + channel * forward.w_stride);
  const int64_t units = forward.outer * forward.units.per_row;
  const int64_t end = (piece + 1) * task.piece < units ? (piece + 1) * task.piece : units;
  Compute<S> sum = 0;
  for (int64_t unit = piece * task.piece + threadIdx.x; unit < end; unit += kThreads) {
    const int64_t outer = unit / forward.units.per_row, col = (unit - outer * forward.units.per_row) * n;
    const int64_t left = forward.units.cols - col;
    sum += prelu_backward_unit<n>(task, (outer * forward.channels + channel) * forward.units.cols + col,
                                  static_cast<int>(left < n ? left : n), w);
  }
  if (task.partial == nullptr) return;
  sum = block_sum<kThreads>(sum, static_cast<Compute<S>*>(shared_memory()));
  if (threadIdx.x == 0) task.partial[blockIdx.x] = sum;
}

// One thread per column; a block has kThreads columns of a piece.
template <class S>
__global__ void __launch_bounds__(kThreads) prelu_backward_columns_kernel(const PreluBackwardTask<S> task) {
  using V = Vec<Compute<S>>;
  const PreluTask<S>& forward = task.forward;
  const int64_t blocks = (forward.channels + kThreads - 1) / kThreads;
  const int64_t piece = blockIdx.x / blocks, channel = blockIdx.x % blocks * kThreads + threadIdx.x;
  if (channel >= forward.channels) return;
  const V w = V::load(forward.w + channel * forward.w_stride);
  const int64_t end = (piece + 1) * task.piece < forward.outer ? (piece + 1) * task.piece : forward.outer;
  V sum = V::zero();
  for (int64_t row = piece * task.piece; row < end; ++row) {
    const int64_t at = row * forward.channels + channel;
    const V x = V::load(forward.x + at), g = V::load(task.grad_y + at);
    const Mask<Compute<S>> positive = gt(x, V::zero());
    if (task.grad_x != nullptr) select(positive, g, w * g).store(task.grad_x + at);
    sum = sum + select(positive, V::zero(), g * x);
  }
  if (task.partial != nullptr) task.partial[piece * forward.channels + channel] = sum.v;
}

// grad_w[c] from the partial sums at c * channel_stride + i * piece_stride. One warp per channel.
template <class S>
__global__ void __launch_bounds__(kThreads)
    prelu_grad_weight_kernel(const Compute<S>* partial, int64_t channels, int64_t pieces, int64_t channel_stride,
                             int64_t piece_stride, S* grad_w) {
  const int64_t channel = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / 32;
  if (channel >= channels) return;
  Compute<S> sum = 0;
  for (int64_t i = threadIdx.x % 32; i < pieces; i += 32) sum += partial[channel * channel_stride + i * piece_stride];
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) to_storage(sum, grad_w + channel);
}

// ---- GLU: rows of `inner` elements, followed by their gates

template <class S>
struct GluTask {
  Units units;
  bool vectors;
  const S* grad_y;  // backward only
  const S* x;
  S* result;  // y or grad_x
};

template <class S>
__global__ void __launch_bounds__(kThreads) glu_forward_kernel(const GluTask<S> task) {
  constexpr int n = kVector<S>;
  using V = Vec<Compute<S>>;
  alignas(16) S x[kBatch<n, sizeof(S)>][n], gate[kBatch<n, sizeof(S)>][n];
  for_units<n, sizeof(S)>(
      task.units,
      [&](int b, const Place& at) {
        const S* const from = task.x + at.row * 2 * task.units.cols + at.col;
        load_unit(x[b], from, at.count, task.vectors);
        load_unit(gate[b], from + task.units.cols, at.count, task.vectors);
      },
      [&](int b, const Place& at) {
        alignas(16) S y[n];
#pragma unroll
        for (int i = 0; i < n; ++i) (V::load(x[b] + i) * sigmoid<S>(V::load(gate[b] + i))).store(y + i);
        store_unit(task.result + at.row * task.units.cols + at.col, y, at.count, task.vectors);
      });
}

template <class S>
__global__ void __launch_bounds__(kThreads) glu_backward_kernel(const GluTask<S> task) {
  constexpr int n = kVector<S>;
  using V = Vec<Compute<S>>;
  alignas(16) S x[kBatch<n, sizeof(S)>][n], gate[kBatch<n, sizeof(S)>][n], g[kBatch<n, sizeof(S)>][n];
  for_units<n, sizeof(S)>(
      task.units,
      [&](int b, const Place& at) {
        const S* const from = task.x + at.row * 2 * task.units.cols + at.col;
        load_unit(x[b], from, at.count, task.vectors);
        load_unit(gate[b], from + task.units.cols, at.count, task.vectors);
        load_unit(g[b], task.grad_y + at.row * task.units.cols + at.col, at.count, task.vectors);
      },
      [&](int b, const Place& at) {
        alignas(16) S grad_x[n], grad_gate[n];
#pragma unroll
        for (int i = 0; i < n; ++i) {
          const V s = sigmoid<Compute<S>>(V::load(gate[b] + i)),
                  grad = V::load(g[b] + i) * s;  // s is not rounded, as 1 - s cancels
          grad.store(grad_x + i);
          (grad * (V::set1(1) - s) * V::load(x[b] + i)).store(grad_gate + i);
        }
        S* const to = task.result + at.row * 2 * task.units.cols + at.col;
        store_unit(to, grad_x, at.count, task.vectors);
        store_unit(to + task.units.cols, grad_gate, at.count, task.vectors);
      });
}

}  // namespace
}  // namespace fastops::cuda
