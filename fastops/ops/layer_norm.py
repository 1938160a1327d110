"""The general door of layer_norm and rms_norm. The fast doors are _C.layer_norm and _C.rms_norm; both call
csrc/torch/layer_norm.cpp.

`dims` is the number of the last dimensions that are normalised. The op's other outputs, mean and rstd, have input's
shape with 1 for those. A gradient that will be differentiated is written in PyTorch's own ops.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastops.ops import forward_mode, needs_function, register, supported, through, to_front

_ops = torch.ops.fastops


def supports(input: Tensor, normalized_shape: tuple[int, ...], *parameters: Tensor | None, rms: bool) -> bool:
    """Whether there are kernels for these arguments; parameters: weight and bias."""
    dims = len(normalized_shape)
    if (
        not supported(input, on_gpu=True)
        or not 1 <= dims <= input.dim()
        or tuple(input.shape[-dims:]) != normalized_shape
    ):
        return False
    types = {input.dtype}
    if parameters[0] is not None and parameters[0].dtype == torch.float32 and input.dtype.itemsize == 2 and not rms:
        types = {torch.float32}  # 16-bit inputs may have float32 parameters
    return all(
        p is None
        or (
            supported(p, on_gpu=True)
            and p.dtype in types
            and p.device == input.device
            and tuple(p.shape) == normalized_shape
        )
        for p in parameters
    )


def layer_norm(input: Tensor, weight: Tensor | None, bias: Tensor | None, dims: int, eps: float) -> Tensor:
    """The caller has checked `supports`."""
    return _forward(input, weight, bias, dims, eps, False)[0]


def rms_norm(input: Tensor, weight: Tensor | None, dims: int, eps: float) -> Tensor:
    return _forward(input, weight, None, dims, eps, True)[0]


def _last(dims: int) -> list[int]:
    return list(range(-dims, 0))


def _statistics(input: Tensor, dims: int, eps: float, rms: bool) -> tuple[Tensor, Tensor, Tensor]:
    """input's deviation from the mean, mean and rstd, in the dtype of the latter two."""
    x = input.to(torch.promote_types(input.dtype, torch.float32))
    mean = x.new_zeros(0) if rms else x.mean(_last(dims), keepdim=True)
    centred = x if rms else x - mean
    return centred, mean, (centred.square().mean(_last(dims), keepdim=True) + eps).rsqrt()


def _gradients(
    grad: Tensor, input: Tensor, weight: Tensor | None, dims: int, eps: float, rms: bool, mask: list[bool]
) -> list[Tensor | None]:
    """layer_norm_backward in PyTorch's differentiable ops. It reads nothing of the forward pass but its operands."""
    centred, _, rstd = _statistics(input, dims, eps, rms)
    g, n, parameter = grad.to(rstd.dtype), centred * rstd, input if weight is None else weight
    results: list[Tensor | None] = [None, None, None]
    if mask[0]:
        g_n = g if weight is None else g * weight
        less = g_n if rms else g_n - g_n.mean(_last(dims), keepdim=True)
        results[0] = (rstd * (less - n * (g_n * n).mean(_last(dims), keepdim=True))).to(input.dtype)
    rows = list(range(input.dim() - dims))
    for i, term in ((1, g * n), (2, g)):
        if mask[i]:
            results[i] = (term.sum(rows) if rows else term).to(parameter.dtype)
    return results


