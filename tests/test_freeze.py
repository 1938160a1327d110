"""fastops.freeze: what a frozen model computes, when it refuses, and what its layers do with a residual."""

import copy
import gc
import inspect
import itertools
import multiprocessing.reduction
import operator
import pickle
import random
import threading

import pytest
import torch
import torch.nn.functional as F
from compare import exact
from torch import nn
from torch.nn.utils import parametrizations, prune

import fastops
import fastops.functional as FF
from fastops import _C
from fastops._frozen_layers import FrozenLayer


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


class Does(nn.Module):
    """forward is a function of the module and its input."""

    def __init__(self, forward, **modules):
        super().__init__()
        self.forward_of = forward
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.forward_of(self, x)


def changed(x, *_):
    return x


WRITES = {
    "x += layer(x)": lambda m, x: changed(operator.iadd(x, m.layer(x))) * 2,
    "x += layer(x), relu": lambda m, x: F.relu(operator.iadd(x, m.layer(x))),
    "y += layer(x), and y": lambda m, x: (y := x * 1) + operator.iadd(y, m.layer(x)),
    "layer(x), mul_": lambda m, x: changed(y := m.layer(x), y.mul_(2)),
    "layer(x), +=": lambda m, x: changed(y := m.layer(x), operator.iadd(y, 1)),
    "layer(x), a view's relu_": lambda m, x: changed(y := m.layer(x), y[:2].relu_()),
    "layer(x), a view's leaky_relu": lambda m, x: changed(y := m.layer(x), F.leaky_relu(y[:2], 0.1, True)),
    "layer(x), a view's module": lambda m, x: changed(y := m.layer(x), m.relu(y[:2])),
    "layer(x), a view, relu_": lambda m, x: changed((y := m.layer(x)).flatten(2), y.relu_()) + 0,
    "layer(x), x.mul_, relu": lambda m, x: F.relu(changed(m.layer(x), x.mul_(3))),
    "layer(x), x.mul_, + x": lambda m, x: changed(m.layer(x), x.mul_(3)) + x,
    "layer(x), relu_ of x, relu": lambda m, x: F.relu(changed(m.layer(x), F.relu(x, True))),
    "layer(x), z.mul_, + z": lambda m, x: changed(m.layer(x), (z := x * 2).mul_(3)) + z,
    "layer(x), x.zero_, max_pool": lambda m, x: F.max_pool2d(changed(m.layer(x), x.zero_()), 2),
    "layer(x), max_pool, x.zero_, relu": lambda m, x: F.relu(changed(F.max_pool2d(m.layer(x), 2), x.zero_())),
    "norm(x), x.zero_, relu": lambda m, x: F.relu(changed(m.norm(x), x.zero_())),
    "norm(x) + x, x.zero_, relu": lambda m, x: F.relu(changed(m.norm(x) + x, x.zero_())),
    "layer twice, x.zero_ in between": lambda m, x: m.layer(changed(F.relu(m.layer(x)), x.zero_())),
    "layer(x) + a row": lambda m, x: F.relu(m.layer(x) + x[..., :1, :]),
    "layer(x) + more": lambda m, x: F.relu(m.layer(x) + x.unsqueeze(0)),
    "layer(x) + float64": lambda m, x: F.relu(m.layer(x) + x.double()),
    "layer(x) += float64": lambda m, x: F.relu(operator.iadd(m.layer(x), x.double())),
    "layer(x) + integers": lambda m, x: F.relu(m.layer(x) + x.long()),
    "layer(x) + a size": lambda m, x: F.relu(m.layer(x) + x.shape[0]),
    "layer(x) += layer(x) of more rows": lambda m, x: F.relu(operator.iadd(m.layer(x), m.layer(x[:1]))),
}


@pytest.mark.parametrize("way", ["fuse", "freeze", "both"])
def test_what_is_written_to_in_between(way):
    make = {"fuse": fastops.fuse, "freeze": fastops.freeze, "both": lambda m: fastops.freeze(fastops.fuse(m))}[way]
    layers = [(nn.Linear(6, 6), (2, 4, 6, 6)), (nn.Conv2d(4, 4, 3, padding=1), (2, 4, 6, 6))]
    for (layer, size), (name, forward) in itertools.product(layers, WRITES.items()):
        model = prepared(Does(forward, layer=layer, norm=nn.BatchNorm2d(4), relu=nn.ReLU(inplace=True)))
        x, same_x = (torch.randn(size) for _ in range(2))
        same_x.copy_(x)
        with torch.no_grad():
            expected, y = model(x), make(model)(same_x)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
        torch.testing.assert_close(same_x, x, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_batch_norms_of_other_dimensions():
    """A norm's channels are dimension 1, those of a linear layer the last one."""
    linear, narrow = nn.Linear(8, 16), nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 16))
    wide = nn.Sequential(nn.Linear(8, 160), nn.BatchNorm1d(160), nn.ReLU(), nn.Linear(160, 16))
    conv = nn.Sequential(nn.Conv1d(8, 16, 3, padding=1, padding_mode="circular"), nn.BatchNorm1d(16))
    for model, sizes, refused in (
        (nn.Sequential(linear, nn.BatchNorm1d(16)), [(4, 8), (4, 16, 8)], [(8,), (4, 5, 8), (2, 4, 16, 8)]),
        (nn.Sequential(linear, nn.BatchNorm1d(5)), [(4, 5, 8)], [(4, 8)]),
        (narrow, [(4, 8), (4, 16, 8)], [(8,), (4, 5, 8)]),
        (wide, [(4, 8), (4, 160, 8)], [(8,), (4, 5, 8)]),
        (conv, [(4, 8, 16), (8, 16), (4, 8, 5)], [(8, 5)]),
    ):
        prepared(model)
        frozen = fastops.freeze(model)
        copies = [frozen, pickle.loads(pickle.dumps(frozen)), copy.deepcopy(frozen)]
        for one, size in itertools.product(copies, sizes):
            agrees(model, torch.randn(size), frozen=one)
        for size in refused:
            x = torch.randn(size)
            with torch.no_grad(), pytest.raises((ValueError, RuntimeError)) as theirs:
                model(x)
            with torch.no_grad(), pytest.raises(theirs.type):
                frozen(x)
        assert not any(parameter.requires_grad for parameter in frozen.parameters())
        moved = copies[1].double()(x := torch.randn(sizes[-1]).double())
        torch.testing.assert_close(moved, copy.deepcopy(model).double()(x), rtol=1e-5, atol=1e-5)


