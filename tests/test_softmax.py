"""softmax and log_softmax against a float64 reference: values and gradients, every dtype, tier, layout and edge."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from calls import call, sizes
from compare import close, exact
from modes import Through
from reference import DTYPES, LAYOUTS, gradients
from torch import nn
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.library import opcheck

import fastops
import fastops.functional as FF
import fastops.nn as fnn

OPS = torch.ops.fastops
NAMES = ["softmax", "log_softmax"]
NAME = pytest.mark.parametrize("name", NAMES)

# (shape, dim): sizes around the vectors, their doubles and their fours, sums longer than a block, one element; short
# rows of few neighbours, strips of the greatest width and what is left of them.
SHAPES = [
    ((3,), 0), ((1, 1), 1), ((4, 7), 1), ((4, 7), 0), ((5, 8), -1), ((2, 15), 1), ((7, 16), 1), ((3, 17), 1),
    ((2, 3, 31), 2), ((6, 32), 1), ((4, 33), 1), ((3, 64), 1), ((2, 65), 1), ((2, 197), 1), ((2, 5000), 1),
    ((3, 5, 4), 1), ((2, 3, 17), 1), ((2, 3, 31), 0), ((2, 4, 33), 1), ((1, 5, 64), 1), ((3, 2, 65), 1),
    ((2, 9, 7, 11), 1), ((40, 130), 0), ((13, 10, 3), 1), ((7, 24, 5), 1), ((6, 25, 3), 1), ((40, 24), 1),
    ((2, 3, 2060), 1), ((70, 1030), 0),
]  # fmt: skip


def run(function, x, grad, place=lambda t: t):
    x = place(x.detach().clone() if x.is_contiguous() else x.detach()).requires_grad_()
    y = function(x)
    return [t.cpu() for t in (y, *gradients(y, grad.to(y.device), x))]


def compare(name, x, dim, grad, place=lambda t: t, least=0.0):
    """place: onto the device of ours. least: the size of a gradient's terms, where they cancel."""
    grad = grad.to(x.dtype)
    ours = run(lambda t: getattr(FF, name)(t, dim), x, grad, place)
    theirs = run(lambda t: getattr(F, name)(t, dim), x, grad)
    wide = run(lambda t: getattr(F, name)(t, dim), x.double(), grad)
    for what, *three in zip(("output", "gradient"), ours, wide, theirs, strict=True):
        close(*three, what, x.shape[dim], 4.0, least if what == "gradient" else 0.0)


@NAME
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients(isa, name, dtype):
    for shape, dim in SHAPES:
        for scale in (1, 8):
            compare(name, (scale * torch.randn(shape)).to(dtype), dim, torch.randn(shape))


@NAME
@pytest.mark.parametrize("dtype", DTYPES)
def test_infinities_and_nan(isa, name, dtype):
    inf = math.inf
    rows = torch.randn(6, 19)
    rows[0, 3] = -inf
    rows[1] = -inf
    rows[2, 18] = inf
    rows[3, 0] = math.nan
    rows[4, 1:] = -inf
    rows[5] = torch.linspace(-1e4, 1e4, 19)
    x = rows.to(dtype)
    for one, dim in ((x, 1), (x.T.contiguous(), 0), (x.repeat(1, 3), 1)):
        ours, theirs = getattr(FF, name)(one, dim), getattr(F, name)(one, dim)
        torch.testing.assert_close(ours, theirs, equal_nan=True)
        grad = (torch.arange(one.numel()) % 5).view(one.shape)
        ours, theirs = (run(lambda t, m=m, d=dim: getattr(m, name)(t, d), one, grad)[1] for m in (FF, F))
        eps = torch.finfo(dtype).eps  # of terms that cancel
        torch.testing.assert_close(ours, theirs, equal_nan=True, atol=16 * eps, rtol=4 * eps)
    for value in (-1e30, 1e30):
        x = torch.full((2, 5), value, dtype=torch.float64).to(dtype)
        torch.testing.assert_close(getattr(FF, name)(x, 1), getattr(F, name)(x, 1), equal_nan=True)


