"""`fastops demo`: real models trained on scikit-learn's handwritten digits, with PyTorch and after fastops.replace_."""

import argparse
import copy
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

import fastops
from fastops._extras import needs

TEST_IMAGES = 360  # of 1797


# ---- the models that tutorials start with ----------------------------------------------------------------------------


class LinearRegression(nn.Module):
    """1 -> 1."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


class SimpleNet(nn.Module):
    """10 -> 5 -> 5 -> 1 with ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(10, 5)
        self.fc2 = nn.Linear(5, 5)
        self.fc3 = nn.Linear(5, 1)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(self.relu(self.fc2(self.relu(self.fc1(x)))))


class MLP(nn.Module):
    """pixels -> 128 -> 10 with ReLU, over flattened images."""

    def __init__(self, pixels: int) -> None:
        super().__init__()
        self.flatten = nn.Flatten()
        self.fc1 = nn.Linear(pixels, 128)
        self.relu = nn.ReLU()
        self.fc2 = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.relu(self.fc1(self.flatten(x))))


class ConvNet(nn.Module):
    """Two 3x3 convolutions (32 and 64 channels), each with ReLU and 2x2 max pooling, then 3136 -> 128 -> 10."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 64, 3, padding=1)
        self.pool = nn.MaxPool2d(2)
        self.relu = nn.ReLU()
        self.fc1 = nn.Linear(3136, 128)
        self.fc2 = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.relu(self.conv1(x)))
        x = self.pool(self.relu(self.conv2(x)))
        return self.fc2(self.relu(self.fc1(x.flatten(1))))


# ---- what they learn -------------------------------------------------------------------------------------------------


@dataclass
class Task:
    """A model with its data, loss and optimizer."""

    name: str
    build: Callable[[], nn.Module]
    inputs: Tensor  # [1797, ...], float32
    targets: Tensor  # [1797] classes, or [1797, 1] values
    optimizer: Callable[[object], torch.optim.Optimizer]
    batch: int
    steps: int

    @property
    def classifies(self) -> bool:
        return not self.targets.is_floating_point()

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return (
            nn.functional.cross_entropy(output, target) if self.classifies else nn.functional.mse_loss(output, target)
        )

    @torch.no_grad()
    def score(self, model: nn.Module) -> float:
        """On the images that were not trained on: the share of right answers, or the share of variance explained."""
        inputs, targets = self.inputs[-TEST_IMAGES:], self.targets[-TEST_IMAGES:]
        output = model(inputs)
        if self.classifies:
            return (output.argmax(1) == targets).float().mean().item()
        return 1 - ((output - targets).square().mean() / targets.var(correction=0)).item()


def tasks(seed: int) -> list[Task]:
    """The five tasks, over one shuffle of the 1797 images."""
    with needs("fastops demo", "demo"):
        from sklearn.datasets import load_digits

    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(seed))
    images = torch.tensor(digits.images, dtype=torch.float32)[order, None] / 16
    classes = torch.tensor(digits.target)[order]
    large = nn.functional.interpolate(images, size=(28, 28), mode="bilinear", align_corners=False)

    # One number for another: the ink of an image predicts how many of its pixels are inked at all.
    ink = _standardize(images.sum((1, 2, 3))[:, None])
    inked = _standardize((images > 0).sum((1, 2, 3)).float()[:, None])
    # Ten numbers for one: the ten strongest principal components predict whether the digit has a closed loop (0, 6, 8,
    # 9).
    flat = images.flatten(1) - images.flatten(1).mean(0)
    components = _standardize(flat @ torch.linalg.svd(flat, full_matrices=False).Vh[:10].T)
    loops = torch.isin(classes, torch.tensor([0, 6, 8, 9])).float()[:, None]

    def sgd(rate: float) -> Callable[[object], torch.optim.Optimizer]:
        return lambda parameters: torch.optim.SGD(parameters, lr=rate)

    def adam(parameters: object) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, lr=1e-3)

    return [
        Task("LinearRegression 1-1", LinearRegression, ink, inked, sgd(0.05), 100, 1000),
        Task("SimpleNet 10-5-5-1", SimpleNet, components, loops, sgd(0.05), 100, 2000),
        Task("MLP 64-128-10", lambda: MLP(64), images, classes, sgd(0.1), 64, 2000),
        Task("MLP 784-128-10", lambda: MLP(784), large, classes, sgd(0.1), 64, 1000),
        Task("ConvNet 28x28", ConvNet, large, classes, adam, 64, 120),
    ]


def _standardize(x: Tensor) -> Tensor:
    return (x - x.mean(0)) / x.std(0)


# ---- training both sides ---------------------------------------------------------------------------------------------


class Trainer:
    """A plain training loop that can be left and taken up again."""

    def __init__(self, task: Task, model: nn.Module, order: Tensor) -> None:
        self.model, self.losses, self.seconds_per_step = model, [], []
        self._task, self._order, self._optimizer = task, order, task.optimizer(model.parameters())

    def run(self, steps: int) -> None:
        """Trains for that many more steps and keeps how long one took."""
        chosen = self._order[len(self.losses) : len(self.losses) + steps]
        batches = [(self._task.inputs[index], self._task.targets[index]) for index in chosen]
        losses = []
        begin = time.perf_counter()
        for x, y in batches:
            self._optimizer.zero_grad()
            loss = self._task.loss(self.model(x), y)
            loss.backward()
            self._optimizer.step()
            losses.append(loss.detach())
        self.seconds_per_step.append((time.perf_counter() - begin) / steps)
        self.losses += torch.stack(losses).tolist()


@dataclass
class Outcome:
    """One task, both sides."""

    name: str
    metric: str
    torch: Trainer
    fastops: Trainer
    torch_score: float
    fastops_score: float
    report: object  # replace_'s

    @property
    def torch_us(self) -> float:
        return median(self.torch.seconds_per_step) * 1e6

    @property
    def fastops_us(self) -> float:
        return median(self.fastops.seconds_per_step) * 1e6

    @property
    def speedup(self) -> float:
        return self.torch_us / self.fastops_us

    @property
    def largest_difference(self) -> float:
        return max(abs(a - b) for a, b in zip(self.torch.losses, self.fastops.losses, strict=True))


def train(task: Task, steps: int, seed: int, progress: Callable[[str], None]) -> Outcome:
    """Trains the task's model twice, from the same weights over the same batches, in turns of a few steps each."""
    torch.manual_seed(seed)
    model = task.build()
    twin = copy.deepcopy(model)
    report = fastops.replace_(twin)
    images = len(task.inputs) - TEST_IMAGES
    generator = torch.Generator().manual_seed(seed)
    order = torch.stack([torch.randperm(images, generator=generator)[: task.batch] for _ in range(steps)])
    sides = Trainer(task, model, order), Trainer(task, twin, order)
    turn = max(1, steps // 50)
    done = 0
    while done < steps:
        count = min(turn, steps - done)
        for side in sides if (done // turn) % 2 == 0 else reversed(sides):
            side.run(count)
        done += count
        losses = " and ".join(f"{side.losses[-1]:.4f}" for side in sides)
        progress(f"{task.name}: step {done} of {steps}, loss {losses}")
    scores = [task.score(side.model) for side in sides]
    return Outcome(task.name, "accuracy" if task.classifies else "R^2", *sides, *scores, report)


# ---- what is shown ---------------------------------------------------------------------------------------------------


def table(outcomes: list[Outcome]) -> str:
    """One line a model."""
    header = (
        f"{'model':<21} {'final loss':>19} {'on unseen images':>24} {'time a step, us':>19} {'speed-up':>8} "
        f"{'largest loss':>13}\n{'':<21} {'PyTorch':>9} {'fastops':>9} {'':>8} {'PyTorch':>7} {'fastops':>7} "
        f"{'PyTorch':>9} {'fastops':>9} {'':>8} {'difference':>13}"
    )
    lines = [header, "-" * 113]
    lines += [
        f"{one.name:<21} {one.torch.losses[-1]:>9.4f} {one.fastops.losses[-1]:>9.4f} {one.metric:>8} "
        f"{one.torch_score:>7.3f} {one.fastops_score:>7.3f} {one.torch_us:>9.1f} {one.fastops_us:>9.1f} "
        f"{one.speedup:>7.2f}x {one.largest_difference:>13.1e}"
        for one in outcomes
    ]
    return "\n".join(lines)


def plot(outcomes: list[Outcome], path: Path) -> None:
    """Both loss curves of every model, and the speed-ups."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = 3
    figure, grid = plt.subplots(-(-(len(outcomes) + 1) // columns), columns, figsize=(15, 8), squeeze=False)
    axes = list(grid.flat)
    for axis, one in zip(axes, outcomes, strict=False):
        axis.plot(one.torch.losses, lw=2.5, alpha=0.5, label="PyTorch")
        axis.plot(one.fastops.losses, lw=0.8, label="fastops")
        axis.set(
            title=f"{one.name}: losses differ by at most {one.largest_difference:.1e}", xlabel="step", ylabel="loss"
        )
        axis.title.set_fontsize(10)
        axis.set_yscale("log")
        axis.legend()
    bars = axes[len(outcomes)]
    drawn = bars.barh([one.name for one in outcomes], [one.speedup for one in outcomes])
    bars.bar_label(drawn, fmt="%.2fx", padding=3)
    bars.axvline(1, color="k", lw=1)
    bars.invert_yaxis()
    bars.set(title="PyTorch's time a training step / fastops'", xlim=(0, 1.2 * max(one.speedup for one in outcomes)))
    bars.title.set_fontsize(10)
    for axis in axes[len(outcomes) + 1 :]:
        axis.set_axis_off()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


class _Progress:
    """One line on the terminal that changes in place; elsewhere one line a model."""

    def __init__(self) -> None:
        self._live = sys.stderr.isatty()
        self._last = ""

    def __call__(self, text: str) -> None:
        if self._live:
            print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
        self._last = text

    def close(self) -> None:
        print("\r\033[K" if self._live else self._last, end="" if self._live else "\n", file=sys.stderr, flush=True)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds demo's options to the parser."""
    length = parser.add_mutually_exclusive_group()
    length.add_argument(
        "--steps", type=int, help="training steps of each model; default: what each needs to learn its task"
    )
    length.add_argument("--epochs", type=int, help="the same, in passes over the images")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and of the order of the images")
    parser.add_argument("--threads", type=int, help="default: PyTorch's")
    parser.add_argument("--out", type=Path, default=Path("fastops-demo.png"), help="where the plot goes")
    parser.add_argument("--quick", action="store_true", help="a tenth of the steps")


def run(options: argparse.Namespace) -> int:
    """Trains, prints and plots; returns the exit status."""
    try:
        with needs("fastops demo", "demo"):
            import matplotlib  # noqa: F401
            import sklearn  # noqa: F401
    except ModuleNotFoundError as error:
        print(error, file=sys.stderr)
        return 1
    for name in ("steps", "epochs", "threads"):
        value = getattr(options, name)
        if value is not None and value < 1:
            print(f"fastops demo: --{name} must be at least 1, got {value}", file=sys.stderr)
            return 2
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    info = fastops.info()
    print(f"fastops {info.version}, torch {info.torch}, {info.cpu}, {info.isa_used}, {info.threads} threads\n")
    outcomes = []
    for task in tasks(options.seed):
        steps = task.steps // 10 if options.quick else task.steps
        if options.epochs is not None:
            steps = options.epochs * -(-(len(task.inputs) - TEST_IMAGES) // task.batch)
        progress = _Progress()
        outcomes.append(train(task, options.steps or steps, options.seed, progress))
        progress.close()
    print(f"{table(outcomes)}\n\nfastops.replace_ on the {outcomes[-1].name}:\n{outcomes[-1].report}\n")
    plot(outcomes, options.out)
    print(f"wrote {options.out}")
    return 0
