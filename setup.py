"""Builds fastops._C against the torch of the environment that fastops is being installed into."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import site
import sys
import sysconfig
import zlib
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.egg_info import egg_info

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import build_native  # noqa: E402

MINIMUM_TORCH = (2, 11)


def find_torch() -> tuple[Path, str]:
    """The folder of the target environment's torch, and its version; found without importing it.

    Under build isolation pip runs the target environment's python with its packages hidden, so they are looked up where
    that python, or the environment that is active, keeps them.
    """
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        folders = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), site.getusersitepackages()]
        folders += site.getsitepackages()
        tag = f"python{sys.version_info.major}.{sys.version_info.minor}"
        for variable in ("VIRTUAL_ENV", "CONDA_PREFIX"):
            if variable in os.environ:
                folders.append(os.path.join(os.environ[variable], "lib", tag, "site-packages"))
        spec = importlib.machinery.PathFinder.find_spec("torch", folders)
    if spec is None or spec.origin is None:
        raise SystemExit(
            "fastops: this environment has no torch, and fastops is compiled against the torch it will run with. "
            "Run first:\n    pip install 'torch>=2.11'\nand then install fastops again."
        )
    folder = Path(spec.origin).parent
    values: dict = {}
    exec((folder / "version.py").read_text(), values)
    version = str(values["__version__"])
    if tuple(int(part) for part in version.split(".")[:2]) < MINIMUM_TORCH:
        raise SystemExit(
            f"fastops: this environment has torch {version}, and fastops needs 2.11 or newer. Run first:\n"
            "    pip install --upgrade 'torch>=2.11'\nand then install fastops again."
        )
    return folder, version


class BuildExtension(build_ext):
    """Leaves the compilation to build_native.py, and writes what was built into fastops/_build.py.

    For type checkers and editors it writes as well what is in the packages whose modules are found (_modules.py).
    """

    def build_extension(self, ext: Extension) -> None:
        torch, torch_version = find_torch()
        python_tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
        # Relative, so that a compiler cache serves every checkout that has its torch in the same place.
        place = os.path.relpath(torch, HERE).encode()
        result = Path(self.get_ext_fullpath(ext.name)).resolve()
        build_native.build_extension(
            result,
            torch,
            f"{python_tag}-torch-{torch_version}-{zlib.crc32(place):08x}",
            sysconfig.get_path("include"),
            self.distribution.get_version(),
            torch_version,
        )
        self._package = result.parent
        self._written = {"_build.py": f'"""Written by setup.py."""\n\nTORCH_VERSION = "{torch_version}"\n'}
        for package in ("functional", "nn"):
            names = sorted(
                path.stem for path in (HERE / "fastops" / package).glob("*.py") if "__all__" in path.read_text()
            )
            stars = "".join(f"from fastops.{package}.{name} import *\n" for name in names if name != "__init__")
            self._written[f"{package}/__init__.pyi"] = f"# Written by setup.py.\n{stars}"
        for name, text in self._written.items():
            (self._package / name).parent.mkdir(exist_ok=True)
            (self._package / name).write_text(text)

    def copy_extensions_to_source(self) -> None:
        super().copy_extensions_to_source()
        for name in (*self._written, *build_native.LIBRARIES, *build_native.RUN):
            self.copy_file(str(self._package / name), str(HERE / "fastops" / name))


class EggInfo(egg_info):
    """Of what is built: it runs with the minor version of torch that it is compiled against, and asks for that one.

    Where torch is missing, this says so before pip starts to download one that nothing was compiled against.
    """

    def run(self) -> None:
        if "sdist" not in self.distribution.commands:
            _, version = find_torch()
            only = [f"torch=={'.'.join(version.split('.')[:2])}.*"]
            self.distribution.install_requires = self.distribution.metadata.install_requires = only
        super().run()


setup(
    ext_modules=[Extension("fastops._C", sources=[])],
    cmdclass={"build_ext": BuildExtension, "egg_info": EggInfo},
)
