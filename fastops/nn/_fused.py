"""What the layers with weights share: their parameters found quickly, and activation=.

A layer with an activation is no torch.nn.Linear: tools that fold into one or wrap one would put their arithmetic behind
the activation, or lose it. So it is of a class of its own (FusedLinear for Linear), which shares all else with the
plain layer: parameters, state_dict, attributes. Setting `activation` turns one into the other.
"""

import sys
from abc import ABCMeta
from collections.abc import Mapping
from types import NoneType
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fastops.functional._activation import Activation, resolve_activation

FUSED: dict[type, type] = {}  # Linear -> FusedLinear
PLAIN: dict[type, type] = {}  # and back


def weight_and_bias(layer: nn.Module) -> tuple[Tensor, Tensor | None]:
    """A function and not a method: a forward that was bound before `restore_` must find it after it."""
    # Module.__getattr__ costs more than a small product; parametrized, pruned or sharded weights are found by it still.
    parameters = layer._parameters
    weight = parameters.get("weight")
    if weight is None:
        weight = layer.weight
    bias = parameters.get("bias")
    if bias is None and "bias" not in parameters:
        bias = layer.bias
    return weight, bias


def counterpart(cls: type, table: Mapping[type, type]) -> type | None:
    """table[cls]. For a class that a tool made from one in the table (parametrize, fully_shard): the same over table's.

    None where there is none, as for a class that somebody wrote: its methods may call those of its base.
    """
    if cls in table:
        return table[cls]
    if not made_by_a_tool(cls):
        return None
    bases = tuple(counterpart(base, table) or base for base in cls.__bases__)
    if bases == cls.__bases__:
        return None
    name = cls.__name__
    for old, new in zip(cls.__bases__, bases, strict=True):
        name = name.replace(old.__name__, new.__name__)
    # What type() and ABCMeta give every class of its own.
    own = ("__dict__", "__weakref__", "__abstractmethods__", "_abc_impl")
    return type(name, bases, {key: value for key, value in vars(cls).items() if key not in own})


def made_by_a_tool(cls: type) -> bool:
    """Whether cls came out of a call of type(), and not out of a class statement."""
    if "<locals>" in cls.__qualname__ or getattr(sys.modules.get(cls.__module__), cls.__qualname__, None) is cls:
        return False
    # A method with super() knows the class that it was written in.
    return not any("__class__" in getattr(value, "__code__", made_by_a_tool.__code__).co_freevars
                   for value in vars(cls).values())  # fmt: skip


def set_activation(layer: nn.Module, activation: Activation) -> None:
    """Gives the layer the class that goes with the activation, and the activation."""
    resolve_activation(activation)
    if isinstance(layer, Fused) is (activation is None):
        cls = type(layer)
        new = counterpart(cls, FUSED if activation is not None else PLAIN)
        if new is None:
            base = next(c for c in cls.__mro__ if c in FUSED or c in PLAIN)
            other = FUSED.get(base) or PLAIN[base]
            raise TypeError(
                f"activation must be {'None' if activation is not None else 'given'} in {cls.__qualname__}, a class "
                f"derived from {base.__module__}.{base.__name__}, got {activation!r}: derive it from "
                f"{other.__module__}.{other.__name__} instead"
            )
        layer.__class__ = new
    if activation is None:
        vars(layer).pop("activation", None)
    else:
        # Past nn.Module, which would make a child of an activation module.
        vars(layer)["activation"] = activation


class Fusable(metaclass=ABCMeta):  # noqa: B024 (for `register` alone, see pair)
    """What a plain layer has besides torch.nn's: activation=.

    An instance needs nothing that torch.nn's does not have, so that `replace_` can turn one into the other.
    """

    activation = None

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "activation":
            set_activation(self, value)
        else:
            super().__setattr__(name, value)


class Fused(nn.Module):
    """What the layers with an activation share. `_plain`, the class without one, is given by each."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        vars(self).update(vars(self._plain(*args, **kwargs)))

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "activation":
            set_activation(self, value)
            return
        if type(value) is nn.Parameter and "_loading" not in vars(self):
            old = self._parameters.get(name, value)
            # fully_shard sets parameters too, DTensors for plain ones and back.
            if old is not value and type(old) in (nn.Parameter, NoneType):
                raise RuntimeError(
                    f"{type(self).__name__}.{name} must stay the parameter that it is, got another one: what is folded "
                    f"into it comes before activation={self.activation!r}. Write values into it "
                    f"(layer.{name}.data.copy_(values)), tie it by layer.register_parameter({name!r}, parameter), or "
                    f"set layer.activation = None first"
                )
        super().__setattr__(name, value)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        vars(self)["_loading"] = True
        try:
            super()._load_from_state_dict(*args, **kwargs)
        finally:
            del vars(self)["_loading"]

    def reset_parameters(self) -> None:
        self._plain.reset_parameters(self)

    def extra_repr(self) -> str:
        return f"{self._plain.extra_repr(self)}, activation={self.activation!r}"

    # For torch.jit.script, which takes constants and compiles no property named here.
    __jit_unused_properties__ = ("_kind",)

    @property
    def _kind(self) -> tuple[str, float, float]:
        kind, a, b = resolve_activation(self.activation)
        return kind, float(a), float(b)


def pair(plain: type, fused: type) -> None:
    """isinstance(layer, plain) is true of both; torch.nn's class is a base of the plain one alone."""
    FUSED[plain], PLAIN[fused] = fused, plain
    plain.register(fused)


def scripted_activation(input: Tensor, kind: tuple[str, float, float]) -> Tensor:
    """A resolved activation in the language of torch.jit.script, which has neither tables nor functions as values."""
    name, a, b = kind
    if name == "relu":
        return F.relu(input)
    elif name == "relu6":
        return F.relu6(input)
    elif name == "leaky_relu":
        return F.leaky_relu(input, a)
    elif name == "elu":
        return F.elu(input, a)
    elif name == "selu":
        return F.selu(input)
    elif name == "celu":
        return F.celu(input, a)
    elif name == "gelu":
        return F.gelu(input)
    elif name == "gelu_tanh":
        return F.gelu(input, approximate="tanh")
    elif name == "silu":
        return F.silu(input)
    elif name == "mish":
        return F.mish(input)
    elif name == "sigmoid":
        return F.sigmoid(input)
    elif name == "logsigmoid":
        return F.logsigmoid(input)
    elif name == "tanh":
        return F.tanh(input)
    elif name == "softplus":
        return F.softplus(input, a, b)
    elif name == "softsign":
        return F.softsign(input)
    elif name == "hardtanh":
        return F.hardtanh(input, a, b)
    elif name == "hardsigmoid":
        return F.hardsigmoid(input)
    elif name == "hardswish":
        return F.hardswish(input)
    elif name == "hardshrink":
        return F.hardshrink(input, a)
    elif name == "softshrink":
        return F.softshrink(input, a)
    elif name == "tanhshrink":
        return F.tanhshrink(input)
    elif name == "threshold":
        return F.threshold(input, a, b)
    return input
