"""What a layer with weights is to the functions of fastops.light, and whether its weight can be another one."""

from collections import defaultdict
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from fastops._nodes import in_the_way
from fastops.nn._fused import PLAIN

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)


def kind_of(module: nn.Module) -> type:
    """The class by which a module is known; fastops' layers with an activation are torch.nn's."""
    return PLAIN.get(type(module), type(module))


def owners_of(model: nn.Module) -> dict[int, set[str]]:
    """The modules that hold a parameter, by its id."""
    owners: dict[int, set[str]] = defaultdict(set)
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            owners[id(parameter)].add(name)
    return owners


def checked_filter(function: str, filter_fn: Any) -> None:
    """Raises a TypeError where filter_fn cannot be called."""
    if filter_fn is not None and not callable(filter_fn):
        got = type(filter_fn).__name__
        raise TypeError(f"{function}: filter_fn must be a function of a module and its name, or None, got {got}")


def in_adapters(model: nn.Module) -> dict[int, str]:
    """Layers of peft's adapters, and below them, by id, and why they stay: merging adds to a float weight, and inputs
    are cast to the dtype of the adapter's."""
    return {
        id(module): f"a part of {type(parent).__name__} of peft, which reads its weight: get_peft_model comes after"
        for parent in model.modules()
        if "base_layer" in parent._modules and any(cls.__module__.startswith("peft.") for cls in type(parent).__mro__)
        for module in parent.modules()
    }


def why_not_written(module: nn.Module) -> str:
    """Why a layer's weight cannot be written to; "" where it can."""
    if parametrize.is_parametrized(module) or "weight" not in module._parameters:
        return "its weight is computed at every call"
    for key, parameter in module._parameters.items():
        if parameter is not None and (type(parameter) is not nn.Parameter or parameter.layout is not torch.strided):
            return f"its {key} is a {type(parameter).__name__} of layout {parameter.layout}"
    return ""


def why_not(module: nn.Module, name: str, owners: dict[int, set[str]]) -> str:
    """Why a layer cannot be made another one; "" where it can."""
    why = why_not_written(module)
    for key, parameter in module._parameters.items():
        others = owners[id(parameter)] - {name}
        if parameter is not None and others:
            why = why or f"its {key} is also that of {min(others)}"
    return why or in_the_way(module)
