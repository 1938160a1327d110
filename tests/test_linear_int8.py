"""fastops.light.quantize_ and LinearInt8: against the formulas in PyTorch's ops, and against the float layer."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from tiers import BEST, TIERS
from torch import nn
from torch.func import functional_call, jvp, vmap
from torch.library import opcheck
from torch.nn.utils import prune

import fastops
import fastops.nn as fnn
from fastops import _C, light
from fastops.ops.linear_int8 import by_torch

OPS = torch.ops.fastops
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=TIERS)
def tier(request):
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(BEST)


def make(k, n, bias=True, dtype=torch.float32):
    return light.LinearInt8.from_linear(nn.Linear(k, n, bias=bias)).to(dtype)


def close(module, x, actual, activation=lambda y: y):
    """Sums are exact: what is left is a few roundings of float32, and one of the result's type."""
    bias = None if module.bias is None else module.bias.detach().float()
    wanted = activation(by_torch(x.detach().float(), module.weight, module.scale, bias))
    assert actual.dtype == x.dtype
    assert actual.is_contiguous()
    eps = torch.finfo(x.dtype).eps
    scale = float(wanted.nan_to_num(0).abs().max()) if wanted.numel() else 0.0
    torch.testing.assert_close(actual.float(), wanted, rtol=2 * eps, atol=4e-6 * scale, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 64, 32), (33, 65, 31), (1, 784, 10), (70, 1025, 300), (5, 3, 200)])
def test_against_pytorch(shape, dtype, tier):
    m, k, n = shape
    module, x = make(k, n, dtype=dtype), torch.randn(m, k).to(dtype)
    with torch.no_grad(), fastops.record() as calls:
        close(module, x, module(x))
    assert [(call.op, call.kernel.split("[")[0].split(" ")[0]) for call in calls] == [
        ("linear_int8", calls[0].kernel.split(" ")[0])
    ]
    assert "gemm_int8" in calls[0].kernel
    assert tier in calls[0].kernel


def test_tiers_have_the_same_bits():
    module, x = make(300, 70), torch.randn(40, 300)
    with torch.no_grad():
        results = []
        for name in TIERS:
            _C.set_isa(name)
            results.append(module(x))
        _C.set_isa(BEST)
    assert all(torch.equal(results[0], result) for result in results)


def test_close_to_the_float_layer():
    """Each of 8-bit input and weight adds an error of at most half a level: 1 / 510 and 1 / 254 of a row's range."""
    linear = nn.Linear(512, 256)
    x = torch.randn(64, 512)
    with torch.no_grad():
        y, z = light.LinearInt8.from_linear(linear)(x), linear(x)
    assert (y - z).square().mean().sqrt() < 0.015 * z.square().mean().sqrt()


