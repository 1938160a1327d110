"""Multilayer perceptrons: every layer as wide as the input, ReLU between them. A shape reads batch x width x layers.

"mlp step" is a training step: forward, backward to weights and biases (the input is data), SGD.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

import fastops.functional as FF
from fastops.benchmarks.harness import BOTH, DTYPES, FORWARD, Case, Sides, functional_sides, of_mode

SHAPES = ("64x64x4", "1024x64x4", "1024x128x4")


def chain(x: Tensor, *parameters: Tensor) -> Tensor:
    """PyTorch's ops. parameters: the weights, and then as many biases."""
    layers = len(parameters) // 2
    for layer in range(layers):
        x = F.linear(x, parameters[layer], parameters[layers + layer])
        if layer < layers - 1:
            x = F.relu(x)
    return x


def fused(x: Tensor, *parameters: Tensor) -> Tensor:
    layers = len(parameters) // 2
    return FF.mlp(x, parameters[:layers], parameters[layers:])


SHAPE = "batch x width x layers: 1024x64x4"
FUNCTIONS = {"mlp": (chain, fused), "mlp step": (chain, fused)}


def prepare(case: Case) -> Sides:
    batch, width, layers = map(int, case.shape.split("x"))
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, width), *[(width, width)] * layers, *[(width,)] * layers]
    inputs = [torch.randn(shape, generator=generator).to(DTYPES[case.dtype]) for shape in shapes]
    for weight in inputs[1 : layers + 1]:
        weight *= (2 / width) ** 0.5
    theirs, ours = FUNCTIONS[case.op]
    if case.op == "mlp":
        return functional_sides(case, theirs, ours, inputs)
    x = inputs[0].to(case.device)
    sides = functional_sides(
        case,
        lambda *parameters: theirs(x.to(parameters[0].dtype), *parameters),
        lambda *parameters: ours(x.to(parameters[0].dtype), *parameters),
        inputs[1:],
    )
    return replace(sides, torch=_step(theirs, x, inputs[1:]), fastops=_step(ours, x, inputs[1:]))


def _step(function: Callable[..., Tensor], x: Tensor, values: list[Tensor]) -> Callable[[], object]:
    parameters = [torch.nn.Parameter(value.to(x.device, copy=True)) for value in values]
    optimizer = torch.optim.SGD(parameters, lr=1e-6)
    grad = torch.rand_like(function(x, *parameters)) / x.shape[0]

    def step() -> None:
        function(x, *parameters).backward(grad)
        optimizer.step()
        optimizer.zero_grad()

    return step


def make(op: str, shape: str, dtype: str, mode: str, threads: int, isa: str | None = None) -> Case:
    batch, width, layers = map(int, shape.split("x"))
    mode = BOTH if op == "mlp step" else mode
    passes = of_mode(mode, 1, 2)
    size = DTYPES[dtype].itemsize
    # A fused forward pass has to move x and y; the backward pass x, grad_y and grad_x.
    traffic = float(size * batch * width * of_mode(mode, 2, 3))
    return Case(op, shape, dtype, mode, threads, 2.0 * batch * width**2 * layers * passes, traffic, prepare, isa=isa)


def cases(threads: int) -> list[Case]:
    return [make("mlp", shape, "f32", mode, threads) for shape in SHAPES for mode in (FORWARD, BOTH)]
