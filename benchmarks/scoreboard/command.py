"""Which cases the scoreboard measures, and where the results go."""

import argparse
import importlib.metadata
import os
import sys
import time
from pathlib import Path

from fastops.benchmarks import report
from fastops.benchmarks.harness import FORWARD
from fastops.benchmarks.scoreboard import tables
from fastops.benchmarks.scoreboard.networks import FLOATS, INT8, NETWORKS
from fastops.benchmarks.scoreboard.providers import PROVIDERS, provider
from fastops.benchmarks.scoreboard.tables import MODES, Case, Row
from fastops.benchmarks.scoreboard.turns import measure

PACKAGES = ("torch", "jax", "jaxlib", "onnxruntime", "openvino", "nncf", "torchao")


class Progress:
    """One line on the terminal that changes in place; elsewhere a line a case."""

    def __init__(self) -> None:
        self._live = sys.stderr.isatty()

    def step(self, text: str) -> None:
        if self._live:
            print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)

    def case(self, text: str) -> None:
        print(f"\r\033[K{text}" if self._live else text, file=sys.stderr, flush=True)


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="python -m fastops.benchmarks.scoreboard", description="fastops beside its peers, on whole networks."
    )
    several = {"nargs": "+", "metavar": "NAME"}
    result.add_argument(
        "--models", **several, default=list(NETWORKS), help=f"of {', '.join(NETWORKS)}; resnet50:8 is one batch of it"
    )
    result.add_argument(
        "--providers",
        **several,
        help=f"of {', '.join(PROVIDERS)}; or package.module:Class, one of your own; default: those for the dtype",
    )
    result.add_argument("--only", choices=list(MODES), help="default: inference and training")
    result.add_argument("--dtype", nargs="+", choices=[*FLOATS, INT8], default=list(FLOATS))
    result.add_argument("--threads", type=int, default=min(2, len(os.sched_getaffinity(0))))
    result.add_argument(
        "--quick", action="store_true", help="fewer and shorter rounds, float32, and only the batch that counts"
    )
    result.add_argument(
        "--peers",
        help="folder of `pip install --target FOLDER jax onnxruntime openvino nncf torchao`; several with : between",
    )
    result.add_argument("--out", type=Path, default=Path("fastops-bench"), help="folder for JSON and plot")
    result.add_argument(
        "--add", action="store_true", help="keep what the results of this machine and day have, where --out has some"
    )
    return result


def choose(options: argparse.Namespace) -> list[Case]:
    """The cases that the options ask for.

    Raises:
        SystemExit: an option names what does not exist.
    """
    for name in options.providers or ():
        try:
            provider(name)
        except (KeyError, ImportError, AttributeError):
            raise SystemExit(f"scoreboard: --providers {name} is none of {', '.join(PROVIDERS)}") from None
    if not 1 <= options.threads <= len(os.sched_getaffinity(0)):
        raise SystemExit(
            f"scoreboard: --threads must be between 1 and the number of processors, "
            f"{len(os.sched_getaffinity(0))}, got {options.threads}"
        )
    cases = []
    for chosen in options.models:
        name, _, batch = chosen.partition(":")
        if name not in NETWORKS or (batch and not (batch.isdecimal() and int(batch) > 0)):
            raise SystemExit(f"scoreboard: --models {chosen} is none of {', '.join(NETWORKS)}, with or without :BATCH")
        network = NETWORKS[name]
        for what, mode in MODES.items():
            if options.only not in (None, what):
                continue
            batches = network.inference if mode == FORWARD else (network.training,)
            if options.quick and mode == FORWARD:
                batches = (network.decisive,)
            for dtype in options.dtype if not options.quick else options.dtype[:1]:
                if dtype not in network.dtypes or (dtype == INT8 and mode != FORWARD):
                    continue
                cases += [Case(name, size, dtype, mode) for size in ([int(batch)] if batch else batches)]
    if not cases:
        raise SystemExit("scoreboard: --models, --only and --dtype leave no case")
    return list(dict.fromkeys(cases))


def take_part(options: argparse.Namespace, case: Case) -> list[str]:
    """The providers of a case."""
    return options.providers or [name for name, one in PROVIDERS.items() if case.dtype in one.dtypes]


def versions(peers: str | None) -> dict[str, str]:
    """Of the packages that take part, where they are installed."""
    path = [*sys.path, *(peers.split(os.pathsep) if peers else [])]
    found = {one.metadata["Name"]: one.version for one in reversed(list(importlib.metadata.distributions(path=path)))}
    return {name: found[name] for name in PACKAGES if name in found}


def run(options: argparse.Namespace) -> int:
    """Measures, prints and writes; returns 1 when a result was wrong or a provider crashed."""
    cases = choose(options)
    stamp = {**report.machine(), "threads": options.threads, "versions": versions(options.peers)}
    print("\n".join(f"{key:<17} {value}" for key, value in stamp.items()))
    if stamp["load_before"] > 0.5:
        print("warning: other programs are using this machine; the times will not be worth much")
    rows: list[Row] = []
    progress, begin = Progress(), time.perf_counter()
    for number, case in enumerate(cases):

        def step(text: str, number: int = number, case: Case = case) -> None:
            spent = time.perf_counter() - begin
            progress.step(f"[{number + 1}/{len(cases)}, {spent:.0f} s] {case.name}: {text}")

        measured = measure(case, take_part(options, case), options, step)
        rows += measured
        progress.case(f"[{number + 1}/{len(cases)}] {case.name}: {tables.line(measured)}")
        # After every case, so that a run that is cut leaves what it has.
        paths = tables.write(options.out, stamp, rows, keep=options.add)
    print(f"\n{tables.tables(rows)}\n\n{time.perf_counter() - begin:.0f} s")
    print("\n".join(f"wrote {path}" for path in paths))
    bad = [row for row in rows if row.status == "WRONG" or row.status.startswith("crashed")]
    for row in bad:
        print(f"{row.case.name}, {row.label}: {tables.explain(row)}", file=sys.stderr)
    return 1 if bad else 0
