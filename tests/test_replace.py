"""replace_, restore_ and replaced: nothing but the classes changes."""

import contextlib
import copy
import functools
import pickle
import subprocess
import sys

import pytest
import torch
import torch.distributed.fsdp
from every_op import LAYER_NAMES, declared, layer_input
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import fastops
import fastops.nn as fnn
from fastops.functional import _activation

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


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
    assert report.left == [("body.4", "torch.nn.Dropout", "no fastops kernel")]
    assert str(report).splitlines() == [
        "body.0, body.2, head  torch.nn.Linear  ->  fastops.nn.Linear",
        "body.1                torch.nn.ReLU    ->  fastops.nn.ReLU",
        "body.3                torch.nn.GELU    ->  fastops.nn.GELU",
        "gate                  torch.nn.PReLU   ->  fastops.nn.PReLU",
        "left alone, no fastops kernel: 1 x torch.nn.Dropout",
        "6 replaced, 0 skipped, 1 left alone",
    ]
    assert type(model.again) is fnn.Linear


def test_report_of_a_large_model_is_short():
    """A line for all modules that fared alike; each of them is in the fields."""
    block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.InstanceNorm2d(8), nn.ReLU())
    model = nn.Sequential(*(copy.deepcopy(block) for _ in range(50)), nn.Linear(8, 2, dtype=torch.complex64))
    report = fastops.replace_(model)
    assert names(report.replaced) == [f"{i}.{j}" for i in range(50) for j in (0, 2)]
    assert names(report.left) == [f"{i}.1" for i in range(50)]
    lines = [line.split() for line in str(report).splitlines()]
    assert lines[0] == ["0.0,", "1.0,", "...", "49.0", "(50)", "torch.nn.Conv2d", "->", "fastops.nn.Conv2d"]
    assert lines[2][:3] == ["50", "torch.nn.Linear", "skipped:"]
    assert str(report).splitlines()[3] == "left alone, no fastops kernel: 50 x torch.nn.InstanceNorm2d"
    assert len(lines) == 5


