"""What a claim consists of, and the three files that it becomes."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.rows import Row
from mbnorm.experiments.estimates import INTERVAL, Bounds, Estimate, estimate
from mbnorm.experiments.markdown import table

Table: TypeAlias = tuple[Sequence[str], Sequence[Sequence[str]]]
"""Headings, and lines of as many cells."""


Tell: TypeAlias = Callable[[str], None]
"""Is given a line now and then."""


MOST_ACROSS = 4
"""Panels of a figure beside one another."""


@dataclass(frozen=True)
class Claim:
    """A claim: a sentence, its measurement, and how that is shown.

    Attributes:
        sentence: what is claimed.
        measured: what is measured for it, under the table.
        rows: measures from seeds 0 to N-1 what is not among the rows known already.
        tables: the rows as tables.
        draw: the rows in ``panels`` panels of a figure.
        panels: how many.
        seeds: how many if nothing is said.
        verdict: what the rows say, in the first line.
        check: raises a ValueError where something is missing that it is measured with.
    """

    sentence: str
    measured: str
    rows: Callable[[int, Tell, Sequence[Row]], Iterable[Row]]
    tables: Callable[[Sequence[Row]], Sequence[Table]]
    draw: Callable[[Sequence[Row], Sequence[Axes]], None]
    panels: int
    seeds: int = 5
    check: Callable[[], None] = lambda: None
    verdict: Callable[[Sequence[Row]], str] = lambda rows: ""


def as_markdown(claim: Claim, rows: Sequence[Row], command: str) -> str:
    """Return what was found, the claim, its tables, what ± is, and where they come from."""
    tables = [table(headings, lines) for headings, lines in claim.tables(rows)]
    measured = f"{claim.measured} {INTERVAL}"
    parts = [claim.verdict(rows), claim.sentence, *tables, measured, f"Written by `{command}`."]
    return "\n\n".join(part for part in parts if part) + "\n"


def draw(claim: Claim, rows: Sequence[Row], path: Path) -> None:
    """Write the claim's figure."""
    across = min(claim.panels, MOST_ACROSS)
    down = math.ceil(claim.panels / across)
    figure = Figure(figsize=(5.6 * across, 4.2 * down), layout="constrained")
    places = list(figure.subplots(down, across, squeeze=False).flat)
    panels = places[: claim.panels]
    for unused in places[claim.panels :]:
        unused.remove()
    claim.draw(rows, panels)
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(color="#eeeeee")
        panel.set_axisbelow(True)
        panel.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=130)


def mean_cell(values: Sequence[float], digits: int, bounds: Bounds) -> str:
    """Return the text of a mean over seeds."""
    found = estimate(values, bounds)
    return "-" if found is None else found.text(digits)


def difference_cell(difference: Estimate | None, digits: int) -> str:
    """Return the text of a difference, in parentheses where it is none."""
    return "-" if difference is None else difference.signed(digits)
