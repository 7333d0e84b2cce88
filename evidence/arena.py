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
from evidence.claim import Table, Tell, difference_cell, mean_cell, name_lines
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
    f"are tested on. {NO_DIFFERENCE} Ranks are by the mean alone, and so is the best of the others, which "
    "favors it."
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
            "held_out": self.task.held_out,
            "halvings": self.task.halvings,
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
    assert rate is not None
    if rate in EDGES:
        further = Step(task, entrant, EDGES[rate], CHOOSING_SEED, "choice")
        if not known.has(further):
            return [further]
    return [Step(task, entrant, rate, seed, "report") for seed in range(seeds)]


class Known:
    """The rows of an arena, by what they are of; those of a task that was another one then are not seen."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = rows

    def has(self, step: Step) -> bool:
        """Return whether a training is done."""
        return any(
            (row["rate"], row["seed"], row["part"]) == (step.rate, step.seed, step.part)
            for row in self._of(step.task, step.entrant)
        )

    def rate(self, task: Task, entrant: Entrant) -> float | None:
        """Return the rate with the best score on the held-out images, of equals the smaller."""
        found = self.held_out(task, entrant)
        return max(sorted(found), key=found.__getitem__) if found else None

    def held_out(self, task: Task, entrant: Entrant) -> dict[float, float]:
        """Return the score at each rate that was tried, on the held-out images."""
        found = [row for row in self._of(task, entrant) if row["part"] == "choice"]
        return {float(row["rate"]): score_of(row) for row in found}

    def scores(self, task: Task, entrant: Entrant) -> dict[int, float]:
        """Return the score of each seed at the chosen rate, on the test images."""
        return {int(row["seed"]): score_of(row) for row in self.reports(task, entrant)}

    def reports(self, task: Task, entrant: Entrant) -> list[Row]:
        """Return the rows that report."""
        rate = self.rate(task, entrant)
        return [row for row in self._of(task, entrant) if (row["part"], row["rate"]) == ("report", rate)]

    def _of(self, task: Task, entrant: Entrant) -> list[Row]:
        wanted = Step(task, entrant, RATES[0], 0, "choice").key.items()
        same = [(name, value) for name, value in wanted if name not in OF_ONE_RUN]
        # the first rows have no word for what was alike in all of them
        return [row for row in self._rows if all(row.get(name, value) == value for name, value in same)]


OF_ONE_RUN = ("rate", "lr", "seed", "part")
"""What differs between the trainings of a method in a task."""


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


def tables_of(
    tasks: Sequence[Task],
    entrants: Sequence[Entrant],
    rows: Sequence[Row],
    ranked: Sequence[Entrant] | None = None,
) -> list[Table]:
    """Return a table for each task, and one of the ranks over all, of some if they are named."""
    known = Known(rows)
    tables = [
        _table_of(task, entrants, known) for task in tasks if any(known.scores(task, one) for one in entrants)
    ]
    ranks = {
        name: (fmean(place for place in found if place), found)
        for name, found in _ranks(tasks, ranked or entrants, known).items()
        if any(found)
    }
    lines = [
        [name, f"{mean:.2f}", *(str(place or "-") for place in found)]
        for name, (mean, found) in sorted(ranks.items(), key=lambda item: item[1][0])
    ]
    return [*tables, (["rank by mean score", "mean", *(task.name for task in tasks)], lines)]


def _table_of(task: Task, entrants: Sequence[Entrant], known: Known) -> Table:
    plain = known.scores(task, BATCH)
    lines = []
    shown = [entrant for entrant in entrants if known.reports(task, entrant)]
    for entrant in sorted(shown, key=lambda entrant: _mean(known.scores(task, entrant)), reverse=True):
        scores, reports = known.scores(task, entrant), known.reports(task, entrant)
        diverged = sum(row["status"] != "ok" for row in reports)
        lines.append(
            [
                entrant.label,
                f"{reports[0]['rate']:g}",
                mean_cell(list(scores.values()), 1, PERCENT),
                f"{fmean(row['test_error'] for row in reports):.1f}",
                "-" if entrant == BATCH else difference_cell(paired_difference(scores, plain), 1),
                str(len(reports)),
                str(diverged),
            ]
        )
    score = "Dice" if any("dice" in row for row in known.reports(task, BATCH)) else "accuracy"
    name = f"{task.name}, batch {task.batch_size}" + (f" ({task.note})" if task.note else "")
    return [name, "rate", f"{score}, %", "test set ±", "against batch", "seeds", "diverged"], lines


def _ranks(tasks: Sequence[Task], entrants: Sequence[Entrant], known: Known) -> dict[str, list[int | None]]:
    """Return each method's place by mean score in each task, 1 the best.

    A task in which not all have been measured from the same seeds has no places, and methods with another
    batch size than the task's, which show what small batches cost, have none.
    """
    rivals = [entrant for entrant in entrants if entrant.batch_size is None]
    places: dict[str, list[int | None]] = {entrant.label: [] for entrant in rivals}
    for task in tasks:
        scores = {entrant.label: known.scores(task, entrant) for entrant in rivals}
        complete = len({frozenset(found) for found in scores.values()}) == 1 and all(scores.values())
        for name, found in scores.items():
            above = sum(_mean(other) > _mean(found) for other in scores.values())
            places[name].append(1 + above if complete else None)
    return places


def verdict(tasks: Sequence[Task], entrants: Sequence[Entrant], ours: Entrant, rows: Sequence[Row]) -> str:
    """Return where ``ours`` is behind the best of the others and where before it, in a sentence each."""
    known = Known(rows)
    others = [entrant for entrant in entrants if entrant.batch_size is None and entrant != ours]
    found: dict[str, list[str]] = {"behind": [], "before": [], "no different from": []}
    for task in tasks:
        scores = known.scores(task, ours)
        if not all(known.scores(task, other) for other in others):
            continue
        best = max(others, key=lambda entrant: _mean(known.scores(task, entrant)))
        difference = paired_difference(scores, known.scores(task, best))
        if difference is None or difference.half_width is None:
            continue
        side = "no different from"
        if difference.decided:
            side = "behind" if difference.mean < 0 else "before"
        said = f"{_mean(scores):.1f} against {_mean(known.scores(task, best)):.1f} of {best.label}"
        found[side].append(f"{task.name} ({said})")
    named = {side: "; ".join(tasks_there) for side, tasks_there in found.items() if tasks_there}
    return " ".join(
        f"`{ours.label}` is {side} the best of the others in {text}." for side, text in named.items()
    )


def drawn(
    tasks: Sequence[Task], entrants: Sequence[Entrant], rows: Sequence[Row], panels: Sequence[Axes]
) -> None:
    """Draw the scores of each task in a panel, each seed and their mean."""
    known = Known(rows)
    for task, panel in zip(tasks, panels, strict=True):
        shown = [entrant for entrant in entrants if known.scores(task, entrant)]
        if not shown:
            panel.set_title(f"{task.name}:\nnot trained yet")
            continue
        ordered = sorted(shown, key=lambda entrant: _mean(known.scores(task, entrant)), reverse=True)
        for place, entrant in enumerate(ordered):
            scores = list(known.scores(task, entrant).values())
            found = estimate(scores, PERCENT)
            if found is None:
                continue
            color = "C3" if entrant.method in OURS else "C0"
            panel.plot([found.low, found.high], [place, place], color=color, linewidth=3, alpha=0.4)
            panel.plot(scores, [place] * len(scores), ".", color=color)
        name_lines(panel, [entrant.label for entrant in ordered])
        panel.set_xlabel("test score, % (dots: seeds; bars: 95 % interval of the mean)")
        panel.set_title(task.name)
        panel.plot([], [], color="C3", label="mbnorm's")
        panel.plot([], [], color="C0", label="others")


def _mean(scores: Mapping[int, float]) -> float:
    return fmean(scores.values()) if scores else 0.0
