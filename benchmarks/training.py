"""Training steps of small models (forward, loss, backward, SGD): PyTorch's modules against the same after replace_."""

import copy
from itertools import pairwise

import torch
from torch import Tensor, nn

import fastops
from fastops.benchmarks.harness import BOTH, DTYPES, Case, Sides, compare

MODELS = {  # layer sizes, batch
    "10-5-5-1": ((10, 5, 5, 1), 100),
    "64-128-10": ((64, 128, 10), 64),
    "784-128-10": ((784, 128, 10), 64),
    "784-1024-1024-10": ((784, 1024, 1024, 10), 256),
}


def mlp(sizes: tuple[int, ...]) -> nn.Sequential:
    """Linear layers with a ReLU between each two."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class _Step:
    """One training step at each call."""

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


def prepare(case: Case) -> Sides:
    sizes, batch = MODELS[case.shape]
    torch.manual_seed(0)
    model, x = mlp(sizes), torch.randn(batch, sizes[0])
    target = torch.randn(batch, 1) if sizes[-1] == 1 else torch.randint(sizes[-1], (batch,))
    dtype = DTYPES[case.dtype]

    def step(dtype: torch.dtype, replace: bool) -> _Step:
        twin = copy.deepcopy(model).to(dtype)
        if replace:
            fastops.replace_(twin)
        return _Step(twin, x.to(dtype), target.to(dtype) if target.is_floating_point() else target)

    def losses(dtype: torch.dtype, replace: bool) -> list[Tensor]:
        one = step(dtype, replace)
        return [torch.stack([one() for _ in range(5)])]

    errors = compare(losses(torch.float64, False), losses(dtype, True), losses(dtype, False), dtype)
    return Sides(step(dtype, False), step(dtype, True), *errors)


def make(op: str, shape: str, dtype: str, mode: str, threads: int, isa: str | None = None) -> Case:
    """`shape` is a key of MODELS."""
    sizes, batch = MODELS[shape]
    weights = sum(inputs * outputs for inputs, outputs in pairwise(sizes))
    size = DTYPES[dtype].itemsize
    flops = 6.0 * batch * weights - 2.0 * batch * sizes[0] * sizes[1]  # nobody needs the gradient of x
    traffic = float(size * (4 * weights + 4 * batch * sum(sizes)))
    return Case(op, shape, dtype, mode, threads, flops, traffic, prepare, "flops", isa)


def cases(threads: int) -> list[Case]:
    return [make("training step", shape, "f32", BOTH, threads) for shape in MODELS]
