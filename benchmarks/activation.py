"""Activations: every one in every dtype on 1K, 64K and 1M elements, and with an output of 64 MB."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

import fastops.functional as FF
from fastops._activations import ACTIVATIONS
from fastops.benchmarks.harness import BACKWARD, BOTH, DTYPES, FORWARD, Case, Sides, functional_sides, of_mode

SIZES = (1024, 65536, 1048576)
LARGE = 16777216  # float32: 64 MB


def _pair(name: str, *arguments: object, **options: object) -> tuple[Callable, Callable]:
    def call(module: object) -> Callable:
        function = getattr(module, name)
        return (lambda x: function(x, *arguments, **options)) if arguments else partial(function, **options)

    return call(F), call(FF)


SHAPE = "elements of the output"
_REQUIRED = {"threshold": (0.1, 0.5)}
FUNCTIONS = {
    **{
        kind.name: _pair(kind.function, *_REQUIRED.get(kind.name, ()), **kind.options)
        for kind in ACTIVATIONS.values()
        if kind.name != "identity"
    },
    "prelu": _pair("prelu"),
    "glu": _pair("glu"),
}


def prepare(case: Case) -> Sides:
    count = int(case.shape)
    generator = torch.Generator().manual_seed(0)
    shape = (count // 64, 128) if case.op == "glu" else (count,)
    inputs = [(2 * torch.randn(shape, generator=generator)).to(DTYPES[case.dtype])]
    if case.op == "prelu":
        inputs.append(torch.full((1,), 0.25, dtype=DTYPES[case.dtype]))
    return functional_sides(case, *FUNCTIONS[case.op], inputs)


def make(op: str, shape: str, dtype: str, mode: str, threads: int, isa: str | None = None) -> Case:
    """`shape` is the number of elements of the output."""
    inputs = 2 if op == "glu" else 1
    # forward: x, y; backward: grad_y, what was saved, grad_x
    tensors = of_mode(mode, inputs + 1, 2 * inputs + 1)
    if mode == BACKWARD and op in ACTIVATIONS and ACTIVATIONS[op].saves == "mask":
        tensors = 2 + 1 / (8 * DTYPES[dtype].itemsize)  # a bit an element is kept
    traffic = float(int(shape) * DTYPES[dtype].itemsize * tensors)
    return Case(op, shape, dtype, mode, threads, float(int(shape)), traffic, prepare, isa=isa)


def cases(threads: int) -> list[Case]:
    result = []
    for op in FUNCTIONS:
        for dtype in DTYPES:
            for size in SIZES:
                result += [make(op, str(size), dtype, mode, threads) for mode in (FORWARD, BOTH)]
        result.append(make(op, str(LARGE), "f32", FORWARD, threads))
    return result
