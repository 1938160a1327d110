"""An op is at most ten files: those that CONTRIBUTING.md names, and no other has to know it."""

import re
import subprocess
from pathlib import Path

import pytest
from every_op import OPS

ROOT = Path(__file__).resolve().parent.parent
STEMS = [op.__name__.removeprefix("test_") for op in OPS]

# A name of each op that has no other meaning. A new op may take part in this list, but need not.
NAMES = {
    "activation": r"glu",
    "conv": r"conv_transpose3d",
    "conv_pool": r"conv_max_pool2d",
    "linear": r"linear_backward|LinearBackward",
    "mlp": r"MlpForward|FF\.mlp",
    "pool": r"adaptive_avg_pool3d",
}

# Other files that have such a name, and why a new op's would not be there.
USERS = {
    "csrc/kernels/common/cuda/planners.h": "kernels for a GPU are a step of their own",
    "csrc/kernels/conv/cpu/pointwise.inl": "a 1x1 convolution is a product",
    "csrc/kernels/conv/cuda/conv.cu": "a 1x1 convolution is a product",
    "csrc/kernels/common/inference.h": "what the light run time leaves out, which a new op may do without",
    "csrc/kernels/fastops.h": "short names for users of C++; Cpu::plan takes every call",
    "csrc/runtime/layer_ops.cpp": "what a file of the light run time can hold, which is a list of its own",
    "csrc/torch/aten_activation.cpp": "ATen's operators, which are a list of their own",
    "csrc/torch/mlp.cpp": "its layers are linear's where they are too wide for one kernel",
    "csrc/torch/ops.h": "what one op's file calls of another's",
    "fastops/enable.py": "ATen's operators, which are a list of their own",
    "fastops/_fusion.py": "what a chain of layers becomes",
    "fastops/_freezing.py": "what a chain of layers becomes",
    "fastops/_frozen_layers.py": "what a chain of layers becomes",
    "fastops/_layer_scale.py": "what a chain of layers becomes",
    "fastops/light/_flow_rules.py": "what channels are followed through: a list of its own",
    "fastops/light/distillation.py": "features of two models are averaged to one size",
    "fastops/ops/_sharded.py": "layers that tensor parallelism splits",
    "fastops/record.py": "an example",
    "tests/test_adding_an_op.py": "NAMES",
    "tests/test_bench.py": "measured as an example",
    "tests/test_blocks.py": "modules of several ops",
    "tests/test_compile_backend.py": "what layers become",
    "tests/test_doors.py": "both doors, op by op: a new op's are in its own file",
    "tests/test_enable.py": "ATen's operators, which are a list of their own",
    "tests/test_freeze.py": "what layers become",
    "tests/test_fuse.py": "what layers become",
    "tests/test_guard_pages.py": "layouts of their own; test_layouts.py has those of every op",
    "tests/cpp/test_plans.cpp": "what all plans promise, on some",
    "tests/test_cuda_plans.py": "what all plans promise, on some",
    "tests/test_federated.py": "an example",
    "tests/test_lightning.py": "what layers become",
    "tests/test_monitor.py": "an example",
    "tests/test_training_patterns.py": "an example",
    "tests/test_prune_channels.py": "functions that channels are followed through",
    "tests/test_layouts.py": "functions of one operand, whose results have PyTorch's strides",
    "tests/test_plans.py": "what all plans promise, on some",
    "tests/test_record.py": "an example",
    "tests/test_threads.py": "what several threads share",
    "tests/test_tools.py": "FLOPs of products; an op that joins others",
    "tests/test_transforms.py": "PyTorch has no second derivative of it",
}
# What an op goes without: a general door where it joins others.
_JOINS = {"fastops/ops/softclip.py"}
WITHOUT = {"conv_pool": _JOINS, "mlp": _JOINS}


def listed() -> list[str]:
    """The files of CONTRIBUTING.md's made-up op."""
    section = (ROOT / "CONTRIBUTING.md").read_text().split("# Adding an op\n")[1].split("\n# ")[0]
    return re.findall(r"^\d+\. `([^`]+)`", section, re.MULTILINE)


def owner(path: Path) -> str:
    """The stem whose file this is by its name, or by its folder in csrc/kernels; "" for a file of none."""
    if path.parts[:2] == ("csrc", "kernels"):
        return path.parts[2] if path.parts[2] in STEMS else ""
    name = path.stem.removeprefix("_").removeprefix("test_").removeprefix("cuda_")
    own = [stem for stem in STEMS if f"{name}_".startswith(f"{stem}_")]
    return max(own, key=len, default="")


def mentions(name: str) -> list[Path]:
    folders = ("csrc", "fastops", "benchmarks/*.py", "tests")
    found = subprocess.run(
        ["git", "grep", "-lwE", "--untracked", name, "--", *folders],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return [Path(line) for line in found.stdout.splitlines()]


def test_at_most_ten_files():
    files = listed()
    assert 5 < len(files) <= 10
    assert len(set(files)) == len(files)


def test_every_op_has_the_files():
    for stem in STEMS:
        files = {file for file in listed() if "softclip" in file}
        missing = {file for file in files if not (ROOT / file.replace("softclip", stem)).exists()}
        assert missing == WITHOUT.get(stem, set()), stem


@pytest.mark.parametrize("stem", NAMES)
def test_no_other_file_names_an_op(stem):
    central = {file for file in listed() if "softclip" not in file}
    others = {str(path) for path in mentions(NAMES[stem]) if owner(path) != stem}
    assert others - central - USERS.keys() == set(), "an op has to be added there: find it, or say in USERS why not"


def test_no_user_is_left_over():
    named = {str(path) for name in NAMES.values() for path in mentions(name)}
    assert USERS.keys() - named == set()
