"""What torch.export makes of fastops' ops: fastops.export_kernels()."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_kept = False


@contextmanager
def export_kernels() -> Iterator[None]:
    """Inside the block, torch.export keeps fastops' ops in the program.

    Outside of it an exported program holds PyTorch's own ops, so that it runs where fastops is not installed, and tools
    that take such programs know its ops. A program with fastops' ops, and an AOTInductor package made of one,
    runs fastops' kernels; what loads it must `import fastops` first. `run_decompositions(fastops.decompositions())`
    makes it one of PyTorch's ops again. torch.onnx.export of a model always writes PyTorch's ops.

    Raises: what the block raises. Source: fastops' own.

    >>> model = nn.Sequential(nn.Linear(4, 2))
    >>> report = fastops.replace_(model)
    >>> with fastops.export_kernels():
    ...     program = torch.export.export(model, (torch.ones(1, 4),))
    >>> "fastops." in program.graph_module.code
    True
    """
    global _kept
    before, _kept = _kept, True
    try:
        yield
    finally:
        _kept = before


def exports_aten() -> bool:
    """Whether this call is being exported, to a program of PyTorch's own ops."""
    # Not is_exporting(), which older Dynamos take for true under torch.compile as well.
    return torch.compiler._is_exporting_flag and (not _kept or torch.onnx.is_in_onnx_export())
