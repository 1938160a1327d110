"""float64 references and the shapes that the tests and benchmarks of each stem share."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import fastops.functional as FF
from fastops._activations import ACTIVATIONS as KINDS
from fastops._activations import two

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


class Conv(NamedTuple):
    """One convolution; `transposed` ones have (in_channels, out_channels / groups) weights, as in torch.nn."""

    batch: int
    channels: int  # of the input
    outputs: int
    size: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: int | tuple[int, ...] = 1
    padding: int | tuple[int, ...] | str = 0
    dilation: int | tuple[int, ...] = 1
    groups: int = 1
    transposed: bool = False
    output_padding: int | tuple[int, ...] = 0

    def __str__(self) -> str:
        def text(value: Any) -> str:
            return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)

        parts = [f"{self.batch}x{self.channels}x{text(self.size)}-{self.outputs}-k{text(self.kernel)}"]
        for name, initial in (("stride", 1), ("padding", 0), ("dilation", 1), ("groups", 1), ("output_padding", 0)):
            if getattr(self, name) != initial:
                parts.append(f"{name[0]}{text(getattr(self, name))}")
        return ("T" if self.transposed else "") + "-".join(parts)

    @property
    def name(self) -> str:
        """torch.nn.functional's."""
        return f"conv{'_transpose' if self.transposed else ''}{len(self.size)}d"

    @property
    def kwargs(self) -> dict[str, Any]:
        """The arguments after bias, in the order of the signature."""
        plain, transposed = "stride padding dilation groups", "stride padding output_padding groups dilation"
        return {name: getattr(self, name) for name in (transposed if self.transposed else plain).split()}

    @property
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Of input, weight and bias."""
        channels, outputs = self.channels, self.outputs
        if self.transposed:
            weight = channels, outputs // self.groups, *self.kernel
        else:
            weight = outputs, channels // self.groups, *self.kernel
        return (self.batch, channels, *self.size), weight, (outputs,)

    @property
    def terms(self) -> int:
        """The most that any result is a sum of."""
        taps = math.prod(self.kernel)
        return max(self.channels * taps, self.outputs * taps, self.batch * math.prod(self.size) * 4)

    def ours(self, *tensors: Tensor | None, **more: Any) -> Tensor:
        return getattr(FF, self.name)(*tensors, **self.kwargs, **more)

    def theirs(self, *tensors: Tensor | None) -> Tensor:
        return getattr(F, self.name)(*tensors, **self.kwargs)


# Every kind of convolution, with channels and rows around the vector and tile widths (8 to 32) and sizes that leave
# remainders.
CONVS = [
    Conv(1, 1, 1, (1, 1), (1, 1)),
    Conv(2, 3, 5, (7, 9), (1, 1)),
    Conv(1, 33, 17, (5, 7), (1, 1), stride=2),
    Conv(2, 1, 32, (9, 13), (3, 3), padding=1),
    Conv(1, 3, 17, (17, 19), (7, 7), stride=2, padding=3),
    Conv(2, 2, 31, (8, 6), (3, 3)),
    Conv(1, 16, 16, (8, 8), (3, 3), padding=1),
    Conv(2, 17, 33, (9, 7), (3, 3), padding=1),
    Conv(1, 32, 31, (5, 18), (3, 3), padding=(0, 2)),
    Conv(1, 8, 9, (11, 10), (3, 3), stride=2, padding=1),
    Conv(1, 5, 7, (12, 11), (3, 2), stride=(1, 3), padding=(2, 1), dilation=(2, 1)),
    Conv(2, 4, 6, (9, 9), (5, 5), padding=2, groups=2),
    Conv(1, 12, 24, (6, 7), (3, 3), padding=1, groups=3),
    Conv(2, 17, 17, (9, 10), (3, 3), padding=1, groups=17),
    Conv(1, 16, 16, (13, 12), (5, 5), stride=2, padding=2, groups=16),
    Conv(1, 6, 12, (7, 33), (3, 3), padding=1, groups=6),
    Conv(1, 9, 9, (8, 8), (3, 3), dilation=2, groups=9),
    Conv(1, 3, 4, (6, 7), (4, 2), padding="same"),
    Conv(1, 3, 4, (9, 8), (2, 4), padding="same", dilation=3),
    Conv(1, 3, 4, (6, 7), (3, 3), padding="valid"),
    Conv(1, 2, 3, (4, 4), (3, 3), padding=7),
    Conv(3, 5, 9, (37,), (5,), padding=2),
    Conv(2, 16, 40, (20,), (3,), stride=2, dilation=2),
    Conv(1, 6, 6, (19,), (4,), padding="same", groups=6),
    Conv(1, 3, 5, (5, 6, 7), (3, 3, 3), padding=1),
    Conv(2, 8, 4, (4, 5, 6), (1, 2, 3), stride=(1, 2, 1), padding=(0, 1, 2), groups=2),
    Conv(1, 2, 4, (4, 5, 6), (2, 2, 2), padding="same"),
    Conv(2, 5, 7, (4, 5), (3, 3), transposed=True),
    Conv(1, 17, 33, (5, 6), (4, 4), stride=2, padding=1, transposed=True),
    Conv(1, 4, 6, (5, 3), (3, 2), stride=(3, 2), padding=1, dilation=(1, 2), groups=2, transposed=True,
         output_padding=(2, 1)),
    Conv(1, 8, 8, (6, 5), (3, 3), stride=2, padding=1, groups=8, transposed=True, output_padding=1),
    Conv(2, 6, 3, (9,), (5,), stride=2, padding=2, transposed=True, output_padding=1),
    Conv(1, 4, 3, (3, 2, 4), (2, 3, 2), stride=2, transposed=True),
    Conv(1, 16, 17, (3, 5, 6), (3, 3, 3), padding=1),
]  # fmt: skip


class Pool(NamedTuple):
    """One pool of torch.nn.functional."""

    name: str
    shape: tuple[int, ...]  # of the input
    args: tuple[Any, ...]  # after the input
    kwargs: dict[str, Any]

    def __str__(self) -> str:
        more = "".join(f"-{name}={value}" for name, value in self.kwargs.items())
        return f"{self.name}-{'x'.join(map(str, self.shape))}-{'-'.join(map(str, self.args))}{more}".replace(" ", "")

    @property
    def dims(self) -> int:
        return int(self.name[-2])

    @property
    def is_max(self) -> bool:
        return "max" in self.name

    def ours(self, x: Tensor, **more: Any) -> Any:
        return getattr(FF, self.name)(x, *self.args, **self.kwargs, **more)

    def theirs(self, x: Tensor, **more: Any) -> Any:
        return getattr(F, self.name)(x, *self.args, **self.kwargs, **more)


def _pools() -> list[Pool]:
    """Every argument, widths around the vector widths and their doubles, channels around the vector widths."""
    shapes = {1: (2, 3, 19), 2: (2, 3, 9, 11), 3: (2, 2, 5, 6, 7)}
    pools = []
    for kind in ("max", "avg"):
        for dims, shape in shapes.items():
            name = f"{kind}_pool{dims}d"
            pools += [Pool(name, shape, (2,), {}), Pool(name, shape, (3, 2, 1), {}), Pool(name, shape, (3, 1, 1), {})]
            pools += [Pool(name, shape, (3, 3), {"ceil_mode": True}), Pool(name, shape, (5, 4, 2), {"ceil_mode": True})]
            pools += [Pool(name, shape[1:], (2, 2, 1), {}), Pool(name, (0, *shape[1:]), (2,), {})]
            name = f"adaptive_{name}"
            pools += [Pool(name, shape, (size,), {}) for size in (1, 3, 4, 30)] + [Pool(name, shape[1:], (2,), {})]
        name = f"{kind}_pool2d"
        for width in (2, 15, 16, 17, 31, 32, 33, 34, 64, 67):
            pools += [Pool(name, (1, 2, 4, width), (2,), {}), Pool(name, (1, 2, 5, width), (3, 2, 1), {})]
        for channels in (1, 7, 8, 15, 16, 17, 31, 33, 65, 100):
            pools += [Pool(name, (1, channels, 6, 5), (3, 2, 1), {}), Pool(name, (2, channels, 6, 6), (2,), {})]
        pools += [Pool(name, (1, 2, 20, 20), ((3, 2), (1, 2), (1, 0)), {}), Pool(name, (1, 1, 30, 30), (17, 1, 8), {})]
        pools += [Pool(f"adaptive_{name}", (2, 3, 28, 30), size, {}) for size in ((1,), ((7, None),), ((None, 5),))]
    for dims, shape in shapes.items():
        pools.append(Pool(f"max_pool{dims}d", shape, (2, 1, 1, 2), {}))
        pools.append(Pool(f"max_pool{dims}d", shape, (2, 2, 0, 3), {"ceil_mode": True}))
        pools.append(Pool(f"avg_pool{dims}d", shape, (3, 2, 1), {"count_include_pad": False, "ceil_mode": True}))
    for dims in (2, 3):
        pools.append(Pool(f"avg_pool{dims}d", shapes[dims], (3, 2, 1), {"divisor_override": 5}))
        pools.append(Pool(f"avg_pool{dims}d", shapes[dims], (2,), {"divisor_override": 3}))
    return pools


POOLS = _pools()

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
    def saves(self) -> str:
        """What backward reads where nothing is fused."""
        return KINDS[self.kind].saves

    @property
    def from_input(self) -> bool:
        """Whether the gradient can be formed from x; sigmoid's and tanh's is formed from y alone."""
        return self.saves != "output"

    @property
    def in_place(self) -> bool:
        return KINDS[self.kind].in_place

    def ours(self, x: Tensor, **more: Any) -> Tensor:
        return getattr(FF, self.function)(x, **self.kwargs, **more)

    def theirs(self, x: Tensor, **more: Any) -> Tensor:
        return getattr(F, self.function)(x, **self.kwargs, **more)


def _case(kind: str, **parameters: float) -> Case:
    row = KINDS[kind]
    a, b = two(*{**row.parameters, **parameters}.values())
    return Case(kind, row.function, {**row.options, **parameters}, a, b)


# Every kind as torch.nn.functional has it without arguments, and others.
ACTIVATIONS = [
    *(_case(kind) for kind in KINDS if kind not in ("identity", "threshold")),
    _case("leaky_relu", negative_slope=0.3),
    _case("leaky_relu", negative_slope=-0.5),
    _case("elu", alpha=0.3),
    _case("celu", alpha=2.5),
    _case("softplus", beta=2.0, threshold=5.0),
    _case("hardtanh", min_val=-0.5, max_val=2.0),
    _case("hardshrink", lambd=0.0),
    _case("softshrink", lambd=0.0),
    _case("threshold", threshold=0.1, value=0.7),
]


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
