"""What `make gpu` measures, the aims, and how a case is measured on a GPU.

A case is verified as on the CPU (harness.py), against float64 on the same device. Then PyTorch, fastops and a copy of
as many bytes take turns. Each call stands between two CUDA events, and before the first of them a buffer larger than L2
is overwritten: inputs come from memory, and the processor is ahead of the GPU while that runs. cuDNN may try its
algorithms first (torch.backends.cudnn.benchmark) and TF32 is off, for both sides.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import quantiles

import torch
from torch import Tensor

import fastops
from fastops.benchmarks import (
    activation,
    attention,
    batch_norm,
    conv,
    layer_norm,
    linear,
    loss,
    mlp,
    optim,
    pool,
    softmax,
)
from fastops.benchmarks.harness import BACKWARD, BOTH, DTYPES, FORWARD, Case, WrongResult, settings

MEASURED, WRONG, FOREIGN = "measured", "wrong result", "not a fastops kernel"

ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu", "sigmoid", "tanh")
BYTES = 2**28  # of an activation's input
CONV = "32x256x56x56-256-k3-p1"
# A depthwise convolution, two first layers and a pool, on batches that fill a GPU.
WINDOWS = (
    ("conv2d", "64x144x56x56-144-k3-p1-g144"),
    ("conv2d+image", "64x3x224x224-64-k7-s2-p3"),
    ("conv2d+image", "1024x1x28x28-32-k3-p1"),
    ("max_pool2d", "64x64x112x112-k3-s2-p1"),
)


@dataclass(frozen=True)
class Aim:
    """The lowest `value` of these cases has to be at least `reach`."""

    name: str
    reach: float
    cases: tuple[Case, ...]
    value: str = "ratio"  # a key of a row: PyTorch's time / fastops', or the share of a copy's bandwidth


def name_of(case: Case) -> str:
    return f"{case.op} {case.shape} {case.dtype} {case.mode}"


def _activations(mode: str) -> tuple[Case, ...]:
    return tuple(
        activation.make(op, str(BYTES // DTYPES[dtype].itemsize), dtype, mode, 1)
        for op in ACTIVATIONS
        for dtype in ("f32", "bf16")
    )


def _linear(op: str, dtype: str, *shapes: str) -> tuple[Case, ...]:
    return tuple(linear.make(op, shape, dtype, FORWARD, 1) for shape in shapes)


def _conv(mode: str) -> tuple[Case, ...]:
    return (conv.make("conv2d+channels_last", CONV, "bf16", mode, 1),)


def _windows() -> tuple[Case, ...]:
    makers = [(pool if op in pool.FUNCTIONS else conv, op, shape) for op, shape in WINDOWS]
    return tuple(stem.make(op, shape, dtype, BOTH, 1) for stem, op, shape in makers for dtype in ("f32", "bf16"))


def _mlp(op: str, dtype: str, mode: str) -> tuple[Case, ...]:
    return tuple(mlp.make(op, shape, dtype, mode, 1) for shape in ("65536x64x4", "65536x128x4"))


def _batch_norm() -> tuple[Case, ...]:
    shapes = ("batch_norm+relu", "64x64x56x56"), ("batch_norm+add+relu+channels_last", "64x256x14x14")
    return tuple(batch_norm.make(op, shape, dtype, BOTH, 1) for op, shape in shapes for dtype in ("f32", "bf16"))


def _rows() -> tuple[Case, ...]:
    kinds = (
        (layer_norm, "layer_norm", "16384x1024"),
        (layer_norm, "rms_norm", "8192x4096"),
        (softmax, "softmax", "384x1024x1024"),
        (softmax, "log_softmax", "4096x50257"),
        (loss, "cross_entropy", "4096x50257"),
        (loss, "mse_loss", "8192x4096"),
    )
    return tuple(stem.make(op, shape, dtype, BOTH, 1) for stem, op, shape in kinds for dtype in ("f32", "bf16"))


def _optim() -> tuple[Case, ...]:
    return tuple(optim.make(f"{name} step", "resnet50", "f32", BOTH, 1) for name in optim.OPTIMIZERS)


def _attention(mode: str) -> tuple[Case, ...]:
    return tuple(attention.make(op, "8x12x1024x64", "f32", mode, 1) for op in attention.FUNCTIONS)


AIMS = (
    Aim("linear bf16 4096^3 and 8192^3 with bias and GELU, forward", 1.0,
        _linear("linear+gelu", "bf16", "4096x4096x4096", "8192x8192x8192")),
    Aim("linear bf16 1024^3 and 128x4096x4096, forward", 1.0,
        _linear("linear", "bf16", "1024x1024x1024", "128x4096x4096")),
    Aim("linear float32 4096^3, forward", 0.9, _linear("linear", "f32", "4096x4096x4096")),
    Aim("conv 3x3 bf16 channels_last, 32x256x56x56 -> 256, forward", 0.8, _conv(FORWARD)),
    Aim("conv 3x3 bf16 channels_last, 32x256x56x56 -> 256, forward and backward", 0.8, _conv(BOTH)),
    Aim("depthwise 3x3, first layers and max_pool2d, forward and backward", 1.5, _windows()),
    Aim("MLP of 4 layers, width 64 and 128, batch 65536, bf16, forward", 5.0, _mlp("mlp", "bf16", FORWARD)),
    Aim("MLP of 4 layers, width 64 and 128, batch 65536, bf16, training step", 3.0, _mlp("mlp step", "bf16", BOTH)),
    Aim("MLP of 4 layers, width 64 and 128, batch 65536, float32, forward", 5.0, _mlp("mlp", "f32", FORWARD)),
    Aim("MLP of 4 layers, width 64 and 128, batch 65536, float32, training step", 3.0, _mlp("mlp step", "f32", BOTH)),
    Aim("activations on 256 MB, forward: share of a copy's bandwidth", 0.9, _activations(FORWARD), "copy_share"),
    Aim("activations on 256 MB, forward", 1.0, _activations(FORWARD)),
    Aim("activations on 256 MB, backward: share of a copy's bandwidth", 0.9, _activations(BACKWARD), "copy_share"),
    Aim("activations on 256 MB, backward", 1.0, _activations(BACKWARD)),
    Aim("batch_norm with ReLU, in training, forward and backward", 1.5, _batch_norm()),
    Aim("norms, softmax and losses on 64 MB and more, forward and backward", 1.0, _rows()),
    Aim("a step of each optimizer on ResNet-50's parameters", 1.0, _optim()),
    Aim("attention float32, 1024 tokens, forward", 1.0, _attention(FORWARD)),
    Aim("attention float32, 1024 tokens, forward and backward", 1.0, _attention(BOTH)),
)  # fmt: skip
CASES = {name_of(case): case for aim in AIMS for case in aim.cases}


class CudaTimer:
    """Seconds of one call each, in turn, L2 cold; see above."""

    def __init__(self) -> None:
        cache = torch.cuda.get_device_properties(0).L2_cache_size
        self._flush = torch.empty(max(4 * cache, 2**28), dtype=torch.uint8, device="cuda")
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.conv.fp32_precision = "ieee"
        torch.backends.cuda.matmul.fp32_precision = "ieee"

    def __call__(self, functions: Sequence[Callable[[], object]]) -> list[float]:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in functions]
        for function, (begin, end) in zip(functions, events, strict=True):
            self._flush.zero_()
            begin.record()
            function()
            end.record()
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) * 1e-3 for begin, end in events]


Timer = Callable[[Sequence[Callable[[], object]]], list[float]]


def measure(case: Case, timer: Timer, device: str = "cuda", seconds: float = 0.6, least: int = 11) -> dict:
    """{"outcome": MEASURED, "row": ...}, or why there is no row; nothing is timed that was not verified."""
    torch.manual_seed(0)
    with settings(case):
        sides = case.prepare(replace(case, device=device))
        with fastops.record() as calls:
            sides.fastops()
        kernels = sorted({call.kernel for call in calls})
        if not kernels or "aten" in kernels:
            theirs = sorted({call.op for call in calls if call.kernel == "aten"})
            return {"outcome": FOREIGN, "detail": f"PyTorch's own {', '.join(theirs) or case.op} did the work"}
        if not sides.error <= sides.allowed_error:
            why = WrongResult(f"error {sides.error:.2g}, PyTorch's {sides.torch_error:.2g}")
            return {"outcome": WRONG, "detail": f"{why}, at most {sides.allowed_error:.2g}"}
        half = torch.zeros(max(64, int(case.bytes) // 2), dtype=torch.uint8, device=device)
        copy = _copy(torch.ones_like(half), half)
        functions = [sides.torch, sides.fastops, copy]
        for _ in range(3):
            timer(functions)
        times: list[list[float]] = []
        begin = time.perf_counter()
        while len(times) < least or (time.perf_counter() - begin < seconds and len(times) < 101):
            if len(times) % 2 == 0:
                times.append(timer(functions))
            else:
                times.append(timer(functions[::-1])[::-1])
    theirs, ours, copies = (quantiles(side) for side in zip(*times, strict=True))
    row = {
        "op": case.op,
        "shape": case.shape,
        "dtype": case.dtype,
        "mode": case.mode,
        "kernels": kernels,
        "torch_us": [1e6 * t for t in theirs],  # quartiles; the middle one is the median
        "fastops_us": [1e6 * t for t in ours],
        "ratio": theirs[1] / ours[1],
        "tflops": case.flops / ours[1] / 1e12,
        "gbytes": case.bytes / ours[1] / 1e9,
        "copy_gbytes": 2 * half.numel() / copies[1] / 1e9,
        "copy_share": case.bytes / ours[1] / (2 * half.numel() / copies[1]),
        "error": sides.error,
        "torch_error": sides.torch_error,
        "allowed_error": sides.allowed_error,
        "samples": len(times),
    }
    return {"outcome": MEASURED, "row": row}


def _copy(source: Tensor, target: Tensor) -> Callable[[], object]:
    return lambda: target.copy_(source)


def spread(row: dict, value: str) -> tuple[float, float]:
    """The ends of the range in which another run may find this value of a row: from the quartiles farthest apart."""
    (first, _, third), (ours_first, ours, ours_third) = row["torch_us"], row["fastops_us"]
    if value == "ratio":
        return first / ours_third, third / ours_first
    return row[value] * ours / ours_third, row[value] * ours / ours_first


def evaluate(rows: Sequence[dict]) -> list[dict]:
    """Every aim and its verdict.

    "missed" where a case is below it by more than its spread; "not measured" where a case has no row; "level" where a
    case is below it by less than its spread; else "met".
    """
    by_name = {f"{row['op']} {row['shape']} {row['dtype']} {row['mode']}": row for row in rows}
    results = []
    for aim in AIMS:
        names = [name_of(case) for case in aim.cases]
        found = {name: by_name[name] for name in names if name in by_name}
        missing = [name for name, row in found.items() if spread(row, aim.value)[1] < aim.reach]
        lowest = min(missing or found, key=lambda name: by_name[name][aim.value], default=None)
        value = None if lowest is None else by_name[lowest][aim.value]
        if missing:
            verdict = "missed"
        elif len(found) < len(names):
            verdict = "not measured"
        else:
            verdict = "met" if value >= aim.reach else "level"
        results.append(
            {
                "aim": aim.name,
                "reach": aim.reach,
                "of": aim.value,
                "lowest": value,
                "spread": None if lowest is None else spread(by_name[lowest], aim.value),
                "where": lowest,
                "measured": len(found),
                "cases": len(names),
                "verdict": verdict,
            }
        )
    return results
