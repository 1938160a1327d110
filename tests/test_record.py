"""fastops.record() and FASTOPS_VERBOSE: which kernels ran."""

import os
import re
import subprocess
import sys
import threading

import pytest
import torch
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

# The algorithms, and how many sizes their tiles have; 0: no tile.
ON_CPU = {
    "column_sums": 0, "conv_first": 2, "conv_gemm": 2, "conv_planes": 0, "conv_pool_blocks": 0, "conv_pool_first": 0,
    "conv_scatter": 2, "depthwise": 0, "depthwise_last": 0, "dot": 2, "elementwise": 0, "gemm": 2, "gemm_tiny": 2,
    "pool_across": 0, "pool_halves": 0, "pool_last": 0, "pool_scatter": 0, "pool_whole": 0, "pool_within": 0,
    "row_times_matrix": 0, "winograd": 2,
}  # fmt: skip


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


def named_calls(size):
    """(function, shapes of the tensors, other arguments): calls that reach every kernel, with images of this size."""
    for name in FF.__all__:
        dims = int(name[-2]) if name[-2:] in ("1d", "2d", "3d") else 0
        image, square = (2, 16, *(size,) * dims), (3,) * dims
        if name == "linear":
            for m, n, k in ((6, 5, 4), (2, 70, 300), (1, 400, 400), (130, 70, 90)):
                yield name, [(m, k), (n, k), (n,)], {}
        elif name == "mlp":
            yield name, [(9, 12), (10, 12), (4, 10)], {}
        elif name.startswith("conv_max_pool"):
            yield name, [image, (16, 16, *square)], {"pool_size": 2}
            yield name, [(2, 1, *image[2:]), (16, 1, *square)], {"pool_size": 2}
        elif name.startswith("conv"):
            transposed = "transpose" in name
            for inputs, outputs, kernel, groups in (
                (16, 24, 3, 1), (16, 24, 1, 1), (16, 16, 3, 16), (2, 16, 3, 1), (1, 16, 3, 1),
            ):  # fmt: skip
                weight = (outputs, inputs // groups, *(kernel,) * dims)
                yield name, [(2, outputs if transposed else inputs, *image[2:]), weight], {"groups": groups}
        elif name.startswith("adaptive"):
            for output_size in (1, 3, 4):
                yield name, [image], {"output_size": output_size}
        elif "pool" in name:
            for kwargs in (
                {"kernel_size": 2},
                {"kernel_size": 3, "stride": 1},
                {"kernel_size": 5, "stride": 2, "padding": 2},
            ):
                yield name, [image], kwargs
        elif name == "prelu":
            yield name, [(2, 4, 5), (4,)], {}
        else:
            yield name, [(2, 64)], {"threshold": 0.1, "value": 0.2} if name.startswith("threshold") else {}


def run_calls(dtype, place=lambda t: t, size=8, most_dims=3):
    """Runs every call forward and backward, images in both layouts. Returns the rows."""

    def run(name, tensors, kwargs):
        leaves = [place(t.to(dtype)).requires_grad_() for t in tensors]
        operands = [t.clone() for t in leaves]  # some functions work in place
        if name == "mlp":
            operands = [operands[0], operands[1:]]
        getattr(FF, name)(*operands, **kwargs).sum().backward()

    with fastops.record() as rows:
        for name, shapes, kwargs in named_calls(size):
            if len(shapes[0]) > 2 + most_dims:
                continue
            tensors = [torch.randn(shape) for shape in shapes]
            run(name, tensors, kwargs)
            last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(len(shapes[0]))
            if last is not None:
                run(name, [t.contiguous(memory_format=last) for t in tensors], kwargs)
        # Only some gradients are wanted.
        x, w, b = (place(torch.randn(shape).to(dtype)) for shape in ((6, 4), (5, 4), (5,)))
        FF.linear(x, w, b.requires_grad_()).sum().backward()
        x, w = (place(torch.randn(shape).to(dtype)) for shape in ((2, 1, 8, 8), (16, 1, 3, 3)))
        FF.conv2d(x, w.requires_grad_()).sum().backward()
    return rows


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_names_of_kernels(isa, dtype):
    """Every public function, tier, dtype and layout."""
    tier = "avx512" if isa in ("avx512_bf16", "amx") and dtype != torch.bfloat16 else isa
    expected = set(ON_CPU)
    if dtype != torch.float32:
        expected.remove("winograd")
    if dtype.itemsize == 2:
        expected.remove("conv_pool_first")
    assert algorithms(run_calls(dtype), tier, ON_CPU) == expected
