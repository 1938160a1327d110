"""Everything that has to see the op: torch.func, forward mode, torch.compile, export, fake tensors, checkpoints."""

import copy
import sys

import pytest
import torch
import torch.nn.functional as F
from reference import ACTIVATIONS, Conv
from torch import nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils.checkpoint import checkpoint

import fastops
import fastops.functional as FF
import fastops.nn as fnn

PICKED = [case for case in ACTIVATIONS if not (case.kwargs and case.kind != "gelu_tanh" and case.kind != "threshold")]
LINEARS = [None, *[case for case in PICKED if case.kind != "threshold"]]

# PyTorch has no second derivative of these: ours are right, and compared with a formula that can be differentiated.
COMPOSITE = {
    "hardsigmoid": lambda x: (x + 3).clamp(0, 6) / 6,
    "hardswish": lambda x: x * (x + 3).clamp(0, 6) / 6,
    "glu": lambda x: x.chunk(2, -1)[0] * x.chunk(2, -1)[1].sigmoid(),
}


def linear_pair(case):
    name = None if case is None else case.kind
    function = (lambda z: z) if case is None else COMPOSITE.get(case.kind, case.theirs)
    return (
        lambda x, w, b: FF.linear(x, w, b, activation=name).square().sum(),
        lambda x, w, b: function(F.linear(x, w, b)).square().sum(),
    )


def same(pair, transform):
    torch.testing.assert_close(transform(pair[0]), transform(pair[1]))


@pytest.mark.parametrize("case", LINEARS, ids=str)
def test_func_linear(case):
    pair, every = linear_pair(case), (0, 1, 2)
    x, w, b = (torch.randn(shape, dtype=torch.float64) for shape in ((3, 4), (5, 4), (5,)))
    xs, ws, bs = (torch.stack([t, -t, 2 * t]) for t in (x, w, b))
    same(pair, lambda f: grad(f, every)(x, w, b))
    same(pair, lambda f: jvp(f, (x, w, b), (x, w, b)))
    same(pair, lambda f: vjp(f, x, w, b)[1](torch.tensor(1.0, dtype=torch.float64)))
    same(pair, lambda f: hessian(f, every)(x, w, b))
    same(pair, lambda f: jacrev(jacrev(f, every), every)(x, w, b))
    same(pair, lambda f: jacfwd(jacfwd(f, every), every)(x, w, b))
    same(pair, lambda f: jacrev(jacfwd(f, every), every)(x, w, b))
    same(pair, lambda f: vmap(grad(f, every), (0, None, None))(xs, w, b))
    same(pair, lambda f: vmap(grad(f, every), (0, 0, 0))(xs, ws, bs))
    same(pair, lambda f: vmap(grad(f, every), (None, 0, None))(x, ws, b))
    same(pair, lambda f: vmap(grad(f, every), (None, None, 0))(x, w, bs))
    same(pair, lambda f: vmap(f, (1, 2, 1))(xs.movedim(0, 1), ws.movedim(0, 2), bs.movedim(0, 1)))
    same(pair, lambda f: vmap(vmap(grad(f), (0, None, None)), (None, 0, 0))(xs, ws, bs))
    same(pair, lambda f: grad(lambda t: vmap(f, (0, None, None))(t, w, b).sum())(xs))
    same(pair, lambda f: vmap(grad(f, every), (0, None, None))(xs[:, 0], w, b))  # vectors


CONVS = [
    Conv(2, 2, 3, (5, 4), (3, 2), padding=1),
    Conv(1, 4, 2, (6,), (2,), stride=2, groups=2),
    Conv(1, 2, 2, (3, 4), (2, 3), padding="same"),
    Conv(2, 2, 2, (2, 3), (3, 2), stride=2, padding=1, transposed=True, output_padding=1),
    Conv(1, 2, 2, (2, 3, 2), (1, 2, 2), groups=2, transposed=True),
]


