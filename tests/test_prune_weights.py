"""fastops.light.Pruner, prune_weights_ and sparsity_mask, against PyTorch's masks and formulas written out."""

import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune

import docs
import fastops
from fastops import light


def zeros(tensor: torch.Tensor) -> float:
    return 1 - int(tensor.count_nonzero()) / tensor.numel()


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 3))


# ---- masks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("amount", [0.0, 0.3, 0.5, 0.97, 1.0])
def test_unstructured_as_pytorch(amount):
    for layer in (nn.Linear(13, 7), nn.Conv2d(5, 6, 3), nn.Conv1d(4, 4, 3, groups=2)):
        mask = light.sparsity_mask(layer.weight.abs(), amount)
        prune.l1_unstructured(layer, "weight", amount=int(amount * layer.weight.numel()))
        assert torch.equal(mask, layer.weight_mask.bool())


def test_global_as_pytorch():
    model, other = mlp(), mlp()
    other.load_state_dict(model.state_dict())
    light.prune_weights_(model, 0.6, scope="global")
    parameters = [(other[i], "weight") for i in (0, 2, 4)]
    prune.global_unstructured(
        parameters, prune.L1Unstructured, amount=int(0.6 * sum(m.weight.numel() for m, _ in parameters))
    )
    assert all(torch.equal(model[i].weight, other[i].weight) for i in (0, 2, 4))


@pytest.mark.parametrize("shape", [(8, 16), (7, 13), (3, 1), (6, 8, 1, 1), (5, 9, 3, 3), (4, 6, 2)])
@pytest.mark.parametrize("block", [(1, 4), (4, 4), (16, 1), (2, 3)])
def test_blocks(block, shape):
    """Block by block, in the matrix of outputs by inputs at each tap."""
    torch.manual_seed(0)
    scores = torch.rand(shape)
    mask = light.sparsity_mask(scores, 0.5, block)
    matrix, kept = (one.movedim(1, -1).reshape(shape[0], -1) if one.dim() > 2 else one for one in (scores, mask))
    means, stay = [], []
    for i in range(0, matrix.shape[0], block[0]):
        for j in range(0, matrix.shape[1], block[1]):
            part = slice(i, i + block[0]), slice(j, j + block[1])
            assert kept[part].all() or not kept[part].any()
            means.append(matrix[part].mean())
            stay.append(kept[part].any())
    means, stay = torch.stack(means), torch.stack(stay)
    assert (~stay).sum() == len(stay) // 2
    assert not stay.any() or stay.all() or means[stay].min() >= means[~stay].max()


@pytest.mark.parametrize("shape", [(8, 16), (3, 7), (4, 8, 3, 3)])
def test_two_of_four(shape):
    torch.manual_seed(0)
    scores = torch.rand(shape)
    mask = light.sparsity_mask(scores, 0.5, "2:4")
    for row in mask.movedim(1, -1).reshape(-1, shape[1]):
        assert all(int(part.sum()) == min(2, len(part)) for part in row.split(4))
    best = torch.zeros(8, 4).scatter(1, torch.arange(2).repeat(8, 1), 1).bool()
    ordered = torch.arange(32, 0, -1.0).view(8, 4)
    assert torch.equal(light.sparsity_mask(ordered, 0.5, "2:4"), best)
    half_way = light.sparsity_mask(ordered, 0.25, "2:4")
    assert int((~half_way).sum()) == 8
    assert half_way[best].all()
    assert zeros(light.sparsity_mask(torch.rand(6, 12), 0.75, "1:4")) == 0.75


def test_edges():
    assert light.sparsity_mask(torch.ones(0, 4), 0.5).shape == (0, 4)
    assert light.sparsity_mask(torch.ones(()), 0.5).all()
    assert int(light.sparsity_mask(torch.ones(10, dtype=torch.int32), 0.3).sum()) == 7
    broken = torch.tensor([[1.0, torch.nan, torch.inf, 0.0]])
    assert light.sparsity_mask(broken, 0.5).tolist() == [[False, True, True, False]]
    view = torch.rand(8, 8).t()[::2]
    assert torch.equal(light.sparsity_mask(view, 0.5, (2, 2)), light.sparsity_mask(view.clone(), 0.5, (2, 2)))
    assert zeros(light.sparsity_mask(torch.rand(64).bfloat16(), 0.25)) == 0.25


# ---- the schedule ----------------------------------------------------------------------------------------------------


