"""peft's LoRA around layers of fastops.light: trained, merged, unmerged, saved and loaded; and what is refused."""

import copy
import importlib.util

import pytest
import torch
from torch import nn

from fastops import light

missing = [name for name in ("transformers", "peft") if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)} not installed: pip install fastops[huggingface]"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
if not missing:
    from peft import LoraConfig, PeftModel, get_peft_model

    from fastops.peft import LoraLinear, lora_config

CONFIGS = ("int8_dynamic", "int8_static", "int8_weight", "int4_weight", "fp8_weight")
X = torch.randn(16, 128, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(128, 96), nn.Linear(96, 4, bias=False)
        if kind == "sparse":
            light.prune_weights_(self, 0.8)
            light.sparsify_(self, filter_fn=lambda *_: True)
        else:
            calibrate = [X] if kind == "int8_static" else None
            light.quantize_(self, kind, filter_fn=lambda *_: True, calibrate=calibrate)

    def forward(self, x):
        return self.two(torch.relu(self.one(x)))


def adapted(kind, **options):
    torch.manual_seed(1)
    options = {"r": 4, "target_modules": ["one", "two"], **options}
    return get_peft_model(Net(kind), lora_config(LoraConfig(**options)))


def trained(model):
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, losses = torch.optim.Adam(parameters, 0.03), []
    for _ in range(20):
        optimizer.zero_grad()
        losses.append((model(X) - 1).square().mean())
        losses[-1].backward()
        optimizer.step()
    return losses[0].item(), losses[-1].item()


@pytest.mark.parametrize("kind", [*CONFIGS, "sparse"])
def test_training_and_checkpoints(kind, tmp_path):
    model, x = adapted(kind), X[:5]
    layer = model.base_model.model.one
    assert type(layer) is LoraLinear
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert all(("lora" in name) is one.requires_grad for name, one in model.named_parameters())
    with torch.no_grad():
        assert torch.equal(model(x), Net(kind)(x))
    state = copy.deepcopy(layer.base_layer.state_dict())
    first, last = trained(model)
    assert last < 0.7 * first
    assert all(torch.equal(value, state[name]) for name, value in layer.base_layer.state_dict().items())
    with torch.no_grad():
        y = model.eval()(x)
        with model.disable_adapter():
            assert torch.equal(model(x), Net(kind)(x))
        model.save_pretrained(tmp_path)
        config = lora_config(LoraConfig.from_pretrained(tmp_path))
        for other in (PeftModel.from_pretrained(Net(kind), tmp_path, config=config), copy.deepcopy(model)):
            torch.testing.assert_close(other.eval()(x), y)
        half = copy.deepcopy(model).bfloat16()(x.bfloat16())
        assert (half.float() - y).abs().max() < 0.05 * y.abs().max()


@pytest.mark.parametrize("kind", CONFIGS)
def test_merging(kind):
    """The merged weight is that of the float layer, rounded as quantize_ rounds it; unmerged, every bit is back."""
    model, x = adapted(kind), X[:5]
    trained(model)
    layer = model.base_model.model.one
    before = copy.deepcopy(layer.base_layer.state_dict())
    with torch.no_grad():
        y, z = model.eval()(x), layer(x)
        wanted = nn.Linear(128, 96)
        wanted.weight.copy_(layer.base_layer.dequantized() + layer.get_delta_weight("default"))
        again = nn.Sequential(copy.deepcopy(wanted))
        light.quantize_(again, kind, filter_fn=lambda *_: True, calibrate=[X] if kind == "int8_static" else None)
        for safe in (False, True):
            model.merge_adapter(safe_merge=safe)
            assert torch.equal(layer.base_layer.dequantized(), again[0].dequantized())
            assert (layer(x) - z).abs().max() < {"int4_weight": 0.2, "fp8_weight": 0.1}.get(kind, 0.03) * z.abs().max()
            model.unmerge_adapter()
            for name, value in layer.base_layer.state_dict().items():
                assert torch.equal(value, before[name]), name
            assert torch.equal(model(x), y)
        plain = model.merge_and_unload()
    assert type(plain.one) is type(Net(kind).one)
    assert plain(x).shape == y.shape
    assert not torch.equal(plain.one.weight, before["weight"])


def test_two_adapters():
    model = adapted("int8_weight")
    trained(model)
    model.add_adapter("other", lora_config(LoraConfig(r=2, target_modules=["one"])))
    model.set_adapter("other")
    trained(model)
    model.base_model.set_adapter(["default", "other"])
    layer = model.base_model.model.one
    before = layer.base_layer.weight.clone()
    with torch.no_grad():
        y = model.eval()(X)
        model.merge_adapter()
        assert layer.merged_adapters == ["default", "other"]
        assert (model(X) - y).abs().max() < 0.03 * y.abs().max()
        with model.disable_adapter():
            assert torch.equal(model(X), Net("int8_weight")(X))
    assert torch.equal(layer.base_layer.weight, before)


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"unsupported variant combination.*use_dora"):
        adapted("int8_dynamic", use_dora=True)
    with pytest.raises(ValueError, match=r"lora_bias must be False for a layer of fastops.light, got True"):
        adapted("int8_dynamic", lora_bias=True, target_modules=["one"])
    for init in ("pissa", "olora"):
        with pytest.raises(ValueError, match=f"init_lora_weights must be .*, got '{init}'"):
            adapted("int8_dynamic", init_lora_weights=init)
    with pytest.raises(TypeError, match=r"lora_config: config must be a peft\.LoraConfig, got dict"):
        lora_config({})
    model = adapted("sparse")
    with pytest.raises(ValueError, match=r"cannot be merged into a sparse weight: light.densify_ it first"):
        model.merge_adapter()
    model = nn.Sequential(light.LinearInt8(8, 8, activation="relu"))
    with pytest.raises(ValueError, match=r"must have no activation.*'relu'"):
        get_peft_model(model, lora_config(LoraConfig(target_modules=["0"])))
    model = adapted("int8_dynamic")
    with torch.no_grad():
        model.base_model.model.one.lora_B["default"].weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="adapter 'default' is merged into is not finite"):
        model.merge_adapter(safe_merge=True)
    assert model.base_model.model.one.merged_adapters == []


def test_layers_under_adapters_stay():
    """peft's own layers add to the weight when they merge, and cast inputs to the dtype of the adapter's."""
    model = nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 128))
    light.prune_weights_(model, 0.9)
    model = get_peft_model(model, LoraConfig(target_modules=["0"]))
    x = torch.randn(4, 128)
    changes = {
        "sparsify_": lambda one: light.sparsify_(one, filter_fn=lambda *_: True),
        "prepare_qat_": lambda one: light.prepare_qat_(one, "int8_static", filter_fn=lambda *_: True),
    }
    for config in CONFIGS:
        calibrate = [x] if config == "int8_static" else None
        changes[config] = lambda one, config=config, calibrate=calibrate: light.quantize_(
            one, config, filter_fn=lambda *_: True, calibrate=calibrate
        )
    for name, change in changes.items():
        one = copy.deepcopy(model)
        report = change(one)
        rows = {row.name: row.result for row in report.skipped}
        for part in ("base_layer", "lora_A.default", "lora_B.default"):
            assert "a part of Linear of peft, which reads" in rows[f"base_model.model.0.{part}"], name
        assert [row.name for row in report.replaced] == ["base_model.model.2"]
        y = one.eval()(x)
        torch.testing.assert_close(one.merge_and_unload()(x), y, rtol=1e-4, atol=1e-4)
