// Every CUDA entry point of the library. Nothing else in csrc/kernels/*/cuda is called from outside. This header
// includes no CUDA header.
#pragma once

#include "../calls.h"

namespace fastops::cuda {

inline constexpr const char* kTier = "cuda";  // the tier in kernel names, for every architecture

// The driver and the devices, for info(). `problem` is null if there is at least one device.
struct Runtime {
  int runtime_version, driver_version;  // 13000 for 13.0; driver_version is 0 without a driver
  int devices;
  const char* problem;
};

// A plan is made for the current device, and runs on that device only. All pointers and the stream of a run belong to
// it, and all work is queued on the stream. The same run on the same device gives bitwise the same result every time.
//
// These calls have no plan: mlp's whose network does not fit on the chip; convolutions whose geometry does not satisfy
// fits_int; gradients of convolutions through an activation whose derivative is not computed from its output
// (saved_by_linear). For the last, the caller first computes the gradient of the pre-activation (ActivationBackward).
struct KernelTable {
  Runtime (*runtime)();
  // Makes the device current for this thread. The extension has its own copy of the CUDA runtime, beside torch's.
  void (*use_device)(int device);
  // Why these kernels do not run on this device, in words; null if they run.
  const char* (*device_problem)(int device);
  // Writes text like "NVIDIA H200, sm_90, 132 multiprocessors".
  void (*describe_device)(int device, char* text, size_t size);
  Planners planners;
};

const KernelTable& kernels();

}  // namespace fastops::cuda
