"""torch.fx's tracer, for modules that nobody has prepared for it.

A trace is only good if it does what the module does at every later call. So where a forward asks for `training`, the
trace is that of one mode and says so. x += y stays in place. What a trace would get wrong in silence is an error: a
random number or a tensor made while tracing, something that forward changes, no_grad, autocast or a checkpoint inside
of it, a question for an input's type. What the operations do not show is read from the code of the functions that run
(_forward_code.py); what these read from outside the module is noted (_outside.py). A forward gets proxies
(_proxies.py), and what it changes is taken back (_states.py). A submodule that is in the way of a trace is called as a
module; the rest is traced.
"""

import contextlib
import dataclasses
import functools
import gc
import operator
import sys
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.fx
from torch import nn
from torch.fx.proxy import Proxy, TraceError
from torch.overrides import TorchFunctionMode

from fastops import _forward_code
from fastops._nodes import LAYER, has_its_own_call, in_the_way, in_the_way_of_forward, unpack
from fastops._outside import Outside, Place
from fastops._proxies import Input
from fastops._reached_code import changed_by
from fastops._states import State, ambient, random_state, same_random_state
from fastops.registry import registered


class Traced:
    """What came out of `trace`.

    graph: what the forward does.
    entered: the modules that were traced through, by name; "" is the root.
    decided: the modules whose `training` a forward asks for, with the value that it has in the graph.
    leaves: why a module that is not one of torch.nn's was not, by name, and whether that was tried.
    places, contents: what a forward reads that may change (Outside.watched).
    may_take_none: whether a function asks if an argument is None. A trace cannot: what it gives a forward never is.
    """

    def __init__(self, tracer: "_Tracer", graph: torch.fx.Graph) -> None:
        self.graph, self.entered, self.leaves, self.decided = graph, tracer.entered, tracer.leaves, tracer.decided
        self.places: list[Place]
        self.contents: list[Any]
        self.places, self.contents = tracer.outside.watched()
        self.may_take_none = any(_forward_code.asks_for_none(*one, True, False) for one in set(tracer.ran))


def is_frozen(module: nn.Module) -> bool:
    """Whether fastops.freeze has made it: it is called as it is."""
    return getattr(type(module), "_fastops_frozen", False)


def plain_class(module: nn.Module) -> type:
    """The class that fastops.fuse found: a program is no forward to be traced."""
    return getattr(type(module), "_fastops_plain", type(module))


def _forward(module: nn.Module) -> Callable[..., Any]:
    """What a call of the module does: in the place of a forward that is registered, ours."""
    return (registered(module) or plain_class(module)).forward


def trace(root: nn.Module, inputs: list[str], named_inputs: list[str], training: bool | None = None) -> Traced:
    """Traces root.forward with these arguments, the named ones by keyword, and defaults for all others.

    training: the mode that a forward which asks for it is traced in; None: the module's own.

    Raises whatever a forward raises that cannot be traced; the modules are then what they were.
    """
    with _ONE_AT_A_TIME:
        return _trace(root, _Tracer(root, inputs, named_inputs, training))


# torch.fx changes nn.Module itself for as long as it traces.
_ONE_AT_A_TIME = threading.RLock()


def _trace(root: nn.Module, tracer: "_Tracer") -> Traced:
    states = [(module, State(module)) for module in root.modules()]
    fused = [(module, type(module)) for module, _ in states if plain_class(module) is not type(module)]
    for module, _ in fused:  # a forward may ask
        object.__setattr__(module, "__class__", plain_class(module))
    tracer.states = {id(module): state for module, state in states}
    outer = vars(nn.Module).get("training")  # of a trace during which this one is asked for
    nn.Module.training = _Training(tracer)
    collects = gc.isenabled()
    gc.disable()  # what garbage and gc.callbacks do is not the forward's doing
    try:
        with tracer.listening():
            graph = tracer.trace(root)
        for module, state in states:
            state.check(module)
        traced = Traced(tracer, graph)
    except Exception:
        for module, state in states:
            state.restore(module)
        vars(tracer).clear()
        raise
    finally:
        for module, cls in fused:
            object.__setattr__(module, "__class__", cls)
        if outer is None:
            del nn.Module.training
        else:
            nn.Module.training = outer
        if collects:
            gc.enable()
    for node in reversed(graph.nodes):
        if not node.users and (node.op == "get_attr" or node.target is getattr):
            graph.erase_node(node)
    vars(tracer).clear()  # it is in a cycle with fx's wrappers, and would keep the modules alive for a while
    return traced


