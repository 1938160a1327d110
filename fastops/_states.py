"""What a forward may change while it is traced: its module, random numbers, the modes of PyTorch."""

import random
import sys
from typing import Any

import torch
from torch import nn
from torch.fx.proxy import TraceError
from torch.overrides import _get_current_function_mode_stack

from fastops._outside import contents_of, put_back, same_contents


class State:
    """A module's attributes at one time, down to what is in lists, dicts and sets, and the versions of its tensors."""

    def __init__(self, module: nn.Module) -> None:
        self.attributes = dict(vars(module))
        self.contents = {
            key: contents_of(value) for key, value in self.attributes.items() if isinstance(value, (list, dict, set))
        }
        self.versions = [(tensor, version(tensor)) for tensor in self._tensors()]

    def _tensors(self) -> list[torch.Tensor]:
        places = (self.attributes, self.attributes.get("_buffers", {}), self.attributes.get("_parameters", {}))
        return [value for place in places for value in place.values() if isinstance(value, torch.Tensor)]

    def check(self, module: nn.Module) -> None:
        now = vars(module)
        same = now.keys() == self.attributes.keys()
        same = same and all(now[key] is value for key, value in self.attributes.items())
        for key, before in self.contents.items():
            same = same and same_contents(before, self.attributes[key])
        if not same:
            raise TraceError("its forward changes its attributes")
        if any(version(tensor) != before for tensor, before in self.versions):
            raise TraceError("its forward changes a tensor of its own")

    def restore(self, module: nn.Module) -> None:
        for key, before in self.contents.items():
            value = self.attributes[key]
            if not same_contents(before, value):
                put_back(value, before)
        now = vars(module)
        if now.keys() != self.attributes.keys() or any(now[key] is not v for key, v in self.attributes.items()):
            now.clear()
            now.update(self.attributes)


def version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def random_state() -> tuple[Any, ...]:
    numpy = sys.modules.get("numpy")
    return torch.get_rng_state(), random.getstate(), numpy and numpy.random.get_state()[1:3]


def same_random_state(before: tuple[Any, ...], after: tuple[Any, ...]) -> bool:
    same = torch.equal(before[0], after[0]) and before[1] == after[1]
    return same and (not before[2] or (bool((before[2][0] == after[2][0]).all()) and before[2][1] == after[2][1]))


def ambient(ours: type) -> tuple[Any, ...]:
    """What a `with` around operations changes. ours: a mode that does not count."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_enabled("cuda"),
        torch.get_autocast_dtype("cpu"),
        torch._C._autograd._top_saved_tensors_default_hooks(True) is not None,
        torch._C._len_torch_dispatch_stack(),
        torch.get_default_dtype(),
        sum(type(mode) is not ours for mode in _get_current_function_mode_stack()),
    )
