"""The processes of the providers, and their turns."""

import argparse
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from statistics import median, quantiles

from fastops.benchmarks.harness import BOTH
from fastops.benchmarks.scoreboard.providers import provider
from fastops.benchmarks.scoreboard.tables import Case, Row
from fastops.benchmarks.scoreboard.worker import Job

PREPARE_LIMIT, TURN_LIMIT = 900.0, 120.0  # seconds
ROUNDS, TURN = 9, 0.25  # how often every provider has its turn, and how many seconds that takes at least
QUICK_ROUNDS, QUICK_TURN = 5, 0.1


class Crashed(Exception):
    """A worker ended, or did not answer in time; the message says how."""


class Worker:
    """The process of one provider."""

    def __init__(self, job: Job) -> None:
        self._log = Path(job.folder) / f"{job.do}-{job.provider.replace(':', '-')}.log"
        command = [sys.executable, "-m", "fastops.benchmarks.scoreboard.worker", json.dumps(asdict(job))]
        # Threads are set by every library's own means; what these variables say would be a limit for some of them.
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "MKL_", "GOMP_"))}
        with self._log.open("w") as log:
            # In a session of its own: when a shell's job ends, the system continues what is stopped in its group.
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment,
                start_new_session=True,
            )
        self._answers: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put("")

    def answer(self, seconds: float) -> dict:
        """The next one. Raises Crashed."""
        try:
            line = self._answers.get(timeout=seconds)
        except queue.Empty:
            raise Crashed(f"no answer in {seconds:.0f} s") from None
        if line:
            return json.loads(line)
        status = self._process.wait()
        last = (self._log.read_text(errors="replace").strip().splitlines() or [""])[-1]
        raise Crashed(f"signal {-status}" if status < 0 else last or f"exit status {status}")

    def turn(self, seconds: float) -> list[float]:
        """Samples of that many seconds together, while this worker runs; afterwards it is stopped. Raises Crashed."""
        self._process.send_signal(signal.SIGCONT)
        with suppress(BrokenPipeError):  # the answer says why
            self._process.stdin.write(json.dumps({"seconds": seconds}) + "\n")
            self._process.stdin.flush()
        times = self.answer(TURN_LIMIT)["times"]
        self.stop()
        return times

    def stop(self) -> None:
        self._process.send_signal(signal.SIGSTOP)

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        with suppress(BrokenPipeError):  # of a line that was never read
            self._process.stdin.close()


# ---- measuring -------------------------------------------------------------------------------------------------------


def measure(
    case: Case,
    names: Sequence[str],
    options: argparse.Namespace,
    step: Callable[[str], None] = lambda text: None,
) -> list[Row]:
    """A row of each provider."""
    workers: dict[str, Worker] = {}
    found: dict[str, dict] = {name: {} for name in names}
    with tempfile.TemporaryDirectory(prefix="fastops-scoreboard-") as folder:

        def job(do: str, name: str) -> Job:
            return Job(do, name, **asdict(case), threads=options.threads, folder=folder, peers=options.peers)

        try:
            step("reference")
            try:
                _only_answer(job("reference", "eager"))
            except Crashed as crash:
                found = {name: {"status": "crashed", "why": f"the reference: {crash}"} for name in names}
                names = []
            for name in names:
                step(f"prepares {name}")
                workers[name] = Worker(job("time", name))
                try:
                    found[name] = workers[name].answer(PREPARE_LIMIT)
                    workers[name].stop()
                except Crashed as crash:
                    found[name] = {"status": "crashed", "why": str(crash)}
                if found[name]["status"] != "ready":
                    workers.pop(name).end()
            times, crashes = take_turns(workers, options, step)
            found = {name: {**answer, **crashes.get(name, {})} for name, answer in found.items()}
        finally:
            for worker in workers.values():
                worker.end()
        peaks = {}
        for name in names:
            if case.mode == BOTH and provider(name).memory and times.get(name):
                step(f"memory of {name}")
                with suppress(Crashed):
                    peaks[name] = _only_answer(job("memory", name)).get("bytes")
    return [
        _row(case, options.threads, name, answer, times.get(name, []), peaks.get(name))
        for name, answer in found.items()
    ]


def _only_answer(job: Job) -> dict:
    worker = Worker(job)
    try:
        return worker.answer(PREPARE_LIMIT)
    finally:
        worker.end()


def take_turns(
    workers: dict[str, Worker], options: argparse.Namespace, step: Callable[[str], None]
) -> tuple[dict[str, list[float]], dict[str, dict]]:
    """The samples of every worker, and of those that crashed how; every other round goes backwards."""
    rounds, seconds = (QUICK_ROUNDS, QUICK_TURN) if options.quick else (ROUNDS, TURN)
    times: dict[str, list[float]] = {name: [] for name in workers}
    crashes: dict[str, dict] = {}
    for number in range(rounds):
        step(f"round {number + 1} of {rounds}")
        for name in list(workers)[:: -1 if number % 2 else 1]:
            if name in crashes:
                continue
            try:
                times[name] += workers[name].turn(seconds)
            except Crashed as crash:
                crashes[name] = {"status": "crashed", "why": str(crash)}
                times[name].clear()
                workers[name].end()
    return times, crashes


def _row(case: Case, threads: int, name: str, answer: dict, times: list[float], peak: int | None) -> Row:
    one = provider(name)
    status = {"ready": "measured", "wrong": "WRONG"}.get(answer["status"], answer.get("why"))
    if answer["status"] == "crashed":
        status = f"crashed: {answer['why']}"
    q1, _, q3 = (1e3 * value for value in quantiles(times)) if len(times) > 1 else [None] * 3
    return Row(
        **asdict(case),
        threads=threads,
        provider=name,
        label=one.label,
        peer=one.peer,
        status=status,
        ms=1e3 * median(times) if times else None,
        least_ms=1e3 * min(times) if times else None,
        q1_ms=q1,
        q3_ms=q3,
        samples=len(times),
        error=answer.get("error"),
        torch_error=answer.get("torch_error"),
        allowed_error=answer.get("allowed_error"),
        prepared_s=answer.get("prepared_s"),
        peak_bytes=peak,
    )
