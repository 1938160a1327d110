"""The aims of fastops, and how a run's rows compare with them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from fastops.benchmarks import activation, conv, conv_pool, footprint, linear, pool, training
from fastops.benchmarks.harness import BOTH, FORWARD, PASSES, Row

FAST = ("tanh", "mish", "tanhshrink")
TRANSCENDENTAL = ("elu", "selu", "celu", "softplus", "logsigmoid", "gelu_tanh")
RELU_FAMILY = ("relu", "relu6", "leaky_relu", "prelu", "threshold", "hardtanh")
NEAR_PARITY = ("gelu", "sigmoid")
MIDDLE = ("65536", "1048576")


REACHED, LEVEL, MISSED = "reached", "level", "missed"


class Spread(NamedTuple):
    """A measured value, and the ends of the range in which another run may find it."""

    low: float
    middle: float
    high: float


def ratio(row: Row) -> Spread:
    """PyTorch's time / fastops': of the medians, and of the quartiles that lie farthest apart."""
    return Spread(row.torch_q1_us / row.fastops_q3_us, row.ratio, row.torch_q3_us / row.fastops_q1_us)


def share_of_peak(row: Row) -> Spread:
    """In percent, at fastops' median time and at its quartiles."""
    work = row.percent_of_peak * row.fastops_us
    return Spread(work / row.fastops_q3_us, row.percent_of_peak, work / row.fastops_q1_us)


@dataclass(frozen=True)
class Figure:
    """An aim: `kind` of `value` over the rows that `select` takes has to be at least `reach`."""

    name: str
    reach: float
    select: Callable[[Row], bool]
    kind: str = "lowest"  # or "geomean"
    value: Callable[[Row], Spread] = ratio
    unit: str = "x"


@dataclass(frozen=True)
class Result:
    """An aim and what was measured.

    verdict: "reached"; "missed"; or "level" where the value is below the aim but the aim lies within its spread.
    """

    name: str
    reach: str
    measured: str
    spread: str  # "1.05 - 1.20"; "" where the value has none
    where: str  # the case that decided
    verdict: str


def _linear(op: str, dtype: str, shapes: Sequence[str], *modes: str) -> Callable[[Row], bool]:
    return lambda row: (
        row.op == op and row.dtype == dtype and row.shape in shapes and row.mode in modes and not row.lowered
    )


def _activation(ops: Sequence[str], dtype: str, sizes: Sequence[str], *modes: str) -> Callable[[Row], bool]:
    return lambda row: row.op in ops and row.dtype == dtype and row.shape in sizes and row.mode in modes


def _conv(dtype: str, shapes: Sequence[str], *modes: str, ops: Sequence[str] = ("conv2d",)) -> Callable[[Row], bool]:
    return lambda row: row.op in ops and row.dtype == dtype and row.shape in shapes and row.mode in modes


_SQUARES = _linear("linear", "f32", linear.SQUARES, FORWARD)
_SMALL = (FORWARD, "record", BOTH)
_IMAGE = ("conv2d", "conv2d+image")
_LAST, _POOLED = ("conv2d+channels_last",), conv_pool.FUNCTIONS
_EVERY = (*conv.ALL, *conv.OTHERS.values())
_EVERY_OP = (*_IMAGE, *_LAST, *_POOLED, *conv.OTHERS)

