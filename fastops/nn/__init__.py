"""torch.nn's modules on fastops' kernels: torch.nn's names and signatures; Linear and convolutions plus activation=."""

import functools

import torch.fx

from fastops.nn._fused import Fused, made_by_a_tool
from fastops.nn.activation import (
    CELU,
    ELU,
    GELU,
    GLU,
    SELU,
    Hardshrink,
    Hardsigmoid,
    Hardswish,
    Hardtanh,
    LeakyReLU,
    LogSigmoid,
    Mish,
    PReLU,
    ReLU,
    ReLU6,
    Sigmoid,
    SiLU,
    Softplus,
    Softshrink,
    Softsign,
    Tanh,
    Tanhshrink,
    Threshold,
)
from fastops.nn.conv import Conv1d, Conv2d, Conv3d, ConvTranspose1d, ConvTranspose2d, ConvTranspose3d
from fastops.nn.linear import Linear
from fastops.nn.pool import (
    AdaptiveAvgPool1d,
    AdaptiveAvgPool2d,
    AdaptiveAvgPool3d,
    AdaptiveMaxPool1d,
    AdaptiveMaxPool2d,
    AdaptiveMaxPool3d,
    AvgPool1d,
    AvgPool2d,
    AvgPool3d,
    MaxPool1d,
    MaxPool2d,
    MaxPool3d,
)

__all__ = [
    "CELU",
    "ELU",
    "GELU",
    "GLU",
    "SELU",
    "AdaptiveAvgPool1d",
    "AdaptiveAvgPool2d",
    "AdaptiveAvgPool3d",
    "AdaptiveMaxPool1d",
    "AdaptiveMaxPool2d",
    "AdaptiveMaxPool3d",
    "AvgPool1d",
    "AvgPool2d",
    "AvgPool3d",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "ConvTranspose3d",
    "Hardshrink",
    "Hardsigmoid",
    "Hardswish",
    "Hardtanh",
    "LeakyReLU",
    "Linear",
    "LogSigmoid",
    "MaxPool1d",
    "MaxPool2d",
    "MaxPool3d",
    "Mish",
    "PReLU",
    "ReLU",
    "ReLU6",
    "SiLU",
    "Sigmoid",
    "Softplus",
    "Softshrink",
    "Softsign",
    "Tanh",
    "Tanhshrink",
    "Threshold",
]


def _are_leaves_of_fx() -> None:
    """torch.fx calls a module of torch.nn and traces through any other: ours are called, with their hooks, as well.

    A tracer that overrides is_leaf_module has the last word.
    """
    ours = (*(globals()[name] for name in __all__), Fused)
    theirs = torch.fx.Tracer.is_leaf_module

    @functools.wraps(theirs)
    def is_leaf_module(self: torch.fx.Tracer, m: torch.nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, ours) and (type(m).__module__.startswith("fastops.nn.") or made_by_a_tool(type(m))):
            return True
        return theirs(self, m, module_qualified_name)

    torch.fx.Tracer.is_leaf_module = is_leaf_module


_are_leaves_of_fx()
