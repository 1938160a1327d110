"""fastops.explain and `fastops doctor`: what fastops would do for a model, measured on this machine."""

import argparse
import copy
import dataclasses
import importlib.util
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_map_only

from fastops import _C
from fastops.enable import enabled
from fastops.freeze import freeze
from fastops.fuse import fuse
from fastops.info import info
from fastops.record import Calls, record
from fastops.replace import Report, _check, replace_

__all__ = ["Explanation", "LayerTime", "Way", "explain"]

INFERENCE, TRAINING = "inference", "training step"

# From the least change to the most. A later one is recommended where it is faster by more than _WORTH_IT.
_CALLS = {
    "replace_": "fastops.replace_(model)",
    "enable": "fastops.enable()",
    "fuse": "model = fastops.fuse(model)",
    "freeze": "model = fastops.freeze(model)",
    "backend": 'model = torch.compile(model, backend="fastops")',
}
_WORTH_IT = 1.03
_SECONDS = 0.02  # of one sample, which is one call where that takes longer
# Outputs may differ by this, of the largest output: by roundings, in many layers.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}


class Way(NamedTuple):
    """One way to use fastops, measured beside PyTorch. Ratios are PyTorch's time by this one's."""

    name: str  # "replace_", "enable", "fuse", "freeze" or "backend"
    mode: str  # "inference" or "training step"
    milliseconds: float  # the median of the rounds
    ratio: float  # the median of the rounds' ratios
    slowest: float  # the smallest of these
    fastest: float  # the largest
    difference: float  # the largest difference of an output from PyTorch's, by the largest output
    problem: str  # why it was not measured, or is not recommended; "" where all is well

    @property
    def call(self) -> str:
        """The code: "model = fastops.fuse(model)"."""
        return _CALLS[self.name]


class _Side(NamedTuple):
    """What is measured: a call, and the block in which a sample of calls is made."""

    call: Callable[[], Any]
    block: Callable[[], AbstractContextManager[Any]] = nullcontext

    def seconds(self, calls: int = 1) -> float:
        """Of one call, by a sample of these."""
        with self.block():
            begin = time.perf_counter()
            for _ in range(calls):
                self.call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            return (time.perf_counter() - begin) / calls


class LayerTime(NamedTuple):
    """Where the time of PyTorch's model goes in inference: all modules of a class."""

    kind: str  # "Linear"
    count: int
    most: str  # the name of the one that takes most
    share: float  # of the whole call, without the modules that these call


@dataclass
class Explanation:
    """What explain found. str() is a page of about ten lines, save_html() one for a browser.

    Attributes:
        model, inputs, machine: what was measured where, in words.
        rounds: how often everything was measured in turn.
        milliseconds: PyTorch's, by mode: the median of the rounds.
        problems: why a mode was not measured, by mode.
        ways: a Way for each way and mode.
        layers: a LayerTime for each class of modules, the longest first.
        report: replace_'s Report.
        shares: the share of the call that goes into each module, by name; without the modules that it calls.
        calls: the kernel calls of one inference after replace_.
    """

    model: str
    inputs: str
    machine: str
    rounds: int
    milliseconds: dict[str, float]
    problems: dict[str, str]
    ways: list[Way]
    layers: list[LayerTime]
    report: Report
    shares: dict[str, float]
    calls: Calls

    def best(self, mode: str = INFERENCE) -> Way | None:
        """The way to take for "inference" or a "training step"; None where PyTorch is as fast.

        It is faster in every round, and one that changes more is faster than it by less than 3%.
        """
        found = None
        for way in self.ways:
            gains = way.mode == mode and not way.problem and way.slowest > 1
            if gains and (found is None or way.ratio > found.ratio * _WORTH_IT):
                found = way
        return found

    def left(self) -> list[tuple[float, str, str]]:
        """What replace_ leaves to PyTorch: its share of the time, the modules, and why; the longest first."""
        groups: dict[tuple[str, str], list[str]] = {}
        for row in (*self.report.skipped, *self.report.left):
            if not row.result.startswith("already"):
                groups.setdefault((row.module.rpartition(".")[2], row.result), []).append(row.name)
        found = [
            (sum(self.shares.get(name, 0.0) for name in names), f"{len(names)} x {kind}", why)
            for (kind, why), names in groups.items()
        ]
        return sorted(found, reverse=True)

    def __str__(self) -> str:
        lines = [f"{self.model}, {self.inputs}; {self.machine}"]
        for mode in (INFERENCE, TRAINING):
            if mode in self.problems:
                lines.append(f"{mode}: not measured, {self.problems[mode]}")
                continue
            if mode not in self.milliseconds:
                continue
            lines.append(f"{mode}: PyTorch {self.milliseconds[mode]:.3g} ms")
            for way in sorted((one for one in self.ways if one.mode == mode), key=lambda one: -one.ratio):
                if way.ratio:
                    spread = f"({way.slowest:.2f} - {way.fastest:.2f})"
                    text = f"{way.milliseconds:7.3g} ms, {way.ratio:.2f} times as fast {spread}"
                    lines.append(f"  {way.name:<9}{text}{'; ' + way.problem if way.problem else ''}")
                else:
                    lines.append(f"  {way.name:<9}not measured: {way.problem}")
        lines.append("advice: " + self.advice())
        lines.append("time: " + ", ".join(_told(layer) for layer in self.layers[:4]))
        rest = self.left()
        lines += [f"left to PyTorch: {share:.0%} in {what}: {why}" for share, what, why in rest[:3]]
        if len(rest) > 3:
            lines.append(f"left to PyTorch: {sum(share for share, *_ in rest[3:]):.0%} in {len(rest) - 3} other kinds")
        return "\n".join(lines)

    def advice(self) -> str:
        """What to do, in a line."""
        found = []
        for mode in self.milliseconds:
            way = self.best(mode)
            gain = f"{way.call} for {mode}, {way.ratio:.2f} times as fast" if way else f"nothing for {mode}"
            found.append(gain)
        if not any(map(self.best, self.milliseconds)):
            return "leave the model as it is, nothing was faster in every round"
        return "; ".join(found)

    def save_html(self, path: str) -> None:
        """Writes a page that needs nothing but itself: what was replaced, where time goes, what could be gained.

        Raises OSError where path cannot be written.
        """
        from fastops._page import page

        Path(path).write_text(page(self), encoding="utf-8")


