"""`make gpu`: builds for this machine's GPU, runs the CUDA tests and compute-sanitizer, measures against PyTorch.

Run as `python -m benchmarks.gpu` from the checkout, by a python whose torch has CUDA. Every stage that ends is written
to build/gpu/state.jsonl at once. So a run that was cut, or ran out of time, goes on where it stopped when it is started
again with the same sources on the same machine. Tests and cases run in processes of their own; one that crashes or
hangs is reported as such. The table and the JSON have what was verified and measured, and list what was not.

fastops is imported only after it has been built.
"""

import argparse
import hashlib
import json
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "build" / "gpu"
RESULTS = ROOT / "benchmarks" / "results"

BUDGET = 525.0  # seconds for one `make gpu`: nine minutes, less the time for starting and writing
BUILD_LIMIT, TESTS_LIMIT, SANITIZER_LIMIT, CASE_LIMIT = 300.0, 90.0, 75.0, 40.0
# A stage for whose limit there is no time left is started if there is this much.
LEAST = 15.0

PASSED, FAILED, CUT, MISSING = "passed", "failed", "out of time", "not on this machine"
# Not done again by the next run. A case also ends as "measured", "wrong result" or "not a fastops kernel".
AGAIN = (FAILED, CUT)

# What runs under compute-sanitizer, many times slower.
SANITIZED = (
    "tests/test_cuda_linear.py", "tests/test_cuda_mlp.py", "tests/test_cuda_pool.py", "-k",
    "empty or asked_for or strided_operands or record",
)  # fmt: skip

_PROBE = """
import json, torch
if not torch.cuda.is_available():
    raise SystemExit(f"torch {torch.__version__} finds no NVIDIA GPU")
p = torch.cuda.get_device_properties(0)
print(json.dumps({"gpu": p.name, "capability": [p.major, p.minor], "multiprocessors": p.multi_processor_count,
                  "memory": p.total_memory, "torch": torch.__version__, "cuda": torch.version.cuda,
                  "cudnn": torch.backends.cudnn.version()}))
"""


# ---- the machine


def probe() -> dict:
    """The GPU, driver and torch that this python finds.

    Raises:
        SystemExit: there is none, and why.
    """
    result = subprocess.run([sys.executable, "-c", _PROBE], capture_output=True, text=True)
    if result.returncode != 0:
        why = (result.stderr.strip().splitlines() or ["torch could not be asked"])[-1]
        raise SystemExit(f"make gpu: no GPU to run on: {why} (GPU_PYTHON={sys.executable})")
    found = json.loads(result.stdout.splitlines()[-1])
    return {**found, "driver": _driver(), "python": sys.version.split()[0], "sources": _digest()}


def _driver() -> str:
    program = shutil.which("nvidia-smi")
    if program is None:
        return "unknown"
    query = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    return (subprocess.run(query, capture_output=True, text=True).stdout.split() or ["unknown"])[0]


def _digest() -> str:
    """A hash of every source that decides a result."""
    digest = hashlib.sha256()
    for folder in ("csrc", "fastops", "benchmarks", "tests"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".cpp", ".h", ".inl", ".cu", ".cuh") and path.name != "_build.py":
                digest.update(path.read_bytes())
    digest.update((ROOT / "build_native.py").read_bytes())
    return digest.hexdigest()[:16]


def architecture(capability: Sequence[int]) -> str:
    """As TORCH_CUDA_ARCH_LIST has it."""
    major, minor = capability
    return f"{major}.{minor}a" if (major, minor) == (9, 0) else f"{major}.{minor}"


# ---- what has been done


