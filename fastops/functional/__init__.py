"""torch.nn.functional's linear, convolutions, pools and activations on fastops' kernels, with the same signatures.

What torch does not have: activation= of linear and the convolutions, fused into the kernel; conv_max_pool1d, 2d and
3d, which fuse the pool as well; and mlp, a chain of linear layers as one op.

What all functions share:

- Any strides and memory formats, empty tensors, and any leading dimensions where torch's function takes them.
- float32, float64, bfloat16 and float16; 16-bit types are accumulated in float32. Under CPU autocast linear, the
  convolutions and prelu compute in autocast's dtype, as in PyTorch.
- Forward, backward and double backward. The result does not depend on the number of threads.
- What fastops has no kernel for (complex, sparse, integers, other devices, tensor subclasses) goes to PyTorch's own op.
  fastops.record() shows such a call with kernel "aten".
- What PyTorch refuses is refused with the same exception type. The message names the argument, what was expected and
  what came.

Examples assume `import torch` and `import fastops.functional as FF`.
"""

# Every op has two doors, and the choice between them is made in this package and nowhere else. A plain eager tensor
# takes the fast door (fastops._C): one call, which does everything in C++ or answers NotImplemented. Then the general
# door (fastops/ops) is asked, which is for tensors and modes that have to see the op. PyTorch's own op comes last.

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
