"""Methods compared on a list of tasks, each at the learning rate that suits it there."""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import date
from typing import NamedTuple

from benchmarks.rows import Row
from evidence.claim import Tell
from evidence.lists import EDGES, RATES, Entrant, Part, Task, data_of
from mbnorm.experiments.grid import Run
from mbnorm.experiments.training import fit, measured, net_for
from mbnorm.experiments.workers import in_processes, preparing

CHOOSING_SEED = 1000
"""Chooses the rates; the seeds from 0 on report."""
BATCH = Entrant("batch")


class Step(NamedTuple):
    """A training of the arena."""

    task: Task
    entrant: Entrant
    rate: float
    seed: int
    part: Part

    @property
    def key(self) -> Row:
        """What a row has of it, by name."""
        setting = self.task.setting(self.rate, self.entrant.batch_size or self.task.batch_size)
        return {
            "task": self.task.name,
            "entrant": str(self.entrant),
            "rate": self.rate,
            "seed": self.seed,
            "part": self.part,
            "method": self.entrant.method,
            **asdict(setting),
            "images": self.task.images,
        }


def next_steps(
    tasks: Sequence[Task], entrants: Sequence[Entrant], seeds: int, rows: Sequence[Row]
) -> list[Step]:
    """Return what can be trained now: first what chooses a rate, and at the chosen one what reports."""
    known = Known(rows)
    return [
        step
        for task in tasks
        for entrant in entrants
        for step in _of(task, entrant, seeds, known)
        if not known.has(step)
    ]


def _of(task: Task, entrant: Entrant, seeds: int, known: "Known") -> list[Step]:
    choosing = [Step(task, entrant, rate, CHOOSING_SEED, "choice") for rate in RATES]
    if not all(map(known.has, choosing)):
        return choosing
    rate = known.rate(task, entrant)
    if rate in EDGES:
        further = Step(task, entrant, EDGES[rate], CHOOSING_SEED, "choice")
        if not known.has(further):
            return [further]
    return [Step(task, entrant, rate, seed, "report") for seed in range(seeds)]


class Known:
    """The rows of an arena, by what they are of."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._found = {_key(row): row for row in rows}
        self._rows = rows

    def has(self, step: Step) -> bool:
        """Return whether a training is done."""
        return _key(step.key) in self._found

    def rate(self, task: Task, entrant: Entrant) -> float:
        """Return the rate with the best score on the held-out images; of equals the smaller."""
        found = [row for row in self._rows if _is_of(row, task, entrant) and row["part"] == "choice"]
        best = max(sorted(found, key=lambda row: float(row["rate"])), key=_score)
        return float(best["rate"])

    def scores(self, task: Task, entrant: Entrant) -> dict[int, float]:
        """Return the score of each seed at the chosen rate, on the test images."""
        return {int(row["seed"]): _score(row) for row in self.reports(task, entrant)}

    def reports(self, task: Task, entrant: Entrant) -> list[Row]:
        """Return the rows that report."""
        return [row for row in self._rows if _is_of(row, task, entrant) and row["part"] == "report"]


def _key(row: Row) -> tuple[object, ...]:
    names = ("task", "entrant", "rate", "seed", "part", "epochs", "images")
    return tuple(row[name] for name in names)


def _is_of(row: Row, task: Task, entrant: Entrant) -> bool:
    return bool(row["task"] == task.name and row["entrant"] == str(entrant))


def _score(row: Row) -> float:
    # a net whose loss is not finite may be right by chance
    return float(row["dice" if "dice" in row else "accuracy"]) if row["status"] == "ok" else 0.0


def trained(step: Step) -> Row:
    """Train once, and return the row."""
    start = time.perf_counter()
    data, task, entrant = data_of(step.task, step.part), step.task, step.entrant
    run = Run(entrant.method, task.setting(step.rate, entrant.batch_size or task.batch_size), step.seed)
    with preparing(task.model):
        model = net_for(run, data)
        loss = fit(model, run, data)
        scores = measured(model, data)
    finite = math.isfinite(loss)
    return {
        **step.key,
        "status": "ok" if finite else "diverged",
        **scores,
        "train_loss": loss if finite else None,
        "seconds": round(time.perf_counter() - start, 1),
        "date": date.today().isoformat(),
    }


def measured_rows(
    tasks: Sequence[Task], entrants: Sequence[Entrant], seeds: int, tell: Tell, known: Sequence[Row]
) -> Iterator[Row]:
    """Train all that is not known, and yield the rows as the trainings end."""
    rows = list(known)
    while steps := next_steps(tasks, entrants, seeds, rows):
        for number, row in enumerate(in_processes(trained, steps), 1):
            rows.append(row)
            tell(
                f"{number} of {len(steps)}: {row['entrant']}, {row['task']}, rate {row['rate']}, "
                f"seed {row['seed']}: {_score(row):.1f} %, {row['seconds']} s"
            )
            yield row


def tables_of(tasks, entrants, rows):
    return []


def drawn(tasks, entrants, rows, panels):
    pass
