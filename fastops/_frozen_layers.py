"""The layers of a frozen model: their weights are packed once for each kind of call (csrc/torch/frozen.cpp)."""

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.utils import _pair

import fastops.functional as FF
from fastops import _C
from fastops._activations import KIND
from fastops._frozen_int8 import FrozenAvgPoolInt8, FrozenInt8, FrozenMaxPoolInt8
from fastops._frozen_norms import Apart
from fastops._fusion import activate
from fastops.functional._activation import resolve_activation
from fastops.ops import DTYPES


def each_dimension(size: Any, dims: int) -> list[int]:
    """A size for each dimension."""
    return [size] * dims if isinstance(size, int) else list(size)


def add_after(y: Tensor, residual: Any) -> Tensor:
    """residual + y."""
    return residual + y


def add_to(y: Tensor, residual: Any) -> Tensor:
    """residual += y."""
    residual += y
    return residual


RESIDUAL_FIRST = (add_after, add_to)


def _multiplied(y: Tensor, factors: Tensor) -> Tensor:
    """y in the dtype of its product with factors of this tensor's dtype, which under autocast is not that of y."""
    return y.to(torch.promote_types(y.dtype, factors.dtype))


def _no_kernel(input: Tensor, residual: Any = None) -> Any:
    """In the place of packed weights of a dtype that no kernel takes."""
    return NotImplemented


