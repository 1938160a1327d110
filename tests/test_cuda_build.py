"""How the CUDA kernels are built, and what info() says about them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import build_native
import fastops
from fastops import _C

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch):
    for name in ("FASTOPS_CUDA", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)


def _nvcc() -> build_native.Cuda:
    cuda = build_native.find_cuda()
    if cuda.why_not:
        pytest.skip(cuda.why_not)
    return cuda


def test_info_says_what_was_compiled_in_and_what_was_found():
    info = fastops.info()
    compiled = _C.build_info()["cuda"]
    assert compiled.startswith(("compiled by nvcc ", "not compiled in: "))
    assert info.cuda_reason.startswith(compiled)
    assert info.cuda == _C.cuda_found()[0]
    if compiled.startswith("compiled") and not info.cuda:
        assert len(info.cuda_reason) > len(compiled) + 2  # what is missing


def test_cuda_can_be_turned_off(monkeypatch):
    monkeypatch.setenv("FASTOPS_CUDA", "0")
    assert str(build_native.find_cuda()) == "not compiled in: FASTOPS_CUDA=0"


def test_without_nvcc(monkeypatch):
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    assert str(build_native.find_cuda()) == "not compiled in: there is no nvcc (/nowhere/bin/nvcc)"
    monkeypatch.setenv("FASTOPS_CUDA", "1")
    with pytest.raises(
        SystemExit, match="FASTOPS_CUDA=1 asks for CUDA kernels, which cannot be built: there is no nvcc"
    ):
        build_native.find_cuda()


def test_a_wrong_choice_is_refused(monkeypatch):
    monkeypatch.setenv("FASTOPS_CUDA", "yes")
    with pytest.raises(SystemExit, match="FASTOPS_CUDA must be 0, 1 or auto, got 'yes'"):
        build_native.find_cuda()


def test_architectures(monkeypatch):
    cuda = _nvcc()
    assert cuda.architectures == ("8.0+PTX", "9.0a")
    assert cuda.code_flags == [
        "-gencode=arch=compute_80,code=[sm_80,compute_80]",
        "-gencode=arch=compute_90a,code=[sm_90a]",
    ]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5;8.6 9.0+PTX")
    assert build_native.find_cuda().architectures == ("8.6", "9.0+PTX")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5")
    assert "need compute capability 8.0" in build_native.find_cuda().why_not
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Hopper")
    with pytest.raises(SystemExit, match=r"must name architectures by number, such as .*, got 'Hopper'"):
        build_native.find_cuda()


def test_no_kernel_of_linear_spills(monkeypatch):
    """`make cuda-usage` shows all kernels on all architectures."""
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0")
    rows = build_native.cuda_usage(_nvcc(), [build_native.CUDA_KERNELS / "linear.cu"])
    assert len(rows) >= 30
    assert {row.architecture for row in rows} == {"sm_80"}
    assert [row for row in rows if row.spill_stores or row.spill_loads] == []
    # Two blocks of the large tiles at a time.
    large = [row for row in rows if "Mma16" in row.kernel and "2, 4, 64, 32" in row.kernel]
    assert len(large) == 12
    assert all(row.registers <= 128 for row in large)


def test_kernels_see_no_torch():
    """They compile alone, so that another project can take them."""
    for path in sorted((ROOT / "csrc" / "kernels").rglob("*")):
        if path.is_file():
            text = path.read_text()
            assert "#include <torch" not in text
            assert "#include <ATen" not in text
            assert "#include <c10" not in text


def test_loads_without_a_driver():
    """A fresh process, without the emulator."""
    code = "import fastops; print(fastops.info())"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=True)
    line = next(line for line in result.stdout.splitlines() if line.startswith("CUDA"))
    assert _C.build_info()["cuda"] in line
