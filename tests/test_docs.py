"""The documentation: every public name's docstring is complete and its examples run; the README is true."""

import importlib.util
import itertools
import re
import shlex
from pathlib import Path

import pytest
import torch
from each import each

import docs
import fastops
from fastops import __main__ as command_line
from fastops.benchmarks import report
from fastops.benchmarks.scoreboard import tables

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()

SYMBOLS = docs.symbols()


@pytest.fixture(autouse=True)
def _settings():
    """Examples print tensors in PyTorch's default way, and what they set is put back."""
    torch.set_printoptions(profile="default")
    limit, precision = fastops.memory.stats()["limit_bytes"], fastops.get_conv_precision()
    yield
    fastops.memory.set_limit(limit)
    fastops.set_conv_precision(precision)


# ---- docstrings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SYMBOLS)
def test_docstring(name: str) -> None:
    assert docs.missing_parts(SYMBOLS[name]) == []
    assert docs.failed_examples(SYMBOLS[name], name) == ""


@each("name", SYMBOLS)
def test_name(name: str) -> None:
    """help() and tracebacks show the public name."""
    assert SYMBOLS[name].__name__ == name.rpartition(".")[2]


def test_what_is_missing_is_found() -> None:
    def scale(input: torch.Tensor, factor: float) -> torch.Tensor:
        """y = a x."""

    parts = ["the errors", "the source", "an example", "the shapes", "the dtypes", "input", "factor"]
    assert docs.missing_parts(scale) == parts

    class Heir(torch.nn.ReLU):
        pass

    assert docs.missing_parts(Heir) == ["a docstring"]

    scale.__doc__ = ">>> torch.ones(2)\ntensor([1., 2.])"
    assert "Got:\n    tensor([1., 1.])" in docs.failed_examples(scale, "scale")


# ---- README ----------------------------------------------------------------------------------------------------------


PAGES = ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]

# What a page's examples need beside fastops.
NEEDS = {
    "docs/automl.md": ["optuna"],
    "docs/checkpoints.md": ["safetensors"],
    "docs/federated.md": ["flwr"],
    "docs/huggingface.md": ["transformers", "peft"],
    "docs/lightning.md": ["lightning"],
    "docs/monitoring.md": ["tensorboard"],
}


# What the block that begins with its import is left out without: it is too large for an example.
LEFT_OUT_WITHOUT = ["autogluon"]


def blocks(language: str, page: str = "README.md") -> list[str]:
    text = (ROOT / page).read_text()
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_python_in_the_pages_runs(page: str, capsys: pytest.CaptureFixture, tmp_path, monkeypatch) -> None:
    """Block after block, in one namespace. Lines of comment are what it prints, after what other libraries print."""
    for name in NEEDS.get(page, []):
        pytest.importorskip(name)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in blocks("python", page):
        package = re.match(r"(?:from|import) (\w+)", block)
        if package and package[1] in LEFT_OUT_WITHOUT and importlib.util.find_spec(package[1]) is None:
            continue
        exec(compile(block, page, "exec"), names)
        printed = capsys.readouterr().out
        shown = "".join(f"{line[2:]}\n" for line in block.splitlines() if line.startswith("# "))
        assert printed.endswith(shown)
    assert page != "README.md" or "fastops" in names


def test_commands_in_the_pages_exist() -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    lines = [line for page in PAGES for block in blocks("sh", page) for line in block.splitlines()]
    commands = [line.split("#")[0].strip() for line in lines]
    commands += [one for page in PAGES for one in re.findall(r"`((?:make|fastops) [^`]+)`", (ROOT / page).read_text())]
    assert commands
    for command in commands:
        program, *arguments = itertools.dropwhile(lambda word: "=" in word, shlex.split(command))  # not VARIABLE=VALUE
        if program == "make":
            assert arguments[0] in targets, command
        elif program == "fastops":
            command_line.parser().parse_args([one for one in arguments if one != "--help"])
        elif program == "fastops-run":  # tests/test_light_runtime.py runs it
            assert arguments[0] == "model.fops"
        elif program == "cmake":  # tests/test_cpp_library.py runs it
            assert arguments[0] == "-S"
            assert (ROOT / arguments[1] / "CMakeLists.txt").exists()
        elif program in ("python", "torchrun", "sh", "tensorboard"):
            assert all((ROOT / one).exists() for one in arguments if one.startswith("examples/")), command
        else:
            installs = re.fullmatch(r"pip install (?:\.|fastops\[(\w+)\])", command)
            assert installs, command
            assert installs[1] is None or f"\n{installs[1]} = [" in (ROOT / "pyproject.toml").read_text(), command


def test_the_site_names_every_page() -> None:
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")

    def named(entry: object) -> list[str]:
        parts = entry.values() if isinstance(entry, dict) else entry
        return [entry] if isinstance(entry, str) else [page for part in parts for page in named(part)]

    pages = named(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert len(set(pages)) == len(pages)
    assert {*PAGES, "CONTRIBUTING.md"} == {page for page in pages if not page.startswith(("reference/", "benchmarks/"))}


def test_every_environment_variable_is_named() -> None:
    sources = [ROOT / "setup.py", ROOT / "build_native.py", ROOT / "tests" / "gpu.py"]
    sources += [path for folder in ("fastops", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    # The scoreboard sets those of other libraries, for its workers.
    sources = [path for path in sources if path.parent.name != "scoreboard"]
    sources += [path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".cpp", ".h", ".cu", ".cuh")]
    read = set()
    for path in sources:
        lines = path.read_text().splitlines()
        for before, line in zip(["", *lines], lines, strict=False):
            if "environ" in line or "getenv(" in line:
                read |= set(re.findall(r'"([A-Z][A-Z_]+)"', f"{before} {line}"))
    assert {"FASTOPS_ISA", "FASTOPS_VERBOSE", "MAX_JOBS", "CUDA_PATH", "VIRTUAL_ENV"} <= read
    table = (ROOT / "docs" / "environment.md").read_text()
    assert read - set(re.findall(r"`([A-Z][A-Z_]+)`", table)) == set()


def test_links_in_the_pages_lead_somewhere() -> None:
    for page in (*PAGES, "CONTRIBUTING.md"):
        prose = re.sub(r"```.*?```", "", (ROOT / page).read_text(), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)]+)\)", prose):
            path, _, anchor = target.partition("#")
            file = (ROOT / page).parent / path if path else ROOT / page
            if file.is_dir() and not anchor:
                continue
            text = file.read_text()
            anchors = [
                re.sub(r"[^a-z0-9_ -]", "", title.lower()).replace(" ", "-")
                for title in re.findall(r"^#+ (.*)$", text, re.MULTILINE)
            ]
            assert not anchor or anchor in anchors, target


def test_readme_and_results_are_those_of_the_newest_measurements() -> None:
    """Written by `make readme`, and not by hand."""
    results = ROOT / "benchmarks" / "results"
    of_models, of_ops = (report.newest(results, models_only) for models_only in (True, False))
    of_peers = tables.newest(results)
    shown = README.split(report.BEGIN)[1].split(report.END)[0].strip()
    assert shown == report.readme_block(of_models, of_ops, of_peers)
    assert (ROOT / "benchmarks" / "RESULTS.md").read_text() == report.results_page(of_models, of_ops, of_peers)
