"""What the layers with weights share: activation=, and their parameters found quickly."""

from typing import Any

from torch import Tensor, nn

from fastops.functional._activation import Activation, resolve_activation, torch_activation


class Fused:
    """A subclass of a torch.nn layer whose activation is part of its formula.

    The activation is no child: parameters and state_dict are those of torch.nn's layer. An instance needs nothing that
    torch.nn's does not have, so that `replace_` can turn one into the other.
    """

    activation: Activation = None

    def _weight_and_bias(self) -> tuple[Tensor, Tensor | None]:
        # Module.__getattr__ costs more than a small product; parametrized, pruned or sharded weights are found by it
        # still.
        parameters = self._parameters
        weight = parameters.get("weight")
        if weight is None:
            weight = self.weight
        bias = parameters.get("bias")
        if bias is None and "bias" not in parameters:
            bias = self.bias
        return weight, bias

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "activation":
            resolve_activation(value)
            # Past nn.Module, which would make a child of an activation module.
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def extra_repr(self) -> str:
        text = super().extra_repr()
        return text if self.activation is None else f"{text}, activation={self.activation!r}"

    def __prepare_scriptable__(self) -> nn.Module:
        """For torch.jit.script: the same layer in torch.nn's modules, on the same parameters."""
        theirs = next(cls for cls in type(self).__mro__ if cls.__module__.startswith("torch.nn."))
        plain = theirs.__new__(theirs)
        plain.__dict__.update(self.__dict__)
        activation = plain.__dict__.pop("activation", None)
        if activation is None:
            return plain
        return nn.Sequential(plain, torch_activation(activation))
