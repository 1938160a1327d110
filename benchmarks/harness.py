"""How every case is measured.

A case is verified first: the error of its results against float64 may be twice PyTorch's own and a few roundings. Then
PyTorch, fastops and the machine's peak are sampled in turn, and the two sides take turns at being first. So whatever
else runs on the machine slows down all three alike. A sample takes a few milliseconds. The result is the median of the
samples, with their quartiles. The ratio is PyTorch's median time divided by fastops'.
"""

import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median, quantiles

import torch
from torch import Tensor

from fastops import _C

FORWARD, RECORD, BOTH = "forward", "record", "both"  # without autograd; recording for it; forward and backward
BACKWARD = "backward"  # alone, of a forward that is kept: measured if asked for, as BOTH has it too
MODES = (FORWARD, RECORD, BACKWARD, BOTH)
PASSES = {FORWARD: "forward", RECORD: "forward, recorded", BACKWARD: "backward", BOTH: "forward+backward"}
DTYPES = {"f32": torch.float32, "f64": torch.float64, "bf16": torch.bfloat16, "f16": torch.float16}


@dataclass(frozen=True)
class Sides:
    """One call of each side; the errors of fastops' and PyTorch's results, and the largest that fastops' may have."""

    torch: Callable[[], object]
    fastops: Callable[[], object]
    error: float
    torch_error: float
    allowed_error: float


@dataclass(frozen=True)
class Case:
    op: str  # "linear", "linear+relu", "tanh", "training step", ...
    shape: str
    dtype: str  # a key of DTYPES
    mode: str  # one of MODES
    threads: int
    flops: float  # floating point operations that the formula asks for
    bytes: float  # bytes that have to be read or written when nothing is cached
    prepare: Callable[["Case"], Sides]
    bound: str = "bytes"  # which peak it is compared with: "flops" or "bytes"
    isa: str | None = None  # a lower tier than the best one
    device: str = "cpu"
    seconds: float = 0.25  # how long samples are taken; but never fewer than 9 nor more than 50


@dataclass(frozen=True)
class Row:
    """What was measured of one case. Times are microseconds for one call."""

    op: str
    shape: str
    dtype: str
    mode: str
    threads: int
    isa: str
    lowered: bool  # measured on a tier below the one that the others ran on
    torch_us: float
    torch_q1_us: float
    torch_q3_us: float
    fastops_us: float
    fastops_q1_us: float
    fastops_q3_us: float
    ratio: float
    gflops: float
    torch_gflops: float
    gbytes: float
    torch_gbytes: float
    bound: str
    peak: float  # GFLOP/s or GB/s, measured between the samples
    percent_of_peak: float
    torch_percent_of_peak: float
    intensity: float  # flops / bytes
    error: float
    torch_error: float
    samples: int

    def as_dict(self) -> dict:
        return asdict(self)


def of_mode(mode: str, forward: float, backward: float) -> float:
    """What a call in this mode does, if its two passes do this much each."""
    return {BACKWARD: backward, BOTH: forward + backward}.get(mode, forward)


class WrongResult(Exception):
    """fastops' result is farther from the reference than it may be."""


def functional_sides(
    case: Case, theirs: Callable, ours: Callable, inputs: Sequence[Tensor], rule: Callable | None = None
) -> Sides:
    """Sides for two functions of the same tensors. `rule` decides about their errors; default: `compare`.

    In modes "both" and "backward" a fixed gradient is sent back through the output, and every gradient is dropped
    before the next call. It is positive: sums over it do not cancel, so that their relative error means something.
    """
    leaves = [tensor.detach().to(case.device).requires_grad_(case.mode != FORWARD) for tensor in inputs]
    grad = torch.rand_like(theirs(*leaves)) if case.mode in (BACKWARD, BOTH) else None

    def results(function: Callable, dtype: torch.dtype) -> list[Tensor]:
        operands = [leaf.detach().to(dtype).requires_grad_(leaf.requires_grad) for leaf in leaves]
        output = function(*operands)
        if grad is None:
            return [output.detach()]
        return [output.detach(), *torch.autograd.grad(output, operands, grad.to(dtype))]

    exact = results(EXACT.get(case.op, theirs), torch.float64)
    error, torch_error, allowed = (rule or compare)(
        exact, results(ours, leaves[0].dtype), results(theirs, leaves[0].dtype), leaves[0].dtype
    )
    sides = (in_mode(case.mode, partial(function, *leaves), leaves, grad) for function in (theirs, ours))
    return Sides(*sides, error, torch_error, allowed)


def in_mode(
    mode: str, function: Callable[[], Tensor], leaves: Sequence[Tensor], grad: Tensor | None
) -> Callable[[], object]:
    """One call of the function in this mode; grad: what is sent back through its output, to the leaves."""
    if mode not in (BACKWARD, BOTH):
        return function
    if mode == BACKWARD:
        output = function()
        return lambda: torch.autograd.grad(output, leaves, grad, retain_graph=True)

    def forward_and_backward() -> None:
        function().backward(grad)
        for leaf in leaves:
            leaf.grad = None

    return forward_and_backward


# float64 references for ops where PyTorch's own is not exact enough: its hardsigmoid multiplies by a float32 1/6.
EXACT: dict[str, Callable[..., Tensor]] = {"hardsigmoid": lambda x: (x + 3).clamp(0, 6) / 6}