def train(model, pruner, steps, optimizer=None):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 20, generator=generator)
    targets = (x[:, :3] @ torch.randn(3, 3, generator=generator)).argmax(1)
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    found = []
    for _ in range(steps):
        loss = F.cross_entropy(model(x), targets)
        loss.backward()
        optimizer.step()
        pruner.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("method", ["magnitude", "movement"])
def test_sparsity_rises_as_the_formula_says(method):
    torch.manual_seed(0)
    model = mlp()
    pruner = light.Pruner(model, 0.8, method, begin=2, end=12, initial=0.1, every=2)
    seen = []
    for _ in range(16):
        train(model, pruner, 1)
        seen.append(zeros(model[0].weight))
    for step, now in enumerate(seen, 1):
        last = min(step, 12)
        last -= (last - 2) % 2 if last < 12 else 0
        wanted = 0.0 if step < 2 else 0.8 + (0.1 - 0.8) * (1 - (last - 2) / 10) ** 3
        assert now == pytest.approx(int(wanted * 640 + 1e-6) / 640)
    assert pruner.sparsity == pytest.approx(0.8, abs=0.01)
    assert pruner.steps == 16


def test_pruned_weights_stay_zero_and_the_others_train():
    torch.manual_seed(0)
    model = mlp()
    pruner = light.Pruner(model, 0.5, end=5)
    train(model, pruner, 5)
    masks = {name: mask.clone() for name, mask in pruner.masks.items()}
    losses = train(model, pruner, 60, torch.optim.Adam(model.parameters(), 0.01))
    assert all(torch.equal(mask, masks[name]) for name, mask in pruner.masks.items())
    assert all(zeros(model[i].weight) >= 0.5 for i in (0, 2, 4))
    assert losses[-1] < 0.5 * losses[0]
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in mlp().named_parameters()]


def test_movement_is_the_published_rule():
    """Scores are trained by the gradient that a straight-through mask gives them (Sanh et al.)."""
    torch.manual_seed(0)
    model, rate, x = nn.Linear(6, 5, bias=False).double(), 0.05, torch.randn(12, 6).double()
    weight = model.weight.detach().clone().requires_grad_()
    scores, mask = torch.zeros(5, 6).double().requires_grad_(), torch.ones(5, 6).double()
    targets = torch.randn(12, 5).double()
    pruner = light.Pruner(model, 0.6, "movement", end=8)
    optimizer = torch.optim.SGD(model.parameters(), rate)
    for step in range(1, 12):
        (model(x) - targets).square().mean().backward()
        optimizer.step()
        pruner.step()
        optimizer.zero_grad()

        straight = mask + scores - scores.detach()
        (F.linear(x, weight * straight) - targets).square().mean().backward()
        with torch.no_grad():
            weight -= rate * weight.grad
            scores -= scores.grad
            if step <= 8:
                gone = int(light.cubic_sparsity(step, 0, 8, 0.6) * 30 + 1e-6)
                mask = torch.ones(30).double()
                mask[scores.flatten().float().topk(gone, largest=False).indices] = 0
                mask = mask.view(5, 6)
        weight.grad = scores.grad = None
        torch.testing.assert_close(model.weight.detach(), (weight * mask).detach(), rtol=1e-12, atol=1e-12)


def test_movement_needs_gradients():
    model = mlp()
    pruner = light.Pruner(model, 0.5, "movement", end=4)
    with pytest.raises(RuntimeError, match=r"call step after optimizer\.step and before zero_grad"):
        pruner.step()


def test_it_goes_on_from_a_checkpoint():
    def run(parts):
        torch.manual_seed(0)
        model = mlp()
        pruner = light.Pruner(model, 0.8, "movement", end=10)
        for part in parts:
            train(model, pruner, part, torch.optim.SGD(model.parameters(), lr=0.1))
            saved = pickle.loads(pickle.dumps((model.state_dict(), pruner.state_dict())))
            model = mlp()
            model.load_state_dict(saved[0])
            pruner = light.Pruner(model, 0.8, "movement", end=10)
            pruner.load_state_dict(saved[1])
        return model

    one, other = run([12]), run([4, 8])
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    with pytest.raises(ValueError, match=r"must have a mask \(32, 20\) for 0.weight, got none"):
        light.Pruner(mlp(), 0.5).load_state_dict({**light.Pruner(mlp(), 0.5).state_dict(), "masks": {}})


# ---- what it meets ---------------------------------------------------------------------------------------------------


