"""Tools that look at a model see fastops' ops as they would see PyTorch's: FLOP counters, the profiler, exporters,
selective checkpoints, tracers."""

import copy
import functools
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from calls import spatial
from every_op import LAYER_NAMES, declared, layer_input
from fresh import run_python
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

import fastops
import fastops.functional as FF
import fastops.nn as fnn

# A layer of several ops, each of which has a layer of its own.
_COMPOSED = {"TransformerEncoderLayer"}
_LAYERS, _OPS = [layer for layer in declared("LAYERS") if layer[0] not in _COMPOSED], declared("OP_LAYERS")


class Layers(nn.Module):
    """One layer of every class that has kernels, each with an input of its own."""

    def __init__(self, layers=_LAYERS):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(getattr(nn, name)(*args) for name, args in layers)

    def forward(self, inputs):
        return [layer(x) for layer, x in zip(self.layers, inputs, strict=True)]


def pair(layers=_LAYERS):
    """(plain, replaced, inputs)"""
    plain, ours = Layers(layers).eval(), Layers(layers).eval()
    fastops.replace_(ours)
    return plain, ours, [layer_input(name) for name, _ in layers]


def test_every_layer_is_here():
    assert {name for name, _ in _LAYERS} | _COMPOSED == set(LAYER_NAMES)


# ---- FLOPs -----------------------------------------------------------------------------------------------------------


def flops(model, x, order=1, autocast=False):
    x = x.clone().requires_grad_()
    counts = []
    with FlopCounterMode(display=False) as counter, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = model(x)
        counts.append(counter.get_total_flops())
        y.square().sum().backward(create_graph=order == 2)
        counts.append(counter.get_total_flops())
        if order == 2:
            x.grad.square().sum().backward()
            counts.append(counter.get_total_flops())
    return counts


_COUNTED = {
    "linear": (lambda nn: nn.Linear(5, 7), (3, 5)),
    "linear without bias": (lambda nn: nn.Linear(5, 7, bias=False), (2, 3, 4, 5)),
    "linear of a vector": (lambda nn: nn.Linear(5, 7), (5,)),
    "linear of nothing": (lambda nn: nn.Linear(5, 7), (0, 5)),
    "conv1d": (lambda nn: nn.Conv1d(4, 6, 3, padding=1), (2, 4, 6)),
    "conv2d, same": (lambda nn: nn.Conv2d(4, 6, 2, padding="same"), (2, 4, 6, 6)),
    "conv2d of one image": (lambda nn: nn.Conv2d(4, 6, 3), (4, 6, 6)),
    "conv2d, groups": (lambda nn: nn.Conv2d(4, 6, 3, stride=2, padding=2, dilation=2, groups=2), (2, 4, 6, 6)),
    "conv2d, depthwise": (lambda nn: nn.Conv2d(4, 8, 3, groups=4, bias=False), (2, 4, 6, 6)),
    "conv3d": (lambda nn: nn.Conv3d(4, 6, 3), (2, 4, 6, 6, 6)),
    "conv_transpose1d": (lambda nn: nn.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1), (2, 4, 6)),
    "conv_transpose2d, groups": (lambda nn: nn.ConvTranspose2d(4, 6, 3, padding=1, groups=2), (2, 4, 6, 6)),
    "conv_transpose3d": (lambda nn: nn.ConvTranspose3d(4, 6, 3), (2, 4, 6, 6, 6)),
}


@pytest.mark.filterwarnings("ignore:Using padding='same'", "ignore:Using backward.. with create_graph")
@pytest.mark.parametrize("case", _COUNTED)
def test_flop_counter(case):
    make, shape = _COUNTED[case]
    # PyTorch forms the second derivatives of other convolutions by convolutions of another shape.
    order = 2 if case.startswith("linear") or case == "conv1d" else 1
    theirs = flops(make(nn), torch.randn(shape), order)
    assert flops(make(fnn), torch.randn(shape), order) == theirs
    assert theirs[-1] > theirs[0] > 0 or 0 in shape


def test_flop_counter_counts_wanted_gradients_only():
    def counts(layer):
        layer.weight.requires_grad_(False)
        return flops(layer, torch.randn(2, 4, 6))

    assert counts(fnn.Conv1d(4, 6, 3)) == counts(nn.Conv1d(4, 6, 3))
    assert counts(fnn.Linear(6, 5)) == counts(nn.Linear(6, 5))


