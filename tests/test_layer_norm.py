"""layer_norm and rms_norm against a float64 reference: values and gradients, every dtype, tier, layout and edge."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from calls import Call, sizes
from compare import close, exact
from modes import Through
from reference import DTYPES, LAYOUTS, gradients
from torch import nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.library import opcheck

import fastops
import fastops.functional as FF
import fastops.nn as fnn
from fastops.ops import layer_norm as layer_norm_ops

OPS = torch.ops.fastops
HALF = [torch.bfloat16, torch.float16]

# (shape, dims): sizes around the vectors and their doubles, rows around the four that are computed together, sums
# longer than a block, and enough rows for several parts of the parameters' sums.
SHAPES = [
    ((1, 1), 1), ((3, 2), 1), ((4, 7), 1), ((5, 8), 1), ((1, 15), 1), ((7, 16), 1), ((9, 17), 1), ((2, 3, 31), 1),
    ((6, 32), 1), ((4, 33), 1), ((8, 64), 1), ((3, 65), 1), ((2, 129), 1), ((5, 5000), 1), ((70, 100), 1),
    ((2100, 5), 1), ((12,), 1), ((4, 3, 5), 2), ((2, 3, 4, 5), 3), ((6, 7), 2),
]  # fmt: skip

KINDS = ["layer_norm", "rms_norm"]
KIND = pytest.mark.parametrize("kind", KINDS)


def reference(kind, x, shape, *parameters, eps=1e-5):
    """In float64; rms_norm has no bias."""
    parameters = [None if p is None else p.double() for p in parameters]
    return getattr(F, kind)(x.double(), shape, *parameters, eps=eps)


def operands(kind, shape, dims, dtype, parameter_dtype=None):
    parameters = [(torch.rand(shape[-dims:]) + 0.5), torch.randn(shape[-dims:])][: 2 if kind == "layer_norm" else 1]
    return torch.randn(shape).to(dtype), *(p.to(parameter_dtype or dtype) for p in parameters)


def run(function, tensors, grad, place=torch.clone):
    leaves = [place(t.detach()).requires_grad_() for t in tensors]
    y = function(*leaves)
    return [t.cpu() for t in (y, *gradients(y, grad.to(y.device), *leaves))]


def compare(kind, tensors, dims, grad, present=None, eps=1e-5, place=torch.clone):
    """present: which parameters are given. place: onto the device of ours."""
    shape, grad = tensors[0].shape[-dims:], grad.to(tensors[0].dtype)
    count = len(tensors) - 1
    present = present or [True] * count

    def of(function):
        def call(x, *given):
            given = iter(given)
            return function(x, shape, *(next(given) if on else None for on in present), eps=eps)

        return call

    used = [tensors[0], *(t for t, on in zip(tensors[1:], present, strict=True) if on)]
    ours, theirs = run(of(getattr(FF, kind)), used, grad, place), run(of(getattr(F, kind)), used, grad)
    wide = run(of(lambda x, *rest, eps: reference(kind, x, *rest, eps=eps)), [t.double() for t in used], grad)
    rows = tensors[0].numel() // math.prod(shape)
    last, x = list(range(-dims, 0)), tensors[0].double()
    variance = x.square().mean(last) if kind == "rms_norm" else x.var(last, correction=0)
    largest = float((variance + eps).rsqrt().max())  # a factor of the terms of input's gradient
    names = "output", "input", *(n for n, on in zip(("weight", "bias"), present, strict=False) if on)
    for name, *three in zip(names, ours, wide, theirs, strict=True):
        # Sums over rows are rounded once; what cancels in them is of the size of a normal number for each row.
        least = {"output": 1.0, "input": largest}.get(name, math.sqrt(rows))
        close(*three, name, max(rows, math.prod(shape)), 4.0, least)


@KIND
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients(isa, kind, dtype):
    for shape, dims in SHAPES:
        tensors = operands(kind, shape, dims, dtype)
        compare(kind, tensors, dims, torch.randn(shape))


@pytest.mark.parametrize("dtype", HALF)
def test_16_bits_with_float32_parameters(isa, dtype):
    for shape, dims in SHAPES:
        tensors = operands("layer_norm", shape, dims, dtype, torch.float32)
        y = FF.layer_norm(tensors[0], shape[-dims:], *tensors[1:])
        assert y.dtype == dtype
        compare("layer_norm", tensors, dims, torch.randn(shape))


@KIND
def test_parameters_that_are_missing(isa, kind):
    for dtype in DTYPES:
        tensors = operands(kind, (9, 37), 1, dtype)
        for present in [[False, False], [True, False], [False, True]] if kind == "layer_norm" else [[False]]:
            compare(kind, tensors, 1, torch.randn(9, 37), present)


@KIND
def test_large_means_and_eps(isa, kind):
    tensors = operands(kind, (6, 100), 1, torch.float32)
    for offset, eps in ((100.0, 1e-5), (0.0, 0.0), (0.0, 1.0), (-3.0, 1e-12)):
        compare(kind, (tensors[0] + offset, *tensors[1:]), 1, torch.randn(6, 100), eps=eps)


def test_rms_norm_without_eps(isa):
    for dtype in DTYPES:
        x = (1e-3 * torch.randn(4, 19)).to(dtype)
        close(FF.rms_norm(x, (19,)), F.rms_norm(x.double(), (19,), eps=torch.finfo(dtype).eps if dtype.itemsize > 2
              else torch.finfo(torch.float32).eps), F.rms_norm(x, (19,)))  # fmt: skip


@KIND
def test_bits_for_1_and_2_threads_and_any_batch(isa, kind):
    for shape in ((700, 97), (4, 56, 56, 24), (3, 50000)):
        tensors, grad = operands(kind, shape, 1, torch.float32), torch.randn(shape)
        if len(shape) == 4:
            tensors = (tensors[0].permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1), *tensors[1:])
        results = []
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            leaves = [t.detach().requires_grad_() for t in tensors]
            y = getattr(FF, kind)(leaves[0], shape[-1:], *leaves[1:])
            results.append((y, *gradients(y, grad, *leaves)))
        for other in results[1:]:
            for one, two in zip(results[0], other, strict=True):
                assert torch.equal(one, two)
        # A row has the same bits whatever is beside it.
        assert torch.equal(getattr(FF, kind)(tensors[0][1:2], shape[-1:], *tensors[1:]), results[0][0][1:2])


def images(dtype, shape=(2, 19, 5, 7)):
    """Images whose channels are at the end: what torchvision's LayerNorm2d normalises."""
    x = torch.randn(shape).to(dtype)
    yield "channels_last", x.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)
    yield "channels_first", x.permute(0, 2, 3, 1)
    yield "part of a batch", torch.randn(2 * shape[0], *shape[1:]).to(dtype)[::2].permute(0, 2, 3, 1)
    more = torch.randn(shape[0], 2 * shape[1], *shape[2:]).to(dtype)
    yield "part of the channels", more[:, 1 : 1 + shape[1]].permute(0, 2, 3, 1)
    yield "part of an image", torch.randn(*shape[:3], 9).to(dtype)[..., :7].permute(0, 2, 3, 1)
    yield "one image", x[0].permute(1, 2, 0)
    yield "a sequence", x.flatten(2).mT


