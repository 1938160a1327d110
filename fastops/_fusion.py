"""What stands beside each other in a graph and is one call of fastops: found and put in its place.

`rewrite` works on a torch.fx.GraphModule, wherever its graph comes from: fastops.fuse traces modules, whose layers are
call_module nodes; Dynamo's graphs have functions of torch and parameters that are nodes. A group is a layer or a batch
norm and what follows it, as long as every result in between has one user: then nobody can tell that it is not made.
"""

import inspect
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.nn.utils import parametrize

import fastops.functional as FF
import fastops.nn as fnn
from fastops._activations import ACTIVATIONS, two, valid
from fastops.functional._activation import NAMES, resolve_activation
from fastops.nn._fused import FUSED

Resolved = tuple[str, float, float]  # an activation, as resolve_activation has it


class Finding(NamedTuple):
    """One group of nodes that was looked at.

    what: "fused"; "called", one node alone that calls a function of fastops now, without the module's __call__; "apart"
        where nodes that look like a group are none, and `result` says why.
    modules: the modules that are not called any more, or are apart, by their names in the graph module.
    pattern: the nodes, as a reader knows them: "Conv2d + ReLU + max_pool2d".
    result: the function that does it.
    """

    what: str
    modules: tuple[str, ...]
    pattern: str
    result: str


def rewrite(graph_module: GraphModule) -> list[Finding]:
    """Fuses what can be fused in graph_module.graph, which is linted and recompiled.

    The new nodes are call_function; parameters of a module are get_attr nodes. What fastops has a function for and
    stands alone is called by that: the graph does what it did, on fastops' kernels.
    """
    return _Rewriter(graph_module).run()


def may_change_something(graph_module: GraphModule) -> Callable[[Node], bool]:
    """Whether a node of the graph may write to what others read, as far as can be told: where not, it may."""
    return _Rewriter(graph_module).may_change_something


def in_the_way(module: nn.Module) -> str:
    """Why a module has to be called as a module, whatever its class; "" where its forward is all that a call is."""
    state = vars(module)
    if any(state.get(hooks) for hooks in HOOKS):
        return "it has hooks"
    if "forward" in state:
        return "its forward has been overridden on the instance"
    if type(module).__call__ is not nn.Module.__call__:
        return "its class has a __call__ of its own"
    return ""


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

# ---- what the classes and functions of torch are to fastops ----------------------------------------------------------

_LAYERS = ["linear", *(f"conv{t}{n}d" for t in ("", "_transpose") for n in (1, 2, 3))]
_POOLS = [f"max_pool{n}d" for n in (1, 2, 3)]


def _class_name(function: str) -> str:
    return "".join(part.capitalize() for part in function.split("_"))


def _classes(functions: list[str]) -> dict[type, str]:
    """Exact classes: a subclass may do something else."""
    found = {}
    for function in functions:
        for package in (nn, fnn):
            found[getattr(package, _class_name(function))] = function
    return found


_LAYER_CLASSES = _classes(_LAYERS)
_LAYER_CLASSES.update({FUSED[cls]: name for cls, name in tuple(_LAYER_CLASSES.items()) if cls in FUSED})
_POOL_CLASSES = _classes(_POOLS)
_NORM_CLASSES = {
    getattr(package, name)
    for name in ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d")
    for package in (nn, fnn)
    if hasattr(package, name)
}
_ACTIVATION_CLASSES = {
    cls for kind in ACTIVATIONS.values() for cls in (kind.module, getattr(fnn, kind.module.__name__, kind.module))
}


def _functions(names: list[str]) -> dict[Callable[..., Any], str]:
    """Each function by every name that torch and fastops have for it."""
    found = {}
    for name in names:
        for package in (F, torch, torch._C._nn, FF):
            function = getattr(package, name, None)
            if function is not None:
                found[function] = name
    return found


