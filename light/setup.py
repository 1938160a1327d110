"""Builds the wheel of fastops-light from the sources of fastops, below whose folder this one lies."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import build_native  # noqa: E402


class WithLibrary(build_py):
    """Puts the library and the command beside the modules."""

    def run(self) -> None:
        super().run()
        prefix = ROOT / "build" / "light"
        build_native.build_runtime(prefix)
        package = Path(self.build_lib) / "fastops_light"
        for path in (prefix / "lib" / build_native.RUN_LIBRARY, prefix / "bin" / build_native.RUN_COMMAND):
            shutil.copy2(path, package / path.name)


class ForThisProcessor(bdist_wheel):
    """A wheel for every Python, as nothing in it is compiled against one."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = False

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    version=re.search(r'"(.+)"', (ROOT / "fastops" / "_version.py").read_text())[1],
    cmdclass={"build_py": WithLibrary, "bdist_wheel": ForThisProcessor},
)
