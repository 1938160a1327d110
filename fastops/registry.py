"""fastops.register: which classes fastops replaces, torch.nn's and those of other libraries.

A class of ours is derived from theirs, has another forward and no state of its own, so that a swap is an assignment to
`__class__` (replace.py). fuse and freeze follow its forward in the place of theirs.
"""

import importlib
import inspect
import sys
import warnings
from collections.abc import Callable

from torch import nn

import fastops.nn as fnn

__all__ = ["register"]

TO_FASTOPS: dict[type, type] = {getattr(nn, name): getattr(fnn, name) for name in fnn.LAYERS}
TO_THEIRS = {ours: theirs for theirs, ours in TO_FASTOPS.items()}
_OWN = frozenset([*TO_FASTOPS, *TO_THEIRS])
_WHY_NOT: dict[type, Callable[[nn.Module], str]] = {}

# Modules of fastops that register a library's classes, and what of the library they need. Nothing is imported for a
# model that does not use it: a module of it is of a class whose code has been imported.
_LIBRARIES = {
    "fastops.huggingface": ("transformers.activations", "transformers.pytorch_utils"),
    "fastops.timm": ("timm.layers",),
}


def register(cls: type, replacement: type, why_not: Callable[[nn.Module], str] | None = None) -> None:
    """Makes replace_, restore_, fuse and freeze know a class of another library.

    Args:
        cls: a module class. Its exact instances are replaced; subclasses may do something else.
        replacement: a class derived from cls with a forward of its own, which takes the same arguments and computes the
            same by fastops.functional. It has no other state: `replace_` gives instances of cls this class, and
            `restore_` takes it away.
        why_not: why_not(module) is the reason why this instance is to be left alone, or "". None: there is none.

    transformers' Conv1D, its GELUs, SiLU and Mish, and timm's Linear and GELUs are known already, once a model has
    them. A second call for cls takes the place of the first; what the first has replaced, `restore_` knows still.

    Raises:
        TypeError: cls is no class of modules, is one of torch.nn's or fastops.nn's that is known, or a replacement
            itself; replacement is not derived from it, replaces another class already, has no forward of its own,
            another signature, an `__init__` or `__slots__`; why_not is no function.

    Source: fastops' own.

    >>> class Dense(nn.Module):  # a library's
    ...     def __init__(self, inputs, outputs):
    ...         super().__init__()
    ...         self.kernel = nn.Parameter(torch.randn(inputs, outputs))
    ...     def forward(self, x):
    ...         return x @ self.kernel
    >>> class FastDense(Dense):
    ...     def forward(self, x):
    ...         return FF.linear(x, self.kernel.t())
    >>> fastops.register(Dense, FastDense)
    >>> model = nn.Sequential(Dense(10, 20), nn.ReLU())
    >>> [type(layer).__name__ for layer in model if fastops.replace_(layer).replaced]
    ['FastDense', 'ReLU']
    """
    if not isinstance(cls, type) or not issubclass(cls, nn.Module):
        raise TypeError(f"register: cls must be a class derived from torch.nn.Module, got {cls!r}")
    if cls in _OWN:
        raise TypeError(f"register: cls must be another library's class, got {cls.__module__}.{cls.__qualname__}")
    if cls in TO_THEIRS:
        raise TypeError(
            f"register: cls must be another library's class, got {cls.__qualname__}, which replaces "
            f"{TO_THEIRS[cls].__qualname__}"
        )
    if not isinstance(replacement, type) or not issubclass(replacement, cls) or replacement is cls:
        raise TypeError(f"register: replacement must be a class derived from {cls.__qualname__}, got {replacement!r}")
    name = replacement.__qualname__
    if TO_THEIRS.get(replacement, cls) is not cls:
        raise TypeError(
            f"register: {name} replaces {TO_THEIRS[replacement].__qualname__} already, got it for {cls.__qualname__}"
        )
    if replacement in TO_FASTOPS:
        raise TypeError(
            f"register: replacement must not be replaced itself, {name} is, by {TO_FASTOPS[replacement].__qualname__}"
        )
    if "forward" not in vars(replacement):
        raise TypeError(f"register: replacement must have a forward of its own, {name} has none")
    theirs, ours = (list(inspect.signature(one.forward).parameters) for one in (cls, replacement))
    if theirs != ours:
        raise TypeError(
            f"register: replacement's forward must have the arguments of {cls.__qualname__}'s, ({', '.join(theirs)}), "
            f"got ({', '.join(ours)})"
        )
    if replacement.__init__ is not cls.__init__:
        raise TypeError(f"register: replacement must have no __init__ of its own, {name} has one: replace_ calls none")
    if replacement.__basicsize__ != cls.__basicsize__:
        raise TypeError(
            f"register: replacement must have no state of its own, {name} has __slots__: replace_ makes none"
        )
    if why_not is not None and not callable(why_not):
        raise TypeError(f"register: why_not must be a function of a module, or None, got {why_not!r}")
    TO_FASTOPS[cls], TO_THEIRS[replacement] = replacement, cls
    _WHY_NOT.pop(cls, None)
    if why_not is not None:
        _WHY_NOT[cls] = why_not


def know_libraries() -> None:
    """Registers the classes of those libraries that this process has imported by now."""
    for ours, theirs in tuple(_LIBRARIES.items()):
        if all(name in sys.modules for name in theirs):
            del _LIBRARIES[ours]
            try:
                importlib.import_module(ours)
            except (ImportError, AttributeError) as error:
                library = theirs[0].partition(".")[0]
                warnings.warn(
                    f"fastops does not know this version of {library}, whose own layers stay: {error}", stacklevel=4
                )


def registered(module: nn.Module) -> type | None:
    """The class whose forward computes on fastops what this module of another library does; None where there is none.

    It is the module's own class once that has been replaced.
    """
    cls = type(module)
    if cls in _OWN:
        return None
    if cls in TO_THEIRS:
        return cls
    ours = TO_FASTOPS.get(cls)
    return ours if ours is not None and not why_not(module) else None


def why_not(module: nn.Module) -> str:
    """Why whoever registered its class leaves this instance alone; "" where it is replaced."""
    function = _WHY_NOT.get(type(module))
    reason = (function(module) if function is not None else None) or ""
    if not isinstance(reason, str):
        raise TypeError(f"replace_: why_not of {type(module).__qualname__} must return a reason, or '', got {reason!r}")
    return reason
