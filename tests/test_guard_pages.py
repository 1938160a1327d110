"""No kernel touches a byte outside its operands: every buffer ends, or begins, at a page that may not be touched.

A stray access is a segmentation fault of the whole test process; that is the failure this file exists for. The best
tier runs here: tests/cpp does the same with random shapes on every tier.
"""

import ctypes

import pytest
import torch
from compare import exact
from each import each
from guarded import PAGE, Arena
from reference import ACTIVATIONS, DTYPES, Conv, Pool

from fastops import _C
from fastops._activations import KIND

# Twice the largest tile plus one: 12x32 (32x32 on AMX), depth steps of up to 64.
DIMENSIONS = range(66)
LENGTHS = [*range(1, 70), 95, 96, 97, 127, 128, 129, 255, 256, 257]


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
        ctypes.string_at(ctypes.addressof(ARENAS[0].view) + PAGE + ARENAS[0].size, 1)
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
def test_linear(dtype, at_end):
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
def test_linear_read_in_place(dtype, at_end):
    """Too large for the stack, with few columns: rows of whole lines are not packed, to the last one."""
    w = ARENAS[0].tensor(torch.randint(-2, 3, (40, 64)).to(dtype), at_end)
    for m in range(224, 257):
        x = ARENAS[1].tensor(torch.randint(-2, 3, (m, 64)).to(dtype), at_end)
        y, _ = torch.ops.fastops.linear_forward(x, w, None, "identity", 0.0, 0.0, False)
        exact(y, (x.double() @ w.double().mT).to(dtype), f"linear {m}x40x64")


@SIDES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_transposed_and_sliced(dtype, at_end):
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
def test_linear_of_any_strides(dtype, at_end):
    """Expanded, overlapping and gappy operands, each in memory that ends, or begins, where they do."""
    random = torch.Generator().manual_seed(0)

    def draw(*choices):
        return choices[int(torch.randint(len(choices), (), generator=random))]

    def place(arena, *shape):
        strides = [draw(0, 1, 2, shape[-1], shape[-1] + 3) for _ in shape]
        span = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) + 1
        values = torch.randint(-2, 3, (span,), generator=random).to(dtype)
        return ARENAS[arena].tensor(values, at_end).as_strided(shape, strides)

    ops = torch.ops.fastops
    for _ in range(60):
        m, n, k = (draw(1, 2, 5, 13, 33, 70) for _ in range(3))
        x, w, b, g, saved = place(0, m, k), place(1, n, k), place(2, n), place(3, m, n), place(4, m, n)
        what = f"{m}x{n}x{k}, strides {[t.stride() for t in (x, w, b, g, saved)]}"
        y, _ = ops.linear_forward(x, w, b, "relu", 0.0, 0.0, False)
        exact(y, (x.double() @ w.double().mT + b.double()).relu().to(dtype), what)
        gx, gw, gb = ops.linear_backward(g, saved, x, w, "relu", 0.0, 0.0, [True, True, True])
        gz = g.double() * (saved > 0)
        exact(gx, (gz @ w.double()).to(dtype), what)
        exact(gw, (gz.mT @ x.double()).to(dtype), what)
        exact(gb, gz.sum(0).to(dtype), what)


def _convs():
    """Channels and widths over their sweep in every kind of convolution, small enough for the arenas."""
    for size in (1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 47, 65):
        yield Conv(1, 3, size, (4, 5), (1, 1))
        yield Conv(2, size, 5, (3, 3), (1, 1), stride=2)
        yield Conv(1, 2, 3, (3, size), (3, 3), padding=1)
        yield Conv(1, size, 4, (4, 5), (3, 3), padding=1)
        yield Conv(1, 3, size, (5, 4), (3, 3), stride=2, padding=1)
        yield Conv(1, 1, size, (6, 5), (3, 3), padding=1)
        yield Conv(1, size, size, (4, 6), (3, 3), padding=1, groups=size)
        yield Conv(1, 2, 2, (5, size + 2), (3, 3), stride=2, groups=2)
        yield Conv(1, size, 2 * size, (3, 4), (3, 3), padding=1, groups=size)
        yield Conv(1, 2, 3, (size + 4,), (5,), dilation=1)
        yield Conv(1, 3, 2, (3, 3, size), (2, 2, 2), padding=1)
        yield Conv(1, size, 3, (3, 4), (4, 4), stride=2, padding=1, transposed=True)
        yield Conv(1, 3, size, (4, 3), (3, 2), padding=(0, 1), dilation=2, transposed=True)
    for channels in (32, 48):  # what Winograd's algorithms may take
        yield Conv(1, channels, 32, (6, 7), (3, 3), padding=1)
        yield Conv(1, 32, channels, (9, 8), (3, 3))


