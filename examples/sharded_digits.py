"""A network that is split among processes: FSDP2 splits every parameter, tensor parallelism splits the layers.

    pip install scikit-learn
    torchrun --nproc-per-node 2 examples/sharded_digits.py

With fully_shard, parameters are gathered for each call, and the layers compute with plain tensors. With tensor
parallelism they stay split: a linear layer's weight is a DTensor, and each process computes its own columns or rows.
Both run on fastops' kernels, whether replace_ comes before or after the model is sharded.
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional as F

import fastops

try:
    from sklearn.datasets import load_digits
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: pip install scikit-learn") from None


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64), nn.Tanh(), nn.Linear(64, 10))


def shard(model: nn.Module, mesh: DeviceMesh, way: str) -> None:
    if way == "fully_shard":
        for layer in (model[0], model[2], model):  # what is gathered together
            fully_shard(layer, mesh=mesh)
    else:  # the first layer is split by its outputs and the second by its inputs: one sum over the processes for both
        parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})


def train(model: nn.Module, steps: int, rank: int = 0, processes: int = 1) -> None:
    """rank, processes: whose part of the data this is. With tensor parallelism all have the same data."""
    digits = load_digits(return_X_y=True)
    images, classes = (torch.tensor(one)[rank::processes] for one in digits)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    dtype, size = next(model.parameters()).dtype, 64 // processes
    for step in range(steps):
        part = slice(step % 16 * size, (step % 16 + 1) * size)
        optimizer.zero_grad()
        F.cross_entropy(model(images[part].to(dtype) / 16), classes[part]).backward()
        optimizer.step()


def main() -> None:
    dist.init_process_group("gloo")
    rank, processes = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (processes,))
    for way in ("fully_shard", "tensor parallel"):
        model = network()
        fastops.replace_(model)
        shard(model, mesh, way)
        with fastops.record() as calls:
            train(model, 50, *((rank, processes) if way == "fully_shard" else ()))
        linear = next(call for call in calls if call.op == "linear")
        if rank == 0:
            print(f"{way}: {len(calls)} kernel calls, the first {linear.kernel} of {linear.shapes}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
