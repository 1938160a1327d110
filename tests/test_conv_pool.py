"""conv_max_pool against the ops it joins: the same values, gradients and errors, in one call of a kernel."""

import copy

import pytest
import torch
import torch.nn.functional as F
from calls import Call, sizes, spatial
from compare import exact
from reference import DTYPES, Conv, gradients, integers
from torch.func import grad, vmap

import fastops
import fastops.functional as FF

FIRST = Conv(2, 1, 32, (28, 28), (3, 3), padding=1)  # what pools in registers
CASES = [
    (FIRST, 2),
    (Conv(3, 3, 17, (9, 33), (3, 3), padding=1), 2),
    (Conv(2, 4, 5, (7, 8), (3, 3)), 2),
    (Conv(2, 2, 9, (12, 13), (5, 5), stride=2, padding=2), 2),
    (Conv(1, 32, 33, (14, 14), (3, 3), padding=1), (2, 3)),
    (Conv(2, 17, 8, (9, 10), (1, 1)), (3, 1)),
    (Conv(2, 6, 6, (11, 12), (3, 3), padding="same", dilation=2, groups=6), 2),
    (Conv(1, 2, 3, (40, 40), (3, 3)), 17),  # 289 elements a window: two kernels
    (Conv(3, 5, 9, (37,), (5,), padding=2), 4),
    (Conv(1, 3, 5, (5, 6, 7), (3, 3, 3), padding=1), (2, 2, 3)),
]
EVERY = pytest.mark.parametrize(("conv", "pool"), CASES, ids=lambda value: str(value).replace(" ", ""))
LAST = {2: torch.channels_last, 3: torch.channels_last_3d}


def ours(conv, pool, activation="relu"):
    function = getattr(FF, f"conv_max_pool{len(conv.size)}d")
    kwargs = {"stride": conv.stride, "padding": conv.padding, "dilation": conv.dilation, "groups": conv.groups}
    return lambda x, w, b: function(x, w, b, **kwargs, activation=activation, pool_size=pool)


def theirs(conv, pool, activation=F.relu):
    pooled = getattr(F, f"max_pool{len(conv.size)}d")
    return lambda x, w, b: pooled(activation(conv.theirs(x, w, b)), pool)


def two(conv, pool, activation="relu"):
    pooled = getattr(FF, f"max_pool{len(conv.size)}d")
    return lambda x, w, b: pooled(conv.ours(x, w, b, activation=activation), pool)


def operands(conv, dtype, make=lambda shape, dtype: integers(*shape, dtype=dtype, low=-2, high=3)):
    return [make(shape, dtype).requires_grad_() for shape in conv.shapes]


def leaves(tensors, dtype=None):
    return [t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors]


@EVERY
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients(isa, conv, pool, dtype):
    """Integers: every sum is exact, and equal maxima are many."""
    for activation, f in (("relu", F.relu), (None, lambda z: z)):
        for last in (False, True)[: 1 + (len(conv.size) > 1)]:
            tensors = operands(conv, dtype)
            if last:
                memory_format = LAST[len(conv.size)]
                tensors[:2] = [t.detach().contiguous(memory_format=memory_format).requires_grad_() for t in tensors[:2]]
            wide = leaves(tensors, torch.float64)
            y, z = ours(conv, pool, activation)(*tensors), theirs(conv, pool, f)(*wide)
            exact(y, z.to(dtype), "output")
            g = integers(*y.shape, dtype=dtype, low=-2, high=3)
            for name, one, other in zip("xwb", gradients(y, g, *tensors), gradients(z, g, *wide), strict=True):
                exact(one, other.to(dtype), f"gradient of {name}")
            with torch.no_grad():
                exact(ours(conv, pool, activation)(*tensors), y, "without autograd")
            assert y.stride() == two(conv, pool)(*tensors).stride()


@EVERY
def test_random_values_are_those_of_the_two_ops(isa, conv, pool):
    x, w, b = (torch.randn(shape) for shape in conv.shapes)
    torch.testing.assert_close(ours(conv, pool)(x, w, b), two(conv, pool)(x, w, b), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("conv", "pool"), [CASES[0], CASES[3], CASES[4]], ids=str)
