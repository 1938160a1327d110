"""timm's own layers, which fastops.timm registers."""

import copy

import pytest
import torch
from torch import nn

import fastops

try:
    from timm.layers import activations, linear, norm
except ImportError as error:  # timm itself, or the torchvision that it needs
    pytest.skip(f"timm cannot be imported ({error}): pip install timm", allow_module_level=True)


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