@pytest.mark.parametrize("conv", CONVS, ids=str)
@pytest.mark.parametrize("case", [None, *[case for case in LINEARS if case and case.kind in ("gelu", "tanh")]], ids=str)
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_func_conv(conv, case):
    name = None if case is None else case.kind
    function = (lambda z: z) if case is None else case.theirs
    pair = (
        lambda *t: conv.ours(*t, activation=name).square().sum(),
        lambda *t: function(conv.theirs(*t)).square().sum(),
    )
    every = (0, 1, 2)
    x, w, b = (torch.randn(shape, dtype=torch.float64) for shape in conv.shapes)
    xs, ws, bs = (torch.stack([t, -t, 2 * t]) for t in (x, w, b))
    same(pair, lambda f: grad(f, every)(x, w, b))
    same(pair, lambda f: jvp(f, (x, w, b), (x, w, b)))
    same(pair, lambda f: vjp(f, x, w, b)[1](torch.tensor(1.0, dtype=torch.float64)))
    same(pair, lambda f: hessian(f, every)(x, w, b))
    same(pair, lambda f: jacrev(jacrev(f, every), every)(x, w, b))
    same(pair, lambda f: jacfwd(jacfwd(f, every), every)(x, w, b))
    same(pair, lambda f: vmap(grad(f, every), (0, None, None))(xs, w, b))
    same(pair, lambda f: vmap(grad(f, every), (0, 0, 0))(xs, ws, bs))
    same(pair, lambda f: vmap(grad(f, every), (None, 0, None))(x, ws, b))
    same(pair, lambda f: vmap(grad(f, every), (None, None, 0))(x, w, bs))
    same(pair, lambda f: vmap(f, (1, 2, 1))(xs.movedim(0, 1), ws.movedim(0, 2), bs.movedim(0, 1)))
    same(pair, lambda f: vmap(vmap(grad(f), (0, None, None)), (None, 0, 0))(xs, ws, bs))
    same(pair, lambda f: grad(lambda t: vmap(f, (0, None, None))(t, w, b).sum())(xs))
    same(pair, lambda f: vmap(grad(f, every), (0, None, None))(xs[:, 0], w, b))  # without batch


def conv_net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 6, 4, padding="same", groups=6),
        nn.Conv2d(6, 8, 3, stride=2, padding=1, padding_mode="circular"), nn.GELU(),
        nn.ConvTranspose2d(8, 4, 3, stride=2, padding=1, output_padding=1), nn.Conv2d(4, 3, 1), nn.Flatten(2),
        nn.Conv1d(3, 4, 5, dilation=2), nn.Tanh(), nn.ConvTranspose1d(4, 2, 1), nn.Unflatten(2, (2, 4, 5)),
        nn.Conv3d(2, 3, 2), nn.ConvTranspose3d(3, 1, (1, 2, 1), bias=False),
    )  # fmt: skip


def conv_nets():
    ours, theirs = conv_net(), conv_net()
    assert len(fastops.replace_(ours).replaced) == 12
    return ours, theirs


@pytest.mark.parametrize(("backend", "last"), [("aot_eager", False), ("aot_eager", True), ("inductor", True)])
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_compile_conv(backend, last):
    torch._dynamo.reset()
    ours, theirs = conv_nets()
    x = torch.randn(2, 2, 6, 7)
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    compiled = torch.compile(ours, fullgraph=True, backend=backend)
    compare_models(compiled, theirs, x, (ours, theirs))
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), theirs(x), atol=1e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_compile_conv_with_dynamic_shapes():
    torch._dynamo.reset()
    layers = nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.ReLU(), nn.ConvTranspose2d(6, 4, 3, stride=2))
    twin = copy.deepcopy(layers)
    fastops.replace_(layers)
    compiled = torch.compile(layers, fullgraph=True, backend="aot_eager", dynamic=True)
    for shape in ((2, 2, 6, 7), (3, 2, 9, 5)):
        compare_models(compiled, twin, torch.randn(shape), (layers, twin))


