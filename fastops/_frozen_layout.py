"""The layout of images in a frozen model, and where it is the model's again."""

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Graph, Node

import fastops.functional as FF
from fastops._frozen_int8 import static_int8
from fastops._frozen_layers import LAYERS, RESIDUAL_FIRST, FrozenLayer
from fastops._nodes import in_the_way, unpack


def suits_channels_last(model: nn.Module) -> bool:
    """Whether images go through a model as channels_last, where the caller does not say."""
    return any(
        (isinstance(m, nn.Conv2d) and m.weight.dtype != torch.float64) or static_int8(m) == "conv2d"
        for m in model.modules()
    )


def restore_layouts(graph: Graph, module: nn.Module, relaid: set[str], changes: Callable[[Node], bool]) -> None:
    """What is channels_last here and is not in the model gets the model's layout where somebody can see it.

    relaid: the names of the layers that give channels_last where the model's do not. changes: whether a node may write
    to what others read.
    """
    layouts = _Layouts(graph, module, relaid)
    layouts.find_shared(changes)
    layouts.restore()
    for node in reversed(graph.nodes):
        if not node.users and node.target in _VIEWS:
            graph.erase_node(node)


class _Layouts:
    def __init__(self, graph: Graph, module: nn.Module, relaid: set[str]) -> None:
        self.graph, self.module, self.relaid = graph, module, relaid
        # What may be in another layout than in the model, and the values that it has its layout from there: a list of
        # which the first image decides, or a tuple, in which all have to be channels_last.
        self.sources: dict[Node, list[Node] | tuple[Node, ...]] = {}
        # Sums that have the layout of their second operand here, of their first one in the model.
        self.sums: set[Node] = set()
        # Nodes that give a view of their input in one layout and a copy in another one, where somebody can tell.
        self.shared: set[Node] = set()

    def find_shared(self, changes: Callable[[Node], bool]) -> None:
        """What is written to after it, or to what it comes from."""
        written: set[Node] = set()
        for node in reversed(self.graph.nodes):
            called = self.module._modules.get(node.target) if node.op == "call_module" else None
            may_be_a_view = _may_be_a_view(node, called) or (node.op.startswith("call") and _sees_layout(node, called))
            if may_be_a_view and self._origin(node) in written:
                self.shared.add(node)
            if node.op.startswith("call") and changes(node):
                written |= {self._origin(one) for one in node.all_input_nodes}

    def _origin(self, node: Node) -> Node:
        """Where the memory of a value comes from, as far as that can be told."""
        while node.op.startswith("call") and node.all_input_nodes:
            if node.op == "call_module" and isinstance(self.module._modules.get(node.target), LAYERS):
                break
            node = node.all_input_nodes[0]
        return node

    def restore(self) -> None:
        seen: set[Node] = set()
        for node in tuple(self.graph.nodes):
            seen.add(node)
            called = self.module._modules.get(node.target) if node.op == "call_module" else None
            if isinstance(called, LAYERS):
                after = called.addition in RESIDUAL_FIRST
                if node.target in self.relaid or after or (_follows_input(called) and node.args[0] in self.sources):
                    self.sources[node] = self._sources_of(node.args[::-1] if after else node.args)
                if after:
                    self.sums.add(node)
                continue
            others = [one for one in node.all_input_nodes if one in self.sources]
            if not _sees_layout(node, called) and node not in self.shared:
                if others and not _is_size(node) and not _makes_contiguous(node, called):
                    self.sources[node] = self._sources_of(node.all_input_nodes, node.target in _JOINS)
                continue
            made: dict[Node, Node] = {}
            with self.graph.inserting_before(node):
                for one in others:
                    self._restored(one, made)
            seen |= {*made.values()}
            for one in made if node in self.shared else others:
                for user in tuple(one.users):
                    if user is node or user not in seen:
                        user.replace_input_with(one, made[one])

    def _sources_of(self, operands: Sequence[Node], all_of_them: bool = False) -> list[Node] | tuple[Node, ...]:
        parts = [self.sources.get(one, [one]) for one in operands]
        if isinstance(parts[0], tuple) and not all_of_them:
            return parts[0]
        once = dict.fromkeys(node for part in parts for node in part)
        return tuple(once) if all_of_them else list(once)

    def _restored(self, node: Node, made: dict[Node, Node]) -> Node:
        """node as it is in the model: a view is made again, of what it is a view of."""
        if node not in self.sources:
            return node
        if node not in made:
            if node.target in _VIEWS:
                made[node] = self.graph.node_copy(node, lambda one: self._restored(one, made))
            else:
                made[node] = self.graph.call_function(
                    in_the_layout_of, (node, self.sources[node], *([True] if node in self.sums else []))
                )
        return made[node]


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


