"""fastops.light.take_over_: models that torchao has quantized, on fastops' kernels."""

from typing import Any

import torch
from torch import Tensor, nn

from fastops.light._quantized import become
from fastops.light.linear_int8 import MOST_FEATURES, LinearInt8
from fastops.light.weight_only import LinearWeightOnly
from fastops.replace import Report, Row
from fastops.replace import _name as class_name

__all__ = ["take_over_"]


def take_over_(model: nn.Module) -> Report:
    """Turns linear layers that torchao has quantized into fastops' own, in place, with the same integers and scales.

        torchao.quantization.quantize_(model, Int8WeightOnlyConfig())
        light.take_over_(model)

    What Int8WeightOnlyConfig made becomes a LinearWeightOnly, which computes the same. What
    Int8DynamicActivationInt8WeightConfig made becomes a LinearInt8. It has the same weights; rows of its input are
    rounded to 256 levels between their ends, which is finer than torchao's symmetric ones. A checkpoint of torchao's
    is loaded into such a model first.

    Args:
        model: any module; it stays the same object. Its linear layers have any shape; float32, bfloat16 or float16.

    Returns:
        A Report: what was taken over, and which quantized layers were not, and why.

    Raises:
        TypeError: model is not a torch.nn.Module.

    Source: torchao.quantization's Int8Tensor (0.18), known by its name: torchao is not imported.

    >>> from fastops import light
    >>> print(light.take_over_(nn.Sequential(nn.Linear(64, 64))))
    0 replaced, 0 skipped, 0 left alone
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"take_over_: model must be a torch.nn.Module, got {type(model).__name__}")
    report = Report()
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is None or not type(weight).__module__.startswith("torchao."):
            continue
        why = _why_not(module, weight)
        if why:
            report.skipped.append(Row(name, class_name(type(module)), why))
            continue
        cls = LinearWeightOnly if weight.act_quant_kwargs is None else LinearInt8
        _take(module, weight, cls)
        report.replaced.append(Row(name, class_name(nn.Linear), f"fastops.light.{cls.__name__}"))
    return report


def _why_not(module: nn.Module, weight: Any) -> str:
    if type(module) is not nn.Linear:
        return "only torch.nn.Linear is taken over"
    if type(weight).__name__ != "Int8Tensor":
        return f"its weight is a {type(weight).__name__}: only torchao's int8 ones are taken over"
    n, k = weight.qdata.shape
    group = weight.block_size[-1]
    dynamic = weight.act_quant_kwargs is not None
    if not weight.qdata.is_cpu:
        return f"its weight is on {weight.qdata.device}: the kernels are the CPU's"
    if weight.act_quant_scale is not None or weight.act_pre_scale is not None:
        return "its input has a scale of its own, which the kernels do not take"
    if weight.zero_point is not None and bool(weight.zero_point.any()):
        return "its weights have zero points: only symmetric ones are taken over"
    if weight.block_size[0] not in (1, n) or (weight.block_size[0] != 1 and group != k):
        return f"its weights have a scale for each {' x '.join(map(str, weight.block_size))} of them"
    if group != k and (dynamic or group < 16 or group & (group - 1) or k % group):
        return f"{group} weights share a scale: " + (
            "only whole rows of LinearInt8's may" if dynamic else "only a power of two from 16 on may"
        )
    if dynamic and k > MOST_FEATURES:
        return f"it has more than {MOST_FEATURES} in_features, whose products need not fit 32 bits"
    return ""


# Tensors made in inference mode cannot be saved for a backward, nor loaded into.
@torch.inference_mode(False)
def _take(module: nn.Module, weight: Any, cls: type[nn.Module]) -> None:
    n, k = weight.qdata.shape
    group = weight.block_size[-1]
    module.__dict__.pop("extra_repr", None)  # torchao's
    if cls is LinearWeightOnly:
        module.bits, module.float8, module.group_size = 8, False, group
    become(module, cls, torch.zeros(n, k), None)
    scale = weight.scale.float().reshape(-1, k // group).expand(n, k // group)
    module.weight = _own(weight.qdata)
    module.scale = _own(scale if cls is LinearWeightOnly else scale[:, 0])


def _own(tensor: Tensor) -> Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format)
