"""Training steps of small models (forward, loss, backward, SGD), and inference, before and after replace_."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

import fastops
from fastops.benchmarks.harness import BOTH, DTYPES, FORWARD, Case, Sides, compare
from fastops.demo import ConvNet


@dataclass(frozen=True)
class Model:
    """What is trained.

    products: multiply-adds of one sample's forward pass. first: those of the first layer, whose input needs no
    gradient.
    """

    build: Callable[[], nn.Module]
    inputs: tuple[int, ...]
    outputs: int
    batch: int
    products: int
    first: int
    activations: int  # elements of the inputs and outputs of all layers, for one sample


def mlp(sizes: tuple[int, ...]) -> nn.Sequential:
    """Linear layers with ReLUs between them."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _mlp(sizes: tuple[int, ...], batch: int) -> Model:
    products = sum(inputs * outputs for inputs, outputs in pairwise(sizes))
    return Model(lambda: mlp(sizes), sizes[:1], sizes[-1], batch, products, sizes[0] * sizes[1], sum(sizes))


_FIRST, _SECOND = 28 * 28 * 32 * 9, 14 * 14 * 64 * 32 * 9
CONVNET = "ConvNet 28x28"
MODELS = {
    "10-5-5-1": _mlp((10, 5, 5, 1), 100),
    "64-128-10": _mlp((64, 128, 10), 64),
    "784-128-10": _mlp((784, 128, 10), 64),
    "784-1024-1024-10": _mlp((784, 1024, 1024, 10), 256),
    CONVNET: Model(
        ConvNet, (1, 28, 28), 10, 64, _FIRST + _SECOND + 3136 * 128 + 1280, _FIRST,
        28 * 28 * 33 + 14 * 14 * (32 + 64) + 3136 + 138,
    ),
}  # fmt: skip


class Step:
    """Each call is one training step."""

    def __init__(self, model: nn.Module, x: Tensor, target: Tensor) -> None:
        self._model, self._x, self._target = model, x, target
        self._loss = nn.MSELoss() if target.is_floating_point() else nn.CrossEntropyLoss()
        self._optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def __call__(self) -> Tensor:
        self._optimizer.zero_grad()
        loss = self._loss(self._model(self._x), self._target)
        loss.backward()
        self._optimizer.step()
        return loss.detach()


class Inference:
    """Each call is one pass through the model."""

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        self._model, self._x = model.eval(), x

    def __call__(self) -> Tensor:
        return self._model(self._x)


SHAPE = f"one of {', '.join(MODELS)}"
FUNCTIONS = ("training step", "inference")


def prepare(case: Case) -> Sides:
    chosen = MODELS[case.shape]
    torch.manual_seed(0)
    model, x = chosen.build(), torch.randn(chosen.batch, *chosen.inputs)
    outputs = chosen.outputs
    target = torch.randn(chosen.batch, 1) if outputs == 1 else torch.randint(outputs, (chosen.batch,))
    dtype = DTYPES[case.dtype]

    def side(dtype: torch.dtype, replace: bool) -> Step | Inference:
        twin = copy.deepcopy(model).to(dtype)
        if replace:
            fastops.replace_(twin)
        if case.mode == FORWARD:
            return Inference(twin, x.to(dtype))
        return Step(twin, x.to(dtype), target.to(dtype) if target.is_floating_point() else target)

    def results(dtype: torch.dtype, replace: bool) -> list[Tensor]:
        one = side(dtype, replace)
        return [torch.stack([one() for _ in range(1 if case.mode == FORWARD else 5)])]

    errors = compare(results(torch.float64, False), results(dtype, True), results(dtype, False), dtype)
    return Sides(side(dtype, False), side(dtype, True), *errors)


def make(op: str, shape: str, dtype: str, mode: str, threads: int, isa: str | None = None) -> Case:
    """`shape` is a key of MODELS."""
    model = MODELS[shape]
    weights = sum(parameter.numel() for parameter in model.build().parameters())
    size, batch = DTYPES[dtype].itemsize, model.batch
    mode = BOTH if op == "training step" else FORWARD
    flops, traffic = 2.0 * batch * model.products, float(size * (weights + batch * model.activations))
    if mode != FORWARD:
        flops, traffic = 3 * flops - 2.0 * batch * model.first, 4 * traffic
    return Case(op, shape, dtype, mode, threads, flops, traffic, prepare, "flops", isa)


def cases(threads: int) -> list[Case]:
    result = [make("training step", shape, "f32", BOTH, threads) for shape in MODELS]
    return [*result, make("inference", CONVNET, "f32", FORWARD, threads)]
