// The table of all planners, and queries of the CUDA runtime.
#include "kernels.h"

#include <cstdio>

#include "launch.h"
#include "planners.h"

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

template <class Call>
constexpr auto planner_of() -> void (*)(Plan<Call>&) {
  if constexpr (requires(Plan<Call>& plan) { plan_call(plan); }) return plan_call;
  return nullptr;
}
template <class... Calls>
constexpr PlannersOf<Calls...> planners_of(const PlannersOf<Calls...>*) {
  return {{planner_of<Calls>()}...};
}

constexpr KernelTable kTable{runtime, use_device, device_problem, describe_device,
                             planners_of(static_cast<const Planners*>(nullptr))};

}  // namespace

// The torch layer, another library, calls it.
__attribute__((visibility("default"))) const KernelTable& kernels() { return kTable; }

}  // namespace fastops::cuda
