// layer_norm and rms_norm: a row is read once into registers, and its variance is that of the deviations from its mean.
// Rows that do not lie contiguous are first transposed.
#pragma once

#include "../../common/cuda/rows.cuh"
#include "../layer_norm.h"

namespace fastops::cuda {
namespace {

// Columns and rows of a tile that is transposed.
constexpr int kTransposed = 32;
// Rows whose terms a thread adds to the parameters' gradients together, and parts of the rows for each multiprocessor.
// Not measured.
constexpr int kNormRows = 4;

// to[o inner + i, c] = from[o outer_stride + c inner + i]. One block for each tile.
template <class S>
__global__ void __launch_bounds__(kThreads)
    transpose_rows_kernel(const S* from, S* to, int64_t outer_stride, int64_t size, int64_t inner) {
  S* const tile = static_cast<S*>(shared_memory());
  const int64_t across = (inner + kTransposed - 1) / kTransposed, down = (size + kTransposed - 1) / kTransposed;
  const int64_t outer = blockIdx.x / (across * down), place = blockIdx.x % (across * down);
  const int64_t i0 = place % across * kTransposed, c0 = place / across * kTransposed;
  const int lane = static_cast<int>(threadIdx.x) % kTransposed, worker = static_cast<int>(threadIdx.x) / kTransposed;
  for (int c = worker; c < kTransposed; c += kThreads / kTransposed)
    if (c0 + c < size && i0 + lane < inner)
      tile[c * (kTransposed + 1) + lane] = from[outer * outer_stride + (c0 + c) * inner + i0 + lane];
  __syncthreads();  // the tile is there
  for (int i = worker; i < kTransposed; i += kThreads / kTransposed)
    if (i0 + i < inner && c0 + lane < size)
      to[(outer * inner + i0 + i) * size + c0 + lane] = tile[lane * (kTransposed + 1) + i];
}

template <class S>
struct NormTask {
  int64_t rows, size, x_stride;
  bool vectors;
  bool rms;
  bool single;  // weight and bias are float32
  const S* x;
  const void *weight, *bias;
};

// The n parameters from `col` on.
template <int n, class S>
__device__ inline void load_parameters(const NormTask<S>& task, const void* from, Compute<S> otherwise, int64_t col,
                                       int count, Compute<S> (&to)[n]) {
  if (from == nullptr) {
#pragma unroll
    for (int i = 0; i < n; ++i) to[i] = otherwise;
  } else if (sizeof(S) == 2 && task.single) {
    alignas(16) float stored[n < 4 ? 4 : n];
    load_unit(stored, static_cast<const float*>(from) + col, count, task.vectors);
#pragma unroll
    for (int i = 0; i < n; ++i) to[i] = static_cast<Compute<S>>(stored[i]);
  } else {
    alignas(16) S stored[n];
    load_unit(stored, static_cast<const S*>(from) + col, count, task.vectors);
#pragma unroll
    for (int i = 0; i < n; ++i) to[i] = to_compute(stored[i]);
  }
}

template <class S>
struct NormForward : NormTask<S> {
  double eps;
  S* y;
  Compute<S>*mean, *rstd;  // nullable
};

template <class S, int threads>
__global__ void __launch_bounds__(kThreads) norm_forward_kernel(const __grid_constant__ NormForward<S> task) {
  using C = Compute<S>;
  constexpr int n = kVector<S>;
  const int64_t row = own_row<threads>();
  if (row >= task.rows) return;
  C* const shared = static_cast<C*>(shared_memory());
  alignas(16) S x[kHeld<S>][n];
  RowWalk<threads, S> walk{task.size};
  const auto load = [&](int u, int64_t col, int count) {
    load_unit(x[u], task.x + row * task.x_stride + col, count, task.vectors);
  };
  const C size = static_cast<C>(task.size);
  C mean = 0;
  if (!task.rms) {
    C sum = 0;
    walk.pass(false, load, [&](int u, int64_t, int) {
#pragma unroll
      for (int i = 0; i < n; ++i) sum += to_compute(x[u][i]);  // what does not exist is zero
    });
    mean = row_sum<threads>(sum, shared) / size;
  }
  C squares = 0;
  walk.pass(true, load, [&](int u, int64_t, int count) {
#pragma unroll
    for (int i = 0; i < n; ++i) {
      const C d = i < count ? to_compute(x[u][i]) - mean : C(0);
      squares = fma(Vec<C>{d}, Vec<C>{d}, Vec<C>{squares}).v;
    }
  });
  const C variance = row_sum<threads>(squares, shared) / size;
  const C rstd = static_cast<C>(1 / ::sqrt(static_cast<double>(variance) + task.eps));
  walk.pass(false, load, [&](int u, int64_t col, int count) {
    C weight[n], bias[n];
    load_parameters(task, task.weight, C(1), col, count, weight);
    load_parameters(task, task.bias, C(0), col, count, bias);
    alignas(16) S y[n];
#pragma unroll
    for (int i = 0; i < n; ++i)
      to_storage(fma(Vec<C>{(to_compute(x[u][i]) - mean) * rstd}, Vec<C>{weight[i]}, Vec<C>{bias[i]}).v, y + i);
    store_unit(task.y + row * task.size + col, y, count, task.vectors);
  });
  if (threadIdx.x % threads != 0) return;
  if (task.mean != nullptr && !task.rms) task.mean[row] = mean;
  if (task.rstd != nullptr) task.rstd[row] = rstd;
}

template <class S>
struct NormBackward : NormTask<S> {
  int64_t grad_stride;
  const S* grad_y;
  const Compute<S>*mean, *rstd;
  S* grad_x;
  int lanes;                      // of a row of a block that sums columns, a power of two up to 32
  int64_t parts;                  // of the rows
  Compute<S>* partial;            // [2][parts][size]: of the weight, then of the bias
  void *grad_weight, *grad_bias;  // nullable

