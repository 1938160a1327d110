"""fastops.freeze: a model for inference alone. What does not change between two calls is done once.

Batch norms become part of the layers before them, weights are packed for the kernels (csrc/torch/frozen.cpp), layers
take their activation and the residual that is added to them, and images stay in the layout that suits the convolutions.
"""

import copy
import functools
import inspect
import math
import operator
import types
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling as _is_compiling
from torch.fx import Graph, GraphModule, Node
from torch.nn.modules.utils import _pair

import fastops.functional as FF
import fastops.nn as fnn
from fastops import _C
from fastops._activations import ACTIVATIONS, KIND, valid
from fastops._fusion import activate, rewrite
from fastops._nodes import Nodes, in_the_way
from fastops._tracing import Signature, is_frozen, reason, trace, training_of
from fastops.functional._activation import resolve_activation
from fastops.fuse import unfuse
from fastops.replace import Row, _check, _name, _table, replace_

__all__ = ["FreezeReport", "freeze"]


@dataclass
class FreezeReport:
    """What freeze did. str() is a table: a line for all layers that fared alike.

    Attributes:
        frozen: a Row for every layer whose weights are packed: its name, its class, what it computes now.
        folded: a Row for every batch norm that became part of a layer.
        left: a Row for every other module that is called, and why it is as it was.
        untraced: a Row for every module whose forward could not be followed, and why; its children are frozen on their
            own.
    """

    frozen: list[Row] = field(default_factory=list)
    folded: list[Row] = field(default_factory=list)
    left: list[Row] = field(default_factory=list)
    untraced: list[Row] = field(default_factory=list)

    def __str__(self) -> str:
        kinds = (("->", self.frozen), ("into", self.folded), ("left:", self.left), ("untraced:", self.untraced))
        counts = [f"{len(rows)} {name}" for name, rows in vars(self).items()]
        return "\n".join([*_table(*kinds), ", ".join(counts)])


def freeze(model: nn.Module, *, channels_last: bool | None = None) -> nn.Module:
    """The model for inference: batch norms folded, weights packed once, layers joined with what follows them.

    Args:
        model: any module. It stays as it is. Its frozen form is that of model.eval(), with the weights of this moment.
            A frozen model is returned as it is.
        channels_last: the layout in which images go from convolution to convolution. None: channels_last where the
            model has convolutions in two dimensions and is in float32 or a 16-bit dtype.

    Returns:
        A module that is called as the model is. It needs no gradients and cannot be trained; it can be copied, pickled,
        moved, exported (torch.export) and compiled. `fastops_report` is a FreezeReport. Results are those of
        model.eval() but for roundings: a folded batch norm changes the weights before they are rounded. Buffers that
        the model's forward changes are the frozen model's own.

    Calling it raises RuntimeError if a parameter or buffer of `model` is not what it was, or another: freeze again. A
    write through .data that leaves out the elements that are looked at (8 of a large tensor) is not noticed. It also
    raises RuntimeError if its input requires a gradient. Hooks that the model has are called; those that it gets later
    are not.

    A frozen layer keeps packed weights for up to four kinds of call (batch sizes and the like), and the model that it
    was made from has its own: it takes memory for speed. Drop the model to free its weights.

    Raises:
        TypeError: model is not a torch.nn.Module.

    Source: Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference"
    (2017), section 3.2, for folding; torch.fx for the graph.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    >>> print(fastops.freeze(model).fastops_report)
    0  conv2d                ->    conv2d, activation='relu'
    1  torch.nn.BatchNorm2d  into  0
    1 frozen, 1 folded, 0 left, 0 untraced
    """
    _check(model, "freeze")
    if is_frozen(model):
        return model
    if channels_last is None:
        channels_last = any(isinstance(m, nn.Conv2d) and m.weight.dtype != torch.float64 for m in model.modules())
    report = FreezeReport()
    frozen = _freeze(model, "", report, channels_last)
    return _class_for(model)(frozen, model, report)


# ---- the frozen model ------------------------------------------------------------------------------------------------


