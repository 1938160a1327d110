"""Convolution: the shapes that the aims are about.

A shape reads batch x channels x sizes - outputs - k(ernel) [- s(tride)] [- p(adding)] [- d(ilation)] [- g(roups)]:
"8x64x56x56-64-k3-p1".

Variants of an op: "+channels_last" lays out input and weight so, for both sides; "+medium" is that precision for
fastops; "+image" has an input that needs no gradient, like the first layer of a model; "+relu" has a fused ReLU.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import fastops
import fastops.functional as FF
from fastops.benchmarks.harness import BOTH, DTYPES, FORWARD, Case, Sides, functional_sides, of_mode

FIRST = "64x1x28x28-32-k3-p1"
WINDOWS = ("8x64x56x56-64-k3-p1", "8x256x14x14-256-k3-p1", "8x512x7x7-512-k3-p1", "64x32x14x14-64-k3-p1")
STEM = "8x3x224x224-64-k7-s2-p3"
POINTWISE = ("8x64x56x56-256-k1", "8x256x56x56-64-k1", "8x512x7x7-2048-k1")
DEPTHWISE = (
    "8x144x56x56-144-k3-p1-g144",
    "8x144x56x56-144-k3-s2-p1-g144",
    "8x240x28x28-240-k5-p2-g240",
    "8x240x28x28-240-k5-s2-p2-g240",
)
OTHERS = {
    "conv1d": "16x128x1000-128-k5-p2",
    "conv3d": "2x16x16x56x56-32-k3-p1",
    "conv_transpose2d": "8x128x16x16-64-k4-s2-p1",
}
SMALL = ("1x1x8x8-1-k3-p1", "1x8x8x8-8-k3-p1", "16x4x8x8-8-k1")
ALL = (FIRST, *WINDOWS, STEM, *POINTWISE, *DEPTHWISE)


class Shape(NamedTuple):
    batch: int
    channels: int
    size: tuple[int, ...]
    outputs: int
    kernel: int
    stride: int
    padding: int
    dilation: int
    groups: int
    transposed: bool

    @property
    def output_size(self) -> tuple[int, ...]:
        window = self.dilation * (self.kernel - 1) + 1
        if self.transposed:
            return tuple((n - 1) * self.stride + window - 2 * self.padding for n in self.size)
        return tuple((n + 2 * self.padding - window) // self.stride + 1 for n in self.size)

    @property
    def tensors(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of input, weight and bias."""
        kernel = (self.kernel,) * len(self.size)
        if self.transposed:
            weight = self.channels, self.outputs // self.groups, *kernel
        else:
            weight = self.outputs, self.channels // self.groups, *kernel
        return (self.batch, self.channels, *self.size), weight, (self.outputs,)

    @property
    def flops(self) -> float:
        positions = math.prod(self.size if self.transposed else self.output_size)
        return 2.0 * self.batch * positions * math.prod(self.tensors[1])

    @property
    def elements(self) -> int:
        """Of input, weight and output."""
        sizes = *self.tensors[:2], (self.batch, self.outputs, *self.output_size)
        return sum(map(math.prod, sizes))


def parse(op: str, text: str) -> Shape:
    """Raises ValueError where text is no shape of this op."""
    match = re.fullmatch(r"(\d+(?:x\d+)+)-(\d+)-k(\d+)(?:-s(\d+))?(?:-p(\d+))?(?:-d(\d+))?(?:-g(\d+))?", text)
    name = op.split("+")[0]
    if match is None:
        raise ValueError(f"{text} is no shape of a convolution")
    batch, channels, *size = map(int, match[1].split("x"))
    if len(size) != int(name.removesuffix("d")[-1]):
        raise ValueError(f"{text} has not the dimensions of {name}")
    outputs, kernel = int(match[2]), int(match[3])
    stride, padding, dilation, groups = (int(match[i] or default) for i, default in ((4, 1), (5, 0), (6, 1), (7, 1)))
    transposed = name.startswith("conv_transpose")
    return Shape(batch, channels, tuple(size), outputs, kernel, stride, padding, dilation, groups, transposed)


def convolution(module: object, name: str, shape: Shape, activation: str | None = None) -> Callable[..., Tensor]:
    function = getattr(module, name)
    kwargs = {"stride": shape.stride, "padding": shape.padding, "dilation": shape.dilation, "groups": shape.groups}
    if activation is not None:
        kwargs["activation"] = activation
    return lambda x, w, b: function(x, w, b, **kwargs)


