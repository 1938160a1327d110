"""A multilayer perceptron as one module."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor, nn
from torch.jit import is_scripting as _is_scripting

import fastops.functional as FF
from fastops.functional._activation import Activation, resolve_activation
from fastops.nn._block import Block, activation_module, finish, in_one
from fastops.nn._fused import weight_and_bias
from fastops.nn.linear import Linear

__all__ = ["MLP"]


class MLP(Block):
    """A chain of linear layers with an activation between them, in one call forward and backward (functional.mlp).

    Args:
        in_channels: the size of the last dimension of x.
        hidden_channels: out_features of each layer, the last one's too, as in torchvision.ops.MLP.
        activation: of every layer but the last: a name ("relu", "gelu_tanh", ...), an activation module or None.
        output_activation: of the last layer. Default: None.
        bias: whether the layers have one. Default: True.
        device, dtype: of the parameters.

    It is nn.Sequential(Linear, activation, Linear, ...), with that one's children and state_dict: "0.weight", "0.bias",
    "2.weight" and so on where there is an activation. A child that is another one, or that has hooks, is noticed; the
    layers are then called in turn.

    Shape: x (*, in_channels), y (*, hidden_channels[-1]).
    Dtypes: float32, float64, bfloat16, float16; others go to PyTorch's kernels.
    Raises: ValueError: no layers, or an activation that does not exist or cannot be fused. When called, see
    functional.mlp.
    Source: torchvision.ops.MLP.

    >>> net = fnn.MLP(784, [128, 10])
    >>> net(torch.randn(64, 784)).shape
    torch.Size([64, 10])
    >>> list(net.state_dict())
    ['0.weight', '0.bias', '2.weight', '2.bias']
    """

    def __init__(
        self,
        in_channels: int,
        hidden_channels: Sequence[int],
        activation: Activation = "relu",
        output_activation: Activation = None,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        if len(hidden_channels) == 0:
            raise ValueError("MLP: hidden_channels must have at least one layer, got none")
        layers: list[nn.Module] = []
        for i, sizes in enumerate(pairwise((in_channels, *hidden_channels))):
            layers.append(Linear(*sizes, bias=bias, device=device, dtype=dtype))
            f = activation_module(activation if i < len(hidden_channels) - 1 else output_activation)
            layers += [] if f is None else [f]
        super().__init__(*layers)
        finish(self)

    def forward(self, input: Tensor) -> Tensor:
        if _is_scripting():
            for module in self:
                input = module(input)
            return input
        children = in_one(self, input)
        if children is None:
            return nn.Sequential.forward(self, input)
        return _call(self, children, input)


def _call(block: MLP, children: list[nn.Module], input: Tensor) -> Tensor:
    layers = [child for child in children if type(child) is Linear]
    output = children[-1] if type(children[-1]) is not Linear else None
    hidden = children[1] if len(layers) > 1 and type(children[1]) is not Linear else None
    if len(layers) > 2 and hidden is not None:  # their options may have been changed
        first = resolve_activation(hidden)
        for other in children[3:-1:2]:
            if resolve_activation(other) != first:
                return nn.Sequential.forward(block, input)
    weights, biases = zip(*map(weight_and_bias, layers), strict=True)
    return FF.mlp(input, weights, biases, hidden, output)
