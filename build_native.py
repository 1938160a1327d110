"""What is compiled, and with which flags: the one place that knows.

setup.py builds the extension with it; `make sanitize` and `make ulp` build the C++ tests:

    python build_native.py sanitize    # every tests/cpp/test_*.cpp with the kernels, under ASan and UBSan, built and
    run python build_native.py ulp [...]   # tests/cpp/ulp.cpp with the kernels, built and run with the arguments that
    follow
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent
KERNELS = ROOT / "csrc" / "kernels" / "cpu"
TORCH_LAYER = ROOT / "csrc" / "torch"

COMMON = ["-std=c++20", "-Wall", "-Wextra", "-fPIC", "-fvisibility=hidden"]
OPTIMIZE = ["-O3"]
SANITIZE = ["-O1", "-g1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]

# One source a tier: its flags, and nothing but its own code (isa.h and dispatch.cpp decide what runs). A product and a
# sum are contracted to one rounding only where the source says fma, so that every path through a kernel rounds alike.
_AVX2 = ["-mavx2", "-mfma", "-mf16c"]
_AVX512 = [*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
_AVX512_BF16 = [*_AVX512, "-mavx512bf16", "-mavx512vnni"]
_AMX = [*_AVX512_BF16, "-mamx-tile", "-mamx-bf16"]
TIERS = {
    "isa_scalar.cpp": [],
    "isa_avx2.cpp": _AVX2,
    "isa_avx512.cpp": _AVX512,
    "isa_avx512_bf16.cpp": _AVX512_BF16,
    "isa_amx.cpp": _AMX,
}
KERNEL_FLAGS = ["-ffp-contract=off"]


def compiler() -> list[str]:
    """The C++ compiler's command: $CXX, else g++."""
    return shlex.split(os.environ.get("CXX", "g++"))


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


def kernel_sources() -> list[Path]:
    """The kernels for this kind of processor, slowest to compile first."""
    x86 = platform.machine() in ("x86_64", "AMD64")
    tiers = [KERNELS / name for name in TIERS if x86 or name == "isa_scalar.cpp"]
    return tiers + sorted(path for path in KERNELS.glob("*.cpp") if path.name not in TIERS)


def kernel_flags(source: Path) -> list[str]:
    return [*KERNEL_FLAGS, *TIERS.get(source.name, [])]


@dataclass
class Build:
    """Compile and link steps under `folder`, run by ninja where there is one: only what changed, MAX_JOBS at a time.

    Without ninja every step is run, in the same order.
    """

    folder: Path
    compiler: list[str] = field(default_factory=compiler)
    compiles: list[tuple[Path, Path, list[str]]] = field(default_factory=list)
    links: list[tuple[list[Path], Path, list[str]]] = field(default_factory=list)

    def compile(self, source: Path, flags: list[str]) -> Path:
        """Adds source -> object; returns the object's path."""
        result = self.folder / source.relative_to(ROOT).with_suffix(".o")
        self.compiles.append((source, result, [*flags, *shlex.split(os.environ.get("CXXFLAGS", ""))]))
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
            raise SystemExit("fastops: the build failed; the compiler's message is above.")

    def _ninja_file(self) -> str:
        cxx = shlex.join(self.compiler)
        lines = [
            "ninja_required_version = 1.5",
            "rule compile",
            f"  command = {_value(cxx)} $flags -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = compile $name",
            "rule link",
            f"  command = {_value(cxx)} $in -o $out $flags",
            "  description = link $name",
        ]
        for source, result, flags in self.compiles:
            lines += [f"build {_path(result)}: compile {_path(source)}"]
            lines += [f"  flags = {_value(shlex.join(flags))}", f"  name = {source.relative_to(ROOT)}"]
        for objects, result, flags in self.links:
            inputs = " ".join(map(_path, objects))
            lines += [f"build {_path(result)}: link {inputs}"]
            lines += [f"  flags = {_value(shlex.join(flags))}", f"  name = {result.name}"]
        return "\n".join(lines) + "\n"

    def _run_all(self, jobs: int) -> None:
        def call(command: list[str], result: Path) -> None:
            result.parent.mkdir(parents=True, exist_ok=True)
            if subprocess.run(command).returncode != 0:
                raise SystemExit("fastops: the build failed; the compiler's message is above.")

        with ThreadPoolExecutor(jobs) as pool:
            list(
                pool.map(
                    lambda step: call([*self.compiler, *step[2], "-c", str(step[0]), "-o", str(step[1])], step[1]),
                    self.compiles,
                )
            )
        for objects, result, flags in self.links:
            call([*self.compiler, *map(str, objects), "-o", str(result), *flags], result)


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


