"""The examples of several processes: two machines that torchrun joins on loopback, and a failure that they survive."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed
from modes import ENVIRONMENT

import fastops

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_two_machines_and_a_failure(tmp_path):
    """examples/multi_node.sh twice: a process that fails costs the steps since the checkpoint, and nothing else."""
    import ddp_digits

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    checkpoint = tmp_path / "digits.pt"
    command = ["sh", EXAMPLES / "multi_node.sh", endpoint, "2", "--steps", "30", "--checkpoint", checkpoint]
    environment = {**ENVIRONMENT, "PYTHON": sys.executable, "ADDRESS": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    machines = [
        subprocess.Popen([*command, "--fail-at", "15"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                         env=environment)
        for _ in range(2)
    ]  # fmt: skip
    try:
        results = [machine.communicate(timeout=300) for machine in machines]
    finally:
        for machine in machines:
            machine.terminate()  # torchrun takes its processes with it
    errors = "".join(error for _, error in results)
    assert [machine.returncode for machine in machines] == [0, 0], errors
    said = "".join(output for output, _ in results)
    assert "was told to fail at step 15" in errors
    assert "process 0 goes on at step 11" in said
    assert "process 1 goes on at step 11" in said
    assert "2 processes, 30 steps: accuracy 0." in said

    # One process with the whole of every batch, and PyTorch.
    alone = ddp_digits.network()
    ddp_digits.train(alone, 30)
    weights = torch.load(checkpoint)["model"]
    for name, weight in alone.state_dict().items():
        torch.testing.assert_close(weights[name], weight, atol=1e-5, rtol=1e-4)


def test_steps_go_on_from_a_checkpoint(tmp_path):
    """To the bit: 30 steps, and 20 and then 10."""
    import ddp_digits

    def trained(*steps):
        for count in steps:
            model = ddp_digits.network()
            fastops.replace_(model)
            ddp_digits.train(model, count, checkpoint=tmp_path / f"{len(steps)}.pt")
        return model.state_dict()

    for one, two in zip(trained(30).values(), trained(20, 30).values(), strict=True):
        assert torch.equal(one, two)


def test_sharded_example_without_processes():
    """Its training, on one process: on fastops as on PyTorch. tests/ddp.py has what is sharded."""
    import sharded_digits
    from training import assert_trained_alike

    exact, theirs, ours = sharded_digits.network().double(), sharded_digits.network(), sharded_digits.network()
    fastops.replace_(ours)
    for model in (exact, theirs, ours):
        sharded_digits.train(model, 20)
    assert_trained_alike(ours, theirs, exact)
