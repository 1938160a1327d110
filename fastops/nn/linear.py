"""torch.nn.Linear on fastops' kernels."""

from typing import Any

from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling as _is_compiling

import fastops.functional as FF
from fastops import _C

_fast_linear = _C.linear


class Linear(nn.Linear):
    """torch.nn.Linear with activation=None: y = f(x W^T + b) in one kernel, both directions.

    Args:
        in_features, out_features, bias, device, dtype: as in torch.nn.Linear.
        activation: None, a name ("relu", "gelu_tanh", ...) or an activation module without parameters
        (nn.LeakyReLU(0.2)).
            It is part of the formula, not a child: parameters and state_dict are those of torch.nn.Linear.

    Shapes: (*, in_features) -> (*, out_features). Errors: see fastops.functional.linear.

    The instance needs nothing that torch.nn.Linear's does not have, so that `replace_` can turn one into the other.
    """

    activation: FF.Activation = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        activation: FF.Activation = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        if activation is not None:
            self.activation = activation

    def forward(self, input: Tensor) -> Tensor:
        # Module.__getattr__ costs more than a small product; parametrized, pruned or sharded weights are found by it
        # still.
        parameters = self._parameters
        weight = parameters.get("weight")
        if weight is None:
            weight = self.weight
        bias = parameters.get("bias")
        if bias is None and "bias" not in parameters:
            bias = self.bias
        activation = self.activation
        if activation is None and not _is_compiling():
            result = _fast_linear(input, weight, bias, 0, 0.0, 0.0)
            if result is not NotImplemented:
                return result
        return FF.linear(input, weight, bias, activation)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "activation":
            FF.resolve_activation(value)
            # Past nn.Module, which would make a child of an activation module.
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def extra_repr(self) -> str:
        text = super().extra_repr()
        return text if self.activation is None else f"{text}, activation={self.activation!r}"

    def __prepare_scriptable__(self) -> nn.Module:
        """For torch.jit.script: the same layer in torch.nn's modules, on the same parameters."""
        plain = nn.Linear.__new__(nn.Linear)
        plain.__dict__.update(self.__dict__)
        activation = plain.__dict__.pop("activation", None)
        if activation is None:
            return plain
        return nn.Sequential(plain, FF.torch_activation(activation))
