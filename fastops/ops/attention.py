"""The general door of scaled_dot_product_attention. The fast door is _C.scaled_dot_product_attention; both call
csrc/torch/attention.cpp.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastops.ops import forward_mode, needs_function, register, supported, through, to_front

_ops = torch.ops.fastops

_ON_GPU = frozenset([torch.float32, torch.float64])


def supports(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Whether there are kernels for these operands, (batch, heads, length, size) each."""
    if query.device.type != "cpu" and (query.dtype not in _ON_GPU or torch.is_autocast_enabled(query.device.type)):
        return False
    for tensor in (query, key, value):
        if (
            not supported(tensor, on_gpu=True)
            or tensor.dtype != query.dtype
            or tensor.device != query.device
            or tensor.dim() != 4
        ):
            return False
    if key.shape[:2] != query.shape[:2] or value.shape[:3] != key.shape[:3] or key.shape[3] != query.shape[3]:
        return False
    if mask is None:
        return True
    full = *query.shape[:3], key.shape[2]
    fits = mask.dim() <= 4 and all(n in (1, m) for n, m in zip(mask.shape[::-1], full[::-1], strict=False))
    fits = fits and supported(mask, on_gpu=True) and mask.dtype == query.dtype and mask.device == query.device
    return fits and not mask.requires_grad


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    """The caller has checked `supports`."""
    return _forward(query, key, value, mask, causal, scale)[0]


def _scores(query: Tensor, key: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    scores = query @ key.mT * scale
    if mask is not None:
        scores = scores + mask
    if causal:
        seen = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
        scores = scores.masked_fill(~seen, -math.inf)
    return scores


def _probabilities(query: Tensor, key: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    """In PyTorch's differentiable ops; zeros for a query that sees no key."""
    scores = _scores(query, key, mask, causal, scale)
    nothing = (scores == -math.inf).all(-1, keepdim=True)
    return scores.masked_fill(nothing, 0.0).softmax(-1).masked_fill(nothing, 0.0)


def _gradients(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float,
    wanted: list[bool],
) -> list[Tensor | None]:  # fmt: skip
    """attention_backward in PyTorch's differentiable ops."""
    p = _probabilities(query, key, mask, causal, scale)
    results: list[Tensor | None] = [None, None, None]
    if wanted[2]:
        results[2] = p.mT @ grad
    grad_p = grad @ value.mT
    d = p * (grad_p - (grad_p * p).sum(-1, keepdim=True)) * scale
    if wanted[0]:
        results[0] = d @ key
    if wanted[1]:
        results[1] = d.mT @ query
    return results


class _Attention(torch.autograd.Function):
    """(query, key, value, mask, causal, scale) -> (output, lse)."""

    @staticmethod
    def forward(*args):
        return _ops.attention_forward(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, causal, scale = inputs
        ctx.args = causal, scale
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *output)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx, grad_output, _):
        if grad_output is None:
            return (None,) * 6
        *tensors, output, lse = ctx.saved_tensors
        wanted = list(ctx.needs_input_grad[:3])
        if torch.is_grad_enabled() or needs_function():
            grads = _gradients(grad_output, *tensors, *ctx.args, wanted)
        else:
            grads = _ops.attention_backward(grad_output, *tensors, output, lse, *ctx.args, wanted)
        return *(grad if on else None for grad, on in zip(grads, wanted, strict=True)), None, None, None

    @staticmethod
    @forward_mode
    def jvp(ctx, saved, query_t, key_t, value_t, *_):
        query, key, value, mask = saved
        causal, scale = ctx.args
        p = _probabilities(query, key, mask, causal, scale)
        output_t = 0.0 if value_t is None else p @ value_t
        scores_t = 0.0 if query_t is None else query_t @ key.mT * scale
        if key_t is not None:
            scores_t = scores_t + query @ key_t.mT * scale
        if isinstance(scores_t, Tensor):
            p_t = p * (scores_t - (p * scores_t).sum(-1, keepdim=True))
            output_t = output_t + p_t @ value
        return output_t, None

    @staticmethod
    def vmap(info, in_dims, query, key, value, mask, causal, scale):
        # The batch becomes part of the batch.
        size, batch = info.batch_size, query.shape[0 if in_dims[0] != 0 else 1]
        tensors = [to_front(t, d, size).flatten(0, 1) for t, d in zip((query, key, value), in_dims[:3], strict=True)]
        if mask is not None:
            full = *tensors[0].shape[1:3], tensors[1].shape[2]
            mask = to_front(mask, in_dims[3], size)
            mask = mask.reshape(size, *[1] * (5 - mask.dim()), *mask.shape[1:]).expand(size, batch, *full).flatten(0, 1)
        results = _forward(*tensors, mask, causal, scale)
        return tuple(r.unflatten(0, (size, -1)) for r in results), (0, 0)


class _AttentionBackward(torch.autograd.Function):
    """(grad_output, query, key, value, mask, output, lse, causal, scale, output_mask) -> the gradients of query, key
    and value, 0 elements where output_mask says no.
    """

    @staticmethod
    def forward(*args):
        return _ops.attention_backward(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, _, _, causal, scale, wanted = inputs
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        ctx.args = causal, scale, wanted

    @staticmethod
    def backward(ctx, *cotangents):
        # output and lse are functions of the operands: their gradients are in those.
        *operands, mask = ctx.saved_tensors
        wanted = ctx.args[-1]

        def gradients(*operands):
            return [g for g in _gradients(*operands, mask, *ctx.args) if g is not None]

        results, pull = torch.func.vjp(gradients, *operands)
        given = [u for u, on in zip(cotangents, wanted, strict=True) if on]
        found = pull([torch.zeros_like(r) if u is None else u for r, u in zip(results, given, strict=True)])
        return *found, *(None,) * 6


def _decomposed(query, key, value, mask, causal, scale):
    output = F.scaled_dot_product_attention(query, key, value, mask, 0.0, causal, scale=scale)
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    return output, _scores(query, key, mask, causal, scale).to(wide).logsumexp(-1)


def _flops(query, key, value, *_, **__):
    batch, heads, queries, size = query
    return 2 * batch * heads * queries * key[2] * (size + value[3])


def _backward_flops(grad_output, query, key, value, *_, **__):
    batch, heads, queries, size = query
    return 2 * batch * heads * queries * key[2] * (3 * size + 2 * value[3])


_forward = through(_Attention, _ops.attention_forward)

register("attention_forward", _Attention, _flops, _decomposed)
register("attention_backward", _AttentionBackward, _backward_flops)