def test_flop_counter_sees_fused_ops_autocast_and_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    w, b, x = torch.randn(6, 4, 3, 3), torch.randn(6), torch.randn(2, 4, 6, 6)
    expected = flops(lambda x: F.max_pool2d(F.relu(F.conv2d(x, w, b)), 2), x)
    assert flops(lambda x: FF.conv_max_pool2d(x, w, b, activation="relu", pool_size=2), x) == expected
    weights, biases = [torch.randn(5, 4), torch.randn(3, 5)], [torch.randn(5), torch.randn(3)]
    expected = flops(nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 3)).requires_grad_(False), x[0, 0, :, :4])
    assert flops(lambda x: FF.mlp(x, weights, biases, activation="gelu"), x[0, 0, :, :4]) == expected
    layers = fnn.Linear(4, 3, activation="silu"), nn.Sequential(nn.Linear(4, 3), nn.SiLU())
    for autocast in (False, True):
        ours, theirs = (flops(layer, x[..., :4], autocast=autocast) for layer in layers)
        assert ours == theirs
    with FakeTensorMode():
        assert flops(fnn.Conv2d(4, 6, 3), torch.randn(2, 4, 6, 6)) == flops(nn.Conv2d(4, 6, 3), torch.randn(2, 4, 6, 6))


def test_flop_counter_counts_attention():
    """By PyTorch's formula, which it has for its GPU kernels; its own for the CPU has none."""
    from torch.utils.flop_counter import sdpa_backward_flop_count, sdpa_flop_count

    query, key, value = torch.randn(2, 4, 9, 16), torch.randn(2, 4, 7, 16), torch.randn(2, 4, 7, 24)
    forward, both = flops(lambda x: FF.scaled_dot_product_attention(x, key, value), query)
    shapes = query.shape, key.shape, value.shape
    assert forward == sdpa_flop_count(*shapes)
    assert both - forward == sdpa_backward_flop_count((2, 4, 9, 24), *shapes)


def test_profiler_with_flops():
    """What docs/monitoring.md says: it has a list of its own, of PyTorch's ops."""
    layers, x = [nn.Linear(4, 5), nn.Conv2d(3, 4, 3)], [torch.randn(2, 4), torch.randn(2, 3, 8, 8)]

    def counted():
        profiler = profiled(
            lambda: [layer(one) for layer, one in zip(layers, x, strict=True)], with_flops=True, record_shapes=True
        )
        return {event.key for event in profiler.key_averages() if event.flops}

    assert counted() == {"aten::addmm", "aten::conv2d"}
    with fastops.enabled():
        assert counted() == {"aten::conv2d"}
    layers = [fnn.Linear(4, 5), fnn.Conv2d(3, 4, 3)]
    assert counted() == set()


# ---- the profiler and autograd's graph -------------------------------------------------------------------------------


def profiled(function, **options):
    with profile(activities=[ProfilerActivity.CPU], **options) as profiler:
        function()
    return profiler


def ours_of(profiler):
    return [(event.name, event.input_shapes) for event in profiler.events() if event.name.startswith("fastops::")]


def test_profiler_names_ops_and_shapes():
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    w, b, weight = torch.randn(4, 3, 3, 3, requires_grad=True), torch.randn(4), torch.randn(5, 4)

    def step():
        y = FF.max_pool2d(FF.gelu(FF.conv2d(x, w, b, padding=1)), 2, return_indices=True)[0]
        FF.linear(FF.adaptive_avg_pool2d(y, 1).flatten(1), weight).sum().backward()

    profiler = profiled(step, record_shapes=True)
    seen = ours_of(profiler)
    assert seen[:5] == [
        ("fastops::conv2d", [[2, 3, 8, 8], [4, 3, 3, 3], [4]]),
        ("fastops::gelu", [[2, 4, 8, 8]]),
        ("fastops::max_pool2d", [[2, 4, 8, 8]]),
        ("fastops::adaptive_avg_pool2d", [[2, 4, 4, 4]]),
        ("fastops::linear", [[2, 4], [5, 4], []]),
    ]
    assert [name for name, _ in seen[5:]] == [
        f"fastops::{op}_backward" for op in ("linear", "adaptive_avg_pool2d", "max_pool2d", "gelu", "conv2d")
    ]
    # The gradient, then what forward saved; a weight without a gradient needs no input.
    assert seen[5][1] == [[2, 5], [], [5, 4], []]
    assert seen[9][1] == [[2, 4, 8, 8], [2, 3, 8, 8], [4, 3, 3, 3], []]
    # Backward events are linked to forward ones by their number.
    numbers = {event.name: event.sequence_nr for event in profiler.events() if event.sequence_nr >= 0}
    for forward, node in (("conv2d", "Conv2d"), ("gelu", "Gelu"), ("max_pool2d", "MaxPool2d"), ("linear", "Linear")):
        assert numbers[f"fastops::{forward}"] == numbers[f"Fastops{node}Backward"]


