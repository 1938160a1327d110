"""Transfer learning: a backbone that is trained on the digits 0 to 4 and then frozen, and a new head for 5 to 9.

pip install scikit-learn
python examples/transfer.py
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


def digits(classes: range, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """The images of these classes in a fixed order, the last 150 of which are for testing, and their numbers from 0."""
    data, order = load_digits(), torch.randperm(1797, generator=torch.Generator().manual_seed(0))
    images, targets = torch.tensor(data.images, dtype=dtype)[order, None] / 16, torch.tensor(data.target)[order]
    chosen = torch.isin(targets, torch.tensor(classes))
    return images[chosen], targets[chosen] - classes.start


def networks(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module, nn.Module]:
    """A backbone and two heads."""
    torch.manual_seed(0)
    backbone = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
    )  # fmt: skip
    heads = [nn.Sequential(nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 5)) for _ in range(2)]
    return backbone.to(dtype), heads[0].to(dtype), heads[1].to(dtype)


def train(features: nn.Module, head: nn.Module, images: Tensor, targets: Tensor, steps: int) -> float:
    """Trains whatever has a gradient. Returns the median milliseconds of a step."""
    parameters = [p for p in [*features.parameters(), *head.parameters()] if p.requires_grad]
    optimizer, seconds = torch.optim.SGD(parameters, lr=0.02, momentum=0.9), []
    for step in range(steps):
        start = time.perf_counter()
        part = torch.arange(step * 64, step * 64 + 64) % (len(images) - 150)
        optimizer.zero_grad()
        F.cross_entropy(head(features(images[part])), targets[part]).backward()
        optimizer.step()
        seconds.append(time.perf_counter() - start)
    return 1000 * median(seconds)


def accuracy(features: nn.Module, head: nn.Module, images: Tensor, targets: Tensor) -> float:
    with torch.no_grad():
        return (head(features(images[-150:])).argmax(1) == targets[-150:]).float().mean().item()


def run(way: str, steps: int = 60, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, dict[str, float]]:
    """way: "plain", or "fastops". Returns all layers, and the figures."""
    backbone, old_head, new_head = networks(dtype)
    model = nn.ModuleList([backbone, old_head, new_head])
    if way == "fastops":
        fastops.replace_(model)
    first, second = digits(range(5), dtype), digits(range(5, 10), dtype)
    figures = {"ms a step, all": train(backbone, old_head, *first, steps)}
    figures["accuracy, 0 to 4"] = accuracy(backbone.eval(), old_head.eval(), *first)

    backbone.requires_grad_(False)
    # A backbone that does not learn any more is for inference only: its batch norms become part of the convolutions.
    features = fastops.freeze(backbone) if way == "fastops" else backbone
    figures["ms a step, head"] = train(features, new_head, *second, steps)
    figures["accuracy, 5 to 9"] = accuracy(features, new_head, *second)
    return model, figures


def main() -> None:
    plain, ours = run("plain")[1], run("fastops")[1]
    for name in plain:
        print(f"{name:18} PyTorch {plain[name]:.3f}, fastops {ours[name]:.3f}")


if __name__ == "__main__":
    main()
