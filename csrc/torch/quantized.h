// What the ops with quantized weights check, which have CPU kernels alone.
#pragma once

#include <ATen/core/Tensor.h>

namespace fastops {

// Of the input, the bias and the output.
inline bool has_quantized_kernel(at::ScalarType type) {
  return type == at::kFloat || type == at::kBFloat16 || type == at::kHalf;
}

// All tensors are on the CPU, or all are what a Meta kernel sees.
inline void check_dense_on_cpu(const at::Tensor& tensor, const at::Tensor& input, const char* op,
                               const char* argument) {
  const bool fits = input.is_meta() ? tensor.is_meta() : tensor.is_cpu();
  TORCH_CHECK(fits && tensor.layout() == at::kStrided, op, ": ", argument, " must be a dense tensor on ",
              input.is_meta() ? "the input's device, meta" : "the CPU", ", got one on ", tensor.device(),
              " with layout ", tensor.layout());
}

}  // namespace fastops
