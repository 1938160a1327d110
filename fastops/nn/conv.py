"""torch.nn's convolutions on fastops' kernels, plain and transposed, with activation=None."""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling as _is_compiling
from torch.jit import is_scripting as _is_scripting
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

import fastops.functional as FF
from fastops import _C
from fastops.functional._activation import Activation
from fastops.nn._fused import Fusable, Fused, pair, scripted_activation, weight_and_bias

__all__ = ["Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d"]


class _Conv(Fusable):
    """The plain ones' arguments."""

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


class _ConvTranspose(Fusable):
    """The transposed ones' arguments."""

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


class _FusedConv(Fused):
    """What torch.jit.script takes from a convolution's class."""

    __constants__ = (*_ConvNd.__constants__, "_kind")
    __annotations__ = _ConvNd.__annotations__


class _FusedConvTranspose(_FusedConv):
    _output_padding = _ConvTransposeNd._output_padding


# The forwards are made by functions around what they need, and ask the class for nothing of ours: bound before
# `restore_`, or before the layer was given an activation, they run after it.


def _conv(fast: Callable[..., Any], function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def forward(self, input: Tensor) -> Tensor:
        if _is_scripting():
            return self._conv_forward(input, self.weight, self.bias)
        weight, bias = weight_and_bias(self)
        activation = self.__dict__.get("activation")
        if activation is None and self.padding_mode == "zeros" and not _is_compiling():
            result = fast(input, weight, bias, self.stride, self.padding, self.dilation, self.groups, 0, 0.0, 0.0)
            if result is not NotImplemented:
                return result
        return _padded(function, self, input, weight, bias, activation)

    return forward


def _fused_conv(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def forward(self, input: Tensor) -> Tensor:
        if _is_scripting():
            return scripted_activation(self._conv_forward(input, self.weight, self.bias), self._kind)
        weight, bias = weight_and_bias(self)
        return _padded(function, self, input, weight, bias, self.__dict__.get("activation"))

    return forward


def _padded(
    function: Callable[..., Tensor],
    layer: Any,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: Activation,
) -> Tensor:
    padding = layer.padding
    if layer.padding_mode != "zeros":
        input, padding = F.pad(input, layer._reversed_padding_repeated_twice, mode=layer.padding_mode), 0
    return function(input, weight, bias, layer.stride, padding, layer.dilation, layer.groups, activation)


def _conv_transpose(
    fast: Callable[..., Any], function: Callable[..., Tensor], theirs: Callable[..., Tensor]
) -> Callable[..., Tensor]:
    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        if _is_scripting():
            output_padding = self._output_padding(
                input, output_size, self.stride, self.padding, self.kernel_size, len(self.kernel_size), self.dilation
            )
            return theirs(
                input, self.weight, self.bias, self.stride, self.padding, output_padding, self.groups, self.dilation
            )
        args = _transposed_arguments(self, input, output_size)
        activation = self.__dict__.get("activation")
        if activation is None and not _is_compiling():
            result = fast(*args, 0, 0.0, 0.0)
            if result is not NotImplemented:
                return result
        return function(*args, activation)

    return forward


def _fused_conv_transpose(function: Callable[..., Tensor], theirs: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        if _is_scripting():
            output_padding = self._output_padding(
                input, output_size, self.stride, self.padding, self.kernel_size, len(self.kernel_size), self.dilation
            )
            output = theirs(
                input, self.weight, self.bias, self.stride, self.padding, output_padding, self.groups, self.dilation
            )
            return scripted_activation(output, self._kind)
        return function(*_transposed_arguments(self, input, output_size), self.__dict__.get("activation"))

    return forward


def _transposed_arguments(layer: Any, input: Tensor, output_size: list[int] | None) -> tuple[Any, ...]:
    if layer.padding_mode != "zeros":
        raise ValueError(f"Only `zeros` padding mode is supported for {type(layer).__name__}")
    weight, bias = weight_and_bias(layer)
    output_padding = layer.output_padding
    if output_size is not None:
        output_padding = tuple(
            layer._output_padding(
                input, output_size, layer.stride, layer.padding, layer.kernel_size, len(layer.kernel_size),
                layer.dilation,
            )
        )  # fmt: skip
    return input, weight, bias, layer.stride, layer.padding, output_padding, layer.groups, layer.dilation


class Conv1d(_Conv, nn.Conv1d):
    """y[n, o, t] = f(b[o] + sum over c, k of w[o, c, k] x[n, c, stride t + dilation k - padding]), in one kernel.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype: as
            in torch.nn.Conv1d. padding is a number, "same" or "valid".
        activation: f, see Linear; with one the layer is a FusedConv1d. Default: None.

    Shape: x (batch, in_channels, length), y (batch, out_channels, length'), with or without batch; length' =
    (length + 2 padding - dilation (kernel_size - 1) - 1) / stride + 1, rounded down.
    Dtypes: float32, float64, bfloat16, float16; others go to PyTorch's kernels.
    Raises: ValueError: arguments that torch.nn.Conv1d refuses, or no such activation. When called, see
    functional.conv1d.
    Source: torch.nn.Conv1d.

    >>> fnn.Conv1d(16, 33, 3, stride=2)(torch.randn(20, 16, 50)).shape
    torch.Size([20, 33, 24])
    """

    forward = _conv(_C.conv1d, FF.conv1d)


class FusedConv1d(_FusedConv):
    """What Conv1d(..., activation=f) makes; see FusedLinear."""

    _plain, _conv_forward, forward = Conv1d, nn.Conv1d._conv_forward, _fused_conv(FF.conv1d)


class Conv2d(_Conv, nn.Conv2d):
    """Conv1d in two dimensions: y[n, o] = f(b[o] + sum over c of w[o, c] * x[n, c]), * being cross-correlation.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype: as
            in torch.nn.Conv2d; a number or (height, width).
        activation: f, see Linear; with one the layer is a FusedConv2d. Default: None.

    Shape: x (batch, in_channels, height, width), y (batch, out_channels, height', width'), with or without batch, each
    size as in Conv1d; channels_last in, channels_last out.
    Dtypes: float32, float64, bfloat16, float16; others go to PyTorch's kernels.
    Raises: ValueError: arguments that torch.nn.Conv2d refuses, or no such activation. When called, see
    functional.conv2d.
    Source: torch.nn.Conv2d.

    >>> layer = fnn.Conv2d(3, 8, 3, padding=1, activation="relu")
    >>> y = layer(torch.randn(2, 3, 32, 32))
    >>> y.shape, bool((y >= 0).all())
    (torch.Size([2, 8, 32, 32]), True)
    """

    forward = _conv(_C.conv2d, FF.conv2d)


class FusedConv2d(_FusedConv):
    """What Conv2d(..., activation=f) makes; see FusedLinear."""

    _plain, _conv_forward, forward = Conv2d, nn.Conv2d._conv_forward, _fused_conv(FF.conv2d)


class Conv3d(_Conv, nn.Conv3d):
    """Conv2d in three dimensions.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype: as
            in torch.nn.Conv3d; a number or (depth, height, width).
        activation: f, see Linear; with one the layer is a FusedConv3d. Default: None.

    Shape: x (batch, in_channels, depth, height, width), y (batch, out_channels, depth', height', width'), with or
    without batch, each size as in Conv1d.
    Dtypes: float32, float64, bfloat16, float16; others go to PyTorch's kernels.
    Raises: ValueError: arguments that torch.nn.Conv3d refuses, or no such activation. When called, see
    functional.conv3d.
    Source: torch.nn.Conv3d.

    >>> fnn.Conv3d(3, 4, (3, 5, 2), stride=(2, 1, 1), padding=(0, 2, 0))(torch.randn(2, 3, 9, 8, 7)).shape
    torch.Size([2, 4, 4, 8, 6])
    """

    forward = _conv(_C.conv3d, FF.conv3d)


class FusedConv3d(_FusedConv):
    """What Conv3d(..., activation=f) makes; see FusedLinear."""

    _plain, _conv_forward, forward = Conv3d, nn.Conv3d._conv_forward, _fused_conv(FF.conv3d)


class ConvTranspose1d(_ConvTranspose, nn.ConvTranspose1d):
    """y = f(z + b), z the gradient that Conv1d's input would get, were x the gradient of its output.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, output_padding, groups, bias, dilation, padding_mode,
            device, dtype: as in torch.nn.ConvTranspose1d.
        activation: f, see Linear; with one the layer is a FusedConvTranspose1d. Default: None.
        output_size, when called: the size to have, out of the stride sizes that x can come from.

    Shape: x (batch, in_channels, length), y (batch, out_channels, length'), with or without batch; length' =
    (length - 1) stride - 2 padding + dilation (kernel_size - 1) + output_padding + 1.
    Dtypes: float32, float64, bfloat16, float16; others go to PyTorch's kernels.
    Raises: ValueError: a padding_mode other than "zeros", an output_size out of reach, or no such activation. When
    called, see functional.conv_transpose1d.
    Source: torch.nn.ConvTranspose1d.

    >>> fnn.ConvTranspose1d(4, 2, 3, stride=2)(torch.randn(1, 4, 10)).shape
    torch.Size([1, 2, 21])
    """

    forward = _conv_transpose(_C.conv_transpose1d, FF.conv_transpose1d, F.conv_transpose1d)


class FusedConvTranspose1d(_FusedConvTranspose):
    """What ConvTranspose1d(..., activation=f) makes; see FusedLinear."""

    _plain, forward = ConvTranspose1d, _fused_conv_transpose(FF.conv_transpose1d, F.conv_transpose1d)


class ConvTranspose2d(_ConvTranspose, nn.ConvTranspose2d):
    """ConvTranspose1d in two dimensions: the gradient of Conv2d, plus bias, under f.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, output_padding, groups, bias, dilation, padding_mode,
            device, dtype: as in torch.nn.ConvTranspose2d; a number or (height, width).
        activation: f, see Linear; with one the layer is a FusedConvTranspose2d. Default: None.
        output_size, when called: the height and width to have, as in ConvTranspose1d.

    Shape: x (batch, in_channels, height, width), y (batch, out_channels, height', width'), with or without batch, each
    size as in ConvTranspose1d; channels_last in, channels_last out.
    Dtypes: float32, float64, bfloat16, float16; others go to PyTorch's kernels.
    Raises: ValueError: a padding_mode other than "zeros", an output_size out of reach, or no such activation. When
    called, see functional.conv_transpose2d.
    Source: torch.nn.ConvTranspose2d.

    >>> layer = fnn.ConvTranspose2d(4, 2, 3, stride=2, padding=1)
    >>> layer(torch.randn(1, 4, 6, 6), output_size=(12, 12)).shape
    torch.Size([1, 2, 12, 12])
    """

    forward = _conv_transpose(_C.conv_transpose2d, FF.conv_transpose2d, F.conv_transpose2d)


class FusedConvTranspose2d(_FusedConvTranspose):
    """What ConvTranspose2d(..., activation=f) makes; see FusedLinear."""

    _plain, forward = ConvTranspose2d, _fused_conv_transpose(FF.conv_transpose2d, F.conv_transpose2d)


class ConvTranspose3d(_ConvTranspose, nn.ConvTranspose3d):
    """ConvTranspose1d in three dimensions: the gradient of Conv3d, plus bias, under f.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, output_padding, groups, bias, dilation, padding_mode,
            device, dtype: as in torch.nn.ConvTranspose3d; a number or (depth, height, width).
        activation: f, see Linear; with one the layer is a FusedConvTranspose3d. Default: None.
        output_size, when called: the depth, height and width to have, as in ConvTranspose1d.

    Shape: x (batch, in_channels, depth, height, width), y (batch, out_channels, depth', height', width'), with or
    without batch, each size as in ConvTranspose1d.
    Dtypes: float32, float64, bfloat16, float16; others go to PyTorch's kernels.
    Raises: ValueError: a padding_mode other than "zeros", an output_size out of reach, or no such activation. When
    called, see functional.conv_transpose3d.
    Source: torch.nn.ConvTranspose3d.

    >>> fnn.ConvTranspose3d(2, 3, 2, stride=2)(torch.randn(1, 2, 4, 5, 6)).shape
    torch.Size([1, 3, 8, 10, 12])
    """

    forward = _conv_transpose(_C.conv_transpose3d, FF.conv_transpose3d, F.conv_transpose3d)


class FusedConvTranspose3d(_FusedConvTranspose):
    """What ConvTranspose3d(..., activation=f) makes; see FusedLinear."""

    _plain, forward = ConvTranspose3d, _fused_conv_transpose(FF.conv_transpose3d, F.conv_transpose3d)


pair(Conv1d, FusedConv1d)
pair(Conv2d, FusedConv2d)
pair(Conv3d, FusedConv3d)
pair(ConvTranspose1d, FusedConvTranspose1d)
pair(ConvTranspose2d, FusedConvTranspose2d)
pair(ConvTranspose3d, FusedConvTranspose3d)
