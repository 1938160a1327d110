"""What the documentation of a public name must have, and the examples in it, run."""

import doctest
import inspect
import re
from typing import Any

import torch
from torch import nn

import fastops
import fastops.functional as FF
import fastops.nn as fnn

# What an example may use without importing it.
NAMES = {"torch": torch, "nn": nn, "fastops": fastops, "fnn": fnn, "FF": FF}

# A part, and how it is found in a docstring.
PARTS = {
    "the errors": r"\b[Rr]aises\b|\b[Ee]rrors\b",
    "the source": r"\b[Ss]ource\b|torch\.nn\.",
    "an example": r"^\s*>>> ",
}
# Of functions of tensors, and of layers.
TENSOR_PARTS = {
    "the shapes": r"\b[Ss]hapes?\b|\([a-z*][^()]*, ?[^()]*\)",
    "the dtypes": r"\bdtypes?\b|\bfloat32\b",
}


def symbols() -> dict[str, Any]:
    """Every public function and class of fastops, by its full name.

    Public is what `fastops.__all__` names, and what its modules name in theirs or, without one, define.
    """
    found = {}
    for name in fastops.__all__:
        value = getattr(fastops, name)
        if inspect.ismodule(value):
            names = getattr(value, "__all__", None) or [one for one in vars(value) if not one.startswith("_")]
            found.update({f"fastops.{name}.{one}": getattr(value, one) for one in names})
        else:
            found[f"fastops.{name}"] = value
    return {
        name: value
        for name, value in sorted(found.items())
        if callable(value) and value.__module__.startswith("fastops.")
    }


def missing_parts(symbol: Any) -> list[str]:
    """What the symbol's own docstring lacks; one that it inherits does not count."""
    doc = symbol.__dict__.get("__doc__") if isinstance(symbol, type) else symbol.__doc__
    if not doc:
        return ["a docstring"]
    signature = inspect.signature(symbol)
    takes_tensors = isinstance(symbol, type) or "input" in signature.parameters
    wanted = {**PARTS, **(TENSOR_PARTS if takes_tensors else {})}
    missing = [part for part, pattern in wanted.items() if not re.search(pattern, doc, re.MULTILINE)]
    if not isinstance(symbol, type):
        # A class of fastops.nn has the arguments of torch.nn's, where they are described.
        missing += [name for name in signature.parameters if not re.search(rf"\b{name}\b", doc)]
    return missing


def failed_examples(symbol: Any, name: str) -> str:
    """What doctest says about the examples in the symbol's docstring; "" where all pass."""
    found = doctest.DocTestParser().get_doctest(inspect.getdoc(symbol) or "", dict(NAMES), name, None, None)
    said: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    runner.run(found, out=said.append)
    return "".join(said)
