"""The measured rows, each with the machine and the versions, and the ratios computed from them."""

import json
import math
import os
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from mbnorm import __version__

Row = dict[str, Any]


def machine() -> Row:
    """Return what a row says of where it was measured."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "mbnorm": __version__,
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def write(path: Path, rows: Iterable[Row]) -> None:
    """Write rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read(path: Path) -> list[Row]:
    """Read rows back."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def failure(kind: str, what: str, error: Exception) -> Row:
    """Return the row of what did not run."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return {"kind": "failure", "of": kind, "what": what, "why": f"{type(error).__name__}: {reason}"}


def geometric_mean(values: Iterable[float]) -> float:
    """Return the geometric mean."""
    logarithms = [math.log(v) for v in values]
    return math.exp(sum(logarithms) / len(logarithms))


def ratios(rows: list[Row], provider: str, baseline: str, **where: Any) -> dict[tuple[Any, ...], float]:
    """Return the time of a provider over that of a baseline, by shape and threads, of the rows that match."""
    times: dict[tuple[Any, ...], dict[str, float]] = {}
    for row in rows:
        if row["kind"] == "layer" and all(row[key] == value for key, value in where.items()):
            key = (tuple(row["shape"]), row["threads"])
            times.setdefault(key, {})[row["provider"]] = row["median_s"]
    return {k: t[provider] / t[baseline] for k, t in times.items() if provider in t and baseline in t}
