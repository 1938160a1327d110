"""torch.nn's pooling modules on fastops' kernels: the same names, signatures, attributes and repr.

Each is a subclass that only replaces forward; see fastops.nn.activation. Shapes, dtypes and errors: fastops.functional.
"""

from typing import Any

from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling as _is_compiling

import fastops.functional as FF
from fastops import _C
from fastops.nn.activation import _Plain


class _Pool(_Plain):
    """What the modules here share: both doors of one function, and its arguments."""

    _fast: Any
    _function: Any

    def _arguments(self) -> tuple[Any, ...]:
        raise NotImplementedError

    def forward(self, input: Tensor) -> Any:
        arguments = self._arguments()
        if not _is_compiling():
            result = self._fast(input, *arguments)
            if result is not NotImplemented:
                return result
        return self._function(input, *arguments)


class _MaxPool(_Pool):
    def _arguments(self) -> tuple[Any, ...]:
        return self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode, self.return_indices


class _AvgPool(_Pool):
    def _arguments(self) -> tuple[Any, ...]:
        return (
            self.kernel_size, self.stride, self.padding, self.ceil_mode, self.count_include_pad, self.divisor_override,
        )  # fmt: skip


class _AdaptiveMaxPool(_Pool):
    def _arguments(self) -> tuple[Any, ...]:
        return self.output_size, self.return_indices


class _AdaptiveAvgPool(_Pool):
    def _arguments(self) -> tuple[Any, ...]:
        return (self.output_size,)


class MaxPool1d(_MaxPool, nn.MaxPool1d):
    _fast, _function = staticmethod(_C.max_pool1d), staticmethod(FF.max_pool1d)


class MaxPool2d(_MaxPool, nn.MaxPool2d):
    _fast, _function = staticmethod(_C.max_pool2d), staticmethod(FF.max_pool2d)


class MaxPool3d(_MaxPool, nn.MaxPool3d):
    _fast, _function = staticmethod(_C.max_pool3d), staticmethod(FF.max_pool3d)


class AvgPool1d(_AvgPool, nn.AvgPool1d):
    _fast, _function = staticmethod(_C.avg_pool1d), staticmethod(FF.avg_pool1d)

    def _arguments(self) -> tuple[Any, ...]:
        return self.kernel_size, self.stride, self.padding, self.ceil_mode, self.count_include_pad


class AvgPool2d(_AvgPool, nn.AvgPool2d):
    _fast, _function = staticmethod(_C.avg_pool2d), staticmethod(FF.avg_pool2d)


class AvgPool3d(_AvgPool, nn.AvgPool3d):
    _fast, _function = staticmethod(_C.avg_pool3d), staticmethod(FF.avg_pool3d)


class AdaptiveMaxPool1d(_AdaptiveMaxPool, nn.AdaptiveMaxPool1d):
    _fast, _function = staticmethod(_C.adaptive_max_pool1d), staticmethod(FF.adaptive_max_pool1d)


class AdaptiveMaxPool2d(_AdaptiveMaxPool, nn.AdaptiveMaxPool2d):
    _fast, _function = staticmethod(_C.adaptive_max_pool2d), staticmethod(FF.adaptive_max_pool2d)


class AdaptiveMaxPool3d(_AdaptiveMaxPool, nn.AdaptiveMaxPool3d):
    _fast, _function = staticmethod(_C.adaptive_max_pool3d), staticmethod(FF.adaptive_max_pool3d)


class AdaptiveAvgPool1d(_AdaptiveAvgPool, nn.AdaptiveAvgPool1d):
    _fast, _function = staticmethod(_C.adaptive_avg_pool1d), staticmethod(FF.adaptive_avg_pool1d)


class AdaptiveAvgPool2d(_AdaptiveAvgPool, nn.AdaptiveAvgPool2d):
    _fast, _function = staticmethod(_C.adaptive_avg_pool2d), staticmethod(FF.adaptive_avg_pool2d)


class AdaptiveAvgPool3d(_AdaptiveAvgPool, nn.AdaptiveAvgPool3d):
    _fast, _function = staticmethod(_C.adaptive_avg_pool3d), staticmethod(FF.adaptive_avg_pool3d)
