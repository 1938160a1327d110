"""What is compiled, and with which flags: the one place that knows.

setup.py builds the extension with it; `make build`, `make sanitize`, `make ulp` and `make cuda-usage` come here too:

    python build_native.py kernels     # what the extension has that needs no torch, while pip brings that
    python build_native.py sanitize    # builds and runs every tests/cpp/test_*.cpp: the scalar tier with ASan and UBSan
    python build_native.py sanitize all  # the same with every tier of this processor under the sanitizers
    python build_native.py arm [...]   # these tests of tests/cpp, or all, for 64-bit Arm, by an emulator: its best tier
    python build_native.py ulp [...]   # builds tests/cpp/ulp.cpp with the kernels and runs it with these arguments
    python build_native.py library DIR # DIR/lib/libfastops.a, DIR/include/fastops and a CMake package: no torch
    python build_native.py runtime DIR # what runs models of light.save, without torch: DIR/lib, DIR/bin, DIR/include
    python build_native.py runtime DIR aarch64  # the same for 64-bit Arm
    python build_native.py runtime DIR x86_64 avx2 ...  # the same with kernels of these tiers, and scalar ones
    python build_native.py cuda-usage  # registers, stack and spills of every CUDA kernel on every architecture
"""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent
KERNELS = ROOT / "csrc" / "kernels"  # a room an op: <op>/<op>.h, <op>/cpu, <op>/cuda
SAVED = KERNELS / "activation" / "cpu" / "saved.cpp"  # what each activation saves
TORCH_LAYER = ROOT / "csrc" / "torch"
RUNTIME = ROOT / "csrc" / "runtime"  # models from a file, without torch
EMULATOR = ROOT / "tests" / "emulator"
EXTENSION = ROOT / "build" / "extension"
# What lies beside the extension: the kernels, and the ops of torch.ops.fastops for programs without Python.
KERNEL_LIBRARY, OP_LIBRARY = LIBRARIES = ("libfastops_kernels.so", "libfastops_torch.so")
# Compiles for 64-bit Arm on another processor, and runs what was compiled (Debian's g++-aarch64-linux-gnu, qemu-user).
ARM_COMPILER, ARM_RUNNER = "aarch64-linux-gnu-g++", ("qemu-aarch64", "-L", "/usr/aarch64-linux-gnu")
# What runs a file of fastops.light.save: a library, and a command.
RUN_LIBRARY, RUN_COMMAND = RUN = ("libfastops_run.so", "fastops-run")

