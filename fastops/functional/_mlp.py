"""A multilayer perceptron as one op."""

from collections.abc import Sequence

from torch import Tensor
from torch.compiler import is_dynamo_compiling as _is_compiling

from fastops import _C
from fastops._activations import KIND, valid
from fastops.functional._activation import Activation, resolve_activation
from fastops.functional._general import show
from fastops.functional._linear import linear

__all__ = ["mlp"]

_fast_mlp = _C.mlp


def mlp(
    input: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None = None,
    activation: Activation = "relu",
    output_activation: Activation = None,
) -> Tensor:
    """A chain of linear layers with an activation between them: y_0 = input, y_(l+1) = f(y_l W_l^T + b_l).

    On a GPU, in float32, bfloat16 or float16 and with no layer wider than 128, it is one kernel forward, and one and a
    sum backward: the time of small networks goes into kernel launches and into what each layer writes to memory for the
    next. On the CPU it is one call for all layers, forward and backward, and one kernel in float32 and float64 with no
    layer wider than 128. Everywhere else it is `linear` with its activation, layer by layer: on GPUs in float64, with
    wider layers, more than 16 of them or too little shared memory, and under torch.compile, torch.export and
    torch.func. fastops.record() shows which.

    Args:
        input: (*, in_features), any leading dimensions and strides; float32, float64, bfloat16 or float16.
        weights: (out_features, in_features) for each layer, in input's dtype; in_features is out_features of the layer
            before.
        biases: (out_features) or None for each layer; None where no layer has a bias.
        activation: f of every layer but the last. None, a name or an activation module, as in `linear`.
        output_activation: f of the last layer.

    Returns:
        (*, out_features of the last layer) in input's dtype, to which hidden outputs are rounded as well. As with
        torch.relu, the result of an activation must not be changed in place before its backward.

    Raises:
        RuntimeError: shapes, dtypes or devices do not fit. TypeError: an argument is not a Tensor, or not a sequence of
        them. ValueError: no layers, biases for another number of layers, or an activation that cannot be fused.

    Source: Mueller, Rousselle, Novak and Keller, "Real-time Neural Radiance Caching for Path Tracing" (2021), and
    tiny-cuda-nn, for networks fused into one kernel.

    >>> weights = torch.tensor([[1.0], [-1.0]]), torch.tensor([[1.0, 1.0]])
    >>> FF.mlp(torch.tensor([[-3.0], [5.0]]), weights)
    tensor([[3.],
            [5.]])
    """
    _check(weights, biases)
    layers = len(weights)
    biases = (None,) * layers if biases is None else biases
    if not _is_compiling():
        hidden, output = resolve_activation(activation), resolve_activation(output_activation)
        if valid(*hidden) and valid(*output):
            result = _fast_mlp(
                input, tuple(weights), tuple(biases), KIND[hidden[0]], *hidden[1:], KIND[output[0]], *output[1:]
            )
            if result is not NotImplemented:
                return result
    for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        try:
            input = linear(input, weight, bias, activation if layer < layers - 1 else output_activation)
        except RuntimeError as error:
            raise RuntimeError(f"mlp: weights[{layer}] or biases[{layer}]: {error}") from error
    return input


def _check(weights: Sequence[Tensor], biases: Sequence[Tensor | None] | None) -> None:
    """What only a chain of layers can get wrong; the rest is linear's."""
    for name, value in (("weights", weights), ("biases", biases)):
        # A Tensor is a sequence of its rows, which nobody means.
        if not isinstance(value, Sequence) and not (name == "biases" and value is None):
            raise TypeError(f"mlp: {name} must be a list or tuple of Tensors, got {show(value)}")
    if len(weights) == 0:
        raise ValueError("mlp: weights must have at least one layer, got none")
    if biases is not None and len(biases) != len(weights):
        raise ValueError(f"mlp: biases must have one entry for each of {len(weights)} weights, got {len(biases)}")
