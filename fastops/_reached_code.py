"""What the code that a module's call may reach asks of the modules below it, read without running any of it.

A copy of a model whose children are others (fused, frozen, replaced) computes the same only where nobody asks what they
are. A forward that is not traced may ask, and so may whatever it calls.
"""

import builtins
import functools
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from fastops._forward_code import Code, code_of
from fastops._outside import is_known, value_at

CLASSES = "its forward asks for the exact class of a module"
KINDS = "its forward asks for the kind of a module"
TENSORS = "its forward goes through parameters or buffers"

_Question = Callable[[type], bool]
_TENSORS = {
    "parameters", "named_parameters", "buffers", "named_buffers", "state_dict", "get_parameter", "get_buffer",
    "_parameters", "_buffers",
}  # fmt: skip


def asked_of_children(module: nn.Module) -> set[str]:
    """Which of CLASSES, KINDS and TENSORS. Where that cannot be told, it counts as asked."""
    classes = {one for below in module.modules() for one in type(below).__mro__ if not is_known(one)}
    members: dict[str, list[Any]] = {}
    for place in (*map(vars, classes), *map(vars, module.modules())):
        for name, value in place.items():
            if _functions(value):
                members.setdefault(name, []).append(value)
    todo = [
        value
        for one in type(module).__mro__
        if not is_known(one)
        for value in (vars(one).get("forward"), vars(one).get("__call__"))
    ]
    todo.append(vars(module).get("forward"))
    below = [one for one in module.modules() if one is not module]
    all_names = {
        name for one in members.values() for value in one for f in _functions(value) for name in f.__code__.co_names
    }
    through_all = all_names & {"modules", "named_modules", "_modules"}

    def exact(cls: type) -> bool:
        return any(isinstance(one, cls) for one in below)

    def kind(cls: type) -> bool:
        """Of a module that is another when it is frozen: one that has neither weights nor children is not."""
        return any(isinstance(one, cls) and (through_all or one._parameters or one._modules) for one in below)

    asked: set[str] = set()
    seen: set[Any] = set()
    while todo:
        for function in _functions(todo.pop()):
            if function.__code__ in seen:
                continue
            seen.add(function.__code__)
            todo += [value_at((cell, None)) for cell in function.__closure__ or ()]
            todo.append(vars(function).get("__wrapped__"))
            for code in _codes(function.__code__):
                name = function.__name__ if code.code is function.__code__ else ""
                asked |= _asked(code, function.__globals__, name, exact, kind)
                todo += [_value(code, i, function.__globals__) for i in range(len(code.steps))]
                for name in code.names:
                    todo += members.get(name, ())
    return asked


def _functions(value: Any) -> list[types.FunctionType]:
    if isinstance(value, functools.partial):
        return _functions(value.func)
    if isinstance(value, property):
        return [one for one in (value.fget, value.fset) if isinstance(one, types.FunctionType)]
    if isinstance(value, functools.cached_property):
        return [value.func]
    value = getattr(value, "__func__", value)  # of a bound, a static or a class method
    return [value] if isinstance(value, types.FunctionType) and not is_known(value) else []


def _codes(code: types.CodeType) -> Iterator[Code]:
    yield code_of(code)
    for one in code.co_consts:
        if isinstance(one, types.CodeType):
            yield from _codes(one)


def _value(code: Code, i: int, variables: dict[str, Any]) -> Any:
    """What a.b.c is that ends at this step, where a is a global variable; None: something else."""
    if code.steps[i].name not in ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_ATTR", "LOAD_METHOD"):
        return None
    attributes = []
    while i >= 0 and code.steps[i].name in ("LOAD_ATTR", "LOAD_METHOD"):
        attributes.insert(0, code.steps[i].value)
        i -= 1
    if i < 0 or code.steps[i].name not in ("LOAD_GLOBAL", "LOAD_NAME"):
        return None
    value = variables.get(code.steps[i].value, getattr(builtins, code.steps[i].value, None))
    for name in attributes:
        if not isinstance(value, (types.ModuleType, type)):
            return None
        value = getattr(value, name, None)
    return value


