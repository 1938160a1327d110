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

// Precision::medium where PyTorch's settings allow matrix products of this operand to round to TF32: on a GPU, float32.
Precision precision(const at::Tensor& operand);
// The same for convolutions, which have their own settings (torch.backends.cudnn.conv.fp32_precision, allow_tf32).
Precision conv_precision(const at::Tensor& operand);

cuda::Stream current_stream(at::Device device);

// Device memory for one call, from torch's allocator, used on the current stream only.
class Workspace {
 public:
  Workspace(size_t bytes, at::Device device);
  void* get() const { return memory_.defined() ? memory_.mutable_data_ptr() : nullptr; }

 private:
  at::Tensor memory_;
};

[[noreturn]] void throw_failed(const Status& status, const record::Row& row);

// The planners of the GPU's kernels.
const Planners& planners();

// Makes the device current, for torch and for the extension's own copy of the CUDA runtime.
class Current {
 public:
  explicit Current(at::Device device) : guard_(device) { table()->use_device(device.index()); }

 private:
  c10::DeviceGuard guard_;
};

}  // namespace fastops::gpu
