"""batch_norm against a float64 reference: values, gradients and statistics, every dtype, tier, layout and edge."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from calls import Call, sizes
from compare import close, exact
from modes import Through
from reference import ACTIVATIONS, DTYPES, LAYOUTS, activation, gradients
from tiers import tiers
from torch import nn
from torch.library import opcheck

import fastops
import fastops.functional as FF
import fastops.nn as fnn
from fastops._activations import PIECEWISE_LINEAR

OPS = torch.ops.fastops
FUSED = [case for case in ACTIVATIONS if case.kind != "threshold"]
LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
# Vectors have up to 16 elements, four at a time; rows go by fours; blocks have 2048 elements or 64 rows, parts 32768.
SHAPES = [
    (2, 1), (5, 3), (7, 15), (4, 16), (9, 17), (130, 33), (300, 65), (2, 300),
    (2, 3, 2), (3, 5, 7), (2, 16, 15), (2, 2, 63), (1, 3, 65), (3, 2, 2049),
    (2, 3, 4, 4), (2, 17, 5, 3), (1, 2, 33, 31), (4, 64, 1, 1), (2, 5, 3, 4, 2),
]  # fmt: skip
PARTS = [(1, 1, 300, 301), (3, 2, 150, 150), (700, 130), (1, 5, 181, 183)]


def operands(shape, dtype, mean=0.3, mixed=False):
    c, kind = shape[1], torch.float32 if mixed else dtype
    x = (torch.randn(shape) * (1 + torch.rand(c).view(-1, *[1] * (len(shape) - 2))) + mean).to(dtype)
    return x, (torch.rand(c) + 0.5).to(kind), torch.randn(c).to(kind)


def last(x):
    return x.contiguous(memory_format=LAST[x.dim()]) if x.dim() in LAST else x


def modules(case):
    names = {"gelu_tanh": "gelu"}
    found = {name.lower(): getattr(nn, name) for name in fnn.LAYERS}
    return found[names.get(case.kind, case.kind).replace("_", "")](**case.kwargs)


def compare_all(x, w, b, training=True, case=None, residual=None, what="", roundings=1.0, place=lambda t: t):
    """Values, statistics and gradients of a call, against PyTorch's and the float64 reference. place: onto a device."""
    c = x.shape[1]
    grad = torch.randn(x.shape)
    kind = w.dtype if w is not None else x.dtype
    running = torch.randn(c).to(kind), (torch.rand(c) + 0.5).to(kind)
    f = None if case is None else modules(case)

    def run(tensors, stats, which):
        put = place if which == "ours" else lambda t: t
        leaves = [None if t is None else put(t.detach().clone(memory_format=torch.preserve_format)) for t in tensors]
        stats = [put(t) for t in stats]
        for t in leaves:
            if t is not None:
                t.requires_grad_()
        if which == "ours":
            y = FF.batch_norm(leaves[0], *stats, *leaves[1:3], training, activation=f, residual=leaves[3])
        else:
            y = F.batch_norm(leaves[0], *stats, *leaves[1:3], training)
            y = y if leaves[3] is None else y + leaves[3]
            if case is not None:
                y = activation(case, y) if which == "reference" else case.theirs(y)
        g = grad.to(y.dtype)
        found = gradients(y, put(last(g) if x.is_contiguous() is False else g), *[t for t in leaves if t is not None])
        return y.cpu(), [t.cpu() for t in stats], [t.cpu() for t in found]

    tensors = [x, w, b, residual]
    wide = [None if t is None else t.double() for t in tensors]
    actual = run(tensors, [t.clone() for t in running], "ours")
    theirs = run(tensors, [t.clone() for t in running], "theirs")
    reference = run(wide, [t.double() for t in running], "reference")
    if case is None:  # PyTorch's logsigmoid gives another layout
        assert actual[0].stride() == theirs[0].stride()
    n = x.numel() // c
    # The terms of gradients cancel, most of all where few values make a batch.
    dims, terms = [i for i in range(x.dim()) if i != 1], x.double().abs() * grad.abs().double()
    var, mean = torch.var_mean(x.double(), dims, correction=0)
    if not training:
        mean, var = (t.double() for t in running)
    rstd = (var + 1e-5).rsqrt()
    scale = rstd * (1 if w is None else w.double())
    least = {
        "input": scale.max() * grad.abs().max(),
        "weight": (rstd * terms.sum(dims)).max(),
        "bias": grad.abs().double().sum(dims).max(),
        "residual": 0.0,
    }
    close(actual[0], reference[0], theirs[0], f"output {what}", n, roundings, float((scale * mean).abs().max()))
    for name, *three in zip(("running_mean", "running_var"), actual[1], reference[1], theirs[1], strict=True):
        close(*three, f"{name} {what}", n)
    names = [name for name, t in zip(("input", "weight", "bias", "residual"), tensors, strict=True) if t is not None]
    for name, *three in zip(names, actual[2], reference[2], theirs[2], strict=True):
        assert three[0].stride() == actual[2][0].stride() or three[0].dim() == 1
        close(*three, f"gradient of {name} {what}", n, roundings, float(least[name]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape, dtype):
    for tier in tiers(dtype):
        for training in (True, False):
            x, w, b = operands(shape, dtype)
            compare_all(x, w, b, training, what=f"{tier} {training}")
            compare_all(last(x), None, None, training, what=f"{tier} {training} plain")


@pytest.mark.parametrize("shape", PARTS, ids=str)
def test_channels_in_parts(shape):
    for tier in tiers(torch.float32):
        x, w, b = operands(shape, torch.float32)
        compare_all(x, w, b, what=tier)
        compare_all(last(x), w, b, False, FUSED[0], what=tier)
        compare_all(last(x), w, b, True, next(c for c in FUSED if c.kind == "silu"), torch.randn(shape), what=tier)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_parameters_of_16_bits(dtype):
    for tier in tiers(dtype):
        for x in (operands((3, 17, 5, 7), dtype)[0], last(operands((3, 17, 5, 7), dtype)[0])):
            _, w, b = operands((3, 17, 5, 7), dtype, mixed=True)
            for training in (True, False):
                compare_all(x, w, b, training, FUSED[0], what=tier)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", FUSED, ids=str)
def test_every_activation(case, dtype):
    if dtype == torch.bfloat16 and case.kind in PIECEWISE_LINEAR - {"relu"}:
        return  # what rounds onto a bound has another derivative, in PyTorch too
    for tier in tiers(dtype):
        for x in (operands((3, 5, 4, 9), dtype)[0], last(operands((3, 5, 4, 9), dtype)[0])):
            _, w, b = operands((3, 5, 4, 9), dtype)
            for residual in (None, torch.randn_like(x)):
                for training in (True, False):
                    compare_all(x, w, b, training, case, residual, f"{tier} {residual is not None} {training}", 2.0)


def test_residual_without_activation():
    x, w, b = operands((2, 3, 5, 4), torch.float32)
    compare_all(x, w, b, residual=torch.randn_like(x))
    compare_all(last(x), w, b, residual=torch.randn_like(x))


@pytest.mark.parametrize("mean", [1e2, 1e4, -1e6])
@pytest.mark.parametrize("shape", [(64, 5), (3, 5, 700), (40, 3, 2, 2), (1500, 7)], ids=str)
def test_statistics_with_a_large_mean(isa, shape, mean):
    """As exact as PyTorch's sums in float64: what is left is the rounding of the mean."""
    x = torch.randn(shape) + mean
    dims = [i for i in range(len(shape)) if i != 1]
    running = torch.zeros(shape[1]), torch.zeros(shape[1])
    FF.batch_norm(x, *running, training=True, momentum=1.0)
    var, mu = torch.var_mean(x.double(), dims)
    torch.testing.assert_close(running[0].double(), mu, rtol=6e-8, atol=1e-7)
    torch.testing.assert_close(running[1].double(), var, rtol=6e-7, atol=0)


def test_statistics_of_outliers(isa):
    """The first elements say nothing about the others."""
    for shape, index in (((2, 3, 5000), (0, slice(None), slice(0, 3))), ((4000, 3), (0,))):
        x = torch.randn(shape)
        x[index] = 1e6
        running = torch.zeros(3), torch.zeros(3)
        FF.batch_norm(x, *running, training=True, momentum=1.0)
        var, mean = torch.var_mean(x.double(), [i for i in range(x.dim()) if i != 1])
        torch.testing.assert_close(running[0].double(), mean, rtol=1e-6, atol=0)
        torch.testing.assert_close(running[1].double(), var, rtol=5e-6, atol=0)


def test_squares_that_overflow(isa):
    for shape in ((2, 3, 50), (40, 3)):
        x = torch.randn(shape) * 1e25
        reference = F.batch_norm(x.double(), None, None, training=True)
        torch.testing.assert_close(
            FF.batch_norm(x, None, None, training=True).double(), reference, rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("training", [True, False])
def test_nan_and_infinity(isa, training):
    for make in (lambda x: x, last):
        x = torch.randn(3, 4, 5, 6)
        x[0, 0, 0, 0], x[1, 1, 2, 3], x[2, 2, 4, 5] = float("nan"), float("inf"), float("-inf")
        ours, theirs = (make(x).clone(memory_format=torch.preserve_format).requires_grad_() for _ in range(2))
        stats = [torch.zeros(4), torch.ones(4)], [torch.zeros(4), torch.ones(4)]
        y = FF.batch_norm(ours, *stats[0], training=training)
        e = F.batch_norm(theirs, *stats[1], training=training)
        g = torch.randn_like(x)
        for a, b in ((y, e), *zip(*stats, strict=True), (*gradients(y, g, ours), *gradients(e, g, theirs))):
            torch.testing.assert_close(a, b, equal_nan=True, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("which", ["input", "residual", "grad"])
def test_layouts(layout, which):
    shape = (3, 4, 5, 6)
    x, w, b = operands(shape, torch.float32)
    residual, grad = torch.randn(shape), torch.randn(shape)
    made = LAYOUTS[layout](shape, torch.float32)
    x, residual, grad = (
        made if name == which else t for name, t in (("input", x), ("residual", residual), ("grad", grad))
    )
    results = []
    for function in (
        functools.partial(FF.batch_norm, activation="relu", residual=residual),
        lambda *args, **kw: torch.relu(F.batch_norm(*args, **kw) + residual),
    ):
        leaves = [t.detach().requires_grad_() for t in (x, w, b)]
        y = function(leaves[0], None, None, *leaves[1:], training=True)
        results.append((y, *torch.autograd.grad(y, leaves, grad)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)
        assert ours.stride() == theirs.stride()


def test_strided_parameters():
    x = torch.randn(3, 4, 5)
    w, b = torch.randn(8)[::2], torch.randn(1).expand(4)
    mean, var = torch.zeros(8)[::2], torch.ones(12)[::3]
    theirs = mean.clone(), var.clone()
    torch.testing.assert_close(FF.batch_norm(x, mean, var, w, b, True), F.batch_norm(x, *theirs, w, b, True))
    for one, two in zip((mean, var), theirs, strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("shape", [(0, 4), (0, 4, 5, 6), (2, 4, 0, 6), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_empty(shape, training):
    outcomes = []
    for module in (FF, F):
        x = torch.randn(shape, requires_grad=True)
        stats = torch.zeros(shape[1]), torch.ones(shape[1])
        try:
            y = module.batch_norm(x, *stats, training=training)
            y.sum().backward()
            outcomes.append((y.shape, x.grad.shape, *(s.tolist() for s in stats)))
        except RuntimeError as error:
            outcomes.append(type(error))
    assert str(outcomes[0]) == str(outcomes[1])


def test_threads_give_the_same_bits():
    cases = [(8, 64, 28, 28), (3, 2, 150, 150), (700, 130), (64, 512, 4, 4)]
    results = []
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        results.append([])
        for shape in cases:
            for make in (lambda x: x, last):
                for kind in (None, "relu", "silu"):
                    torch.manual_seed(0)
                    x, w, b = (t.requires_grad_() for t in operands(shape, torch.float32))
                    x = make(x.detach()).requires_grad_()
                    running = torch.zeros(shape[1]), torch.ones(shape[1])
                    y = FF.batch_norm(x, *running, w, b, True, activation=kind)
                    results[-1] += [y, *running, *torch.autograd.grad(y, (x, w, b), torch.randn(shape))]
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            exact(one, two)


BAD = [
    (dict(x=(2, 4, 3), running=3), "running_mean must have shape"),
    (dict(x=(1, 4, 1)), "more than one value"),
    (dict(x=(4,)), "input must have shape"),
    (dict(running=None, training=False), "running_mean and running_var must be given"),
    (dict(weight=torch.ones(3)), "weight must have shape"),
    (dict(bias=torch.ones(5)), "bias must have shape"),
    (dict(weight=torch.ones(4).double()), "weight must have input's dtype"),
    (dict(eps=0.0), "eps must be positive"),
    (dict(eps="x"), "eps must be a number"),
    (dict(momentum=None), "momentum must be a number"),
    (dict(weight=[1.0]), "weight must be a Tensor"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[message for _, message in BAD])
def test_errors_name_the_argument(change, message):
    call = {"x": (2, 4, 3), "running": 4, "training": True, **change}
    x, n = torch.randn(call.pop("x")), call.pop("running")
    stats = (None, None) if n is None else (torch.zeros(n), torch.ones(n))
    with pytest.raises((RuntimeError, TypeError, ValueError)) as expected:
        F.batch_norm(x, *stats, **call)
    with pytest.raises(type(expected.value), match=message):
        FF.batch_norm(x, *stats, **call)


def test_what_has_no_kernel_goes_to_pytorch():
    x = torch.randn(2, 3, 4)
    with fastops.record() as rows:
        FF.batch_norm(x, None, None, training=True, activation="relu", residual=torch.ones(3, 1))
    assert {row.kernel for row in rows} == {"aten"}
    with fastops.record() as rows:
        FF.batch_norm(x.requires_grad_(), None, None, training=True, activation="relu").sum().backward()
    assert [row.op for row in rows] == ["batch_norm", "batch_norm_backward"]
    assert "aten" not in [row.kernel for row in rows]


def test_only_the_gradients_asked_for(isa):
    x, w, b = operands((3, 5, 7), torch.float32)
    more, grad = torch.randn_like(x), torch.randn_like(x)
    for kind in (None, "relu", "silu"):
        for training in (True, False):
            for wanted in ((1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (1, 0, 0, 1), (0, 1, 1, 0)):
                results = []
                for ours in (True, False):
                    leaves = [t.clone().requires_grad_(bool(on)) for t, on in zip((x, w, b, more), wanted, strict=True)]
                    stats = torch.zeros(5), torch.ones(5)
                    if ours:
                        y = FF.batch_norm(
                            leaves[0], *stats, *leaves[1:3], training, activation=kind, residual=leaves[3]
                        )
                    else:
                        y = F.batch_norm(leaves[0], *stats, *leaves[1:3], training) + leaves[3]
                        y = y if kind is None else getattr(F, kind)(y)
                    y.backward(grad)
                    results.append([t.grad for t in leaves])
                for one, two in zip(*results, strict=True):
                    assert (one is None) == (two is None)
                    if one is not None:
                        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


def test_memory_saved():
    """x is saved, and with an activation neither y nor what comes before it."""
    x, w, b = (t.requires_grad_() for t in operands((4, 8, 16, 16), torch.float32))
    for kind in (None, "relu", "silu"):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
            FF.batch_norm(x, None, None, w, b, True, activation=kind)
        assert [t.shape for t in saved if t.numel() > 16] == [x.shape]


# ---- doors and transforms


def _function(training, kind, running):
    def ours(x, w, b, r):
        stats = [t.clone() for t in running]
        return FF.batch_norm(x, *stats, w, b, training, activation=kind, residual=r)

    def theirs(x, w, b, r):
        stats = [t.clone() for t in running]
        y = F.batch_norm(x, *stats, w, b, training)
        y = y if r is None else y + r
        return y if kind is None else getattr(F, kind)(y)

    return ours, theirs


MODES = [(training, kind) for training in (True, False) for kind in (None, "relu", "silu", "tanh")]


@pytest.mark.parametrize(("training", "kind"), MODES)
def test_doors_agree(training, kind):
    shape = (3, 4, 2, 5)
    for residual in (None, torch.randn(shape)):
        results = []
        for general in (False, True):
            torch.manual_seed(1)
            x, w, b = (t.requires_grad_() for t in operands(shape, torch.float32))
            r = None if residual is None else residual.clone().requires_grad_()
            stats = torch.zeros(4), torch.ones(4)
            leaves = [t for t in (x, w, b, r) if t is not None]
            if general:
                with Through():
                    y = FF.batch_norm(x, *stats, w, b, training, activation=kind, residual=r)
                    grads = torch.autograd.grad(y.square().sum(), leaves)
            else:
                y = FF.batch_norm(x, *stats, w, b, training, activation=kind, residual=r)
                grads = torch.autograd.grad(y.square().sum(), leaves)
            results.append([y, *stats, *grads])
        for one, two in zip(*results, strict=True):
            exact(one, two)


@pytest.mark.parametrize(("training", "kind"), MODES)
@pytest.mark.parametrize("door", ["fast", "general"])
def test_second_derivatives(training, kind, door):
    running = torch.zeros(3).double(), torch.ones(3).double()
    ours, _ = _function(training, kind, running)
    args = [t.requires_grad_() for t in operands((4, 3, 2), torch.float64)]
    for residual in (None, torch.randn(4, 3, 2, dtype=torch.float64, requires_grad=True)):

        def run(*tensors):
            if door == "fast":
                return ours(*tensors)
            with Through():
                return ours(*tensors)

        inputs = [*args, residual]
        if residual is None:
            assert torch.autograd.gradgradcheck(lambda *t: run(*t, None), args)
        else:
            assert torch.autograd.gradgradcheck(run, inputs)


@pytest.mark.parametrize(("training", "kind"), MODES)
def test_transforms(training, kind):
    running = torch.zeros(3), torch.ones(3)
    ours, theirs = _function(training, kind, running)
    x, w, b = operands((4, 3, 5), torch.float32)
    r = torch.randn(4, 3, 5)

    def both(transform, *args):
        torch.testing.assert_close(transform(ours)(*args), transform(theirs)(*args), rtol=2e-4, atol=2e-4)

    def loss(f):
        return lambda *args: f(*args).square().sum()

    def plain(f):
        return lambda x, w: (F if f is theirs else FF).batch_norm(x, None, None, w, None, True)

    def tangent(f):
        return lambda x, w, b, r, t: torch.func.jvp(lambda *a: f(*a, r), (x, w, b), (t, w.cos(), b.sin()))[1]

    xs, ws = torch.randn(2, 4, 3, 5), torch.randn(2, 3)
    for residual in (None, r):
        both(lambda f: torch.func.grad(loss(f), argnums=(0, 1, 2)), x, w, b, residual)
        both(tangent, x, w, b, residual, r)
        both(lambda f: torch.func.jacfwd(torch.func.jacrev(loss(f), argnums=1), argnums=1), x, w, b, residual)
        if not training:
            both(lambda f: torch.vmap(f, (0, None, None, None)), xs, w, b, residual)
            both(
                lambda f: torch.vmap(torch.func.grad(loss(f), argnums=(0, 1)), (0, 0, None, None)), xs, ws, b, residual
            )
    both(lambda f: torch.vmap(plain(f), (0, None)), xs, w)
    both(lambda f: torch.vmap(torch.func.grad(lambda *a: plain(f)(*a).sin().sum(), argnums=(0, 1))), xs, ws)


@pytest.mark.parametrize("training", [True, False])
def test_grads_batched(training):
    x, w, b = (t.requires_grad_() for t in operands((4, 3, 5), torch.float32))
    grads = torch.randn(3, 4, 3, 5)
    stats = torch.zeros(3), torch.ones(3)
    y = FF.batch_norm(x, *stats, w, b, training, activation="relu")
    batched = torch.autograd.grad(y, (x, w, b), grads, is_grads_batched=True, retain_graph=True)
    for i in range(3):
        for one, two in zip(batched, torch.autograd.grad(y, (x, w, b), grads[i], retain_graph=True), strict=True):
            torch.testing.assert_close(one[i], two, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_opcheck(training):
    for kind, residual in (("identity", False), ("relu", True), ("silu", True), ("relu", False)):
        x, w, b = (t.requires_grad_() for t in operands((3, 4, 2, 2), torch.float32))
        r = torch.randn_like(x).requires_grad_() if residual else None
        stats = torch.zeros(4), torch.ones(4)
        opcheck(OPS.batch_norm_forward, (x, w, b, r, *stats, training, 0.1, 1e-5, kind, 0.0, 0.0, True))
        y, saved, *_ = OPS.batch_norm_forward(x, w, b, r, *stats, training, 0.1, 1e-5, kind, 0.0, 0.0, True)
        kept = None if kind == "identity" or not residual else y if kind == "relu" else r
        args = (x, w, b, kept, saved, training, 1e-5, kind, 0.0, 0.0, [True, True, True, residual])
        opcheck(
            OPS.batch_norm_backward,
            (torch.randn_like(x), *(t.detach() if isinstance(t, torch.Tensor) else t for t in args)),
        )


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = fnn.BatchNorm2d(4), fnn.BatchNorm2d(4, momentum=None, activation="relu")

    def forward(self, x):
        return self.two(self.one(x) + 1)


def test_compile(monkeypatch):
    monkeypatch.setattr(fastops.functional._general, "_COMPILED_FROM", 0)  # else small inputs are PyTorch's
    torch._dynamo.reset()
    ours, eager = Block(), Block()
    compiled = torch.compile(ours, fullgraph=False, backend="aot_eager")
    for _ in range(3):
        x = torch.randn(5, 4, 3, 3)
        a, e = compiled(x), eager(x)
        torch.testing.assert_close(a, e)
        a.square().sum().backward(), e.square().sum().backward()
    for one, two in zip(ours.state_dict().values(), eager.state_dict().values(), strict=True):
        torch.testing.assert_close(one, two)
    for one, two in zip(ours.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad)


@pytest.mark.parametrize("training", [True, False])
def test_export(training):
    model = nn.Sequential(fnn.BatchNorm2d(4), fnn.BatchNorm2d(4, activation="silu")).train(training)
    x = torch.randn(5, 4, 3, 3)
    for kernels in (False, True):
        source = copy.deepcopy(model)
        if kernels:
            with fastops.export_kernels():
                program = torch.export.export(source, (x,))
            assert "fastops." in program.graph_module.code
            plain = program.run_decompositions(fastops.decompositions())
            assert "fastops." not in plain.graph_module.code
            programs = program, plain
        else:
            programs = (torch.export.export(source, (x,)),)
            assert "fastops." not in programs[0].graph_module.code
        for one in programs:
            torch.testing.assert_close(one.module()(x), copy.deepcopy(model)(x))


def test_script():
    for layer in (
        fnn.BatchNorm2d(4),
        fnn.BatchNorm2d(4, momentum=None, activation="relu"),
        fnn.BatchNorm1d(4, affine=False),
    ):
        scripted = torch.jit.script(copy.deepcopy(layer))
        for _ in range(2):
            x = torch.randn(5, 4, 3, 3) if isinstance(layer, fnn.BatchNorm2d) else torch.randn(5, 4)
            torch.testing.assert_close(scripted(x), layer(x))
        torch.testing.assert_close(scripted.running_var, layer.running_var)


# ---- modules


@pytest.mark.parametrize(
    "kwargs", [{}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}, {"eps": 0.1}], ids=str
)
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_modules(dims, kwargs):
    """Steps of training and of eval, in turn: outputs, gradients, buffers and num_batches_tracked are PyTorch's."""
    name = f"BatchNorm{dims}d"
    ours, theirs = getattr(fnn, name)(4, **kwargs), getattr(nn, name)(4, **kwargs)
    assert repr(ours) == repr(theirs)
    for step in range(6):
        for layer in (ours, theirs):
            layer.train(step % 3 != 2)
            layer.zero_grad()
        x = torch.randn(3, 4, *[5] * dims) if dims > 1 or step % 2 else torch.randn(6, 4)
        leaves = [x.clone().requires_grad_() for _ in range(2)]
        results = [layer(leaf) for layer, leaf in zip((ours, theirs), leaves, strict=True)]
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
        for y in results:
            y.square().sum().backward()
        torch.testing.assert_close(leaves[0].grad, leaves[1].grad, rtol=1e-4, atol=1e-4)
        for one, two in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(one.grad, two.grad, rtol=1e-4, atol=1e-4)
        assert list(ours.state_dict()) == list(theirs.state_dict())
        for one, two in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
            torch.testing.assert_close(one, two)
    for layer in (ours, theirs):
        layer.train()
        for bad in (torch.randn(1, 4, *[1] * dims), torch.randn(2), torch.randn(2, 5, *[3] * dims)):
            with pytest.raises((ValueError, RuntimeError)):
                layer(bad)


def test_activation_and_state_dict():
    layer = fnn.BatchNorm2d(4, activation="relu")
    assert type(layer).__name__ == "FusedBatchNorm2d"
    assert isinstance(layer, fnn.BatchNorm2d)
    assert not isinstance(layer, nn.BatchNorm2d)
    x = torch.randn(2, 4, 3, 3)
    plain = nn.BatchNorm2d(4)
    torch.testing.assert_close(layer(x), plain(x).relu())
    state = plain.state_dict()
    del state["num_batches_tracked"]
    state._metadata.clear()
    layer.load_state_dict(state)
    layer.reset_running_stats(), layer.reset_parameters()
    layer.activation = None
    assert type(layer) is fnn.BatchNorm2d
    torch.testing.assert_close(layer.eval()(x), nn.BatchNorm2d(4).eval()(x))


def test_replace_leaves_sync_batch_norm_alone():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.SyncBatchNorm(3), nn.LazyBatchNorm1d())
    report = fastops.replace_(model)
    assert [row.name for row in report.replaced] == ["0"]
    assert type(model[0]) is fnn.BatchNorm2d
    assert type(model[1]) is nn.SyncBatchNorm
    assert type(nn.SyncBatchNorm.convert_sync_batchnorm(model)[0]) is nn.SyncBatchNorm
    restored = nn.Sequential(fnn.BatchNorm2d(3))
    fastops.restore_(restored)
    assert type(restored[0]) is nn.BatchNorm2d


def test_autocast():
    model, plain = (nn.Sequential(m.Conv2d(3, 4, 3), m.BatchNorm2d(4)) for m in (fnn, nn))
    plain.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        with fastops.record() as rows:
            a = model(x)
        e = plain(x)
    assert "aten" not in [row.kernel for row in rows]
    assert a.dtype == e.dtype == torch.bfloat16
    torch.testing.assert_close(a, e, rtol=5e-2, atol=5e-2)
    torch.testing.assert_close(model[1].running_var, plain[1].running_var, rtol=2e-2, atol=1e-3)
    assert model[1].running_var.dtype == torch.float32


def test_a_parameter_changed_before_backward_is_noticed():
    x, w, b = (t.requires_grad_() for t in operands((3, 4, 5), torch.float32))
    y = FF.batch_norm(x, None, None, w, b, True)
    with torch.no_grad():
        w.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_running_statistics_may_change_before_backward():
    """As in PyTorch, where forward runs twice before backward does."""
    for module in (fnn, nn):
        layer = module.BatchNorm1d(3)
        one, two = layer(torch.randn(4, 3)), layer(torch.randn(4, 3))
        (one + two).sum().backward()


# ---- for the tests that call every op (every_op.py) -----------------------------------------------------------------


LAYERS = [("BatchNorm1d", (4,)), ("BatchNorm2d", (4,)), ("BatchNorm3d", (4,))]
OP_LAYERS = [("BatchNorm2d", (4,))]


def _call(x, parameters=True, training=True, kind=None, residual=False):
    c = x[1]
    act = (lambda z: z) if kind is None else getattr(F, kind)

    def split(tensors):
        w, b = tensors[1:3] if parameters else (None, None)
        stats = (None, None) if training else (torch.zeros(c).to(tensors[0].dtype), torch.ones(c).to(tensors[0].dtype))
        return (tensors[0], *(s.to(tensors[0].device) if s is not None else s for s in stats), w, b, training, 0.1, 0.5)

    def ours(*t):
        return FF.batch_norm(*split(t), activation=kind, residual=t[-1] if residual else None)

    def theirs(*t):
        # PyTorch 2.13 gives wrong gradients in eval mode where height is 1 and one of input and gradient lies
        # contiguous, the other one channels_last: (3, 4, 1, 2) with strides (8, 2, 2, 1) and (8, 1, 8, 4).
        y = F.batch_norm(t[0].contiguous(), *split(t)[1:])
        if y.requires_grad:
            y.register_hook(lambda g: g.contiguous())
        return act(y + t[-1] if residual else y)

    return Call("batch_norm", ours, theirs, [x, *([(c,), (c,)] if parameters else []), *([x] if residual else [])])


def calls(size):
    yield _call((2, 3, size, size))
    yield _call((6, 5))
    yield _call((2, 3, size), False, False)
    yield _call((2, 3, size, size), False, True, "relu", True)


def kernels(dtype, on_gpu):
    return {"channels_first": 0, "channels_last": 0}


def random_batch_norm(rng):
    shape = (rng.randint(2, 5), *sizes(rng, rng.randint(1, 4)))
    # No relu: an expanded input is normalised to zeros, or to what PyTorch rounds beside them.
    return _call(shape, rng.random() < 0.7, rng.random() < 0.7, rng.choice((None, "gelu", "silu")))


RANDOM_CALLS = [random_batch_norm]
