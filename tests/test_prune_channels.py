"""fastops.light.prune_channels_: a smaller model computes what the model does whose removed channels are 0."""

import copy
import pickle
import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import docs
import fastops
import fastops.nn as fnn
from fastops import light
from fastops.benchmarks.scoreboard import networks
from fastops.light import _choice

# ---- the reference ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def masked(model: nn.Module, removed: dict[str, Tensor], smaller: nn.Module) -> nn.Module:
    """A copy of a model in which the removed channels' weights, biases and norms are 0."""
    result = copy.deepcopy(model)
    for name, lost in removed.items():
        found = dict(result.named_parameters())
        if name in found:  # a parameter that the forward reads
            new = dict(smaller.named_parameters())[name].shape
            (d,) = [i for i, size in enumerate(found[name].shape) if size != new[i]]
            found[name].index_fill_(d, lost, 0)
            continue
        layer = result.get_submodule(name)
        d = 1 if "Transpose" in type(layer).__name__ or isinstance(layer, nn.Embedding) else 0
        if d == 1 and getattr(layer, "groups", 1) > 1:
            weight = layer.weight.view(layer.groups, -1, layer.out_channels // layer.groups, *layer.weight.shape[2:])
            weight.transpose(1, 2).flatten(0, 1)[lost] = 0
            for channel in lost.tolist():
                weight[channel // weight.shape[2], :, channel % weight.shape[2]] = 0
        elif layer.weight is not None:
            layer.weight.index_fill_(d, lost, 0)
        if getattr(layer, "bias", None) is not None:
            layer.bias[lost] = 0
    return result


def settle(model: nn.Module, *inputs: Tensor) -> nn.Module:
    """In float64, with statistics and affine parameters as after some training."""
    model = model.double()
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm)):
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias)
    with torch.no_grad():
        model.train()(*inputs)
    return model.eval()


def check(model: nn.Module, *inputs: Tensor, smaller: bool = True, **options: object) -> light.Changes:
    """Prunes a copy of it, and compares that with the masked model: outputs and gradients, in both modes."""
    inputs = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    model = settle(model, *inputs)
    pruned = copy.deepcopy(model)
    names = [*pruned.state_dict()]
    changes = light.prune_channels_(pruned, inputs, **options)
    assert [*pruned.state_dict()] == names
    assert (changes.after < changes.before) is smaller, changes
    reference = masked(model, changes.removed, pruned)
    for mode in (False, True):
        reference.train(mode), pruned.train(mode)
        torch.testing.assert_close(pruned(*inputs), reference(*inputs), rtol=1e-9, atol=1e-9)
    ends = [one(*inputs).square().sum() for one in (reference, pruned)]
    [end.backward() for end in ends]
    for wanted, found in zip(reference.parameters(), pruned.parameters(), strict=True):
        if wanted.grad is not None and wanted.shape == found.shape:
            torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-6, atol=1e-8)
    return changes


def kept(changes: light.Changes) -> dict[str, str]:
    return {row.name: row.result for row in changes.kept}


# ---- models ----------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Layers by name, and a forward."""

    def __init__(self, forward, **layers):
        super().__init__()
        self.body = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


def images(n: int = 3, c: int = 3, size: int = 8) -> Tensor:
    return torch.randn(n, c, size, size)


def test_convnet():
    model = fastops.demo.ConvNet()
    changes = check(model, torch.randn(2, 1, 28, 28))
    assert {name: len(lost) for name, lost in changes.removed.items()} == {"conv1": 16, "conv2": 32, "fc1": 64}
    assert changes.before / changes.after > 3.9
    assert kept(changes) == {"fc2": "the model's output"}
    assert "conv2  torch.nn.Conv2d  ->     64 -> 32 outputs, 32 -> 16 inputs" in str(changes)


