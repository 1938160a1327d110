"""Scaled dot product attention: ViT-B/16, a block of GPT-2, and others.

A shape is batch x heads x length x size: "4x12x197x64"; queries and keys have the same length.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import fastops.functional as FF
from fastops.benchmarks.harness import BOTH, DTYPES, FORWARD, Case, Sides, functional_sides, of_mode

SHAPE = "4x12x197x64"
SHAPES = ("4x12x197x64", "8x12x197x64", "4x12x256x64", "1x12x1024x64", "1x1x16x16", "8x6x49x32")
FUNCTIONS = ("attention", "attention+causal")


def _attention(module: object, op: str) -> Callable[..., Tensor]:
    causal = op.endswith("+causal")
    return lambda q, k, v: module.scaled_dot_product_attention(q, k, v, is_causal=causal)


def prepare(case: Case) -> Sides:
    shape, generator = tuple(map(int, case.shape.split("x"))), torch.Generator().manual_seed(0)
    inputs = [torch.randn(shape, generator=generator).to(DTYPES[case.dtype]) for _ in range(3)]
    return functional_sides(case, _attention(F, case.op), _attention(FF, case.op), inputs)


def make(op: str, shape: str, dtype: str, mode: str, threads: int, isa: str | None = None) -> Case:
    batch, heads, length, size = map(int, shape.split("x"))
    elements = batch * heads * length * size
    flops = 4.0 * elements * length * of_mode(mode, 1, 2.5) / (2 if op.endswith("+causal") else 1)
    # forward: three operands, y; backward: grad_y, y, three operands, three gradients
    traffic = float(DTYPES[dtype].itemsize * elements * of_mode(mode, 4, 8))
    return Case(op, shape, dtype, mode, threads, flops, traffic, prepare, bound="flops", isa=isa)


def cases(threads: int) -> list[Case]:
    return [make(op, shape, "f32", mode, threads) for op in FUNCTIONS for shape in SHAPES for mode in (FORWARD, BOTH)]
