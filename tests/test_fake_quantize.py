"""fastops.light.fake_quantize: against PyTorch's own in the same dtype, bit by bit, and gradients against theirs."""

import random

import pytest
import torch
from guarded import Arena, extent, random_strides
from tiers import BEST, TIERS, runs
from torch.func import grad, jvp, vmap
from torch.library import opcheck

import fastops
from fastops import _C, light

OPS = torch.ops.fastops
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def theirs(x, scale, zero, low, high, axis=None):
    if axis is None:
        return torch.fake_quantize_per_tensor_affine(x, scale, zero, low, high)
    return torch.fake_quantize_per_channel_affine(x, scale, zero, axis, low, high)


def grid(count, whole=True, low=-128, high=127):
    """Scales and zero points of `count` channels; None: of all."""
    shape = () if count is None else (count,)
    zero = torch.randint(low, high + 1, shape, dtype=torch.int32)
    return torch.rand(shape) * 0.05 + 0.002, zero if whole else zero + 0.25


def both(x, scale, zero, low, high, axis):
    """Outputs and gradients of both, which must be the same."""
    results = []
    g = torch.randn(x.shape).to(x.dtype)
    for function in (theirs, light.fake_quantize):
        leaf = x.detach().clone().as_strided(x.size(), x.stride()) if x.is_contiguous() else x.detach()
        leaf = leaf.requires_grad_()
        y = function(leaf, scale, zero, low, high, axis)
        results.append((y.detach(), torch.autograd.grad(y, leaf, g)[0]))
    (y, dx), (ours, our_dx) = results
    # PyTorch rounds what it gives to float32 even where it is float64.
    assert torch.equal(ours.float(), y.float())
    assert torch.equal(our_dx, dx)
    assert ours.stride() == y.stride()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("levels", [(-128, 127), (0, 255), (-8, 7), (0, 1), (-127, 127), (5, 5)])
def test_against_pytorch(levels, dtype):
    low, high = levels
    for tier in TIERS:
        if not runs(tier, dtype):
            continue
        _C.set_isa(tier)
        try:
            for shape, axis in (
                ((5000,), None),
                ((), None),
                ((7, 33), 0),
                ((7, 33), -1),
                ((2, 17, 5, 3), 1),
                ((3, 0), 0),
            ):
                x = (torch.randn(shape) * 3).to(dtype)
                scale, zero = grid(None if axis is None else x.shape[axis], low=low, high=high)
                both(x, scale, zero, low, high, axis if axis is None else axis % x.dim())
        finally:
            _C.set_isa(BEST)


def test_float_zero_points():
    """round(x / s + z), as PyTorch's per-channel function has it."""
    x, (scale, zero) = torch.randn(6, 100), grid(6, whole=False)
    ours, wanted = light.fake_quantize(x, scale, zero, axis=0), theirs(x, scale, zero, -128, 127, 0)
    # PyTorch multiplies in double.
    assert (ours - wanted).abs().max() <= 2 * torch.finfo(torch.float32).eps * wanted.abs().max()


def test_ties_and_special_numbers():
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 1e30, -1e30, torch.nan, -torch.inf, torch.inf, 3.0, -0.0])
    y = light.fake_quantize(x, 1.0, 1, -2, 3)
    # PyTorch's too, but for +inf, which its x86 kernel turns into the lowest level.
    assert y.tolist() == [0, 2, 2, 0, -2, 2, -3, -3, -3, 2, 2, 0]
    assert torch.equal(theirs(x, 1.0, 1, -2, 3)[:9], y[:9])


def layouts():
    x = torch.randn(4, 6, 10, 8)
    yield "channels_last", x.to(memory_format=torch.channels_last)
    yield "transposed", x.transpose(0, 3)
    yield "permuted", x.permute(2, 0, 3, 1)
    yield "sliced", x[:, 1:5, ::2]
    yield "expanded", x[:1].expand(3, 6, 10, 8)
    yield "one", x[:, :1, :, :1]


@pytest.mark.parametrize("name", [name for name, _ in layouts()])
def test_layouts(name):
    x = dict(layouts())[name]
    for axis in (None, 0, 1, 2, 3):
        both(x, *grid(None if axis is None else x.shape[axis]), -128, 127, axis)


