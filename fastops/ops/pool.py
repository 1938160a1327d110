"""The general door of max_pool, avg_pool and their adaptive forms, in one to three dimensions. The fast doors are
_C.max_pool2d and so on; both call csrc/torch/pool.cpp.

A maximum's gradient goes where its indices say: `compact` ones (a byte, the position in the window, where windows have
up to 256 elements) or int64 positions in the input's plane, as PyTorch returns them. torch.func gets the latter, which
mean something without the geometry.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastops import _C
from fastops.ops import forward_mode, needs_function, records, register, through, to_front

_ops = torch.ops.fastops


class Windows(NamedTuple):
    """What a pool is besides its input: the output's spatial sizes of an adaptive one, or its windows.

    The other ones are zeros, and not empty: AOTInductor's packages cannot pass an empty list.
    """

    output: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    ceil_mode: bool


def windows_of(kernel: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool) -> Windows:
    """Windows of a pool that is not adaptive."""
    return Windows((0,) * len(kernel), kernel, stride, padding, dilation, ceil_mode)


def adaptive(output: tuple[int, ...]) -> Windows:
    """Those of one that is."""
    return Windows(output, *((0,) * len(output),) * 4, False)


def max_pool(input: Tensor, windows: Windows, return_indices: bool) -> tuple[Tensor, Tensor]:
    """(maxima, their int64 positions in the input's planes; those are an empty tensor where nobody asks for them).

    Shapes: (batch, channels, *spatial) or without batch -> the same with the output's sizes. The caller has checked
    `supported`.
    """
    kind = "compact" if records(input) else "none"
    if return_indices or needs_function():
        kind = "plane"
    return _max_forward(input, *windows, kind)


def avg_pool(input: Tensor, windows: Windows, count_include_pad: bool, divisor_override: int) -> Tensor:
    """Averages; shapes as in max_pool. divisor_override 0: none."""
    return _avg_forward(input, *windows[:4], windows.ceil_mode, count_include_pad, divisor_override)


def _at_positions(tensor: Tensor, indices: Tensor, *geometry: Any) -> Tensor:
    """The elements of (batch, channels, *spatial) that a max pool's indices name: the adjoint of its gradient."""
    *geometry, dims, _ = geometry
    if indices.dtype is not torch.int64:
        indices = _ops.max_pool_positions(indices, *geometry, dims)
    # reshape and not flatten, which the vmap of gradcheck does not know.
    leading = indices.shape[: indices.dim() - dims]
    planes, size = math.prod(leading), math.prod(indices.shape[indices.dim() - dims :])
    picked = tensor.reshape(planes, math.prod(geometry[0][len(leading) :])).gather(-1, indices.reshape(planes, size))
    return picked.reshape(indices.shape)


def _run_batched(function: Any, tensors: Sequence[Tensor], dims: int) -> Any:
    """function over tensors with one more dimension in front: part of the batch, or the batch where there is none."""
    if tensors[0].dim() == dims + 2:
        return function(*tensors)
    size = tensors[0].shape[0]
    results = function(*(t.flatten(0, 1) for t in tensors))
    if isinstance(results, Tensor):
        return results.unflatten(0, (size, -1)) if results.numel() else _split(results, tensors[0])
    return tuple(r.unflatten(0, (size, -1)) if r.numel() else _split(r, tensors[0]) for r in results)


def _split(result: Tensor, like: Tensor) -> Tensor:
    """An empty result, whose batch cannot be found by division."""
    return result if result.dim() < 2 else result.reshape(*like.shape[:2], *result.shape[1:])


class _MaxPool(torch.autograd.Function):
    """(input, output_size, kernel, stride, padding, dilation, ceil_mode, indices) -> (output, indices)."""

    @staticmethod
    def forward(*args):
        return _ops.max_pool_forward(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, output_size, *geometry, _ = inputs
        _, indices = output
        ctx.mark_non_differentiable(indices)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(indices)
        ctx.save_for_forward(indices)
        dims = len(output_size)
        ctx.args = input.shape, *geometry, dims, _C.pool_is_channels_last(input, dims)

    @staticmethod
    def backward(ctx, grad_output, _):
        if grad_output is None:
            return (None,) * 8
        return _max_backward(grad_output, *ctx.saved_tensors, *ctx.args), *(None,) * 7

    @staticmethod
    @forward_mode
    def jvp(ctx, saved, input_t, *_):
        return _at_positions(input_t, *saved, *ctx.args), None

    @staticmethod
    def vmap(info, in_dims, input, output_size, kernel, *rest):
        input, dims = input.movedim(in_dims[0], 0), len(output_size)
        return _run_batched(lambda x: _max_forward(x, output_size, kernel, *rest), [input], dims), (0, 0)


class _MaxPoolBackward(torch.autograd.Function):
    """(grad_output, indices, input_size, kernel, stride, padding, dilation, ceil_mode, dims, channels_last) ->
    grad_input.
    """

    @staticmethod
    def forward(*args):
        return _ops.max_pool_backward(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, indices, *ctx.args = inputs
        ctx.save_for_backward(indices)
        ctx.save_for_forward(indices)

    @staticmethod
    def backward(ctx, cotangent):
        return _at_positions(cotangent, *ctx.saved_tensors, *ctx.args), *(None,) * 9

    @staticmethod
    @forward_mode
    def jvp(ctx, saved, grad_t, *_):
        return _max_backward(grad_t, *saved, *ctx.args)

    @staticmethod
    def vmap(info, in_dims, grad_output, indices, input_size, *rest):
        tensors = [to_front(t, d, info.batch_size) for t, d in zip((grad_output, indices), in_dims[:2], strict=True)]
        *_, dims, _ = rest
        sizes = _batched_sizes(input_size, info.batch_size, dims)
        return _run_batched(lambda g, i: _max_backward(g, i, sizes, *rest), tensors, dims), 0


class _AvgPool(torch.autograd.Function):
    """(input, output_size, kernel, stride, padding, ceil_mode, count_include_pad, divisor_override) -> output."""

    @staticmethod
    def forward(*args):
        return _ops.avg_pool_forward(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, *ctx.args = inputs
        dims = len(ctx.args[0])
        ctx.input = input.shape, dims, _C.pool_is_channels_last(input, dims)

    @staticmethod
    def backward(ctx, grad_output):
        size, *layout = ctx.input
        return _avg_backward(grad_output, size, *ctx.args[1:], *layout), *(None,) * 7

    @staticmethod
    @forward_mode
    def jvp(ctx, saved, input_t, *_):
        return _avg_forward(input_t, *ctx.args)

    @staticmethod
    def vmap(info, in_dims, input, output_size, kernel, *rest):
        input, dims = input.movedim(in_dims[0], 0), len(output_size)
        return _run_batched(lambda x: _avg_forward(x, output_size, kernel, *rest), [input], dims), 0


class _AvgPoolBackward(torch.autograd.Function):
    """(grad_output, input_size, kernel, stride, padding, ceil_mode, count_include_pad, divisor_override, dims,
    channels_last) -> grad_input.
    """

    @staticmethod
    def forward(*args):
        return _ops.avg_pool_backward(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        grad_output, *ctx.args = inputs
        *_, dims, _ = ctx.args
        ctx.output_size = grad_output.shape[grad_output.dim() - dims :]

    @staticmethod
    def backward(ctx, cotangent):
        _, *rest, _, _ = ctx.args
        return _avg_forward(cotangent, ctx.output_size, *rest), *(None,) * 9

    @staticmethod
    @forward_mode
    def jvp(ctx, saved, grad_t, *_):
        return _avg_backward(grad_t, *ctx.args)

    @staticmethod
    def vmap(info, in_dims, grad_output, input_size, *rest):
        grad_output = grad_output.movedim(in_dims[0], 0)
        *_, dims, _ = rest
        sizes = _batched_sizes(input_size, info.batch_size, dims)
        return _run_batched(lambda g: _avg_backward(g, sizes, *rest), [grad_output], dims), 0


def _batched_sizes(sizes: Sequence[int], batch: int, dims: int) -> list[int]:
    """An input's sizes with a vmapped dimension in its batch."""
    if len(sizes) == dims + 1:
        return [batch, *sizes]
    return [batch * sizes[0], *sizes[1:]]


def _max_decomposed(
    input: Tensor, output_size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], ceil_mode: bool, indices: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if any(kernel):
        function = getattr(F, f"max_pool{len(kernel)}d")
        y, positions = function(input, kernel, stride, padding, dilation, ceil_mode, return_indices=True)
    else:
        function = getattr(F, f"adaptive_max_pool{len(output_size)}d")
        y, positions = function(input, output_size, return_indices=True)
    # The backward op takes positions in the plane for compact indices, too.
    return y, input.new_empty(0, dtype=torch.int64) if indices == "none" else positions


def _avg_decomposed(
    input: Tensor, output_size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    ceil_mode: bool, count_include_pad: bool, divisor_override: int,
) -> Tensor:  # fmt: skip
    if not any(kernel):
        return getattr(F, f"adaptive_avg_pool{len(output_size)}d")(input, output_size)
    divisor = [divisor_override or None] if len(kernel) > 1 else []  # of one dimension there is none
    function = getattr(F, f"avg_pool{len(kernel)}d")
    return function(input, kernel, stride, padding, ceil_mode, count_include_pad, *divisor)


_max_forward = through(_MaxPool, _ops.max_pool_forward)
_max_backward = through(_MaxPoolBackward, _ops.max_pool_backward)
_avg_forward = through(_AvgPool, _ops.avg_pool_forward)
_avg_backward = through(_AvgPoolBackward, _ops.avg_pool_backward)

register("max_pool_forward", _MaxPool, decomposition=_max_decomposed)
register("max_pool_backward", _MaxPoolBackward)
register("avg_pool_forward", _AvgPool, decomposition=_avg_decomposed)
register("avg_pool_backward", _AvgPoolBackward)
