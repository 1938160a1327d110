"""The CUDA kernels of the pools on the emulator: see gpu.py. References and tolerances are the CPU's."""

import pytest
import torch
import torch.nn.functional as F
from compare import close, exact
from each import each
from gpu import DEVICE, SCHEDULES, configured, put
from reference import DTYPES, POOLS
from test_pool import layouts, run, theirs

import fastops
import fastops.functional as FF

EVERY = each("pool", POOLS)
MAXIMA = each("pool", [pool for pool in POOLS if pool.is_max])


@EVERY
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients(pool, dtype):
    for i, layout in enumerate(layouts(pool)):
        x = torch.randn(pool.shape).to(dtype).contiguous(memory_format=layout)
        with configured(SCHEDULES[i % len(SCHEDULES)], aligned=i % 2 == 0), fastops.record() as rows:
            ours = [t.detach().cpu() for t in run(pool.ours, put(x))]
        assert {row.kernel for row in rows} <= {"pool_gather_cuda"}
        expected, reference = theirs(pool, x), run(pool.theirs, x.double())
        if pool.is_max:
            exact(ours[0], expected[0])
        terms = max(1, x.numel() // max(1, ours[0].numel()))
        close(ours[0], reference[0], expected[0], "output", terms)
        close(ours[1], reference[1], expected[1], "gradient", terms)
        if ours[0].numel() and 1 not in ours[0].shape:
            assert ours[0].is_contiguous(memory_format=layout)
            assert ours[1].is_contiguous(memory_format=layout)


@MAXIMA
def test_indices(pool):
    """Of equal maxima, NaNs and windows of infinities as the CPU's kernels, which test_pool.py holds to PyTorch's.

    For a window of negative infinities in channels_last_3d PyTorch names a position outside of it.
    """
    for layout in layouts(pool):
        x = torch.randint(-3, 3, pool.shape).float().contiguous(memory_format=layout)
        flat = x.view(-1) if x.is_contiguous() else x.permute(0, *range(2, x.dim()), 1).reshape(-1)
        if flat.numel() > 8:
            flat[::7] = float("nan")
            flat[1::5] = float("-inf")
        ours, expected = pool.ours(put(x), return_indices=True), pool.ours(x, return_indices=True)
        exact(ours[0].cpu(), expected[0])
        assert torch.equal(ours[1].cpu(), expected[1])


def test_sizes_beyond_two_to_the_31_elements():
    """4 GB of address space, of which only the touched pages exist: the kernels that count in 64 bits."""
    ops = torch.ops.fastops
    x = torch.empty(2**31 + 64, dtype=torch.bfloat16, device=DEVICE)[-64:]
    x.copy_(torch.randn(64))
    actual = FF.max_pool1d(x.view(1, 1, 64), 2)
    exact(actual.cpu(), F.max_pool1d(x.cpu().view(1, 1, 64), 2))
    # A padded window so large that its products need 64 bits; PyTorch takes none that is larger.
    window = [2**31 - 1], [2**31 - 1], [2**30 - 1], [1]
    small = torch.randn(1, 1, 5, device=DEVICE)
    y, indices = ops.max_pool_forward(small, [], *window, False, "plane")
    assert float(y.cpu()) == float(small.cpu().max())
    assert int(indices.cpu()) == int(small.cpu().argmax())
    grad = ops.max_pool_backward(torch.ones_like(y), indices, [1, 1, 5], *window, False, 1, False)
    exact(grad.cpu(), F.one_hot(small.cpu().argmax(), 5).float().view(1, 1, 5))


@pytest.mark.parametrize("name", ["max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d"])
def test_double_backward(name):
    function, argument = getattr(FF, name), 3 if name.startswith("adaptive") else 2

    def second(x, h):
        x = x.detach().requires_grad_()
        (first,) = torch.autograd.grad(function(x, argument).pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(first, x, h)[0]

    x, h = (torch.randn(2, 3, 6, 6, dtype=torch.float64) for _ in range(2))
    torch.testing.assert_close(second(put(x), put(h)).cpu(), second(x, h))


def test_both_doors_and_record():
    x = put(torch.randn(2, 3, 8, 9))
    with fastops.record() as rows:
        fast = FF.max_pool2d(x, 3, 2, 1)
    assert [(row.op, row.kernel, row.shapes) for row in rows] == [("max_pool2d", "pool_gather_cuda", "2x3x8x9")]
    exact(torch.func.vmap(lambda t: FF.max_pool2d(t, 3, 2, 1))(x).cpu(), fast.cpu())
    compiled = torch.compile(lambda t: FF.avg_pool2d(FF.max_pool2d(t, 3, 2, 1), 2), backend="aot_eager", fullgraph=True)
    exact(compiled(x).cpu(), FF.avg_pool2d(fast, 2).cpu())


def test_autocast_leaves_pools_in_their_dtype():
    x = torch.randn(1, 2, 4, 4, 4, device=DEVICE).bfloat16()
    with torch.autocast(DEVICE.type, torch.bfloat16):
        assert FF.avg_pool3d(x, 2).dtype == torch.bfloat16


def test_indices_on_another_device_are_refused():
    x = torch.randn(1, 1, 4, device=DEVICE)
    y, indices = torch.ops.fastops.max_pool_forward(x, [], [2], [2], [0], [1], False, "plane")
    with pytest.raises(RuntimeError, match=r"max_pool_backward: indices must be on grad_output's device .*:0, got cpu"):
        torch.ops.fastops.max_pool_backward(y, indices.cpu(), [1, 1, 4], [2], [2], [0], [1], False, 1, False)
