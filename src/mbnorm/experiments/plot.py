"""The figures of a comparison: a panel a setting, accuracy against batch size, mean ranks."""

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from textwrap import fill

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mbnorm.experiments.grid import Setting
from mbnorm.experiments.methods import OURS, Method
from mbnorm.experiments.rows import Row, Tables, mean_ranks

LEAST_ERROR = 0.5
TICKS = (0, 50, 80, 90, 95, 98, 99)
SCALE = "test score, %, spaced by the error"
MARKS = "dot: a seed; bar: the mean; line: its 95 % interval; triangle: the interval goes on"
WIDTH = 3.7
"""Inches: on a phone 9 points are then 12 pixels."""
LETTERS = 44
"""Of 9 points, in a line that wide."""
LEGEND_COLUMNS = 2
BATCH, OWN, OTHERS = "#c62828", "#1769aa", "#616161"


def draw(tables: Tables, path: Path) -> None:
    """Write the figure of all settings to ``path``."""
    heights = [1.1 + 0.22 * len(rows) for _, rows in tables]
    with _plain_text():
        figure = Figure(figsize=(WIDTH, sum(heights) + 0.6), layout="constrained")
        panels = figure.subplots(len(tables), squeeze=False, height_ratios=heights).flat
        for panel, (setting, rows) in zip(panels, tables, strict=True):
            panel.set_title(fill(str(setting), LETTERS), loc="right", fontsize=9, fontweight="bold")
            _fill(panel, rows)
        figure.suptitle(fill(f"{MARKS}; blue: mbnorm's layers; red: batch norm", LETTERS), fontsize=9)
        figure.savefig(path, dpi=200)


def panel_svg(rows: Sequence[Row]) -> str:
    """Return the figure of one setting."""
    with _plain_text():
        figure = Figure(figsize=(WIDTH, 0.9 + 0.27 * len(rows)), layout="constrained")
        _fill(figure.subplots(), rows)
        return as_svg(figure)


def batch_size_svg(series: Mapping[int, Sequence[Row]]) -> str:
    """Return the figure of settings that differ in the batch size alone: a line a method."""
    with _plain_text():
        methods: dict[Method, list[tuple[int, float]]] = {}
        for batch_size, rows in series.items():
            for row in rows:
                if row.reference is None and row.score is not None:
                    methods.setdefault(row.method, []).append((batch_size, _error(row.score.mean)))
        # the panel keeps its height, however many lines the legend has
        lines_of_legend = -(-len(methods) // LEGEND_COLUMNS)
        figure = Figure(figsize=(WIDTH, 3.4 + 0.17 * lines_of_legend), layout="constrained")
        panel = figure.subplots()
        colors = matplotlib.colormaps["tab20"].colors  # type: ignore[attr-defined]
        for number, (method, points) in enumerate(sorted(methods.items())):
            style = "-" if method in OURS else "--"
            panel.plot(
                *zip(*sorted(points), strict=True),
                style,
                marker="o",
                markersize=3.5,
                linewidth=1.2,
                color=colors[number % len(colors)],
                label=method,
            )
        panel.set_xscale("log", base=2)
        panel.set_xticks(list(series), [str(m) for m in series])
        panel.set_xlabel("batch size", fontsize=9)
        panel.set_yscale("log")
        panel.set_ylim(100, LEAST_ERROR)
        panel.set_yticks([_error(t) for t in TICKS], [str(t) for t in TICKS], fontsize=9)
        panel.set_ylabel(f"mean {SCALE}", fontsize=9)
        panel.minorticks_off()
        panel.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside lower center", ncols=LEGEND_COLUMNS, fontsize=9, frameon=False)
        return as_svg(figure)


def ranks_svg(tables: Tables) -> str:
    """Return the figure of the mean ranks: a dot a setting, a bar their mean."""
    with _plain_text():
        ranks = mean_ranks(tables)
        figure = Figure(figsize=(WIDTH, 0.8 + 0.27 * len(ranks)), layout="constrained")
        panel = figure.subplots()
        for y, (method, mean, found) in enumerate(ranks):
            color = _color(method)
            panel.axhline(y, color="#e6e6e6", linewidth=0.8, zorder=0)
            panel.scatter(found, [y] * len(found), s=24, color=color, alpha=0.4)
            panel.scatter([mean], [y], s=150, marker="|", color=color, linewidth=2)
        panel.set_xlim(0.5, len(ranks) + 0.5)
        # "20.0" at the right end would be cut
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.set_xlabel("rank (dot: a setting; bar: the mean)", fontsize=9)
        _name_lines(panel, [(method, _color(method)) for method, *_ in ranks])
        return as_svg(figure)


def as_svg(figure: Figure) -> str:
    """Return a figure as an SVG element that needs no fonts and can stand in a page."""
    file = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "mbnorm"}):
        figure.savefig(
            file,
            format="svg",
            transparent=True,
            metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
        )
    text = file.getvalue()
    return re.sub(r"<!--.*?-->\n?", "", text[text.index("<svg") :], flags=re.DOTALL)


