"""A mode and an environment that several tests need."""

import os
from pathlib import Path

from torch.utils._python_dispatch import TorchDispatchMode

_ROOT = Path(__file__).resolve().parent.parent
# For a process of its own that imports this checkout.
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(_ROOT), os.environ.get("PYTHONPATH", "")])}


class Through(TorchDispatchMode):
    """A mode that changes nothing, and so makes every call take the general door."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))