class State:
    """What was done, by stage and name, in this run and in earlier ones with its stamp; a file with a line each."""

    def __init__(self, path: Path, stamp: dict) -> None:
        self._path = path
        self.entries: dict[tuple[str, str], dict] = {}
        lines = path.read_text().splitlines() if path.exists() else []
        if lines and _parsed(lines[0]) == stamp:
            for entry in filter(None, map(_parsed, lines[1:])):
                self.entries[entry["stage"], entry["name"]] = entry
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(stamp) + "\n")

    def done(self, stage: str, name: str) -> bool:
        entry = self.entries.get((stage, name))
        return entry is not None and entry["outcome"] not in AGAIN

    def add(self, stage: str, name: str, outcome: str, **more: object) -> dict:
        entry = {"stage": stage, "name": name, "outcome": outcome, **more}
        self.entries[stage, name] = entry
        with self._path.open("a") as file:
            # A run that was cut may have left half a line.
            file.write("\n" + json.dumps(entry))
        seconds = f"  {more['seconds']:.0f} s" if "seconds" in more else ""
        detail = f"  {more['detail']}" if more.get("detail") else ""
        print(f"{stage:<10} {name:<60} {outcome}{seconds}{detail}", flush=True)
        return entry

    def forget(self) -> None:
        self._path.unlink(missing_ok=True)


def _parsed(line: str) -> dict | None:
    try:
        return json.loads(line) if line else None
    except json.JSONDecodeError:
        return None


# ---- stages


