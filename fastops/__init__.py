"""Ordinary PyTorch models, faster, without changing them.

import fastops

report = fastops.replace_(model)   # in place: torch.nn's modules now run fastops' kernels
fastops.restore_(model)            # and back

torch.export writes PyTorch's own ops, or fastops' inside fastops.export_kernels(), which fastops.decompositions() turn
into PyTorch's. fastops.functional and fastops.nn have torch.nn's signatures; fastops.info() says what is running,
fastops.record() which kernels ran, fastops.set_conv_precision() what convolutions may trade for speed, and
fastops.memory holds the pool that large outputs come from.
"""

from fastops._load import load as _load

_load()

from fastops import functional, memory, nn  # noqa: E402
from fastops._version import __version__  # noqa: E402
from fastops.aten import decompositions  # noqa: E402
from fastops.export import export_kernels  # noqa: E402
from fastops.info import info  # noqa: E402
from fastops.precision import get_conv_precision, set_conv_precision  # noqa: E402
from fastops.record import record  # noqa: E402
from fastops.replace import replace_, replaced, restore_  # noqa: E402

__all__ = [
    "__version__",
    "decompositions",
    "export_kernels",
    "functional",
    "get_conv_precision",
    "info",
    "memory",
    "nn",
    "record",
    "replace_",
    "replaced",
    "restore_",
    "set_conv_precision",
]
