"""Operands and gradients of any strides, for every op, forward and backward and through both doors.

The layouts are random (guarded.random_strides): permuted, sliced, expanded, overlapping. Every operand ends or begins
at a page that may not be touched, so that an element that does not belong to it is a fault of the process.
"""

import importlib
import random
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from calls import Call, sizes
from every_op import declared
from guarded import Arena, extent, random_strides
from modes import Through
from reference import ACTIVATIONS
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fastops.functional as FF

ARENAS = [Arena(pages=1024) for _ in range(4)]


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
@pytest.mark.parametrize("op", declared("RANDOM_CALLS"), ids=lambda op: op.__name__.removeprefix("random_"))
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


def _result(name: str, rng: random.Random) -> tuple[list[Sequence[int]], Callable[..., Tensor]]:
    """Shapes of random operands of a function, and what calls it (of a module like torch.nn.functional) with them."""
    least, most = (2 if name == "batch_norm" else 1 if name in _OVER_A_DIMENSION else 0), 5
    shape = [rng.choice((1, 2, 3, 4)) for _ in range(rng.randint(least, most))]
    channels = shape[1:2] if len(shape) > 1 else [1]
    dim, last = rng.randrange(len(shape) or 1), rng.randint(1, max(len(shape), 1))
    if name == "mse_loss":
        reduction = rng.choice(("none", "none", "mean"))
        return [shape, shape], lambda module, x, t: module.mse_loss(x, t, reduction=reduction)
    if name == "cross_entropy":
        target = torch.zeros([n for i, n in enumerate(shape) if i != (0 if len(shape) == 1 else 1)], dtype=torch.int64)
        reduction = rng.choice(("none", "none", "sum"))
        return [shape], lambda module, x: module.cross_entropy(x, target, reduction=reduction)
    if name == "batch_norm":
        shape[0] += 1  # more than one value of each channel
        training = rng.random() < 0.5
        statistics = (None, None) if training else (torch.zeros(channels), torch.ones(channels))
        return [shape, channels], lambda module, x, w: module.batch_norm(x, *statistics, w, training=training)
    if name in ("layer_norm", "rms_norm"):
        with_weight = rng.random() < 0.5
        normalized = shape[-last:]
        return [shape, normalized], lambda module, x, w: getattr(module, name)(
            x, normalized, w if with_weight else None
        )
    if name == "prelu":
        return [shape, rng.choice((channels, [1]))], lambda module, x, w: module.prelu(x, w)
    if name == "glu":
        shape[dim] *= 2
    arguments = {"glu": (dim,), "softmax": (dim,), "log_softmax": (dim,), "threshold": (0.1, 0.2)}.get(name, ())
    return [shape], lambda module, x: getattr(module, name)(x, *arguments)


_OVER_A_DIMENSION = ("glu", "softmax", "log_softmax", "cross_entropy", "layer_norm", "rms_norm")
_STEMS = ("activation", "batch_norm", "layer_norm", "loss", "softmax")
_IN_PLACE = ("celu_", "elu_", "hardtanh_", "leaky_relu_", "relu_", "selu_", "threshold_")
_SAME_STRIDES = [
    name
    for stem in _STEMS
    for name in importlib.import_module(f"fastops.functional._{stem}").__all__
    if name not in _IN_PLACE
]


@pytest.mark.parametrize("door", ["fast", "general"])
@pytest.mark.parametrize("name", _SAME_STRIDES)
def test_strides_are_pytorchs(name, door):
    """Of results of elementwise functions, norms and losses; a channels_last image is one layout of many."""
    seen = set()
    for seed in range(200):
        rng = random.Random(seed)
        shapes, call = _result(name, rng)
        operands = [_place(rng, arena, shape, torch.float32) for arena, shape in zip(ARENAS, shapes, strict=False)]
        if len(shapes[0]) == 4 and rng.random() < 0.3:
            operands[0] = operands[0].to(memory_format=torch.channels_last)
        leaves = [t.detach().requires_grad_(seed % 2 == 0) for t in operands]
        expected = call(F, *operands)
        # PyTorch's logsigmoid gives contiguous results on the CPU, and keeps strides on a GPU.
        layout = F.sigmoid(*operands) if name == "logsigmoid" else expected
        with _door(door):
            actual = call(FF, *leaves)
        assert _steps(actual) == _steps(layout), f"seed {seed}: {_described(operands[:-1], operands[-1])}"
        torch.testing.assert_close(actual.detach(), expected, atol=2e-5, rtol=1e-4)
        seen.add(layout.is_contiguous())
    always = {"layer_norm", "softmax", "log_softmax", "cross_entropy"}
    assert seen == ({True} if name in always else {True, False})


@pytest.mark.parametrize("op", declared("RANDOM_CALLS"), ids=lambda op: op.__name__.removeprefix("random_"))
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
        case = rng.choice([c for c in ACTIVATIONS if c.in_place])
        shape = sizes(rng, rng.randint(1, 4))
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
