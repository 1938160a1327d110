"""Smaller models that are also faster, in eager mode.

>>> from fastops import light
>>> model = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
>>> print(light.quantize_(model, "int8_dynamic"))
0  torch.nn.Linear  ->        fastops.light.LinearInt8
2  torch.nn.Linear  skipped:  fewer than 8192 weights, which would be no faster
left alone, no int8_dynamic kernel: 1 x torch.nn.ReLU
1 replaced, 1 skipped, 1 left alone

prune_channels_    takes channels and neurons out: smaller layers of the same kind
Changes            what such a function did to which layer
prune_weights_     makes the smallest weights 0, in blocks or 2 of 4, too
Pruner             the same step by step while a model is trained, by magnitude or movement
cubic_sparsity     how sparse it is when
sparsity_mask      which weights stay
take_masks_        makes the masks of torch.nn.utils.prune permanent
low_rank_          two small layers in the place of each large one
distill            trains a small model to say what a large one says
Distiller          the same as a loss and a step, for a loop of one's own
distillation_loss, feature_loss    its parts, as functions
Comparison         size, memory, time and accuracy after each of these steps, as a table and a picture
quantize_          the weights of a model as integers of 8 or 4 bits
prepare_qat_       training that knows of the rounding; convert_qat_ quantizes the layers then
QATLinear, QATConv2d    these layers
fake_quantize      the rounding, with gradients for input, scale and zero point
take_over_         models that torchao has quantized, on these kernels
LinearInt8         a linear layer with int8 weights, whose input is rounded to 8 bits as well
LinearInt8Static   one whose input has a constant scale, which calibration finds
Conv2dInt8         a convolution of that kind
LinearWeightOnly   a linear layer with weights of 8 or 4 bits, whose input is not rounded
save               a model as a file that runs without PyTorch
Saved              what it wrote
sparsify_          layers whose weights are mostly zeros store and multiply the others alone; densify_ is the inverse
LinearSparse       a linear layer with a sparse weight
Conv2d1x1Sparse    a 1 x 1 convolution with one
"""

from fastops.light._changes import Changes
from fastops.light._qat_layers import QATConv2d, QATLinear
from fastops.light.channels import prune_channels_
from fastops.light.comparison import Comparison, Measured
from fastops.light.conv2d_int8 import Conv2dInt8, LinearInt8Static
from fastops.light.distillation import Distiller, distill, distillation_loss, feature_loss
from fastops.light.fake_quantize import fake_quantize
from fastops.light.linear_int8 import LinearInt8
from fastops.light.low_rank import low_rank_
from fastops.light.qat import convert_qat_, prepare_qat_
from fastops.light.quantize import quantize_
from fastops.light.save import Saved, save
from fastops.light.sparse_linear import Conv2d1x1Sparse, LinearSparse
from fastops.light.sparsify import densify_, sparsify_
from fastops.light.take_over import take_over_
from fastops.light.weight_only import LinearWeightOnly
from fastops.light.weights import Pruner, cubic_sparsity, prune_weights_, sparsity_mask, take_masks_

__all__ = [
    "Changes",
    "Comparison",
    "Conv2d1x1Sparse",
    "Conv2dInt8",
    "Distiller",
    "LinearInt8",
    "LinearInt8Static",
    "LinearSparse",
    "LinearWeightOnly",
    "Measured",
    "Pruner",
    "QATConv2d",
    "QATLinear",
    "Saved",
    "convert_qat_",
    "cubic_sparsity",
    "densify_",
    "distill",
    "distillation_loss",
    "fake_quantize",
    "feature_loss",
    "low_rank_",
    "prepare_qat_",
    "prune_channels_",
    "prune_weights_",
    "quantize_",
    "save",
    "sparsify_",
    "sparsity_mask",
    "take_masks_",
    "take_over_",
]
