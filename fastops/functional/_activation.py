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

# What activation="name" means: the kind and torch.nn.functional's default parameters.
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

# What activation=module means: the same from a module's own parameters. Filled for torch.nn's classes; fastops.nn's are
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


# The same in PyTorch's own ops, for what fastops has no kernel for.
_TORCH: dict[str, Callable[[Tensor, float, float], Tensor]] = {
    "identity": lambda x, a, b: x,
    "relu": lambda x, a, b: F.relu(x),
    "relu6": lambda x, a, b: F.relu6(x),
    "leaky_relu": lambda x, a, b: F.leaky_relu(x, a),
    "elu": lambda x, a, b: F.elu(x, a),
    "selu": lambda x, a, b: F.selu(x),
    "celu": lambda x, a, b: F.celu(x, a),
    "gelu": lambda x, a, b: F.gelu(x),
    "gelu_tanh": lambda x, a, b: F.gelu(x, approximate="tanh"),
    "silu": lambda x, a, b: F.silu(x),
    "mish": lambda x, a, b: F.mish(x),
    "sigmoid": lambda x, a, b: F.sigmoid(x),
    "logsigmoid": lambda x, a, b: F.logsigmoid(x),
    "tanh": lambda x, a, b: F.tanh(x),
    "softplus": lambda x, a, b: F.softplus(x, a, b),
    "softsign": lambda x, a, b: F.softsign(x),
    "hardtanh": lambda x, a, b: F.hardtanh(x, a, b),
    "hardsigmoid": lambda x, a, b: F.hardsigmoid(x),
    "hardswish": lambda x, a, b: F.hardswish(x),
    "hardshrink": lambda x, a, b: F.hardshrink(x, a),
    "softshrink": lambda x, a, b: F.softshrink(x, a),
    "tanhshrink": lambda x, a, b: F.tanhshrink(x),
    "threshold": lambda x, a, b: F.threshold(x, a, b),
}


# ---- activations -----------------------------------------------------------------------------------------------------


def valid(kind: str, a: Any, b: Any) -> bool:
    """Whether the parameters are plain numbers in the kernels' range; PyTorch says what is wrong with the others."""
    if not (isinstance(a, (int, float)) and isinstance(b, (int, float))):
        return False
    return not ((kind == "celu" and a == 0) or (kind == "softshrink" and a < 0))


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
    """public(input, *args, **kwargs), which is theirs(input, *args, **kwargs) in PyTorch."""
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
    return torch_op(kind, _EXPLAIN.get(kind, explain_activation), _TORCH[kind], input, a, b)


def relu(input: Tensor, inplace: bool = False) -> Tensor:
    """max(x, 0)."""
    if not _is_compiling():
        result = _fast_activation(input, _RELU, 0.0, 0.0, inplace)
        if result is not NotImplemented:
            return result
    return _general_activation(relu, F.relu, "relu", 0.0, 0.0, inplace, input, inplace)


def relu_(input: Tensor) -> Tensor:
    """relu, into input's own memory."""
    if not _is_compiling():
        result = _fast_activation(input, _RELU, 0.0, 0.0, True)
        if result is not NotImplemented:
            return result
    return _general_activation(relu_, F.relu_, "relu", 0.0, 0.0, True, input)


def relu6(input: Tensor, inplace: bool = False) -> Tensor:
    """min(max(x, 0), 6)."""
    if not _is_compiling():
        result = _fast_activation(input, _RELU6, 0.0, 0.0, inplace)
        if result is not NotImplemented:
            return result
    return _general_activation(relu6, F.relu6, "relu6", 0.0, 0.0, inplace, input, inplace)


