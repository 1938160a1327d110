"""A linear layer with weights of 8 or 4 bits, integers or float8, which become float32 in registers."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastops import _C
from fastops.functional._activation import Activation
from fastops.light._quantized import QuantizedLinear, become
from fastops.ops.weight_only import by_torch, dequantized, weight_only

__all__ = ["LinearWeightOnly"]


class LinearWeightOnly(QuantizedLinear):
    """torch.nn.Linear with weights of 8 or 4 bits: y = f(x W^T + b), W = scale * weight + offset.

    Each `group_size` weights of a row share a scale: the largest of 8 bits stands for the group's largest magnitude
    (and there is no offset), those of 4 bits for 16 levels between its smallest and its largest weight. Weights of 8
    bits may also be float8 numbers (torch.float8_e4m3fn), which are finer near zero and coarser far from it; all of a
    row then share a scale. The input is not rounded. For one row and a few, which are bound by the time to read the
    weights, such a layer is faster than a float one. Many rows are an ordinary float32 product of weights that are
    unpacked on the way; `LinearInt8` is faster there.

    Gradients reach the input and the bias, not the weight.

    Args:
        in_features, out_features: any.
        bias: whether there is one.
        bits: 8 or 4.
        group_size: a power of two from 16 on; None for 128 with 4 bits and the whole row with 8.
        activation: f, as in fastops.nn.Linear.
        float8: whether the weights are float8_e4m3fn numbers; then bits is 8 and group_size None.

    Attributes:
        weight: int8 or float8_e4m3fn (out_features, in_features); or uint8 (out_features, (in_features + 1) // 2), two
            weights in a byte, the first in its low half; a buffer.
        scale, offset: (out_features, groups), float32, whatever the model is cast to; buffers. offset is None with 8
            bits.
        bias: (out_features), in the model's dtype; a parameter, or None.

    Shape:
        input (*, in_features), float32, bfloat16 or float16 -> (*, out_features) in input's dtype.

    Raises:
        ValueError: bits, group_size or float8 is not one of these. TypeError: from_linear gets another layer.
        RuntimeError: input's last dimension or dtype does not fit, or it is not on the CPU.

    Source: torchao's int8, int4 and float8 weight-only quantization; Frantar et al., "GPTQ" (2022), for the groups;
    Micikevicius et al., "FP8 Formats for Deep Learning" (2022), for e4m3.

    >>> from fastops import light
    >>> layer = light.LinearWeightOnly.from_linear(nn.Linear(256, 10), bits=4)
    >>> layer(torch.randn(256)).shape
    torch.Size([10])
    """

    _buffer_names = ("weight", "scale", "offset")
    float8 = False  # of layers that were pickled before there was any

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        bits: int = 8,
        group_size: int | None = None,
        activation: Activation = None,
        float8: bool = False,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        self.bits, self.float8 = bits, float8
        self.group_size = checked_group_size(bits, group_size, in_features, float8)
        become(self, type(self), torch.zeros(out_features, in_features), activation)

    @classmethod
    def from_linear(
        cls, linear: nn.Module, bits: int = 8, group_size: int | None = None, float8: bool = False
    ) -> "LinearWeightOnly":
        """A quantized copy of a linear layer, fastops' with an activation too; it shares the bias.

        >>> from fastops import light
        >>> light.LinearWeightOnly.from_linear(nn.Linear(64, 2), bits=4, group_size=32)
        LinearWeightOnly(in_features=64, out_features=2, bias=True, bits=4, group_size=32)
        """
        return cls._copy_of(linear, bits=bits, group_size=group_size, float8=float8)

    def dequantized(self) -> Tensor:
        """The weight as float32, (out_features, in_features).

        >>> from fastops import light
        >>> layer = light.LinearWeightOnly.from_linear(nn.Linear(64, 10))
        >>> layer.dequantized().shape
        torch.Size([10, 64])
        """
        return dequantized(self.weight, self.scale, self.offset, self.group_size, self.in_features)

    def extra_repr(self) -> str:
        text = f"{super().extra_repr()}, bits={self.bits}, group_size={self.group_size}"
        return f"{text}, float8=True" if self.float8 else text

    # pickle cannot load float8 tensors (torch 2.13); torch.save can.
    def __getstate__(self) -> dict[str, Any]:
        if not self.float8:
            return self.__dict__
        return {**self.__dict__, "_buffers": {**self._buffers, "weight": self.weight.view(torch.uint8)}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self.float8:
            self._buffers["weight"] = self.weight.view(torch.float8_e4m3fn)

    def _set(self, weight: Tensor) -> None:
        levels, scale, offset = quantized(weight, self.bits, self.group_size, self.float8)
        self.register_buffer("weight", levels)
        self.register_buffer("scale", scale)
        self.register_buffer("offset", offset)

    def _fast(self, input: Tensor, activation: tuple[int, float, float]) -> Any:
        return _C.weight_only(input, self.weight, self.scale, self.offset, self.bias, self.group_size, *activation)

    def _general(self, input: Tensor, bias: Tensor | None) -> Tensor:
        return weight_only(input, self.weight, self.scale, self.offset, bias, self.group_size)

    def _by_torch(self, input: Tensor, bias: Tensor | None) -> Tensor:
        return by_torch(input, self.weight, self.scale, self.offset, bias, self.group_size)


def checked_group_size(bits: int, group_size: int | None, in_features: int, float8: bool = False) -> int:
    """The group size for these arguments.

    Raises:
        ValueError: they are not those of a LinearWeightOnly.
    """
    if not isinstance(bits, int) or bits not in (8, 4):
        raise ValueError(f"bits must be 8 or 4, got {bits!r}")
    if float8 and (bits != 8 or group_size is not None):
        raise ValueError(f"float8 weights have 8 bits and no group_size, got bits={bits}, group_size={group_size!r}")
    if group_size is None:
        return 128 if bits == 4 else max(in_features, 1)
    if not isinstance(group_size, int) or group_size < 16 or group_size & (group_size - 1):
        raise ValueError(f"group_size must be a power of two from 16 on, or None, got {group_size!r}")
    return group_size


class Groups(NamedTuple):
    """A float32 weight (n, k) in groups, and the levels of each: W = scale q + offset = scale (q - zero)."""

    weight: Tensor  # (n, groups, group_size)
    scale: Tensor  # (n, groups, 1), as those below
    zero: Tensor | None  # None where there is no offset
    offset: Tensor | None


def grouped(weight: Tensor, bits: int, group_size: int, float8: bool = False) -> Groups:
    """A group with an infinity or NaN has the scale NaN."""
    n, k = weight.shape
    group_size = min(group_size, max(k, 1))
    groups = -(-k // group_size)
    w = weight.float()
    # The last group of a row may be short: its last weight is repeated, which changes neither end of its range.
    if groups * group_size > k:
        w = torch.cat([w, w[:, -1:].expand(n, groups * group_size - k)], 1)
    w = w.view(n, groups, group_size)
    if groups == 0:
        w = w.new_zeros(n, 0, 1)
    with torch.no_grad():
        low, high = w.detach().amin(2, keepdim=True), w.detach().amax(2, keepdim=True)
        finite = low.isfinite() & high.isfinite()
        zero = offset = None
        if bits == 8:
            largest = torch.finfo(torch.float8_e4m3fn).max if float8 else 127
            scale = torch.maximum(-low, high) / largest
        else:
            # Where all weights are one, that is level 0, whatever the scale.
            scale = torch.where(low == high, 1.0, high / 15 - low / 15)
        scale = torch.where(finite, scale.clamp(min=torch.finfo(torch.float32).tiny), torch.nan)
        if bits == 4:
            zero, offset = -low * (1 / scale), low
    return Groups(w, scale, zero, offset)


# Tensors made in inference mode cannot be saved for a backward, nor loaded into.
@torch.inference_mode(False)
def quantized(weight: Tensor, bits: int, group_size: int, float8: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
    """Weights (n, k) as the buffers weight, scale and offset. A group with an infinity or NaN has the scale NaN.

    Levels are those of fake_quantize, by which training sees them.
    """
    n, k = weight.shape
    w, scale, zero, offset = grouped(weight.detach(), bits, group_size, float8)
    if float8:
        most = torch.finfo(torch.float8_e4m3fn).max
        levels = (w / scale).nan_to_num(0).clamp(-most, most).to(torch.float8_e4m3fn)
    elif bits == 8:
        levels = torch.round(w * (1 / scale)).nan_to_num(0).clamp(-127, 127).to(torch.int8)
    else:
        levels = torch.round(w * (1 / scale) + zero).nan_to_num(0).clamp(0, 15).to(torch.uint8)
    levels = levels.flatten(1)[:, :k]
    if bits == 4:
        if k % 2:
            levels = torch.cat([levels, levels.new_zeros(n, 1)], 1)
        levels = levels[:, ::2] | levels[:, 1::2] << 4
    offset = None if offset is None else offset[..., 0].contiguous()
    return levels.contiguous(), scale[..., 0].contiguous(), offset