@NAME
def test_bits_for_1_and_2_threads(isa, name):
    for shape, dim in (((700, 97), 1), ((4, 50, 700), 1), ((3, 50000), 1)):
        x, grad = torch.randn(shape), torch.randn(shape)
        results = []
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            results.append(run(lambda t, d=dim: getattr(FF, name)(t, d), x, grad))
        for other in results[1:]:
            for one, two in zip(results[0], other, strict=True):
                assert torch.equal(one, two)


@NAME
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(isa, name, layout):
    for shape in ((5, 19), (3, 4, 33)):
        for dim in range(len(shape)):
            compare(name, LAYOUTS[layout](shape, torch.float32), dim, LAYOUTS[layout](shape, torch.float32))
            y = getattr(FF, name)(LAYOUTS[layout](shape, torch.float32), dim)
            assert y.is_contiguous()


@NAME
def test_scalars_and_empty_tensors(name):
    for shape, dim in (((), 0), ((), -1), ((0,), 0), ((3, 0, 2), 1), ((0, 4), 1)):
        x = torch.randn(shape, requires_grad=True)
        y = getattr(FF, name)(x, dim)
        torch.testing.assert_close(y, getattr(F, name)(x, dim))
        y.sum().backward()
        assert x.grad.shape == shape


@NAME
def test_dtype(name):
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for x in (torch.randn(3, 7), torch.randn(3, 7).bfloat16(), torch.arange(6).view(2, 3)):
            ours, theirs = getattr(FF, name)(x, 1, dtype=dtype), getattr(F, name)(x, 1, dtype=dtype)
            assert ours.dtype == theirs.dtype == dtype
            torch.testing.assert_close(ours, theirs)
            if x.is_floating_point() and dtype != torch.bfloat16:  # gradients as exact as their dtype
                results = []
                for module in (FF, F):
                    leaf = x.clone().requires_grad_()
                    getattr(module, name)(leaf, 1, dtype=dtype).pow(2).sum().backward()
                    results.append(leaf.grad)
                torch.testing.assert_close(*results)


@NAME
def test_double_backward(name):
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    for dim in (0, -1):

        def ours(t, dim=dim):
            return getattr(FF, name)(t, dim)

        assert torch.autograd.gradcheck(ours, x, check_forward_ad=True, check_batched_grad=True)
        assert torch.autograd.gradgradcheck(ours, x, check_fwd_over_rev=True, check_rev_over_rev=True)
        with Through():
            assert torch.autograd.gradgradcheck(ours, x)


@NAME
def test_func(name):
    x = torch.randn(3, 4, dtype=torch.float64)
    batch = torch.stack([x, -x, 2 * x])

    def same(transform):
        pair = [transform(lambda t, m=m: getattr(m, name)(t, -1).pow(3).sum()) for m in (FF, F)]
        torch.testing.assert_close(*pair)

    same(lambda f: grad(f)(x))
    same(lambda f: jvp(f, (x,), (x,)))
    same(lambda f: hessian(f)(x))
    same(lambda f: jacrev(jacrev(f))(x))
    same(lambda f: jacfwd(jacfwd(f))(x))
    same(lambda f: vmap(grad(f))(batch))
    same(lambda f: vmap(f, 1)(batch))
    same(lambda f: grad(lambda t: vmap(f)(t).sum())(batch))
    for dim in (0, -1):
        torch.testing.assert_close(
            vmap(lambda t, d=dim: getattr(FF, name)(t, d))(x), vmap(lambda t, d=dim: getattr(F, name)(t, d))(x)
        )
    torch.testing.assert_close(vmap(lambda t: getattr(FF, name)(t, 0))(x[0]), getattr(F, name)(x[:1], 0)[0])


def test_opcheck():
    x = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    for log in (False, True):
        for dim in (0, -1):
            opcheck(OPS.softmax_forward, (x, dim, log))
            y = OPS.softmax_forward(x.detach(), dim, log).requires_grad_()
            opcheck(OPS.softmax_backward, (torch.randn_like(x).requires_grad_(), y, dim, log))


@pytest.mark.parametrize("log", [False, True])
def test_second_derivatives_of_the_backward_op(log):
    g, y = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda g, y: OPS.softmax_backward(g, y, 1, log), (g, y))


