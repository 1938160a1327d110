"""fastops.enable(): fastops' kernels under PyTorch's own operators, and PyTorch's again."""

import contextlib
import copy
import os
import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from compare import close, exact
from fresh import run_python
from opinfo import op_db
from torch import nn

import fastops
from fastops import _C

_LAYERS = ["linear", *(f"conv{t}{n}d" for t in ("", "_transpose") for n in (1, 2, 3))]
_POOLS = [f"{kind}_pool{n}d" for kind in ("max", "avg", "adaptive_max", "adaptive_avg") for n in (1, 2, 3)]
_ACTIVATIONS = [
    "relu",
    "relu6",
    "leaky_relu",
    "elu",
    "selu",
    "celu",
    "gelu",
    "silu",
    "mish",
    "softplus",
    "hardtanh",
    "hardsigmoid",
    "hardswish",
    "hardshrink",
    "softshrink",
    "threshold",
    "glu",
]
_NORMS = ["batch_norm", "layer_norm", "rms_norm", "cross_entropy", "mse_loss"]
_FUNCTIONS = ["mm", "addmm", "matmul", "sigmoid", "tanh", "softmax", "log_softmax"]
OPS = [
    op
    for op in op_db
    if not op.variant_test_name
    and (op.name in _FUNCTIONS or op.name.removeprefix("nn.functional.") in _LAYERS + _POOLS + _ACTIVATIONS + _NORMS)
]


@pytest.fixture(autouse=True)
def _disabled():
    yield
    assert not _C.is_enabled()


def switched(on):
    return fastops.enabled() if on else contextlib.nullcontext()


def kernels(function, *args, **kwargs):
    """The result of a call, and the kernels that did it."""
    with fastops.record() as calls:
        result = function(*args, **kwargs)
    return result, [(row.op, row.kernel) for row in calls]


def taken(function, *args, **kwargs):
    rows = kernels(function, *args, **kwargs)[1]
    return bool(rows) and all(kernel != "aten" for _, kernel in rows)


class Functional(nn.Module):
    """Nothing but functions and operators, as in code that knows no module."""

    def __init__(self):
        super().__init__()
        self.filters = nn.Parameter(torch.randn(8, 3, 3, 3) * 0.2)
        self.weight = nn.Parameter(torch.randn(72, 10) * 0.2)
        self.bias = nn.Parameter(torch.randn(10))
        self.last = nn.Parameter(torch.randn(4, 10))

    def forward(self, x):
        return functional(x, self.filters, self.weight, self.bias, self.last)


def functional(x, filters, weight, bias, last):
    y = F.gelu(F.conv2d(x, filters, padding=1))
    y = F.avg_pool2d(F.max_pool2d(y, 2), 2, ceil_mode=True)
    y = F.adaptive_avg_pool2d(y, 3).flatten(1)
    y = torch.relu_(y @ weight + bias)
    return torch.tanh(F.linear(y, last))


def gradients(function, *tensors):
    """The result and, for a gradient of fixed numbers, those of the tensors."""
    y = function(*tensors)
    grad = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)
    wanted = [t for t in tensors if t.requires_grad]
    return [y.detach(), *torch.autograd.grad(y, wanted, grad)]


def model_gradients(model, x):
    return gradients(lambda x, *_: model(x), x, *model.parameters())


def strides(tensor):
    """The strides that mean something."""
    return [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size != 1]


def assert_all_close(actual, expected, **tolerance):
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, **tolerance)


# ---- what it computes


