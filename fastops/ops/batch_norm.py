"""The general door of batch_norm: y = f(gamma (x - mean) rstd + beta + residual). The fast door is _C.batch_norm."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling as is_compiling

from fastops._activations import ACTIVATIONS, by_torch, saved_by_linear
from fastops.ops import forward_mode, needs_function, records, register, supported, through, to_front
from fastops.ops.activation import _backward as activation_backward

_ops = torch.ops.fastops
_aten = torch.ops.aten


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    residual: Tensor | None,
    activation: str,
    a: float,
    b: float,
) -> Tensor:
    """y = f(batch_norm(x) + residual), differentiable to any order, forward and reverse; updates running statistics.

    Shapes: input and residual (N, C, *), the others (C) -> (N, C, *). The caller has checked `supports`.
    """
    # A Function is recorded by what its transform sees, which records() does not.
    need_stats = needs_function() or records(input, weight, bias, residual)
    args = input, weight, bias, residual, running_mean, running_var, training, momentum, eps, activation, a, b
    output, _, mean, var = _forward(*args, need_stats)
    if training and running_mean is not None:
        # The op has no side effect, so that compilers may move it and autograd may record it.
        running_mean.copy_(mean.detach())
        running_var.copy_(var.detach())
    return output


def supports(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    eps: float,
    residual: Tensor | None,
) -> bool:
    """Whether `batch_norm` takes these: supported, on one device, fitting shapes; parameters of one dtype, input's or
    float32; what PyTorch refuses is refused."""
    parameters = [t for t in (running_mean, running_var, weight, bias) if t is not None]
    if not supported(input, on_gpu=True) or not all(
        supported(t, on_gpu=True) and t.device == input.device for t in parameters
    ):
        return False
    if len({t.dtype for t in parameters}) > 1:
        return False
    if parameters and parameters[0].dtype != input.dtype:
        mixed = parameters[0].dtype == torch.float32 and input.dtype in (torch.bfloat16, torch.float16)
        if not mixed:
            return False
    if residual is not None and not (
        supported(residual, on_gpu=True) and residual.dtype == input.dtype and residual.device == input.device
    ):
        return False
    if (eps <= 0 if training else eps < 0) or (not is_compiling() and input.numel() == 0):
        return False
    shapes = input.shape, input.shape[1:2]
    if input.dim() < 2 or any(t.shape != shapes[1] for t in parameters):
        return False
    if (residual is not None and residual.shape != shapes[0]) or (running_mean is None) != (running_var is None):
        return False
    if not training:
        return running_mean is not None
    return is_compiling() or input.numel() != input.shape[1]


def _others(input: Tensor) -> list[int]:
    """All dimensions but the channels'."""
    return [i for i in range(input.dim()) if i != 1]


def _statistics(input: Tensor, running: Sequence[Tensor | None], training: bool, eps: float) -> Tensor:
    """mean and rstd, (2, channels), in torch's ops."""
    wide = input.to(torch.float64 if input.dtype == torch.float64 else torch.float32)
    if training:
        var, mean = torch.var_mean(wide, _others(input), correction=0)
    else:
        mean, var = (t.to(wide.dtype) for t in running)
    return torch.stack([mean, (var + eps).rsqrt()])


def _normalized(input: Tensor, stats: Tensor, training: bool, eps: float) -> tuple[Tensor, Tensor]:
    """(x - mean) rstd and rstd, in stats' dtype, differentiable through the batch's own statistics."""
    wide = input.to(stats.dtype)
    shape = [1, -1] + [1] * (input.dim() - 2)
    if training:
        others = _others(input)
        deviation = wide - wide.mean(others, keepdim=True)
        rstd = (deviation.square().mean(others, keepdim=True) + eps).rsqrt()
    else:
        deviation, rstd = wide - stats[0].view(shape), stats[1].view(shape)
    return deviation * rstd, rstd