def _asked(code: Code, variables: dict[str, Any], function: str, exact: _Question, kind: _Question) -> set[str]:
    asked = set()
    for i, step in enumerate(code.steps):
        if step.name in ("LOAD_ATTR", "LOAD_METHOD"):
            if step.value in _TENSORS:
                asked.add(TENSORS)
            if (
                step.value == "__class__"
                and not _is_of_self(code, i - 1)
                and not _is_for_a_message(code, i)
                and not _is_compared(code, i + 1, variables, exact)
            ):
                asked |= {CLASSES, KINDS}
        elif step.name == "MATCH_CLASS":
            asked.add(KINDS)
        elif step.name in ("LOAD_GLOBAL", "LOAD_NAME"):
            value = _value(code, i, variables)
            if (value is isinstance or value is issubclass) and _may_be(code, _call(code, i) - 1, variables, kind):
                asked.add(KINDS)
            if value is type:
                call = _call(code, i)
                simple = call == i + 2 and code.steps[i + 1].name.startswith("LOAD_FAST")
                # What a forward is given is no module.
                given = simple and function == "forward" and code.steps[i + 1].value not in code.stores
                if not given and not _is_compared(code, call + 1, variables, exact):
                    asked |= {CLASSES, KINDS}
    return asked


def _call(code: Code, i: int) -> int:
    """The first call from here on."""
    while i < len(code.steps) - 1 and not code.steps[i].name.startswith("CALL"):
        i += 1
    return i


def _is_of_self(code: Code, i: int) -> bool:
    step = code.steps[i]
    return step.name.startswith("LOAD_FAST") and step.value == "self" and code.arguments[:1] == ("self",)


def _is_for_a_message(code: Code, i: int) -> bool:
    """Whether this step is the __class__ of f"{x.__class__.__name__}" in an error.

    Or where x is args[0], by which decorators of methods name theirs.
    """
    steps = code.steps
    name, text = (*steps[i + 1 : i + 3], None, None)[:2]
    if not text or name.value not in ("__name__", "__qualname__") or not text.name.startswith("FORMAT"):
        return False
    end = i + 3
    while end < len(steps) and steps[end].name.startswith(_MAKES_AN_ERROR) and not steps[end].joined:
        end += 1
    if end < len(steps) and steps[end].name == "RAISE_VARARGS":
        return True
    if i < 3 or code.code.co_argcount or not code.code.co_flags & inspect.CO_VARARGS:
        return False
    owner, index, item = steps[i - 3 : i]
    of_args = owner.name.startswith("LOAD_FAST") and owner.value == code.code.co_varnames[len(code.arguments)]
    return of_args and index.value == 0 and item.name in ("BINARY_SUBSCR", "BINARY_OP")


_MAKES_AN_ERROR = ("LOAD_", "FORMAT_", "BUILD_STRING", "CALL", "KW_NAMES", "CONVERT_VALUE")


def _is_compared(code: Code, begin: int, variables: dict[str, Any], question: _Question) -> bool:
    """Whether what is there before this step is compared with classes of which nothing is."""
    for i in range(begin, min(begin + 8, len(code.steps))):
        if code.steps[i].name in ("IS_OP", "COMPARE_OP", "CONTAINS_OP"):
            return i > begin and not _may_be(code, i - 1, variables, question)
    return False


def _may_be(code: Code, end: int, variables: dict[str, Any], question: _Question) -> bool:
    """Whether something may be of the classes that end at this step."""
    step = code.steps[end]
    ends = [end]
    if step.name == "BUILD_TUPLE":
        ends = []
        for _ in range(step.value):
            end -= 1
            ends.append(end)
            chain = code.chain(end)
            if chain is None:
                return True
            end = chain[0]
    return any(_is_one_of(_value(code, one, variables), question) for one in ends)


def _is_one_of(value: Any, question: _Question) -> bool:
    if isinstance(value, tuple):
        return any(_is_one_of(one, question) for one in value)
    if value is nn.Module:  # which all are, frozen or not
        return False
    return not isinstance(value, type) or value is object or (issubclass(value, nn.Module) and question(value))
