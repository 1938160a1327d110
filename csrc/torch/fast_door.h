// Which calls may go straight from Python to a C++ autograd::Function, and which must take the general door.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/core/Tensor.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/python_variable.h>

namespace fastops::fast_door {

// No mode, transform or tracer is active that would have to see the op: torch_function and torch_dispatch modes,
// torch.func transforms, make_fx, jit.trace. (Autocast is handled behind the door; inference mode needs nothing.)
inline bool ambient_is_plain() {
  static constexpr c10::DispatchKeySet harmless =
      c10::default_included_set | c10::autocast_dispatch_keyset | c10::autograd_dispatch_keyset_with_ADInplaceOrView;
  const auto local = c10::impl::tls_local_dispatch_key_set();
  return (local.included_.raw_repr() & ~harmless.raw_repr()) == 0 && !at::impl::torch_function_mode_enabled();
}

// Dense, on the CPU, with no property that asks for a dispatch: no subclass, fake or batched tensor, conjugate or
// negative view, forward-mode dual.
inline bool is_plain(const at::Tensor& tensor) {
  static const uint64_t allowed = at::detail::empty_cpu({0}, at::kFloat).key_set().raw_repr();
  return (tensor.key_set().raw_repr() & ~allowed) == 0 && !tensor._fw_grad(/*level=*/0).defined();
}

// The same of a Python object that is exactly a Tensor or Parameter.
inline bool is_plain(PyObject* object) {
  return THPVariable_CheckExact(object) && is_plain(THPVariable_Unpack(object));
}

}  // namespace fastops::fast_door
