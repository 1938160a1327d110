"""The CUDA kernels of the activations, prelu and glu, on the emulator: see gpu.py. References and tolerances are the
CPU's."""

import pytest
import torch
import torch.nn.functional as F
from compare import close, exact
from gpu import DEVICE, EMULATED, SCHEDULES, configured, put
from reference import ACTIVATIONS, DTYPES, activation, gradients
from test_activation import PRELU, SPECIAL, _as_good, _sampled, _table, _ulps_of, compare
from test_activation import run as on_cpu

import fastops
import fastops.functional as FF
from fastops import _C
from fastops._activations import KIND

EVERY = pytest.mark.parametrize("case", ACTIVATIONS, ids=str)
# Around a unit of 2 to 16 elements, a block of 256 of them, and what a thread takes at a time.
LENGTHS = [0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 255, 257, 1025, 4099, 20001]


def run(function, x, grad):
    """Output and gradient of a leaf with x's own strides, on the CPU."""
    x = (put(x) if x.device != DEVICE else x).detach().requires_grad_()
    output = function(x)
    assert output.device == x.device
    return output.cpu(), *(g.cpu() for g in gradients(output, grad.to(x.device), x))


def compare_all(case, x, grad):
    reference = on_cpu(lambda t: activation(case, t), x.double(), grad)
    compare(case, grad, run(case.ours, x, grad), reference, on_cpu(case.theirs, x, grad))


@EVERY
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients(case, dtype):
    for i, length in enumerate(LENGTHS):
        with configured(SCHEDULES[i % len(SCHEDULES)], aligned=i % 2 == 0):
            compare_all(case, (3 * torch.randn(length)).to(dtype), torch.randn(length))


@EVERY
def test_ulps_of_float32(case):
    x, reference, theirs = _sampled(ACTIVATIONS.index(case))
    x, reference = x[::5], reference[::5]
    ours = _ulps_of(case, case.ours(x.to(DEVICE)).cpu(), reference, x)
    limit = max(4.0 if case.kind == "gelu" else 2.5, theirs)
    worst = int(ours.argmax())
    assert float(ours[worst]) <= limit, f"{float(ours[worst]):.2f} ulp at {float(x[worst])!r}"


@EVERY
@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values(case, dtype):
    x = torch.tensor(SPECIAL, dtype=torch.float64).to(dtype).repeat(2)[:-1]
    ones = torch.ones(x.shape)
    ours, theirs, wide = run(case.ours, x, ones), on_cpu(case.theirs, x, ones), on_cpu(case.theirs, x.double(), ones)
    reference = activation(case, x)
    good = _as_good(case, ours[0], reference, theirs[0], x)
    good |= x.isinf() & torch.isnan(reference) & ((ours[0] == 0) | (ours[0] == x) | (ours[0] == x.sign()))
    assert good.all(), _table(good, x, ours[0], reference, theirs[0])
    good = _as_good(case, ours[1], wide[1], theirs[1], x) | (x.isinf() & torch.isnan(wide[1]))
    singles = torch.cat([on_cpu(case.theirs, one, torch.ones(1))[1] for one in x.split(1)])
    good |= torch.isnan(x) & (ours[1] == singles)
    eps = torch.finfo(torch.float32 if case.kind == "hardsigmoid" else dtype).eps
    good |= (ours[1].double() - wide[1]).abs() <= 4 * eps
    assert good.all(), _table(good, x, ours[1], wide[1], theirs[1])


@EVERY
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_backward_reads(case, dtype):
    """x, y or a mask, in rows of any alignment; masks of the same bits as the CPU's."""
    ops, args = torch.ops.fastops, (case.kind, case.a, case.b)
    numbers = KIND[case.kind], case.a, case.b
    kinds = ["input"] if case.from_input else []
    if _C.can_save_output(*numbers):
        kinds.append("output")
    for rows, cols, start in ((1, 1003, 0), (5, 40, 0), (5, 40, 8), (7, 33, 3), (3, 48, 1)):
        wide = (2 * torch.randn(rows, cols + start + 8)).to(dtype)
        grad = torch.randn(rows, cols + start + 8).to(dtype)
        x, g = wide[:, start : start + cols], grad[:, start : start + cols]
        xd, gd = put(wide)[:, start : start + cols], put(grad)[:, start : start + cols]
        y, mask = ops.activation_forward(x, *args, True)
        yd, maskd = ops.activation_forward(xd, *args, True)
        if mask.numel():
            exact(maskd.cpu(), mask, "mask")
            slope = ops.activation_backward(g, mask, *args, "mask").double()
            close(ops.activation_backward(gd, maskd, *args, "mask").cpu(), slope, slope.to(dtype))
        for kind in kinds:
            saved, savedd = (x, xd) if kind == "input" else (y, yd.detach())
            expected = ops.activation_backward(g, saved, *args, kind)
            actual = ops.activation_backward(gd, savedd, *args, kind)
            assert actual.device == DEVICE
            close(actual.cpu(), expected.double(), expected, roundings=8)