@pytest.mark.parametrize("name", [name for name in LAYER_NAMES if name not in _COMPOSED])
def test_profiler_names_every_layer(name):
    layer, x = getattr(fnn, name)(*dict(_LAYERS)[name]), layer_input(name).requires_grad_()
    events = [event.name for event in profiled(lambda: layer(x).sum().backward()).events()]
    [forward, backward] = [event for event in events if event.startswith("fastops::")]
    assert backward == f"{forward}_backward"
    node = layer(x).grad_fn
    while not node.name().startswith("Fastops"):
        node = node.next_functions[0][0]
    assert node.name().lower() == f"{forward.replace('::', '').replace('_', '')}backward"
    assert node.name() in events


def test_profiler_names_a_fused_pool():
    x, w = torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3, requires_grad=True)
    seen = ours_of(
        profiled(lambda: FF.conv_max_pool2d(x, w, activation="relu", pool_size=2).sum().backward(), record_shapes=True)
    )
    assert seen[0] == ("fastops::conv_max_pool2d", [[2, 3, 8, 8], [4, 3, 3, 3], []])
    assert seen[1][0] == "fastops::conv_max_pool2d_backward"


def test_profiler_names_the_general_door():
    layer = fnn.Linear(4, 3)
    events = profiled(lambda: torch.func.vmap(layer)(torch.randn(2, 5, 4)), record_shapes=True)
    assert ("fastops::linear_forward", [[2, 5, 4], [3, 4], [3], [], [], [], []]) in ours_of(events)


def test_names_of_second_derivatives():
    x = torch.randn(2, 4, 6, requires_grad=True)
    for function, name in (
        (FF.gelu, "FastopsGeluBackwardBackward"),
        (lambda x: FF.avg_pool1d(x, 2), "FastopsAvgPool1dBackwardBackward"),
    ):
        [gradient] = torch.autograd.grad(function(x).square().sum(), x, create_graph=True)
        assert gradient.grad_fn.name() == name
    assert "grad_fn=<FastopsGeluBackward>" in repr(FF.gelu(x))


def test_execution_trace(tmp_path):
    import json

    observer = torch.profiler.ExecutionTraceObserver().register_callback(str(tmp_path / "trace.json"))
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    observer.start()
    FF.max_pool2d(x, 2, return_indices=True)[0].sum().backward()
    observer.stop()
    observer.unregister_callback()
    nodes = {node["name"]: node for node in json.loads((tmp_path / "trace.json").read_text())["nodes"]}
    assert nodes["fastops::max_pool2d"]["inputs"]["shapes"] == [[2, 3, 8, 8]]
    assert nodes["fastops::max_pool2d"]["outputs"]["shapes"] == [[2, 3, 4, 4]] * 2
    assert nodes["fastops::max_pool2d_backward"]["outputs"]["shapes"] == [[2, 3, 8, 8]]


@pytest.mark.parametrize("size", [64, 1024])  # below and above what comes from the pool
def test_profiled_memory_balances(size):
    def balance(layer):
        x = torch.randn(size, 1024)

        def kept():
            y = layer(x)  # freed with the block's last line
            return y[:, :1].clone()

        layer(x)  # PyTorch's own buffers, and a block that the pool may give again
        profiler = profiled(lambda: [kept() for _ in range(3)], profile_memory=True)
        events = [event for event in profiler.events() if event.name != "[memory]"]
        everything = profiler.profiler.kineto_results.events()
        total = sum(event.nbytes() for event in everything if event.name() == "[memory]")
        allocated = sum(event.self_cpu_memory_usage for event in events if event.self_cpu_memory_usage > 0)
        return total, allocated

    ours, theirs = balance(fnn.Sigmoid()), balance(nn.Sigmoid())
    assert ours == theirs
    assert theirs[1] >= 3 * size * 1024 * 4


