"""The general door of the activations, prelu and glu. The fast doors are _C.relu, _C.prelu and so on."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastops._activations import ACTIVATIONS, PIECEWISE_LINEAR, by_torch, saved_by_linear
from fastops.ops import (
    forward_mode,
    needs_function,
    records,
    register,
    supported,
    through,
    to_front,
    viewed,
)

_ops = torch.ops.fastops


def activation(input: Tensor, kind: str, a: float, b: float) -> Tensor:
    """y = f(x), elementwise, differentiable to any order, forward and reverse.

    Shapes: any -> the same. float32, float64, bfloat16 or float16; the caller has checked `supported`.
    """
    # A mask follows the memory of the whole tensor: it has no batch dimension that a transform could see.
    need_mask = kind in PIECEWISE_LINEAR and records(input) and not needs_function()
    return _forward(input, kind, a, b, need_mask)[0]


def activation_(input: Tensor, kind: str, a: float, b: float) -> Tensor:
    """x becomes f(x), in its own memory; as `activation` otherwise."""
    # Backward may read the input as it was, and the copy below overwrites that.
    source = input.clone() if records(input) or needs_function() else input
    return input.copy_(activation(source, kind, a, b))


def prelu(input: Tensor, weight: Tensor) -> Tensor:
    """y = x > 0 ? x : w x. Shapes: input (N, C, *) with weight (C) or (1), or any input with weight (1)."""
    return _prelu_forward(input, viewed(weight))


def prelu_supports(input: Tensor, weight: Tensor) -> bool:
    """Whether `prelu` takes these tensors: supported, one dtype, one device, one weight or one for each channel."""
    if not (supported(input, on_gpu=True) and supported(weight, on_gpu=True)):
        return False
    if weight.dtype != input.dtype or weight.device != input.device or weight.dim() > 1 or input.dim() == 0:
        return False
    channels = input.shape[1] if input.dim() >= 2 else 1
    return weight.numel() == 1 or (weight.dim() == 1 and weight.shape[0] == channels)


def glu(input: Tensor, dim: int) -> Tensor:
    """x1 * sigmoid(x2) for the two halves of input along dim. Shapes: (*, 2n, *) -> (*, n, *)."""
    return _glu_forward(input, dim)


def glu_supports(input: Tensor, dim: int) -> bool:
    """Whether `glu` takes this tensor: supported, dim in range, its size even."""
    return supported(input, on_gpu=True) and -input.dim() <= dim < input.dim() and input.shape[dim] % 2 == 0


def slope_derivative(saved: Tensor, kind: str, a: float, b: float, saved_kind: str) -> Tensor | None:
    """The derivative of f' with respect to what backward reads: f''(x) from x, d f'/d y from y; None where it is zero.

    Made of differentiable torch ops, since its own derivatives must exist. Shapes: any -> the same.
    """
    if kind in PIECEWISE_LINEAR:
        return None
    return _ops.activation_second_derivative(saved, kind, a, b, saved_kind)


class _Activation(torch.autograd.Function):
    """(input, kind, a, b, need_mask) -> (output, mask), the mask a uint8 vector, 0 elements when not asked for."""

    @staticmethod
    def forward(*args):
        return _ops.activation_forward(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, kind, a, b, _ = inputs
        result, mask = output
        ctx.mark_non_differentiable(mask)
        ctx.set_materialize_grads(False)
        saved_kind = ACTIVATIONS[kind].saves
        if saved_kind == "mask" and mask.numel() == 0:
            saved_kind = "input"
        saved = mask if saved_kind == "mask" else result if saved_kind == "output" else input
        ctx.save_for_backward(saved)
        ctx.save_for_forward(saved)
        ctx.args = kind, a, b, saved_kind

    @staticmethod
    def backward(ctx, grad_output, _):
        if grad_output is None:
            return None, None, None, None, None
        return _backward(grad_output, *ctx.saved_tensors, *ctx.args), None, None, None, None

    @staticmethod
    @forward_mode
    def jvp(ctx, saved, input_t, *_):
        return _backward(input_t, *saved, *ctx.args), None

    @staticmethod
    def vmap(info, in_dims, input, kind, a, b, need_mask):
        output, mask = _forward(input, kind, a, b, False)
        return (output, mask), (in_dims[0], None)


class _ActivationBackward(torch.autograd.Function):
    """(grad_output, saved, kind, a, b, saved_kind) -> grad_input = grad_output * f'(saved)."""

    @staticmethod
    def forward(*args):
        return _ops.activation_backward(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        grad_output, saved, *args = inputs
        ctx.save_for_backward(grad_output, saved)
        ctx.save_for_forward(grad_output, saved)
        ctx.args = args

    @staticmethod
    def backward(ctx, cotangent):
        grad_output, saved = ctx.saved_tensors
        grad_grad = _backward(cotangent, saved, *ctx.args) if ctx.needs_input_grad[0] else None
        grad_saved = None
        if ctx.needs_input_grad[1] and (change := slope_derivative(saved, *ctx.args)) is not None:
            grad_saved = cotangent * grad_output * change
        return grad_grad, grad_saved, None, None, None, None

    @staticmethod
    @forward_mode
    def jvp(ctx, saved, grad_t, saved_t, *_):
        grad_output, saved = saved
        tangent = None if grad_t is None else _backward(grad_t, saved, *ctx.args)
        change = None if saved_t is None else slope_derivative(saved, *ctx.args)
        if change is not None:
            more = grad_output * change * saved_t
            tangent = more if tangent is None else tangent + more
        return torch.zeros_like(grad_output) if tangent is None else tangent

    @staticmethod
    def vmap(info, in_dims, grad_output, saved, kind, a, b, saved_kind):
        grad_output = to_front(grad_output, in_dims[0], info.batch_size)
        if saved_kind == "mask" and in_dims[1] is None:
            # The mask of one sample for all: its bytes do not line up with the batch, so the slopes are spelled out
            # once.
            slopes = _backward(torch.ones_like(grad_output[0]), saved, kind, a, b, saved_kind)
            return grad_output * slopes, 0
        if saved_kind == "mask":
            raise NotImplementedError("activation_backward: vmap over a mask; use saved_kind='input'")
        return _backward(grad_output, to_front(saved, in_dims[1], info.batch_size), kind, a, b, saved_kind), 0


def _channels(weight: Tensor, input: Tensor) -> Tensor:
    """prelu's weight, in a shape that broadcasts against input."""
    if weight.numel() == 1 or input.dim() < 2:
        return weight.reshape([1] * input.dim())
    return weight.view(-1, *[1] * (input.dim() - 2))


def _batched_channels(weight: Tensor, input: Tensor) -> Tensor:
    """The same for vmap: both have the batch in front."""
    if weight[0].numel() == 1 or input.dim() < 3:
        return weight.reshape(-1, *[1] * (input.dim() - 1))
    return weight.view(weight.shape[0], 1, -1, *[1] * (input.dim() - 3))


def _sum_to_weight(values: Tensor, weight: Tensor) -> Tensor:
    """The gradient of prelu's weight: the sum over everything but channels."""
    if weight.numel() == 1 or values.dim() < 2:
        return values.sum().reshape(weight.shape)
    return values.sum([d for d in range(values.dim()) if d != 1])


class _Prelu(torch.autograd.Function):
    """(input, weight) -> output."""

    @staticmethod
    def forward(input, weight):
        return _ops.prelu_forward(input, weight)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, grad_output):
        mask = [ctx.needs_input_grad[0], ctx.needs_input_grad[1]]
        grads = _prelu_backward(grad_output, *ctx.saved_tensors, mask)
        return tuple(grad if wanted else None for grad, wanted in zip(grads, mask, strict=True))

    @staticmethod
    @forward_mode
    def jvp(ctx, saved, input_t, weight_t):
        input, weight = saved
        tangent = torch.zeros_like(input)
        if input_t is not None:
            tangent = torch.where(input > 0, input_t, _channels(weight, input) * input_t)
        if weight_t is not None:
            tangent = tangent + torch.where(input > 0, 0.0, _channels(weight_t, input) * input)
        return tangent

    @staticmethod
    def vmap(info, in_dims, input, weight):
        size = info.batch_size
        if in_dims[1] is None and weight.numel() == 1:  # one weight for all: the batch is one more dimension
            # A leading dimension of one, so that prelu does not take a batch of scalars for channels.
            return _prelu_forward(to_front(input, in_dims[0], size).unsqueeze(0), weight).squeeze(0), 0
        input, weight = to_front(input, in_dims[0], size), to_front(weight, in_dims[1], size)
        return torch.where(input > 0, input, _batched_channels(weight, input) * input), 0