LAYOUTS = {
    "transposed": lambda x: x.t().contiguous().t(),
    "sliced": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "every other": lambda x: torch.stack([x, x], 2)[..., 0],
    "expanded rows": lambda x: x[:1].expand_as(x),
    "expanded columns": lambda x: x[:, :1].expand_as(x),
    "overlapping": lambda x: x.flatten().as_strided(x.shape, (1, 1)),
    "negative view": lambda x: torch._neg_view(x),
    "odd offset": lambda x: torch.cat([x.flatten()[:1], x.flatten()])[1:].view_as(x),
    "leading dimensions": lambda x: x.view(2, 1, 3, -1),
    "permuted leading dimensions": lambda x: x.view(2, 3, -1).permute(1, 0, 2),
    "vector": lambda x: x[0],
    "no rows": lambda x: x[:0],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    module, x = make(37, 20), LAYOUTS[layout](torch.randn(6, 37))
    with torch.no_grad():
        close(module, x, module(x))


def test_sizes_of_zero():
    with torch.no_grad():
        assert make(4, 0)(torch.randn(3, 4)).shape == (3, 0)
        module = make(0, 5)
        assert torch.equal(module(torch.randn(3, 0)), module.bias.detach().expand(3, 5))


def test_infinity_and_nan_stay_in_their_row():
    module, x = make(100, 20), torch.randn(4, 100)
    x[1, 7], x[3, 99] = float("inf"), float("nan")
    with torch.no_grad():
        y = module(x)
        assert y[[1, 3]].isnan().all()
        assert torch.equal(y[[0, 2]], module(x[[0, 2]]))


@pytest.mark.parametrize("activation", ["relu", "gelu", "tanh", nn.LeakyReLU(0.2)])
def test_activation(activation):
    module = light.LinearInt8.from_linear(fnn.Linear(64, 40, activation=activation))
    f = activation if isinstance(activation, nn.Module) else getattr(torch, activation, getattr(F, activation, None))
    x = torch.randn(9, 64)
    with torch.no_grad():
        close(module, x, module(x), f)
    close(module, x, module(x), f)  # recorded: two ops


def test_gradients():
    """Those of the layer with the weight that int8 and scale stand for."""
    module = make(30, 20)
    x = torch.randn(2, 7, 30, requires_grad=True)
    grad = torch.randn(2, 7, 20)
    actual = torch.autograd.grad(module(x), [x, module.bias], grad)
    wanted = torch.autograd.grad(F.linear(x, module.dequantized(), module.bias), [x, module.bias], grad)
    torch.testing.assert_close(actual, wanted)


def test_opcheck():
    module = make(30, 20)
    x = torch.randn(7, 30, requires_grad=True)
    opcheck(OPS.linear_int8_forward, (x, module.weight, module.scale, module.bias))
    opcheck(OPS.linear_int8_forward, (x.bfloat16(), module.weight, module.scale, None))


def test_transforms():
    module, x, tangent = make(30, 20), torch.randn(4, 3, 30), torch.randn(4, 3, 30)
    y = module(x).detach()
    assert torch.equal(vmap(module)(x).detach(), y)
    value, change = jvp(module, (x,), (tangent,))
    assert torch.equal(value.detach(), y)
    torch.testing.assert_close(change.detach(), (tangent @ module.dequantized().t()).detach())
    biases = torch.randn(4, 20)
    ys = vmap(lambda bias, x: functional_call(module, {"bias": bias}, x))(biases, x)
    torch.testing.assert_close(ys, y - module.bias.detach() + biases[:, None])


def test_compiled_and_exported():
    module = nn.Sequential(make(30, 20), nn.ReLU(), make(20, 5)).eval()
    x = torch.randn(6, 30)
    with torch.no_grad():
        y = module(x)
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), y)
        assert torch.equal(compiled(x[:4]), y[:4])
        program = torch.export.export(module, (x,))
        assert not any("fastops" in str(node.target) for node in program.graph.nodes)
        torch.testing.assert_close(program.module()(x), y, rtol=1e-4, atol=1e-5)
        with fastops.export_kernels():
            kept = torch.export.export(module, (x,))
        assert sum("linear_int8" in str(node.target) for node in kept.graph.nodes) == 2
        assert torch.equal(kept.module()(x), y)
        torch.testing.assert_close(torch.jit.trace(module, x)(x), y, rtol=1e-4, atol=1e-5)


def test_autocast():
    module, x = make(64, 32), torch.randn(5, 64)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y = module(x)
    assert y.dtype == torch.bfloat16
    with torch.no_grad():
        torch.testing.assert_close(y, module.bfloat16()(x.bfloat16()))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_modes(mode):
    module, x = make(64, 32), torch.randn(5, 64)
    wanted = module(x).detach()
    with mode():
        assert torch.equal(module(x), wanted)
    assert torch.equal(module(x).detach(), wanted)


