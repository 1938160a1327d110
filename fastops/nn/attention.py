"""torch.nn.MultiheadAttention and TransformerEncoderLayer on fastops' kernels: the same signatures and state_dict."""

from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.jit import is_scripting as _is_scripting

import fastops.functional as FF
from fastops._traced import traced_as
from fastops.nn.linear import Linear

__all__ = ["MultiheadAttention", "TransformerEncoderLayer"]

_TENSORS = (Tensor, nn.Parameter)


def _named_scripted(forward: FunctionType) -> FunctionType:
    """torch.nn's forward under another name, as which torch.jit.script compiles it beside ours."""
    code = forward.__code__
    function = FunctionType(code, forward.__globals__, "_scripted", forward.__defaults__, forward.__closure__)
    function.__annotations__ = forward.__annotations__
    return function


class MultiheadAttention(nn.MultiheadAttention):
    """softmax(Q K^T / sqrt(d)) V of several heads (Vaswani et al., 2017), with linear layers before and behind it.

    Args:
        embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype: as in
            torch.nn.MultiheadAttention.

    Three kernels compute a batch of sequences with need_weights=False, without dropout, add_bias_kv and add_zero_attn.
    All else is PyTorch's.

    Shape: query (N, L, E), key (N, S, kdim), value (N, S, vdim) with batch_first, else the first two swapped; result as
        query.
    Dtypes: float32, float64, bfloat16, float16; others go to PyTorch's kernels.
    Raises: what torch.nn.MultiheadAttention raises.
    Source: torch.nn.MultiheadAttention.

    >>> layer = fnn.MultiheadAttention(8, 2, batch_first=True)
    >>> x = torch.randn(3, 5, 8)
    >>> layer(x, x, x, need_weights=False)[0].shape
    torch.Size([3, 5, 8])
    """

    _scripted = _named_scripted(nn.MultiheadAttention.forward)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if _is_scripting():
            return self._scripted(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        if need_weights or (self.dropout and self.training) or not _takes(self, query, key, value):
            pass
        elif not is_causal or attn_mask is not None:
            mask, causal = attn_mask, False
            if is_causal and key_padding_mask is None:  # the mask says what is_causal says
                mask, causal = None, True
            elif mask is not None or key_padding_mask is not None:
                mask = _merged(self, query, key, mask, key_padding_mask)
            if mask is not NotImplemented:
                return _attend(self, query, key, value, mask, causal), None
        return nn.MultiheadAttention.forward(
            self, query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
        )


traced_as(MultiheadAttention.forward, nn.MultiheadAttention.forward)


def _is_dense(tensor: Any) -> bool:
    return type(tensor) in _TENSORS and tensor.layout is torch.strided and not tensor.is_nested


# Functions, and not methods: a forward that was bound before `restore_` must find them after it.
def _takes(layer: nn.MultiheadAttention, query: Any, key: Any, value: Any) -> bool:
    """Whether these are a batch of sequences, and the layer adds nothing to keys and values."""
    if layer.bias_k is not None or layer.bias_v is not None or layer.add_zero_attn:
        return False
    for tensor in (query, key, value):
        if not _is_dense(tensor) or tensor.dim() != 3:
            return False
    if query.shape[2] != layer.embed_dim or key.shape[:2] != value.shape[:2]:
        return False
    batch = 0 if layer.batch_first else 1
    return query.shape[batch] == key.shape[batch] and query.is_floating_point()


def _merged(
    layer: nn.MultiheadAttention, query: Tensor, key: Tensor, mask: Tensor | None, padding: Tensor | None
) -> Any:
    """The two masks as one that is added to the scores; NotImplemented for what PyTorch has to judge."""
    batch, length = (0, 1) if layer.batch_first else (1, 0)
    size, queries, keys = query.shape[batch], query.shape[length], key.shape[length]
    dtype = query.dtype
    for one in (mask, padding):
        if one is not None and (type(one) is not Tensor or not (one.dtype is torch.bool or one.is_floating_point())):
            return NotImplemented
    if padding is not None:
        if padding.shape != (size, keys):
            return NotImplemented
        padding = F._canonical_mask(padding, "key_padding_mask", F._none_or_dtype(mask), "attn_mask", dtype)
        padding = padding.view(size, 1, 1, keys)
    if mask is not None:
        mask = F._canonical_mask(mask, "attn_mask", None, "", dtype, False)
        if mask.shape == (queries, keys):
            mask = mask.view(1, 1, queries, keys)
        elif mask.shape == (size * layer.num_heads, queries, keys):
            mask = mask.view(size, layer.num_heads, queries, keys)
        else:
            return NotImplemented
    if mask is None or padding is None:
        return padding if mask is None else mask
    return mask + padding


def _attend(
    layer: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool
) -> Tensor:
    size, heads = layer.embed_dim, layer.num_heads
    weight, bias = layer.in_proj_weight, layer.in_proj_bias
    if weight is not None and query is key and key is value:
        q, k, v = FF.linear(query, weight, bias).chunk(3, -1)
    else:
        weights = weight.chunk(3) if weight is not None else (
            layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight
        )  # fmt: skip
        biases = (None,) * 3 if bias is None else bias.chunk(3)
        q, k, v = (FF.linear(*operands) for operands in zip((query, key, value), weights, biases, strict=True))
    order = (0, 2, 1, 3) if layer.batch_first else (1, 2, 0, 3)
    q, k, v = (t.unflatten(-1, (heads, size // heads)).permute(order) for t in (q, k, v))
    y = FF.scaled_dot_product_attention(q, k, v, mask, is_causal=causal)
    y = y.permute((0, 2, 1, 3) if layer.batch_first else (2, 0, 1, 3)).flatten(2)
    return FF.linear(y, layer.out_proj.weight, layer.out_proj.bias)


class TransformerEncoderLayer(nn.TransformerEncoderLayer):
    """Self-attention and two linear layers, each with a residual and a LayerNorm.

    Args:
        d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first, bias, device,
            dtype: as in torch.nn.TransformerEncoderLayer.

    Once `replace_` has made its attention and linear layers fastops', it calls them, in inference as well, where
    torch.nn's reads their weights and calls one kernel of PyTorch's.

    Shape: src (N, S, E) with batch_first, else (S, N, E); result the same.
    Dtypes: float32, float64, bfloat16, float16; others go to PyTorch's kernels.
    Raises: what torch.nn.TransformerEncoderLayer raises.
    Source: torch.nn.TransformerEncoderLayer.

    >>> layer = fnn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    >>> layer(torch.randn(3, 5, 8)).shape
    torch.Size([3, 5, 8])
    """

    _scripted = _named_scripted(nn.TransformerEncoderLayer.forward)

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        if _is_scripting():
            return self._scripted(src, src_mask, src_key_padding_mask, is_causal)
        ours = isinstance(self.self_attn, MultiheadAttention) and isinstance(self.linear1, Linear)
        if not ours or self.training or not _is_dense(src):
            return nn.TransformerEncoderLayer.forward(self, src, src_mask, src_key_padding_mask, is_causal)
        # What torch.nn's does where its fast path does not apply.
        padding = F._canonical_mask(
            src_key_padding_mask, "src_key_padding_mask", F._none_or_dtype(src_mask), "src_mask", src.dtype
        )
        mask = F._canonical_mask(src_mask, "src_mask", None, "", src.dtype, False)
        if self.norm_first:
            x = src + self._sa_block(self.norm1(src), mask, padding, is_causal=is_causal)
            return x + self._ff_block(self.norm2(x))
        x = self.norm1(src + self._sa_block(src, mask, padding, is_causal=is_causal))
        return self.norm2(x + self._ff_block(x))


traced_as(TransformerEncoderLayer.forward, nn.TransformerEncoderLayer.forward)
