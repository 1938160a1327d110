"""The table of the activations, from csrc/kernels/activation/activation.h."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from fastops import _C


class Kind(NamedTuple):
    """One activation."""

    name: str  # of activation="...", of record() and of the kernels
    index: int  # of the kernels' enum
    function: str  # torch.nn.functional's
    module: type[nn.Module]
    parameters: dict[str, float | None]  # by torch's names; None: without a default
    options: dict[str, str]  # what makes function and module this one
    in_place: bool  # whether function has an argument inplace
    valid: Callable[[Any, Any], bool] | None  # the a and b that the kernels take; None: any
    saves: str  # what backward reads where it is not fused: "nothing", "mask", "output" or "input"


def _kind(index: int, row: tuple[Any, ...]) -> Kind:
    name, function, module, parameters, approximate, in_place, valid, saves = row
    defaults = [one.partition("=")[::2] for one in parameters.split(", ") if one]
    return Kind(
        name,
        index,
        function,
        getattr(nn, module),
        {parameter: float(default) if default else None for parameter, default in defaults},
        {"approximate": approximate} if approximate else {},
        in_place,
        None if valid == "true" else eval(f"lambda a, b: {valid}"),  # a comparison, which is the same in C++
        saves,
    )


ACTIVATIONS = {row[0]: _kind(index, row) for index, row in enumerate(_C.ACTIVATIONS)}

KIND = {kind.name: kind.index for kind in ACTIVATIONS.values()}

# The kinds whose derivative is constant piece by piece, so that their second derivative is zero wherever it exists.
PIECEWISE_LINEAR = frozenset(kind.name for kind in ACTIVATIONS.values() if kind.saves in ("nothing", "mask"))


def two(*numbers: Any) -> tuple[Any, Any]:
    """The parameters of a kind, as the kernels have them."""
    a, b = (*numbers, 0.0, 0.0)[:2]
    return a, b


def valid(kind: str, a: Any, b: Any) -> bool:
    """Whether the parameters are plain numbers that the kernels take. PyTorch refuses the others."""
    rule = ACTIVATIONS[kind].valid
    return isinstance(a, (int, float)) and isinstance(b, (int, float)) and (rule is None or rule(a, b))


def saved_by_linear(kind: str, a: float, b: float) -> str:
    """What a layer with this activation saves: "nothing", "output" or "input"."""
    return _C.saved_by_linear(KIND[kind], a, b)


def by_torch(input: Tensor, kind: str, a: float, b: float) -> Tensor:
    """An activation in PyTorch's own ops."""
    if kind == "identity":
        return input
    row = ACTIVATIONS[kind]
    return getattr(F, row.function)(input, *(a, b)[: len(row.parameters)], **row.options)
