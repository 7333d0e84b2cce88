"""The file of results of `mbnorm compare`: a line a finished run."""

import math
from dataclasses import asdict, fields
from pathlib import Path

from mbnorm.experiments import training
from mbnorm.experiments.data import load
from mbnorm.experiments.grid import Run, Setting
from mbnorm.experiments.models import WIDTHS
from mbnorm.experiments.records import Record, append, check_versions, read, versions
from mbnorm.experiments.training import Outcome


class Results:
    """The finished runs in a file, to read and to add to.

    A line that was being written when its process died is removed, so that its run is repeated.

    Args:
        path: the file; it need not exist.

    Raises:
        ValueError: a line is not a result, or is one of another torch or mbnorm.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        found = read(path, lambda record: (record, _parsed(record)))
        check_versions(path, [record for record, _ in found])
        self.outcomes: dict[Run, Outcome] = dict(parsed for _, parsed in found)

    def add(self, run: Run, outcome: Outcome, accelerator: str) -> None:
        """Append a finished run; it is on disk on return."""
        record = {
            "method": run.method,
            **asdict(run.setting),
            "seed": run.seed,
            **asdict(outcome),
            "width": WIDTHS.get(run.setting.model),
            "sgd_momentum": training.MOMENTUM,
            "weight_decay": training.WEIGHT_DECAY,
            "rate_drops": training.RATE_DROPS,
            "train_images": len(load(run.setting.data).train_targets),
            "accelerator": accelerator,
            **versions(),
        }
        append(self.path, record)
        self.outcomes[run] = outcome


def _parsed(record: Record) -> tuple[Run, Outcome]:
    # written when there were no other data
    record.setdefault("data", "digits")
    # and no other loss
    record.setdefault("loss", "cross-entropy")
    # and when accuracy was that of all test images alone, measured nobody knows where
    for later in ("even_accuracy", "odd_accuracy", "dice", "test_error", "processor", "date"):
        record.setdefault(later, None)
    setting = Setting(*(record[field.name] for field in fields(Setting)))
    outcome = Outcome(**{field.name: record[field.name] for field in fields(Outcome)})
    losses = (outcome.train_loss, outcome.train_mode_loss, outcome.eval_mode_loss)
    for number in (outcome.accuracy, outcome.test_error, *losses):
        if number is not None and not math.isfinite(number):
            raise ValueError(f"expected finite numbers, got {number}")
    return Run(record["method"], setting, record["seed"]), outcome