def test_compiled_graph_holds_one_op_a_convolution():
    torch._dynamo.reset()
    targets = []

    def backend(graph, inputs):
        targets.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    layer = fnn.Conv2d(4, 3, 4, padding="same", activation=nn.LeakyReLU(0.2))
    torch.compile(layer, fullgraph=True, backend=backend)(torch.randn(2, 4, 5, 5))
    assert "fastops.conv_forward" in targets
    assert not [name for name in targets if "leaky_relu" in name or "pad" in name]


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_export_conv(strict):
    ours, theirs = conv_nets()
    x = torch.randn(2, 2, 6, 7)
    with fastops.export_kernels():
        program = torch.export.export(ours, (x,), strict=strict)
    assert "fastops.conv_forward.default" in {str(node.target) for node in program.graph.nodes}
    torch.testing.assert_close(program.module()(x), theirs(x), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(program.run_decompositions().module()(x), theirs(x), atol=1e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_meta_conv():
    expected = conv_net()(torch.randn(2, 2, 6, 7))
    model = conv_nets()[0].to("meta")
    output = model(torch.randn(2, 2, 6, 7, device="meta"))
    output.sum().backward()
    assert output.shape == expected.shape
    assert all(p.grad.shape == p.shape and p.grad.device.type == "meta" for p in model.parameters())


@pytest.mark.parametrize("conv", CONVS, ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
def test_fake_conv(conv, last):
    """Fake tensors have the shapes and strides of real ones."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    memory_format = {1: torch.contiguous_format, 2: torch.channels_last, 3: torch.channels_last_3d}[len(conv.size)]

    def run():
        x, w, b = (torch.randn(shape) for shape in conv.shapes)
        if last:
            x = x.contiguous(memory_format=memory_format)
        tensors = [t.requires_grad_() for t in (x, w, b)]
        output = conv.ours(*tensors, activation="gelu")
        return output, *torch.autograd.grad(output.sum(), tensors)

    with FakeTensorMode():
        fake = run()
    for one, two in zip(fake, run(), strict=True):
        assert one.shape == two.shape
        assert one.stride() == two.stride()


@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
def test_compiled_autograd(activation):
    """torch.compile over the backward pass of eager calls: it packs and unpacks what nodes remember."""
    from torch._dynamo import compiled_autograd

    conv = Conv(2, 4, 6, (6, 5), (3, 2), stride=2, padding=1, groups=2, transposed=True, output_padding=1)
    calls = (
        (lambda x, w, b: FF.linear(x, w, b, activation=activation), ((4, 6), (5, 6), (5,))),
        (lambda x, w, b: FF.conv1d(x, w, b, 2, "valid", activation=activation), ((2, 4, 9), (5, 4, 3), (5,))),
        (lambda *t: conv.ours(*t, activation=activation), conv.shapes),
    )
    if activation is None:
        calls += (
            (FF.glu, ((4, 6),)),
            (FF.prelu, ((2, 3, 4), (3,))),
            (FF.tanh, ((4, 6),)),
            (lambda x: FF.max_pool2d(x, 2), ((1, 2, 4, 6),)),
            (lambda x: FF.avg_pool2d(x, 2), ((1, 2, 4, 6),)),
        )
    for function, shapes in calls:
        torch._dynamo.reset()
        tensors = [torch.randn(shape, requires_grad=True) for shape in shapes]
        function(*tensors).square().sum().backward()
        expected = [t.grad for t in tensors]
        for t in tensors:
            t.grad = None
        with compiled_autograd._enable(torch.compile(backend="aot_eager")):
            function(*tensors).square().sum().backward()
        torch.testing.assert_close([t.grad for t in tensors], expected)


def test_conv_under_checkpoint_and_saved_tensors_hooks():
    ours, theirs = conv_nets()
    ours, theirs = ours[:2], theirs[:2]
    x = torch.ones(2, 2, 6, 7)

    def run(x):
        with torch.autograd.graph.save_on_cpu():
            return checkpoint(ours, x, use_reentrant=False)

    compare_models(run, theirs, x, (ours, theirs))


def functions():
    for case in PICKED:
        yield str(case), case.ours, COMPOSITE.get(case.kind, case.theirs), ()
    yield "prelu", FF.prelu, F.prelu, (torch.rand(6, dtype=torch.float64),)
    yield "prelu-1", FF.prelu, F.prelu, (torch.rand(1, dtype=torch.float64),)
    yield "glu", FF.glu, COMPOSITE["glu"], ()


@pytest.mark.parametrize(("ours", "theirs", "more"), [pytest.param(*rest, id=name) for name, *rest in functions()])
def test_func_activation(ours, theirs, more):
    pair = tuple(lambda *t, f=f: f(*t).square().sum() for f in (ours, theirs))
    every = tuple(range(1 + len(more)))
    rest = (None,) * len(more)
    x = torch.randn(4, 6, dtype=torch.float64)
    xs = torch.randn(5, 4, 6, dtype=torch.float64)
    same(pair, lambda f: grad(f, every)(x, *more))
    same(pair, lambda f: jvp(f, (x, *more), (x, *more)))
    same(pair, lambda f: hessian(f, every)(x, *more))
    same(pair, lambda f: jacrev(jacrev(f, every), every)(x, *more))
    same(pair, lambda f: jacfwd(jacfwd(f, every), every)(x, *more))
    same(pair, lambda f: vmap(grad(f, every), (0, *rest))(xs, *more))
    same(pair, lambda f: vmap(grad(f), (0, *rest))(xs[:, 0], *more) if not more else grad(f)(x, *more))
    same(pair, lambda f: vmap(vmap(grad(f), (0, *rest)), (0, *rest))(torch.stack([xs, -xs]), *more))
    for dim in range(3):
        same((ours, theirs), lambda f, d=dim: vmap(f, (d, *rest), out_dims=1)(xs.movedim(0, d), *more))
    if more:
        ws = torch.stack([more[0] * i for i in range(5)])
        same(pair, lambda f: vmap(grad(f, every), (0, 0))(xs, ws))
        same(pair, lambda f: vmap(grad(f, every), (None, 0))(x, ws))


def test_per_sample_gradients_of_a_model():
    model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3))
    x, y = torch.randn(5, 6), torch.randint(3, (5,))

    def loss(parameters, x, y):
        return F.cross_entropy(functional_call(model, parameters, (x[None],)), y[None])

    parameters = {name: p.detach() for name, p in model.named_parameters()}
    expected = vmap(grad(loss), (None, 0, 0))(parameters, x, y)
    with fastops.replaced(model):
        actual = vmap(grad(loss), (None, 0, 0))(parameters, x, y)
    torch.testing.assert_close(actual, expected)


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 16), nn.GELU(), nn.Hardtanh(), nn.Tanh(), nn.PReLU(),
        nn.LeakyReLU(0.2, inplace=True), nn.Sigmoid(), nn.GLU(), nn.Linear(8, 3, bias=False),
    )  # fmt: skip


def replaced_net():
    model = net()
    fastops.replace_(model)
    return model


def compare_models(ours, theirs, x, models=None):
    parameters = [list(m.parameters()) for m in (models or (ours, theirs))]
    outputs = [m(x) for m in (ours, theirs)]
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-4)
    grads = [torch.autograd.grad(o.square().sum(), p) for o, p in zip(outputs, parameters, strict=True)]
    torch.testing.assert_close(*grads, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(backend, dynamic):
    torch._dynamo.reset()
    ours, theirs = replaced_net(), net()
    compiled = torch.compile(ours, fullgraph=True, backend=backend, dynamic=dynamic)
    for rows in (5, 7) if dynamic else (5,):
        compare_models(compiled, theirs, torch.randn(rows, 10), (ours, theirs))
    with torch.no_grad():
        x = torch.randn(5, 10)
        torch.testing.assert_close(compiled(x), theirs(x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("case", PICKED, ids=str)
def test_compile_every_function(case):
    torch._dynamo.reset()

    def function(x, w, b):
        fused = FF.linear(x, w, b) if case.kind == "threshold" else FF.linear(x, w, b, activation=case.kind)
        return case.ours(fused)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    tensors = [torch.randn(shape, requires_grad=True) for shape in ((4, 6), (5, 6), (5,))]
    outputs = compiled(*tensors), function(*tensors)
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(*(torch.autograd.grad(o.square().sum(), tensors) for o in outputs))


def _guards(model, x):
    """How many guards a compiled call of the model checks."""

    def call(x):
        return model(x)

    torch._dynamo.reset()
    torch.compile(call, fullgraph=True, backend="eager")(x)
    (entry,) = torch._C._dynamo.eval_frame._debug_get_cache_entry_list(call.__code__)
    return str(entry.guard_manager).count("+- ")


def test_compiled_graph_of_pytorchs_ops_is_that_of_the_plain_model():
    """What a compiler does better costs a replaced model nothing but the guards of how large a linear layer is."""
    x = torch.randn(4, 10)
    for layers, more in (([nn.GELU(), nn.ReLU(), nn.PReLU()], 0), ([nn.Linear(10, 10), nn.SiLU()], 2)):
        plain = nn.Sequential(*layers)
        ours = copy.deepcopy(plain)
        fastops.replace_(ours)
        assert _guards(ours, x) - _guards(plain, x) == more
        with fastops.export_kernels():  # which wants our ops
            assert _guards(ours, x) > _guards(plain, x) + more


def test_compiled_graph_holds_large_norms():
    """Those of small inputs are the compiler's."""
    for layer, small, large in (
        (nn.LayerNorm(64), (8, 64), (8192, 64)),
        (nn.BatchNorm2d(64), (2, 64, 4, 4), (2, 64, 64, 64)),
        (nn.Softmax(-1), (8, 64), (8192, 64)),
    ):
        fastops.replace_(layer)
        for shape, ours in ((small, False), (large, True)):
            torch._dynamo.reset()
            targets = []

            def backend(graph, inputs, targets=targets):
                targets.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
                return graph

            model = nn.Sequential(layer)
            x = torch.randn(shape)
            torch.testing.assert_close(torch.compile(model, fullgraph=True, backend=backend)(x), model(x))
            assert any(name.startswith("fastops.") for name in targets) == ours


@pytest.mark.parametrize("slow", [True, False])
def test_compiled_graph_holds_what_is_faster_than_the_compilers(slow, monkeypatch):
    """Convolutions and, where MKL is slow, large linear layers; what a compiler fuses is PyTorch's."""
    limit = 1 << 15 if slow else 1 << 62
    monkeypatch.setattr(fastops.functional._general, "COMPILED_LINEAR_FROM", limit)
    monkeypatch.setattr(fastops.functional._general, "MATRIX_UNIT", False)
    monkeypatch.setattr(sys.modules["fastops.nn.linear"], "COMPILED_WEIGHT_FROM", limit)
    torch._dynamo.reset()
    targets = []

    def backend(graph, inputs):
        targets.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    model = nn.Sequential(
        fnn.Conv2d(1, 4, 3), fnn.MaxPool2d(2), nn.Flatten(),
        fnn.Linear(256, 128, activation="relu"), fnn.GELU(), fnn.Linear(128, 8), fnn.GLU(), fnn.PReLU(),
    )  # fmt: skip
    torch.compile(model, fullgraph=True, backend=backend)(torch.randn(2, 1, 18, 18))
    ours = [name for name in targets if name.startswith("fastops.")]
    assert ours == ["fastops.conv_forward", "fastops.max_pool_forward", *(["fastops.linear_forward"] if slow else [])]
    assert sum("linear" in name for name in targets) == 2


@pytest.mark.parametrize(("rows", "dtype", "ours"), [(8192, None, 2), (1024, None, 0), (8192, torch.bfloat16, 0)])
def test_compiled_graph_holds_float32_layers_that_the_matrix_unit_multiplies(rows, dtype, ours, monkeypatch):
    monkeypatch.setattr(fastops.functional._general, "COMPILED_LINEAR_FROM", 1 << 62)
    monkeypatch.setattr(fastops.functional._general, "MATRIX_UNIT", True)
    monkeypatch.setattr(sys.modules["fastops.nn.linear"], "COMPILED_WEIGHT_FROM", 1 << 14)
    torch._dynamo.reset()
    targets = []

    def backend(graph, inputs):
        targets.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    model = nn.Sequential(fnn.Linear(128, 256), fnn.Linear(256, 128, activation="relu"), fnn.Linear(128, 8)).to(dtype)
    x = torch.randn(rows, 128, dtype=dtype)

    def plain(x):
        first, second, third = ((layer.weight, layer.bias) for layer in model)
        return F.linear(F.relu(F.linear(F.linear(x, *first), *second)), *third)

    # A layer that is PyTorch's in the graph rounds as PyTorch's does: 16 bits are compared with it.
    expected = model(x) if dtype is None else plain(x)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend=backend)(x), expected)
    assert sum(name.startswith("fastops.linear") for name in targets) == ours
    assert sum("linear" in name for name in targets) == 3


def test_compile_inplace_and_autocast():
    torch._dynamo.reset()

    def function(x):
        y = x * 2
        FF.relu_(y)
        return FF.elu(y - 1, inplace=True)

    x = torch.randn(4, 5)
    torch.testing.assert_close(torch.compile(function, fullgraph=True, backend="aot_eager")(x), function(x))

    def mixed(x, w):
        with torch.autocast("cpu", torch.bfloat16):
            return FF.linear(x, w)

    w = torch.randn(3, 5)
    compiled = torch.compile(mixed, fullgraph=True, backend="aot_eager")(x, w)
    assert compiled.dtype == torch.bfloat16
    torch.testing.assert_close(compiled, mixed(x, w), rtol=0, atol=0)


def test_compile_with_func_inside():
    w = torch.randn(3, 6)
    x = torch.randn(4, 6)
    for transform in (
        lambda f: grad(lambda t: f(t).sum()),
        lambda f: vmap(f),
        lambda f: vmap(grad(lambda t: f(t).sum())),
        lambda f: lambda t: jvp(f, (t,), (t,)),
    ):
        torch._dynamo.reset()
        compiled = torch.compile(
            transform(lambda t: FF.relu(FF.linear(t, w, activation="gelu"))), fullgraph=True, backend="aot_eager"
        )
        torch.testing.assert_close(compiled(x), transform(lambda t: F.relu(F.gelu(F.linear(t, w))))(x))


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("dynamic", [True, False])
def test_export(strict, dynamic):
    ours, theirs = replaced_net(), net()
    x = torch.randn(5, 10)
    shapes = ({0: torch.export.Dim("batch")},) if dynamic else None
    with fastops.export_kernels():
        program = torch.export.export(ours, (x,), strict=strict, dynamic_shapes=shapes)
    targets = {str(node.target) for node in program.graph.nodes}
    assert "fastops.linear_forward.default" in targets
    x = torch.randn(9 if dynamic else 5, 10)
    torch.testing.assert_close(program.module()(x), theirs(x), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(program.run_decompositions().module()(x), theirs(x), atol=1e-5, rtol=1e-4)
    exported = program.module()
    loss = exported(x).square().sum()
    gradients = torch.autograd.grad(loss, exported.parameters())
    expected = torch.autograd.grad(theirs(x).square().sum(), theirs.parameters())
    names = [[name for name, _ in module.named_parameters()] for module in (exported, theirs)]
    actual, expected = (dict(zip(*pair, strict=True)) for pair in zip(names, (gradients, expected), strict=True))
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


# A layer, its input's sizes, and how many of them may be other ones.
DYNAMIC = [
    (lambda: fnn.Linear(6, 5, activation="gelu"), (3, 4, 6), 2),
    (lambda: fnn.Conv2d(4, 6, 3, stride=2, padding=1, activation="gelu"), (3, 4, 8, 9), 4),
    (lambda: fnn.Conv1d(4, 6, 2, padding="same", groups=2), (3, 4, 8), 3),
    (lambda: fnn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1), (3, 4, 8, 9), 4),
    (lambda: fnn.MaxPool2d(3, 2, 1), (3, 4, 8, 9), 4),
    (lambda: fnn.MaxPool1d(2, ceil_mode=True), (3, 4, 9), 3),
    (lambda: fnn.AvgPool3d(2), (3, 4, 8, 9, 7), 5),
    (lambda: fnn.AdaptiveAvgPool2d((3, None)), (3, 4, 8, 9), 4),
    (lambda: fnn.AdaptiveMaxPool2d(1), (3, 4, 8, 9), 4),
    (lambda: fnn.ReLU(), (3, 4, 8), 3),
    (lambda: fnn.PReLU(4), (3, 4, 8), 3),
    (lambda: fnn.GLU(1), (3, 4, 8), 3),
]


@pytest.mark.parametrize("case", range(len(DYNAMIC)), ids=lambda i: type(DYNAMIC[i][0]()).__name__)
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_sizes_stay_symbols(case):
    """One program for all sizes: what an op's Meta kernel returns, and asks of its input, leaves them open."""
    make, sizes, free = DYNAMIC[case]
    layer, x = make().eval(), torch.randn(sizes)
    dims = {i: torch.export.Dim.DYNAMIC for i in range(free) if i != 1}
    for strict in (False, True):
        with fastops.export_kernels():
            program = torch.export.export(layer, (x,), dynamic_shapes=(dims,), strict=strict)
        assert any("fastops" in str(node.target) for node in program.graph.nodes)
        larger = torch.randn([n + 3 if i in dims else n for i, n in enumerate(sizes)])
        torch.testing.assert_close(program.module()(larger), layer(larger))


@pytest.mark.parametrize("case", range(len(DYNAMIC)), ids=lambda i: type(DYNAMIC[i][0]()).__name__)
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_batches_that_only_data_tells(case):
    make, sizes, _ = DYNAMIC[case]

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = make()

        def forward(self, x, mask):
            return self.layer(x[mask.nonzero().squeeze(1)])

    model, x, mask = Model().eval(), torch.randn(sizes), torch.tensor([True, False, True])
    with fastops.export_kernels():
        program = torch.export.export(model, (x, mask), strict=False)
    mask = torch.tensor([False, False, True])
    torch.testing.assert_close(program.module()(x, mask), model(x, mask))


def test_exported_program_round_trip(tmp_path):
    x = torch.randn(5, 10)
    model = replaced_net()
    with fastops.export_kernels():
        torch.export.save(torch.export.export(model, (x,)), tmp_path / "net.pt2")
    loaded = torch.export.load(tmp_path / "net.pt2").module()
    torch.testing.assert_close(loaded(x), model(x))


def test_meta():
    model = replaced_net().to("meta")
    output = model(torch.randn(5, 10, device="meta"))
    assert output.shape == (5, 3)
    assert output.device.type == "meta"
    output.sum().backward()
    assert all(p.grad.shape == p.shape and p.grad.device.type == "meta" for p in model.parameters())


def test_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    with FakeTensorMode():
        model = replaced_net()
        output = model(torch.randn(5, 10))
        output.sum().backward()
        assert isinstance(output, FakeTensor)
        assert all(isinstance(p.grad, FakeTensor) and p.grad.shape == p.shape for p in model.parameters())
        layout = FF.gelu(torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last))
        assert layout.is_contiguous(memory_format=torch.channels_last)


