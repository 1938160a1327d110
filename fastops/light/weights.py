"""Weights that are 0: masks of torch.nn.utils.prune, taken over."""

import torch
from torch import nn
from torch.nn.utils import prune

from fastops.light._changes import Changes, parameters_of
from fastops.replace import Row
from fastops.replace import _name as class_name

__all__ = ["take_masks_"]


@torch.inference_mode(False)
def take_masks_(model: nn.Module) -> Changes:
    """Makes the masks of torch.nn.utils.prune permanent, in place: `weight` is a parameter again, with zeros in it.

    `weight_orig` and `weight_mask`, and the hook that multiplied them at every call, are gone, and the weight is a
    new parameter: make the model's optimizer afterwards.

    Args:
        model: any module.

    Returns:
        Changes: how much of which tensor is 0.

    Raises:
        TypeError: model is not a torch.nn.Module.

    Source: torch.nn.utils.prune.remove, for all modules of a model.

    >>> from fastops import light
    >>> model = nn.Sequential(nn.Linear(10, 10))
    >>> _ = torch.nn.utils.prune.l1_unstructured(model[0], "weight", amount=0.9)
    >>> print(light.take_masks_(model))
    0.weight  torch.nn.Linear  ->  90.0% zeros
    110 parameters -> 110
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"take_masks_: model must be a torch.nn.Module, got {type(model).__name__}")
    changes = Changes(before=parameters_of(model))
    for name, module in model.named_modules():
        hooks = [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, prune.BasePruningMethod)]
        for key in [hook._tensor_name for hook in hooks]:
            prune.remove(module, key)
            weight = getattr(module, key)
            share = 1 - int(weight.detach().count_nonzero()) / max(weight.numel(), 1)
            path = f"{name}.{key}" if name else key
            changes.changed.append(Row(path, class_name(type(module)), f"{share:.1%} zeros"))
    changes.after = parameters_of(model)
    return changes
