"""The first call of a process, in every state that it may find: run by test_first_call.py as a process of its own.

The process imports torch and fastops and calls nothing. For each state it forks a child, whose first call of fastops is
in that state; afterwards the child trains a layer of every kind outside of the state and asks whether the fast door is
open. A line "state: ok", or what is wrong, for each.
"""

import contextlib
import json
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

# (class, arguments, shape of the input): a layer for every op. The first argument, made by test_first_call.py.
LAYERS = [("SiLU", (True,), (3, 8)), ("Hardswish", (True,), (3, 8))]


def model(dtype=None):
    torch.manual_seed(0)
    layers = nn.ModuleList(getattr(nn, name)(*arguments) for name, arguments, _ in LAYERS)
    return layers if dtype is None else layers.to(dtype)


def call(dtype=None):
    """Every op once, forward."""
    layers = model(dtype)
    fastops.replace_(layers)
    return [layer(torch.ones(shape, dtype=dtype)) for layer, (_, _, shape) in zip(layers, LAYERS, strict=True)]


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

    thread = threading.Thread(target=lambda: [y.sum().backward() for y in call() if y.requires_grad])
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
    "double": lambda: call(torch.float64),
    "bfloat16": lambda: call(torch.bfloat16),
    "complex": lambda: FF.linear(torch.ones(3, 8, dtype=torch.complex64), torch.ones(4, 8, dtype=torch.complex64)),
}


@contextlib.contextmanager
def _both(one, two):
    with one, two:
        yield


def check():
    """Trains as PyTorch does, through the fast door: its nodes are named Fastops...Backward."""
    ours, theirs = model(), model()
    fastops.replace_(ours)
    for one, two, (name, _, shape) in zip(ours, theirs, LAYERS, strict=True):
        x = torch.randn(shape, requires_grad=True)
        results = []
        for layer in (one, two):
            y = layer(x * 1)  # some work in place
            results.append([y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()], retain_graph=True)])
        torch.testing.assert_close(*results, atol=1e-4, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")
        assert any(node.startswith("Fastops") for node in nodes(results[0][0].grad_fn)), f"{name}: the door is closed"


def nodes(node):
    """The names of the nodes of a graph."""
    return [node.name(), *(name for one, _ in node.next_functions if one is not None for name in nodes(one))]


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
    LAYERS[:0] = json.loads(sys.argv[1])
    main()
