"""What stands beside each other in a graph and is one call of fastops: put in its place.

`rewrite` works on a torch.fx.Graph, wherever it comes from: fastops.fuse traces modules, whose layers are
call_module nodes; Dynamo's graphs have functions of torch and parameters that are nodes. A group is a layer or a batch
norm and what follows it, as long as every result in between has one user: then nobody can tell that it is not made.
What a node is, _nodes.py says.
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling as _is_compiling
from torch.fx import Graph, Node

import fastops.functional as FF
from fastops import _C
from fastops._activations import ACTIVATIONS, KIND
from fastops._layer_scale import scaled, scaling_of
from fastops._nodes import IDENTITY, OURS, Activation, Layer, Nodes, Norm, Resolved, asks_only, is_clamp, is_view
from fastops.functional._activation import NAMES, resolve_activation


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


def rewrite(graph: Graph, module: nn.Module, joins: bool = True) -> list[Finding]:
    """Fuses what can be fused in a graph whose names are those of module. It is linted, but not recompiled.

    joins: whether additions become part of convolutions, and factors part of linear layers.

    The new nodes are call_function; parameters of a module are get_attr nodes. What fastops has a function for and
    stands alone is called by that: the graph does what it did, on fastops' kernels.
    """
    return _Rewriter(graph, module, joins).run()


# ---- the calls that fastops has no function for ----------------------------------------------------------------------


def call_batch_norm(
    module: nn.Module, input: Tensor, activation: Any = None, residual: Any = None, how: str = "y + r"
) -> Tensor:
    """A batch norm module's forward, the addition of residual and the activation."""
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
        activation, residual, how,
    )  # fmt: skip


def normalize(
    input: Tensor, running_mean: Any, running_var: Any, weight: Any = None, bias: Any = None, training: Any = False,
    momentum: Any = 0.1, eps: Any = 1e-5, activation: Any = None, residual: Any = None, how: str = "y + r",
) -> Tensor:  # fmt: skip
    """F.batch_norm, + residual, activation."""
    args = input, running_mean, running_var, weight, bias, training, momentum, eps
    alike = residual is None or (
        isinstance(residual, Tensor)
        and residual.shape == input.shape
        and residual.stride() == input.stride()  # the strides of a sum depend on both
        and residual.dtype == input.dtype
        and residual.device == input.device
    )
    if alike:
        return FF.batch_norm(*args, activation=activation, residual=residual)
    return _add(FF.batch_norm(*args), residual, how, activation)


def convolve(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
    groups: Any = 1, activation: Any = None, residual: Any = None, how: str = "y + r",
) -> Tensor:  # fmt: skip
    """A convolution, + residual, activation."""
    args = input, weight, bias, stride, padding, dilation, groups
    dims = weight.dim() - 2
    if not _is_compiling():
        kind, a, b = resolve_activation(activation)
        result = getattr(_C, f"conv_add{dims}d")(*args, residual, KIND[kind], a, b)
        if result is not NotImplemented:
            return result
    return _add(getattr(FF, f"conv{dims}d")(*args), residual, how, activation)


def attend(
    whole: Tensor, query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, dropout_p: Any = 0.0,
    is_causal: Any = False, scale: Any = None, enable_gqa: Any = False,
) -> Tensor:  # fmt: skip
    """F.scaled_dot_product_attention of what may be parts of `whole`, which has no other user.

    Where they are, and cover it, its gradient is written at once, and not put together from three.
    """
    ours = (
        attn_mask is None and dropout_p == 0.0 and enable_gqa is False and isinstance(scale, (float, int, type(None)))
    )
    if ours and type(is_causal) is bool and not _is_compiling():
        result = _C.attention_of_parts(whole, query, key, value, None, is_causal, scale)
        if result is not NotImplemented:
            return result
    return FF.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


def _add(output: Tensor, residual: Any, how: str, activation: Any) -> Tensor:
    """As the model has it: y + r, r + y or y += r. The strides of the sum follow the first operand."""
    if how == "y += r":
        output += residual
    else:
        output = residual + output if how == "r + y" else output + residual
    return output if activation is None else activate(output, activation)


def activate(input: Tensor, activation: Any) -> Tensor:
    """An activation= on its own."""
    kind, a, b = resolve_activation(activation)
    if kind == "identity":
        return input
    row = ACTIVATIONS[kind]
    return getattr(FF, row.function)(input, *(a, b)[: len(row.parameters)], **row.options)


# Activations whose backward reads their result in PyTorch, too.
_KEPT_BY_TORCH = ("identity", "relu", "sigmoid", "tanh")


