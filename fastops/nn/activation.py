"""torch.nn's activation modules on fastops' kernels: the same names, signatures, attributes and repr.

Each is a subclass that only replaces forward; an instance needs nothing that torch.nn's does not have, so that
`replace_` can turn one into the other. torch.jit.script compiles torch's function.
"""

import torch.nn.functional as F
from torch import Tensor, nn
from torch.jit import is_scripting as _is_scripting

import fastops.functional as FF
from fastops._traced import traced_as

__all__ = [
    "CELU", "ELU", "GELU", "GLU", "SELU", "Hardshrink", "Hardsigmoid", "Hardswish", "Hardtanh", "LeakyReLU",
    "LogSigmoid", "Mish", "PReLU", "ReLU", "ReLU6", "SiLU", "Sigmoid", "Softplus", "Softshrink", "Softsign", "Tanh",
    "Tanhshrink", "Threshold",
]  # fmt: skip


class Threshold(nn.Threshold):
    """y = x where x > threshold, else value.

    Args:
        threshold, value: numbers.
        inplace: write the result into the input. Default: False.

    Shape: x (*), y (*).
    Dtypes: float32, float64, bfloat16, float16; others go to PyTorch's kernels.
    Raises: RuntimeError: a dtype that torch.nn.Threshold refuses. See functional.threshold.
    Source: torch.nn.Threshold.

    >>> fnn.Threshold(0.5, 9.0)(torch.tensor([0.0, 0.5, 1.0]))
    tensor([9., 9., 1.])
    """

    def forward(self, input: Tensor) -> Tensor:
        if _is_scripting():
            return F.threshold(input, self.threshold, self.value, self.inplace)
        return FF.threshold(input, self.threshold, self.value, self.inplace)


class ReLU(nn.ReLU):
    """y = max(x, 0).

    Args:
        inplace: write the result into the input. Default: False.

    Shape: x (*), y (*).
    Dtypes: float32, float64, bfloat16, float16; others go to PyTorch's kernels.
    Raises: RuntimeError: a dtype that torch.nn.ReLU refuses. See functional.relu.
    Source: torch.nn.ReLU.

    >>> fnn.ReLU()(torch.tensor([-1.0, 0.0, 2.0]))
    tensor([0., 0., 2.])
    """

    def forward(self, input: Tensor) -> Tensor:
        if _is_scripting():
            return F.relu(input, self.inplace)
        return FF.relu(input, self.inplace)


class ReLU6(nn.ReLU6):
    """y = min(max(x, 0), 6).

    Args:
        inplace: write the result into the input. Default: False.

    Shape: x (*), y (*).
    Dtypes: float32, float64, bfloat16, float16; others go to PyTorch's kernels.
    Raises: RuntimeError: a dtype that torch.nn.ReLU6 refuses. See functional.relu6.
    Source: torch.nn.ReLU6.

    >>> fnn.ReLU6()(torch.tensor([-1.0, 2.0, 7.0]))
    tensor([0., 2., 6.])
    """

    def forward(self, input: Tensor) -> Tensor:
        if _is_scripting():
            return F.relu6(input, self.inplace)
        return FF.relu6(input, self.inplace)


class LeakyReLU(nn.LeakyReLU):
    """y = x where x > 0, else negative_slope x.

    Args:
        negative_slope: Default: 0.01.
        inplace: write the result into the input. Default: False.

    Shape: x (*), y (*).
    Dtypes: float32, float64, bfloat16, float16; others go to PyTorch's kernels.
    Raises: RuntimeError: x is not of floating point. See functional.leaky_relu.
    Source: torch.nn.LeakyReLU.

    >>> fnn.LeakyReLU(0.5)(torch.tensor([-1.0, 2.0]))
    tensor([-0.5000,  2.0000])
    """

    def forward(self, input: Tensor) -> Tensor:
        if _is_scripting():
            return F.leaky_relu(input, self.negative_slope, self.inplace)
        return FF.leaky_relu(input, self.negative_slope, self.inplace)


class ELU(nn.ELU):
    """y = x where x > 0, else alpha (exp(x) - 1).

    Args:
        alpha: Default: 1.0.
        inplace: write the result into the input. Default: False.

    Shape: x (*), y (*).
    Dtypes: float32, float64, bfloat16, float16; others go to PyTorch's kernels.
    Raises: RuntimeError: x is not of floating point. See functional.elu.
    Source: torch.nn.ELU.

    >>> fnn.ELU()(torch.tensor([-1.0, 2.0]))
    tensor([-0.6321,  2.0000])
    """

    def forward(self, input: Tensor) -> Tensor:
        if _is_scripting():
            return F.elu(input, self.alpha, self.inplace)
        return FF.elu(input, self.alpha, self.inplace)


