"""The general door of linear: y = f(x W^T + b). The fast door is _C.linear; both call csrc/torch/linear.cpp."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastops._activations import saved_by_linear
from fastops.ops import autocast, forward_mode, records, register, supported, through, to_front, viewed
from fastops.ops.activation import _backward as activation_backward
from fastops.ops.activation import activation as apply_activation
from fastops.ops.activation import decomposed_layer, slope_derivative

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
    tensors = (input, weight) if bias is None else (input, weight, bias)
    if not all(supported(tensor, on_gpu=True) for tensor in tensors):
        return False
    if weight.dtype != input.dtype or weight.device != input.device or weight.dim() != 2 or input.dim() < 1:
        return False
    if input.shape[-1] != weight.shape[1]:
        return False
    if bias is None:
        return True
    same = bias.dtype == input.dtype and bias.device == input.device
    return same and bias.dim() == 1 and bias.shape[0] == weight.shape[0]


def cast(input: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """linear is on autocast's lower-precision list, as in PyTorch."""
    return autocast(input, weight, bias)


def _slope_times(grad: Tensor, saved: Tensor | None, activation: str, a: float, b: float) -> Tensor:
    """grad * f'(saved)."""
    if activation == "identity":
        return grad
    kind = saved_by_linear(activation, a, b)
    return activation_backward(grad, saved, activation, a, b, kind)


def _times(x: Tensor, y: Tensor) -> Tensor:
    """x @ y for x (*, m, n), y (n, k), on fastops' own linear."""
    return linear(x, y.mT, None, "identity", 0.0, 0.0)


def _rows(x: Tensor) -> Tensor:
    """(*, n) as (m, n), also where m or n is 0."""
    return x.unsqueeze(0) if x.dim() == 1 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _sum(*terms: Tensor | None) -> Tensor | None:
    total = None
    for term in terms:
        if term is not None:
            total = term if total is None else total + term
    return total


class _Linear(torch.autograd.Function):
    """(input, weight, bias, activation, a, b, need_saved) -> (output, pre_activation).

    The pre-activation is an output of its own, 0 elements when it is not saved, so that a gradient of a gradient finds
    its way through it to input, weight and bias.
    """

    @staticmethod
    def forward(*args):
        return _ops.linear_forward(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, weight, bias, activation, a, b, _ = inputs
        kind = saved_by_linear(activation, a, b)
        saved = None if activation == "identity" else output[0] if kind == "output" else output[1]
        ctx.missing = saved is not None and saved.numel() == 0 and output[0].numel() != 0
        ctx.save_for_backward(input, weight, bias, saved)
        ctx.save_for_forward(input, weight, bias, saved)
        ctx.set_materialize_grads(False)
        ctx.activation = activation, a, b
        ctx.has_bias = bias is not None
        ctx.pre_activation_numel = output[1].numel()

    @staticmethod
    def _saved(ctx, tensors):
        input, weight, bias, saved = tensors
        if ctx.missing:  # nobody said at forward that there would be a backward
            saved = linear(input, weight, bias, "identity", 0.0, 0.0)
        return input, weight, saved

    @staticmethod
    def backward(ctx, grad_output, grad_pre_activation):
        mask = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.has_bias and ctx.needs_input_grad[2]]
        input, weight, saved = _Linear._saved(ctx, ctx.saved_tensors)
        grads = [None, None, None]
        if grad_output is not None:
            grads = _backward(grad_output, saved, input, weight, *ctx.activation, mask)
        if grad_pre_activation is not None and ctx.pre_activation_numel:
            more = _backward(grad_pre_activation, None, input, weight, "identity", 0.0, 0.0, mask)
            grads = [_sum(x, y) for x, y in zip(grads, more, strict=True)]
        return *(grad if wanted else None for grad, wanted in zip(grads, mask, strict=True)), None, None, None, None

    @staticmethod
    @forward_mode
    def jvp(ctx, saved, input_t, weight_t, bias_t, *_):
        input, weight, saved = _Linear._saved(ctx, saved)
        tangent = _sum(
            None if input_t is None else linear(input_t, weight, None, "identity", 0.0, 0.0),
            None if weight_t is None else linear(input, weight_t, None, "identity", 0.0, 0.0),
        )
        if bias_t is not None:
            tangent = bias_t.expand(*input.shape[:-1], weight.shape[0]) if tangent is None else tangent + bias_t
        if tangent is None:
            return None, None
        output_t = _slope_times(tangent, saved, *ctx.activation)
        # An output may not share memory with another one.
        pre_activation_t = tangent.clone() if ctx.pre_activation_numel else tangent.new_zeros(0)
        return output_t, pre_activation_t

    @staticmethod
    def vmap(info, in_dims, input, weight, bias, activation, a, b, need_saved):
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


