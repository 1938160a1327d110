"""What the code that a module's call may reach asks of the modules below it and changes, without running any of it.

A copy of a model whose children are others (fused, frozen, replaced) computes the same only where nobody asks what they
are. A forward that is not traced may ask, and so may whatever it calls. It may also change what a trace of another one
has read.
"""

import builtins
import collections
import functools
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from fastops._forward_code import Code, code_of
from fastops._nodes import HOOKS
from fastops._outside import OF_MODULES, is_known, value_at

CLASSES = "its forward asks for the exact class of a module"
KINDS = "its forward asks for the kind of a module"
TENSORS = "its forward goes through parameters or buffers, or puts others in their place"
HOOKED = "its forward hooks modules"
CHANGED = "its forward changes what the modules below it read"
KEPT = (CLASSES, HOOKED, CHANGED)  # for which the modules below stay what they are

_Question = Callable[[type], bool]
_Part = tuple[types.FunctionType, Code]
_TENSORS = {
    "parameters", "named_parameters", "buffers", "named_buffers", "state_dict", "get_parameter", "get_buffer",
    "_parameters", "_buffers", "load_state_dict",
}  # fmt: skip
_REPLACE = {torch.func.functional_call, torch.nn.utils.stateless.functional_call, setattr, delattr}
_HOOK = {
    name
    for name in dir(nn.Module)
    if name.startswith("register_") and name.endswith("_hook") and "state_dict" not in name
}
_HOLDERS = (list, dict, set, collections.deque)
_FILL = {
    "append", "appendleft", "extend", "insert", "add", "update", "setdefault", "pop", "popleft", "popitem", "remove",
    "discard", "clear", "sort", "reverse",
}  # fmt: skip


def asked_of_children(module: nn.Module) -> set[str]:
    """Which of CLASSES, KINDS, TENSORS, HOOKED and CHANGED. Where that cannot be told, it counts as asked."""
    members = _members(module)
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

    tensors = {"data", *(name for one in below for name in (*one._parameters, *one._buffers))}
    asked: set[str] = set()
    for function, code in _reached(_calls_of(module), members):
        name = function.__name__ if code.code is function.__code__ else ""
        asked |= _asked(code, function.__globals__, name, exact, kind)
        if _replaces(code, function.__globals__, tensors):
            asked.add(TENSORS)
    if any(not _HOOK.isdisjoint(code.names) for _, code in _own_code(module)):
        asked.add(HOOKED)
    modules = [module, *below]
    told = {name for one in modules for name in _changed(_own_code(one), modules, own=False)} - tensors
    seen = {name for one in modules for name in _changed(_hooks_of(one), modules)}
    if (told and told & _had_by(below) & _read_by(below)) or (seen and seen & _read_by(modules)):
        asked.add(CHANGED)
    return asked


def _had_by(modules: list[nn.Module]) -> set[str]:
    """The names of what these modules have."""
    classes = {one for module in modules for one in type(module).__mro__ if not is_known(one)}
    places = [*map(vars, classes), *map(vars, modules), *(one._modules for one in modules)]
    return {name for place in places for name in place}


def _read_by(modules: list[nn.Module]) -> set[str]:
    """The names of what these modules may read: all in the code of their classes, of PyTorch's layers all they have."""
    classes = {one for module in modules for one in type(module).__mro__ if not is_known(one)}
    functions = [f for cls in classes for value in vars(cls).values() for f in _functions(value)]
    read = {name for f in functions for code in _codes(f.__code__) for name in code.names}
    return read | {name for one in modules if is_known(type(one)) for name in vars(one)} - OF_MODULES


def changed_by(module: nn.Module) -> frozenset[str]:
    """The names of what a call of the module may change: attributes, variables, and those that hold lists or dicts."""
    modules = list(module.modules())
    return frozenset().union(
        *(_changed(codes, modules) for one in modules for codes in (_own_code(one), _hooks_of(one)))
    )


