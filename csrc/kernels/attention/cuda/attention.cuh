// Scaled dot product attention without a matrix of all scores: tiles of 64 queries by 64 keys stay on the chip.
//
// A block has 16x16 threads. A thread (y, x) has the 4x4 scores of rows 4 y + r and columns x + 16 c of a tile, and of
// a result rows 4 y + r and 8 of 128 columns, a slice. Wider results have several slices, whose blocks form the scores
// again. Backward forms them twice, once for grad_q and once for grad_k and grad_v, so that no two blocks add to one
// element.
#pragma once

#include "../../common/cuda/rows.cuh"
#include "../attention.h"

namespace fastops::cuda {
namespace {

constexpr int kScores = 64;     // rows and columns of a tile of scores
constexpr int kSlice = 128;     // columns of a result that a block forms
constexpr int kOwnColumns = 8;  // of those, a thread's

template <class C>
constexpr int kDepth = 8 * kVector<C>;  // elements of rows, or rows, that are multiplied at a time
// Rows in shared memory are a vector longer, so that neighbours lie in other banks.
template <class C>
constexpr int kDepthPitch = kDepth<C> + kVector<C>;
template <class C>
constexpr int kScorePitch = kScores + kVector<C>;
// Two chunks of rows, or one of a slice; then a tile of scores.
template <class C>
constexpr int kChunks = 2 * kScores * kDepthPitch<C>;
template <class C>
constexpr size_t kAttentionShared = (kChunks<C> + kScores * kScorePitch<C>)*sizeof(C);

// Rows of an operand, of which the first `count` exist.
template <class C>
struct TileRows {
  const C* data;
  int64_t stride, count;
};

// Elements [first, first + kDepth) of 64 rows of this size. What does not exist is zero.
template <class C>
__device__ inline void load_depth(C* to, const TileRows<C>& rows, int64_t first, int64_t size, bool vectors) {
  constexpr int n = kVector<C>;
#pragma unroll
  for (int v = static_cast<int>(threadIdx.x); v < kScores * 8; v += kThreads) {
    const int row = v / 8, col = v % 8 * n;
    const int64_t left = row < rows.count ? size - first - col : 0;
    alignas(16) C unit[n];
    load_unit(unit, rows.data + row * rows.stride + first + col,
              left < 0   ? 0
              : left < n ? static_cast<int>(left)
                         : n,
              vectors);
    store_unit(to + row * kDepthPitch<C> + col, unit, n, true);
  }
}

// products[r][c] = the product of row 4 y + r of a and row x + 16 c of b.
template <class C>
__device__ inline void multiply_rows(C (&products)[4][4], const TileRows<C>& a, const TileRows<C>& b, int64_t size,
                                     bool vectors, C* shared) {
  constexpr int n = kVector<C>;
  const int y = static_cast<int>(threadIdx.x) / 16, x = static_cast<int>(threadIdx.x) % 16;
  C *const from_a = shared, *const from_b = shared + kScores * kDepthPitch<C>;
#pragma unroll
  for (int r = 0; r < 4; ++r)
#pragma unroll
    for (int c = 0; c < 4; ++c) products[r][c] = 0;
  for (int64_t first = 0; first < size; first += kDepth<C>) {
    load_depth(from_a, a, first, size, vectors);
    load_depth(from_b, b, first, size, vectors);
    __syncthreads();  // both chunks are there
#pragma unroll 1
    for (int d = 0; d < kDepth<C>; d += n) {
      alignas(16) C p[4][n], q[4][n];
#pragma unroll
      for (int r = 0; r < 4; ++r) load_unit(p[r], from_a + (4 * y + r) * kDepthPitch<C> + d, n, true);
#pragma unroll
      for (int c = 0; c < 4; ++c) load_unit(q[c], from_b + (x + 16 * c) * kDepthPitch<C> + d, n, true);
#pragma unroll
      for (int e = 0; e < n; ++e)
#pragma unroll
        for (int r = 0; r < 4; ++r)
#pragma unroll
          for (int c = 0; c < 4; ++c) products[r][c] = fma(Vec<C>{p[r][e]}, Vec<C>{q[c][e]}, Vec<C>{products[r][c]}).v;
    }
    __syncthreads();  // nobody reads the chunks any more
  }
}

// The column of a thread's element j of a slice.
template <class C>
__device__ inline int slice_column(int j) {
  return static_cast<int>(threadIdx.x) % 16 * kVector<C> + j / kVector<C> * 16 * kVector<C> + j % kVector<C>;
}

// sums += scores b, for a tile of scores in shared memory and 64 rows of b, columns [first, first + kSlice) of `size`.
template <class C>
__device__ inline void add_product(C (&sums)[4][kOwnColumns], const C* scores, const TileRows<C>& b, int64_t first,
                                   int64_t size, bool vectors, C* shared) {
  constexpr int n = kVector<C>;
  const int y = static_cast<int>(threadIdx.x) / 16;
  for (int k0 = 0; k0 < kScores; k0 += kDepth<C>) {
#pragma unroll
    for (int v = static_cast<int>(threadIdx.x); v < kDepth<C> * kSlice / n; v += kThreads) {
      const int row = v / (kSlice / n), col = v % (kSlice / n) * n;
      const int64_t left = k0 + row < b.count ? size - first - col : 0;
      alignas(16) C unit[n];
      load_unit(unit, b.data + (k0 + row) * b.stride + first + col,
                left < 0   ? 0
                : left < n ? static_cast<int>(left)
                           : n,
                vectors);
      store_unit(shared + row * kSlice + col, unit, n, true);
    }
    __syncthreads();  // the scores and the rows are there
#pragma unroll 1
    for (int k = 0; k < kDepth<C>; k += n) {
      alignas(16) C p[4][n];
#pragma unroll
      for (int r = 0; r < 4; ++r) load_unit(p[r], scores + (4 * y + r) * kScorePitch<C> + k0 + k, n, true);
#pragma unroll
      for (int e = 0; e < n; ++e) {
        alignas(16) C q[kOwnColumns];
#pragma unroll
        for (int j = 0; j < kOwnColumns; j += n)
          *reinterpret_cast<uint4*>(q + j) =
              *reinterpret_cast<const uint4*>(shared + (k + e) * kSlice + slice_column<C>(j));
#pragma unroll
        for (int r = 0; r < 4; ++r)
#pragma unroll
          for (int j = 0; j < kOwnColumns; ++j) sums[r][j] = fma(Vec<C>{p[r][e]}, Vec<C>{q[j]}, Vec<C>{sums[r][j]}).v;
      }
    }
    __syncthreads();  // nobody reads them any more
  }
}

// Stores factor[r] sums[r] as rows of a result.
template <class C>
__device__ inline void store_sums(const C (&sums)[4][kOwnColumns], const C (&factor)[4], C* to, int64_t stride,
                                  int64_t rows, int64_t first, int64_t size, bool vectors) {
  constexpr int n = kVector<C>;
  const int y = static_cast<int>(threadIdx.x) / 16;
#pragma unroll
  for (int r = 0; r < 4; ++r)
#pragma unroll
    for (int j = 0; j < kOwnColumns; j += n) {
      const int64_t col = first + slice_column<C>(j), left = size - col;
      if (4 * y + r >= rows || left <= 0) continue;
      alignas(16) C unit[n];
#pragma unroll
      for (int e = 0; e < n; ++e) unit[e] = factor[r] * sums[r][j + e];
      store_unit(to + (4 * y + r) * stride + col, unit, left < n ? static_cast<int>(left) : n, vectors);
    }
}

template <class C>
struct AttentionTask {
  AttentionShape of;
  int64_t tiles, slices;  // of a head
  bool vectors;
  C scale;
  const C *q, *k, *v, *mask, *y, *grad_y;
  C *result, *grad_k, *grad_v;  // result: y, or grad_q
  C *lse, *delta;               // [batch, heads, queries]
  HeadStrides grad_y_strides, result_strides, grad_k_strides, grad_v_strides;
};

// The head, tile and first column of a block.
template <class C>
struct AttentionPlace {
  int64_t batch, head, index, tile, column;