_LAYER_FUNCTIONS = _functions(_LAYERS)
_POOL_FUNCTIONS = _functions(_POOLS)
_ACTIVATION_FUNCTIONS = _functions([kind.function for kind in ACTIVATIONS.values() if kind.name != "identity"])
_ACTIVATION_FUNCTIONS[torch._C._nn.log_sigmoid] = "logsigmoid"
_INPLACE_FUNCTIONS = {
    function: name.removesuffix("_")
    for function, name in _functions([f"{name}_" for name in set(_ACTIVATION_FUNCTIONS.values())]).items()
}
_ACTIVATION_METHODS = {
    name for name in set(_ACTIVATION_FUNCTIONS.values()) if hasattr(Tensor, name) and name not in ("softplus",)
}
_CLAMPS = {torch.clamp, torch.clip, torch.clamp_min, torch.clamp_, torch.clip_, torch.clamp_min_}
_ADDITIONS = {operator.add, operator.iadd, torch.add}
_KINDS_OF: dict[str, list[str]] = {}
for _kind in ACTIVATIONS.values():
    _KINDS_OF.setdefault(_kind.function, []).append(_kind.name)

# What torch.fx writes for x += y and so on, which Python's operators do in place.
_INPLACE_OPERATORS = {
    getattr(operator, name)
    for name in ("iadd", "isub", "imul", "imatmul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor")
}

# ---- the calls that fastops has no function for ----------------------------------------------------------------------


def call_batch_norm(
    module: nn.Module, input: Tensor, activation: Any = None, residual: Any = None, in_place: bool = False
) -> Tensor:
    """A batch norm module's forward, the addition of residual and the activation. in_place: it was y += residual."""
    module._check_input_dim(input)
    # Module.__getattr__ costs as much as a small op.
    buffers, parameters = module._buffers, module._parameters
    mean, variance, momentum = buffers["running_mean"], buffers["running_var"], module.momentum
    training = module.training
    if not training:
        training = mean is None and variance is None
    elif not module.track_running_stats:  # those that there may be are not updated
        mean = variance = None
    elif (count := buffers["num_batches_tracked"]) is not None:
        count.add_(1)
        if momentum is None:
            momentum = 1.0 / float(count)
    return normalize(
        input, mean, variance, parameters["weight"], parameters["bias"], training, momentum or 0.0, module.eps,
        activation, residual, in_place,
    )  # fmt: skip


def normalize(
    input: Tensor, running_mean: Any, running_var: Any, weight: Any = None, bias: Any = None, training: Any = False,
    momentum: Any = 0.1, eps: Any = 1e-5, activation: Any = None, residual: Any = None, in_place: bool = False,
) -> Tensor:  # fmt: skip
    """F.batch_norm, + residual, activation."""
    args = input, running_mean, running_var, weight, bias, training, momentum, eps
    alike = residual is None or (
        isinstance(residual, Tensor)
        and residual.shape == input.shape
        and residual.dtype == input.dtype
        and residual.device == input.device
    )
    if alike:
        return FF.batch_norm(*args, activation=activation, residual=residual)
    output = FF.batch_norm(*args)
    if in_place:
        output += residual
    else:
        output = output + residual
    return output if activation is None else activate(output, activation)


def activate(input: Tensor, activation: Any) -> Tensor:
    """An activation= on its own."""
    kind, a, b = resolve_activation(activation)
    if kind == "identity":
        return input
    row = ACTIVATIONS[kind]
    return getattr(FF, row.function)(input, *(a, b)[: len(row.parameters)], **row.options)


def _has_batch_norm() -> bool:
    return hasattr(FF, "batch_norm")


# ---- what a node is --------------------------------------------------------------------------------------------------


class _Layer(NamedTuple):
    node: Node
    function: str
    input: Node
    arguments: dict[str, Any]  # of a call_function; those of a module are read when the group is made
    activation: Resolved
    label: str


class _Norm(NamedTuple):
    node: Node
    input: Node
    arguments: dict[str, Any]
    label: str


class _Activation(NamedTuple):
    node: Node
    input: Node
    resolved: Resolved
    in_place: bool
    label: str


class _Pool(NamedTuple):
    node: Node
    input: Node
    size: Any
    label: str


class _Addition(NamedTuple):
    node: Node
    operands: tuple[Node, Node]
    in_place: bool


_IDENTITY: Resolved = NAMES["identity"]
# Activations whose backward reads their result in PyTorch, too.
_KEPT_BY_TORCH = ("identity", "relu", "sigmoid", "tanh")


def _argument(resolved: Resolved) -> Any:
    """As it is written in activation=: None, a name, or where its parameters are not the default ones all of it."""
    if resolved == _IDENTITY:
        return None
    return resolved[0] if NAMES.get(resolved[0]) == resolved else resolved


