"""fastops.light.LinearSparse, Conv2d1x1Sparse, sparsify_ and densify_: against dense layers with the same weights."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from tiers import BEST, TIERS, runs
from torch import nn
from torch.autograd import gradgradcheck
from torch.func import functional_call, jvp, vmap
from torch.library import opcheck
from torch.nn.utils import prune

import docs
import fastops
import fastops.nn as fnn
from fastops import _C, light
from fastops.ops.sparse_linear import sparse_linear

OPS = torch.ops.fastops
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BLOCKS = [(1, 1), (1, 4), (4, 4), (16, 1)]


@pytest.fixture(params=TIERS)
def tier(request):
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(BEST)


def zeroed(weight, block, zeros=0.75):
    """Zeros whole blocks; rows of blocks, too."""
    n, k = weight.shape[:2]
    rows, cols = block
    kept = torch.rand(-(-n // rows), -(-k // cols)) >= zeros
    if len(kept) > 2:
        kept[len(kept) // 2] = False
    mask = kept.repeat_interleave(rows, 0).repeat_interleave(cols, 1)[:n, :k]
    with torch.no_grad():
        weight.mul_(mask.view(n, k, *[1] * (weight.dim() - 2)))


def make(k, n, block=(1, 1), bias=True, dtype=torch.float32, zeros=0.75):
    """A sparse layer, and the dense one."""
    linear = nn.Linear(k, n, bias=bias)
    zeroed(linear.weight, block, zeros)
    return light.LinearSparse.from_linear(linear, block).to(dtype), linear.to(dtype)


def make_conv(k, n, block=(1, 1), stride=1):
    conv = nn.Conv2d(k, n, 1, stride=stride)
    zeroed(conv.weight, block)
    return light.Conv2d1x1Sparse.from_conv(conv, block), conv


def close(module, x, actual, activation=lambda y: y):
    """Within the roundings of as many float32 products as there are, and one of the result's type."""
    w = module.weight.detach().double()
    bias = None if module.bias is None else module.bias.detach().double()
    product = F.linear if w.dim() == 2 else F.conv2d
    wanted = activation(product(x.detach().double(), w, bias))
    size = product(x.detach().double().abs(), w.abs(), None if bias is None else bias.abs())
    assert actual.dtype == x.dtype
    bound = torch.finfo(x.dtype).eps * wanted.abs() + (x.shape[-1] + 8) * 2**-24 * size + 1e-30
    if x.dtype is torch.float16:
        bound += 2**-24
    assert ((actual.detach().double() - wanted).abs() <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", BLOCKS)
def test_against_pytorch(block, dtype, tier):
    for m, k, n in [(1, 1, 1), (3, 64, 33), (9, 65, 31), (1, 783, 10), (40, 25, 70)]:
        module, x = make(k, n, block, dtype=dtype)[0], torch.randn(m, k).to(dtype)
        with torch.no_grad(), fastops.record() as calls:
            close(module, x, module(x))
        (call,) = calls
        assert call.op == "sparse_linear"
        assert call.kernel.startswith("sparse" if block == (1, 1) else f"sparse_{block[0]}x{block[1]}_")
        assert (tier if runs(tier, dtype) else "avx512") in call.kernel


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


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    module, x = make(37, 20)[0], LAYOUTS[layout](torch.randn(6, 37))
    with torch.no_grad():
        y = module(x)
    close(module, x, y)
    assert y.is_contiguous()


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("stride", [1, (2, 3)])
def test_conv(block, stride):
    module, conv = make_conv(19, 22, block, stride)
    images = torch.randn(3, 19, 7, 6)
    last = images.to(memory_format=torch.channels_last)
    with torch.no_grad():
        for x in (images, last, images[:, :, ::2], images[:0], images.bfloat16()):
            layer = copy.deepcopy(module).to(x.dtype)
            y = layer(x)
            assert y.shape == conv(x.float()).shape
            close(layer, x[:, :, :: module.stride[0], :: module.stride[1]], y)
        torch.testing.assert_close(module(images[0]), module(images)[0])
        pixel = images[:, :, :1, :1]
        torch.testing.assert_close(module(pixel), conv(pixel))
        assert module(last).is_contiguous(memory_format=torch.channels_last)
        assert module(images).is_contiguous()


@pytest.mark.parametrize("block", BLOCKS)
def test_sizes_of_zero_and_no_elements(block):
    with torch.no_grad():
        assert make(4, 0, block)[0](torch.randn(3, 4)).shape == (3, 0)
        for module in (make(0, 5, block)[0], make(7, 5, block, zeros=1.0)[0], light.LinearSparse(7, 5, True, block)):
            x = torch.randn(3, module.in_features)
            assert torch.equal(module(x), module.bias.detach().expand(3, 5))
            assert module.density == 0
            with torch.enable_grad():
                module(x.requires_grad_()).sum().backward()


def test_infinity_and_nan():
    """A weight that is not stored multiplies nothing: no NaN where a dense product has 0 times infinity."""
    linear = nn.Linear(4, 2, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[1.0, 0, 0, 2], [0, float("nan"), 0, 1]]))
        module = light.LinearSparse.from_linear(linear)
        y = module(torch.tensor([[1.0, 2, float("inf"), 3], [float("nan"), 1, 1, 1]]))
    assert y[0, 0] == 7
    assert y[0, 1].isnan()
    assert y[1].isnan().all()


