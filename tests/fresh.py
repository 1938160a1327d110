"""Programs in fresh processes: torch is imported there, and nothing of fastops.

Importing torch takes 2.7 s of the processor (Zen 1), so one process has done it, once a test asks, and a program is a
child of that one: it finds what PyTorch's libraries read from the environment when they are loaded as it was then, and
may set what fastops reads.
"""

import multiprocessing
import os
import subprocess
import sys
import tempfile
from pathlib import Path

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch"])


def run_python(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """As subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True), for a minute."""
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, name) for name in ("stdout", "stderr")]
        process = _CONTEXT.Process(target=_run, args=(code, arguments, environment, outputs))
        process.start()
        process.join(60)
        if process.exitcode is None:
            process.kill()
            process.join()
        return subprocess.CompletedProcess(code, process.exitcode, *(path.read_text() for path in outputs))


def _run(code: str, arguments: tuple[str, ...], environment: dict[str, str], outputs: list[Path]) -> None:
    assert "fastops" not in sys.modules
    for stream, path in enumerate(outputs, 1):
        os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY), stream)
    os.environ.update(environment)
    sys.argv = ["-c", *arguments]
    exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