class ByHand(nn.Module):
    """A layer that torch.nn does not have, like transformers' Conv1D."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 3))

    def forward(self, x):
        return x @ self.weight


class Only(nn.Module):
    """Calls its child, and computes nothing itself."""

    def __init__(self, child):
        super().__init__()
        self.child = child

    def forward(self, x):
        return self.child(x)


@pytest.mark.parametrize(
    "layer",
    [
        nn.InstanceNorm2d(3), nn.GroupNorm(1, 3, affine=False), nn.Embedding(3, 4),
        nn.EmbeddingBag(3, 4), nn.LSTM(3, 4), nn.GRUCell(3, 4), nn.Bilinear(2, 3, 4),
        nn.Softmin(-1), nn.Softmax2d(), nn.RReLU(), nn.MaxUnpool1d(2),
        nn.MaxUnpool2d(2), nn.MaxUnpool3d(2), nn.LPPool1d(2, 2), nn.LPPool2d(2, 2), nn.LPPool3d(2, 2),
        nn.FractionalMaxPool2d(2, 3), nn.FractionalMaxPool3d(2, 3), nn.Dropout(), nn.Upsample(2), nn.ZeroPad2d(1),
        nn.PixelShuffle(2), nn.L1Loss(), nn.CosineSimilarity(),
    ],
    ids=lambda layer: type(layer).__name__,
)  # fmt: skip
def test_whatever_computes_is_listed(layer):
    report = fastops.replace_(Only(layer))
    assert report.left[0] == ("child", f"torch.nn.{type(layer).__name__}", "no fastops kernel")
    assert report.replaced == []


def test_layers_that_torch_does_not_have_are_listed():
    model = nn.Sequential(*(ByHand() for _ in range(12)), nn.GroupNorm(1, 3), nn.Linear(3, 3))
    report = fastops.replace_(model)
    kind = f"{ByHand.__module__}.ByHand"
    assert report.left[0] == ("0", kind, "not a torch.nn layer")
    assert f"left alone, not a torch.nn layer: 12 x {kind}" in str(report).splitlines()
    assert "left alone, no fastops kernel: 1 x torch.nn.GroupNorm" in str(report).splitlines()
    assert str(report).splitlines()[-1] == "1 replaced, 0 skipped, 13 left alone"


def test_what_computes_nothing_is_not_listed():
    model = Only(nn.Sequential(nn.Identity(), nn.Flatten(), nn.Unflatten(0, (1, 2)), Only(nn.ModuleList([nn.ReLU()]))))
    model.more, model.weights = nn.ModuleDict({"a": nn.ReLU()}), nn.ParameterList([torch.randn(3)])
    model.normed = parametrizations.weight_norm(nn.Linear(3, 3))
    report = fastops.replace_(model)
    assert report.left == []
    assert names(report.skipped) == ["normed"]


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
    other = Net()
    other.load_state_dict(ours.state_dict())
    torch.testing.assert_close(other.state_dict(), plain.state_dict(), atol=0, rtol=0)


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
    assert skipped(monkeypatched).startswith("its forward has been overridden on the instance")
    assert skipped(torch.ao.nn.quantized.dynamic.Linear(3, 4)) == "quantized"
    assert skipped(torch.ao.nn.quantized.Conv2d(3, 4, 1)) == "quantized"
    assert skipped(nn.LazyConv2d(4, 3)).startswith("lazy")
    assert skipped(parametrizations.weight_norm(nn.Conv2d(3, 4, 1))).startswith("parametrized")
    assert skipped(torch.jit.script(nn.Linear(3, 4))) == "a TorchScript module"
    assert skipped(torch.jit.trace(nn.Linear(3, 4), (torch.randn(2, 3),))) == "a TorchScript module"
    for layer in (nn.Dropout(), nn.Flatten(), nn.InstanceNorm1d(3), nn.Sequential(), nn.Embedding(3, 4)):
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
    class Layer(nn.TransformerEncoderLayer):
        pass

    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, activation=nn.GELU())
    report = fastops.replace_(layer)
    reasons = {row.name: row.result for row in report.skipped}
    assert reasons["self_attn.out_proj"] == "torch.nn.MultiheadAttention reads its weight directly"
    assert sorted(names(report.replaced)) == [
        "", "activation", "linear1", "linear2", "norm1", "norm2", "self_attn",
    ]  # fmt: skip
    reasons = {row.name: row.result for row in fastops.replace_(Layer(8, 2, 16)).skipped}
    assert reasons["linear1"] == reasons["linear2"] == "torch.nn.TransformerEncoderLayer reads its weight directly"
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
    assert report.skipped[0].result == "activation='relu' has no equal in torch.nn.Linear"
    assert model[0].activation == "relu"
    assert "skipped:" in str(report)


def test_an_attribute_activation_of_ones_own():
    """fastops.nn's layers have another use for it."""
    for value in ("relu", nn.ReLU()):
        layer = nn.Linear(3, 4)
        layer.activation = value
        assert skipped(layer).startswith("it already has an attribute named activation")
        assert layer.activation is value


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


def test_jit_trace_of_a_replaced_model():
    model = nn.Sequential(nn.Linear(10, 6), nn.GELU(), nn.PReLU(), nn.LeakyReLU(0.3))
    x = torch.randn(3, 10)
    fastops.replace_(model)
    traced = torch.jit.trace(model, (x,))
    assert not [node for node in traced.inlined_graph.nodes() if node.kind().startswith("fastops::")]
    torch.testing.assert_close(traced(x), model(x))
    image = torch.randn(2, 3, 8, 8)
    for layer in (nn.Conv2d(3, 4, 3, padding="same"), nn.ConvTranspose2d(3, 4, 3)):
        fastops.replace_(layer)
        torch.testing.assert_close(torch.jit.trace(layer, (image,))(image), layer(image), atol=1e-5, rtol=1e-5)


def test_a_compiled_model_may_be_replaced():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    x = torch.randn(2, 3)
    before = compiled(x)
    assert len(fastops.replace_(compiled).replaced) == 2
    torch.testing.assert_close(compiled(x), before)


# ---- what was bound before a swap runs after it ----------------------------------------------------------------------