def compare(
    exact: Sequence[Tensor], ours: Sequence[Tensor], theirs: Sequence[Tensor], dtype: torch.dtype
) -> tuple[float, float, float]:
    """The errors of fastops and of PyTorch, and the allowed one, each relative to the largest value of its tensor.

    Of several tensors, those of the one where fastops comes nearest to the allowed error.
    """
    worst = (0.0, 0.0, math.inf)
    for reference, mine, other in zip(exact, ours, theirs, strict=True):
        scale = reference.abs().max().item() or 1.0
        error, torch_error = ((value.double() - reference).abs().max().item() / scale for value in (mine, other))
        # In float64 the reference is PyTorch's own result and has roundings of its own, so more of them are allowed.
        roundings = 32 if dtype == torch.float64 else 4
        allowed = 2 * torch_error + roundings * torch.finfo(dtype).eps
        if not error / allowed <= worst[0] / worst[2]:
            worst = (error, torch_error, allowed)
    return worst


@contextmanager
def settings(case: Case) -> Iterator[None]:
    """Sets threads, tier and autograd as the case asks, and turns the garbage collector off."""
    threads, isa = torch.get_num_threads(), _C.isa_used()
    torch.set_num_threads(case.threads)
    if case.isa is not None and not _C.set_isa(case.isa):
        raise ValueError(f"this processor does not have the tier {case.isa}")
    gc.collect()
    gc.disable()
    try:
        with torch.set_grad_enabled(case.mode != FORWARD):
            yield
    finally:
        gc.enable()
        _C.set_isa(isa)
        torch.set_num_threads(threads)


class Peak:
    """Samples the machine's peak: multiply-adds on every thread, or a copy of as many bytes."""

    def __init__(self, case: Case) -> None:
        self._bound = case.bound
        if case.bound == "bytes":
            count = max(64, int(case.bytes) // 2)
            self._source, self._target = torch.ones(count, dtype=torch.uint8), torch.zeros(count, dtype=torch.uint8)
            copy = lambda: self._target.copy_(self._source)  # noqa: E731
            copy()
            self._bytes, self._copy, self._calls = 2 * count, copy, calls_for(copy, 1e-3)
        else:
            kernel = _C.peak_bf16 if case.dtype == "bf16" else _C.peak_f32
            self._scale = 0.5 if case.dtype == "f64" else 1.0
            self._kernel, self._threads = kernel, case.threads

    def sample(self) -> float:
        """GFLOP/s or GB/s."""
        if self._bound == "bytes":
            time_calls(self._copy, 1 + self._calls // 8)
            return self._bytes / time_calls(self._copy, self._calls) / 1e9
        with ThreadPoolExecutor(self._threads) as pool:
            return self._scale * sum(pool.map(self._kernel, [2.0] * self._threads))


def time_calls(function: Callable[[], object], calls: int) -> float:
    """Seconds a call."""
    begin = time.perf_counter_ns()
    for _ in range(calls):
        function()
    return (time.perf_counter_ns() - begin) / calls * 1e-9


def calls_for(function: Callable[[], object], seconds: float) -> int:
    """How many calls take about that long."""
    calls = 1
    while (elapsed := time_calls(function, calls) * calls) < seconds / 4:
        calls *= 4
    return max(1, round(calls * seconds / elapsed))


def measure(case: Case, quick: bool = False) -> Row:
    """Verifies the case, then times it.

    Raises:
        WrongResult: the verification failed; nothing was timed.
    """
    with settings(case):
        sides = case.prepare(case)
        if not sides.error <= sides.allowed_error:
            raise WrongResult(
                f"error {sides.error:.2g}, PyTorch's {sides.torch_error:.2g}, at most {sides.allowed_error:.2g}"
            )
        sample_seconds, budget, least = (1e-3, 0.05, 5) if quick else (2e-3, case.seconds, 9)
        peak = Peak(case)
        for side in (sides.torch, sides.fastops):
            time_calls(side, 2)
        torch_calls, fastops_calls = calls_for(sides.torch, sample_seconds), calls_for(sides.fastops, sample_seconds)
        torch_times, fastops_times, peaks = [], [], []
        begin = time.perf_counter()
        while len(torch_times) < least or (time.perf_counter() - begin < budget and len(torch_times) < 50):
            turns = [(sides.torch, torch_calls, torch_times), (sides.fastops, fastops_calls, fastops_times)]
            for side, calls, times in turns if len(peaks) % 2 == 0 else reversed(turns):
                time_calls(side, 1 + calls // 8)  # fills the caches and wakes the threads, as this side does
                times.append(time_calls(side, calls))
            peaks.append(peak.sample())
        return _row(case, sides, torch_times, fastops_times, median(peaks))


def _row(case: Case, sides: Sides, torch_times: list[float], fastops_times: list[float], peak: float) -> Row:
    (torch_q1, theirs, torch_q3), (q1, mine, q3) = quantiles(torch_times), quantiles(fastops_times)
    work = case.flops if case.bound == "flops" else case.bytes
    return Row(
        op=case.op,
        shape=case.shape,
        dtype=case.dtype,
        mode=case.mode,
        threads=case.threads,
        isa=_C.isa_used(),
        lowered=case.isa is not None,
        torch_us=theirs * 1e6,
        torch_q1_us=torch_q1 * 1e6,
        torch_q3_us=torch_q3 * 1e6,
        fastops_us=mine * 1e6,
        fastops_q1_us=q1 * 1e6,
        fastops_q3_us=q3 * 1e6,
        ratio=theirs / mine,
        gflops=case.flops / mine / 1e9,
        torch_gflops=case.flops / theirs / 1e9,
        gbytes=case.bytes / mine / 1e9,
        torch_gbytes=case.bytes / theirs / 1e9,
        bound=case.bound,
        peak=peak,
        percent_of_peak=100 * work / mine / 1e9 / peak,
        torch_percent_of_peak=100 * work / theirs / 1e9 / peak,
        intensity=case.flops / case.bytes,
        error=sides.error,
        torch_error=sides.torch_error,
        samples=len(torch_times),
    )