class _Tracer(torch.fx.Tracer):
    proxy_buffer_attributes = True
    # What other threads find of a tracer that is done, in calls of modules that have begun before: no thread's, and no
    # functions to wrap.
    thread = 0
    _autowrap_function_ids: Any = frozenset()

    def __init__(self, root: nn.Module, inputs: list[str], named_inputs: list[str], training: bool | None) -> None:
        super().__init__()
        self.inputs, self.named_inputs, self.training = inputs, named_inputs, training
        self.thread = threading.get_ident()
        self.names = {id(module): name for name, module in root.named_modules()}
        self.decided: dict[str, bool] = {}
        self.entered: dict[str, nn.Module] = {}
        self.leaves: dict[str, tuple[str, bool]] = {}
        self.ambient = ambient(_OtherTensors)
        self.refused: Exception | None = None  # what a forward was told; it may have caught it and gone on
        self.following = False
        self.outside = Outside(root)
        self.ran: list[tuple[_forward_code.Code, frozenset[str]]] = []  # the functions, and what is no input in them
        self.may_be_none: list[torch.fx.Node] = []
        self.parameter_proxies: dict[str, Proxy] = {}
        self.states: dict[int, State] = {}  # of all modules, before the trace
        self.changed: list[frozenset[str]] = []  # the names of what a module may change that is called as one
        self.layer = ""  # the layer of another library that is being traced through

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        names = [*self.inputs, *self.named_inputs]
        if "self" in names:  # torch.fx has that for the module
            names[names.index("self")] = max(names, key=len) + "_"
        proxies = [self.create_proxy("placeholder", name, (), {}) for name in names]
        count = len(self.inputs)

        def call(root: nn.Module, *values: Any) -> Any:
            named = dict(zip(self.named_inputs, values[count:], strict=True))
            forward = _forward(root) if is_module else root_fn
            result = self._follow(root, "", lambda: forward(root, *values[:count], **named))
            if any(type(one) is torch.Size for one in _pieces(result)):  # torch.fx makes a tuple of it
                raise TraceError("its forward makes a Size")
            return result

        return call, [self.root, *proxies]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, torch.jit.ScriptModule) or is_frozen(m) or getattr(type(m), "_fastops_leaf", False):
            return True
        return super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if threading.get_ident() != self.thread:  # a call that is nothing of this trace
            return forward(*args, **kwargs)
        name = self.path_of_module(m)
        if not self.is_leaf_module(m, name):
            why, tried = in_the_way(m), False
            inside = has_its_own_call(m)  # which is being traced: a call of the module would run it again
            if inside:
                why = in_the_way_of_forward(m)
                if why:
                    raise self.refuse(TraceError(f"its forward calls a module whose class has a __call__, and {why}"))
            if not why:
                last = next(iter(reversed(self.graph.nodes)), None)
                found = self.entered, self.leaves, self.decided, self.ran, self.changed
                before = [len(one) for one in found]
                plain = _forward(m)
                plain = forward if plain is type(m).forward else functools.partial(plain, m)
                outer = self.layer
                self.layer = name if registered(m) else outer
                try:
                    return self._follow(m, name, lambda: plain(*args, **kwargs), (args, kwargs))
                except Exception as error:
                    if inside:
                        raise self.refuse(error) from None
                    self._forget(last)
                    for one, count in zip(found, before, strict=True):
                        while len(one) > count:
                            one.popitem() if isinstance(one, dict) else one.pop()
                    why, tried = reason(error), True
                finally:
                    self.layer = outer
            self.leaves[name] = why, tried
        self._check_call(m)
        return self.create_proxy("call_module", name, args, kwargs)

    def _check_call(self, module: nn.Module) -> None:
        """Before a module is called as one: it finds what there is when the graph runs, and may change it then."""
        was_following, self.following = self.following, False
        try:
            for one in module.modules():
                if id(one) in self.states:
                    self.states[id(one)].check(one)
            self.changed.append(changed_by(module))
            if self.changed[-1] and self.outside.has_changed():
                raise TraceError(_CHANGES_OTHERS)
        except TraceError as error:
            raise self.refuse(error) from None
        finally:
            self.following = was_following

    def _follow(self, module: nn.Module, name: str, call: Callable[[], Any], arguments: Any = ()) -> Any:
        """What a call of module's forward does."""
        was_following, self.following = self.following, False
        if self.outside.has_changed():  # by the forward that this one is called in
            self.refuse(TraceError(_CHANGES_OTHERS))
            self.outside.restore()
        state, numbers = State(module), random_state()
        outer, self.refused = self.refused, None
        first, first_changed = len(self.ran), len(self.changed)
        try:
            self.following = True
            result = call()
            self.following = False
            if self.refused is not None:
                raise self.refused
            state.check(module)
            if self.outside.has_changed():
                raise TraceError(_CHANGES_OTHERS)
            if not same_random_state(numbers, random_state()):
                raise TraceError("its forward makes random numbers")
            changed = frozenset().union(*self.changed[first_changed:])
            if changed and any(changed & {*code.names, *code.free} for code, _ in self.ran[first:]):
                raise TraceError("its forward reads what a module that it calls may change")
            if self.may_be_none:
                given: list[Proxy] = []
                torch.fx.node.map_aggregate(
                    arguments, lambda one: given.append(one) if issubclass(type(one), Proxy) else None
                )
                of_arguments = any(self._may_give_none(one.node) for one in given)
                own = getattr(_forward(module), "__code__", None)
                if any(
                    _forward_code.asks_for_none(*one, of_arguments or one[0].code is not own, True)
                    for one in self.ran[first:]
                ):
                    raise TraceError("its forward asks whether something is None that a module gives it")
        except Exception:
            self.following = False
            state.restore(module)
            self.outside.restore()
            raise
        finally:
            self.refused, self.following = outer, was_following
            sys.setprofile(self._heard)  # where it has raised an error, it is no longer told
        self.entered[name] = module
        return result

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Sees every function that is called: here, those that Python has are told of what is called."""
        before = sys.getprofile()
        sys.setprofile(self._heard)
        try:
            with _OtherTensors(self):
                yield
        finally:
            if before is not None and hasattr(before, "enable"):  # cProfile's
                before.enable()
            else:
                sys.setprofile(before)

    def _heard(self, frame: types.FrameType, event: str, what: Any) -> None:
        if not self.following:
            return
        if event == "call":
            why = _forward_code.objection_to_call(frame)
            if _forward_code.is_users(frame):
                why = why or _forward_code.objection_to_code(frame)
                unwatched = self.outside.read(frame)
                if unwatched:
                    raise self.refuse(TraceError(unwatched))  # it does not run: what it changes could not be taken back
                self.ran.append((_forward_code.code_of(frame.f_code), _forward_code.settled_names(frame)))
        elif event == "c_call":
            why = _forward_code.objection_to_builtin(frame, what)
        else:
            return
        if why:
            self.refuse(TraceError(why))

    def refuse(self, error: Exception) -> Exception:
        """To be raised in a forward."""
        self.refused = self.refused or error
        return error

    def to_bool(self, obj: Proxy) -> bool:
        raise self.refuse(TraceError("its forward decides by an input"))

    def iter(self, obj: Proxy) -> Any:
        raise self.refuse(TraceError("its forward goes through the elements of an input"))

    def _may_give_none(self, node: torch.fx.Node) -> bool:
        while node.target in (operator.getitem, unpack) and isinstance(node.args[0], torch.fx.Node):
            if node.args[0].op == "placeholder" and isinstance(node.args[1], (int, str)):
                return True  # it may be a tuple or a dict
            node = node.args[0]
        if node.target is getattr or node.op == "call_method":  # of an input that is no tensor
            name = node.args[1] if node.target is getattr else node.target
            owner = node.args[0]
            given = isinstance(owner, torch.fx.Node) and owner.op == "placeholder"
            return given and not hasattr(torch.Tensor, name)
        if node.op != "call_module":
            return False
        module = self.root.get_submodule(node.target)
        known = type(module).__module__.startswith(("torch.nn.", "fastops.nn."))
        return not known or isinstance(module, nn.MultiheadAttention)

    def mode_of(self, module: nn.Module) -> bool:
        """What module.training is in the graph."""
        training = vars(module)["training"]
        if threading.get_ident() != self.thread:
            return training
        if id(module) not in self.names:
            raise TraceError("its forward asks for the mode of a module that is not among its children")
        name = self.names[id(module)]
        self.decided[name] = training if self.training is None else self.training
        return self.decided[name]

    def _forget(self, last: torch.fx.Node | None) -> None:
        """Takes the nodes after this one back; None: all."""
        for node in reversed(self.graph.nodes):
            if node is last:
                break
            self.graph.erase_node(node)
        kept = set(self.graph.nodes)
        for name in [name for name, proxy in self.parameter_proxies.items() if proxy.node not in kept]:
            del self.parameter_proxies[name]
        self.may_be_none = [node for node in self.may_be_none if node in kept]

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Proxy]) -> Any:
        if threading.get_ident() != self.thread:
            return attr_val
        self.parameter_proxies = parameter_proxy_cache
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_node(self, *args: Any, **kwargs: Any) -> torch.fx.Node:
        # A mode that calls a function is not on while that runs.
        *now, modes = ambient(_OtherTensors)
        *before, modes_before = self.ambient
        if now != before or modes > modes_before:
            raise TraceError("its forward has a block such as no_grad, autocast or checkpoint")
        node = super().create_node(*args, **kwargs)
        if self.layer:
            node.meta[LAYER] = self.layer
        if self._may_give_none(node):
            self.may_be_none.append(node)
        return node

    def create_proxy(self, *args: Any, **kwargs: Any) -> Any:
        if not self.following:
            return super().create_proxy(*args, **kwargs)
        sys.setprofile(None)  # nothing that a forward calls; it takes most of the time
        try:
            return super().create_proxy(*args, **kwargs)
        finally:
            sys.setprofile(self._heard)

    def create_arg(self, a: Any) -> Any:
        cls = type(a)
        namedtuple = cls.__bases__ == (tuple,) and hasattr(cls, "_fields")  # a node makes it
        if issubclass(cls, (tuple, list, dict)) and cls not in (tuple, list, dict, torch.Size) and not namedtuple:
            raise self.refuse(TraceError(f"its forward makes a {cls.__name__}"))
        if dataclasses.is_dataclass(cls):
            raise self.refuse(TraceError(f"its forward makes a {cls.__name__}"))
        if isinstance(a, torch.Tensor) and not isinstance(a, nn.Parameter):
            known = a in self.tensor_attrs or any(a is buffer for buffer in self.root.buffers())
            if not known:
                raise TraceError("its forward makes a tensor that does not depend on its inputs")
        return super().create_arg(a)

    def proxy(self, node: torch.fx.Node) -> Proxy:
        return Input(node, self)


def _pieces(value: Any) -> Iterator[Any]:
    yield value
    if type(value) in (tuple, list, dict):
        for one in value.values() if type(value) is dict else value:
            yield from _pieces(one)


class _OtherTensors(TorchFunctionMode):
    """Sees what a forward computes without its inputs: a trace does that once."""

    def __init__(self, tracer: _Tracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        found: set[type] = set()
        torch.utils._pytree.tree_map_(lambda one: found.add(type(one)), (args, kwargs))
        result = function(*args, **kwargs)
        if any(issubclass(cls, Proxy) for cls in found):
            return result
        if any(issubclass(cls, torch.Tensor) for cls in (*found, type(result))) and self._is_asked():
            self.tracer.refuse(TraceError("its forward makes a tensor that does not depend on its inputs"))
        return result

    def _is_asked(self) -> bool:
        """Whether it is a forward that asks, itself or by one of PyTorch's functions."""
        frame = sys._getframe(2)
        while frame.f_globals.get("__name__") in _FRONTS:
            frame = frame.f_back
        return self.tracer.following and _forward_code.is_users(frame)


