"""Training on scikit-learn's digits, watched: TensorBoard's scalars, a timeline for Perfetto, a page about the model.

    pip install fastops[monitor] scikit-learn
    python examples/monitor.py runs
    tensorboard --logdir runs

It writes into the folder: events for TensorBoard; timeline.json, one step, for ui.perfetto.dev; model.html, what
fastops gains for this model, and where the time goes.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import nn

import fastops
from fastops.monitor import Monitor

try:
    import tensorboard  # noqa: F401 - Monitor writes for it
    from sklearn.datasets import load_digits
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: pip install fastops[monitor] scikit-learn") from None


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--epochs", type=int, default=5)
    options = parser.parse_args(arguments)

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    classes = torch.tensor(digits.target)

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(256, 10)
    )
    explanation = fastops.explain(model, images[:64], ways=["replace_", "fuse", "freeze"], rounds=5)
    print(explanation)

    fastops.replace_(model)
    optimizer = torch.optim.Adam(model.parameters())

    def step(chosen: torch.Tensor) -> torch.Tensor:
        loss = nn.functional.cross_entropy(model(images[chosen]), classes[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    with Monitor(options.folder, every=10) as monitor:
        monitor.graph(model, images[:1])
        for epoch in range(options.epochs):
            for chosen in torch.randperm(len(images)).split(64):
                with monitor.step() as scalars:
                    scalars["loss"] = step(chosen)
            monitor.histograms(model)
            print(f"epoch {epoch + 1}: loss {float(scalars['loss'].detach()):.3f}")

    with fastops.record() as calls:
        step(torch.arange(64))
    calls.save_trace(options.folder / "timeline.json")
    explanation.save_html(options.folder / "model.html")


if __name__ == "__main__":
    main(sys.argv[1:])
