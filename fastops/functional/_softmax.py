"""torch.nn.functional.softmax and log_softmax on fastops' kernels."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling as _is_compiling
from torch.overrides import handle_torch_function

from fastops import _C
from fastops.functional._general import general, overrides, show, small_for_compilers, torch_op
from fastops.ops import autocast_float32
from fastops.ops import softmax as _softmax_ops

__all__ = ["log_softmax", "softmax"]


def softmax(input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None) -> Tensor:
    """exp(x) along dim, divided by its sum.

    Args:
        input: any shape; float32, float64, bfloat16 or float16.
        dim: the dimension whose elements add up to 1. None is deprecated, as in PyTorch.
        _stacklevel: where the warning of that points to.
        dtype: what input is cast to before, or None.

    Returns:
        A contiguous tensor of input's shape and of dtype, or input's.

    Raises:
        IndexError: dim is out of range. RuntimeError: no floating point tensor. TypeError: input is not a Tensor.

    Source: torch.nn.functional.softmax.

    >>> FF.softmax(torch.tensor([0.0, 0.0, float("-inf")]), 0)
    tensor([0.5000, 0.5000, 0.0000])
    """
    return _apply(softmax, _C.softmax, input, dim, _stacklevel, dtype)


def log_softmax(
    input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> Tensor:
    """log(softmax(x)), without forming the latter.

    Args:
        input: any shape; float32, float64, bfloat16 or float16.
        dim: the dimension whose exponentials add up to 1. None is deprecated, as in PyTorch.
        _stacklevel: where the warning of that points to.
        dtype: what input is cast to before, or None.

    Returns:
        A contiguous tensor of input's shape and of dtype, or input's.

    Raises:
        IndexError: dim is out of range. RuntimeError: no floating point tensor. TypeError: input is not a Tensor.

    Source: torch.nn.functional.log_softmax.

    >>> FF.log_softmax(torch.tensor([0.0, 0.0]), 0)
    tensor([-0.6931, -0.6931])
    """
    return _apply(log_softmax, _C.log_softmax, input, dim, _stacklevel, dtype)


def _apply(
    public: Callable[..., Tensor],
    door: Callable[..., Any],
    input: Any,
    dim: int | None,
    stacklevel: int,
    dtype: torch.dtype | None,
) -> Tensor:
    name, log = public.__name__, public is log_softmax
    x = input
    # A cast is an op of its own, with its own gradient.
    if dtype is not None and isinstance(dtype, torch.dtype) and type(input) in (Tensor, nn.Parameter):
        x = input.to(dtype)
    if not _is_compiling():
        result = door(x, dim) if dtype is None or x is not input or input.dtype == dtype else NotImplemented
        if result is not NotImplemented:
            return result
        if overrides(input):
            return handle_torch_function(public, (input,), input, dim=dim, _stacklevel=stacklevel, dtype=dtype)
    if general(x) and not small_for_compilers(x) and type(dim) is int:
        if dtype is None:
            (x,) = autocast_float32(x)
        if _softmax_ops.supports(x, dim) and dtype in (None, x.dtype):
            return _softmax_ops.softmax(x, dim, log)
    return torch_op(name, _explain, getattr(F, name), input, dim, stacklevel + 3, dtype=dtype)


def _explain(input: Any, dim: Any, _stacklevel: int, dtype: Any = None) -> str:
    if not isinstance(input, Tensor):
        return f"input must be a Tensor, got {show(input)}"
    if not isinstance(dim, int):
        return "" if dim is None else f"dim must be an integer, got {show(dim)}"
    dims = max(input.dim(), 1)
    if not -dims <= dim < dims:
        return f"dim must be between {-dims} and {dims - 1} for {input.dim()} dimensions, got {dim}"
    return "" if input.is_floating_point() else f"input must be a floating point tensor, got {show(input)}"
