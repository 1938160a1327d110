"""Layers with int8 weights in a model that is being frozen: what they hand on to each other stays in 8 bits.

A layer whose input has a calibrated scale says what it wants, and the layer before it rounds its output to that. So the
graph is followed from each layer to whoever reads what it gives. Where all of them take levels of one scale, levels it
gives: activation and residual addition are then a part of the call, max pools and flattening take them as they are.
"""

import copy
import inspect
import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Node

import fastops.functional as FF
import fastops.nn as fnn
from fastops._frozen_graph import activation_of
from fastops._frozen_int8 import FrozenAvgPoolInt8, FrozenInt8, FrozenMaxPoolInt8, Levels, static_int8
from fastops._frozen_norms import NORMS
from fastops._nodes import Nodes, in_the_way
from fastops.replace import Row, _name

_NORMS = {cls for cls in NORMS if cls.__name__ == "BatchNorm2d"}
_ADDITIONS = {operator.add, operator.iadd, torch.add}
_FLATTENS = {torch.flatten, "flatten"}
_THROUGH = (nn.Flatten, nn.Identity, nn.Dropout, FrozenMaxPoolInt8)
_POOLS = ("max_pool2d", "avg_pool2d", "adaptive_avg_pool2d")
_POOL_FUNCTIONS = {getattr(package, name): name for package in (F, FF) for name in _POOLS}
_POOL_MODULES = {
    getattr(package, cls): name
    for package in (nn, fnn)
    for cls, name in zip(("MaxPool2d", "AvgPool2d", "AdaptiveAvgPool2d"), _POOLS, strict=True)
}
# What levels are of the sum with a residual, or of these, their lowest and highest say.
_BOUNDS = (None, "relu", "relu6")


@dataclass(eq=False)
class _Unit:
    """A call of a layer and what becomes part of it. value: the node that gives the result."""

    call: Node
    value: Node
    layer: FrozenInt8
    module: nn.Module
    parts: list[Node] = field(default_factory=list)
    residual: Node | None = None
    before_sum: tuple[Node, Any, list[Node]] | None = None  # value, activation and parts without the sum
    levels: Levels | None = None


@dataclass(eq=False)
class _Pool:
    """An average pool, which takes levels of any scale."""

    value: Node
    windows: dict[str, Any]
    given: Levels | None = None
    levels: Levels | None = None


