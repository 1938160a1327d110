"""fastops.light.prepare_qat_ and convert_qat_: what is trained is what the quantized layers compute."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastops
import fastops.nn as fnn
from fastops import light
from fastops.light._qat_layers import by_rows

LINEAR = ["int8_dynamic", "int8_weight", "int4_weight", "fp8_weight"]


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(100, 128), nn.ReLU(), fnn.Linear(128, 130, activation="gelu"), nn.Linear(130, 70, bias=False)
    )


def convnet():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), fnn.Conv2d(8, 16, 3, 2, activation="relu"),
        nn.Conv2d(16, 16, 3, groups=16), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip


def trained(model, x, steps=3, lr=0.05):
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return model


def near(actual, wanted, bound=1e-5):
    assert (actual - wanted).abs().max() <= bound * wanted.abs().max()


@pytest.mark.parametrize("config", LINEAR)
def test_linear(config):
    """Trained, converted, and the same outputs: every level is the one that training saw."""
    model, x = mlp(), torch.randn(33, 100)
    parameters = list(model.parameters())
    report = light.prepare_qat_(model, config, lambda module, name: True)
    assert [row.name for row in report.replaced] == ["0", "2", "3"]
    assert all(one is other for one, other in zip(parameters, model.parameters(), strict=True))
    assert list(model.state_dict()) == list(mlp().state_dict())
    trained(model, x)
    y = model(x).detach()
    light.convert_qat_(model)
    assert type(model[0]) is (light.LinearInt8 if config == "int8_dynamic" else light.LinearWeightOnly)
    assert model[2].activation == "gelu"
    # An activation on the border of two levels may fall to either side, once it is rounded otherwise.
    near(model(x).detach(), y, 2e-3 if config == "int8_dynamic" else 1e-5)
    near(
        model[0](x).detach(),
        F.linear(by_rows(x) if config == "int8_dynamic" else x, model[0].dequantized(), model[0].bias).detach(),
    )


@pytest.mark.parametrize("symmetric", [False, True])
def test_static(symmetric):
    model, batches = convnet(), [torch.randn(6, 3, 12, 12) for _ in range(3)]
    light.prepare_qat_(model, "int8_static", symmetric=symmetric)
    assert type(model[0]) is type(model[3]) is light.QATConv2d
    assert type(model[7]) is light.QATLinear
    for x in batches:
        trained(model.train(), x, 2)
    model.eval()
    x = batches[0]
    y, ranges = model(x).detach(), (float(model[3].input_low), float(model[3].input_high))
    report = light.convert_qat_(model, batches)
    assert [row.result for row in report.replaced] == [
        f"fastops.light.{n}" for n in ("Conv2dInt8",) * 3 + ("LinearInt8Static",)
    ]
    assert "input_low" not in model[3].state_dict()
    near(model(x).detach(), y, 2e-2)  # a level of one layer moves those after it
    scale, zero = (ranges[1] - ranges[0]) / 255, int(model[3].input_zero)
    if symmetric:
        scale, zero = max(-ranges[0], ranges[1]) / 127, 128
    assert float(model[3].input_scale) == pytest.approx(scale, rel=1e-6)
    assert int(model[3].input_zero) == zero
    frozen = fastops.freeze(model)
    assert "uint8 out" in str(frozen.fastops_report)
    near(frozen(x), y, 5e-2)


@pytest.mark.parametrize("config", ["int8_static", "int8_dynamic"])
def test_one_layer_exactly(config):
    """One layer has the same levels, so that only sums of floats differ."""
    layers = {"linear": nn.Linear(70, 33), "conv": nn.Conv2d(5, 9, 3, padding=1)}
    inputs = {"linear": torch.randn(50, 70) + 0.3, "conv": torch.randn(4, 5, 11, 11) + 0.3}
    for name in ("linear", "conv") if config == "int8_static" else ("linear",):
        model, x = nn.Sequential(layers[name]), inputs[name]
        light.prepare_qat_(model, config, lambda module, name: True)
        model(x)
        y = model.eval()(x).detach()
        light.convert_qat_(model, [x] if config == "int8_static" else None)
        near(model(x).detach(), y, 2e-6)


def test_gradients():
    """Straight through: those of a plain layer at the rounded weight and input."""
    layer, x = nn.Linear(64, 32), torch.randn(7, 64)
    model = nn.Sequential(layer)
    light.prepare_qat_(model, "int8_dynamic", lambda module, name: True)
    x, g = x.requires_grad_(), torch.randn(7, 32)
    ours = torch.autograd.grad(model(x), [x, layer.weight, layer.bias], g)
    w, rounded = layer.fake_weight().detach().double(), by_rows(x).detach().double()
    assert not torch.equal(w.float(), layer.weight)
    wanted = [g.double() @ w, g.double().t() @ rounded, g.double().sum(0)]
    for one, other in zip(ours, wanted, strict=True):
        near(one.double(), other, 1e-6)


def test_range_of_the_input():
    model = nn.Sequential(nn.Linear(4, 3))
    light.prepare_qat_(model, "int8_static", averaging=0.25)
    layer = model[0]
    x = torch.tensor([[-1.0, 0, 1, 3], [0, 0, 0, 0]])
    assert torch.equal(model.eval()(x), F.linear(x, layer.fake_weight(), layer.bias))  # no range yet
    assert float(layer.input_low) == torch.inf
    model.train()(x)
    assert (float(layer.input_low), float(layer.input_high)) == (-1, 3)
    model(x * 2)
    assert (float(layer.input_low), float(layer.input_high)) == (-1.25, 3.75)
    model(torch.full((1, 4), torch.nan))
    model(torch.empty(0, 4))
    model.eval()(x * 100)
    assert (float(layer.input_low), float(layer.input_high)) == (-1.25, 3.75)
    assert model.half()[0].input_low.dtype == torch.float32


@pytest.mark.parametrize("config", [*LINEAR, "int8_static"])
def test_state_and_modes(config):
    model, x = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 40)), torch.randn(5, 64)
    light.prepare_qat_(model, config, lambda module, name: True)
    model(x)
    y = model.eval()(x).detach()
    fresh = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 40))
    light.prepare_qat_(fresh, config, lambda module, name: True)
    fresh.load_state_dict(model.state_dict())
    others = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), fresh.eval(), fastops.fuse(model)]
    others += [fastops.freeze(model)]
    if config == "int8_static":
        others.append(torch.compile(model, backend="aot_eager", fullgraph=True))
    for other in others:
        torch.testing.assert_close(other(x).detach(), y)
    assert model(torch.empty(0, 64)).shape == (0, 40)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert model(x).dtype == torch.bfloat16
    torch.testing.assert_close(torch.func.vmap(model)(x.unsqueeze(1)).squeeze(1).detach(), y)
    if config == "int8_static":
        compiled = torch.compile(model.train(), backend="aot_eager", fullgraph=True)
        compiled(x).sum().backward()
        gradient = model[0].weight.grad.clone()
        model.zero_grad()
        model(x).sum().backward()
        torch.testing.assert_close(model[0].weight.grad, gradient)
    for dtype in (torch.bfloat16, torch.float16):
        assert model.to(dtype)(x.to(dtype)).dtype == dtype
    light.convert_qat_(model, [x.half()] if config == "int8_static" else None)
    assert model(x.half()).isfinite().all()


def test_what_is_left_alone():
    model = nn.Sequential(nn.Linear(200, 200), nn.Linear(4, 4))
    light.prepare_qat_(model, "int8_dynamic")
    assert type(model[1]) is nn.Linear
    report = light.quantize_(model, "int8_dynamic", lambda module, name: True)
    assert [row.result for row in report.skipped] == ["prepared for training: convert_qat_ quantizes it"]
    with pytest.raises(ValueError, match="calibrate is for layers of 'int8_static', got one for a model without"):
        light.convert_qat_(model, [])
    static = nn.Sequential(fnn.Linear(8, 8, activation="relu"), nn.Linear(8, 8))
    light.prepare_qat_(static, "int8_static")
    with pytest.raises(ValueError, match="convert_qat_: calibrate must be given for layers of 'int8_static'"):
        light.convert_qat_(static)
    with pytest.raises(TypeError, match="convert_qat_: calibrate must be an iterable or a function, got int"):
        light.convert_qat_(static, 3)
    report = light.convert_qat_(static, lambda model: model[1](torch.randn(3, 8)))
    assert [(row.name, row.result) for row in report.skipped] == [("0", "neither training nor calibration called it")]
    assert type(static[1]) is light.LinearInt8Static
    assert static[0].activation == "relu"
    assert "FakeQuantized" not in str(type(static[0]).mro())


def test_digits():
    """4 bits: training with the rounding loses less than training without and rounding then."""
    datasets = pytest.importorskip("sklearn.datasets")
    data = datasets.load_digits()
    x, y = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10))

    def fit(model, epochs, lr):
        optimizer = torch.optim.Adam(model.parameters(), lr)
        for _ in range(epochs):
            for i in range(0, 1200, 100):
                optimizer.zero_grad()
                F.cross_entropy(model(x[i : i + 100]), y[i : i + 100]).backward()
                optimizer.step()

    def loss(model, which=slice(0, 1200)):
        with torch.no_grad():
            return float(F.cross_entropy(model(x[which]), y[which]))

    fit(model, 20, 3e-3)
    options = {"config": "int4_weight", "filter_fn": lambda module, name: True}
    plain, rounded = copy.deepcopy(model), copy.deepcopy(model)
    light.quantize_(rounded, **options)
    light.prepare_qat_(model, **options)
    assert loss(model) == pytest.approx(loss(rounded), rel=1e-3)  # the same levels, before it is trained
    for one in (model, plain):
        fit(one, 10, 1e-3)
    trained = loss(model)
    light.convert_qat_(model)
    assert loss(model) == pytest.approx(trained, rel=1e-3)
    light.quantize_(plain, **options)
    assert loss(model) < 0.97 * loss(plain) < 0.97 * loss(rounded)
