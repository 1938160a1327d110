"""torch.nn.Linear on fastops' kernels."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling as _is_compiling
from torch.jit import is_scripting as _is_scripting

import fastops.functional as FF
from fastops import _C
from fastops._traced import traced_as
from fastops.functional._activation import Activation
from fastops.functional._general import COMPILED_WEIGHT_FROM
from fastops.nn._fused import Fusable, Fused, pair, scripted_activation, weight_and_bias

__all__ = ["Linear"]

_fast_linear = _C.linear


class Linear(Fusable, nn.Linear):
    """y = f(x W^T + b), in one kernel forward and backward; f is the identity unless activation says otherwise.

    Args:
        in_features, out_features: the sizes of the last dimension of x and y.
        bias: whether there is a b. Default: True.
        device, dtype: of the parameters.
        activation: None, a name ("relu", "gelu_tanh", ...) or an activation module without parameters
            (nn.LeakyReLU(0.2)). It is no child, so that parameters and state_dict are those of torch.nn.Linear. It may
            be set later: layer.activation = "relu".

    A layer with an activation is a FusedLinear, and no torch.nn.Linear: tools that fold a factor into one, or wrap one,
    would do so on the wrong side of the activation. isinstance(layer, fastops.nn.Linear) is true of both.

    Shape: x (*, in_features), weight (out_features, in_features), bias (out_features), y (*, out_features).
    Dtypes: float32, float64, bfloat16, float16; others go to PyTorch's kernels.
    Raises: ValueError: an activation that does not exist or cannot be fused. When called, see functional.linear.
    Source: torch.nn.Linear.

    >>> layer = fnn.Linear(20, 30, activation="relu")
    >>> layer(torch.randn(128, 20)).shape
    torch.Size([128, 30])
    >>> list(layer.state_dict())
    ['weight', 'bias']
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        activation: Activation = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        if activation is not None:
            self.activation = activation

    def forward(self, input: Tensor) -> Tensor:
        if _is_scripting():
            return F.linear(input, self.weight, self.bias)
        weight, bias = weight_and_bias(self)
        # A FusedLinear's, if this was bound before it became one.
        activation = self.__dict__.get("activation")
        if activation is None and not _is_compiling():
            result = _fast_linear(input, weight, bias, 0, 0.0, 0.0)
            if result is not NotImplemented:
                return result
        return FF.linear(input, weight, bias, activation)


def _in_a_graph(self: nn.Module, input: Tensor) -> Tensor:
    """Linear.forward for Dynamo: functional.linear's policy, with fewer guards where the layer is PyTorch's."""
    weight = self.weight
    if weight.is_cpu and weight.numel() < COMPILED_WEIGHT_FROM:
        return F.linear(input, weight, self.bias)
    return FF.linear(input, weight, self.bias)


traced_as(Linear.forward, _in_a_graph)


class FusedLinear(Fused):
    """What Linear(..., activation=f) makes: f(x W^T + b). Derive from it, not from Linear, for a layer that has one."""

    _plain = Linear
    __constants__ = (*nn.Linear.__constants__, "_kind")

    def forward(self, input: Tensor) -> Tensor:
        if _is_scripting():
            return scripted_activation(F.linear(input, self.weight, self.bias), self._kind)
        weight, bias = weight_and_bias(self)
        return FF.linear(input, weight, bias, self.__dict__.get("activation"))


pair(Linear, FusedLinear)
