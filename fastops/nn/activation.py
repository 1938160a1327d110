"""torch.nn's activation modules on fastops' kernels: the same names, signatures, attributes and repr.

Each is a subclass that only replaces forward; an instance needs nothing that torch.nn's does not have, so that
`replace_` can turn one into the other. Shapes, dtypes and errors: see fastops.functional.
"""

from torch import Tensor, nn

import fastops.functional as FF


class _Plain:
    """What the modules here share."""

    def __prepare_scriptable__(self) -> nn.Module:
        """For torch.jit.script: torch.nn's module with the same state."""
        theirs = next(cls for cls in type(self).__mro__ if cls.__module__.startswith("torch.nn."))
        plain = theirs.__new__(theirs)
        plain.__dict__.update(self.__dict__)
        return plain


class Threshold(_Plain, nn.Threshold):
    def forward(self, input: Tensor) -> Tensor:
        return FF.threshold(input, self.threshold, self.value, self.inplace)


class ReLU(_Plain, nn.ReLU):
    def forward(self, input: Tensor) -> Tensor:
        return FF.relu(input, self.inplace)


class ReLU6(_Plain, nn.ReLU6):
    def forward(self, input: Tensor) -> Tensor:
        return FF.relu6(input, self.inplace)


class LeakyReLU(_Plain, nn.LeakyReLU):
    def forward(self, input: Tensor) -> Tensor:
        return FF.leaky_relu(input, self.negative_slope, self.inplace)


class ELU(_Plain, nn.ELU):
    def forward(self, input: Tensor) -> Tensor:
        return FF.elu(input, self.alpha, self.inplace)


class SELU(_Plain, nn.SELU):
    def forward(self, input: Tensor) -> Tensor:
        return FF.selu(input, self.inplace)


class CELU(_Plain, nn.CELU):
    def forward(self, input: Tensor) -> Tensor:
        return FF.celu(input, self.alpha, self.inplace)


class GELU(_Plain, nn.GELU):
    def forward(self, input: Tensor) -> Tensor:
        return FF.gelu(input, approximate=self.approximate)


class SiLU(_Plain, nn.SiLU):
    def forward(self, input: Tensor) -> Tensor:
        return FF.silu(input, self.inplace)


class Mish(_Plain, nn.Mish):
    def forward(self, input: Tensor) -> Tensor:
        return FF.mish(input, self.inplace)


class Sigmoid(_Plain, nn.Sigmoid):
    def forward(self, input: Tensor) -> Tensor:
        return FF.sigmoid(input)


class LogSigmoid(_Plain, nn.LogSigmoid):
    def forward(self, input: Tensor) -> Tensor:
        return FF.logsigmoid(input)


class Tanh(_Plain, nn.Tanh):
    def forward(self, input: Tensor) -> Tensor:
        return FF.tanh(input)


class Softplus(_Plain, nn.Softplus):
    def forward(self, input: Tensor) -> Tensor:
        return FF.softplus(input, self.beta, self.threshold)


class Softsign(_Plain, nn.Softsign):
    def forward(self, input: Tensor) -> Tensor:
        return FF.softsign(input)


class Hardtanh(_Plain, nn.Hardtanh):
    def forward(self, input: Tensor) -> Tensor:
        return FF.hardtanh(input, self.min_val, self.max_val, self.inplace)


class Hardsigmoid(_Plain, nn.Hardsigmoid):
    def forward(self, input: Tensor) -> Tensor:
        return FF.hardsigmoid(input, self.inplace)


class Hardswish(_Plain, nn.Hardswish):
    def forward(self, input: Tensor) -> Tensor:
        return FF.hardswish(input, self.inplace)


class Hardshrink(_Plain, nn.Hardshrink):
    def forward(self, input: Tensor) -> Tensor:
        return FF.hardshrink(input, self.lambd)


class Softshrink(_Plain, nn.Softshrink):
    def forward(self, input: Tensor) -> Tensor:
        return FF.softshrink(input, self.lambd)


class Tanhshrink(_Plain, nn.Tanhshrink):
    def forward(self, input: Tensor) -> Tensor:
        return FF.tanhshrink(input)


class PReLU(_Plain, nn.PReLU):
    def forward(self, input: Tensor) -> Tensor:
        return FF.prelu(input, self.weight)


class GLU(_Plain, nn.GLU):
    def forward(self, input: Tensor) -> Tensor:
        return FF.glu(input, self.dim)
