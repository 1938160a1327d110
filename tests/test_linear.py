"""linear against a float64 reference: values and gradients, every dtype, tier, layout and edge."""

import pytest
import torch
import torch.nn.functional as F
from calls import Call, call, sizes
from compare import close, exact
from each import each
from reference import ACTIVATIONS, DTYPES, LAYOUTS, LINEAR_SHAPES, activation, gradients, integers, linear
from tiers import BEST

import fastops
import fastops.functional as FF
import fastops.nn as fnn
from fastops.functional._activation import NAMES

FUSED = [case for case in ACTIVATIONS if case.kind != "threshold"]


def operands(m, n, k, dtype, bias=True):
    x, w = torch.randn(m, k).to(dtype), (torch.randn(n, k) / max(k, 1) ** 0.5).to(dtype)
    return x, w, torch.randn(n).to(dtype) if bias else None


def leaves(*tensors):
    return [None if t is None else t.detach().clone().requires_grad_() for t in tensors]


def compare_all(x, w, b, grad, case=None):
    """Values and gradients of one call, against PyTorch's and the float64 reference."""
    module = None if case is None else as_module(case)
    theirs_f = (lambda z: z) if case is None else case.theirs
    reference_f = (lambda z: z) if case is None else (lambda z: activation(case, z))

    def run(function, *tensors):
        output = function(*tensors)
        return output, gradients(output, grad, *[t for t in tensors if t is not None])

    actual = run(lambda *t: FF.linear(*t, activation=module), *leaves(x, w, b))
    theirs = run(lambda *t: theirs_f(F.linear(*t)), *leaves(x, w, b))
    wide = [None if t is None else t.double() for t in (x, w, b)]
    reference = run(lambda *t: linear(*t, reference_f), *leaves(*wide))
    terms = max(*x.shape, *w.shape)
    close(actual[0], reference[0], theirs[0], "output", terms)
    for name, ours, ref, other in zip(("input", "weight", "bias"), actual[1], reference[1], theirs[1], strict=False):
        close(ours, ref, other, f"gradient of {name}", terms)


def as_module(case):
    """torch.nn's module of this activation."""
    names = {"gelu_tanh": "gelu"}
    modules = {name.lower(): getattr(torch.nn, name) for name in fnn.LAYERS}
    return modules[names.get(case.kind, case.kind).replace("_", "")](**case.kwargs)


@pytest.mark.parametrize("dtype", DTYPES)
@each("shape", LINEAR_SHAPES)
def test_values_and_gradients(isa, shape, dtype):
    m, n, _ = shape
    compare_all(*operands(*shape, dtype), torch.randn(m, n))
    compare_all(*operands(*shape, dtype, bias=False), torch.randn(m, n))


@pytest.mark.parametrize("dtype", DTYPES)
@each("shape", LINEAR_SHAPES)
def test_integers_are_exact(isa, shape, dtype):
    """test_threads.py and tests/cpp have more threads than one."""
    m, n, k = shape
    k = min(k, 60)  # 60 * 9 + 3 is exact in a bfloat16 sum of float32, and its rounding is the same
    x, w, b, g = (integers(*s, dtype=dtype) for s in ((m, k), (n, k), (n,), (m, n)))
    x, w, b = leaves(x, w, b)
    output = FF.linear(x, w, b, activation="relu")
    z = F.linear(x.double(), w.double(), b.double())
    exact(output, z.relu().to(dtype), "output")
    gz = g.double() * (z > 0)
    expected = gz @ w.double(), gz.mT @ x.double(), gz.sum(0)
    for name, ours, e in zip("xwb", gradients(output, g, x, w, b), expected, strict=True):
        exact(ours, e.to(dtype), f"gradient of {name}")


@pytest.mark.parametrize("dtype", DTYPES)
@each("case", FUSED)
def test_every_fused_activation(isa, case, dtype):
    compare_all(*operands(13, 33, 17, dtype), torch.randn(13, 33), case)


