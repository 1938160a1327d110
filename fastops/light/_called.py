"""What a forward does in one call of it, as a graph, for forwards that cannot be traced.

Numbers are those of the call: what a forward computes of sizes stays a constant in the graph. Which way a forward goes
by the values of its inputs is not seen either. So only what calls all of its layers is taken, and whoever uses the
graph compares the outcome.
"""

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.fx import Graph, Node
from torch.fx.node import map_aggregate
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from fastops.fuse import is_layer


class Call(TorchFunctionMode):
    """The graph of a call. values: those of its placeholders: the tensors that nothing in the graph gives."""

    def __init__(self, root: nn.Module) -> None:
        super().__init__()
        self.root, self.graph, self.values = root, Graph(), []
        self.called: set[int] = set()
        self._names = {id(module): name for name, module in root.named_modules()}
        self._held = {
            id(tensor): f"{name}.{key}" if name else key
            for name, module in root.named_modules()
            for key, tensor in (*module._parameters.items(), *module._buffers.items())
            if tensor is not None
        }
        self._nodes: dict[int, Node] = {}
        self._alive: list[Tensor] = []  # so that no other tensor gets the id of one that is known
        self._depth = 0

    def record(self, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Calls the module.

        Raises:
            TypeError: its output is not made of tensors, tuples, lists and dicts, so that not all of it is known.
        """
        with self._watching(), self:
            result = self.root(*args, **named)
        leaves = tree_leaves(result)
        if not all(one is None or isinstance(one, (Tensor, bool, int, float, str)) for one in leaves):
            raise TypeError("its forward gives other things than tensors")
        unused = [node for node in self.graph.nodes if not node.users and node.op != "placeholder"]
        known = [self._nodes[id(one)] for one in leaves if isinstance(one, Tensor) and id(one) in self._nodes]
        self.graph.output(tuple(dict.fromkeys([*known, *unused])))

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if self._depth == 0 and self._depends((args, kwargs)):
            self._note(function, args, kwargs, result)
        return result

    def _note(self, function: Callable[..., Any], args: Any, kwargs: Any, result: Any) -> None:
        name = getattr(function, "__name__", "")
        has_tensors = any(isinstance(one, Tensor) for one in tree_leaves(result))
        if not has_tensors and result is not None:  # a size or another number
            return
        if name == "__get__":
            op, target, args = "call_function", getattr, (*args[:1], function.__self__.__name__)
        elif getattr(Tensor, name, None) is function:
            op, target = "call_method", name
        else:
            op, target = "call_function", function
        self._bind(self.graph.create_node(op, target, self._argument(args), self._argument(kwargs)), result)

    def _bind(self, node: Node, result: Any) -> None:
        if isinstance(result, Tensor):
            self._alive.append(result)
            self._nodes[id(result)] = node
        elif isinstance(result, (tuple, list)):
            for i, one in enumerate(result):
                self._bind(self.graph.call_function(operator.getitem, (node, i)), one)

    def _depends(self, arguments: Any) -> bool:
        found = [id(one) for one in tree_leaves(arguments) if isinstance(one, Tensor)]
        return any(one in self._nodes or one in self._held for one in found)

    def _argument(self, argument: Any) -> Any:
        return map_aggregate(argument, lambda one: self._node(one) if isinstance(one, Tensor) else one)

    def _node(self, tensor: Tensor) -> Node:
        if id(tensor) not in self._nodes:
            if id(tensor) in self._held:
                node = self.graph.get_attr(self._held[id(tensor)])
            else:
                node = self.graph.placeholder(f"value_{len(self.values)}")
                self.values.append(tensor)
            self._bind(node, tensor)
        return self._nodes[id(tensor)]

    @contextmanager
    def _watching(self) -> Iterator[None]:
        """Layers are called as such; what goes on in them is not looked at."""
        hooks = []
        for module in self.root.modules():
            if is_layer(module):
                hooks.append(module.register_forward_pre_hook(self._enter))
                hooks.append(module.register_forward_hook(self._leave, with_kwargs=True))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _enter(self, module: nn.Module, args: Any) -> None:
        self._depth += 1

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        self._depth -= 1
        self.called.add(id(module))
        if self._depth == 0:
            node = self.graph.call_module(self._names[id(module)], self._argument(args), self._argument(kwargs))
            self._bind(node, result)


def calls_of(root: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> list[Call]:
    """A call in eval mode, and one for which only the layers are in it.

    Raises:
        TypeError: not all layers with parameters are called. What the forward raises.
    """
    modules = [module for module in root.modules() if not is_layer(module)]
    found = []
    try:
        for mode in (False, True):
            for module in modules:
                module.training = mode
            found.append(Call(root))
            found[-1].record(args, named)
    finally:
        for module in modules:
            module.training = False
    called = found[0].called | found[1].called
    for module in root.modules():
        if is_layer(module) and id(module) not in called and next(module.parameters(), None) is not None:
            raise TypeError("its forward calls not all of its layers")
    return found