def _told(layer: LayerTime) -> str:
    count = f"{layer.count} x " if layer.count > 1 else ""
    return f"{layer.share:.0%} {count}{layer.kind}" + (f" (most in {layer.most})" if layer.count > 1 else "")


def explain(
    model: nn.Module,
    *example_inputs: Any,
    kwargs: Mapping[str, Any] | None = None,
    ways: Sequence[str] = tuple(_CALLS),
    training: bool = True,
    rounds: int = 7,
) -> Explanation:
    """Measures what fastops would gain for a model, and says by which call, where the time goes, and what is left.

    PyTorch and each way run in turn, `rounds` times, on copies: inference in eval mode without gradients, and a
    training step, forward and backward, in train mode. A training step's loss is the output's `loss` where it has one,
    else the mean of squares. A way in which no kernel of fastops ran is measured, but not advised.

    Args:
        model: any module that can be copied. Nothing of it is changed, nor is the state of torch's random numbers.
        example_inputs: the arguments of a typical call. What a call writes, it writes to copies of their tensors.
        kwargs: arguments of that call by name.
        ways: which of "replace_", "enable", "fuse", "freeze" and "backend" to try. "backend" compiles, which takes
            seconds.
        training: whether to measure a training step.
        rounds: how often to measure everything.

    Returns:
        An Explanation: print it, or save_html("page.html").

    Raises:
        TypeError: model is no torch.nn.Module, or cannot be copied. ValueError: a way that does not exist, rounds
        below 1, or a model that has no values yet: lazy, or on the meta device. RuntimeError: enable() is on. What the
        model raises for these inputs in eval mode.

    Source: fastops' own.

    >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.GroupNorm(8, 64))
    >>> explanation = fastops.explain(model, torch.randn(32, 64), ways=["replace_", "fuse"], rounds=3)
    >>> [(way.name, way.mode) for way in explanation.ways]
    [('replace_', 'inference'), ('fuse', 'inference'), ('replace_', 'training step'), ('fuse', 'training step')]
    >>> [(what, why) for share, what, why in explanation.left()]
    [('1 x GroupNorm', 'no fastops kernel')]
    """
    _check(model, "explain")
    unknown = [one for one in ways if one not in _CALLS]
    if unknown:
        raise ValueError(f"explain: ways must be among {', '.join(_CALLS)}, got {unknown[0]!r}")
    if not isinstance(rounds, int) or rounds < 1:
        raise ValueError(f"explain: rounds must be 1 or more, got {rounds!r}")
    if _C.is_enabled():
        raise RuntimeError(
            "explain: PyTorch's ops are fastops' now, and there is nothing to compare: call disable() first"
        )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise ValueError(f"explain: model must have been called once: {name} has no values before that")
        if tensor.is_meta:
            raise ValueError(f"explain: model must have values, got {name} on the meta device")
    given = tree_map_only(Tensor, _copied_input, (example_inputs, dict(kwargs or {})))
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        return _Measurement(model, given, [one for one in _CALLS if one in ways], training, rounds).run()


