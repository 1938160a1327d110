#include "cuda_runtime.h"

#include <cstdio>
#include <map>
#include <mutex>
#include <string>
#include <vector>

namespace {

thread_local std::string problem;

std::mutex mutex;
// The devices. What is kept of one, such as its number of multiprocessors, is no other's, so that settings which differ
// there are different devices.
std::vector<simt::Settings> devices;
// What each kernel may have on each device.
std::map<std::pair<const void*, int>, size_t> permitted;

int current_device() {
  const simt::Settings& now = simt::settings();
  const std::lock_guard lock(mutex);
  for (size_t i = 0; i < devices.size(); ++i)
    if (devices[i].multiprocessors == now.multiprocessors && devices[i].shared == now.shared)
      return static_cast<int>(i);
  devices.push_back(now);
  return static_cast<int>(devices.size()) - 1;
}

}  // namespace

namespace simt {

std::atomic<int64_t>& queries() {
  static std::atomic<int64_t> count{0};
  return count;
}

cudaError_t permit_shared(const void* kernel, int bytes) {
  ++queries();
  const int device = current_device();
  const std::lock_guard lock(mutex);
  permitted[{kernel, device}] = static_cast<size_t>(bytes);
  return cudaSuccess;
}

bool is_permitted(const void* kernel, size_t bytes) {
  if (bytes <= size_t{48} << 10) return true;
  const int device = current_device();
  const std::lock_guard lock(mutex);
  return bytes <= permitted[{kernel, device}];
}

cudaError_t finish_launch(const char* found) {
  if (found == nullptr) return cudaSuccess;
  problem = found;
  return cudaErrorLaunchFailure;
}

}  // namespace simt

cudaError_t cudaGetDevice(int* device) {
  *device = current_device();
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  ++simt::queries();
  *value = attribute == cudaDevAttrMultiProcessorCount            ? simt::settings().multiprocessors
           : attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin ? static_cast<int>(simt::settings().shared)
           : attribute == cudaDevAttrComputeCapabilityMajor       ? 8
                                                                  : 0;
  return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  ++simt::queries();
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
