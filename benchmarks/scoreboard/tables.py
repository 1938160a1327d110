"""What the scoreboard leaves behind: tables on the terminal, JSON, a plot of bars, and its part of the pages."""

import importlib.util
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from fastops.benchmarks.harness import BOTH, FORWARD
from fastops.benchmarks.scoreboard.networks import INT8, NETWORKS

MODES = {"inference": FORWARD, "training": BOTH}
PREFIX = "scoreboard-"  # of the results' name


@dataclass(frozen=True)
class Case:
    network: str
    batch: int
    dtype: str
    mode: str  # FORWARD or BOTH

    @property
    def name(self) -> str:
        what = next(name for name, mode in MODES.items() if mode == self.mode)
        return f"{NETWORKS[self.network].name}, batch {self.batch}, {self.dtype}, {what}"


@dataclass(frozen=True)
class Row:
    """What one provider did with a case. status: "measured", or what kept it from that. Times are milliseconds."""

    network: str
    batch: int
    dtype: str
    mode: str
    threads: int
    provider: str
    label: str
    peer: bool
    status: str
    ms: float | None = None
    q1_ms: float | None = None
    q3_ms: float | None = None
    least_ms: float | None = None
    samples: int = 0
    error: float | None = None
    torch_error: float | None = None
    allowed_error: float | None = None
    prepared_s: float | None = None
    peak_bytes: int | None = None  # by which a training step's resident memory grew

    @property
    def case(self) -> Case:
        return Case(self.network, self.batch, self.dtype, self.mode)


def fastest(rows: Sequence[Row], peer: bool) -> Row | None:
    """Of the peers, PyTorch among them; or of fastops' ways in."""
    measured = [row for row in rows if row.ms is not None and row.peer == peer]
    return min(measured, key=lambda row: row.ms, default=None)


def of_cases(rows: Sequence[Row]) -> dict[Case, list[Row]]:
    """The rows by their case, in order."""
    cases: dict[Case, list[Row]] = {}
    for row in rows:
        cases.setdefault(row.case, []).append(row)
    return cases


def ratios(rows: Sequence[Row]) -> tuple[float | None, float | None]:
    """Eager PyTorch's time, and that of the fastest peer, divided by that of fastops' fastest way in."""
    ours, best = fastest(rows, False), fastest(rows, True)
    eager = next((row for row in rows if row.provider == "eager" and row.ms is not None), None)
    return tuple(theirs.ms / ours.ms if ours and theirs else None for theirs in (eager, best))


def explain(row: Row) -> str:
    """What became of it."""
    if row.status == "WRONG":
        errors = f"error {row.error:.2g}, PyTorch's {row.torch_error:.2g}, at most {row.allowed_error:.2g}"
        return f"WRONG: {errors}"
    return row.status


def line(rows: Sequence[Row]) -> str:
    """One case, as the terminal has it while the others are measured."""
    parts = [f"{row.provider} {ms(row)}" if row.ms is not None else f"{row.provider} {explain(row)}" for row in rows]
    return f"{', '.join(parts)} ms"


# ---- tables ----------------------------------------------------------------------------------------------------------


def ms(row: Row | None) -> str:
    if row is None or row.ms is None:
        return ""
    return f"{row.ms:.0f}" if row.ms >= 100 else f"{row.ms:.3g}"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def grid(rows: Sequence[Row], mark: str = "*") -> tuple[list[str], list[list[str]]]:
    """The header and the lines of one table: a line a case, a column a provider; the fastest between marks.

    A provider that gave no time has its reason.
    """
    labels = {row.provider: row.label for row in rows}
    header = ["network, batch", *labels.values(), "eager / fastops", "best peer / fastops"]
    lines = []
    for case, found in of_cases(rows).items():
        by_name = {row.provider: row for row in found}
        best = min((row.ms for row in found if row.ms is not None), default=None)
        cells = []
        for name in labels:
            row = by_name.get(name)
            if row is not None and row.ms is None:
                cells.append(row.status.partition(":")[0])
            else:
                around = mark if row is not None and row.ms == best else ""
                cells.append(f"{around}{ms(row)}{around}")
        lines.append([f"{NETWORKS[case.network].name}, {case.batch}", *cells, *map(_ratio, ratios(found))])
    return header, lines


def tables(rows: Sequence[Row]) -> str:
    """Milliseconds, a table for each of inference and training and each dtype; and peak memory of training steps."""
    parts = []
    for what, mode in MODES.items():
        for dtype in dict.fromkeys(row.dtype for row in rows):
            chosen = [row for row in rows if (row.mode, row.dtype) == (mode, dtype)]
            if chosen:
                parts.append(f"{what}, {dtype}, milliseconds (*the fastest*)\n{_aligned(*grid(chosen))}")
    rounded = [row for row in rows if row.dtype == INT8]
    if rounded:
        parts.append(f"int8: rms error of the output, relative to its rms\n{_aligned(*error_grid(rounded))}")
    peaks = [row for row in rows if row.peak_bytes is not None]
    if peaks:
        parts.append(f"peak memory of a training step, MB\n{_aligned(*memory_grid(peaks))}")
    return "\n\n".join(parts)


