"""A sweep by Optuna: which network reads handwritten digits best, every trial on fastops' kernels.

    pip install fastops[automl] scikit-learn
    python examples/optuna_digits.py

`fastops.enable()` around the sweep touches neither trials nor models, whoever makes them. An objective of one's own can
also fuse the model that it has made.
"""

import contextlib
import time
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastops

try:
    import optuna
    from sklearn.datasets import load_digits
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: pip install fastops[automl] scikit-learn") from None

WAYS = ["plain", "enable", "fuse"]


def digits() -> tuple[Tensor, Tensor]:
    order = torch.randperm(1797, generator=torch.Generator().manual_seed(0))
    images, targets = (torch.tensor(one)[order] for one in load_digits(return_X_y=True))
    return images.float() / 16, targets


def network(trial: optuna.Trial) -> nn.Module:
    """As many linear layers, and as wide, as the trial says."""
    depth = trial.suggest_int("depth", 1, 3)
    widths = [64, *(trial.suggest_int(f"width {i}", 16, 128, log=True) for i in range(depth))]
    activation = getattr(nn, trial.suggest_categorical("activation", ["ReLU", "Tanh", "GELU"]))
    hidden = [layer for pair in pairwise(widths) for layer in (nn.Linear(*pair), activation())]
    return nn.Sequential(*hidden, nn.Linear(widths[-1], 10))


def sweep(way: str, trials: int = 20, epochs: int = 5) -> optuna.Study:
    """way: "plain", "enable" or "fuse". The same hyperparameters are tried in each of them."""
    images, targets = digits()

    def accuracy(trial: optuna.Trial) -> float:
        torch.manual_seed(trial.number)
        model = network(trial)
        if way == "fuse":
            model = fastops.fuse(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=trial.suggest_float("lr", 0.01, 0.3, log=True), momentum=0.9)
        for _ in range(epochs):
            for part in torch.arange(1437).split(64):
                optimizer.zero_grad()
                F.cross_entropy(model(images[part]), targets[part]).backward()
                optimizer.step()
        with torch.no_grad():
            return (model(images[1437:]).argmax(1) == targets[1437:]).float().mean().item()

    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.RandomSampler(seed=0))
    with fastops.enabled() if way == "enable" else contextlib.nullcontext():
        study.optimize(accuracy, n_trials=trials)
    return study


def main() -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    for way in WAYS:
        start = time.perf_counter()
        study = sweep(way)
        print(f"{way:8} {time.perf_counter() - start:.2f} s, best {study.best_value:.3f} with {study.best_params}")


if __name__ == "__main__":
    main()
