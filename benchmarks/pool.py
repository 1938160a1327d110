"""Pooling: the shapes that the aims are about, small ones, and every kind of pool.

A shape reads batch x channels x sizes - k(ernel) [- s(tride)] [- p(adding)]: "64x32x28x28-k2-s2"; of an adaptive pool
batch x channels x sizes - output size: "8x512x7x7-1". "+channels_last" lays out the input so, for both sides.
"""

import math
import re
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import fastops.functional as FF
from fastops.benchmarks.harness import BOTH, DTYPES, FORWARD, Case, Sides, functional_sides, of_mode

FIGURES = tuple(f"{size}-k{kernel}-s2" for size in ("64x32x28x28", "8x64x112x112") for kernel in (2, 3))
WINDOWS = (*FIGURES, "8x64x112x112-k3-s2-p1", "2x64x28x28-k3-s1-p1", "8x64x28x28-k3-s3", "8x64x32x32-k8-s8")
SMALL = ("1x4x16x16-k2-s2", "1x1x8x8-k2-s2", "2x8x8x8-k3-s2-p1")
ADAPTIVE = ("8x512x7x7-1", "8x256x28x28-1", "8x256x14x14-7", "8x256x10x10-7")
OTHERS = {1: "16x64x1000-k2-s2", 3: "2x32x16x28x28-k2-s2"}
ADAPTIVE_SMALL = ("1x16x8x8-1", "1x16x8x8-4")

SHAPE = "64x32x28x28-k3-s2-p1, adaptive ones 8x512x7x7-1"
FUNCTIONS = (
    *(f"{kind}_pool{dims}d" for kind in ("max", "avg") for dims in (1, 2, 3)),
    *(f"adaptive_{kind}_pool2d" for kind in ("max", "avg")),
    *(f"{kind}_pool2d+channels_last" for kind in ("max", "avg", "adaptive_max", "adaptive_avg")),
)


def parse(op: str, text: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The input's shape and the arguments after it. Raises ValueError where text is no shape of this op."""
    pattern = r"(\d+(?:x\d+)+)-(\d+)" if op.startswith("adaptive") else r"(\d+(?:x\d+)+)-k(\d+)(?:-s(\d+))?(?:-p(\d+))?"
    match = re.fullmatch(pattern, text)
    if match is None:
        raise ValueError(f"{text} is no shape of a pool")
    sizes = tuple(map(int, match[1].split("x")))
    if len(sizes) != 2 + int(op.split("+")[0].removesuffix("d")[-1]):
        raise ValueError(f"{text} has not the dimensions of {op}")
    if op.startswith("adaptive"):
        return sizes, (int(match[2]),)
    return sizes, (int(match[2]), int(match[3] or match[2]), int(match[4] or 0))


def _pool(module: object, op: str, args: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
    function = getattr(module, op.split("+")[0])
    return lambda x: function(x, *args)


def prepare(case: Case) -> Sides:
    shape, args = parse(case.op, case.shape)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DTYPES[case.dtype])
    if case.op.endswith("+channels_last"):
        x = x.contiguous(memory_format=torch.channels_last)
    return functional_sides(case, _pool(F, case.op, args), _pool(FF, case.op, args), [x])


def make(op: str, shape: str, dtype: str, mode: str, threads: int, isa: str | None = None) -> Case:
    sizes, args = parse(op, shape)
    outputs = _pool(FF, op, args)(torch.empty(sizes, device="meta")).numel()
    elements = math.prod(sizes) + outputs
    traffic = float(DTYPES[dtype].itemsize * elements * of_mode(mode, 1, 1))
    return Case(op, shape, dtype, mode, threads, float(math.prod(sizes)), traffic, prepare, isa=isa)


def cases(threads: int) -> list[Case]:
    result = []
    for dtype in ("f32", "bf16"):
        for mode in (FORWARD, BOTH):
            for kind in ("max", "avg"):
                for last in ("", "+channels_last"):
                    op = f"{kind}_pool2d{last}"
                    result += [make(op, shape, dtype, mode, threads) for shape in (*WINDOWS, *SMALL)]
                    result += [make(f"adaptive_{op}", shape, dtype, mode, threads) for shape in ADAPTIVE]
                result += [make(f"adaptive_{kind}_pool2d", shape, dtype, mode, threads) for shape in ADAPTIVE_SMALL]
                for dims, shape in OTHERS.items():
                    if (kind, dims, dtype) != ("avg", 3, "bf16"):  # PyTorch has none
                        result.append(make(f"{kind}_pool{dims}d", shape, dtype, mode, threads))
    return result
