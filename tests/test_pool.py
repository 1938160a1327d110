"""Pooling against PyTorch and a float64 reference: values, indices, gradients, every dtype, tier, layout and edge."""

import copy
import functools
import math
import random

import pytest
import torch
import torch.nn.functional as F
from calls import Call, call, sizes, spatial
from compare import close, exact
from each import each
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import DTYPES, LAYOUTS, POOLS, Pool
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

import fastops
import fastops.functional as FF
import fastops.nn as fnn

EVERY = each("pool", POOLS)
MAXIMA = each("pool", [pool for pool in POOLS if pool.is_max])
LAST = {1: None, 2: torch.channels_last, 3: torch.channels_last_3d}
# Small ones of every kind, for what is slow.
FEW = [pool for pool in POOLS if pool.shape in ((2, 3, 19), (2, 3, 9, 11), (2, 2, 5, 6, 7), (3, 9, 11))]
SOME = each("pool", FEW)


def run(function, x):
    x = x.detach().requires_grad_()
    output = function(x)
    ramp = torch.linspace(-1, 2, output.numel(), dtype=torch.float64).to(output).view(output.shape)
    return output, *torch.autograd.grad(output, x, ramp)


def theirs(pool, x):
    """PyTorch's, in float32 where it has no such average."""
    if pool.name == "avg_pool3d" and x.dtype in (torch.bfloat16, torch.float16):
        return tuple(t.to(x.dtype) for t in run(pool.theirs, x.float()))
    return run(pool.theirs, x)


def layouts(pool):
    yield torch.contiguous_format
    if LAST[pool.dims] is not None and len(pool.shape) == pool.dims + 2:
        yield LAST[pool.dims]


