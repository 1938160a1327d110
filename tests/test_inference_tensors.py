"""Operands made in inference mode and used outside: PyTorch's results and its refusals."""

import contextlib
import itertools

import pytest
import torch
import torch.nn.functional as F
from each import each
from every_op import OPS

CALLS = [call for op in OPS for call in op.calls(6) if hasattr(F, call.name) and len(call.shapes[0]) < 5]


def _outcome(function, shapes, made_in_inference_mode, needs_grad, calling):
    operands = []
    for shape, inside, needs in zip(shapes, made_in_inference_mode, needs_grad, strict=True):
        with torch.inference_mode(inside):
            operands.append(torch.full(shape, 0.5).requires_grad_(needs))
    try:
        with calling():
            y = function(*operands)
        if y.requires_grad:
            y.sum().backward()
    except RuntimeError as error:
        return type(error)
    grads = tuple(None if t.grad is None else t.grad.flatten().tolist() for t in operands)
    return torch.Tensor.tolist(y.detach().clone().round(decimals=4)), y.is_inference(), y.requires_grad, grads


@contextlib.contextmanager
def enable_grad_in_inference_mode():
    """Which does not make autograd record anything."""
    with torch.inference_mode(), torch.enable_grad():
        yield


CALLING = [torch.enable_grad, torch.no_grad, torch.inference_mode, enable_grad_in_inference_mode]


@pytest.mark.parametrize("calling", CALLING, ids=lambda c: c.__name__)
@each("call", CALLS)
def test_same_as_pytorch(call, calling):
    both = list(itertools.product((False, True), repeat=len(call.shapes)))
    for inside, needs in itertools.product(both, both):
        if inside[0] and needs[0]:  # PyTorch's answer depends on whether it reshapes the input
            continue
        expected = _outcome(call.theirs, call.shapes, inside, needs, calling)
        actual = _outcome(call.ours, call.shapes, inside, needs, calling)
        what = f"made in inference mode: {inside}, need a gradient: {needs}"
        if isinstance(expected, type) or isinstance(actual, type):
            assert actual is expected, what
            continue
        assert actual[1:3] == expected[1:3], what
        for one, two in zip((actual[0], *actual[3]), (expected[0], *expected[3]), strict=True):
            assert (one is None) == (two is None), what
            if one is not None:
                torch.testing.assert_close(torch.tensor(one), torch.tensor(two), atol=1e-4, rtol=1e-4, msg=what)
