"""Layers with int8 weights whose input is rounded to 8 bits with a scale that calibration has found."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.utils import _pair

import fastops.nn as fnn
from fastops import _C
from fastops.functional._activation import Activation
from fastops.light._observers import scale_and_zero
from fastops.light._quantized import Quantized, QuantizedLinear, activation_of, become
from fastops.light.linear_int8 import quantized
from fastops.ops.conv_int8 import POINTWISE, Geometry, by_torch, conv_int8, linear_int8_static

__all__ = ["Conv2dInt8", "LinearInt8Static"]

MOST_PRODUCTS = 65536  # of 8 bits, whose sum fits 32 (conv_int8.h)
_OPERANDS = ("weight", "scale", "input_scale", "input_zero")


class _Static(Quantized):
    """What both have: a scale and a zero point for the input, and for what the layer gives."""

    _fastops_leaf = True  # a graph of fastops' calls it, and does not follow its forward
    _buffer_names = ("weight", "scale", "input_scale", "input_zero", "output_scale", "output_zero")

    def _set(self, weight: Tensor) -> None:
        levels, scale = quantized(weight.flatten(1))
        self.register_buffer("weight", levels.view(weight.shape))
        self.register_buffer("scale", scale)
        if "input_scale" not in self._buffers:  # another weight changes no range
            self.set_range("input", 0.0, 1.0)
            self.set_range("output", 0.0, 1.0)

    @torch.inference_mode(False)
    def set_range(self, which: str, low: float, high: float, symmetric: bool = False) -> None:
        """Says between which numbers the levels of "input" or "output" lie.

        Args:
            which: one of these. The range of the output matters to fastops.freeze alone, where no layer that takes
                the output says what it wants.
            low, high: finite. 0 has a level, too, whatever they are.
            symmetric: 0 is the level in the middle, 128.

        Raises:
            ValueError: which is neither, or low and high are no range.

        >>> from fastops import light
        >>> layer = light.LinearInt8Static(64, 10)
        >>> layer.set_range("input", -1.0, 3.0)
        >>> float(layer.input_scale) * 255
        4.0
        """
        if which not in ("input", "output"):
            raise ValueError(f"set_range: which must be 'input' or 'output', got {which!r}")
        if not (math.isfinite(low) and math.isfinite(high) and low <= high):
            raise ValueError(f"set_range: low and high must be finite numbers, low <= high, got {low} and {high}")
        scale, zero = scale_and_zero(min(low, 0.0), max(high, 0.0), symmetric)
        device = self.weight.device
        self.register_buffer(f"{which}_scale", torch.tensor(scale, dtype=torch.float32, device=device))
        self.register_buffer(f"{which}_zero", torch.tensor(zero, dtype=torch.int32, device=device))

    def dequantized(self) -> Tensor:
        """The weight as float32, in its shape.

        >>> from fastops import light
        >>> light.LinearInt8Static(64, 10).dequantized().shape
        torch.Size([10, 64])
        """
        return self.weight * self.scale.view(-1, *[1] * (self.weight.dim() - 1))

    def _call(self, input: Tensor, activation: tuple[int, float, float], *geometry: Any) -> Any:
        packed = self.__dict__.get("_packed")
        if packed is None:
            packed = self.__dict__["_packed"] = _C.ConvInt8()
        buffers = self._buffers
        try:
            weight, scale, *scales = [buffers[name] for name in _OPERANDS]
        except KeyError:  # a parametrization computes one
            weight, scale, *scales = [getattr(self, name) for name in _OPERANDS]
        return packed(input, weight, scale, self.bias, *scales, *geometry, *activation)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_packed"}


class Conv2dInt8(_Static):
    """torch.nn.Conv2d with weights of 8 bits, whose input is rounded to 256 levels with a constant scale.

    y = f(conv(x, W) + b), W = scale * weight, one scale for each output channel. Products of 8-bit integers are summed
    exactly. Numbers outside of the range of the input become its ends, NaN the lowest level. Results have the same bits
    on every processor and for any number of threads.

    In a model, fastops.freeze goes further: what such layers hand on to each other stays in 8 bits.

    The kernels keep a packed copy of the weight, which is made at the first call and again after the weight or a scale
    has changed; it is not saved. A few elements that are written through `weight.data` or NumPy go unnoticed. Gradients
    reach the input, where it is within its range, and the bias, not the weight.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias: as in torch.nn.Conv2d.
            in_channels / groups times the kernel's size is at most 65536.
        activation: f, as in fastops.nn.Conv2d.

    Attributes:
        weight: (out_channels, in_channels / groups, kernel_height, kernel_width), int8; a buffer, as those below.
        scale: (out_channels), float32, whatever the model is cast to.
        input_scale, input_zero, output_scale, output_zero: (), float32 and int32. A level q of the input is
            input_scale * (q - input_zero). quantize_ finds them; set_range sets them.
        bias: (out_channels), in the model's dtype; a parameter, or None.

    Shape:
        input (batch, in_channels, height, width) or that without batch, float32, bfloat16 or float16 -> as
        torch.nn.Conv2d gives it, in input's dtype.

    Raises:
        ValueError: there are more products. TypeError: from_conv gets another layer.
        RuntimeError: input's shape or dtype does not fit, or it is not on the CPU.

    Source: Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
    Inference" (2018).

    >>> from fastops import light
    >>> layer = light.Conv2dInt8.from_conv(nn.Conv2d(3, 8, 3), low=-2.0, high=2.0)
    >>> layer(torch.randn(1, 3, 10, 10)).shape
    torch.Size([1, 8, 8, 8])
    """

    padding_mode = "zeros"
    _static_int8 = "conv2d"  # for fastops.freeze

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
        bias: bool = True,
        activation: Activation = None,
    ) -> None:
        super().__init__()
        like = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, device="meta"
        )  # which checks and completes the arguments
        if math.prod(like.weight.shape[1:]) > MOST_PRODUCTS:
            raise ValueError(
                f"Conv2dInt8: in_channels / groups times the kernel's size must be at most {MOST_PRODUCTS}, for sums "
                f"of 32 bits, got {math.prod(like.weight.shape[1:])}"
            )
        for name in _CONV_ATTRIBUTES:
            setattr(self, name, getattr(like, name))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        become(self, type(self), torch.zeros(like.weight.shape), activation)

    @classmethod
    def from_conv(cls, conv: nn.Module, low: float, high: float) -> "Conv2dInt8":
        """A quantized copy of a convolution, fastops' with an activation too; it shares the bias.

        low, high: the range of its input, see set_range.

        >>> from fastops import light
        >>> light.Conv2dInt8.from_conv(fnn.Conv2d(3, 8, 3, activation="relu"), 0.0, 1.0)
        Conv2dInt8(3, 8, kernel_size=(3, 3), stride=(1, 1), activation='relu')
        """
        why = "it is no torch.nn.Conv2d or fastops.nn.Conv2d"
        if isinstance(conv, (nn.Conv2d, fnn.Conv2d)):
            why = "" if conv.padding_mode == "zeros" else f"its padding_mode is {conv.padding_mode!r}, not 'zeros'"
        if why:
            raise TypeError(f"from_conv: conv must be a convolution that Conv2dInt8 can stand for: {why}")
        options = [getattr(conv, name) for name in _CONV_ATTRIBUTES]
        layer = cls(*options, bias=False, activation=activation_of(conv))
        layer.bias = conv.bias
        layer._set(conv.weight.detach())
        layer.set_range("input", low, high)
        return layer.train(conv.training)

    def _geometry(self) -> Geometry:
        dilation, kernel = _pair(self.dilation), self.weight.shape[2:]
        if self.padding == "same":
            total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
            padding = (*(one // 2 for one in total), *(one - one // 2 for one in total))
        else:
            padding = (0, 0, 0, 0) if self.padding == "valid" else (*_pair(self.padding), *_pair(self.padding))
        return Geometry(_pair(self.stride), padding, dilation, self.groups)

    def _fast(self, input: Tensor, activation: tuple[int, float, float]) -> Any:
        return self._call(input, activation, self.stride, self.padding, self.dilation, self.groups)

    def _general(self, input: Tensor, bias: Tensor | None) -> Tensor:
        return self._in_batch(conv_int8, input, bias, self._geometry())

    def _by_torch(self, input: Tensor, bias: Tensor | None) -> Tensor:
        return self._in_batch(by_torch, input, bias, *self._geometry())

    def _in_batch(self, function: Any, input: Tensor, bias: Tensor | None, *geometry: Any) -> Tensor:
        batch = input.unsqueeze(0) if input.dim() == 3 else input
        y = function(batch, self.weight, self.scale, bias, self.input_scale, self.input_zero, *geometry)
        return y.squeeze(0) if input.dim() == 3 else y

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        for name, plain in (("padding", (0, 0)), ("dilation", (1, 1)), ("groups", 1)):
            value = getattr(self, name)
            text += f", {name}={value}" if value != plain else ""
        text += ", bias=False" if self.bias is None else ""
        return text if self.activation is None else f"{text}, activation={self.activation!r}"


_CONV_ATTRIBUTES = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")


class LinearInt8Static(_Static, QuantizedLinear):
    """torch.nn.Linear with weights of 8 bits, whose input is rounded to 256 levels with a constant scale.

    LinearInt8 finds a scale for each row of its input as it comes. Here calibration has found one for all, so that what
    layers hand on to each other can stay in 8 bits (fastops.freeze). All else is as in Conv2dInt8.

    Args:
        in_features: at most 65536.
        out_features: any.
        bias: whether there is one.
        activation: f, as in fastops.nn.Linear.

    Attributes: see Conv2dInt8; weight is (out_features, in_features).

    Shape:
        input (*, in_features), float32, bfloat16 or float16 -> (*, out_features) in input's dtype.

    Raises:
        ValueError: in_features is more than that. TypeError: from_linear gets another layer.
        RuntimeError: input's last dimension or dtype does not fit, or it is not on the CPU.

    Source: as Conv2dInt8.

    >>> from fastops import light
    >>> layer = light.LinearInt8Static.from_linear(nn.Linear(64, 10), low=-2.0, high=2.0)
    >>> layer(torch.randn(3, 64)).shape
    torch.Size([3, 10])
    """

    _static_int8 = "linear"

    def __init__(self, in_features: int, out_features: int, bias: bool = True, activation: Activation = None) -> None:
        super().__init__()
        if in_features > MOST_PRODUCTS:
            raise ValueError(
                f"LinearInt8Static: in_features must be at most {MOST_PRODUCTS}, for sums of 32 bits, got {in_features}"
            )
        self.in_features, self.out_features = in_features, out_features
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        become(self, type(self), torch.zeros(out_features, in_features), activation)

    @classmethod
    def from_linear(cls, linear: nn.Module, low: float, high: float) -> "LinearInt8Static":
        """A quantized copy of a linear layer, fastops' with an activation too; it shares the bias.

        low, high: the range of its input, see set_range.

        >>> from fastops import light
        >>> light.LinearInt8Static.from_linear(fnn.Linear(8, 2, activation="relu"), 0.0, 1.0)
        LinearInt8Static(in_features=8, out_features=2, bias=True, activation='relu')
        """
        layer = cls._copy_of(linear)
        layer.set_range("input", low, high)
        return layer

    def _fast(self, input: Tensor, activation: tuple[int, float, float]) -> Any:
        return self._call(input, activation, None, None, None, None)

    def _general(self, input: Tensor, bias: Tensor | None) -> Tensor:
        return linear_int8_static(input, self.weight, self.scale, bias, self.input_scale, self.input_zero)

    def _by_torch(self, input: Tensor, bias: Tensor | None) -> Tensor:
        image = input.reshape(-1, input.shape[-1], 1, 1)
        filters = self.weight.unsqueeze(2).unsqueeze(3)
        y = by_torch(image, filters, self.scale, bias, self.input_scale, self.input_zero, *POINTWISE)
        return y.reshape(*input.shape[:-1], self.out_features)
