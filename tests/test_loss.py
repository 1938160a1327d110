"""cross_entropy and mse_loss against float64 and PyTorch: values, gradients, both doors, refusals."""

import itertools
import random
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from calls import Call, sizes
from compare import TRACED, UNTRACED, close
from modes import Through
from reference import DTYPES, gradients
from tiers import tiers
from torch import nn
from torch.library import opcheck

import fastops
import fastops.functional as FF
import fastops.nn as fnn

OPS = torch.ops.fastops
REDUCTIONS = ["none", "mean", "sum"]

# (shape of the logits): classes around the vectors' widths, positions around blocks of 64, every number of dimensions.
SHAPES = [
    (1,), (10,), (1, 1), (64, 10), (7, 3), (100, 5), (3, 15), (65, 16), (2, 17), (5, 33), (9, 64), (4, 1000), (1, 5003),
    (2, 5, 1), (3, 4, 15), (2, 21, 8, 9), (1, 3, 5, 13, 3), (2, 7, 130),
]  # fmt: skip


def positions(shape):
    return shape[:1] * (len(shape) > 1) + shape[2:]


def targets(shape, ignore_index=-100, ignored=0.2):
    """Random classes, some of them ignored."""
    t = torch.randint(shape[0 if len(shape) == 1 else 1], positions(shape))
    return torch.where(torch.rand(t.shape) < ignored, ignore_index, t)


