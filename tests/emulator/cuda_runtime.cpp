#include "cuda_runtime.h"

#include <cstdio>
#include <string>

namespace {

thread_local std::string problem;

}  // namespace

namespace simt {

size_t& asked_shared() {
  static thread_local size_t bytes = size_t{48} << 10;
  return bytes;
}

cudaError_t finish_launch(const char* found) {
  if (found == nullptr) return cudaSuccess;
  problem = found;
  return cudaErrorLaunchFailure;
}

}  // namespace simt

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount            ? simt::settings().multiprocessors
           : attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin ? static_cast<int>(simt::settings().shared)
           : attribute == cudaDevAttrComputeCapabilityMajor       ? 8
                                                                  : 0;
  return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  std::snprintf(properties->name, sizeof properties->name, "emulator");
  properties->major = 8;
  properties->minor = 0;
  properties->multiProcessorCount = simt::settings().multiprocessors;
  return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = 0;
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) {
  *version = 0;
  return cudaSuccess;
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t error) {
  if (error == cudaErrorInvalidConfiguration) return "invalid configuration argument";
  return problem.c_str();
}
