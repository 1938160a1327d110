"""DistributedDataParallel: one network, several processes, each with its part of every batch; goes on after a failure.

    pip install scikit-learn
    torchrun --nproc-per-node 2 examples/ddp_digits.py
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
    torchrun --nproc-per-node 2 --max-restarts 1 examples/ddp_digits.py --checkpoint /tmp/digits.pt --fail-at 15

The last line stops one process at step 15. torchrun starts all of them again, and they go on from the last
checkpoint. Without the variable they may look for each other at a store that outlives the failure, and find processes
that are gone (torch 2.13). For more than one machine: examples/multi_node.sh.
"""

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import fastops

try:
    from sklearn.datasets import load_digits
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: pip install scikit-learn") from None

BATCH = 64  # of all processes together


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip


def digits() -> tuple[Tensor, Tensor]:
    data, order = load_digits(), torch.randperm(1797, generator=torch.Generator().manual_seed(0))
    return torch.tensor(data.images, dtype=torch.float32)[order, None] / 16, torch.tensor(data.target)[order]


def batch(step: int, rank: int, processes: int) -> Tensor:
    """The images of this step that are this process's. A step is the same whenever, and by whomever, it is done."""
    order = torch.randperm(1437, generator=torch.Generator().manual_seed(step))
    return order[:BATCH][rank::processes]


def train(
    model: nn.Module, steps: int, rank: int = 0, processes: int = 1, checkpoint: Path | None = None, fail_at: int = 0
) -> None:
    images, classes = digits()
    plain = model.module if isinstance(model, DistributedDataParallel) else model  # whose names have no "module."
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    first = 1
    if checkpoint and checkpoint.exists():
        saved = torch.load(checkpoint)
        plain.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["step"] + 1
        print(f"process {rank} goes on at step {first}", flush=True)
    for step in range(first, steps + 1):
        if step == fail_at and rank == processes - 1 and first == 1:
            raise RuntimeError(f"process {rank} was told to fail at step {step}")
        mine = batch(step, rank, processes)
        optimizer.zero_grad()
        F.cross_entropy(model(images[mine]), classes[mine]).backward()
        optimizer.step()
        if checkpoint and step % 10 == 0 and rank == 0:
            state = {"model": plain.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
            torch.save(state, checkpoint.with_suffix(".new"))
            checkpoint.with_suffix(".new").rename(checkpoint)  # at no time is there half a file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--checkpoint", type=Path, help="a file to write every ten steps, and to go on from")
    parser.add_argument("--fail-at", type=int, default=0, metavar="STEP", help="stop a process, unless it has gone on")
    options = parser.parse_args()
    dist.init_process_group("gloo")
    rank, processes = dist.get_rank(), dist.get_world_size()
    model = network()
    fastops.replace_(model)  # before or after DistributedDataParallel: parameters stay what they are
    train(DistributedDataParallel(model), options.steps, rank, processes, options.checkpoint, options.fail_at)
    if rank == 0:
        images, classes = digits()
        with torch.no_grad():
            accuracy = (model(images[1437:]).argmax(1) == classes[1437:]).float().mean()
        print(f"{processes} processes, {options.steps} steps: accuracy {accuracy:.3f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
