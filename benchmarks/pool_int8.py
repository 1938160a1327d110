"""Pools of levels of 8 bits, as a frozen model of Conv2dInt8 has them (channels last), beside PyTorch's of float32
images of that layout, whose place they take, and beside its own of quantized tensors.

A shape is one of a pool, as in pool.py. A maximum is a level that was there. An average is compared with float64: where
that is half-way between two levels, float32 may round to either.
"""

import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F

from fastops._frozen_int8 import FrozenAvgPoolInt8, FrozenMaxPoolInt8, Levels
from fastops.benchmarks import pool
from fastops.benchmarks.harness import FORWARD, Case, Sides

SHAPE = pool.SHAPE
KINDS = ("max_pool2d", "avg_pool2d", "adaptive_avg_pool2d")
QUANTIZED = ", quantized"
FUNCTIONS = tuple(f"{kind}_int8{beside}" for kind in KINDS for beside in ("", QUANTIZED))
WINDOWS = ("8x64x112x112-k3-s2-p1", "8x64x56x56-k2-s2", "1x64x112x112-k3-s2-p1", "1x32x28x28-k2-s2")
WHOLE = ("8x2048x7x7-1", "1x512x7x7-1")
LEVELS = Levels(0.05, 7)


def _kind(op: str) -> str:
    return op.removesuffix(QUANTIZED).removesuffix("_int8")


def _layer(kind: str, args: tuple[int, ...]) -> torch.nn.Module:
    if kind == "max_pool2d":
        return FrozenMaxPoolInt8(*args)
    if kind == "adaptive_avg_pool2d":
        windows = {"output_size": args[0]}
    else:
        windows = dict(zip(("kernel_size", "stride", "padding"), args, strict=True))
        windows |= {"ceil_mode": False, "count_include_pad": True, "divisor_override": None}
    return FrozenAvgPoolInt8(windows, LEVELS, LEVELS, torch.float32)


def prepare(case: Case) -> Sides:
    kind = _kind(case.op)
    shape, args = pool.parse(kind, case.shape)
    generator = torch.Generator().manual_seed(0)
    levels = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
    levels = levels.contiguous(memory_format=torch.channels_last)
    values = LEVELS.values(levels)
    if case.op.endswith(QUANTIZED):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that such tensors are deprecated
            values = torch.quantize_per_tensor(values, *LEVELS, torch.quint8)
    theirs: Callable = getattr(F, kind)
    ours = _layer(kind, args)
    exact = theirs((levels.double() - LEVELS.zero), *args) + LEVELS.zero
    error = float((ours.call(levels).double() - exact).abs().max())
    return Sides(lambda: theirs(values, *args), lambda: ours.call(levels), error, 0.0, 0.0 if kind[0] == "m" else 0.501)


def make(op: str, shape: str, dtype: str, mode: str, threads: int, isa: str | None = None) -> Case:
    sizes, args = pool.parse(_kind(op), shape)
    inputs, outputs = torch.empty(sizes, device="meta"), getattr(F, _kind(op))
    traffic = float(inputs.numel() + outputs(inputs, *args).numel())
    return Case(op, shape, "f32", FORWARD, threads, float(inputs.numel()), traffic, prepare, isa=isa)


def cases(threads: int) -> list[Case]:
    return [
        make(op, shape, "f32", FORWARD, threads)
        for op in FUNCTIONS
        for shape in (WHOLE if op.startswith("adaptive") else WINDOWS)
    ]
