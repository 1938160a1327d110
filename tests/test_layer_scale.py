"""Factors of a linear layer's features, which fastops.fuse and fastops.freeze make part of its weight."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastops
from fastops._layer_scale import scaled

ROWS, WIDTH = (2, 5, 7), 6


class Scaled(nn.Module):
    """A block whose two linear layers are followed by what `way` does."""

    def __init__(self, way, sizes):
        super().__init__()
        self.widen, self.narrow = nn.Linear(WIDTH, 9), nn.Linear(9, WIDTH)
        self.factor = nn.Parameter(torch.rand(sizes) + 0.5)
        self.way = way

    def forward(self, x):
        return WAYS[self.way][1](self, self.narrow(F.gelu(self.widen(x))))


def called_before(m, y):
    m.factor.data.mul_(1)
    return y * m.factor


def read_twice(m, y):
    return y * m.factor + y


# The sizes of the factors, what follows the layer, and whether a frozen model has them in its weight.
WAYS = {
    "y * s": ((WIDTH,), lambda m, y: y * m.factor, True),
    "s * y": ((WIDTH,), lambda m, y: m.factor * y, True),
    "y *= s": ((WIDTH,), lambda m, y: y.mul_(m.factor), True),
    "torch.mul": ((WIDTH,), lambda m, y: torch.mul(y, m.factor), True),
    "(1, 1, 1, C)": ((1, 1, 1, WIDTH), lambda m, y: y * m.factor, False),
    "permuted": ((WIDTH, 1, 1), lambda m, y: m.factor * y.permute(0, 3, 1, 2), True),
    "permuted, a view": ((WIDTH,), lambda m, y: y.permute((0, -1, 1, 2)).mul_(m.factor.view(1, -1, 1, 1)), True),
    "torch.permute": ((WIDTH, 1), lambda m, y: torch.permute(y, (1, 0, 3, 2)) * m.factor, True),
    "of rows": ((7, 1), lambda m, y: y * m.factor, None),
    "of rows, permuted": ((7,), lambda m, y: y.permute(0, 1, 3, 2) * m.factor, None),
    "of one": ((1,), lambda m, y: y * m.factor, None),
    "of all": ((7, WIDTH), lambda m, y: y * m.factor, None),
    "a result": ((WIDTH,), lambda m, y: y * torch.sigmoid(m.factor), False),
    "changed": ((WIDTH,), called_before, False),
    "read twice": ((WIDTH,), read_twice, None),
}


def outcome(model, x):
    x = x.clone().requires_grad_()
    y = model(x)
    model.zero_grad()
    (y * torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype).view(y.shape)).sum().backward()
    return {
        "y": y.detach(),
        "x": x.grad,
        **{name.removeprefix("_orig_mod."): p.grad.clone() for name, p in model.named_parameters()},
    }


def alike(ours, theirs, tolerance):
    assert ours["y"].stride() == theirs["y"].stride()
    for name, value in theirs.items():
        scale = float(value.abs().max())
        torch.testing.assert_close(ours[name], value, rtol=0, atol=tolerance * scale, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("way", WAYS)
def test_is_what_the_model_computes(way):
    sizes, _, folds = WAYS[way]
    torch.manual_seed(1)
    model = Scaled(way, sizes)
    x = torch.randn(*ROWS, WIDTH)
    fused = fastops.fuse(model)
    is_scaled = any("layer scale" in row.result for row in fused.fastops_report.fused)
    assert is_scaled == (way not in ("read twice", "changed"))
    alike(outcome(copy.deepcopy(fused).double(), x.double()), outcome(copy.deepcopy(model).double(), x.double()), 1e-12)
    alike(outcome(fused, x), outcome(model, x), 1e-5)
    model.eval()
    frozen = fastops.freeze(model)
    assert any("factors" in str(row) for row in frozen.fastops_report.folded) == bool(folds)
    with torch.no_grad():
        alike({"y": frozen(x)}, {"y": model(x)}, 1e-5)
        with torch.autocast("cpu", torch.bfloat16):  # the product is in float32
            y, expected = frozen(x), model(x)
    assert y.dtype == expected.dtype
    alike({"y": y}, {"y": expected}, 0.05)


def test_a_changed_factor_is_noticed():
    model = Scaled("permuted", (WIDTH, 1, 1)).eval()
    x = torch.randn(*ROWS, WIDTH)
    frozen = fastops.freeze(model)
    with torch.no_grad():
        frozen(x)
        model.factor.mul_(2)
        with pytest.raises(RuntimeError, match="changed"):
            frozen(x)


def test_the_layers_output_is_not_kept():
    model = Scaled("permuted", (WIDTH, 1, 1))
    x = torch.randn(*ROWS, WIDTH)
    kept = {}
    for name, one in {"plain": model, "fused": fastops.fuse(model)}.items():
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t):
            one(x)
        kept[name] = sizes
    # The input and the layer's output have as many elements.
    assert kept["plain"].count(x.numel()) == kept["fused"].count(x.numel()) + 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_does_not_pay_is_computed_as_it_was(dtype):
    """Few rows, and 16 bits, in which the weight would be rounded once more."""
    torch.manual_seed(1)
    weight, bias, factor = (torch.randn(*sizes, dtype=dtype) for sizes in ((WIDTH, 9), (WIDTH,), (WIDTH,)))
    x = torch.randn(2 if dtype == torch.float32 else 40, 9, dtype=dtype)
    expected = fastops.functional.linear(x, weight, bias) * factor
    assert torch.equal(scaled(x, (weight,), (bias,), None, factor), expected)


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.norm = nn.Linear(4, WIDTH), nn.BatchNorm1d(WIDTH)
        self.factor = nn.Parameter(torch.rand(WIDTH))

    def forward(self, x):
        return self.norm(self.layer(x)) * self.factor


def test_after_a_folded_batch_norm():
    """Of more than two dimensions, the norm's channels are not the layer's features."""
    model = Normed().eval()
    frozen = fastops.freeze(model)
    with torch.no_grad():
        for sizes in ((3, 4), (3, WIDTH, 4)):
            x = torch.randn(sizes)
            torch.testing.assert_close(frozen(x), model(x), rtol=1e-5, atol=1e-5)


def test_layers_on_their_own_and_without_a_bias():
    x, weight, factor = (
        torch.randn(*sizes, dtype=torch.double, requires_grad=True) for sizes in ((9, 2), (3, 2), (3,))
    )
    assert torch.autograd.gradcheck(lambda *t: scaled(t[0], (t[1],), (None,), None, t[2]), (x, weight, factor))
    assert torch.autograd.gradgradcheck(lambda *t: scaled(t[0], (t[1],), (None,), None, t[2]), (x, weight, factor))
    y = scaled(x[:0], (weight,), (None,), None, factor)
    assert y.shape == (0, 3)


def test_autocast_vmap_and_compile():
    torch.manual_seed(1)
    model = Scaled("permuted", (WIDTH, 1, 1))
    fused, x = fastops.fuse(model), torch.randn(*ROWS, WIDTH)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(x)
        y = fused(x)
    assert y.dtype == expected.dtype
    torch.testing.assert_close(y, expected, rtol=0.02, atol=0.02)
    torch.testing.assert_close(torch.vmap(fused)(x.unsqueeze(1))[:, 0], model(x), rtol=1e-5, atol=1e-5)
    compiled = torch.compile(model, backend="fastops")
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)
    alike(outcome(compiled, x), outcome(model, x), 1e-5)


@pytest.mark.parametrize("width", [6, 200])
def test_a_frozen_layer_alone_under_autocast(width):
    """One that is no part of a chain, and with an activation and a residual after the factors."""
    torch.manual_seed(1)

    class Alone(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.factor = nn.Linear(4, width), nn.Parameter(torch.rand(width) + 0.5)

        def forward(self, x, residual):
            return torch.relu(self.layer(x) * self.factor), self.layer(x.flip(0)) * self.factor + residual

    model = Alone().eval()
    frozen = fastops.freeze(model)
    assert len(frozen.fastops_report.folded) == 2
    x, residual = torch.randn(3, 4), torch.randn(3, width)
    for one in (frozen, copy.deepcopy(frozen)):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            for y, expected in zip(one(x, residual), model(x, residual), strict=True):
                assert y.dtype == expected.dtype == torch.float32
                torch.testing.assert_close(y, expected, rtol=0.02, atol=0.02)
