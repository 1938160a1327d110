"""A step of the optimizers over all parameters of a model, beside PyTorch's default.

A shape names the model: the sizes of an MLP's layers, "10-5-5-1", or "resnet50", whose parameters have its shapes.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import nn

import fastops
from fastops.benchmarks.harness import BOTH, DTYPES, Case, Sides, compare

OPTIMIZERS = {
    "SGD": {},
    "SGD+momentum": {"momentum": 0.9, "weight_decay": 1e-4},
    "Adam": {},
    "AdamW": {"weight_decay": 0.01},
}
MODELS = ("10-5-5-1", "784-128-10", "784-1024-1024-10", "resnet50")

SHAPE = "10-5-5-1, resnet50"
FUNCTIONS = tuple(f"{name} step" for name in OPTIMIZERS)


def _resnet50() -> list[tuple[int, ...]]:
    """Convolutions, BatchNorms and the last layer."""
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7), (64,), (64,)]
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            layers = [(width, channels, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
            layers += [(4 * width, channels, 1, 1)] if block == 0 else []
            for layer in layers:
                shapes += [layer, layer[:1], layer[:1]]
            channels = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


def shapes_of(model: str) -> list[tuple[int, ...]]:
    """Raises ValueError where it is no model."""
    if model == "resnet50":
        return _resnet50()
    sizes = [int(size) for size in model.split("-")]
    return [shape for inputs, outputs in pairwise(sizes) for shape in ((outputs, inputs), (outputs,))]


def _side(package: object, case: Case, dtype: torch.dtype, lr: float = 0.01) -> torch.optim.Optimizer:
    generator = torch.Generator().manual_seed(0)
    numbers = [torch.randn(shape, generator=generator).to(case.device, dtype) for shape in shapes_of(case.shape)]
    params = [nn.Parameter(t) for t in numbers]
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(case.device, dtype)
    name = case.op.removesuffix(" step")
    optimizer = getattr(package, name.split("+")[0])(params, lr=lr, **OPTIMIZERS[name])
    optimizer.step()  # which makes the state
    return optimizer


def prepare(case: Case) -> Sides:
    def results(package: object, dtype: torch.dtype) -> list[torch.Tensor]:
        optimizer = _side(package, case, dtype)
        for _ in range(2):
            optimizer.step()
        return [p.detach() for p in optimizer.param_groups[0]["params"]]

    dtype = DTYPES[case.dtype]
    exact = results(torch.optim, torch.float64)
    errors = compare(exact, results(fastops.optim, dtype), results(torch.optim, dtype), dtype)

    def one(package: object) -> Callable[[], object]:
        return _side(package, case, dtype, lr=1e-6).step

    return Sides(one(torch.optim), one(fastops.optim), *errors)


def make(op: str, shape: str, dtype: str, mode: str, threads: int, isa: str | None = None) -> Case:
    elements = sum(torch.Size(size).numel() for size in shapes_of(shape))
    tensors = {"SGD step": 3, "SGD+momentum step": 5}.get(op, 7)  # read or written
    traffic = float(DTYPES[dtype].itemsize * elements * tensors)
    return Case(op, shape, dtype, BOTH, threads, 4.0 * elements, traffic, prepare, isa=isa)


def cases(threads: int) -> list[Case]:
    return [make(op, model, dtype, BOTH, threads) for dtype in ("f32", "bf16") for op in FUNCTIONS for model in MODELS]
