// Which calls may go straight from Python to a C++ autograd::Function, and which must take the general door.
#pragma once

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/core/Tensor.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/python_variable.h>

#include "gpu.h"

namespace fastops::fast_door {

// No mode, transform or tracer is active that would have to see the op: torch_function and torch_dispatch modes,
// torch.func transforms, make_fx, jit.trace. (Autocast is handled behind the door; inference mode needs nothing.)
inline bool ambient_is_plain() {
  static constexpr c10::DispatchKeySet harmless =
      c10::default_included_set | c10::autocast_dispatch_keyset | c10::autograd_dispatch_keyset_with_ADInplaceOrView;
  const auto local = c10::impl::tls_local_dispatch_key_set();
  return (local.included_.raw_repr() & ~harmless.raw_repr()) == 0 && !at::impl::torch_function_mode_enabled();
}

// The keys that a dense tensor on a device of this type may have: those that TensorImpl gives it outside inference
// mode. One made in inference mode lacks those of autograd. Asking a tensor made here for its keys would keep what the
// first caller's mode left out.
inline uint64_t dense_keys(c10::DeviceType type) {
  const auto backend = type == c10::DeviceType::CPU    ? c10::BackendComponent::CPUBit
                       : type == c10::DeviceType::CUDA ? c10::BackendComponent::CUDABit
                                                       : c10::BackendComponent::PrivateUse1Bit;
  const c10::DispatchKeySet dense{c10::DispatchKeySet(c10::DispatchKey::Dense) | c10::DispatchKeySet(backend)};
  return (dense | c10::getAutogradRelatedKeySetFromBackend(backend) | c10::getAutocastRelatedKeySetFromBackend(backend))
      .raw_repr();
}

// Dense, on the CPU or a CUDA device that has kernels, with no property that asks for a dispatch: no subclass, fake or
// batched tensor, conjugate or negative view, forward-mode dual.
inline bool is_plain(const at::Tensor& tensor) {
  static const uint64_t cpu = dense_keys(c10::DeviceType::CPU);
  const uint64_t keys = tensor.key_set().raw_repr();
  if ((keys & ~cpu) != 0 && ((keys & ~dense_keys(gpu::device_type())) != 0 || !gpu::takes(tensor.device())))
    return false;
  return !tensor._fw_grad(/*level=*/0).defined();
}

// The same of a Python object that is exactly a Tensor or Parameter.
inline bool is_plain(PyObject* object) {
  return THPVariable_CheckExact(object) && is_plain(THPVariable_Unpack(object));
}

}  // namespace fastops::fast_door