def test_quantize_():
    model = nn.Sequential(
        nn.Linear(16, 32),
        nn.ReLU(),
        fnn.Linear(32, 32, activation="gelu"),
        nn.MultiheadAttention(32, 2),
        nn.Linear(32, 4),
    )
    first, handle, keys = model[0], [], list(model.state_dict())
    first.register_forward_hook(lambda *_: handle.append(1))
    report = light.quantize_(model, "int8_dynamic", filter_fn=lambda module, name: name != "4")
    assert [row.name for row in report.replaced] == ["0", "2"]
    assert {row.name: row.result for row in report.skipped} == {
        "3.out_proj": "torch.nn.MultiheadAttention reads its weight directly",
        "4": "filter_fn said no",
    }
    assert model[0] is first
    with torch.no_grad():
        model[0](torch.randn(2, 16))
    assert handle == [1]
    assert model[2].activation == "gelu"
    assert sorted(key for key in model.state_dict() if key not in ("0.scale", "2.scale")) == sorted(keys)
    report = str(light.quantize_(model, "int8_dynamic"))
    assert "already quantized" in report
    assert "fewer than 8192 weights" in report
    assert type(model[4]) is nn.Linear


def test_root_and_errors():
    linear = nn.Linear(4, 4)
    assert light.quantize_(linear, filter_fn=lambda *_: True).replaced
    assert type(linear) is light.LinearInt8
    assert light.quantize_(nn.Linear(4, 4).double()).skipped[0].result.startswith("weight has dtype float64")
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got int"):
        light.quantize_(3)
    with pytest.raises(
        ValueError,
        match=r"config must be one of 'int8_dynamic', 'int8_static', .*'fp8_weight', got 'int4'",
    ):
        light.quantize_(linear, "int4")
    with pytest.raises(RuntimeError, match="input must be float32, bfloat16 or float16, got float64"):
        linear(torch.randn(2, 4).double())
    with pytest.raises(RuntimeError, match=r"in_features = 5 \(input's last dimension\)"):
        linear(torch.randn(2, 5))
    with pytest.raises(RuntimeError, match="input must have shape"):
        linear(torch.tensor(1.0))


def test_wrong_arguments():
    with pytest.raises(ValueError, match=r"LinearInt8: in_features must be at most 65536, .* got 65537"):
        light.LinearInt8(65537, 1)
    for layer in (nn.Bilinear(8, 8, 8), make(8, 8)):
        with pytest.raises(
            TypeError, match=f"must be a torch.nn.Linear or fastops.nn.Linear, got {type(layer).__name__}"
        ):
            light.LinearInt8.from_linear(layer)
    layer = make(8, 8)
    with pytest.raises(ValueError, match="activation must be one of"):
        layer.activation = "none"
    layer.activation = nn.LeakyReLU(0.2)
    assert not list(layer.children())


def test_after_replace_():
    model = nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 128))
    fastops.replace_(model)
    assert [row.name for row in light.quantize_(model).replaced] == ["0", "2"]
    assert all(type(model[i]) is light.LinearInt8 for i in (0, 2))


@pytest.mark.parametrize(
    "change", [lambda layer: prune.l1_unstructured(layer, "weight", 0.5), nn.utils.weight_norm, nn.utils.spectral_norm]
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_weights_that_are_computed_stay(change):
    model = nn.Sequential(nn.Linear(128, 128), nn.Linear(128, 128)).eval()
    change(model[1])
    report = light.quantize_(model)
    assert [row.name for row in report.replaced] == ["0"]
    assert report.skipped[0].result.startswith("its weight is computed at every call")
    model(torch.randn(2, 128)).sum().backward()


def test_tensors_on_different_devices():
    layers = make(8, 4), light.LinearWeightOnly.from_linear(nn.Linear(8, 4), 4)
    for layer in layers:
        x = torch.randn(2, 8)
        with pytest.raises(
            RuntimeError, match="weight must be a dense tensor on the input's device, meta, got one on cpu"
        ):
            layer(x.to("meta"))
        with pytest.raises(RuntimeError, match="weight must be a dense tensor on the CPU, got one on meta"):
            layer.to("meta")(x)
        assert layer(x.to("meta")).is_meta
        with pytest.raises(TypeError, match="input must be a Tensor, got list"):
            layer([1.0])


def test_transformer_encoder_layers_stay():
    """They read the weights of their linear layers, fastops' too where it leaves a call to PyTorch's kernel."""
    for change in (lambda model: None, fastops.replace_):
        model = nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 2, 256, batch_first=True), 1).eval()
        change(model)
        x, padding = torch.randn(2, 5, 64), torch.arange(5).expand(2, 5) > 3
        with torch.no_grad():
            expected = model(x), model(x, src_key_padding_mask=padding)
            report = light.quantize_(model)
            assert not report.replaced
            assert "0.linear2 torch.nn.TransformerEncoderLayer reads its weight" in "\n".join(
                f"{row.name.removeprefix('layers.')} {row.result}" for row in report.skipped
            )
            assert torch.equal(model(x), expected[0])
            assert torch.equal(model(x, src_key_padding_mask=padding), expected[1])


