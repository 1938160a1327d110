"""fastops.monitor: what training does, step by step, for TensorBoard or whoever takes scalars."""

import os
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn

from fastops import memory
from fastops._extras import needs
from fastops.record import record

__all__ = ["Monitor"]


class Monitor:
    """Writes the loss, the time of a step, where that time went, and memory.

    Args:
        writer: anything with add_scalar(tag, value, step), as torch.utils.tensorboard.SummaryWriter, or a folder,
            for which it makes such a writer (pip install fastops[monitor]).
        every: the kernels of every so many steps are recorded, which takes a microsecond a call. Default: 10.

    Tags:
        step_ms: milliseconds of the step; and what the step's own dict has, such as "loss". Of each step.
        time/<op>, kernel/<kernel>: the share of the step in an op, or a kernel, of fastops; "aten" is what it handed to
            PyTorch. time/elsewhere: in all else. GFLOP/s: of the whole step, counting products. Of every `every`th.
        memory/pool_mb, memory/peak_mb: fastops' pool, and the most that the process has had. Of every `every`th.

    Shapes and dtypes: a scalar is a number, or a tensor of one element of any dtype.
    Raises: TypeError: writer is neither. ValueError: every is below 1. ModuleNotFoundError:
        a folder, without tensorboard.
    Source: fastops' own.

    >>> class Prints:
    ...     def add_scalar(self, tag, value, step):
    ...         if tag == "loss":
    ...             print(step, tag, value)
    >>> model, monitor = nn.Linear(4, 1), fastops.monitor.Monitor(Prints())
    >>> for _ in range(2):
    ...     with monitor.step() as scalars:
    ...         scalars["loss"] = FF.mse_loss(torch.zeros(8, 1), torch.ones(8, 1))
    0 loss 1.0
    1 loss 1.0
    """

    def __init__(self, writer: Any, every: int = 10) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"Monitor: every must be an int of 1 or more, got {every!r}")
        self._owns = isinstance(writer, str | os.PathLike)
        if self._owns:
            writer = _summary_writer(os.fspath(writer))
        elif not callable(getattr(writer, "add_scalar", None)):
            raise TypeError(f"Monitor: writer must be a folder or have add_scalar, got {type(writer).__name__}")
        self.writer, self.every, self.steps = writer, every, 0

    @contextmanager
    def step(self) -> Iterator[dict[str, Any]]:
        """A training step. Yields a dict: what is put into it is written as scalars when the block ends."""
        scalars: dict[str, Any] = {}
        closer = self.steps % self.every == 0
        with record() if closer else nullcontext() as calls:
            begin = time.perf_counter()
            yield scalars
            microseconds = (time.perf_counter() - begin) * 1e6
        found = {"step_ms": microseconds / 1e3, **scalars}
        if closer:
            ops = calls.times("op")
            found |= {f"time/{op}": spent / microseconds for op, spent in ops.items()}
            found |= {f"kernel/{kernel}": spent / microseconds for kernel, spent in calls.times("kernel").items()}
            found["time/elsewhere"] = max(0.0, 1 - sum(ops.values()) / microseconds)
            found["GFLOP/s"] = sum(row.flops for row in calls) / microseconds / 1e3
            pool = memory.stats()
            found["memory/pool_mb"] = (pool["allocated_bytes"] + pool["cached_bytes"]) / 2**20
            found["memory/peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        for tag, value in found.items():
            self.writer.add_scalar(tag, float(value.detach() if isinstance(value, Tensor) else value), self.steps)
        self.steps += 1

    def histograms(self, model: nn.Module) -> None:
        """Histograms of the parameters, and of the gradients that there are, by the writer's add_histogram."""
        add = self._method("add_histogram")
        for name, parameter in model.named_parameters():
            add(f"parameters/{name}", parameter.detach(), self.steps)
            if parameter.grad is not None:
                add(f"gradients/{name}", parameter.grad, self.steps)

    def graph(self, model: nn.Module, *inputs: Any) -> None:
        """The graph of a call, by the writer's add_graph, which traces it: replaced layers are PyTorch's there."""
        self._method("add_graph")(model, inputs)

    def close(self) -> None:
        """Closes the writer, if the monitor has made it."""
        if self._owns:
            self.writer.close()

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def _method(self, name: str) -> Any:
        method = getattr(self.writer, name, None)
        if not callable(method):
            raise TypeError(f"Monitor: writer must have {name} for this, {type(self.writer).__name__} has none")
        return method


def _summary_writer(folder: str) -> Any:
    with needs("fastops.monitor", "monitor"):
        from torch.utils.tensorboard import SummaryWriter
    return SummaryWriter(folder)
