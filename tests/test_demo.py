"""fastops demo, shortened."""

import argparse
import subprocess
import sys
from pathlib import Path

import pytest

from fastops import demo

MODELS = ["LinearRegression 1-1", "SimpleNet 10-5-5-1", "MLP 64-128-10", "MLP 784-128-10", "ConvNet 28x28"]


def test_command(tmp_path: Path) -> None:
    plot = tmp_path / "demo.png"
    result = subprocess.run(
        [sys.executable, "-m", "fastops", "demo", "--steps", "12", "--threads", "1", "--out", str(plot)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    for model in MODELS:
        assert sum(line.startswith(model) for line in lines) == 1
        assert f"{model}: step 12 of 12, loss " in result.stderr
    assert "speed-up" in result.stdout
    replaced = [line.split("torch.nn.")[0] for line in lines if "->  fastops.nn." in line]
    for layer in ("conv1", "conv2", "relu", "fc1", "fc2"):
        assert any(layer in names for names in replaced)
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("index", range(5))
def test_both_sides_learn_the_same(index: int) -> None:
    task = demo.tasks(seed=0)[index]
    outcome = demo.train(task, 100, seed=0, progress=lambda text: None)
    assert outcome.torch.losses[-1] < outcome.torch.losses[0]
    assert len(outcome.torch.losses) == len(outcome.fastops.losses) == 100
    differences = [abs(a - b) for a, b in zip(outcome.torch.losses, outcome.fastops.losses, strict=True)]
    assert max(differences) == outcome.largest_difference
    # Adam and the maxima of a ConvNet amplify roundings some 50000 times in 100 steps: PyTorch's own losses differ by
    # 0.0032 from a float64 run when its initial weights are perturbed by one rounding, fastops' by 0.003 to 0.008.
    chaotic = outcome.name.startswith("ConvNet")
    assert max(differences[:20]) < 1e-4
    assert max(differences) < (5e-2 if chaotic else 1e-4)
    assert abs(outcome.torch_score - outcome.fastops_score) < 0.02


def test_seed_decides_everything() -> None:
    first, second, other = (
        demo.train(demo.tasks(seed)[2], 20, seed, lambda text: None).fastops.losses for seed in (3, 3, 4)
    )
    assert first == second
    assert first != other


@pytest.mark.parametrize("name", ["steps", "epochs", "threads"])
def test_numbers_are_checked(name: str, capsys: pytest.CaptureFixture) -> None:
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    assert demo.run(parser.parse_args([f"--{name}", "0"])) == 2
    assert f"--{name} must be at least 1, got 0" in capsys.readouterr().err
