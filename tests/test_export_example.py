"""examples/export.py: what it writes, read by a process without fastops."""

import sys
from pathlib import Path

import pytest
import torch

import fastops

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

pytest.importorskip("onnxscript", reason="onnxscript is not installed: pip install fastops[export]")
import export

# An AOTInductor package is compiled for a quarter of a minute: tests/test_cpp_library.py makes one.
NAMES = [name for name in export.FORMATS if name != "package.pt2"]


@pytest.mark.filterwarnings("ignore")
def test_formats(tmp_path):
    expected = export.write(tmp_path, NAMES)
    answers = export.read_elsewhere(tmp_path, NAMES)
    error = answers.pop("program_with_kernels.pt2")
    assert isinstance(error, str)
    assert set(answers) == set(NAMES) - {"program_with_kernels.pt2"}
    for y in answers.values():
        torch.testing.assert_close(y, expected)
    # Here fastops is imported, and the program runs its kernels.
    with fastops.record() as calls, torch.no_grad():
        y = export.read_program(tmp_path / "program_with_kernels.pt2")(export.digits())
    torch.testing.assert_close(y, expected)
    assert {"conv2d", "linear"} <= {call.op for call in calls if call.kernel != "aten"}