  __device__ explicit AttentionPlace(const AttentionTask<C>& task) {
    const int64_t block = blockIdx.x / task.slices;
    column = blockIdx.x % task.slices * kSlice;
    tile = block % task.tiles * kScores;
    index = block / task.tiles;
    batch = index / task.of.heads;
    head = index % task.of.heads;
  }
  template <class T>
  __device__ T* of(T* data, const HeadStrides& strides, int64_t row) const {
    return data + batch * strides.batch + head * strides.head + row * strides.row;
  }
  // Up to 64 rows from `row` on.
  __device__ TileRows<C> rows(const C* data, const HeadStrides& strides, int64_t row, int64_t all) const {
    return {of(data, strides, row), strides.row, all - row < kScores ? all - row : kScores};
  }
};

// A score from a product; -inf where the query does not see the key.
template <class C>
__device__ inline C score_of(const AttentionTask<C>& task, const AttentionPlace<C>& at, C product, int64_t query,
                             int64_t key) {
  if (query >= task.of.queries || key >= task.of.keys || (task.of.causal && key > query)) return lowest<C>();
  const C score = product * task.scale;
  return task.mask == nullptr ? score : score + at.of(task.mask, task.of.mask, query)[key];
}

// Over the 16 threads that have a row.
template <class C, class Join>
__device__ inline C join_row(C value, Join join) {
#pragma unroll
  for (int distance = 8; distance > 0; distance /= 2)
    value = join(value, __shfl_xor_sync(0xffffffffu, value, distance));
  return value;
}

template <class C>
__global__ void __launch_bounds__(kThreads) attention_forward_kernel(const __grid_constant__ AttentionTask<C> task) {
  const AttentionPlace<C> at(task);
  const AttentionShape& of = task.of;
  C *const shared = static_cast<C*>(shared_memory()), *const scores = shared + kChunks<C>;
  const int y = static_cast<int>(threadIdx.x) / 16, x = static_cast<int>(threadIdx.x) % 16;
  const TileRows<C> q = at.rows(task.q, of.q, at.tile, of.queries);
  C sums[4][kOwnColumns] = {}, top[4], total[4] = {};
#pragma unroll
  for (int r = 0; r < 4; ++r) top[r] = lowest<C>();
  const int64_t end = of.causal && at.tile + kScores < of.keys ? at.tile + kScores : of.keys;
  for (int64_t key = 0; key < end; key += kScores) {
    C p[4][4];
    multiply_rows(p, q, at.rows(task.k, of.k, key, of.keys), of.size, task.vectors, shared);
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      C most = top[r];
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        p[r][c] = score_of(task, at, p[r][c], at.tile + 4 * y + r, key + x + 16 * c);
        most = p[r][c] > most ? p[r][c] : most;
      }
      most = join_row(most, [](C a, C b) { return a > b ? a : b; });
      const bool any = most != lowest<C>();
      const C again = any ? exp_minus_abs<C>(Vec<C>{top[r] - most}).v : C(1);
      top[r] = most;
      total[r] *= again;
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        // NaN stays NaN.
        const C e = p[r][c] == lowest<C>() ? C(0) : exp_minus_abs<C>(Vec<C>{p[r][c] - most}).v;
        total[r] += e;
        scores[(4 * y + r) * kScorePitch<C> + x + 16 * c] = e;
      }
#pragma unroll
      for (int j = 0; j < kOwnColumns; ++j) sums[r][j] *= again;
    }
    add_product(sums, scores, at.rows(task.v, of.v, key, of.keys), at.column, of.value_size, task.vectors, shared);
  }
  C factor[4];
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const C all = join_row(total[r], [](C a, C b) { return a + b; });
    factor[r] = all == 0 ? C(0) : 1 / all;
    const int64_t query = at.tile + 4 * y + r;
    if (task.lse != nullptr && x == 0 && at.column == 0 && query < of.queries)
      task.lse[at.index * of.queries + query] = all == 0 ? lowest<C>() : top[r] + natural_log(all);
  }
  store_sums(sums, factor, at.of(task.result, task.result_strides, at.tile), task.result_strides.row, q.count,
             at.column, of.value_size, task.vectors);
}