LAYERS = {
    "Linear": (nn.Linear, (3, 3), (2, 3)),
    "Conv1d": (nn.Conv1d, (1, 2, 3), (1, 1, 5)),
    "Conv2d": (nn.Conv2d, (1, 2, 3, 1, 1, 1, 1, True, "reflect"), (1, 1, 5, 5)),
    "ConvTranspose2d": (nn.ConvTranspose2d, (1, 1, 2), (1, 1, 4, 4)),
    "MaxPool2d": (nn.MaxPool2d, (2,), (1, 1, 4, 4)),
    "AvgPool1d": (nn.AvgPool1d, (2,), (1, 1, 4)),
    "AdaptiveMaxPool2d": (nn.AdaptiveMaxPool2d, (1,), (1, 1, 4, 4)),
    "AdaptiveAvgPool3d": (nn.AdaptiveAvgPool3d, (1,), (1, 1, 4, 4, 4)),
    "ReLU": (nn.ReLU, (), (3,)),
    "Softplus": (nn.Softplus, (), (3,)),
    "PReLU": (nn.PReLU, (), (3,)),
    "GLU": (nn.GLU, (), (4,)),
}


def wrap_in_a_closure(layer):
    old = layer.forward
    layer.forward = lambda *args: old(*args)


def wrap_in_a_partial(layer):
    layer.forward = functools.partial(layer.forward)


def wrap_by_name(layer):
    """The class's own function, as a tool does that calls type(module).forward later."""
    function = type(layer).forward
    layer.forward = lambda *args: function(layer, *args)


@pytest.mark.parametrize("scoped", [False, True])
@pytest.mark.parametrize("wrap", [wrap_in_a_closure, wrap_in_a_partial, wrap_by_name])
@pytest.mark.parametrize("name", LAYERS)
def test_a_forward_that_was_bound_runs_after_restore(name, wrap, scoped):
    cls, arguments, shape = LAYERS[name]
    model, x = nn.Sequential(cls(*arguments)), torch.randn(shape)
    expected = model(x)
    if scoped:
        with fastops.replaced(model):
            wrap(model[0])
    else:
        fastops.replace_(model)
        wrap(model[0])
        row = fastops.restore_(model).replaced[0]
        assert row.result.startswith(f"torch.nn.{name}, but the forward that was set on it may go on")
    assert type(model[0]) is cls
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("name", LAYER_NAMES)
def test_every_bound_forward_runs_after_restore(name):
    layer, x = getattr(nn, name)(*dict(declared("LAYERS"))[name]), layer_input(name)
    expected = layer(x)
    fastops.replace_(layer)
    forward = layer.forward
    fastops.restore_(layer)
    assert type(layer) is getattr(nn, name)
    torch.testing.assert_close(forward(x), expected, atol=1e-5, rtol=1e-5)


def test_a_forward_that_was_bound_while_fused_runs_after_everything():
    layer, x = fnn.Linear(3, 3, activation="relu"), torch.randn(2, 3)
    forward, conv = layer.forward, fnn.Conv1d(3, 3, 1, activation="relu")
    conv_forward = conv.forward
    layer.activation = conv.activation = None
    fastops.restore_(layer)
    fastops.restore_(conv)
    assert (type(layer), type(conv)) == (nn.Linear, nn.Conv1d)
    torch.testing.assert_close(forward(x), layer(x))
    torch.testing.assert_close(conv_forward(x[..., None]), conv(x[..., None]))


class Hook:
    """accelerate's ModelHook."""

    no_grad = False

    def pre_forward(self, module, *args, **kwargs):
        module.calls.append("pre")
        return args, kwargs

    def post_forward(self, module, output):
        return output


def add_hook(module):
    """What accelerate.hooks.add_hook_to_module does."""
    module.calls = []
    module._old_forward = old = module.forward
    module._hf_hook = Hook()

    def new_forward(module, *args, **kwargs):
        args, kwargs = module._hf_hook.pre_forward(module, *args, **kwargs)
        return module._hf_hook.post_forward(module, module._old_forward(*args, **kwargs))

    module.forward = functools.update_wrapper(functools.partial(new_forward, module), old)


def remove_hook(module):
    module.forward = module._old_forward
    del module._old_forward, module._hf_hook


