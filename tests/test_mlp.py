"""FF.mlp on the CPU: one call for all layers, and what only a chain can get wrong. The GPU's: test_cuda_mlp.py."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from calls import Call, sizes
from compare import exact
from torch import nn

import fastops
import fastops.functional as FF


def network(m, widths, dtype=torch.float32):
    weights = [torch.randn(n, k, dtype=dtype) / k**0.5 for k, n in pairwise(widths)]
    return torch.randn(m, widths[0], dtype=dtype), weights, [torch.randn(n, dtype=dtype) for n in widths[1:]]


def layers(x, weights, biases, hidden, output):
    """The same in PyTorch's ops."""
    for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        f = hidden if layer < len(weights) - 1 else output
        x = f(F.linear(x, weight, bias))
    return x


def values_and_gradients(function, operands, needs=lambda i: True):
    leaves = [t.detach().clone().requires_grad_(needs(i)) if t is not None else None for i, t in enumerate(operands)]
    y = function(leaves)
    y.backward(torch.linspace(-1, 2, y.numel(), dtype=torch.float64).reshape(y.shape).to(y.dtype))
    return [y.detach(), *(t.grad if t is not None else None for t in leaves)]


WIDTHS = [(10, 5, 5, 1), (1, 1), (3, 128, 2), (17, 8, 33, 7, 1), (784, 128, 10), (5, 200, 17, 3), (64, 64)]
FUNCTIONS = {"relu": F.relu, "gelu": F.gelu, "tanh": torch.tanh, "silu": F.silu, None: lambda z: z}


@pytest.mark.parametrize("widths", WIDTHS, ids=lambda widths: "-".join(map(str, widths)))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kinds", [("relu", None), ("gelu", "tanh"), ("tanh", "gelu"), (None, "silu")], ids=str)
def test_values_and_gradients(isa, widths, dtype, kinds):
    hidden, output = kinds
    count, functions = len(widths) - 1, (FUNCTIONS[hidden], FUNCTIONS[output])
    ours = lambda t: FF.mlp(t[0], t[1 : 1 + count], t[1 + count :], hidden, output)  # noqa: E731
    chain = lambda t: layers(t[0], t[1 : 1 + count], t[1 + count :], *functions)  # noqa: E731
    for m in (1, 31, 32, 33, 100, 700):
        x, weights, biases = network(m, widths, dtype)
        biases[0] = None
        operands = [x, *weights, *biases]
        results = values_and_gradients(ours, operands)
        references = values_and_gradients(chain, [None if t is None else t.double() for t in operands])
        for index, (found, expected) in enumerate(zip(results, references, strict=True)):
            if expected is None:
                assert found is None
                continue
            # A sum of up to m or 784 products of numbers around 1, through a few layers.
            bound = 32 * (m + 8) ** 0.5 * torch.finfo(dtype).eps * max(1, expected.abs().max().item())
            assert (found.double() - expected).abs().max().item() <= bound, (m, index)


@pytest.mark.parametrize("wanted", range(7))
def test_only_the_gradients_that_are_wanted(wanted):
    for widths in ((5, 6, 7, 2), (5, 200, 7, 2)):
        x, weights, biases = network(40, widths)
        operands = [x, *weights, *biases]
        function = lambda t: FF.mlp(t[0], t[1:4], t[4:], "gelu")  # noqa: E731
        every = values_and_gradients(function, operands)
        one = values_and_gradients(function, operands, lambda i: i == wanted)
        assert [i for i, gradient in enumerate(one[1:]) if gradient is not None] == [wanted]
        exact(one[1 + wanted], every[1 + wanted])


def test_bits_for_1_and_2_threads():
    x, weights, biases = network(5000, (20, 33, 40, 3))
    operands = [x, *weights, *biases]
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(values_and_gradients(lambda t: FF.mlp(t[0], t[1:4], t[4:], "silu", "sigmoid"), operands))
    for one, two in zip(*results, strict=True):
        exact(one, two)


def test_what_is_not_finite_stays_in_its_row():
    """The rows past the batch are in the same vectors, and add nothing to a gradient."""
    x, weights, biases = network(33, (4, 5, 2))
    biases[0][1] = float("inf")
    operands = [x, *weights, *biases]
    ours = values_and_gradients(lambda t: FF.mlp(t[0], t[1:3], t[3:], "relu"), operands)
    theirs = values_and_gradients(lambda t: layers(t[0], t[1:3], t[3:], F.relu, lambda z: z), operands)
    for found, expected in zip(ours[1:], theirs[1:], strict=True):
        assert torch.equal(found.isfinite(), expected.isfinite())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_wide_and_16_bit_networks_are_a_chain_of_linears(dtype):
    """As one op: one node, and nothing of Python between the layers."""
    x, weights, biases = network(7, (5, 200, 17, 3), dtype)
    with fastops.record() as rows:
        y = FF.mlp(x, [w.requires_grad_() for w in weights], biases, "gelu", nn.Sigmoid())
    assert [row.op for row in rows] == ["linear"] * 3
    assert "Mlp" in y.grad_fn.name()
    hidden = FF.linear(FF.linear(x, weights[0], biases[0], "gelu"), weights[1], biases[1], "gelu")
    exact(y, FF.linear(hidden, weights[2], biases[2], "sigmoid"))


