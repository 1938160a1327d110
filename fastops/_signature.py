"""The arguments of a forward."""

import inspect
from collections.abc import Callable
from typing import Any

from torch.fx.proxy import TraceError


class Signature:
    """The arguments of a forward, and the source of a function that takes the same ones.

    inputs, named_inputs: those that have to be given, the latter by keyword.
    options: those that have a default; a program is written for that.
    declared, passed: the arguments as they stand in such a function's head, and in a call of forward.
    tests: what holds in a call that a program is for. defaults: what the names in them are.
    """

    def __init__(self, forward: Callable[..., Any]) -> None:
        kinds = inspect.Parameter
        several = {kinds.VAR_POSITIONAL: "*", kinds.VAR_KEYWORD: "**"}
        first, *parameters = _parameters(forward)
        if first.kind in several:
            raise TraceError("its forward has no argument for the module")
        self.names = {first.name, *(p.name for p in parameters)}
        required = [p for p in parameters if p.default is kinds.empty and p.kind not in several]
        self.inputs = [p.name for p in required if p.kind is not kinds.KEYWORD_ONLY]
        self.named_inputs = [p.name for p in required if p.kind is kinds.KEYWORD_ONLY]
        options = [p for p in parameters if p.default is not kinds.empty]
        names = dict(zip([p.name for p in options], self.free_names(*["default"] * len(options)), strict=True))
        self.defaults = {names[p.name]: p.default for p in options}
        self.declared, self.passed = [], []
        last_kind = first.kind
        for p in parameters:
            by_name = p.kind is kinds.KEYWORD_ONLY
            if p.kind is not kinds.POSITIONAL_ONLY and last_kind is kinds.POSITIONAL_ONLY:
                self.declared.append("/")
            if by_name and not any(part.startswith("*") for part in self.declared):
                self.declared.append("*")
            last_kind = p.kind
            stars = several.get(p.kind, "")
            self.declared.append(f"{stars}{p.name}" + (f"={names[p.name]}" if p.name in names else ""))
            self.passed.append(f"{p.name}={p.name}" if by_name else f"{stars}{p.name}")
        if last_kind is kinds.POSITIONAL_ONLY and parameters:
            self.declared.append("/")
        self.tests = [f"{name} is {default}" for name, default in names.items()]
        self.tests += [f"not {p.name}" for p in parameters if p.kind in several]
        # An input in a trace is never None, and "if mask is None" goes the other way.
        self.tests += [f"{name} is not None" for name in (*self.inputs, *self.named_inputs)]

    def free_names(self, *names: str) -> list[str]:
        """Names like these, for a function with these arguments: none is one of theirs."""
        found = []
        for i, name in enumerate(names):
            name = f"fastops_{name}_{i}"
            while name in self.names:
                name += "_"
            found.append(name)
        return found


def _parameters(forward: Callable[..., Any]) -> list[inspect.Parameter]:
    """Those of forward. Where it is a decorator's function, which passes on *args, also those of what it decorates."""
    kinds = inspect.Parameter
    several = (kinds.VAR_POSITIONAL, kinds.VAR_KEYWORD)
    own = list(inspect.signature(forward, follow_wrapped=False).parameters.values())
    passes_on = any(p.kind is kinds.VAR_POSITIONAL for p in own)
    if not hasattr(forward, "__wrapped__") or not passes_on or any(p.kind < kinds.VAR_POSITIONAL for p in own[1:]):
        return own
    named = {p.name: p for p in own if p.kind is kinds.KEYWORD_ONLY}
    found = [named.pop(p.name, p) for p in inspect.signature(forward).parameters.values()]
    taken = {p.kind for p in found}
    found += [*named.values(), *(p for p in own if p.kind in several and p.kind not in taken)]
    return sorted(found, key=lambda p: p.kind)