class Options(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, x, mask, scale=1.0, *rest, flag=False, **more):
        y = torch.relu(self.layer(x))
        if mask is not None:
            y = y * mask
        if flag:
            y = self.norm(y)
        for one in (*rest, *more.values()):
            y = y + one
        return y * scale


@pytest.mark.parametrize("make", [fastops.freeze, fastops.fuse])
def test_it_is_called_as_the_model_is(make):
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Options()

        def forward(self, x):
            return self.inner(x, None) + self.inner(x, x, flag=True, other=x)

    x, plain = torch.randn(4, 8), Options().eval()
    for model in (make(plain), copy.deepcopy(make(plain)), pickle.loads(pickle.dumps(make(plain)))):
        with torch.no_grad():
            for args, options in (
                ((x, None), {}), ((x, x), {}), ((x, x, 2.0), {}), ((x, x, 2.0, x), {}), ((x,), {"mask": x}),
                ((), {"x": x, "mask": None, "scale": 3}), ((x, x), {"flag": True}), ((x, x), {"other": x}),
            ):  # fmt: skip
                torch.testing.assert_close(model(*args, **options), plain(*args, **options))
            for wrong in ((), (x,)):
                with pytest.raises(TypeError):
                    model(*wrong)
            if make is fastops.freeze:
                assert model.double()(x.double(), x.double(), flag=True).dtype == torch.float64
    agrees(Outer().eval(), x) if make is fastops.freeze else None


def test_models_with_a_frozen_part():
    part, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.LayerNorm(8)).eval(), torch.randn(4, 8)
    frozen = fastops.freeze(part)
    assert fastops.freeze(frozen) is frozen
    model = nn.Sequential(frozen, nn.Linear(8, 3), nn.ReLU())
    with torch.no_grad():
        expected = nn.Sequential(part, *model[1:])(x)
        for way in (fastops.freeze, fastops.fuse, lambda m: fastops.freeze(fastops.fuse(m))):
            torch.testing.assert_close((way(model))(x), expected)
        ways = [fastops.freeze(model), fastops.fuse(model)]
        part[0].weight.add_(1)
        for one in ways:
            with pytest.raises(RuntimeError, match="has changed since it was frozen"):
                one(x)


def test_it_shares_nothing_that_changes():
    """A frozen model has its own counters, its own dtype, and no gradients."""

    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)
            self.register_buffer("count", torch.zeros(1))
            self.register_buffer("table", torch.eye(8).to_sparse())

        def forward(self, x):
            if self.decides and x.sum() > 1e9:
                return x
            self.count.add_(1)
            return self.norm(self.layer(x)) * self.count

    for decides in (False, True):
        Counts.decides = decides
        model, x = Counts().eval(), torch.randn(4, 8)
        frozen = fastops.freeze(model)
        assert not frozen(x).requires_grad
        ours = [frozen(x) for _ in range(3)]
        theirs = [model(x) for _ in range(4)][1:]
        torch.testing.assert_close(ours, theirs)
        fastops.freeze(model).double()
        assert model.norm.weight.dtype is torch.float32
        assert model.norm.weight.requires_grad


SEES = {
    "view": lambda m, x: m.conv(x).view(x.size(0), -1),
    "view of an activation": lambda m, x: F.relu(m.norm(m.conv(x))).view(x.size(0), -1),
    "view as": lambda m, x: m.conv(x).view_as(x),
    "a view that is written to": lambda m, x: changed(y := m.conv(x), y.view(-1).relu_()),
    "as_strided": lambda m, x: m.conv(x).as_strided((3, 4), (4, 1)),
    "torch.as_strided": lambda m, x: torch.as_strided(m.conv(x), (3, 4), (4, 1)),
    "is_contiguous": lambda m, x: x * m.conv(x).is_contiguous(),
    "data": lambda m, x: m.conv(x).data.view(-1),
    "a module": lambda m, x: m.views(m.conv(x)),
    "outputs": lambda m, x: torch.stack([one.view(-1) for one in m.several(m.conv(x))]),
}


class Several(nn.Module):
    def forward(self, x):
        if x.sum() > 1e9:
            return x
        return [x, (x, x)][1]


class Views(nn.Module):
    def forward(self, x):
        return x.view(-1) if x.sum() < 1e9 else x


def test_what_sees_the_layout():
    for name, forward in SEES.items():
        model = prepared(Does(forward, conv=nn.Conv2d(4, 4, 3, padding=1), norm=nn.BatchNorm2d(4)))
        model.views, model.several = Views(), Several()
        for x in (torch.randn(2, 4, 5, 6), torch.randn(2, 4, 5, 6).contiguous(memory_format=torch.channels_last)):
            try:
                with torch.no_grad():
                    expected = model(x)
            except RuntimeError:  # of a view of what is channels_last in the model, too
                continue
            frozen = agrees(model, x)
            with torch.no_grad():
                assert frozen(x).stride() == expected.stride(), name
            agrees(model, x, frozen=copy.deepcopy(frozen))


