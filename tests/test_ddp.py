"""DDP, FSDP2, tensor parallelism over two gloo processes: the weights of PyTorch, and of one process with all data."""

import subprocess
import sys
from pathlib import Path

import ddp
import pytest
import torch.distributed
from modes import ENVIRONMENT

TESTS = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """configuration -> "ok", or what is wrong."""
    if not torch.distributed.is_available():
        pytest.skip("this torch has no torch.distributed")
    meeting = tmp_path_factory.mktemp("ddp") / "meeting"
    processes = [
        subprocess.Popen(
            [sys.executable, TESTS / "ddp.py", str(rank), meeting],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=ENVIRONMENT,
        )
        for rank in range(2)
    ]
    results = [process.communicate(timeout=300) for process in processes]
    assert all(process.returncode == 0 for process in processes), "".join(errors for _, errors in results)
    return dict(line.split(": ", 1) for line in results[0][0].splitlines())


@pytest.mark.parametrize(
    "configuration", [*ddp.CONFIGURATIONS, *ddp.SHARDED, *ddp.TENSOR_PARALLEL, ddp.PLACEMENTS, *ddp.LIGHTNING]
)
def test_same_weights(outcomes, configuration):
    if configuration in ddp.LIGHTNING:
        pytest.importorskip("lightning")
    assert outcomes.get(configuration, "did not run") == "ok"
