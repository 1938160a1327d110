"""The CUDA kernels of attention on the emulator: see gpu.py. References and tolerances are the CPU's."""

import pytest
import torch
import torch.nn.functional as F
from compare import exact
from gpu import DEVICE, SCHEDULES, compare_second_order, configured, put
from test_attention import MASKS, SHAPES, compare, operands, options
from torch.library import opcheck

import fastops
import fastops.functional as FF

# (batch, heads, queries, keys, size, value_size): around tiles of 64, chunks of 32 or 16, and slices of 128 columns.
MORE = [(1, 1, 65, 64, 33, 128), (1, 2, 3, 130, 130, 5), (1, 1, 128, 63, 3, 131)]
EVERY = [shape for shape in SHAPES if shape[2] < 190 and shape[3] < 600] + MORE


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mask", MASKS)
def test_values_and_gradients(mask, dtype):
    for i, shape in enumerate(EVERY):
        with configured(SCHEDULES[i % len(SCHEDULES)], aligned=i % 2 == 0), fastops.record() as rows:
            compare(operands(shape, dtype), torch.randn(*shape[:3], shape[5]).to(dtype), put,
                    **options(mask, shape, dtype))  # fmt: skip
        assert {row.kernel for row in rows} - {"aten"} == {"attention_64x64_cuda"}


def test_heads_next_to_each_other():
    """As models have them: (batch, length, heads, size) transposed."""
    x = torch.randn(2, 40, 3 * 4 * 16)
    q, k, v = (t.view(2, 40, 4, 16).transpose(1, 2) for t in x.split(64, -1))
    compare((q, k, v), torch.randn(2, 40, 4, 16).transpose(1, 2), put, is_causal=True)


def test_only_the_gradients_asked_for():
    tensors = operands((1, 2, 20, 70, 8, 12), torch.float32)
    for wanted in ((1, 0, 0), (0, 1, 0), (0, 0, 1)):
        results = []
        for place, module in ((put, FF), (torch.clone, F)):
            leaves = [place(t).requires_grad_(bool(on)) for t, on in zip(tensors, wanted, strict=True)]
            module.scaled_dot_product_attention(*leaves).square().sum().backward()
            results.append([None if t.grad is None else t.grad.cpu() for t in leaves])
        for ours, theirs in zip(*results, strict=True):
            assert (ours is None) == (theirs is None)
            if ours is not None:
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_the_general_door():
    tensors = [put(t) for t in operands((1, 2, 5, 7, 8, 4), torch.float32)]
    fast = FF.scaled_dot_product_attention(*tensors)
    compiled = torch.compile(FF.scaled_dot_product_attention, backend="aot_eager", fullgraph=True)
    exact(compiled(*tensors).cpu(), fast.cpu())
    opcheck(torch.ops.fastops.attention_forward, (*tensors, None, False, 0.5),
            test_utils=("test_schema", "test_faketensor"))  # fmt: skip
    compare_second_order(
        FF.scaled_dot_product_attention, F.scaled_dot_product_attention, *operands((1, 2, 5, 7, 8, 4), torch.float64)
    )


def test_what_has_no_kernel_is_pytorchs():
    """16-bit attention and autocast: PyTorch's own kernels use the matrix units."""
    tensors = [put(t.bfloat16()) for t in operands((1, 2, 5, 7, 8, 8), torch.float32)]
    with fastops.record() as rows:
        FF.scaled_dot_product_attention(*tensors)
        with torch.autocast(DEVICE.type, torch.bfloat16):
            FF.scaled_dot_product_attention(*(t.float() for t in tensors))
    assert {row.kernel for row in rows} == {"aten"}
