"""torch.nn.functional's activations on fastops' kernels, and what activation= means."""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling as _is_compiling
from torch.overrides import handle_torch_function

from fastops import _C
from fastops._activations import ACTIVATIONS, Kind, by_torch, two, valid
from fastops.functional._general import fused_better_by_compilers, general, overrides, show, torch_op
from fastops.ops import activation as _activation_ops
from fastops.ops import autocast, supported

__all__ = [
    "celu", "celu_", "elu", "elu_", "gelu", "glu", "hardshrink", "hardsigmoid", "hardswish", "hardtanh", "hardtanh_",
    "leaky_relu", "leaky_relu_", "logsigmoid", "mish", "prelu", "relu", "relu6", "relu_", "selu", "selu_", "sigmoid",
    "silu", "softplus", "softshrink", "softsign", "tanh", "tanhshrink", "threshold", "threshold_",
]  # fmt: skip

Activation = str | nn.Module | None

# ---- activation= -----------------------------------------------------------------------------------------------------

# activation="name": the kinds whose parameters have defaults, with those.
NAMES: dict[str, tuple[str, float, float]] = {
    kind.name: (kind.name, *two(*kind.parameters.values()))
    for kind in ACTIVATIONS.values()
    if None not in kind.parameters.values()
}
# activation=module: the kinds of each class of torch.nn; fastops.nn's are subclasses of them.
_MODULES: dict[type, list[Kind]] = {}
for _kind in ACTIVATIONS.values():
    _MODULES.setdefault(_kind.module, []).append(_kind)


def resolve_activation(activation: Activation) -> tuple[str, float, float]:
    """(kind, a, b) of an `activation=` argument: None, a name, or an activation module of torch.nn or fastops.nn.

    What comes out may go in again: fastops.fuse writes activations with parameters of their own in that way.

    Raises ValueError for an unknown name or a module that cannot be fused (PReLU and GLU: parameters or a shape of
    their own), TypeError for anything else.
    """
    if activation is None:
        return NAMES["identity"]
    if isinstance(activation, str):
        if activation in NAMES:
            return NAMES[activation]
        raise ValueError(
            f"activation must be one of {', '.join(NAMES)}, an activation module or None, got {activation!r}"
        )
    cls = type(activation)
    if cls is tuple and len(activation) == 3 and activation[0] in ACTIVATIONS:
        return activation
    if cls.__module__.startswith("fastops.nn."):
        cls = next((c for c in cls.__mro__ if c.__module__.startswith("torch.nn.")), cls)
    for kind in _MODULES.get(cls, ()):
        if not kind.options or all(getattr(activation, name) == value for name, value in kind.options.items()):
            if not kind.parameters:
                return NAMES[kind.name]
            return (kind.name, *two(*[getattr(activation, name) for name in kind.parameters]))
    if cls is nn.GELU:
        raise RuntimeError(f"gelu: approximate argument must be either none or tanh, got {activation.approximate!r}")
    if isinstance(activation, nn.Module):
        raise ValueError(
            f"activation must be an elementwise activation module without parameters, such as nn.ReLU() or nn.GELU(), "
            f"got {cls.__name__}: apply it after the call"
        )
    raise TypeError(f"activation must be None, a name or an activation module, got {cls.__name__}")


def torch_activate(input: Tensor, kind: str, a: float, b: float) -> Tensor:
    """A resolved activation by PyTorch's own op."""
    if kind == "identity":
        return input
    return torch_op(kind, _explain, by_torch, input, kind, a, b)


# ---- activations -----------------------------------------------------------------------------------------------------

_DOORS = {kind: getattr(_C, kind) for kind in ACTIVATIONS}


def _apply(public: Callable[..., Tensor], kind: str, input: Any, a: Any, b: Any, inplace: bool) -> Tensor:
    """What every function here is: `public`, with this kind and its parameters."""
    if not _is_compiling():
        result = _DOORS[kind](input, a, b, inplace)
        if result is not NotImplemented:
            return result
    return _general(public, kind, input, a, b, inplace)