@EVERY
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients(isa, pool, dtype):
    for layout in layouts(pool):
        x = torch.randn(pool.shape).to(dtype).contiguous(memory_format=layout)
        ours, expected, reference = run(pool.ours, x), theirs(pool, x), run(pool.theirs, x.double())
        if pool.is_max:
            exact(ours[0], expected[0])
        terms = max(1, x.numel() // max(1, ours[0].numel()))
        close(ours[0], reference[0], expected[0], "output", terms)
        close(ours[1], reference[1], expected[1], "gradient", terms)
        with torch.no_grad():
            exact(pool.ours(x), ours[0])
        if ours[0].numel() and 1 not in ours[0].shape:
            assert ours[0].is_contiguous(memory_format=layout)
            assert ours[1].is_contiguous(memory_format=layout)


@MAXIMA
def test_indices_are_pytorchs(isa, pool):
    for layout in layouts(pool):
        for dtype in (torch.float32, torch.bfloat16):
            values = torch.tensor([0.0, -0.0, 1.0, 2.0, 2.0, -math.inf, math.inf, math.nan])
            many = values[torch.randint(0, 8, pool.shape)]
            for x in (many, many.nan_to_num(3.0), torch.full(pool.shape, -math.inf), torch.randn(pool.shape)):
                x = x.to(dtype).contiguous(memory_format=layout)
                output, indices = pool.ours(x, return_indices=True)
                # Contiguous: with channels_last_3d PyTorch forgets the depth of windows that are all -inf.
                expected, wanted = pool.theirs(x.contiguous(), return_indices=True)
                exact(output, expected)
                assert indices.dtype == torch.int64
                assert torch.equal(indices, wanted)
                assert output.stride() == indices.stride()
                # With compact indices the gradient goes to the same elements.
                compact, plane = (run(f, x)[1] for f in (pool.ours, lambda t: pool.ours(t, return_indices=True)[0]))
                exact(compact, plane)
                exact(run(pool.ours, x)[0], expected)


@SOME
def test_bits_for_1_and_2_threads(isa, pool):
    shape = (4, 40, *(n * 3 for n in pool.shape[-pool.dims :]))
    for layout in layouts(Pool(pool.name, shape, pool.args, pool.kwargs)):
        x = torch.randn(shape).contiguous(memory_format=layout)
        results = []
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            results.append((*run(pool.ours, x), pool.ours(x)))
        for other in results[1:]:
            for one, two in zip(results[0], other, strict=True):
                assert torch.equal(one, two)


@SOME
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(pool, layout):
    x = LAYOUTS[layout](pool.shape, torch.float32)
    for one, two in zip(run(pool.ours, x), run(pool.theirs, x), strict=True):
        torch.testing.assert_close(one, two)
    y = pool.ours(x)
    g = LAYOUTS[layout](tuple(y.shape), torch.float32)
    x = x.detach().requires_grad_()
    torch.testing.assert_close(
        torch.autograd.grad(pool.ours(x), x, g), torch.autograd.grad(pool.theirs(x), x, g), atol=1e-6, rtol=1e-5
    )


def test_sequences_with_channels_last():
    """(batch, length, channels) transposed is read where it lies."""
    x = torch.randn(2, 20, 33).transpose(1, 2)
    for function, theirs in ((FF.max_pool1d, F.max_pool1d), (FF.avg_pool1d, F.avg_pool1d)):
        y = function(x, 3, 2, 1)
        torch.testing.assert_close(y, theirs(x, 3, 2, 1))
        assert y.stride() == (330, 1, 33)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_random_geometries(data):
    dims = data.draw(st.integers(1, 3))

    def each(low, high):
        return data.draw(st.tuples(*[st.integers(low, high)] * dims))

    spatial, kernel, stride, dilation = each(1, 40 if dims < 3 else 9), each(1, 5), each(1, 4), each(1, 3)
    padding = tuple(data.draw(st.integers(0, k // 2)) for k in kernel)
    # PyTorch writes out of bounds where padding and dilation leave a window without elements.
    dilation = tuple(
        d if p == 0 or n > d * k else 1 for d, p, n, k in zip(dilation, padding, spatial, kernel, strict=True)
    )
    ceil_mode, last = data.draw(st.booleans()), data.draw(st.booleans())
    x = torch.randn(data.draw(st.integers(1, 3)), data.draw(st.integers(1, 20)), *spatial)
    if last and dims > 1:
        x = x.contiguous(memory_format=LAST[dims])
    cases = [
        Pool(f"max_pool{dims}d", x.shape, (kernel, stride, padding, dilation, ceil_mode), {}),
        Pool(f"avg_pool{dims}d", x.shape, (kernel, stride, padding, ceil_mode, data.draw(st.booleans())), {}),
        Pool(f"adaptive_max_pool{dims}d", x.shape, (each(1, 9),), {}),
        Pool(f"adaptive_avg_pool{dims}d", x.shape, (each(1, 9),), {}),
    ]
    for pool in cases:
        try:
            expected = run(pool.theirs, x)
        except RuntimeError:
            with pytest.raises(RuntimeError):
                pool.ours(x)
            continue
        for one, two in zip(run(pool.ours, x), expected, strict=True):
            torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-5)


@SOME
def test_gradcheck(pool):
    dims = pool.dims
    wide = pool.args[0] == 5 or pool.args[3:4] == (3,)  # more than 4 elements in a window, or between its ends
    sizes = [min(n, {1: 19, 2: 6, 3: 5 if wide else 4}[dims]) for n in pool.shape[-dims:]]
    x = torch.randn(*[1] * (len(pool.shape) - dims - 1), 2, *sizes, dtype=torch.float64)
    if run(pool.ours, x)[0].numel() > 1000:
        pytest.skip("a Jacobian of many gigabytes")
    last = x.movedim(-dims - 1, -1).contiguous().movedim(-1, -dims - 1)
    for memory in (x.requires_grad_(), last.detach().requires_grad_()):
        assert gradcheck(pool.ours, memory, check_batched_grad=True, check_forward_ad=True)
    assert gradgradcheck(pool.ours, x, check_batched_grad=True)


@SOME
def test_func(pool):
    def pair(function):
        return lambda x: function(x).square().sum()

    def same(transform):
        torch.testing.assert_close(transform(pair(pool.ours)), transform(pair(pool.theirs)))

    shape = (2, *pool.shape[-pool.dims :]) if len(pool.shape) == pool.dims + 1 else (1, 2, *pool.shape[-pool.dims :])
    x = torch.randn(shape, dtype=torch.float64)
    xs = torch.randn(3, *shape, dtype=torch.float64)
    same(lambda f: grad(f)(x))
    same(lambda f: jvp(f, (x,), (x,)))
    same(lambda f: vmap(f)(xs))
    same(lambda f: vmap(grad(f))(xs))
    same(lambda f: vmap(f, -1)(xs.movedim(0, -1)))
    same(lambda f: vmap(vmap(grad(f)))(torch.stack([xs, -xs])))
    same(lambda f: jvp(grad(f), (x,), (x,)))
    if x.numel() < 250:
        same(lambda f: hessian(f)(x))
        same(lambda f: jacrev(jacrev(f))(x))
        same(lambda f: jacfwd(jacfwd(f))(x))
    if pool.is_max:
        for one, two in zip(
            vmap(lambda t: pool.ours(t, return_indices=True))(xs),
            vmap(lambda t: pool.theirs(t, return_indices=True))(xs),
            strict=True,
        ):
            torch.testing.assert_close(one, two)


@pytest.mark.parametrize("pool", FEW[::3], ids=str)  # every function; a graph takes a quarter of a second
def test_compile(pool):
    torch._dynamo.reset()
    x = torch.randn(pool.shape)
    if pool.dims > 1 and len(pool.shape) == pool.dims + 2 and FEW.index(pool) % 2:
        x = x.contiguous(memory_format=LAST[pool.dims])
    compiled = torch.compile(pool.ours, fullgraph=True, backend="aot_eager")
    for one, two in zip(run(compiled, x), run(pool.ours, x), strict=True):
        if pool.is_max:
            exact(one, two)
            assert one.stride() == two.stride()
        torch.testing.assert_close(one, two)  # some averages are PyTorch's there
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), pool.ours(x))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.MaxPool2d(2, ceil_mode=True), nn.AvgPool2d(3, 1, 1), nn.AdaptiveMaxPool2d((6, 5)))
        self.line = nn.Sequential(nn.MaxPool1d(3, 1), nn.AvgPool1d(2), nn.AdaptiveAvgPool1d(9), nn.AdaptiveMaxPool1d(8))
        self.cube = nn.Sequential(nn.MaxPool3d(2, 1), nn.AvgPool3d(1), nn.AdaptiveMaxPool3d(2), nn.AdaptiveAvgPool3d(1))
        self.last, self.scale = nn.AdaptiveAvgPool2d(1), nn.Linear(1, 2)

    def forward(self, x):
        x = self.first(x)
        y = self.line(x.flatten(2))
        z = self.cube(x.unflatten(1, (1, -1)))
        return self.scale((self.last(x).flatten(1).sum(1) + y.sum((1, 2)) + z.flatten(1).sum(1))[:, None])


