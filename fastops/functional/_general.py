"""Past the fast door: what the functions of fastops.functional share to choose between the general door and PyTorch."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling as _is_compiling
from torch.overrides import has_torch_function
from torch.utils._python_dispatch import TorchDispatchMode

from fastops import _C
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
        if _is_compiling_for_fastops():
            return False
        # An op with a gradient registered in Python does not work under torch.func inside a compiled function.
        return not torch._C._are_functorch_transforms_active()
    if torch._C._len_torch_dispatch_stack() and torch.is_grad_enabled():
        _compute_again_by_this_door()
    if _is_functionalizing():
        return False
    # torch.jit.trace writes a program that must run where fastops is not installed, as exports_aten() above.
    return not torch.jit.is_tracing()


class _GeneralDoor(TorchDispatchMode):
    """A mode that does nothing but close the fast door."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


def _compute_again_by_this_door() -> None:
    """Has a checkpoint around this call, if there is one, take the general door when it computes the call again.

    It counts what is saved, and the doors do not save the same. A dispatch mode that is there at forward, such as that
    of a selective checkpoint around this one, may be gone by then.
    """
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    for cell in getattr(hooks and hooks[0], "__closure__", None) or ():
        frame = cell.cell_contents
        if hasattr(frame, "recompute_fn") and not isinstance(frame.recompute_fn, _ByGeneralDoor):
            frame.recompute_fn = _ByGeneralDoor(frame.recompute_fn)


class _ByGeneralDoor:
    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *args: Any) -> None:
        with _GeneralDoor():
            self.function(*args)


def _is_compiling_for_fastops() -> bool:
    """Whether Dynamo traces this call for backend="fastops", which puts our functions in the place of PyTorch's."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    compiler = InstructionTranslator.current_tx().output.compiler_fn
    return getattr(compiler, "compiler_name", None) == "fastops"


# What torch.compiler.assume_constant_result does, without importing Dynamo, which takes a second.
_is_compiling_for_fastops._dynamo_marked_constant = True


def fused_better_by_compilers() -> bool:
    """Whether an elementwise op or a pool is PyTorch's because torch.compile compiles this call.

    A compiler fuses such ops with what stands around them, which it cannot do with an op that it does not know. Four
    linear layers with GELU in Inductor, two threads, Zen 5: with ops of ours 0.63 (width 64) and 0.76 (256) of plain's
    speed. Adaptive averages: 0.66 to 0.80.
    """
    return _is_compiling() and not torch.compiler._is_exporting_flag


# The elements of its input from which on a norm, a softmax or a loss in a compiled function is ours. Inductor, two
# threads, Zen 5, against its own, forward and with backward: LayerNorm 256x256 0.72 and 0.81, 1024x768 1.34 and 1.04;
# RMSNorm 32x64 0.64 and 0.74, 1024x768 1.28 and 1.12; BatchNorm2d 8x16x28x28 1.02 and 0.88, 8x64x56x56 2.4 and 1.5;
# Softmax 1024x1024 1.8 and 1.6.
_COMPILED_FROM = 1 << 19


def small_for_compilers(input: Tensor) -> bool:
    """Whether a norm, softmax or loss is PyTorch's because torch.compile compiles this call, and its input is small."""
    if not fused_better_by_compilers():
        return False
    from torch.fx.experimental.symbolic_shapes import guard_or_true

    return not input.is_cpu or guard_or_true(input.numel() < _COMPILED_FROM)


def _is_amd() -> bool:
    try:
        with open("/proc/cpuinfo") as file:
            return "AuthenticAMD" in file.read(256)
    except OSError:
        return False


# The weight's elements from which on a linear layer in a compiled function is ours. MKL, which multiplies float32 for
# PyTorch, reaches half of what AMD's processors can do, and what the multiply-adds of Intel's can: there it is none.
# And calling an op costs a compiled function some microseconds more than calling PyTorch's addmm. Inductor, two
# threads, Zen 5, against PyTorch's: 64x64 with a batch of 32 0.93; 256x256 with 64 1.26; 784x128 and 128x10 with 64
# 1.30.
COMPILED_LINEAR_FROM = 1 << 15 if _is_amd() else 1 << 62
# With AMX (linear.inl) float32 layers are ours from this many multiply-adds on, where none of their sides is shorter.
# Inductor, two threads, Emerald Rapids, against PyTorch's, forward and with backward: four layers of 512 x 256 -> 256
# with GELU 0.65 to 0.78 and 0.92; 512 x 256 -> 1024 -> 256 0.83 to 1.11 and 1.13; 1024 x 768 -> 3072 -> 768 1.29 to
# 1.47 and 1.26 to 1.38.
MATRIX_UNIT = _C.isa_used() == "amx"
_UNIT_WORK, _UNIT_SIDE = 1 << 28, 128
# With fewer elements the layer is PyTorch's whatever its input.
COMPILED_WEIGHT_FROM = min(COMPILED_LINEAR_FROM, _UNIT_SIDE**2 if MATRIX_UNIT else 1 << 62)


def multiplied_better_by_torch(input: Tensor, weight: Tensor) -> bool:
    """Whether a linear layer is PyTorch's because torch.compile compiles this call, and ours would not be faster."""
    if not _is_compiling() or torch.compiler._is_exporting_flag or input.device.type != "cpu":
        return False
    if weight.numel() >= COMPILED_LINEAR_FROM:
        return False
    if not MATRIX_UNIT or weight.dtype is not torch.float32 or weight.dim() != 2 or min(weight.shape) < _UNIT_SIDE:
        return True
    from torch.fx.experimental.symbolic_shapes import guard_or_true

    return guard_or_true(input.numel() * weight.shape[0] < _UNIT_WORK)


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