@KIND
@pytest.mark.parametrize("dtype", DTYPES)
def test_images(isa, kind, dtype):
    """In place of a copy: the same result as from the copy, bit for bit."""
    for channels, height in ((19, 5), (1, 3), (16, 16), (33, 1)):
        for name, x in images(dtype, (2, channels, height, 7)):
            tensors = operands(kind, (1, channels), 1, dtype)
            grad = torch.randn(x.shape).to(dtype)
            results = []
            for one in (x, x.contiguous()):
                leaves = [t.detach().requires_grad_() for t in (one, *tensors[1:])]
                y = getattr(FF, kind)(leaves[0], (channels,), *leaves[1:])
                assert y.is_contiguous(), name
                results.append((y, *gradients(y, grad, *leaves)))
            for i, (one, two) in enumerate(zip(*results, strict=True)):
                if i < 2:
                    exact(one, two, name)
                else:  # the rows of a part of the sum are others
                    torch.testing.assert_close(one, two)
            compare(kind, (x, *tensors[1:]), 1, grad)


def test_images_are_not_copied():
    x = torch.randn(2, 32, 8, 8)
    for image, kernel in ((x.contiguous(memory_format=torch.channels_last), "rows"), (x, "transposed_rows")):
        with fastops.record() as rows:
            FF.layer_norm(image.permute(0, 2, 3, 1), (32,))
        assert [row.kernel.rpartition("_avx")[0] or row.kernel for row in rows] == [kernel] or rows[
            0
        ].kernel.startswith(kernel)