def many_joins(m, x):
    values = [x]
    for _ in range(24):
        values.append(m.conv(torch.cat(values, 1)[:, -4:]))
    return m.last(values[-1])


PADDED = {
    "alone": lambda c: c(4, 8),
    "norm": lambda c: nn.Sequential(c(4, 8), nn.BatchNorm2d(8), nn.ReLU()),
    "1x1 after it": lambda c: nn.Sequential(c(4, 8), nn.ReLU(), nn.Conv2d(8, 4, 1)),
    "max pool": lambda c: nn.Sequential(c(4, 8), nn.ReLU(), nn.MaxPool2d(2)),
    "+ x": lambda c: Does(lambda m, x: m.conv(x) + x, conv=c(4, 4)),
    "x +": lambda c: Does(lambda m, x: F.relu(x + m.conv(x)), conv=c(4, 4)),
    "+ conv": lambda c: Does(lambda m, x: F.relu(m.a(x) + m.b(x)), a=c(4, 4), b=nn.Conv2d(4, 4, 1)),
    "conv +": lambda c: Does(lambda m, x: F.relu(m.b(x) + m.a(x)), a=c(4, 4), b=nn.Conv2d(4, 4, 1)),
    "+=": lambda c: Does(lambda m, x: operator.iadd(m.b(x), m.a(x)), a=c(4, 4), b=nn.Conv2d(4, 4, 1)),
    "cat": lambda c: Does(lambda m, x: torch.cat([m.conv(x), x], 1), conv=c(4, 4)),
    "cat of both": lambda c: Does(lambda m, x: torch.cat([m.a(x), m.b(x)], 1), a=c(4, 4), b=nn.Conv2d(4, 4, 1)),
    "permuted": lambda c: Does(lambda m, x: m.conv(x).permute(0, 2, 3, 1), conv=c(4, 4)),
    "parts": lambda c: Does(lambda m, x: m.conv(x).chunk(2, 1)[1], conv=c(4, 4)),
    "flat": lambda c: Does(lambda m, x: m.conv(x).flatten(1), conv=c(4, 4)),
    "a pool after a convolution": lambda c: nn.Sequential(
        c(4, 4), nn.Tanh(), c(4, 4), nn.ReLU(), nn.MaxPool2d(2), nn.Upsample(scale_factor=2)
    ),
    "many sums": lambda c: nn.Sequential(
        *(Does(lambda m, x: F.relu(x.tanh() * m.conv(x) + x), conv=c(4, 4)) for _ in range(24))
    ),
    "many joins": lambda c: Does(many_joins, conv=c(4, 4), last=nn.Conv2d(4, 4, 1)),
    "layer norm": lambda c: Does(
        lambda m, x: m.norm(m.conv(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2) * 2, conv=c(4, 4), norm=nn.LayerNorm(4)
    ),
    "contiguous": lambda c: Does(lambda m, x: m.conv(x).contiguous() * 2, conv=c(4, 4)),
}


@pytest.mark.parametrize("padding", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("name", PADDED)
def test_results_have_the_layout_that_the_model_gives_them(name, padding):
    """F.pad gives circular images contiguous, and others as it gets them."""
    for weights in (torch.contiguous_format, torch.channels_last):
        model = PADDED[name](lambda i, o: nn.Conv2d(i, o, 3, padding=1, padding_mode=padding)).eval()
        prepared(model).to(memory_format=weights)
        for inputs in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(2, 4, 6, 8).contiguous(memory_format=inputs)
            for channels_last in (None, False) if padding in ("zeros", "circular") else (None,):
                frozen = agrees(model, x, channels_last=channels_last)
                with torch.no_grad():
                    assert frozen(x).stride() == model(x).stride(), (weights, inputs, channels_last)
                    exact(copy.deepcopy(frozen)(x), frozen(x))
                    assert torch.vmap(frozen)(x[None]).shape == (1, *frozen(x).shape)


def test_results_that_are_named_tuples():
    model = Does(lambda m, x: m.conv(x).max(1), conv=nn.Conv2d(4, 4, 3))
    x = torch.randn(2, 4, 6, 6)
    with torch.no_grad():
        for ours, theirs in zip(fastops.freeze(model)(x), model(x), strict=True):
            torch.testing.assert_close(ours, theirs)
            assert ours.stride() == theirs.stride()


def test_files_hold_the_graph():
    """Not its source: a trace of that goes through functions that decide by their input."""
    model = prepared(nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Softplus(2.0), nn.MaxPool2d(2)))
    read = pickle.loads(pickle.dumps(fastops.freeze(model)))
    agrees(model, torch.randn(2, 4, 9, 9), frozen=pickle.loads(pickle.dumps(read)))


def test_its_own_state():
    frozen, other = (fastops.freeze(prepared(Net())) for _ in range(2))
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        other(x)
        other.load_state_dict(frozen.state_dict())
        exact(other(x), frozen(x))


# ---- a model that changes --------------------------------------------------------------------------------------------


def changes():
    yield "optimizer", lambda m: torch.optim.SGD(m.parameters(), 0.1).step()
    yield "load_state_dict", lambda m: m.load_state_dict(prepared(Net()).state_dict())
    yield "data in place", lambda m: m.head.weight.data.mul_(2)
    yield "data", lambda m: setattr(m.head.weight, "data", m.head.weight.data * 2)
    yield "running mean", lambda m: m.block.bn1.running_mean.add_(1)
    yield "assigned state", lambda m: m.load_state_dict(prepared(Net()).state_dict(), assign=True)
    yield "another parameter", lambda m: setattr(m.head, "weight", nn.Parameter(torch.zeros(10, 32)))
    yield "no bias", lambda m: setattr(m.head, "bias", None)
    yield "another layer", lambda m: setattr(m, "head", nn.Linear(32, 10))
    yield "parametrized", lambda m: parametrizations.weight_norm(m.head)
    yield "another layer, held", lambda m: setattr(m, "head", nn.Linear(32, 10)) or setattr(m, "old", m.head)
    yield "one more", lambda m: m.stem.append(nn.Tanh())
    yield "one less", lambda m: m.stem.pop(2)
    yield "another without weights", lambda m: m.stem.__setitem__(2, nn.Tanh())
    yield "one step of training", lambda m: m.train()(torch.randn(4, 3, 16, 16))


@pytest.mark.parametrize("change", [one for _, one in changes()], ids=[name for name, _ in changes()])
@pytest.mark.parametrize("held", [False, True], ids=["", "its tensors are held"])
def test_a_changed_model_is_noticed(change, held):
    model = prepared(Net())
    kept = [*model.parameters()] if held else []
    frozen = fastops.freeze(model)
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        frozen(x)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    change(model)
    del kept
    with torch.no_grad():
        with pytest.raises(RuntimeError, match="has changed since it was frozen"):
            frozen(x)
        agrees(model.eval(), x)


def same_values():
    yield "share_memory", lambda m: m.share_memory()
    yield "to", lambda m: m.to("cpu", torch.float32)
    yield "float64 and back", lambda m: m.double().float()
    yield "requires_grad_", lambda m: m.requires_grad_(False).requires_grad_()
    yield "channels_last", lambda m: m.to(memory_format=torch.channels_last)
    yield "pickle", pickle.dumps
    yield "for another process", multiprocessing.reduction.ForkingPickler.dumps
    yield "deepcopy", copy.deepcopy
    yield "data", lambda m: setattr(m.head.weight, "data", m.head.weight.data.clone())
    yield "another parameter", lambda m: setattr(m.head, "weight", nn.Parameter(m.head.weight.detach().clone()))
    yield "its own state", lambda m: m.load_state_dict(copy.deepcopy(m.state_dict()))
    yield "its own state, assigned", lambda m: m.load_state_dict(copy.deepcopy(m.state_dict()), assign=True)
    yield "an optimizer that does nothing", lambda m: torch.optim.SGD(m.parameters(), 0.0).step()


@pytest.mark.parametrize("change", [one for _, one in same_values()], ids=[name for name, _ in same_values()])
def test_the_same_values_are_no_change(change):
    model, x = prepared(Net()), torch.randn(2, 3, 16, 16)
    model.register_buffer("table", torch.randn(7, 5).T[1:])
    model.register_buffer("empty", torch.zeros(0))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    frozen = fastops.freeze(model)
    with torch.no_grad():
        expected = frozen(x)
        for _ in range(2):
            change(model)
            exact(frozen(x), expected)
        model.table[0, 0] += 1
        with pytest.raises(RuntimeError, match="'table' of the model has changed since it was frozen"):
            frozen(x)


def test_all_values_are_compared_where_something_is_different():
    for change in (lambda m: m.share_memory(), lambda m: m.load_state_dict(m.state_dict())):
        model, x = prepared(Net()), torch.randn(2, 3, 16, 16)
        frozen = fastops.freeze(model)
        with torch.no_grad():
            frozen(x)
            model.head.weight.data.view(-1)[3] += 1  # not one of those that every call looks at
            frozen(x)  # says nothing; what it gives depends on whether this tier packs the weight
            change(model)
            with pytest.raises(RuntimeError, match=r"'head\.weight' of the model has changed"):
                frozen(x)


def test_hash_of_values():
    for size in ((), (0,), (1,), (3,), (4, 5), (33, 2), (2, 3, 4, 5)):
        for dtype in (torch.float32, torch.bfloat16, torch.bool, torch.complex64, torch.int8):
            x = torch.randn(size, dtype=torch.float64).to(dtype)
            value = _C.hash_of_values(x)
            others = torch.empty(2, *size, dtype=dtype).copy_(x)
            backwards = tuple(reversed(range(x.dim())))
            turned = x.permute(backwards).contiguous().permute(backwards)
            for same in (x.clone(), others[1], turned):
                assert _C.hash_of_values(same) == value
            for i in range(x.numel()):
                other = x.clone()
                other.view(-1)[i] = ~other.view(-1)[i] if dtype is torch.bool else other.view(-1)[i] + 1
                assert _C.hash_of_values(other) != value


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
    assert frozen.train() is frozen
    around = nn.Sequential(frozen, nn.Linear(10, 2)).train()
    assert around[1].training
    around(torch.randn(2, 3, 16, 16)).sum().backward()
    assert not any(module.training for module in frozen.modules())
    assert list(frozen.parameters()) == []
    with pytest.raises(RuntimeError, match="a frozen model has no gradients, but its input requires one"):
        frozen(torch.randn(2, 3, 16, 16, requires_grad=True))
    x = torch.randn(2, 8, requires_grad=True)
    for model in (nn.Sequential(nn.ReLU()), nn.ReLU()):  # without a layer that would refuse it
        with pytest.raises(RuntimeError, match="a frozen model has no gradients, but its input requires one"):
            fastops.freeze(model)(x)
        with torch.no_grad():
            fastops.freeze(model)(x)
    with pytest.raises(TypeError, match="model"):
        fastops.freeze(3)


def test_a_model_with_its_own_modes():
    class Stays(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

        def forward(self, x):
            return self.norm(self.a(x)) * (2 if self.training else 3)

        def train(self, mode=True):
            super().train(mode)
            self.norm.train()
            return self

    class Harmless(Stays):
        def train(self, mode=True):
            super().train(mode)
            self.norm.eval()
            return self

    x = torch.randn(5, 4)
    for cls, untraced in ((Stays, 1), (Harmless, 0)):
        model = cls()
        frozen = fastops.freeze(model)
        assert len(frozen.fastops_report.untraced) == untraced
        with torch.no_grad():
            torch.testing.assert_close(frozen(x), model.eval()(x))


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


NOT_TENSORS = {
    "linear": nn.Sequential(nn.Linear(300, 300)),
    "mlp": nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)),
    "wide mlp": nn.Sequential(nn.Linear(300, 300), nn.ReLU(), nn.Linear(300, 8)),
    "linear and norm": nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)),
    "mlp with norms": nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8)),
    "convolution and norm": nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)),
    "convolution and pool": nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(2)),
    "inverted residual": nn.Sequential(nn.Conv2d(8, 40, 1), nn.Conv2d(40, 40, 3, groups=40), nn.Conv2d(40, 8, 1)),
    "norm": nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()),
    "a norm": nn.BatchNorm2d(4),
    "a layer": nn.Linear(8, 8),
    "an activation": nn.ReLU(),
}


