"""What tests/test_<op>.py declares for the tests that call every op.

calls(size)              Calls that reach every kernel of the op, with images of this size
kernels(dtype, on_gpu)   the algorithms that those run, and how many sizes their tiles have; 0: no tile
RANDOM_CALLS             functions of a random.Random that make a Call
LAYERS                   (class of torch.nn, arguments): every layer, and what comes to the kernels in another form
LOSSES                   classes of torch.nn that are called with more than an input, which LAYERS leaves out
OP_LAYERS                one of them for each op of torch.ops.fastops
"""

import importlib
from typing import Any

import torch
from calls import spatial

import fastops.nn as fnn
from fastops._modules import modules

# A function of fastops.functional is in the module of its op.
_STEMS = [m.__name__.rpartition("._")[2] for m in modules("fastops.functional") if hasattr(m, "__all__")]
OPS = [importlib.import_module(f"test_{stem}") for stem in _STEMS]


def declared(name: str) -> list[Any]:
    """What the files of all ops declare under this name."""
    return [one for op in OPS for one in getattr(op, name, ())]


# The classes that LAYERS has.
LAYER_NAMES = [name for name in fnn.LAYERS if name not in declared("LOSSES")]


def layer_input(name: str) -> torch.Tensor:
    """An input for a layer of LAYERS."""
    return torch.randn(2, 4, *[6] * (spatial(name) or 1))
