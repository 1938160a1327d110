"""The CUDA kernels of fastops.optim on the emulator: see gpu.py. The results are those of torch.optim on the CPU."""

import random

import pytest
import torch
from gpu import DEVICE, SCHEDULES, configured, put
from test_optim import CLASSES, SHAPES, copies, goes_to_torch, options_of, parameters, states
from torch import nn

import fastops

# More parameters than a launch takes, of 48.
MANY = SHAPES * 5


def steps(cls, params, options, count):
    """Ours on the device and PyTorch's, after as many steps, with their parameters and states on the CPU."""
    ours, theirs = cls([put(p) for p in params], **options), cls._torch(copies(params), **options)
    for _ in range(count):
        for mine, other in zip(ours.param_groups[0]["params"], theirs.param_groups[0]["params"], strict=True):
            other.grad = torch.randn(other.shape).to(other.dtype)
            mine.grad = put(other.grad)
        ours.step()
        theirs.step()
    return tuple(
        (
            [p.detach().cpu() for p in one.param_groups[0]["params"]],
            [{n: t.cpu() for n, t in s.items() if t is not None} for s in states(one)],
        )
        for one in (ours, theirs)
    )


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_random_options(cls, dtype):
    rng = random.Random(f"{cls.__name__}{dtype}")
    for i in range(6):
        options = options_of(cls, rng)
        with configured(SCHEDULES[i % len(SCHEDULES)], aligned=i % 2 == 0), fastops.record() as rows:
            ours, theirs = steps(cls, parameters(SHAPES if i else MANY, dtype), options, 3)
        assert "elementwise_cuda" in {row.kernel for row in rows}
        exact = {"rtol": 0, "atol": 0} if cls.__name__ == "SGD" else {}
        tolerance = exact or (
            {"rtol": 1e-5, "atol": 2e-6} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-13}
        )
        torch.testing.assert_close(ours, theirs, equal_nan=True, **tolerance)


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_those_of_the_cpu(cls, dtype):
    """Updated in float32 and rounded once. PyTorch's foreach, which the emulator's device has, rounds otherwise."""
    rng = random.Random(cls.__name__)
    for _ in range(4):
        options = {**options_of(cls, rng), "weight_decay": 0.1, "foreach": False}  # PyTorch's first step
        if cls.__name__ != "SGD":
            options["eps"] = 1e-3
        params = parameters([(33,), (1000,), (3000,)], dtype)
        ours, same = cls([put(p) for p in params], **options), cls(copies(params), **options)
        for _ in range(3):
            for mine, other in zip(ours.param_groups[0]["params"], same.param_groups[0]["params"], strict=True):
                other.grad = torch.randn(other.shape).to(dtype)
                mine.grad = put(other.grad)
            ours.step()
            same.step()
            with torch.no_grad():
                for mine, other in zip(ours.param_groups[0]["params"], same.param_groups[0]["params"], strict=True):
                    torch.testing.assert_close(mine.cpu(), other, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_devices_and_dtypes_are_calls_of_their_own():
    device, host = put(torch.ones(5)), torch.ones(5)
    params = [nn.Parameter(t) for t in (device, host, device.double(), device + 1)]
    optimizer = fastops.optim.SGD(params, lr=0.5)
    for p in params:
        p.grad = torch.ones_like(p)
    with fastops.record() as rows:
        optimizer.step()
    assert [(row.op, row.kernel.endswith("_cuda"), row.dtype) for row in rows] == [
        ("sgd_step", True, "float32"),
        ("sgd_step", False, "float32"),
        ("sgd_step", True, "float64"),
        ("sgd_step", True, "float32"),
    ]
    for p, expected in zip(params, (0.5, 0.5, 0.5, 1.5), strict=True):
        assert (p.detach().cpu() == expected).all()


def test_parameters_that_share_memory():
    """One after the other, as in PyTorch."""
    for cls in CLASSES:
        results = []
        for kind, place in ((cls, put), (cls._torch, torch.clone)):
            torch.manual_seed(0)
            base = place(torch.randn(40000))
            params = [nn.Parameter(base[:39000]), nn.Parameter(base[500:])]
            optimizer = kind(params, lr=0.1, foreach=False)
            for _ in range(3):
                for p in params:
                    p.grad = place(torch.randn(p.shape))
                optimizer.step()
            results.append(base.cpu())
        torch.testing.assert_close(*results, rtol=1e-5, atol=2e-6)


def test_a_gradient_elsewhere_is_pytorchs(monkeypatch):
    p = nn.Parameter(put(torch.ones(3, 4)))
    optimizer = fastops.optim.SGD([p], lr=0.5)
    calls = goes_to_torch(optimizer, monkeypatch)
    p.grad = put(torch.ones(4, 3)).t()
    optimizer.step()
    assert calls == [[1]]
    assert p.device == DEVICE
    assert (p.detach().cpu() == 0.5).all()
