"""What a forward reads that is neither an input nor an attribute of its module: global variables, those of the
functions around it, attributes of classes, configuration objects, and what is in lists and dicts.

A trace has the values of one moment. `Outside` finds where they are, so that a program can see that they have changed
(csrc/torch/guard.cpp), and takes back what a forward has changed there while it was traced.
"""

import collections
import enum
import functools
import gc
import inspect
import types
from collections.abc import Iterable, Set
from typing import Any

import torch
from torch import nn
from torch.fx.proxy import Proxy

from fastops._forward_code import LIBRARY, Code, code_of, is_inner

Place = tuple[Any, Any]  # a dict and a key; a cell and None; an object and the name of an attribute

MISSING = object()
_MOST = 500  # places; a forward that reads more is not traced
_ALWAYS_THE_SAME = (
    bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.layout, range, slice,
    torch.memory_format, torch.Generator, torch.Tensor, types.BuiltinFunctionType, types.MethodType, types.CodeType,
    types.CellType, torch.jit.ScriptModule,
)  # fmt: skip
OF_MODULES = frozenset([*vars(nn.Module()), "fastops_report"])  # what nn.Module keeps
_KNOWN = LIBRARY | {"torch", "fastops", "builtins"}


def is_known(value: Any) -> bool:
    """Code of Python's, torch's or ours: nobody puts other things in its place."""
    if isinstance(value, types.ModuleType):
        name = value.__name__
    elif isinstance(value, (type, types.FunctionType, types.BuiltinFunctionType)):
        name = value.__module__ or "builtins"
    else:
        return False
    return name.partition(".")[0] in _KNOWN


def is_code(value: Any) -> bool:
    return isinstance(value, (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, nn.Module))


def value_at(place: Place) -> Any:
    where, key = place
    if isinstance(where, dict):
        return where.get(key, MISSING)
    if isinstance(where, types.CellType):
        try:
            return where.cell_contents
        except ValueError:
            return MISSING
    return getattr(where, key, MISSING)


class Outside:
    """Everything that the functions read which ran during a trace."""

    def __init__(self, root: nn.Module) -> None:
        self.own = {id(module): module for module in root.modules()}
        self.names: set[str] = set()
        self.roots: dict[tuple[int, Any], Place] = {}
        self.modules: dict[int, nn.Module] = {}
        self.reached: set[int] = set()
        # What was where, for all that a forward may change.
        self.before: dict[tuple[int, Any], tuple[Place, Any]] = {}
        self.contents: dict[int, tuple[Any, Any]] = {}

    def read(self, frame: types.FrameType) -> str:
        """Notes what this function may read, before it runs. Returns why it cannot be watched, or ""."""
        code = code_of(frame.f_code)
        self.names |= code.names
        found: list[Any] = []
        for name in code.variables:
            place = frame.f_globals, name
            value = value_at(place)
            if not is_known(value) and not hasattr(value, "__fx_already_patched"):
                self._note(place, value)
                found.append(value)
        cells = _cells(frame, code)
        for cell in cells:
            self._note((cell, None), value_at((cell, None)))
        for value in frame.f_locals.values():
            if id(value) in self.own:
                self.modules[id(value)] = value
                state = vars(value)
                found += [state[name] for name in code.names & (state.keys() - OF_MODULES)]
                found += [type(value), *_defaults(value, frame.f_code)]
            elif id(value) in self.reached:  # else it has been made during the trace
                found.append(value)
        walk = _Walk(code.names, self.own.keys())
        for value in found:
            walk.through(value)
        self.reached |= walk.seen
        for place in walk.places.values():
            if not isinstance(place[0], dict):  # those are kept as they are, below
                self._note(place, value_at(place), root=False)
        for where in (*walk.contents.values(), *walk.dicts.values()):
            if id(where) not in self.contents:
                self.contents[id(where)] = where, contents_of(where)
        if code.free and not cells and not is_inner(frame):
            return f"it calls {frame.f_code.co_name}, which gc.freeze() has hidden"
        return ""

    def _note(self, place: Place, value: Any, root: bool = True) -> None:
        key = id(place[0]), place[1]
        self.before.setdefault(key, (place, value))
        if root:
            self.roots[key] = place

    def has_changed(self) -> bool:
        return any(value_at(place) is not value for place, value in self.before.values()) or any(
            not same_contents(copied, where) for where, copied in self.contents.values()
        )

    def restore(self) -> None:
        for (where, key), value in self.before.values():
            if value_at((where, key)) is value:
                continue
            if isinstance(where, dict):
                where.pop(key, None) if value is MISSING else where.update({key: value})
            elif isinstance(where, types.CellType):
                where.cell_contents = value
            else:
                setattr(where, key, value)
        for where, copied in self.contents.values():
            if not same_contents(copied, where):
                put_back(where, copied)

    def watched(self) -> tuple[list[Place], list[Any]]:
        """The places, and the lists, dicts and sets, that a program relies on. Raises ValueError where it cannot."""
        walk = _Walk(self.names, set())
        for value in (*map(value_at, self.roots.values()), *self.modules.values()):
            walk.through(value)
        places = {key: one for key, one in {**self.roots, **walk.places}.items() if value_at(one) is not MISSING}
        own = {
            id(one)
            for module in self.own.values()
            for one in (vars(module), module._parameters, module._buffers, module._modules)
        }
        if walk.why_not or sum(id(where) not in own for where, _ in places.values()) > _MOST:
            raise ValueError(walk.why_not or "its forward reads too much that may change")
        return list(places.values()), list(walk.contents.values())


