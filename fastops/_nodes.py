"""What a node of a graph is to fastops: a layer, a norm, an activation, a max pool, an addition, by any of its names.

Nodes are calls of modules, as in the graphs of fastops.fuse, or of functions and methods of torch, as in Dynamo's.
"""

import inspect
import operator
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Graph, Node, Proxy
from torch.nn.utils import parametrize

import fastops.functional as FF
import fastops.nn as fnn
from fastops._activations import ACTIVATIONS, two, valid
from fastops.functional._activation import NAMES, resolve_activation
from fastops.nn._fused import FUSED

Resolved = tuple[str, float, float]  # an activation, as resolve_activation has it


def in_the_way(module: nn.Module) -> str:
    """Why a module has to be called as a module, whatever its class; "" where its forward is all that a call is."""
    return in_the_way_of_forward(module) or ("its class has a __call__ of its own" if has_its_own_call(module) else "")


def in_the_way_of_forward(module: nn.Module) -> str:
    """The same for what nn.Module.__call__ does."""
    state = vars(module)
    if any(state.get(hooks) for hooks in HOOKS):
        return "it has hooks"
    return "its forward has been overridden on the instance" if "forward" in state else ""


def has_its_own_call(module: nn.Module) -> bool:
    return type(module).__call__ is not nn.Module.__call__


def unpack(value: Any, count: int) -> Any:
    """What a, b = value gives two names."""
    if isinstance(value, Proxy):  # in a trace of somebody else's
        return [value[i] for i in range(count)]
    items = tuple(value)
    if len(items) > count:
        raise ValueError(f"too many values to unpack (expected {count})")
    if len(items) < count:
        raise ValueError(f"not enough values to unpack (expected {count}, got {len(items)})")
    return items


# node.meta[LAYER]: the layer of another library (registry.py) whose forward made the node.
LAYER = "fastops_layer"

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


# What fastops has under the name and with the arguments that torch.nn.functional has.
OURS = {getattr(F, name): getattr(FF, name) for name in FF.__all__ if hasattr(F, name)}

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

_VIEWS = {
    "chunk", "flatten", "movedim", "permute", "reshape", "select", "split", "squeeze", "swapaxes", "transpose",
    "unbind", "unflatten", "unsqueeze", "view",
}  # fmt: skip
_VIEW_FUNCTIONS = {operator.getitem, unpack, *(getattr(torch, name) for name in _VIEWS if hasattr(torch, name))}

# What torch.fx writes for x += y and so on, which Python's operators do in place.
_INPLACE_OPERATORS = {
    getattr(operator, name)
    for name in ("iadd", "isub", "imul", "imatmul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor")
}

_INPLACE_METHODS = {"__setitem__", "__delitem__", *(f"__{function.__name__}__" for function in _INPLACE_OPERATORS)}

# What begins or ends a block in Dynamo's graphs: _enter_autocast, _set_grad_enabled, _vmap_increment_nesting.
_MODES = re.compile("^_?(enter|exit|push|pop|set)_|grad|nesting|hooks").search

_CHANGE_NOTHING = ("torch.nn.", "fastops.nn.", "fastops.light.", "fastops.freeze", "fastops._frozen")

_POOL_OPTIONS = ("stride", "padding", "dilation", "ceil_mode", "return_indices")
_BASES = tuple(
    cls for cls in (*_LAYER_CLASSES, *_NORM_CLASSES, *_ACTIVATION_CLASSES, *_POOL_CLASSES) if cls is not nn.Identity
)
_TORCH = {cls.__module__ for cls in _BASES if cls.__module__.startswith("torch.nn.")}

# ---- what a node is --------------------------------------------------------------------------------------------------


class Layer(NamedTuple):
    node: Node
    function: str
    input: Node
    arguments: dict[str, Any]  # of a call_function; those of a module are read when the group is made
    activation: Resolved
    label: str


class Norm(NamedTuple):
    node: Node
    input: Node
    arguments: dict[str, Any]
    label: str


class Activation(NamedTuple):
    node: Node
    input: Node
    resolved: Resolved
    in_place: bool
    label: str


class Pool(NamedTuple):
    node: Node
    input: Node
    size: Any
    label: str


class Addition(NamedTuple):
    node: Node
    operands: tuple[Node, Node]
    in_place: bool


IDENTITY: Resolved = NAMES["identity"]


