"""Which kernels ran: fastops.record()."""

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch

from fastops import _C


class Row(NamedTuple):
    """One kernel call. A call handed to PyTorch's own op has kernel "aten"."""

    op: str  # "linear", "linear_backward", "gelu", ...
    kernel: str  # <algorithm>[_<tile>]_<tier>, see record
    shapes: str  # of the operands: "16x10, 5x10, 5"
    dtype: str
    microseconds: float  # on a GPU, until the kernel is queued
    flops: float = 0.0  # floating point operations that the formula asks for; 0 where it is no product
    begin: float = 0.0  # of the call, in microseconds of time.perf_counter
    thread: int = 0  # the operating system's number of the thread that made the call


class Calls(list[Row]):
    """The rows of one recording, in the order of the calls. Filled when the block ends. str() is an aligned table."""

    def times(self, by: Literal["op", "kernel", "shapes", "dtype"] = "op") -> dict[str, float]:
        """Microseconds in all calls of each op (kernel, shapes, dtype), the longest first.

        Raises ValueError for a column that does not exist.

        >>> with fastops.record() as calls:
        ...     y = FF.relu(FF.linear(torch.ones(16, 10), torch.ones(5, 10)))
        >>> sorted(calls.times("op"))
        ['linear', 'relu']
        """
        if by not in Row._fields[:4]:
            raise ValueError(f"times: by must be one of {', '.join(Row._fields[:4])}, got {by!r}")
        found: dict[str, float] = {}
        for row in self:
            found[getattr(row, by)] = found.get(getattr(row, by), 0.0) + row.microseconds
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    def save_trace(self, path: str | os.PathLike[str]) -> None:
        """Writes the calls as a timeline in Chrome's trace format, for ui.perfetto.dev and chrome://tracing.

        Each call is a bar of its thread, named by its op, with kernel, shapes, dtype and GFLOP/s.

        Raises OSError where path cannot be written.

        >>> import tempfile, os
        >>> with fastops.record() as calls:
        ...     y = FF.relu(torch.ones(16, 10))
        >>> calls.save_trace(os.path.join(tempfile.gettempdir(), "trace.json"))
        """
        process = os.getpid()
        first = min((row.begin for row in self), default=0.0)
        name = {"name": "process_name", "ph": "M", "pid": process, "args": {"name": "fastops.record()"}}
        bars = [
            {
                "name": row.op,
                "cat": "aten" if row.kernel == "aten" else "fastops",
                "ph": "X",
                "ts": row.begin - first,
                "dur": row.microseconds,
                "pid": process,
                "tid": row.thread,
                "args": {
                    "kernel": row.kernel,
                    "shapes": row.shapes,
                    "dtype": row.dtype,
                    **({"flops": row.flops, "GFLOP/s": row.flops / row.microseconds / 1e3} if row.flops else {}),
                },
            }
            for row in self
        ]
        with open(path, "w") as file:
            json.dump({"traceEvents": [name, *bars], "displayTimeUnit": "ns"}, file)

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
        Calls, a list of one Row (op, kernel, shapes, dtype, microseconds, flops, begin, thread) for each call. It is
        filled when the block ends. str() is an aligned table; times("op") has the sums; save_trace("trace.json") writes
        a timeline for ui.perfetto.dev. The kernel of a call that PyTorch's own op did is "aten". Every other name is
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
    dtype = "" if first is None else str(first.dtype).removeprefix("torch.")
    _C.record_add(op, "aten", shapes, dtype, microseconds, begin / 1000)
    return result
