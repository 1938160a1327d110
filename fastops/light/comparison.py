"""fastops.light.Comparison: what each step of making a model smaller cost and gained, measured."""

import copy
import io
import json
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import quantiles
from typing import Any

import torch
from torch import nn
from torch.autograd import profiler_legacy

from fastops.info import info
from fastops.light._progress import Progress

__all__ = ["Comparison", "Measured"]

_SECONDS = 0.01  # of one sample, which is one call where that takes longer
_COLUMNS = ("step", "on disk", "", "memory", "", "ms", "", "accuracy", "")


@dataclass
class Measured:
    """One model of a Comparison. Sizes are in bytes; what was not measured is None.

    Attributes:
        name: of the step that made it.
        disk: its state_dict, as torch.save writes it.
        memory: its weights, and the most that tensors take beside them in two calls, packed weights included.
        milliseconds: of a call, the median of the rounds. low, high: their quartiles.
        accuracy: what the user's function says.
    """

    name: str
    disk: int
    memory: int | None = None
    milliseconds: float | None = None
    low: float | None = None
    high: float | None = None
    accuracy: float | None = None


class Comparison:
    """Measures a model before and after each step that makes it smaller. str() is a table of the steps.

    Sizes, memory and accuracy are those of the moment, and a copy of the model is kept. Times are measured when
    somebody asks, of all copies in turn, so that they have the same machine. Ratios are those to the first step.

    Args:
        inputs: what a call is made with, of one row to see what a single request takes: a tensor of any shape and
            dtype, a tuple of arguments or a dict of named ones.
        accuracy: accuracy(model) gives a number for the user's own data, more is better; it is called once for each
            step, with the model in eval mode and without gradients. None: none.
        prepare: prepare(model) gives what is timed, called and asked for its accuracy, such as fastops.freeze; None:
            the model.
        rounds: how often all are timed in turn.
        progress: whether to write a line to the terminal.

    Attributes:
        machine: what it was measured on, in words.

    Raises:
        TypeError: by add, when model is not a torch.nn.Module, or cannot be copied.

    Source: fastops' own; medians of interleaved rounds as in fastops.explain.

    >>> from fastops import light
    >>> model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
    >>> comparison = light.Comparison(torch.randn(1, 64), accuracy=lambda model: 0.9)
    >>> comparison.add("as trained", model)
    >>> _ = light.prune_channels_(model, torch.randn(1, 64))
    >>> comparison.add("half of its neurons", model)
    >>> print(comparison)
    step                 on disk          memory             ms         accuracy
    as trained           ...
    half of its neurons  ...
    """

    def __init__(
        self,
        inputs: Any,
        accuracy: Callable[[nn.Module], float] | None = None,
        prepare: Callable[[nn.Module], nn.Module] | None = None,
        rounds: int = 15,
        progress: bool = False,
    ) -> None:
        self.inputs, self.accuracy, self.prepare, self.rounds, self.progress = (
            inputs,
            accuracy,
            prepare,
            rounds,
            progress,
        )
        used = info()
        self.machine = f"{used.cpu}, {used.threads} threads, {used.isa_used}, torch {used.torch}"
        self._steps: list[Measured] = []
        self._models: list[nn.Module] = []
        self._timed = 0

    def add(self, name: str, model: nn.Module) -> None:
        """Measures a model as it is now, and keeps a copy of it for its time.

        >>> from fastops import light
        >>> comparison = light.Comparison(torch.randn(1, 8))
        >>> comparison.add("as trained", nn.Linear(8, 2))
        >>> comparison.steps[0].name
        'as trained'
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"Comparison: model must be a torch.nn.Module, got {type(model).__name__}")
        try:
            kept = copy.deepcopy(model).eval()
        except Exception as error:  # whatever a model holds that cannot be copied
            raise TypeError(f"Comparison: model must be one that copy.deepcopy can copy: {error}") from error
        step = Measured(name, _bytes_on_disk(model))
        if self.prepare is not None:
            kept = self.prepare(kept)
        step.memory = _memory(kept, lambda: self._call(kept))
        if self.accuracy is not None:
            with torch.no_grad():
                step.accuracy = float(self.accuracy(kept))
        self._steps.append(step)
        self._models.append(kept)

    @property
    def steps(self) -> list[Measured]:
        """A Measured for each step, timed."""
        if self._timed < len(self._steps):
            self._time()
            self._timed = len(self._steps)
        return self._steps

    def __str__(self) -> str:
        if not self._steps:
            return "nothing measured"
        first = self.steps[0]
        rows = [_COLUMNS]
        for step in self.steps:
            cells = [step.name]
            for name, shown in (("disk", _shown_bytes), ("memory", _shown_bytes), ("milliseconds", "{:.3g}".format)):
                before, now = getattr(first, name), getattr(step, name)
                cells += ["" if now is None else shown(now), _times(before, now) if step is not first else ""]
            if step.accuracy is None or first.accuracy is None:
                cells += ["", ""]
            else:
                change = step.accuracy - first.accuracy
                cells += [f"{step.accuracy:.4f}", f"{change:+.4f}" if step is not first else ""]
            rows.append(tuple(cells))
        widths = [max(len(row[i]) for row in rows) for i in range(len(_COLUMNS))]
        table = [[cell.rjust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
        return "\n".join("  ".join([row[0].strip().ljust(widths[0]), *row[1:]]).rstrip() for row in table)

    def to_json(self) -> str:
        """All of it as JSON: machine, rounds and steps.

        >>> from fastops import light
        >>> light.Comparison(torch.randn(1, 8)).to_json()[:11]
        '{"machine":'
        """
        content = {"machine": self.machine, "rounds": self.rounds, "steps": [asdict(step) for step in self.steps]}
        return json.dumps(content)

    def plot(self, path: str | Path) -> bool:
        """Writes a picture (PNG, or what path ends with) of accuracy over size and over time, if Matplotlib is there.

        Returns:
            Whether it was written; if not, a line on the terminal says why.

        >>> from fastops import light
        >>> comparison = light.Comparison(torch.randn(1, 8), accuracy=lambda model: 0.9)
        >>> comparison.add("as trained", nn.Linear(8, 2))
        >>> import tempfile
        >>> comparison.plot(f"{tempfile.mkdtemp()}/light.png")
        True
        """
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
        except ImportError:
            sys.stderr.write(f"{path}: no picture without Matplotlib: pip install fastops[demo]\n")
            return False
        figure = Figure(figsize=(11, 4.5), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(1, 2, sharey=True)
        columns = ("KB on disk", "disk", 1e3), ("ms a call", "milliseconds", 1.0)
        for axis, (label, name, unit) in zip(axes, columns, strict=True):
            for i, step in enumerate(self.steps):
                place = getattr(step, name) / unit, 0.0 if step.accuracy is None else step.accuracy
                axis.plot(*place, "o", color=f"C{i % 10}", markersize=9, alpha=0.8, label=f"{i + 1}  {step.name}")
                axis.annotate(str(i + 1), place, (6, 6), textcoords="offset points", fontsize=9)
            axis.set_xscale("log")
            axis.xaxis.set_major_formatter("{x:g}")
            axis.xaxis.set_minor_formatter(lambda x, _: f"{x:g}" if f"{x:.0e}"[0] in "25" else "")
            axis.set_xlabel(label)
            axis.grid(alpha=0.3, which="both")
        axes[0].set_ylabel("accuracy")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=9, frameon=False)
        figure.suptitle(self.machine, fontsize=8)
        figure.savefig(path, dpi=120)
        return True

    def _call(self, model: nn.Module) -> Any:
        with torch.no_grad():
            if isinstance(self.inputs, Mapping):
                return model(**self.inputs)
            return model(*self.inputs) if isinstance(self.inputs, tuple) else model(self.inputs)

    def _time(self) -> None:
        counts = []
        for model in self._models:
            self._call(model)
            counts.append(max(1, int(_SECONDS / _seconds(lambda model=model: self._call(model), 3))))
        samples: list[list[float]] = [[] for _ in self._models]
        line = Progress("timing", self.rounds, self.progress)
        for _ in range(self.rounds):
            for model, count, found in zip(self._models, counts, samples, strict=True):
                found.append(1e3 * _seconds(lambda model=model: self._call(model), count))
            line.step()
        for step, found in zip(self._steps, samples, strict=True):
            step.low, step.milliseconds, step.high = quantiles(found, n=4) if len(found) > 1 else found * 3


def _seconds(call: Callable[[], Any], count: int) -> float:
    begin = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - begin) / count


def _bytes_on_disk(model: nn.Module) -> int:
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return file.tell()


def _memory(model: nn.Module, call: Callable[[], Any]) -> int | None:
    """Its weights, and the most that PyTorch's allocator gave out beside them in two calls; None if that is unknown."""
    tensors = {id(one): one for one in (*model.parameters(), *model.buffers())}
    weights = sum(one.numel() * one.element_size() for one in tensors.values())
    try:
        with _allocations() as found:
            call()
            call()
    except AttributeError:  # a torch without this profiler
        return None
    now = most = 0
    for bytes_given in found:
        now += bytes_given
        most = max(most, now)
    return weights + most


@contextmanager
def _allocations() -> Any:
    """The bytes of each allocation, in their order; negative where memory was given back."""
    found: list[int] = []
    # Not torch.profiler, which writes lines to the terminal.
    torch.autograd._enable_profiler_legacy(profiler_legacy.profile(profile_memory=True).config())
    try:
        yield found
    finally:
        for thread in torch.autograd._disable_profiler_legacy():
            found += [one.cpu_memory_usage() for one in thread if one.kind() == "memory_alloc"]


def _shown_bytes(count: float) -> str:
    for unit in ("B", "KB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def _times(before: float | None, after: float | None) -> str:
    return f"x{before / after:.2f}" if before and after else ""