def test_bits_for_1_and_2_threads(isa, conv, pool):
    tensors = operands(conv, torch.float32, lambda shape, dtype: torch.randn(shape, dtype=dtype))
    results = []
    for count in (1, 2, 2):
        torch.set_num_threads(count)
        y = ours(conv, pool)(*tensors)
        results.append((y, *gradients(y, torch.linspace(-1, 1, y.numel()).reshape(y.shape), *tensors)))
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert torch.equal(one, two)


@pytest.mark.parametrize("activation", ["gelu", "leaky_relu", torch.nn.Hardtanh(-0.5, 0.7)], ids=str)
def test_other_activations_are_two_kernels(activation):
    conv, pool = CASES[1]
    x, w, b = operands(conv, torch.float32, lambda shape, dtype: torch.randn(shape, dtype=dtype))
    f = activation if isinstance(activation, torch.nn.Module) else getattr(F, activation)
    with fastops.record() as rows:
        y = ours(conv, pool, activation)(x, w, b)
        y.sum().backward()
    assert [row.op for row in rows][:2] == ["conv2d", "max_pool2d"]
    torch.testing.assert_close(y, theirs(conv, pool, f)(x, w, b), rtol=1e-5, atol=1e-5)


def test_record_names_op_and_kernel(isa):
    tier = "avx512" if isa in ("avx512_bf16", "amx") else isa  # those have kernels for bfloat16 alone
    tensors = operands(FIRST, torch.float32)
    with fastops.record() as rows:
        ours(FIRST, 2)(*tensors).sum().backward()
    assert [(row.op, row.kernel) for row in rows] == [
        ("conv_max_pool2d", f"conv_pool_first_{tier}"),
        ("conv_max_pool2d_backward", f"conv_pool_blocks_{tier}"),
    ]
    tensors[0].requires_grad_(False)
    with fastops.record() as rows:
        ours(FIRST, 2)(*tensors).sum().backward()
    assert rows[1].kernel == f"conv_pool_first_{tier}"


def test_backward_keeps_a_byte_an_output():
    tensors = operands(FIRST, torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = ours(FIRST, 2)(*tensors)
    assert sorted(t.numel() * t.element_size() for t in kept) == sorted(
        [tensors[0].numel() * 4, tensors[1].numel() * 4, y.numel()]
    )


@pytest.mark.parametrize("wanted", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1)], ids=str)
def test_only_the_gradients_asked_for(wanted):
    for conv, pool in CASES[:4]:
        tensors = operands(conv, torch.float32)
        for t, on in zip(tensors, wanted, strict=True):
            t.requires_grad_(bool(on))
        wide = [t.detach().double().requires_grad_(bool(on)) for t, on in zip(tensors, wanted, strict=True)]
        ours(conv, pool)(*tensors).sum().backward()
        theirs(conv, pool)(*wide).sum().backward()
        for one, other, on in zip(tensors, wide, wanted, strict=True):
            assert (one.grad is not None) == bool(on)
            if on:
                exact(one.grad, other.grad.float())


def test_nan_and_infinity():
    conv, pool = CASES[1]
    x, w, b = operands(conv, torch.float32)
    with torch.no_grad():
        x[0, 0, 2, 3], x[1, 1, 4, 5] = float("nan"), float("inf")
    y, expected = ours(conv, pool)(x, w, b), theirs(conv, pool)(x, w, b)
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.isinf(), expected.isinf())


def test_unbatched_and_empty():
    conv, pool = CASES[1]
    x, w, b = operands(conv, torch.float32)
    exact(ours(conv, pool)(x[0], w, b), ours(conv, pool)(x, w, b)[0])
    empty = ours(conv, pool)(x[:0], w, b)
    assert empty.shape == theirs(conv, pool)(x[:0], w, b).shape
    for gradient in gradients(empty, torch.ones_like(empty), x, w, b):
        assert not gradient.any()


@pytest.mark.parametrize(
    ("conv", "pool"),
    [
        (Conv(2, 1, 3, (6, 5), (3, 3), padding=1), 2),
        (Conv(1, 2, 2, (7, 8), (2, 3), stride=(1, 2)), (3, 2)),
        (Conv(2, 2, 2, (9,), (3,)), 2),
    ],
    ids=str,
)
@pytest.mark.parametrize("activation", [None, "relu"])
def test_double_backward(conv, pool, activation):
    tensors = operands(conv, torch.float64, lambda shape, dtype: torch.randn(shape, dtype=dtype))
    function = ours(conv, pool, activation)
    assert torch.autograd.gradcheck(function, tensors, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, tensors, check_batched_grad=True)


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, 3, padding=1)

    def forward(self, x):
        return FF.conv_max_pool2d(x, self.conv.weight, self.conv.bias, 1, 1, activation="relu").flatten(1).sum(1)


