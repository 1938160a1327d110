"""Every in-place activation, in every way that PyTorch itself supports: the same values, gradients and refusals."""

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from modes import Through
from reference import ACTIVATIONS
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import fastops.functional as FF


class Form(NamedTuple):
    """One spelling of one activation: an argument inplace=True, or a function whose name ends in an underscore."""

    name: str
    args: tuple[float, ...]
    inplace: bool

    def __str__(self) -> str:
        return "-".join([self.name, *map(str, self.args)])

    def of(self, module: Any) -> Callable[[Tensor], Tensor]:
        function = getattr(module, self.name)
        return lambda x: function(x, *self.args, **({"inplace": True} if self.inplace else {}))


# Without a negative slope, which PyTorch's backward refuses in place and fastops' does not.
_ARGUMENTS = [
    (case.function, tuple(case.kwargs.values()))
    for case in ACTIVATIONS
    if case.in_place and case.kwargs.get("negative_slope", 0) >= 0
]
FORMS = [Form(name, args, True) for name, args in _ARGUMENTS]
FORMS += [Form(f"{name}_", args, False) for name, args in _ARGUMENTS if hasattr(F, f"{name}_")]


def _backward(f: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    leaf = x.clone().requires_grad_()
    y = f(leaf * 1)
    y.backward(torch.linspace(-1, 1, y.numel()).view(y.shape))
    return [y.detach(), leaf.grad]


def plain(f, x):
    return _backward(f, x)


def under_a_dispatch_mode(f, x):
    with Through():
        return _backward(f, x)


def under_a_function_mode(f, x):
    with torch.device("cpu"):
        return _backward(f, x)


def under_autocast(f, x):
    with torch.autocast("cpu", torch.bfloat16):
        return _backward(f, x)


def func_grad(f, x):
    return [torch.func.grad(lambda z: f(z * 1).square().sum())(x)]


def func_vmap(f, x):
    return [torch.func.vmap(lambda z: f(z * 1))(x)]


def func_vmap_grad(f, x):
    return [torch.func.vmap(torch.func.grad(lambda z: f(z * 1).square().sum()))(x)]


def func_jacrev(f, x):
    return [torch.func.jacrev(lambda z: f(z * 1))(x[0])]


def func_jacfwd(f, x):
    return [torch.func.jacfwd(lambda z: f(z * 1))(x[0])]


def func_hessian(f, x):
    return [torch.func.hessian(lambda z: f(z * 1).square().sum())(x[0])]


def func_functionalize(f, x):
    return [torch.func.functionalize(lambda z: f(z * 1))(x)]


def forward_mode(f, x):
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x.clone(), torch.linspace(-1, 1, x.numel()).view(x.shape))
        return list(forward_ad.unpack_dual(f(dual * 1)))


def double_backward(f, x):
    leaf = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(f(leaf * 1).square().sum(), leaf, create_graph=True)
    if not first.requires_grad:  # a derivative that is constant
        return [first]
    return [first.detach(), *torch.autograd.grad(first.sum(), leaf)]


def checkpointed(f, x):
    return _backward(lambda z: checkpoint(lambda t: f(t * 1), z, use_reentrant=False), x)


def on_a_view(f, x):
    leaf = x.clone().requires_grad_()
    base = leaf * 1
    f(base[:, 2:6])
    base.square().sum().backward()
    return [base.detach(), leaf.grad]


def on_one_of_several_views(f, x):
    leaf = x.clone().requires_grad_()
    f((leaf * 1).chunk(2)[0]).sum().backward()
    return [leaf.grad]


def on_a_leaf(f, x):
    return [f(x.clone().requires_grad_())]


def on_a_view_of_a_leaf(f, x):
    return [f(x.clone().requires_grad_()[0])]


def on_a_leaf_without_grad(f, x):
    leaf = x.clone().requires_grad_()
    with torch.no_grad():
        y = f(leaf)
    return [y.detach(), torch.tensor(float(y is leaf)), torch.tensor(float(leaf._version))]


