"""fastops.freeze, where a forward cannot be traced and asks what its children are: they are frozen in place."""

import copy
import pickle

import pytest
import torch
from torch import nn

import fastops
from fastops._frozen_graph import InPlace


class Mlp(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc1, self.norm, self.fc2 = (
            nn.Linear(width, 2 * width),
            nn.LayerNorm(2 * width),
            nn.Linear(2 * width, width),
        )

    def forward(self, x, scale=None):
        y = self.fc2(self.norm(torch.relu(self.fc1(x))))
        return y if scale is None else y * scale


class Block(nn.Module):
    """Cannot be traced."""

    def __init__(self, width):
        super().__init__()
        self.attention, self.mlp = nn.Linear(width, width), Mlp(width)

    def forward(self, x, scale=None):
        x = x + self.attention(x).view(*x.shape[:-1], -1)
        return x + self.mlp(x, scale)


class Net(nn.Module):
    """Asks for its dtype, by its parameters, and for the kinds of its children."""

    def __init__(self, width=8, blocks=2):
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.head = nn.Sequential(nn.Linear(width, 3), nn.Sigmoid())

    def forward(self, x, scale=None):
        x = x.to(next(self.parameters()).dtype)
        for block in self.blocks:
            if isinstance(block, Block) and len(list(block.mlp.parameters())) == 6:
                x = block(x, scale)
        return self.head(x)


class Decays(Net):
    """Changes its parameters at every call."""

    def forward(self, x, scale=None):
        for parameter in self.parameters():
            parameter.data.mul_(0.9)
        return super().forward(x, scale)


@pytest.fixture
def model():
    return Net().double().eval()


X = torch.linspace(-1, 1, 40, dtype=torch.float64).view(5, 8)


@torch.no_grad()
def same(frozen, model, *inputs):
    expected = model(*inputs)
    torch.testing.assert_close(frozen(*inputs), expected)
    return expected


def test_all_layers_are_frozen_where_they_are(model):
    frozen = fastops.freeze(model)
    report = frozen.fastops_report
    names = {"attention", "mlp.fc1", "mlp.fc2"}
    layers = {f"blocks.{i}.{name}" for i in range(2) for name in names} | {"head.0"}
    assert {row.name for row in report.frozen} == layers
    assert [row.name for row in report.untraced] == ["", "blocks.0", "blocks.1"]
    with fastops.record() as calls:
        same(frozen, model, X)
    assert [row.op for row in calls].count("linear") == 7
    inside = frozen.model
    assert list(inside.state_dict()) == list(model.state_dict())
    for (name, one), (other_name, other) in zip(inside.named_modules(), model.named_modules(), strict=True):
        assert name == other_name
        assert isinstance(one, type(other))
    assert isinstance(inside.blocks[0].mlp, InPlace)
    assert not isinstance(model.blocks[0].mlp, InPlace)


def test_a_call_that_gives_an_option(model):
    """A graph is for the defaults. Another call runs the module's own forward, whose layers are frozen, too."""
    frozen = fastops.freeze(model)
    with fastops.record() as calls:
        same(frozen, model, X, torch.tensor(0.5, dtype=torch.float64))
    assert [row.op for row in calls if row.kernel != "aten"].count("linear") == 7


def test_copied_pickled_and_moved(model):
    frozen = fastops.freeze(model)
    for one in (copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen)), copy.deepcopy(copy.deepcopy(frozen))):
        same(one, model, X)
        assert isinstance(one.model.blocks[1].mlp, InPlace)
        narrow = one.float()
        with fastops.record() as calls:
            torch.testing.assert_close(narrow(X), model(X).float())
        assert {row.dtype for row in calls} == {"float32"}
        assert isinstance(narrow.model.blocks[1].mlp, InPlace)
        assert narrow.model.blocks[1].mlp._is_as_frozen()


def test_compiled_and_exported(model):
    frozen = fastops.freeze(model)
    with torch.no_grad():
        expected = model(X)
        program = torch.export.export(frozen, (X,))
        torch.testing.assert_close(program.module()(X), expected)
        torch.testing.assert_close(torch.jit.trace(frozen, X)(X), expected)


def test_a_forward_that_changes_the_weights():
    """Packed weights would be old."""
    source = Decays().double().eval()
    frozen = fastops.freeze(source)
    model = copy.deepcopy(source)
    del source  # its weights are those of the frozen model
    assert len(frozen.fastops_report.frozen) == 7
    for _ in range(3):
        same(frozen, model, X)
    moved = pickle.loads(pickle.dumps(frozen))
    same(moved, model, X)
    same(moved.float(), model.float(), X.float())


def test_hooks_are_called(model):
    seen = []
    model.blocks[0].mlp.fc1.register_forward_hook(lambda module, args, output: seen.append(len(output)))
    model.blocks[1].mlp.register_forward_hook(lambda module, args, output: output * 2)
    frozen = fastops.freeze(model)
    same(frozen, model, X)
    assert seen == [5, 5]
    assert not isinstance(frozen.model.blocks[1].mlp, InPlace)
    assert isinstance(frozen.model.blocks[1].mlp.fc1, InPlace)


def test_a_shared_module_is_frozen_once(model):
    model.blocks[1] = model.blocks[0]
    model.head[0] = model.blocks[0].attention
    frozen = fastops.freeze(model)
    same(frozen, model, X)
    assert frozen.model.blocks[0] is frozen.model.blocks[1]
    assert frozen.model.head[0] is frozen.model.blocks[0].attention


def test_exact_classes_stay():
    class Asks(Net):
        def forward(self, x):
            x = x.view(*x.shape[:-1], -1)
            return self.head(x) if type(self.blocks[0]) is Block else x

    model = Asks().double().eval()
    frozen = fastops.freeze(model)
    same(frozen, model, X)
    assert type(frozen.model.blocks[0]) is Block
    [why] = {row.result for row in frozen.fastops_report.left}
    assert why.endswith("Asks, its forward asks for the exact class of a module")