def _affine(normal: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    shape = [1, -1] + [1] * (normal.dim() - 2)
    z = normal if weight is None else normal * weight.to(normal.dtype).view(shape)
    if bias is not None:
        z = z + bias.to(normal.dtype).view(shape)
    return z if residual is None else z + residual


def _saves_output(activation: str, a: float, b: float, residual: Tensor | None) -> bool:
    return residual is not None and saved_by_linear(activation, a, b) == "output"


def _in_torch(input, weight, bias, residual, stats, training, eps, activation, a, b):
    """The output in differentiable torch ops."""
    z = _affine(_normalized(input, stats, training, eps)[0], weight, bias, residual).to(input.dtype)
    return by_torch(z, activation, a, b)


def _gradients_in_torch(
    grad_output, input, weight, bias, saved, stats, training, eps, activation, a, b, output_mask
) -> tuple[Tensor, ...]:
    """The results of batch_norm_backward that output_mask asks for, in differentiable torch ops."""
    normal, rstd = _normalized(input, stats, training, eps)
    g = grad_output
    if activation != "identity":
        kind = saved_by_linear(activation, a, b)
        if not _saves_output(activation, a, b, saved):
            saved = _affine(normal, weight, bias, saved).to(input.dtype)
            kind = "output" if ACTIVATIONS[activation].saves == "output" else "input"
            if kind == "output":
                saved = by_torch(saved, activation, a, b)
        g = activation_backward(grad_output, saved, activation, a, b, kind)
    wide, others, result = g.to(normal.dtype), _others(input), []
    if output_mask[0]:
        inner = wide
        if training:
            inner = wide - wide.mean(others, keepdim=True) - normal * (wide * normal).mean(others, keepdim=True)
        result.append(_affine(inner * rstd, weight, None, None).to(input.dtype))
    parameters = weight if weight is not None else bias if bias is not None else input
    if output_mask[1]:
        result.append((wide * normal).sum(others).to(parameters.dtype))
    if output_mask[2]:
        result.append(wide.sum(others).to(parameters.dtype))
    if output_mask[3]:
        result.append(g)
    return tuple(result)


def _of_given(function: Callable[..., Any], args: Sequence[Any], given: Sequence[int]) -> Callable[..., Any]:
    """function(*args) as a function of the arguments with these indices."""

    def call(*values: Any) -> Any:
        full = list(args)
        for index, value in zip(given, values, strict=True):
            full[index] = value
        return function(*full)

    return call


def _jvp(function: Callable[..., Any], args: Sequence[Any], tangents: Sequence[Any]) -> Any:
    """The derivative of function(*args) along the tangents that are not None, as a vjp of its vjp, which is linear."""
    given = [i for i, t in enumerate(tangents) if isinstance(t, Tensor)]
    outputs, pullback = torch.func.vjp(_of_given(function, args, given), *[args[i] for i in given])
    zeros = torch.zeros_like(outputs) if isinstance(outputs, Tensor) else tuple(map(torch.zeros_like, outputs))
    _, pushforward = torch.func.vjp(pullback, zeros)
    return pushforward(tuple(tangents[i] for i in given))[0]


class _BatchNorm(torch.autograd.Function):
    """(input, weight, bias, residual, running_mean, running_var, training, momentum, eps, activation, a, b, need_stats)
    -> (output, stats, new running_mean, new running_var); what is not asked for has 0 elements."""

    @staticmethod
    def forward(*args):
        return _ops.batch_norm_forward(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, weight, bias, residual, *running, training, _, eps, activation, a, b, need_stats = inputs
        result, stats, *new = output
        ctx.mark_non_differentiable(stats, *new)
        ctx.set_materialize_grads(False)
        ctx.saves_output = _saves_output(activation, a, b, residual)
        saved = None if activation == "identity" else result if ctx.saves_output else residual
        # Without statistics nobody said at forward that there would be a backward.
        tensors = input, weight, bias, saved, *((stats, None) if need_stats else running)
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.need_stats, ctx.args = need_stats, (training, eps, activation, a, b)
        ctx.given = [t is not None for t in (input, weight, bias, residual)]

    @staticmethod
    def _operands(ctx, tensors):
        *operands, stats, var = tensors
        if not ctx.need_stats:
            stats = _statistics(operands[0], (stats, var), *ctx.args[:2])
        return *operands, stats

    @staticmethod
    def backward(ctx, grad_output, *_):
        if grad_output is None:
            return (None,) * 13
        mask = [on and given for on, given in zip(ctx.needs_input_grad[:4], ctx.given, strict=True)]
        grads = _backward(grad_output, *_BatchNorm._operands(ctx, ctx.saved_tensors), *ctx.args, mask)
        return *[grad if on else None for grad, on in zip(grads, mask, strict=True)], *[None] * 9

    @staticmethod
    @forward_mode
    def jvp(ctx, saved, *tangents):
        input, weight, bias, saved, stats = _BatchNorm._operands(ctx, saved)
        given = [t if isinstance(t, Tensor) else None for t in tangents[:4]]
        if ctx.saves_output:
            # z is not known without the residual; its derivative follows from y.
            residual_t, given[3] = given[3], None
            tangent = residual_t
            if any(t is not None for t in given):
                plain = input, weight, bias, None, stats, *ctx.args[:2], "identity", 0.0, 0.0
                tangent = _jvp(_in_torch, plain, given)
                tangent = tangent if residual_t is None else tangent + residual_t
            output_t = activation_backward(tangent, saved, *ctx.args[2:], "output")
        else:
            residual = saved
            if residual is None and given[3] is not None:  # of the identity, which saves none
                residual = torch.zeros_like(given[3])
            output_t = _jvp(_in_torch, (input, weight, bias, residual, stats, *ctx.args), given)
        return output_t, None, None, None

    @staticmethod
    def vmap(info, in_dims, *args):
        size = info.batch_size
        folded = [_fold(args[i], in_dims[i], size, vector=i not in (0, 3)) for i in range(6)]
        results = _forward(*folded, *args[6:])
        return _unfold(results, (1, 1, 0, 0), [t.numel() > 0 for t in results], size)


def _fold(tensor: Tensor | None, dim: int | None, size: int, vector: bool) -> Tensor | None:
    """For vmap: the batch becomes part of the channels, which are (batch, C) where they were (C)."""
    if tensor is None:
        return None
    front = to_front(tensor, dim, size)
    return front.reshape(-1) if vector else front.movedim(0, 1).flatten(1, 2)


def _unfold(results: Sequence[Tensor], dims: Sequence[int], there: Sequence[bool], size: int) -> tuple[Any, Any]:
    """The results with their batch in dimension `dims`, of those that are there, for vmap's rule to return."""
    tensors = (r.unflatten(dim, (size, -1)) if on else r for r, dim, on in zip(results, dims, there, strict=True))
    return tuple(tensors), tuple(dim if on else None for dim, on in zip(dims, there, strict=True))


class _BatchNormBackward(torch.autograd.Function):
    """(grad_output, input, weight, bias, saved, stats, training, eps, activation, a, b, output_mask) -> the
    gradients of input, weight, bias and residual; 0 elements where output_mask says no."""

    @staticmethod
    def forward(*args):
        return _ops.batch_norm_backward(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:6])
        ctx.save_for_forward(*inputs[:6])
        ctx.set_materialize_grads(False)
        ctx.args, ctx.output_mask = inputs[6:], inputs[-1]

    @staticmethod
    def backward(ctx, *cotangents):
        operands = ctx.saved_tensors
        given = [i for i in range(5) if operands[i] is not None and ctx.needs_input_grad[i]]
        result = [None] * 12
        if all(u is None for u in cotangents):
            return tuple(result)
        outputs, pullback = torch.func.vjp(
            _of_given(_gradients_in_torch, (*operands, *ctx.args), given), *[operands[i] for i in given]
        )
        wanted = [u for u, on in zip(cotangents, ctx.output_mask, strict=True) if on]
        us = tuple(torch.zeros_like(o) if u is None else u for u, o in zip(wanted, outputs, strict=True))
        for i, grad in zip(given, pullback(us), strict=True):
            result[i] = grad
        return tuple(result)

    @staticmethod
    @forward_mode
    def jvp(ctx, saved, *tangents):
        derivatives = iter(_jvp(_gradients_in_torch, (*saved, *ctx.args), [*tangents[:5], None]))
        return tuple(next(derivatives) if on else saved[0].new_zeros(0) for on in ctx.output_mask)

    @staticmethod
    def vmap(info, in_dims, *args):
        size = info.batch_size
        folded = [_fold(args[i], in_dims[i], size, vector=i in (2, 3)) for i in range(6)]
        return _unfold(_backward(*folded, *args[6:]), (1, 0, 0, 1), args[-1], size)


def _decomposed(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    activation: str,
    a: float,
    b: float,
    need_stats: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    none = input.new_empty(0)
    mean, var = (none if t is None else t.new_empty(0) for t in (running_mean, running_var))
    if not training:
        z = _aten._native_batch_norm_legit_no_training(input, weight, bias, running_mean, running_var, momentum, eps)[0]
    elif running_mean is None:
        z = _aten._native_batch_norm_legit.no_stats(input, weight, bias, True, momentum, eps)[0]
    else:
        z, _, _, mean, var = _aten._native_batch_norm_legit_functional(
            input, weight, bias, running_mean, running_var, True, momentum, eps
        )
    stats = _statistics(input, (running_mean, running_var), training, eps)
    if residual is not None:
        z = z + residual
    return by_torch(z, activation, a, b), stats if need_stats else stats.new_empty(0), mean, var


_forward = through(_BatchNorm, _ops.batch_norm_forward)
_backward = through(_BatchNormBackward, _ops.batch_norm_backward)
register("batch_norm_forward", _BatchNorm, decomposition=_decomposed)
register("batch_norm_backward", _BatchNormBackward)
