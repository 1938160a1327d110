"""torch.nn's pooling modules on fastops' kernels: the same names, signatures, attributes and repr.

Each is a subclass that only replaces forward; see fastops.nn.activation.
"""

import torch.nn.functional as F
from torch import Tensor, nn
from torch.jit import is_scripting as _is_scripting

import fastops.functional as FF
from fastops._traced import traced_as

__all__ = [
    "AdaptiveAvgPool1d", "AdaptiveAvgPool2d", "AdaptiveAvgPool3d", "AdaptiveMaxPool1d", "AdaptiveMaxPool2d",
    "AdaptiveMaxPool3d", "AvgPool1d", "AvgPool2d", "AvgPool3d", "MaxPool1d", "MaxPool2d", "MaxPool3d",
]  # fmt: skip


class MaxPool1d(nn.MaxPool1d):
    """y[n, c, t] = the largest of x[n, c, stride t + dilation k - padding], k < kernel_size; NaN is larger than all.

    Args:
        kernel_size, stride, padding, dilation: a number. stride: kernel_size by
            default. padding: at most half of kernel_size; padded positions are ignored.
        return_indices: return the positions of the maxima too, as MaxUnpool1d wants them. Default: False.
        ceil_mode: also windows that reach beyond the end. Default: False.

    Shape: x (batch, channels, length), y (batch, channels, length'), with or without batch; length' =
    (length + 2 padding - dilation (kernel_size - 1) - 1) / stride + 1, rounded down, or up with ceil_mode.
    Dtypes: float32, float64, bfloat16, float16; others go to PyTorch's kernels.
    Raises: RuntimeError: shapes and windows that do not fit; see functional.max_pool1d.
    Source: torch.nn.MaxPool1d.

    >>> fnn.MaxPool1d(2)(torch.tensor([[1.0, 3.0, 2.0, 0.0]]))
    tensor([[3., 2.]])
    """

    def forward(self, input: Tensor):
        if _is_scripting():
            return F.max_pool1d(
                input, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode, self.return_indices
            )
        return FF.max_pool1d(
            input, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode, self.return_indices
        )


class MaxPool2d(nn.MaxPool2d):
    """The largest element of every window of a plane; NaN is larger than all.

    Args:
        kernel_size, stride, padding, dilation: a number or (height, width). stride: kernel_size by
            default. padding: at most half of kernel_size; padded positions are ignored.
        return_indices: return the positions of the maxima too, as MaxUnpool2d wants them. Default: False.
        ceil_mode: also windows that reach beyond the end. Default: False.

    Shape: x (batch, channels, height, width), y (batch, channels, height', width'), with or without batch, each size
    as in MaxPool1d; channels_last in, channels_last out.
    Dtypes: float32, float64, bfloat16, float16; others go to PyTorch's kernels.
    Raises: RuntimeError: shapes and windows that do not fit; see functional.max_pool2d.
    Source: torch.nn.MaxPool2d.

    >>> x = torch.arange(16.0).reshape(1, 4, 4)
    >>> fnn.MaxPool2d(2)(x)
    tensor([[[ 5.,  7.],
             [13., 15.]]])
    """

    def forward(self, input: Tensor):
        if _is_scripting():
            return F.max_pool2d(
                input, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode, self.return_indices
            )
        return FF.max_pool2d(
            input, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode, self.return_indices
        )


class MaxPool3d(nn.MaxPool3d):
    """The largest element of every window of a volume; NaN is larger than all.

    Args:
        kernel_size, stride, padding, dilation: a number or (depth, height, width). stride: kernel_size by
            default. padding: at most half of kernel_size; padded positions are ignored.
        return_indices: return the positions of the maxima too, as MaxUnpool3d wants them. Default: False.
        ceil_mode: also windows that reach beyond the end. Default: False.

    Shape: x (batch, channels, depth, height, width), y (batch, channels, depth', height', width'),
    with or without batch, each size as in MaxPool1d.
    Dtypes: float32, float64, bfloat16, float16; others go to PyTorch's kernels.
    Raises: RuntimeError: shapes and windows that do not fit; see functional.max_pool3d.
    Source: torch.nn.MaxPool3d.

    >>> fnn.MaxPool3d(3, stride=2)(torch.randn(20, 16, 50, 44, 31)).shape
    torch.Size([20, 16, 24, 21, 15])
    """

    def forward(self, input: Tensor):
        if _is_scripting():
            return F.max_pool3d(
                input, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode, self.return_indices
            )
        return FF.max_pool3d(
            input, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode, self.return_indices
        )