@pytest.mark.parametrize("name", NOT_TENSORS)
def test_what_is_no_tensor_raises_as_in_the_model(name):
    model = prepared(copy.deepcopy(NOT_TENSORS[name]))
    frozen = fastops.freeze(model)
    for one in (frozen, copy.deepcopy(frozen), frozen.model):
        for wrong in (None, "text", 3, [torch.randn(2, 8)], (torch.randn(2, 8),)):
            with torch.no_grad(), pytest.raises((TypeError, AttributeError)) as theirs:
                model(wrong)
            with torch.no_grad(), pytest.raises(theirs.type):
                one(wrong)


def test_none_where_the_model_takes_it():
    def given(x):
        return x is not None

    forwards = {
        "if": lambda m, x: m.layer(torch.ones(2, 8)) if x is None else m.layer(x),
        "if not": lambda m, x: m.layer(x) if x is not None else m.layer.bias * 2,
        "a value": lambda m, x: m.layer(m.layer.weight if (none := x is None) else x) * (1 + none),
        "a function": lambda m, x: m.layer(x) if given(x) else m.layer.bias * 2,
    }
    for forward in forwards.values():
        for cls in (Does, Around):
            model = cls(forward, layer=nn.Linear(8, 8)).eval()
            frozen = fastops.freeze(model)
            for one in (frozen, copy.deepcopy(frozen), fastops.fuse(model)):
                for x in (None, torch.randn(2, 8)):
                    with torch.no_grad():
                        torch.testing.assert_close(one(x), model(x))


