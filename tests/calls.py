"""A call of an op, as the ops' test files declare it for the tests that call every op (every_op.py)."""

import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

import fastops.functional as FF


class Call(NamedTuple):
    name: str  # fastops.functional's
    ours: Callable[..., Tensor]
    theirs: Callable[..., Tensor]
    shapes: Sequence[Sequence[int]]  # of the input and the parameters
    needs: Sequence[int] | None = None  # which of them need a gradient; None: all

    def __str__(self) -> str:
        return "-".join([self.name, *("x".join(map(str, shape)) for shape in self.shapes)])


def call(name: str, *shapes: Sequence[int], needs: Sequence[int] | None = None, **kwargs: object) -> Call:
    """A call of a function that torch.nn.functional has too."""
    return Call(name, partial(getattr(FF, name), **kwargs), partial(getattr(F, name), **kwargs), shapes, needs)


def sizes(rng: random.Random, dims: int, least: int = 1, most: int = 7) -> tuple[int, ...]:
    return tuple(rng.randint(least, most) for _ in range(dims))


def spatial(name: str) -> int:
    """The spatial dimensions that a function or a layer has in its name."""
    return int(name[-2]) if name[-2:] in ("1d", "2d", "3d") else 0
