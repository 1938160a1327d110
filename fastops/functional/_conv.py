"""torch.nn.functional's convolutions on fastops' kernels, with activation= fused into them."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_dynamo_compiling as _is_compiling
from torch.overrides import handle_torch_function

from fastops import _C
from fastops._activations import KIND, valid
from fastops.functional._activation import Activation, resolve_activation, torch_activate
from fastops.functional._general import explain_kinds, explain_types, general, overrides, show, torch_op
from fastops.ops import conv as _conv_ops

__all__ = ["conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"]

Sizes = int | Sequence[int]

_fast_conv1d = _C.conv1d
_fast_conv2d = _C.conv2d
_fast_conv3d = _C.conv3d
_fast_conv_transpose1d = _C.conv_transpose1d
_fast_conv_transpose2d = _C.conv_transpose2d
_fast_conv_transpose3d = _C.conv_transpose3d


def conv1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sizes = 1,
    padding: Sizes | str = 0,
    dilation: Sizes = 1,
    groups: int = 1,
    activation: Activation = None,
) -> Tensor:
    """conv2d in one dimension.

    Args:
        input: (batch, in_channels, length) or (in_channels, length).
        weight: (out_channels, in_channels / groups, kernel_length).
        bias, stride, padding, dilation, groups, activation: as in conv2d.

    Returns: (batch, out_channels, out_length). dtypes and errors: see conv2d. Source: torch.nn.functional.conv1d.

    >>> FF.conv1d(torch.tensor([[[1.0, 2.0, 4.0, 8.0]]]), torch.tensor([[[-1.0, 1.0]]]))
    tensor([[[1., 2., 4.]]])
    """
    if activation is None and not _is_compiling():
        result = _fast_conv1d(input, weight, bias, stride, padding, dilation, groups, 0, 0.0, 0.0)
        if result is not NotImplemented:
            return result
    return _general(conv1d, (input, weight, bias, stride, padding, dilation, groups), activation)


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sizes = 1,
    padding: Sizes | str = 0,
    dilation: Sizes = 1,
    groups: int = 1,
    activation: Activation = None,
) -> Tensor:
    """Convolution and activation in one kernel, y = f(conv(x, w) + b), forward and backward.

    Args:
        input: (batch, in_channels, height, width) or (in_channels, height, width), any strides; float32, float64,
            bfloat16 or float16.
        weight: (out_channels, in_channels / groups, kernel_height, kernel_width), in input's dtype.
        bias: (out_channels), or None.
        stride, padding, dilation: a number, or one for each dimension. padding may also be "valid" (none) or "same" (as
            much as keeps the size; where that is odd, the extra row or column comes last).
        groups: how many groups the channels are split into, each with filters of its own.
        activation: f. None, a name ("relu", "gelu", "gelu_tanh", "leaky_relu", ... with the default parameters of
            torch.nn.functional) or an activation module such as nn.LeakyReLU(0.2).

    Returns:
        (batch, out_channels, out_height, out_width), without batch where input has none, in input's dtype;
        channels_last where input or weight is. As with torch.relu, the result of a fused activation must not be changed
        in place before its backward.

    Raises:
        RuntimeError: shapes, dtypes or devices do not fit. TypeError: an argument is of the wrong type.
        ValueError: an activation that does not exist or cannot be fused.

    Source: torch.nn.functional.conv2d. fastops.set_conv_precision says which algorithms float32 may use.

    >>> x, w = torch.ones(1, 1, 3, 3), torch.ones(1, 1, 2, 2)
    >>> FF.conv2d(x, w)
    tensor([[[[4., 4.],
              [4., 4.]]]])
    >>> FF.conv2d(x, w, torch.tensor([-5.0]), activation="relu").sum()
    tensor(0.)
    """
    if activation is None and not _is_compiling():
        result = _fast_conv2d(input, weight, bias, stride, padding, dilation, groups, 0, 0.0, 0.0)
        if result is not NotImplemented:
            return result
    return _general(conv2d, (input, weight, bias, stride, padding, dilation, groups), activation)


def conv3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sizes = 1,
    padding: Sizes | str = 0,
    dilation: Sizes = 1,
    groups: int = 1,
    activation: Activation = None,
) -> Tensor:
    """conv2d in three dimensions.

    Args:
        input: (batch, in_channels, depth, height, width) or (in_channels, depth, height, width).
        weight: (out_channels, in_channels / groups, kernel_depth, kernel_height, kernel_width).
        bias, stride, padding, dilation, groups, activation: as in conv2d.

    Returns: (batch, out_channels, out_depth, out_height, out_width). dtypes and errors: see conv2d.
    Source: torch.nn.functional.conv3d.

    >>> FF.conv3d(torch.ones(1, 2, 4, 4, 4), torch.ones(3, 2, 3, 3, 3), padding=1).shape
    torch.Size([1, 3, 4, 4, 4])
    """
    if activation is None and not _is_compiling():
        result = _fast_conv3d(input, weight, bias, stride, padding, dilation, groups, 0, 0.0, 0.0)
        if result is not NotImplemented:
            return result
    return _general(conv3d, (input, weight, bias, stride, padding, dilation, groups), activation)


def conv_transpose1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sizes = 1,
    padding: Sizes = 0,
    output_padding: Sizes = 0,
    groups: int = 1,
    dilation: Sizes = 1,
    activation: Activation = None,
) -> Tensor:
    """conv_transpose2d in one dimension.

    Args:
        input: (batch, in_channels, length) or (in_channels, length).
        weight: (in_channels, out_channels / groups, kernel_length).
        bias, stride, padding, output_padding, groups, dilation, activation: as in conv_transpose2d.

    Returns: (batch, out_channels, out_length). dtypes and errors: see conv2d. Source:
    torch.nn.functional.conv_transpose1d.

    >>> FF.conv_transpose1d(torch.tensor([[[1.0, 2.0]]]), torch.ones(1, 1, 3))
    tensor([[[1., 3., 3., 2.]]])
    """
    if activation is None and not _is_compiling():
        result = _fast_conv_transpose1d(
            input, weight, bias, stride, padding, output_padding, groups, dilation, 0, 0.0, 0.0
        )
        if result is not NotImplemented:
            return result
    return _general(
        conv_transpose1d, (input, weight, bias, stride, padding, output_padding, groups, dilation), activation
    )


def conv_transpose2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sizes = 1,
    padding: Sizes = 0,
    output_padding: Sizes = 0,
    groups: int = 1,
    dilation: Sizes = 1,
    activation: Activation = None,
) -> Tensor:
    """Transposed convolution and activation in one kernel, y = f(conv_transpose(x, w) + b), forward and backward.

    conv_transpose maps the gradient of conv2d's output to the gradient of its input.

    Args:
        input: (batch, in_channels, height, width) or (in_channels, height, width), any strides; float32, float64,
            bfloat16 or float16.
        weight: (in_channels, out_channels / groups, kernel_height, kernel_width), in input's dtype.
        bias: (out_channels), or None.
        stride, padding, dilation, groups: those of that convolution. padding is cut off the result on either side.
        output_padding: rows and columns that the result has in addition at its end; fewer than stride or dilation.
        activation: as in conv2d.

    Returns:
        (batch, out_channels, out_height, out_width) in input's dtype, with out_height = (height - 1) stride - 2 padding
        + dilation (kernel_height - 1) + output_padding + 1, and out_width alike; without batch where input has none.

    Raises: see conv2d. Source: torch.nn.functional.conv_transpose2d.

    >>> FF.conv_transpose2d(torch.tensor([[[[1.0, 2.0]]]]), torch.ones(1, 1, 2, 2), stride=2)
    tensor([[[[1., 1., 2., 2.],
              [1., 1., 2., 2.]]]])
    """
    if activation is None and not _is_compiling():
        result = _fast_conv_transpose2d(
            input, weight, bias, stride, padding, output_padding, groups, dilation, 0, 0.0, 0.0
        )
        if result is not NotImplemented:
            return result
    return _general(
        conv_transpose2d, (input, weight, bias, stride, padding, output_padding, groups, dilation), activation
    )


def conv_transpose3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sizes = 1,
    padding: Sizes = 0,
    output_padding: Sizes = 0,
    groups: int = 1,
    dilation: Sizes = 1,
    activation: Activation = None,
) -> Tensor:
    """conv_transpose2d in three dimensions.

    Args:
        input: (batch, in_channels, depth, height, width) or (in_channels, depth, height, width).
        weight: (in_channels, out_channels / groups, kernel_depth, kernel_height, kernel_width).
        bias, stride, padding, output_padding, groups, dilation, activation: as in conv_transpose2d.

    Returns: (batch, out_channels, out_depth, out_height, out_width). dtypes and errors: see conv2d.
    Source: torch.nn.functional.conv_transpose3d.

    >>> FF.conv_transpose3d(torch.ones(1, 3, 2, 2, 2), torch.ones(3, 5, 2, 2, 2), stride=2).shape
    torch.Size([1, 5, 4, 4, 4])
    """
    if activation is None and not _is_compiling():
        result = _fast_conv_transpose3d(
            input, weight, bias, stride, padding, output_padding, groups, dilation, 0, 0.0, 0.0
        )
        if result is not NotImplemented:
            return result
    return _general(
        conv_transpose3d, (input, weight, bias, stride, padding, output_padding, groups, dilation), activation
    )


def _fast(door: Callable[..., Any], args: tuple[Any, ...], activation: Activation) -> Any:
    kind, a, b = resolve_activation(activation)
    # A name has good parameters; those of a module are its owner's.
    good = type(activation) is str or valid(kind, a, b)
    return door(*args, KIND[kind], a, b) if good else NotImplemented


class _Numbers(NamedTuple):
    """A call's arguments that are no tensors."""

    stride: Any
    padding: Any
    dilation: Any
    groups: Any
    output_padding: Any