class _Measurement:
    def __init__(self, model: nn.Module, given: Any, ways: list[str], training: bool, rounds: int) -> None:
        self.model, self.given, self.rounds, self.names, self.training = model, given, rounds, ways, training
        self.ways: list[Way] = []
        self.milliseconds: dict[str, float] = {}
        self.problems: dict[str, str] = {}

    def run(self) -> Explanation:
        plain = _copy(self.model).eval()
        expected = self._call(plain)
        shares, layers = _shares(plain, self._call)
        replaced = _copy(self.model).eval()
        report = replace_(replaced)
        with record() as calls:
            self._call(replaced)
        del replaced
        self._measure(INFERENCE, plain, _tensors(expected))
        if self.training:
            plain = _copy(self.model).train()
            try:
                if not any(one.requires_grad for one in plain.parameters()):
                    raise ValueError("no parameter requires a gradient")
                self._step(plain)
            except Exception as error:  # what a model raises that is for inference alone
                self.problems[TRAINING] = f"{type(error).__name__}: {_line(error)}"
            else:
                self._measure(TRAINING, plain, [])
        used = info()
        return Explanation(
            model=type(self.model).__name__,
            inputs=", ".join(_shown(one) for one in (*self.given[0], *self.given[1].values())) or "no inputs",
            machine=f"{used.cpu}, {used.threads} threads, {used.isa_used}, torch {used.torch}, "
            f"medians of {self.rounds} rounds in turn",
            rounds=self.rounds,
            milliseconds=self.milliseconds,
            problems=self.problems,
            ways=self.ways,
            layers=layers,
            report=report,
            shares=shares,
            calls=calls,
        )

    def _call(self, model: Callable[..., Any]) -> Any:
        with torch.no_grad():
            return model(*self.given[0], **self.given[1])

    def _step(self, model: nn.Module) -> None:
        output = model(*self.given[0], **self.given[1])
        loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        if not isinstance(loss, Tensor):
            losses = [one.float().square().mean() for one in _tensors(output) if one.requires_grad]
            if not losses:
                raise ValueError("no output that is a floating-point tensor has a gradient")
            loss = sum(losses)
        loss.backward()
        for parameter in model.parameters():
            parameter.grad = None

    def _measure(self, mode: str, plain: nn.Module, expected: list[Tensor]) -> None:
        """Ours beside PyTorch's in one mode."""
        function = self._call if mode == INFERENCE else self._step
        sides = {"": _Side(lambda: function(plain))}
        differences: dict[str, float] = {}
        failed: dict[str, str] = {}
        idle: set[str] = set()
        for name in self.names:
            if mode == TRAINING and name == "freeze":
                continue
            try:
                side = self._side(name, mode, function)
                with side.block(), record() as calls:
                    result = side.call()
                if all(call.kernel == "aten" for call in calls):
                    idle.add(name)
                if mode == INFERENCE:
                    differences[name] = _difference(expected, _tensors(result))
            except Exception as error:  # this way does not do for this model, and the page says why
                failed[name] = f"{type(error).__name__}: {_line(error)}"
            else:
                sides[name] = side
        samples = _in_turn(sides, self.rounds)
        self.milliseconds[mode] = median(samples[""]) * 1e3
        for name in self.names:
            if name in failed:
                self.ways.append(Way(name, mode, 0.0, 0.0, 0.0, 0.0, 0.0, failed[name]))
            elif name in samples:
                ratios = [a / b for a, b in zip(samples[""], samples[name], strict=True)]
                difference = differences.get(name, 0.0)
                allowed = max((_TOLERANCE.get(one.dtype, 0.0) for one in expected), default=0.0)
                problem = "but none of fastops' kernels ran" if name in idle else ""
                if difference > allowed:
                    problem = f"but its results differ by {difference:.1g}"
                milliseconds = median(samples[name]) * 1e3
                way = Way(name, mode, milliseconds, median(ratios), min(ratios), max(ratios), difference, problem)
                self.ways.append(way)

    def _side(self, name: str, mode: str, function: Callable[[Any], Any]) -> _Side:
        model = _copy(self.model).train(mode == TRAINING)
        if name == "enable":
            return _Side(lambda: function(model), enabled)
        if name == "replace_":
            replace_(model)
        elif name == "backend":
            from fastops.backend import fastops as backend

            model = torch.compile(model, backend=backend)
        else:
            model = {"fuse": fuse, "freeze": freeze}[name](model)
        return _Side(lambda: function(model))