def then_relu(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *tensors: F.relu(function(*tensors))


def _medium(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def call(*tensors: Tensor) -> Tensor:
        fastops.set_conv_precision("medium")
        try:
            return function(*tensors)
        finally:
            fastops.set_conv_precision("highest")

    return call


SHAPE = (
    "batch x channels x sizes - outputs - kernel - stride - padding - dilation - groups: 8x64x56x56-64-k3-s1-p1-d1-g1"
)
FUNCTIONS = (
    "conv2d", "conv2d+image", "conv2d+channels_last", "conv2d+medium", "conv2d+relu",
    "conv1d", "conv3d", "conv_transpose2d",
)  # fmt: skip


def prepare(case: Case) -> Sides:
    shape = parse(case.op, case.shape)
    name, *variants = case.op.split("+")
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(tensor, generator=generator).to(DTYPES[case.dtype]) for tensor in shape.tensors]
    inputs[1] /= math.sqrt(shape.channels // shape.groups * shape.kernel ** len(shape.size))
    if "channels_last" in variants:
        inputs[:2] = [tensor.contiguous(memory_format=torch.channels_last) for tensor in inputs[:2]]
    theirs, ours = convolution(F, name, shape), convolution(FF, name, shape, "relu" if "relu" in variants else None)
    if "relu" in variants:
        theirs = then_relu(theirs)
    if "medium" in variants:
        ours = _medium(ours)
    # Winograd's algorithms are held to their rms error: three times that of direct summation, or fifteen in "medium".
    factor = 15 if "medium" in variants else 3

    def compare(
        exact: Sequence[Tensor], mine: Sequence[Tensor], other: Sequence[Tensor], dtype: torch.dtype
    ) -> tuple[float, float, float]:
        return compare_rms(exact, mine, other, dtype, factor)

    if "image" not in variants:
        return functional_sides(case, theirs, ours, inputs, compare)
    image = inputs[0].to(case.device)
    # The reference is computed in float64: the image takes the parameters' dtype.
    return functional_sides(
        case,
        lambda w, b: theirs(image.to(w.dtype), w, b),
        lambda w, b: ours(image.to(w.dtype), w, b),
        inputs[1:],
        compare,
    )


def compare_rms(
    exact: Sequence[Tensor], ours: Sequence[Tensor], theirs: Sequence[Tensor], dtype: torch.dtype, factor: float
) -> tuple[float, float, float]:
    """harness.compare for rms errors: fastops' may be `factor` times PyTorch's, and a few roundings."""
    worst = (0.0, 0.0, math.inf)
    for reference, mine, other in zip(exact, ours, theirs, strict=True):
        scale = reference.square().mean().sqrt().item() or 1.0
        error, torch_error = (
            (value.double() - reference).square().mean().sqrt().item() / scale for value in (mine, other)
        )
        roundings = 32 if dtype == torch.float64 else 1
        allowed = factor * torch_error + roundings * torch.finfo(dtype).eps
        if not error / allowed <= worst[0] / worst[2]:
            worst = (error, torch_error, allowed)
    return worst


def make(op: str, shape: str, dtype: str, mode: str, threads: int, isa: str | None = None) -> Case:
    parsed = parse(op, shape)
    passes = of_mode(mode, 1, 1 if "+image" in op else 2)
    traffic = float(DTYPES[dtype].itemsize * parsed.elements * passes)
    bound = "bytes" if parsed.groups == parsed.channels else "flops"
    return Case(op, shape, dtype, mode, threads, parsed.flops * passes, traffic, prepare, bound, isa)


def cases(threads: int) -> list[Case]:
    """The cases that the aims are about."""
    result = []
    for dtype in ("f32", "bf16"):
        for mode in (FORWARD, BOTH):
            result += [make("conv2d", shape, dtype, mode, threads) for shape in ALL]
            result += [make("conv2d+channels_last", shape, dtype, mode, threads) for shape in ALL]
        result += [make("conv2d+image", shape, dtype, BOTH, threads) for shape in (FIRST, STEM)]
        result += [make(op, shape, dtype, mode, threads) for op, shape in OTHERS.items() for mode in (FORWARD, BOTH)]
    result += [make("conv2d+medium", shape, "f32", FORWARD, threads) for shape in WINDOWS]
    for op in ("conv2d", "conv2d+relu"):
        result += [make(op, shape, "f32", mode, threads) for shape in SMALL for mode in (FORWARD, "record", BOTH)]
    return result
