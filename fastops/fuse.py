"""fastops.fuse: a model whose layers, activations, norms and pools are computed together, with the same parameters.

The model is copied, but its parameters and buffers are not. torch.fx follows the copy's forward, fastops._fusion puts
calls of fastops where several nodes are one, and a program is written from the graph. It is in the place of the copy's
forward for as long as the modules it stands for are what they were (fastops._C.unchanged, csrc/torch/guard.cpp).
"""

import copy
import inspect
import keyword
import math
import operator
import types
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.compiler import is_dynamo_compiling as _is_compiling
from torch.fx import Graph, Node
from torch.fx.proxy import TraceError

from fastops import _C
from fastops._fusion import Finding, rewrite
from fastops._nodes import HOOKS
from fastops._outside import Place, contents_of, is_code, value_at
from fastops._reached_code import CLASSES, asked_of_children
from fastops._signature import Signature
from fastops._tracing import Traced, is_frozen, plain_class, reason, trace
from fastops.replace import Report, Row, _check, _name, _replace, _table

__all__ = ["FusionReport", "fuse"]

# A program is written again where a module has changed, but not for a model that changes all the time.
_MOST_PROGRAMS = 8


@dataclass
class FusionReport(Report):
    """What fuse did. str() is a table: a line for all groups that fared alike.

    Attributes:
        fused: a Row for every group of layers that is one call now; its name is those of the modules in it.
        apart: a Row for what looks like a group and is none, and why.
        untraced: a Row for every module whose forward could not be followed, and why. It is called as it was; what it
            consists of is fused on its own.
        replaced, skipped, left: as in Report, for the modules that are in no group.
    """

    fused: list[Row] = field(default_factory=list)
    apart: list[Row] = field(default_factory=list)
    untraced: list[Row] = field(default_factory=list)

    def __str__(self) -> str:
        lines = _table(("->", self.fused), ("apart:", self.apart), ("untraced:", self.untraced))
        counts = f"{len(self.fused)} fused, {len(self.apart)} apart, {len(self.untraced)} untraced; "
        *rest, last = super().__str__().splitlines()
        return "\n".join([*lines, *rest, counts + last])


def fuse(model: nn.Module) -> nn.Module:
    """A model that computes what `model` does, with the same parameters, in fewer and faster calls.

    Layers with the activation, the max pool or the addition that follows them become one call each, and so do chains of
    linear layers, and a layer scale after them. It does not matter whether they are modules, functions or methods. All
    other layers are replaced as by replace_.

    Args:
        model: any module. It stays what it is and may be used beside the fused one.

    Returns:
        A module like a copy.deepcopy of the model that shares its parameters and buffers: the same class with another
        forward, names, state_dict, hooks and mode. It trains, and can be copied, pickled, moved and compiled;
        torch.jit.script compiles the model's own forward. Optimizers of either model train both, and a buffer that
        either gets later (as by pruning) is in the state_dict of both. `fastops_report`, a FusionReport, says what
        became of each layer. A hook on a layer that is fused, another layer or attribute in its place, or one that is
        parametrized are noticed at the next call, and such layers are called one by one.

    A forward that asks for `training` has a program for each mode, which is written when it is first called in that;
    the report is that of the mode that the model is in. What a forward reads from outside (global variables, those of
    functions around it, attributes of classes and configuration objects, lists and dicts) may change: that is noticed,
    too. What cannot be traced, such as a forward that decides by the values, the shape or the type of an input, changes
    something that is not its own or reads what a module that it calls changes, has a block such as no_grad or gives an
    OrderedDict, stays as it is; the modules that it calls are fused on their own, unless it asks for their exact
    classes. Methods and functions that are put in the place of others later, by an assignment to a class, are not
    noticed. Arguments of forward that have a default are fused for that: a call that gives another value runs the
    model's own forward.

    Raises:
        TypeError: model is not a torch.nn.Module.

    Source: fastops' own, with torch.fx.

    >>> class Net(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.fc1, self.fc2 = nn.Linear(10, 20), nn.Linear(20, 5)
    ...     def forward(self, x):
    ...         return self.fc2(torch.relu(self.fc1(x)))
    >>> fused = fastops.fuse(Net())
    >>> print(fused.fastops_report)
    fc1 + fc2  Linear + relu + Linear  ->  mlp(2 layers, activation='relu')
    1 fused, 0 apart, 0 untraced; 0 replaced, 0 skipped, 0 left alone
    """
    _check(model, "fuse")
    result = sharing_copy(model)
    fuse_in_place(result)
    return result


