// Steps of SGD and Adam: one launch for as many tensors as fit into the parameters of a kernel. A block has a run of
// elements of one tensor.
#pragma once

#include "../../common/cuda/units.cuh"
#include "../optim.h"

namespace fastops::cuda {
namespace {

// Tensors of a launch. The parameters of a kernel are at most 4 KB.
constexpr int kMostPieces = 48;
// Vectors of each operand that a thread loads before it computes. Not measured.
constexpr int kStepVectors = 2;
// Elements of a block.
template <class S>
constexpr int64_t kStepRun = int64_t{kThreads} * kStepVectors * kVector<S>;

template <class S>
struct SgdNumbers {
  Compute<S> minus_lr, momentum, rest, weight_decay;
  bool decays, with_momentum, nesterov, maximize;
};

template <class S>
struct AdamNumbers {
  Compute<S> weight_decay, decay, eps, beta2, rest2, slope;
  bool decays, decoupled, near_m, amsgrad, maximize;
};

template <class Call, class Numbers>
struct StepTask {
  typename Call::Piece pieces[kMostPieces];
  int first_block[kMostPieces];  // of each
  bool vectors[kMostPieces];
  int count;
  Numbers numbers;
};

// The piece of this block. from: its first element of this thread.
template <class S, class Task>
__device__ inline int own_piece(const Task& task, int64_t& from) {
  int low = 0, high = task.count;  // the piece is in [low, high)
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (task.first_block[middle] <= static_cast<int>(blockIdx.x))
      low = middle;
    else
      high = middle;
  }
  from = (static_cast<int64_t>(blockIdx.x) - task.first_block[low]) * kStepRun<S> + threadIdx.x * kVector<S>;
  return low;
}

// load(u, first, count), then step(u, first, count), for the vectors of this thread among n elements.
template <class S, class Load, class Step>
__device__ inline void for_step_vectors(int64_t from, int64_t n, Load load, Step step) {
  constexpr int size = kVector<S>;
  const auto over = [&](auto action) {
#pragma unroll
    for (int u = 0; u < kStepVectors; ++u) {
      const int64_t first = from + int64_t{u} * kThreads * size;
      if (first < n) action(u, first, n - first < size ? static_cast<int>(n - first) : size);
    }
  };
  over(load);
  over(step);
}

template <class S>
__global__ void __launch_bounds__(kThreads) sgd_kernel(const __grid_constant__ StepTask<SgdStep, SgdNumbers<S>> task) {
  using V = Vec<Compute<S>>;
  constexpr int size = kVector<S>;
  int64_t from;
  const int index = own_piece<S>(task, from);
  const SgdStep::Piece& piece = task.pieces[index];
  const bool vectors = task.vectors[index];
  const SgdNumbers<S>& o = task.numbers;
  S* const p = static_cast<S*>(piece.p);
  S* const m = static_cast<S*>(piece.m);
  alignas(16) S x[kStepVectors][size], g[kStepVectors][size], buffer[kStepVectors][size];
  for_step_vectors<S>(
      from, piece.n,
      [&](int u, int64_t first, int count) {
        load_unit(x[u], p + first, count, vectors);
        load_unit(g[u], static_cast<const S*>(piece.grad) + first, count, vectors);
        if (o.with_momentum) load_unit(buffer[u], m + first, count, vectors);
      },
      [&](int u, int64_t first, int count) {
#pragma unroll
        for (int i = 0; i < size; ++i) {
          V grad = V::load(g[u] + i);
          if (o.maximize) grad = -grad;
          const V value = V::load(x[u] + i);
          if (o.decays) grad = fma(V{o.weight_decay}, value, grad);
          if (o.with_momentum) {
            const V moment = fma(V{o.rest}, grad, V::load(buffer[u] + i) * V{o.momentum});
            moment.store(buffer[u] + i);
            grad = o.nesterov ? fma(V{o.momentum}, moment, grad) : moment;
          }
          fma(V{o.minus_lr}, grad, value).store(x[u] + i);
        }
        if (o.with_momentum) store_unit(m + first, buffer[u], count, vectors);
        store_unit(p + first, x[u], count, vectors);
      });
}

__device__ inline float root(float x) { return ::sqrtf(x); }
__device__ inline double root(double x) { return ::sqrt(x); }

template <class S>
__global__ void __launch_bounds__(kThreads)
    adam_kernel(const __grid_constant__ StepTask<AdamStep, AdamNumbers<S>> task) {
  using C = Compute<S>;
  using V = Vec<C>;
  constexpr int size = kVector<S>;
  int64_t from;
  const int index = own_piece<S>(task, from);
  const AdamStep::Piece& piece = task.pieces[index];
  const bool vectors = task.vectors[index];
  const AdamNumbers<S>& o = task.numbers;
  S *const p = static_cast<S*>(piece.p), *const m = static_cast<S*>(piece.m);
  S *const v = static_cast<S*>(piece.v), *const top = static_cast<S*>(piece.top);
  const V step_size{static_cast<C>(piece.step_size)}, correction{static_cast<C>(piece.correction)};
  alignas(16) S x[kStepVectors][size], g[kStepVectors][size], mean[kStepVectors][size], square[kStepVectors][size],
      largest[kStepVectors][size];
  for_step_vectors<S>(
      from, piece.n,
      [&](int u, int64_t first, int count) {
        load_unit(x[u], p + first, count, vectors);
        load_unit(g[u], static_cast<const S*>(piece.grad) + first, count, vectors);
        load_unit(mean[u], m + first, count, vectors);
        load_unit(square[u], v + first, count, vectors);
        if (o.amsgrad) load_unit(largest[u], top + first, count, vectors);
      },
      [&](int u, int64_t first, int count) {
#pragma unroll
        for (int i = 0; i < size; ++i) {
          V grad = V::load(g[u] + i), value = V::load(x[u] + i);
          if (o.maximize) grad = -grad;
          if (o.decoupled) value = value * V{o.decay};
          if (o.decays) grad = fma(V{o.weight_decay}, value, grad);
          const V old = V::load(mean[u] + i);
          const V first_moment = fma(V{o.slope}, grad - old, o.near_m ? old : grad);
          const V second = fma(V{o.rest2} * grad, grad, V::load(square[u] + i) * V{o.beta2});
          first_moment.store(mean[u] + i);
          second.store(square[u] + i);
          V most = second;
          if (o.amsgrad) {
            const V before = V::load(largest[u] + i);
            const bool is_nan = before.v != before.v || second.v != second.v;
            most = is_nan ? before + second : max(before, second);
            most.store(largest[u] + i);
          }
          const V denominator = V{root(most.v)} / correction + V{o.eps};
          (value + step_size * first_moment / denominator).store(x[u] + i);
        }
        store_unit(m + first, mean[u], count, vectors);
        store_unit(v + first, square[u], count, vectors);
        if (o.amsgrad) store_unit(top + first, largest[u], count, vectors);
        store_unit(p + first, x[u], count, vectors);
      });
}

}  // namespace
}  // namespace fastops::cuda