def test_float_weights_are_not_loaded_as_integers():
    linear, layer = nn.Linear(16, 8), make(16, 8)
    weight = layer.weight.clone()
    for strict in (True, False):
        with pytest.raises(RuntimeError, match="weight must be int8, got float32: load float weights before quantize_"):
            layer.load_state_dict(linear.state_dict(), strict=strict)
    assert torch.equal(layer.weight, weight)


def test_layers_whose_weight_a_forward_reads_stay():
    """Such a forward casts to the dtype of a weight, as T5's does, which knows int8 alone."""

    class Casts(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.wo = nn.Linear(128, 128), nn.Linear(128, 128)

        def forward(self, x):
            return self.wo(self.first(x).to(self.wo.weight.dtype))

    class KnowsInt8(Casts):
        def forward(self, x):
            x = self.first(x)
            return self.wo(x if self.wo.weight.dtype == torch.int8 else x.to(self.wo.weight.dtype))

    for cls, config, quantized in [
        (Casts, "int8_dynamic", ["first"]),
        (KnowsInt8, "int8_weight", ["first", "wo"]),
        (KnowsInt8, "int4_weight", ["first"]),
        (KnowsInt8, "fp8_weight", ["first"]),
    ]:
        model, x = cls(), torch.randn(2, 128)
        with torch.no_grad():
            y = model(x)
            report = light.quantize_(model, config)
            assert [row.name for row in report.replaced] == quantized
            assert all("reads its weight directly" in row.result for row in report.skipped)
            assert (model(x) - y).abs().max() < 0.3 * y.abs().max()


@pytest.mark.parametrize("config", ["int8_dynamic", "int8_weight", "int4_weight", "fp8_weight"])
def test_models_on_the_meta_device(config):
    """They get their weights from a checkpoint."""
    model = nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 65))
    light.quantize_(model, config)
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 65))
    assert len(light.quantize_(empty, config).replaced) == 2
    empty.load_state_dict(model.state_dict(), assign=True)
    x = torch.randn(2, 128)
    with torch.no_grad():
        assert torch.equal(empty(x), model(x))


def test_symbolic_trace():
    """A quantized or sparse layer is a leaf."""
    layers = make(128, 64), light.LinearWeightOnly(64, 32, bits=4), light.LinearSparse(32, 8)
    model = nn.Sequential(*layers, nn.Unflatten(1, (8, 1, 1)), light.Conv2d1x1Sparse(8, 4))
    traced = torch.fx.symbolic_trace(model)
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["0", "1", "2", "3", "4"]
    x = torch.randn(2, 128)
    assert torch.equal(traced(x), model(x))


def test_export_without_features():
    module = make(0, 3)
    program = torch.export.export(module, (torch.randn(2, 0),))
    assert torch.equal(program.module()(torch.randn(2, 0)), module.bias.expand(2, 3))


def test_filter_that_raises_changes_nothing():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))

    def filter_fn(module, name):
        if name == "1":
            raise KeyError(name)
        return True

    with pytest.raises(KeyError):
        light.quantize_(model, filter_fn=filter_fn)
    assert all(type(module) is nn.Linear for module in model)


