"""Convolutions with int8 weights and a calibrated input: one layer, which takes and gives float tensors, beside
PyTorch's convolution; and whole networks, quantized and frozen, beside PyTorch's eager ones and beside the frozen float
network.

A shape is one of a convolution, as in conv.py, or a network and its batch: "resnet50-8". Results are verified against
the formulas in PyTorch's ops; what rounding to 8 bits loses is no error of a kernel's.
"""

import copy
import re

import torch
from torch import Tensor, nn

import fastops
from fastops import light
from fastops.benchmarks import conv
from fastops.benchmarks.harness import DTYPES, FORWARD, Case, Sides
from fastops.benchmarks.scoreboard import networks

SHAPE = f"{conv.SHAPE}, or of networks resnet50-8, mobilenetv2-1"
LAYER, NETWORK, FROZEN = FUNCTIONS = ("conv_int8", "int8 network", "int8 network, frozen")
NETWORKS = {"resnet50": networks.resnet50, "mobilenetv2": networks.mobilenet_v2}
LAYERS = (*conv.WINDOWS[:3], conv.STEM, *conv.POINTWISE, conv.DEPTHWISE[0])
# Of one layer sums are exact; five roundings of float32 follow, relative to the largest result. In a network a level
# that falls the other way moves what follows by a part of a level, of which there are 255 between least and greatest.
ALLOWED = {LAYER: 5 * 2**-24, NETWORK: 0.02, FROZEN: 0.02}
SIZE = (3, 224, 224)


def _layer(case: Case) -> Sides:
    shape = conv.parse("conv2d", case.shape)
    torch.manual_seed(0)
    dtype, last = DTYPES[case.dtype], torch.channels_last
    sizes = shape.channels, shape.outputs, shape.kernel, shape.stride, shape.padding, shape.dilation, shape.groups
    plain = nn.Conv2d(*sizes).to(dtype, memory_format=last)
    x = torch.randn(shape.batch, shape.channels, *shape.size).to(dtype, memory_format=last)
    ours = light.Conv2dInt8.from_conv(plain, float(x.min()), float(x.max()))
    exact = ours._by_torch(x.float(), ours.bias.float())
    error = float((ours(x).float() - exact).abs().max() / exact.abs().max())
    return Sides(lambda: plain(x), lambda: ours(x), error, 0.0, ALLOWED[LAYER] + torch.finfo(dtype).eps)


def _network(case: Case) -> Sides:
    build, batch = parse(case.shape)
    torch.manual_seed(0)
    plain, x = build().eval(), torch.randn(batch, *SIZE)
    int8 = copy.deepcopy(plain)
    light.quantize_(int8, "int8_static", calibrate=[torch.randn(2, *SIZE)])
    ours = fastops.freeze(int8)
    theirs = fastops.freeze(plain) if case.op == FROZEN else plain
    exact = ours.model(x)
    error = float((ours(x) - exact).square().mean().sqrt() / exact.square().mean().sqrt())
    return Sides(lambda: theirs(x), lambda: ours(x), error, 0.0, ALLOWED[case.op])


def parse(shape: str) -> tuple[type[nn.Module], int]:
    """What builds the network, and the batch. Raises ValueError where the text names none."""
    match = re.fullmatch(r"([a-z0-9]+)-(\d+)", shape)
    if match is None or match[1] not in NETWORKS:
        raise ValueError(f"{shape} names no network and batch: {SHAPE}")
    return NETWORKS[match[1]], int(match[2])


def make(op: str, shape: str, dtype: str, mode: str, threads: int, isa: str | None = None) -> Case:
    if op == LAYER:
        one = conv.parse("conv2d", shape)
        traffic = float(DTYPES[dtype].itemsize * one.elements)
        return Case(op, shape, dtype, FORWARD, threads, one.flops, traffic, _layer, "flops", isa)
    build, batch = parse(shape)
    flops, elements = _work(build, batch)
    return Case(op, shape, "f32", FORWARD, threads, flops, 4.0 * elements, _network, "flops", isa, seconds=6.0)


def _work(build: type[nn.Module], batch: int) -> tuple[float, float]:
    """Floating point operations and elements of the layers' inputs and weights, counted on tensors without memory."""
    flops = elements = 0

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal flops, elements
        flops += 2 * output.numel() * module.weight[0].numel()
        elements += inputs[0].numel() + output.numel() + module.weight.numel()

    with torch.device("meta"):
        model, x = build().eval(), torch.empty(batch, *SIZE)
        for module in model.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                module.register_forward_hook(count)
        model(x)
    return float(flops), float(elements)


def cases(threads: int) -> list[Case]:
    result = [make(LAYER, shape, "f32", FORWARD, threads) for shape in LAYERS]
    return result + [
        make(op, f"{name}-{batch}", "f32", FORWARD, threads)
        for op in (NETWORK, FROZEN)
        for name in NETWORKS
        for batch in (8, 1)
    ]
