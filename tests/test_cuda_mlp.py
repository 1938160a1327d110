"""The fused MLP kernels on the emulator: see gpu.py. References are float64, tolerances those of a chain of linears.

How much shared memory a block may have decides what stays on the chip: 227 KiB is sm_90's, 99 the least that there is.
"""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from compare import close, exact
from gpu import EMULATED, SCHEDULES, configured, put
from torch import nn

import fastops
import fastops.functional as FF

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Rows and widths around tiles of 64 and 128 rows, steps of 16 and 32 in k, widths of 64 and 128, vectors of 16 bytes.
SHAPES = [
    (5, (1, 1)),
    (70, (5, 17, 16)),
    (131, (16, 64, 64, 3)),
    (70, (100, 128, 1)),
    (3, (64, 5, 33, 17, 8, 2)),
]
SAVES_INPUT = ["gelu", "silu", "hardsigmoid", "elu"]  # f' follows from the pre-activation
SAVES_OUTPUT = ["relu", "leaky_relu", "sigmoid", "tanh", "relu6", "softshrink"]


def network(m, widths, dtype, bias=True):
    x = torch.randn(m, widths[0]).to(dtype)
    weights = [(torch.randn(n, k) / k**0.5).to(dtype) for k, n in pairwise(widths)]
    biases = [(torch.randn(n) / 2).to(dtype) if bias else None for n in widths[1:]]
    return x, weights, biases


def integers(m, widths, dtype):
    """Small enough for every sum and every rounded hidden output to be exact."""
    weights = [(torch.rand(n, k) < 2 / k).to(dtype) for k, n in pairwise(widths)]
    biases = [torch.randint(-1, 2, (n,)).to(dtype) for n in widths[1:]]
    return torch.randint(-1, 2, (m, widths[0])).to(dtype), weights, biases


def chain(x, weights, biases, hidden=F.relu, output=lambda z: z):
    for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        x = (output if layer == len(weights) - 1 else hidden)(F.linear(x, weight, bias))
    return x


def run(function, grad, x, weights, biases):
    """Output and the gradients of everything, on the CPU."""
    x, *weights = (t.detach().requires_grad_() for t in (x, *weights))
    biases = [None if b is None else b.detach().requires_grad_() for b in biases]
    output = function(x, weights, biases)
    leaves = [x, *weights, *(b for b in biases if b is not None)]
    found = torch.autograd.grad(output, leaves, grad.to(output.device, output.dtype))
    return [t.detach().cpu() for t in (output, *found)]


def place(network):
    x, weights, biases = network
    return put(x), [put(w) for w in weights], [None if b is None else put(b) for b in biases]


def fused(hidden="relu", output=None):
    def call(x, weights, biases):
        with fastops.record() as rows:
            y = FF.mlp(x, weights, biases, hidden, output)
        assert [row.op for row in rows] == ["mlp"], rows
        return y

    return call


def compare_all(network, grad, names=("relu", None), functions=(F.relu, lambda z: z), roundings=4.0, what=""):
    ours = run(fused(*names), grad, *place(network))
    theirs = run(lambda *t: chain(*t, *functions), grad, *network)
    x, weights, biases = network
    wide = x.double(), [w.double() for w in weights], [None if b is None else b.double() for b in biases]
    exactly = run(lambda *t: chain(*t, *functions), grad, *wide)
    terms = max(x.shape[0], *(w.shape[1] for w in weights))
    if x.dtype == torch.float32:
        roundings = max(roundings, terms**0.5)  # summed term by term
    for i, three in enumerate(zip(ours, exactly, theirs, strict=True)):
        close(*three, f"{what} tensor {i}", terms, roundings)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "widths"), SHAPES, ids=str)
def test_forward_and_backward(m, widths, dtype):
    case = network(m, widths, dtype)
    grad = torch.randn(m, widths[-1]).to(dtype)
    for i, (chip, shared) in enumerate(((1, 227), (4, 227))):
        with configured(SCHEDULES[(i + m) % len(SCHEDULES)], chip, aligned=i == 0, shared=shared):
            compare_all(case, grad, what=f"{chip} multiprocessors, {shared} KiB,")


@pytest.mark.parametrize("name", [*SAVES_INPUT, *SAVES_OUTPUT])
def test_activations(name):
    """Of the hidden layers and of the output."""
    function = getattr(F, name)
    for i, dtype in enumerate(DTYPES):
        case, grad = network(67, (9, 20, 7, 5), dtype), torch.randn(67, 5).to(dtype)
        with configured(SCHEDULES[i % len(SCHEDULES)], shared=227):
            compare_all(case, grad, (name, name), (function, function), 8.0, name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "widths"), [(200, (24, 40, 16)), (130, (7, 100, 9))], ids=str)
