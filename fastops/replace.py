"""fastops.replace_, restore_ and replaced: torch.nn's modules become fastops.nn's where they are, and back.

A swap is one assignment to module.__class__. The classes of fastops.nn keep no state that torch.nn's do not have, so
parameters, buffers, hooks, optimizers' references, tied weights, state_dict keys, device, mode and the root module stay
what they are. What was bound to a layer before a swap runs after it. Which class becomes which, registry.py knows.
"""

import functools
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.utils import parametrize

import fastops.nn as fnn
from fastops.nn._fused import PLAIN, Fusable, Fused, counterpart, made_by_a_tool
from fastops.ops import DTYPES, supported
from fastops.registry import TO_FASTOPS, TO_THEIRS, know_libraries, why_not

__all__ = ["Report", "Row", "replace_", "replaced", "restore_"]

# fastops' calls the layers whose weights torch.nn's reads.
_CALLS_ITS_LAYERS = (nn.TransformerEncoderLayer, fnn.TransformerEncoderLayer)

# Leaves of torch.nn that compute nothing.
_NO_WORK = (nn.Identity, nn.Flatten, nn.Unflatten)


class Row(NamedTuple):
    """One module of a report."""

    name: str  # fully qualified; "" is the root
    module: str  # the class it was: "torch.nn.Linear"
    result: str  # the class it is now, or why it is what it was


@dataclass
class Report:
    """What a call of replace_ or restore_ did. str() is a table: a line for all modules that fared alike.

    Attributes:
        replaced: a Row for every module that has another class now.
        skipped: a Row for every module of a kind that is replaced, or restored, and why this one was not.
        left: a Row for every other module that computes something itself (norms, embeddings, attention, layers that
            torch.nn does not have) and is PyTorch's still. Containers, and modules that only call others, do not.
    """

    replaced: list[Row] = field(default_factory=list)
    skipped: list[Row] = field(default_factory=list)
    left: list[Row] = field(default_factory=list)

    def __str__(self) -> str:
        lines = _table(("->", self.replaced), ("skipped:", self.skipped))
        for reason in dict.fromkeys(row.result for row in self.left):
            kinds = Counter(row.module for row in self.left if row.result == reason)
            lines.append(f"left alone, {reason}: {', '.join(f'{count} x {kind}' for kind, count in kinds.items())}")
        counts = f"{len(self.replaced)} replaced, {len(self.skipped)} skipped, {len(self.left)} left alone"
        return "\n".join([*lines, counts])


def _table(*kinds: tuple[str, list[Row]]) -> list[str]:
    """Lines "names  module  arrow  result": one for all rows of a kind that have the same module and result."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for arrow, rows in kinds:
        for row in rows:
            groups.setdefault((row.module, arrow, row.result), []).append(row.name or "(root)")
    table = [(_listed(names), *key) for key, names in groups.items()]
    widths = [max((len(line[i]) for line in table), default=0) for i in range(3)]
    return ["  ".join([*(c.ljust(w) for c, w in zip(line[:3], widths, strict=True)), line[3]]) for line in table]


def _listed(names: list[str]) -> str:
    if len(names) <= 3:
        return ", ".join(names)
    return f"{names[0]}, {names[1]}, ... {names[-1]} ({len(names)})"


def replace_(model: nn.Module, filter_fn: Callable[[nn.Module, str], bool] | None = None) -> Report:
    """Replaces, in place, every torch.nn module that fastops has kernels for; a second call finds nothing left to do.

    So does it with layers of other libraries whose classes `register` has made known.

    Args:
        model: any module; it may itself be such a layer, and stays the same object.
        filter_fn: filter_fn(module, fqn) -> bool says which of the replaceable modules to replace; None means all.

    Returns:
        The Report: what was replaced, every candidate that was skipped and why, and what else computes something.

    Raises:
        TypeError: model is not a torch.nn.Module.
        What filter_fn raises; the model is then what it was.

    >>> model = nn.Sequential(nn.Linear(10, 10), nn.ReLU(), nn.GroupNorm(2, 10), nn.Linear(10, 2))
    >>> print(fastops.replace_(model))
    0, 3  torch.nn.Linear  ->  fastops.nn.Linear
    1     torch.nn.ReLU    ->  fastops.nn.ReLU
    left alone, no fastops kernel: 1 x torch.nn.GroupNorm
    3 replaced, 0 skipped, 1 left alone
    """
    return _replace(model, filter_fn)[0]


def restore_(model: nn.Module) -> Report:
    """Gives every module of fastops.nn its torch.nn class back: the inverse of replace_, also after pickling.

    A layer that parametrize, fully_shard or the like gave a class of their own keeps what they added, over torch.nn's
    class. A forward that was bound before runs after it: where a tool keeps it inside a wrapper, on fastops' kernels.

    Args:
        model: any module.

    Returns:
        The Report. What stays on fastops is in `skipped`, with the reason: a layer with an activation, which has no
        equal in torch.nn, and a class that was derived from one of fastops.nn.

    Raises:
        TypeError: model is not a torch.nn.Module.

    >>> model = nn.Sequential(fnn.Linear(10, 10, activation="relu"), fnn.Linear(10, 2))
    >>> print(fastops.restore_(model))
    1  fastops.nn.Linear              ->        torch.nn.Linear
    0  fastops.nn.linear.FusedLinear  skipped:  activation='relu' has no equal in torch.nn.Linear
    1 replaced, 1 skipped, 0 left alone
    """
    _check(model, "restore_")
    report = Report()
    for name, module in model.named_modules():
        _restore(module, name, report)
    return report


@contextmanager
def replaced(model: nn.Module, filter_fn: Callable[[nn.Module, str], bool] | None = None) -> Iterator[Report]:
    """replace_ for the length of a block, with its arguments model and filter_fn, and its errors.

    What the block found replaced already, it leaves replaced. It yields the Report of replace_.

    What was replaced is restored wherever it is when the block ends, also where it has left the model. A layer that
    cannot be (see restore_) is added to the report's `skipped`, with a warning. A copy that was made inside the block
    (deepcopy, AveragedModel) is another model: `restore_` takes it back.

    >>> model = nn.Sequential(nn.Linear(10, 2))
    >>> with fastops.replaced(model) as report:
    ...     type(model[0]).__module__
    'fastops.nn.linear'
    >>> type(model[0]).__module__
    'torch.nn.modules.linear'
    """
    report, swapped = _replace(model, filter_fn)
    try:
        yield report
    finally:
        back = Report()
        for name, module in swapped:
            _restore(module, name, back)
        report.skipped += back.skipped
        for row in back.skipped:
            warnings.warn(f"replaced: {row.name or '(root)'} stays {row.module}: {row.result}", stacklevel=3)


def _check(model: nn.Module, function: str) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}: model must be a torch.nn.Module, got {type(model).__name__}")
    know_libraries()


def _base(cls: type) -> type | None:
    """The class that a swap knows, of those that cls is or is derived from."""
    return next((c for c in cls.__mro__ if c in TO_FASTOPS or c in TO_THEIRS or c in PLAIN), None)


def _sharded_counterpart(module: nn.Module) -> type | None:
    """Ours for a class that fully_shard made from a layer's (FSDPLinear), to which it only adds methods."""
    sharded = any(base.__name__ == "FSDPModule" for base in type(module).__mro__)
    if not sharded or _base(type(module)) not in TO_FASTOPS or parametrize.is_parametrized(module):
        return None
    return counterpart(type(module), TO_FASTOPS)