def _samples(op, dtype, **kwargs):
    samples = list(op.sample_inputs("cpu", dtype, **kwargs))
    for sample in samples[:: 1 + len(samples) // 200]:  # max pools have hundreds
        yield sample
        if not kwargs:
            yield sample.noncontiguous()


def _output(result):
    return result[0] if isinstance(result, tuple) else result


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_opinfo(op):
    """Values, strides and gradients of PyTorch's own samples."""
    for sample in _samples(op, torch.float32):
        expected = op(sample.input.clone(), *sample.args, **sample.kwargs)
        with fastops.enabled():
            actual = op(sample.input.clone(), *sample.args, **sample.kwargs)
        torch.testing.assert_close(actual, expected, rtol=2e-5, atol=2e-4, equal_nan=True)
        assert strides(_output(actual)) == strides(_output(expected))
    for sample in _samples(op, torch.float32, requires_grad=True):
        tensors = (sample.input, *sample.args, *sample.kwargs.values())
        inputs = [t for t in tensors if isinstance(t, torch.Tensor) and t.requires_grad]
        results = []
        for on in (False, True):
            with switched(on):
                output = _output(op(sample.input * 1, *sample.args, **sample.kwargs))
                grad = torch.linspace(-1, 1, output.numel()).reshape(output.shape)
                results.append(torch.autograd.grad(output, inputs, grad))
        for expected, actual in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected, rtol=2e-5, atol=2e-4, equal_nan=True)
            assert strides(actual) == strides(expected)


_CLASSES = torch.tensor([5, 0, 3])


def _norms(dtype):
    """(function, tensors) of what is taken."""
    weight, bias = torch.rand(6, dtype=dtype) + 0.5, torch.randn(6, dtype=dtype)
    image = torch.randn(3, 6, 5, 4, dtype=dtype)
    q, k, v = (torch.randn(2, 3, 7, 8, dtype=dtype) for _ in range(3))
    mask = torch.rand(7, 7) < 0.7
    mask[0] = True
    for x in (image, image.to(memory_format=torch.channels_last)):
        yield lambda x, w, b: F.batch_norm(x, None, None, w, b, training=True), (x, weight, bias)
        yield lambda x, w, b: F.batch_norm(x, torch.ones_like(w), torch.ones_like(w) * 2, w, b), (x, weight, bias)
    yield lambda x: F.batch_norm(x, None, None, training=True), (image,)
    yield lambda x, w, b: F.layer_norm(x, (6,), w, b), (torch.randn(5, 4, 6, dtype=dtype), weight, bias)
    yield lambda x: F.layer_norm(x, (5, 4)), (image,)
    yield lambda x, w: F.rms_norm(x, (6,), w), (torch.randn(5, 4, 6, dtype=dtype), weight)
    yield lambda x: F.rms_norm(x, (5, 4), eps=0.1), (image,)
    for reduction in ("none", "mean", "sum"):
        yield lambda x, t, r=reduction: F.mse_loss(x, t, reduction=r), (image, torch.randn_like(image))
        more = {"reduction": reduction, "ignore_index": 2, "label_smoothing": 0.1}
        yield lambda x, more=more: F.cross_entropy(x, torch.arange(5) % 4, **more), (torch.randn(5, 4, dtype=dtype),)
        yield lambda x, r=reduction: F.cross_entropy(x, _CLASSES, weight, reduction=r), (image[:, :, 0, 0].clone(),)
    for dim in (1, -1):
        yield lambda x, dim=dim: x.softmax(dim), (image,)
        yield lambda x, dim=dim: F.log_softmax(x, dim), (image,)
    for more in ({}, {"is_causal": True}, {"scale": 0.3}, {"attn_mask": mask}, {"attn_mask": mask.to(dtype)}):
        yield lambda q, k, v, more=more: F.scaled_dot_product_attention(q, k, v, **more), (q, k, v)
    turned = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    yield F.scaled_dot_product_attention, turned


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_norms_and_attention(dtype):
    """Values, strides, first and second derivatives, vmap and torch.func."""
    tolerance = {"rtol": 1e-4, "atol": 1e-4}
    for function, tensors in _norms(dtype):
        leaves = [t.detach().requires_grad_() for t in tensors]
        results, seconds, batched = [], [], []
        for on in (False, True):
            with switched(on):
                with fastops.record() as rows:
                    results.append(gradients(function, *leaves))
                assert bool(rows) == on
                assert all(row.kernel != "aten" for row in rows)
                results[-1].append(function(*tensors))
                # Of PyTorch's attentions this one alone has second derivatives.
                math = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
                with contextlib.nullcontext() if on else math:
                    first = torch.autograd.grad(function(*leaves).square().sum(), leaves, create_graph=True)
                    seconds.append(torch.autograd.grad(sum(g.square().sum() for g in first), leaves))
                each = torch.func.grad(lambda *t, f=function: f(*t).square().sum(), tuple(range(len(tensors))))
                batched.append(torch.func.vmap(each)(*(torch.stack([t, t]) for t in tensors)))
        assert_all_close(*results[::-1], **tolerance)
        for i in (0, -1):  # attention's gradients have the strides of their operands, as most gradients do
            assert strides(results[0][i]) == strides(results[1][i])
        assert_all_close(*seconds[::-1], rtol=1e-3, atol=1e-3)
        assert_all_close(*batched[::-1], **tolerance)