def fuse_in_place(model: nn.Module) -> FusionReport:
    """What fuse does, to the model itself; unfuse and then restore_ undo it, module by module."""
    for module in model.modules():
        unfuse(module)
    swapped, _ = _replace(model, None, _kept(model))
    report = FusionReport()
    vars(model)["fastops_report"] = report  # before its program is written, which watches how many attributes there are
    if not is_layer(model):
        _fuse(model, "", report)
    together = {name for row in report.fused for name in row.name.split(" + ")}
    for name in ("replaced", "skipped", "left"):
        getattr(report, name).extend(row for row in getattr(swapped, name) if row.name not in together)
    return report


def fuse_forward(model: nn.Module, unwatched: frozenset[str]) -> FusionReport:
    """Fuses the forward of a model whose children are fused already, in place; unfuse undoes it.

    unwatched: attributes of the model that somebody changes all the time. Its program holds whatever they are, unless
        the forward reads them.
    """
    report = FusionReport()
    _write(model, report, "", unwatched)
    return report


def _kept(model: nn.Module) -> dict[int, str]:
    """The modules whose class somebody asks for, by their id; they stay what they are."""
    kept: dict[int, str] = {}
    for module in model.modules():
        if id(module) not in kept and CLASSES in asked_of_children(module):
            kept |= {
                id(below): f"the forward of {_name(type(module))} asks for its class"
                for below in module.modules()
                if below is not module
            }
    return kept


# ---- the copy --------------------------------------------------------------------------------------------------------


def sharing_copy(model: nn.Module) -> nn.Module:
    """A copy.deepcopy that shares parameters, buffers and whatever else is a tensor."""
    shared: dict[int, Any] = {}
    for module in model.modules():
        if isinstance(module, torch.jit.ScriptModule) or is_frozen(module):
            shared[id(module)] = module
        buffers = module._buffers
        shared[id(buffers)] = buffers  # the dict itself: a move of either model gives both the moved buffers
        find_tensors(vars(module), shared, set())
    try:
        result = copy.deepcopy(model, dict(shared))
        names = [name for name, _ in model.named_parameters()]
        if names == [name for name, _ in result.named_parameters()] and all(
            a is b for a, b in zip(model.parameters(), result.parameters(), strict=True)
        ):
            return result
    except Exception:  # something that cannot be copied, which a model may hold
        pass
    return copy_of_modules(model, {})


def find_tensors(value: Any, found: dict[int, Any], seen: set[int]) -> None:
    """The tensors in lists, dicts and objects that are no modules."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        found[id(value)] = value
    elif isinstance(value, dict):
        for one in value.values():
            find_tensors(one, found, seen)
    elif isinstance(value, (list, tuple, set, frozenset)):
        for one in value:
            find_tensors(one, found, seen)
    elif not isinstance(value, (nn.Module, type, types.ModuleType, types.FunctionType)):
        find_tensors(getattr(value, "__dict__", None), found, seen)


def copy_of_modules(module: nn.Module, copies: dict[int, nn.Module]) -> nn.Module:
    """New modules with the same attributes; only what nn.Module keeps is copied."""
    if id(module) in copies:
        return copies[id(module)]
    if isinstance(module, torch.jit.ScriptModule) or is_frozen(module):
        return module
    result = type(module).__new__(type(module))
    copies[id(module)] = result
    state = dict(vars(module))
    for key in ("_parameters", "_non_persistent_buffers_set", *HOOKS):
        if key in state:
            state[key] = state[key].copy()
    state["_modules"] = {name: child and copy_of_modules(child, copies) for name, child in state["_modules"].items()}
    vars(result).update(state)
    return result


# ---- a fused module --------------------------------------------------------------------------------------------------


class _Fused(nn.Module):
    """What the classes of fused modules have besides the class they are made from. They are made by `_become`."""

    _fastops_program: "_Program | None" = None  # of one that somebody makes by type(fused)(...)
    fastops_report: FusionReport

    def __init_subclass__(cls, **options: Any) -> None:
        """A fused class is not for those who count or name the classes derived from theirs."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        """As the model's own class, fused again by whoever reads it: programs know this very model."""
        function, arguments, state, *rest = super().__reduce_ex__(protocol)
        if arguments and arguments[0] is type(self) and isinstance(state, dict):
            state = {key: value for key, value in state.items() if not key.startswith("_fastops_")}
            return _revive, (plain_class(self), *arguments[1:]), state, *rest
        return function, arguments, state, *rest

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        vars(self).update(_state())
        _write(self, None)


