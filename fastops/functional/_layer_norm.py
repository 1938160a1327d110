"""torch.nn.functional.layer_norm and rms_norm on fastops' kernels."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_dynamo_compiling as _is_compiling
from torch.overrides import handle_torch_function

from fastops import _C
from fastops.functional._general import general, overrides, show, small_for_compilers, torch_op
from fastops.ops import autocast_float32
from fastops.ops import layer_norm as _layer_norm_ops

__all__ = ["layer_norm", "rms_norm"]

_fast_layer_norm, _fast_rms_norm = _C.layer_norm, _C.rms_norm


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Layer normalisation over the last dimensions, y = (x - mean) / sqrt(var + eps) weight + bias.

    Mean and variance are those of the normalized_shape elements. A channels_last image, and a channels-first one, whose
    channels have been permuted to the end are read as they lie.

    Args:
        input: (*, *normalized_shape), float32, float64, bfloat16 or float16.
        normalized_shape: the sizes of the last dimensions.
        weight, bias: of shape normalized_shape, or None for 1 and 0; in input's dtype, or float32 for a 16-bit one.
        eps: a number.

    Returns:
        A contiguous tensor of input's shape and dtype.

    Raises:
        RuntimeError: shapes, dtypes or devices do not fit. TypeError: an argument is not a Tensor.

    Source: Ba, Kiros and Hinton, "Layer Normalization" (2016); torch.nn.functional.layer_norm.

    >>> FF.layer_norm(torch.tensor([[1.0, 3.0], [0.0, 10.0]]), (2,), eps=0.0)
    tensor([[-1.,  1.],
            [-1.,  1.]])
    """
    if not _is_compiling():
        result = _fast_layer_norm(input, normalized_shape, weight, bias, eps)
        if result is not NotImplemented:
            return result
        tensors = tuple(t for t in (input, weight, bias) if t is not None)
        if overrides(*tensors):
            return handle_torch_function(
                layer_norm, tensors, input, normalized_shape, weight=weight, bias=bias, eps=eps
            )
    if general(input, weight, bias) and not small_for_compilers(input):
        input, weight, bias = autocast_float32(input, weight, bias)
        shape = _sizes(normalized_shape)
        if shape is not None and _layer_norm_ops.supports(input, shape, weight, bias, rms=False):
            return _layer_norm_ops.layer_norm(input, weight, bias, len(shape), eps)
    return torch_op("layer_norm", _explain, F.layer_norm, input, normalized_shape, weight, bias, eps)


def rms_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """Root mean square normalisation over the last dimensions, y = x / sqrt(mean(x^2) + eps) weight.

    Args:
        input: (*, *normalized_shape), float32, float64, bfloat16 or float16.
        normalized_shape: the sizes of the last dimensions.
        weight: of shape normalized_shape and input's dtype, or None for 1.
        eps: a number; None: the machine epsilon of input's dtype, of float32 for a 16-bit one.

    Returns:
        A tensor of input's shape and dtype: channels_last where input is an image that is, else contiguous.

    Raises:
        RuntimeError: shapes, dtypes or devices do not fit. TypeError: an argument is not a Tensor.

    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019); torch.nn.functional.rms_norm.

    >>> FF.rms_norm(torch.tensor([[1.0, 1.0], [0.0, 2.0]]), (2,), eps=0.0)
    tensor([[1.0000, 1.0000],
            [0.0000, 1.4142]])
    """
    if not _is_compiling():
        result = _fast_rms_norm(input, normalized_shape, weight, _eps(input, eps))
        if result is not NotImplemented:
            return result
        tensors = (input,) if weight is None else (input, weight)
        if overrides(*tensors):
            return handle_torch_function(rms_norm, tensors, input, normalized_shape, weight=weight, eps=eps)
    if general(input, weight) and not small_for_compilers(input):
        input, weight = autocast_float32(input, weight)
        shape = _sizes(normalized_shape)
        if shape is not None and _layer_norm_ops.supports(input, shape, weight, rms=True):
            return _layer_norm_ops.rms_norm(input, weight, len(shape), _eps(input, eps))
    return torch_op("rms_norm", _explain, F.rms_norm, input, normalized_shape, weight, eps=eps)


_FLOAT32_EPS, _FLOAT64_EPS = torch.finfo(torch.float32).eps, torch.finfo(torch.float64).eps


def _eps(input: Any, eps: float | None) -> float:
    if eps is not None:
        return eps
    return _FLOAT64_EPS if getattr(input, "dtype", None) == torch.float64 else _FLOAT32_EPS


def _sizes(shape: Any) -> tuple[int, ...] | None:
    """normalized_shape as a tuple; None where it is something else than sizes, which PyTorch judges."""
    if not isinstance(shape, (tuple, list)) or not all(isinstance(n, (int, torch.SymInt)) for n in shape):
        return None
    return tuple(shape)


def _explain(input: Any, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: Any = None) -> str:
    if not isinstance(input, Tensor):
        return f"input must be a Tensor, got {show(input)}"
    shape = _sizes(normalized_shape)
    if not shape:
        return f"normalized_shape must be one or more sizes, got {normalized_shape!r}"
    if tuple(input.shape[-len(shape) :]) != shape:
        return f"input must have the last dimensions {shape}, got shape {tuple(input.shape)}"
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is None:
            continue
        if not isinstance(parameter, Tensor):
            return f"{name} must be a Tensor, got {show(parameter)}"
        if tuple(parameter.shape) != shape:
            return f"{name} must have shape {shape}, got {tuple(parameter.shape)}"
        if parameter.dtype != input.dtype or parameter.device != input.device:
            return f"{name} must have input's dtype and device, {input.dtype} on {input.device}, got {show(parameter)}"
    return ""
