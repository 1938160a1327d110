"""torch.nn.functional.linear on fastops' kernels, with activation= fused into it."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_dynamo_compiling as _is_compiling
from torch.overrides import handle_torch_function

from fastops import _C
from fastops._activations import KIND, valid
from fastops.functional._activation import Activation, resolve_activation, torch_activate
from fastops.functional._general import (
    explain_kinds,
    explain_types,
    general,
    multiplied_better_by_torch,
    overrides,
    torch_op,
)
from fastops.ops import linear as _linear_ops

__all__ = ["linear"]

_fast_linear = _C.linear


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None, activation: Activation = None) -> Tensor:
    """Linear map and activation in one kernel, y = f(x W^T + b), forward and backward.

    Args:
        input: (*, in_features), any leading dimensions and strides; float32, float64, bfloat16 or float16.
        weight: (out_features, in_features), or (in_features), in input's dtype.
        bias: (out_features), or None.
        activation: f. None, a name ("relu", "gelu", "gelu_tanh", "leaky_relu", ... with the default parameters of
            torch.nn.functional) or an activation module such as nn.LeakyReLU(0.2).

    Returns:
        (*, out_features) in input's dtype. As with torch.relu, the result of a fused activation must not be changed in
        place before its backward.

    Raises:
        RuntimeError: shapes, dtypes or devices do not fit. TypeError: an argument is not a Tensor.
        ValueError: an activation that does not exist or cannot be fused.

    Source: torch.nn.functional.linear.

    >>> x, weight = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0], [-5.0, 0.0]])
    >>> FF.linear(x, weight)
    tensor([[11., -5.]])
    >>> FF.linear(x, weight, torch.tensor([1.0, 1.0]), activation="relu")
    tensor([[12.,  0.]])
    """
    if not _is_compiling():
        if activation is None:
            result = _fast_linear(input, weight, bias, 0, 0.0, 0.0)
        else:
            kind, a, b = resolve_activation(activation)
            # A name has good parameters; those of a module are its owner's.
            good = type(activation) is str or valid(kind, a, b)
            result = _fast_linear(input, weight, bias, KIND[kind], a, b) if good else NotImplemented
        if result is not NotImplemented:
            return result
    return _general_linear(input, weight, bias, activation)


def _general_linear(input: Any, weight: Any, bias: Any, activation: Activation) -> Tensor:
    kind, a, b = resolve_activation(activation)
    tensors = (input, weight) if bias is None else (input, weight, bias)
    if not _is_compiling() and overrides(*tensors):
        return handle_torch_function(linear, tensors, input, weight, bias, activation=activation)
    if general(*tensors) and not multiplied_better_by_torch(input, weight):
        cast = _linear_ops.cast(input, weight, bias)
        if (_linear_ops.supports(*cast) or _linear_ops.supports_sharded(*cast)) and valid(kind, a, b):
            return _linear_ops.linear(*cast, kind, float(a), float(b))
    return torch_activate(torch_op("linear", _explain_linear, F.linear, input, weight, bias), kind, a, b)


def _explain_linear(input: Any, weight: Any, bias: Any = None) -> str:
    problem = explain_types(input, weight, bias) or explain_kinds(input, weight, bias)
    if problem:
        return problem
    return _C.linear_problem(input, weight, bias)
