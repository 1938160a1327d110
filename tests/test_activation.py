"""Activations against a float64 reference: values and gradients, every dtype, tier, layout and edge."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from calls import Call, call, sizes
from compare import close, exact
from each import each
from reference import ACTIVATIONS, DTYPES, LAYOUTS, LENGTHS, activation, gradients

import fastops
import fastops.functional as FF
import fastops.nn as fnn
from fastops import _C
from fastops._activations import KIND, PIECEWISE_LINEAR

EVERY = each("case", ACTIVATIONS)
HAS_INPLACE = pytest.mark.parametrize("case", [case for case in ACTIVATIONS if case.in_place], ids=str)

# Corners of the formulas and of the number formats.
SPECIAL = [
    0.0, -0.0, math.inf, -math.inf, math.nan, 1e-45, -1e-45, 1e-40, -1e-40, 1.2e-38, -1.2e-38, 1e-20, -1e-20, 1e-6,
    -1e-6, 0.1, 0.5, -0.5, 1.0, -1.0, 3.0, -3.0, 6.0, 2.999, -2.999, 5.999, 10.0, -10.0, 20.0, 20.001, -20.0, 50.0,
    -50.0, 88.8, -88.8, 90.0, -90.0, 104.0, -104.0, 700.0, -700.0, 6e4, -6e4, 1e10, -1e10, 3e38, -3e38,
]  # fmt: skip


def run(function, x, grad):
    x = x.detach().clone().requires_grad_() if x.is_contiguous() else x.detach().requires_grad_()
    output = function(x)
    return output, *gradients(output, grad, x)


def compare(case, grad, ours, reference, theirs):
    """Output and gradient of each, against what is promised for both."""
    # 2.5 units of the last place (4 for GELU by erf) are promised for the value. The gradient is made of terms as large
    # as the incoming one, and of a value that may be that far off.
    promised, largest = (4.0 if case.kind == "gelu" else 2.5), float(grad.abs().max()) if grad.numel() else 0.0
    bounds = {"output": (promised, 0.0), "gradient": (2 * promised, largest)}
    for name, *three in zip(("output", "gradient"), ours, reference, theirs, strict=True):
        close(*three, name, 1, *bounds[name])


def compare_all(case, x, grad):
    reference = run(lambda t: activation(case, t), x.double(), grad)
    compare(case, grad, run(case.ours, x, grad), reference, run(case.theirs, x, grad))


@EVERY
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients(isa, case, dtype):
    for length in LENGTHS:
        compare_all(case, (3 * torch.randn(length)).to(dtype), torch.randn(length))


@EVERY
def test_bits_for_1_and_2_threads(isa, case):
    x, grad = 3 * torch.randn(300_001), torch.randn(300_001)
    results = []
    for count in (1, 2, 2):  # the last twice: from run to run, too
        torch.set_num_threads(count)
        results.append(run(case.ours, x, grad))
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert torch.equal(one, two)


def _ulps(actual, reference):
    """Error in units of the last place of the correctly rounded result."""
    spacing = (
        torch.nextafter(reference.float().abs(), torch.tensor(math.inf)).double() - reference.float().abs().double()
    )
    return ((actual.double() - reference) / spacing).abs()


def _flushed(case, ours, reference, x):
    """Elementwise: zero, since an exponential would be below the normal numbers, or in float32's GELU below 2^-98."""
    least = 2.0**-1012 if ours.dtype is torch.float64 else 2.0**-95 if case.kind.startswith("gelu") else 2.0**-116
    return (ours == 0) & (reference.abs() < least) & (x.abs() > 8)


def _ulps_of(case, actual, reference, x):
    return torch.where(_flushed(case, actual, reference, x), 0, _ulps(actual, reference))


@functools.cache
def _sampled(index):
    """Every 16381st of all finite floats, f of them in float64, and the largest error of PyTorch there, in ulps."""
    case = ACTIVATIONS[index]
    x = torch.arange(-(2**31), 2**31, 16381, dtype=torch.int64).to(torch.int32).view(torch.float32)
    x = x[torch.isfinite(x)]
    reference = activation(case, x)
    finite = torch.isfinite(reference.float())
    x, reference = x[finite], reference[finite]
    theirs = _ulps(case.theirs(x), reference)
    return x, reference, float(theirs[torch.isfinite(theirs)].max())


