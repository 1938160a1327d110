"""One of the two processes of test_ddp.py: trains with DistributedDataParallel and FSDP2, with and without fastops.

Usage: ddp.py RANK FILE, FILE being where the processes meet. Rank 0 prints a line "configuration: ok" for each.
"""

import os
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fastops
import fastops.nn as fnn
import fastops.optim

STEPS, BATCH = 4, 6

# name -> (arguments of DistributedDataParallel, when replace_ is called, whether its steps accumulate gradients)
CONFIGURATIONS = {
    "replaced before": ({}, "before", False),
    "replaced after": ({}, "after", False),
    "bucket views": ({"gradient_as_bucket_view": True}, "before", False),
    "static graph": ({"static_graph": True}, "before", False),
    "small buckets": ({"bucket_cap_mb": 0.001}, "before", False),
    "unused parameters": ({"find_unused_parameters": True}, "before", False),
    "no_sync": ({}, "before", True),
    "layers with an activation": ({}, "fused", False),
    "fuse": ({}, "fuse", False),
    "fuse, no_sync, bucket views": ({"gradient_as_bucket_view": True}, "fuse", True),
    "optimizer": ({}, "optimizer", False),
}
SHARDED = {"fully_shard, replaced": fastops.replace_, "fully_shard, fused": fastops.fuse}


def model(fused: bool = False) -> nn.Module:
    torch.manual_seed(0)
    if fused:
        return nn.Sequential(
            fnn.Conv2d(1, 4, 3, activation="relu"), nn.MaxPool2d(2), nn.PReLU(4), nn.Flatten(),
            fnn.Linear(36, 16, activation="gelu"), nn.Linear(16, 3),
        )  # fmt: skip
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.PReLU(4), nn.Flatten(), nn.Linear(36, 16), nn.GELU(),
        nn.Linear(16, 3),
    )  # fmt: skip


def train(module: nn.Module, batches: list[torch.Tensor], accumulate: bool = False, optim: Any = torch.optim) -> None:
    optimizer = optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    for step, x in enumerate(batches):
        if accumulate and step % 2 == 0:
            with module.no_sync() if isinstance(module, DistributedDataParallel) else torch.enable_grad():
                module(x).square().mean().backward()
            continue
        module(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def main() -> None:
    rank, meeting = int(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    torch.manual_seed(1)
    everything = torch.randn(STEPS, 2, BATCH, 1, 8, 8)
    mine = list(everything[:, rank])

    for name, (arguments, when, accumulate) in CONFIGURATIONS.items():
        # Both halves of each batch in one process, in PyTorch: what all processes together have to arrive at.
        alone = model()
        train(alone, list(everything.flatten(1, 2)), accumulate)
        plain = DistributedDataParallel(model(), **arguments)
        train(plain, mine, accumulate)
        ours = model(fused=when == "fused")
        if when == "fuse":
            ours = fastops.fuse(ours)
        elif when != "after":
            fastops.replace_(ours)
        wrapped = DistributedDataParallel(ours, **arguments)
        if when == "after":
            assert fastops.replace_(wrapped).replaced
        with fastops.record() as calls:
            train(wrapped, mine, accumulate, fastops.optim if when == "optimizer" else torch.optim)
        outcome = "ok"
        if not calls or any(call.kernel == "aten" for call in calls):
            outcome = f"PyTorch's own ops ran: {sorted({call.op for call in calls if call.kernel == 'aten'})}"
        for p, q, r in zip(ours.parameters(), plain.module.parameters(), alone.parameters(), strict=True):
            for other in (q, r):
                if not torch.allclose(p, other, atol=1e-5, rtol=1e-4):
                    outcome = f"weights differ by {float((p - other).abs().max()):.1e}"
            mirror = [torch.empty_like(p) for _ in range(2)]
            dist.all_gather(mirror, p.detach())
            if not torch.equal(*mirror):
                outcome = "the processes have different weights"
        tell(name, outcome)

    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    for name, ours_of in SHARDED.items():
        alone = model()
        train(alone, list(everything.flatten(1, 2)))
        ours = model()
        ours = ours_of(ours) if ours_of is fastops.fuse else (ours_of(ours), ours)[1]
        fully_shard(ours, mesh=mesh)
        with fastops.record() as calls:
            train(ours, mine)
        outcome = "ok" if calls and all(call.kernel != "aten" for call in calls) else "PyTorch's own ops ran"
        for p, q in zip(ours.parameters(), alone.parameters(), strict=True):
            if not torch.allclose(p.full_tensor(), q, atol=1e-5, rtol=1e-4):
                outcome = f"weights differ by {float((p.full_tensor() - q).abs().max()):.1e}"
        tell(name, outcome)
    dist.destroy_process_group()


def tell(name: str, outcome: str) -> None:
    outcomes = [None, None]
    dist.all_gather_object(outcomes, outcome)
    if dist.get_rank() == 0:
        print(f"{name}: {'ok' if outcomes == ['ok', 'ok'] else outcomes}", flush=True)


if __name__ == "__main__":
    main()
    # Without the static destructors: PyTorch's gloo threads abort in them now and then, without fastops too.
    sys.stdout.flush()
    os._exit(0)