@KIND
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(isa, kind, layout):
    for shape, dims in (((5, 19), 1), ((3, 4, 33), 1), ((3, 4, 5), 2)):
        x = LAYOUTS[layout](shape, torch.float32)
        tensors = (x, *operands(kind, shape, dims, torch.float32)[1:])
        compare(kind, tensors, dims, LAYOUTS[layout](shape, torch.float32))
        results = []
        for one in (x, x.contiguous()):
            results.append(getattr(FF, kind)(one, shape[-dims:], *tensors[1:]))
        torch.testing.assert_close(*results)


@KIND
def test_parameters_of_any_strides(kind):
    x = torch.randn(6, 10)
    wide = [torch.rand(20)[::2], torch.rand(1).expand(10), torch.rand(10).flip(0)]
    for w in wide:
        parameters = (w, w) if kind == "layer_norm" else (w,)
        torch.testing.assert_close(
            getattr(FF, kind)(x, (10,), *parameters, eps=1e-5), getattr(F, kind)(x, (10,), *parameters, eps=1e-5)
        )


@KIND
def test_empty_tensors(kind):
    for shape, dims in (((0, 5), 1), ((3, 0), 1), ((0,), 1), ((2, 0, 4), 2), ((2, 0, 4), 1)):
        tensors = [t.requires_grad_() for t in operands(kind, shape, dims, torch.float32)]
        y = getattr(FF, kind)(tensors[0], shape[-dims:], *tensors[1:])
        assert y.shape == shape
        y.sum().backward()
        for t in tensors:
            assert t.grad.shape == t.shape
            assert not t.grad.any()


@KIND
def test_nan_and_infinity(isa, kind):
    for value in (math.nan, math.inf, -math.inf, 1e30):
        for dtype in DTYPES:
            x = torch.randn(6, 21).to(dtype)
            x[1, 3] = value
            x[5, 20] = value
            w = torch.rand(21).to(dtype)
            ours, theirs = getattr(FF, kind)(x, (21,), w), getattr(F, kind)(x, (21,), w)
            rows = [0, 2, 3, 4]  # the others keep their values
            torch.testing.assert_close(ours[rows], theirs[rows])
            if not math.isfinite(value):
                assert torch.equal(torch.isnan(ours), torch.isnan(theirs))
    zero = torch.zeros(3, 8)
    torch.testing.assert_close(getattr(FF, kind)(zero, (8,), eps=1e-5), zero)


@KIND
@pytest.mark.parametrize("needs", [[0], [1], [0, 1], [2], [0, 2], [1, 2]])
def test_only_the_gradients_asked_for(kind, needs):
    if kind == "rms_norm" and 2 in needs:
        return
    tensors = operands(kind, (9, 33), 1, torch.float32)
    for i in needs:
        tensors[i].requires_grad_()
    results = [
        gradients(f(tensors[0], (33,), *tensors[1:], eps=1e-5), torch.ones(9, 33), *(tensors[i] for i in needs))
        for f in (getattr(FF, kind), getattr(F, kind))
    ]
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-4)


