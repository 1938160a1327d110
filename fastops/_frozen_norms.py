"""Batch norms and factors of features in a frozen model: those that follow a layer become part of its weights."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Graph, Node

import fastops.nn as fnn
from fastops._nodes import in_the_way

# The norms that take what a layer gives, where that is a batch.
NORMS = {
    getattr(package, f"BatchNorm{n}d"): {getattr(nn, f"Conv{n}d"), getattr(fnn, f"Conv{n}d")}
    | ({nn.Linear, fnn.Linear} if n == 1 else set())
    for package in (nn, fnn)
    for n in (1, 2, 3)
    if hasattr(package, f"BatchNorm{n}d")
}


def norms_after_layers(
    graph: Graph, module: nn.Module, fits: Callable[[nn.Module, nn.Module], bool]
) -> Iterator[tuple[Node, nn.Module, Node, nn.Module]]:
    """The batch norms that alone take what a layer gives: call and module of the norm, and of the layer.

    fits(layer, norm): whether the classes are ones that can be one layer. The graph may be changed meanwhile.
    """
    modules = dict(module.named_modules())
    for node in tuple(graph.nodes):
        norm = modules.get(node.target) if node.op == "call_module" else None
        if type(norm) not in NORMS or norm.running_mean is None or len(node.args) != 1 or in_the_way(norm):
            continue
        before = node.args[0]
        layer = modules.get(before.target) if isinstance(before, Node) and before.op == "call_module" else None
        if (
            layer is not None
            and fits(layer, norm)
            and len(layer.weight) == len(norm.running_mean)
            and len(before.users) == 1
            and not in_the_way(layer)
            and not getattr(layer, "activation", None)
        ):
            yield node, norm, before, layer


class Apart(nn.Module):
    """A layer and the batch norm that was folded into it, for the inputs for which that is something else.

    A norm's channels are dimension 1. They are a layer's only if its output has `dims` dimensions; of another one the
    norm takes those of another dimension, or raises an error.
    """

    def __init__(self, layer: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        linear = isinstance(layer, nn.Linear)
        self.dims = 2 if linear else layer.weight.dim()
        self.others = linear  # whether more dimensions, too, are for the norm
        self.eps, self.check = norm.eps, type(norm)._check_input_dim
        # The others' weights are not kept: of an image without a batch the norm raises an error.
        tensors = {"weight": layer.weight, "bias": layer.bias} if linear or isinstance(layer, nn.Conv1d) else {}
        tensors |= {"scale": norm.weight, "shift": norm.bias, "mean": norm.running_mean, "var": norm.running_var}
        for name, tensor in tensors.items():
            self.register_buffer(name, None if tensor is None else tensor.detach())

    def takes(self, input: Tensor) -> bool:
        return input.dim() != self.dims and (self.others or input.dim() == self.dims - 1)

    def forward(self, input: Tensor, function: Callable[..., Tensor], options: dict[str, Any]) -> Tensor:
        if "weight" in self._buffers:
            input = function(input, self.weight, self.bias, **options)
        self.check(self, input)
        return F.batch_norm(input, self.mean, self.var, self.scale, self.shift, False, 0.0, self.eps)


def folded(layer: nn.Module, norm: nn.Module) -> nn.Module:
    """The layer followed by the batch norm, as one layer. Computed in float64 and rounded once."""
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.detach().double()
    shift = 0.0 if layer.bias is None else layer.bias.detach().double()
    bias = (shift - norm.running_mean.double()) * scale
    if norm.bias is not None:
        bias = bias + norm.bias.detach().double()
    weight = layer.weight.detach()
    scaled = weight.double() * scale.view(-1, *[1] * (weight.dim() - 1))
    return _with_tensors(layer, scaled, bias)


def with_factors(layer: nn.Linear, factor: Tensor) -> nn.Linear:
    """The layer whose output is multiplied by factors of its features. Computed in float64 and rounded once."""
    factors = factor.detach().double().reshape(-1)
    bias = None if layer.bias is None else layer.bias.detach().double() * factors
    return _with_tensors(layer, layer.weight.detach().double() * factors.unsqueeze(1), bias)


def _with_tensors(layer: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """A copy of the layer with these, rounded to its dtype."""
    result = copy.copy(layer)
    for name in ("weight", "bias"):  # tensors that are plain attributes would be found first
        vars(result).pop(name, None)
    vars(result)["_parameters"] = {
        name: None if tensor is None else nn.Parameter(tensor.to(layer.weight.dtype), False)
        for name, tensor in (("weight", weight), ("bias", bias))
    }
    return result
