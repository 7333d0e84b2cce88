"""Batches that are poor samples of the data."""

from collections.abc import Iterator, Sequence
from statistics import fmean

from matplotlib.axes import Axes

from benchmarks.rows import Row
from evidence.claim import Claim, Table, Tell, name_lines
from evidence.trained import (
    accuracies,
    accuracy_cell,
    loss_cell,
    scale_by_error,
    trained,
    where,
)
from mbnorm.experiments.grid import grid_settings, runs_of
from mbnorm.experiments.methods import Method
from mbnorm.experiments.sampling import Sampling

SAMPLINGS: tuple[Sampling, ...] = ("shuffled", "one-class")
METHODS: tuple[Method, ...] = ("batch", "group", "momentum-constant", "memorized", "matched")
BATCH_SIZE = 4
EPOCHS = 2
SETTINGS = grid_settings(["cnn"], [BATCH_SIZE], SAMPLINGS, None, EPOCHS)


def _rows(seeds: int, tell: Tell, known: Sequence[Row]) -> Iterator[Row]:
    return trained(runs_of(SETTINGS, METHODS, seeds), tell, known)


def _tables(rows: Sequence[Row]) -> list[Table]:
    lines = []
    for sampling in SAMPLINGS:
        for method in METHODS:
            found = where(rows, method=method, sampling=sampling)
            losses = (loss_cell(found, "train_mode_loss"), loss_cell(found, "eval_mode_loss"))
            lines.append([method, sampling, accuracy_cell(found), *losses])
    return [(["method", "batches", "accuracy, %", "train-mode loss", "eval-mode loss"], lines)]


def _draw(rows: Sequence[Row], panels: Sequence[Axes]) -> None:
    (panel,) = panels
    for number, sampling in enumerate(SAMPLINGS):
        found = [accuracies(where(rows, method=method, sampling=sampling)) for method in METHODS]
        ys = [y + 0.12 * (number - 0.5) for y in range(len(METHODS))]
        panel.plot([fmean(f) for f in found], ys, "o", color=f"C{number}", label=sampling)
        panel.hlines(ys, [min(f) for f in found], [max(f) for f in found], color=f"C{number}", alpha=0.5)
    name_lines(panel, METHODS)
    scale_by_error(panel, across=True)


CLAIM = Claim(
    title="Batches of one class",
    sentence="Batch norm breaks down with batches of one class; methods with a memory do not.",
    measured=(
        f"The small ResNet on digits, batches of {BATCH_SIZE}, {EPOCHS} epochs at learning rate 0.1 m/64. "
        "One-class: all images of a batch are of one class. Losses of the trained net on its training "
        "images, in batches of that kind in train mode, and in eval mode."
    ),
    rows=_rows,
    tables=_tables,
    draw=_draw,
    panels=1,
)