class _Walk:
    """From one value to all that these names lead to."""

    def __init__(self, names: set[str], known: Set[int]) -> None:
        self.names, self.known, self.seen = names, known, set[int]()
        self.places: dict[tuple[int, Any], Place] = {}
        self.contents: dict[int, Any] = {}  # lists, dicts and sets
        self.dicts: dict[int, Any] = {}  # of objects
        self.why_not = ""

    def through(self, value: Any) -> None:
        cls = type(value)
        if issubclass(cls, (Proxy, enum.Enum, *_ALWAYS_THE_SAME)) or id(value) in self.seen or is_known(value):
            return
        if id(value) in self.known:
            return
        self.seen.add(id(value))
        if issubclass(cls, types.ModuleType):
            self._entries(vars(value), self.names & vars(value).keys())
        elif issubclass(cls, type):
            self._attributes_of_class(value, value, ())
        elif issubclass(cls, (tuple, frozenset)):
            self._all(value)
        elif issubclass(cls, (list, set)):
            self.contents[id(value)] = value
            self._all(contents_of(value))
        elif issubclass(cls, dict):
            self.contents[id(value)] = value
            self._all(contents_of(value).values())
        elif issubclass(cls, types.MappingProxyType):
            self._all(gc.get_referents(value))
        elif issubclass(cls, nn.Module):
            self._module(value)
        elif issubclass(cls, functools.partial):
            self._all((value.func, *value.args, *value.keywords.values()))
        elif hasattr(cls, "__next__") or issubclass(cls, collections.deque) or cls.__module__ == "numpy":
            self.why_not = f"its forward reads {_with_article(cls.__name__)} that is not an input"
        elif cls.__module__.partition(".")[0] != "torch":
            self._object(value)

    def _all(self, values: Iterable[Any]) -> None:
        for value in values:
            self.through(value)

    def _entries(self, where: dict[Any, Any], keys: Iterable[Any]) -> None:
        for key in keys:
            if not is_known(where[key]):
                self.places[id(where), key] = where, key
                self.through(where[key])

    def _object(self, value: Any) -> None:
        state = getattr(value, "__dict__", None)
        if isinstance(state, dict):
            self.dicts[id(state)] = state
            self._entries(state, self.names & state.keys())
        if isinstance(value, types.FunctionType):
            self._all((*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()))
        else:
            self._attributes_of_class(value, type(value), state or ())

    def _module(self, module: nn.Module) -> None:
        state = vars(module)
        self._entries(state, self.names & (state.keys() - OF_MODULES))
        for place in (state["_parameters"], state["_buffers"], state["_modules"]):
            for key in self.names & place.keys():
                self.places[id(place), key] = place, key
        self._all(state["_modules"].values())
        self._attributes_of_class(type(module), type(module), state)

    def _attributes_of_class(self, owner: Any, cls: type, hidden: Any) -> None:
        """What is no code of a class, and the slots of an object."""
        for one in cls.__mro__:
            if one.__module__.partition(".")[0] in _KNOWN:
                continue
            for key in self.names & vars(one).keys():
                value = vars(one)[key]
                if key.startswith("__") or key in hidden:
                    continue
                if isinstance(value, types.MemberDescriptorType):
                    if isinstance(owner, type) or not hasattr(owner, key):
                        continue
                    value = getattr(owner, key)
                elif hasattr(type(value), "__get__"):
                    continue
                self.places[id(owner), key] = owner, key
                self.through(value)


def _with_article(name: str) -> str:
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


def _defaults(module: nn.Module, code: types.CodeType) -> list[Any]:
    forward = inspect.getattr_static(type(module), code.co_name, None)
    if type(forward) is not types.FunctionType or forward.__code__ is not code:
        return []
    return [*(forward.__defaults__ or ()), *(forward.__kwdefaults__ or {}).values()]


def _cells(frame: types.FrameType, code: Code) -> list[types.CellType]:
    """The variables of the functions around this one; none where these are being traced as well."""
    if not code.free or is_inner(frame):
        return []
    variables = frame.f_locals
    cells = []
    for function in gc.get_referrers(frame.f_code):
        if type(function) is not types.FunctionType or function.__code__ is not frame.f_code:
            continue
        own = dict(zip(frame.f_code.co_freevars, function.__closure__ or (), strict=True))
        if all(value_at((own[name], None)) is variables.get(name, MISSING) for name in code.free):
            cells += [own[name] for name in code.free]
    return cells


def contents_of(where: Any) -> Any:
    """What is in a list, dict or set, in a plain one: as it is kept, whatever a class derived from these gives out.

    transformers' table of activations makes a new module at each look-up.
    """
    kind = _kind(where)
    return dict(kind.items(where)) if isinstance(where, dict) else kind(kind.__iter__(where))


def put_back(where: Any, before: Any) -> None:
    """Makes what is in a list, dict or set what contents_of has given."""
    kind = _kind(where)
    kind.clear(where)
    if isinstance(where, dict):
        for key, value in before.items():
            kind.__setitem__(where, key, value)
    else:
        kind.__iadd__(where, before) if kind is list else kind.update(where, before)


def same_contents(before: Any, now: Any) -> bool:
    now = contents_of(now)
    if len(before) != len(now):
        return False
    if isinstance(now, dict):
        return all(now.get(key, MISSING) is value for key, value in before.items())
    return before == now if isinstance(now, set) else all(a is b for a, b in zip(before, now, strict=True))


def _kind(where: Any) -> Any:
    return next(kind for kind in (collections.OrderedDict, dict, list, set) if isinstance(where, kind))
