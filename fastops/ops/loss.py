"""The general door of the losses. The fast doors are _C.cross_entropy and _C.mse_loss.

There are no rules for torch.func and forward-mode differentiation: fastops.functional gives those to PyTorch's own ops.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastops.ops import needs_function, register, supported

_ops = torch.ops.fastops


def cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None, reduction: str, ignore_index: int, label_smoothing: float
) -> Tensor:
    """-log softmax(input)[target] of class indices; the caller has checked `cross_entropy_supports`.

    Shapes: input (C), (N, C) or (N, C, *), target () or (N, *), weight (C).
    """
    return _ops.cross_entropy_forward(input, target, weight, reduction, ignore_index, label_smoothing)[0]


def cross_entropy_supports(input: Tensor, target: Tensor, weight: Tensor | None, label_smoothing: float) -> bool:
    """Whether `cross_entropy` takes these arguments."""
    if (
        needs_function()
        or not supported(input, on_gpu=True)
        or input.dim() == 0
        or type(target) not in (Tensor, type(input))
    ):
        return False
    if target.dtype != torch.int64 or target.device != input.device or target.dim() != input.dim() - 1:
        return False
    classes = input.shape[0 if input.dim() == 1 else 1]
    if tuple(target.shape) != (*input.shape[:1], *input.shape[2:])[: target.dim()] or input.numel() == 0:
        return False
    if weight is not None and not (
        supported(weight, on_gpu=True)
        and weight.dtype == input.dtype
        and weight.device == input.device
        and weight.shape == (classes,)
        and not weight.requires_grad
    ):
        return False
    return 0 <= label_smoothing <= 1


def mse_loss(input: Tensor, target: Tensor, reduction: str) -> Tensor:
    """(input - target)^2, their sum or mean. Shapes: any, both the same."""
    return _ops.mse_loss_forward(input, target, reduction)


def mse_supports(input: Tensor, target: Tensor) -> bool:
    """Whether `mse_loss` takes these tensors."""
    if needs_function() or not supported(input, on_gpu=True) or not supported(target, on_gpu=True):
        return False
    return target.dtype == input.dtype and target.device == input.device and target.shape == input.shape


def _terms(
    input: Tensor, target: Tensor, weight: Tensor | None, reduction: str, ignore_index: int, label_smoothing: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(factor, slope, probabilities, spread) of the gradient, factor * (slope * probabilities - spread).

    factor is that of a grad_output of ones.
    """
    dim = 0 if input.dim() == 1 else 1
    classes = input.shape[dim]
    counts = target != ignore_index
    index = target.masked_fill(~counts, 0)
    w = input.new_ones(classes) if weight is None else weight
    of_position = torch.where(counts, w[index], 0.0).to(input.dtype)
    factor = counts.to(input.dtype)
    if reduction == "mean":
        factor = torch.where(counts, factor / of_position.sum(), 0.0).to(input.dtype)
    of_all = label_smoothing / classes
    at_target = ((1 - label_smoothing) * of_position).unsqueeze(dim)
    slope = at_target + of_all * w.sum()
    shape = [classes if d == dim else 1 for d in range(input.dim())]
    one_hot = torch.zeros_like(input).scatter(dim, index.unsqueeze(dim), 1.0)
    return factor.unsqueeze(dim), slope, torch.softmax(input, dim), of_all * w.view(shape) + one_hot * at_target