def test_masks_of_pytorch_are_taken_over():
    def model():
        torch.manual_seed(0)
        result = mlp()
        prune.random_unstructured(result[0], "weight", amount=0.3)
        prune.random_unstructured(result[0], "bias", amount=0.5)
        prune.l1_unstructured(result[2], "weight", amount=0.9)
        return result

    masks = model()[0].weight_mask.bool(), model()[2].weight_mask.bool()
    taken = light.take_masks_(model())
    assert [row[0::2] for row in taken.changed] == [
        ("0.weight", "30.0% zeros"), ("0.bias", "50.0% zeros"), ("2.weight", "90.0% zeros")]  # fmt: skip
    for method in light.weights._METHODS:
        pruned, x = model(), torch.randn(2, 20)
        before = pruned(x)
        pruner = light.Pruner(pruned, 0.5, method, end=3)
        assert [name for name, _ in pruned.named_buffers()] == []
        assert not pruned[0]._forward_pre_hooks
        torch.testing.assert_close(pruned(x), before)
        train(pruned, pruner, 5)
        assert zeros(pruned[0].weight) >= 0.5
        assert not pruned[0].weight[~masks[0]].any()
        assert not pruned[2].weight[~masks[1]].any()


def test_which_layers():
    shared = nn.Linear(8, 8)
    layers = {"a": shared, "b": shared, "norm": nn.LayerNorm(8), "words": nn.Embedding(4, 8)}
    computed = parametrizations.weight_norm(nn.Linear(8, 8))
    model = nn.ModuleDict({**layers, "computed": computed, "conv": nn.Conv1d(8, 8, 3)})
    pruner = light.Pruner(model, 0.5)
    assert [*pruner.masks] == ["a.weight", "conv.weight"]
    assert [row[0::2] for row in pruner.report().kept] == [("computed.weight", "its weight is computed at every call")]
    assert not any((one == 0).any() for one in (model["norm"].weight, model["words"].weight))
    assert [*light.Pruner(mlp(), 0.5, filter_fn=lambda module, name: name != "0").masks] == ["2.weight", "4.weight"]
    replaced = mlp()
    fastops.replace_(replaced)
    assert len(light.Pruner(replaced, 0.5).masks) == 3
    fused = fastops.fuse(mlp())
    light.prune_weights_(fused, 0.5)
    torch.testing.assert_close(fused(torch.ones(20)), nn.Sequential.forward(fused, torch.ones(20)))


def test_a_model_in_any_state():
    with torch.inference_mode():
        model = mlp().bfloat16()
        light.prune_weights_(model, 0.5, "2:4")
    assert zeros(model[2].weight) == 0.5
    model = mlp().double().requires_grad_(False)
    light.prune_weights_(model, 0.25, (4, 4), scope="global")
    assert model[0].weight.dtype is torch.float64
    assert not model[0].weight.requires_grad


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"sparsity": 1.5}, "sparsity must be from 0 to 1 for pattern"),
        ({"sparsity": 0.6, "pattern": "2:4"}, "sparsity must be from 0 to 0.5 for pattern '2:4', got 0.6"),
        ({"sparsity": 0.5, "pattern": "4:2"}, r"pattern must be a block size such as \(1, 4\), or '2:4'"),
        ({"sparsity": 0.5, "pattern": (0, 4)}, "pattern must be a block size"),
        ({"sparsity": 0.5, "method": "random"}, "method must be 'magnitude' or 'movement', got 'random'"),
        ({"sparsity": 0.5, "scope": "all"}, "scope must be 'layer' or 'global'"),
        ({"sparsity": 0.5, "begin": 5, "end": 3}, "0 <= begin <= end"),
        ({"sparsity": 0.5, "filter_fn": lambda module, name: False}, "has no linear layer or convolution"),
    ],
)
def test_arguments(options, text):
    with pytest.raises(ValueError, match=text):
        light.Pruner(mlp(), **options)


@pytest.mark.parametrize("name", ["Pruner", "prune_weights_", "sparsity_mask", "cubic_sparsity"])
def test_docstrings(name):
    symbol = getattr(light, name)
    assert docs.missing_parts(symbol) == []
    assert docs.failed_examples(symbol, name) == ""
    for one in ("step", "report", "state_dict", "load_state_dict") if name == "Pruner" else ():
        assert docs.failed_examples(getattr(symbol, one), one) == ""


def test_a_state_that_no_pruner_gave():
    with pytest.raises(ValueError, match="state_dict must be one that a Pruner gave, got one without steps, masks"):
        light.Pruner(nn.Linear(2, 2), 0.5).load_state_dict({})
