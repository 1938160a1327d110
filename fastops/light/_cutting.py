"""Takes channels out of a layer."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastops.light._flow import Layer
from fastops.light._layers import CONVOLUTIONS, TRANSPOSED, kind_of

# Of a layer without weights across channels: what counts them.
_COUNTS = ("num_features", "num_channels", "num_parameters")


def cut(layer: Layer, inputs: Tensor | None, outputs: Tensor | None) -> None:
    """Makes a module one of fewer channels. inputs, outputs: which ones stay, as booleans; None: all."""
    module, kind = layer.module, kind_of(layer.module)
    with torch.no_grad():
        if issubclass(kind, nn.Linear):
            _cut_linear(layer, inputs, outputs)
        elif issubclass(kind, (*CONVOLUTIONS, *TRANSPOSED)):
            _cut_convolution(layer, inputs, outputs)
        elif outputs is not None and issubclass(kind, nn.Embedding):
            put(module, "weight", module.weight[:, outputs.to(module.weight.device)])
            module.embedding_dim = int(outputs.sum())
        elif outputs is not None:
            if issubclass(kind, nn.GroupNorm):
                module.num_groups = int(outputs.view(module.num_groups, -1).any(1).sum())
            for name in ("weight", "bias", "running_mean", "running_var"):
                value = getattr(module, name, None)
                if value is not None:
                    put(module, name, value[outputs.to(value.device)])
            for name in _COUNTS:
                if hasattr(module, name):
                    setattr(module, name, int(outputs.sum()))
            if hasattr(module, "normalized_shape"):
                module.normalized_shape = (int(outputs.sum()),)


def clear(module: nn.Module, outputs: Tensor) -> None:
    """Makes the weights, biases and scales of these output channels 0."""
    kind = kind_of(module)
    with torch.no_grad():
        weight = module._parameters.get("weight")
        outputs = outputs if weight is None else outputs.to(weight.device)
        if issubclass(kind, TRANSPOSED):
            parts = weight.view(module.groups, -1, module.out_channels // module.groups, weight[0, 0].numel())
            parts.masked_fill_(outputs.view(module.groups, 1, -1, 1), 0)
        elif weight is not None:
            (weight.t() if issubclass(kind, nn.Embedding) else weight)[outputs] = 0
        if module._parameters.get("bias") is not None:
            module.bias[outputs] = 0


def _cut_linear(layer: Layer, inputs: Tensor | None, outputs: Tensor | None) -> None:
    module, weight = layer.module, layer.module.weight
    if inputs is not None:
        inputs = inputs.to(weight.device)
        constants = _constants(layer, inputs)
        if constants is not None:
            put(module, "bias", module.bias + F.linear(constants, weight))
        weight = weight[:, inputs]
    if outputs is not None:
        outputs = outputs.to(weight.device)
        weight = weight[outputs]
        _cut_bias(module, outputs)
    put(module, "weight", weight)
    module.out_features, module.in_features = weight.shape


def _cut_convolution(layer: Layer, inputs: Tensor | None, outputs: Tensor | None) -> None:
    module, weight, groups = layer.module, layer.module.weight, layer.module.groups
    transposed = isinstance(module, TRANSPOSED)
    ins = torch.ones(module.in_channels, dtype=torch.bool) if inputs is None else inputs
    outs = torch.ones(module.out_channels, dtype=torch.bool) if outputs is None else outputs
    ins, outs = ins.to(weight.device), outs.to(weight.device)
    constants = _constants(layer, ins)
    if constants is not None:  # of one group, without a border of zeros
        put(module, "bias", module.bias + F.linear(constants, weight.flatten(2).sum(2)))
    _cut_bias(module, outs)
    # (groups, rows of a group, columns of a group, kernel)
    parts = weight.view(groups, weight.shape[0] // groups, *weight.shape[1:])
    rows, columns = (ins, outs) if transposed else (outs, ins)
    rows, columns = rows.view(groups, -1), columns.view(groups, -1)
    stay = rows.any(1)
    parts, rows, columns = parts[stay], rows[stay], columns[stay]
    if bool(rows.all()) and bool(columns.all()):  # whole groups go, such as a depthwise layer's
        weight = parts.flatten(0, 1)
    else:
        weight = torch.cat([part[row][:, column] for part, row, column in zip(parts, rows, columns, strict=True)])
    put(module, "weight", weight)
    module.groups, module.in_channels, module.out_channels = len(parts), int(ins.sum()), int(outs.sum())


def _constants(layer: Layer, inputs: Tensor) -> Tensor | None:
    """What the input channels that go are worth, and 0 for the others; None where all are 0."""
    if layer.constants is None:
        return None
    lost = torch.where(inputs.cpu(), 0, layer.constants)
    return lost.to(layer.module.weight) if bool(lost.any()) else None


def _cut_bias(module: nn.Module, outputs: Tensor) -> None:
    if module.bias is not None:
        put(module, "bias", module.bias[outputs])


def put(module: nn.Module, name: str, value: Tensor) -> None:
    """Another parameter or buffer in the place of one."""
    value = value.detach().clone(memory_format=torch.preserve_format)
    if name in module._parameters:
        value = nn.Parameter(value, module._parameters[name].requires_grad)
        module._parameters[name] = value
    else:
        module._buffers[name] = value
