// cross_entropy and mse_loss: a pass in which every block leaves its sums, which one block adds in order.
//
// Nobody waits for the device: *bad is not written, and a target that is no class ends the kernel, as in PyTorch.
#pragma once

#include "../../common/cuda/rows.cuh"
#include "../loss.h"

namespace fastops::cuda {
namespace {

// Of the positions of a block.
struct LossSums {
  double loss, weight;
};

template <class S>
struct EntropyTask {
  int64_t positions, classes, inner;
  int64_t ignore_index;
  bool vectors, smooth;
  Reduction reduction;
  Compute<S> of_target, of_all;  // 1 - smoothing, smoothing / classes
  const S *x, *w;                // w is nullable
  const int64_t* target;
  Compute<S>* statistics;  // forward: nullable
  S* y;
  LossSums* sums;  // of each block, or null
  const S* grad_y;
  S* grad_x;

  __device__ Compute<S> weight(int64_t c) const { return w == nullptr ? Compute<S>(1) : to_compute(w[c]); }
  __device__ bool counts(int64_t t) const { return t != ignore_index && t >= 0 && t < classes; }
};

// A mean without any weight is NaN, and so is its gradient, also where a smoothing's part of the sum is not 0.
template <class C>
__device__ inline C without_weight(bool smooth, C total) {
  return smooth ? 0 / total : C(0);
}

// Of a position, over its classes: the largest x, the sum of exp(x - top), and with smoothing the sums of w (x - top)
// and of w.
template <class C>
struct Classes {
  C top, sum, weighted, weights;
};

// The loss of a position, stored where it is wanted, and its terms of the block's sums.
template <class S>
__device__ inline LossSums finish_position(const EntropyTask<S>& task, int64_t at, const Classes<Compute<S>>& of) {
  using C = Compute<S>;
  const int64_t t = task.target[at];
  C loss = 0, weight = 0;
  if (task.counts(t)) {
    const int64_t outer = at / task.inner, i = at - outer * task.inner;
    const C log_sum = natural_log(of.sum);
    const C x = to_compute(task.x[(outer * task.classes + t) * task.inner + i]);
    weight = task.weight(t);
    loss = -((x - of.top) - log_sum) * weight;
    if (task.smooth) loss = task.of_target * loss + task.of_all * (log_sum * of.weights - of.weighted);
  } else if (t != task.ignore_index) {
    trap("a target is no class");
  }
  if (task.reduction == Reduction::none) to_storage(loss, task.y + at);
  if (task.statistics != nullptr) {
    task.statistics[at] = of.top;
    task.statistics[task.positions + at] = of.sum;
  }
  return {static_cast<double>(loss), static_cast<double>(weight)};
}

// The classes of a position lie next to each other.
template <class S, int threads>
__global__ void __launch_bounds__(kThreads) entropy_rows_kernel(const __grid_constant__ EntropyTask<S> task) {
  using C = Compute<S>;
  constexpr int n = kVector<S>, rows = kThreads / threads;
  const int64_t row = own_row<threads>();
  LossSums mine{0, 0};
  if (row < task.positions) {
    C* const shared = static_cast<C*>(shared_memory());
    alignas(16) S x[kHeld<S>][n];
    RowWalk<threads, S> walk{task.classes};
    const auto load = [&](int u, int64_t col, int count) {
      load_unit(x[u], task.x + row * task.classes + col, count, task.vectors);
    };
    Classes<C> of{lowest<C>(), 0, 0, 0};
    walk.pass(false, load, [&](int u, int64_t, int count) {
#pragma unroll
      for (int i = 0; i < n; ++i)
        if (i < count && to_compute(x[u][i]) > of.top) of.top = to_compute(x[u][i]);
    });
    of.top = row_max<threads>(of.top, shared);
    walk.pass(true, load, [&](int u, int64_t col, int count) {
#pragma unroll
      for (int i = 0; i < n; ++i)
        if (i < count) {
          const C difference = to_compute(x[u][i]) - of.top;
          of.sum += exp_minus_abs<S>(Vec<C>{difference}).v;
          if (task.smooth) {
            const C weight = task.weight(col + i);
            of.weighted = fma(Vec<C>{weight}, Vec<C>{difference}, Vec<C>{of.weighted}).v;
            of.weights += weight;
          }
        }
    });
    of.sum = row_sum<threads>(of.sum, shared);
    if (task.smooth) {
      of.weighted = row_sum<threads>(of.weighted, shared);
      of.weights = row_sum<threads>(of.weights, shared);
    }
    if (threadIdx.x % threads == 0) mine = finish_position(task, row, of);
  }
  if (task.sums == nullptr) return;
  LossSums* const all = static_cast<LossSums*>(shared_memory());
  if (threadIdx.x % threads == 0) all[threadIdx.x / threads] = mine;
  __syncthreads();  // the losses of the rows are there
  if (threadIdx.x != 0) return;
  for (int i = 1; i < rows; ++i) {
    mine.loss += all[i].loss;
    mine.weight += all[i].weight;
  }
  task.sums[blockIdx.x] = mine;
}

// A block has 32 neighbours of one outer index; its warps divide the classes.
template <class S>
__global__ void __launch_bounds__(kThreads) entropy_planes_kernel(const __grid_constant__ EntropyTask<S> task) {
  using C = Compute<S>;
  C* const shared = static_cast<C*>(shared_memory());
  const int64_t strips = (task.inner + 31) / 32, outer = blockIdx.x / strips;
  const int64_t i = blockIdx.x % strips * 32 + threadIdx.x % 32;
  const int64_t begin = outer * task.classes * task.inner + i, size = i < task.inner ? task.classes : 0;
  const auto x = [&](int64_t c) { return to_compute(task.x[begin + c * task.inner]); };
  const auto add = [](C a, C b) { return a + b; };
  Classes<C> of{lowest<C>(), 0, 0, 0};
#pragma unroll 4
  for (int64_t c = threadIdx.x / 32; c < size; c += kThreads / 32) of.top = x(c) > of.top ? x(c) : of.top;
  of.top = strip_join(of.top, shared, [](C a, C b) { return a > b ? a : b; });
#pragma unroll 4
  for (int64_t c = threadIdx.x / 32; c < size; c += kThreads / 32) {
    const C difference = x(c) - of.top;
    of.sum += exp_minus_abs<S>(Vec<C>{difference}).v;
    if (task.smooth) {
      of.weighted = fma(Vec<C>{task.weight(c)}, Vec<C>{difference}, Vec<C>{of.weighted}).v;
      of.weights += task.weight(c);
    }
  }
  of.sum = strip_join(of.sum, shared, add);
  if (task.smooth) {
    of.weighted = strip_join(of.weighted, shared, add);
    of.weights = strip_join(of.weights, shared, add);
  }
  if (threadIdx.x >= 32) return;
  LossSums mine{0, 0};
  if (size > 0) mine = finish_position(task, outer * task.inner + i, of);
  mine = {warp_sum(mine.loss), warp_sum(mine.weight)};
  if (threadIdx.x == 0 && task.sums != nullptr) task.sums[blockIdx.x] = mine;
}

// One block. y, unless it has a loss for each position, and the statistics' last number.
template <class S>
__global__ void __launch_bounds__(kThreads)
    entropy_finish_kernel(const __grid_constant__ EntropyTask<S> task, int64_t blocks) {
  using C = Compute<S>;
  LossSums sum{0, 0};
  for (int64_t i = threadIdx.x; i < blocks; i += kThreads) {
    sum.loss += task.sums[i].loss;
    sum.weight += task.sums[i].weight;
  }
  double* const shared = static_cast<double*>(shared_memory());
  sum = {row_sum<kThreads>(sum.loss, shared), row_sum<kThreads>(sum.weight, shared)};
  if (threadIdx.x != 0) return;
  if (task.statistics != nullptr) task.statistics[2 * task.positions] = static_cast<C>(sum.weight);
  if (task.reduction == Reduction::sum) to_storage(static_cast<C>(sum.loss), task.y);
  if (task.reduction == Reduction::mean)
    to_storage(static_cast<C>(sum.loss / sum.weight + without_weight(task.smooth, sum.weight)), task.y);
}

// grad_x[c] = factor (slope exp(x[c] - top) - of_all w[c] - (c == t ? at_target : 0)), or 0 where t does not count.
template <class S>
struct Position {
  using C = Compute<S>;
  int64_t target = -1;
  C top, slope, factor, at_target;

