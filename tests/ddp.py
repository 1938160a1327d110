"""One of the two processes of test_ddp.py: trains by DDP, FSDP2, tensor parallelism, Lightning; with and without ours.

Usage: ddp.py RANK FILE, FILE being where the processes meet. Rank 0 prints a line "configuration: ok" for each.
"""

import importlib.util
import itertools
import os
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import fastops
import fastops.functional as FF
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
# name -> (what makes it fast, and whether that comes before fully_shard)
SHARDED = {
    "fully_shard, replaced": (fastops.replace_, True),
    "fully_shard, replaced after": (fastops.replace_, False),
    "fully_shard, fused": (fastops.fuse, True),
}
# name -> when replace_ is called
TENSOR_PARALLEL = {
    "tensor parallel, replaced before": "before",
    "tensor parallel, replaced after": "after",
    "tensor parallel, layers with an activation": "fused",
    "sequence parallel": "sequence",
    "tensor parallel and fully_shard": "both",
}
PLACEMENTS = "every sharding of linear"
# name -> what the callback does, or how the model is sharded before it comes
LIGHTNING = {
    "lightning, ddp": "replace",
    "lightning, ddp, fuse": "fuse",
    "lightning, fully_shard": "sharded",
    "lightning, fully_shard, fuse": "sharded, fuse",
    "lightning, tensor parallel": "split",
}


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
    for name, (make, before) in SHARDED.items():
        alone = model()
        train(alone, list(everything.flatten(1, 2)))
        ours = model()
        if before:
            ours = make(ours) if make is fastops.fuse else (make(ours), ours)[1]
        for layer in (ours[5], ours):
            fully_shard(layer, mesh=mesh)
        if not before:
            assert len(make(ours).replaced) == 7
        with fastops.record() as calls:
            train(ours, mine)
        tell(name, judged(calls) or compared(ours, alone))
    for name, when in TENSOR_PARALLEL.items():
        tell(name, tensor_parallel(when, mesh))
    tell(PLACEMENTS, every_sharding(mesh))
    if importlib.util.find_spec("lightning") is not None:
        for name, way in LIGHTNING.items():
            tell(name, in_lightning(way, rank, everything))
    dist.destroy_process_group()


def judged(calls: list[Any]) -> str:
    if not calls:
        return "no kernel ran"
    theirs = sorted({call.op for call in calls if call.kernel == "aten"})
    return f"PyTorch's own ops ran: {theirs}" if theirs else ""


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def compared(ours: nn.Module, theirs: nn.Module) -> str:
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        if not torch.allclose(whole(p), q, atol=1e-5, rtol=1e-4):
            return f"weights differ by {float((whole(p) - q).abs().max()):.1e}"
    return "ok"


# ---- tensor parallelism ----------------------------------------------------------------------------------------------


def tensor_parallel(when: str, mesh: DeviceMesh) -> str:
    """All processes have the same data, and each a part of the layers."""

    def layers() -> nn.Module:
        torch.manual_seed(0)
        norm = nn.LayerNorm(8) if when == "sequence" else nn.Tanh()
        between = nn.Identity() if when == "fused" else nn.GELU()
        return nn.Sequential(nn.Linear(8, 12), between, nn.Linear(12, 8), norm, nn.Linear(8, 3))

    alone, ours = layers(), layers()
    if when != "after":
        fastops.replace_(ours)
    plan: dict[str, Any] = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    if when == "sequence":  # between the layers each process has its part of the 4 words
        plan = {
            "0": ColwiseParallel(input_layouts=Shard(1)),
            "2": RowwiseParallel(output_layouts=Shard(1)),
            "3": SequenceParallel(),
            "4": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
        }
    if when == "both":
        mesh = dist.device_mesh.init_device_mesh("cpu", (1, 2), mesh_dim_names=("data", "tensor"))
        parallelize_module(ours, mesh["tensor"], plan)
        fully_shard(ours, mesh=mesh["data"])
    else:
        parallelize_module(ours, mesh, plan)
    if when == "after":
        assert len(fastops.replace_(ours).replaced) == 5
    if when == "fused":  # which comes last: PyTorch shards a torch.nn.Linear, which a layer with an activation is not
        fastops.replace_(alone)
        alone[0].activation = ours[0].activation = "gelu"
    batches = list(torch.randn(STEPS, 6, 4, 8))
    train(alone, batches)
    with fastops.record() as calls:
        if when == "sequence":
            with torch.no_grad():
                ours(batches[0].chunk(2, 1)[dist.get_rank()])
            train(ours, [x.chunk(2, 1)[dist.get_rank()] for x in batches])
        else:
            train(ours, batches)
    if when == "sequence":  # a norm of DTensors is PyTorch's
        calls = [call for call in calls if call.op != "layer_norm"]
    sizes = {tuple(call.shapes.split(", ")[1:3]) for call in calls if call.op == "linear"}
    if not {("6x8", "6"), ("8x6", "8")} <= sizes:
        return f"the layers were not split: {sizes}"
    return judged(calls) or compared(ours, alone)