@EVERY
def test_layouts(case):
    base = 2 * torch.randn(6, 5, 4, 9)
    for x in (
        base.permute(1, 0, 3, 2),
        base[:, :, ::2],
        base[..., 1:8],
        base[0, 0, 0, :1].expand(7, 3),
        base.contiguous(memory_format=torch.channels_last),
        base.flatten()[1:200],
    ):
        compare_all(case, x, torch.randn(x.shape))
    x = put(base.contiguous(memory_format=torch.channels_last)).requires_grad_()
    output = case.ours(x)
    assert output.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("case", [case for case in ACTIVATIONS if case.in_place], ids=str)
def test_inplace(case):
    for x in (torch.randn(1001), torch.randn(9, 33)[:, 2:20]):
        expected = case.ours(x)
        leaf = put(x).requires_grad_()
        value = leaf * 1
        output = case.ours(value, inplace=True)
        assert output is value
        torch.testing.assert_close(output.cpu(), expected, atol=1e-6, rtol=1e-6)
        (grad,) = gradients(output, torch.ones(x.shape, device=DEVICE), leaf)
        (wanted,) = on_cpu(case.ours, x, torch.ones(x.shape))[1:]
        torch.testing.assert_close(grad.cpu(), wanted, atol=1e-5, rtol=1e-5)


@EVERY
def test_double_backward(case):
    x, g, h = (torch.randn(7, 5, dtype=torch.float64) for _ in range(3))

    def second(x, g, h):
        x, g = x.detach().requires_grad_(), g.detach().requires_grad_()
        (first,) = torch.autograd.grad(case.ours(x), x, g, create_graph=True)
        if not first.requires_grad:
            return (torch.zeros(()),)
        return torch.autograd.grad(first, [x, g], h, allow_unused=True)

    for actual, expected in zip(second(*map(put, (x, g, h))), second(x, g, h), strict=True):
        assert (actual is None) == (expected is None)
        if expected is not None:
            torch.testing.assert_close(actual.cpu(), expected)


def test_strides_beyond_two_to_the_31_elements():
    """4 GB of address space, of which only the touched pages exist."""
    base = torch.empty(2**31 + 64, dtype=torch.bfloat16, device=DEVICE)
    x = base.as_strided((2, 40), (2**31, 1))
    x.copy_(torch.randn(2, 40))
    exact(FF.relu(x).cpu(), F.relu(x.cpu()))
    exact(FF.leaky_relu(x, 0.5).cpu(), F.leaky_relu(x.cpu(), 0.5))


def test_both_doors_and_record():
    x = torch.randn(40, device=DEVICE)
    with fastops.record() as rows:
        fast = FF.gelu(x)
    assert [(row.op, row.kernel, row.shapes) for row in rows] == [("gelu", "elementwise_cuda", "40")]
    exact(torch.ops.fastops.activation_forward(x, "gelu", 0.0, 0.0, False)[0].cpu(), fast.cpu())
    exact(torch.func.vmap(FF.gelu)(x.view(4, 10)).cpu().flatten(), fast.cpu())
    compiled = torch.compile(lambda t: FF.relu(FF.gelu(t)), backend="aot_eager", fullgraph=True)
    gelu = lambda t: torch.ops.fastops.activation_forward(t, "gelu", 0.0, 0.0, False)[0]  # noqa: E731
    with fastops.record() as rows:
        exact(torch.compile(gelu, backend="aot_eager", fullgraph=True)(x).cpu(), fast.cpu())
    assert "aten" not in {row.kernel for row in rows}
    # FF's elementwise functions in a compiled graph are PyTorch's, which a compiler fuses.
    torch.testing.assert_close(compiled(x).cpu(), FF.relu(fast).cpu())


def test_autocast():
    x = torch.randn(5, 6, device=DEVICE)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        assert FF.gelu(x).dtype == torch.float32
        assert FF.prelu(x, torch.ones(1, device=DEVICE)).dtype == torch.bfloat16