@pytest.mark.parametrize("activation", ["relu", "gelu", nn.LeakyReLU(0.2)])
def test_activation(activation):
    linear = fnn.Linear(64, 40, activation=activation)
    zeroed(linear.weight, (4, 4))
    module = light.LinearSparse.from_linear(linear, (4, 4))
    f = activation if isinstance(activation, nn.Module) else getattr(F, activation)
    x = torch.randn(9, 64)
    with torch.no_grad():
        close(module, x, module(x), f)
    close(module, x, module(x), f)  # recorded: two ops


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("images", [False, True])
def test_gradients(block, images):
    module, dense = make_conv(21, 18, block) if images else make(21, 18, block)
    x = torch.randn(2, 21, 5, 3) if images else torch.randn(2, 7, 21)
    if images:
        x = x.to(memory_format=torch.channels_last)
    x.requires_grad_()
    y = module(x)
    grad = torch.randn_like(y)
    grads = torch.autograd.grad(y, [x, module.values, module.bias], grad)
    wanted = torch.autograd.grad(dense(x), [x, dense.weight, dense.bias], grad)
    torch.testing.assert_close(grads[0], wanted[0])
    torch.testing.assert_close(grads[2], wanted[2])
    with torch.no_grad():
        changed = copy.deepcopy(module)
        changed.values.copy_(grads[1])
        torch.testing.assert_close(changed.weight, wanted[1] * (changed.weight != 0))


def test_second_gradients():
    module, _ = make(5, 6, (1, 4))
    crow, col = module.crow_indices, module.col_indices

    def call(x, values, bias):
        return sparse_linear(x, crow, col, values, bias, 6, -1) ** 2

    operands = torch.randn(3, 5), module.values.detach(), torch.randn(6)
    operands = tuple(t.clone().requires_grad_() for t in operands)
    assert gradgradcheck(call, operands, eps=1e-2, atol=5e-2, rtol=5e-2, nondet_tol=1e-6)


def test_trains():
    """Zeros stay zero."""
    module, _ = make(20, 8, (4, 4))
    zeros = module.weight.detach() == 0
    optimizer = torch.optim.Adam(module.parameters(), 0.05)
    x, target = torch.randn(64, 20), torch.randn(64, 8)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        losses.append(F.mse_loss(module(x), target))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]
    assert (module.weight.detach()[zeros] == 0).all()


def test_opcheck():
    module, x = make(30, 20, (4, 4))[0], torch.randn(7, 30, requires_grad=True)
    operands = module.crow_indices, module.col_indices, module.values
    opcheck(OPS.sparse_linear_forward, (x, *operands, module.bias, 20, -1))
    grad = torch.randn(7, 20)
    opcheck(OPS.sparse_linear_backward, (grad, x.detach(), *operands, 20, -1, [True, True]))
    single = make(30, 20)[0].requires_grad_(False)
    images = torch.randn(2, 30, 3, 4).to(memory_format=torch.channels_last)
    operands = single.crow_indices, single.col_indices, single.values
    opcheck(OPS.sparse_linear_forward, (images, *operands, None, 20, 1))


def test_transforms():
    module, x, tangent = make(30, 20, (4, 4))[0], torch.randn(4, 3, 30), torch.randn(4, 3, 30)
    y = module(x).detach()
    torch.testing.assert_close(vmap(module)(x).detach(), y)
    value, change = jvp(module, (x,), (tangent,))
    torch.testing.assert_close(value.detach(), y)
    torch.testing.assert_close(change.detach(), (tangent @ module.weight.t()).detach())
    biases = torch.randn(4, 20)
    ys = vmap(lambda bias, x: functional_call(module, {"bias": bias}, x))(biases, x)
    torch.testing.assert_close(ys, y - module.bias.detach() + biases[:, None])
    grads = torch.func.grad(lambda values: functional_call(module, {"values": values}, x).sum())(module.values)
    per_sample = vmap(
        torch.func.grad(lambda values, x: functional_call(module, {"values": values}, x).sum()), in_dims=(None, 0)
    )(module.values, x)
    torch.testing.assert_close(per_sample.sum(0), grads, rtol=1e-4, atol=1e-4)


