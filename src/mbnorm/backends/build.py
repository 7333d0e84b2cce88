"""Compiles C++ operators at first use into a cache, and loads them: torch's stable ABI, no build system."""

import hashlib
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

FLAGS = (
    "-std=c++20",
    "-O3",
    "-march=native",
    # errno and traps of floating point would keep loops from being vectorized; neither changes a result
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fPIC",
    "-fvisibility=hidden",
    "-w",
    # torch 2.10, the oldest that the library runs on
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
)
SECONDS = 300
"""How long a compiler may take."""


class BuildError(RuntimeError):
    """The operators could not be compiled or loaded; the message is one line that says why."""


def load(name: str, sources: list[Path]) -> None:
    """Load the operators of ``sources``, compiled on this machine now or before.

    Raises:
        BuildError: there is no compiler, it failed, or its output cannot be loaded.
    """
    command = compiler()
    file_name = f"{name}-{fingerprint(command, sources)}.so"
    cached = cache_folder() / file_name
    if cached.is_file():
        # a file that does not load is a damaged one: build it again
        with suppress(OSError):
            _load_library(str(cached))
            return
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        library = _build(command, sources, cached)
    except OSError:
        # left behind on purpose: it stays mapped as long as this process lives
        library = _build(command, sources, Path(tempfile.mkdtemp(prefix="mbnorm-")) / file_name)
    try:
        _load_library(str(library))
    except OSError as error:
        raise BuildError(f"the compiled operators do not load: {_first_line(str(error))}") from error


def cache_folder() -> Path:
    """Return where compiled operators are kept."""
    own = os.environ.get("MBNORM_CACHE")
    if own:
        return Path(own)
    shared = os.environ.get("XDG_CACHE_HOME")
    if shared:
        return Path(shared) / "mbnorm"
    try:
        return Path.home() / ".cache" / "mbnorm"
    except RuntimeError:
        # a user without a home, as containers have
        folder = Path(tempfile.gettempdir()) / f"mbnorm-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        # what is in there will be run: it must be nobody else's
        return folder if folder.stat().st_uid == os.getuid() else Path(tempfile.mkdtemp(prefix="mbnorm-"))


def compiler() -> list[str]:
    """Return the command of the C++ compiler: ``$CXX``, or ``c++``."""
    return shlex.split(os.environ.get("CXX", "")) or ["c++"]


def fingerprint(command: list[str], sources: list[Path]) -> str:
    """Return a name for what compiling ``sources`` on this machine gives.

    Raises:
        BuildError: there is no compiler.
    """
    version = _run([*command, "--version"])
    parts = [version, torch.__version__, sys.platform, platform.machine(), _processor(), *command, *FLAGS]
    digest = hashlib.sha256("\0".join(parts).encode())
    for source in sources:
        digest.update(source.read_bytes())
    return digest.hexdigest()[:24]


def _load_library(path: str) -> None:
    load_library: Any = torch.ops.load_library
    load_library(path)


def _processor() -> str:
    # home folders are shared between unlike machines, and -march=native is not portable
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return line
    return platform.processor()


def _build(command: list[str], sources: list[Path], target: Path) -> Path:
    """Compile ``sources`` into ``target``; whoever builds the same at the same time is not disturbed."""
    root = Path(torch.__file__).parent
    units = [source for source in sources if source.suffix == ".cpp"]
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".build-") as folder:
        objects = [str(Path(folder) / f"{source.stem}.o") for source in units]
        compilations = [
            [*command, *FLAGS, f"-I{root / 'include'}", "-c", str(source), "-o", output]
            for source, output in zip(units, objects, strict=True)
        ]
        _run(*compilations)
        library = str(Path(folder) / target.name)
        symbols = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-ltorch_cpu"]
        _run([*command, "-shared", *objects, f"-L{root / 'lib'}", *symbols, "-o", library])
        os.replace(library, target)
    return target


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
        raise BuildError(
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


def _first_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[0]
