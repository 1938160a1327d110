"""torch.nn's modules on fastops' kernels: torch.nn's names and signatures; Linear, convolutions and norms plus
activation=. Besides, blocks of several of them that are one call: MLP, ConvMaxPool2d, Conv2dNormActivation ...
"""

import functools

import torch.fx

from fastops._modules import public
from fastops.nn._fused import Fused, made_by_a_tool

# The `__all__` of each module here. Type checkers and editors read __init__.pyi, which a build writes.
_public = public(__name__)
globals().update(_public)
__all__ = list(_public)
# Those that torch.nn has too; the others are blocks.
LAYERS = [name for name in __all__ if hasattr(torch.nn, name)]


def _are_leaves_of_fx() -> None:
    """torch.fx calls a module of torch.nn and traces through any other: our layers are called, with hooks, as well.

    A tracer that overrides is_leaf_module has the last word.
    """
    ours = (*(_public[name] for name in LAYERS), Fused)
    theirs = torch.fx.Tracer.is_leaf_module

    @functools.wraps(theirs)
    def is_leaf_module(self: torch.fx.Tracer, m: torch.nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, ours) and (type(m).__module__.startswith("fastops.nn.") or made_by_a_tool(type(m))):
            return True
        return theirs(self, m, module_qualified_name)

    torch.fx.Tracer.is_leaf_module = is_leaf_module


_are_leaves_of_fx()
