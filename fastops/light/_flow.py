"""How channels flow through a graph: each operation's rule for labels (_channels.py).

The graph is run on what is left of each activation when its own channels are removed: where a layer makes them, 0. So
shapes are the model's, and what a function that is not 0 at 0 makes of a removed channel is seen by the layer that
takes it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, Interpreter, Node
from torch.utils._pytree import tree_leaves, tree_map

from fastops._nodes import in_the_way, unpack
from fastops.functional._activation import resolve_activation, torch_activate
from fastops.light._channels import Channels, compact, varies, varying
from fastops.light._flow_rules import LAYERS, MODULES, RULES
from fastops.light._layers import CONVOLUTIONS, TRANSPOSED, kind_of, why_not

_FILES = ("activation", "dropout", "flatten", "linear", "padding", "pixelshuffle", "pooling", "upsampling")
_TORCH = {f"torch.nn.modules.{name}" for name in _FILES}
_FUNCTIONS = {"linear": nn.Linear}
_FUNCTIONS |= {one.__name__.replace("Transpose", "_transpose").lower(): one for one in (*CONVOLUTIONS, *TRANSPOSED)}
# Parameters that a forward reads itself have a label for each element, up to as many.
_MOST_LABELS = 1 << 20


@dataclass
class Layer:
    """What is cut of a module: a label for each of its input and of its output channels.

    constants: what an input channel is worth once it is removed, where that is not 0: the bias takes it up.
    """

    module: nn.Module
    inputs: Tensor | None = None
    outputs: Tensor | None = None
    constants: Tensor | None = None


@dataclass
class Flows:
    """What was found of a whole model.

    layers: by name, those with weights that can be cut. parameters: labels of what forwards read themselves, by the
    module that has it and its name there. apart: calls of modules that no graph goes through, with their arguments.
    in_one_call: whether a graph is that of one call (_called.py).
    """

    channels: Channels
    names: dict[int, str]  # of modules, by id
    owners: dict[int, set[str]]  # the modules that hold a parameter, by id
    through_layer_norms: bool
    layers: dict[str, Layer]
    parameters: dict[tuple[str, str], tuple[nn.Module, Tensor]]
    apart: list[tuple[nn.Module, tuple[Any, ...], dict[str, Any]]]
    in_one_call: bool = False


class Flow(Interpreter):
    """Runs one graph, and notes in `flows` what hangs together."""

    def __init__(self, root: nn.Module, graph: Graph, flows: Flows, ends: str) -> None:
        super().__init__(root, garbage_collect_values=False, graph=graph)
        self.root, self.flows, self.channels = root, flows, flows.channels
        self.ends = ends  # whose input and output its first and last nodes are
        self.labels: dict[Node, Any] = {}

    def run_node(self, node: Node) -> Any:
        value = super().run_node(node)
        if node.op == "placeholder":
            self.labels[node] = self.fixed(value, f"{self.ends} input")
        elif node.op == "output":
            self.keep(node, f"{self.ends} output")
        elif node.op == "get_attr":
            value, self.labels[node] = self._attribute(node, value)
        else:
            value, self.labels[node] = self._call(node, value)
        return value

    # ---- what rules ask ----------------------------------------------------------------------------------------------

    def value(self, argument: Any) -> Any:
        return torch.fx.map_arg(argument, lambda node: self.env[node])

    def label(self, argument: Any) -> Any:
        """Nodes' labels, in the place of nodes; what is no tensor stays a value."""
        return torch.fx.map_arg(argument, lambda n: self.labels[n] if _has_tensors(self.env[n]) else self.env[n])

    def argument(self, node: Node, position: int, name: str, default: Any = None) -> Any:
        return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)

    def fixed(self, value: Any, why: str) -> Any:
        return tree_map(lambda one: self.channels.fixed(one.shape, why) if isinstance(one, Tensor) else None, value)

    def keep(self, node: Node, why: str) -> None:
        """All channels of what a node takes stay, also those whose number it computes with."""
        for one in node.all_input_nodes:
            for labels in tree_leaves(self.labels[one]):
                if isinstance(labels, Tensor):
                    self.channels.keep(labels, why)

    def unknown(self, node: Node, value: Any, why: str = "") -> Any:
        """What a node gives when nothing is known of it."""
        why = why or f"{self.called(node)} does not treat channels one by one, as far as is known"
        self.keep(node, why)
        return self.fixed(value, why)

    def called(self, node: Node) -> str:
        if node.op == "call_module":
            return self.flows.names[id(self.root.get_submodule(node.target))]
        return node.target if node.op == "call_method" else getattr(node.target, "__name__", str(node.target))

    # ---- nodes -------------------------------------------------------------------------------------------------------

    def _attribute(self, node: Node, value: Any) -> tuple[Any, Any]:
        path, _, key = node.target.rpartition(".")
        owner = self.root.get_submodule(path)
        held = key in owner._parameters or key in owner._buffers
        if not held or not isinstance(value, Tensor) or not value.is_floating_point() or value.numel() > _MOST_LABELS:
            return value, self.fixed(value, f"the forward reads {key}")
        shared = len(self.flows.owners.get(id(value), ())) > 1
        if value.numel() == 1 or shared or type(value) not in (Tensor, nn.Parameter):
            return value.detach().clone(), self.fixed(value, f"the forward reads {key}")
        name = self.flows.names[id(owner)]
        known = self.flows.parameters.get((name, key))
        labels = known[1] if known else compact(self.channels.fresh(value.numel()).view(value.shape))
        self.flows.parameters[name, key] = owner, labels
        return torch.zeros_like(value), labels

    def _call(self, node: Node, value: Any) -> tuple[Any, Any]:
        if node.op == "call_module":
            return self._module(node, self.root.get_submodule(node.target), value)
        name = self.called(node)
        if node.op == "call_function" and not _is_known(node.target):
            return value, self.unknown(node, value)
        if value is None:  # it has changed what it was given
            return value, self.unknown(node, value)
        if not _has_tensors(value):
            return value, self._number(node, name)
        module = self._own_weight(node, name)
        if module is not None:
            return self._layer(node, module, value)
        rule = RULES.get(name) or RULES.get(name.strip("_"))
        return value, self._by(rule, node, value)

    def _by(self, rule: Callable[["Flow", Node, Any], Any] | None, node: Node, value: Any) -> Any:
        labels = None if rule is None else rule(self, node, value)
        if labels is None:
            return self.unknown(node, value)
        return tree_map(lambda one: compact(one) if isinstance(one, Tensor) else one, labels)

    def _number(self, node: Node, name: str) -> Any:
        """What is no tensor: the labels whose number it is computed from."""
        of = node.args[0] if node.args and isinstance(node.args[0], Node) else None
        if of is not None and isinstance(self.env[of], Tensor):
            labels = self.labels[of]
            d = self.argument(node, 1, "dim")
            if name in ("size", "getattr") and (name == "getattr" or d is None):
                sizes = tuple(_ends(labels, i) for i in range(labels.dim()))
                return sizes if d in ("shape", None) else None
            if name == "size" and isinstance(d, int):
                return _ends(labels, d)
            return labels.reshape(-1) if name in ("numel", "nelement", "__len__", "len") and varying(labels) else None
        if name in ("getitem", "unpack"):
            try:
                return node.target(self.labels[of], *node.args[1:])
            except (TypeError, IndexError, KeyError):
                pass
        found = [
            one.reshape(-1)
            for argument in node.all_input_nodes
            for one in tree_leaves(self.labels[argument])
            if isinstance(one, Tensor) and not isinstance(self.env[argument], Tensor)
        ]
        return torch.cat(found) if found else None

    # ---- modules -----------------------------------------------------------------------------------------------------

    def _module(self, node: Node, module: nn.Module, value: Any) -> tuple[Any, Any]:
        kind, name = kind_of(module), self.flows.names[id(module)]
        input = node.args[0] if len(node.args) == 1 and not node.kwargs else None
        plain = isinstance(input, Node) and isinstance(self.env[input], Tensor)
        if plain and _base(kind) in LAYERS:
            return self._layer(node, module, value)
        by_name = MODULES.get(_base(kind).__name__) if plain and _base(kind).__module__ in _TORCH else None
        why = in_the_way(module)
        if why:
            return value, self.unknown(node, value, f"{name}: {why}")
        if by_name is None and next(module.children(), None) is not None:
            self.flows.apart.append((module, self.value(node.args), self.value(node.kwargs)))
        return value, self._by(by_name, node, value)

    def _own_weight(self, node: Node, name: str) -> nn.Module | None:
        """The layer whose forward calls linear or a convolution, of a class derived from torch.nn's."""
        weight = self.argument(node, 1, "weight")
        if name not in _FUNCTIONS or not isinstance(weight, Node) or weight.op != "get_attr":
            return None
        if len(weight.users) > 1 or not node.args or not isinstance(node.args[0], Node):
            return None
        path, _, key = weight.target.rpartition(".")
        module = self.root.get_submodule(path)
        if key != "weight" or not isinstance(module, _FUNCTIONS[name]) or "weight" not in module._parameters:
            return None
        for key in module._parameters:  # they are the layer's, and cut with it
            self.flows.parameters.pop((self.flows.names[id(module)], key), None)
        return module

    def _layer(self, node: Node, module: nn.Module, value: Any) -> tuple[Any, Any]:
        why = why_not(module, self.flows.names[id(module)], self.flows.owners)
        if why:
            return value, self.unknown(node, value, f"{self.flows.names[id(module)]}: {why}")
        rule = next(LAYERS[_base(cls)] for cls in kind_of(module).__mro__ if _base(cls) in LAYERS)
        labels = rule(self, node, module, self.labels[node.args[0]], value)
        if labels is None:
            return value, self.unknown(node, value)
        if module._parameters.get("weight") is not None:
            value = torch.zeros_like(value)
        if kind_of(module) is not type(module):  # it has an activation
            value = torch_activate(value, *resolve_activation(module.activation))
        return value, compact(labels)

    def layer(self, module: nn.Module, inputs: Tensor | None = None, outputs: Tensor | None = None) -> Layer:
        """Notes the labels of a module's channels; at a second call of it they are the same channels."""
        layer = self.flows.layers.setdefault(self.flows.names[id(module)], Layer(module))
        for side, labels in (("inputs", inputs), ("outputs", outputs)):
            before = getattr(layer, side)
            if labels is not None and before is not None:
                self.channels.tie(before, labels)
            elif labels is not None:
                setattr(layer, side, labels)
        return layer

    def columns(self, node: Node, d: int) -> Tensor | None:
        """The labels of a layer's input along dimension d; None where they vary along another one."""
        labels = self.labels[node]
        if any(one != d % labels.dim() for one in varying(labels)):
            return None
        for other in reversed(range(labels.dim())):
            if other != d % labels.dim():
                if labels.size(other) == 0:
                    return None
                labels = labels.select(other, 0)
        return labels

    def take(self, node: Node, module: nn.Module, d: int, folds: bool) -> Tensor | None:
        """The same for a layer with weights, whose bias takes up what a removed channel is worth, where it can.

        folds: whether that is the same for every output.
        """
        columns, name = self.columns(node, d), self.flows.names[id(module)]
        if columns is None:
            return None
        values = self.env[node].movedim(d, 0)
        values = values.reshape(len(values), -1)
        worth = values[:, 0] if values.shape[1] else values.new_zeros(len(values))
        worth = torch.where((values == worth.unsqueeze(1)).all(1), worth, torch.nan).cpu()  # NaN: no one number
        known = self.flows.layers.get(name)
        if known is not None and known.inputs is not None:  # called again: with the same, or nothing is taken up
            before = torch.zeros_like(worth) if known.constants is None else known.constants
            kept = worth != before
        else:
            kept = ~worth.isfinite() if folds and module.bias is not None else worth != 0
            if bool((worth != 0).any()):
                self.layer(module).constants = torch.where(kept, 0, worth)
        if bool(kept.any()):
            why = f"what comes to {name} is not 0 where its channel is, which its bias cannot take up"
            self.channels.keep(columns[kept], why)
        return columns


def _has_tensors(value: Any) -> bool:
    return any(isinstance(one, Tensor) for one in tree_leaves(value))


def _ends(labels: Tensor, d: int) -> Tensor | None:
    """The labels that decide about the size of a dimension."""
    return labels.reshape(-1) if varies(labels, d) else None


def _is_known(function: Callable[..., Any]) -> bool:
    package = (getattr(function, "__module__", None) or "").partition(".")[0]
    known = package in ("torch", "_operator", "fastops", "math", "builtins", "torchvision")
    return known or function is unpack or type(function) in (type(torch.relu), type(len))


def _base(kind: type) -> type:
    """Of fastops.nn's classes, that of torch.nn; a class that somebody else derived is its own."""
    if kind.__module__.startswith("fastops.nn."):
        return next((one for one in kind.__mro__ if one.__module__.startswith("torch.nn.")), kind)
    return kind
