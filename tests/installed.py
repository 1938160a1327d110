"""What `make test-wheel` runs, in an environment that has the wheel and what it asks for, and nothing else."""

import importlib.metadata
import subprocess
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

# The wheel asks for the minor version of torch that it was built for; under another one its import names both.
major, minor = map(int, torch.__version__.split(".")[:2])
assert f"torch=={major}.{minor}.*" in importlib.metadata.requires("fastops"), importlib.metadata.requires("fastops")
for patch, loads in ((f"{minor}.99", True), (f"{minor - 1}.0", False), (f"{minor + 1}.0", False)):
    version = f"{major}.{patch}"
    code = f"import torch; torch.__version__ = {version!r}; import fastops"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    last = f"\nImportError: fastops was built for torch {torch.__version__}, and this is torch {version}. To build it"
    assert (run.returncode == 0) is loads, run.stderr
    assert loads or last in run.stderr, run.stderr
print(fastops.info())
print(calls)