class SELU(nn.SELU):
    """y = scale x where x > 0, else scale alpha (exp(x) - 1); scale = 1.0507..., alpha = 1.6732....

    Args:
        inplace: write the result into the input. Default: False.

    Shape: x (*), y (*).
    Dtypes: float32, float64, bfloat16, float16; others go to PyTorch's kernels.
    Raises: RuntimeError: x is not of floating point. See functional.selu.
    Source: torch.nn.SELU.

    >>> fnn.SELU()(torch.tensor([-1.0, 1.0]))
    tensor([-1.1113,  1.0507])
    """

    def forward(self, input: Tensor) -> Tensor:
        if _is_scripting():
            return F.selu(input, self.inplace)
        return FF.selu(input, self.inplace)


class CELU(nn.CELU):
    """y = x where x > 0, else alpha (exp(x / alpha) - 1).

    Args:
        alpha: not 0. Default: 1.0.
        inplace: write the result into the input. Default: False.

    Shape: x (*), y (*).
    Dtypes: float32, float64, bfloat16, float16; others go to PyTorch's kernels.
    Raises: RuntimeError: alpha is 0. See functional.celu.
    Source: torch.nn.CELU.

    >>> fnn.CELU(0.5)(torch.tensor([-1.0, 2.0]))
    tensor([-0.4323,  2.0000])
    """

    def forward(self, input: Tensor) -> Tensor:
        if _is_scripting():
            return F.celu(input, self.alpha, self.inplace)
        return FF.celu(input, self.alpha, self.inplace)


class GELU(nn.GELU):
    """y = x Phi(x), Phi the normal distribution's function: x / 2 (1 + erf(x / sqrt(2))).

    Args:
        approximate: "none", or "tanh" for x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))). Default: "none".

    Shape: x (*), y (*).
    Dtypes: float32, float64, bfloat16, float16; others go to PyTorch's kernels.
    Raises: RuntimeError: no such approximate. See functional.gelu.
    Source: torch.nn.GELU.

    >>> fnn.GELU()(torch.tensor([-1.0, 1.0]))
    tensor([-0.1587,  0.8413])
    """

    def forward(self, input: Tensor) -> Tensor:
        if _is_scripting():
            return F.gelu(input, approximate=self.approximate)
        return FF.gelu(input, approximate=self.approximate)


class SiLU(nn.SiLU):
    """y = x / (1 + exp(-x)), also called Swish.

    Args:
        inplace: write the result into the input. Default: False.

    Shape: x (*), y (*).
    Dtypes: float32, float64, bfloat16, float16; others go to PyTorch's kernels.
    Raises: RuntimeError: x is not of floating point. See functional.silu.
    Source: torch.nn.SiLU.

    >>> fnn.SiLU()(torch.tensor([-1.0, 1.0]))
    tensor([-0.2689,  0.7311])
    """

    def forward(self, input: Tensor) -> Tensor:
        if _is_scripting():
            return F.silu(input, self.inplace)
        return FF.silu(input, self.inplace)


class Mish(nn.Mish):
    """y = x tanh(log(1 + exp(x))).

    Args:
        inplace: write the result into the input. Default: False.

    Shape: x (*), y (*).
    Dtypes: float32, float64, bfloat16, float16; others go to PyTorch's kernels.
    Raises: RuntimeError: x is not of floating point. See functional.mish.
    Source: torch.nn.Mish.

    >>> fnn.Mish()(torch.tensor([-1.0, 1.0]))
    tensor([-0.3034,  0.8651])
    """

    def forward(self, input: Tensor) -> Tensor:
        if _is_scripting():
            return F.mish(input, self.inplace)
        return FF.mish(input, self.inplace)


class Sigmoid(nn.Sigmoid):
    """y = 1 / (1 + exp(-x)).

    Args: none.

    Shape: x (*), y (*).
    Dtypes: float32, float64, bfloat16, float16; others go to PyTorch's kernels.
    Raises: RuntimeError: a dtype that torch.nn.Sigmoid refuses. See functional.sigmoid.
    Source: torch.nn.Sigmoid.

    >>> fnn.Sigmoid()(torch.tensor([-1.0, 0.0]))
    tensor([0.2689, 0.5000])
    """

    def forward(self, input: Tensor) -> Tensor:
        if _is_scripting():
            return F.sigmoid(input)
        return FF.sigmoid(input)


