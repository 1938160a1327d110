// The formulas that CPU and CUDA kernels share: math.inl and activation_math.inl over lane.cuh, in the namespace
// `fastops::cuda` with internal linkage.
#pragma once

#include <cuda_runtime.h>

#include <cmath>

#include "../../activation/activation.h"
#include "ptx.cuh"

#define FASTOPS_FN __device__ inline
#define FASTOPS_HOST_FN __host__ __device__ inline
#define FASTOPS_TABLE __device__ const
#define FASTOPS_VEC_SCALAR  // selects the variants of the formulas without small tables in registers

namespace fastops::cuda {
namespace {

// clang-format off
#include "lane.cuh"
#include "../math.inl"
#include "../../activation/activation_math.inl"
// clang-format on

// body(T{}) with the storage type of `dtype`.
template <class Body>
auto with_dtype(DType dtype, Body&& body) {
#if defined(FASTOPS_TWO_DTYPES)  // where nothing runs: nvcc has to take the kernels, see .ci/run
  return dtype == DType::bf16 ? body(bf16_t{}) : body(float{});
#else
  switch (dtype) {
    case DType::f64:
      return body(double{});
    case DType::bf16:
      return body(bf16_t{});
    case DType::f16:
      return body(f16_t{});
    case DType::f32:
      break;
  }
  return body(float{});
#endif
}

// Elements in 16 bytes, the largest access of a thread.
template <class S>
constexpr int kVector = 16 / sizeof(S);

// Whether rows can be read in vectors. alignment: of the first, in bytes.
template <class S>
bool vector_aligned(uintptr_t alignment, int64_t row_stride) {
  return alignment % 16 == 0 && row_stride % kVector<S> == 0;
}
template <class S>
bool vector_aligned(const S* p, int64_t row_stride) {
  return vector_aligned<S>(reinterpret_cast<uintptr_t>(p), row_stride);
}

// Loads n elements. Only the first `count` are read; the others are zero. vectors: `from` is 16-byte aligned.
template <int n, class S>
__device__ inline void load_unit(S (&to)[n], const S* from, int count, bool vectors) {
  static_assert(n % kVector<S> == 0);
  if (vectors && count == n) {
#pragma unroll
    for (int i = 0; i < n; i += kVector<S>)
      *reinterpret_cast<uint4*>(to + i) = *reinterpret_cast<const uint4*>(from + i);
    return;
  }
#pragma unroll
  for (int i = 0; i < n; ++i) to[i] = i < count ? from[i] : S{};
}

template <int n, class S>
__device__ inline void store_unit(S* to, const S (&from)[n], int count, bool vectors) {
  static_assert(n % kVector<S> == 0);
  if (vectors && count == n) {
#pragma unroll
    for (int i = 0; i < n; i += kVector<S>)
      *reinterpret_cast<uint4*>(to + i) = *reinterpret_cast<const uint4*>(from + i);
    return;
  }
#pragma unroll
  for (int i = 0; i < n; ++i)
    if (i < count) to[i] = from[i];
}

// The sum over the lanes of a warp, in every lane. Its order is fixed.
template <class C>
__device__ inline C warp_sum(C value) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
  return value;
}

// The sum over a block, in thread 0. Its order depends only on the number of threads. shared has room for one number
// per warp.
template <int threads, class C>
__device__ inline C block_sum(C value, C* shared) {
  value = warp_sum(value);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
  __syncthreads();
  C sum = 0;
  if (threadIdx.x == 0)
    for (int warp = 0; warp < threads / 32; ++warp) sum += shared[warp];
  return sum;
}

}  // namespace
}  // namespace fastops::cuda
