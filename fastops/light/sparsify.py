"""fastops.light.sparsify_ and densify_."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import fastops.nn as fnn
from fastops import _C
from fastops.light._layers import checked_filter, in_adapters
from fastops.light._qat_layers import FakeQuantized
from fastops.light._quantized import QuantizedLinear, activation_of, become
from fastops.light.sparse_linear import BLOCK_SIZES, Conv2d1x1Sparse, LinearSparse, is_pointwise, kept_blocks
from fastops.light.weights import take_masks_
from fastops.nn._fused import FUSED, Fused
from fastops.replace import Report, Row
from fastops.replace import _name as class_name
from fastops.replace import _read_directly as read_directly
from fastops.replace import _why_not as why_not
from fastops.replace import _why_not_type as why_not_type
from fastops.replace import _works as works

__all__ = ["densify_", "sparsify_"]

_LINEAR = (nn.Linear, fnn.Linear, FUSED[fnn.Linear])
_CONV = (nn.Conv2d, fnn.Conv2d, FUSED[fnn.Conv2d])
# Up to how many rows of the input a stored weight costs how much, by block size, in units of a weight of fastops' dense
# layer. 1024 x 1024 with 80% zeros, 2 threads, Zen 5: 1, 4, 16 and 64 rows. Dense weights were in L3; of 4096 x 4096
# ones, which were not, stored ones cost 2.2, 1.2, 0.8 and 0.8 of a dense one for one row.
_COSTS = {
    1: {(1, 1): 8.0, (1, 4): 4.3, (4, 4): 3.2, (16, 1): 2.8},
    8: {(1, 1): 8.5, (1, 4): 7.9, (4, 4): 5.8, (16, 1): 5.5},
    16: {(1, 1): 3.8, (1, 4): 3.2, (4, 4): 2.5, (16, 1): 2.5},
    math.inf: {(1, 1): 2.7, (1, 4): 2.5, (4, 4): 1.3, (16, 1): 1.3},
}
# What an input or output feature costs besides, in the same units: rows become lanes, and lanes rows again. 256 -> 1024
# channels of 14 x 14 with 80% zeros are 1.6 times as fast as dense, 96 -> 24 of 56 x 56 0.8 times.
_FEATURE_COST = 20
# On processors with AMX dense float32 layers are faster than multiply-adds are (docs/numerics.md): 1.5 to 1.6 times for
# 512 x 512 weights and more, Granite Rapids. With fewer features than these they are multiply-adds (linear.inl).
_DENSE_BY_PARTS, _PARTS_FEATURES = 1.6, 128
_LEAST_WEIGHTS = 8192  # fewer take less time than a call


def sparsify_(
    model: nn.Module,
    min_sparsity: float = 0.7,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    rows: int = 64,
) -> Report:
    """Makes the layers sparse, in place, whose weights are mostly zeros and for which the sparse kernels are faster.

    torch.nn.Linear and fastops.nn.Linear become LinearSparse, and torch.nn.Conv2d and fastops.nn.Conv2d with kernels of
    1 x 1 Conv2d1x1Sparse. Nothing is rounded and no weight is dropped. Zeros may come from anywhere; where they are a
    mask of torch.nn.utils.prune, it is made permanent first (take_masks_). Of the block sizes (1, 1), (1, 4), (4, 4)
    and (16, 1), each layer gets the one that is fastest for where its zeros are. 2:4 patterns are half zeros to these
    kernels: too few to be faster.

    Args:
        model: any module; it may itself be such a layer, and stays the same object.
        min_sparsity: the least part of a weight that is zero, from 0 to 1.
        filter_fn: filter_fn(module, fqn) -> bool says which of the layers to make sparse, however fast; None means
            those of 8192 weights and more that should be faster, by what was measured of each block size.
        rows: how many rows the input of a linear layer usually has. With few, fewer layers are faster.

    Returns:
        A Report as replace_ makes it: what was made sparse, with the part of zeros; what was skipped and why; and what
        else computes something.

    Raises:
        TypeError: model is not a torch.nn.Module. ValueError: min_sparsity is not from 0 to 1.
        What filter_fn raises; the model is then what it was.

    >>> from fastops import light
    >>> model = nn.Sequential(nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 10))
    >>> torch.nn.utils.prune.l1_unstructured(model[0], "weight", 0.9)
    Linear(in_features=256, out_features=256, bias=True)
    >>> print(light.sparsify_(model))
    0  torch.nn.Linear  ->        fastops.light.LinearSparse, 90.0% zeros
    2  torch.nn.Linear  skipped:  0.0% zeros, fewer than min_sparsity=0.7
    left alone, no sparse kernel: 1 x torch.nn.GELU
    1 replaced, 1 skipped, 1 left alone
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"sparsify_: model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(min_sparsity, (int, float)) or not 0 <= min_sparsity <= 1:
        raise ValueError(f"sparsify_: min_sparsity must be from 0 to 1, got {min_sparsity!r}")
    checked_filter("sparsify_", filter_fn)
    if type(rows) is not int or rows < 1:
        raise ValueError(f"sparsify_: rows must be a positive int, got {rows!r}")
    costs = next(costs for most, costs in _COSTS.items() if rows <= most)
    report, chosen = Report(), []
    direct = {**in_adapters(model), **read_directly(model, calling=())}
    for name, module in model.named_modules():
        cls = type(module)
        why = direct.get(id(module), "")
        if cls in _LINEAR or (cls in _CONV and is_pointwise(module)):
            result = LinearSparse if cls in _LINEAR else Conv2d1x1Sparse
            # fastops' own have an attribute named activation.
            ours = {nn.Linear: fnn.Linear, nn.Conv2d: fnn.Conv2d}.get(cls, result)
            why = why or why_not(module, ours) or _no_kernel(module)
            if not why:
                zeros, block_size, gain = _layout(
                    _effective_weight(module).flatten(1), costs if cls in _LINEAR else _COSTS[math.inf]
                )
                if zeros < min_sparsity:
                    why = f"{zeros:.1%} zeros, fewer than min_sparsity={min_sparsity}"
                elif filter_fn is None:
                    why = _no_faster(module, zeros, gain)
                elif not filter_fn(module, name):
                    why = "filter_fn said no"
            if not why:
                chosen.append((module, result, block_size))
                blocks = "" if block_size == (1, 1) else f", blocks of {block_size[0]} x {block_size[1]}"
                row = f"fastops.light.{result.__name__}, {zeros:.1%} zeros{blocks}"
                report.replaced.append(Row(name, class_name(cls), row))
        elif isinstance(module, (LinearSparse, Conv2d1x1Sparse)):
            why = "already sparse"
        elif isinstance(module, QuantizedLinear):
            why = "quantized"
        elif isinstance(module, FakeQuantized):
            why = "prepared for training"
        elif isinstance(module, nn.Linear):
            why = why or why_not_type(module)
        elif works(module):
            report.left.append(Row(name, class_name(cls), "no sparse kernel"))
        if why:
            report.skipped.append(Row(name, class_name(cls), why))
    for module, result, block_size in chosen:  # only now that filter_fn has not raised
        _change(module, result, block_size)
    return report


