"""Reports of invented results, as they could come: short, long, and with names that look like HTML."""

import random
from dataclasses import replace

from mbnorm.experiments.grid import Run, Setting, grid_settings, runs_of
from mbnorm.experiments.methods import METHODS
from mbnorm.experiments.page import Figure, Page, Section, Table, render
from mbnorm.experiments.plot import panel_svg
from mbnorm.experiments.report_page import as_html
from mbnorm.experiments.rows import rows_of
from mbnorm.experiments.training import Outcome

DONE = Outcome("ok", 1.0, None, 90.0, 0.5, 0.25, 0.125)
FAILED = Outcome("failed", 0.1, "Expected more than 1 spatial element when training, got [2, 100]")
NASTY = "<script>alert(1)</script> & \"quoted\" 'names' with $dollars$ --> <b>"


def invented(runs):
    """Return an outcome for nearly every run: some are missing, some failed, some diverged."""
    draws = random.Random(0)
    outcomes = {}
    for run in runs:
        accuracy = min(100.0, draws.gauss(96 if run.method != "batch" else 60, 1.5))
        outcomes[run] = replace(DONE, accuracy=accuracy)
        if run.method == "instance":
            outcomes[run] = FAILED
        elif run.method == "none" and run.seed == 1:
            outcomes[run] = replace(DONE, status="diverged", accuracy=9.8, train_mode_loss=None)
        elif run.method == "matched+df" and run.seed == 2:
            del outcomes[run]
    return outcomes


def report_of(settings, methods, seeds):
    """Return the page of invented results."""
    runs = runs_of(settings, methods, seeds)
    outcomes = invented(runs)
    tables = [(setting, rows_of(setting, runs, outcomes)) for setting in settings]
    missing = [run for run in runs if run not in outcomes]
    command = f"mbnorm compare --methods {','.join(methods)} --seeds {seeds} --out runs/compare"
    return as_html(tables, missing, "batch", command)


def short_report():
    """Return the smallest report: a setting, a method, a seed."""
    return report_of([Setting("mlp", 2, "shuffled", 0.025, 10)], ["matched"], 1)


def long_report():
    """Return a report with every method, several batch sizes, failures and missing runs."""
    settings = grid_settings(["mlp", "cnn"], [1, 2, 4, 64], ["shuffled"], None, None)
    return report_of(settings, METHODS, 5)


def hard_page():
    """Return a page of names that look like HTML, and of words longer than a screen."""
    setting = Setting(NASTY, 2, "shuffled", 0.1, 1, data="/a/" + "very-long-folder/" * 20)
    runs = [Run("matched", setting, 0)]
    rows = rows_of(setting, runs, {runs[0]: replace(DONE, status="failed", accuracy=None, error=NASTY)})
    figure = Figure(panel_svg(rows), NASTY)
    command = f"mbnorm compare --data '{setting.data}' --model '{NASTY}'"
    table = Table([NASTY, "x" * 60], [[NASTY, "y" * 200], ["z", NASTY]])
    return render(
        Page(
            NASTY,
            [NASTY],
            [("red", NASTY)],
            command,
            [Section(str(setting), [NASTY], [figure], [table], [NASTY])],
            NASTY,
        )
    )
