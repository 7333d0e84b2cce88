"""The file of results: one JSON object a line, one line a finished run."""

import json
import math
import os
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from mbnorm import __version__
from mbnorm.experiments import training
from mbnorm.experiments.data import load
from mbnorm.experiments.grid import Run, Setting
from mbnorm.experiments.models import WIDTHS
from mbnorm.experiments.training import Outcome


class Results:
    """The finished runs in a file, to read and to add to.

    What follows the last line end is a line that was being written when its process died: it is removed,
    so that its run is repeated.

    Args:
        path: the file; it need not exist.

    Raises:
        ValueError: a line is not a result.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.outcomes: dict[Run, Outcome] = {}
        *lines, unfinished = path.read_bytes().split(b"\n") if path.exists() else [b""]
        for number, line in enumerate(lines, 1):
            try:
                run, outcome = _parsed(line)
            except (ValueError, KeyError, TypeError) as error:
                reason = f"no {error}" if isinstance(error, KeyError) else error
                raise ValueError(
                    f"{path}, line {number} is not a result of mbnorm compare: {reason}"
                ) from error
            self.outcomes[run] = outcome
        if unfinished:
            os.truncate(path, path.stat().st_size - len(unfinished))

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
            "mbnorm": __version__,
            "torch": torch.__version__,
        }
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.outcomes[run] = outcome


def _parsed(line: bytes) -> tuple[Run, Outcome]:
    record: dict[str, Any] = json.loads(line)
    if not isinstance(record, dict):
        raise ValueError(f"expected an object, got {record!r:.40}")
    # written when there were no other data
    record.setdefault("data", "digits")
    # and when accuracy was that of all test images alone
    record.setdefault("even_accuracy", None)
    record.setdefault("odd_accuracy", None)
    setting = Setting(*(record[field.name] for field in fields(Setting)))
    outcome = Outcome(**{field.name: record[field.name] for field in fields(Outcome)})
    numbers = (outcome.accuracy, outcome.train_loss, outcome.train_mode_loss, outcome.eval_mode_loss)
    for number in numbers:
        if number is not None and not math.isfinite(number):
            raise ValueError(f"expected finite numbers, got {number}")
    return Run(record["method"], setting, record["seed"]), outcome
