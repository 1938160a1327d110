"""The scoreboard: who lies is not timed, who crashes or is missing stops nobody, and tables say what was measured."""

import importlib.util
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastops.benchmarks import report
from fastops.benchmarks.harness import BOTH, FORWARD
from fastops.benchmarks.scoreboard import command, tables, turns, worker
from fastops.benchmarks.scoreboard.networks import INT8, NETWORKS, Network, convolution
from fastops.benchmarks.scoreboard.providers import PROVIDERS, Absent, Provider, Setup, Torch, Training, installed
from fastops.benchmarks.scoreboard.tables import Case, Row


class Lying(Torch):
    """Outputs and gradients that are a hundredth, and a tenth, too large; a training step takes gradients twice."""

    def __init__(self) -> None:
        super().__init__("Lying", lambda model: model.register_forward_hook(lambda m, x, y: 1.01 * y) and model)

    def training(self, setup: Setup) -> Training:
        side = super().training(setup)
        return replace(side, rate=lambda value: side.rate(1.1 * value))


class Crashing(Torch):
    """The process ends in the middle of being timed."""

    def __init__(self) -> None:
        super().__init__("Crashing", self._count, peer=False)

    def _count(self, model: torch.nn.Module) -> torch.nn.Module:
        self.calls = 0
        model.register_forward_hook(self._crash)
        return model

    def _crash(self, *_: object) -> None:
        self.calls += 1
        if self.calls > 500:
            os.abort()


class Refusing(Provider):
    """Cannot prepare the case."""

    label = "Refusing"

    def inference(self, setup: Setup) -> None:
        raise RuntimeError("no such kernel")


class Missing(Provider):
    label = "Missing"

    def inference(self, setup: Setup) -> None:
        installed("a_package_that_nobody_has")