def build_extension(
    folder: Path, result: Path, torch: Path, python_include: str, version: str, torch_version: str
) -> None:
    """Compiles the kernels and the torch layer and links them into `result`, the module fastops._C.

    torch: the package's folder, with include/ and lib/. Nothing is linked to an OpenMP of its own: the symbols resolve
    to the libgomp that torch brings, of which there must be only one in a process.
    """
    cxx = compiler()
    cxx_version = compiler_version(cxx)
    build = Build(folder, cxx)
    common = [*common_flags(cxx_version), *OPTIMIZE]
    include = [torch / "include", torch / "include" / "torch" / "csrc" / "api" / "include", Path(python_include)]
    torch_layer = [
        *common,
        "-fopenmp",
        f"-I{ROOT / 'csrc'}",
        *(f"-isystem{folder}" for folder in include),
        "-DTORCH_EXTENSION_NAME=_C",
        "-DTORCH_API_INCLUDE_EXTENSION_H",
    ]
    described = {
        "FASTOPS_VERSION": version,
        "FASTOPS_TORCH_VERSION": torch_version,
        "FASTOPS_COMPILER": cxx_version,
        "FASTOPS_FLAGS": " ".join([*common, *KERNEL_FLAGS]),
    }
    objects = [build.compile(source, [*common, *kernel_flags(source)]) for source in kernel_sources()]
    for source in sorted(TORCH_LAYER.glob("*.cpp")):
        macros = [f'-D{name}="{value}"' for name, value in described.items()] if source.name == "library.cpp" else []
        objects.append(build.compile(source, [*torch_layer, *macros]))
    libraries = [f"-L{torch / 'lib'}", "-ltorch", "-ltorch_cpu", "-ltorch_python", "-lc10"]
    build.link(objects, result, ["-shared", *libraries])
    build.run()


def build_cpp_tests(folder: Path, sources: list[Path], extra: list[str]) -> list[Path]:
    """Compiles the kernels once and links each source with them; returns the programs."""
    cxx = compiler()
    build = Build(folder, cxx)
    common = [*common_flags(compiler_version(cxx)), *extra]
    kernels = [build.compile(source, [*common, *kernel_flags(source)]) for source in kernel_sources()]
    programs = []
    for source in sources:
        test = build.compile(source, [*common, "-ffp-contract=off", "-pthread", f"-I{ROOT / 'csrc'}"])
        programs.append(folder / source.stem)
        build.link([test, *kernels], programs[-1], [*extra, "-pthread"])
    build.run()
    return programs


def main(arguments: list[str]) -> int:
    tests = ROOT / "tests" / "cpp"
    if arguments == ["sanitize"]:
        sources = sorted(tests.glob("test_*.cpp"))
        programs = build_cpp_tests(ROOT / "build" / "sanitize", sources, SANITIZE)
        arguments = ["sanitize", "quick"]  # those with thousands of random shapes try fewer of them
    elif arguments[:1] == ["ulp"]:
        programs = build_cpp_tests(ROOT / "build" / "ulp", [tests / "ulp.cpp"], OPTIMIZE)
    else:
        print(__doc__, file=sys.stderr)
        return 2
    failed = 0
    for program in programs:
        print(program.relative_to(ROOT), flush=True)
        status = subprocess.run([str(program), *arguments[1:]]).returncode
        if status != 0:
            print(f"{program.name} failed with status {status}", file=sys.stderr)
            failed += 1
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
