"""Operands and gradients of any strides, for every op, forward and backward and through both doors.

The layouts are random (guarded.random_strides): permuted, sliced, expanded, overlapping. Every operand ends or begins
at a page that may not be touched, so that an element that does not belong to it is a fault of the process.
"""

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from guarded import Arena, extent, random_strides
from modes import Through
from reference import ACTIVATIONS, INPLACE
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fastops.functional as FF

ARENAS = [Arena(pages=1024) for _ in range(4)]


class Call(NamedTuple):
    ours: Callable[..., Tensor]
    theirs: Callable[..., Tensor]
    shapes: Sequence[Sequence[int]]  # of the input and the parameters


def _sizes(rng: random.Random, dims: int, least: int = 1, most: int = 7) -> tuple[int, ...]:
    return tuple(rng.randint(least, most) for _ in range(dims))


def _activation(rng: random.Random) -> Call:
    case = rng.choice(ACTIVATIONS)
    return Call(case.ours, case.theirs, [_sizes(rng, rng.randint(0, 5), 0 if rng.random() < 0.05 else 1)])


def _prelu(rng: random.Random) -> Call:
    channels = rng.choice((1, 3, 17))
    shape = (rng.randint(1, 4), channels, *_sizes(rng, rng.randint(0, 3)))
    return Call(FF.prelu, F.prelu, [shape, (rng.choice((1, channels)),)])


def _glu(rng: random.Random) -> Call:
    shape = list(_sizes(rng, rng.randint(1, 4)))
    dim = rng.randrange(-len(shape), len(shape))
    shape[dim] *= 2
    return Call(lambda x: FF.glu(x, dim), lambda x: F.glu(x, dim), [shape])


def _linear(rng: random.Random) -> Call:
    k, n = rng.choice((1, 5, 16, 33, 70)), rng.choice((1, 4, 17, 40))
    shapes = [(*_sizes(rng, rng.randint(0, 3), 1, 6), k), (n, k), (n,)]
    kind = rng.choice(("relu", "silu", None))
    act = {"relu": F.relu, "silu": F.silu, None: lambda z: z}[kind]
    return Call(lambda *t: FF.linear(*t, activation=kind), lambda *t: act(F.linear(*t)), shapes[: rng.choice((2, 3))])


def _mlp(rng: random.Random) -> Call:
    k, n, m = _sizes(rng, 3, 1, 20)
    return Call(
        lambda x, v, w: FF.mlp(x, [v, w]),
        lambda x, v, w: F.linear(F.relu(F.linear(x, v)), w),
        [(rng.randint(1, 6), k), (n, k), (m, n)],
    )


