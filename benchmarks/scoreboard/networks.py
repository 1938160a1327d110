"""The networks of the scoreboard, in plain torch.nn with seeded random weights: nothing is installed or downloaded.

They are written after the papers named and have as many parameters as those of torchvision. Two things are left out,
since no two libraries draw the same random numbers: dropout, and ConvNeXt's stochastic depth. torch.fx can trace all of
them.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastops.demo import MLP, ConvNet, SimpleNet

CLASSES = 1000
INT8 = "int8"  # the dtype of cases whose networks are float32 and then made 8-bit, each by its provider's own means
FLOATS = ("f32", "bf16")


# ---- the networks ----------------------------------------------------------------------------------------------------


def convolution(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """A convolution that keeps the size at stride 1, and its batch norm."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return [conv, nn.BatchNorm2d(outputs)]


class Bottleneck(nn.Module):
    """relu(body(x) + shortcut(x)), where the body narrows, filters by 3x3, and widens four times."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *convolution(inputs, width, 1),
            nn.ReLU(inplace=True),
            *convolution(width, width, 3, stride),
            nn.ReLU(inplace=True),
            *convolution(width, 4 * width, 1),
        )
        same = stride == 1 and inputs == 4 * width
        self.shortcut = nn.Identity() if same else nn.Sequential(*convolution(inputs, 4 * width, 1, stride))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.body(x) + self.shortcut(x))


def resnet50() -> nn.Module:
    """He, Zhang, Ren and Sun, "Deep Residual Learning for Image Recognition" (2015)."""
    layers = [*convolution(3, 64, 7, 2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
    inputs = 64
    for width, blocks, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for block in range(blocks):
            layers.append(Bottleneck(inputs, width, stride if block == 0 else 1))
            inputs = 4 * width
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


def mobilenet_v2() -> nn.Module:
    """Sandler, Howard, Zhu, Zhmoginov and Chen, "MobileNetV2: Inverted Residuals and Linear Bottlenecks" (2018)."""
    layers = [*convolution(3, 32, 3, 2), nn.ReLU6(inplace=True)]
    inputs = 32
    for widen, outputs, blocks, stride in (
        (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1),
    ):  # fmt: skip
        for block in range(blocks):
            layers.append(InvertedResidual(inputs, outputs, stride if block == 0 else 1, widen))
            inputs = outputs
    layers += [*convolution(inputs, 1280, 1), nn.ReLU6(inplace=True)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1280, CLASSES))


def vgg11() -> nn.Module:
    """Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition" (2014), A."""
    layers: list[nn.Module] = []
    inputs = 3
    for outputs in (64, 0, 128, 0, 256, 256, 0, 512, 512, 0, 512, 512, 0):
        if outputs == 0:
            layers.append(nn.MaxPool2d(2))
            continue
        conv = nn.Conv2d(inputs, outputs, 3, padding=1)
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        layers += [conv, nn.ReLU(inplace=True)]
        inputs = outputs
    layers += [nn.Flatten(), nn.Linear(512 * 7 * 7, 4096), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.Linear(4096, 4096), nn.ReLU(inplace=True), nn.Linear(4096, CLASSES))


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of [batch, channels, height, width]."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class ConvNeXtBlock(nn.Module):
    """x + scale * (depthwise 7x7, layer norm, widen four times, GELU, narrow)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.widen, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.gelu = nn.GELU()
        # Not 1e-6, as before training: an output that does not depend on the blocks verifies nothing.
        self.scale = nn.Parameter(torch.full((width, 1, 1), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.narrow(self.gelu(self.widen(y)))
        return x + self.scale * y.permute(0, 3, 1, 2)


def convnext_tiny() -> nn.Module:
    """Liu, Mao, Wu, Feichtenhofer, Darrell and Xie, "A ConvNet for the 2020s" (2022)."""
    layers: list[nn.Module] = [nn.Conv2d(3, 96, 4, 4), ChannelNorm(96, eps=1e-6)]
    inputs = 96
    for width, blocks in ((96, 3), (192, 3), (384, 9), (768, 3)):
        if width != inputs:
            layers += [ChannelNorm(inputs, eps=1e-6), nn.Conv2d(inputs, width, 2, 2)]
            inputs = width
        layers += [ConvNeXtBlock(width) for _ in range(blocks)]
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), ChannelNorm(768, eps=1e-6), nn.Flatten(), nn.Linear(768, CLASSES)
    )


class Attention(nn.Module):
    """Multi-head self-attention, with one linear layer for queries, keys and values."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.heads, self.causal = heads, causal

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2], is_causal=self.causal)
        return self.out(y.transpose(1, 2).flatten(2))