class Int8Chains:
    """freezer: the _Freezer of fastops._freezing, whose graph is rewritten; nodes: what is known of that."""

    def __init__(self, freezer: Any, nodes: Nodes) -> None:
        self.freezer, self.graph, self.module, self.nodes = freezer, freezer.graph, freezer.module, nodes
        self.units: dict[Node, _Unit] = {}  # by the call
        self.pools: dict[Node, _Pool] = {}
        self.by_value: dict[Node, _Unit | _Pool] = {}

    def run(self) -> None:
        for node in self.graph.nodes:
            module = self.module._modules.get(node.target) if node.op == "call_module" else None
            if static_int8(module) and len(node.args) == 1 and not node.kwargs and not in_the_way(module):
                self.units[node] = _Unit(node, node, self._layer(module), module)
        if not self.units:
            return
        self.order = {node: i for i, node in enumerate(self.graph.nodes)}
        for unit in self.units.values():
            self._take_activation(unit)
            self.by_value[unit.value] = unit
        for node in tuple(self.graph.nodes):
            self._take_addition(node)
            self._take_pool(node)
        while not self._settle():
            pass
        for unit in sorted(self.units.values(), key=lambda unit: self.order[unit.value]):
            self._write(unit)
        for pool in self.pools.values():
            self._write_pool(pool)

    def _layer(self, module: nn.Module) -> FrozenInt8:
        geometry = None
        if static_int8(module) == "conv2d":
            geometry = module.stride, module.padding, module.dilation, module.groups
        given = Levels(float(module.input_scale), int(module.input_zero))
        floats = (one.dtype for one in self.freezer.source.parameters() if one.is_floating_point())
        dtype = next(floats, torch.float32) if module.bias is None else module.bias.dtype
        layer = FrozenInt8(module.weight, module.scale, module.bias, geometry, given, dtype)
        layer.activation = module.activation
        return layer

    # ---- what becomes part of a call

    def _take_activation(self, unit: _Unit) -> None:
        user = next(iter(unit.value.users)) if len(unit.value.users) == 1 else None
        f = activation_of(user)
        if f is None or unit.layer.activation is not None or self._changed_between(unit.value, user):
            return
        unit.layer.activation = f
        unit.parts.append(user)
        unit.value = user

    def _changed_between(self, first: Node, last: Node) -> bool:
        return any(
            self.order[first] < i < self.order[last] and self.nodes.may_change_something(node)
            for node, i in self.order.items()
        )

    def _take_addition(self, node: Node) -> None:
        """layer(x) + y, where y may be levels: whether it is, turns out in the end."""
        if node.op != "call_function" or node.target not in _ADDITIONS or node.kwargs or len(node.args) != 2:
            return
        if not all(isinstance(operand, Node) for operand in node.args) or node.args[0] is node.args[1]:
            return
        alone = [one for one in node.args if one in self.units and len(one.users) == 1 and one in self.by_value]
        if not alone or (node.target is operator.iadd and node.args[0] not in alone):
            return
        call = max(alone, key=self.order.__getitem__)
        unit = self.units[call]
        other = node.args[1] if call is node.args[0] else node.args[0]
        if unit.layer.activation is not None or self._root(other) is None or self._changed_between(call, node):
            return
        del self.by_value[unit.value]
        unit.before_sum = unit.value, unit.layer.activation, list(unit.parts)
        unit.residual, unit.value = other, node
        unit.parts.append(node)
        self._take_activation(unit)
        self.by_value[unit.value] = unit

    def _take_pool(self, node: Node) -> None:
        pool = self._pool_of(node)
        if pool is not None and pool[0] != "max_pool2d" and self._root(node.all_input_nodes[0]) is not None:
            self.pools[node] = self.by_value[node] = _Pool(node, pool[1])

    def _pool_of(self, node: Node) -> tuple[str, dict[str, Any]] | None:
        """The function of a pool, and its arguments but for the input."""
        if len(node.all_input_nodes) != 1:
            return None
        if node.op == "call_module":
            module = self.module._modules.get(node.target)
            name = _POOL_MODULES.get(type(module))
            if name is None or in_the_way(module):
                return None
            windows = {
                key: getattr(module, key) for key in inspect.signature(getattr(FF, name)).parameters if key != "input"
            }
        elif node.op == "call_function" and node.target in _POOL_FUNCTIONS:
            name = _POOL_FUNCTIONS[node.target]
            arguments = inspect.signature(getattr(FF, name)).bind(*node.args, **node.kwargs)
            arguments.apply_defaults()
            windows = dict(arguments.arguments)
            del windows["input"]
        else:
            return None
        pairs = [
            windows[key] for key in ("output_size", "kernel_size", "stride", "padding", "dilation") if windows.get(key)
        ]
        numbers = all(isinstance(one, int) for pair in pairs for one in (pair if isinstance(pair, tuple) else (pair,)))
        return (name, windows) if numbers and not windows.get("return_indices") else None

    # ---- levels

    def _root(self, node: Node) -> _Unit | _Pool | None:
        """The layer whose output this is, but for a max pool and the like."""
        while node not in self.by_value:
            if not self._passes(node):
                return None
            node = node.args[0]
        return self.by_value[node]

    def _passes(self, node: Node) -> bool:
        """Whether a node gives levels where it is given levels, of the same scale."""
        if node.op == "call_module":
            module = self.module._modules.get(node.target)
            if type(module) in _THROUGH:
                return not in_the_way(module)
        pool = self._pool_of(node)
        return node.target in _FLATTENS or (pool is not None and pool[0] == "max_pool2d")

    def _uses(self, value: Node) -> Iterator[Levels | str]:
        """What the readers of a value take: levels of this scale, "any" or "floats"."""
        for user in value.users:
            found = False
            if user in self.units and user.args[0] is value:
                yield self.units[user].layer.given
                found = True
            if user in self.pools or any(unit.residual is value and user in unit.parts for unit in self.units.values()):
                yield "any"
                found = True
            if not found and self._passes(user):
                yield from self._uses(user)
                found = True
            if not found:
                yield "floats"

    def _settle(self) -> bool:
        """Says what each layer gives. False where a sum turned out to be none of levels: it is apart then."""
        for unit in self.units.values():
            uses = list(self._uses(unit.value))
            wanted = {use for use in uses if isinstance(use, Levels)}
            unit.levels = None
            if "floats" in uses or len(wanted) > 1 or not uses:
                continue
            if wanted:
                (unit.levels,) = wanted
            elif unit.residual is None and unit.layer.activation in _BOUNDS:
                unit.levels = Levels(float(unit.module.output_scale), int(unit.module.output_zero))
        for pool in self.pools.values():  # in the order of the graph
            uses, root = set(self._uses(pool.value)), self._root(pool.value.all_input_nodes[0])
            pool.given = pool.levels = None
            if root is not None and root.levels is not None:
                pool.given = root.levels
                (wanted,) = uses if len(uses) == 1 else (None,)
                pool.levels = wanted if isinstance(wanted, Levels) else None
        settled = True
        for unit in self.units.values():
            if unit.residual is None:
                continue
            root = self._root(unit.residual)
            if root is not None and root.levels is not None:
                continue
            del self.by_value[unit.value]
            unit.value, unit.layer.activation, unit.parts = unit.before_sum
            unit.residual = None
            self.by_value[unit.value] = unit
            settled = False
        return settled

    # ---- the graph

    def _write(self, unit: _Unit) -> None:
        freezer, layer = self.freezer, unit.layer
        layer.result = unit.levels
        arguments = unit.call.args
        if unit.residual is not None:
            # As the sum has it now: what it was may have been replaced.
            addition = next(one for one in unit.parts if one.target in _ADDITIONS)
            (other,) = (one for one in addition.args if one is not unit.before_sum[0])
            layer.adds, layer.residual = True, self._root(other).levels
            arguments = (*arguments, other)
        told = freezer.names[unit.call.target]
        name = self._add(f"{unit.call.target}_int8", layer)
        freezer.names[name] = told
        if layer.geometry is not None:
            freezer.relaid.add(name)
        with self.graph.inserting_before(unit.value):
            new = self.graph.call_module(name, arguments)
        unit.value.replace_all_uses_with(new)
        for node in (*reversed(unit.parts), unit.call):
            self.graph.erase_node(node)
        self.by_value[new] = unit
        unit.value = new
        if layer.result is not None:
            self._pool_levels(new)
        function = static_int8(unit.module) + "_int8"
        details = [f"activation={layer.activation!r}"] if layer.activation is not None else []
        details += ["residual"] if layer.adds else []
        details += ["uint8 out"] if layer.result is not None else []
        freezer.report.frozen.append(Row(told, _name(type(unit.module)), ", ".join([function, *details])))

    def _add(self, name: str, module: nn.Module) -> str:
        name = self.freezer._free_name(name)
        self.module.add_module(name, module)
        self.nodes.modules[name] = module
        return name

    def _write_pool(self, pool: _Pool) -> None:
        if pool.given is None:
            return
        dtype = next(iter(self.units.values())).layer.dtype
        name = self._add(f"{pool.value.name}_int8", FrozenAvgPoolInt8(pool.windows, pool.given, pool.levels, dtype))
        self.freezer.relaid.add(name)
        with self.graph.inserting_before(pool.value):
            new = self.graph.call_module(name, (pool.value.all_input_nodes[0],))
        pool.value.replace_all_uses_with(new)
        self.graph.erase_node(pool.value)
        if pool.levels is not None:
            self._pool_levels(new)

    def _pool_levels(self, value: Node) -> None:
        """Max pools of levels have a kernel of their own."""
        for user in tuple(value.users):
            if user in self.units or not self._passes(user):
                continue
            pool = self._pool_of(user)
            if pool is not None:
                name = self._add(f"{user.name}_int8", FrozenMaxPoolInt8(**pool[1]))
                with self.graph.inserting_before(user):
                    new = self.graph.call_module(name, (user.args[0],))
                user.replace_all_uses_with(new)
                self.graph.erase_node(user)
                user = new
            self._pool_levels(user)


# ---- batch norms


def fits_int8(layer: nn.Module, norm: nn.Module) -> bool:
    """Whether the norm can be a part of the layer: each channel of a convolution has a scale of its own already."""
    return static_int8(layer) == "conv2d" and type(norm) in _NORMS


def folded_int8(layer: nn.Module, norm: nn.Module) -> nn.Module:
    """The layer followed by the batch norm, as one layer. Computed in float64 and rounded once."""

    def double(tensor: Tensor | None, default: float) -> Any:
        return default if tensor is None else tensor.detach().double()

    factor = (norm.running_var.double() + norm.eps).rsqrt() * double(norm.weight, 1.0)
    bias = (double(layer.bias, 0.0) - norm.running_mean.double()) * factor + double(norm.bias, 0.0)
    result = copy.copy(layer)
    vars(result)["_buffers"] = {**layer._buffers, "scale": (layer.scale.double() * factor).float()}
    vars(result)["_parameters"] = {"bias": nn.Parameter(bias.to(norm.running_mean.dtype), False)}
    return result