class FrozenModel(nn.Module):
    """What freeze returns. `model` is a torch.fx.GraphModule, a copy of the model with frozen children, or both."""

    _fastops_frozen = True

    def __init__(self, model: nn.Module, source: nn.Module, report: FreezeReport) -> None:
        super().__init__()
        self.model = model
        self.fastops_report = report
        self._root = weakref.ref(source)
        self._watch(
            [
                (f"{prefix}.{name}" if prefix else name, weakref.ref(module), place, name)
                for prefix, module in source.named_modules()
                for place in ("_parameters", "_buffers")
                if not isinstance(module, torch.jit.ScriptModule)
                for name in vars(module)[place]
            ]
        )
        self._run: Callable[..., Any] | None = None
        self.train(False)

    def _watch(self, sources: list[tuple[str, Any, str, str]]) -> None:
        """sources: for each tensor of the model its name, and where it is: a reference to the module, dict, key."""
        self._sources = [(*source, _C.fingerprint([source[1:]])) for source in sources]
        self._places = [source[1:] for source in sources]
        self._fingerprint = _C.fingerprint(self._places)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if _is_compiling():
            return self.model(*args, **kwargs)
        state = self.__dict__
        if _C.fingerprint(state["_places"]) != state["_fingerprint"]:
            self._look_closer()
        run = state["_run"] or self._make_run()
        return run(*args, **kwargs)

    def _make_run(self) -> Callable[..., Any]:
        self._run = _quick_call(self.model)
        return self._run

    def _look_closer(self) -> None:
        """Raises if a tensor has changed. Otherwise the model is gone, or what is left of it has not changed."""
        alive = []
        for name, module, place, key, fingerprint in self._sources:
            if module() is None and self._root() is None:
                continue
            if _C.fingerprint([(module, place, key)]) != fingerprint:
                raise RuntimeError(
                    f"fastops.freeze: '{name}' of the model has changed since it was frozen; call fastops.freeze again"
                )
            alive.append((name, module, place, key))
        self._watch(alive)

    def train(self, mode: bool = True) -> "FrozenModel":
        if mode:
            raise RuntimeError("fastops.freeze: a frozen model cannot be trained; train the model it was made from")
        return super().train(False)

    def __reduce__(self) -> Any:
        return _read_frozen, (inspect.signature(type(self).forward),), self.__getstate__()

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles do not know the model that it was made from."""
        return {
            **super().__getstate__(),
            "_root": _nothing,
            "_sources": [],
            "_places": [],
            "_fingerprint": _C.fingerprint([]),
            "_run": None,
        }

    def _apply(self, *args: Any, **kwargs: Any) -> "FrozenModel":
        super()._apply(*args, **kwargs)
        self._run = None
        return self


def _class_for(model: nn.Module) -> type[FrozenModel]:
    """FrozenModel with the signature of the model's forward, which torch.export asks for."""
    try:
        signature = inspect.signature(model.forward)
    except (TypeError, ValueError):  # of something that is no function
        return FrozenModel
    parameters = [one.replace(annotation=inspect.Parameter.empty) for one in signature.parameters.values()]
    self = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    return _with_signature(inspect.Signature([self, *parameters]))


def _with_signature(signature: inspect.Signature) -> type[FrozenModel]:
    plain = FrozenModel.forward
    forward = types.FunctionType(plain.__code__, plain.__globals__, plain.__name__)
    forward.__signature__ = signature
    return type("FrozenModel", (FrozenModel,), {"forward": forward, "__module__": __name__})


def _read_frozen(signature: inspect.Signature) -> FrozenModel:
    cls = _with_signature(signature)
    return cls.__new__(cls)


def _quick_call(model: nn.Module) -> Callable[..., Any]:
    if isinstance(model, Either):
        return functools.partial(model.choose, _quick_call(model.graph), model.general)
    if isinstance(model, GraphModule):
        forward, quick = type(model).forward, _quick(model)
        return lambda *args, **kwargs: forward(quick, *args, **kwargs)
    return model.__call__ if in_the_way(model) else model.forward


def _nothing() -> None:
    """A reference to a model that is gone."""


def _quick(module: nn.Module) -> Any:
    """What a graph's forward reads as `self`: its modules and tensors without nn.Module's __getattr__ and __call__."""
    if isinstance(module, FrozenLayer | FrozenMlp | FrozenInvertedResidual):
        return module.call
    if not isinstance(module, GraphModule) and type(module) is not nn.Module:
        return module if in_the_way(module) or isinstance(module, torch.jit.ScriptModule) else module.forward
    read = {node.target for node in module.graph.nodes if node.op == "get_attr"} if hasattr(module, "graph") else set()
    space = types.SimpleNamespace()
    for name, child in module._modules.items():
        setattr(space, name, child if name in read else _quick(child))
    for tensors in (module._parameters, module._buffers):
        vars(space).update(tensors)
    return space


class FrozenGraph(GraphModule):
    """A GraphModule that is pickled as its graph: a trace of its source, as torch.fx does it, may give another one."""

    _fastops_frozen = True

    def __reduce__(self) -> Any:
        nodes = [
            (node.op, node.target, *torch.fx.node.map_arg((node.args, node.kwargs), _Reference), node.name)
            for node in self.graph.nodes
        ]
        tensors = {**self._parameters, **self._buffers}
        return _read_graph, (type(self).__name__, dict(self._modules), tensors, nodes)


class _Reference:
    """A node of a pickled graph."""

    def __init__(self, node: Node) -> None:
        self.name = node.name


def _read_graph(name: str, modules: dict[str, nn.Module], tensors: dict[str, Any], nodes: list[Any]) -> FrozenGraph:
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
    return FrozenGraph(root, graph, name)


class Either(nn.Module):
    """A model whose forward has options: a graph for their defaults, and for other calls a copy with frozen children.

    The copy is not among the modules: an exported program has no use for its tensors.
    """

    def __init__(self, graph: GraphModule, general: nn.Module) -> None:
        super().__init__()
        self.graph = graph
        vars(self)["general"] = general
        self._choose()

    def _choose(self) -> None:
        signature = Signature(type(self.general).forward)
        source = f"""\
def choose({", ".join(["fastops_graph", "fastops_general", *signature.declared])}):
    if {" and ".join(signature.tests) or "True"}:
        return fastops_graph({", ".join([*signature.inputs, *signature.named_inputs])})
    return fastops_general({", ".join(signature.passed)})
"""
        space = dict(signature.defaults)
        exec(compile(source, "<fastops.freeze>", "exec"), space)
        vars(self)["choose"] = space["choose"]

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


