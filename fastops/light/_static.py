"""quantize_(model, "int8_static"): calibration, then the layers."""

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import fastops.nn as fnn
from fastops._frozen_norms import NORMS
from fastops.light._layers import in_adapters
from fastops.light._observers import OBSERVERS, Observer
from fastops.light._qat_layers import FakeQuantized
from fastops.light._quantized import Quantized, activation_of, become
from fastops.light.conv2d_int8 import MOST_PRODUCTS, Conv2dInt8, LinearInt8Static
from fastops.nn._fused import FUSED
from fastops.replace import Report, Row
from fastops.replace import _name as class_name
from fastops.replace import _read_directly as read_directly
from fastops.replace import _why_not as why_not
from fastops.replace import _why_not_type as why_not_type
from fastops.replace import _works as works

Batches = Iterable[Any] | Callable[[nn.Module], Any]

RESULTS = {cls: LinearInt8Static for cls in (nn.Linear, fnn.Linear, FUSED[fnn.Linear])}
RESULTS |= {cls: Conv2dInt8 for cls in (nn.Conv2d, fnn.Conv2d, FUSED[fnn.Conv2d])}
_FLOAT = {nn.Linear: fnn.Linear, nn.Conv2d: fnn.Conv2d}


def quantize_static(
    model: nn.Module,
    filter_fn: Callable[[nn.Module, str], bool] | None,
    calibrate: Batches | None,
    observer: str,
    symmetric: bool,
) -> Report:
    """See fastops.light.quantize_, which has checked nothing of these."""
    if calibrate is None:
        raise ValueError(
            "quantize_: calibrate must be given with 'int8_static': batches of inputs, or a function that calls the "
            "model with some"
        )
    if observer not in OBSERVERS:
        raise ValueError(f"quantize_: observer must be one of {', '.join(map(repr, OBSERVERS))}, got {observer!r}")
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ValueError(
                f"quantize_: 'int8_static' is calibrated by calling the model, whose {name!r} is on the meta device "
                "and has no numbers: load its weights first"
            )
    report, chosen = choose_static(model, filter_fn)
    seen = Calibration(chosen, observer)
    seen.run(model, calibrate)
    for module, name in tuple(chosen.items()):
        if not seen.inputs[module].called:
            del chosen[module]
            row = next(row for row in report.replaced if row.name == name)
            report.replaced.remove(row)
            report.skipped.append(row._replace(result="calibration never called it"))
    ranges = {module: seen.ranges(module, symmetric) for module in chosen}
    for module, (input_range, output_range) in ranges.items():  # only now that nothing can raise any more
        become(module, RESULTS[type(module)], module.weight, activation_of(module))
        module.set_range("input", *input_range, symmetric)
        module.set_range("output", *output_range, symmetric)
    return report


def choose_static(
    model: nn.Module,
    filter_fn: Callable[[nn.Module, str], bool] | None,
    results: Mapping[type[nn.Module], type[nn.Module]] = RESULTS,
) -> tuple[Report, dict[nn.Module, str]]:
    """Which layers become what `results` says for their classes, with their names, and the report that says so."""
    report, chosen = Report(), {}
    direct = {**in_adapters(model), **read_directly(model, calling=())}
    for name, module in model.named_modules():
        cls, why = type(module), direct.get(id(module), "")
        result = results.get(cls)
        if result is not None:
            plain = cls in (nn.Linear, nn.Conv2d)
            why = why or why_not(module, _FLOAT[cls] if plain else result) or _no_kernel(module)
            if not why and filter_fn is not None and not filter_fn(module, name):
                why = "filter_fn said no"
            if not why:
                report.replaced.append(Row(name, class_name(cls), f"fastops.light.{result.__name__}"))
                chosen[module] = name
        elif isinstance(module, Quantized):
            why = "already quantized"
        elif isinstance(module, FakeQuantized):
            why = "prepared for training: convert_qat_ quantizes it"
        elif isinstance(module, (nn.Linear, nn.Conv2d)):
            why = why or why_not_type(module)
        elif works(module):
            report.left.append(Row(name, class_name(cls), "no int8_static kernel"))
        if why:
            report.skipped.append(Row(name, class_name(cls), why))
    return report, chosen