def unfuse(module: nn.Module) -> None:
    """Makes a fused module one of the model's own class."""
    if not isinstance(module, _Fused):
        return
    module.__class__ = plain_class(module)
    for key in (*_state(), "fastops_report"):
        vars(module).pop(key, None)


def _revive(cls: type, *arguments: Any) -> nn.Module:
    module = cls.__new__(cls, *arguments)
    object.__setattr__(module, "__class__", _fused_class(cls))
    return module


def _become(module: nn.Module) -> None:
    module.__class__ = _fused_class(type(module))
    vars(module).update(_state())


def _state() -> dict[str, Any]:
    """A fused module's own: its program, those of other modes, how many were written, and what they do not watch."""
    return {"_fastops_program": None, "_fastops_kept": [], "_fastops_count": 0, "_fastops_unwatched": frozenset()}


def _fused_class(cls: type) -> type:
    """The class of a fused module that was one of cls."""
    for known in cls.__subclasses__():
        if vars(known).get("_fastops_plain") is cls:
            return known
    attributes = {"_fastops_plain": cls, "__module__": cls.__module__, "__doc__": cls.__doc__}
    not_scripted = [*_state(), "fastops_report"]
    attributes["__jit_ignored_attributes__"] = [*getattr(cls, "__jit_ignored_attributes__", ()), *not_scripted]
    forward = _forward_of(cls)
    if forward is not None:
        attributes["forward"] = forward
    return type(f"Fused{cls.__name__}", (_Fused, cls), attributes)


def _forward_of(cls: type) -> Callable[..., Any] | None:
    """forward with cls' signature: the program where it holds, else cls' own forward."""
    plain = inspect.getattr_static(cls, "forward")
    if not isinstance(plain, types.FunctionType) or plain is nn.Module.forward:
        return None
    try:
        signature = Signature(plain)
    except TraceError:
        return None
    module, program, *names = signature.free_names("self", "program", "is_compiling", "unchanged", "again", "plain")
    is_compiling, unchanged, again, own = names
    inputs = ", ".join([module, *signature.inputs, *signature.named_inputs])
    source = f"""\
def forward({", ".join([module, *signature.declared])}):
    {program} = {module}._fastops_program
    if {" and ".join([f"{program} is not None", *signature.tests])}:
        if {is_compiling}():
            return {program}.portable({inputs})
        if {unchanged}({program}.watched, {module}):
            return {program}.run({inputs})
        {program} = {again}({module})
        if {program} is not None:
            return {program}.run({inputs})
    return {own}({", ".join([module, *signature.passed])})
"""
    functions = (_is_compiling, _C.unchanged, _again, plain)
    space = {**signature.defaults, **dict(zip(names, functions, strict=True))}
    return _in_the_place_of(plain, source, space)


def _in_the_place_of(plain: types.FunctionType, source: str, space: dict[str, Any]) -> Callable[..., Any]:
    """A function that torch.jit.script takes for this one: with its source, its global variables and its closure.

    __prepare_scriptable__ would not do: torch.jit puts what that gives into the user's own module.
    """
    cells = {
        name: cell
        for name, cell in zip(plain.__code__.co_freevars, plain.__closure__ or (), strict=True)
        if name not in ("__class__", "forward") and name not in space
    }
    lines = source.replace("\n", "\n    ")
    names = ", ".join([*space, *cells])
    # What is never reached makes variables of plain's closure those of this one.
    outer = f"def make({names}):\n    {lines}    ({', '.join(cells)})\n    return forward\n"
    made: dict[str, Any] = {}
    exec(compile(outer, "<fastops.fuse>", "exec"), plain.__globals__, made)
    forward = made["make"](**space, **dict.fromkeys(cells))
    own = dict(zip(forward.__code__.co_freevars, forward.__closure__, strict=True)) | cells
    closure = tuple(own[name] for name in forward.__code__.co_freevars)
    result = types.FunctionType(forward.__code__, plain.__globals__, "forward", forward.__defaults__, closure)
    result.__kwdefaults__, result.__wrapped__ = forward.__kwdefaults__, plain
    result.__doc__, result.__qualname__ = plain.__doc__, f"Fused{plain.__qualname__}"
    return result


