"""Convolution, batch normalisation and activation as one module, with torchvision's names and arguments."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.jit import is_scripting as _is_scripting

import fastops.functional as FF
import fastops.nn as fnn
from fastops.functional._activation import resolve_activation
from fastops.nn._block import Block, finish, in_one, ours
from fastops.nn.batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d
from fastops.nn.batch_norm import _call as _normalize

__all__ = ["Conv1dNormActivation", "Conv2dNormActivation", "Conv3dNormActivation"]

_Layer = Callable[..., nn.Module] | None


class _ConvNormActivation(Block):
    """All three; their dimensions are given by each."""

    def __init__(
        self,
        dims: int,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        stride: Any,
        padding: Any,
        groups: int,
        norm_layer: _Layer,
        activation_layer: _Layer,
        dilation: Any,
        inplace: bool | None,
        bias: bool | None,
    ) -> None:
        if padding is None:
            sizes = [(one,) * dims if isinstance(one, int) else tuple(one) for one in (kernel_size, dilation)]
            padding = tuple((size - 1) // 2 * step for size, step in zip(*sizes, strict=True))
        bias = norm_layer is None if bias is None else bias
        conv = getattr(fnn, f"Conv{dims}d")
        layers = [conv(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias)]
        if norm_layer is not None:
            layers.append(ours(norm_layer)(out_channels))
        if activation_layer is not None:
            layers.append(ours(activation_layer)(**({} if inplace is None else {"inplace": inplace})))
        super().__init__(*layers)
        self.out_channels = out_channels
        finish(self)
        # Which layers follow the convolution in one call: a batch norm of ours, and an activation that can be fused.
        norm = norm_layer is not None and type(layers[1]) in (BatchNorm1d, BatchNorm2d, BatchNorm3d)
        vars(self)["_fused"] = (norm_layer is None or norm) and (activation_layer is None or _can_be_fused(layers[-1]))

    def forward(self, input: Tensor) -> Tensor:
        if _is_scripting():
            for module in self:
                input = module(input)
            return input
        children = in_one(self, input) if self.__dict__["_fused"] else None
        if children is None:
            return nn.Sequential.forward(self, input)
        conv, *rest = children
        norm = rest.pop(0) if rest and isinstance(rest[0], (BatchNorm1d, BatchNorm2d, BatchNorm3d)) else None
        activation = rest[0] if rest else None
        if norm is not None:
            return _normalize(norm, conv(input), activation)
        if conv.padding_mode != "zeros":
            return nn.Sequential.forward(self, input)
        function = getattr(FF, f"conv{len(conv.kernel_size)}d")
        return function(
            input, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups, activation
        )  # fmt: skip


def _can_be_fused(activation: nn.Module) -> bool:
    try:
        resolve_activation(activation)
    except (ValueError, TypeError):
        return False
    return True


class Conv1dNormActivation(_ConvNormActivation):
    """Conv2dNormActivation in one dimension: f(norm(conv1d(x))).

    Args:
        in_channels, out_channels, kernel_size, stride, padding, groups, norm_layer, activation_layer, dilation,
            inplace, bias: as in Conv2dNormActivation; norm_layer is BatchNorm1d by default.

    Its state_dict is that of nn.Sequential(Conv1d, BatchNorm1d, ReLU).

    Shape: x (N, in_channels, length), y (N, out_channels, length of the convolution).
    Dtypes: float32, float64, bfloat16, float16, as Conv1d.
    Raises: see Conv1d and BatchNorm1d.
    Source: torchvision.ops.Conv2dNormActivation.

    >>> fnn.Conv1dNormActivation(3, 8)(torch.randn(2, 3, 10)).shape
    torch.Size([2, 8, 10])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any = 3,
        stride: Any = 1,
        padding: Any = None,
        groups: int = 1,
        norm_layer: _Layer = BatchNorm1d,
        activation_layer: _Layer = nn.ReLU,
        dilation: Any = 1,
        inplace: bool | None = True,
        bias: bool | None = None,
    ) -> None:
        super().__init__(
            1, in_channels, out_channels, kernel_size, stride, padding, groups, norm_layer, activation_layer, dilation,
            inplace, bias,
        )  # fmt: skip


