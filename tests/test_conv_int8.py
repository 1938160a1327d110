"""Conv2dInt8, LinearInt8Static and quantize_(model, "int8_static"): against the formulas in PyTorch's ops, and against
the float model. What freeze makes of them: test_frozen_int8.py.
"""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from tiers import BEST, TIERS
from torch import nn
from torch.func import functional_call, jvp, vmap
from torch.library import opcheck
from torch.nn.utils import prune

import fastops
import fastops.nn as fnn
from fastops import _C, light
from fastops.light._observers import Observer
from fastops.ops.conv_int8 import by_torch

OPS = torch.ops.fastops


@pytest.fixture(params=TIERS)
def tier(request):
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(BEST)


def conv(*arguments, low=-2.0, high=3.0, **options):
    torch.manual_seed(0)
    return light.Conv2dInt8.from_conv(nn.Conv2d(*arguments, **options), low, high)


def linear(k, n, low=-2.0, high=3.0):
    torch.manual_seed(0)
    return light.LinearInt8Static.from_linear(nn.Linear(k, n), low, high)


def wanted(module, x):
    with torch.no_grad():
        bias = None if module.bias is None else module.bias.float()
        return module._by_torch(x.detach().float(), bias)


def close(module, x, actual):
    """Sums are exact: what is left is a few roundings of float32, and one of the result's type."""
    y = wanted(module, x)
    assert actual.dtype == x.dtype
    eps, scale = torch.finfo(x.dtype).eps, float(y.abs().max()) if y.numel() else 0.0
    torch.testing.assert_close(actual.float(), y, rtol=2 * eps, atol=4e-6 * scale, equal_nan=True)


CASES = {
    "3x3": ((20, 33, 3), {"padding": 1}),
    "1x1 step 2": ((16, 24, 1), {"stride": 2}),
    "first layer": ((3, 16, 7), {"stride": 2, "padding": 3}),
    "depthwise": ((40, 40, 3), {"padding": 1, "groups": 40}),
    "groups": ((12, 18, 3), {"groups": 3, "bias": False}),
    "same, uneven": ((5, 6, (2, 4)), {"padding": "same"}),
    "valid, dilated": ((4, 6, 3), {"padding": "valid", "dilation": 2}),
    "deep, dilated": ((20, 40, 3), {"padding": 2, "dilation": 2}),
}