def _compiled(source: str, space: dict[str, Any]) -> Callable[..., Any]:
    exec(compile(source, "<fastops.fuse>", "exec"), space)
    # The function must not hold itself: parameters that it holds would wait for the garbage collector.
    return space.pop("forward")


# ---- programs --------------------------------------------------------------------------------------------------------


@dataclass
class _Program:
    """A fused forward.

    run: the function of the module and its inputs, with the dicts of all other modules at hand: a look-up for a
        parameter. Nothing in a program holds its own module.
    portable: the same, but it finds everything by attributes, for torch.compile and torch.export.
    inlined: the names of the modules that it stands for. children: of those that it calls.
    modes: the modules whose `training` a forward asks for, and the value for which the program is.
    places, contents: what the forward reads besides that may change (Traced).
    """

    run: Callable[..., Any]
    portable: Callable[..., Any]
    inlined: list[str]
    children: list[str]
    parameters: list[str]
    modes: dict[str, bool]
    places: list[Place]
    contents: list[Any]
    watched: tuple[Any, ...] = (0, (), (), (), (), ())

    def watch(self, root: nn.Module) -> None:
        """Notes what the program relies on, as csrc/torch/guard.cpp reads it."""
        inlined = [root.get_submodule(name) for name in self.inlined]
        read = {key for place, key in self.places if place is vars(root)}
        unwatched = vars(root)["_fastops_unwatched"] - read
        modules = tuple(
            _watched(module, name == "", name in self.modes, unwatched if name == "" else frozenset())
            for name, module in zip(self.inlined, inlined, strict=True)
        )
        entries: dict[tuple[int, Any], tuple[Any, ...]] = {}
        for name in (*self.inlined, *self.children):
            while name:
                name, _, child = name.rpartition(".")
                place = root.get_submodule(name)._modules
                entries[id(place), child] = (place, child, place[child])
        for name in self.parameters:
            name, _, key = name.rpartition(".")
            place = root.get_submodule(name)._parameters
            if key in place:
                entries[id(place), key] = (place, key, None if place[key] is None else ...)
        for name in self.modes.keys() - {*self.inlined}:
            place = vars(root.get_submodule(name))
            entries[id(place), "training"] = (place, "training", place["training"])
        tensors = {id(place) for module in root.modules() for place in (module._parameters, module._buffers)}
        known = {id(vars(module)) for module in (root, *inlined)}
        for place, key in self.places:
            if id(place) not in known and (id(place), key) not in entries:
                value = value_at((place, key))
                if id(place) in tensors and value is not None:
                    value = ...
                entries[id(place), key] = (place, key, value)
        hooks = [value for key, value in vars(torch.nn.modules.module).items() if key.startswith("_global_")]
        empty = tuple(one for one in hooks if isinstance(one, dict))
        # torch.fx follows the model's own forward, and not a program.
        entries[id(_TORCH_FX), _FOLLOWING] = (_TORCH_FX, _FOLLOWING, False)
        # A forward may go through its children, and so a child more is another forward.
        owners = [module for module in inlined if not is_layer(module)]
        sizes: dict[int, tuple[Any, int]] = {}
        while owners:
            owner = owners.pop()
            sizes.update((id(place), (place, len(place))) for place in (owner._modules, owner._parameters))
            owners += [child for child in owner._modules.values() if isinstance(child, _LISTS)]
        contents = tuple(
            (one, tuple(contents_of(one)) if isinstance(one, list) else contents_of(one)) for one in self.contents
        )
        self.watched = id(root), modules, tuple(entries.values()), empty, tuple(sizes.values()), contents

    def is_for(self, root: nn.Module) -> bool:
        """Whether the modules that decide by their mode are in that of this program."""
        found = dict(root.named_modules())
        return all(name in found and found[name].training is mode for name, mode in self.modes.items())


