"""Two tasks, one network: which digit an image shows, and how much ink is on it; a head for each, one loss.

pip install scikit-learn
python examples/multi_task.py
"""

import time
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastops

try:
    from sklearn.datasets import load_digits
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: pip install scikit-learn") from None


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 128), nn.GELU())
        self.digit = nn.Linear(128, 10)
        self.ink = nn.Sequential(nn.Linear(128, 32), nn.Tanh(), nn.Linear(32, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(x)
        return self.digit(features), self.ink(features)[:, 0]


def digits(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    order = torch.randperm(1797, generator=torch.Generator().manual_seed(0))
    images, classes = (torch.tensor(one)[order] for one in load_digits(return_X_y=True))
    ink = images.sum(1)
    return ((images - images.mean(0)) / 16).to(dtype), classes, ((ink - ink.mean()) / ink.std()).to(dtype)


def run(way: str, steps: int = 200, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, dict[str, float]]:
    """way: "plain", "replace_" or "fuse". Returns the model, and the figures."""
    torch.manual_seed(0)
    model = TwoHeads().to(dtype)
    if way == "fuse":
        model = fastops.fuse(model)
    elif way == "replace_":
        fastops.replace_(model)
    images, classes, ink = digits(dtype)
    optimizer, seconds = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), []
    for step in range(steps):
        part = torch.arange(step * 64, step * 64 + 64) % 1437
        start = time.perf_counter()
        optimizer.zero_grad()
        digit, amount = model(images[part])
        (F.cross_entropy(digit, classes[part]) + F.mse_loss(amount, ink[part])).backward()
        optimizer.step()
        seconds.append(time.perf_counter() - start)
    with torch.no_grad():
        digit, amount = model(images[1437:])
    return model, {
        "ms a step": 1000 * median(seconds),
        "accuracy": (digit.argmax(1) == classes[1437:]).float().mean().item(),
        "share of the ink's variance explained": 1 - ((amount - ink[1437:]).square().mean() / ink[1437:].var()).item(),
    }


def main() -> None:
    figures = {way: run(way)[1] for way in ("plain", "replace_", "fuse")}
    for name in figures["plain"]:
        print(f"{name}: " + ", ".join(f"{way} {one[name]:.3f}" for way, one in figures.items()))


if __name__ == "__main__":
    main()
