// Launching a kernel by a function call without <<< >>>, so that a .cu file is also plain C++ for the emulator.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <type_traits>

#include "kernels.h"

namespace fastops::cuda {

inline int64_t quotient_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t at_least_one(int64_t a) { return a < 1 ? 1 : a; }
// Of the parts of a workspace, in bytes.
inline constexpr int kWorkspaceAlignment = 256;
inline size_t round_up(size_t bytes) {
  return (bytes + kWorkspaceAlignment - 1) / kWorkspaceAlignment * kWorkspaceAlignment;
}

struct Launch {
  KernelName kernel;  // for errors
  int64_t blocks;
  unsigned threads;
  size_t shared;  // bytes of shared memory per block; all of it is dynamic (shared_memory in ptx.cuh)
  Stream stream;
};

// The shared memory of a block for which the kernel needs no permission.
inline constexpr size_t kUnaskedShared = size_t{48} << 10;

inline constexpr int kMostDevices = 64;  // of which anything is kept

inline int current_device() {
  int device = 0;
  cudaGetDevice(&device);
  return device;
}

// An attribute of the current device. The runtime is asked once per device, as that takes as long as a launch.
template <cudaDeviceAttr what>
int attribute(int otherwise) {
  static std::atomic<int> kept[kMostDevices];  // 0: not asked yet
  const int device = current_device();
  if (device < kMostDevices)
    if (const int value = kept[device].load(std::memory_order_relaxed); value != 0) return value;
  int value = otherwise;
  if (cudaDeviceGetAttribute(&value, what, device) != cudaSuccess) return otherwise;
  if (device < kMostDevices) kept[device].store(value, std::memory_order_relaxed);
  return value;
}

inline int64_t multiprocessors() { return attribute<cudaDevAttrMultiProcessorCount>(1); }
// The most bytes of shared memory per block.
inline size_t most_shared() {
  return static_cast<size_t>(attribute<cudaDevAttrMaxSharedMemoryPerBlockOptin>(static_cast<int>(kUnaskedShared)));
}

// Permits a kernel the shared memory of a launch on the current device. Asks the runtime once per kernel and device, at
// planning; if that fails, so does the launch.
template <auto kernel>
void permit_shared(size_t bytes) {
  static std::atomic<uint64_t> permitted{0};  // a bit per device
  if (bytes <= kUnaskedShared) return;
  const int device = current_device();
  const uint64_t bit = device < kMostDevices ? uint64_t{1} << device : 0;
  if ((permitted.load() & bit) != 0) return;
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(most_shared())) ==
      cudaSuccess)
    permitted.fetch_or(bit);
  else
    cudaGetLastError();
}

// No blocks are no work.
template <class... Parameters>
Status launch(const Launch& how, void (*kernel)(Parameters...), std::type_identity_t<Parameters>... arguments) {
  if (how.blocks == 0) return {};
  const Status described{0, nullptr, how.kernel, static_cast<unsigned>(how.blocks), how.threads, how.shared};
  void* pointers[] = {&arguments...};
  cudaError_t error = how.blocks > 0 && how.blocks <= INT32_MAX ? cudaSuccess : cudaErrorInvalidConfiguration;
  if (error == cudaSuccess)
    error = cudaLaunchKernel(kernel, dim3(described.blocks), dim3(how.threads), pointers, how.shared, how.stream);
  if (error == cudaSuccess) return {};
  cudaGetLastError();  // clears the error, which the next call from other code would report again
  Status failed = described;
  failed.error = static_cast<int>(error);
  failed.message = cudaGetErrorString(error);
  return failed;
}

}  // namespace fastops::cuda
