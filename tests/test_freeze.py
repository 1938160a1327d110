"""fastops.freeze: what a frozen model computes, when it refuses, and what its layers do with a residual."""

import copy
import gc
import pickle
import random

import pytest
import torch
import torch.nn.functional as F
from compare import exact
from torch import nn

import fastops
import fastops.functional as FF
from fastops import _C
from fastops.freeze import FrozenLayer


def prepared(model: nn.Module) -> nn.Module:
    """In eval mode, with statistics as after training."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias)
    return model.eval()


def agrees(model: nn.Module, *inputs: torch.Tensor, frozen: nn.Module | None = None, **options: bool) -> nn.Module:
    """Its error against float64 is at most 3 times as large as the model's, and some roundings."""
    frozen = fastops.freeze(model, **options) if frozen is None else frozen
    with torch.no_grad():
        wide = [x.double() if x.is_floating_point() else x for x in inputs]
        reference = copy.deepcopy(model).double()(*wide)
        theirs, ours = model(*inputs), frozen(*inputs)
    assert ours.dtype == theirs.dtype
    assert ours.shape == theirs.shape
    scale = reference.abs().max().item() if reference.numel() else 0.0
    error = lambda y: (y.double() - reference).abs().max().item() if y.numel() else 0.0  # noqa: E731
    assert error(ours) <= 3 * error(theirs) + 16 * torch.finfo(ours.dtype).eps * scale
    return frozen


class Residual(nn.Module):
    """Both kinds of ResNet's blocks."""

    def __init__(self, channels: int, narrow: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, narrow, 1, bias=False), nn.BatchNorm2d(narrow)
        self.conv2, self.bn2 = nn.Conv2d(narrow, narrow, 3, stride, 1, bias=False), nn.BatchNorm2d(narrow)
        self.conv3, self.bn3 = nn.Conv2d(narrow, 2 * channels, 1, bias=False), nn.BatchNorm2d(2 * channels)
        self.down = nn.Sequential(
            nn.Conv2d(channels, 2 * channels, 1, stride, bias=False), nn.BatchNorm2d(2 * channels)
        )
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        y += self.down(x)
        return self.relu(y)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU6())
        self.block = Residual(16, 8, 2)
        self.depthwise = nn.Sequential(nn.Conv2d(32, 32, 3, 1, 1, groups=32), nn.BatchNorm2d(32), nn.SiLU())
        self.head = nn.Linear(32, 10)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        x = self.depthwise(self.block(self.stem(x)))
        return self.head(self.dropout(F.adaptive_avg_pool2d(x, 1).flatten(1)))


@pytest.mark.parametrize("channels_last", [True, False])
def test_a_convolutional_network(isa, channels_last):
    model = prepared(Net())
    for batch in (1, 3):
        frozen = agrees(model, torch.randn(batch, 3, 19, 22), channels_last=channels_last)
    report = frozen.fastops_report
    assert [row.name for row in report.folded] == [
        "stem.1", "block.bn1", "block.bn2", "block.bn3", "block.down.1", "depthwise.1",
    ]  # fmt: skip
    assert {row.name for row in report.frozen} == {
        "stem.0", "block.conv1", "block.conv2", "block.conv3", "block.down.0", "depthwise.0", "head",
    }  # fmt: skip
    with torch.no_grad(), fastops.record() as rows:
        frozen(torch.randn(2, 3, 19, 22))
    assert "aten" not in {row.kernel for row in rows}
    assert {row.op for row in rows} == {"conv", "linear", "adaptive_avg_pool2d"}  # nothing between the layers


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes(dtype):
    agrees(prepared(Net()).to(dtype), torch.randn(2, 3, 19, 22, dtype=dtype))


def test_linear_layers():
    narrow = nn.Sequential(nn.Linear(10, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 1))
    wide = nn.Sequential(nn.Linear(300, 400), nn.GELU(), nn.Linear(400, 10), nn.Tanh())
    for size in ((100,), (), (0,), (2, 3)):
        agrees(narrow, torch.randn(*size, 10))
        agrees(wide, torch.randn(*size, 300))
    with torch.no_grad(), fastops.record() as rows:
        fastops.freeze(narrow)(torch.randn(4, 10))
        fastops.freeze(wide)(torch.randn(4, 300))
    assert [row.op for row in rows] == ["mlp", "linear", "linear"]


# ---- residuals -------------------------------------------------------------------------------------------------------


