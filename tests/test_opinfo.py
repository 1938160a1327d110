"""PyTorch's own OpInfo database against fastops.functional: values, gradients and error inputs."""

import pytest
import torch
import torch.nn.functional as F
from opinfo import op_db

import fastops.functional as FF

_PREFIX = "nn.functional."
NAMES = [name for name in FF.__all__ if hasattr(F, name) and not name.endswith("_")]
OPS = [op for op in op_db if op.name.removeprefix(_PREFIX) in NAMES and not op.variant_test_name]


def ours(op):
    return getattr(FF, op.name.removeprefix(_PREFIX))


def test_every_function_has_its_opinfo():
    assert {op.name.removeprefix(_PREFIX) for op in OPS} == set(NAMES)


def _samples(op, dtypes, **options):
    """Each sample in each dtype; of more than 50, as convolutions and pools have, each in one of the dtypes; and of
    more than 400, as max pools have, every second or third of those."""
    for i, dtype in enumerate(dtypes):
        samples = list(op.sample_inputs("cpu", dtype, **options))
        step = 1 if len(samples) <= 50 else len(dtypes) * (1 + len(samples) // 400)
        yield from ((dtype, sample) for sample in samples[i % step :: step])


def _seeded(function):
    """The function after the seed of OpInfo's own functions: attention may drop probabilities."""

    def call(*args, **kwargs):
        torch.manual_seed(42)
        return function(*args, **kwargs)

    return call


def _tensors(sample):
    return [t for t in (sample.input, *sample.args, *sample.kwargs.values()) if isinstance(t, torch.Tensor)]


def _output(result):
    """The part that has a gradient: a max pool may return indices too."""
    return result[0] if isinstance(result, tuple) else result


def _tolerance(dtype, expected=None):
    """expected: of a sum of many terms, whose errors are relative to the largest one."""
    table = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 2e-5, torch.complex64: 1e-5}
    tolerance = table.get(dtype, 1e-12)
    scale = 1.0 if expected is None or expected.numel() == 0 else max(1.0, float(expected.abs().max()))
    return {"rtol": tolerance, "atol": tolerance * scale}


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_values(op):
    for dtype, sample in _samples(op, sorted(op.supported_dtypes("cpu"), key=str)):
        expected = _seeded(op)(sample.input.clone(), *sample.args, **sample.kwargs)
        actual = _seeded(ours(op))(sample.input.clone(), *sample.args, **sample.kwargs)
        tolerance = _tolerance(dtype, expected if op.name.startswith(f"{_PREFIX}conv") else None)
        torch.testing.assert_close(actual, expected, equal_nan=True, **tolerance)
        if sample.input.is_contiguous() and sample.input.numel() > 0:
            assert _output(actual).stride() == _output(expected).stride()


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_gradients(op):
    dtypes = [one for one in sorted(op.supported_backward_dtypes("cpu"), key=str) if one.is_floating_point]
    for dtype, sample in _samples(op, dtypes, requires_grad=True):
        inputs = [t for t in _tensors(sample) if t.requires_grad]
        results = []
        for function in (ours(op), op):
            # in place needs something that is not a leaf
            output = _output(_seeded(function)(sample.input * 1, *sample.args, **sample.kwargs))
            grad = torch.linspace(-1, 1, output.numel()).to(dtype).reshape(output.shape)
            results.append(torch.autograd.grad(output, inputs, grad))
        sums = op.name.startswith((f"{_PREFIX}conv", f"{_PREFIX}scaled_dot_product_attention"))
        tolerance = _tolerance(dtype)
        if op.name == "nn.functional.hardsigmoid":  # PyTorch multiplies by 1 / 6 in float32, in float64 too
            tolerance = {name: max(value, 1e-7) for name, value in tolerance.items()}
        if op.name == "nn.functional.layer_norm":  # a row of one number is its mean, which PyTorch's is not quite
            tolerance = {name: max(value, 1e-4) for name, value in tolerance.items()}
        for actual, expected in zip(*results, strict=True):
            if sums:
                tolerance = _tolerance(dtype, expected)
            torch.testing.assert_close(actual, expected, equal_nan=True, **tolerance)


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_noncontiguous_samples(op):
    for _, sample in _samples(op, [torch.float32]):
        noncontiguous = sample.noncontiguous()
        expected = _seeded(op)(noncontiguous.input.clone(), *noncontiguous.args, **noncontiguous.kwargs)
        actual = _seeded(ours(op))(noncontiguous.input, *noncontiguous.args, **noncontiguous.kwargs)
        tolerance = _tolerance(torch.float32, expected if op.name.startswith(f"{_PREFIX}conv") else None)
        torch.testing.assert_close(actual, expected, equal_nan=True, **tolerance)


@pytest.mark.parametrize("op", [op for op in OPS if op.error_inputs_func], ids=lambda op: op.name)
def test_errors(op):
    for error in op.error_inputs("cpu"):
        sample = error.sample_input
        with pytest.raises(error.error_type, match=error.error_regex):
            ours(op)(sample.input, *sample.args, **sample.kwargs)