@pytest.mark.parametrize("seed", range(12))
def test_random_branching_models(seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    check(Random(rng), images(), amount=rng.choice([0.3, 0.5, 0.8]), importance=rng.choice(["l1", "l2", "batch_norm"]),
          scope=rng.choice(["layer", "global"]), round_to=rng.choice([1, 2]))  # fmt: skip


class Random(nn.Module):
    """Blocks drawn at random: residual additions, concatenations, gates, depthwise and grouped layers, shuffles."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.layers, self.ways, c = nn.ModuleList(), [], 3
        for _ in range(rng.randint(3, 6)):
            way = rng.choice(["conv", "residual", "cat", "depthwise", "grouped", "gate", "chunk", "shuffle", "prelu"])
            out = rng.choice([8, 12, 16])
            conv = nn.Conv2d(c, out, 3, padding=1, bias=rng.random() < 0.5)
            norms = [nn.BatchNorm2d(out), nn.GroupNorm(4, out), nn.Identity(), nn.InstanceNorm2d(out, affine=True)]
            block = nn.ModuleDict({"conv": conv, "norm": rng.choice(norms)})
            if way == "residual":
                block["other"] = nn.Sequential(nn.Conv2d(out, out, 1), nn.ReLU6(), nn.Conv2d(out, out, 3, padding=1))
            elif way == "cat":
                block["other"] = nn.Conv2d(out, 4, 1)
            elif way == "depthwise":
                block["other"] = nn.Conv2d(out, 2 * out, 3, padding=1, groups=out)
            elif way == "grouped":
                block["other"] = nn.Conv2d(out, 16, 3, padding=1, groups=rng.choice([2, 4]))
            elif way == "gate":
                block["other"] = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(out, 4, 1), nn.SiLU(),
                                               nn.Conv2d(4, out, 1), nn.Sigmoid())  # fmt: skip
            elif way == "prelu":
                block["other"] = nn.PReLU(out)
            c = {"cat": out + 4, "depthwise": 2 * out, "grouped": 16, "chunk": out // 2}.get(way, out)
            self.layers.append(block)
            self.ways.append(way)
        self.fc1, self.fc2 = nn.Linear(4 * c, 20), nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block, way in zip(self.layers, self.ways, strict=True):
            x = torch.relu(block["norm"](block["conv"](x)))
            if way == "residual":
                x = F.relu(x + block["other"](x))
            elif way == "cat":
                x = torch.cat([x, block["other"](x)], 1)
            elif way in ("depthwise", "grouped", "prelu"):
                x = block["other"](x)
            elif way == "gate":
                x = x * block["other"](x)
            elif way == "chunk":
                a, b = x.chunk(2, dim=1)
                x = a * b.tanh()
            elif way == "shuffle":
                n, c, h, w = x.shape
                x = x.view(n, 4, c // 4, h, w).transpose(1, 2).reshape(n, -1, h, w)
        x = F.adaptive_avg_pool2d(F.max_pool2d(x, 2), 2)
        return self.fc2(torch.tanh(self.fc1(x.flatten(1))))


# ---- what becomes of one kind of model -------------------------------------------------------------------------------


def test_channels_that_are_zero_are_taken_first_and_change_nothing():
    """The issue's own condition, on a network with additions, depthwise layers and batch norms."""
    model = settle(nn.Sequential(networks.InvertedResidual(8, 8, 1, 4), nn.Flatten(), nn.Linear(8 * 16, 5)),
                   torch.randn(4, 8, 4, 4).double())  # fmt: skip
    hidden = torch.randperm(32)[:16]
    with torch.no_grad():
        for layer in model[0].body[:5]:
            for parameter in layer.parameters():
                parameter[hidden] = 0
    x = torch.randn(2, 8, 4, 4).double()
    before = model(x)
    changes = light.prune_channels_(model, x)
    assert torch.equal(changes.removed["0.body.0"], hidden.sort().values)
    assert model[0].body[3].groups == 16
    torch.testing.assert_close(model(x), before, rtol=1e-12, atol=1e-12)


def test_mlp_whose_activation_is_not_zero_at_zero():
    for activation in (nn.Sigmoid(), nn.Softplus(), nn.Hardsigmoid()):
        model = nn.Sequential(nn.Linear(6, 16), activation, nn.Linear(16, 8), nn.Sigmoid(), nn.Linear(8, 2))
        assert check(model, torch.randn(5, 6)).removed.keys() == {"0", "2"}


def test_what_no_bias_can_take_up():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Sigmoid(), nn.Conv2d(8, 8, 3, padding=1), nn.Flatten(),
                          nn.Linear(8 * 36, 8), nn.Sigmoid(), nn.Linear(8, 2, bias=False))  # fmt: skip
    changes = check(model, images())
    assert changes.removed.keys() == {"2"}
    assert kept(changes)["0"] == "what comes to 2 is not 0 where its channel is, which its bias cannot take up"
    unpadded = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Sigmoid(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 2))
    assert check(unpadded, images()).removed.keys() == {"0", "2"}