def _numbers(args: tuple[Any, ...]) -> _Numbers:
    args = tuple(tuple(v) if isinstance(v, (tuple, list)) else v for v in args)  # a torch.Size, too
    if len(args) == 4:
        return _Numbers(*args, 0)
    stride, padding, output_padding, groups, dilation = args
    return _Numbers(stride, padding, dilation, groups, output_padding)


# ours -> theirs, dimensions, transposed, fast door
_KINDS: dict[Callable[..., Tensor], tuple[Callable[..., Tensor], int, bool, Callable[..., Any]]] = {
    conv1d: (F.conv1d, 1, False, _fast_conv1d),
    conv2d: (F.conv2d, 2, False, _fast_conv2d),
    conv3d: (F.conv3d, 3, False, _fast_conv3d),
    conv_transpose1d: (F.conv_transpose1d, 1, True, _fast_conv_transpose1d),
    conv_transpose2d: (F.conv_transpose2d, 2, True, _fast_conv_transpose2d),
    conv_transpose3d: (F.conv_transpose3d, 3, True, _fast_conv_transpose3d),
}


def _general(ours: Callable[..., Tensor], args: tuple[Any, ...], activation: Activation) -> Tensor:
    theirs, dims, transposed, door = _KINDS[ours]
    if activation is not None and not _is_compiling():
        result = _fast(door, args, activation)
        if result is not NotImplemented:
            return result
    input, weight, bias, *rest = args
    kind, a, b = resolve_activation(activation)
    tensors = (input, weight) if bias is None else (input, weight, bias)
    if not _is_compiling() and overrides(*tensors):
        return handle_torch_function(ours, tensors, *args, activation=activation)
    if general(*tensors) and input is not None and weight is not None:
        x, w, v = _conv_ops.cast(input, weight, bias)
        numbers = _numbers(tuple(rest))
        geometry = _geometry(numbers, dims, transposed, w)
        good = geometry is not None and _conv_ops.supports(x, w, v, dims) and valid(kind, a, b)
        if good and (_is_compiling() or _C.conv_problem(x, w, v, *numbers, dims, transposed) == ""):
            batched = x.dim() != dims + 1
            y = _conv_ops.conv(x if batched else x.unsqueeze(0), w, v, geometry, kind, float(a), float(b))
            return y if batched else y.squeeze(0)

    def explain(*args: Any) -> str:
        return _explain(dims, transposed, args)

    return torch_activate(torch_op(ours.__name__, explain, theirs, *args), kind, a, b)


