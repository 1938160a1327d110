"""The CUDA kernels of softmax and log_softmax on the emulator: see gpu.py. References and tolerances are the CPU's."""

import math

import pytest
import torch
import torch.nn.functional as F
from compare import exact
from gpu import DEVICE, SCHEDULES, compare_second_order, configured, put
from reference import DTYPES
from test_softmax import NAME, SHAPES, compare, run
from torch.library import opcheck

import fastops
import fastops.functional as FF

# A warp holds 1024 elements of a row (float64: 512), a block 8192: rows below, at and above each, and several chunks.
MORE = [((3, 1024), 1), ((2, 1025), 1), ((2, 8192), 1), ((2, 8196), 1), ((1, 20001), 1), ((2, 70, 40), 1)]


@NAME
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients(name, dtype):
    for i, (shape, dim) in enumerate(SHAPES + MORE):
        scale = (1, 8)[i % 2]  # with the larger one, a row may have one probability that is 1
        x = (scale * torch.randn(shape)).to(dtype)
        with configured(SCHEDULES[i % len(SCHEDULES)], aligned=i % 4 < 2), fastops.record() as rows:
            compare(name, x, dim, torch.randn(shape), put, scale / 8)
        assert {row.kernel for row in rows} - {"aten"} <= {"rows_cuda", "strips_cuda"}


@NAME
@pytest.mark.parametrize("dtype", DTYPES)
def test_infinities_and_nan(name, dtype):
    inf = math.inf
    rows = torch.randn(6, 19)
    rows[0, 3] = -inf
    rows[1] = -inf
    rows[2, 18] = inf
    rows[3, 0] = math.nan
    rows[4, 1:] = -inf
    rows[5] = torch.linspace(-1e4, 1e4, 19)
    x = rows.to(dtype)
    for one, dim in ((x, 1), (x.T.contiguous(), 0), (x.repeat(1, 80), 1)):
        torch.testing.assert_close(getattr(FF, name)(put(one), dim).cpu(), getattr(F, name)(one, dim), equal_nan=True)
        grad = ((torch.arange(one.numel()) % 5).view(one.shape)).to(dtype)
        ours = run(lambda t, d=dim: getattr(FF, name)(t, d), one, grad, put)[1]
        theirs = run(lambda t, d=dim: getattr(F, name)(t, d), one, grad)[1]
        eps = torch.finfo(dtype).eps * max(1, one.shape[dim] / 100)  # of terms that cancel
        torch.testing.assert_close(ours, theirs, equal_nan=True, atol=16 * eps, rtol=4 * eps)


@NAME
def test_the_general_door(name):
    function, x = getattr(FF, name), put(torch.randn(3, 5, 7))
    for dim in (1, 2):
        fast = function(x, dim)
        compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x, dim).cpu(), fast.cpu())  # PyTorch\'s
        exact(torch.func.vmap(lambda t, d=dim: function(t, d - 1))(x).cpu(), fast.cpu())
    args = x, 1, name == "log_softmax"
    opcheck(torch.ops.fastops.softmax_forward, args, test_utils=("test_schema", "test_faketensor"))
    compare_second_order(lambda t: function(t, 1), lambda t: getattr(F, name)(t, 1), torch.randn(3, 5).double())


@NAME
def test_autocast_computes_in_float32(name):
    """As PyTorch's on a GPU, unless a dtype is given."""
    x = torch.randn(3, 5).bfloat16()
    with torch.autocast(DEVICE.type, torch.bfloat16), fastops.record() as rows:
        y, given = getattr(FF, name)(put(x), 1), getattr(FF, name)(put(x), 1, dtype=torch.bfloat16)
    assert "aten" not in {row.kernel for row in rows}
    assert (y.dtype, given.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(y.cpu(), getattr(F, name)(x.float(), 1))