def _general(public: Callable[..., Tensor], kind: str, input: Any, a: Any, b: Any, inplace: bool) -> Tensor:
    """The same by the general door or by PyTorch's function of that name."""
    row, name = ACTIVATIONS[kind], public.__name__
    args = (a, b)[: len(row.parameters)]
    if row.in_place and not name.endswith("_"):
        args = (*args, inplace)
    if not _is_compiling() and overrides(input):
        return handle_torch_function(public, (input,), input, *args, **row.options)
    ours = not fused_better_by_compilers() and general(input)
    if ours and supported(input, on_gpu=True) and valid(kind, a, b):
        if not inplace:
            return _activation_ops.activation(input, kind, float(a), float(b))
        # PyTorch's threshold_ is the one in-place activation that takes expanded tensors.
        if kind != "threshold" or not _is_expanded(input):
            return _activation_ops.activation_(input, kind, float(a), float(b))

    def explain(*_: Any, **__: Any) -> str:
        return _explain(input, kind, a, b)

    return torch_op(kind, explain, getattr(F, name), input, *args, **row.options)


def _is_expanded(input: Tensor) -> bool:
    return any(n > 1 and step == 0 for n, step in zip(input.shape, input.stride(), strict=True))


def _explain(input: Any, kind: str, *parameters: Any) -> str:
    if not isinstance(input, Tensor):
        return f"input must be a Tensor, got {show(input)}"
    if not input.is_floating_point():
        return f"input must be a floating point tensor, got {show(input)}"
    for value in parameters:
        if not isinstance(value, (int, float)):
            return f"parameters must be numbers, got {show(value)}"
    if kind == "celu" and parameters[0] == 0:
        return "alpha must not be 0"
    if kind == "softshrink" and parameters[0] < 0:
        return f"lambd must not be negative, got {parameters[0]}"
    return ""


def relu(input: Tensor, inplace: bool = False) -> Tensor:
    """Rectified linear unit, y = max(x, 0).

    input: any shape; float32, float64, bfloat16 or float16.
    inplace: write the result into input.
    Errors and source: torch.nn.functional.relu.

    >>> FF.relu(torch.tensor([-1.0, 0.0, 2.0]))
    tensor([0., 0., 2.])
    """
    return _apply(relu, "relu", input, 0.0, 0.0, inplace)


def relu_(input: Tensor) -> Tensor:
    """relu, written into input, which is returned.

    input: any shape; float32, float64, bfloat16 or float16.
    Errors and source: torch.nn.functional.relu_.

    >>> x = torch.tensor([-1.0, 0.0, 2.0])
    >>> FF.relu_(x) is x
    True
    >>> x
    tensor([0., 0., 2.])
    """
    return _apply(relu_, "relu", input, 0.0, 0.0, True)


def relu6(input: Tensor, inplace: bool = False) -> Tensor:
    """ReLU with a ceiling, y = min(max(x, 0), 6).

    input: any shape; float32, float64, bfloat16 or float16.
    inplace: write the result into input.
    Errors and source: torch.nn.functional.relu6.

    >>> FF.relu6(torch.tensor([-1.0, 2.0, 7.0]))
    tensor([0., 2., 6.])
    """
    return _apply(relu6, "relu6", input, 0.0, 0.0, inplace)


