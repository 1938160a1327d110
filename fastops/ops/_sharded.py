"""linear of DTensors, as tensor parallelism makes them: how its ops may be sharded, so that each process runs its own
part on our kernels.

PyTorch's rules for addmm would split linear into products of its own; a rule for linear itself keeps it one call.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from fastops._activations import saved_by_linear
from fastops.ops import DTYPES, gpu_takes


def are_sharded(*tensors: Tensor | None) -> bool:
    """Whether these are DTensors of a dtype and device that linear has kernels for."""
    first = tensors[0]
    # By its name: importing torch.distributed.tensor takes a second, and it is imported where there is a DTensor.
    if not all(t is None or type(t).__name__ == "DTensor" for t in tensors) or first.dtype not in DTYPES:
        return False
    device = first.device
    if not all(t is None or (t.dtype == first.dtype and t.device == device) for t in tensors):
        return False
    if device.type != "cpu" and not gpu_takes(device.type, device.index):
        return False
    _register()
    return True


@functools.cache
def _register() -> None:
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
    from torch.distributed.tensor._op_schema import RuntimeSchemaInfo
    from torch.distributed.tensor.experimental import register_sharding

    whole, partial = Replicate(), Partial()

    # Of one dimension of the mesh: how each result and each argument is sharded. By rows, each process has another part
    # of the batch; by columns, other output features; by depth, other input features, and the outputs are summed up.
    # A result that is not asked for has no elements, and no parts.
    def forward(
        x: Any, w: Any, b: Any, activation: str, alpha: float, beta: float, need_saved: bool
    ) -> list[tuple[list[Any], list[Any]]]:
        last = len(x.tensor_meta.shape) - 1
        saved = need_saved and saved_by_linear(activation, alpha, beta) == "input"
        ways = [(Shard(dim), Shard(dim), whole, whole) for dim in range(last)]
        ways += [(whole, whole, whole, whole), (Shard(last), whole, Shard(0), Shard(0))]
        if activation == "identity":  # f of a sum is no sum
            ways.append((partial, Shard(last), Shard(1), partial))
        return [([y, y if saved else whole], [x, w, b and bias, *[None] * 4]) for y, x, w, bias in ways]

    def backward(gy: Any, saved: Any, x: Any, w: Any, *options: Any) -> list[tuple[list[Any], list[Any]]]:
        last, mask = len(gy.tensor_meta.shape) - 1, options[-1]
        ways = [(Shard(dim), Shard(dim), whole, Shard(dim), partial, partial) for dim in range(last)]
        ways += [(whole,) * 6]
        ways += [(Shard(last), whole, Shard(0), partial, Shard(0), Shard(0))]
        ways += [(whole, Shard(last), Shard(1), Shard(last), Shard(1), whole)]
        return [
            (
                [grad if wanted else whole for grad, wanted in zip(grads, mask, strict=True)],
                [gy, saved and gy, x, w, *[None] * 4],
            )
            for gy, x, w, *grads in ways
        ]

    ops = torch.ops.fastops
    info = DTensor._op_dispatcher.sharding_propagator.op_to_schema_info
    for op, rule, first in ((ops.linear_forward.default, forward, 3), (ops.linear_backward.default, backward, 4)):
        register_sharding(op)(rule)
        # Decisions are kept; arguments from the activation on are part of what they are kept for.
        info[op] = RuntimeSchemaInfo(first, needs_pytree=True)
