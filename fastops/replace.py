"""fastops.replace_, restore_ and replaced: torch.nn's modules become fastops.nn's where they are, and back.

A swap is one assignment to module.__class__. The classes of fastops.nn keep no state that torch.nn's do not have, so
parameters, buffers, hooks, optimizers' references, tied weights, state_dict keys, device, mode and the root module stay
what they are.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.utils import parametrize

import fastops.nn as fnn
from fastops.ops import DTYPES, supported

__all__ = ["Report", "Row", "replace_", "replaced", "restore_"]

_TO_FASTOPS: dict[type, type] = {getattr(nn, name): getattr(fnn, name) for name in fnn.__all__}
_TO_TORCH = {ours: theirs for theirs, ours in _TO_FASTOPS.items()}

# Layers that a user may expect to be replaced: named in the report, with the reason.
_PLANNED = (
    nn.LPPool1d, nn.LPPool2d, nn.FractionalMaxPool2d, nn.FractionalMaxPool3d,
)  # fmt: skip


class Row(NamedTuple):
    """One module of a report."""

    name: str  # fully qualified; "" is the root
    module: str  # the class it was: "torch.nn.Linear"
    result: str  # the class it is now, or why it was skipped


@dataclass
class Report:
    """What a call of replace_ or restore_ did. str() is an aligned table."""

    replaced: list[Row] = field(default_factory=list)
    skipped: list[Row] = field(default_factory=list)

    def __str__(self) -> str:
        rows = [(r.name or "(root)", r.module, "->", r.result) for r in self.replaced]
        rows += [(r.name or "(root)", r.module, "skipped:", r.result) for r in self.skipped]
        widths = [max((len(row[i]) for row in rows), default=0) for i in range(3)]
        lines = ["  ".join([*(c.ljust(w) for c, w in zip(row[:3], widths, strict=True)), row[3]]) for row in rows]
        return "\n".join([*lines, f"{len(self.replaced)} replaced, {len(self.skipped)} skipped"])


def replace_(model: nn.Module, filter_fn: Callable[[nn.Module, str], bool] | None = None) -> Report:
    """Replaces, in place, every torch.nn module that fastops has kernels for; a second call finds nothing left to do.

    Args:
        model: any module; it may itself be such a layer, and stays the same object.
        filter_fn: filter_fn(module, fqn) -> bool says which of the replaceable modules to replace; None means all.

    Returns:
        The report: what was replaced, and every candidate that was skipped and why.

    Raises:
        TypeError: model is not a torch.nn.Module.
    """
    return _replace(model, filter_fn)[0]


def restore_(model: nn.Module) -> Report:
    """Gives every module of fastops.nn its torch.nn class back: the inverse of replace_, also after pickling.

    A Linear with an activation has no equal in torch.nn; it stays and is reported as skipped.
    Raises TypeError where model is not a torch.nn.Module.
    """
    _check(model, "restore_")
    report = Report()
    for name, module in model.named_modules():
        _restore(module, name, report)
    return report


@contextmanager
def replaced(model: nn.Module, filter_fn: Callable[[nn.Module, str], bool] | None = None) -> Iterator[Report]:
    """replace_ for the length of a block; what the block found replaced already, it leaves replaced."""
    report, swapped = _replace(model, filter_fn)
    try:
        yield report
    finally:
        for name, module in swapped:
            _restore(module, name, Report())


def _check(model: nn.Module, function: str) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}: model must be a torch.nn.Module, got {type(model).__name__}")


def _name(cls: type) -> str:
    """As people write it: torch.nn.Linear, fastops.nn.ReLU."""
    for package in ("torch.nn", "fastops.nn"):
        if cls.__module__.startswith(f"{package}."):
            return f"{package}.{cls.__qualname__}"
    return f"{cls.__module__}.{cls.__qualname__}"


def _replace(
    model: nn.Module, filter_fn: Callable[[nn.Module, str], bool] | None
) -> tuple[Report, list[tuple[str, nn.Module]]]:
    _check(model, "replace_")
    report, swapped = Report(), []
    read_directly = _read_directly(model)
    for name, module in model.named_modules():
        cls = type(module)
        ours = _TO_FASTOPS.get(cls)
        if ours is None:
            why = _why_not_type(module)
        else:
            why = _why_not(module) or read_directly.get(id(module), "")
            if not why and filter_fn is not None and not filter_fn(module, name):
                why = "filter_fn said no"
        # The reason of a parent comes first: it holds whatever the class.
        why = why and read_directly.get(id(module), why)
        if why:
            report.skipped.append(Row(name, _name(cls), why))
        elif ours is not None:
            module.__class__ = ours
            report.replaced.append(Row(name, _name(cls), _name(ours)))
            swapped.append((name, module))
    return report, swapped


def _restore(module: nn.Module, name: str, report: Report) -> None:
    cls = type(module)
    theirs = _TO_TORCH.get(cls)
    if theirs is None:
        return
    if getattr(module, "activation", None) is not None:
        report.skipped.append(
            Row(name, _name(cls), f"activation={module.activation!r} has no equal in {_name(theirs)}")
        )
        return
    module.__dict__.pop("activation", None)  # a None set by hand
    module.__class__ = theirs
    report.replaced.append(Row(name, _name(cls), _name(theirs)))


def _read_directly(model: nn.Module) -> dict[int, str]:
    """Modules whose parent reads their parameters and, on its fast path, never calls them."""
    found = {}
    for parent in model.modules():
        if isinstance(parent, nn.MultiheadAttention):
            found[id(parent.out_proj)] = "torch.nn.MultiheadAttention reads its weight directly"
        elif isinstance(parent, nn.TransformerEncoderLayer):
            for child in (parent.linear1, parent.linear2):
                found[id(child)] = "torch.nn.TransformerEncoderLayer reads its weight directly"
    return found


def _why_not_type(module: nn.Module) -> str:
    """Why a module whose class is not one of those that are replaced is not; "" where nobody would expect it to be."""
    cls = type(module)
    if cls in _TO_TORCH:
        return "already a fastops module"
    if isinstance(module, torch.jit.ScriptModule):
        original = getattr(module, "original_name", "")
        return (
            "a TorchScript module"
            if hasattr(fnn, original) or isinstance(module, torch.jit.TopLevelTracedModule)
            else ""
        )
    if parametrize.is_parametrized(module) and isinstance(module, tuple(_TO_FASTOPS)):
        return "parametrized: its weight is computed at every call"
    if cls.__module__.startswith(("torch.ao.nn.", "torch.nn.quantized", "torch.nn.intrinsic", "torch.nn.qat")):
        return "quantized" if hasattr(fnn, cls.__name__) or "Linear" in cls.__name__ or "Conv" in cls.__name__ else ""
    if isinstance(module, nn.modules.lazy.LazyModuleMixin):
        return "lazy: has no weight before its first call"
    if cls in _PLANNED:
        return "no fastops kernel in this version"
    base = next((c for c in cls.__mro__ if c in _TO_FASTOPS or c in _TO_TORCH), None)
    return "" if base is None else f"a subclass of {_name(base)}, which may compute something else"


def _why_not(module: nn.Module) -> str:
    """Why an instance of a class that is replaced is left alone; "" where it is not."""
    if "forward" in module.__dict__:
        return "its forward has been overridden on the instance"
    for name, tensor in module.named_parameters(recurse=False):
        if type(tensor) is not nn.Parameter:
            return f"{name} is a {type(tensor).__name__}, a tensor subclass"
        if tensor.layout is not torch.strided:
            return f"{name} has layout {tensor.layout}"
        if tensor.dtype not in DTYPES:
            return f"{name} has dtype {str(tensor.dtype).removeprefix('torch.')}, which no fastops kernel takes"
        if not supported(tensor, on_gpu=True):
            return f"{name} is on {tensor.device}: no fastops kernel for it there"
    return ""
