"""fastops' ops in PyTorch's own: fastops.decompositions()."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._ops import OpOverload

from fastops import _C
from fastops.functional._activation import torch_activate
from fastops.ops import KIND

_ops = torch.ops.fastops


def decompositions() -> dict[OpOverload, Callable[..., Any]]:
    """A table that writes the ops of `torch.ops.fastops` which a forward pass makes in PyTorch's own ops.

    Example:
        >>> with fastops.export_kernels():
        ...     program = torch.export.export(model, (x,))
        >>> plain = program.run_decompositions(fastops.decompositions())
    """
    return {
        _ops.linear_forward.default: _linear,
        _ops.conv_forward.default: _conv,
        _ops.activation_forward.default: _activation,
        _ops.prelu_forward.default: F.prelu,
        _ops.glu_forward.default: F.glu,
        _ops.max_pool_forward.default: _max_pool,
        _ops.avg_pool_forward.default: _avg_pool,
    }


def _finish(z: Tensor, activation: str, a: float, b: float, need_saved: bool) -> tuple[Tensor, Tensor]:
    """A layer's two results from its pre-activation."""
    saves = need_saved and _C.saved_by_linear(KIND[activation], a, b) == "input"
    return torch_activate(z, activation, a, b), z if saves else z.new_empty(0)


def _linear(
    input: Tensor, weight: Tensor, bias: Tensor | None, activation: str, a: float, b: float, need_saved: bool
) -> tuple[Tensor, Tensor]:
    return _finish(F.linear(input, weight, bias), activation, a, b, need_saved)


def _conv(
    input: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], transposed: bool, groups: int, activation: str, a: float, b: float, need_saved: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    before, after = padding[: len(stride)], padding[len(stride) :]
    output_padding = [0] * len(stride)
    if transposed:
        output_padding = [x - y for x, y in zip(before, after, strict=True)]
    elif before != after:
        around = zip(before[::-1], after[::-1], strict=True)  # F.pad starts with the last dimension
        input = F.pad(input, [x for pair in around for x in pair])
        before = output_padding
    z = torch.ops.aten.convolution(input, weight, bias, stride, before, dilation, transposed, output_padding, groups)
    return _finish(z, activation, a, b, need_saved)


# Where the derivative takes the value of the piece inside, for the kinds that save a bit of that.
_INSIDE: dict[str, Callable[[Tensor, float, float], Tensor]] = {
    "relu": lambda x, a, b: ~(x <= 0),
    "relu6": lambda x, a, b: ~((x <= 0) | (x >= 6)),
    "leaky_relu": lambda x, a, b: x > 0,
    "hardtanh": lambda x, a, b: ~((x <= a) | (x >= b)),
    "hardsigmoid": lambda x, a, b: (x > -3) & (x < 3),
    "hardshrink": lambda x, a, b: ~((x >= -a) & (x <= a)),
    "softshrink": lambda x, a, b: ~((x >= -a) & (x <= a)),
    "threshold": lambda x, a, b: ~(x <= a),
}


def _activation(input: Tensor, activation: str, a: float, b: float, need_mask: bool) -> tuple[Tensor, Tensor]:
    y = torch_activate(input, activation, a, b)
    if not need_mask or _C.saved_by_default(KIND[activation], a, b) != "mask":
        return y, input.new_empty(0, dtype=torch.uint8)
    bits = _INSIDE[activation](input, a, b).reshape(-1).to(torch.uint8)
    bytes = F.pad(bits, [0, -bits.shape[0] % 8]).reshape(-1, 8)
    return y, (bytes << torch.arange(8, dtype=torch.uint8, device=input.device)).sum(1, dtype=torch.uint8)


def _rounds_up(input: Tensor, output_size: Sequence[int], *windows: Sequence[int]) -> bool:
    """Whether windows (kernel, stride, padding and dilation a dimension) end in one that is not whole: ceil_mode."""
    sizes = input.shape[input.dim() - len(output_size) :]
    return any(
        (size + 2 * p - d * (k - 1) - 1) // s + 1 != out
        for size, out, k, s, p, d in zip(sizes, output_size, *windows, strict=True)
    )


def _max_pool(
    input: Tensor, output_size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], indices: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    kind = f"max_pool{len(output_size)}d"
    if kernel:
        ceil_mode = _rounds_up(input, output_size, kernel, stride, padding, dilation)
        y, positions = getattr(F, kind)(input, kernel, stride, padding, dilation, ceil_mode, return_indices=True)
    else:
        y, positions = getattr(F, f"adaptive_{kind}")(input, output_size, return_indices=True)
    # The backward op takes positions in the plane for compact indices, too.
    return y, input.new_empty(0, dtype=torch.int64) if indices == "none" else positions


def _avg_pool(
    input: Tensor, output_size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    count_include_pad: bool, divisor_override: int,
) -> Tensor:  # fmt: skip
    kind = f"avg_pool{len(output_size)}d"
    if not kernel:
        return getattr(F, f"adaptive_{kind}")(input, output_size)
    ceil_mode = _rounds_up(input, output_size, kernel, stride, padding, [1] * len(kernel))
    divisor = [divisor_override or None] if len(kernel) > 1 else []  # of one dimension there is none
    return getattr(F, kind)(input, kernel, stride, padding, ceil_mode, count_include_pad, *divisor)
