"""Whole models, PyTorch against the same model after fastops.replace_: `fastops bench --models`.

The models are written here in plain torch.nn, after the papers named, so that nothing has to be installed or
downloaded. Both sides start from the same random weights. A shape reads model - batch x input: "resnet18-8x3x224x224".
Pass "forward" is inference: eval mode, no autograd. Pass "both" is a training step: forward, cross entropy, backward,
SGD.
"""

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fastops
from fastops.benchmarks import training
from fastops.benchmarks.conv import compare_rms
from fastops.benchmarks.harness import BOTH, FORWARD, Case, Sides
from fastops.demo import MLP, ConvNet

CLASSES = 10


# ---- the models ------------------------------------------------------------------------------------------------------


def convolution(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """A convolution that keeps the size at stride 1, and its batch norm."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outputs)]


class Residual(nn.Module):
    """relu(body(x) + shortcut(x)): the basic block of a ResNet."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *convolution(inputs, outputs, 3, stride), nn.ReLU(inplace=True), *convolution(outputs, outputs, 3)
        )
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else nn.Sequential(*convolution(inputs, outputs, 1, stride))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.body(x) + self.shortcut(x))


def resnet18(size: tuple[int, ...]) -> nn.Module:
    """He, Zhang, Ren and Sun, "Deep Residual Learning for Image Recognition" (2015)."""
    layers = [*convolution(size[0], 64, 7, 2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
    inputs = 64
    for outputs, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        layers += [Residual(inputs, outputs, stride), Residual(outputs, outputs, 1)]
        inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, CLASSES))


class InvertedResidual(nn.Module):
    """Widen by 1x1, filter each channel by 3x3, narrow by 1x1; the input is added where the shapes allow it."""

    def __init__(self, inputs: int, outputs: int, stride: int, widen: int) -> None:
        super().__init__()
        hidden = inputs * widen
        layers = [*convolution(inputs, hidden, 1), nn.ReLU6(inplace=True)] if widen > 1 else []
        layers += [*convolution(hidden, hidden, 3, stride, hidden), nn.ReLU6(inplace=True)]
        self.body = nn.Sequential(*layers, *convolution(hidden, outputs, 1))
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.adds else self.body(x)


def mobilenet_v2(size: tuple[int, ...]) -> nn.Module:
    """Sandler, Howard, Zhu, Zhmoginov and Chen, "MobileNetV2: Inverted Residuals and Linear Bottlenecks" (2018)."""
    layers = [*convolution(size[0], 32, 3, 2), nn.ReLU6(inplace=True)]
    inputs = 32
    for widen, outputs, blocks, stride in (
        (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1),
    ):  # fmt: skip
        for block in range(blocks):
            layers.append(InvertedResidual(inputs, outputs, stride if block == 0 else 1, widen))
            inputs = outputs
    layers += [*convolution(inputs, 1280, 1), nn.ReLU6(inplace=True)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1280, CLASSES))


