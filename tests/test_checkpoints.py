"""Checkpoints of replaced and fused models: written with fastops and read where it is missing, and the other way."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from modes import ENVIRONMENT

import fastops

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

pytest.importorskip("safetensors", reason="safetensors is not installed: pip install fastops[checkpoints]")
import checkpoints  # noqa: E402

FORMATS = list(checkpoints.FORMATS)

# A process that has no fastops: it reads what is there, holds it to the expected outputs, and writes it again.
WITHOUT = """
import sys
from pathlib import Path
sys.modules["fastops"] = None
sys.path.insert(0, sys.argv[1])
folder = Path(sys.argv[2])
import torch, checkpoints
for name in sys.argv[3:]:
    write, read = checkpoints.FORMATS[name]
    for way in ("replaced", "fused"):
        model = checkpoints.network()
        read(model, folder / f"{name} {way}")
        torch.testing.assert_close(checkpoints.outputs(model), torch.load(folder / f"{way}.pt"))
    write(model, folder / f"{name} plain")
torch.load(folder / "restored.pt", weights_only=False)
for whole in ("whole.pt", "whole fused.pt"):
    try:
        torch.load(folder / whole, weights_only=False)
    except ModuleNotFoundError as error:
        print(error)
"""


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    model = checkpoints.network()
    model(torch.randn(8, 1, 8, 8))  # running statistics
    replaced = checkpoints.network()
    replaced.load_state_dict(model.state_dict())
    fastops.replace_(replaced)
    return {"replaced": replaced, "fused": fastops.fuse(model)}


def test_with_and_without_fastops(models, tmp_path):
    for way, model in models.items():
        torch.save(checkpoints.outputs(model), tmp_path / f"{way}.pt")
        for name in FORMATS:
            checkpoints.FORMATS[name][0](model, tmp_path / f"{name} {way}")
    torch.save(models["replaced"], tmp_path / "whole.pt")
    torch.save(models["fused"], tmp_path / "whole fused.pt")
    restored = torch.load(tmp_path / "whole.pt", weights_only=False)
    fastops.restore_(restored)
    torch.save(restored, tmp_path / "restored.pt")

    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", WITHOUT, EXAMPLES, tmp_path, *FORMATS],
        capture_output=True, text=True, env=ENVIRONMENT, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    # A whole model that was not restored needs fastops, and the error names it.
    assert ["fastops" in line for line in run.stdout.splitlines()] == [True, True]

    for name in FORMATS:
        for make in (lambda: models["replaced"], lambda: fastops.fuse(checkpoints.network())):
            model = make()
            checkpoints.FORMATS[name][1](model, tmp_path / f"{name} plain")
            torch.testing.assert_close(checkpoints.outputs(model), checkpoints.outputs(models["fused"]))


def test_example(capsys):
    checkpoints.main()
    *lines, last = capsys.readouterr().out.splitlines()
    assert len(lines) == 12
    assert all(float(line.rpartition(" ")[2]) < 1e-6 for line in lines)
    assert last == "a whole model, restored: torch.nn.modules.conv"


def test_optimizers(tmp_path):
    """An optimizer's state goes with the parameters, which are the same objects before and after."""
    model = checkpoints.network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    x = torch.randn(4, 1, 8, 8)

    def step(model, optimizer):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()

    fastops.replace_(model)
    step(model, optimizer)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "both.pt")
    step(model, optimizer)

    again = checkpoints.network()
    saved = torch.load(tmp_path / "both.pt")
    again.load_state_dict(saved["model"])
    other = torch.optim.SGD(again.parameters(), lr=0.1, momentum=0.9)
    other.load_state_dict(saved["optimizer"])
    step(again, other)
    for p, q in zip(again.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-4, rtol=1e-4)
