"""How a model becomes a frozen one: its graph is rewritten, layer by layer."""

import copy
import inspect
import keyword
import math
import operator
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.nn.modules.utils import _pair

import fastops.functional as FF
import fastops.nn as fnn
from fastops._freezing_int8 import Int8Chains, fits_int8, folded_int8
from fastops._frozen_graph import Child, Either, FrozenGraph, InPlace, activation_of, freeze_in_place
from fastops._frozen_layers import (
    LAYERS,
    FrozenInvertedResidual,
    FrozenLayer,
    FrozenMlp,
    add_after,
    add_to,
    each_dimension,
)
from fastops._frozen_layout import restore_layouts, suggests_channels_last
from fastops._frozen_norms import NORMS, Apart, folded, norms_after_layers, with_factors
from fastops._fusion import rewrite
from fastops._layer_scale import is_for_features, scaling_of
from fastops._nodes import LAYER, Nodes, in_the_way, is_view
from fastops._outside import is_known
from fastops._reached_code import KEPT, asked_of_children
from fastops._signature import Signature
from fastops._states import version
from fastops._tracing import Traced, is_frozen, reason, trace
from fastops.functional._activation import resolve_activation
from fastops.fuse import copy_of_modules, find_tensors, is_layer, unfuse
from fastops.registry import registered
from fastops.replace import Row, _name, replace_

_CONVOLUTIONS = {f"{name}{n}d": getattr(FF, f"{name}{n}d") for name in ("conv", "conv_max_pool") for n in (1, 2, 3)}
_ADDITIONS = {operator.add, operator.iadd, torch.add}
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def freeze_module(model: nn.Module, name: str, report: Any, channels_last: bool) -> nn.Module:
    """A module for inference: a graph, or where none can be traced, a copy with frozen children."""
    if is_frozen(model):
        return model
    if is_layer(model) and not isinstance(model, torch.jit.ScriptModule):
        return _freeze_layer(model, name, report, channels_last)
    frozen, for_all_calls = _frozen_graph(model, name, report, channels_last)
    if frozen is None:
        return _with_frozen_children(model, name, report, channels_last)
    if for_all_calls:
        return frozen
    return Either(frozen, _with_frozen_children(model, name, type(report)(), channels_last))


def _frozen_graph(model: nn.Module, name: str, report: Any, channels_last: bool) -> tuple[FrozenGraph | None, bool]:
    """The graph of a call with the defaults of forward's options, and whether that is every call.

    None where none can be traced, and the report says why.
    """
    why = "" if isinstance(model, torch.jit.ScriptModule) else in_the_way(model)
    if not why:
        try:
            traced = _trace(model)
        except Exception as error:  # whatever a forward raises that is given proxies
            why = reason(error)
        else:
            frozen = _Freezer(model, traced.graph, name, report, channels_last).run()
            signature = Signature(type(model).forward)
            return frozen, signature.declared == signature.inputs[:1] and not traced.may_take_none
    if type(model) not in _CONTAINERS:
        report.untraced.append(Row(name, _name(type(model)), why))
    return None, False


def with_its_own_modes(model: nn.Module, report: Any) -> nn.Module | None:
    """A copy after eval() where that does more than to set all modes: nothing else is known to be the same."""
    plain = nn.Module.train, nn.Module.eval
    if all((type(one).train, type(one).eval) == plain or is_frozen(one) for one in model.modules()):
        return None
    result = _copy(model)
    before = [(name, id(one)) for name, one in result.named_modules()]
    tensors = [(id(one), version(one)) for one in (*result.parameters(), *result.buffers())]
    result.eval()
    same = before == [(name, id(one)) for name, one in result.named_modules()]
    same = same and tensors == [(id(one), version(one)) for one in (*result.parameters(), *result.buffers())]
    if same and not any(one.training for one in result.modules()):
        return None
    report.untraced.append(Row("", _name(type(model)), "its class has a train() of its own"))
    replace_(result)
    return result


