"""Methods compared on a list of tasks, each at the learning rate that suits it there."""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import date
from statistics import fmean
from typing import NamedTuple

from matplotlib.axes import Axes

from benchmarks.rows import Row
from evidence.claim import Table, Tell, difference_cell, mean_cell
from evidence.lists import EDGES, RATES, Entrant, Part, Task, data_of
from evidence.trained import score_of
from mbnorm.experiments.estimates import NO_DIFFERENCE, PERCENT, estimate, paired_difference
from mbnorm.experiments.grid import Run
from mbnorm.experiments.methods import OURS
from mbnorm.experiments.training import fit, measured
from mbnorm.experiments.workers import in_processes, preparing

CHOOSING_SEED = 1000
"""Chooses the rates; the seeds from 0 on report."""
BATCH = Entrant("batch")
MEASURED = (
    f"Each method trains at the rates {', '.join(map(str, RATES))} for a batch of 64, smaller batches in "
    "proportion, from a seed that no other run has; where the best is the first or the last, at a third or "
    "three times of it, too. Held-out training images choose the rate. Further seeds train at it, and all "
    "test images measure these: accuracy, or Dice over all images where pixels have classes. A training "
    "whose loss is not finite scores 0. From one seed all methods see the same batches. Batch norm at 32 "
    'sees as many images, in fewer steps. "test set ±" is half the 95 % interval that comes of which images '
    f"are tested on. {NO_DIFFERENCE} Ranks are by the mean alone."
)


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
        best = max(sorted(found, key=lambda row: float(row["rate"])), key=score_of)
        return float(best["rate"])

    def scores(self, task: Task, entrant: Entrant) -> dict[int, float]:
        """Return the score of each seed at the chosen rate, on the test images."""
        return {int(row["seed"]): score_of(row) for row in self.reports(task, entrant)}

    def reports(self, task: Task, entrant: Entrant) -> list[Row]:
        """Return the rows that report."""
        of_task = [row for row in self._rows if _is_of(row, task, entrant)]
        if not any(row["part"] == "choice" for row in of_task):
            return []
        rate = self.rate(task, entrant)
        return [row for row in of_task if row["part"] == "report" and row["rate"] == rate]


def _key(row: Row) -> tuple[object, ...]:
    names = ("task", "entrant", "rate", "seed", "part", "epochs", "images")
    return tuple(row[name] for name in names)


def _is_of(row: Row, task: Task, entrant: Entrant) -> bool:
    return bool(row["task"] == task.name and row["entrant"] == str(entrant))


def trained(step: Step) -> Row:
    """Train once, and return the row."""
    start = time.perf_counter()
    data, task, entrant = data_of(step.task, step.part), step.task, step.entrant
    run = Run(entrant.method, task.setting(step.rate, entrant.batch_size or task.batch_size), step.seed)
    with preparing(task.model):
        model = entrant.net(run, data)
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
                f"seed {row['seed']}: {score_of(row):.1f} %, {row['seconds']} s"
            )
            yield row


def tables_of(tasks: Sequence[Task], entrants: Sequence[Entrant], rows: Sequence[Row]) -> list[Table]:
    """Return a table for each task, and one of the ranks over all."""
    known = Known(rows)
    tables = [_table_of(task, entrants, known) for task in tasks]
    ranks = _ranks(tasks, entrants, known)
    lines = [[name, f"{fmean(found):.2f}", *map(str, found)] for name, found in ranks.items()]
    lines.sort(key=lambda line: float(line[1]))
    return [*tables, (["rank by mean score", "mean", *(task.name for task in tasks)], lines)]


def _table_of(task: Task, entrants: Sequence[Entrant], known: "Known") -> Table:
    plain = known.scores(task, BATCH)
    lines = []
    for entrant in sorted(entrants, key=lambda entrant: _mean(known.scores(task, entrant)), reverse=True):
        scores, reports = known.scores(task, entrant), known.reports(task, entrant)
        diverged = sum(row["status"] != "ok" for row in reports)
        lines.append(
            [
                str(entrant),
                f"{known.rate(task, entrant):g}" if reports else "-",
                mean_cell(list(scores.values()), 1, PERCENT),
                f"{fmean(row['test_error'] for row in reports):.1f}" if reports else "-",
                "-" if entrant == BATCH else difference_cell(paired_difference(scores, plain), 1),
                str(len(reports)),
                str(diverged),
            ]
        )
    score = "Dice" if any("dice" in row for row in known.reports(task, BATCH)) else "accuracy"
    name = f"{task.name}, batch {task.batch_size}" + (f" ({task.note})" if task.note else "")
    return [name, "rate", f"{score}, %", "test set ±", "against batch", "seeds", "diverged"], lines


def _ranks(tasks: Sequence[Task], entrants: Sequence[Entrant], known: "Known") -> dict[str, list[int]]:
    """Return each method's place by mean score in each task that all have been measured in, 1 the best.

    Methods with another batch size than the task's show what small batches cost, and have no place.
    """
    places: dict[str, list[int]] = {str(e): [] for e in entrants if e.batch_size is None}
    for task in tasks:
        means = {str(e): _mean(known.scores(task, e)) for e in entrants if e.batch_size is None}
        for name, mean in means.items():
            places[name].append(1 + sum(other > mean for other in means.values()))
    return places


def verdict(tasks: Sequence[Task], entrants: Sequence[Entrant], ours: Entrant, rows: Sequence[Row]) -> str:
    """Return where ``ours`` is behind the best of the others and where before it, in a sentence each."""
    known = Known(rows)
    others = [entrant for entrant in entrants if entrant.batch_size is None and entrant != ours]
    found: dict[str, list[str]] = {"behind": [], "before": [], "no different from": []}
    for task in tasks:
        scores = known.scores(task, ours)
        best = max(others, key=lambda entrant: _mean(known.scores(task, entrant)))
        difference = paired_difference(scores, known.scores(task, best))
        if difference is None:
            continue
        side = "no different from"
        if difference.decided:
            side = "behind" if difference.mean < 0 else "before"
        said = f"{_mean(scores):.1f} against {_mean(known.scores(task, best)):.1f} of {best}"
        found[side].append(f"{task.name} ({said})")
    named = {side: "; ".join(tasks_there) for side, tasks_there in found.items() if tasks_there}
    return " ".join(f"`{ours}` is {side} the best of the others in {text}." for side, text in named.items())


def drawn(
    tasks: Sequence[Task], entrants: Sequence[Entrant], rows: Sequence[Row], panels: Sequence[Axes]
) -> None:
    """Draw the scores of each task in a panel, each seed and their mean."""
    known = Known(rows)
    for task, panel in zip(tasks, panels, strict=True):
        ordered = sorted(entrants, key=lambda entrant: _mean(known.scores(task, entrant)))
        for place, entrant in enumerate(ordered):
            scores = list(known.scores(task, entrant).values())
            found = estimate(scores, PERCENT)
            if found is None:
                continue
            color = "C3" if entrant.method in OURS else "C0"
            panel.plot([found.low, found.high], [place, place], color=color, linewidth=3, alpha=0.4)
            panel.plot(scores, [place] * len(scores), ".", color=color)
        panel.set_yticks(range(len(ordered)), [str(entrant) for entrant in ordered], fontsize=8)
        panel.set_xlabel("test score, %", fontsize=8)
        panel.set_title(task.name, fontsize=9)
        panel.plot([], [], color="C3", label="mbnorm's (dots: seeds; bars: 95 % interval of the mean)")
        panel.plot([], [], color="C0", label="others")


def _mean(scores: Mapping[int, float]) -> float:
    return fmean(scores.values()) if scores else 0.0
