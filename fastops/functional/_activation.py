"""torch.nn.functional's activations on fastops' kernels, and what activation= means."""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling as _is_compiling
from torch.overrides import handle_torch_function

from fastops import _C
from fastops.functional._general import general, overrides, show, torch_op
from fastops.ops import KIND, autocast, supported
from fastops.ops import activation as _activation_ops

__all__ = [
    "celu", "celu_", "elu", "elu_", "gelu", "glu", "hardshrink", "hardsigmoid", "hardswish", "hardtanh", "hardtanh_",
    "leaky_relu", "leaky_relu_", "logsigmoid", "mish", "prelu", "relu", "relu6", "relu_", "selu", "selu_", "sigmoid",
    "silu", "softplus", "softshrink", "softsign", "tanh", "tanhshrink", "threshold", "threshold_",
]  # fmt: skip

Activation = str | nn.Module | None

_fast_activation = _C.activation
_fast_prelu = _C.prelu
_fast_glu = _C.glu

(
    _RELU, _RELU6, _LEAKY_RELU, _ELU, _SELU, _CELU, _GELU, _GELU_TANH, _SILU, _MISH, _SIGMOID, _LOGSIGMOID, _TANH,
    _SOFTPLUS, _SOFTSIGN, _HARDTANH, _HARDSIGMOID, _HARDSWISH, _HARDSHRINK, _SOFTSHRINK, _TANHSHRINK, _THRESHOLD,
) = (
    KIND[name]
    for name in (
        "relu", "relu6", "leaky_relu", "elu", "selu", "celu", "gelu", "gelu_tanh", "silu", "mish", "sigmoid",
        "logsigmoid", "tanh", "softplus", "softsign", "hardtanh", "hardsigmoid", "hardswish", "hardshrink",
        "softshrink", "tanhshrink", "threshold",
    )
)  # fmt: skip


# ---- activation= -----------------------------------------------------------------------------------------------------

# activation="name": its kind, and torch.nn.functional's default parameters.
_NAMES: dict[str, tuple[str, float, float]] = {
    "identity": ("identity", 0.0, 0.0),
    "relu": ("relu", 0.0, 0.0),
    "relu6": ("relu6", 0.0, 0.0),
    "leaky_relu": ("leaky_relu", 0.01, 0.0),
    "elu": ("elu", 1.0, 0.0),
    "selu": ("selu", 0.0, 0.0),
    "celu": ("celu", 1.0, 0.0),
    "gelu": ("gelu", 0.0, 0.0),
    "gelu_tanh": ("gelu_tanh", 0.0, 0.0),
    "silu": ("silu", 0.0, 0.0),
    "mish": ("mish", 0.0, 0.0),
    "sigmoid": ("sigmoid", 0.0, 0.0),
    "logsigmoid": ("logsigmoid", 0.0, 0.0),
    "tanh": ("tanh", 0.0, 0.0),
    "softplus": ("softplus", 1.0, 20.0),
    "softsign": ("softsign", 0.0, 0.0),
    "hardtanh": ("hardtanh", -1.0, 1.0),
    "hardsigmoid": ("hardsigmoid", 0.0, 0.0),
    "hardswish": ("hardswish", 0.0, 0.0),
    "hardshrink": ("hardshrink", 0.5, 0.0),
    "softshrink": ("softshrink", 0.5, 0.0),
    "tanhshrink": ("tanhshrink", 0.0, 0.0),
}
_NONE = ("identity", 0.0, 0.0)

# activation=module: its kind, and the module's own parameters. The keys are torch.nn's classes; fastops.nn's are
# subclasses of them.
_MODULES: dict[type, Callable[[Any], tuple[str, float, float]]] = {
    nn.Identity: lambda m: _NONE,
    nn.ReLU: lambda m: _NAMES["relu"],
    nn.ReLU6: lambda m: _NAMES["relu6"],
    nn.LeakyReLU: lambda m: ("leaky_relu", m.negative_slope, 0.0),
    nn.ELU: lambda m: ("elu", m.alpha, 0.0),
    nn.SELU: lambda m: _NAMES["selu"],
    nn.CELU: lambda m: ("celu", m.alpha, 0.0),
    nn.GELU: lambda m: _gelu_kind(m.approximate),
    nn.SiLU: lambda m: _NAMES["silu"],
    nn.Mish: lambda m: _NAMES["mish"],
    nn.Sigmoid: lambda m: _NAMES["sigmoid"],
    nn.LogSigmoid: lambda m: _NAMES["logsigmoid"],
    nn.Tanh: lambda m: _NAMES["tanh"],
    nn.Softplus: lambda m: ("softplus", m.beta, m.threshold),
    nn.Softsign: lambda m: _NAMES["softsign"],
    nn.Hardtanh: lambda m: ("hardtanh", m.min_val, m.max_val),
    nn.Hardsigmoid: lambda m: _NAMES["hardsigmoid"],
    nn.Hardswish: lambda m: _NAMES["hardswish"],
    nn.Hardshrink: lambda m: ("hardshrink", m.lambd, 0.0),
    nn.Softshrink: lambda m: ("softshrink", m.lambd, 0.0),
    nn.Tanhshrink: lambda m: _NAMES["tanhshrink"],
    nn.Threshold: lambda m: ("threshold", m.threshold, m.value),
}


