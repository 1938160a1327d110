// Every CUDA entry point of the library, and nothing else is called from outside. No CUDA header is needed to read
// this.
#pragma once

#include "../activation.h"
#include "../conv.h"
#include "../kernel_name.h"
#include "../linear.h"
#include "../mlp.h"
#include "../pool.h"

struct CUstream_st;

namespace fastops::cuda {

using Stream = CUstream_st*;  // cudaStream_t

inline constexpr const char* kTier = "cuda";  // of a kernel's name, whatever the GPU's architecture

// What became of a call. A launcher neither throws nor waits for the device; of several launches it reports the first
// that failed and makes no other.
struct Status {
  int error = 0;  // cudaError_t
  const char* message = nullptr;
  KernelName kernel;
  unsigned blocks = 0, threads = 0;
  size_t shared = 0;  // bytes of shared memory for a block

  bool ok() const { return error == 0; }
};

// The driver and the devices, for info(). `problem` is null where there is at least one device.
struct Runtime {
  int runtime_version, driver_version;  // 13000 for 13.0; driver 0 where there is none
  int devices;
  const char* problem;
};

// All work is queued on the stream, which belongs to the current device; so do all pointers. The contracts are those of
// activation.h, conv.h, linear.h, mlp.h and pool.h. The workspace is `workspace(args)` bytes of 256-byte aligned device
// memory whose contents mean nothing before or after the call; zero bytes means null is fine. The same call on the same
// device gives the same bits every time.
struct KernelTable {
  Runtime (*runtime)();
  // Makes the device current for this thread in this copy of the CUDA runtime, which is not torch's.
  void (*use_device)(int device);
  // What keeps these kernels from running on this device, in words; null where they run.
  const char* (*device_problem)(int device);
  // "NVIDIA H200, sm_90, 132 multiprocessors" into text.
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

  // *_name is the kernel that this call will take, for record(). A backward call that takes several is named by the one
  // for grad_w, or else for grad_x.
  KernelName (*linear_forward_name)(const LinearForward&);
  size_t (*linear_forward_workspace)(const LinearForward&);
  Status (*linear_forward)(const LinearForward&, void* workspace, Stream);
  KernelName (*linear_backward_name)(const LinearBackward&);
  size_t (*linear_backward_workspace)(const LinearBackward&);
  Status (*linear_backward)(const LinearBackward&, void* workspace, Stream);

  // Whether the fused kernels take this shape on the current device; nothing else of mlp may be asked where they do
  // not.
  bool (*mlp_applies)(const MlpShape&);
  KernelName (*mlp_name)(const MlpShape&);
  Status (*mlp_forward)(const MlpForward&, Stream);
  size_t (*mlp_backward_workspace)(const MlpBackward&);
  Status (*mlp_backward)(const MlpBackward&, void* workspace, Stream);
  // The activation to differentiate is none or one that follows from its output (saved_by_linear); for others the
  // gradient of the pre-activation is formed first, by activation_backward. No size of an axis (of input, output,
  // kernel, in elements, with stride, padding and dilation) reaches 2^29, nor does a filter's number of elements:
  // fits_int.
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
