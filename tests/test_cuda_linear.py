"""The CUDA kernels of linear on the emulator: see gpu.py. References and tolerances are the CPU's.

A chip of one multiprocessor takes large tiles wherever they fit and never splits k; one of many takes small ones and
splits.
"""

import pytest
import torch
import torch.nn.functional as F
from compare import close, exact
from gpu import DEVICE, EMULATED, SCHEDULES, compare_second_order, configured, put
from reference import DTYPES, LINEAR_SHAPES, gradients

import fastops
import fastops.functional as FF

CHIPS = [1, 4, 64]
# (m, n, k) around the tiles, 64 and 128 in m and n, 16 and 32 in k, with rows of whole vectors and without.
SHAPES = [*LINEAR_SHAPES, (65, 128, 32), (129, 130, 40), (64, 72, 200), (7, 16, 520)]
# All that are fused into the load of the gradient, and others, whose gradient is formed first.
FUSED = [
    "relu",
    "relu6",
    "leaky_relu",
    "hardtanh",
    "hardshrink",
    "softshrink",
    "sigmoid",
    "tanh",
    "gelu",
    "silu",
    "elu",
]


def operands(m, n, k, dtype):
    return (torch.randn(m, k) / 2).to(dtype), (torch.randn(n, k) / 2).to(dtype), torch.randn(n).to(dtype)


def integers(*shape, dtype):
    return torch.randint(-3, 4, shape).to(dtype)