def compare_all(x, options, target, weight, what, place=None):
    """Output and gradient of cross_entropy, on every tier or, with `place`, on its device."""
    exact_x = x.double().requires_grad_()
    exact_y = F.cross_entropy(exact_x, target, None if weight is None else weight.double(), **options)
    other_x = x.clone().requires_grad_()
    other_y = F.cross_entropy(other_x, target, weight, **options)
    grad = torch.randn(exact_y.shape).to(x.dtype)
    (exact_g,), (other_g,) = gradients(exact_y, grad, exact_x), gradients(other_y, grad, other_x)
    put = place or torch.clone
    for tier in tiers(x.dtype) if place is None else ["cuda"]:
        mine_x = put(x).requires_grad_()
        y = FF.cross_entropy(mine_x, put(target), None if weight is None else put(weight), **options)
        y, g = y.cpu(), gradients(y, put(grad), mine_x)[0].cpu()
        close(y, exact_y, other_y, f"{what} {tier}: loss", terms=x.numel())
        # A product of weight, smoothing and grad_output, of which PyTorch rounds fewer.
        close(g, exact_g, other_g, f"{what} {tier}: gradient", terms=x.numel(), roundings=2)
        assert g.shape == x.shape


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cross_entropy(shape, dtype):
    rng = random.Random(str(shape))
    for reduction in REDUCTIONS:
        for weighted in (False, True):
            options = {
                "reduction": reduction,
                "label_smoothing": rng.choice([0.0, 0.1, 1.0]),
                "ignore_index": rng.choice([-100, 0]),
            }
            target = targets(shape, options["ignore_index"])
            if reduction == "mean":  # something counts
                options["ignore_index"] = -100
                target.view(-1)[0] = shape[0 if len(shape) == 1 else 1] - 1
            x = (3 * torch.randn(shape)).to(dtype)
            classes = shape[0 if len(shape) == 1 else 1]
            weight = (torch.rand(classes) + 0.5).to(dtype) if weighted else None
            compare_all(x, options, target, weight, f"{options} {weighted}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_and_small_logits(dtype):
    for scale, offset in ((1000, 0), (1, 1e4), (1e-3, -1e4), (50, 0)):
        x = (scale * torch.randn(33, 19) + offset).to(dtype)
        for shape in ((33, 19), (3, 19, 11)):
            logits = x if len(shape) == 2 else x.view(3, 11, 19).transpose(1, 2).contiguous()
            compare_all(logits, {"reduction": "none"}, targets(shape), None, f"{scale} {offset}")


@pytest.mark.parametrize("shape", [(3, 5), (3, 40), (2, 5, 6)])
def test_nan_and_infinities(shape):
    for value in (float("nan"), float("inf"), -float("inf")):
        for place in range(3):
            x = torch.randn(shape)
            x[1, place] = value
            t = targets(shape, ignored=0)
            for target in (
                t,
                torch.full_like(t, place),
                torch.where(t >= 0, torch.arange(t.shape[0]).view(-1, *[1] * (t.dim() - 1)), t),
            ):
                ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
                y, z = (
                    f(a, target, reduction="none") for f, a in ((FF.cross_entropy, ours), (F.cross_entropy, theirs))
                )
                torch.testing.assert_close(y, z, equal_nan=True)
                g, h = (torch.autograd.grad(out.sum(), a)[0] for out, a in ((y, ours), (z, theirs)))
                torch.testing.assert_close(g, h, equal_nan=True)
    x = torch.full(shape, -float("inf"))
    assert FF.cross_entropy(x, targets(shape, ignored=0), reduction="none").isnan().all()


@pytest.mark.parametrize("shape", [(4, 7), (4, 7, 20), (7,)])
def test_everything_is_ignored(shape):
    target = torch.full(positions(shape), -100)
    for smoothing in (0.0, 0.1):
        for reduction in REDUCTIONS:
            x = torch.randn(shape, requires_grad=True)
            x.data.view(-1)[0] = float("nan")
            y = FF.cross_entropy(x, target, reduction=reduction, label_smoothing=smoothing)
            if reduction == "mean":
                assert y.isnan()
            else:
                assert not y.any()
            assert not torch.autograd.grad(y.sum(), x)[0].any()


def test_a_large_mean_is_exact_enough():
    """Sums are in float64: a mean over many positions errs by one rounding."""
    x = torch.randn(20000, 3)
    t = targets((20000, 3))
    expected = F.cross_entropy(x.double(), t)
    assert abs(float(FF.cross_entropy(x, t)) - float(expected)) < 2e-7


@pytest.mark.parametrize("shape", [(5, 7), (2, 7, 40)])
@pytest.mark.parametrize("bad", [7, -1, -99, 1 << 40])
def test_targets_out_of_bounds(shape, bad):
    for door in (torch.enable_grad, Through):
        t = targets(shape)
        t.view(-1)[-1] = bad
        with pytest.raises(IndexError, match=f"Target {bad} is out of bounds"), door():
            FF.cross_entropy(torch.randn(shape), t)
    with pytest.raises(IndexError, match=f"Target {bad} is out of bounds"):
        F.cross_entropy(torch.randn(shape), t)
    # A gradient never reads there.
    _, statistics = OPS.cross_entropy_forward(torch.randn(shape), targets(shape), None, "sum", -100, 0.0)
    grad = OPS.cross_entropy_backward(torch.ones(()), torch.randn(shape), t, None, statistics, "sum", -100, 0.0)
    assert not grad.movedim(1, -1)[(-1,) * (grad.dim() - 1)].any()


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "sliced", "expanded"])
def test_layouts(layout):
    shape = (2, 5, 6, 7)
    x = torch.randn(shape)
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif layout == "transposed":
        x = torch.randn(shape[::-1]).permute(3, 2, 1, 0)
    elif layout == "sliced":
        x = torch.randn(4, 9, 8, 9)[1:3, 2:7, :6, 1:8]
    else:
        x = torch.randn(2, 5, 1, 7).expand(shape)
    target = targets(shape).transpose(1, 2).contiguous().transpose(1, 2)
    compare_all(x, {"label_smoothing": 0.1}, target, torch.rand(10)[::2], layout)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (7,), (100, 1), (3, 5), (64, 65), (4097,), (70001,)], ids=str)
def test_mse_loss(shape, dtype):
    for reduction in REDUCTIONS:
        x, t = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
        exact, other = ([a.clone().requires_grad_() for a in pair] for pair in ((x.double(), t.double()), (x, t)))
        exact_y, other_y = F.mse_loss(*exact, reduction=reduction), F.mse_loss(*other, reduction=reduction)
        grad = torch.randn(exact_y.shape).to(dtype)
        exact_g, other_g = gradients(exact_y, grad, *exact), gradients(other_y, grad, *other)
        for tier in tiers(dtype):
            mine = [a.clone().requires_grad_() for a in (x, t)]
            y = FF.mse_loss(*mine, reduction=reduction)
            close(y, exact_y, other_y, f"{tier} {reduction}", terms=x.numel())
            for one, two, three in zip(gradients(y, grad, *mine), exact_g, other_g, strict=True):
                close(one, two, three, f"{tier} {reduction}: gradient", terms=2)