def test_compiled_and_exported():
    torch._dynamo.reset()
    module = nn.Sequential(make_conv(6, 5)[0], nn.Flatten(), make(45, 20, (4, 4))[0], nn.ReLU(), make(20, 5)[0]).eval()
    x = torch.randn(6, 6, 3, 3)
    y = module(x).detach()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x).detach(), y)
    compiled(x).sum().backward()
    assert module[0].values.grad is not None
    with torch.no_grad():
        program = torch.export.export(module, (x,))
        assert not any("fastops" in str(node.target) for node in program.graph.nodes)
        torch.testing.assert_close(program.module()(x), y)
        with fastops.export_kernels():
            kept = torch.export.export(module, (x,))
        assert sum("sparse_linear" in str(node.target) for node in kept.graph.nodes) == 3
        torch.testing.assert_close(kept.module()(x), y)
        torch.testing.assert_close(torch.jit.trace(module, x)(x), y)


def test_autocast_modes_and_casts():
    module, _ = make(64, 32)
    x = torch.randn(5, 64)
    wanted = module(x).detach()
    with torch.inference_mode():
        assert torch.equal(module(x), wanted)
    assert torch.equal(module(x).detach(), wanted)
    with torch.autocast("cpu", torch.bfloat16):
        assert module(x).dtype == torch.bfloat16
    values = module.values.detach().clone()
    module(x).sum().backward()
    module.half()
    assert module.values.dtype == module.values.grad.dtype == torch.float32
    assert torch.equal(module.values, values)
    assert module.bias.dtype == torch.float16
    assert module.double().bias.dtype == torch.float64


def test_same_bits_for_any_number_of_threads():
    module, x = make(300, 260, (1, 1))[0], torch.randn(70, 300)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            operand = x.clone().requires_grad_()
            y = module(operand)
            results.append([y, *torch.autograd.grad(y.square().sum(), [operand, module.values])])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def pruned_model():
    model = nn.Sequential(
        nn.Conv2d(32, 300, 1),
        nn.ReLU(),
        nn.Conv2d(300, 8, 3, padding=1),
        nn.Flatten(),
        fnn.Linear(8 * 16, 128, activation="gelu"),
        nn.Linear(128, 128),
        nn.Linear(128, 128, bias=False),
    )
    prune.random_unstructured(model[0], "weight", 0.9)
    zeroed(model[4].weight, (4, 4), 0.8)
    prune.ln_structured(model[6], "weight", 0.8, 2, dim=1)
    return model


def seen(*_):
    seen.calls += 1


def test_sparsify_():
    model, x = pruned_model(), torch.randn(2, 32, 4, 4)
    model[6].register_forward_hook(seen)
    seen.calls = 0
    y = model(x).detach()
    values = {name: layer.weight.detach().clone() for name, layer in (("0", model[0]), ("4", model[4]))}
    first = model[0]
    report = light.sparsify_(model)
    assert {row.name: row.result for row in report.replaced} == {
        "0": "fastops.light.Conv2d1x1Sparse, 90.0% zeros",
        "4": f"fastops.light.LinearSparse, {float((values['4'] == 0).float().mean()):.1%} zeros, blocks of 4 x 4",
        "6": "fastops.light.LinearSparse, 79.7% zeros, blocks of 16 x 1",
    }
    assert {row.name: row.result for row in report.skipped} == {"5": "0.0% zeros, fewer than min_sparsity=0.7"}
    assert [row.name for row in report.left] == ["1", "2"]
    assert model[0] is first
    assert model[4].activation == "gelu"
    assert torch.equal(model[0].weight, values["0"])
    torch.testing.assert_close(model(x).detach(), y, rtol=1e-4, atol=1e-4)
    assert seen.calls == 2
    assert "already sparse" in str(light.sparsify_(model))
    assert "sparse" in str(light.quantize_(copy.deepcopy(model)))
    with torch.no_grad():
        for other in (
            copy.deepcopy(model),
            pickle.loads(pickle.dumps(model)),
            fastops.fuse(model),
            fastops.freeze(copy.deepcopy(model).eval()),
        ):
            torch.testing.assert_close(other(x), y, rtol=1e-4, atol=1e-4)
    report = light.densify_(model)
    assert [row.result for row in report.replaced] == [
        "torch.nn.Conv2d",
        "fastops.nn.linear.FusedLinear",
        "torch.nn.Linear",
    ]
    assert [type(model[i]) for i in (0, 4, 6)] == [nn.Conv2d, type(fnn.Linear(1, 1, activation="relu")), nn.Linear]
    assert set(model.state_dict()) == {f"{i}.{name}" for i in (0, 2, 4, 5) for name in ("weight", "bias")} | {
        "6.weight"
    }
    assert torch.equal(model[4].weight, values["4"])
    torch.testing.assert_close(model(x).detach(), y, rtol=1e-4, atol=1e-4)
    assert light.sparsify_(model).replaced


