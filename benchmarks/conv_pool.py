"""Convolution, ReLU and a 2x2 max pool as one op, against PyTorch's three. Shapes as in conv.py."""

import torch
import torch.nn.functional as F
from torch import Tensor

import fastops.functional as FF
from fastops.benchmarks import conv
from fastops.benchmarks.harness import BOTH, DTYPES, FORWARD, Case, Sides, functional_sides, of_mode

SHAPE = conv.SHAPE
FUNCTIONS = ("conv_max_pool2d",)


def prepare(case: Case) -> Sides:
    shape = conv.parse(case.op, case.shape)
    generator = torch.Generator().manual_seed(0)
    # Whole numbers, whose sums are exact: a rounding that makes another element the maximum moves its gradient.
    inputs = [torch.randint(-3, 4, sizes, generator=generator).to(DTYPES[case.dtype]) for sizes in shape.tensors]
    activated = conv.then_relu(conv.convolution(F, "conv2d", shape))

    def theirs(*tensors: Tensor) -> Tensor:
        return F.max_pool2d(activated(*tensors), 2)

    return functional_sides(case, theirs, conv.convolution(FF, case.op, shape, "relu"), inputs)


def make(op: str, shape: str, dtype: str, mode: str, threads: int, isa: str | None = None) -> Case:
    parsed = conv.parse(op, shape)
    passes = of_mode(mode, 1, 2)
    traffic = float(DTYPES[dtype].itemsize * parsed.elements * passes)
    return Case(op, shape, dtype, mode, threads, parsed.flops * passes, traffic, prepare, "flops", isa)


def cases(threads: int) -> list[Case]:
    """The cases that the aims are about."""
    return [
        make("conv_max_pool2d", conv.FIRST, dtype, mode, threads)
        for dtype in ("f32", "bf16")
        for mode in (FORWARD, BOTH)
    ]
