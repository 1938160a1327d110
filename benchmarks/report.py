"""What a run leaves behind: a table on the terminal, JSON, CSV, a roofline plot, and the README's block.

`python -m fastops.benchmarks.report RESULTS.json README.md` rewrites the README between its two bench marks.
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
from fastops.benchmarks.figures import Result
from fastops.benchmarks.harness import Row

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"

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
    """The figures, one a line: reached or not, measured, where it was decided."""
    width = max(len(result.name) for result in results)
    return "\n".join(
        f"{'  ' if result.reached else '! '}{result.name:<{width}}  {result.reach:>8}  {result.measured:>8}  "
        f"{result.where}"
        for result in results
    )


def write(folder: Path, stamp: dict, rows: Sequence[Row], memory: dict | None, results: Sequence[Result]) -> list[Path]:
    """Writes JSON, CSV and, with matplotlib, the plot, named after machine and day; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^a-z0-9]+", "-", f"{stamp['cpu']} {stamp['cores']} cores {stamp['date']}".lower()).strip("-")
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


def readme_block(content: dict) -> str:
    """The measured figures and the machine they were measured on, as Markdown."""
    stamp = content["machine"]
    lines = [
        f"Measured on {stamp['cpu']}, {stamp['cores']} cores, {stamp['isa']} tier, torch {stamp['torch']}, "
        f"{stamp['date']}. ratio = PyTorch's time / fastops' time, medians of one interleaved run, 2 threads unless "
        "said. Written by `make readme` from `benchmarks/results/`.",
        "",
        "| work | aim | measured | decided by |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {result['name']} | {result['reach']} | {'' if result['reached'] else 'missed: '}{result['measured']} | "
        f"{result['where']} |"
        for result in content["figures"]
    ]
    steps = [row for row in content["rows"] if row["op"] == "training step"]
    if steps:
        lines += ["", "| training step | PyTorch us | fastops us | ratio |", "|---|---|---|---|"]
        lines += [
            f"| {row['shape']} | {row['torch_us']:.0f} | {row['fastops_us']:.0f} | {row['ratio']:.2f} |"
            for row in steps
        ]
    return "\n".join(lines)


def update_readme(results: Path, readme: Path) -> None:
    """Replaces what stands between the README's bench marks."""
    text = readme.read_text()
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    block = readme_block(json.loads(results.read_text()))
    readme.write_text(f"{before}{BEGIN}\n{block}\n{END}{after}")


if __name__ == "__main__":
    update_readme(Path(sys.argv[1]), Path(sys.argv[2]))