class _PreluBackward(torch.autograd.Function):
    """(grad_output, input, weight, output_mask) -> (grad_input, grad_weight), 0 elements where output_mask says no."""

    @staticmethod
    def forward(*args):
        return _ops.prelu_backward(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.output_mask = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, u_x, u_w):
        grad_output, input, weight = ctx.saved_tensors
        u_x, u_w = (u if on else None for u, on in zip((u_x, u_w), ctx.output_mask, strict=True))
        grad_grad = grad_input = grad_weight = None
        if u_x is not None:
            grad_grad = torch.where(input > 0, u_x, _channels(weight, input) * u_x)
            grad_weight = _sum_to_weight(torch.where(input > 0, 0.0, u_x * grad_output), weight)
        if u_w is not None:
            spread = _channels(u_w, input)
            more = torch.where(input > 0, 0.0, spread * input)
            grad_grad = more if grad_grad is None else grad_grad + more
            grad_input = torch.where(input > 0, 0.0, spread * grad_output)
        return grad_grad, grad_input, grad_weight, None

    @staticmethod
    @forward_mode
    def jvp(ctx, saved, grad_t, input_t, weight_t, _):
        grad_output, input, weight = saved
        zero = torch.zeros_like(input)
        grad_t = zero if grad_t is None else grad_t
        input_t = zero if input_t is None else input_t
        grad_input_t = torch.where(input > 0, grad_t, _channels(weight, input) * grad_t)
        if weight_t is not None:
            grad_input_t = grad_input_t + torch.where(input > 0, 0.0, _channels(weight_t, input) * grad_output)
        grad_weight_t = _sum_to_weight(torch.where(input > 0, 0.0, grad_t * input + grad_output * input_t), weight)
        none = input.new_zeros(0)
        return grad_input_t if ctx.output_mask[0] else none, grad_weight_t if ctx.output_mask[1] else none

    @staticmethod
    def vmap(info, in_dims, grad_output, input, weight, output_mask):
        size = info.batch_size
        grad_output, input = to_front(grad_output, in_dims[0], size), to_front(input, in_dims[1], size)
        weight = to_front(weight, in_dims[2], size)
        grad_input = torch.where(input > 0, grad_output, _batched_channels(weight, input) * grad_output)
        grad_weight = torch.where(input > 0, 0.0, grad_output * input)
        # Everything but the batch and, with a weight for each, the channels.
        keep = (0, 2) if weight[0].numel() > 1 and input.dim() > 2 else (0,)
        over = [d for d in range(input.dim()) if d not in keep]
        grad_weight = (grad_weight.sum(over) if over else grad_weight).reshape(weight.shape)
        none = input.new_empty(0)
        results = (grad_input if output_mask[0] else none, grad_weight if output_mask[1] else none)
        return results, tuple(0 if on else None for on in output_mask)