@EVERY
def test_ulps_of_float32(isa, case):
    """`make ulp` looks at all floats."""
    x, reference, theirs = _sampled(ACTIVATIONS.index(case))
    ours = _ulps_of(case, case.ours(x), reference, x)
    limit = max(4.0 if case.kind == "gelu" else 2.5, theirs)
    worst = int(ours.argmax())
    assert float(ours[worst]) <= limit, f"{float(ours[worst]):.2f} ulp at {float(x[worst])!r}"


def _as_good(case, ours, reference, theirs, x):
    """Elementwise: the reference within some roundings, PyTorch's answer, or an error at most twice PyTorch's."""
    rounded, eps = reference.to(ours.dtype), torch.finfo(ours.dtype).eps
    good = (ours == rounded) | (ours == theirs) | (torch.isnan(ours) & (torch.isnan(rounded) | torch.isnan(theirs)))
    error, theirs_error = (ours.double() - reference).abs(), (theirs.double() - reference).abs()
    roundings = 4 if eps > 1e-10 else 4096  # float64 is measured with itself
    least = torch.finfo(ours.dtype).smallest_normal * eps
    good |= (error <= roundings * (eps * reference.abs() + least)) | (error <= 2 * theirs_error)
    return good | _flushed(case, ours, reference, x)


def _table(good, *columns):
    return [tuple(float(column[i]) for column in columns) for i in (~good).nonzero().flatten().tolist()]


@EVERY
@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values(isa, case, dtype):
    """nan, infinities and denormals, in every lane of a vector."""
    special = torch.tensor(SPECIAL, dtype=torch.float64).to(dtype)
    for x in (special, special.repeat(3)[:-1], special.repeat_interleave(17)):
        ones = torch.ones(x.shape)
        ours, theirs, wide = run(case.ours, x, ones), run(case.theirs, x, ones), run(case.theirs, x.double(), ones)
        reference = activation(case, x)
        good = _as_good(case, ours[0], reference, theirs[0], x)
        # Where PyTorch's formula gives nan at an infinity (infinity times 0, or by
        # infinity), the limit is the better answer.
        good |= x.isinf() & torch.isnan(reference) & ((ours[0] == 0) | (ours[0] == x) | (ours[0] == x.sign()))
        assert good.all(), _table(good, x, ours[0], reference, theirs[0])

        good = _as_good(case, ours[1], wide[1], theirs[1], x) | (x.isinf() & torch.isnan(wide[1]))
        # PyTorch's piecewise derivatives at nan depend on whether the element falls into a vector or into the tail.
        nans = torch.isnan(x)
        singles = torch.cat([run(case.theirs, one, torch.ones(1))[1] for one in x[nans].split(1)])
        good[nans] |= ours[1][nans] == singles
        # float64 is no reference for gradients that cancel: where PyTorch's is off, so may be this, within a rounding
        # of 1.
        good |= (ours[1].double() - wide[1]).abs() <= 4 * torch.finfo(
            torch.float32 if case.kind == "hardsigmoid" else dtype
        ).eps
        assert good.all(), _table(good, x, ours[1], wide[1], theirs[1])


def test_gelu_at_infinity_is_better_than_nan(isa):
    for approximate in ("none", "tanh"):
        actual = FF.gelu(torch.tensor([math.inf, -math.inf]), approximate=approximate)
        assert actual[0] == math.inf
        assert actual[1] == 0


@EVERY
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(isa, case, layout):
    for shape in ((5, 19), (3, 4, 33)):
        x = LAYOUTS[layout](shape, torch.float32)
        compare_all(case, x, torch.randn(shape))
    grad = LAYOUTS[layout]((5, 19), torch.float32)
    compare_all(case, torch.randn(5, 19), grad)


@EVERY
def test_memory_format_is_kept(case):
    x = torch.randn(2, 5, 3, 7).contiguous(memory_format=torch.channels_last).requires_grad_()
    output = case.ours(x)
    assert output.is_contiguous(memory_format=torch.channels_last)
    for grad in (torch.randn(2, 5, 3, 7), torch.randn(2, 5, 3, 7).contiguous(memory_format=torch.channels_last)):
        (actual,) = gradients(case.ours(x), grad, x)
        (expected,) = gradients(case.theirs(x), grad, x)
        torch.testing.assert_close(actual, expected)


