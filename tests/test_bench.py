"""The benchmark harness: it verifies before it times, its cases cover the figures, and it leaves its results behind."""

import argparse
import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fastops.benchmarks import activation, command, conv, figures, footprint, harness, linear, report
from fastops.benchmarks.harness import Case, Row, Sides


def options(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(arguments)


def row_of(case: Case, ratio: float = 1.0, isa: str = "avx512") -> Row:
    """A made-up measurement."""
    return Row(
        op=case.op,
        shape=case.shape,
        dtype=case.dtype,
        mode=case.mode,
        threads=case.threads,
        isa=case.isa or isa,
        lowered=case.isa is not None,
        torch_us=ratio,
        torch_q1_us=ratio,
        torch_q3_us=ratio,
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
    assert by_name["what a ReLU keeps for backward: PyTorch's / ours"].reached
    assert not by_name["linear f32 1x4096x4096, forward: lowest"].reached


def test_figures_take_the_lowest_and_the_geomean() -> None:
    cases = [linear.make("linear", shape, "f32", "forward", 2) for shape in linear.LAYERS[:2]]
    results = figures.evaluate([row_of(cases[0], 1.0), row_of(cases[1], 4.0)], None)
    measured = {result.name: result.measured for result in results}
    assert measured["linear f32, layer shapes, forward: geomean"] == "2.00x"
    assert measured["linear f32, layer shapes, both: lowest"] == "1.00x"


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


def test_readme_block(tmp_path: Path) -> None:
    rows = [row_of(linear.make("linear", linear.VECTOR, "f32", "forward", 2), 2.5)]
    results = figures.evaluate(rows, None)
    paths = report.write(tmp_path, report.machine(), rows, None, results)
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.update_readme(paths[0], readme)
    text = readme.read_text()
    assert text.startswith(f"before\n{report.BEGIN}\nMeasured on ")
    assert "| linear f32 1x4096x4096, forward: lowest | >= 2.2x | 2.50x |" in text
    assert text.endswith(f"{report.END}\nafter\n")
    assert "old" not in text


def test_saved_bytes_counts_what_backward_keeps() -> None:
    x = torch.randn(1024, requires_grad=True)
    assert footprint.saved_bytes(F.relu, x) == 4096
    assert footprint.saved_bytes(lambda x: x + 1, x) == 0
