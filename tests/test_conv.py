"""Convolutions against a float64 reference: values and gradients, every dtype, tier, geometry, layout and edge."""

import functools
import math
import mmap

import pytest
import torch
import torch.nn.functional as F
from calls import call, sizes, spatial
from compare import close, close_rms, exact
from each import each
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from reference import ACTIVATIONS, CONVS, DTYPES, LAYOUTS, Conv, activation, gradients, integers
from tiers import tiers
from torch import nn
from torch._prims_common import suggest_memory_format

import fastops
import fastops.functional as FF
import fastops.nn as fnn
from fastops._fusion import activate, convolve
from fastops.functional._activation import NAMES

FUSED = [case for case in ACTIVATIONS if case.kind != "threshold"]

# What Winograd's algorithms may take: large enough, 3x3, stride 1.
WINOGRAD = [
    Conv(1, 32, 32, (12, 12), (3, 3), padding=1),
    Conv(2, 64, 48, (14, 15), (3, 3), padding=1),
    Conv(1, 48, 65, (9, 31), (3, 3), padding=0),
    Conv(1, 128, 64, (7, 7), (3, 3), padding=2),
    Conv(1, 64, 64, (10, 9), (3, 3), padding=1, transposed=True),
    Conv(1, 32, 16, (4, 7, 9), (3, 3, 3), padding=1),
    Conv(2, 16, 48, (5, 6, 8), (2, 3, 3), padding=(1, 2, 0)),
    Conv(1, 16, 32, (3, 8, 7), (3, 3, 3), padding=(2, 1, 1), transposed=True),
    Conv(1, 9, 17, (3, 8, 7), (1, 3, 3), padding=(0, 1, 1)),
]


def memory_format(tensor, last):
    return {4: torch.channels_last, 5: torch.channels_last_3d}[tensor.dim()] if last else torch.contiguous_format


def channels_last(tensor):
    return tensor.contiguous(memory_format=memory_format(tensor, True))


def operands(conv, dtype, make=torch.randn, bias=True):
    x, w, b = (make(shape) for shape in conv.shapes)
    if make is torch.randn:
        w = w / math.sqrt(w.shape[1] * math.prod(conv.kernel))
    return x.to(dtype), w.to(dtype), b.to(dtype) if bias else None


def leaves(*tensors):
    return [None if t is None else t.detach().clone().requires_grad_() for t in tensors]


def with_gradients(function, tensors, grad):
    output = function(*tensors)
    wanted = [t for t in tensors if t is not None]
    if grad is None:
        grad = torch.linspace(0.5, 1, output.numel()).reshape(output.shape)
    return output, *gradients(output, grad, *wanted)


def compare_all(conv, x, w, b, case=None, rule=close, grad=None):
    """Values and gradients of one call, against PyTorch's and the float64 reference."""
    module = None if case is None else as_module(case)
    theirs_f = (lambda z: z) if case is None else case.theirs
    reference_f = (lambda z: z) if case is None else (lambda z: activation(case, z))
    if grad is None:
        grad = torch.randn(conv.theirs(x, w, b).shape)
    wide = [None if t is None else t.double() for t in (x, w, b)]
    if x.dtype in (torch.bfloat16, torch.float16):
        grad = away_from_jumps(grad, conv.theirs(*wide), reference_f, x.dtype)
    actual = with_gradients(lambda *t: conv.ours(*t, activation=module), leaves(x, w, b), grad)
    theirs = with_gradients(lambda *t: theirs_f(conv.theirs(*t)), leaves(x, w, b), grad)
    reference = with_gradients(lambda *t: reference_f(conv.theirs(*t)), leaves(*wide), grad)
    for name, *three in zip(("output", "input", "weight", "bias"), actual, reference, theirs, strict=False):
        rule(*three, name, conv.terms, roundings=roundings(conv, x.dtype))
    return actual


def away_from_jumps(grad, z, f, dtype):
    """grad, and 0 where f' jumps within a few roundings of z: there it depends on how the sum was rounded."""
    near = 4 * torch.finfo(dtype).eps * z.abs().max()
    slopes = [with_gradients(f, leaves(z + step), torch.ones_like(z))[1] for step in (-near, near)]
    return grad.masked_fill((slopes[0] - slopes[1]).abs() > 0.3, 0)


def roundings(conv, dtype):
    """Where sums run in the result's own precision, a random walk of roundings: c sqrt(terms) eps."""
    return 1 + math.sqrt(conv.terms) / 4 if dtype == torch.float32 else 1


def as_module(case):
    """torch.nn's module of this activation."""
    modules = {name.lower(): getattr(torch.nn, name) for name in fnn.LAYERS}
    return modules[{"gelu_tanh": "gelu"}.get(case.kind, case.kind).replace("_", "")](**case.kwargs)


@pytest.mark.parametrize("dtype", DTYPES)
@each("conv", CONVS)
def test_values_and_gradients(isa, conv, dtype):
    compare_all(conv, *operands(conv, dtype))
    compare_all(conv, *operands(conv, dtype, bias=False))


@pytest.mark.parametrize("dtype", DTYPES)
@each("conv", [conv for conv in CONVS if len(conv.size) > 1])
def test_channels_last(isa, conv, dtype):
    """Either operand in channels_last, or both: the results lie as PyTorch's do."""
    x, w, b = operands(conv, dtype)
    for a, v in ((channels_last(x), channels_last(w)), (channels_last(x), w), (x, channels_last(w))):
        output, grad_x, grad_w, _ = compare_all(conv, a, v, b)
        last = any(suggest_memory_format(t) != torch.contiguous_format for t in (a, v))
        for result in (output, grad_x):
            assert result.stride() == torch.empty_like(result, memory_format=memory_format(result, last)).stride()
        assert grad_w.stride() == v.stride()
        if len(conv.size) == 2:  # in three dimensions PyTorch's depend on the algorithm
            assert output.stride() == conv.theirs(a, v, b).stride()