class _LayerNorm(torch.autograd.Function):
    """(input, weight, bias, dims, eps, rms) -> (output, mean, rstd); mean has 0 elements if rms."""

    @staticmethod
    def forward(*args):
        return _ops.layer_norm_forward(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, weight, bias, *ctx.args = inputs
        _, mean, rstd = output
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(input, weight, mean, rstd)
        ctx.save_for_forward(input, weight)
        ctx.has_bias = bias is not None

    @staticmethod
    def backward(ctx, grad_output, *_):
        if grad_output is None:
            return (None,) * 6
        input, weight, mean, rstd = ctx.saved_tensors
        mask = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.has_bias and ctx.needs_input_grad[2]]
        if torch.is_grad_enabled() or needs_function():
            grads = _gradients(grad_output, input, weight, *ctx.args, mask)
        else:
            grads = _ops.layer_norm_backward(grad_output, input, mean, rstd, weight, *ctx.args, mask)
        return *(grad if wanted else None for grad, wanted in zip(grads, mask, strict=True)), None, None, None

    @staticmethod
    @forward_mode
    def jvp(ctx, saved, input_t, weight_t, bias_t, *_):
        (input, weight), (dims, eps, rms) = saved, ctx.args
        centred, _, rstd = _statistics(input, dims, eps, rms)
        n = centred * rstd
        output_t = torch.zeros_like(n)
        if input_t is not None:
            x_t = input_t if rms else input_t - input_t.mean(_last(dims), keepdim=True)
            output_t = rstd * (x_t - n * (n * x_t).mean(_last(dims), keepdim=True))
            output_t = output_t if weight is None else output_t * weight
        if weight_t is not None:
            output_t = output_t + n * weight_t
        if bias_t is not None:
            output_t = output_t + bias_t
        return output_t.to(input.dtype), None, None

    @staticmethod
    def vmap(info, in_dims, input, weight, bias, dims, eps, rms):
        input = to_front(input, in_dims[0], info.batch_size)
        if in_dims[1] is None and in_dims[2] is None:
            return _forward(input, weight, bias, dims, eps, rms), (0, None if rms else 0, 0)

        def spread(parameter, dim):
            """With dimensions of 1 between the batch and those that are normalised."""
            if dim is None:
                return parameter
            parameter = parameter.movedim(dim, 0)
            return parameter.reshape(info.batch_size, *[1] * (input.dim() - dims - 1), *parameter.shape[1:])

        wide = input.to(torch.promote_types(input.dtype, torch.float32))
        output, mean, rstd = _forward(wide, None, None, dims, eps, rms)
        if weight is not None:
            output = output * spread(weight, in_dims[1])
        if bias is not None:
            output = output + spread(bias, in_dims[2])
        return (output.to(input.dtype), mean, rstd), (0, None if rms else 0, 0)


class _LayerNormBackward(torch.autograd.Function):
    """(grad_output, input, mean, rstd, weight, dims, eps, rms, output_mask) -> the gradients of input, weight and bias,
    0 elements where output_mask says no.
    """

    @staticmethod
    def forward(*args):
        return _ops.layer_norm_backward(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        grad_output, input, _, _, weight, *ctx.args = inputs
        ctx.save_for_backward(grad_output, input, weight)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *cotangents):
        # mean and rstd are functions of input: their gradients are in that of input.
        mask = ctx.args[-1]
        given = [t is not None for t in ctx.saved_tensors]

        def gradients(*operands):
            operands = iter(operands)
            every = [next(operands) if there else None for there in given]
            return [g for g in _gradients(*every, *ctx.args) if g is not None]

        results, pull = torch.func.vjp(gradients, *(t for t in ctx.saved_tensors if t is not None))
        wanted = [u for u, on in zip(cotangents, mask, strict=True) if on]
        found = iter(pull([torch.zeros_like(r) if u is None else u for r, u in zip(results, wanted, strict=True)]))
        g, x, w = (next(found) if there else None for there in given)
        return g, x, None, None, w, None, None, None, None


def _decomposed(input, weight, bias, dims, eps, rms):
    shape = input.shape[-dims:]
    output = F.rms_norm(input, shape, weight, eps) if rms else F.layer_norm(input, shape, weight, bias, eps)
    _, mean, rstd = _statistics(input, dims, eps, rms)
    return output, mean, rstd


_forward = through(_LayerNorm, _ops.layer_norm_forward)

register("layer_norm_forward", _LayerNorm, decomposition=_decomposed)
register("layer_norm_backward", _LayerNormBackward)
