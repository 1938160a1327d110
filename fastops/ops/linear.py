"""The general door of linear: y = f(x W^T + b). The fast door is _C.linear; both call csrc/torch/linear.cpp."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_dynamo_compiling as is_compiling

from fastops import _C
from fastops._activations import saved_by_linear
from fastops.ops import autocast, records, register, to_front, viewed
from fastops.ops._layer import alike, layer, slope_times
from fastops.ops._sharded import are_sharded
from fastops.ops.activation import activation as apply_activation
from fastops.ops.activation import decomposed_layer

_ops = torch.ops.fastops


def linear(input: Tensor, weight: Tensor, bias: Tensor | None, activation: str, a: float, b: float) -> Tensor:
    """y = f(x W^T + b), differentiable to any order, forward and reverse.

    Shapes: input (*, k), weight (n, k), bias (n) -> (*, n). One of float32, float64, bfloat16, float16 for all.
    The caller has checked `supports`.
    """
    weight = viewed(weight)
    return _forward(input, weight, bias, activation, a, b, records(input, weight, bias))[0]


def supports(input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether `linear` takes these tensors: supported, one dtype, one device, fitting shapes."""
    return alike(input, weight, bias) and _fit(input, weight, bias)


def supports_sharded(input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether `linear` takes these DTensors: each process then computes its part of them."""
    return not is_compiling() and are_sharded(input, weight, bias) and _fit(input, weight, bias)


def _fit(input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    # PyTorch's own also takes a weight of one row, and spreads a bias of other shapes.
    if weight.dim() != 2 or (bias is not None and bias.shape != weight.shape[:1]):
        return False
    return is_compiling() or not _C.linear_problem(input, weight, bias)


def cast(input: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """linear is on autocast's lower-precision list, as in PyTorch."""
    return autocast(input, weight, bias)


def _vmap(info, in_dims, input, weight, bias, activation, a, b, need_saved):
    size = info.batch_size
    if in_dims[1] is None and in_dims[2] is None:  # one weight for all: the batch is one more leading dimension
        output, saved = _forward(to_front(input, in_dims[0], size), weight, bias, activation, a, b, need_saved)
        return (output, saved), (0, 0 if saved.numel() else None)
    input, weight = to_front(input, in_dims[0], size), to_front(weight, in_dims[1], size)
    vector = input.dim() == 2
    if vector:
        input = input.unsqueeze(1)
    pre_activation = torch.matmul(input.flatten(1, -2), weight.mT).unflatten(1, input.shape[1:-1])
    if bias is not None:
        bias = to_front(bias, in_dims[2], size)
        pre_activation = pre_activation + bias.view(size, *[1] * (input.dim() - 2), bias.shape[-1])
    if vector:
        pre_activation = pre_activation.squeeze(1)
    if activation == "identity":
        return (pre_activation, pre_activation.new_empty(0)), (0, None)
    output = apply_activation(pre_activation, activation, a, b)
    if need_saved and saved_by_linear(activation, a, b) == "input":
        return (output, pre_activation), (0, 0)
    return (output, pre_activation.new_empty(0)), (0, None)


def _vmap_backward(info, in_dims, grad_output, saved, input, weight, activation, a, b, output_mask):
    size = info.batch_size
    grad_output = to_front(grad_output, in_dims[0], size)
    saved = None if saved is None else to_front(saved, in_dims[1], size)
    if not output_mask[1] and not output_mask[2] and in_dims[3] is None:
        # One weight for all and only the input's gradient: the batch is one more leading dimension.
        input = to_front(input, in_dims[2], size)
        result = _backward(grad_output, saved, input, weight, activation, a, b, output_mask)
        return result, (0, None, None)
    gz = slope_times(grad_output, saved, activation, a, b)
    input, weight = to_front(input, in_dims[2], size), to_front(weight, in_dims[3], size)
    shape = input.shape
    rows, columns = (x.unsqueeze(1) if x.dim() == 2 else x.flatten(1, -2) for x in (gz, input))
    none = gz.new_empty(0)
    return (
        torch.bmm(rows, weight).view(shape) if output_mask[0] else none,
        torch.bmm(rows.mT, columns) if output_mask[1] else none,
        rows.sum(1) if output_mask[2] else none,
    ), tuple(0 if on else None for on in output_mask)


def _forward_flops(input, weight, *_, **__):
    return 2 * math.prod(input) * weight[0]


def _backward_flops(grad_output, saved, input, weight, activation, a, b, output_mask, **__):
    return (output_mask[0] + output_mask[1]) * _forward_flops(input, weight)


def _decomposed(
    input: Tensor, weight: Tensor, bias: Tensor | None, activation: str, a: float, b: float, need_saved: bool
) -> tuple[Tensor, Tensor]:
    return decomposed_layer(F.linear(input, weight, bias), activation, a, b, need_saved)


_forward, _backward, (_Forward, _Backward) = layer("linear", -1, _vmap, _vmap_backward)
register("linear_forward", _Forward, _forward_flops, _decomposed)
register("linear_backward", _Backward, _backward_flops)
