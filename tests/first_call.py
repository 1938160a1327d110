"""The first call of a process, in every state that it may find: run by test_first_call.py as a process of its own.

The process imports torch and fastops and calls nothing. For each state it forks a child, whose first call of fastops is
in that state; afterwards the child trains a layer of every kind outside of the state and asks whether the fast door is
open. A line "state: ok", or what is wrong, for each.
"""

import contextlib
import os
import sys
import traceback

import torch
from modes import Through
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

import fastops
import fastops.functional as FF


def model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.Hardswish(inplace=True), nn.MaxPool2d(2), nn.Conv2d(4, 4, 1), nn.PReLU(),
        nn.AvgPool2d(1), nn.Flatten(), nn.Linear(36, 8), nn.SiLU(inplace=True), nn.GLU(), nn.Linear(4, 2), nn.Tanh(),
    )  # fmt: skip


def call(x=None):
    """Every kind of op once, forward."""
    m = model()
    fastops.replace_(m)
    return m(torch.ones(3, 2, 8, 8) if x is None else x)


@contextlib.contextmanager
def default_dtype(dtype):
    torch.set_default_dtype(dtype)
    yield
    torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def default_device(device):
    torch.set_default_device(device)
    yield
    torch.set_default_device(None)


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


def in_mode(mode):
    def first():
        with mode():
            call()

    return first


def as_a_fake():
    with FakeTensorMode():
        call()


def vmapped():
    torch.func.vmap(lambda x: FF.gelu(FF.linear(x, torch.ones(4, 8))))(torch.ones(3, 5, 8))


def differentiated():
    torch.func.grad(lambda x: FF.elu(x).sum())(torch.ones(5))


def dual():
    with forward_ad.dual_level():
        FF.linear(forward_ad.make_dual(torch.ones(3, 8), torch.ones(3, 8)), torch.ones(4, 8))


def traced():
    make_fx(lambda x: FF.relu(FF.linear(x, torch.ones(4, 8))))(torch.ones(3, 8))
    torch.jit.trace(lambda x: FF.relu(x), torch.ones(3))


def compiled():
    torch.compile(lambda x: FF.relu(FF.linear(x, torch.ones(4, 8))), backend="eager")(torch.ones(3, 8))


def exported():
    torch.export.export(nn.Sequential(fastops.nn.Linear(8, 4), fastops.nn.ReLU()), (torch.ones(3, 8),))


def refused():
    for bad in (lambda: FF.linear(torch.ones(3, 8), torch.ones(4, 7)), lambda: FF.relu("no tensor")):
        with contextlib.suppress(RuntimeError, TypeError, AttributeError):
            bad()


def backward_in_another_thread():
    import threading

    thread = threading.Thread(target=lambda: call().sum().backward())
    thread.start()
    thread.join()


STATES = {
    "nothing": call,
    "inference mode": in_mode(torch.inference_mode),
    "no_grad": in_mode(torch.no_grad),
    "autocast": in_mode(lambda: torch.autocast("cpu", torch.bfloat16)),
    "autocast without cache": in_mode(lambda: torch.autocast("cpu", torch.bfloat16, cache_enabled=False)),
    "inference mode and autocast": in_mode(lambda: _both(torch.inference_mode(), torch.autocast("cpu"))),
    "default dtype": in_mode(lambda: default_dtype(torch.float64)),
    "default device": in_mode(lambda: default_device("cpu")),
    "default device meta": in_mode(lambda: default_device("meta")),
    "one thread": in_mode(lambda: threads(1)),
    "deterministic": in_mode(deterministic),
    "dispatch mode": in_mode(Through),
    "anomaly detection": in_mode(lambda: torch.autograd.detect_anomaly(check_nan=False)),
    "saved tensors on disk": in_mode(lambda: torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)),
    "profiler": in_mode(torch.profiler.profile),
    "record": in_mode(fastops.record),
    "fake": as_a_fake,
    "vmap": vmapped,
    "grad": differentiated,
    "dual": dual,
    "trace": traced,
    "compile": compiled,
    "export": exported,
    "an error": refused,
    "another thread": backward_in_another_thread,
    "meta": lambda: FF.linear(torch.ones(3, 8, device="meta"), torch.ones(4, 8, device="meta")),
    "double": lambda: call_in(torch.float64),
    "bfloat16": lambda: call_in(torch.bfloat16),
    "complex": lambda: FF.linear(torch.ones(3, 8, dtype=torch.complex64), torch.ones(4, 8, dtype=torch.complex64)),
}


@contextlib.contextmanager
def _both(one, two):
    with one, two:
        yield


def call_in(dtype):
    m = model().to(dtype)
    fastops.replace_(m)
    return m(torch.ones(3, 2, 8, 8, dtype=dtype))


def check():
    """Trains as PyTorch does, through the fast door."""
    ours, theirs = model(), model()
    fastops.replace_(ours)
    x = torch.randn(3, 2, 8, 8)
    for m in (ours, theirs):
        m(x).square().sum().backward()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, atol=1e-4, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")
    doors = {
        "linear": lambda C: C.linear(torch.ones(3, 8), torch.ones(4, 8), None, 0, 0.0, 0.0),
        "conv2d": lambda C: C.conv2d(torch.ones(1, 2, 4, 4), torch.ones(1, 2, 3, 3), None, 1, 0, 1, 1, 0, 0.0, 0.0),
        "activation": lambda C: C.activation(torch.ones(3), 1, 0.0, 0.0, False),
        "max_pool2d": lambda C: C.max_pool2d(torch.ones(1, 1, 4, 4), 2, None, 0, 1, False, False),
        "prelu": lambda C: C.prelu(torch.ones(3), torch.ones(1)),
        "glu": lambda C: C.glu(torch.ones(4), 0),
    }
    closed = [name for name, door in doors.items() if door(fastops._C) is NotImplemented]
    assert not closed, f"the fast door is closed for {', '.join(closed)}"


def main():
    torch.set_warn_always(False)
    for name, first in STATES.items():
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            try:
                first()
                check()
                print(f"{name}: ok", flush=True)
            except BaseException as error:
                traceback.print_exc()
                print(f"{name}: {type(error).__name__}: {error}".splitlines()[0], flush=True)
            os._exit(0)
        os.waitpid(child, 0)


if __name__ == "__main__":
    main()