def _no_kernel(module: nn.Module) -> str:
    if "weight" not in module._parameters:
        return "its weight is computed at every call: prune.remove, remove_weight_norm or the like ends that"
    weight = module.weight
    products = weight[0].numel() if len(weight) else 0
    if products > MOST_PRODUCTS:
        return f"it sums more than {MOST_PRODUCTS} products, which need not fit 32 bits"
    if getattr(module, "padding_mode", "zeros") != "zeros":
        return f"padding_mode is {module.padding_mode!r}: only 'zeros' has an int8_static kernel"
    if type(weight) is not nn.Parameter:  # a DTensor
        return f"weight is a {type(weight).__name__}, a tensor subclass"
    if not weight.is_cpu:
        return f"weight is on {weight.device}: the kernels of int8_static are the CPU's"
    if weight.dtype is torch.float64:
        return "weight has dtype float64, which no int8_static kernel takes"
    if not weight.isfinite().all():
        return "its weight holds NaN or infinity"
    return ""


class Calibration:
    """Observers of what the chosen modules are given, and of what they give, or the batch norm right after them."""

    def __init__(self, chosen: Mapping[nn.Module, str], observer: str, function: str = "quantize_") -> None:
        self.names, self.observer, self.function = chosen, observer, function
        histogram = observer != "minmax"
        self.inputs = {module: Observer(histogram) for module in chosen}
        self.outputs = {module: Observer(histogram) for module in chosen}
        self.before_norm = {module: Observer(histogram) for module in chosen}
        self.last: dict[int, tuple[Any, nn.Module]] = {}  # by id, what a module has just given, weakly

    def run(self, model: nn.Module, calibrate: Batches) -> None:
        """Calls the model in eval mode; the modes of its modules are then what they were."""
        if not callable(calibrate) and not isinstance(calibrate, Iterable):
            kind = type(calibrate).__name__
            raise TypeError(f"{self.function}: calibrate must be an iterable or a function, got {kind}")
        training = {module: module.training for module in model.modules()}
        norms = tuple(NORMS)
        hooks = []
        try:
            model.eval()
            for module in model.modules():
                if module in self.names:
                    hooks.append(module.register_forward_pre_hook(self._before, with_kwargs=True))
                    hooks.append(module.register_forward_hook(self._after))
                elif type(module) in norms:
                    hooks.append(module.register_forward_hook(self._after_norm))
            with torch.no_grad():
                batches = self._call(model, calibrate)
        finally:
            for hook in hooks:
                hook.remove()
            for module, mode in training.items():
                module.training = mode
        if batches == 0 or (self.names and not any(one.called for one in self.inputs.values())):
            what = "gave no batch" if batches == 0 else "called none of the layers that are to be quantized"
            raise ValueError(f"{self.function}: calibrate {what}; the ranges of the inputs come from it")

    @staticmethod
    def _call(model: nn.Module, calibrate: Batches) -> int | None:
        if callable(calibrate):
            calibrate(model)
            return None
        if isinstance(calibrate, Tensor):
            calibrate = (calibrate,)
        count = 0
        for batch in calibrate:
            count += 1
            if isinstance(batch, Mapping):
                model(**batch)
            elif isinstance(batch, (tuple, list)):
                model(*batch)
            else:
                model(batch)
        return count

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._see(self.inputs[module], args[0] if args else kwargs.get("input"), "input", module)

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._see(self.before_norm[module], output, "output", module)
        if isinstance(output, Tensor):
            self.last = {key: entry for key, entry in self.last.items() if entry[0]() is not None}
            self.last[id(output)] = weakref.ref(output), module

    def _after_norm(self, norm: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        there, module = self.last.get(id(args[0]) if args else 0, (None, None))
        if there is not None and there() is args[0]:
            self._see(self.outputs[module], output, "output", module)

    def _see(self, observer: Observer, tensor: Any, what: str, module: nn.Module) -> None:
        if isinstance(tensor, Tensor) and tensor.is_floating_point():
            observer.see(tensor)
            if not observer.finite:
                raise ValueError(
                    f"{self.function}: in calibration, the {what} of '{self.names[module]}' "
                    f"({class_name(type(module))}) must be finite, got NaN or infinity"
                )

    def output_range(self, module: nn.Module, symmetric: bool) -> tuple[float, float]:
        after = self.outputs[module] if self.outputs[module].called else self.before_norm[module]
        return after.range(self.observer, symmetric)

    def ranges(self, module: nn.Module, symmetric: bool) -> tuple[tuple[float, float], tuple[float, float]]:
        """Of the input and of the output."""
        seen = self.inputs[module]
        if seen.low == seen.high:
            raise ValueError(
                f"{self.function}: in calibration, the input of '{self.names[module]}' ({class_name(type(module))}) "
                f"must have a range, but all of it was {seen.low}"
            )
        return seen.range(self.observer, symmetric), self.output_range(module, symmetric)
