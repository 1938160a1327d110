"""torch.nn.functional's linear, convolutions, pools and activations, to the letter, on fastops' kernels.

linear and the convolutions also take activation=, which is fused into the kernel. What torch has not: conv_max_pool2d
also fuses the pool after them, and mlp is a chain of linear layers as one op.

The choice between the doors is made in this package and nowhere else. For a plain eager tensor that is one call of the
fast door (`fastops._C`), which does everything in C++ or answers NotImplemented. Then the general door (fastops/ops) is
asked, for tensors and modes that have to see the op; and what fastops has no kernel for (complex, sparse, integers,
other devices, tensor subclasses) goes to PyTorch's own op, recorded as kernel "aten". What PyTorch refuses is refused
here with the same exception type.

Formulas and parameters: torch.nn.functional. dtypes: float32, float64, bfloat16, float16; under CPU autocast linear,
the convolutions and prelu compute in autocast's dtype, as in PyTorch.
"""

from fastops.functional._activation import (
    celu,
    celu_,
    elu,
    elu_,
    gelu,
    glu,
    hardshrink,
    hardsigmoid,
    hardswish,
    hardtanh,
    hardtanh_,
    leaky_relu,
    leaky_relu_,
    logsigmoid,
    mish,
    prelu,
    relu,
    relu6,
    relu_,
    selu,
    selu_,
    sigmoid,
    silu,
    softplus,
    softshrink,
    softsign,
    tanh,
    tanhshrink,
    threshold,
    threshold_,
)
from fastops.functional._conv import (
    conv1d,
    conv2d,
    conv3d,
    conv_transpose1d,
    conv_transpose2d,
    conv_transpose3d,
)
from fastops.functional._conv_pool import conv_max_pool1d, conv_max_pool2d, conv_max_pool3d
from fastops.functional._linear import linear
from fastops.functional._mlp import mlp
from fastops.functional._pool import (
    adaptive_avg_pool1d,
    adaptive_avg_pool2d,
    adaptive_avg_pool3d,
    adaptive_max_pool1d,
    adaptive_max_pool2d,
    adaptive_max_pool3d,
    avg_pool1d,
    avg_pool2d,
    avg_pool3d,
    max_pool1d,
    max_pool2d,
    max_pool3d,
)

__all__ = [
    "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool1d",
    "adaptive_max_pool2d", "adaptive_max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d", "celu", "celu_",
    "conv1d", "conv2d", "conv3d", "conv_max_pool1d", "conv_max_pool2d", "conv_max_pool3d", "conv_transpose1d",
    "conv_transpose2d", "conv_transpose3d", "elu", "elu_", "gelu", "glu", "hardshrink", "hardsigmoid", "hardswish",
    "hardtanh", "hardtanh_", "leaky_relu", "leaky_relu_", "linear", "logsigmoid", "max_pool1d", "max_pool2d",
    "max_pool3d", "mish", "mlp", "prelu", "relu", "relu6", "relu_", "selu", "selu_", "sigmoid", "silu", "softplus",
    "softshrink", "softsign", "tanh", "tanhshrink", "threshold", "threshold_",
]  # fmt: skip