def test_mse_of_other_shapes_and_dtypes():
    x, t = torch.randn(3, 4), torch.randn(4)
    with pytest.warns(UserWarning, match="different to the input size"):
        y = FF.mse_loss(x, t)
    assert torch.equal(y, F.mse_loss(x, t.expand(3, 4)))
    assert FF.mse_loss(x, torch.ones(3, 4, dtype=torch.float64)).dtype == torch.float64
    w = torch.rand(3, 4)
    torch.testing.assert_close(FF.mse_loss(x, torch.zeros(3, 4), weight=w), F.mse_loss(x, torch.zeros(3, 4), weight=w))
    empty = torch.empty(0, 3)
    assert FF.mse_loss(empty, empty).isnan()
    assert FF.mse_loss(empty, empty, reduction="sum") == 0


def test_threads_give_the_same_bits():
    x, t, w = torch.randn(3001, 37), targets((3001, 37)), torch.rand(37)
    images, labels = torch.randn(3, 21, 50, 50), targets((3, 21, 50, 50))
    a, b = torch.randn(2, 150001).unbind()

    def run():
        results = []
        for function, args, options in (
            (FF.cross_entropy, (x, t, w), {"label_smoothing": 0.1}),
            (FF.cross_entropy, (images, labels), {"reduction": "sum"}),
            (FF.mse_loss, (a, b), {}),
        ):
            leaf = args[0].clone().requires_grad_()
            y = function(leaf, *args[1:], **options)
            results += [y.detach(), *torch.autograd.grad(y, leaf)]
        return results

    expected = run()
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert all(map(torch.equal, run(), expected))


@pytest.mark.parametrize("shape", [(3, 4), (2, 4, 3), (4,)])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("door", [torch.enable_grad, Through])
def test_second_derivatives(shape, reduction, door):
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    t, w = targets(shape), torch.rand(4, dtype=torch.float64)
    t.view(-1)[0] = 1
    v = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    with door():
        for smoothing in (0.0, 0.3):
            options = {"reduction": reduction, "label_smoothing": smoothing}
            torch.autograd.gradcheck(lambda x: FF.cross_entropy(x, t, w, **options), x)  # noqa: B023
            torch.autograd.gradgradcheck(lambda x: FF.cross_entropy(x, t, w, **options), x)  # noqa: B023
        torch.autograd.gradcheck(lambda x, v: FF.mse_loss(x, v, reduction=reduction), (x, v))
        torch.autograd.gradgradcheck(lambda x, v: FF.mse_loss(x, v, reduction=reduction), (x, v))


def test_transforms():
    """torch.func and forward mode, by PyTorch's own ops."""
    x, t = torch.randn(6, 3, 5), torch.randint(5, (6, 3))
    loss = torch.func.vmap(torch.func.grad(FF.cross_entropy))(x, t)
    torch.testing.assert_close(loss, torch.func.vmap(torch.func.grad(F.cross_entropy))(x, t))
    ours, theirs = (
        torch.func.jvp(partial(f, target=t[0]), (x[0],), (x[1],)) for f in (FF.cross_entropy, F.cross_entropy)
    )
    torch.testing.assert_close(ours, theirs)
    ours, theirs = (torch.func.hessian(partial(f, target=x[1]))(x[0]) for f in (FF.mse_loss, F.mse_loss))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("door", [torch.enable_grad, Through])
def test_autocast(door):
    x, t = torch.randn(3, 5, dtype=torch.bfloat16), torch.tensor([0, 1, 4])
    with torch.autocast("cpu", torch.bfloat16), door():
        y, z = FF.cross_entropy(x, t), FF.mse_loss(x, torch.zeros(3, 5))
        assert y.dtype == F.cross_entropy(x, t).dtype == torch.float32
        assert z.dtype == F.mse_loss(x, torch.zeros(3, 5)).dtype == torch.float32
    torch.testing.assert_close(y, F.cross_entropy(x.float(), t))


