"""What `make test-wheel` runs, in an environment that has the wheel and what it asks for, and nothing else."""

import sys
from pathlib import Path

import torch
from torch import nn

import fastops

assert Path(fastops.__file__).is_relative_to(sys.prefix), fastops.__file__
model, x = nn.Sequential(nn.Linear(64, 32), nn.ReLU()), torch.randn(16, 64)
expected = model(x)
fastops.replace_(model)
with fastops.record() as calls:
    y = model(x)
    y.sum().backward()
torch.testing.assert_close(y, expected)
assert calls
assert all(call.kernel != "aten" for call in calls)
print(fastops.info())
print(calls)
