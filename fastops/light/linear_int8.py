"""A linear layer with int8 weights, whose input is rounded to 8 bits row by row."""

from typing import Any

import torch
from torch import Tensor, nn

from fastops import _C
from fastops.functional._activation import Activation
from fastops.light._quantized import QuantizedLinear, become
from fastops.ops.linear_int8 import by_torch, dequantized, linear_int8

__all__ = ["LinearInt8"]

MOST_FEATURES = 65536  # whose products of 8 bits fit 32 (linear_int8.h)


class LinearInt8(QuantizedLinear):
    """torch.nn.Linear with weights of 8 bits: y = f(x W^T + b), W = scale * weight.

    Each row of the input is rounded to 256 levels between its smallest and its largest element, and 0 is one of them.
    Products of 8-bit integers are summed exactly. A row that holds an infinity or NaN is NaN in the output. Results
    have the same bits on every processor and for any number of threads.

    The kernels keep a packed copy of the weight, which is made at the first call and again after the weight has
    changed; it is not saved. A few elements that are written through `weight.data` or NumPy go unnoticed. Gradients
    reach the input (past its rounding) and the bias, not the weight.

    Args:
        in_features: at most 65536.
        out_features: any.
        bias: whether there is one.
        activation: f, as in fastops.nn.Linear.

    Attributes:
        weight: (out_features, in_features), int8; a buffer.
        scale: (out_features), float32, whatever the model is cast to; a buffer.
        bias: (out_features), in the model's dtype; a parameter, or None.

    Shape:
        input (*, in_features), float32, bfloat16 or float16 -> (*, out_features) in input's dtype.

    Raises:
        ValueError: in_features is more than that. TypeError: from_linear gets another layer.
        RuntimeError: input's last dimension or dtype does not fit, or it is not on the CPU.

    Source: Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
    Inference" (2018); a scale for each row of the input as in torchao's int8 dynamic quantization.

    >>> from fastops import light
    >>> layer = light.LinearInt8.from_linear(nn.Linear(64, 10))
    >>> layer(torch.randn(3, 64)).shape
    torch.Size([3, 10])
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, activation: Activation = None) -> None:
        super().__init__()
        if in_features > MOST_FEATURES:
            raise ValueError(
                f"LinearInt8: in_features must be at most {MOST_FEATURES}, for sums of 32 bits, got {in_features}"
            )
        self.in_features, self.out_features = in_features, out_features
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        become(self, type(self), torch.zeros(out_features, in_features), activation)

    @classmethod
    def from_linear(cls, linear: nn.Module) -> "LinearInt8":
        """A quantized copy of a linear layer, fastops' with an activation too; it shares the bias.

        >>> from fastops import light
        >>> light.LinearInt8.from_linear(fnn.Linear(8, 2, activation="relu"))
        LinearInt8(in_features=8, out_features=2, bias=True, activation='relu')
        """
        return cls._copy_of(linear)

    def dequantized(self) -> Tensor:
        """The weight as float32, (out_features, in_features).

        >>> from fastops import light
        >>> layer = light.LinearInt8.from_linear(nn.Linear(64, 10))
        >>> layer.dequantized().dtype
        torch.float32
        """
        return dequantized(self.weight, self.scale, torch.float32)

    def _set(self, weight: Tensor) -> None:
        levels, scale = quantized(weight)
        self.register_buffer("weight", levels)
        self.register_buffer("scale", scale)

    def _fast(self, input: Tensor, activation: tuple[int, float, float]) -> Any:
        packed = self.__dict__.get("_packed")
        if packed is None:
            packed = self.__dict__["_packed"] = _C.Int8Weight()
        return packed(input, self.weight, self.scale, self.bias, *activation)

    def _general(self, input: Tensor, bias: Tensor | None) -> Tensor:
        return linear_int8(input, self.weight, self.scale, bias)

    def _by_torch(self, input: Tensor, bias: Tensor | None) -> Tensor:
        return by_torch(input, self.weight, self.scale, bias)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_packed"}


def row_scales(weight: Tensor) -> Tensor:
    """The scale (n) of each row of a float32 weight (n, k); NaN for a row that holds an infinity or NaN."""
    largest = weight.abs().amax(1) if weight.shape[1] > 0 else weight.new_zeros(weight.shape[0])
    scale = (largest / 127).clamp(min=torch.finfo(torch.float32).tiny)
    return torch.where(largest.isfinite(), scale, torch.nan)


# Tensors made in inference mode cannot be saved for a backward, nor loaded into.
@torch.inference_mode(False)
def quantized(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weights (n, k) as int8 between -127 and 127, and a float32 scale (n) for each row.

    A row that holds an infinity or NaN has the scale NaN. Levels are those of fake_quantize, by which training sees
    them: the weight times the inverse of the scale, rounded.
    """
    w = weight.float()
    scale = row_scales(w)
    levels = torch.round(w * (1 / scale).unsqueeze(1)).clamp(-127, 127).nan_to_num(0)
    return levels.to(torch.int8), scale