FIGURES = (
    Figure("linear f32 1024^3, 2048^3, forward, 1 and 2 threads", 2.15, _SQUARES),
    Figure(
        "linear f32 1024^3, 2048^3, forward, 1 and 2 threads, share of the measured FMA peak",
        87,
        _SQUARES,
        value=share_of_peak,
        unit="%",
    ),
    Figure("linear f32, layer shapes, forward", 2.0, _linear("linear", "f32", linear.LAYERS, FORWARD), "geomean"),
    Figure("linear f32, layer shapes, forward+backward", 1.9, _linear("linear", "f32", linear.LAYERS, BOTH), "geomean"),
    Figure(
        "linear f32, layer shapes, forward and forward+backward",
        1.3,
        _linear("linear", "f32", linear.LAYERS, FORWARD, BOTH),
    ),
    Figure("linear f32 1x4096x4096, forward", 2.2, _linear("linear", "f32", (linear.VECTOR,), FORWARD)),
    Figure("linear bf16, layer shapes, forward", 1.15, _linear("linear", "bf16", linear.LAYERS, FORWARD), "geomean"),
    Figure(
        "linear bf16, layer shapes, forward+backward", 1.15, _linear("linear", "bf16", linear.LAYERS, BOTH), "geomean"
    ),
    Figure(
        "linear bf16, layer shapes, forward and forward+backward",
        0.98,
        _linear("linear", "bf16", linear.LAYERS, FORWARD, BOTH),
    ),
    Figure("small linear f32, all three passes", 1.0, _linear("linear", "f32", linear.SMALL, *_SMALL)),
    Figure("small linear+relu f32, all three passes", 1.3, _linear("linear+relu", "f32", linear.SMALL, *_SMALL)),
    Figure("tanh, mish, tanhshrink f32, 64K and 1M, forward", 5, _activation(FAST, "f32", MIDDLE, FORWARD)),
    Figure(
        "elu, selu, celu, softplus, logsigmoid, tanh-GELU f32, 64K and 1M, forward",
        3,
        _activation(TRANSCENDENTAL, "f32", MIDDLE, FORWARD),
    ),
    Figure("tanh, mish, tanhshrink f32, 64K and 1M, forward+backward", 3, _activation(FAST, "f32", MIDDLE, BOTH)),
    Figure(
        "elu, selu, celu, softplus, logsigmoid, tanh-GELU f32, 64K and 1M, forward+backward",
        1.7,
        _activation(TRANSCENDENTAL, "f32", MIDDLE, BOTH),
    ),
    Figure(
        "relu, relu6, leaky_relu, prelu, threshold, hardtanh bf16, 64K and 1M, forward",
        1.4,
        _activation(RELU_FAMILY, "bf16", MIDDLE, FORWARD),
    ),
    Figure(
        "the nine transcendental ones bf16, 64K and 1M, forward",
        4,
        _activation(FAST + TRANSCENDENTAL, "bf16", MIDDLE, FORWARD),
    ),
    Figure(
        "any activation f32, 64 MB output, forward",
        4,
        lambda row: row.op in activation.FUNCTIONS and row.shape == str(activation.LARGE),
    ),
    Figure("conv f32 64x1x28x28 -> 32, 3x3, forward", 2.5, _conv("f32", (conv.FIRST,), FORWARD)),
    Figure(
        "conv f32 64x1x28x28 -> 32, 3x3, forward+backward, gradient of the image or not",
        2.5,
        _conv("f32", (conv.FIRST,), BOTH, ops=_IMAGE),
    ),
    Figure(
        "conv f32 64x1x28x28 -> 32, 3x3, with ReLU and 2x2 max pool, forward",
        25,
        _conv("f32", (conv.FIRST,), FORWARD, ops=_POOLED),
    ),
    Figure(
        "conv f32 64x1x28x28 -> 32, 3x3, with ReLU and 2x2 max pool, forward+backward",
        6,
        _conv("f32", (conv.FIRST,), BOTH, ops=_POOLED),
    ),
    Figure("conv f32 3x3, 64 to 512 channels, forward", 1.35, _conv("f32", conv.WINDOWS, FORWARD), "geomean"),
    Figure("conv f32 3x3, 64 to 512 channels, forward+backward", 1.25, _conv("f32", conv.WINDOWS, BOTH), "geomean"),
    Figure(
        "conv f32 3x3, 64 to 512 channels, forward and forward+backward", 1.0, _conv("f32", conv.WINDOWS, FORWARD, BOTH)
    ),
    Figure(
        "conv f32 3x3, 64 to 512 channels, medium precision, forward",
        1.7,
        _conv("f32", conv.WINDOWS, FORWARD, ops=("conv2d+medium",)),
        "geomean",
    ),
    Figure(
        "conv f32 3x3, 64 to 512 channels, channels_last, forward and forward+backward",
        1.1,
        _conv("f32", conv.WINDOWS, FORWARD, BOTH, ops=_LAST),
        "geomean",
    ),
    Figure(
        "conv f32 3x3, 64 to 512 channels, channels_last, forward and forward+backward",
        1.0,
        _conv("f32", conv.WINDOWS, FORWARD, BOTH, ops=_LAST),
    ),
    Figure("conv f32 7x7 stride 2, 3 channels, forward", 4, _conv("f32", (conv.STEM,), FORWARD)),
    Figure(
        "conv f32 7x7 stride 2, 3 channels, forward+backward, gradient of the image or not",
        1.8,
        _conv("f32", (conv.STEM,), BOTH, ops=_IMAGE),
    ),
    Figure("conv f32 1x1, forward", 1.4, _conv("f32", conv.POINTWISE, FORWARD)),
    Figure("conv f32 1x1, forward+backward", 1.6, _conv("f32", conv.POINTWISE, BOTH)),
    Figure("depthwise conv f32, forward", 2, _conv("f32", conv.DEPTHWISE, FORWARD)),
    Figure("depthwise conv f32, forward+backward", 2, _conv("f32", conv.DEPTHWISE, BOTH)),
    Figure(
        "depthwise conv f32 channels_last, forward and forward+backward",
        1.0,
        _conv("f32", conv.DEPTHWISE, FORWARD, BOTH, ops=_LAST),
    ),
    Figure(
        "conv1d, conv3d, conv_transpose2d f32, forward+backward",
        1.2,
        _conv("f32", tuple(conv.OTHERS.values()), BOTH, ops=tuple(conv.OTHERS)),
    ),
    Figure(
        "conv bf16, every shape above, both layouts, forward and forward+backward",
        1.0,
        _conv("bf16", _EVERY, FORWARD, BOTH, ops=_EVERY_OP),
    ),
    Figure(
        "conv bf16, every shape above, both layouts, forward and forward+backward",
        1.2,
        _conv("bf16", _EVERY, FORWARD, BOTH, ops=_EVERY_OP),
        "geomean",
    ),
    Figure(
        "small conv and conv+relu f32, all three passes",
        1.0,
        _conv("f32", conv.SMALL, *_SMALL, ops=("conv2d", "conv2d+relu")),
    ),
    Figure("max_pool2d f32, forward", 8, _conv("f32", pool.FIGURES, FORWARD, ops=("max_pool2d",))),
    Figure("max_pool2d f32, forward+backward", 4, _conv("f32", pool.FIGURES, BOTH, ops=("max_pool2d",))),
    Figure(
        "every pool, f32 and bf16, both layouts, forward and forward+backward",
        1.0,
        lambda row: row.op in pool.FUNCTIONS and row.mode in (FORWARD, BOTH),
    ),
    Figure("ConvNet, batch 64, inference", 4.5, lambda row: row.op == "inference" and row.shape == training.CONVNET),
    Figure(
        "ConvNet, batch 64, training step",
        2.8,
        lambda row: row.op == "training step" and row.shape == training.CONVNET,
    ),
    Figure(
        "AVX2 tier, linear f32 1024^3, forward",
        1.1,
        lambda row: (
            row.lowered
            and row.isa == "avx2"
            and row.op == "linear"
            and row.shape == linear.SQUARES[0]
            and row.dtype == "f32"
        ),
    ),
)