def test_profiled_memory_of_a_training_step():
    model = nn.Sequential(
        fnn.Conv2d(3, 32, 3), fnn.ReLU(), fnn.MaxPool2d(2), nn.Flatten(), fnn.Linear(32 * 31 * 31, 10)
    )
    x = torch.randn(16, 3, 64, 64)

    def step():
        model(x).sum().backward()

    step()  # the gradients stay
    events = profiled(step, profile_memory=True).key_averages()
    bytes_of = {event.key: event.self_cpu_memory_usage for event in events}
    assert bytes_of["fastops::conv2d"] == 16 * 32 * 62 * 62 * 4
    assert bytes_of["fastops::linear"] == 16 * 10 * 4
    assert bytes_of["fastops::max_pool2d_backward"] == 16 * 32 * 62 * 62 * 4
    assert sum(bytes_of.values()) == 0


# ---- exporters -------------------------------------------------------------------------------------------------------


def targets(program):
    return {str(node.target) for node in program.graph.nodes if node.op == "call_function"}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_exported_programs_hold_pytorchs_ops(strict):
    plain, ours, inputs = pair(_OPS if strict else _LAYERS)
    program = torch.export.export(ours, (inputs,), strict=strict)
    expected = targets(torch.export.export(plain, (inputs,), strict=strict))
    assert targets(program) - {"aten.relu6.default"} == expected  # nn.ReLU6 calls hardtanh
    torch.testing.assert_close(program.module()(inputs), plain(inputs))


@pytest.mark.parametrize("strict", [True, False])
def test_exported_fused_layers_hold_pytorchs_ops(strict):
    model = nn.Sequential(fnn.Conv1d(4, 4, 3, activation="gelu_tanh"), fnn.Linear(4, 3, activation=nn.LeakyReLU(0.2)))
    x = torch.randn(2, 4, 6)
    program = torch.export.export(model, (x,), strict=strict)
    assert not [name for name in targets(program) if "fastops" in name]
    torch.testing.assert_close(program.module()(x), model(x))


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_export_kernels(strict):
    plain, ours, inputs = pair(_OPS if strict else _LAYERS)
    with fastops.export_kernels():
        program = torch.export.export(ours, (inputs,), strict=strict)
    kept = targets(program)
    # No layers of one input, or none that replace_ makes: the tests of these ops export them.
    others = ("mse_loss", "cross_entropy", "attention", "linear_int8", "conv_int8", "weight_only", "sparse_linear")
    others += ("fake_quantize",)
    assert {op for op in map(str, fastops.decompositions()) if not any(other in op for other in others)} <= kept
    torch.testing.assert_close(program.module()(inputs), plain(inputs))
    written_out = program.run_decompositions(fastops.decompositions())
    assert not [name for name in targets(written_out) if "fastops" in name]
    torch.testing.assert_close(written_out.module()(inputs), plain(inputs))
    # Outside of the block as ever.
    assert not [name for name in targets(torch.export.export(fnn.ReLU(), (inputs[0],))) if "fastops" in name]


_LOAD = """
import sys
sys.modules["fastops"] = None
import torch
inputs, expected = torch.load(sys.argv[1] + "/tensors.pt")
torch.testing.assert_close(torch.export.load(sys.argv[1] + "/plain.pt2").module()(inputs), expected)
try:
    torch.export.load(sys.argv[1] + "/kept.pt2")
except Exception as error:
    print(error)
"""


