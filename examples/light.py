"""A network for handwritten digits made smaller in every way that fastops.light has, with what each costs and gains.

    pip install scikit-learn matplotlib
    python examples/light.py                  # or --network mlp

It trains the network, prunes half of its channels, teaches a network of a quarter of its parameters, takes its large
layer apart, prunes that in blocks, and rounds weights to 8 bits. All but the last train on after their step. At the end
there is a table, light.json and, with Matplotlib, light.png: accuracy over size and over time.
"""

import argparse
import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastops
from fastops import light

try:
    from sklearn.datasets import load_digits
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: pip install scikit-learn matplotlib") from None

TEST_IMAGES = 360  # of 1797


class ConvNet(nn.Module):
    """Two 3x3 convolutions with batch norms, each with ReLU and 2x2 max pooling, then two linear layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = nn.Conv2d(width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width)
        self.fc1, self.fc2 = nn.Linear(2 * width * 49, 4 * width), nn.Linear(4 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(torch.relu(self.norm1(self.conv1(x))), 2)
        x = F.max_pool2d(torch.relu(self.norm2(self.conv2(x))), 2)
        return self.fc2(torch.relu(self.fc1(x.flatten(1))))


class MLP(nn.Module):
    """784 -> 4 width -> 10 with ReLU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(784, 4 * width), nn.Linear(4 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.relu(self.fc1(x.flatten(1))))


NETWORKS = {"convnet": ConvNet, "mlp": MLP}
# The student's parameters are a quarter of the teacher's: with half of a ConvNet's width.
STUDENTS = {"convnet": (0.5, {"norm2": "norm2"}), "mlp": (0.25, {"fc1": "fc1"})}


def digits(seed: int) -> tuple[Tensor, Tensor]:
    """scikit-learn's images in an order of this seed, 28 x 28, the last 360 of which are for testing."""
    data, order = load_digits(), torch.randperm(1797, generator=torch.Generator().manual_seed(seed))
    images = F.interpolate(torch.tensor(data.images[order.numpy()])[:, None].float() / 16, (28, 28), mode="bilinear")
    return images, torch.tensor(data.target[order.numpy()])


class Course:
    """The data, and how models are trained and tested."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.images, self.targets = digits(seed)

    def batches(self, steps: int) -> list[tuple[Tensor, Tensor]]:
        chosen = [torch.randint(len(self.images) - TEST_IMAGES, (64,)) for _ in range(steps)]
        return [(self.images[one], self.targets[one]) for one in chosen]

    def train(self, model: nn.Module, steps: int, pruner: light.Pruner | None = None) -> nn.Module:
        """Adam, with a learning rate that falls to 0."""
        optimizer = torch.optim.Adam(model.train().parameters(), 1e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        with fastops.replaced(model):
            for images, targets in self.batches(steps):
                optimizer.zero_grad()
                F.cross_entropy(model(images), targets).backward()
                optimizer.step()
                schedule.step()
                if pruner is not None:
                    pruner.step()
        return model.eval()

    @torch.no_grad()
    def accuracy(self, model: nn.Module) -> float:
        right = model(self.images[-TEST_IMAGES:]).argmax(1) == self.targets[-TEST_IMAGES:]
        return right.float().mean().item()


def run(
    network: str = "convnet", steps: int = 300, seed: int = 0, width: int = 32, progress: bool = True
) -> light.Comparison:
    course = Course(seed)
    x = course.images[:1]
    comparison = light.Comparison(x, course.accuracy, prepare=fastops.freeze, progress=progress)

    model = course.train(NETWORKS[network](width), steps)
    comparison.add("as trained", model)

    pruned = copy.deepcopy(model)
    say(progress, light.prune_channels_(pruned, x, amount=0.5, round_to=8))
    comparison.add("half of the channels", course.train(pruned, steps))

    part, features = STUDENTS[network]
    student = NETWORKS[network](int(part * width))
    light.distill(student, model, course.batches(steps), epochs=2, features=features, progress=progress)
    comparison.add("distilled, a quarter", student)

    low_rank = copy.deepcopy(model)
    say(progress, light.low_rank_(low_rank, parameters=0.25, filter_fn=lambda module, name: name == "fc1"))
    comparison.add("low rank, a quarter", course.train(low_rank, steps // 2))

    sparse = copy.deepcopy(model)
    pruner = light.Pruner(sparse, 0.9, pattern=(4, 4), end=steps // 2, filter_fn=lambda module, name: name == "fc1")
    course.train(sparse, steps, pruner)
    say(progress, light.sparsify_(sparse))
    comparison.add("9 of 10 blocks of 4x4 gone", sparse)

    rounded = copy.deepcopy(model)
    say(progress, light.quantize_(rounded, "int8_static", calibrate=[x for x, _ in course.batches(4)]))
    comparison.add("int8", rounded)

    both = copy.deepcopy(pruned)
    light.quantize_(both, "int8_static", calibrate=[x for x, _ in course.batches(4)])
    comparison.add("half of the channels, int8", both)
    return comparison


def say(progress: bool, report: object) -> None:
    if progress:
        print(report, end="\n\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--network", choices=[*NETWORKS], default="convnet")
    parser.add_argument("--steps", type=int, default=300, help="of training, for each model")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    comparison = run(options.network, options.steps, options.seed)
    print(comparison)
    with open("light.json", "w") as file:
        file.write(comparison.to_json())
    if comparison.plot("light.png"):
        print("light.json and light.png have been written")


if __name__ == "__main__":
    main()
