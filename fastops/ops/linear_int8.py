"""The general door of linear layers with int8 weights. The fast door is _C.Int8Weight; both call
csrc/torch/linear_int8.cpp.
"""

import math

import torch
from torch import Tensor

from fastops.ops import forward_mode, register, through, to_front
from fastops.ops.linear import linear

_ops = torch.ops.fastops


def linear_int8(input: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """(input rounded to 8 bits row by row) (scale * weight)^T + bias; the formulas are in linear_int8.h.

    Shapes: input (*, k), weight (n, k) int8, scale (n) float32, bias (n) in input's dtype -> (*, n). Gradients pass the
    rounding of the input by ("straight-through": Bengio, Leonard, Courville, 2013).

    Raises:
        RuntimeError: shapes, dtypes or devices do not fit.
    """
    return _forward(input, weight, scale, bias)


def dequantized(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight that int8 and scale stand for."""
    return (weight * scale.unsqueeze(1)).to(dtype)


def by_torch(input: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """The same in PyTorch's ops, for programs that run without fastops."""
    x = input.float()
    if x.shape[-1] == 0:  # there is no smallest element
        x = x.new_zeros(*x.shape[:-1], 1)
        weight = weight.new_zeros(len(weight), 1)
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    row_scale = (high / 255 - low / 255).clamp(min=torch.finfo(torch.float32).tiny)
    inverse = 1 / row_scale
    zero = torch.round(-low * inverse)
    levels = (torch.round(x * inverse) + zero).clamp(0, 255) - zero
    output = (levels @ weight.float().t()) * (row_scale * scale)
    return (output if bias is None else output + bias.float()).to(input.dtype)


class _LinearInt8(torch.autograd.Function):
    """(input, weight, scale, bias) -> output."""

    @staticmethod
    def forward(*args):
        return _ops.linear_int8_forward(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, weight, scale, bias = inputs
        ctx.save_for_backward(weight, scale)
        ctx.save_for_forward(weight, scale)
        ctx.has_bias = bias is not None

    @staticmethod
    def backward(ctx, grad_output):
        weight, scale = ctx.saved_tensors
        grad_input = grad_bias = None
        if ctx.needs_input_grad[0]:
            w = dequantized(weight, scale, grad_output.dtype)
            grad_input = linear(grad_output, w.t(), None, "identity", 0.0, 0.0)
        if ctx.has_bias and ctx.needs_input_grad[3]:
            grad_bias = grad_output.reshape(-1, grad_output.shape[-1]).sum(0)
        return grad_input, None, None, grad_bias

    @staticmethod
    @forward_mode
    def jvp(ctx, saved, input_t, weight_t, scale_t, bias_t):
        weight, scale = saved
        if input_t is None:
            return bias_t
        tangent = linear(input_t, dequantized(weight, scale, input_t.dtype), None, "identity", 0.0, 0.0)
        return tangent if bias_t is None else tangent + bias_t

    @staticmethod
    def vmap(info, in_dims, *args):
        if all(dim is None for dim in in_dims[1:]):  # one layer for all: the batch is one more leading dimension
            return _forward(to_front(args[0], in_dims[0], info.batch_size), *args[1:]), 0
        each = [
            [None] * info.batch_size if t is None else to_front(t, dim, info.batch_size)
            for t, dim in zip(args, in_dims, strict=True)
        ]
        return torch.stack([_forward(*one) for one in zip(*each, strict=True)]), 0


def _flops(input, weight, *_, **__):
    return 2 * math.prod(input) * weight[0]


_forward = through(_LinearInt8, _ops.linear_int8_forward)
register("linear_int8_forward", _LinearInt8, _flops, by_torch)