def test_state_dict():
    model, x = pruned_model(), torch.randn(2, 32, 4, 4)
    light.sparsify_(model)
    state = model.state_dict()
    fresh = pruned_model()
    light.sparsify_(fresh, 0, lambda module, name: f"{name}.values" in state)
    fresh.load_state_dict(state)
    with torch.no_grad():
        assert torch.equal(fresh(x), model(x))
    with pytest.raises(RuntimeError, match=r"0\.weight is dense: load it before sparsify_, or after densify_"):
        model.load_state_dict({"0.weight": torch.zeros(300, 32, 1, 1)}, strict=False)


BAD = {
    "a column too large": (
        "col_indices",
        lambda t: t.index_fill(0, torch.tensor([3]), 30),
        "from 0 to 29, got 0 to 30",
    ),
    "a negative column": ("col_indices", lambda t: t.index_fill(0, torch.tensor([3]), -1), "from 0 to 29, got -1"),
    "a column twice": ("col_indices", lambda t: t.index_copy(0, torch.tensor([1]), t[:1]), "must ascend in each row"),
    "rows that descend": ("crow_indices", lambda t: t.index_fill(0, torch.tensor([2]), 10**6), "crow_indices must"),
    "more elements": ("crow_indices", lambda t: t * 2, "crow_indices must"),
    "too few values": ("values", lambda t: t[:-1], "crow_indices must"),
    "other blocks": ("values", lambda t: t.view(-1, 1, 1).expand(-1, 3, 3), "values must be"),
    "integers": ("values", lambda t: t.long(), "values must be"),
    "float indices": ("col_indices", lambda t: t.float(), "must be a vector of int32"),
}


@pytest.mark.parametrize("bad", BAD)
def test_corrupted_checkpoints_are_refused(bad):
    name, change, message = BAD[bad]
    torch.manual_seed(0)
    linear = nn.Linear(30, 20)
    with torch.no_grad():
        linear.weight[:, 10:] = 0
    module = light.LinearSparse.from_linear(linear)
    state, x = module.state_dict(), torch.randn(3, 30)
    y = module(x)
    with pytest.raises(RuntimeError, match=message):
        module.load_state_dict({**state, name: change(state[name])})
    assert torch.equal(module(x), y)


def test_corrupted_indices_are_refused():
    """Also those that reach a module in another way, once a call has been good."""
    module, x = make(30, 20)[0], torch.randn(3, 30)
    with torch.no_grad():
        module(x)
        module.col_indices[-1] = 30
        with pytest.raises(RuntimeError, match="col_indices must ascend in each row, from 0 to at most 29"):
            module(x)
    with pytest.raises(RuntimeError, match="col_indices must ascend in each row"):
        module(x)
    module, _ = make(30, 20)
    module.crow_indices[5] = -1
    for mode in (torch.no_grad, torch.enable_grad):
        with mode(), pytest.raises(RuntimeError, match="crow_indices must not descend"):
            module(x)
    grad = torch.randn(3, 20)
    operands = module.crow_indices, module.col_indices, module.values.detach()
    with pytest.raises(RuntimeError, match="crow_indices must not descend"):
        OPS.sparse_linear_backward(grad, x, *operands, 20, -1, [True, True])


