"""When two trainings in float32 are the same."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def assert_trained_alike(ours: nn.Module, theirs: nn.Module, exact: nn.Module, factor: float = 3.0) -> None:
    """Holds the weights of a training on fastops to those of the same training on PyTorch.

    exact: the model that the same training in float64 gives. A training carries the roundings of every step on through
    all later ones, so no bound follows from eps alone; but PyTorch's own training shows how far roundings carry. The
    distance from float64's weights (rms, over all of them) may be `factor` times PyTorch's, and eps times their rms,
    for a training so short that PyTorch was lucky.
    """
    weights, error, own_error = _flat(exact.parameters()), _flat(ours.parameters()), _flat(theirs.parameters())
    error, own_error = _rms(error - weights), _rms(own_error - weights)
    bound = factor * own_error + torch.finfo(torch.float32).eps * _rms(weights)
    assert error <= bound, f"{error:.2e} from float64's weights, PyTorch {own_error:.2e}"


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().double().flatten() for tensor in tensors])


def _rms(tensor: Tensor) -> float:
    return tensor.square().mean().sqrt().item()