def test_replace_is_a_swap_of_classes():
    plain = Net()
    ours = copy.deepcopy(plain)
    report = fastops.replace_(ours)
    assert len(report.replaced) == 13
    assert report.skipped == []
    assert [vars(a).keys() for a in ours.modules()] == [vars(b).keys() for b in plain.modules()]
    assert repr(ours) == repr(plain)
    x = torch.randn(2, 3, 13, 12)
    with fastops.record() as rows:
        y = ours(x)
    assert "aten" not in [row.kernel for row in rows]
    torch.testing.assert_close(y, plain(x))
    torch.testing.assert_close(torch.jit.script(ours)(x), plain(x))
    fastops.restore_(ours)
    assert [type(m) for m in ours.modules()] == [type(m) for m in plain.modules()]


def without_averages(net):
    for parent in list(net.modules()):
        for name, layer in list(parent.named_children()):
            if "Avg" in type(layer).__name__:
                setattr(parent, name, nn.Identity())
    return net


@pytest.mark.parametrize(("backend", "dynamic"), [("aot_eager", False), ("inductor", True)])
def test_compile_a_model(backend, dynamic):
    torch._dynamo.reset()
    ours, plain = Net(), Net()
    if backend == "inductor":  # averages with a gradient are PyTorch's there, and it compiles theirs for a minute
        ours, plain = without_averages(ours), without_averages(plain)
    plain.load_state_dict(ours.state_dict())
    fastops.replace_(ours)
    compiled = torch.compile(ours, fullgraph=True, backend=backend, dynamic=dynamic)
    for shape in ((2, 3, 13, 12), (3, 3, 16, 18)) if dynamic else ((2, 3, 13, 12),):
        x = torch.randn(shape)
        for one, two in zip(run(compiled, x), run(plain, x), strict=True):
            torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("strict", [True, False])