CONVOLUTIONS = [
    (16, 24, dict(kernel_size=1)),
    (16, 24, dict(kernel_size=3, padding=1)),
    (64, 70, dict(kernel_size=3, padding=1)),
    (16, 24, dict(kernel_size=3, stride=2, padding=1)),
    (16, 24, dict(kernel_size=5, padding=2, groups=4)),
    (3, 8, dict(kernel_size=3, padding=1)),
    (24, 24, dict(kernel_size=3, padding=1, groups=24)),
    (20, 7, dict(kernel_size=1, stride=2)),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("case", CONVOLUTIONS, ids=lambda case: "-".join(map(str, case[:2] + tuple(case[2].values()))))
def test_residual_of_a_convolution(isa, case, activation, dtype):
    inputs, outputs, options = case
    options = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1, **options}
    kernel = options.pop("kernel_size")
    w = (torch.randn(outputs, inputs // options["groups"], kernel, kernel) / kernel).to(dtype)
    f = {None: lambda y: y, "relu": F.relu, "silu": F.silu}[activation]
    for layout in (torch.contiguous_format, torch.channels_last):
        for bias in (None, torch.randn(outputs).to(dtype)):
            layer = FrozenLayer("conv2d", w.contiguous(memory_format=layout), bias, options, activation)
            for size in ((2, inputs, 13, 17), (1, inputs, 8, 8)):
                x = torch.randn(size).to(dtype).contiguous(memory_format=layout)
                wide = F.conv2d(x.double(), w.double(), None if bias is None else bias.double(), **options)
                residual = torch.randn(wide.shape).to(dtype)
                with torch.no_grad():
                    for added in (residual, residual.contiguous(memory_format=torch.channels_last)):
                        y = layer.call(x, added)
                        expected = f(wide + added.double())
                        bound = 64 * torch.finfo(dtype).eps * max(1, wide.abs().max().item())
                        assert (y.double() - expected).abs().max().item() <= bound
                        exact(layer.call(x, added), y)


@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
def test_residual_of_a_linear_layer(isa, activation):
    f = {None: lambda y: y, "relu": F.relu, "gelu": F.gelu}[activation]
    for m, n, k in ((1, 5, 7), (3, 70, 1030), (64, 33, 40), (200, 64, 900), (5, 3, 0)):
        layer = FrozenLayer("linear", torch.randn(n, k) / 8, torch.randn(n), {}, activation)
        x, residual = torch.randn(m, k), torch.randn(m, n)
        with torch.no_grad():
            y = layer.call(x, residual)
        wide = F.linear(x.double(), layer.weight.double(), layer.bias.double()) + residual.double()
        assert (y.double() - f(wide)).abs().max().item() <= 4e-6 * max(1, wide.abs().max().item())


def test_bits_for_1_and_2_threads():
    model = prepared(Net())
    x = torch.randn(4, 3, 40, 40)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        with torch.no_grad():
            results.append(fastops.freeze(model)(x))
    exact(*results)


# ---- a model that changes --------------------------------------------------------------------------------------------


def changes():
    yield "optimizer", lambda m: torch.optim.SGD(m.parameters(), 0.1).step()
    yield "load_state_dict", lambda m: m.load_state_dict(prepared(Net()).state_dict())
    yield "data in place", lambda m: m.head.weight.data.mul_(2)
    yield "data", lambda m: setattr(m.head.weight, "data", m.head.weight.data.clone())
    yield "running mean", lambda m: m.block.bn1.running_mean.add_(1)
    yield "one step of training", lambda m: m.train()(torch.randn(4, 3, 16, 16))


@pytest.mark.parametrize("change", [one for _, one in changes()], ids=[name for name, _ in changes()])
def test_a_changed_model_is_noticed(change):
    model = prepared(Net())
    frozen = fastops.freeze(model)
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        frozen(x)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    change(model)
    with torch.no_grad():
        with pytest.raises(RuntimeError, match="has changed since it was frozen"):
            frozen(x)
        agrees(model.eval(), x)


def test_the_model_may_go():
    model = prepared(Net())
    frozen, x = fastops.freeze(model), torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        before = frozen(x)
        del model
        gc.collect()
        exact(frozen(x), before)
        exact(frozen(x), before)


def test_refuses_to_train():
    frozen = fastops.freeze(Net())
    with pytest.raises(RuntimeError, match="cannot be trained"):
        frozen.train()
    assert not any(module.training for module in frozen.modules())
    assert list(frozen.parameters()) == []
    with pytest.raises(RuntimeError, match="a frozen model has no gradients, but its input requires one"):
        frozen(torch.randn(2, 3, 16, 16, requires_grad=True))
    with pytest.raises(TypeError, match="model"):
        fastops.freeze(3)


def test_the_model_stays_as_it_is():
    model = Net()
    before = copy.deepcopy(model.state_dict())
    frozen = fastops.freeze(model)
    frozen(torch.randn(2, 3, 16, 16))
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.head.weight.requires_grad
    model(torch.randn(2, 3, 16, 16)).sum().backward()


# ---- copies, files, moves, graphs ------------------------------------------------------------------------------------


def test_copies_and_files():
    model, x = prepared(Net()), torch.randn(2, 3, 16, 16)
    frozen = fastops.freeze(model)
    with torch.no_grad():
        y = frozen(x)
        for other in (copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen))):
            exact(other(x), y)
            assert other.state_dict().keys() == frozen.state_dict().keys()
        model.head.weight.add_(1)
        exact(other(x), y)  # a copy does not know the model