@pytest.mark.parametrize("case", CASES)
def test_against_pytorch(case, tier):
    arguments, options = CASES[case]
    module, x = conv(*arguments, **options), 1.5 * torch.randn(2, arguments[0], 11, 9)
    with torch.no_grad(), fastops.record() as calls:
        y = module(x)
    close(module, x, y)
    assert y.is_contiguous()
    assert [call.op for call in calls] == ["conv_int8"]
    assert calls[0].kernel.endswith(tier)
    with torch.no_grad():
        last = module(x.contiguous(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(last, y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits(dtype):
    with torch.no_grad():
        for module, x in ((conv(8, 20, 3).to(dtype), torch.randn(2, 8, 9, 9)), (linear(40, 9), torch.randn(3, 40))):
            close(module.to(dtype), x.to(dtype), module(x.to(dtype)))


def test_close_to_the_float_layer():
    plain, x = nn.Conv2d(32, 32, 3), torch.rand(4, 32, 12, 12)
    y = plain(x)
    for symmetric, most in ((False, 0.012), (True, 0.015)):
        module = light.Conv2dInt8.from_conv(plain, 0.0, 1.0)
        module.set_range("input", 0.0, 1.0, symmetric)
        assert int(module.input_zero) == (128 if symmetric else 0)
        assert (module(x) - y).square().mean().sqrt() < most * y.square().mean().sqrt()


def test_linear(tier):
    module = linear(70, 33)
    for shape in ((5, 70), (2, 3, 70), (70,), (0, 70), (1, 70)):
        x = torch.randn(shape)
        with torch.no_grad():
            y = module(x)
        assert y.shape == (*shape[:-1], 33)
        close(module, x, y)


LAYOUTS = {
    "unbatched": lambda x: x[0],
    "empty batch": lambda x: x[:0],
    "sliced": lambda x: torch.cat([x, x], 3)[..., : x.shape[3]],
    "every other": lambda x: torch.stack([x, x], 4)[..., 0],
    "permuted": lambda x: x.permute(0, 1, 3, 2),
    "expanded": lambda x: x[:, :, :1].expand_as(x),
    "expanded channels": lambda x: x[:, :1].expand_as(x),
    "negative view": lambda x: torch._neg_view(x),
    "odd offset": lambda x: torch.cat([x.flatten()[:1], x.flatten()])[1:].view_as(x),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    module, x = conv(6, 10, 3, padding=1), LAYOUTS[layout](torch.randn(2, 6, 7, 5))
    with torch.no_grad():
        y = module(x)
    assert y.shape == F.conv2d(x, module.dequantized(), padding=1).shape
    close(module, x, y)


def test_saturation_and_nan():
    """Numbers out of range become its ends, NaN the lowest level."""
    module = conv(1, 2, 1, low=-1.0, high=2.0)
    x = torch.tensor([-1e30, -5.0, -1.0, 2.0, 7.0, float("inf"), float("nan")]).view(1, 1, 1, -1)
    with torch.no_grad():
        y = module(x)[0, :, 0]
        assert torch.equal(y[:, 0], y[:, 2])
        assert torch.equal(y[:, 1], y[:, 2])
        assert torch.equal(y[:, 4], y[:, 3])
        assert torch.equal(y[:, 5], y[:, 3])
        assert torch.equal(y[:, 6], y[:, 2])


@pytest.mark.parametrize("zero", [0, 255])
def test_zero_points_at_the_ends(zero, tier):
    module = conv(7, 5, 3, padding=2, low=0.0 if zero == 0 else -4.0, high=4.0 if zero == 0 else 0.0)
    assert int(module.input_zero) == zero
    x = torch.randn(2, 7, 5, 5)
    with torch.no_grad():
        close(module, x, module(x))


def test_all_zero_channels():
    plain = nn.Conv2d(4, 3, 3)
    with torch.no_grad():
        plain.weight[1] = 0
        y = light.Conv2dInt8.from_conv(plain, -1.0, 1.0)(torch.randn(2, 4, 5, 5))
    torch.testing.assert_close(y[:, 1], plain.bias[1].detach().expand(2, 3, 3))


@pytest.mark.parametrize("activation", ["relu", "relu6", "silu", nn.LeakyReLU(0.2)])
def test_activation(activation):
    module = light.Conv2dInt8.from_conv(fnn.Conv2d(6, 9, 3, activation=activation), -2.0, 2.0)
    f = activation if isinstance(activation, nn.Module) else getattr(F, activation)
    x = torch.randn(2, 6, 8, 8)
    y = f(wanted(module, x))
    with torch.no_grad():
        torch.testing.assert_close(module(x), y)
    torch.testing.assert_close(module(x).detach(), y)  # recorded: two ops


def test_gradients():
    """Those of the layer with the weight that int8 and scale stand for; none where the input is out of range."""
    module = conv(6, 10, (3, 2), padding=1, stride=2, low=-1.0, high=1.0)
    x = torch.randn(2, 6, 7, 8, requires_grad=True)
    y = module(x)
    grad = torch.randn_like(y)
    actual = torch.autograd.grad(y, [x, module.bias], grad)
    ends = [(level - int(module.input_zero)) * float(module.input_scale) for level in (-0.5, 255.5)]
    clamped = x.clamp(*ends)
    other = F.conv2d(clamped, module.dequantized(), module.bias, padding=1, stride=2)
    torch.testing.assert_close(actual, torch.autograd.grad(other, [x, module.bias], grad), rtol=1e-4, atol=1e-5)


def test_opcheck():
    module, x = conv(4, 6, 3, padding="same"), torch.randn(2, 4, 5, 6, requires_grad=True)
    scales = module.input_scale, module.input_zero
    arguments = x, module.weight, module.scale, module.bias, *scales, *module._geometry()
    # test_aot_dispatch_dynamic takes three times as long as the others together; test_compiled_and_exported compiles.
    opcheck(
        OPS.conv_int8_forward, arguments, test_utils=("test_schema", "test_autograd_registration", "test_faketensor")
    )


def test_transforms():
    module, x = conv(4, 6, 3), torch.rand(3, 2, 4, 5, 6)
    y = torch.stack([module(one) for one in x]).detach()
    assert torch.equal(vmap(module)(x).detach(), y)
    tangent = torch.randn_like(x[0])
    value, change = jvp(module, (x[0],), (tangent,))
    assert torch.equal(value.detach(), y[0])
    torch.testing.assert_close(change.detach(), F.conv2d(tangent, module.dequantized()), rtol=1e-4, atol=1e-5)
    biases = torch.randn(3, 6)
    ys = vmap(lambda bias, x: functional_call(module, {"bias": bias}, x))(biases, x)
    torch.testing.assert_close(ys, y - module.bias.detach()[:, None, None] + biases[:, None, :, None, None])


def test_compiled_and_exported():
    module = nn.Sequential(conv(3, 8, 3), nn.ReLU(), nn.Flatten(), linear(72, 5)).eval()
    x = torch.randn(6, 3, 5, 5)
    with torch.no_grad():
        y = module(x)
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), y)
        program = torch.export.export(module, (x,))
        assert not any("fastops" in str(node.target) for node in program.graph.nodes)
        torch.testing.assert_close(program.module()(x), y, rtol=1e-4, atol=1e-5)
        with fastops.export_kernels():
            kept = torch.export.export(module, (x,))
        assert sum("conv_int8" in str(node.target) for node in kept.graph.nodes) == 2
        assert torch.equal(kept.module()(x), y)
        torch.testing.assert_close(torch.jit.trace(module, x)(x), y, rtol=1e-4, atol=1e-5)


def test_autocast_and_modes():
    module, x = conv(8, 8, 3), torch.randn(2, 8, 5, 5)
    with torch.inference_mode():
        y = module(x)
    assert torch.equal(module(x).detach(), y)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        half = module(x)
    assert half.dtype == torch.bfloat16
    with torch.no_grad():
        torch.testing.assert_close(half, module.bfloat16()(x.bfloat16()))


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda: conv(3, 4, 3)(torch.randn(1, 4, 5, 5)), "input must have 3 channels"),
        (lambda: conv(3, 4, 3)(torch.randn(3, 5)), "input must have shape"),
        (lambda: conv(3, 4, 3)(torch.randn(1, 3, 5, 5, dtype=torch.float64)), "input must be float32, bfloat16 or"),
        (lambda: conv(3, 4, 3)(torch.randn(1, 3, 2, 2)), "the kernel must fit into the padded input"),
        (lambda: linear(3, 4)(torch.randn(5, 4)), r"shape '\[-1, 3, 1, 1\]'|input must have"),
        (lambda: conv(3, 4, 3)([1.0]), "input must be a Tensor, got list"),
        (lambda: light.Conv2dInt8(70000, 1, 1), "must be at most 65536, for sums of 32 bits, got 70000"),
        (lambda: light.LinearInt8Static(70000, 1), "in_features must be at most 65536"),
        (lambda: light.Conv2dInt8.from_conv(nn.Linear(3, 3), 0, 1), "it is no torch.nn.Conv2d"),
        (lambda: light.Conv2dInt8.from_conv(nn.Conv2d(3, 3, 3, padding_mode="circular"), 0, 1), "'circular', not 'ze"),
        (lambda: conv(3, 4, 3, low=2.0, high=1.0), "low and high must be finite numbers, low <= high, got 2.0 and 1.0"),
        (lambda: conv(3, 4, 3).set_range("weight", 0, 1), "which must be 'input' or 'output', got 'weight'"),
    ],
)
def test_errors(call, error):
    with pytest.raises((RuntimeError, TypeError, ValueError), match=error), torch.no_grad():
        call()


