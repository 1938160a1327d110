"""The graph of a frozen model: how it is called, pickled and chosen."""

import copy
import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.compiler import is_dynamo_compiling as _is_compiling
from torch.fx import Graph, GraphModule, Node

import fastops.functional as FF
from fastops import _C
from fastops._activations import ACTIVATIONS, valid
from fastops._frozen_layers import LAYERS
from fastops._frozen_watch import Watch
from fastops._nodes import in_the_way
from fastops._signature import Signature
from fastops.functional._activation import resolve_activation


class _StandsIn(nn.Module):
    """What a frozen child of a module that is not traced has besides: all that the module may want of it but a call.

    `plain`, not among the modules, is a copy of what it stands for: forward may read weights, call other methods, or go
    through a Sequential itself.
    """

    def stand_in_for(self, plain: nn.Module) -> None:
        vars(self)["plain"] = plain

    def __getattr__(self, name: str) -> Any:
        plain = vars(self).get("plain")
        if plain is None or name in self._modules or name in self._buffers:
            return super().__getattr__(name)
        return getattr(plain, name)

    def __iter__(self) -> Any:
        return iter(self.plain)

    def __len__(self) -> int:
        return len(self.plain)

    def __bool__(self) -> bool:
        return True

    def __getitem__(self, key: Any) -> Any:
        return self.plain[key]

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        if "plain" in vars(self):
            self.plain._apply(*args, **kwargs)
        return super()._apply(*args, **kwargs)


class FrozenGraph(_StandsIn, GraphModule):
    """A GraphModule that is pickled as its graph: a trace of its source, as torch.fx does it, may give another one."""

    _fastops_frozen = True

    def __reduce__(self) -> Any:
        nodes = [
            (node.op, node.target, *torch.fx.node.map_arg((node.args, node.kwargs), _Reference), node.name)
            for node in self.graph.nodes
        ]
        tensors = {**self._parameters, **self._buffers}
        plain = vars(self).get("plain")
        return _read_graph, (type(self).__name__, dict(self._modules), tensors, nodes, plain)

    def __deepcopy__(self, memo: dict[int, Any]) -> "FrozenGraph":
        result = super().__deepcopy__(memo)
        if "plain" in vars(self):
            result.stand_in_for(copy.deepcopy(self.plain, memo))
        return result


class _Reference:
    """A node of a pickled graph."""

    def __init__(self, node: Node) -> None:
        self.name = node.name


def _read_graph(
    name: str, modules: dict[str, nn.Module], tensors: dict[str, Any], nodes: list[Any], plain: nn.Module | None
) -> FrozenGraph:
    root, graph, made = nn.Module(), Graph(), {}
    root._modules.update(modules)
    for key, tensor in tensors.items():
        root.register_buffer(key, tensor)
    for op, target, args, kwargs, name_of_node in nodes:
        args, kwargs = torch.fx.node.map_aggregate(
            (args, kwargs), lambda one: made[one.name] if isinstance(one, _Reference) else one
        )
        made[name_of_node] = graph.create_node(op, target, args, kwargs, name_of_node)
    root.train(False)
    result = FrozenGraph(root, graph, name)
    if plain is not None:
        result.stand_in_for(plain)
    return result


