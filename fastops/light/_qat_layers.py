"""Layers that are trained as what quantize_ would make of them: with fake quantization of weights and inputs."""

from typing import Any

import torch
from torch import Tensor, nn

import fastops.functional as FF
from fastops.light._quantized import Layer
from fastops.light.fake_quantize import fake_quantize
from fastops.light.linear_int8 import row_scales
from fastops.light.weight_only import grouped
from fastops.ops import autocast

_TINY = torch.finfo(torch.float32).tiny


class FakeQuantized(Layer):
    """y = f(x' W'^T + b), x' and W' rounded as a quantized layer rounds them. prepare_qat_ makes it and sets

    config: of quantize_. group_size, bits, float8: of weight-only layers, else None. symmetric, averaging: of
    "int8_static". plain: the class that the layer had.
    """

    _fastops_leaf = True  # a graph of fastops' calls it, and does not follow its forward
    config: str
    group_size: int | None
    bits: int | None
    float8: bool
    symmetric: bool
    averaging: float
    plain: type[nn.Module]
    input_low: Tensor
    input_high: Tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # Some tools make a layer of the class of another one: peft, of convolutions.
        raise TypeError(f"{type(self).__name__} is what light.prepare_qat_ makes of a layer, and cannot be constructed")

    @property
    def _buffer_names(self) -> tuple[str, ...]:
        return ("input_low", "input_high") if self.config == "int8_static" else ()

    def _layer(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        raise NotImplementedError

    def forward(self, input: Tensor) -> Tensor:
        traced = self._traced(input)
        if traced is not None:
            return traced
        x, bias = autocast(input, self.bias)
        if self.config == "int8_dynamic":
            x = by_rows(x)
        elif self.config == "int8_static":
            x = self._by_range(x)
        return self._layer(x, self.fake_weight(), bias)

    def fake_weight(self) -> Tensor:
        """The weight that the quantized layer would have, with the gradient of the weight."""
        w = self.weight
        if w.numel() == 0:
            return w
        if self.bits is None:
            with torch.no_grad():
                scale = row_scales(w.detach().flatten(1).float())
            return fake_quantize(w, scale, 0, -127, 127, axis=0)
        parts, scale, zero, _ = grouped(w, self.bits, self.group_size, self.float8)
        if self.float8:
            most = torch.finfo(torch.float8_e4m3fn).max
            levels = (parts.detach() / scale).nan_to_num(0).clamp(-most, most).to(torch.float8_e4m3fn)
            result = parts + (levels.float() * scale - parts).detach()
        else:
            low, high = (0, 15) if self.bits == 4 else (-127, 127)
            each = 0 if zero is None else zero.flatten()
            result = fake_quantize(parts.flatten(0, 1), scale.flatten(), each, low, high, axis=0)
        return result.reshape(w.shape[0], -1)[:, : w.shape[1]].to(w.dtype)

    def _by_range(self, input: Tensor) -> Tensor:
        if self.training and input.numel() > 0:
            self._observe(input.detach())
        with torch.no_grad():
            low, high = self.input_low.double().clamp(max=0), self.input_high.double().clamp(min=0)
            if self.symmetric:
                scale = (torch.maximum(-low, high) / 127).clamp(min=_TINY)
                zero = torch.full_like(scale, 128)
            else:
                scale = ((high - low) / 255).clamp(min=_TINY)
                zero = torch.round(-low / scale).clamp(0, 255)
            scale, zero = scale.float(), zero.float()
        y = fake_quantize(input, scale, zero, 0, 255)
        # What was never trained has no range yet, and is not rounded.
        return y if self.training else torch.where(self.input_low <= self.input_high, y, input)

    @torch.no_grad()
    def _observe(self, input: Tensor) -> None:
        """Moves the range towards that of a batch, or sets it at the first one. NaN and infinities change nothing."""
        low, high = (one.float() for one in torch.aminmax(input))
        first = self.input_low > self.input_high
        usable = low.isfinite() & high.isfinite()
        for old, new in ((self.input_low, low), (self.input_high, high)):
            moved = torch.where(first, new, old + self.averaging * (new - old))
            old.copy_(torch.where(usable, moved, old))

    def extra_repr(self) -> str:
        text = f"{super().extra_repr()}, config={self.config!r}"
        text += "" if self.group_size is None else f", group_size={self.group_size}"
        return text if self.activation is None else f"{text}, activation={self.activation!r}"


class QATLinear(FakeQuantized, nn.Linear):
    """torch.nn.Linear, prepared by prepare_qat_: input and weight are rounded as in the layer that it will become.

    Args, attributes, shapes and errors: as torch.nn.Linear; dtypes float32, bfloat16, float16 and float64. With
    "int8_static" there are the buffers input_low and input_high, (), float32: the moving range of the input.

    Source: Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference"
    (2018).

    >>> from fastops import light
    >>> model = nn.Sequential(nn.Linear(256, 256), nn.ReLU())
    >>> report = light.prepare_qat_(model, "int8_dynamic")
    >>> model[0]
    QATLinear(in_features=256, out_features=256, bias=True, config='int8_dynamic')
    """

    def _layer(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return FF.linear(input, weight, bias, activation=self.activation)


class QATConv2d(FakeQuantized, nn.Conv2d):
    """torch.nn.Conv2d, prepared by prepare_qat_ for "int8_static". All else is as in QATLinear.

    Args, shapes, dtypes and errors: as torch.nn.Conv2d. Source: as QATLinear.

    >>> from fastops import light
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3))
    >>> report = light.prepare_qat_(model, "int8_static")
    >>> model[0]
    QATConv2d(3, 8, kernel_size=(3, 3), stride=(1, 1), config='int8_static')
    """

    def _layer(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        geometry = self.stride, self.padding, self.dilation, self.groups
        return FF.conv2d(input, weight, bias, *geometry, activation=self.activation)


def by_rows(input: Tensor) -> Tensor:
    """What LinearInt8 rounds its input to: 256 levels between the ends of each row, 0 among them."""
    if input.numel() == 0:
        return input
    rows = input.reshape(-1, input.shape[-1])
    with torch.no_grad():
        low, high = (one.float() for one in torch.aminmax(rows.detach(), dim=1))
        low, high = low.clamp(max=0), high.clamp(min=0)
        scale = (high / 255 - low / 255).clamp(min=_TINY)
        zero = torch.round(-low * (1 / scale))
        # A row that holds an infinity or NaN is NaN.
        scale = torch.where(low.isfinite() & high.isfinite(), scale, torch.nan)
        zero = zero.nan_to_num(0).to(torch.int32)
    return fake_quantize(rows, scale, zero, 0, 255, axis=0).reshape(input.shape)


def set_options(module: nn.Module, **options: Any) -> None:
    """Makes a layer's class and state those of a prepared one; its parameters, hooks and name stay."""
    cls, activation, plain = options.pop("cls"), options.pop("activation"), type(module)
    module.__class__ = cls
    module.__dict__.update(plain=plain, **options)
    module.activation = activation
    if module.config == "int8_static":
        device = module.weight.device
        module.register_buffer("input_low", torch.tensor(torch.inf, device=device))
        module.register_buffer("input_high", torch.tensor(-torch.inf, device=device))


OPTIONS = ("config", "group_size", "bits", "float8", "symmetric", "averaging", "plain")


def drop_options(module: nn.Module) -> None:
    """The inverse, but for class and activation."""
    for name in OPTIONS:
        del module.__dict__[name]
    for name in ("input_low", "input_high"):
        module._buffers.pop(name, None)
