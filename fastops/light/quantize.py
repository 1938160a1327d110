"""fastops.light.quantize_."""

import dis
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import nn

import fastops.nn as fnn
from fastops.light._layers import checked_filter, in_adapters
from fastops.light._qat_layers import FakeQuantized
from fastops.light._quantized import Quantized, QuantizedLinear, activation_of, become
from fastops.light._static import Batches, quantize_static
from fastops.light.linear_int8 import MOST_FEATURES, LinearInt8
from fastops.light.sparse_linear import Conv2d1x1Sparse, LinearSparse
from fastops.light.weight_only import LinearWeightOnly, checked_group_size
from fastops.nn._fused import FUSED
from fastops.replace import Report, Row
from fastops.replace import _name as class_name
from fastops.replace import _read_directly as read_directly
from fastops.replace import _why_not as why_not
from fastops.replace import _why_not_type as why_not_type
from fastops.replace import _works as works

__all__ = ["quantize_"]

# The options of the weight-only ones.
_WEIGHT_ONLY = {"int8_weight": {"bits": 8}, "int4_weight": {"bits": 4}, "fp8_weight": {"bits": 8, "float8": True}}
CONFIGS = ("int8_dynamic", "int8_static", *_WEIGHT_ONLY)
_FUSED = FUSED[fnn.Linear]
_LINEAR = (nn.Linear, fnn.Linear, _FUSED)
# Fewer weights than these are as fast in float32, where a call takes some microseconds. PyTorch's float32 layer and
# LinearInt8, 2 threads, Emerald Rapids, us: 64 x 128 -> 10 11.4 and 11.8; 1 x 64 -> 64 7.2 and 7.6; 100 x 10 -> 5 8.9
# and 13.2; 1 x 784 -> 128 13.5 and 10.0.
_LEAST_WEIGHTS = 8192


def quantize_(
    model: nn.Module,
    config: str = "int8_dynamic",
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    group_size: int | None = None,
    calibrate: Batches | None = None,
    observer: str = "minmax",
    symmetric: bool = False,
) -> Report:
    """Turns the weights of a model's layers into integers, in place. It cannot be undone: keep a checkpoint.

    torch.nn.Linear and fastops.nn.Linear, with "int8_static" also Conv2d, become, with

    - "int8_dynamic": LinearInt8. Weights have 8 bits and a scale for each output feature; inputs are rounded to 8 bits
      row by row as they come. The fastest one from some rows on. The weights take a quarter of float32's bytes on disk,
      and half of them in memory, where packed weights are kept, too.
    - "int8_static": LinearInt8Static and Conv2dInt8. Weights have 8 bits and a scale for each output; inputs are
      rounded to 8 bits with one scale, which calibration finds. fastops.freeze(model) then keeps what such layers hand
      on to each other in 8 bits, with batch norms, ReLU, max pools and residual additions between them.
    - "int8_weight": LinearWeightOnly with 8 bits. Inputs are not rounded. A quarter of float32's bytes. For few rows.
    - "int4_weight": LinearWeightOnly with 4 bits. With groups of 128, 0.14 of float32's bytes. For few rows.
    - "fp8_weight": LinearWeightOnly with float8 (e4m3) weights: as "int8_weight", but a weight's rounding error is a
      part of the weight, and not of the largest of its row.

    "int8_static" has to be calibrated, the others do not: the model is called in eval mode, without gradients, and the
    numbers that reach each layer are seen.

    Args:
        model: any module; it may itself be such a layer, and stays the same object. state_dict keys stay, and each
            quantized layer has more, `scale` and perhaps `offset`.
        config: one of these names.
        filter_fn: filter_fn(module, fqn) -> bool says which of the layers to quantize; None means those of 8192
            weights and more, as smaller ones would not be faster, and with "int8_static" all.
        group_size: of weight-only layers, how many weights of a row have one scale: a power of two from 16 on. None:
            128 for "int4_weight", the whole row for "int8_weight".
        calibrate: for "int8_static". Batches, an iterable: the model is called with each, which is a tensor, a tuple of
            its arguments or a dict of them. Or a function, calibrate(model), that calls the model.
        observer: how the range of an input follows from what was seen. "minmax": all of it. "percentile": all but one
            of ten thousand numbers at either end. "mse": the part of it for which rounding loses least, in the square.
        symmetric: whether levels lie evenly around 0. By default they go from the least number to the greatest.

    Returns:
        A Report as replace_ makes it: what was quantized, what was skipped and why, and what else computes something.

    Raises:
        TypeError: model is not a torch.nn.Module, filter_fn no function, or calibrate neither iterable nor callable.
        ValueError: config, group_size or observer is not one of these; calibration called none of the layers, or one
            with NaN, an infinity or a constant.
        What filter_fn, calibrate and the model raise. The model is then what it was.

    Source: torchao's quantize_, whose names these are.

    >>> from fastops import light
    >>> model = nn.Sequential(nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 10))
    >>> report = light.quantize_(model, "int8_dynamic")
    >>> model[0]
    LinearInt8(in_features=256, out_features=256, bias=True)
    """
    checked_config("quantize_", model, config, group_size)
    checked_filter("quantize_", filter_fn)
    if config == "int8_static":
        return quantize_static(model, filter_fn, calibrate, observer, symmetric)
    if calibrate is not None:
        raise ValueError(f"quantize_: calibrate is for 'int8_static', got one with {config!r}")
    result, options = result_of(config, group_size, "quantize_")
    report, chosen = choose(model, config, filter_fn, result)
    for module in chosen:  # only now that filter_fn has not raised
        change(module, result, **options)
    return report


