"""The general door of linear layers with weights of 8 or 4 bits. The fast door is _C.weight_only; both call
csrc/torch/weight_only.cpp.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastops.ops import forward_mode, register, through, to_front
from fastops.ops.linear import linear

_ops = torch.ops.fastops


def weight_only(
    input: Tensor, weight: Tensor, scale: Tensor, offset: Tensor | None, bias: Tensor | None, group_size: int
) -> Tensor:
    """input W^T + bias, W = scale * weight + offset, a scale and an offset for each group_size elements of a row.

    Shapes: input (*, k); weight (n, k) int8 or float8_e4m3fn, or (n, (k + 1) // 2) uint8, two weights from 0 to 15 in a
    byte; scale and offset (n, groups) float32; bias (n) in input's dtype -> (*, n).

    Raises:
        RuntimeError: shapes, dtypes or devices do not fit.
    """
    return _forward(input, weight, scale, offset, bias, group_size)


def dequantized(weight: Tensor, scale: Tensor, offset: Tensor | None, group_size: int, k: int) -> Tensor:
    """W as float32, (n, k)."""
    if weight.dtype is torch.uint8:
        weight = torch.stack([weight & 15, weight >> 4], 2).flatten(1)[:, :k]
    groups = torch.arange(k, device=weight.device) // group_size
    w = weight.float() * scale[:, groups]
    return w if offset is None else w + offset[:, groups]


def by_torch(
    input: Tensor, weight: Tensor, scale: Tensor, offset: Tensor | None, bias: Tensor | None, group_size: int
) -> Tensor:
    """The same in PyTorch's ops, for programs that run without fastops."""
    w = dequantized(weight, scale, offset, group_size, input.shape[-1])
    return F.linear(input.float(), w, None if bias is None else bias.float()).to(input.dtype)


class _WeightOnly(torch.autograd.Function):
    """(input, weight, scale, offset, bias, group_size) -> output."""

    @staticmethod
    def forward(*args):
        return _ops.weight_only_forward(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, weight, scale, offset, bias, ctx.group_size = inputs
        ctx.save_for_backward(weight, scale, offset)
        ctx.save_for_forward(weight, scale, offset)
        ctx.has_bias, ctx.k = bias is not None, input.shape[-1]

    @staticmethod
    def backward(ctx, grad_output):
        grad_input = grad_bias = None
        if ctx.needs_input_grad[0]:
            w = dequantized(*ctx.saved_tensors, ctx.group_size, ctx.k).to(grad_output.dtype)
            grad_input = linear(grad_output, w.t(), None, "identity", 0.0, 0.0)
        if ctx.has_bias and ctx.needs_input_grad[4]:
            grad_bias = grad_output.reshape(-1, grad_output.shape[-1]).sum(0)
        return grad_input, None, None, None, grad_bias, None

    @staticmethod
    @forward_mode
    def jvp(ctx, saved, input_t, weight_t, scale_t, offset_t, bias_t, _):
        if input_t is None:
            return bias_t
        w = dequantized(*saved, ctx.group_size, ctx.k).to(input_t.dtype)
        tangent = linear(input_t, w, None, "identity", 0.0, 0.0)
        return tangent if bias_t is None else tangent + bias_t

    @staticmethod
    def vmap(info, in_dims, *args):
        size = info.batch_size
        *tensors, group_size = args
        if all(dim is None for dim in in_dims[1:]):  # one layer for all: the batch is one more leading dimension
            return _forward(to_front(args[0], in_dims[0], size), *args[1:]), 0
        each = [
            [None] * size if t is None else to_front(t, dim, size) for t, dim in zip(tensors, in_dims[:-1], strict=True)
        ]
        return torch.stack([_forward(*one, group_size) for one in zip(*each, strict=True)]), 0


def _flops(input, weight, *_, **__):
    return 2 * math.prod(input) * weight[0]


_forward = through(_WeightOnly, _ops.weight_only_forward)
register("weight_only_forward", _WeightOnly, _flops, by_torch)
