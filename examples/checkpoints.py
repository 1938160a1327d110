"""Checkpoints: written with fastops and read without it, and the other way round, in three formats.

    pip install fastops[checkpoints]
    python examples/checkpoints.py

What is in a checkpoint is a state_dict, and a replaced or fused model has the same one as before.
"""

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

try:
    from safetensors.torch import load_model, save_model
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: pip install fastops[checkpoints]") from None


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 32), nn.ReLU(), nn.Linear(32, 10)
    )


# ---- the formats: each writes a model to a path, and reads it into another model -------------------------------------


def write_torch(model: nn.Module, path: Path) -> None:
    torch.save(model.state_dict(), path)


def read_torch(model: nn.Module, path: Path) -> None:
    model.load_state_dict(torch.load(path))


def write_safetensors(model: nn.Module, path: Path) -> None:
    save_model(model, path)


def read_safetensors(model: nn.Module, path: Path) -> None:
    load_model(model, path)


def write_distributed(model: nn.Module, path: Path) -> None:
    dcp.save({"model": model.state_dict()}, checkpoint_id=path, no_dist=True)


def read_distributed(model: nn.Module, path: Path) -> None:
    state = {"model": model.state_dict()}
    dcp.load(state, checkpoint_id=path, no_dist=True)  # into the tensors of state
    model.load_state_dict(state["model"])


Way = Callable[[nn.Module, Path], None]
FORMATS: dict[str, tuple[Way, Way]] = {
    "torch.save": (write_torch, read_torch),
    "safetensors": (write_safetensors, read_safetensors),
    "torch.distributed.checkpoint": (write_distributed, read_distributed),
}


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(torch.ones(4, 1, 8, 8))


def main() -> None:
    import fastops

    def replaced() -> nn.Module:
        model = network()
        fastops.replace_(model)
        return model

    def fused() -> nn.Module:
        return fastops.fuse(network())

    for name, (write, read) in FORMATS.items():
        for writer, reader in ((replaced, network), (network, replaced), (fused, network), (network, fused)):
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "checkpoint"
                one, other = writer(), reader()
                write(one, path)
                read(other, path)
                difference = (outputs(one) - outputs(other)).abs().max().item()
                print(f"{name}, {writer.__name__} -> {reader.__name__}: outputs differ by {difference:.1e}")

    # A whole model is pickled with the names of its classes. It is read where fastops is installed; for elsewhere,
    # restore_ it first.
    model = replaced()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pt"
        fastops.restore_(model)
        torch.save(model, path)
        print("a whole model, restored:", type(torch.load(path, weights_only=False)[0]).__module__)


if __name__ == "__main__":
    sys.exit(main())
