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
from torch._prims_common import suggest_memory_format

from fastops._activations import saved_by_linear
from fastops.ops import autocast, forward_mode, records, register, supported, through, to_front
from fastops.ops.activation import _backward as activation_backward
from fastops.ops.activation import decomposed_layer, slope_derivative

_ops = torch.ops.fastops


class Geometry(NamedTuple):
    """What a convolution is besides its tensors."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]  # before each dimension, then after each
    dilation: tuple[int, ...]
    transposed: bool
    groups: int

    def output_sizes(self, input: Tensor, weight: Tensor) -> list[int]:
        """The output's spatial sizes."""
        dims = len(self.stride)
        sizes = []
        for i, (stride, dilation) in enumerate(zip(self.stride, self.dilation, strict=True)):
            size, around = input.shape[2 + i], self.padding[i] + self.padding[dims + i]
            window = dilation * (weight.shape[2 + i] - 1) + 1
            if self.transposed:
                sizes.append((size - 1) * stride + window - around)
            else:
                sizes.append((size + around - window) // stride + 1)
        return sizes

    def channels(self, weight: Tensor) -> tuple[int, int]:
        """Of input and output."""
        grouped, other = weight.shape[1] * self.groups, weight.shape[0]
        return (other, grouped) if self.transposed else (grouped, other)


def conv(
    input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, activation: str, a: float, b: float
) -> Tensor:
    """y = f(conv(x, w) + b), differentiable to any order, forward and reverse.

    Shapes: input (batch, in_channels, *spatial), weight as in torch.nn, bias (out_channels). One of float32, float64,
    bfloat16, float16 for all. The caller has checked `supports`.
    """
    return _forward(input, weight, bias, *geometry, activation, a, b, records(input, weight, bias))[0]


def supports(input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> bool:
    """Whether `conv` takes these tensors: supported, one dtype, one device, a geometry that PyTorch accepts."""
    for tensor in (weight, bias):
        if tensor is None:
            continue
        if not supported(tensor, on_gpu=True) or tensor.dtype != input.dtype or tensor.device != input.device:
            return False
    dims, groups = len(geometry.stride), geometry.groups
    if not supported(input, on_gpu=True) or input.dim() != dims + 2 or weight.dim() != dims + 2:
        return False
    if groups < 1 or weight.shape[0] < 1 or weight.shape[1] < 1 or weight.shape[0] % groups != 0:
        return False
    channels, outputs = geometry.channels(weight)
    if input.shape[1] != channels or (bias is not None and (bias.dim() != 1 or bias.shape[0] != outputs)):
        return False
    before, after = geometry.padding[:dims], geometry.padding[dims:]
    if min(*geometry.stride, *geometry.dilation, *weight.shape[2:]) < 1 or min(before) < 0:
        return False
    if any(size < 1 for size in input.shape[2:]) and input.shape[0] > 0:
        return False
    if geometry.transposed:
        extra = [x - y for x, y in zip(before, after, strict=True)]
        if any(
            not 0 <= x < max(stride, dilation)
            for x, stride, dilation in zip(extra, geometry.stride, geometry.dilation, strict=True)
        ):
            return False
    elif min(after) < 0:
        return False
    sizes = geometry.output_sizes(input, weight)
    return all(size >= 1 for size in sizes) and (
        input.device.type == "cpu" or _fits_int(input, weight, sizes, geometry)
    )


def _fits_int(input: Tensor, weight: Tensor, sizes: Sequence[int], geometry: Geometry) -> bool:
    """What the CUDA kernels count in ints: see fits_int in csrc/kernels/conv/conv.h, which takes a little more."""
    around, strides = geometry.padding[: len(sizes)], geometry.stride
    spans = (k * d for k, d in zip(weight.shape[2:], geometry.dilation, strict=True))
    reaches = (n * s for n, s in zip((*input.shape[2:], *sizes), (*strides, *strides), strict=True))
    return max(*around, *spans, *reaches, *input.shape[1:2], weight.numel()) < 2**29


def cast(input: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Convolutions are on autocast's lower-precision list, as in PyTorch."""
    return autocast(input, weight, bias)


def _slope_times(grad: Tensor, saved: Tensor | None, activation: str, a: float, b: float) -> Tensor:
    """grad * f'(saved)."""
    if activation == "identity":
        return grad
    kind = saved_by_linear(activation, a, b)
    return activation_backward(grad, saved, activation, a, b, kind)


def _plain(input: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    return conv(input, weight, None, geometry, "identity", 0.0, 0.0)


def _gradient(which: int, grad: Tensor, input: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """The gradient of the input (which = 0) or the weight (1) of a convolution without activation."""
    mask = [which == 0, which == 1, False]
    return _backward(grad, None, input, weight, *geometry, "identity", 0.0, 0.0, mask)[which]


def _per_channel(bias: Tensor, dims: int) -> Tensor:
    return bias.view(-1, *[1] * dims)


def _sum(*terms: Tensor | None) -> Tensor | None:
    total = None
    for term in terms:
        if term is not None:
            total = term if total is None else total + term
    return total


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


class _Conv(torch.autograd.Function):
    """(input, weight, bias, *geometry, activation, a, b, need_saved) -> (output, pre_activation).

    The pre-activation is an output of its own, 0 elements when it is not saved, so that a gradient of a gradient finds
    its way through it to input, weight and bias.
    """

    @staticmethod
    def forward(*args):
        return _ops.conv_forward(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, weight, bias, *geometry, activation, a, b, _ = inputs
        kind = saved_by_linear(activation, a, b)
        saved = None if activation == "identity" else output[0] if kind == "output" else output[1]
        ctx.missing = saved is not None and saved.numel() == 0 and output[0].numel() != 0
        ctx.save_for_backward(input, weight, bias, saved)
        ctx.save_for_forward(input, weight, bias, saved)
        ctx.set_materialize_grads(False)
        ctx.geometry = Geometry(*geometry)
        ctx.activation = activation, a, b
        ctx.has_bias = bias is not None
        ctx.pre_activation_numel = output[1].numel()

    @staticmethod
    def _saved(ctx, tensors):
        input, weight, bias, saved = tensors
        if ctx.missing:  # nobody said at forward that there would be a backward
            saved = conv(input, weight, bias, ctx.geometry, "identity", 0.0, 0.0)
        return input, weight, saved

    @staticmethod
    def backward(ctx, grad_output, grad_pre_activation):
        mask = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.has_bias and ctx.needs_input_grad[2]]
        input, weight, saved = _Conv._saved(ctx, ctx.saved_tensors)
        grads = [None, None, None]
        if grad_output is not None:
            grads = _backward(grad_output, saved, input, weight, *ctx.geometry, *ctx.activation, mask)
        if grad_pre_activation is not None and ctx.pre_activation_numel:
            more = _backward(grad_pre_activation, None, input, weight, *ctx.geometry, "identity", 0.0, 0.0, mask)
            grads = [_sum(x, y) for x, y in zip(grads, more, strict=True)]
        return *(grad if wanted else None for grad, wanted in zip(grads, mask, strict=True)), *[None] * 9

    @staticmethod
    @forward_mode
    def jvp(ctx, saved, input_t, weight_t, bias_t, *_):
        input, weight, saved = _Conv._saved(ctx, saved)
        tangent = _sum(
            None if input_t is None else _plain(input_t, weight, ctx.geometry),
            None if weight_t is None else _plain(input, weight_t, ctx.geometry),
        )
        if bias_t is not None:
            sizes = ctx.geometry.output_sizes(input, weight)
            column = _per_channel(bias_t, len(sizes))
            tangent = column.expand(input.shape[0], -1, *sizes) if tangent is None else tangent + column
        if tangent is None:
            return None, None
        output_t = _slope_times(tangent, saved, *ctx.activation)
        # An output may not share memory with another one.
        pre_activation_t = tangent.clone() if ctx.pre_activation_numel else tangent.new_zeros(0)
        return output_t, pre_activation_t

    @staticmethod
    def vmap(info, in_dims, input, weight, bias, *rest):
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


class _ConvBackward(torch.autograd.Function):
    """(grad_output, saved, input, weight, *geometry, activation, a, b, output_mask)
    -> (grad_input, grad_weight, grad_bias); 0 elements where output_mask says no.

    With gz = grad_output * f'(saved), each is linear in gz.
    """

    @staticmethod
    def forward(*args):
        return _ops.conv_backward(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        grad_output, saved, input, weight, *geometry, activation, a, b, output_mask = inputs
        ctx.save_for_backward(grad_output, saved, input, weight)
        ctx.save_for_forward(grad_output, saved, input, weight)
        ctx.set_materialize_grads(False)
        ctx.geometry = Geometry(*geometry)
        ctx.activation = activation, a, b
        ctx.output_mask = output_mask

    @staticmethod
    def _slope_change(ctx, saved):
        """The derivative of f' with respect to what was saved, or None where it is zero."""
        activation, a, b = ctx.activation
        if activation == "identity":
            return None
        return slope_derivative(saved, activation, a, b, saved_by_linear(activation, a, b))

    @staticmethod
    def backward(ctx, *cotangents):
        # For cotangents u of the three gradients, the gradient of gz is conv(u_x, w) + conv(x, u_w) + u_b.
        grad_output, saved, input, weight = ctx.saved_tensors
        geometry = ctx.geometry
        u_x, u_w, u_b = (u if on else None for u, on in zip(cotangents, ctx.output_mask, strict=True))
        grad_gz = _sum(
            None if u_x is None else _plain(u_x, weight, geometry),
            None if u_w is None else _plain(input, u_w, geometry),
            None if u_b is None else _per_channel(u_b, len(geometry.stride)).expand_as(grad_output),
        )
        result = [None] * 13
        if grad_gz is None:
            return tuple(result)
        needed = ctx.needs_input_grad
        if needed[0]:
            result[0] = _slope_times(grad_gz, saved, *ctx.activation)
        if needed[1] and (change := _ConvBackward._slope_change(ctx, saved)) is not None:
            result[1] = grad_gz * grad_output * change
        if (needed[2] and u_w is not None) or (needed[3] and u_x is not None):
            gz = _slope_times(grad_output, saved, *ctx.activation)
            if needed[2] and u_w is not None:
                result[2] = _gradient(0, gz, input, u_w, geometry)
            if needed[3] and u_x is not None:
                result[3] = _gradient(1, gz, u_x, weight, geometry)
        return tuple(result)

    @staticmethod
    @forward_mode
    def jvp(ctx, saved, grad_t, saved_t, input_t, weight_t, *_):
        grad_output, saved, input, weight = saved
        geometry, mask = ctx.geometry, ctx.output_mask
        change = None if saved_t is None else _ConvBackward._slope_change(ctx, saved)
        gz_t = _sum(
            None if grad_t is None else _slope_times(grad_t, saved, *ctx.activation),
            None if change is None else grad_output * change * saved_t,
        )
        gz = _slope_times(grad_output, saved, *ctx.activation)

        def product_rule(which, like, changed):
            """changed: the other operand's tangent, in the place of (input, weight)."""
            if not mask[which]:
                return gz.new_zeros(0)
            total = _sum(
                None if gz_t is None else _gradient(which, gz_t, input, weight, geometry),
                None if changed is None else _gradient(which, gz, *changed, geometry),
            )
            return torch.zeros_like(like) if total is None else total

        summed = [0, *range(2, gz.dim())]
        return (
            product_rule(0, input, None if weight_t is None else (input, weight_t)),
            product_rule(1, weight, None if input_t is None else (input_t, weight)),
            (gz.new_zeros(gz.shape[1]) if gz_t is None else gz_t.sum(summed)) if mask[2] else gz.new_zeros(0),
        )

    @staticmethod
    def vmap(info, in_dims, grad_output, saved, input, weight, *rest):
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


def _memory_format(input: Tensor, weight: Tensor) -> torch.memory_format:
    """As PyTorch: channels_last out where either operand is; one dimension is always channels first."""
    if input.dim() == 3:
        return torch.contiguous_format
    wanted = suggest_memory_format(input)
    return suggest_memory_format(weight) if wanted == torch.contiguous_format else wanted


def _empty(like: Tensor, shape: Sequence[int], memory_format: torch.memory_format) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=memory_format)


def _forward_fake(input, weight, bias, stride, padding, dilation, transposed, groups, activation, a, b, need_saved):
    geometry = Geometry(stride, padding, dilation, transposed, groups)
    shape = (input.shape[0], geometry.channels(weight)[1], *geometry.output_sizes(input, weight))
    memory_format = _memory_format(input, weight)
    saves = need_saved and activation != "identity" and saved_by_linear(activation, a, b) == "input"
    output = _empty(input, shape, memory_format)
    return output, _empty(input, shape, memory_format) if saves else input.new_empty(0)


def _backward_fake(
    grad_output, saved, input, weight, stride, padding, dilation, transposed, groups, activation, a, b, output_mask
):
    memory_format = _memory_format(input, weight)
    weight_format = torch.contiguous_format
    if weight.dim() > 3 and not weight.is_contiguous():
        last = torch.channels_last if weight.dim() == 4 else torch.channels_last_3d
        weight_format = last if weight.is_contiguous(memory_format=last) else weight_format
    return (
        _empty(input, input.shape, memory_format) if output_mask[0] else grad_output.new_empty(0),
        _empty(weight, weight.shape, weight_format) if output_mask[1] else grad_output.new_empty(0),
        grad_output.new_empty(grad_output.shape[1]) if output_mask[2] else grad_output.new_empty(0),
    )


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


_forward = through(_Conv, _ops.conv_forward)
_backward = through(_ConvBackward, _ops.conv_backward)
register("conv_forward", _Conv, _forward_fake, _forward_flops, _decomposed)
register("conv_backward", _ConvBackward, _backward_fake, _backward_flops)