class _LinearBackward(torch.autograd.Function):
    """(grad_output, saved, input, weight, activation, a, b, output_mask) -> (grad_input, grad_weight, grad_bias).

    With gz = grad_output * f'(saved): gz W, gz^T x and the sum of gz's rows; 0 elements where output_mask says no.
    """

    @staticmethod
    def forward(*args):
        return _ops.linear_backward(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        grad_output, saved, input, weight, activation, a, b, output_mask = inputs
        ctx.save_for_backward(grad_output, saved, input, weight)
        ctx.save_for_forward(grad_output, saved, input, weight)
        ctx.set_materialize_grads(False)
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
        # The three gradients are linear in gz: for cotangents u of them, the gradient of gz is u_x W^T + x u_w^T + u_b.
        grad_output, saved, input, weight = ctx.saved_tensors
        u_x, u_w, u_b = (u if on else None for u, on in zip(cotangents, ctx.output_mask, strict=True))
        grad_gz = _sum(
            None if u_x is None else linear(u_x, weight, None, "identity", 0.0, 0.0),
            None if u_w is None else linear(input, u_w, None, "identity", 0.0, 0.0),
            None if u_b is None else u_b.expand_as(grad_output),
        )
        result = [None] * 8
        if grad_gz is None:
            return tuple(result)
        needed = ctx.needs_input_grad
        if needed[0]:
            result[0] = _slope_times(grad_gz, saved, *ctx.activation)
        if needed[1] and (change := _LinearBackward._slope_change(ctx, saved)) is not None:
            result[1] = grad_gz * grad_output * change
        if (needed[2] and u_w is not None) or (needed[3] and u_x is not None):
            gz = _slope_times(grad_output, saved, *ctx.activation)
            if needed[2] and u_w is not None:
                result[2] = _times(gz, u_w)
            if needed[3] and u_x is not None:
                result[3] = _times(_rows(gz).mT, _rows(u_x))
        return tuple(result)

    @staticmethod
    @forward_mode
    def jvp(ctx, saved, grad_t, saved_t, input_t, weight_t, *_):
        grad_output, saved, input, weight = saved
        change = None if saved_t is None else _LinearBackward._slope_change(ctx, saved)
        gz_t = _sum(
            None if grad_t is None else _slope_times(grad_t, saved, *ctx.activation),
            None if change is None else grad_output * change * saved_t,
        )
        gz = _slope_times(grad_output, saved, *ctx.activation)

        def product_rule(on, like, x, x_t, y, y_t):
            if not on:
                return gz.new_zeros(0)
            total = _sum(None if x_t is None else _times(x_t, y), None if y_t is None else _times(x, y_t))
            return torch.zeros_like(like) if total is None else total

        rows, rows_t = _rows(gz).mT, None if gz_t is None else _rows(gz_t).mT
        mask = ctx.output_mask
        return (
            product_rule(mask[0], input, gz, gz_t, weight, weight_t),
            product_rule(mask[1], weight, rows, rows_t, _rows(input), None if input_t is None else _rows(input_t)),
            (gz.new_zeros(gz.shape[-1]) if gz_t is None else _rows(gz_t).sum(0)) if mask[2] else gz.new_zeros(0),
        )

    @staticmethod
    def vmap(info, in_dims, grad_output, saved, input, weight, activation, a, b, output_mask):
        size = info.batch_size
        grad_output = to_front(grad_output, in_dims[0], size)
        saved = None if saved is None else to_front(saved, in_dims[1], size)
        if not output_mask[1] and not output_mask[2] and in_dims[3] is None:
            # One weight for all and only the input's gradient: the batch is one more leading dimension.
            input = to_front(input, in_dims[2], size)
            result = _backward(grad_output, saved, input, weight, activation, a, b, output_mask)
            return result, (0, None, None)
        gz = _slope_times(grad_output, saved, activation, a, b)
        input, weight = to_front(input, in_dims[2], size), to_front(weight, in_dims[3], size)
        shape = input.shape
        rows, columns = (x.unsqueeze(1) if x.dim() == 2 else x.flatten(1, -2) for x in (gz, input))
        none = gz.new_empty(0)
        return (
            torch.bmm(rows, weight).view(shape) if output_mask[0] else none,
            torch.bmm(rows.mT, columns) if output_mask[1] else none,
            rows.sum(1) if output_mask[2] else none,
        ), tuple(0 if on else None for on in output_mask)


def _forward_fake(input, weight, bias, activation, a, b, need_saved):
    output = input.new_empty((*input.shape[:-1], weight.shape[0]))
    saves = need_saved and activation != "identity" and saved_by_linear(activation, a, b) == "input"
    return output, input.new_empty(output.shape if saves else (0,))


def _backward_fake(grad_output, saved, input, weight, activation, a, b, output_mask):
    shapes = (input.shape, weight.shape, (weight.shape[0],))
    return tuple(grad_output.new_empty(shape if on else (0,)) for shape, on in zip(shapes, output_mask, strict=True))


def _forward_flops(input, weight, *_, **__):
    return 2 * math.prod(input) * weight[0]


def _backward_flops(grad_output, saved, input, weight, activation, a, b, output_mask, **__):
    return (output_mask[0] + output_mask[1]) * _forward_flops(input, weight)


def _decomposed(
    input: Tensor, weight: Tensor, bias: Tensor | None, activation: str, a: float, b: float, need_saved: bool
) -> tuple[Tensor, Tensor]:
    return decomposed_layer(F.linear(input, weight, bias), activation, a, b, need_saved)


_forward = through(_Linear, _ops.linear_forward)
_backward = through(_LinearBackward, _ops.linear_backward)
register("linear_forward", _Linear, _forward_fake, _forward_flops, _decomposed)
register("linear_backward", _LinearBackward, _backward_fake, _backward_flops)
