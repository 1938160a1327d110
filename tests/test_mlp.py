"""FF.mlp on the CPU: a chain of linears, and what only a chain can get wrong. The fused kernels: test_cuda_mlp.py."""

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_is_a_chain_of_linears(dtype):
    x, weights, biases = network(7, (5, 200, 17, 3), dtype)
    with fastops.record() as rows:
        y = FF.mlp(x, weights, biases, "gelu", nn.Sigmoid())
    assert [row.op for row in rows] == ["linear"] * 3
    hidden = FF.linear(FF.linear(x, weights[0], biases[0], "gelu"), weights[1], biases[1], "gelu")
    exact(y, FF.linear(hidden, weights[2], biases[2], "sigmoid"))


def test_defaults():
    x, weights, _ = network(7, (5, 8, 3))
    exact(FF.mlp(x, weights), FF.linear(FF.linear(x, weights[0], activation="relu"), weights[1]))
    exact(FF.mlp(x, weights[:1]), FF.linear(x, weights[0]))
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
        return {}
    return {"mlp_mma": 1} if dtype == torch.bfloat16 else {"mlp_simt": 1}


def random_mlp(rng):
    k, n, m = sizes(rng, 3, 1, 20)
    return Call("mlp", chain, chain_of_pytorch, [(rng.randint(1, 6), k), (n, k), (m, n)])


RANDOM_CALLS = [random_mlp]