def pair(kind, dims):
    def of(module):
        return lambda x, *p: getattr(module, kind)(x, x.shape[x.dim() - dims :], *p, eps=1e-3)

    return of(FF), of(F)


def double(*tensors):
    return tuple(t.double().detach().requires_grad_() for t in tensors)


@KIND
def test_double_backward(kind):
    for shape, dims in (((3, 5), 1), ((2, 2, 3), 2)):
        ours, _ = pair(kind, dims)
        tensors = double(*operands(kind, shape, dims, torch.float64))
        assert torch.autograd.gradcheck(ours, tensors, check_forward_ad=True, check_batched_grad=True)
        assert torch.autograd.gradgradcheck(ours, tensors, check_fwd_over_rev=True, check_rev_over_rev=True)
        with Through():
            assert torch.autograd.gradgradcheck(ours, tensors)


@KIND
def test_func(kind):
    ours, _ = pair(kind, 1)

    def theirs(x, w, b=0.0):  # the second derivative of PyTorch's layer_norm by weight and input is wrong (2.13)
        x = x if kind == "rms_norm" else x - x.mean(-1, keepdim=True)
        return x * (x.square().mean(-1, keepdim=True) + 1e-3).rsqrt() * w + b

    tensors = [t.detach() for t in operands(kind, (3, 4), 1, torch.float64)]
    every = tuple(range(len(tensors)))
    batch = [torch.stack([t, -t, 2 * t]) for t in tensors]

    def same(transform):
        results = [transform(lambda *t, f=f: f(*t).pow(3).sum()) for f in (ours, theirs)]
        torch.testing.assert_close(*results)

    same(lambda f: grad(f, every)(*tensors))
    same(lambda f: jvp(f, tuple(tensors), tuple(tensors)))
    same(lambda f: hessian(f, every)(*tensors))
    same(lambda f: jacrev(jacrev(f, every), every)(*tensors))
    same(lambda f: jacfwd(jacfwd(f, every), every)(*tensors))
    rest = (None,) * (len(tensors) - 1)
    same(lambda f: vmap(grad(f, every), (0, *rest))(batch[0], *tensors[1:]))
    same(lambda f: vmap(grad(f, every))(*batch))
    same(lambda f: vmap(f, (None, *[0] * len(rest)))(tensors[0], *batch[1:]))
    same(lambda f: vmap(vmap(f, (0, *rest)), (0, *rest))(torch.stack(batch[:1] * 2), *tensors[1:]))
    same(lambda f: grad(lambda t: vmap(f, (0, *rest))(t, *tensors[1:]).sum())(batch[0]))


def test_opcheck():
    for rms in (False, True):
        x, w, b = double(torch.randn(3, 4, 5), torch.randn(4, 5), torch.randn(4, 5))
        for parameters in ((w, None), (None, None)) if rms else ((w, b), (None, b), (None, None)):
            opcheck(OPS.layer_norm_forward, (x, *parameters, 2, 1e-5, rms))
        _, mean, rstd = OPS.layer_norm_forward(x.detach(), w, None, 2, 1e-5, rms)
        g = torch.randn_like(x).requires_grad_()
        for weight, mask in ((w, [True, True, True]), (w, [False, True, False]), (None, [True, False, False])):
            opcheck(OPS.layer_norm_backward, (g, x, mean, rstd, weight, 2, 1e-5, rms, mask))


@KIND
@pytest.mark.parametrize("dtype", DTYPES)
def test_both_doors(kind, dtype):
    for shape in ((5, 13), (2, 3, 4)):
        tensors = operands(kind, shape, 1, dtype)

        def ours(x, *parameters, shape=shape):
            return getattr(FF, kind)(x, shape[-1:], *parameters)

        results = [run(ours, tensors, torch.ones(shape))]
        with Through():
            results.append(run(ours, tensors, torch.ones(shape)))
        for one, two in zip(*results, strict=True):
            exact(one, two)


