"""A model as a list of calls, and the file that holds it (docs/light-runtime.md has the format)."""

import math
import os
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MAGIC, VERSION, HEADER, ALIGNMENT, CHECKED = b"\x89FOPS\r\n\x1a", 1, 64, 64, 16
# The numbers of csrc/runtime/graph.h.
ELEMENTS = {
    torch.float32: 0,
    torch.float64: 1,
    torch.bfloat16: 2,
    torch.float16: 3,
    torch.int8: 4,
    torch.uint8: 5,
    torch.int32: 6,
    torch.int64: 7,
    torch.float8_e4m3fn: 8,
}


class Value:
    """What a node reads: an input, a constant, or what another node gives."""


class Input(Value):
    def __init__(self, name: str, dtype: torch.dtype, shape: Sequence[int]) -> None:
        self.name, self.dtype, self.shape = name, dtype, list(shape)


class Constant(Value):
    """channels_last: the second dimension lies innermost in the file; the shape is the tensor's all the same."""

    def __init__(self, tensor: Tensor, channels_last: bool = False) -> None:
        self.tensor, self.channels_last = tensor, channels_last

    def content(self) -> bytes:
        tensor = self.tensor.detach()
        dense = (tensor.movedim(1, -1) if self.channels_last else tensor).contiguous().view(-1)
        return dense.view(torch.uint8).numpy().tobytes()


@dataclass(eq=False)
class Node(Value):
    """A call of an op. `sizes` of reshape and expand: each a number and whether it is multiplied by the batch."""

    op: str
    name: str
    inputs: list[Value | None]
    ints: list[int] = field(default_factory=list)
    floats: list[float] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    sizes: list[tuple[int, bool]] = field(default_factory=list)


@dataclass
class Graph:
    inputs: list[Input]
    nodes: list[Node]
    outputs: list[tuple[str, Value]]

    def constants(self) -> list[Constant]:
        """Those that are read, each once."""
        read = [one for node in self.nodes for one in node.inputs] + [value for _, value in self.outputs]
        return list(dict.fromkeys(one for one in read if isinstance(one, Constant)))

    def drop_unread(self) -> None:
        """Leaves out the nodes that no output depends on."""
        read = {value for _, value in self.outputs}
        for node in reversed(self.nodes):
            if node in read:
                read.update(one for one in node.inputs if one is not None)
        self.nodes = [node for node in self.nodes if node in read]


_FUSES_ACTIVATION = {
    "linear", "conv", "batch_norm", "linear_int8", "linear_weight_only", "sparse_linear", "conv_int8",
    "linear_int8_static",
}  # fmt: skip
_FUSES_SUM = {"linear", "conv"}


def fuse(graph: Graph) -> None:
    """Makes sums and activations that follow a layer, and nothing else reads it, part of the layer."""
    readers: dict[Value, int] = {}
    for value in [*(one for node in graph.nodes for one in node.inputs), *(value for _, value in graph.outputs)]:
        if value is not None:
            readers[value] = readers.get(value, 0) + 1
    becomes: dict[Value, Value] = {}
    nodes: list[Node] = []
    for node in graph.nodes:
        node.inputs = [becomes.get(one, one) for one in node.inputs]
        layer = _layer_for(node, readers)
        if layer is None:
            nodes.append(node)
            continue
        if node.op == "add":
            other = next(one for one in node.inputs if one is not layer)
            layer.inputs = [*[*layer.inputs, None, None][:3], other]
            nodes.remove(layer)  # its place is now where both operands are there
            nodes.append(layer)
        else:
            layer.texts[0], layer.floats[:2] = node.texts[0], node.floats
        becomes[node] = layer
        readers[layer] = readers.get(node, 0)
    graph.nodes = nodes
    graph.outputs = [(name, becomes.get(value, value)) for name, value in graph.outputs]


def _layer_for(node: Node, readers: dict[Value, int]) -> Node | None:
    def plain(one: Value | None, ops: set[str]) -> bool:
        return isinstance(one, Node) and one.op in ops and one.texts == ["identity"] and readers[one] == 1

    if node.op == "activation" and plain(node.inputs[0], _FUSES_ACTIVATION):
        return node.inputs[0]
    if node.op == "add" and node.inputs[0] is not node.inputs[1]:
        # The later one, whose result is written when the other is there.
        for one in reversed(node.inputs):
            if plain(one, _FUSES_SUM) and (len(one.inputs) < 4 or one.inputs[3] is None):
                return one
    return None


def write(graph: Graph, path: str | os.PathLike[str]) -> int:
    """Writes the file, or leaves the one that is there as it is; returns its bytes."""
    constants = graph.constants()
    weights, data, offset = [], [], 0
    for constant in constants:
        content = constant.content()
        weights.append(_tensor(constant.tensor.dtype, constant.tensor.shape) + struct.pack("<Q", offset))
        data.append(content + bytes(-len(content) % ALIGNMENT))
        offset += len(data[-1])
    number = {value: i for i, value in enumerate([*constants, *graph.inputs, *graph.nodes])}
    parts = [
        _list(weights),
        _list([_text(one.name) + _input(one) for one in graph.inputs]),
        _list([_node(node, number) for node in graph.nodes]),
        _list([_text(name) + struct.pack("<i", number[value]) for name, value in graph.outputs]),
    ]
    nodes = b"".join(parts)
    start = HEADER + len(nodes) + -len(nodes) % ALIGNMENT
    body = struct.pack("<QQQQQQ", start + offset, HEADER, len(nodes), start, offset, 0)[: HEADER - CHECKED]
    body += nodes + bytes(start - HEADER - len(nodes)) + b"".join(data)
    header = MAGIC + struct.pack("<II", VERSION, zlib.crc32(body))
    whole, target = header + body, Path(path)
    beside = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        beside.write_bytes(whole)
        beside.replace(target)
    finally:
        beside.unlink(missing_ok=True)
    return len(whole)


