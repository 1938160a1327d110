// Calling the CUDA kernels on torch's device, stream and memory, without a CUDA header of torch's: one build serves
// machines with and without a GPU, against a torch with and without CUDA.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/DeviceGuard.h>

#include <string>
#include <vector>

#include "../kernels/cuda/kernels.h"
#include "record.h"

namespace fastops::gpu {

// The kernels, or null where none were compiled in.
const cuda::KernelTable* table();

// The type of the devices they run on: CUDA.
c10::DeviceType device_type();

// Whether tensors on this device take them: there are kernels, and they run on it.
bool takes(at::Device device);

// Why no tensor takes them, or the devices whose tensors do; for info().
struct Description {
  bool available;
  std::string text;
};
Description describe();

// Takes kernels with another origin, for devices of type PrivateUse1: the test suite's emulator.
void use_emulator(const cuda::KernelTable* kernels);

// Whether PyTorch's own switches let a float32 product on this kind of device round its operands to TF32.
bool allows_tf32();
// The same of a convolution, which has a switch of its own (torch.backends.cudnn.conv.fp32_precision, allow_tf32).
bool conv_allows_tf32();

cuda::Stream current_stream(at::Device device);

// Device memory for one call, of which torch's allocator knows that only this stream uses it.
class Workspace {
 public:
  Workspace(size_t bytes, at::Device device);
  void* get() const { return memory_.defined() ? memory_.mutable_data_ptr() : nullptr; }

 private:
  at::Tensor memory_;
};

[[noreturn]] void throw_failed(const cuda::Status& status, const record::Row& row);

// launch(table, stream) with `device` as the current one; returns a Status. An error names the op, the kernel and the
// shapes. Recorded is the time until the work is queued: nobody waits for the device.
template <class Describe, class Launch>
void call(at::Device device, Describe&& describe, Launch&& launch) {
  const c10::DeviceGuard guard(device);
  table()->use_device(device.index());
  cuda::Status status;
  record::timed(describe, [&] { status = launch(*table(), current_stream(device)); });
  if (!status.ok()) throw_failed(status, describe());
}

}  // namespace fastops::gpu
