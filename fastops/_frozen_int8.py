"""The layers of a frozen model that compute in 8 bits (csrc/torch/conv_int8.cpp): what they hand on may be levels."""

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.utils import _pair

from fastops import _C
from fastops._activations import KIND
from fastops.functional._activation import resolve_activation, torch_activate
from fastops.ops.conv_int8 import rounded


def static_int8(module: nn.Module) -> str:
    """What fastops.light's Conv2dInt8 and LinearInt8Static are, "conv2d" and "linear"; "" for any other module."""
    return vars(type(module)).get("_static_int8", "")


class Levels(NamedTuple):
    """What a uint8 tensor stands for: scale * (level - zero)."""

    scale: float
    zero: int

    def of(self, value: Tensor) -> Tensor:
        return torch.round((value / self.scale + self.zero).clamp(0, 255)).to(torch.uint8)

    def values(self, levels: Tensor) -> Tensor:
        return (levels.float() - self.zero) * self.scale


class Numbers(NamedTuple):
    """What the kernel takes besides the weight (csrc/kernels/conv_int8/conv_int8.h), in float64.

    output: y_factor, y_offset, y_low and y_high; None where the output is a float tensor.
    """

    multiplier: Tensor
    offset: Tensor
    activation: tuple[str, float, float]
    output: tuple[float, float, int, int] | None
    residual_scale: float


class FrozenInt8(nn.Module):
    """f(layer(input) + residual), where input, residual and output are float tensors or levels.

    scale: of the weight, for each output, times the input's. given: the levels of the input. residual: those of the
    residual. result: those of the output, or None for a float tensor, of `dtype` where the input is levels. Images that
    it gives are channels_last.
    """

    addition: Callable[[Tensor, Any], Tensor] = operator.add

    def __init__(
        self,
        weight: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        geometry: tuple[Any, ...] | None,
        given: Levels,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale.double() * given.scale)
        self.register_buffer("bias", torch.zeros(len(weight)) if bias is None else bias.detach().float())
        self.geometry, self.given, self.dtype = geometry, given, dtype
        self.activation: Any = None
        self.adds = False
        self.residual: Levels | None = None
        self.result: Levels | None = None
        self._packed: Any = None

    def numbers(self) -> "Numbers":
        kind, a, b = resolve_activation(self.activation)
        scale, offset = self.scale.double(), self.bias.double()
        if self.residual is not None:
            offset = offset - self.residual.scale * self.residual.zero
        output, residual_scale, f = None, self.residual.scale if self.residual else 1.0, (kind, a, b)
        if self.result is not None and kind in ("identity", "relu", "relu6"):
            # In units of the output's levels: the activation is a matter of the lowest and the highest.
            step, zero = self.result
            scale, offset, residual_scale = scale / step, offset / step + zero, residual_scale / step
            high = min(255, round(6 / step) + zero) if kind == "relu6" else 255
            output = (1.0, 0.0, 0 if kind == "identity" else zero, high)
            f = ("identity", 0.0, 0.0)
        elif self.result is not None:
            output = (1 / self.result.scale, float(self.result.zero), 0, 255)
        return Numbers(scale, offset, f, output, residual_scale)

    def pack(self) -> Any:
        """The layer of csrc/torch/conv_int8.cpp."""
        n = self.numbers()
        kind, a, b = n.activation
        self._packed = _C.FrozenInt8(
            self.weight, n.multiplier, n.offset, *self.given, self.geometry, (KIND[kind], a, b), n.output,
            n.residual_scale, torch.empty(0, dtype=self.dtype),
        )  # fmt: skip
        return self._packed

    def call(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """forward, for tensors that are there."""
        packed = self.__dict__["_packed"] or self.pack()
        y = packed(input, residual)
        return self.forward(input, residual) if y is NotImplemented else y

    call_and_add = call

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """In PyTorch's ops."""
        dtype = self.dtype if input.dtype == torch.uint8 else input.dtype
        if input.dtype == torch.uint8:
            x = input.float() - self.given.zero
        else:
            x = rounded(input, torch.tensor(self.given.scale), torch.tensor(self.given.zero))
        shape = (-1,) if self.geometry is None else (-1, 1, 1)
        if self.geometry is None:
            y = F.linear(x, self.weight.float())
        else:
            stride, padding, dilation, groups = self.geometry
            y = F.conv2d(x, self.weight.float(), None, _pair(stride), padding, _pair(dilation), groups)
        y = y * self.scale.float().view(shape) + self.bias.view(shape)
        if residual is not None:
            y = y + (self.residual.values(residual) if residual.dtype == torch.uint8 else residual)
        y = torch_activate(y, *resolve_activation(self.activation))
        return y.to(dtype) if self.result is None else self.result.of(y)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, activation={self.activation!r}, result={self.result}"

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_packed": None}

    def _apply(self, *args: Any, **kwargs: Any) -> "FrozenInt8":
        scale, bias = self.scale, self.bias
        super()._apply(*args, **kwargs)
        if self.bias.dtype != bias.dtype:  # a cast is one of what float tensors are given
            self.dtype = self.bias.dtype
            self.scale, self.bias = scale.to(self.bias.device), bias.to(self.bias.device)
        self._packed = None
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._packed = None


class FrozenMaxPoolInt8(nn.Module):
    """max_pool2d of levels: the greatest of them stands for the greatest number."""

    adds, addition = False, None

    def __init__(
        self,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        dilation: Any = 1,
        ceil_mode: bool = False,
        return_indices: bool = False,
    ) -> None:
        super().__init__()
        self.windows = [*map(_pair, (kernel_size, stride or kernel_size, padding, dilation)), ceil_mode]

    def call(self, input: Tensor) -> Tensor:
        """forward, for tensors that are there."""
        y = _C.max_pool_int8(input, *self.windows)
        return self.forward(input) if y is NotImplemented else y

    def forward(self, input: Tensor) -> Tensor:
        """In PyTorch's ops."""
        return F.max_pool2d(input.float(), *self.windows).to(torch.uint8)


class FrozenAvgPoolInt8(nn.Module):
    """avg_pool2d or adaptive_avg_pool2d of levels, whose average is rounded once, to levels or to a float tensor.

    windows: the arguments of the function but for the input.
    """

    adds, addition = False, None

    def __init__(self, windows: dict[str, Any], given: Levels, result: Levels | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.windows, self.given, self.result, self.dtype = windows, given, result, dtype
        self.step, self.zero = result or Levels(1.0, 0)

    def call(self, input: Tensor) -> Tensor:
        """forward, for tensors that are there."""
        like = torch.empty(0, dtype=self.dtype) if self.result is None else None
        numbers = self.given.zero, self.given.scale / self.step, float(self.zero), like
        w = self.windows
        if "output_size" in w:
            y = _C.adaptive_avg_pool_int8(input, _pair(w["output_size"]), *numbers)
        else:
            pairs = map(_pair, (w["kernel_size"], w["stride"] or w["kernel_size"], w["padding"]))
            options = w["ceil_mode"], w["count_include_pad"], w["divisor_override"] or 0
            y = _C.avg_pool_int8(input, *pairs, *options, *numbers)
        return self.forward(input) if y is NotImplemented else y

    def forward(self, input: Tensor) -> Tensor:
        """In PyTorch's ops."""
        function = F.adaptive_avg_pool2d if "output_size" in self.windows else F.avg_pool2d
        y = function(self.given.values(input), **self.windows)
        return y.to(self.dtype) if self.result is None else self.result.of(y)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FrozenAvgPoolInt8":
        super()._apply(fn, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return self
