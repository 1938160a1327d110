"""Fake quantization: weights with a scale for each output, and activations with one for all.

A shape is that of the tensor; "channel" gives its first dimension a scale for each index, "last" its last one.
PyTorch's side is torch.fake_quantize_per_tensor_affine or torch.fake_quantize_per_channel_affine.
"""

import math

import torch
from torch import Tensor

from fastops import light
from fastops.benchmarks.harness import BOTH, DTYPES, FORWARD, Case, Sides, functional_sides, of_mode

SHAPE = "64x128x56x56, 4096x4096"
FUNCTIONS = {"fake_quantize": None, "fake_quantize+channel": 0, "fake_quantize+last": -1}
SHAPES = ("64x784", "8x64x56x56", "64x128x28x28", "1024x1024", "4096x4096")


def prepare(case: Case) -> Sides:
    shape = tuple(map(int, case.shape.split("x")))
    axis = FUNCTIONS[case.op]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DTYPES[case.dtype])
    if axis is None:
        scale, zero = torch.tensor(0.02), torch.tensor(3, dtype=torch.int32)
        theirs = torch.fake_quantize_per_tensor_affine
        return functional_sides(
            case, lambda x: theirs(x, scale, zero, -128, 127), lambda x: light.fake_quantize(x, scale, zero), [x]
        )
    scale = torch.rand(shape[axis], generator=torch.Generator().manual_seed(1)) * 0.02 + 0.01
    zero = torch.zeros(shape[axis], dtype=torch.int32)

    def by_torch(x: Tensor) -> Tensor:
        return torch.fake_quantize_per_channel_affine(x, scale, zero, axis % x.dim(), -128, 127)

    return functional_sides(case, by_torch, lambda x: light.fake_quantize(x, scale, zero, axis=axis), [x])


def make(op: str, shape: str, dtype: str, mode: str, threads: int, isa: str | None = None) -> Case:
    elements = math.prod(map(int, shape.split("x")))
    # forward: x, y; recorded, the mask too; backward: the mask, grad_y, grad_x
    size = DTYPES[dtype].itemsize
    traffic = float(elements * of_mode(mode, 2 * size + (mode != FORWARD), 2 * size + 1))
    return Case(op, shape, dtype, mode, threads, float(elements), traffic, prepare, isa=isa)


def cases(threads: int) -> list[Case]:
    result = []
    for dtype in ("f32", "bf16"):
        for mode in (FORWARD, BOTH):
            result += [make("fake_quantize", shape, dtype, mode, threads) for shape in SHAPES]
            result += [
                make("fake_quantize+channel", shape, dtype, mode, threads) for shape in ("1024x1024", "64x64x3x3")
            ]
            result += [make("fake_quantize+last", "1024x1024", dtype, mode, threads)]
    return result
