"""The plans that the fast door keeps (csrc/torch/call.h): a repeated call decides nothing, a changed one does."""

import threading

import pytest
import torch
from torch import nn

import fastops
import fastops.functional as FF
from fastops import _C

CALLS = {
    "linear": (lambda x: FF.linear(x, torch.ones(3, 8)), (5, 8)),
    "conv": (lambda x: FF.conv2d(x, torch.ones(3, 2, 3, 3)), (1, 2, 6, 6)),
    "conv_pool": (lambda x: FF.conv_max_pool2d(x, torch.ones(3, 2, 3, 3), pool_size=2), (1, 2, 6, 6)),
    "pool": (lambda x: FF.max_pool2d(x, 2), (1, 2, 6, 6)),
    "activation": (FF.gelu, (7, 9)),
    "prelu": (lambda x: FF.prelu(x, torch.ones(1)), (7, 9)),
    "glu": (FF.glu, (7, 10)),
}


def decisions(call, *arguments) -> int:
    """How many plans a call makes."""
    before = _C.plans_made()
    call(*arguments)
    return _C.plans_made() - before


def on_new_thread(body) -> None:
    """Runs body on a thread that has no plans yet; raises what it raises."""
    errors = []

    def run() -> None:
        try:
            body()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]


@pytest.mark.parametrize("name", CALLS)
def test_a_repeated_call_decides_nothing(name):
    call, shape = CALLS[name]

    def body() -> None:
        x = torch.randn(shape)
        assert decisions(call, x) == 1
        assert decisions(call, x) == 0
        assert decisions(call, torch.randn(shape)) == 0  # the same call on other memory
        assert decisions(call, x.double() if name in ("activation", "glu", "pool") else torch.randn(2, *shape[1:])) == 1

    on_new_thread(body)


def test_training_decides_nothing_after_the_first_step():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 10))
    fastops.replace_(model)
    x = torch.randn(8, 1, 8, 8)

    def step() -> None:
        model(x).sum().backward()

    def body() -> None:
        step()
        step()
        assert decisions(step) == 0

    on_new_thread(body)


def test_threads_tier_and_precision_are_decided_anew():
    x, w = torch.randn(16, 64, 12, 12), torch.randn(64, 64, 3, 3)
    threads, best = torch.get_num_threads(), _C.isa_used()

    def call() -> torch.Tensor:
        return FF.conv2d(x, w, padding=1)

    def body() -> None:
        expected = torch.nn.functional.conv2d(x, w, padding=1)
        try:
            torch.set_num_threads(2)
            assert decisions(call) == 1
            two = call()
            torch.set_num_threads(1)
            assert decisions(call) == 1
            assert torch.equal(call(), two)
            assert _C.set_isa("scalar")
            assert decisions(call) == (best != "scalar")
            with fastops.record() as calls:
                torch.testing.assert_close(call(), expected, rtol=1e-3, atol=1e-2)
            assert calls[0].kernel.endswith("_scalar")
            _C.set_isa(best)
            assert decisions(call) == (best != "scalar")
            before = call()
            fastops.set_conv_precision("medium")
            assert decisions(call) == 1
            torch.testing.assert_close(call(), before, rtol=1e-2, atol=1e-2)
        finally:
            fastops.set_conv_precision("highest")
            _C.set_isa(best)
            torch.set_num_threads(threads)

    on_new_thread(body)


def test_more_calls_than_slots():
    """All of them are right, and what is kept is bounded: the first is decided again."""

    def body() -> None:
        with torch.no_grad():
            for n in range(1, 400):
                x, w = torch.ones(3, n), torch.ones(2, n)
                assert FF.linear(x, w).tolist() == [[n, n]] * 3
        assert decisions(FF.linear, torch.ones(3, 1), torch.ones(2, 1)) == 1

    on_new_thread(body)


def test_threads_have_plans_of_their_own():
    """Eight at once, on calls that fall into the same slots."""
    failures = []

    def body(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for _ in range(200):
                m, n, k = (int(torch.randint(1, 20, (), generator=generator)) for _ in range(3))
                x, w = torch.full((m, k), 2.0), torch.full((n, k), 3.0)
                if not torch.equal(FF.linear(x, w, activation="relu"), torch.full((m, n), 6.0 * k)):
                    failures.append((m, n, k))

    threads = [threading.Thread(target=body, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_signs_and_nan_of_parameters_tell_calls_apart():
    x = torch.tensor([-1.0, -2.0, 3.0])

    def signs(values) -> list[float]:
        return torch.copysign(torch.ones(3), values).tolist()

    def body() -> None:
        for zero in (0.0, -0.0, 0.0):
            assert signs(FF.threshold(x, 0, zero)) == signs(torch.threshold(x, 0, zero))
            assert signs(FF.hardtanh(x, zero, 1.0)) == signs(torch.nn.functional.hardtanh(x, zero, 1.0))
            assert signs(FF.leaky_relu(x, zero)) == signs(torch.nn.functional.leaky_relu(x, zero))
            layer = FF.linear(x[None], torch.eye(3), activation=nn.Threshold(0, zero))
            assert signs(layer[0]) == signs(torch.threshold(x, 0, zero))
        FF.leaky_relu(x, float("nan"))
        assert decisions(FF.leaky_relu, x, float("nan")) == 0

    on_new_thread(body)
