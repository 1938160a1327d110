"""The general door of linear layers and 1 x 1 convolutions with sparse weights. The fast door is _C.SparseIndices; both
call csrc/torch/sparse_linear.cpp.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastops.ops import forward_mode, register, through, to_front

_ops = torch.ops.fastops


def sparse_linear(
    input: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    values: Tensor,
    bias: Tensor | None,
    out_features: int,
    dim: int,
) -> Tensor:
    """input W^T + bias for a W of which only `values` are stored, compressed by rows (CSR, BSR; sparse_linear.h).

    Shapes: crow_indices (rows of blocks + 1) int32, col_indices (blocks) int16 or int32, values (blocks) or (blocks,
    block rows, block columns) float32, bias (n) in input's dtype. dim -1: input (*, k) -> (*, n). dim 1: input
    (N, k, H, W) -> (N, n, H, W), a 1 x 1 convolution. Gradients reach input, values and bias.

    Raises:
        RuntimeError: shapes, dtypes or devices do not fit, or the indices are no sparse matrix of k columns.
    """
    return _forward(input, crow_indices, col_indices, values, bias, out_features, dim)


def dense(crow_indices: Tensor, col_indices: Tensor, values: Tensor, size: tuple[int, int]) -> Tensor:
    """W, (n, k), in the dtype of values."""
    n, k = size
    rows, cols = values.shape[1:] if values.dim() == 3 else (1, 1)
    blocks = values.new_zeros(-(-n // rows), -(-k // cols), rows, cols)
    counts = crow_indices.diff().long()
    row = torch.repeat_interleave(torch.arange(len(counts), device=values.device), counts, output_size=len(values))
    blocks = blocks.index_put((row, col_indices.long()), values.view(-1, rows, cols))
    return blocks.transpose(1, 2).reshape(blocks.shape[0] * rows, blocks.shape[1] * cols)[:n, :k]


def by_torch(
    input: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    values: Tensor,
    bias: Tensor | None,
    out_features: int,
    dim: int,
) -> Tensor:
    """The same in PyTorch's ops, for programs that run without fastops."""
    w = dense(crow_indices, col_indices, values, (out_features, input.shape[dim])).to(input.dtype)
    return F.linear(input, w, bias) if dim == -1 else F.conv2d(input, w[..., None, None], bias)