def _in_16_bits(dtype, parameters):
    """(function, tensors): what is taken of 16-bit inputs, with parameters of this dtype."""
    weight, bias = torch.rand(6, dtype=parameters) + 0.5, torch.randn(6, dtype=parameters)
    # Smaller ones are PyTorch's, where it is faster.
    image, rows = torch.randn(11, 6, 33, 31, dtype=dtype), torch.randn(60, 50, 6, dtype=dtype)
    for x in (image, image.to(memory_format=torch.channels_last)):
        yield lambda x, w, b: F.batch_norm(x, None, None, w, b, training=True), (x, weight, bias)
        yield lambda x, w, b: F.batch_norm(x, torch.ones_like(w), torch.ones_like(w) * 2, w, b), (x, weight, bias)
    yield lambda x, w, b: F.layer_norm(x, (6,), w, b), (rows, weight, bias)
    yield lambda x, w: F.layer_norm(x, (6,), w), (rows, weight)
    if parameters != dtype:
        return
    yield lambda x: F.batch_norm(x, None, None, training=True), (image,)
    yield lambda x: F.layer_norm(x, (50, 6)), (rows,)
    yield lambda x, w: F.rms_norm(x, (6,), w), (rows, weight)
    yield lambda x: x.softmax(-1), (image,)
    yield lambda x: F.log_softmax(x, 1), (image,)
    yield F.mse_loss, (image, torch.randn_like(image))
    yield lambda x: F.cross_entropy(x, torch.arange(60) % 50), (rows[..., 0].clone(),)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norms_in_16_bits(dtype):
    """As near to float64 as PyTorch's, in its dtypes and strides, with both halves of a step ours or one of them."""
    for parameters in (dtype, torch.float32):
        for function, tensors in _in_16_bits(dtype, parameters):
            leaves = [t.detach().requires_grad_() for t in tensors]
            exact_y = gradients(function, *(t.detach().double().requires_grad_() for t in tensors))
            steps = {}
            for forward in (False, True):
                for backward in (False, True):
                    with switched(forward), fastops.record() as first:
                        y = function(*leaves)
                    grad = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)
                    with switched(backward), fastops.record() as second:
                        steps[forward, backward] = [y.detach(), *torch.autograd.grad(y, leaves, grad)]
                    assert all(row.kernel != "aten" for row in (*first, *second))
                    assert bool(first) == forward
                    assert bool(second) or not backward or (forward, backward) == (False, True)
            theirs = steps[False, False]
            for which, actual in steps.items():
                for i, (a, t, e) in enumerate(zip(actual, theirs, exact_y, strict=True)):
                    assert a.dtype is t.dtype
                    assert strides(a) == strides(t)
                    close(a, e, t, f"{which} of {tensors[0].shape} {parameters}: {i}", terms=tensors[0].numel())


def test_running_statistics():
    results = []
    for on in (False, True):
        torch.manual_seed(0)
        model, x = nn.BatchNorm2d(6, momentum=0.3), torch.randn(3, 6, 5, 4)
        with switched(on):
            for _ in range(3):
                model(x)
            results.append([*model.state_dict().values(), model.eval()(x)])
    assert_all_close(*results[::-1])