def test_export(strict):
    ours = Net()
    fastops.replace_(ours)
    x = torch.randn(2, 3, 13, 12)
    with fastops.export_kernels():
        program = torch.export.export(ours, (x,), strict=strict)
    assert "fastops.max_pool_forward.default" in {str(node.target) for node in program.graph.nodes}
    torch.testing.assert_close(program.module()(x), ours(x))


@each("layout", ["first", "last"])
@pytest.mark.parametrize(
    ("shape", "windows"),
    [
        ((2, 3, 9, 11), (2, 2, 0)),
        ((2, 20, 9, 11), (3, 2, 1)),
        ((2, 3, 5, 6, 7), (2, 2, 0)),
        ((1, 3, 30, 40), None),  # one large window a plane
        ((2, 20, 17, 33), None),
        ((1, 3, 8, 9, 10), None),
    ],
)
def test_damaged_indices(isa, shape, windows, layout):
    """An index that is not one of the plane gets nothing, by our op and by ATen's on our kernels. cpp/test_pool.cpp
    has memory that must not be touched around the gradient."""
    dims = len(shape) - 2
    x = torch.randn(shape)
    x = x if layout == "first" else x.contiguous(memory_format=LAST[dims])
    name = f"max_pool{dims}d" if windows else f"adaptive_max_pool{dims}d"
    arguments = windows or (1,)
    y, indices = getattr(F, name)(x, *arguments, return_indices=True)
    grad_y, plane = torch.randn_like(y), math.prod(shape[2:])
    damage = torch.tensor([0, -1, 0, plane, -plane, 2**40, -(2**62), plane + 5, 2**62])
    damage = damage[torch.arange(indices.numel()) % 9].view_as(indices)
    bad = torch.where(damage == 0, indices, damage)
    kept = torch.where(damage == 0, grad_y, 0).flatten(2)
    expected = torch.zeros(*shape[:2], plane).scatter_add_(2, indices.flatten(2), kept).view(shape)
    fixed = [[size] * dims for size in (*arguments, 1)] if windows else [[]] * 4
    ours = torch.ops.fastops.max_pool_backward(grad_y, bad, shape, *fixed, False, dims, layout == "last")
    exact(ours, expected)
    if dims == 3 and not windows and layout == "last":
        return  # which ATen's operator is left to do, with what it makes of such indices
    aten = torch.ops.aten
    with fastops.enabled(), fastops.record() as calls:
        if windows:
            op = getattr(aten, f"{name}_with_indices_backward")
            other = op(grad_y, x, *fixed, False, bad)
        else:
            other = getattr(aten, f"{name}_backward")(grad_y, x, bad)
    assert [call.op for call in calls] == [f"{name}_backward"]
    assert calls[0].kernel != "aten"
    exact(other, expected)


def test_compiled_double_backward_and_autograd():
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    torch._dynamo.reset()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        (FF.max_pool2d(x, 2) + FF.avg_pool2d(x, 2)).square().sum().backward()
    actual, x.grad = x.grad, None
    (F.max_pool2d(x, 2) + F.avg_pool2d(x, 2)).square().sum().backward()
    torch.testing.assert_close(actual, x.grad)


@SOME
def test_fake_tensors_have_the_strides_of_real_ones(pool):
    from torch._subclasses.fake_tensor import FakeTensorMode

    for layout in layouts(pool):

        def both(layout=layout):
            return run(pool.ours, torch.randn(pool.shape).contiguous(memory_format=layout))

        with FakeTensorMode():
            fake = both()
        for one, two in zip(fake, both(), strict=True):
            assert one.shape == two.shape
            assert one.stride() == two.stride()


