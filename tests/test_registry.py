"""fastops.register: classes of other libraries under replace_, restore_, fuse and freeze."""

import copy
import pickle
import re

import pytest
import torch
import torch.nn.functional as F
from fresh import run_python
from torch import nn

import fastops
import fastops.functional as FF
from fastops import registry
from fastops.backend import fastops as backend


class Dense(nn.Module):
    """A library's layer, whose weight is stored transposed."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.kernel, self.bias = nn.Parameter(torch.randn(inputs, outputs)), nn.Parameter(torch.randn(outputs))

    def forward(self, x):
        return x @ self.kernel + self.bias


class FastDense(Dense):
    def forward(self, x):
        return FF.linear(x, self.kernel.t(), self.bias)


class Gate(nn.Module):
    def __init__(self, beta=1.0):
        super().__init__()
        self.beta = beta

    def forward(self, x):
        return x * torch.sigmoid(self.beta * x)


class FastGate(Gate):
    def forward(self, x):
        return FF.silu(x)


@pytest.fixture(autouse=True)
def _registered():
    before = dict(registry.TO_FASTOPS), dict(registry.TO_THEIRS), dict(registry._WHY_NOT)
    fastops.register(Dense, FastDense)
    fastops.register(Gate, FastGate, lambda module: "" if module.beta == 1 else f"its beta is {module.beta}")
    yield
    for table, content in zip((registry.TO_FASTOPS, registry.TO_THEIRS, registry._WHY_NOT), before, strict=True):
        table.clear()
        table.update(content)


def network():
    """Wide, so that no kernel takes several of its layers when it is frozen."""
    return nn.Sequential(Dense(6, 200), Gate(), Dense(200, 20), Gate(2.0), nn.Sequential(Dense(20, 3))).double()


def test_replaced_and_restored():
    model, x = network(), torch.randn(5, 6, dtype=torch.float64)
    expected, optimizer = model(x), torch.optim.SGD(model.parameters())
    handle = model[0].register_forward_hook(lambda module, args, output: output * 1)
    report = fastops.replace_(model)
    assert [row.name for row in report.replaced] == ["0", "1", "2", "4.0"]
    assert [tuple(row) for row in report.skipped] == [("3", "test_registry.Gate", "its beta is 2.0")]
    assert re.sub(" +", " ", str(report)).startswith("0, 2, 4.0 test_registry.Dense -> test_registry.FastDense\n")
    with fastops.record() as calls:
        y = model(x)
    torch.testing.assert_close(y, expected)
    assert [row.op for row in calls] == ["linear", "silu", "linear", "linear"]
    y.sum().backward()
    assert all(parameter.grad is not None for group in optimizer.param_groups for parameter in group["params"])
    assert isinstance(model[0], Dense)
    assert fastops.replace_(model).replaced == []
    handle.remove()
    assert [row.name for row in fastops.restore_(model).replaced] == ["0", "1", "2", "4.0"]
    assert [type(module) for module in model] == [Dense, Gate, Dense, Gate, nn.Sequential]
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)


def test_pickled():
    model, x = network(), torch.randn(5, 6, dtype=torch.float64)
    fastops.replace_(model)
    copied = pickle.loads(pickle.dumps(model))
    assert type(copied[0]) is FastDense
    fastops.restore_(copied)
    assert type(copied[0]) is Dense
    torch.testing.assert_close(copied(x), model(x))


def test_fused():
    """A layer of another library is followed by its forward on fastops, and joins others as torch.nn's do."""
    model, x = network(), torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    fused = fastops.fuse(model)
    assert [(row.name, row.module, row.result) for row in fused.fastops_report.fused] == [
        ("0 + 1 + 2", "linear + silu + linear", "mlp(2 layers, activation='silu')")
    ]
    assert [row.name for row in fused.fastops_report.skipped] == ["3"]
    torch.testing.assert_close(fused(x), model(x))
    expected, got = (torch.autograd.grad(one(x).square().sum(), [x, *one.parameters()]) for one in (model, fused))
    torch.testing.assert_close(got, expected)
    fused[1] = nn.Tanh()  # noticed
    torch.testing.assert_close(fused(x), nn.Sequential(model[0], nn.Tanh(), *model[2:])(x))


@pytest.mark.parametrize("wrapped", [False, True], ids=["root", "child"])
def test_one_layer(wrapped):
    """A single layer is a model too."""
    layer = Dense(6, 4).double()
    model, x = nn.Sequential(layer) if wrapped else layer, torch.randn(5, 6, dtype=torch.float64)
    name = "0" if wrapped else "(root)"
    frozen = fastops.freeze(model)
    assert [(row.name or "(root)", row.result) for row in frozen.fastops_report.frozen] == [(name, "linear")]
    for one in (frozen, fastops.fuse(model)):
        with torch.no_grad(), fastops.record() as calls:
            torch.testing.assert_close(one(x), model(x))
        assert [row.op for row in calls] == ["linear"]