def test_attention_that_is_pytorchs():
    q = torch.randn(2, 3, 7, 8)
    with fastops.enabled():
        for tensors, more in (
            ((q, q, q), {"dropout_p": 0.5}),
            ((q[0], q[0], q[0]), {}),
            ((q, q, q[..., :4]), {}),
            ((q, q, q), {"attn_mask": torch.randn(7, 7, requires_grad=True)}),
            ((q, q[:, :1], q[:, :1]), {"enable_gqa": True}),
        ):
            rows = kernels(F.scaled_dot_product_attention, *tensors, **more)[1]
            assert not any(op == "scaled_dot_product_attention" for op, _ in rows)
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            rows = kernels(F.scaled_dot_product_attention, q, q, q)[1]
            assert not any(op == "scaled_dot_product_attention" for op, _ in rows)
        with torch.autocast("cpu", torch.bfloat16):
            y, rows = kernels(F.scaled_dot_product_attention, q, q, q)
        assert y.dtype is torch.bfloat16
        assert [kernel for op, kernel in rows if op == "scaled_dot_product_attention"] != ["aten"]


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_other_dtypes_are_pytorchs(op):
    """Complex numbers and integers: the same bits, and the same refusals."""
    for dtype in (torch.complex64, torch.int64):
        if dtype not in op.supported_dtypes("cpu"):
            continue
        for sample in op.sample_inputs("cpu", dtype):
            expected = op(sample.input.clone(), *sample.args, **sample.kwargs)
            with fastops.enabled():
                actual = op(sample.input.clone(), *sample.args, **sample.kwargs)
            # PyTorch makes complex convolutions of real ones, which are ours.
            tolerance = {"rtol": 1e-5, "atol": 2e-4} if "conv" in op.name else {"rtol": 0, "atol": 0}
            torch.testing.assert_close(actual, expected, equal_nan=True, **tolerance)


