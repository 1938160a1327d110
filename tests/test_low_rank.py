"""fastops.light.low_rank_: against the singular values, and against the layers it replaces."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import docs
import fastops
import fastops.nn as fnn
from fastops import light


def factored(layer: nn.Module, **options: float) -> nn.Module:
    model = nn.ModuleDict({"layer": layer})
    light.low_rank_(model, **options)
    return model["layer"]


def low(layer: nn.Module, rank: int, sides: bool = False) -> nn.Module:
    """The layer with a weight of this rank: in its matrix of outputs, or in that of height against width."""
    weight = layer.weight.data
    groups = getattr(layer, "groups", 1)
    if sides:
        n, c, height, width = weight.shape
        one, other = torch.randn(rank, c, height, 1).double(), torch.randn(n, rank, 1, width).double()
        layer.weight.data = torch.einsum("rchx,nryw->nchw", one, other).to(weight)
    else:
        parts = weight.view(groups, weight.shape[0] // groups, -1)
        u, s, v = torch.linalg.svd(parts, full_matrices=False)
        layer.weight.data = (u[:, :, :rank] * s[:, None, :rank] @ v[:, :rank]).view(weight.shape)
    return layer


CASES = [
    (nn.Linear(20, 30), (4, 20), 4, False),
    (nn.Linear(20, 30, bias=False), (2, 3, 20), 4, False),
    (nn.Conv2d(8, 12, 3, padding=1), (2, 8, 7, 7), 3, False),
    (nn.Conv2d(8, 12, 1, stride=2), (2, 8, 7, 7), 3, False),
    (nn.Conv2d(8, 12, 3, stride=2, padding=1, groups=2), (2, 8, 9, 9), 2, False),
    (nn.Conv2d(8, 12, (3, 5), (1, 2), (1, 2), (2, 1), padding_mode="reflect"), (8, 12, 12), 3, False),
    (nn.Conv1d(8, 12, 5, padding="same"), (2, 8, 9), 3, False),
    (nn.Conv3d(4, 8, 3, bias=False), (1, 4, 5, 5, 5), 2, False),
    (nn.Conv2d(8, 12, (3, 5), (2, 1), (1, 2), (1, 2)), (2, 8, 12, 12), 4, True),
    (nn.Conv2d(8, 12, 5, 1, 2, padding_mode="circular", bias=False), (2, 8, 12, 12), 4, True),
]


@pytest.mark.parametrize(("layer", "shape", "rank", "sides"), CASES)
def test_a_weight_of_low_rank_is_found_exactly(layer, shape, rank, sides):
    torch.manual_seed(0)
    layer = low(copy.deepcopy(layer).double(), rank, sides)
    x = torch.randn(shape).double().requires_grad_()
    result = factored(copy.deepcopy(layer), energy=1 - 1e-10)
    assert type(result) is nn.Sequential
    assert result[0].weight.shape[0] == rank * getattr(layer, "groups", 1)
    wanted = layer(x)
    torch.testing.assert_close(result(x), wanted, rtol=1e-9, atol=1e-9)
    grad = torch.randn_like(wanted)
    torch.testing.assert_close(torch.autograd.grad(result(x), x, grad), torch.autograd.grad(wanted, x, grad))
    assert (result[1].bias is None) == (layer.bias is None)


def test_the_error_is_that_of_eckart_and_young():
    linear = nn.Linear(40, 30).double()
    result = factored(copy.deepcopy(linear), parameters=0.5)
    spectrum = torch.linalg.svdvals(linear.weight)
    rank = int(0.5 * 1200 / 70)
    assert result[0].out_features == rank
    error = (result[1].weight @ result[0].weight - linear.weight).norm()
    torch.testing.assert_close(error, spectrum[rank:].norm())
    torch.testing.assert_close(result[0].weight.norm(dim=1), result[1].weight.norm(dim=0))
    kept = factored(copy.deepcopy(linear), energy=0.5)
    energies = spectrum.square().cumsum(0) / spectrum.square().sum()
    assert kept[0].out_features == int((energies < 0.5).sum()) + 1


def test_all_layers_keep_as_much():
    torch.manual_seed(0)
    flat, steep = nn.Linear(64, 64), low(nn.Linear(64, 64), 4)
    model = nn.Sequential(flat, nn.ReLU(), steep, nn.ReLU(), nn.Conv2d(1, 4, 3), nn.Linear(2, 2))
    before = copy.deepcopy(model)
    changes = light.low_rank_(model, parameters=0.4)
    weights = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    assert 0.36 * 2 * 4096 < weights <= 0.4 * (2 * 4096 + 36) + 4
    lost = []
    for i in (0, 2):
        error = before[i].weight - model[i][1].weight @ model[i][0].weight
        lost.append(error.square().sum() / before[i].weight.square().sum())
    assert model[2][0].out_features <= 4
    assert lost[1] <= lost[0] < 0.6
    assert changes.changed[1].result.startswith(f"rank {model[2][0].out_features} of 64")
    kept = {row.name: row.result for row in changes.kept}
    assert kept["5"] == "two layers of rank 1 would not be smaller"
    assert changes.after == sum(p.numel() for p in model.parameters())
    whole = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    assert light.low_rank_(whole, parameters=1.0).changed == []
    assert light.low_rank_(whole, energy=1.0).kept[0].result.endswith("would not be smaller")


def test_height_and_width_where_that_keeps_more():
    conv = low(nn.Conv2d(16, 16, 3, padding=1), 3, sides=True)
    model = nn.Sequential(conv)
    changes = light.low_rank_(model, energy=0.999999)
    assert changes.changed[0].result == "rank 3 of 48, 100.0% of its energy, as 3x1 and 1x3"
    assert model[0][0].kernel_size == (3, 1)
    assert model[0][1].padding == (0, 1)


def test_which_layers_stay():
    hooked, shared, tied = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32)
    hooked.register_forward_hook(lambda *_: None)
    tied.weight = shared.weight

    class Own(nn.Linear):
        pass

    broken = nn.Linear(32, 32)
    broken.weight.data[0, 0] = torch.nan
    layers = {"hooked": hooked, "shared": shared, "tied": tied, "own": Own(32, 32), "broken": broken}
    layers["computed"] = parametrizations.weight_norm(nn.Linear(32, 32))
    layers["attention"] = nn.MultiheadAttention(32, 2)
    layers["up"] = nn.ConvTranspose2d(32, 32, 3)
    model = nn.ModuleDict({**layers, "twice": nn.ModuleList([nn.Linear(32, 32)] * 2)})
    changes = light.low_rank_(model, parameters=0.5)
    assert {row.name: row.result for row in changes.kept} == {
        "hooked": "it has hooks",
        "shared": "its weight is also that of tied",
        "tied": "its weight is also that of shared",
        "own": "a subclass: its forward may differ",
        "broken": "its weight has no singular values",
        "computed": "its weight is computed at every call",
        "attention.out_proj": "torch.nn.MultiheadAttention reads its weight directly",
    }
    assert model["twice"][0] is model["twice"][1]
    assert [row.name for row in changes.changed] == ["twice.0"]
    alone = light.low_rank_(nn.Linear(32, 32), energy=0.5)
    assert alone.kept[0].result == "it is the model itself"


def test_beside_the_rest_of_fastops():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 8)).eval()
    prune.l1_unstructured(model[0], "weight", 0.5)
    x = torch.randn(3, 64)
    with torch.inference_mode():
        light.low_rank_(model, parameters=0.5)
    assert [name for name, _ in model.named_buffers()] == []
    assert not any(module.training for module in model.modules())
    model(x).sum().backward()
    assert model[0][0].weight.grad is not None
    wanted = model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), fastops.fuse(model), fastops.freeze(model)):
        torch.testing.assert_close(other(x), wanted, rtol=1e-4, atol=1e-4)
    changes = light.prune_channels_(model, x, amount=0.25)
    assert {"0.0", "0.1", "2.0", "2.1"} <= changes.removed.keys()
    assert light.quantize_(model).replaced
    model = nn.Sequential(fnn.Linear(64, 64, activation="relu"), nn.Linear(64, 64))
    fastops.replace_(model)
    frozen = model[1].requires_grad_(False)
    light.low_rank_(model.bfloat16(), energy=0.5)
    assert type(model[0][0]) is type(model[1][0]) is fnn.Linear
    assert model[0][1].activation == "relu"
    assert model[0][0].weight.dtype is torch.bfloat16
    assert not model[1][0].weight.requires_grad
    assert model[1][1].bias is frozen.bias


@pytest.mark.parametrize("options", [{}, {"parameters": 0.5, "energy": 0.5}, {"parameters": 0}, {"energy": 1.5}])
def test_arguments(options):
    with pytest.raises(ValueError, match="low_rank_: one of parameters and energy must be given, and be more than 0"):
        light.low_rank_(nn.Sequential(nn.Linear(4, 4)), **options)


def test_docstring():
    assert docs.missing_parts(light.low_rank_) == []
    assert docs.failed_examples(light.low_rank_, "low_rank_") == ""