@HAS_INPLACE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inplace(isa, case, dtype):
    for make in (LAYOUTS["contiguous"], LAYOUTS["transposed"], LAYOUTS["sliced"]):
        leaf = make((7, 19), dtype).requires_grad_()
        x = leaf * 1  # a leaf that requires grad may not be written
        expected = case.ours(leaf)
        version = x._version
        output = case.ours(x, inplace=True)
        assert output is x
        assert x._version > version
        torch.testing.assert_close(output, expected, rtol=0, atol=0)
        grad = torch.randn(7, 19)
        # Backward may read the output where it would read the input otherwise: the same formula, rounded elsewhere.
        torch.testing.assert_close(
            gradients(output, grad, leaf)[0],
            gradients(expected, grad, leaf)[0],
            rtol=0.03,
            atol=0.01 if dtype == torch.bfloat16 else 1e-5,
        )
    with torch.no_grad():
        x = torch.randn(33).to(dtype)
        expected = case.ours(x)
        pointer = x.data_ptr()
        assert case.ours(x, inplace=True).data_ptr() == pointer
        exact(x, expected)


def test_inplace_functions():
    for name in ("relu_", "leaky_relu_", "elu_", "selu_", "celu_", "hardtanh_", "threshold_"):
        arguments = (0.1, 0.5) if name == "threshold_" else ()
        x = torch.randn(40)
        expected = getattr(F, name[:-1])(x, *arguments)
        result = getattr(FF, name)(x, *arguments)
        assert result is x
        torch.testing.assert_close(x, expected)


def test_inplace_refusals():
    leaf = torch.randn(4, requires_grad=True)
    with pytest.raises(RuntimeError, match="leaf Variable"):
        FF.relu_(leaf)
    with pytest.raises(RuntimeError, match=r"single memory location|internal overlap"):
        FF.relu_(torch.randn(1).expand(4))
    x = torch.randn(4, requires_grad=True) * 1
    y = x.exp()
    FF.relu_(y)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def saved_bytes(function, *tensors):
    """What autograd keeps for backward, not counting the inputs themselves."""
    sizes = []
    known = {t.untyped_storage().data_ptr() for t in tensors}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in known:
            sizes.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = function(*tensors)
    return sum(sizes), output


@pytest.mark.parametrize("kind", sorted(PIECEWISE_LINEAR - {"identity"}))
def test_relu_like_activations_save_one_bit_an_element(kind):
    case = next(c for c in ACTIVATIONS if c.kind == kind)
    x = torch.randn(64, 1000, requires_grad=True)
    size, output = saved_bytes(case.ours, x)
    assert size == 64 * 1000 // 8
    output.sum().backward()
    assert x.grad is not None


@EVERY
def test_mask_input_and_output_give_the_same_gradient(isa, case):
    """The three things that backward may read, where each is allowed."""
    x, grad = 3 * torch.randn(1003), torch.randn(1003)
    ops, args = torch.ops.fastops, (case.kind, case.a, case.b)
    output, mask = ops.activation_forward(x, *args, True)
    if not case.from_input:
        with pytest.raises(RuntimeError, match="saved_kind must be 'output'"):
            ops.activation_backward(grad, x, *args, "input")
        return
    from_input = ops.activation_backward(grad, x, *args, "input")
    if case.saves == "mask":
        exact(ops.activation_backward(grad, mask, *args, "mask"), from_input)
    if _C.can_save_output(KIND[case.kind], case.a, case.b):
        torch.testing.assert_close(ops.activation_backward(grad, output, *args, "output"), from_input)


