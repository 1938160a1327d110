"""fastops.light.LinearWeightOnly: against the float layer of the weights that its buffers stand for."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from tiers import BEST, TIERS, runs
from torch import nn
from torch.func import functional_call, jvp, vmap
from torch.library import opcheck

import fastops
import fastops.nn as fnn
from fastops import _C, light

OPS = torch.ops.fastops
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BITS = pytest.mark.parametrize("bits", [8, 4, "fp8"])
NAMES = {8: "int8", 4: "int4", "fp8": "fp8"}


@pytest.fixture(params=TIERS)
def tier(request):
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(BEST)


def quantized(linear, bits, group_size=None):
    if bits == "fp8":
        return light.LinearWeightOnly.from_linear(linear, float8=True)
    return light.LinearWeightOnly.from_linear(linear, bits, group_size)


def make(k, n, bits, group_size=32, bias=True, dtype=torch.float32):
    return quantized(nn.Linear(k, n, bias=bias), bits, group_size).to(dtype)


def close(module, x, actual, activation=lambda y: y):
    """Within the roundings of as many float32 products as there are, and one of the result's type."""
    w = module.dequantized().double()
    bias = None if module.bias is None else module.bias.detach().double()
    wanted = activation(F.linear(x.detach().double(), w, bias))
    size = F.linear(x.detach().double().abs(), w.abs() + w.abs().amax(), None if bias is None else bias.abs())
    assert actual.dtype == x.dtype
    assert actual.is_contiguous()
    bound = torch.finfo(x.dtype).eps * wanted.abs() + (x.shape[-1] + 8) * 2**-24 * size + 1e-30
    if x.dtype is torch.float16:
        bound += 2**-24
    assert ((actual.detach().double() - wanted).abs() <= bound).all()