@pytest.mark.parametrize("op", [op for op in OPS if op.error_inputs_func], ids=lambda op: op.name)
def test_errors_are_pytorchs(op):
    for error in op.error_inputs("cpu"):
        sample = error.sample_input
        with fastops.enabled(), pytest.raises(error.error_type, match=error.error_regex):
            op(sample.input, *sample.args, **sample.kwargs)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_functional_model(dtype, layout):
    model = Functional().to(dtype)
    x = torch.randn(4, 3, 12, 12, dtype=dtype).to(memory_format=layout).requires_grad_()
    expected = model_gradients(model, x)
    with fastops.enabled():
        actual, rows = kernels(model_gradients, model, x)
    tolerance = {torch.float32: 1e-4, torch.float64: 1e-10, torch.bfloat16: 1e-1}[dtype]
    assert_all_close(actual, expected, rtol=tolerance, atol=tolerance)
    assert [strides(a) for a in actual] == [strides(e) for e in expected]
    ops = {op for op, kernel in rows if kernel != "aten"}
    assert ops >= {"conv2d", "conv2d_backward_weight", "gelu", "gelu_backward", "max_pool2d", "mm", "relu", "linear"}


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_strides_of_convolutions(dtype, dims):
    """Compiled programs rely on the strides that PyTorch's own kernels give their results."""
    formats = [torch.contiguous_format, {1: None, 2: torch.channels_last, 3: torch.channels_last_3d}[dims]]
    for transposed in (False, True):
        for channels, groups in ((4, 1), (4, 4), (1, 1)):
            for x_format in filter(None, formats):
                for w_format in filter(None, formats):
                    x = torch.randn(2, channels, *[5] * dims, dtype=dtype).to(memory_format=x_format)
                    w = torch.randn(channels, channels // groups, *[3] * dims, dtype=dtype).to(memory_format=w_format)
                    x.requires_grad_(), w.requires_grad_()
                    name = f"conv{'_transpose' if transposed else ''}{dims}d"

                    def call(x, w, name=name, groups=groups):
                        return getattr(F, name)(x, w, padding=1, groups=groups)

                    expected = gradients(call, x, w)
                    with fastops.enabled():
                        actual = gradients(call, x, w)
                    both = [[strides(t) for t in tensors] for tensors in (actual, expected)]
                    assert both[0] == both[1], (name, x_format, w_format, channels, groups)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("name", ["max_pool", "avg_pool", "adaptive_max_pool", "adaptive_avg_pool"])
def test_strides_of_pools(name, dims):
    x = torch.randn(2, 3, *[6] * dims).to(memory_format={2: torch.channels_last, 3: torch.channels_last_3d}[dims])
    pool = getattr(F, f"{name}{dims}d")
    for size in (1, 2):

        def call(x, size=size):
            return pool(x, size)

        expected = gradients(call, x.clone().requires_grad_())
        with fastops.enabled():
            actual = gradients(call, x.clone().requires_grad_())
        assert_all_close(actual, expected)
        assert [strides(a) for a in actual] == [strides(e) for e in expected]


def test_in_place():
    for name in ("relu_", "sigmoid_", "tanh_"):
        x = torch.randn(50, requires_grad=True)
        expected = gradients(lambda x, name=name: getattr(torch, name)(x * 2), x)
        with fastops.enabled():
            actual, rows = kernels(gradients, lambda x, name=name: getattr(torch, name)(x * 2), x)
            y = x.detach().clone()
            version = y._version
            assert getattr(torch, name)(y) is y
            assert y._version == version + 1
        assert_all_close(actual, expected)
        assert rows[0][1] != "aten"


def test_second_derivatives():
    x = torch.randn(3, 2, 6, 6, dtype=torch.float64, requires_grad=True)
    w = torch.randn(4, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    v = torch.randn(5, 16, dtype=torch.float64, requires_grad=True)

    def f(x, w, v):
        return F.linear(F.max_pool2d(torch.tanh(F.conv2d(x, w)), 2).flatten(1), v)

    with fastops.enabled():
        assert torch.autograd.gradcheck(f, (x, w, v))
        assert torch.autograd.gradgradcheck(f, (x, w, v))


def test_forward_and_backward_on_either_side():
    """What forward saved is good for the other's backward."""
    model = Functional()
    x = torch.randn(4, 3, 12, 12)
    expected = model_gradients(model, x)
    for first in (True, False):
        with switched(first):
            y = model(x)
        grad = torch.linspace(-1, 1, y.numel()).reshape(y.shape)
        with switched(not first):
            actual = torch.autograd.grad(y, tuple(model.parameters()), grad)
        assert_all_close(actual, expected[1:], rtol=1e-4, atol=1e-4)


# ---- the ways of PyTorch's dispatcher


def test_torch_func():
    model = Functional()
    x = torch.randn(4, 3, 12, 12)
    parameters = dict(model.named_parameters())

    def call(parameters, x):
        return torch.func.functional_call(model, parameters, (x,)).square().sum()

    def every_way(x):
        per_sample = torch.func.vmap(torch.func.grad(call), (None, 0))(parameters, x.unsqueeze(1))
        tangent = torch.func.jvp(lambda x: call(parameters, x), (x,), (torch.ones_like(x),))[1]
        hessian = torch.func.hessian(lambda w: F.linear(x.flatten(1)[:, :4], w).tanh().sum())(torch.ones(2, 4))
        ensemble = torch.func.vmap(F.linear, (None, 0, None))(x.flatten(1), torch.ones(3, 5, 432), torch.ones(5))
        return [*per_sample.values(), tangent, hessian, ensemble]

    expected = every_way(x)
    with fastops.enabled():
        actual, rows = kernels(every_way, x)
    assert_all_close(actual, expected, rtol=1e-3, atol=1e-3)
    assert any(kernel != "aten" for _, kernel in rows)


def test_forward_mode():
    x, w = torch.randn(3, 4), torch.randn(2, 4)
    with fastops.enabled(), torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        tangent = torch.autograd.forward_ad.unpack_dual(F.linear(dual, w)).tangent
    torch.testing.assert_close(tangent, torch.ones_like(x) @ w.t())


def test_autocast():
    x, w = torch.randn(8, 16, requires_grad=True), torch.randn(4, 16, requires_grad=True)
    with torch.autocast("cpu"):
        expected = gradients(F.linear, x, w)
        with fastops.enabled():
            actual, rows = kernels(gradients, F.linear, x, w)
    assert actual[0].dtype is torch.bfloat16
    assert actual[1].dtype is torch.float32
    assert_all_close(actual, expected, rtol=2e-2, atol=2e-2)
    assert all(kernel != "aten" for _, kernel in rows)


def test_inference_mode():
    model = Functional()
    x = torch.randn(4, 3, 12, 12)
    expected = model(x).detach()
    with fastops.enabled():
        with torch.inference_mode():
            y, rows = kernels(model, x.clone())
            assert y.is_inference()
            assert not taken(torch.neg, x)
        again = model(x)
    assert again.requires_grad
    torch.testing.assert_close(y.clone(), expected, rtol=1e-4, atol=1e-4)
    assert {"mm", "max_pool2d", "conv2d"} <= {op for op, kernel in rows if kernel != "aten"}


FIRST_CALL = """
import torch, fastops, torch.nn.functional as F
fastops.enable()
x, w = torch.ones(4, 8), torch.ones(3, 8, requires_grad=True)
with torch.inference_mode():
    F.linear(x, w), F.max_pool2d(x[None, None], 2), torch.relu(x.clone())
F.linear(x, w).sum().backward()
assert w.grad.eq(4).all()
with fastops.record() as calls:
    F.linear(x, w), torch.relu(x)
assert [row.kernel != "aten" for row in calls] == [True, True], calls
fastops.disable()
print("ok")
"""


def test_first_call_in_inference_mode():
    run = run_python(f"import warnings; warnings.simplefilter('error')\n{FIRST_CALL}")
    assert run.stdout.strip() == "ok", run.stderr
    assert "Overriding" not in run.stderr


def test_modes_see_pytorchs_ops():
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.flop_counter import FlopCounterMode

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.append(function.name())
            return function(*args, **(kwargs or {}))

    model, x = Functional(), torch.randn(4, 3, 12, 12)
    seen = []
    for on in (False, True):
        names = []
        with switched(on), Seen():
            model_gradients(model, x)
        with switched(on), FlopCounterMode(display=False) as flops:
            model_gradients(model, x)
        seen.append((names, flops.get_total_flops()))
    assert seen[0] == seen[1]


def test_traces_are_pytorchs():
    from torch.fx.experimental.proxy_tensor import make_fx

    model, x = Functional(), torch.randn(4, 3, 12, 12)

    def programs():
        exported = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("n", min=2)},))
        tensors = x, *(parameter.detach().clone() for parameter in model.parameters())
        code = make_fx(functional, tracing_mode="symbolic")(*tensors).code
        traced = [node.kind() for node in torch.jit.trace(model, x, check_trace=False).inlined_graph.nodes()]
        return exported.graph_module.code, exported.run_decompositions().graph_module.code, code, traced

    expected = programs()
    with fastops.enabled():
        assert programs() == expected


