"""LayerNorm and RMSNorm: the shapes that the aims are about, and a small call.

A shape is rows x size, or batch x height x width x channels: "1024x768", "8x56x56x96". layer_norm+channels_first
normalises the channels of an NCHW image of that shape, moved to the end, as torchvision's ConvNeXt does.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import fastops.functional as FF
from fastops.benchmarks.harness import BOTH, DTYPES, FORWARD, Case, Sides, functional_sides, of_mode

SHAPE = "1024x768, 8x56x56x96"
FIGURES = ("1024x768", "8x56x56x96")
OTHERS = ("1x768", "64x128", "1576x768", "8x14x14x384")
IMAGES = ("8x56x56x96", "8x14x14x384", "8x7x7x768")
FUNCTIONS = ("layer_norm", "rms_norm", "layer_norm+channels_first")


def _norm(module: object, op: str, channels: int) -> Callable[..., Tensor]:
    function = getattr(module, op.split("+")[0])
    return lambda x, *parameters: function(x, (channels,), *parameters, eps=1e-5)


def prepare(case: Case) -> Sides:
    sizes, generator = tuple(map(int, case.shape.split("x"))), torch.Generator().manual_seed(0)
    x = torch.randn(sizes, generator=generator).to(DTYPES[case.dtype])
    if case.op.endswith("+channels_first"):
        x = x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    count = 1 if case.op == "rms_norm" else 2
    parameters = [torch.randn(sizes[-1], generator=generator).to(x.dtype) for _ in range(count)]
    return functional_sides(case, _norm(F, case.op, sizes[-1]), _norm(FF, case.op, sizes[-1]), [x, *parameters])


def make(op: str, shape: str, dtype: str, mode: str, threads: int, isa: str | None = None) -> Case:
    elements = math.prod(map(int, shape.split("x")))
    # forward: x, y; backward: grad_y, x, grad_x
    traffic = float(DTYPES[dtype].itemsize * elements * of_mode(mode, 2, 3))
    return Case(op, shape, dtype, mode, threads, float(elements), traffic, prepare, isa=isa)


def cases(threads: int) -> list[Case]:
    result = []
    for dtype in ("f32", "bf16"):
        for mode in (FORWARD, BOTH):
            for op in ("layer_norm", "rms_norm"):
                result += [make(op, shape, dtype, mode, threads) for shape in (*FIGURES, *OTHERS)]
            result += [make("layer_norm+channels_first", shape, dtype, mode, threads) for shape in IMAGES]
    return result