class LogSigmoid(nn.LogSigmoid):
    """y = log(1 / (1 + exp(-x))).

    Args: none.

    Shape: x (*), y (*).
    Dtypes: float32, float64, bfloat16, float16; others go to PyTorch's kernels.
    Raises: RuntimeError: x is not of floating point. See functional.logsigmoid.
    Source: torch.nn.LogSigmoid.

    >>> fnn.LogSigmoid()(torch.tensor([-1.0, 0.0]))
    tensor([-1.3133, -0.6931])
    """

    def forward(self, input: Tensor) -> Tensor:
        if _is_scripting():
            return F.logsigmoid(input)
        return FF.logsigmoid(input)


class Tanh(nn.Tanh):
    """y = (exp(x) - exp(-x)) / (exp(x) + exp(-x)).

    Args: none.

    Shape: x (*), y (*).
    Dtypes: float32, float64, bfloat16, float16; others go to PyTorch's kernels.
    Raises: RuntimeError: a dtype that torch.nn.Tanh refuses. See functional.tanh.
    Source: torch.nn.Tanh.

    >>> fnn.Tanh()(torch.tensor([-1.0, 0.0]))
    tensor([-0.7616,  0.0000])
    """

    def forward(self, input: Tensor) -> Tensor:
        if _is_scripting():
            return F.tanh(input)
        return FF.tanh(input)


class Softplus(nn.Softplus):
    """y = log(1 + exp(beta x)) / beta; where beta x > threshold, x.

    Args:
        beta: Default: 1.0.
        threshold: Default: 20.0.

    Shape: x (*), y (*).
    Dtypes: float32, float64, bfloat16, float16; others go to PyTorch's kernels.
    Raises: RuntimeError: x is not of floating point. See functional.softplus.
    Source: torch.nn.Softplus.

    >>> fnn.Softplus()(torch.tensor([0.0, 30.0]))
    tensor([ 0.6931, 30.0000])
    """

    def forward(self, input: Tensor) -> Tensor:
        if _is_scripting():
            return F.softplus(input, self.beta, self.threshold)
        return FF.softplus(input, self.beta, self.threshold)


class Softsign(nn.Softsign):
    """y = x / (1 + |x|).

    Args: none.

    Shape: x (*), y (*).
    Dtypes: float32, float64, bfloat16, float16; others go to PyTorch's kernels.
    Raises: RuntimeError: a dtype that torch.nn.Softsign refuses. See functional.softsign.
    Source: torch.nn.Softsign.

    >>> fnn.Softsign()(torch.tensor([-1.0, 3.0]))
    tensor([-0.5000,  0.7500])
    """

    def forward(self, input: Tensor) -> Tensor:
        if _is_scripting():
            return F.softsign(input)
        return FF.softsign(input)


class Hardtanh(nn.Hardtanh):
    """y = min(max(x, min_val), max_val).

    Args:
        min_val, max_val: Default: -1.0 and 1.0.
        inplace: write the result into the input. Default: False.

    Shape: x (*), y (*).
    Dtypes: float32, float64, bfloat16, float16; others go to PyTorch's kernels.
    Raises: RuntimeError: a dtype that torch.nn.Hardtanh refuses. See functional.hardtanh.
    Source: torch.nn.Hardtanh.

    >>> fnn.Hardtanh(-2.0, 0.5)(torch.tensor([-3.0, 0.0, 3.0]))
    tensor([-2.0000,  0.0000,  0.5000])
    """

    def forward(self, input: Tensor) -> Tensor:
        if _is_scripting():
            return F.hardtanh(input, self.min_val, self.max_val, self.inplace)
        return FF.hardtanh(input, self.min_val, self.max_val, self.inplace)


class Hardsigmoid(nn.Hardsigmoid):
    """y = min(max(x + 3, 0), 6) / 6.

    Args:
        inplace: write the result into the input. Default: False.

    Shape: x (*), y (*).
    Dtypes: float32, float64, bfloat16, float16; others go to PyTorch's kernels.
    Raises: RuntimeError: x is not of floating point. See functional.hardsigmoid.
    Source: torch.nn.Hardsigmoid.

    >>> fnn.Hardsigmoid()(torch.tensor([-4.0, 0.0, 1.5]))
    tensor([0.0000, 0.5000, 0.7500])
    """

    def forward(self, input: Tensor) -> Tensor:
        if _is_scripting():
            return F.hardsigmoid(input, self.inplace)
        return FF.hardsigmoid(input, self.inplace)


