"""Memory between pages that may not be touched, and tensors of any layout that end or begin at one of them."""

import ctypes
import mmap
import random
from collections.abc import Sequence

import torch
from torch import Tensor

PAGE = mmap.PAGESIZE
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class Arena:
    """Memory between two guard pages. Its tensors lie against one of them, one at a time."""

    def __init__(self, pages: int = 32) -> None:
        self.size = pages * PAGE
        self.memory = mmap.mmap(-1, self.size + 2 * PAGE)
        self.view = (ctypes.c_char * len(self.memory)).from_buffer(self.memory)
        address = ctypes.addressof(self.view)
        for guard in (address, address + PAGE + self.size):
            assert _libc.mprotect(guard, PAGE, 0) == 0, "mprotect failed"

    def tensor(self, source: Tensor, at_end: bool) -> Tensor:
        """A copy of the (contiguous) source that ends, or begins, at a guard page."""
        if source.numel() == 0:
            return source
        size = source.numel() * source.element_size()
        assert size <= self.size
        offset = PAGE + (self.size - size if at_end else 0)
        result = torch.frombuffer(self.view, dtype=source.dtype, count=source.numel(), offset=offset)
        return result.copy_(source.flatten()).view(source.shape)

    def strided(self, values: Tensor, strides: Sequence[int], shape: Sequence[int], at_end: bool) -> Tensor:
        """The flat `values` as a tensor of these strides, its first or last element at a guard page."""
        if values.numel() == 0:
            return values.new_empty(shape)
        return self.tensor(values, at_end).as_strided(shape, strides)


def extent(shape: Sequence[int], strides: Sequence[int]) -> int:
    """How many elements of memory such a tensor spans."""
    return 0 if 0 in shape else 1 + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))


def random_strides(rng: random.Random, shape: Sequence[int]) -> list[int]:
    """Strides as a stranger's tensor may have them: dense in any order of dimensions, with gaps, expanded (0),
    overlapping (as unfold makes them), or anything."""
    kind = rng.choice(("dense", "gaps", "expanded", "expanded", "overlapping", "anything"))
    if kind == "anything":
        return [rng.randrange(0, 12) for _ in shape]
    order = list(range(len(shape)))
    if rng.random() < 0.5:
        rng.shuffle(order)
    strides, step = [0] * len(shape), rng.choice((1, 1, 1, 2)) if kind == "gaps" else 1
    for dim in reversed(order):
        strides[dim] = step
        if kind == "overlapping" and rng.random() < 0.5:
            step += rng.randrange(0, 2)
        else:
            step *= shape[dim]
        if kind == "gaps":
            step += rng.randrange(0, 4)
    if kind == "expanded" and shape:
        for _ in range(rng.randrange(1, 3)):
            strides[rng.randrange(len(shape))] = 0
    return strides
