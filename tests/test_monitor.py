"""fastops.monitor.Monitor: the scalars of a training run, TensorBoard's files, and PyTorch's profiler."""

import importlib.util
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import fastops
from fastops.monitor import Monitor


class Scalars:
    def __init__(self):
        self.found = []

    def add_scalar(self, tag, value, step):
        assert type(value) is float
        self.found.append((tag, value, step))

    def of(self, step):
        return {tag: value for tag, value, at in self.found if at == step}


def train(monitor, steps, model=None):
    model = model or nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 1))
    fastops.replace_(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, losses = torch.randn(16, 64), []
    for _ in range(steps):
        with monitor.step() as scalars:
            loss = nn.functional.mse_loss(model(x), x[:, :1])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scalars["loss"] = loss
            scalars["rate"] = 0.1
        losses.append(loss.item())
    return model, losses


def test_scalars():
    writer = Scalars()
    _, losses = train(Monitor(writer, every=2), 3)
    for step, loss in enumerate(losses):
        assert writer.of(step)["loss"] == loss
        assert writer.of(step)["rate"] == pytest.approx(0.1)
        assert writer.of(step)["step_ms"] > 0
    closely, briefly = writer.of(2), writer.of(1)
    assert set(briefly) == {"loss", "rate", "step_ms"}
    times = {tag: value for tag, value in closely.items() if tag.startswith("time/")}
    assert {"time/linear", "time/relu", "time/linear_backward", "time/elsewhere"} <= set(times)
    assert sum(times.values()) == pytest.approx(1)
    kernels = [value for tag, value in closely.items() if tag.startswith("kernel/")]
    assert sum(kernels) == pytest.approx(1 - times["time/elsewhere"])
    flops = 2 * 16 * (64 * 32 + 32) * 2 + 2 * 16 * 32  # the input needs no gradient
    assert closely["GFLOP/s"] == pytest.approx(flops / closely["step_ms"] / 1e6)
    assert closely["memory/peak_mb"] > 10
    assert closely["memory/pool_mb"] >= 0


def test_a_step_that_raises_writes_nothing():
    writer = Scalars()
    monitor = Monitor(writer)
    with pytest.raises(ZeroDivisionError), monitor.step() as scalars:
        scalars["loss"] = 1 / 0
    assert writer.found == []
    assert monitor.steps == 0
    train(monitor, 1)
    assert "loss" in writer.of(0)


def test_errors(monkeypatch, tmp_path):
    with pytest.raises(TypeError, match="writer must be a folder or have add_scalar, got int"):
        Monitor(3)
    for every in (0, 1.5, True):
        with pytest.raises(ValueError, match=f"every must be an int of 1 or more, got {every}"):
            Monitor(Scalars(), every)
    with pytest.raises(TypeError, match="writer must have add_graph for this, Scalars has none"):
        Monitor(Scalars()).graph(nn.Linear(2, 2), torch.ones(1, 2))
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(
        ModuleNotFoundError, match=r"^fastops.monitor needs tensorboard: pip install fastops\[monitor\]$"
    ):
        Monitor(tmp_path)


needs_tensorboard = pytest.mark.skipif(
    importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed: pip install fastops[monitor]"
)


@needs_tensorboard
def test_tensorboard(tmp_path):
    """What TensorBoard reads from the folder: scalars, the graph, histograms."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Monitor(tmp_path, every=1) as monitor:
        model, losses = train(monitor, 2)
        monitor.histograms(model)
        monitor.graph(model, torch.randn(3, 64))
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(losses)
    assert {"time/linear", "GFLOP/s", "memory/peak_mb"} <= set(events.Tags()["scalars"])
    names = {f"{kind}/{name}" for kind in ("parameters", "gradients") for name, _ in model.named_parameters()}
    assert set(events.Tags()["histograms"]) == names
    assert events.Tags()["graph"]
    operations = {node.op for node in events.Graph().node} if hasattr(events.Graph(), "node") else set()
    assert "fastops" not in " ".join(operations)


def test_profiler_trace_has_our_kernels(tmp_path):
    """PyTorch's profiler: the trace that it writes, for TensorBoard's and Chrome's viewers, has our ops and shapes."""
    model, x = nn.Sequential(nn.Linear(64, 32), nn.GELU()), torch.randn(16, 64)
    fastops.replace_(model)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        model(x).sum().backward()
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    ours = {one["name"]: one["args"]["Input Dims"] for one in events if one["name"].startswith("fastops::")}
    assert ours["fastops::linear"] == [[16, 64], [32, 64], [32]]
    assert {"fastops::gelu", "fastops::gelu_backward", "fastops::linear_backward"} <= set(ours)


@needs_tensorboard
def test_example(tmp_path, capsys):
    path = Path(__file__).parent.parent / "examples" / "monitor.py"
    runpy.run_path(str(path))["main"]([str(tmp_path), "--epochs", "1"])
    assert "epoch 1: loss" in capsys.readouterr().out
    ops = {event["name"] for event in json.loads((tmp_path / "timeline.json").read_text())["traceEvents"]}
    assert {"conv2d", "batch_norm", "linear", "conv2d_backward_weight"} <= ops
    assert "fastops: Sequential" in (tmp_path / "model.html").read_text()
    assert list(tmp_path.glob("events.*"))
