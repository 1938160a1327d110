"""`fastops bench`: which cases are measured, and where the results go."""

import argparse
import os
import sys
import time
from itertools import product
from pathlib import Path

import torch

from fastops._modules import modules
from fastops.benchmarks import busy, figures, footprint, models, report
from fastops.benchmarks.harness import BACKWARD, BOTH, DTYPES, FORWARD, MODES, Case, Row, WrongResult, measure

# What measures an op (FUNCTIONS, SHAPE, make, cases), by its stem. The whole models are measured if --models asks.
STEMS = {
    module.__name__.rpartition(".")[2]: module
    for module in modules("fastops.benchmarks")
    if hasattr(module, "FUNCTIONS") and module is not models
}
OPS = {op: module for module in (*STEMS.values(), models) for op in module.FUNCTIONS}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds bench's options to the parser."""
    several = {"nargs": "+", "default": None}
    parser.add_argument("--op", **several, metavar="OP", help=f"of {', '.join([*STEMS, 'memory', *OPS])}; default: all")
    parser.add_argument(
        "--models", action="store_const", dest="op", const=["model"], help="whole models: the same as --op model"
    )
    parser.add_argument(
        "--shape",
        **several,
        help="instead of the standard ones: " + "; ".join(f"{stem} {module.SHAPE}" for stem, module in STEMS.items()),
    )
    parser.add_argument("--dtype", **several, choices=list(DTYPES))
    parser.add_argument(
        "--threads",
        nargs="+",
        type=int,
        default=None,
        help="default: 2, and 1 for the largest products; for models PyTorch's",
    )
    parser.add_argument(
        "--pass",
        "--mode",
        **several,
        dest="mode",
        choices=list(MODES),
        help="without autograd, recording, backward alone, forward and backward; default: all but backward alone",
    )
    parser.add_argument(
        "--busy", action="store_true", help="instead: three models while other programs want the processor"
    )
    parser.add_argument("--isa", default=None, help="a lower tier than the best one (see `fastops info`)")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter samples, float32 and bfloat16 only")
    parser.add_argument("--out", type=Path, default=Path("fastops-bench"), help="folder for JSON, CSV and plot")
    parser.add_argument(
        "--add", action="store_true", help="keep what the results of this machine and day have, where --out has some"
    )


def choose(options: argparse.Namespace) -> list[Case]:
    """The cases that the options ask for.

    Raises:
        SystemExit: an option names what does not exist.
    """
    known = [*STEMS, "memory", *OPS]
    for name in options.op or []:
        if name not in known:
            raise SystemExit(f"fastops bench: --op {name} is none of {', '.join(known)}")
    with_models = any(op in models.FUNCTIONS for op in options.op or [])
    threads = options.threads or [torch.get_num_threads() if with_models else min(2, len(os.sched_getaffinity(0)))]
    if min(threads) < 1:
        raise SystemExit(f"fastops bench: --threads must be at least 1, got {min(threads)}")
    if options.shape is None:
        stems = [*STEMS.values(), models] if with_models else STEMS.values()
        cases = [case for count in threads for stem in stems for case in stem.cases(count)]
        if options.threads is not None:
            cases = [case for case in cases if case.threads in threads]
        if BACKWARD in (options.mode or []):
            cases += [alone for case in cases if case.mode == BOTH and (alone := _backward(case)).mode == BACKWARD]
    else:
        dtypes, modes = options.dtype or ["f32"], options.mode or [FORWARD]
        if options.op is None:
            raise SystemExit("fastops bench: --shape needs --op")
        ops = [op for op in OPS if any(_matches(op, name) for name in options.op)]
        grid = product(ops, options.shape, dtypes, modes, threads)
        try:
            cases = [OPS[op].make(op, shape, dtype, mode, count) for op, shape, dtype, mode, count in grid]
        except (ValueError, KeyError):
            wanted = "; ".join(f"{op} takes {OPS[op].SHAPE}" for op in ops)
            raise SystemExit(
                f"fastops bench: --shape {' '.join(options.shape)} does not fit --op {' '.join(options.op)}: {wanted}"
            ) from None
    cases = [
        case
        for case in cases
        if (options.op is None or any(_matches(case.op, name) for name in options.op))
        and (options.dtype is None or case.dtype in options.dtype)
        and (options.mode is None or case.mode in options.mode)
        and not (options.quick and options.dtype is None and case.dtype in ("f64", "f16"))
    ]
    return list(dict.fromkeys(cases))


def run(options: argparse.Namespace) -> int:
    """Measures, prints and writes; returns 1 when a result was wrong."""
    if options.busy:
        return busy.run(options.out, *(options.threads or [min(2, torch.get_num_threads())])[:1], options.quick)
    cases = choose(options)
    with_memory = options.shape is None and (options.op is None or "memory" in options.op)
    if not cases and not with_memory:
        raise SystemExit("fastops bench: no case fits these options")
    if options.isa is not None:
        from fastops import _C

        if not _C.set_isa(options.isa):
            raise SystemExit(f"fastops bench: this processor has no tier {options.isa}; its best is {_C.isa_found()}")
    stamp = report.machine()
    print("\n".join(f"{key:<17} {value}" for key, value in stamp.items()))
    if stamp["load_before"] > 0.5:
        print("warning: other programs are using this machine; the times will not be worth much")
    print(f"{len(cases)} cases\n\n{report.HEADER}")
    rows: list[Row] = []
    wrong = 0
    begin = time.perf_counter()
    for case in cases:
        if case.isa is not None and options.isa is not None:
            continue
        try:
            rows.append(measure(case, options.quick))
            print(report.line(rows[-1]), flush=True)
        except WrongResult as error:
            wrong += 1
            print(f"{case.op:<13} {case.shape:<16} {case.dtype:<5} {case.mode:<7} WRONG: {error}", flush=True)
    memory = footprint.measure(min(2, torch.get_num_threads())) if with_memory else None
    if options.add:
        rows, memory = report.added(options.out, stamp, rows, memory)
    results = figures.evaluate(rows, memory)
    print(f"\n{time.perf_counter() - begin:.0f} s")
    if results:
        print(f"\naims\n{report.figures_table(results)}")
    if rows:
        print("\n" + "\n".join(f"wrote {path}" for path in report.write(options.out, stamp, rows, memory, results)))
    if wrong:
        print(f"\n{wrong} cases gave wrong results", file=sys.stderr)
    return 1 if wrong else 0


def _backward(case: Case) -> Case:
    """The backward pass of the case alone; the case itself where there is none, as of a step of an optimizer."""
    if OPS[case.op] is models:
        return case
    return OPS[case.op].make(case.op, case.shape, case.dtype, BACKWARD, case.threads, case.isa)


def _matches(op: str, name: str) -> bool:
    return op == name or op.startswith(f"{name}+") or (name in STEMS and OPS[op] is STEMS[name])
