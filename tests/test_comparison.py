"""fastops.light.Comparison: what it measures, against what is known of a model."""

import builtins
import io
import json
import runpy
from pathlib import Path

import pytest
import torch
from torch import nn

import docs
import fastops
from fastops import light


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))


def made(**options: object) -> light.Comparison:
    torch.manual_seed(0)
    model, x = mlp(), torch.randn(1, 64)
    comparison = light.Comparison(x, rounds=3, **options)
    comparison.add("as trained", model)
    light.prune_channels_(model, x)
    comparison.add("pruned", model)
    return comparison


def test_what_is_measured():
    seen = []
    comparison = made(accuracy=lambda model: seen.append((model.training, torch.is_grad_enabled())) or len(seen) / 4)
    first, second = comparison.steps
    file = io.BytesIO()
    torch.save(mlp().state_dict(), file)
    assert abs(first.disk - file.tell()) < 200
    assert first.disk / second.disk == pytest.approx(1.95, abs=0.05)
    weights = 4 * sum(parameter.numel() for parameter in mlp().parameters())
    assert first.memory - weights == pytest.approx(4 * (256 + 256), abs=200)  # the hidden layer before and after ReLU
    assert (first.accuracy, second.accuracy) == (0.25, 0.5)
    assert seen == [(False, False)] * 2
    assert 0 < first.low <= first.milliseconds <= first.high
    lines = str(comparison).splitlines()
    assert lines[0].split() == ["step", "on", "disk", "memory", "ms", "accuracy"]
    assert lines[2].startswith("pruned ")
    assert " x1.9" in lines[2]
    assert lines[2].endswith("0.5000  +0.2500")
    read = json.loads(comparison.to_json())
    assert [step["name"] for step in read["steps"]] == ["as trained", "pruned"]
    assert read["machine"] == comparison.machine


def test_packed_weights_are_memory():
    model, x = nn.Sequential(nn.Linear(256, 256)), torch.randn(1, 256)
    comparison = light.Comparison(x)
    light.quantize_(model)
    comparison.add("int8", model)
    assert comparison._steps[0].memory > 2 * 256 * 256


def test_each_step_is_what_it_was_then():
    model, x = mlp(), torch.randn(1, 64)
    comparison = light.Comparison(x, rounds=2)
    comparison.add("before", model)
    light.prune_channels_(model, x, amount=0.9)
    assert comparison._models[0][0].out_features == 256
    assert comparison.steps[0].accuracy is None
    before = comparison.steps[0].milliseconds
    assert comparison.steps[0].milliseconds == before  # timed once
    comparison.add("after", model)
    assert len([step for step in comparison.steps if step.milliseconds]) == 2


def test_other_calls_and_models():
    class Two(nn.Module):
        def forward(self, a, b=None):
            return a if b is None else a + b

    for inputs in (torch.ones(2), (torch.ones(2), torch.ones(2)), {"a": torch.ones(2), "b": torch.ones(2)}):
        comparison = light.Comparison(inputs, rounds=1, prepare=fastops.freeze)
        comparison.add("one", Two())
        assert comparison.steps[0].memory is not None
    assert str(light.Comparison(torch.ones(1))) == "nothing measured"
    held = nn.Linear(2, 2)
    held.generator = (one for one in ())
    with pytest.raises(TypeError, match=r"model must be one that copy\.deepcopy can copy"):
        comparison.add("held", held)
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got int"):
        comparison.add("none", 3)


def test_picture(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    comparison = made(accuracy=lambda model: 0.9, progress=True)
    assert comparison.plot(tmp_path / "light.png")
    assert (tmp_path / "light.png").read_bytes()[:4] == b"\x89PNG"
    assert "timing 3/3" in capsys.readouterr().err
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    assert not comparison.plot(tmp_path / "none.png")
    assert capsys.readouterr().err == f"{tmp_path}/none.png: no picture without Matplotlib: pip install fastops[demo]\n"


@pytest.mark.parametrize("name", ["Comparison", "Measured"])
def test_docstrings(name):
    symbol = getattr(light, name)
    assert docs.failed_examples(symbol, name) == ""
    if name == "Comparison":
        assert docs.missing_parts(symbol) == []
        for one in ("add", "to_json", "plot"):
            assert docs.failed_examples(getattr(symbol, one), one) == ""


@pytest.mark.parametrize("network", ["convnet", "mlp"])
def test_the_example(network):
    pytest.importorskip("sklearn")
    example = runpy.run_path(str(Path(__file__).resolve().parent.parent / "examples" / "light.py"))
    steps = {step.name: step for step in example["run"](network, steps=4, width=16, progress=False).steps}
    smaller = {name: steps["as trained"].disk / step.disk for name, step in steps.items()}
    assert smaller["half of the channels"] > 1.8
    assert smaller["distilled, a quarter"] > 3
    assert smaller["int8"] > 2.5
    assert all(0 <= step.accuracy <= 1 for step in steps.values())
