"""timm's own layers on fastops' kernels. fastops.registry imports this once a program has imported timm.

timm's Swish, Mish, HardSwish, HardSigmoid and QuickGELU are composed of several ops and may work in place; they stay.
"""

import torch.nn.functional as F
from torch import Tensor, nn
from torch.jit import is_scripting as _is_scripting

import fastops.functional as FF
from fastops._extras import needs
from fastops._traced import traced_as
from fastops.registry import register

with needs("fastops.timm", "timm"):
    from timm.layers import activations, linear, norm


class Linear(linear.Linear):
    """y = x W^T + b. timm's differs from torch.nn's in TorchScript alone."""

    def forward(self, input: Tensor) -> Tensor:
        if _is_scripting():
            bias = self.bias.to(dtype=input.dtype) if self.bias is not None else None
            return F.linear(input, self.weight.to(dtype=input.dtype), bias=bias)
        return FF.linear(input, self.weight, self.bias)


class GELU(activations.GELU):
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


class PReLU(activations.PReLU):
    """x where x > 0, else a learnt multiple of x."""

    def forward(self, input: Tensor) -> Tensor:
        if _is_scripting():
            return F.prelu(input, self.weight)
        return FF.prelu(input, self.weight)


class LayerNorm(norm.LayerNorm):
    """LayerNorm over the last dimension."""

    def forward(self, x: Tensor) -> Tensor:
        if _is_scripting():
            return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return FF.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


def _is_fast(module: nn.Module) -> str:
    return "timm's fast norm is on, which computes in the dtype of autocast" if module._fast_norm else ""


register(LayerNorm.__base__, LayerNorm, _is_fast)
for _cls in (Linear, GELU, GELUTanh, PReLU):
    register(_cls.__base__, _cls)

for _cls in (GELU, GELUTanh, PReLU):
    traced_as(_cls.forward, _cls.__base__.forward)