def on_a_view_made_without_grad(f, x):
    leaf = x.clone().requires_grad_()
    with torch.no_grad():
        view = leaf[0]
    return [f(view)]


def on_an_expanded_one(f, x):
    return [f(x[:, :1].clone().expand(3, 8))]


def on_what_backward_needs(f, x):
    leaf = x.clone().requires_grad_()
    y = leaf.exp()
    f(y)
    y.sum().backward()
    return [leaf.grad]


def in_inference_mode(f, x):
    with torch.inference_mode():
        y = f(x.clone())
    return [y.clone(), torch.tensor(float(y.is_inference()))]


def an_inference_tensor_outside(f, x):
    with torch.inference_mode():
        y = x.clone()
    return [f(y)]


def a_normal_tensor_in_inference_mode(f, x):
    y = x.clone()
    with torch.inference_mode():
        f(y)
    return [y.clone(), torch.tensor(float(y._version))]


def transposed(f, x):
    return _backward(lambda z: f(z.mT), x)


def sliced(f, x):
    return _backward(lambda z: f(z[:, 1:5]), x)


def double(f, x):
    return _backward(f, x.double())


def complex_numbers(f, x):
    return [f(torch.complex(x, x))]


def empty(f, x):
    return _backward(f, x[:0])


WAYS = [
    plain, under_a_dispatch_mode, under_a_function_mode, under_autocast, func_grad, func_vmap, func_vmap_grad,
    func_jacrev, func_jacfwd, func_hessian, func_functionalize, forward_mode, double_backward, checkpointed, on_a_view,
    on_one_of_several_views, on_a_leaf, on_a_view_of_a_leaf, on_a_leaf_without_grad, on_a_view_made_without_grad,
    on_an_expanded_one, on_what_backward_needs, in_inference_mode, an_inference_tensor_outside,
    a_normal_tensor_in_inference_mode, transposed, sliced, double, complex_numbers, empty,
]  # fmt: skip


def _outcome(way: Callable[..., list[Tensor]], f: Callable[[Tensor], Tensor]) -> list[Tensor] | Exception:
    x = torch.linspace(-4, 4, 24).view(3, 8)
    try:
        return way(f, x)
    except (RuntimeError, NotImplementedError) as error:
        return error


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_same_as_pytorch(way):
    tried = 0
    for form in FORMS:
        expected, actual = _outcome(way, form.of(F)), _outcome(way, form.of(FF))
        if isinstance(expected, Exception):
            # What PyTorch cannot do (a second derivative that it has not) fastops may.
            if way in (double_backward, func_hessian, forward_mode, func_jacfwd, func_vmap, func_vmap_grad):
                continue
            assert type(actual) is type(expected), f"{form}: PyTorch {expected!r}, fastops {actual!r}"
            tried += 1
            continue
        assert not isinstance(actual, Exception), f"{form}: PyTorch has no problem, fastops {actual!r}"
        assert len(actual) == len(expected)
        tried += 1
        for one, two in zip(actual, expected, strict=True):
            torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-4, msg=lambda m, form=form: f"{form}: {m}")
    assert tried >= len(FORMS) - 4, f"PyTorch supports {tried} of {len(FORMS)}"


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled(backend):
    """All of them in one graph."""
    forms = [form for form in FORMS if form.args or not form.name.startswith("threshold")]

    def chain(module):
        functions = [form.of(module) for form in forms]

        def run(x):
            return torch.stack([function(x * (1 + i / 8)) for i, function in enumerate(functions)])

        return run

    x = torch.linspace(-4, 4, 24).view(3, 8)
    with contextlib.ExitStack() as stack:
        stack.callback(torch._dynamo.reset)
        compiled = torch.compile(chain(FF), backend=backend, fullgraph=True)
        actual = _backward(lambda z: compiled(z), x)
    for one, two in zip(actual, _backward(chain(F), x), strict=True):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-4)