def error_grid(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    labels = {row.provider: row.label for row in rows}
    lines = []
    for case, found in of_cases(rows).items():
        errors = {row.provider: "" if row.error is None else f"{row.error:.1g}" for row in found}
        lines.append([f"{NETWORKS[case.network].name}, {case.batch}", *[errors.get(name, "") for name in labels]])
    return ["network, batch", *labels.values()], lines


def memory_grid(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    labels = {row.provider: row.label for row in rows}
    lines = []
    for case, found in of_cases(rows).items():
        peaks = {row.provider: f"{row.peak_bytes / 1e6:.0f}" for row in found}
        name = f"{NETWORKS[case.network].name}, {case.batch}, {case.dtype}"
        lines.append([name, *[peaks.get(name, "") for name in labels]])
    return ["network, batch", *labels.values()], lines


def _aligned(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(header, *lines, strict=True)]
    return "\n".join(
        "  ".join(
            [line[0].ljust(widths[0]), *[cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]]
        )
        for line in (header, *lines)
    )


# ---- files -----------------------------------------------------------------------------------------------------------


def rows_of(content: dict) -> list[Row]:
    return [Row(**row) for row in content["rows"]]


def write(folder: Path, stamp: dict, rows: Sequence[Row], keep: bool = False) -> list[Path]:
    """Writes JSON and, with matplotlib, the plot; returns their paths. They are named after machine and day.

    keep: cases that the file has and `rows` has not stay. A case is one interleaved run, so it is replaced as a whole.
    """
    from fastops.benchmarks import report

    folder.mkdir(parents=True, exist_ok=True)
    name = PREFIX + report.file_name(stamp)
    paths = [folder / f"{name}.json", folder / f"{name}.png"]
    if keep and paths[0].exists():
        again = {row.case for row in rows}
        rows = [row for row in rows_of(json.loads(paths[0].read_text())) if row.case not in again] + list(rows)
    order = list(NETWORKS)
    rows = sorted(rows, key=lambda row: (row.mode != FORWARD, row.dtype != "f32", order.index(row.network)))
    content = {"machine": stamp, "rows": [asdict(row) for row in rows]}
    paths[0].write_text(json.dumps(content, indent=1) + "\n")
    if importlib.util.find_spec("matplotlib") is None:
        return paths[:1]
    plot(paths[1], stamp, rows)
    return paths


def newest(results: Path) -> dict | None:
    """The content of the latest results in the folder, by the date in them."""
    found = [json.loads(path.read_text()) for path in sorted(results.glob(f"{PREFIX}*.json"))]
    return max(found, key=lambda content: content["machine"]["date"], default=None)


def decisive(rows: Sequence[Row], mode: str, dtype: str = "f32") -> list[Row]:
    """The rows of one table, of each network with the batch that counts."""
    chosen = []
    for row in rows:
        network = NETWORKS[row.network]
        batch = network.decisive if mode == FORWARD else network.training
        if (row.mode, row.dtype, row.batch) == (mode, dtype, batch):
            chosen.append(row)
    return chosen


def plot(path: Path, stamp: dict, rows: Sequence[Row]) -> None:
    """How many times as fast as eager PyTorch every provider is: inference above, training below."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    dtype = "f32" if any(row.dtype == "f32" for row in rows) else rows[0].dtype
    labels = {row.provider: (row.label, row.peer) for row in rows if row.ms is not None}
    peers = [name for name, (_, peer) in labels.items() if peer]
    ours = [name for name, (_, peer) in labels.items() if not peer]
    colors = dict(
        zip(peers, plt.cm.Greys([0.25 + 0.6 * i / max(1, len(peers) - 1) for i in range(len(peers))]), strict=True)
    )
    colors |= dict(zip(ours, plt.cm.autumn([i / max(1, len(ours)) for i in range(len(ours))]), strict=True))
    figure, grid = plt.subplots(2, 1, figsize=(14, 9))
    for axes, (what, mode) in zip(grid, MODES.items(), strict=True):
        cases = of_cases([row for row in rows if (row.mode, row.dtype) == (mode, dtype)])
        cases = {case: found for case, found in cases.items() if ratios(found)[0] or any(row.ms for row in found)}
        width = 0.85 / max(1, len(labels))
        for i, name in enumerate(labels):
            heights = []
            for found in cases.values():
                ms = {row.provider: row.ms for row in found}
                heights.append(ms["eager"] / ms[name] if ms.get("eager") and ms.get(name) else 0)
            places = [number + (i - len(labels) / 2 + 0.5) * width for number in range(len(cases))]
            axes.bar(places, heights, width, color=colors[name], label=labels[name][0])
        names = [f"{NETWORKS[case.network].name.replace(' ', chr(10), 1)}\nbatch {case.batch}" for case in cases]
        axes.set_xticks(range(len(cases)), names, fontsize=7)
        axes.axhline(1, color="k", lw=0.8)
        axes.set_title(f"{what}, {dtype}: times as fast as eager PyTorch", fontsize=10)
        axes.grid(True, axis="y", alpha=0.3)
    if labels:
        grid[0].legend(ncols=len(labels), fontsize=7, loc="upper right")
    where = f"{stamp['cpu']}, {stamp['threads']} threads, {stamp['isa']}, torch {stamp['torch']}, {stamp['date']}"
    figure.suptitle(where, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
