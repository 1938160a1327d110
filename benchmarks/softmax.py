"""softmax and log_softmax: over the rows of attention and of classifiers, and over the channels of images.

A shape is that of the input; the softmax is over its last dimension, with "+channels" over the second.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import fastops.functional as FF
from fastops.benchmarks.harness import BOTH, DTYPES, FORWARD, Case, Sides, functional_sides, of_mode

SHAPE = "48x197x197, 64x10, 8x21x64x64"
ROWS = ("64x10", "1x1000", "128x1000", "48x197x197", "48x256x256", "256x50257")
IMAGES = ("8x21x64x64", "8x64x14x14")
FUNCTIONS = ("softmax", "log_softmax", "softmax+channels", "log_softmax+channels")


def _softmax(module: object, op: str) -> Callable[[Tensor], Tensor]:
    function, dim = getattr(module, op.split("+")[0]), 1 if op.endswith("+channels") else -1
    return lambda x: function(x, dim)


def prepare(case: Case) -> Sides:
    shape = tuple(map(int, case.shape.split("x")))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DTYPES[case.dtype])
    return functional_sides(case, _softmax(F, case.op), _softmax(FF, case.op), [x])


def make(op: str, shape: str, dtype: str, mode: str, threads: int, isa: str | None = None) -> Case:
    elements = math.prod(map(int, shape.split("x")))
    # forward: x, y; backward: grad_y, y, grad_x
    traffic = float(DTYPES[dtype].itemsize * elements * of_mode(mode, 2, 3))
    return Case(op, shape, dtype, mode, threads, float(elements), traffic, prepare, isa=isa)


def cases(threads: int) -> list[Case]:
    result = []
    for dtype in ("f32", "bf16"):
        for mode in (FORWARD, BOTH):
            for op in ("softmax", "log_softmax"):
                result += [make(op, shape, dtype, mode, threads) for shape in ROWS]
                result += [make(f"{op}+channels", shape, dtype, mode, threads) for shape in IMAGES]
    return result