@NAME
@pytest.mark.parametrize("dtype", DTYPES)
def test_both_doors(name, dtype):
    x, grad = torch.randn(3, 4, 13).to(dtype), torch.randn(3, 4, 13)
    for dim in (0, 1, 2):
        results = [run(lambda t, d=dim: getattr(FF, name)(t, d), x, grad)]
        with Through():
            results.append(run(lambda t, d=dim: getattr(FF, name)(t, d), x, grad))
        for one, two in zip(*results, strict=True):
            exact(one, two)


@NAME
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(name, dynamic, monkeypatch):
    monkeypatch.setattr(fastops.functional._general, "_COMPILED_FROM", 0)  # else small inputs are PyTorch's
    torch._dynamo.reset()
    compiled = torch.compile(lambda t: getattr(FF, name)(t, -1), fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (3, 5):
        x, grad = torch.randn(rows, 8), torch.randn(rows, 8)
        for one, two in zip(run(compiled, x, grad), run(lambda t: getattr(F, name)(t, -1), x, grad), strict=True):
            torch.testing.assert_close(one, two)


@pytest.mark.parametrize("name", ["Softmax", "LogSoftmax"])
def test_modules(name):
    ours, theirs = getattr(fnn, name)(1), getattr(nn, name)(1)
    assert repr(ours) == repr(theirs)
    assert vars(ours).keys() == vars(theirs).keys()
    x = torch.randn(3, 4, 6)
    for module in (ours, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        with fastops.record() as rows:
            torch.testing.assert_close(module(x), theirs(x))
        assert [row.kernel == "aten" for row in rows] == [False]
    torch.testing.assert_close(torch.jit.script(ours)(x), theirs(x))
    model = nn.Sequential(theirs)
    expected = model(x)
    assert len(fastops.replace_(model).replaced) == 1
    torch.testing.assert_close(model(x), expected)
    program = torch.export.export(model, (x,))
    assert "fastops." not in program.graph_module.code
    with fastops.export_kernels():
        program = torch.export.export(model, (x,))
    assert "fastops.softmax_forward" in program.graph_module.code
    plain = program.run_decompositions(fastops.decompositions())
    assert "fastops." not in plain.graph_module.code
    torch.testing.assert_close(plain.module()(x), expected)


@NAME
def test_autocast_leaves_the_dtype(name):
    for dtype in DTYPES:
        x = torch.randn(3, 5).to(dtype)
        with torch.autocast("cpu", torch.bfloat16):
            assert getattr(FF, name)(x, 1).dtype == getattr(F, name)(x, 1).dtype == dtype


@NAME
@pytest.mark.filterwarnings("ignore:Implicit dimension choice")
def test_without_dim(name):
    for x in (torch.randn(4), torch.randn(2, 3), torch.randn(2, 3, 4)):
        torch.testing.assert_close(getattr(FF, name)(x), getattr(F, name)(x))


@NAME
@pytest.mark.parametrize(
    "arguments",
    [(torch.ones(2, 3), 2), (torch.ones(2, 3), -3), (torch.ones(()), 1), (torch.arange(4), 0), (3.0, 0),
     (torch.ones(3), "a"), (torch.ones(3), 1.0), (torch.ones(3), 2**70)],
    ids=str,
)  # fmt: skip
def test_refuses_as_pytorch(name, arguments):
    try:
        getattr(F, name)(*arguments)
    except Exception as error:
        refusal = error
    with pytest.raises(type(refusal)):
        getattr(FF, name)(*arguments)


def test_messages():
    with pytest.raises(IndexError, match="softmax: dim must be between -2 and 1 for 2 dimensions, got 2"):
        FF.softmax(torch.ones(2, 3), 2)
    with pytest.raises(RuntimeError, match="log_softmax: input must be a floating point tensor, got"):
        FF.log_softmax(torch.arange(4), 0)


# ---- for the tests that call every op (every_op.py) -----------------------------------------------------------------

LAYERS = [("Softmax", (1,)), ("LogSoftmax", (1,))]
OP_LAYERS = [("Softmax", (1,))]


def calls(size):
    for name in NAMES:
        yield call(name, (3, 40), dim=1)
        yield call(name, (3, 5, size), dim=1)


def kernels(dtype, on_gpu):
    return {"rows": 0, "strips": 0}


def random_softmax(rng):
    shape = sizes(rng, rng.randint(1, 4), 1, 20)
    return call(rng.choice(NAMES), shape, dim=rng.randrange(-len(shape), len(shape)))


RANDOM_CALLS = [random_softmax]