@contextmanager
def _plain_text() -> Iterator[None]:
    # a name with two dollar signs in it is no formula
    with matplotlib.rc_context({"text.parse_math": False}):
        yield


def _fill(panel: Axes, rows: Sequence[Row]) -> None:
    # the error on a log scale: half of the plane would be empty between 50 % and the 97 % of most methods
    panel.set_xscale("log")
    panel.set_xlim(100, LEAST_ERROR)
    for y, row in enumerate(rows):
        color = _color(row.method)
        panel.axhline(y, color="#e6e6e6", linewidth=0.8, zorder=0)
        score = row.score
        if score is None:
            panel.text(95, y, "failed" if row.error else "missing", color=color, fontsize=9, va="center")
            continue
        fill = "none" if row.reference else color
        errors = [_error(value) for value in row.scores.values()]
        panel.scatter(errors, [y] * len(errors), s=24, facecolor=fill, edgecolor=color, alpha=0.6)
        ends = (score.low, score.high)
        panel.plot([_error(end) for end in ends], [y, y], color=color, linewidth=1.5)
        panel.scatter([_error(score.mean)], [y], s=150, marker="|", color=color, linewidth=2)
        width = score.half_width or 0.0
        for marker, end, goes_on in (
            ("<", 100.0, score.mean - width < 0),
            (">", LEAST_ERROR, score.mean + width > 100 - LEAST_ERROR),
        ):
            if goes_on:
                panel.scatter([end], [y], s=24, marker=marker, color=color, clip_on=False)
        diverged = any(o.status == "diverged" for o in row.finished)
        # beside the axis, where no dot can be
        text = f"{score.mean:.1f}{' diverged' if diverged else ''}"
        panel.text(LEAST_ERROR * 0.85, y, text, color=color, fontsize=9, va="center")
    panel.set_xticks([_error(t) for t in TICKS], [str(t) for t in TICKS], fontsize=9)
    panel.minorticks_off()
    panel.set_xlabel(SCALE, fontsize=9)
    _name_lines(panel, [(row.label, _color(row.method)) for row in rows])


def _name_lines(panel: Axes, names: Sequence[tuple[str, str]]) -> None:
    panel.set_yticks(range(len(names)), [name for name, _ in names], fontsize=9)
    for label, (_, color) in zip(panel.get_yticklabels(), names, strict=True):
        label.set_color(color)
    panel.set_ylim(len(names) - 0.4, -0.6)
    panel.tick_params(axis="y", length=0)
    panel.spines[["top", "right", "left"]].set_visible(False)


def _error(score: float) -> float:
    return min(max(100 - score, LEAST_ERROR), 100.0)


def _color(method: Method) -> str:
    if method == "batch":
        return BATCH
    return OWN if method in OURS else OTHERS


def batch_size_series(tables: Tables) -> dict[str, dict[int, Sequence[Row]]]:
    """Return the settings that differ in the batch size alone, with its rate, by what they have in common."""
    found: dict[str, dict[int, Sequence[Row]]] = {}
    for setting, rows in tables:
        found.setdefault(_beside_batch_size(setting), {})[setting.batch_size] = rows
    return {common: series for common, series in found.items() if len(series) > 1}


def _beside_batch_size(setting: Setting) -> str:
    share = setting.lr / setting.batch_size * 64
    return f"{setting.model} on {setting.data}, {setting.sampling} batches, lr {share:.3g} m/64"
