"""An ensemble of small networks: trained together by torch.func, and one after the other.

    pip install scikit-learn
    python examples/ensemble.py

stack_module_state and vmap call all networks as one, with stacked weights: batched products, which are PyTorch's, and
activations, which are fastops'. A loop over fused networks calls one kernel for a whole network; for networks as small
as these that is faster.
"""

import contextlib
import copy
import time
from statistics import median

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn import functional as F

import fastops

try:
    from sklearn.datasets import load_digits
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: pip install scikit-learn") from None

RATE = 0.1


def networks(count: int, dtype: torch.dtype = torch.float32) -> list[nn.Module]:
    torch.manual_seed(0)
    return [nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10)).to(dtype) for _ in range(count)]


def digits(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    order = torch.randperm(1797, generator=torch.Generator().manual_seed(0))
    images, classes = (torch.tensor(one)[order] for one in load_digits(return_X_y=True))
    return images.to(dtype) / 16, classes


def part(step: int) -> Tensor:
    return torch.arange(step * 64, step * 64 + 64) % 1437


def train_stacked(models: list[nn.Module], steps: int) -> float:
    """SGD on the stacked weights, which end up in the models. Returns the median milliseconds of a step."""
    images, classes = digits(models[0][0].weight.dtype)
    parameters, buffers = stack_module_state(models)
    parameters = {name: value.detach() for name, value in parameters.items()}
    skeleton, seconds = copy.deepcopy(models[0]).to("meta"), []

    def loss(weights: dict[str, Tensor], others: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(skeleton, (weights, others), (x,)), y)

    gradients = vmap(grad(loss), in_dims=(0, 0, None, None))
    for step in range(steps):
        start = time.perf_counter()
        x, y = images[part(step)], classes[part(step)]
        for name, gradient in gradients(parameters, buffers, x, y).items():
            parameters[name] -= RATE * gradient
        seconds.append(time.perf_counter() - start)
    for index, model in enumerate(models):
        model.load_state_dict({name: value[index] for name, value in parameters.items()})
    return 1000 * median(seconds)


def train_in_turn(models: list[nn.Module], steps: int) -> float:
    images, classes = digits(models[0][0].weight.dtype)
    parameters, seconds = [p for model in models for p in model.parameters()], []
    optimizer = torch.optim.SGD(parameters, lr=RATE)
    for step in range(steps):
        start = time.perf_counter()
        optimizer.zero_grad()
        for model in models:
            F.cross_entropy(model(images[part(step)]), classes[part(step)]).backward()
        optimizer.step()
        seconds.append(time.perf_counter() - start)
    return 1000 * median(seconds)


def run(way: str, count: int = 8, steps: int = 100, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, float]:
    """way: "stacked" or "in turn", with ", fastops" or without. Returns the networks, and milliseconds a step."""
    models = networks(count, dtype)
    if way == "in turn, fastops":
        models = [fastops.fuse(model) for model in models]
    with fastops.enabled() if way == "stacked, fastops" else contextlib.nullcontext():
        milliseconds = (train_stacked if way.startswith("stacked") else train_in_turn)(models, steps)
    return nn.ModuleList(models), milliseconds


def accuracies(models: nn.Module) -> tuple[float, float]:
    """Of the networks, on average, and of their averaged votes."""
    images, classes = digits(models[0][0].weight.dtype)
    with torch.no_grad():
        votes = torch.stack([model(images[1437:]).softmax(1) for model in models])
    right = votes.argmax(2) == classes[1437:]
    return right.float().mean().item(), (votes.mean(0).argmax(1) == classes[1437:]).float().mean().item()


def main() -> None:
    for way in ("stacked", "stacked, fastops", "in turn", "in turn, fastops"):
        models, milliseconds = run(way)
        one, all_together = accuracies(models)
        print(f"{way:17} {milliseconds:.2f} ms a step; accuracy of one network {one:.3f}, of all {all_together:.3f}")


if __name__ == "__main__":
    main()
