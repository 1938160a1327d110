"""fastops.record() and FASTOPS_VERBOSE: which kernels ran."""

import os
import re
import subprocess
import sys
import threading

import pytest
import torch
from calls import spatial
from every_op import OPS
from reference import DTYPES

import fastops
import fastops.functional as FF


def operands():
    return torch.randn(16, 10), torch.randn(5, 10, requires_grad=True), torch.randn(5)


def test_one_row_a_kernel_call():
    x, w, b = operands()
    with fastops.record() as calls:
        FF.linear(x, w, b, activation="relu").sum().backward()
        FF.gelu(x.double())
    assert [row.op for row in calls] == ["linear", "linear_backward", "gelu"]
    row = calls[0]
    assert row.shapes == "16x10, 5x10, 5"
    assert row.dtype == "float32"
    assert calls[2].dtype == "float64"
    assert row.microseconds > 0
    assert all(row.kernel and row.kernel != "aten" for row in calls)


def test_a_call_handed_to_pytorch_says_aten():
    x, w, b = operands()
    with fastops.record() as calls:
        FF.relu(torch.arange(4))
        FF.linear(x.to(torch.complex64), w.detach().to(torch.complex64))
        FF.linear(x, w[0])
        FF.linear(x, w, b[:1], activation="tanh")
    assert [(row.op, row.kernel) for row in calls[:3]] == [("relu", "aten"), ("linear", "aten"), ("linear", "aten")]
    assert [row.op for row in calls[3:]] == ["linear", "tanh"]
    assert calls[3].kernel == "aten"
    assert calls[1].shapes == "16x10, 5x10"
    assert calls[1].dtype == "complex64"


def test_recordings_nest_and_end():
    x, w, _ = operands()
    with fastops.record() as outer:
        FF.linear(x, w)
        with fastops.record() as inner:
            FF.relu(x)
        FF.tanh(x)
    FF.linear(x, w)
    assert [row.op for row in inner] == ["relu"]
    assert [row.op for row in outer] == ["linear", "relu", "tanh"]


def test_an_exception_ends_the_recording():
    with pytest.raises(ZeroDivisionError), fastops.record():
        raise ZeroDivisionError
    with fastops.record() as calls:
        pass
    assert calls == []


def test_other_threads_are_recorded():
    with fastops.record() as calls:
        thread = threading.Thread(target=lambda: FF.relu(torch.randn(4)))
        thread.start()
        thread.join()
    assert [row.op for row in calls] == ["relu"]


def test_table():
    x, w, b = operands()
    with fastops.record() as calls:
        FF.linear(x, w, b)
        FF.relu(torch.arange(4))
    lines = str(calls).splitlines()
    assert lines[0].split() == ["op", "kernel", "shapes", "dtype", "us"]
    assert len(lines) == 4
    assert "16x10, 5x10, 5" in lines[2]
    assert len({len(line) for line in lines}) == 1
    assert str(type(calls)()).splitlines()[0].split() == ["op", "kernel", "shapes", "dtype", "us"]


@pytest.mark.parametrize(("value", "lines"), [("1", 2), ("0", 0), ("", 0)])
def test_verbose(value, lines):
    code = "import torch, fastops.functional as FF; x = torch.ones(3, 4); FF.linear(x, x); FF.relu(torch.arange(3))"
    environment = {**os.environ, "FASTOPS_VERBOSE": value}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    rows = [line for line in result.stderr.splitlines() if line.startswith("fastops: ")]
    assert len(rows) == lines
    if lines:
        assert "linear" in rows[0]
        assert "3x4, 3x4" in rows[0]
        assert "aten" in rows[1]


# ---- names of kernels: the rule is in csrc/kernels/common/kernel_name.h

NAME = re.compile(
    r"([a-z][a-z0-9]*(?:_[a-z][a-z0-9]*)*?)(?:_(\d+(?:x\d+)*))?_(scalar|avx2|avx512|avx512_bf16|amx|cuda)"
)


def algorithms(rows, tier, tiles):
    """The algorithms in the rows, each of whose names must keep to the rule."""
    found = set()
    for row in rows:
        match = NAME.fullmatch(row.kernel)
        assert match, row
        assert match[3] == tier, row
        algorithm = match[1] if tier == "cuda" else match[1].removesuffix("_bf16")  # by the tier's own instruction
        assert tiles[algorithm] == (match[2].count("x") + 1 if match[2] else 0), row
        found.add(algorithm)
    return found


def run_calls(dtype, place=lambda t: t, size=8, most_dims=3, on_gpu=False):
    """Runs the calls of every op that has kernels, forward and backward, images in both layouts. Returns the rows."""

    def run(call, tensors):
        needs = range(len(tensors)) if call.needs is None else call.needs
        leaves = [place(t.to(dtype)).requires_grad_(i in needs) for i, t in enumerate(tensors)]
        call.ours(*(t.clone() for t in leaves)).sum().backward()  # some functions work in place

    called = set()
    with fastops.record() as rows:
        for kernels, call in ((op.kernels(dtype, on_gpu), call) for op in OPS for call in op.calls(size)):
            called.add(call.name)
            if spatial(call.name) > most_dims or not kernels:
                continue
            tensors = [torch.randn(shape) for shape in call.shapes]
            run(call, tensors)
            last = {2: torch.channels_last, 3: torch.channels_last_3d}.get(spatial(call.name))
            if last is not None:
                run(call, [t.contiguous(memory_format=last) if t.dim() > 1 else t for t in tensors])
    assert called == set(FF.__all__)
    return rows


def expected_kernels(dtype, on_gpu=False):
    return {name: sizes for op in OPS for name, sizes in op.kernels(dtype, on_gpu).items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_names_of_kernels(isa, dtype):
    """Every public function, tier, dtype and layout."""
    tier = "avx512" if isa in ("avx512_bf16", "amx") and dtype != torch.bfloat16 else isa
    expected = expected_kernels(dtype)
    assert algorithms(run_calls(dtype), tier, expected) == set(expected)
