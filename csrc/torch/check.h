// The checks of tensors that all ops of the torch layer share, and conversions between torch's types and those of the
// kernels.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/InferenceMode.h>

#include "../kernels/activation/activation.h"
#include "../kernels/common/tensor.h"
#include "gpu.h"

namespace fastops {

inline bool is_supported(at::ScalarType type) {
  return type == at::kFloat || type == at::kDouble || type == at::kBFloat16 || type == at::kHalf;
}

inline DType to_dtype(at::ScalarType type) {
  switch (type) {
    case at::kFloat:
      return DType::f32;
    case at::kDouble:
      return DType::f64;
    case at::kBFloat16:
      return DType::bf16;
    case at::kHalf:
      return DType::f16;
    default:
      TORCH_CHECK(false, "fastops: expected a float32, float64, bfloat16 or float16 tensor, got ", type);
  }
}

inline const char* dtype_name(at::ScalarType type) {
  switch (type) {
    case at::kFloat:
      return "float32";
    case at::kDouble:
      return "float64";
    case at::kBFloat16:
      return "bfloat16";
    case at::kHalf:
      return "float16";
    default:
      return c10::toString(type);
  }
}

inline bool is_on(const at::Tensor& tensor, at::Device device) {
  return tensor.device() == device || (tensor.is_cpu() && device.is_cpu());
}

inline void check_tensor(const at::Tensor& tensor, const char* op, const char* argument, at::Device device = at::kCPU) {
  TORCH_CHECK(is_on(tensor, device) && tensor.layout() == at::kStrided, op, ": ", argument,
              " must be a dense tensor on ", device, ", got one on ", tensor.device(), " with layout ",
              tensor.layout());
  TORCH_CHECK(is_supported(tensor.scalar_type()), op, ": ", argument,
              " must be float32, float64, bfloat16 or float16, got ", tensor.scalar_type());
}

inline void check_dtype(const at::Tensor& tensor, at::ScalarType expected, const char* op, const char* argument) {
  TORCH_CHECK(tensor.scalar_type() == expected, op, ": ", argument, " must have the input's dtype ", expected, ", got ",
              tensor.scalar_type());
}

// For ops that also have CUDA kernels. Their other tensors must be on the device of this one (check_tensor). Meta is
// what a Meta kernel sees, whatever the device.
inline void check_input(const at::Tensor& tensor, const char* op, const char* argument) {
  TORCH_CHECK(tensor.device().is_cpu() || gpu::takes(tensor.device()) || tensor.is_meta(), op, ": ", argument,
              " must be on the CPU or a CUDA device that has kernels, got one on ", tensor.device());
  check_tensor(tensor, op, argument, tensor.device());
}

inline const void* data_or_null(const at::Tensor& tensor) {
  return tensor.defined() ? tensor.const_data_ptr() : nullptr;
}
inline void* mutable_or_null(const at::Tensor& tensor) {
  return tensor.defined() ? tensor.mutable_data_ptr() : nullptr;
}

inline bool needs_grad(const at::Tensor& tensor) { return tensor.defined() && tensor.requires_grad(); }
inline bool needs_grad(const std::optional<at::Tensor>& tensor) { return tensor && needs_grad(*tensor); }

// Not made in inference mode. PyTorch passes a missing optional as a tensor of its own, which was not either.
inline bool is_normal(const at::Tensor& tensor) { return !tensor.is_inference(); }
inline bool is_normal(const std::optional<at::Tensor>& tensor) { return !tensor || is_normal(*tensor); }

// Whether autograd records anything now. In inference mode it does not, inside enable_grad neither.
inline bool autograd_records() { return at::GradMode::is_enabled() && !c10::InferenceMode::is_enabled(); }

// Whether autograd records a call with these operands; `wanted`: one of their gradients is. As in PyTorch, where
// tensors made in inference mode have no autograd key, a call with nothing but those is not recorded.
template <class... Operands>
bool is_recorded(bool wanted, const Operands&... operands) {
  return wanted && autograd_records() && (is_normal(operands) || ...);
}
inline bool is_recorded(const at::Tensor& operand) { return is_recorded(operand.requires_grad(), operand); }

// Whether the gradient of an operand is wanted that PyTorch reads through a view: a view of a tensor made in inference
// mode records nothing.
inline bool needs_grad_of_view(const at::Tensor& tensor) { return needs_grad(tensor) && !tensor.is_inference(); }

}  // namespace fastops