class Nodes:
    """The nodes of a graph whose names are those of a module; they are asked for what they are."""

    def __init__(self, graph: Graph, module: nn.Module) -> None:
        self.graph = graph
        self.modules = dict(module.named_modules(remove_duplicate=False))

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

    def layer(self, node: Node) -> Layer | None:
        if module := self._plain(node, _LAYER_CLASSES):
            if not {"weight", "bias"} <= module._parameters.keys() or module._parameters["weight"] is None:
                return None
            resolved = _resolve(getattr(module, "activation", None))
            if resolved is None or ("Transpose" in type(module).__name__ and module.padding_mode != "zeros"):
                return None
            return Layer(node, _LAYER_CLASSES[type(module)], node.args[0], {}, resolved, self.label(node))
        if node.op == "call_function" and node.target in _LAYER_FUNCTIONS:
            name = _LAYER_FUNCTIONS[node.target]
            arguments = self._bound(node, getattr(FF, name))
            if arguments is None or not isinstance(arguments.get("weight"), Node):
                return None
            resolved = _resolve(arguments.pop("activation", None))
            return resolved and Layer(node, name, arguments["input"], arguments, resolved, name)
        return None

    def norm(self, node: Node) -> Norm | None:
        if module := self._plain(node, _NORM_CLASSES):
            buffers = {"running_mean", "running_var", "num_batches_tracked"} <= module._buffers.keys()
            known = buffers and {"weight", "bias"} <= module._parameters.keys()
            return Norm(node, node.args[0], {}, self.label(node)) if known else None
        if node.op == "call_function" and node.target is F.batch_norm:
            arguments = self._bound(node, F.batch_norm)
            return arguments and Norm(node, arguments["input"], arguments, "batch_norm")
        return None

    def activation(self, node: Node) -> Activation | None:
        if module := self._plain(node, _ACTIVATION_CLASSES):
            resolved = _resolve(module)
            in_place = getattr(module, "inplace", False)
            return resolved and Activation(node, node.args[0], resolved, in_place, self.label(node))
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

    def _activation_call(self, node: Node, name: str, in_place: bool) -> Activation | None:
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
        return Activation(node, args[0], (kind.name, *map(float, numbers)), in_place, self.label(node))

    def pool(self, node: Node) -> Pool | None:
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
        dims = int(self.pool_function(node)[-2])
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
        return Pool(node, input, size, self.label(node)) if plain else None

    def pool_function(self, node: Node) -> str:
        if node.op == "call_module":
            return _POOL_CLASSES[type(self.modules[node.target])]
        return _POOL_FUNCTIONS[node.target]

    def addition(self, node: Node) -> Addition | None:
        function = node.op == "call_function" and node.target in _ADDITIONS
        method = node.op == "call_method" and node.target in ("add", "add_")
        if not (function or method) or node.kwargs or len(node.args) != 2:
            return None
        if not all(isinstance(operand, Node) for operand in node.args):
            return None
        return Addition(node, tuple(node.args), node.target in (operator.iadd, "add_"))

    def may_change_something(self, node: Node) -> bool:
        """Whether a node may write to what others read, as far as can be told: where not, it may."""
        if node.op == "call_module":
            module = self.modules[node.target]
            known = type(module).__module__.startswith(_CHANGE_NOTHING)
            return not known or bool(in_the_way(module)) or getattr(module, "inplace", False) is not False
        if node.op == "call_method":
            name = node.target
            return name in _INPLACE_METHODS if name.endswith("__") else name.endswith("_")
        if node.op != "call_function":
            return False
        activation = self.activation(node)
        if activation is not None:
            return activation.in_place
        name, package = getattr(node.target, "__name__", ""), getattr(node.target, "__module__", "") or ""
        pure = package.startswith(("torch", "_operator", "fastops", "math", "builtins")) or isinstance(
            node.target, type(torch.relu)
        )
        changes = name.endswith("_") or node.target in _INPLACE_OPERATORS or name == "setitem" or _MODES(name)
        return changes or not pure or "out" in node.kwargs or bool(node.kwargs.get("inplace"))

    def label(self, node: Node) -> str:
        if node.op == "call_module":
            return type(self.modules[node.target]).__name__
        if node.target in _LAYER_FUNCTIONS or node.target in _POOL_FUNCTIONS:
            return _LAYER_FUNCTIONS.get(node.target) or _POOL_FUNCTIONS[node.target]
        if node.target in _ADDITIONS or node.target in ("add", "add_"):
            return "add"
        return node.target if node.op == "call_method" else getattr(node.target, "__name__", str(node.target))

    def modules_of(self, nodes: list[Node]) -> tuple[str, ...]:
        names = (node.target if node.op == "call_module" else node.meta.get(LAYER) for node in nodes)
        return tuple(dict.fromkeys(name for name in names if name))

    def why_apart(self, module: nn.Module | None) -> str:
        if not isinstance(module, _BASES):
            return ""
        if type(module) in _LAYER_CLASSES.keys() | _NORM_CLASSES | _ACTIVATION_CLASSES | _POOL_CLASSES.keys():
            return in_the_way(module)
        if parametrize.is_parametrized(module):
            return "parametrized: its weight is computed at every call"
        base = next(cls for cls in type(module).__mro__ if cls in _BASES)
        return f"a subclass of torch.nn.{base.__name__}: its forward may differ" if base.__module__ in _TORCH else ""


def is_view(value: Any) -> bool:
    """Whether a value is a node that gives a view of its first argument, or may: reshape copies where it has to."""
    if not isinstance(value, Node) or not value.args:
        return False
    if value.op == "call_method":
        return value.target in _VIEWS
    return value.op == "call_function" and value.target in _VIEW_FUNCTIONS


def asks_only(node: Node) -> bool:
    """Whether a node asks what a tensor is, such as its shape, and not for its elements."""
    if node.op == "call_method":
        return node.target in ("size", "dim", "numel", "stride")
    return (
        node.op == "call_function" and node.target is getattr and node.args[1] in ("shape", "ndim", "dtype", "device")
    )


def is_clamp(node: Node) -> bool:
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
