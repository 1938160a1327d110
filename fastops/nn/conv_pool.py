"""Convolution, activation and max pool as one module."""

from typing import Any

from torch import Tensor, nn
from torch.jit import is_scripting as _is_scripting

import fastops.functional as FF
import fastops.nn as fnn
from fastops.functional._activation import Activation
from fastops.nn._block import Block, activation_module, finish, in_one

__all__ = ["ConvMaxPool1d", "ConvMaxPool2d", "ConvMaxPool3d"]


class _ConvMaxPool(Block):
    """All three; _dims and the rest is given by each."""

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
        pool_size: Any = 2,
    ) -> None:
        conv, pool = getattr(fnn, f"Conv{self._dims}d"), getattr(fnn, f"MaxPool{self._dims}d")
        options = stride, padding, dilation, groups, bias, padding_mode, device, dtype
        f = activation_module(activation)
        super().__init__(
            conv(in_channels, out_channels, kernel_size, *options), *([] if f is None else [f]), pool(pool_size)
        )
        finish(self)


def _plain(pool: Any) -> bool:
    """Whether windows of this pool do not overlap, as in the op; its options may have been changed."""
    plain = pool.padding == 0 and pool.dilation == 1 and not pool.ceil_mode and not pool.return_indices
    return plain and pool.stride == pool.kernel_size


def _forward(name: str) -> Any:
    function = getattr(FF, name)

    def forward(self, input: Tensor) -> Tensor:
        if _is_scripting():
            for module in self:
                input = module(input)
            return input
        children = in_one(self, input)
        if children is None or children[0].padding_mode != "zeros" or not _plain(children[-1]):
            return nn.Sequential.forward(self, input)
        conv, *f, pool = children
        return function(
            input, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups,
            f[0] if f else None, pool.kernel_size,
        )  # fmt: skip

    return forward


class ConvMaxPool1d(_ConvMaxPool):
    """ConvMaxPool2d in one dimension: max_pool1d(f(conv1d(x)), pool_size).

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype:
            as in Conv1d.
        activation, pool_size: as in ConvMaxPool2d.

    Its state_dict is that of nn.Sequential(Conv1d, activation, MaxPool1d).

    Shape: x (N, in_channels, length), y (N, out_channels, pooled_length); also without N.
    Dtypes: float32, float64, bfloat16, float16, as Conv1d.
    Raises: as ConvMaxPool2d.
    Source: torch.nn.Conv1d and torch.nn.MaxPool1d.

    >>> fnn.ConvMaxPool1d(3, 8, 3, padding=1)(torch.randn(2, 3, 10)).shape
    torch.Size([2, 8, 5])
    """

    _dims, forward = 1, _forward("conv_max_pool1d")


class ConvMaxPool2d(_ConvMaxPool):
    """Convolution, activation and max pool in one call forward and backward: max_pool2d(f(conv2d(x)), pool_size).

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype:
            as in Conv2d.
        activation: f, a name ("relu", ...), an activation module or None. Default: None.
        pool_size: the size of a window, a number or one for each dimension. Windows do not overlap. Default: 2.

    It is nn.Sequential(Conv2d, activation, MaxPool2d(pool_size)), with that one's children and state_dict: "0.weight",
    "0.bias". A child that is another one, or that has hooks, is noticed; the layers are then called in turn.

    Shape: x (N, in_channels, height, width), y (N, out_channels, pooled_height, pooled_width); also without N.
    Dtypes: float32, float64, bfloat16, float16, as Conv2d.
    Raises: ValueError: an activation that does not exist or cannot be fused. When called, see
    functional.conv_max_pool2d.
    Source: torch.nn.Conv2d and torch.nn.MaxPool2d.

    >>> block = fnn.ConvMaxPool2d(1, 32, 3, padding=1, activation="relu")
    >>> block(torch.randn(8, 1, 28, 28)).shape
    torch.Size([8, 32, 14, 14])
    >>> list(block.state_dict())
    ['0.weight', '0.bias']
    """

    _dims, forward = 2, _forward("conv_max_pool2d")


class ConvMaxPool3d(_ConvMaxPool):
    """ConvMaxPool2d in three dimensions: max_pool3d(f(conv3d(x)), pool_size).

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype:
            as in Conv3d.
        activation, pool_size: as in ConvMaxPool2d.

    Its state_dict is that of nn.Sequential(Conv3d, activation, MaxPool3d).

    Shape: x (N, in_channels, depth, height, width), y (N, out_channels, pooled depth, height, width); also without N.
    Dtypes: float32, float64, bfloat16, float16, as Conv3d.
    Raises: as ConvMaxPool2d.
    Source: torch.nn.Conv3d and torch.nn.MaxPool3d.

    >>> fnn.ConvMaxPool3d(2, 4, 3, padding=1, activation="relu")(torch.randn(1, 2, 4, 6, 6)).shape
    torch.Size([1, 4, 2, 3, 3])
    """

    _dims, forward = 3, _forward("conv_max_pool3d")
