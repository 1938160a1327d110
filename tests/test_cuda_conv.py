"""The CUDA kernels of convolutions on the emulator: see gpu.py. References and tolerances are the CPU's.

A chip of one multiprocessor takes large tiles wherever they fit and never splits k; one of many takes small ones and
splits.
"""

import pytest
import torch
import torch.nn.functional as F
from compare import close, exact
from gpu import DEVICE, EMULATED, SCHEDULES, compare_second_order, configured, put
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference import CONVS, DTYPES, LAYOUTS, Conv, integers
from test_conv import channels_last, geometries, memory_format, operands
from test_cuda_linear import FUSED, _tf32, run

import fastops
import fastops.functional as FF
from fastops import _C

CHIPS = [1, 4, 64]
LASTS = pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
# Around the tiles, 64 and 128 of positions and channels, 16 and 32 of taps and channels; channels in whole vectors, so
# that they are copied without registers; k that is split.
TILES = [
    Conv(2, 16, 66, (8, 9), (3, 3), padding=1),
    Conv(1, 40, 24, (5, 7), (3, 3), padding=1),
    Conv(3, 72, 130, (5, 9), (1, 1)),
    Conv(2, 8, 136, (9, 8), (2, 3), stride=2, padding=1),
    Conv(2, 16, 32, (7, 9), (3, 3), padding=1, groups=2),
    Conv(4, 3, 16, (13, 11), (5, 5), stride=2, padding=2),
    Conv(1, 48, 8, (3, 3), (3, 3), padding=1),
    Conv(2, 32, 16, (6, 5), (4, 4), stride=2, padding=1, transposed=True),
    Conv(1, 9, 5, (7, 8), (3, 3), stride=3, dilation=2, padding=4, transposed=True, output_padding=2),
    Conv(2, 40, 80, (6, 7), (3, 3), stride=2, padding=1, groups=40),
]
# One of every kind: implicit in two dimensions, first layer, dilated and uneven, grouped, depthwise with a multiplier,
# 1x1, one and three dimensions, transposed with a stride.
KINDS = [TILES[0], CONVS[4], CONVS[18], CONVS[12], CONVS[15], TILES[2], CONVS[22], CONVS[25], TILES[7], CONVS[29]]


@pytest.fixture(autouse=True)
def float32_is_float32():
    """PyTorch allows a GPU's convolutions TF32 unless told otherwise."""
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    yield
    torch.backends.cudnn.conv.fp32_precision = before


def placed(conv, tensors, last):
    """x and w in channels_last if that is wanted."""
    x, w, *rest = tensors
    if last and len(conv.size) > 1:
        x, w = channels_last(x), channels_last(w)
    return x, w, *rest


def compare_all(conv, tensors, activation=None, theirs=lambda z: z, roundings=2.0, what=""):
    dtype = tensors[0].dtype
    grad = torch.randn(conv.theirs(*tensors).shape).to(dtype)
    terms = max(conv.terms, grad[:, 0].numel())
    with fastops.record() as rows:
        ours = run(lambda *t: conv.ours(*t, activation=activation), put(grad), *map(put, tensors))
    assert "aten" not in {row.kernel for row in rows}
    reference = run(lambda *t: theirs(conv.theirs(*t)), grad, *(t.double() for t in tensors))
    torchs = run(lambda *t: theirs(conv.theirs(*t)), grad, *tensors)
    if dtype == torch.float32:
        # Summed term by term, as cuDNN does; the PyTorch that is compared with sums in blocks.
        roundings = max(roundings, terms**0.5 / 3)
    for name, *three in zip(
        ("output", "grad_input", "grad_weight", "grad_bias"), ours, reference, torchs, strict=False
    ):
        close(*three, f"{what} {name}", terms, roundings)
    return ours


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("conv", [*CONVS, *TILES], ids=str)
def test_values_and_gradients(conv, dtype):
    if dtype in (torch.float64, torch.float16) and conv not in KINDS:
        pytest.skip("float32 and bfloat16 have the same indices")
    for i, last in enumerate((False, True) if len(conv.size) > 1 else (False,)):
        tensors = placed(conv, operands(conv, dtype), last)
        for chip in CHIPS if conv in TILES and dtype in (torch.float32, torch.bfloat16) else CHIPS[i::2]:
            with configured(SCHEDULES[chip % len(SCHEDULES)], multiprocessors=chip, aligned=chip != 4):
                output, grad_x, grad_w, _ = compare_all(conv, tensors, what=f"{chip} multiprocessors,")
    for ours, theirs in ((output, conv.theirs(*tensors)), (grad_x, tensors[0]), (grad_w, tensors[1])):
        if len(conv.size) == 2 and 1 not in ours.shape:
            assert ours.stride() == theirs.stride()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FUSED)
