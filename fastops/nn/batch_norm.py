"""torch.nn's batch normalisation on fastops' kernels, with activation=None."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.proxy import Proxy
from torch.jit import is_scripting as _is_scripting
from torch.nn.modules.batchnorm import _BatchNorm as _TorchBatchNorm
from torch.nn.modules.batchnorm import _NormBase

import fastops.functional as FF
from fastops._traced import traced_as
from fastops.functional._activation import Activation
from fastops.functional._general import small_for_compilers
from fastops.nn._fused import Fusable, Fused, pair, scripted_activation

__all__ = ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d"]


def _scripted(self, input: Tensor) -> Tensor:
    """torch.nn's forward, for torch.jit.script, which does not compile that of a base class under another name."""
    self._check_input_dim(input)
    factor = 0.0 if self.momentum is None else self.momentum
    if self.training and self.track_running_stats and self.num_batches_tracked is not None:
        self.num_batches_tracked.add_(1)
        if self.momentum is None:
            factor = 1.0 / float(self.num_batches_tracked)
    batch = True if self.training else self.running_mean is None and self.running_var is None
    return F.batch_norm(
        input,
        self.running_mean if not self.training or self.track_running_stats else None,
        self.running_var if not self.training or self.track_running_stats else None,
        self.weight,
        self.bias,
        batch,
        factor,
        self.eps,
    )


# A function, and not a method: a forward that was bound before `restore_` must find it after it.
def _call(layer: Any, input: Tensor, activation: Activation) -> Tensor:
    """What torch.nn's forward does, with each buffer and parameter looked up once."""
    if isinstance(input, Proxy):  # torch.fx does not look into torch.nn's either
        path = input.tracer.path_of_module(layer)
        return input.tracer.create_proxy("call_module", path, (input,), {})
    layer._check_input_dim(input)
    momentum, training = layer.momentum, layer.training
    # Module.__getattr__ costs as much as a small op; what a tool has put elsewhere is found by it still.
    buffers, parameters = layer._buffers, layer._parameters
    mean = buffers.get("running_mean", layer.running_mean)
    var = buffers.get("running_var", layer.running_var)
    weight = parameters.get("weight", layer.weight)
    bias = parameters.get("bias", layer.bias)
    if training:
        batch = True
        if layer.track_running_stats:
            count = buffers.get("num_batches_tracked", layer.num_batches_tracked)
            if count is not None:
                count.add_(1)
                if momentum is None:
                    momentum = 1.0 / float(count)
        else:
            mean = var = None
    else:
        batch = mean is None and var is None
    factor = 0.0 if momentum is None else momentum
    return FF.batch_norm(input, mean, var, weight, bias, batch, factor, layer.eps, activation=activation)


def _in_a_graph(self: nn.Module, input: Tensor) -> Tensor:
    if small_for_compilers(input):
        return _TorchBatchNorm.forward(self, input)
    return _call(self, input, self.__dict__.get("activation"))


class _BatchNorm(Fusable):
    """The arguments of all three."""

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        activation: Activation = None,
        **bias: bool,  # bias=False, where torch.nn's has it
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, **bias)
        if activation is not None:
            self.activation = activation

    _scripted = _scripted


class _FusedBatchNorm(Fused):
    """What torch.jit.script and state_dict take from a batch normalisation's class."""

    _version = _NormBase._version
    __constants__ = (*_NormBase.__constants__, "_kind")
    __annotations__ = _NormBase.__annotations__
    reset_running_stats = _NormBase.reset_running_stats
    _scripted = _scripted

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        # Before version 2 there was no num_batches_tracked.
        if (local_metadata.get("version") or 0) < 2 and self.track_running_stats:
            state_dict.setdefault(f"{prefix}num_batches_tracked", torch.tensor(0))
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def forward(self, input: Tensor) -> Tensor:
        if _is_scripting():
            return scripted_activation(self._scripted(input), self._kind)
        return _call(self, input, self.__dict__.get("activation"))


