"""Batch normalisation in training, alone and with what follows it: ReLU, and a residual addition before that."""

import math
import re
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import fastops.functional as FF
from fastops.benchmarks.harness import BOTH, DTYPES, FORWARD, Case, Sides, functional_sides, of_mode

# Of image classifiers: the first, a middle and the last stage of a ResNet, MobileNetV2's, and of small nets.
SHAPES = ("8x64x56x56", "8x256x14x14", "8x512x7x7", "8x144x56x56")
SMALL = ("64x128", "100x5", "2x16x8x8")

SHAPE = "8x64x56x56"


def _layer(
    theirs: bool, kind: str | None, residual: bool = False, training: bool = True
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Running statistics are neither read nor written in training, so that every call computes the same."""

    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        stats = (None, None) if training else (bias.detach(), weight.detach())
        if not theirs:
            more = x if residual else None
            return FF.batch_norm(x, *stats, weight, bias, training, activation=kind, residual=more)
        y = F.batch_norm(x, *stats, weight, bias, training)
        y = y + x if residual else y
        return y if kind is None else getattr(F, kind)(y)

    return run


_OPS = {
    "batch_norm": (None, False, True),
    "batch_norm+relu": ("relu", False, True),
    "batch_norm+silu": ("silu", False, True),
    "batch_norm+add+relu": ("relu", True, True),
    "batch_norm_eval+relu": ("relu", False, False),
}
FUNCTIONS = {f"{op}{last}": (_layer(True, *args), _layer(False, *args)) for op, args in _OPS.items()
             for last in ("", "+channels_last")}  # fmt: skip


def prepare(case: Case) -> Sides:
    sizes = tuple(map(int, case.shape.split("x")))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(sizes, generator=generator).to(DTYPES[case.dtype])
    if case.op.endswith("+channels_last"):
        x = x.contiguous(memory_format=torch.channels_last)
    parameters = [(torch.rand(sizes[1], generator=generator) + 0.5).to(x.dtype) for _ in range(2)]
    kind, residual, training = _OPS[case.op.removesuffix("+channels_last")]
    if kind == "relu":  # its gradient jumps at zero, and two right roundings may lie on either side of it
        z = _layer(True, None, residual, training)(x.double(), *(p.double() for p in parameters))
        x = torch.where(z.abs() < 1e-3, x + 0.05, x)
    return functional_sides(case, *FUNCTIONS[case.op], [x, *parameters])


def make(op: str, shape: str, dtype: str, mode: str, threads: int, isa: str | None = None) -> Case:
    if re.fullmatch(r"\d+(x\d+)+", shape) is None or (op.endswith("last") and shape.count("x") != 3):
        raise ValueError(f"{shape} is no shape of {op}")
    elements = float(math.prod(map(int, shape.split("x"))))
    # forward: x twice, y; backward: grad_y and x twice, grad_x
    tensors = of_mode(mode, 3, 5)
    return Case(
        op, shape, dtype, mode, threads, elements, elements * tensors * DTYPES[dtype].itemsize, prepare, isa=isa
    )


def cases(threads: int) -> list[Case]:
    result = []
    for dtype in ("f32", "bf16"):
        for op in _OPS:
            for mode in (FORWARD, BOTH):
                for last in ("", "+channels_last"):
                    result += [make(f"{op}{last}", shape, dtype, mode, threads) for shape in SHAPES]
    result += [make("batch_norm+relu", shape, "f32", mode, threads) for shape in SMALL for mode in (FORWARD, BOTH)]
    return result