class _CrossEntropy(torch.autograd.Function):
    """(input, target, weight, reduction, ignore_index, label_smoothing) -> (output, statistics)."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, target, weight, *ctx.args = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(input, target, weight, output[1])

    @staticmethod
    def backward(ctx, grad_output, _):
        if grad_output is None or not ctx.needs_input_grad[0]:
            return (None,) * 6
        input, target, weight, statistics = ctx.saved_tensors
        grad = _ops.cross_entropy_backward(grad_output, input, target, weight, statistics, *ctx.args)
        return grad, None, None, None, None, None


class _CrossEntropyBackward(torch.autograd.Function):
    """(grad_output, input, target, weight, statistics, reduction, ignore_index, label_smoothing) -> grad_input."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        grad_output, input, target, weight, _, *ctx.args = inputs
        ctx.save_for_backward(grad_output, input, target, weight)

    @staticmethod
    def backward(ctx, cotangent):
        grad_output, input, target, weight = ctx.saved_tensors
        dim = 0 if input.dim() == 1 else 1
        factor, slope, p, spread = _terms(input, target, weight, *ctx.args)
        grad_grad = grad_input = None
        if ctx.needs_input_grad[0]:
            grad_grad = (cotangent * factor * (slope * p - spread)).sum(dim)
            grad_grad = grad_grad if ctx.args[0] == "none" else grad_grad.sum()
        if ctx.needs_input_grad[1]:
            scale = factor * (grad_output.unsqueeze(dim) if ctx.args[0] == "none" else grad_output)
            weighted = p * cotangent
            grad_input = scale * slope * (weighted - p * weighted.sum(dim, keepdim=True))
        return grad_grad, grad_input, None, None, None, None, None, None


class _Mse(torch.autograd.Function):
    """(input, target, reduction) -> output."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, target, ctx.reduction = inputs
        ctx.save_for_backward(input, target)

    @staticmethod
    def backward(ctx, grad_output):
        mask = [ctx.needs_input_grad[0], ctx.needs_input_grad[1]]
        grads = _ops.mse_loss_backward(grad_output, *ctx.saved_tensors, ctx.reduction, mask)
        return *(grad if wanted else None for grad, wanted in zip(grads, mask, strict=True)), None


class _MseBackward(torch.autograd.Function):
    """(grad_output, input, target, reduction, output_mask) -> (grad_input, grad_target), 0 elements if unwanted."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        grad_output, input, target, ctx.reduction, ctx.output_mask = inputs
        ctx.save_for_backward(grad_output, input, target)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, u_x, u_t):
        grad_output, input, target = ctx.saved_tensors
        u_x, u_t = (u if on else None for u, on in zip((u_x, u_t), ctx.output_mask, strict=True))
        if u_x is None and u_t is None:
            return None, None, None, None, None
        u = -u_t if u_x is None else u_x if u_t is None else u_x - u_t
        norm = 2 / input.numel() if ctx.reduction == "mean" else 2
        grad_grad = norm * (input - target) * u
        grad_input = norm * grad_output * u
        return (grad_grad if ctx.reduction == "none" else grad_grad.sum()), grad_input, -grad_input, None, None


def _decomposed(
    input: Tensor, target: Tensor, weight: Tensor | None, reduction: str, ignore_index: int, label_smoothing: float
) -> tuple[Tensor, Tensor]:
    options = {"ignore_index": ignore_index, "reduction": reduction, "label_smoothing": label_smoothing}
    y = F.cross_entropy(input, target, weight, **options)
    dim = 0 if input.dim() == 1 else 1
    x = input if input.dtype == torch.float64 else input.float()
    top = x.amax(dim, keepdim=True)
    sums = (x - top).exp().sum(dim)
    counts = target != ignore_index
    w = x.new_ones(input.shape[dim]) if weight is None else weight.to(x.dtype)
    total = torch.where(counts, w[target.masked_fill(~counts, 0)], 0.0).sum()
    return y, torch.cat([top.flatten(), sums.flatten(), total.to(x.dtype).view(1)])


register("cross_entropy_forward", _CrossEntropy, decomposition=_decomposed)
register("cross_entropy_backward", _CrossEntropyBackward)
register(
    "mse_loss_forward",
    _Mse,
    decomposition=lambda input, target, reduction: F.mse_loss(input, target, reduction=reduction),
)
register("mse_loss_backward", _MseBackward)
