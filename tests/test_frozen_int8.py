"""What freeze makes of layers with int8 weights: chains of levels, against the layers one by one."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastops
from fastops import light


def convolution(inputs, outputs, kernel, stride=1, groups=1):
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    norm = nn.BatchNorm2d(outputs)
    nn.init.uniform_(norm.running_mean, -0.5, 0.5)
    nn.init.uniform_(norm.running_var, 0.5, 2)
    nn.init.uniform_(norm.weight, -1.5, 1.5)  # scales of either sign
    nn.init.uniform_(norm.bias, -0.5, 0.5)
    return [conv, norm]


class Block(nn.Module):
    def __init__(self, inputs, outputs, stride=1):
        super().__init__()
        self.body = nn.Sequential(
            *convolution(inputs, outputs, 3, stride), nn.ReLU(inplace=True), *convolution(outputs, outputs, 3)
        )
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else nn.Sequential(*convolution(inputs, outputs, 1, stride))

    def forward(self, x):
        y = self.body(x)
        y += self.shortcut(x)
        return F.relu(y)


class Inverted(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.body = nn.Sequential(
            *convolution(channels, 24, 1), nn.ReLU6(), *convolution(24, 24, 3, 1, 24), nn.ReLU6(),
            *convolution(24, channels, 1),
        )  # fmt: skip

    def forward(self, x):
        return x + self.body(x)


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        *convolution(3, 16, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1), Block(16, 16), Block(16, 20, 2), Inverted(20),
        *convolution(20, 32, 1), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(), nn.Linear(32, 10),
    ).eval()  # fmt: skip


def quantized(model, x, **options):
    model = copy.deepcopy(model)
    light.quantize_(model, "int8_static", calibrate=[x], **options)
    return model


def difference(y, z):
    return float((y - z).square().mean().sqrt() / z.square().mean().sqrt())


def test_chains():
    torch.manual_seed(1)
    plain, x = network(), torch.randn(4, 3, 40, 40)
    model = quantized(plain, x)
    frozen = fastops.freeze(model)
    with torch.no_grad(), fastops.record() as calls:
        y = frozen(x)
    # Of all calls, only the first takes a float tensor.
    assert [(call.op, call.dtype) for call in calls] == (
        [("conv_int8", "float32"), ("pool_int8", "uint8")] + 9 * [("conv_int8", "uint8")] + [("pool_int8", "uint8")]
        + [("linear_int8", "uint8")]
    )  # fmt: skip
    with torch.no_grad():
        z, w = plain(x), model(x)
    assert difference(w, z) < 0.1
    assert difference(y, z) < 0.1
    assert difference(y, w) < 0.06
    report = fastops.freeze(model).fastops_report
    assert len(report.folded) == 10
    results = [row.result for row in report.frozen]
    assert results.count("conv2d_int8, activation='relu', residual, uint8 out") == 2
    assert results.count("conv2d_int8, residual, uint8 out") == 1
    assert results.count("conv2d_int8, activation='relu6', uint8 out") == 3
    assert results.count("linear_int8") == 1
    assert len(results) == 11


def test_the_same_in_pytorchs_ops():
    """As torch.compile and torch.export have it: the same levels, but where roundings fall apart."""
    torch.manual_seed(1)
    model, x = quantized(network(), torch.randn(4, 3, 40, 40)), torch.randn(2, 3, 40, 40)
    frozen = fastops.freeze(model)
    with torch.no_grad():
        y = frozen(x)
        assert difference(frozen.model(x), y) < 0.01
        assert difference(torch.compile(frozen, fullgraph=True, backend="eager")(x), y) < 0.01
        assert difference(torch.export.export(frozen, (x,)).module()(x), y) < 0.01
        for other in (copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen))):
            assert torch.equal(other(x), y)
        half = copy.deepcopy(frozen).bfloat16()(x.bfloat16())
        assert half.dtype == torch.bfloat16
        assert difference(half.float(), y) < 0.05


@pytest.mark.parametrize("channels_last", [False, True])
def test_layouts(channels_last):
    """Whoever sees an image sees it as in the model."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 12, 3)).eval()
    x = torch.randn(2, 3, 9, 9)
    model = quantized(model, x)
    frozen = fastops.freeze(model, channels_last=channels_last)
    with torch.no_grad():
        for image in (x, x.contiguous(memory_format=torch.channels_last), x[:0], x.transpose(2, 3)):
            y, z = frozen(image), model(image)
            assert y.stride() == z.stride() or image.numel() == 0
            torch.testing.assert_close(y, z, rtol=0, atol=0.05)
        torch.testing.assert_close(frozen(x[0]), model(x[0]), rtol=0, atol=0.05)