def test_what_is_saved():
    """A byte an output and not the input; nothing for an average; nothing without gradients."""
    for function, bytes_of in (
        (lambda x: FF.max_pool2d(x, 2), {torch.uint8: 2 * 3 * 16}),
        (lambda x: FF.max_pool2d(x, 2, return_indices=True)[0], {torch.int64: 2 * 3 * 16}),
        (lambda x: FF.max_pool2d(x, 17, 1, 8), {torch.int64: 2 * 3 * 64}),
        (lambda x: FF.adaptive_max_pool2d(x, 3), {torch.uint8: 2 * 3 * 9}),
        (lambda x: FF.avg_pool2d(x, 2), {}),
    ):
        saved = {}
        x = torch.randn(2, 3, 8, 8, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, s=saved: s.update({t.dtype: t.numel()}) or t, lambda t: t
        ):
            y = function(x)
        assert saved == bytes_of
        y.sum().backward()


def test_autocast():
    """As in PyTorch: what is three-dimensional computes in float32, all else in what comes."""
    pools = [pool for pool in FEW if pool.name != "avg_pool3d"]  # of which PyTorch has none in 16 bits
    inputs = [torch.randn(pool.shape, dtype=torch.bfloat16) for pool in pools]

    def ours(inputs):
        return [pool.ours(x) for pool, x in zip(pools, inputs, strict=True)]

    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for enabled, function in ((True, ours), (False, ours), (True, compiled)):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            expected = [pool.theirs(x) for pool, x in zip(pools, inputs, strict=True)]
            for pool, one, two in zip(pools, function(inputs), expected, strict=True):
                torch.testing.assert_close(one, two, atol=1e-2, rtol=1e-2, msg=lambda m, what=pool: f"{what}: {m}")


def test_what_has_no_kernel_goes_to_pytorch():
    x = torch.arange(64).view(1, 1, 8, 8)
    with fastops.record() as rows:
        assert torch.equal(FF.max_pool2d(x, 2), F.max_pool2d(x, 2))
    assert [(row.op, row.kernel) for row in rows] == [("max_pool2d", "aten")]
    with fastops.record() as rows:
        FF.adaptive_avg_pool1d(torch.randn(2, 3, 8, requires_grad=True), 2).sum().backward()
    assert [row.op for row in rows] == ["adaptive_avg_pool1d", "adaptive_avg_pool1d_backward"]
    assert "aten" not in [row.kernel for row in rows]


BAD = [
    ("max_pool2d", (2, 3, 8, 8), (9,), {}, "kernel_size 9"),
    ("max_pool2d", (2, 3, 8, 8), (3, 0), {}, "stride must be positive"),
    ("max_pool2d", (2, 3, 8, 8), (3, 1, 2), {}, "padding must be at most half"),
    ("max_pool2d", (2, 3, 8, 8), (3, 1, -1), {}, "padding must not be negative"),
    ("max_pool2d", (2, 3, 8, 8), (3, 1, 1, 0), {}, "dilation must be positive"),
    ("max_pool2d", (8, 8), (3,), {}, "input must have 3 or 4 dimensions"),
    ("max_pool2d", (2, 0, 8, 8), (3,), {}, "input must have channels"),
    ("avg_pool2d", (2, 3, 8, 8), ((2, 2, 2),), {}, "kernel_size must be a number or 2"),
    ("avg_pool2d", (2, 3, 8, 8), (2.0,), {}, "kernel_size must be a number or 2"),
    ("avg_pool2d", (2, 3, 8, 8), (2,), {"divisor_override": 0}, "divisor_override must be"),
    ("adaptive_avg_pool2d", (2, 3, 8, 8), (-1,), {}, "output_size"),
    ("adaptive_max_pool2d", (2, 3, 8, 8), ((1, 2, 3),), {}, "output_size"),
    ("adaptive_max_pool2d", (2, 3, 0, 8), (2,), {}, "spatial sizes must not be 0"),
    ("max_pool1d", (3,), (2,), {}, "input must have 2 or 3 dimensions"),
    ("avg_pool3d", (2, 3, 8, 8, 8), (2, 2, 2), {}, "padding must be at most half"),
]


