"""The losses: logits of small and large classifiers, of a language model and of segmentation.

A shape is that of the logits, batch x classes [x sizes], and of the mean squared error's input.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import fastops.functional as FF
from fastops.benchmarks.harness import BOTH, DTYPES, FORWARD, Case, Sides, functional_sides, of_mode

ENTROPIES = ("64x10", "128x1000", "1024x50257", "8x21x128x128")
SQUARES = ("100x1", "64x128", "1024x4096")

SHAPE = "128x1000, 8x21x128x128"
FUNCTIONS = ("cross_entropy", "mse_loss")


def _loss(module: object, op: str, shape: tuple[int, ...], device: str) -> Callable[[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(1)
    if op == "cross_entropy":
        target = torch.randint(shape[1], (shape[0], *shape[2:]), generator=generator).to(device)
        return lambda x: module.cross_entropy(x, target)
    goal = torch.randn(shape, generator=generator).to(device)
    goals = {dtype: goal.to(dtype) for dtype in DTYPES.values()}
    return lambda x: module.mse_loss(x, goals[x.dtype])


def prepare(case: Case) -> Sides:
    shape = tuple(map(int, case.shape.split("x")))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DTYPES[case.dtype])
    return functional_sides(case, *(_loss(module, case.op, shape, case.device) for module in (F, FF)), [x])


def make(op: str, shape: str, dtype: str, mode: str, threads: int, isa: str | None = None) -> Case:
    """Raises ValueError where shape is none of this op."""
    sizes = tuple(map(int, shape.split("x")))
    if len(sizes) < 2:
        raise ValueError(f"{shape} has no classes")
    elements = math.prod(sizes)
    operands = 1 if op == "cross_entropy" else 2
    traffic = float(DTYPES[dtype].itemsize * elements * of_mode(mode, operands, operands + 1))
    return Case(op, shape, dtype, mode, threads, float(elements), traffic, prepare, isa=isa)


def cases(threads: int) -> list[Case]:
    return [
        make(op, shape, dtype, mode, threads)
        for dtype in ("f32", "bf16")
        for mode in (FORWARD, BOTH)
        for op, shapes in (("cross_entropy", ENTROPIES), ("mse_loss", SQUARES))
        for shape in shapes
    ]
