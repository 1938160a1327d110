"""The blocks of fastops.nn: MLP, ConvMaxPool2d and so on are the Sequential that they say, in fewer calls."""

import copy
import pickle

import pytest
import torch
from compare import exact
from torch import nn
from torch.nn.utils import parametrizations

import fastops
import fastops.nn as fnn

# A block, the Sequential that it is, an input, and the ops that record() shows of a call.
BLOCKS = {
    "mlp": (
        lambda: fnn.MLP(10, [7, 7, 3], "tanh", nn.LeakyReLU(0.2)),
        lambda: nn.Sequential(
            nn.Linear(10, 7), nn.Tanh(), nn.Linear(7, 7), nn.Tanh(), nn.Linear(7, 3), nn.LeakyReLU(0.2)
        ),
        (2, 5, 10),
        ["mlp"],
    ),
    "mlp without activations and biases": (
        lambda: fnn.MLP(6, (5, 4), None, bias=False),
        lambda: nn.Sequential(nn.Linear(6, 5, bias=False), nn.Linear(5, 4, bias=False)),
        (3, 6),
        ["mlp"],
    ),
    "conv_max_pool1d": (
        lambda: fnn.ConvMaxPool1d(2, 6, 3, padding="same", activation="relu", pool_size=3),
        lambda: nn.Sequential(nn.Conv1d(2, 6, 3, padding="same"), nn.ReLU(), nn.MaxPool1d(3)),
        (2, 2, 10),
        ["conv_max_pool1d"],
    ),
    "conv_max_pool2d": (
        lambda: fnn.ConvMaxPool2d(3, 6, 3, 2, 1, 1, 3, activation=nn.GELU("tanh"), pool_size=(2, 1)),
        lambda: nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1, 1, 3), nn.GELU("tanh"), nn.MaxPool2d((2, 1))),
        (2, 3, 9, 9),
        ["conv2d", "max_pool2d"],
    ),
    "conv_max_pool3d": (
        lambda: fnn.ConvMaxPool3d(2, 3, 2, bias=False, padding_mode="circular", padding=1),
        lambda: nn.Sequential(nn.Conv3d(2, 3, 2, 1, 1, bias=False, padding_mode="circular"), nn.MaxPool3d(2)),
        (1, 2, 4, 5, 6),
        ["conv3d", "max_pool3d"],
    ),
    "conv, norm and relu": (
        lambda: fnn.Conv2dNormActivation(3, 8, 5, 2, dilation=2),
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 5, 2, 4, dilation=2, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True)
        ),
        (2, 3, 12, 12),
        ["conv2d", "batch_norm"],
    ),
    "conv and norm": (
        lambda: fnn.Conv1dNormActivation(3, 8, activation_layer=None, bias=True),
        lambda: nn.Sequential(nn.Conv1d(3, 8, 3, padding=1), nn.BatchNorm1d(8)),
        (2, 3, 9),
        ["conv1d", "batch_norm"],
    ),
    "conv and activation": (
        lambda: fnn.Conv3dNormActivation(2, 4, (1, 3, 3), norm_layer=None, activation_layer=nn.SiLU),
        lambda: nn.Sequential(nn.Conv3d(2, 4, (1, 3, 3), padding=(0, 1, 1)), nn.SiLU(inplace=True)),
        (2, 2, 3, 6, 6),
        ["conv3d"],
    ),
    "conv, another norm and prelu": (
        lambda: fnn.Conv2dNormActivation(
            2, 4, 1, norm_layer=lambda n: nn.GroupNorm(2, n), activation_layer=nn.PReLU, inplace=None
        ),
        lambda: nn.Sequential(nn.Conv2d(2, 4, 1, bias=False), nn.GroupNorm(2, 4), nn.PReLU()),
        (2, 2, 6, 6),
        ["conv2d", "prelu"],
    ),
}


@pytest.fixture(params=BLOCKS)
def case(request):
    """(the block, the Sequential with the same state, an input, the ops)"""
    make, plain, shape, ops = BLOCKS[request.param]
    torch.manual_seed(0)
    block, plain = make().double(), plain().double()
    assert [name for name, _ in block.named_modules()] == [name for name, _ in plain.named_modules()]
    plain.load_state_dict(block.state_dict())
    block.load_state_dict(plain.state_dict())
    return block, plain, torch.randn(*shape, dtype=torch.float64), ops


def results(module, x):
    x = x.clone().requires_grad_()
    y = module(x)
    grads = torch.autograd.grad(y.sin().sum(), [x, *module.parameters()])
    return [y, *grads, *(buffer.clone() for buffer in module.buffers())]


def ops_of(module, x):
    with fastops.record() as calls, torch.no_grad():
        module(x)
    return list(dict.fromkeys("mlp" if row.op in ("mlp", "linear") else row.op for row in calls))