def _list(items: list[bytes]) -> bytes:
    return struct.pack("<I", len(items)) + b"".join(items)


def _text(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<I", len(encoded)) + encoded


def _shape(shape: Sequence[int]) -> bytes:
    return struct.pack(f"<I{len(shape)}q", len(shape), *shape)


def _tensor(dtype: torch.dtype, shape: Sequence[int]) -> bytes:
    return struct.pack("<I", ELEMENTS[dtype]) + _shape(shape)


def _input(one: Input) -> bytes:
    return struct.pack("<II", ELEMENTS[one.dtype], 0) + _shape(one.shape)


def _node(node: Node, number: dict[Value, int]) -> bytes:
    inputs = [-1 if one is None else number[one] for one in node.inputs]
    ints = [part for size, by_batch in node.sizes for part in (size, int(by_batch))] if node.sizes else node.ints
    return (
        _text(node.op)
        + _text(node.name)
        + struct.pack(f"<I{len(inputs)}i", len(inputs), *inputs)
        + struct.pack(f"<I{len(ints)}q", len(ints), *ints)
        + struct.pack(f"<I{len(node.floats)}d", len(node.floats), *node.floats)
        + _list([_text(text) for text in node.texts])
    )


# ---- recordings of one model


def joined(one: Graph, batch: int, others: Mapping[int, Graph]) -> Graph | None:
    """The graph for any batch, of those for some; None, and `one` as it was, where more differs than sizes that follow.

    others: by their batches. Two would not tell len(x) // 2 + 1 from a constant.
    """
    found = [_differences(one, other, batch, other_batch) for other_batch, other in others.items()]
    first = found[0]
    if first is None or any(each is None or each.keys() != first.keys() for each in found):
        return None
    expanded: dict[Node, list[Node]] = {}  # nodes that expand a constant, by what reads them
    for (node, what, i), change in first.items():
        if what == "size":
            node.sizes[i] = (change, True)
        else:
            sizes = [(1, True), *((size, False) for size in change.shape[1:])]
            node.inputs[i] = Node("expand", node.name, [Constant(change)], sizes=sizes)
            expanded.setdefault(node, []).append(node.inputs[i])
    one.nodes = [each for node in one.nodes for each in (*expanded.get(node, ()), node)]
    return one


def _differences(one: Graph, other: Graph, batch: int, other_batch: int) -> dict[tuple[Node, str, int], Any] | None:
    """Which sizes and constants of a node of `one` follow the batch: how many times it, and the row that repeats."""
    if len(one.nodes) != len(other.nodes) or len(one.outputs) != len(other.outputs):
        return None
    same: dict[Value, Value] = {
        **dict(zip(other.inputs, one.inputs, strict=True)),
        **dict(zip(other.nodes, one.nodes, strict=True)),
    }
    found: dict[tuple[Node, str, int], Any] = {}
    for a, b in zip(one.nodes, other.nodes, strict=True):
        if (a.op, a.ints, a.floats, a.texts, len(a.inputs)) != (b.op, b.ints, b.floats, b.texts, len(b.inputs)):
            return None
        for i, (x, y) in enumerate(zip(a.inputs, b.inputs, strict=True)):
            if isinstance(x, Constant) and isinstance(y, Constant):
                if x.tensor.shape == y.tensor.shape:
                    if x.tensor.data_ptr() != y.tensor.data_ptr() and x.content() != y.content():
                        return None
                    continue
                found[a, "input", i] = _repeated_row(x.tensor, y.tensor, batch, other_batch)
                if found[a, "input", i] is None:
                    return None
            elif (y is None) != (x is None) or (y is not None and same.get(y) is not x):
                return None
        if len(a.sizes) != len(b.sizes):
            return None
        for i, ((x, _), (y, _)) in enumerate(zip(a.sizes, b.sizes, strict=True)):
            if x == y:
                continue
            if x * other_batch != y * batch or x % batch != 0:
                return None
            found[a, "size", i] = x // batch
    for (name, x), (other_name, y) in zip(one.outputs, other.outputs, strict=True):
        if name != other_name or (same.get(y) is not x and not isinstance(x, Constant)):
            return None
    return found


def _repeated_row(x: Tensor, y: Tensor, batch: int, other_batch: int) -> Tensor | None:
    """What a constant repeats along the batch, as a class token does."""
    if (
        x.dim() == 0
        or x.shape[1:] != y.shape[1:]
        or (len(x), len(y)) != (batch, other_batch)
        or math.prod(x.shape) == 0
    ):
        return None
    row = x[:1]
    return row if bool((x == row).all() and (y == row).all()) else None


def described(graph: Graph) -> dict[str, Any]:
    """Names and shapes of the inputs, "any" for a size that is free."""
    return {one.name: tuple("any" if size < 0 else size for size in one.shape) for one in graph.inputs}