# ---- calibration


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.5)
        self.never = nn.Linear(4, 4)
        self.fc = nn.Linear(72, 5)

    def forward(self, x):
        return self.fc(self.drop(self.norm(self.conv(x)).relu()).flatten(1))


def batches(count=3):
    torch.manual_seed(1)
    return [torch.randn(4, 3, 5, 5) for _ in range(count)]


def test_quantize_():
    torch.manual_seed(0)
    model, x = Net(), batches()
    plain = copy.deepcopy(model).eval()
    model.drop.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    names = list(dict(model.named_parameters()))
    report = light.quantize_(model, "int8_static", calibrate=x)
    assert str(report) == (
        "conv   torch.nn.Conv2d  ->        fastops.light.Conv2dInt8\n"
        "fc     torch.nn.Linear  ->        fastops.light.LinearInt8Static\n"
        "never  torch.nn.Linear  skipped:  calibration never called it\n"
        "left alone, no int8_static kernel: 1 x torch.nn.BatchNorm2d, 1 x torch.nn.Dropout\n"
        "2 replaced, 1 skipped, 2 left alone"
    )
    assert modes == {name: module.training for name, module in model.named_modules()}
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    low, high = (float(f(torch.cat(x))) for f in (torch.min, torch.max))
    torch.testing.assert_close(float(model.conv.input_scale), (high - low) / 255)
    assert int(model.conv.input_zero) == round(-low * 255 / (high - low))
    after_norm = torch.cat([plain.norm(plain.conv(one)) for one in x]).detach()
    torch.testing.assert_close(float(model.conv.output_scale), float(after_norm.max() - after_norm.min()) / 255)
    assert int(model.fc.input_zero) == 0
    assert set(dict(model.named_parameters())) == {
        name for name in names if "weight" not in name or "conv" not in name
    } - {"fc.weight"}
    model.eval()
    with torch.no_grad():
        y, z = model(x[0]), plain(x[0])
    assert (y - z).abs().max() < 0.05 * z.abs().max()
    report = light.quantize_(model, "int8_static", lambda _, name: name != "never", calibrate=x)
    (row,) = (row for row in report.skipped if row.name == "fc")
    assert row.result == "already quantized"