// The sum of grad_y y of every query. One warp for each.
template <class C>
__global__ void __launch_bounds__(kThreads) attention_delta_kernel(const __grid_constant__ AttentionTask<C> task) {
  const AttentionShape& of = task.of;
  const int64_t row = own_row<32>();
  if (row >= of.batch * of.heads * of.queries) return;
  const int64_t query = row % of.queries, index = row / of.queries;
  const auto begin = [&](const C* data, const HeadStrides& strides) {
    return data + index / of.heads * strides.batch + index % of.heads * strides.head + query * strides.row;
  };
  const C *const grad = begin(task.grad_y, task.grad_y_strides), *const y = begin(task.y, of.y);
  C sum = 0;
  for (int64_t i = threadIdx.x % 32; i < of.value_size; i += 32)
    sum = fma(Vec<C>{grad[i]}, Vec<C>{y[i]}, Vec<C>{sum}).v;
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) task.delta[row] = sum;
}

template <class C>
__device__ inline C probability(C score, C lse) {
  return score == lowest<C>() ? C(0) : exp_minus_abs<C>(Vec<C>{score - lse}).v;
}

template <class C>
__global__ void __launch_bounds__(kThreads)
    attention_backward_query_kernel(const __grid_constant__ AttentionTask<C> task) {
  const AttentionPlace<C> at(task);
  const AttentionShape& of = task.of;
  C *const shared = static_cast<C*>(shared_memory()), *const scores = shared + kChunks<C>;
  const int y = static_cast<int>(threadIdx.x) / 16, x = static_cast<int>(threadIdx.x) % 16;
  const TileRows<C> q = at.rows(task.q, of.q, at.tile, of.queries),
                    g = at.rows(task.grad_y, task.grad_y_strides, at.tile, of.queries);
  C sums[4][kOwnColumns] = {}, lse[4], delta[4];
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const int64_t query = at.tile + 4 * y + r;
    lse[r] = query < of.queries ? task.lse[at.index * of.queries + query] : C(0);
    delta[r] = query < of.queries ? task.delta[at.index * of.queries + query] : C(0);
  }
  const int64_t end = of.causal && at.tile + kScores < of.keys ? at.tile + kScores : of.keys;
  for (int64_t key = 0; key < end; key += kScores) {
    const TileRows<C> k = at.rows(task.k, of.k, key, of.keys);
    C p[4][4], d[4][4];
    multiply_rows(p, q, k, of.size, task.vectors, shared);
    multiply_rows(d, g, at.rows(task.v, of.v, key, of.keys), of.value_size, task.vectors, shared);
#pragma unroll
    for (int r = 0; r < 4; ++r)
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const C score = score_of(task, at, p[r][c], at.tile + 4 * y + r, key + x + 16 * c);
        scores[(4 * y + r) * kScorePitch<C> + x + 16 * c] = probability(score, lse[r]) * (d[r][c] - delta[r]);
      }
    add_product(sums, scores, k, at.column, of.size, task.vectors, shared);
  }
  const C factor[4] = {task.scale, task.scale, task.scale, task.scale};
  store_sums(sums, factor, at.of(task.result, task.result_strides, at.tile), task.result_strides.row, q.count,
             at.column, of.size, task.vectors);
}

