"""torch.nn.Softmax and LogSoftmax on fastops' kernels: the same signatures, attributes and repr."""

import torch.nn.functional as F
from torch import Tensor, nn
from torch.jit import is_scripting as _is_scripting

import fastops.functional as FF
from fastops._traced import traced_as
from fastops.functional._general import small_for_compilers

__all__ = ["LogSoftmax", "Softmax"]


class Softmax(nn.Softmax):
    """y = exp(x) / sum(exp(x)), the sum along dim.

    Args:
        dim: the dimension whose elements add up to 1. Default: None, which is deprecated.

    Shape: x (*), y (*).
    Dtypes: float32, float64, bfloat16, float16; others go to PyTorch's kernels.
    Raises: IndexError: dim is out of range. See functional.softmax.
    Source: torch.nn.Softmax.

    >>> fnn.Softmax(dim=0)(torch.tensor([1.0, 1.0])).tolist()
    [0.5, 0.5]
    """

    def forward(self, input: Tensor) -> Tensor:
        if _is_scripting():
            return F.softmax(input, self.dim, _stacklevel=5)
        return FF.softmax(input, self.dim, _stacklevel=5)


def _softmax_in_a_graph(self: nn.Module, input: Tensor) -> Tensor:
    if small_for_compilers(input):
        return F.softmax(input, self.dim, _stacklevel=5)
    return FF.softmax(input, self.dim, _stacklevel=5)


traced_as(Softmax.forward, _softmax_in_a_graph)


class LogSoftmax(nn.LogSoftmax):
    """y = log(exp(x) / sum(exp(x))), the sum along dim.

    Args:
        dim: the dimension whose exponentials add up to 1. Default: None, which is deprecated.

    Shape: x (*), y (*).
    Dtypes: float32, float64, bfloat16, float16; others go to PyTorch's kernels.
    Raises: IndexError: dim is out of range. See functional.log_softmax.
    Source: torch.nn.LogSoftmax.

    >>> fnn.LogSoftmax(dim=0)(torch.tensor([1.0, 1.0])).tolist()
    [-0.6931471824645996, -0.6931471824645996]
    """

    def forward(self, input: Tensor) -> Tensor:
        if _is_scripting():
            return F.log_softmax(input, self.dim, _stacklevel=5)
        return FF.log_softmax(input, self.dim, _stacklevel=5)


def _log_softmax_in_a_graph(self: nn.Module, input: Tensor) -> Tensor:
    if small_for_compilers(input):
        return F.log_softmax(input, self.dim, _stacklevel=5)
    return FF.log_softmax(input, self.dim, _stacklevel=5)


traced_as(LogSoftmax.forward, _log_softmax_in_a_graph)
