// The part of CUDA that the .cu sources use, on the emulator. This folder is first on the include path.
#pragma once

#include <atomic>
#include <cmath>
#include <cstdint>
#include <tuple>
#include <utility>

#include "simt.h"

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__
#define threadIdx (simt::thread_index())
#define blockIdx (simt::block_index())
#define blockDim (simt::block_size())
#define gridDim (simt::grid_size())

using dim3 = simt::Dim3;
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

inline void __syncthreads() { simt::barrier(); }
inline void __syncwarp() { simt::warp_operation("__syncwarp", nullptr, nullptr); }

// Every lane receives the value of lane ^ distance.
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int distance) {
  if (mask != 0xffffffffu) simt::fail("__shfl_xor_sync with a part of a warp");
  struct Brought {
    T given, received;
    int distance;
  } mine{value, value, distance};
  simt::warp_operation("__shfl_xor_sync", &mine, [](void* const(&lanes)[32]) {
    for (int i = 0; i < 32; ++i) {
      Brought& lane = *static_cast<Brought*>(lanes[i]);
      lane.received = static_cast<Brought*>(lanes[(i ^ lane.distance) & 31])->given;
    }
  });
  return mine.received;
}

// ---- the runtime

using cudaStream_t = struct CUstream_st*;
enum cudaError_t : int { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9, cudaErrorLaunchFailure = 719 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor
};
struct cudaDeviceProp {
  char name[256];
  int major, minor, multiProcessorCount;
};
struct cudaFuncAttributes {};

cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaGetDeviceCount(int* count);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device);
cudaError_t cudaRuntimeGetVersion(int* version);
cudaError_t cudaDriverGetVersion(int* version);
cudaError_t cudaGetLastError();
const char* cudaGetErrorString(cudaError_t error);

namespace simt {
// How often the runtime was asked for a property of a device or for permission of a kernel, which takes a GPU as long
// as a launch.
std::atomic<int64_t>& queries();
cudaError_t permit_shared(const void* kernel, int bytes);
bool is_permitted(const void* kernel, size_t bytes);
cudaError_t finish_launch(const char* problem);
}  // namespace simt

template <class... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute, int value) {
  return simt::permit_shared(reinterpret_cast<const void*>(kernel), value);
}
template <class... Parameters>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, void (*)(Parameters...)) {
  return cudaSuccess;
}

template <class... Parameters>
cudaError_t cudaLaunchKernel(void (*kernel)(Parameters...), dim3 grid, dim3 block, void** pointers, size_t shared,
                             cudaStream_t) {
  if (!simt::is_permitted(reinterpret_cast<const void*>(kernel), shared))
    return simt::finish_launch("a launch has more than 48 KiB of shared memory without having asked for it");
  return [&]<size_t... i>(std::index_sequence<i...>) {
    return simt::finish_launch(
        simt::launch(grid, block, shared, [&] { kernel(*static_cast<Parameters*>(pointers[i])...); }));
  }(std::index_sequence_for<Parameters...>());
}
