"""Smaller models that are also faster, in eager mode.

>>> from fastops import light
>>> model = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
>>> print(light.quantize_(model, "int8_dynamic"))
0  torch.nn.Linear  ->        fastops.light.LinearInt8
2  torch.nn.Linear  skipped:  fewer than 8192 weights, which int8 makes no faster
left alone, no int8 kernel: 1 x torch.nn.ReLU
1 replaced, 1 skipped, 1 left alone

quantize_    the weights of a model as 8-bit integers
LinearInt8   what its linear layers become
"""

from fastops.light.linear_int8 import LinearInt8
from fastops.light.quantize import quantize_

__all__ = ["LinearInt8", "quantize_"]