def checked_config(function: str, model: nn.Module, config: str, group_size: int | None) -> None:
    """What quantize_ and prepare_qat_ take."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}: model must be a torch.nn.Module, got {type(model).__name__}")
    if config not in CONFIGS:
        raise ValueError(f"{function}: config must be one of {', '.join(map(repr, CONFIGS))}, got {config!r}")
    if config in ("int8_dynamic", "int8_static") and group_size is not None:
        raise ValueError(f"{function}: group_size is for weight-only layers, got {group_size!r} with {config!r}")


def result_of(config: str, group_size: int | None, function: str) -> tuple[type[QuantizedLinear], dict[str, Any]]:
    """The class that a linear layer becomes, and the options of its weights; not of "int8_static"."""
    if config == "int8_dynamic":
        return LinearInt8, {}
    options = {**_WEIGHT_ONLY[config], "group_size": group_size}
    try:
        checked_group_size(in_features=1, **options)
    except ValueError as error:
        raise ValueError(f"{function}: {error}") from None
    return LinearWeightOnly, options


def choose(
    model: nn.Module, config: str, filter_fn: Callable[[nn.Module, str], bool] | None, result: type[nn.Module]
) -> tuple[Report, list[nn.Module]]:
    """Which linear layers become `result`, and the report that says so; not of "int8_static"."""
    report, chosen = Report(), []
    # fastops' TransformerEncoderLayer reads weights, too, where it leaves a call to PyTorch's.
    direct = {**in_adapters(model), **_read_in_forward(model, config), **read_directly(model, calling=())}
    for name, module in model.named_modules():
        cls = type(module)
        why = direct.get(id(module), "")
        if cls in _LINEAR:
            # fastops' own have an attribute named activation.
            why = why or why_not(module, fnn.Linear if cls is nn.Linear else result) or _no_kernel(module, config)
            if not why and filter_fn is None:
                why = _too_small(module)
            elif not why and not filter_fn(module, name):
                why = "filter_fn said no"
            if not why:
                report.replaced.append(Row(name, class_name(cls), f"fastops.light.{result.__name__}"))
                chosen.append(module)
        elif isinstance(module, Quantized):
            why = "sparse" if isinstance(module, (LinearSparse, Conv2d1x1Sparse)) else "already quantized"
        elif isinstance(module, FakeQuantized):
            why = "prepared for training: convert_qat_ quantizes it"
        elif isinstance(module, nn.Linear):
            why = why or why_not_type(module)
        elif works(module):
            report.left.append(Row(name, class_name(cls), f"no {config} kernel"))
        if why:
            report.skipped.append(Row(name, class_name(cls), why))
    return report, chosen


def change(
    linear: nn.Module,
    cls: type[QuantizedLinear],
    bits: int | None = None,
    group_size: int | None = None,
    float8: bool = False,
) -> None:
    """Turns a linear layer into a quantized one where it is: hooks, bias and name stay."""
    activation = activation_of(linear)
    if bits is not None:
        linear.bits, linear.float8 = bits, float8
        linear.group_size = checked_group_size(bits, group_size, linear.in_features, float8)
    become(linear, cls, linear.weight, activation)


def _read_in_forward(model: nn.Module, config: str) -> dict[int, str]:
    """Layers whose parents' forwards read `self.layer.weight`, as many of transformers' do to cast what they give the
    layer to its dtype, and why they stay, by id. Some of these know torch.int8.
    """
    found = {}
    for parent in model.modules():
        code = getattr(type(parent).forward, "__code__", None)
        if code is None or (config.startswith("int8") and "int8" in code.co_names):
            continue
        for one, after in pairwise(dis.get_instructions(code)):
            child = parent._modules.get(one.argval) if one.opname == "LOAD_ATTR" else None
            if child is not None and after.opname == "LOAD_ATTR" and after.argval == "weight":
                found[id(child)] = f"{class_name(type(parent))} reads its weight directly"
    return found


def _too_small(module: nn.Module) -> str:
    small = module.weight.numel() < _LEAST_WEIGHTS
    return f"fewer than {_LEAST_WEIGHTS} weights, which would be no faster" if small else ""


def _no_kernel(module: nn.Module, config: str) -> str:
    if "weight" not in module._parameters:
        return "its weight is computed at every call: prune.remove, remove_weight_norm or the like ends that"
    if config == "int8_dynamic" and module.in_features > MOST_FEATURES:
        return f"it has more than {MOST_FEATURES} in_features, whose products need not fit 32 bits"
    if type(module.weight) is not nn.Parameter:  # a DTensor
        return f"weight is a {type(module.weight).__name__}, a tensor subclass"
    if not module.weight.is_cpu and not module.weight.is_meta:
        return f"weight is on {module.weight.device}: the kernels of {config} are the CPU's"
    if module.weight.dtype is torch.float64:
        return f"weight has dtype float64, which no {config} kernel takes"
    return ""