def test_what_has_no_kernel_goes_to_pytorch():
    for x in (torch.arange(-3, 4), torch.randn(4, dtype=torch.complex64)):
        if x.is_complex():
            actual, expected = FF.tanh(x.to(DEVICE)), torch.tanh(x)
        else:
            actual, expected = FF.relu(x.to(DEVICE)), F.relu(x)
        torch.testing.assert_close(actual.cpu(), expected)


def test_tensors_on_two_devices_are_refused():
    x = torch.randn(3, 4, device=DEVICE)
    with pytest.raises(RuntimeError, match=r"prelu: weight must be a dense tensor on .*:0, got one on cpu"):
        torch.ops.fastops.prelu_forward(x, torch.ones(4))
    with pytest.raises(
        RuntimeError, match=r"activation_backward: saved must be a dense tensor on .*:0, got one on cpu"
    ):
        torch.ops.fastops.activation_backward(x, torch.randn(3, 4), "gelu", 0.0, 0.0, "input")


@pytest.mark.skipif(not EMULATED, reason="asks the emulator for a launch that fails")
def test_a_failed_launch_names_kernel_and_shapes():
    x = torch.randn(3, 40, device=DEVICE)
    with (
        configured(multiprocessors=-1),
        pytest.raises(
            RuntimeError,
            match=r"gelu: kernel activation_forward_cuda for float32 tensors of shapes 3x40 failed on a grid of "
            r".* blocks of 256 threads and 0 bytes of shared memory: invalid configuration argument",
        ),
    ):
        FF.gelu(x)


# ---- PReLU and GLU


@pytest.mark.parametrize(("shape", "weights"), [case for case in PRELU if case[0] != (70, 1000, 3)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_prelu(shape, weights, dtype):
    def run(function, dtype, place=lambda t: t):
        x, w = place(base.to(dtype)).requires_grad_(), place(weight.to(dtype)).requires_grad_()
        output = function(x, w)
        return [t.cpu() for t in (output, *gradients(output, place(grad), x, w))]

    base, weight, grad = (t.to(dtype) for t in (torch.randn(shape), torch.rand(weights), torch.randn(shape)))
    wide, theirs = run(F.prelu, torch.float64), run(F.prelu, dtype)
    size = float((base.detach().double() * grad.double()).norm())  # of what the gradient of the weight sums
    for i, schedule in enumerate(SCHEDULES):
        with configured(schedule, aligned=i % 2 == 0):
            ours = run(FF.prelu, dtype, put)
        for name, *three in zip(("output", "input", "weight"), ours, wide, theirs, strict=True):
            close(*three, name, base.numel(), 4.0, size if name == "weight" else 0.0)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_prelu_of_images(memory_format):
    x = torch.randn(2, 9, 5, 7).contiguous(memory_format=memory_format)
    w, g = torch.randn(9), torch.randn(2, 9, 5, 7)
    leaves = [put(x).requires_grad_(), put(w).requires_grad_()]
    theirs = [x.clone().requires_grad_(), w.clone().requires_grad_()]
    a, e = FF.prelu(*leaves), F.prelu(*theirs)
    assert a.is_contiguous(memory_format=memory_format)
    for p, q in zip((a, *gradients(a, g.to(DEVICE), *leaves)), (e, *gradients(e, g, *theirs)), strict=True):
        torch.testing.assert_close(p.cpu(), q, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("wanted", [(True, False), (False, True)])
def test_prelu_gradients_asked_for(wanted):
    x, w, g = torch.randn(40, 20), torch.randn(20), torch.randn(40, 20)
    actual = torch.ops.fastops.prelu_backward(g.to(DEVICE), x.to(DEVICE), w.to(DEVICE), wanted)
    expected = torch.ops.fastops.prelu_backward(g, x, w, wanted)
    for p, q in zip(actual, expected, strict=True):
        torch.testing.assert_close(p.cpu(), q, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_glu(dtype):
    for i, (shape, dim) in enumerate(
        (((3, 20), 1), ((2, 6, 17), 1), ((4, 3), 0), ((2, 4, 32), 1), ((5, 2 * 1027), -1))
    ):
        base = torch.randn(shape)
        grad = torch.randn(base.chunk(2, dim)[0].shape)
        x = base.to(dtype)
        with configured(SCHEDULES[i % len(SCHEDULES)], aligned=i % 2 == 0):
            ours = run(lambda t, dim=dim: FF.glu(t, dim), x, grad)
        theirs = on_cpu(lambda t, dim=dim: F.glu(t, dim), x, grad)
        wide = on_cpu(lambda t, dim=dim: F.glu(t, dim), x.double(), grad)
        for name, *three in zip(("output", "gradient"), ours, wide, theirs, strict=True):
            close(*three, name, 1, 4.0)