// Rows of a tile of scores are keys here, and columns queries.
template <class C>
__global__ void __launch_bounds__(kThreads)
    attention_backward_key_kernel(const __grid_constant__ AttentionTask<C> task) {
  const AttentionPlace<C> at(task);
  const AttentionShape& of = task.of;
  C *const shared = static_cast<C*>(shared_memory()), *const scores = shared + kChunks<C>;
  const int y = static_cast<int>(threadIdx.x) / 16, x = static_cast<int>(threadIdx.x) % 16;
  const TileRows<C> k = at.rows(task.k, of.k, at.tile, of.keys), v = at.rows(task.v, of.v, at.tile, of.keys);
  C of_k[4][kOwnColumns] = {}, of_v[4][kOwnColumns] = {};
  const bool with_k = task.grad_k != nullptr && at.column < of.size;
  const bool with_v = task.grad_v != nullptr && at.column < of.value_size;
  for (int64_t query = of.causal ? at.tile : 0; query < of.queries; query += kScores) {
    const TileRows<C> q = at.rows(task.q, of.q, query, of.queries),
                      g = at.rows(task.grad_y, task.grad_y_strides, query, of.queries);
    C p[4][4];
    multiply_rows(p, k, q, of.size, task.vectors, shared);
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int64_t column = query + x + 16 * c;
      const C lse = column < of.queries ? task.lse[at.index * of.queries + column] : C(0);
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        p[r][c] = probability(score_of(task, at, p[r][c], column, at.tile + 4 * y + r), lse);
        scores[(4 * y + r) * kScorePitch<C> + x + 16 * c] = p[r][c];
      }
    }
    if (with_v) add_product(of_v, scores, g, at.column, of.value_size, task.vectors, shared);
    if (!with_k) continue;
    C d[4][4];
    multiply_rows(d, v, g, of.value_size, task.vectors, shared);
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int64_t column = query + x + 16 * c;
      const C delta = column < of.queries ? task.delta[at.index * of.queries + column] : C(0);
#pragma unroll
      for (int r = 0; r < 4; ++r) scores[(4 * y + r) * kScorePitch<C> + x + 16 * c] = p[r][c] * (d[r][c] - delta);
    }
    add_product(of_k, scores, q, at.column, of.size, task.vectors, shared);
  }
  const C one[4] = {1, 1, 1, 1}, scale[4] = {task.scale, task.scale, task.scale, task.scale};
  if (with_v)
    store_sums(of_v, one, at.of(task.grad_v, task.grad_v_strides, at.tile), task.grad_v_strides.row, v.count, at.column,
               of.value_size, task.vectors);
  if (with_k)
    store_sums(of_k, scale, at.of(task.grad_k, task.grad_k_strides, at.tile), task.grad_k_strides.row, k.count,
               at.column, of.size, task.vectors);
}

}  // namespace
}  // namespace fastops::cuda
