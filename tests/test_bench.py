"""The benchmark harness: it verifies before it times, its cases cover the figures, and it leaves its results behind."""

import argparse
import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import fastops
from fastops.benchmarks import activation, busy, command, conv, figures, footprint, harness, linear, models, report
from fastops.benchmarks.harness import Case, Row, Sides


def options(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(arguments)


def row_of(case: Case, ratio: float = 1.0, isa: str = "avx512", spread: float = 0.0) -> Row:
    """A made-up measurement; spread: how far PyTorch's quartiles are from its median, as a part of it."""
    return Row(
        op=case.op,
        shape=case.shape,
        dtype=case.dtype,
        mode=case.mode,
        threads=case.threads,
        isa=case.isa or isa,
        lowered=case.isa is not None,
        torch_us=ratio,
        torch_q1_us=ratio * (1 - spread),
        torch_q3_us=ratio * (1 + spread),
        fastops_us=1.0,
        fastops_q1_us=1.0,
        fastops_q3_us=1.0,
        ratio=ratio,
        gflops=1.0,
        torch_gflops=1.0,
        gbytes=1.0,
        torch_gbytes=1.0,
        bound=case.bound,
        peak=2.0,
        percent_of_peak=50.0,
        torch_percent_of_peak=50.0,
        intensity=case.flops / case.bytes,
        error=0.0,
        torch_error=0.0,
        samples=9,
    )


@pytest.mark.parametrize("mode", harness.MODES)
@pytest.mark.parametrize(
    ("op", "shape"),
    [
        ("linear", "7x5x3"),
        ("linear+relu", "7x5x3"),
        ("mlp", "9x5x3"),
        ("prelu", "100"),
        ("glu", "128"),
        *[(op, "2x3x8x8-4-k3-p1") for op in conv.FUNCTIONS if op.startswith("conv2d")],
        ("conv2d", "2x4x9x9-8-k3-s2-p1-g4"),
        ("conv1d", "2x3x9-4-k3"),
        ("conv3d", "1x2x4x5x6-3-k2"),
        ("conv_transpose2d", "2x3x4x4-5-k4-s2-p1"),
        ("sparse_linear", "8x16x16-50-1x1"),
    ],
)
def test_measure(op: str, shape: str, mode: str) -> None:
    row = harness.measure(command.OPS[op].make(op, shape, "f32", mode, 1), quick=True)
    assert row.ratio == pytest.approx(row.torch_us / row.fastops_us)
    assert row.fastops_q1_us <= row.fastops_us <= row.fastops_q3_us
    assert row.peak > 0
    assert row.samples >= 5


def test_settings_are_put_back() -> None:
    threads, isa = torch.get_num_threads(), harness._C.isa_used()
    harness.measure(linear.make("linear", "7x5x3", "f32", "forward", 1, "scalar"), quick=True)
    assert torch.get_num_threads() == threads
    assert harness._C.isa_used() == isa
    assert torch.is_grad_enabled()


def test_wrong_results_are_not_timed() -> None:
    def prepare(case: Case) -> Sides:
        return harness.functional_sides(case, F.tanh, lambda x: 1.001 * F.tanh(x), [torch.randn(100)])

    case = replace(activation.make("tanh", "100", "f32", "forward", 1), prepare=prepare)
    with pytest.raises(harness.WrongResult, match="error"):
        harness.measure(case, quick=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_compare_refuses_nan_and_inf(value: float) -> None:
    exact = [torch.ones(3, dtype=torch.float64)]
    error, _, allowed = harness.compare(exact, [torch.tensor([1, value, 1])], [torch.ones(3)], torch.float32)
    assert not error <= allowed


def test_every_figure_has_its_cases() -> None:
    rows = [row_of(case) for case in command.choose(options())]
    assert all(row.threads in (1, 2) for row in rows)
    memory = {side: {"MLP": 100, "ConvNet": 100, "ReLU": 32 if side == "torch" else 1} for side in ("torch", "fastops")}
    results = figures.evaluate(rows, memory)
    assert len(results) == len(figures.FIGURES) + len(figures.REMAINING) + len(footprint.MODELS) + 1
    by_name = {result.name: result for result in results}
    assert by_name["what a ReLU keeps for backward: PyTorch's / ours"].verdict == figures.REACHED
    assert by_name["linear f32 1x4096x4096, forward: lowest"].verdict == figures.MISSED


def test_backward_alone_is_measured_if_asked_for() -> None:
    alone = command.choose(options("--pass", "backward"))
    assert {case.mode for case in alone} == {harness.BACKWARD}
    both = {(case.op, case.shape, case.dtype) for case in command.choose(options("--pass", "both"))}
    assert {(case.op, case.shape, case.dtype) for case in alone} == {row for row in both if not row[0].endswith("step")}
    assert not any(case.mode == harness.BACKWARD for case in command.choose(options()))


def test_figures_take_the_lowest_and_the_geomean() -> None:
    cases = [linear.make("linear", shape, "f32", "forward", 2) for shape in linear.LAYERS[:2]]
    results = figures.evaluate([row_of(cases[0], 1.0), row_of(cases[1], 4.0)], None)
    measured = {result.name: result.measured for result in results}
    assert measured["linear f32, layer shapes, forward: geomean"] == "2.00x"
    assert measured["linear f32, layer shapes, forward and forward+backward: lowest"] == "1.00x"


@pytest.mark.parametrize(
    ("ratio", "spread", "verdict"),
    [(2.2, 0.0, "reached"), (2.19, 0.0, "missed"), (2.1, 0.05, "level"), (2.0, 0.05, "missed")],
)
def test_an_aim_missed_within_the_spread_is_level(ratio: float, spread: float, verdict: str) -> None:
    row = row_of(linear.make("linear", linear.VECTOR, "f32", "forward", 2), ratio, spread=spread)
    (result,) = figures.evaluate([row], None)
    assert (result.name, result.verdict) == ("linear f32 1x4096x4096, forward: lowest", verdict)
    assert result.spread == f"{ratio * (1 - spread):.2f} - {ratio * (1 + spread):.2f}"


def test_a_row_that_misses_decides_before_a_lower_one_that_may_not() -> None:
    cases = [linear.make("linear", shape, "f32", "forward", 2) for shape in linear.LAYERS[:2]]
    rows = [row_of(cases[0], 1.0, spread=0.5), row_of(cases[1], 1.1)]
    result = next(one for one in figures.evaluate(rows, None) if one.name.endswith("forward+backward: lowest"))
    assert (result.measured, result.verdict) == ("1.10x", figures.MISSED)


def test_the_spread_of_a_geomean_is_narrower_than_its_rows() -> None:
    cases = [linear.make("linear", shape, "f32", "forward", 2) for shape in linear.LAYERS[:4]]
    results = figures.evaluate([row_of(case, 2.0, spread=0.2) for case in cases], None)
    result = next(one for one in results if one.name == "linear f32, layer shapes, forward: geomean")
    # Four rows of 1.6 to 2.4: half their width in logarithms.
    assert result.spread == f"{2 * 0.8**0.5:.2f} - {2 * 1.2**0.5:.2f}"


def test_options_choose_the_cases() -> None:
    chosen = command.choose(options("--op", "tanh", "--dtype", "bf16", "--pass", "both"))
    assert {(case.op, case.dtype, case.mode) for case in chosen} == {("tanh", "bf16", "both")}
    assert {case.shape for case in chosen} == {str(size) for size in activation.SIZES}
    grid = command.choose(
        options("--op", "linear", "--shape", "3x4x5", "--threads", "1", "2", "--mode", "forward", "record")
    )
    assert len(grid) == 3 * 2 * 2
    assert {case.op for case in grid} == {"linear", "linear+relu", "linear+gelu"}


@pytest.mark.parametrize(
    "arguments",
    [
        ["--op", "conv9d"],
        ["--shape", "3x4x5"],
        ["--op", "linear", "--shape", "3"],
        ["--op", "conv2d", "--shape", "3x4x5-6-k1"],
        ["--models", "--shape", "resnet19-1x3x32x32"],
        ["--models", "--shape", "resnet18-1x3x32x32", "--pass", "record"],
        ["--threads", "0"],
    ],
)
def test_options_are_checked(arguments: list[str]) -> None:
    with pytest.raises(SystemExit, match="fastops bench: "):
        command.choose(options(*arguments))


def test_command_writes_its_results(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = ["--op", "linear", "tanh", "--quick", "--out", str(tmp_path), "--dtype", "f32", "--threads", "1"]
    status = command.run(options(*arguments, "--shape", "5x6x7", "--op", "linear"))
    assert status == 0
    printed = capsys.readouterr().out
    assert "linear+relu" in printed
    content = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert content["machine"]["torch"] == torch.__version__
    with next(tmp_path.glob("*.csv")).open() as file:
        rows = list(csv.DictReader(file))
    assert [row["op"] for row in rows] == [row["op"] for row in content["rows"]] == list(linear.FUNCTIONS)
    assert next(tmp_path.glob("*-roofline.png")).read_bytes().startswith(b"\x89PNG")


def test_a_run_in_parts_adds_up(tmp_path: Path) -> None:
    """--add keeps the cases of an earlier run, except those that are measured again."""
    arguments = ["--quick", "--out", str(tmp_path), "--threads", "1", "--shape", "5x6x7", "--op", "linear"]
    command.run(options(*arguments))
    (path,) = tmp_path.glob("*.json")
    before = {row["op"]: row["torch_us"] for row in json.loads(path.read_text())["rows"]}
    command.run(options(*arguments[:-1], "linear+relu", "--add"))
    after = {row["op"]: row["torch_us"] for row in json.loads(path.read_text())["rows"]}
    assert after.keys() == before.keys() == set(linear.FUNCTIONS)
    assert {op for op in before if before[op] != after[op]} == {"linear+relu"}
    command.run(options(*arguments[:-1], "linear+relu"))
    assert [row["op"] for row in json.loads(path.read_text())["rows"]] == ["linear+relu"]


@pytest.fixture
def pages(tmp_path: Path) -> dict[str, str]:
    """README and RESULTS.md of made-up results: two rows faster than PyTorch, two slower."""
    results = tmp_path / "benchmarks" / "results"
    machine = {**report.machine(), "date": "2026-01-02", "load_before": 0.0}
    whole = [
        row_of(models.make("model", "mlp-64x784", "f32", mode, 2), 3.0, spread=0.1) for mode in ("forward", "both")
    ]
    ops = [
        row_of(linear.make("linear", linear.VECTOR, "f32", "forward", 2), 2.15, spread=0.1),
        row_of(activation.make("tanh", "1024", "bf16", "both", 2), 0.8, spread=0.1),
        row_of(activation.make("relu", "1024", "bf16", "both", 2), 0.95, spread=0.1),
        row_of(linear.make("linear", linear.SQUARES[0], "f32", "forward", 2, "avx2"), 4.0),
    ]
    for rows, date in ((whole, "2026-01-02"), (ops, "2026-01-02"), (ops[:1], "2025-12-31")):
        report.write(results, {**machine, "date": date}, rows, None, [])
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.update(readme, tmp_path / "benchmarks")
    return {"README": readme.read_text(), "RESULTS": (tmp_path / "benchmarks" / "RESULTS.md").read_text()}


def test_readme_has_the_models(pages: dict[str, str]) -> None:
    text = pages["README"]
    assert text.startswith(f"before\n{report.BEGIN}\n| model")
    cells = "0.003 | 0.001 | **3.00** (2.70 - 3.30)"
    assert f"| MLP 784-128-10, 64 x 784 | {cells} | {cells} |" in text
    assert f"float32, 2 threads, on {fastops.info().cpu}, " in text
    assert "2026-01-02; measured by" in text
    assert "of 4 cases, 1 are slower than PyTorch by more than the spread, and 1 more in the median only" in text
    assert text.endswith(f"{report.END}\nafter\n")
    assert "old" not in text


def test_results_page_lists_every_slower_row(pages: dict[str, str]) -> None:
    text = pages["RESULTS"]
    assert "| linear f32 1x4096x4096, forward: lowest | >= 2.2x | 2.15x | 1.94 - 2.37 | level |" in text
    beyond, within = text.split("## Slower than PyTorch")[1].split("These 1 are slower in the median")
    assert "| tanh | 1024 | bf16 | forward+backward | 2 | 0.8 | 1 | 0.80 | 0.72 - 0.88 |" in beyond
    assert "| relu | 1024 | bf16 | forward+backward | 2 | 0.95 | 1 | 0.95 | 0.85 - 1.04 |" in within
    assert "relu" not in beyond
    assert "linear" not in beyond + within


def test_pages_need_results(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="fastops bench --models --out"):
        report.newest(tmp_path, models_only=True)


# ---- whole models ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameters"),
    # Of torchvision's and timm's models, with 10 classes instead of 1000.
    [("resnet18", 11689512 - 990 * 513), ("mobilenetv2", 3504872 - 990 * 1281), ("vits16", 22050664 - 990 * 385)],
)
def test_models_are_those_of_the_papers(name: str, parameters: int) -> None:
    with torch.device("meta"):
        model = models.MODELS[name].build((3, 224, 224))
        output = model(torch.empty(2, 3, 224, 224))
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert output.shape == (2, models.CLASSES)


@pytest.mark.parametrize("mode", ["forward", "both"])
@pytest.mark.parametrize("shape", ["mlp-4x784", "convnet-2x1x28x28", "resnet18-4x3x48x48", "vits16-1x3x32x32"])
def test_models_are_verified_and_measured(shape: str, mode: str) -> None:
    row = harness.measure(models.make("model", shape, "f32", mode, 1), quick=True)
    assert row.ratio > 0
    assert row.gflops > 0
    assert row.samples >= 5


@pytest.mark.parametrize("mode", ["forward", "both"])
def test_wrong_models_are_not_timed(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a training step a wrong gradient is enough."""

    def slightly_wrong(model: torch.nn.Module) -> None:
        layer = model.fc2
        if mode == "forward":
            layer.register_forward_hook(lambda module, inputs, output: 1.001 * output)
        else:
            layer.weight.register_hook(lambda grad: grad * 1.001)

    monkeypatch.setattr(models.fastops, "replace_", slightly_wrong)
    with pytest.raises(harness.WrongResult, match="error"):
        harness.measure(models.make("model", "mlp-4x784", "f32", mode, 1), quick=True)


def test_models_option_chooses_the_models_alone() -> None:
    chosen = command.choose(options("--models"))
    assert [case.shape for case in chosen[::2]] == [f"{name}-{model.shape}" for name, model in models.MODELS.items()]
    assert {case.mode for case in chosen} == {"forward", "both"}
    assert {case.threads for case in chosen} == {torch.get_num_threads()}
    assert not any(case.op == "model" for case in command.choose(options()))


def test_saved_bytes_counts_what_backward_keeps() -> None:
    x = torch.randn(1024, requires_grad=True)
    assert footprint.saved_bytes(F.relu, x) == 4096
    assert footprint.saved_bytes(lambda x: x + 1, x) == 0


def test_busy_measures_each_library_and_says_how_much_slower(tmp_path, monkeypatch):
    name = list(busy.WORK)[-1]
    monkeypatch.setattr(busy, "WORK", {name: busy.WORK[name]})
    monkeypatch.setattr(busy, "LOADS", [load for load in busy.LOADS if load.name in ("idle", "one core busy, nice 19")])
    pages = []
    rows = busy.measure(1, 1, 0.01, pages.append)
    assert [row.load for row in rows] == ["idle", "one core busy, nice 19"]
    assert all(0 < times[0] < 1000 for row in rows for times in row.milliseconds.values())
    assert len(pages) == 1
    assert name in pages[0]

    made_up = [
        busy.Row("work", "idle", {"PyTorch": [4.0], "fastops": [2.0]}),
        busy.Row("work", "all cores busy", {"PyTorch": [30.0, 12.0, 20.0], "fastops": [5.0, 4.0, 3.0]}),
    ]
    last = busy.table(made_up).splitlines()[-1].split()
    assert last[-5:] == ["20.00", "5.00", "4.00", "2.00", "5.00"]