@BITS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 64, 33), (9, 65, 31), (1, 784, 10), (2, 1025, 70), (40, 67, 35)])
def test_against_pytorch(shape, bits, dtype, tier):
    m, k, n = shape
    module, x = make(k, n, bits, dtype=dtype), torch.randn(m, k).to(dtype)
    with torch.no_grad(), fastops.record() as calls:
        close(module, x, module(x))
    (call,) = calls
    assert call.op == "weight_only"
    assert f"{'gemm' if m > 23 else 'dot'}_{NAMES[bits]}_weight" in call.kernel
    assert (tier if runs(tier, dtype) else "avx512") in call.kernel


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("group_size", [None, 16, 64, 256, 2048])
def test_levels(group_size, bits):
    """The weights are as near as the levels of their group allow, and its ends are levels."""
    linear = nn.Linear(300, 20)
    module = light.LinearWeightOnly.from_linear(linear, bits, group_size)
    size = group_size or (128 if bits == 4 else 300)
    assert module.scale.shape == (20, -(-300 // size))
    with torch.no_grad():
        for g, part in enumerate(linear.weight.split(size, 1)):
            error = (part - module.dequantized()[:, g * size : (g + 1) * size]).abs()
            step = (part.amax(1) - part.amin(1)) / 15 if bits == 4 else part.abs().amax(1) / 127
            assert (error <= 0.5001 * step[:, None]).all()
    # 4 bits with a scale and an offset for 128: (64 + 8) / 512 of float32's bytes
    bytes_ = sum(buffer.nbytes for buffer in module.buffers())
    if group_size is None:
        assert bytes_ / linear.weight.nbytes < (0.26 if bits == 8 else 0.16)


def test_float8_levels():
    """The weights are torch's float8 numbers, and a row's largest one is the largest of these."""
    linear = nn.Linear(300, 20)
    module = quantized(linear, "fp8")
    assert module.weight.dtype is torch.float8_e4m3fn
    assert module.scale.shape == (20, 1)
    assert module.offset is None
    assert torch.equal(module.weight.float().abs().amax(1), torch.full((20,), 448.0))
    with torch.no_grad():
        error = (linear.weight - module.dequantized()).abs()
        assert (error <= linear.weight.abs() / 16 + module.scale * 2**-10).all()
    assert sum(buffer.nbytes for buffer in module.buffers()) / linear.weight.nbytes < 0.26


def test_every_float8_number(tier):
    """Also denormal ones and NaN, which a checkpoint may bring, in kernels for few rows and for many."""
    module = quantized(nn.Linear(256, 256, bias=False), "fp8")
    numbers = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn)
    x = torch.eye(256)
    with torch.no_grad():
        module.scale.fill_(0.5)
        for shift in (0, 5):  # another place in the words
            module.weight.copy_(torch.stack([numbers.view(torch.uint8).roll(shift)] * 256).view(torch.float8_e4m3fn))
            wanted = 0.5 * module.weight.float().t().nan_to_num(nan=0)
            finite = module.weight.float().isfinite()[0]
            for rows in (1, 3, 64):
                y = torch.cat([module(x[i : i + rows].clone()) for i in range(0, 256, rows)])
                # A NaN in a row of the weight spoils each of its outputs.
                assert y.isnan().all()
            nan = module.weight.view(torch.uint8) & 127 == 127
            module.weight.view(torch.uint8)[nan] = 0
            for rows in (1, 3, 64):
                y = torch.cat([module(x[i : i + rows].clone()) for i in range(0, 256, rows)])
                assert torch.equal(y[finite], wanted[finite])


LAYOUTS = {
    "transposed": lambda x: x.t().contiguous().t(),
    "sliced": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "expanded rows": lambda x: x[:1].expand_as(x),
    "expanded columns": lambda x: x[:, :1].expand_as(x),
    "overlapping": lambda x: x.flatten().as_strided(x.shape, (1, 1)),
    "negative view": lambda x: torch._neg_view(x),
    "odd offset": lambda x: torch.cat([x.flatten()[:1], x.flatten()])[1:].view_as(x),
    "permuted leading dimensions": lambda x: x.view(2, 3, -1).permute(1, 0, 2),
    "vector": lambda x: x[0],
    "no rows": lambda x: x[:0],
}


@BITS
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, bits):
    module, x = make(37, 20, bits), LAYOUTS[layout](torch.randn(6, 37))
    with torch.no_grad():
        close(module, x, module(x))


@BITS
def test_layouts_of_the_weight(bits):
    module, x = make(40, 20, bits), torch.randn(3, 40)
    with torch.no_grad():
        y = module(x)
        for name in ("weight", "scale"):
            module._buffers[name] = getattr(module, name).t().contiguous().t()
        assert torch.equal(module(x), y)
        module.weight = module.weight[:1].expand(20, -1)
        close(module, x, module(x))


@BITS
def test_sizes_of_zero(bits):
    with torch.no_grad():
        assert make(4, 0, bits)(torch.randn(3, 4)).shape == (3, 0)
        module = make(0, 5, bits)
        assert torch.equal(module(torch.randn(3, 0)), module.bias.detach().expand(3, 5))


@BITS
def test_infinity_and_nan(bits):
    module, x = make(100, 20, bits), torch.randn(3, 100)
    x[1, 7] = float("nan")
    with torch.no_grad():
        y = module(x)
        assert y[1].isnan().all()
        assert torch.equal(y[[0, 2]], module(x[[0, 2, 0]])[:2])
        linear = nn.Linear(64, 3, bias=False)
        linear.weight[1, 5] = float("inf")
        linear.weight[2] = 0
        y = quantized(linear, bits, 32)(torch.randn(2, 64))
    assert y[:, 1].isnan().all()
    assert (y[:, 2] == 0).all()
    assert y[:, 0].isfinite().all()