def every_sharding(mesh: DeviceMesh) -> str:
    """Result and gradients of linear for whatever may be split, three features among two processes as well."""
    torch.manual_seed(2)
    x, w, b = torch.randn(2, 5, 4), torch.randn(3, 4), torch.randn(3)
    ways = itertools.product(
        (Replicate(), Shard(0), Shard(2)), (Replicate(), Shard(0), Shard(1)), (None, b), (None, "gelu", "relu")
    )
    for x_placed, w_placed, bias, activation in ways:
        tensors = [one.clone().requires_grad_() for one in (x, w, bias) if one is not None]
        expected = FF.linear(*tensors, *[None] * (bias is None), activation)
        gradients = torch.autograd.grad(expected.square().sum(), tensors)
        b_placed = w_placed if w_placed == Shard(0) else Replicate()
        sharded = [
            distribute_tensor(one, mesh, [placed]).requires_grad_()
            for one, placed in zip((x, w, bias), (x_placed, w_placed, b_placed), strict=True)
            if one is not None
        ]
        with fastops.record() as calls:
            with torch.no_grad():
                results = [FF.linear(*sharded, *[None] * (bias is None), activation)]
            results.append(FF.linear(*sharded, *[None] * (bias is None), activation))
            # Some of the gradients, and then all of them.
            one = torch.autograd.grad(results[1].square().sum(), sharded[1], retain_graph=True)[0]
            found = torch.autograd.grad(results[1].square().sum(), sharded)
        pairs = [*zip(results, [expected] * 2, strict=True), (one, gradients[1]), *zip(found, gradients, strict=True)]
        good = all(torch.allclose(whole(p), q, atol=1e-5) for p, q in pairs)
        problem = judged(calls) or ("" if good else "other numbers")
        if problem:
            return f"{x_placed}, {w_placed}, bias {bias is not None}, {activation}: {problem}"
    return "ok"


# ---- Lightning -------------------------------------------------------------------------------------------------------


def in_lightning(way: str, rank: int, everything: torch.Tensor) -> str:
    """Lightning finds the processes as those of torchrun, and their process group."""
    import lightning.pytorch as pl
    from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

    from fastops.lightning import FastOps

    here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "GROUP_RANK": 0}
    os.environ.update({key: str(value) for key, value in here.items()})
    os.environ.update(TORCHELASTIC_RUN_ID="test", MASTER_ADDR="127.0.0.1", MASTER_PORT="1")

    class Model(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = model()

        def configure_model(self) -> None:
            if "sharded" in way:
                fully_shard(self.net, mesh=self.device_mesh["data_parallel"])
            elif way == "split":
                plan = {"5": ColwiseParallel(), "7": RowwiseParallel()}
                parallelize_module(self.net, self.device_mesh["tensor_parallel"], plan)

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            return self.net(batch).square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    alone, ours, seen = model(), Model(), []

    class Look(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            seen.append([type(layer).__module__.split(".")[0] for layer in ours.net])

    train(alone, list(everything.flatten(1, 2)))
    if "sharded" in way or way == "split":
        strategy = ModelParallelStrategy(*((1, 2) if way == "split" else (2, 1)))
    else:
        strategy = DDPStrategy(process_group_backend="gloo")
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", devices=2, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
        strategy=strategy,
        callbacks=[FastOps("fuse" if "fuse" in way else "replace", trial=1 if way == "replace" else 0), Look()],
    )  # fmt: skip
    if way == "split":
        data = torch.utils.data.DataLoader(list(everything.flatten(0, 2)), 2 * BATCH)
    else:
        data = torch.utils.data.DataLoader(list(everything[:, rank].flatten(0, 1)), BATCH)
    with fastops.record() as calls:
        trainer.fit(ours, data)
    restored = {type(layer).__module__.split(".")[0] for layer in ours.net}
    if not seen or restored != {"torch"}:
        return f"layers were {seen} and are of {restored}"
    return judged(calls) or compared(ours.net, alone)


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