_TORCH_FX, _FOLLOWING = vars(torch.fx._symbolic_trace), "_is_fx_tracing_flag"  # what is_fx_tracing() reads, and warns

# What a forward goes through itself.
_LISTS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


def _watched(module: nn.Module, is_root: bool, decides: bool, unwatched: frozenset[str]) -> tuple[Any, ...]:
    state = vars(module)
    ignored = _INTERNAL | _NOT_READ if is_layer(module) else _INTERNAL | unwatched
    if decides:
        ignored = ignored - {"training"}
    attributes = [item for key, value in state.items() if key not in ignored for item in (key, value)]
    return None if is_root else module, type(module), None if is_root else state, len(state), *attributes


_INTERNAL = frozenset([*vars(nn.Module()), *_state(), "fastops_report"])

# Attributes of torch.nn's layers that no program is made from; batch norms are asked for theirs at every call.
_NOT_READ = frozenset(
    {
        "in_features",
        "out_features",
        "in_channels",
        "out_channels",
        "transposed",
        "_reversed_padding_repeated_twice",
        "num_features",
        "eps",
        "momentum",
        "affine",
        "track_running_stats",
    }
)


def _fuse(module: nn.Module, name: str, report: FusionReport) -> None:
    """Fuses a module, and on their own those below it that its program calls or, where it has none, its children."""
    if isinstance(module, torch.jit.ScriptModule) or is_layer(module):
        return
    leaves = _write(module, report, name)
    if leaves is None:
        leaves = {child: ("", False) for child, _ in module.named_children()}
    _fuse_leaves(module, name, leaves, report)


def _fuse_leaves(module: nn.Module, name: str, leaves: dict[str, tuple[str, bool]], report: FusionReport) -> None:
    keeps = CLASSES in asked_of_children(module)
    for child, (why, tried) in leaves.items():
        below, full_name = module.get_submodule(child), f"{name}.{child}" if name else child
        if why:
            report.untraced.append(Row(full_name, _name(type(below)), why))
        if keeps:
            continue
        if tried:
            for grandchild, one in () if CLASSES in asked_of_children(below) else below.named_children():
                _fuse(one, f"{full_name}.{grandchild}", report)
        elif not isinstance(below, _Fused):  # shared, and done already
            _fuse(below, full_name, report)


def is_layer(module: nn.Module) -> bool:
    """What torch.fx calls, and does not look into."""
    if is_frozen(module):
        return True
    return torch.fx.Tracer().is_leaf_module(module, "") and not isinstance(module, (nn.ModuleList, nn.ModuleDict))


def _write(
    module: nn.Module, report: FusionReport | None, name: str = "", unwatched: frozenset[str] = frozenset()
) -> dict[str, tuple[str, bool]] | None:
    """Gives the module a program. Returns what was not traced through (Traced.leaves), or None where there is none.

    unwatched: of a module that has none yet (fuse_forward).
    """
    cls = plain_class(module)
    current = module.__class__
    try:
        if cls.forward is nn.Module.forward:  # a list of modules
            return None
        if not isinstance(inspect.getattr_static(cls, "forward"), types.FunctionType) or "forward" in vars(module):
            raise _NotTraced("its forward has been overridden")
        object.__setattr__(module, "__class__", cls)
        signature = Signature(cls.forward)
        traced = trace(module, signature.inputs, signature.named_inputs)
        findings, program = _program(module, traced, signature.named_inputs)
        _fused_class(cls)  # which a metaclass may refuse
    except Exception as error:
        object.__setattr__(module, "__class__", current)
        if report is not None:
            why = str(error) if isinstance(error, _NotTraced) else reason(error)
            report.untraced.append(Row(name, _name(cls), why))
        return None
    program.inlined = [*traced.entered, *program.inlined]
    count = vars(module).get("_fastops_count", 0)
    object.__setattr__(module, "__class__", current)
    if not isinstance(module, _Fused):
        _become(module)
        vars(module)["_fastops_unwatched"] = unwatched
    vars(module).update({"_fastops_program": program, "_fastops_count": count + 1})
    if program.modes:
        vars(module)["_fastops_kept"].append(program)
    program.watch(module)
    if report is not None:
        _tell(report, name, findings)
    return traced.leaves


class _NotTraced(Exception):
    pass


