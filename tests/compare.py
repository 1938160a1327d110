"""The tolerance rule, in one place.

Against a float64 reference, the largest error may be twice that of PyTorch's own op in the same dtype, plus one
rounding of the largest value: what a result that is rounded once must be allowed where PyTorch happens to be exact.
Where float64 itself is under test the reference is no better than the result, and each of the `terms` that are summed
may be rounded in both. nan and infinities have to be where the reference has them. Integer-valued inputs get no
tolerance (`exact`).
"""

import torch
from torch import Tensor

# What an opcheck sees without tracing a graph, which takes it twenty times as long: enough for arguments that change
# numbers alone, such as which activation it is, where a graph of the same op is traced beside it.
UNTRACED = "test_schema", "test_autograd_registration", "test_faketensor"
TRACED = (*UNTRACED, "test_aot_dispatch_dynamic")


def _alike(actual: Tensor, reference: Tensor, theirs: Tensor, what: str) -> tuple[Tensor, Tensor, Tensor]:
    """Detached; asserts the reference's shape and the dtype of PyTorch's result."""
    assert actual.shape == reference.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(reference.shape)}"
    assert actual.dtype == theirs.dtype, f"{what}: dtype {actual.dtype}, PyTorch has {theirs.dtype}"
    return actual.detach(), reference.detach(), theirs.detach()


def close(
    actual: Tensor,
    reference: Tensor,
    theirs: Tensor,
    what: str = "result",
    terms: int = 1,
    roundings: float = 1.0,
    least: float = 0.0,
) -> None:
    """Asserts the rule. reference is float64; actual and theirs have the dtype under test and the reference's shape.

    roundings: how many of the largest value are allowed, where the contract of the op grants more than one.
    least: the size of the terms, where they cancel and the largest value is small beside them.
    """
    actual, reference, theirs = _alike(actual, reference, theirs, what)
    if reference.numel() == 0:
        return
    rounded = reference.to(actual.dtype)
    special = ~torch.isfinite(rounded)
    same = (actual == rounded) | (torch.isnan(actual) & torch.isnan(rounded))
    assert bool(same[special].all()), f"{what}: nan or infinity in the wrong place"
    assert bool(torch.isfinite(actual[~special]).all()), f"{what}: nan or infinity where the reference is finite"
    ours = (actual.double() - reference).abs()[~special]
    if ours.numel() == 0:
        return
    both = ~special & torch.isfinite(theirs)
    other = (theirs.double() - reference).abs()[both]
    scale = max(float(reference[~special].abs().max()), least)
    if actual.dtype == torch.float64:  # operands are of the order of 1, and so are terms that cancel
        scale = max(scale, 1.0) * (8 + terms)
    rounding = torch.finfo(actual.dtype).eps * scale * roundings
    bound = 2 * (float(other.max()) if other.numel() else 0.0) + rounding
    assert float(ours.max()) <= bound, (
        f"{what}: error {float(ours.max()):.3e}, allowed {bound:.3e} (largest value {scale:.3e})"
    )


def close_rms(
    actual: Tensor,
    reference: Tensor,
    theirs: Tensor,
    what: str = "result",
    terms: int = 1,
    roundings: float = 1.0,
    factor: float = 3.0,
) -> None:
    """The rule for algorithms that are no direct summation (Winograd's): the rms error may be `factor` times PyTorch's.

    The arguments are those of `close`; roundings are of the rms value.
    """
    actual, reference, theirs = _alike(actual, reference, theirs, what)
    if reference.numel() == 0:
        return

    def rms(x: Tensor) -> float:
        return float(x.square().mean().sqrt())

    if actual.dtype == torch.float64:
        roundings *= 8 + terms
    bound = factor * rms(theirs.double() - reference)
    bound += roundings * torch.finfo(actual.dtype).eps * max(rms(reference), 1e-3)
    error = rms(actual.double() - reference)
    assert error <= bound, f"{what}: rms error {error:.3e}, allowed {bound:.3e}"


def exact(actual: Tensor, expected: Tensor, what: str = "result") -> None:
    """Asserts equal bits, but for the sign of zero and the payload of nan."""
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    assert actual.dtype == expected.dtype, f"{what}: dtype {actual.dtype}, expected {expected.dtype}"
    wrong = ~((actual == expected) | (torch.isnan(actual) & torch.isnan(expected)))
    count = int(wrong.sum())
    assert count == 0, (
        f"{what}: {count} of {actual.numel()} elements differ, first {actual[wrong][0]} for {expected[wrong][0]}"
    )