def test_what_is_pytorchs():
    """Probabilities, other integers, no positions: the same results, without a kernel."""
    x, t = torch.randn(3, 5, requires_grad=True), torch.tensor([0, 1, 4])
    probabilities = torch.rand(3, 5).softmax(1)
    with fastops.record() as rows:
        torch.testing.assert_close(FF.cross_entropy(x, probabilities), F.cross_entropy(x, probabilities))
        torch.testing.assert_close(FF.cross_entropy(x, t.byte()), F.cross_entropy(x, t.byte()))
        assert FF.cross_entropy(x[:0], t[:0]).isnan()
        FF.cross_entropy(x, t, label_smoothing=1)
    assert [row.kernel.split("_")[0] for row in rows] == ["aten"] * 3 + ["rows"]
    for options in ({"size_average": False}, {"reduce": False}):
        torch.testing.assert_close(FF.cross_entropy(x, t, **options), F.cross_entropy(x, t, **options))
        torch.testing.assert_close(FF.mse_loss(x, x * 2, **options), F.mse_loss(x, x * 2, **options))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f: f.cross_entropy(torch.randn(3, 5), torch.zeros(4, dtype=torch.int64)), "must be an int64 tensor"),
        (lambda f: f.cross_entropy(torch.randn(3, 5), torch.zeros(3, dtype=torch.int32)), "must be an int64 tensor"),
        (lambda f: f.cross_entropy(torch.randn(3, 5), torch.zeros(3).long(), torch.ones(4)), "weight must have"),
        (lambda f: f.cross_entropy(torch.randn(3, 5), torch.zeros(3).long(), reduction="max"), "reduction must be"),
        (lambda f: f.cross_entropy(torch.randn(3, 5), torch.zeros(3).long(), label_smoothing=2.0), "label_smoothing"),
        (lambda f: f.cross_entropy(torch.randn(3, 5), None), "target must be a Tensor"),
        (lambda f: f.mse_loss(torch.randn(3, 5), torch.zeros(3, 5), reduction="max"), "reduction must be"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(Exception) as theirs:  # noqa: PT011
        call(F)
    with pytest.raises(theirs.type, match=message):
        call(FF)


def test_classes_without_weight(isa):
    """A target that counts with weight 0 counts: a mean without weights is NaN, and its gradient, too."""
    weights = [torch.zeros(4), torch.tensor([1.0, 0.0, 0.0, 1.0]), None]
    targets = [torch.tensor([0, 1, 2]), torch.tensor([-100, 1, 2]), torch.tensor([-100] * 3)]
    for shape, weight, target in itertools.product([(3, 4), (3, 4, 5)], weights, targets):
        target = target if len(shape) == 2 else target[:, None].expand(3, 5)
        for smoothing, reduction in itertools.product([0.0, 0.1], ["mean", "sum", "none"]):
            options = {"weight": weight, "label_smoothing": smoothing, "reduction": reduction}
            x = torch.randn(shape, requires_grad=True)
            results = []
            for functions in (F, FF):
                y = functions.cross_entropy(x, target, **options)
                results.append((y, *torch.autograd.grad(y.sum(), x)))
            torch.testing.assert_close(*results[::-1], equal_nan=True, msg=lambda m, o=options: f"{o}: {m}")


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", [(4, 5), (2, 5, 3), (2, 5, 3, 4)])
def test_ops(shape, weighted):
    x, t = torch.randn(shape, requires_grad=True), targets(shape)
    if len(shape) == 4:
        x = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    weight = torch.rand(5) if weighted else None
    for i, reduction in enumerate(REDUCTIONS):
        # A graph is traced of two of the six for each reduction.
        utils = TRACED if i == (len(shape) + weighted) % 3 else UNTRACED
        args = reduction, -100, 0.1
        opcheck(OPS.cross_entropy_forward, (x, t, weight, *args), test_utils=utils)
        y, statistics = OPS.cross_entropy_forward(x.detach(), t, weight, *args)
        grad = torch.randn_like(y).requires_grad_()
        opcheck(OPS.cross_entropy_backward, (grad, x, t, weight, statistics, *args), test_utils=utils)
        if weighted:
            continue
        v = torch.randn(shape).requires_grad_()
        opcheck(OPS.mse_loss_forward, (x, v, reduction), test_utils=utils)
        args = grad if reduction != "none" else torch.randn(shape), x, v, reduction, [True, False]
        opcheck(OPS.mse_loss_backward, args, test_utils=utils)


def test_memory_of_backward():
    """Two numbers a position are kept, and no log-probabilities."""
    x, t = torch.randn(64, 1000, requires_grad=True), targets((64, 1000))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda s: saved.append(s) or s, lambda s: s):
        FF.cross_entropy(x, t)
    assert sum(s.numel() for s in saved if s.data_ptr() not in (x.data_ptr(), t.data_ptr())) == 2 * 64 + 1


