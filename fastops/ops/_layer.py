"""What linear and convolution share in the general door: y = f(z) for a z that is linear in input, in weight and in
bias, and its gradients, each of which is linear in two others.

An op `<name>_forward` takes (input, weight, bias, *geometry, activation, a, b, need_saved) and returns (output,
pre_activation). The pre-activation is an output of its own, 0 elements when it is not saved, so that a gradient of a
gradient finds its way through it to input, weight and bias. `<name>_backward` takes (grad_output, saved, input, weight,
*geometry, activation, a, b, output_mask) and returns (grad_input, grad_weight, grad_bias), 0 elements where output_mask
says no.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastops._activations import saved_by_linear
from fastops.ops import forward_mode, supported, through
from fastops.ops.activation import _backward as activation_backward
from fastops.ops.activation import slope_derivative


class Layer(NamedTuple):
    """The ops with their derivatives, and the Functions that hold these, for `register`."""

    forward: Callable[..., Any]
    backward: Callable[..., Any]
    functions: tuple[type[torch.autograd.Function], type[torch.autograd.Function]]


def alike(input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether there are kernels for these tensors, which have one dtype and are on one device."""
    tensors = (input, weight) if bias is None else (input, weight, bias)
    return all(supported(t, on_gpu=True) and t.dtype == input.dtype and t.device == input.device for t in tensors)


def slope_times(grad: Tensor, saved: Tensor | None, activation: str, a: float, b: float) -> Tensor:
    """grad * f'(saved)."""
    if activation == "identity":
        return grad
    kind = saved_by_linear(activation, a, b)
    return activation_backward(grad, saved, activation, a, b, kind)


def _slope_change(saved: Tensor, activation: str, a: float, b: float) -> Tensor | None:
    """The derivative of f' with respect to what was saved, or None where it is zero."""
    if activation == "identity":
        return None
    return slope_derivative(saved, activation, a, b, saved_by_linear(activation, a, b))


def _sum(*terms: Tensor | None) -> Tensor | None:
    total = None
    for term in terms:
        if term is not None:
            total = term if total is None else total + term
    return total


