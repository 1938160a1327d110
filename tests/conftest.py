"""What every test may ask for: the ISA tiers of this machine; and one thread."""

import gc
import os

# pytest-xdist runs a process on every core. A thread of PyTorch's that waits for one whose core is taken would spin for
# milliseconds at every barrier; it sleeps instead. libgomp reads this when torch loads it.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# What the inductor writes is compiled here, not by a pool of processes that import torch, and not optimized.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
os.environ.setdefault("AOT_INDUCTOR_DEBUG_COMPILE", "1")

import pytest
import torch
from tiers import BEST, TIERS, runs

from fastops import _C


class _NoStack:
    """torch.manual_seed formats the stack three times, for GPUs of three kinds that are not there yet, to show it if
    one then cannot be seeded. That took more than a millisecond, and a test calls it for each case of its own."""

    format_stack = staticmethod(list)


for _backend in (torch.cuda, torch.xpu, torch.mtia):
    _backend.traceback = _NoStack


def pytest_collection_modifyitems(items):
    """Leaves out what would run the same code on a second tier."""

    def repeats(item):
        params = item.callspec.params if hasattr(item, "callspec") else {}
        return "isa" in params and not runs(params["isa"], params.get("dtype", torch.bfloat16))

    items[:] = [item for item in items if not repeats(item)]


def pytest_collection_finish():
    """What is there before the first test, a million objects, is not looked through again: fastops' tracer asks the
    garbage collector for the functions that have a piece of code, and tests collect garbage."""
    gc.collect()
    gc.freeze()


@pytest.fixture(params=TIERS)
def isa(request):
    """Runs the test once on every tier that this machine has (and FASTOPS_ISA allows)."""
    assert _C.set_isa(request.param)
    yield request.param
    _C.set_isa(BEST)


@pytest.fixture(autouse=True)
def _same_numbers():
    """The same random numbers whatever ran before; one thread: test_threads.py shows that two give the same bits."""
    torch.manual_seed(0)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