@KIND
def test_second_derivatives_of_the_backward_op(kind):
    """Where layer_norm_backward itself is differentiated."""
    rms = kind == "rms_norm"
    x, w, g = double(torch.randn(3, 5), torch.randn(5), torch.randn(3, 5))

    def through(g, x, w):
        _, mean, rstd = OPS.layer_norm_forward(x.detach(), w.detach(), None, 1, 1e-3, rms)
        return OPS.layer_norm_backward(g, x, mean, rstd, w, 1, 1e-3, rms, [True, True, True])

    def direct(g, x, w):
        return layer_norm_ops._gradients(g, x, w, 1, 1e-3, rms, [True, True, True])

    cotangents = [torch.randn_like(t) for t in direct(g, x, w)]
    results = [torch.autograd.grad(f(g, x, w), (g, x, w), cotangents) for f in (through, direct)]
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two)


@KIND
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(kind, dynamic, monkeypatch):
    monkeypatch.setattr(fastops.functional._general, "_COMPILED_FROM", 0)  # else small inputs are PyTorch's
    torch._dynamo.reset()
    ours, theirs = pair(kind, 1)
    compiled = torch.compile(ours, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (3, 5):
        tensors = operands(kind, (rows, 8), 1, torch.float32)
        for one, two in zip(
            run(compiled, tensors, torch.ones(rows, 8)), run(theirs, tensors, torch.ones(rows, 8)), strict=True
        ):
            torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-4)


MODULES = [
    ("LayerNorm", (6,), {}), ("LayerNorm", ((4, 6),), {"eps": 1e-3}), ("LayerNorm", (6,), {"bias": False}),
    ("LayerNorm", (6,), {"elementwise_affine": False}), ("RMSNorm", (6,), {}), ("RMSNorm", ((4, 6),), {"eps": 1e-3}),
    ("RMSNorm", (6,), {"elementwise_affine": False}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "arguments", "options"), MODULES, ids=str)
