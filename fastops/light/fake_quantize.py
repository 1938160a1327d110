"""fastops.light.fake_quantize: numbers rounded to the levels of a quantized tensor, with a gradient to train by."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling as _is_compiling
from torch.overrides import handle_torch_function

from fastops import _C
from fastops.export import exports_aten
from fastops.functional._general import overrides
from fastops.ops.fake_quantize import by_torch
from fastops.ops.fake_quantize import fake_quantize as _general

__all__ = ["fake_quantize"]


def fake_quantize(
    input: Tensor,
    scale: Tensor | float,
    zero_point: Tensor | float = 0,
    quant_min: int = -128,
    quant_max: int = 127,
    axis: int | None = None,
) -> Tensor:
    """Rounds to the levels that a quantized tensor has: y = (q - zero_point) scale, quant_min <= q <= quant_max.

    q is round(input / scale) + zero_point for integers, halves to even, and round(input / scale + zero_point) for a
    float zero point; what is outside becomes the nearest level, NaN the lowest. Gradients go straight through the
    rounding: input's is that of the output where a level was in range, 0 elsewhere. Scales and zero points that require
    gradients get them, too ("learned step size").

    Forward and backward are one pass each. Backward keeps a byte for each element, or the input where scale or
    zero_point is learned.

    Args:
        input: float32, float64, bfloat16 or float16.
        scale: positive. A number or a float32 tensor: one number, or with `axis` one for each index along it.
        zero_point: as scale, or one number for all; int32, int64 or float32. Float32 to be learned.
        quant_min, quant_max: at most 2^20 in magnitude.
        axis: the dimension along which there are several, as in torch.fake_quantize_per_channel_affine.

    Shape:
        input (*), scale and zero_point () or (1), or (input.shape[axis]) -> (*), in input's dtype and memory order.

    Raises:
        TypeError: an argument is of another type. IndexError: there is no such axis.
        RuntimeError: shapes, dtypes, devices or levels do not fit.

    Source: torch.fake_quantize_per_tensor_affine and torch.fake_quantize_per_channel_affine, which give the same but at
    +inf, where their x86 kernels give quant_min. Jacob et al. (2018); Esser et al., "Learned Step Size Quantization"
    (2020).

    >>> from fastops import light
    >>> light.fake_quantize(torch.tensor([-0.3, 0.24, 0.26, 9.0]), 0.5, 0, -2, 1)
    tensor([-0.5000,  0.0000,  0.5000,  0.5000])
    """
    if not isinstance(input, Tensor):
        raise TypeError(f"fake_quantize: input must be a Tensor, got {type(input).__name__}")
    scale = _grid(scale, "scale", (), torch.float32, input)
    whole = isinstance(zero_point, int)
    zero_point = _grid(zero_point, "zero_point", scale.shape, torch.int32 if whole else torch.float32, input)
    for name, value in (("quant_min", quant_min), ("quant_max", quant_max), ("axis", axis)):
        if (type(value) is not int) and not (name == "axis" and value is None):
            raise TypeError(f"fake_quantize: {name} must be an int, got {type(value).__name__}")
    args = input, scale, zero_point, quant_min, quant_max, axis
    if not _is_compiling():
        result = _C.fake_quantize(*args)
        if result is not NotImplemented:
            return result
        if overrides(input, scale, zero_point):
            return handle_torch_function(fake_quantize, (input, scale, zero_point), *args)
    if exports_aten() or (not _is_compiling() and torch.jit.is_tracing()):
        return by_torch(*args)
    return _general(*args)


def _grid(value: Tensor | float, name: str, shape: Sequence[int], dtype: torch.dtype, input: Tensor) -> Tensor:
    if isinstance(value, Tensor):
        return value
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"fake_quantize: {name} must be a Tensor or a number, got {type(value).__name__}")
    return torch.full(shape, value, dtype=dtype, device=input.device)
