"""What the blocks share: a Sequential of several layers whose forward is one call.

A block is no more than that: children under "0", "1" and so on, and the state_dict, hooks, mode and tools of a
torch.nn.Sequential. The one call stands for all children as long as each is of the class that the block made and has
no hooks. Otherwise, and where something follows the calls (torch.fx, Dynamo), they are called in turn.
"""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _torch_module

import fastops.nn as fnn
from fastops._activations import ACTIVATIONS
from fastops.functional._activation import Activation, resolve_activation


class Block(nn.Sequential):
    """A Sequential whose slices are plain ones: they are not what the class makes."""

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return nn.Sequential(OrderedDict(list(self._modules.items())[index]))
        return super().__getitem__(index)


def in_one(block: nn.Sequential, input: Tensor) -> list[nn.Module] | None:
    """The children, if one call may stand for them and is not to be followed; else None."""
    if type(input) is not Tensor or torch.compiler.is_compiling() or _torch_module._has_any_global_hook():
        return None
    children = list(block._modules.values())
    made = block.__dict__["_made"]
    if len(children) != len(made):
        return None
    for child, cls in zip(children, made, strict=True):
        state = child.__dict__
        hooks = state["_forward_hooks"] or state["_forward_pre_hooks"]
        hooks = hooks or state["_backward_hooks"] or state["_backward_pre_hooks"]
        if type(child) is not cls or hooks or "forward" in state:
            return None
    return children


def finish(block: nn.Sequential) -> None:
    """At the end of a block's __init__: notes what it consists of."""
    # The classes, and not the children: a copy has others.
    vars(block)["_made"] = tuple(type(child) for child in block)


def activation_module(activation: Activation) -> nn.Module | None:
    """A module of fastops.nn for activation=, None where that is none."""
    kind, *numbers = resolve_activation(activation)
    if kind == "identity":
        return None
    row = ACTIVATIONS[kind]
    return getattr(fnn, row.module.__name__)(**dict(zip(row.parameters, numbers, strict=False)), **row.options)


def ours(layer: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """fastops.nn's class for one of torch.nn's; anything else as it is."""
    return getattr(fnn, layer.__name__) if getattr(nn, getattr(layer, "__name__", ""), None) is layer else layer
