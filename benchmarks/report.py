"""What a run leaves behind: a table on the terminal, JSON, CSV and a roofline plot; and the pages made of them.

`python -m fastops.benchmarks.report README.md benchmarks` writes the models' table into the README, between its two
marks, and benchmarks/RESULTS.md, both from the newest files of benchmarks/results. `make readme` does that.
"""

import csv
import importlib.util
import json
import math
import os
import platform
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path

import torch

import fastops
from fastops.benchmarks import models, training
from fastops.benchmarks.figures import LEVEL, MISSED, REACHED, Result, evaluate, ratio
from fastops.benchmarks.harness import BOTH, FORWARD, PASSES, Row
from fastops.benchmarks.scoreboard import tables

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"  # around the models' table of the README
MODELS_ONLY = "-models"  # the end of the name of results that have no other rows

HEADER = (
    f"{'op':<13} {'shape':<16} {'dtype':<5} {'pass':<7} {'T':>2} {'PyTorch us':>11} {'fastops us':>11} "
    f"{'quartiles':>19} {'ratio':>6} {'GF/s':>7} {'GB/s':>6} {'peak':>5}"
)


def line(row: Row) -> str:
    """One row of the table on the terminal."""
    spread = f"{row.fastops_q1_us:.4g}-{row.fastops_q3_us:.4g}"
    tier = f"  {row.isa}" if row.lowered else ""
    return (
        f"{row.op:<13} {row.shape:<16} {row.dtype:<5} {row.mode:<7} {row.threads:>2} {row.torch_us:>11.4g} "
        f"{row.fastops_us:>11.4g} {spread:>19} {row.ratio:>6.2f} {row.gflops:>7.4g} {row.gbytes:>6.4g} "
        f"{row.percent_of_peak:>4.0f}%{tier}"
    )


def machine() -> dict[str, object]:
    """What the numbers were measured on."""
    info = fastops.info()
    return {
        "date": date.today().isoformat(),
        "cpu": info.cpu,
        "cores": info.cores,
        "isa": info.isa_used,
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": info.torch,
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "fastops": info.version,
        "compiler": info.compiler,
        "flags": info.compiler_flags,
        "load_before": round(os.getloadavg()[0], 2),
    }


def figures_table(results: Sequence[Result]) -> str:
    """The aims, one a line: the verdict, what was measured, its spread, and the case that decided."""
    width = max(len(result.name) for result in results)
    return "\n".join(
        f"{result.verdict:<7}  {result.name:<{width}}  {result.reach:>8}  {result.measured:>8}  {result.spread:>13}  "
        f"{result.where}"
        for result in results
    )