def run(function, grad, *tensors):
    """Output and gradients, on the CPU; the tensors are read with their own strides."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    output = function(*leaves)
    return [t.detach().cpu() for t in (output, *gradients(output, grad.to(output.device), *leaves))]


def compare_all(grad, tensors, activation=None, theirs=lambda z: z, roundings=2.0, what=""):
    ours = run(lambda *t: FF.linear(*t, activation=activation), grad, *map(put, tensors))
    reference = run(lambda *t: theirs(F.linear(*t)), grad, *(t.double() for t in tensors))
    torchs = run(lambda *t: theirs(F.linear(*t)), grad, *tensors)
    x, w = tensors[0].flatten(0, -2), tensors[1]
    terms = max(*x.shape, w.shape[0])
    if w.dtype == torch.float32:
        # Summed term by term, as cuBLAS does; the PyTorch that is compared with sums in blocks.
        roundings = max(roundings, terms**0.5 / 3)
    for name, *three in zip(
        ("output", "grad_input", "grad_weight", "grad_bias"), ours, reference, torchs, strict=False
    ):
        close(*three, f"{what} {name}", terms, roundings)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_and_backward(shape, dtype):
    m, n, k = shape
    tensors = operands(m, n, k, dtype)
    grad = torch.randn(m, n).to(dtype)
    for i, chip in enumerate(CHIPS):
        with configured(SCHEDULES[i % len(SCHEDULES)], multiprocessors=chip, aligned=i != 1):
            compare_all(grad, tensors, what=f"{chip} multiprocessors,")


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("dtype", DTYPES)
def test_activations(name, dtype):
    theirs = getattr(F, name)
    for i, (m, n, k) in enumerate(((70, 72, 40), (9, 33, 17), (130, 129, 33))):
        with configured(SCHEDULES[i], multiprocessors=CHIPS[2 - i]):
            compare_all(torch.randn(m, n).to(dtype), operands(m, n, k, dtype), name, theirs, 4.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(130, 70, 72), (64, 128, 40), (5, 10, 530), (200, 9, 5)], ids=str)
def test_integers_are_exact_in_every_schedule(shape, dtype):
    """And so is every sum: the order of threads and blocks changes no bit."""
    m, n, k = shape
    tensors = integers(m, k, dtype=dtype), integers(n, k, dtype=dtype), integers(n, dtype=dtype)
    grad = integers(m, n, dtype=dtype)
    function = lambda *t: FF.linear(*t, activation="relu")  # noqa: E731
    expected = run(lambda *t: F.linear(*t).relu(), grad, *(t.double() for t in tensors))
    for chip in CHIPS:
        for schedule in SCHEDULES:
            with configured(schedule, multiprocessors=chip):
                for actual, wanted in zip(run(function, grad, *map(put, tensors)), expected, strict=True):
                    exact(actual, wanted.to(dtype), f"{chip} multiprocessors, {schedule}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_in_every_schedule(dtype):
    tensors, grad = [put(t) for t in operands(70, 40, 300, dtype)], torch.randn(70, 40).to(dtype)
    for chip in CHIPS:
        results = []
        for schedule in SCHEDULES:
            with configured(schedule, multiprocessors=chip):
                results.append(run(lambda *t: FF.linear(*t, activation="sigmoid"), grad, *tensors))
        for other in results[1:]:
            for one, two in zip(results[0], other, strict=True):
                assert torch.equal(one, two)


STRIDED = {
    "transposed": lambda r, c, dtype: integers(c, r, dtype=dtype).mT,
    "sliced": lambda r, c, dtype: integers(r, c + 9, dtype=dtype)[:, 3 : 3 + c],
    "aligned slice": lambda r, c, dtype: integers(r, c + 16, dtype=dtype)[:, 8 : 8 + c],
    "stepped": lambda r, c, dtype: integers(2 * r, 3 * c, dtype=dtype)[::2, ::3],
    "expanded": lambda r, c, dtype: integers(1, c, dtype=dtype).expand(r, c),
    "transposed slice": lambda r, c, dtype: integers(c, r + 8, dtype=dtype)[:, 8:].mT,
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", STRIDED)
def test_strided_operands(layout, dtype):
    make = STRIDED[layout]
    for i, (m, n, k) in enumerate(((67, 65, 40), (24, 136, 72))):
        x, w, b = make(m, k, dtype), make(n, k, dtype), make(n, 1, dtype)[:, 0]
        grad = make(m, n, dtype)
        for name in (None, "relu", "gelu"):
            with configured(SCHEDULES[i], multiprocessors=CHIPS[2 * i]):
                tensors = [put(t) for t in (x, w, b)]
                leaves = [t.detach().requires_grad_() for t in tensors]
                output = FF.linear(*leaves, activation=name)
                actual = torch.autograd.grad(output, leaves, put(grad))
                wide = [t.double().requires_grad_() for t in (x, w, b)]
                z = F.linear(*wide)
                expected = z if name is None else getattr(F, name)(z)
                if name == "gelu":  # no integers
                    close(output.cpu(), expected, expected.to(dtype), roundings=4.0)
                    wanted = torch.autograd.grad(expected, wide, grad.double())
                    for p, q in zip(actual, wanted, strict=True):
                        close(p.cpu(), q, q.to(dtype), terms=m + n + k, roundings=16.0)
                    continue
                exact(output.cpu(), expected.to(dtype))
                for p, q in zip(actual, torch.autograd.grad(expected, wide, grad.double()), strict=True):
                    exact(p.cpu(), q.to(dtype))


def _tf32(x):
    """Rounded to 10 bits of fraction, halves away from zero."""
    return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


@pytest.mark.skipif(not EMULATED, reason="the rounding of a GPU's sums is not known")
@pytest.mark.parametrize("shape", [(130, 136, 72), (9, 33, 17), (33, 8, 530)], ids=str)
def test_tf32_where_pytorch_allows_it(shape):
    m, n, k = shape
    x, w, b = operands(m, n, k, torch.float32)
    grad = torch.randn(m, n)
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        for i, chip in enumerate(CHIPS):
            with configured(SCHEDULES[i], multiprocessors=chip), fastops.record() as rows:
                actual = run(FF.linear, grad, *map(put, (x, w, b)))
            assert all(row.kernel.startswith("gemm_tf32_") for row in rows)
            assert len(rows) == 2
            xr, wr, gr = (_tf32(t).double() for t in (x, w, grad))
            expected = F.linear(xr, wr, b.double()), gr @ wr, gr.mT @ xr, grad.double().sum(0)
            for p, q in zip(actual, expected, strict=True):
                close(p, q, q.float(), roundings=16.0)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    with fastops.record() as rows:
        FF.linear(*map(put, (x, w, b)))
    assert rows[0].kernel.startswith("gemm_simt_")


@pytest.mark.parametrize("shape", [(0, 5, 10), (3, 0, 10), (3, 5, 0), (0, 0, 0)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_empty(shape, dtype):
    m, n, k = shape
    tensors = operands(m, n, k, dtype)
    compare_all(torch.ones(m, n), tensors, "sigmoid", torch.sigmoid, 4.0)


@pytest.mark.parametrize("leading", [(), (1,), (3, 4), (2, 3, 4)], ids=str)
def test_leading_dimensions(leading):
    x, w, b = torch.randn(*leading, 10), torch.randn(7, 10), torch.randn(7)
    grad = torch.randn(*leading, 7)
    ours = run(lambda *t: FF.linear(*t, activation="gelu"), grad, *map(put, (x, w, b)))
    theirs = run(lambda *t: F.gelu(F.linear(*t)), grad, x, w, b)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_and_infinity_spread_as_they_should(dtype):
    for m, n, k in ((1, 40, 33), (70, 72, 40)):
        x, w, b = operands(m, n, k, dtype)
        x[0, k // 2], w[n // 3, 0], b[n - 1] = float("inf"), float("nan"), float("-inf")
        grad = torch.randn(m, n)
        ours = run(FF.linear, grad, *map(put, (x, w, b)))
        wide = run(F.linear, grad, *(t.double() for t in (x, w, b)))
        for p, q in zip(ours, wide, strict=True):
            assert torch.equal(torch.isnan(p), torch.isnan(q))
            assert torch.equal(p.isinf(), q.isinf())


@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
@pytest.mark.parametrize("wanted", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1), (1, 0, 1)], ids=str)
def test_only_the_gradients_asked_for(wanted, activation):
    tensors = operands(20, 30, 40, torch.float32)
    ours = [put(t).requires_grad_(bool(on)) for t, on in zip(tensors, wanted, strict=True)]
    theirs = [t.clone().requires_grad_(bool(on)) for t, on in zip(tensors, wanted, strict=True)]
    for chip in CHIPS:
        with configured(multiprocessors=chip):
            FF.linear(*ours, activation=activation).square().sum().backward()
    z = F.linear(*theirs)
    ((z if activation is None else getattr(F, activation)(z)).square().sum() * len(CHIPS)).backward()
    for one, two, on in zip(ours, theirs, wanted, strict=True):
        assert (one.grad is not None) == bool(on)
        if on:
            torch.testing.assert_close(one.grad.cpu(), two.grad, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("name", [None, "relu", "gelu"])
def test_double_backward(name):
    x, w, b = operands(6, 5, 4, torch.float64)
    activate = (lambda z: z) if name is None else getattr(F, name)
    compare_second_order(lambda *t: FF.linear(*t, activation=name), lambda *t: activate(F.linear(*t)), x, w, b)


def test_strides_beyond_two_to_the_31_elements():
    """4 GB of address space, of which only the touched pages exist."""
    base = torch.empty(2**31 + 64, dtype=torch.bfloat16, device=DEVICE)
    x, w = base.as_strided((2, 8), (2**31, 1)), base.as_strided((2, 8), (2**31, 1), 32)
    x.copy_(integers(2, 8, dtype=torch.bfloat16))
    w.copy_(integers(2, 8, dtype=torch.bfloat16))
    exact(FF.linear(x, w).cpu(), F.linear(x.cpu().double(), w.cpu().double()).bfloat16())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    x, w, b = operands(8, 12, 10, torch.float32)
    leaves = [put(t).requires_grad_() for t in (x, w, b)]
    with torch.autocast(DEVICE.type, dtype):
        output = FF.linear(*leaves, activation="relu")
        assert FF.linear(leaves[0].to(dtype), leaves[1]).dtype == dtype
    assert output.dtype == dtype
    torch.testing.assert_close(output.float().cpu(), F.relu(F.linear(x, w, b)), atol=0.05, rtol=0.05)
    output.float().sum().backward()
    assert {t.grad.dtype for t in leaves} == {torch.float32}


def test_both_doors_and_record():
    x, w, b = (put(t) for t in operands(9, 12, 10, torch.float32))
    with fastops.record() as rows:
        fast = FF.linear(x, w, b, activation="gelu")
    assert [(row.op, row.kernel, row.shapes) for row in rows] == [
        ("linear", "gemm_simt_64x64x16_cuda", "9x10, 12x10, 12")
    ]
    exact(torch.ops.fastops.linear_forward(x, w, b, "gelu", 0.0, 0.0, False)[0].cpu(), fast.cpu())
    exact(torch.func.vmap(lambda t: FF.linear(t, w, b, activation="gelu"))(x).cpu(), fast.cpu())
    leaves = [t.detach().requires_grad_() for t in (x, w, b)]
    compiled = torch.compile(lambda *t: FF.linear(*t, activation="gelu"), backend="aot_eager", fullgraph=True)
    with fastops.record() as rows:
        compiled(*leaves).sum().backward()
    assert [row.op for row in rows] == ["linear", "linear_backward"]
    grads = [t.grad.clone() for t in leaves]
    again = torch.autograd.grad(FF.linear(*leaves, activation="gelu").sum(), leaves)
    for p, q in zip(grads, again, strict=True):
        exact(p.cpu(), q.cpu())


def test_a_replaced_model_moves_to_the_device():
    model = torch.nn.Sequential(torch.nn.Linear(10, 20), torch.nn.GELU(), torch.nn.Linear(20, 3))
    x = torch.randn(7, 10)
    expected = model(x)
    before = fastops.replace_(model)
    model.to(DEVICE)
    with fastops.record() as rows:
        actual = model(x.to(DEVICE))
    assert "aten" not in {row.kernel for row in rows}
    torch.testing.assert_close(actual.cpu(), expected, atol=1e-5, rtol=1e-5)
    fastops.restore_(model)
    after = fastops.replace_(model)
    assert str(before) == str(after)
    torch.testing.assert_close(model(x.to(DEVICE)).cpu(), expected, atol=1e-5, rtol=1e-5)


def test_tensors_on_two_devices_are_refused():
    x, w, b = operands(3, 4, 5, torch.float32)
    with pytest.raises(RuntimeError, match=r"linear: weight must be a dense tensor on .*:0, got one on cpu"):
        torch.ops.fastops.linear_forward(put(x), w, None, "identity", 0.0, 0.0, False)
    with pytest.raises(RuntimeError, match=r"linear: bias must be a dense tensor on .*:0, got one on cpu"):
        torch.ops.fastops.linear_forward(put(x), put(w), b, "identity", 0.0, 0.0, False)
    with pytest.raises(RuntimeError, match=r"linear_backward: weight must be a dense tensor on .*:0, got one on cpu"):
        torch.ops.fastops.linear_backward(
            put(torch.randn(3, 4)), None, put(x), w, "identity", 0.0, 0.0, [True, False, False]
        )