def test_logits_changed_in_place():
    x, t = torch.randn(3, 5, requires_grad=True), torch.tensor([0, 1, 4])
    logits = x * 2
    loss = FF.cross_entropy(logits, t)
    logits.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


MODULES = [
    ("CrossEntropyLoss", {"weight": torch.arange(1.0, 6), "label_smoothing": 0.1}, torch.tensor([0, 1, 4])),
    ("CrossEntropyLoss", {"ignore_index": 1, "reduction": "sum"}, torch.tensor([0, 1, 4])),
    ("MSELoss", {"reduction": "none"}, torch.ones(3, 5)),
    ("MSELoss", {}, torch.ones(3, 5)),
]


@pytest.mark.parametrize(("name", "options", "target"), MODULES)
def test_modules(name, options, target):
    """Replaced and back, scripted, compiled, exported."""
    loss, x = getattr(nn, name)(**options), torch.randn(3, 5)
    expected = loss(x, target)
    model = nn.ModuleDict({"loss": loss})
    assert len(fastops.replace_(model).replaced) == 1
    assert type(loss) is getattr(fnn, name)
    with fastops.record() as rows:
        torch.testing.assert_close(loss(x, target), expected)
    assert [row.kernel.split("_")[0] for row in rows] in (["rows"], ["elementwise"])
    torch.testing.assert_close(torch.jit.script(loss)(x, target), expected)
    torch.testing.assert_close(torch.compile(loss, backend="aot_eager", fullgraph=True)(x, target), expected)
    assert not [n for n in torch.export.export(loss, (x, target)).graph.nodes if "fastops" in str(n.target)]
    with fastops.export_kernels():
        program = torch.export.export(loss, (x, target))
    assert [n for n in program.graph.nodes if "fastops" in str(n.target)]
    written_out = program.run_decompositions(fastops.decompositions())
    torch.testing.assert_close(written_out.module()(x, target), expected)
    fastops.restore_(model)
    assert type(loss) is getattr(nn, name)


def test_decompositions_give_every_result():
    x, t, w = torch.randn(3, 5, 4), targets((3, 5, 4)), torch.rand(5)
    args = x, t, w, "mean", -100, 0.1
    written_out = fastops.decompositions()[OPS.cross_entropy_forward.default](*args)
    torch.testing.assert_close(OPS.cross_entropy_forward(*args), written_out)


# ---- for the tests that call every op (every_op.py) -----------------------------------------------------------------


def _entropy(function):
    """Of classes that the logits' shape decides; `function` is F's or FF's."""

    def loss(x):
        shape = positions(x.shape)
        count = 1
        for n in shape:
            count *= n
        t = torch.arange(count).reshape(shape) % x.shape[0 if x.dim() == 1 else 1]
        return function(x, t.to(x.device), reduction="none")

    return loss


def _squares(function):
    return lambda x, t: function(x, t, reduction="none")


def entropy(shape):
    return Call("cross_entropy", _entropy(FF.cross_entropy), _entropy(F.cross_entropy), [shape])


def squares(shape):
    return Call("mse_loss", _squares(FF.mse_loss), _squares(F.mse_loss), [shape, shape])


def calls(size):
    yield entropy((9, 12))
    yield entropy((2, 12, size, size))
    yield squares((9, 12))


def kernels(dtype, on_gpu):
    return {"rows": 0, "planes": 0, "elementwise": 0}


def random_cross_entropy(rng):
    return entropy(sizes(rng, rng.randint(1, 4)))


def random_mse_loss(rng):
    return squares(sizes(rng, rng.randint(0, 4)))


RANDOM_CALLS = [random_cross_entropy, random_mse_loss]
# They take a target as well: not among the layers that are called with an input. See test_modules.
LOSSES = ["CrossEntropyLoss", "MSELoss"]