def test_in_place_after_the_call_is_noticed():
    for widths in ((5, 6, 2), (5, 200, 2)):
        x, weights, biases = network(4, widths)
        weights[1].requires_grad_()
        weights[0].requires_grad_()
        y = FF.mlp(x, weights, biases)
        x.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_defaults():
    x, weights, _ = network(7, (5, 8, 3))
    close = torch.testing.assert_close
    close(FF.mlp(x, weights), FF.linear(FF.linear(x, weights[0], activation="relu"), weights[1]))
    close(FF.mlp(x, weights[:1]), FF.linear(x, weights[0]))
    exact(FF.mlp(x, tuple(weights), [None, None]), FF.mlp(x, weights))


@pytest.mark.parametrize("leading", [(), (0,), (2, 3)], ids=str)
def test_leading_dimensions(leading):
    _, weights, biases = network(1, (5, 8, 3))
    assert FF.mlp(torch.randn(*leading, 5), weights, biases).shape == (*leading, 3)


def test_gradients():
    x, weights, biases = network(4, (3, 5, 2), torch.float64)
    leaves = [t.requires_grad_() for t in (x, *weights, *biases)]
    function = lambda x, *t: FF.mlp(x, t[:2], t[2:], "tanh")  # noqa: E731
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


def test_transforms():
    x, weights, biases = network(4, (3, 5, 2))
    y = FF.mlp(x, weights, biases)
    function = lambda x, *t: FF.mlp(x, t[:2], t[2:])  # noqa: E731
    torch.testing.assert_close(torch.vmap(lambda row: FF.mlp(row, weights, biases))(x), y)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, *weights, *biases), y)
    _, tangent = torch.func.jvp(lambda x: FF.mlp(x, weights, biases), (x,), (torch.ones_like(x),))
    assert tangent.shape == y.shape
    found = torch.func.grad(lambda x: FF.mlp(x, weights, biases).sum())(x)
    leaf = x.clone().requires_grad_()
    FF.mlp(leaf, weights, biases).sum().backward()
    torch.testing.assert_close(found, leaf.grad)


def test_autocast():
    x, weights, biases = network(4, (3, 5, 2))
    with torch.autocast("cpu", torch.bfloat16):
        assert FF.mlp(x, weights, biases).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (lambda x, w, b: (x, []), ValueError, "weights must have at least one layer, got none"),
        (lambda x, w, b: (x, w, b[:1]), ValueError, "biases must have one entry for each of 2 weights, got 1"),
        (lambda x, w, b: (x, w[0]), TypeError, "weights must be a list or tuple of Tensors, got a float32 tensor"),
        (lambda x, w, b: (x, w, b[0]), TypeError, "biases must be a list or tuple of Tensors, got a float32 tensor"),
        (lambda x, w, b: (x, [w[0], w[0]]), RuntimeError, r"mlp: weights\[1\] or biases\[1\]: linear: weight must"),
        (lambda x, w, b: (x, w, [b[1], None]), RuntimeError, r"mlp: weights\[0\] or biases\[0\]: linear: bias must"),
        (lambda x, w, b: (x, [w[0], w[1].double()]), RuntimeError, r"weights\[1\] or .* must have input's dtype"),
        (lambda x, w, b: (x, [w[0], None]), TypeError, "weight must be a Tensor, got None"),
        (lambda x, w, b: (x, w, b, "swish"), ValueError, "activation must be one of"),
        (lambda x, w, b: (x, w, b, "relu", nn.PReLU()), ValueError, "activation must be an elementwise activation"),
    ],
)  # fmt: skip
def test_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        FF.mlp(*arguments(*network(4, (3, 5, 2))))


# ---- for the tests that call every op (every_op.py) -----------------------------------------------------------------


def chain(x, *weights):
    return FF.mlp(x, weights)


def chain_of_pytorch(x, v, w):
    return F.linear(F.relu(F.linear(x, v)), w)


def calls(size):
    yield Call("mlp", chain, chain_of_pytorch, [(9, 12), (10, 12), (4, 10)])


def kernels(dtype, on_gpu):
    if not on_gpu:
        return {"mlp_panels": 0} if dtype in (torch.float32, torch.float64) else {}
    return {"mlp_mma": 1} if dtype == torch.bfloat16 else {"mlp_simt": 1}


def random_mlp(rng):
    k, n, m = sizes(rng, 3, 1, 20)
    return Call("mlp", chain, chain_of_pytorch, [(rng.randint(1, 6), k), (n, k), (m, n)])


RANDOM_CALLS = [random_mlp]
