"""The fast door and the general door: the same results, bit for bit, and each taken when it should be.

Both call the same kernels, so the tests here run on one tier.
"""

import re
from pathlib import Path

import pytest
import torch
from compare import TRACED, UNTRACED, exact
from each import each
from reference import ACTIVATIONS, CONVS, DTYPES, POOLS
from torch.library import opcheck
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastops.functional as FF
from fastops import _C
from fastops._activations import KIND
from fastops.functional._conv import _geometry, _numbers
from fastops.ops import activation as activation_ops
from fastops.ops import conv as conv_ops
from fastops.ops import linear as linear_ops
from fastops.ops import pool as pool_ops

OPS = torch.ops.fastops


class Seen(TorchDispatchMode):
    """Lists the ops that reach the dispatcher."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def both(fast, general, *tensors):
    """Results and gradients of both doors."""
    answers = []
    for function in (fast, general):
        leaves = [t.detach().clone().requires_grad_() for t in tensors]
        output = function(*leaves)
        assert output is not NotImplemented
        grad = torch.linspace(-1, 1, output.numel()).to(output.dtype).view(output.shape)
        answers.append((output, *torch.autograd.grad(output, leaves, grad)))
        with torch.no_grad():
            answers[-1] += (function(*leaves),)
    for one, two in zip(*answers, strict=True):
        exact(one, two)


@each("case", [None, *ACTIVATIONS])
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear(case, dtype):
    kind, a, b = ("identity", 0.0, 0.0) if case is None else (case.kind, case.a, case.b)
    x, w, bias = torch.randn(3, 5, 17).to(dtype), torch.randn(35, 17).to(dtype), torch.randn(35).to(dtype)
    both(
        lambda *t: _C.linear(*t, KIND[kind], a, b),
        lambda *t: linear_ops.linear(*t, kind, a, b),
        x, w, bias,
    )  # fmt: skip


def geometry(conv, weight):
    return _geometry(_numbers(tuple(conv.kwargs.values())), len(conv.size), conv.transposed, weight)


@each("conv", CONVS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["identity", "relu", "gelu"])
def test_conv(conv, dtype, kind):
    x, w, b = (torch.randn(shape).to(dtype) for shape in conv.shapes)
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    for memory_format in {torch.contiguous_format, last} - {None}:
        tensors = [t.contiguous(memory_format=memory_format) for t in (x, w)]
        both(
            lambda *t: getattr(_C, conv.name)(*t, *conv.kwargs.values(), KIND[kind], 0.0, 0.0),
            lambda *t: conv_ops.conv(*t, geometry(conv, t[1]), kind, 0.0, 0.0),
            *tensors, b,
        )  # fmt: skip


@each("pool", POOLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pool(pool, dtype):
    def general(x):
        with PassOn():  # a mode, which the fast door does not serve
            return pool.ours(x)

    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(len(pool.shape))
    for memory_format in {torch.contiguous_format, last} - {None}:
        if len(pool.shape) == pool.dims + 2 or memory_format is torch.contiguous_format:
            x = torch.randn(pool.shape).to(dtype).contiguous(memory_format=memory_format)
            both(pool.ours, general, x)


@each("case", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_activation(case, dtype):
    args = case.a, case.b
    for x in (torch.randn(5, 13), torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)):
        both(
            lambda t: getattr(_C, case.kind)(t, *args, False),
            lambda t: activation_ops.activation(t, case.kind, *args),
            x.to(dtype),
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_prelu_and_glu(dtype):
    x = torch.randn(3, 6, 7).to(dtype)
    for weights in (1, 6):
        both(_C.prelu, activation_ops.prelu, x, torch.rand(weights).to(dtype))
    both(lambda t: _C.glu(t, 1), lambda t: activation_ops.glu(t, 1), x)


def conv1d(x, w, bias=None, stride=1, padding=0, dilation=1, groups=1):
    return _C.conv1d(x, w, bias, stride, padding, dilation, groups, 0, 0.0, 0.0)


def max_pool1d(x, kernel=2, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False):
    return _C.max_pool1d(x, kernel, stride, padding, dilation, ceil_mode, return_indices)


def test_plain_tensors_take_the_fast_door():
    x, w = torch.randn(4, 6), torch.randn(5, 6)
    for tensor in (
        x,
        torch.nn.Parameter(x),
        x.clone().requires_grad_() * 2,
        x[:, ::2].repeat(1, 2),
        x.mT.contiguous().mT,
    ):
        assert _C.linear(tensor, w, None, 0, 0.0, 0.0) is not NotImplemented
        assert _C.relu(tensor, 0.0, 0.0, False) is not NotImplemented
        assert conv1d(tensor, w[:, :4, None]) is not NotImplemented  # one sequence of four channels
        assert max_pool1d(tensor) is not NotImplemented
    with torch.inference_mode():
        assert _C.linear(x, w, None, 0, 0.0, 0.0) is not NotImplemented
        assert max_pool1d(x) is not NotImplemented
        assert conv1d(x, w[:, :4, None]) is not NotImplemented
        assert torch.is_inference(FF.relu(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert _C.linear(x, w, None, 0, 0.0, 0.0) is not NotImplemented


class Subclass(torch.Tensor):
    pass


class PassOn(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def _dual():
    import torch.autograd.forward_ad as forward_ad

    with forward_ad.dual_level():
        x = forward_ad.make_dual(torch.randn(4, 6), torch.randn(4, 6))
        return _C.linear(x, torch.randn(5, 6), None, 0, 0.0, 0.0), _C.relu(x, 0.0, 0.0, False)


NOT_PLAIN = {
    "integers": lambda: torch.ones(4, 6, dtype=torch.int64),
    "complex": lambda: torch.ones(4, 6, dtype=torch.complex64),
    "float8": lambda: torch.ones(4, 6).to(torch.float8_e4m3fn),
    "sparse": lambda: torch.ones(4, 6).to_sparse(),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2, 6)]),
    "meta": lambda: torch.ones(4, 6, device="meta"),
    "subclass": lambda: torch.ones(4, 6).as_subclass(Subclass),
    "negative": lambda: torch.ones(4, 6, dtype=torch.complex64).conj().imag,
    "mkldnn": lambda: torch.ones(4, 6).to_mkldnn(),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(4, 6), 0.1, 0, torch.qint8),
    "number": lambda: 3.0,
    "none": lambda: None,
    "list": lambda: [1.0],
}


@pytest.mark.parametrize("what", NOT_PLAIN)
@pytest.mark.filterwarnings("ignore")
def test_the_fast_door_turns_away(what):
    x, w = NOT_PLAIN[what](), torch.ones(5, 6)
    assert _C.linear(x, w, None, 0, 0.0, 0.0) is NotImplemented
    assert _C.linear(w, x, None, 0, 0.0, 0.0) is NotImplemented
    assert conv1d(x, torch.ones(5, 4, 1)) is NotImplemented
    assert conv1d(torch.ones(5, 4, 1), x) is NotImplemented
    assert _C.relu(x, 0.0, 0.0, False) is NotImplemented
    assert _C.prelu(x, torch.ones(1)) is NotImplemented
    assert _C.glu(x, 1) is NotImplemented
    assert max_pool1d(x) is NotImplemented
    assert _C.adaptive_avg_pool1d(x, 2) is NotImplemented


def test_the_fast_door_turns_away_what_does_not_fit():
    x, w, b = torch.ones(4, 6), torch.ones(5, 6), torch.ones(5)
    for arguments in ((x, w[:, :5], b), (x, w, b[:4]), (x, w.double(), b), (x, w, b.double()), (x, w[0], None)):
        assert _C.linear(*arguments, 0, 0.0, 0.0) is NotImplemented
    assert _C.linear(x.sum(), w, b, 0, 0.0, 0.0) is NotImplemented
    x, w = torch.ones(2, 4, 6), torch.ones(5, 4, 3)
    for arguments in ((x, w[:, :3], b), (x, w, b[:4]), (x, w.double(), b), (x, w, b.double()), (x, w[0], None)):
        assert conv1d(*arguments) is NotImplemented
    for name, values in {
        "stride": (0, -1, 1.0, True, (1, 1), "1", None, torch.tensor(1), 2**64),
        "padding": (-1, 0.5, True, (1, 1), "full", None),
        "dilation": (0, 3, False, (1, 1)),
        "groups": (0, 2, -1, (1,), True, None),
    }.items():
        for value in values:
            assert conv1d(x, w, b, **{name: value}) is NotImplemented
    assert conv1d(x, w, b, stride=2, padding="same") is NotImplemented
    x, w, b = torch.ones(4, 6), torch.ones(5, 6), torch.ones(5)
    for name, values in {
        "kernel": (0, -1, 7, 2.0, True, (2, 2), None, "2", torch.tensor(2)),
        "stride": (0, -1, 1.0, (1, 1)),
        "padding": (-1, 2, None, True),
        "dilation": (0, 6, None),
        "ceil_mode": (0, None, 1.0),
        "return_indices": (1, None),
    }.items():
        for value in values:
            assert max_pool1d(x, **{name: value}) is NotImplemented
    for size in (-1, 2.0, True, (2, 2), (), "2"):
        assert _C.adaptive_avg_pool1d(x, size) is NotImplemented
        assert _C.adaptive_max_pool1d(x, size, False) is NotImplemented
    assert _C.avg_pool2d(x, 2, None, 0, False, True, None) is NotImplemented
    assert _C.avg_pool2d(x[None], 2, None, 0, False, True, 0) is NotImplemented
    assert _C.prelu(x, b) is NotImplemented
    assert _C.glu(x[:, :5], 1) is NotImplemented
    assert _C.glu(x, 2) is NotImplemented


def test_modes_and_transforms_take_the_general_door():
    x, w = torch.randn(4, 6), torch.randn(5, 6)

    def turned_away(tensor):
        assert _C.linear(tensor, w, None, 0, 0.0, 0.0) is NotImplemented
        assert conv1d(tensor, w[:, :4, None]) is NotImplemented
        assert _C.relu(tensor, 0.0, 0.0, False) is NotImplemented
        assert max_pool1d(tensor) is NotImplemented
        return tensor.sum()

    assert _dual() == (NotImplemented, NotImplemented)
    torch.func.grad(turned_away)(x)
    torch.func.vmap(turned_away)(x[:, None])
    torch.func.functionalize(turned_away)(x)
    with PassOn():
        turned_away(x)
    with Seen() as seen:
        turned_away(x)
        FF.linear(x, w, activation="relu")
        FF.conv1d(x[None], w[:, :4, None], activation="relu")
        FF.gelu(x)
        FF.max_pool1d(x, 2)
        FF.adaptive_avg_pool1d(x, 2)
    assert [name for name in seen.names if "fastops" in name] == [
        "fastops.linear_forward.default",
        "fastops.conv_forward.default",
        "fastops.activation_forward.default",
        "fastops.max_pool_forward.default",
        "fastops.avg_pool_forward.default",
    ]


def test_functions_of_a_transform_do_not_leak():
    """After a transform or a mode the fast door is open again."""
    x = torch.randn(3, 4)
    torch.func.grad(lambda t: FF.gelu(t).sum())(x)
    assert _C.relu(x, 0.0, 0.0, False) is not NotImplemented


def test_torch_function_modes_see_the_call():
    seen = []

    class Log(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    x = torch.randn(4, 6)
    with Log():
        FF.linear(x, x, activation="relu")
        FF.conv1d(x, x[:, :4, None], activation="relu")
        FF.glu(x)
        FF.prelu(x, torch.ones(1))
        FF.leaky_relu(x, 0.3)
        FF.max_pool1d(x, 2)
        FF.avg_pool1d(x, 2)
        FF.adaptive_max_pool1d(x, 2)
    pools = FF.max_pool1d, FF.avg_pool1d, FF.adaptive_max_pool1d
    assert [f for f in (FF.linear, FF.conv1d, FF.glu, FF.prelu, FF.leaky_relu, *pools) if f not in seen] == []
    with torch.device("cpu"):  # a mode too
        torch.testing.assert_close(FF.leaky_relu(x, 0.3), torch.nn.functional.leaky_relu(x, 0.3))


def test_one_gradient_call_runs_one_backward_op():
    x, w = torch.randn(4, 6, requires_grad=True), torch.randn(5, 6, requires_grad=True)
    with Seen() as seen:
        FF.linear(x, w, activation="gelu").sum().backward()
    assert sum("fastops.linear_backward" in name for name in seen.names) == 1
    x, w = torch.randn(2, 4, 6, requires_grad=True), torch.randn(5, 4, 3, requires_grad=True)
    with Seen() as seen:
        FF.conv1d(x, w, activation="gelu").sum().backward()
    assert sum("fastops.conv_backward" in name for name in seen.names) == 1


def _double(*shape):
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


KINDS = ["identity", "relu", "gelu", "tanh"]
MASKS = [[True, True, True], [False, True, False], [True, False, True]]


@pytest.mark.parametrize("kind", KINDS)
def test_opcheck_linear(kind):
    saved = None if _C.saved_by_linear(KIND[kind], 0.0, 0.0) == "nothing" else _double(3, 5)
    utils = TRACED if kind in ("identity", "gelu") else UNTRACED  # what saves nothing, and what saves something
    options = kind, 0.0, 0.0
    for need_saved in (True, False):
        args = _double(3, 4), _double(5, 4), _double(5), *options, need_saved
        opcheck(OPS.linear_forward, args, test_utils=utils)
    opcheck(OPS.linear_forward, (_double(2, 3, 4), _double(5, 4), None, *options, True), test_utils=utils)
    for mask in MASKS:
        args = _double(3, 5), saved, _double(3, 4), _double(5, 4), *options, mask
        opcheck(OPS.linear_backward, args, test_utils=utils)


LAYOUTS = [(1, None), (2, None), (2, torch.channels_last), (3, torch.channels_last_3d)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("transposed", [False, True])
def test_opcheck_conv(kind, transposed):
    """An opcheck takes a third of a second: every kind with two masks, each on another layout."""
    none = _C.saved_by_linear(KIND[kind], 0.0, 0.0) == "nothing"
    first = 2 * (KINDS.index(kind) + len(KINDS) * transposed)
    for i in (first, first + 1):
        mask = MASKS[i % len(MASKS)]
        dims, last = LAYOUTS[(i + i // len(LAYOUTS)) % len(LAYOUTS)]
        x, w = _double(2, 4, *[5] * dims), _double(4, 2, *[3] * dims)
        if last is not None:
            x, w = (t.detach().contiguous(memory_format=last).requires_grad_() for t in (x, w))
        args = [2] * dims, [1] * 2 * dims, [1] * dims, transposed, 2, kind, 0.0, 0.0
        y, _ = OPS.conv_forward(x, w, None, *args, False)
        grad = torch.randn_like(y).requires_grad_()
        saved = None if none else torch.randn_like(y).requires_grad_()
        utils = TRACED if kind in ("identity", "gelu") else UNTRACED
        opcheck(OPS.conv_forward, (x, w, _double(4), *args, i % 2 == 0), test_utils=utils)
        opcheck(OPS.conv_backward, (grad, saved, x, w, *args, mask), test_utils=utils)


def test_opcheck_activations():
    """A graph is traced of one of those that save the same: they differ in their formulas alone."""
    traced = set()
    for case in ACTIVATIONS:
        args = case.kind, case.a, case.b
        output = _C.can_save_output(KIND[case.kind], case.a, case.b)
        kinds = case.from_input, output, case.saves
        utils = UNTRACED if kinds in traced else TRACED
        traced.add(kinds)
        images = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
        for x in (_double(3, 5), images):
            opcheck(OPS.activation_forward, (x, *args, True), test_utils=utils)
        mask = torch.tensor([0b10101010, 0b01100110], dtype=torch.uint8)
        wanted = {"input": case.from_input, "output": output, "mask": case.saves == "mask"}
        for kind in (kind for kind in wanted if wanted[kind]):
            saved = mask if kind == "mask" else _double(3, 5)
            opcheck(OPS.activation_backward, (_double(3, 5), saved, *args, kind), test_utils=utils)
    assert len(traced) < 12


def test_opcheck_prelu_and_glu():
    for weights in (1, 5):
        opcheck(OPS.prelu_forward, (_double(3, 5), _double(weights)))
        opcheck(OPS.prelu_backward, (_double(3, 5), _double(3, 5), _double(weights), [True, True]))
        opcheck(OPS.prelu_backward, (_double(3, 5), _double(3, 5), _double(weights), [True, False]))
    opcheck(OPS.glu_forward, (_double(3, 6), 1))
    opcheck(OPS.glu_backward, (_double(3, 3), _double(3, 6), 1))


@pytest.mark.parametrize(
    ("dims", "last", "adaptive"),
    [
        (1, None, False),
        (2, None, True),
        (2, torch.channels_last, False),
        (3, None, False),
        (3, torch.channels_last_3d, True),
    ],
    ids=str,
)
def test_opcheck_pool(dims, last, adaptive):
    x = torch.randn(2, 3, *[7] * dims, dtype=torch.float64)
    x = (x if last is None else x.contiguous(memory_format=last)).requires_grad_()
    windows = pool_ops.adaptive((3,) * dims)
    if not adaptive:
        windows = pool_ops.windows_of((3,) * dims, (2,) * dims, (1,) * dims, (1,) * dims, True)
    for kind in ("none", "compact", "plane"):
        opcheck(OPS.max_pool_forward, (x.detach() if kind == "none" else x, *windows, kind))
    rest = (x.shape, *windows[1:])
    for kind in ("compact", "plane"):
        y, indices = OPS.max_pool_forward(x, *windows, kind)
        grad = torch.randn_like(y).requires_grad_()
        opcheck(OPS.max_pool_backward, (grad, indices, *rest, dims, last is not None))
        if kind == "compact":
            opcheck(OPS.max_pool_positions, (indices, *rest, dims))
    opcheck(OPS.avg_pool_forward, (x, *windows[:4], windows.ceil_mode, False, 0))
    opcheck(OPS.avg_pool_backward, (grad, *rest[:4], windows.ceil_mode, False, 3, dims, last is not None))


def test_every_op_has_been_opchecked():
    """Here, or in the op's own file."""
    names = {schema.name for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("fastops::")}
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    checked = {*re.findall(r"opcheck\(\s*OPS\.(\w+)", tests), "activation_second_derivative"}  # against autograd
    assert {name.removeprefix("fastops::") for name in names} == checked