def _argument(resolved: Resolved) -> Any:
    """As it is written in activation=: None, a name, or where its parameters are not the default ones all of it."""
    if resolved == IDENTITY:
        return None
    return resolved[0] if NAMES.get(resolved[0]) == resolved else resolved


def _told(resolved: Resolved) -> str:
    argument = _argument(resolved)
    return "" if argument is None else f", activation={argument!r}"


class _Rewriter(Nodes):
    def __init__(self, graph: Graph, module: nn.Module, joins: bool) -> None:
        super().__init__(graph, module)
        self.joins = joins
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
        elif node.op == "call_function" and node.target in OURS:
            node.target = OURS[node.target]
            if node.target is FF.scaled_dot_product_attention:
                self._attention(node)

    # ---- groups

    def _linear(self, first: Layer) -> None:
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
        if self.joins and activation == IDENTITY and self._scaled(layers, nodes, hidden):
            return
        if len(layers) == 1:
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

    def _scaled(self, layers: list[Layer], nodes: list[Node], hidden: Resolved | None) -> bool:
        """The layers, and what multiplies their output."""
        scaling = scaling_of(nodes[-1], self._only_user)
        if scaling is None or not self._may_move([*nodes, *scaling.nodes]):
            return False
        nodes = [*nodes, *scaling.nodes]
        with self.graph.inserting_before(nodes[-1]):
            arguments = [self._arguments(layer, nodes[-1]) for layer in layers]
        told = "linear" if len(layers) == 1 else f"mlp({len(layers)} layers{_told(hidden)})"
        more = {"dims": scaling.dims, "how": scaling.how}
        self._put(
            nodes, "linear", scaled,
            {
                "input": layers[0].input, "weights": tuple(one["weight"] for one in arguments),
                "biases": tuple(one.get("bias") for one in arguments),
                "activation": _argument(hidden) if len(layers) > 1 else None, "factor": scaling.factor,
            } | {key: value for key, value in more.items() if value},
            told=f"{told}, layer scale",
        )  # fmt: skip
        return True

    def _convolution(self, layer: Layer) -> None:
        tail, activation, nodes = self._activated(layer)
        function, pool = layer.function, None
        after = self._only_user(tail)
        if after is not None and "transpose" not in function:
            pool = self.pool(after)
            if pool is not None and (
                pool.input is not tail
                or self.pool_function(after)[-2] != function[-2]
                or not self._may_move([*nodes, after])
            ):
                pool = None
        if pool is None and self._adds(layer) and len(nodes) == 1:
            residual, how = self._take_addition(nodes, lambda node: self.norm(node) or self._adds(self.layer(node)))
            if residual is not None:
                activation = self._take_activation(nodes)
                arguments = self._arguments(layer, nodes[-1]) | {"residual": residual}
                more = {"activation": _argument(activation), "how": how}
                told = f"{function}{_told(activation)}, residual"
                self._put(nodes, function, convolve, arguments | {k: v for k, v in more.items() if v}, told=told)
                return
        arguments = self._arguments(layer, tail)
        if pool is not None:
            nodes.append(pool.node)
            if activation == IDENTITY:
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

    def _norm(self, norm: Norm) -> None:
        nodes = [norm.node]
        residual, how = self._take_addition(nodes, self.norm)
        resolved = self._take_activation(nodes)
        function = normalize
        arguments = dict(norm.arguments)
        if norm.node.op == "call_module":
            function = call_batch_norm
            with self.graph.inserting_before(nodes[-1]):
                arguments = {"module": self.graph.get_attr(norm.node.target)}
        arguments["input"] = norm.input
        more = {"activation": _argument(resolved), "residual": residual, "how": how}
        told = f"batch_norm{_told(resolved)}{', residual' if residual is not None else ''}"
        self._put(nodes, "batch_norm", function, arguments | {k: v for k, v in more.items() if v}, told=told)

    def _lone_activation(self, activation: Activation) -> None:
        kind, *parameters = activation.resolved
        row = ACTIVATIONS[kind]
        arguments = {"input": activation.input, **dict(zip(row.parameters, parameters, strict=False)), **row.options}
        if activation.in_place:
            if not row.in_place:  # torch.sigmoid_: fastops has no function for it
                return
            arguments["inplace"] = True
        self._put([activation.node], row.function, getattr(FF, row.function), arguments)

    def _attention(self, node: Node) -> None:
        """One of query, key and value that are views of one value, and what they are made by has no other user."""
        bound = inspect.signature(FF.scaled_dot_product_attention).bind(*node.args, **node.kwargs).arguments
        whole, views = None, {node}
        for name in ("query", "key", "value"):
            value = bound[name]
            while is_view(value):
                views.add(value)
                value = value.args[0]
            if not isinstance(value, Node) or whole not in (None, value):
                return
            whole = value
        if all(user in views or asks_only(user) for view in views if view is not node for user in view.users):
            node.target, node.args = attend, (whole, *node.args)

    def _is_changed_later(self, node: Node, resolved: Resolved) -> bool:
        """Whether a result is changed in place that a fused layer may keep for backward, and PyTorch does not."""
        if resolved[0] in _KEPT_BY_TORCH:
            return False
        return any(user.args and user.args[0] is node and self.may_change_something(user) for user in node.users)

    def _activated(self, layer: Layer) -> tuple[Node, Resolved, list[Node]]:
        """The layer with its activation: the last node, the activation, the nodes."""
        nodes = [layer.node]
        activation = layer.activation if layer.activation != IDENTITY else self._take_activation(nodes)
        return nodes[-1], activation, nodes

    def _take_activation(self, nodes: list[Node]) -> Resolved:
        """The activation that follows the last of nodes, and is then one of them; the identity where there is none."""
        after = self._only_user(nodes[-1])
        activation = self.activation(after) if after is not None else None
        follows = activation is not None and activation.input is nodes[-1]
        if not follows or self._is_changed_later(after, activation.resolved) or not self._may_move([*nodes, after]):
            return IDENTITY
        nodes.append(after)
        return activation.resolved

    def _take_addition(self, nodes: list[Node], takes: Callable[[Node], Any]) -> tuple[Node | None, str]:
        """What is added to the last of nodes, and how (_add; "" is "y + r"); the addition is then one of them.

        None where nothing is, or where that is better left to the other operand: takes(node) says if it could.
        """
        tail = nodes[-1]
        after = self._only_user(tail)
        addition = self.addition(after) if after is not None else None
        if addition is None:
            return None, ""
        first, second = addition.operands
        other = second if first is tail else first
        leave_it = takes(other) and self._only_user(other) is after and self.order[other] > self.order[tail]
        in_place_on_other = addition.in_place and first is not tail
        if other is tail or leave_it or in_place_on_other or not self._may_move([*nodes, after]):
            return None, ""
        nodes.append(after)
        return other, "y += r" if addition.in_place else "" if first is tail else "r + y"

    def _adds(self, layer: Layer | None) -> bool:
        """Whether an addition may become part of it."""
        function = layer.function if layer is not None and layer.activation == IDENTITY else ""
        return self.joins and function.startswith("conv") and "transpose" not in function

    def _arguments(self, layer: Layer, before: Node) -> dict[str, Any]:
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
        pattern = " + ".join(self.label(node) for node in nodes)
        self.findings.append(Finding(what, self.modules_of(nodes), pattern, told))
        self._erase(nodes, new)

    def _erase(self, nodes: list[Node], instead: Node) -> None:
        nodes[-1].replace_all_uses_with(instead)
        for node in reversed(nodes):
            self.graph.erase_node(node)
            self.order.pop(node, None)

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
            if activation is not None and activation.resolved == IDENTITY:
                self.findings.append(Finding("called", self.modules_of([node]), self.label(node), "nothing"))
                self._erase([node], activation.input)

    # ---- what is said

    def _explain(self) -> None:
        """What looks like a group and will not be one."""
        for node in self.graph.nodes:
            if node.op == "call_module":
                why = self.why_apart(self.modules.get(node.target))
                if why:
                    self.findings.append(Finding("apart", (node.target,), self.label(node), why))
                    continue
            if self.layer(node) or self.norm(node):
                self._explain_users(node)

    def _explain_users(self, node: Node) -> None:
        users = [user for user in node.users if self.activation(user) or self.pool(user)]
        clamps = [user for user in node.users if is_clamp(user)]
        if users and len(node.users) > 1:
            pattern = f"{self.label(node)} + {self.label(users[0])}"
            why = f"the result in between is used by {len(node.users)} others"
            self.findings.append(Finding("apart", self.modules_of([node, users[0]]), pattern, why))
        elif users and not self._may_move([node, users[0]]):
            pattern = f"{self.label(node)} + {self.label(users[0])}"
            why = "what is called in between may change what they read"
            self.findings.append(Finding("apart", self.modules_of([node, users[0]]), pattern, why))
        elif clamps:
            why = "clamp passes the gradient on at its bounds, which no fused activation does"
            pattern = f"{self.label(node)} + {self.label(clamps[0])}"
            self.findings.append(Finding("apart", self.modules_of([node]), pattern, why))