def test_numbers_that_a_forward_has_as_constants():
    layers = {"conv": nn.Conv2d(3, 8, 3), "fc": nn.Linear(288, 4)}
    counted = check(Net(lambda m, x: m.fc(m.conv(x).view(-1, 288)), **layers), images(), smaller=False)
    assert kept(counted)["conv"] == "view has their number 288 as a constant"
    check(Net(lambda m, x: m.fc(m.conv(x).view(x.size(0), -1)), **layers), images())
    check(Net(lambda m, x: m.fc(m.conv(x).reshape(x.shape[0], -1)), **layers), images())
    sliced = check(Net(lambda m, x: m.fc(m.conv(x)[:, :4].flatten(1)), conv=nn.Conv2d(3, 8, 3), fc=nn.Linear(144, 4)),
                   images(), smaller=False)  # fmt: skip
    assert kept(sliced)["conv"] == "getitem does not treat channels one by one, as far as is known"
    scaled = Net(lambda m, x: m.fc(m.conv(x).flatten(2).sum(2) / m.conv(x).size(1)), conv=nn.Conv2d(3, 8, 3),
                 fc=nn.Linear(8, 4))  # fmt: skip
    assert kept(check(scaled, images(), smaller=False))["conv"] == "truediv computes with their number"


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_transposed_and_other_dimensions(groups):
    model = nn.Sequential(nn.Conv1d(2, 8, 3), nn.BatchNorm1d(8), nn.GELU(), nn.ConvTranspose1d(8, 8, 3, groups=groups),
                          nn.LeakyReLU(), nn.Conv1d(8, 3, 1))  # fmt: skip
    check(model, torch.randn(4, 2, 9))
    model = nn.Sequential(nn.ConvTranspose3d(2, 6, 2), nn.ReLU(), nn.MaxPool3d(2), nn.Conv3d(6, 4, 1), nn.Flatten(1),
                          nn.LazyLinear(3))  # fmt: skip
    check(model, torch.randn(2, 2, 3, 3, 3))


def test_parts_of_channels():
    def shuffle_unit(m, x):
        kept, changed = m.stem(x).chunk(2, dim=1)
        x = torch.cat([kept, m.unit(changed)], 1)
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return m.head(F.glu(x, 1) * torch.sigmoid(m.where(x)))

    layers = {"stem": nn.Conv2d(3, 16, 3), "unit": nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1)),
              "where": nn.Conv2d(16, 1, 1), "head": nn.Conv2d(8, 4, 1)}  # fmt: skip
    changes = check(Net(shuffle_unit, **layers), images())
    assert changes.removed.keys() == {"stem", "unit.0", "unit.2"}
    assert len(changes.removed["stem"]) == 8

    def halves(m, x):
        one, other = m.stem(x).chunk(2, dim=1)
        return m.head(torch.cat([one.relu(), other.tanh()], 1))

    halved = Net(halves, stem=nn.Conv2d(3, 16, 3), head=nn.Conv2d(16, 4, 1))
    halved.stem.weight.data[:8] /= 10
    assert check(halved, images()).removed["stem"].lt(8).sum() == 4

    def cut_by_number(m, x):
        one, other = m.stem(x).split(8, dim=1)
        return m.head(torch.stack([one, other]).sum(0))

    layers = {"stem": nn.Conv2d(3, 16, 3), "head": nn.Conv2d(8, 4, 1)}
    assert kept(check(Net(cut_by_number, **layers), images(), smaller=False))["stem"].startswith("split does not")
    finer = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 1), nn.PixelShuffle(2), nn.Conv2d(4, 2, 1))
    assert check(finer, images()).removed.keys() == {"0"}