class Either(_StandsIn):
    """A model whose forward has options: a graph for their defaults, and for other calls a copy with frozen children.

    The copy is not among the modules: an exported program has no use for its tensors.
    """

    def __init__(self, graph: GraphModule, general: nn.Module) -> None:
        super().__init__()
        self.graph = graph
        vars(self)["general"] = general
        self._choose()

    def _choose(self) -> None:
        vars(self)["choose"] = _chooser(type(self.general).forward)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.choose(self.graph, self.general, *args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "choose"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._choose()

    def _apply(self, *args: Any, **kwargs: Any) -> "Either":
        self.general._apply(*args, **kwargs)
        return super()._apply(*args, **kwargs)


def _chooser(forward: Callable[..., Any]) -> Callable[..., Any]:
    """choose(graph, general, *arguments of forward): calls the graph where all options are the defaults."""
    signature = Signature(forward)
    graph, general = signature.free_names("graph", "general")
    source = f"""\
def choose({", ".join([graph, general, *signature.declared])}):
    if {" and ".join(signature.tests) or "True"}:
        return {graph}({", ".join([*signature.inputs, *signature.named_inputs])})
    return {general}({", ".join(signature.passed)})
"""
    space = dict(signature.defaults)
    exec(compile(source, "<fastops.freeze>", "exec"), space)
    return space["choose"]


class InPlace(nn.Module):
    """What a module's class has besides where a call of it is one of a frozen graph, and all else is what it was.

    For a parent that asks what its children are, or goes through their parameters. Such a parent may also change them:
    then the graph's packed weights are old, and the module computes what its own forward does.
    """

    _fastops_own: type  # the class that it was

    def __init_subclass__(cls, **options: Any) -> None:
        """These classes are not for those who count or change the classes derived from theirs."""

    def use(self, graph: FrozenGraph) -> None:
        """Has calls run this graph, which was made from the module as it is now."""
        own, state = self._fastops_own.forward, vars(self)
        state["_fastops_graph"], state["_fastops_watch"] = graph, Watch(self)
        state["_fastops_run"] = functools.partial(_chooser(own), quick_call(graph), functools.partial(own, self))

    def _is_as_frozen(self) -> bool:
        watch = vars(self)["_fastops_watch"]
        return _C.fingerprint(watch.where) == watch.fingerprint

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if _is_compiling() or not self._is_as_frozen():
            return self._fastops_own.forward(self, *args, **kwargs)
        return self.__dict__["_fastops_run"](*args, **kwargs)

    def _apply(self, *args: Any, **kwargs: Any) -> "InPlace":
        as_frozen = self._is_as_frozen()
        super()._apply(*args, **kwargs)
        graph = vars(self)["_fastops_graph"]._apply(*args, **kwargs)
        if as_frozen:
            self.use(graph)
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        function, (_, *arguments), state, *rest = super().__reduce_ex__(protocol)
        kept = {key: value for key, value in state.items() if key not in ("_fastops_watch", "_fastops_run")}
        if not self._is_as_frozen():
            kept["_fastops_graph"] = None
        return _new_in_place, (function, self._fastops_own, *arguments), kept, *rest

    def __setstate__(self, state: dict[str, Any]) -> None:
        graph = state.pop("_fastops_graph")
        super().__setstate__(state)
        if graph is None:
            object.__setattr__(self, "__class__", self._fastops_own)
        else:
            self.use(graph)


def _new_in_place(function: Callable[..., Any], own: type, *arguments: Any) -> nn.Module:
    return function(_in_place_class(own), *arguments)


def _in_place_class(own: type) -> type:
    for known in own.__subclasses__():
        if vars(known).get("_fastops_own") is own:
            return known
    return type(f"Frozen{own.__name__}", (InPlace, own), {"_fastops_own": own, "__module__": own.__module__})


def freeze_in_place(module: nn.Module, graph: FrozenGraph) -> None:
    """Has a module call this graph, which was made from it."""
    object.__setattr__(module, "__class__", _in_place_class(type(module)))
    module.use(graph)


class Child(nn.Module):
    """A module of the user's that is called as one, frozen on its own."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)


def quick_call(model: nn.Module) -> Callable[..., Any]:
    if isinstance(model, Either):
        return functools.partial(model.choose, quick_call(model.graph), model.general)
    if isinstance(model, FrozenGraph):
        forward, quick = type(model).forward, _quick(model)
        return lambda *args, **kwargs: forward(quick, *args, **kwargs)
    return model.__call__ if in_the_way(model) else model.forward


def _quick(module: nn.Module) -> Any:
    """What a graph's forward reads as `self`: its modules and tensors without nn.Module's __getattr__ and __call__."""
    if isinstance(module, LAYERS):
        return module.call_and_add if module.adds else module.call
    if not isinstance(module, FrozenGraph) and type(module) is not nn.Module:
        return module if in_the_way(module) or isinstance(module, torch.jit.ScriptModule) else module.forward
    read = {node.target for node in module.graph.nodes if node.op == "get_attr"} if hasattr(module, "graph") else set()
    space = types.SimpleNamespace()
    for name, child in module._modules.items():
        setattr(space, name, child if name in read else _quick(child))
    for tensors in (module._parameters, module._buffers):
        vars(space).update(tensors)
    return space


_ACTIVATION_CALLS = {
    getattr(FF, kind.function): kind for kind in reversed(ACTIVATIONS.values()) if hasattr(FF, kind.function)
}


def activation_of(node: Node | None) -> Any:
    """activation= for a node that rewrite has made of an activation; None for another node."""
    if node is None or node.op != "call_function" or node.target not in _ACTIVATION_CALLS:
        return None
    names = ("relu", "relu6", "silu", "hardswish", "sigmoid", "tanh", "mish")
    name = node.target.__name__
    plain = node.kwargs.keys() <= {"inplace"} and all(type(one) is bool for one in node.args[1:])
    return name if plain and name in names and valid(*resolve_activation(name)) else None
