// Every CUDA entry point of the library. Nothing else in csrc/kernels/cuda is called from outside. This header includes
// no CUDA header.
#pragma once

#include "../../activation/activation.h"
#include "../../conv/conv.h"
#include "../../linear/linear.h"
#include "../../mlp/mlp.h"
#include "../../pool/pool.h"
#include "../kernel_name.h"

struct CUstream_st;

namespace fastops::cuda {

using Stream = CUstream_st*;  // cudaStream_t

inline constexpr const char* kTier = "cuda";  // the tier in kernel names, for every architecture

// The result of a call. A launcher does not throw and does not wait for the device. If one of several launches fails,
// it makes no further launch and reports that one.
struct Status {
  int error = 0;  // cudaError_t
  const char* message = nullptr;
  KernelName kernel;
  unsigned blocks = 0, threads = 0;
  size_t shared = 0;  // bytes of shared memory per block

  bool ok() const { return error == 0; }
};

// The driver and the devices, for info(). `problem` is null if there is at least one device.
struct Runtime {
  int runtime_version, driver_version;  // 13000 for 13.0; driver_version is 0 without a driver
  int devices;
  const char* problem;
};

// The contracts are those of activation.h, conv.h, linear.h, mlp.h and pool.h. All pointers and the stream belong to
// the current device, and all work is queued on the stream. `workspace` points to *_workspace(args) bytes of device
// memory, 256-byte aligned, whose contents before and after the call are undefined. For zero bytes it may be null. The
// same call on the same device gives bitwise the same result every time.
struct KernelTable {
  Runtime (*runtime)();
  // Makes the device current for this thread. The extension has its own copy of the CUDA runtime, beside torch's.
  void (*use_device)(int device);
  // Why these kernels do not run on this device, in words; null if they run.
  const char* (*device_problem)(int device);
  // Writes text like "NVIDIA H200, sm_90, 132 multiprocessors".
  void (*describe_device)(int device, char* text, size_t size);

  Status (*activation_forward)(const ActivationForward&, Stream);
  Status (*activation_backward)(const ActivationBackward&, Stream);
  Status (*prelu_forward)(const PreluForward&, Stream);
  size_t (*prelu_backward_workspace)(const PreluBackward&);
  Status (*prelu_backward)(const PreluBackward&, void* workspace, Stream);
  Status (*glu_forward)(const GluForward&, Stream);
  Status (*glu_backward)(const GluBackward&, Stream);

  Status (*max_pool_forward)(const MaxPoolForward&, Stream);
  Status (*max_pool_backward)(const MaxPoolBackward&, Stream);
  Status (*avg_pool_forward)(const AvgPoolForward&, Stream);
  Status (*avg_pool_backward)(const AvgPoolBackward&, Stream);

  // *_name is the kernel that computes this call, for record(); if a backward call needs several, the one for grad_w,
  // or without grad_w the one for grad_x.
  KernelName (*linear_forward_name)(const LinearForward&);
  size_t (*linear_forward_workspace)(const LinearForward&);
  Status (*linear_forward)(const LinearForward&, void* workspace, Stream);
  KernelName (*linear_backward_name)(const LinearBackward&);
  size_t (*linear_backward_workspace)(const LinearBackward&);
  Status (*linear_backward)(const LinearBackward&, void* workspace, Stream);

  // Whether the fused kernels accept this shape on the current device. The other mlp functions may be called only if
  // they do.
  bool (*mlp_applies)(const MlpShape&);
  KernelName (*mlp_name)(const MlpShape&);
  Status (*mlp_forward)(const MlpForward&, Stream);
  size_t (*mlp_backward_workspace)(const MlpBackward&);
  Status (*mlp_backward)(const MlpBackward&, void* workspace, Stream);
  // The geometry must satisfy fits_int (conv.h). The activation in a gradient must be identity, or one whose derivative
  // is computed from its output (saved_by_linear). For other activations the caller first computes the gradient of the
  // pre-activation, by activation_backward.
  KernelName (*conv_forward_name)(const ConvForward&);
  size_t (*conv_forward_workspace)(const ConvForward&);
  Status (*conv_forward)(const ConvForward&, void* workspace, Stream);
  KernelName (*conv_backward_input_name)(const ConvBackwardInput&);
  size_t (*conv_backward_input_workspace)(const ConvBackwardInput&);
  Status (*conv_backward_input)(const ConvBackwardInput&, void* workspace, Stream);
  KernelName (*conv_backward_weight_name)(const ConvBackwardWeight&);
  size_t (*conv_backward_weight_workspace)(const ConvBackwardWeight&);
  Status (*conv_backward_weight)(const ConvBackwardWeight&, void* workspace, Stream);
};

const KernelTable& kernels();

}  // namespace fastops::cuda
