"""torch.nn.functional.batch_norm on fastops' kernels, with residual= and activation= fused into it."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_dynamo_compiling as _is_compiling
from torch.overrides import handle_torch_function

from fastops import _C
from fastops._activations import KIND, valid
from fastops.functional._activation import Activation, resolve_activation, torch_activate
from fastops.functional._general import general, overrides, show, small_for_compilers, torch_op
from fastops.ops import batch_norm as _batch_norm_ops

__all__ = ["batch_norm"]

_fast_batch_norm = _C.batch_norm


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    activation: Activation = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Normalisation of every channel, residual addition and activation in one kernel, forward and backward:
    y = f((x - mean) / sqrt(var + eps) * weight + bias + residual).

    Args:
        input: (N, C, *), any strides; float32, float64, bfloat16 or float16.
        running_mean, running_var: (C), or None for both. In training they are updated; otherwise they are mean and var.
        weight, bias: (C), or None. All parameters have input's dtype; those of a 16-bit input may be float32.
        training: whether mean and var are the batch's, that is over N and *.
        momentum: how much of the running statistics one batch replaces.
        eps: is added to var.
        activation: f, as in functional.linear. Default: None.
        residual: a tensor of input's shape and dtype that is added before the activation, or None.

    Returns:
        (N, C, *) in input's dtype; channels_last in, channels_last out. The result of a fused activation with a
        residual must not be changed in place before its backward.

    Raises:
        RuntimeError: shapes, dtypes or devices do not fit. TypeError: an argument is not a Tensor.
        ValueError: training with one value of each channel, eps out of range, or no such activation.

    Source: torch.nn.functional.batch_norm.

    >>> x = torch.tensor([[1.0, 2.0], [3.0, 6.0]])
    >>> FF.batch_norm(x, None, None, training=True, eps=1e-12)
    tensor([[-1., -1.],
            [ 1.,  1.]])
    >>> FF.batch_norm(x, torch.tensor([2.0, 2.0]), torch.tensor([1.0, 4.0]), eps=0.0, activation="relu")
    tensor([[0., 0.],
            [1., 2.]])
    """
    if not _is_compiling():
        kind, a, b = ("identity", 0.0, 0.0) if activation is None else resolve_activation(activation)
        if activation is None or type(activation) is str or valid(kind, a, b):
            result = _fast_batch_norm(
                input, running_mean, running_var, weight, bias, training, momentum, eps, residual, KIND[kind], a, b
            )
            if result is not NotImplemented:
                return result
    return _general_batch_norm(
        input, running_mean, running_var, weight, bias, training, momentum, eps, activation, residual
    )


def _general_batch_norm(
    input: Any,
    running_mean: Any,
    running_var: Any,
    weight: Any,
    bias: Any,
    training: bool,
    momentum: float,
    eps: float,
    activation: Activation,
    residual: Any,
) -> Tensor:
    kind, a, b = resolve_activation(activation)
    tensors = [t for t in (input, running_mean, running_var, weight, bias, residual) if t is not None]
    statistics = running_mean, running_var, weight, bias
    if not _is_compiling() and overrides(*tensors):
        return handle_torch_function(
            batch_norm, tensors, input, *statistics, training, momentum, eps, activation=activation, residual=residual
        )
    plain = type(training) is bool and isinstance(momentum, (int, float)) and isinstance(eps, (int, float))
    if (
        general(*tensors)
        and not small_for_compilers(input)
        and plain
        and valid(kind, a, b)
        and _batch_norm_ops.supports(input, *statistics, training, eps, residual)
    ):
        return _batch_norm_ops.batch_norm(
            input, *statistics, training, float(momentum), float(eps), residual, kind, float(a), float(b)
        )
    output = torch_op("batch_norm", _explain_batch_norm, F.batch_norm, input, *statistics, training, momentum, eps)
    if residual is not None:
        output = output + residual
    return torch_activate(output, kind, a, b)


def _explain_batch_norm(
    input: Any, running_mean: Any, running_var: Any, weight: Any, bias: Any, training: Any, momentum: Any, eps: Any
) -> str:
    if not isinstance(input, Tensor):
        return f"input must be a Tensor, got {show(input)}"
    parameters = {"running_mean": running_mean, "running_var": running_var, "weight": weight, "bias": bias}
    for name, tensor in parameters.items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            return f"{name} must be a Tensor or None, got {show(tensor)}"
        if tensor.device != input.device:
            return f"{name} must be on input's device {input.device}, got {show(tensor)}"
    for name, number in (("momentum", momentum), ("eps", eps)):
        if not isinstance(number, (int, float)):
            return f"{name} must be a number, got {show(number)}"
    if eps < 0 or (training and eps == 0):
        return f"eps must be positive in training, and not negative otherwise, got {eps}"
    problem = _C.batch_norm_problem(input, running_mean, running_var, weight, bias, None, bool(training))
    if problem:
        return problem
    for name, tensor in parameters.items():
        if tensor is not None and tensor.dtype != input.dtype:
            return f"{name} must have input's dtype {input.dtype}, got {show(tensor)}"
    return ""
