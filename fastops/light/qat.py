"""fastops.light.prepare_qat_ and convert_qat_: training that knows of the rounding which comes after it."""

from collections.abc import Callable

from torch import nn

import fastops.nn as fnn
from fastops.light._layers import checked_filter
from fastops.light._qat_layers import FakeQuantized, QATConv2d, QATLinear, drop_options, set_options
from fastops.light._quantized import activation_of, become
from fastops.light._static import RESULTS, Batches, Calibration, choose_static
from fastops.light.conv2d_int8 import Conv2dInt8
from fastops.light.quantize import checked_config, choose, result_of
from fastops.light.weight_only import checked_group_size
from fastops.nn._fused import Fused
from fastops.replace import Report, Row

__all__ = ["convert_qat_", "prepare_qat_"]

_PREPARED = {cls: QATConv2d if result is Conv2dInt8 else QATLinear for cls, result in RESULTS.items()}


def prepare_qat_(
    model: nn.Module,
    config: str = "int8_dynamic",
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    group_size: int | None = None,
    symmetric: bool = False,
    averaging: float = 0.01,
) -> Report:
    """Makes a model's layers round weights and inputs as quantize_ would, so that training gets used to it, in place.

        light.prepare_qat_(model, "int4_weight")
        ...                          # train as ever, a few epochs at a low learning rate
        light.convert_qat_(model)    # the quantized layers, with these weights

    Gradients pass the rounding by (the straight-through estimator). Parameters stay the objects that they are, so an
    optimizer that has them goes on. The layers of quantize_'s config are prepared; batch norms stay layers between
    them: convert_qat_ leaves them alone, too, and fastops.freeze makes them a part of the scales of the layer before,
    without another rounding.

    Args:
        model: any module; it stays the same object. state_dict keys stay; with "int8_static" there are `input_low` and
            `input_high`, too.
        config, filter_fn, group_size: as of quantize_.
        symmetric: for "int8_static": whether levels lie evenly around 0.
        averaging: for "int8_static": how far a batch moves the range of a layer's input, from 0 to 1. The first one
            sets it. It moves in training mode alone.

    Returns:
        A Report: what was prepared, what was skipped and why, and what else computes something.

    Raises:
        TypeError: model is not a torch.nn.Module, or filter_fn no function. ValueError: another argument is not one of
        these. What filter_fn raises.

    Source: Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference"
    (2018); the two steps are those of torch.ao.quantization's prepare_qat and torchao's QATConfig.

    >>> from fastops import light
    >>> model = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    >>> print(light.prepare_qat_(model, "int4_weight"))
    0  torch.nn.Linear  ->        fastops.light.QATLinear
    2  torch.nn.Linear  skipped:  fewer than 8192 weights, which would be no faster
    left alone, no int4_weight kernel: 1 x torch.nn.ReLU
    1 replaced, 1 skipped, 1 left alone
    """
    checked_config("prepare_qat_", model, config, group_size)
    checked_filter("prepare_qat_", filter_fn)
    if not isinstance(averaging, (int, float)) or isinstance(averaging, bool) or not 0 < averaging <= 1:
        raise ValueError(f"prepare_qat_: averaging must be more than 0 and at most 1, got {averaging!r}")
    options = {"bits": None, "float8": False, "group_size": None}
    if config == "int8_static":
        report, chosen = choose_static(model, filter_fn, _PREPARED)
    else:
        more = result_of(config, group_size, "prepare_qat_")[1]
        report, chosen = choose(model, config, filter_fn, QATLinear)
        options |= more
    for module in chosen:  # only now that filter_fn has not raised
        own = dict(options)
        if own["bits"] is not None:
            own["group_size"] = checked_group_size(own["bits"], group_size, module.in_features, own["float8"])
        set_options(
            module,
            cls=_PREPARED[type(module)],
            activation=activation_of(module),
            config=config,
            symmetric=symmetric,
            averaging=float(averaging),
            **own,
        )
    return report


def convert_qat_(model: nn.Module, calibrate: Batches | None = None) -> Report:
    """Turns the layers that prepare_qat_ has prepared into quantized ones, in place.

    They have the levels that they were trained with: the model computes what it did before, but for the rounding of
    float sums.

    Args:
        model: what prepare_qat_ was given, trained.
        calibrate: for "int8_static": batches or a function, as of quantize_. They say in which range the *outputs* of
            layers lie, also behind a batch norm, which fastops.freeze needs where a sum is kept in 8 bits. Ranges of
            inputs are those of training.

    Returns:
        A Report: what was converted. A layer of "int8_static" that was called neither in training nor in calibration
        is again what it was.

    Raises:
        TypeError: model is not a torch.nn.Module, or calibrate neither iterable nor callable.
        ValueError: no layer is prepared; calibrate is missing, or given and not needed; calibration called none of the
            layers, or one with NaN or an infinity.
        What calibrate and the model raise. The model is then what it was.

    Source: as prepare_qat_.

    >>> from fastops import light
    >>> model = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    >>> report, x = light.prepare_qat_(model, "int4_weight"), torch.randn(5, 256)
    >>> y = model(x).detach()
    >>> print(light.convert_qat_(model))
    0  fastops.light.QATLinear  ->  fastops.light.LinearWeightOnly
    1 replaced, 0 skipped, 0 left alone
    >>> torch.allclose(model(x), y, atol=1e-5)
    True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"convert_qat_: model must be a torch.nn.Module, got {type(model).__name__}")
    names = {module: name for name, module in model.named_modules() if isinstance(module, FakeQuantized)}
    static = {module: name for module, name in names.items() if module.config == "int8_static"}
    if not names:
        raise ValueError("convert_qat_: model must have layers that prepare_qat_ has prepared, got one without")
    if static and calibrate is None:
        raise ValueError("convert_qat_: calibrate must be given for layers of 'int8_static', for the ranges of outputs")
    if calibrate is not None and not static:
        raise ValueError("convert_qat_: calibrate is for layers of 'int8_static', got one for a model without")
    seen = Calibration(static, "minmax", "convert_qat_")
    if static:
        seen.run(model, calibrate)
    report = Report()
    for module, name in names.items():
        _convert(module, name, seen, report)
    return report


def _convert(module: nn.Module, name: str, seen: Calibration, report: Report) -> None:
    before, activation = f"fastops.light.{type(module).__name__}", module.activation
    if module.config != "int8_static":
        cls = result_of(module.config, None, "convert_qat_")[0]
        kept = {key: getattr(module, key) for key in ("bits", "group_size", "float8") if module.bits is not None}
        drop_options(module)
        module.__dict__.update(kept)
        become(module, cls, module.weight, activation)
        report.replaced.append(Row(name, before, f"fastops.light.{cls.__name__}"))
        return
    symmetric, plain = module.symmetric, module.plain
    trained = float(module.input_low) <= float(module.input_high)
    observer = seen.inputs[module]
    given = (float(module.input_low), float(module.input_high)) if trained else (observer.low, observer.high)
    drop_options(module)
    if not trained and not observer.called:
        del module.__dict__["activation"]
        module.__class__ = plain
        if issubclass(plain, (Fused, fnn.Linear, fnn.Conv2d)):
            module.activation = activation
        report.skipped.append(Row(name, before, "neither training nor calibration called it"))
        return
    cls = RESULTS[plain]
    become(module, cls, module.weight, activation)
    module.set_range("input", *given, symmetric)
    if seen.before_norm[module].called:
        module.set_range("output", *seen.output_range(module, symmetric), symmetric)
    report.replaced.append(Row(name, before, f"fastops.light.{cls.__name__}"))
