"""Pools of levels of 8 bits, which frozen models have: every result to the bit, against sums of integers. The kernels
alone, with threads and guard pages: cpp/test_pool_int8.cpp. What freeze makes of pools: test_frozen_int8.py.
"""

import copy
import pickle
import random

import pytest
import torch
import torch.nn.functional as F
from each import each
from guarded import Arena
from tiers import BEST, TIERS
from torch import nn

import fastops
from fastops import _C
from fastops._frozen_int8 import FrozenAvgPoolInt8, FrozenMaxPoolInt8, Levels

CHANNELS = (1, 3, 15, 16, 17, 31, 63, 64, 65, 130)
ARENA = Arena(64)


@pytest.fixture(params=TIERS)
def tier(request):
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(BEST)


# ---- the reference


def windows_of(x, kernel, stride, padding, dilation=(1, 1), ceil_mode=False):
    """(elements of the windows, or none: -1; how many count with padding; the window's number), each
    (batch, channels, height, width, kernel)."""
    padded = F.pad(x.to(torch.int64), (padding[1], padding[1], padding[0], padding[0]), value=-1)
    sizes = []
    for i in (0, 1):
        span = x.shape[2 + i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1
        size = (span + (stride[i] - 1 if ceil_mode else 0)) // stride[i] + 1
        if ceil_mode and (size - 1) * stride[i] >= x.shape[2 + i] + padding[i]:
            size -= 1
        sizes.append(size)
    rows = torch.arange(sizes[0])[:, None] * stride[0] + torch.arange(kernel[0]) * dilation[0]
    columns = torch.arange(sizes[1])[:, None] * stride[1] + torch.arange(kernel[1]) * dilation[1]
    # What a window of ceil_mode has beyond the padding is -2: it does not count at all.
    beyond = (0, int(columns.max()) + 1, 0, int(rows.max()) + 1)
    padded = F.pad(padded, beyond, value=-2)
    return padded[:, :, rows[:, None, :, None], columns[None, :, None, :]].flatten(4)


def averages(x, divisor, zero, factor, offset, like):
    """What pool_int8.h says of windows (..., elements), where divisor is a number or a tensor (...)."""
    sums = torch.where(x >= 0, x - zero, 0).sum(-1)
    factor = torch.tensor(factor, dtype=torch.float32) / torch.as_tensor(divisor, dtype=torch.float32)
    y = sums.float() * factor + torch.tensor(offset, dtype=torch.float32)
    return torch.round(y.clamp(0, 255)).to(torch.uint8) if like is None else y.to(like.dtype)


def adaptive_windows(x, size):
    """The windows of an adaptive pool, as a list of (row, column, elements)."""
    for i in range(size[0]):
        for j in range(size[1]):
            spans = [
                slice(at * n // out, -(-(at + 1) * n // out))
                for at, n, out in ((i, x.shape[2], size[0]), (j, x.shape[3], size[1]))
            ]
            yield i, j, x[:, :, spans[0], spans[1]].to(torch.int64).flatten(2)


# ---- random calls


def random_image(rng, shape):
    """Levels of a layout as a stranger's may have, which are sometimes all 0 or all 255, or one of these."""
    kind = rng.choice(("any", "any", "any", "ends", "0", "255"))
    if kind in ("0", "255"):
        x = torch.full(shape, int(kind), dtype=torch.uint8)
    else:
        x = torch.randint(256, shape, dtype=torch.uint8)
        x = torch.where(x < 128, 0, 255).to(torch.uint8) if kind == "ends" else x
    layout = rng.choice(("dense", "last", "last at a page", "sliced", "every other", "permuted", "expanded", "offset"))
    if layout == "last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "last at a page":  # which is read as it is
        return ARENA.tensor(x.permute(0, 2, 3, 1).contiguous(), rng.random() < 0.5).permute(0, 3, 1, 2)
    if layout == "sliced":
        return torch.cat([x, x], 1)[:, x.shape[1] :]
    if layout == "every other":
        return torch.stack([x, x], 4)[..., 1]
    if layout == "permuted":
        return x.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == "expanded":
        return x[:, :, :1].expand_as(x)
    return torch.cat([x.flatten()[:1], x.flatten()])[1:].view_as(x) if layout == "offset" else x


def random_windows(rng, dilated):
    kernel = (rng.randint(1, 5), rng.randint(1, 5))
    stride = (rng.randint(1, 4), rng.randint(1, 4)) if rng.random() < 0.7 else kernel
    padding = tuple(rng.randint(0, k // 2) for k in kernel)
    dilation = (rng.randint(1, 3), rng.randint(1, 3)) if dilated and rng.random() < 0.3 else (1, 1)
    # A window has to fit the padded image.
    least = [d * (k - 1) + 1 - 2 * p for k, p, d in zip(kernel, padding, dilation, strict=True)]
    sizes = [max(1, n) + rng.randint(0, 9) for n in least]
    return kernel, stride, padding, dilation, (rng.randint(1, 3), rng.choice(CHANNELS), *sizes)


def random_numbers(rng):
    """zero, factor, offset, like: of an average. Some leave the levels at either end."""
    factor = rng.choice((1.0, 0.37, 0.003, 3.7, 40.0, -0.8))
    like = rng.choice((None, None, torch.empty(0), torch.empty(0, dtype=torch.bfloat16), torch.empty(0).half()))
    return rng.choice((0, 255, rng.randint(0, 255))), factor, rng.choice((0.0, 0.5, 117.25, -300.0, 500.0)), like


@each("seed", range(60))
def test_maxima(seed, tier):
    rng = random.Random(seed)
    *windows, shape = random_windows(rng, dilated=True)
    ceil_mode = rng.random() < 0.5
    x = random_image(rng, shape)
    with fastops.record() as calls:
        y = _C.max_pool_int8(x, *windows, ceil_mode)
    assert [(call.op, call.kernel) for call in calls] == [("pool_int8", f"maximum_int8_{tier}")]
    assert torch.equal(y.to(torch.int64), windows_of(x, *windows, ceil_mode).amax(-1).clamp(min=0))
    assert y.dtype == torch.uint8
    assert y.is_contiguous(memory_format=torch.channels_last)


@each("seed", range(80))
def test_averages(seed, tier):
    rng = random.Random(seed)
    kernel, stride, padding, _, shape = random_windows(rng, dilated=False)
    ceil_mode, include, override = rng.random() < 0.5, rng.random() < 0.5, rng.choice((0, 0, 3, -2))
    x, numbers = random_image(rng, shape), random_numbers(rng)
    windows = windows_of(x, kernel, stride, padding, ceil_mode=ceil_mode)
    divisor = override or (windows >= (-1 if include else 0)).sum(-1)
    with fastops.record() as calls:
        y = _C.avg_pool_int8(x, kernel, stride, padding, ceil_mode, include, override, *numbers)
    assert [(call.op, call.kernel) for call in calls] == [("pool_int8", f"average_int8_{tier}")]
    assert torch.equal(y, averages(windows, divisor, *numbers))
    assert y.is_contiguous(memory_format=torch.channels_last)


@each("seed", range(40))
def test_adaptive_averages(seed, tier):
    rng = random.Random(seed)
    shape = (rng.randint(1, 3), rng.choice(CHANNELS), rng.randint(1, 12), rng.randint(1, 12))
    size = rng.choice(((1, 1), (rng.randint(1, 7), rng.randint(1, 7))))
    x, numbers = random_image(rng, shape), random_numbers(rng)
    y = _C.adaptive_avg_pool_int8(x, size, *numbers)
    assert y.shape == (*shape[:2], *size)
    for i, j, window in adaptive_windows(x, size):
        assert torch.equal(y[:, :, i, j], averages(window, window.shape[-1], *numbers))


def test_saturation_and_halves(tier):
    """Levels end at 0 and 255, and halves go to the even one."""
    x = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    one = (1, 1), (1, 1), (0, 0), False, True, 0
    for factor, offset in ((1.0, 0.5), (0.5, 0.0), (-1.0, 255.5), (2.0, -128.0), (1.0, 1e30), (-1e30, 0.0)):
        y = _C.avg_pool_int8(x, *one, 0, factor, offset, None)
        assert torch.equal(y, torch.round((x.float() * factor + offset).clamp(0, 255)).to(torch.uint8))


def test_large_windows(tier):
    """Sums of up to 2^23 elements are exact, and rounded once."""
    for channels, size, value, zero in ((20, 256, 255, 0), (17, 300, 0, 255), (3, 300, 255, 1), (1, 2896, 255, 0)):
        x = torch.full((1, channels, size, size), value, dtype=torch.uint8)
        x[:, channels // 2, 3, 200] = 128
        sums = x.to(torch.int64).sum((2, 3)) - size * size * zero
        y = _C.adaptive_avg_pool_int8(x, (1, 1), zero, float(size * size), 0.0, torch.empty(0))
        assert torch.equal(y[:, :, 0, 0], sums.float())


def test_windows_that_are_too_large():
    """Sums of more elements need not fit 32 bits: PyTorch's ops take them."""
    x = torch.full((1, 1, 2897, 2897), 255, dtype=torch.uint8)
    assert _C.adaptive_avg_pool_int8(x, (1, 1), 0, 1.0, 0.0, None) is NotImplemented
    layer = FrozenAvgPoolInt8({"output_size": 1}, LEVELS, None, torch.float32)
    torch.testing.assert_close(layer.call(x), torch.full((1, 1, 1, 1), (255 - LEVELS.zero) * LEVELS.scale))


def test_threads():
    x = torch.randint(256, (4, 64, 40, 40), dtype=torch.uint8)
    calls = [
        lambda: _C.max_pool_int8(x, (3, 3), (2, 2), (1, 1), (1, 1), False),
        lambda: _C.avg_pool_int8(x, (3, 3), (2, 2), (1, 1), True, False, 0, 9, 0.3, 4.0, None),
        lambda: _C.adaptive_avg_pool_int8(x, (7, 7), 9, 0.3, 4.0, torch.empty(0)),
    ]
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append([call() for call in calls])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for more in results[1:] for one, other in zip(results[0], more, strict=True))


# ---- the layers around it


LEVELS, OTHER = Levels(0.05, 7), Levels(0.11, 130)
FIXED = {"kernel_size": 3, "stride": 2, "padding": 1, "ceil_mode": True, "count_include_pad": False}
AVERAGES = {
    "fixed": {**FIXED, "divisor_override": None},
    "divided": {**FIXED, "stride": None, "divisor_override": 4},
    "adaptive": {"output_size": (2, 3)},
    "whole": {"output_size": 1},
}


@pytest.mark.parametrize("windows", AVERAGES)
def test_layers_of_averages(windows):
    """In PyTorch's ops, for whatever is not plain, an average is the same but for the order of roundings."""
    x = torch.randint(256, (2, 20, 9, 8), dtype=torch.uint8)
    for result, dtype in ((OTHER, torch.float32), (None, torch.float32), (None, torch.bfloat16)):
        layer = FrozenAvgPoolInt8(AVERAGES[windows], LEVELS, result, dtype)
        y, z = layer.call(x), layer(x)
        assert y.dtype == z.dtype == (dtype if result is None else torch.uint8)
        assert y.shape == z.shape
        bound = 1 if result is not None else 4 * torch.finfo(dtype).eps * float(z.float().abs().max())
        assert (y.float() - z.float()).abs().max() <= bound
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert torch.equal(other.call(x), y)


def test_layers_of_maxima():
    x = torch.randint(256, (2, 20, 9, 8), dtype=torch.uint8)
    for arguments in ((2,), (3, 2, 1), ((3, 2), (2, 1), (1, 0), (1, 2), True)):
        layer = FrozenMaxPoolInt8(*arguments)
        assert torch.equal(layer.call(x), layer(x))
        names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")
        theirs = nn.MaxPool2d(**dict(zip(names, arguments, strict=False)))
        assert torch.equal(layer(x).float(), theirs(x.float()))


def test_what_is_not_plain_goes_to_pytorchs_ops():
    x = torch.randint(256, (2, 3, 6, 6), dtype=torch.uint8)
    maximum = (2, 2), (2, 2), (0, 0), (1, 1), False
    for other in (x.float(), x[0], x.to("meta"), "x", None):
        assert _C.max_pool_int8(other, *maximum) is NotImplemented
    layer = FrozenMaxPoolInt8(2)
    assert torch.equal(torch.func.vmap(layer.call)(x.unsqueeze(1)).squeeze(1), layer.call(x))


def test_nothing():
    x = torch.zeros(0, 3, 6, 6, dtype=torch.uint8)
    assert _C.max_pool_int8(x, (2, 2), (2, 2), (0, 0), (1, 1), False).shape == (0, 3, 3, 3)
    assert _C.adaptive_avg_pool_int8(x, (1, 2), 0, 1.0, 0.0, torch.empty(0)).shape == (0, 3, 1, 2)
    assert _C.adaptive_avg_pool_int8(torch.zeros(2, 3, 6, 6, dtype=torch.uint8), (0, 2), 0, 1.0, 0.0, None).numel() == 0


BAD = {
    "kernel": ((0, 2), (1, 1), (0, 0), (1, 1)),
    "stride": ((2, 2), (1, 0), (0, 0), (1, 1)),
    "padding": ((2, 2), (1, 1), (2, 0), (1, 1)),
    "dilation": ((2, 2), (1, 1), (0, 0), (0, 1)),
    "kernel_size 7 with dilation 1 is larger": ((7, 7), (1, 1), (0, 0), (1, 1)),
}


@pytest.mark.parametrize("what", BAD)
def test_errors(what):
    """What PyTorch's pool refuses is refused."""
    x = torch.zeros(1, 1, 6, 6, dtype=torch.uint8)
    with pytest.raises(RuntimeError):
        F.max_pool2d(x.float(), *BAD[what])
    with pytest.raises(RuntimeError, match=rf"pool_int8: .*{what}"):
        _C.max_pool_int8(x, *BAD[what], False)
