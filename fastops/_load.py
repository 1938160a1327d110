"""Imports the compiled extension, or says why it cannot be and what to run."""

import importlib.machinery
import sys
from pathlib import Path
from types import ModuleType

_FOLDER = Path(__file__).resolve().parent
_FROM_CHECKOUT = (_FOLDER.parent / "build_native.py").exists()
_REBUILD = (
    f"    cd {_FOLDER.parent}\n    {sys.executable} -m pip install --no-deps --force-reinstall --editable ."
    if _FROM_CHECKOUT
    else f"    {sys.executable} -m pip install --no-deps --force-reinstall PATH_TO_THE_SOURCES_OF_FASTOPS"
)


def _missing() -> str:
    python = f"Python {sys.version_info.major}.{sys.version_info.minor}"
    others = ", ".join(sorted(path.name for path in _FOLDER.glob("_C*.so")))
    found = f" (what is there was built for another Python: {others})" if others else ""
    message = f"fastops has no compiled extension for {python} in {_FOLDER}{found}. To build it, run:\n{_REBUILD}"
    if _FROM_CHECKOUT:
        message += "\nThis is the source folder; an installed fastops is hidden by it: start Python in another folder."
    return message


def load() -> ModuleType:
    """Returns fastops._C.

    Raises:
        ImportError: torch is missing, the extension is missing, or it was built for another torch than the one that
        runs.
    """
    try:
        import torch
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        message = (
            f"fastops needs torch, and this Python has none. Run:\n    {sys.executable} -m pip install 'torch>=2.11'"
        )
        raise ImportError(message) from None

    if not any((_FOLDER / f"_C{suffix}").exists() for suffix in importlib.machinery.EXTENSION_SUFFIXES):
        raise ImportError(_missing())

    from fastops._build import TORCH_VERSION

    versions = f"fastops was built for torch {TORCH_VERSION}, and this is torch {torch.__version__}"
    if TORCH_VERSION.split(".")[:2] != str(torch.__version__).split(".")[:2]:
        raise ImportError(f"{versions}. To build it for this one, run:\n{_REBUILD}")
    try:
        from fastops import _C
    except ImportError as error:
        raise ImportError(
            f"fastops' extension cannot be loaded: {error}\n{versions}. Build it anew:\n{_REBUILD}"
        ) from error
    return _C