class Attention(nn.Module):
    """A block of a transformer whose queries, keys and values are layers."""

    def __init__(self):
        super().__init__()
        self.norm, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))
        self.up, self.gate, self.down = nn.Linear(8, 32), nn.Linear(8, 32), nn.Linear(32, 8)
        self.place = nn.Parameter(torch.randn(1, 5, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.place
        y = self.norm(x)
        n, t, _ = y.shape
        q, k, v = (one(y).view(n, t, 2, -1).transpose(1, 2) for one in (self.q, self.k, self.v))
        weights = (q @ k.transpose(2, 3) / 2).softmax(-1)
        x = x + self.out((weights @ v).transpose(1, 2).flatten(2))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


def test_transformers():
    model = nn.Sequential(nn.Linear(6, 8), Attention(), Attention(), nn.Linear(8, 3))
    changes = check(model, torch.randn(2, 5, 6))
    assert changes.removed.keys() == {f"{block}.{name}" for block in (1, 2) for name in ("up", "gate")}
    assert "matmul" in kept(changes)["1.q"]
    assert "through_layer_norms=True" in kept(changes)["0"]
    wide = light.prune_channels_(model, torch.randn(2, 5, 6).double(), through_layer_norms=True)
    assert {"0", "1.out", "1.norm", "1.place", "2.down"} <= wide.removed.keys()
    assert model(torch.randn(2, 5, 6).double()).shape == (2, 5, 3)
    assert model[1].norm.normalized_shape == (4,)
    layer = nn.TransformerEncoderLayer(8, 2, 32, activation="gelu", dropout=0, batch_first=True)
    changes = check(nn.TransformerEncoder(layer, 2), torch.randn(2, 5, 8))
    assert changes.removed.keys() == {"layers.0.linear1", "layers.1.linear1"}


def test_embeddings_and_other_inputs():
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.places = nn.Embedding(20, 8), nn.Embedding(5, 8)
            self.rnn, self.head = nn.GRU(8, 4, batch_first=True), nn.Linear(8, 2)

        def forward(self, words, places, scale=2.0):
            x = self.words(words) + self.places(places)
            return self.head(x.mean(1)) * scale

    words, places = torch.randint(20, (3, 5)), torch.arange(5)
    assert check(Words(), words, places).removed.keys() == {"words", "places"}
    model = Words()
    light.prune_channels_(model, {"words": words, "places": places, "scale": 3.0})
    assert model(words, places=places).shape == (3, 2)
    with pytest.raises(TypeError, match="prune_channels_: inputs do not fit the model's forward: missing a required"):
        light.prune_channels_(model, words)
    recurrent = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.GRU(8, 8))
    assert kept(light.prune_channels_(recurrent, torch.randn(3, 4)))["0"].startswith("2 does not treat channels")


def test_forwards_that_ask_for_training_or_cannot_be_followed():
    def auxiliary(m, x):
        y = m.conv(x).relu()
        return m.fc(y.mean((2, 3))) + (m.other(y).mean((2, 3)) if m.training else 0)

    layers = {"conv": nn.Conv2d(3, 8, 3), "other": nn.Conv2d(8, 4, 1), "fc": nn.Linear(8, 4)}
    changes = check(Net(auxiliary, **layers), images())
    assert {"other", "fc"} <= {row.name for row in changes.changed}

    def decides(m, x):
        return m.body2(x) if x.sum() > 1e9 else m.body1(x)

    block = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))
    changes = check(Net(decides, body1=block, body2=copy.deepcopy(block)), images())
    assert changes.removed.keys() == {"body1.0"}
    assert [row[0::2] for row in changes.untraced] == [("", "its forward decides by an input")]
    assert kept(changes)["body1.2"] == "body1's output"
    inside = nn.Sequential(nn.Conv2d(3, 6, 1), Net(decides, body1=nn.Sequential(nn.Conv2d(6, 8, 3), nn.Conv2d(8, 4, 1)),
                                                   body2=nn.Conv2d(6, 4, 3)))  # fmt: skip
    changes = check(inside, images())
    assert changes.removed.keys() == {"1.body1.0"}
    assert kept(changes)["0"] == "1 does not treat channels one by one, as far as is known"