COMMON = ["-std=c++20", "-Wall", "-Wextra", "-fPIC", "-fvisibility=hidden"]
OPTIMIZE = ["-O3"]
# -O3 compiles the scalar tier in 118 s and -O2 in 67 (Zen 5, two at a time). Products, convolutions and activations are
# as fast, 3x3 max pools 12% slower.
OPTIMIZE_SCALAR = ["-O2"]
SANITIZE = ["-O1", "-g1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
# AddressSanitizer sees a null pointer and the end of an object too, and the kernels have no virtual function.
SANITIZE += ["-fno-sanitize=null,object-size,vptr"]
# -Og compiles in 0.4 to 0.6 of the time of -O1. Kernels then run in 1.3 of it under the sanitizers, in up to 3 without:
# of use for tests but for these rooms, whose tests run for longer than they compile (test_conv_as_built, scalar tier,
# 20 s and 62, to compile conv 72 and 27; Zen 1. Under the sanitizers linear compiles in 13.9 s and 7.7, test_linear
# runs 10.8 s and 13.9; Emerald Rapids).
RUN_LONGER = ("conv", "linear", "conv_int8", "linear_int8")
# The tiers that are sanitized unless all are asked for. Bodies are the same templates in every tier; an operand lies
# between pages that fault, where AddressSanitizer sees nothing in any tier. What other tiers alone have (vec.h,
# FASTOPS_VEC_... and FASTOPS_HAS_...) is sanitized by `make sanitize TIERS=all` only.
SANITIZED = ("scalar", "")
# With which dtypes: one whose elements are what is computed with, and one whose are not. The bodies are templates that
# ask for nothing else: bfloat16 and float16 differ in half.inl alone, float32 and float64 in the number of lanes and in
# activations' formulas. So these rooms are sanitized with all dtypes, and others are tested with all as they are.
DTYPES, SANITIZED_DTYPES = ("f32", "f64", "bf16", "f16"), ("f32", "bf16")
ALL_DTYPES_SANITIZED = ("activation", "mlp")
# Uses after scope are seen in the scalar tier, whose scopes the others have too: softmax's avx512 kernels compile in
# 8.5 s instead of 12.4 (Zen 3). Checks by calls (asan-instrumentation-with-call-threshold=0) compile sooner still, but
# test_linear's scalar tier then takes more than 31 s to run instead of 16 (Zen 4).
SANITIZE_WIDE = ["-fno-sanitize-address-use-after-scope"]

# One source a tier, compiled for every room: its flags, and nothing but its own code (isa.h and dispatch.cpp decide
# what runs). A product and a sum are contracted to one rounding only where the source says fma, so that every path
# through a kernel rounds alike.
_AVX2 = ["-mavx2", "-mfma", "-mf16c"]
_AVX512 = [*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
_AVX512_BF16 = [*_AVX512, "-mavx512bf16", "-mavx512vnni"]
_AMX = [*_AVX512_BF16, "-mamx-tile", "-mamx-bf16", "-mamx-int8"]
TIERS = {
    "isa_scalar.cpp": [],
    "isa_avx2.cpp": _AVX2,
    "isa_avx512.cpp": _AVX512,
    "isa_avx512_bf16.cpp": _AVX512_BF16,
    "isa_amx.cpp": _AMX,
    # Scheduled before registers are given out, all loads of a step come first, and of the 24 sums of a tile of the
    # matrix product two are then kept in memory (GCC 12).
    "isa_neon.cpp": ["-fno-schedule-insns"],
}
# Those that a kind of processor may have; of any other kind, the scalar tier.
TIERS_OF = {
    "x86_64": ["isa_scalar.cpp", "isa_avx2.cpp", "isa_avx512.cpp", "isa_avx512_bf16.cpp", "isa_amx.cpp"],
    "aarch64": ["isa_scalar.cpp", "isa_neon.cpp"],
}
KERNEL_FLAGS = ["-ffp-contract=off"]
# The tiers in the order of Isa (isa.h), and those that hand what they have no kernel for to another one (tier.inl).
ISAS = ("scalar", "avx2", "avx512", "avx512_bf16", "amx", "neon")
LOWER_TIERS = {"avx512_bf16": ("avx512",), "amx": ("avx512_bf16", "avx512")}
# The rooms whose kernels these tiers have in the run time, where all rooms of a tier are compiled together: those that
# do with the tier's instructions more than round what they store. Other calls get the next tier's kernels.
RUN_ROOMS = {
    "avx512_bf16": (
        *("conv", "linear", "conv_int8", "linear_int8"),
        *("activation", "batch_norm", "conv_pool", "layer_norm", "pool", "pool_int8", "softmax"),
    ),
    "amx": ("conv", "linear", "conv_int8", "linear_int8"),
}
TRAINING_ROOMS = ("loss", "optim", "fake_quantize")
# Kernels throw nothing, and nothing throws through them.
NO_UNWINDING = ["-fno-exceptions", "-fno-asynchronous-unwind-tables"]
# The same for the GPU: every fused multiply-add is one that the source asks for.
NVCC_FLAGS = ["-std=c++20", "-O3", "-fmad=false", "-Xcompiler=-Wall,-Wextra,-fPIC,-fvisibility=hidden"]
ARCHITECTURES = "8.0+PTX;9.0a"
OLDEST_NVCC = (12, 0)
# Most of what a small file of the torch layer takes is torch's headers: the smallest compiles in 10 s, eight of them
# together in 16, the eight with aten.cpp in 29 (seconds of the processor, Zen 4, beside other programs). So files below
# the first size are compiled together, up to the second, in bytes of source.
# torch's headers read ahead are no help against that: 7.0 s of the processor for a file with nothing else in it, of
# which 4.4 are templates (Emerald Rapids), so that what is built once and not again is few units of this size.
SMALL_FILE, TOGETHER, TOGETHER_ONCE = 11_500, 50_000, 130_000
# One of these is there with a driver: on Linux, in a container that was given a GPU, under WSL.
DRIVER = ("/proc/driver/nvidia/version", "/dev/nvidiactl", "/dev/dxg")


def compiler() -> list[str]:
    """The C++ compiler's command: $CXX, else g++."""
    return shlex.split(os.environ.get("CXX", "g++"))


def host_compiler(command: list[str]) -> str:
    """The compiler itself, without a launcher before it, as in "ccache g++": nvcc takes one program."""
    return command[1] if len(command) > 1 and Path(command[0]).name in ("ccache", "sccache", "distcc") else command[0]


def compiler_version(command: list[str]) -> str:
    """One line that names the compiler, "g++ (Debian 12.2.0-14) 12.2.0"."""
    if shutil.which(command[0]) is None:
        raise SystemExit(
            f"fastops: no C++ compiler: '{command[0]}' was not found. Install g++ 11 or newer, or set CXX to one."
        )
    return subprocess.run([*command, "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]


def common_flags(version: str) -> list[str]:
    # Two extensions that share a template's name must not share its statics; only gcc does that, and only it has the
    # flag.
    return COMMON if "clang" in version else [*COMMON, "-fno-gnu-unique"]


def runs_here(flags: list[str]) -> bool:
    """Whether this processor has what these flags of a tier let the compiler use."""
    processor = Path("/proc/cpuinfo").read_text().replace("_", "").split()
    return all(flag[2:].replace("-", "") in processor for flag in flags if flag.startswith("-m"))


class Kernels(NamedTuple):
    """A source of the CPU's kernels; of a tier also the room that it is compiled for, "" for the tier's table."""

    source: Path
    room: str = ""

    @property
    def tier(self) -> str:
        """The tier's name, or "" for code of none."""
        return self.source.stem.removeprefix("isa_") if self.source.name in TIERS else ""

    @property
    def object(self) -> Path:
        """Where the object goes, below the build's folder."""
        folder = KERNELS / self.room / "cpu" if self.room else self.source.parent
        return (folder / self.source.name).with_suffix(".o")

    @property
    def flags(self) -> list[str]:
        # A tier's source includes other rooms' bodies too, and uses a part of them.
        # The others' functions are what the torch layer calls, in another library.
        tier = ["-Wno-unused-function", *TIERS[self.source.name]] if self.tier else ["-fvisibility=default"]
        return [*KERNEL_FLAGS, *tier, *([f"-DFASTOPS_ROOM={self.room}"] if self.room else [])]


def rooms() -> list[str]:
    """The ops with kernels for the CPU, slowest to compile first."""
    found = {path.stem for path in KERNELS.glob("*/cpu/*.inl") if (KERNELS / path.stem / f"{path.stem}.h").exists()}
    slow = ["conv", "pool", "batch_norm", "layer_norm", "linear", "activation", "inverted_residual", "attention"]
    return sorted(found, key=lambda room: (slow.index(room) if room in slow else len(slow), room))


def kernel_sources(machine: str = platform.machine()) -> list[Kernels]:
    """The kernels for a kind of processor, slowest to compile first."""
    machine = {"AMD64": "x86_64", "arm64": "aarch64"}.get(machine, machine)
    tiers = [KERNELS / "common" / "cpu" / name for name in TIERS_OF.get(machine, ["isa_scalar.cpp"])]
    others = sorted(path for path in KERNELS.glob("*/cpu/*.cpp") if path.name not in TIERS)
    # Of an inline function that several have, the linker takes the first: none that was compiled for a newer processor.
    # Compilation starts in this order, too.
    return [Kernels(tier, room) for tier in tiers for room in [*rooms(), ""]] + [Kernels(path) for path in others]


def cuda_sources() -> list[Path]:
    """The CUDA kernels."""
    return sorted(KERNELS.glob("*/cuda/*.cu"))


@dataclass(frozen=True)
class Cuda:
    """What the CUDA kernels are compiled with, or why they are not."""

    nvcc: str = ""
    version: str = ""
    architectures: tuple[str, ...] = ()  # as TORCH_CUDA_ARCH_LIST has them: "8.0+PTX"
    why_not: str = ""

    @property
    def code_flags(self) -> list[str]:
        flags = []
        for entry in self.architectures:
            name = entry.removesuffix("+PTX").replace(".", "")
            kinds = [f"sm_{name}"] + ([f"compute_{name}"] if entry.endswith("+PTX") else [])
            flags.append(f"-gencode=arch=compute_{name},code=[{','.join(kinds)}]")
        return flags

    @property
    def library_flags(self) -> list[str]:
        return [
            f"-L{Path(self.nvcc).resolve().parent.parent / 'lib64'}",
            "-lcudart_static",
            "-ldl",
            "-lpthread",
            "-lrt",
        ]

    def __str__(self) -> str:
        if self.why_not:
            return f"not compiled in: {self.why_not}"
        return f"compiled by nvcc {self.version} for {' '.join(self.architectures)}"


def find_cuda() -> Cuda:
    """What FASTOPS_CUDA asks for and this machine has.

    FASTOPS_CUDA=0: no CUDA kernels. 1: SystemExit where they cannot be built. auto, or not set: they are built where
    nvcc is and somebody wants them: this machine has an NVIDIA driver, or TORCH_CUDA_ARCH_LIST names architectures.
    """
    asked = os.environ.get("FASTOPS_CUDA", "").strip() or "auto"
    if asked not in ("0", "1", "auto"):
        raise SystemExit(f"fastops: FASTOPS_CUDA must be 0, 1 or auto, got '{asked}'")
    if asked == "0":
        return Cuda(why_not="FASTOPS_CUDA=0")
    if asked == "auto" and not has_driver() and not os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return Cuda(why_not="this machine has no NVIDIA driver; FASTOPS_CUDA=1 compiles them all the same")
    cuda = find_nvcc()
    if cuda.why_not and asked == "1":
        raise SystemExit(f"fastops: FASTOPS_CUDA=1 asks for CUDA kernels, which cannot be built: {cuda.why_not}")
    return cuda


def has_driver() -> bool:
    """Whether an NVIDIA driver is there."""
    return any(map(os.path.exists, DRIVER)) or shutil.which("nvidia-smi") is not None


def find_nvcc() -> Cuda:
    """nvcc of CUDA_HOME, of the PATH or of /usr/local/cuda, and the architectures it is to compile for."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    candidates = [str(Path(home) / "bin" / "nvcc") for home in homes] or ["nvcc", "/usr/local/cuda/bin/nvcc"]
    nvcc = next((path for path in map(shutil.which, candidates) if path), None)
    if nvcc is None:
        return Cuda(why_not=f"there is no nvcc ({' or '.join(candidates)})")
    # What lies on the PATH may be a script that calls the real one, which knows its folder.
    dry_run = [nvcc, "--dryrun", "-c", "-x", "cu", os.devnull, "-o", os.devnull]
    text = subprocess.run(dry_run, capture_output=True, text=True).stderr
    top = re.search(r"^#\$ TOP=(.*)$", text, re.MULTILINE)
    if top is not None:
        nvcc = str((Path(top[1]) / "bin" / "nvcc").resolve())
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)\.(\d+), V(\S+)", text)
    if release is None:
        return Cuda(why_not=f"{nvcc} --version names no release")
    version = release[3]
    if (int(release[1]), int(release[2])) < OLDEST_NVCC:
        return Cuda(why_not=f"nvcc {version} is older than {'.'.join(map(str, OLDEST_NVCC))}")
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST") or ARCHITECTURES
    entries = re.split(r"[;,\s]+", asked.strip())
    for entry in entries:
        if re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", entry) is None:
            raise SystemExit(
                f"fastops: TORCH_CUDA_ARCH_LIST must name architectures by number, such as '{ARCHITECTURES}', "
                f"got '{entry}'"
            )
    architectures = tuple(entry for entry in entries if int(entry.partition(".")[0]) >= 8)
    if not architectures:
        return Cuda(why_not=f"the kernels need compute capability 8.0, and TORCH_CUDA_ARCH_LIST is '{asked}'")
    return Cuda(nvcc, version, architectures)


@dataclass
class Build:
    """Compile and link steps under `folder`, run by ninja where there is one: only what changed, MAX_JOBS at a time.

    Without ninja every step is run, in the same order.
    """

    folder: Path
    compiler: list[str] = field(default_factory=compiler)
    compiles: list[tuple[list[str], Path, Path, list[str]]] = field(default_factory=list)
    headers: dict[Path, Path] = field(default_factory=dict)  # object -> the precompiled header that it needs
    parts: dict[Path, list[Path]] = field(default_factory=dict)  # a source that only includes others -> those
    links: list[tuple[list[Path], Path, list[str]]] = field(default_factory=list)

    def compile(self, source: Path, flags: list[str], into: str = "") -> Path:
        """Adds source -> object, in this folder of the folder; returns the object's path."""
        flags = [*flags, *shlex.split(os.environ.get("CXXFLAGS", ""))]
        return self._compile(self.compiler, source, self.folder / into, source.with_suffix(".o"), flags)

    def precompile(self, header: Path, flags: list[str], into: str) -> Path:
        """Adds header -> precompiled header, for compile_with.

        A copy of the header lies beside it, for a compiler that cannot use the precompiled one.
        """
        copy = self.folder / into / header.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(header, copy)
        flags = ["-x", "c++-header", *flags, *shlex.split(os.environ.get("CXXFLAGS", ""))]
        return self._compile(self.compiler, header, self.folder / into, header.with_suffix(".h.gch"), flags)

    def compile_with(self, precompiled: Path, source: Path, flags: list[str], into: str) -> Path:
        """The same as compile, with what precompile returned, from the same flags, included first."""
        result = self.compile(source, [*flags, "-include", str(precompiled.with_suffix(""))], into)
        self.headers[result] = precompiled
        return result

    def compile_together(self, precompiled: Path, sources: list[Path], flags: list[str], into: str) -> Path:
        """The same for several sources, which are one for the compiler."""
        if len(sources) == 1:
            return self.compile_with(precompiled, sources[0], flags, into)
        text = "".join(f'#include "{source}"\n' for source in sources)
        unit = Path(into) / f"{sources[0].stem}_to_{sources[-1].stem}.cpp"
        self.parts[self.folder / unit] = sources
        result = self.compile_text(unit, text, [*flags, "-include", str(precompiled.with_suffix(""))])
        self.headers[result] = precompiled
        return result

    def compile_text(self, unit: Path, text: str, flags: list[str]) -> Path:
        """The same for a text, which becomes a file in the folder."""
        unit = self.folder / unit
        if not unit.exists() or unit.read_text() != text:
            unit.parent.mkdir(parents=True, exist_ok=True)
            unit.write_text(text)
        flags = [*flags, *shlex.split(os.environ.get("CXXFLAGS", ""))]
        self.compiles.append((self.compiler, unit, unit.with_suffix(".o"), flags))
        return unit.with_suffix(".o")

    def compile_kernels(self, kernels: Kernels, flags: list[str]) -> Path:
        """The same for kernels of the CPU, with their own flags besides."""
        flags = [*flags, *kernels.flags, *shlex.split(os.environ.get("CXXFLAGS", ""))]
        return self._compile(self.compiler, kernels.source, self.folder, kernels.object, flags)

    def compile_cuda(self, cuda: Cuda, source: Path) -> Path:
        """The same by nvcc, with this compiler for the host's part."""
        flags = [*NVCC_FLAGS, *cuda.code_flags, f"-ccbin={host_compiler(self.compiler)}"]
        flags += shlex.split(os.environ.get("NVCCFLAGS", ""))
        return self._compile([cuda.nvcc], source, self.folder, source.with_suffix(".cu.o"), flags)

    def _compile(self, command: list[str], source: Path, folder: Path, object_: Path, flags: list[str]) -> Path:
        result = folder / object_.relative_to(ROOT)
        self.compiles.append((command, source, result, flags))
        return result

    def link(self, objects: list[Path], result: Path, flags: list[str]) -> None:
        """Adds objects -> result. Libraries go into flags, which come last."""
        self.links.append((objects, result, [*flags, *shlex.split(os.environ.get("LDFLAGS", ""))]))

    def run(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        jobs = int(os.environ.get("MAX_JOBS") or len(os.sched_getaffinity(0)))
        ninja = find_ninja()
        if ninja is None:
            self._run_all(jobs)
            return
        (self.folder / "build.ninja").write_text(self._ninja_file())
        if subprocess.run([ninja, "-C", str(self.folder), f"-j{jobs}"]).returncode != 0:
            self._fail()

    def describe(self, path: Path) -> None:
        """Writes the compile steps where editors look for them, as a compile_commands.json."""
        steps = [
            {
                "directory": str(self.folder),
                "file": str(part),
                "arguments": [*command, *flags, "-c", str(part), "-o", str(result)],
            }
            for command, source, result, flags in self.compiles
            for part in self.parts.get(source, [source])
        ]
        path.write_text(json.dumps(steps, indent=1) + "\n")

    def _fail(self) -> None:
        cuda = any(source.suffix == ".cu" for _, source, _, _ in self.compiles)
        more = " FASTOPS_CUDA=0 leaves the CUDA kernels out." if cuda else ""
        raise SystemExit(f"fastops: the build failed; the compiler's message is above.{more}")

    def _ninja_file(self) -> str:
        cxx = shlex.join(self.compiler)
        lines = [
            "ninja_required_version = 1.5",
            "rule compile",
            "  command = $compiler $flags -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = compile $name",
            "rule link",
            f"  command = {_value(cxx)} $in -o $out $flags",
            "  description = link $name",
        ]
        for command, source, result, flags in self.compiles:
            needs = f" | {_path(self.headers[result])}" if result in self.headers else ""
            lines += [f"build {_path(result)}: compile {_path(source)}{needs}"]
            lines += [f"  compiler = {_value(shlex.join(command))}"]
            name = result.relative_to(self.folder) if "-DFASTOPS_ROOM=" in " ".join(flags) else source.relative_to(ROOT)
            lines += [f"  flags = {_value(shlex.join(flags))}", f"  name = {name}"]
        for objects, result, flags in self.links:
            inputs = " ".join(map(_path, objects))
            lines += [f"build {_path(result)}: link {inputs}"]
            lines += [f"  flags = {_value(shlex.join(flags))}", f"  name = {result.name}"]
        return "\n".join(lines) + "\n"

    def _run_all(self, jobs: int) -> None:
        def call(command: list[str], result: Path) -> None:
            result.parent.mkdir(parents=True, exist_ok=True)
            if subprocess.run(command).returncode != 0:
                self._fail()

        def compile_(steps: list[tuple[list[str], Path, Path, list[str]]]) -> None:
            list(
                pool.map(
                    lambda step: call([*step[0], *step[3], "-c", str(step[1]), "-o", str(step[2])], step[2]), steps
                )
            )

        headers = set(self.headers.values())
        with ThreadPoolExecutor(jobs) as pool:
            compile_([step for step in self.compiles if step[2] in headers])
            compile_([step for step in self.compiles if step[2] not in headers])
        for objects, result, flags in self.links:
            call([*self.compiler, *map(str, objects), "-o", str(result), *flags], result)


@contextmanager
def locked(folder: Path) -> Iterator[Path]:
    """One process at a time builds in this folder; the others wait, and then find everything built."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield folder


def find_ninja() -> str | None:
    """ninja's path: the package of that name, else the one on the PATH."""
    try:
        import ninja

        return str(Path(ninja.BIN_DIR) / "ninja")
    except ImportError:
        return shutil.which("ninja")


def _value(text: str) -> str:
    return text.replace("$", "$$")


def _path(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def optimization(kernels: Kernels) -> list[str]:
    """How hard the compiler tries.

    FASTOPS_HURRY=1: not at all for tiers that this processor lacks, and of their dtypes with two; little for those that
    it runs in tests only. pool's kernels of avx512 compile in 5.5 s instead of 31, conv's of amx in 5.5 instead of 27
    (Granite Rapids) where they are not run, and with two dtypes in half of that; conv's of avx2 in 30 s instead of 58
    and of the scalar tier in 31 instead of 76 (Zen 5).
    """
    if in_a_hurry():
        if not runs_here(TIERS.get(kernels.source.name, [])):
            return ["-O0", "-DFASTOPS_TWO_DTYPES"]
        better = {"avx2": _AVX512, "avx512_bf16": _AMX}.get(kernels.tier)
        if kernels.tier == "scalar" or (better is not None and runs_here(better)):
            return ["-O1" if kernels.room in RUN_LONGER else "-Og"]
    return OPTIMIZE_SCALAR if kernels.tier == "scalar" else OPTIMIZE


def in_a_hurry() -> bool:
    """Whether the build is for tests alone."""
    return os.environ.get("FASTOPS_HURRY") in ("1", "once")


def add_kernels(build: Build, cuda: Cuda) -> list[Path]:
    """Adds the kernels for the processor and for the GPU; returns their objects: first those of the CPU, in the order
    of kernel_sources. They need nothing of torch."""
    common = common_flags(compiler_version(build.compiler))
    gpu = [] if cuda.why_not else [build.compile_cuda(cuda, source) for source in cuda_sources()]
    cpu = [build.compile_kernels(kernels, [*common, *optimization(kernels)]) for kernels in kernel_sources()]
    return cpu + gpu


def folding(machine: str) -> list[str]:
    """Flags with which the linker keeps functions once that have the same instructions: each room has a copy of its own
    of what it shares with others. Of GNU's linkers gold does that, which Debian has beside the other one."""
    gold = "ld.gold" if machine == platform.machine() else f"{machine}-linux-gnu-ld.gold"
    return ["-fuse-ld=gold", "-Wl,--icf=all"] if shutil.which(gold) else []


def add_runtime(
    build: Build,
    kernels: list[Path],
    library: Path,
    command: Path,
    flags: Sequence[str] = (),
    linking: Sequence[str] = (),
) -> None:
    """Adds what runs models without torch, in two folders, on these kernels: objects, or a library beside it."""
    version = re.search(r'"(.+)"', (ROOT / "fastops" / "_version.py").read_text())[1]
    flags = [*common_flags(compiler_version(build.compiler)), *OPTIMIZE_SCALAR, *KERNEL_FLAGS, *flags, "-pthread"]
    of_command, of_library = [], []
    for source in sorted(RUNTIME.glob("*.cpp")):
        object_ = build.compile(source, [*flags, f'-DFASTOPS_VERSION="{version}"'])
        if source.name in ("main.cpp", "npy.cpp", "graph.cpp"):
            of_command.append(object_)
        if source.name not in ("main.cpp", "npy.cpp"):
            of_library.append(object_)
    beside = ["-Wl,-rpath,$ORIGIN", "-Wl,-rpath,$ORIGIN/../lib", "-Wl,--gc-sections", "-s", "-pthread"]
    exports = ["-shared", f"-Wl,-soname,{RUN_LIBRARY}", f"-Wl,--version-script={RUNTIME / 'exports.map'}"]
    build.link([*of_library, *kernels], library / RUN_LIBRARY, [*exports, *beside, *linking])
    build.link([*of_command, library / RUN_LIBRARY], command / RUN_COMMAND, beside)


def run_flags() -> list[str]:
    """What makes of the kernels, and of what runs models, those of the library that only runs models."""
    inference = ["-include", str(KERNELS / "common" / "inference.h"), "-DFASTOPS_INFERENCE", "-DFASTOPS_TWO_DTYPES"]
    return [*inference, "-ffunction-sections", "-fdata-sections"]


def tier_unit(tier: Kernels) -> str:
    """The rooms of a tier that the run time has, and the tier's table, as one source: what rooms share is compiled
    once. Calls of other rooms get the next tier's kernels."""
    everything = [room for room in rooms() if room not in TRAINING_ROOMS]
    own = RUN_ROOMS.get(tier.tier, everything)
    include = f'#include "{tier.source}"\n'
    handed_down = " ".join(f"FASTOPS_CALLS_{room}(X)" for room in everything if room not in own)
    text = "".join(f"#define FASTOPS_ROOM {room}\n{include}#undef FASTOPS_ROOM\n" for room in own)
    return text + (f"#define FASTOPS_HANDED_DOWN(X) {handed_down}\n" if handed_down else "") + include


def build_runtime(
    prefix: Path, machine: str = platform.machine(), tiers: Sequence[str] = (), optimize: Sequence[str] = ()
) -> None:
    """Installs what runs models without torch, and nothing else: a library of a few megabytes, its header, a command.

    Its kernels are those of inference, in float32 and bfloat16. machine: "aarch64" is compiled for by Debian's
    g++-aarch64-linux-gnu on another one. tiers: those that it has, besides scalar and what they hand calls to; none
    means all.
    """
    known = [Kernels(KERNELS / name).tier for name in TIERS_OF.get(machine, ["isa_scalar.cpp"])]
    if unknown := set(tiers) - set(known):
        raise SystemExit(f"fastops: TIERS must name some of {', '.join(known)}, got {', '.join(sorted(unknown))}")
    with_tiers = {"", "scalar", *(tiers or known), *(lower for tier in tiers for lower in LOWER_TIERS.get(tier, ()))}
    cross = [] if machine == platform.machine() else [f"{machine}-linux-gnu-g++"]
    few = run_flags()
    bits = sum(1 << ISAS.index(tier) for tier in with_tiers if tier)

    def which(kernels: Kernels) -> list[str]:
        return [f"-DFASTOPS_TIERS={bits}"] if kernels.source.name == "dispatch.cpp" else []

    with locked(ROOT / "build" / f"run-{machine}{''.join(optimize)}") as folder:
        build = Build(folder, cross or compiler())
        common = [*common_flags(compiler_version(build.compiler)), *few]
        objects = []
        for kernels in kernel_sources(machine):
            flags = [*common, *(optimize or optimization(kernels)), *which(kernels)]
            if not kernels.tier:
                objects.append(build.compile_kernels(kernels, flags))
            elif not kernels.room and kernels.tier in with_tiers:  # a tier as a whole
                flags += [*kernels.flags, *NO_UNWINDING]
                objects.append(build.compile_text(Path(kernels.source.name), tier_unit(kernels), flags))
        add_runtime(build, objects, prefix / "lib", prefix / "bin", [*few, *optimize], folding(machine))
        for name in ("lib", "bin", "include"):
            (prefix / name).mkdir(parents=True, exist_ok=True)
        build.run()
    shutil.copy2(RUNTIME / "fastops_run.h", prefix / "include")


def build_kernels() -> None:
    """What build_extension compiles that needs no torch; it then finds it done."""
    with locked(EXTENSION):
        build = Build(EXTENSION)
        add_kernels(build, find_cuda())
        build.run()


def torch_units() -> list[list[Path]]:
    """The files of the torch layer as they are compiled, some alone and some together, slowest first.

    FASTOPS_HURRY=once: a few units, of which a change of one file compiles all of its unit again.
    """
    units: list[list[Path]] = []
    together: list[Path] = []
    once = os.environ.get("FASTOPS_HURRY") == "once"
    for source in sorted(TORCH_LAYER.glob("*.cpp")):
        if source.stat().st_size >= SMALL_FILE and not once:
            units.append([source])
        elif sum(path.stat().st_size for path in [*together, source]) <= (TOGETHER_ONCE if once else TOGETHER):
            together.append(source)
        else:
            units.append(together)
            together = [source]
    units.append(together)
    return sorted((unit for unit in units if unit), key=lambda unit: -sum(path.stat().st_size for path in unit))


def build_extension(
    result: Path, torch: Path, torch_tag: str, python_include: str, version: str, torch_version: str
) -> None:
    """Compiles the kernels and the torch layer and links them into `result`, the module fastops._C, and LIBRARIES.

    torch: the package's folder, with include/ and lib/. torch_tag: a name for it and the Python that it is for. Nothing
    is linked to an OpenMP of its own: the symbols resolve to the libgomp that torch brings, of which there must be only
    one in a process.

    OP_LIBRARY has the objects of the extension without what only Python reaches: it exports nothing, so all that stays
    is what the registration of the ops leads to, and that needs no symbol of Python's.
    """
    cxx = compiler()
    cxx_version = compiler_version(cxx)
    build = Build(EXTENSION, cxx)
    # batch_norm.cpp compiles in 16 s instead of 12 with -O3 (Emerald Rapids), for what calls kernels.
    common = [*common_flags(cxx_version), *(["-O1"] if in_a_hurry() else OPTIMIZE)]
    include = [torch / "include", torch / "include" / "torch" / "csrc" / "api" / "include", Path(python_include)]
    torch_layer = [
        *common,
        "-ffunction-sections",
        "-fdata-sections",
        "-fopenmp",
        f"-I{ROOT / 'csrc'}",
        *(f"-isystem{folder}" for folder in include),
        "-DTORCH_EXTENSION_NAME=_C",
        "-DTORCH_API_INCLUDE_EXTENSION_H",
    ]
    cuda = find_cuda()
    print(f"fastops: CUDA kernels {cuda}", flush=True)
    described = {
        "FASTOPS_VERSION": version,
        "FASTOPS_TORCH_VERSION": torch_version,
        "FASTOPS_COMPILER": cxx_version,
        "FASTOPS_FLAGS": " ".join(
            [*common_flags(cxx_version), *OPTIMIZE, *KERNEL_FLAGS, *(["FASTOPS_HURRY=1"] if in_a_hurry() else [])]
        ),
        "FASTOPS_CUDA_BUILD": str(cuda),
    }
    with_cuda = [] if cuda.why_not else ["-DFASTOPS_WITH_CUDA"]
    kernels, ops = (result.parent / name for name in LIBRARIES)
    # The CUDA runtime's symbols stay inside: torch may bring another one.
    runtime = [] if cuda.why_not else [*cuda.library_flags, "-Wl,--exclude-libs,libcudart_static.a"]
    build.link(add_kernels(build, cuda), kernels, ["-shared", f"-Wl,-soname,{kernels.name}", *runtime])
    add_runtime(build, [kernels], result.parent, result.parent)
    # linear.cpp compiles in 9.5 s with torch's headers read ahead, and in 15.8 without (Zen 5).
    precompiled = build.precompile(TORCH_LAYER / "precompiled.h", torch_layer, into=torch_tag)
    objects = []
    for sources in torch_units():
        names = {source.name for source in sources}
        macros = [f'-D{name}="{value}"' for name, value in described.items()] if "info.cpp" in names else []
        if "gpu.cpp" in names:
            macros += with_cuda
        objects.append(build.compile_together(precompiled, sources, [*torch_layer, *macros], into=torch_tag))
    libraries = [f"-L{torch / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10", "-Wl,-rpath,$ORIGIN"]
    build.link([*objects, kernels], result, ["-shared", "-ltorch_python", *libraries])
    nothing = TORCH_LAYER / "exports_nothing.map"
    build.link(
        [*objects, kernels], ops, ["-shared", "-Wl,--gc-sections", f"-Wl,--version-script={nothing}", *libraries]
    )
    build.describe(ROOT / "compile_commands.json")
    with locked(EXTENSION):
        build.run()


def build_library(prefix: Path) -> None:
    """Installs the CPU kernels for C++ programs: a static library, its headers, a CMake package."""
    with locked(EXTENSION):
        build = Build(EXTENSION)
        objects = add_kernels(build, Cuda(why_not="not in the library"))
        (prefix / "lib" / "cmake" / "fastops").mkdir(parents=True, exist_ok=True)
        build.run()
    archive = prefix / "lib" / "libfastops.a"
    archive.unlink(missing_ok=True)
    subprocess.run(["ar", "rcs", str(archive), *map(str, objects)], check=True)
    shutil.copy2(KERNELS / "fastops-config.cmake", prefix / "lib" / "cmake" / "fastops")
    headers = [path for path in KERNELS.rglob("*.h") if path.parent.name not in ("cpu", "cuda")]
    headers += [KERNELS / "common" / "cpu" / name for name in ("isa.h", "kernel_table.h")]
    for header in headers:
        target = prefix / "include" / "fastops" / header.relative_to(KERNELS)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(header, target)


def emulator_flags() -> list[str]:
    """For a .cu file, or what runs it, on the CPU (tests/emulator)."""
    flags = [*common_flags(compiler_version(compiler())), "-O2", *KERNEL_FLAGS, "-Wno-unknown-pragmas"]
    # Vectors of 16 bytes are read through pointers to their elements, as nvcc allows.
    flags += ["-fno-strict-aliasing", f"-I{EMULATOR}"]
    # The same results without these, many times slower.
    processor = Path("/proc/cpuinfo").read_text().split()
    flags += [f"-m{name}" for name in ("fma", "f16c") if name in processor]
    return flags


def build_emulator(folder: Path, result: Path, torch: Path, python_include: str) -> None:
    """Compiles the CUDA kernels for the emulator and its torch device into `result`, the module _emulator."""
    build = Build(folder)
    flags = emulator_flags()
    include = [torch / "include", torch / "include" / "torch" / "csrc" / "api" / "include", Path(python_include)]
    objects = [build.compile(source, ["-x", "c++", *flags]) for source in cuda_sources()]
    objects.append(build.compile(SAVED, flags))
    for source in sorted(EMULATOR.glob("*.cpp")):
        uses_torch = source.name == "device.cpp"
        objects.append(build.compile(source, [*flags, *(f"-isystem{path}" for path in include if uses_torch)]))
    libraries = [f"-L{torch / 'lib'}", "-ltorch", "-ltorch_cpu", "-ltorch_python", "-lc10"]
    build.link(objects, result, ["-shared", *libraries])
    build.run()


def build_emulator_checks(folder: Path, kernels: Path) -> list[Path]:
    """Compiles tests/emulator/checks with these kernels, mutants among them, and the emulator; returns the programs."""
    build = Build(folder)
    flags = [*emulator_flags(), "-O1"]
    emulator = [build.compile(EMULATOR / name, flags) for name in ("simt.cpp", "cuda_runtime.cpp")]
    emulator.append(build.compile(SAVED, flags))
    programs = []
    for source in sorted((EMULATOR / "checks").glob("*.cpp")):
        check = build.compile(source, [*flags, f"-I{kernels}", "-include", str(EMULATOR / "checks" / "mutant.h")])
        programs.append(folder / source.stem)
        build.link([check, *emulator], programs[-1], [])
    build.run()
    return programs


class Usage(NamedTuple):
    """What a kernel takes of a multiprocessor, as ptxas -v says."""

    architecture: str
    kernel: str
    registers: int
    stack: int  # bytes a thread, as the two that follow
    spill_stores: int
    spill_loads: int


_USAGE = re.compile(
    r"Compiling entry function '(\S+)' for '(\S+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
    r"(\d+) bytes spill loads.*?Used (\d+) registers",
    re.DOTALL,
)


def cuda_usage(cuda: Cuda, sources: list[Path]) -> list[Usage]:
    """Compiles the sources for every architecture of `cuda`, and reads what ptxas says about each kernel."""
    rows = []
    for source, architecture in itertools.product(sources, cuda.architectures):
        # The GPU's code alone: a fifth of the processor is what nvcc does for the host.
        name = architecture.removesuffix("+PTX").replace(".", "")
        code = f"-gencode=arch=compute_{name},code=sm_{name}"
        command = [cuda.nvcc, *NVCC_FLAGS, code, "-Xptxas=-v", "-cubin", str(source), "-o", os.devnull]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode != 0:
            raise SystemExit(f"fastops: {source.name} does not compile:\n{result.stdout}{result.stderr}")
        for name, architecture, stack, stores, loads, registers in _USAGE.findall(result.stdout + result.stderr):
            rows.append(Usage(architecture, name, int(registers), int(stack), int(stores), int(loads)))
    if shutil.which("c++filt"):
        names = "\n".join(row.kernel for row in rows)
        plain = subprocess.run(["c++filt"], input=names, capture_output=True, text=True, check=True).stdout
        plain = re.sub(r"fastops::cuda::\(anonymous namespace\)::|fastops::|void ", "", plain)
        plain = re.sub(r"\((?:\w+)\)(\d)", r"\1", plain)  # (Loads)2, (bool)1
        rows = [row._replace(kernel=name.partition("(")[0]) for row, name in zip(rows, plain.splitlines(), strict=True)]
    return rows


def print_cuda_usage() -> int:
    """The table of cuda_usage over all kernels; 1 where a matrix product or a fused network spills."""
    cuda = find_nvcc()
    if cuda.why_not:
        raise SystemExit(f"fastops: CUDA kernels {cuda}")
    rows = cuda_usage(cuda, cuda_sources())
    print(f"{'':8} {'registers':>9} {'stack':>6} {'spilled':>8}  kernel")
    for row in sorted(rows):
        print(
            f"{row.architecture:8} {row.registers:9} {row.stack:6} {row.spill_stores + row.spill_loads:8}  {row.kernel}"
        )
    spilling = [row for row in rows if row.spill_stores or row.spill_loads]
    print(f"{len(rows)} kernels, {len(spilling)} of them spill registers")
    kernels = ("gemm_kernel", "conv_kernel", "mlp_")
    return 1 if any(row.kernel.startswith(kernels) for row in spilling) else 0


class Program(NamedTuple):
    """A test in C++, and what it is run with."""

    path: Path
    arguments: list[str]
    runner: Sequence[str] = ()  # what runs programs of another kind of processor


def build_cpp_tests(folder: Path, sources: list[Path], sanitized: Collection[str] = ()) -> list[Program]:
    """Links each source with the kernels.

    The kernels are those of the extension, which are compiled already where that was built, but for the sanitized tiers
    ("" for code of none). A source's own code is not sanitized, unless it has kernels in it: what kernels are compared
    with would take the sanitizers longer than they do. If the sanitized tiers are SANITIZED, a source that runs every
    tier is two programs: one with kernels of SANITIZED_DTYPES under the sanitizers, and one with the extension's for
    the scalar tier's other dtypes and for the other tiers.
    """
    with locked(EXTENSION):
        ordinary = Build(EXTENSION)
        objects = dict(zip(kernel_sources(), add_kernels(ordinary, Cuda(why_not="not in the tests")), strict=True))
        ordinary.run()
    build = Build(folder)
    common = common_flags(compiler_version(build.compiler))
    few = sanitized == SANITIZED
    vectors = [kernels.tier for kernels in objects if kernels.tier not in SANITIZED and not kernels.room]
    vectors = [tier for tier in vectors if runs_here(TIERS[f"isa_{tier}.cpp"])]
    watched = dict(objects)
    for kernels in objects:
        if kernels.tier in sanitized:
            flags = [*common, *SANITIZE, *(SANITIZE_WIDE if kernels.tier not in SANITIZED else [])]
            if kernels.room not in RUN_LONGER:
                flags.append("-Og")
            if few and kernels.room not in ALL_DTYPES_SANITIZED:
                flags.append("-DFASTOPS_TWO_DTYPES")
            watched[kernels] = build.compile_kernels(kernels, flags)
    sanitize = SANITIZE if sanitized else []
    quick = ["quick"] if sanitized else []  # those with thousands of random shapes try fewer of them
    programs = []
    for source in sources:
        text = source.read_text()
        flags = sanitize if "bodies_prelude.h" in text else []
        if flags and not any(f"/{room}/cpu/" in text for room in RUN_LONGER):
            flags = [*flags, "-Og"]
        test = build.compile(
            source, [*common, *(flags or ["-O1"]), "-ffp-contract=off", "-pthread", f"-I{ROOT / 'csrc'}"]
        )
        program = Program(folder / source.stem, quick)
        build.link([test, *watched.values()], program.path, [*sanitize, "-pthread"])
        if few and "run_tiers(" in text:
            dtypes = [] if source.stem.removeprefix("test_") in ALL_DTYPES_SANITIZED else SANITIZED_DTYPES
            programs.append(Program(program.path, [*quick, "scalar", *dtypes]))
            as_built = folder / f"{source.stem}_as_built"
            build.link([test, *objects.values()], as_built, ["-pthread"])
            if dtypes:
                programs.append(
                    Program(as_built, [*quick, "scalar", *(dtype for dtype in DTYPES if dtype not in dtypes)])
                )
            if vectors:
                programs.append(Program(as_built, [*quick, *vectors]))
        else:
            programs.append(program)
    build.run()
    return programs


def build_arm_tests(folder: Path, sources: list[Path]) -> list[Program]:
    """The same for 64-bit Arm, on another processor: the neon tier's kernels, and few of the scalar tier's."""
    build = Build(folder, [ARM_COMPILER])
    common = common_flags(compiler_version(build.compiler))
    objects = []
    for kernels in kernel_sources("aarch64"):
        flags = ["-O0", "-DFASTOPS_TWO_DTYPES"] if kernels.tier == "scalar" else ["-O1"]
        objects.append(build.compile_kernels(kernels, [*common, *flags]))
    programs = []
    for source in sources:
        flags = [*common, "-O1", *KERNEL_FLAGS, "-pthread", f"-I{ROOT / 'csrc'}", "-DFASTOPS_VEC_NEON"]
        program = Program(folder / source.stem, ["quick", "neon"], ARM_RUNNER)
        build.link([build.compile(source, flags), *objects], program.path, ["-pthread"])
        programs.append(program)
    build.run()
    return programs


def run_programs(programs: list[Program], arguments: list[str]) -> int:
    """How many failed. They run side by side, one a core; each line is printed as it comes, with its program's name."""

    def run(program: Program) -> bool:
        name = program.path.name
        with subprocess.Popen(
            [*program.runner, str(program.path), *program.arguments, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as process:
            for line in process.stdout:
                print(f"{name}: {line}", end="", flush=True)
        if process.returncode != 0:
            print(f"{name} failed with status {process.returncode}", flush=True)
        return process.returncode != 0

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return sum(pool.map(run, programs))


def main(arguments: list[str]) -> int:
    tests = ROOT / "tests" / "cpp"
    if arguments in (["sanitize"], ["sanitize", "all"]):
        slow = ["test_conv", "test_pool", "test_plans", "test_winograd", "test_linear"]
        sources = sorted(tests.glob("test_*.cpp"), key=lambda path: (path.stem not in slow, path.stem))
        here = {kernels.tier for kernels in kernel_sources() if runs_here(TIERS.get(kernels.source.name, []))}
        programs = build_cpp_tests(ROOT / "build" / "sanitize", sources, here if arguments[1:] else SANITIZED)
        arguments = []
    elif arguments[:1] == ["arm"]:
        sources = [tests / f"{name}.cpp" for name in arguments[1:]] or sorted(tests.glob("test_*.cpp"))
        programs = build_arm_tests(ROOT / "build" / "arm", sources)
        arguments = []
    elif arguments == ["cuda-usage"]:
        return print_cuda_usage()
    elif len(arguments) == 2 and arguments[0] == "library":
        build_library(Path(arguments[1]).resolve())
        return 0
    elif len(arguments) >= 2 and arguments[0] == "runtime":
        build_runtime(Path(arguments[1]).resolve(), *arguments[2:3], tiers=arguments[3:])
        return 0
    elif arguments == ["kernels"]:
        build_kernels()
        return 0
    elif arguments[:1] == ["ulp"]:
        programs = build_cpp_tests(ROOT / "build" / "ulp", [tests / "ulp.cpp"])
    else:
        print(__doc__, file=sys.stderr)
        return 2
    return 1 if run_programs(programs, arguments[1:]) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