  __device__ Position(const EntropyTask<S>& task, int64_t at, C weights) {
    const int64_t t = task.target[at];
    if (!task.counts(t)) return;
    target = t;
    top = task.statistics[at];
    at_target = task.of_target * task.weight(t);
    slope = (at_target + weights) / task.statistics[task.positions + at];
    factor = to_compute(task.grad_y[task.reduction == Reduction::none ? at : 0]);
    const C total = task.statistics[2 * task.positions];
    if (task.reduction == Reduction::mean) factor = factor / total + without_weight(task.smooth, total);
  }
  __device__ C gradient(const EntropyTask<S>& task, int64_t c, C x) const {
    if (target < 0) return 0;
    C spread = task.smooth ? task.of_all * task.weight(c) : C(0);
    if (c == target) spread += at_target;
    return factor * (slope * exp_minus_abs<S>(Vec<C>{x - top}).v - spread);
  }
};

// The sum of all weights times of_all, by the threads of a row.
template <class S, int threads>
__device__ inline Compute<S> all_weights(const EntropyTask<S>& task, Compute<S>* shared) {
  if (!task.smooth) return 0;
  Compute<S> sum = 0;
  for (int64_t c = threadIdx.x % threads; c < task.classes; c += threads) sum += task.weight(c);
  return task.of_all * row_sum<threads>(sum, shared);
}

template <class S, int threads>
__global__ void __launch_bounds__(kThreads) entropy_backward_rows_kernel(const __grid_constant__ EntropyTask<S> task) {
  constexpr int n = kVector<S>;
  const int64_t row = own_row<threads>();
  if (row >= task.positions) return;
  const Compute<S> weights = all_weights<S, threads>(task, static_cast<Compute<S>*>(shared_memory()));
  const Position<S> position(task, row, weights);
  alignas(16) S x[kHeld<S>][n];
  RowWalk<threads, S> walk{task.classes};
  walk.pass(
      false,
      [&](int u, int64_t col, int count) { load_unit(x[u], task.x + row * task.classes + col, count, task.vectors); },
      [&](int u, int64_t col, int count) {
        alignas(16) S g[n] = {};
#pragma unroll
        for (int i = 0; i < n; ++i)
          if (i < count) to_storage(position.gradient(task, col + i, to_compute(x[u][i])), g + i);
        store_unit(task.grad_x + row * task.classes + col, g, count, task.vectors);
      });
}

// As forward: a block has 32 neighbours of one outer index; its warps divide the classes.
template <class S>
__global__ void __launch_bounds__(kThreads)
    entropy_backward_planes_kernel(const __grid_constant__ EntropyTask<S> task) {
  const Compute<S> weights = all_weights<S, kThreads>(task, static_cast<Compute<S>*>(shared_memory()));
  const int64_t strips = (task.inner + 31) / 32, outer = blockIdx.x / strips;
  const int64_t i = blockIdx.x % strips * 32 + threadIdx.x % 32, begin = outer * task.classes * task.inner + i;
  if (i >= task.inner) return;
  const Position<S> position(task, outer * task.inner + i, weights);
#pragma unroll 4
  for (int64_t c = threadIdx.x / 32; c < task.classes; c += kThreads / 32) {
    const int64_t at = begin + c * task.inner;
    to_storage(position.gradient(task, c, to_compute(task.x[at])), task.grad_x + at);
  }
}

// ---- mean squared error

template <class S>
struct MseTask {
  Units units;
  bool vectors;
  Reduction reduction;
  Compute<S> factor;  // of the gradient
  const S *x, *t, *grad_y;
  S *y, *grad_x, *grad_t;  // gradients are nullable
  double* sums;            // of each block
};

template <class S>
__global__ void __launch_bounds__(kThreads) mse_forward_kernel(const __grid_constant__ MseTask<S> task) {
  using C = Compute<S>;
  constexpr int n = kVector<S>, batch = kBatch<n, sizeof(S)>;
  alignas(16) S x[batch][n], t[batch][n];
  double sum = 0;
  for_units<n, sizeof(S)>(
      task.units,
      [&](int b, const Place& at) {
        load_unit(x[b], task.x + at.col, at.count, task.vectors);
        load_unit(t[b], task.t + at.col, at.count, task.vectors);
      },
      [&](int b, const Place& at) {
        alignas(16) S y[n];
        C squares = 0;
#pragma unroll
        for (int i = 0; i < n; ++i) {  // what does not exist is zero
          const C d = to_compute(x[b][i]) - to_compute(t[b][i]);
          squares += d * d;
          to_storage(d * d, y + i);
        }
        sum += static_cast<double>(squares);
        if (task.reduction == Reduction::none) store_unit(task.y + at.col, y, at.count, task.vectors);
      });
  if (task.reduction == Reduction::none) return;
  sum = block_sum<kThreads>(sum, static_cast<double*>(shared_memory()));
  if (threadIdx.x == 0) task.sums[blockIdx.x] = sum;
}

// One block.
template <class S>
__global__ void __launch_bounds__(kThreads)
    mse_finish_kernel(const __grid_constant__ MseTask<S> task, int64_t blocks, double divisor) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < blocks; i += kThreads) sum += task.sums[i];
  sum = block_sum<kThreads>(sum, static_cast<double*>(shared_memory()));
  if (threadIdx.x == 0) to_storage(static_cast<Compute<S>>(sum / divisor), task.y);
}