def _freeze_layer(model: nn.Module, name: str, report: Any, channels_last: bool) -> nn.Module:
    """One of torch.nn's layers: as it is frozen in a model that calls it and nothing else."""
    signature = Signature(type(model).forward)
    if signature.declared != signature.inputs[:1]:
        return _left(model, name, report)
    caller, graph = nn.Module(), Graph()
    caller.layer = model
    graph.output(graph.call_module("layer", (graph.placeholder(*signature.inputs),)))
    freezer = _Freezer(caller, graph, name, report, channels_last)
    freezer.names["layer"] = name
    frozen = freezer.run()
    if any(isinstance(one, LAYERS) for one in frozen.children()):
        return frozen
    result = _copy(model).train(False)  # a layer still, for forwards that ask what it is
    replace_(result)
    return result


def _left(module: nn.Module, name: str, report: Any) -> nn.Module:
    """A copy in eval mode of a layer that has nothing to pack, on fastops' kernels."""
    report.left.append(Row(name, _name(type(module)), in_the_way(module) or "it has no weights to pack"))
    result = _copy(module).train(False)
    replace_(result)
    return result


def _with_frozen_children(model: nn.Module, name: str, report: Any, channels_last: bool) -> nn.Module:
    result = _copy(model)
    own = not type(model).__module__.startswith(("torch.nn.", "fastops.nn.")) or type(model) in _CONTAINERS
    if own and not isinstance(model, torch.jit.ScriptModule):
        asked = asked_of_children(model)
        for one in result.modules() if asked else (result,):
            if one is result or not is_known(type(one)):  # its forward may change them
                one._buffers.update(
                    {key: buffer if buffer is None else buffer.clone() for key, buffer in one._buffers.items()}
                )
        if asked:
            _freeze_below(result.train(False), name, report, channels_last)
            return result
        for child_name, child in model.named_children():
            below = f"{name}.{child_name}" if name else child_name
            frozen = freeze_module(child, below, report, channels_last)
            if isinstance(frozen, FrozenGraph | Either) and not is_frozen(child):
                frozen.stand_in_for(result._modules[child_name])
            result._modules[child_name] = frozen
    return result.train(False)


def _freeze_below(module: nn.Module, name: str, report: Any, channels_last: bool) -> None:
    """Freezes what is below a copy. Every module there stays the object that it is, of a class from its own."""
    asked = asked_of_children(module)
    keeps = next((why for why in KEPT if why in asked), "")
    for child_name, child in module.named_children():
        below = f"{name}.{child_name}" if name else child_name
        if keeps:
            report.left.append(Row(below, _name(type(child)), f"in {_name(type(module))}, {keeps}"))
        elif is_frozen(child) or isinstance(child, InPlace | torch.jit.ScriptModule):  # shared, and done already
            continue
        elif is_layer(child):
            frozen = _freeze_layer(child, below, report, channels_last)
            if isinstance(frozen, FrozenGraph):
                freeze_in_place(child, frozen)
            else:
                replace_(child)
        else:
            frozen, for_all_calls = _frozen_graph(child, below, report, channels_last)
            if not for_all_calls:
                _freeze_below(child, below, report if frozen is None else type(report)(), channels_last)
            if frozen is not None:
                freeze_in_place(child, frozen)


def _trace(model: nn.Module) -> Traced:
    """model.forward with the defaults of its options, in eval mode."""
    if not isinstance(inspect.getattr_static(type(model), "forward"), types.FunctionType):
        raise TypeError("its forward is no method")
    signature = Signature(type(model).forward)
    return trace(model, signature.inputs, signature.named_inputs, False)


def _copy(module: nn.Module) -> nn.Module:
    """A copy that shares the memory of its tensors, needs no gradient, and moves alone."""
    memo: dict[int, Any] = {id(one): one.detach() for one in module.buffers()}
    memo |= {id(one): nn.Parameter(one.detach(), requires_grad=False) for one in module.parameters()}
    memo |= {id(one): one for one in module.modules() if isinstance(one, torch.jit.ScriptModule) or is_frozen(one)}
    for one in module.modules():
        found: dict[int, Any] = {}
        find_tensors(vars(one), found, set())
        # A weight that was computed for the last call, as by pruning.
        memo |= {key: value.detach().clone() for key, value in found.items() if key not in memo and not value.is_leaf}
    try:
        result = copy.deepcopy(module, dict(memo))
    except Exception:  # something that cannot be copied, which a model may hold
        result = copy_of_modules(module, {})
        for one in result.modules():
            if id(one) not in memo:
                for tensors in (one._parameters, one._buffers):
                    tensors.update({key: value if value is None else memo[id(value)] for key, value in tensors.items()})
    for one in result.modules():
        unfuse(one)
    return result