class Composed(nn.Module):
    """What is taken whole of what PyTorch composes of several ops."""

    def forward(self, x, target):
        y = F.rms_norm(x, x.shape[-1:])
        return F.cross_entropy(y, target) + F.mse_loss(y, x)


def test_traces_of_what_is_taken_whole():
    """Sizes are symbols, also that of the normalized dimension; autocast and inference mode give PyTorch's results."""
    model, x, target = Composed(), torch.randn(6, 8), torch.arange(6)
    sizes = ({0: torch.export.Dim("n", min=2), 1: torch.export.Dim("k", min=2)}, {0: torch.export.Dim("n", min=2)})

    def programs():
        exported = torch.export.export(model, (x, target), dynamic_shapes=sizes)
        return exported.graph_module.code, exported.run_decompositions().graph_module.code

    expected, y = programs(), model(x, target)
    with torch.autocast("cpu"):
        narrow = model(x.bfloat16(), target)
    with fastops.enabled():
        assert programs() == expected
        torch.testing.assert_close(torch.export.export(model, (x, target)).module()(x, target), y)
        actual, rows = kernels(model, x, target)
        torch.testing.assert_close(actual, y)
        assert [op for op, kernel in rows if kernel != "aten"] == ["rms_norm", "cross_entropy", "mse_loss"]
        with torch.inference_mode():
            torch.testing.assert_close(model(x, target), y)
        with torch.autocast("cpu"):
            again = model(x.bfloat16(), target)
        assert again.dtype is narrow.dtype
        torch.testing.assert_close(again, narrow, rtol=2e-2, atol=2e-2)


