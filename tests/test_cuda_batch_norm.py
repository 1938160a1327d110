"""The CUDA kernels of batch_norm on the emulator: see gpu.py. References and tolerances are the CPU's."""

import pytest
import torch
import torch.nn.functional as F
from compare import exact
from gpu import DEVICE, SCHEDULES, compare_second_order, configured, put
from reference import DTYPES
from test_batch_norm import FUSED, compare_all, last, operands
from torch.library import opcheck

import fastops
import fastops.functional as FF
from fastops._activations import PIECEWISE_LINEAR

# Vectors have 2 to 8 elements, four at a time; rows go by eights or fours; a block has 256 threads.
SHAPES = [(2, 1), (5, 3), (9, 17), (130, 33), (3, 600), (3, 5, 7), (2, 3, 4, 4), (1, 2, 33, 31), (2, 5, 3, 4, 2)]
RELU, SILU = (next(case for case in FUSED if case.kind == kind) for kind in ("relu", "silu"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients(dtype):
    for i, shape in enumerate(SHAPES):
        x, w, b = operands(shape, dtype)
        with configured(SCHEDULES[i % len(SCHEDULES)], aligned=i % 2 == 0), fastops.record() as rows:
            for training in (True, False):
                compare_all(x, w, b, training, what=f"{shape} {training}", place=put)
                compare_all(last(x), None, None, training, RELU, torch.randn_like(x), str(shape), 2.0, put)
        assert {row.kernel for row in rows if row.op.startswith("batch_norm")} <= {
            "channels_first_cuda",
            "channels_last_cuda",
            "aten",
        }


@pytest.mark.parametrize("shape", [(3, 3, 60, 61), (900, 40), (2, 4, 64, 64)], ids=str)
def test_channels_in_parts(shape):
    """A channel has several parts only where there are fewer blocks than multiprocessors."""
    for i, schedule in enumerate(SCHEDULES):
        x, w, b = operands(shape, torch.float32 if i else torch.bfloat16)
        with configured(schedule, multiprocessors=16):
            compare_all(x, w, b, what=schedule, place=put)
            compare_all(last(x), w, b, i != 1, SILU, torch.randn_like(x), schedule, 2.0, put)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_activation(dtype):
    for case in FUSED:
        if dtype == torch.bfloat16 and case.kind in PIECEWISE_LINEAR - {"relu"}:
            continue  # what rounds onto a bound has another derivative, in PyTorch too
        x, w, b = operands((3, 5, 4, 9), dtype)
        for residual in (None, torch.randn_like(x)):
            compare_all(x, w, b, True, case, residual, str(case), 2.0, put)
            compare_all(last(x), w, b, False, case, residual, str(case), 2.0, put)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_parameters_of_16_bits(dtype):
    x = operands((3, 17, 5, 7), dtype)[0]
    _, w, b = operands((3, 17, 5, 7), dtype, mixed=True)
    for training in (True, False):
        compare_all(x, w, b, training, RELU, place=put)
        compare_all(last(x), w, b, training, RELU, place=put)


@pytest.mark.parametrize("chip", [1, 16])
def test_statistics(chip):
    """Of values with a large mean, of outliers among the first, of squares that overflow: as exact as on the CPU."""
    for shape in ((3, 5, 700), (1500, 7)):
        others = [i for i in range(len(shape)) if i != 1]
        outliers = torch.randn(shape)
        outliers[0] = 1e6
        for x, limit in ((torch.randn(shape) - 1e6, 6e-7), (outliers, 5e-6), (torch.randn(shape) * 1e25, 6e-7)):
            running = torch.zeros(shape[1], dtype=torch.float64), torch.zeros(shape[1], dtype=torch.float64)
            stats = [put(t.float()) for t in running]
            with configured(multiprocessors=chip):
                FF.batch_norm(put(x), *stats, training=True, momentum=1.0)
            var, mean = torch.var_mean(x.double(), others)
            var, mean = var.float(), mean.float()  # infinite where float32 is
            torch.testing.assert_close(stats[0].cpu(), mean, rtol=1e-6, atol=1e-7)
            torch.testing.assert_close(stats[1].cpu(), var, rtol=limit, atol=0)


@pytest.mark.parametrize("training", [True, False])
def test_nan_and_infinity(training):
    for make in (lambda x: x, last):
        x = torch.randn(3, 4, 5, 6)
        x[0, 0, 0, 0], x[1, 1, 2, 3], x[2, 2, 4, 5] = float("nan"), float("inf"), float("-inf")
        ours, theirs = put(make(x)).requires_grad_(), make(x).requires_grad_()
        stats = [[put(torch.zeros(4)), put(torch.ones(4))], [torch.zeros(4), torch.ones(4)]]
        y = FF.batch_norm(ours, *stats[0], training=training)
        e = F.batch_norm(theirs, *stats[1], training=training)
        g = torch.randn_like(x)
        found, expected = torch.autograd.grad(y, ours, put(g)), torch.autograd.grad(e, theirs, g)
        for a, b in ((y, e), *zip(*stats, strict=True), (*found, *expected)):
            torch.testing.assert_close(a.cpu(), b, equal_nan=True, rtol=1e-5, atol=1e-5)


def test_only_the_gradients_asked_for():
    x, w, b = operands((3, 5, 7), torch.float32)
    more, grad = torch.randn_like(x), torch.randn_like(x)
    for kind in (None, "relu", "silu"):
        for training in (True, False):
            for wanted in ((1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (1, 0, 0, 1), (0, 1, 1, 0)):
                results = []
                for place in (put, torch.clone):
                    leaves = [place(t).requires_grad_(bool(n)) for t, n in zip((x, w, b, more), wanted, strict=True)]
                    stats = place(torch.zeros(5)), place(torch.ones(5))
                    y = FF.batch_norm(leaves[0], *stats, *leaves[1:3], training, activation=kind, residual=leaves[3])
                    y.backward(place(grad))
                    results.append([None if t.grad is None else t.grad.cpu() for t in leaves])
                for one, two in zip(*results, strict=True):
                    assert (one is None) == (two is None)
                    if one is not None:
                        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


def test_the_general_door():
    x, w, b = operands((2, 3, 4, 5), torch.float32)
    stats = [put(torch.zeros(3)), put(torch.ones(3))]
    args = [put(x), put(w), put(b), None, *stats, True, 0.1, 1e-5, "relu", 0.0, 0.0]
    opcheck(torch.ops.fastops.batch_norm_forward, (*args, True), test_utils=("test_schema", "test_faketensor"))
    fast = FF.batch_norm(put(x), *[t.clone() for t in stats], put(w), put(b), True, activation="relu")
    compiled = torch.compile(FF.batch_norm, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(put(x), *stats, put(w), put(b), True, activation="relu").cpu(), fast.cpu())
    batched = torch.func.vmap(lambda t: FF.batch_norm(t, None, None, *args[1:3], True))(args[0][None])
    exact(batched[0].cpu(), FF.batch_norm(args[0], None, None, *args[1:3], True).cpu())


def test_double_backward():
    x, w, b = operands((3, 4, 5), torch.float64)
    compare_second_order(
        lambda *t: FF.batch_norm(t[0], None, None, *t[1:], True, activation="silu"),
        lambda *t: F.silu(F.batch_norm(t[0], None, None, *t[1:], True)),
        x,
        w,
        b,
    )


def test_modules_under_autocast():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    fastops.replace_(model)
    model.to(DEVICE)
    with torch.autocast(DEVICE.type, torch.bfloat16), fastops.record() as rows:
        y = model(put(torch.randn(2, 3, 6, 6)))
    y.sum().backward()
    assert "aten" not in [row.kernel for row in rows]
    assert y.dtype == torch.bfloat16
    assert model[1].running_var.dtype == torch.float32
