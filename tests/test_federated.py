"""Flower: federated averaging on our kernels, against the same arithmetic on PyTorch."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from modes import ENVIRONMENT

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"

# In a process of its own, for what flwr starts at its import and asks of other packages.
PROGRAM = """
import json, sys
sys.path[:0] = sys.argv[1:]
import torch
import fastops, flower_digits as example
from training import assert_trained_alike

def averaged(dtype):
    model = example.network().to(dtype)
    for _ in range(example.ROUNDS):
        states, counts = [], []
        for client in range(example.CLIENTS):
            one = example.network().to(dtype)
            one.load_state_dict(model.state_dict())
            counts.append(example.train(one, client))
            states.append(one.state_dict())
        model.load_state_dict({
            name: sum(count * state[name] for count, state in zip(counts, states)) / sum(counts) for name in states[0]
        })
    return model

with fastops.record() as calls:
    theirs, exact = averaged(torch.float32), averaged(torch.float64)
assert not calls
with fastops.record() as calls:
    ours = example.simulate()
assert_trained_alike(ours, theirs, exact)
grid = example.InProcess(example.client, 2)
content = example.RecordDict({"arrays": example.ArrayRecord(theirs.state_dict())})
ids = grid.push_messages([grid.create_message(content, "train", node, "1") for node in grid.get_node_ids()])
sizes = [reply.content["metrics"]["num-examples"] for reply in grid.pull_messages(ids)]
ours_ran, theirs_ran = (sorted({call.op for call in calls if (call.kernel == "aten") is by}) for by in (False, True))
print(json.dumps([example.accuracy(ours), ours_ran, theirs_ran, sizes]))
"""


@pytest.mark.skipif(
    importlib.util.find_spec("flwr") is None, reason="flwr is not installed: pip install fastops[federated]"
)
def test_federated_averaging():
    folders = [EXAMPLES, Path(__file__).resolve().parent]
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, *folders], capture_output=True, text=True, env=ENVIRONMENT, check=False
    )
    assert run.returncode == 0, run.stderr
    accuracy, ours_ran, theirs_ran, sizes = json.loads(run.stdout.splitlines()[-1])
    assert accuracy > 0.8
    assert {"conv2d", "conv2d_backward_weight", "linear", "linear_backward"} <= set(ours_ran)
    assert theirs_ran == []
    assert sizes == [299, 479]