def _sizes(value: Any, dims: int) -> tuple[int, ...] | None:
    """A number for every dimension; None where it is not for fastops to say what was meant."""
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    if len(values) == 1:
        values = values * dims  # Dynamo of torch 2.11 knows no "*=" of tuples
    return values if len(values) == dims and all(type(v) is int for v in values) else None


def _geometry(numbers: _Numbers, dims: int, transposed: bool, weight: Tensor) -> _conv_ops.Geometry | None:
    stride, dilation, extra = (_sizes(v, dims) for v in (numbers.stride, numbers.dilation, numbers.output_padding))
    if stride is None or dilation is None or extra is None or type(numbers.groups) is not int:
        return None
    if isinstance(numbers.padding, str):
        if transposed or numbers.padding not in ("same", "valid"):
            return None
        around = [0] * dims
        if numbers.padding == "same":
            if weight.dim() != dims + 2 or stride != (1,) * dims:
                return None
            around = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
        before = tuple(n // 2 for n in around)
        after = tuple(n - n // 2 for n in around)
    else:
        before = _sizes(numbers.padding, dims)
        if before is None:
            return None
        after = tuple(n - e for n, e in zip(before, extra, strict=True))
    return _conv_ops.Geometry(stride, before + after, dilation, transposed, numbers.groups)


def _explain(dims: int, transposed: bool, args: tuple[Any, ...]) -> str:
    input, weight, bias, *rest = args
    problem = explain_types(input, weight, bias) or explain_kinds(input, weight, bias)
    if problem:
        return problem
    numbers = _numbers(tuple(rest))
    for name, value in numbers._asdict().items():
        if name == "padding" and isinstance(value, str):
            if transposed:
                return f"padding must be a number or one for each dimension, got {value!r}"
            if value not in ("same", "valid"):
                return f"padding must be 'same', 'valid', a number or one for each dimension, got {value!r}"
            if value == "same" and _sizes(numbers.stride, dims) != (1,) * dims:
                return f"padding='same' needs stride 1, got {numbers.stride!r}"
        elif _sizes(value, 1 if name == "groups" else dims) is None:
            wanted = "a number" if name == "groups" else f"a number or {dims}, one for each dimension"
            return f"{name} must be {wanted}, got {show(value)}"
    return _C.conv_problem(*args[:3], *numbers, dims, transposed) or ""
