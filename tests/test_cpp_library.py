"""The C++ library: examples/cpp, built against what `make library` installs, and each op's kernels compiled alone."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

import build_native

ROOT = Path(__file__).resolve().parent.parent
ROOMS = build_native.rooms()


@pytest.mark.skipif(shutil.which("cmake") is None, reason="there is no cmake")
def test_example_builds_and_runs(tmp_path):
    """find_package finds the library; headers and library need nothing of torch or of this checkout."""
    prefix = tmp_path / "prefix"
    build_native.build_library(prefix)
    example = shutil.copytree(ROOT / "examples" / "cpp", tmp_path / "example")
    build = tmp_path / "build"
    environment = {name: value for name, value in os.environ.items() if name not in ("CXX", "CXXFLAGS")}
    for command in (
        [
            "cmake",
            "-S",
            example,
            "-B",
            build,
            f"-DCMAKE_PREFIX_PATH={prefix}",
            "-DCMAKE_CXX_FLAGS=-Wall -Wextra -Werror",
        ],
        ["cmake", "--build", build],
    ):
        result = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert result.returncode == 0, result.stdout + result.stderr
    result = subprocess.run([build / "example"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "WRONG" not in result.stdout
    assert len(result.stdout.splitlines()) == 5
    headers = "".join(path.read_text() for path in (prefix / "include").rglob("*.h"))
    assert "#include <torch" not in headers
    assert "#include <ATen" not in headers


@pytest.mark.parametrize("body", [*(f"{room}/cpu/{room}.inl" for room in ROOMS), "gemm/cpu/gemm.inl"])
def test_kernels_of_an_op_compile_alone(body, tmp_path):
    """Its bodies include what they use; beside the contract, which the tier includes outside its namespace."""
    room = body.partition("/")[0]
    contract = "linear" if room == "gemm" else room
    source = tmp_path / "alone.cpp"
    source.write_text(
        "#define FASTOPS_VEC_AVX512\n"
        f'#include "{build_native.KERNELS}/common/cpu/bodies_prelude.h"\n'
        f'#include "{build_native.KERNELS}/{contract}/{contract}.h"\n'
        "namespace fastops { namespace alone {\n"
        "template <class Call> void fill_plan(Plan<Call>&);\n"
        "namespace {\n"
        f'#include "{build_native.KERNELS}/{body}"\n'
        "} } }\n"
    )
    flags = build_native.TIERS["isa_avx512.cpp"]
    command = [*build_native.compiler(), "-std=c++20", "-fsyntax-only", *flags, str(source)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_every_op_has_a_room():
    assert set(ROOMS) >= {"activation", "conv", "conv_pool", "linear", "mlp", "pool"}