def test_modules(name, arguments, options):
    ours, theirs = getattr(fnn, name)(*arguments, **options), getattr(nn, name)(*arguments, **options)
    assert repr(ours) == repr(theirs)
    for p in theirs.parameters():
        nn.init.normal_(p)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 4, 6)
    for module in (ours, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        with fastops.record() as rows:
            torch.testing.assert_close(module(x), theirs(x))
        assert [row.kernel == "aten" for row in rows] == [False]
    torch.testing.assert_close(torch.jit.script(ours)(x), theirs(x))
    torch.testing.assert_close(functional_call(ours, dict(theirs.named_parameters()), (x,)), theirs(x))
    model = nn.Sequential(theirs)
    expected = model(x)
    assert len(fastops.replace_(model).replaced) == 1
    torch.testing.assert_close(model(x), expected)
    program = torch.export.export(model, (x,))
    assert "fastops." not in program.graph_module.code
    torch.testing.assert_close(program.module()(x), expected)
    with fastops.export_kernels():
        program = torch.export.export(model, (x,))
    assert "fastops.layer_norm_forward" in program.graph_module.code
    plain = program.run_decompositions(fastops.decompositions())
    assert "fastops." not in plain.graph_module.code
    torch.testing.assert_close(plain.module()(x), expected)


@KIND
def test_autocast_leaves_the_dtype(kind):
    for dtype in DTYPES:
        x, *parameters = operands(kind, (3, 5), 1, dtype)
        with torch.autocast("cpu", torch.bfloat16):
            assert (
                getattr(FF, kind)(x, (5,), *parameters).dtype == getattr(F, kind)(x, (5,), *parameters).dtype == dtype
            )


def test_what_only_pytorch_takes_goes_to_pytorch():
    x = torch.randn(2, 8).bfloat16()
    with fastops.record() as rows:
        y = FF.rms_norm(x, (8,), torch.rand(8))  # float32 parameters: the result has their dtype
    assert [row.kernel for row in rows] == ["aten"]
    assert y.dtype == F.rms_norm(x, (8,), torch.rand(8)).dtype
    with fastops.record() as rows:
        FF.rms_norm(torch.randn(2, 8, dtype=torch.complex64), (8,))
    assert [row.kernel for row in rows] == ["aten"]


BAD = [
    ((2, 3), (4,), {}, r"input must have the last dimensions \(4,\), got shape \(2, 3\)"),
    ((2, 3), (), {}, "normalized_shape must be one or more sizes"),
    ((3,), (3, 3), {}, "input must have the last dimensions"),
    ((2, 3), (3,), {"weight": torch.ones(4)}, r"weight must have shape \(3,\), got \(4,\)"),
    ((2, 3), (3,), {"weight": torch.ones(3, 1)}, r"weight must have shape"),
    ((2, 3), 3, {}, "normalized_shape must be one or more sizes, got 3"),
    ((2, 3), (3,), {"eps": "a"}, None),
    ((2, 3), (3,), {"weight": 1.0}, "weight must be a Tensor, got 1.0"),
    (3.0, (3,), {}, "input must be a Tensor, got 3.0"),
]


@KIND
@pytest.mark.parametrize("bad", BAD, ids=lambda bad: str(bad[:3]))
def test_refuses_as_pytorch(kind, bad):
    shape, normalized, options, message = bad
    x = torch.randn(shape) if isinstance(shape, tuple) else shape
    try:
        getattr(F, kind)(x, normalized, **options)
    except Exception as error:
        refusal = error
    with pytest.raises(type(refusal), match=message):
        getattr(FF, kind)(x, normalized, **options)


def test_bias_is_checked():
    with pytest.raises(RuntimeError, match=r"bias must have shape \(3,\), got \(4,\)"):
        FF.layer_norm(torch.ones(2, 3), (3,), None, torch.ones(4))
    for dtypes in ((torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)):
        parameters = [torch.ones(3).to(dtype) for dtype in dtypes]
        with pytest.raises(RuntimeError):
            FF.layer_norm(torch.ones(2, 3).bfloat16(), (3,), *parameters)


# ---- for the tests that call every op (every_op.py) -----------------------------------------------------------------

LAYERS = [("LayerNorm", (6,)), ("RMSNorm", (6,))]
OP_LAYERS = [("LayerNorm", (6,))]


def calls(size):
    for kind in KINDS:
        parameters = [(40,)] * (2 if kind == "layer_norm" else 1)
        yield Call(kind, *(_normalised(module, kind, 1) for module in (FF, F)), [(3, 40), *parameters])
        yield Call(kind, *(_image(module, kind) for module in (FF, F)), [(2, 40, size, size), *parameters])


def _normalised(module, kind, dims):
    def call(x, *parameters):
        options = {} if kind == "layer_norm" else {"eps": 1e-5}
        return getattr(module, kind)(x, x.shape[x.dim() - dims :], *parameters, **options)

    return call


def _image(module, kind):
    call = _normalised(module, kind, 1)
    return lambda x, *parameters: call(x.movedim(1, -1), *parameters)


def kernels(dtype, on_gpu):
    return {"rows": 0, "transposed_rows": 0}


def random_layer_norm(rng):
    kind, dims = rng.choice(KINDS), rng.randint(1, 2)
    shape = (*sizes(rng, rng.randint(0, 3)), *sizes(rng, dims, 2, 20))
    parameters = [shape[-dims:]] * rng.randint(0, 2 if kind == "layer_norm" else 1)
    return Call(kind, *(_normalised(module, kind, dims) for module in (FF, F)), [shape, *parameters])


def random_image_norm(rng):
    kind = rng.choice(KINDS)
    shape = (rng.randint(1, 3), rng.randint(2, 20), *sizes(rng, rng.randint(1, 2)))
    return Call(kind, *(_image(module, kind) for module in (FF, F)), [shape, shape[1:2]])


RANDOM_CALLS = [random_layer_norm, random_image_norm]