def ops(model, x):
    with fastops.record() as rows:
        model(x)
    return [row.op for row in rows]


def test_hooks_of_accelerate_are_seen_through():
    model, x = nn.Sequential(nn.Linear(3, 3), nn.ReLU()), torch.randn(2, 3)
    for module in model:
        add_hook(module)
    assert names(fastops.replace_(model).replaced) == ["0", "1"]
    assert ops(model, x) == ["linear", "relu"]
    assert model[0].calls == ["pre"]
    assert {row.result for row in fastops.restore_(model).replaced} == {"torch.nn.Linear", "torch.nn.ReLU"}
    assert ops(model, x) == []
    for module in model:  # removed, they leave a bound forward behind
        remove_hook(module)
    assert names(fastops.replace_(model).replaced) == ["0", "1"]
    assert ops(model, x) == ["linear", "relu"]
    for module in model:
        add_hook(module)
    fastops.restore_(model)
    assert ops(model, x) == []


def test_accelerate():
    accelerate = pytest.importorskip("accelerate")
    model, x = nn.Sequential(nn.Linear(3, 3), nn.ReLU()), torch.randn(2, 3)
    expected = model(x)
    accelerate.cpu_offload(model, execution_device="cpu")
    assert model[0].weight.is_meta
    assert names(fastops.replace_(model).replaced) == ["0", "1"]
    assert ops(model, x) == ["linear", "relu"]
    torch.testing.assert_close(model(x), expected)
    fastops.restore_(model)
    assert ops(model, x) == []
    torch.testing.assert_close(model(x), expected)


# ---- nothing stays behind unseen -------------------------------------------------------------------------------------


def on_fastops(model):
    return [n for n, m in model.named_modules() if any(c.__module__.startswith("fastops") for c in type(m).__mro__)]


@pytest.mark.parametrize("parametrization", ["weight_norm", "spectral_norm", "orthogonal"])
@pytest.mark.parametrize("scoped", [False, True])
def test_layers_that_were_parametrised_go_back(parametrization, scoped):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval(), torch.randn(2, 4)
    with fastops.replaced(model) if scoped else contextlib.nullcontext():
        if not scoped:
            fastops.replace_(model)
        getattr(parametrizations, parametrization)(model[0])
        twin = copy.deepcopy(model)  # shares the class that parametrize made
        expected = model(x)
        report = fastops.replace_(model)
        assert report.skipped[0].result == "already derived from fastops.nn.Linear"
        if not scoped:
            report = fastops.restore_(model)
            assert report.replaced[0][1:] == (
                "ParametrizedLinear (fastops.nn.Linear)", "ParametrizedLinear (torch.nn.Linear)",
            )  # fmt: skip
            assert report.skipped == []
    assert on_fastops(model) == []
    assert on_fastops(twin) == ["0", "1"]  # not the model that was given
    assert parametrize.is_parametrized(model[0])
    assert parametrize.type_before_parametrizations(model[0]) is nn.Linear
    assert ops(model, x) == []
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(copy.deepcopy(model)(x), expected)
    model[0].weight = model[0].weight.detach() * 1  # through right_inverse, where there is one
    parametrize.remove_parametrizations(model[0], "weight")
    assert type(model[0]) is nn.Linear
    torch.testing.assert_close(model(x), expected)
    parametrize.remove_parametrizations(twin[0], "weight")
    assert type(twin[0]) is fnn.Linear
    torch.testing.assert_close(twin(x), expected)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "change",
    [nn.utils.weight_norm, nn.utils.spectral_norm, lambda m: prune.l1_unstructured(m, "weight", 0.4)],
    ids=["weight_norm", "spectral_norm", "prune"],
)
def test_layers_with_old_normalisations_or_pruned_go_back(change):
    model, x = nn.Sequential(nn.Conv2d(2, 3, 3)).eval(), torch.randn(1, 2, 5, 5)
    fastops.replace_(model)
    change(model[0])
    expected = model(x)
    fastops.restore_(model)
    assert on_fastops(model) == []
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)