def leaky_relu(input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Tensor:
    """x > 0 ? x : negative_slope x."""
    if not _is_compiling():
        result = _fast_activation(input, _LEAKY_RELU, negative_slope, 0.0, inplace)
        if result is not NotImplemented:
            return result
    return _general_activation(
        leaky_relu, F.leaky_relu, "leaky_relu", negative_slope, 0.0, inplace, input, negative_slope, inplace
    )


def leaky_relu_(input: Tensor, negative_slope: float = 0.01) -> Tensor:
    """leaky_relu, into input's own memory."""
    if not _is_compiling():
        result = _fast_activation(input, _LEAKY_RELU, negative_slope, 0.0, True)
        if result is not NotImplemented:
            return result
    return _general_activation(
        leaky_relu_, F.leaky_relu_, "leaky_relu", negative_slope, 0.0, True, input, negative_slope
    )


def elu(input: Tensor, alpha: float = 1.0, inplace: bool = False) -> Tensor:
    """x > 0 ? x : alpha (exp(x) - 1)."""
    if not _is_compiling():
        result = _fast_activation(input, _ELU, alpha, 0.0, inplace)
        if result is not NotImplemented:
            return result
    return _general_activation(elu, F.elu, "elu", alpha, 0.0, inplace, input, alpha, inplace)


def elu_(input: Tensor, alpha: float = 1.0) -> Tensor:
    """elu, into input's own memory."""
    if not _is_compiling():
        result = _fast_activation(input, _ELU, alpha, 0.0, True)
        if result is not NotImplemented:
            return result
    return _general_activation(elu_, F.elu_, "elu", alpha, 0.0, True, input, alpha)


def selu(input: Tensor, inplace: bool = False) -> Tensor:
    """scale (x > 0 ? x : alpha (exp(x) - 1)), torch.nn.SELU's constants."""
    if not _is_compiling():
        result = _fast_activation(input, _SELU, 0.0, 0.0, inplace)
        if result is not NotImplemented:
            return result
    return _general_activation(selu, F.selu, "selu", 0.0, 0.0, inplace, input, inplace)


def selu_(input: Tensor) -> Tensor:
    """selu, into input's own memory."""
    if not _is_compiling():
        result = _fast_activation(input, _SELU, 0.0, 0.0, True)
        if result is not NotImplemented:
            return result
    return _general_activation(selu_, F.selu_, "selu", 0.0, 0.0, True, input)


def celu(input: Tensor, alpha: float = 1.0, inplace: bool = False) -> Tensor:
    """x > 0 ? x : alpha (exp(x / alpha) - 1). alpha must not be 0."""
    if not _is_compiling() and alpha != 0:
        result = _fast_activation(input, _CELU, alpha, 0.0, inplace)
        if result is not NotImplemented:
            return result
    return _general_activation(celu, F.celu, "celu", alpha, 0.0, inplace, input, alpha, inplace)


def celu_(input: Tensor, alpha: float = 1.0) -> Tensor:
    """celu, into input's own memory."""
    if not _is_compiling() and alpha != 0:
        result = _fast_activation(input, _CELU, alpha, 0.0, True)
        if result is not NotImplemented:
            return result
    return _general_activation(celu_, F.celu_, "celu", alpha, 0.0, True, input, alpha)


def gelu(input: Tensor, *, approximate: str = "none") -> Tensor:
    """x Phi(x) by erf, or by tanh with approximate="tanh". RuntimeError for any other approximate."""
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
    """x sigmoid(x)."""
    if not _is_compiling():
        result = _fast_activation(input, _SILU, 0.0, 0.0, inplace)
        if result is not NotImplemented:
            return result
    return _general_activation(silu, F.silu, "silu", 0.0, 0.0, inplace, input, inplace)


def mish(input: Tensor, inplace: bool = False) -> Tensor:
    """x tanh(softplus(x))."""
    if not _is_compiling():
        result = _fast_activation(input, _MISH, 0.0, 0.0, inplace)
        if result is not NotImplemented:
            return result
    return _general_activation(mish, F.mish, "mish", 0.0, 0.0, inplace, input, inplace)


def sigmoid(input: Tensor) -> Tensor:
    """1 / (1 + exp(-x))."""
    if not _is_compiling():
        result = _fast_activation(input, _SIGMOID, 0.0, 0.0, False)
        if result is not NotImplemented:
            return result
    return _general_activation(sigmoid, F.sigmoid, "sigmoid", 0.0, 0.0, False, input)


def logsigmoid(input: Tensor) -> Tensor:
    """log(sigmoid(x))."""
    if not _is_compiling():
        result = _fast_activation(input, _LOGSIGMOID, 0.0, 0.0, False)
        if result is not NotImplemented:
            return result
    return _general_activation(logsigmoid, F.logsigmoid, "logsigmoid", 0.0, 0.0, False, input)


def tanh(input: Tensor) -> Tensor:
    """tanh(x)."""
    if not _is_compiling():
        result = _fast_activation(input, _TANH, 0.0, 0.0, False)
        if result is not NotImplemented:
            return result
    return _general_activation(tanh, F.tanh, "tanh", 0.0, 0.0, False, input)


def softplus(input: Tensor, beta: float = 1.0, threshold: float = 20.0) -> Tensor:
    """beta x > threshold ? x : log(1 + exp(beta x)) / beta."""
    if not _is_compiling():
        result = _fast_activation(input, _SOFTPLUS, beta, threshold, False)
        if result is not NotImplemented:
            return result
    return _general_activation(softplus, F.softplus, "softplus", beta, threshold, False, input, beta, threshold)


def softsign(input: Tensor) -> Tensor:
    """x / (1 + |x|)."""
    if not _is_compiling():
        result = _fast_activation(input, _SOFTSIGN, 0.0, 0.0, False)
        if result is not NotImplemented:
            return result
    return _general_activation(softsign, F.softsign, "softsign", 0.0, 0.0, False, input)


def hardtanh(input: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Tensor:
    """min(max(x, min_val), max_val). ValueError where min_val > max_val."""
    if min_val > max_val:
        raise ValueError(f"hardtanh: min_val cannot be greater than max_val, got {min_val} and {max_val}")
    if not _is_compiling():
        result = _fast_activation(input, _HARDTANH, min_val, max_val, inplace)
        if result is not NotImplemented:
            return result
    return _general_activation(
        hardtanh, F.hardtanh, "hardtanh", min_val, max_val, inplace, input, min_val, max_val, inplace
    )


def hardtanh_(input: Tensor, min_val: float = -1.0, max_val: float = 1.0) -> Tensor:
    """hardtanh, into input's own memory."""
    if not _is_compiling():
        result = _fast_activation(input, _HARDTANH, min_val, max_val, True)
        if result is not NotImplemented:
            return result
    return _general_activation(hardtanh_, F.hardtanh_, "hardtanh", min_val, max_val, True, input, min_val, max_val)


def hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    """min(max(x + 3, 0), 6) / 6."""
    if not _is_compiling():
        result = _fast_activation(input, _HARDSIGMOID, 0.0, 0.0, inplace)
        if result is not NotImplemented:
            return result
    return _general_activation(hardsigmoid, F.hardsigmoid, "hardsigmoid", 0.0, 0.0, inplace, input, inplace)


def hardswish(input: Tensor, inplace: bool = False) -> Tensor:
    """x min(max(x + 3, 0), 6) / 6."""
    if not _is_compiling():
        result = _fast_activation(input, _HARDSWISH, 0.0, 0.0, inplace)
        if result is not NotImplemented:
            return result
    return _general_activation(hardswish, F.hardswish, "hardswish", 0.0, 0.0, inplace, input, inplace)


def hardshrink(input: Tensor, lambd: float = 0.5) -> Tensor:
    """|x| <= lambd ? 0 : x."""
    if not _is_compiling():
        result = _fast_activation(input, _HARDSHRINK, lambd, 0.0, False)
        if result is not NotImplemented:
            return result
    return _general_activation(hardshrink, F.hardshrink, "hardshrink", lambd, 0.0, False, input, lambd)


def softshrink(input: Tensor, lambd: float = 0.5) -> Tensor:
    """x > lambd ? x - lambd : x < -lambd ? x + lambd : 0. RuntimeError where lambd < 0."""
    if not _is_compiling() and lambd >= 0:
        result = _fast_activation(input, _SOFTSHRINK, lambd, 0.0, False)
        if result is not NotImplemented:
            return result
    return _general_activation(softshrink, F.softshrink, "softshrink", lambd, 0.0, False, input, lambd)


def tanhshrink(input: Tensor) -> Tensor:
    """x - tanh(x)."""
    if not _is_compiling():
        result = _fast_activation(input, _TANHSHRINK, 0.0, 0.0, False)
        if result is not NotImplemented:
            return result
    return _general_activation(tanhshrink, F.tanhshrink, "tanhshrink", 0.0, 0.0, False, input)


def _threshold(input: Tensor, threshold: float, value: float, inplace: bool = False) -> Tensor:
    """x > threshold ? x : value."""
    if not _is_compiling():
        result = _fast_activation(input, _THRESHOLD, threshold, value, inplace)
        if result is not NotImplemented:
            return result
    return _general_activation(
        _threshold, F.threshold, "threshold", threshold, value, inplace, input, threshold, value, inplace
    )


# Under this name the function's own argument hides it, as in PyTorch.
threshold = _threshold


def threshold_(input: Tensor, threshold: float, value: float) -> Tensor:
    """threshold, into input's own memory."""
    if not _is_compiling():
        result = _fast_activation(input, _THRESHOLD, threshold, value, True)
        if result is not NotImplemented:
            return result
    return _general_activation(threshold_, F.threshold_, "threshold", threshold, value, True, input, threshold, value)


def prelu(input: Tensor, weight: Tensor) -> Tensor:
    """x > 0 ? x : w x, one weight for all or one for each channel (dimension 1).

    Shapes: input (N, C, *) with weight (C), or any input with weight (1).
    Raises: RuntimeError where the number of weights is neither 1 nor the number of channels, or the dtypes differ.
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
    """x1 * sigmoid(x2) for the two halves of input along dim.

    Shapes: (*, 2n, *) -> (*, n, *).
    Raises: RuntimeError for a scalar or an odd size along dim. IndexError for a dim out of range.
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
