"""Linear layers with int8 weights: beside PyTorch's layer in the input's dtype, whose place they take, and beside
PyTorch's own int8 layer (torch.ao.quantization.quantize_dynamic), whose input has one scale and 7 bits.

A shape is M x K x N: M rows, K input and N output features. The result is verified against the formulas of
fastops/ops/linear_int8.py; what rounding to 8 bits loses is no error of a kernel's.
"""

import warnings

import torch
from torch import nn

from fastops import light
from fastops.benchmarks.harness import DTYPES, FORWARD, Case, Sides
from fastops.ops.linear_int8 import by_torch

SHAPE = "MxKxN"
FUNCTIONS = ("linear_int8", "linear_int8, quantize_dynamic")
SHAPES = ("1024x1024x1024", "2048x2048x2048", "197x768x3072", "1024x3072x768", "64x4096x4096", "1x4096x4096")
# Sums are exact; five roundings of float32 follow, relative to the largest result.
ALLOWED = 5 * 2**-24


def _by_pytorch(linear: nn.Linear) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is torchao
        return torch.ao.quantization.quantize_dynamic(nn.Sequential(linear), {nn.Linear}, torch.qint8)


def prepare(case: Case) -> Sides:
    m, k, n = map(int, case.shape.split("x"))
    torch.manual_seed(0)
    dtype = DTYPES[case.dtype]
    linear, x = nn.Linear(k, n).to(dtype), torch.randn(m, k).to(dtype)
    ours = light.LinearInt8.from_linear(linear)
    theirs = _by_pytorch(linear) if case.op.endswith("quantize_dynamic") else linear
    exact = by_torch(x.float(), ours.weight, ours.scale, ours.bias.float())
    error = float((ours(x).float() - exact).abs().max() / exact.abs().max())
    return Sides(lambda: theirs(x), lambda: ours(x), error, 0.0, ALLOWED + torch.finfo(dtype).eps)


def make(op: str, shape: str, dtype: str, mode: str, threads: int, isa: str | None = None) -> Case:
    m, k, n = map(int, shape.split("x"))
    traffic = float(DTYPES[dtype].itemsize * m * (k + n) + k * n)
    return Case(
        op, shape, dtype, FORWARD, threads, 2.0 * m * k * n, traffic, prepare, "bytes" if m == 1 else "flops", isa
    )


def cases(threads: int) -> list[Case]:
    result = [make(op, shape, "f32", FORWARD, threads) for op in FUNCTIONS for shape in SHAPES]
    return result + [make(FUNCTIONS[0], shape, "bf16", FORWARD, threads) for shape in SHAPES]
