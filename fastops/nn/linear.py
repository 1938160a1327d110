"""torch.nn.Linear on fastops' kernels."""

from typing import Any

from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling as _is_compiling

import fastops.functional as FF
from fastops import _C
from fastops.functional._activation import Activation
from fastops.nn._fused import Fused

_fast_linear = _C.linear


class Linear(Fused, nn.Linear):
    """torch.nn.Linear with activation=None: y = f(x W^T + b) in one kernel, both directions.

    Args:
        in_features, out_features, bias, device, dtype: as in torch.nn.Linear.
        activation: None, a name ("relu", "gelu_tanh", ...) or an activation module without parameters
        (nn.LeakyReLU(0.2)).
            It is part of the formula, not a child: parameters and state_dict are those of torch.nn.Linear.

    Shapes: (*, in_features) -> (*, out_features). Errors: see fastops.functional.linear.

    The instance needs nothing that torch.nn.Linear's does not have, so that `replace_` can turn one into the other.
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
        weight, bias = self._weight_and_bias()
        activation = self.activation
        if activation is None and not _is_compiling():
            result = _fast_linear(input, weight, bias, 0, 0.0, 0.0)
            if result is not NotImplemented:
                return result
        return FF.linear(input, weight, bias, activation)