OTHERS = [f"test_scoreboard:{name}" for name in ("Lying", "Crashing", "Refusing", "Missing")]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """Runs the command; returns its status, its rows by provider, and what it printed."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setattr(turns, "QUICK_TURN", 0.02)

    def started(*arguments: str) -> tuple[int, dict[str, Row], str]:
        options = command.parser().parse_args([*arguments, "--quick", "--threads", "1", "--out", str(tmp_path)])
        status = command.run(options)
        (path,) = tmp_path.glob("scoreboard-*.json")
        rows = tables.rows_of(json.loads(path.read_text()))
        return status, {row.provider: row for row in rows}, capsys.readouterr().out

    return started


def test_inference(run, tmp_path: Path) -> None:
    status, rows, printed = run(
        "--models", "simplenet", "--only", "inference", "--providers", "eager", *OTHERS, "replace"
    )
    assert status == 1  # some were wrong
    lying, crashing, refusing, missing = (rows[name] for name in OTHERS)
    assert lying.status == "WRONG"
    assert lying.error == pytest.approx(0.01, rel=0.1)
    assert lying.error > lying.allowed_error
    assert crashing.status == "crashed: signal 6"
    assert refusing.status == "crashed: RuntimeError: no such kernel"
    assert missing.status == "not installed"
    for row in (lying, crashing, refusing, missing):
        assert (row.ms, row.samples) == (None, 0)
    for name in ("eager", "replace"):
        row = rows[name]
        assert row.status == "measured"
        assert 0 < row.least_ms <= row.q1_ms <= row.ms <= row.q3_ms
        assert row.samples >= turns.QUICK_ROUNDS
        assert row.error <= row.allowed_error
    assert rows["eager"].error == rows["eager"].torch_error
    assert "SimpleNet 10-5-5-1, 100" in printed
    assert "WRONG" in printed
    assert next(tmp_path.glob("scoreboard-*.png")).read_bytes().startswith(b"\x89PNG")


def test_training(run) -> None:
    status, rows, printed = run("--models", "mlp:3", "--only", "training", "--providers", "eager", OTHERS[0], "replace")
    assert status == 1
    assert rows[OTHERS[0]].status == "WRONG"
    assert rows[OTHERS[0]].peak_bytes is None
    for name in ("eager", "replace"):
        assert rows[name].status == "measured"
        assert 0 < rows[name].peak_bytes < 100e6
    assert "peak memory of a training step, MB" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "resnet51"], "--models resnet51 is none of simplenet, "),
        (["--models", "mlp:x"], "--models mlp:x"),
        (["--providers", "theano"], "--providers theano is none of eager, "),
        (["--providers", "no.such:Thing"], "--providers no.such:Thing"),
        (["--threads", "0"], "--threads must be between 1 and"),
        (["--models", "mlp", "--dtype", "int8"], "--models, --only and --dtype leave no case"),
    ],
)
def test_options_are_checked(arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=f"scoreboard: {message}"):
        command.choose(command.parser().parse_args(arguments))


def test_options_choose_the_cases() -> None:
    def chosen(*arguments: str) -> list[Case]:
        return command.choose(command.parser().parse_args(arguments))

    every = chosen()
    assert {case.network for case in every} == set(NETWORKS) - {"bert"}
    assert {case.dtype for case in every} == {"f32", "bf16"}
    resnet = [case for case in every if (case.network, case.dtype) == ("resnet50", "f32")]
    assert [(case.batch, case.mode) for case in resnet] == [(8, FORWARD), (1, FORWARD), (8, BOTH)]
    assert chosen("--quick", "--models", "vitb16", "--only", "inference") == [Case("vitb16", 4, "f32", FORWARD)]
    assert chosen("--models", "vgg11:2", "--dtype", "bf16", "--only", "training") == [Case("vgg11", 2, "bf16", BOTH)]


def test_int8_has_cases_and_providers_of_its_own() -> None:
    options = command.parser().parse_args(["--dtype", "int8"])
    cases = command.choose(options)
    assert {case.network for case in cases} == {"resnet50", "mobilenetv2", "vitb16", "bert"}
    assert {case.mode for case in cases} == {FORWARD}
    names = command.take_part(options, cases[0])
    assert {"eager", "freeze", "int8_static", "int8_dynamic", "openvino_int8", "torchao"} <= set(names)
    assert not {"fuse", "jax", "openvino"} & set(names)
    assert not {"int8_static", "torchao"} & set(command.take_part(options, Case("mlp", 64, "f32", FORWARD)))


def test_int8_providers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def images() -> torch.nn.Module:
        layers = [*convolution(3, 16, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(16 * 64, 10)]
        return torch.nn.Sequential(*layers)

    def rows() -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Linear(128, 128), torch.nn.GELU(), torch.nn.Linear(128, 10))

    monkeypatch.setitem(NETWORKS, "images", Network("images", images, (3, 8, 8), (2,), 2, 2, 10, (INT8,)))
    monkeypatch.setitem(NETWORKS, "rows", Network("rows", rows, (128,), (2,), 2, 2, 10, (INT8,)))
    for network, names in (("images", ["int8_static"]), ("rows", ["int8_static", "int8_dynamic", "quantize_dynamic"])):
        setup = Setup(network, 2, INT8, torch.get_num_threads(), tmp_path)
        exact = setup.model().eval()(setup.data()[0])
        for name in names:
            side = PROVIDERS[name].inference(setup)
            error = worker.distance({"output": exact}, {"output": side.output(side.call())})
            assert 0 < error < worker.INT8_ERROR
    with pytest.raises(Absent, match="linear only"):
        PROVIDERS["int8_dynamic"].inference(Setup("images", 2, INT8, torch.get_num_threads(), tmp_path))


@pytest.mark.parametrize(
    ("name", "parameters"),
    # Of torchvision's networks; of a block of GPT-2 small; of transformers' BertModel without embeddings and pooler.
    [
        ("resnet50", 25557032),
        ("mobilenetv2", 3504872),
        ("vgg11", 132863336),
        ("convnext", 28589128),
        ("vitb16", 86567656),
        ("gpt2", 7087872),
        ("bert", 85054464),
    ],
)
def test_networks_are_those_of_the_papers(name: str, parameters: int) -> None:
    network = NETWORKS[name]
    with torch.device("meta"):
        model = network.build()
        traced = torch.fx.symbolic_trace(model)
        output = traced(torch.empty(2, *network.size))
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert output.shape == ((2, network.classes) if network.classes else (2, *network.size))


@pytest.mark.parametrize("name", ["mlp", "convnet", "resnet50", "mobilenetv2", "convnext", "gpt2"])
@pytest.mark.parametrize("training", [False, True])
def test_jax_computes_the_same(name: str, training: bool) -> None:
    pytest.importorskip("jax", reason="JAX is not installed")
    from fastops.benchmarks.scoreboard import through_jax as through

    model = NETWORKS[name].model().train(training)
    x = torch.randn(2, *(NETWORKS[name].size if name != "gpt2" else (16, 768)))
    x = x[..., :64, :64] if x.shape[-1] == 224 else x
    parameters = {key: through.array(value) for key, value in model.named_parameters()}
    buffers = {key: through.array(value) for key, value in model.named_buffers()}
    output, changed = through.translate(model)(parameters, buffers, through.array(x))
    expected = model(x).detach()
    torch.testing.assert_close(through.tensor(output), expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())
    for key, value in model.named_buffers():
        if "running" in key:
            torch.testing.assert_close(through.tensor(changed[key]), value, rtol=1e-3, atol=1e-4)


# ---- what it leaves behind -------------------------------------------------------------------------------------------

LABELS = {"eager": ("PyTorch", True), "jax": ("JAX", True), "replace": ("replace_", False), "fuse": ("fuse", False)}


def rows_of(case: Case, **times: float | str) -> list[Row]:
    """Made-up measurements: milliseconds, or why there are none."""
    rows = []
    for name, value in times.items():
        label, peer = LABELS[name]
        measured = isinstance(value, float)
        status, ms = ("measured", value) if measured else (value, None)
        rows.append(Row(*vars(case).values(), 2, name, label, peer, status, ms, ms, ms, ms, 9 * measured))
    return rows


MADE_UP = [
    *rows_of(Case("resnet50", 8, "f32", FORWARD), eager=649.0, jax="not installed", replace=431.0, fuse=300.0),
    *rows_of(Case("resnet50", 1, "f32", FORWARD), eager=89.7, jax=38.2, replace=59.0, fuse="WRONG"),
    *[
        replace(row, peak_bytes=10**9)
        for row in rows_of(Case("mlp", 64, "f32", BOTH), eager=1.0, jax=0.4, replace=0.5, fuse="crashed: signal 11")
    ],
]
STAMP = {**report.machine(), "date": "2026-01-02", "load_before": 0.0, "threads": 2, "versions": {"jax": "0.10"}}


def test_tables() -> None:
    text = tables.tables(MADE_UP)
    lines = {line.split("  ")[0]: line.split() for line in text.splitlines()}
    assert lines["ResNet-50, 8"][2:] == ["649", "not", "installed", "431", "*300*", "2.16", "2.16"]
    assert lines["ResNet-50, 1"][2:] == ["89.7", "*38.2*", "59", "WRONG", "1.52", "0.65"]
    assert lines["MLP 784-128-10, 64"][3:] == ["1", "*0.4*", "0.5", "crashed", "2.00", "0.80"]
    assert lines["MLP 784-128-10, 64, f32"][4:] == ["1000"] * 4


def test_results_are_added_by_case(tmp_path: Path) -> None:
    tables.write(tmp_path, STAMP, MADE_UP)
    again = rows_of(Case("resnet50", 1, "f32", FORWARD), eager=80.0)
    (path, plot) = tables.write(tmp_path, STAMP, again, keep=True)
    kept = tables.rows_of(json.loads(path.read_text()))
    assert [row.ms for row in kept if row.batch == 1] == [80.0]
    assert len(kept) == len(MADE_UP) - 4 + 1
    assert plot.read_bytes().startswith(b"\x89PNG")
    tables.write(tmp_path, STAMP, again)
    assert len(json.loads(path.read_text())["rows"]) == 1


def test_no_plot_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (path,) = tables.write(tmp_path, STAMP, MADE_UP)
    assert path.suffix == ".json"


def test_pages_have_the_newest(tmp_path: Path) -> None:
    assert tables.newest(tmp_path) is None
    tables.write(tmp_path, {**STAMP, "date": "2025-12-31"}, MADE_UP[:4])
    tables.write(tmp_path, STAMP, MADE_UP)
    content = tables.newest(tmp_path)
    assert content["machine"]["date"] == "2026-01-02"
    with pytest.raises(FileNotFoundError):  # a scoreboard is no results of ops
        report.newest(tmp_path, models_only=False)
    short, long = (report._scoreboard(content, short=short) for short in (True, False))
    assert "| ResNet-50, 8 | 649 | 300 (fuse) | **2.16** | **2.16** |" in short
    assert "ResNet-50, 1" not in short
    assert "| ResNet-50, 1 | 89.7 | **38.2** | 59 | WRONG | 1.52 | 0.65 |" in long
    assert "| MLP 784-128-10, 64, f32 | 1000 | 1000 | 1000 | 1000 |" in long
    assert report._scoreboard(None, short=True) == ""