def _may_be_a_view(node: Node, module: nn.Module | None) -> bool:
    """Whether a node gives a view of its input, or the input itself, in one layout and a copy in another one."""
    return isinstance(module, nn.Flatten) or node.target in _REORDERS


def _is_size(node: Node) -> bool:
    """What a node gives is no tensor."""
    if node.op == "call_method":
        return node.target in ("size", "dim", "numel")
    return node.op == "call_function" and node.target is getattr


def _follows_input(layer: nn.Module) -> bool:
    """Whether a layer gives channels_last for channels_last, as it does in the model."""
    convolves = isinstance(layer, FrozenLayer) and layer.function.startswith("conv")
    return convolves and not suggests_channels_last(layer.weight)


def _makes_contiguous(node: Node, module: nn.Module | None) -> bool:
    """What a node gives is contiguous, or of another layout that it says, whatever its input is."""
    if node.op == "call_module":
        return isinstance(module, nn.LayerNorm) and not in_the_way(module)
    if node.op == "call_method" and node.target == "to" and "memory_format" in node.kwargs:
        return node.kwargs["memory_format"] is not torch.preserve_format
    if node.op == "call_method":
        return node.target == "contiguous"
    pads_in_a_circle = node.target is F.pad and "circular" in (*node.args, *node.kwargs.values())
    return pads_in_a_circle or node.target in (F.layer_norm, FF.layer_norm, torch.layer_norm)


_JOINS = {torch.cat, torch.concat, torch.concatenate}
_REORDERS = {
    "contiguous", "to", "flatten", "ravel", "reshape", "reshape_as", torch.flatten, torch.ravel, torch.reshape,
}  # fmt: skip
_VIEWS = {
    "flatten", "ravel", "reshape", "unflatten", torch.flatten, torch.ravel, torch.reshape, torch.unflatten,
    "permute", "transpose", "movedim", "moveaxis", "swapaxes", "swapdims", "narrow", "select", "chunk", "split",
    "unbind", "squeeze", "unsqueeze", "expand", "expand_as", "unfold", "diagonal", torch.permute, torch.transpose,
    torch.movedim, torch.moveaxis, torch.swapaxes, torch.swapdims, torch.narrow, torch.select, torch.chunk, torch.split,
    torch.unbind, torch.squeeze, torch.unsqueeze, torch.diagonal, operator.getitem, unpack,
}  # fmt: skip


def suggests_channels_last(tensor: Tensor) -> bool:
    """Whether PyTorch takes a tensor for channels_last; one of size 1x1 or of one channel is contiguous, too."""
    least = 0
    if tensor.dim() != 4 or tensor.stride(1) == 0:
        return False
    for dim in (1, 3, 2, 0):
        if tensor.stride(dim) < least or (dim == 0 and least == tensor.stride(1)):
            return False
        least = tensor.stride(dim) * max(tensor.size(dim), 1)
    return True


def in_the_layout_of(value: Any, sources: Any, image: bool = False) -> Any:
    """value as it is in the model: contiguous, but if it has its layout from what is channels_last.

    image: it is one, and may have to become channels_last.
    """
    if isinstance(value, (tuple, list)):
        parts = [in_the_layout_of(one, sources) for one in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if not isinstance(value, Tensor) or (value.is_contiguous() and not image):
        return value
    last = _is_channels_last(sources)
    if not image or value.dim() != 4 or last == _is_channels_last(value):
        return value if last else value.contiguous()
    if (
        torch._C._are_functorch_transforms_active()
    ):  # vmap knows channels_last no more than it knows is_contiguous of it
        return value
    return value.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def _is_channels_last(sources: Any) -> bool | None:
    """None: they have nothing to say about it."""
    if isinstance(sources, (list, tuple)):
        known = [one for one in map(_is_channels_last, sources) if one is not None]
        if not known:
            return None
        return known[0] if isinstance(sources, list) else all(known)
    if not isinstance(sources, Tensor) or sources.dim() != 4:
        return None
    return suggests_channels_last(sources)
