"""Whether a run on a GPU has met the goals, from its rows alone: met, missed, or not measured."""

from collections.abc import Iterable, Iterator
from itertools import product

from mbnorm.experiments.bench.cases import RESNET50
from mbnorm.experiments.bench.gpu_check import CHECKPOINTED
from mbnorm.experiments.bench.gpu_layers import (
    BATCHES,
    COMPILED_SHAPES,
    LARGE,
    LAYOUTS,
    compiled_cases,
    gpu_cases,
)
from mbnorm.experiments.bench.gpu_report import BASE, share_of_copy
from mbnorm.experiments.bench.rows import Row, geometric_mean

LAYER, WORST_LAYER = 0.9, 1.1
SHARE_OF_COPY = 0.85
PEAK = 1.01
COMPILED = 1.05
STEPS = {("eager", ""): 1.00, ("eager", "+df"): 1.30, ("graph", ""): 1.00, ("graph", "+df"): 1.25}
"""A step over one with batch norm, by how it is launched and without or with Double-Forward."""
METHODS = ("momentum", "matched", "memorized")
LAYERS = ("momentum", "matched")
"""What is to be faster than batch norm: the memorized layer is not."""


def verdicts(rows: list[Row]) -> list[str]:
    """Return a line for each goal."""
    layers = [row for row in rows if row["kind"] == "layer"]
    steps = [row for row in rows if row["kind"] == "step"]
    return [
        "Goals:",
        "",
        *_auto(rows),
        *_numbers(rows),
        *_layers(layers),
        *_copies(layers),
        *_steps(steps),
        *_compiled(layers),
    ]


def _auto(rows: list[Row]) -> Iterator[str]:
    found = [row for row in rows if row["kind"] == "auto"]
    said = "".join(
        f": {row['backend']} in {row['seconds']:.0f} s {row['why_not_triton'] or ''}".rstrip()
        for row in found
    )
    yield _line(
        f"triton where no backend is asked for{said}", found[0]["backend"] == "triton" if found else None
    )


def _numbers(rows: list[Row]) -> Iterator[str]:
    for name in ("triton", *METHODS, *(CHECKPOINTED + name for name in METHODS)):
        found = [row for row in rows if row["kind"] == "error" and row["backend"] == name]
        wrong = [
            row
            for row in rows
            if row["kind"] == "failure" and row["of"] == "check" and row["what"].startswith(f"{name} on ")
        ]
        what = f"numbers of {name}: {len(found)} cases, {len(wrong)} of them wrong or not run"
        yield _line(what, None if not found else not wrong)


def _layers(rows: list[Row]) -> Iterator[str]:
    groups = product(LAYERS, ("eager", "graph"), BATCHES, ("float32", "bfloat16"), LAYOUTS)
    for name, launched, batch, dtype, layout in groups:
        here = [
            row
            for row in rows
            if (row["threads"], row["dtype"], row["layout"]) == (launched, dtype, layout)
            and row["shape"][0] == batch
        ]
        ratios = _ratios(here, name, BASE)
        what = f"{name} over batch norm, {launched}, batch {batch}, {dtype}, {layout}"
        yield _at_most(f"{what}: mean", _mean(ratios), LAYER, len(ratios), len(RESNET50))
        yield _at_most(f"{what}: worst", _most(ratios), WORST_LAYER, len(ratios), len(RESNET50))
    for name in LAYERS:
        pairs = _pairs([row for row in rows if row["threads"] == "eager"], name, BASE)
        peaks = [ours["peak_bytes"] / theirs["peak_bytes"] for ours, theirs in pairs]
        yield _at_most(
            f"peak memory of {name}, worst layer", _most(peaks), PEAK, len(peaks), len(gpu_cases())
        )


def _copies(rows: list[Row]) -> Iterator[str]:
    wanted = sum(case.bytes > LARGE for case in gpu_cases())
    for launched in ("eager", "graph"):
        shares = [
            share_of_copy(row)
            for row in rows
            if (row["provider"], row["threads"]) == ("momentum", launched) and row["bytes"] > LARGE
        ]
        what = f"share of the copy rate over 100 MB, {launched}: least"
        if len(shares) < wanted:
            yield _line(f"{what} ({len(shares)} of {wanted} cases)", None)
        else:
            yield _line(f"{what} {min(shares):.2f}, at least {SHARE_OF_COPY}", min(shares) >= SHARE_OF_COPY)


def _steps(rows: list[Row]) -> Iterator[str]:
    for (launched, refreshed), most in STEPS.items():
        for method in METHODS:
            here = [r for r in rows if (r["threads"], r["method"]) == (launched, method + refreshed)]
            times = [row["median_s"] / row["base_s"] for row in here]
            what = f"ResNet-50 step at batch 2, {launched}, {method}{refreshed}"
            yield _at_most(f"{what}: time", _most(times), most, len(times), 1)
            peaks = [row["peak_bytes"] / row["base_peak_bytes"] for row in here]
            yield _at_most(f"{what}: peak memory", _most(peaks), PEAK, len(peaks), 1)


def _compiled(rows: list[Row]) -> Iterator[str]:
    for batch, dtype in dict.fromkeys((case.shape[0], case.dtype) for case in compiled_cases()):
        here = [
            row for row in rows if (row["threads"], row["dtype"], row["shape"][0]) == ("eager", dtype, batch)
        ]
        ratios = _ratios(here, "compiled_momentum", "compiled_batch_norm")
        what = f"compiled momentum over compiled batch norm, batch {batch}, {dtype}: mean"
        yield _at_most(what, _mean(ratios), COMPILED, len(ratios), len(COMPILED_SHAPES))


def _pairs(rows: list[Row], ours: str, theirs: str) -> list[tuple[Row, Row]]:
    """Return the rows of two providers side by side, by case; of repeated ones the last."""
    found: dict[tuple[object, ...], dict[str, Row]] = {}
    for row in rows:
        case = (row["threads"], row["dtype"], row["layout"], *row["shape"])
        found.setdefault(case, {})[row["provider"]] = row
    return [(pair[ours], pair[theirs]) for pair in found.values() if ours in pair and theirs in pair]


def _ratios(rows: list[Row], ours: str, theirs: str) -> list[float]:
    return [mine["median_s"] / other["median_s"] for mine, other in _pairs(rows, ours, theirs)]


def _mean(values: list[float]) -> float | None:
    return geometric_mean(values) if values else None


def _most(values: Iterable[float]) -> float | None:
    return max(values, default=None)


def _at_most(what: str, found: float | None, most: float, count: int, wanted: int) -> str:
    if found is None or count < wanted:
        partly = "" if found is None else f", {found:.3f} so far"
        return _line(f"{what} ({count} of {wanted} cases{partly}), at most {most}", None)
    return _line(f"{what} {found:.3f}, at most {most}", found <= most)


def _line(what: str, met: bool | None) -> str:
    return f"- {'not measured' if met is None else 'met' if met else 'missed'}: {what}"
