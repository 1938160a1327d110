"""What every test may ask for: the ISA tiers of this machine, and 1 and 2 threads."""

import pytest
import torch

from fastops import _C

_NAMES = ("scalar", "avx2", "avx512", "avx512_bf16", "amx")
BEST = _C.isa_used()
TIERS = [name for name in _NAMES if _C.set_isa(name)]
_C.set_isa(BEST)


# These have kernels for bfloat16 only; whatever else they are asked for is avx512's.
_ONLY_BF16 = ("avx512_bf16", "amx")


def pytest_collection_modifyitems(items):
    """Leaves out what would run the same code on a second tier."""

    def repeats(item):
        params = item.callspec.params if hasattr(item, "callspec") else {}
        return params.get("isa") in _ONLY_BF16 and params.get("dtype", torch.bfloat16) != torch.bfloat16

    items[:] = [item for item in items if not repeats(item)]


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


@pytest.fixture(params=[1, 2])
def threads(request, _same_numbers):
    """Runs the test with 1 and with 2 threads."""
    torch.set_num_threads(request.param)
    return request.param
