"""The names of the CUDA kernels keep to the rule that test_record.py checks on the CPU; on the emulator: see gpu.py."""

import pytest
import torch
from gpu import put
from test_record import algorithms, run_calls

ON_GPU = {
    "conv_gemm_mma": 3, "conv_gemm_tf32": 3, "depthwise": 0, "depthwise_weight": 0, "elementwise": 0, "gemm_mma": 3,
    "gemm_simt": 3, "gemm_tf32": 3, "mlp_mma": 1, "mlp_simt": 1, "pool_gather": 0,
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_names_of_kernels(dtype):
    others = ("simt", "tf32") if dtype == torch.bfloat16 else ("mma",)
    expected = {name for name in ON_GPU if not name.endswith(others)}
    assert algorithms(run_calls(dtype, put, size=5, most_dims=2), "cuda", ON_GPU) == expected