def densify_(model: nn.Module) -> Report:
    """Gives the layers that sparsify_ has changed their class and a dense weight back, in place, without a mask.

    Args:
        model: any module. The weight gets the dtype of the layer's bias, and float32 where it has none.

    Returns:
        A Report: what is dense again.

    Raises:
        TypeError: model is not a torch.nn.Module.

    >>> from fastops import light
    >>> model = nn.Sequential(light.LinearSparse(64, 64), nn.ReLU())
    >>> print(light.densify_(model))
    0  fastops.light.LinearSparse  ->  torch.nn.Linear
    1 replaced, 0 skipped, 0 left alone
    >>> model[0]
    Linear(in_features=64, out_features=64, bias=True)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"densify_: model must be a torch.nn.Module, got {type(model).__name__}")
    report = Report()
    for name, module in model.named_modules():
        if isinstance(module, (LinearSparse, Conv2d1x1Sparse)):
            dense = _dense_class(module)
            report.replaced.append(Row(name, f"fastops.light.{type(module).__name__}", class_name(dense)))
            _change_back(module, dense)
    return report


def _change(module: nn.Module, cls: type[Any], block_size: tuple[int, int]) -> None:
    """Makes a layer sparse where it is: hooks, bias, name and attributes stay."""
    take_masks_(module)
    weight, activation = module.weight, activation_of(module)
    module._dense_class, module.block_size = type(module), block_size
    become(module, cls, weight, activation)
    module.values.requires_grad_(weight.requires_grad)


def _dense_class(module: Any) -> type[nn.Module]:
    known = vars(module).get("_dense_class")
    if known is not None and issubclass(known, Fused) is (module.activation is not None):
        return known
    theirs, ours = (nn.Linear, fnn.Linear) if isinstance(module, LinearSparse) else (nn.Conv2d, fnn.Conv2d)
    return theirs if module.activation is None else FUSED[ours]


def _change_back(module: Any, cls: type[nn.Module]) -> None:
    weight, bias = module.weight.detach(), module.bias
    weight = nn.Parameter(weight if bias is None else weight.to(bias.dtype), module.values.requires_grad)
    if isinstance(module, Conv2d1x1Sparse):  # which may never have been another one, and lack its attributes
        plain = nn.Conv2d(module.in_channels, module.out_channels, 1, module.stride, device="meta")
        for key, value in vars(plain).items():
            vars(module).setdefault(key, value)
    for name in ("values", "bias"):
        del module._parameters[name]
    for name in ("crow_indices", "col_indices"):
        del module._buffers[name]
    for name in ("_dense_class", "_indices", "block_size"):
        vars(module).pop(name, None)
    if not issubclass(cls, Fused):
        del vars(module)["activation"]
    module.__class__ = cls
    module.register_parameter("weight", weight)
    module.register_parameter("bias", bias)


def _effective_weight(module: nn.Module) -> Tensor:
    """With the mask of torch.nn.utils.prune, which a forward puts on the weight."""
    if "weight" in module._parameters:
        return module.weight.detach()
    return module.weight_orig.detach() * module.weight_mask


def _layout(weight: Tensor, costs: Mapping[tuple[int, int], float]) -> tuple[float, tuple[int, int], float]:
    """The part of zeros, the fastest block size, and how many times as fast as the dense layer it should be."""
    elements, features = max(weight.numel(), 1), sum(weight.shape)
    times = {}
    for block_size in BLOCK_SIZES:
        kept = int(kept_blocks(weight, block_size)[1].sum()) * block_size[0] * block_size[1]
        times[block_size] = (kept * costs[block_size] + features * _FEATURE_COST) / elements
    block_size = min(times, key=times.__getitem__)
    by_parts = _C.isa_used() == "amx" and min(weight.shape[:2]) >= _PARTS_FEATURES
    dense = 1 / _DENSE_BY_PARTS if by_parts else 1
    return 1 - int(weight.count_nonzero()) / elements, block_size, dense / max(times[block_size], 1e-3)


def _no_faster(module: nn.Module, zeros: float, gain: float) -> str:
    elements = _effective_weight(module).numel()
    if elements < _LEAST_WEIGHTS:
        return f"fewer than {_LEAST_WEIGHTS} weights, which would be no faster"
    return f"{zeros:.1%} zeros where they are would be no faster than the dense layer" if gain <= 1 else ""


def _no_kernel(module: nn.Module) -> str:
    if "weight" not in module._parameters and "weight_mask" not in module._buffers:
        return "its weight is computed at every call: remove_weight_norm or the like ends that"
    weight = module._parameters.get("weight", module._parameters.get("weight_orig"))
    if type(weight) is not nn.Parameter:  # a DTensor
        return f"weight is a {type(weight).__name__}, a tensor subclass"
    if not weight.is_cpu:
        return f"weight is on {weight.device}: the sparse kernels are the CPU's"
    if weight.dtype is torch.float64:
        return "weight has dtype float64, which no sparse kernel takes"
    return ""