@EVERY
def test_double_backward(case):
    x = (2 * torch.randn(4, 5, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(case.ours, x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(case.ours, x, check_fwd_over_rev=True, check_rev_over_rev=True)


@HAS_INPLACE
def test_double_backward_of_inplace(case):
    x = (2 * torch.randn(4, 5, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: case.ours(t * 1, inplace=True), x)
    assert torch.autograd.gradgradcheck(lambda t: case.ours(t * 1, inplace=True), x)


@EVERY
def test_scalars_and_empty_tensors(case):
    for shape in ((), (0,), (3, 0, 2)):
        x = torch.randn(shape, requires_grad=True)
        output = case.ours(x)
        torch.testing.assert_close(output, case.theirs(x))
        output.sum().backward()
        assert x.grad.shape == shape


@EVERY
def test_what_only_pytorch_takes_goes_to_pytorch(case):
    inputs = [
        torch.arange(-3, 4),
        torch.randn(4, dtype=torch.complex64),
        torch.randn(3, 4).to_sparse(),
        [1.0],
        torch.ones(2) > 0,
    ]
    for x in inputs:
        refusal = None
        try:
            expected = case.theirs(x)
        except Exception as error:
            refusal = error
        if refusal is not None:
            with pytest.raises(type(refusal)) as info:
                case.ours(x)
            text = str(info.value)
            assert str(refusal) in text
            if isinstance(x, torch.Tensor) and not x.is_floating_point():
                assert "floating point" in text
            continue
        with fastops.record() as rows:
            actual = case.ours(x)
        assert [row.kernel for row in rows] == ["aten"]
        torch.testing.assert_close(actual, expected)


def test_errors():
    x = torch.randn(4, 6)
    with pytest.raises(RuntimeError, match="gelu: approximate must be 'none' or 'tanh', got 'erf'"):
        FF.gelu(x, approximate="erf")
    with pytest.raises(TypeError):
        FF.gelu(x, "tanh")
    with pytest.raises(ValueError, match=r"hardtanh: min_val cannot be greater than max_val, got 2.0 and 1.0"):
        FF.hardtanh(x, 2.0, 1.0)
    with pytest.raises(RuntimeError, match="softshrink: lambd must not be negative, got -1"):
        FF.softshrink(x, -1)
    with pytest.raises(RuntimeError, match="celu: alpha must not be 0"):
        FF.celu(x, 0.0)
    with pytest.raises(TypeError):
        FF.elu(x, "a")
    with pytest.raises(TypeError, match="relu: input must be a Tensor, got 3"):
        FF.relu(3)
    with pytest.raises(RuntimeError, match=r"prelu: weight must have shape \(1,\) or \(6,\) .* got \(5,\)"):
        FF.prelu(x, torch.ones(5))
    with pytest.raises(RuntimeError, match=r"glu: input must have an even size along dim 1, got shape \(4, 5\)"):
        FF.glu(x[:, :5], 1)
    with pytest.raises(IndexError, match="glu: dim must be between -2 and 1"):
        FF.glu(x, 2)
    with pytest.raises(RuntimeError, match="glu: input must have at least one dimension"):
        FF.glu(torch.tensor(1.0))


@EVERY
def test_autocast_leaves_activations_in_their_dtype(case):
    for dtype in DTYPES:
        x = torch.randn(5).to(dtype)
        with torch.autocast("cpu", torch.bfloat16):
            assert case.ours(x).dtype == case.theirs(x).dtype == dtype


# ---- PReLU and GLU -------------------------------------------------------------------------------------------------

PRELU = [
    ((5,), 1), ((4, 6), 1), ((4, 6), 6), ((2, 3, 33), 3), ((2, 17, 4, 5), 17), ((2, 17, 4, 5), 1), ((1, 1, 70001), 1),
    ((3, 1000), 1000), ((70, 1000, 3), 1000), ((0, 3, 4), 3), ((2, 3, 0), 3),
]  # fmt: skip


@pytest.mark.parametrize(("shape", "weights"), PRELU, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_prelu(isa, shape, weights, dtype):
    def run(function, dtype):
        x, w = base.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
        output = function(x, w)
        return output, *gradients(output, grad, x, w)

    base, weight, grad = (t.to(dtype) for t in (torch.randn(shape), torch.rand(weights), torch.randn(shape)))
    for name, *three in zip(
        ("output", "input", "weight"),
        run(FF.prelu, dtype),
        run(F.prelu, torch.float64),
        run(F.prelu, dtype),
        strict=True,
    ):
        # The gradient of the weight is a long sum, of which little may remain.
        size = float((base.double() * grad.double()).norm()) if name == "weight" else 0.0
        close(*three, name, base.numel(), 4.0, size)


def test_prelu_layouts_and_edges(isa):
    for x in (
        torch.randn(2, 5, 3, 4).contiguous(memory_format=torch.channels_last),
        torch.randn(4, 5).mT.contiguous().mT,
        torch.randn(6, 5, 8)[::2, :, 1:6],
        torch.tensor([[math.inf, -math.inf, math.nan, 0.0, -0.0]]),
    ):
        for w in (torch.rand(5), torch.rand(10)[::2], torch.rand(1)):
            ours, theirs = x.detach().clone().requires_grad_(), x.detach().clone().requires_grad_()
            v, u = w.detach().clone().requires_grad_(), w.detach().clone().requires_grad_()
            a, e = FF.prelu(ours, v), F.prelu(theirs, u)
            torch.testing.assert_close(a, e, equal_nan=True)
            a.backward(torch.ones_like(a))
            e.backward(torch.ones_like(e))
            torch.testing.assert_close(ours.grad, theirs.grad, equal_nan=True)
            torch.testing.assert_close(v.grad, u.grad, equal_nan=True)


def test_prelu_double_backward():
    for shape, weights in (((4, 5), 5), ((2, 3, 4), 3), ((6,), 1)):
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        w = torch.rand(weights, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(FF.prelu, (x, w), check_forward_ad=True)
        assert torch.autograd.gradgradcheck(FF.prelu, (x, w), check_fwd_over_rev=True, check_rev_over_rev=True)


def test_prelu_autocast():
    x, w = torch.randn(4, 6), torch.rand(6)
    with torch.autocast("cpu", torch.bfloat16):
        assert FF.prelu(x, w).dtype == F.prelu(x, w).dtype
        torch.testing.assert_close(FF.prelu(x, w), F.prelu(x, w))


@pytest.mark.parametrize(
    "shape", [(2,), (4, 6), (3, 34), (2, 8, 33), (2, 6, 4, 5), (64, 2002), (0, 4), (4, 0)], ids=str
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_glu(isa, shape, dtype):
    base = (3 * torch.randn(shape)).to(dtype)
    for dim in range(-len(shape), len(shape)):
        if shape[dim] % 2:
            continue

        def run(dtype, function, dim=dim):
            x = base.to(dtype).requires_grad_()
            output = function(x, dim)
            return output, *gradients(output, torch.full(output.shape, 0.75), x)

        results = run(dtype, FF.glu), run(torch.float64, F.glu), run(dtype, F.glu)
        for name, *three in zip(("output", "gradient"), *results, strict=True):
            close(*three, name)


def test_glu_layouts(isa):
    for name in LAYOUTS:
        x = LAYOUTS[name]((6, 10), torch.float32)
        for dim in (0, 1):
            torch.testing.assert_close(FF.glu(x, dim), F.glu(x, dim))


def test_glu_double_backward():
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    for dim in (0, -1):
        assert torch.autograd.gradcheck(lambda t, d=dim: FF.glu(t, d), x, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(
            lambda t, d=dim: FF.glu(t, d), x, check_fwd_over_rev=True, check_rev_over_rev=True
        )


# ---- modules -------------------------------------------------------------------------------------------------------

MODULES = {
    "Threshold": [(0.1, 0.7), (0.1, 0.7, True)], "ReLU": [(), (True,)], "ReLU6": [()], "LeakyReLU": [(), (0.2, True)],
    "ELU": [(), (0.5,)], "SELU": [()], "CELU": [(), (0.5, True)], "GELU": [(), ("tanh",)], "SiLU": [()], "Mish": [()],
    "Sigmoid": [()], "LogSigmoid": [()], "Tanh": [()], "Softplus": [(), (2.0, 5.0)], "Softsign": [()],
    "Hardtanh": [(), (-0.5, 2.0)], "Hardsigmoid": [()], "Hardswish": [(True,)], "Hardshrink": [(0.2,)],
    "Softshrink": [(0.2,)], "Tanhshrink": [()], "PReLU": [(), (6, 0.1)], "GLU": [(), (0,)],
}  # fmt: skip


def test_every_module_is_tested():
    assert set(MODULES) == {name for name in fnn.LAYERS if name in fastops.nn.activation.__dict__}


@pytest.mark.parametrize("name", MODULES)
def test_modules(name):
    import copy
    import pickle

    for arguments in MODULES[name]:
        ours, theirs = getattr(fnn, name)(*arguments), getattr(torch.nn, name)(*arguments)
        assert isinstance(ours, getattr(torch.nn, name))
        assert repr(ours) == repr(theirs)
        assert vars(ours).keys() == vars(theirs).keys()
        x = torch.randn(4, 6)
        expected = theirs(x.clone())
        for module in (ours, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            with fastops.record() as rows:
                torch.testing.assert_close(module(x.clone()), expected)
            assert len(rows) == 1
            assert rows[0].kernel != "aten"
        theirs.load_state_dict(ours.state_dict())
        ours.load_state_dict(theirs.state_dict())


@pytest.mark.parametrize("kind", ["relu", "gelu", "prelu", "glu"])
def test_large_outputs_have_the_bits_of_small_ones(isa, kind):
    """From 32 MB up a kernel writes past the caches, in pieces; the end is no whole piece, and no whole vector."""
    length = (32 << 18) + 1037
    shape = (2, length) if kind == "glu" else (length,)
    x, grad = torch.randn(shape), torch.randn(length)

    def run(x: torch.Tensor, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = x.clone().requires_grad_()
        if kind == "prelu":
            y = FF.prelu(x, torch.tensor([0.3]))
        elif kind == "glu":
            y = FF.glu(x, 0)[0]
        else:
            y = getattr(FF, kind)(x)
        y.backward(grad)
        return y.detach(), x.grad

    whole = run(x, grad)
    half = length // 128 * 64  # where a mask's byte ends
    parts = [run(x[..., part], grad[part]) for part in (slice(half), slice(half, None))]
    for actual, pieces in zip(whole, zip(*parts, strict=True), strict=True):
        exact(actual, torch.cat(pieces, dim=-1))


def test_parameters_that_are_nan():
    nan, x = float("nan"), torch.tensor([5.0, -5.0])
    for arguments in ((nan, 2.0), (-2.0, nan)):
        for one, two in ((FF.hardtanh, F.hardtanh), (FF.hardtanh_, F.hardtanh_)):
            torch.testing.assert_close(one(x.clone(), *arguments), two(x.clone(), *arguments), equal_nan=True)
    for module in (F, FF):
        with pytest.raises(RuntimeError):
            module.softshrink(x, nan)


@pytest.mark.parametrize("inplace", ["yes", 1, [], None, 0.0])
def test_inplace_is_any_truth_value(inplace):
    x = torch.tensor([1.0, -1.0])
    assert (FF.relu(x, inplace) is x) == bool(inplace)


@pytest.mark.parametrize("dim", [2**64, "a", 1.0, None])
def test_glu_refuses_as_pytorch(dim):
    errors = []
    for module in (F, FF):
        with pytest.raises((RuntimeError, TypeError, ValueError, OverflowError)) as error:
            module.glu(torch.ones(4), dim)
        errors.append(error.type)
    assert errors[0] is errors[1]


# ---- for the tests that call every op (every_op.py) -----------------------------------------------------------------

OP_LAYERS = [("ReLU", ()), ("PReLU", (4,)), ("GLU", ())]
_ARGUMENTS = {"Threshold": (0.1, 0.2), "PReLU": (4,)}
LAYERS = [*((name, _ARGUMENTS.get(name, ())) for name in fnn.activation.__all__), ("GELU", ("tanh",))]


def calls(size):
    for name in fastops.functional._activation.__all__:
        if name == "prelu":
            yield call(name, (2, 4, 5), (4,))
            yield call(name, (2, 4, 5), (1,))
        else:
            yield call(name, (2, 64), **({"threshold": 0.1, "value": 0.2} if name.startswith("threshold") else {}))
    yield call("relu", (100, 100))  # saves a mask


def kernels(dtype, on_gpu):
    return {"elementwise": 0}


def random_activation(rng):
    case = rng.choice(ACTIVATIONS)
    shape = sizes(rng, rng.randint(0, 5), 0 if rng.random() < 0.05 else 1)
    return Call(case.function, case.ours, case.theirs, [shape])


def random_prelu(rng):
    channels = rng.choice((1, 3, 17))
    return call("prelu", (rng.randint(1, 4), channels, *sizes(rng, rng.randint(0, 3))), (rng.choice((1, channels)),))


def random_glu(rng):
    shape = list(sizes(rng, rng.randint(1, 4)))
    dim = rng.randrange(-len(shape), len(shape))
    shape[dim] *= 2
    return call("glu", shape, dim=dim)


RANDOM_CALLS = [random_activation, random_prelu, random_glu]