_CHANGES_OTHERS = "its forward changes something that is not its own"
_FRONTS = (
    "torch.overrides",
    "torch.functional",
    "torch.nn.functional",
    "torch._tensor",
    "torch",
    "torch._jit_internal",
)


class _Training:
    """nn.Module.training while a module is traced: it tells the tracer who is asked for it.

    A proxy in its place would not: it is not asked by `self.training is True`, and gives the wrong answer.
    """

    def __init__(self, tracer: _Tracer) -> None:
        self.tracer = tracer

    def __get__(self, module: nn.Module | None, cls: type) -> bool:
        if module is None or "training" not in vars(module):
            raise AttributeError(f"'{cls.__name__}' object has no attribute 'training'")
        return self.tracer.mode_of(module)

    def __set__(self, module: nn.Module, value: Any) -> None:
        vars(module)["training"] = value

    def __delete__(self, module: nn.Module) -> None:
        vars(module).pop("training")


def reason(error: Exception) -> str:
    """What a report says about a forward that could not be traced: one line."""
    text = str(error).partition("\n")[0]
    for sign, meaning in (
        ("bool()", "its forward decides by an input"),
        ("does not support item assignment", "its forward assigns to elements of a tensor"),
    ):
        if sign in text:
            return meaning
    return text if text.startswith("its ") else f"torch.fx cannot trace it: {type(error).__name__}: {text}"[:160]
