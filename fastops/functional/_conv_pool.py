"""Convolution, activation and max pool as one op."""

from torch import Tensor
from torch.compiler import is_dynamo_compiling as _is_compiling

from fastops import _C
from fastops.functional._activation import Activation
from fastops.functional._conv import Sizes, _fast, conv1d, conv2d, conv3d
from fastops.functional._pool import max_pool1d, max_pool2d, max_pool3d

__all__ = ["conv_max_pool1d", "conv_max_pool2d", "conv_max_pool3d"]


def conv_max_pool1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sizes = 1,
    padding: Sizes | str = 0,
    dilation: Sizes = 1,
    groups: int = 1,
    activation: Activation = None,
    pool_size: Sizes = 2,
) -> Tensor:
    """conv_max_pool2d in one dimension.

    Args:
        input: (batch, in_channels, length) or (in_channels, length).
        weight: (out_channels, in_channels / groups, kernel_length).
        bias, stride, padding, dilation, groups, activation, pool_size: as in conv_max_pool2d.

    Returns: (batch, out_channels, pooled_length). dtypes and errors: see conv2d and max_pool2d.
    Source: torch.nn.functional.conv1d and max_pool1d.

    >>> FF.conv_max_pool1d(torch.tensor([[[1.0, 2.0, 4.0, 8.0]]]), torch.ones(1, 1, 1))
    tensor([[[2., 8.]]])
    """
    args = input, weight, bias, stride, padding, dilation, groups
    if not _is_compiling():
        result = _fast(_C.conv_max_pool1d, (*args, pool_size), activation)
        if result is not NotImplemented:
            return result
    return max_pool1d(conv1d(*args, activation), pool_size)


def conv_max_pool2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sizes = 1,
    padding: Sizes | str = 0,
    dilation: Sizes = 1,
    groups: int = 1,
    activation: Activation = None,
    pool_size: Sizes = 2,
) -> Tensor:
    """Convolution, activation and max pool in one: max_pool2d(conv2d(input, weight, ..., activation), pool_size).

    The values and gradients are those of the two ops. With relu or no activation, on the CPU, forward is one kernel
    call and so is backward: forward takes a few images at a time through both, in a block of about a megabyte, and
    keeps one byte for each element of the result for backward. In a model's first layer (3x3, stride 1, one to four
    channels, a 2x2 pool, float32 or float64, channels first) the pool happens in registers. Any other activation, and
    every call on a GPU, is the two ops in turn.

    Args:
        input, weight, bias, stride, padding, dilation, groups, activation: as in conv2d.
        pool_size: the size of a window, a number or one for each dimension. Windows do not overlap (their stride is
            pool_size); rows and columns that fill no window are left out, as in max_pool2d.

    Returns: (batch, out_channels, pooled_height, pooled_width). dtypes and errors: see conv2d and max_pool2d.
    Source: torch.nn.functional.conv2d and max_pool2d.

    >>> x, w = torch.arange(16.0).view(1, 1, 4, 4), torch.ones(1, 1, 1, 1)
    >>> FF.conv_max_pool2d(x, w, torch.tensor([-7.0]), activation="relu")
    tensor([[[[0., 0.],
              [6., 8.]]]])
    """
    args = input, weight, bias, stride, padding, dilation, groups
    if not _is_compiling():
        result = _fast(_C.conv_max_pool2d, (*args, pool_size), activation)
        if result is not NotImplemented:
            return result
    return max_pool2d(conv2d(*args, activation), pool_size)


def conv_max_pool3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sizes = 1,
    padding: Sizes | str = 0,
    dilation: Sizes = 1,
    groups: int = 1,
    activation: Activation = None,
    pool_size: Sizes = 2,
) -> Tensor:
    """conv_max_pool2d in three dimensions.

    Args:
        input: (batch, in_channels, depth, height, width) or (in_channels, depth, height, width).
        weight: (out_channels, in_channels / groups, kernel_depth, kernel_height, kernel_width).
        bias, stride, padding, dilation, groups, activation, pool_size: as in conv_max_pool2d.

    Returns: (batch, out_channels, pooled_depth, pooled_height, pooled_width). dtypes and errors: see conv2d and
    max_pool2d.
    Source: torch.nn.functional.conv3d and max_pool3d.

    >>> FF.conv_max_pool3d(torch.ones(1, 2, 4, 4, 4), torch.ones(3, 2, 3, 3, 3), padding=1, activation="relu").shape
    torch.Size([1, 3, 2, 2, 2])
    """
    args = input, weight, bias, stride, padding, dilation, groups
    if not _is_compiling():
        result = _fast(_C.conv_max_pool3d, (*args, pool_size), activation)
        if result is not NotImplemented:
            return result
    return max_pool3d(conv3d(*args, activation), pool_size)
