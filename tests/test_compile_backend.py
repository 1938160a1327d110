"""torch.compile(backend="fastops"): values, gradients, what runs, and how often it compiles."""

import copy
import functools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.backends.registry import list_backends, register_backend
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import fastops
from fastops.backend import fastops as backend

if "fastops" not in list_backends():  # what the entry point of an installed package does
    register_backend(backend, name="fastops")


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


class Net(nn.Module):
    """Modules, functions, methods, a residual addition and something that fastops has no function for."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.fc1, self.fc2 = nn.Linear(72, 32), nn.Linear(32, 10)
        self.dropout = nn.Dropout(0.0)

    def forward(self, x):
        x = F.max_pool2d(torch.relu(self.conv1(x)), 2)
        x = self.norm(self.conv2(x)).relu() + x
        x = F.adaptive_avg_pool2d(x, 3).flatten(1).cumsum(1)
        return self.fc2(self.dropout(F.gelu(self.fc1(x), approximate="tanh"))).log_softmax(-1)


def step(model, run, x):
    model.zero_grad()
    y = run(x)
    y.square().mean().backward()
    return [y.detach(), *(p.grad.clone() for p in model.parameters())]


def pair(replaced=False):
    model = Net()
    other = copy.deepcopy(model)
    if replaced:
        fastops.replace_(model)
    return model, other


def assert_same_steps(model, other, compiled, x):
    for actual, expected in zip(step(model, compiled, x), step(other, other, x), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    for actual, expected in zip(model.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rest", ["eager", "inductor"])
@pytest.mark.parametrize("replaced", [False, True], ids=["plain", "replaced"])
def test_training_and_inference(rest, replaced):
    model, other = pair(replaced)
    compiled = torch.compile(model, backend="fastops", fullgraph=True, options={"rest": rest})
    x = torch.randn(4, 1, 12, 12)
    for _ in range(2):
        assert_same_steps(model, other, compiled, x)
    model.eval()
    other.eval()
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), other(x), rtol=1e-4, atol=1e-5)
    with torch.inference_mode():
        torch.testing.assert_close(compiled(x), other(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("replaced", [False, True], ids=["plain", "replaced"])
def test_what_runs(replaced):
    model, _ = pair(replaced)
    compiled = torch.compile(model, backend="fastops", fullgraph=True)
    x = torch.randn(4, 1, 12, 12)
    compiled(x)
    with fastops.record() as calls:
        compiled(x).sum().backward()
    ran = [row.op for row in calls if row.kernel != "aten"]
    assert {"conv_max_pool2d", "conv2d", "adaptive_avg_pool2d", "linear_backward"} <= set(ran)
    assert "gelu_tanh" not in ran  # in linear's kernel
    assert not [row for row in calls if row.kernel == "aten"]


def test_chains_are_one_call():
    model = nn.Sequential(nn.Linear(10, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 1))
    compiled = torch.compile(model, backend="fastops", fullgraph=True)
    x = torch.randn(100, 10)
    torch.testing.assert_close(compiled(x), model(x))
    with fastops.record() as calls:
        compiled(x)
    assert [row.op for row in calls] == ["mlp"]


@pytest.mark.parametrize("dynamic", [None, True])
def test_recompiles_are_bounded(dynamic):
    """One graph for the first size, and at most one for all others."""
    model, other = pair()
    counter = CompileCounterWithBackend("fastops")
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=dynamic)
    for batch in (4, 5, 7, 9, 2, 4):
        assert_same_steps(model, other, compiled, torch.randn(batch, 1, 12, 12))
    assert counter.frame_count <= (2 if dynamic is None else 1)
    assert counters["graph_break"] == {}


def test_replaced_models_with_dynamic_shapes():
    model, other = pair(replaced=True)
    compiled = torch.compile(model, backend="fastops", fullgraph=True, dynamic=True)
    sizes = (4, 12), (3, 13), (2, 20)
    for batch, size in sizes:
        assert_same_steps(model, other, compiled, torch.randn(batch, 1, size, size))
    graphs = counters["stats"]["unique_graphs"]
    # As many as PyTorch's own layers need: before 2.12 their pooling compiles again for odd sizes.
    counter = CompileCounterWithBackend("eager")
    plain = torch.compile(pair()[0], backend=counter, fullgraph=True, dynamic=True)
    for batch, size in sizes:
        plain(torch.randn(batch, 1, size, size))
    assert graphs == counter.frame_count


def test_second_derivatives_and_autocast():
    layer = nn.Sequential(nn.Linear(6, 4), nn.Tanh())
    compiled = torch.compile(layer, backend="fastops", fullgraph=True)
    x = torch.randn(3, 6, requires_grad=True)

    def second(run):
        (gradient,) = torch.autograd.grad(run(x).sum(), x, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), [x, *layer.parameters()], allow_unused=True)

    for actual, expected in zip(second(compiled), second(layer), strict=True):
        if expected is not None:
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu"):
        assert compiled(x).dtype is torch.bfloat16


def test_graph_breaks_and_what_has_no_kernel():
    def function(x, w):
        y = F.relu(F.linear(x, w))
        torch._dynamo.graph_break()
        return F.linear(y, w.t()).sigmoid()

    compiled = torch.compile(function, backend="fastops")
    for dtype in (torch.float32, torch.complex64):
        x, w = torch.randn(3, 4, dtype=dtype), torch.randn(5, 4, dtype=dtype)
        if dtype.is_complex:
            with pytest.raises(RuntimeError):
                function(x, w)
            continue
        torch.testing.assert_close(compiled(x, w), function(x, w))
    complex_linear = torch.compile(F.linear, backend="fastops")
    z = torch.randn(3, 3, dtype=torch.complex64)
    torch.testing.assert_close(complex_linear(z, z), F.linear(z, z))


def test_checkpoints_have_the_random_state_of_their_forward():
    def policy(ctx, op, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if op is torch.ops.aten.relu.default else CheckpointPolicy.PREFER_RECOMPUTE

    part = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Dropout(0.5))
    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    for options in ({}, {"context_fn": contexts}):

        def inner(x, y, scale=1.0, nested=not options):
            z = checkpoint(part, x, use_reentrant=False) if nested else part(x)
            return z * y * scale

        def run(x, y, options=options, inner=inner):
            return checkpoint(inner, x, use_reentrant=False, y=y, scale=2.0, **options) * 2

        x, y = torch.randn(4, 8, requires_grad=True), torch.randn(4, 16)
        results = []
        for function in (run, torch.compile(run, backend=backend, fullgraph=True)):
            torch.manual_seed(0)
            output = function(x, y)
            results.append([output, *torch.autograd.grad(output.sum(), [x, *part.parameters()])])
        torch.testing.assert_close(results[1], results[0])
    with fastops.record() as rows:
        torch.compile(run, backend=backend, fullgraph=True)(x, y)
    assert [row.op for row in rows] == ["linear"]  # with its activation


def test_options():
    model, x = nn.Linear(4, 3), torch.randn(2, 4)
    for options, message in (({"rest": "tvm"}, "'tvm'"), ({"remainder": 1}, "'remainder'")):
        compiled = torch.compile(model, backend="fastops", options=options)
        with pytest.raises(Exception, match=message):
            compiled(x)
        torch._dynamo.reset()


def test_entry_point():
    text = (Path(__file__).resolve().parents[1] / "pyproject.toml").read_text()
    line = f'[project.entry-points.torch_dynamo_backends]\nfastops = "{backend.__module__}:{backend.__name__}"'
    assert line in text


# Blocks that end or begin between what would be one call.
FC = nn.Linear(6, 6)
HALF = functools.partial(torch.autocast, "cpu", torch.bfloat16)
BLOCKS = {"autocast": HALF, "no_grad": torch.no_grad, "inference_mode": torch.inference_mode}


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("outer", [HALF, torch.enable_grad])
def test_blocks_between_layers(name, outer):
    block = BLOCKS[name]

    def after(x):
        y = FC(x)
        with block():
            return torch.relu(y) + 0

    def before(x):
        with block():
            y = FC(x)
        return torch.relu(y) + 0

    def off(x):
        y = FC(x)
        with torch.autocast("cpu", enabled=False):
            return torch.relu(y) + 0

    x = torch.randn(4, 6, requires_grad=True)
    for run in (after, before, off):
        compiled = torch.compile(run, backend="fastops", fullgraph=name != "inference_mode")
        with outer():
            ours, theirs = compiled(x), run(x)
        assert ours.dtype == theirs.dtype, run
        assert ours.requires_grad == theirs.requires_grad, run
        torch.testing.assert_close(ours, theirs, rtol=2e-2 if ours.dtype == torch.bfloat16 else 1e-5, atol=1e-2)
