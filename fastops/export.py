"""What torch.export makes of fastops' ops: fastops.export_kernels(), decompositions() and op_library()."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch._ops import OpOverload

from fastops._traced import traced_as_written
from fastops.ops import DECOMPOSITIONS

_kept = False


@contextmanager
def export_kernels() -> Iterator[None]:
    """Inside the block, torch.export keeps fastops' ops in the program.

    Outside of it an exported program holds PyTorch's own ops, so that it runs where fastops is not installed, and tools
    that take such programs know its ops. A program with fastops' ops, and an AOTInductor package made of one, runs
    fastops' kernels; what loads it must `import fastops` first, or in C++ load `fastops.op_library()`.
    `run_decompositions(fastops.decompositions())` makes it one of PyTorch's ops again. torch.onnx.export of a model
    always writes PyTorch's ops.

    Raises: what the block raises. Source: fastops' own.

    >>> model = nn.Sequential(nn.Linear(4, 2))
    >>> report = fastops.replace_(model)
    >>> with fastops.export_kernels():
    ...     program = torch.export.export(model, (torch.ones(1, 4),))
    >>> "fastops." in program.graph_module.code
    True
    """
    global _kept
    if _kept:
        yield
        return
    _kept = True
    try:
        with traced_as_written():
            yield
    finally:
        _kept = False


def decompositions() -> dict[OpOverload, Callable[..., Any]]:
    """A table that rewrites the ops of `torch.ops.fastops` in a forward pass as PyTorch's own ops.

    Returns:
        A dict for `run_decompositions` of an exported program.

    Raises nothing. Source: the tables of torch.export.

    >>> model = nn.Sequential(nn.Linear(4, 2), nn.ReLU())
    >>> report = fastops.replace_(model)
    >>> with fastops.export_kernels():
    ...     program = torch.export.export(model, (torch.ones(1, 4),))
    >>> plain = program.run_decompositions(fastops.decompositions())
    >>> "fastops." in program.graph_module.code, "fastops." in plain.graph_module.code
    (True, False)
    """
    return dict(DECOMPOSITIONS)


def op_library() -> str:
    """The path of the shared library with the ops of `torch.ops.fastops`, for programs without Python.

    A C++ program loads it by dlopen before it loads an AOTInductor package that was exported inside
    `fastops.export_kernels()`. It needs torch's libraries and nothing of Python; examples/aotinductor has such a
    program. A process that has imported fastops has the ops already and must not load it.

    Returns:
        The path of libfastops_torch.so, which needs libfastops_kernels.so beside it.

    Raises nothing. Source: fastops' own.

    >>> from pathlib import Path
    >>> Path(fastops.op_library()).name
    'libfastops_torch.so'
    """
    return str(Path(__file__).resolve().parent / "libfastops_torch.so")


def exports_aten() -> bool:
    """Whether this call is being exported, to a program of PyTorch's own ops."""
    # Not is_exporting(), which older Dynamos take for true under torch.compile as well.
    return torch.compiler._is_exporting_flag and (not _kept or torch.onnx.is_in_onnx_export())