@pytest.mark.parametrize("shape", [(1, 40, 30), (5, 64, 31), (64, 64, 64)], ids=str)
@pytest.mark.parametrize("name", ["relu", "gelu", "tanh"])
def test_fused_activation_on_every_path(isa, shape, name):
    case = next(c for c in ACTIVATIONS if c.kind == name)
    compare_all(*operands(*shape, torch.float32), torch.randn(shape[:2]), case)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("which", ["input", "weight", "grad"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layouts(isa, layout, which, dtype):
    m, n, k = 13, 35, 21
    make = LAYOUTS[layout]
    x, w, b, g = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype), torch.randn(n).to(dtype), torch.randn(m, n)
    if which == "input":
        x = make((m, k), dtype)
    elif which == "weight":
        w = make((n, k), dtype)
    else:
        g = make((m, n), torch.float32)
    reference = [t.double().requires_grad_() for t in (x, w, b)]
    ours = [t.detach().requires_grad_() for t in (x, w, b)]
    theirs = [t.detach().requires_grad_() for t in (x, w, b)]
    assert ours[0].stride() == x.stride()
    results = []
    for tensors in (ours, reference, theirs):
        function = FF.linear if tensors is ours else F.linear
        output = function(*tensors)
        results.append((output, *torch.autograd.grad(output, tensors, g.to(output.dtype))))
    for name, *three in zip(("output", "input", "weight", "bias"), *results, strict=True):
        close(*three, name)


def test_strided_bias(isa):
    x, w, b = torch.randn(4, 6), torch.randn(5, 6), torch.randn(15)[::3]
    close(FF.linear(x, w, b), linear(x, w, b), F.linear(x, w, b))
    b = torch.randn(1).expand(5)
    close(FF.linear(x, w, b), linear(x, w, b), F.linear(x, w, b))


def test_operands_are_not_copied():
    """A transposed weight and a sliced input are read where they lie."""
    x, w = torch.randn(64, 300)[:, 20:276], torch.randn(256, 128).mT
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        FF.linear(x, w)
    copies = [event.name for event in profile.events() if "copy" in event.name or "contiguous" in event.name]
    assert copies == []


@pytest.mark.parametrize("leading", [(), (1,), (3, 4), (2, 3, 4), (2, 1, 3, 2)], ids=str)
def test_leading_dimensions(leading):
    x, w, b = torch.randn(*leading, 10), torch.randn(7, 10), torch.randn(7)
    ours, theirs = leaves(x, w, b), leaves(x, w, b)
    a, e = FF.linear(*ours, activation="gelu"), F.gelu(F.linear(*theirs))
    assert a.shape == e.shape
    torch.testing.assert_close(a, e, atol=1e-5, rtol=1e-5)
    for p, q in zip(gradients(a, e.detach(), *ours), gradients(e, e.detach(), *theirs), strict=True):
        torch.testing.assert_close(p, q, atol=1e-4, rtol=1e-4)


def test_leading_dimensions_that_do_not_collapse():
    x = torch.randn(5, 4, 3, 10).permute(2, 0, 1, 3)
    w = torch.randn(7, 10)
    torch.testing.assert_close(FF.linear(x, w), F.linear(x, w), atol=1e-5, rtol=1e-5)
    channels_last = torch.randn(2, 6, 5, 10).contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(FF.linear(channels_last, w), F.linear(channels_last, w), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(0, 5, 10), (3, 0, 10), (3, 5, 0), (0, 0, 0), (0, 5, 0), (3, 0, 0)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_empty(shape, dtype):
    m, n, k = shape
    x, w, b = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype), torch.randn(n).to(dtype)
    ours, theirs = leaves(x, w, b), leaves(x, w, b)
    a, e = FF.linear(*ours, activation="sigmoid"), F.sigmoid(F.linear(*theirs))
    torch.testing.assert_close(a, e, atol=1e-2, rtol=1e-2)
    g = torch.ones(m, n)
    for p, q in zip(gradients(a, g, *ours), gradients(e, g, *theirs), strict=True):
        torch.testing.assert_close(p, q, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 40, 33), (5, 17, 9), (40, 40, 40)], ids=str)