def test_what_sparsify_leaves():
    linear = nn.Linear(128, 128)
    zeroed(linear.weight, (1, 1), 0.5)
    (row,) = light.sparsify_(linear, min_sparsity=0.4).skipped
    assert row.result.endswith("% zeros where they are would be no faster than the dense layer")
    small = nn.Linear(8, 8)
    nn.init.zeros_(small.weight)
    assert light.sparsify_(small).skipped[0].result == "fewer than 8192 weights, which would be no faster"
    assert light.sparsify_(small, filter_fn=lambda *_: False).skipped[0].result == "filter_fn said no"
    assert light.sparsify_(small, filter_fn=lambda *_: True).replaced
    assert light.sparsify_(nn.Linear(4, 4).double()).skipped[0].result.startswith("weight has dtype float64")
    assert light.sparsify_(nn.Linear(4, 4, device="meta")).skipped[0].result.startswith("weight is on meta")
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(128, 128))
    assert "parametrized" in light.sparsify_(normed).skipped[0].result
    encoder = nn.TransformerEncoderLayer(8, 1, 8)
    assert not light.sparsify_(encoder, 0, lambda *_: True).replaced
    conv = nn.Sequential(nn.Conv2d(4, 4, 1, padding=1), nn.Conv2d(4, 4, 1, groups=2))
    assert not light.sparsify_(conv, 0, lambda *_: True).replaced


def test_errors():
    with pytest.raises(TypeError, match=r"sparsify_: model must be a torch.nn.Module, got int"):
        light.sparsify_(3)
    with pytest.raises(TypeError, match=r"densify_: model must be a torch.nn.Module, got int"):
        light.densify_(3)
    with pytest.raises(ValueError, match="sparsify_: rows must be a positive int, got 0"):
        light.sparsify_(nn.Linear(4, 4), rows=0)
    with pytest.raises(ValueError, match="sparsify_: min_sparsity must be from 0 to 1, got 70"):
        light.sparsify_(nn.Linear(4, 4), 70)
    with pytest.raises(ValueError, match=r"block_size must be one of .*, got \(2, 2\)"):
        light.LinearSparse(4, 4, block_size=(2, 2))
    with pytest.raises(TypeError, match=r"must be a torch.nn.Linear or fastops.nn.Linear, got Conv2d"):
        light.LinearSparse.from_linear(nn.Conv2d(4, 4, 1))
    with pytest.raises(TypeError, match=r"must be a torch.nn.Conv2d or fastops.nn.Conv2d, got Linear"):
        light.Conv2d1x1Sparse.from_conv(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="conv must have kernels of 1 x 1, no groups and no padding"):
        light.Conv2d1x1Sparse.from_conv(nn.Conv2d(4, 4, 3))
    module, _ = make(64, 32, (4, 4))
    with pytest.raises(RuntimeError, match="input must be float32, bfloat16 or float16, got float64"):
        module.double()(torch.randn(2, 64).double())
    with pytest.raises(RuntimeError, match="col_indices must ascend in each row, from 0 to at most 14"):
        module.float()(torch.randn(2, 60))
    with pytest.raises(RuntimeError, match=r"input must have shape \(N, C, H, W\) or \(C, H, W\), got \(2, 4\)"):
        light.Conv2d1x1Sparse(4, 4)(torch.randn(2, 4))
    operands = module.crow_indices, module.col_indices, module.values.detach()
    x = torch.randn(2, 64)
    for changed, message in [
        ({"crow_indices": operands[0].long()}, "crow_indices must be int32, got Long"),
        ({"col_indices": operands[1].long()}, "col_indices must be int16 or int32, got Long"),
        ({"values": operands[2].double()}, "values must be float32, got float64"),
        ({"out_features": 40}, r"crow_indices must have shape \(11,\) for 40 out_features in blocks of 4, got \[9\]"),
        ({"out_features": -1}, "out_features must not be negative, got -1"),
        ({"bias": torch.zeros(3)}, r"bias must have shape \(32,\) \(out_features\), got \[3\]"),
        ({"dim": 0}, "dim must be -1 or 1, got 0"),
    ]:
        names = ("crow_indices", "col_indices", "values", "bias", "out_features", "dim")
        arguments = {**dict(zip(names, (*operands, None, 32, -1), strict=True)), **changed}
        with pytest.raises(RuntimeError, match=message):
            OPS.sparse_linear_forward(x, **arguments)


@pytest.mark.parametrize("name", ["LinearSparse", "Conv2d1x1Sparse", "sparsify_", "densify_"])
def test_docs(name):
    assert docs.missing_parts(getattr(light, name)) == []
    assert docs.failed_examples(getattr(light, name), name) == ""


def test_docs_of_methods():
    for method in (light.LinearSparse.from_linear, light.Conv2d1x1Sparse.from_conv):
        assert docs.failed_examples(method, method.__qualname__) == ""
