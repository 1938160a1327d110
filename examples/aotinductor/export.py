"""Freezes a small network, compiles it ahead of time, and says how main.cpp runs it.

python export.py FOLDER    # writes FOLDER/model.pt2, prints what to call and the outputs to expect
"""

import sys
from pathlib import Path

import torch
from torch import nn

import fastops


class Block(nn.Module):
    """Two convolutions with batch norms, and their input added."""

    def __init__(self, channels):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)

    def forward(self, x):
        return torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), Block(16), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16 * 7 * 7, 10)
    ).eval()


def export(model, inputs, path):
    """Writes the frozen model as an AOTInductor package that calls fastops' ops."""
    frozen = fastops.freeze(model)
    with torch.no_grad(), fastops.export_kernels():
        program = torch.export.export(frozen, inputs)
    return torch._inductor.aoti_compile_and_package(program, package_path=str(path))


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    model = make_model()
    x = torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16)  # as main.cpp makes it
    export(model, (x,), folder / "model.pt2")
    print("example", fastops.op_library(), folder / "model.pt2")
    with torch.no_grad():
        print(*(f"{y:.4f}" for y in model(x).flatten().tolist()))
