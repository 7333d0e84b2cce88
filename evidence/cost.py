"""What accuracy costs in seconds."""

from collections.abc import Iterator, Sequence
from statistics import fmean

from matplotlib.axes import Axes

from benchmarks.rows import Row
from evidence.claim import Claim, Table, Tell, mean_cell
from evidence.trained import accuracies, accuracy_cell, scale_by_error, trained, where
from mbnorm.experiments.estimates import NOT_NEGATIVE
from mbnorm.experiments.grid import Setting, linear_rate, runs_of
from mbnorm.experiments.methods import Method

METHODS: tuple[Method, ...] = ("batch", "group", "momentum-constant", "memorized", "memorized+df", "matched")
EPOCHS = (1, 2, 4)
BATCH_SIZE = 4
SETTINGS = [Setting("mlp", BATCH_SIZE, "shuffled", linear_rate(BATCH_SIZE), epochs) for epochs in EPOCHS]


def _rows(seeds: int, tell: Tell, known: Sequence[Row]) -> Iterator[Row]:
    return trained(runs_of(SETTINGS, METHODS, seeds), tell, known)


def _tables(rows: Sequence[Row]) -> list[Table]:
    lines = []
    for method in METHODS:
        line: list[str] = [method]
        for epochs in EPOCHS:
            found = where(rows, method=method, epochs=epochs)
            line += [accuracy_cell(found), mean_cell(_seconds(found), 2, NOT_NEGATIVE)]
        lines.append(line)
    columns = [(f"{_epochs(e)}: accuracy, %", "seconds") for e in EPOCHS]
    return [(["method", *(name for pair in columns for name in pair)], lines)]


def _draw(rows: Sequence[Row], panels: Sequence[Axes]) -> None:
    (panel,) = panels
    panel.set_xscale("log")
    for number, method in enumerate(METHODS):
        found = [where(rows, method=method, epochs=epochs) for epochs in EPOCHS]
        xs = [fmean(_seconds(f)) for f in found]
        scores = [accuracies(f) for f in found]
        panel.plot(xs, [fmean(s) for s in scores], "o-", color=f"C{number}", label=method)
        panel.vlines(xs, [min(s) for s in scores], [max(s) for s in scores], color=f"C{number}", alpha=0.5)
    panel.set_xlabel("seconds of training and measuring on one core")
    scale_by_error(panel)


def _seconds(rows: Sequence[Row]) -> list[float]:
    return [row["seconds"] for row in rows]


def _epochs(number: int) -> str:
    return "1 epoch" if number == 1 else f"{number} epochs"


CLAIM = Claim(
    title="Cost of Double-Forward",
    sentence="A memory costs little time; Double-Forward costs a second forward.",
    measured=(
        f"Test accuracy of the MLP on digits, batches of {BATCH_SIZE}, learning rate 0.1 m/64, by seconds of "
        "training and measuring on one core, each run with its own decay of the rate. Nets this small show "
        "the overhead of a layer, not the arithmetic."
    ),
    rows=_rows,
    tables=_tables,
    draw=_draw,
    panels=1,
)