def test_compile():
    """The graphs are those without it; what runs them is ours."""
    from torch._dynamo.backends.common import aot_autograd

    graphs = []

    def compiler(graph_module, inputs):
        graphs.append(graph_module.code)
        return graph_module

    model, x = Functional(), torch.randn(4, 3, 12, 12)
    expected = model_gradients(model, x)
    for on in (False, True):
        torch._dynamo.reset()
        with switched(on):
            compiled = torch.compile(model, backend=aot_autograd(fw_compiler=compiler), dynamic=False)
            actual, rows = kernels(model_gradients, compiled, x)
        assert_all_close(actual, expected, rtol=1e-4, atol=1e-4)
        assert on == any(op == "conv2d" for op, _ in rows)
    half = len(graphs) // 2
    assert graphs[:half] == graphs[half:]


def test_inductor():
    model, x = Functional(), torch.randn(4, 3, 12, 12)
    expected = model_gradients(model, x)
    with fastops.enabled():
        compiled = torch.compile(model)
        assert_all_close(model_gradients(compiled, x), expected, rtol=1e-4, atol=1e-4)
    assert_all_close(model_gradients(compiled, x), expected, rtol=1e-4, atol=1e-4)


def test_hooks_and_checkpoints():
    from torch.utils.checkpoint import checkpoint

    model, x = Functional(), torch.randn(4, 3, 12, 12, requires_grad=True)
    expected = model_gradients(model, x)
    packed = []
    with (
        fastops.enabled(),
        torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t.shape) or t.clone(), lambda t: t),
    ):
        assert_all_close(model_gradients(model, x), expected, rtol=1e-4, atol=1e-4)
        again = gradients(lambda x, *_: checkpoint(model, x, use_reentrant=False), x, *model.parameters())
    assert_all_close(again, expected, rtol=1e-4, atol=1e-4)
    assert packed


def test_replaced_models_run_as_they_do():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(72, 4))
    x = torch.randn(2, 3, 8, 8)
    fastops.replace_(model)
    expected, rows = kernels(model, x)
    with fastops.enabled():
        actual, same = kernels(model, x)
    exact(actual, expected)
    assert rows == same


# ---- what is not taken


def test_what_is_not_taken():
    x = torch.randn(4, 8)
    with fastops.enabled():
        for call in (
            lambda: torch.relu(torch.arange(-3, 3)),
            lambda: torch.sigmoid(torch.arange(3)),
            lambda: torch.mm(x.to(torch.complex64), x.t().to(torch.complex64)),
            lambda: torch.addmm(torch.ones(4, 4), x, x.t(), beta=0.5),
            lambda: torch.ops.aten.elu(x, 1.0, 2.0, 3.0),
        ):
            rows = kernels(call)[1]
            assert rows
            assert all(kernel == "aten" for _, kernel in rows), rows
        sparse = torch.eye(4).to_sparse()
        exact(torch.mm(sparse, x), x)
        assert torch.relu(x.to("meta")).is_meta
        assert F.linear(x.to("meta"), torch.ones(3, 8, device="meta")).shape == (4, 3)
        quantized = torch.quantize_per_tensor(x, 0.1, 10, torch.quint8)
        assert torch.relu(quantized).is_quantized
        nested = torch.nested.nested_tensor([x, x[:2]])
        assert F.linear(nested, torch.ones(3, 8)).is_nested
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            torch.mm(x, x)
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            F.linear(x, torch.ones(3, 7))
        with pytest.raises(RuntimeError, match="same dtype"):
            F.linear(x, torch.ones(3, 8, dtype=torch.float64))
        out = torch.empty(4, 4)
        assert torch.mm(x, x.t(), out=out) is out


