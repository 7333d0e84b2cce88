"""What the claims that rest on training have in common: their runs as rows, and rows in cells and curves."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from matplotlib.axes import Axes

from benchmarks.rows import Row
from evidence.claim import Tell, mean_cell
from mbnorm.experiments.estimates import NOT_NEGATIVE, PERCENT
from mbnorm.experiments.grid import Run, Setting
from mbnorm.experiments.training import train

DIVERGED = 1000.0
"""A mean loss in the last epoch from which a training has diverged; guessing has about 2.3."""
TICKS = (0, 50, 80, 90, 95, 98)


def trained(runs: Sequence[Run], tell: Tell, known: Sequence[Row]) -> Iterator[Row]:
    """Train the runs that are not among the rows known already."""
    for run in runs:
        if where(of_setting(known, run.setting), method=run.method, seed=run.seed):
            continue
        outcome = train(run)
        accuracy = "failed" if outcome.accuracy is None else f"{outcome.accuracy:.1f} %"
        tell(f"{run}: {accuracy}, {outcome.seconds:.1f} s")
        yield {"method": run.method, **asdict(run.setting), "seed": run.seed, **asdict(outcome)}


def of_setting(rows: Sequence[Row], setting: Setting) -> list[Row]:
    """Return the rows of a setting; those written when there was one loss do not name it."""
    sought = asdict(setting)
    return [row for row in rows if sought.items() <= {"loss": "cross-entropy", **row}.items()]


def where(rows: Sequence[Row], **values: Any) -> list[Row]:
    """Return the rows that have these values."""
    return [row for row in rows if all(row[key] == value for key, value in values.items())]


def score_of(row: Row) -> float:
    """Return Dice where pixels have classes, else the accuracy; nothing where the loss was not finite."""
    # a net whose loss is not finite may be right by chance
    scored = "accuracy" if row.get("dice") is None else "dice"
    return float(row[scored]) if row["status"] == "ok" else 0.0


def accuracy_cell(rows: Sequence[Row]) -> str:
    """Return the mean accuracy with its interval, and how many runs diverged or failed."""
    text = mean_cell(accuracies(rows), 1, PERCENT)
    for status in ("diverged", "failed"):
        if count := sum(row["status"] == status for row in rows):
            text += f" ({count} {status})"
    return text


def loss_cell(rows: Sequence[Row], key: str) -> str:
    """Return the mean of a loss with its interval."""
    values = [row[key] for row in rows if row["status"] != "failed"]
    return "not finite" if None in values else mean_cell(values, 3, NOT_NEGATIVE)


def accuracies(rows: Sequence[Row]) -> list[float]:
    """Return the accuracy of every run that has one."""
    return [row["accuracy"] for row in rows if row["accuracy"] is not None]


def by_seed(rows: Sequence[Row], key: str) -> dict[int, float]:
    """Return the number of every run that has one, to pair it with that of another run from the same seed."""
    return {row["seed"]: row[key] for row in rows if row[key] is not None}


SPACED = "test accuracy, %, spaced by the error (lines: smallest to largest seed)"


def scale_by_error(panel: Axes, label: str = SPACED, *, across: bool = False) -> None:
    """Space the accuracies of a panel, up or across, by the logarithm of the error."""
    set_scale = panel.set_xscale if across else panel.set_yscale
    set_scale("function", functions=(_spaced, _from_spaced))
    axis = panel.xaxis if across else panel.yaxis
    axis.set_ticks(TICKS, [str(tick) for tick in TICKS])
    axis.set_label_text(label)
    (panel.set_xlim if across else panel.set_ylim)(0, 99)


def _spaced(accuracy: Any) -> Any:
    import numpy as np

    return -np.log(np.maximum(100.0 - np.asarray(accuracy, float), 0.1))


def _from_spaced(spaced: Any) -> Any:
    import numpy as np

    return 100.0 - np.exp(-np.asarray(spaced, float))
