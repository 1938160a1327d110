"""What is running, and why: fastops.info()."""

import os
import platform
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fastops import _C, memory


@dataclass(frozen=True)
class Info:
    """What fastops.info() returns. str() is the page that `fastops info` prints."""

    version: str
    location: str  # the folder of the package
    python: str
    torch: str  # the one that runs
    built_for_torch: str
    compiler: str
    compiler_flags: str
    cpu: str
    cores: int  # that this process may use
    isa_found: str  # the best tier that this processor has
    isa_used: str
    isa_reason: str
    threads: int
    team: str  # whose threads they are now: "openmp", PyTorch's, or "own"
    team_reason: str
    openmp: tuple[str, ...]  # the OpenMP runtimes in this process
    cuda: bool  # tensors on a GPU take fastops' kernels where there are some for the op
    cuda_reason: str  # what was compiled in, or why nothing was; the driver and the devices found, or what is missing
    memory: dict[str, int]  # fastops.memory.stats()

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        pool = self.memory
        requests = pool["hits"] + pool["misses"]
        rows = [
            ("fastops", f"{self.version}, {self.location}"),
            ("python", self.python),
            ("torch", f"{self.torch} (built for {self.built_for_torch})"),
            ("compiler", self.compiler),
            ("flags", self.compiler_flags),
            ("processor", f"{self.cpu}, {self.cores} cores for this process"),
            ("ISA", f"{self.isa_used} ({self.isa_reason})"),
            ("threads", f"{self.threads} (torch.set_num_threads), {self.team_reason}"),
            ("OpenMP", ", ".join(self.openmp) if self.openmp else "none loaded"),
            ("CUDA", f"{'yes' if self.cuda else 'no'}: {self.cuda_reason}"),
            (
                "memory pool",
                f"{_size(pool['allocated_bytes'])} in use, {_size(pool['cached_bytes'])} cached of at most "
                f"{_size(pool['limit_bytes'])}, for outputs from {_size(pool['threshold_bytes'])}",
            ),
            ("", f"{requests} outputs, {pool['hits']} of them from the cache"),
        ]
        if len(self.openmp) > 1:
            rows.append(("warning", "more than one OpenMP runtime is loaded; their threads compete for the cores"))
        return "\n".join(f"{name:<12} {text}" for name, text in rows)

    __repr__ = __str__


def info() -> Info:
    """What is running, and why: versions, build, instruction set, threads, OpenMP, CUDA, memory pool.

    Returns:
        An Info. Its attributes are the single facts, as_dict() has all of them, and str() is a page to read or to put
        into a bug report.

    Raises nothing. Source: fastops' own.

    >>> info = fastops.info()
    >>> info.version == fastops.__version__
    True
    >>> info.isa_used in ("scalar", "avx2", "avx512", "avx512_bf16", "amx", "neon")
    True
    """
    build = _C.build_info()
    cuda, found = _C.cuda_found()
    return Info(
        version=build["version"],
        location=str(Path(__file__).resolve().parent),
        python=f"{platform.python_version()}, {platform.platform()}",
        torch=str(torch.__version__),
        built_for_torch=build["torch"],
        compiler=build["compiler"],
        compiler_flags=build["flags"],
        cpu=" ".join(_C.cpu_name().split()),
        cores=len(os.sched_getaffinity(0)),
        isa_found=_C.isa_found(),
        isa_used=_C.isa_used(),
        isa_reason=_isa_reason(),
        threads=torch.get_num_threads(),
        team=_C.team(),
        team_reason=_team_reason(),
        openmp=_openmp_runtimes(),
        cuda=cuda,
        cuda_reason=f"{build['cuda']}; {found}" if found else build["cuda"],
        memory=memory.stats(),
    )


def _isa_reason() -> str:
    asked = os.environ.get("FASTOPS_ISA", "")
    problem = _C.isa_problem()
    if problem is not None:
        return f"FASTOPS_ISA={asked} {problem} and is ignored"
    found, used = _C.isa_found(), _C.isa_used()
    if used == found:
        return "the best that this processor has"
    return f"this processor has {found}" + (f"; lowered by FASTOPS_ISA={asked}" if asked == used else "; lowered")


def _team_reason() -> str:
    asked, choice = os.environ.get("FASTOPS_TEAM", ""), _C.team_choice()
    whose = "PyTorch's" if _C.team() == "openmp" else "of a team of fastops' own"
    if choice != "auto":
        return f"{whose}, by FASTOPS_TEAM={choice}"
    if asked not in ("", "auto"):
        whose += f"; FASTOPS_TEAM={asked} is none of auto, openmp and own, and is ignored"
    return whose if _C.team() == "openmp" else f"{whose}, as other programs want the processor"


def _openmp_runtimes() -> tuple[str, ...]:
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return ()
    return tuple(sorted(set(re.findall(r"\S*/lib(?:gomp|iomp5|omp)[^/\s]*\.so\S*", maps))))


def _size(count: int) -> str:
    value = float(count)
    for unit in ("bytes", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.4g} {unit}"
        value /= 1024
    return f"{value:.4g} GiB"