def _told(resolved: Resolved) -> str:
    argument = _argument(resolved)
    return "" if argument is None else f", activation={argument!r}"


class _Rewriter:
    def __init__(self, graph_module: GraphModule) -> None:
        self.module = graph_module
        self.graph = graph_module.graph
        self.modules = dict(graph_module.named_modules(remove_duplicate=False))
        self.findings: list[Finding] = []

    def run(self) -> list[Finding]:
        self.order = {node: i for i, node in enumerate(self.graph.nodes)}
        self._name_values_after_in_place_activations()
        self._leave_out_identities()
        self._explain()
        for node in tuple(self.graph.nodes):
            if node in self.order:  # not erased as a part of an earlier group
                self._visit(node)
        self.graph.lint()
        self.module.recompile()
        return self.findings

    def _visit(self, node: Node) -> None:
        if layer := self.layer(node):
            if layer.function == "linear":
                self._linear(layer)
            else:
                self._convolution(layer)
        elif norm := self.norm(node):
            self._norm(norm)
        elif activation := self.activation(node):
            self._lone_activation(activation)

    # ---- groups

    def _linear(self, first: _Layer) -> None:
        """A layer and its activation, and those that follow with the same activation between them."""
        layers, nodes = [], []
        layer, activation = first, first.activation
        hidden = None
        while True:
            layers.append(layer)
            tail, activation, members = self._activated(layer)
            nodes += members
            if hidden is not None and activation != hidden:
                break
            after = self._only_user(tail)
            following = self.layer(after) if after is not None else None
            if following is None or following.function != "linear" or following.input is not tail:
                break
            hidden, layer = activation, following
        if len(layers) > 1 and not self._may_move(nodes):
            layers = layers[:1]
        if len(layers) == 1:
            tail, activation, nodes = self._activated(first)
            self._put(nodes, "linear", FF.linear, self._arguments(first, tail) | {"activation": _argument(activation)})
            return
        with self.graph.inserting_before(nodes[-1]):
            arguments = [self._arguments(layer, nodes[-1]) for layer in layers]
        self._put(
            nodes, "mlp", FF.mlp,
            {
                "input": first.input, "weights": tuple(one["weight"] for one in arguments),
                "biases": tuple(one.get("bias") for one in arguments), "activation": _argument(hidden),
                "output_activation": _argument(activation),
            },
            told=f"mlp({len(layers)} layers{_told(hidden)})",
        )  # fmt: skip

    def _convolution(self, layer: _Layer) -> None:
        tail, activation, nodes = self._activated(layer)
        function, pool = layer.function, None
        after = self._only_user(tail)
        if after is not None and "transpose" not in function:
            pool = self.pool(after)
            if pool is not None and (
                pool.input is not tail
                or self._function_of(after)[-2] != function[-2]
                or not self._may_move([*nodes, after])
            ):
                pool = None
        arguments = self._arguments(layer, tail)
        if pool is not None:
            nodes.append(pool.node)
            if activation == _IDENTITY:
                # The maximum of max(x, 0) is max(maximum of x, 0), and the gradient goes the same way.
                after = self._only_user(pool.node)
                relu = self.activation(after) if after is not None else None
                follows = relu is not None and relu.resolved == NAMES["relu"] and relu.input is pool.node
                if follows and self._may_move([*nodes, after]):
                    activation = relu.resolved
                    nodes.append(relu.node)
            arguments["pool_size"] = pool.size
            function = f"conv_max_pool{function[-2:]}"
        self._put(nodes, function, getattr(FF, function), arguments | {"activation": _argument(activation)})

    def _norm(self, norm: _Norm) -> None:
        if not _has_batch_norm():
            return
        nodes, tail, residual, in_place = [norm.node], norm.node, None, False
        after = self._only_user(tail)
        addition = self.addition(after) if after is not None else None
        if addition is not None:
            first, second = addition.operands
            other = second if first is tail else first
            later = self.norm(other)
            leave_it = later is not None and self._only_user(other) is after and self.order[other] > self.order[tail]
            in_place_on_other = addition.in_place and first is not tail
            if other is not tail and not leave_it and not in_place_on_other and self._may_move([*nodes, after]):
                residual, in_place, tail = other, addition.in_place, after
                nodes.append(after)
        after = self._only_user(tail)
        activation = self.activation(after) if after is not None else None
        resolved = _IDENTITY
        follows = activation is not None and activation.input is tail
        if follows and not self._is_changed_later(after, activation.resolved) and self._may_move([*nodes, after]):
            resolved = activation.resolved
            nodes.append(after)
        function = normalize
        arguments = dict(norm.arguments)
        if norm.node.op == "call_module":
            function = call_batch_norm
            with self.graph.inserting_before(nodes[-1]):
                arguments = {"module": self.graph.get_attr(norm.node.target)}
        arguments["input"] = norm.input
        more = {"activation": _argument(resolved), "residual": residual, "in_place": in_place}
        told = f"batch_norm{_told(resolved)}{', residual' if residual is not None else ''}"
        self._put(nodes, "batch_norm", function, arguments | {k: v for k, v in more.items() if v}, told=told)

    def _lone_activation(self, activation: _Activation) -> None:
        kind, *parameters = activation.resolved
        row = ACTIVATIONS[kind]
        arguments = {"input": activation.input, **dict(zip(row.parameters, parameters, strict=False)), **row.options}
        if activation.in_place:
            if not row.in_place:  # torch.sigmoid_: fastops has no function for it
                return
            arguments["inplace"] = True
        self._put([activation.node], row.function, getattr(FF, row.function), arguments)

    def _is_changed_later(self, node: Node, resolved: Resolved) -> bool:
        """Whether a result is changed in place that a fused layer may keep for backward, and PyTorch does not."""
        if resolved[0] in _KEPT_BY_TORCH:
            return False
        return any(user.args and user.args[0] is node and self.may_change_something(user) for user in node.users)

    def _activated(self, layer: _Layer) -> tuple[Node, Resolved, list[Node]]:
        """The layer with its activation: the last node, the activation, the nodes."""
        if layer.activation != _IDENTITY:
            return layer.node, layer.activation, [layer.node]
        after = self._only_user(layer.node)
        activation = self.activation(after) if after is not None else None
        follows = activation is not None and activation.input is layer.node
        if not follows or self._is_changed_later(after, activation.resolved) or not self._may_move([layer.node, after]):
            return layer.node, _IDENTITY, [layer.node]
        return after, activation.resolved, [layer.node, after]

    def _arguments(self, layer: _Layer, before: Node) -> dict[str, Any]:
        """Everything but the activation, by fastops' names."""
        if layer.node.op == "call_function":
            return dict(layer.arguments)
        module, name = self.modules[layer.node.target], layer.node.target
        with self.graph.inserting_before(before):
            arguments: dict[str, Any] = {"input": layer.input, "weight": self.graph.get_attr(f"{name}.weight")}
            if module.bias is not None:
                arguments["bias"] = self.graph.get_attr(f"{name}.bias")
            if layer.function == "linear":
                return arguments
            padding = module.padding
            if module.padding_mode != "zeros":
                sides = tuple(module._reversed_padding_repeated_twice)
                arguments["input"] = self.graph.call_function(
                    F.pad, (layer.input, sides), {"mode": module.padding_mode}
                )
                padding = 0
        options = {"stride": module.stride, "padding": padding, "dilation": module.dilation, "groups": module.groups}
        if "transpose" in layer.function:
            options["output_padding"] = module.output_padding
        return arguments | options

    def _put(
        self, nodes: list[Node], name: str, function: Callable[..., Any], arguments: dict[str, Any], told: str = ""
    ) -> None:
        """One call in the place of nodes, where the last of them was."""
        told = told or name + (f", activation={arguments['activation']!r}" if arguments.get("activation") else "")
        parameters = inspect.signature(function).parameters
        # Positions as far as there is no gap, and no argument that is the default None.
        positional = []
        for key, parameter in parameters.items():
            if key not in arguments or parameter.kind is inspect.Parameter.KEYWORD_ONLY:
                break
            positional.append(arguments[key])
        named = {key: arguments[key] for key in tuple(parameters)[len(positional) :] if key in arguments}
        named = {key: value for key, value in named.items() if value is not parameters[key].default}
        defaults = [parameter.default for parameter in parameters.values()]
        while positional[-1] is None and defaults[len(positional) - 1] is None:
            positional.pop()
        with self.graph.inserting_before(nodes[-1]):
            new = self.graph.call_function(function, tuple(positional), named)
        new.meta = dict(nodes[-1].meta)
        self.order[new] = self.order[nodes[-1]]
        what = "fused" if len(nodes) > 1 else "called"
        pattern = " + ".join(self._label(node) for node in nodes)
        self.findings.append(Finding(what, self._modules_of(nodes), pattern, told))
        self._erase(nodes, new)

    def _erase(self, nodes: list[Node], instead: Node) -> None:
        nodes[-1].replace_all_uses_with(instead)
        for node in reversed(nodes):
            self.graph.erase_node(node)
            self.order.pop(node, None)

    # ---- what a node is

    def _plain(self, node: Node, classes: Any) -> nn.Module | None:
        """The module that a node calls, if its class is one of these and its call is its forward on one input."""
        if node.op != "call_module" or len(node.args) != 1 or node.kwargs or not isinstance(node.args[0], Node):
            return None
        module = self.modules.get(node.target)
        return module if type(module) in classes and not in_the_way(module) else None

    def _bound(self, node: Node, function: Callable[..., Any]) -> dict[str, Any] | None:
        """The arguments of a call_function, by the names of fastops' function."""
        try:
            arguments = inspect.signature(function).bind(*node.args, **node.kwargs).arguments
        except TypeError:
            return None
        return arguments if isinstance(arguments.get("input"), Node) else None

    def layer(self, node: Node) -> _Layer | None:
        if module := self._plain(node, _LAYER_CLASSES):
            if not {"weight", "bias"} <= module._parameters.keys() or module._parameters["weight"] is None:
                return None
            resolved = _resolve(getattr(module, "activation", None))
            if resolved is None or ("Transpose" in type(module).__name__ and module.padding_mode != "zeros"):
                return None
            return _Layer(node, _LAYER_CLASSES[type(module)], node.args[0], {}, resolved, self._label(node))
        if node.op == "call_function" and node.target in _LAYER_FUNCTIONS:
            name = _LAYER_FUNCTIONS[node.target]
            arguments = self._bound(node, getattr(FF, name))
            if arguments is None or not isinstance(arguments.get("weight"), Node):
                return None
            resolved = _resolve(arguments.pop("activation", None))
            return resolved and _Layer(node, name, arguments["input"], arguments, resolved, name)
        return None

    def norm(self, node: Node) -> _Norm | None:
        if module := self._plain(node, _NORM_CLASSES):
            buffers = {"running_mean", "running_var", "num_batches_tracked"} <= module._buffers.keys()
            known = buffers and {"weight", "bias"} <= module._parameters.keys()
            return _Norm(node, node.args[0], {}, self._label(node)) if known else None
        if node.op == "call_function" and node.target is F.batch_norm:
            arguments = self._bound(node, F.batch_norm)
            return arguments and _Norm(node, arguments["input"], arguments, "batch_norm")
        return None

    def activation(self, node: Node) -> _Activation | None:
        if module := self._plain(node, _ACTIVATION_CLASSES):
            resolved = _resolve(module)
            in_place = getattr(module, "inplace", False)
            return resolved and _Activation(node, node.args[0], resolved, in_place, self._label(node))
        name, in_place = "", False
        if node.op == "call_function":
            name = _ACTIVATION_FUNCTIONS.get(node.target, "")
            if node.target in _INPLACE_FUNCTIONS:
                name, in_place = _INPLACE_FUNCTIONS[node.target], True
        elif node.op == "call_method":
            in_place = node.target.endswith("_")
            name = node.target.removesuffix("_")
            name = name if name in _ACTIVATION_METHODS else ""
        if not name:
            return None
        return self._activation_call(node, name, in_place)

    def _activation_call(self, node: Node, name: str, in_place: bool) -> _Activation | None:
        kwargs = dict(node.kwargs)
        args = list(node.args) or ([kwargs.pop("input")] if "input" in kwargs else [])
        if not args or not isinstance(args[0], Node):
            return None
        kinds = [ACTIVATIONS[kind] for kind in _KINDS_OF[name]]
        options = {key: kwargs.pop(key, kinds[0].options[key]) for key in kinds[0].options}
        kind = next((kind for kind in kinds if kind.options == options), None)
        if kind is None:
            return None
        names = [*kind.parameters, *(["inplace"] if kind.in_place and not in_place else [])]
        if len(args) - 1 > len(names):
            return None
        given = dict(zip(names, args[1:], strict=False)) | kwargs
        in_place = in_place or given.pop("inplace", False) is True
        parameters = {**kind.parameters, **given}
        if parameters.keys() != kind.parameters.keys():
            return None
        numbers = two(*parameters.values())
        if not all(type(number) in (int, float) for number in numbers) or not valid(kind.name, *numbers):
            return None
        return _Activation(node, args[0], (kind.name, *map(float, numbers)), in_place, self._label(node))

    def pool(self, node: Node) -> _Pool | None:
        """A max pool whose windows lie side by side."""
        if module := self._plain(node, _POOL_CLASSES):
            options = {key: getattr(module, key) for key in _POOL_OPTIONS}
            input, size = node.args[0], module.kernel_size
        elif node.op == "call_function" and node.target in _POOL_FUNCTIONS:
            arguments = self._bound(node, getattr(FF, _POOL_FUNCTIONS[node.target]))
            if arguments is None:
                return None
            input, size = arguments.pop("input"), arguments.pop("kernel_size", None)
            options = arguments
        else:
            return None
        dims = int(self._function_of(node)[-2])
        stride = options.get("stride")
        if stride is None or stride == []:
            stride = size
        window = _numbers(size, dims)
        plain = (
            window is not None
            and _numbers(stride, dims) == window
            and _numbers(options.get("padding", 0), dims) == (0,) * dims
            and _numbers(options.get("dilation", 1), dims) == (1,) * dims
            and options.get("ceil_mode", False) is False
            and options.get("return_indices", False) is False
        )
        return _Pool(node, input, size, self._label(node)) if plain else None

    def _function_of(self, node: Node) -> str:
        if node.op == "call_module":
            return _POOL_CLASSES[type(self.modules[node.target])]
        return _POOL_FUNCTIONS[node.target]

    def addition(self, node: Node) -> _Addition | None:
        function = node.op == "call_function" and node.target in _ADDITIONS
        method = node.op == "call_method" and node.target in ("add", "add_")
        if not (function or method) or node.kwargs or len(node.args) != 2:
            return None
        if not all(isinstance(operand, Node) for operand in node.args):
            return None
        return _Addition(node, tuple(node.args), node.target in (operator.iadd, "add_"))

    def _only_user(self, node: Node) -> Node | None:
        if len(node.users) != 1:
            return None
        user = next(iter(node.users))
        return user if user in self.order else None

    # ---- what may be moved

    def _may_move(self, nodes: list[Node]) -> bool:
        """Whether all may be done where the last one is: nothing in between may change what they read."""
        first, last = self.order[nodes[0]], self.order[nodes[-1]]
        return not any(
            first < i < last and node not in nodes and self.may_change_something(node) for node, i in self.order.items()
        )

    def may_change_something(self, node: Node) -> bool:
        if node.op == "call_module":
            module = self.modules[node.target]
            known = type(module).__module__.startswith(("torch.nn.", "fastops.nn.", "fastops.freeze"))
            return not known or bool(in_the_way(module)) or getattr(module, "inplace", False) is not False
        if node.op == "call_method":
            return node.target.endswith("_") and not node.target.endswith("__")
        if node.op != "call_function":
            return False
        activation = self.activation(node)
        if activation is not None:
            return activation.in_place
        name, package = getattr(node.target, "__name__", ""), getattr(node.target, "__module__", "") or ""
        pure = package.startswith(("torch", "_operator", "fastops", "math", "builtins")) or isinstance(
            node.target, type(torch.relu)
        )
        changes = name.endswith("_") or node.target in _INPLACE_OPERATORS or name == "setitem" or "grad" in name
        return changes or not pure or "out" in node.kwargs or bool(node.kwargs.get("inplace"))

    def _name_values_after_in_place_activations(self) -> None:
        """x.relu_() is x: whoever reads x after it reads its result, which makes the order of things visible."""
        for node in self.graph.nodes:
            activation = self.activation(node)
            if activation is not None and activation.in_place:
                for user in tuple(activation.input.users):
                    if self.order[user] > self.order[node]:
                        user.replace_input_with(activation.input, node)

    def _leave_out_identities(self) -> None:
        for node in tuple(self.graph.nodes):
            activation = self.activation(node)
            if activation is not None and activation.resolved == _IDENTITY:
                self.findings.append(Finding("called", self._modules_of([node]), self._label(node), "nothing"))
                self._erase([node], activation.input)

    # ---- what is said

    def _label(self, node: Node) -> str:
        if node.op == "call_module":
            return type(self.modules[node.target]).__name__
        if node.target in _LAYER_FUNCTIONS or node.target in _POOL_FUNCTIONS:
            return _LAYER_FUNCTIONS.get(node.target) or _POOL_FUNCTIONS[node.target]
        if node.target in _ADDITIONS or node.target in ("add", "add_"):
            return "add"
        return node.target if node.op == "call_method" else getattr(node.target, "__name__", str(node.target))

    def _modules_of(self, nodes: list[Node]) -> tuple[str, ...]:
        return tuple(node.target for node in nodes if node.op == "call_module")

    def _explain(self) -> None:
        """What looks like a group and will not be one."""
        for node in self.graph.nodes:
            if node.op == "call_module":
                why = self._why_apart(self.modules.get(node.target))
                if why:
                    self.findings.append(Finding("apart", (node.target,), self._label(node), why))
                    continue
            if self.layer(node) or self.norm(node):
                self._explain_users(node)

    def _explain_users(self, node: Node) -> None:
        users = [user for user in node.users if self.activation(user) or self.pool(user)]
        clamps = [user for user in node.users if _is_clamp(user)]
        if users and len(node.users) > 1:
            pattern = f"{self._label(node)} + {self._label(users[0])}"
            why = f"the result in between is used by {len(node.users)} others"
            self.findings.append(Finding("apart", self._modules_of([node, users[0]]), pattern, why))
        elif users and not self._may_move([node, users[0]]):
            pattern = f"{self._label(node)} + {self._label(users[0])}"
            why = "what is called in between may change what they read"
            self.findings.append(Finding("apart", self._modules_of([node, users[0]]), pattern, why))
        elif clamps:
            why = "clamp passes the gradient on at its bounds, which no fused activation does"
            pattern = f"{self._label(node)} + {self._label(clamps[0])}"
            self.findings.append(Finding("apart", self._modules_of([node]), pattern, why))

    def _why_apart(self, module: nn.Module | None) -> str:
        if not isinstance(module, _BASES):
            return ""
        if type(module) in _LAYER_CLASSES.keys() | _NORM_CLASSES | _ACTIVATION_CLASSES | _POOL_CLASSES.keys():
            return in_the_way(module)
        if parametrize.is_parametrized(module):
            return "parametrized: its weight is computed at every call"
        base = next(cls for cls in type(module).__mro__ if cls in _BASES)
        return f"a subclass of torch.nn.{base.__name__}: its forward may differ" if base.__module__ in _TORCH else ""


_POOL_OPTIONS = ("stride", "padding", "dilation", "ceil_mode", "return_indices")
_BASES = tuple(
    cls for cls in (*_LAYER_CLASSES, *_NORM_CLASSES, *_ACTIVATION_CLASSES, *_POOL_CLASSES) if cls is not nn.Identity
)
_TORCH = {cls.__module__ for cls in _BASES if cls.__module__.startswith("torch.nn.")}


def _is_clamp(node: Node) -> bool:
    if node.op == "call_method":
        return node.target.removesuffix("_") in ("clamp", "clip", "clamp_min")
    return node.op == "call_function" and node.target in _CLAMPS


def _resolve(activation: Any) -> Resolved | None:
    """An activation that can be fused; None where it cannot."""
    try:
        kind, a, b = resolve_activation(activation)
    except (ValueError, TypeError, RuntimeError):
        return None
    return (kind, float(a), float(b)) if valid(kind, a, b) else None


def _numbers(value: Any, dims: int) -> tuple[int, ...] | None:
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    values = values * dims if len(values) == 1 else values
    return values if len(values) == dims and all(type(n) is int for n in values) else None