class Hardswish(nn.Hardswish):
    """y = x min(max(x + 3, 0), 6) / 6.

    Args:
        inplace: write the result into the input. Default: False.

    Shape: x (*), y (*).
    Dtypes: float32, float64, bfloat16, float16; others go to PyTorch's kernels.
    Raises: RuntimeError: x is not of floating point. See functional.hardswish.
    Source: torch.nn.Hardswish.

    >>> fnn.Hardswish()(torch.tensor([-4.0, 1.5, 4.0]))
    tensor([-0.0000, 1.1250, 4.0000])
    """

    def forward(self, input: Tensor) -> Tensor:
        if _is_scripting():
            return F.hardswish(input, self.inplace)
        return FF.hardswish(input, self.inplace)


class Hardshrink(nn.Hardshrink):
    """y = x where |x| > lambd, else 0.

    Args:
        lambd: Default: 0.5.

    Shape: x (*), y (*).
    Dtypes: float32, float64, bfloat16, float16; others go to PyTorch's kernels.
    Raises: RuntimeError: x is not of floating point. See functional.hardshrink.
    Source: torch.nn.Hardshrink.

    >>> fnn.Hardshrink()(torch.tensor([-1.0, 0.25]))
    tensor([-1.,  0.])
    """

    def forward(self, input: Tensor) -> Tensor:
        if _is_scripting():
            return F.hardshrink(input, self.lambd)
        return FF.hardshrink(input, self.lambd)


class Softshrink(nn.Softshrink):
    """y = x - lambd where x > lambd, x + lambd where x < -lambd, else 0.

    Args:
        lambd: not negative. Default: 0.5.

    Shape: x (*), y (*).
    Dtypes: float32, float64, bfloat16, float16; others go to PyTorch's kernels.
    Raises: RuntimeError: lambd is negative. See functional.softshrink.
    Source: torch.nn.Softshrink.

    >>> fnn.Softshrink()(torch.tensor([-1.0, 0.25]))
    tensor([-0.5000,  0.0000])
    """

    def forward(self, input: Tensor) -> Tensor:
        if _is_scripting():
            return F.softshrink(input, self.lambd)
        return FF.softshrink(input, self.lambd)


class Tanhshrink(nn.Tanhshrink):
    """y = x - tanh(x).

    Args: none.

    Shape: x (*), y (*).
    Dtypes: float32, float64, bfloat16, float16; others go to PyTorch's kernels.
    Raises: RuntimeError: a dtype that torch.nn.Tanhshrink refuses. See functional.tanhshrink.
    Source: torch.nn.Tanhshrink.

    >>> fnn.Tanhshrink()(torch.tensor([0.0, 1.0]))
    tensor([0.0000, 0.2384])
    """

    def forward(self, input: Tensor) -> Tensor:
        if _is_scripting():
            return F.tanhshrink(input)
        return FF.tanhshrink(input)


class PReLU(nn.PReLU):
    """y = x where x > 0, else weight x; the weight is learnt.

    Args:
        num_parameters: 1, or as many as x has channels (dimension 1), each with a weight. Default: 1.
        init: of the weights. Default: 0.25.
        device, dtype: of the weights.

    Shape: x (*) or (batch, channels, *), y the same; weight (num_parameters).
    Dtypes: float32, float64, bfloat16, float16; others go to PyTorch's kernels.
    Raises: RuntimeError: num_parameters is neither 1 nor the number of channels. See functional.prelu.
    Source: torch.nn.PReLU.

    >>> fnn.PReLU()(torch.tensor([-1.0, 2.0])).tolist()
    [-0.25, 2.0]
    """

    def forward(self, input: Tensor) -> Tensor:
        if _is_scripting():
            return F.prelu(input, self.weight)
        return FF.prelu(input, self.weight)


class GLU(nn.GLU):
    """y = a / (1 + exp(-b)), a and b the two halves of x along dim.

    Args:
        dim: the dimension that is halved. Default: -1.

    Shape: x (*, 2 n, *), y (*, n, *), n at dim.
    Dtypes: float32, float64, bfloat16, float16; others go to PyTorch's kernels.
    Raises: RuntimeError: the size along dim is odd. See functional.glu.
    Source: torch.nn.GLU.

    >>> fnn.GLU()(torch.tensor([1.0, 2.0, 0.0, 0.0]))
    tensor([0.5000, 1.0000])
    """

    def forward(self, input: Tensor) -> Tensor:
        if _is_scripting():
            return F.glu(input, self.dim)
        return FF.glu(input, self.dim)


for _name in __all__:
    _module = globals()[_name]
    traced_as(_module.forward, _module.__base__.forward)
