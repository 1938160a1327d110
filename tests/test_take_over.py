"""fastops.light.take_over_: torchao's int8 layers with the same integers, beside torchao's own results."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastops import light
from fastops.light._qat_layers import by_rows


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(128, 96), nn.GELU(), nn.Linear(96, 40, bias=False))


def test_nothing_to_take_over():
    assert str(light.take_over_(model())) == "0 replaced, 0 skipped, 0 left alone"
    with pytest.raises(TypeError, match=r"take_over_: model must be a torch\.nn\.Module, got int"):
        light.take_over_(3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["weight", "weight in groups", "dynamic", "dynamic, asymmetric"])
def test_taken_over(name, dtype):
    api = pytest.importorskip("torchao.quantization")
    from torchao.quantization.granularity import PerGroup
    from torchao.quantization.quant_primitives import MappingType

    config = {
        "weight": lambda: api.Int8WeightOnlyConfig(),
        "weight in groups": lambda: api.Int8WeightOnlyConfig(granularity=PerGroup(32)),
        "dynamic": lambda: api.Int8DynamicActivationInt8WeightConfig(),
        "dynamic, asymmetric": lambda: api.Int8DynamicActivationInt8WeightConfig(
            act_mapping_type=MappingType.ASYMMETRIC
        ),
    }[name]()
    theirs, x = model().to(dtype), torch.randn(9, 128).to(dtype)
    api.quantize_(theirs, config)
    ours = copy.deepcopy(theirs)
    weights = [theirs[i].weight for i in (0, 2)]
    report = light.take_over_(ours)
    dynamic = name.startswith("dynamic")
    kind = light.LinearInt8 if dynamic else light.LinearWeightOnly
    assert [row.name for row in report.replaced] == ["0", "2"]
    assert not report.skipped
    with torch.no_grad():
        for i, weight in zip((0, 2), weights, strict=True):
            assert type(ours[i]) is kind
            assert torch.equal(ours[i].weight, weight.qdata)
            assert torch.allclose(
                ours[i].dequantized(), weight.dequantize().float(), rtol=4e-3 if dtype is torch.bfloat16 else 1e-6
            )
        y, wanted = ours(x), theirs(x)
        assert y.dtype == dtype
        assert (y - wanted).abs().max() < (0.03 if dynamic or dtype is torch.bfloat16 else 1e-5) * wanted.abs().max()
        first = F.linear((by_rows(x) if dynamic else x).float(), ours[0].dequantized(), ours[0].bias.float())
        assert (ours[0](x).float() - first).abs().max() < (
            1e-2 if dtype is torch.bfloat16 else 1e-5
        ) * first.abs().max()
    assert "LinearWeightOnly" in repr(ours) or "LinearInt8" in repr(ours)
    fresh = model().to(dtype)
    config = "int8_dynamic" if dynamic else "int8_weight"
    light.quantize_(fresh, config, lambda *_: True, 32 if "groups" in name else None)
    fresh.load_state_dict(ours.state_dict())
    assert torch.equal(fresh(x), ours(x))


def test_what_is_not_taken_over():
    api = pytest.importorskip("torchao.quantization")
    from torchao.quantization.granularity import PerGroup

    one = nn.Sequential(nn.Linear(96, 8))
    api.quantize_(one, api.Int8WeightOnlyConfig(granularity=PerGroup(24)))
    report = light.take_over_(one)
    assert [row.result for row in report.skipped] == ["24 weights share a scale: only a power of two from 16 on may"]
    assert type(one[0]) is nn.Linear
