"""`make gpu` where there is no GPU: what it does with its time, what it remembers, and that only the verified is timed.

Its cases run on the device of gpu.py, the emulator, with a timer that makes the times up.
"""

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from gpu import DEVICE

import fastops.functional as FF
from benchmarks import gpu as make_gpu
from fastops.benchmarks import (
    activation,
    attention,
    batch_norm,
    gpu_cases,
    harness,
    layer_norm,
    linear,
    loss,
    mlp,
    optim,
    pool,
    softmax,
)

STAMP = {"gpu": "NVIDIA Imaginary", "driver": "1.2", "torch": "2.13.0", "sources": "abc"}


def timer(functions: Sequence[Callable[[], object]]) -> list[float]:
    """PyTorch takes 3 ms, fastops 2, a copy 1; everything is called."""
    times = []
    for function in functions:
        function()
        times.append({0: 3e-3, 1: 2e-3, 2: 1e-3}[len(times)])
    return times


@pytest.fixture
def work(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(make_gpu, "WORK", tmp_path)
    return tmp_path


def state_of(folder: Path, stamp: dict = STAMP) -> make_gpu.State:
    return make_gpu.State(folder / "state.jsonl", stamp)


# ---- a case


def measured(case: harness.Case) -> dict:
    turns = iter(range(10**6))

    def in_turn(functions: Sequence[Callable[[], object]]) -> list[float]:
        """The order changes from sample to sample; after three that warm up, every other one is backwards."""
        turn = next(turns)
        times = timer(functions)
        return times[::-1] if turn >= 3 and turn % 2 == 0 else times

    return gpu_cases.measure(case, in_turn, str(DEVICE), seconds=0, least=4)


@pytest.mark.parametrize(
    "case",
    [
        linear.make("linear+gelu", "5x6x7", "bf16", "forward", 1),
        linear.make("linear", "5x6x7", "f32", "both", 1),
        mlp.make("mlp", "70x8x3", "bf16", "both", 1),
        mlp.make("mlp step", "70x8x2", "bf16", "both", 1),
        activation.make("gelu", "4096", "f32", "backward", 1),
        activation.make("relu", "8192", "bf16", "backward", 1),
        pool.make("max_pool2d", "2x3x8x8-k3-s2-p1", "f32", "both", 1),
        batch_norm.make("batch_norm+add+relu", "3x5x6x7", "f32", "both", 1),
        layer_norm.make("layer_norm", "5x33", "bf16", "both", 1),
        softmax.make("log_softmax", "5x33", "f32", "both", 1),
        loss.make("cross_entropy", "5x33", "f32", "both", 1),
        loss.make("mse_loss", "5x33", "bf16", "both", 1),
        optim.make("AdamW step", "10-5-5-1", "f32", "both", 1),
        attention.make("attention+causal", "2x2x20x16", "f32", "both", 1),
    ],
    ids=gpu_cases.name_of,
)
def test_a_case_is_verified_and_timed(case):
    result = measured(case)
    assert result["outcome"] == gpu_cases.MEASURED, result
    row = result["row"]
    assert row["torch_us"] == pytest.approx([3000] * 3)
    assert row["fastops_us"] == pytest.approx([2000] * 3)
    assert row["ratio"] == pytest.approx(1.5)
    assert row["copy_share"] == pytest.approx(case.bytes / 2e-3 / (2 * max(64, int(case.bytes) // 2) / 1e-3))
    assert row["error"] <= row["allowed_error"]
    assert row["kernels"]
    assert "aten" not in row["kernels"]
    json.dumps(result)


def with_functions(theirs: Callable, ours: Callable) -> harness.Case:
    def prepare(case: harness.Case) -> harness.Sides:
        return harness.functional_sides(case, theirs, ours, [torch.randn(100)])

    return replace(activation.make("tanh", "100", "f32", "forward", 1), prepare=prepare)


def test_what_is_wrong_is_not_timed():
    result = measured(with_functions(F.tanh, lambda x: 1.001 * FF.tanh(x)))
    assert result["outcome"] == gpu_cases.WRONG
    assert "row" not in result


@pytest.mark.parametrize("ours", [F.tanh, lambda x: FF.tanh(x.to(torch.complex64)).real])
def test_what_is_not_fastops_own_is_not_timed(ours):
    result = measured(with_functions(F.tanh, ours))
    assert result["outcome"] == gpu_cases.FOREIGN
    assert "PyTorch's own tanh did the work" in result["detail"]
    assert "row" not in result


def test_backward_alone_is_verified_with_its_forward():
    case = activation.make("tanh", "100", "f32", "backward", 1)
    assert case.bytes == 3 * 400
    assert activation.make("relu", "100", "f32", "backward", 1).bytes == pytest.approx(2 * 400 + 100 / 8)
    with harness.settings(case):
        sides = case.prepare(case)
    assert len(sides.fastops()) == 1
    torch.testing.assert_close(sides.fastops()[0], sides.torch()[0])


# ---- the aims


def rows_of(names: Sequence[str], ratio: float) -> list[dict]:
    rows = []
    for name in names:
        op, shape, dtype, mode = name.rsplit(" ", 3)
        rows.append(
            {
                "op": op, "shape": shape, "dtype": dtype, "mode": mode, "kernels": ["mma"],
                "torch_us": [0.9 * ratio, ratio, 1.1 * ratio], "fastops_us": [0.95, 1.0, 1.05],
                "ratio": ratio, "tflops": 1.0, "gbytes": 1.0, "copy_share": ratio,
            }
        )  # fmt: skip
    return rows


@pytest.mark.parametrize(("ratio", "verdict"), [(100.0, "met"), (0.1, "missed")])
def test_aims_of_all_cases(ratio, verdict):
    results = gpu_cases.evaluate(rows_of(list(gpu_cases.CASES), ratio))
    assert {result["verdict"] for result in results} == {verdict}


@pytest.mark.parametrize("aim", gpu_cases.AIMS, ids=lambda aim: aim.name)
@pytest.mark.parametrize(("part", "verdict"), [(1.0, "met"), (0.96, "level"), (0.8, "missed")])
def test_an_aim_missed_within_the_spread_is_level(aim, part, verdict):
    rows = rows_of([gpu_cases.name_of(case) for case in aim.cases], part * aim.reach)
    result = next(one for one in gpu_cases.evaluate(rows) if one["aim"] == aim.name)
    assert result["verdict"] == verdict
    assert result["spread"][0] < result["lowest"] < result["spread"][1]


def test_an_aim_is_not_met_by_some_of_its_cases():
    names = [gpu_cases.name_of(case) for case in gpu_cases.AIMS[0].cases]
    some = gpu_cases.evaluate(rows_of(names[1:], 100.0))
    assert some[0]["verdict"] == "not measured"
    assert some[1]["lowest"] is None
    assert some[1]["spread"] is None
    assert gpu_cases.evaluate(rows_of(names[1:], 0.1))[0]["verdict"] == "missed"


# ---- what has been done


def test_state_is_read_again(work):
    state = state_of(work)
    state.add("tests", "a", make_gpu.PASSED, seconds=1.0)
    state.add("tests", "b", make_gpu.FAILED)
    with (work / "state.jsonl").open("a") as file:
        file.write('\n{"stage": "case", "na')  # cut while it was written
    again = state_of(work)
    assert again.entries == state.entries
    assert again.done("tests", "a")
    assert not again.done("tests", "b")
    again.add("tests", "b", make_gpu.PASSED)
    assert state_of(work).done("tests", "b")


def test_state_of_other_sources_is_dropped(work):
    state_of(work).add("tests", "a", make_gpu.PASSED)
    assert not state_of(work, {**STAMP, "sources": "other"}).entries
    assert not state_of(work).entries


# ---- stages


def test_commands(work):
    run = make_gpu.Run(state_of(work))
    python = [sys.executable, "-c"]
    run.command("tests", "good", [*python, "print('3 passed, 1 skipped in 2s')"], 60, summary=make_gpu.pytest_summary)
    run.command("tests", "bad", [*python, "raise SystemExit(3)"], 60)
    begin = time.monotonic()
    run.command("tests", "slow", [*python, "import time; time.sleep(60)"], 0.5)
    assert time.monotonic() - begin < 30
    entries = run.state.entries
    assert entries["tests", "good"]["outcome"] == make_gpu.PASSED
    assert entries["tests", "good"]["detail"] == "3 passed, 1 skipped"
    assert entries["tests", "bad"]["outcome"] == make_gpu.FAILED
    assert "status 3" in entries["tests", "bad"]["detail"]
    assert entries["tests", "slow"]["outcome"] == make_gpu.CUT
    run.command("tests", "good", [*python, "raise SystemExit(3)"], 60)  # has been done
    assert entries["tests", "good"]["outcome"] == make_gpu.PASSED


def test_nothing_is_started_without_time(work):
    run = make_gpu.Run(state_of(work), budget=make_gpu.LEAST - 1)
    run.command("tests", "a", ["false"], 60)
    run.cases(["one"], ["false"])
    assert not run.state.entries


# Of the cases it is asked for, one crashes it, one hangs it, one is wrong.
CHILD = """
import json, os, sys, time
for name in sys.argv[1:]:
    print(json.dumps({"begin": name}), flush=True)
    if name == "crashes":
        print("a library talks", flush=True)
        sys.stderr.write("illegal memory access\\n")
        os._exit(7)
    if name == "hangs":
        time.sleep(60)
    row = {"outcome": "measured", "row": {}}
    print(json.dumps({"name": name, **({"outcome": "wrong result"} if name == "wrong" else row)}), flush=True)
"""


def test_cases_survive_one_that_crashes_or_hangs(work):
    run = make_gpu.Run(state_of(work))
    names = ["first", "crashes", "second", "hangs", "wrong", "last"]
    run.cases(names, [sys.executable, "-c", CHILD], limit=2.0)
    outcomes = {name: run.state.entries["case", name]["outcome"] for name in names}
    assert outcomes == {
        "first": "measured", "crashes": "failed", "second": "measured", "hangs": "out of time",
        "wrong": "wrong result", "last": "measured",
    }  # fmt: skip
    assert "status 7: illegal memory access" in run.state.entries["case", "crashes"]["detail"]
    # The next run does again what failed, and nothing else.
    again = make_gpu.Run(state_of(work))
    again.cases(names, [sys.executable, "-c", CHILD.replace('"crashes"', '""').replace('"hangs"', '""')], limit=2.0)
    assert {again.state.entries["case", name]["outcome"] for name in ("crashes", "hangs")} == {"measured"}


def test_a_process_that_cannot_begin_does_not_go_on_for_ever(work):
    run = make_gpu.Run(state_of(work))
    run.cases(["one", "two"], [sys.executable, "-c", "raise SystemExit('no module')"])
    assert {run.state.entries["case", name]["outcome"] for name in ("one", "two")} == {"failed"}


def test_sanitizer_that_is_not_there(work, monkeypatch):
    monkeypatch.setattr(make_gpu.shutil, "which", lambda name: None)
    run = make_gpu.Run(state_of(work))
    make_gpu.sanitize(run, "memcheck")
    assert run.state.entries["sanitizer", "memcheck"]["outcome"] == make_gpu.MISSING
    assert make_gpu.sanitizer_summary("=\n========= ERROR SUMMARY: 2 errors\n") == "2 errors"


def test_the_tests_that_run_on_a_gpu():
    files = make_gpu.test_files()
    assert "tests/test_cuda_linear.py" in files
    assert not [path for path in files if "mutants" in path or "build" in path]
    assert all((make_gpu.ROOT / path).exists() for path in make_gpu.SANITIZED if path.endswith(".py"))


def test_architectures():
    assert make_gpu.architecture([9, 0]) == "9.0a"
    assert make_gpu.architecture([8, 6]) == "8.6"


# ---- the report


def test_a_whole_run_is_reported_and_forgotten(work, capsys):
    state = state_of(work)
    wanted = [("case", name) for name in gpu_cases.CASES]
    for name, row in zip(gpu_cases.CASES, rows_of(list(gpu_cases.CASES), 2.0), strict=True):
        state.add("case", name, "measured", row=row)
    assert make_gpu.conclude(STAMP, state, gpu_cases.evaluate, wanted, work / "results") == 0
    content = json.loads(next((work / "results").glob("gpu-nvidia-imaginary-*.json")).read_text())
    assert content["machine"]["driver"] == "1.2"
    assert len(content["rows"]) == len(gpu_cases.CASES)
    assert content["left_out"] == []
    printed = capsys.readouterr().out
    assert "4096x4096x4096" in printed
    assert "met " in printed
    assert not state_of(work).entries


def test_what_was_left_out_is_listed_and_kept(work, capsys):
    state = state_of(work)
    first, second, *others = gpu_cases.CASES
    state.add("case", first, "measured", row=rows_of([first], 2.0)[0])
    state.add("case", second, gpu_cases.FOREIGN, detail="PyTorch's own conv2d did the work")
    wanted = [("sanitizer", "racecheck"), *(("case", name) for name in gpu_cases.CASES)]
    assert make_gpu.conclude(STAMP, state, gpu_cases.evaluate, wanted, work / "results") == 1
    content = json.loads(next((work / "results").glob("*.json")).read_text())
    assert [row["shape"] for row in content["rows"]] == [gpu_cases.CASES[first].shape]
    assert content["left_out"] == ["sanitizer: racecheck", *(f"case: {name}" for name in others)]
    assert [entry["name"] for entry in content["without_a_row"]] == [second]
    assert "not measured" in capsys.readouterr().out
    assert state_of(work).done("case", first)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    with pytest.raises(SystemExit, match=r"^make gpu: no GPU to run on: torch .* finds no NVIDIA GPU"):
        make_gpu.main([])
