"""The CUDA kernels of layer_norm and rms_norm on the emulator: see gpu.py. References and tolerances are the CPU's."""

import pytest
import torch
import torch.nn.functional as F
from compare import exact
from gpu import DEVICE, SCHEDULES, compare_second_order, configured, put
from reference import DTYPES
from test_layer_norm import HALF, KIND, SHAPES, compare, images, operands
from torch.library import opcheck

import fastops
import fastops.functional as FF

# A warp holds 1024 elements of a row (float64: 512), a block 8192: rows below, at and above each, and several chunks.
MORE = [((3, 1024), 1), ((2, 1025), 1), ((2, 8192), 1), ((2, 8196), 1), ((1, 20001), 1)]


@KIND
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients(kind, dtype):
    for i, (shape, dims) in enumerate(SHAPES + MORE):
        tensors = operands(kind, shape, dims, dtype)
        with configured(SCHEDULES[i % len(SCHEDULES)], aligned=i % 2 == 0, multiprocessors=1 + i % 3 * 20):
            compare(kind, tensors, dims, torch.randn(shape), place=put)


@pytest.mark.parametrize("dtype", HALF)
def test_16_bits_with_float32_parameters(dtype):
    for shape, dims in SHAPES[::3]:
        compare("layer_norm", operands("layer_norm", shape, dims, dtype, torch.float32), dims, torch.randn(shape),
                place=put)  # fmt: skip


@KIND
def test_parameters_that_are_missing_large_means_and_eps(kind):
    tensors = operands(kind, (9, 37), 1, torch.float32)
    for present in [[False, False], [True, False], [False, True]] if kind == "layer_norm" else [[False]]:
        compare(kind, tensors, 1, torch.randn(9, 37), present, place=put)
    for offset, eps in ((100.0, 1e-5), (0.0, 0.0), (-3.0, 1e-12)):
        compare(kind, (tensors[0] + offset, *tensors[1:]), 1, torch.randn(9, 37), eps=eps, place=put)


@KIND
@pytest.mark.parametrize("dtype", DTYPES)
def test_images(kind, dtype):
    """Channels of a channels-first image, whose rows are transposed first."""
    for shape in ((2, 19, 5, 7), (1, 70, 3, 7)):
        for _, x in images(dtype, shape):
            with configured("shuffled"), fastops.record() as rows:
                compare(kind, (x, *operands(kind, x.shape, 1, dtype)[1:]), 1, torch.randn(x.shape), place=put)
            assert {row.kernel for row in rows} - {"aten"} <= {"rows_cuda", "transposed_rows_cuda"}


def test_strided_rows():
    x = put(torch.randn(9, 50))[::2, 3:40]
    for shape in ((5, 37), (37,)):
        row = x if len(shape) == 2 else x[1]
        leaf = row.detach().requires_grad_()
        y = FF.layer_norm(leaf, (37,))
        g = torch.randn(shape)
        (found,) = torch.autograd.grad(y, leaf, put(g))
        plain = row.cpu().requires_grad_()
        expected = F.layer_norm(plain, (37,))
        torch.testing.assert_close(y.cpu(), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.cpu(), torch.autograd.grad(expected, plain, g)[0], rtol=1e-5, atol=1e-5)


@KIND
def test_the_general_door(kind):
    x, *parameters = map(put, operands(kind, (5, 19), 1, torch.float32))
    function = getattr(FF, kind)
    fast = function(x, (19,), *parameters)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, (19,), *parameters).cpu(), fast.cpu())  # PyTorch\'s
    exact(torch.func.vmap(lambda t: function(t, (19,), *parameters))(x).cpu(), fast.cpu())
    weight, bias = [*parameters, None][:2]
    args = x, weight, bias, 1, 1e-5, kind == "rms_norm"
    opcheck(torch.ops.fastops.layer_norm_forward, args, test_utils=("test_schema", "test_faketensor"))
    x, *parameters = operands(kind, (5, 7), 1, torch.float64)
    compare_second_order(
        lambda *t: function(t[0], (7,), *t[1:]), lambda *t: getattr(F, kind)(t[0], (7,), *t[1:]), x, *parameters
    )


@KIND
def test_autocast_computes_in_float32(kind):
    """As PyTorch's on a GPU; a compiled one on a GPU is PyTorch's."""
    x, *parameters = operands(kind, (5, 19), 1, torch.float32)
    x = x.bfloat16()
    expected = getattr(FF, kind)(x.float(), (19,), *parameters)
    half = [put(p.bfloat16()) for p in parameters]
    with torch.autocast(DEVICE.type, torch.bfloat16), fastops.record() as rows:
        y = getattr(FF, kind)(put(x), (19,), *map(put, parameters))
        general = torch.func.vmap(lambda t: getattr(FF, kind)(t, (19,), *half))(put(x))
    assert "aten" not in {row.kernel for row in rows}
    assert y.dtype == general.dtype == torch.float32
    torch.testing.assert_close(y.cpu(), expected, rtol=1e-5, atol=1e-5)