  __device__ void finish(bool bias, int64_t col, Compute<S> sum) const {
    void* const to = bias ? grad_bias : grad_weight;
    if (to == nullptr) return;
    if (sizeof(S) == 2 && this->single)
      static_cast<float*>(to)[col] = static_cast<float>(sum);
    else
      to_storage(sum, static_cast<S*>(to) + col);
  }
};

template <class S, int threads>
__global__ void __launch_bounds__(kThreads) norm_backward_kernel(const __grid_constant__ NormBackward<S> task) {
  using C = Compute<S>;
  constexpr int n = kVector<S>;
  const int64_t row = own_row<threads>();
  if (row >= task.rows) return;
  C* const shared = static_cast<C*>(shared_memory());
  alignas(16) S x[kHeld<S>][n], g[kHeld<S>][n];
  RowWalk<threads, S> walk{task.size};
  const auto load = [&](int u, int64_t col, int count) {
    load_unit(x[u], task.x + row * task.x_stride + col, count, task.vectors);
    load_unit(g[u], task.grad_y + row * task.grad_stride + col, count, task.vectors);
  };
  const C mean = task.rms ? C(0) : task.mean[row], rstd = task.rstd[row];
  C sum = 0, product = 0;
  walk.pass(false, load, [&](int u, int64_t col, int count) {
    C weight[n];
    load_parameters(task, task.weight, C(1), col, count, weight);
#pragma unroll
    for (int i = 0; i < n; ++i) {
      const C grad = i < count ? to_compute(g[u][i]) * weight[i] : C(0);
      const C normal = i < count ? (to_compute(x[u][i]) - mean) * rstd : C(0);
      sum += grad;
      product = fma(Vec<C>{grad}, Vec<C>{normal}, Vec<C>{product}).v;
    }
  });
  const C size = static_cast<C>(task.size);
  const C mean_g = task.rms ? C(0) : row_sum<threads>(sum, shared) / size;
  const C mean_product = row_sum<threads>(product, shared) / size;
  walk.pass(true, load, [&](int u, int64_t col, int count) {
    C weight[n];
    load_parameters(task, task.weight, C(1), col, count, weight);
    alignas(16) S grad_x[n];
#pragma unroll
    for (int i = 0; i < n; ++i) {
      const C normal = (to_compute(x[u][i]) - mean) * rstd;
      to_storage(rstd * (to_compute(g[u][i]) * weight[i] - mean_g - normal * mean_product), grad_x + i);
    }
    store_unit(task.grad_x + row * task.size + col, grad_x, count, task.vectors);
  });
}

// The gradients of weight and bias: one block for each part of the rows and tile of columns. A thread has a vector of
// columns, in every `workers`-th row.
template <class S>
__global__ void __launch_bounds__(kThreads) norm_columns_kernel(const __grid_constant__ NormBackward<S> task) {
  using C = Compute<S>;
  constexpr int n = kVector<S>;
  const int lanes = task.lanes, lane = static_cast<int>(threadIdx.x) % lanes;
  const int64_t workers = kThreads / lanes, worker = threadIdx.x / lanes;
  const int64_t tiles = (task.size + lanes * n - 1) / (lanes * n);
  const int64_t part = blockIdx.x / tiles, col = (blockIdx.x % tiles * lanes + lane) * n, left = task.size - col;
  const int count = left < 0 ? 0 : left < n ? static_cast<int>(left) : n;
  const int64_t begin = task.rows * part / task.parts, end = task.rows * (part + 1) / task.parts;
  C sums[2][n] = {};
  for (int64_t first = begin + worker; first < end && count > 0; first += workers * kNormRows) {
    alignas(16) S x[kNormRows][n], g[kNormRows][n];
    C mean[kNormRows], rstd[kNormRows];
#pragma unroll
    for (int r = 0; r < kNormRows; ++r) {
      const int64_t row = first + r * workers;
      if (row >= end) continue;
      load_unit(x[r], task.x + row * task.x_stride + col, count, task.vectors);
      load_unit(g[r], task.grad_y + row * task.grad_stride + col, count, task.vectors);
      mean[r] = task.rms ? C(0) : task.mean[row];
      rstd[r] = task.rstd[row];
    }
#pragma unroll
    for (int r = 0; r < kNormRows; ++r)
      if (first + r * workers < end) {
#pragma unroll
        for (int i = 0; i < n; ++i) {
          const C grad = to_compute(g[r][i]);
          sums[0][i] = fma(Vec<C>{grad}, Vec<C>{(to_compute(x[r][i]) - mean[r]) * rstd[r]}, Vec<C>{sums[0][i]}).v;
          sums[1][i] += grad;
        }
      }
  }
  C* const shared = static_cast<C*>(shared_memory());
#pragma unroll
  for (int k = 0; k < 2; ++k)
#pragma unroll
    for (int i = 0; i < n; ++i) {
      C sum = sums[k][i];
      for (int distance = 16; distance >= lanes; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
      if (static_cast<int>(threadIdx.x) % 32 < lanes) shared[threadIdx.x / 32 * lanes + lane] = sum;
      __syncthreads();  // the sums of all warps are there
      if (static_cast<int>(threadIdx.x) < lanes && i < count) {
        for (int warp = 1; warp < kThreads / 32; ++warp) sum += shared[warp * lanes + lane];
        if (task.parts > 1)
          task.partial[(k * task.parts + part) * task.size + col + i] = sum;
        else
          task.finish(k == 1, col + i, sum);
      }
      __syncthreads();  // nobody reads them any more
    }
}

// Adds the parts of the rows, in order. One warp reads 32 columns of each eighth part.
template <class S>
__global__ void __launch_bounds__(kThreads) norm_finish_kernel(const __grid_constant__ NormBackward<S> task) {
  using C = Compute<S>;
  C* const shared = static_cast<C*>(shared_memory());
  const int64_t tiles = (task.size + 31) / 32, k = blockIdx.x / tiles;
  const int64_t col = blockIdx.x % tiles * 32 + threadIdx.x % 32;
  C sum = 0;
  if (col < task.size)
    for (int64_t part = threadIdx.x / 32; part < task.parts; part += kThreads / 32)
      sum += task.partial[(k * task.parts + part) * task.size + col];
  shared[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x >= 32 || col >= task.size) return;
  for (int warp = 1; warp < kThreads / 32; ++warp) sum += shared[warp * 32 + threadIdx.x];
  task.finish(k == 1, col, sum);
}

}  // namespace
}  // namespace fastops::cuda