def layer(name: str, channels: int, vmap: Callable[..., Any], vmap_backward: Callable[..., Any]) -> Layer:
    """channels: the dimension of the output that the bias lies along. vmap: the Functions' rules."""
    forward_op, backward_op = (getattr(torch.ops.fastops, f"{name}_{way}") for way in ("forward", "backward"))

    def product(input: Tensor, weight: Tensor, geometry: Sequence[Any], bias: Tensor | None = None) -> Tensor:
        return forward(input, weight, bias, *geometry, "identity", 0.0, 0.0, False)[0]

    def gradient(which: int, gz: Tensor, input: Tensor, weight: Tensor, geometry: Sequence[Any]) -> Tensor:
        """The gradient of the input (which = 0) or the weight (1) of a layer without activation."""
        mask = [which == 0, which == 1, False]
        return backward(gz, None, input, weight, *geometry, "identity", 0.0, 0.0, mask)[which]

    def spread(bias: Tensor, size: Sequence[int]) -> Tensor:
        return bias.view(-1, *[1] * (len(size) - 1 - channels % len(size))).expand(size)

    def sum_to_bias(grad: Tensor) -> Tensor:
        return grad.movedim(channels, -1).reshape(-1, grad.shape[channels]).sum(0)

    def saved_of(ctx: Any, tensors: Sequence[Tensor | None]) -> tuple[Tensor, Tensor, Tensor | None]:
        input, weight, bias, saved = tensors
        if ctx.missing:  # nobody said at forward that there would be a backward
            saved = product(input, weight, ctx.geometry, bias)
        return input, weight, saved

    class Forward(torch.autograd.Function):
        @staticmethod
        def forward(*args):
            return forward_op(*args)

        @staticmethod
        def setup_context(ctx, inputs, output):
            input, weight, bias, *ctx.geometry, activation, a, b, need_saved = inputs
            from_input = activation != "identity" and saved_by_linear(activation, a, b) == "input"
            saved = None if activation == "identity" else output[1] if from_input else output[0]
            ctx.missing, ctx.has_pre_activation = from_input and not need_saved, from_input and need_saved
            ctx.save_for_backward(input, weight, bias, saved)
            ctx.save_for_forward(input, weight, bias, saved)
            ctx.set_materialize_grads(False)
            ctx.activation = activation, a, b
            ctx.has_bias = bias is not None
            ctx.output_size = output[0].shape

        @staticmethod
        def backward(ctx, grad_output, grad_pre_activation):
            mask = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.has_bias and ctx.needs_input_grad[2]]
            input, weight, saved = saved_of(ctx, ctx.saved_tensors)
            grads = [None, None, None]
            if grad_output is not None:
                grads = backward(grad_output, saved, input, weight, *ctx.geometry, *ctx.activation, mask)
            if grad_pre_activation is not None and ctx.has_pre_activation:
                plain = *ctx.geometry, "identity", 0.0, 0.0, mask
                more = backward(grad_pre_activation, None, input, weight, *plain)
                grads = [_sum(x, y) for x, y in zip(grads, more, strict=True)]
            grads = [grad if wanted else None for grad, wanted in zip(grads, mask, strict=True)]
            return *grads, *[None] * (len(ctx.geometry) + 4)

        @staticmethod
        @forward_mode
        def jvp(ctx, saved, input_t, weight_t, bias_t, *_):
            input, weight, saved = saved_of(ctx, saved)
            tangent = _sum(
                None if input_t is None else product(input_t, weight, ctx.geometry),
                None if weight_t is None else product(input, weight_t, ctx.geometry),
                None if bias_t is None else spread(bias_t, ctx.output_size),
            )
            if tangent is None:
                return None, None
            output_t = slope_times(tangent, saved, *ctx.activation)
            # An output may not share memory with another one.
            pre_activation_t = tangent.clone() if ctx.has_pre_activation else tangent.new_zeros(0)
            return output_t, pre_activation_t

    class Backward(torch.autograd.Function):
        """With gz = grad_output * f'(saved), each result is linear in gz."""

        @staticmethod
        def forward(*args):
            return backward_op(*args)

        @staticmethod
        def setup_context(ctx, inputs, output):
            *tensors, ctx.geometry = *inputs[:4], inputs[4:-4]
            *ctx.activation, ctx.output_mask = inputs[-4:]
            ctx.save_for_backward(*tensors)
            ctx.save_for_forward(*tensors)
            ctx.set_materialize_grads(False)

        @staticmethod
        def backward(ctx, *cotangents):
            # For cotangents u of the three gradients, the gradient of gz is z(u_x, w) + z(x, u_w) + u_b.
            grad_output, saved, input, weight = ctx.saved_tensors
            geometry = ctx.geometry
            u_x, u_w, u_b = (u if on else None for u, on in zip(cotangents, ctx.output_mask, strict=True))
            grad_gz = _sum(
                None if u_x is None else product(u_x, weight, geometry),
                None if u_w is None else product(input, u_w, geometry),
                None if u_b is None else spread(u_b, grad_output.shape),
            )
            result = [None] * (len(geometry) + 8)
            if grad_gz is None:
                return tuple(result)
            needed = ctx.needs_input_grad
            if needed[0]:
                result[0] = slope_times(grad_gz, saved, *ctx.activation)
            if needed[1] and (change := _slope_change(saved, *ctx.activation)) is not None:
                result[1] = grad_gz * grad_output * change
            if (needed[2] and u_w is not None) or (needed[3] and u_x is not None):
                gz = slope_times(grad_output, saved, *ctx.activation)
                if needed[2] and u_w is not None:
                    result[2] = gradient(0, gz, input, u_w, geometry)
                if needed[3] and u_x is not None:
                    result[3] = gradient(1, gz, u_x, weight, geometry)
            return tuple(result)

        @staticmethod
        @forward_mode
        def jvp(ctx, saved, grad_t, saved_t, input_t, weight_t, *_):
            grad_output, saved, input, weight = saved
            geometry, mask = ctx.geometry, ctx.output_mask
            change = None if saved_t is None else _slope_change(saved, *ctx.activation)
            gz_t = _sum(
                None if grad_t is None else slope_times(grad_t, saved, *ctx.activation),
                None if change is None else grad_output * change * saved_t,
            )
            gz = slope_times(grad_output, saved, *ctx.activation)

            def product_rule(which, like, changed):
                """changed: the other operand's tangent, in the place of (input, weight)."""
                if not mask[which]:
                    return gz.new_zeros(0)
                total = _sum(
                    None if gz_t is None else gradient(which, gz_t, input, weight, geometry),
                    None if changed is None else gradient(which, gz, *changed, geometry),
                )
                return torch.zeros_like(like) if total is None else total

            return (
                product_rule(0, input, None if weight_t is None else (input, weight_t)),
                product_rule(1, weight, None if input_t is None else (input_t, weight)),
                gz.new_zeros(0) if not mask[2] else sum_to_bias(torch.zeros_like(gz) if gz_t is None else gz_t),
            )

    Forward.vmap, Backward.vmap = staticmethod(vmap), staticmethod(vmap_backward)
    forward, backward = through(Forward, forward_op), through(Backward, backward_op)
    return Layer(forward, backward, (Forward, Backward))
