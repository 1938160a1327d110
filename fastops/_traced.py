"""What Dynamo traces in the place of a forward of ours, where a compiled graph has PyTorch's op.

Our forward would come to the same op by way of a policy, and everything that the policy reads would be a guard: some 60
of them, which cost a model of four layers 5% of its time (4x(64 + GELU), Inductor, two threads, Zen 5).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_FORWARDS: dict[Callable[..., Any], Callable[..., Any]] = {}


def traced_as(forward: Callable[..., Any], other: Callable[..., Any]) -> None:
    """Has Dynamo trace `other`, a function in Python, where `forward` is called."""
    _FORWARDS[forward] = other
    forward._torchdynamo_inline = other


@contextmanager
def traced_as_written() -> Iterator[None]:
    """Inside the block Dynamo traces every forward as it is."""
    for forward in _FORWARDS:
        forward.__dict__.pop("_torchdynamo_inline", None)
    try:
        yield
    finally:
        for forward, other in _FORWARDS.items():
            forward._torchdynamo_inline = other