class EncoderLayer(nn.Module):
    """Self-attention and a two-layer perceptron with GELU, each after a layer norm and added to its input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, tokens, 3, self.heads, width // self.heads)
        attended = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4))
        x = x + self.out(attended.transpose(1, 2).reshape(x.shape))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """Dosovitskiy et al., "An Image is Worth 16x16 Words" (2020)."""

    def __init__(self, size: tuple[int, ...], width: int, heads: int, layers: int, patch: int = 16) -> None:
        super().__init__()
        channels, height, columns = size
        self.patches = nn.Conv2d(channels, width, patch, patch)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        tokens = (height // patch) * (columns // patch) + 1
        self.positions = nn.Parameter(0.02 * torch.randn(1, tokens, width))
        self.layers = nn.Sequential(*[EncoderLayer(width, heads) for _ in range(layers)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        return self.head(self.norm(self.layers(x))[:, 0])


@dataclass(frozen=True)
class Model:
    """name: as people write it. build: from the size of one input. shape: the one that is measured."""

    name: str
    build: Callable[[tuple[int, ...]], nn.Module]
    shape: str


MODELS = {
    "mlp": Model("MLP 784-128-10", lambda size: MLP(size[-1]), "64x784"),
    "convnet": Model("ConvNet, two 3x3 convolutions", lambda size: ConvNet(), "64x1x28x28"),
    "resnet18": Model("ResNet-18", resnet18, "8x3x224x224"),
    "mobilenetv2": Model("MobileNetV2", mobilenet_v2, "8x3x224x224"),
    "vits16": Model("ViT-S/16", lambda size: VisionTransformer(size, 384, 6, 12), "8x3x224x224"),
}


# ---- measuring them --------------------------------------------------------------------------------------------------

SHAPE = f"for passes forward and both, one of {', '.join(MODELS)}, with its batch and input: resnet18-8x3x224x224"
FUNCTIONS = ("model",)


def parse(shape: str) -> tuple[Model, int, tuple[int, ...]]:
    """The model, the batch and the size of one input. Raises ValueError where the text names none."""
    match = re.fullmatch(r"([a-z0-9]+)-(\d+)((?:x\d+)+)", shape)
    if match is None or match[1] not in MODELS:
        raise ValueError(f"{shape} names no model and batch")
    return MODELS[match[1]], int(match[2]), tuple(map(int, match[3][1:].split("x")))


def prepare(case: Case) -> Sides:
    """Verifies the outputs; of a training step every parameter's gradient as well.

    At the kink of a ReLU or a max pool a rounding can turn a unit on or off, which moves a gradient by far more than a
    rounding. For that reason PyTorch's own float32 gradients of a ResNet-18 differ by 0.02% from float64's, fastops' by
    0.4% (8 images, AMD EPYC Zen 5). So float32 gradients may differ by 2%. float64's, where no rounding reaches a kink,
    prove the formula.
    """
    model, batch, size = parse(case.shape)
    torch.manual_seed(0)
    theirs = model.build(size).train(case.mode == BOTH)
    x, target = torch.randn(batch, *size), torch.randint(CLASSES, (batch,))

    def twin(dtype: torch.dtype, replace: bool) -> nn.Module:
        result = copy.deepcopy(theirs).to(dtype)
        if replace:
            fastops.replace_(result)
        return result

    def results(dtype: torch.dtype, replace: bool) -> list[Tensor]:
        one = twin(dtype, replace)
        output = one(x.to(dtype))
        if case.mode == FORWARD:
            return [output]
        return [output.detach(), *torch.autograd.grad(F.cross_entropy(output, target), list(one.parameters()))]

    def side(replace: bool) -> Callable[[], object]:
        one = twin(torch.float32, replace)
        return training.Inference(one, x) if case.mode == FORWARD else training.Step(one, x, target)

    exact = results(torch.float64, False)
    ours, others = results(torch.float32, True), results(torch.float32, False)
    errors = [compare_rms(exact[:1], ours[:1], others[:1], torch.float32, 3)]
    if case.mode == BOTH:
        errors.append((_difference(exact[1:], ours[1:]), _difference(exact[1:], others[1:]), 0.02))
        errors.append((_difference(exact[1:], results(torch.float64, True)[1:]), 0.0, 1e-9))
    failed = [one for one in errors if not one[0] <= one[2]]
    return Sides(side(False), side(True), *(failed or errors)[0])


def _difference(exact: list[Tensor], other: list[Tensor]) -> float:
    """The largest rms difference of a gradient, relative to its rms.

    Some gradients are zero but for roundings, those of a shift before a batch norm for one. So none counts as smaller
    than a thousandth of the largest.
    """
    scales = torch.stack([tensor.square().mean().sqrt() for tensor in exact])
    errors = torch.stack([(a - b).square().mean().sqrt() for a, b in zip(exact, other, strict=True)])
    return (errors / scales.clamp(min=1e-3 * scales.max())).max().item()


def make(op: str, shape: str, dtype: str, mode: str, threads: int, isa: str | None = None) -> Case:
    """`shape` as in parse; dtype: "f32"; mode: FORWARD or BOTH."""
    model, batch, size = parse(shape)
    if dtype != "f32" or mode not in (FORWARD, BOTH):
        raise ValueError(f"a model is measured in f32, forward or both, not in {dtype} {mode}")
    flops, elements = _work(model, batch, size, mode)
    return Case(op, shape, dtype, mode, threads, flops, 4.0 * elements, prepare, "flops", isa, seconds=6.0)


def _work(model: Model, batch: int, size: tuple[int, ...], mode: str) -> tuple[float, float]:
    """Floating point operations, and elements that layers read or write; counted on tensors without memory."""
    with torch.device("meta"):
        built, x = model.build(size), torch.empty(batch, *size)
    elements = sum(parameter.numel() for parameter in built.parameters())

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal elements
        elements += sum(tensor.numel() for tensor in (*inputs, output))

    for module in built.modules():
        if not list(module.children()):
            module.register_forward_hook(count)
    with FlopCounterMode(display=False) as counter:
        loss = built(x).sum()
        if mode == BOTH:
            loss.backward()
    return float(counter.get_total_flops()), float(elements * (3 if mode == BOTH else 1))


def cases(threads: int) -> list[Case]:
    """Inference and a training step of every model."""
    return [
        make("model", f"{name}-{model.shape}", "f32", mode, threads)
        for name, model in MODELS.items()
        for mode in (FORWARD, BOTH)
    ]
