"""The tables of a run on a GPU, from its rows alone."""

import math

from mbnorm.experiments.bench.gpu_layers import LARGE
from mbnorm.experiments.bench.rows import Row, geometric_mean

BASE = "batch_norm"
MOVED = 8
"""Tensors of the input's size that the kernels of a forward and backward read or write, caches or not.

The input must have been read for its statistics before the first output can be written, and both gradients
before the first input gradient.
"""
LEAST = 5
"""How many of them a cache that holds all of it would leave to the memory."""


def table(rows: list[Row]) -> str:
    """Return the Markdown tables of errors, layers, steps and of what did not run."""
    row = rows[0]
    lines = [
        f"{row.get('device')}, torch {row['torch']}, triton {row.get('triton')}, CUDA {row.get('cuda')}, "
        f"mbnorm {row['mbnorm']}. Written by `python -m mbnorm.experiments.bench.gpu`.",
        "",
    ]
    parts = {"error": _errors, "layer": _layers, "step": _steps, "cut": _cuts, "failure": _failures}
    for kind, part in parts.items():
        if chosen := [r for r in rows if r["kind"] == kind]:
            lines += [*part(chosen), ""]
    return "\n".join(lines)


def _errors(rows: list[Row]) -> list[str]:
    lines = ["Largest error against float64, in units of the largest value.", ""]
    lines += ["| backend or layer, dtype | y | dx | dw | db | state |", "| --- |" + " ---: |" * 5]
    for backend, dtype in dict.fromkeys((r["backend"], r["dtype"]) for r in rows):
        here = [r for r in rows if (r["backend"], r["dtype"]) == (backend, dtype)]
        found = ([r[name] for r in here if name in r] for name in ("y", "dx", "dw", "db", "state"))
        worst = (f"{_largest(values):.1e}" if values else "-" for values in found)
        lines.append(f"| {backend}, {dtype} | " + " | ".join(worst) + " |")
    return lines


def _largest(values: list[float]) -> float:
    # NaN has no place in an order, and is the worst there is
    return max(values, key=lambda v: math.inf if math.isnan(v) else v)


def _layers(rows: list[Row]) -> list[str]:
    times: dict[tuple[object, ...], dict[str, Row]] = {}
    for row in rows:
        case = (row["threads"], row["dtype"], row["layout"], *row["shape"])
        times.setdefault(case, {}).setdefault(row["provider"], row)
    names = [n for n in dict.fromkeys(r["provider"] for r in rows) if n != BASE]
    lines = [
        "Time of forward and backward over that of `nn.BatchNorm2d`: geometric mean over ResNet-50's shapes "
        "(worst shape); the most memory over its; and the share of a copy's rate that `momentum` reaches on "
        f"inputs of over 100 MB, counting the {MOVED} tensors that are read or written (the {LEAST} that "
        "could not be spared if caches held them).",
        "",
        "| launched, batch, dtype, layout | " + " | ".join(names) + " | peak | share of copy |",
        "| --- |" + " ---: |" * (len(names) + 2),
    ]
    groups = dict.fromkeys((r["threads"], r["shape"][0], r["dtype"], r["layout"]) for r in rows)
    for launched, batch, dtype, layout in groups:
        here = [t for case, t in times.items() if case[:4] == (launched, dtype, layout, batch) and BASE in t]
        cells = []
        for name in names:
            ratios = [t[name]["median_s"] / t[BASE]["median_s"] for t in here if name in t]
            cells.append(f"{geometric_mean(ratios):.2f} ({max(ratios):.2f})" if ratios else "-")
        ours = [(t["momentum"], t[BASE]) for t in here if "momentum" in t]
        peak = max((m["peak_bytes"] / b["peak_bytes"] for m, b in ours), default=None)
        shares = [share_of_copy(m) for m, _ in ours if m["bytes"] > LARGE]
        cells += [f"{peak:.3f}" if peak else "-", _shares(shares)]
        lines.append(f"| {launched}, {batch}, {dtype}, {layout} | " + " | ".join(cells) + " |")
    return lines


def share_of_copy(row: Row) -> float:
    """Return the rate at which a layer reads and writes, over that of a copy."""
    return float(MOVED * row["bytes"] / row["median_s"] / row["copy_bytes_per_s"])


def _shares(found: list[float]) -> str:
    return f"{min(found):.2f} ({min(found) * LEAST / MOVED:.2f})" if found else "-"


def _steps(rows: list[Row]) -> list[str]:
    lines = [
        "Training steps of a ResNet-50 at batch 2 and 224 pixels, in turns with its own batch norms.",
        "",
    ]
    lines += [
        "| launched, norm | ms | ms of batch norm | over it | peak over its |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        times = (
            f"{1e3 * row['median_s']:.2f} | {1e3 * row['base_s']:.2f} | {row['median_s'] / row['base_s']:.3f}"
        )
        peak = f"{row['peak_bytes'] / row['base_peak_bytes']:.3f}"
        lines.append(f"| {row['threads']}, {row['method']} | {times} | {peak} |")
    return lines


def _cuts(rows: list[Row]) -> list[str]:
    names = list(dict.fromkeys(r["cut"] for r in rows))
    lines = [
        "Microseconds of `momentum`, forward and backward in a CUDA graph, cut into programs in other ways.",
        "",
        "| shape, layout | " + " | ".join(names) + " |",
        "| --- |" + " ---: |" * len(names),
    ]
    for shape, layout in dict.fromkeys((tuple(r["shape"]), r["layout"]) for r in rows):
        here = {r["cut"]: r["median_s"] for r in rows if (tuple(r["shape"]), r["layout"]) == (shape, layout)}
        cells = (f"{1e6 * here[name]:.1f}" if name in here else "-" for name in names)
        lines.append(f"| {'x'.join(map(str, shape))}, {layout} | " + " | ".join(cells) + " |")
    return lines


def _failures(rows: list[Row]) -> list[str]:
    return ["Did not run:", "", *(f"- {r['of']} {r['what']}: {r['why']}" for r in rows)]
