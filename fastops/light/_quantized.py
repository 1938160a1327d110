"""What the layers with quantized weights share."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.compiler import is_dynamo_compiling as _is_compiling

import fastops.nn as fnn
from fastops._activations import KIND
from fastops.export import exports_aten
from fastops.functional._activation import Activation, resolve_activation, torch_activate
from fastops.nn._fused import Fused
from fastops.ops import autocast


class Layer(nn.Module):
    """What has an activation, and buffers whose dtypes stay, whatever the model is cast to."""

    activation: Activation
    _buffer_names: tuple[str, ...] = ()

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "activation":
            resolve_activation(value)
            # Past nn.Module, which would make a child of an activation module.
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Layer":
        before = {name: getattr(self, name) for name in self._buffer_names}
        super()._apply(fn, recurse)
        for name, tensor in before.items():
            if tensor is not None and getattr(self, name).dtype != tensor.dtype:
                setattr(self, name, tensor.to(getattr(self, name).device))
        return self

    def __prepare_scriptable__(self) -> None:
        """What torch.jit.script asks for first."""
        raise RuntimeError(
            f"torch.jit.script cannot compile fastops.light.{type(self).__name__}: trace the model, "
            "torch.jit.trace(model, inputs), or script it before it is quantized"
        )

    def _traced(self, input: Any) -> Any:
        """What a trace gets of a call: a layer is a leaf, as torch.nn's are. None of a call."""
        if not isinstance(input, fx.Proxy):
            return None
        if getattr(input.tracer, "root", self) is self:
            raise TypeError(
                f"{type(self).__name__}: a trace calls the layer and does not look into it: trace a model that holds "
                "it, such as nn.Sequential(layer)"
            )
        return input.tracer.create_proxy("call_module", input.tracer.path_of_module(self), (input,), {})


class Quantized(Layer):
    """y = f(x W + b), where buffers stand for W. A subclass says which, and computes x W + b three ways."""

    bias: nn.Parameter | None

    def _set(self, weight: Tensor) -> None:
        """Makes the buffers of a float weight."""
        raise NotImplementedError

    def _fast(self, input: Tensor, activation: tuple[int, float, float]) -> Any:
        """The output, or NotImplemented for a call that is not plain."""
        raise NotImplementedError

    def _general(self, input: Tensor, bias: Tensor | None) -> Tensor:
        """x W + b by the general door."""
        raise NotImplementedError

    def _by_torch(self, input: Tensor, bias: Tensor | None) -> Tensor:
        """The same in PyTorch's ops."""
        raise NotImplementedError

    def dequantized(self) -> Tensor:
        """The weight as float32."""
        raise NotImplementedError

    _buffer_names = ("weight", "scale")

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, nn.Parameter):
            self._check_parameter(name)  # before nn.Module drops the buffer
        super().__setattr__(name, value)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        self._check_parameter(name)
        super().register_parameter(name, param)

    def _check_parameter(self, name: str) -> None:
        """Raises a TypeError for what tools that prune or fold make of a float weight: "weight_orig", "weight"."""
        if name in self._buffer_names or name.partition("_")[0] == "weight":
            raise TypeError(
                f"{type(self).__name__}: {name} cannot be a parameter, as the layer keeps its weight in another form: "
                "prune, fold or reparametrize it before light.quantize_ or light.sparsify_"
            )

    def forward(self, input: Tensor) -> Tensor:
        traced = self._traced(input)
        if traced is not None:
            return traced
        kind, a, b = resolve_activation(self.activation)
        if not _is_compiling():
            result = self._fast(input, (KIND[kind], a, b))
            if result is not NotImplemented:
                return result
        if not isinstance(input, Tensor):
            raise TypeError(f"{type(self).__name__}: input must be a Tensor, got {type(input).__name__}")
        input, bias = autocast(input, self.bias)
        if bias is not None and bias.dtype != input.dtype:
            bias = bias.to(input.dtype)
        aten = exports_aten() or (not _is_compiling() and torch.jit.is_tracing())
        return torch_activate((self._by_torch if aten else self._general)(input, bias), kind, a, b)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        loaded = state_dict.get(f"{prefix}weight")
        if isinstance(loaded, Tensor) and loaded.dtype != self.weight.dtype:
            *_, error_msgs = args
            hint = ": load float weights before quantize_" if loaded.is_floating_point() else ""
            error_msgs.append(f"{prefix}weight must be {_dtype_name(self.weight)}, got {_dtype_name(loaded)}{hint}")
            return
        super()._load_from_state_dict(state_dict, prefix, *args)


class QuantizedLinear(Quantized):
    """A linear layer."""

    in_features: int
    out_features: int

    @classmethod
    def _copy_of(cls, linear: nn.Module, **options: Any) -> Any:
        """A quantized copy of a linear layer, which shares the bias. options: arguments of cls.

        Raises:
            TypeError: linear is no linear layer with float weights.
        """
        if not isinstance(linear, (nn.Linear, fnn.Linear)):
            raise TypeError(
                f"from_linear: linear must be a torch.nn.Linear or fastops.nn.Linear, got {type(linear).__name__}"
            )
        activation = activation_of(linear)
        layer = cls(linear.in_features, linear.out_features, bias=False, activation=activation, **options)
        layer.bias = linear.bias
        layer._set(linear.weight.detach())
        return layer.train(linear.training)

    def extra_repr(self) -> str:
        text = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return text if self.activation is None else f"{text}, activation={self.activation!r}"


def become(module: nn.Module, cls: type[Quantized], weight: Tensor, activation: Activation) -> None:
    """Gives a module the class, and its state in the place of its parameter `weight`."""
    resolve_activation(activation)
    module._parameters.pop("weight", None)
    module.__class__ = cls
    module.activation = activation
    module._set(weight.detach())


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def activation_of(layer: nn.Module) -> Activation:
    """A layer's own; an attribute of that name that torch.nn's layer happens to have is none."""
    return layer.activation if isinstance(layer, Fused) else None
