"""The general door of convolution, plain and transposed: y = f(conv(x, w) + b). The fast door is _C.conv2d and so on;
both call csrc/torch/conv.cpp.

`padding` here is what lies before each dimension, then what lies after each, so that it may be uneven; of a transposed
convolution it is what is cut off, the second half less output_padding.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastops.ops import autocast, records, register, to_front
from fastops.ops._layer import alike, layer
from fastops.ops.activation import decomposed_layer

_ops = torch.ops.fastops


class Geometry(NamedTuple):
    """What a convolution is besides its tensors."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]  # before each dimension, then after each
    dilation: tuple[int, ...]
    transposed: bool
    groups: int


def conv(
    input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, activation: str, a: float, b: float
) -> Tensor:
    """y = f(conv(x, w) + b), differentiable to any order, forward and reverse.

    Shapes: input (batch, in_channels, *spatial), weight as in torch.nn, bias (out_channels). One of float32, float64,
    bfloat16, float16 for all. The caller has checked `supports`.
    """
    return _forward(input, weight, bias, *geometry, activation, a, b, records(input, weight, bias))[0]


def supports(input: Tensor, weight: Tensor, bias: Tensor | None, dims: int) -> bool:
    """Whether these tensors are for `conv`: supported, one dtype, one device, as many dimensions as they should have.

    The shapes' rules are C++'s (conv_problem), and those of the Meta kernel when a call is compiled.
    """
    good = alike(input, weight, bias) and input.dim() in (dims + 1, dims + 2) and weight.dim() == dims + 2
    return good and weight.shape[1] != 0  # PyTorch's own also sums over no channels


def cast(input: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Convolutions are on autocast's lower-precision list, as in PyTorch."""
    return autocast(input, weight, bias)


def _into_batch(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    """(size, n, ...) as (size * n, ...)."""
    return to_front(tensor, dim, size).flatten(0, 1)


def _into_channels(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    """(size, n, c, ...) as (n, size * c, ...)."""
    return to_front(tensor, dim, size).transpose(0, 1).flatten(1, 2)


def _out_of_batch(tensor: Tensor, size: int) -> Tensor:
    return tensor.unflatten(0, (size, tensor.shape[0] // size))


def _out_of_channels(tensor: Tensor, size: int) -> Tensor:
    return tensor.unflatten(1, (size, tensor.shape[1] // size)).transpose(0, 1)


def _grouped(rest: Sequence[Any], size: int) -> tuple[Any, ...]:
    """An op's arguments after its tensors, for that many times the groups."""
    stride, padding, dilation, transposed, groups, *more = rest
    return stride, padding, dilation, transposed, groups * size, *more


def _vmap(info, in_dims, input, weight, bias, *rest):
    size = info.batch_size
    if in_dims[1] is None and in_dims[2] is None:  # one weight for all: a larger batch
        output, saved = _forward(_into_batch(input, in_dims[0], size), weight, bias, *rest)
        back = _out_of_batch
    else:  # a weight each: more groups
        input, weight = _into_channels(input, in_dims[0], size), _into_batch(weight, in_dims[1], size)
        bias = None if bias is None else _into_batch(bias, in_dims[2], size)
        output, saved = _forward(input, weight, bias, *_grouped(rest, size))
        back = _out_of_channels
    if saved.numel() == 0:
        return (back(output, size), saved), (0, None)
    return (back(output, size), back(saved, size)), (0, 0)


def _vmap_backward(info, in_dims, grad_output, saved, input, weight, *rest):
    size, mask = info.batch_size, rest[-1]
    if not mask[1] and not mask[2] and in_dims[3] is None:
        # One weight for all and only the input's gradient: a larger batch.
        into, back = _into_batch, _out_of_batch
    else:
        into, back = _into_channels, _out_of_channels
        weight, rest = _into_batch(weight, in_dims[3], size), _grouped(rest, size)
    grad_output, input = into(grad_output, in_dims[0], size), into(input, in_dims[2], size)
    saved = None if saved is None else into(saved, in_dims[1], size)
    grads = list(_backward(grad_output, saved, input, weight, *rest))
    for i, function in enumerate((back, _out_of_batch, _out_of_batch)):
        if mask[i]:
            grads[i] = function(grads[i], size)
    return tuple(grads), tuple(0 if on else None for on in mask)


def _forward_flops(input, weight, bias, stride, padding, dilation, transposed, *_, out_shape, **__):
    return torch.utils.flop_counter.conv_flop_count(input, weight, out_shape[0], transposed)


def _backward_flops(
    grad_output, saved, input, weight, stride, padding, dilation, transposed, groups, activation, a, b, output_mask,
    out_shape,
):  # fmt: skip
    rest = (stride, padding, dilation, transposed, None, groups, output_mask)
    return torch.utils.flop_counter.conv_backward_flop(grad_output, input, weight, None, *rest, out_val=out_shape)


def _decomposed(
    input: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], transposed: bool, groups: int, activation: str, a: float, b: float, need_saved: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    before, after = padding[: len(stride)], padding[len(stride) :]
    output_padding = [0] * len(stride)
    if transposed:
        output_padding = [x - y for x, y in zip(before, after, strict=True)]
    elif before != after:
        around = zip(before[::-1], after[::-1], strict=True)  # F.pad starts with the last dimension
        input = F.pad(input, [x for pair in around for x in pair])
        before = output_padding
    z = torch.ops.aten.convolution(input, weight, bias, stride, before, dilation, transposed, output_padding, groups)
    return decomposed_layer(z, activation, a, b, need_saved)


_forward, _backward, (_Forward, _Backward) = layer("conv", 1, _vmap, _vmap_backward)
register("conv_forward", _Forward, _forward_flops, _decomposed)
register("conv_backward", _Backward, _backward_flops)
