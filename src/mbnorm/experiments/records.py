"""Files of records, one JSON object a line, to which a run that was killed can go on adding."""

import json
import os
import platform
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import torch

from mbnorm import __version__

Record: TypeAlias = dict[str, Any]
Parsed = TypeVar("Parsed")


def read(path: Path, parse: Callable[[Record], Parsed]) -> list[Parsed]:
    """Return what ``parse`` makes of each record in a file, nothing if there is no file.

    What follows the last line end was being written when its process died: it is removed from the file, so
    that the next record starts a line. Where ``parse`` returns pairs of key and value, ``dict`` of the result
    has the newest value of each key.

    Raises:
        ValueError: a line is not an object, or ``parse`` raised a ValueError, KeyError or TypeError for it.
    """
    *lines, unfinished = path.read_bytes().split(b"\n") if path.exists() else [b""]
    parsed = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError(f"expected an object, got {record!r:.40}")
            parsed.append(parse(record))
        except (ValueError, KeyError, TypeError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else error
            raise ValueError(f"{path}, line {number} is not a result: {reason}") from error
    if unfinished:
        os.truncate(path, path.stat().st_size - len(unfinished))
    return parsed


def append(path: Path, record: Record) -> None:
    """Add a record to a file; it is on disk on return.

    Raises:
        ValueError: a number is not finite, which JSON has no word for.
    """
    _write(path, "a", [record])


def write(path: Path, records: Iterable[Record]) -> None:
    """Replace a file; at no moment is there none or half of one.

    Raises:
        ValueError: a number is not finite, which JSON has no word for.
    """
    unfinished = path.with_name(f"{path.name}.unfinished")
    _write(unfinished, "w", records)
    os.replace(unfinished, path)


def versions() -> Record:
    """Return the versions of torch and mbnorm that run here, which each record of a measurement has."""
    return {"torch": torch.__version__, "mbnorm": __version__}


def processor() -> str:
    """Return the name of this machine's processor."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def check_versions(path: Path, records: Iterable[Record]) -> None:
    """Refuse records that another torch or mbnorm has measured, so that no table mixes them.

    Raises:
        ValueError: a record in ``path`` has other versions, or none.
    """
    here = _named(versions())
    for there in map(_named, records):
        if there != here:
            raise ValueError(f"{path} has rows of {there}, and this is {here}: give another folder")


def _named(record: Record) -> str:
    return " and ".join(
        f"{package} {record[package]}" if record.get(package) else f"an unknown {package}"
        for package in versions()
    )


def _write(path: Path, mode: str, records: Iterable[Record]) -> None:
    lines = "".join(json.dumps(record, allow_nan=False) + "\n" for record in records)
    with path.open(mode, encoding="utf-8") as file:
        file.write(lines)
        file.flush()
        os.fsync(file.fileno())
