// Every CPU entry point of the library, as one KernelTable per instruction set. Nothing else in csrc/kernels/cpu is
// called from outside. The tables of avx512_bf16 and amx accept bfloat16 only.
#pragma once

#include "../../activation/activation.h"
#include "../../conv/conv.h"
#include "../../conv_pool/conv_pool.h"
#include "../../linear/linear.h"
#include "../../pool/pool.h"
#include "../kernel_name.h"

namespace fastops {

struct KernelTable {
  const char* isa;  // "scalar", "avx2", "avx512", "avx512_bf16", "amx"

  // `workspace` points to *_workspace(args, threads) bytes of scratch memory, 64-byte aligned. Its contents before and
  // after the call are undefined. For zero bytes it may be null. *_name is the kernel that computes this call, for
  // record(); if a backward call needs several, the one that computes grad_x, or without grad_x the one for grad_w.
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

  // Peak rates for benchmarks, in GFLOP/s: independent float32 fused multiply-adds, and the 16-bit multiply of this
  // tier. Measured on the calling thread for about `milliseconds`.
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