class BatchNorm1d(_BatchNorm, nn.BatchNorm1d):
    """y = f((x - mean) / sqrt(var + eps) * weight + bias), in one kernel forward and backward, of every channel.

    Args:
        num_features: the channels C.
        eps: is added to var. Default: 1e-5.
        momentum: how much of the running statistics one batch replaces; None: they are the average over all batches.
        affine: whether there are weight and bias.
        bias: False: a weight only, where torch.nn's layer has this argument.
        track_running_stats: whether there are running statistics, which take the batch's place in eval mode.
        device, dtype: of the parameters and buffers.
        activation: f, see Linear; with one the layer is a FusedBatchNorm1d. Default: None.

    Shape: x (N, C) or (N, C, length), y the same.
    Dtypes: float32, float64, bfloat16, float16, the parameters of a 16-bit input also float32; others go to PyTorch's
        kernels.
    Raises: ValueError: another number of dimensions, one value of each channel in training, or an activation that does
    not exist or cannot be fused. When called, see functional.batch_norm.
    Source: torch.nn.BatchNorm1d.

    >>> layer = fnn.BatchNorm1d(3, activation="relu")
    >>> layer(torch.randn(20, 3)).shape
    torch.Size([20, 3])
    >>> list(layer.state_dict())
    ['weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked']
    """

    def forward(self, input: Tensor) -> Tensor:
        if _is_scripting():
            return self._scripted(input)
        return _call(self, input, self.__dict__.get("activation"))


class BatchNorm2d(_BatchNorm, nn.BatchNorm2d):
    """BatchNorm1d in two dimensions: y = f((x - mean) / sqrt(var + eps) * weight + bias), of every channel.

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype, bias: as in BatchNorm1d.
        activation: f, see Linear; with one the layer is a FusedBatchNorm2d. Default: None.

    Shape: x (N, C, height, width), y the same; channels_last in, channels_last out.
    Dtypes: as in BatchNorm1d.
    Raises: ValueError: as BatchNorm1d. When called, see functional.batch_norm.
    Source: torch.nn.BatchNorm2d.

    >>> fnn.BatchNorm2d(3)(torch.randn(2, 3, 4, 4)).shape
    torch.Size([2, 3, 4, 4])
    """

    def forward(self, input: Tensor) -> Tensor:
        if _is_scripting():
            return self._scripted(input)
        return _call(self, input, self.__dict__.get("activation"))


class BatchNorm3d(_BatchNorm, nn.BatchNorm3d):
    """BatchNorm1d in three dimensions: y = f((x - mean) / sqrt(var + eps) * weight + bias), of every channel.

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype, bias: as in BatchNorm1d.
        activation: f, see Linear; with one the layer is a FusedBatchNorm3d. Default: None.

    Shape: x (N, C, depth, height, width), y the same; channels_last_3d in, channels_last_3d out.
    Dtypes: as in BatchNorm1d.
    Raises: ValueError: as BatchNorm1d. When called, see functional.batch_norm.
    Source: torch.nn.BatchNorm3d.

    >>> fnn.BatchNorm3d(3)(torch.randn(2, 3, 4, 4, 4)).shape
    torch.Size([2, 3, 4, 4, 4])
    """

    def forward(self, input: Tensor) -> Tensor:
        if _is_scripting():
            return self._scripted(input)
        return _call(self, input, self.__dict__.get("activation"))


class FusedBatchNorm1d(_FusedBatchNorm):
    """What BatchNorm1d(..., activation=f) makes; see FusedLinear."""

    _plain, _check_input_dim = BatchNorm1d, nn.BatchNorm1d._check_input_dim


class FusedBatchNorm2d(_FusedBatchNorm):
    """What BatchNorm2d(..., activation=f) makes; see FusedLinear."""

    _plain, _check_input_dim = BatchNorm2d, nn.BatchNorm2d._check_input_dim


class FusedBatchNorm3d(_FusedBatchNorm):
    """What BatchNorm3d(..., activation=f) makes; see FusedLinear."""

    _plain, _check_input_dim = BatchNorm3d, nn.BatchNorm3d._check_input_dim


pair(BatchNorm1d, FusedBatchNorm1d)
pair(BatchNorm2d, FusedBatchNorm2d)
pair(BatchNorm3d, FusedBatchNorm3d)


for _module in (BatchNorm1d, BatchNorm2d, BatchNorm3d):
    traced_as(_module.forward, _in_a_graph)
    # Its buffers have the guards that those of torch.nn's own modules have, which are fewer.
    _module._dynamo_marked_static = True