CALIBRATIONS = {
    "a tensor": lambda x: x[0],
    "tuples": lambda x: [(one,) for one in x],
    "dicts": lambda x: [{"x": one} for one in x],
    "a function": lambda x: lambda model: [model(one) for one in x] and None,
    "a generator": lambda x: (one for one in x),
}


def test_a_model_on_the_meta_device_cannot_be_calibrated():
    with torch.device("meta"):
        model = Net().eval()
    with pytest.raises(
        ValueError, match=r"quantize_: 'int8_static' is calibrated.*'conv.weight' is on the meta device"
    ):
        light.quantize_(model, "int8_static", calibrate=batches(1))


@pytest.mark.parametrize("kind", CALIBRATIONS)
def test_what_calibrates(kind):
    model = Net().eval()
    light.quantize_(model, "int8_static", calibrate=CALIBRATIONS[kind](batches(1)))
    low, high = (float(f(batches(1)[0])) for f in (torch.min, torch.max))
    torch.testing.assert_close(float(model.conv.input_scale), (high - low) / 255)


def nan_in(module, what):
    def calibrate(model):
        x = batches(1)[0]
        if what == "constant":
            x.fill_(3.0)
        elif what == "weight":
            module(model).norm.weight.data.fill_(float("inf"))
        else:
            x[0, 0, 0, 0] = float(what)
        model(x)

    return calibrate


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({}, "calibrate must be given with 'int8_static'"),
        ({"calibrate": []}, "calibrate gave no batch"),
        ({"calibrate": lambda model: None}, "calibrate called none of the layers"),
        ({"calibrate": 5}, "calibrate must be an iterable or a function, got int"),
        ({"calibrate": nan_in(None, "nan")}, r"the input of 'conv' \(torch.nn.Conv2d\) must be finite, got NaN"),
        ({"calibrate": nan_in(lambda model: model, "weight")}, r"the output of 'conv'.*must be finite"),
        ({"calibrate": nan_in(None, "constant")}, "the input of 'conv'.*must have a range, but all of it was 3.0"),
        ({"calibrate": [torch.randn(1, 7, 5, 5)]}, "expected input.*to have 3 channels"),
        ({"calibrate": batches(), "observer": "median"}, "observer must be one of 'minmax', 'percentile', 'mse', got"),
        ({"calibrate": batches(), "group_size": 32}, "group_size is for weight-only layers"),
        ({"calibrate": batches(), "config": "int8_dynamic"}, "calibrate is for 'int8_static', got one with"),
    ],
)
def test_bad_calibration(options, error):
    model = Net()
    with pytest.raises((ValueError, TypeError, RuntimeError), match=error):
        light.quantize_(model, **{"config": "int8_static", **options})
    assert type(model.conv) is nn.Conv2d
    assert type(model.fc) is nn.Linear
    assert model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_layers_that_it_cannot_take():
    model = nn.ModuleDict(
        {
            "circular": nn.Conv2d(2, 2, 3, padding_mode="circular"),
            "pruned": nn.Conv2d(2, 2, 3),
            "wide": nn.Conv2d(2, 2, 3).double(),
            "broken": nn.Conv2d(2, 2, 3),
            "one": nn.Conv1d(2, 2, 3),
            "chosen": nn.Conv2d(2, 2, 3),
            "not chosen": nn.Conv2d(2, 2, 3),
            "attention": nn.MultiheadAttention(8, 2),
        }
    )
    prune.random_unstructured(model["pruned"], "weight", 0.5)
    model["broken"].weight.data[0, 0, 0, 0] = float("nan")
    report = light.quantize_(
        model,
        "int8_static",
        lambda module, name: name != "not chosen",
        calibrate=lambda _: model["chosen"](torch.randn(1, 2, 5, 5)),
    )
    assert [row.name for row in report.replaced] == ["chosen"]
    reasons = {row.name: row.result for row in report.skipped}
    assert "padding_mode is 'circular'" in reasons["circular"]
    assert "computed at every call" in reasons["pruned"]
    assert "float64" in reasons["wide"]
    assert "NaN or infinity" in reasons["broken"]
    assert reasons["not chosen"] == "filter_fn said no"
    assert "reads its weight directly" in reasons["attention.out_proj"]
    assert [row.name for row in report.left] == ["one", "attention"]


