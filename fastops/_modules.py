"""The modules of a package, found where they lie: a new op's files are listed nowhere."""

import importlib
import pkgutil
import sys
from types import ModuleType
from typing import Any


def modules(package: str) -> list[ModuleType]:
    """The package's modules, imported, in alphabetical order."""
    names = sorted(found.name for found in pkgutil.iter_modules(sys.modules[package].__path__))
    return [importlib.import_module(f"{package}.{name}") for name in names]


def public(package: str) -> dict[str, Any]:
    """What the modules of the package name in their `__all__`, in alphabetical order."""
    found = {name: getattr(module, name) for module in modules(package) for name in getattr(module, "__all__", ())}
    return dict(sorted(found.items()))