@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_exported_programs_load_without_fastops(tmp_path):
    plain, ours, inputs = pair(_OPS)
    torch.export.save(torch.export.export(ours, (inputs,)), tmp_path / "plain.pt2")
    with fastops.export_kernels():
        torch.export.save(torch.export.export(ours, (inputs,)), tmp_path / "kept.pt2")
    torch.save((inputs, plain(inputs)), tmp_path / "tensors.pt")
    run = subprocess.run([sys.executable, "-c", _LOAD, tmp_path], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    # PyTorch's own words; all that is known of fastops in that process is the name of its ops.
    assert "failed to resolve torch.ops.fastops." in run.stderr
    assert "Please import the custom op" in run.stderr
    assert "We ran into an error when deserializing" in run.stdout


@pytest.mark.parametrize("dynamo", [True, False])
@pytest.mark.filterwarnings("ignore")
def test_onnx(dynamo, tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")

    def operators(model, inputs):
        torch.onnx.export(model, (inputs,), tmp_path / "net.onnx", dynamo=dynamo, verbose=False)
        return [node.op_type for node in onnx.load(tmp_path / "net.onnx").graph.node]

    # What PyTorch's exporter refuses itself, and did before 2.13.
    refused = ["AdaptiveAvgPool3d"] if dynamo else ["Threshold", "RMSNorm"]
    if dynamo and torch.__version__ < "2.13":
        refused += [f"AdaptiveMaxPool{d}d" for d in (1, 2, 3)]
    plain, ours, inputs = pair([layer for layer in _LAYERS if layer[0] not in refused])
    assert operators(ours, inputs) == operators(plain, inputs)
    plain, ours, inputs = pair(_OPS[:2])
    with fastops.export_kernels():
        kept = operators(ours, inputs)
    assert kept == operators(plain, inputs)


# ---- selective checkpoints -------------------------------------------------------------------------------------------


# Under torch.compile small linear layers are PyTorch's.
_PRODUCTS = [*fastops.ops.COMPUTE_INTENSIVE, torch.ops.aten.addmm.default]


def checkpointed():
    """(the gradient without checkpoint, a function that takes it with one, its argument)"""
    model = nn.Sequential(fnn.Conv1d(4, 4, 3), fnn.GELU(), fnn.Linear(4, 4), fnn.Tanh(), fnn.Linear(4, 4))
    x = torch.randn(2, 4, 6, requires_grad=True)
    contexts = functools.partial(create_selective_checkpoint_contexts, _PRODUCTS)

    def function(x):
        return checkpoint(model, x, use_reentrant=False, context_fn=contexts).square().sum()

    return torch.autograd.grad(model(x).square().sum(), x), function, x


def test_selective_checkpoint_saves_the_products():
    expected, function, x = checkpointed()
    with fastops.record() as calls:
        gradient = torch.autograd.grad(function(x), x)
    torch.testing.assert_close(gradient, expected)
    ran = [row.op for row in calls]
    assert [ran.count(op) for op in ("conv1d", "linear", "gelu")] == [1, 2, 2]


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.pool = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.MaxPool2d(2)
        self.fc1, self.fc2, self.last = nn.Linear(36, 8), nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, x):
        x = self.pool(torch.relu(self.norm(self.conv(x)))).flatten(1)
        return self.last(self.fc2(F.gelu(self.fc1(x))))


class Passes(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class Checkpoints(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.conv, self.inner, self.fc, self.reentrant = nn.Conv2d(3, 3, 1), Inner(), nn.Linear(8, 8), reentrant

    def forward(self, x):
        return torch.tanh(self.fc(checkpoint(self.inner, self.conv(x), use_reentrant=self.reentrant)))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("way", ["fuse", "replace_"])
@pytest.mark.parametrize("around", ["selective", "a mode", "selective, twice"])
def test_a_checkpoint_inside_of_modes(around, way, reentrant):
    """What is computed again after the mode has ended saves what was saved inside of it."""
    torch.manual_seed(0)
    plain = Checkpoints(reentrant)
    model = copy.deepcopy(plain)
    if way == "fuse":
        model = fastops.fuse(model)
    else:
        fastops.replace_(model)
    contexts = functools.partial(create_selective_checkpoint_contexts, _PRODUCTS)

    def run(model, x):
        if around == "a mode":
            with Passes():
                return model(x)
        y = checkpoint(model, x, use_reentrant=False, context_fn=contexts)
        if around == "selective":
            return y
        outer = lambda x: checkpoint(model, x * 2, use_reentrant=False, context_fn=contexts)  # noqa: E731
        return y + checkpoint(outer, x, use_reentrant=False)

    x = torch.randn(2, 3, 8, 8)
    gradients = []
    for one in (plain, model):
        given = x.clone().requires_grad_()
        run(one, given).square().sum().backward()
        gradients.append([given.grad, *(parameter.grad for parameter in one.parameters())])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-5)


def test_compiled_selective_checkpoint_saves_the_products():
    from torch._dynamo.backends.common import aot_autograd

    graphs = []

    def keep(graph, inputs):
        graphs.append([node.target for node in graph.graph.nodes])
        return graph

    torch._dynamo.reset()
    expected, function, x = checkpointed()
    compiled = torch.compile(function, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep), fullgraph=True)
    torch.testing.assert_close(torch.autograd.grad(compiled(x), x), expected)
    forward, backward = ([op for op in graph if op in _PRODUCTS] for graph in graphs)
    assert len(forward) == 3
    assert backward == []
    assert torch.ops.aten.gelu.default in graphs[1]


# ---- others ----------------------------------------------------------------------------------------------------------


def both_ways(layer, x):
    """(args, the op's results, its decomposition's) of every op in a call of the layer, with and without gradient."""
    table, found = fastops.decompositions(), []

    class Both(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            result = op(*args, **(kwargs or {}))
            if op in table:
                found.append((args, result, table[op](*args)))
            return result

    for wanted in (False, True):
        with Both():
            layer(x.requires_grad_(wanted))
    assert len(found) == 2
    return found


@pytest.mark.parametrize("case", _LAYERS, ids=str)
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_decompositions_give_every_result(case):
    """Those that only backward reads as well."""
    name, args = case
    x = layer_input(name)
    if not spatial(name) and name not in (
        "Linear",
        "LayerNorm",
        "RMSNorm",
    ):  # every bound of the piecewise linear ones, and beyond
        bounds = [torch.nan, *(x / 2 for x in range(-14, 15)), 0.1, -0.0, 1e30, -1e30]
        x = torch.tensor(bounds + [0.2] * 6).reshape(1, 4, 10)
    for call, ours, theirs in both_ways(getattr(fnn, name)(*args), x):
        if call[-1] == "compact":  # written out, they are positions in the plane
            geometry = call[0].shape, *call[2:7], len(call[1] or call[2])
            ours = ours[0], torch.ops.fastops.max_pool_positions(ours[1], *geometry)
        torch.testing.assert_close(ours, theirs, equal_nan=True)


@pytest.mark.parametrize("activation", ["gelu", "relu", "softplus"])
def test_decompositions_of_fused_layers(activation):
    for layer in (fnn.Linear(6, 5, activation=activation), fnn.ConvTranspose1d(4, 6, 3, activation=activation)):
        for _, ours, theirs in both_ways(layer, torch.randn(2, 4, 6)):
            torch.testing.assert_close(ours, theirs)


_IMPORT = """
import sys, fastops
print([name for name in ("torch._dynamo", "sympy", "torch.utils.flop_counter") if name in sys.modules])
from torch.utils.flop_counter import FlopCounterMode, flop_registry
print(sorted(str(op) for op in flop_registry if "fastops" in str(op)))
"""


def test_import_is_light():
    """PyTorch loads these when they are needed (Dynamo takes a second), and the FLOP formulas are there then."""
    run = run_python(_IMPORT)
    assert run.returncode == 0, run.stderr
    loaded, registered = run.stdout.splitlines()
    assert loaded == "[]"
    both = [f"fastops.{op}_{way}" for op in ("attention", "conv", "linear") for way in ("backward", "forward")]
    assert registered == str(sorted([*both, "fastops.conv_int8_forward"]))


def test_make_fx_and_shape_propagation():
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.passes.shape_prop import ShapeProp

    model = nn.Sequential(fnn.Conv1d(4, 6, 3), fnn.ReLU(), fnn.Linear(4, 5))
    x = torch.randn(2, 4, 6)
    graph = make_fx(model)(x)
    torch.testing.assert_close(graph(x), model(x))
    ShapeProp(graph).propagate(x)
    found = [node.meta["tensor_meta"].shape for node in graph.graph.nodes if node.name.startswith("getitem")]
    assert [2, 6, 4] in map(list, found)
    assert [2, 6, 5] in map(list, found)
