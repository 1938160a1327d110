"""torch.nn.LayerNorm and RMSNorm on fastops' kernels: the same signatures, attributes, state_dict keys and repr."""

import torch.nn.functional as F
from torch import Tensor, nn
from torch.jit import is_scripting as _is_scripting

import fastops.functional as FF
from fastops._traced import traced_as
from fastops.functional._general import small_for_compilers

__all__ = ["LayerNorm", "RMSNorm"]


class LayerNorm(nn.LayerNorm):
    """y = (x - mean) / sqrt(var + eps) weight + bias, mean and variance over the last dimensions.

    Args:
        normalized_shape: the sizes of the last dimensions, or one number.
        eps: a number. Default: 1e-5.
        elementwise_affine: whether there are weight and bias. Default: True.
        bias: whether there is a bias. Default: True.
        device, dtype: of the parameters.

    Shape: x (*, *normalized_shape), y the same; weight, bias normalized_shape.
    Dtypes: float32, float64, bfloat16, float16, the latter two also with float32 parameters; others go to PyTorch's
        kernels.
    Raises: RuntimeError: shapes or dtypes that do not fit. See functional.layer_norm.
    Source: torch.nn.LayerNorm.

    >>> fnn.LayerNorm(2, eps=0.0)(torch.tensor([[1.0, 3.0]])).tolist()
    [[-1.0, 1.0]]
    """

    def forward(self, input: Tensor) -> Tensor:
        if _is_scripting():
            return F.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)
        return FF.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


def _layer_norm_in_a_graph(self: nn.Module, input: Tensor) -> Tensor:
    if small_for_compilers(input):
        return F.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)
    return FF.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


traced_as(LayerNorm.forward, _layer_norm_in_a_graph)


class RMSNorm(nn.RMSNorm):
    """y = x / sqrt(mean(x^2) + eps) weight, the mean over the last dimensions.

    Args:
        normalized_shape: the sizes of the last dimensions, or one number.
        eps: a number; None: the machine epsilon. Default: None.
        elementwise_affine: whether there is a weight. Default: True.
        device, dtype: of the weight.

    Shape: x (*, *normalized_shape), y the same; weight normalized_shape.
    Dtypes: float32, float64, bfloat16, float16; others go to PyTorch's kernels.
    Raises: RuntimeError: shapes or dtypes that do not fit. See functional.rms_norm.
    Source: torch.nn.RMSNorm.

    >>> fnn.RMSNorm(2, eps=0.0)(torch.tensor([[2.0, 2.0]])).tolist()
    [[1.0, 1.0]]
    """

    def forward(self, x: Tensor) -> Tensor:
        if _is_scripting():
            return F.rms_norm(x, self.normalized_shape, self.weight, self.eps)
        return FF.rms_norm(x, self.normalized_shape, self.weight, self.eps)


def _rms_norm_in_a_graph(self: nn.Module, x: Tensor) -> Tensor:
    if small_for_compilers(x):
        return F.rms_norm(x, self.normalized_shape, self.weight, self.eps)
    return FF.rms_norm(x, self.normalized_shape, self.weight, self.eps)


traced_as(RMSNorm.forward, _rms_norm_in_a_graph)
