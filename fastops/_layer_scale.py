"""A linear layer whose output is multiplied by a factor for each feature, as "layer scale" does: one product.

Touvron et al., "Going deeper with Image Transformers" (2021), put it at the end of each residual branch; ConvNeXt and
DINOv2 have it, with the channels permuted to the front before. The factors become part of the weight: backward then
needs no output of the layer, which PyTorch keeps for the factors' gradient.
"""

import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling as _is_compiling
from torch.fx import Node

import fastops.functional as FF

_PRODUCTS = {operator.mul, operator.imul, torch.mul, torch.multiply}
_PLAIN = (Tensor, nn.Parameter)


class Scaling(NamedTuple):
    """nodes: those after the layer's, a permutation first if there is one. how: as `scaled` takes it."""

    nodes: list[Node]
    factor: Node
    dims: tuple[int, ...] | None
    how: str


def scaling_of(value: Node, only_user: Callable[[Node], Node | None]) -> Scaling | None:
    """What multiplies a value, whatever its factors are."""
    nodes, after = [], only_user(value)
    dims = None if after is None else _permutation(after)
    if dims is not None:
        nodes.append(after)
        value, after = after, only_user(after)
    if after is None or after.kwargs or len(after.args) != 2 or not all(isinstance(one, Node) for one in after.args):
        return None
    method = after.op == "call_method" and after.target in ("mul", "mul_", "multiply", "multiply_")
    if not method and not (after.op == "call_function" and after.target in _PRODUCTS):
        return None
    first, second = after.args
    if first is second:
        return None
    how = "y * s" if first is value else "s * y"
    if after.target is operator.imul or (method and after.target.endswith("_")):
        if first is not value:
            return None
        how = "y *= s"
    return Scaling([*nodes, after], second if first is value else first, dims, how)


def _permutation(node: Node) -> tuple[int, ...] | None:
    is_one = (node.op == "call_method" and node.target == "permute") or (
        node.op == "call_function" and node.target is torch.permute
    )
    if not is_one or len(node.args) + len(node.kwargs) < 2 or not set(node.kwargs) <= {"dims"}:
        return None
    dims = node.kwargs.get("dims", node.args[1:])
    if len(dims) == 1 and isinstance(dims[0], Sequence):
        (dims,) = dims
    if not all(type(one) is int for one in dims) or len({one % len(dims) for one in dims}) != len(dims):
        return None
    return tuple(one % len(dims) for one in dims)


def is_for_features(sizes: Sequence[int], features: int, rank: int, dims: tuple[int, ...] | None) -> bool:
    """Whether factors of these sizes are one for each feature of an output of `rank` dimensions, permuted to dims."""
    if dims is not None and len(dims) != rank:
        return False
    from_end = 1 if dims is None else rank - dims.index(rank - 1)
    others = sizes[: len(sizes) - from_end] + sizes[len(sizes) - from_end + 1 :]
    return from_end <= len(sizes) <= rank and sizes[-from_end] == features and all(size == 1 for size in others)


def scaled(
    input: Tensor, weights: tuple[Tensor, ...], biases: tuple[Tensor | None, ...], activation: Any, factor: Any,
    dims: tuple[int, ...] | None = None, how: str = "y * s",
) -> Tensor:  # fmt: skip
    """FF.mlp(input, weights, biases, activation).permute(dims) * factor."""
    if not _is_compiling() and _pays(input, weights[-1], factor, dims):
        factors = factor.reshape(-1)
        weights = (*weights[:-1], weights[-1] * factors.unsqueeze(1))
        if biases[-1] is not None:
            biases = (*biases[:-1], biases[-1] * factors)
        output = _chain(input, weights, biases, activation)
        return output if dims is None else output.permute(dims)
    output = _chain(input, weights, biases, activation)
    if dims is not None:
        output = output.permute(dims)
    if how == "y *= s":
        output *= factor
        return output
    return factor * output if how == "s * y" else output * factor


def _chain(input: Tensor, weights: tuple[Tensor, ...], biases: tuple[Tensor | None, ...], activation: Any) -> Tensor:
    if len(weights) == 1:
        return FF.linear(input, weights[0], biases[0])
    return FF.mlp(input, weights, biases, activation)


def _pays(input: Any, weight: Any, factor: Any, dims: tuple[int, ...] | None) -> bool:
    """Whether the factors are ones of the features, and the weight has fewer elements than the output.

    Nearly all that is saved are passes over the output, and all that it costs are passes over the weight. In 16 bits a
    weight would be rounded once more.
    """
    return (
        all(type(one) in _PLAIN for one in (input, weight, factor))
        and input.dtype in (torch.float32, torch.float64)
        and input.dtype == weight.dtype == factor.dtype
        and input.device == weight.device == factor.device
        and not torch.is_autocast_enabled(input.device.type)
        and input.dim() > 1
        and input.numel() > input.shape[-1] * weight.shape[1]
        and is_for_features(factor.shape, weight.shape[0], input.dim(), dims)
    )