class FrozenLayer(nn.Module):
    """One layer: f(layer(input) + residual)."""

    adds = False  # whether it is called with a residual, which then is no Tensor only where the model's is none
    scaled = False  # whether factors of its features are part of its weight, by a product that is no in-place one

    def __init__(
        self,
        function: str,
        weight: Tensor,
        bias: Tensor | None,
        options: dict[str, Any],
        activation: Any,
        apart: Apart | None = None,
    ) -> None:
        super().__init__()
        self.addition: Callable[[Tensor, Any], Tensor] = operator.add  # of the layer's result and the residual
        self.register_module("apart", apart)
        self.function, self.options, self.activation = function, options, activation
        self.register_buffer("weight", weight.detach())
        self.register_buffer("bias", None if bias is None else bias.detach().contiguous())
        self._packed: Any = None

    def pack(self) -> Any:
        """The layer of csrc/torch/frozen.cpp; it packs at its first call of each kind."""
        if self.weight.dtype not in DTYPES:
            self._packed = _no_kernel
            return self._packed
        kind, a, b = resolve_activation(self.activation)
        f = (KIND[kind], a, b)
        o = self.options
        if self.function == "linear":
            self._packed = _C.FrozenLinear(self.weight, self.bias, *f)
            return self._packed
        convolution = (self.weight, self.bias, o["stride"], o["padding"], o["dilation"], o["groups"])
        if "pool_size" in o:
            self._packed = _C.FrozenConvPool(*convolution, each_dimension(o["pool_size"], self.weight.dim() - 2), *f)
        else:
            self._packed = _C.FrozenConv(*convolution, *f)
        return self._packed

    def call(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """forward, for tensors that are there."""
        state = self.__dict__  # nn.Module looks for a tensor in three places
        weight = state["_buffers"]["weight"]
        if type(input) is Tensor and input.dtype is weight.dtype:
            packed = state["_packed"] or self.pack()
            if state["function"] != "linear" and input.dim() != weight.dim():
                return self.forward(input, residual)
            apart = state["_modules"]["apart"]
            if apart is not None and apart.takes(input):
                return self.forward(input, residual)
            y = packed(input, residual)
            if y is not NotImplemented:
                return y
        return self.forward(input, residual)

    def call_and_add(self, input: Tensor, residual: Any) -> Tensor:
        """call, for any residual."""
        return self.forward(input, None) if residual is None else self.call(input, residual)

    def forward(self, input: Tensor, residual: Any = None) -> Tensor:
        function = getattr(FF, self.function)
        apart = self.apart is not None and isinstance(input, Tensor) and self.apart.takes(input)
        adds = self.adds or residual is not None
        if not adds and not apart and not self.scaled:
            return function(input, self.weight, self.bias, **self.options, activation=self.activation)
        y = (
            self.apart(input, function, self.options)
            if apart
            else function(input, self.weight, self.bias, **self.options)
        )
        if self.scaled:
            y = _multiplied(y, self.weight)
        return activate(self.addition(y, residual) if adds else y, self.activation)

    def extra_repr(self) -> str:
        return f"{self.function}, {tuple(self.weight.shape)}, activation={self.activation!r}"

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_packed": None}

    def _apply(self, *args: Any, **kwargs: Any) -> "FrozenLayer":
        super()._apply(*args, **kwargs)
        self._packed = None
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._packed = None


class FrozenMlp(nn.Module):
    """A narrow chain of linear layers, which is one kernel that reads the weights as they are."""

    adds, addition = False, None
    scaled = False  # the same of the last weight

    def __init__(self, weights: Sequence[Tensor], biases: Sequence[Tensor | None], hidden: Any, output: Any) -> None:
        super().__init__()
        self.hidden, self.output = hidden, output
        self.layers: nn.ModuleList | tuple[()] = ()  # one by one, where a batch norm has been folded into any
        for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            self.register_buffer(f"weight{i}", weight.detach().contiguous())
            self.register_buffer(f"bias{i}", None if bias is None else bias.detach().contiguous())
        self._arguments: tuple[Any, ...] = ()

    def _tensors(self) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
        count = len(self._buffers) // 2
        return tuple(tuple(self._buffers[f"{name}{i}"] for i in range(count)) for name in ("weight", "bias"))

    def call(self, input: Tensor) -> Tensor:
        """forward, for tensors that are there."""
        if type(input) is not Tensor or ("layers" in self.__dict__["_modules"] and input.dim() != 2):
            return self.forward(input)
        if input.requires_grad and torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
            raise RuntimeError(NO_GRADIENT)
        arguments = self.__dict__["_arguments"]
        if not arguments:
            f = [(KIND[kind], a, b) for kind, a, b in map(resolve_activation, (self.hidden, self.output))]
            arguments = self._arguments = (*self._tensors(), *f[0], *f[1])
        y = _C.mlp(input, *arguments)
        if y is NotImplemented:
            return self.forward(input)
        return _multiplied(y, self.weight0) if self.scaled else y

    def forward(self, input: Tensor) -> Tensor:
        if self.layers and isinstance(input, Tensor) and input.dim() != 2:
            for layer in self.layers:
                input = layer.forward(input)
            return input
        y = FF.mlp(input, *self._tensors(), self.hidden, self.output)
        return _multiplied(y, self.weight0) if self.scaled else y

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_arguments": ()}

    def _apply(self, *args: Any, **kwargs: Any) -> "FrozenMlp":
        super()._apply(*args, **kwargs)
        self._arguments = ()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._arguments = ()


class FrozenInvertedResidual(nn.Module):
    """A 1x1 convolution, a depthwise one and a 1x1 convolution (the first or the last may be missing) in one kernel.

    Images between them do not go through memory. Where the kernel is not faster, the layers are called one by one.
    """

    def __init__(self, expand: FrozenLayer | None, depthwise: FrozenLayer, project: FrozenLayer | None) -> None:
        super().__init__()
        self.expand, self.depthwise, self.project = expand, depthwise, project
        self.adds, self.addition = (project or depthwise).adds, (project or depthwise).addition
        self._packed: Any = None

    def pack(self) -> Any:
        """The block of csrc/torch/frozen.cpp."""
        if self.depthwise.weight.dtype not in DTYPES:
            self._packed = _no_kernel
            return self._packed
        layers = []
        for layer in (self.expand, self.depthwise, self.project):
            kind, a, b = resolve_activation(layer and layer.activation)
            layers.append((layer and layer.weight, layer and layer.bias, KIND[kind], a, b))
        steps = [list(_pair(self.depthwise.options[key])) for key in ("stride", "padding", "dilation")]
        self._packed = _C.FrozenInvertedResidual(*layers, steps)
        return self._packed

    def call(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """forward, for tensors that are there."""
        if type(input) is Tensor:
            y = (self.__dict__["_packed"] or self.pack())(input, residual)
            if y is not NotImplemented:
                return y
        return self._one_by_one(input, residual, "call")

    def call_and_add(self, input: Tensor, residual: Any) -> Tensor:
        """call, for any residual."""
        return self._one_by_one(input, None, "forward") if residual is None else self.call(input, residual)

    def forward(self, input: Tensor, residual: Any = None) -> Tensor:
        return self._one_by_one(input, residual, "forward")

    def _one_by_one(self, input: Tensor, residual: Any, way: str) -> Tensor:
        layers = [layer for layer in self._modules.values() if layer is not None]
        for layer in layers[:-1]:
            input = getattr(layer, way)(input)
        return getattr(layers[-1], way)(input, residual)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_packed": None}

    def _apply(self, *args: Any, **kwargs: Any) -> "FrozenInvertedResidual":
        super()._apply(*args, **kwargs)
        self._packed = None
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._packed = None


NO_GRADIENT = (
    "fastops.freeze: a frozen model has no gradients, but its input requires one. Call it under torch.no_grad(), or "
    "use the model that it was made from"
)

LAYERS = (FrozenLayer, FrozenMlp, FrozenInvertedResidual, FrozenInt8, FrozenMaxPoolInt8, FrozenAvgPoolInt8)