def test_integers_are_exact_in_every_schedule(m, widths, dtype):
    """And so is every sum: the order of threads and blocks changes no bit."""
    case, grad = integers(m, widths, dtype), torch.randint(-1, 2, (m, widths[-1])).to(dtype)
    expected = run(chain, grad, *(t.double() if torch.is_tensor(t) else [u.double() for u in t] for t in case))
    for chip, shared in ((1, 227), (4, 160) if dtype != torch.float32 else (4, 220), (64, 227)):
        for schedule in SCHEDULES[: 3 if chip == 1 else 1]:
            with configured(schedule, chip, shared=shared):
                for actual, wanted in zip(run(fused(), grad, *place(case)), expected, strict=True):
                    exact(actual, wanted.to(dtype), f"{chip} multiprocessors, {schedule}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_in_every_schedule(dtype):
    case, grad = network(150, (12, 30, 6), dtype), torch.randn(150, 6).to(dtype)
    results = []
    for schedule in SCHEDULES:
        with configured(schedule, 2, shared=99):
            results.append(run(fused("gelu"), grad, *place(case)))
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


@pytest.mark.skipif(not EMULATED, reason="a GPU has the shared memory that it has")
@pytest.mark.parametrize("shared", [38, 55, 72, 110])
def test_less_shared_memory(shared):
    """Weights that come layer by layer, and one tile at a time: on less than any GPU has, the same kernels."""
    case, grad = integers(150, (20, 40, 24, 6), torch.bfloat16), torch.randint(-1, 2, (150, 6)).bfloat16()
    expected = run(chain, grad, *(t.double() if torch.is_tensor(t) else [u.double() for u in t] for t in case))
    for schedule in SCHEDULES:
        with configured(schedule, 1, shared=shared):
            for actual, wanted in zip(run(fused(), grad, *place(case)), expected, strict=True):
                exact(actual, wanted.bfloat16(), schedule)


@pytest.mark.skipif(not EMULATED, reason="a GPU has the shared memory that it has")
def test_float32_of_both_widths_with_streamed_weights():
    for widths, shared in (((20, 40, 6), 70), ((20, 100, 6), 205)):
        case, grad = integers(140, widths, torch.float32), torch.randint(-1, 2, (140, 6)).float()
        expected = run(chain, grad, *case)
        with configured("reverse", 1, shared=shared):
            for actual, wanted in zip(run(fused(), grad, *place(case)), expected, strict=True):
                exact(actual, wanted)


def _tf32(x):
    """Rounded to 10 bits of fraction, halves away from zero."""
    return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


@pytest.mark.skipif(not EMULATED, reason="the rounding of a GPU's sums is not known")
@pytest.mark.parametrize("widths", [(20, 33, 7), (20, 100, 7)], ids=str)
def test_tf32_where_pytorch_allows_it(widths):
    """One hidden layer without activation, so that the rounded operands of every product are known."""
    x, weights, _ = network(70, widths, torch.float32, bias=False)
    grad = torch.randn(70, 7)
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        with configured(shared=227), fastops.record() as rows:
            actual = run(lambda *t: FF.mlp(*t, activation=None), grad, *place((x, weights, [None, None])))
        assert [row.kernel for row in rows] == [f"mlp_tf32_{128 if max(widths) > 64 else 64}_cuda"] * 2
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    xr, w0, w1, gr = (_tf32(t).double() for t in (x, *weights, grad))
    hidden = _tf32((xr @ w0.mT).float()).double()
    g = _tf32((gr @ w1).float()).double()
    for p, q in zip(actual, (hidden @ w1.mT, g @ w0, g.mT @ xr, gr.mT @ hidden), strict=True):
        close(p, q, q.float(), roundings=2000.0)  # a hidden output on the edge may be rounded the other way


@pytest.mark.parametrize("leading", [(), (0,), (3, 0), (2, 3)], ids=str)
def test_leading_dimensions(leading):
    _, weights, biases = network(1, (10, 12, 7), torch.float32)
    x, grad = torch.randn(*leading, 10), torch.randn(*leading, 7)
    with configured(shared=227):
        ours = run(FF.mlp, grad, *place((x, weights, biases)))
    for p, q in zip(ours, run(chain, grad, x, weights, biases), strict=True):
        torch.testing.assert_close(p, q, atol=1e-4, rtol=1e-4)


def test_strided_operands():
    x = torch.randint(-1, 2, (40, 30)).bfloat16()
    weights = [torch.randint(-1, 2, (15, 24)).bfloat16().mT, torch.randint(-1, 2, (9, 48)).bfloat16()[:, ::2]]
    biases = [torch.randint(-1, 2, (48,)).bfloat16()[::2], None]
    grad = torch.randint(-1, 2, (9, 40)).bfloat16().mT
    for view in (x[:, :15], x[:, 3:18], x[:, ::2], torch.randint(-1, 2, (15, 40)).bfloat16().mT):
        expected = run(chain, grad, view.double(), [w.double() for w in weights], [biases[0].double(), None])
        with configured(shared=227):
            actual = run(fused(), grad, *place((view, weights, biases)))
        for p, q in zip(actual, expected, strict=True):
            exact(p, q.bfloat16())


@pytest.mark.parametrize("wanted", ["x", "w0", "w1", "b0", "b2", "w1 b1", "x b2"])
def test_only_the_gradients_asked_for(wanted):
    x, weights, biases = network(20, (6, 9, 8, 5), torch.float32)
    tensors = {"x": x, **{f"w{i}": w for i, w in enumerate(weights)}, **{f"b{i}": b for i, b in enumerate(biases)}}

    def gradients(function, device):
        leaves = {name: device(t).requires_grad_(name in wanted.split()) for name, t in tensors.items()}
        y = function(leaves["x"], [leaves[f"w{i}"] for i in range(3)], [leaves[f"b{i}"] for i in range(3)])
        y.square().sum().backward()
        return {name: t.grad for name, t in leaves.items()}

    with configured(shared=227):
        ours = gradients(FF.mlp, put)
    for name, theirs in gradients(chain, torch.clone).items():
        assert (ours[name] is not None) == (theirs is not None) == (name in wanted.split())
        if theirs is not None:
            torch.testing.assert_close(ours[name].cpu(), theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["relu", "tanh", "gelu"])
def test_double_backward(name):
    x, weights, biases = network(6, (4, 7, 3), torch.float32)
    g, h = torch.randn(6, 3), torch.randn(6, 4)

    def second(function, device):
        leaves = [device(t).requires_grad_() for t in (x, *weights, *biases, g)]
        y = function(leaves[0], leaves[1:3], leaves[3:5])
        (first,) = torch.autograd.grad(y, leaves[0], leaves[5], create_graph=True)
        found = torch.autograd.grad(first, leaves, device(h), allow_unused=True)
        return [torch.zeros(t.shape) if f is None else f.cpu() for t, f in zip(leaves, found, strict=True)]

    with configured(shared=227):
        ours = second(fused(name, "sigmoid"), put)
    theirs = second(lambda *t: chain(*t, getattr(F, name), torch.sigmoid), torch.clone)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, atol=1e-4, rtol=1e-4)


