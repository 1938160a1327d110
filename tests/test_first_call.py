"""What the first call of a process finds leaves nothing behind: modes, defaults, threads, a fork."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from every_op import declared, layer_input
from fresh import run_python
from modes import ENVIRONMENT

import build_native

TESTS = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """state -> "ok", or what is wrong after a first call in it. One process of pytest-xdist asks, for all."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    kept = folder / "first_call" / "outcomes.json"
    with build_native.locked(kept.parent):
        if not kept.exists():
            kept.write_text(json.dumps(_ask()))
    return json.loads(kept.read_text())


def _ask():
    layers = [(name, arguments, layer_input(name).shape) for name, arguments in declared("OP_LAYERS")]
    run = subprocess.run(
        [sys.executable, TESTS / "first_call.py", json.dumps(layers)],
        capture_output=True,
        text=True,
        timeout=300,
        env=ENVIRONMENT,
    )
    assert run.returncode == 0, run.stderr
    lines = [line.partition(": ") for line in run.stdout.splitlines()]
    return {state: outcome for state, _, outcome in lines} | {"stderr": run.stderr}


def _states():
    import first_call

    return list(first_call.STATES)


@pytest.mark.parametrize("state", _states())
def test_nothing_is_kept_from_the_first_call(outcomes, state):
    assert outcomes.get(state, "the process ended") == "ok", outcomes["stderr"][-3000:]


AFTER_A_FORK = """
import os, torch, fastops
torch.set_num_threads(2)
torch.ones(1 << 20).exp()  # torch's threads are there now; the child will not have them
x = torch.ones(512, 512)
child = os.fork()
if child == 0:
    y = fastops.functional.linear(x, x)
    os._exit(0 if float(y[5, 7]) == 512 else 1)
assert os.waitpid(child, 0)[1] == 0
print("ok")
"""


def test_first_call_in_a_forked_child():
    """Where torch has used its threads before, and fastops has not been called."""
    run = run_python(AFTER_A_FORK)
    assert run.stdout.strip() == "ok", run.stderr
