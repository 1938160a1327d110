"""How the CUDA kernels are built, and what info() says about them."""

import importlib.machinery
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import build_native
import fastops

ROOT = Path(__file__).resolve().parent.parent
EXTENSION = Path(fastops.__file__).with_name(f"_C{importlib.machinery.EXTENSION_SUFFIXES[0]}")
# The section in which nvcc leaves the code for the GPU.
COMPILED_IN = b".nv_fatbin" in EXTENSION.with_name("libfastops_kernels.so").read_bytes()


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch):
    for name in ("FASTOPS_CUDA", "TORCH_CUDA_ARCH_LIST", "NVCCFLAGS"):
        monkeypatch.delenv(name, raising=False)


def _nvcc() -> build_native.Cuda:
    cuda = build_native.find_nvcc()
    if cuda.why_not:
        pytest.skip(cuda.why_not)
    return cuda


def test_info_says_what_was_compiled_in_and_what_was_found():
    info = fastops.info()
    assert info.cuda_reason.startswith("compiled by nvcc " if COMPILED_IN else "not compiled in: ")
    usable = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
    assert info.cuda == (COMPILED_IN and usable)
    if COMPILED_IN:
        assert "; " in info.cuda_reason  # and then the driver and the devices, or what is missing


def test_cuda_can_be_turned_off(monkeypatch):
    monkeypatch.setenv("FASTOPS_CUDA", "0")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0")
    assert str(build_native.find_cuda()) == "not compiled in: FASTOPS_CUDA=0"


def _install_nvcc(folder: Path, monkeypatch) -> None:
    """A CUDA_HOME whose nvcc knows its version, and nothing else."""
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 13.0, V13.0.88'\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(folder))


@pytest.mark.parametrize(
    ("driver", "asked", "architectures", "compiled"),
    [
        (False, "", "", False),
        (False, "auto", "", False),
        (False, "1", "", True),
        (False, "", "9.0", True),
        (True, "", "", True),
        (True, "auto", "", True),
        (True, "0", "9.0", False),
    ],
)
def test_who_gets_cuda_kernels(tmp_path, monkeypatch, driver, asked, architectures, compiled):
    """Where nvcc is: whoever has a driver, or asks."""
    _install_nvcc(tmp_path, monkeypatch)
    monkeypatch.setattr(build_native, "has_driver", lambda: driver)
    monkeypatch.setenv("FASTOPS_CUDA", asked)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", architectures)
    cuda = build_native.find_cuda()
    assert (cuda.why_not == "") == compiled
    if compiled:
        assert str(cuda) == f"compiled by nvcc 13.0.88 for {architectures or '8.0+PTX 9.0a'}"
    elif asked != "0":
        assert str(cuda) == (
            "not compiled in: this machine has no NVIDIA driver; FASTOPS_CUDA=1 compiles them all the same"
        )


def test_a_driver_is_found_by_its_device_or_its_program(tmp_path, monkeypatch):
    monkeypatch.setattr(build_native, "DRIVER", (str(tmp_path / "nvidiactl"),))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not build_native.has_driver()
    (tmp_path / "nvidiactl").touch()
    assert build_native.has_driver()
    (tmp_path / "nvidiactl").unlink()
    (tmp_path / "nvidia-smi").touch(0o755)
    assert build_native.has_driver()


def test_without_nvcc(monkeypatch):
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0")
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
    assert build_native.find_nvcc().architectures == ("8.6", "9.0+PTX")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5")
    assert "need compute capability 8.0" in build_native.find_nvcc().why_not
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Hopper")
    with pytest.raises(SystemExit, match=r"must name architectures by number, such as .*, got 'Hopper'"):
        build_native.find_nvcc()


def test_no_kernel_of_linear_spills(monkeypatch):
    """`make cuda-usage` shows all kernels on all architectures."""
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0")
    rows = build_native.cuda_usage(_nvcc(), [build_native.KERNELS / "linear" / "cuda" / "linear.cu"])
    assert len(rows) >= 30
    assert {row.architecture for row in rows} == {"sm_80"}
    assert [row for row in rows if row.spill_stores or row.spill_loads] == []
    # Two blocks of the large tiles at a time.
    large = [row for row in rows if "Mma16" in row.kernel and "2, 4, 64, 32" in row.kernel]
    assert len(large) == 12
    assert all(row.registers <= 128 for row in large)


def test_kernels_see_no_torch():
    """Another project can take them: the preprocessor finds all that they include where torch's headers are not."""
    kernels = ROOT / "csrc" / "kernels"
    sources = [path for path in kernels.rglob("*") if path.suffix in (".h", ".cpp", ".cu", ".cuh")]
    cuda = [path for path in sources if path.parent.name == "cuda"]
    cpu = [path for path in sources if path not in cuda]
    for sources, flags in ((cpu, []), (cuda, [f"-I{build_native.EMULATOR}"])):
        command = [*build_native.compiler(), "-std=c++20", "-x", "c++", *flags, "-M", *map(str, sources)]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        assert "/tensor.h" in result.stdout
        assert "torch/" not in result.stdout.replace(str(ROOT), "")


def test_editors_are_told_how_a_file_is_compiled(tmp_path):
    build = build_native.Build(tmp_path, ["g++"])
    source = ROOT / "csrc" / "kernels" / "common" / "cpu" / "dispatch.cpp"
    result = build.compile(source, ["-O3"])
    build.describe(tmp_path / "compile_commands.json")
    (step,) = json.loads((tmp_path / "compile_commands.json").read_text())
    assert step["file"] == str(source)
    assert step["arguments"][:2] == ["g++", "-O3"]
    assert step["arguments"][-4:] == ["-c", str(source), "-o", str(result)]


def test_every_file_of_the_torch_layer_is_compiled_once(tmp_path):
    units = build_native.torch_units()
    files = sorted(build_native.TORCH_LAYER.glob("*.cpp"))
    assert sorted(source for unit in units for source in unit) == files
    build = build_native.Build(tmp_path, ["g++"])
    for unit in units:
        build.compile_together(tmp_path / "precompiled.h.gch", unit, ["-O3"], "torch")
    assert len(build.compiles) == len(units) < len(files)
    for _, source, _, _ in build.compiles:
        if source in build.parts:
            assert source.read_text() == "".join(f'#include "{part}"\n' for part in build.parts[source])
    build.describe(tmp_path / "compile_commands.json")
    steps = json.loads((tmp_path / "compile_commands.json").read_text())
    assert sorted(step["file"] for step in steps) == list(map(str, files))


@pytest.mark.skipif(not COMPILED_IN, reason="no CUDA kernels were compiled in")
def test_loads_without_a_driver(tmp_path):
    """In a process that finds a file in the driver's place that is none."""
    (tmp_path / "libcuda.so.1").write_text("not a library")
    code = """
import ctypes
try:
    ctypes.CDLL("libcuda.so.1")
except OSError:
    print("no driver")
import torch, fastops
print(fastops.info().cuda_reason)
print(fastops.functional.relu(torch.tensor([-1.0, 2.0])).tolist())
"""
    folders = f"{tmp_path}:{os.environ.get('LD_LIBRARY_PATH', '')}"
    environment = {**os.environ, "LD_LIBRARY_PATH": folders}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    driver, reason, values = result.stdout.splitlines()
    assert driver == "no driver"
    assert reason.startswith("compiled by nvcc ")
    assert "driver" in reason.partition("; ")[2]
    assert values == "[0.0, 2.0]"