def test_what_an_activation_makes_of_columns_that_do_not_exist():
    x, weights, biases = network(5, (6, 7, 3), torch.float32)
    biases[0] += 100.0
    with configured(shared=227):
        y = FF.mlp(*place((x, weights, biases)), nn.Threshold(0.0, float("inf")))
    torch.testing.assert_close(y.cpu(), chain(x, weights, biases), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_and_infinity_spread_as_they_should(dtype):
    x, weights, biases = network(70, (12, 20, 6), dtype)
    x[3, 2], weights[1][4, 5], biases[0][7] = float("inf"), float("nan"), float("-inf")
    grad = torch.randn(70, 6)
    with configured(shared=227):
        ours = run(fused("leaky_relu"), grad, *place((x, weights, biases)))
    wide = run(
        lambda *t: chain(*t, F.leaky_relu), grad, x.double(), *([t.double() for t in u] for u in (weights, biases))
    )
    for p, q in zip(ours, wide, strict=True):
        assert torch.equal(torch.isnan(p), torch.isnan(q))
        assert torch.equal(p.isinf(), q.isinf())


def test_autocast():
    x, weights, biases = network(8, (10, 12, 3), torch.float32)
    x, weights, biases = place((x, weights, biases))
    leaves = [t.requires_grad_() for t in (x, *weights, *biases)]
    with torch.autocast(x.device.type, torch.bfloat16), configured(shared=227):
        y = fused()(x, weights, biases)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert {t.grad.dtype for t in leaves} == {torch.float32}
    expected = chain(x.cpu(), [w.cpu() for w in weights], [b.cpu() for b in biases])
    torch.testing.assert_close(y.float().cpu(), expected, atol=0.05, rtol=0.05)


@pytest.mark.parametrize(
    ("dtype", "widths"),
    [(torch.float32, (10, 129, 3)), (torch.float64, (10, 12, 3)), (torch.float32, (9,) * 18)],
    ids=str,
)
def test_where_it_is_a_chain_of_linears(dtype, widths):
    case = network(4, widths, dtype)
    with configured(shared=227), fastops.record() as rows:
        y = FF.mlp(*place(case))
    assert [row.op for row in rows] == ["linear"] * (len(widths) - 1)
    torch.testing.assert_close(y.cpu(), chain(*case), atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(not EMULATED, reason="a GPU has the shared memory that it has")
def test_too_little_shared_memory_is_a_chain_of_linears():
    case = place(network(4, (10, 100, 3), torch.float32))
    with configured(shared=99), fastops.record() as rows:
        FF.mlp(*case)
    assert [row.op for row in rows] == ["linear"] * 2


def test_both_doors_and_record():
    x, weights, biases = place(network(9, (12, 10, 4), torch.float32))
    with configured(shared=227):
        with fastops.record() as rows:
            fast = FF.mlp(x, weights, biases, "gelu")
        assert [tuple(row[:4]) for row in rows] == [("mlp", "mlp_simt_64_cuda", "9x12, 10x12, 4x10", "float32")]
        batched = torch.func.vmap(lambda t: FF.mlp(t, weights, biases, "gelu"))(x)
        compiled = torch.compile(lambda *t: FF.mlp(t[0], t[1:3], t[3:], "gelu"), backend="aot_eager", fullgraph=True)
        traced = compiled(x, *weights, *biases)
    torch.testing.assert_close(batched.cpu(), fast.cpu())
    torch.testing.assert_close(traced.cpu(), fast.cpu())