def _fits(layer: nn.Module, norm: nn.Module) -> bool:
    return type(layer) in NORMS[type(norm)] or fits_int8(layer, norm)


class _Freezer:
    def __init__(self, model: nn.Module, graph: Graph, name: str, report: Any, channels_last: bool) -> None:
        self.source, self.graph, self.report, self.channels_last = model, graph, report, channels_last
        self.prefix = f"{name}." if name else ""
        # A flat module with what the graph names, to which new modules can be added; and what the model calls them.
        self.names: dict[str, str] = {}
        self.adopted: dict[str, str] = {}  # the other way round
        self.apart: dict[str, Apart] = {}  # by the name of the folded layer
        self.scaled: set[str] = set()  # the names of the layers that FrozenLayer.scaled is for
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
        name = self.adopted.get(target)
        if name is None:
            name = self.adopted[target] = self._free_name(target)
            self.names[name] = self.prefix + target
            if isinstance(value, nn.Module):
                self.module._modules[name] = value
            elif isinstance(value, Tensor):
                self.module.register_buffer(name, value.detach())
            else:
                setattr(self.module, name, value)
        return name

    def _free_name(self, target: str) -> str:
        """One that our module has nothing under: a model may have both a child a_b and a child b of a child a."""
        name = target.replace(".", "_")
        while hasattr(self.module, name) or hasattr(_EMPTY, name) or keyword.iskeyword(name):
            name += "_frozen"
        return name

    def run(self) -> GraphModule:
        self._transpose_weights()
        self._fold()
        self._fold_factors()
        rewrite(self.graph, self.module, joins=False)
        for node in tuple(self.graph.nodes):
            self._freeze_call(node)
        nodes = Nodes(self.graph, self.module)
        changes = nodes.may_change_something
        for node in self.graph.nodes:
            if node.op == "get_attr" and any(user.args[:1] == (node,) and changes(user) for user in node.users):
                self.module._buffers[node.target] = self.module._buffers[node.target].clone()
        Int8Chains(self, nodes).run()
        for node in tuple(self.graph.nodes):
            self._join_addition(node, changes)
        if self.channels_last:
            for node in tuple(self.graph.nodes):
                self._join_block(node, nodes)
        for node in tuple(self.graph.nodes):
            if node.op == "get_attr" and not node.users:
                self.graph.erase_node(node)
        restore_layouts(self.graph, self.module, self.relaid, changes)
        self._take_children()
        self.graph.lint()
        result = FrozenGraph(self.module, self.graph, type(self.source).__name__)
        result.train(False)
        return result

    def _transpose_weights(self) -> None:
        """weight.t(), of a layer that keeps its weight transposed, is a tensor like any other."""
        changes = Nodes(self.graph, self.module).may_change_something
        for node in tuple(self.graph.nodes):
            if node.op != "call_method" or node.target != "t" or len(node.args) != 1 or node.args[0].op != "get_attr":
                continue
            target = node.args[0].target
            same = [one for one in self.graph.nodes if one.op == "get_attr" and one.target == target]
            if target not in self.module._buffers or any(changes(user) for one in same for user in one.users):
                continue
            name = self._free_name(f"{target}_t")
            self.names[name] = self.names[target]
            self.module.register_buffer(name, self.module._buffers[target].t())
            with self.graph.inserting_before(node):
                transposed = self.graph.get_attr(name)
            transposed.meta = dict(node.meta)
            node.replace_all_uses_with(transposed)
            self.graph.erase_node(node)

    # ---- batch norms

    def _fold(self) -> None:
        """Makes batch norms part of the layer before them."""
        for node, norm, before, layer in norms_after_layers(self.graph, self.module, _fits):
            target = self._free_name(f"{before.target}_{node.name}")
            if fits_int8(layer, norm):
                self.module.add_module(target, folded_int8(layer, norm))
            else:
                self.module.add_module(target, folded(layer, norm))
                self.apart[target] = Apart(layer, norm)
            self.names[target] = self.names[before.target]
            self.report.folded.append(Row(self.names[node.target], _name(type(norm)), self.names[before.target]))
            before.target = target
            node.replace_all_uses_with(before)
            self.graph.erase_node(node)

    def _fold_factors(self) -> None:
        """Makes factors of the features, as of a layer scale, part of the linear layer before them."""
        for node in tuple(self.graph.nodes):
            layer = self.module._modules.get(node.target) if node.op == "call_module" else None
            if type(layer) not in (nn.Linear, fnn.Linear) or getattr(layer, "activation", None) or in_the_way(layer):
                continue
            scaling = scaling_of(node, lambda value: next(iter(value.users)) if len(value.users) == 1 else None)
            if scaling is None or node.target in self.apart:
                continue
            product = scaling.nodes[-1]
            factor = self._constant(scaling.factor, product)
            if not isinstance(factor, Tensor) or factor.dtype != layer.weight.dtype:
                continue
            # Without a permutation the output may have any rank: as many dimensions as the factors have, or more.
            rank = factor.dim() if scaling.dims is None else len(scaling.dims)
            alone = scaling.dims is not None or factor.dim() == 1
            if not alone or not is_for_features(factor.shape, len(layer.weight), rank, scaling.dims):
                continue
            target = self._free_name(f"{node.target}_scaled")
            self.module.add_module(target, with_factors(layer, factor))
            if scaling.how != "y *= s":
                self.scaled.add(target)
            self.names[target] = self.names[node.target]
            root = scaling.factor
            while root.op != "get_attr":
                root = root.args[0]
            self.report.folded.append(Row(self.names[root.target], "factors of features", self.names[node.target]))
            node.target = target
            product.replace_all_uses_with(scaling.nodes[-2] if len(scaling.nodes) > 1 else node)
            self.graph.erase_node(product)

    def _constant(self, value: Node, product: Node) -> Any:
        """A tensor of the model, or a view of one, that nothing in the graph may change; None for anything else.

        product: where the value is read. What comes after that is not the value any more.
        """
        changes = Nodes(self.graph, self.module).may_change_something

        def may_change(one: Node) -> bool:
            return any(changes(user) or may_change(user) for user in one.users if user is not product)

        if value.op == "get_attr":
            alike = [one for one in self.graph.nodes if one.op == "get_attr" and one.target == value.target]
            return None if any(map(may_change, alike)) else _attribute(self.module, value.target)
        if not is_view(value) or not isinstance(value.args[0], Node):
            return None
        tensor = self._constant(value.args[0], product)
        rest = value.args[1:], value.kwargs
        if not isinstance(tensor, Tensor) or rest != torch.fx.node.map_arg(rest, lambda one: None):
            return None
        function = getattr(Tensor, value.target) if value.op == "call_method" else value.target
        return function(tensor, *value.args[1:], **value.kwargs)

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
        relaid = function == "conv2d" and self.channels_last and not suggests_channels_last(w)
        if function == "conv2d" and self.channels_last:
            w = w.contiguous(memory_format=torch.channels_last)
        b = None if bias is None else _attribute(self.module, bias.target)
        layer = FrozenLayer(function, w, b, options, f, self._apart_of(weight))
        layer.scaled = self._is_scaled(weight)
        told = self._name_of(weight)
        name = self._free_name(told.removeprefix(self.prefix) or "layer")
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

    def _is_scaled(self, weight: Node) -> bool:
        return weight.target.rpartition(".")[0] in self.scaled

    def _name_of(self, weight: Node) -> str:
        """What the model calls the layer with this weight."""
        if LAYER in weight.meta:
            return self.prefix + weight.meta[LAYER]
        if registered(self.source):
            return self.prefix.rstrip(".") or "(root)"
        module, _, key = weight.target.rpartition(".")
        return self.names[module] if module else self.names[key].removesuffix("weight").rstrip("._") or "(root)"

    def _freeze_mlp(self, node: Node) -> None:
        """A wide chain of linear layers: one by one, with packed weights. A narrow one stays one kernel."""
        arguments = inspect.signature(FF.mlp).bind(*node.args, **node.kwargs)
        arguments.apply_defaults()
        input, weights, biases, hidden, output = arguments.arguments.values()
        tensors = [one for one in (*weights, *(biases or ())) if one is not None]
        if not all(isinstance(one, Node) and one.op == "get_attr" for one in tensors):
            return  # made in the forward, as the transposed weight of an autoencoder's other half
        shapes = [_attribute(self.module, weight.target).shape for weight in weights]
        biases = biases or (None,) * len(weights)
        told = [self._name_of(weight) for weight in weights]
        dtype = _attribute(self.module, weights[0].target).dtype
        if max(max(shape) for shape in shapes) <= _NARROW and dtype in (torch.float32, torch.float64):
            tensors = [[one and _attribute(self.module, one.target) for one in ones] for ones in (weights, biases)]
            mlp = FrozenMlp(*tensors, hidden, output)
            mlp.scaled = self._is_scaled(weights[-1])
            if any(self._apart_of(weight) for weight in weights):
                fs = [hidden] * (len(weights) - 1) + [output]
                del mlp.layers
                mlp.layers = nn.ModuleList(
                    FrozenLayer("linear", w, b, {}, f, self._apart_of(weight))
                    for w, b, f, weight in zip(*tensors, fs, weights, strict=True)
                )
            name = self._free_name(f"{told[0].removeprefix(self.prefix)}_mlp")
            self.module.add_module(name, mlp)
            with self.graph.inserting_before(node):
                new = self.graph.call_module(name, (input,))
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
        leads = call is node.args[0]
        addition = operator.add if leads else add_after
        if node.target is operator.iadd:
            addition = operator.iadd if leads else add_to
        if other is call or (addition is add_to and not self._frozen(other)):  # others may see that it changes
            return
        if any(order[call] < order[one] < order[node] and changes(one) for one in self.graph.nodes):
            return
        layer = self._frozen(call)
        layer.addition, layer.adds = addition, True
        nodes = [node]
        user = next(iter(node.users)) if len(node.users) == 1 else None
        f = activation_of(user)
        if f is not None and not any(order[node] < order[one] < order[user] and changes(one) for one in order):
            layer.activation = f
            nodes.append(user)
        with self.graph.inserting_before(node):
            new = self.graph.call_module(call.target, (call.args[0], other))
        nodes[-1].replace_all_uses_with(new)
        for one in (*reversed(nodes), call):
            self.graph.erase_node(one)

    # ---- inverted residuals

    def _join_block(self, node: Node, nodes: Nodes) -> None:
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
        if any(order[first] < order[one] < order[last] and nodes.may_change_something(one) for one in order):
            return
        name = self._free_name(f"{first.target}_block")
        nodes.modules[name] = FrozenInvertedResidual(expand, depthwise, project)
        self.module.add_module(name, nodes.modules[name])
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

    def _take_children(self) -> None:
        """Modules that are called as they are: copies in eval mode, themselves frozen where they can be."""
        for node in self.graph.nodes:
            module = self.module._modules.get(node.target) if node.op in ("call_module", "get_attr") else None
            if module is None or isinstance(module, (*LAYERS, Child)):
                continue
            if is_frozen(module):
                continue
            if node.op == "get_attr":  # a batch norm that is called by its function
                self.module._modules[node.target] = _copy(module).train(False)
                continue
            name = self.names[node.target]
            if type(module).__module__.startswith(("torch.nn.", "fastops.nn.")):
                self.module._modules[node.target] = _left(module, name, self.report)
            else:
                frozen = freeze_module(module, name, self.report, self.channels_last)
                self.module._modules[node.target] = Child(frozen)


_EMPTY = FrozenGraph(nn.Module(), Graph())  # with the attributes that torch.fx's has
_NARROW = 128  # kMostMlpWidthCpu in csrc/kernels/mlp/mlp.h


def _pools_in_the_kernel(arguments: dict[str, Any], dims: int) -> bool:
    """Whether a single kernel computes convolution, activation and max pool (conv_pool.h)."""
    sizes = each_dimension(arguments["pool_size"], dims)
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