def _gelu_kind(approximate: str) -> tuple[str, float, float]:
    if approximate == "none":
        return _NAMES["gelu"]
    if approximate == "tanh":
        return _NAMES["gelu_tanh"]
    raise RuntimeError(f"gelu: approximate argument must be either none or tanh, got {approximate!r}")


def resolve_activation(activation: Activation) -> tuple[str, float, float]:
    """(kind, a, b) of an `activation=` argument: None, a name, or an activation module of torch.nn or fastops.nn.

    Raises ValueError for an unknown name or a module that cannot be fused (PReLU and GLU: parameters or a shape of
    their own), TypeError for anything else.
    """
    if activation is None:
        return _NONE
    if isinstance(activation, str):
        if activation in _NAMES:
            return _NAMES[activation]
        raise ValueError(
            f"activation must be one of {', '.join(_NAMES)}, an activation module or None, got {activation!r}"
        )
    cls = type(activation)
    if cls.__module__.startswith("fastops.nn."):
        cls = next((c for c in cls.__mro__ if c.__module__.startswith("torch.nn.")), cls)
    if cls in _MODULES:
        return _MODULES[cls](activation)
    if isinstance(activation, nn.Module):
        raise ValueError(
            f"activation must be an elementwise activation module without parameters, such as nn.ReLU() or nn.GELU(), "
            f"got {cls.__name__}: apply it after the call"
        )
    raise TypeError(f"activation must be None, a name or an activation module, got {cls.__name__}")


# ---- activations -----------------------------------------------------------------------------------------------------


def valid(kind: str, a: Any, b: Any) -> bool:
    """Whether the parameters are plain numbers that the kernels take. PyTorch refuses the others."""
    if not (isinstance(a, (int, float)) and isinstance(b, (int, float))):
        return False
    if kind == "hardtanh":
        return a <= b
    return not (kind == "celu" and a == 0) and (kind != "softshrink" or a >= 0)