def write(folder: Path, stamp: dict, rows: Sequence[Row], memory: dict | None, results: Sequence[Result]) -> list[Path]:
    """Writes JSON, CSV and, with matplotlib, the plot; returns their paths.

    They are named after machine and day, and after the models where there is nothing else in them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name = _name(stamp, rows)
    paths = [folder / f"{name}.json", folder / f"{name}.csv", folder / f"{name}-roofline.png"]
    content = {
        "machine": stamp,
        "figures": [asdict(result) for result in results],
        "memory": memory,
        "rows": [row.as_dict() for row in rows],
    }
    paths[0].write_text(json.dumps(content, indent=1) + "\n")
    with paths[1].open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0].as_dict()))
        writer.writeheader()
        writer.writerows(row.as_dict() for row in rows)
    if importlib.util.find_spec("matplotlib") is None:
        return paths[:2]
    roofline(paths[2], stamp, rows)
    return paths


def added(folder: Path, stamp: dict, rows: Sequence[Row], memory: dict | None) -> tuple[list[Row], dict | None]:
    """The rows and memory of an earlier run on this machine and day, if the folder has one, and then these.

    A case that both have is taken from these.
    """
    path = folder / f"{_name(stamp, rows)}.json"
    if not path.exists():
        return list(rows), memory
    content = json.loads(path.read_text())

    def case(row: Row) -> tuple:
        return row.op, row.shape, row.dtype, row.mode, row.threads, row.isa

    again = {case(row) for row in rows}
    kept = [row for row in rows_of(content) if case(row) not in again]
    return [*kept, *rows], memory or content["memory"]


def file_name(stamp: dict) -> str:
    """Of results, after machine and day."""
    return re.sub(r"[^a-z0-9]+", "-", f"{stamp['cpu']} {stamp['cores']} cores {stamp['date']}".lower()).strip("-")


def _name(stamp: dict, rows: Sequence[Row]) -> str:
    name = file_name(stamp)
    return name + MODELS_ONLY if rows and all(row.op in models.FUNCTIONS for row in rows) else name


def roofline(path: Path, stamp: dict, rows: Sequence[Row]) -> None:
    """GFLOP/s over arithmetic intensity under the roofs measured in this run: the float32 rows, or those there are."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    dtype = "f32" if any(row.dtype == "f32" for row in rows) else rows[0].dtype
    rows = [row for row in rows if row.dtype == dtype and not row.lowered] or rows
    figure, axes = plt.subplots(figsize=(9, 6))
    flops = max((row.peak for row in rows if row.bound == "flops"), default=None)
    memory = [row for row in rows if row.bound == "bytes"]
    # The largest working set shows what memory gives; smaller ones are copied inside a cache.
    stream = max(memory, key=lambda row: row.gbytes * row.fastops_us).peak if memory else None
    names = [f"FMA {flops:.0f} GF/s" if flops else "", f"copy {stream:.0f} GB/s" if stream else ""]
    ends = (0.01, 2000.0)
    bends = [ends[0], flops / stream, ends[1]] if flops and stream else list(ends)
    roof = [min(stream * x if stream else math.inf, flops or math.inf) for x in bends]
    axes.plot(bends, roof, "k-", lw=1, label=f"measured: {', '.join(filter(None, names))}")
    for label, marker, value in (("PyTorch", "x", "torch_gflops"), ("fastops", "o", "gflops")):
        axes.scatter(
            [row.intensity for row in rows],
            [getattr(row, value) for row in rows],
            s=16,
            marker=marker,
            alpha=0.6,
            label=label,
        )
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="flop / byte (one flop an element for activations)",
        ylabel="GFLOP/s",
        xlim=ends,
    )
    axes.set_title(
        f"{dtype}, {stamp['cpu']}, {stamp['cores']} cores, {stamp['isa']}, torch {stamp['torch']}", fontsize=9
    )
    axes.grid(True, which="major", alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


# ---- the pages made of them ------------------------------------------------------------------------------------------


def newest(results: Path, models_only: bool) -> dict:
    """The content of the latest results of a CPU, by the date in them: those of the models, or those of the ops.

    Raises:
        FileNotFoundError: there are none.
    """
    others = ("gpu-", "busy-", tables.PREFIX)
    paths = sorted(path for path in results.glob("*.json") if not path.name.startswith(others))
    found = [json.loads(path.read_text()) for path in paths if path.stem.endswith(MODELS_ONLY) == models_only]
    if not found:
        command = "fastops bench --models --out" if models_only else "fastops bench --out"
        raise FileNotFoundError(f"{results} has no such results; `{command} {results}` makes some")
    return max(found, key=lambda content: content["machine"]["date"])


def update(readme: Path, benchmarks: Path) -> None:
    """Rewrites the README between its marks, and RESULTS.md in the folder of the benchmarks."""
    of_models, of_ops = (newest(benchmarks / "results", models_only) for models_only in (True, False))
    of_peers = tables.newest(benchmarks / "results")
    before, rest = readme.read_text().split(BEGIN)
    after = rest.split(END)[1]
    readme.write_text(f"{before}{BEGIN}\n{readme_block(of_models, of_ops, of_peers)}\n{END}{after}")
    (benchmarks / "RESULTS.md").write_text(results_page(of_models, of_ops, of_peers))


def readme_block(of_models: dict, of_ops: dict, of_peers: dict | None = None) -> str:
    """The models' table, the scoreboard where there is one, and how many of the ops are slower than PyTorch's."""
    rows, (slower, level) = rows_of(of_ops), slower_rows(rows_of(of_ops))
    return (
        f"{models_table(of_models)}\n\n"
        f"{_scoreboard(of_peers, short=True)}"
        f"Op by op, on {_on(of_ops)}: of {len(rows)} cases, {len(slower)} are slower than PyTorch by more than the "
        f"spread, and {len(level)} more in the median only. [benchmarks/RESULTS.md](benchmarks/RESULTS.md) lists every "
        "one of them, and how the others compare with the project's aims."
    )


def results_page(of_models: dict, of_ops: dict, of_peers: dict | None = None) -> str:
    """RESULTS.md."""
    rows = rows_of(of_ops)
    results = evaluate(rows, of_ops["memory"])
    counts = {verdict: sum(result.verdict == verdict for result in results) for verdict in (REACHED, LEVEL, MISSED)}
    slower, level = slower_rows(rows)
    parts = [
        "# Results",
        "`make readme` writes this page from the newest files of `benchmarks/results/`. Do not edit it.",
        "A **ratio** is PyTorch's time divided by fastops': above 1, fastops is faster. Times are medians of one run "
        "in which both take turns. The **spread** goes from PyTorch's lower quartile over fastops' upper one to "
        "PyTorch's upper quartile over fastops' lower one; that of a geometric mean takes its rows as independent. "
        "Results are verified against float64 before anything is timed.",
        "## Whole models",
        models_table(of_models),
        *([f"## Beside the peers\n\n{_scoreboard(of_peers, short=False).strip()}"] if of_peers else []),
        "## Aims",
        f"Measured on {_on(of_ops)}, by `make bench`; 2 threads unless said. The aims were set on an AMD Zen 5, where "
        "PyTorch's float32 product runs at 40% of the peak. An aim is *level* where the measured value is below it, "
        f"but the aim lies within the spread. Of {len(results)} aims, {counts[REACHED]} are reached, {counts[LEVEL]} "
        f"level and {counts[MISSED]} missed.",
        _table(
            ("work", "aim", "measured", "spread", "verdict", "decided by"),
            [(one.name, one.reach, one.measured, one.spread, _verdict(one), one.where) for one in results],
        ),
        "## Training steps of small models",
        f"On the same machine, float32: {', '.join(training.MODELS)}; forward, loss, backward and SGD.",
        _rows_table([row for row in rows if row.op == "training step"]),
        "## Slower than PyTorch",
        f"Of the {len(rows)} cases of that run, these {len(slower)} are slower than PyTorch by more than the spread:",
        _rows_table(slower),
        f"These {len(level)} are slower in the median, by less than the spread:",
        _rows_table(level),
    ]
    return "\n\n".join(parts) + "\n"


def rows_of(content: dict) -> list[Row]:
    return [Row(**row) for row in content["rows"]]


def slower_rows(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """Rows with a ratio below 1, the lowest first: those whose spread ends below 1, and the others."""
    below = sorted((row for row in rows if row.ratio < 1), key=lambda row: row.ratio)
    return [row for row in below if ratio(row).high < 1], [row for row in below if ratio(row).high >= 1]


def models_table(content: dict) -> str:
    """One line a model: inference, and a training step."""
    rows = {(row.shape, row.mode): row for row in rows_of(content) if row.op in models.FUNCTIONS}
    lines = []
    for shape in dict.fromkeys(shape for shape, _ in rows):
        model, batch, size = models.parse(shape)
        name = f"{model.name}, {batch} x {'x'.join(map(str, size))}"
        cells = [_milliseconds_and_ratio(rows[shape, mode]) for mode in (FORWARD, BOTH) if (shape, mode) in rows]
        lines.append((name, *[cell for part in cells for cell in part]))
    counts = sorted({row.threads for row in rows.values()})
    threads = f"{', '.join(map(str, counts))} {'thread' if counts == [1] else 'threads'}"
    header = ["model, batch x input"]
    for what in ("inference", "training step"):
        header += [f"{what}: PyTorch ms", "fastops ms", "ratio (spread)"]
    return (
        f"{_table(header, lines)}\n\n"
        f"float32, {threads}, on {_on(content)}; measured by `fastops bench --models`, which verifies results first. "
        "PyTorch is eager PyTorch with the same weights."
    )


def _scoreboard(content: dict | None, short: bool) -> str:
    """The tables of `make scoreboard`; short: float32, each network with one batch, fastops' fastest way in."""
    if content is None:
        return ""
    rows = tables.rows_of(content)
    parts = []
    for what, mode in tables.MODES.items():
        if short:
            chosen = tables.decisive(rows, mode)
            if chosen:
                parts.append(f"Beside other libraries, {what}, milliseconds:\n\n{_table(*_short(chosen))}")
            continue
        for dtype in dict.fromkeys(row.dtype for row in rows):
            chosen = [row for row in rows if (row.mode, row.dtype) == (mode, dtype)]
            if chosen:
                parts.append(f"{what}, {dtype}, milliseconds:\n\n{_table(*tables.grid(chosen, '**'))}")
    peaks = [row for row in rows if row.peak_bytes is not None]
    if peaks and not short:
        parts.append(f"Peak memory of a training step, MB:\n\n{_table(*tables.memory_grid(peaks))}")
    versions = ", ".join(f"{name} {version}" for name, version in content["machine"]["versions"].items())
    parts.append(
        f"{content['machine']['threads']} threads, on {_on(content)}; {versions}. Measured by `make scoreboard`: each "
        "library in a process of its own, with the same weights, inputs and threads, verified first, in turns."
    )
    return "\n\n".join(parts) + "\n\n"


def _short(rows: Sequence[tables.Row]) -> tuple[list[str], list[list[str]]]:
    """A column for each peer, and one for the fastest of fastops' ways in."""
    peers = [row for row in rows if row.peer and any(one.ms for one in rows if one.provider == row.provider)]
    header, lines = tables.grid(peers, "")
    header[-2:] = ["fastops", "PyTorch / fastops", "best of the others / fastops"]
    for line, found in zip(lines, tables.of_cases(rows).values(), strict=True):
        ours = tables.fastest(found, False)
        of_eager, of_best = tables.ratios(found)
        line[-2:] = [
            f"{tables.ms(ours)} ({ours.label})" if ours else "",
            f"**{of_eager:.2f}**" if of_eager else "",
            f"**{of_best:.2f}**" if of_best else "",
        ]
    return header, lines


def _milliseconds_and_ratio(row: Row) -> tuple[str, str, str]:
    low, middle, high = ratio(row)
    times = [f"{us / 1e3:.0f}" if us >= 1e5 else f"{us / 1e3:.3g}" for us in (row.torch_us, row.fastops_us)]
    return *times, f"**{middle:.2f}** ({low:.2f} - {high:.2f})"


def _rows_table(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        low, middle, high = ratio(row)
        where = f"{row.threads}, {row.isa} tier" if row.lowered else str(row.threads)
        times = f"{row.torch_us:.4g}", f"{row.fastops_us:.4g}"
        spread = f"{low:.2f} - {high:.2f}"
        lines.append((row.op, row.shape, row.dtype, PASSES[row.mode], where, *times, f"{middle:.2f}", spread))
    return _table(("op", "shape", "dtype", "pass", "threads", "PyTorch us", "fastops us", "ratio", "spread"), lines)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _verdict(result: Result) -> str:
    return f"**{MISSED}**" if result.verdict == MISSED else result.verdict


def _on(content: dict) -> str:
    """The machine and the day; and the load, where other programs were running."""
    stamp = content["machine"]
    load = f" (beside other programs, load {stamp['load_before']})" if stamp["load_before"] > 1 else ""
    return f"{stamp['cpu']}, {stamp['cores']} cores, {stamp['isa']} tier, torch {stamp['torch']}, {stamp['date']}{load}"


if __name__ == "__main__":
    update(Path(sys.argv[1]), Path(sys.argv[2]))
