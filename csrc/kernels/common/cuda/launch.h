// Launching a kernel by a function call without <<< >>>, so that a .cu file is also plain C++ for the emulator.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "kernels.h"

namespace fastops::cuda {

inline int64_t quotient_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
// The parts of a workspace are aligned to 256 bytes.
inline size_t round_up(size_t bytes) { return (bytes + 255) / 256 * 256; }

struct Launch {
  KernelName kernel;  // for errors
  int64_t blocks;
  unsigned threads;
  size_t shared;  // bytes of shared memory per block; all of it is dynamic (shared_memory in ptx.cuh)
  Stream stream;
};

// The shared memory of a block that needs no cudaFuncSetAttribute.
inline constexpr size_t kUnaskedShared = size_t{48} << 10;

template <class... Parameters>
Status launch(const Launch& how, void (*kernel)(Parameters...), std::type_identity_t<Parameters>... arguments) {
  const Status described{0, nullptr, how.kernel, static_cast<unsigned>(how.blocks), how.threads, how.shared};
  void* pointers[] = {&arguments...};
  cudaError_t error = how.blocks > 0 && how.blocks <= INT32_MAX ? cudaSuccess : cudaErrorInvalidConfiguration;
  if (error == cudaSuccess && how.shared > kUnaskedShared)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(how.shared));
  if (error == cudaSuccess)
    error = cudaLaunchKernel(kernel, dim3(described.blocks), dim3(how.threads), pointers, how.shared, how.stream);
  if (error == cudaSuccess) return {};
  cudaGetLastError();  // clears the error, which the next call from other code would report again
  Status failed = described;
  failed.error = static_cast<int>(error);
  failed.message = cudaGetErrorString(error);
  return failed;
}

// Of the current device.
int multiprocessors();
// The most bytes of shared memory per block.
size_t most_shared();

}  // namespace fastops::cuda