class Around(nn.Module):
    def __init__(self, forward, **modules):
        super().__init__()
        self.inner = Does(forward, **modules)

    def forward(self, x):
        return self.inner(x) * 2


class Nothing(nn.Module):
    """Gives None for some inputs, which no trace says."""

    def forward(self, x):
        return None if x.sum() < 0 else x


@pytest.mark.parametrize(
    "layer", [nn.Linear(8, 8), nn.Conv2d(4, 4, 3, padding=1), Does(lambda m, x: m.c(m.b(m.a(x))))], ids=range(3)
)
def test_none_as_a_residual(layer):
    """layer(x) + None is an error, and not layer(x)."""
    layer = copy.deepcopy(layer)
    if isinstance(layer, Does):
        layer.a, layer.b, layer.c = nn.Conv2d(4, 24, 1), nn.Conv2d(24, 24, 3, padding=1, groups=24), nn.Conv2d(24, 4, 1)
    model = Does(lambda m, x: F.relu(m.layer(x) + m.other(x)), layer=layer, other=Nothing()).eval()
    x = torch.rand(2, 4, 8, 8)
    frozen = agrees(model, x)
    for one in (frozen, frozen.model):
        with torch.no_grad(), pytest.raises(TypeError, match="NoneType"):
            one(-x)


