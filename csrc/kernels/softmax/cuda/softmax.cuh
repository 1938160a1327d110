// softmax and log_softmax over rows, which are read once into registers, or over the middle dimension.
#pragma once

#include "../../common/cuda/rows.cuh"
#include "../softmax.h"

namespace fastops::cuda {
namespace {

template <class S>
struct SoftmaxTask {
  bool log;
  int64_t rows, size, inner;  // rows: all sums
  bool vectors;
  const S *x, *grad_y;  // backward: x is y
  S* result;
};

// y of an x; top and sum are the row's largest value and sum of exp(x - top), `whole` log(sum) or 1 / sum.
template <class S, class C = Compute<S>>
__device__ inline C softmax_of(bool log, C x, C top, C whole) {
  return log ? x - top - whole : exp_minus_abs<S>(Vec<C>{x - top}).v * whole;
}
// A term of the sum that a gradient needs, and the gradient.
template <class S, class C = Compute<S>>
__device__ inline C softmax_term(bool log, C g, C y) {
  return log ? g : g * y;
}
template <class S, class C = Compute<S>>
__device__ inline C softmax_gradient(bool log, C g, C y, C sum) {
  return log ? g - exp_minus_abs<S>(Vec<C>{y}).v * sum : y * (g - sum);
}

template <class S, int threads>
__global__ void __launch_bounds__(kThreads) softmax_forward_kernel(const __grid_constant__ SoftmaxTask<S> task) {
  using C = Compute<S>;
  constexpr int n = kVector<S>;
  const int64_t row = own_row<threads>();
  if (row >= task.rows) return;
  C* const shared = static_cast<C*>(shared_memory());
  alignas(16) S x[kHeld<S>][n];
  RowWalk<threads, S> walk{task.size};
  const auto load = [&](int u, int64_t col, int count) {
    load_unit(x[u], task.x + row * task.size + col, count, task.vectors);
  };
  C top = lowest<C>(), sum = 0;
  walk.pass(false, load, [&](int u, int64_t, int count) {
#pragma unroll
    for (int i = 0; i < n; ++i)
      if (i < count && to_compute(x[u][i]) > top) top = to_compute(x[u][i]);
  });
  top = row_max<threads>(top, shared);
  walk.pass(true, load, [&](int u, int64_t, int count) {
#pragma unroll
    for (int i = 0; i < n; ++i)
      if (i < count) sum += exp_minus_abs<S>(Vec<C>{to_compute(x[u][i]) - top}).v;
  });
  sum = row_sum<threads>(sum, shared);
  const C whole = task.log ? natural_log(sum) : 1 / sum;
  walk.pass(false, load, [&](int u, int64_t col, int count) {
    alignas(16) S y[n];
#pragma unroll
    for (int i = 0; i < n; ++i) to_storage(softmax_of<S>(task.log, to_compute(x[u][i]), top, whole), y + i);
    store_unit(task.result + row * task.size + col, y, count, task.vectors);
  });
}

template <class S, int threads>
__global__ void __launch_bounds__(kThreads) softmax_backward_kernel(const __grid_constant__ SoftmaxTask<S> task) {
  using C = Compute<S>;
  constexpr int n = kVector<S>;
  const int64_t row = own_row<threads>();
  if (row >= task.rows) return;
  alignas(16) S y[kHeld<S>][n], g[kHeld<S>][n];
  RowWalk<threads, S> walk{task.size};
  const auto load = [&](int u, int64_t col, int count) {
    load_unit(y[u], task.x + row * task.size + col, count, task.vectors);
    load_unit(g[u], task.grad_y + row * task.size + col, count, task.vectors);
  };
  C sum = 0;
  walk.pass(false, load, [&](int u, int64_t, int) {
#pragma unroll
    for (int i = 0; i < n; ++i)  // what does not exist is zero
      sum += softmax_term<S>(task.log, to_compute(g[u][i]), to_compute(y[u][i]));
  });
  sum = row_sum<threads>(sum, static_cast<C*>(shared_memory()));
  walk.pass(true, load, [&](int u, int64_t col, int count) {
    alignas(16) S result[n];
#pragma unroll
    for (int i = 0; i < n; ++i)
      to_storage(softmax_gradient<S>(task.log, to_compute(g[u][i]), to_compute(y[u][i]), sum), result + i);
    store_unit(task.result + row * task.size + col, result, count, task.vectors);
  });
}

// ---- inner > 1: a block has 32 neighbours of one outer index; its warps divide the sum.

constexpr int kWarps = kThreads / 32;

// The first element of this thread's sum; -1 if there is none.
template <class S>
__device__ inline int64_t strip_begin(const SoftmaxTask<S>& task) {
  const int64_t strips = (task.inner + 31) / 32, outer = blockIdx.x / strips;
  const int64_t i = blockIdx.x % strips * 32 + threadIdx.x % 32;
  return i < task.inner ? outer * task.size * task.inner + i : -1;
}

template <class S>
__global__ void __launch_bounds__(kThreads) softmax_forward_strips_kernel(const __grid_constant__ SoftmaxTask<S> task) {
  using C = Compute<S>;
  C* const shared = static_cast<C*>(shared_memory());
  const int64_t begin = strip_begin(task), warp = threadIdx.x / 32, size = begin < 0 ? 0 : task.size;
  const auto x = [&](int64_t j) { return to_compute(task.x[begin + j * task.inner]); };
  C top = lowest<C>(), sum = 0;
#pragma unroll 4
  for (int64_t j = warp; j < size; j += kWarps) top = x(j) > top ? x(j) : top;
  top = strip_join(top, shared, [](C a, C b) { return a > b ? a : b; });
#pragma unroll 4
  for (int64_t j = warp; j < size; j += kWarps) sum += exp_minus_abs<S>(Vec<C>{x(j) - top}).v;
  sum = strip_join(sum, shared, [](C a, C b) { return a + b; });
  const C whole = task.log ? natural_log(sum) : 1 / sum;
#pragma unroll 4
  for (int64_t j = warp; j < size; j += kWarps)
    to_storage(softmax_of<S>(task.log, x(j), top, whole), task.result + begin + j * task.inner);
}

template <class S>
__global__ void __launch_bounds__(kThreads)
    softmax_backward_strips_kernel(const __grid_constant__ SoftmaxTask<S> task) {
  using C = Compute<S>;
  const int64_t begin = strip_begin(task), warp = threadIdx.x / 32, size = begin < 0 ? 0 : task.size;
  const auto y = [&](int64_t j) { return to_compute(task.x[begin + j * task.inner]); };
  const auto g = [&](int64_t j) { return to_compute(task.grad_y[begin + j * task.inner]); };
  C sum = 0;
#pragma unroll 4
  for (int64_t j = warp; j < size; j += kWarps) sum += softmax_term<S>(task.log, g(j), y(j));
  sum = strip_join(sum, static_cast<C*>(shared_memory()), [](C a, C b) { return a + b; });
#pragma unroll 4
  for (int64_t j = warp; j < size; j += kWarps)
    to_storage(softmax_gradient<S>(task.log, g(j), y(j), sum), task.result + begin + j * task.inner);
}

}  // namespace
}  // namespace fastops::cuda
