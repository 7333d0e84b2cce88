"""report.html of a comparison."""

from collections.abc import Sequence

import torch

from mbnorm import __version__
from mbnorm.experiments.grid import Run, Setting
from mbnorm.experiments.methods import Method
from mbnorm.experiments.page import Figure, Page, Section, Table, render
from mbnorm.experiments.plot import (
    BATCH,
    MARKS,
    OTHERS,
    OWN,
    batch_size_series,
    batch_size_svg,
    panel_svg,
    ranks_svg,
)
from mbnorm.experiments.rows import (
    RANKS,
    Row,
    Tables,
    caption,
    columns,
    conclusion,
    mean_ranks,
    notes,
    row_of,
)


def as_html(tables: Tables, missing: Sequence[Run], baseline: Method, command: str) -> str:
    """Return the report as a page, what was found first; ``command`` is what regenerates it."""
    sections = [_setting_section(setting, rows, baseline) for setting, rows in tables]
    sections = _overview(tables) + sections
    if missing:
        listed = Table(("run without a result",), [(str(run),) for run in missing])
        sections.append(Section("Missing", tables=[listed]))
    return render(
        Page(
            "Normalization methods compared",
            [conclusion(tables, baseline), _counts(tables), f"In the figures: {MARKS}."],
            [(OWN, "mbnorm's layers"), (BATCH, "batch norm"), (OTHERS, "others")],
            command,
            [
                *sections,
                Section("How to read this", [caption(tables, baseline)]),
            ],
            _origin(tables),
        )
    )


def _origin(tables: Tables) -> str:
    outcomes = [outcome for _, rows in tables for row in rows for outcome in row.finished]
    processors = sorted({outcome.processor or "an unknown processor" for outcome in outcomes})
    days = sorted({outcome.date or "an unknown day" for outcome in outcomes})
    when = " to ".join(dict.fromkeys((days[0], days[-1])))
    versions = f"mbnorm {__version__} and torch {torch.__version__}"
    return f"Trained on {', '.join(processors)}, {when}, with {versions}."


def _counts(tables: Tables) -> str:
    outcomes = [
        o for _, rows in tables for row in rows if row.reference is None for o in row.outcomes.values()
    ]
    statuses = ["missing" if outcome is None else outcome.status for outcome in outcomes]
    runs = "1 run" if len(statuses) == 1 else f"{len(statuses)} runs"
    settings = "1 setting" if len(tables) == 1 else f"{len(tables)} settings"
    counted = ", ".join(f"{statuses.count(what)} {what}" for what in ("diverged", "failed", "missing"))
    return f"{runs} in {settings}, of which {counted}."


def _overview(tables: Tables) -> list[Section]:
    sections = []
    if len(tables) > 1:
        ranks = mean_ranks(tables)
        header = ("method", "mean rank", "best rank", "worst rank")
        cells = [(m, f"{mean:.2f}", f"{min(found):g}", f"{max(found):g}") for m, mean, found in ranks]
        text = f"Each method's rank, averaged over the {len(tables)} settings. {RANKS}"
        figure = Figure(ranks_svg(tables), "Mean ranks; lower is better.")
        sections.append(Section("Mean rank", [text], [figure], [Table(header, cells)]))
    series = batch_size_series(tables)
    if series:
        figures = [
            Figure(batch_size_svg(found), f"Accuracy against batch size: {common}.")
            for common, found in series.items()
        ]
        sections.append(Section("Accuracy against batch size", figures=figures))
    return sections


def _setting_section(setting: Setting, rows: Sequence[Row], baseline: Method) -> Section:
    theirs = row_of(baseline, rows)
    marked = frozenset(number for number, row in enumerate(rows) if row.reference is not None)
    table = Table(columns(baseline, rows), [row.cells(theirs) for row in rows], marked)
    figure = Figure(panel_svg(rows), f"Test results: {setting}.")
    return Section(str(setting), figures=[figure], tables=[table], notes=notes(setting, rows))
