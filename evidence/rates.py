"""The learning rates that still train, by the rule for the variance."""

from collections.abc import Iterator, Sequence
from statistics import fmean

from matplotlib.axes import Axes

from benchmarks.rows import Row
from evidence.claim import Claim, Table, Tell
from evidence.trained import accuracies, accuracy_cell, scale_by_error, trained, where
from mbnorm.experiments.grid import Setting, runs_of
from mbnorm.experiments.methods import Method

METHODS: tuple[Method, ...] = (
    "batch",
    "momentum-constant",
    "momentum-pooled",
    "memorized-averaged",
    "memorized",
    "matched",
)
RATES = (0.1, 0.8, 1.6, 3.2)
BATCH_SIZE = 2
EPOCHS = 1
SETTINGS = [Setting("mlp", BATCH_SIZE, "shuffled", rate * BATCH_SIZE / 64, EPOCHS) for rate in RATES]


def _rows(seeds: int, tell: Tell, known: Sequence[Row]) -> Iterator[Row]:
    return trained(runs_of(SETTINGS, METHODS, seeds), tell, known)


def _tables(rows: Sequence[Row]) -> list[Table]:
    lines = [
        [_name(method), *(accuracy_cell(where(rows, method=method, lr=s.lr)) for s in SETTINGS)]
        for method in METHODS
    ]
    return [(["method", *(f"lr {s.lr:g}" for s in SETTINGS)], lines)]


def _name(method: Method) -> str:
    return {
        "momentum-constant": "momentum, averaged",
        "momentum-pooled": "momentum, pooled",
        "memorized-averaged": "memorized, averaged",
        "memorized": "memorized, pooled",
        "matched": "matched, pooled",
    }.get(method, method)


def _draw(rows: Sequence[Row], panels: Sequence[Axes]) -> None:
    (panel,) = panels
    panel.set_xscale("log")
    for number, method in enumerate(METHODS):
        found = [accuracies(where(rows, method=method, lr=s.lr)) for s in SETTINGS]
        xs = [s.lr * 1.03 ** (number - 2) for s in SETTINGS]
        panel.plot(xs, [fmean(f) for f in found], "o-", color=f"C{number}", label=_name(method))
        panel.vlines(xs, [min(f) for f in found], [max(f) for f in found], color=f"C{number}", alpha=0.5)
    panel.set_xlabel("learning rate")
    scale_by_error(panel)


CLAIM = Claim(
    title="Range of learning rates",
    sentence=(
        'The rule "pooled", which adds the variance between the batches\' means, widens the range of '
        "learning rates that train."
    ),
    measured=(
        f"Test accuracy in percent of the MLP on digits, batches of {BATCH_SIZE}, {EPOCHS} epoch(s). "
        "Momentum has a constant history weight; a run whose loss is not finite at the end has diverged."
    ),
    rows=_rows,
    tables=_tables,
    draw=_draw,
    panels=1,
)