@SIDES
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
def test_conv(dtype, last, at_end):
    ops = torch.ops.fastops
    for conv in _convs():
        if last and len(conv.size) != 2:
            continue

        def place(arena, source, last=last):
            """Against a guard, channels last where asked."""
            if not last or source.dim() < 4:
                return ARENAS[arena].tensor(source.contiguous(), at_end)
            return ARENAS[arena].tensor(source.movedim(1, -1).contiguous(), at_end).movedim(-1, 1)

        dims = len(conv.size)

        def several(value, dims=dims):
            return list(value) if isinstance(value, tuple) else [value] * dims

        x, w, b = (place(i, torch.randint(-1, 2, s).to(dtype)) for i, s in enumerate(conv.shapes))
        geometry = several(conv.stride), 2 * several(conv.padding), several(conv.dilation), conv.transposed, conv.groups
        y, _ = ops.conv_forward(x, w, b, *geometry, "relu", 0.0, 0.0, False)
        wide = [t.double().contiguous().requires_grad_() for t in (x, w, b)]
        z = conv.theirs(*wide)
        exact(y, z.relu().to(dtype), f"{conv}")
        g, saved = place(3, torch.randint(-1, 2, y.shape).to(dtype)), place(4, y)
        actual = ops.conv_backward(g, saved, x, w, *geometry, "relu", 0.0, 0.0, [True, True, True])
        expected = torch.autograd.grad(z, wide, g.double() * (z > 0))
        for name, one, two in zip("xwb", actual, expected, strict=True):
            exact(one, two.to(dtype), f"{conv}, gradient of {name}")


@SIDES
@pytest.mark.parametrize("dtype", DTYPES)
@each("case", ACTIVATIONS)
def test_activation(case, dtype, at_end):
    ops, args = torch.ops.fastops, (case.kind, case.a, case.b)
    kinds = ["input"] if case.from_input else []
    if case.saves == "mask":
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
            exact(getattr(_C, case.kind)(z, case.a, case.b, True), y)


def _numbers(case):
    return KIND[case.kind], case.a, case.b


@SIDES
@pytest.mark.parametrize("dtype", DTYPES)
def test_prelu_and_glu(dtype, at_end):
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


def _pools():
    """Widths, channels and windows over their sweep in every kind of pool, small enough for the arenas."""
    for size in (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 34, 47, 64, 65, 67):
        for kind in ("max", "avg"):
            yield Pool(f"{kind}_pool1d", (1, 2, size + 1), (2,), {})
            yield Pool(f"{kind}_pool2d", (1, size, 5, 4), (3, 2, 1), {})
            yield Pool(f"{kind}_pool2d", (2, size, 4, 4), (2,), {})
            yield Pool(f"{kind}_pool2d", (1, 2, 4, size + 1), (2,), {"ceil_mode": True})
            yield Pool(f"{kind}_pool2d", (1, 2, 5, size + 1), (2,), {})
            yield Pool(f"{kind}_pool2d", (1, 2, 5, size + 2), (3, 2), {})
            yield Pool(f"{kind}_pool2d", (1, 2, 5, size + 2), (3, 1), {})
            yield Pool(f"{kind}_pool2d", (1, 2, 5, size + 2), (3, 3), {})
            yield Pool(f"{kind}_pool2d", (1, 2, 5, size + 3), (4, 2, 2), {})
            yield Pool(f"{kind}_pool3d", (1, 2, 3, 2, size + 1), (2,), {})
            yield Pool(f"adaptive_{kind}_pool2d", (1, 3, 3, size), (1,), {})
            yield Pool(f"adaptive_{kind}_pool2d", (1, 3, size, 7), (3,), {})


@SIDES
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
def test_pool(dtype, last, at_end):
    def place(arena, source):
        if not last:
            return ARENAS[arena].tensor(source.contiguous(), at_end)
        return ARENAS[arena].tensor(source.movedim(1, -1).contiguous(), at_end).movedim(-1, 1)

    ops = torch.ops.fastops
    for pool in _pools():
        x = place(0, torch.randint(-4, 5, pool.shape).to(dtype))
        spatial = pool.shape[2:]
        wide = x.double().contiguous().requires_grad_()
        expected = pool.theirs(wide)
        output = expected.shape[2:]
        windows = ((), (), (), ())
        ceil_mode = pool.kwargs.get("ceil_mode", False)
        if not pool.name.startswith("adaptive"):
            kernel, stride, padding = (*pool.args, *(pool.args[0], 0)[len(pool.args) - 1 :])
            output = ()
            windows = [kernel] * len(spatial), [stride] * len(spatial), [padding] * len(spatial), [1] * len(spatial)
        g = place(1, torch.randint(-4, 5, expected.shape).to(dtype))
        (wanted,) = torch.autograd.grad(expected, wide, g.double())
        if pool.is_max:
            exact(ops.max_pool_forward(x, output, *windows, ceil_mode, "none")[0], expected.to(dtype), f"{pool}")
            for kind in ("compact", "plane"):
                y, indices = ops.max_pool_forward(x, output, *windows, ceil_mode, kind)
                exact(y, expected.to(dtype), f"{pool}")
                actual = ops.max_pool_backward(g, place(2, indices), x.shape, *windows, ceil_mode, len(spatial), last)
                exact(actual, wanted.to(dtype), f"gradient of {pool}")
        else:
            y = ops.avg_pool_forward(x, output, *windows[:3], ceil_mode, True, 0)
            exact(y, ops.avg_pool_forward(x.clone(), output, *windows[:3], ceil_mode, True, 0))
            torch.testing.assert_close(y.double(), expected, atol=1e-2, rtol=1e-2)
            actual = ops.avg_pool_backward(g, x.shape, *windows[:3], ceil_mode, True, 0, len(spatial), last)
            torch.testing.assert_close(actual.double(), wanted, atol=2e-2, rtol=2e-2)
