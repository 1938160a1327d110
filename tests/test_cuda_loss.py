"""The CUDA kernels of the losses on the emulator: see gpu.py. References and tolerances are the CPU's."""

import itertools
import random

import pytest
import torch
import torch.nn.functional as F
from compare import close
from gpu import DEVICE, EMULATED, SCHEDULES, configured, put
from reference import DTYPES, gradients
from test_loss import REDUCTIONS, SHAPES, compare_all, positions, targets
from torch.library import opcheck

import fastops
import fastops.functional as FF

# A warp holds 1024 classes (float64: 512), a block 8192: as many and more, and more planes than a block has.
MORE = [(3, 1024), (2, 1027), (2, 8192), (1, 20001), (3, 70, 37)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cross_entropy(dtype):
    rng = random.Random(0)
    for i, shape in enumerate(SHAPES + MORE):
        classes = shape[0 if len(shape) == 1 else 1]
        options = {
            "reduction": REDUCTIONS[i % 3],
            "label_smoothing": rng.choice([0.0, 0.1, 1.0]),
            "ignore_index": rng.choice([-100, 0]) if i % 3 != 1 else -100,
        }
        target = targets(shape, options["ignore_index"])
        target.view(-1)[0] = classes - 1  # something counts
        x = (3 * torch.randn(shape)).to(dtype)
        weight = (torch.rand(classes) + 0.5).to(dtype) if rng.random() < 0.5 else None
        with configured(SCHEDULES[i // 3 % len(SCHEDULES)], aligned=i % 2 == 0), fastops.record() as rows:
            compare_all(x, options, target, weight, f"{shape} {options} {weight is not None}", put)
        assert {row.kernel for row in rows} - {"aten"} <= {"rows_cuda", "planes_cuda"}


def test_channels_last():
    x = torch.randn(2, 5, 3, 4).contiguous(memory_format=torch.channels_last)
    compare_all(x, {"reduction": "mean"}, targets(x.shape), None, "channels last", put)


@pytest.mark.parametrize("shape", [(3, 5), (3, 1100), (2, 5, 6)], ids=str)
def test_nan_and_infinities(shape):
    for value in (float("nan"), float("inf"), -float("inf")):
        for place in range(3):
            x = torch.randn(shape)
            x[1, place] = value
            target = torch.full_like(targets(shape), place)
            results = []
            for module, to in ((FF, put), (F, torch.clone)):
                leaf = to(x).requires_grad_()
                y = module.cross_entropy(leaf, to(target), reduction="none")
                results.append((y.cpu(), torch.autograd.grad(y.sum(), leaf)[0].cpu()))
            for ours, theirs in zip(*results, strict=True):
                torch.testing.assert_close(ours, theirs, equal_nan=True)


def test_everything_is_ignored():
    for shape in ((4, 7), (4, 7, 20)):
        for reduction in REDUCTIONS:
            x = torch.randn(shape)
            x.view(-1)[0] = float("nan")
            x = put(x).requires_grad_()
            y = FF.cross_entropy(x, put(torch.full(positions(shape), -100)), reduction=reduction, label_smoothing=0.1)
            assert y.isnan().all() if reduction == "mean" else not y.any()
            assert not torch.autograd.grad(y.sum(), x)[0].any()


def test_classes_without_weight():
    """A target that counts with weight 0 is not one that does not count: a mean of nothing is NaN."""
    for shape, smoothing in itertools.product([(3, 4), (3, 4, 5)], [0.0, 0.1]):
        for weight, first in itertools.product([torch.zeros(4), torch.tensor([1.0, 0.0, 0.0, 1.0])], [0, -100]):
            target = torch.tensor([first, 1, 2])
            target, x = (target if len(shape) == 2 else target[:, None].expand(3, 5)), torch.randn(shape)
            results = []
            for module, place in ((FF, put), (F, torch.clone)):
                leaf = place(x).requires_grad_()
                y = module.cross_entropy(leaf, place(target), place(weight), label_smoothing=smoothing)
                results.append((y.cpu(), torch.autograd.grad(y, leaf)[0].cpu()))
            torch.testing.assert_close(*results, equal_nan=True)


@pytest.mark.skipif(not EMULATED, reason="as in PyTorch, the process could not use the GPU any more")
def test_a_target_that_is_no_class_fails():
    for shape in ((4, 7), (2, 7, 20)):
        target = targets(shape)
        target.view(-1)[3] = 7
        with pytest.raises(RuntimeError, match="a target is no class"):
            FF.cross_entropy(put(torch.randn(shape)), put(target))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mse_loss(dtype):
    for i, shape in enumerate([(), (1,), (7, 9), (1024,), (3, 2731), (70001,), (0, 4)]):
        for reduction in REDUCTIONS:
            x, t = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
            results = []
            for place, function, double in ((put, FF, False), (torch.clone, F, True), (torch.clone, F, False)):
                leaves = [place(v.double() if double else v).requires_grad_() for v in (x, t)]
                with configured(SCHEDULES[i % len(SCHEDULES)], aligned=i % 2 == 0):
                    y = function.mse_loss(*leaves, reduction=reduction)
                    grad = torch.ones(y.shape, dtype=dtype).mul(0.5)
                    results.append([v.cpu() for v in (y, *gradients(y, place(grad), *leaves))])
            for what, *three in zip(("loss", "input", "target"), *results, strict=True):
                close(*three, f"{shape} {reduction} {what}", x.numel(), 2.0)


def test_the_general_door():
    x, t = put(torch.randn(5, 7)), put(targets((5, 7)))
    compiled = torch.compile(FF.cross_entropy, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, t).cpu(), FF.cross_entropy(x, t).cpu())  # PyTorch\'s
    opcheck(torch.ops.fastops.cross_entropy_forward, (x, t, None, "mean", -100, 0.0),
            test_utils=("test_schema", "test_faketensor"))  # fmt: skip
    other = put(torch.randn(5, 7))
    compiled = torch.compile(FF.mse_loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, other).cpu(), FF.mse_loss(x, other).cpu())  # PyTorch\'s


def test_double_backward():
    x, t = torch.randn(5, 7, dtype=torch.float64), targets((5, 7))
    results = []
    for place, module in ((put, FF), (torch.clone, F)):
        leaf = place(x).requires_grad_()
        y = module.cross_entropy(leaf, place(t))
        (g,) = torch.autograd.grad(y, leaf, create_graph=True)
        results.append(torch.autograd.grad(g.square().sum(), leaf)[0].cpu())
    torch.testing.assert_close(*results)


def test_autocast_computes_in_float32():
    x, t = torch.randn(5, 7).bfloat16(), targets((5, 7))
    with torch.autocast(DEVICE.type, torch.bfloat16), fastops.record() as rows:
        y, z = FF.cross_entropy(put(x), put(t)), FF.mse_loss(put(x), put(x + 1))
    assert "aten" not in {row.kernel for row in rows}
    assert y.dtype == z.dtype == torch.float32
