"""torch.nn's losses on fastops' kernels."""

import torch.nn.functional as F
from torch import Tensor, nn
from torch.jit import is_scripting as _is_scripting

import fastops.functional as FF

__all__ = ["CrossEntropyLoss", "MSELoss"]


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """-log softmax(x)[t] of class indices t, in one pass forward and one backward.

    Args:
        weight: a factor of each class, or None.
        size_average, reduce: deprecated, see reduction.
        ignore_index: a target that does not count. Default: -100.
        reduction: "none", "mean" or "sum". Default: "mean".
        label_smoothing: 0.0 to 1.0, the part of the target that is spread over all classes. Default: 0.0.

    Shape: x (C), (N, C) or (N, C, d1, ...), t (), (N) or (N, d1, ...), result a scalar or t's. Class probabilities t,
    of x's shape, go to PyTorch's kernels.
    Dtypes: float32, float64, bfloat16, float16; others go to PyTorch's kernels.
    Raises: IndexError: a target is out of bounds. See functional.cross_entropy.
    Source: torch.nn.CrossEntropyLoss.

    >>> fnn.CrossEntropyLoss()(torch.zeros(3, 4), torch.tensor([0, 1, 2]))
    tensor(1.3863)
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        if _is_scripting():
            return F.cross_entropy(
                input,
                target,
                weight=self.weight,
                ignore_index=self.ignore_index,
                reduction=self.reduction,
                label_smoothing=self.label_smoothing,
            )
        return FF.cross_entropy(
            input, target, self.weight, None, self.ignore_index, None, self.reduction, self.label_smoothing
        )


class MSELoss(nn.MSELoss):
    """(x - t)^2, their mean or sum, in one pass forward and one backward.

    Args:
        size_average, reduce: deprecated, see reduction.
        reduction: "none", "mean" or "sum". Default: "mean".

    Shape: x (*), t (*), result a scalar or (*).
    Dtypes: float32, float64, bfloat16, float16; others go to PyTorch's kernels.
    Raises: RuntimeError: what torch.nn.MSELoss refuses. See functional.mse_loss.
    Source: torch.nn.MSELoss.

    >>> fnn.MSELoss()(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0]))
    tensor(2.)
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        if _is_scripting():
            return F.mse_loss(input, target, reduction=self.reduction)
        return FF.mse_loss(input, target, None, None, self.reduction)
