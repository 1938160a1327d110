"""fastops.info(), fastops.memory's doors and the command line around them."""

import subprocess

import pytest
import torch
from fresh import run_python

import fastops
from fastops import _C
from fastops.__main__ import main


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """python -m fastops with these arguments."""
    return run_python("import runpy; runpy.run_module('fastops', run_name='__main__')", *arguments, **environment)


def test_attributes() -> None:
    info = fastops.info()
    assert info.version == fastops.__version__
    assert info.torch == torch.__version__
    assert info.built_for_torch.split(".")[:2] == torch.__version__.split(".")[:2]
    assert info.isa_found == _C.isa_found()
    assert info.isa_used == _C.isa_used()
    assert info.threads == torch.get_num_threads()
    assert info.cuda <= torch.cuda.is_available()
    assert info.memory == fastops.memory.stats()
    assert info.as_dict()["compiler"] == info.compiler != ""


def test_page_names_everything() -> None:
    info = fastops.info()
    page = str(info)
    for word in (
        "fastops",
        "torch",
        "compiler",
        "flags",
        "processor",
        "ISA",
        "threads",
        "OpenMP",
        "CUDA",
        "memory pool",
    ):
        assert any(line.startswith(word) for line in page.splitlines()), word
    for text in (info.version, info.torch, info.isa_used, info.cpu):
        assert text in page
    assert repr(info) == page


def test_command_prints_the_page() -> None:
    result = command("info")
    assert result.returncode == 0
    assert f"{fastops.__version__}, {fastops.info().location}" in result.stdout


def test_version_and_usage(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert not end.value.code
    assert capsys.readouterr().out == f"fastops {fastops.__version__}\n"
    with pytest.raises(SystemExit) as end:
        main([])
    assert end.value.code == 2
    assert "info | doctor | demo | bench" in capsys.readouterr().err


@pytest.mark.parametrize("name", sorted({"scalar", _C.isa_found(), "neon", "sse9"}))
def test_isa_can_be_lowered(name: str) -> None:
    """To a tier that this processor has: set_isa, which other tests use, sets each of them."""
    tiers = ["scalar", "avx2", "avx512", "avx512_bf16", "amx", "neon"]
    page = command("info", FASTOPS_ISA=name).stdout
    line = next(line for line in page.splitlines() if line.startswith("ISA"))
    found = _C.isa_found()
    if name not in tiers:
        assert line.split()[1] == found
        assert f"FASTOPS_ISA={name} names no tier" in line
    elif tiers.index(name) < tiers.index(found):
        assert line.split()[1] == name
        assert f"this processor has {found}; lowered by FASTOPS_ISA={name}" in line
    elif name == found:
        assert line.split()[1] == name
    else:
        assert line.split()[1] == found
        assert f"FASTOPS_ISA={name} asks for a tier that this processor does not have and is ignored" in line


@pytest.mark.parametrize(("value", "error"), [(-1, ValueError), (1.5, TypeError), (True, TypeError), ("1", TypeError)])
def test_memory_limit_is_checked(value: object, error: type[Exception]) -> None:
    before = fastops.memory.stats()
    with pytest.raises(error, match="limit_bytes"):
        fastops.memory.set_limit(value)
    assert fastops.memory.stats() == before