@pytest.mark.parametrize("case", ACTIVATIONS, ids=str)
def test_second_derivative(case):
    """The op behind both doors' gradients of gradients, against autograd on PyTorch's formulas."""
    x = (2 * torch.randn(50, dtype=torch.float64)).requires_grad_()
    (first,) = torch.autograd.grad(torch.special.erf(x).sum() * 0 + _composite(case, x).sum(), x, create_graph=True)
    expected = torch.autograd.grad(first.sum(), x)[0] if first.requires_grad else torch.zeros_like(x)
    args = case.kind, case.a, case.b
    if case.from_input:
        torch.testing.assert_close(OPS.activation_second_derivative(x, *args, "input"), expected)
    y = case.theirs(x)
    if _C.can_save_output(KIND[case.kind], case.a, case.b):
        # d f'/dy times dy/dx is f''
        slope = OPS.activation_backward(torch.ones_like(x), y, *args, "output")
        actual = OPS.activation_second_derivative(y, *args, "output") * slope
        torch.testing.assert_close(actual, expected)


def _composite(case, x):
    """The activation where PyTorch has no second derivative of its own."""
    if case.kind == "hardsigmoid":
        return (x + 3).clamp(0, 6) / 6
    if case.kind == "hardswish":
        return x * (x + 3).clamp(0, 6) / 6
    return case.theirs(x)