class LoRA(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base = base
        self.a, self.b = nn.Linear(base.in_features, 2, False), nn.Linear(2, base.out_features, False)

    def forward(self, x):
        return self.base(x) + self.b(self.a(x))


def test_layers_that_moved_go_back():
    model, x = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)), torch.randn(2, 3)
    with fastops.replaced(model):
        model[0] = LoRA(model[0])
        gone, model[1] = model[1], nn.Identity()
        model.insert(0, nn.Flatten())
        expected = model(x)
    assert on_fastops(model) == []
    assert type(gone) is nn.Linear  # it left the model, and is restored all the same
    torch.testing.assert_close(model(x), expected)
    fastops.replace_(model)
    model[3] = LoRA(model[3])
    fastops.restore_(model)
    assert on_fastops(model) == []


class Derived(fnn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


def test_what_cannot_go_back_is_in_the_report():
    class Local(fnn.ReLU):
        pass

    notebook = {"fnn": fnn, "__name__": "notebook"}  # a class that its module has no more
    exec("class Cell(fnn.Tanh):\n  def forward(self, x):\n    return super().forward(x)", notebook)
    model = nn.Sequential(Derived(3, 3), Local(), fnn.Conv2d(1, 1, 1, activation="relu"), fnn.Linear(3, 3))
    model.append(parametrizations.weight_norm(Derived(3, 3)))
    model.append(parametrizations.weight_norm(fnn.Linear(3, 3, activation="tanh")))
    model.append(notebook["Cell"]())
    report = fastops.restore_(model)
    reasons = {row.name: row.result for row in report.skipped}
    assert names(report.replaced) == ["3"]
    assert list(reasons) == on_fastops(model) == ["0", "1", "2", "4", "5", "6"]
    assert reasons["0"].startswith("a user-defined subclass of fastops.nn.Linear")
    assert reasons["1"].startswith("a user-defined subclass of fastops.nn.ReLU")
    assert reasons["4"].startswith("a user-defined subclass of fastops.nn.Linear")
    assert reasons["6"].startswith("a user-defined subclass of fastops.nn.Tanh")
    assert reasons["5"] == "activation='tanh' has no equal in torch.nn.Linear"
    model(torch.randn(1, 3, 3))


def test_replaced_says_what_stays():
    model = nn.Sequential(nn.Linear(3, 3))
    with pytest.warns(UserWarning, match="replaced: 0 stays fastops.nn.linear.FusedLinear: activation='relu'"):  # noqa: SIM117
        with fastops.replaced(model) as report:
            model[0].activation = "relu"
    assert names(report.skipped) == ["0"]


@pytest.fixture(scope="module")
def mesh(tmp_path_factory):
    store = torch.distributed.FileStore(str(tmp_path_factory.mktemp("store") / "file"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def train(model, x):
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.1), []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(x).square().sum()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def shard(model, mesh):
    for layer in (*model, model):
        if next(layer.parameters(), None) is not None:
            torch.distributed.fsdp.fully_shard(layer, mesh=mesh)


@pytest.mark.parametrize("activation", [None, "relu"])
def test_sharded_layers(mesh, activation):
    model, x = nn.Sequential(fnn.Linear(4, 5, activation=activation), fnn.Linear(5, 3)), torch.randn(2, 4)
    plain = nn.Sequential(nn.Linear(4, 5), nn.Identity() if activation is None else nn.ReLU(), nn.Linear(5, 3))
    plain.load_state_dict({key.replace("1.", "2."): value for key, value in model.state_dict().items()})
    shard(model, mesh)
    torch.testing.assert_close(train(model, x), train(plain, x), atol=1e-5, rtol=1e-5)
    assert {row.result for row in fastops.replace_(model).skipped} == {
        "already derived from fastops.nn.Linear",
        f"already derived from {'fastops.nn.linear.FusedLinear' if activation else 'fastops.nn.Linear'}",
    }
    report = fastops.restore_(model)
    assert names(report.skipped) == ([] if activation is None else ["0"])
    assert report.replaced[-1] == ("1", "FSDPLinear (fastops.nn.Linear)", "FSDPLinear (torch.nn.Linear)")
    assert isinstance(model[1], torch.distributed.fsdp.FSDPModule)
    assert ops(model, x) == ([] if activation is None else ["linear"])
    torch.testing.assert_close(train(model, x), train(plain, x), atol=1e-5, rtol=1e-5)
    if activation is not None:
        model[0].activation, plain[1] = None, nn.Identity()
        torch.testing.assert_close(train(model, x), train(plain, x), atol=1e-5, rtol=1e-5)
        fastops.restore_(model)
    assert on_fastops(model) == []


def test_layers_that_are_sharded_already(mesh):
    model, x = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.BatchNorm1d(5), nn.Linear(5, 3)), torch.randn(4, 4)
    plain = copy.deepcopy(model)
    shard(model, mesh)
    report = fastops.replace_(model)
    assert names(report.replaced) == ["0", "1", "2", "3"]
    assert report.replaced[0] == ("0", "FSDPLinear (torch.nn.Linear)", "FSDPLinear (fastops.nn.Linear)")
    assert ops(model, x) == ["linear", "relu", "batch_norm", "linear"]
    torch.testing.assert_close(train(model, x), train(plain, x), atol=1e-5, rtol=1e-5)
    fastops.restore_(model)
    assert on_fastops(model) == []
    assert isinstance(model[0], torch.distributed.fsdp.FSDPModule)


def test_a_class_that_another_tool_made():
    layer = nn.Linear(4, 5)
    layer.__class__ = type("ScaledLinear", (nn.Linear,), {"extra": 1})
    (row,) = fastops.replace_(layer).skipped
    assert row.result == "a class that a tool made from torch.nn.Linear: replace_ has to come before it"


@pytest.mark.parametrize("way", [fastops.replace_, fastops.fuse])
def test_data_parallel(way, monkeypatch):
    """On a CPU it calls its module. On GPUs it calls copies, whose parameters are plain tensors."""
    # Another test of this process may have brought the emulator, which is no device to copy to.
    monkeypatch.setattr(sys.modules["torch.nn.parallel.data_parallel"], "_get_available_device_type", lambda: None)
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 5)
    model, x = nn.Sequential(*layers), torch.randn(2, 3, 8, 8)
    expected = copy.deepcopy(model)(x)
    if way is fastops.fuse:
        model = fastops.fuse(model)
        expected_ops = ops(copy.deepcopy(model), x)
    else:
        way(model)
        expected_ops = ["conv2d", "batch_norm", "relu", "max_pool2d", "linear"]
    wrapped = nn.DataParallel(copy.deepcopy(model))
    torch.testing.assert_close(wrapped(x), expected)
    assert ops(nn.DataParallel(copy.deepcopy(model)), x) == expected_ops

    # What torch.nn.parallel.replicate makes, of one device.
    modules = list(model.modules())
    replicas = {module: module._replicate_for_data_parallel() for module in modules}
    for module, replica in replicas.items():
        for name, child in module.named_children():
            setattr(replica, name, replicas[child])
        for name, parameter in module.named_parameters(recurse=False):
            setattr(replica, name, parameter * 1)
        for name, buffer in module.named_buffers(recurse=False):
            setattr(replica, name, buffer.clone())
    replica = replicas[model]
    with fastops.record() as calls:
        y = replica(x)
        y.square().sum().backward()
    torch.testing.assert_close(y, expected)
    assert all(call.kernel != "aten" for call in calls)
    assert all(parameter.grad is not None for parameter in model.parameters())