def _general_activation(
    public: Callable[..., Tensor],
    theirs: Callable[..., Tensor],
    kind: str,
    a: Any,
    b: Any,
    inplace: bool,
    input: Any,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    """The general door of the function `public`, whose equal in PyTorch is `theirs`."""
    if not _is_compiling() and overrides(input):
        return handle_torch_function(public, (input,), input, *args, **kwargs)
    if general(input) and supported(input, on_gpu=True) and valid(kind, a, b):
        if not inplace:
            return _activation_ops.activation(input, kind, float(a), float(b))
        # PyTorch's threshold_ is the one in-place activation that takes expanded tensors.
        if kind != "threshold" or not _is_expanded(input):
            return _activation_ops.activation_(input, kind, float(a), float(b))
    return torch_op(kind, _EXPLAIN.get(kind, explain_activation), theirs, input, *args, **kwargs)


def _is_expanded(input: Tensor) -> bool:
    return any(n > 1 and step == 0 for n, step in zip(input.shape, input.stride(), strict=True))


def explain_activation(input: Any, *args: Any, **kwargs: Any) -> str:
    if not isinstance(input, Tensor):
        return f"input must be a Tensor, got {show(input)}"
    if not input.is_floating_point():
        return f"input must be a floating point tensor, got {show(input)}"
    for value in (*args, *kwargs.values()):
        if not isinstance(value, (int, float)):
            return f"parameters must be numbers, got {show(value)}"
    return ""


def _explain_celu(input: Any, alpha: Any = 1.0, *_: Any) -> str:
    return "alpha must not be 0" if alpha == 0 else explain_activation(input, alpha)


def _explain_softshrink(input: Any, lambd: Any = 0.5, *_: Any) -> str:
    bad = isinstance(lambd, (int, float)) and lambd < 0
    return f"lambd must not be negative, got {lambd}" if bad else explain_activation(input, lambd)


_EXPLAIN = {"celu": _explain_celu, "softshrink": _explain_softshrink}


def torch_activate(input: Tensor, kind: str, a: float, b: float) -> Tensor:
    """A resolved activation by PyTorch's own op."""
    if kind == "identity":
        return input
    return torch_op(kind, _EXPLAIN.get(kind, explain_activation), _activation_ops.TORCH[kind], input, a, b)


def relu(input: Tensor, inplace: bool = False) -> Tensor:
    """Rectified linear unit, y = max(x, 0).

    input: any shape; float32, float64, bfloat16 or float16.
    inplace: write the result into input.
    Errors and source: torch.nn.functional.relu.

    >>> FF.relu(torch.tensor([-1.0, 0.0, 2.0]))
    tensor([0., 0., 2.])
    """
    if not _is_compiling():
        result = _fast_activation(input, _RELU, 0.0, 0.0, inplace)
        if result is not NotImplemented:
            return result
    return _general_activation(relu, F.relu, "relu", 0.0, 0.0, inplace, input, inplace)


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
    if not _is_compiling():
        result = _fast_activation(input, _RELU, 0.0, 0.0, True)
        if result is not NotImplemented:
            return result
    return _general_activation(relu_, F.relu_, "relu", 0.0, 0.0, True, input)


def relu6(input: Tensor, inplace: bool = False) -> Tensor:
    """ReLU with a ceiling, y = min(max(x, 0), 6).

    input: any shape; float32, float64, bfloat16 or float16.
    inplace: write the result into input.
    Errors and source: torch.nn.functional.relu6.

    >>> FF.relu6(torch.tensor([-1.0, 2.0, 7.0]))
    tensor([0., 2., 6.])
    """
    if not _is_compiling():
        result = _fast_activation(input, _RELU6, 0.0, 0.0, inplace)
        if result is not NotImplemented:
            return result
    return _general_activation(relu6, F.relu6, "relu6", 0.0, 0.0, inplace, input, inplace)


def leaky_relu(input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Tensor:
    """y = x where x > 0, else negative_slope x.

    input: any shape; float32, float64, bfloat16 or float16.
    inplace: write the result into input.
    Errors and source: torch.nn.functional.leaky_relu.

    >>> FF.leaky_relu(torch.tensor([-1.0, 0.0, 2.0]), 0.5)
    tensor([-0.5000,  0.0000,  2.0000])
    """
    if not _is_compiling():
        result = _fast_activation(input, _LEAKY_RELU, negative_slope, 0.0, inplace)
        if result is not NotImplemented:
            return result
    return _general_activation(
        leaky_relu, F.leaky_relu, "leaky_relu", negative_slope, 0.0, inplace, input, negative_slope, inplace
    )


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
    if not _is_compiling():
        result = _fast_activation(input, _LEAKY_RELU, negative_slope, 0.0, True)
        if result is not NotImplemented:
            return result
    return _general_activation(
        leaky_relu_, F.leaky_relu_, "leaky_relu", negative_slope, 0.0, True, input, negative_slope
    )


def elu(input: Tensor, alpha: float = 1.0, inplace: bool = False) -> Tensor:
    """Exponential linear unit, y = x where x > 0, else alpha (exp(x) - 1).

    input: any shape; float32, float64, bfloat16 or float16.
    inplace: write the result into input.
    Errors and source: torch.nn.functional.elu.

    >>> FF.elu(torch.tensor([-1.0, 0.0, 2.0]))
    tensor([-0.6321,  0.0000,  2.0000])
    """
    if not _is_compiling():
        result = _fast_activation(input, _ELU, alpha, 0.0, inplace)
        if result is not NotImplemented:
            return result
    return _general_activation(elu, F.elu, "elu", alpha, 0.0, inplace, input, alpha, inplace)


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
    if not _is_compiling():
        result = _fast_activation(input, _ELU, alpha, 0.0, True)
        if result is not NotImplemented:
            return result
    return _general_activation(elu_, F.elu_, "elu", alpha, 0.0, True, input, alpha)


def selu(input: Tensor, inplace: bool = False) -> Tensor:
    """Scaled ELU, y = s x where x > 0, else s alpha (exp(x) - 1), with s = 1.0507 and alpha = 1.6733.

    input: any shape; float32, float64, bfloat16 or float16.
    inplace: write the result into input.
    Errors and source: torch.nn.functional.selu.

    >>> FF.selu(torch.tensor([-1.0, 0.0, 2.0]))
    tensor([-1.1113,  0.0000,  2.1014])
    """
    if not _is_compiling():
        result = _fast_activation(input, _SELU, 0.0, 0.0, inplace)
        if result is not NotImplemented:
            return result
    return _general_activation(selu, F.selu, "selu", 0.0, 0.0, inplace, input, inplace)


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
    if not _is_compiling():
        result = _fast_activation(input, _SELU, 0.0, 0.0, True)
        if result is not NotImplemented:
            return result
    return _general_activation(selu_, F.selu_, "selu", 0.0, 0.0, True, input)


def celu(input: Tensor, alpha: float = 1.0, inplace: bool = False) -> Tensor:
    """Continuously differentiable ELU, y = x where x > 0, else alpha (exp(x / alpha) - 1).

    input: any shape; float32, float64, bfloat16 or float16.
    alpha: any number but 0, which is a RuntimeError.
    inplace: write the result into input.
    Errors and source: torch.nn.functional.celu.

    >>> FF.celu(torch.tensor([-1.0, 0.0, 2.0]), alpha=2.0)
    tensor([-0.7869,  0.0000,  2.0000])
    """
    if not _is_compiling() and alpha != 0:
        result = _fast_activation(input, _CELU, alpha, 0.0, inplace)
        if result is not NotImplemented:
            return result
    return _general_activation(celu, F.celu, "celu", alpha, 0.0, inplace, input, alpha, inplace)


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
    if not _is_compiling() and alpha != 0:
        result = _fast_activation(input, _CELU, alpha, 0.0, True)
        if result is not NotImplemented:
            return result
    return _general_activation(celu_, F.celu_, "celu", alpha, 0.0, True, input, alpha)


def gelu(input: Tensor, *, approximate: str = "none") -> Tensor:
    """Gaussian error linear unit, y = x Phi(x), Phi the normal distribution function.

    input: any shape; float32, float64, bfloat16 or float16.
    approximate: "none" computes Phi by erf; "tanh" as (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2. Anything else is
        a RuntimeError.
    Errors and source: torch.nn.functional.gelu.

    >>> FF.gelu(torch.tensor([-1.0, 0.0, 2.0]))
    tensor([-0.1587,  0.0000,  1.9545])
    """
    if not _is_compiling():
        if approximate == "none":
            result = _fast_activation(input, _GELU, 0.0, 0.0, False)
        elif approximate == "tanh":
            result = _fast_activation(input, _GELU_TANH, 0.0, 0.0, False)
        else:
            result = NotImplemented
        if result is not NotImplemented:
            return result
    if approximate not in ("none", "tanh"):
        return torch_op("gelu", _explain_gelu, F.gelu, input, approximate=approximate)
    kind = "gelu" if approximate == "none" else "gelu_tanh"
    return _general_activation(gelu, F.gelu, kind, 0.0, 0.0, False, input, approximate=approximate)


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
    if not _is_compiling():
        result = _fast_activation(input, _SILU, 0.0, 0.0, inplace)
        if result is not NotImplemented:
            return result
    return _general_activation(silu, F.silu, "silu", 0.0, 0.0, inplace, input, inplace)


def mish(input: Tensor, inplace: bool = False) -> Tensor:
    """y = x tanh(softplus(x)).

    input: any shape; float32, float64, bfloat16 or float16.
    inplace: write the result into input.
    Errors and source: torch.nn.functional.mish.

    >>> FF.mish(torch.tensor([-1.0, 0.0, 2.0]))
    tensor([-0.3034,  0.0000,  1.9440])
    """
    if not _is_compiling():
        result = _fast_activation(input, _MISH, 0.0, 0.0, inplace)
        if result is not NotImplemented:
            return result
    return _general_activation(mish, F.mish, "mish", 0.0, 0.0, inplace, input, inplace)


def sigmoid(input: Tensor) -> Tensor:
    """The logistic function, y = 1 / (1 + exp(-x)).

    input: any shape; float32, float64, bfloat16 or float16.
    Errors and source: torch.nn.functional.sigmoid.

    >>> FF.sigmoid(torch.tensor([-1.0, 0.0, 2.0]))
    tensor([0.2689, 0.5000, 0.8808])
    """
    if not _is_compiling():
        result = _fast_activation(input, _SIGMOID, 0.0, 0.0, False)
        if result is not NotImplemented:
            return result
    return _general_activation(sigmoid, F.sigmoid, "sigmoid", 0.0, 0.0, False, input)


def logsigmoid(input: Tensor) -> Tensor:
    """y = log(sigmoid(x)), also where sigmoid(x) itself would underflow.

    input: any shape; float32, float64, bfloat16 or float16.
    Errors and source: torch.nn.functional.logsigmoid.

    >>> FF.logsigmoid(torch.tensor([-1.0, 0.0, 2.0]))
    tensor([-1.3133, -0.6931, -0.1269])
    """
    if not _is_compiling():
        result = _fast_activation(input, _LOGSIGMOID, 0.0, 0.0, False)
        if result is not NotImplemented:
            return result
    return _general_activation(logsigmoid, F.logsigmoid, "logsigmoid", 0.0, 0.0, False, input)


def tanh(input: Tensor) -> Tensor:
    """The hyperbolic tangent, y = tanh(x).

    input: any shape; float32, float64, bfloat16 or float16.
    Errors and source: torch.nn.functional.tanh.

    >>> FF.tanh(torch.tensor([-1.0, 0.0, 2.0]))
    tensor([-0.7616,  0.0000,  0.9640])
    """
    if not _is_compiling():
        result = _fast_activation(input, _TANH, 0.0, 0.0, False)
        if result is not NotImplemented:
            return result
    return _general_activation(tanh, F.tanh, "tanh", 0.0, 0.0, False, input)


def softplus(input: Tensor, beta: float = 1.0, threshold: float = 20.0) -> Tensor:
    """A smooth ReLU, y = log(1 + exp(beta x)) / beta, and y = x where beta x > threshold.

    input: any shape; float32, float64, bfloat16 or float16.
    Errors and source: torch.nn.functional.softplus.

    >>> FF.softplus(torch.tensor([-1.0, 0.0, 2.0]))
    tensor([0.3133, 0.6931, 2.1269])
    """
    if not _is_compiling():
        result = _fast_activation(input, _SOFTPLUS, beta, threshold, False)
        if result is not NotImplemented:
            return result
    return _general_activation(softplus, F.softplus, "softplus", beta, threshold, False, input, beta, threshold)


def softsign(input: Tensor) -> Tensor:
    """y = x / (1 + |x|).

    input: any shape; float32, float64, bfloat16 or float16.
    Errors and source: torch.nn.functional.softsign.

    >>> FF.softsign(torch.tensor([-1.0, 0.0, 2.0]))
    tensor([-0.5000,  0.0000,  0.6667])
    """
    if not _is_compiling():
        result = _fast_activation(input, _SOFTSIGN, 0.0, 0.0, False)
        if result is not NotImplemented:
            return result
    return _general_activation(softsign, F.softsign, "softsign", 0.0, 0.0, False, input)


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
    if not _is_compiling() and min_val <= max_val:
        result = _fast_activation(input, _HARDTANH, min_val, max_val, inplace)
        if result is not NotImplemented:
            return result
    return _general_activation(
        hardtanh, F.hardtanh, "hardtanh", min_val, max_val, inplace, input, min_val, max_val, inplace
    )


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
    if not _is_compiling() and min_val <= max_val:
        result = _fast_activation(input, _HARDTANH, min_val, max_val, True)
        if result is not NotImplemented:
            return result
    return _general_activation(hardtanh_, F.hardtanh_, "hardtanh", min_val, max_val, True, input, min_val, max_val)


def hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    """Piecewise linear sigmoid, y = min(max(x + 3, 0), 6) / 6.

    input: any shape; float32, float64, bfloat16 or float16.
    inplace: write the result into input.
    Errors and source: torch.nn.functional.hardsigmoid.

    >>> FF.hardsigmoid(torch.tensor([-1.0, 0.0, 2.0]))
    tensor([0.3333, 0.5000, 0.8333])
    """
    if not _is_compiling():
        result = _fast_activation(input, _HARDSIGMOID, 0.0, 0.0, inplace)
        if result is not NotImplemented:
            return result
    return _general_activation(hardsigmoid, F.hardsigmoid, "hardsigmoid", 0.0, 0.0, inplace, input, inplace)


def hardswish(input: Tensor, inplace: bool = False) -> Tensor:
    """Piecewise polynomial SiLU, y = x min(max(x + 3, 0), 6) / 6.

    input: any shape; float32, float64, bfloat16 or float16.
    inplace: write the result into input.
    Errors and source: torch.nn.functional.hardswish.

    >>> FF.hardswish(torch.tensor([-1.0, 0.0, 2.0]))
    tensor([-0.3333,  0.0000,  1.6667])
    """
    if not _is_compiling():
        result = _fast_activation(input, _HARDSWISH, 0.0, 0.0, inplace)
        if result is not NotImplemented:
            return result
    return _general_activation(hardswish, F.hardswish, "hardswish", 0.0, 0.0, inplace, input, inplace)


def hardshrink(input: Tensor, lambd: float = 0.5) -> Tensor:
    """y = 0 where |x| <= lambd, else x.

    input: any shape; float32, float64, bfloat16 or float16.
    Errors and source: torch.nn.functional.hardshrink.

    >>> FF.hardshrink(torch.tensor([-1.0, 0.0, 2.0]), 1.5)
    tensor([0., 0., 2.])
    """
    if not _is_compiling():
        result = _fast_activation(input, _HARDSHRINK, lambd, 0.0, False)
        if result is not NotImplemented:
            return result
    return _general_activation(hardshrink, F.hardshrink, "hardshrink", lambd, 0.0, False, input, lambd)


def softshrink(input: Tensor, lambd: float = 0.5) -> Tensor:
    """y = x - lambd where x > lambd, x + lambd where x < -lambd, else 0.

    input: any shape; float32, float64, bfloat16 or float16.
    lambd: a number; a negative one is a RuntimeError.
    Errors and source: torch.nn.functional.softshrink.

    >>> FF.softshrink(torch.tensor([-1.0, 0.0, 2.0]))
    tensor([-0.5000,  0.0000,  1.5000])
    """
    if not _is_compiling() and lambd >= 0:
        result = _fast_activation(input, _SOFTSHRINK, lambd, 0.0, False)
        if result is not NotImplemented:
            return result
    return _general_activation(softshrink, F.softshrink, "softshrink", lambd, 0.0, False, input, lambd)


def tanhshrink(input: Tensor) -> Tensor:
    """y = x - tanh(x).

    input: any shape; float32, float64, bfloat16 or float16.
    Errors and source: torch.nn.functional.tanhshrink.

    >>> FF.tanhshrink(torch.tensor([-1.0, 0.0, 2.0]))
    tensor([-0.2384,  0.0000,  1.0360])
    """
    if not _is_compiling():
        result = _fast_activation(input, _TANHSHRINK, 0.0, 0.0, False)
        if result is not NotImplemented:
            return result
    return _general_activation(tanhshrink, F.tanhshrink, "tanhshrink", 0.0, 0.0, False, input)


def _threshold(input: Tensor, threshold: float, value: float, inplace: bool = False) -> Tensor:
    """y = x where x > threshold, else value.

    input: any shape; float32, float64, bfloat16 or float16.
    inplace: write the result into input.
    Errors and source: torch.nn.functional.threshold.

    >>> FF.threshold(torch.tensor([-1.0, 0.0, 2.0]), 0.5, 9.0)
    tensor([9., 9., 2.])
    """
    if not _is_compiling():
        result = _fast_activation(input, _THRESHOLD, threshold, value, inplace)
        if result is not NotImplemented:
            return result
    return _general_activation(
        _threshold, F.threshold, "threshold", threshold, value, inplace, input, threshold, value, inplace
    )


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
    if not _is_compiling():
        result = _fast_activation(input, _THRESHOLD, threshold, value, True)
        if result is not NotImplemented:
            return result
    return _general_activation(threshold_, F.threshold_, "threshold", threshold, value, True, input, threshold, value)


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
        result = _fast_prelu(input, weight)
        if result is not NotImplemented:
            return result
        if overrides(input, weight):
            return handle_torch_function(prelu, (input, weight), input, weight)
    if general(input, weight):
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
        result = _fast_glu(input, dim)
        if result is not NotImplemented:
            return result
        if overrides(input):
            return handle_torch_function(glu, (input,), input, dim)
    if general(input) and isinstance(dim, int) and _activation_ops.glu_supports(input, dim):
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
