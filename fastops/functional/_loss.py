"""torch.nn.functional's cross_entropy and mse_loss on fastops' kernels."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_dynamo_compiling as _is_compiling
from torch.nn import _reduction
from torch.overrides import handle_torch_function

from fastops import _C
from fastops.functional._general import general, overrides, show, small_for_compilers, torch_op
from fastops.ops import loss as _loss_ops

__all__ = ["cross_entropy", "mse_loss"]

_fast_cross_entropy = _C.cross_entropy
_fast_mse_loss = _C.mse_loss
_REDUCTIONS = ("none", "mean", "sum")


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """-log softmax(input)[target], in one pass forward and one backward, which computes the probabilities again.

    Args:
        input: logits, (C), (N, C) or (N, C, d1, ...), any strides; float32, float64, bfloat16 or float16. Like other
            saved tensors it may not be changed in place before backward.
        target: class indices, () or (N) or (N, d1, ...), int64. Class probabilities, of input's shape, go to PyTorch.
        weight: (C), a factor of each class, or None.
        size_average, reduce: deprecated, see reduction.
        ignore_index: a target that does not count.
        reduction: "none", "mean" (over what counts, by weight) or "sum".
        label_smoothing: 0.0 to 1.0, the part of the target that is spread over all classes.

    Returns: a scalar, or without reduction a tensor of target's shape, in input's dtype.

    Raises:
        IndexError: a target is no class and not ignore_index.
        RuntimeError, ValueError: shapes, dtypes or options that torch.nn.functional.cross_entropy refuses.

    Source: torch.nn.functional.cross_entropy. Backward keeps two numbers for each target, and not the
    log-probabilities.

    >>> FF.cross_entropy(torch.zeros(3, 4), torch.tensor([0, 1, 2]))
    tensor(1.3863)
    """
    if size_average is not None or reduce is not None:
        reduction = _reduction.legacy_get_string(size_average, reduce)
    if not _is_compiling():
        # An int is a legal label_smoothing, but for _C.
        smoothing = label_smoothing if type(label_smoothing) is float else -1.0
        result = _fast_cross_entropy(input, target, weight, ignore_index, reduction, smoothing)
        if result is not NotImplemented:
            return result
    return _general_cross_entropy(input, target, weight, ignore_index, reduction, label_smoothing)


def mse_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    """(input - target)^2, their mean or sum, in one pass forward and one backward.

    Args:
        input, target: any shape and strides; float32, float64, bfloat16 or float16. Shapes that differ are broadcast,
            with a warning, by PyTorch.
        size_average, reduce: deprecated, see reduction.
        reduction: "none", "mean" or "sum".
        weight: a factor of each element; goes to PyTorch.

    Returns: a scalar, or without reduction a tensor of input's shape.

    Raises:
        RuntimeError, ValueError: shapes, dtypes or options that torch.nn.functional.mse_loss refuses.

    Source: torch.nn.functional.mse_loss.

    >>> FF.mse_loss(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0]))
    tensor(2.)
    """
    if size_average is not None or reduce is not None:
        reduction = _reduction.legacy_get_string(size_average, reduce)
    if weight is None and not _is_compiling():
        result = _fast_mse_loss(input, target, reduction)
        if result is not NotImplemented:
            return result
    return _general_mse(input, target, reduction, weight)


def _cast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors as autocast casts them for its float32 list."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    halves = (torch.bfloat16, torch.float16)
    return tuple(t.float() if t is not None and t.dtype in halves and t.device.type == device else t for t in tensors)


def _general_cross_entropy(
    input: Any, target: Any, weight: Any, ignore_index: int, reduction: str, label_smoothing: float
) -> Tensor:
    options = {"ignore_index": ignore_index, "reduction": reduction, "label_smoothing": label_smoothing}
    if not _is_compiling() and overrides(input, target, weight):
        tensors = (input, target, weight)
        return handle_torch_function(cross_entropy, tensors, input, target, weight=weight, **options)
    if general(input, target, weight) and not small_for_compilers(input) and reduction in _REDUCTIONS:
        x, w = _cast(input, weight)
        if _loss_ops.cross_entropy_supports(x, target, w, label_smoothing):
            return _loss_ops.cross_entropy(x, target, w, reduction, ignore_index, float(label_smoothing))
    return torch_op("cross_entropy", _explain_cross_entropy, F.cross_entropy, input, target, weight, **options)


def _general_mse(input: Any, target: Any, reduction: str, weight: Any) -> Tensor:
    if not _is_compiling() and overrides(input, target, weight):
        tensors = (input, target, weight)
        return handle_torch_function(mse_loss, tensors, input, target, reduction=reduction, weight=weight)
    if weight is None and general(input, target) and not small_for_compilers(input) and reduction in _REDUCTIONS:
        x, t = _cast(input, target)
        if _loss_ops.mse_supports(x, t):
            return _loss_ops.mse_loss(x, t, reduction)
    return torch_op("mse_loss", _explain_mse, F.mse_loss, input, target, reduction=reduction, weight=weight)


def _explain_types(input: Any, target: Any, weight: Any) -> str:
    for name, tensor in (("input", input), ("target", target), ("weight", weight)):
        if not isinstance(tensor, Tensor) and not (name == "weight" and tensor is None):
            return f"{name} must be a Tensor, got {show(tensor)}"
    return ""


def _explain_cross_entropy(input: Any, target: Any, weight: Any, **options: Any) -> str:
    why = _explain_types(input, target, weight)
    if why or input.dim() == 0:
        return why or "input must have at least one dimension, got a scalar"
    if options["reduction"] not in _REDUCTIONS:
        return f"reduction must be 'none', 'mean' or 'sum', got {show(options['reduction'])}"
    shape = tuple(input.shape[:1]) * (input.dim() > 1) + tuple(input.shape[2:])
    if not target.is_floating_point() and (target.dtype != torch.int64 or tuple(target.shape) != shape):
        return f"target must be an int64 tensor of shape {shape}, got {show(target)}"
    classes = input.shape[0 if input.dim() == 1 else 1]
    if weight is not None and (tuple(weight.shape) != (classes,) or weight.dtype != input.dtype):
        return f"weight must have input's dtype {input.dtype} and shape {(classes,)}, got {show(weight)}"
    return ""


def _explain_mse(input: Any, target: Any, reduction: Any, weight: Any) -> str:
    why = _explain_types(input, target, weight)
    if not why and reduction not in _REDUCTIONS:
        why = f"reduction must be 'none', 'mean' or 'sum', got {show(reduction)}"
    return why
