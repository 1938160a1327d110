"""The general door of convolutions with int8 weights whose input has one scale. The fast door is _C.ConvInt8; both call
csrc/torch/conv_int8.cpp.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastops.ops import forward_mode, register, through, to_front
from fastops.ops.conv import Geometry as FloatGeometry
from fastops.ops.conv import _backward as conv_backward
from fastops.ops.conv import conv

_ops = torch.ops.fastops


class Geometry(NamedTuple):
    """What a convolution is besides its tensors."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]  # before each dimension, then after each
    dilation: tuple[int, ...]
    groups: int


def conv_int8(
    input: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    input_scale: Tensor,
    input_zero: Tensor,
    geometry: Geometry,
) -> Tensor:
    """conv(input rounded to 8 bits, scale * weight) + bias; the formulas are in conv_int8.h.

    Shapes: input (batch, in_channels, height, width), weight as in torch.nn, int8, scale (out_channels) float32, bias
    (out_channels) in input's dtype, input_scale () float32, input_zero () int32. Gradients pass the rounding of the
    input by where it is within the range of its levels ("straight-through": Bengio, Leonard, Courville, 2013).

    Raises:
        RuntimeError: shapes, dtypes or devices do not fit.
    """
    return _forward(input, weight, scale, bias, input_scale, input_zero, *geometry)


def linear_int8_static(
    input: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, input_scale: Tensor, input_zero: Tensor
) -> Tensor:
    """The same for a linear layer, weight (n, k): input (*, k) -> (*, n)."""
    image = input.reshape(-1, input.shape[-1], 1, 1)
    filters = weight.unsqueeze(2).unsqueeze(3)
    y = conv_int8(image, filters, scale, bias, input_scale, input_zero, POINTWISE)
    return y.reshape(*input.shape[:-1], weight.shape[0])


POINTWISE = Geometry((1, 1), (0, 0, 0, 0), (1, 1), 1)


def rounded(input: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Levels of an input as float32, less their zero point. NaN counts as the lowest level."""
    levels = torch.round((input.float() * (1 / scale) + zero).clamp(0, 255))
    return levels.nan_to_num(0.0) - zero


def by_torch(
    input: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    input_scale: Tensor,
    input_zero: Tensor,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
) -> Tensor:
    """The same in PyTorch's ops, for programs that run without fastops."""
    before, after = padding[: len(stride)], padding[len(stride) :]
    x = rounded(input, input_scale, input_zero)
    if tuple(before) != tuple(after):
        pairs = [size for both in zip(before, after, strict=True) for size in reversed(both)]
        x, before = F.pad(x, pairs[::-1]), [0] * len(stride)
    output = F.conv2d(x, weight.float(), None, stride, before, dilation, groups)
    output = output * (input_scale * scale).view(-1, 1, 1)
    return (output if bias is None else output + bias.float().view(-1, 1, 1)).to(input.dtype)


def _in_range(input: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Where the input is between its lowest and its highest level: 1 and 0."""
    level = input.float() * (1 / scale) + zero
    return ((level >= -0.5) & (level <= 255.5)).to(input.dtype)


def _float_weight(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return (weight * scale.view(-1, 1, 1, 1)).to(dtype)


def _product(input: Tensor, weight: Tensor, scale: Tensor, geometry: Geometry) -> Tensor:
    w = _float_weight(weight, scale, input.dtype)
    stride, padding, dilation, groups = geometry
    return conv(input, w, None, FloatGeometry(stride, padding, dilation, False, groups), "identity", 0.0, 0.0)


class _ConvInt8(torch.autograd.Function):
    """(input, weight, scale, bias, input_scale, input_zero, *geometry) -> output."""

    @staticmethod
    def forward(*args):
        return _ops.conv_int8_forward(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, weight, scale, bias, input_scale, input_zero, *geometry = inputs
        saved = weight, scale, input_scale, input_zero, input
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)
        ctx.has_bias, ctx.geometry, ctx.output_shape = bias is not None, Geometry(*geometry), output.shape

    @staticmethod
    def backward(ctx, grad_output):
        weight, scale, input_scale, input_zero, input = ctx.saved_tensors
        grad_input = grad_bias = None
        if ctx.needs_input_grad[0]:
            w, (stride, padding, dilation, groups) = _float_weight(weight, scale, input.dtype), ctx.geometry
            rest = stride, padding, dilation, False, groups, "identity", 0.0, 0.0, [True, False, False]
            grad_input = conv_backward(grad_output, None, input, w, *rest)[0]
            grad_input = grad_input * _in_range(input, input_scale, input_zero)
        if ctx.has_bias and ctx.needs_input_grad[3]:
            grad_bias = grad_output.sum((0, 2, 3))
        return grad_input, None, None, grad_bias, *[None] * 6

    @staticmethod
    @forward_mode
    def jvp(ctx, saved, input_t, weight_t, scale_t, bias_t, *others):
        weight, scale, input_scale, input_zero, input = saved
        bias = None if bias_t is None else bias_t.view(-1, 1, 1)
        if input_t is None:
            return bias.expand(ctx.output_shape)
        tangent = _product(input_t * _in_range(input, input_scale, input_zero), weight, scale, ctx.geometry)
        return tangent if bias is None else tangent + bias

    @staticmethod
    def vmap(info, in_dims, *args):
        if all(dim is None for dim in in_dims[1:]):  # one layer for all: the batch is a part of the images'
            x = to_front(args[0], in_dims[0], info.batch_size)
            y = _forward(x.flatten(0, 1), *args[1:])
            return y.unflatten(0, x.shape[:2]), 0
        each = [
            to_front(one, dim, info.batch_size) if isinstance(dim, int) else [one] * info.batch_size
            for one, dim in zip(args, in_dims, strict=True)
        ]
        return torch.stack([_forward(*one) for one in zip(*each, strict=True)]), 0


def _flops(input, weight, *_, out_shape=None, **__):
    return 2 * math.prod(weight[1:]) * math.prod(out_shape)


_forward = through(_ConvInt8, _ops.conv_int8_forward)
register("conv_int8_forward", _ConvInt8, _flops, by_torch)
