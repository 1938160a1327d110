// One KernelTable per instruction set: every CPU entry point of the library, and nothing else is called from outside.
// Those of avx512_bf16 and amx take bfloat16 only.
#pragma once

#include "../activation.h"
#include "../conv.h"
#include "../conv_pool.h"
#include "../kernel_name.h"
#include "../linear.h"
#include "../pool.h"

namespace fastops {

struct KernelTable {
  const char* isa;  // "scalar", "avx2", "avx512", "avx512_bf16", "amx"

  // The workspace is `workspace(args, threads)` bytes of 64-byte aligned scratch whose contents mean nothing before or
  // after the call; zero bytes means null is fine. *_name is the kernel that this call will take, for record(). Where a
  // backward call takes several, it is the one that computes grad_x, or else the one for grad_w.
  size_t (*linear_forward_workspace)(const LinearForward&, int threads);
  void (*linear_forward)(const LinearForward&, void* workspace, const Team&);
  KernelName (*linear_forward_name)(const LinearForward&);
  size_t (*linear_backward_workspace)(const LinearBackward&, int threads);
  void (*linear_backward)(const LinearBackward&, void* workspace, const Team&);
  KernelName (*linear_backward_name)(const LinearBackward&);

  size_t (*conv_forward_workspace)(const ConvForward&, int threads);
  void (*conv_forward)(const ConvForward&, void* workspace, const Team&);
  KernelName (*conv_forward_name)(const ConvForward&);
  size_t (*conv_backward_input_workspace)(const ConvBackwardInput&, int threads);
  void (*conv_backward_input)(const ConvBackwardInput&, void* workspace, const Team&);
  KernelName (*conv_backward_input_name)(const ConvBackwardInput&);
  size_t (*conv_backward_weight_workspace)(const ConvBackwardWeight&, int threads);
  void (*conv_backward_weight)(const ConvBackwardWeight&, void* workspace, const Team&);
  KernelName (*conv_backward_weight_name)(const ConvBackwardWeight&);
  size_t (*conv_pool_forward_workspace)(const ConvPoolForward&, int threads);
  void (*conv_pool_forward)(const ConvPoolForward&, void* workspace, const Team&);
  KernelName (*conv_pool_forward_name)(const ConvPoolForward&);
  size_t (*conv_pool_backward_workspace)(const ConvPoolBackward&, int threads);
  void (*conv_pool_backward)(const ConvPoolBackward&, void* workspace, const Team&);
  KernelName (*conv_pool_backward_name)(const ConvPoolBackward&);

  void (*activation_forward)(const ActivationForward&, const Team&);
  void (*activation_backward)(const ActivationBackward&, const Team&);
  void (*prelu_forward)(const PreluForward&, const Team&);
  size_t (*prelu_backward_workspace)(const PreluBackward&);
  void (*prelu_backward)(const PreluBackward&, void* workspace, const Team&);
  void (*glu_forward)(const GluForward&, const Team&);
  void (*glu_backward)(const GluBackward&, const Team&);

  void (*max_pool_forward)(const MaxPoolForward&, const Team&);
  KernelName (*max_pool_forward_name)(const MaxPoolForward&);
  void (*max_pool_backward)(const MaxPoolBackward&, const Team&);
  KernelName (*max_pool_backward_name)(const MaxPoolBackward&);
  void (*avg_pool_forward)(const AvgPoolForward&, const Team&);
  KernelName (*avg_pool_forward_name)(const AvgPoolForward&);
  void (*avg_pool_backward)(const AvgPoolBackward&, const Team&);
  KernelName (*avg_pool_backward_name)(const AvgPoolBackward&);

  // Peaks for benchmarks: GFLOP/s of independent float32 fused multiply-adds and of the 16-bit multiply this tier
  // uses, on the calling thread, over about `milliseconds`.
  double (*peak_f32)(double milliseconds);
  double (*peak_bf16)(double milliseconds);
};

extern const KernelTable kernels_scalar;
#if defined(__x86_64__)
extern const KernelTable kernels_avx2;
extern const KernelTable kernels_avx512;
extern const KernelTable kernels_avx512_bf16;
extern const KernelTable kernels_amx;
#endif

}  // namespace fastops