def test_transforms():
    x, net = torch.randn(2, 3, 8, 9), Net()
    expected = F.max_pool2d(F.relu(net.conv(x)), 2).flatten(1).sum(1)
    torch.testing.assert_close(torch.compile(net, fullgraph=True, backend="aot_eager")(x), expected)
    torch.testing.assert_close(torch.export.export(net, (x,)).module()(x), expected)
    torch.testing.assert_close(vmap(lambda one: net(one[None])[0])(x), expected)
    reference = torch.autograd.grad(expected.sum(), net.conv.weight)[0]
    weights = dict(net.named_parameters())
    by_func = grad(lambda w: torch.func.functional_call(net, w, (x,)).sum())(weights)["conv.weight"]
    torch.testing.assert_close(by_func, reference)
    copied = copy.deepcopy(net).to("meta")
    assert copied(x.to("meta")).shape == (2,)


def test_autocast():
    x, net = torch.randn(2, 3, 8, 9), Net()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = FF.conv_max_pool2d(x, net.conv.weight, net.conv.bias, 1, 1, activation="relu")
        expected = F.max_pool2d(F.relu(net.conv(x)), 2)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)
    y.sum().backward()
    assert net.conv.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("pool", [0, 9, (2, 2, 2), 2.0, "2", None])
def test_bad_windows_are_refused_as_the_pool_refuses_them(pool):
    x, w = torch.randn(1, 2, 6, 6), torch.randn(3, 2, 3, 3)
    with pytest.raises((RuntimeError, TypeError)) as ours_error:
        FF.conv_max_pool2d(x, w, padding=1, pool_size=pool)
    with pytest.raises((RuntimeError, TypeError)) as theirs_error:
        F.max_pool2d(F.conv2d(x, w, padding=1), pool)
    assert type(ours_error.value) is type(theirs_error.value)
    assert "kernel_size" in str(ours_error.value)


def test_bad_operands_are_refused_as_the_convolution_refuses_them():
    with pytest.raises(RuntimeError, match="input must have 2 channels"):
        FF.conv_max_pool2d(torch.randn(1, 3, 6, 6), torch.randn(3, 2, 3, 3))
    with pytest.raises(ValueError, match="activation"):
        FF.conv_max_pool2d(torch.randn(1, 2, 6, 6), torch.randn(3, 2, 3, 3), activation="nonsense")


# ---- for the tests that call every op (every_op.py) -----------------------------------------------------------------


def pooled(name, shapes, **kwargs):
    """A Call with relu between convolution and pool."""
    conv, pool = getattr(F, f"conv{name[-2:]}"), getattr(F, f"max_pool{name[-2:]}")
    return Call(
        name,
        lambda *t: getattr(FF, name)(*t, activation="relu", **kwargs),
        lambda *t: pool(F.relu(conv(*t, **kwargs)), 2),
        shapes,
    )


def calls(size):
    for name in fastops.functional._conv_pool.__all__:
        images, square = (size,) * spatial(name), (3,) * spatial(name)
        yield pooled(name, [(2, 16, *images), (16, 16, *square)])
        yield pooled(name, [(2, 1, *images), (16, 1, *square)])


def kernels(dtype, on_gpu):
    if on_gpu:
        return {}
    return {"conv_pool_blocks": 0} if dtype.itemsize == 2 else {"conv_pool_blocks": 0, "conv_pool_first": 0}


def random_conv_pool(rng):
    dims = rng.randint(1, 3)
    channels, outputs = rng.choice((1, 2, 16)), rng.choice((1, 8, 33))
    shapes = [(rng.randint(1, 2), channels, *sizes(rng, dims, 4, 7)), (outputs, channels, *(3,) * dims), (outputs,)]
    return pooled(f"conv_max_pool{dims}d", shapes, padding=1)


RANDOM_CALLS = [random_conv_pool]