def test_make_fx():
    from torch.fx.experimental.proxy_tensor import make_fx

    w = torch.randn(3, 6)
    x = torch.randn(4, 6)
    graph = make_fx(lambda t, v: FF.linear(t, v, activation="relu"), tracing_mode="symbolic")(x, w)
    torch.testing.assert_close(graph(x[:3], w), F.relu(F.linear(x[:3], w)))
    graph = make_fx(grad(lambda t: FF.gelu(t).sum()))(x)
    torch.testing.assert_close(graph(x), grad(lambda t: F.gelu(t).sum())(x))


def test_fx_traces_functions():
    ours = torch.fx.symbolic_trace(lambda x, w: FF.gelu(FF.linear(x, w)))
    assert FF.linear in [node.target for node in ours.graph.nodes]
    x, w = torch.randn(5, 10), torch.randn(3, 10)
    torch.testing.assert_close(ours(x, w), F.gelu(F.linear(x, w)))


class Wide(nn.Module):
    """A layer used twice, one inside another module, and an argument by keyword."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.ConvTranspose2d(2, 4, 3, 2)
        self.relu = nn.ReLU()
        self.inner = nn.Sequential(nn.Conv2d(4, 4, 1), nn.GELU())

    def forward(self, x):
        return self.relu(self.inner(self.relu(self.up(x, output_size=[14, 14]))))


def test_fx_sees_modules_as_it_sees_pytorchs():
    """The same graph: layers are called, with their hooks, and not traced through."""
    ours, theirs = Wide(), Wide()
    fastops.replace_(ours)
    one, two = torch.fx.symbolic_trace(ours), torch.fx.symbolic_trace(theirs)
    assert [(n.op, n.name, n.target) for n in one.graph.nodes] == [(n.op, n.name, n.target) for n in two.graph.nodes]
    torch.jit.script(one)
    x, called = torch.randn(1, 2, 6, 6), []
    ours.up.register_forward_hook(lambda module, args, output: called.append(type(args[0])))
    torch.testing.assert_close(one(x), two(x))
    assert called == [torch.Tensor]
    fastops.restore_(one)
    assert not [m for m in one.modules() if type(m).__module__.startswith("fastops")]


@pytest.mark.parametrize("activation", ["relu", nn.LeakyReLU(0.3)])
def test_fx_sees_layers_with_an_activation(activation):
    model = nn.Sequential(fnn.Linear(4, 4, activation=activation), nn.Linear(4, 2))
    traced = torch.fx.symbolic_trace(model)
    assert [node.op for node in traced.graph.nodes] == ["placeholder", "call_module", "call_module", "output"]
    x = torch.randn(3, 4)
    torch.testing.assert_close(traced(x), model(x))


def test_fx_traces_through_a_subclass_and_where_a_tracer_says_so():
    class Mine(fnn.Linear):
        pass

    assert "call_module" not in [n.op for n in torch.fx.symbolic_trace(nn.Sequential(Mine(4, 2))).graph.nodes]

    class Through(torch.fx.Tracer):
        def is_leaf_module(self, m, module_qualified_name):
            return False

    assert "call_module" not in [n.op for n in Through().trace(nn.Sequential(fnn.Linear(4, 2))).nodes]


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint(reentrant):
    ours, theirs = replaced_net(), net()

    def run(model):
        return lambda x: checkpoint(model, x.clone().requires_grad_(), use_reentrant=reentrant)

    compare_with_backward(run(ours), theirs, ours)


def compare_with_backward(function, theirs, ours):
    """For what torch.autograd.grad cannot do, as reentrant checkpoints."""
    x = torch.randn(5, 10)
    function(x).square().sum().backward()
    theirs(x).square().sum().backward()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, atol=1e-4, rtol=1e-4)


def test_saved_tensors_hooks():
    ours, theirs = replaced_net(), net()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.numpy(force=True), lambda a: torch.from_numpy(a)):
        loss = ours(torch.ones(5, 10)).square().sum()
    grads = torch.autograd.grad(loss, ours.parameters())
    expected = torch.autograd.grad(theirs(torch.ones(5, 10)).square().sum(), theirs.parameters())
    torch.testing.assert_close(grads, expected, atol=1e-4, rtol=1e-4)
    with torch.autograd.graph.save_on_cpu():
        compare_models(ours, theirs, torch.ones(5, 10))


def test_forward_mode_without_func():
    import torch.autograd.forward_ad as forward_ad

    x, w, tangent = torch.randn(4, 6), torch.randn(5, 6), torch.randn(4, 6)
    with forward_ad.dual_level():
        output = FF.linear(forward_ad.make_dual(x, tangent), w, activation="gelu")
        actual = forward_ad.unpack_dual(output).tangent
    torch.testing.assert_close(actual, jvp(lambda t: F.gelu(F.linear(t, w)), (x,), (tangent,))[1])


def test_a_graph_from_the_fast_door_under_forward_mode():
    """Gradients with a tangent: the second half of a Hessian-vector product."""
    import torch.autograd.forward_ad as forward_ad

    for function in (
        FF.gelu,
        FF.relu,
        lambda t: FF.linear(t, t.detach()),
        lambda t: FF.linear(t, t.detach(), activation="tanh"),
        FF.glu,
        lambda t: FF.conv1d(t[None], t.detach()[None, :, :2], padding=1, activation="tanh"),
        lambda t: FF.conv_transpose1d(t[None], t.detach()[:, None, :2], stride=2),
    ):
        x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
        output = function(x)
        primal, tangent = torch.randn_like(output), torch.randn_like(output)
        expected = torch.autograd.grad(output, x, tangent, retain_graph=True)[0]  # linear in the incoming gradient
        with forward_ad.dual_level():
            (gradient,) = torch.autograd.grad(output, x, forward_ad.make_dual(primal, tangent), create_graph=True)
            torch.testing.assert_close(forward_ad.unpack_dual(gradient).tangent, expected)


def test_batched_gradients():
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    w = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    for ours, theirs in (
        (lambda: FF.linear(x, w, activation="tanh"), lambda: torch.tanh(F.linear(x, w))),
        (lambda: FF.gelu(x @ w.mT), lambda: F.gelu(x @ w.mT)),
        (lambda: FF.relu(x @ w.mT), lambda: F.relu(x @ w.mT)),
        (lambda: FF.glu(x, 1) @ w.mT[:2], lambda: F.glu(x, 1) @ w.mT[:2]),
        (lambda: FF.prelu(x @ w.mT, w[:, 0]), lambda: F.prelu(x @ w.mT, w[:, 0])),
    ):
        vectors = torch.randn(6, 3, 5, dtype=torch.float64)
        results = [torch.autograd.grad(f(), (x, w), vectors, is_grads_batched=True) for f in (ours, theirs)]
        torch.testing.assert_close(*results)


def test_deepcopy_of_a_compiled_model():
    model = replaced_net()
    x = torch.randn(5, 10)
    torch.testing.assert_close(copy.deepcopy(model)(x), model(x))