@pytest.mark.parametrize(("name", "shape", "args", "kwargs", "message"), BAD)
def test_errors_name_the_argument(name, shape, args, kwargs, message):
    x = torch.randn(shape)
    with pytest.raises((RuntimeError, TypeError, ValueError)) as expected:
        getattr(F, name)(x, *args, **kwargs)
    with pytest.raises(type(expected.value), match=message):
        getattr(FF, name)(x, *args, **kwargs)


def test_not_a_tensor():
    with pytest.raises(TypeError, match="input must be a Tensor"):
        FF.max_pool2d([1.0], 2)


@pytest.mark.parametrize("name", [name for name in fnn.LAYERS if "Pool" in name])
def test_modules(name):
    dims = int(name[-2])
    arguments = {"Adaptive": ((3,), {}), "Max": ((2, 1), {"padding": 1}), "Avg": ((2, 1), {"padding": 1})}
    args, kwargs = next(value for key, value in arguments.items() if name.startswith(key))
    ours, plain = getattr(fnn, name)(*args, **kwargs), getattr(nn, name)(*args, **kwargs)
    x = torch.randn(2, 3, *[7] * dims)
    assert repr(ours) == repr(plain)
    for one, two in zip(run(ours, x), run(plain, x), strict=True):
        torch.testing.assert_close(one, two)
    if "Max" in name:
        ours, plain = (getattr(module, name)(*args, **kwargs, return_indices=True) for module in (fnn, nn))
        for one, two in zip(ours(x), plain(x), strict=True):
            torch.testing.assert_close(one, two)


