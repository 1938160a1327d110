"""The ops' FLOP formulas for torch.utils.flop_counter, which imports triton where there is one: they wait for whoever
wants to count to import it.
"""

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch

_MODULE = "torch.utils.flop_counter"
_formulas: dict[torch._ops.OpOverloadPacket, Callable[..., int]] = {}


def register_flops(op: torch._ops.OpOverloadPacket, formula: Callable[..., int]) -> None:
    """formula: the FLOPs from the op's arguments with shapes in the place of tensors, and out_shape."""
    if _MODULE in sys.modules:
        sys.modules[_MODULE].register_flop_formula(op)(formula)
        return
    if not _formulas:
        sys.meta_path.insert(0, _AfterImport())
    _formulas[op] = formula


class _AfterImport(importlib.abc.MetaPathFinder):
    """Registers what waits as soon as the module has been imported."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        if name != _MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            for op, formula in _formulas.items():
                module.register_flop_formula(op)(formula)

        spec.loader.exec_module = execute_and_register
        return spec