def _tell(report: FusionReport, name: str, findings: list[Finding]) -> None:
    prefix = f"{name}." if name else ""
    for finding in findings:
        row = Row(" + ".join(f"{prefix}{one}" for one in finding.modules), finding.pattern, finding.result)
        if finding.what == "fused":
            report.fused.append(row)
        elif finding.what == "apart":
            report.apart.append(row)


def _again(module: nn.Module) -> _Program | None:
    """Another program for a module that has changed. None: the module's own forward has to do it."""
    state = vars(module)
    before = state["_fastops_program"]
    hooks_on_all_modules = any(before.watched[3])
    if before.watched[0] != id(module) or hooks_on_all_modules or _TORCH_FX[_FOLLOWING]:
        return None
    for program in state["_fastops_kept"]:  # written for the mode that it is in now
        if _C.unchanged(program.watched, module):
            state["_fastops_program"] = program
            return program
    if state["_fastops_count"] >= _MOST_PROGRAMS:
        return None
    # Those that do not hold in their own mode never will again; here, all but those of other modes.
    state["_fastops_kept"] = [one for one in state["_fastops_kept"] if not one.is_for(module)]
    leaves = _write(module, None)
    if leaves is None:
        state["_fastops_count"] += 1
        if not before.modes:  # else it is good for another mode
            state["_fastops_program"] = None
        return None
    _fuse_leaves(module, "", leaves, FusionReport())  # what only this mode calls
    return state["_fastops_program"]


# ---- writing a program -----------------------------------------------------------------------------------------------


def _program(module: nn.Module, traced: Traced, named_inputs: list[str]) -> tuple[list[Finding], _Program]:
    graph, modes = traced.graph, traced.decided
    findings = rewrite(graph, module)
    inlined = [name for one in findings if one.what in ("fused", "called") for name in one.modules]
    nodes = tuple(graph.nodes)
    children = [node.target for node in nodes if node.op == "call_module"]
    parameters = [node.target for node in nodes if node.op == "get_attr"]
    missing = [f"{name.rpartition('.')[0]}.bias" for name in parameters if name.endswith(".weight")]
    parameters += [name for name in missing if name not in parameters]
    run = _Writer(module, graph, named_inputs).function()
    program = _Program(run, None, inlined, children, parameters, modes, traced.places, traced.contents)
    owner = weakref.ref(module)

    def holds() -> bool:
        alive = owner()
        now = alive and vars(alive).get("_fastops_program")
        return now is not None and _C.unchanged(now.watched, alive)

    holds._dynamo_marked_constant = True  # as torch.compiler.assume_constant_result does: hooks are not guarded either
    own = {id(place) for one in module.modules() for place in (vars(one), one._parameters, one._buffers, one._modules)}
    outside = any(id(place) not in own and not is_code(value_at((place, key))) for place, key in traced.places)
    program.portable = _Writer(module, graph, named_inputs, holds, modes).function(outside)
    return findings, program