@BITS
@pytest.mark.parametrize("value", [float("inf"), -float("inf"), 3e38])
def test_few_rows_are_finite_where_many_are(value, bits, tier):
    """Sums of one row and two are scaled late."""
    module = make(300, 70, bits, bias=False)
    for rows in (1, 2, 3, 9, 25):
        x = torch.randn(rows, 300)
        x[0, 7] = value
        with torch.no_grad():
            y = module(x)
        torch.testing.assert_close(y, x @ module.dequantized().t(), rtol=1e-4, atol=1e-4, equal_nan=True)


@BITS
@pytest.mark.parametrize("activation", ["relu", "gelu", nn.LeakyReLU(0.2)])
def test_activation(activation, bits):
    linear = fnn.Linear(64, 40, activation=activation)
    module = quantized(linear, bits)
    f = activation if isinstance(activation, nn.Module) else getattr(F, activation)
    x = torch.randn(9, 64)
    with torch.no_grad():
        close(module, x, module(x), f)
    close(module, x, module(x), f)  # recorded: two ops


@BITS
def test_gradients(bits):
    module = make(30, 20, bits)
    x = torch.randn(2, 7, 30, requires_grad=True)
    grad = torch.randn(2, 7, 20)
    actual = torch.autograd.grad(module(x), [x, module.bias], grad)
    wanted = torch.autograd.grad(F.linear(x, module.dequantized(), module.bias), [x, module.bias], grad)
    torch.testing.assert_close(actual, wanted)


@BITS
def test_opcheck(bits):
    module = make(30, 20, bits)
    x = torch.randn(7, 30, requires_grad=True)
    group = module.group_size
    checks = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if bits == "fp8":
        checks.remove("test_schema")  # which multiplies float8 tensors, what torch has no kernel for
    weight, scale, offset = module.weight, module.scale, module.offset
    opcheck(OPS.weight_only_forward, (x, weight, scale, offset, module.bias, group), test_utils=checks)
    opcheck(OPS.weight_only_forward, (x.bfloat16(), weight, scale, None, None, group), test_utils=checks)


@BITS
def test_transforms(bits):
    module, x, tangent = make(30, 20, bits), torch.randn(4, 3, 30), torch.randn(4, 3, 30)
    y = module(x).detach()
    torch.testing.assert_close(vmap(module)(x).detach(), y)
    value, change = jvp(module, (x,), (tangent,))
    torch.testing.assert_close(value.detach(), y)
    torch.testing.assert_close(change.detach(), (tangent @ module.dequantized().t()).detach())
    biases = torch.randn(4, 20)
    ys = vmap(lambda bias, x: functional_call(module, {"bias": bias}, x))(biases, x)
    torch.testing.assert_close(ys, y - module.bias.detach() + biases[:, None])


@BITS
def test_compiled_and_exported(bits):
    torch._dynamo.reset()
    module = nn.Sequential(make(30, 20, bits), nn.ReLU(), make(20, 5, bits)).eval()
    x = torch.randn(6, 30)
    with torch.no_grad():
        y = module(x)
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), y)
        torch.testing.assert_close(compiled(x[:4]), y[:4])
        program = torch.export.export(module, (x,))
        assert not any("fastops" in str(node.target) for node in program.graph.nodes)
        torch.testing.assert_close(program.module()(x), y)
        with fastops.export_kernels():
            kept = torch.export.export(module, (x,))
        assert sum("weight_only" in str(node.target) for node in kept.graph.nodes) == 2
        torch.testing.assert_close(kept.module()(x), y)


@BITS
def test_autocast_and_modes(bits):
    module, x = make(64, 32, bits), torch.randn(5, 64)
    wanted = module(x).detach()
    with torch.inference_mode():
        assert torch.equal(module(x), wanted)
    assert torch.equal(module(x).detach(), wanted)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y = module(x)
    assert y.dtype == torch.bfloat16