def leaky_relu(input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Tensor:
    """y = x where x > 0, else negative_slope x.

    input: any shape; float32, float64, bfloat16 or float16.
    inplace: write the result into input.
    Errors and source: torch.nn.functional.leaky_relu.

    >>> FF.leaky_relu(torch.tensor([-1.0, 0.0, 2.0]), 0.5)
    tensor([-0.5000,  0.0000,  2.0000])
    """
    return _apply(leaky_relu, "leaky_relu", input, negative_slope, 0.0, inplace)


def leaky_relu_(input: Tensor, negative_slope: float = 0.01) -> Tensor:
    """leaky_relu, written into input, which is returned.

    input: any shape; float32, float64, bfloat16 or float16.
    negative_slope: as in leaky_relu.
    Errors and source: torch.nn.functional.leaky_relu_.

    >>> x = torch.tensor([-1.0, 0.0, 2.0])
    >>> FF.leaky_relu_(x, 0.5) is x
    True
    >>> x
    tensor([-0.5000,  0.0000,  2.0000])
    """
    return _apply(leaky_relu_, "leaky_relu", input, negative_slope, 0.0, True)


def elu(input: Tensor, alpha: float = 1.0, inplace: bool = False) -> Tensor:
    """Exponential linear unit, y = x where x > 0, else alpha (exp(x) - 1).

    input: any shape; float32, float64, bfloat16 or float16.
    inplace: write the result into input.
    Errors and source: torch.nn.functional.elu.

    >>> FF.elu(torch.tensor([-1.0, 0.0, 2.0]))
    tensor([-0.6321,  0.0000,  2.0000])
    """
    return _apply(elu, "elu", input, alpha, 0.0, inplace)


def elu_(input: Tensor, alpha: float = 1.0) -> Tensor:
    """elu, written into input, which is returned.

    input: any shape; float32, float64, bfloat16 or float16.
    alpha: as in elu.
    Errors and source: torch.nn.functional.elu_.

    >>> x = torch.tensor([-1.0, 0.0, 2.0])
    >>> FF.elu_(x) is x
    True
    >>> x
    tensor([-0.6321,  0.0000,  2.0000])
    """
    return _apply(elu_, "elu", input, alpha, 0.0, True)


def selu(input: Tensor, inplace: bool = False) -> Tensor:
    """Scaled ELU, y = s x where x > 0, else s alpha (exp(x) - 1), with s = 1.0507 and alpha = 1.6733.

    input: any shape; float32, float64, bfloat16 or float16.
    inplace: write the result into input.
    Errors and source: torch.nn.functional.selu.

    >>> FF.selu(torch.tensor([-1.0, 0.0, 2.0]))
    tensor([-1.1113,  0.0000,  2.1014])
    """
    return _apply(selu, "selu", input, 0.0, 0.0, inplace)


def selu_(input: Tensor) -> Tensor:
    """selu, written into input, which is returned.

    input: any shape; float32, float64, bfloat16 or float16.
    Errors and source: torch.nn.functional.selu_.

    >>> x = torch.tensor([-1.0, 0.0, 2.0])
    >>> FF.selu_(x) is x
    True
    >>> x
    tensor([-1.1113,  0.0000,  2.1014])
    """
    return _apply(selu_, "selu", input, 0.0, 0.0, True)


def celu(input: Tensor, alpha: float = 1.0, inplace: bool = False) -> Tensor:
    """Continuously differentiable ELU, y = x where x > 0, else alpha (exp(x / alpha) - 1).

    input: any shape; float32, float64, bfloat16 or float16.
    alpha: any number but 0, which is a RuntimeError.
    inplace: write the result into input.
    Errors and source: torch.nn.functional.celu.

    >>> FF.celu(torch.tensor([-1.0, 0.0, 2.0]), alpha=2.0)
    tensor([-0.7869,  0.0000,  2.0000])
    """
    return _apply(celu, "celu", input, alpha, 0.0, inplace)


def celu_(input: Tensor, alpha: float = 1.0) -> Tensor:
    """celu, written into input, which is returned.

    input: any shape; float32, float64, bfloat16 or float16.
    alpha: as in celu.
    Errors and source: torch.nn.functional.celu_.

    >>> x = torch.tensor([-1.0, 0.0, 2.0])
    >>> FF.celu_(x) is x
    True
    >>> x
    tensor([-0.6321,  0.0000,  2.0000])
    """
    return _apply(celu_, "celu", input, alpha, 0.0, True)


def gelu(input: Tensor, *, approximate: str = "none") -> Tensor:
    """Gaussian error linear unit, y = x Phi(x), Phi the normal distribution function.

    input: any shape; float32, float64, bfloat16 or float16.
    approximate: "none" computes Phi by erf; "tanh" as (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2. Anything else is
        a RuntimeError.
    Errors and source: torch.nn.functional.gelu.

    >>> FF.gelu(torch.tensor([-1.0, 0.0, 2.0]))
    tensor([-0.1587,  0.0000,  1.9545])
    """
    if approximate not in ("none", "tanh"):
        return torch_op("gelu", _explain_gelu, F.gelu, input, approximate=approximate)
    return _apply(gelu, "gelu" if approximate == "none" else "gelu_tanh", input, 0.0, 0.0, False)


def _explain_gelu(input: Any, approximate: Any) -> str:
    return f"approximate must be 'none' or 'tanh', got {approximate!r}"


def silu(input: Tensor, inplace: bool = False) -> Tensor:
    """Sigmoid linear unit (swish), y = x sigmoid(x).

    input: any shape; float32, float64, bfloat16 or float16.
    inplace: write the result into input.
    Errors and source: torch.nn.functional.silu.

    >>> FF.silu(torch.tensor([-1.0, 0.0, 2.0]))
    tensor([-0.2689,  0.0000,  1.7616])
    """
    return _apply(silu, "silu", input, 0.0, 0.0, inplace)


def mish(input: Tensor, inplace: bool = False) -> Tensor:
    """y = x tanh(softplus(x)).

    input: any shape; float32, float64, bfloat16 or float16.
    inplace: write the result into input.
    Errors and source: torch.nn.functional.mish.

    >>> FF.mish(torch.tensor([-1.0, 0.0, 2.0]))
    tensor([-0.3034,  0.0000,  1.9440])
    """
    return _apply(mish, "mish", input, 0.0, 0.0, inplace)


def sigmoid(input: Tensor) -> Tensor:
    """The logistic function, y = 1 / (1 + exp(-x)).

    input: any shape; float32, float64, bfloat16 or float16.
    Errors and source: torch.nn.functional.sigmoid.

    >>> FF.sigmoid(torch.tensor([-1.0, 0.0, 2.0]))
    tensor([0.2689, 0.5000, 0.8808])
    """
    return _apply(sigmoid, "sigmoid", input, 0.0, 0.0, False)


def logsigmoid(input: Tensor) -> Tensor:
    """y = log(sigmoid(x)), also where sigmoid(x) itself would underflow.

    input: any shape; float32, float64, bfloat16 or float16.
    Errors and source: torch.nn.functional.logsigmoid.

    >>> FF.logsigmoid(torch.tensor([-1.0, 0.0, 2.0]))
    tensor([-1.3133, -0.6931, -0.1269])
    """
    return _apply(logsigmoid, "logsigmoid", input, 0.0, 0.0, False)


def tanh(input: Tensor) -> Tensor:
    """The hyperbolic tangent, y = tanh(x).

    input: any shape; float32, float64, bfloat16 or float16.
    Errors and source: torch.nn.functional.tanh.

    >>> FF.tanh(torch.tensor([-1.0, 0.0, 2.0]))
    tensor([-0.7616,  0.0000,  0.9640])
    """
    return _apply(tanh, "tanh", input, 0.0, 0.0, False)


def softplus(input: Tensor, beta: float = 1.0, threshold: float = 20.0) -> Tensor:
    """A smooth ReLU, y = log(1 + exp(beta x)) / beta, and y = x where beta x > threshold.

    input: any shape; float32, float64, bfloat16 or float16.
    Errors and source: torch.nn.functional.softplus.

    >>> FF.softplus(torch.tensor([-1.0, 0.0, 2.0]))
    tensor([0.3133, 0.6931, 2.1269])
    """
    return _apply(softplus, "softplus", input, beta, threshold, False)


def softsign(input: Tensor) -> Tensor:
    """y = x / (1 + |x|).

    input: any shape; float32, float64, bfloat16 or float16.
    Errors and source: torch.nn.functional.softsign.

    >>> FF.softsign(torch.tensor([-1.0, 0.0, 2.0]))
    tensor([-0.5000,  0.0000,  0.6667])
    """
    return _apply(softsign, "softsign", input, 0.0, 0.0, False)


def hardtanh(input: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Tensor:
    """y = min(max(x, min_val), max_val).

    input: any shape; float32, float64, bfloat16 or float16.
    min_val, max_val: numbers; min_val > max_val is a ValueError.
    inplace: write the result into input.
    Errors and source: torch.nn.functional.hardtanh.

    >>> FF.hardtanh(torch.tensor([-1.0, 0.0, 2.0]))
    tensor([-1.,  0.,  1.])
    """
    if min_val > max_val:
        raise ValueError(f"hardtanh: min_val cannot be greater than max_val, got {min_val} and {max_val}")
    return _apply(hardtanh, "hardtanh", input, min_val, max_val, inplace)


def hardtanh_(input: Tensor, min_val: float = -1.0, max_val: float = 1.0) -> Tensor:
    """hardtanh, written into input, which is returned.

    input: any shape; float32, float64, bfloat16 or float16.
    min_val, max_val: as in hardtanh.
    Errors and source: torch.nn.functional.hardtanh_.

    >>> x = torch.tensor([-1.0, 0.0, 2.0])
    >>> FF.hardtanh_(x) is x
    True
    >>> x
    tensor([-1.,  0.,  1.])
    """
    return _apply(hardtanh_, "hardtanh", input, min_val, max_val, True)


def hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    """Piecewise linear sigmoid, y = min(max(x + 3, 0), 6) / 6.

    input: any shape; float32, float64, bfloat16 or float16.
    inplace: write the result into input.
    Errors and source: torch.nn.functional.hardsigmoid.

    >>> FF.hardsigmoid(torch.tensor([-1.0, 0.0, 2.0]))
    tensor([0.3333, 0.5000, 0.8333])
    """
    return _apply(hardsigmoid, "hardsigmoid", input, 0.0, 0.0, inplace)


def hardswish(input: Tensor, inplace: bool = False) -> Tensor:
    """Piecewise polynomial SiLU, y = x min(max(x + 3, 0), 6) / 6.

    input: any shape; float32, float64, bfloat16 or float16.
    inplace: write the result into input.
    Errors and source: torch.nn.functional.hardswish.

    >>> FF.hardswish(torch.tensor([-1.0, 0.0, 2.0]))
    tensor([-0.3333,  0.0000,  1.6667])
    """
    return _apply(hardswish, "hardswish", input, 0.0, 0.0, inplace)


def hardshrink(input: Tensor, lambd: float = 0.5) -> Tensor:
    """y = 0 where |x| <= lambd, else x.

    input: any shape; float32, float64, bfloat16 or float16.
    Errors and source: torch.nn.functional.hardshrink.

    >>> FF.hardshrink(torch.tensor([-1.0, 0.0, 2.0]), 1.5)
    tensor([0., 0., 2.])
    """
    return _apply(hardshrink, "hardshrink", input, lambd, 0.0, False)


def softshrink(input: Tensor, lambd: float = 0.5) -> Tensor:
    """y = x - lambd where x > lambd, x + lambd where x < -lambd, else 0.

    input: any shape; float32, float64, bfloat16 or float16.
    lambd: a number; a negative one is a RuntimeError.
    Errors and source: torch.nn.functional.softshrink.

    >>> FF.softshrink(torch.tensor([-1.0, 0.0, 2.0]))
    tensor([-0.5000,  0.0000,  1.5000])
    """
    return _apply(softshrink, "softshrink", input, lambd, 0.0, False)


def tanhshrink(input: Tensor) -> Tensor:
    """y = x - tanh(x).

    input: any shape; float32, float64, bfloat16 or float16.
    Errors and source: torch.nn.functional.tanhshrink.

    >>> FF.tanhshrink(torch.tensor([-1.0, 0.0, 2.0]))
    tensor([-0.2384,  0.0000,  1.0360])
    """
    return _apply(tanhshrink, "tanhshrink", input, 0.0, 0.0, False)


def _threshold(input: Tensor, threshold: float, value: float, inplace: bool = False) -> Tensor:
    """y = x where x > threshold, else value.

    input: any shape; float32, float64, bfloat16 or float16.
    inplace: write the result into input.
    Errors and source: torch.nn.functional.threshold.

    >>> FF.threshold(torch.tensor([-1.0, 0.0, 2.0]), 0.5, 9.0)
    tensor([9., 9., 2.])
    """
    return _apply(_threshold, "threshold", input, threshold, value, inplace)


# Inside the function its argument hides this name.
threshold = _threshold
threshold.__name__ = threshold.__qualname__ = "threshold"


def threshold_(input: Tensor, threshold: float, value: float) -> Tensor:
    """threshold, written into input, which is returned.

    input: any shape; float32, float64, bfloat16 or float16.
    threshold, value: as in threshold.
    Errors and source: torch.nn.functional.threshold_.

    >>> x = torch.tensor([-1.0, 0.0, 2.0])
    >>> FF.threshold_(x, 0.5, 9.0) is x
    True
    >>> x
    tensor([9., 9., 2.])
    """
    return _apply(threshold_, "threshold", input, threshold, value, True)


def prelu(input: Tensor, weight: Tensor) -> Tensor:
    """Leaky ReLU with a learnt slope, y = x where x > 0, else w x.

    Args:
        input: (batch, channels, *) with one weight for each channel, or any shape with a single weight.
        weight: (channels) or (1), in input's dtype: float32, float64, bfloat16 or float16. Under autocast both are cast
            to its dtype.

    Returns:
        A tensor of input's shape and dtype.

    Raises:
        RuntimeError: the number of weights is neither 1 nor the number of channels, or dtypes or devices differ.
        TypeError: an argument is not a Tensor.

    Source: He, Zhang, Ren and Sun, "Delving Deep into Rectifiers" (2015); torch.nn.functional.prelu.

    >>> FF.prelu(torch.tensor([[-1.0, -1.0], [3.0, 3.0]]), torch.tensor([0.5, 0.25]))
    tensor([[-0.5000, -0.2500],
            [ 3.0000,  3.0000]])
    """
    if not _is_compiling():
        result = _C.prelu(input, weight)
        if result is not NotImplemented:
            return result
        if overrides(input, weight):
            return handle_torch_function(prelu, (input, weight), input, weight)
    if not fused_better_by_compilers() and general(input, weight):
        cast = autocast(input, weight)  # prelu is on autocast's lower-precision list, as in PyTorch
        if _activation_ops.prelu_supports(*cast):
            return _activation_ops.prelu(*cast)
    return torch_op("prelu", _explain_prelu, F.prelu, input, weight)


def _explain_prelu(input: Any, weight: Any) -> str:
    for name, tensor in (("input", input), ("weight", weight)):
        if not isinstance(tensor, Tensor):
            return f"{name} must be a Tensor, got {show(tensor)}"
    channels = input.shape[1] if input.dim() >= 2 else 1
    if weight.numel() not in (1, channels) or weight.dim() > 1:
        return f"weight must have shape (1,) or ({channels},) (input's channels), got {tuple(weight.shape)}"
    if weight.dtype != input.dtype or weight.device != input.device:
        return f"weight must have input's dtype and device, {input.dtype} on {input.device}, got {show(weight)}"
    return ""


def glu(input: Tensor, dim: int = -1) -> Tensor:
    """Gated linear unit, y = a sigmoid(b) for the two halves a and b of input along dim.

    Args:
        input: (*, 2 n, *), float32, float64, bfloat16 or float16.
        dim: the dimension that is halved.

    Returns:
        A tensor of shape (*, n, *) and input's dtype.

    Raises:
        RuntimeError: a scalar, an odd size along dim, or no floating point tensor.
        IndexError: dim is out of range. TypeError: input is not a Tensor.

    Source: Dauphin, Fan, Auli and Grangier, "Language Modeling with Gated Convolutional Networks" (2016);
    torch.nn.functional.glu.

    >>> FF.glu(torch.tensor([1.0, 2.0, 0.0, 10.0]))
    tensor([0.5000, 1.9999])
    """
    if not _is_compiling():
        result = _C.glu(input, dim)
        if result is not NotImplemented:
            return result
        if overrides(input):
            return handle_torch_function(glu, (input,), input, dim)
    ours = not fused_better_by_compilers() and general(input)
    if ours and isinstance(dim, int) and _activation_ops.glu_supports(input, dim):
        return _activation_ops.glu(input, dim)
    return torch_op("glu", _explain_glu, F.glu, input, dim)


def _explain_glu(input: Any, dim: Any) -> str:
    if not isinstance(input, Tensor):
        return f"input must be a Tensor, got {show(input)}"
    if not isinstance(dim, int):
        return f"dim must be an integer, got {show(dim)}"
    if input.dim() == 0:
        return "input must have at least one dimension, got a scalar"
    if not -input.dim() <= dim < input.dim():
        return f"dim must be between {-input.dim()} and {input.dim() - 1} for {input.dim()} dimensions, got {dim}"
    if input.shape[dim] % 2:
        return f"input must have an even size along dim {dim}, got shape {tuple(input.shape)}"
    return "" if input.is_floating_point() else f"input must be a floating point tensor, got {show(input)}"