def test_results_above_calls_that_are_not_taken_are_the_same_bits():
    z = torch.randn(3, 4, dtype=torch.complex64)
    expected = F.linear(z, z)
    with fastops.enabled():
        exact(torch.view_as_real(F.linear(z, z)), torch.view_as_real(expected))


# ---- the switch


def test_disable_restores():
    x, w = torch.randn(32, 64), torch.randn(16, 64)
    before = [F.linear(x, w), torch.relu(x), F.gelu(x), x @ w.t()]
    table = torch._C._dispatch_dump_table("aten::linear")
    fastops.enable()
    assert taken(F.linear, x, w)
    fastops.enable()
    fastops.disable()
    assert kernels(lambda: [F.linear(x, w), torch.relu(x)])[1] == []
    for now, then in zip([F.linear(x, w), torch.relu(x), F.gelu(x), x @ w.t()], before, strict=True):
        exact(now, then)
    assert torch._C._dispatch_dump_table("aten::linear") == table
    fastops.disable()


def test_blocks_nest_and_end():
    x = torch.ones(3)
    with fastops.enabled():
        with fastops.enabled():
            assert taken(torch.relu, x)
        assert taken(torch.relu, x)
        fastops.disable()
        assert taken(torch.relu, x)  # the block's own
        with pytest.raises(ValueError, match="mine"), fastops.enabled():
            raise ValueError("mine")
        assert taken(torch.relu, x)
    assert not taken(torch.relu, x)

    with fastops.enabled():
        fastops.enable()
    assert taken(torch.relu, x)
    fastops.disable()

    @fastops.enabled()
    def decorated():
        return taken(torch.relu, x)

    assert decorated()
    assert decorated()
    assert not taken(torch.relu, x)


def test_no_warning_and_others_still_come():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastops.enable()
        fastops.disable()
    library = torch.library.Library("aten", "IMPL")
    with pytest.warns(UserWarning, match="Overriding a previously registered kernel"):
        library.impl("cosh", lambda x: x, "CPU")
    library._destroy()
    assert torch.cosh(torch.zeros(1)) == 1


def test_threads():
    """It holds for all threads, and may change while they compute."""
    x, w = torch.randn(8, 16), torch.randn(4, 16, requires_grad=True)
    expected = F.linear(x, w).detach()
    stop, wrong = threading.Event(), []

    def work():
        while not stop.is_set():
            y = torch.relu(F.linear(x, w))
            torch.autograd.grad(y.sum(), w)
            if not torch.allclose(y, expected.relu(), atol=1e-5):
                wrong.append(y)

    workers = [threading.Thread(target=work) for _ in range(2)]
    for worker in workers:
        worker.start()
    for _ in range(200):
        with fastops.enabled():
            torch.relu(x)
        torch.relu(x)
    stop.set()
    for worker in workers:
        worker.join()
    assert not wrong

    seen = []
    with fastops.enabled():
        other = threading.Thread(target=lambda: seen.append(taken(torch.relu, x)))
        other.start()
        other.join()
    assert seen == [True]


def test_fork():
    x = torch.ones(64, 64)
    with fastops.enabled():
        torch.mm(x, x)
        child = os.fork()
        if child == 0:
            good = taken(torch.mm, x, x) and float(torch.mm(x, x)[0, 0]) == 64
            os._exit(0 if good else 1)
        assert os.waitpid(child, 0)[1] == 0


def test_models_stay_what_they_are():
    """Copies, state_dict and training by an optimizer."""
    model = Functional()
    other = copy.deepcopy(model)
    x = torch.randn(4, 3, 12, 12)
    for one, on in ((model, True), (other, False)):
        optimizer = torch.optim.SGD(one.parameters(), 0.1)
        with switched(on):
            for _ in range(3):
                optimizer.zero_grad()
                one(x).square().sum().backward()
                optimizer.step()
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
