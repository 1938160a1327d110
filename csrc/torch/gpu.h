// Calls of the CUDA kernels with torch's device, stream and memory. No CUDA header of torch is included, so one build
// runs on machines with and without a GPU, and with a torch built with or without CUDA.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/DeviceGuard.h>

#include <string>
#include <vector>

#include "../kernels/common/cuda/kernels.h"
#include "record.h"

namespace fastops::gpu {

// The kernels, or null if none were compiled in.
const cuda::KernelTable* table();

// The device type on which they run: CUDA, or with the emulator PrivateUse1.
c10::DeviceType device_type();

// Whether tensors on this device use the kernels: there are kernels, and they run on the device.
bool takes(at::Device device);

// The devices whose tensors use the kernels, or why there are none; for info().
struct Description {
  bool available;
  std::string text;
};
Description describe();

// Uses the kernels of the test suite's emulator, for devices of type PrivateUse1.
void use_emulator(const cuda::KernelTable* kernels);

// Whether PyTorch's settings allow float32 matrix products to round their operands to TF32.
bool allows_tf32();
// The same for convolutions, which have their own settings (torch.backends.cudnn.conv.fp32_precision, allow_tf32).
bool conv_allows_tf32();

cuda::Stream current_stream(at::Device device);

// Device memory for one call, from torch's allocator, used on the current stream only.
class Workspace {
 public:
  Workspace(size_t bytes, at::Device device);
  void* get() const { return memory_.defined() ? memory_.mutable_data_ptr() : nullptr; }

 private:
  at::Tensor memory_;
};

[[noreturn]] void throw_failed(const cuda::Status& status, const record::Row& row);

// Calls launch(table, stream) with `device` as the current device. If its Status is a failure, throws an error that
// names the op, the kernel and the shapes. The recorded time ends when the work is queued; it does not wait for the
// device.
template <class Describe, class Launch>
void call(at::Device device, Describe&& describe, Launch&& launch) {
  const c10::DeviceGuard guard(device);
  table()->use_device(device.index());
  cuda::Status status;
  record::timed(describe, [&] { status = launch(*table(), current_stream(device)); });
  if (!status.ok()) throw_failed(status, describe());
}

}  // namespace fastops::gpu
