"""Which kernels ran: fastops.record()."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from fastops import _C


class Row(NamedTuple):
    """One kernel call. A call handed to PyTorch's own op has kernel "aten"."""

    op: str  # "linear", "linear_backward", "gelu", ...
    kernel: str  # <algorithm>[_<tile>]_<tier>, see record
    shapes: str  # of the operands: "16x10, 5x10, 5"
    dtype: str
    microseconds: float  # on a GPU, until the kernel is queued


class Calls(list[Row]):
    """The rows of one recording, in the order of the calls. Filled when the block ends. str() is an aligned table."""

    def __str__(self) -> str:
        rows = [(*row[:4], f"{row.microseconds:.1f}") for row in self]
        header = ("op", "kernel", "shapes", "dtype", "us")
        widths = [max(len(row[i]) for row in (header, *rows)) for i in range(5)]
        lines = []
        for row in (header, tuple("-" * width for width in widths), *rows):
            text = "  ".join(cell.ljust(width) for cell, width in zip(row[:4], widths[:4], strict=True))
            lines.append(f"{text}  {row[4].rjust(widths[4])}")
        return "\n".join(lines)


@contextmanager
def record() -> Iterator[Calls]:
    """Records every kernel call that is made inside the block, on every thread. Recordings may nest.

    Yields:
        Calls, a list of one Row (op, kernel, shapes, dtype, microseconds) for each call. It is filled when the block
        ends. str() is an aligned table. The kernel of a call that PyTorch's own op did is "aten". Every other name is
        <algorithm>[_<tile>]_<tier>: gemm_12x32_avx512, winograd_2x2_avx2, elementwise_cuda. The tile is the block of
        outputs that is computed together, if the algorithm has one; the tier is the instruction set, or cuda.

    Raises: what the block raises, which ends the recording. Source: fastops' own; FASTOPS_VERBOSE=1 prints such rows.

    >>> with fastops.record() as calls:
    ...     y = FF.linear(torch.ones(16, 10), torch.ones(5, 10), activation="relu")
    ...     z = FF.relu(torch.arange(3))
    >>> calls[0].op, calls[0].shapes, calls[0].dtype
    ('linear', '16x10, 5x10', 'float32')
    >>> [row.kernel == "aten" for row in calls]  # integers have no kernel of fastops'
    [False, True]
    """
    calls = Calls()
    _C.record_start()
    try:
        yield calls
    finally:
        calls.extend(Row(*row) for row in _C.record_stop())


def shapes_of(tensors: tuple[Any, ...]) -> str:
    """Shapes as the C++ rows write them: "16x10, 5x10, 5"; what is not a tensor is left out."""
    tensors = tuple(t for t in tensors if isinstance(t, torch.Tensor))
    return ", ".join("x".join(map(str, t.shape)) if t.dim() else "scalar" for t in tensors)


def aten(op: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls a function of PyTorch's and, when somebody listens, adds a row with kernel "aten" for it."""
    if not _C.record_enabled():
        return function(*args, **kwargs)
    begin = time.perf_counter_ns()
    result = function(*args, **kwargs)
    microseconds = (time.perf_counter_ns() - begin) / 1000
    first = next((t for t in args if isinstance(t, torch.Tensor)), None)
    # A nested tensor has no one shape to write down.
    shapes = "nested" if first is not None and first.is_nested else shapes_of(args)
    _C.record_add(op, "aten", shapes, "" if first is None else str(first.dtype).removeprefix("torch."), microseconds)
    return result