def test_frozen():
    """Weights that are stored transposed are packed, too."""
    model, x = network(), torch.randn(5, 6, dtype=torch.float64)
    frozen = fastops.freeze(model)
    report = frozen.fastops_report
    assert [(row.name, row.result) for row in report.frozen] == [
        ("0", "linear, activation='silu'"), ("2", "linear"), ("4.0", "linear")
    ]  # fmt: skip
    with torch.no_grad():
        torch.testing.assert_close(frozen(x), model(x))
        copied = pickle.loads(pickle.dumps(frozen))
        torch.testing.assert_close(copied(x), model(x))
        torch.testing.assert_close(copied.float()(x.float()), model(x).float())
        model[0].kernel.mul_(2)
        with pytest.raises(RuntimeError, match=r"'0.kernel' of the model has changed"):
            frozen(x)


def test_a_transposed_weight_that_the_forward_changes():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("kernel", torch.randn(6, 4, dtype=torch.float64))

        def forward(self, x):
            y = F.linear(x, self.kernel.t())
            self.kernel.mul_(0.5)
            return y

    model, x = Net(), torch.randn(5, 6, dtype=torch.float64)
    frozen = fastops.freeze(copy.deepcopy(model))
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(frozen(x), model(x))


def test_compiled_and_exported():
    model, x = nn.Sequential(Dense(6, 20), Gate(), Dense(20, 3)).double(), torch.randn(5, 6, dtype=torch.float64)
    expected = model(x)
    fastops.replace_(model)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend=backend)(x), expected)
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), expected)
    assert not any("fastops" in str(node.target) for node in program.graph.nodes)


def test_errors():
    class Other(nn.Module):
        def forward(self, x):
            return x

    class NoForward(Dense):
        pass

    class TwoArguments(Dense):
        def forward(self, x, y):
            return x

    class Initialized(Dense):
        def __init__(self):
            pass

        def forward(self, x):
            return x

    class Slotted(Dense):
        __slots__ = ("scale",)

        def forward(self, x):
            return x

    class Chained(FastDense):
        def forward(self, x):
            return x

    class Module(nn.Module):
        def forward(self, x):
            return x

    class Both(Dense, Module):
        def forward(self, x):
            return x

    class Library(Module):
        def forward(self, x):
            return x

    class Ours(Library):
        def forward(self, x):
            return x

    fastops.register(Dense, Both)
    fastops.register(Dense, FastDense)
    fastops.register(Library, Ours)
    for cls, replacement, message in (
        ("Dense", FastDense, "cls must be a class derived from torch.nn.Module, got 'Dense'"),
        (int, FastDense, "cls must be a class derived from torch.nn.Module, got <class 'int'>"),
        (nn.Linear, FastDense, "cls must be another library's class, got torch.nn.modules.linear.Linear"),
        (Dense, Other, "replacement must be a class derived from Dense, got .*Other"),
        (Dense, Dense, "replacement must be a class derived from Dense, got .*Dense"),
        (Dense, NoForward, "replacement must have a forward of its own"),
        (
            Dense,
            TwoArguments,
            r"the arguments of Dense's, \(self, x\), got \(self, x, y\)",
        ),
        (Dense, Initialized, "replacement must have no __init__ of its own"),
        (Dense, Slotted, "replacement must have no state of its own, .*Slotted has __slots__"),
        (FastDense, Chained, "cls must be another library's class, got FastDense, which replaces Dense"),
        (Module, Both, "Both replaces Dense already, got it for .*Module"),
        (Module, Library, "replacement must not be replaced itself, .*Library is, by .*Ours"),
    ):
        with pytest.raises(TypeError, match=message):
            fastops.register(cls, replacement)
    with pytest.raises(TypeError, match="why_not must be a function of a module, or None, got 'never'"):
        fastops.register(Dense, FastDense, "never")
    fastops.register(Dense, FastDense, lambda module: True)
    model = network()
    with pytest.raises(TypeError, match="replace_: why_not of Dense must return a reason, or '', got True"):
        fastops.replace_(model)
    assert not any(type(module).__module__.startswith("fastops") for module in model.modules())


def test_what_an_earlier_replacement_replaced_can_be_restored():
    class Newer(Dense):
        def forward(self, x):
            return FF.linear(x, self.kernel.t())

    model = nn.Sequential(Dense(4, 4))
    fastops.replace_(model)
    fastops.register(Dense, Newer)
    other = nn.Sequential(Dense(4, 4), FastDense(4, 4))
    report = fastops.replace_(other)
    assert [type(layer) for layer in other] == [Newer, FastDense]
    assert [row.result for row in report.skipped] == ["already a fastops module"]
    for one in (model, other):
        fastops.restore_(one)
        assert {type(layer) for layer in one} == {Dense}


def test_another_version_of_a_library(monkeypatch):
    """What it has no more is no reason for replace_ to fail."""
    monkeypatch.setitem(registry._LIBRARIES, "fastops.no_such_module", ("torch.nn", "torch"))
    layer = nn.Linear(3, 4)
    with pytest.warns(
        UserWarning, match="fastops does not know this version of torch, whose own layers stay: No module"
    ):
        assert len(fastops.replace_(layer).replaced) == 1
    assert "fastops.no_such_module" not in registry._LIBRARIES


def test_importing_fastops_imports_no_other_library():
    program = "import fastops, sys; sys.exit(bool({'transformers', 'timm', 'tensorboard'} & sys.modules.keys()))"
    assert run_python(program).returncode == 0