def test_copies_and_checkpoints(tmp_path):
    model = nn.Sequential(make(16, 8), nn.ReLU(), make(8, 3))
    x = torch.randn(4, 16)
    with torch.no_grad():
        y = model(x)
        other = nn.Sequential(make(16, 8), nn.ReLU(), make(8, 3))
        assert not torch.equal(other(x), y)  # and packs its weights
        other.load_state_dict(model.state_dict())
        assert torch.equal(other(x), y)
        assert torch.equal(copy.deepcopy(model)(x), y)
        assert torch.equal(pickle.loads(pickle.dumps(model))(x), y)
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        assert torch.equal(torch.load(buffer, weights_only=False)(x), y)


@pytest.mark.parametrize("config", ["int8_dynamic", "int8_weight", "int4_weight"])
def test_quantized_in_inference_mode(config):
    model = nn.Linear(128, 64)
    with torch.inference_mode():
        light.quantize_(model, config)
    model.load_state_dict(model.state_dict())
    x = torch.randn(2, 128, requires_grad=True)
    model(x).sum().backward()
    torch.testing.assert_close(x.grad, model.dequantized().sum(0).expand(2, 128))


def test_a_changed_weight_is_noticed():
    module, x = make(16, 8), torch.randn(4, 16)
    with torch.no_grad():
        module(x)
        module.weight.data.copy_(make(16, 8).weight)
        close(module, x, module(x))
        module.weight = make(16, 8).weight
        close(module, x, module(x))


def test_casts_keep_the_scale():
    module = make(16, 8)
    scale = module.scale.clone()
    assert module.half().scale.dtype == torch.float32
    assert torch.equal(module.scale, scale)
    assert module.bias.dtype == torch.float16
    assert module.type(torch.bfloat16).weight.dtype == torch.int8
    assert module.bias.dtype == torch.bfloat16
    assert module.to("meta").scale.is_meta


def test_weights_that_are_zero_infinite_or_nan():
    linear = nn.Linear(8, 4, bias=False)
    with torch.no_grad():
        linear.weight[1] = 0
        linear.weight[2, 3] = float("inf")
        linear.weight[3, 0] = float("nan")
        y = light.LinearInt8.from_linear(linear)(torch.randn(5, 8))
    assert (y[:, 1] == 0).all()
    assert y[:, 2:].isnan().all()
    assert y[:, 0].isfinite().all()


def test_inside_replaced_fused_and_frozen_models():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 32), nn.ReLU(), nn.Linear(32, 4)
    ).eval()
    light.quantize_(model, filter_fn=lambda *_: True)
    x = torch.randn(3, 1, 8, 8)
    with torch.no_grad():
        y = model(x)
        for other in (fastops.fuse(model), fastops.freeze(model)):
            torch.testing.assert_close(other(x), y, rtol=1e-3, atol=1e-3)
        fastops.replace_(model)
        torch.testing.assert_close(model(x), y, rtol=1e-3, atol=1e-3)


def test_sharded_weights_are_left_alone(tmp_path):
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor, distribute_tensor

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        model = nn.Sequential(nn.Linear(128, 128))
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        model[0].weight = nn.Parameter(distribute_tensor(model[0].weight.detach(), mesh))
        (row,) = light.quantize_(model).skipped
        assert row.result == "weight is a DTensor, a tensor subclass"
        assert type(model[0].weight.data) is DTensor
    finally:
        dist.destroy_process_group()


def test_script_says_what_to_do_instead():
    model = nn.Sequential(nn.Linear(128, 64))
    light.quantize_(model)
    with pytest.raises(RuntimeError, match=r"cannot compile fastops\.light\.LinearInt8: trace the model"):
        torch.jit.script(model)
    x = torch.randn(3, 128)
    assert torch.equal(torch.jit.trace(model, x)(x), torch.jit.trace(model, x[:1])(x))