@pytest.mark.parametrize(
    ("layer", "size"),
    [
        (nn.BatchNorm1d(8), (4, 8)), (nn.BatchNorm2d(8), (2, 8, 5, 5)), (nn.BatchNorm3d(8), (2, 8, 3, 3, 3)),
        (nn.Linear(8, 4), (3, 8)), (nn.Conv1d(8, 4, 3), (2, 8, 9)), (nn.Conv2d(8, 4, 3), (2, 8, 9, 9)),
        (nn.Conv2d(8, 4, 3, padding=1, padding_mode="circular"), (2, 8, 9, 9)), (nn.Conv3d(8, 4, 3), (2, 8, 5, 5, 5)),
        (nn.ReLU(), (3, 8)), (nn.ReLU(inplace=True), (3, 8)), (nn.GELU(), (3, 8)), (nn.PReLU(), (3, 8)),
        (nn.Softmax(1), (3, 8)), (nn.LayerNorm(8), (3, 8)), (nn.MaxPool2d(2), (2, 8, 6, 6)), (nn.Dropout(), (3, 8)),
        (nn.Flatten(), (3, 2, 4)), (nn.Identity(), (3, 8)), (nn.GroupNorm(2, 8), (3, 8, 2)),
        (fastops.nn.Linear(8, 4, activation="relu"), (3, 8)),
    ],
    ids=lambda one: type(one).__name__ if isinstance(one, nn.Module) else "",
)  # fmt: skip
def test_a_layer_alone_is_what_it_is_in_a_model(layer, size):
    layer = prepared(copy.deepcopy(layer))
    x = torch.randn(size)
    frozen, in_a_model = (agrees(one, x.clone()) for one in (layer, nn.Sequential(layer)))
    for kind, rows in vars(frozen.fastops_report).items():
        told = [row[1:] for row in vars(in_a_model.fastops_report)[kind]]
        assert [row[1:] for row in rows] == told
        assert [row.name for row in rows] == [""] * len(told)
    assert not frozen.fastops_report.untraced
    with torch.no_grad():
        expected = frozen(x.clone())
        for one in (copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen))):
            exact(one(x.clone()), expected)
        with fastops.record() as calls:
            frozen(x.clone())
        with fastops.record() as in_the_model:
            in_a_model(x.clone())
        assert [call.op for call in calls] == [call.op for call in in_the_model]
        torch.testing.assert_close(fastops.fuse(layer)(x.clone()), layer(x.clone()))
    layer.register_forward_hook(lambda module, args, y: y * 2)
    agrees(layer, x.clone())


@pytest.mark.parametrize(
    ("layer", "sizes"),
    [
        (nn.MultiheadAttention(8, 2), [(3, 1, 8)] * 3), (nn.LSTM(8, 4), [(3, 1, 8)]),
        (nn.Bilinear(8, 4, 2), [(3, 8), (3, 4)]), (nn.ConvTranspose2d(8, 4, 3), [(1, 8, 5, 5)]),
        (nn.TransformerEncoderLayer(8, 2), [(3, 1, 8)]), (nn.MSELoss(), [(3, 4), (3, 4)]),
    ],
    ids=lambda one: type(one).__name__ if isinstance(one, nn.Module) else "",
)  # fmt: skip
def test_a_layer_alone_that_has_more_arguments(layer, sizes):
    layer = copy.deepcopy(layer).eval()
    inputs = [torch.randn(size) for size in sizes]
    frozen = fastops.freeze(layer)
    assert [row.name for row in frozen.fastops_report.left] == [""]
    assert not frozen.fastops_report.untraced
    with torch.no_grad():
        torch.testing.assert_close(frozen(*inputs), layer(*inputs))


def test_names_that_differ_by_a_dot():
    class Names(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Sequential(nn.Linear(200, 200), nn.LayerNorm(200))
            self.a_0, self.a_1, self.a_0_weight = nn.Linear(200, 200), nn.LayerNorm(200), nn.Parameter(torch.ones(200))

        def forward(self, x):
            return self.a_1(torch.sin(self.a_0(torch.cos(self.a(x)))) * self.a_0_weight)

    model = Names().eval()
    nn.init.normal_(model.a[1].weight)
    agrees(model, torch.randn(3, 200))


def test_no_batch_and_other_first_calls():
    model = prepared(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()))
    frozen = fastops.freeze(model)
    with torch.inference_mode():
        y = frozen(torch.randn(1, 3, 9, 9))
    with torch.no_grad():
        with pytest.raises(ValueError, match="expected 4D input"):
            frozen(torch.randn(3, 9, 9))
        agrees(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), torch.randn(3, 9, 9))
        assert frozen(torch.randn(0, 3, 9, 9)).shape == (0, 8, 7, 7)
        with torch.autocast("cpu", torch.bfloat16):
            assert frozen(torch.randn(1, 3, 9, 9)).dtype == torch.bfloat16
        each = torch.vmap(frozen)(torch.randn(4, 1, 3, 9, 9))
        assert each.shape == (4, *y.shape)
        wide = torch.randn(2, 3, 9, 18)[..., ::2]
        exact(frozen(wide), frozen(wide.contiguous()))


def test_its_signature_is_that_of_the_model():
    model, x = Options().eval(), torch.randn(4, 8)
    frozen = fastops.freeze(model)
    batch = {0: torch.export.Dim("batch")}
    for one in (frozen, copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen))):
        assert list(inspect.signature(one.forward).parameters) == ["x", "mask", "scale", "rest", "flag", "more"]
        with torch.no_grad():
            program = torch.export.export(frozen, (x, x), dynamic_shapes={"x": batch, "mask": batch})
            torch.testing.assert_close(program.module()(x[:3], x[:3]), model(x[:3], x[:3]))
            torch.testing.assert_close(one(mask=x, x=x), model(x, x))


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


class Reaches(nn.Module):
    """Cannot be traced, and wants more of its children than a call."""

    def __init__(self) -> None:
        super().__init__()
        self.tied, self.chain = nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        self.part, self.pool = Options(), nn.MaxPool1d(2)

    def forward(self, x):
        if x.sum() > 1e9:
            return x
        x = F.linear(self.tied(x).to(self.tied.weight.dtype), self.tied.weight) + self.tied.out_features
        for layer in self.chain:
            x = layer(x)
        x = self.chain(x) + self.chain[0](x) * len(self.chain) + self.part.layer.bias
        x = x + self.part(x, None) if self.chain and self.part else x
        return self.pool(x) if isinstance(self.pool, nn.MaxPool1d) else x


