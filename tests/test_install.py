"""What a stranger meets before the first kernel runs: setup.py without torch, import with another torch."""

import importlib
import importlib.machinery
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import fresh
import pytest
import torch

import fastops
from fastops import __main__ as command_line

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(fastops.__file__).resolve().parent
EXTENSION = PACKAGE / f"_C{importlib.machinery.EXTENSION_SUFFIXES[0]}"


def run_python(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


def copy_to(target: Path) -> Path:
    """A copy of the installed package without its extension; `import fastops` finds it through sys.path."""
    return Path(
        shutil.copytree(PACKAGE, target, ignore=shutil.ignore_patterns("*.so", "__pycache__", "_build.py", "*.pyi"))
    )


def import_errors(*copies: Path, prelude: str = "") -> list[str]:
    """The messages of the ImportErrors that importing each of them raises, in one process."""
    code = f"""{prelude}
import sys, json
errors = []
for folder in {[str(copy.parent) for copy in copies]!r}:
    sys.path.insert(0, folder)
    try:
        import fastops
    except ImportError as error:
        errors.append(str(error))
    for name in [name for name in sys.modules if name.partition(".")[0] == "fastops"]:
        del sys.modules[name]
    sys.path.remove(folder)
print(json.dumps(errors))
"""
    result = run_python("-I", "-c", code)
    assert result.returncode == 0, result.stderr
    errors = json.loads(result.stdout)
    assert len(errors) == len(copies)
    return errors


def test_extension_that_does_not_fit(tmp_path: Path) -> None:
    missing, python, torch_, broken = (copy_to(tmp_path / name / "fastops") for name in ("m", "p", "t", "b"))
    (python / "_C.cpython-39-x86_64-linux-gnu.so").touch()
    shutil.copy(EXTENSION, torch_)
    (torch_ / "_build.py").write_text('TORCH_VERSION = "2.10.1+cpu"\n')
    (broken / EXTENSION.name).write_text("not a library")
    (broken / "_build.py").write_text(f'TORCH_VERSION = "{torch.__version__}"\n')
    of_missing, of_python, of_torch, of_broken = import_errors(missing, python, torch_, broken)

    assert "no compiled extension" in of_missing
    assert str(missing) in of_missing
    assert "-m pip install" in of_missing

    assert "built for another Python: _C.cpython-39-x86_64-linux-gnu.so" in of_python

    assert f"built for torch 2.10.1+cpu, and this is torch {torch.__version__}" in of_torch
    assert "-m pip install" in of_torch

    assert "cannot be loaded" in of_broken
    assert f"built for torch {torch.__version__}" in of_broken


def test_import_without_torch(tmp_path: Path) -> None:
    (message,) = import_errors(copy_to(tmp_path / "fastops"), prelude="import sys; sys.modules['torch'] = None")
    assert message.startswith("fastops needs torch")
    assert "-m pip install 'torch>=2.11'" in message


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """What setup.py needs to describe the package."""
    target = tmp_path / "sources"
    target.mkdir()
    for name in ("setup.py", "pyproject.toml", "build_native.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, target)
    for name in ("fastops", "benchmarks"):
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("*.so", "__pycache__", "results"))
    return target


def describe_in_isolation(sources: Path, tmp_path: Path, torch_folder: Path | None) -> subprocess.CompletedProcess:
    """setup.py as pip runs it: by the target environment's python, whose packages are hidden from it."""
    environment = tmp_path / "target"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    packages = next(environment.glob("lib/python*/site-packages"))
    if torch_folder is not None:
        (packages / "torch").symlink_to(torch_folder)
    overlay = tmp_path / "overlay"
    overlay.mkdir()
    import setuptools

    for folder in Path(setuptools.__file__).parent.parent.iterdir():
        if folder.name in ("setuptools", "_distutils_hack", "pkg_resources") or folder.name.startswith("setuptools-"):
            (overlay / folder.name).symlink_to(folder)
    (overlay / "sitecustomize.py").write_text(f"import sys\nsys.path.remove({str(packages)!r})\n")
    variables = {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "CONDA_PREFIX", "PYTHONHOME")}
    return subprocess.run(
        [environment / "bin" / "python", "setup.py", "--quiet", "dist_info", "--output-dir", str(tmp_path)],
        cwd=sources,
        env={**variables, "PYTHONPATH": str(overlay), "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_setup_finds_the_target_environments_torch(sources: Path, tmp_path: Path) -> None:
    result = describe_in_isolation(sources, tmp_path, Path(torch.__file__).parent)
    assert result.returncode == 0, result.stderr
    metadata = next(tmp_path.glob("fastops-*.dist-info/METADATA")).read_text()
    minor = ".".join(torch.__version__.split(".")[:2])
    assert re.findall("^Requires-Dist: torch.*$", metadata, re.MULTILINE) == [f"Requires-Dist: torch=={minor}.*"]


def test_sources_are_all_there_and_nothing_else(tmp_path: Path) -> None:
    """`make sdist`, whatever was built or imported in this folder before."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    if not tracked:
        pytest.skip("these sources are not a git checkout")
    (ROOT / "fastops" / "light" / "left_by_a_test.pyc").touch()
    try:
        command = [sys.executable, "setup.py", "--quiet", "egg_info", "--egg-base", tmp_path, "sdist", "-d", tmp_path]
        subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    finally:
        (ROOT / "fastops" / "light" / "left_by_a_test.pyc").unlink()
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        names = {one.name.partition("/")[2] for one in archive.getmembers() if one.isfile()}
    names -= {"PKG-INFO", "setup.cfg"}
    assert not names - set(tracked)
    left_out = {name for name in tracked if not name.startswith("benchmarks/results/")} - names
    assert left_out == {".gitignore"}


@pytest.mark.parametrize("command", ["egg_info", "sdist"])
def test_what_is_built_asks_for_its_torch_and_sources_do_not(command: str, tmp_path: Path) -> None:
    """setuptools before 70 writes a wheel's metadata from egg_info's."""
    more = ["sdist", "-d", tmp_path] if command == "sdist" else []
    command_line = [sys.executable, "setup.py", "--quiet", "egg_info", "--egg-base", tmp_path, *more]
    subprocess.run(command_line, cwd=ROOT, capture_output=True, text=True, check=True)
    metadata = (tmp_path / "fastops.egg-info" / "PKG-INFO").read_text()
    minor = ".".join(torch.__version__.split(".")[:2])
    asked = ">=2.11" if command == "sdist" else f"=={minor}.*"
    assert re.findall("^Requires-Dist: torch.*$", metadata, re.MULTILINE) == [f"Requires-Dist: torch{asked}"]


def test_setup_without_torch_says_what_to_run(sources: Path, tmp_path: Path) -> None:
    result = describe_in_isolation(sources, tmp_path, None)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert result.stderr.count("fastops: this environment has no torch") == 1
    assert "pip install 'torch>=2.11'" in result.stderr


def test_setup_with_an_old_torch_says_what_to_run(sources: Path, tmp_path: Path) -> None:
    old = tmp_path / "old" / "torch"
    old.mkdir(parents=True)
    (old / "__init__.py").touch()
    (old / "version.py").write_text("__version__ = '2.4.1+cpu'\n")
    result = describe_in_isolation(sources, tmp_path, old)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert "has torch 2.4.1+cpu, and fastops needs 2.11 or newer" in result.stderr


# ---- optional packages -----------------------------------------------------------------------------------------------


OPTIONAL = "flwr keras lightning matplotlib onnx onnxscript optuna peft pytorch_lightning safetensors sklearn"
OPTIONAL += " tensorboard timm transformers"


@pytest.fixture
def without_optional_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    names = OPTIONAL.split()
    loaded = [name for name in sys.modules if name.partition(".")[0] in names or name.startswith("torch.utils.tensorb")]
    for name in {*names, *loaded}:
        monkeypatch.setitem(sys.modules, name, None)


@pytest.mark.parametrize("example", sorted(path.name for path in (ROOT / "examples").glob("*.py")))
@pytest.mark.usefixtures("without_optional_packages")
def test_an_example_says_in_one_line_what_to_install(example: str) -> None:
    """The line that its docstring has, too; and every extra is one of pyproject.toml."""
    path = ROOT / "examples" / example
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(path), run_name="__main__")
    named, install = re.fullmatch(
        r"(?:import of |No module named ')(\w+).*: (pip install .*)", stop.value.code
    ).groups()
    assert named in OPTIONAL.split()
    assert install in [line.strip() for line in path.read_text().split('"""')[1].splitlines()]
    extras = re.findall(r"fastops\[(\w+)\]", install)
    assert all(f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text() for extra in extras)


def test_every_extra_is_explained() -> None:
    project, page = (ROOT / "pyproject.toml").read_text(), (ROOT / "docs" / "installing.md").read_text()
    extras = project.partition("[project.optional-dependencies]\n")[2].partition("\n\n")[0]
    rows = " ".join(re.findall(r"^\| (`.*?`) \|", page, re.MULTILINE))
    assert sorted(re.findall(r"`(\w+)`", rows)) == sorted(re.findall(r"^(\w+) = ", extras, re.MULTILINE))


@pytest.mark.parametrize(
    ("name", "needs"),
    [
        ("fastops.huggingface", "transformers: pip install fastops[huggingface]"),
        ("fastops.lightning", "Lightning: pip install fastops[lightning]"),
        ("fastops.timm", "timm: pip install fastops[timm]"),
    ],
)
@pytest.mark.usefixtures("without_optional_packages")
def test_a_module_says_in_one_line_what_to_install(name: str, needs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(ModuleNotFoundError) as missing:
        importlib.import_module(name)
    assert str(missing.value) == f"{name} needs {needs}"


@pytest.mark.usefixtures("without_optional_packages")
def test_the_demo_says_in_one_line_what_to_install(capsys: pytest.CaptureFixture) -> None:
    assert command_line.main(["demo"]) == 1
    assert capsys.readouterr().err == "fastops demo needs matplotlib: pip install fastops[demo]\n"


def test_one_openmp_runtime() -> None:
    """A second libgomp would have a second pool of threads that fights the first for the cores."""
    code = (
        "import torch, fastops, fastops.functional as FF\n"
        "torch.set_num_threads(2)\n"
        "x = torch.randn(1024, 1024)\n"
        "FF.tanh(FF.linear(x, x))\n"
        "print(len(fastops.info().openmp))"
    )
    assert fresh.run_python(code).stdout == "1\n"
