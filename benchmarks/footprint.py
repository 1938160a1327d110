"""Memory of training steps, PyTorch against fastops, each in a process of its own.

`python -m fastops.benchmarks.footprint torch|fastops THREADS MODEL` trains for a few steps and prints one line of JSON.
"""

import json
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

import fastops
import fastops.functional as FF
from fastops.benchmarks.training import mlp
from fastops.demo import ConvNet

SIZES, BATCH, IMAGES, STEPS = (784, 2048, 2048, 10), 4096, 1024, 5
MODELS = ("MLP", "ConvNet")


def saved_bytes(function: object, x: torch.Tensor) -> int:
    """Bytes of the storages that function(x) keeps for its backward."""
    storages: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function(x)
    return sum(storages.values())


def measure(threads: int) -> dict[str, dict[str, int]]:
    """For "torch" and for "fastops": the peak bytes of each model's training steps, by the model's name; and as "ReLU"
    the bytes that a ReLU of 16 MB keeps for backward.
    """
    results: dict[str, dict[str, int]] = {}
    for side in ("torch", "fastops"):
        results[side] = {"ReLU": 0}
        for model in MODELS:
            command = [sys.executable, "-m", "fastops.benchmarks.footprint", side, str(threads), model]
            run = subprocess.run(command, check=True, capture_output=True, text=True)
            results[side].update(json.loads(run.stdout))
    return results


def resident(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def _run(side: str, name: str) -> dict[str, int]:
    x = torch.randn(4 * 1024 * 1024, requires_grad=True)
    relu_saved = saved_bytes(FF.relu if side == "fastops" else nn.functional.relu, x)
    del x
    torch.manual_seed(0)
    if name == "MLP":
        model, batch = mlp(SIZES), torch.randn(BATCH, SIZES[0])
    else:
        model, batch = ConvNet(), torch.randn(IMAGES, 1, 28, 28)
    target = torch.randint(10, (len(batch),))
    if side == "fastops":
        fastops.replace_(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    for _ in range(STEPS):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(batch), target).backward()
        optimizer.step()
    return {name: resident("VmHWM") - before, "ReLU": relu_saved}


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[2]))
    print(json.dumps(_run(sys.argv[1], sys.argv[3])))
