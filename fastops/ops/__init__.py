"""The general door: torch.ops.fastops.* for everything that has to see an op.

torch.compile, torch.export inside fastops.export_kernels(), FakeTensor and other dispatch modes, torch.func and
forward-mode differentiation come this way; plain eager tensors take the fast door, fastops._C, which runs the same C++
functions (see fastops/functional/, the only place that chooses). Shapes and strides of what an op returns are known to
its Meta kernel in csrc/torch, which fake tensors run. For every op a file here holds

- its gradient, registered on the op itself, so that a compiled or exported graph can be differentiated,
- its formula in PyTorch's own ops, for exported programs (fastops.decompositions),
- a torch.autograd.Function around the op with the same gradient plus `jvp` and `vmap`, which torch.func needs and
  torch.library cannot express. `through` picks it when a torch.func transform or forward-mode differentiation
  is active.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad

from fastops import _C
from fastops.ops._flops import register_flops

# The forward ops that a selective checkpoint should save, and not compute again, which are those with FLOPs: for the
# policy that is given to torch.utils.checkpoint.create_selective_checkpoint_contexts, beside PyTorch's own (aten.mm,
# aten.convolution, ...).
COMPUTE_INTENSIVE: list[torch._ops.OpOverload] = []

# The forward ops in PyTorch's own, for fastops.decompositions().
DECOMPOSITIONS: dict[torch._ops.OpOverload, Callable[..., Any]] = {}

DTYPES = frozenset([torch.float32, torch.float64, torch.bfloat16, torch.float16])
# Exact types. What a subclass does with an op it has never heard of is anybody's guess: it gets PyTorch's own.
_TYPES = frozenset([torch.Tensor, torch.nn.Parameter, FakeTensor, FunctionalTensor])

# A tensor on its way from other processes, as tensor parallelism has them. Any op that gets one waits for it. By its
# name: importing its class imports all of torch.distributed.
_ARRIVING = "AsyncCollectiveTensor"


def gpu_takes(kind: str, index: int | None) -> bool:
    """Whether this is a CUDA device that fastops' CUDA kernels run on."""
    return _C.gpu_takes(torch.device(kind, index))


# What torch.compiler.assume_constant_result does, without importing Dynamo, which takes a second.
gpu_takes._dynamo_marked_constant = True


def supported(tensor: torch.Tensor, on_gpu: bool = False) -> bool:
    """Whether fastops has kernels (or, on meta, shapes) for this tensor; on_gpu: of an op that has CUDA kernels."""
    return (
        (type(tensor) in _TYPES or type(tensor).__name__ == _ARRIVING)
        and tensor.dtype in DTYPES
        and tensor.layout is torch.strided
        and (tensor.device.type in ("cpu", "meta") or (on_gpu and gpu_takes(tensor.device.type, tensor.device.index)))
        and not tensor.is_nested
    )


def autocast(*tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """The tensors as autocast casts them for its lower-precision list: everything floating point except float64.

    What is on another device than the first is left alone, and so is everything on devices that have no kernels.
    """
    if tensors[0] is None:
        return tensors
    device = tensors[0].device.type
    if device != "cpu" and not gpu_takes(device, tensors[0].device.index):
        return tensors
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        t.to(dtype)
        if t is not None and t.device.type == device and t.is_floating_point() and t.dtype != torch.float64
        else t
        for t in tensors
    )


def autocast_float32(*tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """The tensors as a GPU's autocast casts them for its float32 list. The CPU's list has no op of ours."""
    device = getattr(tensors[0], "device", None)
    if device is None or device.type == "cpu" or not gpu_takes(device.type, device.index):
        return tensors
    if not torch.is_autocast_enabled(device.type):
        return tensors
    return tuple(
        t.float() if t is not None and t.dtype in (torch.bfloat16, torch.float16) and t.device == device else t
        for t in tensors
    )


def needs_function() -> bool:
    """Whether the Function is needed, not only the op: for torch.func and forward-mode differentiation."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def viewed(weight: torch.Tensor) -> torch.Tensor:
    """A parameter that PyTorch reads through a view.

    Outside inference mode, a view of a tensor made in it records nothing.
    """
    if torch.compiler.is_compiling() or not weight.is_inference() or torch.is_inference_mode_enabled():
        return weight
    return weight.detach()


def records(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd will want a backward of a call on these tensors."""
    recording = torch.is_grad_enabled() and (torch.compiler.is_compiling() or not torch.is_inference_mode_enabled())
    return recording and any(t is not None and t.requires_grad for t in tensors)


def forward_mode(jvp: Callable[..., Any]) -> Callable[..., Any]:
    """For a Function's jvp, which gets the primals of what was saved after ctx.

    PyTorch turns forward-mode differentiation off around a jvp, so that a jvp inside a jvp would silently lose the
    outer one's tangents. It is turned on again here; the primals keep the level at hand out of it.
    """

    @functools.wraps(jvp)
    def wrapper(ctx: Any, *tangents: Any) -> Any:
        with forward_ad._set_fwd_grad_enabled(True):
            primals = [None if t is None else forward_ad.unpack_dual(t).primal for t in ctx.saved_tensors]
            return jvp(ctx, primals, *tangents)

    return wrapper


def to_front(tensor: torch.Tensor, dim: int | None, size: int) -> torch.Tensor:
    """For vmap: the tensor with its batch dimension first, expanded when it has none."""
    return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def register(
    op: str,
    function: type[torch.autograd.Function],
    flops: Callable[..., int] | None = None,
    decomposition: Callable[..., Any] | None = None,
) -> None:
    """Registers the Function's gradient on the op itself: the same arguments and results.

    flops: see register_flops. As in PyTorch, products and convolutions count and nothing else does.
    decomposition: a forward op in PyTorch's own ops, with every result, also those that only backward reads.
    """
    name = f"fastops::{op}"
    torch.library.register_autograd(name, function.backward, setup_context=function.setup_context)
    packet = getattr(torch.ops.fastops, op)
    if flops is not None:
        register_flops(packet, flops)
        if op.endswith("_forward"):
            COMPUTE_INTENSIVE.append(packet.default)
    if decomposition is not None:
        DECOMPOSITIONS[packet.default] = decomposition


def through(function: type[torch.autograd.Function], op: Callable[..., Any]) -> Callable[..., Any]:
    """The Function when something needs it, else the op: cheaper, and all that a compiler wants to see."""

    def call(*args: Any) -> Any:
        # Dynamo cannot trace a Function with a jvp, and needs none: the op carries its own gradient.
        if not torch.compiler.is_dynamo_compiling() and needs_function():
            return function.apply(*args)
        return op(*args)

    return call
