"""The fast door and the general door: the same results, bit for bit, and each taken when it should be."""

import pytest
import torch
from compare import exact
from reference import ACTIVATIONS, DTYPES
from torch.library import opcheck
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastops.functional as FF
from fastops import _C
from fastops.ops import KIND
from fastops.ops import activation as activation_ops
from fastops.ops import linear as linear_ops

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


@pytest.mark.parametrize("case", [None, *ACTIVATIONS], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear(isa, case, dtype):
    kind, a, b = ("identity", 0.0, 0.0) if case is None else (case.kind, case.a, case.b)
    x, w, bias = torch.randn(3, 5, 17).to(dtype), torch.randn(35, 17).to(dtype), torch.randn(35).to(dtype)
    both(
        lambda *t: _C.linear(*t, KIND[kind], a, b),
        lambda *t: linear_ops.linear(*t, kind, a, b),
        x, w, bias,
    )  # fmt: skip


@pytest.mark.parametrize("case", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_activation(isa, case, dtype):
    args = case.a, case.b
    for x in (torch.randn(5, 13), torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)):
        both(
            lambda t: _C.activation(t, KIND[case.kind], *args, False),
            lambda t: activation_ops.activation(t, case.kind, *args),
            x.to(dtype),
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_prelu_and_glu(isa, dtype):
    x = torch.randn(3, 6, 7).to(dtype)
    for weights in (1, 6):
        both(_C.prelu, activation_ops.prelu, x, torch.rand(weights).to(dtype))
    both(lambda t: _C.glu(t, 1), lambda t: activation_ops.glu(t, 1), x)


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
        assert _C.activation(tensor, KIND["relu"], 0.0, 0.0, False) is not NotImplemented
    with torch.inference_mode():
        assert _C.linear(x, w, None, 0, 0.0, 0.0) is not NotImplemented
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
        return _C.linear(x, torch.randn(5, 6), None, 0, 0.0, 0.0), _C.activation(x, 1, 0.0, 0.0, False)


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
    assert _C.activation(x, KIND["relu"], 0.0, 0.0, False) is NotImplemented
    assert _C.prelu(x, torch.ones(1)) is NotImplemented
    assert _C.glu(x, 1) is NotImplemented


def test_the_fast_door_turns_away_what_does_not_fit():
    x, w, b = torch.ones(4, 6), torch.ones(5, 6), torch.ones(5)
    for arguments in ((x, w[:, :5], b), (x, w, b[:4]), (x, w.double(), b), (x, w, b.double()), (x, w[0], None)):
        assert _C.linear(*arguments, 0, 0.0, 0.0) is NotImplemented
    assert _C.linear(x.sum(), w, b, 0, 0.0, 0.0) is NotImplemented
    assert _C.prelu(x, b) is NotImplemented
    assert _C.glu(x[:, :5], 1) is NotImplemented
    assert _C.glu(x, 2) is NotImplemented


def test_modes_and_transforms_take_the_general_door():
    x, w = torch.randn(4, 6), torch.randn(5, 6)

    def turned_away(tensor):
        assert _C.linear(tensor, w, None, 0, 0.0, 0.0) is NotImplemented
        assert _C.activation(tensor, 1, 0.0, 0.0, False) is NotImplemented
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
        FF.gelu(x)
    assert [name for name in seen.names if "fastops" in name] == [
        "fastops.linear_forward.default",
        "fastops.activation_forward.default",
    ]


def test_functions_of_a_transform_do_not_leak():
    """After a transform or a mode the fast door is open again."""
    x = torch.randn(3, 4)
    torch.func.grad(lambda t: FF.gelu(t).sum())(x)
    assert _C.activation(x, 1, 0.0, 0.0, False) is not NotImplemented


def test_torch_function_modes_see_the_call():
    seen = []

    class Log(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    x = torch.randn(4, 6)
    with Log():
        FF.linear(x, x, activation="relu")
        FF.glu(x)
        FF.prelu(x, torch.ones(1))
        FF.leaky_relu(x, 0.3)
    assert [f for f in (FF.linear, FF.glu, FF.prelu, FF.leaky_relu) if f not in seen] == []
    with torch.device("cpu"):  # a mode too
        torch.testing.assert_close(FF.leaky_relu(x, 0.3), torch.nn.functional.leaky_relu(x, 0.3))


def test_one_gradient_call_runs_one_backward_op():
    x, w = torch.randn(4, 6, requires_grad=True), torch.randn(5, 6, requires_grad=True)
    with Seen() as seen:
        FF.linear(x, w, activation="gelu").sum().backward()
    assert sum("fastops.linear_backward" in name for name in seen.names) == 1


def _double(*shape):
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("kind", ["identity", "relu", "gelu", "tanh"])
@pytest.mark.parametrize("mask", [[True, True, True], [False, True, False], [True, False, True]], ids=str)
def test_opcheck_linear(kind, mask):
    saved = None if _C.saved_by_linear(KIND[kind], 0.0, 0.0) == "nothing" else _double(3, 5)
    for need_saved in (True, False):
        opcheck(OPS.linear_forward, (_double(3, 4), _double(5, 4), _double(5), kind, 0.0, 0.0, need_saved))
    opcheck(OPS.linear_forward, (_double(2, 3, 4), _double(5, 4), None, kind, 0.0, 0.0, True))
    opcheck(OPS.linear_backward, (_double(3, 5), saved, _double(3, 4), _double(5, 4), kind, 0.0, 0.0, mask))


@pytest.mark.parametrize("case", ACTIVATIONS, ids=str)
def test_opcheck_activation(case):
    args = case.kind, case.a, case.b
    opcheck(OPS.activation_forward, (_double(3, 5), *args, True))
    opcheck(
        OPS.activation_forward, (torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last), *args, True)
    )
    if case.from_input:
        opcheck(OPS.activation_backward, (_double(3, 5), _double(3, 5), *args, "input"))
    if _C.can_save_output(KIND[case.kind], case.a, case.b):
        opcheck(OPS.activation_backward, (_double(3, 5), _double(3, 5), *args, "output"))
    if _C.saved_by_default(KIND[case.kind], case.a, case.b) == "mask":
        mask = torch.tensor([0b10101010, 0b01100110], dtype=torch.uint8)
        opcheck(OPS.activation_backward, (_double(3, 5), mask, *args, "mask"))


def test_opcheck_prelu_and_glu():
    for weights in (1, 5):
        opcheck(OPS.prelu_forward, (_double(3, 5), _double(weights)))
        opcheck(OPS.prelu_backward, (_double(3, 5), _double(3, 5), _double(weights), [True, True]))
        opcheck(OPS.prelu_backward, (_double(3, 5), _double(3, 5), _double(weights), [True, False]))
    opcheck(OPS.glu_forward, (_double(3, 6), 1))
    opcheck(OPS.glu_backward, (_double(3, 3), _double(3, 6), 1))


def test_every_op_has_been_opchecked():
    names = {schema.name for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("fastops::")}
    assert {name.removeprefix("fastops::") for name in names} == {
        "linear_forward", "linear_backward", "activation_forward", "activation_backward",
        "activation_second_derivative", "prelu_forward", "prelu_backward", "glu_forward", "glu_backward",
    }  # fmt: skip


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
