"""No kernel touches a byte outside its operands: every buffer ends, or begins, at a page that may not be touched.

A stray access is a segmentation fault of the whole test process; that is the failure this file exists for.
"""

import ctypes
import mmap

import pytest
import torch
from compare import exact
from reference import ACTIVATIONS, DTYPES

from fastops import _C

_PAGE = mmap.PAGESIZE
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

# Twice the largest tile plus one: 12x32 (32x32 on AMX), depth steps of up to 64.
DIMENSIONS = range(66)
LENGTHS = [*range(1, 70), 95, 96, 97, 127, 128, 129, 255, 256, 257]


class Arena:
    """Memory between two guard pages. tensor() puts its data against one of them."""

    def __init__(self, pages=16):
        self.size = pages * _PAGE
        self.memory = mmap.mmap(-1, self.size + 2 * _PAGE)
        self.view = (ctypes.c_char * len(self.memory)).from_buffer(self.memory)
        address = ctypes.addressof(self.view)
        for guard in (address, address + _PAGE + self.size):
            assert _libc.mprotect(guard, _PAGE, 0) == 0, "mprotect failed"

    def tensor(self, source, at_end):
        """A copy of the (contiguous) source that ends, or begins, at a guard page."""
        if source.numel() == 0:
            return source
        size = source.numel() * source.element_size()
        assert size <= self.size
        offset = _PAGE + (self.size - size if at_end else 0)
        result = torch.frombuffer(self.view, dtype=source.dtype, count=source.numel(), offset=offset)
        return result.copy_(source.flatten()).view(source.shape)


ARENAS = [Arena() for _ in range(5)]
SIDES = pytest.mark.parametrize("at_end", [True, False], ids=["end", "begin"])


def test_the_guards_are_there():
    """A fault is a fault: reading past the arena kills a child process."""
    import faulthandler
    import os
    import signal

    child = os.fork()
    if child == 0:
        faulthandler.disable()
        ctypes.string_at(ctypes.addressof(ARENAS[0].view) + _PAGE + ARENAS[0].size, 1)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGSEGV


def _shapes():
    """Every dimension over its whole sweep, the two others at sizes that take different paths."""
    for others in ((1, 7), (13, 33), (40, 20)):
        for size in DIMENSIONS:
            yield size, *others
            yield others[0], size, others[1]
            yield *others, size


@SIDES
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear(isa, dtype, at_end):
    ops = torch.ops.fastops
    for m, n, k in dict.fromkeys(_shapes()):
        arenas = iter(ARENAS)

        def place(*shape, arenas=arenas):
            return next(arenas).tensor(torch.randint(-2, 3, shape).to(dtype), at_end)

        x, w, b = place(m, k), place(n, k), place(n)
        y, _ = ops.linear_forward(x, w, b, "relu", 0.0, 0.0, False)
        expected = (x.double() @ w.double().mT + b.double()).relu().to(dtype)
        exact(y, expected, f"linear {m}x{n}x{k}")
        g, saved = place(m, n), next(arenas).tensor(y, at_end)
        gx, gw, gb = ops.linear_backward(g, saved, x, w, "relu", 0.0, 0.0, [True, True, True])
        gz = g.double() * (saved > 0)
        exact(gx, (gz @ w.double()).to(dtype), f"grad_input {m}x{n}x{k}")
        exact(gw, (gz.mT @ x.double()).to(dtype), f"grad_weight {m}x{n}x{k}")
        exact(gb, gz.sum(0).to(dtype), f"grad_bias {m}x{n}x{k}")


@SIDES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_transposed_and_sliced(isa, dtype, at_end):
    """Strided operands, whose last row ends before its stride does."""
    for m, n, k in ((1, 33, 17), (5, 7, 3), (13, 35, 33), (40, 40, 40)):
        x = ARENAS[0].tensor(torch.randint(-2, 3, (k, m)).to(dtype), at_end).mT
        w = ARENAS[1].tensor(torch.randint(-2, 3, (k, n)).to(dtype), at_end).mT
        exact(
            torch.ops.fastops.linear_forward(x, w, None, "identity", 0.0, 0.0, False)[0],
            (x.double() @ w.double().mT).to(dtype),
        )
        wide = ARENAS[2].tensor(torch.randint(-2, 3, (m, k + 5)).to(dtype), at_end)
        tall = ARENAS[3].tensor(torch.randint(-2, 3, (n, k + 5)).to(dtype), at_end)
        window = slice(5, None) if at_end else slice(0, k)
        x, w = wide[:, window], tall[:, window]
        exact(
            torch.ops.fastops.linear_forward(x, w, None, "identity", 0.0, 0.0, False)[0],
            (x.double() @ w.double().mT).to(dtype),
        )


@SIDES
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ACTIVATIONS, ids=str)
def test_activation(isa, case, dtype, at_end):
    ops, args = torch.ops.fastops, (case.kind, case.a, case.b)
    kinds = ["input"] if case.from_input else []
    if _C.saved_by_default(*_numbers(case)) == "mask":
        kinds.append("mask")
    if _C.can_save_output(*_numbers(case)):
        kinds.append("output")
    for length in LENGTHS:
        x, g = (ARENAS[i].tensor(torch.randn(length).to(dtype), at_end) for i in (0, 1))
        y, mask = ops.activation_forward(x, *args, True)
        exact(y, ops.activation_forward(x.clone(), *args, True)[0])
        saved = {"input": x, "mask": mask, "output": y}
        for kind in kinds:
            placed = x if kind == "input" else ARENAS[2].tensor(saved[kind], at_end)
            exact(
                ops.activation_backward(g, placed, *args, kind),
                ops.activation_backward(g.clone(), saved[kind].clone(), *args, kind),
            )
        if "inplace" not in case.kwargs and length % 8 == 1:  # written in place, between the guards
            z = ARENAS[3].tensor(x, at_end)
            exact(_C.activation(z, _numbers(case)[0], case.a, case.b, True), y)


def _numbers(case):
    return _C.ACTIVATION_KINDS.index(case.kind), case.a, case.b


@SIDES
@pytest.mark.parametrize("dtype", DTYPES)
def test_prelu_and_glu(isa, dtype, at_end):
    ops = torch.ops.fastops
    for channels, inner in ((1, 1), (3, 1), (17, 1), (33, 1), (3, 5), (3, 16), (2, 33), (65, 3)):
        shape = (3, channels, inner)
        x, g = (ARENAS[i].tensor(torch.randn(shape).to(dtype), at_end) for i in (0, 1))
        for weights in {1, channels}:
            w = ARENAS[2].tensor(torch.rand(weights).to(dtype), at_end)
            exact(ops.prelu_forward(x, w), ops.prelu_forward(x.clone(), w.clone()))
            actual = ops.prelu_backward(g, x, w, [True, True])
            for one, two in zip(actual, ops.prelu_backward(g.clone(), x.clone(), w.clone(), [True, True]), strict=True):
                exact(one, two)
    for n in (1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 65):
        for shape, dim in (((3, 2 * n), 1), ((2, 2, n), 1), ((2 * n,), 0)):
            x = ARENAS[0].tensor(torch.randn(shape).to(dtype), at_end)
            y = ops.glu_forward(x, dim)
            exact(y, ops.glu_forward(x.clone(), dim))
            g = ARENAS[1].tensor(torch.randn(y.shape).to(dtype), at_end)
            exact(ops.glu_backward(g, x, dim), ops.glu_backward(g.clone(), x.clone(), dim))