def test_it_is_the_sequential(case):
    """Outputs, gradients and statistics in both modes, also of copies, and in one call."""
    block, plain, x, ops = case
    assert isinstance(block, nn.Sequential)
    for mode in (True, False):
        block.train(mode), plain.train(mode)
        for made in (block, copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
            twin = copy.deepcopy(plain)
            torch.testing.assert_close(results(made, x), results(twin, x), rtol=1e-10, atol=1e-12)
            assert ops_of(made, x) == ops
        plain.load_state_dict(block.state_dict())


def test_a_child_that_changes_is_noticed(case):
    block, plain, x, _ = case
    calls = []
    last = block[len(block) - 1]
    hook = last.register_forward_hook(lambda module, args, output: output * 2)
    torch.testing.assert_close(block.eval()(x), plain.eval()(x) * 2)
    hook.remove()
    block[0].register_forward_pre_hook(lambda module, args: calls.append(module))
    block(x)
    assert calls == [block[0]]
    block[0] = parametrizations.weight_norm(copy.deepcopy(plain[0]))
    torch.testing.assert_close(block(x), plain(x))
    block[0] = plain[0]
    block[len(block) - 1] = nn.Identity()
    torch.testing.assert_close(block(x), plain[:-1](x))
    block.append(nn.Softsign())
    torch.testing.assert_close(block(x), nn.functional.softsign(plain[:-1](x)))
    with nn.modules.module.register_module_forward_hook(lambda module, args, output: calls.append(module)):
        block(x)
    assert calls[-1] is block
    assert block[0] in calls[1:]


def _set(index, **options):
    return lambda block: vars(block[index]).update(options)


CHANGES = [
    *(
        ("mlp", _set(1, approximate="tanh")),
        ("mlp", _set(3, approximate="tanh")),
        ("mlp", _set(5, negative_slope=-0.5)),
    ),
    *(("pool", _set(2, **{name: value})) for name, value in (("padding", 1), ("stride", 1), ("dilation", 2))),
    *(("pool", _set(2, **{name: value})) for name, value in (("ceil_mode", True), ("kernel_size", 3))),
    ("pool", lambda block: block.__setitem__(2, fnn.MaxPool2d(3, 2, 1))),
    *((name, _set(0, padding_mode="reflect", _reversed_padding_repeated_twice=[1] * 4)) for name in ("pool", "conv")),
    *((name, _set(0, stride=(2, 1), padding=(0, 1))) for name in ("pool", "conv", "norm")),
    ("norm", _set(1, eps=2.0)),
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change[0])
def test_an_option_that_changes_is_noticed(change):
    """Also of one child among several of a class, and also by fuse and freeze."""
    torch.manual_seed(0)
    block, x = {
        "mlp": lambda: (fnn.MLP(10, [7, 7, 3], "gelu", nn.LeakyReLU(0.2)), 3 * torch.randn(5, 10)),
        "pool": lambda: (fnn.ConvMaxPool2d(3, 6, 3, padding=1, activation="relu"), torch.randn(2, 3, 9, 9)),
        "conv": lambda: (fnn.Conv2dNormActivation(3, 6, norm_layer=None), torch.randn(2, 3, 9, 9)),
        "norm": lambda: (fnn.Conv2dNormActivation(3, 6), torch.randn(2, 3, 9, 9)),
    }[change[0]]()
    block, x = block.double().eval(), x.double()
    before = block(x)
    change[1](block)
    with torch.no_grad():
        plain = copy.deepcopy(block)
        fastops.restore_(plain)
        expected = nn.Sequential.forward(plain, x)
        assert expected.shape != before.shape or not torch.allclose(expected, before)
        for made in (block, copy.deepcopy(block), fastops.fuse(block), fastops.freeze(block, channels_last=False)):
            torch.testing.assert_close(made(x), expected, rtol=1e-10, atol=1e-12)
    block._modules[str(len(block) - 1)].return_indices = True
    assert isinstance(block(x), tuple) == (change[0] == "pool")


def test_slices_and_weights_that_are_no_parameters(case):
    """A slice is a Sequential of the same children; a weight may be any tensor under its name."""
    block, plain, x, _ = case
    block.eval(), plain.eval()
    for part in (slice(0, 1), slice(None, -1), slice(1, None), slice(None)):
        assert type(block[part]) is nn.Sequential
        assert list(block[part]) == list(block)[part]
        assert list(block[part].state_dict()) == list(plain[part].state_dict())
    torch.testing.assert_close(block[:](x), plain(x), rtol=1e-10, atol=1e-12)
    assert block[-1] is list(block)[-1]
    weight = block[0].weight.detach().clone().requires_grad_()
    del block[0].weight
    block[0].weight = weight * 1
    y = block(x)
    torch.testing.assert_close(y, plain(x), rtol=1e-10, atol=1e-12)
    y.sum().backward()
    assert weight.grad is not None


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_tools(case):
    """torch.fx, torch.compile, torch.export, torch.jit, replace_ and restore_, fuse and freeze."""
    block, plain, x, _ = case
    block.eval(), plain.eval()
    expected = plain(x)
    called = [node.target for node in torch.fx.symbolic_trace(block).graph.nodes if node.op == "call_module"]
    assert called == [str(i) for i in range(len(block))]
    for form in (
        torch.fx.symbolic_trace(block),
        torch.compile(block, backend="eager", fullgraph=True),
        torch.export.export(block, (x,)).module(),
        torch.jit.script(block),
        fastops.fuse(block),
        fastops.freeze(block, channels_last=False),
        fastops.freeze(nn.Sequential(block, nn.Identity()), channels_last=False),
    ):
        torch.testing.assert_close(form(x), expected, rtol=1e-10, atol=1e-12)
    fastops.restore_(block)
    assert all(type(child).__module__.startswith("torch.nn.") for child in block)
    with fastops.record() as calls:
        exact(block(x), expected)
    assert not len(calls)
    fastops.replace_(block)
    torch.testing.assert_close(block(x), expected)


def test_what_a_block_refuses():
    with pytest.raises(ValueError, match=r"^MLP: hidden_channels must have at least one layer, got none$"):
        fnn.MLP(3, [])
    with pytest.raises(ValueError, match="activation must be one of"):
        fnn.MLP(3, [2, 1], "swish")
    with pytest.raises(ValueError, match="got PReLU"):
        fnn.ConvMaxPool2d(1, 1, 1, activation=nn.PReLU())


def test_a_parametrized_layer_is_called():
    block = fnn.MLP(4, [4, 4])
    parametrizations.spectral_norm(block[0])
    x = torch.randn(3, 4)
    torch.testing.assert_close(block.eval()(x), nn.Sequential(*block)(x))
