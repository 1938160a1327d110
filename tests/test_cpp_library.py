"""The C++ library: examples/cpp, built against what `make library` installs, and each op's kernels compiled alone."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

import build_native

ROOT = Path(__file__).resolve().parent.parent
ROOMS = sorted(
    path.parent.parent.name for path in build_native.KERNELS.glob("*/cpu/*.inl") if path.stem == path.parts[-3]
)


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


@pytest.mark.parametrize("room", ROOMS)
def test_kernels_of_an_op_compile_alone(room, tmp_path):
    """Its bodies include what they use."""
    source = tmp_path / "alone.cpp"
    source.write_text(
        "#define FASTOPS_VEC_AVX512\n"
        f'#include "{build_native.KERNELS}/common/cpu/bodies_prelude.h"\n'
        "namespace fastops { namespace alone { namespace {\n"
        f'#include "{build_native.KERNELS}/{room}/cpu/{room}.inl"\n'
        "} } }\n"
    )
    flags = build_native.TIERS["isa_avx512.cpp"]
    command = [*build_native.compiler(), "-std=c++20", "-fsyntax-only", *flags, str(source)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_every_op_has_a_room():
    assert set(ROOMS) >= {"activation", "conv", "conv_pool", "gemm", "linear", "pool"}