def test_nan_and_infinity_spread_as_they_should(isa, shape, dtype):
    m, n, k = shape
    x, w, b = operands(m, n, k, dtype)
    x[0, k // 2], w[n // 3, 0], b[n - 1] = float("inf"), float("nan"), float("-inf")
    ours, wide = leaves(x, w, b), leaves(x.double(), w.double(), b.double())
    a, e = FF.linear(*ours), F.linear(*wide)
    assert torch.equal(torch.isnan(a), torch.isnan(e))
    assert torch.equal(a.isinf(), e.isinf())
    g = torch.randn(m, n)
    for p, q in zip(gradients(a, g, *ours), gradients(e, g, *wide), strict=True):
        assert torch.equal(torch.isnan(p), torch.isnan(q))
        assert torch.equal(p.isinf(), q.isinf())


def test_float32_denormals_survive(isa):
    x = torch.full((3, 4), 1e-40)
    w = torch.eye(4)
    exact(FF.linear(x, w), x)


@pytest.mark.parametrize("kind", ["relu", "leaky_relu", "gelu", "silu", "tanh"])
def test_tiny_gradients_survive(isa, kind):
    """A derivative loses what is tiny beside the gradient, not what is tiny as the gradient is."""
    x, w, g = torch.randn(70, 130), 0.1 * torch.randn(150, 130), 1e-30 * torch.randn(70, 150)
    ours, wide = leaves(x, w), leaves(x.double(), w.double())
    FF.linear(*ours, activation=kind).backward(g)
    getattr(F, kind)(F.linear(*wide)).backward(g.double())
    for p, q in zip(ours, wide, strict=True):
        assert (p.grad - q.grad).abs().max() < 1e-6 * q.grad.abs().max()


def test_float16_saturates_like_pytorch(isa):
    x, w = torch.full((2, 8), 200.0).half(), torch.full((3, 8), 200.0).half()
    assert FF.linear(x, w).isinf().all()


@pytest.mark.parametrize("wanted", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1), (1, 0, 1)], ids=str)
def test_only_the_gradients_asked_for(wanted):
    x, w, b = (t.requires_grad_(bool(on)) for t, on in zip(operands(20, 30, 40, torch.float32), wanted, strict=True))
    FF.linear(x, w, b, activation="gelu").square().sum().backward()
    theirs = [t.detach().clone().requires_grad_(bool(on)) for t, on in zip((x, w, b), wanted, strict=True)]
    F.gelu(F.linear(*theirs)).square().sum().backward()
    for ours, other, on in zip((x, w, b), theirs, wanted, strict=True):
        assert (ours.grad is not None) == bool(on)
        if on:
            torch.testing.assert_close(ours.grad, other.grad, atol=1e-3, rtol=1e-4)


def test_backward_does_not_write_into_what_was_saved():
    x, w, b = leaves(*operands(9, 17, 33, torch.float32))
    before = [t.detach().clone() for t in (x, w, b)]
    output = FF.linear(x, w, b, activation="tanh")
    kept, grad = output.detach().clone(), torch.randn(9, 17)
    grad_kept = grad.clone()
    output.backward(grad)
    for now, then in zip((x, w, b, output, grad), (*before, kept, grad_kept), strict=True):
        assert torch.equal(now, then)


