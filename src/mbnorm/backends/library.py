"""Finds compiled operators: in the wheel, in a cache, or by compiling them, once for a machine."""

import hashlib
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout  # torch needs it, too

from mbnorm.backends.build import (
    FLAGS,
    NATIVE,
    BuildError,
    NoCompilerError,
    compile_library,
    compiler,
    instructions,
    version_of,
)

SHIPPED = Path(__file__).with_name("shipped")
"""Where a wheel has compiled operators, if it has any."""


def load(name: str, sources: Sequence[Path]) -> None:
    """Load the operators of ``sources``, and compile them where neither wheel nor cache has them.

    One process compiles, others wait for it. A failure is remembered until the compiler, torch or the sources
    change. Says on stderr when a compilation begins and ends.

    Raises:
        BuildError: there is no compiler, it failed, or its output cannot be loaded.
    """
    if _loads(SHIPPED / file_name(name, instructions())):
        return
    try:
        _load_from(cache_folder(), name, sources)
    except OSError as error:
        _say(f"its CPU kernels cannot be kept ({error}): each process compiles them; set MBNORM_CACHE")
        # what is mapped stays so without its file
        with tempfile.TemporaryDirectory(prefix="mbnorm-") as private:
            _load_from(Path(private), name, sources)


def forget_failures() -> None:
    """Let the next `load` compile what could not be compiled before."""
    with suppress(OSError):
        for failure in cache_folder().glob("*.failed"):
            failure.unlink()


def file_name(name: str, instructions: str) -> str:
    """Return how a wheel calls the operators that are compiled for a set of instructions."""
    return f"{name}-{instructions}.so"


def cache_folder() -> Path:
    """Return where compiled operators are kept.

    Raises:
        OSError: there is no home, and no folder for this user among the temporary files.
    """
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
        # what is in there will be run
        if folder.stat().st_uid != os.getuid():
            raise PermissionError(f"{folder} is another user's") from None
        return folder


def _load_from(folder: Path, name: str, sources: Sequence[Path]) -> None:
    machine = _digest(torch.__version__, sys.platform, platform.machine(), _processor(), *FLAGS, *NATIVE)
    known = f"{name}-{machine}-{_digest(*(source.read_bytes() for source in sources))}"
    command = compiler()
    try:
        stem = f"{known}-{_digest(version_of(command), *command)}"
    except NoCompilerError:
        # a compiler that has gone may have left something
        if any(_loads(library) for library in folder.glob(f"{known}-*.so")):
            return
        raise
    target = folder / f"{stem}.so"
    if _loads(target):
        return
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(target.with_suffix(".lock")):
        # another process may have been first
        if not _loads(target):
            _build(sources, target)


def _build(sources: Sequence[Path], target: Path) -> None:
    failure = target.with_suffix(".failed")
    if failure.is_file():
        raise BuildError(f"{failure.read_text()} (remembered; `mbnorm build` tries again)")
    started = time.perf_counter()
    _say("compiling its CPU kernels, once for this machine; this takes some 20 seconds")
    try:
        compile_library(sources, target)
        _load_new(target)
    except BuildError as error:
        failure.write_text(str(error))
        raise
    _say(f"compiled them in {time.perf_counter() - started:.0f} s")


def _load_new(library: Path) -> None:
    try:
        _load_library(library)
    except OSError as error:
        library.unlink()
        raise BuildError(f"the compiled operators do not load: {_first_line(str(error))}") from error


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    lock = FileLock(path)
    try:
        # a wait of no time, which every version of filelock knows
        lock.acquire(timeout=0)
    except Timeout:
        _say("waiting for another process that compiles its CPU kernels")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _loads(library: Path) -> bool:
    # a file that does not load is a damaged one, or made for another system
    with suppress(OSError):
        if library.is_file():
            _load_library(library)
            return True
    return False


def _load_library(path: Path) -> None:
    load_library: Any = torch.ops.load_library
    load_library(str(path))


def _digest(*parts: str | bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else part)
        digest.update(b"\0")
    return digest.hexdigest()[:12]


def _processor() -> str:
    # home folders are shared between unlike machines, and native instructions are not portable
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return line
    return platform.processor()


def _say(line: str) -> None:
    print(f"mbnorm: {line}", file=sys.stderr, flush=True)


def _first_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[0]
