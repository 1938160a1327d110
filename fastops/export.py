"""What torch.export makes of fastops' ops: fastops.export_kernels()."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_kept = False


@contextmanager
def export_kernels() -> Iterator[None]:
    """Inside the block, torch.export keeps fastops' ops in the program.

    Outside of it an exported program holds PyTorch's own ops, so that it runs where fastops is not installed, and every
    tool that takes such programs knows its ops. A program with fastops' ops, and an AOTInductor package made of one,
    runs fastops' kernels; what loads it must `import fastops` first. `run_decompositions(fastops.decompositions())`
    makes it one of PyTorch's ops again. ONNX always gets PyTorch's ops.

    Example:
        >>> with fastops.export_kernels():
        ...     program = torch.export.export(model, (x,))
    """
    global _kept
    before, _kept = _kept, True
    try:
        yield
    finally:
        _kept = before


def exports_aten() -> bool:
    """Whether this call is being exported, to a program of PyTorch's own ops."""
    # Not is_exporting(), which Dynamo took for true under torch.compile as well until torch 2.12.
    return torch.compiler._is_exporting_flag and (not _kept or torch.onnx.is_in_onnx_export())