class Checked(nn.Module):
    """A forward that looks at its input, and calls all of its layers, one of them in training mode alone."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.norm = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.deep, self.up = nn.Conv2d(8, 8, 3, groups=8), nn.Linear(64, 12)
        self.scale = nn.Parameter(torch.ones(8, 1, 1))
        self.head, self.other = nn.Linear(12, 2), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] != 3 or x.abs().max() > 1e6:
            raise ValueError(x.shape)
        y = self.norm(self.a(x) + self.b(x)).clamp_min(0)
        y = F.max_pool2d(torch.cat([self.deep(y), self.scale * y[..., 1:-1, 1:-1].tanh()], dim=1), 2, ceil_mode=True)
        y = self.up(y.flatten(1)[:, :].contiguous())
        y = 1 - torch.sigmoid(y)
        return self.head(y) + (self.other(y) if self.training else 0)


def test_one_call_of_a_forward_that_cannot_be_traced():
    torch.manual_seed(0)
    changes = check(Checked(), images())
    assert changes.removed.keys() == {"a", "b", "norm", "deep", "scale", "up"}
    assert {"head", "other"} <= {row.name for row in changes.changed}
    assert [row[0::2] for row in changes.untraced] == [
        ("", "its forward decides by an input; one call of it was followed")
    ]
    inside = nn.Sequential(nn.Conv2d(3, 3, 1), Checked())
    inside[1].up = nn.Linear(64, 12)
    assert len(check(inside, images()).removed) == 6
    assert light.prune_channels_(inside, images().double(), through_layer_norms=True).removed.keys() == set()


def test_one_call_that_does_not_tell_all():
    class Holder:
        def __init__(self, tensor):
            self.tensor = tensor

    def by_their_number(m, x):
        assert x.sum() < 1e9
        y = m.stem(x)
        return m.head(y / int(y.shape[1]))

    def assigns(m, x):
        y = m.stem(x)
        y[:, 0] = 1
        return m.head(y)

    def views(m, x):
        assert x.sum() < 1e9
        y = m.stem(x)
        return m.head(y.view(len(y), 2, y.shape[1] // 2).transpose(1, 2).reshape(len(y), y.shape[1]))

    def holds(m, x):
        return Holder(m.head(m.stem(x))) if x.sum() < 1e9 else None

    x = torch.randn(3, 4)
    for forward, why in ((assigns, "__setitem__ does not treat"), (views, "view has their number"), (holds, "")):
        model = Net(forward, stem=nn.Linear(4, 8), head=nn.Linear(8, 2))
        changes = light.prune_channels_(model, x)
        assert not changes.removed
        assert kept(changes)["stem"].startswith(why) if why else changes.untraced
    model = Net(by_their_number, stem=nn.Linear(4, 8), head=nn.Linear(8, 2))
    with pytest.raises(RuntimeError, match="its output is another one than with the removed channels at 0"):
        light.prune_channels_(model, x)
    assert model.stem.out_features == 8


def test_layers_that_stay():
    hooked, shared = nn.Linear(6, 8), nn.Linear(8, 8)
    hooked.register_forward_hook(lambda *_: None)
    tied = nn.Linear(8, 8)
    tied.weight = shared.weight
    model = nn.Sequential(hooked, nn.ReLU(), shared, nn.ReLU(), tied, nn.ReLU(),
                          parametrizations.weight_norm(nn.Linear(8, 8)), nn.Linear(8, 8), nn.Linear(8, 2))  # fmt: skip
    changes = light.prune_channels_(model, torch.randn(2, 6))
    assert changes.removed.keys() == {"7"}
    assert kept(changes).keys() == {"8"}  # the others are none that could be cut
    same = nn.Linear(6, 6)
    twice = nn.Sequential(nn.Linear(3, 6), same, nn.ReLU(), same, nn.Linear(6, 2))
    assert check(twice, torch.randn(4, 3)).removed.keys() == {"0", "1"}
    filtered = check(fastops.demo.ConvNet(), images(1, 1, 28), filter_fn=lambda module, name: name != "conv1")
    assert kept(filtered)["conv1"] == "filter_fn said no"


class Named(nn.Linear):
    """With the forward of its base."""


class Normed(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(super().forward(x))


class Standardized(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias)


class Watched(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias) * self.weight.square().mean()


def test_classes_derived_from_layers():
    layers = [Normed(3, 8, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(8), Normed(8, 8, 3, groups=8)]
    model = nn.Sequential(*layers, nn.Flatten(), Named(288, 12), nn.Softplus(), Named(12, 2))
    changes = check(model, images())
    assert changes.removed.keys() == {"0", "1", "2", "4"}
    model = nn.Sequential(nn.Conv2d(3, 8, 3), Standardized(8, 8, 3), Watched(8, 4, 3), nn.Conv2d(4, 2, 1))
    changes = check(model, images(), smaller=False)
    assert kept(changes)["0"].startswith("conv2d does not treat channels one by one")


def test_amounts_and_multiples():
    def sizes(**options):
        model = nn.Sequential(nn.Linear(4, 40), nn.ReLU(), nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 2))
        check(model, torch.randn(3, 4), smaller=options.get("amount") != 0, **options)
        light.prune_channels_(model, torch.randn(3, 4).double(), **options)
        return model[0].out_features, model[2].out_features

    assert sizes(amount=0) == (40, 30)
    assert sizes(amount=0.25) == (30, 23)
    assert sizes(amount=0.999) == (1, 1)
    assert sizes(amount=0.5, round_to=8) == (24, 16)
    assert sizes(amount={"0": 0.5}) == (20, 30)
    assert sum(sizes(amount=0.5, scope="global")) == 35
    ranks = iter([torch.arange(40), -torch.arange(30)])
    model = nn.Sequential(nn.Linear(4, 40), nn.ReLU(), nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 2))
    own = lambda name, layer: torch.ones(2) if name == "4" else next(ranks)  # noqa: E731
    changes = light.prune_channels_(model, torch.randn(3, 4), importance=own)
    assert torch.equal(changes.removed["0"], torch.arange(20))
    assert torch.equal(changes.removed["2"], torch.arange(15, 30))


@pytest.mark.parametrize("seed", range(6))
def test_a_budget_of_parameters(seed, monkeypatch):
    """What is counted before the cut is what is left after it."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    part, scope, counted = rng.choice([0.4, 0.6, 0.8]), rng.choice(["layer", "global"]), {}
    fewer = _choice._fewer
    monkeypatch.setattr(_choice, "_fewer", lambda flows, gone: counted.setdefault(int(gone.sum()), fewer(flows, gone)))
    model = Random(rng)
    changes = check(model, images(), parameters=part, scope=scope)
    assert (part - 0.25) * changes.before < changes.after <= part * changes.before
    assert changes.before - changes.after in counted.values()
    least = light.prune_channels_(model, images().double(), parameters=1e-6)
    assert least.after < changes.after
    assert model(images().double()).shape == (3, 3)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"amount": 1.0}, r"amount must be in \[0, 1\)"),
        ({"amount": {"0": 0.5, "9": 0.5}}, "amount names '9'; layers with channels to remove: 0, 2"),
        ({"importance": "l3"}, "importance must be 'l1', 'l2', 'batch_norm' or a function, got 'l3'"),
        ({"importance": lambda name, layer: torch.ones(3)}, r"of shape \(8,\) for 0, got \(3,\)"),
        ({"scope": "all"}, "scope must be"),
        ({"parameters": 0}, "parameters must be more than 0 and at most 1, got 0"),
        ({"round_to": 0}, "round_to must be a positive int, got 0"),
    ],
)
def test_arguments(options, text):
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 2))
    before = pickle.dumps(model.state_dict())
    with pytest.raises(ValueError, match=text):
        light.prune_channels_(model, torch.randn(3, 4), **options)
    assert pickle.dumps(model.state_dict()) == before


