// Rows that are gone through several times: by a warp each, or by a block each where a warp would have too few
// registers.
//
// A row is read in chunks of as many elements as its threads hold in registers. A pass begins with the chunk that the
// pass before has left there, so that a row of one chunk is read once.
#pragma once

#include "units.cuh"

namespace fastops::cuda {
namespace {

// Vectors of one operand that a thread holds: 32 elements, of float64 16.
template <class S>
constexpr int kHeld = (sizeof(S) == 2 ? 64 : 128) / (kVector<S> * sizeof(S));
template <int threads, class S>
constexpr int64_t kChunk = int64_t{threads} * kHeld<S> * kVector<S>;

// body(the threads of a row, a std::integral_constant) for rows of this size.
template <class S, class Body>
auto with_row_threads(int64_t size, Body&& body) {
  if (size <= kChunk<32, S>) return body(std::integral_constant<int, 32>{});
  return body(std::integral_constant<int, kThreads>{});
}

// The row of this thread.
template <int threads>
__device__ inline int64_t own_row() {
  return static_cast<int64_t>(blockIdx.x) * (kThreads / threads) + threadIdx.x / threads;
}

template <int threads, class S>
struct RowWalk {
  int64_t size;
  int64_t held = -1;  // the chunk in registers

  // load(u, col, count) for the vectors of a chunk that is not held, then body(u, col, count), chunk after chunk.
  template <class Load, class Body>
  __device__ void pass(bool backwards, Load load, Body body) {
    constexpr int n = kVector<S>;
    const int64_t chunks = (size + kChunk<threads, S> - 1) / kChunk<threads, S>;
    for (int64_t i = 0; i < chunks; ++i) {
      const int64_t chunk = backwards ? chunks - 1 - i : i;
      const int64_t first = chunk * kChunk<threads, S> + threadIdx.x % threads * n;
      const auto over = [&](auto action) {
#pragma unroll
        for (int u = 0; u < kHeld<S>; ++u) {
          const int64_t col = first + u * threads * n;
          if (col < size) action(u, col, size - col < n ? static_cast<int>(size - col) : n);
        }
      };
      if (chunk != held) over(load);
      held = chunk;
      over(body);
    }
  }
};

// The sum over the threads of a row, in every thread; its order is fixed. shared: a number for each warp of a block.
template <int threads, class C>
__device__ inline C row_sum(C value, C* shared) {
  value = warp_sum(value);
  if constexpr (threads == 32) return value;
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
  __syncthreads();  // every warp's sum is there
  value = shared[0];
#pragma unroll
  for (int warp = 1; warp < threads / 32; ++warp) value += shared[warp];
  __syncthreads();  // every thread has read the sums
  return value;
}

// The largest value; NaN is no value.
template <int threads, class C>
__device__ inline C row_max(C value, C* shared) {
  const auto larger = [](C a, C b) { return a > b ? a : b; };
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2)
    value = larger(value, __shfl_xor_sync(0xffffffffu, value, distance));
  if constexpr (threads == 32) return value;
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
  __syncthreads();  // every warp's maximum is there
  value = shared[0];
#pragma unroll
  for (int warp = 1; warp < threads / 32; ++warp) value = larger(value, shared[warp]);
  __syncthreads();  // every thread has read the maxima
  return value;
}

// What the warps of a block have for each of 32 neighbours, joined in order, in every thread. shared: a number for each
// thread.
template <class C, class Join>
__device__ inline C strip_join(C value, C* shared, Join join) {
  shared[threadIdx.x] = value;
  __syncthreads();  // every warp's values are there
  value = shared[threadIdx.x % 32];
#pragma unroll
  for (int warp = 1; warp < kThreads / 32; ++warp) value = join(value, shared[warp * 32 + threadIdx.x % 32]);
  __syncthreads();  // every thread has read the values
  return value;
}

template <class C>
__device__ inline C lowest() {
  return -static_cast<C>(INFINITY);
}
__device__ inline float natural_log(float x) { return ::logf(x); }
__device__ inline double natural_log(double x) { return ::log(x); }

// Launches a kernel on `rows` rows of `size` elements: kernel(std::integral_constant of a row's threads) is it. shared:
// bytes of a block.
template <class S, class Kernel, class Task>
Status launch_rows(const char* name, int64_t rows, int64_t size, size_t shared, const Task& task, Stream stream,
                   Kernel kernel) {
  return with_row_threads<S>(size, [&](auto threads) {
    return launch({{name}, quotient_up(rows, kThreads / threads.value), kThreads, shared, stream}, kernel(threads),
                  task);
  });
}
// The shared memory of row_sum and row_max.
template <class S>
constexpr size_t kRowShared = kThreads / 32 * sizeof(Compute<S>);

}  // namespace
}  // namespace fastops::cuda
