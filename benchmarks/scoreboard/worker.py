"""One provider with one case of the scoreboard, in a process of its own, which scoreboard.py starts.

It prepares the provider, verifies what it computes, says so on standard output as a line of JSON, and then measures as
often as a line on standard input asks for it. Whatever libraries print goes to standard error.

    python -m fastops.benchmarks.scoreboard.worker '{"provider": "eager", ...}'
"""

import ctypes
import gc
import json
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from fastops.benchmarks import footprint
from fastops.benchmarks.harness import DTYPES, FORWARD, calls_for, time_calls
from fastops.benchmarks.scoreboard.networks import INT8
from fastops.benchmarks.scoreboard.providers import RATE, Absent, Inference, Setup, Training, provider

REFERENCE = "reference.pt"  # in the folder of the case
INT8_ERROR = 0.3  # of an 8-bit network
STEPS = 5  # of which the peak memory is taken


@dataclass(frozen=True)
class Job:
    """What a worker is started with. do: "time", "reference" or "memory"."""

    do: str
    provider: str
    network: str
    batch: int
    dtype: str
    mode: str
    threads: int
    folder: str
    peers: str | None = None

    def setup(self) -> Setup:
        return Setup(self.network, self.batch, self.dtype, self.threads, Path(self.folder))


# ---- verifying -------------------------------------------------------------------------------------------------------


def first_step(training: Training, dtype: str) -> dict[str, Tensor]:
    """The gradients of one step: what it changes, divided by a learning rate so large that nothing is rounded away."""
    rate = 1.0 if dtype == "f32" else 1024.0
    before = training.parameters()
    training.rate(rate)
    training.call()
    after = training.parameters()
    training.rate(RATE)
    training.reset()
    return {name: (before[name].float() - after[name].float()) / rate for name in before}


def reference(job: Job) -> None:
    """Writes what float64 gives with the same weights, and how far PyTorch's own result is from that."""
    setup = job.setup()
    torch.set_num_threads(job.threads)
    x, target = setup.data()
    model = setup.model().double().train(job.mode != FORWARD)
    if job.mode == FORWARD:
        with torch.no_grad():
            exact = {"output": model(x.double())}
    else:
        loss = F.mse_loss if target.is_floating_point() else F.cross_entropy
        output = model(x.double())
        loss(output, target.double() if target.is_floating_point() else target).backward()
        exact = {name: parameter.grad.float() for name, parameter in model.named_parameters()}
    path = Path(job.folder) / REFERENCE
    torch.save({"exact": exact, "error": 0.0}, path)
    error = distance(exact, results(job, prepare(job)))
    torch.save({"exact": exact, "error": error}, path)


def prepare(job: Job) -> Inference | Training:
    chosen, setup = provider(job.provider), job.setup()
    return chosen.inference(setup) if job.mode == FORWARD else chosen.training(setup)


def results(job: Job, side: Inference | Training) -> dict[str, Tensor]:
    return {"output": side.output(side.call())} if isinstance(side, Inference) else first_step(side, job.dtype)


def distance(exact: dict[str, Tensor], found: dict[str, Tensor]) -> float:
    """The largest rms difference of a tensor, relative to its rms.

    Some gradients are zero but for roundings, those of a shift before a batch norm for one. So none counts as smaller
    than a thousandth of the largest.
    """
    scales = {name: tensor.double().square().mean().sqrt().item() for name, tensor in exact.items()}
    least = 1e-3 * max(scales.values()) or 1.0
    errors = []
    for name, tensor in exact.items():
        if found[name].shape != tensor.shape:
            return float("nan")
        difference = (found[name].double() - tensor.double()).square().mean().sqrt().item()
        errors.append(difference / max(scales[name], least))
    # A NaN is the largest.
    return max(errors, key=lambda error: (error != error, error))


def allowed(job: Job, eager: float) -> float:
    """How far a result may be from float64's, when PyTorch's is `eager` away.

    The peers sum in other orders and choose other algorithms than PyTorch, so three times that, and some roundings. At
    the kink of a ReLU or a max pool a rounding turns a unit on or off, which moves a gradient by more than a rounding:
    float32 gradients of an image network differ by up to 2% for that (models.py).

    What rounding to 8 bits loses depends on the network and on who rounds what; the tables show it. Two outputs that
    have nothing to do with each other are 1.4 apart.
    """
    if job.dtype == INT8:
        return INT8_ERROR
    if job.mode == FORWARD:
        return 3 * eager + 8 * torch.finfo(DTYPES[job.dtype]).eps
    return 3 * eager + 0.02


# ---- measuring -------------------------------------------------------------------------------------------------------


def sample(call: Callable[[], object], calls: int, seconds: float) -> list[float]:
    """Seconds a call, for as long as said, at least once. Calls that fill the caches count if they are long."""
    begin = time.perf_counter()
    first = time_calls(call, calls)
    times = [first if first * calls > seconds / 2 else time_calls(call, calls)]
    while time.perf_counter() - begin < seconds:
        times.append(time_calls(call, calls))
    return times


def peak_memory(training: Training) -> int:
    """By how many bytes the resident memory of the process grew at most, in a few steps."""
    gc.collect()
    before = footprint.resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    for _ in range(STEPS):
        training.call()
    return footprint.resident("VmHWM") - before


def main(job: Job, answer: Callable[[dict], None]) -> None:
    """Does the job; every answer is a dict with a "status"."""
    if job.do == "reference":
        reference(job)
        answer({"status": "written"})
        return
    begin = time.perf_counter()
    try:
        side = prepare(job)
        if job.do == "memory":
            answer({"status": "measured", "bytes": peak_memory(side)})
            return
        kept = torch.load(Path(job.folder) / REFERENCE, mmap=True)
        eager = kept["error"]
        error = distance(kept["exact"], results(job, side))
        del kept
    except Absent as absent:
        answer({"status": "absent", "why": str(absent)})
        return
    found = {"error": error, "torch_error": eager, "allowed_error": allowed(job, eager)}
    if not error <= found["allowed_error"]:
        answer({"status": "wrong", **found})
        return
    gc.collect()
    gc.disable()
    time_calls(side.call, 2)
    calls = calls_for(side.call, 5e-3)
    answer({"status": "ready", **found, "prepared_s": time.perf_counter() - begin})
    for line in sys.stdin:
        answer({"status": "timed", "times": sample(side.call, calls, json.loads(line)["seconds"])})


if __name__ == "__main__":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: a stopped worker does not outlive its parent
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    warnings.simplefilter("ignore")
    asked = Job(**json.loads(sys.argv[1]))
    if asked.peers is not None:
        sys.path += asked.peers.split(os.pathsep)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: asked.threads])

    def say(content: dict) -> None:
        print(json.dumps(content), file=answers, flush=True)

    main(asked, say)
