"""The names of the CUDA kernels keep to the rule that test_record.py checks on the CPU; on the emulator: see gpu.py."""

import pytest
import torch
from gpu import put
from test_record import algorithms, expected_kernels, run_calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_names_of_kernels(dtype):
    expected = expected_kernels(dtype, on_gpu=True)
    assert algorithms(run_calls(dtype, put, size=5, most_dims=2, on_gpu=True), "cuda", expected) == set(expected)
