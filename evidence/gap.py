"""The same data in train mode and in eval mode."""

from collections.abc import Iterator, Sequence
from statistics import fmean

from matplotlib.axes import Axes

from benchmarks.rows import Row
from evidence.claim import Claim, Table, Tell
from evidence.trained import accuracy_cell, loss_cell, trained, where
from mbnorm.experiments.grid import Setting, runs_of
from mbnorm.experiments.methods import Method

METHODS: tuple[Method, ...] = ("batch", "momentum", "momentum-constant", "memorized", "matched")
BATCH_SIZES = (2, 8)
EPOCHS = 2
SETTINGS = [Setting("mlp", m, "shuffled", 0.0125 * m, EPOCHS) for m in BATCH_SIZES]


def _rows(seeds: int, tell: Tell, known: Sequence[Row]) -> Iterator[Row]:
    return trained(runs_of(SETTINGS, METHODS, seeds), tell, known)


def _tables(rows: Sequence[Row]) -> list[Table]:
    lines = []
    for m in BATCH_SIZES:
        for method in METHODS:
            found = where(rows, method=method, batch_size=m)
            losses = (loss_cell(found, "train_mode_loss"), loss_cell(found, "eval_mode_loss"))
            lines.append([method, str(m), *losses, accuracy_cell(found)])
    return [(["method", "m", "train-mode loss", "eval-mode loss", "test accuracy, %"], lines)]


def _draw(rows: Sequence[Row], panels: Sequence[Axes]) -> None:
    (panel,) = panels
    for number, method in enumerate(METHODS):
        for mode, marker in (("train", "o"), ("eval", "x")):
            means = []
            for m in BATCH_SIZES:
                losses = [row[f"{mode}_mode_loss"] for row in where(rows, method=method, batch_size=m)]
                means.append(fmean(losses) if None not in losses else float("nan"))
            line = {"train": "-", "eval": "--"}[mode]
            panel.plot(BATCH_SIZES, means, marker + line, color=f"C{number}", label=f"{method}, {mode} mode")
    panel.set_xscale("log", base=2)
    panel.set_xticks(BATCH_SIZES, [str(m) for m in BATCH_SIZES])
    panel.set_yscale("log")
    panel.set_xlabel("batch size m")
    panel.set_ylabel("loss on the training images")


CLAIM = Claim(
    title="Train mode beside eval mode",
    sentence=(
        "Batch norm's train and eval modes are two nets where batches are small; a memory makes them one."
    ),
    measured=(
        f"Mean loss of the trained MLP on its training digits in both modes, after {EPOCHS} epochs at "
        "learning rate 0.8 m/64. In train mode with batches as in training, and memories read but not "
        "written."
    ),
    rows=_rows,
    tables=_tables,
    draw=_draw,
    panels=1,
)