class Conv2dNormActivation(_ConvNormActivation):
    """Convolution, batch normalisation and activation: f(norm(conv2d(x))), the last two in one call each way.

    Args:
        in_channels, out_channels, kernel_size, stride, groups, dilation: as in Conv2d. Default of kernel_size: 3.
        padding: as in Conv2d; None: half the kernel, so that stride 1 keeps the size.
        norm_layer: called with out_channels; None for no norm, and then the activation is the convolution's.
        activation_layer: called with inplace; None for none. Classes of torch.nn are taken for those of fastops.nn.
        inplace: None for an activation_layer that has no such argument.
        bias: whether the convolution has one; None: if there is no norm.

    It is nn.Sequential(Conv2d, BatchNorm2d, ReLU), with that one's children and state_dict ("0.weight", "1.weight",
    "1.running_mean" ...), which are also those of torchvision.ops.Conv2dNormActivation and of
    torch.ao.nn.intrinsic.ConvBnReLU2d. A child that is another one, or that has hooks, is noticed; the layers are then
    called in turn. fastops.freeze folds the norm into the convolution.

    Shape: x (N, in_channels, height, width), y (N, out_channels, height and width of the convolution).
    Dtypes: float32, float64, bfloat16, float16, as Conv2d.
    Raises: see Conv2d and BatchNorm2d.
    Source: torchvision.ops.Conv2dNormActivation.

    >>> block = fnn.Conv2dNormActivation(3, 8, stride=2)
    >>> block(torch.randn(2, 3, 32, 32)).shape
    torch.Size([2, 8, 16, 16])
    >>> list(block.state_dict())[:3]
    ['0.weight', '1.weight', '1.bias']
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any = 3,
        stride: Any = 1,
        padding: Any = None,
        groups: int = 1,
        norm_layer: _Layer = BatchNorm2d,
        activation_layer: _Layer = nn.ReLU,
        dilation: Any = 1,
        inplace: bool | None = True,
        bias: bool | None = None,
    ) -> None:
        super().__init__(
            2, in_channels, out_channels, kernel_size, stride, padding, groups, norm_layer, activation_layer, dilation,
            inplace, bias,
        )  # fmt: skip


class Conv3dNormActivation(_ConvNormActivation):
    """Conv2dNormActivation in three dimensions: f(norm(conv3d(x))).

    Args:
        in_channels, out_channels, kernel_size, stride, padding, groups, norm_layer, activation_layer, dilation,
            inplace, bias: as in Conv2dNormActivation; norm_layer is BatchNorm3d by default.

    Its state_dict is that of nn.Sequential(Conv3d, BatchNorm3d, ReLU).

    Shape: x (N, in_channels, depth, height, width), y (N, out_channels, those of the convolution).
    Dtypes: float32, float64, bfloat16, float16, as Conv3d.
    Raises: see Conv3d and BatchNorm3d.
    Source: torchvision.ops.Conv3dNormActivation.

    >>> fnn.Conv3dNormActivation(2, 4)(torch.randn(1, 2, 4, 4, 4)).shape
    torch.Size([1, 4, 4, 4, 4])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any = 3,
        stride: Any = 1,
        padding: Any = None,
        groups: int = 1,
        norm_layer: _Layer = BatchNorm3d,
        activation_layer: _Layer = nn.ReLU,
        dilation: Any = 1,
        inplace: bool | None = True,
        bias: bool | None = None,
    ) -> None:
        super().__init__(
            3, in_channels, out_channels, kernel_size, stride, padding, groups, norm_layer, activation_layer, dilation,
            inplace, bias,
        )  # fmt: skip