class AvgPool1d(nn.AvgPool1d):
    """y[n, c, t] = sum over k < kernel_size of x[n, c, stride t + k - padding] / kernel_size.

    Args:
        kernel_size, stride, padding: a number. stride: kernel_size by default.
        ceil_mode: also windows that reach beyond the end. Default: False.
        count_include_pad: whether zeros of the padding count as elements. Default: True.

    Shape: x (batch, channels, length), y (batch, channels, length'), with or without batch; length' =
    (length + 2 padding - kernel_size) / stride + 1, rounded down, or up with ceil_mode.
    Dtypes: float32, float64, bfloat16, float16; others go to PyTorch's kernels.
    Raises: RuntimeError: shapes and windows that do not fit; see functional.avg_pool1d.
    Source: torch.nn.AvgPool1d.

    >>> fnn.AvgPool1d(2)(torch.tensor([[1.0, 3.0, 2.0, 0.0]]))
    tensor([[2., 1.]])
    """

    def forward(self, input: Tensor) -> Tensor:
        if _is_scripting():
            return F.avg_pool1d(
                input, self.kernel_size, self.stride, self.padding, self.ceil_mode, self.count_include_pad
            )
        return FF.avg_pool1d(input, self.kernel_size, self.stride, self.padding, self.ceil_mode, self.count_include_pad)


class AvgPool2d(nn.AvgPool2d):
    """The average of every window of a plane.

    Args:
        kernel_size, stride, padding: a number or (height, width). stride: kernel_size by default.
        ceil_mode: also windows that reach beyond the end. Default: False.
        count_include_pad: whether zeros of the padding count as elements. Default: True.
        divisor_override: what to divide a window's sum by. Default: its size.

    Shape: x (batch, channels, height, width), y (batch, channels, height', width'), with or without batch, each size
    as in AvgPool1d; channels_last in, channels_last out.
    Dtypes: float32, float64, bfloat16, float16; others go to PyTorch's kernels.
    Raises: RuntimeError: shapes and windows that do not fit; see functional.avg_pool2d.
    Source: torch.nn.AvgPool2d.

    >>> x = torch.arange(16.0).reshape(1, 4, 4)
    >>> fnn.AvgPool2d(2)(x)
    tensor([[[ 2.5000,  4.5000],
             [10.5000, 12.5000]]])
    """

    def forward(self, input: Tensor) -> Tensor:
        if _is_scripting():
            return F.avg_pool2d(
                input,
                self.kernel_size,
                self.stride,
                self.padding,
                self.ceil_mode,
                self.count_include_pad,
                self.divisor_override,
            )
        return FF.avg_pool2d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.ceil_mode,
            self.count_include_pad,
            self.divisor_override,
        )


class AvgPool3d(nn.AvgPool3d):
    """The average of every window of a volume.

    Args:
        kernel_size, stride, padding: a number or (depth, height, width). stride: kernel_size by default.
        ceil_mode: also windows that reach beyond the end. Default: False.
        count_include_pad: whether zeros of the padding count as elements. Default: True.
        divisor_override: what to divide a window's sum by. Default: its size.

    Shape: x (batch, channels, depth, height, width), y (batch, channels, depth', height', width'),
    with or without batch, each size as in AvgPool1d.
    Dtypes: float32, float64, bfloat16, float16; others go to PyTorch's kernels.
    Raises: RuntimeError: shapes and windows that do not fit; see functional.avg_pool3d.
    Source: torch.nn.AvgPool3d.

    >>> fnn.AvgPool3d(2)(torch.ones(1, 1, 2, 4, 4))
    tensor([[[[[1., 1.],
               [1., 1.]]]]])
    """

    def forward(self, input: Tensor) -> Tensor:
        if _is_scripting():
            return F.avg_pool3d(
                input,
                self.kernel_size,
                self.stride,
                self.padding,
                self.ceil_mode,
                self.count_include_pad,
                self.divisor_override,
            )
        return FF.avg_pool3d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.ceil_mode,
            self.count_include_pad,
            self.divisor_override,
        )


class AdaptiveMaxPool1d(nn.AdaptiveMaxPool1d):
    """y[n, c, i] = the largest of x[n, c, start(i) : end(i)], start(i) = i length / output_size rounded
    down, end(i) = (i + 1) length / output_size rounded up.

    Args:
        output_size: a number.
        return_indices: return the positions of the maxima too, as MaxUnpool1d wants them. Default: False.

    Shape: x (batch, channels, length), y (batch, channels, *output_size), with or without batch.
    Dtypes: float32, float64, bfloat16, float16; others go to PyTorch's kernels.
    Raises: RuntimeError: shapes and windows that do not fit; see functional.adaptive_max_pool1d.
    Source: torch.nn.AdaptiveMaxPool1d.

    >>> fnn.AdaptiveMaxPool1d(2)(torch.tensor([[1.0, 3.0, 2.0, 0.0, 5.0]]))
    tensor([[3., 5.]])
    """

    def forward(self, input: Tensor):
        if _is_scripting():
            return F.adaptive_max_pool1d(input, self.output_size, self.return_indices)
        return FF.adaptive_max_pool1d(input, self.output_size, self.return_indices)