@pytest.mark.parametrize("config", ["int8_weight", "int4_weight", "fp8_weight"])
def test_quantize_(config):
    model = nn.Sequential(nn.Linear(256, 64), nn.ReLU(), fnn.Linear(64, 256, activation="gelu"), nn.Linear(256, 4))
    x = torch.randn(3, 256)
    with torch.no_grad():
        y = model(x)
        report = light.quantize_(model, config)
        assert [row.name for row in report.replaced] == ["0", "2"]
        assert all(type(model[i]) is light.LinearWeightOnly for i in (0, 2))
        assert model[2].activation == "gelu"
        assert (model(x) - y).abs().max() < {"int8_weight": 0.02, "fp8_weight": 0.05}.get(config, 0.3) * y.abs().max()
        for other in (
            copy.deepcopy(model),
            pickle.loads(pickle.dumps(model)),
            fastops.fuse(model),
            fastops.freeze(model.eval()),
        ):
            torch.testing.assert_close(other(x), model(x))
        fresh = nn.Sequential(nn.Linear(256, 64), nn.ReLU(), fnn.Linear(64, 256, activation="gelu"), nn.Linear(256, 4))
        light.quantize_(fresh, config)
        fresh.load_state_dict(model.state_dict())
        assert torch.equal(fresh(x), model(x))


def test_groups_longer_than_a_row():
    """They take no more memory than the row."""
    linear = nn.Linear(256, 32)
    long, row = (light.LinearWeightOnly.from_linear(linear, 4, group) for group in (2**40, 256))
    x = torch.randn(2, 256)
    assert torch.equal(long(x), row(x))


def test_errors():
    with pytest.raises(ValueError, match="bits must be 8 or 4, got 2"):
        light.LinearWeightOnly(64, 64, bits=2)
    with pytest.raises(ValueError, match="group_size must be a power of two from 16 on, or None, got 100"):
        light.LinearWeightOnly(64, 64, group_size=100)
    with pytest.raises(ValueError, match="quantize_: group_size must be a power of two from 16 on, or None, got 8"):
        light.quantize_(nn.Linear(128, 128), "int4_weight", group_size=8)
    with pytest.raises(ValueError, match="group_size is for weight-only layers, got 32 with 'int8_dynamic'"):
        light.quantize_(nn.Linear(128, 128), "int8_dynamic", group_size=32)
    with pytest.raises(ValueError, match="float8 weights have 8 bits and no group_size, got bits=4, group_size=None"):
        light.LinearWeightOnly(64, 64, bits=4, float8=True)
    with pytest.raises(ValueError, match=r"quantize_: float8 weights have 8 bits and no group_size, got .*=32"):
        light.quantize_(nn.Linear(128, 128), "fp8_weight", group_size=32)
    module = make(64, 32, "fp8")
    with pytest.raises(RuntimeError, match="group_size must be in_features for float8 weights, got 32"):
        OPS.weight_only_forward(torch.randn(2, 64), module.weight, module.scale, None, None, 32)
    with pytest.raises(RuntimeError, match="float8 weights have no offset"):
        OPS.weight_only_forward(torch.randn(2, 64), module.weight, module.scale, module.scale, None, 64)
    module = make(64, 32, 4)
    with pytest.raises(RuntimeError, match="input must be float32, bfloat16 or float16, got float64"):
        module(torch.randn(2, 64).double())
    with pytest.raises(RuntimeError, match=r"weight must have shape \(out_features, 30\) for in_features = 60"):
        module(torch.randn(2, 60))
    with pytest.raises(RuntimeError, match="group_size must be a power of two from 16 on, or in_features, got 24"):
        OPS.weight_only_forward(torch.randn(2, 64), module.weight, module.scale, None, None, 24)
    with pytest.raises(RuntimeError, match=r"scale must have shape \(32, 4\), a column for each group"):
        OPS.weight_only_forward(torch.randn(2, 64), module.weight, module.scale, None, None, 16)


def test_casts_keep_scale_and_offset():
    module = make(64, 32, 4)
    scale, offset = module.scale.clone(), module.offset.clone()
    module.half()
    assert torch.equal(module.scale, scale)
    assert torch.equal(module.offset, offset)
    assert module.bias.dtype == torch.float16