def test_moves():
    model, x = prepared(Net()), torch.randn(2, 3, 16, 16)
    frozen = fastops.freeze(model).double()
    with torch.no_grad():
        assert frozen(x.double()).dtype == torch.float64
        torch.testing.assert_close(frozen(x.double()).float(), model(x), rtol=1e-4, atol=1e-5)


def test_wrong_inputs_raise_as_in_the_model():
    frozen = fastops.freeze(prepared(Net()))
    for x in (torch.randn(2, 4, 16, 16), torch.randn(2, 3, 16, 16).double(), torch.randn(5)):
        with pytest.raises(RuntimeError), torch.no_grad():
            frozen(x)


def test_no_batch_and_other_first_calls():
    model = prepared(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()))
    frozen = fastops.freeze(model)
    with torch.inference_mode():
        y = frozen(torch.randn(1, 3, 9, 9))
    with torch.no_grad():
        assert frozen(torch.randn(3, 9, 9)).shape == (8, 7, 7)
        assert frozen(torch.randn(0, 3, 9, 9)).shape == (0, 8, 7, 7)
        with torch.autocast("cpu", torch.bfloat16):
            assert frozen(torch.randn(1, 3, 9, 9)).dtype == torch.bfloat16
        each = torch.vmap(frozen)(torch.randn(4, 1, 3, 9, 9))
        assert each.shape == (4, *y.shape)
        wide = torch.randn(2, 3, 9, 18)[..., ::2]
        exact(frozen(wide), frozen(wide.contiguous()))


def test_export_and_compile():
    model, x = prepared(Net()), torch.randn(2, 3, 16, 16)
    frozen = fastops.freeze(model)
    with torch.no_grad():
        y = frozen(x)
        program = torch.export.export(frozen, (x,))
        torch.testing.assert_close(program.module()(x), y)
        compiled = torch.compile(frozen, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), y)


# ---- what cannot be traced -------------------------------------------------------------------------------------------


class Decides(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = Net()
        self.attention = nn.MultiheadAttention(10, 2, batch_first=True)
        self.other = nn.Linear(10, 10)

    def forward(self, x):
        y = self.net(x)
        y = y + self.attention(y[None], y[None], y[None])[0][0]
        return self.other(y) if y.sum() > 0 else y


def test_control_flow():
    model = prepared(Decides())
    frozen = agrees(model, torch.randn(2, 3, 16, 16))
    report = frozen.fastops_report
    assert report.untraced[0].name == ""
    assert report.untraced[0].result == "its forward decides by an input"
    assert len(report.folded) == 6
    assert any(isinstance(module, FrozenLayer) for module in frozen.modules())
    assert "frozen" in str(report)


def test_hooks_are_called():
    model = prepared(Net())
    calls = []
    model.stem[0].register_forward_hook(lambda *args: calls.append("stem"))
    model.block.bn2.register_forward_pre_hook(lambda *args: calls.append("bn2"))
    agrees(model, torch.randn(2, 3, 16, 16))
    assert calls.count("stem") == 3
    assert calls.count("bn2") == 3


def test_shared_modules_and_results_in_between():
    class Shares(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn1, self.bn2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)

        def forward(self, x):
            y = self.conv(x)
            z = self.bn1(self.conv(torch.relu(self.bn2(self.conv(y)))))
            return z + y + z

    frozen = agrees(prepared(Shares()), torch.randn(2, 4, 9, 9))
    assert len(frozen.fastops_report.folded) == 2


def test_a_batch_norm_that_stays_one_uses_its_statistics():
    model = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Tanh(), nn.BatchNorm2d(4))
    prepared(model)
    x = torch.randn(2, 4, 9, 9)
    for training in (False, True):
        model.train(training)
        frozen = fastops.freeze(model)
        before = copy.deepcopy(model.state_dict())
        agrees(copy.deepcopy(model).eval(), x, frozen=frozen)
        model.train()
        agrees(copy.deepcopy(model).eval(), x, frozen=frozen)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        assert model.training


