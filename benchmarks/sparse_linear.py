"""Linear layers and 1 x 1 convolutions with sparse weights beside fastops' own dense layers, whose place they take.

A shape is M x K x N for a linear layer (M rows, K input and N output features), and N x C x H x W x K for a convolution
(N images of C channels, K output channels); then come the percentage of zeros and the blocks in which they lie,
"64x1024x1024-90-4x4". What "pytorch" names in the results is fastops.nn.Linear or Conv2d here, with the same weights.
"""

from functools import partial

import torch

import fastops.nn as fnn
from fastops import light
from fastops.benchmarks.harness import BOTH, DTYPES, FORWARD, Case, Sides, in_mode, of_mode

SHAPE = "MxKxN-ZEROS-BLOCK"
FUNCTIONS = {"sparse_linear": "linear", "sparse_conv1x1": "conv"}
LINEAR = [f"64x1024x1024-{zeros}-1x1" for zeros in (50, 70, 80, 90, 95)]
LINEAR += ["64x1024x1024-80-4x4", "64x1024x1024-80-16x1", "64x1024x1024-80-1x4", "64x1024x1024-50-4x4"]
LINEAR += [f"{rows}x1024x1024-80-1x1" for rows in (1, 8, 512)] + ["64x4096x4096-80-1x1", "1x4096x4096-80-4x4"]
CONV = ["8x256x14x14x1024-80-1x1", "8x96x56x56x24-80-1x1", "8x256x14x14x1024-80-4x4"]


def _parsed(op: str, shape: str) -> tuple[list[int], float, tuple[int, int]]:
    sizes, zeros, block = shape.split("-")
    rows, cols = block.split("x")
    return [int(size) for size in sizes.split("x")], int(zeros) / 100, (int(rows), int(cols))


def _prune(weight: torch.Tensor, zeros: float, block: tuple[int, int]) -> None:
    """Zeros whole blocks, chosen at random, the same number for every weight of this size."""
    n, k = weight.shape[:2]
    rows, cols = n // block[0], k // block[1]
    kept = torch.ones(rows * cols)
    kept[torch.randperm(rows * cols)[: round(zeros * rows * cols)]] = 0
    mask = kept.view(rows, cols).repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    weight.mul_(mask.view(n, k, *[1] * (weight.dim() - 2)))


def prepare(case: Case) -> Sides:
    sizes, zeros, block = _parsed(case.op, case.shape)
    torch.manual_seed(0)
    dtype = DTYPES[case.dtype]
    if FUNCTIONS[case.op] == "linear":
        m, k, n = sizes
        dense, x = fnn.Linear(k, n).to(dtype), torch.randn(m, k).to(dtype)
    else:
        batch, k, height, width, n = sizes
        dense, x = fnn.Conv2d(k, n, 1).to(dtype), torch.randn(batch, k, height, width).to(dtype)
    with torch.no_grad():
        _prune(dense.weight, zeros, block)
    layer = light.LinearSparse.from_linear if FUNCTIONS[case.op] == "linear" else light.Conv2d1x1Sparse.from_conv
    ours = layer(dense, block)
    exact = type(dense).forward(dense.double(), x.double())
    dense.to(dtype)
    error = float((ours(x).double() - exact).detach().abs().max() / exact.detach().abs().max())
    bound = 8 * k**0.5 * 2**-24 + torch.finfo(dtype).eps
    x.requires_grad_(case.mode != FORWARD)
    grad = torch.randn_like(exact, dtype=dtype)
    sides = (in_mode(case.mode, partial(side, x), [x, *side.parameters()], grad) for side in (dense, ours))
    return Sides(*sides, error, 0.0, bound)


def make(op: str, shape: str, dtype: str, mode: str, threads: int, isa: str | None = None) -> Case:
    sizes, zeros, _ = _parsed(op, shape)
    work = 2.0 * (1 - zeros)
    for size in sizes:
        work *= size
    k, n = sizes[1], sizes[-1]
    rows = work / (2.0 * (1 - zeros) * k * n)
    traffic = DTYPES[dtype].itemsize * rows * (k + n) + 6 * (1 - zeros) * k * n
    passes = of_mode(mode, 1, 2)
    return Case(op, shape, dtype, mode, threads, passes * work, passes * traffic, prepare, "flops", isa)


def cases(threads: int) -> list[Case]:
    shapes = [("sparse_linear", shape) for shape in LINEAR] + [("sparse_conv1x1", shape) for shape in CONV]
    passes = [("f32", BOTH), ("bf16", FORWARD)]
    return [
        *(make(op, shape, "f32", FORWARD, threads) for op, shape in shapes),
        *(make("sparse_linear", LINEAR[3], dtype, mode, threads) for dtype, mode in passes),
    ]