def test_observers():
    """An outlier widens the range of minmax, and not that of the others; histograms grow without loss."""
    torch.manual_seed(0)
    parts = [torch.rand(40000) * 2 - 0.5, torch.rand(40000) - 0.5, torch.full((1,), 100.0)]
    ranges = {}
    for observer in ("minmax", "percentile", "mse"):
        seen = Observer(observer != "minmax")
        for part in parts:
            seen.see(part)
        ranges[observer] = seen.range(observer, False)
    assert ranges["minmax"] == pytest.approx((-0.5, 100.0), abs=1e-4)
    assert ranges["percentile"] == pytest.approx((-0.5, 1.5), abs=0.04)
    low, high = ranges["mse"]
    assert -0.5 <= low < 0 < high < 100
    seen = Observer(True)
    for scale in (1e-3, 1.0, 1e3):
        seen.see(torch.rand(1000) * scale)
    assert float(seen.counts.sum()) == 3000
    assert seen.range("percentile", False)[1] == pytest.approx(1e3, rel=0.01)


def test_copies_and_checkpoints():
    def make():
        model = Net().eval()
        light.quantize_(model, "int8_static", calibrate=batches())
        return model

    torch.manual_seed(0)
    model, other, x = make(), make(), batches(1)[0]
    with torch.no_grad():
        y = model(x)
        assert not torch.equal(other(x), y)  # and packs its weights
        other.load_state_dict(model.state_dict())
        assert torch.equal(other(x), y)
        assert torch.equal(copy.deepcopy(model)(x), y)
        assert torch.equal(pickle.loads(pickle.dumps(model))(x), y)
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        assert torch.equal(torch.load(buffer, weights_only=False)(x), y)
    with pytest.raises(
        RuntimeError, match=r"conv\.weight must be int8, got float32: load float weights before quantize_"
    ):
        model.load_state_dict(Net().state_dict(), strict=False)


def test_changes_are_noticed():
    module, x = conv(6, 8, 3), torch.randn(2, 6, 5, 5)
    with torch.no_grad():
        module(x)
        module.weight.copy_(conv(6, 8, 3).weight.flip(0))
        close(module, x, module(x))
        module.set_range("input", -5.0, 1.0)
        close(module, x, module(x))
        module.stride = (2, 2)
        close(module, x, module(x))
        module.half()
    assert module.scale.dtype == module.input_scale.dtype == torch.float32
    assert module.input_zero.dtype == torch.int32
    assert module.bias.dtype == torch.float16


def test_tensors_of_pytorch():
    """What replace_, fuse and functional calls make of the layers."""
    torch.manual_seed(0)
    model, x = Net().eval(), batches(1)[0]
    light.quantize_(model, "int8_static", calibrate=batches())
    with torch.no_grad():
        y = model(x)
        torch.testing.assert_close(fastops.fuse(model)(x), y, rtol=1e-4, atol=1e-4)
        fastops.replace_(model)
        torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-4)
    assert by_torch(
        x,
        *(getattr(model.conv, name) for name in ("weight", "scale", "bias")),
        model.conv.input_scale,
        model.conv.input_zero,
        *model.conv._geometry(),
    ).shape == (4, 8, 3, 3)
