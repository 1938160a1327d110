"""fastops.record() and FASTOPS_VERBOSE: which kernels ran."""

import itertools
import json
import re
import threading
import time

import pytest
import torch
from calls import spatial
from every_op import OPS
from fresh import run_python
from reference import DTYPES
from torch.utils.flop_counter import FlopCounterMode

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
    result = run_python(code, FASTOPS_VERBOSE=value)
    assert result.returncode == 0, result.stderr
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


# ---- sums and timelines ----------------------------------------------------------------------------------------------


def test_floating_point_operations():
    """Of products, as PyTorch's counter has them; other ops have none."""
    x, image = torch.randn(16, 10), torch.randn(2, 4, 9, 9)
    w, filters = torch.randn(5, 10, requires_grad=True), torch.randn(6, 4, 3, 3, requires_grad=True)
    q = torch.randn(2, 3, 7, 8, requires_grad=True)

    def step(x, image, w, filters, q):
        FF.linear(x, w).sum().backward()
        FF.conv2d(image, filters, stride=2).sum().backward()
        FF.scaled_dot_product_attention(q, q, q).sum().backward()
        FF.gelu(x)

    with fastops.record() as calls:
        step(x, image, w, filters, q)
    found = {row.op: row.flops for row in calls}
    with FlopCounterMode(display=False) as counter:
        step(*(one.detach().requires_grad_(one.requires_grad) for one in (x, image, w, filters, q)))
    assert found["gelu"] == 0
    assert found["linear"] == found["linear_backward"] == 2 * 16 * 10 * 5
    assert found["conv2d"] == 2 * 2 * 6 * 4 * 4 * 4 * 9
    assert sum(row.flops for row in calls) == counter.get_total_flops()


def test_sums():
    x, w, b = operands()
    with fastops.record() as calls:
        for _ in range(3):
            FF.relu(FF.linear(x, w, b))
        FF.relu(torch.arange(3))
    times = calls.times()
    assert set(times) == {"linear", "relu"}
    assert times["linear"] == sum(row.microseconds for row in calls if row.op == "linear")
    assert list(times.values()) == sorted(times.values(), reverse=True)
    assert "aten" in calls.times("kernel")
    with pytest.raises(ValueError, match="by must be one of op, kernel, shapes, dtype, got 'name'"):
        calls.times("name")


def test_timeline(tmp_path):
    x, w, b = operands()
    begin = time.perf_counter() * 1e6
    with fastops.record() as calls:
        FF.linear(x, w, b)
        thread = threading.Thread(target=lambda: FF.relu(x))
        thread.start()
        thread.join()
        FF.relu(torch.arange(3))  # PyTorch's
    end = time.perf_counter() * 1e6
    assert all(begin <= row.begin <= row.begin + row.microseconds <= end for row in calls)
    calls.save_trace(tmp_path / "trace.json")
    name, *bars = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert name["ph"] == "M"
    assert [(bar["name"], bar["cat"], bar["ph"]) for bar in bars] == [
        ("linear", "fastops", "X"), ("relu", "fastops", "X"), ("relu", "aten", "X")
    ]  # fmt: skip
    assert bars[0]["ts"] == 0
    assert all(one["ts"] + one["dur"] <= two["ts"] for one, two in itertools.pairwise(bars))
    assert bars[0]["tid"] == bars[2]["tid"] == threading.get_native_id() != bars[1]["tid"]
    assert bars[0]["args"]["shapes"] == "16x10, 5x10, 5"
    assert bars[0]["args"]["flops"] == 1600
    assert bars[0]["args"]["GFLOP/s"] == pytest.approx(1.6 / bars[0]["dur"])
    assert "flops" not in bars[1]["args"]
