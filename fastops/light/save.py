"""fastops.light.save: a model as a file that runs without PyTorch."""

import inspect
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastops
from fastops.light._graph import Graph, described, fuse, joined, write
from fastops.light._qat_layers import FakeQuantized
from fastops.light._recording import CannotSave, recorded

__all__ = ["Saved", "save"]


@dataclass(frozen=True)
class Saved:
    """What save returns. str() is a line.

    Attributes:
        path: of the file.
        bytes: its size.
        nodes: how many calls of kernels and changes of shape it has.
        inputs: the shape of each input by its name; "any" is a size that is free.
        outputs: the names of the outputs.
    """

    path: Path
    bytes: int
    nodes: int
    inputs: dict[str, tuple[Any, ...]]
    outputs: tuple[str, ...]

    def __str__(self) -> str:
        shapes = ", ".join(f"{name} ({', '.join(map(str, shape))})" for name, shape in self.inputs.items())
        return f"{self.path}: {self.bytes} bytes, {self.nodes} calls, {shapes} -> {', '.join(self.outputs)}"


def save(model: nn.Module, path: str | os.PathLike[str], *inputs: Tensor) -> Saved:
    """Writes a file that runs the model without PyTorch: by `fastops-run`, the package fastops_light, C or C++.

    The model is frozen first (fastops.freeze): batch norms become part of the layers before them, layers take their
    activations. Then it is called with the inputs, and what it computes is recorded; what its forward decides in Python
    is decided for good. It is called twice more with other batches: where only sizes that follow the first dimension of
    the inputs differ, the file takes batches of any size, else that of `inputs`.

    Args:
        model: any module in float32, bfloat16 or float16, quantized layers of fastops.light among them. It stays as it
            is.
        path: of the file; by custom it ends in .fops. One that is there is replaced, or left if the model cannot be
            saved.
        inputs: an example of each tensor that the model is called with.

    Returns:
        What was written: its size, and the shapes that it takes. Inputs and outputs of bfloat16 are float32 in the
        file. Outputs that are a tuple, list or dict of tensors keep their order, and have their keys as names.

    Raises:
        TypeError: model is no torch.nn.Module, an input no Tensor, or path no path.
        ValueError: the model has a layer or calls a function that the run time has not; the message names both. Or
            there is no input, or one on a GPU; the folder of path does not exist; a layer is one of prepare_qat_.

    Source: the recording is that of torch.utils._python_dispatch; the format is described in docs/light-runtime.md.

    >>> from fastops import light
    >>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    >>> light.save(model, "model.fops", torch.randn(1, 64)).inputs
    {'input': ('any', 64)}
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"save: model must be a torch.nn.Module, got {type(model).__name__}")
    for one in inputs:
        if not isinstance(one, Tensor):
            raise TypeError(f"save: inputs must be Tensors, got {type(one).__name__}")
    if not inputs or any(one.device.type != "cpu" for one in inputs):
        got = f"one on {inputs[0].device}" if inputs else "none"
        raise ValueError(f"save: inputs must be examples of what the model is called with, on the CPU, got {got}")
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"save: path must be that of a file, got {type(path).__name__}")
    if not Path(path).parent.is_dir() or Path(path).is_dir():
        what = "is a folder" if Path(path).is_dir() else "is in a folder that does not exist"
        raise ValueError(f"save: path must be that of a file in a folder that exists, got {str(path)!r}, which {what}")
    prepared = [name for name, module in model.named_modules() if isinstance(module, FakeQuantized)]
    if prepared:
        raise ValueError(
            f"save: {prepared[0]!r} of the model is prepared for training: light.convert_qat_ quantizes it"
        )
    names = _names(model, len(inputs))
    try:
        frozen = fastops.freeze(model).model
        graph = _recorded(frozen, dict(zip(names, (one.detach() for one in inputs), strict=True)))
    except CannotSave as error:
        raise ValueError(f"save: {type(model).__name__} cannot be saved: {error}") from None
    fuse(graph)
    graph.drop_unread()
    written = write(graph, path)
    return Saved(Path(path), written, len(graph.nodes), described(graph), tuple(name for name, _ in graph.outputs))


def _names(model: nn.Module, count: int) -> list[str]:
    """Those of forward's arguments."""
    try:
        parameters = list(inspect.signature(model.forward).parameters.values())
    except (TypeError, ValueError):
        parameters = []
    positional = [one.name for one in parameters if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]
    return [*positional, *(f"input{i}" for i in range(len(positional), count))][:count]


def _recorded(frozen: nn.Module, inputs: dict[str, Tensor]) -> Graph:
    # A forward may write to its inputs.
    graph = recorded(frozen, {name: one.clone() for name, one in inputs.items()})
    first = next(iter(inputs.values()))
    if first.dim() == 0 or len(first) == 0:
        return graph
    batch = len(first)
    follow = [name for name, one in inputs.items() if one.dim() > 0 and len(one) == batch]
    others = {}
    for size in (batch + 1, 2 * batch + 1):
        more = {name: torch.cat([one] * 3)[:size] if name in follow else one.clone() for name, one in inputs.items()}
        try:
            others[size] = recorded(frozen, more)
        except Exception:  # whatever a forward raises that is written for one batch
            return graph
    result = joined(graph, batch, others)
    if result is None:
        return graph
    for one in result.inputs:
        if one.name in follow:
            one.shape[0] = -1
    return result