# ---- torch.jit.script ------------------------------------------------------------------------------------------------


def scripted(layer):
    """Scripts a model of the layer, bare and nested and shared, and holds it to be what it was."""
    model = nn.Sequential(layer, nn.Sequential(layer), nn.ModuleDict({"a": layer})).train(layer.training)

    def picture():
        # torch.jit.script writes __overloads__ into torch.nn's layers too.
        return [
            (name, id(module), type(module), {k: v for k, v in vars(module).items() if k != "__overloads__"})
            for name, module in model.named_modules()
        ]

    before = picture()
    state, text = list(model.state_dict()), repr(model)
    script = torch.jit.script(nn.Sequential(model[0]))
    torch.jit.script(Only(model[1]))
    assert picture() == before
    assert list(model.state_dict()) == state
    assert repr(model) == text
    assert not [n for n in script.inlined_graph.nodes() if n.kind().startswith("fastops::") or "Python" in n.kind()]
    assert list(script.state_dict()) == [f"0.{key}" for key in layer.state_dict()]
    return script


@pytest.mark.parametrize("name", LAYER_NAMES)
def test_jit_script(name):
    layer, x = getattr(fnn, name)(*dict(declared("LAYERS"))[name]).eval(), layer_input(name)
    torch.testing.assert_close(scripted(layer)(x), layer(x), atol=1e-5, rtol=1e-5)
    if "Max" in name:
        layer.return_indices = True
        for one, two in zip(scripted(layer)(x), layer(x), strict=True):
            torch.testing.assert_close(one, two)