class TransformerBlock(nn.Module):
    """Self-attention and a two-layer perceptron with GELU, each after a layer norm and added to its input."""

    def __init__(self, width: int, heads: int, causal: bool = False, approximate: str = "none") -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads, causal)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """ViT-B/16: Dosovitskiy et al., "An Image is Worth 16x16 Words" (2020)."""

    def __init__(self, width: int = 768, heads: int = 12, layers: int = 12, patch: int = 16, size: int = 224) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(0.02 * torch.randn(1, (size // patch) ** 2 + 1, width))
        self.layers = nn.Sequential(*[TransformerBlock(width, heads) for _ in range(layers)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.positions
        return self.head(self.norm(self.layers(x))[:, 0])


class EncoderLayer(nn.Module):
    """Self-attention and a two-layer perceptron with GELU, each added to its input before a layer norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = Attention(width, heads, causal=False)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.attention(x))
        return self.norm2(x + self.mlp(x))


def bert_base() -> nn.Module:
    """The encoder of BERT-base, behind its embeddings: Devlin, Chang, Lee and Toutanova, "BERT" (2018)."""
    return nn.Sequential(*[EncoderLayer(768, 12) for _ in range(12)])


def gpt2_block() -> nn.Module:
    """One of GPT-2 small's twelve: Radford et al., "Language Models are Unsupervised Multitask Learners" (2019)."""
    return TransformerBlock(768, 12, causal=True, approximate="tanh")


# ---- what is measured of them ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Network:
    """name: as people write it. size: of one input. inference, training: the batches. decisive: the one that counts.

    Its loss is cross entropy over classes; mean squared error where `classes` is None. dtypes: in which it is measured.
    """

    name: str
    build: Callable[[], nn.Module]
    size: tuple[int, ...]
    inference: tuple[int, ...]
    training: int
    decisive: int
    classes: int | None = CLASSES
    dtypes: tuple[str, ...] = FLOATS

    def model(self) -> nn.Module:
        """The network, float32, always with the same weights; batch norms have statistics to speak of."""
        torch.manual_seed(0)
        model = self.build()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.running_mean, -0.1, 0.1)
                nn.init.uniform_(module.running_var, 0.8, 1.2)
                nn.init.uniform_(module.weight, 0.8, 1.2)
                nn.init.uniform_(module.bias, -0.1, 0.1)
        return model

    def data(self, batch: int, seed: int = 1) -> tuple[Tensor, Tensor]:
        """Inputs, and what the loss compares the outputs with."""
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(batch, *self.size, generator=generator)
        if self.classes is not None:
            return x, torch.randint(self.classes, (batch,), generator=generator)
        outputs = (batch, 1) if len(self.size) == 1 else x.shape
        return x, torch.randn(outputs, generator=generator)

    def calibration(self) -> list[Tensor]:
        """Other inputs, by which 8-bit models learn what range their layers' inputs have."""
        return [self.data(4, seed)[0] for seed in range(2, 6)]


IMAGE = (3, 224, 224)
NETWORKS = {
    "simplenet": Network("SimpleNet 10-5-5-1", SimpleNet, (10,), (100,), 100, 100, None),
    "mlp": Network("MLP 784-128-10", lambda: MLP(784), (784,), (64, 1), 64, 64, 10),
    "convnet": Network("ConvNet 1x28x28", ConvNet, (1, 28, 28), (64, 1), 64, 64, 10),
    "resnet50": Network("ResNet-50", resnet50, IMAGE, (8, 1), 8, 8, dtypes=(*FLOATS, INT8)),
    "mobilenetv2": Network("MobileNetV2", mobilenet_v2, IMAGE, (8, 1), 8, 8, dtypes=(*FLOATS, INT8)),
    "vitb16": Network("ViT-B/16", VisionTransformer, IMAGE, (4, 8, 1), 8, 4, dtypes=(*FLOATS, INT8)),
    "convnext": Network("ConvNeXt-T", convnext_tiny, IMAGE, (8, 1), 8, 8),
    "vgg11": Network("VGG-11", vgg11, IMAGE, (4, 8, 1), 8, 4),
    "gpt2": Network("GPT-2 block, 256 tokens", gpt2_block, (256, 768), (4, 8, 1), 4, 4, None),
    "bert": Network("BERT-base, 128 tokens", bert_base, (128, 768), (4, 8, 1), 4, 4, None, (INT8,)),
}
