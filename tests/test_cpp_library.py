"""What C++ programs load: examples/cpp, built against what `make library` installs; examples/aotinductor, which runs a
frozen model on the ops' library; and each op's kernels compiled alone.
"""

import os
import re
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from each import each

import build_native
import fastops

ROOT = Path(__file__).resolve().parent.parent
ROOMS = build_native.rooms()


needs_cmake = pytest.mark.skipif(shutil.which("cmake") is None, reason="there is no cmake")


def build_example(name, prefix, tmp_path, flags):
    """Builds a copy of examples/<name> in tmp_path/build."""
    example = shutil.copytree(ROOT / "examples" / name, tmp_path / "example")
    build = tmp_path / "build"
    environment = {name: value for name, value in os.environ.items() if name not in ("CXX", "CXXFLAGS")}
    for command in (
        ["cmake", "-S", example, "-B", build, f"-DCMAKE_PREFIX_PATH={prefix}", f"-DCMAKE_CXX_FLAGS={flags}"],
        ["cmake", "--build", build],
    ):
        result = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert result.returncode == 0, result.stdout + result.stderr
    return build


@needs_cmake
def test_example_builds_and_runs(tmp_path):
    """find_package finds the library; headers and library need nothing of torch or of this checkout."""
    prefix = tmp_path / "prefix"
    build_native.build_library(prefix)
    build = build_example("cpp", prefix, tmp_path, "-Wall -Wextra -Werror")
    result = subprocess.run([build / "example"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "WRONG" not in result.stdout
    assert len(result.stdout.splitlines()) == 5
    headers = "".join(path.read_text() for path in (prefix / "include").rglob("*.h"))
    assert "#include <torch" not in headers
    assert "#include <ATen" not in headers


@needs_cmake
@pytest.mark.filterwarnings("ignore")
def test_frozen_model_runs_without_python(tmp_path):
    """examples/aotinductor: freeze, torch.export and AOTInductor, and a C++ program with the same outputs."""
    example = runpy.run_path(str(ROOT / "examples" / "aotinductor" / "export.py"))
    model, x = example["make_model"](), torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16)
    package = tmp_path / "model.pt2"
    from torch._inductor import config

    # torch's headers would be read ahead, for other models: 18 s of the processor (Zen 1).
    with config.patch({"aot_inductor.precompile_headers": False}):
        example["export"](model, (x,), package)
    build = build_example("aotinductor", torch.utils.cmake_prefix_path, tmp_path, "-O0")
    # Nothing but the two libraries of fastops, where no package is.
    libraries = [shutil.copy(Path(fastops.op_library()).with_name(name), tmp_path) for name in build_native.LIBRARIES]
    result = subprocess.run([build / "example", libraries[1], package], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    with torch.no_grad():
        expected = model(x)
    outputs = torch.tensor([float(number) for number in result.stdout.split()]).view(expected.shape)
    torch.testing.assert_close(outputs, expected, rtol=0, atol=2e-4)  # four digits are printed
    # Without the ops the package says what it lacks: it does run fastops' kernels.
    result = subprocess.run([build / "example", "libc.so.6", package], capture_output=True, text=True)
    assert result.returncode != 0
    assert "fastops::" in result.stderr


def test_the_ops_need_no_python():
    library = Path(fastops.op_library())
    needed = subprocess.run(
        ["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True
    ).stdout
    assert not re.findall(r" U (_?Py\w*|\w*THPVariable\w*)", needed)
    assert "fastops" in needed  # the kernels'
    linked = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
    assert "libfastops_kernels.so" in linked
    assert "python" not in linked


@pytest.fixture(scope="module")
def compile_alone(tmp_path_factory):
    """Compiles a text behind the prelude of all bodies, which is read ahead: intrinsics take two thirds of a second."""
    folder = tmp_path_factory.mktemp("alone")
    flags = ["-std=c++20", *build_native.TIERS["isa_avx512.cpp"]]
    prelude, source = folder / "prelude.h", folder / "alone.cpp"
    prelude.write_text(f'#define FASTOPS_VEC_AVX512\n#include "{build_native.KERNELS}/common/cpu/bodies_prelude.h"\n')
    ahead = ["-x", "c++-header", str(prelude), "-o", f"{prelude}.gch"]
    subprocess.run([*build_native.compiler(), *flags, *ahead], check=True)

    def compile_alone(text):
        source.write_text(f'#include "{prelude}"\n{text}')
        command = [*build_native.compiler(), *flags, "-fsyntax-only", str(source)]
        return subprocess.run(command, capture_output=True, text=True)

    return compile_alone


@each("body", [*(f"{room}/cpu/{room}.inl" for room in ROOMS), "gemm/cpu/gemm.inl"])
def test_kernels_of_an_op_compile_alone(compile_alone, body):
    """Its bodies include what they use; beside the contract, which the tier includes outside its namespace."""
    room = body.partition("/")[0]
    contract = "linear" if room == "gemm" else room
    result = compile_alone(
        f'#include "{build_native.KERNELS}/{contract}/{contract}.h"\n'
        "namespace fastops { namespace alone {\n"
        "template <class Call> void fill_plan(Plan<Call>&);\n"
        "namespace {\n"
        f'#include "{build_native.KERNELS}/{body}"\n'
        "} } }\n"
    )
    assert result.returncode == 0, result.stderr


def test_every_op_has_a_room():
    assert set(ROOMS) >= {"activation", "conv", "conv_pool", "linear", "mlp", "pool"}