def _copy(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except Exception as error:
        message = f"explain: model must be one that copy.deepcopy can copy, got an error: {_line(error)}"
        raise TypeError(message) from error


def _copied_input(tensor: Tensor) -> Tensor:
    """With the same strides, and a gradient of its own."""
    return copy.deepcopy(tensor.detach()).requires_grad_(tensor.requires_grad)


def _in_turn(sides: dict[str, _Side], rounds: int) -> dict[str, list[float]]:
    """Seconds of a call of each side in each round. The sides take turns at being first."""
    calls = {}
    for name, side in sides.items():
        side.seconds()
        calls[name] = max(1, min(1000, round(_SECONDS / side.seconds())))
    samples: dict[str, list[float]] = {name: [] for name in sides}
    names = list(sides)
    for turn in range(rounds):
        first = turn % len(names)
        for name in (*names[first:], *names[:first]):
            samples[name].append(sides[name].seconds(calls[name]))
    return samples


# ---- where the time goes ---------------------------------------------------------------------------------------------


def _shares(model: nn.Module, call: Callable[[nn.Module], Any]) -> tuple[dict[str, float], list[LayerTime]]:
    """Each module's share of a call, without what the modules that it calls take: by name, and by class."""
    seconds: dict[str, float] = {}
    whole = 0.0
    with _stopwatches(model) as passed:
        for attempt in range(4):
            passed.clear()
            begin = time.perf_counter()
            call(model)
            if attempt:  # the first call is a warm-up
                whole += time.perf_counter() - begin
                for name, value in passed.items():
                    seconds[name] = seconds.get(name, 0.0) + value
    shares = {name: value / whole for name, value in seconds.items()}
    modules = dict(model.named_modules())
    kinds: dict[str, dict[str, float]] = {}
    for name, share in shares.items():
        own = next(modules[name].children(), None) is not None and not type(modules[name]).__module__.startswith(
            "torch.nn"
        )
        kind = type(modules[name]).__name__ + (" itself" if own else "")
        kinds.setdefault(kind, {})[name] = share
    layers = [
        LayerTime(kind, len(found), max(found, key=found.__getitem__) or "(root)", sum(found.values()))
        for kind, found in kinds.items()
    ]
    return shares, sorted(layers, key=lambda layer: -layer.share)


@contextmanager
def _stopwatches(model: nn.Module) -> Iterator[dict[str, float]]:
    """Seconds in each module by name, without those in the modules that it calls."""
    passed: dict[str, float] = {}
    running: list[list[float]] = []  # for each call under way: when it began, and the seconds of its own calls

    def begin(module: nn.Module, args: Any) -> None:
        running.append([time.perf_counter(), 0.0])

    def end(name: str) -> Callable[..., None]:
        def stop(module: nn.Module, args: Any, output: Any) -> None:
            begun, inside = running.pop()
            taken = time.perf_counter() - begun
            passed[name] = passed.get(name, 0.0) + taken - inside
            if running:
                running[-1][1] += taken

        return stop

    handles = []
    for name, module in model.named_modules():
        if not isinstance(module, torch.jit.ScriptModule):
            handles += [module.register_forward_pre_hook(begin), module.register_forward_hook(end(name))]
    try:
        yield passed
    finally:
        for handle in handles:
            handle.remove()


# ---- values ----------------------------------------------------------------------------------------------------------


def _tensors(value: Any) -> list[Tensor]:
    """The floating-point tensors in an output, complex ones as pairs."""
    if isinstance(value, Tensor):
        if value.is_complex():
            return [torch.view_as_real(value.resolve_conj())]
        return [value] if value.is_floating_point() else []
    if dataclasses.is_dataclass(value) and not isinstance(value, (type, Mapping)):
        value = [getattr(value, one.name, None) for one in dataclasses.fields(value)]
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [tensor for one in value for tensor in _tensors(one)]
    return []


def _difference(expected: list[Tensor], got: list[Tensor]) -> float:
    """The largest difference of an element, by the largest element of its tensor."""
    if [one.shape for one in expected] != [one.shape for one in got]:
        return float("inf")
    worst = 0.0
    for a, b in zip(expected, got, strict=True):
        if a.numel():
            a, b = a.double(), b.double()
            # The same infinity or NaN is no difference, another one is infinite.
            apart = (a - b).abs().nan_to_num(nan=torch.inf, posinf=torch.inf)
            apart = apart.masked_fill((a == b) | (a.isnan() & b.isnan()), 0.0)
            largest = a.nan_to_num(0.0, 0.0, 0.0).abs().max()
            worst = max(worst, (apart.max() / largest.clamp_min(1e-30)).item())
    return worst


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{'x'.join(map(str, value.shape)) or 'scalar'} {str(value.dtype).removeprefix('torch.')}"
    return type(value).__name__


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:160]