class _SparseLinear(torch.autograd.Function):
    """(input, crow_indices, col_indices, values, bias, out_features, dim) -> output."""

    @staticmethod
    def forward(*args):
        return _ops.sparse_linear_forward(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, crow, col, values, bias, ctx.out_features, ctx.dim = inputs
        ctx.save_for_backward(input, crow, col, values)
        ctx.save_for_forward(input, crow, col, values)
        ctx.has_bias, ctx.output_size = bias is not None, output.shape

    @staticmethod
    def backward(ctx, grad_output):
        mask = [ctx.needs_input_grad[0], ctx.needs_input_grad[3]]
        grads = [None, None]
        if any(mask):
            grads = _backward(grad_output, *ctx.saved_tensors, ctx.out_features, ctx.dim, mask)
        grad_input, grad_values = (grad if on else None for grad, on in zip(grads, mask, strict=True))
        grad_bias = None
        if ctx.has_bias and ctx.needs_input_grad[4]:
            grad_bias = grad_output.movedim(ctx.dim, -1).reshape(-1, ctx.out_features).sum(0)
        return grad_input, None, None, grad_values, grad_bias, None, None

    @staticmethod
    @forward_mode
    def jvp(ctx, saved, input_t, crow_t, col_t, values_t, bias_t, *_):
        input, crow, col, values = saved
        sizes = ctx.out_features, ctx.dim
        tangent = None if input_t is None else _forward(input_t, crow, col, values, None, *sizes)
        if values_t is not None:
            change = _forward(input, crow, col, values_t, None, *sizes)
            tangent = change if tangent is None else tangent + change
        if bias_t is None:
            return tangent
        bias_t = (bias_t if ctx.dim == -1 else bias_t[:, None, None]).expand(ctx.output_size)
        return bias_t if tangent is None else tangent + bias_t

    @staticmethod
    def vmap(info, in_dims, input, crow, col, values, bias, out_features, dim):
        size = info.batch_size
        if all(d is None for d in in_dims[1:5]):  # one layer for all: the batch is one more leading dimension
            input = to_front(input, in_dims[0], size)
            if dim == -1:
                return _forward(input, crow, col, values, bias, out_features, dim), 0
            output = _forward(input.flatten(0, 1), crow, col, values, bias, out_features, dim)
            return output.unflatten(0, input.shape[:2]), 0
        each = [
            [None] * size if t is None else to_front(t, d, size)
            for t, d in zip((input, crow, col, values, bias), in_dims[:5], strict=True)
        ]
        return torch.stack([_forward(*one, out_features, dim) for one in zip(*each, strict=True)]), 0


class _SparseLinearBackward(torch.autograd.Function):
    """(grad_output, input, crow_indices, col_indices, values, out_features, dim, output_mask) -> (grad_input,
    grad_values): the first is linear in grad_output and values, the second in grad_output and input.
    """

    @staticmethod
    def forward(*args):
        return _ops.sparse_linear_backward(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.out_features, ctx.dim, ctx.output_mask = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, u_input, u_values):
        grad_output, input, crow, col, values = ctx.saved_tensors
        sizes = ctx.out_features, ctx.dim
        u_input, u_values = (u if on else None for u, on in zip((u_input, u_values), ctx.output_mask, strict=True))
        grads = [None] * 8
        if ctx.needs_input_grad[0]:
            terms = [
                None if u_input is None else _forward(u_input, crow, col, values, None, *sizes),
                None if u_values is None else _forward(input, crow, col, u_values, None, *sizes),
            ]
            grads[0] = _sum(*terms)
        if ctx.needs_input_grad[1] and u_values is not None:
            grads[1] = _backward(grad_output, input, crow, col, u_values, *sizes, [True, False])[0]
        if ctx.needs_input_grad[4] and u_input is not None:
            grads[4] = _backward(grad_output, u_input, crow, col, values, *sizes, [False, True])[1]
        return tuple(grads)

    @staticmethod
    @forward_mode
    def jvp(ctx, saved, grad_t, input_t, crow_t, col_t, values_t, *_):
        grad_output, input, crow, col, values = saved
        sizes = ctx.out_features, ctx.dim

        def change(which, like, *operands):
            if not ctx.output_mask[which]:
                return like.new_empty(0)
            mask = [which == 0, which == 1]
            terms = [_backward(g, x, crow, col, v, *sizes, mask)[which] for g, x, v in operands]
            return torch.zeros_like(like) if not terms else _sum(*terms)

        of_grad = [] if grad_t is None else [(grad_t, input, values)]
        of_values = [] if values_t is None else [(grad_output, input, values_t)]
        of_input = [] if input_t is None else [(grad_output, input_t, values)]
        return change(0, input, *of_grad, *of_values), change(1, values, *of_grad, *of_input)

    @staticmethod
    def vmap(info, in_dims, *args):
        size = info.batch_size
        *rest, mask = args
        each = [
            to_front(t, d, size) if isinstance(t, Tensor) else [t] * size
            for t, d in zip(rest, in_dims[: len(rest)], strict=True)
        ]
        results = [_backward(*one, mask) for one in zip(*each, strict=True)]
        return tuple(torch.stack(grads) for grads in zip(*results, strict=True)), (0, 0)


def _sum(*terms: Tensor | None) -> Tensor | None:
    total = None
    for term in terms:
        if term is not None:
            total = term if total is None else total + term
    return total


def _flops(input, crow, col, values, bias, out_features, dim, **__):
    return 2 * math.prod(input) // max(input[dim], 1) * math.prod(values)


def _backward_flops(grad_output, input, crow, col, values, out_features, dim, output_mask, **__):
    return sum(output_mask) * _flops(input, crow, col, values, None, out_features, dim)


_forward = through(_SparseLinear, _ops.sparse_linear_forward)
_backward = through(_SparseLinearBackward, _ops.sparse_linear_backward)
register("sparse_linear_forward", _SparseLinear, _flops, by_torch)
register("sparse_linear_backward", _SparseLinearBackward, _backward_flops)