def test_amounts_of_layers_that_hang_together():
    model = Net(lambda m, x: m.c(m.a(x) + m.b(x)), a=nn.Linear(4, 8), b=nn.Linear(4, 8), c=nn.Linear(8, 2))
    with pytest.raises(ValueError, match=r"must have one amount: \{'a': 0.5, 'b': 0.25\}"):
        light.prune_channels_(model, torch.randn(3, 4), amount={"a": 0.5, "b": 0.25})
    light.prune_channels_(model, torch.randn(3, 4), amount={"b": 0.25})
    assert model.a.out_features == model.b.out_features == 6


def test_a_forward_that_relies_on_a_number_in_secret():
    def counts(m, x):
        assert m.block[0].out_features == 8 or x.sum() > 1e9
        return m.block(x)

    model = Net(counts, block=nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"relies on numbers of channels \(filter_fn can leave"):
        light.prune_channels_(model, torch.randn(3, 4))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.block[0].out_features == 8


# ---- the smaller model -----------------------------------------------------------------------------------------------


def small() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
                         nn.Linear(16 * 16, 32), nn.ReLU(), nn.Linear(32, 4))  # fmt: skip


def test_it_is_plain_and_trains_on():
    model, x, targets = small(), torch.randn(64, 1, 8, 8), torch.randint(4, (64,))
    modules = dict(model.named_modules())
    light.prune_channels_(model, x[:1], round_to=4)
    assert all(modules[name] is module for name, module in model.named_modules())
    assert all(type(module).__module__.startswith("torch.nn.") for module in model.modules())
    assert all(parameter.is_leaf and parameter.requires_grad for parameter in model.parameters())
    assert model.training
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    model.eval()
    fresh = small().eval()
    light.prune_channels_(fresh, x[:1], round_to=4)
    fresh.load_state_dict(model.state_dict())
    copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model)), fastops.fuse(model), fastops.freeze(model)
    for other in (fresh, *copies):
        torch.testing.assert_close(other(x), model(x), rtol=1e-4, atol=1e-4)


