"""torch.nn's convolutions on fastops' kernels, plain and transposed, with activation=None.

    y = f(conv(x, w) + b) in one kernel, both directions.

Arguments but the last one, attributes, shapes, initialisation and padding modes are torch.nn's; errors: see
fastops.functional.conv2d. activation: None, a name ("relu", "gelu_tanh", ...) or an activation module without
parameters (nn.LeakyReLU(0.2)).
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling as _is_compiling

import fastops.functional as FF
from fastops import _C
from fastops.functional._activation import Activation
from fastops.nn._fused import Fused


class _Conv(Fused):
    """What the plain ones share."""

    _fast: Any  # the fast door
    _function: Any  # fastops.functional's

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
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: Any = None,
        activation: Activation = None,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype
        )
        if activation is not None:
            self.activation = activation

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = self._weight_and_bias()
        if self.activation is None and self.padding_mode == "zeros" and not _is_compiling():
            result = self._fast(input, weight, bias, self.stride, self.padding, self.dilation, self.groups, 0, 0.0, 0.0)
            if result is not NotImplemented:
                return result
        return self._conv_forward(input, weight, bias)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        padding = self.padding
        if self.padding_mode != "zeros":
            input, padding = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode), 0
        return self._function(input, weight, bias, self.stride, padding, self.dilation, self.groups, self.activation)


class _ConvTranspose(Fused):
    """What the transposed ones share."""

    _fast: Any
    _function: Any

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: Any = 1,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: Any = None,
        activation: Activation = None,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, output_padding, groups, bias, dilation,
            padding_mode, device, dtype,
        )  # fmt: skip
        if activation is not None:
            self.activation = activation

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        if self.padding_mode != "zeros":
            raise ValueError(f"Only `zeros` padding mode is supported for {type(self).__name__}")
        weight, bias = self._weight_and_bias()
        output_padding = self.output_padding
        if output_size is not None:
            dims = len(self.kernel_size)
            output_padding = tuple(
                self._output_padding(
                    input, output_size, self.stride, self.padding, self.kernel_size, dims, self.dilation
                )
            )
        args = input, weight, bias, self.stride, self.padding, output_padding, self.groups, self.dilation
        if self.activation is None and not _is_compiling():
            result = self._fast(*args, 0, 0.0, 0.0)
            if result is not NotImplemented:
                return result
        return self._function(*args, self.activation)


class Conv1d(_Conv, nn.Conv1d):
    """(batch, in_channels, length) -> (batch, out_channels, length); the batch may be missing."""

    _fast, _function = staticmethod(_C.conv1d), staticmethod(FF.conv1d)


class Conv2d(_Conv, nn.Conv2d):
    """(batch, in_channels, height, width) -> (batch, out_channels, height, width); the batch may be missing."""

    _fast, _function = staticmethod(_C.conv2d), staticmethod(FF.conv2d)


class Conv3d(_Conv, nn.Conv3d):
    """(batch, in_channels, depth, height, width) -> (batch, out_channels, ...); the batch may be missing."""

    _fast, _function = staticmethod(_C.conv3d), staticmethod(FF.conv3d)


class ConvTranspose1d(_ConvTranspose, nn.ConvTranspose1d):
    """(batch, in_channels, length) -> (batch, out_channels, length); the batch may be missing."""

    _fast, _function = staticmethod(_C.conv_transpose1d), staticmethod(FF.conv_transpose1d)


class ConvTranspose2d(_ConvTranspose, nn.ConvTranspose2d):
    """(batch, in_channels, height, width) -> (batch, out_channels, height, width); the batch may be missing."""

    _fast, _function = staticmethod(_C.conv_transpose2d), staticmethod(FF.conv_transpose2d)


class ConvTranspose3d(_ConvTranspose, nn.ConvTranspose3d):
    """(batch, in_channels, depth, height, width) -> (batch, out_channels, ...); the batch may be missing."""

    _fast, _function = staticmethod(_C.conv_transpose3d), staticmethod(FF.conv_transpose3d)
