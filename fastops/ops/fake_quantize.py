"""The general door of fake quantization. The fast door is _C.fake_quantize; both call csrc/torch/fake_quantize.cpp."""

import torch
from torch import Tensor

from fastops.ops import forward_mode, needs_function, records, register, through, to_front

_ops = torch.ops.fastops


def fake_quantize(
    input: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int, axis: int | None
) -> Tensor:
    """input rounded to the levels of scale and zero_point; the formulas are in fake_quantize.h.

    Shapes: input (*), scale and zero_point () or (1), or (input.shape[axis]) -> (*). Differentiable in all three.

    Raises:
        RuntimeError: shapes, dtypes, devices or levels do not fit.
    """
    # A mask is all that a gradient of the input alone needs.
    learned = scale.requires_grad or zero_point.requires_grad or needs_function()
    return _forward(input, scale, zero_point, quant_min, quant_max, axis, records(input) and not learned)[0]


def _along(input: Tensor, grid: Tensor, axis: int | None) -> Tensor:
    """A scale or zero point, shaped so that it broadcasts, in the type that input is computed in."""
    dtype = torch.promote_types(input.dtype, torch.float32)
    if axis is None:
        return grid.reshape(()).to(dtype)
    shape = [1] * input.dim()
    shape[axis] = -1
    return grid.reshape(shape).to(dtype)


def _parts(input, scale, zero_point, quant_min, quant_max, axis):
    """Of PyTorch's ops: 1 / s, s, z, the levels q, and which elements are inside."""
    x = input.to(torch.promote_types(input.dtype, torch.float32))
    s, z = _along(input, scale, axis), _along(input, zero_point, axis)
    inverse = _along(input, 1 / scale, axis)
    r = torch.round(x * inverse + z) if zero_point.is_floating_point() else torch.round(x * inverse) + z
    inside = (r >= quant_min) & (r <= quant_max)
    return inverse, s, z, r.nan_to_num(quant_min).clamp(quant_min, quant_max), inside


def by_torch(input, scale, zero_point, quant_min, quant_max, axis):
    """The same in PyTorch's ops, for programs that run without fastops."""
    _, s, z, q, _ = _parts(input, scale, zero_point, quant_min, quant_max, axis)
    return ((q - z) * s).to(input.dtype)


def _forward_by_torch(input, scale, zero_point, quant_min, quant_max, axis, need_mask):
    _, s, z, q, inside = _parts(input, scale, zero_point, quant_min, quant_max, axis)
    return ((q - z) * s).to(input.dtype), inside if need_mask else inside.new_empty(0)


def _slopes(input, scale, zero_point, *args):
    """What a unit of scale and of zero_point changes the output by, and where a unit of input does."""
    inverse, s, z, q, inside = _parts(input, scale, zero_point, *args)
    of_scale = torch.where(inside, ((q - z) * s - input) * inverse, q - z)
    return inside, of_scale, torch.where(inside, 0.0, -s)


def _gradients(grad, input, scale, zero_point, *args):
    """fake_quantize_learned_backward in PyTorch's differentiable ops."""
    inside, of_scale, of_zero = _slopes(input, scale, zero_point, *args)
    axis = args[-1]
    g = grad.to(of_scale.dtype)

    def summed(product):
        if axis is not None:
            product = product.movedim(axis, 0).flatten(1).sum(1)
        return product.sum_to_size(scale.shape).to(scale.dtype) if axis is None else product.to(scale.dtype)

    return torch.where(inside, grad, 0.0), summed(g * of_scale), summed(g * of_zero)


class _FakeQuantize(torch.autograd.Function):
    """(input, scale, zero_point, quant_min, quant_max, axis, need_mask) -> (output, mask).

    With a mask only the input has a gradient.
    """

    @staticmethod
    def forward(*args):
        return _ops.fake_quantize_forward(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, scale, zero_point, *ctx.args, ctx.masked = inputs
        saved = (output[1],) if ctx.masked else (input, scale, zero_point)
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)

    @staticmethod
    def backward(ctx, grad_output, _):
        nothing = (None,) * 4
        if ctx.masked:
            return _masked(grad_output, *ctx.saved_tensors), None, None, *nothing
        needs = list(ctx.needs_input_grad[:3])
        if torch.is_grad_enabled() or needs_function():
            grads = _gradients(grad_output, *ctx.saved_tensors, *ctx.args)
        else:
            grads = _ops.fake_quantize_learned_backward(grad_output, *ctx.saved_tensors, *ctx.args, needs)
        return *(grad if need else None for grad, need in zip(grads, needs, strict=True)), *nothing

    @staticmethod
    @forward_mode
    def jvp(ctx, saved, input_t, scale_t, zero_t, *_):
        if ctx.masked:
            return torch.where(saved[0], input_t, 0.0), None
        inside, of_scale, of_zero = _slopes(*saved, *ctx.args)
        tangent = torch.zeros_like(of_scale) if input_t is None else torch.where(inside, input_t, 0.0)
        for one, slope in ((scale_t, of_scale), (zero_t, of_zero)):
            if one is not None:
                tangent = tangent + _along(saved[0], one, ctx.args[-1]) * slope
        return tangent.to(saved[0].dtype), None

    @staticmethod
    def vmap(info, in_dims, input, scale, zero_point, *args):
        size, axis = info.batch_size, args[-2]
        x = to_front(input, in_dims[0], size)
        if in_dims[1] is None and in_dims[2] is None:
            moved = axis if axis is None or axis < 0 else axis + 1
            output, mask = _forward(x, scale, zero_point, *args[:2], moved, args[-1])
        else:
            grids = to_front(scale, in_dims[1], size), to_front(zero_point, in_dims[2], size)
            each = [_forward(*one, *args) for one in zip(x, *grids, strict=True)]
            output, mask = (torch.stack(one) for one in zip(*each, strict=True))
        return (output, mask), (0, 0 if args[-1] else None)


class _FakeQuantizeBackward(torch.autograd.Function):
    """(grad_output, mask) -> grad_input."""

    @staticmethod
    def forward(*args):
        return _ops.fake_quantize_backward(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[1])
        ctx.save_for_forward(inputs[1])

    @staticmethod
    def backward(ctx, grad):
        return _masked(grad, *ctx.saved_tensors), None

    @staticmethod
    @forward_mode
    def jvp(ctx, saved, grad_t, _):
        return torch.where(saved[0], grad_t, 0.0)

    @staticmethod
    def vmap(info, in_dims, *args):
        return _masked(*(to_front(one, dim, info.batch_size) for one, dim in zip(args, in_dims, strict=True))), 0


_forward = through(_FakeQuantize, _ops.fake_quantize_forward)
_masked = through(_FakeQuantizeBackward, _ops.fake_quantize_backward)

register("fake_quantize_forward", _FakeQuantize, decomposition=_forward_by_torch)
register("fake_quantize_backward", _FakeQuantizeBackward)
