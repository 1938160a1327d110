"""torch.nn.functional's pooling on fastops' kernels."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_dynamo_compiling as _is_compiling
from torch.overrides import handle_torch_function

from fastops import _C
from fastops.functional._conv import Sizes, _sizes
from fastops.functional._general import fused_better_by_compilers, general, overrides, show, torch_op
from fastops.ops import pool as _pool_ops
from fastops.ops import supported

__all__ = [
    "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d",
    "adaptive_max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d", "max_pool1d", "max_pool2d", "max_pool3d",
]  # fmt: skip

OutputSizes = int | None | Sequence[int | None]

_fast_max_pool1d = _C.max_pool1d
_fast_max_pool2d = _C.max_pool2d
_fast_max_pool3d = _C.max_pool3d
_fast_avg_pool1d = _C.avg_pool1d
_fast_avg_pool2d = _C.avg_pool2d
_fast_avg_pool3d = _C.avg_pool3d
_fast_adaptive_max_pool1d = _C.adaptive_max_pool1d
_fast_adaptive_max_pool2d = _C.adaptive_max_pool2d
_fast_adaptive_max_pool3d = _C.adaptive_max_pool3d
_fast_adaptive_avg_pool1d = _C.adaptive_avg_pool1d
_fast_adaptive_avg_pool2d = _C.adaptive_avg_pool2d
_fast_adaptive_avg_pool3d = _C.adaptive_avg_pool3d


def max_pool1d(
    input: Tensor,
    kernel_size: Sizes,
    stride: Sizes | None = None,
    padding: Sizes = 0,
    dilation: Sizes = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """max_pool2d in one dimension.

    Args:
        input: (batch, channels, length) or (channels, length).
        kernel_size, stride, padding, dilation, ceil_mode, return_indices: as in max_pool2d.

    Returns: (batch, channels, out_length), or maxima and indices. dtypes and errors: see max_pool2d.
    Source: torch.nn.functional.max_pool1d.

    >>> FF.max_pool1d(torch.tensor([[[1.0, 5.0, 2.0, 3.0]]]), 2, return_indices=True)
    (tensor([[[5., 3.]]]), tensor([[[1, 3]]]))
    """
    if not _is_compiling():
        result = _fast_max_pool1d(input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)
        if result is not NotImplemented:
            return result
    return _general_max(max_pool1d, input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)


def max_pool2d(
    input: Tensor,
    kernel_size: Sizes,
    stride: Sizes | None = None,
    padding: Sizes = 0,
    dilation: Sizes = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """The maximum of every window; NaN is greater than any number.

    Args:
        input: (batch, channels, height, width) or (channels, height, width), any strides; float32, float64, bfloat16 or
            float16.
        kernel_size, stride, padding, dilation: a number, or one for each dimension. stride is kernel_size by default.
            padded positions are ignored; padding may be at most half of kernel_size.
        ceil_mode: take windows too that reach beyond the padded input, as long as they start inside.
        return_indices: also return where the maxima are (the first of equal ones), as int64 positions in the input's
            planes.

    Returns:
        The maxima, (batch, channels, out_height, out_width) in input's dtype, channels_last where input is; with
        return_indices the pair of maxima and indices.

    Raises:
        RuntimeError: shapes and windows do not fit. TypeError: an argument is of the wrong type.

    Source: torch.nn.functional.max_pool2d. Without return_indices, and for windows of up to 256 elements,
    backward keeps one byte for each output, and not the input.

    >>> FF.max_pool2d(torch.arange(16.0).view(1, 1, 4, 4), 2)
    tensor([[[[ 5.,  7.],
              [13., 15.]]]])
    """
    if not _is_compiling():
        result = _fast_max_pool2d(input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)
        if result is not NotImplemented:
            return result
    return _general_max(max_pool2d, input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)


def max_pool3d(
    input: Tensor,
    kernel_size: Sizes,
    stride: Sizes | None = None,
    padding: Sizes = 0,
    dilation: Sizes = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """max_pool2d in three dimensions.

    Args:
        input: (batch, channels, depth, height, width) or (channels, depth, height, width).
        kernel_size, stride, padding, dilation, ceil_mode, return_indices: as in max_pool2d.

    Returns: (batch, channels, out_depth, out_height, out_width), or maxima and indices. dtypes and errors: see
    max_pool2d.
    Source: torch.nn.functional.max_pool3d.

    >>> FF.max_pool3d(torch.arange(8.0).view(1, 1, 2, 2, 2), 2)
    tensor([[[[[7.]]]]])
    """
    if not _is_compiling():
        result = _fast_max_pool3d(input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)
        if result is not NotImplemented:
            return result
    return _general_max(max_pool3d, input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)


def avg_pool1d(
    input: Tensor,
    kernel_size: Sizes,
    stride: Sizes | None = None,
    padding: Sizes = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
) -> Tensor:
    """avg_pool2d in one dimension.

    Args:
        input: (batch, channels, length) or (channels, length).
        kernel_size, stride, padding, ceil_mode, count_include_pad: as in avg_pool2d.

    Returns: (batch, channels, out_length). dtypes: see avg_pool2d. Raises: see max_pool2d.
    Source: torch.nn.functional.avg_pool1d.

    >>> FF.avg_pool1d(torch.tensor([[[1.0, 5.0, 2.0, 3.0]]]), 2)
    tensor([[[3.0000, 2.5000]]])
    """
    if not _is_compiling():
        result = _fast_avg_pool1d(input, kernel_size, stride, padding, ceil_mode, count_include_pad)
        if result is not NotImplemented:
            return result
    return _general_avg(avg_pool1d, input, kernel_size, stride, padding, ceil_mode, count_include_pad)


def avg_pool2d(
    input: Tensor,
    kernel_size: Sizes,
    stride: Sizes | None = None,
    padding: Sizes = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """The average of every window.

    Args:
        input: (batch, channels, height, width) or (channels, height, width), any strides; float32, float64, bfloat16 or
            float16.
        kernel_size, stride, padding: a number, or one for each dimension. stride is kernel_size by default.
        ceil_mode: take windows too that reach beyond the padded input, as long as they start inside.
        count_include_pad: whether the zeros of the padding count in the number that a sum is divided by.
        divisor_override: a number to divide every sum by instead, not 0.

    Returns: (batch, channels, out_height, out_width) in input's dtype, channels_last where input is.
    Raises: see max_pool2d. Source: torch.nn.functional.avg_pool2d.

    >>> FF.avg_pool2d(torch.arange(16.0).view(1, 1, 4, 4), 2)
    tensor([[[[ 2.5000,  4.5000],
              [10.5000, 12.5000]]]])
    """
    if not _is_compiling():
        result = _fast_avg_pool2d(input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)
        if result is not NotImplemented:
            return result
    return _general_avg(avg_pool2d, input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)


def avg_pool3d(
    input: Tensor,
    kernel_size: Sizes,
    stride: Sizes | None = None,
    padding: Sizes = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """avg_pool2d in three dimensions.

    Args:
        input: (batch, channels, depth, height, width) or (channels, depth, height, width).
        kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override: as in avg_pool2d.

    Returns: (batch, channels, out_depth, out_height, out_width). dtypes: see avg_pool2d. Raises: see max_pool2d.
    Source: torch.nn.functional.avg_pool3d.

    >>> FF.avg_pool3d(torch.arange(8.0).view(1, 1, 2, 2, 2), 2)
    tensor([[[[[3.5000]]]]])
    """
    if not _is_compiling():
        result = _fast_avg_pool3d(input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)
        if result is not NotImplemented:
            return result
    return _general_avg(avg_pool3d, input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)


def adaptive_max_pool1d(input: Tensor, output_size: OutputSizes, return_indices: bool = False) -> Any:
    """adaptive_max_pool2d in one dimension.

    Args:
        input: (batch, channels, length) or (channels, length).
        output_size, return_indices: as in adaptive_max_pool2d.

    Returns: (batch, channels, out_length), or maxima and indices. dtypes and errors: see max_pool2d.
    Source: torch.nn.functional.adaptive_max_pool1d.

    >>> FF.adaptive_max_pool1d(torch.tensor([[[1.0, 5.0, 2.0]]]), 2)
    tensor([[[5., 5.]]])
    """
    if not _is_compiling():
        result = _fast_adaptive_max_pool1d(input, output_size, return_indices)
        if result is not NotImplemented:
            return result
    return _general_adaptive(adaptive_max_pool1d, input, output_size, return_indices)


def adaptive_max_pool2d(input: Tensor, output_size: OutputSizes, return_indices: bool = False) -> Any:
    """The maximum of each of output_size windows: of n elements, window i of m holds [i n // m, ceil((i + 1) n / m)).

    Args:
        input: (batch, channels, height, width) or (channels, height, width), any strides; float32, float64, bfloat16 or
            float16.
        output_size: a number, or one for each dimension; None for the input's.
        return_indices: as in max_pool2d.

    Returns: the maxima, (batch, channels, *output_size) in input's dtype; with return_indices maxima and indices.
    Raises: see max_pool2d. Source: torch.nn.functional.adaptive_max_pool2d.

    >>> FF.adaptive_max_pool2d(torch.arange(16.0).view(1, 1, 4, 4), (1, 2))
    tensor([[[[13., 15.]]]])
    """
    if not _is_compiling():
        result = _fast_adaptive_max_pool2d(input, output_size, return_indices)
        if result is not NotImplemented:
            return result
    return _general_adaptive(adaptive_max_pool2d, input, output_size, return_indices)


def adaptive_max_pool3d(input: Tensor, output_size: OutputSizes, return_indices: bool = False) -> Any:
    """adaptive_max_pool2d in three dimensions.

    Args:
        input: (batch, channels, depth, height, width) or (channels, depth, height, width).
        output_size, return_indices: as in adaptive_max_pool2d.

    Returns: (batch, channels, out_depth, out_height, out_width), or maxima and indices. dtypes and errors: see
    max_pool2d.
    Source: torch.nn.functional.adaptive_max_pool3d.

    >>> FF.adaptive_max_pool3d(torch.arange(8.0).view(1, 1, 2, 2, 2), (1, 1, None))
    tensor([[[[[6., 7.]]]]])
    """
    if not _is_compiling():
        result = _fast_adaptive_max_pool3d(input, output_size, return_indices)
        if result is not NotImplemented:
            return result
    return _general_adaptive(adaptive_max_pool3d, input, output_size, return_indices)


def adaptive_avg_pool1d(input: Tensor, output_size: OutputSizes) -> Tensor:
    """adaptive_avg_pool2d in one dimension.

    Args:
        input: (batch, channels, length) or (channels, length).
        output_size: as in adaptive_avg_pool2d.

    Returns: (batch, channels, out_length). dtypes and errors: see max_pool2d.
    Source: torch.nn.functional.adaptive_avg_pool1d.

    >>> FF.adaptive_avg_pool1d(torch.tensor([[[1.0, 5.0, 2.0]]]), 2)
    tensor([[[3.0000, 3.5000]]])
    """
    if not _is_compiling():
        result = _fast_adaptive_avg_pool1d(input, output_size)
        if result is not NotImplemented:
            return result
    return _general_adaptive(adaptive_avg_pool1d, input, output_size)


def adaptive_avg_pool2d(input: Tensor, output_size: OutputSizes) -> Tensor:
    """The average of each of output_size windows: of n elements, window i of m holds [i n // m, ceil((i + 1) n / m)).

    Args:
        input: (batch, channels, height, width) or (channels, height, width), any strides; float32, float64, bfloat16 or
            float16.
        output_size: a number, or one for each dimension; None for the input's.

    Returns: (batch, channels, *output_size) in input's dtype.
    Raises: see max_pool2d. Source: torch.nn.functional.adaptive_avg_pool2d.

    >>> FF.adaptive_avg_pool2d(torch.arange(16.0).view(1, 1, 4, 4), 1)
    tensor([[[[7.5000]]]])
    """
    if not _is_compiling():
        result = _fast_adaptive_avg_pool2d(input, output_size)
        if result is not NotImplemented:
            return result
    return _general_adaptive(adaptive_avg_pool2d, input, output_size)


def adaptive_avg_pool3d(input: Tensor, output_size: OutputSizes) -> Tensor:
    """adaptive_avg_pool2d in three dimensions.

    Args:
        input: (batch, channels, depth, height, width) or (channels, depth, height, width).
        output_size: as in adaptive_avg_pool2d.

    Returns: (batch, channels, out_depth, out_height, out_width). dtypes and errors: see max_pool2d.
    Source: torch.nn.functional.adaptive_avg_pool3d.

    >>> FF.adaptive_avg_pool3d(torch.arange(8.0).view(1, 1, 2, 2, 2), 1)
    tensor([[[[[3.5000]]]]])
    """
    if not _is_compiling():
        result = _fast_adaptive_avg_pool3d(input, output_size)
        if result is not NotImplemented:
            return result
    return _general_adaptive(adaptive_avg_pool3d, input, output_size)


# ours -> theirs, dimensions
_KINDS: dict[Callable[..., Any], tuple[Callable[..., Any], int]] = {
    max_pool1d: (F.max_pool1d, 1),
    max_pool2d: (F.max_pool2d, 2),
    max_pool3d: (F.max_pool3d, 3),
    avg_pool1d: (F.avg_pool1d, 1),
    avg_pool2d: (F.avg_pool2d, 2),
    avg_pool3d: (F.avg_pool3d, 3),
    adaptive_max_pool1d: (F.adaptive_max_pool1d, 1),
    adaptive_max_pool2d: (F.adaptive_max_pool2d, 2),
    adaptive_max_pool3d: (F.adaptive_max_pool3d, 3),
    adaptive_avg_pool1d: (F.adaptive_avg_pool1d, 1),
    adaptive_avg_pool2d: (F.adaptive_avg_pool2d, 2),
    adaptive_avg_pool3d: (F.adaptive_avg_pool3d, 3),
}


def _general_max(
    ours: Callable[..., Any],
    input: Any,
    kernel_size: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    ceil_mode: Any,
    return_indices: Any,
) -> Any:
    theirs, dims = _KINDS[ours]
    args = kernel_size, stride, padding, dilation, ceil_mode, return_indices
    if not _is_compiling() and overrides(input):
        return handle_torch_function(ours, (input,), input, *args)
    if _takes(input) and type(return_indices) is bool:
        windows = _windows(input, dims, kernel_size, stride, padding, dilation, ceil_mode, False)
        if windows is not None:
            return _maxima(input, dims, windows, return_indices)
    return torch_op(ours.__name__, _explain(dims, "dilation"), theirs, input, *args)


def _general_avg(
    ours: Callable[..., Any],
    input: Any,
    kernel_size: Any,
    stride: Any,
    padding: Any,
    ceil_mode: Any,
    count_include_pad: Any,
    divisor_override: Any = None,
) -> Any:
    theirs, dims = _KINDS[ours]
    args = kernel_size, kernel_size if stride is None else stride, padding, ceil_mode, count_include_pad
    if dims > 1:
        args = *args, divisor_override
    if not _is_compiling() and overrides(input):
        return handle_torch_function(ours, (input,), input, *args)
    good = divisor_override is None or (type(divisor_override) is int and 0 < abs(divisor_override) < 2**63)
    if _takes(input) and type(count_include_pad) is bool and good and not _averaged_better_by_compilers(input):
        windows = _windows(input, dims, kernel_size, stride, padding, 1, ceil_mode, True)
        if windows is not None:
            return _pool_ops.avg_pool(_cast(input, dims), windows, count_include_pad, divisor_override or 0)
    return torch_op(ours.__name__, _explain(dims, "ceil_mode"), theirs, input, *args)


def _general_adaptive(ours: Callable[..., Any], input: Any, output_size: Any, *return_indices: Any) -> Any:
    theirs, dims = _KINDS[ours]
    if not _is_compiling() and overrides(input):
        return handle_torch_function(ours, (input,), input, output_size, *return_indices)
    compilers = not return_indices and fused_better_by_compilers()
    takes = not compilers and _takes(input)
    if takes and input.dim() in (dims + 1, dims + 2) and all(type(b) is bool for b in return_indices):
        output = _output_sizes(input, dims, output_size)
        if output is not None and (_is_compiling() or not _C.adaptive_pool_problem(input, dims, output)):
            windows = _pool_ops.adaptive(output)
            if return_indices:
                return _maxima(input, dims, windows, return_indices[0])
            return _pool_ops.avg_pool(_cast(input, dims), windows, False, 0)
    return torch_op(ours.__name__, _explain_adaptive(dims), theirs, input, output_size, *return_indices)


def _takes(input: Any) -> bool:
    return general(input) and supported(input, on_gpu=True)


def _averaged_better_by_compilers(input: Tensor) -> bool:
    """Whether an average over windows is PyTorch's because torch.compile compiles this call.

    Inductor, Zen 5, two threads, ours against its own: 64x32x28x28, 2x2, channels first 2.05, channels last 0.45.
    With gradients, a step of convolutions, ReLUs and average pools, 8x16x28x28: 0.74, since a ReLU before an op that
    keeps no input saves a mask of bools, which Inductor reads slowly.
    """
    return fused_better_by_compilers() and (input.requires_grad or not input.is_contiguous())


def _cast(input: Tensor, dims: int) -> Tensor:
    """What is three-dimensional is on the CPU autocast's float32 list, as in PyTorch."""
    low = input.dtype in (torch.bfloat16, torch.float16) and input.device.type == "cpu"
    return input.float() if dims == 3 and low and torch.is_autocast_enabled("cpu") else input


def _maxima(input: Tensor, dims: int, windows: _pool_ops.Windows, return_indices: bool) -> Any:
    output, indices = _pool_ops.max_pool(_cast(input, dims), windows, return_indices)
    return (output, indices) if return_indices else output


def _windows(
    input: Tensor, dims: int, kernel_size: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: Any, average: bool
) -> _pool_ops.Windows | None:
    """The windows over this input; None where they are for PyTorch to read or to refuse."""
    if input.dim() not in (dims + 1, dims + 2) or type(ceil_mode) is not bool:
        return None
    if stride is None or (isinstance(stride, (tuple, list)) and len(stride) == 0):
        stride = kernel_size
    numbers = [_sizes(value, dims) for value in (kernel_size, stride, padding, dilation)]
    if any(n is None for n in numbers):
        return None
    if not _is_compiling() and _C.pool_problem(input, dims, *numbers, ceil_mode, average) != "":
        return None
    return _pool_ops.windows_of(*numbers, ceil_mode)


def _output_sizes(input: Tensor, dims: int, output_size: Any) -> tuple[int | torch.SymInt, ...] | None:
    """An adaptive pool's; None where it is not for fastops to say what was meant."""
    several = isinstance(output_size, (tuple, list))
    # PyTorch's one-dimensional forms know no None.
    if several and len(output_size) == dims > 1:
        spatial = input.shape[input.dim() - dims :]
        output_size = [n if o is None else o for o, n in zip(output_size, spatial, strict=True)]
    output = tuple(output_size) if several else (output_size,) * dims
    # A symbolic size of the input's is no int, and good.
    good = all(type(o) is torch.SymInt or (type(o) is int and abs(o) < 2**63) for o in output)
    return output if good and len(output) == dims else None


def _explain(dims: int, fourth: str) -> Callable[..., str]:
    """fourth: what comes after padding, dilation or not."""

    def explain(
        input: Any, kernel_size: Any, stride: Any = None, padding: Any = 0, after_padding: Any = 1, *rest: Any
    ) -> str:
        if not isinstance(input, Tensor):
            return f"input must be a Tensor, got {show(input)}"
        values = {"kernel_size": kernel_size, "padding": padding}
        if stride is not None:
            values["stride"] = stride
        average = fourth != "dilation"
        dilation, ceil_mode = (1, after_padding) if average else (after_padding, rest[0] if rest else False)
        for name, value in {**values, "dilation": dilation}.items():
            if _sizes(value, dims) is None:
                return f"{name} must be a number or {dims}, one for each dimension, got {show(value)}"
        divisor = rest[1] if average and len(rest) > 1 else None
        if divisor is not None and (type(divisor) is not int or divisor == 0):
            return f"divisor_override must be a number other than 0, or None, got {show(divisor)}"
        return _C.pool_problem(input, dims, kernel_size, stride, padding, dilation, ceil_mode, average) or ""

    return explain


def _explain_adaptive(dims: int) -> Callable[..., str]:
    def explain(input: Any, output_size: Any, *_: Any) -> str:
        if not isinstance(input, Tensor):
            return f"input must be a Tensor, got {show(input)}"
        output = _output_sizes(input, dims, output_size) if input.dim() > dims else ()
        if output is None:
            return f"output_size must be a number or {dims}, each a number or None, got {show(output_size)}"
        return _C.adaptive_pool_problem(input, dims, output)

    return explain
