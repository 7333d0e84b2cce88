"""Compiles C++ operators: torch's stable ABI, no build system."""

import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from os import environ
from pathlib import Path

import torch

FLAGS = (
    "-std=c++20",
    "-O3",
    # errno and traps of floating point would keep loops from being vectorized; neither changes a result
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fPIC",
    "-fvisibility=hidden",
    "-w",
    "-Wno-psabi",
    # torch 2.10, the oldest that the library runs on
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
)
# Apple's compilers know their own processors by the second name alone; not tested on a Mac
NATIVE = (
    ("-mcpu=native",) if sys.platform == "darwin" and platform.machine() == "arm64" else ("-march=native",)
)
"""For the instructions of this machine, whatever they are."""
COMPILERS = ("c++", "g++", "clang++")
SECONDS = 300
"""How long a compiler may take."""


class BuildError(RuntimeError):
    """The operators could not be compiled or loaded; the message is one line that says why."""


class NoCompilerError(BuildError):
    """There is no C++ compiler."""


def portable() -> dict[str, tuple[str, ...]]:
    """Return the flags for each of the names that `instructions` may return on this kind of processor."""
    flags: dict[str, tuple[str, ...]] = {"default": ()}
    if platform.machine() == "x86_64":
        # as torch's own kernels of that name
        flags["avx2"] = ("-mavx2", "-mfma", "-mf16c")
    return flags


def instructions() -> str:
    """Return the name of the most instructions that compiled wheels know and this processor has."""
    # vectors of ours are no longer
    return "avx2" if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512") else "default"


def compiler() -> list[str]:
    """Return the command of the C++ compiler: ``$CXX``, or the first of `COMPILERS` that is there."""
    found = (name for name in COMPILERS if shutil.which(name))
    return shlex.split(environ.get("CXX", "")) or [next(found, COMPILERS[0])]


def version_of(command: list[str]) -> str:
    """Return what a compiler says of itself.

    Raises:
        NoCompilerError: it does not run.
        BuildError: it says nothing.
    """
    return _run([*command, "--version"])


def compile_library(sources: Sequence[Path], target: Path, machine: Sequence[str] = NATIVE) -> None:
    """Compile ``sources`` into ``target``, which appears at once, or not at all.

    Args:
        sources: C++ files and their headers.
        target: the library; its folder exists.
        machine: flags for the processor that it will run on.

    Raises:
        NoCompilerError: there is no compiler.
        BuildError: it failed.
        OSError: the folder cannot be written.
    """
    command, root = compiler(), Path(torch.__file__).parent
    units = [source for source in sources if source.suffix == ".cpp"]
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".build-") as folder:
        objects = [str(Path(folder) / f"{source.stem}.o") for source in units]
        compilations = [
            [*command, *FLAGS, *machine, f"-I{root / 'include'}", "-c", str(source), "-o", output]
            for source, output in zip(units, objects, strict=True)
        ]
        _run(*compilations)
        library = Path(folder) / target.name
        symbols = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-s", "-ltorch_cpu"]
        _run([*command, "-shared", *objects, f"-L{root / 'lib'}", *symbols, "-o", str(library)])
        library.replace(target)


def _run(*commands: list[str]) -> str:
    """Run commands side by side and return what the last one printed."""
    running = []
    try:
        for command in commands:
            running.append(
                subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            )
    except OSError as error:
        for process in running:
            process.kill()
        raise NoCompilerError(
            f"no C++ compiler: {shlex.join(commands[0][:1])!s} does not run ({error.strerror}); "
            "install g++ or clang++, or set CXX"
        ) from error
    try:
        outputs = [process.communicate(timeout=SECONDS)[0] for process in running]
    except subprocess.TimeoutExpired as error:
        for process in running:
            process.kill()
        raise BuildError(f"the C++ compiler took more than {SECONDS} seconds") from error
    for process, output in zip(running, outputs, strict=True):
        if process.returncode:
            raise BuildError(f"the C++ compiler failed: {_first_error(output)}")
    return outputs[-1]


def _first_error(output: str) -> str:
    lines = output.strip().splitlines() or ["without a word"]
    return next((line for line in lines if "error" in line.lower()), lines[0]).strip()