class _Glu(torch.autograd.Function):
    """(input, dim) -> output."""

    @staticmethod
    def forward(input, dim):
        return _ops.glu_forward(input, dim)

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, ctx.dim = inputs
        ctx.save_for_backward(input)
        ctx.save_for_forward(input)

    @staticmethod
    def backward(ctx, grad_output):
        return _glu_backward(grad_output, *ctx.saved_tensors, ctx.dim), None

    @staticmethod
    @forward_mode
    def jvp(ctx, saved, input_t, _):
        value, gate = saved[0].chunk(2, ctx.dim)
        value_t, gate_t = input_t.chunk(2, ctx.dim)
        s = torch.sigmoid(gate)
        return value_t * s + value * s * (1 - s) * gate_t

    @staticmethod
    def vmap(info, in_dims, input, dim):
        input = input.movedim(in_dims[0], 0)
        return _glu_forward(input, dim if dim < 0 else dim + 1), 0


class _GluBackward(torch.autograd.Function):
    """(grad_output, input, dim) -> grad_input."""

    @staticmethod
    def forward(*args):
        return _ops.glu_backward(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        grad_output, input, ctx.dim = inputs
        ctx.save_for_backward(grad_output, input)
        ctx.save_for_forward(grad_output, input)

    @staticmethod
    def _slopes(gate):
        """sigmoid and its first two derivatives."""
        s = torch.sigmoid(gate)
        ds = s * (1 - s)
        return s, ds, ds * (1 - 2 * s)

    @staticmethod
    def backward(ctx, cotangent):
        # grad_input is (g s, g x1 s') for halves x1, x2, s = sigmoid(x2).
        grad_output, input = ctx.saved_tensors
        value, gate = input.chunk(2, ctx.dim)
        u_value, u_gate = cotangent.chunk(2, ctx.dim)
        s, ds, dds = _GluBackward._slopes(gate)
        grad_grad = u_value * s + u_gate * value * ds
        grad_value = u_gate * grad_output * ds
        grad_gate = grad_output * (u_value * ds + u_gate * value * dds)
        return grad_grad, torch.cat([grad_value, grad_gate], ctx.dim), None

    @staticmethod
    @forward_mode
    def jvp(ctx, saved, grad_t, input_t, _):
        grad_output, input = saved
        value, gate = input.chunk(2, ctx.dim)
        s, ds, dds = _GluBackward._slopes(gate)
        value_part, gate_part = torch.zeros_like(value), torch.zeros_like(value)
        if grad_t is not None:
            value_part, gate_part = grad_t * s, grad_t * value * ds
        if input_t is not None:
            value_t, gate_t = input_t.chunk(2, ctx.dim)
            value_part = value_part + grad_output * ds * gate_t
            gate_part = gate_part + grad_output * (value_t * ds + value * dds * gate_t)
        return torch.cat([value_part, gate_part], ctx.dim)

    @staticmethod
    def vmap(info, in_dims, grad_output, input, dim):
        grad_output = to_front(grad_output, in_dims[0], info.batch_size)
        input = to_front(input, in_dims[1], info.batch_size)
        return _glu_backward(grad_output, input, dim if dim < 0 else dim + 1), 0


# Where the derivative takes the value of the piece inside, for the kinds that save a bit of that.
_INSIDE: dict[str, Callable[[Tensor, float, float], Tensor]] = {
    "relu": lambda x, a, b: ~(x <= 0),
    "relu6": lambda x, a, b: ~((x <= 0) | (x >= 6)),
    "leaky_relu": lambda x, a, b: x > 0,
    "hardtanh": lambda x, a, b: ~((x <= a) | (x >= b)),
    "hardsigmoid": lambda x, a, b: (x > -3) & (x < 3),
    "hardshrink": lambda x, a, b: ~((x >= -a) & (x <= a)),
    "softshrink": lambda x, a, b: ~((x >= -a) & (x <= a)),
    "threshold": lambda x, a, b: ~(x <= a),
}


def _decomposed(input: Tensor, activation: str, a: float, b: float, need_mask: bool) -> tuple[Tensor, Tensor]:
    y = by_torch(input, activation, a, b)
    if not need_mask or ACTIVATIONS[activation].saves != "mask":
        return y, input.new_empty(0, dtype=torch.uint8)
    bits = _INSIDE[activation](input, a, b).reshape(-1).to(torch.uint8)
    bytes = F.pad(bits, [0, -bits.shape[0] % 8]).reshape(-1, 8)
    return y, (bytes << torch.arange(8, dtype=torch.uint8, device=input.device)).sum(1, dtype=torch.uint8)


def decomposed_layer(z: Tensor, activation: str, a: float, b: float, need_saved: bool) -> tuple[Tensor, Tensor]:
    """The two results of a layer with an activation, from its pre-activation, in PyTorch's ops."""
    saves = need_saved and saved_by_linear(activation, a, b) == "input"
    return by_torch(z, activation, a, b), z if saves else z.new_empty(0)


_forward = through(_Activation, _ops.activation_forward)
_backward = through(_ActivationBackward, _ops.activation_backward)
_prelu_forward = through(_Prelu, _ops.prelu_forward)
_prelu_backward = through(_PreluBackward, _ops.prelu_backward)
_glu_forward = through(_Glu, _ops.glu_forward)
_glu_backward = through(_GluBackward, _ops.glu_backward)

register("activation_forward", _Activation, decomposition=_decomposed)
register("activation_backward", _ActivationBackward)
register("prelu_forward", _Prelu, decomposition=F.prelu)
register("prelu_backward", _PreluBackward)
register("glu_forward", _Glu, decomposition=F.glu)
register("glu_backward", _GluBackward)