template <class S>
__global__ void __launch_bounds__(kThreads) mse_backward_kernel(const __grid_constant__ MseTask<S> task) {
  using C = Compute<S>;
  constexpr int n = kVector<S>, batch = kBatch<n, sizeof(S)>;
  const bool none = task.reduction == Reduction::none;
  const C whole = none ? C(0) : to_compute(task.grad_y[0]);
  alignas(16) S x[batch][n], t[batch][n], g[batch][n];
  for_units<n, sizeof(S)>(
      task.units,
      [&](int b, const Place& at) {
        load_unit(x[b], task.x + at.col, at.count, task.vectors);
        load_unit(t[b], task.t + at.col, at.count, task.vectors);
        load_unit(g[b], task.grad_y + at.col, none ? at.count : 0, task.vectors);
      },
      [&](int b, const Place& at) {
        alignas(16) S grad_x[n], grad_t[n];
#pragma unroll
        for (int i = 0; i < n; ++i) {
          const C d = to_compute(x[b][i]) - to_compute(t[b][i]);
          const C grad = task.factor * d * (none ? to_compute(g[b][i]) : whole);
          to_storage(grad, grad_x + i);
          to_storage(-grad, grad_t + i);
        }
        if (task.grad_x != nullptr) store_unit(task.grad_x + at.col, grad_x, at.count, task.vectors);
        if (task.grad_t != nullptr) store_unit(task.grad_t + at.col, grad_t, at.count, task.vectors);
      });
}

}  // namespace
}  // namespace fastops::cuda