def test_what_an_untraced_forward_wants_of_its_children():
    model, x = Reaches().eval(), torch.randn(4, 8)
    frozen = agrees(model, x)
    for one in (copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen))):
        agrees(model, x, frozen=one)
        wide = copy.deepcopy(model).double()(x.double())
        torch.testing.assert_close(one.double()(x.double()), wide)
    assert any(isinstance(module, FrozenLayer) for module in frozen.modules())


def sets_data(layer, x):
    layer.weight.data = F.normalize(layer.weight.data)
    return layer(x)


def sets_weight(layer, x):
    before, layer.weight = layer.weight, nn.Parameter(2 * layer.weight.detach())
    y = layer(x)
    layer.weight = before
    return y


def deletes_weight(layer, x):
    before = layer.weight
    del layer.weight
    layer.weight = 2 * before.detach()
    y = layer(x)
    del layer.weight
    layer.weight = before
    return y


def sets_by_name(layer, x):
    before = layer.bias
    setattr(layer, "".join(("bi", "as")), None)
    y = layer(x)
    layer.bias = before
    return y


PUTS = {
    "data": sets_data,
    "a parameter": sets_weight,
    "a tensor": deletes_weight,
    "by name": sets_by_name,
    "functional_call": lambda layer, x: torch.func.functional_call(layer, {"weight": 2 * layer.weight}, (x,)),
    "load_state_dict": lambda layer, x: (layer.load_state_dict({"weight": WEIGHT, "bias": WEIGHT[0]}), layer(x))[1],
}
WEIGHT = torch.randn(8, 8)


@pytest.mark.parametrize("what", PUTS)
def test_an_untraced_forward_puts_other_weights_into_its_children(what):
    class Puts(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.after, self.call = nn.Linear(8, 8), nn.Linear(8, 8), PUTS[what]

        def forward(self, x):
            return self.after(torch.relu(self.call(self.layer, x))) if x.sum() < 1e9 else x

    model, x = Puts().eval(), torch.randn(4, 8)
    frozen = fastops.freeze(copy.deepcopy(model))
    for _ in range(2):
        agrees(model, x, frozen=frozen)
    assert any(isinstance(module, FrozenLayer) for one in frozen.modules() for module in graphs_of(one))


def graphs_of(module):
    """What a module is and, where it calls a graph of its own, what that consists of."""
    graph = vars(module).get("_fastops_graph")
    return [module, *(graph.modules() if graph is not None else ())]


def test_hooks_are_called():
    model = prepared(Net())
    calls = []
    model.stem[0].register_forward_hook(lambda *args: calls.append("stem"))
    model.block.bn2.register_forward_pre_hook(lambda *args: calls.append("bn2"))
    agrees(model, torch.randn(2, 3, 16, 16))
    assert calls.count("stem") == 3
    assert calls.count("bn2") == 3


@pytest.mark.parametrize("root", [nn.Sequential, Net, Decides])
def test_hooks_of_the_model_itself_are_called(root):
    model = prepared(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)) if root is nn.Sequential else root())
    x = torch.randn(2, 3, 16, 16)
    plain = model(x)
    model.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    model.register_forward_hook(lambda module, args, output: output * 2)
    assert not torch.allclose(model(x), plain)
    frozen = agrees(model, x)
    torch.testing.assert_close(copy.deepcopy(frozen)(x), model(x), rtol=1e-4, atol=1e-4)


def test_the_reason_for_a_layer_with_hooks():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    model[0].register_forward_hook(lambda *args: None)
    assert fastops.freeze(model).fastops_report.left[0].result == "it has hooks"


@pytest.mark.parametrize("layer", [nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3, bias=False), nn.Linear(3, 4)])
def test_weights_that_are_plain_tensors_are_folded(layer):
    """They lie in the layer's __dict__, where they are found before parameters."""
    linear = isinstance(layer, nn.Linear)
    model = prepared(nn.Sequential(layer, nn.BatchNorm1d(4) if linear else nn.BatchNorm2d(4)))
    for name in tuple(layer._parameters):
        tensor = getattr(layer, name)
        delattr(layer, name)
        setattr(layer, name, None if tensor is None else tensor.detach().clone())
    frozen, x = fastops.freeze(model), torch.randn(5, 3) if linear else torch.randn(2, 3, 9, 9)
    torch.testing.assert_close(frozen(x), model(x), rtol=1e-5, atol=1e-5)
    assert len(frozen.fastops_report.folded) == 1


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
    with pytest.raises(RuntimeError, match="too small"):
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


def test_weights_that_the_forward_makes():
    class Autoencoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 4)

        def forward(self, x):
            return F.linear(torch.relu(self.fc(x)), self.fc.weight.t())

    model, x = Autoencoder().eval(), torch.randn(5, 8)
    with torch.no_grad():
        torch.testing.assert_close(fastops.freeze(model)(x), model(x))


# ---- views that are copies in another layout -------------------------------------------------------------------------

VIEWS = {
    "flatten": lambda x: x.flatten(1),
    "flatten of a part": lambda x: x.chunk(2, 1)[1].flatten(2),
    "Flatten": nn.Flatten(),
    "ravel": torch.ravel,
    "reshape": lambda x: x.reshape(2, -1),
    "rows": lambda x: x.permute(0, 2, 3, 1).reshape(-1, 6),
    "contiguous": lambda x: x.contiguous(),
    "contiguous rows": lambda x: x.permute(0, 2, 3, 1).contiguous(),
    "and back": lambda x: x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
    "to channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "contiguous as channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "view": lambda x: x.view(2, 6, -1),
    "view of one image": lambda x: x[:1].view(6, -1),
}
THROUGH_VIEWS = {
    "nothing": lambda y: y,
    "add_": lambda y: y.add_(1),
    "an element": lambda y: y.__setitem__(0, 0),
    "relu_": lambda y: F.relu(y, inplace=True),
}


