"""transformers' own layers on fastops' kernels. fastops.registry imports this once a program has imported transformers.

FastGELUActivation and AccurateGELUActivation are the tanh GELU with constants of fewer digits; QuickGELUActivation,
ReLUSquaredActivation and the like are not here, because no kernel computes them.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.jit import is_scripting as _is_scripting

import fastops.functional as FF
from fastops._extras import needs
from fastops._traced import traced_as
from fastops.registry import register

with needs("fastops.huggingface", "huggingface"):
    from transformers import activations, pytorch_utils


class Conv1D(pytorch_utils.Conv1D):
    """y = x W + b, of GPT-2: a linear layer whose weight is stored transposed."""

    def forward(self, x: Tensor) -> Tensor:
        if _is_scripting():
            return F.linear(x, self.weight.t(), self.bias)
        return FF.linear(x, self.weight.t(), self.bias)


class GELUActivation(activations.GELUActivation):
    """The erf GELU."""

    def forward(self, input: Tensor) -> Tensor:
        if _is_scripting():
            return F.gelu(input)
        return FF.gelu(input)


class GELUTanh(activations.GELUTanh):
    """The tanh GELU."""

    def forward(self, input: Tensor) -> Tensor:
        if _is_scripting():
            return F.gelu(input, approximate="tanh")
        return FF.gelu(input, approximate="tanh")


class NewGELUActivation(activations.NewGELUActivation):
    """The tanh GELU, which transformers composes of eight ops."""

    def forward(self, input: Tensor) -> Tensor:
        if _is_scripting():
            return F.gelu(input, approximate="tanh")
        return FF.gelu(input, approximate="tanh")


class SiLUActivation(activations.SiLUActivation):
    """SiLU."""

    def forward(self, input: Tensor) -> Tensor:
        if _is_scripting():
            return F.silu(input)
        return FF.silu(input)


class MishActivation(activations.MishActivation):
    """Mish."""

    def forward(self, input: Tensor) -> Tensor:
        if _is_scripting():
            return F.mish(input)
        return FF.mish(input)


def _act_is_another(module: nn.Module) -> str:
    """Its forward calls `act`, which somebody may have set."""
    fresh = type(module)()
    return "" if _same(module.act, fresh.act) or _is_own(module) else "its act is not the function of its class"


def _same(one: Any, other: Any) -> bool:
    """Functions, or two partials of one."""
    parts = ("func", "args", "keywords")
    return one is other or (
        hasattr(one, "func") and all(getattr(one, part) == getattr(other, part, None) for part in parts)
    )


def _is_own(module: nn.Module) -> bool:
    """Whether act is the same formula, as a method: use_gelu_python=True."""
    return getattr(module.act, "__self__", None) is module and module.act.__name__.startswith("_gelu")


register(pytorch_utils.Conv1D, Conv1D)
register(activations.GELUActivation, GELUActivation, _act_is_another)
register(activations.GELUTanh, GELUTanh, _act_is_another)
register(activations.NewGELUActivation, NewGELUActivation)
register(activations.SiLUActivation, SiLUActivation)
register(activations.MishActivation, MishActivation, _act_is_another)

for _cls in (GELUActivation, GELUTanh, NewGELUActivation, SiLUActivation, MishActivation):
    traced_as(_cls.forward, _cls.__base__.forward)