def test_activations(name, dtype):
    theirs = getattr(F, name)
    for i, conv in enumerate((TILES[0], TILES[7], CONVS[15], CONVS[1])):
        for last in (False, True):
            with configured(SCHEDULES[i % 3], multiprocessors=CHIPS[i % 3]):
                compare_all(conv, placed(conv, operands(conv, dtype), last), name, theirs, 4.0)


@LASTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("conv", KINDS, ids=str)
def test_integers_are_exact_in_every_schedule(conv, dtype, last):
    """And so is every sum: the order of threads and blocks changes no bit."""
    if last and len(conv.size) == 1:
        pytest.skip("one dimension is always channels first")

    def make(shape):
        return integers(*shape, dtype=dtype, low=-1, high=2)

    tensors = placed(conv, operands(conv, dtype, make), last)
    grad = make(conv.theirs(*tensors).shape)
    wide = [t.double() for t in tensors]
    expected = run(lambda *t: conv.theirs(*t).relu(), grad.double(), *wide)
    on_device = [put(t) for t in tensors]
    for chip, schedule in zip(CHIPS, SCHEDULES, strict=False):
        with configured(schedule, multiprocessors=chip):
            actual = run(lambda *t: conv.ours(*t, activation="relu"), put(grad), *on_device)
        for p, q in zip(actual, expected, strict=True):
            exact(p, q.to(dtype), f"{chip} multiprocessors, {schedule}")


@LASTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("conv", [TILES[1], TILES[6], CONVS[15], TILES[7]], ids=str)
def test_the_same_bits_in_every_schedule(conv, dtype, last):
    tensors = [put(t) for t in placed(conv, operands(conv, dtype), last)]
    grad = put(torch.randn(conv.ours(*tensors).shape).to(dtype))
    for chip in CHIPS:
        results = []
        for schedule in SCHEDULES:
            with configured(schedule, multiprocessors=chip):
                results.append(run(lambda *t: conv.ours(*t, activation="sigmoid"), grad, *tensors))
        for other in results[1:]:
            for one, two in zip(results[0], other, strict=True):
                assert torch.equal(one, two)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(geometries(), st.booleans(), st.booleans(), st.sampled_from(DTYPES), st.sampled_from(CHIPS))