class Run:
    """One `make gpu`: its state, and how much of its time is left."""

    def __init__(self, state: State, budget: float = BUDGET) -> None:
        self.state = state
        self._end = time.monotonic() + budget

    def left(self) -> float:
        return self._end - time.monotonic()

    def command(
        self,
        stage: str,
        name: str,
        command: Sequence[str],
        limit: float,
        env: dict[str, str] | None = None,
        summary: Callable[[str], str] = lambda text: "",
    ) -> None:
        """Runs a command for this stage, unless the stage has been done or no time is left for it."""
        if self.state.done(stage, name) or self.left() < LEAST:
            return
        log = WORK / f"{stage}-{re.sub('[^A-Za-z0-9_]+', '-', name)}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        begin = time.monotonic()
        with log.open("w") as output:
            process = subprocess.Popen(
                command, cwd=ROOT, env={**os.environ, **(env or {})}, stdout=output, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
            try:
                status = process.wait(min(limit, self.left()))
            except subprocess.TimeoutExpired:
                status = None
            finally:
                _end(process)
        outcome = CUT if status is None else PASSED if status == 0 else FAILED
        detail = summary(log.read_text(errors="replace"))
        if outcome == FAILED:
            detail = f"{detail} (status {status}, {log})".strip()
        self.state.add(stage, name, outcome, seconds=round(time.monotonic() - begin, 1), detail=detail)

    def cases(self, names: Iterable[str], command: Sequence[str], limit: float = CASE_LIMIT) -> None:
        """Measures these cases by `command NAME ...`, which prints a line of JSON before and after each.

        A process that ends early or hangs takes the case at hand with it; another one goes on after that.
        """
        waiting = [name for name in names if not self.state.done("case", name)]
        while waiting and self.left() >= LEAST:
            WORK.mkdir(parents=True, exist_ok=True)
            with (WORK / "cases.log").open("w") as errors:
                process = subprocess.Popen(
                    [*command, *waiting], cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, text=True,
                    start_new_session=True,
                )  # fmt: skip
            begun, begin = None, time.monotonic()
            try:
                for line in _lines(process, lambda: min(limit, self.left())):
                    if "begin" in line:
                        begun, begin = line["begin"], time.monotonic()
                        continue
                    name = line.pop("name")
                    waiting.remove(name)
                    self.state.add("case", name, **line, seconds=round(time.monotonic() - begin, 1))
                    begun = None
                if begun is None and waiting:
                    begun = waiting[0]  # it ended before it began with one
                why = f"the process ended with status {process.wait()}: {_last_line(WORK / 'cases.log')}"
                outcome = FAILED
            except TimeoutError:
                outcome, why = CUT, f"more than {time.monotonic() - begin:.0f} s"
            finally:
                _end(process)
            if begun is not None:
                waiting.remove(begun)
                self.state.add("case", begun, outcome, detail=why)


def _end(process: subprocess.Popen) -> None:
    """Ends the process and the processes that it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    finally:
        process.wait()


def _lines(process: subprocess.Popen, limit: Callable[[], float]) -> Iterable[dict]:
    """The lines of JSON that it prints; TimeoutError where it prints none for longer than the limit."""
    found: queue.Queue = queue.Queue()

    def read() -> None:
        for text in process.stdout:
            found.put(text)
        found.put(None)

    threading.Thread(target=read, daemon=True).start()
    while True:
        try:
            text = found.get(timeout=max(0.0, limit()))
        except queue.Empty:
            raise TimeoutError from None
        if text is None:
            return
        line = _parsed(text.strip())
        if isinstance(line, dict):
            yield line


def _last_line(log: Path) -> str:
    return (log.read_text(errors="replace").strip().splitlines() or [""])[-1][:300]


def pytest_summary(text: str) -> str:
    """ "120 passed, 3 skipped" of pytest's last line."""
    found = re.findall(r"\d+ (?:passed|failed|skipped|errors?|deselected)\b", (text.strip().splitlines() or [""])[-1])
    return ", ".join(found)


def sanitizer_summary(text: str) -> str:
    return ", ".join(re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", text))


def test_files() -> list[str]:
    """The tests whose device is FASTOPS_TEST_DEVICE; the build's and the emulator's own are for any machine."""
    others = ("test_cuda_build.py", "test_cuda_mutants.py")
    return [f"tests/{path.name}" for path in sorted((ROOT / "tests").glob("test_cuda_*.py")) if path.name not in others]


def sanitize(run: Run, tool: str) -> None:
    """compute-sanitizer over the small set."""
    program = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if program is None:
        if not run.state.done("sanitizer", tool):
            run.state.add("sanitizer", tool, MISSING, detail="there is no compute-sanitizer")
        return
    run.command(
        "sanitizer", tool,
        [program, "--tool", tool, "--error-exitcode", "9", sys.executable, "-m", "pytest", "-q", "-x", *SANITIZED],
        SANITIZER_LIMIT,
        # Every tensor has an allocation of its own, so that an access behind its end is seen.
        {"FASTOPS_TEST_DEVICE": "cuda", "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        sanitizer_summary,
    )  # fmt: skip


def load_cases():
    """fastops.benchmarks.gpu_cases of this checkout, of which only the extension has been built."""
    import fastops

    fastops.__path__.append(str(ROOT))
    from fastops.benchmarks import gpu_cases

    return gpu_cases


def measure(names: Sequence[str]) -> int:
    """The process that measures: a line of JSON before and after each case."""
    gpu_cases = load_cases()
    timer = gpu_cases.CudaTimer()
    for name in names:
        print(json.dumps({"begin": name}), flush=True)
        try:
            result = gpu_cases.measure(gpu_cases.CASES[name], timer)
        except (RuntimeError, ValueError, TypeError) as error:
            result = {"outcome": FAILED, "detail": str(error).splitlines()[0][:300]}
        print(json.dumps({"name": name, **result}), flush=True)
    return 0


# ---- the report


def table(rows: Sequence[dict]) -> str:
    lines = [
        f"{'op':<22} {'shape':<30} {'dtype':<5} {'pass':<8} {'PyTorch us':>10} {'fastops us':>10} {'quartiles':>17} "
        f"{'ratio':>6} {'TF/s':>6} {'GB/s':>6} {'copy':>5}  kernel"
    ]
    for row in rows:
        low, middle, high = row["fastops_us"]
        lines.append(
            f"{row['op']:<22} {row['shape']:<30} {row['dtype']:<5} {row['mode']:<8} {row['torch_us'][1]:>10.4g} "
            f"{middle:>10.4g} {f'{low:.4g}-{high:.4g}':>17} {row['ratio']:>6.2f} {row['tflops']:>6.4g} "
            f"{row['gbytes']:>6.4g} {100 * row['copy_share']:>4.0f}%  {', '.join(row['kernels'])}"
        )
    return "\n".join(lines)


def aims_table(aims: Sequence[dict]) -> str:
    width = max(len(aim["aim"]) for aim in aims)
    lines = []
    for aim in aims:
        lowest = spread = "-"
        if aim["lowest"] is not None:
            lowest, spread = f"{aim['lowest']:.2f}", "{:.2f} - {:.2f}".format(*aim["spread"])
        where = f"{aim['measured']} of {aim['cases']} cases" + (f", lowest: {aim['where']}" if aim["where"] else "")
        lines.append(
            f"{aim['verdict']:<12} {aim['aim']:<{width}}  >= {aim['reach']:<4} {lowest:>6}  {spread:>13}  {where}"
        )
    return "\n".join(lines)


def report(stamp: dict, state: State, aims: Callable[[Sequence[dict]], list[dict]], wanted: Sequence[tuple]) -> dict:
    """What the JSON holds. wanted: every (stage, name); those without an entry are listed as left out."""
    entries = list(state.entries.values())
    rows = [entry["row"] for entry in entries if "row" in entry]
    return {
        "machine": {**stamp, "date": date.today().isoformat()},
        "method": "CUDA events around single calls, L2 overwritten before each, sides in turn; quartiles in "
        "microseconds; cudnn.benchmark on, TF32 off; every row verified against float64 first",
        "aims": aims(rows),
        "rows": rows,
        "stages": [entry for entry in entries if entry["stage"] != "case"],
        "without_a_row": [entry for entry in entries if entry["stage"] == "case" and "row" not in entry],
        "left_out": [f"{stage}: {name}" for stage, name in wanted if (stage, name) not in state.entries],
    }


def write(content: dict, folder: Path) -> Path:
    machine = content["machine"]
    name = re.sub(r"[^a-z0-9]+", "-", f"gpu {machine['gpu']} {machine['date']}".lower()).strip("-")
    path = folder / f"{name}.json"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--measure", nargs="+", metavar="CASE", help="only these cases, as lines of JSON")
    options = parser.parse_args(arguments)
    if options.measure:
        return measure(options.measure)

    stamp = probe()
    print("\n".join(f"{key:<16} {value}" for key, value in stamp.items()), flush=True)
    state = State(WORK / "state.jsonl", stamp)
    run = Run(state)
    if state.entries:
        print(f"going on with a run that has done {len(state.entries)} things")
    architectures = os.environ.get("TORCH_CUDA_ARCH_LIST") or architecture(stamp["capability"])
    run.command(
        "build", architectures, [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"], BUILD_LIMIT,
        {"FASTOPS_CUDA": "1", "TORCH_CUDA_ARCH_LIST": architectures},
    )  # fmt: skip
    if not state.done("build", architectures):
        print("make gpu: the build did not succeed; see build/gpu", file=sys.stderr)
        return 1
    (ROOT / ".venv" / "built").unlink(missing_ok=True)  # fastops/_build.py names this torch now
    cases = load_cases()
    for path in test_files():
        run.command(
            "tests", path, [sys.executable, "-m", "pytest", "-q", path], TESTS_LIMIT, {"FASTOPS_TEST_DEVICE": "cuda"},
            pytest_summary,
        )  # fmt: skip
    run.cases(cases.CASES, [sys.executable, "-m", "benchmarks.gpu", "--measure"])
    for tool in ("memcheck", "racecheck"):
        sanitize(run, tool)

    wanted = [("tests", path) for path in test_files()] + [("sanitizer", tool) for tool in ("memcheck", "racecheck")]
    wanted += [("case", name) for name in cases.CASES]
    return conclude(stamp, state, cases.evaluate, wanted, RESULTS)


def conclude(stamp: dict, state: State, aims: Callable, wanted: Sequence[tuple], folder: Path) -> int:
    """Prints and writes; 0 where everything was done and nothing was wrong."""
    content = report(stamp, state, aims, wanted)
    print(f"\n{table(content['rows'])}\n\n{aims_table(content['aims'])}")
    for entry in content["without_a_row"]:
        print(f"no figure: {entry['name']}: {entry['outcome']}: {entry.get('detail', '')}")
    for name in content["left_out"]:
        print(f"left out, no time: {name}")
    print(f"\nwrote {write(content, folder)}")
    bad = [entry for entry in state.entries.values() if entry["outcome"] in (*AGAIN, "wrong result")]
    for entry in bad:
        print(f"{entry['stage']} {entry['name']}: {entry['outcome']}: {entry.get('detail', '')}", file=sys.stderr)
    if content["left_out"] or any(entry["outcome"] in AGAIN for entry in bad):
        print("`make gpu` again goes on from here", file=sys.stderr)
    else:
        state.forget()
    return 1 if bad or content["left_out"] else 0


if __name__ == "__main__":
    sys.exit(main())