def test_beside_the_rest_of_fastops():
    x = torch.randn(4, 1, 8, 8)
    model = small()
    fastops.replace_(model)
    changes = light.prune_channels_(model, x)
    assert model[0].out_channels == 8
    assert type(model[5]) is fnn.Linear
    assert changes.removed.keys() == {"0", "1", "5"}
    model = nn.Sequential(fnn.Linear(6, 16, activation="sigmoid"), fnn.Linear(16, 2))
    assert check(model, torch.randn(3, 6)).removed.keys() == {"0"}
    quantized = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 256), nn.Linear(256, 8), nn.Linear(8, 8))
    light.quantize_(quantized, filter_fn=lambda module, name: name == "2")
    changes = light.prune_channels_(quantized, torch.randn(3, 8))
    assert changes.removed.keys() == {"3"}
    assert kept(changes)["0"] == "2 does not treat channels one by one, as far as is known"
    for made in (fastops.fuse(small()), fastops.freeze(small().eval())):
        with pytest.raises(TypeError, match="was made by fuse or freeze: prune what it is made from"):
            light.prune_channels_(made, x)


def test_masks_of_pytorch_are_taken_over():
    model = small()
    prune.ln_structured(model[5], "weight", amount=0.5, n=2, dim=0)
    gone = (model[5].weight_mask[:, 0] == 0).nonzero().flatten()
    prune.custom_from_mask(model[5], "bias", model[5].weight_mask[:, 0])
    model.eval()
    x = torch.randn(4, 1, 8, 8)
    before = model(x)
    changes = light.prune_channels_(model, x, amount={"5": 0.5})
    assert torch.equal(changes.removed["5"], gone)
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)
    assert [*model[5].state_dict()] == ["weight", "bias"]


def test_states_of_the_process_and_layouts():
    model = small().to(memory_format=torch.channels_last)
    x, state = torch.randn(1, 1, 8, 8).expand(3, 1, 8, 8), torch.get_rng_state()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        light.prune_channels_(model, x)
    assert torch.equal(torch.get_rng_state(), state)
    assert int(model[1].num_batches_tracked) == 0
    model(torch.randn(2, 1, 8, 8)).sum().backward()
    assert model[0].weight.grad is not None
    unbatched = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(0), nn.Linear(8 * 36, 2))
    assert light.prune_channels_(unbatched, torch.randn(1, 8, 8)).removed.keys() == {"0"}
    frozen = small().requires_grad_(False)
    light.prune_channels_(frozen, torch.randn(1, 1, 8, 8))
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    alone = nn.Linear(4, 4)
    assert kept(light.prune_channels_(alone, torch.randn(2, 4))) == {}


@pytest.mark.parametrize("name", ["prune_channels_", "take_masks_", "Changes"])
def test_docstrings(name):
    assert docs.failed_examples(getattr(light, name), name) == ""
    assert name == "Changes" or docs.missing_parts(getattr(light, name)) == []