class Writes(nn.Module):
    def __init__(self, view, write, first):
        super().__init__()
        self.conv, self.next = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 1)
        self.view, self.write, self.first = view, write, first

    def forward(self, x):
        x = self.conv(x)
        y = self.view(x)
        self.write(x if self.first else y)
        return x, y, self.next(x)


@pytest.mark.parametrize("view", VIEWS)
def test_what_is_written_through_views(view):
    for write, first, last in itertools.product(THROUGH_VIEWS, (False, True), (False, True)):
        plain = Writes(VIEWS[view], THROUGH_VIEWS[write], first).eval()
        x = torch.randn(2, 3, 5, 5)
        x = x.contiguous(memory_format=torch.channels_last) if last else x
        if write == "nothing" and first:
            continue
        frozen = fastops.freeze(plain)
        assert frozen.fastops_report.untraced == []
        with torch.no_grad():
            for ours, theirs in zip(frozen(x), plain(x), strict=True):
                torch.testing.assert_close(ours, theirs)
                assert ours.stride() == theirs.stride(), (write, first, last)


class Turned(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.conv = nn.Linear(1, 1), nn.Conv2d(1, 4, 1)

    def forward(self, x):
        return self.conv(self.fc(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


def test_images_of_one_channel_may_be_channels_last():
    plain, x = Turned().eval(), torch.randn(2, 1, 5, 6)
    with torch.no_grad():
        for last in (False, True):
            x = x.contiguous(memory_format=torch.channels_last) if last else x
            ours, theirs = fastops.freeze(plain)(x), plain(x)
            assert ours.stride() == theirs.stride()
            torch.testing.assert_close(ours, theirs)


class Parallel(nn.Module):
    """Two MobileNet blocks, layer by layer."""

    def __init__(self):
        super().__init__()
        for name, (i, o, groups, size) in dict(e=(8, 32, 1, 1), d=(32, 32, 32, 3), p=(32, 8, 1, 1)).items():
            for side in "ab":
                setattr(self, name + side, nn.Conv2d(i, o, size, padding=size // 2, groups=groups))

    def forward(self, x):
        a, b = self.ea(x).relu(), self.eb(x).relu()
        a, b = self.da(a).relu(), self.db(b).relu()
        return self.pa(a) * self.pb(b)


def test_blocks_side_by_side():
    agrees(Parallel().eval(), torch.randn(2, 8, 9, 9))


# ---- models that are not written by hand, or oddly -------------------------------------------------------------------


@pytest.mark.parametrize("name", ["graph", "code", "meta", "recompile", "in", "class", "None"])
@pytest.mark.parametrize("kind", ["module", "parameter", "buffer"])
def test_names_that_torch_fx_or_python_has(name, kind):
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            if kind == "module":
                self._modules[name] = nn.Sequential(nn.Linear(6, 6), nn.ReLU())
            elif kind == "parameter":
                self._parameters[name] = nn.Parameter(torch.randn(6, 6))
            else:
                self._buffers[name] = torch.randn(6, 6)

        def forward(self, x):
            one = getattr(self, name)
            return one(x) if kind == "module" else F.linear(x, one)

    plain, x = Named(), torch.randn(3, 6)
    assert fastops.freeze(plain).fastops_report.untraced == []
    agrees(plain, x)
    fused = fastops.fuse(plain)
    assert fused.fastops_report.untraced == []
    torch.testing.assert_close(fused(x), plain(x))


@pytest.mark.parametrize(
    "make", [torch.fx.symbolic_trace, lambda m: torch.export.export(m, (torch.ones(2, 6),)).module()]
)
def test_graph_modules(make):
    made = make(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).eval())
    x = torch.randn(2, 6)
    for model in (made, nn.Sequential(made, nn.Tanh())):
        with torch.no_grad():
            for one in (fastops.freeze(model), fastops.fuse(model)):
                for _ in range(2):
                    torch.testing.assert_close(one(x), model(x))


def test_weights_of_the_last_call():
    """Pruning and the old weight_norm leave a weight there that has a history."""
    for change in (lambda layer: prune.l1_unstructured(layer, "weight", 0.3), torch.nn.utils.weight_norm):
        layer = nn.Linear(6, 6)
        change(layer)
        model, x = nn.Sequential(layer), torch.randn(2, 6)
        model(x)
        with torch.no_grad():
            torch.testing.assert_close(fastops.freeze(model)(x), model(x))


def test_what_cannot_be_copied():
    class Locked(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.lock = nn.Linear(6, 6), threading.Lock()

        def forward(self, x):
            with self.lock:
                return self.layer(x).relu() if x.sum() > 0 else self.layer(x)

    model, x = Locked(), torch.randn(2, 6)
    frozen = fastops.freeze(model)
    assert not any(one.requires_grad for one in frozen.parameters())
    assert all(one.requires_grad for one in model.parameters())
    torch.testing.assert_close(frozen(x), model(x).detach())


def test_complex_layers():
    for layer, shape in ((nn.Linear, (2, 3)), (nn.Conv2d, (2, 3, 5, 5))):
        size = () if layer is nn.Linear else (3,)
        model = nn.Sequential(layer(3, 4, *size, dtype=torch.complex64), nn.Tanh()).eval()
        x = torch.randn(shape, dtype=torch.complex64)
        with torch.no_grad():
            torch.testing.assert_close(fastops.freeze(model)(x), model(x))