class _Writer:
    """Python source of a graph."""

    def __init__(
        self,
        module: nn.Module,
        graph: Graph,
        named_inputs: list[str],
        holds: Callable[[], bool] | None = None,
        modes: dict[str, bool] | None = None,
    ) -> None:
        """holds, modes: for a portable one."""
        self.module, self.graph, self.named_inputs, self.holds, self.modes = module, graph, named_inputs, holds, modes
        self.portable = holds is not None
        self.space: dict[str, Any] = {}
        self.names: dict[int, str] = {}

    def function(self, plain_only: bool = False) -> Callable[..., Any]:
        """plain_only: for a forward that reads what may change, which Dynamo watches and this function could not."""
        nodes = list(self.graph.nodes)
        for node in nodes:
            if node.name == "self" or node.name.startswith("fastops_"):  # names of ours
                node._rename(f"value_{node.name}")
        placeholders = [node.name for node in nodes if node.op == "placeholder"]
        last: dict[Node, Node] = {}
        for node in nodes:
            for used in node.all_input_nodes:
                last[used] = node
        lines = []
        if self.portable:
            plain = self.bind(type(self.module).forward)
            count = len(placeholders) - len(self.named_inputs)
            named = [f"{name}={given}" for name, given in zip(self.named_inputs, placeholders[count:], strict=True)]
            passed = ", ".join(["self", *placeholders[:count], *named])
            tests = [f"{self.bind(self.holds)}()"]  # the modes as well where torch.compile guards them
            tests += [f"{_path(name)}.training is {mode}" for name, mode in self.modes.items()]
            lines += [f"return {plain}({passed})"] if plain_only else [
                f"if not ({' and '.join(tests)}):", f"    return {plain}({passed})"
            ]  # fmt: skip
        for node in () if plain_only else nodes:
            if node.op in ("placeholder", "get_attr"):
                continue
            if node.op == "output":
                lines.append(f"return {self.show(node.args[0])}")
                continue
            value = self.value(node)
            if node.users:
                lines.append(f"{node.name} = {value}")
            else:
                lines.append(value)
            # As in a forward that gives a name another value, results are not kept for longer than needed.
            done = [used.name for used in node.all_input_nodes if last[used] is node and used.op != "get_attr"]
            if done:
                lines.append(f"del {', '.join(done)}")
        body = "\n    ".join(lines)
        return _compiled(f"def forward({', '.join(['self', *placeholders])}):\n    {body}\n", self.space)

    def bind(self, value: Any) -> str:
        name = self.names.get(id(value))
        if name is None:
            name = f"fastops_{len(self.names)}_{getattr(value, '__name__', '')}".replace("<", "").replace(">", "")
            self.names[id(value)] = name if name.isidentifier() else f"fastops_{len(self.names)}"
            self.space[self.names[id(value)]] = value
        return self.names[id(value)]

    def value(self, node: Node) -> str:
        if node.op == "call_method":
            first, *rest = node.args
            return f"{self.show(first)}.{node.target}({self.arguments(rest, node.kwargs)})"
        if node.op == "call_module":
            called = _path(node.target) if self.portable else self.bind(self.module.get_submodule(node.target))
            return f"{called}({self.arguments(node.args, node.kwargs)})"
        sign = _OPERATORS.get(node.target)
        if sign and len(node.args) == 2 and not node.kwargs:
            return f"{self.show(node.args[0])} {sign} {self.show(node.args[1])}"
        if node.target is operator.getitem and not node.kwargs:
            return f"{self.show(node.args[0])}[{self.show(node.args[1])}]"
        return f"{self.bind(node.target)}({self.arguments(node.args, node.kwargs)})"

    def arguments(self, args: Any, kwargs: dict[str, Any]) -> str:
        return ", ".join([*map(self.show, args), *(f"{key}={self.show(value)}" for key, value in kwargs.items())])

    def show(self, value: Any) -> str:
        if isinstance(value, Node):
            return self.attribute(value.target) if value.op == "get_attr" else value.name
        if type(value) in (bool, int, str, type(None), type(...)):
            return repr(value)
        if type(value) is float and math.isfinite(value):
            return repr(value)
        if type(value) is tuple or isinstance(value, list):
            inside = "".join(f"{self.show(one)}, " for one in value)
            return f"({inside})" if isinstance(value, tuple) else f"[{inside}]"
        if isinstance(value, dict):
            return "{" + ", ".join(f"{self.show(key)}: {self.show(one)}" for key, one in value.items()) + "}"
        if isinstance(value, slice):
            return f"slice({self.show(value.start)}, {self.show(value.stop)}, {self.show(value.step)})"
        return self.bind(value)

    def attribute(self, target: str) -> str:
        """A parameter, buffer, module or whatever else the model has."""
        parent, _, key = target.rpartition(".")
        owner = self.module.get_submodule(parent)
        if self.portable or (not parent and key in vars(owner)):
            return _path(target)
        for place in (owner._parameters, owner._buffers, vars(owner)):
            if key in place:
                return f"{self.bind(place)}[{key!r}]"
        return self.bind(self.module.get_submodule(target))


_OPERATORS = {operator.add: "+", operator.sub: "-", operator.mul: "*", operator.truediv: "/", operator.matmul: "@"}


def _path(target: str) -> str:
    """An attribute of self as source has it; children of a Sequential are numbers."""
    path = "self"
    for name in target.split(".") if target else ():
        good = name.isidentifier() and not keyword.iskeyword(name)
        path = f"{path}.{name}" if good else f"getattr({path}, {name!r})"
    return path
