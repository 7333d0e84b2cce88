"""What was found in files, so that a second start does not decode them all again."""

import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any, TypeVar

from mbnorm.backends.library import cache_folder
from mbnorm.experiments.progress import shown

Item = TypeVar("Item")
Result = TypeVar("Result")


class Findings:
    """Facts about files, kept in the user's cache folder for as long as their sizes and times stay.

    A cache that cannot be read or written is as good as an empty one.

    Args:
        place: the source that the files are of.
        what: what the facts are.
    """

    def __init__(self, place: str | Path, what: str) -> None:
        name = blake2b(f"{what} {Path(place).resolve()}".encode(), digest_size=16).hexdigest()
        self._path: Path | None = None
        self._facts: dict[str, Any] = {}
        # there may be no home folder
        with suppress(OSError, RuntimeError):
            self._path = cache_folder() / "findings" / f"{name}.json"
        with suppress(OSError, ValueError):
            found = json.loads(self._path.read_bytes()) if self._path else {}
            self._facts = found if isinstance(found, dict) else {}

    def get(self, files: Sequence[Path]) -> Any:
        """Return what was found in these very files, None if nothing is known of them."""
        known = self._facts.get(str(files[0])) if files else None
        if isinstance(known, dict) and known.get("files") == _stamps(files):
            return known.get("fact")
        return None

    def add(self, files: Sequence[Path], fact: Any) -> None:
        """Note what was found; ``fact`` is what JSON can hold."""
        if files:
            self._facts[str(files[0])] = {"files": _stamps(files), "fact": fact}

    def save(self) -> None:
        """Write what is noted to the cache folder."""
        if self._path is None:
            return
        unfinished = self._path.with_suffix(f".{os.getpid()}")
        with suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            unfinished.write_text(json.dumps(self._facts), encoding="utf-8")
            os.replace(unfinished, self._path)


def found_in(
    files: Sequence[Path], look: Callable[[Path], Result], place: str | Path, what: str
) -> list[Result]:
    """Return what ``look`` finds in each file, looking only at those that are new or have changed.

    Args:
        files: what to look at.
        look: returns what JSON can hold, and not None.
        place: the source that the files are of.
        what: what is looked for.
    """
    findings = Findings(place, what)
    facts = [findings.get([file]) for file in files]
    unknown = [index for index, fact in enumerate(facts) if fact is None]
    if not unknown:
        return facts

    def note(index: int) -> None:
        facts[index] = look(files[index])
        findings.add([files[index]], facts[index])

    try:
        in_threads(note, unknown)
    finally:
        findings.save()
    return facts


def in_threads(function: Callable[[Item], object], items: Sequence[Item]) -> None:
    """Call a function with each item, and show how far it is; what the first one raises ends it all."""
    # decoding leaves the interpreter to others
    pool = ThreadPoolExecutor()
    try:
        for _ in shown(pool.map(function, items), len(items), "looking at files"):
            pass
    finally:
        pool.shutdown(cancel_futures=True)


def _stamps(files: Sequence[Path]) -> list[list[Any]]:
    found = [(str(file), file.stat()) for file in files]
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in found]
