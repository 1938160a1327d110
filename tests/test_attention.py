"""scaled_dot_product_attention against a float64 reference: values and gradients, every tier, layout, mask and edge."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from calls import Call
from compare import TRACED, UNTRACED, close, exact
from modes import Through
from reference import gradients
from torch import nn
from torch.func import hessian, jvp, vmap
from torch.library import opcheck

import fastops
import fastops.functional as FF
import fastops.nn as fnn
from fastops._fusion import attend
from fastops.ops import attention as attention_ops

OPS = torch.ops.fastops
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]

# (batch, heads, queries, keys, size, value_size): around the vectors and the tiles (12 x 32), the blocks of queries (48
# and 96) and those of keys (512).
SHAPES = [
    (1, 1, 1, 1, 1, 1), (2, 3, 5, 7, 8, 4), (1, 2, 12, 32, 16, 32), (1, 2, 13, 33, 17, 33), (1, 1, 47, 31, 64, 64),
    (2, 1, 49, 65, 15, 31), (1, 1, 97, 95, 32, 16), (1, 2, 197, 197, 8, 8), (1, 1, 5, 513, 9, 3),
    (1, 1, 100, 1030, 4, 5), (1, 1, 4, 512, 4, 4),
]  # fmt: skip

MASKS = ["none", "causal", "bool", "float", "keys", "nothing"]


def operands(shape, dtype):
    batch, heads, queries, keys, size, value_size = shape
    return (
        torch.randn(batch, heads, queries, size).to(dtype),
        torch.randn(batch, heads, keys, size).to(dtype),
        torch.randn(batch, heads, keys, value_size).to(dtype),
    )


def options(mask, shape, dtype):
    batch, heads, queries, keys = shape[:4]
    if mask == "causal":
        return {"is_causal": True}
    if mask == "bool":
        return {"attn_mask": torch.rand(batch, 1, queries, keys) < 0.7}
    if mask == "float":
        return {"attn_mask": torch.randn(heads, queries, keys).to(dtype)}
    if mask == "keys":  # one row for all queries
        return {"attn_mask": torch.rand(batch, 1, 1, keys) < 0.9}
    if mask == "nothing":  # some queries see no key
        seen = torch.ones(queries, keys, dtype=torch.bool)
        seen[::2] = False
        return {"attn_mask": seen}
    return {}


def wide(options):
    return {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in options.items()}


def run(function, tensors, grad, place=lambda t: t, **options):
    leaves = [place(t.detach()).requires_grad_() for t in tensors]
    options = {name: place(t) if isinstance(t, torch.Tensor) else t for name, t in options.items()}
    y = function(*leaves, **options)
    return [t.cpu() for t in (y, *gradients(y, grad.to(y.device), *leaves))]


def compare(tensors, grad, place=lambda t: t, **options):
    """place: onto the device of ours."""
    reference = run(F.scaled_dot_product_attention, [t.double() for t in tensors], grad, **wide(options))
    ours, theirs = (
        run(m.scaled_dot_product_attention, tensors, grad, to, **options) for m, to in ((FF, place), (F, lambda t: t))
    )
    # The gradients of scores are differences of these.
    terms = max(1.0, float((grad.double() @ tensors[2].double().mT).abs().max())) if reference[0].numel() else 1.0
    for name, *three in zip(("output", "query", "key", "value"), ours, reference, theirs, strict=True):
        close(
            *three, name, max(tensors[0].shape[2], tensors[1].shape[2]), 4.0, terms if name in ("query", "key") else 1.0
        )
    return ours, theirs


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients(isa, mask, dtype):
    for shape in SHAPES:
        tensors = operands(shape, dtype)
        grad = torch.randn(*shape[:3], shape[5]).to(dtype)
        with fastops.record() as rows:
            compare(tensors, grad, **options(mask, shape, dtype))
        assert all("attention" in row.kernel for row in rows)
        # With causal and a negative scale PyTorch's own result is NaN.
        compare(tensors, grad, **options(mask, shape, dtype), scale=0.3 if mask == "causal" else -0.3)


def layouts(shape, dtype):
    batch, heads, queries, keys, size, value_size = shape
    tensors = operands(shape, dtype)
    yield tensors
    yield [t.transpose(1, 2).contiguous().transpose(1, 2) for t in tensors]  # heads split from a linear layer's output
    if queries == keys and size == value_size:
        together = torch.randn(batch, queries, 3 * heads * size).to(dtype)
        yield [t.view(batch, queries, heads, size).transpose(1, 2) for t in together.chunk(3, -1)]
    yield [t.mT.contiguous().mT for t in tensors]
    yield [t[:1].expand(batch, -1, -1, -1) for t in tensors]
    yield [t[:, :1].expand(-1, heads, -1, -1) for t in tensors]
    yield [torch.cat([t, t], 2)[:, :, ::2] for t in tensors]


def test_layouts(isa):
    shape = (2, 3, 21, 21, 16, 16)
    for tensors in layouts(shape, torch.float32):
        for grad in (torch.randn(2, 3, 21, 16), torch.randn(2, 21, 3, 16).transpose(1, 2), torch.ones(1, 1, 1, 1)):
            ours, theirs = compare(tensors, grad.expand(2, 3, 21, 16), is_causal=True)
            assert ours[0].stride() == theirs[0].stride() or tensors[0].stride(-1) != 1 or 0 in tensors[0].stride()


def test_masks_of_any_strides(isa):
    tensors, grad = operands((2, 3, 5, 40, 8, 8), torch.float32), torch.randn(2, 3, 5, 8)
    for mask in (
        torch.randn(5, 40), torch.randn(5, 1), torch.randn(2, 1, 1, 40), torch.randn(1, 3, 5, 1),
        torch.randn(40, 5).T, torch.randn(5, 80)[:, ::2],
    ):  # fmt: skip
        compare(tensors, grad, attn_mask=mask)


def test_bits_for_1_and_2_threads(isa):
    shape = (2, 3, 101, 600, 16, 24)
    tensors, grad = operands(shape, torch.float32), torch.randn(2, 3, 101, 24)
    results = []
    for count in (1, 2, 2):
        torch.set_num_threads(count)
        results.append(run(FF.scaled_dot_product_attention, tensors, grad))
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert torch.equal(one, two)


def test_nan_and_infinity(isa):
    q, k, v = operands((1, 1, 4, 20, 8, 8), torch.float32)
    q[0, 0, 1, 3] = math.nan
    ours, theirs = FF.scaled_dot_product_attention(q, k, v), F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(ours, theirs, equal_nan=True)
    assert torch.isnan(ours[0, 0, 1]).all()
    q, k = 1e3 * torch.ones(1, 1, 4, 8), 1e3 * torch.randn(1, 1, 20, 8)  # scores of millions
    torch.testing.assert_close(FF.scaled_dot_product_attention(q, k, v), F.scaled_dot_product_attention(q, k, v))


def test_empty_tensors():
    for shape in ((0, 2, 3, 4, 5, 6), (2, 2, 0, 4, 5, 6)):
        tensors = [t.requires_grad_() for t in operands(shape, torch.float32)]
        y = FF.scaled_dot_product_attention(*tensors)
        assert y.shape == (*shape[:3], shape[5])
        y.sum().backward()
        assert all(not t.grad.any() for t in tensors)


@pytest.mark.parametrize("needs", [[0], [1], [2], [0, 1], [1, 2], [0, 2]])
def test_only_the_gradients_asked_for(needs):
    tensors, grad = operands((2, 2, 13, 17, 8, 8), torch.float32), torch.randn(2, 2, 13, 8)
    for i in needs:
        tensors[i].requires_grad_()
    ours, theirs = (
        gradients(m.scaled_dot_product_attention(*tensors), grad, *(tensors[i] for i in needs)) for m in (FF, F)
    )
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-4)


def test_double_backward():
    shape = (1, 2, 3, 4, 2, 3)
    tensors = [t.requires_grad_() for t in operands(shape, torch.float64)]
    for mask in ("none", "causal", "float", "nothing"):
        more = options(mask, shape, torch.float64)

        def ours(*t, more=more):
            return FF.scaled_dot_product_attention(*t, **more)

        assert torch.autograd.gradcheck(ours, tensors, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(ours, tensors, check_fwd_over_rev=True)
        with Through():
            assert torch.autograd.gradgradcheck(ours, tensors)


def test_func():
    tensors = operands((1, 2, 3, 4, 2, 3), torch.float64)
    batch = [torch.stack([t, -t]) for t in tensors]
    every = (0, 1, 2)

    def same(transform):
        pair = [transform(lambda *t, m=m: m(*t).pow(3).sum()) for m in (FF.scaled_dot_product_attention, _by_hand)]
        torch.testing.assert_close(*pair)

    same(lambda f: torch.func.grad(f, every)(*tensors))
    same(lambda f: jvp(f, tensors, tensors))
    same(lambda f: hessian(f, every)(*tensors))
    same(lambda f: vmap(torch.func.grad(f, every))(*batch))
    same(lambda f: vmap(torch.func.grad(f, every), (0, None, None))(batch[0], *tensors[1:]))
    same(lambda f: vmap(f, (None, 0, 0))(tensors[0], *batch[1:]))


def _by_hand(q, k, v):
    return (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v


def test_opcheck():
    q, k, v = (t.requires_grad_() for t in operands((1, 2, 3, 4, 2, 3), torch.float64))
    for mask, causal in ((None, False), (None, True), (torch.randn(3, 4, dtype=torch.float64), False)):
        opcheck(OPS.attention_forward, (q, k, v, mask, causal, 0.5))
        y, lse = OPS.attention_forward(q.detach(), k.detach(), v.detach(), mask, causal, 0.5)
        g = torch.randn_like(y).requires_grad_()
        for wanted in ([True, True, True], [False, True, False]):
            utils = TRACED if all(wanted) or causal else UNTRACED
            opcheck(OPS.attention_backward, (g, q, k, v, mask, y, lse, causal, 0.5, wanted), test_utils=utils)


def test_second_derivatives_of_the_backward_op():
    q, k, v = (t.requires_grad_() for t in operands((1, 1, 3, 4, 2, 3), torch.float64))
    g = torch.randn(1, 1, 3, 3, dtype=torch.float64, requires_grad=True)
    every = [True, True, True]

    def through(g, q, k, v):
        y, lse = OPS.attention_forward(q.detach(), k.detach(), v.detach(), None, False, 0.5)
        return OPS.attention_backward(g, q, k, v, None, y, lse, False, 0.5, every)

    def direct(g, q, k, v):
        return attention_ops._gradients(g, q, k, v, None, False, 0.5, every)

    cotangents = [torch.randn_like(t) for t in direct(g, q, k, v)]
    results = [torch.autograd.grad(f(g, q, k, v), (g, q, k, v), cotangents) for f in (through, direct)]
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("mask", ["none", "causal", "bool"])
def test_both_doors(mask):
    shape = (2, 2, 9, 9, 8, 8)
    tensors, grad, more = operands(shape, torch.float32), torch.randn(2, 2, 9, 8), options(mask, shape, torch.float32)
    results = [run(FF.scaled_dot_product_attention, tensors, grad, **more)]
    with Through():
        results.append(run(FF.scaled_dot_product_attention, tensors, grad, **more))
    for one, two in zip(*results, strict=True):
        exact(one, two)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(FF.scaled_dot_product_attention, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for length in (5, 7):
        shape = (2, 2, length, length, 8, 8)
        tensors, grad = operands(shape, torch.float32), torch.randn(2, 2, length, 8)
        one, two = run(compiled, tensors, grad), run(F.scaled_dot_product_attention, tensors, grad)
        for a, b in zip(one, two, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_what_goes_to_pytorch():
    q, k, v = operands((2, 4, 5, 5, 8, 8), torch.float32)
    mask = torch.randn(5, 5, requires_grad=True)
    for tensors, more in (
        ((q[0], k[0], v[0]), {}),
        ((q, k[:1], v[:1]), {}),
        ((q[:, :, :3], *(t.repeat(1, 1, 13, 1) for t in (k, v))), {}),
        ((q, k, v), {"attn_mask": mask}),
        ((q, k[:, :2], v[:, :2]), {"enable_gqa": True}),
    ):
        with fastops.record() as rows:
            y = FF.scaled_dot_product_attention(*tensors, **more)
        assert [row.kernel for row in rows] == ["aten"]
        torch.testing.assert_close(y, F.scaled_dot_product_attention(*tensors, **more))
    with fastops.record() as rows:
        FF.scaled_dot_product_attention(q, k, v, dropout_p=0.5)
    assert [row.kernel for row in rows] == ["aten"]


def test_autocast():
    q, k, v = (t.requires_grad_() for t in operands((2, 4, 5, 5, 8, 8), torch.float32))
    mask = torch.randn(5, 5)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            ours, theirs = (m.scaled_dot_product_attention(q, k, v, mask) for m in (FF, F))
            with Through():
                general = FF.scaled_dot_product_attention(q, k, v, mask)
        assert ours.dtype == theirs.dtype == dtype
        exact(general, ours)
        torch.testing.assert_close(ours, theirs, atol=2e-2, rtol=2e-2)
        grads = [torch.autograd.grad(y.float().square().sum(), (q, k, v)) for y in (ours, theirs)]
        torch.testing.assert_close(*grads, atol=5e-2, rtol=5e-2)
    wide = [t.double() for t in (q, k, v)]
    with torch.autocast("cpu", torch.bfloat16):  # which leaves float64 alone
        assert FF.scaled_dot_product_attention(*wide).dtype == torch.float64


def test_refuses_as_pytorch():
    q, k, v = operands((2, 4, 5, 6, 8, 8), torch.float32)
    for tensors, more, message in (
        ((q, k[..., :7], v), {}, "key must have query's last size 8"),
        ((q, k.double(), v), {}, "key must have query's dtype"),
        ((q, 3.0, v), {}, "key must be a Tensor, got 3.0"),
        ((q, k, v), {"attn_mask": torch.ones(4, 4)}, None),
        ((q, k, v), {"attn_mask": torch.ones(6)}, None),
    ):
        try:
            F.scaled_dot_product_attention(*tensors, **more)
        except Exception as error:
            refusal = error
        with pytest.raises(type(refusal), match=message):
            FF.scaled_dot_product_attention(*tensors, **more)


# ---- nn.MultiheadAttention, nn.TransformerEncoderLayer -------------------------------------------------------------


def _masks(batch, heads, queries, keys):
    causal = torch.ones(queries, keys, dtype=torch.bool).triu(1)
    padding = torch.zeros(batch, keys, dtype=torch.bool)
    padding[0, -2:] = True
    yield {}
    yield {"attn_mask": causal}
    yield {"attn_mask": causal, "is_causal": True}
    yield {"attn_mask": torch.randn(batch * heads, queries, keys)}
    yield {"key_padding_mask": padding}
    yield {"key_padding_mask": padding, "attn_mask": causal}
    yield {"key_padding_mask": torch.randn(batch, keys), "attn_mask": torch.randn(queries, keys)}


def _alike(ours, theirs, inputs, **more):
    """Results and all gradients of two modules; returns the kernels that ours called."""
    results = []
    for module in (ours, theirs):
        leaves = {id(t): t.detach().clone().requires_grad_() for t in inputs}
        with fastops.record() as rows:
            y = module(*(leaves[id(t)] for t in inputs), **more)
            y = y[0] if isinstance(y, tuple) else y
            grads = torch.autograd.grad(y.square().sum(), [*leaves.values(), *module.parameters()], allow_unused=True)
        results.append((y, *grads))
        if module is ours:
            kernels = {row.op for row in rows if row.kernel != "aten"}
    for one, two in zip(*results, strict=True):
        assert (one is None) == (two is None)
        if one is not None:
            torch.testing.assert_close(one, two, atol=2e-5, rtol=1e-4)
    return kernels


@pytest.mark.parametrize("batch_first", [True, False])
def test_multihead_attention(batch_first):
    for options in ({}, {"bias": False}, {"kdim": 6, "vdim": 5}, {"dropout": 0.1}):
        theirs = nn.MultiheadAttention(8, 2, batch_first=batch_first, **options).train("dropout" not in options)
        ours = copy.deepcopy(theirs)
        assert "" in {row.name for row in fastops.replace_(ours).replaced}
        assert type(ours) is fnn.MultiheadAttention
        x = torch.randn(3, 5, 8) if batch_first else torch.randn(5, 3, 8)
        memory = [torch.randn(3, 5, n) if batch_first else torch.randn(5, 3, n) for n in (ours.kdim, ours.vdim)]
        for inputs in ([x, x, x], [x, *memory]):
            if "kdim" in options and inputs[1] is x:
                continue
            for masks in _masks(3, 2, 5, 5):
                kernels = _alike(ours, theirs, inputs, need_weights=False, **masks)
                assert kernels >= {"scaled_dot_product_attention", "linear"}
            assert _alike(ours, theirs, inputs) == set()  # need_weights
    x = torch.randn(3, 5, 8)
    assert fnn.MultiheadAttention(8, 2, batch_first=True)(x, x, x)[1].shape == (3, 5, 5)


def test_multihead_attention_leaves_to_pytorch():
    x = torch.randn(3, 5, 8)
    for options, inputs in (
        ({"dropout": 0.5}, x), ({"add_bias_kv": True}, x), ({"add_zero_attn": True}, x), ({}, x[0]),
    ):  # fmt: skip
        layer = fnn.MultiheadAttention(8, 2, batch_first=True, **options)
        with fastops.record() as rows:
            layer(inputs, inputs, inputs, need_weights=False)
        assert rows == []
    layer, plain = fnn.MultiheadAttention(8, 2), nn.MultiheadAttention(8, 2)
    for arguments, more in (
        ((x, x, x), {"is_causal": True}),
        ((x, x, x), {"attn_mask": torch.zeros(2, 2)}),
        ((x, x, x), {"key_padding_mask": torch.zeros(2, 2)}),
        ((x, x[:2], x), {}),
        ((x[..., :4], x, x), {}),
    ):
        refusals = []
        for module in (plain, layer):
            try:
                module(*arguments, need_weights=False, **more)
            except Exception as error:
                refusals.append((type(error), str(error)))
        assert len(refusals) == 2
        assert refusals[0] == refusals[1]


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_transformer_encoder_layer(activation):
    for norm_first in (False, True):
        theirs = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(
                8, 2, 16, 0.0, activation, batch_first=True, norm_first=norm_first
            ), 2, enable_nested_tensor=not norm_first,
        )  # fmt: skip
        ours = copy.deepcopy(theirs)
        fastops.replace_(ours)
        x, mask = torch.randn(3, 5, 8), torch.ones(5, 5, dtype=torch.bool).triu(1)
        padding = torch.zeros(3, 5, dtype=torch.bool)
        padding[0, -2:] = True
        for training in (True, False):
            for model in (ours, theirs):
                model.train(training)
            for masks in ({}, {"mask": mask}, {"mask": mask, "is_causal": True}, {"src_key_padding_mask": padding}):
                assert "scaled_dot_product_attention" in _alike(ours, theirs, [x], **masks)
        with torch.no_grad(), fastops.record() as rows:  # where torch.nn's takes its fast path
            torch.testing.assert_close(ours(x), theirs(x), atol=2e-5, rtol=1e-4)
        assert [row.op for row in rows].count("scaled_dot_product_attention") == 2
        with torch.no_grad():  # nested tensors
            one, two = (model(x, src_key_padding_mask=padding) for model in (ours, theirs))
            torch.testing.assert_close(one[~padding], two[~padding], atol=2e-5, rtol=1e-4)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    fastops.restore_(ours)
    assert [type(m) for m in ours.modules()] == [type(m) for m in theirs.modules()]


def test_attention_modules_compile_and_script():
    theirs = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    ours = copy.deepcopy(theirs)
    fastops.replace_(ours)
    x = torch.randn(3, 5, 8)
    for make in (lambda m: torch.compile(m, backend="eager", fullgraph=True), torch.jit.script):
        torch._dynamo.reset()
        torch.testing.assert_close(make(ours)(x), theirs(x), atol=1e-5, rtol=1e-4)
    assert type(ours) is fnn.TransformerEncoderLayer
    torch.testing.assert_close(torch.export.export(ours, (x,)).module()(x), theirs(x), atol=1e-5, rtol=1e-4)


# ---- for the tests that call every op (every_op.py) -----------------------------------------------------------------

_NAME = "scaled_dot_product_attention"


def _of(module, **more):
    return lambda *t: module.scaled_dot_product_attention(*t, **more)


def calls(size):
    yield Call(_NAME, _of(FF), _of(F), [(2, 2, 9, 8), (2, 2, 13, 8), (2, 2, 13, 8)])


def kernels(dtype, on_gpu):
    return {} if on_gpu and dtype.itemsize == 2 else {"attention": 2}


# How models take queries, keys and values, (batch, heads, length, size) each, from the output of one linear layer,
# (batch, length, 3 * heads * size), for 2 heads.


def by_permute(y):
    q, k, v = y.unflatten(2, (3, 2, -1)).permute(2, 0, 3, 1, 4)
    return q, k, v


def by_index(y):
    y = y.reshape(y.shape[0], y.shape[1], 3, 2, -1).permute(2, 0, 3, 1, 4)
    return y[0], y[1], y[2]


def by_unbind(y):
    q, k, v = y.unflatten(2, (3, 2, -1)).unbind(2)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def by_split(y):
    q, k, v = y.split(y.shape[2] // 3, dim=2)
    size = q.shape[0], q.shape[1], 2, q.size(2) // 2
    return q.view(size).transpose(1, 2), k.view(size).transpose(1, 2), v.view(size).transpose(1, 2)


def by_chunk(y):
    q, k, v = torch.chunk(y, 3, -1)
    return tuple(part.unflatten(2, (2, -1)).transpose(1, 2) for part in (q, k, v))


def by_heads(y):
    y = y.unflatten(2, (2, 3, -1))
    return tuple(y[:, :, :, i].transpose(1, 2) for i in range(3))


def keys_first(y):
    k, q, v = by_permute(y)
    return q, k, v


WAYS = {way.__name__: way for way in (by_permute, by_index, by_unbind, by_split, by_chunk, by_heads, keys_first)}


def parts(way, x):
    """A tensor that is not a leaf, and its parts."""
    whole = x * 1
    return whole, *WAYS[way](whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", WAYS)
def test_parts_of_one_tensor(way, dtype):
    """Their gradient is one tensor, and has the bits that three put together have."""
    x = torch.randn(2, 7, 48).to(dtype).requires_grad_()
    for causal in (False, True):
        whole, *three = parts(way, x)
        y = attend(whole, *three, is_causal=causal)
        assert [node for node, _ in y.grad_fn.next_functions] == [whole.grad_fn]
        grad = torch.randn_like(y)
        expected = FF.scaled_dot_product_attention(*parts(way, x)[1:], is_causal=causal)
        exact(y, expected)
        exact(*gradients(y, grad, x), *gradients(expected, grad, x))
    with torch.no_grad():
        exact(attend(*parts(way, x)), FF.scaled_dot_product_attention(*parts(way, x)[1:]))


def test_parts_of_one_tensor_again():
    """Of a gradient that is differentiated, that is batched, and of a graph that is used twice."""
    x = torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True)
    for way in WAYS:
        assert torch.autograd.gradcheck(lambda x, way=way: attend(*parts(way, x)), x, check_batched_grad=True)
        assert torch.autograd.gradgradcheck(lambda x, way=way: attend(*parts(way, x)), x)
    y = attend(*parts("by_chunk", x))
    grad = torch.randn_like(y)
    one, two = (torch.autograd.grad(y, x, grad, retain_graph=True) for _ in range(2))
    exact(*one, *two)


OTHERS = {
    "not all of it": lambda y: [y.unflatten(2, (4, 2, -1)).permute(2, 0, 3, 1, 4)[i] for i in range(3)],
    "with a gap": lambda y: [y.unflatten(2, (4, 2, -1)).permute(2, 0, 3, 1, 4)[i] for i in (0, 1, 3)],
    "one twice": lambda y: [y.unflatten(2, (3, 2, -1)).permute(2, 0, 3, 1, 4)[i] for i in (0, 1, 1)],
    "copies": lambda y: [t.clone() for t in by_chunk(y)],
    "one copy": lambda y: [*by_chunk(y)[:2], by_chunk(y)[2].clone()],
    "of another": lambda y: by_chunk(y + 1),
    "overlapping": lambda y: [y.unfold(2, 24, 12)[:, :, i].unflatten(2, (2, -1)).transpose(1, 2) for i in range(3)],
    "other sizes": lambda y: [t.unflatten(2, (2, -1)).transpose(1, 2) for t in y.split([12, 12, 24], 2)],
}


@pytest.mark.parametrize("case", OTHERS)
def test_what_is_not_three_parts(case):
    x = torch.randn(2, 7, 48, requires_grad=True)
    whole = x * 1
    results = [
        function(*OTHERS[case](whole)) for function in (FF.scaled_dot_product_attention, lambda *t: attend(whole, *t))
    ]
    exact(*results)
    assert len(results[1].grad_fn.next_functions) == 3
    grad = torch.randn_like(results[0])
    exact(*(g for y in results for g in torch.autograd.grad(y, x, grad, retain_graph=True)))


class Block(nn.Module):
    """way: a function of the linear layer's output; after: one of attention's result, and of all that led to it."""

    def __init__(self, way, after=lambda y, *_: y):
        super().__init__()
        self.qkv, self.way, self.after = nn.Linear(8, 24), way, after

    def forward(self, x):
        whole = self.qkv(x)
        q, k, v = self.way(whole)
        return self.after(F.scaled_dot_product_attention(q, k, v), whole, q, k, v)


@pytest.mark.parametrize("way", WAYS)
def test_a_fused_model_has_one_gradient_of_all_parts(way):
    torch.manual_seed(0)
    model, x = Block(WAYS[way]), torch.randn(2, 7, 8)
    fused = fastops.fuse(model)
    y = fused(x)
    assert len(y.grad_fn.next_functions) == 1
    results = [gradients(m(x), torch.ones_like(y), *m.parameters()) for m in (fused, model)]
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize(
    "after",
    [
        lambda y, whole, q, k, v: (y, q),
        lambda y, whole, q, k, v: y + k.sum(),
        lambda y, whole, q, k, v: y * whole.sum(),
        lambda y, whole, q, k, v: y + q.mul_(2),
    ],
    ids=["given", "read", "whole", "changed"],
)
def test_a_fused_model_whose_parts_have_other_users(after):
    model, x = Block(by_chunk, after), torch.randn(2, 7, 8)
    fused = fastops.fuse(model)
    results = []
    for m in (fused, model):
        try:
            y = m(x)
            y = y if isinstance(y, torch.Tensor) else y[0] * y[1]
            results.append(gradients(y, torch.ones_like(y), *m.parameters()))
        except RuntimeError as error:  # what was changed is needed
            results.append(str(error)[:60])
    if isinstance(results[1], str):
        assert results[0] == results[1]
        return
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-5)


def random_attention(rng):
    batch, heads, queries, keys, size, values = (rng.randint(1, n) for n in (2, 3, 60, 40, 20, 40))
    more = rng.choice(({}, {"is_causal": True}))
    shapes = [(batch, heads, queries, size), (batch, heads, keys, size), (batch, heads, keys, values)]
    return Call(_NAME, _of(FF, **more), _of(F, **more), shapes)


RANDOM_CALLS = [random_attention]
LAYERS = [("TransformerEncoderLayer", (6, 2, 8, 0.0))]
LOSSES = ["MultiheadAttention"]