class AdaptiveMaxPool2d(nn.AdaptiveMaxPool2d):
    """The largest element of each of output_size windows that cover a plane evenly; see AdaptiveMaxPool1d.

    Args:
        output_size: a number or (height, width), None for the input's size.
        return_indices: return the positions of the maxima too, as MaxUnpool2d wants them. Default: False.

    Shape: x (batch, channels, height, width), y (batch, channels, *output_size), with or without batch.
    Dtypes: float32, float64, bfloat16, float16; others go to PyTorch's kernels.
    Raises: RuntimeError: shapes and windows that do not fit; see functional.adaptive_max_pool2d.
    Source: torch.nn.AdaptiveMaxPool2d.

    >>> fnn.AdaptiveMaxPool2d((5, None))(torch.randn(1, 64, 10, 9)).shape
    torch.Size([1, 64, 5, 9])
    """

    def forward(self, input: Tensor):
        if _is_scripting():
            return F.adaptive_max_pool2d(input, self.output_size, self.return_indices)
        return FF.adaptive_max_pool2d(input, self.output_size, self.return_indices)


class AdaptiveMaxPool3d(nn.AdaptiveMaxPool3d):
    """The largest element of each of output_size windows that cover a volume evenly; see AdaptiveMaxPool1d.

    Args:
        output_size: a number or (depth, height, width), None for the input's size.
        return_indices: return the positions of the maxima too, as MaxUnpool3d wants them. Default: False.

    Shape: x (batch, channels, depth, height, width), y (batch, channels, *output_size), with or without batch.
    Dtypes: float32, float64, bfloat16, float16; others go to PyTorch's kernels.
    Raises: RuntimeError: shapes and windows that do not fit; see functional.adaptive_max_pool3d.
    Source: torch.nn.AdaptiveMaxPool3d.

    >>> fnn.AdaptiveMaxPool3d((2, 3, None))(torch.randn(1, 4, 8, 9, 10)).shape
    torch.Size([1, 4, 2, 3, 10])
    """

    def forward(self, input: Tensor):
        if _is_scripting():
            return F.adaptive_max_pool3d(input, self.output_size, self.return_indices)
        return FF.adaptive_max_pool3d(input, self.output_size, self.return_indices)


class AdaptiveAvgPool1d(nn.AdaptiveAvgPool1d):
    """y[n, c, i] = the average of x[n, c, start(i) : end(i)], the windows of AdaptiveMaxPool1d.

    Args:
        output_size: a number.

    Shape: x (batch, channels, length), y (batch, channels, *output_size), with or without batch.
    Dtypes: float32, float64, bfloat16, float16; others go to PyTorch's kernels.
    Raises: RuntimeError: shapes and windows that do not fit; see functional.adaptive_avg_pool1d.
    Source: torch.nn.AdaptiveAvgPool1d.

    >>> fnn.AdaptiveAvgPool1d(2)(torch.tensor([[1.0, 3.0, 2.0, 0.0]]))
    tensor([[2., 1.]])
    """

    def forward(self, input: Tensor) -> Tensor:
        if _is_scripting():
            return F.adaptive_avg_pool1d(input, self.output_size)
        return FF.adaptive_avg_pool1d(input, self.output_size)


class AdaptiveAvgPool2d(nn.AdaptiveAvgPool2d):
    """The average of each of output_size windows that cover a plane evenly; see AdaptiveMaxPool1d.

    Args:
        output_size: a number or (height, width), None for the input's size.

    Shape: x (batch, channels, height, width), y (batch, channels, *output_size), with or without batch.
    Dtypes: float32, float64, bfloat16, float16; others go to PyTorch's kernels.
    Raises: RuntimeError: shapes and windows that do not fit; see functional.adaptive_avg_pool2d.
    Source: torch.nn.AdaptiveAvgPool2d.

    >>> fnn.AdaptiveAvgPool2d(1)(torch.ones(2, 3, 7, 7)).shape
    torch.Size([2, 3, 1, 1])
    """

    def forward(self, input: Tensor) -> Tensor:
        if _is_scripting():
            return F.adaptive_avg_pool2d(input, self.output_size)
        return FF.adaptive_avg_pool2d(input, self.output_size)


class AdaptiveAvgPool3d(nn.AdaptiveAvgPool3d):
    """The average of each of output_size windows that cover a volume evenly; see AdaptiveMaxPool1d.

    Args:
        output_size: a number or (depth, height, width), None for the input's size.

    Shape: x (batch, channels, depth, height, width), y (batch, channels, *output_size), with or without batch.
    Dtypes: float32, float64, bfloat16, float16; others go to PyTorch's kernels.
    Raises: RuntimeError: shapes and windows that do not fit; see functional.adaptive_avg_pool3d.
    Source: torch.nn.AdaptiveAvgPool3d.

    >>> fnn.AdaptiveAvgPool3d((2, 2, 1))(torch.randn(1, 4, 8, 9, 10)).shape
    torch.Size([1, 4, 2, 2, 1])
    """

    def forward(self, input: Tensor) -> Tensor:
        if _is_scripting():
            return F.adaptive_avg_pool3d(input, self.output_size)
        return FF.adaptive_avg_pool3d(input, self.output_size)


for _module in (AdaptiveAvgPool1d, AdaptiveAvgPool2d, AdaptiveAvgPool3d):
    traced_as(_module.forward, _module.__base__.forward)
