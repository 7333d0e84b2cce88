"""Accuracy by batch size."""

from collections.abc import Iterator, Sequence
from statistics import fmean

from matplotlib.axes import Axes

from benchmarks.rows import Row
from evidence.claim import Claim, Table, Tell
from evidence.trained import accuracies, accuracy_cell, scale_by_error, trained, where
from mbnorm.experiments.grid import grid_settings, runs_of
from mbnorm.experiments.methods import Method

BATCH_SIZES = (1, 2, 4, 8, 16, 64)
METHODS: tuple[Method, ...] = ("batch", "group", "momentum-constant", "memorized", "matched")
EPOCHS = 2
SETTINGS = grid_settings(["mlp"], BATCH_SIZES, ["shuffled"], None, EPOCHS)


def _rows(seeds: int, tell: Tell, known: Sequence[Row]) -> Iterator[Row]:
    return trained(runs_of(SETTINGS, METHODS, seeds), tell, known)


def _tables(rows: Sequence[Row]) -> list[Table]:
    lines = [
        [method, *(accuracy_cell(where(rows, method=method, batch_size=m)) for m in BATCH_SIZES)]
        for method in METHODS
    ]
    return [(["method", *(f"m = {m}" for m in BATCH_SIZES)], lines)]


def _draw(rows: Sequence[Row], panels: Sequence[Axes]) -> None:
    (panel,) = panels
    panel.set_xscale("log", base=2)
    panel.set_xticks(BATCH_SIZES, [str(m) for m in BATCH_SIZES])
    for number, method in enumerate(METHODS):
        points = {m: accuracies(where(rows, method=method, batch_size=m)) for m in BATCH_SIZES}
        known = [(m * 2 ** (0.06 * (number - 2)), found) for m, found in points.items() if found]
        xs = [x for x, _ in known]
        panel.plot(xs, [fmean(f) for _, f in known], "o-", color=f"C{number}", label=method)
        panel.vlines(
            xs, [min(f) for _, f in known], [max(f) for _, f in known], color=f"C{number}", alpha=0.5
        )
    panel.set_xlabel("batch size m")
    scale_by_error(panel)


CLAIM = Claim(
    title="Accuracy by batch size",
    sentence="Batch norm loses accuracy as the batch shrinks; the methods with a memory keep it.",
    measured=(
        f"Test accuracy in percent of the MLP on digits after {EPOCHS} epochs at learning rate 0.1 m/64. At "
        "m = 1 torch's batch norm refuses to train, and mbnorm's layers were given a memory by one forward "
        "of two images."
    ),
    rows=_rows,
    tables=_tables,
    draw=_draw,
    panels=1,
)