def _name(cls: type) -> str:
    """As people write it: torch.nn.Linear, fastops.nn.ReLU. What a tool made: FSDPLinear (torch.nn.Linear)."""
    for package in (nn, fnn):
        if getattr(package, cls.__qualname__, None) is cls:
            return f"{package.__name__}.{cls.__qualname__}"
    base = _base(cls)
    if base is not None and made_by_a_tool(cls):
        return f"{cls.__name__} ({_name(base)})"
    return f"{cls.__module__}.{cls.__qualname__}"


def _replace(
    model: nn.Module,
    filter_fn: Callable[[nn.Module, str], bool] | None,
    kept: dict[int, str] | None = None,
) -> tuple[Report, list[tuple[str, nn.Module]]]:
    _check(model, "replace_")
    report, swaps = Report(), []
    read_directly = _read_directly(model) | (kept or {})
    for name, module in model.named_modules():
        cls = type(module)
        ours = TO_FASTOPS.get(cls) or _sharded_counterpart(module)
        if ours is None:
            why = _why_not_type(module)
        else:
            why = _why_not(module, ours) or read_directly.get(id(module), "")
            if not why and filter_fn is not None and not filter_fn(module, name):
                why = "filter_fn said no"
        # The reason of a parent comes first: it holds whatever the class.
        why = why and read_directly.get(id(module), why)
        if why:
            report.skipped.append(Row(name, _name(cls), why))
        elif ours is not None:
            report.replaced.append(Row(name, _name(cls), _name(ours)))
            swaps.append((name, module, ours))
        elif _works(module) and "parametrizations" not in name.split("."):
            known = getattr(nn, cls.__name__, None) is cls
            report.left.append(Row(name, _name(cls), "no fastops kernel" if known else "not a torch.nn layer"))
    # Only now that filter_fn has not raised: a model is replaced as a whole, or stays what it was.
    for _, module, ours in swaps:
        _swap(module, ours)
    return report, [(name, module) for name, module, _ in swaps]


def _restore(module: nn.Module, name: str, report: Report) -> None:
    cls = type(module)
    base = _base(cls)
    if base is None or base in TO_FASTOPS:
        return
    theirs = counterpart(cls, TO_THEIRS)
    if theirs is None:
        if isinstance(module, Fused):
            why = f"activation={module.activation!r} has no equal in {_name(TO_THEIRS[PLAIN[base]])}"
        else:
            why = f"a user-defined subclass of {_name(base)}: change its base class to restore it"
        report.skipped.append(Row(name, _name(cls), why))
        return
    _swap(module, theirs)
    result = _name(theirs)
    if "forward" in vars(module) and not _sees_through(module):
        result += ", but the forward that was set on it may go on running fastops' kernels"
    report.replaced.append(Row(name, _name(cls), result))


