"""Operands made in inference mode and used outside: PyTorch's results and its refusals."""

import itertools

import pytest
import torch
import torch.nn.functional as F

import fastops.functional as FF

OPS = {
    "linear": ("linear", {}, [(3, 8), (4, 8), (4,)]),
    "linear without bias": ("linear", {}, [(3, 8), (4, 8)]),
    "linear of a vector": ("linear", {}, [(8,), (4, 8), (4,)]),
    "linear of a batch": ("linear", {}, [(2, 3, 8), (4, 8), (4,)]),
    "conv1d": ("conv1d", {}, [(1, 2, 8), (3, 2, 3), (3,)]),
    "conv2d": ("conv2d", {}, [(1, 2, 6, 6), (3, 2, 3, 3), (3,)]),
    "conv2d without bias": ("conv2d", {}, [(1, 2, 6, 6), (3, 2, 3, 3)]),
    "conv_transpose2d": ("conv_transpose2d", {}, [(1, 2, 6, 6), (2, 3, 3, 3), (3,)]),
    "conv3d": ("conv3d", {}, [(1, 2, 4, 4, 4), (3, 2, 3, 3, 3), (3,)]),
    "prelu": ("prelu", {}, [(2, 3, 4), (3,)]),
    "prelu, one weight": ("prelu", {}, [(2, 3, 4), (1,)]),
    "glu": ("glu", {}, [(2, 4)]),
    "relu": ("relu", {}, [(2, 4)]),
    "relu, large": ("relu", {}, [(100, 100)]),
    "gelu": ("gelu", {}, [(2, 4)]),
    "tanh": ("tanh", {}, [(2, 4)]),
    "max_pool2d": ("max_pool2d", {"kernel_size": 2}, [(1, 2, 4, 4)]),
    "avg_pool2d": ("avg_pool2d", {"kernel_size": 2}, [(1, 2, 4, 4)]),
    "adaptive_avg_pool1d": ("adaptive_avg_pool1d", {"output_size": 2}, [(1, 2, 4)]),
}


def _outcome(module, op, made_in_inference_mode, needs_grad, calling):
    name, kwargs, shapes = OPS[op]
    operands = []
    for shape, inside, needs in zip(shapes, made_in_inference_mode, needs_grad, strict=True):
        with torch.inference_mode(inside):
            operands.append(torch.full(shape, 0.5).requires_grad_(needs))
    try:
        with calling():
            y = getattr(module, name)(*operands, **kwargs)
        if y.requires_grad:
            y.sum().backward()
    except RuntimeError as error:
        return type(error)
    grads = tuple(None if t.grad is None else t.grad.flatten().tolist() for t in operands)
    return torch.Tensor.tolist(y.detach().clone().round(decimals=4)), y.is_inference(), y.requires_grad, grads


@pytest.mark.parametrize("calling", [torch.enable_grad, torch.no_grad, torch.inference_mode], ids=lambda c: c.__name__)
@pytest.mark.parametrize("op", OPS)
def test_same_as_pytorch(op, calling):
    both = list(itertools.product((False, True), repeat=len(OPS[op][2])))
    for inside, needs in itertools.product(both, both):
        if inside[0] and needs[0]:  # PyTorch's answer depends on whether it reshapes the input
            continue
        expected = _outcome(F, op, inside, needs, calling)
        actual = _outcome(FF, op, inside, needs, calling)
        what = f"made in inference mode: {inside}, need a gradient: {needs}"
        if isinstance(expected, type) or isinstance(actual, type):
            assert actual is expected, what
            continue
        assert actual[1:3] == expected[1:3], what
        for one, two in zip((actual[0], *actual[3]), (expected[0], *expected[3]), strict=True):
            assert (one is None) == (two is None), what
            if one is not None:
                torch.testing.assert_close(torch.tensor(one), torch.tensor(two), atol=1e-4, rtol=1e-4, msg=what)