# ---- geometry at its limits


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("kind", ["max", "avg"])
def test_windows_that_cover_an_axis_and_its_padding(isa, kind, dims):
    """Sizes of one, kernels that span an axis, padding on some axes alone: every mix of small ones."""
    theirs, ours = (getattr(module, f"{kind}_pool{dims}d") for module in (F, FF))
    rng = random.Random(dims)
    for _ in range(150):
        size = [rng.choice((1, 1, 2, 3)) for _ in range(dims)]
        kernel = [rng.choice((1, 2, 3, n)) for n in size]
        padding = [rng.randint(0, k // 2) for k in kernel]
        stride = [rng.choice((1, k)) for k in kernel]
        x = torch.randn(2, 3, *size)
        if rng.random() < 0.5 and dims == 2:
            x = x.contiguous(memory_format=torch.channels_last)
        arguments = tuple(kernel), tuple(stride), tuple(padding)
        try:
            expected = _with_gradient(theirs, x, arguments)
        except RuntimeError:
            continue
        for one, two in zip(_with_gradient(ours, x, arguments), expected, strict=True):
            torch.testing.assert_close(one, two, msg=lambda m, what=(size, *arguments): f"{what}: {m}")


def _with_gradient(function, x, arguments):
    leaf = x.clone().requires_grad_()
    y = function(leaf, *arguments)
    return y.detach(), *torch.autograd.grad(y, leaf, torch.linspace(-1, 1, y.numel()).view(y.shape))


@pytest.mark.parametrize("kind", ["max", "avg"])
@pytest.mark.parametrize("output", [(0, 2), (2, 0), (0, 0)])
def test_a_pool_without_outputs_has_no_gradient(kind, output):
    for module in (F, FF):
        x = torch.ones(1, 2, 4, 4, requires_grad=True)
        y = getattr(module, f"adaptive_{kind}_pool2d")(x, output)
        assert y.shape == (1, 2, *output)
        with pytest.raises(RuntimeError, match="backward"):
            y.sum().backward()


@pytest.mark.parametrize("name", ["max_pool2d", "avg_pool2d", "max_pool1d", "avg_pool3d"])
def test_ceil_mode_with_a_window_larger_than_the_input(name):
    """Through every door."""
    dims = int(name[-2])
    x = torch.arange(2.0**dims).view(1, 1, *(2,) * dims)
    arguments = {"kernel_size": 3, "stride": 2, "ceil_mode": True}
    theirs, ours = (functools.partial(getattr(module, name), **arguments) for module in (F, FF))
    try:
        expected = theirs(x)
    except RuntimeError:  # avg_pool3d takes no larger window
        with pytest.raises(RuntimeError):
            ours(x)
        return
    torch.testing.assert_close(ours(x), expected)
    torch.testing.assert_close(torch.func.vmap(ours)(x[None]), expected[None])
    torch.testing.assert_close(torch.compile(ours, backend="aot_eager")(x), expected)
    gradient = torch.func.grad(lambda z: ours(z).sum())(x)
    torch.testing.assert_close(gradient, torch.func.grad(lambda z: theirs(z).sum())(x))


@pytest.mark.parametrize("name", ["max_pool1d", "max_pool2d", "adaptive_max_pool2d"])
def test_a_gradient_of_nothing_can_be_differentiated(name):
    x = torch.randn(0, 2, *(4,) * int(name[-2]), requires_grad=True)
    y = getattr(FF, name)(x, 2)
    (gradient,) = torch.autograd.grad(y, x, torch.ones_like(y).requires_grad_(), create_graph=True)
    assert gradient.requires_grad
    gradient.sum().backward()


LARGE = [2**31, 2**40, 2**62, 2**63 - 1]


@pytest.mark.parametrize("argument", ["kernel_size", "stride", "padding", "dilation"])
@pytest.mark.parametrize("value", LARGE)
def test_numbers_beyond_32_bits(argument, value):
    """What PyTorch refuses is refused; nothing overflows."""
    x = torch.ones(1, 1, 4, 4)
    arguments = {"kernel_size": 3, argument: value}
    if argument == "kernel_size":
        arguments["padding"] = value // 2
    for module in (F, FF):
        with pytest.raises(RuntimeError):
            module.max_pool2d(x, **arguments)


@pytest.mark.parametrize("output", [(2,), [2], [None], -(2**63), 2**64, (2, 2, 2), -1, (-1, 2)], ids=str)
@pytest.mark.parametrize("name", ["adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_max_pool2d"])
def test_output_sizes_that_are_refused(name, output):
    x = torch.ones(1, 2, *(4,) * int(name[-2]))
    outcomes = []
    for module in (F, FF):
        try:
            outcomes.append(tuple(getattr(module, name)(x, output).shape))
        except (RuntimeError, TypeError, ValueError, IndexError, OverflowError) as error:
            outcomes.append(type(error))
    assert outcomes[0] == outcomes[1]


# ---- for the tests that call every op (every_op.py) -----------------------------------------------------------------

OP_LAYERS = [("MaxPool2d", (2,)), ("AvgPool2d", (2,))]
LAYERS = [(f"{kind}{dims}d", args) for dims in (1, 2, 3) for kind, args in (
    ("MaxPool", (2,)), ("AvgPool", (3, 2, 1)), ("AdaptiveMaxPool", (2,)), ("AdaptiveAvgPool", (2,)),
)]  # fmt: skip
LAYERS.append(("MaxPool2d", (3, 2, 1, 1, False, True)))


def calls(size):
    for name in fastops.functional._pool.__all__:
        image = (2, 16, *(size,) * spatial(name))
        if name.startswith("adaptive"):
            for output_size in (1, 3, 4):
                yield call(name, image, output_size=output_size)
        else:
            yield call(name, image, kernel_size=2)
            yield call(name, image, kernel_size=3, stride=1)
            yield call(name, image, kernel_size=5, stride=2, padding=2)


def kernels(dtype, on_gpu):
    if on_gpu:
        return {"pool_gather": 0}
    return dict.fromkeys(("pool_across", "pool_halves", "pool_last", "pool_scatter", "pool_spread", "pool_within"), 0)


def random_pool(rng):
    dims = rng.randint(1, 3)
    kind = rng.choice(("max_pool", "avg_pool", "adaptive_max_pool", "adaptive_avg_pool")) + f"{dims}d"
    args = (rng.randint(1, 4),) if kind.startswith("adaptive") else rng.choice(((2,), (3, 2, 1), (2, 1, 1), (3, 1)))
    shape = (rng.randint(1, 3), rng.choice((1, 2, 16, 17)), *sizes(rng, dims, 4, 7))
    shape = shape if rng.random() < 0.8 else shape[1:]
    return Call(kind, lambda x: getattr(FF, kind)(x, *args), lambda x: getattr(F, kind)(x, *args), [shape])


RANDOM_CALLS = [random_pool]