def test_random_geometries(conv, last, weight_last, dtype, chip):
    def make(shape):
        return integers(*shape, dtype=dtype, low=-1, high=2)

    x, w, b = operands(conv, dtype, make)
    if len(conv.size) > 1:
        x, w = (t.contiguous(memory_format=memory_format(t, on)) for t, on in ((x, last), (w, weight_last)))
    grad = make(conv.theirs(x, w, b).shape)
    expected = run(lambda *t: conv.theirs(*t).relu(), grad.double(), x.double(), w.double(), b.double())
    with configured("shuffled" if EMULATED else SCHEDULES[0], multiprocessors=chip, aligned=False):
        actual = run(lambda *t: conv.ours(*t, activation="relu"), put(grad), *map(put, (x, w, b)))
    for p, q in zip(actual, expected, strict=True):
        exact(p, q.to(dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("conv", [CONVS[7], CONVS[13], CONVS[1], CONVS[28]], ids=str)
def test_strided_operands(conv, layout):
    make = LAYOUTS[layout]
    x, w, b = (make(shape, torch.float64).round() for shape in conv.shapes)
    grad = make(conv.theirs(x, w, b).shape, torch.float64).round()
    expected = run(conv.theirs, grad, x, w, b)
    with configured(aligned=False):
        actual = run(conv.ours, put(grad), *(put(t) for t in (x, w, b)))
    for p, q in zip(actual, expected, strict=True):
        exact(p, q)


@pytest.mark.skipif(not EMULATED, reason="the rounding of a GPU's sums is not known")
@LASTS
@pytest.mark.parametrize("conv", [TILES[0], TILES[2], TILES[7], CONVS[24]], ids=str)
def test_tf32_where_pytorch_allows_it(conv, last):
    x, w, b = placed(conv, operands(conv, torch.float32), last)
    grad = torch.randn(conv.theirs(x, w, b).shape)
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    for i, chip in enumerate(CHIPS):
        with configured(SCHEDULES[i % len(SCHEDULES)], multiprocessors=chip), fastops.record() as rows:
            actual = run(conv.ours, put(grad), *map(put, (x, w, b)))
        assert all("tf32" in row.kernel for row in rows)
        xr, wr, gr = (_tf32(t.contiguous()).double() for t in (x, w, grad))
        expected = run(conv.theirs, gr, xr, wr, b.double())
        expected[-1] = grad.double().sum([0, *range(2, grad.dim())])
        for name, p, q in zip(("output", "grad_input", "grad_weight", "grad_bias"), actual, expected, strict=True):
            close(p, q, q.float(), name, roundings=16.0)
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    with fastops.record() as rows:
        conv.ours(*map(put, (x, w, b)))
    assert all("simt" in row.kernel for row in rows)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
def test_empty_batch(transposed, activation):
    conv = Conv(0, 4, 6, (5, 6), (3, 3), transposed=transposed)
    tensors = operands(conv, torch.float32)
    ours = run(lambda *t: conv.ours(*t, activation=activation), put(torch.empty(conv.theirs(*tensors).shape)),
               *map(put, tensors))  # fmt: skip
    for p, q in zip(ours, (conv.theirs(*tensors), *tensors), strict=True):
        exact(p, torch.zeros_like(q))


@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
@pytest.mark.parametrize("wanted", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1), (1, 0, 1)], ids=str)
def test_only_the_gradients_asked_for(wanted, activation):
    for conv in (TILES[0], TILES[7], CONVS[15], CONVS[1]):
        for last in (False, True):
            tensors = placed(conv, operands(conv, torch.float64), last)
            ours = [put(t).requires_grad_(bool(on)) for t, on in zip(tensors, wanted, strict=True)]
            theirs = [t.clone().requires_grad_(bool(on)) for t, on in zip(tensors, wanted, strict=True)]
            conv.ours(*ours, activation=activation).square().sum().backward()
            z = conv.theirs(*theirs)
            (z if activation is None else getattr(F, activation)(z)).square().sum().backward()
            for one, two, on in zip(ours, theirs, wanted, strict=True):
                assert (one.grad is not None) == bool(on)
                if on:
                    torch.testing.assert_close(one.grad.cpu(), two.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("conv", [CONVS[1], CONVS[3], CONVS[10], CONVS[13], TILES[0], CONVS[28]], ids=str)
def test_nan_and_infinity_spread_as_they_should(conv, dtype):
    for last in (False, True):
        x, w, b = placed(conv, operands(conv, dtype), last)
        x[0, 0, 1, 1], x[-1, -1, 2, 3] = float("inf"), float("nan")
        grad = torch.randn(conv.theirs(x, w, b).shape)
        ours = run(conv.ours, put(grad.to(dtype)), *map(put, (x, w, b)))
        wide = run(conv.theirs, grad.double(), *(t.double() for t in (x, w, b)))
        for p, q in zip(ours, wide, strict=True):
            assert torch.equal(torch.isnan(p), torch.isnan(q))
            assert torch.equal(p.isinf(), q.isinf())


TINY = [
    Conv(1, 2, 2, (4, 3), (2, 2), padding=1),
    Conv(2, 3, 3, (5, 4), (3, 2), stride=2, groups=3),
    Conv(1, 2, 4, (3, 4), (2, 3), stride=2, padding=1, transposed=True),
]


@pytest.mark.parametrize("conv", TINY, ids=str)
@pytest.mark.parametrize("name", [None, "relu", "gelu"])
def test_double_backward(conv, name):
    x, w, b = operands(conv, torch.float64)
    activate = (lambda z: z) if name is None else getattr(F, name)
    compare_second_order(lambda *t: conv.ours(*t, activation=name), lambda *t: activate(conv.theirs(*t)), x, w, b)


def test_sizes_beyond_two_to_the_31_elements():
    """6 GB of address space, of which only the touched pages exist: four pixels of every channel."""
    height, width = 2**14, 2**13
    x = torch.empty(1, 24, height, width, dtype=torch.bfloat16, device=DEVICE)
    corners = x[:, :, :: height - 1, :: width - 1]
    corners.copy_(integers(1, 24, 2, 2, dtype=torch.bfloat16))
    w = integers(8, 24, 1, 1, dtype=torch.bfloat16)
    y = FF.conv2d(x, put(w), stride=(height - 1, width - 1))
    exact(y.cpu(), F.conv2d(corners.cpu().double(), w.double()).bfloat16())


def test_coordinates_that_no_int_holds_are_left_to_pytorch():
    tensors = [integers(*shape, dtype=torch.float32) for shape in ((2, 4, 8), (6, 2, 3), (6,))]
    arguments = {"stride": 2**29, "groups": 2}
    theirs = [t.requires_grad_() for t in tensors]
    expected = F.relu(F.conv1d(*theirs, **arguments))
    ours = [put(t.detach()).requires_grad_() for t in tensors]
    assert _C.conv1d(*ours, 2**29, 0, 1, 2, 0, 0.0, 0.0) is NotImplemented
    compiled = torch.compile(FF.conv1d, backend="aot_eager", fullgraph=True)
    for function in (FF.conv1d, compiled):
        y = function(*ours, **arguments, activation="relu")
        exact(y.cpu(), expected)
        gradients = torch.autograd.grad(y.square().sum(), ours)
        wanted = torch.autograd.grad(expected.square().sum(), theirs, retain_graph=True)
        for one, two in zip(gradients, wanted, strict=True):
            exact(one.cpu(), two)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("conv", [TILES[0], TILES[7]], ids=str)
def test_autocast(conv, dtype):
    tensors = operands(conv, torch.float32)
    leaves = [put(t).requires_grad_() for t in tensors]
    with torch.autocast(DEVICE.type, dtype):
        output = conv.ours(*leaves, activation="relu")
        assert conv.ours(leaves[0].to(dtype), leaves[1]).dtype == dtype
    assert output.dtype == dtype
    torch.testing.assert_close(output.float().cpu(), conv.theirs(*tensors).relu(), atol=0.05, rtol=0.05)
    output.float().sum().backward()
    assert {t.grad.dtype for t in leaves} == {torch.float32}


@LASTS
@pytest.mark.parametrize("conv", [TILES[6], CONVS[27]], ids=str)
def test_both_doors_and_record(conv, last):
    x, w, b = (put(t) for t in placed(conv, operands(conv, torch.float32), last))
    with fastops.record() as rows:
        fast = conv.ours(x, w, b, activation="gelu")
    assert [(row.op, row.kernel) for row in rows] == [(conv.name, "conv_gemm_simt_64x64x16_cuda")]
    before, after = ([n] * 2 for n in ((0, 0) if conv.transposed else (1, 1)))
    args = [1, 1], [*before, *after], [1, 1], conv.transposed, 1, "gelu", 0.0, 0.0
    exact(torch.ops.fastops.conv_forward(x, w, b, *args, False)[0].cpu(), fast.cpu())
    exact(torch.func.vmap(lambda t: conv.ours(t, w, b, activation="gelu"))(x[None])[0].cpu(), fast.cpu())
    leaves = [t.detach().requires_grad_() for t in (x, w, b)]
    compiled = torch.compile(lambda *t: conv.ours(*t, activation="gelu"), backend="aot_eager", fullgraph=True)
    with fastops.record() as rows:
        compiled(*leaves).sum().backward()
    assert "aten" not in {row.kernel for row in rows}
    grads = [t.grad.clone() for t in leaves]
    again = torch.autograd.grad(conv.ours(*leaves, activation="gelu").sum(), leaves)
    for p, q in zip(grads, again, strict=True):
        exact(p.cpu(), q.cpu())


@pytest.mark.parametrize(("conv", "pool"), [(CONVS[3], 2), (TILES[0], (2, 3)), (CONVS[22], 3)], ids=str)
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
def test_conv_max_pool(conv, pool, activation):
    """On a GPU the two ops in turn."""
    tensors = operands(conv, torch.float64)
    name = f"max_pool{len(conv.size)}d"
    fused, max_pool = getattr(FF, f"conv_{name}"), getattr(F, name)
    activate = (lambda z: z) if activation is None else getattr(F, activation)
    grad = torch.randn_like(max_pool(conv.theirs(*tensors), pool))
    more = {**conv.kwargs, "activation": activation, "pool_size": pool}
    with fastops.record() as rows:
        ours = run(lambda *t: fused(*t, **more), put(grad), *map(put, tensors))
    assert "aten" not in {row.kernel for row in rows}
    theirs = run(lambda *t: max_pool(activate(conv.theirs(*t)), pool), grad, *tensors)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q)