def test_a_changed_operand_is_noticed_by_backward():
    x, w, b = leaves(*operands(4, 5, 6, torch.float32))
    output = FF.linear(x, w, b)
    with torch.no_grad():
        w.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_backward_twice():
    x, w, b = leaves(*operands(4, 5, 6, torch.float32))
    output = FF.linear(x, w, b, activation="gelu").sum()
    output.backward(retain_graph=True)
    first = w.grad.clone()
    output.backward()
    exact(w.grad, 2 * first)
    with pytest.raises(RuntimeError, match="second time"):
        output.backward()


@pytest.mark.parametrize("name", [None, *NAMES])
def test_double_backward(name):
    x, w, b = leaves(*operands(3, 5, 4, torch.float64))
    assert torch.autograd.gradcheck(lambda *t: FF.linear(*t, activation=name), (x, w, b), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(
        lambda *t: FF.linear(*t, activation=name), (x, w, b), check_fwd_over_rev=True, check_rev_over_rev=True
    )


def test_activation_argument():
    x, w, b = operands(4, 5, 6, torch.float32)
    z = F.linear(x, w, b)
    torch.testing.assert_close(FF.linear(x, w, b, "gelu_tanh"), F.gelu(z, approximate="tanh"))
    torch.testing.assert_close(FF.linear(x, w, b, activation=fnn.LeakyReLU(0.2)), F.leaky_relu(z, 0.2))
    torch.testing.assert_close(FF.linear(x, w, b, activation=torch.nn.Hardtanh(-0.1, 0.3)), z.clamp(-0.1, 0.3))
    torch.testing.assert_close(FF.linear(x, w, b, activation=torch.nn.Threshold(0.1, 2.0)), F.threshold(z, 0.1, 2.0))
    torch.testing.assert_close(FF.linear(x, w, b, activation=torch.nn.Identity()), z)
    with pytest.raises(ValueError, match=r"activation must be one of identity, relu, .*got 'swoosh'"):
        FF.linear(x, w, b, activation="swoosh")
    with pytest.raises(ValueError, match="PReLU"):
        FF.linear(x, w, b, activation=torch.nn.PReLU())
    with pytest.raises(TypeError, match="function"):
        FF.linear(x, w, b, activation=lambda t: t)
    with pytest.raises(RuntimeError, match="alpha must not be 0"):
        FF.linear(x, w, b, activation=torch.nn.CELU(0.0))


REFUSED = {
    "in_features": (
        lambda x, w, b: (x, w[:, :7], b),
        r"linear: weight must have shape \(out_features, in_features\) with in_features = 10 .*got \[5, 7\]",
    ),
    "bias": (lambda x, w, b: (x, w, b[:3]), r"linear: bias must have shape \(5,\).*got \[3\]"),
    "dtype": (lambda x, w, b: (x, w.double(), b), r"linear: weight must have input's dtype torch.float32.*float64"),
    "bias dtype": (lambda x, w, b: (x, w, b.double()), r"linear: bias must have input's dtype torch.float32.*float64"),
    "scalar": (lambda x, w, b: (x.sum(), w, b), r"linear: input must have shape \(\*, in_features\), got a scalar"),
    "three dimensions": (lambda x, w, b: (x, w[None], b), r"linear: weight must have shape .*got \[1, 5, 10\]"),
    "not a tensor": (lambda x, w, b: (x, None, b), r"linear: weight must be a Tensor, got None"),
    "a list": (lambda x, w, b: ([1.0], w, b), r"linear: input must be a Tensor, got \[1.0\]"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_pytorch_refuses_is_refused_with_a_reason(what):
    change, message = REFUSED[what]
    arguments = change(torch.randn(4, 10), torch.randn(5, 10), torch.randn(5))
    with pytest.raises((RuntimeError, TypeError)) as theirs:
        F.linear(*arguments)
    with pytest.raises(theirs.type, match=message):
        FF.linear(*arguments)


def test_what_only_pytorch_takes_goes_to_pytorch():
    x, w, b = torch.randn(4, 6), torch.randn(5, 6), torch.randn(5)
    calls = {
        "vector weight": (x, w[0], None),
        "scalar bias": (x, w[0], b[0]),
        "broadcast bias": (x, w, b[:1]),
        "matrix bias": (x, w, torch.randn(4, 5)),
        "complex": (x.to(torch.complex64), w.to(torch.complex64), b.to(torch.complex64)),
        "integers": (x.long(), w.long(), b.long()),
        "sparse weight": (x, w.to_sparse(), b),
        "sparse csr weight": (x, w.to_sparse_csr(), b),
        "nested": (torch.nested.nested_tensor([x[:2], x[2:]]), w, b),
    }
    for name, arguments in calls.items():
        try:
            expected = F.linear(*arguments)
        except RuntimeError as error:
            with pytest.raises(type(error)):
                FF.linear(*arguments)
            continue
        with fastops.record() as rows:
            actual = FF.linear(*arguments)
        assert [row.kernel for row in rows] == ["aten"], name
        if expected.is_nested:
            actual, expected = actual.to_padded_tensor(0.0), expected.to_padded_tensor(0.0)
        torch.testing.assert_close(actual, expected)


def test_tensor_subclass_goes_to_pytorch():
    seen = []

    class Loud(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            seen.append(function)
            return super().__torch_function__(function, types, args, kwargs)

    x = torch.randn(4, 6).as_subclass(Loud)
    output = FF.linear(x, torch.randn(5, 6), activation="relu")
    assert type(output) is Loud
    assert F.linear in seen


def test_negative_view():
    x = torch.randn(4, 6, dtype=torch.complex64).conj().imag
    assert x.is_neg()
    w = torch.randn(5, 6)
    torch.testing.assert_close(FF.linear(x, w), F.linear(x, w))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    x, w, b = leaves(*operands(8, 12, 10, torch.float32))
    with torch.autocast("cpu", dtype):
        output = FF.linear(x, w, b, activation="relu")
        theirs = F.relu(F.linear(x, w, b))
    assert output.dtype == theirs.dtype == dtype
    torch.testing.assert_close(output, theirs, atol=0.05, rtol=0.05)
    output.float().sum().backward()
    assert x.grad.dtype == w.grad.dtype == b.grad.dtype == torch.float32


def test_mixed_dtypes_under_autocast():
    x, w = torch.randn(8, 10).bfloat16(), torch.randn(12, 10)
    with torch.autocast("cpu", torch.bfloat16):
        assert FF.linear(x, w).dtype == F.linear(x, w).dtype == torch.bfloat16


def test_strides_beyond_two_to_the_31_elements(isa):
    """4 GB of address space, of which only the touched pages exist."""
    base = torch.empty(2**31 + 64, dtype=torch.bfloat16)
    x, w = base.as_strided((2, 8), (2**31, 1)), base.as_strided((2, 8), (2**31, 1), 32)
    x.copy_(integers(2, 8, dtype=torch.bfloat16))
    w.copy_(integers(2, 8, dtype=torch.bfloat16))
    exact(FF.linear(x, w), F.linear(x.double(), w.double()).bfloat16())


class TestModule:
    def test_same_as_torch(self):
        torch.manual_seed(3)
        ours = fnn.Linear(10, 5)
        torch.manual_seed(3)
        theirs = torch.nn.Linear(10, 5)
        x = torch.randn(4, 10)
        torch.testing.assert_close(ours(x), theirs(x))
        assert repr(ours) == repr(theirs)
        assert list(ours.state_dict()) == list(theirs.state_dict())
        theirs.load_state_dict(ours.state_dict())
        ours.load_state_dict(theirs.state_dict())

    def test_signature(self):
        layer = fnn.Linear(10, 5, False, "meta", torch.float64)
        assert layer.bias is None
        assert layer.weight.device.type == "meta"
        assert layer.weight.dtype == torch.float64

    @pytest.mark.parametrize("activation", ["relu", torch.nn.LeakyReLU(0.2), fnn.GELU("tanh")], ids=str)
    def test_activation(self, activation, tmp_path):
        import copy
        import pickle

        layer = fnn.Linear(10, 5, activation=activation)
        x = torch.randn(4, 10)
        function = F.relu if activation == "relu" else activation
        torch.testing.assert_close(layer(x), function(F.linear(x, layer.weight, layer.bias)))
        assert list(layer.state_dict()) == ["weight", "bias"]
        assert list(layer.children()) == []
        assert repr(activation) in repr(layer)
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            torch.testing.assert_close(other(x), layer(x))
        layer.activation = "tanh"
        torch.testing.assert_close(layer(x), torch.tanh(F.linear(x, layer.weight, layer.bias)))
        with pytest.raises(ValueError, match="swoosh"):
            layer.activation = "swoosh"

    def test_hooks(self):
        layer, seen = fnn.Linear(3, 2, activation="relu"), []
        layer.register_forward_pre_hook(lambda module, args: seen.append("pre"))
        layer.register_forward_hook(lambda module, args, output: seen.append("forward"))
        layer.register_full_backward_pre_hook(lambda module, grad: seen.append("backward_pre"))
        layer.register_full_backward_hook(lambda module, grad_in, grad_out: seen.append("backward"))
        layer.weight.register_hook(lambda grad: seen.append("weight"))
        layer(torch.randn(4, 3, requires_grad=True)).sum().backward()
        assert sorted(seen) == sorted(["pre", "forward", "backward_pre", "backward", "weight"])

    def test_tied_weights(self):
        one, two = fnn.Linear(6, 6), fnn.Linear(6, 6)
        two.weight = one.weight
        x = torch.randn(3, 6)
        two(one(x)).sum().backward()
        ours = one.weight.grad.clone()
        one.weight.grad = None
        F.linear(F.linear(x, one.weight, one.bias), two.weight, two.bias).sum().backward()
        torch.testing.assert_close(ours, one.weight.grad, atol=1e-5, rtol=1e-5)

    def test_parametrized_pruned_and_normalized_weights(self):
        from torch.nn.utils import parametrizations, prune, weight_norm

        x = torch.randn(3, 6)
        layers = [parametrizations.orthogonal(fnn.Linear(6, 6)), parametrizations.weight_norm(fnn.Linear(6, 6))]
        with pytest.warns(FutureWarning):
            layers.append(weight_norm(fnn.Linear(6, 6)))
        layers.append(prune.l1_unstructured(fnn.Linear(6, 6), "weight", amount=0.5))
        for layer in layers:
            torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))

    def test_functional_call(self):
        layer = fnn.Linear(3, 2)
        x, w, b = torch.randn(4, 3), torch.randn(2, 3), torch.randn(2)
        actual = torch.func.functional_call(layer, {"weight": w, "bias": b}, x)
        torch.testing.assert_close(actual, F.linear(x, w, b))

    def test_data_writes_are_seen(self):
        layer, x = fnn.Linear(3, 2, bias=False), torch.randn(4, 3)
        layer(x)
        layer.weight.data.fill_(0)
        assert not layer(x).any()


def test_backward_twice_where_nothing_is_saved():
    """Refused where something was saved and has been freed, as in PyTorch; allowed where nothing was."""
    x, w, b = torch.ones(2, 3), torch.ones(4, 3, requires_grad=True), torch.ones(4, requires_grad=True)
    y = FF.linear(x, w, b).sum()
    y.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.backward()
    y = FF.linear(x, w.detach(), b)
    for _ in range(2):
        y.backward(torch.ones(2, 4))
    assert b.grad.tolist() == [6.0] * 4


# ---- for the tests that call every op (every_op.py) -----------------------------------------------------------------


LAYERS = OP_LAYERS = [("Linear", (6, 5))]


@pytest.mark.skipif(BEST != "amx", reason="of processors with AMX")
@pytest.mark.parametrize(
    ("precision", "parts", "error"), [("highest", 3, 2e-7), ("high", 2, 1e-5), ("medium", 1, 4e-3)]
)
def test_float32_by_bf16_parts(precision, parts, error):
    """torch.set_float32_matmul_precision says how many parts; forward, both gradients, any layout."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        x = torch.randn(300, 260).t().requires_grad_()
        w = torch.randn(270, 600)[:, ::2].requires_grad_()
        b = torch.randn(270, requires_grad=True)
        g = torch.randn(270, 260).t()
        with fastops.record() as rows:
            y = FF.linear(x, w, b, activation="relu")
            grads = torch.autograd.grad(y, (x, w, b), g)
        assert {row.kernel for row in rows} == {f"gemm_bf16x{parts}_32x32_amx"}
    finally:
        torch.set_float32_matmul_precision(before)
    exact = (y.detach() > 0) * g.double()
    expected = [
        torch.relu(x.double() @ w.double().t() + b.double()), exact @ w.double(), exact.t() @ x.double(), exact.sum(0)
    ]  # fmt: skip
    for got, right in zip((y, *grads), expected, strict=True):
        assert ((got - right).pow(2).mean() / right.pow(2).mean()).sqrt() < error


@pytest.mark.skipif(BEST != "amx", reason="of processors with AMX")
@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_bf16_parts_of_numbers_near_the_limits(precision):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        x, w = torch.randn(300, 260), torch.randn(270, 260) / 10
        for row, value in enumerate((1e34, -3e38, float("inf"), -float("inf"), float("nan"), 1e-40)):
            x[40 * row, 11 * row] = value
        y = FF.linear(x, w)
    finally:
        torch.set_float32_matmul_precision(before)
    expected = (x.double() @ w.double().t()).float()
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=0.1, equal_nan=True)


@pytest.mark.skipif(BEST != "amx", reason="of processors with AMX")
def test_long_sums_of_bf16_parts():
    """No less exact than PyTorch's, as sums of blocks are added up."""
    x, w = torch.rand(128, 16384), torch.rand(128, 16384)
    with fastops.record() as rows:
        y = FF.linear(x, w)
    assert rows[0].kernel.startswith("gemm_bf16x3")
    expected = x.double() @ w.double().t()
    error, torchs = ((got - expected).square().mean().sqrt() for got in (y, F.linear(x, w)))
    assert error < 2 * torchs + torch.finfo(torch.float32).eps / 2 * expected.square().mean().sqrt()


def calls(size):
    for m, n, k in ((6, 5, 4), (2, 70, 300), (1, 400, 400), (130, 70, 90)):
        yield call("linear", (m, k), (n, k), (n,))
    yield call("linear", (6, 4), (5, 4))
    yield call("linear", (8,), (4, 8), (4,))
    yield call("linear", (2, 3, 8), (4, 8), (4,))
    yield call("linear", (6, 4), (5, 4), (5,), needs=[2])


def kernels(dtype, on_gpu):
    if on_gpu:
        return {"gemm_mma": 3} if dtype == torch.bfloat16 else {"gemm_simt": 3, "gemm_tf32": 3}
    return {"column_sums": 0, "dot": 2, "gemm": 2, "gemm_tiny": 2, "row_times_matrix": 0}


def random_linear(rng):
    k, n = rng.choice((1, 5, 16, 33, 70)), rng.choice((1, 4, 17, 40))
    shapes = [(*sizes(rng, rng.randint(0, 3), 1, 6), k), (n, k), (n,)]
    kind = rng.choice(("relu", "silu", None))
    act = {"relu": F.relu, "silu": F.silu, None: lambda z: z}[kind]
    return Call(
        "linear",
        lambda *t: FF.linear(*t, activation=kind),
        lambda *t: act(F.linear(*t)),
        shapes[: rng.choice((2, 3))],
    )


RANDOM_CALLS = [random_linear]