class Apart(nn.Module):
    """A layer and the batch norm that was folded into it, for the inputs for which that is something else.

    A norm's channels are dimension 1. They are a layer's only if its output has `dims` dimensions; of another one the
    norm takes those of another dimension, or raises an error.
    """

    def __init__(self, layer: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        linear = isinstance(layer, nn.Linear)
        self.dims = 2 if linear else layer.weight.dim()
        self.others = linear  # whether more dimensions, too, are for the norm
        self.eps, self.check = norm.eps, type(norm)._check_input_dim
        # The others' weights are not kept: of an image without a batch the norm raises an error.
        tensors = {"weight": layer.weight, "bias": layer.bias} if linear or isinstance(layer, nn.Conv1d) else {}
        tensors |= {"scale": norm.weight, "shift": norm.bias, "mean": norm.running_mean, "var": norm.running_var}
        for name, tensor in tensors.items():
            self.register_buffer(name, None if tensor is None else tensor.detach())

    def takes(self, input: Tensor) -> bool:
        return input.dim() != self.dims and (self.others or input.dim() == self.dims - 1)

    def forward(self, input: Tensor, function: Callable[..., Tensor], options: dict[str, Any]) -> Tensor:
        if "weight" in self._buffers:
            input = function(input, self.weight, self.bias, **options)
        self.check(self, input)
        return F.batch_norm(input, self.mean, self.var, self.scale, self.shift, False, 0.0, self.eps)


class FrozenLayer(nn.Module):
    """One layer: f(layer(input) + residual)."""

    def __init__(
        self,
        function: str,
        weight: Tensor,
        bias: Tensor | None,
        options: dict[str, Any],
        activation: Any,
        apart: Apart | None = None,
    ) -> None:
        super().__init__()
        self.addition: Callable[[Tensor, Any], Tensor] = operator.add  # of the layer's result and the residual
        self.register_module("apart", apart)
        self.function, self.options, self.activation = function, options, activation
        self.register_buffer("weight", weight.detach())
        self.register_buffer("bias", None if bias is None else bias.detach().contiguous())
        self._packed: Any = None

    def pack(self) -> Any:
        """The layer of csrc/torch/frozen.cpp; it packs at its first call of each kind."""
        kind, a, b = resolve_activation(self.activation)
        f = (KIND[kind], a, b)
        o = self.options
        if self.function == "linear":
            self._packed = _C.FrozenLinear(self.weight, self.bias, *f)
            return self._packed
        convolution = (self.weight, self.bias, o["stride"], o["padding"], o["dilation"], o["groups"])
        if "pool_size" in o:
            self._packed = _C.FrozenConvPool(*convolution, _each(o["pool_size"], self.weight.dim() - 2), *f)
        else:
            self._packed = _C.FrozenConv(*convolution, *f)
        return self._packed

    def call(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """forward, for tensors that are there."""
        if type(input) is Tensor and input.dtype is self.weight.dtype:
            packed = self.__dict__["_packed"] or self.pack()
            if self.function != "linear" and input.dim() != self.weight.dim():
                return self.forward(input, residual)
            apart = self.__dict__["_modules"]["apart"]
            if apart is not None and apart.takes(input):
                return self.forward(input, residual)
            y = packed(input, residual)
            if y is not NotImplemented:
                return y
        return self.forward(input, residual)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        function = getattr(FF, self.function)
        apart = self.apart is not None and self.apart.takes(input)
        if residual is None and not apart:
            return function(input, self.weight, self.bias, **self.options, activation=self.activation)
        y = (
            self.apart(input, function, self.options)
            if apart
            else function(input, self.weight, self.bias, **self.options)
        )
        return activate(y if residual is None else self.addition(y, residual), self.activation)

    def extra_repr(self) -> str:
        return f"{self.function}, {tuple(self.weight.shape)}, activation={self.activation!r}"

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_packed": None}

    def _apply(self, *args: Any, **kwargs: Any) -> "FrozenLayer":
        super()._apply(*args, **kwargs)
        self._packed = None
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._packed = None


def _add_to(y: Tensor, residual: Tensor) -> Tensor:
    residual += y
    return residual


class FrozenMlp(nn.Module):
    """A narrow chain of linear layers, which is one kernel that reads the weights as they are."""

    def __init__(self, weights: Sequence[Tensor], biases: Sequence[Tensor | None], hidden: Any, output: Any) -> None:
        super().__init__()
        self.hidden, self.output = hidden, output
        self.layers: nn.ModuleList | tuple[()] = ()  # one by one, where a batch norm has been folded into any
        for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            self.register_buffer(f"weight{i}", weight.detach().contiguous())
            self.register_buffer(f"bias{i}", None if bias is None else bias.detach().contiguous())
        self._arguments: tuple[Any, ...] = ()

    def _tensors(self) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
        count = len(self._buffers) // 2
        return tuple(tuple(self._buffers[f"{name}{i}"] for i in range(count)) for name in ("weight", "bias"))

    def call(self, input: Tensor) -> Tensor:
        """forward, for tensors that are there."""
        if "layers" in self.__dict__["_modules"] and input.dim() != 2:
            return self.forward(input)
        if type(input) is Tensor and not (input.requires_grad and torch.is_grad_enabled()):
            arguments = self.__dict__["_arguments"]
            if not arguments:
                f = [(KIND[kind], a, b) for kind, a, b in map(resolve_activation, (self.hidden, self.output))]
                arguments = self._arguments = (*self._tensors(), *f[0], *f[1])
            y = _C.mlp(input, *arguments)
            if y is not NotImplemented:
                return y
        elif type(input) is Tensor:
            raise RuntimeError(_NO_GRADIENT)
        return self.forward(input)

    def forward(self, input: Tensor) -> Tensor:
        if self.layers and input.dim() != 2:
            for layer in self.layers:
                input = layer.forward(input)
            return input
        return FF.mlp(input, *self._tensors(), self.hidden, self.output)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_arguments": ()}

    def _apply(self, *args: Any, **kwargs: Any) -> "FrozenMlp":
        super()._apply(*args, **kwargs)
        self._arguments = ()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._arguments = ()


class FrozenInvertedResidual(nn.Module):
    """A 1x1 convolution, a depthwise one and a 1x1 convolution (the first or the last may be missing) in one kernel.

    Images between them do not go through memory. Where the kernel is not faster, the layers are called one by one.
    """

    def __init__(self, expand: FrozenLayer | None, depthwise: FrozenLayer, project: FrozenLayer | None) -> None:
        super().__init__()
        self.expand, self.depthwise, self.project = expand, depthwise, project
        self._packed: Any = None

    def pack(self) -> Any:
        """The block of csrc/torch/frozen.cpp."""
        layers = []
        for layer in (self.expand, self.depthwise, self.project):
            kind, a, b = resolve_activation(layer and layer.activation)
            layers.append((layer and layer.weight, layer and layer.bias, KIND[kind], a, b))
        steps = [list(_pair(self.depthwise.options[key])) for key in ("stride", "padding", "dilation")]
        self._packed = _C.FrozenInvertedResidual(*layers, steps)
        return self._packed

    def call(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """forward, for tensors that are there."""
        if type(input) is Tensor:
            y = (self.__dict__["_packed"] or self.pack())(input, residual)
            if y is not NotImplemented:
                return y
        return self._one_by_one(input, residual, "call")

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        return self._one_by_one(input, residual, "forward")

    def _one_by_one(self, input: Tensor, residual: Tensor | None, way: str) -> Tensor:
        layers = [layer for layer in self._modules.values() if layer is not None]
        for layer in layers[:-1]:
            input = getattr(layer, way)(input)
        return getattr(layers[-1], way)(input, residual)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_packed": None}

    def _apply(self, *args: Any, **kwargs: Any) -> "FrozenInvertedResidual":
        super()._apply(*args, **kwargs)
        self._packed = None
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._packed = None


_NO_GRADIENT = (
    "fastops.freeze: a frozen model has no gradients, but its input requires one. Call it under torch.no_grad(), or "
    "use the model that it was made from"
)


# ---- freezing --------------------------------------------------------------------------------------------------------

_CONVOLUTIONS = {f"{name}{n}d": getattr(FF, f"{name}{n}d") for name in ("conv", "conv_max_pool") for n in (1, 2, 3)}
# The norms that take what a layer gives, where that is a batch.
_NORMS = {
    getattr(package, f"BatchNorm{n}d"): {getattr(nn, f"Conv{n}d"), getattr(fnn, f"Conv{n}d")}
    | ({nn.Linear, fnn.Linear} if n == 1 else set())
    for package in (nn, fnn)
    for n in (1, 2, 3)
    if hasattr(package, f"BatchNorm{n}d")
}
_ADDITIONS = {operator.add, operator.iadd, torch.add}
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def _freeze(model: nn.Module, name: str, report: FreezeReport, channels_last: bool) -> nn.Module:
    """A module for inference: a graph, or where none can be traced, a copy with frozen children."""
    if is_frozen(model):
        return model
    why = "" if isinstance(model, torch.jit.ScriptModule) else in_the_way(model)
    if not why:
        try:
            graph = _trace(model)
        except Exception as error:  # whatever a forward raises that is given proxies
            why = reason(error)
        else:
            frozen = _Freezer(model, graph, name, report, channels_last).run()
            signature = Signature(type(model).forward)
            if signature.declared == signature.inputs[:1]:
                return frozen
            return Either(frozen, _with_frozen_children(model, name, FreezeReport(), channels_last))
    if type(model) not in _CONTAINERS:
        report.untraced.append(Row(name, _name(type(model)), why))
    return _with_frozen_children(model, name, report, channels_last)


def _with_frozen_children(model: nn.Module, name: str, report: FreezeReport, channels_last: bool) -> nn.Module:
    result = _copy(model)
    own = not type(model).__module__.startswith(("torch.nn.", "fastops.nn.")) or type(model) in _CONTAINERS
    if own and not isinstance(model, torch.jit.ScriptModule):
        for child_name, child in model.named_children():
            below = f"{name}.{child_name}" if name else child_name
            result._modules[child_name] = _freeze(child, below, report, channels_last)
        for key, buffer in result._buffers.items():  # its forward may change them
            result._buffers[key] = buffer if buffer is None else buffer.clone()
    return result.train(False)


def _trace(model: nn.Module) -> Graph:
    """model.forward with the defaults of its options, in eval mode."""
    signature = Signature(type(model).forward)
    graph = trace(model, signature.inputs, signature.named_inputs, False).graph
    for node in tuple(graph.nodes):
        if node.target is training_of:
            for user in tuple(node.users):
                user.args = torch.fx.node.map_arg(user.args, lambda n, gone=node: False if n is gone else n)
                user.kwargs = torch.fx.node.map_arg(user.kwargs, lambda n, gone=node: False if n is gone else n)
            graph.erase_node(node)
    return graph


def _copy(module: nn.Module) -> nn.Module:
    """A copy that shares the memory of its tensors, needs no gradient, and moves alone."""
    memo: dict[int, Any] = {id(one): one.detach() for one in module.buffers()}
    memo |= {id(one): nn.Parameter(one.detach(), requires_grad=False) for one in module.parameters()}
    memo |= {id(one): one for one in module.modules() if isinstance(one, torch.jit.ScriptModule) or is_frozen(one)}
    result = copy.deepcopy(module, memo)
    for one in result.modules():
        unfuse(one)
    return result


class _Freezer:
    def __init__(self, model: nn.Module, graph: Graph, name: str, report: FreezeReport, channels_last: bool) -> None:
        self.source, self.graph, self.report, self.channels_last = model, graph, report, channels_last
        self.prefix = f"{name}." if name else ""
        # A flat module with what the graph names, to which new modules can be added; and what the model calls them.
        self.names: dict[str, str] = {}
        self.apart: dict[str, Apart] = {}  # by the name of the folded layer
        self.relaid: set[str] = set()  # the convolutions that give channels_last where the model's do not
        self.module = nn.Module()
        self.module.train(False)
        for node in graph.nodes:
            if node.op == "get_attr":
                node.target = self._adopt(node.target, _attribute(model, node.target))
            elif node.op == "call_module":
                node.target = self._adopt(node.target, model.get_submodule(node.target))

    def _adopt(self, target: str, value: Any) -> str:
        """Puts a module or a tensor of the model into ours, under a name without dots."""
        name = target.replace(".", "_")
        self.names[name] = self.prefix + target
        if isinstance(value, nn.Module):
            self.module._modules.setdefault(name, value)
        elif isinstance(value, Tensor):
            if name not in self.module._buffers:
                self.module.register_buffer(name, value.detach())
        else:
            setattr(self.module, name, value)
        return name

    def run(self) -> GraphModule:
        self._fold()
        rewrite(graph_module := GraphModule(self.module, self.graph), residuals=False)
        self.module, self.graph = graph_module, graph_module.graph
        for node in tuple(self.graph.nodes):
            self._freeze_call(node)
        changes = Nodes(graph_module).may_change_something
        for node in self.graph.nodes:
            if node.op == "get_attr" and any(user.args[:1] == (node,) and changes(user) for user in node.users):
                self.module._buffers[node.target] = self.module._buffers[node.target].clone()
        for node in tuple(self.graph.nodes):
            self._join_addition(node, changes)
        if self.channels_last:
            for node in tuple(self.graph.nodes):
                self._join_block(node, changes)
        for node in tuple(self.graph.nodes):
            if node.op == "get_attr" and not node.users:
                self.graph.erase_node(node)
        self._restore_layouts()
        self._take_children()
        self.graph.lint()
        result = FrozenGraph(self.module, self.graph, type(self.source).__name__)
        result.train(False)
        return result

    # ---- batch norms

    def _fold(self) -> None:
        """Makes batch norms part of the layer before them."""
        modules = dict(self.module.named_modules())
        for node in tuple(self.graph.nodes):
            norm = modules.get(node.target) if node.op == "call_module" else None
            if type(norm) not in _NORMS or norm.running_mean is None or len(node.args) != 1 or in_the_way(norm):
                continue
            before = node.args[0]
            layer = modules.get(before.target) if isinstance(before, Node) and before.op == "call_module" else None
            if (
                type(layer) not in _NORMS[type(norm)]
                or len(layer.weight) != len(norm.running_mean)
                or len(before.users) != 1
                or in_the_way(layer)
                or getattr(layer, "activation", None)
            ):
                continue
            target = f"{before.target}_{node.name}"
            self.module.add_module(target, _folded(layer, norm))
            self.apart[target] = Apart(layer, norm)
            self.names[target] = self.names[before.target]
            self.report.folded.append(Row(self.names[node.target], _name(type(norm)), self.names[before.target]))
            before.target = target
            node.replace_all_uses_with(before)
            self.graph.erase_node(node)

    # ---- layers

    def _freeze_call(self, node: Node) -> None:
        """A call of linear or of a convolution becomes a layer with packed weights."""
        if node.op != "call_function":
            return
        if node.target is FF.mlp:
            self._freeze_mlp(node)
            return
        names = {FF.linear: "linear", **{function: name for name, function in _CONVOLUTIONS.items()}}
        if node.target not in names:
            return
        arguments = inspect.signature(node.target).bind(*node.args, **node.kwargs)
        arguments.apply_defaults()
        arguments = dict(arguments.arguments)
        if "pool_size" in arguments and not _pools_in_the_kernel(arguments, int(names[node.target][-2])):
            return
        input, weight, bias = (arguments.pop(key) for key in ("input", "weight", "bias"))
        activation = arguments.pop("activation")
        tensors = [one for one in (weight, bias) if one is not None]
        if not all(isinstance(one, Node) and one.op == "get_attr" for one in tensors):
            return
        self._layer(node, names[node.target], input, weight, bias, arguments, activation)

    def _layer(
        self, node: Node, function: str, input: Node, weight: Node, bias: Node | None, options: dict[str, Any], f: Any
    ) -> Node:
        w = _attribute(self.module, weight.target)
        relaid = function == "conv2d" and self.channels_last and w.is_contiguous()
        if function == "conv2d" and self.channels_last:
            w = w.contiguous(memory_format=torch.channels_last)
        b = None if bias is None else _attribute(self.module, bias.target)
        layer = FrozenLayer(function, w, b, options, f, self._apart_of(weight))
        told = self._name_of(weight)
        name = told.removeprefix(self.prefix).replace(".", "_")
        while hasattr(self.module, name):
            name += "_frozen"
        self.module.add_module(name, layer)
        if relaid:
            self.relaid.add(name)
        with self.graph.inserting_before(node):
            new = self.graph.call_module(name, (input,))
        node.replace_all_uses_with(new)
        self.graph.erase_node(node)
        result = function + (f", activation={f!r}" if f is not None else "")
        self.report.frozen.append(Row(told, function, result))
        return new

    def _apart_of(self, weight: Node) -> Apart | None:
        return self.apart.get(weight.target.rpartition(".")[0])

    def _name_of(self, weight: Node) -> str:
        """What the model calls the layer with this weight."""
        module, _, key = weight.target.rpartition(".")
        return self.names[module] if module else self.names[key].removesuffix("weight").rstrip("._") or "(root)"

    def _freeze_mlp(self, node: Node) -> None:
        """A wide chain of linear layers: one by one, with packed weights. A narrow one stays one kernel."""
        arguments = inspect.signature(FF.mlp).bind(*node.args, **node.kwargs)
        arguments.apply_defaults()
        input, weights, biases, hidden, output = arguments.arguments.values()
        shapes = [_attribute(self.module, weight.target).shape for weight in weights]
        biases = biases or (None,) * len(weights)
        told = [self._name_of(weight) for weight in weights]
        name = told[0].removeprefix(self.prefix).replace(".", "_")
        dtype = _attribute(self.module, weights[0].target).dtype
        if max(max(shape) for shape in shapes) <= _NARROW and dtype in (torch.float32, torch.float64):
            tensors = [[one and _attribute(self.module, one.target) for one in ones] for ones in (weights, biases)]
            mlp = FrozenMlp(*tensors, hidden, output)
            if any(self._apart_of(weight) for weight in weights):
                fs = [hidden] * (len(weights) - 1) + [output]
                del mlp.layers
                mlp.layers = nn.ModuleList(
                    FrozenLayer("linear", w, b, {}, f, self._apart_of(weight))
                    for w, b, f, weight in zip(*tensors, fs, weights, strict=True)
                )
            self.module.add_module(f"{name}_mlp", mlp)
            with self.graph.inserting_before(node):
                new = self.graph.call_module(f"{name}_mlp", (input,))
            node.replace_all_uses_with(new)
            self.graph.erase_node(node)
            self.report.frozen.append(Row(", ".join(told), "linear", f"mlp({len(weights)} layers)"))
            return
        before = node
        for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            last = i == len(weights) - 1
            with self.graph.inserting_before(before):
                place = self.graph.call_function(FF.linear, (input,))
            if last:
                node.replace_all_uses_with(place)
                self.graph.erase_node(node)
            input = self._layer(place, "linear", input, weight, bias, {}, output if last else hidden)

    # ---- residuals

    def _frozen(self, node: Any) -> FrozenLayer | None:
        """The layer that a node calls, if nothing but a sum follows it yet."""
        if not isinstance(node, Node) or node.op != "call_module" or len(node.args) != 1 or len(node.users) != 1:
            return None
        layer = self.module._modules.get(node.target)
        alone = isinstance(layer, FrozenLayer) and layer.activation is None and "pool_size" not in layer.options
        return layer if alone and sum(other.target == node.target for other in self.graph.nodes) == 1 else None

    def _join_addition(self, node: Node, changes: Callable[[Node], bool]) -> None:
        """layer(x) + y, and an activation of that, become one call of the layer."""
        if node.op != "call_function" or node.target not in _ADDITIONS or node.kwargs or len(node.args) != 2:
            return
        order = {one: i for i, one in enumerate(self.graph.nodes)}
        found = [(order[one], one, other) for one, other in (node.args, node.args[::-1]) if self._frozen(one)]
        if not found or not all(isinstance(operand, Node) for operand in node.args):
            return
        _, call, other = max(found, key=lambda entry: entry[0])  # the later one, when the other is there
        addition = operator.add
        if node.target is operator.iadd:
            addition = operator.iadd if call is node.args[0] else _add_to
        if other is call or (addition is _add_to and not self._frozen(other)):  # others may see that it changes
            return
        if any(order[call] < order[one] < order[node] and changes(one) for one in self.graph.nodes):
            return
        layer = self._frozen(call)
        layer.addition = addition
        nodes = [node]
        user = next(iter(node.users)) if len(node.users) == 1 else None
        f = _activation_of(user)
        if f is not None and not any(order[node] < order[one] < order[user] and changes(one) for one in order):
            layer.activation = f
            nodes.append(user)
        with self.graph.inserting_before(node):
            new = self.graph.call_module(call.target, (call.args[0], other))
        nodes[-1].replace_all_uses_with(new)
        for one in (*reversed(nodes), call):
            self.graph.erase_node(one)

    # ---- inverted residuals

    def _join_block(self, node: Node, changes: Callable[[Node], bool]) -> None:
        """A depthwise convolution and the 1x1 convolutions around it become one call."""
        depthwise = self._only_call(node)
        if depthwise is None or not _is_depthwise(depthwise) or len(node.args) != 1:
            return
        before, after = node.args[0], next(iter(node.users)) if len(node.users) == 1 else None
        expand = self._only_call(before)
        if expand is None or len(before.args) != 1 or len(before.users) != 1 or not _is_pointwise(expand):
            expand = None
        project = self._only_call(after)
        if project is None or after.args[0] is not node or node in after.args[1:] or not _is_pointwise(project):
            project = None
        if expand is None and project is None:
            return
        first, last = before if expand else node, after if project else node
        order = {one: i for i, one in enumerate(self.graph.nodes)}
        if any(order[first] < order[one] < order[last] and changes(one) for one in self.graph.nodes):
            return
        name = f"{first.target}_block"
        self.module.add_module(name, FrozenInvertedResidual(expand, depthwise, project))
        if last.target in self.relaid:
            self.relaid.add(name)
        with self.graph.inserting_before(last):
            new = self.graph.call_module(name, (first.args[0], *(last.args[1:] if project else ())))
        last.replace_all_uses_with(new)
        for one in dict.fromkeys((last, node, first)):
            self.graph.erase_node(one)
            delattr(self.module, one.target)

    def _only_call(self, node: Any) -> FrozenLayer | None:
        """The convolution that a node calls, if no other node calls it."""
        if not isinstance(node, Node) or node.op != "call_module":
            return None
        layer = self.module._modules.get(node.target)
        once = sum(other.target == node.target for other in self.graph.nodes) == 1
        return layer if once and isinstance(layer, FrozenLayer) and layer.function == "conv2d" else None

    # ---- layouts

    def _restore_layouts(self) -> None:
        """What is channels_last here and is not in the model gets the model's layout where somebody can see it."""
        placeholders = tuple(node for node in self.graph.nodes if node.op == "placeholder")
        other: set[Node] = set()  # what may be in another layout
        seen: set[Node] = set()
        for node in tuple(self.graph.nodes):
            seen.add(node)
            module = self.module._modules.get(node.target) if node.op == "call_module" else None
            if isinstance(module, FrozenLayer | FrozenMlp | FrozenInvertedResidual):
                if node.target in self.relaid:
                    other.add(node)
                continue
            inputs = [one for one in node.all_input_nodes if one in other]
            if not _sees_layout(node, module):
                if inputs and not _is_size(node):
                    other.add(node)
                continue
            for one in inputs:
                later = [user for user in one.users if user is node or user not in seen]
                with self.graph.inserting_before(node):
                    restored = self.graph.call_function(_in_the_layout_of, (one, *placeholders))
                for user in later:
                    user.replace_input_with(one, restored)

    def _take_children(self) -> None:
        """Modules that are called as they are: copies in eval mode, themselves frozen where they can be."""
        for node in self.graph.nodes:
            module = self.module._modules.get(node.target) if node.op in ("call_module", "get_attr") else None
            if module is None or isinstance(module, FrozenLayer | FrozenMlp | FrozenInvertedResidual | _Child):
                continue
            if is_frozen(module):
                continue
            if node.op == "get_attr":  # a batch norm that is called by its function
                self.module._modules[node.target] = _copy(module).train(False)
                continue
            name = self.names[node.target]
            if type(module).__module__.startswith(("torch.nn.", "fastops.nn.")):
                why = in_the_way(module) or "it has no weights to pack"
                self.report.left.append(Row(name, _name(type(module)), why))
                self.module._modules[node.target] = copied = _copy(module).train(False)
                replace_(copied)
            else:
                frozen = _freeze(module, name, self.report, self.channels_last)
                self.module._modules[node.target] = _Child(frozen)


def _sees_layout(node: Node, module: nn.Module | None) -> bool:
    """Whether strides matter to what a node calls, or may."""
    if node.op == "call_module":
        return not type(module).__module__.startswith(("torch.nn.", "fastops.nn."))
    if node.op == "call_method":
        return node.target in _LAYOUT_METHODS
    if node.op == "call_function":
        if node.target is getattr:
            return node.args[1] not in _SIZES
        package = getattr(node.target, "__module__", "") or "torch"
        return node.target in _LAYOUT_FUNCTIONS or not package.startswith(("torch", "_operator", "fastops"))
    return node.op == "output"


_LAYOUT_FUNCTIONS = {torch.as_strided, torch.view_copy, torch.as_strided_copy}
_LAYOUT_METHODS = {
    "view", "view_as", "as_strided", "as_strided_", "stride", "is_contiguous", "data_ptr", "numpy", "storage",
    "untyped_storage", "resize_", "set_", "dim_order", "__dlpack__",
}  # fmt: skip
_SIZES = {"shape", "dtype", "device", "ndim"}


def _is_size(node: Node) -> bool:
    """What a node gives is no tensor."""
    if node.op == "call_method":
        return node.target in ("size", "dim", "numel")
    return node.op == "call_function" and node.target is getattr


def _in_the_layout_of(value: Any, *inputs: Any) -> Any:
    """value as it is in the model: contiguous, but if an input of the model is channels_last."""
    if isinstance(value, (tuple, list)):
        return type(value)(_in_the_layout_of(one, *inputs) for one in value)
    if not isinstance(value, Tensor) or value.is_contiguous():
        return value
    for one in inputs:  # vmap knows no is_contiguous(memory_format=torch.channels_last)
        if isinstance(one, Tensor) and one.dim() == 4 and one.stride(1) == 1 and not one.is_contiguous():
            return value
    return value.contiguous()


class _Child(nn.Module):
    """A module of the user's that is called as one, frozen on its own."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)


_NARROW = 128  # kMostMlpWidthCpu in csrc/kernels/mlp/mlp.h


def _each(size: Any, dims: int) -> list[int]:
    """A size for each dimension."""
    return [size] * dims if isinstance(size, int) else list(size)


def _pools_in_the_kernel(arguments: dict[str, Any], dims: int) -> bool:
    """Whether a single kernel computes convolution, activation and max pool (conv_pool.h)."""
    sizes = _each(arguments["pool_size"], dims)
    numbers = len(sizes) == dims and all(isinstance(size, int) and size > 0 for size in sizes)
    kinds = (resolve_activation(None)[0], resolve_activation("relu")[0])
    return numbers and math.prod(sizes) <= 255 and resolve_activation(arguments["activation"])[0] in kinds


def _is_depthwise(layer: FrozenLayer) -> bool:
    steps = (_pair(layer.options[key]) for key in ("stride", "padding", "dilation"))
    numbers = all(isinstance(one, int) for pair in steps for one in pair)
    return numbers and layer.options["groups"] == layer.weight.shape[0] > 1 and layer.weight.shape[1] == 1


def _is_pointwise(layer: FrozenLayer) -> bool:
    one = layer.weight.shape[2:] == (1, 1) and layer.options["groups"] == 1
    return one and _pair(layer.options["stride"]) == (1, 1) and _pair(layer.options["padding"]) == (0, 0)


def _attribute(module: nn.Module, target: str) -> Any:
    for name in target.split("."):
        module = getattr(module, name)
    return module


def _folded(layer: nn.Module, norm: nn.Module) -> nn.Module:
    """The layer followed by the batch norm, as one layer. Computed in float64 and rounded once."""
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.detach().double()
    shift = 0.0 if layer.bias is None else layer.bias.detach().double()
    bias = (shift - norm.running_mean.double()) * scale
    if norm.bias is not None:
        bias = bias + norm.bias.detach().double()
    weight = layer.weight.detach()
    result = copy.copy(layer)
    for name in ("weight", "bias"):  # tensors that are plain attributes would be found first
        vars(result).pop(name, None)
    vars(result)["_parameters"] = {
        "weight": nn.Parameter((weight.double() * scale.view(-1, *[1] * (weight.dim() - 1))).to(weight.dtype), False),
        "bias": nn.Parameter(bias.to(weight.dtype), False),
    }
    return result


_ACTIVATION_CALLS = {
    getattr(FF, kind.function): kind for kind in reversed(ACTIVATIONS.values()) if hasattr(FF, kind.function)
}


def _activation_of(node: Node | None) -> Any:
    """activation= for a node that rewrite has made of an activation; None for another node."""
    if node is None or node.op != "call_function" or node.target not in _ACTIVATION_CALLS:
        return None
    names = ("relu", "relu6", "silu", "hardswish", "sigmoid", "tanh", "mish")
    name = node.target.__name__
    plain = node.kwargs.keys() <= {"inplace"} and all(type(one) is bool for one in node.args[1:])
    return name if plain and name in names and valid(*resolve_activation(name)) else None