def _swap(module: nn.Module, cls: type) -> None:
    forward = type(module).forward
    module.__class__ = cls
    for key, value in vars(module).items():
        if _is_bound(value, module, forward):
            vars(module)[key] = cls.forward.__get__(module)


def _is_bound(value: Any, module: nn.Module, forward: Callable[..., Any]) -> bool:
    return getattr(value, "__self__", None) is module and getattr(value, "__func__", None) is forward


def _sees_through(module: nn.Module) -> bool:
    """Whether the forward set on an instance calls, at every call, one that _swap binds anew.

    That is the class's own forward (which accelerate leaves behind when its hook is removed), and accelerate's hook,
    which keeps that in `_old_forward`.
    """
    own, attributes = type(module).forward, vars(module)
    if "_hf_hook" in attributes and isinstance(attributes["forward"], functools.partial):
        return _is_bound(attributes.get("_old_forward"), module, own)
    return _is_bound(attributes["forward"], module, own)


def _works(module: nn.Module) -> bool:
    """Whether a module computes something itself, as far as can be seen: it has parameters, or no child to call."""
    if getattr(type(module), "forward", None) is nn.Module.forward or isinstance(module, _NO_WORK):
        return False
    if type(module) is nn.Sequential:  # an empty one, too: the shortcut of a residual block that has nothing to adapt
        return False
    return next(module.children(), None) is None or next(module.parameters(recurse=False), None) is not None


def _read_directly(model: nn.Module, calling: tuple[type, ...] = _CALLS_ITS_LAYERS) -> dict[int, str]:
    """Modules whose parent reads their parameters and, on its fast path, never calls them.

    calling: the TransformerEncoderLayers that will call theirs.
    """
    found = {}
    for parent in model.modules():
        if isinstance(parent, nn.MultiheadAttention):
            found[id(parent.out_proj)] = "torch.nn.MultiheadAttention reads its weight directly"
        elif isinstance(parent, nn.TransformerEncoderLayer) and type(parent) not in calling:
            for child in (parent.linear1, parent.linear2):
                found[id(child)] = "torch.nn.TransformerEncoderLayer reads its weight directly"
    return found


def _why_not_type(module: nn.Module) -> str:
    """Why a module whose class is not one of those that are replaced is not; "" where nobody would expect it to be."""
    cls = type(module)
    base = _base(cls)
    if cls.__module__.startswith("fastops.light."):
        return "already a fastops module"
    if base is not None and base not in TO_FASTOPS:
        return "already a fastops module" if cls is base else f"already derived from {_name(base)}"
    if isinstance(module, torch.jit.ScriptModule):
        original = getattr(module, "original_name", "")
        return (
            "a TorchScript module"
            if hasattr(fnn, original) or isinstance(module, torch.jit.TopLevelTracedModule)
            else ""
        )
    if base is not None and parametrize.is_parametrized(module):
        return "parametrized: its weight is computed at every call"
    if cls.__module__.startswith(("torch.ao.nn.", "torch.nn.quantized", "torch.nn.intrinsic", "torch.nn.qat")):
        return "quantized" if hasattr(fnn, cls.__name__) or "Linear" in cls.__name__ or "Conv" in cls.__name__ else ""
    if isinstance(module, nn.modules.lazy.LazyModuleMixin):
        return "lazy: has no weight before its first call"
    if base is None:
        return ""
    if counterpart(cls, TO_FASTOPS) is not None:
        return f"a class that a tool made from {_name(base)}: replace_ has to come before it"
    return f"a subclass of {_name(base)}: its forward may differ"


def _why_not(module: nn.Module, ours: type) -> str:
    """Why an instance of a class that is replaced is left alone; "" where it is not."""
    if "forward" in vars(module) and not _sees_through(module):
        return "its forward has been overridden on the instance: take that off, replace, and put it on again"
    if issubclass(ours, Fusable) and hasattr(module, "activation"):
        return f"it already has an attribute named activation, which {_name(ours)} reserves"
    for name, tensor in module.named_parameters(recurse=False):
        if type(tensor).__name__ == "DTensor":  # fully_shard makes it plain for a call, and linear takes it as it is
            tensor = nn.Parameter(tensor.to_local(), tensor.requires_grad)
        if type(tensor) is not nn.Parameter:
            return f"{name} is a {type(tensor).__name__}, a tensor subclass"
        if tensor.layout is not torch.strided:
            return f"{name} has layout {tensor.layout}"
        if tensor.dtype not in DTYPES:
            return f"{name} has dtype {str(tensor.dtype).removeprefix('torch.')}, which no fastops kernel takes"
        if not supported(tensor, on_gpu=True):
            return f"{name} is on {tensor.device}: no fastops kernel for it there"
    return why_not(module)
