"""float64 references and the shapes that the tests and benchmarks of each stem share."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import fastops.functional as FF

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]

# (m, n, k) of y[m, n] = x[m, k] w[n, k]^T. The register tile is 12x32 (32x32 on AMX), a vector has up to 16 floats, the
# depth is blocked by some hundreds: sizes below, at and above each by one, and batches that take the paths without
# packing.
LINEAR_SHAPES = [
    (1, 1, 1),
    (1, 5, 10),
    (16, 5, 10),
    (2, 3, 7),
    (11, 31, 15),
    (12, 32, 16),
    (13, 33, 17),
    (5, 64, 31),
    (1, 129, 257),
    (64, 64, 64),
    (33, 65, 33),
    (100, 5, 5),
    (25, 97, 385),
    (3, 40, 1025),
    (130, 10, 128),
]

# Lengths around the vector widths (4 to 32 elements), unrolled loops and the size from which threads share the work.
LENGTHS = [0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 129, 1000, 4099, 70001]


class Case(NamedTuple):
    """One activation with its parameters."""

    kind: str  # the kernel's name
    function: str  # torch.nn.functional's
    kwargs: dict[str, Any]
    a: float
    b: float

    def __str__(self) -> str:
        return self.function + "".join(f"-{value}" for value in self.kwargs.values())

    @property
    def from_input(self) -> bool:
        """Whether the gradient can be formed from x; sigmoid's and tanh's is formed from y alone."""
        return self.kind not in ("sigmoid", "tanh")

    def ours(self, x: Tensor, **more: Any) -> Tensor:
        return getattr(FF, self.function)(x, **self.kwargs, **more)

    def theirs(self, x: Tensor, **more: Any) -> Tensor:
        return getattr(F, self.function)(x, **self.kwargs, **more)


def _case(kind: str, function: str = "", a: float = 0.0, b: float = 0.0, **kwargs: Any) -> Case:
    return Case(kind, function or kind, kwargs, a, b)


ACTIVATIONS = [
    _case("relu"),
    _case("relu6"),
    _case("leaky_relu", a=0.01),
    _case("leaky_relu", a=0.3, negative_slope=0.3),
    _case("leaky_relu", a=-0.5, negative_slope=-0.5),
    _case("elu", a=1.0),
    _case("elu", a=0.3, alpha=0.3),
    _case("selu"),
    _case("celu", a=1.0),
    _case("celu", a=2.5, alpha=2.5),
    _case("gelu"),
    _case("gelu_tanh", "gelu", approximate="tanh"),
    _case("silu"),
    _case("mish"),
    _case("sigmoid"),
    _case("logsigmoid"),
    _case("tanh"),
    _case("softplus", a=1.0, b=20.0),
    _case("softplus", a=2.0, b=5.0, beta=2.0, threshold=5.0),
    _case("softsign"),
    _case("hardtanh", a=-1.0, b=1.0),
    _case("hardtanh", a=-0.5, b=2.0, min_val=-0.5, max_val=2.0),
    _case("hardsigmoid"),
    _case("hardswish"),
    _case("hardshrink", a=0.5),
    _case("hardshrink", a=0.0, lambd=0.0),
    _case("softshrink", a=0.5),
    _case("softshrink", a=0.0, lambd=0.0),
    _case("tanhshrink"),
    _case("threshold", a=0.1, b=0.7, threshold=0.1, value=0.7),
]

# torch.nn.functional's activations that can also work in place.
INPLACE = {
    "relu", "relu6", "leaky_relu", "elu", "selu", "celu", "silu", "mish", "hardtanh", "hardsigmoid", "hardswish",
    "threshold",
}  # fmt: skip


def activation(case: Case, x: Tensor) -> Tensor:
    """f(x) in float64, without the cancellations that PyTorch's own formulas have in their tails; differentiable."""
    x = x.double()
    if case.kind == "hardsigmoid":  # PyTorch's gradient of it is 1 / 6 in float32, in float64 too
        return torch.where((x > -3) & (x < 3), (x + 3) / 6, torch.where(x >= 3, 1.0, x * 0.0))
    if case.kind == "gelu":
        return 0.5 * x * torch.special.erfc(-x / math.sqrt(2))
    if case.kind == "gelu_tanh":
        return x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
    if case.kind == "tanhshrink":
        series = x**3 / 3 - 2 * x**5 / 15 + 17 * x**7 / 315
        return torch.where(x.abs() < 0.02, series, x - torch.tanh(x))
    if case.kind == "mish":
        # tanh(log(1 + e^x)) = n / (n + 2) with n = e^x (e^x + 2)
        e = torch.exp(x.clamp(max=40))
        return x * (e * (e + 2) / (e * (e + 2) + 2))
    return case.theirs(x)


def linear(x: Tensor, w: Tensor, b: Tensor | None, function: Callable[[Tensor], Tensor] = lambda z: z) -> Tensor:
    """f(x W^T + b) in float64."""
    return function(F.linear(x.double(), w.double(), None if b is None else b.double()))


def gradients(output: Tensor, grad: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(output, inputs, grad.to(output.dtype))


def integers(*shape: int, dtype: torch.dtype, low: int = -3, high: int = 4) -> Tensor:
    """Integer-valued numbers, small enough for sums of products to be exact in every dtype's accumulator."""
    return torch.randint(low, high, shape).to(dtype)


# name -> how to make a tensor of this shape with these strides
LAYOUTS: dict[str, Callable[[tuple[int, ...], torch.dtype], Tensor]] = {
    "contiguous": lambda shape, dtype: torch.randn(shape).to(dtype),
    "transposed": lambda shape, dtype: torch.randn(shape[::-1]).to(dtype).permute(*range(len(shape) - 1, -1, -1)),
    "sliced": lambda shape, dtype: torch.randn([n + 3 for n in shape]).to(dtype)[tuple(slice(1, n + 1) for n in shape)],
    "stepped": lambda shape, dtype: torch.randn([2 * n for n in shape]).to(dtype)[
        tuple(slice(0, 2 * n, 2) for n in shape)
    ],
    "expanded": lambda shape, dtype: torch.randn(1, *shape[1:]).to(dtype).expand(shape),
    "expanded_last": lambda shape, dtype: torch.randn(*shape[:-1], 1).to(dtype).expand(shape),
}