def _remaining(row: Row) -> bool:
    return row.op in activation.FUNCTIONS and not any(figure.select(row) for figure in FIGURES)


REMAINING = (
    Figure(
        "every other activation, every dtype, 1K, 64K, 1M, forward and forward+backward",
        1.0,
        lambda row: _remaining(row) and row.op not in NEAR_PARITY,
    ),
    Figure(
        "erf-GELU and sigmoid, every dtype, 1K, 64K, 1M, forward and forward+backward",
        0.9,
        lambda row: _remaining(row) and row.op in NEAR_PARITY,
    ),
)


def evaluate(rows: Sequence[Row], memory: dict[str, dict[str, int]] | None) -> list[Result]:
    """The aims that the rows, and the memory of footprint.measure, say something about."""
    results = []
    for figure in FIGURES + REMAINING:
        chosen = [row for row in rows if figure.select(row)]
        if chosen:
            results.append(_geomean(figure, chosen) if figure.kind == "geomean" else _lowest(figure, chosen))
    if memory is not None:
        ours, theirs = memory["fastops"], memory["torch"]
        for model in footprint.MODELS:
            peak = ours[model] / theirs[model]
            where = f"{ours[model] / 2**20:.0f} MiB, PyTorch {theirs[model] / 2**20:.0f}"
            name = f"peak memory of training steps of the {model} / PyTorch's"
            results.append(Result(name, "<= 1", f"{peak:.3f}", "", where, REACHED if peak <= 1 else MISSED))
        saved = theirs["ReLU"] / ours["ReLU"]
        where = f"{ours['ReLU']} bytes, PyTorch {theirs['ReLU']}"
        name = "what a ReLU keeps for backward: PyTorch's / ours"
        results.append(Result(name, ">= 16x", f"{saved:.1f}x", "", where, REACHED if saved >= 16 else MISSED))
    return results


def _lowest(figure: Figure, rows: Sequence[Row]) -> Result:
    """Decided by the lowest row; or, where rows miss the aim by more than their spread, by the lowest of those."""
    missing = [row for row in rows if figure.value(row).high < figure.reach]
    lowest = min(missing or rows, key=lambda row: figure.value(row).middle)
    return _result(figure, figure.value(lowest), f"lowest of {len(rows)}: {describe(lowest)}")


def _geomean(figure: Figure, rows: Sequence[Row]) -> Result:
    """Its spread takes the rows' as independent of each other, and so is narrower than theirs."""
    values = [figure.value(row) for row in rows]
    middle = math.exp(sum(math.log(value.middle) for value in values) / len(values))
    down = math.hypot(*(math.log(value.middle / value.low) for value in values)) / len(values)
    up = math.hypot(*(math.log(value.high / value.middle) for value in values)) / len(values)
    lowest = min(rows, key=lambda row: figure.value(row).middle)
    where = f"of {len(rows)}, lowest {figure.value(lowest).middle:.2f}: {describe(lowest)}"
    return _result(figure, Spread(middle * math.exp(-down), middle, middle * math.exp(up)), where)


def _result(figure: Figure, value: Spread, where: str) -> Result:
    verdict = REACHED if value.middle >= figure.reach else LEVEL if value.high >= figure.reach else MISSED
    digits = 0 if figure.unit == "%" else 2
    return Result(
        f"{figure.name}: {figure.kind}",
        f">= {figure.reach:g}{figure.unit}",
        f"{value.middle:.{digits}f}{figure.unit}",
        f"{value.low:.{digits}f} - {value.high:.{digits}f}",
        where,
        verdict,
    )


def describe(row: Row) -> str:
    tier = f", {row.isa} tier" if row.lowered else ""
    return f"{row.op} {row.shape} {row.dtype} {PASSES[row.mode]}, {row.threads} thread{'s'[: row.threads - 1]}{tier}"
