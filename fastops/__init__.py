"""Ordinary PyTorch models, faster, without changing them.

>>> model = nn.Sequential(nn.Linear(784, 128), nn.ReLU())
>>> report = fastops.replace_(model)  # in place: torch.nn's modules now run fastops' kernels
>>> report = fastops.restore_(model)  # and back

replace_, restore_, replaced   swap the classes of a model's modules, in place and back
fuse                           a model that computes its layers together, with the same parameters
freeze                         a model for inference: batch norms folded, weights packed once
enable, disable, enabled       fastops' kernels under PyTorch's own operators, for code that is not to be changed
nn, functional                 torch.nn's layers and functions on fastops' kernels
optim                          torch.optim's SGD, Adam and AdamW, whose step is one call
register                       classes of other libraries that are replaced, too
record                         which kernels ran, and for how long
explain                        what fastops would gain for a model, and by which call
monitor                        losses, times and kernels of a training run, for TensorBoard
info                           what is running, and why
lightning                      FastOps, a callback for PyTorch Lightning; import fastops.lightning
memory                         the pool that large outputs come from
set_conv_precision             what convolutions may trade for speed
export_kernels, decompositions whether torch.export keeps fastops' ops, and how to turn them into PyTorch's
op_library                     the ops as a library for C++ programs

Examples in docstrings assume `import torch`, `from torch import nn`, `import fastops`, `import fastops.nn as fnn` and
`import fastops.functional as FF`.
"""

from fastops._load import load as _load

_load()

from fastops import functional, memory, monitor, nn, optim  # noqa: E402
from fastops._version import __version__  # noqa: E402
from fastops.enable import disable, enable, enabled  # noqa: E402
from fastops.explain import explain  # noqa: E402
from fastops.export import decompositions, export_kernels, op_library  # noqa: E402
from fastops.freeze import freeze  # noqa: E402
from fastops.fuse import fuse  # noqa: E402
from fastops.info import info  # noqa: E402
from fastops.precision import get_conv_precision, set_conv_precision  # noqa: E402
from fastops.record import record  # noqa: E402
from fastops.registry import register  # noqa: E402
from fastops.replace import replace_, replaced, restore_  # noqa: E402

__all__ = [
    "__version__",
    "decompositions",
    "disable",
    "enable",
    "enabled",
    "explain",
    "export_kernels",
    "freeze",
    "functional",
    "fuse",
    "get_conv_precision",
    "info",
    "memory",
    "monitor",
    "nn",
    "op_library",
    "optim",
    "record",
    "register",
    "replace_",
    "replaced",
    "restore_",
    "set_conv_precision",
]