@pytest.mark.parametrize("dtype", DTYPES)
@each("conv", [*CONVS, *WINOGRAD[:1], *WINOGRAD[-4:]])
def test_integers_are_exact(conv, dtype):
    """On every tier; test_threads.py and tests/cpp have more threads than one."""

    def make(shape):
        return integers(*shape, dtype=dtype, low=-1, high=2)

    x, w, b = operands(conv, dtype, make)
    wide = leaves(x.double(), w.double(), b.double())
    z = conv.theirs(*wide)
    g = make(z.shape)
    expected = torch.autograd.grad(z, wide, g.double() * (z > 0))
    for last in (False, True)[: len(conv.size)]:
        operand = [channels_last(t) if last else t for t in (x, w)]
        for tier in tiers(dtype):
            ours = leaves(*operand, b)
            output = conv.ours(*ours, activation="relu")
            exact(output, z.relu().to(dtype), f"{tier}: output")
            for name, one, e in zip("xwb", gradients(output, g, *ours), expected, strict=True):
                exact(one, e.to(dtype), f"{tier}: gradient of {name}")


@pytest.mark.parametrize("conv", WINOGRAD, ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
def test_rms_error_of_the_default_algorithms(isa, conv, last):
    x, w, b = operands(conv, torch.float32)
    if last:
        x, w = channels_last(x), channels_last(w)
    compare_all(conv, x, w, b, rule=close_rms)
    compare_all(conv, x, w, b, next(case for case in FUSED if case.kind == "relu"), rule=close_rms)


@pytest.mark.parametrize("conv", WINOGRAD, ids=str)
def test_medium_precision(isa, conv):
    x, w, b = operands(conv, torch.float32)
    reference = conv.theirs(x.double(), w.double(), b.double())
    assert fastops.get_conv_precision() == "highest"
    try:
        fastops.set_conv_precision("medium")
        assert fastops.get_conv_precision() == "medium"
        # F(4x4, 3x3) with the points 0, +-1/sqrt2, +-sqrt2: some six times the error of direct summation
        close_rms(conv.ours(x, w, b), reference, conv.theirs(x, w, b), "output", factor=15)
    finally:
        fastops.set_conv_precision("highest")
    close_rms(conv.ours(x, w, b), reference, conv.theirs(x, w, b), "output")


def test_precision_is_checked():
    for name in ("high", "lowest", 1, None):
        with pytest.raises(ValueError, match="precision must be 'highest' or 'medium', got"):
            fastops.set_conv_precision(name)
    assert fastops.get_conv_precision() == "highest"


@pytest.mark.parametrize("dtype", DTYPES)
@each("case", FUSED)
def test_every_fused_activation(isa, case, dtype):
    for conv in (Conv(2, 5, 17, (7, 9), (3, 3), padding=1), Conv(1, 9, 7, (4, 5), (3, 3), stride=2, transposed=True)):
        compare_all(conv, *operands(conv, dtype), case)


@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
@each("conv", [c for c in CONVS if len(c.size) == 2 and math.prod(c.size) > 20])
@pytest.mark.parametrize("name", ["relu", "gelu", "tanh"])
def test_fused_activation_on_every_path(isa, conv, name, last):
    x, w, b = operands(conv, torch.float32)
    if last:
        x, w = channels_last(x), channels_last(w)
    compare_all(conv, x, w, b, next(c for c in ACTIVATIONS if c.kind == name))


@st.composite
def geometries(draw):
    """Any convolution that PyTorch takes, small."""
    dims = draw(st.integers(1, 3))
    transposed = draw(st.booleans())
    groups = draw(st.integers(1, 4))

    def several(low, high):
        return tuple(draw(st.lists(st.integers(low, high), min_size=dims, max_size=dims)))

    size = several(1, 20 if dims < 3 else 7)
    kernel, stride, padding, dilation = several(1, 5 if dims < 3 else 3), several(1, 3), several(0, 3), several(1, 3)
    if not transposed and draw(st.integers(0, 4)) == 0:
        stride, padding = (1,) * dims, draw(st.sampled_from(["same", "valid"]))
    output_padding = tuple(
        draw(st.integers(0, max(s, d) - 1)) if transposed else 0 for s, d in zip(stride, dilation, strict=True)
    )
    channels, outputs = groups * draw(st.integers(1, 9)), groups * draw(st.integers(1, 9))
    around = (0,) * dims if isinstance(padding, str) else padding
    for i in range(dims):
        window = dilation[i] * (kernel[i] - 1) + 1
        if transposed:
            assume((size[i] - 1) * stride[i] + window - 2 * around[i] + output_padding[i] >= 1)
        elif padding != "same":
            assume(size[i] + 2 * around[i] >= window)
    extra = {"transposed": True, "output_padding": output_padding} if transposed else {}
    return Conv(draw(st.integers(1, 3)), channels, outputs, size, kernel, stride, padding, dilation, groups, **extra)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(conv=geometries(), last=st.booleans(), weight_last=st.booleans(), dtype=st.sampled_from(DTYPES))
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_random_geometries(isa, conv, last, weight_last, dtype):
    """Integers, so that every result is exact."""
    x, w, b = operands(conv, dtype, lambda shape: integers(*shape, dtype=dtype, low=-1, high=2))
    if len(conv.size) > 1:
        x, w = channels_last(x) if last else x, channels_last(w) if weight_last else w
    ours, wide = leaves(x, w, b), leaves(x.double(), w.double(), b.double())
    output, z = conv.ours(*ours), conv.theirs(*wide)
    exact(output, z.to(dtype), "output")
    g = integers(*output.shape, dtype=dtype, low=-1, high=2)
    for name, a, e in zip("xwb", gradients(output, g, *ours), gradients(z, g, *wide), strict=True):
        exact(a, e.to(dtype), f"gradient of {name}")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("which", ["input", "weight", "bias", "grad"])
@pytest.mark.parametrize("transposed", [False, True])
def test_layouts(layout, which, transposed):
    conv = Conv(2, 6, 9, (7, 8), (3, 3), stride=2, padding=1, transposed=transposed)
    dtype, make = torch.float32, LAYOUTS[layout]
    x, w, b = operands(conv, dtype)
    grad = torch.randn(conv.theirs(x, w, b).shape)
    if which == "input":
        x = make(tuple(x.shape), dtype)
    elif which == "weight":
        w = make(tuple(w.shape), dtype)
    elif which == "bias":
        if layout == "transposed":
            pytest.skip("a vector has one dimension")
        b = make(tuple(b.shape), dtype) if layout != "expanded" else torch.randn(1).expand(9)
    else:
        grad = make(tuple(grad.shape), dtype)
    results = []
    for function, wide in ((conv.ours, False), (conv.theirs, True), (conv.theirs, False)):
        tensors = [(t.double() if wide else t.detach()).requires_grad_() for t in (x, w, b)]
        results.append(with_gradients(function, tensors, grad))
    for name, *three in zip(("output", "input", "weight", "bias"), *results, strict=True):
        close(*three, name, conv.terms, roundings=roundings(conv, dtype))


@pytest.mark.parametrize("conv", [CONVS[7], CONVS[13], CONVS[22], CONVS[24], CONVS[28]], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_unbatched(conv, dtype):
    x, w, b = operands(conv, dtype)
    output, theirs = (f(x[0], w, b) for f in (conv.ours, conv.theirs))
    assert output.shape == theirs.shape
    assert torch.equal(output, conv.ours(x[:1], w, b)[0])
    x = x[0].clone().requires_grad_()
    (grad,) = torch.autograd.grad(conv.ours(x, w, b, activation="relu").sum(), x)
    assert grad.shape == x.shape


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
def test_empty_batch(dtype, transposed, activation):
    conv = Conv(0, 4, 6, (5, 7), (3, 3), padding=1, transposed=transposed)
    ours, theirs = leaves(*operands(conv, dtype)), leaves(*operands(conv, dtype))
    a, e = conv.ours(*ours, activation=activation), conv.theirs(*theirs)
    assert a.shape == e.shape
    for p, q in zip(gradients(a, torch.ones_like(a), *ours), gradients(e, torch.ones_like(e), *theirs), strict=True):
        exact(p, q)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(
    "conv",
    [
        Conv(2, 16, 16, (5, 6), (3, 3)),
        Conv(2, 16, 16, (5, 6), (3, 3), groups=16),
        Conv(2, 2, 16, (5, 6), (3, 3)),
        Conv(2, 16, 24, (5, 6), (1, 1)),
        Conv(1, 4, 6, (5, 6, 4), (3, 3, 3)),
        Conv(2, 16, 16, (1, 1), (3, 3), transposed=True),
        Conv(2, 16, 16, (1, 1), (3, 3), groups=16, transposed=True),
    ],
    ids=str,
)
def test_a_stride_that_is_never_taken_may_be_any_number(isa, conv, last):
    """Nothing may be reserved, or looked at, for it. (PyTorch's own backward crashes at some strides from 2^16 on.)"""
    x, w, b = operands(conv, torch.float32)
    tensors = channels_last(x) if last else x, w, b
    near, far = conv._replace(stride=7), conv._replace(stride=2**61)
    results = [with_gradients(function, leaves(*tensors), None) for function in (near.theirs, near.ours, far.ours)]
    for theirs, ours, other in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-4)
        exact(other, ours)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_padding_in_front_shifts_a_1x1_convolution(isa, layout):
    """What padding crops in front, output_padding adds behind: the sizes are those of a plain product of matrices."""
    x, w = (integers(*shape, dtype=torch.float32) for shape in ((2, 4, 5, 6), (4, 3, 1, 1)))
    x = x.contiguous(memory_format=layout)
    arguments = {"padding": 1, "output_padding": 2, "dilation": 3}
    exact(FF.conv_transpose2d(x, w, **arguments), F.conv_transpose2d(x, w, **arguments))


def test_zero_channels_are_left_to_pytorch():
    with fastops.record() as rows:
        assert FF.conv2d(torch.randn(2, 0, 5, 5), torch.randn(4, 0, 3, 3)).shape == (2, 0, 3, 3)
    assert [row.kernel for row in rows] == ["aten"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("conv", [CONVS[1], CONVS[3], CONVS[4], CONVS[10], CONVS[13], CONVS[21], CONVS[28]], ids=str)
def test_nan_and_infinity_spread_as_they_should(isa, conv, dtype):
    x, w, b = operands(conv, dtype)
    x.view(-1)[x.numel() // 2], x.view(-1)[0], b[-1] = float("inf"), float("nan"), float("-inf")
    if conv.padding == 0:  # PyTorch's own answers differ in what a nan makes of the zeros around an image
        w.view(-1)[w.numel() // 3] = float("nan")
    ours, wide = leaves(x, w, b), leaves(x.double(), w.double(), b.double())
    a, e = conv.ours(*ours), conv.theirs(*wide)
    g = torch.randn(a.shape)
    pairs = [(a, e), *zip(gradients(a, g, *ours), gradients(e, g, *wide), strict=True)]
    for p, q in pairs:
        assert torch.equal(torch.isnan(p), torch.isnan(q))
        assert torch.equal(p.isinf(), q.isinf())


def test_float32_denormals_survive(isa):
    x = torch.full((1, 2, 4, 4), 1e-40)
    w = torch.eye(2)[:, :, None, None].contiguous()
    exact(FF.conv2d(x, w), x)
    exact(FF.conv2d(x, F.pad(w, (1, 1, 1, 1)), padding=1), x)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("wanted", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1), (1, 0, 1)], ids=str)
def test_only_the_gradients_asked_for(wanted, transposed):
    conv = Conv(2, 5, 8, (9, 9), (3, 3), stride=2, padding=1, transposed=transposed)
    ours = [t.requires_grad_(bool(on)) for t, on in zip(operands(conv, torch.float32), wanted, strict=True)]
    theirs = [t.detach().clone().requires_grad_(bool(on)) for t, on in zip(ours, wanted, strict=True)]
    with fastops.record() as rows:
        conv.ours(*ours, activation="gelu").square().sum().backward()
    F.gelu(conv.theirs(*theirs)).square().sum().backward()
    for one, other, on in zip(ours, theirs, wanted, strict=True):
        assert (one.grad is not None) == bool(on)
        if on:
            torch.testing.assert_close(one.grad, other.grad, atol=1e-3, rtol=1e-4)
    ops = {row.op for row in rows}
    assert (f"{conv.name}_backward_input" in ops) == bool(wanted[0])
    assert (f"{conv.name}_backward_weight" in ops) == bool(wanted[1] or wanted[2])


def test_record_names_op_and_kernel():
    x, w = torch.randn(2, 8, 9, 9, requires_grad=True), torch.randn(4, 8, 3, 3, requires_grad=True)
    with fastops.record() as rows:
        FF.conv2d(x, w, activation="relu").sum().backward()
    assert [row.op for row in rows] == ["conv2d", "conv2d_backward_input", "conv2d_backward_weight"]
    assert rows[0].shapes == "2x8x9x9, 4x8x3x3"
    assert all(row.kernel and row.kernel != "aten" and row.dtype == "float32" for row in rows)


@pytest.mark.parametrize("name", [None, "relu", "tanh", "gelu"])
@pytest.mark.parametrize("transposed", [False, True])
def test_nothing_is_saved_beyond_operands_and_output(name, transposed):
    conv = Conv(2, 8, 8, (32, 32), (3, 3), padding=1, transposed=transposed)
    x, w, b = leaves(*operands(conv, torch.float32))
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = conv.ours(x, w, b, activation=name)
    expected = [x, w] if name is None else [x, w, y]
    assert sum(storages.values()) == sum(t.numel() * 4 for t in expected)


@pytest.mark.parametrize("transposed", [False, True])
def test_backward_does_not_write_into_what_was_saved(isa, transposed):
    conv = Conv(2, 9, 17, (8, 9), (3, 3), padding=1, transposed=transposed)
    x, w, b = leaves(*operands(conv, torch.float32))
    before = [t.detach().clone() for t in (x, w, b)]
    output = conv.ours(x, w, b, activation="tanh")
    kept, grad = output.detach().clone(), torch.randn(output.shape)
    grad_kept = grad.clone()
    output.backward(grad)
    for now, then in zip((x, w, b, output, grad), (*before, kept, grad_kept), strict=True):
        assert torch.equal(now, then)


def test_a_changed_operand_is_noticed_by_backward():
    x, w = leaves(torch.randn(1, 2, 5, 5), torch.randn(3, 2, 3, 3))
    output = FF.conv2d(x, w)
    with torch.no_grad():
        w.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_backward_twice():
    x, w = leaves(torch.randn(1, 2, 5, 5), torch.randn(3, 2, 3, 3))
    output = FF.conv2d(x, w, activation="gelu").sum()
    output.backward(retain_graph=True)
    first = w.grad.clone()
    output.backward()
    exact(w.grad, 2 * first)
    with pytest.raises(RuntimeError, match="second time"):
        output.backward()


# Of every kind, as small as they come.
TINY = [
    Conv(2, 2, 3, (4, 3), (3, 2), padding=1),
    Conv(1, 2, 2, (6, 5), (2, 2), stride=(2, 3), padding=1),
    Conv(1, 4, 2, (5, 5), (2, 2), dilation=2, groups=2),
    Conv(1, 2, 4, (3, 4), (2, 3), padding="same", groups=2),
    Conv(2, 2, 2, (7,), (3,), stride=2),
    Conv(1, 1, 2, (2, 3, 3), (2, 2, 2), padding=1),
    Conv(1, 2, 2, (2, 3), (3, 2), stride=2, padding=1, transposed=True, output_padding=1),
    Conv(1, 2, 4, (4,), (3,), stride=2, groups=2, transposed=True),
    Conv(1, 1, 1, (2, 1, 2), (2, 2, 1), transposed=True),
]


@pytest.mark.parametrize("conv", TINY, ids=str)
@pytest.mark.parametrize("name", [None, "tanh", "gelu"])
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_double_backward(conv, name):
    tensors = leaves(*operands(conv, torch.float64))

    def function(*t):
        return conv.ours(*t, activation=name)

    assert torch.autograd.gradcheck(function, tensors, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(
        function, tensors, check_fwd_over_rev=True, check_rev_over_rev=True, check_batched_grad=True
    )


@pytest.mark.parametrize("name", NAMES)
def test_double_backward_of_every_activation(name):
    tensors = leaves(*operands(TINY[1], torch.float64))
    assert torch.autograd.gradgradcheck(lambda *t: TINY[1].ours(*t, activation=name), tensors)


def test_third_derivatives():
    conv = TINY[0]
    tensors = leaves(*operands(conv, torch.float64))

    def third(function):
        value = function(*tensors).tanh().sum()
        for _ in range(2):
            value = sum(g.square().sum() for g in torch.autograd.grad(value, tensors, create_graph=True))
        return torch.autograd.grad(value, tensors)

    torch.testing.assert_close(third(conv.ours), third(conv.theirs))


def test_activation_argument():
    x, w, b = operands(CONVS[7], torch.float32)
    z = F.conv2d(x, w, b, padding=1)

    def ours(activation):
        return FF.conv2d(x, w, b, padding=1, activation=activation)

    close_enough = {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(ours("gelu_tanh"), F.gelu(z, approximate="tanh"), **close_enough)
    torch.testing.assert_close(ours(fnn.LeakyReLU(0.2)), F.leaky_relu(z, 0.2), **close_enough)
    torch.testing.assert_close(ours(torch.nn.Threshold(0.1, 2.0)), F.threshold(z, 0.1, 2.0), **close_enough)
    torch.testing.assert_close(ours(torch.nn.Identity()), z, **close_enough)
    with pytest.raises(ValueError, match=r"activation must be one of identity, relu, .*got 'swoosh'"):
        ours("swoosh")
    with pytest.raises(ValueError, match="PReLU"):
        ours(torch.nn.PReLU())
    with pytest.raises(RuntimeError, match="alpha must not be 0"):
        ours(torch.nn.CELU(0.0))


def _x(*shape):
    return torch.randn(shape)


# name -> function, arguments, what the message says
REFUSED = {
    "kernel too large": ("conv2d", (_x(2, 3, 2, 5), _x(4, 3, 3, 3)), {}, "kernel must fit into the padded input.*3.*2"),
    "kernel too large, dilated": (
        "conv1d", (_x(2, 3, 8), _x(4, 3, 3)), {"dilation": 4}, r"it spans 9 \(3 with dilation 4\), and there are 8",
    ),
    "channels": ("conv2d", (_x(2, 5, 5, 5), _x(4, 3, 3, 3)), {}, "input must have 3 channels.*got 5"),
    "channels of groups": ("conv2d", (_x(2, 3, 5, 5), _x(4, 2, 3, 3)), {"groups": 2}, "input must have 4 channels.*3"),
    "groups": ("conv2d", (_x(2, 4, 5, 5), _x(3, 2, 3, 3)), {"groups": 2}, "positive multiple of groups = 2"),
    "no groups": ("conv2d", (_x(2, 3, 5, 5), _x(4, 3, 3, 3)), {"groups": 0}, "groups must be at least 1, got 0"),
    "no outputs": ("conv2d", (_x(2, 3, 5, 5), _x(0, 3, 3, 3)), {}, "positive multiple of groups"),
    "padding": ("conv2d", (_x(2, 3, 5, 5), _x(4, 3, 3, 3)), {"padding": -1}, "padding must not be negative, got -1"),
    "stride": ("conv2d", (_x(2, 3, 5, 5), _x(4, 3, 3, 3)), {"stride": 0}, "stride must be at least 1, got 0"),
    "dilation": ("conv2d", (_x(2, 3, 5, 5), _x(4, 3, 3, 3)), {"dilation": 0}, "dilation must be at least 1, got 0"),
    "bias": ("conv2d", (_x(2, 3, 5, 5), _x(4, 3, 3, 3), _x(3)), {}, r"bias must have shape \(4,\), got \[3\]"),
    "input dimensions": ("conv2d", (_x(2, 3), _x(4, 3, 3, 3)), {}, r"\(batch, channels, height, width\).*got \[2, 3\]"),
    "weight dimensions": ("conv2d", (_x(2, 3, 5, 5), _x(4, 3, 3)), {}, r"weight must have 4 dimensions.*\[4, 3, 3\]"),
    "empty image": ("conv2d", (_x(2, 3, 0, 5), _x(4, 3, 3, 3)), {"padding": 2}, "must not be empty"),
    "empty kernel": ("conv2d", (_x(2, 3, 5, 5), _x(4, 3, 0, 3)), {}, "kernel must have at least one element"),
    "strides": ("conv2d", (_x(2, 3, 5, 5), _x(4, 3, 3, 3)), {"stride": (1, 1, 1)}, r"stride must be.*got \(1, 1, 1\)"),
    "fraction": ("conv2d", (_x(2, 3, 5, 5), _x(4, 3, 3, 3)), {"stride": 2.0}, "stride must be.*got 2.0"),
    "padding mode": (
        "conv2d", (_x(2, 3, 5, 5), _x(4, 3, 3, 3)), {"padding": "full"}, "padding must be 'same', 'valid'.*'full'",
    ),
    "same with stride": (
        "conv2d", (_x(2, 3, 5, 5), _x(4, 3, 3, 3)), {"padding": "same", "stride": 2}, "padding='same' needs stride 1",
    ),
    "dtype": ("conv2d", (_x(2, 3, 5, 5), _x(4, 3, 3, 3).double()), {}, "weight must have input's dtype torch.float32"),
    "bias dtype": ("conv2d", (_x(2, 3, 5, 5), _x(4, 3, 3, 3), _x(4).double()), {}, "bias must have input's dtype"),
    "not a tensor": ("conv3d", (_x(2, 3, 5, 5, 5), None), {}, "weight must be a Tensor, got None"),
    "output padding": (
        "conv_transpose2d", (_x(2, 3, 5, 5), _x(3, 4, 3, 3)), {"output_padding": 1}, "output_padding must not .* got 1",
    ),
    "negative output padding": (
        "conv_transpose2d", (_x(2, 3, 5, 5), _x(3, 4, 3, 3)), {"stride": 2, "output_padding": -1}, "got -1",
    ),
    "transposed channels": ("conv_transpose2d", (_x(2, 3, 5, 5), _x(4, 4, 3, 3)), {}, "input must have 4 channels"),
    "transposed bias": ("conv_transpose1d", (_x(2, 3, 5), _x(3, 4, 3), _x(3)), {}, r"bias must have shape \(4,\)"),
    "nothing left": ("conv_transpose2d", (_x(2, 3, 1, 1), _x(3, 4, 3, 3)), {"padding": 2}, "would have -1 elements"),
    "transposed same": ("conv_transpose1d", (_x(2, 3, 5), _x(3, 4, 3)), {"padding": "same"}, "must be a number.*same"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_pytorch_refuses_is_refused_with_a_reason(what):
    name, arguments, kwargs, message = REFUSED[what]
    with pytest.raises((RuntimeError, TypeError, ValueError)) as theirs:
        getattr(F, name)(*arguments, **kwargs)
    with pytest.raises(theirs.type, match=f"{name}: .*{message}"):
        getattr(FF, name)(*arguments, **kwargs)


def test_what_only_pytorch_takes_goes_to_pytorch():
    x, w = torch.randn(2, 3, 5, 5), torch.randn(4, 3, 3, 3)
    calls = {
        "complex": ((x.to(torch.complex64), w.to(torch.complex64)), {}),
        "integers": ((x.long(), w.long()), {}),
        "stride in a tensor": ((x, w), {"stride": torch.tensor(2)}),
        "no elements left": ((torch.randn(2, 3, 0, 0), torch.randn(3, 4, 2, 2)), {}),
    }
    for name, (arguments, kwargs) in calls.items():
        try:
            expected = F.conv2d(*arguments, **kwargs)
        except RuntimeError as error:
            with pytest.raises(type(error)):
                FF.conv2d(*arguments, **kwargs)
            continue
        with fastops.record() as rows:
            actual = FF.conv2d(*arguments, **kwargs)
        assert [row.kernel for row in rows] == ["aten"], name
        torch.testing.assert_close(actual, expected)


def test_numbers_in_every_form():
    x, w = torch.randn(2, 3, 9, 9), torch.randn(4, 3, 3, 3)
    expected = FF.conv2d(x, w, stride=2, padding=1)
    for stride, padding in (((2, 2), [1, 1]), ([2], (1,)), (torch.Size([2, 2]), torch.Size([1]))):
        exact(FF.conv2d(x, w, stride=stride, padding=padding), expected)


def test_tensor_subclass_goes_to_pytorch():
    seen = []

    class Loud(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            seen.append(function)
            return super().__torch_function__(function, types, args, kwargs)

    output = FF.conv2d(torch.randn(1, 3, 5, 5).as_subclass(Loud), torch.randn(4, 3, 3, 3), activation="relu")
    assert type(output) is Loud
    assert F.conv2d in seen


@pytest.mark.parametrize("conv", [CONVS[7], CONVS[21], CONVS[24], CONVS[28]], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(conv, dtype):
    x, w, b = leaves(*operands(conv, torch.float32))
    with torch.autocast("cpu", dtype):
        output = conv.ours(x, w, b, activation="relu")
        theirs = F.relu(conv.theirs(x, w, b))
    assert output.dtype == theirs.dtype == dtype
    torch.testing.assert_close(output, theirs, atol=0.05, rtol=0.05)
    output.float().sum().backward()
    assert x.grad.dtype == w.grad.dtype == b.grad.dtype == torch.float32


def test_large_outputs_come_from_the_pool():
    x, w = torch.randn(4, 1, 256, 256), torch.randn(16, 1, 3, 3)
    before = fastops.memory.stats()
    FF.conv2d(x, w)
    after = fastops.memory.stats()
    assert after["hits"] + after["misses"] == before["hits"] + before["misses"] + 1


def test_sizes_beyond_two_to_the_31_elements():
    """4 GB of address space, of which only the touched pages of 4 KB exist."""
    channels, length, stride = 8, 2**28 + 8, 2**18
    memory = mmap.mmap(-1, 2 * channels * length)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    x = torch.frombuffer(memory, dtype=torch.bfloat16).view(1, channels, length)
    x[:, :, ::stride] = integers(1, channels, -(-length // stride), dtype=torch.bfloat16)
    w = integers(3, channels, 1, dtype=torch.bfloat16)
    exact(FF.conv1d(x, w, stride=stride), FF.conv1d(x[:, :, ::stride].contiguous(), w))


class TestModule:
    KINDS = (
        ("Conv1d", (4, 8, 3), (4, 9)),
        ("Conv2d", (4, 8, 3), (4, 7, 9)),
        ("Conv3d", (4, 8, 3), (4, 5, 6, 7)),
        ("ConvTranspose1d", (4, 8, 3), (4, 9)),
        ("ConvTranspose2d", (4, 8, 3), (4, 7, 9)),
        ("ConvTranspose3d", (4, 8, 3), (4, 3, 4, 5)),
    )

    @pytest.mark.parametrize(("name", "arguments", "shape"), KINDS)
    @pytest.mark.parametrize("kwargs", [{}, {"stride": 2, "padding": 1, "groups": 2, "dilation": 2, "bias": False}])
    def test_same_as_torch(self, name, arguments, shape, kwargs):
        torch.manual_seed(3)
        ours = getattr(fnn, name)(*arguments, **kwargs)
        torch.manual_seed(3)
        theirs = getattr(torch.nn, name)(*arguments, **kwargs)
        for x in (torch.randn(2, *shape), torch.randn(shape)):
            torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)
        assert repr(ours) == repr(theirs)
        assert list(ours.state_dict()) == list(theirs.state_dict())
        assert vars(ours).keys() == vars(theirs).keys()
        theirs.load_state_dict(ours.state_dict())

    @pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
    @pytest.mark.parametrize("padding", [(2, 1), "same"], ids=str)
    def test_padding_modes(self, mode, padding):
        ours = fnn.Conv2d(3, 4, 3, padding=padding, padding_mode=mode, activation="relu")
        theirs = torch.nn.Conv2d(3, 4, 3, padding=padding, padding_mode=mode)
        theirs.load_state_dict(ours.state_dict())
        x = torch.randn(2, 3, 8, 9)
        torch.testing.assert_close(ours(x), F.relu(theirs(x)), atol=1e-5, rtol=1e-5)

    def test_output_size(self):
        ours = fnn.ConvTranspose2d(3, 4, 3, stride=2, padding=1)
        theirs = torch.nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1)
        theirs.load_state_dict(ours.state_dict())
        x = torch.randn(2, 3, 5, 6)
        for size in (None, [9, 12], [2, 4, 10, 11]):
            torch.testing.assert_close(ours(x, size), theirs(x, size), atol=1e-5, rtol=1e-5)
        with pytest.raises(ValueError, match="requested an output size"):
            ours(x, [8, 12])
        with pytest.raises(ValueError, match="padding mode"):
            fnn.ConvTranspose2d(3, 4, 3, padding_mode="reflect")

    @pytest.mark.parametrize("activation", ["relu", torch.nn.LeakyReLU(0.2), fnn.GELU("tanh")], ids=str)
    @pytest.mark.parametrize("name", ["Conv2d", "ConvTranspose2d"])
    def test_activation(self, name, activation):
        import copy
        import pickle

        layer = getattr(fnn, name)(3, 5, 3, activation=activation)
        x = torch.randn(2, 3, 6, 6)
        function = F.relu if activation == "relu" else activation
        plain = getattr(torch.nn, name)(3, 5, 3)
        plain.load_state_dict(layer.state_dict())
        torch.testing.assert_close(layer(x), function(plain(x)), atol=1e-5, rtol=1e-5)
        assert list(layer.state_dict()) == ["weight", "bias"]
        assert list(layer.children()) == []
        assert repr(activation) in repr(layer)
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            torch.testing.assert_close(other(x), layer(x))
        layer.activation = "tanh"
        torch.testing.assert_close(layer(x), torch.tanh(plain(x)), atol=1e-5, rtol=1e-5)
        with pytest.raises(ValueError, match="swoosh"):
            layer.activation = "swoosh"

    def test_channels_last_model(self):
        model = torch.nn.Sequential(fnn.Conv2d(3, 8, 3, activation="relu"), fnn.Conv2d(8, 4, 1))
        x = torch.randn(2, 3, 9, 9)
        expected = model(x)
        model.to(memory_format=torch.channels_last)
        output = model(x.contiguous(memory_format=torch.channels_last))
        assert output.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
        output.sum().backward()
        assert model[0].weight.grad.is_contiguous(memory_format=torch.channels_last)

    def test_hooks_and_functional_call(self):
        layer, seen = fnn.Conv2d(3, 2, 3, activation="relu"), []
        layer.register_forward_hook(lambda module, args, output: seen.append("forward"))
        layer.register_full_backward_hook(lambda module, grad_in, grad_out: seen.append("backward"))
        layer.weight.register_hook(lambda grad: seen.append("weight"))
        layer(torch.randn(4, 3, 5, 5, requires_grad=True)).sum().backward()
        assert sorted(seen) == ["backward", "forward", "weight"]
        x, w, b = torch.randn(4, 3, 5, 5), torch.randn(2, 3, 3, 3), torch.randn(2)
        actual = torch.func.functional_call(layer, {"weight": w, "bias": b}, x)
        torch.testing.assert_close(actual, F.relu(F.conv2d(x, w, b)), atol=1e-5, rtol=1e-5)

    def test_parametrized_and_pruned_weights(self):
        from torch.nn.utils import parametrizations, prune

        x = torch.randn(3, 6, 5, 5)
        layers = [
            parametrizations.weight_norm(fnn.Conv2d(6, 6, 3)),
            parametrizations.spectral_norm(fnn.Conv2d(6, 6, 3)).eval(),
            prune.l1_unstructured(fnn.Conv2d(6, 6, 3), "weight", amount=0.5),
        ]
        for layer in layers:
            torch.testing.assert_close(layer(x), F.conv2d(x, layer.weight, layer.bias), atol=1e-5, rtol=1e-5)

    def test_lazy_layers_of_torch_can_be_replaced_once_they_have_run(self):
        model = torch.nn.Sequential(torch.nn.LazyConv2d(4, 3))
        assert "lazy" in fastops.replace_(model).skipped[0].result
        expected = model(torch.ones(1, 3, 5, 5))
        assert len(fastops.replace_(model).replaced) == 1
        torch.testing.assert_close(model(torch.ones(1, 3, 5, 5)), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["conv1d", "conv_transpose1d"])
@pytest.mark.parametrize("arguments", [
    {"dilation": 2**62}, {"dilation": 2**63 - 1}, {"padding": 2**62}, {"dilation": 2**62 + 5, "padding": 2**62},
    {"dilation": 2**31, "padding": 2**31}, {"padding": 2**64},
], ids=str)  # fmt: skip
def test_numbers_whose_products_overflow(name, arguments):
    """They are refused, and nothing is read that does not exist. (PyTorch computes something in some of them.)"""
    x, w = torch.ones(1, 8, 40), torch.ones(8, 8, 3)
    with pytest.raises((RuntimeError, ValueError)):
        getattr(FF, name)(x, w, **arguments)


# ---- for the tests that call every op (every_op.py) -----------------------------------------------------------------

_KINDS = [(f"{kind}{dims}d", args) for kind, args in (("Conv", (4, 6, 3, 2, 1)), ("ConvTranspose", (4, 6, 3, 2)))
          for dims in (1, 2, 3)]  # fmt: skip


def test_gradients_of_an_added_residual():
    """What fastops.fuse makes of f(conv(x) + residual); every operand, one alone, and second derivatives."""
    x, w, b, r = (torch.randn(*shape, dtype=torch.float64) for shape in ((1, 2, 4), (3, 2, 3), (3,), (1, 3, 4)))
    for f in (None, "relu", "silu", "tanh", "gelu"):
        ours = functools.partial(convolve_1d, f)
        tensors = leaves(x, w, b, r)
        assert torch.autograd.gradcheck(ours, tensors, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(ours, tensors)
        for wanted in range(4):
            some = [t.detach().requires_grad_(i == wanted) for i, t in enumerate(tensors)]
            expected = activate(F.conv1d(*some[:3], padding=1) + some[3], f)
            g = torch.randn_like(expected)
            y = ours(*some)
            torch.testing.assert_close(y, expected)
            torch.testing.assert_close(
                torch.autograd.grad(y, some[wanted], g), torch.autograd.grad(expected, some[wanted], g)
            )
        with torch.no_grad():
            torch.testing.assert_close(ours(*tensors), y)


def convolve_1d(f, x, w, b, residual):
    return convolve(x, w, b, padding=1, activation=f, residual=residual)


OP_LAYERS = [("Conv2d", (4, 6, 2, 1, "same"))]
LAYERS = [*_KINDS, *OP_LAYERS, ("ConvTranspose2d", (4, 6, 3, 2, 1, 1)), ("Conv1d", (4, 8, 3, 1, 2, 2, 4))]


def calls(size):
    for name in fastops.functional._conv.__all__:
        dims = spatial(name)
        for inputs, outputs, kernel, groups in (
            (16, 24, 3, 1), (16, 24, 1, 1), (16, 16, 3, 16), (2, 16, 3, 1), (1, 16, 3, 1),
        ):  # fmt: skip
            images = (2, outputs if "transpose" in name else inputs, *(size,) * dims)
            yield call(name, images, (outputs, inputs // groups, *(kernel,) * dims), groups=groups)
        first, second = (2, 3) if "transpose" in name else (3, 2)
        yield call(name, (1, 2, *(size,) * dims), (first, second, *(3,) * dims), (3,))
    yield call("conv2d", (2, 1, size, size), (16, 1, 3, 3), needs=[1])


def kernels(dtype, on_gpu):
    if on_gpu:
        gemm = "conv_gemm_mma" if dtype == torch.bfloat16 else "conv_gemm_tf32"
        return {gemm: 3, "depthwise": 0, "depthwise_weight": 0}
    found = {
        "conv_first": 2, "conv_gemm": 2, "conv_planes": 0, "conv_scatter": 2, "depthwise": 0, "depthwise_last": 0,
    }  # fmt: skip
    return {**found, "winograd": 2} if dtype == torch.float32 else found


def random_conv(rng):
    dims = rng.randint(1, 3)
    groups = rng.choice((1, 1, 2))
    channels, outputs = groups * rng.choice((1, 2, 8, 16)), groups * rng.choice((1, 4, 16))
    name = rng.choice(("conv", "conv_transpose")) + f"{dims}d"
    kernel = (rng.randint(1, 3),) * dims
    first, second = (channels, outputs) if "transpose" in name else (outputs, channels)
    shapes = [(rng.randint(1, 3), channels, *sizes(rng, dims, 3, 7)), (first, second // groups, *kernel), (outputs,)]
    stride = rng.choice((1, 2))
    if rng.random() < 0.2 and kernel[0] == 1:
        shapes[0] = shapes[0][1:]  # no batch
    return call(name, *shapes, stride=stride, groups=groups, padding=kernel[0] // 2)


RANDOM_CALLS = [random_conv]


@pytest.mark.parametrize("images", [False, True], ids=["weight", "weight and images"])
@pytest.mark.parametrize(
    "layer",
    [
        lambda: nn.Conv2d(8, 8, 3, padding=1, groups=8),
        lambda: nn.Conv2d(8, 4, 1),
        lambda: nn.Conv2d(1, 8, 3),
        lambda: nn.Conv2d(8, 16, 3),
        lambda: nn.ConvTranspose2d(8, 8, 3, groups=8),
        lambda: nn.ConvTranspose2d(8, 4, 1),
        lambda: nn.Conv3d(8, 4, 1),
        lambda: nn.Conv3d(1, 8, 3),
    ],
    ids=[
        "depthwise",
        "1x1",
        "one channel",
        "3x3",
        "transposed depthwise",
        "transposed 1x1",
        "3d 1x1",
        "3d one channel",
    ],
)
def test_gradients_have_the_strides_of_weights(layer, images):
    """Also where both layouts are the same in memory: DDP warns if they differ, and copies."""
    plain = layer()
    dims = plain.weight.dim() - 2
    memory_format = torch.channels_last if dims == 2 else torch.channels_last_3d
    x = torch.randn(2, plain.in_channels, *[6] * dims)
    if images:
        x = x.contiguous(memory_format=memory_format)
    for model in (nn.Sequential(plain), nn.Sequential(layer()).to(memory_format=memory_format)):
        fastops.replace_(model)
        model(x).square().sum().backward()
        weight = model[0].weight
        assert weight.grad.stride() == weight.stride()
