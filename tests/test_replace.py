"""replace_, restore_ and replaced: nothing but the classes changes."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import fastops
import fastops.nn as fnn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 16), nn.GELU("tanh"), nn.Dropout(0.1))
        self.head = nn.Linear(16, 16, bias=False)
        self.gate = nn.PReLU()
        self.again = self.head  # shared

    def forward(self, x):
        return self.gate(self.again(self.head(self.body(x))))


def names(rows):
    return [row.name for row in rows]


def test_report():
    model = Net()
    report = fastops.replace_(model)
    assert names(report.replaced) == ["body.0", "body.1", "body.2", "body.3", "head", "gate"]
    assert report.skipped == []
    assert report.replaced[0] == ("body.0", "torch.nn.Linear", "fastops.nn.Linear")
    lines = str(report).splitlines()
    assert lines[0].split() == ["body.0", "torch.nn.Linear", "->", "fastops.nn.Linear"]
    assert lines[-1] == "6 replaced, 0 skipped"
    assert len({line.index("->") for line in lines[:-1]}) == 1
    assert type(model.again) is fnn.Linear


def test_nothing_but_the_classes_changes():
    model = Net().eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    calls = []
    model.head.register_forward_hook(lambda *args: calls.append("hook"))
    before = [(name, id(module), id(module.__dict__), set(module.__dict__)) for name, module in model.named_modules()]
    parameters = [(name, id(p)) for name, p in model.named_parameters()]
    state, text, x = copy.deepcopy(model.state_dict()), repr(model), torch.randn(3, 10)
    expected = model(x)

    fastops.replace_(model)

    assert [(n, id(m), id(m.__dict__), set(m.__dict__)) for n, m in model.named_modules()] == before
    assert [(name, id(p)) for name, p in model.named_parameters()] == parameters
    assert list(model.state_dict()) == list(state)
    assert repr(model) == text
    assert not model.training
    assert isinstance(model.head, nn.Linear)
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)
    assert calls == ["hook"] * 4
    model.load_state_dict(state)
    with torch.no_grad():
        weight = model.head.weight.clone()
    model(x).sum().backward()
    optimizer.step()
    assert not torch.equal(model.head.weight, weight)


def test_training_is_the_same():
    torch.manual_seed(1)
    plain = nn.Sequential(nn.Linear(10, 20), nn.Tanh(), nn.Linear(20, 3))
    ours = copy.deepcopy(plain)
    fastops.replace_(ours)
    x, y = torch.randn(64, 10), torch.randint(3, (64,))
    losses = []
    for model in (plain, ours):
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        row = []
        for _ in range(20):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            row.append(loss.item())
        losses.append(row)
    torch.testing.assert_close(losses[1], losses[0], atol=1e-4, rtol=1e-4)


class ConvNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2, groups=8, padding_mode="circular")
        )
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.line, self.back = nn.Conv1d(4, 5, 3, bias=False), nn.ConvTranspose1d(5, 2, 3)
        self.cube, self.last = nn.Conv3d(1, 3, 2), nn.ConvTranspose3d(3, 2, 2)

    def forward(self, x):
        x = self.up(self.body(x)).flatten(2)
        return self.last(self.cube(self.back(self.line(x))[:, None, None, :, :].repeat(1, 1, 2, 1, 1)))


def test_convolutions():
    plain = ConvNet()
    ours = copy.deepcopy(plain)
    dicts = [set(vars(module)) for module in plain.modules()]
    report = fastops.replace_(ours)
    assert names(report.replaced) == ["body.0", "body.1", "body.2", "up", "line", "back", "cube", "last"]
    assert report.replaced[3] == ("up", "torch.nn.ConvTranspose2d", "fastops.nn.ConvTranspose2d")
    assert report.skipped == []
    assert [set(vars(module)) for module in ours.modules()] == dicts
    assert list(ours.state_dict()) == list(plain.state_dict())
    assert repr(ours) == repr(plain)
    x = torch.randn(2, 1, 10, 12)
    with fastops.record() as rows:
        output = ours(x)
    assert "aten" not in [row.kernel for row in rows]
    torch.testing.assert_close(output, plain(x), atol=1e-5, rtol=1e-4)
    for model in (plain, ours):
        model(x).square().mean().backward()
    for one, two in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(pickle.loads(pickle.dumps(ours))(x), output)
    fastops.restore_(ours)
    assert [type(m) for m in ours.modules()] == [type(m) for m in plain.modules()]
    model = nn.Sequential(fnn.Conv2d(3, 4, 3, activation="relu"))
    assert names(fastops.restore_(model).skipped) == ["0"]


def test_idempotent():
    model = Net()
    fastops.replace_(model)
    report = fastops.replace_(model)
    assert report.replaced == []
    assert {row.result for row in report.skipped} == {"already a fastops module"}


def test_root_itself():
    layer = nn.Linear(3, 4)
    report = fastops.replace_(layer)
    assert type(layer) is fnn.Linear
    assert names(report.replaced) == [""]
    assert str(report).startswith("(root)")
    fastops.restore_(layer)
    assert type(layer) is nn.Linear


def test_restore_is_the_inverse():
    model = Net()
    types = [type(module) for module in model.modules()]
    dicts = [set(module.__dict__) for module in model.modules()]
    fastops.replace_(model)
    report = fastops.restore_(model)
    assert [type(module) for module in model.modules()] == types
    assert [set(module.__dict__) for module in model.modules()] == dicts
    assert report.replaced[0] == ("body.0", "fastops.nn.Linear", "torch.nn.Linear")
    assert len(report.replaced) == 6
    assert fastops.restore_(model).replaced == []


@pytest.mark.parametrize("way", ["pickle", "deepcopy", "torch.save"])
def test_copies_stay_replaced_and_can_be_restored(way, tmp_path):
    model = Net().eval()
    fastops.replace_(model)
    if way == "pickle":
        other = pickle.loads(pickle.dumps(model))
    elif way == "deepcopy":
        other = copy.deepcopy(model)
    else:
        torch.save(model, tmp_path / "model.pt")
        other = torch.load(tmp_path / "model.pt", weights_only=False)
    x = torch.randn(2, 10)
    assert torch.equal(other(x), model(x))
    assert type(other.head) is fnn.Linear
    assert other.again is other.head
    fastops.restore_(other)
    assert type(other.head) is nn.Linear


def test_state_dict_both_ways():
    ours, plain = Net(), Net()
    fastops.replace_(ours)
    ours.load_state_dict(plain.state_dict())
    plain.load_state_dict(ours.state_dict())


def test_context_manager():
    model = Net()
    with fastops.replaced(model) as report:
        assert type(model.head) is fnn.Linear
        assert len(report.replaced) == 6
    assert type(model.head) is nn.Linear
    with pytest.raises(ZeroDivisionError), fastops.replaced(model):
        raise ZeroDivisionError
    assert type(model.head) is nn.Linear
    fastops.replace_(model.body)
    with fastops.replaced(model):
        assert type(model.head) is fnn.Linear
    assert type(model.head) is nn.Linear
    assert type(model.body[0]) is fnn.Linear  # replaced before, so still


def test_filter():
    model = Net()
    seen = []

    def only_body(module, name):
        seen.append(name)
        return name.startswith("body") and isinstance(module, nn.Linear)

    report = fastops.replace_(model, filter_fn=only_body)
    assert names(report.replaced) == ["body.0", "body.2"]
    assert type(model.head) is nn.Linear
    assert seen == ["body.0", "body.1", "body.2", "body.3", "head", "gate"]
    assert ("head", "torch.nn.Linear", "filter_fn said no") in report.skipped


def skipped(module):
    """Why replace_ leaves the module, a child of a model, alone."""
    model = nn.Module()
    model.child = module
    before = type(module)
    report = fastops.replace_(model)
    assert type(module) is before
    assert not [row for row in report.replaced if row.name == "child"]
    return {row.name: row.result for row in report.skipped}.get("child")


def test_skips():
    class MyLinear(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    monkeypatched = nn.Linear(3, 4)
    monkeypatched.forward = lambda x: x
    assert skipped(MyLinear(3, 4)).startswith("a subclass of torch.nn.Linear")
    assert skipped(parametrizations.orthogonal(nn.Linear(4, 4))).startswith("parametrized")
    assert (
        skipped(nn.Linear(3, 4, dtype=torch.complex64)) == "weight has dtype complex64, which no fastops kernel takes"
    )
    assert skipped(nn.LazyLinear(4)).startswith("lazy")
    assert skipped(monkeypatched) == "its forward has been overridden on the instance"
    assert skipped(torch.ao.nn.quantized.dynamic.Linear(3, 4)) == "quantized"
    assert skipped(torch.ao.nn.quantized.Conv2d(3, 4, 1)) == "quantized"
    assert skipped(nn.LazyConv2d(4, 3)).startswith("lazy")
    assert skipped(parametrizations.weight_norm(nn.Conv2d(3, 4, 1))).startswith("parametrized")
    for layer in (nn.LPPool2d(2, 2), nn.FractionalMaxPool2d(2, 3)):
        assert skipped(layer) == "no fastops kernel in this version"
    assert skipped(torch.jit.script(nn.Linear(3, 4))) == "a TorchScript module"
    assert skipped(torch.jit.trace(nn.Linear(3, 4), (torch.randn(2, 3),))) == "a TorchScript module"
    for layer in (nn.Dropout(), nn.Flatten(), nn.BatchNorm1d(3), nn.Sequential(), nn.Embedding(3, 4)):
        assert skipped(layer) is None


def test_tensor_subclass_weight_is_skipped():
    class Sub(nn.Parameter):
        pass

    layer = nn.Linear(3, 4)
    layer.weight = Sub(layer.weight.data)
    assert skipped(layer) == "weight is a Sub, a tensor subclass"


def test_a_lazy_layer_is_replaced_once_it_has_run():
    model = nn.Sequential(nn.LazyLinear(4))
    model(torch.randn(2, 3))
    assert names(fastops.replace_(model).replaced) == ["0"]


def test_parents_that_read_the_weight():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, activation=nn.GELU())
    report = fastops.replace_(layer)
    reasons = {row.name: row.result for row in report.skipped}
    assert reasons["self_attn.out_proj"] == "torch.nn.MultiheadAttention reads its weight directly"
    assert reasons["linear1"] == reasons["linear2"] == "torch.nn.TransformerEncoderLayer reads its weight directly"
    assert names(report.replaced) == ["activation"]
    x = torch.randn(2, 5, 8)
    for training in (True, False):
        layer.train(training)
        with torch.no_grad():
            assert layer(x).shape == x.shape
    decoder = nn.TransformerDecoderLayer(8, 2, 16)
    assert "linear1" in names(fastops.replace_(decoder).replaced)


def test_a_linear_with_an_activation_is_not_restored_silently():
    model = nn.Sequential(fnn.Linear(3, 4, activation="relu"), fnn.Linear(4, 5))
    report = fastops.restore_(model)
    assert names(report.replaced) == ["1"]
    assert names(report.skipped) == ["0"]
    assert "relu" in report.skipped[0].result
    assert type(model[0]) is fnn.Linear
    assert "skipped:" in str(report)


def test_tied_weights_and_parameters_on_meta():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model[1].weight = model[0].weight
    fastops.replace_(model)
    assert model[1].weight is model[0].weight
    meta = nn.Sequential(nn.Linear(3, 4, device="meta"))
    assert len(fastops.replace_(meta).replaced) == 1
    meta.to_empty(device="cpu")
    assert meta(torch.randn(2, 3)).shape == (2, 4)


def test_not_a_module():
    for function in (fastops.replace_, fastops.restore_):
        with pytest.raises(TypeError, match=f"{function.__name__}: model must be a torch.nn.Module, got int"):
            function(3)
    with pytest.raises(TypeError), fastops.replaced("model"):
        pass


def test_jit_script_and_trace_of_a_replaced_model():
    model = nn.Sequential(nn.Linear(10, 6), nn.GELU(), nn.PReLU(), nn.LeakyReLU(0.3))
    x = torch.randn(3, 10)
    fastops.replace_(model)
    expected = model(x)
    traced = torch.jit.trace(model, (x,))
    assert not [node for node in traced.inlined_graph.nodes() if node.kind().startswith("fastops::")]
    torch.testing.assert_close(traced(x), expected)
    torch.testing.assert_close(torch.jit.script(model)(x), expected)
    fused = fnn.Linear(10, 3, activation=nn.LeakyReLU(0.2))
    torch.testing.assert_close(torch.jit.script(fused)(x), fused(x))
    image = torch.randn(2, 3, 8, 8)
    for layer in (nn.Conv2d(3, 4, 3, padding="same"), nn.ConvTranspose2d(3, 4, 3)):
        fastops.replace_(layer)
        expected = layer(image)
        for other in (torch.jit.script(layer), torch.jit.trace(layer, (image,))):
            torch.testing.assert_close(other(image), expected, atol=1e-5, rtol=1e-5)


def test_a_compiled_model_may_be_replaced():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    x = torch.randn(2, 3)
    before = compiled(x)
    assert len(fastops.replace_(compiled).replaced) == 2
    torch.testing.assert_close(compiled(x), before)