def _changed(codes: list[_Part], modules: list[nn.Module], own: bool = True) -> set[str]:
    """What these functions may change. own: also the attributes of their first argument."""
    changed: set[str] = set()
    for function, code in codes:
        loads = {step.value for step in code.steps if step.name in ("LOAD_ATTR", "LOAD_METHOD")}
        for i, step in enumerate(code.steps):
            attribute = step.name in ("STORE_ATTR", "DELETE_ATTR") and (own or not _is_first(function, code, i - 1))
            outer = step.name in ("STORE_DEREF", "DELETE_DEREF") and step.value in code.free
            if attribute or outer or step.name in ("STORE_GLOBAL", "DELETE_GLOBAL"):
                changed.add(step.value)
            value = _value(code, i, function.__globals__)
            if value is setattr or value is delattr:
                changed |= {one for one in code.code.co_consts if isinstance(one, str)}
        if loads & _FILL or any(step.name in ("STORE_SUBSCR", "DELETE_SUBSCR") for step in code.steps):
            states = [vars(one) for one in modules]
            changed |= {
                name for name in loads - OF_MODULES if any(isinstance(one.get(name), _HOLDERS) for one in states)
            }
            changed |= {name for name in code.variables if isinstance(function.__globals__.get(name), _HOLDERS)}
            cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
            changed |= {name for name, cell in cells if isinstance(value_at((cell, None)), _HOLDERS)}
    return changed


def _calls_of(module: nn.Module) -> list[Any]:
    """What a call of the module runs."""
    classes = [one for one in type(module).__mro__ if not is_known(one)]
    found = [value for one in classes for value in (vars(one).get("forward"), vars(one).get("__call__"))]
    return [*found, vars(module).get("forward")]


def _own_code(module: nn.Module) -> list[_Part]:
    """The code of its forward, and of what this calls of its own or gives its module to: no decorator's code."""
    return [part for start in _calls_of(module) for part in _code_of(start, module)]


def _hooks_of(module: nn.Module) -> list[_Part]:
    hooks = [hook for hooks in HOOKS for hook in vars(module).get(hooks, {}).values()]
    return [part for hook in hooks for part in _code_of(hook, getattr(hook, "__self__", module))]


def _code_of(start: Any, owner: Any) -> list[_Part]:
    """The code of a function whose first argument is owner, and of those that it hands owner on to, as x.f() does."""
    found: list[_Part] = []
    todo = [start]
    while todo:
        for function in map(inspect.unwrap, _functions(todo.pop())):
            if any(function is one for one, _ in found):
                continue
            cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
            for code in _codes(function.__code__):
                found.append((function, code))
                for i, step in enumerate(code.steps):
                    if step.name in ("LOAD_ATTR", "LOAD_METHOD") and _is_first(function, code, i - 1):
                        todo += [vars(owner).get(step.value), inspect.getattr_static(type(owner), step.value, None)]
                    if _is_first(function, code, i + 1):
                        cell = cells.get(step.value) if step.name == "LOAD_DEREF" else None
                        todo.append(_value(code, i, function.__globals__) if cell is None else value_at((cell, None)))
    return found


def _is_first(function: types.FunctionType, code: Code, i: int) -> bool:
    """Whether this step loads the function's first argument."""
    step = code.steps[i] if 0 <= i < len(code.steps) else None
    is_own = code.code is function.__code__ and step is not None and step.name.startswith("LOAD_FAST")
    return is_own and code.arguments[:1] == (step.value,)


def _members(module: nn.Module) -> dict[str, list[Any]]:
    """The methods and other functions that a module and those below it have, by name."""
    classes = {one for below in module.modules() for one in type(below).__mro__ if not is_known(one)}
    members: dict[str, list[Any]] = {}
    for place in (*map(vars, classes), *map(vars, module.modules())):
        for name, value in place.items():
            if _functions(value):
                members.setdefault(name, []).append(value)
    return members


def _reached(starts: list[Any], members: dict[str, list[Any]]) -> Iterator[tuple[types.FunctionType, Code]]:
    """The code of these functions, and of all that it may call."""
    todo = list(starts)
    seen: set[Any] = set()
    while todo:
        for function in _functions(todo.pop()):
            if function.__code__ in seen:
                continue
            seen.add(function.__code__)
            todo += [value_at((cell, None)) for cell in function.__closure__ or ()]
            todo.append(vars(function).get("__wrapped__"))
            for code in _codes(function.__code__):
                yield function, code
                todo += [_value(code, i, function.__globals__) for i in range(len(code.steps))]
                for name in code.names:
                    todo += members.get(name, ())


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


def _replaces(code: Code, variables: dict[str, Any], tensors: set[str]) -> bool:
    """Whether code puts something in the place of attributes with these names, of another module than its own."""
    for i, step in enumerate(code.steps):
        if step.name in ("STORE_ATTR", "DELETE_ATTR") and step.value in tensors and not _is_of_self(code, i - 1):
            return True
        value = _value(code, i, variables)
        if callable(value) and value.__hash__ and value in _REPLACE:
            return True
    return False


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
