"""torch.nn.functional.scaled_dot_product_attention on fastops' kernels."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling as _is_compiling
from torch.overrides import handle_torch_function

from fastops import _C
from fastops.functional._general import general, overrides, show, torch_op
from fastops.ops import attention as _attention_ops
from fastops.ops import autocast

__all__ = ["scaled_dot_product_attention"]


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """softmax(scale Q K^T + mask) V for each head of each batch, without forming the probabilities as a whole.

    Args:
        query: (batch, heads, queries, size), float32, float64, bfloat16 or float16. Others go to PyTorch's kernels, and
            so do less than four queries of more than 64 keys.
        key, value: (batch, heads, keys, size) and (batch, heads, keys, value_size), in query's dtype.
        attn_mask: broadcastable to (batch, heads, queries, keys). Of bool: True where a query sees a key. Else it is
            added to the scores. One that needs a gradient goes to PyTorch's op.
        dropout_p: other than 0.0 goes to PyTorch's op.
        is_causal: query i sees the keys j <= i only.
        scale: a number; None: 1 / sqrt(size).
        enable_gqa: True goes to PyTorch's op.

    Returns:
        (batch, heads, queries, value_size) in query's dtype and, in memory, in query's order of dimensions. A query
        that sees no key gives zeros.

    Raises:
        RuntimeError: shapes, dtypes or devices do not fit. TypeError: an argument is not a Tensor.

    Source: Dao, Fu, Ermon, Rudra and Re, "FlashAttention" (2022);
    torch.nn.functional.scaled_dot_product_attention.

    >>> q, k = torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 2, 2)
    >>> FF.scaled_dot_product_attention(q, k, torch.tensor([[[[0.0, 4.0], [2.0, 0.0]]]]))
    tensor([[[[1., 2.]]]])
    """
    ours = dropout_p == 0.0 and enable_gqa is False and type(is_causal) is bool
    # PyTorch takes no mask with less than two dimensions.
    ours = ours and isinstance(scale, (float, int, type(None))) and getattr(attn_mask, "ndim", 2) >= 2
    if not _is_compiling():
        if ours:
            mask = _added(attn_mask, query)
            result = _C.scaled_dot_product_attention(query, key, value, mask, is_causal, scale)
            if result is not NotImplemented:
                return result
        tensors = (query, key, value) if attn_mask is None else (query, key, value, attn_mask)
        if overrides(*tensors):
            return handle_torch_function(
                scaled_dot_product_attention, tensors, query, key, value, attn_mask=attn_mask, dropout_p=dropout_p,
                is_causal=is_causal, scale=scale, enable_gqa=enable_gqa,
            )  # fmt: skip
    if ours and general(query, key, value, attn_mask) and not (is_causal and attn_mask is not None):
        q, k, v, mask = autocast(query, key, value, _added(attn_mask, query))
        anyway = _is_compiling() or not query.is_cpu or query.dim() != 4
        pays = anyway or _C.attention_pays(query.shape[2], key.shape[-2])
        if pays and _attention_ops.supports(q, k, v, mask):
            scale = 1 / math.sqrt(query.shape[-1]) if scale is None else float(scale)
            return _attention_ops.attention(q, k, v, mask, is_causal, scale)
    return torch_op(
        "scaled_dot_product_attention", _explain, F.scaled_dot_product_attention, query, key, value, attn_mask,
        dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa,
    )  # fmt: skip


def _added(mask: Any, query: Any) -> Any:
    """A mask of bool as one that is added to the scores; any other as it is."""
    if type(mask) is not Tensor or mask.dtype is not torch.bool or type(query) not in (Tensor, nn.Parameter):
        return mask
    return torch.zeros(mask.shape, dtype=query.dtype, device=mask.device).masked_fill_(~mask, -math.inf)


def _explain(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> str:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, Tensor):
            return f"{name} must be a Tensor, got {show(tensor)}"
        if tensor.dim() < 2:
            return f"{name} must have at least 2 dimensions, got {show(tensor)}"
        if tensor.dtype != query.dtype or tensor.device != query.device:
            return f"{name} must have query's dtype and device, {query.dtype} on {query.device}, got {show(tensor)}"
    if query.shape[-1] != key.shape[-1]:
        return f"key must have query's last size {query.shape[-1]}, got shape {tuple(key.shape)}"
    return ""