ACTIVATIONS = [*_activation.NAMES, nn.LeakyReLU(0.3), nn.Threshold(0.1, 0.3), nn.Softplus(2.0), fnn.GELU("tanh")]


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_jit_script_of_fused_activations(activation):
    layer, x = fnn.Linear(6, 5, activation=activation), torch.randn(4, 6)
    torch.testing.assert_close(scripted(layer)(x), layer(x))


@pytest.mark.parametrize(
    "name", ["Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d"]
)
@pytest.mark.parametrize("bias", [True, False])
def test_jit_script_of_fused_convolutions(name, bias):
    layer, x = getattr(fnn, name)(4, 6, 3, bias=bias, activation="tanh"), layer_input(name)
    torch.testing.assert_close(scripted(layer)(x), layer(x), atol=1e-5, rtol=1e-5)
    if "Transpose" not in name:
        layer = getattr(fnn, name)(4, 6, 3, padding="same", padding_mode="circular", activation=nn.ELU(0.5))
        torch.testing.assert_close(scripted(layer)(x), layer(x), atol=1e-5, rtol=1e-5)


def times_two(module, args: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
    return output * 2


def test_jit_script_keeps_hooks_and_mode_and_loads_without_fastops(tmp_path):
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Dropout(0.5), fnn.Linear(4, 3, activation="gelu")).eval()
    fastops.replace_(model)
    model[3].register_forward_hook(times_two)
    x = torch.randn(2, 6)
    script = torch.jit.script(model)
    assert not script.training
    assert not script[3].training
    torch.testing.assert_close(script(x), model(x))
    frozen = torch.jit.freeze(script)
    torch.testing.assert_close(frozen(x), model(x))
    torch.testing.assert_close(
        torch.jit.optimize_for_inference(torch.jit.script(model))(x), model(x), atol=1e-5, rtol=1e-5
    )
    torch.jit.save(script, tmp_path / "model.pt")
    torch.save((x, model(x).detach()), tmp_path / "pair.pt")
    program = (
        "import sys, torch; sys.modules['fastops'] = None\n"
        "x, y = torch.load(sys.argv[2])\n"
        "torch.testing.assert_close(torch.jit.load(sys.argv[1])(x), y)\n"
    )
    subprocess.run([sys.executable, "-c", program, tmp_path / "model.pt", tmp_path / "pair.pt"], check=True)


def test_jit_script_of_padding_modes_and_output_sizes():
    x = torch.randn(2, 4, 5, 6)
    layer = fnn.Conv2d(4, 6, 3, padding=(2, 1), padding_mode="reflect", bias=False)
    torch.testing.assert_close(scripted(layer)(x), layer(x), atol=1e-5, rtol=1e-5)
    for activation in (None, "relu"):
        layer = fnn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, activation=activation)
        script = torch.jit.script(layer)
        for size in ([10, 11], [9, 12]):
            torch.testing.assert_close(script(x, size), layer(x, size), atol=1e-5, rtol=1e-5)


def _enter_replaced(model, filter_fn):
    with fastops.replaced(model, filter_fn):
        raise AssertionError("the block was entered")


@pytest.mark.parametrize("scoped", [False, True])
def test_a_filter_that_raises_leaves_the_model_as_it_was(scoped):
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))

    def filter_fn(module, name):
        if name == "2":
            raise KeyError(name)
        return True

    function = _enter_replaced if scoped else fastops.replace_
    with pytest.raises(KeyError):
        function(model, filter_fn)
    assert [type(m) for m in model] == [nn.Linear, nn.ReLU, nn.Linear]
