"""What a claim consists of, and the three files that it becomes."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import TypeAlias

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from matplotlib.transforms import blended_transform_factory

from benchmarks.rows import Row
from mbnorm.experiments.estimates import INTERVAL, PERCENT, Bounds, Estimate, estimate
from mbnorm.experiments.markdown import table
from mbnorm.experiments.plot import WIDTH

Table: TypeAlias = tuple[Sequence[str], Sequence[Sequence[str]]]
"""Headings, and lines of as many cells."""


Tell: TypeAlias = Callable[[str], None]
"""Is given a line now and then."""


PLOT = "plot.png"
LETTERS = 26
"""Of a line in a name beside a panel."""
LETTERS_BELOW = 44
LETTERS_OF_TWO_COLUMNS = 18
LINE = 0.17
"""Inches, of a line of text."""


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
        title: a few words, the heading of its page; nothing takes the sentence.
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
    title: str = ""


def as_markdown(claim: Claim, rows: Sequence[Row], command: str) -> str:
    """Return a page: heading, finding, claim, plot, tables, what ± is, and the command that wrote it."""
    tables = [table(headings, lines) for headings, lines in claim.tables(rows)]
    measured = f"{claim.measured} {INTERVAL}"
    plot = f"![Plot of the tables]({PLOT})"
    heading = f"# {claim.title or claim.sentence.removesuffix('.')}"
    said = [claim.verdict(rows), claim.sentence]
    parts = [heading, *said, plot, *tables, measured, f"Written by `{command}`."]
    return "\n\n".join(part for part in parts if part) + "\n"


def draw(claim: Claim, rows: Sequence[Row], path: Path) -> None:
    """Write the claim's figure: its panels one below the other, so that a phone can show their text."""
    with matplotlib.rc_context({"font.size": 9, "axes.titlesize": "medium"}):
        figure = Figure(layout="constrained")
        panels = list(figure.subplots(claim.panels, squeeze=False).flat)
        claim.draw(rows, panels)
        heights = [_finished(panel) for panel in panels]
        figure.set_size_inches(WIDTH, sum(heights))
        grid = panels[0].get_gridspec()
        assert grid is not None
        grid.set_height_ratios(heights)
        figure.savefig(path, dpi=200)


def _finished(panel: Axes) -> float:
    """Give a panel its grid, its legend above the data, and broken lines; return its height in inches."""
    if not panel.has_data():
        panel.set_axis_off()
        return 0.5
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(color="#eeeeee")
    panel.set_axisbelow(True)
    for axis in (panel.xaxis, panel.yaxis):
        if isinstance(axis.get_major_locator(), LogLocator):
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter("{x:g}")
            axis.set_minor_locator(NullLocator())
    # what is wider than the panel has room under the names
    panel.set_xlabel(fill(panel.get_xlabel(), LETTERS_BELOW), loc="right")
    panel.set_ylabel(fill(panel.get_ylabel(), LETTERS_BELOW))
    labels = panel.get_legend_handles_labels()[1]
    columns = 2 if max(map(len, labels), default=0) <= LETTERS_OF_TWO_COLUMNS else 1
    if labels:
        middle = blended_transform_factory(panel.figure.transFigure, panel.transAxes)
        panel.legend(
            loc="lower center",
            bbox_to_anchor=(0.5, 1),
            bbox_transform=middle,
            ncols=columns,
            title=panel.get_title(),
            frameon=False,
        )
        panel.set_title("")
    names = [label.get_text().count("\n") + 1 for label in panel.get_yticklabels()]
    return max(2.4, LINE * len(names) * max(names)) + LINE * math.ceil(len(labels) / columns) + 0.8


def draw_seeds(panel: Axes, scores: Mapping[str, Sequence[float]], bounds: Bounds = PERCENT) -> None:
    """Draw the scores of each line, a dot a seed on the interval of their mean, and name the lines."""
    for place, values in enumerate(scores.values()):
        found = estimate(values, bounds)
        if found is not None:
            panel.plot([found.low, found.high], [place, place], color="C0", linewidth=3, alpha=0.4)
            panel.plot(values, [place] * len(values), ".", color="C0")
    name_lines(panel, list(scores))


def name_lines(panel: Axes, names: Sequence[str]) -> None:
    """Write names down the side of a panel; the first is at 0, on top."""
    panel.set_yticks(range(len(names)), [fill(name, LETTERS) for name in names])
    panel.set_ylim(len(names) - 0.5, -0.5)


def mean_cell(values: Sequence[float], digits: int, bounds: Bounds) -> str:
    """Return the text of a mean over seeds."""
    found = estimate(values, bounds)
    return "-" if found is None else found.text(digits)


def difference_cell(difference: Estimate | None, digits: int) -> str:
    """Return the text of a difference, in parentheses where it is none."""
    return "-" if difference is None else difference.signed(digits)
