// The table of all entry points, and queries of the CUDA runtime.
#include "kernels.h"

#include <cstdio>

#include "launch.h"
#include "launchers.h"

namespace fastops::cuda {
namespace {

// An empty kernel. A device that can run it can run the other kernels, which were compiled with it.
__global__ void probe_kernel() {}

Runtime runtime() {
  Runtime result{};
  cudaRuntimeGetVersion(&result.runtime_version);
  cudaDriverGetVersion(&result.driver_version);
  const cudaError_t error = cudaGetDeviceCount(&result.devices);
  if (error != cudaSuccess) {
    cudaGetLastError();
    result.devices = 0;
    result.problem = result.driver_version == 0 ? "no CUDA driver" : cudaGetErrorString(error);
  } else if (result.devices == 0) {
    result.problem = "no CUDA device";
  }
  return result;
}

// An error is not reported here: the launch that follows fails.
void use_device(int device) { cudaSetDevice(device); }

const char* device_problem(int device) {
  int current = 0;
  cudaError_t error = cudaGetDevice(&current);
  if (error == cudaSuccess) error = cudaSetDevice(device);
  if (error == cudaSuccess) {
    cudaFuncAttributes attributes;
    error = cudaFuncGetAttributes(&attributes, probe_kernel);
    cudaSetDevice(current);
  }
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();
  return cudaGetErrorString(error);
}

void describe_device(int device, char* text, size_t size) {
  cudaDeviceProp properties;
  if (cudaGetDeviceProperties(&properties, device) != cudaSuccess) {
    cudaGetLastError();
    std::snprintf(text, size, "device %d", device);
    return;
  }
  std::snprintf(text, size, "%s, sm_%d%d, %d multiprocessors", properties.name, properties.major, properties.minor,
                properties.multiProcessorCount);
}

int attribute(cudaDeviceAttr what, int otherwise) {
  int device = 0, value = otherwise;
  const bool known =
      cudaGetDevice(&device) == cudaSuccess && cudaDeviceGetAttribute(&value, what, device) == cudaSuccess;
  return known ? value : otherwise;
}

constexpr KernelTable kTable{
    runtime,
    use_device,
    device_problem,
    describe_device,
    activation_forward,
    activation_backward,
    prelu_forward,
    prelu_backward_workspace,
    prelu_backward,
    glu_forward,
    glu_backward,
    max_pool_forward,
    max_pool_backward,
    avg_pool_forward,
    avg_pool_backward,
    linear_forward_name,
    linear_forward_workspace,
    linear_forward,
    linear_backward_name,
    linear_backward_workspace,
    linear_backward,
    mlp_applies,
    mlp_name,
    mlp_forward,
    mlp_backward_workspace,
    mlp_backward,
    conv_forward_name,
    conv_forward_workspace,
    conv_forward,
    conv_backward_input_name,
    conv_backward_input_workspace,
    conv_backward_input,
    conv_backward_weight_name,
    conv_backward_weight_workspace,
    conv_backward_weight,
};

}  // namespace

int multiprocessors() { return attribute(cudaDevAttrMultiProcessorCount, 1); }

size_t most_shared() {
  return static_cast<size_t>(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, static_cast<int>(kUnaskedShared)));
}

const KernelTable& kernels() { return kTable; }

}  // namespace fastops::cuda
