"""Convolution, activation and max pool as one op."""

from torch import Tensor
from torch.compiler import is_dynamo_compiling as _is_compiling

from fastops import _C
from fastops.functional._activation import Activation
from fastops.functional._conv import Sizes, _fast, conv1d, conv2d, conv3d
from fastops.functional._pool import max_pool1d, max_pool2d, max_pool3d


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
    """conv_max_pool2d in one dimension: input (batch, in_channels, length) or (in_channels, length)."""
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
    """max_pool2d(conv2d(input, weight, bias, ..., activation), pool_size): the same values and gradients.

    With relu or no activation it is one call of a kernel forward and one backward. Forward takes some images at a time
    through both, in a block of about a megabyte, and keeps no more than a byte for each element of the result for
    backward. 3x3 convolutions of stride 1 with one to four channels and a 2x2 pool, a model's first layer, in float32
    or float64 and channels first, have a kernel that pools in registers. Any other activation is the two ops in turn,
    and so is every call on a GPU.

    Args:
        input, weight, bias, stride, padding, dilation, groups, activation: as in conv2d.
        pool_size: the windows' size, a number or one for each dimension; they do not overlap (stride = pool_size), and
            what is left over at the end takes no part, as in max_pool2d.

    Returns, Raises: see conv2d and max_pool2d.
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
    """conv_max_pool2d in three dimensions: input (batch, in_channels, depth, height, width) or without batch."""
    args = input, weight, bias, stride, padding, dilation, groups
    if not _is_compiling():
        result = _fast(_C.conv_max_pool3d, (*args, pool_size), activation)
        if result is not NotImplemented:
            return result
    return max_pool3d(conv3d(*args, activation), pool_size)