# ---- fastops doctor --------------------------------------------------------------------------------------------------


class _Unusable(Exception):
    """What the user has to mend, in a line."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `fastops doctor`."""
    parser.add_argument(
        "model",
        metavar="FILE.py:FUNCTION",
        help="a function without arguments that returns the model and its example inputs: (model, x) or (model, x, y); "
        "a dict as the last one has those by name; an argument that is a dict comes before it: (model, batch, {})",
    )
    parser.add_argument("--html", metavar="PAGE.html", help="also write a page for a browser")
    parser.add_argument("--rounds", type=int, default=7, help="how often everything is measured in turn (default: 7)")
    parser.add_argument("--ways", nargs="+", choices=list(_CALLS), default=list(_CALLS), help="the ways to try")
    parser.add_argument("--no-training", action="store_true", help="measure inference alone")


def run(options: argparse.Namespace) -> int:
    """Runs `fastops doctor`."""
    try:
        model, inputs, kwargs = _built(options.model)
        if options.rounds < 1:
            raise _Unusable(f"--rounds must be 1 or more, got {options.rounds}")
        if options.html:
            _check_page(Path(options.html).resolve())
    except _Unusable as error:
        print(f"fastops doctor: {error}", file=sys.stderr)
        return 2
    try:
        explanation = explain(
            model, *inputs, kwargs=kwargs, ways=options.ways, training=not options.no_training, rounds=options.rounds
        )
    except Exception as error:
        line = _line(error)
        said = line.removeprefix("explain: ")
        if said == line:
            said = f"the model raised {type(error).__name__}: {line}"
        print(f"fastops doctor: {said}", file=sys.stderr)
        return 1
    print(explanation)
    if options.html:
        try:
            explanation.save_html(options.html)
        except OSError as error:  # a full disk, and what os.access does not see
            print(f"fastops doctor: --html: {options.html} cannot be written: {error.strerror}", file=sys.stderr)
            return 1
        print(f"page: {options.html}")
    return 0


def _check_page(path: Path) -> None:
    if not path.parent.is_dir():
        raise _Unusable(f"--html: there is no folder {path.parent}")
    if path.is_dir():
        raise _Unusable(f"--html: {path} is a folder")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise _Unusable(f"--html: {path} cannot be written")


def _built(target: str) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """What FILE.py:FUNCTION returns: the model, its inputs, and those by name."""
    file, colon, name = target.rpartition(":")
    if not colon or not name.isidentifier():
        raise _Unusable(f"the model must be given as FILE.py:FUNCTION, such as model.py:build, got {target!r}")
    path = Path(file)
    if not path.is_file():
        raise _Unusable(f"there is no file {file!r}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise _Unusable(f"{file!r} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem], before = module, sys.modules.get(path.stem)  # pickling looks classes up there
    sys.path.insert(0, str(path.resolve().parent))
    try:
        spec.loader.exec_module(module)
        build = getattr(module, name, None)
        if not callable(build):
            raise _Unusable(f"{file} has no function {name}")
        result = build()
    except _Unusable:
        raise
    except Exception as error:
        raise _Unusable(f"{target} raised {type(error).__name__}: {_line(error)}") from error
    finally:
        sys.path.pop(0)
        if before is not None:
            sys.modules[path.stem] = before
    if not isinstance(result, tuple) or len(result) < 2 or not isinstance(result[0], nn.Module):
        got = (
            f"({', '.join(type(one).__name__ for one in result)})"
            if isinstance(result, tuple)
            else type(result).__name__
        )
        raise _Unusable(f"{target} must return (model, inputs...), a torch.nn.Module first, got {got}")
    model, *inputs = result
    named = inputs.pop() if isinstance(inputs[-1], dict) else {}
    return model, tuple(inputs), named