def test_any_strides():
    """Operands against pages that fault, whatever their strides."""
    rng, arena = random.Random(1), Arena()
    for _ in range(60):
        shape = [rng.randint(0, 7) for _ in range(rng.randint(1, 4))]
        strides = random_strides(rng, shape)
        values = torch.randn(extent(shape, strides))
        x = arena.strided(values, strides, shape, at_end=rng.random() < 0.5)
        axis = rng.choice([None, *(i for i, size in enumerate(shape) if size > 0)])
        scale, zero = grid(None if axis is None else shape[axis])
        y = light.fake_quantize(x, scale, zero, -128, 127, axis)
        assert torch.equal(y, theirs(x.contiguous(), scale, zero, -128, 127, axis))


def learned(x, scale, zero, low, high, axis, factor=1.0):
    """PyTorch's: zero points are rounded, and gradients multiplied by a factor."""
    if axis is None:
        return torch._fake_quantize_learnable_per_tensor_affine(x, scale, zero, low, high, factor)
    return torch._fake_quantize_learnable_per_channel_affine(x, scale, zero, axis, low, high, factor)


@pytest.mark.parametrize("axis", [None, 0, 1, 2])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_learned(layout, axis):
    x = {"contiguous": torch.randn(9, 70, 5, 3), "sliced": torch.randn(9, 140, 5, 3)[:, ::2]}.get(layout)
    x = torch.randn(9, 70, 5, 3).to(memory_format=torch.channels_last) if x is None else x
    # PyTorch's function of one zero point rounds negative ones up.
    scale, zero = grid(1, low=0, high=5) if axis is None else grid(x.shape[axis], low=-5, high=5)
    leaves = [x.clone().requires_grad_(), (scale * 10).requires_grad_(), zero.float().requires_grad_()]
    g = torch.randn_like(x)
    wanted = torch.autograd.grad(learned(*leaves, -20, 20, axis), leaves, g)
    ours = torch.autograd.grad(light.fake_quantize(*leaves, -20, 20, axis), leaves, g)
    with torch.enable_grad():  # made of PyTorch's ops, to be differentiated again
        twice = torch.autograd.grad(light.fake_quantize(*leaves, -20, 20, axis), leaves, g, create_graph=True)
    assert torch.equal(ours[0], wanted[0])
    for one, other, third in zip(ours, wanted, twice, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(third.detach(), other, rtol=1e-4, atol=1e-3)
    alone = torch.autograd.grad(light.fake_quantize(x, *leaves[1:], -20, 20, axis), leaves[1:], g)
    assert torch.equal(alone[0], ours[1])
    assert torch.equal(alone[1], ours[2])


def test_threads():
    x, (scale, zero) = torch.randn(300, 1000), grid(1000)
    leaves = [x.requires_grad_(), scale.requires_grad_(), zero.float().requires_grad_()]
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        y = light.fake_quantize(*leaves, axis=1)
        found.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    torch.set_num_threads(1)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_second_derivative():
    x, g = torch.randn(100, requires_grad=True), torch.randn(100, requires_grad=True)
    (dx,) = torch.autograd.grad(light.fake_quantize(x, 0.1, 0, -8, 7), x, g, create_graph=True)
    (dg,) = torch.autograd.grad(dx, g, torch.ones(100))
    assert torch.equal(dg, (x.detach().mul(10).round().clamp(-8, 7) == x.detach().mul(10).round()).float())


def test_doors_and_transforms():
    x, (scale, zero) = torch.randn(4, 8, 10), grid(8)

    def f(x):
        return light.fake_quantize(x, scale, zero, axis=-2)

    y = f(x)
    assert torch.equal(vmap(f)(x), y)
    assert torch.equal(
        vmap(lambda x, s: light.fake_quantize(x, s, 3))(x, scale[:4]),
        light.fake_quantize(x, scale[:4], torch.full((4,), 3), axis=0),
    )
    inside = torch.autograd.grad(f(x.requires_grad_()).sum(), x)[0]
    x = x.detach()
    assert torch.equal(grad(lambda x: f(x).sum())(x), inside)
    assert torch.equal(vmap(grad(lambda x: f(x).sum()))(x), inside)
    value, tangent = jvp(f, (x,), (torch.ones_like(x),))
    assert torch.equal(value, y)
    assert torch.equal(tangent, inside)
    of_scale = jvp(lambda s: light.fake_quantize(x, s, zero, axis=1), (scale,), (torch.ones(8),))[1]
    back = grad(lambda s: light.fake_quantize(x, s, zero, axis=1).sum())(scale)
    torch.testing.assert_close(of_scale.sum((0, 2)), back, rtol=1e-4, atol=1e-3)
    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    z = compiled(x.requires_grad_())
    assert torch.equal(z, y)
    assert torch.equal(torch.autograd.grad(z.sum(), x)[0], inside)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(f(x), y)
    with torch.inference_mode():
        assert torch.equal(f(x), y)
    with torch.no_grad():
        traced = torch.jit.trace(f, x, check_trace=False)
    assert "fastops::" not in str(traced.graph)
    assert torch.equal(traced(x), y)


def test_ops():
    x, (scale, zero) = torch.randn(3, 8, 5), grid(8)
    for layout in (x, x.transpose(0, 2)):
        for need_mask in (False, True):
            leaf = layout.clone().requires_grad_()
            opcheck(OPS.fake_quantize_forward, (leaf, scale, zero, -128, 127, 1, need_mask))
        opcheck(OPS.fake_quantize_backward, (layout.clone().requires_grad_(), layout > 0))
        args = layout, layout, scale, zero.float(), -128, 127, 1, [True, True, True]
        opcheck(OPS.fake_quantize_learned_backward, args)
    opcheck(OPS.fake_quantize_forward, (x, scale[:1], zero[:1], 0, 255, None, True))


def test_records_and_memory():
    x = torch.randn(10000, requires_grad=True)
    with fastops.record() as calls:
        light.fake_quantize(x, 0.1).backward(torch.ones(10000))
    assert [call.op for call in calls] == ["fake_quantize", "fake_quantize_backward"]
    y = light.fake_quantize(x, 0.1)
    assert "FakeQuantize" in y.grad_fn.name()


ERRORS = [
    ((3, 0.1), {}, TypeError, "input must be a Tensor, got int"),
    ((torch.ones(2), "0.1"), {}, TypeError, "scale must be a Tensor or a number, got str"),
    ((torch.ones(2), 0.1, None), {}, TypeError, "zero_point must be a Tensor or a number, got NoneType"),
    ((torch.ones(2), 0.1), {"quant_min": 0.5}, TypeError, "quant_min must be an int, got float"),
    ((torch.ones(2), 0.1), {"axis": 0.5}, TypeError, "axis must be an int, got float"),
    ((torch.ones(2), 0.1), {"axis": 1}, IndexError, "axis must be between -1 and 0 for an input of shape"),
    ((torch.ones(2, 3), torch.ones(2)), {"axis": 1}, RuntimeError, r"scale must have shape \(3,\), a number for each"),
    ((torch.ones(2, 3), torch.ones(2)), {}, RuntimeError, "scale must hold one number where there is no axis"),
    ((torch.ones(2), torch.ones(1).double()), {}, RuntimeError, "scale must be float32, got float64"),
    (
        (torch.ones(2), torch.ones(1), torch.ones(1).half()),
        {},
        RuntimeError,
        "zero_point must be int32, int64 or float32",
    ),
    ((torch.ones(2), torch.ones(1), torch.ones(2)), {}, RuntimeError, r"zero_point must have scale's shape \[1\], got"),
    ((torch.ones(2).int(), 0.1), {}, RuntimeError, "input must be float32, float64, bfloat16 or float16"),
    ((torch.ones(2), 0.1), {"quant_min": 5, "quant_max": 4}, RuntimeError, "quant_min must be at most quant_max"),
    ((torch.ones(2), 0.1), {"quant_max": 1 << 21}, RuntimeError, "and both within"),
]


@pytest.mark.parametrize(("args", "named", "kind", "message"), ERRORS)
def test_errors(args, named, kind, message):
    if len(args) > 1 and isinstance(args[1], torch.Tensor) and len(args) == 2:
        args = *args, torch.zeros(args[1].shape, dtype=torch.int32)
    with pytest.raises(kind, match=message):
        light.fake_quantize(*args, **named)
