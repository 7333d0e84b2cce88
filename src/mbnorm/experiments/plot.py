"""The figure: a panel a setting, a line a method, a dot a seed."""

from collections.abc import Sequence
from math import ceil
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mbnorm.experiments.grid import Setting
from mbnorm.experiments.methods import OURS
from mbnorm.experiments.report import Row

MOST_COLUMNS = 3
LEAST_ERROR = 0.5
TICKS = (0, 50, 80, 90, 95, 98, 99)


def draw(tables: Sequence[tuple[Setting, Sequence[Row]]], path: Path) -> None:
    """Write the figure of all settings to ``path``."""
    columns = min(len(tables), MOST_COLUMNS)
    lines = ceil(len(tables) / columns)
    most_rows = max(len(rows) for _, rows in tables)
    figure = Figure(figsize=(6.2 * columns, lines * (1.3 + 0.34 * most_rows)), layout="constrained")
    panels = list(figure.subplots(lines, columns, squeeze=False).flat)
    for panel, (setting, rows) in zip(panels, tables, strict=False):
        _panel(panel, setting, rows)
    for unused in panels[len(tables) :]:
        unused.set_axis_off()
    figure.savefig(path, dpi=150)


def _panel(panel: Axes, setting: Setting, rows: Sequence[Row]) -> None:
    panel.set_title(str(setting), loc="left", fontsize=10, fontweight="bold")
    # the error on a log scale: half of the plane would be empty between 50 % and the 97 % of most methods
    panel.set_xscale("log")
    panel.set_xlim(100, LEAST_ERROR)
    for y, row in enumerate(rows):
        color = _color(row)
        panel.axhline(y, color="#e6e6e6", linewidth=0.8, zorder=0)
        mean = row.mean_accuracy
        if mean is None:
            panel.text(95, y, "failed", color=color, fontsize=9, va="center")
            continue
        fill = "none" if row.reference else color
        errors = [_error(accuracy) for accuracy in row.accuracies]
        panel.scatter(errors, [y] * len(errors), s=24, facecolor=fill, edgecolor=color, alpha=0.6)
        panel.scatter([_error(mean)], [y], s=150, marker="|", color=color, linewidth=2)
        diverged = any(o.status == "diverged" for o in row.outcomes)
        # beside the axis, where no dot can be
        text = f"{mean:.1f}{' diverged' if diverged else ''}"
        panel.text(LEAST_ERROR * 0.93, y, text, color=color, fontsize=9, va="center")
    panel.set_xticks([_error(t) for t in TICKS], [str(t) for t in TICKS], fontsize=9)
    panel.minorticks_off()
    panel.set_xlabel("test accuracy, %, spaced by the error (dots: seeds, bar: their mean)", fontsize=9)
    panel.set_yticks(range(len(rows)), [row.label for row in rows], fontsize=9)
    for label, row in zip(panel.get_yticklabels(), rows, strict=True):
        label.set_color(_color(row))
    panel.set_ylim(len(rows) - 0.4, -0.6)
    panel.tick_params(axis="y", length=0)
    panel.spines[["top", "right", "left"]].set_visible(False)


def _error(accuracy: float) -> float:
    return max(100 - accuracy, LEAST_ERROR)


def _color(row: Row) -> str:
    if row.method == "batch":
        return "#c62828"
    return "#1769aa" if row.method in OURS else "#616161"
