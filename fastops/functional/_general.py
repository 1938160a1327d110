"""Past the fast door: what the functions of fastops.functional share to choose between the general door and PyTorch."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling as _is_compiling
from torch.overrides import has_torch_function

from fastops.export import exports_aten
from fastops.record import aten as _aten

_REFUSALS = (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError)


def overrides(*tensors: Any) -> bool:
    """Whether a torch-function mode is active, or an argument that is no tensor (an fx Proxy) wants to see this call.

    A tensor subclass is not asked: it knows PyTorch's functions, and gets those.
    """
    return has_torch_function(tensors) and not any(
        isinstance(t, Tensor) and type(t) not in (Tensor, nn.Parameter) for t in tensors
    )


def general(*tensors: Any) -> bool:
    """Whether the general door may be asked about these arguments; each door's own `supports` decides."""
    if not all(isinstance(t, Tensor) for t in tensors if t is not None) or exports_aten():
        return False
    if _is_compiling():
        # An op with a gradient registered in Python does not work under torch.func inside a compiled function.
        return not torch._C._are_functorch_transforms_active()
    if _is_functionalizing():
        return False
    # torch.jit.trace writes a program that must run where fastops is not installed.
    return not torch.jit.is_tracing()


def _is_functionalizing() -> bool:
    """Whether torch.func.functionalize is active, for which PyTorch has no rule for an autograd.Function."""
    if not torch._C._are_functorch_transforms_active():
        return False
    stack = torch._C._functorch.get_interpreter_stack() or ()
    return any(layer.key() == torch._C._functorch.TransformType.Functionalize for layer in stack)


def torch_op(name: str, explain: Callable[..., str], function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """PyTorch's own op. What it refuses is refused with the same exception type, after a line that says why."""
    if _is_compiling():
        return function(*args, **kwargs)
    try:
        return _aten(name, function, *args, **kwargs)
    except _REFUSALS as error:
        why = explain(*args, **kwargs)
        # A subclass of these may need more than a message to be built; it is passed on as it is.
        if not why or type(error) not in _REFUSALS:
            raise
        raise type(error)(f"{name}: {why} (PyTorch: {error})") from error


def explain_types(input: Any, weight: Any, bias: Any) -> str:
    """Which operand of a layer is no tensor; "" where all are. bias may be None."""
    for name, tensor in (("input", input), ("weight", weight), ("bias", bias)):
        if not isinstance(tensor, Tensor) and not (name == "bias" and tensor is None):
            return f"{name} must be a Tensor, got {show(tensor)}"
    return ""


def explain_kinds(input: Tensor, weight: Tensor, bias: Tensor | None) -> str:
    """Which parameter of a layer is on another device, or of another dtype, than the input; "" where none is."""
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.device != input.device:
            return f"{name} must be on input's device {input.device}, got {show(tensor)}"
        if tensor.dtype != input.dtype:
            return f"{name} must have input's dtype {input.dtype}, got {show(tensor)}"
    return ""


def show(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)} on {value.device}"
    return f"{value!r} of type {type(value).__name__}"
