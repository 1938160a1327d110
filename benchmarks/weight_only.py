"""Linear layers with weights of 8 and 4 bits beside PyTorch's layer in the input's dtype, whose place they take.

A shape is M x K x N: M rows, K input and N output features. The result is verified against float64 with the weights
that the layer's buffers stand for; what rounding them loses is no error of a kernel's.
"""

import torch
from torch import nn

from fastops import light
from fastops.benchmarks.harness import DTYPES, FORWARD, Case, Sides

SHAPE = "MxKxN"
# What from_linear gets.
FUNCTIONS = {
    "weight_only, 8 bits": {"bits": 8},
    "weight_only, 4 bits": {"bits": 4},
    "weight_only, float8": {"float8": True},
}
SHAPES = ("1x4096x4096", "1x4096x11008", "4x4096x4096", "8x4096x4096", "16x4096x4096", "32x4096x4096", "512x4096x4096")
SHAPES += ("1x768x3072", "64x768x3072")


def prepare(case: Case) -> Sides:
    m, k, n = map(int, case.shape.split("x"))
    torch.manual_seed(0)
    dtype = DTYPES[case.dtype]
    linear, x = nn.Linear(k, n).to(dtype), torch.randn(m, k).to(dtype)
    ours = light.LinearWeightOnly.from_linear(linear, **FUNCTIONS[case.op])
    exact = x.double() @ ours.dequantized().double().t() + ours.bias.double()
    error = float((ours(x).double() - exact).abs().max() / exact.abs().max())
    # Errors of k products and of as many sums, which add up like a random walk's steps.
    return Sides(lambda: linear(x), lambda: ours(x), error, 0.0, 8 * k**0.5 * 2**-24 + torch.finfo(dtype).eps)


def make(op: str, shape: str, dtype: str, mode: str, threads: int, isa: str | None = None) -> Case:
    m, k, n = map(int, shape.split("x"))
    traffic = DTYPES[dtype].itemsize * m * (k + n) + k * n * FUNCTIONS[op].get("bits", 8) / 8
    bound = "bytes" if m < 8 else "flops"
    return Case(op, shape, dtype, FORWARD, threads, 2.0 * m * k * n, traffic, prepare, bound, isa)


def cases(threads: int) -> list[Case]:
    return [
        make(op, shape, dtype, FORWARD, threads) for dtype in ("f32", "bf16") for op in FUNCTIONS for shape in SHAPES
    ]
