"""Threads and processes: the same bits for any number of threads, and after a fork."""

import multiprocessing
import threading

import pytest
import torch
from compare import exact
from each import each
from fresh import run_python
from reference import DTYPES, Conv

import fastops
import fastops.functional as FF
import fastops.nn as fnn

# Large enough for both threads to get work, in every way a product can be split.
SHAPES = [(256, 256, 256), (1000, 40, 64), (8, 1000, 300), (64, 64, 5000), (1, 3000, 700), (300, 1, 700), (33, 700, 65)]


def training_step(x, w, b, activation):
    tensors = [t.detach().clone().requires_grad_() for t in (x, w, b)]
    output = FF.linear(*tensors, activation=activation)
    grad = torch.linspace(-1, 1, output.numel()).view(output.shape).to(output.dtype)
    return output.detach(), *torch.autograd.grad(output, tensors, grad)


@pytest.mark.parametrize("dtype", DTYPES)
@each("shape", SHAPES)
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_linear_bits_for_1_and_2_threads_and_run_to_run(isa, dtype, shape, activation):
    m, n, k = shape
    x, w, b = (torch.randn(s).to(dtype) for s in ((m, k), (n, k), (n,)))
    before = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            results.append(training_step(x, w, b, activation))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for name, one, two in zip(("output", "input", "weight", "bias"), results[0], other, strict=True):
            assert torch.equal(one, two), name


# The same of convolutions: every algorithm, with few and with many channels, images and positions.
CONVS = [
    Conv(8, 1, 32, (28, 28), (3, 3), padding=1),
    Conv(2, 3, 40, (50, 52), (7, 7), stride=2, padding=3),
    Conv(2, 48, 64, (20, 21), (3, 3), padding=1),
    Conv(1, 130, 70, (9, 9), (3, 3), padding=1),
    Conv(3, 64, 100, (15, 17), (1, 1)),
    Conv(4, 33, 33, (23, 20), (3, 3), padding=1, groups=33),
    Conv(2, 16, 16, (40, 41), (5, 5), stride=2, padding=2, groups=16),
    Conv(4, 12, 20, (30, 31), (3, 3), stride=2, groups=2),
    Conv(2, 20, 30, (700,), (5,), padding=2),
    Conv(1, 6, 9, (9, 10, 30), (3, 3, 3), padding=1),
    Conv(2, 24, 30, (13, 16), (4, 4), stride=2, padding=1, transposed=True),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
@each("conv", CONVS)
def test_conv_bits_for_1_and_2_threads_and_run_to_run(isa, dtype, conv, last):
    x, w, b = (torch.randn(shape).to(dtype) for shape in conv.shapes)
    if last:
        if x.dim() != 4:
            pytest.skip("two dimensions are enough")
        x, w = (t.contiguous(memory_format=torch.channels_last) for t in (x, w))
    before = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            tensors = [t.detach().clone().requires_grad_() for t in (x, w, b)]
            output = conv.ours(*tensors, activation="relu")
            grad = torch.linspace(-1, 1, output.numel()).view(output.shape).to(dtype)
            results.append((output.detach(), *torch.autograd.grad(output, tensors, grad)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for name, one, two in zip(("output", "input", "weight", "bias"), results[0], other, strict=True):
            assert torch.equal(one, two), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_prelu_and_glu_bits(isa, dtype):
    x, w = torch.randn(40, 16, 300).to(dtype), torch.rand(16).to(dtype)
    before = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            a, v = x.clone().requires_grad_(), w.clone().requires_grad_()
            output = FF.glu(FF.prelu(a, v), 1)
            results.append((output.detach(), *torch.autograd.grad(output.float().square().sum(), (a, v))))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert torch.equal(one, two)


def test_calls_from_many_threads_at_once():
    x, w, b = torch.randn(200, 150), torch.randn(170, 150), torch.randn(170)
    expected = training_step(x, w, b, "tanh")
    problems = []

    def work():
        for _ in range(20):
            for one, two in zip(expected, training_step(x, w, b, "tanh"), strict=True):
                if not torch.equal(one, two):
                    problems.append("different")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []


def test_backward_on_another_thread():
    w = torch.randn(30, 40, requires_grad=True)
    loss = FF.linear(torch.randn(20, 40), w, activation="gelu").sum()
    thread = threading.Thread(target=lambda: loss.backward(retain_graph=True))
    thread.start()
    thread.join()
    actual, w.grad = w.grad, None
    loss.backward()
    exact(actual, w.grad)


def test_the_number_of_threads_is_respected():
    """With one thread a call runs in the thread that calls, with two there is one worker, and it is PyTorch's own.

    Seen from a fresh process, whose threads are counted.
    """
    code = """
import os, torch
import fastops.functional as FF

def count(function, threads):
    torch.set_num_threads(threads)
    for _ in range(3):
        function()
    print(len(os.listdir("/proc/self/task")))

x = torch.randn(600, 600)
ours = lambda: FF.gelu(FF.linear(x, x))
count(lambda: None, 1)
count(ours, 1)
count(ours, 2)
count(lambda: torch.tanh(torch.ones(1_000_000)), 2)
"""
    result = run_python(code, FASTOPS_TEAM="openmp")  # whatever else this machine has to do
    assert result.returncode == 0, result.stderr
    before, alone, two, theirs = map(int, result.stdout.split())
    assert alone == before
    assert two == before + 1
    assert theirs == two


def _child(x, w, expected, queue):
    # What is checked is checked by numpy: PyTorch's own parallel loops hang in the child of a process that has used
    # them.
    output = FF.linear(x, w, activation="relu").numpy()
    large = FF.relu(torch.randn(3000, 3000)).numpy()  # from the pool of large outputs
    convolved = FF.conv2d(x.view(1, 1, 300, 200), w.view(1, 100, 1, 200)[:, :1]).numpy()
    queue.put(((output == expected.numpy()).all(), (large >= 0).all(), convolved.shape == (1, 1, 300, 1)))


def run_child():
    x, w = torch.randn(300, 200), torch.randn(100, 200)
    expected = FF.linear(x, w, activation="relu")
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=_child, args=(x, w, expected, queue))
    child.start()
    child.join(60)
    alive = child.is_alive()
    if alive:
        child.kill()
    assert not alive, "the child hangs"
    assert child.exitcode == 0
    assert queue.get() == (True, True, True)


def test_fork_after_use():
    torch.set_num_threads(2)
    x = torch.randn(500, 500)
    FF.linear(x, x)
    FF.relu(torch.randn(3000, 3000))
    run_child()
    exact(FF.relu(x), x.clamp(min=0))


class Preprocessed(torch.utils.data.Dataset):
    """A data set whose items have been through a layer, in the worker."""

    def __init__(self):
        self.layer = fnn.Linear(64, 32, activation="gelu").requires_grad_(False)
        self.x = torch.randn(40, 8, 64)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.layer(self.x[i])


def test_data_loader_workers():
    data = Preprocessed()
    expected = torch.stack([data[i] for i in range(len(data))])
    loader = torch.utils.data.DataLoader(data, batch_size=10, num_workers=2, multiprocessing_context="fork", timeout=60)
    exact(torch.cat(list(loader)), expected)


def test_share_memory_of_a_replaced_model():
    model = torch.nn.Sequential(torch.nn.Linear(4, 3))
    fastops.replace_(model)
    model.share_memory()
    assert model[0].weight.is_shared()
