"""timm's own layers, which fastops.timm registers."""

import contextlib
import copy
import importlib.util
import sys
import types

import pytest
import torch
from torch import nn

import fastops

SPEC = importlib.util.find_spec("timm")
pytestmark = pytest.mark.skipif(SPEC is None, reason="timm is not installed: pip install timm")


@contextlib.contextmanager
def only_the_layers():
    """timm as its layers alone: the packages around them import its models, too, and these need a torchvision."""
    folder = SPEC.submodule_search_locations[0]
    for name, path in (("timm", folder), ("timm.layers", f"{folder}/layers")):
        package = types.ModuleType(name)
        package.__path__ = [path]
        sys.modules[name] = package
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "timm"]:
        del sys.modules[name]


if SPEC is not None:
    _layers = only_the_layers()
    _layers.__enter__()
    from timm.layers import activations, linear, norm


@pytest.fixture(scope="module", autouse=True)
def _without_timm_afterwards():
    yield
    if SPEC is not None:
        _layers.__exit__(None, None, None)


def block():
    return nn.Sequential(
        norm.LayerNorm(12), linear.Linear(12, 20), activations.GELU(), linear.Linear(20, 12), activations.GELUTanh(),
        activations.PReLU(), activations.QuickGELU(),
    )  # fmt: skip


def test_replaced_fused_and_frozen():
    model, x = block().double().eval(), torch.randn(5, 12, dtype=torch.float64)
    expected = model(x)
    frozen, fused = fastops.freeze(model), fastops.fuse(model)
    replaced = copy.deepcopy(model)
    report = fastops.replace_(replaced)
    assert [row.name for row in report.replaced] == ["0", "1", "2", "3", "4", "5"]
    assert [row.name for row in report.left] == ["6"]
    assert {type(module).__module__ for module in replaced[:6]} == {"fastops.timm"}
    for one in (replaced, fused, frozen):
        with torch.no_grad(), fastops.record() as calls:
            torch.testing.assert_close(one(x), expected)
        assert not any(row.kernel == "aten" for row in calls)
    results = [torch.autograd.grad(one(x).square().sum(), one.parameters()) for one in (model, replaced, fused)]
    torch.testing.assert_close(results[1:], [results[0], results[0]])
    fastops.restore_(replaced)
    assert [type(module) for module in replaced] == [type(module) for module in model]


def test_fast_norms_are_left_alone():
    layer = norm.LayerNorm(12)
    layer._fast_norm = True
    [row] = fastops.replace_(layer).skipped
    assert row.result.startswith("timm's fast norm is on")


def test_in_torchscript():
    model, x = block().eval(), torch.randn(5, 12)
    fastops.replace_(model)
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.script(model)(x), model(x), rtol=1e-5, atol=1e-6)