class Sums(nn.Module):
    """Sums that are none of levels: of an input, of a tensor that somebody else reads, of another shape."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))

    def forward(self, x):
        y = self.a(x) + x
        z = self.b(y)
        return self.c(z) + z.mean((2, 3), keepdim=True), z


def test_sums_of_floats():
    torch.manual_seed(0)
    x = torch.randn(2, 4, 6, 6)
    model = quantized(Sums().eval(), x)
    frozen = fastops.freeze(model)
    with torch.no_grad():
        for y, z in zip(frozen(x), model(x), strict=True):
            torch.testing.assert_close(y, z, rtol=1e-3, atol=1e-3)


def test_some_layers_are_not_quantized():
    torch.manual_seed(1)
    plain, x = network(), torch.randn(2, 3, 40, 40)
    model = quantized(plain, x, filter_fn=lambda module, name: name != "4.body.3" and isinstance(module, nn.Conv2d))
    with torch.no_grad():
        y = fastops.freeze(model)(x)
        assert difference(y, model(x)) < 0.06


@pytest.mark.parametrize("activation", [nn.SiLU(), nn.Hardswish(), nn.Sigmoid()])
def test_other_activations(activation):
    torch.manual_seed(0)
    x = torch.randn(2, 8, 9, 9)
    model = quantized(nn.Sequential(nn.Conv2d(8, 8, 3), activation, nn.Conv2d(8, 8, 3)).eval(), x)
    frozen = fastops.freeze(model)
    with torch.no_grad(), fastops.record() as calls:
        y = frozen(x)
    assert [call.dtype for call in calls] == ["float32", "uint8"]
    with torch.no_grad():
        torch.testing.assert_close(y, model(x), rtol=0, atol=0.02)


def test_pools():
    torch.manual_seed(0)
    x = torch.randn(2, 8, 12, 12)
    model = nn.Sequential(
        nn.Conv2d(8, 8, 3, padding=1), nn.AvgPool2d(3, 2, 1), nn.Conv2d(8, 8, 1), nn.MaxPool2d(2), nn.Conv2d(8, 4, 1),
        nn.AdaptiveAvgPool2d((2, 1)), nn.Flatten(), nn.Linear(8, 3),
    ).eval()  # fmt: skip
    model = quantized(model, x)
    frozen = fastops.freeze(model)
    with torch.no_grad(), fastops.record() as calls:
        y = frozen(x)
    assert [call.op for call in calls] == ["conv_int8", "pool_int8"] * 3 + ["linear_int8"]
    with torch.no_grad():
        assert difference(y, model(x)) < 0.03
        assert difference(frozen.model(x), y) < 0.01


def test_a_change_of_the_model_is_an_error():
    x = torch.randn(2, 3, 9, 9)
    model = quantized(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)).eval(), x)
    frozen = fastops.freeze(model)
    with torch.no_grad():
        frozen(x)
        model[0].set_range("input", -1.0, 1.0)
        with pytest.raises(RuntimeError, match=r"has changed since it was frozen"):
            frozen(x)


def test_hooks_are_called():
    x, seen = torch.randn(2, 3, 9, 9), []
    model = quantized(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)).eval(), x)
    model[0].register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad():
        y = fastops.freeze(model)(x)
        assert seen
        torch.testing.assert_close(y, model(x), rtol=1e-3, atol=1e-3)


def test_digits():
    """scikit-learn's digits: within 0.3 points of float32, layer by layer and frozen."""
    datasets = pytest.importorskip("sklearn.datasets")
    torch.manual_seed(0)
    data = datasets.load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(data.target)
    order = torch.randperm(len(labels))
    train, test = order[:1200], order[1200:]
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(6):
        for batch in train.split(100):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()

    def accuracy(one):
        with torch.no_grad():
            return float((one(images[test]).argmax(1) == labels[test]).float().mean())

    model.eval()
    wanted = accuracy(model)
    assert wanted > 0.95
    for observer in ("minmax", "percentile", "mse"):
        int8 = quantized(model, images[train[:300]], observer=observer)
        assert accuracy(int8) > wanted - 0.0035
        assert accuracy(fastops.freeze(int8)) > wanted - 0.0035