def test_a_replaced_model_moves_to_the_device():
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(8, 8, 3, groups=8), torch.nn.MaxPool2d(2),
        torch.nn.Conv2d(8, 4, 1), torch.nn.ConvTranspose2d(4, 2, 2, stride=2), torch.nn.Conv2d(2, 2, 3, padding=1,
        padding_mode="reflect"),
    )  # fmt: skip
    x = torch.randn(2, 3, 9, 8)
    expected = model(x)
    before = fastops.replace_(model)
    model.to(DEVICE)
    with fastops.record() as rows:
        actual = model(x.to(DEVICE))
    assert "aten" not in {row.kernel for row in rows}
    torch.testing.assert_close(actual.cpu(), expected, atol=1e-5, rtol=1e-4)
    fastops.restore_(model)
    after = fastops.replace_(model)
    assert str(before) == str(after)
    torch.testing.assert_close(model(x.to(DEVICE)).cpu(), expected, atol=1e-5, rtol=1e-4)


def test_what_cannot_be_is_refused():
    conv = TILES[0]
    x, w, b = operands(conv, torch.float32)
    args = [1, 1], [1, 1, 1, 1], [1, 1], False, 1, "identity", 0.0, 0.0
    for tensors, name in (((put(x), w, None), "weight"), ((put(x), put(w), b), "bias")):
        with pytest.raises(RuntimeError, match=rf"conv: {name} must be a dense tensor on .*:0, got one on cpu"):
            torch.ops.fastops.conv_forward(*tensors, *args, False)
    grad = put(conv.theirs(x, w, b))
    with pytest.raises(RuntimeError, match=r"conv: weight must be a dense tensor on .*:0, got one on cpu"):
        torch.ops.fastops.conv_backward(grad, None, put(x), w, *args, [True, False, False])


def test_the_kernels_by_name():
    cases = {
        "depthwise_cuda": Conv(1, 8, 8, (5, 5), (3, 3), groups=8),
        "gemm_simt_64x64x16_cuda": Conv(1, 8, 8, (5, 5), (1, 1)),
        "conv_gemm_simt_64x64x16_cuda": Conv(1, 8, 8, (5, 5), (3, 3)),
    }
    for kernel, conv in cases.items():
        tensors = placed(conv, operands(conv, torch.float32), True)
        with fastops.record() as rows:
            conv.ours(*map(put, tensors))
        assert [row.kernel for row in rows] == [kernel]
