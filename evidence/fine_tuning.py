"""Trained nets that learn other data at batch 2, with batch norm, without its noise, and with a memory."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from functools import partial
from itertools import islice
from statistics import fmean
from typing import NamedTuple, TypeAlias

import torch
from matplotlib.axes import Axes
from numpy import format_float_positional
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.rows import Row
from evidence.claim import Claim, Table, Tell, name_lines
from evidence.lists import CONFIRMED_FINE, TUNED_FINE, FineTuning
from evidence.pretrained import PRETRAINING, SIDE, check, data_of, pretrained, with_new_head
from evidence.trained import score_of, where
from mbnorm.experiments.dataset import Data
from mbnorm.experiments.estimates import NO_DIFFERENCE, PERCENT, Estimate, estimate, paired_difference
from mbnorm.experiments.methods import Method, schedule_for, set_method
from mbnorm.experiments.sampling import one_epoch
from mbnorm.experiments.training import MOMENTUM, measured
from mbnorm.experiments.workers import in_processes

HABITS: tuple[Method, ...] = ("batch", "frozen")
OURS: tuple[Method, ...] = ("momentum-constant", "memorized", "matched")
METHODS: tuple[Method, ...] = (*HABITS, "renorm", *OURS)


class Step(NamedTuple):
    """A training that is measured after one or several numbers of steps."""

    task: FineTuning
    method: Method
    rate: float
    seed: int
    lengths: tuple[int, ...]

    def without(self, rows: Sequence[Row]) -> "Step":
        """Return the same training, measured where no row is."""
        of = {"task": self.task.name, "method": self.method, "rate": self.rate, "seed": self.seed}
        known = {row["steps"] for row in where(rows, **of)}
        return self._replace(lengths=tuple(length for length in self.lengths if length not in known))


def next_steps(tasks: Sequence[FineTuning], seeds: int, rows: Sequence[Row]) -> list[Step]:
    """Return what there is to train, seed by seed."""
    steps = [
        Step(task, method, rate, seed, lengths).without(rows)
        for seed in range(seeds)
        for task in tasks
        for rate in task.rates
        for method in METHODS
        for lengths in _trainings(task, method)
    ]
    return [step for step in steps if step.lengths]


def _trainings(task: FineTuning, method: Method) -> list[tuple[int, ...]]:
    """Return the lengths that a training can be measured after."""
    # the bounds of batch renormalization follow the length of its training
    return [(length,) for length in task.lengths] if method == "renorm" else [task.lengths]


Measure: TypeAlias = Callable[[nn.Module, Data], Sequence[Row]]
"""Returns the scores of a trained net, as the rows have them: once, or in several ways."""


def _as_it_is(model: nn.Module, data: Data) -> Sequence[Row]:
    return [measured(model, data)]


def trained(step: Step, measure: Measure = _as_it_is) -> list[Row]:
    """Fine-tune once, and return the rows of each length."""
    task, data = step.task, data_of(step.task)
    of = {
        "task": task.name,
        "method": step.method,
        "rate": step.rate,
        "seed": step.seed,
        "start": task.start,
        "data": task.data,
        "images": len(data.train_inputs),
        "tested": len(data.test_inputs),
        "batch_size": task.batch_size,
    }
    # the new layer and the dropout
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(step.seed)
        model = with_new_head(pretrained(task.start), data.classes)
        rows = fine_tuned(model, step, data, measure)
        return [of | row | {"date": date.today().isoformat()} for row in rows]


def fine_tuned(model: nn.Module, step: Step, data: Data, measure: Measure = _as_it_is) -> Iterator[Row]:
    """Train a net on, in place, and yield what it has come to after each length."""
    start = time.perf_counter()
    batch_size, last = step.task.batch_size, step.lengths[-1]
    set_method(model, step.method, batch_size, data.shape)
    optimizer = torch.optim.SGD(model.parameters(), lr=step.rate, momentum=MOMENTUM, fused=True)
    schedule = schedule_for(step.method, model, last, batch_size)
    losses: list[Tensor] = []
    model.train()
    for number, batch in enumerate(islice(_batches(data, batch_size, step.seed), last), 1):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(data.train_inputs[batch]), data.train_targets[batch])
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if schedule is not None:
            schedule.step()
        losses.append(loss.detach())
        if number in step.lengths:
            train_loss = torch.stack(losses).mean().item()
            finite = math.isfinite(train_loss)
            of = {"steps": number, "status": "ok" if finite else "diverged"}
            for scores in measure(model, data):
                seconds = round(time.perf_counter() - start, 1)
                yield of | scores | {"train_loss": train_loss if finite else None, "seconds": seconds}
            model.train()


def _batches(data: Data, batch_size: int, seed: int) -> Iterator[Tensor]:
    draws = torch.Generator().manual_seed(seed)
    while True:
        yield from one_epoch("shuffled", data.train_targets, batch_size, draws)


def _check(tasks: Sequence[FineTuning]) -> None:
    for task in tasks:
        check(task)


def _rows(tasks: Sequence[FineTuning], seeds: int, tell: Tell, known: Sequence[Row]) -> Iterator[Row]:
    steps = next_steps(tasks, seeds, known)
    for number, rows in enumerate(in_processes(trained, steps), 1):
        for row in rows:
            tell(
                f"{number} of {len(steps)}: {row['method']}, {row['task']}, rate {row['rate']}, "
                f"{row['steps']} steps, seed {row['seed']}: {score_of(row):.1f} %, {row['seconds']} s"
            )
            yield row


class Column(NamedTuple):
    """The rows of a task at a rate after a number of steps."""

    rate: float
    steps: int
    rows: Sequence[Row]

    def __str__(self) -> str:
        return f"rate {format_float_positional(self.rate)}, {self.steps:,} steps"

    def scores(self, method: Method) -> dict[int, float]:
        """Return the score of a method from each seed."""
        return {row["seed"]: score_of(row) for row in where(self.rows, method=method)}

    def mean(self, method: Method) -> Estimate | None:
        """Return the mean score of a method."""
        return estimate(list(self.scores(method).values()), PERCENT)

    def better_habit(self) -> Method | None:
        """Return which of batch norm as it is and frozen has the better mean, if both have one."""
        means = [(found.mean, method) for method in HABITS if (found := self.mean(method))]
        return max(means)[1] if len(means) == len(HABITS) else None

    def gain(self, method: Method) -> Estimate | None:
        """Return what a method has over the better habit, from equal seeds."""
        habit = self.better_habit()
        return None if habit is None else paired_difference(self.scores(method), self.scores(habit))


def columns(task: FineTuning, rows: Sequence[Row]) -> list[Column]:
    """Return the rows of a task by rate and steps."""
    return [
        Column(rate, steps, where(rows, task=task.name, rate=rate, steps=steps))
        for rate in task.rates
        for steps in task.lengths
    ]


def _tables(tasks: Sequence[FineTuning], rows: Sequence[Row]) -> list[Table]:
    return [_table(task, columns(task, rows)) for task in tasks]


def _table(task: FineTuning, found: Sequence[Column]) -> Table:
    lines = [[method, *(_cell(column.mean(method)) for column in found)] for method in METHODS]
    lines.append(["better of batch and frozen", *(column.better_habit() or "-" for column in found)])
    for method in OURS:
        gains = [column.gain(method) for column in found]
        lines.append([f"{method} minus that", *("-" if gain is None else gain.signed() for gain in gains)])
    lines.append(["half the interval of the test images", *(_test_error(column.rows) for column in found)])
    return [f"{task.name}: {score_name(task)}, %", *map(str, found)], lines


def _cell(mean: Estimate | None) -> str:
    return "-" if mean is None else str(mean)


def _test_error(rows: Sequence[Row]) -> str:
    return f"{fmean(row['test_error'] for row in rows):.1f}" if rows else "-"


def score_name(task: FineTuning) -> str:
    """Return what measures a task."""
    return "accuracy" if task.start == "ImageNet" else "Dice"


def _draw(tasks: Sequence[FineTuning], rows: Sequence[Row], panels: Sequence[Axes]) -> None:
    for panel, task in zip(panels, tasks, strict=True):
        for number, column in enumerate(columns(task, rows)):
            means = [column.mean(method) for method in METHODS]
            found = [(place, mean) for place, mean in enumerate(means) if mean is not None]
            ys = [place + 0.15 * (number - 1.5) for place, _ in found]
            means_found = [mean for _, mean in found]
            panel.plot([m.mean for m in means_found], ys, "o", color=f"C{number}", label=str(column))
            panel.hlines(ys, [m.low for m in means_found], [m.high for m in means_found], color=f"C{number}")
        name_lines(panel, METHODS)
        panel.set_xlabel(f"{score_name(task)}, % (lines: 95 % intervals)")
        panel.set_title(task.name)


def _claim(title: str, tasks: tuple[FineTuning, ...], data: str) -> Claim:
    of_these = ". ".join(described(task) for task in tasks)
    return Claim(
        title=title,
        sentence=(
            "How nets are fine-tuned at batch 2, with batch norm plain, frozen or renormalized, and with "
            f"layers that have a memory, on {data}."
        ),
        measured=(
            f"Score on test images after a fine-tuning of all layers. {of_these}. The last layer is new. It, "
            "the order of the images and the dropout follow the seed, and are the same for all methods. SGD "
            f"with momentum {MOMENTUM}, without weight decay. The rate is constant, so the shorter training "
            "is the beginning of the longer one, except for renorm, whose bounds follow the length. frozen "
            "normalizes with the running statistics of the trained net, and learns scale and shift. The "
            "better of batch and frozen has the better mean in this table; what others have over it is taken "
            f"seed by seed, in points. {NO_DIFFERENCE} A training whose loss is not finite "
            "has the score 0. The last line is half the 95 % interval that comes of the choice of test "
            "images, as a mean over the trainings."
        ),
        rows=partial(_rows, tasks),
        tables=partial(_tables, tasks),
        draw=partial(_draw, tasks),
        panels=len(tasks),
        seeds=3,
        check=partial(_check, tasks),
    )


def described(task: FineTuning) -> str:
    """Return where a task starts, and how many images it has."""
    note = f" ({task.note})" if task.note else ""
    images = "all images" if task.images is None else f"{task.images:,} images"
    tested = "tested on all"
    if task.tested is not None:
        tested = f"tested on the first {task.tested:,}, for a test on all takes minutes"
    start = f"trained before ({PRETRAINING})"
    if task.start == "ImageNet":
        start = f"trained on ImageNet; inputs are scaled to {SIDE}x{SIDE} pixels"
    return f"{task.name}{note}: {start}; {images} to train on, {tested}"


CLAIM = _claim("Fine-tuning", TUNED_FINE, "data that rules may be chosen on")
CONFIRMED = _claim(
    "Fine-tuning, data that no rule was chosen on", CONFIRMED_FINE, "data that no rule was chosen on"
)
