"""Puts compiled CPU kernels into a wheel where MBNORM_KERNELS is 1; wheels are pure Python otherwise."""

import os
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class CompiledKernels(BuildHookInterface[Any]):
    """Compiles the kernels with torch's headers, for each set of instructions that is chosen at run time."""

    _folder: "tempfile.TemporaryDirectory[str] | None" = None

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Add the libraries to what the wheel holds, and name the platform in its file's name."""
        if version != "standard" or os.environ.get("MBNORM_KERNELS") != "1":
            return
        sys.path.insert(0, str(Path(self.root) / "src"))
        from mbnorm.backends import build, cpu, library

        self._folder = tempfile.TemporaryDirectory()
        folder = Path(self._folder.name)
        for name, flags in build.portable().items():
            target = folder / library.file_name(cpu.NAME, name)
            build.compile_library(cpu.SOURCES, target, flags)
            build_data["force_include"][str(target)] = f"mbnorm/backends/{library.SHIPPED.name}/{target.name}"
        build_data["pure_python"] = False
        # Python's version does not matter: the library is torch's alone
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Delete what has been packed."""
        if self._folder is not None:
            self._folder.cleanup()
