"""Checks the library against the oldest torch it supports, where that cannot be installed: `make oldest`.

Python's side is checked by mypy with that torch's own sources as types, and the kernels by a C++ compiler
with its headers. Both come from a wheel on PyPI; the one for macOS is the smallest, and is only read.
"""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

from mbnorm.backends import build, cpu

ROOT = Path(__file__).parent.parent
OLDEST = "2.10.0"
FOLDER = ROOT / ".venv" / f"torch-{OLDEST}"
PLATFORM = ["--platform", "macosx_11_0_arm64", "--python-version", "3.11", "--only-binary", ":all:"]


def fetch() -> None:
    """Download the wheel and unpack what is to be read."""
    if FOLDER.exists():
        return
    wheels = FOLDER.with_suffix(".wheel")
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *PLATFORM]
    subprocess.run([*download, "--dest", str(wheels), f"torch=={OLDEST}"], check=True)
    (wheel,) = wheels.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        read = (".py", ".pyi", "py.typed", ".h", ".hpp")
        file.extractall(FOLDER, [name for name in file.namelist() if name.endswith(read)])
    wheel.unlink()


def check_types() -> None:
    """Let mypy resolve every attribute and every call of torch's."""
    # not strict: that is about this torch's own annotations, and `make lint` is for ours
    options = ["--config-file=", "--follow-imports=silent", "--ignore-missing-imports"]
    command = [sys.executable, "-m", "mypy", *options, "--exclude", "experiments", "src/mbnorm"]
    environment = os.environ | {"MYPYPATH": str(FOLDER)}
    subprocess.run(command, cwd=ROOT, env=environment, check=True)


def check_kernels() -> None:
    """Let the compiler read the kernels with that torch's headers."""
    flags = [*build.FLAGS, "-fsyntax-only", f"-I{FOLDER / 'torch' / 'include'}"]
    for source in cpu.SOURCES:
        if source.suffix == ".cpp":
            subprocess.run([*build.compiler(), *flags, str(source)], check=True)
            print(f"{source.name}: compiles")


if __name__ == "__main__":
    fetch()
    check_kernels()
    check_types()
