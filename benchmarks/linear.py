"""Linear: the shapes that the aims are about, m x k x n for m rows, k input and n output features."""

import torch
import torch.nn.functional as F
from torch import Tensor

import fastops.functional as FF
from fastops.benchmarks.harness import BOTH, DTYPES, FORWARD, RECORD, Case, Sides, functional_sides, of_mode

SQUARES = ("1024x1024x1024", "2048x2048x2048")
LAYERS = (  # of image classifiers, language models and transformers
    "128x784x128",
    "64x3136x128",
    "32x4096x4096",
    "256x1024x1000",
    "4096x64x64",
    "512x512x512",
    "197x768x3072",
)
VECTOR = "1x4096x4096"
SMALL = ("16x10x5", "64x64x64", "100x5x5")


def relu_of_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.relu(F.linear(x, weight, bias))


def fused_relu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return FF.linear(x, weight, bias, activation="relu")


def gelu_of_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(F.linear(x, weight, bias))


def fused_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return FF.linear(x, weight, bias, activation="gelu")


SHAPE = "MxKxN"
FUNCTIONS = {
    "linear": (F.linear, FF.linear),
    "linear+relu": (relu_of_linear, fused_relu),
    "linear+gelu": (gelu_of_linear, fused_gelu),
}


def prepare(case: Case) -> Sides:
    m, k, n = map(int, case.shape.split("x"))
    generator = torch.Generator().manual_seed(0)
    shapes = [(m, k), (n, k), (n,)]
    inputs = [torch.randn(shape, generator=generator).to(DTYPES[case.dtype]) for shape in shapes]
    inputs[1] /= k**0.5
    return functional_sides(case, *FUNCTIONS[case.op], inputs)


def make(op: str, shape: str, dtype: str, mode: str, threads: int, isa: str | None = None) -> Case:
    m, k, n = map(int, shape.split("x"))
    passes = of_mode(mode, 1, 2)
    size = DTYPES[dtype].itemsize
    flops, traffic = 2.0 * m * k * n * passes, float(size * (m * k + k * n + m * n) * passes)
    return Case(op, shape, dtype, mode, threads, flops, traffic, prepare, "bytes" if m == 1 else "flops", isa)


def cases(threads: int) -> list[Case]:
    """The cases that the aims are about, and two in float64 and in float16."""
    result = []
    for count in sorted({1, threads}):
        result += [make("linear", shape, "f32", FORWARD, count) for shape in SQUARES]
    result += [
        make("linear", SQUARES[0], "f32", FORWARD, threads, "avx2"),
        make("linear", VECTOR, "f32", FORWARD, threads),
    ]
    for dtype in ("f32", "bf16"):
        for mode in (FORWARD, BOTH):
            result += [make("linear", shape, dtype, mode, threads) for shape in LAYERS]
    for op in ("linear", "linear+relu"):
        for mode in (FORWARD, RECORD, BOTH):
            result += [make(op, shape, "f32", mode, threads) for shape in SMALL]
    for dtype in ("f64", "f16"):
        result += [make("linear", "512x512x512", dtype, mode, threads) for mode in (FORWARD, BOTH)]
    return result