def _conv(rng: random.Random) -> Call:
    dims = rng.randint(1, 3)
    groups = rng.choice((1, 1, 2))
    channels, outputs = groups * rng.choice((1, 2, 8, 16)), groups * rng.choice((1, 4, 16))
    name = rng.choice(("conv", "conv_transpose")) + f"{dims}d"
    kernel = (rng.randint(1, 3),) * dims
    first, second = (channels, outputs) if "transpose" in name else (outputs, channels)
    shapes = [(rng.randint(1, 3), channels, *_sizes(rng, dims, 3, 7)), (first, second // groups, *kernel), (outputs,)]
    stride = rng.choice((1, 2))
    if rng.random() < 0.2 and kernel[0] == 1:
        shapes[0] = shapes[0][1:]  # no batch
    theirs, ours = getattr(F, name), getattr(FF, name)
    return Call(
        lambda *t: ours(*t, stride=stride, groups=groups, padding=kernel[0] // 2),
        lambda *t: theirs(*t, stride=stride, groups=groups, padding=kernel[0] // 2),
        shapes,
    )


def _conv_pool(rng: random.Random) -> Call:
    dims = rng.randint(1, 3)
    conv, pool = getattr(F, f"conv{dims}d"), getattr(F, f"max_pool{dims}d")
    channels, outputs = rng.choice((1, 2, 16)), rng.choice((1, 8, 33))
    shapes = [(rng.randint(1, 2), channels, *_sizes(rng, dims, 4, 7)), (outputs, channels, *(3,) * dims), (outputs,)]
    return Call(
        lambda *t: getattr(FF, f"conv_max_pool{dims}d")(*t, padding=1, activation="relu"),
        lambda *t: pool(F.relu(conv(*t, padding=1)), 2),
        shapes,
    )


def _pool(rng: random.Random) -> Call:
    dims = rng.randint(1, 3)
    kind = rng.choice(("max_pool", "avg_pool", "adaptive_max_pool", "adaptive_avg_pool")) + f"{dims}d"
    args = (rng.randint(1, 4),) if kind.startswith("adaptive") else rng.choice(((2,), (3, 2, 1), (2, 1, 1), (3, 1)))
    shape = (rng.randint(1, 3), rng.choice((1, 2, 16, 17)), *_sizes(rng, dims, 4, 7))
    shape = shape if rng.random() < 0.8 else shape[1:]
    return Call(lambda x: getattr(FF, kind)(x, *args), lambda x: getattr(F, kind)(x, *args), [shape])


OPS = [_activation, _prelu, _glu, _linear, _mlp, _conv, _conv_pool, _pool]


def _place(rng: random.Random, arena: Arena, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    strides = random_strides(rng, shape)
    values = torch.randint(-6, 7, (extent(shape, strides),)) / 4
    return arena.strided(values.to(dtype), strides, shape, rng.random() < 0.5)


def _run(function: Callable[..., Tensor], operands: Sequence[Tensor], grad: Tensor) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in operands]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


def _random_call(op: Callable[[random.Random], Call], seed: int) -> tuple[Call, list[Tensor], Tensor]:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    call = op(rng)
    dtype = rng.choice((torch.float32, torch.float32, torch.float64))
    operands = [_place(rng, arena, shape, dtype) for arena, shape in zip(ARENAS, call.shapes, strict=False)]
    result = call.theirs(*(t.detach() for t in operands))
    return call, operands, _place(rng, ARENAS[3], result.shape, dtype)


def _steps(tensor: Tensor) -> list[int]:
    """The strides that mean something."""
    return [step for n, step in zip(tensor.shape, tensor.stride(), strict=True) if n > 1]


def _described(operands: Sequence[Tensor], grad: Tensor) -> str:
    return ", ".join(f"{tuple(t.shape)} with strides {t.stride()}" for t in (*operands, grad))


@pytest.mark.parametrize("door", ["fast", "general"])
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__[1:])
def test_any_strides(op, door):
    for seed in range(150 if door == "fast" else 60):
        call, operands, grad = _random_call(op, seed)
        expected = _run(call.theirs, [t.clone() for t in operands], grad.clone())
        if door == "fast":
            actual = _run(call.ours, operands, grad)
        else:
            with Through():
                actual = _run(call.ours, operands, grad)
        what = f"seed {seed}: {_described(operands, grad)}"
        for one, two in zip(actual, expected, strict=True):
            torch.testing.assert_close(one, two, atol=2e-5, rtol=1e-4, msg=lambda m, what=what: f"{what}\n{m}")


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__[1:])
def test_fake_kernels_promise_the_strides(op):
    """What a compiler is told about a result is what the op returns: shape, strides and dtype, forward and backward."""
    for seed in range(1000, 1040):
        call, operands, grad = _random_call(op, seed)
        with Through():
            real = _run(call.ours, operands, grad)
        with FakeTensorMode(allow_non_fake_inputs=False) as mode:
            fake = _run(call.ours, [mode.from_tensor(t) for t in operands], mode.from_tensor(grad))
        for one, two in zip(fake, real, strict=True):
            assert (one.shape, _steps(one), one.dtype) == (two.shape, _steps(two), two.dtype), (
                f"seed {seed}: {_described(operands, grad)}: promised {tuple(one.shape)} {one.stride()} {one.dtype}, "
                f"returned {tuple(two.shape)} {two.stride()} {two.dtype}"
            )


@pytest.mark.parametrize("door", ["fast", "general"])
def test_in_place_on_any_strides(door):
    """What is written lies in the tensor and nowhere between its elements; an expanded tensor is refused.

    PyTorch does not look for every overlap. Where it finds none in a tensor that overlaps itself, values are whatever
    was written last, and only the memory around them is compared.
    """
    refused = 0
    for seed in range(300):
        rng = random.Random(seed)
        torch.manual_seed(seed)
        case = rng.choice([c for c in ACTIVATIONS if c.function in INPLACE])
        shape = _sizes(rng, rng.randint(1, 4))
        strides = random_strides(rng, shape)
        values = torch.randn(extent(shape, strides))
        memory = ARENAS[0].tensor(values, rng.random() < 0.5)
        expected = values.clone()
        what = f"seed {seed}: {case}, {shape} with strides {strides}"
        try:
            case.theirs(expected.as_strided(shape, strides), inplace=True)
        except RuntimeError:
            refused += 1
            with pytest.raises(RuntimeError), _door(door):
                case.ours(memory.as_strided(shape, strides), inplace=True)
            torch.testing.assert_close(memory, values, atol=0, rtol=0, msg=what)
            continue
        with _door(door):
            case.ours(memory.as_strided(shape, strides), inplace=True)
        touched = torch.zeros(len(values), dtype=torch.int64)
        touched.index_put_((torch.arange(len(values)).as_strided(shape, strides).flatten(),), torch.tensor(1), True)
        memory[touched > 1] = expected[touched > 1]
        torch.testing.assert_close(memory, expected, atol=2e-5, rtol=1e-4, msg=lambda m, what=what: f"{what}\n{m}")
    assert 30 < refused < 200  # both kinds were there


def _door(name: str):
    return Through() if name == "general" else torch.enable_grad()
