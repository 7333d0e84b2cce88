"""The measured rows as JSON lines, each with the machine and the versions, and ratios of them."""

import json
import math
import os
import platform
import subprocess
import traceback
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import torch

from mbnorm.experiments.records import processor, versions
from mbnorm.functional import backend_for

Row = dict[str, Any]
ROOT = Path(__file__).parent.parent
LAST_CHARACTERS = 3000
"""What a row keeps of a traceback."""


def machine() -> Row:
    """Return what a row says of where it was measured, and of which code."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "system": platform.system(),
        "python": platform.python_version(),
        **versions(),
        "commit": commit(ROOT),
        # what layers run on that name no backend
        "backend": backend_for(torch.empty(1, 1)),
    }


@cache
def commit(root: Path) -> str | None:
    """Return the short commit of the clone at ``root``, with "+" if its files have changed since.

    It is None where there is no clone. The first call decides: the code that runs was loaded about then.
    """
    if not (root / ".git").exists():
        return None
    # without tags it describes the tree by its commit
    describe = ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        found = subprocess.run(describe, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


def caption(name: str, rows: list[Row]) -> str:
    """Return where the rows of a benchmark were measured, and by which command."""
    row = rows[0]
    backend = f", backend {row['backend']} on the CPU" if "backend" in row else ""
    return (
        f"{row['processor']}, {row['cores']} cores, torch {row['torch']}, mbnorm {row['mbnorm']}{backend}. "
        f"Written by `python -m benchmarks {name}`."
    )


def write(path: Path, rows: Iterable[Row]) -> None:
    """Write rows as JSON lines."""
    path.write_text("".join(map(_line, rows)), encoding="utf-8")


def append(path: Path, row: Row) -> None:
    """Add a row, so that a run that dies has lost none."""
    with path.open("a", encoding="utf-8") as file:
        file.write(_line(row))


def _line(row: Row) -> str:
    return json.dumps(row) + "\n"


def read(path: Path) -> list[Row]:
    """Read rows back."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def failure(kind: str, what: str, error: Exception) -> Row:
    """Return the row of what did not run."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    lines = "".join(traceback.format_exception(error))
    return {
        "kind": "failure",
        "of": kind,
        "what": what,
        "why": f"{type(error).__name__}: {reason}",
        "traceback": lines[-LAST_CHARACTERS:],
    }


def failures(rows: list[Row]) -> list[str]:
    """Return the paragraphs of a page that say what did not run."""
    lines = [f"- {r['of']} {r['what']}: {r['why']}" for r in rows if r["kind"] == "failure"]
    return ["Did not run:", "\n".join(lines)] if lines else []


def geometric_mean(values: Iterable[float]) -> float:
    """Return the geometric mean."""
    logarithms = [math.log(v) for v in values]
    return math.exp(sum(logarithms) / len(logarithms))


def ratios(rows: list[Row], provider: str, baseline: str, **where: Any) -> dict[tuple[Any, ...], float]:
    """Return the time of a layer over that of another, by shape and how they ran, of the rows that match."""
    times: dict[tuple[Any, ...], dict[str, float]] = {}
    for row in rows:
        if row["kind"] == "layer" and all(row[key] == value for key, value in where.items()):
            key = (tuple(row["shape"]), row["how"])
            times.setdefault(key, {})[row["provider"]] = row["median_s"]
    return {k: t[provider] / t[baseline] for k, t in times.items() if provider in t and baseline in t}