def random_model(seed: int) -> tuple[nn.Module, torch.Tensor]:
    rng = random.Random(seed)

    class Random(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.steps = []
            self.layers = nn.ModuleList()
            channels = self.first = rng.choice((3, 4, 16))
            for _ in range(rng.randint(2, 8)):
                kind = rng.choice(("conv", "conv", "conv", "relu", "silu", "block", "depthwise", "add"))
                layers = []
                if kind == "conv":
                    out, size = rng.choice((4, 8, 20, 32)), rng.choice((1, 3, 5))
                    layers = [nn.Conv2d(channels, out, size, padding=size // 2, bias=rng.random() < 0.5)]
                    channels = out
                elif kind == "depthwise":
                    layers = [nn.Conv2d(channels, channels, 3, padding=1, groups=channels)]
                elif kind == "block":
                    layers = [Residual(channels, 4)]
                    channels *= 2
                elif kind in ("relu", "silu"):
                    layers = [nn.ReLU(inplace=rng.random() < 0.5) if kind == "relu" else nn.SiLU()]
                if kind in ("conv", "depthwise") and rng.random() < 0.6:
                    layers.append(nn.BatchNorm2d(channels, affine=rng.random() < 0.8))
                self.steps.append(kind)
                self.layers.append(nn.Sequential(*layers))
            self.how = [rng.choice(("plain", "skip", "function")) for _ in self.steps]

        def forward(self, x):
            previous = x
            for kind, how, layer in zip(self.steps, self.how, self.layers, strict=True):
                if kind == "add":
                    x = previous + x if previous.shape[1] == x.shape[1] else x
                    continue
                before, x = x, layer(x)
                if how == "skip" and kind == "depthwise":
                    x = x + before
                if how == "function":
                    x = F.relu(x) if kind == "conv" else x.relu()
                previous = before if kind == "depthwise" else x.tanh() if how == "skip" else x
            return x

    model = Random()
    return prepared(model), torch.randn(rng.randint(1, 3), model.first, rng.randint(3, 20), rng.randint(3, 20))


@pytest.mark.parametrize("seed", range(60))
def test_random_models(seed):
    torch.manual_seed(seed)
    model, x = random_model(seed)
    agrees(model, x, channels_last=seed % 2 == 0)


def test_packed_once():
    conv = nn.Conv2d(64, 64, 3, padding=1)
    layer = FrozenLayer("conv2d", conv.weight.detach(), None, dict(stride=1, padding=1, dilation=1, groups=1), None)
    x = torch.randn(1, 64, 14, 14)
    made = []
    with torch.no_grad():
        for _ in range(3):
            layer.call(x)
            made.append(_C.plans_made())
    assert layer._packed.packed_bytes() > 0
    bytes_of_one = layer._packed.packed_bytes()
    for size in range(2, 12):
        layer.call(torch.randn(size, 64, 14, 14))
    assert layer._packed.packed_bytes() <= 4 * bytes_of_one
    with torch.no_grad():
        torch.testing.assert_close(layer.call(x), FF.conv2d(x, conv.weight, padding=1))


@pytest.mark.parametrize("channels", [3, 16])
def test_max_pool_of_a_convolution(isa, channels):
    """For any batch: whole blocks of images and the last one may be packed in different ways."""
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(channels, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(24, 8, 3)
    )
    model.append(nn.MaxPool2d((3, 2)))
    frozen = agrees(prepared(model), torch.randn(2, channels, 28, 28))
    for batch in (1, 3, 17):
        for size in ((28, 28), (13, 17), (30, 31)):
            x = torch.randn(batch, channels, *size)
            agrees(model, x, frozen=frozen)
            agrees(model, x.contiguous(memory_format=torch.channels_last), frozen=frozen)
    with torch.no_grad(), fastops.record() as calls:
        frozen(torch.randn(1, channels, 28, 28))
    assert [call.op for call in calls] == ["conv_max_pool2d", "conv_max_pool2d"]
    assert frozen(torch.randn(0, channels, 28, 28)).shape == model(torch.randn(0, channels, 28, 28)).shape
    with pytest.raises(RuntimeError, match="output size is too small|too small"):
        frozen(torch.randn(1, channels, 8, 8))


# ---- inverted residuals


class Inverted(nn.Module):
    """MobileNetV2's block, with any activation, or with a layer between its depthwise and its last convolution."""

    def __init__(self, narrow, wide, out, kernel=3, stride=1, f=nn.ReLU6, between=None, dilation=1) -> None:
        super().__init__()
        padding = dilation * (kernel // 2)
        expand = [nn.Conv2d(narrow, wide, 1, bias=False), nn.BatchNorm2d(wide), f()] if wide != narrow else []
        depthwise = nn.Conv2d(wide, wide, kernel, stride, padding, dilation, groups=wide, bias=False)
        last = [nn.Conv2d(wide, out, 1, bias=False), nn.BatchNorm2d(out)]
        self.body = nn.Sequential(*expand, depthwise, nn.BatchNorm2d(wide), f(), *([between] if between else []), *last)
        self.adds = narrow == out and stride == 1

    def forward(self, x):
        return x + self.body(x) if self.adds else self.body(x)


INVERTED = {
    "residual": (Inverted(8, 40, 8), 1),
    "stride": (Inverted(8, 40, 12, kernel=5, stride=2, f=nn.SiLU), 1),
    "dilated": (Inverted(8, 33, 8, dilation=2, f=nn.Hardswish), 1),
    "no_expansion": (Inverted(16, 16, 24), 1),
    "no_projection": (Inverted(8, 40, 8, between=nn.Softmax(1)), 1),
    "two": (nn.Sequential(Inverted(8, 40, 8), nn.ReLU(), Inverted(8, 24, 8)), 2),
}


@pytest.mark.parametrize("name", INVERTED)
def test_inverted_residuals(isa, name):
    """Any size of the image, batch and layout of the input; the wide images are not there."""
    torch.manual_seed(3)
    model, blocks = INVERTED[name]
    model = prepared(copy.deepcopy(model))
    channels = next(model.parameters()).shape[1 if "no_exp" not in name else 0]
    frozen = agrees(model, torch.randn(2, channels, 14, 15))
    for size in ((1, channels, 1, 7), (3, channels, 40, 3), (5, channels, 9, 33)):
        agrees(model, torch.randn(size), frozen=frozen)
        agrees(model, torch.randn(size).contiguous(memory_format=torch.channels_last), frozen=frozen)
    x = torch.randn(2, channels, 20, 20)
    with torch.no_grad():
        with fastops.record() as calls:
            y = frozen(x)
        exact(copy.deepcopy(frozen)(x), y)
        for other in (x[:, :, ::2, ::2], x.transpose(2, 3), x[:1].expand(3, -1, -1, -1)):
            agrees(model, other, frozen=frozen)
        assert frozen(x[:0]).shape == model(x[:0]).shape
    assert [call.op for call in calls].count("inverted_residual") == blocks
    exported = torch.export.export(frozen, (x,)).module()(x)
    torch.testing.assert_close(exported, y)


def test_inverted_residuals_that_are_none():
    """A layer that is called twice is two. None where an image in between is used, or where the input changes."""

    class Odd(nn.Module):
        def __init__(self, way: str) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(8, 24, 1), nn.Conv2d(24, 24, 3, padding=1, groups=24)
            self.c, self.way = nn.Conv2d(24, 8, 1), way

        def forward(self, x):
            wide = self.a(x)
            deep = self.b(wide)
            if self.way == "twice":
                deep = self.b(deep)
            if self.way == "in_between":
                return self.c(deep), wide, deep
            if self.way == "changed":
                x.add_(1)
            return self.c(deep)

    for way, blocks in (("twice", 2), ("in_between", 0), ("changed", 0)):
        model = Odd(way).eval()
        x = torch.randn(2, 8, 10, 10)
        with torch.no_grad(), fastops.record() as calls:
            found = fastops.freeze(model)(x.clone())
        with torch.no_grad():
            torch.testing.assert_close(found, model(x.clone()))
        assert [call.op for call in calls].count("inverted_residual") == blocks
